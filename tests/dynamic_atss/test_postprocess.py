"""Post-processing of every host: worked scores, a loop over anchors, edges; Combined IoUs change nothing in it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from core.anchors import AnchorGrid, anchor_grid, level_shapes
from core.boxes import box_iou, clip_boxes, decode_deltas
from core.geometry import GEOMETRIES
from dynamic_atss.config import PRESETS, Config
from dynamic_atss.model import DynamicATSS, Outputs
from dynamic_atss.postprocess import detect

HOSTS = ["atss", "gfl", "gflv2", "vfnet"]
PROFILES = ["ours", "mmdet", "official"]
WIDTHS = {"atss": 4, "gfl": 68, "gflv2": 68, "vfnet": 4}


def of(host: str, profile: str, **changes: Any) -> Config:
    geometry = "legacy" if (host, profile) == ("atss", "official") else "modern"
    return Config(**{"host": host, "profile": profile, "geometry": geometry, **changes})


EVERY = [of(host, profile) for host in HOSTS for profile in PROFILES]


def named(config: Config) -> str:
    return f"{config.host}-{config.profile}"


def outputs_of(config: Config, classes: Tensor, quality: float, grid: AnchorGrid) -> Outputs:
    """These class logits and quality scores; boxes of 8 strides around every anchor's centre, the anchor's for ATSS."""
    batch, anchors = classes.shape[:2]
    regression = torch.zeros(batch, anchors, WIDTHS[config.host])
    if config.host == "vfnet":
        regression += 64
    branch = torch.full((batch, anchors), quality).logit() if config.host in ("atss", "gflv2") else None
    return Outputs(classes, regression, branch, regression.clone() if config.host == "vfnet" else None, grid)


def row_of_anchors(count: int, distance: float = 200.0) -> AnchorGrid:
    """Anchors of 64 x 64 pixels side by side on P3."""
    points = torch.stack([100 + distance * torch.arange(count), torch.full((count,), 100.0)], dim=1)
    return AnchorGrid(torch.cat([points - 32, points + 32], dim=1), points, ((1, count),), (8,))


SIZES = torch.tensor([[400, 99999]])


@pytest.mark.parametrize(
    ("host", "profile", "expected"),
    [
        ("atss", "ours", 0.4),  # sqrt(.64 * .25)
        ("atss", "official", 0.4),
        ("atss", "mmdet", 0.16),  # without the root
        *[("gflv2", profile, 0.16) for profile in PROFILES],  # the joint score is a product
        *[(host, profile, 0.64) for host in ("gfl", "vfnet") for profile in PROFILES],
    ],
)
def test_score_by_hand(host: str, profile: str, expected: float) -> None:
    # Check 14: class .64, branch .25.
    config = of(host, profile)
    outputs = outputs_of(config, torch.tensor([[[0.64]]]).logit(), 0.25, row_of_anchors(1))
    assert detect(outputs, SIZES, config).scores.tolist() == [[pytest.approx(expected, abs=1e-6)]]


@pytest.mark.parametrize("config", EVERY, ids=named)
def test_threshold_is_strict_and_on_the_class_score(config: Config) -> None:
    # Check 14: a class score of exactly the threshold is no detection; ATSS's branch does not move it below.
    p = torch.tensor([[[-2.0], [-1.99]]])
    outputs = outputs_of(config, p, 1 - 1e-7, row_of_anchors(2))
    if config.host == "gflv2":
        outputs = outputs._replace(quality=torch.full((1, 2), 50.0))  # exactly 1
    threshold = p.sigmoid()[0, 0, 0].item()
    found = detect(outputs, SIZES, replace(config, score_threshold=threshold))
    assert found.valid.sum().item() == 1
    if config.host == "atss":
        low = detect(outputs_of(config, p, 0.01, row_of_anchors(2)), SIZES, replace(config, score_threshold=threshold))
        assert low.scores.max().item() < threshold or config.profile != "mmdet"
        assert low.valid.sum().item() == 1


@pytest.mark.parametrize("config", EVERY, ids=named)
def test_ties_with_the_last_one(config: Config) -> None:
    # the authors of ATSS keep what is exactly as good as the last of the best
    outputs = outputs_of(config, torch.zeros(1, 5, 1), 0.5, row_of_anchors(5))
    kept = config.host == "atss" and config.profile != "mmdet"
    found = detect(outputs, SIZES, replace(config, max_detections=2))
    assert found.valid.sum().item() == (5 if kept else 2)


@pytest.mark.parametrize("config", EVERY, ids=named)
def test_boxes_without_area(config: Config) -> None:
    # the second box starts beyond the image of 150 pixels
    outputs = outputs_of(config, torch.zeros(1, 2, 1), 0.5, row_of_anchors(2))
    found = detect(outputs, torch.tensor([[150, 150]]), config)
    kept = not config.rules.drop_empty_boxes
    assert kept == (config.profile == "official")
    assert found.valid.sum().item() == 1 + kept
    limit = 150 - GEOMETRIES[config.geometry].plus_one
    assert found.boxes[found.valid].max().item() <= limit


def test_which_pairs_of_a_level_stay() -> None:
    # Two anchors, two classes: .9 and .8 with a branch of .1, .7 and .01 with a branch of .9. Two places.
    logits = torch.tensor([[[0.9, 0.8], [0.7, 0.01]]]).logit()
    branch = torch.tensor([[0.1, 0.9]]).logit()
    kept = {}
    for profile in PROFILES:
        config = of("atss", profile, pre_nms_top=2, geometry="modern")
        outputs = outputs_of(config, logits, 0.5, row_of_anchors(2))._replace(quality=branch)
        found = detect(outputs, SIZES, config)
        kept[profile] = sorted(found.labels[found.valid].tolist())
        assert found.valid.sum().item() == 2
    # joint scores .63 and .09 are of class 0 twice; class scores .9 and .8 of class 0 and 1
    assert kept == {"ours": [0, 0], "official": [0, 0], "mmdet": [0, 1]}


@pytest.mark.parametrize("host", ["gfl", "gflv2", "vfnet"])
def test_which_locations_of_a_level_stay(host: str) -> None:
    # One place. The authors take the best anchor with all its classes over the threshold, the others the best pair.
    logits = torch.tensor([[[0.9, 0.8], [0.85, 0.3]]]).logit()
    counts = {}
    for profile in PROFILES:
        config = of(host, profile, pre_nms_top=1)
        outputs = outputs_of(config, logits, 0.5, row_of_anchors(2))
        counts[profile] = detect(outputs, SIZES, config).valid.sum().item()
    assert counts == {"ours": 1, "mmdet": 1, "official": 2}


@pytest.mark.parametrize("config", EVERY, ids=named)
@pytest.mark.parametrize("count", [0, 1, 99, 150])
def test_number_of_detections(config: Config, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    logits = torch.cat([torch.rand(1, count, 1, generator=generator), torch.full((1, 3, 1), -9.0)], dim=1)
    both = torch.cat([logits, torch.full_like(logits, -9.0)])  # the second image has nothing
    found = detect(outputs_of(config, both, 0.5, row_of_anchors(count + 3)), SIZES.repeat(2, 1), config)
    assert found.valid.tolist() == [[True] * min(count, 100), [False] * min(count, 100)]
    scores = found.scores[0].tolist()
    assert scores == sorted(scores, reverse=True)
    assert found.boxes.shape == (2, min(count, 100), 4)


def test_vfnet_shows_the_refined_boxes() -> None:
    config = of("vfnet", "ours")
    outputs = outputs_of(config, torch.zeros(1, 1, 1), 0.5, row_of_anchors(1))
    outputs = outputs._replace(refined=torch.tensor([[[10.0, 20, 30, 40]]]))
    assert detect(outputs, SIZES, config).boxes.tolist() == [[[90, 80, 130, 140]]]


def test_legacy_boxes_are_one_pixel_wider() -> None:
    # Widths 21 and 21, 17 shared: 17 * 21 / (2 * 441 - 357) = .68; modern 16 * 20 / (2 * 400 - 320) = .667
    corners = torch.tensor([[0.0, 0, 20, 20], [4.0, 0, 24, 20]])
    grid = AnchorGrid(corners, (corners[:, :2] + corners[:, 2:]) / 2, ((1, 2),), (8,))
    counts = {}
    for geometry in ("modern", "legacy"):
        config = of("atss", "ours", geometry=geometry, nms_iou=0.67)
        outputs = outputs_of(config, torch.tensor([[[1.0], [0.5]]]), 0.5, grid)
        counts[geometry] = detect(outputs, torch.tensor([[100, 100]]), config).valid.sum().item()
    assert counts == {"modern": 2, "legacy": 1}


# a slow, obvious twin


def random_outputs(config: Config) -> tuple[Outputs, Tensor]:
    generator = torch.Generator().manual_seed(3)
    grid = anchor_grid(level_shapes((64, 64)), GEOMETRIES[config.geometry])
    shape = (2, len(grid.boxes))
    regression, refined = (torch.randn(*shape, WIDTHS[config.host], generator=generator) for _ in range(2))
    if config.host == "vfnet":
        regression, refined = (32 * part.div(2).exp() for part in (regression, refined))
    elif config.host != "atss":
        regression = 3 * regression - torch.arange(17).repeat(4)  # boxes of a few strides
    branch = torch.randn(shape, generator=generator)
    logits = torch.randn(*shape, 3, generator=generator) * 2 - 2
    return Outputs(
        logits,
        regression,
        branch if config.host in ("atss", "gflv2") else None,
        refined if config.host == "vfnet" else None,
        grid,
    ), torch.tensor([[64, 64], [40, 52]])


def slow_box(outputs: Outputs, image: int, anchor: int, stride: int, size: Tensor, config: Config) -> Tensor:
    grid, row = outputs.grid, outputs.regression[image, anchor]
    geometry = GEOMETRIES[config.geometry]
    x, y = grid.points[anchor]
    if config.host == "atss":
        box = decode_deltas(grid.boxes[anchor], row, geometry, config.profile != "official")
    else:
        sides = list(row if outputs.refined is None else outputs.refined[image, anchor])
        if config.host != "vfnet":
            sides = [(side.softmax(0) * torch.arange(17)).sum() * stride for side in row.split(17)]
        box = torch.stack([x - sides[0], y - sides[1], x + sides[2], y + sides[3]])
    return clip_boxes(box[None, None], size[None], geometry)[0, 0]


def slow_detect(outputs: Outputs, sizes: Tensor, config: Config) -> list[list[tuple[float, int, Tensor]]]:
    """Spec sections 2 and 5 in loops over images, levels, anchors, classes and boxes."""
    geometry, results = GEOMETRIES[config.geometry], []
    authors = config.profile == "official"
    by_location = authors and config.host != "atss"
    for image, size in enumerate(sizes):
        rows: list[tuple[float, int, Tensor]] = []
        start = 0
        for count, stride in zip(outputs.grid.level_sizes, outputs.grid.strides, strict=True):
            level: list[tuple[float, float, int, int]] = []  # rank, score, label, anchor
            for anchor in range(start, start + count):
                p = outputs.logits[image, anchor].sigmoid()
                branch = 1.0 if outputs.quality is None else float(outputs.quality[image, anchor].sigmoid())
                if config.host == "gflv2":
                    p, branch = p * branch, 1.0
                best = float(p.max())
                for label, value in enumerate(p.tolist()):
                    score = value * branch
                    rank = value if config.host == "atss" and config.profile == "mmdet" else score
                    if config.host == "atss" and config.profile != "mmdet":
                        score = score**0.5
                    if by_location:
                        rank = best
                    if by_location or value > config.score_threshold:
                        level.append((rank, score, label, anchor))
            level.sort(key=lambda row: -row[0])
            level = level[: config.pre_nms_top * (3 if by_location else 1)]  # a location has three rows
            for _, score, label, anchor in level:
                if by_location and not score > config.score_threshold:
                    continue
                box = slow_box(outputs, image, anchor, stride, size, config)
                if authors or bool((box[2:] > box[:2]).all()):
                    rows.append((score, label, box))
            start += count
        rows.sort(key=lambda row: -row[0])
        kept: list[tuple[float, int, Tensor]] = []
        for row in rows:
            if all(k[1] != row[1] or box_iou(k[2], row[2], geometry) <= config.nms_iou for k in kept):
                kept.append(row)
        results.append(kept[: config.max_detections])
    return results


@pytest.mark.parametrize("config", EVERY, ids=named)
def test_equals_a_loop(config: Config) -> None:
    config = replace(config, pre_nms_top=20, max_detections=15)
    outputs, sizes = random_outputs(config)
    found = detect(outputs, sizes, config)
    for image, expected in enumerate(slow_detect(outputs, sizes, config)):
        valid = found.valid[image]
        assert len(expected) > 5
        assert found.labels[image][valid].tolist() == [label for _, label, _ in expected]
        torch.testing.assert_close(found.scores[image][valid], torch.tensor([score for score, _, _ in expected]))
        boxes = torch.stack([box for _, _, box in expected])
        torch.testing.assert_close(found.boxes[image][valid], boxes, rtol=0, atol=1e-3)


@pytest.mark.parametrize("config", EVERY, ids=named)
def test_each_image_is_its_own(config: Config) -> None:
    outputs, sizes = random_outputs(config)
    both = detect(outputs, sizes, config)
    for image in (0, 1):
        logits, regression, quality, refined = (
            None if part is None else part[image : image + 1] for part in outputs[:4]
        )
        assert logits is not None
        assert regression is not None
        one = detect(Outputs(logits, regression, quality, refined, outputs.grid), sizes[image : image + 1], config)
        valid = both.valid[image]
        assert torch.equal(one.scores[0], both.scores[image][valid])
        torch.testing.assert_close(one.boxes[0], both.boxes[image][valid], rtol=0, atol=1e-4)


@pytest.mark.parametrize("host", HOSTS)
def test_half_precision_outputs(host: str) -> None:
    config = of(host, "ours")
    outputs = outputs_of(config, torch.tensor([[[2.0], [1.0], [-1.0]]]), 0.5, row_of_anchors(3))
    logits, regression, quality, refined = (None if part is None else part.bfloat16() for part in outputs[:4])
    assert logits is not None
    assert regression is not None
    found = detect(Outputs(logits, regression, quality, refined, outputs.grid), SIZES, config)
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    assert found.valid.sum().item() == 3


# Combined IoUs at test


@pytest.mark.parametrize(
    ("plain", "combined"),
    [
        ("atss_qfl_r50_1x", "combined_qfl"),
        ("atss_r50_1x", "weights_up_down"),
        ("gflv2_r50_1x", "gflv2_combined_r50_1x"),
        ("vfnet_r50_1x", "vfnet_combined_r50_1x"),
    ],
)
def test_inference_is_that_of_the_host(plain: str, combined: str) -> None:
    # the paper, section 4: no cost at test. The same modules, the same weights from a seed, the same detections.
    found = []
    for preset in (plain, combined):
        config = replace(
            PRESETS[preset],
            backbone="resnet18",
            backbone_weights="none",
            frozen_stages=0,
            channels=64,
            score_threshold=0.005,
        )
        torch.manual_seed(0)
        model = DynamicATSS(config, 3).eval()
        images = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
        sizes = torch.tensor([[64, 96], [60, 80]])
        with torch.no_grad():
            outputs = model(images, sizes)
        found.append((model.state_dict(), outputs, detect(outputs, sizes, config)))
    (weights, outputs, detections), (other_weights, other_outputs, other_detections) = found
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    for one, other in zip(outputs[:4], other_outputs[:4], strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    assert detections.valid.any()
    assert all(torch.equal(one, other) for one, other in zip(detections, other_detections, strict=True))
