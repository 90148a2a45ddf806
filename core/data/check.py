"""All problems of a data set at once: `python -m core.data check`.

The readers of `lenient` give the entries of every split as arrays. The rules here are functions of these arrays; each
answers one check of `problems.CHECKS`. Errors are judged as the strict readers judge them.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64
from tqdm import tqdm

from core.configfile import read_mapping
from core.data.lenient import BoxRows, ImageRows, Split, bad_sizes, read_coco
from core.data.lenient_voc import read_voc
from core.data.parse import CategoryEntry
from core.data.probe import Probe, file_digest, image_files, probe
from core.data.problems import CODES, Problems
from core.data.sources import SPLITS, coco_files, open_data, yaml_entry
from core.data.table import Table
from core.data.voc import VOC_CLASSES
from core.errors import UserError

SMALL, MEDIUM = 32**2, 96**2  # COCO's areas in square pixels
SLACK = 1.0  # pixels that a box may stick out of its image, for rounding
TINY_BOX, TINY_IMAGE = 2, 32  # pixels of a side
LONG_BOX, LONG_IMAGE = 20, 8  # ratio of the sides
RARE, UNBALANCED = 10, 100  # boxes of a class in train; ratio of two classes' boxes
FEW = 10  # boxes from which the way in which they are written can be guessed


@dataclass
class Checked:
    """A data set with what was found in it."""

    data: str  # as the user named it
    splits: dict[str, Split]
    problems: Problems


def check_data(data: str, *, pixels: bool = False, examples: int = 3, one_based: bool = True) -> Checked:
    """Finds all problems of a data set.

    Args:
        data: a COCO or VOC folder, a dataset YAML, or the word shapes.
        pixels: decode every image.
        examples: how many cases of a check are described.
        one_based: corners of a VOC folder count pixels from 1.

    Raises:
        UserError: there is no data set.
    """
    problems = Problems(examples)
    splits = _read(data, problems, one_based)
    for name in ("train", "val"):
        if name not in splits and not any(name in counts for counts in problems.counts.values()):
            problems.add("split-missing", "", data, note=f"has no split {name}")
    probes = _probe_images(splits, problems, pixels)
    for split in splits.values():
        check_images(split, problems)
        check_boxes(split, problems)
        check_categories(split, problems)
    check_classes(splits, problems)
    check_splits(splits, probes, problems, pixels)
    return Checked(data, splits, problems)


def _read(data: str, problems: Problems, one_based: bool) -> dict[str, Split]:
    """What can be read of every split. UserError if there is nothing of that name."""
    if data == "shapes":
        return {name: _drawn(name, table) for name, table in open_data(data).tables.items()}
    path = Path(data).expanduser()
    voc = read_voc(path, problems, one_based=one_based)
    if voc is not None:
        return voc
    splits = {}
    for name, (folder, annotations) in _coco_sources(path, problems).items():
        split = read_coco(name, folder, annotations, problems)
        if split is not None:
            splits[name] = split
    return splits


def _coco_sources(path: Path, problems: Problems) -> dict[str, tuple[Path, Path]]:
    """Image folder and annotation file of every split that is named soundly."""
    if path.suffix not in (".yaml", ".yml") or not path.exists():
        return coco_files(path)
    try:
        content = read_mapping(path, "dataset YAML")
    except UserError as error:
        problems.add("yaml-invalid", "", path, note=str(error).removeprefix(f"{path}").lstrip(":, "))
        return {}
    files = {}
    for split, entry in content.items():
        try:
            files[split] = yaml_entry(path, split, entry)
        except UserError as error:
            problems.add("yaml-invalid", str(split), path, note=str(error).removeprefix(f"{path}: "))
    if not content:
        problems.add("yaml-invalid", "", path, note="names no split; expected train, val and perhaps test")
    return {split: files[split] for split in SPLITS if split in files}


def _drawn(name: str, table: Table) -> Split:
    """A split of drawn images, whose annotations are our own."""
    count = np.diff(table.box_offsets)
    images, boxes = np.arange(len(table)), np.arange(len(table.labels))
    ids = np.array([category.id for category in table.categories], np.int64)
    return Split(
        name,
        Path(table.source),
        None,
        ImageRows(
            images,
            table.image_ids,
            table.heights.astype(np.int64),
            table.widths.astype(np.int64),
            [table.name(row) for row in range(len(table))],
            np.zeros(len(images), np.int16),
        ),
        BoxRows(
            boxes,
            table.annotation_ids,
            np.repeat(table.image_ids, count),
            ids[table.labels],
            table.crowd.astype(np.int64),
            table.difficult,
            table.boxes_xywh,
            table.areas,
            np.zeros(len(boxes), np.int16),
        ),
        [CategoryEntry(category.id, category.name) for category in table.categories],
        list(range(len(ids))),
        {"images": len(images), "annotations": len(boxes), "categories": len(ids)},
    )


# Image files


def _probe_images(splits: Mapping[str, Split], problems: Problems, pixels: bool) -> dict[str, list[Probe]]:
    """Looks at every listed image, and for images that nobody lists. Mends sizes where the file knows better."""
    found: dict[str, list[Probe]] = {}
    known: dict[Path, Probe] = {}
    for name, split in splits.items():
        if split.folder is None:
            continue
        if not split.folder.is_dir():
            problems.add("image-folder-missing", name, split.source, note=f"images are looked for in {split.folder}")
            continue
        shared = sum(other.folder == split.folder for other in splits.values()) > 1
        found[name], unsized = [], bad_sizes(split.images)
        for row in tqdm(range(len(split.images.names)), desc=f"{name} images", leave=False, disable=None):
            path = split.folder / split.images.names[row]
            if split.images.drop[row]:
                result = Probe()
            elif path in known:
                result = known[path]
            else:
                result = probe(path, pixels=pixels)
            if shared:
                known[path] = result
            found[name].append(result)
            _check_file(split, row, path, result, problems, unsized=bool(unsized[row]))
    _report_spare(splits, problems)
    return found


def _check_file(split: Split, row: int, path: Path, result: Probe, problems: Problems, *, unsized: bool) -> None:
    """What is wrong with one image file, beside the entry that lists it."""

    def report(check: str, note: str, **rest: Any) -> None:
        problems.add(check, split.name, path, entry="image", id=split.images.ids[row].item(), note=note, **rest)

    images = split.images
    if images.drop[row]:
        return
    if result.error:
        images.drop[row] = CODES[result.error]
        hint = _other_name(path) if result.error == "image-missing" else ""
        report(result.error, result.note + hint)
        return
    stated, real = (images.heights[row].item(), images.widths[row].item()), (result.height, result.width)
    if unsized:
        _take_size(split, row, real)
    elif stated != real:
        swapped, turned = stated == real[::-1], result.orientation >= 5
        check = "image-size-swapped" if swapped else "image-size-mismatch"
        note = f"but the annotation says {stated[1]}x{stated[0]}"
        note += f"; EXIF turns it (orientation {result.orientation})" if turned else ""
        report(check, note, field="size", value=f"{real[1]}x{real[0]}")
        if swapped and not turned:
            _take_size(split, row, real)
        else:
            images.drop[row] = CODES[check]
    if result.orientation != 1:
        report("image-rotated", "(EXIF); the stored pixels count", field="orientation", value=result.orientation)
    if result.mode not in ("L", "RGB", "1"):
        report("image-converted", "becomes RGB", field="mode", value=result.mode)
    if not result.ended:
        report("image-ends-early", "has no end marker")


def _take_size(split: Split, row: int, size: tuple[int, int]) -> None:
    split.images.heights[row], split.images.widths[row] = size
    split.resized.add(row)


def _other_name(path: Path) -> str:
    """`; there is a.JPG`, if a missing file has a neighbour that differs in case or suffix."""
    try:
        near = sorted(other.name for other in path.parent.iterdir() if other.stem.lower() == path.stem.lower())
    except OSError:
        return ""
    return f"; there is {near[0]}" if near else ""


def _report_spare(splits: Mapping[str, Split], problems: Problems) -> None:
    """Image files in the folders that no split lists."""
    listed = {
        os.path.normpath(split.folder / name)
        for split in splits.values()
        if split.folder is not None
        for name, drop in zip(split.images.names, split.images.drop, strict=True)
        if drop not in (CODES["path-escape"], CODES["file-name-invalid"])
    }
    for folder in dict.fromkeys(split.folder for split in splits.values() if split.folder is not None):
        spare = [path for path in image_files(folder) if os.path.normpath(path) not in listed]
        owners = [split.name for split in splits.values() if split.folder == folder]
        name = owners[0] if len(owners) == 1 else ""
        listed.update(map(os.path.normpath, spare))  # a folder inside another one counts once
        problems.add_rows("file-not-listed", name, spare, lambda path: {"file": path, "note": "is in no split"})


# Image entries


def check_images(split: Split, problems: Problems) -> None:
    """Rules about the image entries of one split."""
    images = split.images
    if not len(images.ids):
        problems.add("images-none", split.name, split.source, note="lists no image that can be read")
        return
    report = _reporter(split, problems, split.image_problem)
    twice = repeated_rows(images.ids)
    report("image-id-duplicate", twice, "id", images.ids, "is used before")
    _drop_ambiguous(images, twice)
    names = images.names
    report("file-name-duplicate", repeated_names(names) & ~twice, "file_name", names, "is listed under another id too")
    sound = (images.drop == 0) & ~bad_sizes(images)
    sizes = np.stack([images.widths, images.heights], axis=1)
    short, long = sizes.min(axis=1), sizes.max(axis=1)
    report("image-tiny", sound & (short < TINY_IMAGE), "width, height", sizes)
    report("image-aspect", sound & (long > LONG_IMAGE * short), "width, height", sizes)
    counts = [np.isin(images.ids, split.boxes.image_ids[some]) for some in (slice(None), split.boxes.crowd == 0)]
    report("image-without-boxes", ~counts[0], "file_name", names)
    report("image-only-crowd", counts[0] & ~counts[1], "file_name", names)


def _drop_ambiguous(images: ImageRows, twice: Bool[np.ndarray, " N"]) -> None:
    """Of entries with one id the first stays if all say the same; otherwise nobody knows whose the boxes are."""
    for number in np.unique(images.ids[twice]):
        rows = np.flatnonzero(images.ids == number)
        agree = len({(images.names[row], images.heights[row], images.widths[row]) for row in rows}) == 1
        drop = rows[1:] if agree else rows
        images.drop[drop] = CODES["image-id-duplicate"]


Report = Callable[..., None]  # check, rows that fail it, field, values, the rest of the sentence


def _reporter(split: Split, problems: Problems, describe: Callable[..., dict[str, Any]]) -> Report:
    """Reports the rows of a mask."""

    def report(check: str, bad: Bool[np.ndarray, " n"], field: str, values: Any, note: str = "") -> None:
        problems.add_rows(
            check,
            split.name,
            np.flatnonzero(bad),
            lambda row: describe(row, field=field, value=np.asarray(values[row]).tolist(), note=note),
        )

    return report


def repeated_rows(values: np.ndarray) -> Bool[np.ndarray, " n"]:
    """Rows whose value an earlier row has."""
    order = np.argsort(values, kind="stable")
    repeated = np.zeros(len(values), bool)
    repeated[order[1:]] = values[order[1:]] == values[order[:-1]]
    return repeated


def repeated_names(names: Sequence[str]) -> Bool[np.ndarray, " n"]:
    """Rows whose name an earlier row has."""
    first: dict[str, int] = {}
    return np.array([first.setdefault(name, row) != row for row, name in enumerate(names)], bool)


# Boxes


class BoxView(NamedTuple):
    """The boxes of a split with the sizes of their images."""

    xywh: Float64[np.ndarray, "M 4"]
    heights: Float64[np.ndarray, " M"]  # NaN where the image or its size is unknown
    widths: Float64[np.ndarray, " M"]
    areas: Float64[np.ndarray, " M"]  # NaN where none is stated
    crowd: Int64[np.ndarray, " M"]


Rule = Callable[[BoxView], Bool[np.ndarray, " M"]]


def not_finite(boxes: BoxView) -> Bool[np.ndarray, " M"]:
    """NaN or infinity among the four numbers."""
    return ~np.isfinite(boxes.xywh).all(axis=1)


def beyond(boxes: BoxView) -> Bool[np.ndarray, " M"]:
    """A number that no image has as a coordinate."""
    return np.any(abs(boxes.xywh) > 2**31, axis=1)


def negative(boxes: BoxView) -> Bool[np.ndarray, " M"]:
    """A negative width or height."""
    return np.any(boxes.xywh[:, 2:] < 0, axis=1)


def zero_area(boxes: BoxView) -> Bool[np.ndarray, " M"]:
    """No width or no height."""
    return np.any(boxes.xywh[:, 2:] == 0, axis=1)


def outside(boxes: BoxView) -> Bool[np.ndarray, " M"]:
    """No pixel in common with the image."""
    x, y, width, height = boxes.xywh.T
    return (x >= boxes.widths) | (y >= boxes.heights) | (x + width <= 0) | (y + height <= 0)


def partly_outside(boxes: BoxView) -> Bool[np.ndarray, " M"]:
    """More than `SLACK` pixels beyond a border of the image."""
    x, y, width, height = boxes.xywh.T
    before = np.minimum(x, y) < -SLACK
    return before | (x + width > boxes.widths + SLACK) | (y + height > boxes.heights + SLACK)


def tiny(boxes: BoxView) -> Bool[np.ndarray, " M"]:
    """A side below `TINY_BOX` pixels."""
    return np.any(boxes.xywh[:, 2:] < TINY_BOX, axis=1)


def stretched(boxes: BoxView) -> Bool[np.ndarray, " M"]:
    """Sides whose ratio is above `LONG_BOX`; tiny boxes, whose ratio means little, apart."""
    sides = np.sort(boxes.xywh[:, 2:], axis=1)
    return (sides[:, 1] > LONG_BOX * sides[:, 0]) & (sides[:, 0] >= TINY_BOX)


def fills_image(boxes: BoxView) -> Bool[np.ndarray, " M"]:
    """As large as the image; a crowd region may be."""
    return (boxes.xywh[:, 2] >= boxes.widths) & (boxes.xywh[:, 3] >= boxes.heights) & (boxes.crowd == 0)


def area_misfit(boxes: BoxView) -> Bool[np.ndarray, " M"]:
    """An area of 0, or above the box's own by more than a hundredth and a pixel."""
    own = boxes.xywh[:, 2] * boxes.xywh[:, 3]
    return (boxes.areas == 0) | (boxes.areas > 1.01 * own + 1)


BOX_ERRORS: dict[str, tuple[Rule, str]] = {  # a box counts for the first one that it fails
    "box-not-finite": (not_finite, "is not finite"),
    "box-beyond": (beyond, "is beyond any image"),
    "box-negative": (negative, "(x, y, width, height) has a negative side"),
    "box-zero-area": (zero_area, "(x, y, width, height) has no area"),
    "box-outside": (outside, "lies outside its image"),
}
BOX_WARNINGS: dict[str, tuple[Rule, str]] = {
    "box-partly-outside": (partly_outside, "sticks out of its image"),
    "box-tiny": (tiny, ""),
    "box-aspect": (stretched, ""),
    "box-fills-image": (fills_image, "is as large as its image"),
}


def check_boxes(split: Split, problems: Problems) -> None:
    """Rules about the annotation entries of one split."""
    boxes = split.boxes
    if not split.files:
        _check_references(split, problems)
    view = box_view(split)
    for check, (rule, note) in BOX_ERRORS.items():
        bad = rule(view) & (boxes.drop == 0)
        if not split.files:  # VOC's corners have rules of their own, which `lenient_voc` knows
            _report_boxes(split, view, check, bad, note, problems)
        boxes.drop[bad] = CODES[check]
    report = _reporter(split, problems, split.box_problem)
    if not split.files:
        wrong = (boxes.areas < 0) | np.isinf(boxes.areas)
        report("area-invalid", wrong, "area", boxes.areas, "is no area")
        report(
            "area-misfit", area_misfit(view) & ~wrong & (boxes.drop == 0), "area", boxes.areas, "does not fit its box"
        )
    for check, (rule, note) in BOX_WARNINGS.items():
        _report_boxes(split, view, check, rule(view) & (boxes.drop == 0), note, problems)
    again, other = same_boxes(boxes)
    report("box-duplicate", again, "bbox", boxes.xywh, "is there before, in the same class")
    report("box-two-classes", other, "bbox", boxes.xywh, "is there before, in another class")
    if not split.files:
        _check_style(split, view, problems)
    elif len(boxes.ids):
        first = (boxes.xywh[:, :2] < 0).any(axis=1) & (boxes.drop == 0)
        report("voc-zero-based", first, "bbox", boxes.xywh, "(x, y, width, height) begins before the first pixel")


def box_view(split: Split) -> BoxView:
    """The boxes of a split with the sizes of their images."""
    images, boxes = split.images, split.boxes
    rows = image_rows(images, boxes.image_ids)
    sizes = np.stack([images.heights, images.widths]).astype(np.float64)
    sizes[:, bad_sizes(images)] = np.nan
    sizes = np.concatenate([sizes, np.full((2, 1), np.nan)], axis=1)  # row -1
    return BoxView(boxes.xywh, sizes[0, rows], sizes[1, rows], boxes.areas, boxes.crowd)


def image_rows(images: ImageRows, wanted: Int64[np.ndarray, " M"]) -> Int64[np.ndarray, " M"]:
    """The first row with each wanted image id, or -1."""
    if not len(images.ids):
        return np.full(len(wanted), -1)
    order = np.argsort(images.ids, kind="stable")
    rows = order[np.searchsorted(images.ids, wanted, sorter=order).clip(max=len(images.ids) - 1)]
    return np.where(images.ids[rows] == wanted, rows, -1)


def _check_references(split: Split, problems: Problems) -> None:
    """Ids of annotations, of their images and of their categories; the flag of crowds."""
    boxes = split.boxes
    report = _reporter(split, problems, split.box_problem)
    report("box-id-duplicate", repeated_rows(boxes.ids), "id", boxes.ids, "is used before")
    known = [category.id for category in split.categories]
    for check, field, values, there, lost in (
        ("box-image-unknown", "image_id", boxes.image_ids, split.images.ids, split.lost["images"]),
        ("box-category-unknown", "category_id", boxes.category_ids, known, split.lost["categories"]),
    ):
        missing = ~np.isin(values, np.array(there, np.int64))
        reported = np.array([number for number in lost if abs(number) < 2**63], np.int64)  # with its own entry
        report(check, missing & ~np.isin(values, reported), field, values, "is unknown in this file")
        boxes.drop[missing & (boxes.drop == 0)] = CODES[check]
    crowd = (boxes.crowd != 0) & (boxes.crowd != 1)
    report("crowd-invalid", crowd, "iscrowd", boxes.crowd, "is neither 0 nor 1")
    boxes.drop[crowd & (boxes.drop == 0)] = CODES["crowd-invalid"]


def _report_boxes(
    split: Split, view: BoxView, check: str, bad: Bool[np.ndarray, " M"], note: str, problems: Problems
) -> None:
    """Boxes with the size of their image."""

    def describe(row: int) -> dict[str, Any]:
        size = f"image {split.boxes.image_ids[row]}"
        if np.isfinite(view.widths[row]):
            size += f" of {view.widths[row]:.0f}x{view.heights[row]:.0f} pixels"
        return split.box_problem(row, field="bbox", value=view.xywh[row].tolist(), note=f"{note} ({size})".strip())

    problems.add_rows(check, split.name, np.flatnonzero(bad), describe)


def same_boxes(boxes: BoxRows) -> tuple[Bool[np.ndarray, " M"], Bool[np.ndarray, " M"]]:
    """Boxes that an earlier one equals: of the same class, and of another class. Crowds and unusable ones apart."""
    rows = np.flatnonzero((boxes.drop == 0) & (boxes.crowd == 0))
    columns = (*boxes.xywh[rows].T, boxes.category_ids[rows], boxes.image_ids[rows])
    order = np.lexsort((columns[4], *columns[:4], columns[5]))
    place = np.stack([columns[5], *columns[:4]], axis=1)[order]
    same = np.concatenate([np.zeros(1, bool), (place[1:] == place[:-1]).all(axis=1)])[: len(rows)]
    kind = columns[4][order]
    again = same & np.concatenate([np.zeros(1, bool), kind[1:] == kind[:-1]])[: len(rows)]
    result = np.zeros((2, len(boxes.ids)), bool)
    result[0, rows[order[again]]] = True
    result[1, rows[order[same & ~again]]] = True
    return result[0], result[1]


def _check_style(split: Split, view: BoxView, problems: Problems) -> None:
    """Numbers that look like another way to write boxes."""
    known = np.isfinite(view.widths) & np.isfinite(view.xywh).all(axis=1)
    x, y, right, bottom = view.xywh[known].T
    if len(x) < FEW:
        return
    if view.xywh[known].max() <= 1:
        problems.add("boxes-normalised", split.name, split.source, note=f"{len(x)} boxes, none with a number above 1")
        return
    inside = (right > x) & (bottom > y) & (right <= view.widths[known] + 1) & (bottom <= view.heights[known] + 1)
    out = int(partly_outside(view)[known].sum())
    if inside.all() and out * 10 >= len(x):
        note = f"{out} of {len(x)} boxes stick out, none would if the last two numbers were the far corner"
        problems.add("boxes-corners", split.name, split.source, note=note)


# Classes


def check_categories(split: Split, problems: Problems) -> None:
    """Rules about the list of categories of one split."""

    def report(check: str, entry: CategoryEntry, field: str, value: Any, note: str) -> None:
        problems.add(
            check, split.name, split.source, entry="category", id=entry.id, field=field, value=value, note=note
        )

    entries = split.categories
    if not entries:
        problems.add("categories-none", split.name, split.source, note="has no category that can be read")
        return
    ids: dict[int, str] = {}
    names: dict[str, str] = {}
    for entry in entries:
        key = "".join(letter for letter in entry.name.lower() if letter.isalnum())
        if entry.id in ids:
            report("category-id-duplicate", entry, "name", entry.name, f"has the id of {ids[entry.id]!r}")
        elif not entry.name.strip():
            report("category-name-blank", entry, "name", entry.name, "is empty")
        elif entry.name in ids.values():
            report("category-name-duplicate", entry, "name", entry.name, "is the name of another category too")
        elif key in names:
            report("category-name-similar", entry, "name", entry.name, f"looks like {names[key]!r}")
        ids.setdefault(entry.id, entry.name)
        names.setdefault(key, entry.name)
    gap = next((number for number, there in enumerate(sorted(ids), start=1) if number != there), None)
    if gap is not None:
        note = f"{len(ids)} ids from {min(ids)} to {max(ids)}; {gap} is the first that is missing"
        problems.add("category-id-gap", split.name, split.source, note=note)
    counts = class_counts(split)
    if not (split.files and list(ids.values()) == list(VOC_CLASSES)):  # VOC's classes are there without being used
        for entry in entries:
            if not counts[entry.id]:
                report("category-unused", entry, "name", entry.name, "has no box")


def class_counts(split: Split) -> Counter[int]:
    """Boxes of every category id that are targets."""
    kept = (split.boxes.drop == 0) & (split.boxes.crowd == 0)
    numbers, counts = np.unique(split.boxes.category_ids[kept], return_counts=True)
    return Counter(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))


def check_classes(splits: Mapping[str, Split], problems: Problems) -> None:
    """Classes of which train has few boxes or none, and lists of categories that differ."""
    first = next((split for split in splits.values() if split.categories), None)
    for split in splits.values():
        if first is not None and split.categories and category_pairs(split) != category_pairs(first):
            _report_difference(first, split, problems)
    if "train" not in splits:
        return
    train = splits["train"]
    names: dict[str, int] = {}
    for number, name in category_pairs(train):
        names.setdefault(name, number)
    counts = class_counts(train)
    used = {name: counts[number] for name, number in names.items() if counts[number]}
    for name, count in used.items():
        if count < RARE:
            note = f"has {count} box{'es' * (count > 1)} in train"
            problems.add(
                "category-rare", "train", train.source, entry="category", id=names[name], value=name, note=note
            )
    if used and max(used.values()) > UNBALANCED * min(used.values()):
        most, least = max(used, key=used.__getitem__), min(used, key=used.__getitem__)
        note = f"{most!r} has {used[most]} boxes, {least!r} has {used[least]}"
        problems.add("class-imbalance", "train", train.source, note=note)
    for split in splits.values():
        some = class_counts(split)
        for entry in split.categories:
            if split is not train and some[entry.id] and not used.get(entry.name):
                note = f"has {some[entry.id]} boxes in {split.name} and none in train"
                place = {"entry": "category", "id": entry.id, "field": "name", "value": entry.name}
                problems.add("category-not-learned", split.name, split.source, **place, note=note)


def category_pairs(split: Split) -> list[tuple[int, str]]:
    """Id and name of every category, by id; the first of each id."""
    pairs = {entry.id: entry.name for entry in reversed(split.categories)}
    return sorted(pairs.items())


def _report_difference(first: Split, other: Split, problems: Problems) -> None:
    there, here = category_pairs(first), category_pairs(other)
    odd = [pair for pair in here if pair not in there]
    gone = [pair for pair in there if pair not in here]
    words = [f"{what} {_named(pairs)}" for what, pairs in (("has", odd), ("lacks", gone)) if pairs]
    problems.add(
        "categories-differ", other.name, other.source, note=f"{', '.join(words)}; compared with {first.source}"
    )


def _named(pairs: Sequence[tuple[int, str]]) -> str:
    shown = ", ".join(f"{number} {name!r}" for number, name in pairs[:3])
    return shown + f" and {len(pairs) - 3} more" * (len(pairs) > 3)


# Splits


class Copy(NamedTuple):
    """An image file that a split lists."""

    split: str
    path: str
    key: int


def check_splits(
    splits: Mapping[str, Split], probes: Mapping[str, list[Probe]], problems: Problems, pixels: bool
) -> None:
    """Images in two splits, and pictures in two files."""
    files = {name: list(_sound_files(splits[name], some)) for name, some in probes.items()}
    paths = {name: {copy.path for copy in some} for name, some in files.items()}
    for (first, here), (second, there) in combinations(paths.items(), 2):
        both = sorted(here & there)
        if both and here == there:
            note = f"lists the {len(both)} images of {first}"
            problems.add("splits-identical", second, splits[second].source, note=note)
            continue
        problems.add_rows("split-overlap", second, both, partial(_copy_problem, f"is in {first} too"))
    for copies in same_pictures([copy for some in files.values() for copy in some], pixels):
        _report_copies(copies, problems)


def _copy_problem(note: str, path: str) -> dict[str, Any]:
    return {"file": path, "note": note}


def _sound_files(split: Split, probes: Iterable[Probe]) -> Iterator[Copy]:
    for name, drop, result in zip(split.images.names, split.images.drop, probes, strict=True):
        if not drop and split.folder is not None:
            yield Copy(split.name, os.path.normpath(split.folder / name), result.key)


def same_pictures(files: Sequence[Copy], pixels: bool) -> Iterator[list[Copy]]:
    """Files of the same bytes, or the same pixels where the keys are made of these; groups of two or more paths."""
    keys = np.array([copy.key for copy in files], np.int64)
    order = np.argsort(keys, kind="stable")
    borders = np.flatnonzero(np.diff(keys[order])) + 1
    for group in np.split(order, borders):
        if len(group) < 2 or len({files[row].path for row in group}) < 2:
            continue
        content: dict[bytes, list[Copy]] = {}
        for row in group:
            digest = b"" if pixels else file_digest(Path(files[row].path))
            content.setdefault(digest, []).append(files[row])
        yield from (some for some in content.values() if len({copy.path for copy in some}) > 1)


def _report_copies(copies: Sequence[Copy], problems: Problems) -> None:
    """Every file of a picture but the first: a copy within its split, or one that leaks into another."""
    seen: set[str] = set()
    first = copies[0]
    for copy in copies:
        if copy.path in seen or copy.path == first.path:
            continue
        seen.add(copy.path)
        inside = next((other for other in copies if other.split == copy.split and other.path != copy.path), None)
        if copy.split != first.split:
            note = f"is the picture {first.path} of {first.split}"
            problems.add("split-leak", copy.split, copy.path, note=note)
        elif inside is not None:
            problems.add("image-duplicate", copy.split, copy.path, note=f"is the picture {first.path}")
