"""Post-processing of PAA: golden detections of both originals, worked numbers, a slow twin, edge cases."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from core.anchors import AnchorGrid, anchor_grid, level_shapes
from core.boxes import box_iou, clip_boxes, decode_deltas
from core.geometry import GEOMETRIES, LEGACY, MODERN, Geometry
from core.nms import Candidates, nms_indices
from paa.config import Config
from paa.model import Outputs
from paa.postprocess import detect, unified_score, vote
from paa.profiles import PAA_PROFILES
from tests.conftest import golden_arrays
from tests.paa.golden import check_detections

MMDET = Config(profile="mmdet")
OFFICIAL = Config(profile="official", geometry="legacy")
VARIANTS: dict[str, dict[str, Any]] = {
    "det": {},
    "detnv": {"score_voting": False},
    "det_small": {"pre_nms_top": 100, "max_detections": 20},
    "detnv_small": {"score_voting": False, "pre_nms_top": 100, "max_detections": 20},
}


def outputs_of(arrays: dict[str, np.ndarray], case: str, geometry: Geometry) -> Outputs:
    def flat(name: str) -> Tensor:
        levels = [torch.from_numpy(arrays[f"{case}/{name}_{level}"]) for level in range(5)]
        return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)

    quality = "centerness" if f"{case}/centerness_0" in arrays else "iou_pred"
    grid = anchor_grid(level_shapes((128, 160)), geometry)
    return Outputs(flat("cls_score"), flat("bbox_pred"), flat(quality)[..., 0], grid)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", "AB")
def test_golden_mmdet(case: str, variant: str) -> None:
    arrays = golden_arrays("head_paa.npz")
    outputs = outputs_of(arrays, case, MODERN)
    sizes = torch.from_numpy(arrays[f"{case}/img_shape"])
    detections = detect(outputs, sizes, replace(MMDET, **VARIANTS[variant]))
    check_detections(detections, arrays, f"{case}/{variant}")


def test_golden_mmdet_rescaled() -> None:
    arrays = golden_arrays("head_paa.npz")
    sizes, scale = torch.from_numpy(arrays["A/img_shape"]), torch.from_numpy(arrays["A/scale_factor"])
    outputs = outputs_of(arrays, "A", MODERN)
    detections = detect(outputs, sizes, MMDET)
    check_detections(detections, arrays, "A/det_rescaled", scale)
    originals = (sizes / scale.flip(0)).round().long()
    again = detect(outputs, sizes, MMDET, originals)  # votes in other pixels, which a plain IoU does not notice
    torch.testing.assert_close(again.boxes, detections.boxes, rtol=0, atol=1e-3)


@pytest.mark.parametrize("variant", ["det", "detnv", "det_small"])
@pytest.mark.parametrize("case", "ABCDEF")
def test_golden_official(shared: Path, case: str, variant: str) -> None:
    with np.load(shared / "golden_official" / "paa.npz") as archive:
        arrays = {key: archive[key] for key in archive.files if key.startswith(f"{case}/") or key == "img_shape"}
    detections = detect(
        outputs_of(arrays, case, LEGACY), torch.from_numpy(arrays["img_shape"]), replace(OFFICIAL, **VARIANTS[variant])
    )
    check_detections(detections, arrays, f"{case}/{variant}")


@pytest.mark.parametrize("name", ["vote0", "vote1", "vote2", "vote3"])
def test_golden_voting(name: str) -> None:
    arrays = {key: torch.from_numpy(value) for key, value in golden_arrays("helpers.npz").items() if key[:5] == name}
    boxes, scores = arrays[f"{name}_boxes"], arrays[f"{name}_scores"]
    rows, labels = (scores > 0.05).nonzero().unbind(1)
    pool = Candidates(boxes[rows], scores[rows, labels], labels, torch.zeros_like(rows))
    kept = pool.select(nms_indices(pool, 0.6, 100))
    dets = arrays[f"{name}_nms_dets"]
    torch.testing.assert_close(kept.boxes, dets[:, :4])
    torch.testing.assert_close(kept.scores, dets[:, 4])
    assert kept.labels.tolist() == arrays[f"{name}_nms_labels"].tolist()
    voted, voted_labels = arrays[f"{name}_voted_dets"], arrays[f"{name}_voted_labels"]
    order = voted[:, 4].argsort(descending=True, stable=True)  # the file orders by class
    torch.testing.assert_close(vote(kept, pool), voted[order, :4], rtol=0, atol=1e-3)
    assert kept.labels.tolist() == voted_labels[order].tolist()


def single(
    boxes: list[list[float]], scores: list[float], labels: list[int], images: list[int] | None = None
) -> Candidates:
    return Candidates(
        torch.tensor(boxes), torch.tensor(scores), torch.tensor(labels), torch.tensor(images or [0] * len(labels))
    )


def test_voting_by_hand() -> None:
    # spec check 19. IoU+1 of the pair is 110 / 132 = 5/6, exp(-(1/6)^2 / .025) = .329193,
    # x1 = .329193 * .6 / (.9 + .329193 * .6) = .179966
    boxes = [[0.0, 0, 10, 10], [1.0, 0, 11, 10]]
    pool = single(boxes, [0.9, 0.6], [3, 3])
    kept = pool.select(nms_indices(pool, 0.6, 100, LEGACY))
    expected = torch.tensor([[0.179966, 0, 10.179966, 10]])
    torch.testing.assert_close(vote(kept, pool, 0.025, LEGACY), expected, rtol=0, atol=1e-6)
    narrow = vote(kept, pool, 0.0025, LEGACY)  # the paper's sigma: almost no vote
    torch.testing.assert_close(narrow[0, 0], torch.tensor(9.96e-6), rtol=0, atol=1e-8)
    for other in (single(boxes, [0.9, 0.6], [3, 4]), single(boxes, [0.9, 0.6], [3, 3], [0, 1])):  # class, image
        kept = other.select(nms_indices(other, 0.6, 100, LEGACY))
        assert vote(kept, other, 0.025, LEGACY).tolist() == boxes


def test_voting_ignores_distant_boxes() -> None:
    # sigma so large that only scores weigh; IoUs 8 / 1592 = .005 and 16 / 1584 = .0101 of boxes 40 x 20
    for left, expected in ((39.6, 0.0), (39.2, 39.2 / 2)):
        pool = single([[0.0, 0, 40, 20], [left, 0, left + 40, 20]], [0.5, 0.5], [0, 0])
        torch.testing.assert_close(vote(pool, pool, 1e9)[0, 0], torch.tensor(expected))


def test_voting_leaves_boxes_without_area_or_weight() -> None:
    pool = single([[5.0, 5, 5, 9], [0.0, 0, 4, 4]], [0.9, 0.0], [0, 1])
    assert vote(pool, pool).tolist() == pool.boxes.tolist()


def slow_vote(kept: Candidates, pool: Candidates, sigma: float, geometry: Geometry) -> Tensor:
    """One kept box and one candidate after the other, in Python's floats."""
    voted = []
    for box, label, image in zip(kept.boxes, kept.labels, kept.images, strict=True):
        total, mean = 0.0, torch.zeros(4, dtype=torch.float64)
        for other, score, other_label, other_image in zip(*pool, strict=True):
            iou = float(box_iou(box.double(), other.double(), geometry))
            if label == other_label and image == other_image and iou > 0.01:
                weight = math.exp(-((1 - iou) ** 2) / sigma) * float(score)
                total, mean = total + weight, mean + weight * other.double()
        voted.append(mean / total if total else box.double())
    return torch.stack(voted).float() if voted else kept.boxes


@pytest.mark.parametrize("geometry", [MODERN, LEGACY])
@pytest.mark.parametrize("count", [0, 1, 2, 30])
def test_voting_equals_slow_twin(count: int, geometry: Geometry) -> None:
    generator = torch.Generator().manual_seed(count)
    corners = torch.rand(count, 2, generator=generator) * 30
    boxes = torch.cat([corners, corners + 5 + torch.rand(count, 2, generator=generator) * 40], dim=1)
    labels, images = torch.randint(3, (2, count), generator=generator)
    pool = Candidates(boxes, torch.rand(count, generator=generator), labels, images)
    kept = pool.select(nms_indices(pool, 0.5, 100, geometry))
    expected = slow_vote(kept, pool, 0.025, geometry)
    torch.testing.assert_close(vote(kept, pool, 0.025, geometry), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(vote(kept, pool, 0.025, geometry, chunk=7), expected, rtol=0, atol=1e-5)


def one_anchor(p: float, iou: float) -> Outputs:
    grid = AnchorGrid(torch.tensor([[0.0, 0, 64, 64]]), torch.tensor([[32.0, 32]]), ((1, 1),), (8,))
    logits = torch.tensor([p, iou]).logit()
    return Outputs(logits[:1].reshape(1, 1, 1), torch.zeros(1, 1, 4), logits[1:].reshape(1, 1), grid)


@pytest.mark.parametrize(
    ("p", "iou", "official", "mmdet"),  # spec check 18
    [(0.36, 0.64, 0.48, 0.48), (0.06, 0.01, 0.024495, None), (0.04, 0.9, None, 0.189737)],
)
def test_score_threshold_by_hand(p: float, iou: float, official: float | None, mmdet: float | None) -> None:
    for config, expected in ((Config(), official), (OFFICIAL, official), (MMDET, mmdet)):
        scores = detect(one_anchor(p, iou), torch.tensor([[64, 64]]), config).scores.flatten().tolist()
        assert scores == ([] if expected is None else [pytest.approx(expected, abs=1e-6)])


@pytest.mark.parametrize("config", [Config(), MMDET])
def test_score_without_iou_branch(config: Config) -> None:
    outputs = one_anchor(0.36, 0.64)._replace(quality_logits=None)  # type: ignore[arg-type]
    assert detect(outputs, torch.tensor([[64, 64]]), config).scores.tolist() == [[pytest.approx(0.36)]]
    scores = torch.rand(1, 2, 3)
    assert unified_score(scores, None) is scores


def many(count: int, sides: float = 64.0, seed: int = 0) -> tuple[Outputs, Tensor]:
    """An image with `count` far apart anchors of one class, and one without anything."""
    x = torch.arange(count) * 2 * sides
    boxes = torch.stack([x, torch.zeros(count), x + sides, torch.full((count,), sides)], dim=1)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.stack([torch.randn(count, 1, generator=generator), torch.full((count, 1), -9.0)])
    grid = AnchorGrid(boxes, boxes[:, :2] + sides / 2, ((1, count),), (8,))
    return Outputs(logits, torch.zeros(2, count, 4), torch.zeros(2, count), grid), torch.tensor([[640, 99999]] * 2)


@pytest.mark.parametrize("config", [Config(), MMDET, OFFICIAL])
@pytest.mark.parametrize("count", [1, 99, 150])
def test_voting_changes_boxes_only(config: Config, count: int) -> None:
    # spec check 21: zero detections (the second image), one, more than 100
    outputs, sizes = many(count)
    with_voting, without = (detect(outputs, sizes, replace(config, score_voting=flag)) for flag in (True, False))
    assert with_voting.valid.tolist() == [[True] * min(count, 100), [False] * min(count, 100)]
    assert torch.equal(with_voting.scores, without.scores)
    assert torch.equal(with_voting.labels, without.labels)
    assert with_voting.scores[0].tolist() == sorted(with_voting.scores[0].tolist(), reverse=True)
    torch.testing.assert_close(with_voting.boxes, without.boxes)  # nobody has a neighbour


@pytest.mark.parametrize("config", [Config(), MMDET, OFFICIAL])
def test_nothing_found(config: Config) -> None:
    outputs, sizes = many(3)
    detections = detect(outputs._replace(logits=torch.full((2, 3, 1), -9.0)), sizes, config)
    assert detections.boxes.shape == (2, 0, 4)


def test_ties_with_the_last_one() -> None:
    outputs, sizes = many(5)
    outputs = outputs._replace(logits=torch.zeros(2, 5, 1))
    for config, expected in ((Config(), 5), (OFFICIAL, 5), (MMDET, 2)):
        assert int(detect(outputs, sizes, replace(config, max_detections=2)).valid[0].sum()) == expected


def test_empty_boxes_are_dropped_in_ours_only() -> None:
    outputs, _ = many(2)
    sizes = torch.tensor([[64, 100]] * 2)  # the second anchor starts at 128
    for config, expected in ((Config(), 1), (MMDET, 2), (OFFICIAL, 2)):
        assert int(detect(outputs, sizes, config).valid[0].sum()) == expected


def test_log_sizes_are_clamped_as_the_profile_says() -> None:
    outputs = one_anchor(0.9, 0.9)._replace(deltas=torch.tensor([[[0, 0, -100.0, 0]]]))  # dw -20 after scaling
    for config, width in ((Config(), 64 / 62.5), (MMDET, 64 / 62.5), (replace(OFFICIAL, geometry="modern"), 0)):
        box = detect(outputs, torch.tensor([[64, 64]]), config).boxes[0, 0]
        assert float(box[2] - box[0]) == pytest.approx(width, abs=1e-5)


def test_original_pixels_matter_in_legacy_only() -> None:
    # IoU+1 depends on the scale; a plain IoU does not, not even on one of each axis
    outputs, sizes = two_boxes([[0.0, 0, 20, 20], [4.0, 0, 24, 20]])
    config = replace(MMDET, geometry="legacy", nms_iou=0.68)
    # network pixels: 17 * 21 / (2 * 21 * 21 - 17 * 21) = .68, not above; file of half the size: 9 / (2 * 11 - 9) = .692
    counts = [
        int(detect(outputs, sizes, config, original).valid.sum())
        for original in (None, sizes, torch.tensor([[50, 50]]), torch.tensor([[50, 100]]))
    ]
    assert counts == [2, 2, 1, 2]
    assert int(detect(outputs, sizes, replace(config, profile="ours"), torch.tensor([[50, 50]])).valid.sum()) == 2


def two_boxes(boxes: list[list[float]]) -> tuple[Outputs, Tensor]:
    corners = torch.tensor(boxes)
    grid = AnchorGrid(corners, corners[:, :2], ((1, len(boxes)),), (8,))
    logits = torch.tensor([[[1.0], [0.5]]])
    return Outputs(logits, torch.zeros(1, 2, 4), torch.zeros(1, 2), grid), torch.tensor([[100, 100]])


def test_each_image_is_its_own() -> None:
    arrays = golden_arrays("head_paa.npz")
    outputs, sizes = outputs_of(arrays, "A", MODERN), torch.from_numpy(arrays["A/img_shape"])
    both = detect(outputs, sizes, Config())
    for image in range(2):
        logits, deltas, ious = (field[image : image + 1] for field in outputs[:3])
        alone = Outputs(logits, deltas, ious, outputs.grid)
        one = detect(alone, sizes[image : image + 1], Config())
        valid = both.valid[image]
        assert torch.equal(one.scores[0], both.scores[image][valid])
        torch.testing.assert_close(one.boxes[0], both.boxes[image][valid], rtol=0, atol=1e-4)


def slow_detect(outputs: Outputs, sizes: Tensor, config: Config) -> list[list[tuple[float, int, list[float]]]]:
    """The steps of spec section 6 in loops over images, levels, anchors, classes and boxes."""
    switches, geometry, results = PAA_PROFILES[config.profile], GEOMETRIES[config.geometry], []
    for image, size in enumerate(sizes):
        class_scores, ious = outputs.logits[image].sigmoid(), outputs.quality_logits[image].sigmoid()
        rows: list[tuple[float, int, Tensor]] = []
        start = 0
        for count in outputs.grid.level_sizes:
            level: list[tuple[float, int, int]] = []
            anchors = range(start, start + count)
            if not switches.top_over_pairs:
                best = [-float((class_scores[a] * ious[a]).sqrt().max()) for a in anchors]
                anchors = [start + int(a) for a in np.argsort(best, kind="stable")[: config.pre_nms_top]]  # type: ignore[assignment]
            for anchor in anchors:
                for label, p in enumerate(class_scores[anchor]):
                    score = (p * ious[anchor]).sqrt()
                    if (p if switches.threshold_on_class else score) > config.score_threshold:
                        level.append((float(score), label, anchor))
            if switches.top_over_pairs:
                level = sorted(level, key=lambda row: -row[0])[: config.pre_nms_top]
            for score, label, anchor in level:
                box = decode_deltas(
                    outputs.grid.boxes[anchor],
                    outputs.deltas[image, anchor],
                    geometry,
                    config.switches.clamp_both_sides,
                )
                box = clip_boxes(box[None, None], size[None], geometry)[0, 0]
                if not switches.drop_empty_boxes or bool((box[2:] - box[:2] + geometry.plus_one > 0).all()):
                    rows.append((float(score), label, box))
            start += count
        rows.sort(key=lambda row: -row[0])
        kept: list[tuple[float, int, Tensor]] = []
        for row in rows:
            if all(k[1] != row[1] or box_iou(k[2], row[2], geometry) <= config.nms_iou for k in kept):
                kept.append(row)
        kept = kept[: config.max_detections]
        results.append([(row[0], row[1], slow_vote_one(row, rows, config, geometry)) for row in kept])
    return results


def slow_vote_one(
    kept: tuple[float, int, Tensor], rows: list[tuple[float, int, Tensor]], config: Config, geometry: Geometry
) -> list[float]:
    total, mean = 0.0, torch.zeros(4, dtype=torch.float64)
    for score, label, box in rows:
        iou = float(box_iou(kept[2], box, geometry))
        if label == kept[1] and iou > 0.01:
            weight = math.exp(-((1 - iou) ** 2) / config.voting_sigma) * score
            total, mean = total + weight, mean + weight * box.double()
    return (mean / total).tolist()


@pytest.mark.parametrize("config", [Config(), MMDET, OFFICIAL])
def test_equals_slow_twin(config: Config) -> None:
    config = replace(config, pre_nms_top=25, max_detections=12)
    generator = torch.Generator().manual_seed(3)
    grid = anchor_grid(level_shapes((64, 64)), GEOMETRIES[config.geometry])
    count = len(grid.boxes)
    outputs = Outputs(
        torch.randn(2, count, 3, generator=generator) * 2 - 2,
        torch.randn(2, count, 4, generator=generator),
        torch.randn(2, count, generator=generator),
        grid,
    )
    sizes = torch.tensor([[64, 64], [40, 52]])
    detections = detect(outputs, sizes, config)
    for image, expected in enumerate(slow_detect(outputs, sizes, config)):
        valid = detections.valid[image]
        assert detections.labels[image][valid].tolist() == [label for _, label, _ in expected]
        scores, boxes = (torch.tensor([row[field] for row in expected]) for field in (0, 2))
        torch.testing.assert_close(detections.scores[image][valid], scores)
        torch.testing.assert_close(detections.boxes[image][valid], boxes, rtol=0, atol=1e-3)


def test_half_precision_outputs() -> None:
    outputs, sizes = many(3)
    logits, deltas, ious = (field.bfloat16() for field in outputs[:3])
    half = Outputs(logits, deltas, ious, outputs.grid)
    detections = detect(half, sizes, Config())
    assert detections.boxes.dtype == detections.scores.dtype == torch.float32
    assert int(detections.valid[0].sum()) == 3
