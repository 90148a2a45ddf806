"""What PADet is measured against gives the same result; each case says what it measured."""

import pytest
import torch
from torchvision.models.detection import ssd300_vgg16

from benchmarks import padet_speed, speed
from benchmarks.padet_speed import (
    SOFT_NMS,
    loop_match,
    loop_soft_nms,
    match_case,
    random_pool,
    random_targets,
    soft_nms_case,
    ssd_multiply_adds,
    threshold_of,
    whole_case,
)
from core.types import Targets
from padet.anchors import build_anchors
from padet.assigner import match_anchors
from padet.config import Config
from padet.soft_nms import soft_nms

TINY = Config(size=192, backbone="resnet18", norm="batch", channels=32, backbone_weights="none", prior=0.0)


@pytest.mark.parametrize("objects", [1, 2, 7, 60])
def test_loop_of_matching_gives_equal_objects(objects: int) -> None:
    anchors = build_anchors(192, "coco").boxes
    for seed in range(3):
        targets = random_targets(seed, 2, objects, 192)
        assert torch.equal(loop_match(anchors, targets), match_anchors(anchors, targets).gt_index)


def test_loop_of_matching_where_objects_want_the_same_anchor() -> None:
    anchors = build_anchors(192, "coco").boxes
    targets = random_targets(0, 2, 5, 192)
    boxes = targets.boxes[:, :1].expand(-1, 5, -1).contiguous()  # all five in one place, the last one padding
    crowd = Targets(boxes, targets.labels, torch.tensor([[True] * 4 + [False]] * 2), targets.sizes)
    found = loop_match(anchors, crowd)
    assert torch.equal(found, match_anchors(anchors, crowd).gt_index)
    assert set(found[found >= 0].tolist()) == {0, 1, 2, 3}


def test_matching_case_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = match_case(objects=3, images=2, size=192, repeats=1)
    assert measured["what"] == "PADet's matching, 2 images, 3 objects each, 4576 anchors, CPU, 2 threads, eager"
    assert measured["equal"]
    assert measured["positives"] >= 6
    monkeypatch.setattr(padet_speed, "loop_match", lambda anchors, targets: torch.full((2, len(anchors)), -1))
    assert not match_case(objects=3, images=2, size=192, repeats=1)["equal"]


@pytest.mark.parametrize("limit", [1, 20, 10_000])
def test_loop_of_soft_nms_gives_equal_detections(limit: int) -> None:
    for seed in range(3):
        pool = random_pool(3, 40, seed)
        found, expected = soft_nms(pool, "linear", **SOFT_NMS, limit=limit), loop_soft_nms(pool, limit)
        assert torch.equal(found.boxes, expected.boxes)
        torch.testing.assert_close(found.scores, expected.scores, atol=1e-6, rtol=0)
    if limit > 1:  # boxes do overlap
        assert not torch.equal(expected.scores, pool.scores.sort(descending=True).values[:limit])


@pytest.mark.parametrize(("limit", "name", "said"), [(5, "5", "the best 5"), (None, "all", "no limit")])
def test_soft_nms_case_says_what_was_measured(
    limit: int | None, name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = soft_nms_case(limit, classes=3, each=20, repeats=1)
    assert measured["name"] == f"padet-nms-{name}"
    assert measured["what"] == f"soft-NMS, 3 classes with 20 candidates each, {said}, CPU, 2 threads, eager"
    assert measured["equal"]
    assert measured["kept"] == 5 if limit else measured["kept"] > 5
    monkeypatch.setattr(padet_speed, "loop_soft_nms", lambda pool, limit: pool)
    assert not soft_nms_case(limit, classes=3, each=20, repeats=1)["equal"]


def test_threshold_lets_as_many_pairs_through() -> None:
    logits = torch.randn(1, 50, 4, generator=torch.Generator().manual_seed(0))
    scores = logits.softmax(dim=-1)[..., 1:]
    assert int((scores > threshold_of(logits, 30)).sum()) == 30


def test_whole_detectors() -> None:
    measured = whole_case(TINY, candidates=50, repeats=1)
    assert measured["what"].startswith("PADet, resnet18, 192 x 192, ")
    assert 0 < measured["gmacs"] < 3
    assert 0 < measured["detections"] <= 50
    assert 0 < measured["reference_detections"] <= 50
    assert measured["ratio"] > 0


def test_multiply_adds_of_ssd() -> None:
    # torchvision states 34.86 G with 91 classes; 10 classes fewer spare 10 x 9 values for each input channel of a cell
    cells = ((38, 512, 4), (19, 1024, 6), (10, 512, 6), (5, 256, 6), (3, 256, 4), (1, 256, 4))
    spared = sum(side * side * channels * anchors * 10 * 9 for side, channels, anchors in cells)
    ssd = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=81).eval()
    assert ssd_multiply_adds(ssd) + spared == pytest.approx(34.858e9, rel=1e-3)


def test_wanted_ratio_of_whole_detectors(monkeypatch: pytest.MonkeyPatch) -> None:
    case = {"name": "a", "what": "w", "reference_ms": 1.0, "ours_ms": 1.09}
    monkeypatch.setattr(speed, "whole_case", lambda: case)
    assert "MISSED" not in speed.line(speed.padet_whole()[0])
    case["ours_ms"] = 1.11
    assert "MISSED" in speed.line(speed.padet_whole()[0])
