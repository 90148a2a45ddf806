"""Evaluate PADet.

    python -m padet.evaluate runs/padet/quick/best.pt                         # val of its training data
    python -m padet.evaluate runs/padet/vgg16_384/best.pt --data data/coco    # COCO val2017
    torchrun --nproc-per-node 8 -m padet.evaluate runs/padet/vgg16_384/best.pt

Prints the 12 COCO numbers and writes them, with all detections, into a folder.
"""

from core import cli
from core.arguments import evaluate_parser
from padet.config import Config


def main() -> None:
    """Parse the command line, then evaluate; torch is imported only when there is something to do."""
    arguments = evaluate_parser("padet").parse_args()
    from core.commands import evaluate
    from padet.model import PADet
    from padet.postprocess import detect

    evaluate(arguments, "padet", Config, PADet, detect)


if __name__ == "__main__":
    cli.run(main)
