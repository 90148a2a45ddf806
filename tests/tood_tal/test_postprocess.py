"""Detections of TOOD: spec section 9, check 19, and the profiles' rules."""

from dataclasses import replace

import pytest
import torch

from core.anchors import anchor_grid
from tood_tal.config import Config
from tood_tal.model import Outputs
from tood_tal.postprocess import detect

GRID = anchor_grid(((4, 4), (2, 2), (1, 1), (1, 1), (1, 1)))
SIZES = torch.tensor([[800, 1216]])
PROFILES = ("ours", "mmdet", "official")


def outputs_of(found: list[tuple[int, int, float, list[float]]], classes: int = 3) -> Outputs:
    """(anchor, class, score, box in pixels) on the finest level; everything else scores 0."""
    scores, boxes = torch.zeros(1, len(GRID.points), classes), torch.zeros(1, len(GRID.points), 4)
    for anchor, label, score, box in found:
        scores[0, anchor, label] = score
        boxes[0, anchor] = torch.tensor(box) / 8
    return Outputs(scores, boxes, None, None, GRID)


@pytest.mark.parametrize("profile", PROFILES)
def test_threshold_is_strict(profile: str) -> None:
    outputs = outputs_of([(0, 0, 0.0501, [0, 0, 10, 10]), (1, 0, 0.0499, [50, 50, 60, 60])])
    outputs.scores[0, 2, 0] = 0.05  # float32's .05 against the threshold in float32
    found = detect(outputs, SIZES, Config(profile=profile))  # type: ignore[arg-type]
    assert found.valid.sum() == 1


def test_class_wise_nms() -> None:
    kept = [(0, 0, 0.9, [0.0, 0, 10, 10]), (1, 0, 0.8, [0.0, 0, 10, 5.9]), (3, 1, 0.7, [0.0, 0, 10, 10])]
    outputs = outputs_of([*kept, (2, 0, 0.85, [0.0, 0, 10, 6.1])])
    found = detect(outputs, SIZES, Config())
    assert found.scores[0].tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert found.labels[0].tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("profile", "expected"),
    [("ours", [0.0, 0, 1216, 800]), ("mmdet", [-5.0, -3, 1400, 900]), ("official", [0.0, 0, 1216, 800])],
)
def test_clipping(profile: str, expected: list[float]) -> None:
    outputs = outputs_of([(0, 0, 0.9, [-5, -3, 1400, 900])])
    found = detect(outputs, SIZES, Config(profile=profile))  # type: ignore[arg-type]
    assert found.boxes[0, 0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("profile", "count"), [("ours", 1), ("mmdet", 2), ("official", 2)])
def test_boxes_outside_the_image(profile: str, count: int) -> None:
    # clipping leaves the second without area: ours drops it, MMDetection never clips, the authors keep it
    outputs = outputs_of([(0, 0, 0.9, [0, 0, 10, 10]), (1, 0, 0.8, [1300, 0, 1400, 10])])
    assert detect(outputs, SIZES, Config(profile=profile)).valid.sum() == count  # type: ignore[arg-type]


@pytest.mark.parametrize(("profile", "count"), [("ours", 1), ("mmdet", 1), ("official", 2)])
def test_boxes_without_area(profile: str, count: int) -> None:
    outputs = outputs_of([(0, 0, 0.9, [0, 0, 10, 10]), (1, 0, 0.8, [20, 20, 15, 30])])
    assert detect(outputs, SIZES, Config(profile=profile)).valid.sum() == count  # type: ignore[arg-type]


def test_best_pairs_or_best_locations() -> None:
    # one location with two classes over the threshold, another with one: two pairs are kept, or two locations
    found = [(0, 0, 0.9, [0.0, 0, 10, 10]), (0, 1, 0.8, [0.0, 0, 10, 10]), (5, 2, 0.3, [50.0, 50, 60, 60])]
    config = Config(pre_nms_top=2)
    assert detect(outputs_of(found), SIZES, config).scores[0].tolist() == pytest.approx([0.9, 0.8])
    official = detect(outputs_of(found), SIZES, replace(config, profile="official"))
    assert official.scores[0].tolist() == pytest.approx([0.9, 0.8, 0.3])


def test_levels_have_their_own_quota() -> None:
    outputs = outputs_of([(a, 0, 0.9 - a / 100, [20.0 * a, 0, 20.0 * a + 10, 10]) for a in range(4)])
    outputs.scores[0, 16, 0], outputs.boxes[0, 16] = 0.1, torch.tensor([30.0, 30, 40, 40])  # on stride 16
    found = detect(outputs, SIZES, Config(pre_nms_top=2))
    assert found.scores[0].tolist() == pytest.approx([0.9, 0.89, 0.1])
    assert found.boxes[0, 2].tolist() == [480, 480, 640, 640]


def test_plain_atss_multiplies_by_centreness() -> None:
    config = Config(head="parallel", quality="centerness", atss_share=1.0)
    outputs = outputs_of([(0, 0, 0.8, [0, 0, 10, 10]), (1, 0, 0.06, [50, 50, 60, 60])])
    outputs = outputs._replace(quality=torch.full((1, len(GRID.points)), 0.0))
    assert detect(outputs, SIZES, config).scores[0].tolist() == pytest.approx([0.4, 0.03])  # threshold before it


def test_at_most_so_many() -> None:
    outputs = outputs_of([(a, 0, 0.9, [20.0 * a, 0, 20.0 * a + 10, 10]) for a in range(16)])
    assert detect(outputs, SIZES, Config(max_detections=7)).valid.sum() == 7
    assert detect(outputs_of([]), SIZES, Config()).boxes.shape == (1, 0, 4)
