"""Layers that backbones and heads share: frozen batch norm, per-level scale, deformable convolution, towers."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

HEAD_INIT_STD = 0.01  # RetinaNet, section 4.1
NORM_GROUPS = 32  # of GroupNorm in the towers (Wu and He 2018)
TOWER_DEPTH = 4  # RetinaNet, section 4


class FrozenBatchNorm(nn.Module):
    """Batch norm by stored statistics: y = (x - mean) / sqrt(variance + eps) * weight + bias.

    The statistics never move, in training mode either: detection batches are too small for it. `weight` and `bias` are
    parameters when `trainable` (torchvision's weights, eps 1e-5) and buffers otherwise (Caffe2's, eps 0, with the
    statistics merged into them: spec PAA section 1). Names are those of `nn.BatchNorm2d` without its step counter.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, trainable: bool = True) -> None:
        super().__init__()
        self.eps = eps
        if trainable:
            self.weight = nn.Parameter(torch.ones(channels))
            self.bias = nn.Parameter(torch.zeros(channels))
        else:
            self.register_buffer("weight", torch.ones(channels))
            self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Normalised maps in the type of `x`, also under autocast."""
        # Not F.batch_norm: some releases of torch refuse eps 0 there, which the kernel below it computes.
        return torch.batch_norm(
            *(x, self.weight, self.bias, self.running_mean, self.running_var),
            training=False,
            momentum=0.0,
            eps=self.eps,
            cudnn_enabled=torch.backends.cudnn.enabled,
        )

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{len(self.weight)}, eps={self.eps}, trainable={isinstance(self.weight, nn.Parameter)}"


class Scale(nn.Module):
    """A learned factor, one per pyramid level (FCOS, section 3.2); 1 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The input times the factor."""
        return x * self.scale


class DeformConv(nn.Conv2d):
    """Modulated deformable 3x3 convolution (Deformable ConvNets v2, Eq. 1).

    y(p) = sum_k w_k * x(p + p_k + offset_k) * mask_k. A plain convolution of the same input predicts, for each of
    `offset_groups` groups of input channels, 9 offsets (dy, dx) in kernel order and after those of all groups 9 mask
    logits each. Main weights have `nn.Conv2d`'s names, so a plain convolution's weights load.

    Deviation: `offset` starts at zero, as the paper says (offsets 0, masks 0.5); the PAA authors' code draws it from a
    Kaiming-uniform distribution in the backbone and from N(0, 0.01) in the head, which moves pretrained features.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        groups: int = 1,
        offset_groups: int = 1,
        bias: bool = False,
    ) -> None:
        if offset_groups < 1 or in_channels % offset_groups:
            raise ValueError(f"offset groups must divide the {in_channels} input channels, got {offset_groups}")
        super().__init__(in_channels, out_channels, 3, stride=stride, padding=1, groups=groups, bias=bias)
        self.offset = nn.Conv2d(in_channels, 27 * offset_groups, 3, stride=stride, padding=1)
        nn.init.zeros_(self.offset.weight)
        for parameter in (self.bias, self.offset.bias):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Maps of the size the plain convolution would give. Sampled in float32 under autocast."""
        prediction = self.offset(x)
        precise = torch.promote_types(x.dtype, torch.float32)  # torchvision has no bfloat16 kernel on CPU
        split = prediction.shape[1] * 2 // 3  # dy and dx first, then the masks
        offset, mask = prediction[:, :split].to(precise), prediction[:, split:].to(precise).sigmoid()
        y = deform_conv2d(x.to(precise), offset, self.weight, self.bias, self.stride, self.padding, mask=mask)
        return y.to(prediction.dtype)


def deformable(conv: nn.Conv2d, offset_groups: int = 1) -> DeformConv:
    """The deformable twin of a 3x3 convolution: its stride, groups and the very same weight and bias."""
    has_bias = conv.bias is not None
    twin = DeformConv(conv.in_channels, conv.out_channels, conv.stride[0], conv.groups, offset_groups, bias=has_bias)
    twin.weight, twin.bias = conv.weight, conv.bias
    return twin


def head_conv(in_channels: int, out_channels: int, bias: bool = True) -> nn.Conv2d:
    """A 3x3 convolution of a head: weight N(0, 0.01) (RetinaNet, section 4.1), bias 0."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
    nn.init.normal_(conv.weight, std=HEAD_INIT_STD)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def conv_tower(channels: int, bias: bool, dcn_last: bool = False, depth: int = TOWER_DEPTH) -> nn.Sequential:
    """`depth` times 3x3 convolution, GroupNorm and ReLU at constant width (spec PAA section 1).

    Args:
        channels: width, a multiple of GroupNorm's 32 groups.
        bias: the convolutions carry a bias beside the norm's.
        dcn_last: the last convolution is modulated deformable; its weight is U(+-1/sqrt(9 * channels)).
        depth: number of convolutions, at layers 0, 3, 6, ... of the result.
    """
    layers: list[nn.Module] = []
    for index in range(depth):
        deformable = dcn_last and index == depth - 1
        layers.append(DeformConv(channels, channels, bias=bias) if deformable else head_conv(channels, channels, bias))
        layers += [nn.GroupNorm(NORM_GROUPS, channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
