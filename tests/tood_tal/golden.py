"""Heads, outputs, losses and detections of the published implementations of TOOD."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from core.anchors import anchor_grid, level_shapes
from core.types import Detections, Targets
from tood_tal.config import Config
from tood_tal.losses import assigned_losses, learn
from tood_tal.model import Outputs, build_head, run_head

Arrays = dict[str, np.ndarray]
CANVAS = (128, 160)
LEVELS = [320, 80, 20, 6, 2]
LAYERS = {
    "inter_convs": "interactive",
    "cls_decomp": "cls_decomposition",
    "reg_decomp": "box_decomposition",
    "tood_cls": "cls_logits",
    "tood_reg": "bbox_pred",
    "cls_prob_module": "alignment.probability",
    "reg_offset_module": "alignment.offset",
    "cls_prob_conv1": "alignment.probability.0",
    "cls_prob_conv2": "alignment.probability.2",
    "reg_offset_conv1": "alignment.offset.0",
    "reg_offset_conv2": "alignment.offset.2",
    "scales": "decoder.scales",
}
PARTS = {
    "conv": "0",
    "gn": "1",
    "layer_attention": "attention",
    "la_conv1": "attention.0",
    "la_conv2": "attention.2",
    "reduction_conv": "",
}


def head_name(key: str) -> str:
    """Our name inside the head of a stored weight, both layouts."""
    first, *rest = key.split(".")
    if first in ("cls_decomp", "reg_decomp") and rest[0] == "reduction_conv":
        rest = ["norm" if rest[1] == "gn" else "reduction", *rest[2:]]
    return ".".join([LAYERS[first], *(PARTS.get(part, part) for part in rest)])


def golden_config(profile: str, anchor_based: bool) -> Config:
    """The published settings."""
    return Config(profile=profile, anchor_based=anchor_based)  # type: ignore[arg-type]


def golden_head(arrays: Arrays, config: Config) -> nn.Module:
    """The head, 64 channels wide, with the stored weights."""
    weights = {key.removeprefix("param/"): value for key, value in arrays.items() if key.startswith("param/")}
    head = build_head(replace(config, channels=64), 80)
    head.load_state_dict({head_name(key): torch.from_numpy(value) for key, value in weights.items()})
    return head


def run_golden_head(arrays: Arrays, case: str, head: nn.Module) -> Outputs:
    """The head's outputs for the stored features of a case."""
    return run_head(head, [torch.from_numpy(arrays[f"{case}/feat_{level}"]) for level in range(5)], 8.0)


def stored_rows(arrays: Arrays, name: str) -> Tensor:
    """A stored map of all levels as (B, A, channels)."""
    maps = [torch.from_numpy(arrays[f"{name}_{level}"]) for level in range(5)]
    return torch.cat([part.permute(0, 2, 3, 1).flatten(1, 2) for part in maps], dim=1)


def stored_outputs(arrays: Arrays, case: str) -> Outputs:
    """The stored outputs of a case as leaves."""
    scores, boxes = (stored_rows(arrays, f"{case}/{name}").requires_grad_() for name in ("cls_score", "bbox_pred"))
    return Outputs(scores, boxes, None, None, anchor_grid(level_shapes(CANVAS)))


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


def losses_of(outputs: Outputs, arrays: Arrays, case: str, by_atss: bool, config: Config) -> dict[str, Tensor]:
    """The loss terms of a case in one phase."""
    targets = golden_targets(arrays, case)
    losses = assigned_losses(outputs, targets, learn(outputs, targets, by_atss, config), by_atss, config)
    return {name: value for name, value in losses.items() if name.startswith("loss_")}


def check_losses(losses: Mapping[str, Tensor], arrays: Arrays, prefix: str) -> None:
    """Both terms, kept level by level in the file."""
    assert set(losses) == {"loss_cls", "loss_box"}
    for ours, theirs in (("loss_cls", "cls"), ("loss_box", "bbox")):
        expected = torch.from_numpy(arrays[f"{prefix}loss_{theirs}"]).sum()
        torch.testing.assert_close(losses[ours].detach(), expected, rtol=1e-4, atol=1e-6)


def check_gradient(gradient: Tensor | None, arrays: Arrays, prefix: str, name: str) -> None:
    """The gradient of an output, whole where it is stored, and its norm on every level."""
    assert gradient is not None
    if f"{prefix}grad_{name}_0" in arrays:
        torch.testing.assert_close(gradient, stored_rows(arrays, f"{prefix}grad_{name}"), rtol=1e-3, atol=1e-6)
    norms = torch.stack([part.norm() for part in gradient.split(LEVELS, dim=1)])
    torch.testing.assert_close(norms, torch.from_numpy(arrays[f"{prefix}grad_l2_{name}"]), rtol=1e-3, atol=1e-6)


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
