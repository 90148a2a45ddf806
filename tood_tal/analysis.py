"""The alignment analysis of the paper's Table 6 (spec section 5.3): do the best scored boxes fit best?

Note: the paper does not say which predictions belong to an object. Here a prediction is an anchor and a class, with the
score and box that go to NMS; it belongs to the object of its class that its box overlaps most, if their IoU is at least
0.1. No score is too low. A detection, which is what NMS leaves, belongs to the object of its class that it overlaps
most.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from core import distributed
from core.boxes import box_iou, clip_boxes
from core.commands import load_trained
from core.data.loader import eval_batches
from core.data.sources import open_data
from core.inference import check_categories
from core.runlog import write_json
from core.types import Detections, Targets
from tood_tal.config import Config
from tood_tal.losses import pixel_boxes
from tood_tal.model import TOOD, Outputs
from tood_tal.postprocess import detect

LEAST_IOU = 0.1  # of a prediction with its object; a detection with no more is not counted (Table 6)
HIT_IOU = 0.5  # of a detection that finds its object (Table 6)
RANKED, MOST_CONFIDENT = 50, 10  # predictions of an object (Table 6)
MEANS = ("rank_correlation", "top_iou")
PROTOCOL = {
    "predictions": "every (anchor, class) before NMS without score threshold, with the score and box that go to NMS; "
    f"one belongs to the object of its class that its box overlaps most if their IoU is at least {LEAST_IOU:g}, to all "
    "of them where several are equal; crowd regions are no objects",
    "rank_correlation": f"Pearson's of the ranks by score and by IoU, ties averaged, over an object's {RANKED} most "
    "confident predictions or all it has; mean over the objects that have one, that is at least two predictions which "
    "differ in score and in IoU",
    "top_iou": f"mean IoU of an object's {MOST_CONFIDENT} most confident predictions or all it has; mean over the "
    "objects that have a prediction",
    "boxes": "after NMS with the model's own thresholds; one belongs to the object of its class that it overlaps most. "
    f"Correct: IoU at least {HIT_IOU:g}, the best scored such box of its object; redundant: the others with at least "
    f"{HIT_IOU:g}; error: between {LEAST_IOU:g} and {HIT_IOU:g}, both excluded",
}


class ObjectAlignment(NamedTuple):
    """How well scores and boxes around each of n objects agree; NaN where there is nothing to say."""

    correlation: Float64[Tensor, " n"]  # of the ranks by score and by IoU, in [-1, 1]
    top_iou: Float64[Tensor, " n"]  # mean IoU of the most confident predictions


class BoxCounts(NamedTuple):
    """What detections are to the objects they belong to."""

    correct: int
    redundant: int
    error: int


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Table 6's columns for a checkpoint on a split; printed and written as JSON.

    Raises:
        UserError: weights or data that are missing, damaged or do not fit each other.
    """
    device = distributed.pick_device(arguments.device)
    model, config, categories = load_trained(arguments, "tood_tal", Config, TOOD, device)
    spec = arguments.data or config.data
    data = open_data(spec, config.seed, splits=(arguments.split,), voc_one_based=config.voc_one_based)
    table = data.split(arguments.split)
    check_categories(table, categories, str(arguments.weights))
    out: Path = arguments.out or arguments.weights.parent / f"alignment-{arguments.split}"
    out.mkdir(parents=True, exist_ok=True)
    objects: list[ObjectAlignment] = []
    counts: list[BoxCounts] = []
    boxes = 0
    for batch in eval_batches(table, config):
        batch = batch.to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            outputs = model(batch.images, batch.sizes)
        objects.append(align_objects(outputs, batch.targets, config))
        found = detect(outputs, batch.sizes, config)
        counts.append(count_boxes(found, batch.targets))
        boxes += int(found.valid.sum())
    result = {**describe(objects), **total(counts)._asdict(), "detections": boxes}
    facts = {"weights": str(arguments.weights), "data": data.name, "split": arguments.split, "images": len(table)}
    write_json(out / "alignment.json", {**result, "protocol": PROTOCOL, **facts})
    print(summary(result))
    print(f"{len(table)} images of {data.name} {arguments.split}; written to {out / 'alignment.json'}")
    return result


@torch.no_grad()
def align_objects(outputs: Outputs, targets: Targets, config: Config) -> ObjectAlignment:
    """Of all objects of a batch, image by image; predictions are taken as NMS would get them."""
    scores, boxes = ranking_scores(outputs), pixel_boxes(outputs)
    if config.rules.clip:
        boxes = clip_boxes(boxes, targets.sizes)
    parts = []
    for image, valid in enumerate(targets.valid):
        objects = targets.boxes[image, valid], targets.labels[image, valid]
        parts.append(align_image(scores[image], boxes[image], *objects))
    return ObjectAlignment(*(torch.cat(column) for column in zip(*parts, strict=True)))


def ranking_scores(outputs: Outputs) -> Float[Tensor, "B A C"]:
    """The scores that NMS ranks by: the class's, times centre-ness in plain ATSS."""
    if outputs.quality is None:
        return outputs.scores
    return outputs.scores * outputs.quality.float().sigmoid()[..., None]


def align_image(
    scores: Float[Tensor, "A C"],
    boxes: Float[Tensor, "A 4"],
    gt_boxes: Float[Tensor, "G 4"],
    gt_labels: Int[Tensor, " G"],
) -> ObjectAlignment:
    """Of one image's objects, any number; `boxes` are the predicted ones, in the pixels of `gt_boxes`."""
    ious = box_iou(boxes[:, None], gt_boxes[None])
    own, own_scores = belongs(ious, gt_labels, scores.shape[1]), scores[:, gt_labels]
    order = own_scores.masked_fill(~own, -1).argsort(dim=0, descending=True, stable=True)[:RANKED]
    score, iou, valid = (part.gather(0, order).T for part in (own_scores, ious, own))
    return ObjectAlignment(
        rank_correlation(score, iou, valid), masked_mean(iou[:, :MOST_CONFIDENT], valid[:, :MOST_CONFIDENT])
    )


def belongs(ious: Float[Tensor, "A G"], gt_labels: Int[Tensor, " G"], num_classes: int) -> Bool[Tensor, "A G"]:
    """Which predictions, each for the object's class, belong to each object: none overlaps the object's rivals more."""
    rival = gt_labels.expand_as(ious)
    best = ious.new_zeros(len(ious), num_classes).scatter_reduce(1, rival, ious, "amax")
    return (ious >= LEAST_IOU) & (ious == best.gather(1, rival))


def rank_correlation(
    a: Float[Tensor, "n K"], b: Float[Tensor, "n K"], valid: Bool[Tensor, "n K"]
) -> Float64[Tensor, " n"]:
    """Pearson's correlation of two rankings of each row's valid elements; NaN where one ranks nothing."""
    count = valid.sum(dim=1, keepdim=True)
    ranks = (average_ranks(values, valid) for values in (a, b))
    left, right = ((rank - (count + 1) / 2) * valid for rank in ranks)  # ranks 1 ... n have mean (n + 1) / 2
    return (left * right).sum(dim=1) / (left.square().sum(dim=1) * right.square().sum(dim=1)).sqrt()


def average_ranks(values: Float[Tensor, "n K"], valid: Bool[Tensor, "n K"]) -> Float64[Tensor, "n K"]:
    """Ranks 1, 2 ... of each row's valid elements by rising value; equal values share the mean of their ranks."""
    mine, others, there = values[:, :, None], values[:, None, :], valid[:, None, :]
    below, equal = ((others < mine) & there).sum(dim=2), ((others == mine) & there).sum(dim=2)
    return below + (equal + 1).double() / 2


def masked_mean(values: Float[Tensor, "n K"], valid: Bool[Tensor, "n K"]) -> Float64[Tensor, " n"]:
    """Mean of each row's valid elements; NaN where there is none."""
    return values.double().masked_fill(~valid, 0).sum(dim=1) / valid.sum(dim=1)


def count_boxes(found: Detections, targets: Targets) -> BoxCounts:
    """Correct, redundant and wrong detections of a batch; any number of either, also none."""
    possible = found.valid[:, :, None] & targets.valid[:, None] & (found.labels[:, :, None] == targets.labels[:, None])
    ious = box_iou(found.boxes[:, :, None], targets.boxes[:, None]).masked_fill(~possible, 0)
    nobody = ious.new_zeros(*found.labels.shape, 1)
    best, owner = torch.cat([ious, nobody], dim=2).max(dim=2)
    hits = (owner[..., None] == torch.arange(ious.shape[2], device=owner.device)) & (best >= HIT_IOU)[..., None]
    correct = int(hits.any(dim=1).sum())  # one of each object that is hit at all
    return BoxCounts(correct, int(hits.sum()) - correct, int(((best > LEAST_IOU) & (best < HIT_IOU)).sum()))


def total(parts: Sequence[BoxCounts]) -> BoxCounts:
    """The counts of all batches."""
    return BoxCounts(*(sum(column) for column in zip(*parts, strict=True)))


def describe(parts: Sequence[ObjectAlignment]) -> dict[str, float | int | None]:
    """Means over objects, how many each is over, and how many objects there are; no mean of nothing."""
    correlation, top_iou = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    found: dict[str, float | int | None] = {"objects": len(correlation)}
    for name, values in zip(MEANS, (correlation, top_iou), strict=True):
        known = values[~values.isnan()]
        found[name] = float(known.mean()) if len(known) else None
        found[f"{name}_objects"] = len(known)
    return found


def summary(result: Mapping[str, Any]) -> str:
    """The numbers as printed, with what they are over."""
    correlation, top = ("none" if result[name] is None else f"{result[name]:.4f}" for name in MEANS)
    return (
        f"before NMS: rank correlation {correlation} over {result['rank_correlation_objects']} of {result['objects']} "
        f"objects, IoU of the {MOST_CONFIDENT} most confident {top} over {result['top_iou_objects']}\n"
        f"after NMS: {result['correct']} correct, {result['redundant']} redundant, {result['error']} errors of "
        f"{result['detections']} boxes\n"
        f"a prediction belongs to the object of its class that it overlaps most, from IoU {LEAST_IOU:g} on; the file "
        "holds the whole protocol"
    )
