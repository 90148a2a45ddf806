"""Detect with Dynamic ATSS and draw what it finds.

    python -m dynamic_atss.predict runs/dynamic_atss/quick/best.pt shapes              # some drawn test images
    python -m dynamic_atss.predict runs/dynamic_atss/quick/best.pt photo.jpg folder/   # files and folders

Pictures and `predictions.json` go into a folder beside the weights.
"""

from core import cli
from core.arguments import predict_parser
from dynamic_atss.config import Config


def main() -> None:
    """Parse the command line, then predict; torch is imported only when there is something to do."""
    arguments = predict_parser("dynamic_atss").parse_args()
    from core.commands import predict
    from dynamic_atss.model import DynamicATSS
    from dynamic_atss.postprocess import detect

    predict(arguments, "dynamic_atss", Config, DynamicATSS, detect)


if __name__ == "__main__":
    cli.run(main)
