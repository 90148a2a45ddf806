"""Draw which anchors PAA makes positive and negative, with their scores and the fitted mixture (Figs. 3, 4 and 6).

    python -m paa.visualize runs/paa/quick/best.pt shapes                       # some drawn images
    python -m paa.visualize runs/paa/r50_1p5x/best.pt 000000000139.jpg 285      # by file name or image id
    python -m paa.train --preset quick --picture-every 100                      # also while a model learns

Pictures and `assignments.json`, which holds every number, go into a folder beside the weights.
"""

from core import cli
from core.arguments import visualize_parser
from paa.config import Config


def main() -> None:
    """Parse the command line, then draw; torch is imported only when there is something to do."""
    arguments = visualize_parser("paa").parse_args()
    from core.visualize import visualize
    from paa.explain import SCORE_AXIS, explain
    from paa.model import PAA

    visualize(arguments, "paa", Config, PAA, explain, SCORE_AXIS)


if __name__ == "__main__":
    cli.run(main)
