"""Count positives and negatives before and after promotion (Figs. 1 and 2 of the paper).

    python -m padet.statistics runs/padet/vgg16_384/best.pt              # what a model makes of the images of val
    python -m padet.statistics runs/padet/vgg16_384/best.pt --steps 100  # of training batches, augmented
    python -m padet.statistics --preset vgg16_384 --data data/coco       # initial anchors alone: needs no weights

Prints means over images with objects; what a model does is also written as JSON beside its weights.
"""

from pathlib import Path

from core import cli
from core.arguments import add_hardware
from padet.config import PRESETS


def parser() -> cli.OneLineParser:
    """`python -m padet.statistics [WEIGHTS] [--preset P] [--data D] [--split val] [--steps N]`."""
    parser = cli.OneLineParser(
        prog="python -m padet.statistics",
        description="Mean numbers of positive and negative anchors of an image: initial ones, and with either or both "
        "parts of APM.",
    )
    parser.add_argument("weights", nargs="?", type=Path, metavar="WEIGHTS", help="runs/.../best.pt; default: none")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="instead of weights: count its initial anchors")
    parser.add_argument("--data", help="COCO or VOC folder, dataset YAML or shapes; default: the model's or preset's")
    parser.add_argument("--split", choices=("train", "val", "test"), default="val", help="default: val")
    parser.add_argument("--steps", type=int, help="count in so many batches of a training run, augmented as there")
    parser.add_argument("--out", type=Path, help="JSON file; default: anchors-<split>.json beside the weights")
    parser.add_argument("--workers", type=int, help="loader processes")
    parser.add_argument("--batch-size", type=int, help="images of a batch")
    add_hardware(parser)
    return parser


def main() -> None:
    """Parse the command line, then count; torch is imported only when there is something to do."""
    command = parser()
    arguments = command.parse_args()
    if (arguments.weights is None) == (arguments.preset is None):
        command.error("give either WEIGHTS or --preset, whose initial anchors need no weights")
    if arguments.steps is not None and arguments.steps < 1:
        command.error(f"--steps must be at least 1, got {arguments.steps}")
    from padet.balance import measure

    measure(arguments)


if __name__ == "__main__":
    cli.run(main)
