"""Heads, outputs, losses and detections of the published implementations of every host."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core.anchors import anchor_grid, level_shapes
from core.types import Detections, Targets
from dynamic_atss.config import Config
from dynamic_atss.losses import compute_losses
from dynamic_atss.model import Outputs, build_head, run_head

Arrays = dict[str, np.ndarray]
CANVAS = (128, 160)
LEVELS = [320, 80, 20, 6, 2]
PLAIN = Config(pred_weight=0.0)
ATSS_MMDET = replace(PLAIN, profile="mmdet", class_loss="focal", quality="centerness")
ATSS_OFFICIAL = replace(ATSS_MMDET, profile="official", geometry="legacy")
DYNAMIC_OFFICIAL = Config(profile="official", geometry="legacy")
GFL_MMDET = replace(PLAIN, profile="mmdet", host="gfl")
GFLV2_OFFICIAL = replace(PLAIN, profile="official", host="gflv2")
VFNET_MMDET = replace(PLAIN, profile="mmdet", host="vfnet")
VFNET_OFFICIAL = replace(VFNET_MMDET, profile="official")
MMDET_NAMES = {
    "atss_cls": "cls_logits",
    "gfl_cls": "cls_logits",
    "vfnet_cls": "cls_logits",
    "atss_reg": "bbox_pred",
    "gfl_reg": "bbox_pred",
    "vfnet_reg": "bbox_pred",
    "atss_centerness": "quality",
    "reg_conf": "quality",
    "vfnet_reg_refine": "refine_pred",
    "vfnet_reg_refine_dconv": "box_star",
    "vfnet_cls_dconv": "cls_star",
    "scales": "scales",
    "scales_refine": "refine_scales",
}
TOWERS = {"cls_convs": "cls_tower", "reg_convs": "box_tower", "cls_tower": "cls_tower", "bbox_tower": "box_tower"}
OFFICIAL_NAMES = {"cls_logits": "cls_logits", "bbox_pred": "bbox_pred", "centerness": "quality", "scales": "scales"}


def arrays_of(path: Path) -> Arrays:
    """All arrays of a file."""
    with np.load(path) as archive:
        return {key: archive[key] for key in archive.files}


def head_name(key: str) -> str | None:
    """Our name inside the head of a stored weight, both layouts; None for GFL's constant buffer."""
    first, *rest = key.split(".")
    if first == "integral":
        return None
    if first in ("cls_convs", "reg_convs"):
        index, layer, last = rest
        return f"{TOWERS[first]}.{3 * int(index) + (layer == 'gn')}.{last}"
    if first == "vfnet_reg_conv":
        layer, last = rest
        return f"box_conv.{int(layer == 'gn')}.{last}"
    name = TOWERS.get(first) or OFFICIAL_NAMES.get(first) or MMDET_NAMES[first]
    return ".".join([name, *rest])


def golden_head(arrays: Arrays, config: Config) -> nn.Module:
    """The host's head, 64 channels wide, with the stored weights."""
    weights = {key.removeprefix("param/"): value for key, value in arrays.items() if key.startswith("param/")}
    state = {name: torch.from_numpy(value) for key, value in weights.items() if (name := head_name(key))}
    head = build_head(replace(config, channels=64), len(state["cls_logits.bias"]))
    wanted = head.state_dict()
    head.load_state_dict({name: value.reshape(wanted[name].shape) for name, value in state.items()})
    return head


def run_golden_head(arrays: Arrays, case: str, config: Config, head: nn.Module) -> Outputs:
    """The head's outputs for the stored features of a case."""
    features = [torch.from_numpy(arrays[f"{case}/feat_{level}"]) for level in range(5)]
    return run_head(head, features, config.box_geometry, 8.0)


def stored_rows(arrays: Arrays, name: str) -> Tensor:
    """A stored map of all levels as (B, A, channels)."""
    maps = [torch.from_numpy(arrays[f"{name}_{level}"]) for level in range(5)]
    return torch.cat([part.permute(0, 2, 3, 1).flatten(1, 2) for part in maps], dim=1)


def stored_outputs(arrays: Arrays, case: str, config: Config) -> Outputs:
    """The stored outputs of a case as leaves; for GFLV2, whose scores are stored joined, see its tests."""
    grid = anchor_grid(level_shapes(CANVAS), config.box_geometry)
    logits, regression = (stored_rows(arrays, f"{case}/{name}") for name in ("cls_score", "bbox_pred"))
    quality = refined = None
    if f"{case}/centerness_0" in arrays:
        quality = stored_rows(arrays, f"{case}/centerness")[..., 0].requires_grad_()
    if f"{case}/bbox_pred_refine_0" in arrays:
        refined = stored_rows(arrays, f"{case}/bbox_pred_refine").requires_grad_()
    return Outputs(logits.requires_grad_(), regression.requires_grad_(), quality, refined, grid)


def golden_targets(arrays: Arrays, case: str) -> Targets:
    """Ground truth of a case, padded."""
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


def losses_of(outputs: Outputs, arrays: Arrays, case: str, config: Config) -> dict[str, Tensor]:
    """The loss terms of a case."""
    losses = compute_losses(outputs, golden_targets(arrays, case), 1, 1, config=config)
    return {name: value for name, value in losses.items() if name.startswith("loss_")}


def check_losses(losses: Mapping[str, Tensor], arrays: Arrays, case: str, names: Mapping[str, str]) -> None:
    """Every term; `names` gives the file's name of each of ours."""
    assert set(losses) == set(names)
    for ours, theirs in names.items():
        expected = torch.from_numpy(arrays[f"{case}/loss_{theirs}"]).sum()  # some are kept level by level
        torch.testing.assert_close(losses[ours].detach(), expected, rtol=1e-4, atol=1e-6)


def check_gradient(gradient: Tensor | None, arrays: Arrays, case: str, name: str) -> None:
    """The gradient of an output, whole where it is stored, and its norm on every level."""
    assert gradient is not None
    gradient = gradient.reshape(2, sum(LEVELS), -1)
    if f"{case}/grad_{name}_0" in arrays:
        torch.testing.assert_close(gradient, stored_rows(arrays, f"{case}/grad_{name}"), rtol=1e-3, atol=1e-6)
    norms = torch.stack([part.norm() for part in gradient.split(LEVELS, dim=1)])
    torch.testing.assert_close(norms, torch.from_numpy(arrays[f"{case}/grad_l2_{name}"]), rtol=1e-3, atol=1e-6)


def check_parameter_gradients(head: nn.Module, losses: Mapping[str, Tensor], arrays: Arrays) -> None:
    """The gradient's norm of every weight of the head in case A."""
    sum(losses.values(), torch.zeros(())).backward()
    weights = dict(head.named_parameters())
    for theirs, norm in zip(arrays["A/param_grad_names"], arrays["A/param_grad_l2"], strict=True):
        name = head_name(str(theirs))
        assert name is not None
        gradient = weights[name].grad
        assert gradient is not None
        assert float(gradient.norm()) == pytest.approx(float(norm), rel=1e-3, abs=1e-6), theirs


def check_detections(detections: Detections, arrays: Arrays, prefix: str) -> None:
    """Detections of both images."""
    for image in range(2):
        boxes, scores, labels = (
            torch.from_numpy(arrays[f"{prefix}_{name}_{image}"]) for name in ("bboxes", "scores", "labels")
        )
        valid = detections.valid[image]
        assert int(valid.sum()) == len(boxes)
        torch.testing.assert_close(detections.scores[image][valid], scores, rtol=1e-4, atol=1e-6)
        assert detections.labels[image][valid].tolist() == labels.tolist()
        torch.testing.assert_close(detections.boxes[image][valid], boxes, rtol=0, atol=0.01)


VARIANTS: dict[str, dict[str, Any]] = {"det": {}, "det_small": {"pre_nms_top": 100, "max_detections": 20}}
