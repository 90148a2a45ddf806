"""A cache folder of its own for every test, and a small sound COCO folder to spoil."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, empty at first."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("ANCHORAGE_CACHE", str(folder))
    return folder


@pytest.fixture
def content() -> dict[str, Any]:
    """Three images (one portrait, one without boxes), three boxes (one crowd), sparse ids."""
    return {
        "info": {},
        "licenses": [{"id": 4, "name": "Attribution License"}],
        "images": [
            {"id": 30, "file_name": "a.png", "height": 48, "width": 64},
            {"id": 10, "file_name": "sub/b.png", "height": 64, "width": 40},
            {"id": 20, "file_name": "c.png", "height": 48, "width": 64},
        ],
        "annotations": [
            {"id": 7, "image_id": 10, "category_id": 90, "bbox": [5, 6, 7.5, 8], "area": 11.5, "iscrowd": 0},
            {"id": 3, "image_id": 30, "category_id": 2, "bbox": [0, 0, 64, 48], "iscrowd": 1},
            {"id": 5, "image_id": 10, "category_id": 2, "bbox": [1, 2, 3, 4], "iscrowd": 0},
        ],
        "categories": [{"id": 90, "name": "kite"}, {"id": 2, "name": "cat"}],
    }


def write_folder(folder: Path, content: dict[str, Any], splits: tuple[str, ...] = ("train", "val")) -> Path:
    """Writes `content` as every split of a COCO folder, with its images where their names allow it."""
    (folder / "annotations").mkdir(parents=True)
    for split in splits:
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
        for i, entry in enumerate(content["images"]):
            path = folder / f"{split}2017" / entry["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 256, (entry["height"], entry["width"], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture
def folder(tmp_path: Path, content: dict[str, Any]) -> Path:
    """A COCO folder with the content above as train and val."""
    return write_folder(tmp_path / "coco", content)
