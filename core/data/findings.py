"""What `python -m core.data check` found, for people and as JSON."""

import textwrap
from typing import Any

import numpy as np

from core.data.check import MEDIUM, SMALL, Checked, category_pairs, class_counts
from core.data.lenient import Split
from core.data.problems import CHECKS, Problems, plain

CLASSES = 20  # that are all counted in the text; of more, the most frequent half of so many
WIDTH = 110  # letters of a line of prose; examples are not broken


def to_json(checked: Checked) -> dict[str, Any]:
    """Everything as plain values, see `core/README.md`."""
    return {
        "data": checked.data,
        "errors": checked.problems.count("error"),
        "warnings": checked.problems.count("warning"),
        "splits": {name: count_split(split) for name, split in checked.splits.items()},
        "checks": checked.problems.to_json(),
    }


def count_split(split: Split) -> dict[str, Any]:
    """Counts of images and of usable boxes by size and class."""
    boxes = split.boxes
    kept = boxes.drop == 0
    areas = np.where(np.isnan(boxes.areas), boxes.xywh[:, 2] * boxes.xywh[:, 3], boxes.areas)
    areas = areas[kept & (boxes.crowd == 0)]
    small, medium = int((areas < SMALL).sum()), int(((areas >= SMALL) & (areas < MEDIUM)).sum())
    counts = class_counts(split)
    return {
        "images": len(split.images.ids),
        "without_boxes": int((~np.isin(split.images.ids, boxes.image_ids[kept])).sum()),
        "boxes": len(areas),
        "crowd": int((kept & (boxes.crowd == 1)).sum()),
        "difficult": int((kept & boxes.difficult).sum()),
        "small": small,
        "medium": medium,
        "large": len(areas) - small - medium,
        "classes": [
            {"id": number, "name": plain(name), "boxes": counts[number]} for number, name in category_pairs(split)
        ],
    }


def to_text(checked: Checked, *, mended: bool = False) -> str:
    """Counts of every split, then every check that found something, with examples; `mended`: a copy is written too."""
    lines = [f"{name}: {_describe(split)}" for name, split in checked.splits.items()]
    for severity, meaning in (
        ("error", "Errors: training refuses these, or leaves them out with a note."),
        ("warning", "Warnings: training accepts these. Some may be meant."),
    ):
        names = [name for name in checked.problems.names() if CHECKS[name].severity == severity]
        if names:
            lines += ["", meaning]
            lines += [line for name in names for line in _describe_check(name, checked.problems)]
    return "\n".join([*lines, "", _verdict(checked, mended)])


def _describe(split: Split) -> str:
    """The counts of a split in one line."""
    counts = count_split(split)
    voc = bool(split.files)
    apart = f", {counts['difficult']} of them difficult" if voc else f" and {counts['crowd']} crowd"
    listed = counts["classes"]
    if len(listed) > CLASSES:
        listed = sorted(listed, key=lambda entry: -entry["boxes"])[: CLASSES // 2]
    classes = ", ".join(f"{entry['name']} {entry['boxes']}" for entry in listed)
    classes += f" and {len(counts['classes']) - len(listed)} more classes" * (len(counts["classes"]) > CLASSES)
    return (
        f"{counts['images']} images ({counts['without_boxes']} without boxes), {counts['boxes']} boxes{apart}; "
        f"small {counts['small']}, medium {counts['medium']}, large {counts['large']}; {classes}"
    )


def _describe_check(name: str, problems: Problems) -> list[str]:
    """A check with its number of cases, in all and in each split, its meaning and examples."""
    counts, examples = problems.counts[name], problems.found[name]
    shares = ", ".join(f"{split} {count}" for split, count in counts.items() if split)
    head = f"  {name}: {counts.total()}" + f" ({shares})" * bool(shares)
    meaning = textwrap.wrap(CHECKS[name].meaning + ".", WIDTH, initial_indent="    ", subsequent_indent="    ")
    more = counts.total() - len(examples)
    rest = [f"    - ... and {more} more"] if more and examples else []
    return [head, *meaning, *(f"    - {problem}" for problem in examples), *rest]


def _verdict(checked: Checked, mended: bool) -> str:
    """The last line."""
    errors, warnings = checked.problems.count("error"), checked.problems.count("warning")
    found = f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    if not errors:
        return f"{found}: training can read this data."
    return f"{found}." if mended else f"{found}: --fix OUT writes a copy of the annotations without the errors."
