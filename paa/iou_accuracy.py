"""How far the predicted IoU is from the true one (the paper's Table 2).

Note: the paper does not say over which boxes it averages. Here: over positives of the run's own assignment, each with
the object that it learns, which is what the branch is trained on; and, for what a user gets, over detections before
score voting, each with the object of its class that it overlaps most (0 where there is none).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from core import distributed
from core.boxes import box_iou, clip_boxes, decode_deltas
from core.commands import load_trained
from core.data.loader import eval_batches
from core.data.sources import open_data
from core.errors import UserError
from core.inference import check_categories
from core.nms import Candidates, nms_indices
from core.report import IOU_ACCURACY
from core.runlog import write_json
from core.types import Targets
from paa.config import Config
from paa.losses import assign, float32_outputs, positive_boxes
from paa.model import PAA, Outputs
from paa.postprocess import unified_score

PROTOCOL = {
    "positives": "mean |sigmoid(IoU logit) - IoU(decoded box, its object)| over positives of the run's own assignment",
    "detections": "the same over detections before score voting, with the most overlapped object of the class, or 0",
}


class PredictedIous(NamedTuple):
    """Predicted and true IoUs of the same n boxes, in [0, 1]."""

    predicted: Float[Tensor, " n"]
    true: Float[Tensor, " n"]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both errors of a checkpoint on a split; printed and written as JSON beside the weights.

    Raises:
        UserError: weights without an IoU branch, or weights and data that do not fit each other.
    """
    weights: Path = arguments.iou_accuracy
    device = distributed.pick_device(arguments.device)
    model, config, categories = load_trained(
        argparse.Namespace(**{**vars(arguments), "weights": weights}), "paa", Config, PAA, device
    )
    if config.quality != "iou":
        raise UserError(f"{weights}: has no IoU branch, it was trained with quality {config.quality}")
    spec = arguments.data or config.data
    data = open_data(spec, config.seed, splits=(arguments.split,), voc_one_based=config.voc_one_based)
    table = data.split(arguments.split)
    check_categories(table, categories, str(weights))
    parts: dict[str, list[PredictedIous]] = {"positives": [], "detections": []}
    for batch in eval_batches(table, config):
        batch = batch.to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            outputs = model(batch.images, batch.sizes)
        outputs = float32_outputs(outputs)
        parts["positives"].append(positive_ious(outputs, batch.targets, config))
        parts["detections"].append(detection_ious(outputs, batch.targets, config))
    errors = {name: describe(some) for name, some in parts.items()}
    facts = {"weights": str(weights), "data": data.name, "split": arguments.split, "images": len(table)}
    out = weights.parent / IOU_ACCURACY.format(split=arguments.split)
    write_json(out, {**errors, "protocol": PROTOCOL, **facts})
    for name, error in errors.items():
        value = "none" if error["mean_absolute_error"] is None else f"{error['mean_absolute_error']:.4f}"
        print(f"{name:<10} mean |predicted IoU - IoU| {value} over {error['count']} boxes")
    print(f"{len(table)} images of {data.name} {arguments.split}; written to {out}")
    return errors


@torch.no_grad()
def positive_ious(outputs: Outputs, targets: Targets, config: Config) -> PredictedIous:
    """Of the positives of the assignment with the objects that they learn; any number, also none."""
    assert outputs.quality_logits is not None
    assignment = assign(outputs, targets, config)
    boxes, matched = positive_boxes(outputs, targets, assignment, config)
    positive = assignment.positive
    true = box_iou(boxes[positive], matched[positive], config.box_geometry)
    return PredictedIous(outputs.quality_logits[positive].sigmoid().cpu(), true.cpu())


@torch.no_grad()
def detection_ious(outputs: Outputs, targets: Targets, config: Config) -> PredictedIous:
    """Of detections before score voting with the object of their class that they overlap most.

    Detections are (anchor, class) pairs over the score threshold after class-wise NMS. Note: `pre_nms_top` is not
    applied, which matters for images with more than a thousand pairs of a level only.
    """
    assert outputs.quality_logits is not None
    class_scores, predicted = outputs.logits.sigmoid(), outputs.quality_logits.sigmoid()
    images, anchors, labels = (class_scores > config.score_threshold).nonzero().unbind(1)
    deltas = outputs.deltas[images, anchors]
    boxes = decode_deltas(outputs.grid.boxes[anchors], deltas, config.box_geometry, config.switches.clamp_both_sides)
    boxes = clip_boxes(boxes[:, None], targets.sizes[images], config.box_geometry)[:, 0]
    predicted = predicted[images, anchors]
    pool = Candidates(boxes, unified_score(class_scores[images, anchors, labels], predicted), labels, images)
    index = nms_indices(pool, config.nms_iou, config.max_detections, config.box_geometry)
    return PredictedIous(predicted[index].cpu(), best_ious(pool.select(index), targets, config).cpu())


def best_ious(found: Candidates, targets: Targets, config: Config) -> Float[Tensor, " n"]:
    """IoU of each box with the object of its image and class that it overlaps most; 0 where there is none."""
    ious = box_iou(found.boxes[:, None], targets.boxes[found.images], config.box_geometry)
    possible = targets.valid[found.images] & (targets.labels[found.images] == found.labels[:, None])
    worst = ious.new_zeros(len(ious), 1)
    return torch.cat([ious.masked_fill(~possible, 0), worst], dim=1).amax(dim=1)


def describe(parts: Sequence[PredictedIous]) -> dict[str, float | int | None]:
    """Mean absolute and mean signed error (predicted less true) and the number of boxes; no mean of nothing."""
    error = torch.cat([part.predicted.double() - part.true.double() for part in parts])
    if not len(error):
        return {"mean_absolute_error": None, "mean_error": None, "count": 0}
    return {"mean_absolute_error": float(error.abs().mean()), "mean_error": float(error.mean()), "count": len(error)}
