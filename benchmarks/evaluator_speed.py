"""The evaluator against pycocotools, and score voting against a loop over classes and boxes.

python -m benchmarks.speed evaluator
python -m benchmarks.speed voting
"""

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from core.boxes import box_iou
from core.evaluator import CocoResult, DetectionArrays, GroundTruth, evaluate_boxes
from core.nms import Candidates, nms_indices
from paa.postprocess import VOTING_IOU, vote

IMAGES, BOXES, DETECTIONS, CLASSES = 5000, 7.3, 100, 80  # as COCO val2017: images, boxes and detections of an image
WIDTH, HEIGHT = 640, 480  # pixels
SIGMA = 0.025
VOTING_THREADS = 1  # arrays this small gain nothing from more

Result = TypeVar("Result")


def evaluator_case(images: int = IMAGES, seed: int = 0) -> dict[str, object]:
    """Time the default back end and pycocotools once each, from `GroundTruth` and `DetectionArrays` to 12 numbers.

    Included: checking, building each library's records, matching, accumulating, summarising. Not included: reading
    JSON and importing the libraries. pycocotools gets the same records, made by the same lines, without polygons and
    with the garbage collector paused, so its time is rather smaller than through its own `loadRes`.
    """
    truth, detections = generate(images, seed)
    evaluate_boxes(*generate(2, seed), backend="faster")  # imports
    evaluate_boxes(*generate(2, seed), backend="pycocotools")
    ours_s, ours = _timed(lambda: evaluate_boxes(truth, detections, "faster"))
    pycocotools_s, reference = _timed(lambda: evaluate_boxes(truth, detections, "pycocotools"))
    return {
        "name": "evaluator",
        "what": f"{images} images, {len(truth.boxes)} boxes, {len(detections.scores)} detections, {CLASSES} classes",
        "ours_s": ours_s,
        "pycocotools_s": pycocotools_s,
        "ratio": pycocotools_s / ours_s,
        "equal": _same(ours, reference),
        "AP": ours.metrics["AP"],
    }


def generate(images: int, seed: int) -> tuple[GroundTruth, DetectionArrays]:
    """Random boxes, one in 100 a crowd, and detections scattered around them, six in ten with the right class."""
    random = np.random.default_rng(seed)
    counts = random.poisson(BOXES, images) + (np.arange(images) == 0)  # at least one box
    box_images = np.repeat(np.arange(images), counts)
    sizes = np.exp(random.uniform(np.log(8), np.log(300), (len(box_images), 2)))
    boxes = np.concatenate([random.uniform(0, 1, sizes.shape) * (np.array([WIDTH, HEIGHT]) - sizes), sizes], axis=1)
    classes = random.integers(CLASSES, size=len(boxes))
    near = random.integers(len(boxes), size=images * DETECTIONS)  # any box where the image has none
    rows = np.repeat(np.arange(images), DETECTIONS)
    has = counts[rows] > 0
    offsets = (random.random(len(rows)) * counts[rows]).astype(np.int64)
    near[has] = (np.cumsum(counts) - counts)[rows[has]] + offsets[has]
    found = boxes[near] + random.normal(0, 0.15, (len(rows), 4)) * np.tile(boxes[near, 2:], 2)
    found[:, 2:] = np.abs(found[:, 2:]) + 1
    right = random.random(len(rows)) < 0.6
    guesses = np.where(right, classes[near], random.integers(CLASSES, size=len(rows)))
    truth = GroundTruth(
        image_ids=np.arange(images) + 1,
        category_ids=np.arange(CLASSES) + 1,
        box_image_ids=box_images + 1,
        box_category_ids=classes + 1,
        boxes=boxes,
        areas=boxes[:, 2] * boxes[:, 3] * random.uniform(0.4, 1, len(boxes)),  # of masks
        crowd=random.random(len(boxes)) < 0.01,
    )
    return truth, DetectionArrays(rows + 1, guesses + 1, found, random.random(len(rows)))


def _same(a: CocoResult, b: CocoResult) -> bool:
    return all(abs(a.metrics[key] - b.metrics[key]) <= 1e-9 for key in a.metrics)


def voting_case(boxes: int = 1000, classes_each: int = 2, repeats: int = 9, seed: int = 0) -> dict[str, object]:
    """Time `paa.postprocess.vote` and the loop in turn; median milliseconds, their ratio, the largest difference.

    `boxes` boxes of one image, each with `classes_each` of 80 classes over the score threshold, before and after NMS at
    0.6 and the cut to 100; NMS is in neither time. Times are of float32 boxes. The difference is that of float64 boxes:
    float32 has steps of 6e-5 pixels at the far end of an image, which the loop's sums are rounded to.
    """
    pool = _random_pool(boxes, classes_each, seed)
    kept = pool.select(nms_indices(pool, 0.6, 100))
    threads = torch.get_num_threads()
    torch.set_num_threads(VOTING_THREADS)
    try:
        exact_kept, exact_pool = _in_float64(kept), _in_float64(pool)
        difference = float((vote(exact_kept, exact_pool, SIGMA) - loop_vote(exact_kept, exact_pool)).abs().max())
        rounded = float((vote(kept, pool, SIGMA) - loop_vote(kept, pool)).abs().max())  # also the warm-up
        times = [
            (_timed(lambda: vote(kept, pool, SIGMA))[0] * 1000, _timed(lambda: loop_vote(kept, pool))[0] * 1000)
            for _ in range(repeats)
        ]
    finally:
        torch.set_num_threads(threads)
    ours_ms, reference_ms = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "name": f"voting-{classes_each}",
        "what": f"score voting, {boxes} boxes with {classes_each} classes each, {len(kept.scores)} kept, CPU, "
        f"{VOTING_THREADS} thread, eager",
        "ours_ms": ours_ms,
        "reference_ms": reference_ms,
        "ratio": reference_ms / ours_ms,
        "equal": difference <= 1e-6,
        "difference": difference,  # pixels
        "difference_float32": rounded,
        "repeats": repeats,
    }


def _in_float64(candidates: Candidates) -> Candidates:
    return candidates._replace(boxes=candidates.boxes.double(), scores=candidates.scores.double())


def _random_pool(boxes: int, classes_each: int, seed: int) -> Candidates:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(40, 2, generator=generator) * 600 + 100
    centres = centres[torch.randint(40, (boxes,), generator=generator)] + torch.randn(boxes, 2, generator=generator) * 8
    half = torch.rand(boxes, 2, generator=generator) * 30 + 40
    corners = torch.cat([centres - half, centres + half], dim=1).repeat_interleave(classes_each, dim=0)
    labels = torch.rand(boxes, CLASSES, generator=generator).argsort(dim=1)[:, :classes_each].flatten()
    scores = torch.rand(len(labels), generator=generator) * 0.95 + 0.05
    return Candidates(corners, scores, labels, torch.zeros_like(labels))


def loop_vote(kept: Candidates, pool: Candidates) -> Tensor:
    """Score voting class by class and box by box, as published implementations do it."""
    voted = kept.boxes.clone()
    for label in kept.labels.unique():
        members = pool.labels == label
        boxes, scores = pool.boxes[members], pool.scores[members]
        for row in (kept.labels == label).nonzero()[:, 0]:
            ious = box_iou(kept.boxes[row, None], boxes)
            near = ious > VOTING_IOU
            weights = torch.exp(-((1 - ious[near]) ** 2) / SIGMA) * scores[near]
            voted[row] = (weights[:, None] * boxes[near]).sum(dim=0) / weights.sum()
    return voted


def _timed(function: Callable[[], Result]) -> tuple[float, Result]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result
