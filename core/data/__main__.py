"""Look at a data set, or make one.

python -m core.data check DATA    counts of every split and all problems at once; exit code 2 if there is an error
python -m core.data shapes OUT    drawn images with known boxes, as a COCO folder
"""

import argparse
import json
from pathlib import Path

from core.cli import OneLineParser, run
from core.errors import UserError
from core.files import replace_file

CHECK_HELP = """All problems of a data set at once: counts of every split, then each check that found something, with
its number of cases and the first few of them. Errors are what training refuses or leaves out with a note; warnings are
accepted, and may be meant. The checks are listed in core/README.md."""


def main() -> None:
    """Run the command that the arguments name."""
    parser = OneLineParser(prog="python -m core.data", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check",
        help="counts and problems of a data set",
        description=CHECK_HELP,
        epilog="exit code: 0 without errors, whatever the warnings, or if --fix has written its copy; 2 with errors",
    )
    check.add_argument("data", metavar="DATA", help="COCO or VOC folder, dataset YAML, or the word shapes")
    check.add_argument("--pixels", action="store_true", help="decode every image; otherwise only headers are read")
    check.add_argument("--examples", type=int, default=3, metavar="N", help="cases shown of each check, default 3")
    check.add_argument("--json", type=Path, metavar="FILE", help="write the same as JSON; - for the standard output")
    check.add_argument(
        "--fix",
        type=Path,
        metavar="OUT",
        help="write annotation files without the errors, and data.yaml with the original image folders, into a new "
        "folder; what is there stays as it is",
    )
    check.add_argument(
        "--voc-one-based",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="corners of a VOC folder count pixels from 1, which is the default, or from 0",
    )
    check.set_defaults(command=check_command)
    shapes = commands.add_parser("shapes", help="write drawn images as a COCO folder")
    shapes.add_argument("out", type=Path, help="a new or empty folder")
    for split, count in (("train", 4000), ("val", 200), ("test", 200)):
        shapes.add_argument(f"--{split}", type=int, default=count, metavar="N", help=f"{split} images, default {count}")
    shapes.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawings, default 0")
    shapes.set_defaults(command=write_drawn)
    arguments = parser.parse_args()
    arguments.command(arguments)


def write_drawn(arguments: argparse.Namespace) -> None:
    """The command `shapes`."""
    from core.shapes import write_shapes

    counts = {split: getattr(arguments, split) for split in ("train", "val", "test")}
    for split, count in counts.items():
        if count < 0:
            raise UserError(f"--{split} must not be negative, got {count}")
    if not any(counts.values()):
        raise UserError("--train, --val and --test are all 0: nothing to draw")
    write_shapes(arguments.out, counts, arguments.seed)
    place = "./shapes" if str(arguments.out) == "shapes" else arguments.out  # the bare word draws them on the fly
    drawn = ", ".join(f"{count} {split}" for split, count in counts.items() if count)
    print(f"{drawn} images in {arguments.out}; train on them with --data {place}")


def check_command(arguments: argparse.Namespace) -> None:
    """The command `check`. UserError if there are errors and no repaired copy is asked for."""
    from core.data.check import check_data
    from core.data.findings import to_json, to_text
    from core.data.repair import check_out, write_repaired

    data, out = arguments.data, arguments.fix
    if arguments.examples < 0:
        raise UserError(f"--examples must not be negative, got {arguments.examples}")
    if out:
        check_out(data, out)
    checked = check_data(data, pixels=arguments.pixels, examples=arguments.examples, one_based=arguments.voc_one_based)
    content = to_json(checked)
    to_stdout = str(arguments.json) == "-"
    if not to_stdout:
        print(to_text(checked, mended=out is not None))
    if out:
        notes = write_repaired(checked, out)
        content["repaired"] = {"data": str(out / "data.yaml"), "notes": notes}
        if not to_stdout:
            print("\n".join(["", f"Repaired copy in {out}; train on it with --data {out / 'data.yaml'}", *notes]))
    if to_stdout:
        print(json.dumps(content, indent=1))
    elif arguments.json:
        replace_file(arguments.json, json.dumps(content, indent=1).encode() + b"\n")
    errors = content["errors"]
    if errors and not out:
        raise UserError(f"data {data}: {errors} error{'s' * (errors != 1)}{'' if to_stdout else ', listed above'}")


if __name__ == "__main__":
    run(main)
