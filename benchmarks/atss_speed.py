"""ATSS against its dense form: 300 objects in each of 2 images, 22,400 anchors.

    python -m benchmarks.speed atss

Both run in turn on the CPU; the dense form is written as vectorised as it gets, image by image.
"""

import statistics
import time
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from core.anchors import AnchorGrid, anchor_grid, level_shapes
from core.atss import TOPK, assign_atss
from core.boxes import box_centres, box_iou, centres_inside
from core.geometry import MODERN
from core.types import BACKGROUND, Targets

CANVAS = (800, 1344)  # pixels; 22,400 anchors
IMAGES, OBJECTS = 2, 300
THREADS = 2


def atss_case(repeats: int = 9, seed: int = 0) -> dict[str, object]:
    """Time `core.atss` and the dense form in turn; median milliseconds, their ratio, whether all indices agree.

    `ratio_spread` holds the smallest and largest ratio of one turn, `best_ratio` that of the fastest times. On a busy
    machine the median says little: every operation split over threads then waits for its share of the processor, and
    ours has many short ones.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        grid = anchor_grid(level_shapes(CANVAS))
        targets = random_targets(seed)
        ours, dense = (lambda: assign_atss(grid, targets, MODERN)[0].gt_index), (lambda: dense_atss(grid, targets))
        equal = bool(torch.equal(ours(), dense()))  # also the warm-up
        times = [(_milliseconds(ours), _milliseconds(dense)) for _ in range(repeats)]
    finally:
        torch.set_num_threads(threads)
    ours_ms, reference_ms = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = [reference / own for own, reference in times]
    return {
        "name": "atss",
        "what": f"{IMAGES} images, {OBJECTS} objects each, {len(grid.boxes)} anchors, CPU, {THREADS} threads, eager",
        "ours_ms": ours_ms,
        "reference_ms": reference_ms,
        "ratio": reference_ms / ours_ms,
        "ratio_spread": [min(ratios), max(ratios)],
        "best_ratio": min(reference for _, reference in times) / min(own for own, _ in times),
        "equal": equal,
        "repeats": repeats,
    }


def random_targets(seed: int, objects: int = OBJECTS, canvas: tuple[int, int] = CANVAS) -> Targets:
    """Objects of 8 to 400 pixels, or the canvas's shorter side, log-uniform sides, anywhere in the canvas."""
    generator = torch.Generator().manual_seed(seed)
    sides = 8 * (min(400, *canvas) / 8) ** torch.rand(IMAGES, objects, 2, generator=generator)
    limits = torch.tensor(canvas).flip(0)
    corners = torch.rand(IMAGES, objects, 2, generator=generator) * (limits - sides)
    labels = torch.randint(80, (IMAGES, objects), generator=generator)
    valid = torch.ones(IMAGES, objects, dtype=torch.bool)
    sizes = torch.tensor([canvas] * IMAGES)
    return Targets(torch.cat([corners, corners + sides], dim=-1), labels, valid, sizes)


def dense_atss(grid: AnchorGrid, targets: Targets) -> Int[Tensor, "B A"]:
    """The obvious vectorised ATSS: an anchors x objects matrix of distances and of IoUs for each image."""
    return torch.stack([_dense_image(grid, boxes) for boxes in targets.boxes])


def _dense_image(grid: AnchorGrid, gt_boxes: Tensor) -> Tensor:
    ious = box_iou(grid.boxes[:, None], gt_boxes[None])
    distances = (grid.points[:, None] - box_centres(gt_boxes)[None]).square().sum(dim=-1)
    candidates, first = [], 0
    for level in distances.split(grid.level_sizes):
        nearest = level.topk(min(TOPK, len(level)), dim=0, largest=False).indices
        candidates.append(nearest + first)
        first += len(level)
    index = torch.cat(candidates)
    chosen = ious.gather(0, index)
    threshold = chosen.mean(dim=0) + chosen.std(dim=0)
    is_candidate = torch.zeros_like(ious, dtype=torch.bool).scatter(0, index, True)
    inside = centres_inside(grid.points[:, None], gt_boxes[None])
    positive = is_candidate & (ious >= threshold) & inside
    best, gt_index = ious.masked_fill(~positive, -torch.inf).max(dim=1)
    return gt_index.masked_fill(best == -torch.inf, BACKGROUND)


def _milliseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1000
