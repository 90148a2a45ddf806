"""Evaluate Dynamic ATSS.

    python -m dynamic_atss.evaluate runs/dynamic_atss/quick/best.pt                      # val of its training data
    python -m dynamic_atss.evaluate runs/dynamic_atss/r50_1x/best.pt --data data/coco    # COCO val2017
    torchrun --nproc-per-node 8 -m dynamic_atss.evaluate runs/dynamic_atss/r50_1x/best.pt

Prints the 12 COCO numbers and writes them, with all detections, into a folder.
"""

from core import cli
from core.arguments import evaluate_parser
from dynamic_atss.config import Config


def main() -> None:
    """Parse the command line, then evaluate; torch is imported only when there is something to do."""
    arguments = evaluate_parser("dynamic_atss").parse_args()
    from core.commands import evaluate
    from dynamic_atss.model import DynamicATSS
    from dynamic_atss.postprocess import detect

    evaluate(arguments, "dynamic_atss", Config, DynamicATSS, detect)


if __name__ == "__main__":
    cli.run(main)
