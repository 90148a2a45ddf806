"""Checkpoints in the layouts of other projects, small ones too, and the command that converts them."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.anchors import STRIDES

Shapes = dict[str, tuple[int, ...]]
DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}


def official_shapes(
    backbone: str, channels: int = 256, classes: int = 80, branch: str = "iou_pred", dcn: tuple[int, ...] = ()
) -> Shapes:
    """Every name in a checkpoint of the authors and its shape, as spec PAA section 10 lists them; `dcn` stages 2..5."""
    shapes: Shapes = {"backbone.body.stem.conv1.weight": (64, 3, 7, 7)}
    entries = ("weight", "bias", "running_mean", "running_var")

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.{entry}": (width,) for entry in entries})

    def conv(name: str, out: int, into: int, kernel: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, into, kernel, kernel)
        shapes.update({f"{name}.bias": (out,)} if bias else {})

    def deformable(name: str, width: int, bias: bool) -> None:
        conv(f"{name}.offset", 27, width, 3)
        conv(f"{name}.conv", width, width, 3, bias)

    norm("backbone.body.stem.bn1", 64)
    expansion, previous = 1 if backbone == "resnet18" else 4, 64
    for stage, depth in enumerate(DEPTHS[backbone], start=1):
        width = 32 * 2**stage
        for block in range(depth):
            name = f"backbone.body.layer{stage}.{block}"
            kernels = (3, 3) if expansion == 1 else (1, 3, 1)
            widths = (width, width, width * expansion)[: len(kernels)]
            for index, (kernel, out) in enumerate(zip(kernels, widths, strict=True), start=1):
                into = previous if index == 1 else width
                if index == 2 and stage + 1 in dcn:
                    deformable(f"{name}.conv2", width, bias=False)
                else:
                    conv(f"{name}.conv{index}", out, into, kernel, bias=False)
                norm(f"{name}.bn{index}", out)
            if block == 0 and (stage > 1 or expansion > 1):
                conv(f"{name}.downsample.0", width * expansion, previous, 1, bias=False)
                norm(f"{name}.downsample.1", width * expansion)
            previous = width * expansion
    for stage in (2, 3, 4):
        conv(f"backbone.fpn.fpn_inner{stage}", channels, 64 * expansion * 2 ** (stage - 1), 1)
        conv(f"backbone.fpn.fpn_layer{stage}", channels, channels, 3)
    for level in (6, 7):
        conv(f"backbone.fpn.top_blocks.p{level}", channels, channels, 3)
    for tower in ("cls_tower", "bbox_tower"):
        for index in (0, 3, 6, 9):
            if index == 9 and dcn:
                deformable(f"rpn.head.{tower}.9", channels, bias=True)
            else:
                conv(f"rpn.head.{tower}.{index}", channels, channels, 3)
            shapes.update({f"rpn.head.{tower}.{index + 1}.{entry}": (channels,) for entry in ("weight", "bias")})
    for layer, out in (("cls_logits", classes), ("bbox_pred", 4), (branch, 1)):
        conv(f"rpn.head.{layer}", out, channels, 3)
    shapes.update({f"rpn.head.scales.{level}.scale": (1,) for level in range(5)})
    shapes.update({f"rpn.anchor_generator.cell_anchors.{level}": (1, 4) for level in range(5)})
    return shapes


def official_state(shapes: Shapes) -> dict[str, Tensor]:
    """Random tensors of these shapes, and the authors' anchors."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        state[name] = 0.05 * torch.randn(shape, generator=generator)
        if name.endswith("running_var"):
            state[name] = 1 + state[name].abs()
        if "cell_anchors" in name:
            stride = STRIDES[int(name[-1])]
            state[name] = torch.tensor([[-3.5, -3.5, 4.5, 4.5]]) * stride + torch.tensor([[0.5, 0.5, -0.5, -0.5]])
    return state


def small_state(**options: Any) -> dict[str, Tensor]:
    return official_state(official_shapes("resnet18", channels=64, **options))


def save(path: Path, state: dict[str, Tensor], **beside: Any) -> Path:
    """A file as the authors' code leaves it: the model under DistributedDataParallel, and its training state."""
    model = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"model": model, "optimizer": {}, "scheduler": {}, "iteration": 90_000, **beside}, path)
    return path


def run(command: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """A command in this process; its mistakes arrive as UserError."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    command.main()


def mmdet_state(ours: Mapping[str, Tensor], layers: Mapping[str, str]) -> dict[str, Tensor]:
    """A model's tensors by MMDetection's names; `layers` gives its name of each layer of our head that has another."""
    towers = {"cls_tower": "cls_convs.{}", "box_tower": "reg_convs.{}", "box_conv": "vfnet_reg_conv"}
    theirs = {}
    for key, tensor in ours.items():
        part, layer, *rest = key.replace("conv2.offset", "conv2.conv_offset").split(".")
        if part == "fpn":
            rest.insert(1, "conv")
        elif layer in towers:
            index, *rest = rest
            rest = ["conv_offset", rest[1]] if rest[0] == "offset" else rest
            rest.insert(0, "conv" if int(index) % 3 == 0 else "gn")
            layer = towers[layer].format(int(index) // 3)
        part = {"fpn": "neck", "head": "bbox_head"}.get(part, part)
        layer = {"lateral": "lateral_convs", "output": "fpn_convs"}.get(layer, layers.get(layer, layer))
        theirs[".".join([part, layer, *rest])] = tensor
    return theirs
