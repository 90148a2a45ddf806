"""PAA's published numbers beside measured ones; what else a results section needs.

    python -m paa.report                                              # all runs in runs/paa
    python -m paa.report runs/paa/r50_1p5x --out results.md           # one run, also into a file; draws positives.png
    python -m paa.report --iou-accuracy runs/paa/r50_1p5x/best.pt     # the paper's Table 2 for these weights
    python -m paa.report --submission detections.json --image-info image_info_test-dev2017.json --name paa

The last one makes the zip that COCO's test-dev server took while it was open.
"""

import argparse
from pathlib import Path

from core import cli
from core.arguments import add_hardware
from core.errors import UserError
from core.published import Published, read_published
from core.report import CLOSED_NOTE, print_report, published_table, report_parser
from paa.config import PRESETS

RESULTS = Path(__file__).with_name("results.yaml")


def main() -> None:
    """Parse the command line; torch is imported only where numbers are measured."""
    arguments = parser().parse_args()
    check_modes(arguments)
    if arguments.iou_accuracy:
        from paa.iou_accuracy import measure

        measure(arguments)
        return
    published = read_published(RESULTS, PRESETS)
    if arguments.submission:
        submit(arguments, published)
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


def check_modes(arguments: argparse.Namespace) -> None:
    """UserError where the command line mixes the three things that this command does."""
    modes = {"RUN_DIR": arguments.runs, "--submission": arguments.submission, "--iou-accuracy": arguments.iou_accuracy}
    given = [name for name, value in modes.items() if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} do not go together; run the command once for each")
    of_submission = {"--image-info": arguments.image_info, "--name": arguments.name, "--trim": arguments.trim}
    for name, value in of_submission.items():
        if value and not arguments.submission:
            raise UserError(f"{name} belongs to --submission DETECTIONS.json")
        if not value and arguments.submission and name != "--trim":
            raise UserError(f"--submission needs {name} too")
    if arguments.iou_accuracy and arguments.out:
        raise UserError("--out does not go with --iou-accuracy, whose file is written beside the weights")


def submit(arguments: argparse.Namespace, published: Published) -> None:
    """Write the zip, then say what it is good for."""
    from core.submission import write_submission

    out = write_submission(
        arguments.submission, arguments.image_info, arguments.name, arguments.out, trim=arguments.trim
    )
    print(f"written to {out}\n{CLOSED_NOTE}")
    for table in published.tables:
        if table.split == "test-dev":
            print(f"\n{table.title}:\n\n{published_table(table, [[]] * len(table.rows))}", end="")
    print("\npython -m paa.report tells what the letters stand for")


if __name__ == "__main__":
    cli.run(main)
