"""Annotation files: what is read, and one line for everything that cannot be trusted."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.data import parse
from core.data.parse import parse_coco
from core.data.table import Category, NoImages, Table
from core.errors import UserError


def parsed(tmp_path: Path, content: Any) -> Table:
    path = tmp_path / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return parse_coco(path, NoImages())


def test_small_file_by_hand(tmp_path: Path, content: dict[str, Any]) -> None:
    table = parsed(tmp_path, content)
    assert table.categories == (Category(2, "cat"), Category(90, "kite"))  # by id, whatever the file's order
    assert table.image_ids.tolist() == [30, 10, 20]
    assert [table.name(i) for i in range(3)] == ["a.png", "sub/b.png", "c.png"]
    assert table.heights.tolist() == [48, 64, 48]
    assert table.box_offsets.tolist() == [0, 1, 3, 3]
    assert table.annotation_ids.tolist() == [3, 7, 5]  # by image, then in the file's order
    assert table.labels.tolist() == [0, 1, 0]
    assert table.crowd.tolist() == [True, False, False]
    assert table.boxes_xywh.tolist() == [[0, 0, 64, 48], [5, 6, 7.5, 8], [1, 2, 3, 4]]
    assert table.areas.tolist() == [64 * 48, 11.5, 12]  # width * height where the file has no area
    assert table.licence == "image licences: Attribution License"


def test_no_annotations_is_fine(tmp_path: Path, content: dict[str, Any]) -> None:
    table = parsed(tmp_path, content | {"annotations": []})
    assert table.box_offsets.tolist() == [0, 0, 0, 0]
    assert table.boxes_xywh.shape == (0, 4)


def edited(content: dict[str, Any], where: str, **changes: Any) -> dict[str, Any]:
    """A copy of `content` whose second entry of a list has other values; None removes a field."""
    result = copy.deepcopy(content)
    entry = result[where][1]
    for key, value in changes.items():
        entry[key] = value
        if value is None:
            del entry[key]
    return result


HOSTILE: list[tuple[str, dict[str, Any], str]] = [
    ("annotations", {"bbox": [1, math.nan, 3, 4]}, r"annotation 3: bbox \[1.0, nan, 3.0, 4.0\] is not finite"),
    ("annotations", {"bbox": [1, math.inf, 3, 4]}, r"annotation 3: bbox \[1.0, inf"),
    ("annotations", {"area": math.nan}, "annotation 3: area nan"),
    ("annotations", {"area": -1}, r"annotation 3: area -1.0 is no area"),
    ("annotations", {"bbox": [1, 2, -3, 4]}, r"annotation 3: bbox \[1.0, 2.0, -3.0, 4.0\] .*negative side"),
    ("annotations", {"bbox": [1, 2, 0, 4]}, r"annotation 3: bbox \[1.0, 2.0, 0.0, 4.0\] .*no area"),
    ("annotations", {"bbox": [64, 2, 3, 4]}, r"annotation 3: bbox \[64.0, 2.0, 3.0, 4.0\] lies outside"),
    ("annotations", {"bbox": [-5, 2, 5, 4]}, r"annotation 3: bbox .* lies outside"),
    ("annotations", {"bbox": [1e300, 2, 3, 4]}, r"annotation 3: bbox \[1e\+300"),
    ("annotations", {"bbox": [1, 2, 3]}, r"annotation 3: bbox is \[1, 2, 3\] \(expected `array` of length 4"),
    ("annotations", {"bbox": "1 2 3 4"}, "annotation 3: bbox is '1 2 3 4'"),
    ("annotations", {"bbox": [1, "2", 3, 4]}, r"annotation 3: bbox is \[1, '2', 3, 4\]"),
    ("annotations", {"bbox": None}, "annotation 3: .*missing required field `bbox`"),
    ("annotations", {"id": 7}, "annotation 7: id 7 is used twice"),
    ("annotations", {"id": "x"}, "annotation 'x': id is 'x'"),
    ("annotations", {"id": None}, "annotation entry number 2: .*missing required field `id`"),
    ("annotations", {"id": 2**70}, "annotation 1180591620717411303424: id is .*beyond 64 bits"),
    ("annotations", {"image_id": 11}, "annotation 3: image_id 11 is unknown"),
    ("annotations", {"image_id": 10.5}, "annotation 3: image_id is 10.5"),
    ("annotations", {"category_id": 1}, "annotation 3: category_id 1 is unknown"),
    ("annotations", {"iscrowd": 2}, "annotation 3: iscrowd 2"),
    ("images", {"id": 30}, "image 30: id 30 is used twice"),
    ("images", {"height": 0}, "image 10: height 0 is not from 1"),
    ("images", {"width": -3}, "image 10: width -3 is not from 1"),
    ("images", {"width": 10**9}, "image 10: width 1000000000 is not from 1"),
    ("images", {"width": "40"}, "image 10: width is '40'"),
    ("images", {"file_name": "/etc/passwd"}, "image 10: file_name '/etc/passwd' must be a relative path"),
    ("images", {"file_name": "../b.png"}, "image 10: file_name"),
    ("images", {"file_name": "x/../../b.png"}, "image 10: file_name"),
    ("images", {"file_name": "x/.."}, "image 10: file_name"),
    ("images", {"file_name": "..\\b.png"}, "image 10: file_name"),
    ("images", {"file_name": "C:/b.png"}, "image 10: file_name"),
    ("images", {"file_name": "b\0.png"}, "image 10: file_name"),
    ("images", {"file_name": "b\n.png"}, "image 10: file_name"),
    ("images", {"file_name": ""}, "image 10: file_name"),
    ("images", {"file_name": 5}, "image 10: file_name is 5"),
    ("categories", {"id": 90}, "category 90: the id is used for 'kite', 'cat'"),
    ("categories", {"id": 2**64}, "category 'cat': id is 18446744073709551616"),
    ("categories", {"name": 5}, "category 2: name is 5"),
]


@pytest.mark.parametrize(("where", "changes", "line"), HOSTILE)
def test_hostile_entries(
    tmp_path: Path, content: dict[str, Any], where: str, changes: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError, match=line) as caught:
        parsed(tmp_path, edited(content, where, **changes))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "instances.json"))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "cannot be read"),
        ("{", "no valid JSON"),
        ("[]", "no COCO annotation file"),
        ('{"images": []}', "no COCO annotation file .*`annotations`"),
        ('{"images": 5, "annotations": [], "categories": []}', "image entries must be a list, got 5"),
        ('{"images": {}, "annotations": [], "categories": []}', "image entries must be a list"),
        ('{"images": [], "annotations": [], "categories": []}', "has no categories"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "has no images"),
        ('{"images": [5], "annotations": [], "categories": []}', "image entry number 1: 5"),
        ('{"images": [], "annotations": [' + "[" * 100_000, "no valid JSON .*recursion"),
        ('{"images": [NaN], "annotations": [], "categories": []}', "image entry number 1: nan"),
        ('{"images": NaN', "no valid JSON"),
        ('{"images": [{"id": "\\ud800", "x": NaN}], "annotations": [], "categories": []}', "half a letter of UTF-16"),
        ("\x00\x01", "no valid JSON"),
    ],
)
def test_hostile_files(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        parsed(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "instances.json"
    path.write_bytes(json.dumps(content).encode().replace(b"a.png", b"\xff.png"))
    with pytest.raises(UserError, match="no valid JSON"):
        parse_coco(path, NoImages())


def test_nan_in_a_field_nobody_reads(tmp_path: Path, content: dict[str, Any]) -> None:
    content["annotations"][0]["segmentation"] = [[math.nan]]
    assert len(parsed(tmp_path, content).labels) == 3


def many_boxes(content: dict[str, Any], count: int, bad: int) -> dict[str, Any]:
    good = {"image_id": 30, "category_id": 2, "bbox": [1, 1, 5, 5]}
    boxes = [{"id": i, **good} for i in range(count)]
    for i in range(bad):
        boxes[10 * i]["bbox"] = [1, 1, 0, 5] if i % 2 else [-9, 1, 5, 5]
    return content | {"annotations": boxes}


def test_a_thousandth_of_the_boxes_may_be_empty(tmp_path: Path, content: dict[str, Any]) -> None:
    table = parsed(tmp_path, many_boxes(content, 2000, 2))
    assert len(table.labels) == 1998
    assert table.notes == (
        "2 of 2000 boxes dropped, empty or outside their image; the first is annotation 0, bbox [-9.0, 1.0, 5.0, 5.0]",
    )
    with pytest.raises(UserError, match=r"annotation 10: bbox .* has no area"):
        parsed(tmp_path, many_boxes(content, 2000, 3))
    with pytest.raises(UserError, match="lies outside its image"):
        parsed(tmp_path, many_boxes(content, 999, 1))


@pytest.mark.parametrize("chunk", [1, 7, 100, 1000])
def test_chunks_make_no_difference(
    tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    # borders that are none: in a string and in a nested list
    trap = [{"id": 1}, {"id": 2}, '}, {"id": 4}, {', "]}, {"]
    rng = np.random.default_rng(0)
    boxes = [
        {"x": trap[: i % 5], "id": i, "image_id": 10, "category_id": 90, "bbox": rng.integers(1, 30, 4).tolist()}
        for i in range(60)
    ]
    content |= {"annotations": boxes}
    whole = parsed(tmp_path, content)
    monkeypatch.setattr(parse, "CHUNK", chunk)
    parts = parsed(tmp_path, content)
    assert whole.boxes_xywh.tolist() == [box["bbox"] for box in boxes]
    np.testing.assert_array_equal(parts.boxes_xywh, whole.boxes_xywh)
    np.testing.assert_array_equal(parts.annotation_ids, whole.annotation_ids)
    boxes[50]["bbox"] = [1, 2, 3]
    with pytest.raises(UserError, match=r"annotation 50: bbox is \[1, 2, 3\]"):
        parsed(tmp_path, content)
    del boxes[50]["id"]
    with pytest.raises(UserError, match=r"annotation entry number 51: "):
        parsed(tmp_path, content)


def test_coco_mini(shared: Path) -> None:
    table = parse_coco(shared / "data/coco_mini/annotations/instances_train2017.json", NoImages())
    reference = json.loads(Path(table.source).read_text())
    assert (len(table), len(table.labels), int(table.crowd.sum())) == (160, 1444, 14)
    assert [category.id for category in table.categories] == sorted(c["id"] for c in reference["categories"])
    boxes = {entry["id"]: entry for entry in reference["annotations"]}
    owners = np.repeat(table.image_ids, np.diff(table.box_offsets))
    for row, name in enumerate(table.annotation_ids.tolist()):
        entry = boxes[name]
        assert table.boxes_xywh[row].tolist() == entry["bbox"]
        assert table.categories[table.labels[row]].id == entry["category_id"]
        assert (owners[row], table.areas[row], table.crowd[row]) == (entry["image_id"], entry["area"], entry["iscrowd"])
