"""Draw which anchors are positive and negative before and after promotion (Figs. 4 and 6 of the paper).

    python -m padet.visualize runs/padet/quick/best.pt shapes         # some drawn images
    python -m padet.visualize runs/padet/vgg16_384/best.pt 000000000139.jpg 285   # by file name or image id
    python -m padet.train --preset quick --picture-every 100          # also while a model learns

Pictures and `assignments.json`, which holds every number, go into a folder beside the weights. Its subfolder
`more` shows each image as the network sees it: all positives, APM's scores of every level, the places that FAM reads.
"""

from core import cli
from core.arguments import visualize_parser
from padet.config import Config


def main() -> None:
    """Parse the command line, then draw; torch is imported only when there is something to do."""
    arguments = visualize_parser("padet").parse_args()
    from core.visualize import visualize
    from padet.explain import SCORE_AXIS, explain
    from padet.figures import draw_promotion
    from padet.model import PADet

    visualize(arguments, "padet", Config, PADet, explain, SCORE_AXIS, draw_promotion)


if __name__ == "__main__":
    cli.run(main)
