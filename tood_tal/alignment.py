"""How well scores and boxes agree (the paper's Table 6), for any weights of this package.

    python -m tood_tal.alignment runs/tood_tal/quick/best.pt  # val of its training data
    python -m tood_tal.alignment runs/tood_tal/r50_1x/best.pt --data data/coco
    python -m tood_tal.alignment runs/tood_tal/small/best.pt --data bccd.yaml --split test --out results

Prints five numbers and writes them, with the protocol they follow, into a folder: rank correlation of score and IoU,
IoU of the most confident predictions, and the numbers of correct, redundant and wrong boxes after NMS. The paper leaves
the protocol open, so compare numbers of this command with each other, not with the paper's.
"""

from pathlib import Path

from core import cli
from core.arguments import add_hardware


def main() -> None:
    """Parse the command line, then measure; torch is imported only when there is something to do."""
    arguments = parser().parse_args()
    from tood_tal.analysis import measure

    measure(arguments)


def parser() -> cli.OneLineParser:
    """The command line."""
    parser = cli.OneLineParser(
        prog="python -m tood_tal.alignment",
        description="How well the scores and boxes of a trained model agree, as in the paper's Table 6; also writes "
        "alignment.json.",
    )
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="runs/.../best.pt or a released .safetensors")
    parser.add_argument("--data", help="COCO folder, dataset YAML or shapes; default: what the model was trained on")
    parser.add_argument("--split", choices=("train", "val", "test"), default="val", help="default: val")
    parser.add_argument(
        "--out", type=Path, help="folder of alignment.json; default: WEIGHTS' folder + /alignment-<split>"
    )
    parser.add_argument("--workers", type=int, help="loader processes")
    parser.add_argument("--batch-size", type=int, help="images of a forward")
    add_hardware(parser)
    return parser


if __name__ == "__main__":
    cli.run(main)
