"""The losses of every host: worked numbers, loops over anchors, padding, ranks, no objects, one graph, no waiting."""

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.anchors import AnchorGrid, anchor_grid, anchors_inside, level_shapes
from core.geometry import GEOMETRIES, LEGACY, MODERN
from core.types import BACKGROUND, IGNORED, Assignment, Targets
from dynamic_atss.assigner import assign_combined
from dynamic_atss.config import PRESETS, Config
from dynamic_atss.losses import assign, assigned_losses, box_loss, compute_losses, divisors, unmatched_fraction
from dynamic_atss.model import Outputs, build_head, run_head
from tests.core.operators import Recorder

LN2 = math.log(2)
HOSTS = ["atss", "gfl", "gflv2", "vfnet"]
PROFILES = ["ours", "mmdet", "official"]
CENTERNESS = PRESETS["combined_qfl"]


def of(host: str, **changes: Any) -> Config:
    return Config(**{"host": host, **changes})


def with_parts(outputs: Outputs, parts: Iterable[Tensor | None]) -> Outputs:
    """The outputs with other logits, regression, quality and refined distances."""
    logits, regression, quality, refined = parts
    assert logits is not None
    assert regression is not None
    return Outputs(logits, regression, quality, refined, outputs.grid)


def on_anchors(config: Config, anchors: list[list[float]], gts: list[list[float]]) -> tuple[Outputs, Targets]:
    """An image with these anchors alone, all on P3; every output says as little as it can.

    Zero logits; the boxes of the ATSS host are the anchors, those of the others reach 8 strides to each side.
    """
    boxes = torch.tensor(anchors)
    grid = AnchorGrid(boxes, (boxes[:, :2] + boxes[:, 2:]) / 2, ((1, len(boxes)),), (8,))
    targets = Targets(
        torch.tensor([gts]),
        torch.arange(len(gts))[None],
        torch.ones(1, len(gts), dtype=torch.bool),
        torch.tensor([[64, 64]]),
    )
    return plain_outputs(config, grid, 1), targets


def plain_outputs(config: Config, grid: AnchorGrid, batch: int) -> Outputs:
    """The outputs of `on_anchors` for any grid and two classes."""
    anchors = len(grid.boxes)
    widths = {"atss": 4, "gfl": 68, "gflv2": 68, "vfnet": 4}
    regression = torch.zeros(batch, anchors, widths[config.host])
    if config.host == "vfnet":
        sizes = [8.0 * stride for size, stride in zip(grid.level_sizes, grid.strides, strict=True) for _ in range(size)]
        regression += torch.tensor(sizes)[:, None]
    quality = torch.zeros(batch, anchors) if config.host in ("atss", "gflv2") else None
    refined = regression.clone() if config.host == "vfnet" else None
    return Outputs(torch.zeros(batch, anchors, 2), regression, quality, refined, grid)


def learning(targets: Targets, gt_index: list[int]) -> Assignment:
    """An assignment as told."""
    index = torch.tensor([gt_index])
    return Assignment(index, torch.where(index >= 0, targets.labels[0][index.clamp(min=0)], index))


# worked numbers


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("qfl", 0.582244),  # .3^2 ln 2 + 3 * .5^2 ln 2
        ("vfl", 0.8 * LN2 + 3 * 0.75 * 0.25 * LN2),
        ("focal", 0.25 * 0.25 * LN2 + 3 * 0.75 * 0.25 * LN2),
    ],
)
def test_class_loss_by_hand(kind: str, expected: float) -> None:
    # Check 12: two classes, a positive whose box has IoU .8 with its object, and a negative.
    config = Config(class_loss=kind)  # type: ignore[arg-type]
    outputs, targets = on_anchors(config, [[0.0, 0, 10, 10], [40.0, 40, 50, 50]], [[0.0, 0, 10, 8]])
    losses = assigned_losses(outputs, targets, learning(targets, [0, -1]), config)
    assert losses["loss_cls"].item() == pytest.approx(expected, abs=1e-6)
    assert losses["positives"].item() == 1
    assert losses["unmatched"].item() == 0


def test_box_and_branch_loss_by_hand() -> None:
    # Check 13: q = (1/7, 1), GIoU losses (1.079365, 0): .142857 * 1.079365 / 1.142857 = .134921, twice that; ln 2.
    config = Config()
    boxes = [[0.0, 0, 10, 10], [40.0, 40, 50, 50]]
    outputs, targets = on_anchors(config, boxes, [[5.0, 5, 15, 15], boxes[1]])
    losses = assigned_losses(outputs, targets, learning(targets, [0, 1]), config)
    assert losses["loss_box"].item() == pytest.approx(0.269841, abs=1e-6)
    assert losses["loss_iou"].item() == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize(("geometry", "iou"), [("modern", 0.142857), ("legacy", 0.174757)])
def test_the_branch_learns_the_iou_of_its_geometry(geometry: str, iou: float) -> None:
    # Check 9: 25 / 175 or 36 / 206. At logit 1 the cross entropy is ln(1 + e) - q; classes: |q - .5|^2 BCE.
    config = Config(geometry=geometry)  # type: ignore[arg-type]
    outputs, targets = on_anchors(config, [[0.0, 0, 10, 10]], [[5.0, 5, 15, 15]])
    assert outputs.quality is not None
    outputs = outputs._replace(quality=outputs.quality + 1)
    losses = assigned_losses(outputs, targets, learning(targets, [0]), config)
    assert losses["loss_iou"].item() == pytest.approx(math.log(1 + math.e) - iou, abs=1e-6)
    assert losses["loss_cls"].item() == pytest.approx((iou - 0.5) ** 2 * LN2 + 0.25 * LN2, abs=1e-6)


def test_centerness_by_hand() -> None:
    # Check 14: l, t, r, b = 10, 20, 30, 20 from the anchor's centre: sqrt(10 / 30 * 20 / 20) = .577350. The weight of
    # the box is the centre-ness too, and 1 for the second, whose GIoU loss is 0: 2 * .57735 * giou / 1.57735.
    # The first object is [-10, -20, 30, 20]: IoU with [-5, -5, 5, 5] is 100 / 1600 and it encloses it.
    outputs, targets = on_anchors(
        CENTERNESS, [[-5.0, -5, 5, 5], [40.0, 40, 50, 50]], [[-10.0, -20, 30, 20], [40.0, 40, 50, 50]]
    )
    assert outputs.quality is not None
    outputs = outputs._replace(quality=outputs.quality + 1)
    losses = assigned_losses(outputs, targets, learning(targets, [0, 1]), CENTERNESS)
    expected = math.log(1 + math.e) - (0.577350 + 1) / 2
    assert losses["loss_centerness"].item() == pytest.approx(expected, abs=1e-6)
    box = 2 * 0.577350 * (1 - 1 / 16) / 1.577350
    assert losses["loss_box"].item() == pytest.approx(box, abs=1e-6)


@pytest.mark.parametrize("host", ["gfl", "gflv2", "vfnet"])
def test_hosts_start_with_an_iou_of_a_quarter(host: str) -> None:
    # Check 18: the box is 128 x 128 around the object's 64 x 64, GIoU loss .75. Two classes, two anchors, one positive.
    # GFL: |.25 - .5|^2 ln 2 + 3 * .25 ln 2; u = .5 cancels; 2 * .75; DFL .25 * ln 17.
    # GFLV2: J = .25 = q loses nothing; 3 * .25^2 * -ln .75. VFNet: .25 ln 2 + 3 * .75 * .25 ln 2; the IoUs' sum is
    # raised to 1: 1.5 * .25 * .75, 2 * .25 * .75.
    expected = {
        "gfl": {"loss_cls": LN2 / 16 + 0.75 * LN2, "loss_box": 1.5, "loss_dfl": 0.25 * 2.833213},
        "gflv2": {"loss_cls": -3 / 16 * math.log(0.75), "loss_box": 1.5, "loss_dfl": 0.25 * 2.833213},
        "vfnet": {"loss_cls": LN2 / 4 + 9 / 16 * LN2, "loss_first": 1.5 * 3 / 16, "loss_box": 2 * 3 / 16},
    }
    box = [[100.0, 100, 164, 164]]
    outputs, targets = on_anchors(of(host), [*box, [300.0, 300, 364, 364]], box)
    losses = assigned_losses(outputs, targets, learning(targets, [0, -1]), of(host))
    found = {name: value.item() for name, value in losses.items() if name.startswith("loss")}
    assert found == pytest.approx(expected[host], abs=1e-5)


@pytest.mark.parametrize(("strides", "expected"), [(20.0, 2.123158), (-3.0, 3.223158)])
def test_distances_of_distributions_are_clamped(strides: float, expected: float) -> None:
    # Check 15: 20 strides become 15.9, weights .1 and .9 on bins 15 and 16; logits 2 and 1 there, Z = e^2 + e + 15 and
    # ln Z = 3.223158: .1 * 1.223158 + .9 * 2.223158. A side behind the point becomes 0: bin 0 alone, ln Z.
    config = of("gfl")
    half = 8 * abs(strides)
    gt = [-half, -half, half, half] if strides > 0 else [half, half, 9 * half, 9 * half]  # l, t below 0; r, b above
    outputs, targets = on_anchors(config, [[-32.0, -32, 32, 32]], [gt])
    bins = torch.zeros(1, 1, 4, 17)
    bins[..., 15], bins[..., 16] = 2.0, 1.0
    losses = assigned_losses(outputs._replace(regression=bins.flatten(2)), targets, learning(targets, [0]), config)
    sides = [expected] * 4 if strides > 0 else [expected] * 2 + [2.123158] * 2
    assert losses["loss_dfl"].item() == pytest.approx(0.25 * sum(sides) / 4, abs=1e-6)


@pytest.mark.parametrize("stride", [8, 32])
def test_distributions_are_in_strides_of_their_level(stride: int) -> None:
    # Three strides to each side; logit 2 at bin 3, else 0: ln(e^2 + 16) - 2 = 1.152267, of which a quarter.
    config, reach = of("gfl"), 3.0 * stride
    outputs, targets = on_anchors(config, [[-32.0, -32, 32, 32]], [[-reach, -reach, reach, reach]])
    bins = torch.zeros(1, 1, 4, 17)
    bins[..., 3] = 2.0
    outputs = outputs._replace(regression=bins.flatten(2), grid=outputs.grid._replace(strides=(stride,)))
    losses = assigned_losses(outputs, targets, learning(targets, [0]), config)
    assert losses["loss_dfl"].item() == pytest.approx(0.25 * 1.152267, abs=1e-6)


def test_a_positive_without_overlap() -> None:
    # q = 0: quality focal loss learns it as a negative, varifocal not at all; VFNet raises its IoU to 1e-6 first.
    anchors, gts = [[0.0, 0, 64, 64]], [[900.0, 900, 964, 964]]
    negative = 0.75 * 0.25 * LN2
    for config, expected in (
        (Config(), 2 * 0.25 * LN2),
        (Config(class_loss="vfl"), negative),
        (of("vfnet"), negative + 1e-6 * LN2),
    ):
        outputs, targets = on_anchors(config, anchors, gts)
        losses = assigned_losses(outputs, targets, learning(targets, [0]), config)
        assert losses["loss_cls"].item() == pytest.approx(expected, abs=2e-8)
        assert losses["loss_box"].item() == pytest.approx(0, abs=1e-5)
    assert losses["loss_box"].item() > 1e-6  # 2 * 1e-6 * a GIoU loss between 1 and 2


# slow, obvious twins


def random_case(config: Config, counts: list[int], seed: int) -> tuple[Outputs, Targets]:
    """Float64 leaves on a canvas of 64 x 96 pixels; the second image is 33 x 40, so 64 x 64 with its own padding."""
    generator = torch.Generator().manual_seed(seed)
    grid = anchor_grid(level_shapes((64, 96)), config.box_geometry)
    shape = (len(counts), len(grid.boxes))

    def leaf(*width: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, *width, generator=generator, dtype=torch.float64) * scale).requires_grad_()

    plain = plain_outputs(config, grid, len(counts))
    regression = leaf(plain.regression.shape[-1])
    refined = None
    if config.host == "vfnet":  # distances around a quarter of the start's
        regression, refined = (
            (plain.regression / 4 * leaf(4, scale=0.5).exp()).detach().requires_grad_() for _ in range(2)
        )
    quality = None if plain.quality is None else leaf()
    slots = max([*counts, 1])
    centres = torch.rand(len(counts), slots, 2, generator=generator) * 60
    halves = 6 + 30 * torch.rand(len(counts), slots, 2, generator=generator)
    valid = torch.arange(slots) < torch.tensor(counts)[:, None]
    boxes = torch.cat([centres - halves, centres + halves], dim=-1) * valid[..., None]
    labels = torch.randint(3, (len(counts), slots), generator=generator) * valid
    sizes = torch.tensor([[64, 96], [33, 40]])[: len(counts)]
    return Outputs(leaf(3), regression, quality, refined, grid), Targets(boxes, labels, valid, sizes)


def twin_stride(grid: AnchorGrid, anchor: int) -> int:
    owners = [stride for size, stride in zip(grid.level_sizes, grid.strides, strict=True) for _ in range(size)]
    return owners[anchor]


def twin_box(config: Config, grid: AnchorGrid, anchor: int, row: Tensor) -> Tensor:
    """The box of one anchor (spec sections 0, 5.1, 5.2)."""
    x, y = grid.points[anchor].double()
    if config.host == "atss":
        x1, y1, x2, y2 = grid.boxes[anchor].double()
        one = GEOMETRIES[config.geometry].plus_one
        width, height = x2 - x1 + one, y2 - y1 + one
        x, y = x + 0.1 * row[0] * width, y + 0.1 * row[1] * height
        right, bottom = ((side * (0.2 * size).exp() - one) / 2 for side, size in ((width, row[2]), (height, row[3])))
        return torch.stack([x - right, y - bottom, x + right, y + bottom])
    sides = list(row)
    if config.host != "vfnet":
        stride = twin_stride(grid, anchor)
        sides = [sum(i * p for i, p in enumerate(side.softmax(0))) * stride for side in row.split(17)]
    return torch.stack([x - sides[0], y - sides[1], x + sides[2], y + sides[3]])


def twin_ious(a: Tensor, b: Tensor, one: float) -> tuple[Tensor, Tensor]:
    """IoU with the geometry's one, and GIoU without."""

    def area(width: Tensor, height: Tensor) -> Tensor:
        return width.clamp(min=0) * height.clamp(min=0)

    def iou(plus: float) -> tuple[Tensor, Tensor]:
        overlap = area(*(torch.minimum(a[i + 2], b[i + 2]) - torch.maximum(a[i], b[i]) + plus for i in (0, 1)))
        union = sum(area(box[2] - box[0] + plus, box[3] - box[1] + plus) for box in (a, b)) - overlap
        return overlap / union, union

    plain, union = iou(0.0)
    enclosing = area(*(torch.maximum(a[i + 2], b[i + 2]) - torch.minimum(a[i], b[i]) for i in (0, 1)))
    return iou(one)[0].detach(), plain - (enclosing - union) / enclosing


def cross_entropy(p: Tensor, q: Tensor | float) -> Tensor:
    return -(q * p.log() + (1 - q) * (1 - p).log())


def twin_class_loss(scores: Tensor, label: int, q: Tensor | float, kind: str) -> Tensor:
    """All columns of one anchor (spec section 2); label -1: all negative."""
    total = torch.zeros((), dtype=torch.float64)
    for column, p in enumerate(scores):
        mine = column == label
        if kind == "focal":
            total = total - (0.25 * (1 - p) ** 2 * p.log() if mine else 0.75 * p**2 * (1 - p).log())
        elif kind == "qfl":
            total = total + ((q - p).abs() ** 2 * cross_entropy(p, q) if mine else -(p**2) * (1 - p).log())
        else:
            total = total + (q * cross_entropy(p, q) if mine else -0.75 * p**2 * (1 - p).log())
    return total


def twin_centerness(point: Tensor, gt: Tensor) -> float:
    left, top, right, bottom = (float(side) for side in (*(point - gt[:2]), *(gt[2:] - point)))
    return math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))


def twin_losses(outputs: Outputs, targets: Targets, assignment: Assignment, config: Config) -> dict[str, Tensor]:
    """Spec sections 2, 5.1 and 5.2, image by image and anchor by anchor."""
    host, profile, one = config.host, config.profile, GEOMETRIES[config.geometry].plus_one
    kind = {"atss": config.class_loss, "gfl": "qfl", "gflv2": "qfl", "vfnet": "vfl"}[host]
    terms = {name: [torch.zeros((), dtype=torch.float64)] for name in ("cls", "first", "box", "dfl", "branch")}
    sums, counts = {"first": 0.0, "box": 0.0}, []
    for image, index in enumerate(assignment.gt_index.tolist()):
        counts.append(sum(g >= 0 for g in index))
        for anchor, g in enumerate(index):
            scores = outputs.logits[image, anchor].sigmoid()
            if host == "gflv2" and outputs.quality is not None:
                scores = scores * outputs.quality[image, anchor].sigmoid()
            if g == IGNORED and host != "vfnet":
                continue
            if g < 0:
                terms["cls"].append(twin_class_loss(scores, -1, 0.0, kind))
                continue
            gt, label = targets.boxes[image, g].double(), int(targets.labels[image, g])
            point = outputs.grid.points[anchor].double()
            final = outputs.regression if outputs.refined is None else outputs.refined
            iou, giou = twin_ious(twin_box(config, outputs.grid, anchor, final[image, anchor]), gt, one)
            if host == "vfnet":
                iou = iou.clamp(min=1e-6)
                first, first_giou = twin_ious(
                    twin_box(config, outputs.grid, anchor, outputs.regression[image, anchor]), gt, one
                )
                terms["first"].append(1.5 * first.clamp(min=1e-6) * (1 - first_giou))
                sums["first"] += float(first.clamp(min=1e-6))
            weight = iou
            if host == "atss":
                assert outputs.quality is not None
                weight = iou if config.quality == "iou" else torch.tensor(twin_centerness(point, gt))
                terms["branch"].append(cross_entropy(outputs.quality[image, anchor].sigmoid(), weight))
            elif host != "vfnet":
                weight = scores.detach().max()
                bins = outputs.regression[image, anchor].view(4, 17)
                stride = twin_stride(outputs.grid, anchor)
                for side, distance in enumerate([*(point - gt[:2]), *(gt[2:] - point)]):
                    y = min(max(float(distance / stride), 0.0), 15.9)
                    low = math.floor(y)
                    logs = bins[side].softmax(0).log()
                    terms["dfl"].append(-0.25 * weight / 4 * ((low + 1 - y) * logs[low] + (y - low) * logs[low + 1]))
            terms["cls"].append(twin_class_loss(scores, label, iou, kind))
            terms["box"].append(2 * weight * (1 - giou))
            sums["box"] += float(weight)
    each_image = profile == "mmdet" if host == "atss" else host != "vfnet"
    count = max(sum(max(n, 1) for n in counts) if each_image else sum(counts), 1)
    floor = 1.0 if host == "vfnet" or profile == "mmdet" else 1e-6
    total = {name: torch.stack(parts).sum() for name, parts in terms.items()}
    losses = {"loss_cls": total["cls"] / count, "loss_box": total["box"] / max(sums["box"], floor)}
    if host == "atss":
        losses[f"loss_{config.quality}"] = total["branch"] / count
    elif host == "vfnet":
        losses["loss_first"] = total["first"] / max(sums["first"], floor)
    else:
        losses["loss_dfl"] = total["dfl"] / max(sums["box"], floor)
    return losses


VARIANTS = [
    *[
        Config(class_loss=kind, quality=quality)
        for kind in ("focal", "qfl", "vfl")
        for quality in ("centerness", "iou")
    ],
    Config(profile="mmdet"),
    Config(profile="official", geometry="legacy"),
    Config(profile="official", geometry="legacy", quality="centerness"),
    *[of(host, profile=profile) for host in ("gfl", "gflv2", "vfnet") for profile in PROFILES],
]


@pytest.mark.parametrize("counts", [[0, 0], [1, 0], [6, 3]])
@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: f"{c.host}-{c.profile}-{c.class_loss}-{c.quality}")
def test_equals_a_loop_over_anchors(config: Config, counts: list[int]) -> None:
    outputs, targets = random_case(config, counts, seed=sum(counts))
    assignment = assign(outputs, targets, 1, 1, config)
    assert bool(assignment.positive.any()) == (sum(counts) > 0)
    losses = compute_losses(outputs, targets, 1, 1, config=config)
    assert losses.pop("positives").item() == assignment.positive.sum().item() / 2
    learned = [set(row.tolist()) - {BACKGROUND, IGNORED} for row in assignment.gt_index]
    unmatched = sum(counts) - sum(map(len, learned))
    assert losses.pop("unmatched").item() == pytest.approx(unmatched / max(sum(counts), 1))
    expected = twin_losses(outputs, targets, assignment, config)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-7, check_dtype=False)
    leaves = [part for part in outputs[:4] if part is not None]
    ours, theirs = (
        torch.autograd.grad(sum(terms.values(), torch.zeros(())), leaves, retain_graph=True, allow_unused=True)
        for terms in (losses, expected)
    )
    for own, other, leaf in zip(ours, theirs, leaves, strict=True):
        reference = torch.zeros_like(leaf) if other is None else other
        torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("host", HOSTS)
def test_box_loss_of_specks(host: str, profile: str) -> None:
    # Equal boxes of 2^-22 = .23842e-6 square pixels. ATSS's authors add 1e-7: 1 - .23842 / .33842; the others raise
    # both areas to 1e-6: 1 - .23842.
    speck = torch.tensor([[[0.0, 0, 2**-11, 2**-11]]])
    added = host == "atss" and profile != "mmdet"
    found = box_loss(speck, speck, of(host, profile=profile))
    assert found.item() == pytest.approx(0.295495 if added else 0.761581, abs=1e-5)


def test_unmatched_objects_by_hand() -> None:
    # Of 2 + 3 objects two learn from no anchor: the second of the first image and the first of the other one.
    valid = torch.tensor([[True, True, False], [True, True, True]])  # the third slot of the first image is padding
    targets = Targets(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), valid, torch.full((2, 2), 64))
    index = torch.tensor([[0, BACKGROUND, 0, IGNORED], [1, 2, 2, 1]])
    found = unmatched_fraction(Assignment(index, index.clamp(max=0)), targets)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(0.4)


def test_an_object_beyond_the_canvas_is_unmatched() -> None:
    config, grid = Config(), anchor_grid(level_shapes((64, 64)))
    _, targets = on_anchors(config, [[0.0, 0, 8, 8]], [[20.0, 20, 44, 44], [500.0, 500, 510, 510]])
    losses = compute_losses(plain_outputs(config, grid, 1), targets, 1, 1, config=config)
    assert losses["positives"].item() > 0
    assert losses["unmatched"].item() == 0.5


# padding, ranks, nothing to learn


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("host", HOSTS)
def test_anchors_in_the_padding(host: str, profile: str) -> None:
    # MMDetection's hosts leave them out, except VFNet, which learns them as negatives; the authors of ATSS know none.
    config = of(host, profile=profile)
    outputs, targets = random_case(config, [4, 4], seed=1)
    padding = ~anchors_inside(outputs.grid, targets.sizes)
    assert padding.any()
    assignment = assign(outputs, targets, 1, 1, config)
    unmasked = host == "atss" and profile == "official"
    assert bool((assignment.gt_index[padding] == IGNORED).all()) != unmasked
    compute_losses(outputs, targets, 1, 1, config=config)["loss_cls"].backward()
    assert outputs.logits.grad is not None
    learned = outputs.logits.grad[padding].any(dim=-1)
    assert learned.all() if unmasked or host == "vfnet" else not learned.any()


def test_ignored_anchors_do_not_count() -> None:
    # a positive, a negative and an ignored anchor with two classes at logit 0
    for config, elements in ((Config(class_loss="focal"), 3), (of("vfnet"), 5)):
        outputs, targets = on_anchors(config, [[100.0, 100, 164, 164]] * 3, [[100.0, 100, 164, 164]])
        losses = assigned_losses(outputs, targets, learning(targets, [0, BACKGROUND, IGNORED]), config)
        positive = 0.25 * 0.25 * LN2 if config.host == "atss" else 0.25 * LN2
        assert losses["loss_cls"].item() == pytest.approx(positive + elements * 0.75 * 0.25 * LN2, rel=1e-6)


@pytest.mark.parametrize(
    ("host", "profile", "mine", "other", "count", "weights"),
    [
        # 3 and 5 positives on two ranks; weights of .875 and 1
        ("atss", "ours", 3, 5, 4, 0.9375),
        ("atss", "official", 3, 5, 4, 0.9375),
        ("atss", "mmdet", 3, 5, 4, 1),
        ("gflv2", "official", 3, 5, 4, 0.9375),
        ("gflv2", "ours", 3, 5, 4, 0.9375),
        ("vfnet", "ours", 3, 5, 4, 0.9375),  # the sum 1.875 exceeds the floor of 1 ...
        ("vfnet", "official", 3, 5, 4, 1),  # ... the average does not
        # none anywhere: floors shared by the ranks, or each rank's own; GFL counts an image without positives as one
        ("atss", "ours", 0, 0, 0.5, 5e-7),
        ("atss", "official", 0, 0, 1, 1e-12),
        ("atss", "mmdet", 0, 0, 1, 1),
        ("gfl", "ours", 0, 1, 1, 5e-7),
        ("gfl", "official", 0, 1, 1, 1e-12),
        ("vfnet", "ours", 0, 0, 0.5, 0.5),
        ("vfnet", "official", 0, 0, 1, 1),
    ],
)
def test_divisors_of_two_ranks(
    monkeypatch: pytest.MonkeyPatch, host: str, profile: str, mine: int, other: int, count: float, weights: float
) -> None:
    monkeypatch.setattr("dynamic_atss.losses.world_size", lambda: 2)
    theirs = torch.tensor([float(other), float(other > 1), 0.0])
    monkeypatch.setattr("dynamic_atss.losses.sum_over_ranks", lambda sums: sums + theirs)
    _, targets = on_anchors(Config(), [[0.0, 0, 8, 8]], [[0.0, 0, 8, 8]])
    assignment = learning(targets, [0] * mine + [-1] * (6 - mine))
    values = torch.tensor([[0.5, 0.25, 0.125, 0, 0, 0]]) * (mine > 0)
    found = divisors(assignment, (values, values * 0 + 1), of(host, profile=profile))
    assert [part.item() for part in found[:2]] == pytest.approx([count, weights])
    assert found[2].item() == pytest.approx(3)  # every kind of weight has its own sum


@pytest.mark.parametrize("counts", [[5, 2], [5, 0], [0, 3], [0, 0]])
@pytest.mark.parametrize("host", HOSTS)
def test_two_ranks_learn_what_one_does(monkeypatch: pytest.MonkeyPatch, host: str, counts: list[int]) -> None:
    # Each rank has one image. The mean over ranks of losses, logged terms and gradients is that of the whole batch.
    config = of(host)
    outputs, targets = random_case(config, counts, seed=7)
    leaves = [part for part in outputs[:4] if part is not None]

    def terms_and_gradients(part: slice) -> tuple[Tensor, list[Tensor]]:
        own = with_parts(outputs, (None if field is None else field[part] for field in outputs[:4]))
        terms = compute_losses(own, Targets(*(field[part] for field in targets)), 1, 1, config=config)
        loss = torch.stack([value for name, value in terms.items() if name.startswith("loss")]).sum()
        return torch.stack(list(terms.values())), list(torch.autograd.grad(loss, leaves))

    whole, expected = terms_and_gradients(slice(None))
    sums: list[Tensor] = []
    monkeypatch.setattr("dynamic_atss.losses.world_size", lambda: 2)

    def note(own: Tensor) -> Tensor:
        sums.append(own)
        return own

    monkeypatch.setattr("dynamic_atss.losses.sum_over_ranks", note)
    for rank in (0, 1):
        terms_and_gradients(slice(rank, rank + 1))
    # the same sums on the rank without objects: no rank waits for another forever
    totals = [one + two for one, two in zip(sums[: len(sums) // 2], sums[len(sums) // 2 :], strict=True)] * 2
    monkeypatch.setattr("dynamic_atss.losses.sum_over_ranks", lambda own: totals.pop(0))
    values, gradients = zip(*(terms_and_gradients(slice(rank, rank + 1)) for rank in (0, 1)), strict=True)
    assert not totals
    torch.testing.assert_close((values[0] + values[1]) / 2, whole, rtol=1e-6, atol=1e-9)
    for one, two, both in zip(*gradients, expected, strict=True):
        torch.testing.assert_close((one + two) / 2, both, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("objects", [0, 3])
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("host", HOSTS)
def test_no_objects(host: str, profile: str, objects: int) -> None:
    # Check 21: no positives, all-negative class loss divided by 1, other losses exactly 0 with a connected graph.
    config = of(host, profile=profile)
    grid = anchor_grid(level_shapes((32, 32)))
    outputs = plain_outputs(config, grid, 1)
    leaves = [part.requires_grad_() for part in outputs[:4] if part is not None]
    empty = torch.zeros(1, objects)
    targets = Targets(torch.zeros(1, objects, 4), empty.to(torch.int64), empty.to(torch.bool), torch.tensor([[32, 32]]))
    assert not assign(outputs, targets, 1, 1, config).positive.any()
    losses = compute_losses(outputs, targets, 1, 1, config=config)
    element = {"atss": 0.25 * LN2, "gfl": 0.25 * LN2, "gflv2": -math.log(0.75) / 16, "vfnet": 0.75 * 0.25 * LN2}[host]
    assert losses.pop("loss_cls").item() == pytest.approx(2 * 23 * element, rel=1e-5)
    assert all(value.item() == 0 for value in losses.values())
    losses = compute_losses(outputs, targets, 1, 1, config=config)
    sum(losses.values(), torch.zeros(())).backward()
    assert all(leaf.grad is not None and torch.isfinite(leaf.grad).all() for leaf in leaves)
    assert outputs.regression.grad is not None
    assert not outputs.regression.grad.any()


@pytest.mark.parametrize("host", HOSTS)
def test_extreme_outputs_stay_finite(host: str) -> None:
    config = of(host)
    outputs, targets = random_case(config, [3, 2], seed=3)
    for size in (1e4, -1e4):
        extreme = [None if part is None else torch.full_like(part, size).float() for part in outputs[:4]]
        if host == "vfnet":  # distances are exponentials: above 0
            extreme[1] = extreme[3] = torch.full_like(outputs.regression, 1e9 if size > 0 else 1e-9).float()
        leaves = [part.requires_grad_() for part in extreme if part is not None]
        losses = compute_losses(with_parts(outputs, extreme), targets, 1, 1, config=config)
        sum(losses.values(), torch.zeros(())).backward()
        assert all(torch.isfinite(leaf.grad).all() for leaf in leaves if leaf.grad is not None)
        assert all(torch.isfinite(value) for value in losses.values())


@pytest.mark.parametrize("host", HOSTS)
def test_half_precision_outputs_are_cast(host: str) -> None:
    outputs, targets = random_case(of(host), [3, 2], seed=4)
    half = with_parts(outputs, (None if part is None else part.detach().bfloat16() for part in outputs[:4]))
    full = with_parts(outputs, (None if part is None else part.float() for part in half[:4]))
    expected = compute_losses(full, targets, 1, 1, config=of(host))
    for name, value in compute_losses(half, targets, 1, 1, config=of(host)).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name])


# the assignment that the losses ask for


def test_assignment_follows_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def record(*args: Any, **options: Any) -> Assignment:
        seen.update(options, predicted=args[2])
        return assign_combined(*args, **options)

    monkeypatch.setattr("dynamic_atss.losses.assign_combined", record)
    official = replace(PRESETS["weights_up_down"], geometry="legacy", profile="official", topk=5)
    outputs, targets = random_case(official, [2, 1], seed=5)
    assign(outputs, targets, 3, 4, official)
    assert (seen["pred_weight"], seen["anchor_weight"], seen["k"]) == (0.75, 0.25, 5)
    assert (seen["geometry"], seen["anchor_valid"]) == (LEGACY, None)
    assert not seen["predicted"].requires_grad
    assign(outputs, targets, 3, 4, Config(pred_weight=1.5, anchor_weight=0.5))
    assert (seen["pred_weight"], seen["anchor_weight"], seen["k"], seen["geometry"]) == (1.5, 0.5, 9, MODERN)
    assert torch.equal(seen["anchor_valid"], anchors_inside(outputs.grid, targets.sizes))


@pytest.mark.parametrize("host", HOSTS)
def test_combined_ious_change_what_is_learnt(host: str) -> None:
    # Predictions move the positives; with none of their weight the assignment is ATSS's, the same for any prediction.
    first, targets = random_case(of(host), [6, 3], seed=8)
    second, _ = random_case(of(host), [6, 3], seed=9)
    for weight in (0.0, 1.0):
        config = of(host, pred_weight=weight)
        one, two = (assign(outputs, targets, 1, 1, config).gt_index for outputs in (first, second))
        assert torch.equal(one, two) == (weight == 0)


@pytest.mark.parametrize("source", ["refined", "initial"])
def test_the_source_of_vfnets_predicted_ious(source: str) -> None:
    # The other source may say nothing at all: only the chosen boxes move the assignment.
    config = of("vfnet", pred_source=source)
    outputs, targets = random_case(config, [6, 3], seed=8)
    nonsense = torch.full_like(outputs.regression, torch.nan)
    other = outputs._replace(regression=nonsense) if source == "refined" else outputs._replace(refined=nonsense)
    expected = assign(outputs, targets, 1, 1, config)
    assert torch.equal(assign(other, targets, 1, 1, config).gt_index, expected.gt_index)


# speed of a step: no waiting, one graph


def small_step(config: Config) -> tuple[nn.Module, list[Tensor], Targets]:
    """A head of three classes, maps of two images of 64 x 96 pixels and their objects."""
    torch.manual_seed(0)
    head = build_head(replace(config, channels=64), 3)
    maps = [torch.randn(2, 64, *shape) for shape in level_shapes((64, 96))]
    return head, maps, random_case(Config(), [3, 1], seed=2)[1]


def losses_of_step(
    maps: list[Tensor], targets: Targets, step: int, steps: int, *, head: nn.Module, config: Config
) -> dict[str, Tensor]:
    return compute_losses(run_head(head, maps, MODERN, 8.0), targets, step, steps, config=config)


@pytest.mark.parametrize("preset", [None, "predicted_only", "weights_up_down", "atss_r50_1x"])
@pytest.mark.parametrize("host", HOSTS)
def test_training_step_never_waits_for_the_device(host: str, preset: str | None) -> None:
    config = replace(PRESETS[preset] if preset else Config(), host=host)  # type: ignore[arg-type]
    head, maps, targets = small_step(config)
    with Recorder() as recorder:
        losses = losses_of_step(maps, targets, 1, 4, head=head, config=config)
        torch.stack(list(losses.values())).sum().backward()
    assert recorder.waiting == []


@pytest.mark.compiled
@pytest.mark.parametrize("host", HOSTS)
def test_head_assignment_and_losses_are_one_graph(host: str) -> None:
    config = of(host)
    head, maps, targets = small_step(config)
    step = partial(losses_of_step, head=head, config=config)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        for number in (1, 2, 3):  # constant weights: the step's number may change under the same graph
            with torch.compiler.set_stance("fail_on_recompile" if number > 1 else "default"):
                found = compiled(maps, targets, number, 3)
            for name, value in step(maps, targets, number, 3).items():
                torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.compiled
def test_moving_weights_are_not_traced_at_every_step() -> None:
    # The first step, all between, and the last, where an anchor weight of 0 leaves its term out.
    config = PRESETS["weights_up_down"]
    head, maps, targets = small_step(config)
    graphs: list[Any] = []

    def count_graphs(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    step = partial(losses_of_step, head=head, config=config)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=count_graphs)
    with torch.no_grad():
        for number in range(1, 7):  # both weights are equal in the middle
            found = compiled(maps, targets, number, 6)
            for name, value in step(maps, targets, number, 6).items():
                torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert len(graphs) <= 3
