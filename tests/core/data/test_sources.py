"""What `--data` may name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from core.data.parse import open_annotations
from core.data.sources import open_data
from core.data.table import Category, NoImages
from core.errors import UserError
from tests.core.data.conftest import write_folder


def test_coco_folder(folder: Path) -> None:
    data = open_data(str(folder))
    assert data.name == "coco"
    assert set(data.tables) == {"train", "val"}
    assert data.test is None
    assert data.categories == (Category(2, "cat"), Category(90, "kite"))
    assert data.licence == "image licences: Attribution License"
    assert data.train.read_image(1).shape == (64, 40, 3)
    with pytest.raises(UserError, match="data coco has no split test, only train, val"):
        data.split("test")


@pytest.mark.parametrize("images", ["{}2017", "images/{}2017"])
def test_places_of_images(tmp_path: Path, content: dict[str, Any], images: str) -> None:
    folder = write_folder(tmp_path / "data", content)
    for split in ("train", "val"):
        target = folder / images.format(split)
        target.parent.mkdir(exist_ok=True)
        (folder / f"{split}2017").rename(target)
    assert open_data(str(folder)).val.read_image(0).shape == (48, 64, 3)


def test_generic_folder(tmp_path: Path, content: dict[str, Any]) -> None:
    folder = write_folder(tmp_path / "data", content, splits=("train", "val", "test"))
    for split in ("train", "val", "test"):
        (folder / f"{split}2017").rename(folder / split)
        (folder / f"annotations/instances_{split}2017.json").rename(folder / f"annotations/instances_{split}.json")
    data = open_data(str(folder))
    assert data.test is not None
    assert data.test.read_image(0).shape == (48, 64, 3)
    assert set(open_data(str(folder), splits=("val",)).tables) == {"val"}


def test_yaml(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "my.yaml"
    entry = {"images": "coco/val2017", "annotations": "coco/annotations/instances_val2017.json"}
    path.write_text(json.dumps({"val": entry, "test": entry}))
    data = open_data(str(path))
    assert data.name == "my"
    assert set(data.tables) == {"val", "test"}
    assert data.val.read_image(0).shape == (48, 64, 3)
    with pytest.raises(UserError, match="has no split train"):
        data.train.read_image(0)


ENTRY = {"images": "coco/val2017", "annotations": "coco/annotations/instances_val2017.json"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (json.dumps({"trian": ENTRY}), "unknown key 'trian'; did you mean 'train'"),
        (json.dumps({"train": {"image": "a", "annotations": "b"}}), "unknown key 'image'; did you mean 'images'"),
        (json.dumps({"train": {"images": "a"}}), "train lacks 'annotations'"),
        (json.dumps({"train": {"images": "a", "annotations": 5}}), "train.annotations must be a path, got 5"),
        (json.dumps({"train": "a"}), "train must be a mapping"),
        (json.dumps({"train": ENTRY | {"images": "nowhere"}}), "nowhere, which is no folder"),
        (json.dumps({"train": ENTRY | {"annotations": "nowhere.json"}}), "nowhere.json: No such file"),
        ("[]", "must hold lines"),
        ("", "names no split"),
        ("{}", "names no split"),
        ("a: [", "line 1: not a YAML file"),
        ("!!python/object/apply:os.system [echo]", "not a YAML file"),
        ("1: 2", "unknown key 1"),
        ("a: " + "[" * 5000, "not a YAML file"),
        ("train: {images: 2026-99-99, annotations: b}", "not a YAML file"),
        ("train: &a {images: b, annotations: c}\nval: *a", "aliases are not allowed"),
        ("train: {images: a, annotations: b}\ntrain: {images: a, annotations: c}", "'train' is set twice"),
        ('train: {images: "a\\0b", annotations: c}', "must be a path"),
        ('train: {images: "\\e[31m", annotations: c}', "must be a path"),
        ("train: 0x" + "f" * 5000, "line 1: not a YAML file of fields: a value of 5,002 characters"),
        ("a: b\n" * 60_000, "has more than 262,144 bytes"),
    ],
)
def test_wrong_yaml(tmp_path: Path, folder: Path, text: str, line: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=line) as caught:
        open_data(str(path))
    assert "\n" not in str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        open_data(str(tmp_path / "coco"))
    line = str(caught.value)
    assert "\n" not in line
    for part in (str(tmp_path / "coco"), "instances_train2017.json", "https://cocodataset.org", "--data shapes"):
        assert part in line
    (tmp_path / "coco").mkdir()
    with pytest.raises(UserError, match="no COCO annotations"):
        open_data(str(tmp_path / "coco"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="no YAML"):
        open_data(str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"nowhere.yaml: no such dataset YAML"):
        open_data(str(tmp_path / "nowhere.yaml"))


def test_categories_must_agree(folder: Path, content: dict[str, Any]) -> None:
    path = folder / "annotations/instances_val2017.json"
    content["categories"][0]["name"] = "dragon"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"categories differ .* id 90 'dragon' instead of id 90 'kite'"):
        open_data(str(folder))
    content["categories"].append({"id": 91, "name": "extra"})
    content["categories"][0]["name"] = "kite"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="3 instead of 2"):
        open_data(str(folder))


def test_fingerprint_follows_the_content(folder: Path, content: dict[str, Any]) -> None:
    before = open_data(str(folder)).fingerprint
    assert open_data(str(folder)).fingerprint == before
    content["annotations"][0]["bbox"][0] += 1
    (folder / "annotations/instances_val2017.json").write_text(json.dumps(content))
    assert open_data(str(folder)).fingerprint != before


def test_dropped_boxes_are_told_once_per_open(
    tmp_path: Path, content: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {"image_id": 30, "category_id": 2, "bbox": [1, 1, 5, 5]}
    content["annotations"] = [{"id": i, **good} for i in range(1000)]
    content["annotations"][4]["bbox"] = [1, 1, 5, 0]
    folder = write_folder(tmp_path / "data", content, splits=("train",))
    for _ in range(2):  # from the file, from the cache
        open_data(str(folder))
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert "1 of 1000 boxes dropped" in lines[0]
    monkeypatch.setenv("RANK", "1")
    open_data(str(folder))
    assert capsys.readouterr().err == ""


def test_bccd(shared: Path) -> None:
    data = open_data(str(shared / "data/bccd.yaml"))
    assert data.test is not None
    assert [len(table.labels) for table in (data.train, data.val, data.test)] == [2804, 1137, 945]
    assert [category.name for category in data.categories] == ["RBC", "WBC", "Platelets"]


def write_image_info(folder: Path, content: dict[str, Any]) -> Path:
    """COCO's test-dev file, which has no annotations, with the first split's images as test2017/."""
    path = folder / "annotations" / "image_info_test-dev2017.json"
    path.write_text(json.dumps({name: part for name, part in content.items() if name != "annotations"}))
    shutil.copytree(folder / "val2017", folder / "test2017")
    return path


def test_test_dev_has_images_and_no_boxes(folder: Path, content: dict[str, Any]) -> None:
    path = write_image_info(folder, content)
    table = open_data(str(folder), splits=("test-dev",)).split("test-dev")
    assert table.image_ids.tolist() == [30, 10, 20]
    assert table.categories == (Category(2, "cat"), Category(90, "kite"))
    assert len(table.boxes_xywh) == 0
    assert table.read_image(0).shape == (48, 64, 3)
    assert set(open_data(str(folder)).tables) == {"train", "val"}  # only where it is asked for
    with pytest.raises(UserError, match="no COCO annotation file"):  # also when the same file is in the cache
        open_annotations(path, NoImages())


def test_test_dev_that_is_not_there(folder: Path, content: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"no split test-dev .*image_info_test-dev2017.json.*cocodataset.org"):
        open_data(str(folder), splits=("test-dev",))
    with pytest.raises(UserError, match="'shapes': has no split test-dev"):
        open_data("shapes", splits=("test-dev",))
    write_image_info(folder, content)
    (folder / "test2017").rename(folder / "elsewhere")
    with pytest.raises(UserError, match=r"test2017, which is no folder"):
        open_data(str(folder), splits=("test-dev",))
