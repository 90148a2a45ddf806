"""Detect with PADet and draw what it finds.

    python -m padet.predict runs/padet/quick/best.pt shapes              # some drawn test images
    python -m padet.predict runs/padet/quick/best.pt photo.jpg folder/   # files and folders

Pictures and `predictions.json` go into a folder beside the weights.
"""

from core import cli
from core.arguments import predict_parser
from padet.config import Config


def main() -> None:
    """Parse the command line, then predict; torch is imported only when there is something to do."""
    arguments = predict_parser("padet").parse_args()
    from core.commands import predict
    from padet.model import PADet
    from padet.postprocess import detect

    predict(arguments, "padet", Config, PADet, detect)


if __name__ == "__main__":
    cli.run(main)
