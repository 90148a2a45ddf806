"""What TOOD's pictures say against the assignment itself, the command, and pictures during a run."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from core.anchors import STRIDES, anchor_grid, anchor_strides, level_shapes
from core.decisions import OUTCOMES
from core.errors import UserError
from core.shapes import shapes_table, write_shapes
from core.types import Targets
from tests.runs import read_checkpoint, read_log, tensors_of
from tood_tal.config import SMALL, Config
from tood_tal.explain import explain, pictures_of_run
from tood_tal.losses import learn
from tood_tal.model import Outputs
from tood_tal.train import train

CONFIG = Config(anchor_scale=4.0, topk=5)
TINY = replace(
    SMALL,
    steps=2,  # one in each phase
    batch_size=2,
    backbone_weights="none",
    frozen_stages=0,
    channels=64,
    short_side=64,
    long_side=96,
    anchor_scale=4.0,
    log_every=1,
    device="cpu",
    workers=0,
)


def random_batch(seed: int = 0) -> tuple[Outputs, Targets]:
    """Two images of 96 x 128 with up to three objects; the second one's are fewer, and it has padding.

    Boxes are guesses around objects, several anchors to each of them, so that objects overlap in what they are offered.
    """
    torch.manual_seed(seed)
    grid = anchor_grid(level_shapes((96, 128)), scale=CONFIG.anchor_scale)
    count = len(grid.boxes)
    corners = torch.rand(2, 3, 2) * 40
    boxes = torch.cat([corners, corners + 20 + 50 * torch.rand(2, 3, 2)], dim=-1)
    valid = torch.tensor([[True, True, True], [True, False, False]])
    targets = Targets(boxes, torch.tensor([[0, 3, 1], [2, 0, 0]]), valid, torch.tensor([[96, 128], [64, 90]]))
    guessed = boxes.gather(1, torch.randint(3, (2, count, 1)).expand(-1, -1, 4)) + 6 * torch.randn(2, count, 4)
    return Outputs(torch.rand(2, count, 4), guessed / anchor_strides(grid)[:, None], None, None, grid), targets


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("conflict", ["max_iou", "min_area"])
def test_pictures_show_the_assignment(seed: int, conflict: Literal["max_iou", "min_area"]) -> None:
    config = replace(CONFIG, conflict=conflict)
    outputs, targets = random_batch(seed)
    learned = learn(outputs, targets, by_atss=False, config=config)
    gt_index = learned.assignment.gt_index
    level_of = np.repeat(np.arange(3, 8), outputs.grid.level_sizes)
    explained = explain(outputs, targets, config)
    counts = [len(one.where("positive")) for decisions in explained for one in decisions]
    assert 0 < sum(counts) < sum(len(one.scores) for decisions in explained for one in decisions)
    for image, decisions in enumerate(explained):
        assert len(decisions) == int(targets.valid[image].sum())
        for number, one in enumerate(decisions):
            positive, anchors = one.where("positive"), one.columns["anchor"]
            assert sorted(anchors[positive].tolist()) == (gt_index[image] == number).nonzero().flatten().tolist()
            assert len(one.where("ignored")) == 0
            assert 0 < len(one.scores) <= config.topk
            assert (np.diff(one.scores) <= 0).all()
            assert (one.levels == level_of[anchors]).all()
            np.testing.assert_allclose(one.columns["class_score"] * one.ious**6, one.scores, rtol=1e-4)
            weights = learned.class_targets[image, anchors[positive]].numpy()
            np.testing.assert_array_equal(one.columns["t_hat"][positive], weights)
            assert (one.columns["t_hat"][one.where("negative")] == 0).all()


def test_offered_kept_and_lost_by_hand() -> None:
    """Two equal objects; anchors of P3 at (8, 8), (16, 8) and (24, 8) predict their box exactly, all others nothing.

    Each anchor goes to the first of equals; (24, 8) lies outside.
    """
    grid = anchor_grid(level_shapes((32, 32)), scale=4.0)
    boxes = torch.zeros(1, len(grid.boxes), 4)
    numbers = [5, 6, 7]  # P3 has 4 columns: row 1
    boxes[0, numbers] = torch.tensor([0.0, 0, 20, 16]) / 8
    scores = torch.zeros(1, len(grid.boxes), 2)
    scores[0, numbers, 1] = torch.tensor([0.5, 0.75, 0.25])
    objects = torch.tensor([[[0.0, 0, 20, 16], [0.0, 0, 20, 16]]])
    targets = Targets(objects, torch.tensor([[1, 1]]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([[32, 32]]))
    ((first, second),) = explain(Outputs(scores, boxes, None, None, grid), targets, CONFIG)
    assert first.columns["anchor"].tolist() == [6, 5, 7]
    assert first.scores.tolist() == [0.75, 0.5, 0.25]
    assert [OUTCOMES[code] for code in first.outcomes] == ["positive", "positive", "negative"]
    assert first.ious.tolist() == [1, 1, 1]
    assert first.centres.tolist() == [[16, 8], [8, 8], [24, 8]]
    assert first.boxes[0].tolist() == [0, 0, 20, 16]
    # t / max t * max IoU: 0.5 / 0.75 and 1
    assert first.columns["t_hat"].tolist() == pytest.approx([1, 2 / 3, 0], abs=1e-6)
    assert first.note == "3 anchors of highest t, 2 have their centre inside"
    assert len(second.where("positive")) == 0
    assert second.note == "3 anchors of highest t, 2 have their centre inside, 2 of them lost to other objects"
    assert second.facts == {"offered": 3, "kept": 2}
    assert [level.values["t"].shape for level in first.maps] == [(4, 4), (2, 2), (1, 1), (1, 1), (1, 1)]
    finest = first.maps[0]
    assert (finest.level, finest.first.tolist(), finest.step.tolist()) == (3, [0, 0], [8, 8])
    assert finest.values["score"][1].tolist() == [0, 0.5, 0.75, 0.25]
    assert finest.values["IoU"][1].tolist() == [0, 1, 1, 1]
    assert finest.values["t"].sum() == 1.5
    alone = explain(Outputs(scores, boxes, None, None, grid), targets, replace(CONFIG, atss_share=1.0))[0][0]
    assert alone.note.endswith("; this model learnt by ATSS alone")


@pytest.mark.parametrize("seed", range(2))
def test_maps_hold_every_candidates_numbers(seed: int) -> None:
    outputs, targets = random_batch(seed)
    config = replace(CONFIG, alpha=0.5, beta=2.0)
    for one in (one for decisions in explain(outputs, targets, config) for one in decisions):
        assert [level.level for level in one.maps] == [3, 4, 5, 6, 7]
        for place in range(len(one.scores)):
            level = one.maps[one.levels[place] - 3]
            assert level.step[0] == STRIDES[one.levels[place] - 3]
            column, row = ((one.centres[place] - level.first) / level.step).astype(int)
            assert level.values["t"][row, column] == pytest.approx(one.scores[place], rel=1e-5)
            assert level.values["IoU"][row, column] == pytest.approx(one.ious[place], rel=1e-6)
            assert level.values["score"][row, column] == one.columns["class_score"][place]


def test_object_that_nothing_overlaps() -> None:
    outputs, targets = random_batch()
    far = outputs._replace(boxes=outputs.boxes + 1e4)
    decisions = explain(far, targets, CONFIG)[0]
    assert [len(one.scores) for one in decisions] == [0, 0, 0]
    assert decisions[0].note == "no prediction of this class overlaps the object: t is 0 everywhere, it teaches nothing"
    empty = Targets(
        torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.bool), targets.sizes
    )
    assert explain(outputs, empty, CONFIG) == [[], []]


# the command, and pictures during a run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of two steps on drawn images: `plain`, and `drawn` with a picture of the second one."""
    folder = tmp_path_factory.mktemp("visualize")
    write_shapes(folder / "data", {"train": 4, "val": 3, "test": 1}, seed=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, every in (("plain", 0), ("drawn", 2)):
        train(replace(TINY, data=str(folder / "data"), picture_every=every, out=str(folder / name)))
    torch.set_num_threads(threads)
    return folder


def test_run_with_pictures_has_the_bits_of_one_without(runs: Path) -> None:
    drawn = sorted(path.name for path in (runs / "drawn" / "assignments").iterdir())
    assert drawn == ["step-000002.png"]
    assert not (runs / "plain" / "assignments").exists()
    first, second = (tensors_of(read_checkpoint(runs / name, "last.pt")) for name in ("plain", "drawn"))
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert read_log(runs / "plain") == read_log(runs / "drawn")
    assert pictures_of_run(TINY, shapes_table("val", 1, 0), torch.device("cpu")) is None


def visualize(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["tood_tal.visualize", *arguments])
    importlib.import_module("tood_tal.visualize").main()


def test_command_draws_and_records(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.visualize.OBJECTS_SHOWN", 2)
    visualize(monkeypatch, str(runs / "plain" / "best.pt"), "000001.png", "3", "--out", str(tmp_path))
    content = json.loads((tmp_path / "assignments.json").read_text(encoding="utf-8"))
    assert content["score"].startswith("t, the alignment metric")
    assert [image["image"] for image in content["images"]] == ["000001.png", "000003.png"]
    for image in content["images"]:
        for path in (tmp_path / image["drawn"], tmp_path / "maps" / image["drawn"]):
            with Image.open(path) as picture:
                assert picture.size[0] > 1000
        for one in image["objects"]:
            assert "maps" not in one
            for candidate in one["candidates"]:
                assert set(candidate) >= {"score", "iou", "t", "t_hat", "class_score", "anchor"}
                assert candidate["t"] == candidate["score"] > 0


def test_command_refuses_to_overwrite_what_it_reads(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, file = str(runs / "plain" / "best.pt"), runs / "data" / "val" / "000001.png"
    before = file.read_bytes()
    with pytest.raises(UserError, match="is one of the images to read; choose another --out"):
        visualize(monkeypatch, weights, "000001.png", "--out", str(file.parent))
    assert file.read_bytes() == before
