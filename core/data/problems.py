"""What `python -m core.data check` looks for: the name of every check, what it means, and what was found.

An error is something that training refuses or leaves out with a note; a warning is accepted as it is, and may be meant.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

Severity = Literal["error", "warning"]
SHOWN, LINE = 80, 1000  # letters of a value, and of a file or the rest of a sentence


class Check(NamedTuple):
    """One thing that can be wrong with a data set."""

    name: str
    severity: Severity
    meaning: str  # what is found, in a sentence without its full stop
    repair: str  # what the repaired copy does about it; empty where it leaves things as they are


def _error(name: str, meaning: str, repair: str) -> Check:
    return Check(name, "error", meaning, repair)


def _warning(name: str, meaning: str, repair: str = "") -> Check:
    return Check(name, "warning", meaning, repair)


_ENTRY, _IMAGE, _BOX, _SPLIT = "entry dropped", "image dropped with its boxes", "box dropped", "split left out"
GROUPS: dict[str, tuple[Check, ...]] = {
    "Files": (
        _error("yaml-invalid", "the dataset YAML, or what it says of a split, is wrong", _SPLIT),
        _error("annotations-missing", "an annotation file or a list of images is missing or cannot be read", _SPLIT),
        _error("json-invalid", "an annotation file is no valid JSON", _SPLIT),
        _error("not-coco", "an annotation file lacks one of the lists images, annotations and categories", _SPLIT),
        _error("images-none", "a split lists no image", _SPLIT),
        _error("categories-none", "a split has no categories", _SPLIT),
        _error("image-folder-missing", "the folder of images is not there", _SPLIT),
        _warning("json-nan", "a file holds NaN or Infinity, which is no JSON: other tools refuse it", "becomes null"),
        _warning("split-missing", "there is no train or no val, which training needs"),
    ),
    "Entries": (
        _error("entry-no-object", "an entry of a list is no object with fields", _ENTRY),
        _error("field-missing", "an entry lacks a field that it must have", _ENTRY),
        _error(
            "field-wrong-type", "a field holds another kind of value", "a number in text is converted, else dropped"
        ),
        _error("number-too-large", "a number is beyond 64 bits", _ENTRY),
    ),
    "Image entries": (
        _error("image-id-duplicate", "several images have one id", "one kept if the entries agree, else none"),
        _error("image-size-invalid", "height or width is no number of pixels", "size taken from the image file"),
        _error("path-escape", "a file name leads out of the folder of images", _IMAGE),
        _error("file-name-invalid", "a file name is empty or has backslashes or control characters", _IMAGE),
        _warning("file-name-duplicate", "one file is listed under several image ids"),
        _warning("image-without-boxes", "an image has no box; --empty-images says whether it is learned from"),
        _warning("image-only-crowd", "all boxes of an image are crowd regions: nothing in it is a target"),
        _warning("image-tiny", "a side of an image is shorter than 32 pixels"),
        _warning("image-aspect", "an image is more than 8 times as long as wide"),
    ),
    "Image files": (
        _error("image-missing", "a listed image is not there", _IMAGE),
        _error("image-unreadable", "a file is no image, or of a format that cannot be read", _IMAGE),
        _error("image-too-large", "a header claims more pixels than any sound image has", _IMAGE),
        _error("image-corrupt", "pixels cannot be decoded; all images are decoded with --pixels only", _IMAGE),
        _error("image-size-mismatch", "a file has another size than its annotation says", _IMAGE),
        _error(
            "image-size-swapped",
            "a file's height and width are the annotation's width and height",
            "size taken from the file; dropped if EXIF turns the image",
        ),
        _warning("image-ends-early", "a file lacks its end marker, though it can be decoded"),
        _warning("image-rotated", "EXIF turns an image when it is viewed; boxes must fit the stored pixels"),
        _warning("image-converted", "an image has alpha, a palette, CMYK or 16 bits: it becomes 8-bit RGB"),
        _warning("image-duplicate", "a split has one picture in several files (with --pixels: the same pixels)"),
        _warning("file-not-listed", "an image in the folder is in no split"),
    ),
    "Boxes": (
        _error("box-id-duplicate", "several annotations have one id", "renumbered"),
        _error("box-image-unknown", "a box belongs to an image that is not listed", _BOX),
        _error("box-category-unknown", "a box has a category that is not listed", _BOX),
        _error("box-not-finite", "a box holds NaN or infinity", _BOX),
        _error("box-beyond", "a box has coordinates beyond any image", _BOX),
        _error("box-negative", "a box has a negative width or height", _BOX),
        _error(
            "box-zero-area",
            "a box has no extent; training leaves out one in a thousand and refuses more (of VOC, leaves out all)",
            _BOX,
        ),
        _error(
            "box-outside",
            "a box lies outside its image; training leaves out one in a thousand and refuses more (of VOC, all)",
            _BOX,
        ),
        _error("area-invalid", "an area is negative or not finite", "area removed; width times height stands in"),
        _error("crowd-invalid", "iscrowd is neither 0 nor 1", _BOX),
        _warning("box-partly-outside", "a box sticks out of its image by more than a pixel"),
        _warning("box-tiny", "a side of a box is shorter than 2 pixels"),
        _warning("box-aspect", "a box is more than 20 times as long as wide"),
        _warning("box-fills-image", "a box is as large as its image"),
        _warning("box-duplicate", "an image has a box of one class twice"),
        _warning("box-two-classes", "an image has the same box in two classes"),
        _warning("area-misfit", "an area is 0 or larger than its box"),
        _warning("boxes-normalised", "no coordinate is above 1: boxes look like fractions of the image, not pixels"),
        _warning("boxes-corners", "boxes look like (x1, y1, x2, y2), not like (x, y, width, height)"),
    ),
    "Classes": (
        _error("category-id-duplicate", "several categories have one id", "the first is kept"),
        _warning("category-name-duplicate", "several categories have one name"),
        _warning("category-name-similar", "names differ only in case, blanks or signs"),
        _warning("category-name-blank", "a name is empty"),
        _warning("category-id-gap", "ids are not 1, 2, 3 ...; harmless here, some tools expect it"),
        _warning("category-unused", "a category has no box in a split"),
        _warning("category-rare", "a category has fewer than 10 boxes in train"),
        _warning("class-imbalance", "the most frequent class of train has over 100 times the boxes of the rarest"),
    ),
    "Splits": (
        _error("categories-differ", "splits have different categories", "train's list, with new names added to it"),
        _warning("category-not-learned", "a category has boxes in val or test and none in train"),
        _warning("splits-identical", "two splits have the same images"),
        _warning("split-overlap", "an image file is in two splits"),
        _warning("split-leak", "a picture is in two splits under two names (with --pixels: the same pixels)"),
    ),
    "VOC": (
        _error("voc-list-name", "a list holds a name that is no plain file name", _ENTRY),
        _error("voc-list-duplicate", "a list holds a name twice", "listed once"),
        _error("voc-xml-missing", "a listed image has no XML file", _ENTRY),
        _error("voc-xml-invalid", "an XML file is not one of VOC", _ENTRY),
        _error("voc-difficult-invalid", "difficult is neither 0 nor 1", _BOX),
        _warning("voc-list-passed-over", "no image of a list has an XML file, so it is no split"),
        _warning("voc-filename-differs", "an XML file names an image that is called otherwise; its word counts"),
        _warning("voc-class-unknown", "a class is none of VOC's 20 while others are: perhaps a misspelt one"),
        _warning("voc-zero-based", "corners begin before pixel 1: if counted from 0, say --no-voc-one-based"),
        _warning("voc-xml-not-listed", "an XML file is in no list"),
    ),
}
CHECKS: dict[str, Check] = {check.name: check for group in GROUPS.values() for check in group}
CODES: dict[str, int] = {name: code for code, name in enumerate(CHECKS, start=1)}  # 0: nothing is wrong


@dataclass(frozen=True)
class Problem:
    """One case of a check: the value of which field, of which entry, in which file."""

    split: str
    file: str
    entry: str = ""  # image, annotation, category, object ...; empty where the whole file is meant
    id: int | str | None = None
    field: str = ""
    value: Any = None  # plain JSON
    note: str = ""  # the rest of the sentence

    def __str__(self) -> str:
        entry = f"{self.entry} {self.id if self.id is not None else ''}".strip()
        shown = repr(self.value) if isinstance(self.value, str) else self.value
        value = f"{self.field} {shown if self.value is not None else ''}".strip()
        line = ": ".join(part for part in (self.file, entry, " ".join(filter(None, (value, self.note)))) if part)
        return " ".join(line.split())


@dataclass
class Problems:
    """What was found: the number of cases of every check, and the first few of them."""

    examples: int  # how many cases of a check are kept
    counts: dict[str, Counter[str]] = field(default_factory=dict)  # check, then split
    found: dict[str, list[Problem]] = field(default_factory=dict)

    def add(self, check: str, split: str, file: object, **rest: Any) -> None:
        """One case; the other fields are those of `Problem`."""
        self.add_rows(check, split, [0], lambda _: {"file": file, **rest})

    def add_rows(self, check: str, split: str, rows: Any, describe: Callable[[Any], dict[str, Any]]) -> None:
        """A case for every row (of a sequence or array), described by the fields of `Problem` if it is a first one."""
        assert check in CHECKS, check
        if not len(rows):
            return
        self.counts.setdefault(check, Counter())[split] += len(rows)
        kept = self.found.setdefault(check, [])
        first = rows[: max(self.examples - len(kept), 0)]
        for row in first.tolist() if hasattr(first, "tolist") else first:
            fields = describe(row)
            fields = {
                key: _text(value, LINE) if key in ("file", "note") else plain(value) for key, value in fields.items()
            }
            kept.append(Problem(split, **fields))

    def count(self, severity: Severity) -> int:
        """Number of cases of all checks of a severity."""
        return sum(counts.total() for name, counts in self.counts.items() if CHECKS[name].severity == severity)

    def names(self) -> list[str]:
        """The checks that found something: errors first, then in the order of the table."""
        return [n for s in ("error", "warning") for n in CHECKS if n in self.counts and CHECKS[n].severity == s]

    def to_json(self) -> list[dict[str, Any]]:
        """Every check that found something, as plain values."""
        return [
            {
                **CHECKS[name]._asdict(),
                "count": self.counts[name].total(),
                "splits": {split: count for split, count in self.counts[name].items() if split},
                "examples": [asdict(problem) for problem in self.found[name]],
            }
            for name in self.names()
        ]


def plain(value: Any) -> Any:
    """A value of a hostile file as something that is short, printable and JSON."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**64 else _text(value, SHOWN)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple) and len(value) <= 8 and not any(isinstance(v, list | dict) for v in value):
        return [plain(part) for part in value]
    return _text(value if isinstance(value, str) else repr(value), SHOWN)


def _text(value: object, length: int) -> str:
    """At most so many printable letters."""
    text = str(value) if not isinstance(value, int) or abs(value) < 2**64 else hex(value)
    text = text.encode("utf-8", "backslashreplace").decode()
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return text if len(text) <= length else text[: length - 3] + "..."


def check_table() -> str:
    """The checks as Markdown tables, one of each group."""
    return "\n\n".join(f"{title}:\n\n{_group_table(group)}" for title, group in GROUPS.items())


def _group_table(group: tuple[Check, ...]) -> str:
    rows = [
        f"| `{check.name}` | {check.severity} | {check.meaning} | {check.repair or 'left as it is'} |"
        for check in group
    ]
    return "\n".join(["| check | | what is found | in the repaired copy |", "|---|---|---|---|", *rows])
