"""PASCAL VOC folders: which lists become which split, what a box is, and what is refused."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from core.data import voc
from core.data.parse import open_annotations
from core.data.sources import DataSource, open_data
from core.data.table import Category, NoImages, Table
from core.data.transforms import corner_boxes
from core.data.voc import VOC_CLASSES, Annotation, corners_to_xywh, read_annotation
from core.errors import UserError
from core.geometry import LEGACY, MODERN
from tests.core.data.test_commands import command
from tests.core.voc_folder import Thing, write_year, xml_text

DOG = Thing("dog", (1, 1, 10, 20))
HARD_CAT = Thing("cat", (11, 6, 40, 35), difficult=1)
CELL = Thing("cell", (5, 6, 9, 11))


def names(table: Table) -> list[str]:
    return [table.name(row) for row in range(len(table))]


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """Two years with two and one images for training, and a test list for 2007 only."""
    images = {"000001": [DOG], "000005": [DOG, HARD_CAT], "000012": []}
    lists = {"train": ["000005"], "val": ["000012"], "trainval": ["000005", "000012"], "test": ["000001"]}
    write_year(tmp_path / "VOCdevkit" / "VOC2007", images, lists)
    lists = {"train": ["2007_000027"], "val": ["2008_000002"], "trainval": ["2007_000027", "2008_000002"]}
    images = {"2007_000027": [Thing("person", (1, 1, 64, 48))], "2008_000002": [Thing("tvmonitor", (2, 3, 5, 5))]}
    write_year(tmp_path / "VOCdevkit" / "VOC2012", images, {**lists, "test": ["2008_000001"]})
    return tmp_path / "VOCdevkit"


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    """A single year's folder with own classes."""
    images = {"a 1": [CELL, DOG], "b": [], "c": [CELL], "d": [CELL]}
    return write_year(tmp_path / "cells", images, {"train": ["c", "a 1"], "val": ["b"], "test": ["d"]})


def test_devkit(devkit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = open_data(str(devkit))
    assert data.name == "VOC07+12"
    years = ["VOC2007/JPEGImages/000005.jpg", "VOC2007/JPEGImages/000012.jpg"]
    years += ["VOC2012/JPEGImages/2007_000027.jpg", "VOC2012/JPEGImages/2008_000002.jpg"]
    assert names(data.train) == years
    assert names(data.val) == names(data.split("test")) == ["VOC2007/JPEGImages/000001.jpg"]
    assert data.train.image_ids.tolist() == [5, 12, 2007000027, 2008000002]
    assert data.categories == tuple(Category(i, name) for i, name in enumerate(VOC_CLASSES, start=1))
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)
    assert len(VOC_CLASSES) == 20
    found = [data.categories[label].name for label in data.train.labels]
    assert found == ["dog", "cat", "person", "tvmonitor"]
    assert data.train.difficult.tolist() == [False, True, False, False]
    assert not data.train.crowd.any()
    assert data.train.protocol == "voc"
    assert data.train.annotation_ids.tolist() == [1, 2, 3, 4]
    assert data.train.read_image(3).shape == (48, 64, 3)
    assert data.licence == "images from flickr"
    assert "val is VOC2007 test too" in capsys.readouterr().err


def test_devkit_parts(devkit: Path) -> None:
    (devkit / "VOC2007/ImageSets/Main/test.txt").unlink()
    data = open_data(str(devkit))
    assert data.name == "VOC07+12-train"
    assert data.test is None
    assert (data.train.image_ids.tolist(), data.val.image_ids.tolist()) == ([5, 2007000027], [12, 2008000002])
    (devkit / "VOC2007").rename(devkit / "elsewhere")
    assert open_data(str(devkit)).name == "VOC12-train"
    assert open_data(str(devkit / "VOC2012")).val.image_ids.tolist() == [2008000002]
    with pytest.raises(UserError, match="data VOC2012 has no split test"):  # a list without any annotation
        open_data(str(devkit / "VOC2012")).split("test")


def test_single_year(cells: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = open_data(str(cells))
    assert data.name == "cells"
    assert capsys.readouterr().err == ""
    assert data.categories == (Category(1, "cell"), Category(2, "dog"))  # of all splits, also where one lacks them
    assert names(data.train) == ["c.jpg", "a 1.jpg"]
    assert [table.image_ids.tolist() for table in data.tables.values()] == [[3, 1], [2], [4]]
    assert data.train.box_offsets.tolist() == [0, 1, 3]
    assert len(data.val.boxes_xywh) == 0
    for split in ("train", "val"):
        (cells / f"ImageSets/Main/{split}.txt").unlink()
    (cells / "ImageSets/Main/trainval.txt").write_text("b\n\nc\n")
    data = open_data(str(cells))
    assert (names(data.train), names(data.val), names(data.split("test"))) == (["b.jpg", "c.jpg"], ["d.jpg"], ["d.jpg"])
    assert "val is test too" in capsys.readouterr().err


def test_corners_by_hand() -> None:
    corners = np.array([[1.0, 1, 10, 20], [3, 4, 4, 6]])  # columns 1 to 10, rows 1 to 20: 10 x 20 pixels
    boxes = corners_to_xywh(corners, one_based=True)
    assert boxes.tolist() == [[0, 0, 10, 20], [2, 3, 2, 3]]
    assert corner_boxes(boxes, MODERN).tolist() == [[0, 0, 10, 20], [2, 3, 4, 6]]
    assert corner_boxes(boxes, LEGACY).tolist() == [[0, 0, 9, 19], [2, 3, 3, 5]]  # pixels counted from 0
    assert corners_to_xywh(corners, one_based=False).tolist() == [[1, 1, 9, 19], [3, 4, 1, 2]]


def test_counted_from_0(cells: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert open_data(str(cells)).train.boxes_xywh[0].tolist() == [4, 5, 5, 6]
    assert open_data(str(cells), voc_one_based=False).train.boxes_xywh[0].tolist() == [5, 6, 4, 5]
    (cells / "Annotations/c.xml").write_text(xml_text("c.jpg", [Thing("cell", (0, 6, 9, 11))]))
    open_data(str(cells))
    assert "train: 1 box begins before the first pixel" in capsys.readouterr().err
    open_data(str(cells), voc_one_based=False)
    assert capsys.readouterr().err == ""


def test_boxes_without_extent_are_dropped(cells: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = [Thing("cell", (7, 6, 7, 9)), CELL, Thing("cell", (7, 6, 8, 6))]
    (cells / "Annotations/c.xml").write_text(xml_text("c.jpg", flat))
    assert len(open_data(str(cells)).train.boxes_xywh) == 3
    line = capsys.readouterr().err
    assert "train: 2 boxes without extent dropped; the first is c.xml, object 1 (cell), bndbox [7, 6, 7, 9]" in line
    assert line.count("\n") == 1


def test_the_cache_knows_every_file(cells: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    read = voc.read_annotation

    def counted(path: Path) -> Annotation:
        reads.append(path)
        return read(path)

    monkeypatch.setattr(voc, "read_annotation", counted)
    before = open_data(str(cells))
    assert len(reads) == 4  # each once for three splits
    again = open_data(str(cells))
    assert len(reads) == 4
    assert again.fingerprint == before.fingerprint
    path = cells / "Annotations/d.xml"
    path.write_text(path.read_text().replace("<xmin>5<", "<xmin>4<"))  # same size, so only the time tells
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    assert open_data(str(cells)).split("test").boxes_xywh.tolist() == [[3, 5, 6, 6]]
    assert len(reads) == 8
    (cells / "ImageSets/Main/val.txt").write_text("b\na 1\n")
    assert len(open_data(str(cells), splits=("val",)).val) == 2


def test_difficult_travels_through_the_cache(devkit: Path) -> None:
    first, again = (open_data(str(devkit), splits=("train",)).train for _ in range(2))
    assert again.cache is not None
    assert again.difficult.tolist() == first.difficult.tolist() == [False, True, False, False]
    assert (again.protocol, again.digest) == ("voc", first.digest)


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("<annotation>", "<!DOCTYPE a [<!ENTITY b 'c'>]><annotation>", "c.xml: has a <!DOCTYPE declaration"),
        ("<annotation>", "<?xml version='1.0' encoding='utf-16'?><!ENTITY b 'c'>", "has a <!ENTITY declaration"),
        ("cell</name>", "&b;</name>", "c.xml: no valid XML (undefined entity"),
        ("</annotation>", "", "c.xml: no valid XML ("),
        ("annotation>", "annotations>", "its outermost element is 'annotations', not 'annotation'"),
        ("<filename>c.jpg</filename>", "", "c.xml: lacks filename"),
        ("c.jpg", "../c.jpg", "c.xml: filename '../c.jpg' must be the name of a file in JPEGImages"),
        ("c.jpg", "/etc/passwd", "c.xml: filename '/etc/passwd' must be"),
        ("<width>64</width>", "", "c.xml: size lacks width"),
        ("<width>64</width>", "<width>6.4</width>", "c.xml: size: width is '6.4', no whole number from 1 to"),
        ("<height>48</height>", "<height>0</height>", "c.xml: size: height is '0', no whole number"),
        ("<height>48<", f"<height>{'9' * 5000}<", "c.xml: size: height is '9999"),
        ("size>", "sizes>", "c.xml: lacks size"),
        ("<name>cell</name>", "<name> </name>", "c.xml: object 1: lacks name"),
        ("bndbox>", "box>", "c.xml: object 1 (cell): lacks bndbox"),
        ("<xmax>9</xmax>", "", "c.xml: object 1 (cell): bndbox lacks xmax"),
        ("<xmax>9</xmax>", "<xmax>nan</xmax>", "c.xml: object 1 (cell): xmax is 'nan', no number of pixels"),
        ("<xmax>9</xmax>", "<xmax>1e99</xmax>", "c.xml: object 1 (cell): xmax is '1e99', no number of pixels"),
        ("<xmax>9</xmax>", "<xmax>nine</xmax>", "c.xml: object 1 (cell): xmax is 'nine', no number of pixels"),
        ("<xmax>9</xmax>", "<xmax>2</xmax>", "object 1 (cell): bndbox [5, 6, 2, 11] (xmin, ymin, xmax, ymax) ends"),
        ("<ymin>6</ymin><xmax>9</xmax><ymax>11<", "<ymin>60</ymin><xmax>9</xmax><ymax>70<", "lies outside its image"),
        ("<difficult>0<", "<difficult>maybe<", "c.xml: object 1 (cell): difficult is 'maybe', neither 0 nor 1"),
    ],
)  # fmt: skip
def test_bad_xml_is_one_line(cells: Path, old: str, new: str, part: str) -> None:
    path = cells / "Annotations/c.xml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError) as caught:
        open_data(str(cells))
    assert str(path) in str(caught.value)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 200


def test_no_encoding_hides_a_declaration(cells: Path) -> None:
    path = cells / "Annotations/c.xml"
    for raw in (path.read_text().encode("utf-16"), b"\xff\xfe\x00", path.read_bytes() + b"\xe9"):
        path.write_bytes(raw)
        with pytest.raises(UserError, match=r"c.xml: is not UTF-8 text"):
            read_annotation(path)


def test_files_that_are_not_there(cells: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cells / "ImageSets/Main/train.txt"
    for text, part in [
        ("c\n../c\n", "train.txt: name 2 is '../c'; it must be a file name without folder and suffix"),
        ("c\nnowhere\n", "nowhere.xml: No such file or directory, but a list in ImageSets/Main names it"),
        ("c\nb\nc\n", "train.txt: lists 'c' twice"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=part):
            open_data(str(cells))
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"train.txt: cannot be read as a list of image names"):
        open_data(str(cells))
    path.write_text("c\n")
    monkeypatch.setattr(voc, "MAX_BYTES", 100)
    with pytest.raises(UserError, match=r"has \d+ bytes, no annotation file has more"):
        open_data(str(cells))
    for name in ("train", "val", "test"):
        (cells / f"ImageSets/Main/{name}.txt").unlink()
    with pytest.raises(UserError, match="has no list of images with annotations"):
        open_data(str(cells))


def test_check(cells: Path) -> None:
    code, out, errors = command("check", cells)
    assert (code, errors) == (0, [])
    assert "train: 2 images (0 without boxes), 3 boxes, 0 of them difficult; small 3" in out
    text = (cells / "Annotations/d.xml").read_text()
    (cells / "Annotations/d.xml").write_text(text.replace("<width>64", "<width>65"))
    (cells / "JPEGImages/b.jpg").unlink()
    code, out, errors = command("check", cells)
    found = [line.rpartition("JPEGImages/")[2] for line in out.splitlines() if "JPEGImages/" in line]
    assert code == 2
    assert [(line.split(":")[0], line.rpartition(": ")[2]) for line in found] == [
        ("b.jpg", "is not there"),
        ("d.jpg", "size '64x48' but the annotation says 65x48"),
    ]


def test_the_2014_names_of_coco(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_minival2014.json").write_text("{}")
    with pytest.raises(UserError, match=r"minival2014 are those of val2017; get instances_{train,val}2017.json"):
        open_data(str(tmp_path))


@pytest.fixture(scope="module")
def blood(shared: Path) -> Path:
    return shared / "data" / "bccd"


def boxes_by_image(table: Table) -> dict[str, list[tuple[str, float, float, float, float]]]:
    """Class, left, top, right and bottom of an image's boxes, in order."""
    return {
        Path(table.name(row)).name: [
            (table.categories[label].name, x, y, x + w, y + h)
            for label, (x, y, w, h) in zip(
                table.labels[table.box_slice(row)], table.boxes_xywh[table.box_slice(row)].tolist(), strict=True
            )
        ]
        for row in range(len(table))
    }


@pytest.mark.parametrize("one_based", [True, False])
def test_blood_cells_equal_their_json(blood: Path, one_based: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """BCCD's JSON was written with x = xmin and width = xmax - xmin: by VOC's rule a box begins one pixel earlier."""
    data: DataSource = open_data(str(blood / "VOC"), voc_one_based=one_based)
    lines = capsys.readouterr().err
    assert "BloodImage_00343.xml, object 4 (RBC)" in lines
    assert "BloodImage_00338.xml, object 13 (RBC)" in lines
    for split, (images, boxes) in {"train": (205, 2804), "val": (87, 1137), "test": (72, 945)}.items():
        table = data.split(split)
        expected = open_annotations(blood / "annotations" / f"instances_{split}.json", NoImages())
        assert (len(table), len(table.labels)) == (images, boxes)
        assert sorted(table.image_ids) == sorted(expected.image_ids)
        shift = float(one_based)
        shifted = {
            name: [(kind, x - shift, y - shift, right, bottom) for kind, x, y, right, bottom in some]
            for name, some in boxes_by_image(expected).items()
        }
        assert boxes_by_image(table) == shifted
    assert [category.name for category in data.categories] == ["Platelets", "RBC", "WBC"]
    counts = np.bincount(np.concatenate([table.labels for table in data.tables.values()]))
    assert counts.tolist() == [361, 4153, 372]


def test_many_files_are_quick(tmp_path: Path) -> None:
    """VOC07+12 has 21,503 of them; 2,000 stay in a second or two even on a busy machine."""
    images = {f"{number:06}": xml_text(f"{number:06}.jpg", [DOG, HARD_CAT, DOG]) for number in range(2000)}
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / part).mkdir(parents=True)
    for name, text in images.items():
        (tmp_path / "Annotations" / f"{name}.xml").write_text(text)
    (tmp_path / "ImageSets/Main/train.txt").write_text("\n".join(images))
    begin = time.process_time()
    assert len(open_data(str(tmp_path)).train.labels) == 6000
    assert time.process_time() - begin < 4
    begin = time.process_time()
    assert len(json.dumps(open_data(str(tmp_path)).train.image_ids.tolist())) > 2000
    assert time.process_time() - begin < 1
