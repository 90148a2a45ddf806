"""What `--data` may name: a COCO folder, a VOCdevkit or one year of it, a dataset YAML, or the word shapes."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.configfile import read_mapping
from core.data.images import ImageFolder
from core.data.parse import open_annotations
from core.data.table import Category, Table, warn
from core.data.voc import find_voc, open_voc
from core.errors import UserError, nearest, shown
from core.shapes import SPLITS as SHAPES_SPLITS
from core.shapes import shapes_table

SPLITS = ("train", "val", "test")
TEST_DEV = "test-dev"  # COCO's test images, whose annotations are not public: opened only when asked for alone
COCO_HINT = (
    "get COCO 2017 from https://cocodataset.org/#download and unpack annotations/, train2017/ and val2017/ there, "
    "or try --data shapes"
)
COCO_2014_HINT = (
    "trainval35k (train2014 and valminusminival2014) are the images of train2017, minival2014 are those of val2017; "
    "get instances_{train,val}2017.json from annotations_trainval2017.zip at https://cocodataset.org/#download"
)


@dataclass(frozen=True)
class DataSource:
    """An opened data set: one table per split, equal categories in all of them."""

    name: str  # short: names run folders
    tables: Mapping[str, Table]  # by split
    fingerprint: str  # SHA-256 over the content of all opened splits
    licence: str  # what the annotation files say about rights; empty if nothing

    @property
    def categories(self) -> tuple[Category, ...]:
        """The classes by label."""
        return next(iter(self.tables.values())).categories

    @property
    def train(self) -> Table:
        """The split to learn from. UserError if the data set has none."""
        return self.split("train")

    @property
    def val(self) -> Table:
        """The split that chooses the best model. UserError if the data set has none."""
        return self.split("val")

    @property
    def test(self) -> Table | None:
        """The split that is only reported, if there is one."""
        return self.tables.get("test")

    def split(self, name: str) -> Table:
        """A split by name. UserError if the data set lacks it."""
        if name not in self.tables:
            raise UserError(f"data {self.name} has no split {name}, only {', '.join(self.tables)}")
        return self.tables[name]


def open_data(spec: str, seed: int = 0, splits: tuple[str, ...] = SPLITS, *, voc_one_based: bool = True) -> DataSource:
    """Opens a data set; nothing is downloaded.

    Args:
        spec: the word shapes, a dataset YAML, a COCO folder, or a VOC folder (`core.data.voc`).
        seed: of the drawn shapes.
        splits: which splits to open, of those that exist; or test-dev of a COCO folder, whose table has no boxes.
        voc_one_based: corners of a VOC folder count pixels from 1 and belong to the box.

    Raises:
        UserError: nothing there, or an annotation file that cannot be trusted.
    """
    if splits == (TEST_DEV,):
        return _source(Path(spec).expanduser().resolve().name, {TEST_DEV: open_test_dev(Path(spec).expanduser())})
    if spec == "shapes":
        tables = {name: shapes_table(name, count, seed) for name, count in SHAPES_SPLITS.items() if name in splits}
        return _source("shapes", tables)
    path = Path(spec).expanduser()
    wanted = [name for name in SPLITS if name in splits]
    if voc := find_voc(path):
        name, there = voc.name, tuple(voc.lists)
        tables = open_voc(voc, wanted, one_based=voc_one_based)
    else:
        files = data_files(path)
        name, there = path.stem if path.is_file() else path.resolve().name, tuple(files)
        tables = {split: open_split(*files[split]) for split in wanted if split in files}
    if not tables:
        raise UserError(f"{path}: has no split {' or '.join(splits)}, only {', '.join(there)}")
    return _source(name, tables)


def split_names(spec: str) -> tuple[str, ...]:
    """The splits that a data set has. UserError if it is none."""
    if spec == "shapes":
        return SPLITS
    path = Path(spec).expanduser()
    voc = find_voc(path)
    return tuple(voc.lists if voc else data_files(path))


def data_files(path: Path) -> dict[str, tuple[Path, Path]]:
    """Image folder and annotation file of every split of a COCO folder or dataset YAML. UserError if it is neither."""
    return yaml_files(path) if path.suffix in (".yaml", ".yml") else coco_files(path)


def open_split(images: Path, annotations: Path) -> Table:
    """The table of one annotation file and its folder of images. UserError if either is missing or bad."""
    table = open_annotations(annotations, ImageFolder(images))
    if not images.is_dir():
        raise UserError(f"{annotations}: its images are looked for in {images}, which is no folder")
    for note in table.notes:
        warn(f"{annotations}: {note}")
    return table


def open_test_dev(folder: Path) -> Table:
    """Images and categories of COCO test-dev: annotations/image_info_test-dev2017.json with test2017/. No boxes.

    Raises:
        UserError: not a COCO folder, or without these.
    """
    annotations = folder / "annotations" / f"image_info_{TEST_DEV}2017.json"
    if not annotations.is_file():
        hint = "get image_info_test2017.zip and test2017.zip from https://cocodataset.org/#download"
        raise UserError(f"data {str(folder)!r}: has no split {TEST_DEV} (looked for {annotations}); {hint}")
    places = [folder / "test2017", folder / "images" / "test2017"]
    images = next((place for place in places if place.is_dir()), None)
    if images is None:
        raise UserError(f"{annotations}: its images are looked for in {places[0]}, which is no folder")
    return open_annotations(annotations, ImageFolder(images), annotated=False)


def _source(name: str, tables: dict[str, Table]) -> DataSource:
    first, *others = tables.values()
    for other in others:
        if other.categories != first.categories:
            raise UserError(f"{other.source}: categories differ from {first.source}: {_difference(first, other)}")
    digest = hashlib.sha256("".join(f"{split} {table.digest}\n" for split, table in tables.items()).encode())
    licences = dict.fromkeys(table.licence for table in tables.values() if table.licence)
    return DataSource(name, tables, digest.hexdigest(), "; ".join(licences))


def _difference(first: Table, other: Table) -> str:
    """The first category in which two tables differ."""
    for a, b in zip(first.categories, other.categories, strict=False):
        if a != b:
            return f"id {b.id} {b.name!r} instead of id {a.id} {a.name!r}"
    return f"{len(other.categories)} instead of {len(first.categories)}"


def coco_files(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Image folder and annotation file of every split that a COCO folder has.

    Annotations are annotations/instances_<split>2017.json or annotations/instances_<split>.json, images in
    <split>2017/, images/<split>2017/, <split>/, images/<split>/ or images/.
    """
    files = {}
    for split in SPLITS:
        for name in (f"{split}2017", split):
            annotations = folder / "annotations" / f"instances_{name}.json"
            if annotations.is_file():
                places = [folder / name, folder / "images" / name, folder / "images"]
                files[split] = (next((place for place in places if place.is_dir()), places[0]), annotations)
                break
    if not files:
        looked = "annotations/instances_train2017.json, annotations/instances_train.json and VOC's ImageSets/Main"
        what = "no COCO annotations" if folder.is_dir() else "no such folder" if not folder.exists() else "no YAML"
        hint = COCO_2014_HINT if any((folder / "annotations").glob("instances_*2014.json")) else COCO_HINT
        raise UserError(f"data {str(folder)!r}: {what} (looked for {looked} in {folder.absolute()}); {hint}")
    return files


def yaml_files(path: Path) -> dict[str, tuple[Path, Path]]:
    """Image folder and annotation file of every split that a dataset YAML names, relative to the YAML."""
    content = read_mapping(path, "dataset YAML")
    if not content:
        raise UserError(f"{path}: names no split; expected train, val and perhaps test")
    return {split: yaml_entry(path, split, entry) for split, entry in content.items()}


def yaml_entry(path: Path, split: Any, entry: Any) -> tuple[Path, Path]:
    """Image folder and annotation file of one split of a dataset YAML. UserError if it is not of that form."""
    _check_keys(path, "dataset", {split: entry}, SPLITS, required=())
    _check_keys(path, split, entry, ("images", "annotations"), required=("images", "annotations"))
    return path.parent / entry["images"], path.parent / entry["annotations"]


def _check_keys(path: Path, where: str, entry: Any, known: tuple[str, ...], required: tuple[str, ...]) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{path}: {where} must be a mapping with {', '.join(known)}, got {shown(entry)}")
    for key, value in entry.items():
        if key not in known:
            raise UserError(f"{path}: {where} has an unknown key {shown(key)}{nearest(str(key), known)}")
        if required and not (isinstance(value, str) and value.isprintable()):
            raise UserError(f"{path}: {where}.{key} must be a path, got {shown(value)}")
    for key in required:
        if key not in entry:
            raise UserError(f"{path}: {where} lacks {key!r}")
