"""Annotation files read for what can be read: every wrong entry becomes a problem, all others become arrays.

The strict readers (`parse`, `voc`) stop at the first problem. These here go on, with the same types of entries and the
same limits, so that both judge alike.
"""

import json
import math
import mmap
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from jaxtyping import Bool, Float64, Int16, Int64

from core.data.parse import (
    BAD_NAME,
    MAX_SIDE,
    NOT_JSON,
    AnnotationFile,
    BoxEntry,
    CategoryEntry,
    ImageEntry,
    collect_boxes,
    decoded_chunks,
    split_file,
)
from core.data.problems import CODES, Problems
from core.errors import UserError
from core.files import open_regular

LEAVES_FOLDER = re.compile(r"^/|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)")
Int64Value = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class _Image(ImageEntry, gc=False):
    id: Int64Value
    height: Int64Value
    width: Int64Value


class _Box(BoxEntry, gc=False):
    id: Int64Value
    image_id: Int64Value
    category_id: Int64Value
    iscrowd: Int64Value | bool = 0


class _Category(CategoryEntry):
    id: Int64Value


KINDS: dict[str, tuple[str, type]] = {  # of a file's lists: how an entry is called, and what it must hold
    "images": ("image", _Image),
    "annotations": ("annotation", _Box),
    "categories": ("category", _Category),
}


@dataclass
class ImageRows:
    """The N image entries that could be read."""

    positions: Int64[np.ndarray, " N"]  # in the list of the file, from 0
    ids: Int64[np.ndarray, " N"]
    heights: Int64[np.ndarray, " N"]
    widths: Int64[np.ndarray, " N"]
    names: list[str]
    drop: Int16[np.ndarray, " N"]  # the first error that makes an entry unusable (`problems.CODES`), 0 if none does


@dataclass
class BoxRows:
    """The M annotation entries that could be read."""

    positions: Int64[np.ndarray, " M"]
    ids: Int64[np.ndarray, " M"]
    image_ids: Int64[np.ndarray, " M"]
    category_ids: Int64[np.ndarray, " M"]
    crowd: Int64[np.ndarray, " M"]
    difficult: Bool[np.ndarray, " M"]
    xywh: Float64[np.ndarray, "M 4"]
    areas: Float64[np.ndarray, " M"]  # NaN where the file has none
    drop: Int16[np.ndarray, " M"]


def _sets() -> dict[str, set[Any]]:
    return {what: set() for what in KINDS}


@dataclass
class Split:
    """What could be read of a split."""

    name: str
    source: Path  # the annotation file, or the folder of VOC
    folder: Path | None  # of the images; None where they are drawn
    images: ImageRows
    boxes: BoxRows
    categories: list[CategoryEntry]
    category_positions: list[int]
    totals: dict[str, int]  # entries of every list, unreadable ones among them
    lost: dict[str, set[Any]] = field(default_factory=_sets)  # ids of unreadable entries of every list
    mended: dict[str, set[int]] = field(default_factory=_sets)  # positions of entries that needed a conversion
    resized: set[int] = field(default_factory=set)  # rows of images whose size is that of the file now
    files: list[Path] = field(default_factory=list)  # of VOC: the XML file of every image

    def image_problem(self, row: int, **rest: Any) -> dict[str, Any]:
        """Names an image entry, as `Problem` wants it."""
        if self.files:
            return {"file": self.files[row], **rest}
        return {"file": self.source, "entry": "image", "id": int(self.images.ids[row]), **rest}

    def box_problem(self, row: int, **rest: Any) -> dict[str, Any]:
        """Names an annotation entry; in VOC's files it is the object of a number."""
        if self.files:
            image = int(np.flatnonzero(self.images.ids == self.boxes.image_ids[row])[0])
            return {"file": self.files[image], "entry": "object", "id": int(self.boxes.positions[row]), **rest}
        return {"file": self.source, "entry": "annotation", "id": int(self.boxes.ids[row]), **rest}


def read_coco(name: str, folder: Path, path: Path, problems: Problems) -> Split | None:
    """What can be read of a COCO annotation file; None if it is none at all, which is then among the problems."""
    content = _mapped(name, path, problems)
    parts = None if content is None else _parts(name, path, content, problems)
    if parts is None:
        return None
    if not isinstance(parts["images"], msgspec.Raw):
        problems.add("json-nan", name, path)
    readers = {what: _ListReader(name, path, what, problems) for what in KINDS}
    try:
        images = _collect_images(readers["images"], parts["images"])
        boxes = _collect_boxes(readers["annotations"], parts["annotations"])
        categories = [entry for some in readers["categories"].chunks(parts["categories"]) for entry in some]
    except UserError as error:
        problems.add("json-invalid" if "JSON" in str(error) else "not-coco", name, path, note=_without(path, error))
        return None
    split = Split(
        name,
        path,
        folder,
        images,
        boxes,
        categories,
        readers["categories"].positions().tolist(),
        {what: reader.total for what, reader in readers.items()},
        {what: reader.lost for what, reader in readers.items()},
        {what: reader.mended for what, reader in readers.items()},
    )
    _check_names(split, problems)
    _check_sizes(split, problems)
    return split


def _mapped(name: str, path: Path, problems: Problems) -> mmap.mmap | None:
    try:
        with open_regular(path) as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        problems.add("annotations-missing", name, path, note=f"cannot be read ({error.strerror})")
    except ValueError:
        problems.add("json-invalid", name, path, note="is empty")
    return None


def _parts(name: str, path: Path, content: mmap.mmap, problems: Problems) -> dict[str, Any] | None:
    """The lists of a file, as `parse.split_file` gives them."""
    try:
        return split_file(path, content, AnnotationFile)
    except UserError as error:
        check = "not-coco" if _is_json(content) else "json-invalid"
        problems.add(check, name, path, note=_without(path, error))
        return None


def _is_json(content: mmap.mmap) -> bool:
    try:
        msgspec.json.decode(content, type=msgspec.Raw)
    except NOT_JSON:
        return False
    return True


def _without(path: Path, error: UserError) -> str:
    """What a line says besides the file that it begins with."""
    return str(error).removeprefix(f"{path}: ")


class _ListReader:
    """Reads one list of a file in chunks and keeps account of the entries that cannot be used as they stand."""

    def __init__(self, split: str, path: Path, what: str, problems: Problems) -> None:
        self.split, self.path, self.what, self.problems = split, path, what, problems
        self.entry, self.kind = KINDS[what]
        self.total = 0
        self.gaps: list[int] = []  # positions of entries that are lost
        self.lost: set[Any] = set()  # their ids, where they have one
        self.mended: set[int] = set()

    def chunks(self, part: msgspec.Raw | list[Any]) -> Iterator[list[Any]]:
        """The usable entries of the list. UserError as in `parse.decoded_chunks`."""
        if not isinstance(part, msgspec.Raw):
            if not isinstance(part, list):
                raise UserError(f"{self.path}: the {self.entry} entries must be a list")
            chunks: Iterator[list[Any]] = iter([self._each(part, 0)])
        else:
            chunks = decoded_chunks(
                self.path, self.entry, part, self.kind, lambda chunk, before, _: self._each(_plain(chunk), before)
            )
        for entries in chunks:
            self.total += len(entries)
            yield [entry for entry in entries if entry is not None]

    def positions(self) -> Int64[np.ndarray, " n"]:
        """Places of the usable entries in the list, once all are read."""
        return np.delete(np.arange(self.total), self.gaps)

    def _each(self, entries: list[Any], before: int) -> list[Any]:
        """Entries one by one; None for those that cannot be used."""
        return [self._one(entry, before + i) for i, entry in enumerate(entries)]

    def _one(self, entry: Any, position: int) -> Any:
        try:
            read: Any = msgspec.convert(entry, self.kind)
        except (msgspec.ValidationError, UnicodeError) as error:
            self._report(entry, position, error)
            try:
                read = msgspec.convert(entry, self.kind, strict=False)  # numbers written as text
                self.mended.add(position)
            except (msgspec.ValidationError, UnicodeError):
                self.gaps.append(position)
                if isinstance(entry, dict) and isinstance(entry.get("id"), int):
                    self.lost.add(entry["id"])
                return None
        if isinstance(read, BoxEntry) and read.area is not None and math.isnan(read.area):
            self._add("area-invalid", entry, position, field="area", value=read.area)
            self.mended.add(position)
            read.area = None
        return read

    def _report(self, entry: Any, position: int, error: msgspec.ValidationError | UnicodeError) -> None:
        """The first thing that is wrong with an entry, from msgspec's `Expected ... - at `$.bbox[0]``."""
        if isinstance(error, UnicodeError):
            self._add("field-wrong-type", entry, position, value=entry, note="has half a letter of UTF-16")
            return
        reason, _, where = str(error).partition(" - at ")
        name = re.match(r"`\$\.(\w+)", where)
        if missing := re.search(r"required field `(\w+)`", reason):
            self._add("field-missing", entry, position, field=missing[1], note="is missing")
        elif name is None or not isinstance(entry, dict):
            self._add("entry-no-object", entry, position, value=entry, note="is no object with fields")
        else:
            value = entry.get(name[1])
            large = "<=" in reason or ">=" in reason or "out of range" in reason
            check = "number-too-large" if large else "field-wrong-type"
            note = "is beyond 64 bits" if large else f"({reason[:1].lower()}{reason[1:]})"
            self._add(check, entry, position, field=name[1], value=value, note=note)

    def _add(self, check: str, entry: Any, position: int, **rest: Any) -> None:
        """A problem of an entry, which is called by its id, or by its place in the list if it has none."""
        has_id = isinstance(entry, dict) and isinstance(entry.get("id"), int | str)
        place = {"entry": self.entry, "id": entry["id"]} if has_id else {"entry": f"{self.entry} number {position + 1}"}
        self.problems.add(check, self.split, self.path, **place, **rest)


def _plain(chunk: bytes) -> list[Any]:
    """The entries of a part of a list as Python objects."""

    def integer(digits: str) -> int:
        return int(digits) if len(digits) < 400 else 2**1000  # far beyond 64 bits either way; int() refuses very many

    try:
        entries: list[Any] = json.loads(chunk.decode("utf-8", "replace"), parse_int=integer)
    except RecursionError:
        raise UserError("no valid JSON: too many nested brackets") from None
    return entries


def _collect_images(reader: _ListReader, part: Any) -> ImageRows:
    columns: list[Int64[np.ndarray, "3 n"]] = [np.zeros((3, 0), np.int64)]
    names: list[str] = []
    for entries in reader.chunks(part):
        columns.append(np.array([[e.id, e.height, e.width] for e in entries], np.int64).reshape(-1, 3).T)
        names += [entry.file_name for entry in entries]
    ids, heights, widths = np.concatenate(columns, axis=1)
    return ImageRows(reader.positions(), ids, heights, widths, names, np.zeros(len(ids), np.int16))


def _collect_boxes(reader: _ListReader, part: Any) -> BoxRows:
    boxes = collect_boxes(reader.path, reader.chunks(part))
    return BoxRows(
        reader.positions(),
        boxes.ids,
        boxes.image_ids,
        boxes.category_ids,
        boxes.crowd,
        np.zeros(len(boxes.ids), bool),
        boxes.xywh,
        boxes.areas,
        np.zeros(len(boxes.ids), np.int16),
    )


def _check_names(split: Split, problems: Problems) -> None:
    """File names that are no plain paths below the folder of images."""
    for row, name in enumerate(split.images.names):
        if check := name_problem(name):
            split.images.drop[row] = CODES[check]
            problems.add(check, split.name, **split.image_problem(row, field="file_name", value=name))


def name_problem(name: str) -> str:
    """The check that a file name fails, or the empty string."""
    if not BAD_NAME.search(name):
        return ""
    return "path-escape" if LEAVES_FOLDER.search(name) else "file-name-invalid"


def bad_sizes(images: ImageRows) -> Bool[np.ndarray, " N"]:
    """Images whose stated size is none."""
    return np.any([(side < 1) | (side > MAX_SIDE) for side in (images.heights, images.widths)], axis=0)


def _check_sizes(split: Split, problems: Problems) -> None:
    images = split.images

    def describe(row: int) -> dict[str, Any]:
        size = [images.widths[row].item(), images.heights[row].item()]
        return split.image_problem(row, field="width, height", value=size, note=f"are not from 1 to {MAX_SIDE} pixels")

    problems.add_rows("image-size-invalid", split.name, np.flatnonzero(bad_sizes(images)).tolist(), describe)


def repeated(values: list[Any]) -> list[Any]:
    """Values that occur more than once, in the order of their first occurrence."""
    return [value for value, count in Counter(values).items() if count > 1]
