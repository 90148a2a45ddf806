"""PASCAL VOC's average precision at IoU 0.5: `VOC07` by 11 points, `VOC12` by the area under the curve (no torch).

The rules are those of VOCdevkit's VOCevaldet.m, for one class and all images together:

- detections come by falling score, equal scores in the order given;
- each looks only at the object of its image and class that it overlaps most, difficult ones included, the first of
  several equal ones;
- IoU >= 0.5 with it: right if nothing before was right about it, otherwise wrong: it never falls back on another
  object, as COCO's rule lets it; an IoU below: wrong;
- IoU >= 0.5 with a difficult object: left out, however often. Difficult objects are not missed either;
- all detections of an image count. A class without an object that is not difficult has no AP and is not in the mean.

The devkit adds 1 to every side, because its corners are numbers of first and last pixels. Boxes here are x = xmin - 1
and width = xmax - xmin + 1 (`core.data.voc`), so the plain IoU is the same number.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from core.evaluator import DetectionArrays, GroundTruth, check_detections

MIN_IOU = 0.5
VOC_METRICS = {  # name: what it is
    "VOC07": "VOC 2007: IoU .50, mean over classes of 11-point AP",
    "VOC12": "VOC 2010 to 2012: IoU .50, mean over classes of the area under the curve",
}


class VocResult(NamedTuple):
    """Numbers in [0, 1]; -1 (metrics) or None (a category) where there is nothing to find."""

    metrics: dict[str, float]  # the keys of VOC_METRICS
    category_ap: dict[int, dict[str, float | None]]  # the same for each category id


class Curve(NamedTuple):
    """How many are right among the detections of a class, after each of the n that count, by falling score."""

    right: Int64[np.ndarray, " n"]
    found: Int64[np.ndarray, " n"]
    objects: int  # to find


def evaluate_voc(truth: GroundTruth, found: DetectionArrays, source: str = "detections") -> VocResult:
    """Both VOC numbers, over all classes and for each.

    Args:
        truth: `crowd` marks difficult objects; areas are not read.
        found: any number of detections of an image.
        source: of the detections, for messages.

    Raises:
        UserError: a score or box that is not finite, an image or category id that the ground truth lacks.
    """
    check_detections(truth, found, source)
    curves = class_curves(truth, found)
    rules = {"VOC07": eleven_point_ap, "VOC12": area_ap}
    per_class: dict[int, dict[str, float | None]] = {
        category: {name: rule(curve) if curve.objects else None for name, rule in rules.items()}
        for category, curve in curves.items()
    }
    return VocResult({name: _mean([ap[name] for ap in per_class.values()]) for name in rules}, per_class)


def _mean(values: list[float | None]) -> float:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else -1.0


def eleven_point_ap(curve: Curve) -> float:
    """VOC 2007: mean over recalls 0, 0.1 ... 1 of the best precision at that recall or a higher one.

    Recalls are compared in whole numbers, 10 * right >= k * objects: 0.3 as a float is more than 3 / 10.
    """
    precision = curve.right / curve.found
    reached = 10 * curve.right[:, None] >= np.arange(11) * curve.objects
    return float(np.where(reached, precision[:, None], 0).max(axis=0, initial=0).mean())


def area_ap(curve: Curve) -> float:
    """VOC 2010 to 2012: area under the precision made falling, exactly: each right detection is 1 / objects wide."""
    precision = curve.right / curve.found
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    rises = np.diff(curve.right, prepend=0)
    return float((best_from_here * rises).sum() / curve.objects)


def class_curves(truth: GroundTruth, found: DetectionArrays) -> dict[int, Curve]:
    """The curve of every category id."""
    verdicts = judge(truth, found)
    objects = {int(category): 0 for category in truth.category_ids}
    for category, count in zip(*np.unique(truth.box_category_ids[~truth.crowd], return_counts=True), strict=True):
        objects[int(category)] = int(count)
    order = np.lexsort((-found.scores, found.category_id))  # stable
    order = order[verdicts[order] >= 0]
    ids = np.array(list(objects), dtype=np.int64)
    first, last = (np.searchsorted(found.category_id[order], ids, side) for side in ("left", "right"))
    curves = {}
    for row, (category, count) in enumerate(objects.items()):
        right = np.cumsum(verdicts[order[first[row] : last[row]]])
        curves[category] = Curve(right, np.arange(1, len(right) + 1), count)
    return curves


def judge(truth: GroundTruth, found: DetectionArrays) -> Int64[np.ndarray, " n"]:
    """What becomes of each detection: 1 right, 0 wrong, -1 left out."""
    objects, ious = most_overlapped(truth, found)
    near = ious >= MIN_IOU
    difficult = near & truth.crowd[np.where(near, objects, 0)] if len(truth.crowd) else near
    order = np.argsort(-found.scores, kind="stable")
    order = order[near[order]]
    _, first = np.unique(objects[order], return_index=True)
    verdicts = np.zeros(len(found.scores), np.int64)
    verdicts[order[first]] = 1
    verdicts[difficult] = -1
    return verdicts


def most_overlapped(
    truth: GroundTruth, found: DetectionArrays
) -> tuple[Int64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """The object of its image and class that each detection overlaps most and their IoU; -1 and 0 if there is none.

    Every pair of a detection with such an object is one row; nothing loops over images.
    """
    image_ids = np.unique(truth.image_ids)
    classes = np.unique(truth.category_ids)
    box_keys = _keys(truth.box_image_ids, truth.box_category_ids, image_ids, classes)
    keys = _keys(found.image_id, found.category_id, image_ids, classes)
    by_key = np.argsort(box_keys, kind="stable")
    start, end = (np.searchsorted(box_keys[by_key], keys, side) for side in ("left", "right"))
    rows = np.flatnonzero(end > start)
    counts = (end - start)[rows]
    firsts = np.cumsum(counts) - counts  # of each detection's pairs
    position = np.arange(counts.sum())
    pair_object = by_key[np.repeat(start[rows] - firsts, counts) + position]
    pair_iou = paired_ious(found.boxes[np.repeat(rows, counts)], truth.boxes[pair_object])
    objects, ious = np.full(len(keys), -1), np.zeros(len(keys))
    if len(rows):
        ious[rows] = np.maximum.reduceat(pair_iou, firsts)
        best = np.where(pair_iou == np.repeat(ious[rows], counts), position, len(position))
        objects[rows] = pair_object[np.minimum.reduceat(best, firsts)]
    return objects, ious


def _keys(
    images: Int64[np.ndarray, " n"],
    categories: Int64[np.ndarray, " n"],
    image_ids: Int64[np.ndarray, " N"],
    classes: Int64[np.ndarray, " C"],
) -> Int64[np.ndarray, " n"]:
    """One number for an image and a class together."""
    return np.searchsorted(image_ids, images) * len(classes) + np.searchsorted(classes, categories)


def paired_ious(first: Float64[np.ndarray, "n 4"], second: Float64[np.ndarray, "n 4"]) -> Float64[np.ndarray, " n"]:
    """IoU of each box (x, y, width, height) with the one in the same row; 0 where both are empty."""
    near = np.maximum(first[:, :2], second[:, :2])
    far = np.minimum(first[:, :2] + first[:, 2:], second[:, :2] + second[:, 2:])
    shared = np.maximum(far - near, 0).prod(axis=1)
    union = first[:, 2:].prod(axis=1) + second[:, 2:].prod(axis=1) - shared
    empty: Bool[np.ndarray, " n"] = union <= 0
    return shared / np.where(empty, 1, union)
