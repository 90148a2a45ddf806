"""The slow loop that PAA's speed is measured against gives the same result, else its time says nothing."""

import sys

import pytest
import torch

from benchmarks import paa_speed
from benchmarks.atss_speed import random_targets
from benchmarks.paa_memory import paa_memory_case
from benchmarks.paa_speed import agree, half_trained, loop_losses, paa_loss_case
from core.types import IGNORED, Targets
from paa.config import Config
from paa.losses import assign

CANVAS = (128, 192)  # 515 anchors


def case(objects: int, seed: int) -> Targets:
    return random_targets(seed, objects, CANVAS)


@pytest.mark.parametrize("objects", [1, 2, 7, 30])
def test_loop_gives_equal_objects_and_losses(objects: int) -> None:
    for seed in range(3):
        targets = case(objects, seed)
        assert agree(half_trained(targets, CANVAS, seed), targets, Config())


def test_loop_with_padding() -> None:
    full = case(6, 0)
    some = torch.tensor([[True, True, False, True, False, False], [False] * 6])  # the second image has no object
    targets = full._replace(valid=some, sizes=torch.tensor([[128, 192], [64, 90]]))
    outputs = half_trained(full, CANVAS, 0)
    assert agree(outputs, targets, Config())
    gt_index = loop_losses(outputs, targets, Config())[1]
    assert set(gt_index[0].tolist()) - {-1} <= {0, 1, 3}
    # 64 x 96 of 128 x 192 pixels: 8 x 12 + 4 x 6 + 2 x 3 + 1 x 2 + 1 x 1 anchors
    assert int((gt_index[1] != IGNORED).sum()) == 129


def test_disagreement_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = case(7, 0)
    outputs = half_trained(targets, CANVAS, 0)
    losses, gt_index = loop_losses(outputs, targets, Config())
    other_loss = losses | {"loss_box": losses["loss_box"] * 1.0001}
    one_anchor_less = gt_index.masked_fill(gt_index == gt_index.max(), -1)
    for wrong in ((other_loss, gt_index), (losses, one_anchor_less)):
        monkeypatch.setattr(paa_speed, "loop_losses", lambda *_, wrong=wrong: wrong)
        assert not agree(outputs, targets, Config())


def test_half_trained_outputs_have_positives_and_doubtful_anchors() -> None:
    targets = case(7, 0)
    result = assign(half_trained(targets, CANVAS, 0), targets, Config())
    per_object = torch.bincount(result.gt_index[0][result.positive[0]], minlength=7)
    assert per_object.max() > 1
    assert int(result.positive.sum()) < 2 * 7 * 45


def test_case_says_what_was_measured() -> None:
    measured = paa_loss_case(objects=2, repeats=1, canvas=CANVAS)
    assert measured["name"] == "paa-loss-2"
    assert measured["what"] == (
        "PAA's assignment and loss, 2 images of 128 x 192 with 2 objects each, CPU, 2 threads, eager"
    )
    assert measured["equal"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_counts_what_the_assignment_needs() -> None:
    measured = paa_memory_case(objects=300, canvas=(512, 512))
    # 5,456 anchors x 80 classes: one float32 array of them is 1.7 MB; the assignment holds several
    assert measured["peak_mb"] > 3 * 1.7
    assert measured["positives"] > 0
