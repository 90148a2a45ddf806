"""What TAL is measured against gives the same result; each case says what it measured."""

import sys

import pytest
import torch

from benchmarks import speed, tood_speed
from benchmarks.atss_speed import random_targets
from benchmarks.tood_speed import (
    Found,
    agree,
    dense_aligned,
    half_trained_outputs,
    loop_losses,
    random_outputs,
    same,
    tood_assign_case,
    tood_loss_case,
    tood_memory_case,
)
from core.types import Targets
from tood_tal.assigner import assign_aligned
from tood_tal.config import Config
from tood_tal.losses import pixel_boxes

CANVAS = (128, 192)  # 512 anchors
CONFIG = Config(atss_share=0.0)


@pytest.mark.parametrize("objects", [1, 2, 7, 30])
def test_dense_form_gives_equal_objects(objects: int) -> None:
    for seed in range(5):
        targets, outputs = random_targets(seed, objects, CANVAS), random_outputs(CANVAS, seed, batch=2)
        inputs = outputs.scores, pixel_boxes(outputs), outputs.grid.points, targets
        found = assign_aligned(*inputs)
        assert same(Found(found.assignment.gt_index, found.targets), dense_aligned(*inputs))
        assert found.assignment.positive.any()


@pytest.mark.parametrize("objects", [1, 2, 7, 30])
def test_loop_gives_equal_objects_and_losses(objects: int) -> None:
    for seed in range(5):
        targets = random_targets(seed, objects, CANVAS)
        targets.valid[1, objects // 2 :] = False
        targets.sizes[1] -= 40  # anchors in the padding
        assert agree(half_trained_outputs(targets, CANVAS, seed), targets, CONFIG)


def test_loop_takes_images_without_objects() -> None:
    none, labels = torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64)
    targets = Targets(none, labels, labels.bool(), torch.tensor([CANVAS] * 2))
    outputs = random_outputs(CANVAS, 0, batch=2)
    assert agree(outputs, targets, CONFIG)
    assert loop_losses(outputs, targets)[0]["loss_box"] == 0


def test_disagreement_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = dense_aligned
    monkeypatch.setattr(
        tood_speed, "dense_aligned", lambda *inputs: right(*inputs)._replace(targets=torch.ones(2, 512))
    )
    assert not tood_assign_case(objects=3, repeats=1, canvas=CANVAS)["equal"]
    nobody = lambda *inputs: right(*inputs)._replace(gt_index=torch.full((2, 512), -1))  # noqa: E731
    monkeypatch.setattr(tood_speed, "dense_aligned", nobody)
    assert not tood_assign_case(objects=3, repeats=1, canvas=CANVAS)["equal"]
    monkeypatch.setattr(tood_speed, "BOX_WEIGHT", 2.001)
    assert not tood_loss_case(objects=3, repeats=1, canvas=CANVAS)["equal"]


def test_assignment_case_says_what_was_measured() -> None:
    measured = tood_assign_case(objects=3, repeats=1, canvas=CANVAS)
    assert measured["name"] == "tood-assign-3"
    assert measured["what"] == "TAL's assignment, 2 images, 3 objects each, 512 anchors, CPU, 2 threads, eager"
    assert measured["equal"]
    assert measured["positives"] > 0
    assert "wanted 4" in speed.line(speed.row(measured, "matrices", 4))


def test_loss_case_says_what_was_measured() -> None:
    measured = tood_loss_case(objects=3, repeats=1, canvas=CANVAS)
    assert measured["what"] == (
        "TAL's assignment and loss, 2 images of 128 x 192 with 3 objects each, CPU, 2 threads, eager"
    )
    assert measured["equal"]
    assert all(value > 0 for value in measured["losses"].values())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_counts_what_the_assignment_needs() -> None:
    # 2,000 objects with 13 anchors each: one array of boxes is 0.4 MB
    measured = tood_memory_case(objects=2000, canvas=(256, 256))
    assert 0.4 < measured["peak_mb"] < 1000
    assert measured["positives"] > 0
    assert measured["what"].startswith("TAL's assignment, one image with 2000 objects, 1364 anchors, 80 classes")
