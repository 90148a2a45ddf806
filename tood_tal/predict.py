"""Detect with TOOD and draw what it finds.

    python -m tood_tal.predict runs/tood_tal/quick/best.pt shapes              # some drawn test images
    python -m tood_tal.predict runs/tood_tal/quick/best.pt photo.jpg folder/   # files and folders

Pictures and `predictions.json` go into a folder beside the weights.
"""

from core import cli
from core.arguments import predict_parser
from tood_tal.config import Config


def main() -> None:
    """Parse the command line, then predict; torch is imported only when there is something to do."""
    arguments = predict_parser("tood_tal").parse_args()
    from core.commands import predict
    from tood_tal.model import TOOD
    from tood_tal.postprocess import detect

    predict(arguments, "tood_tal", Config, TOOD, detect)


if __name__ == "__main__":
    cli.run(main)
