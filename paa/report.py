"""PAA's published numbers beside measured ones; what else a results section needs.

    python -m paa.report                                              # all runs in runs/paa
    python -m paa.report runs/paa/r50_1p5x --out results.md           # one run, also into a file; draws positives.png
    python -m paa.report --iou-accuracy runs/paa/r50_1p5x/best.pt     # the paper's Table 2 for these weights
    python -m paa.report --submission detections.json --image-info image_info_test-dev2017.json --name paa

The last one makes the zip that COCO's test-dev server took while it was open.
"""

from pathlib import Path

from core import cli
from core.arguments import add_hardware
from core.errors import UserError
from core.published import read_published
from core.report import check_modes, print_report, report_parser, submit
from paa.config import PRESETS

RESULTS = Path(__file__).with_name("results.yaml")


def main() -> None:
    """Parse the command line; torch is imported only where numbers are measured."""
    arguments = parser().parse_args()
    check_modes(arguments, {"--iou-accuracy": arguments.iou_accuracy})
    if arguments.iou_accuracy:
        if arguments.out:
            raise UserError("--out does not go with --iou-accuracy, whose file is written beside the weights")
        from paa.iou_accuracy import measure

        measure(arguments)
        return
    published = read_published(RESULTS, PRESETS)
    if arguments.submission:
        submit(arguments, "paa", published)
    else:
        print_report(arguments.runs, arguments.out, "paa", published, PRESETS)


def parser() -> cli.OneLineParser:
    """The command line."""
    parser = report_parser("paa")
    group = parser.add_argument_group("accuracy of the IoU prediction (Table 2)")
    group.add_argument(
        "--iou-accuracy", type=Path, metavar="WEIGHTS", help="measure it and write it beside the weights"
    )
    group.add_argument("--data", help="COCO folder, dataset YAML or shapes; default: what the model was trained on")
    group.add_argument("--split", choices=("train", "val", "test"), default="val", help="default: val")
    group.add_argument("--workers", type=int, help="loader processes")
    group.add_argument("--batch-size", type=int, help="images of a forward")
    add_hardware(parser)
    return parser


if __name__ == "__main__":
    cli.run(main)
