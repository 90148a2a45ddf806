"""What PAA's pictures say against the assignment itself, the command, and pictures during a run."""

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.anchors import anchor_grid, level_shapes
from core.decisions import OUTCOMES, Decision
from core.errors import UserError
from core.profiles import ProfileName
from core.shapes import shapes_table, write_shapes
from core.types import Targets
from paa.config import SMALL, Config
from paa.explain import Gaussians, explain, mixture_curves, pictures_of_run
from paa.losses import assign
from paa.model import Outputs
from paa.profiles import Scheme
from paa.train import train
from tests.runs import read_checkpoint, read_log, tensors_of

CONFIG = Config(anchor_scale=4.0)
TINY = replace(
    SMALL,
    steps=3,
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


def random_batch(config: Config, seed: int = 0) -> tuple[Outputs, Targets]:
    """Two images of 96 x 128 with up to three objects; the second one's are fewer, and it has padding."""
    torch.manual_seed(seed)
    grid = anchor_grid(level_shapes((96, 128)), config.box_geometry, scale=config.anchor_scale)
    count = len(grid.boxes)
    corners = torch.rand(2, 3, 2) * 50
    boxes = torch.cat([corners, corners + 10 + 50 * torch.rand(2, 3, 2)], dim=-1)
    valid = torch.tensor([[True, True, True], [True, False, False]])
    sizes = torch.tensor([[96, 128], [64, 90]])
    outputs = Outputs(torch.randn(2, count, 4), torch.randn(2, count, 4), torch.randn(2, count), grid)
    return outputs, Targets(boxes, torch.tensor([[0, 3, 1], [2, 0, 0]]), valid, sizes)


def check_against_assignment(outputs: Outputs, targets: Targets, config: Config) -> list[Decision]:
    """Every positive anchor is a positive candidate of its object and the other way round; likewise ignored ones."""
    gt_index = assign(outputs, targets, config).gt_index
    level_of = np.repeat(np.arange(3, 8), outputs.grid.level_sizes)
    explained = explain(outputs, targets, config)
    for image, decisions in enumerate(explained):
        assert len(decisions) == int(targets.valid[image].sum())
        for number, one in enumerate(decisions):
            assert (
                sorted(one.columns["anchor"][one.where("positive")].tolist())
                == torch.nonzero(gt_index[image] == number).flatten().tolist()
            )
            assert (gt_index[image, one.columns["anchor"][one.where("ignored")]] == -2).all()
            assert (gt_index[image, one.columns["anchor"][one.where("negative")]] == -1).all()
            assert (np.diff(one.scores) >= 0).all()
            assert (one.levels == level_of[one.columns["anchor"]]).all()
            assert len(np.unique(one.columns["anchor"])) == len(one.scores)
            np.testing.assert_allclose(one.columns["class_loss"] + one.columns["box_loss"], one.scores, rtol=1e-5)
    return [one for decisions in explained for one in decisions]


@pytest.mark.parametrize("scheme", ["a", "b", "c", "d", "number", "range"])
@pytest.mark.parametrize("profile", ["ours", "mmdet"])
def test_pictures_show_the_assignment(scheme: Scheme, profile: ProfileName) -> None:
    config = replace(CONFIG, scheme=scheme, profile=profile, score_range=0.05)
    decisions = [one for seed in range(2) for one in check_against_assignment(*random_batch(config, seed), config)]
    assert sum(len(one.where("positive")) for one in decisions) > 0
    assert (sum(len(one.where("ignored")) for one in decisions) > 0) == (scheme in ("b", "d"))
    fixed = scheme in ("number", "range")
    assert all((one.curves is None) == (fixed or len(one.scores) < 2) for one in decisions)
    assert all(("component" in one.columns) != fixed for one in decisions)


def test_curves_are_the_density_that_separated() -> None:
    fitted = [one for one in explain(*random_batch(CONFIG), CONFIG)[0] if one.curves]
    assert len(fitted) == 2
    for one in fitted:
        assert one.curves is not None
        first, second, total = one.curves(one.scores).values()
        np.testing.assert_allclose(np.log(total), one.columns["log_density"], rtol=1e-9, atol=1e-9)
        np.testing.assert_array_equal(second > first, one.columns["component"] == 1)
        assert one.facts["mixture"]["steps"] > 0


def test_mixture_by_hand() -> None:
    gaussians = Gaussians(np.array([0.25, 0.75]), np.array([0.0, 1.0]), np.array([1.0, 4.0]), 3)
    first, second, total = mixture_curves(gaussians, np.array([0.0, 1.0])).values()
    # 0.25 / sqrt(2 pi) = 0.09974, times e^-0.5 = 0.06049; 0.75 / (2 sqrt(2 pi)) = 0.14960, times e^-0.125 = 0.13202
    np.testing.assert_allclose(first, [0.09974, 0.06049], atol=1e-5)
    np.testing.assert_allclose(second, [0.13202, 0.14960], atol=1e-5)
    np.testing.assert_allclose(total, [0.23176, 0.21009], atol=2e-5)


def test_equal_gaussians_keep_a_curve_each() -> None:
    gaussians = Gaussians(np.array([0.5, 0.5]), np.array([0.5, 0.5]), np.array([1e-6, 1e-6]), 3)  # golden G3
    assert len(mixture_curves(gaussians, np.array([0.5]))) == 3


def test_levels_centres_and_places_by_hand() -> None:
    """One object on the only anchor of P7's side; zero deltas predict the anchors themselves."""
    config = replace(CONFIG, topk=1)
    grid = anchor_grid(level_shapes((128, 128)), scale=4.0)
    zeros = Outputs(torch.zeros(1, len(grid.boxes), 2), torch.zeros(1, len(grid.boxes), 4), None, grid)
    # P3's anchor of row 4, column 4 is [16, 16, 48, 48]; P3 has 16 columns: number 68
    targets = Targets(
        torch.tensor([[[16.0, 16, 48, 48]]]), torch.tensor([[1]]), torch.tensor([[True]]), torch.tensor([[128, 128]])
    )
    ((one,),) = explain(zeros, targets, config)
    assert one.columns["anchor"][0] == 68
    assert one.levels[0] == 3
    assert one.centres[0].tolist() == [32.0, 32.0]
    assert one.boxes[0].tolist() == [16.0, 16.0, 48.0, 48.0]
    assert one.ious[0] == one.columns["anchor_iou"][0] == 1.0
    assert OUTCOMES[one.outcomes[0]] == "positive"
    # logit 0: focal loss 0.0433217 of the right class + 0.1299651 of the other (spec section 13, check 7); GIoU loss 0
    assert one.scores[0] == pytest.approx(0.1732868, abs=1e-6)
    assert one.columns["class_score"][0] == 0.5
    assert not any(name.startswith("predicted") for name in one.columns)
    # P4's anchor at (32, 32) has side 64: IoU 1/4, GIoU 1/4, loss 0.75
    assert one.levels.tolist()[1] == 4
    assert one.columns["box_loss"][1] == pytest.approx(0.75, abs=1e-6)


@pytest.mark.parametrize("objects", [0, 1])
def test_image_and_object_without_anything(objects: int) -> None:
    """Of two equal objects the first takes all anchors, so the second has no candidate."""
    outputs, _ = random_batch(CONFIG)
    box = torch.tensor([10.0, 10, 60, 60])
    boxes, valid = box.expand(2, 2 * objects, 4), torch.ones(2, 2 * objects, dtype=torch.bool)
    labels = torch.zeros(2, 2 * objects, dtype=torch.int64)
    decisions = explain(outputs, Targets(boxes, labels, valid, torch.tensor([[96, 128]] * 2)), CONFIG)[0]
    assert len(decisions) == 2 * objects
    if objects:
        assert len(decisions[0].scores) > 0
        assert len(decisions[1].scores) == 0
        assert decisions[1].curves is None
        assert decisions[1].facts["mixture"] is None
        assert decisions[1].note == "no anchor has its largest IoU with this object: it teaches nothing"


def test_other_assigners_are_refused() -> None:
    config, table = replace(CONFIG, assigner="atss", picture_every=5), shapes_table("val", 1, 0)
    with pytest.raises(UserError, match="assigner 'atss': pictures show what assigner paa decides, no other"):
        explain(*random_batch(CONFIG), config)
    with pytest.raises(UserError, match="assigner 'atss'"):
        pictures_of_run(config, table, torch.device("cpu"))
    assert pictures_of_run(replace(config, picture_every=0), table, torch.device("cpu")) is None


# the command, and pictures during a run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of three steps on drawn images: `plain`, and `drawn` with a picture every second step."""
    folder = tmp_path_factory.mktemp("visualize")
    write_shapes(folder / "data", {"train": 4, "val": 3, "test": 1}, seed=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, every in (("plain", 0), ("drawn", 2)):
        train(replace(TINY, data=str(folder / "data"), picture_every=every, out=str(folder / name)))
    torch.set_num_threads(threads)
    return folder


def test_run_with_pictures_has_the_bits_of_one_without(runs: Path) -> None:
    assert sorted(path.name for path in (runs / "drawn" / "assignments").iterdir()) == [
        "step-000002.png",
        "step-000003.png",
    ]
    assert not (runs / "plain" / "assignments").exists()
    for name in ("last.pt", "best.pt"):
        plain, drawn = (tensors_of(read_checkpoint(runs / run_name, name)) for run_name in ("plain", "drawn"))
        assert plain.keys() == drawn.keys()
        assert [key for key in plain if not torch.equal(plain[key], drawn[key])] == []
    assert read_log(runs / "plain") == read_log(runs / "drawn")


def visualize(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["paa.visualize", *arguments])
    importlib.import_module("paa.visualize").main()


def test_command_draws_and_records(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = runs / "data" / "val" / "000003.png"
    visualize(monkeypatch, str(runs / "plain" / "best.pt"), "000001.png", str(file), "1", "--out", str(tmp_path))
    content = json.loads((tmp_path / "assignments.json").read_text(encoding="utf-8"))
    assert content["split"] == "val"
    assert [image["image"] for image in content["images"]] == ["000001.png", "000003.png"]
    annotations = json.loads((runs / "data" / "annotations" / "instances_val.json").read_text(encoding="utf-8"))
    for image in content["images"]:
        with Image.open(tmp_path / image["drawn"]) as picture:
            assert picture.size[0] > 1000
        boxes = [a["bbox"] for a in annotations["annotations"] if a["image_id"] == image["image_id"]]
        areas = sorted((w * h for _, _, w, h in boxes), reverse=True)
        drawn = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (one["box"] for one in image["objects"])]
        assert drawn == pytest.approx(areas, rel=1e-3)
        for one in image["objects"]:
            assert [c["rank"] for c in one["candidates"]] == list(range(1, len(one["candidates"]) + 1))
            positive = [c["outcome"] == "positive" for c in one["candidates"]]
            assert positive == sorted(positive, reverse=True)  # scheme c: a prefix of the sorted scores
            assert all(math.isfinite(c["score"]) for c in one["candidates"])


def test_word_shapes_and_another_split(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.visualize.SHAPES_SHOWN", 1)
    weights = str(runs / "plain" / "best.pt")
    visualize(monkeypatch, weights, "shapes", "--split", "test", "--out", str(tmp_path))
    content = json.loads((tmp_path / "assignments.json").read_text(encoding="utf-8"))
    assert (content["data"], content["split"]) == ("shapes", "test")
    table = shapes_table("test", 200, 0)
    assert len(content["images"][0]["objects"]) == table.box_slice(0).stop


def test_command_refuses_in_one_line(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, out = str(runs / "plain" / "best.pt"), str(tmp_path / "out")
    with pytest.raises(
        UserError, match=r"photo.jpg: no image of this name or id in val of data; choose another --split"
    ):
        visualize(monkeypatch, weights, "photo.jpg", "--out", out)
    with pytest.raises(UserError, match="is one of the images to read; choose another --out"):
        visualize(monkeypatch, weights, "000001.png", "--out", str(runs / "data" / "val"))
    with pytest.raises(UserError, match="no such folder"):
        visualize(monkeypatch, weights, "000001.png", "--data", str(tmp_path / "none"), "--out", out)
    assert not Path(out).exists()
