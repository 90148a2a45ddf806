"""PASCAL VOC folders into tables: one XML file for each image, lists of names for each split.

    VOCdevkit/VOC2007/, VOCdevkit/VOC2012/    train: both trainval; val and test: VOC2007 test
    VOC2007/, or any folder of this form      train, val, test: the lists of these names in ImageSets/Main

Corners become boxes like this (`corners_to_xywh`): VOC counts pixels from 1 and its last pixel belongs to the box, so
x = xmin - 1 and width = xmax - xmin + 1. Without `one_based` they are taken as they stand, x = xmin and
width = xmax - xmin, which is what many annotation tools mean. A box whose corners coincide in x or y is dropped.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Float64, Int64

from core.data.images import ImageFolder
from core.data.parse import BAD_NAME, MAX_SIDE
from core.data.table import Category, Table, cached_table, pack_names, warn
from core.errors import UserError
from core.files import open_regular

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
YEARS = ("VOC2007", "VOC2012")  # folders of a VOCdevkit
LISTS = Path("ImageSets", "Main")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
RULES = 1  # of reading; a change makes cached tables stale
MAX_BYTES = 2**24  # of an XML file
MAX_NAME = 200  # characters of an image's name
MAX_NUMBER = 2**31  # a corner beyond is in no image
DECLARATION = re.compile(r"<!(?:DOCTYPE|ENTITY)")  # could make a small file expand to gigabytes, or read another one
VOC_NAME = re.compile(r"[0-9]{6}|[12][0-9]{3}_[0-9]{6}", re.ASCII)


class Entry(NamedTuple):
    """One line of a list: an image of a year's folder."""

    year: str  # VOC2007, VOC2012, or empty in a folder that is itself a year's
    name: str


ReadList = Callable[[Path, str], list[Entry]]  # of a file and a year


class VocFolder(NamedTuple):
    """A data set on the disk: which lists make up its splits."""

    folder: Path
    name: str  # short
    lists: Mapping[str, tuple[tuple[str, str], ...]]  # (year, name of the list) of each split

    def images(self) -> Path:
        """The folder that image names are relative to."""
        return self.folder if any(year for year, _ in chain(*self.lists.values())) else self.folder / "JPEGImages"

    def list_file(self, year: str, name: str) -> Path:
        """A list of images."""
        return self.folder / year / LISTS / f"{name}.txt"

    def annotation(self, entry: Entry) -> Path:
        """The XML file of an image."""
        return self.folder / entry.year / "Annotations" / f"{entry.name}.xml"


class Annotation(NamedTuple):
    """One XML file."""

    file_name: str
    height: int
    width: int
    names: list[str]  # of the objects' classes
    corners: list[tuple[float, float, float, float]]  # xmin, ymin, xmax, ymax as they stand there
    difficult: list[bool]
    dropped: list[str]  # objects without extent, in words
    origin: str  # where the image is said to come from


def find_voc(folder: Path, read: ReadList | None = None) -> VocFolder | None:
    """What a folder holds if it is a VOCdevkit or a single year of it, otherwise None.

    `read` stands in for `read_list`.

    A VOCdevkit without VOC2007's test list has train and val of the same years as its splits. In a single year's folder
    trainval stands in for a missing train, and test for a missing val.
    """
    if not any((folder / year / LISTS).is_dir() for year in ("", *YEARS)):
        return None
    read = read or read_list
    voc = _single_year(folder, read) if (folder / LISTS).is_dir() else _devkit(folder, read)
    if not voc.lists:
        names = "train, val, trainval and test.txt"
        raise UserError(f"{folder}: has no list of images with annotations; looked for {names} in {LISTS}")
    return voc


def _single_year(folder: Path, read: ReadList) -> VocFolder:
    voc = VocFolder(folder, folder.resolve().name, {})
    wanted = {"train": ("train", "trainval"), "val": ("val", "test"), "test": ("test",)}
    found = {
        split: next((name for name in names if _usable(voc, "", name, read)), "") for split, names in wanted.items()
    }
    return voc._replace(lists={split: (("", name),) for split, name in found.items() if name})


def _devkit(folder: Path, read: ReadList) -> VocFolder:
    voc = VocFolder(folder, "", {})
    if _usable(voc, "VOC2007", "test", read):
        test = (("VOC2007", "test"),)
        train = tuple((year, "trainval") for year in YEARS if _usable(voc, year, "trainval", read))
        lists = {"train": train, "val": test, "test": test}
    else:
        lists = {
            split: tuple((year, split) for year in YEARS if _usable(voc, year, split, read))
            for split in ("train", "val")
        }
    years = "+".join(year[-2:] for year, _ in lists["train"])
    name = f"VOC{years or '07'}{'' if 'test' in lists else '-train'}"
    return VocFolder(folder, name, {split: found for split, found in lists.items() if found})


def _usable(voc: VocFolder, year: str, name: str, read: ReadList) -> bool:
    """Whether a list is there, and not that of a challenge whose annotations were never published."""
    path = voc.list_file(year, name)
    return path.is_file() and any(voc.annotation(entry).is_file() for entry in read(path, year))


def read_list(path: Path, year: str) -> list[Entry]:
    """The images that a list names. UserError for a name that is no plain file name."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a list of image names ({error})") from None
    names = [line.strip() for line in lines if line.strip()]
    for number, name in enumerate(names, start=1):
        if BAD_NAME.search(name) or "/" in name or len(name) > MAX_NAME:
            raise UserError(
                f"{path}: name {number} is {_short(name)}; it must be a file name without folder and suffix"
            )
    repeated = len(names) - len(set(names))
    if repeated:
        twice = Counter(names).most_common(1)[0][0]
        raise UserError(f"{path}: lists {_short(twice)} twice (and {repeated - 1} more like it)")
    return [Entry(year, name) for name in names]


def open_voc(voc: VocFolder, splits: Sequence[str], *, one_based: bool = True) -> dict[str, Table]:
    """The tables of some splits, from the cache if lists and XML files have not changed since.

    The cache is keyed by the names in the lists and the size and time of change of every XML file they name, which one
    pass of `stat` tells. Classes are those of all splits together: VOC's 20 with ids 1 to 20 in alphabetical order
    where every name is one of them, otherwise the names found, sorted.

    Args:
        voc: the folder.
        splits: those to open; one that the folder lacks is left out.
        one_based: how corners are meant, see above.

    Raises:
        UserError: a file that is missing or cannot be trusted; the line names file and field.
    """
    entries = {
        split: [entry for year, name in lists for entry in read_list(voc.list_file(year, name), year)]
        for split, lists in voc.lists.items()
    }
    everything = sorted(set(chain(*entries.values())))
    key = {"rules": RULES, "files": _fingerprint(voc, entries, everything)}
    place, images = str(voc.folder.resolve()), ImageFolder(voc.images())

    @cache
    def annotations() -> dict[Entry, Annotation]:
        return {entry: read_annotation(voc.annotation(entry)) for entry in everything}

    def build(split: str) -> Table:
        read, ids = annotations(), image_ids(everything)
        rows = [(entry, ids[entry], read[entry]) for entry in entries[split]]
        return _build_table(voc, rows, categories_of(read.values()), images, one_based)

    if "val" in splits and "val" in entries and entries["val"] == entries.get("test"):
        words = " ".join(voc.lists["val"][0]).strip()
        warn(
            f"{voc.folder}: val is {words} too, there being no third list: best.pt is chosen on the images of the test"
        )
    tables = {}
    for split in [split for split in splits if split in entries]:
        identity = f"{place} {split} {one_based}"
        tables[split] = cached_table(identity, {**key, "split": split}, partial(build, split), images)
        for note in tables[split].notes:
            warn(f"{voc.folder}, {split}: {note}")
    return tables


def _fingerprint(voc: VocFolder, splits: Mapping[str, list[Entry]], everything: list[Entry]) -> str:
    """SHA-256 over the lists and over size and time of change of the XML files. UserError if one is missing."""
    state = hashlib.sha256(json.dumps(splits).encode())
    for entry in everything:
        path = voc.annotation(entry)
        try:
            stat = path.stat()
        except OSError as error:
            year = f"{entry.year}/" if entry.year else ""
            raise UserError(f"{path}: {error.strerror}, but a list in {year}{LISTS} names it") from None
        if stat.st_size > MAX_BYTES:
            raise UserError(f"{path}: has {stat.st_size:,} bytes, no annotation file has more than {MAX_BYTES:,}")
        state.update(b"%d %d\n" % (stat.st_size, stat.st_mtime_ns))
    return state.hexdigest()


def image_ids(entries: Sequence[Entry]) -> dict[Entry, int]:
    """A number for every image of a data set, the same in every split.

    Names as VOC gives them are read as one number: 000012 becomes 12 and 2007_000027 becomes 2007000027. Where another
    name is among them, or two years share one, images are counted from 1 in the order of their names.
    """
    if all(VOC_NAME.fullmatch(entry.name) for entry in entries):
        numbers = {entry: int(entry.name.replace("_", "")) for entry in entries}
        if len(set(numbers.values())) == len(numbers):
            return numbers
    return {entry: number for number, entry in enumerate(sorted(entries), start=1)}


def categories_of(annotations: Iterable[Annotation]) -> tuple[Category, ...]:
    """The classes of a data set, see `open_voc`."""
    names = set(chain(*(annotation.names for annotation in annotations)))
    known = VOC_CLASSES if names <= set(VOC_CLASSES) else sorted(names)
    return tuple(Category(number, name) for number, name in enumerate(known, start=1))


def corners_to_xywh(corners: Float64[np.ndarray, "n 4"], *, one_based: bool) -> Float64[np.ndarray, "n 4"]:
    """Left, top, width and height in pixels, counted from 0, of corners (xmin, ymin, xmax, ymax).

    Pixels 1 to 10 of a row become x = 0 and width = 10. So width * height is the number of pixels, and
    `transforms.corner_boxes` gives (0, 10) in modern geometry and the last pixel's own (0, 9) in legacy geometry.

    Args:
        corners: as an XML file states them.
        one_based: pixels are counted from 1 and the last one belongs to the box; otherwise corners are points, and only
            written as a size.
    """
    first = corners[:, :2] - one_based
    return np.concatenate([first, corners[:, 2:] - first], axis=1)


def _build_table(
    voc: VocFolder,
    rows: Sequence[tuple[Entry, int, Annotation]],
    categories: tuple[Category, ...],
    images: ImageFolder,
    one_based: bool,
) -> Table:
    read = [annotation for _, _, annotation in rows]
    names = [f"{f'{e.year}/JPEGImages/' if e.year else ''}{annotation.file_name}" for e, _, annotation in rows]
    name_offsets, name_bytes = pack_names(names)
    label = {category.name: row for row, category in enumerate(categories)}
    xywh = corners_to_xywh(_column(read, lambda a: a.corners, np.float64).reshape(-1, 4), one_based=one_based)
    labels = _column(read, lambda a: [label[name] for name in a.names], np.int32)
    box_offsets: Int64[np.ndarray, " P"] = np.cumsum([0, *(len(annotation.names) for annotation in read)])
    return Table(
        categories=categories,
        image_ids=np.array([number for _, number, _ in rows], np.int64),
        heights=np.array([annotation.height for annotation in read], np.int32),
        widths=np.array([annotation.width for annotation in read], np.int32),
        name_offsets=name_offsets,
        name_bytes=name_bytes,
        box_offsets=box_offsets,
        boxes_xywh=xywh,
        labels=labels,
        crowd=np.zeros(len(xywh), bool),
        areas=xywh[:, 2] * xywh[:, 3],
        annotation_ids=np.arange(1, len(xywh) + 1),
        difficult=_column(read, lambda a: a.difficult, np.bool_),
        images=images,
        source=str(voc.folder),
        licence="images from flickr" if any(annotation.origin == "flickr" for annotation in read) else "",
        notes=_notes(voc, rows, int((xywh[:, :2] < 0).any(axis=1).sum()) if one_based else 0),
        protocol="voc",
    )


def _column(annotations: Sequence[Annotation], values: Callable[[Annotation], list], kind: type) -> np.ndarray:
    """One value of every object, image after image."""
    return np.array([value for annotation in annotations for value in values(annotation)], kind)


def _notes(voc: VocFolder, rows: Sequence[tuple[Entry, int, Annotation]], outside: int) -> tuple[str, ...]:
    """What a user should know about the boxes of a split."""
    dropped = [(entry, words) for entry, _, annotation in rows for words in annotation.dropped]
    notes = []
    if dropped:
        entry, words = dropped[0]
        count = f"{len(dropped)} box{'es' * (len(dropped) > 1)}"
        notes.append(f"{count} without extent dropped; the first is {voc.annotation(entry).name}, {words}")
    if outside:
        count = "1 box begins" if outside == 1 else f"{outside} boxes begin"
        notes.append(f"{count} before the first pixel; if corners are counted from 0, say --no-voc-one-based")
    return tuple(notes)


def read_annotation(path: Path) -> Annotation:
    """What one XML file says. UserError, naming file and field, if it cannot be trusted."""
    root = read_root(path)
    file_name = _text(path, root, "filename", "")
    if BAD_NAME.search(file_name) or "/" in file_name:
        raise UserError(f"{path}: filename {_short(file_name)} must be the name of a file in JPEGImages")
    size = root.find("size")
    if size is None:
        raise UserError(f"{path}: lacks size")
    height, width = (_side(path, size, side) for side in ("height", "width"))
    annotation = Annotation(file_name, height, width, [], [], [], [], _origin(root))
    for number, element in enumerate(root.iterfind("object"), start=1):
        _read_object(path, element, f"object {number}", annotation)
    return annotation


def read_root(path: Path) -> ElementTree.Element:
    """The root of an XML file without declarations; decoded here, so that no encoding can hide one."""
    try:
        with open_regular(path) as file:
            text = file.read(MAX_BYTES + 1).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected an annotation file of VOC") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    if declaration := DECLARATION.search(text):
        raise UserError(f"{path}: has a {declaration[0]} declaration, which no annotation needs; remove it")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise UserError(f"{path}: no valid XML ({error})") from None
    if root.tag != "annotation":
        raise UserError(
            f"{path}: no annotation file of VOC: its outermost element is {_short(root.tag)}, not 'annotation'"
        )
    return root


def _read_object(path: Path, element: ElementTree.Element, where: str, into: Annotation) -> None:
    """Adds an object to what is read; one without extent is only noted."""
    name = _text(path, element, "name", f"{where}: ")
    where = f"{where} ({name})"
    box = element.find("bndbox")
    if box is None:
        raise UserError(f"{path}: {where}: lacks bndbox")
    xmin, ymin, xmax, ymax = (_corner(path, box, field, where) for field in CORNERS)
    difficult = (element.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        raise UserError(f"{path}: {where}: difficult is {_short(difficult)}, neither 0 nor 1")
    shown = f"bndbox [{xmin:g}, {ymin:g}, {xmax:g}, {ymax:g}] (xmin, ymin, xmax, ymax)"
    if xmax < xmin or ymax < ymin:
        raise UserError(f"{path}: {where}: {shown} ends before it begins")
    if xmin > into.width or ymin > into.height or xmax < 0 or ymax < 0:
        raise UserError(f"{path}: {where}: {shown} lies outside its image of {into.width}x{into.height} pixels")
    if xmin == xmax or ymin == ymax:
        into.dropped.append(f"{where}, {shown}")
        return
    into.names.append(name)
    into.corners.append((xmin, ymin, xmax, ymax))
    into.difficult.append(difficult == "1")


def _text(path: Path, element: ElementTree.Element, field: str, where: str) -> str:
    text = (element.findtext(field) or "").strip()
    if not text:
        raise UserError(f"{path}: {where}lacks {field}")
    return text


def _corner(path: Path, box: ElementTree.Element, field: str, where: str) -> float:
    text = _text(path, box, field, f"{where}: bndbox ")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= MAX_NUMBER:
        raise UserError(f"{path}: {where}: {field} is {_short(text)}, no number of pixels")
    return value


def _side(path: Path, size: ElementTree.Element, field: str) -> int:
    text = _text(path, size, field, "size ")
    if not text.isdecimal() or len(text) > len(str(MAX_SIDE)) or not 1 <= int(text) <= MAX_SIDE:
        raise UserError(f"{path}: size: {field} is {_short(text)}, no whole number from 1 to {MAX_SIDE} pixels")
    return int(text)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _origin(root: ElementTree.Element) -> str:
    source = root.find("source")
    return "" if source is None else (source.findtext("image") or "").strip()
