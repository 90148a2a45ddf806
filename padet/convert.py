"""Make a released model of our own checkpoint, also for another input size, or a backbone of VGG-16's weights.

    python -m padet.convert runs/padet/vgg16_384/best.pt padet.safetensors
    python -m padet.convert runs/padet/vgg16_384/best.pt start512.safetensors --size 512
    python -m padet.convert vgg16-397923af.pth vgg16.safetensors      # torchvision's VGG-16
    python -m padet.convert vgg16_reducedfc.pth vgg16.safetensors     # SSD's, made from Caffe's

The first evaluates with no further option. The second is a start of training: python -m padet.train --size 512
--weights start512.safetensors. The last two are what --backbone-weights takes.
"""

from pathlib import Path

from core import cli
from core.cli import OneLineParser
from padet.config import SIZES, Config


def main() -> None:
    """Parse the command line, then convert; torch is imported only when there is something to do."""
    arguments = convert_parser().parse_args()
    from core import checkpoint
    from core.convert import check_target, read_own, write
    from padet.checkpoints import convert_vgg, resized
    from padet.model import PADet

    check_target(arguments.source, arguments.out, arguments.force)
    if not checkpoint.is_ours(arguments.source):
        convert_vgg(arguments)
        return
    described, use = read_own(arguments, "padet", Config), ""
    if arguments.size and arguments.size != described.config.size:
        described = resized(described, arguments.size)
        use = f"train it with the flags of its run and --size {arguments.size} --weights {arguments.out}"
    write(arguments, "padet", described, PADet, use)


def convert_parser() -> OneLineParser:
    """`python -m padet.convert IN OUT.safetensors [--size 512]`."""
    parser = OneLineParser(
        prog="python -m padet.convert",
        description="Our own checkpoint as a released model: one safetensors file with configuration and classes "
        "inside. Or VGG-16's ImageNet weights, torchvision's or a vgg16_reducedfc file, as a file for "
        "--backbone-weights. No code in the checkpoint is run.",
    )
    parser.add_argument("source", type=Path, metavar="IN", help="runs/.../best.pt, or a .pth of VGG-16")
    parser.add_argument("out", type=Path, metavar="OUT.safetensors", help="file to write")
    parser.add_argument(
        "--size",
        type=int,
        choices=SIZES,
        help="input size of the new model, pixels, to train it on; layers that only this size has start at random",
    )
    parser.add_argument("--licence", metavar="TEXT", help="note on the licence of the weights, kept in the file")
    parser.add_argument("--force", action="store_true", help="replace OUT.safetensors if it exists")
    return parser


if __name__ == "__main__":
    cli.run(main)
