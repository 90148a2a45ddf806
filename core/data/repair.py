"""A copy of a data set's annotations without what training refuses: `python -m core.data check DATA --fix OUT`.

Every split becomes a COCO file; `data.yaml` names it with the original folder of images. Entries that are sound are
copied letter by letter, with all their fields. Warnings are left as they are, and images are not touched.
"""

import json
import math
import mmap
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from jaxtyping import Int16, Int64

from core.data.check import Checked, box_view, category_pairs, image_rows, repeated_rows
from core.data.lenient import KINDS, Split, bad_sizes
from core.data.parse import NOT_JSON, decoded_chunks
from core.data.problems import CHECKS, CODES
from core.errors import UserError

WITH_IMAGE = len(CHECKS) + 1  # code of a box that goes with its image
ANNOTATIONS = "annotations"


def check_out(data: str, out: Path) -> None:
    """UserError unless there can be a repaired copy of `data` in the folder `out`, which must be new or empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not empty; name a new folder")
    if data == "shapes":
        raise UserError("data shapes: is drawn, there is nothing to mend")


def write_repaired(checked: Checked, out: Path) -> list[str]:
    """Writes the annotation files and data.yaml; what was dropped or mended, in lines.

    The folder appears complete or not at all.

    Raises:
        UserError: as `check_out`; no split has an image left; or the folder cannot be written.
    """
    check_out(checked.data, out)
    splits = {name: split for name, split in checked.splits.items() if _usable(split)}
    if not splits:
        raise UserError(f"data {checked.data}: no split has a sound image and a category; there is nothing to write")
    place = out.absolute()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}-") as temporary:
            unfinished = Path(temporary) / "repaired"
            lines = _write_splits(splits, unfinished)
            unfinished.replace(place)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    left_out = [name for name in _mentioned(checked) if name not in splits]
    return [f"{name}: left out, it has no sound image or no category" for name in left_out] + lines


def _write_splits(splits: Mapping[str, Split], folder: Path) -> list[str]:
    """All files of the copy."""
    categories = shared_categories(splits)
    (folder / ANNOTATIONS).mkdir(parents=True)
    lines = []
    for name, split in splits.items():
        boxes = boxes_to_drop(split)
        with (folder / ANNOTATIONS / f"{name}.json").open("wb") as file:
            write = _write_voc if split.files else _write_coco
            write(file, split, boxes, categories)
        lines += _summary(split, boxes, categories)
    _write_yaml(folder / "data.yaml", splits)
    return lines


def _mentioned(checked: Checked) -> list[str]:
    """Names of all splits, those that could not be read among them."""
    names = {name for counts in checked.problems.counts.values() for name in counts if name}
    return [name for name in ("train", "val", "test") if name in names | set(checked.splits)]


def _usable(split: Split) -> bool:
    there = split.folder is not None and split.folder.is_dir()
    return there and bool(split.categories) and bool((images_to_drop(split) == 0).any())


def images_to_drop(split: Split) -> Int16[np.ndarray, " N"]:
    """Why an image is left out, 0 where it stays; a size that the file could not mend is a reason too."""
    code = CODES["image-size-invalid"]
    return np.where((split.images.drop == 0) & bad_sizes(split.images), code, split.images.drop).astype(np.int16)


def boxes_to_drop(split: Split) -> Int16[np.ndarray, " M"]:
    """Why a box is left out, 0 where it stays."""
    rows = image_rows(split.images, split.boxes.image_ids)
    image = np.append(images_to_drop(split), np.int16(0))[rows]  # row -1: no such image, which is an error of its own
    return np.where((split.boxes.drop == 0) & (image != 0), WITH_IMAGE, split.boxes.drop).astype(np.int16)


def shared_categories(splits: Mapping[str, Split]) -> list[tuple[int, str]]:
    """One list for all splits: the first split's, then names that only others have, with ids that are free."""
    first, *others = splits.values()
    pairs = dict(category_pairs(first))
    for split in others:
        for number, name in category_pairs(split):
            if name not in pairs.values():
                pairs[number if number not in pairs else max(pairs) + 1] = name
    return sorted(pairs.items())


def category_map(split: Split, categories: list[tuple[int, str]]) -> dict[int, int]:
    """The new id of every old one; equal names are equal classes."""
    ids: dict[str, int] = {}
    for number, name in categories:
        ids.setdefault(name, number)
    return {number: number if (number, name) in categories else ids[name] for number, name in category_pairs(split)}


def new_box_ids(split: Split) -> Int64[np.ndarray, " M"]:
    """Annotation ids; one that is there before becomes a number above all others."""
    ids = split.boxes.ids.copy()
    twice = repeated_rows(ids)
    if not twice.any():
        return ids
    top = int(ids.max())
    if top + twice.sum() >= 2**63:  # no room above: all are counted anew
        return np.arange(1, len(ids) + 1)
    ids[twice] = top + 1 + np.arange(twice.sum())
    return ids


def _write_coco(file: BinaryIO, split: Split, drop: Int16[np.ndarray, " M"], categories: list[tuple[int, str]]) -> None:
    """The file again, its three lists filtered; other parts stay."""
    rows = {
        "images": _rows(split.images.positions, images_to_drop(split) == 0, split.totals["images"]),
        "annotations": _rows(split.boxes.positions, drop == 0, split.totals["annotations"]),
    }
    changes = {"images": _image_changes(split), "annotations": _box_changes(split, categories)}
    separator = b"{"
    for key, part in _parts(split.source).items():
        file.write(separator + json.dumps(key).encode() + b": ")
        separator = b",\n"
        if key == "categories":
            file.write(json.dumps(_category_entries(split, part, categories)).encode())
        elif key in rows:
            _write_list(file, _entries(split.source, key, part), rows[key], changes[key])
        else:
            file.write(_encoded(part))
    file.write(b"}\n")


def _parts(path: Path) -> dict[str, Any]:
    """The top level of a COCO file: undecoded, or as Python objects where the file has NaN."""
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    except NOT_JSON:
        parts: dict[str, Any] = json.loads(content[:])
        return parts


def _entries(path: Path, key: str, part: Any) -> Iterator[Any]:
    """The entries of a list, undecoded where the file is sound JSON."""
    if not isinstance(part, msgspec.Raw):
        yield from part
        return
    for chunk in decoded_chunks(path, KINDS[key][0], part, msgspec.Raw, lambda *_: []):
        yield from chunk


def _rows(positions: Int64[np.ndarray, " n"], keep: Any, total: int) -> Int64[np.ndarray, " t"]:
    """The row of every entry of a list, -1 where it is left out."""
    rows = np.full(total, -1)
    rows[positions[keep]] = np.flatnonzero(keep)
    return rows


def _write_list(
    file: BinaryIO, entries: Iterator[Any], rows: Int64[np.ndarray, " t"], changes: dict[int, dict[str, Any]]
) -> None:
    """The entries that stay, those with changes written anew."""
    separator = b"[\n"
    for entry, row in zip(entries, rows.tolist(), strict=True):
        if row < 0:
            continue
        if row in changes:
            fields = json.loads(bytes(entry)) if isinstance(entry, msgspec.Raw) else entry
            gone = {name for name, value in changes[row].items() if value is None}
            entry = {name: value for name, value in {**fields, **changes[row]}.items() if name not in gone}
        file.write(separator + _encoded(entry))
        separator = b",\n"
    file.write(b"]" if separator == b",\n" else b"[]")


def _encoded(part: Any) -> bytes:
    """JSON of a part of a file; what is no number or no letter in JSON becomes null or a question mark."""
    return bytes(part) if isinstance(part, msgspec.Raw) else json.dumps(_sound(part)).encode()


def _sound(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_sound(part) for part in value]
    return {_sound(key): _sound(part) for key, part in value.items()} if isinstance(value, dict) else value


def _image_changes(split: Split) -> dict[int, dict[str, Any]]:
    """Fields that are not as the file has them, of images whose size was mended or that needed a conversion."""
    images = split.images
    rows = set(split.resized) | _mended_rows(split, "images", images.positions)
    return {
        row: {"id": images.ids[row].item(), "height": images.heights[row].item(), "width": images.widths[row].item()}
        for row in rows
    }


def _mended_rows(split: Split, key: str, positions: Int64[np.ndarray, " n"]) -> set[int]:
    return set(np.flatnonzero(np.isin(positions, list(split.mended[key]))).tolist())


def _box_changes(split: Split, categories: list[tuple[int, str]]) -> dict[int, dict[str, Any]]:
    """Fields that are not as the file has them; an area of None is removed."""
    boxes, ids, new = split.boxes, new_box_ids(split), category_map(split, categories)
    moved = [number for number, other in new.items() if number != other]
    no_area = (boxes.areas < 0) | np.isinf(boxes.areas)
    changed = (ids != boxes.ids) | no_area | np.isin(boxes.category_ids, moved)
    changes = {}
    for row in set(np.flatnonzero(changed).tolist()) | _mended_rows(split, "annotations", boxes.positions):
        area = float(boxes.areas[row])
        changes[row] = {
            "id": int(ids[row]),
            "image_id": int(boxes.image_ids[row]),
            "category_id": new.get(int(boxes.category_ids[row])),
            "bbox": boxes.xywh[row].tolist(),
            "area": None if no_area[row] or math.isnan(area) else area,
            "iscrowd": int(boxes.crowd[row]),
        }
    return changes


def _category_entries(split: Split, part: Any, categories: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """The shared list, each with the further fields that this split's file has for it."""
    entries = list(_entries(split.source, "categories", part))
    fields: dict[str, dict[str, Any]] = {}
    for position, category in zip(split.category_positions, split.categories, strict=True):
        entry = entries[position]
        plain = json.loads(bytes(entry)) if isinstance(entry, msgspec.Raw) else _sound(entry)
        fields.setdefault(category.name, plain)
    return [{**fields.get(name, {}), "id": number, "name": name} for number, name in categories]


def _write_voc(file: BinaryIO, split: Split, drop: Int16[np.ndarray, " M"], categories: list[tuple[int, str]]) -> None:
    """XML files as one COCO file; `difficult` is written down, though COCO's readers take such a box as any other."""
    images, boxes = split.images, split.boxes
    content = {
        "images": [
            {
                "id": images.ids[row].item(),
                "file_name": images.names[row],
                "height": images.heights[row].item(),
                "width": images.widths[row].item(),
            }
            for row in np.flatnonzero(images_to_drop(split) == 0)
        ],
        "annotations": [
            {
                "id": boxes.ids[row].item(),
                "image_id": boxes.image_ids[row].item(),
                "category_id": boxes.category_ids[row].item(),
                "bbox": boxes.xywh[row].tolist(),
                "area": boxes.areas[row].item(),
                "iscrowd": 0,
                "difficult": int(boxes.difficult[row]),
            }
            for row in np.flatnonzero(drop == 0)
        ],
        "categories": [{"id": number, "name": name} for number, name in categories],
    }
    file.write(json.dumps(content).encode() + b"\n")


def _write_yaml(path: Path, splits: Mapping[str, Split]) -> None:
    """A dataset YAML whose folders of images are absolute, so that it works from anywhere; JSON strings are YAML."""
    lines = ["# written by python -m core.data check --fix; the images are where they were"]
    for name, split in splits.items():
        folder = json.dumps(os.path.abspath(split.folder or ""), ensure_ascii=False)
        lines.append(f"{name}: {{images: {folder}, annotations: {ANNOTATIONS}/{name}.json}}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _summary(split: Split, boxes: Int16[np.ndarray, " M"], categories: list[tuple[int, str]]) -> list[str]:
    """What happened to a split, in a few lines."""
    lines = []
    for what, key, drop in (("images", "images", images_to_drop(split)), ("boxes", "annotations", boxes)):
        total = split.totals[key]
        kept = int((drop == 0).sum())
        reasons = Counter(_reason(code) for code in drop[drop != 0].tolist())
        reasons["unreadable entry"] = total - len(drop)
        words = ", ".join(f"{reason} {count}" for reason, count in reasons.items() if count)
        lines.append(f"{split.name}: {kept} of {total} {what} kept" + f"; dropped: {words}" * (kept < total))
    if split.files:
        lines.append(f"{split.name}: VOC's XML became a COCO file; objects marked difficult are ordinary ones there")
        return lines
    view, new = box_view(split), category_map(split, categories)
    kept_rows = boxes == 0
    mended = {
        "sizes of images taken from their files": len(split.resized),
        "areas removed": int((kept_rows & ((view.areas < 0) | np.isinf(view.areas))).sum()),
        "annotation ids renumbered": int((kept_rows & (new_box_ids(split) != split.boxes.ids)).sum()),
        "categories dropped for an id used before": len(split.categories) - len(category_pairs(split)),
        "categories renumbered": sum(number != other for number, other in new.items()),
        "categories added from other splits": len(set(dict(categories)) - set(new.values())),
        "entries with numbers in text converted": sum(len(some) for some in split.mended.values()),
    }
    return lines + [f"{split.name}: {what}: {count}" for what, count in mended.items() if count]


def _reason(code: int) -> str:
    return "with their image" if code == WITH_IMAGE else list(CHECKS)[code - 1]
