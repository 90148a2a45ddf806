"""From the words of a command line to rows of a data set, and from the network's pixels to the file's."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from core.config import PyramidConfig
from core.data.table import Table, pack_names
from core.decisions import Decision, level_maps
from core.errors import UserError
from core.shapes import CATEGORIES, shapes_table
from core.types import Targets
from core.visualize import Shown, explain_image, image_batch, named_rows, record, run_pictures, to_file_pixels

CONFIG = PyramidConfig(steps=1, short_side=64, long_side=96, data="shapes", device="cpu")


def table(*names: str) -> Table:
    offsets, text = pack_names(list(names))
    drawn = shapes_table("val", len(names), 0)
    return dataclasses.replace(drawn, name_offsets=offsets, name_bytes=text, image_ids=np.arange(len(names)) + 40)


def everything(outputs: torch.Tensor, targets: Targets, config: PyramidConfig) -> list[list[Decision]]:
    """One positive anchor for each object, with the object's own box."""
    return [
        [
            Decision(
                box.numpy().astype(float),
                int(label),
                np.array([0.5]),
                np.array([0]),
                np.array([4]),
                box.numpy()[None, :2].astype(float),
                box.numpy()[None].astype(float),
                np.array([1.0]),
                columns={"anchor": np.array([7])},
                facts={"matched_anchors": 3},
            )
            for box, label in zip(boxes[valid], labels[valid], strict=True)
        ]
        for boxes, labels, valid in zip(targets.boxes, targets.labels, targets.valid, strict=True)
    ]


class Nothing(nn.Module):
    """A network whose outputs nobody reads."""

    def forward(self, images: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        return sizes


def test_images_by_name_path_and_id() -> None:
    names = table("a.jpg", "day/b.jpg", "night/b.jpg", "41", "7.jpg")
    assert named_rows(names, ["a.jpg"], "val") == [0]
    assert named_rows(names, ["photos/val/a.jpg", "a.jpg"], "val") == [0]  # each once
    assert named_rows(names, ["night/b.jpg", "/data/day/b.jpg"], "val") == [2, 1]
    assert named_rows(names, ["41", "40", "44"], "val") == [3, 0, 4]  # a name comes before an id


@pytest.mark.parametrize("word", ["c.jpg", "7", "45", "dusk/b.jpg", "", "."])
def test_unknown_image_is_one_line(word: str) -> None:
    with pytest.raises(UserError, match="no image of this name or id in val of x; choose another --split or --data"):
        named_rows(table("a.jpg", "day/b.jpg"), [word], "val of x")


def test_ambiguous_name_is_one_line() -> None:
    with pytest.raises(UserError, match=r"b.jpg: 2 images of val of x have this name \(day/b.jpg, night/b.jpg\)"):
        named_rows(table("day/b.jpg", "night/b.jpg"), ["b.jpg"], "val of x")


def test_boxes_come_back_in_pixels_of_the_file_largest_first() -> None:
    drawn = shapes_table("val", 6, 0)
    for row in range(len(drawn)):
        decisions = explain_image(Nothing(), everything, image_batch(drawn, row, CONFIG), CONFIG)
        xywh = drawn.boxes_xywh[drawn.box_slice(row)]
        expected = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)[
            np.argsort(-xywh[:, 2] * xywh[:, 3])
        ]
        np.testing.assert_allclose([one.box for one in decisions], expected, atol=1e-3)
        np.testing.assert_allclose([one.boxes[0] for one in decisions], expected, atol=1e-3)
        np.testing.assert_allclose([one.centres[0] for one in decisions], expected[:, :2], atol=1e-3)


def test_maps_come_back_in_pixels_of_the_file() -> None:
    """An image twice as wide and three times as high as what the network saw."""
    (one,) = everything(torch.zeros(0), one_target(), CONFIG)[0]
    maps = level_maps({"t": np.arange(4.0)}, ((2, 2),), (8,), centre_offset=0.5)
    (moved,) = to_file_pixels(one._replace(maps=maps), np.array([2.0, 3.0])).maps
    assert (moved.first.tolist(), moved.step.tolist()) == ([8, 12], [16, 24])
    assert moved.values["t"].tolist() == [[0, 1], [2, 3]]
    assert list(to_file_pixels(one, np.array([2.0, 3.0])).maps) == []


def one_target() -> Targets:
    boxes = torch.tensor([[[8.0, 8, 40, 40]]])
    return Targets(boxes, torch.tensor([[1]]), torch.tensor([[True]]), torch.tensor([[64, 96]]))


def test_record_holds_every_candidate() -> None:
    drawn = shapes_table("val", 1, 0)
    decisions = explain_image(Nothing(), everything, image_batch(drawn, 0, CONFIG), CONFIG)
    image = Shown("000001.png", drawn.read_image(0), decisions * 2)  # ten objects
    content = record(1, image, "a.png", CATEGORIES)
    assert [one["shown"] for one in content["objects"]] == [True] * 6 + [False] * 4
    first = content["objects"][0]
    assert first["name"] == CATEGORIES[decisions[0].label].name
    assert first["matched_anchors"] == 3
    assert first["borders"] == []
    (candidate,) = first["candidates"]
    assert candidate["rank"] == 1
    assert candidate["outcome"] == "positive"
    assert candidate["level"] == "P4"
    assert candidate["anchor"] == 7
    assert candidate["box"] == pytest.approx(first["box"])


def test_run_pictures_show_the_same_images_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[list[str]] = []
    monkeypatch.setattr(
        "core.visualize.draw_decisions", lambda path, parts, *rest: rows.append([p.title for p in parts])
    )
    config = dataclasses.replace(CONFIG, out=str(tmp_path / "run"), picture_every=5)
    picture = run_pictures(everything, "score", shapes_table("val", 6, 0), config, torch.device("cpu"))
    assert picture is not None
    picture(Nothing(), 5)
    picture(Nothing(), 10)
    assert rows[0] == rows[1]
    assert [title.split()[0] for title in rows[0]] == ["000001.png"] * 2 + ["000002.png"] + ["000003.png"] * 2


def test_only_the_main_rank_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.distributed.rank", lambda: 1)
    assert run_pictures(everything, "score", shapes_table("val", 1, 0), CONFIG, torch.device("cpu")) is None
