"""Evaluate PAA.

    python -m paa.evaluate runs/paa/quick/best.pt                           # val of the data it was trained on
    python -m paa.evaluate runs/paa/r50_1p5x/best.pt --data data/coco       # COCO val2017
    python -m paa.evaluate runs/paa/r50_1p5x/best.pt --tta                  # 26 views of each image, merged
    torchrun --nproc-per-node 8 -m paa.evaluate runs/paa/r50_1p5x/best.pt   # shared out over eight GPUs

Prints the 12 COCO numbers and writes them, with all detections, into a folder.
"""

import argparse

from core import cli
from core.arguments import evaluate_parser
from paa.config import Config


def main() -> None:
    """Parse the command line, then evaluate; torch is imported only when there is something to do."""
    parser = evaluate_parser("paa")
    parser.add_argument(
        "--score-voting",
        action=argparse.BooleanOptionalAction,
        help="refine kept boxes by their neighbours (section 3.3); default: as in training",
    )
    arguments = parser.parse_args()
    from core.commands import evaluate
    from paa.model import PAA
    from paa.postprocess import detect

    changes = {} if arguments.score_voting is None else {"score_voting": arguments.score_voting}
    evaluate(arguments, "paa", Config, PAA, detect, changes)


if __name__ == "__main__":
    cli.run(main)
