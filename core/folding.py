"""Batch norm by stored statistics merged into the convolution before it: fewer passes over maps."""

from itertools import pairwise
from typing import TypeGuard

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from core.backbone import ResNetBackbone
from core.layers import FrozenBatchNorm

# Modules whose children run in the order in which they are listed, a norm right after its convolution.
ORDERED = (ResNetBackbone, BasicBlock, Bottleneck, nn.Sequential)


@torch.no_grad()
def fold_norms(model: nn.Module) -> int:
    """Fold every frozen or evaluated batch norm of a model into its convolution, in place; for inference only.

    y = (w * x - mean) / sqrt(variance + eps) * weight + bias is a convolution with other weights. They are computed in
    float64, so outputs differ by float32's rounding. What is folded no longer has the names that checkpoints use.

    Returns:
        The number of norms that were folded.
    """
    folded = 0
    for parent in [module for module in model.modules() if isinstance(module, ORDERED)]:
        for (_, conv), (name, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and is_fixed(norm):
                fold(conv, norm)
                setattr(parent, name, nn.Identity())
                folded += 1
    return folded


def is_fixed(module: nn.Module) -> TypeGuard[FrozenBatchNorm | nn.BatchNorm2d]:
    """Whether a module is a batch norm that uses stored statistics now."""
    return isinstance(module, FrozenBatchNorm) or (isinstance(module, nn.BatchNorm2d) and not module.training)


def fold(conv: nn.Conv2d, norm: FrozenBatchNorm | nn.BatchNorm2d) -> None:
    """Give a convolution the weights and bias of itself followed by a batch norm."""
    stored = norm.weight, norm.bias, norm.running_mean, norm.running_var
    weight, bias, mean, variance = (part.double() for part in stored if part is not None)
    scale = weight / (variance + norm.eps).sqrt()
    start = torch.zeros_like(mean) if conv.bias is None else conv.bias.double()
    kind = conv.weight.dtype
    conv.weight = nn.Parameter((conv.weight.double() * scale[:, None, None, None]).to(kind))
    conv.bias = nn.Parameter((bias + (start - mean) * scale).to(kind))
