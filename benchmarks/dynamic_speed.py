"""What Combined IoUs cost: against their dense form, in memory, and as a share of a training step.

    python -m benchmarks.speed dynamic-assign dynamic-memory dynamic-added

The dense form makes anchors x objects matrices of distances and of both IoUs for each image, as vectorised as it gets.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from benchmarks.atss_speed import random_targets
from benchmarks.paa_memory import forget_peak, memory_mb
from core.anchors import AnchorGrid, anchor_grid, anchors_inside, level_shapes
from core.atss import TOPK, assign_atss
from core.boxes import box_centres, box_iou, centres_inside
from core.types import BACKGROUND, Targets
from dynamic_atss.assigner import assign_combined
from dynamic_atss.config import Config
from dynamic_atss.losses import assign, compute_losses
from dynamic_atss.model import DynamicATSS, Outputs

CANVAS = (800, 1344)  # pixels; 22,400 anchors
OBJECTS, MANY_OBJECTS = 300, 5000
STEP_CANVAS, STEP_OBJECTS = (800, 1088), 20  # of the training step
CLASSES = 80
THREADS = 2


def dynamic_assign_case(
    objects: int = OBJECTS, repeats: int = 9, seed: int = 0, canvas: tuple[int, int] = CANVAS
) -> dict[str, Any]:
    """Time `dynamic_atss.assigner` and the dense form in turn.

    Returns:
        name, what, ours_ms and reference_ms (medians), ratio, ratio_spread (smallest and largest of one turn),
        best_ratio (of the fastest times), equal (the same object for every anchor), positives and repeats.
    """
    grid, targets = anchor_grid(level_shapes(canvas)), random_targets(seed, objects, canvas)
    predicted = random_predictions(grid, len(targets.boxes), seed)
    ours = lambda: assign_combined(grid, targets, predicted).gt_index  # noqa: E731
    dense = lambda: dense_combined(grid, targets, predicted)  # noqa: E731
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        found, expected = ours(), dense()  # also the warm-up
        times = [(_milliseconds(ours), _milliseconds(dense)) for _ in range(repeats)]
    finally:
        torch.set_num_threads(threads)
    ours_ms, reference_ms = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = [reference / own for own, reference in times]
    return {
        "name": f"dynamic-assign-{objects}",
        "what": f"Combined IoUs, {len(found)} images, {objects} objects each, {len(grid.boxes)} anchors, CPU, "
        f"{THREADS} threads, eager",
        "ours_ms": ours_ms,
        "reference_ms": reference_ms,
        "ratio": reference_ms / ours_ms,
        "ratio_spread": [min(ratios), max(ratios)],
        "best_ratio": min(reference for _, reference in times) / min(own for own, _ in times),
        "equal": bool(torch.equal(found, expected)),
        "positives": int((found >= 0).sum()),
        "repeats": repeats,
    }


def random_predictions(grid: AnchorGrid, images: int, seed: int) -> Float[Tensor, "B A 4"]:
    """A box near every anchor: its corners moved by an eighth of its side on average."""
    generator = torch.Generator().manual_seed(seed)
    sides = (grid.boxes[:, 2:] - grid.boxes[:, :2]).repeat(1, 2)
    return grid.boxes + torch.randn(images, *grid.boxes.shape, generator=generator) * sides / 8


def dense_combined(grid: AnchorGrid, targets: Targets, predicted: Float[Tensor, "B A 4"]) -> Int[Tensor, "B A"]:
    """The obvious vectorised Combined IoUs: three anchors x objects matrices for each image."""
    return torch.stack([_dense_image(grid, *image) for image in zip(targets.boxes, predicted, strict=True)])


def _dense_image(grid: AnchorGrid, gt_boxes: Tensor, predicted: Tensor) -> Tensor:
    anchor_ious, predicted_ious = (box_iou(boxes[:, None], gt_boxes[None]) for boxes in (grid.boxes, predicted))
    distances = (grid.points[:, None] - box_centres(gt_boxes)[None]).square().sum(dim=-1)
    candidates, first = [], 0
    for level in distances.split(grid.level_sizes):
        nearest = level.topk(min(TOPK, len(level)), dim=0, largest=False).indices
        candidates.append(nearest + first)
        first += len(level)
    index = torch.cat(candidates)
    chosen = [ious.gather(0, index) for ious in (predicted_ious, anchor_ious)]
    threshold = sum(part.mean(dim=0) + part.std(dim=0) for part in chosen)
    combined = predicted_ious + anchor_ious
    is_candidate = torch.zeros_like(combined, dtype=torch.bool).scatter(0, index, True)
    inside = centres_inside(grid.points[:, None], gt_boxes[None])
    positive = is_candidate & (combined >= threshold) & inside
    best, gt_index = combined.masked_fill(~positive, -torch.inf).max(dim=1)
    return gt_index.masked_fill(best == -torch.inf, BACKGROUND)


def dynamic_memory_case(objects: int = MANY_OBJECTS, canvas: tuple[int, int] = CANVAS, seed: int = 0) -> dict[str, Any]:
    """Megabytes by which `dynamic_atss.losses.assign` raises a fresh process at most, outputs being ready (Linux).

    Returns:
        name, what, peak_mb and the number of positives.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        peak, positives = fresh.submit(_measure, objects, canvas, seed).result()
    anchors = sum(height * width for height, width in level_shapes(canvas))
    return {
        "name": f"dynamic-memory-{objects}",
        "what": f"assignment by Combined IoUs, one image with {objects} objects, {anchors} anchors, CPU, "
        f"{THREADS} threads",
        "peak_mb": peak,
        "positives": positives,
    }


def _measure(objects: int, canvas: tuple[int, int], seed: int) -> tuple[float, int]:
    """Random outputs: the work is the same as with a network's."""
    torch.set_num_threads(THREADS)
    targets = Targets(*(part[:1] for part in random_targets(seed, objects, canvas)))
    outputs = random_outputs(canvas, seed, classes=1)
    forget_peak()
    before = memory_mb("VmRSS")
    assignment = assign(outputs, targets, 1, 1, Config())
    return memory_mb("VmHWM") - before, int(assignment.positive.sum())


def random_outputs(canvas: tuple[int, int], seed: int, batch: int = 1, classes: int = CLASSES) -> Outputs:
    """Outputs of the ATSS host: logits, deltas and branch around 0."""
    generator, grid = torch.Generator().manual_seed(seed), anchor_grid(level_shapes(canvas))
    shape = batch, len(grid.boxes)
    logits, deltas = (torch.randn(*shape, width, generator=generator) for width in (classes, 4))
    return Outputs(logits, deltas, torch.randn(shape, generator=generator), None, grid)


def dynamic_added_case(
    config: Config | None = None,
    canvas: tuple[int, int] = STEP_CANVAS,
    objects: int = STEP_OBJECTS,
    repeats: int = 25,
    steps: int = 2,
    seed: int = 0,
) -> dict[str, Any]:
    """What Combined IoUs add to ATSS's assignment, as a share of a training step of the host ATSS.

    The assignment with them decodes all boxes and compares the candidates'; without them it is `core.atss`. The step is
    network, losses and backward on the CPU, from random weights with the paper's frozen stages; the faster of `steps`
    counts, so that the share is not made small by a busy machine.

    Returns:
        name, what, with_ms and without_ms (medians), added_ms, step_ms, share in percent, losses and repeats.
    """
    # a file of weights is named, and never read, because random frozen stages are refused without one
    config = config or Config(backbone_weights="none", weights="random")
    targets = random_targets(seed, objects, canvas)
    outputs = random_outputs(canvas, seed, batch=len(targets.boxes))
    with_them = lambda: assign(outputs, targets, 1, 1, config)  # noqa: E731
    without = lambda: assign_atss(  # noqa: E731
        outputs.grid,
        targets,
        config.box_geometry,
        config.topk,
        anchors_inside(outputs.grid, targets.sizes) if config.switches.exclude_padding else None,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with_them(), without()  # warm-up
        times = [(_milliseconds(with_them), _milliseconds(without)) for _ in range(repeats)]
        step_ms, losses = _training_step(config, targets, canvas, steps, seed)
    finally:
        torch.set_num_threads(threads)
    with_ms, without_ms = (statistics.median(column) for column in zip(*times, strict=True))
    added = with_ms - without_ms
    return {
        "name": "dynamic-added",
        "what": f"what Combined IoUs add to a training step, {config.backbone}, {len(targets.boxes)} images of "
        f"{canvas[0]} x {canvas[1]} with {objects} objects each, CPU, {THREADS} threads, eager",
        "with_ms": with_ms,
        "without_ms": without_ms,
        "added_ms": added,
        "step_ms": step_ms,
        "share": 100 * added / step_ms,
        "losses": losses,
        "repeats": repeats,
    }


def _training_step(
    config: Config, targets: Targets, canvas: tuple[int, int], steps: int, seed: int
) -> tuple[float, dict[str, float]]:
    """Milliseconds of the fastest of some steps, forward and backward, and the losses."""
    torch.manual_seed(seed)
    model = DynamicATSS(config, CLASSES).to(memory_format=torch.channels_last)
    images = torch.randint(256, (len(targets.boxes), 3, *canvas), dtype=torch.uint8)
    found: dict[str, Tensor] = {}

    def step() -> None:
        found.update(compute_losses(model(images, targets.sizes), targets, 1, 1, config=config))
        torch.stack([value for name, value in found.items() if name.startswith("loss")]).sum().backward()
        model.zero_grad(set_to_none=True)

    times = [_milliseconds(step) for _ in range(steps)]
    return min(times), {name: float(value.detach()) for name, value in found.items()}


def _milliseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1000
