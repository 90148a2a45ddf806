"""VOC folders read for what can be read, as `lenient` does with COCO's files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from core.data.lenient import BoxRows, ImageRows, Split, name_problem, repeated
from core.data.parse import BAD_NAME, MAX_SIDE, CategoryEntry
from core.data.problems import CODES, Problems
from core.data.voc import (
    CORNERS,
    LISTS,
    MAX_BYTES,
    MAX_NAME,
    MAX_NUMBER,
    VOC_CLASSES,
    YEARS,
    Entry,
    VocFolder,
    corners_to_xywh,
    find_voc,
    image_ids,
    read_root,
)
from core.errors import UserError, nearest

LIST_NAMES = ("train", "val", "trainval", "test")


class _Object(NamedTuple):
    number: int  # in its file, from 1
    name: str
    corners: tuple[float, ...]  # as they stand there
    difficult: bool
    error: str  # the check that makes it unusable, or empty


@dataclass
class _Xml:
    """What can be read of an XML file; sides are 0 where none is stated."""

    file_name: str = ""
    height: int = 0
    width: int = 0
    objects: list[_Object] = field(default_factory=list)
    error: str = ""  # the check that makes the image unusable, or empty


class _Lists:
    """Reads lists of names and keeps what is wrong with them, for each file once."""

    def __init__(self) -> None:
        self.wrong: dict[Path, list[tuple[str, dict[str, Any]]]] = {}

    def read(self, path: Path, year: str) -> list[Entry]:
        """The sound names of a list, each once."""
        wrong = self.wrong[path] = []
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            wrong.append(("annotations-missing", {"note": f"cannot be read as a list of image names ({error})"}))
            return []
        names = [line.strip() for line in lines if line.strip()]
        for name in names:
            if _bad_name(name):
                wrong.append(("voc-list-name", {"field": "name", "value": name, "note": "is no plain file name"}))
        wrong += [
            ("voc-list-duplicate", {"field": "name", "value": name, "note": "is listed more than once"})
            for name in repeated(names)
        ]
        return [Entry(year, name) for name in dict.fromkeys(names) if not _bad_name(name)]


def _bad_name(name: str) -> bool:
    return bool(BAD_NAME.search(name)) or "/" in name or len(name) > MAX_NAME


def read_voc(folder: Path, problems: Problems, *, one_based: bool) -> dict[str, Split] | None:
    """What can be read of every split of a VOC folder; None if the folder is none."""
    lists = _Lists()
    try:
        voc = find_voc(folder, lists.read)
    except UserError as error:
        _report_lists(lists, VocFolder(folder, "", {}), problems)
        problems.add("annotations-missing", "", folder, note=str(error).removeprefix(f"{folder}: "))
        return {}
    if voc is None:
        return None
    entries = {
        split: [entry for year, name in named for entry in lists.read(voc.list_file(year, name), year)]
        for split, named in voc.lists.items()
    }
    _report_lists(lists, voc, problems)
    first = {entry: split for split in reversed(entries) for entry in entries[split]}
    files = {entry: _read_xml(first[entry], voc.annotation(entry), problems) for entry in sorted(first)}
    _report_files(voc, first, problems)
    names = [o.name for file in files.values() if file for o in file.objects if not o.error]
    categories = _categories(folder, names, problems)
    ids = image_ids(sorted(first))
    return {split: _split(split, voc, some, files, ids, categories, one_based) for split, some in entries.items()}


def _report_lists(lists: _Lists, voc: VocFolder, problems: Problems) -> None:
    """What is wrong with the lists that were looked at, and lists that are no split."""
    used = {voc.list_file(year, name): split for split, named in voc.lists.items() for year, name in named}
    for path, wrong in lists.wrong.items():
        for check, rest in wrong:
            problems.add(check, used.get(path, ""), path, **rest)
    for year in ("", *YEARS):
        for path in (voc.list_file(year, name) for name in LIST_NAMES):
            if path.is_file() and path not in used:
                some = _Lists().read(path, year)
                if some and not any(voc.annotation(entry).is_file() for entry in some):
                    note = f"lists {len(some)} images, none of which has an XML file"
                    problems.add("voc-list-passed-over", "", path, note=note)


def _report_files(voc: VocFolder, first: dict[Entry, str], problems: Problems) -> None:
    """XML files that no list names."""
    for year in dict.fromkeys(entry.year for entry in first):
        folder = voc.annotation(Entry(year, "x")).parent
        listed = {f"{entry.name}.xml" for entry in first if entry.year == year}
        spare = sorted(path for path in folder.glob("*.xml") if path.name not in listed)
        note = f"is in no list of {LISTS}"
        problems.add_rows("voc-xml-not-listed", "", spare, partial(_file_problem, note))


def _file_problem(note: str, file: Path) -> dict[str, Any]:
    return {"file": file, "note": note}


def _categories(folder: Path, names: Sequence[str], problems: Problems) -> list[CategoryEntry]:
    """The classes as `voc.categories_of` numbers them."""
    found = set(names)
    unknown = sorted(found - set(VOC_CLASSES)) if found & set(VOC_CLASSES) else []
    for name in unknown:
        note = f"({names.count(name)} objects) is none of VOC's 20 classes{nearest(name, VOC_CLASSES)}"
        problems.add("voc-class-unknown", "", folder, entry="category", field="name", value=name, note=note)
    known = VOC_CLASSES if found <= set(VOC_CLASSES) else sorted(found)
    return [CategoryEntry(number, name) for number, name in enumerate(known, start=1)]


def _read_xml(split: str, path: Path, problems: Problems) -> _Xml | None:
    """What can be read of an XML file; None if nothing can."""
    if not path.is_file():
        problems.add("voc-xml-missing", split, path, note=f"is not there, but a list in {LISTS} names it")
        return None
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: has more than {MAX_BYTES:,} bytes")
        root = read_root(path)
    except UserError as error:
        problems.add("voc-xml-invalid", split, path, note=str(error).removeprefix(f"{path}: "))
        return None
    file = _Xml(file_name=_text(root, "filename"))
    _read_name(file, split, path, problems)
    _read_size(file, root.find("size"), split, path, problems)
    for number, element in enumerate(root.iterfind("object"), start=1):
        read = _read_object(element, number, file, split, path, problems)
        file.objects.append(read)
    return file


def _text(element: ElementTree.Element, field: str) -> str:
    return (element.findtext(field) or "").strip()


def _read_name(file: _Xml, split: str, path: Path, problems: Problems) -> None:
    if not file.file_name:
        file.error = "field-missing"
        problems.add(file.error, split, path, field="filename", note="is missing")
    elif BAD_NAME.search(file.file_name) or "/" in file.file_name:
        file.error = name_problem(file.file_name) or "file-name-invalid"
        note = "must be the name of a file in JPEGImages"
        problems.add(file.error, split, path, field="filename", value=file.file_name, note=note)
    elif Path(file.file_name).stem != path.stem:
        problems.add("voc-filename-differs", split, path, field="filename", value=file.file_name)


def _read_size(file: _Xml, size: ElementTree.Element | None, split: str, path: Path, problems: Problems) -> None:
    if size is None:
        problems.add("image-size-invalid", split, path, field="size", note="is missing")
        return
    for side in ("height", "width"):
        text = _text(size, side)
        if text.isdecimal() and len(text) <= len(str(MAX_SIDE)) and 1 <= int(text) <= MAX_SIDE:
            setattr(file, side, int(text))
        else:
            note = f"is no whole number from 1 to {MAX_SIDE}"
            problems.add("image-size-invalid", split, path, field=side, value=text, note=note)


def _read_object(
    element: ElementTree.Element, number: int, file: _Xml, split: str, path: Path, problems: Problems
) -> _Object:
    """One object; what is wrong with it is the first of these problems."""
    name, box = _text(element, "name"), element.find("bndbox")
    texts = ["" if box is None else _text(box, field) for field in CORNERS]
    corners = tuple(map(_number, texts))
    difficult = _text(element, "difficult") or "0"
    wrong = _object_problem(name, texts, corners, difficult, file)
    if wrong:
        check, field, value, note = wrong
        problems.add(check, split, path, entry="object", id=number, field=field, value=value, note=note)
    return _Object(number, name, corners, difficult == "1", wrong[0] if wrong else "")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _object_problem(
    name: str, texts: list[str], corners: tuple[float, ...], difficult: str, file: _Xml
) -> tuple[str, str, Any, str] | None:
    """Check, field, value and the rest of the sentence of what is wrong with an object; by the rules of `voc`."""
    for part, text in (("name", name), *zip(CORNERS, texts, strict=True)):
        if not text:
            return "field-missing", part, None, "is missing"
    for part, text, value in zip(CORNERS, texts, corners, strict=True):
        if math.isnan(value) and text.lower().strip("+-") != "nan":
            return "field-wrong-type", part, text, "is no number of pixels"
        if not math.isfinite(value):
            return "box-not-finite", part, text, "is not finite"
        if abs(value) > MAX_NUMBER:
            return "box-beyond", part, text, "is beyond any image"
    if difficult not in ("0", "1"):
        return "voc-difficult-invalid", "difficult", difficult, "is neither 0 nor 1"
    xmin, ymin, xmax, ymax = corners
    shown = ("bndbox", list(corners))
    if xmax < xmin or ymax < ymin:
        return "box-negative", *shown, "ends before it begins"
    if file.width and file.height and (xmin > file.width or ymin > file.height or xmax < 0 or ymax < 0):
        return "box-outside", *shown, f"lies outside its image of {file.width}x{file.height} pixels"
    if xmin == xmax or ymin == ymax:
        return "box-zero-area", *shown, "has no extent"
    return None


def _split(
    name: str,
    voc: VocFolder,
    entries: Sequence[Entry],
    files: dict[Entry, _Xml | None],
    ids: dict[Entry, int],
    categories: list[CategoryEntry],
    one_based: bool,
) -> Split:
    read = [(position, entry, file) for position, entry in enumerate(entries) if (file := files[entry]) is not None]
    owners = [(ids[entry], some) for _, entry, file in read for some in file.objects]
    label = {category.name: category.id for category in categories}
    corners = np.array([some.corners for _, some in owners], np.float64).reshape(-1, 4)
    errors = [some.error or file.error for _, _, file in read for some in file.objects]
    xywh = corners_to_xywh(corners, one_based=one_based)
    boxes = BoxRows(
        positions=np.array([some.number for _, some in owners], np.int64),
        ids=np.arange(1, len(owners) + 1),
        image_ids=np.array([number for number, _ in owners], np.int64),
        category_ids=np.array([label.get(some.name, 0) for _, some in owners], np.int64),
        crowd=np.zeros(len(owners), np.int64),
        difficult=np.array([some.difficult for _, some in owners], bool),
        xywh=xywh,
        areas=xywh[:, 2] * xywh[:, 3],
        drop=np.array([CODES.get(error, 0) for error in errors], np.int16),
    )
    images = ImageRows(
        positions=np.array([position for position, _, _ in read], np.int64),
        ids=np.array([ids[entry] for _, entry, _ in read], np.int64),
        heights=np.array([file.height for *_, file in read], np.int64),
        widths=np.array([file.width for *_, file in read], np.int64),
        names=[f"{f'{entry.year}/JPEGImages/' if entry.year else ''}{file.file_name}" for _, entry, file in read],
        drop=np.array([CODES.get(file.error, 0) for *_, file in read], np.int16),
    )
    positions = list(range(len(categories)))
    totals = {"images": len(entries), "annotations": len(owners), "categories": len(categories)}
    split = Split(name, voc.folder, voc.images(), images, boxes, categories, positions, totals)
    split.files = [voc.annotation(entry) for _, entry, _ in read]
    return split
