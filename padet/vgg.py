"""VGG-16 as SSD has it: fully connected layers reduced to convolutions, pooling 5 without stride (spec section 1.2)."""

from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import VGG16_Weights

from core.backbone import ResNetBackbone, check_weights, load_backbone_weights, read_weights, torchvision_weights
from core.errors import UserError
from padet.config import Config

WIDTHS: tuple[tuple[int, ...], ...] = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
REDUCED = 1024  # channels of conv6 and conv7
CONV4_3 = 23  # number of layers up to its ReLU
CONV6, CONV7 = 31, 33  # places among the layers


class ReducedVGG16(nn.Module):
    """VGG-16's 13 convolutions, then conv6 (3x3, dilation 6) and conv7 (1x1); no batch norm, no dropout.

    Layers are numbered as in torchvision's VGG-16 and, from conv6 on, as in the usual `vgg16_reducedfc` files.
    """

    out_channels = (WIDTHS[3][-1], REDUCED)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for block, widths in enumerate(WIDTHS):
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2) if block < 4 else nn.MaxPool2d(3, stride=1, padding=1))
        layers += [nn.Conv2d(channels, REDUCED, 3, padding=6, dilation=6), nn.ReLU(inplace=True)]
        layers += [nn.Conv2d(REDUCED, REDUCED, 1), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _ _ _"]]:
        """conv4_3 (stride 8) and conv7 (stride 16), both after ReLU."""
        fine = self.layers[:CONV4_3](images)
        return [fine, self.layers[CONV4_3:](fine)]


def load_weights(backbone: nn.Module, source: str, config: Config) -> None:
    """Fill PADet's backbone with ImageNet weights; a ResNet as `core.backbone.load_backbone_weights` does.

    Args:
        backbone: of `config`.
        source: `cached` (torchvision's VGG-16, already in torch's cache folder), `imagenet` (the same, downloaded if it
            is not there), `none`, or a file of torchvision's VGG-16 or of a `vgg16_reducedfc` network.
        config: names the backbone.

    Raises:
        UserError: file missing, unreadable, or of another network; no connection.
    """
    if isinstance(backbone, ResNetBackbone):
        load_backbone_weights(backbone, source, config)
    elif source != "none":
        assert isinstance(backbone, ReducedVGG16)
        prefix = f"backbone_weights {source} for {config.backbone}"
        if source in ("cached", "imagenet"):
            state = torchvision_weights(VGG16_Weights.IMAGENET1K_V1, download=source == "imagenet")
        else:
            state = read_weights(Path(source))
        state = reduced_names(state, prefix)
        wanted = backbone.layers.state_dict()
        check_weights(state, wanted, prefix)
        backbone.layers.load_state_dict(state)


def reduced_names(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Weights by the names of `ReducedVGG16.layers`, from torchvision's layout or from that of `vgg16_reducedfc` files.

    Raises:
        UserError: a classifier of other shapes than VGG-16's.
    """
    if not any(key.startswith("features.") for key in state):
        return state
    reduced = {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}
    for name, place, decimate in (("0", CONV6, decimate_fc6), ("3", CONV7, decimate_fc7)):
        try:
            weight, bias = (state[f"classifier.{name}.{part}"] for part in ("weight", "bias"))
            reduced[f"{place}.weight"], reduced[f"{place}.bias"] = decimate(weight, bias)
        except (KeyError, RuntimeError, IndexError) as error:
            raise UserError(f"{prefix}: its classifier is not VGG-16's, so conv6 and conv7 cannot be made") from error
    return reduced


def decimate_fc6(
    weight: Float[Tensor, "4096 25088"], bias: Float[Tensor, " 4096"]
) -> tuple[Float[Tensor, "1024 512 3 3"], Float[Tensor, " 1024"]]:
    """conv6 from the first fully connected layer: every fourth output, every third row and column of its 7x7."""
    return weight.view(4096, 512, 7, 7)[::4, :, ::3, ::3].contiguous(), bias[::4].contiguous()


def decimate_fc7(
    weight: Float[Tensor, "4096 4096"], bias: Float[Tensor, " 4096"]
) -> tuple[Float[Tensor, "1024 1024 1 1"], Float[Tensor, " 1024"]]:
    """conv7 from the second fully connected layer: every fourth output of every fourth input."""
    return weight.view(4096, 4096, 1, 1)[::4, ::4].contiguous(), bias[::4].contiguous()
