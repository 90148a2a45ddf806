"""Task Alignment Learning against its dense form and against a loop over objects, and what memory it takes.

    python -m benchmarks.speed tood-assign tood-memory tood-loss

The dense form makes anchors x objects matrices of scores, IoUs and metrics for each image, as vectorised as it gets.
The loop takes objects one by one, and the positives of each once more for their targets; its losses are torch's binary
cross entropy on one-hot targets and GIoU of the positives only. Decoding, IoU and GIoU are `core`'s for all.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy

from benchmarks.atss_speed import random_targets
from benchmarks.dynamic_speed import random_predictions
from benchmarks.paa_memory import forget_peak, memory_mb
from benchmarks.paa_speed import half_trained
from core.anchors import anchor_grid, anchor_strides, anchors_inside, level_shapes
from core.boxes import box_iou, centres_inside, decode_deltas
from core.losses import giou_loss
from core.types import BACKGROUND, Targets
from tood_tal.assigner import ALPHA, BETA, EPSILON, TOPK, assign_aligned
from tood_tal.config import Config
from tood_tal.losses import BOX_WEIGHT, GAMMA, GIOU_EPS, compute_losses, learn, pixel_boxes
from tood_tal.model import Outputs

CANVAS = (800, 1344)  # pixels; 22,400 anchors
OBJECTS, MANY_OBJECTS = 300, 5000
LOSS_CANVAS = (800, 1088)
CLASSES = 80
PRIOR = -4.6  # logit of the score 0.01, around which untrained scores lie
THREADS = 2
LOSSES = ("loss_cls", "loss_box")


class Found(NamedTuple):
    """An assignment by another way than ours."""

    gt_index: Int[Tensor, "B A"]  # object, or BACKGROUND
    targets: Float[Tensor, "B A"]  # normalised metric, 0 for background


# Assignment


def tood_assign_case(
    objects: int = OBJECTS, repeats: int = 9, seed: int = 0, canvas: tuple[int, int] = CANVAS
) -> dict[str, Any]:
    """Time `tood_tal.assigner` and the dense form in turn.

    Returns:
        name, what, ours_ms and reference_ms (medians), ratio, ratio_spread (smallest and largest of one turn),
        best_ratio (of the fastest times), equal (the same object for every anchor, targets within 1e-5), positives and
        repeats.
    """
    targets, outputs = random_targets(seed, objects, canvas), random_outputs(canvas, seed, batch=2)
    inputs = outputs.scores, pixel_boxes(outputs), outputs.grid.points, targets
    ours = lambda: assign_aligned(*inputs)  # noqa: E731
    dense = lambda: dense_aligned(*inputs)  # noqa: E731

    def measure() -> tuple[bool, int]:
        found, expected = ours(), dense()
        equal = same(Found(found.assignment.gt_index, found.targets), expected)
        return equal, int(found.assignment.positive.sum())

    (equal, positives), times = _in_turn(measure, ours, dense, repeats)
    return {
        "name": f"tood-assign-{objects}",
        "what": f"TAL's assignment, {len(outputs.scores)} images, {objects} objects each, {len(outputs.grid.boxes)} "
        f"anchors, CPU, {THREADS} threads, eager",
        **times,
        "equal": equal,
        "positives": positives,
        "repeats": repeats,
    }


def random_outputs(canvas: tuple[int, int], seed: int, batch: int = 1) -> Outputs:
    """T-Head's outputs: scores around the prior, a box near every anchor."""
    generator, grid = torch.Generator().manual_seed(seed), anchor_grid(level_shapes(canvas))
    scores = (PRIOR + torch.randn(batch, len(grid.boxes), CLASSES, generator=generator)).sigmoid()
    return Outputs(scores, random_predictions(grid, batch, seed) / anchor_strides(grid)[:, None], None, None, grid)


def same(ours: Found, other: Found) -> bool:
    """Whether two assignments give every anchor the same object, and the same target up to rounding."""
    close = torch.allclose(ours.targets, other.targets, rtol=1e-5, atol=1e-6)
    return close and torch.equal(ours.gt_index, other.gt_index)


def dense_aligned(
    scores: Float[Tensor, "B A C"], boxes: Float[Tensor, "B A 4"], centres: Float[Tensor, "A 2"], targets: Targets
) -> Found:
    """The obvious vectorised TAL of images without padding: whole anchors x objects matrices, torch's topk."""
    images = zip(scores, boxes, targets.boxes, targets.labels, strict=True)
    return Found(
        *(torch.stack(parts) for parts in zip(*(_dense_image(centres, *image) for image in images), strict=True))
    )


def _dense_image(centres: Tensor, scores: Tensor, boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> Found:
    ious = box_iou(boxes[:, None], gt_boxes[None])
    metric = scores[:, gt_labels] ** ALPHA * ious**BETA
    offered = torch.zeros_like(metric, dtype=torch.bool).scatter(0, metric.topk(TOPK, dim=0).indices, True)
    positive = offered & (metric > 0) & centres_inside(centres[:, None], gt_boxes[None])
    best, gt_index = ious.masked_fill(~positive, -torch.inf).max(dim=1)
    gt_index = gt_index.masked_fill(best == -torch.inf, BACKGROUND)
    own = gt_index[:, None] == torch.arange(len(gt_boxes))
    metric, ious = metric * own, ious * own
    normalised = metric / (metric.amax(dim=0) + EPSILON) * ious.amax(dim=0)
    return Found(gt_index, normalised.amax(dim=1))


# Memory


def tood_memory_case(objects: int = MANY_OBJECTS, canvas: tuple[int, int] = CANVAS, seed: int = 0) -> dict[str, Any]:
    """Megabytes by which `tood_tal.losses.learn` raises a fresh process at most, outputs being ready (Linux).

    Returns:
        name, what, peak_mb and the number of positives.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        peak, positives = fresh.submit(_measure, objects, canvas, seed).result()
    anchors = sum(height * width for height, width in level_shapes(canvas))
    return {
        "name": f"tood-memory-{objects}",
        "what": f"TAL's assignment, one image with {objects} objects, {anchors} anchors, {CLASSES} classes, CPU, "
        f"{THREADS} threads",
        "peak_mb": peak,
        "positives": positives,
    }


def _measure(objects: int, canvas: tuple[int, int], seed: int) -> tuple[float, int]:
    """Random outputs: the work is the same as with a network's."""
    torch.set_num_threads(THREADS)
    targets = Targets(*(part[:1] for part in random_targets(seed, objects, canvas)))
    outputs = random_outputs(canvas, seed)
    forget_peak()
    before = memory_mb("VmRSS")
    found = learn(outputs, targets, by_atss=False, config=Config())
    return memory_mb("VmHWM") - before, int(found.assignment.positive.sum())


# Assignment and loss


def tood_loss_case(
    objects: int = 20, repeats: int = 9, seed: int = 0, canvas: tuple[int, int] = LOSS_CANVAS
) -> dict[str, Any]:
    """Time `tood_tal.losses.compute_losses` in the second phase and the loop in turn, forward.

    Args:
        objects: of each of the 2 images; the targets are a ratio of 1.5 with 20 objects and of 4 with 100.
        repeats: number of turns.
        seed: of objects and outputs.
        canvas: height and width of the batch in pixels.

    Returns:
        As `tood_assign_case`; equal also says that the losses agree within a relative 1e-5.
    """
    config = Config(atss_share=0.0)
    targets = random_targets(seed, objects, canvas)
    outputs = half_trained_outputs(targets, canvas, seed)
    ours = lambda: compute_losses(outputs, targets, 1, 1, config=config)  # noqa: E731
    loop = lambda: loop_losses(outputs, targets)  # noqa: E731

    def measure() -> tuple[bool, dict[str, float]]:
        return agree(outputs, targets, config), {name: float(value) for name, value in ours().items()}

    (equal, losses), times = _in_turn(measure, ours, loop, repeats)
    return {
        "name": f"tood-loss-{objects}",
        "what": f"TAL's assignment and loss, {len(outputs.scores)} images of {canvas[0]} x {canvas[1]} with {objects} "
        f"objects each, CPU, {THREADS} threads, eager",
        **times,
        "equal": equal,
        "losses": losses,
        "repeats": repeats,
    }


def half_trained_outputs(targets: Targets, canvas: tuple[int, int], seed: int) -> Outputs:
    """`benchmarks.paa_speed.half_trained` as T-Head says it: scores and boxes."""
    known = half_trained(targets, canvas, seed)
    boxes = decode_deltas(known.grid.boxes, known.deltas) / anchor_strides(known.grid)[:, None]
    return Outputs(known.logits.sigmoid(), boxes, None, None, known.grid)


def agree(outputs: Outputs, targets: Targets, config: Config) -> bool:
    """Whether the loop gives every anchor the same object and target as ours, and the same losses but for rounding."""
    ours, learned = compute_losses(outputs, targets, 1, 1, config=config), learn(outputs, targets, False, config)
    losses, found = loop_losses(outputs, targets)
    close = all(torch.isclose(losses[name], ours[name], rtol=1e-5, atol=0) for name in LOSSES)
    assignment = Found(learned.assignment.gt_index.clamp(min=BACKGROUND), learned.class_targets)
    return close and same(assignment, found)


def loop_losses(outputs: Outputs, targets: Targets) -> tuple[dict[str, Tensor], Found]:
    """Losses of the second phase in profile `ours` and the assignment, object by object (spec TOOD section 2)."""
    boxes, inside = pixel_boxes(outputs), anchors_inside(outputs.grid, targets.sizes)
    strides, grid = anchor_strides(outputs.grid)[:, None], outputs.grid
    class_sums, box_sums, assigned = [], [], []
    for image, counted in enumerate(inside):
        gt_boxes, gt_labels = (part[image][targets.valid[image]] for part in (targets.boxes, targets.labels))
        scores = outputs.scores[image]
        gt_index, wanted = _loop_image(grid.points, scores, boxes[image], gt_boxes, gt_labels, counted)
        assigned.append(Found(gt_index, wanted))
        positive = (gt_index >= 0).nonzero()[:, 0]
        matched = gt_index[positive]
        soft = torch.zeros_like(scores)
        soft[positive, gt_labels[matched]] = wanted[positive]
        entropy = binary_cross_entropy(scores, soft, reduction="none")
        class_sums.append(((soft - scores).abs() ** GAMMA * entropy)[counted].sum())
        known = gt_boxes[matched] / strides[positive]
        giou = giou_loss(outputs.boxes[image, positive], known, GIOU_EPS, floor=True)
        box_sums.append((giou * wanted[positive]).sum())
    found = Found(*(torch.stack(parts) for parts in zip(*assigned, strict=True)))
    divisor = found.targets.sum().clamp(min=1)
    losses = {
        "loss_cls": torch.stack(class_sums).sum() / divisor,
        "loss_box": BOX_WEIGHT * torch.stack(box_sums).sum() / divisor,
    }
    return losses, found


@torch.no_grad()
def _loop_image(
    centres: Tensor, scores: Tensor, boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor, counted: Tensor
) -> Found:
    """Anchors of each object in turn; one that an earlier object has goes to the object of higher IoU."""
    gt_index = torch.full_like(counted, BACKGROUND, dtype=torch.int64)
    highest, metrics = (torch.zeros_like(scores[:, 0]) for _ in range(2))
    for number, (gt_box, label) in enumerate(zip(gt_boxes, gt_labels, strict=True)):
        ious = box_iou(boxes, gt_box)
        metric = scores[:, label] ** ALPHA * ious**BETA * counted
        offered = metric.topk(TOPK).indices
        kept = offered[(metric[offered] > 0) & centres_inside(centres[offered], gt_box)]
        won = kept[ious[kept] > highest[kept]]
        gt_index[won], highest[won], metrics[won] = number, ious[won], metric[won]
    wanted = torch.zeros_like(metrics)
    for number in gt_index.unique():
        mine = (gt_index == number).nonzero()[:, 0]
        if number >= 0:
            wanted[mine] = metrics[mine] / (metrics[mine].max() + EPSILON) * highest[mine].max()
    return Found(gt_index, wanted)


# Time


def _in_turn(
    check: Callable[[], Any], ours: Callable[[], object], reference: Callable[[], object], repeats: int
) -> tuple[Any, dict[str, Any]]:
    """What the check finds, which is also the warm-up, and the times of both, measured in turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        checked = check()
        times = [(_milliseconds(ours), _milliseconds(reference)) for _ in range(repeats)]
    finally:
        torch.set_num_threads(threads)
    ours_ms, reference_ms = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = [theirs / own for own, theirs in times]
    return checked, {
        "ours_ms": ours_ms,
        "reference_ms": reference_ms,
        "ratio": reference_ms / ours_ms,
        "ratio_spread": [min(ratios), max(ratios)],
        "best_ratio": min(theirs for _, theirs in times) / min(own for own, _ in times),
    }


def _milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1000
