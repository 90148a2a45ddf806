"""How many anchors are positive and negative, before and after promotion (Figs. 1 and 2 of the paper).

Note: the paper counts during training, so over many states of one network. Here: one network in evaluation mode.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from core import distributed
from core.boxes import box_iou
from core.commands import load_trained
from core.data.loader import eval_batches, padded_count, train_batches
from core.data.sources import open_data
from core.data.table import Table
from core.data.transforms import clip_boxes, corner_boxes, scale_boxes, usable_boxes
from core.inference import check_categories
from core.runlog import write_json
from core.types import BACKGROUND, IGNORED, Assignment, Batch, Targets
from padet.anchors import build_anchors
from padet.assigner import filter_easy_negatives, match_anchors
from padet.augment import augmentation
from padet.config import PRESETS, Config
from padet.model import Outputs, PADet, float32_outputs, promoted_anchors

IOU_EDGES = (0.5, 0.6, 0.7, 0.8, 0.9)  # between the bars of Fig. 2; lower IoUs are those of objects' own anchors
IOU_NAMES = ("below 0.5", "0.5 to 0.6", "0.6 to 0.7", "0.7 to 0.8", "0.8 to 0.9", "0.9 and more")
RESULT = "anchors-{split}.json"

Sums = Float64[Tensor, " n"]  # over images: images, positives, negatives, ignored, positives of every IOU_NAMES


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every setting of Fig. 1 that a model has, or the initial anchors of a preset; printed and written as JSON.

    Args:
        arguments: of `padet.statistics.parser`.

    Returns:
        What `describe` says of each setting.

    Raises:
        UserError: weights and data that do not fit each other, images that cannot be read.
    """
    device = distributed.pick_device(arguments.device)
    trained = load_trained(arguments, "padet", Config, PADet, device) if arguments.weights else None
    config = trained.config if trained else preset_config(arguments)
    split = "train" if arguments.steps else arguments.split
    data = open_data(arguments.data or config.data, config.seed, splits=(split,), voc_one_based=config.voc_one_based)
    table = data.split(split)
    if trained:
        check_categories(table, trained.categories, str(arguments.weights))
        batches = training_batches(table, config, arguments.steps) if arguments.steps else eval_batches(table, config)
        sums = add_up(model_sums(trained.model, batch.to(device), config) for batch in batches)
    else:
        targets = table_targets(table, config)
        if arguments.steps:
            targets = (batch.targets for batch in training_batches(table, config, arguments.steps))
        sums = add_up(initial_sums(Targets(*(part.to(device) for part in some)), config) for some in targets)
    found = {name: describe(values) for name, values in sums.items()}
    print("\n".join(report_lines(found)))
    boxes = boxes_per_image(table)
    facts = {"data": data.name, "split": split, "steps": arguments.steps, "size": config.size, "boxes": boxes}
    out = arguments.out or (arguments.weights.parent / RESULT.format(split=split) if trained else None)
    where = f"means over {found['initial']['images']} images with objects of {data.name} {split}"
    where += f", where an image has {boxes:.1f} before augmentation" if arguments.steps else ""
    print(f"{where}; written to {out}" if out else where)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        source = str(arguments.weights) if trained else None
        write_json(out, {"settings": found, "weights": source, "preset": arguments.preset, **facts})
    return found


def boxes_per_image(table: Table) -> float:
    """Mean number of annotated objects of the images that have any, which counts of positives follow."""
    owners = np.repeat(np.arange(len(table.image_ids)), np.diff(table.box_offsets))[~table.crowd]
    return len(owners) / max(1, len(np.unique(owners)))


def preset_config(arguments: argparse.Namespace) -> Config:
    """The preset with the command line's batch size and workers."""
    asked = {name: getattr(arguments, name) for name in ("workers", "batch_size")}
    changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    return replace(PRESETS[arguments.preset], device=arguments.device, **changes)


def training_batches(table: Table, config: Config, steps: int) -> Iterator[Batch]:
    """The first batches of a run with this seed, augmented as there."""
    return train_batches(table, config, start=0, steps=steps, augment=augmentation(config))


def table_targets(table: Table, config: Config) -> Iterator[Targets]:
    """The objects of all images as evaluation has them, without reading an image."""
    for first in range(0, len(table), config.batch_size):
        rows = range(first, min(first + config.batch_size, len(table)))
        objects = [square_boxes(table, row, config) for row in rows]
        count = padded_count(max(len(boxes) for boxes in objects))
        boxes, valid = torch.zeros(len(rows), count, 4), torch.zeros(len(rows), count, dtype=torch.bool)
        for place, some in enumerate(objects):
            boxes[place, : len(some)] = torch.from_numpy(some)
            valid[place, : len(some)] = True
        labels = torch.zeros(valid.shape, dtype=torch.int64)  # matching does not ask for classes
        yield Targets(boxes, labels, valid, torch.full((len(rows), 2), config.size))


def square_boxes(table: Table, row: int, config: Config) -> Float64[np.ndarray, "g 4"]:
    """An image's usable boxes in pixels of the network input."""
    size, of_row = (int(table.heights[row]), int(table.widths[row])), table.box_slice(row)
    boxes = clip_boxes(corner_boxes(table.boxes_xywh[of_row], config.box_geometry), size, config.box_geometry)
    return scale_boxes(boxes[usable_boxes(boxes, table.crowd[of_row])], size, (config.size, config.size))


@torch.no_grad()
def initial_sums(targets: Targets, config: Config) -> dict[str, Sums]:
    """The first setting of Fig. 1 alone: the matching of initial anchors."""
    boxes = build_anchors(config.size, config.anchors).boxes.to(targets.boxes.device)
    return {"initial": count(match_anchors(boxes, targets, config.positive_iou, config.negative_iou), boxes, targets)}


@torch.no_grad()
def model_sums(model: nn.Module, batch: Batch, config: Config) -> dict[str, Sums]:
    """Every setting of Fig. 1 that the model has, in a batch."""
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        outputs = model(batch.images, batch.sizes)
    return setting_sums(float32_outputs(outputs), batch.targets, config)


def setting_sums(outputs: Outputs, targets: Targets, config: Config) -> dict[str, Sums]:
    """The settings of Fig. 1: initial; APM_C without easy negatives; APM_R promoted; APM_CR both.

    All are read off one model. In the paper each may have been trained by itself.
    """
    thresholds = config.positive_iou, config.negative_iou
    stages = {"initial": outputs.anchors.boxes}
    if outputs.apm_deltas is not None:
        stages["APM_R"] = promoted_anchors(outputs)
    sums = {}
    for name, boxes in stages.items():
        assignment = match_anchors(boxes, targets, *thresholds)
        sums[name] = count(assignment, boxes, targets)
        if outputs.apm_logits is not None:
            kept = filter_easy_negatives(assignment, outputs.apm_logits, config.theta)
            sums[{"initial": "APM_C", "APM_R": "APM_CR"}[name]] = count(kept, boxes, targets)
    return {name: sums[name] for name in ("initial", "APM_C", "APM_R", "APM_CR") if name in sums}


def count(assignment: Assignment, boxes: Float[Tensor, "*#B A 4"], targets: Targets) -> Sums:
    """Sums over the images that have an object.

    Args:
        assignment: of the boxes.
        boxes: initial anchors (A, 4) or promoted ones (B, A, 4).
        targets: the objects.
    """
    owner = assignment.gt_index[targets.valid.any(dim=1)]
    kinds = [torch.tensor(len(owner)), assignment.positive.sum(), (owner == BACKGROUND).sum(), (owner == IGNORED).sum()]
    images, anchors = assignment.positive.nonzero().unbind(1)
    learned = targets.boxes[images, assignment.gt_index[images, anchors]]
    ious = box_iou(boxes.expand(len(targets.valid), -1, -1)[images, anchors], learned)
    bars = torch.bucketize(ious, ious.new_tensor(IOU_EDGES), right=True).bincount(minlength=len(IOU_NAMES))
    return torch.cat([torch.stack([kind.cpu() for kind in kinds]), bars.cpu()]).double()


def add_up(parts: Iterable[Mapping[str, Sums]]) -> dict[str, Sums]:
    """The sums of all batches."""
    total: dict[str, Sums] = {}
    for part in parts:
        for name, values in part.items():
            total[name] = total.get(name, torch.zeros_like(values)) + values
    return total


def describe(sums: Sums) -> dict[str, Any]:
    """Means over images, and negatives and other anchors to a positive; no mean and no ratio of nothing."""
    images, positives, negatives, ignored, *bars = sums.tolist()

    def ratio(number: float, of: float) -> float | None:
        return number / of if of else None

    return {
        "images": int(images),
        "positives": ratio(positives, images),
        "negatives": ratio(negatives, images),
        "ignored": ratio(ignored, images),
        "negatives_per_positive": ratio(negatives, positives),
        "others_per_positive": ratio(negatives + ignored, positives),
        "positives_by_iou": {name: ratio(bar, images) for name, bar in zip(IOU_NAMES, bars, strict=True)},
    }


def report_lines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table of Fig. 1, then that of Fig. 2: positives by their IoU with the object that they learn."""
    lines = [f"{'an image':<10}{'positives':>11}{'negatives':>11}{'ignored':>11}  positives : negatives"]
    for name, values in found.items():
        kinds = "".join(f"{_shown(values[kind]):>11}" for kind in ("positives", "negatives", "ignored"))
        lines.append(f"{name:<10}{kinds}  1 : {_shown(values['negatives_per_positive'])}")
    stages = [name for name in ("initial", "APM_R") if name in found]
    lines.append(f"{'positives of IoU':<16}" + "".join(f"{name:>11}" for name in stages))
    for bar in IOU_NAMES:
        lines.append(f"{bar:<16}" + "".join(f"{_shown(found[name]['positives_by_iou'][bar]):>11}" for name in stages))
    return lines


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.1f}"
