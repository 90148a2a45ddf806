"""100,000 random and extreme boxes and scores: losses and gradients are finite, in float32 and from bfloat16."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dynamic_atss.losses
import paa.losses
import padet.losses
import tood_tal.losses
from core import boxes, losses
from core.anchors import AnchorGrid, anchor_grid, level_shapes
from core.geometry import LEGACY, MODERN
from core.types import Targets
from dynamic_atss.config import PRESETS as DYNAMIC
from dynamic_atss.model import Outputs as DynamicOutputs
from paa.config import PRESETS as PAA
from paa.model import Outputs as PAAOutputs
from padet.anchors import build_anchors
from padet.coder import decode, encode
from padet.config import PRESETS as PADET
from padet.model import Outputs as PADetOutputs
from tood_tal.config import PRESETS as TOOD
from tood_tal.model import Outputs as TOODOutputs

COUNT = 100_000
IMAGES, CLASSES = 4, 3
CANVAS = (1088, 1216)  # times four images: 110,568 anchors
UNIT = torch.tensor([0.0, 0.0, 1.0, 1.0])
TYPES = (torch.float32, torch.bfloat16)


def extreme(*shape: int, seed: int, largest: float = 1e5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of both signs and of every order from 1e-8 to `largest`, and one in eight exactly 0 or `largest`."""
    generator = torch.Generator().manual_seed(seed)
    top = torch.tensor(largest).log10()
    sizes = 10 ** (torch.rand(shape, generator=generator) * (top + 8) - 8)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    special = torch.randint(0, 16, shape, generator=generator)
    values = torch.where(special == 0, 0.0, torch.where(special == 1, largest, sizes)) * signs
    return values.to(dtype)


def extreme_boxes(*shape: int, seed: int, dtype: torch.dtype = torch.float32, turned: bool = False) -> Tensor:
    """Boxes anywhere, without extent up to 1e5 pixels wide; with `turned` some have their right corner on the left."""
    corners, sides = extreme(*shape, 2, seed=seed), extreme(*shape, 2, seed=seed + 1)
    return torch.cat([corners, corners + (sides if turned else sides.abs())], dim=-1).to(dtype)


def assert_finite(terms: dict[str, Tensor], leaves: list[Tensor]) -> None:
    for name, term in terms.items():
        assert term.isfinite().all(), name
    used = [leaf for leaf in leaves if leaf.requires_grad]
    total = sum(term.float().mean() for name, term in terms.items() if name.startswith("loss"))
    assert isinstance(total, Tensor)
    gradients = torch.autograd.grad(total, used, allow_unused=True)
    for index, gradient in enumerate(gradients):
        assert gradient is None or gradient.isfinite().all(), f"gradient of input {index}"
    assert any(gradient is not None and gradient.any() for gradient in gradients)


BOX_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "giou": losses.giou_loss,
    "giou, floor": lambda a, b: losses.giou_loss(a, b, eps=1e-6, floor=True),
    "iou": losses.iou_loss,
    "deltas, modern": lambda a, b: boxes.decode_deltas(b, a / 1e3, MODERN),
    "deltas, legacy, upper": lambda a, b: boxes.decode_deltas(b, a / 1e3, LEGACY, False),
    "padet's coder": lambda a, b: F.smooth_l1_loss(a, encode(b.float() + UNIT, b.float() + UNIT * 2), reduction="none"),
    "padet's decoder": lambda a, b: decode(b.float() + UNIT, a / 1e3),
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", BOX_LOSSES)
def test_losses_of_boxes(name: str, dtype: torch.dtype) -> None:
    predicted = extreme_boxes(COUNT, seed=1, dtype=dtype, turned=True).requires_grad_()
    objects = extreme_boxes(COUNT, seed=3, dtype=dtype)
    objects[: COUNT // 4] = predicted[: COUNT // 4].detach()  # the very same boxes
    objects = torch.cat([objects[:, :2], torch.maximum(objects[:, :2], objects[:, 2:])], dim=-1)
    assert_finite({"loss": BOX_LOSSES[name](predicted, objects)}, [predicted])


@pytest.mark.parametrize("geometry", [MODERN, LEGACY])
def test_targets_of_boxes(geometry: Any) -> None:
    objects, anchors = extreme_boxes(COUNT, seed=5), extreme_boxes(COUNT, seed=7)
    centerness = losses.centerness_target(extreme(COUNT, 2, seed=9), objects)
    assert ((centerness >= 0) & (centerness <= 1)).all()
    ious = boxes.box_iou(objects, anchors, geometry)
    assert ((ious >= 0) & (ious <= 1 + 1e-6)).all()


SCORE_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "focal": lambda x, q, hit: losses.sigmoid_focal_loss(x, hit.float()),
    "summed focal": lambda x, q, hit: losses.summed_focal_loss(x[:, None].expand(-1, 3), hit.long() * 2 - 1),
    "quality focal": lambda x, q, hit: losses.quality_focal_loss(x, q),
    "quality focal of scores": lambda x, q, hit: losses.quality_focal_loss_of_scores(x.float().sigmoid(), q),
    "varifocal": losses.varifocal_loss,
    "distribution focal": lambda x, q, hit: losses.distribution_focal_loss(
        x[:, None] * torch.linspace(-1, 1, 17).to(x.dtype), q * 15.99
    ),
    "TOOD's": lambda x, q, hit: tood_tal.losses.focal_loss_of_scores(
        x.float().sigmoid()[:, None].expand(-1, 3), hit.long() * 2 - 1, q, weighted=True
    ),
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", SCORE_LOSSES)
def test_losses_of_scores(name: str, dtype: torch.dtype) -> None:
    logits = extreme(COUNT, seed=11, largest=1e4, dtype=dtype).requires_grad_()
    qualities = extreme(COUNT, seed=13, largest=1.0).abs().clamp(max=1)
    hit = torch.rand(COUNT, generator=torch.Generator().manual_seed(15)) < 0.3
    assert_finite({"loss": SCORE_LOSSES[name](logits, qualities * hit, hit)}, [logits])


def grid() -> AnchorGrid:
    return anchor_grid(level_shapes(CANVAS))


def targets(size: tuple[int, int]) -> Targets:
    """Objects tiny, huge, on the border, far outside, two of them equal; some of a usual size in half of the images."""
    generator = torch.Generator().manual_seed(17)
    corners = torch.rand(IMAGES, 24, 2, generator=generator) * torch.tensor([size[1], size[0]])
    sides = 10 ** (torch.rand(IMAGES, 24, 2, generator=generator) * 6 - 3)
    found = torch.cat([corners, corners + sides], dim=-1)
    found[:, 0] = torch.tensor([0.0, 0.0, size[1], size[0]])
    found[:, 1] = found[:, 2]
    found[:, 3] = torch.tensor([-1e5, -1e5, 1e5, 1e5])
    found[:, 4] = torch.tensor([1e5, 1e5, 1e5 + 10, 1e5 + 10])
    found[::2, 5:12] = torch.cat([corners, corners + 30 + sides.clamp(max=300)], dim=-1)[::2, 5:12]
    valid = torch.rand(IMAGES, 24, generator=generator) < 0.8
    valid[-1] = False  # an image without objects
    labels = torch.randint(0, CLASSES, (IMAGES, 24), generator=generator)
    found, labels = torch.where(valid[..., None], found, 0.0), torch.where(valid, labels, 0)
    return Targets(found, labels, valid, torch.tensor([size] * IMAGES))


def leaves(dtype: torch.dtype, largest: float, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Extreme outputs of a network that take gradients."""
    made = enumerate(shapes)
    return [extreme(*shape, seed=19 + i, largest=largest, dtype=dtype).requires_grad_() for i, shape in made]


def paa_case(preset: str, dtype: torch.dtype) -> tuple[Any, list[Tensor], Any]:
    anchors, config = grid(), PAA[preset]
    count = len(anchors.boxes)
    logits, deltas, quality = made = leaves(dtype, 1e3, (IMAGES, count, CLASSES), (IMAGES, count, 4), (IMAGES, count))
    return PAAOutputs(logits, deltas, quality, anchors), made, (paa.losses.compute_losses, config)


def dynamic_case(preset: str, dtype: torch.dtype) -> tuple[Any, list[Tensor], Any]:
    anchors, config = grid(), DYNAMIC[preset]
    count, host = len(anchors.boxes), config.host
    width = 68 if host in ("gfl", "gflv2") else 4
    logits, regression, quality, refined = leaves(
        dtype, 1e3, (IMAGES, count, CLASSES), (IMAGES, count, width), (IMAGES, count), (IMAGES, count, 4)
    )
    if host == "vfnet":  # distances are above 0 by construction
        regression, refined = (part.detach().abs().requires_grad_() for part in (regression, refined))
    made = [logits, regression]
    has_quality = host in ("atss", "gflv2")
    made += [quality] if has_quality else [refined] if host == "vfnet" else []
    outputs = DynamicOutputs(
        logits, regression, quality if has_quality else None, refined if host == "vfnet" else None, anchors
    )
    return outputs, made, (dynamic_atss.losses.compute_losses, config)


def tood_case(preset: str, dtype: torch.dtype) -> tuple[Any, list[Tensor], Any]:
    anchors, config = grid(), TOOD[preset]
    count, parallel = len(anchors.boxes), config.head == "parallel"
    logits, moves, quality = leaves(dtype, 1e3, (IMAGES, count, CLASSES), (IMAGES, count, 4), (IMAGES, count))
    precise = logits.float()  # the head itself gives scores and boxes in float32
    found = moves.float() + torch.cat([anchors.points, anchors.points + 8], dim=-1)[None] / 8
    branch = quality if config.quality == "centerness" else None
    outputs = TOODOutputs(precise.sigmoid(), found, precise if parallel else None, branch, anchors)
    return outputs, [logits, moves, quality], (tood_tal.losses.compute_losses, config)


def padet_case(preset: str, dtype: torch.dtype) -> tuple[Any, list[Tensor], Any]:
    config = replace(PADET[preset], size=512)
    anchors = build_anchors(512, config.anchors)
    count = len(anchors.boxes)
    shapes = (IMAGES, count), (IMAGES, count, 4), (IMAGES, count, CLASSES + 1), (IMAGES, count, 4)
    scores, moves, logits, deltas = made = leaves(dtype, 1e3, *shapes)
    outputs = PADetOutputs(
        scores if config.apm_score else None, moves if config.apm_box else None, logits, deltas, (), anchors
    )
    return outputs, made, (padet.losses.compute_losses, config)


CASES = [
    *((paa_case, preset) for preset in ("r50_1p5x", "scheme_d", "hard_iou", "atss_centerness")),
    *((dynamic_case, preset) for preset in ("r50_1x", "combined", "gflv2_combined_r50_1x", "vfnet_combined_r50_1x")),
    *((tood_case, preset) for preset in ("r50_1x", "parallel_atss", "parallel_tal", "t_head_atss")),
    *((padet_case, preset) for preset in ("vgg16_384", "baseline_mined")),
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("case", "preset"), CASES)
def test_losses_of_methods(case: Any, preset: str, dtype: torch.dtype) -> None:
    wanted = targets((512, 512) if case is padet_case else CANVAS)
    for step in (1, 100) if case is tood_case else (1,):  # both phases
        outputs, made, (compute_losses, config) = case(preset, dtype)
        terms = compute_losses(outputs, wanted, step, 100, config=config)
        assert_finite(terms, made)
