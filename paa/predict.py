"""Detect with PAA and draw what it finds.

    python -m paa.predict runs/paa/quick/best.pt shapes              # some drawn test images
    python -m paa.predict runs/paa/quick/best.pt photo.jpg folder/   # files and folders

Pictures and `predictions.json` go into a folder beside the weights.
"""

from core import cli
from core.arguments import predict_parser
from paa.config import Config


def main() -> None:
    """Parse the command line, then predict; torch is imported only when there is something to do."""
    arguments = predict_parser("paa").parse_args()
    from core.commands import predict
    from paa.model import PAA
    from paa.postprocess import detect

    predict(arguments, "paa", Config, PAA, detect)


if __name__ == "__main__":
    cli.run(main)
