"""Draw which anchors are positive and negative, with their Combined IoUs (Fig. 1 of the paper).

    python -m dynamic_atss.visualize runs/dynamic_atss/quick/best.pt shapes  # some drawn images
    python -m dynamic_atss.visualize runs/dynamic_atss/r50_1x/best.pt 000000000139.jpg 285  # by file name or image id
    python -m dynamic_atss.train --preset quick --picture-every 100   # also while a model learns

Pictures and `assignments.json`, which holds every number, go into a folder beside the weights.
"""

from core import cli
from core.arguments import visualize_parser
from dynamic_atss.config import Config


def main() -> None:
    """Parse the command line, then draw; torch is imported only when there is something to do."""
    arguments = visualize_parser("dynamic_atss").parse_args()
    from core.visualize import visualize
    from dynamic_atss.explain import SCORE_AXIS, explain
    from dynamic_atss.model import DynamicATSS

    visualize(arguments, "dynamic_atss", Config, DynamicATSS, explain, SCORE_AXIS)


if __name__ == "__main__":
    cli.run(main)
