"""Heads with stored weights, outputs, losses and gradients of both originals, PAA and ATSS."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from core.anchors import anchor_grid, level_shapes
from core.heads import ParallelHead
from core.layouts import from_mmdet, from_official
from core.types import Detections, Targets
from paa.config import PRESETS, Config
from paa.losses import compute_losses
from paa.model import Outputs

Arrays = dict[str, np.ndarray]
CANVAS = (128, 160)
LEVELS = [320, 80, 20, 6, 2]
MMDET = Config(profile="mmdet")
OFFICIAL = Config(profile="official", geometry="legacy")
ATSS_MMDET = replace(PRESETS["atss_centerness"], profile="mmdet")
ATSS_OFFICIAL = replace(PRESETS["atss_centerness"], profile="official", geometry="legacy")


def golden_targets(arrays: Arrays, case: str) -> Targets:
    """Ground truth of a golden case, padded."""
    counts = [len(arrays[f"{case}/gt_labels_{i}"]) for i in range(2)]
    shape = arrays.get(f"{case}/img_shape", arrays.get("img_shape"))
    assert shape is not None
    targets = Targets(
        torch.zeros(2, max(counts), 4),
        torch.zeros(2, max(counts), dtype=torch.int64),
        torch.zeros(2, max(counts), dtype=torch.bool),
        torch.from_numpy(shape),
    )
    for i, count in enumerate(counts):
        targets.boxes[i, :count] = torch.from_numpy(arrays[f"{case}/gt_bboxes_{i}"])
        targets.labels[i, :count] = torch.from_numpy(arrays[f"{case}/gt_labels_{i}"].astype(np.int64))
        targets.valid[i, :count] = True
    return targets


def stored_rows(arrays: Arrays, name: str) -> Tensor:
    """A stored map of all levels as (B, A, channels)."""
    maps = [torch.from_numpy(arrays[f"{name}_{level}"]) for level in range(5)]
    return torch.cat([part.permute(0, 2, 3, 1).flatten(1, 2) for part in maps], dim=1)


def mmdet_names(arrays: Arrays) -> dict[str, str]:
    """Our name of every stored weight of MMDetection's head."""
    keys = [key.removeprefix("param/") for key in arrays if key.startswith("param/")]
    return {key: str(from_mmdet(f"bbox_head.{key}")).removeprefix("head.") for key in keys}


def mmdet_head(arrays: Arrays) -> ParallelHead:
    """The head with the stored weights."""
    head = ParallelHead(64, 80, tower_bias=False)
    state = {name: torch.from_numpy(arrays[f"param/{key}"]) for key, name in mmdet_names(arrays).items()}
    head.load_state_dict(state)
    return head


def golden_outputs(arrays: Arrays, case: str, config: Config) -> Outputs:
    """Head outputs as leaves: the stored ones, or those of the stored features where a case keeps only these."""
    grid = anchor_grid(level_shapes(CANVAS), config.box_geometry)
    if f"{case}/cls_score_0" not in arrays:
        with torch.no_grad():
            head = mmdet_head(arrays)([torch.from_numpy(arrays[f"{case}/feat_{level}"]) for level in range(5)])
        assert head.quality is not None
        return Outputs(head.logits.requires_grad_(), head.deltas.requires_grad_(), head.quality.requires_grad_(), grid)
    quality = quality_name(arrays, case)
    logits, deltas, ious = (stored_rows(arrays, f"{case}/{name}") for name in ("cls_score", "bbox_pred", quality))
    return Outputs(logits.requires_grad_(), deltas.requires_grad_(), ious[..., 0].requires_grad_(), grid)


def quality_name(arrays: Arrays, case: str) -> str:
    """The file's name of the branch beside the boxes."""
    return "centerness" if f"{case}/loss_centerness" in arrays else "iou_pred"


def check_losses(arrays: Arrays, case: str, config: Config, names: dict[str, str]) -> None:
    """Every loss and every gradient of a golden case."""
    outputs = golden_outputs(arrays, case, config)
    losses = compute_losses(outputs, golden_targets(arrays, case), 1, 1, config=config)
    for ours, theirs in names.items():
        expected = torch.from_numpy(arrays[f"{case}/loss_{theirs}"]).sum()  # some are kept level by level
        torch.testing.assert_close(losses[ours].detach(), expected, rtol=1e-4, atol=1e-6)
    assert {name for name in losses if name.startswith("loss")} == set(names)
    sum(losses.values(), torch.zeros(())).backward()
    for tensor, name in (
        (outputs.logits, "cls_score"),
        (outputs.deltas, "bbox_pred"),
        (outputs.quality_logits, quality_name(arrays, case)),
    ):
        assert tensor is not None
        assert tensor.grad is not None
        gradient = tensor.grad.reshape(2, sum(LEVELS), -1)
        if f"{case}/grad_{name}_0" in arrays:
            expected = stored_rows(arrays, f"{case}/grad_{name}")
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)
        if f"{case}/grad_l2_{name}" in arrays:
            norms = torch.stack([part.norm() for part in gradient.split(LEVELS, dim=1)])
            torch.testing.assert_close(norms, torch.from_numpy(arrays[f"{case}/grad_l2_{name}"]), rtol=1e-3, atol=1e-6)


def official_arrays(shared: Path, name: str = "paa.npz") -> Arrays:
    """A file of the authors' code."""
    with np.load(shared / "golden_official" / name) as archive:
        return {key: archive[key] for key in archive.files}


def official_names(arrays: Arrays) -> dict[str, str]:
    """Our name of every stored weight of the authors' head."""
    keys = [key.removeprefix("param/") for key in arrays if key.startswith("param/")]
    return {key: str(from_official(f"rpn.head.{key}")).removeprefix("head.") for key in keys}


def official_head(arrays: Arrays) -> ParallelHead:
    """The authors' head with the stored weights; their scales are vectors of one."""
    head = ParallelHead(64, 80, tower_bias=True)
    state = {name: torch.from_numpy(arrays[f"param/{key}"]) for key, name in official_names(arrays).items()}
    head.load_state_dict({name: value.reshape(head.state_dict()[name].shape) for name, value in state.items()})
    return head


def check_parameter_gradients(arrays: Arrays, config: Config, head: ParallelHead, names: dict[str, str]) -> None:
    """The gradient's norm of every weight of the head, from the features of case A."""
    features = [torch.from_numpy(arrays[f"A/feat_{level}"]) for level in range(5)]
    predicted = head(features)
    assert predicted.quality is not None
    grid = anchor_grid(predicted.shapes, config.box_geometry)
    outputs = Outputs(predicted.logits, predicted.deltas, predicted.quality, grid)
    losses = compute_losses(outputs, golden_targets(arrays, "A"), 1, 1, config=config)
    sum(losses.values(), torch.zeros(())).backward()
    weights = dict(head.named_parameters())
    stored = zip(arrays["A/param_grad_names"], arrays["A/param_grad_l2"], strict=True)
    for theirs, norm in stored:
        gradient = weights[names[str(theirs)]].grad
        assert gradient is not None
        assert float(gradient.norm()) == pytest.approx(float(norm), rel=1e-3, abs=1e-6)


def check_detections(detections: Detections, arrays: Arrays, prefix: str, scale: Tensor | None = None) -> None:
    """Detections of both images, in the files' pixels."""
    for image in range(2):
        boxes, scores, labels = (
            torch.from_numpy(arrays[f"{prefix}_{name}_{image}"]) for name in ("bboxes", "scores", "labels")
        )
        valid = detections.valid[image]
        assert int(valid.sum()) == len(boxes)
        order = scores.argsort(descending=True, stable=True)  # the files order voted detections by class
        found = detections.boxes[image][valid]
        found = found if scale is None else found / scale.repeat(2)
        torch.testing.assert_close(detections.scores[image][valid], scores[order], rtol=1e-4, atol=1e-6)
        assert detections.labels[image][valid].tolist() == labels[order].tolist()
        torch.testing.assert_close(found, boxes[order], rtol=0, atol=0.01)
