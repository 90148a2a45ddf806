"""What Combined IoUs are measured against gives the same result; each case says what it measured."""

import sys

import pytest
import torch

from benchmarks import dynamic_speed, speed
from benchmarks.atss_speed import random_targets
from benchmarks.dynamic_speed import (
    dense_combined,
    dynamic_added_case,
    dynamic_assign_case,
    dynamic_memory_case,
    random_predictions,
)
from core.anchors import anchor_grid, level_shapes
from core.atss import assign_atss
from core.geometry import MODERN
from dynamic_atss.assigner import assign_combined
from dynamic_atss.config import Config

CANVAS = (128, 192)  # 512 anchors
TINY = Config(backbone="resnet18", backbone_weights="none", frozen_stages=0, channels=64, short_side=64, long_side=96)


@pytest.mark.parametrize("objects", [1, 2, 7, 30])
def test_dense_form_gives_equal_objects(objects: int) -> None:
    grid = anchor_grid(level_shapes(CANVAS))
    for seed in range(5):
        targets = random_targets(seed, objects, CANVAS)
        predicted = random_predictions(grid, 2, seed)
        found = assign_combined(grid, targets, predicted).gt_index
        assert torch.equal(dense_combined(grid, targets, predicted), found)
    plain, _ = assign_atss(grid, targets, MODERN)
    assert objects == 1 or not torch.equal(plain.gt_index, found)  # the predictions matter


def test_disagreement_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = lambda grid, targets, predicted: torch.full((2, len(grid.boxes)), -1)  # noqa: E731
    monkeypatch.setattr(dynamic_speed, "dense_combined", nobody)
    assert not dynamic_assign_case(objects=3, repeats=1, canvas=CANVAS)["equal"]


def test_assignment_case_says_what_was_measured() -> None:
    measured = dynamic_assign_case(objects=3, repeats=1, canvas=CANVAS)
    assert measured["name"] == "dynamic-assign-3"
    assert measured["what"] == "Combined IoUs, 2 images, 3 objects each, 512 anchors, CPU, 2 threads, eager"
    assert measured["equal"]
    assert measured["positives"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_counts_what_the_assignment_needs() -> None:
    # 2,000 objects with at most 45 candidates: one float64 array of them is 0.7 MB, their boxes 1.4 MB
    measured = dynamic_memory_case(objects=2000, canvas=(256, 256))
    assert 2 < measured["peak_mb"] < 1000
    assert measured["positives"] > 0
    assert measured["what"].startswith("assignment by Combined IoUs, one image with 2000 objects, 1364 anchors")


def test_share_of_a_step() -> None:
    measured = dynamic_added_case(TINY, canvas=(64, 96), objects=2, repeats=3, steps=1)
    assert measured["what"] == (
        "what Combined IoUs add to a training step, resnet18, 2 images of 64 x 96 with 2 objects each, CPU, 2 threads, "
        "eager"
    )
    assert measured["added_ms"] == pytest.approx(measured["with_ms"] - measured["without_ms"])
    assert measured["share"] == pytest.approx(100 * measured["added_ms"] / measured["step_ms"])
    assert measured["losses"]["positives"] > 0
    assert all(0 <= value < 100 for value in measured["losses"].values())


def test_share_and_its_line() -> None:
    share = speed.Share(name="a", what="more", added_ms=2.0, step_ms=100.0, share=2.0, limit=3, details={})
    assert speed.line(share) == "more\n    2.0 ms of 100 ms: 2.00 %, at most 3 % wanted"
    share["share"] = 3.01
    assert speed.line(share).endswith("wanted, MISSED")
