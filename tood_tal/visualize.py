"""Draw which anchors are positive, with their t, and where score, IoU and t are high (Fig. 1 of the paper).

    python -m tood_tal.visualize runs/tood_tal/quick/best.pt shapes  # some drawn images
    python -m tood_tal.visualize runs/tood_tal/r50_1x/best.pt 000000000139.jpg 285  # by file name or image id
    python -m tood_tal.train --preset quick --picture-every 100   # also while a model learns

Pictures and `assignments.json`, which holds every candidate's numbers, go into a folder beside the weights, the maps of
score, IoU and t into `maps` in it.
"""

from core import cli
from core.arguments import visualize_parser
from tood_tal.config import Config


def main() -> None:
    """Parse the command line, then draw; torch is imported only when there is something to do."""
    arguments = visualize_parser("tood_tal").parse_args()
    from core.visualize import visualize
    from tood_tal.explain import SCORE_AXIS, explain
    from tood_tal.model import TOOD

    visualize(arguments, "tood_tal", Config, TOOD, explain, SCORE_AXIS)


if __name__ == "__main__":
    cli.run(main)
