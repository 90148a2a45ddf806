"""Evaluate TOOD.

    python -m tood_tal.evaluate runs/tood_tal/quick/best.pt                      # val of its training data
    python -m tood_tal.evaluate runs/tood_tal/r50_1x/best.pt --data data/coco    # COCO val2017
    torchrun --nproc-per-node 8 -m tood_tal.evaluate runs/tood_tal/r50_1x/best.pt

Prints the 12 COCO numbers and writes them, with all detections, into a folder.
"""

from core import cli
from core.arguments import evaluate_parser
from tood_tal.config import Config


def main() -> None:
    """Parse the command line, then evaluate; torch is imported only when there is something to do."""
    arguments = evaluate_parser("tood_tal").parse_args()
    from core.commands import evaluate
    from tood_tal.model import TOOD
    from tood_tal.postprocess import detect

    evaluate(arguments, "tood_tal", Config, TOOD, detect)


if __name__ == "__main__":
    cli.run(main)
