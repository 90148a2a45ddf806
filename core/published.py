"""A method's `results.yaml`: published numbers with their sources, read and checked (imports no torch)."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.config import TrainConfig
from core.configfile import config_from_values, read_mapping
from core.errors import UserError, nearest


class Metric(NamedTuple):
    """How a number is shown."""

    heading: str
    factor: float = 1.0  # from files to tables
    digits: int = 3  # behind the point


METRICS = {  # by key in files
    **{name: Metric(name, 100.0, 1) for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")},
    "VOC07": Metric("VOC07 mAP", 100.0, 1),
    "VOC12": Metric("VOC12 mAP", 100.0, 1),
    "iou_error": Metric("IoU error"),
    "rank_correlation": Metric("rank correlation"),  # of score and IoU, of the most confident predictions of an object
    "top_iou": Metric("IoU of the top 10"),  # of those
    "correct": Metric("correct", digits=0),  # boxes after NMS, as the next two
    "redundant": Metric("redundant", digits=0),
    "error": Metric("error", digits=0),
    # published only: no command measures these
    **{name: Metric(name, 100.0, 1) for name in ("AP60", "AP70", "AP80", "AP85")},
    "FPS": Metric("FPS", digits=1),  # images a second
}
SPLITS = ("train", "val", "test", "test-dev")
UNKNOWN, NONE, FAILS = "unknown", "none", "fails"  # published but not known to us; not published; does not train
ESTIMATE = re.compile(r"[<≈] \d+(\.\d+)?")  # a bound or an approximate number


class Number(NamedTuple):
    """A published number as it is shown, and the letters of its sources."""

    text: str
    sources: tuple[str, ...]


class Row(NamedTuple):
    """One line of a published table and the run that reproduces it."""

    label: str
    preset: str  # empty: no run of this package
    changes: Mapping[Any, Any]  # fields that differ from the preset's
    tta: bool
    values: Mapping[str, Number]  # one for each metric of the table
    note: str


class PublishedTable(NamedTuple):
    """One table of numbers on one split."""

    name: str
    title: str
    split: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str


class Published(NamedTuple):
    """What a method's results.yaml holds."""

    title: str
    images: Mapping[str, int]  # number of images of a split of the papers' data
    sources: Mapping[str, str]  # letter: what it stands for
    tables: tuple[PublishedTable, ...]


def read_published(path: Path, presets: Mapping[str, TrainConfig]) -> Published:
    """A results.yaml, checked.

    Args:
        path: the file.
        presets: the method's named runs; rows may name these only.

    Raises:
        UserError: naming table, row and value of the first mistake.
    """
    content = read_mapping(path, "table of published numbers")
    _check_keys(content, str(path), required=("title", "images", "sources", "tables"))
    sources = {
        str(letter): str(meaning) for letter, meaning in _mapping(content["sources"], f"{path}: sources").items()
    }
    images = _mapping(content["images"], f"{path}: images")
    for split, count in images.items():
        if split not in SPLITS or type(count) is not int:
            raise UserError(f"{path}: images must map splits to numbers of images, got {split!r}: {count!r}")
    tables = [_table(entry, path, sources, presets) for entry in _list(content["tables"], f"{path}: tables")]
    _check_different(f"{path}: tables", [table.name for table in tables])
    return Published(_text(content["title"], f"{path}: title"), images, sources, tuple(tables))


def _table(entry: Any, path: Path, sources: Mapping[str, str], presets: Mapping[str, TrainConfig]) -> PublishedTable:
    where = f"{path}: table {entry.get('name')!r}" if isinstance(entry, dict) else f"{path}: a table"
    entry = _mapping(entry, where)
    _check_keys(entry, where, required=("name", "title", "split", "metrics", "rows"), optional=("note",))
    name, title, split = (_text(entry[key], f"{where}: {key}") for key in ("name", "title", "split"))
    if split not in SPLITS:
        raise UserError(f"{where}: split must be one of {', '.join(SPLITS)}, got {split!r}{nearest(split, SPLITS)}")
    metrics = tuple(_text(metric, f"{where}: metrics") for metric in _list(entry["metrics"], f"{where}: metrics"))
    for metric in metrics:
        if metric not in METRICS:
            raise UserError(f"{where}: unknown metric {metric!r}{nearest(metric, METRICS)}")
    rows = tuple(_row(row, where, metrics, sources, presets) for row in _list(entry["rows"], f"{where}: rows"))
    _check_different(where, [row.label for row in rows])
    return PublishedTable(name, title, split, metrics, rows, _text(entry.get("note", ""), f"{where}: note"))


def _row(
    entry: Any, where: str, metrics: Sequence[str], sources: Mapping[str, str], presets: Mapping[str, TrainConfig]
) -> Row:
    where = f"{where}: row {entry.get('label')!r}" if isinstance(entry, dict) else f"{where}: a row"
    entry = _mapping(entry, where)
    _check_keys(entry, where, required=("label", "values"), optional=("preset", "changes", "tta", "note"))
    label, preset, note = (_text(entry.get(key, ""), f"{where}: {key}") for key in ("label", "preset", "note"))
    if preset and preset not in presets:
        raise UserError(f"{where}: unknown preset {preset!r}{nearest(preset, presets)}")
    tta = entry.get("tta", False)
    if not isinstance(tta, bool):
        raise UserError(f"{where}: tta must be true or false, got {tta!r}")
    changes = _mapping(entry.get("changes", {}), f"{where}: changes")
    if (changes or tta) and not preset:
        raise UserError(f"{where}: changes and tta need a preset")
    values = _mapping(entry["values"], f"{where}: values")
    _check_keys(values, f"{where}: values", required=metrics)
    row = Row(label, preset, changes, tta, {m: _number(values[m], f"{where}: {m}", sources) for m in metrics}, note)
    if changes:
        row_config(row, presets, where)
    return row


def _number(value: Any, where: str, sources: Mapping[str, str]) -> Number:
    if value in (UNKNOWN, NONE):
        return Number(value, ())
    if not isinstance(value, list) or len(value) != 2:
        raise UserError(f"{where} must be [number, source], unknown or none, got {value!r}")
    number, source = value
    if isinstance(number, float | int) and not isinstance(number, bool) and math.isfinite(number):
        text = str(number)
    elif isinstance(number, str) and (number == FAILS or ESTIMATE.fullmatch(number)):
        text = number
    else:
        raise UserError(f"{where}: {number!r} must be a number, `< x`, `≈ x` or {FAILS}")
    letters = tuple(letter.strip() for letter in _text(source, f"{where}: source").split(","))
    for letter in letters:
        if letter not in sources:
            raise UserError(f"{where}: unknown source {letter!r}, there are {', '.join(sources)}")
    return Number(text, letters)


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a mapping, got {value!r}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} must be a list with something in it, got {value!r}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} must be text, got {value!r}; put it in quotes")
    return value


def _check_keys(entry: Mapping[Any, Any], where: str, required: Sequence[str], optional: Sequence[str] = ()) -> None:
    for key in required:
        if key not in entry:
            raise UserError(f"{where} lacks {key}")
    for key in entry:
        if key not in (*required, *optional):
            raise UserError(f"{where} has an unknown key {key!r}{nearest(str(key), (*required, *optional))}")


def _check_different(where: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: {name!r} occurs {names.count(name)} times")


def row_config(row: Row, presets: Mapping[str, TrainConfig], where: str = "") -> TrainConfig:
    """The configuration that a row with a preset was or would be trained and evaluated with.

    Raises:
        UserError: for changes that are no fields or contradict the preset.
    """
    preset = presets[row.preset]
    values = {**dataclasses.asdict(preset), **row.changes}
    return config_from_values(values, type(preset), where or row.label)
