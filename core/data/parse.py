"""COCO annotation files into tables: typed, streaming, and trusted only after validation.

The file is mapped and decoded in parts of a few megabytes, so the objects that the parser makes live briefly and their
number does not grow with the file. Only the needed fields are decoded; segmentations are skipped.
"""

import json
import math
import mmap
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import msgspec
import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8

from core.data.table import Category, ImageReader, Table, cached_table, pack_names
from core.errors import UserError
from core.files import open_regular

CHUNK = 2**18  # bytes of JSON decoded at once; stays in the processor's cache
TOLERATED = 1000  # up to one in so many boxes may be empty or outside; they are dropped. COCO train2017 has two
MAX_SIDE = 2**24  # pixels of an image's side
BETWEEN_OBJECTS = re.compile(rb"\}\s*,\s*\{")
BAD_NAME = re.compile(r"^$|^/|^[A-Za-z]:|(^|/)\.\.(/|$)|[\\\x00-\x1f\x7f\ud800-\udfff]")
NOT_JSON = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)
_INTEGERS = ("id", "image_id", "category_id", "iscrowd")  # of an annotation
_NO_BYTES = np.zeros(0, np.uint8)


class AnnotationFile(msgspec.Struct):
    images: msgspec.Raw
    annotations: msgspec.Raw
    categories: msgspec.Raw
    licenses: msgspec.Raw = msgspec.Raw(b"[]")


class ImageInfoFile(AnnotationFile, kw_only=True):
    annotations: msgspec.Raw = msgspec.Raw(b"[]")


class ImageEntry(msgspec.Struct, gc=False):
    id: int
    file_name: str
    height: int
    width: int


class BoxEntry(msgspec.Struct, gc=False):
    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: int | bool = 0


class CategoryEntry(msgspec.Struct):
    id: int
    name: str


class Images(NamedTuple):
    """The image entries of a file, in its order; P = N + 1."""

    ids: Int64[np.ndarray, " N"]
    heights: Int64[np.ndarray, " N"]
    widths: Int64[np.ndarray, " N"]
    name_offsets: Int64[np.ndarray, " P"]
    name_bytes: UInt8[np.ndarray, " L"]


class Boxes(NamedTuple):
    """The annotation entries of a file, in its order."""

    ids: Int64[np.ndarray, " M"]
    image_ids: Int64[np.ndarray, " M"]
    category_ids: Int64[np.ndarray, " M"]
    crowd: Int64[np.ndarray, " M"]
    xywh: Float64[np.ndarray, "M 4"]
    areas: Float64[np.ndarray, " M"]  # NaN where the file has none


def open_annotations(path: Path, images: ImageReader, *, annotated: bool = True) -> Table:
    """The table of a COCO annotation file, from the cache if the file has not changed since.

    Args:
        path: the file.
        images: reader of the pixels.
        annotated: the file must have annotations; COCO's image_info files have images and categories only.

    Raises:
        UserError: missing, not JSON, or anything in it that cannot be trusted; the line names file, entry and value.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a COCO annotation file") from None
    place = str(path.resolve())
    key = {"path": place, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    key |= {} if annotated else {"annotated": False}
    return cached_table(place, key, lambda: parse_coco(path, images, annotated=annotated), images)


def parse_coco(path: Path, images: ImageReader, *, annotated: bool = True) -> Table:
    """Parses and validates a COCO annotation file. UserError as in `open_annotations`."""
    try:
        with open_regular(path) as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read ({reason})") from None
    parts = split_file(path, content, AnnotationFile if annotated else ImageInfoFile)
    image_entries = _collect_images(path, entries_of(path, "image", parts["images"], ImageEntry))
    box_entries = collect_boxes(path, entries_of(path, "annotation", parts["annotations"], BoxEntry))
    categories = [entry for some in entries_of(path, "category", parts["categories"], CategoryEntry) for entry in some]
    return build_table(path, image_entries, box_entries, categories, _licence(parts["licenses"]), images)


def split_file(path: Path, content: mmap.mmap, kind: type[AnnotationFile]) -> dict[str, Any]:
    """The top-level lists of the file as undecoded JSON; as Python lists if the file has NaN, which is no JSON."""
    try:
        file = msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: no COCO annotation file ({error})") from None
    except NOT_JSON as error:
        numbers = _with_nan(content)
        if numbers is None:
            raise UserError(f"{path}: no valid JSON ({error})") from None
        return numbers
    return {name: getattr(file, name) for name in AnnotationFile.__struct_fields__}


def _with_nan(content: mmap.mmap) -> dict[str, Any] | None:
    """What Python's lenient parser makes of a file with NaN or Infinity, so that validation can name the entry."""
    if content.find(b"NaN") < 0 and content.find(b"Infinity") < 0:
        return None
    try:
        parts = json.loads(content[:])
        return {name: parts.get(name, []) for name in AnnotationFile.__struct_fields__}
    except (ValueError, RecursionError, AttributeError):
        return None


Entry = TypeVar("Entry", ImageEntry, BoxEntry, CategoryEntry)


def entries_of(path: Path, what: str, part: msgspec.Raw | list[Any], kind: type[Entry]) -> Iterator[list[Entry]]:
    """The entries of a top-level list, a few megabytes at a time. UserError for one of another form."""
    if not isinstance(part, msgspec.Raw):
        yield _convert(path, what, part, kind)
        return

    def refuse(chunk: bytes, before: int, error: msgspec.ValidationError) -> NoReturn:
        raise _wrong_entry(path, what, _plain(chunk), before, error) from None

    yield from decoded_chunks(path, what, part, kind, refuse)


Wrong = Callable[[bytes, int, msgspec.ValidationError], list[Any]]


def decoded_chunks(path: Path, what: str, part: msgspec.Raw, kind: Any, wrong: Wrong) -> Iterator[list[Any]]:
    """The entries of a top-level list, a few megabytes at a time.

    Args:
        path: the file, for messages.
        what: the entries are, for messages.
        part: the list.
        kind: of an entry.
        wrong: gives the entries of a part in which one is of another kind, from the part (a list of whole entries), the
            number of entries before it and what is wrong; as many as there are.

    Raises:
        UserError: no list, or no JSON.
    """
    raw = memoryview(part)
    if bytes(raw[:1]) != b"[":
        raise UserError(f"{path}: the {what} entries must be a list, got {bytes(raw[:40]).decode(errors='replace')}")
    decoder = msgspec.json.Decoder(list[kind])
    position, length, before, end = 1, CHUNK, 0, len(raw) - 1
    while position < end:
        border = BETWEEN_OBJECTS.search(raw, position + length) if position + length < end else None
        chunk = b"[" + bytes(raw[position : border.start() + 1 if border else end]) + b"]"
        try:
            entries = decoder.decode(chunk)
        except msgspec.ValidationError as error:
            if border is not None and not _is_list(chunk):
                length *= 2
                continue
            entries = wrong(chunk, before, error)
        except NOT_JSON as error:
            if border is None:
                raise UserError(f"{path}: no valid JSON among the {what} entries ({error})") from None
            length *= 2  # the border lay inside an entry or a string: only whole entries decode
            continue
        yield entries
        position, length, before = border.end() - 1 if border else end, CHUNK, before + len(entries)


def _is_list(chunk: bytes) -> bool:
    try:
        msgspec.json.decode(chunk, type=msgspec.Raw)
    except NOT_JSON:
        return False
    return True


def _plain(chunk: bytes) -> list[Any]:
    """The entries of a chunk as plain objects, for a message; empty if some are no JSON."""
    try:
        entries: list[Any] = msgspec.json.decode(chunk)
    except NOT_JSON:
        return []
    return entries


def _convert(path: Path, what: str, part: list[Any], kind: type[Entry]) -> list[Entry]:
    """Entries from Python objects, of a file that has NaN somewhere."""
    try:
        entries: list[Entry] = msgspec.convert(part, list[kind])  # type: ignore[valid-type]
    except msgspec.ValidationError as error:
        raise _wrong_entry(path, what, part, 0, error) from None
    except UnicodeError:
        raise UserError(f"{path}: bad {what} entries (a text has half a letter of UTF-16)") from None
    for entry in entries:
        if isinstance(entry, BoxEntry) and entry.area is not None and math.isnan(entry.area):
            raise UserError(f"{path}: annotation {entry.id}: area nan is no area")
    return entries


def _wrong_entry(path: Path, what: str, entries: list[Any], before: int, error: Exception) -> UserError:
    """Names the entry, field and value behind msgspec's `Expected ... - at `$[3].bbox[0]``."""
    reason, _, where = str(error).partition(" - at ")
    match = re.match(r"`\$\[(\d+)\](?:\.(\w+))?", where)
    if match is None or not entries:
        return UserError(f"{path}: bad {what} entries ({error})")
    entry = entries[int(match[1])]
    name = f"{what} entry number {before + int(match[1]) + 1}"
    if isinstance(entry, dict) and "id" in entry:
        name = f"{what} {_short(entry['id'])}"
    value = f"{match[2]} is {_short(entry[match[2]])}" if match[2] else _short(entry)
    return UserError(f"{path}: {name}: {value} ({reason[:1].lower()}{reason[1:]})")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _integers(path: Path, what: str, entries: list[Entry], field: str) -> Int64[np.ndarray, " n"]:
    try:
        return np.fromiter(map(attrgetter(field), entries), np.int64, len(entries))
    except OverflowError:
        entry = next(entry for entry in entries if abs(int(getattr(entry, field))) >= 2**63)
        value = _short(getattr(entry, field))
        raise UserError(f"{path}: {what} {_short(entry.id)}: {field} is {value}, beyond 64 bits") from None


def _collect_images(path: Path, chunks: Iterator[list[ImageEntry]]) -> Images:
    """Image entries as arrays. UserError for a file name that is no plain path below the folder of images."""
    integers: list[Int64[np.ndarray, "3 n"]] = [np.zeros((3, 0), np.int64)]
    lengths: list[Int64[np.ndarray, " n"]] = [np.zeros(1, np.int64)]
    names: list[UInt8[np.ndarray, " l"]] = []
    for entries in chunks:
        for entry in entries:
            if BAD_NAME.search(entry.file_name):
                raise UserError(
                    f"{path}: image {entry.id}: file_name {_short(entry.file_name)} must be a relative path with "
                    "forward slashes that stays in the folder of images"
                )
        integers.append(np.stack([_integers(path, "image", entries, name) for name in ("id", "height", "width")]))
        offsets, packed = pack_names([entry.file_name for entry in entries])
        lengths.append(np.diff(offsets))
        names.append(packed)
    ids, heights, widths = np.concatenate(integers, axis=1)
    return Images(ids, heights, widths, np.cumsum(np.concatenate(lengths)), np.concatenate([*names, _NO_BYTES]))


def collect_boxes(path: Path, chunks: Iterator[list[BoxEntry]]) -> Boxes:
    """Annotation entries as arrays."""
    integers: list[Int64[np.ndarray, "4 n"]] = [np.zeros((4, 0), np.int64)]
    xywh: list[Float64[np.ndarray, "n 4"]] = [np.zeros((0, 4))]
    areas: list[Float64[np.ndarray, " n"]] = [np.zeros(0)]
    for entries in chunks:
        integers.append(np.stack([_integers(path, "annotation", entries, name) for name in _INTEGERS]))
        sides = chain.from_iterable(map(attrgetter("bbox"), entries))
        xywh.append(np.fromiter(sides, np.float64, 4 * len(entries)).reshape(-1, 4))
        areas.append(np.array([entry.area for entry in entries], np.float64))  # None becomes NaN
    ids, image_ids, category_ids, crowd = np.concatenate(integers, axis=1)
    return Boxes(ids, image_ids, category_ids, crowd, np.concatenate(xywh), np.concatenate(areas))


def _licence(part: msgspec.Raw | list[Any]) -> str:
    """The names in the file's table of image licences; empty if it has none that can be read."""
    try:
        entries = msgspec.json.decode(part) if isinstance(part, msgspec.Raw) else part
        names = [str(entry["name"]) for entry in entries]
    except (*NOT_JSON, TypeError, KeyError):
        return ""
    return f"image licences: {', '.join(names)}" if names else ""


def build_table(
    path: Path, images: Images, boxes: Boxes, categories: list[CategoryEntry], licence: str, reader: ImageReader
) -> Table:
    """Validates the entries of a file against each other and packs them, boxes ordered by image."""
    _check_categories(path, categories)
    _check_images(path, images)
    image_rows = _rows(path, boxes, "image_id", boxes.image_ids, images.ids)
    category_ids = np.array(sorted(entry.id for entry in categories), dtype=np.int64)
    labels = _rows(path, boxes, "category_id", boxes.category_ids, category_ids)
    _check_boxes(path, boxes)
    keep, notes = _sound_boxes(path, boxes, images.heights[image_rows], images.widths[image_rows])
    order = np.flatnonzero(keep)
    order = order[np.argsort(image_rows[order], kind="stable")]
    counts = np.bincount(image_rows[order], minlength=len(images.ids))
    xywh = boxes.xywh[order]
    areas = boxes.areas[order]
    return Table(
        categories=tuple(Category(entry.id, entry.name) for entry in sorted(categories, key=lambda entry: entry.id)),
        image_ids=images.ids,
        heights=images.heights.astype(np.int32),
        widths=images.widths.astype(np.int32),
        name_offsets=images.name_offsets,
        name_bytes=images.name_bytes,
        box_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
        boxes_xywh=xywh,
        labels=labels[order].astype(np.int32),
        crowd=boxes.crowd[order].astype(bool),
        areas=np.where(np.isnan(areas), xywh[:, 2] * xywh[:, 3], areas),
        annotation_ids=boxes.ids[order],
        difficult=np.zeros(len(order), bool),
        images=reader,
        source=str(path),
        licence=licence,
        notes=notes,
    )


def _refuse(
    path: Path, what: str, ids: Int64[np.ndarray, " n"], bad: Bool[np.ndarray, " n"], field: str, values: Any, why: str
) -> None:
    """UserError for the first entry that is bad, if there is one."""
    if bad.any():
        first, more = int(np.argmax(bad)), int(bad.sum()) - 1
        value = values[first].tolist()
        count = f" (and {more} more like it)" if more else ""
        raise UserError(f"{path}: {what} {ids[first]}: {field} {value} {why}{count}")


def _repeated(ids: Int64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Entries whose id an earlier entry has."""
    order = np.argsort(ids, kind="stable")
    repeated = np.zeros(len(ids), bool)
    repeated[order[1:]] = ids[order[1:]] == ids[order[:-1]]
    return repeated


def _check_categories(path: Path, categories: list[CategoryEntry]) -> None:
    if not categories:
        raise UserError(f"{path}: has no categories")
    counts = Counter(entry.id for entry in categories)
    for entry in categories:
        if not -(2**63) <= entry.id < 2**63:
            raise UserError(f"{path}: category {_short(entry.name)}: id is {_short(entry.id)}, beyond 64 bits")
        if counts[entry.id] > 1:
            names = ", ".join([_short(other.name) for other in categories if other.id == entry.id][:3])
            raise UserError(f"{path}: category {entry.id}: the id is used for {names}")


def _check_images(path: Path, images: Images) -> None:
    if not len(images.ids):
        raise UserError(f"{path}: has no images")
    _refuse(path, "image", images.ids, _repeated(images.ids), "id", images.ids, "is used twice")
    for field, values in (("height", images.heights), ("width", images.widths)):
        bad = (values < 1) | (values > MAX_SIDE)
        _refuse(path, "image", images.ids, bad, field, values, f"is not from 1 to {MAX_SIDE} pixels")


def _rows(
    path: Path, boxes: Boxes, field: str, wanted: Int64[np.ndarray, " m"], ids: Int64[np.ndarray, " n"]
) -> Int64[np.ndarray, " m"]:
    """Position of every wanted id in `ids`. UserError if one is not there."""
    order = np.argsort(ids, kind="stable")
    rows = order[np.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)]
    _refuse(path, "annotation", boxes.ids, ids[rows] != wanted, field, wanted, "is unknown in this file")
    return rows


def _check_boxes(path: Path, boxes: Boxes) -> None:
    def refuse(bad: Any, field: str, values: Any, why: str) -> None:
        _refuse(path, "annotation", boxes.ids, bad, field, values, why)

    refuse(_repeated(boxes.ids), "id", boxes.ids, "is used twice")
    refuse(~np.isfinite(boxes.xywh).all(axis=1), "bbox", boxes.xywh, "is not finite")
    refuse((abs(boxes.xywh) > 2**31).any(axis=1), "bbox", boxes.xywh, "is beyond any image")
    refuse((boxes.xywh[:, 2:] < 0).any(axis=1), "bbox", boxes.xywh, "(x, y, width, height) has a negative side")
    refuse((boxes.areas < 0) | np.isinf(boxes.areas), "area", boxes.areas, "is no area")
    refuse((boxes.crowd != 0) & (boxes.crowd != 1), "iscrowd", boxes.crowd, "is neither 0 nor 1")


def _sound_boxes(
    path: Path, boxes: Boxes, heights: Int64[np.ndarray, " M"], widths: Int64[np.ndarray, " M"]
) -> tuple[Bool[np.ndarray, " M"], tuple[str, ...]]:
    """Boxes with an area inside their image, and a note on those without. UserError if there are too many of those."""
    x, y, width, height = boxes.xywh.T
    empty = (width == 0) | (height == 0)
    outside = (x >= widths) | (y >= heights) | (x + width <= 0) | (y + height <= 0)
    bad = empty | outside
    if not bad.any():
        return ~bad, ()
    if bad.sum() * TOLERATED > len(bad):
        for flaw, why in ((empty, "(x, y, width, height) has no area"), (outside, "lies outside its image")):
            _refuse(path, "annotation", boxes.ids, flaw, "bbox", boxes.xywh, why)
    first = int(np.argmax(bad))
    example = f"annotation {boxes.ids[first]}, bbox {boxes.xywh[first].tolist()}"
    return ~bad, (f"{bad.sum()} of {len(bad)} boxes dropped, empty or outside their image; the first is {example}",)
