"""Look at a data set, or make one.

python -m core.data check DATA    counts of every split, and each problem in a line; exit code 2 if there is one
python -m core.data shapes OUT    drawn images with known boxes, as a COCO folder
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from core.cli import OneLineParser, run
from core.errors import UserError

if TYPE_CHECKING:
    from core.data.table import Table

SMALL, MEDIUM = 32**2, 96**2  # COCO's areas in square pixels


def main() -> None:
    """Run the command that the arguments name."""
    parser = OneLineParser(prog="python -m core.data", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="counts and problems of a data set")
    check.add_argument("data", help="COCO or VOC folder, dataset YAML, or the word shapes")
    check.set_defaults(command=lambda arguments: check_data(arguments.data))
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


def check_data(spec: str) -> None:
    """The command `check`: prints counts and problems of every split. UserError if there is a problem."""
    from core.data.sources import open_data, split_names

    problems = []
    for split in split_names(spec):
        try:
            table = open_data(spec, splits=(split,)).split(split)
        except UserError as error:
            problems.append(str(error))
            continue
        print(f"{split}: {describe(table)}")
        problems += image_problems(table)
    try:
        open_data(spec)  # finds categories that differ between splits
    except UserError as error:
        problems.append(str(error))
    problems = list(dict.fromkeys(problems))
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        raise UserError(f"data {spec}: {len(problems)} problem{'s' * (len(problems) > 1)}, listed above")


def describe(table: "Table") -> str:
    """Counts of images and of boxes by size and class, in one line."""
    import numpy as np

    areas, targets = table.areas[~table.crowd], table.labels[~table.crowd]
    small, medium = int((areas < SMALL).sum()), int(((areas >= SMALL) & (areas < MEDIUM)).sum())
    counts = np.bincount(targets, minlength=len(table.categories)).tolist()
    classes = ", ".join(f"{category.name} {count}" for category, count in zip(table.categories, counts, strict=True))
    empty = int((np.diff(table.box_offsets) == 0).sum())
    voc = table.protocol == "voc"
    apart = f", {int(table.difficult.sum())} of them difficult" if voc else f" and {int(table.crowd.sum())} crowd"
    return (
        f"{len(table)} images ({empty} without boxes), {len(targets)} boxes{apart}; "
        f"small {small}, medium {medium}, large {len(areas) - small - medium}; {classes}"
    )


def image_problems(table: "Table") -> list[str]:
    """What is wrong with the headers of a split's image files, one line each."""
    from core.data.images import ImageFolder, check_header

    problems = []
    if isinstance(table.images, ImageFolder):
        for index in range(len(table)):
            try:
                size = (int(table.heights[index]), int(table.widths[index]))
                check_header(table.images.folder / table.name(index), size)
            except UserError as error:
                problems.append(str(error))
    return problems


if __name__ == "__main__":
    run(main)
