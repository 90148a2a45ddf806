"""Published numbers of PADet beside measured ones; what else a results section needs.

    python -m padet.report                                          # all runs in runs/padet
    python -m padet.report runs/padet/vgg16_384 --out results.md    # one run, also into a file
    python -m padet.report --submission detections.json --image-info image_info_test-dev2017.json --name mine

The last one makes the zip that COCO's test-dev server took while it was open.
"""

from pathlib import Path

from core import cli
from core.published import read_published
from core.report import check_modes, print_report, report_parser, submit
from padet.config import PRESETS

RESULTS = Path(__file__).with_name("results.yaml")


def main() -> None:
    """Parse the command line, then print tables or write the zip; nothing is measured."""
    arguments = report_parser("padet").parse_args()
    check_modes(arguments)
    published = read_published(RESULTS, PRESETS)
    if arguments.submission:
        submit(arguments, "padet", published)
    else:
        print_report(arguments.runs, arguments.out, "padet", published, PRESETS)


if __name__ == "__main__":
    cli.run(main)
