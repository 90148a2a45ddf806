"""torchvision's ResNet and ResNeXt as C3, C4, C5, with frozen batch norm and deformable convolutions.

Two treatments, by `config.switches.caffe2_backbone` (spec PAA sections 0, 1 and 8):

- torchvision's weights: stride in the 3x3, batch norm by stored statistics with eps 1e-5; its weight and bias train
  after the frozen stages.
- Caffe2's (Detectron) weights: stride in the 1x1 for ResNet, in the 3x3 for ResNeXt; batch norm without epsilon, never
  trained.

Without weights a backbone learns with ordinary batch norm instead (`config.norm`); its statistics are each rank's own.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import (
    ResNet18_Weights,
    ResNet34_Weights,
    ResNet50_Weights,
    ResNet101_Weights,
    ResNeXt101_32X8D_Weights,
    ResNeXt101_64X4D_Weights,
    WeightsEnum,
)
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from core.config import PyramidConfig, TrainConfig
from core.errors import UserError
from core.foreign import read_caffe2
from core.layers import FrozenBatchNorm, deformable
from core.layouts import DETECTRON_BIAS, DETECTRON_DROPPED, DETECTRON_RULES, rename


class Architecture(NamedTuple):
    """A residual network by torchvision's constructor arguments."""

    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, int, int, int]  # blocks of C2 to C5
    groups: int = 1  # of the 3x3 convolutions
    width_per_group: int = 64  # channels of a group in C2
    weights: WeightsEnum | None = None  # torchvision's ImageNet weights; the first release, which papers compare with


ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": Architecture(BasicBlock, (2, 2, 2, 2), weights=ResNet18_Weights.IMAGENET1K_V1),
    "resnet34": Architecture(BasicBlock, (3, 4, 6, 3), weights=ResNet34_Weights.IMAGENET1K_V1),
    "resnet50": Architecture(Bottleneck, (3, 4, 6, 3), weights=ResNet50_Weights.IMAGENET1K_V1),
    "resnet101": Architecture(Bottleneck, (3, 4, 23, 3), weights=ResNet101_Weights.IMAGENET1K_V1),
    "resnext101_32x8d": Architecture(Bottleneck, (3, 4, 23, 3), 32, 8, ResNeXt101_32X8D_Weights.IMAGENET1K_V1),
    "resnext101_64x4d": Architecture(Bottleneck, (3, 4, 23, 3), 64, 4, ResNeXt101_64X4D_Weights.IMAGENET1K_V1),
    "resnext152_32x8d": Architecture(Bottleneck, (3, 8, 36, 3), 32, 8),
}


class ResNetBackbone(nn.Module):
    """A torchvision residual network up to C5, under torchvision's names (`conv1`, `bn1`, `layer1` = C2, ...)."""

    def __init__(self, network: ResNet) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu, self.maxpool = network.conv1, network.bn1, network.relu, network.maxpool
        self.layer1, self.layer2 = network.layer1, network.layer2
        self.layer3, self.layer4 = network.layer3, network.layer4
        c3, c4, c5 = (_out_channels(stage) for stage in self.stages[1:])
        self.out_channels: tuple[int, int, int] = (c3, c4, c5)

    @property
    def stages(self) -> tuple[nn.Sequential, ...]:
        """C2, C3, C4 and C5 as sequences of blocks."""
        return self.layer1, self.layer2, self.layer3, self.layer4

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _ _ _"]]:
        """C3, C4 and C5 (strides 8, 16, 32) of normalised images."""
        c2 = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(images)))))
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return [c3, c4, self.layer4(c4)]


def build_backbone(config: PyramidConfig) -> ResNetBackbone:
    """The backbone of a pyramid, at its random start (see `load_backbone_weights`).

    Raises:
        UserError: if `dcn_groups` does not divide the channels of a deformable convolution.
    """
    backbone = build_resnet(config)
    for stage in config.dcn_stages:
        _deform(backbone.stages[stage - 2], config.dcn_groups)
    freeze_stages(backbone, config.frozen_stages)
    return backbone


def build_resnet(config: TrainConfig) -> ResNetBackbone:
    """The plain residual network of a configuration, at its random start, all of it trained but for a frozen norm.

    Every residual branch starts at zero where its last norm trains: batch norm by stored statistics does not normalise
    a random network, whose activations would double in variance with every block (SkipInit, De and Smith 2020).
    """
    architecture = ARCHITECTURES[config.backbone]
    caffe2 = config.switches.caffe2_backbone
    frozen = partial(FrozenBatchNorm, eps=0.0 if caffe2 else 1e-5, trainable=not caffe2)
    network = ResNet(
        architecture.block,
        list(architecture.depths),
        groups=architecture.groups,
        width_per_group=architecture.width_per_group,
        norm_layer=frozen if config.norm == "frozen" else nn.BatchNorm2d,
        zero_init_residual=not caffe2,
    )
    backbone = ResNetBackbone(network)
    if caffe2 and architecture.block is Bottleneck and architecture.groups == 1:
        _stride_in_1x1(backbone)
    return backbone


def freeze_stages(backbone: ResNetBackbone, count: int) -> None:
    """Stop training the first `count` stages: 0 none, 1 the stem, 2 stem and C2, ... 5 everything.

    A deformable convolution's offsets freeze with their stage.
    """
    stages: list[tuple[nn.Module, ...]] = [(backbone.conv1, backbone.bn1), *((stage,) for stage in backbone.stages)]
    for modules in stages[:count]:
        for module in modules:
            module.requires_grad_(False)


def _blocks(stage: nn.Sequential) -> list[Any]:
    """The stage's residual blocks; untyped, as torchvision's attributes are."""
    return list(stage)


def _out_channels(stage: nn.Sequential) -> int:
    last = _blocks(stage)[-1]
    return last.conv3.out_channels if isinstance(last, Bottleneck) else last.conv2.out_channels


def _stride_in_1x1(backbone: ResNetBackbone) -> None:
    """Caffe2's ResNet halves the map in a stage's first 1x1 convolution, torchvision's in the 3x3 after it."""
    for stage in backbone.stages:
        first = _blocks(stage)[0]
        first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride


def _deform(stage: nn.Sequential, offset_groups: int) -> None:
    """Make the 3x3 of every block deformable; of a basic block's two the second."""
    for block in _blocks(stage):
        if block.conv2.in_channels % offset_groups:
            raise UserError(
                f"dcn_groups {offset_groups} does not divide the {block.conv2.in_channels} channels of a stage"
            )
        block.conv2 = deformable(block.conv2, offset_groups)


def load_backbone_weights(backbone: ResNetBackbone, source: str, config: TrainConfig) -> None:
    """Fill a backbone with ImageNet weights. Offsets of deformable convolutions keep their start.

    Args:
        backbone: made by `build_backbone(config)`; unchanged when an error is raised.
        source: `cached` (torchvision's, already in torch's cache folder), `imagenet` (the same, downloaded if it is not
            there), `none`, or a file of torchvision's layout (.pth or .safetensors; half precision is converted).
            Profile `official` wants a file with Caffe2's weights: one of Detectron's pickles (.pkl), or such a file.
        config: names the backbone and the profile.

    Raises:
        UserError: file missing, unreadable, or of another network; no connection; weights that do not fit the profile.
    """
    if source == "none":
        return
    if source in ("cached", "imagenet"):
        state = imagenet_weights(config, download=source == "imagenet")
    elif source.endswith(".pkl"):
        state = detectron_weights(Path(source), config)
    else:
        state = read_weights(Path(source))
    prefix = f"backbone_weights {source} for {config.backbone}"
    state = {key: value for key, value in state.items() if not key.startswith("fc.") and not _is_counter(key)}
    wanted = {key: value for key, value in backbone.state_dict().items() if not _is_counter(key)}
    check_weights(state, wanted, prefix)
    backbone.load_state_dict(state, strict=False)


def imagenet_weights(config: TrainConfig, download: bool) -> dict[str, Tensor]:
    """torchvision's ImageNet weights of a backbone, from torch's cache folder or, if `download`, its server."""
    weights = ARCHITECTURES[config.backbone].weights
    if config.switches.caffe2_backbone:
        raise UserError(
            "backbone_weights: torchvision's weights do not fit profile official's Caffe2 backbone; "
            "give a file with Caffe2's weights or none, or use profile ours"
        )
    if weights is None:
        raise UserError(f"backbone_weights: torchvision has none for {config.backbone}; give a file or none")
    return torchvision_weights(weights, download)


def torchvision_weights(weights: WeightsEnum, download: bool) -> dict[str, Tensor]:
    """Published weights from torch's cache folder or, if `download`, their server.

    Raises:
        UserError: not in the cache and not to be downloaded; no connection, a full disk, a wrong hash.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if not cached.exists() and not download:
        raise UserError(
            f"backbone_weights cached: {cached.name} is not in {cached.parent}; "
            "download it with --backbone-weights imagenet, or give a file or none"
        )
    if not cached.exists():
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            hash_prefix = cached.stem.rsplit("-", 1)[-1]
            torch.hub.download_url_to_file(weights.url, str(cached), hash_prefix)
        except (OSError, RuntimeError) as error:  # no connection (URLError), disk full; a wrong hash
            reason = _one_line(error)
            raise UserError(
                f"backbone_weights imagenet: cannot download {cached.name} ({reason}); give a local file or none"
            ) from error
    return read_weights(cached)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a .pth file, also wrapped as {"model": ...} or {"state_dict": ...}.

    Raises:
        UserError: no such file, damaged, holding anything but tensors (no pickled code is run).
    """
    if not path.is_file():
        raise UserError(f"backbone_weights {path}: no such file; give a file, cached, imagenet or none")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise eight kinds of errors inside torch's reader
        raise UserError(
            f"backbone_weights {path}: cannot be read as tensors; it is damaged or holds other things (no code was run)"
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    named = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"backbone_weights {path}: expected a dictionary of tensors by torchvision's names")
    return state


def detectron_weights(path: Path, config: TrainConfig) -> dict[str, Tensor]:
    """One of Detectron's ImageNet pickles by torchvision's names (spec PAA section 10).

    Batch norm's statistics are merged into its scale and bias there, so the mean is 0 and the variance 1. Biases of
    convolutions in front of batch norm, the classifier and the optimiser's blobs are left out.

    Raises:
        UserError: no such file, damaged, with unknown blobs or a bias that is not 0; a profile that is not `official`.
    """
    if not config.switches.caffe2_backbone:
        profile = config.conventions.get("profile")
        problem = f"need --profile official, got {profile}" if profile else "do not fit this method's backbones"
        raise UserError(f"backbone_weights {path}: Detectron's weights {problem}")
    state: dict[str, Tensor] = {}
    for blob, tensor in read_caffe2(path).items():
        name = rename(blob, DETECTRON_RULES)
        if name is not None:
            state[name] = tensor
        elif not re.fullmatch(DETECTRON_DROPPED, blob) and (not re.fullmatch(DETECTRON_BIAS, blob) or tensor.any()):
            raise UserError(f"backbone_weights {path}: unknown blob {blob[:80]}")
    for name in [name for name in state if name.endswith(".bias")]:
        state[name.replace(".bias", ".running_mean")] = torch.zeros_like(state[name])
        state[name.replace(".bias", ".running_var")] = torch.ones_like(state[name])
    return state


def check_weights(state: dict[str, Tensor], wanted: dict[str, Tensor], prefix: str) -> None:
    """Refuse weights of another network, naming the first keys that are missing, unknown, misshapen or not finite."""
    optional = ".offset."  # of deformable convolutions, which ImageNet's networks lack
    missing = [key for key in wanted if key not in state and optional not in key and not _is_counter(key)]
    unknown = [key for key in state if key not in wanted]
    for kind, keys in (("missing", missing), ("unknown", unknown)):
        if keys:
            raise UserError(f"{prefix}: {len(keys)} {kind} keys, first {', '.join(keys[:3])}")
    for key, value in state.items():
        if value.shape != wanted[key].shape:
            raise UserError(f"{prefix}: {key} has shape {tuple(value.shape)}, expected {tuple(wanted[key].shape)}")
        if not value.is_floating_point() or not value.isfinite().all():
            raise UserError(f"{prefix}: {key} holds {value.dtype} or NaN or infinity, expected finite floats")


def _is_counter(key: str) -> bool:
    return key.endswith(".num_batches_tracked")


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
