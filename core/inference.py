"""From a model and a split to metrics: what evaluation during training and the `evaluate` command share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from core import checkpoint, distributed
from core.config import TrainConfig
from core.data.images import ImageFolder
from core.data.loader import eval_batches
from core.data.sources import DataSource
from core.data.table import Category, Table
from core.errors import UserError
from core.evaluator import (
    DetectionArrays,
    GroundTruth,
    coco_metrics,
    concatenate,
    detection_arrays,
    ground_truth_from_table,
    read_ground_truth,
)
from core.types import Batch, Detections

# A method's `detect` with its configuration bound: (outputs, sizes, original_sizes=...) to detections.
Detect = Callable[..., Detections]


def describe_run(method: str, data: DataSource, config: TrainConfig) -> dict[str, Any]:
    """What travels in every checkpoint beside weights and configuration: plain values only."""
    return {
        "method": method,
        "categories": [[category.id, category.name] for category in data.categories],
        "geometry": config.geometry,
        "profile": config.profile,
        "data": data.name,
        "data_fingerprint": data.fingerprint,
        "licence": data.licence,
    }


def load_start_weights(model: nn.Module, config: TrainConfig, method: str) -> None:
    """Start from the model that `config.weights` names, if it names one.

    Raises:
        UserError: for a checkpoint that is damaged, another method's, or of another layout or number of classes.
    """
    if config.weights:
        checkpoint.load_weights(model, checkpoint.load(config.weights, method=method), config.weights)


def on_validation(
    detect: Detect, table: Table, config: TrainConfig, device: torch.device
) -> Callable[[nn.Module], dict[str, float]]:
    """What `fit` calls to evaluate: a model to the 12 COCO numbers on this split, shared out over the ranks."""

    def evaluate(model: nn.Module) -> dict[str, float]:
        found = detect_table(model, detect, table, config, device)
        return coco_metrics(ground_truth(table), found) if distributed.is_main() else {}

    return evaluate


def ground_truth(table: Table) -> GroundTruth:
    """What a split's detections are compared with: every box of its annotation file.

    Reading drops a few boxes that cannot be targets (`core.data.parse`). Where that happened the file is read again:
    official numbers count them.
    """
    return read_ground_truth(Path(table.source)) if table.notes else ground_truth_from_table(table)


@torch.no_grad()
def detect_table(
    model: nn.Module, detect: Detect, table: Table, config: TrainConfig, device: torch.device
) -> DetectionArrays:
    """Detections of a whole split in pixels of the image files; each rank does its share, every rank gets all.

    The model must be in evaluation mode and on `device`.
    """
    category_ids = np.array([category.id for category in table.categories], dtype=np.int64)
    batches = eval_batches(table, config, rank=distributed.rank(), world_size=distributed.world_size())
    parts = []
    for batch in batches:
        detections = detect_batch(model, detect, batch.to(device), config)
        parts.append(detection_arrays(detections, batch, category_ids, config.box_geometry))
    return concatenate(distributed.gather_objects(concatenate(parts)))


def detect_batch(model: nn.Module, detect: Detect, batch: Batch, config: TrainConfig) -> Detections:
    """Detections of one batch in pixels of the network input; the network in the configuration's precision."""
    device_type = batch.images.device.type
    with torch.autocast(device_type, torch.bfloat16, enabled=config.precision == "bf16"):
        outputs = model(batch.images, batch.sizes)
    return detect(outputs, batch.sizes, original_sizes=batch.original_sizes)


def check_categories(table: Table, categories: tuple[Category, ...], weights: str) -> None:
    """Refuse data whose classes are not the model's.

    Raises:
        UserError: naming the first difference.
    """
    if len(table.categories) != len(categories):
        raise UserError(
            f"{weights}: the model knows {len(categories)} classes, {table.source} has {len(table.categories)}"
        )
    for mine, theirs in zip(categories, table.categories, strict=True):
        if mine != theirs:
            raise UserError(
                f"{weights}: the model's class {mine.id} {mine.name!r} is {theirs.id} {theirs.name!r} in {table.source}"
            )


def example_images(data: DataSource) -> str:
    """Something to predict on: the word shapes, or the first image of val."""
    reader = data.val.images
    return str(reader.folder / data.val.name(0)) if isinstance(reader, ImageFolder) else "shapes"
