"""Reduced VGG-16: its layers, both kinds of weight files, errors."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import vgg16

from core.backbone import build_resnet
from core.errors import UserError
from padet.config import Config
from padet.vgg import ReducedVGG16, decimate_fc6, decimate_fc7, load_weights, reduced_names

CONFIG = Config()


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """torchvision's layout with every value its own place in the tensor; small numbers of bytes by expanding zeros."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in vgg16().state_dict().items()}
    return {key: torch.full((), 0.5).expand(shape) for key, shape in shapes.items() if "classifier.6" not in key}


def test_layers_are_those_of_torchvision_and_of_reduced_files() -> None:
    with torch.device("meta"):
        ours, theirs = ReducedVGG16().layers, vgg16().features
    names = {key: value.shape for key, value in ours.state_dict().items()}
    shared = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: shape for key, shape in names.items() if key in shared} == shared
    added = {key: tuple(shape) for key, shape in names.items() if key not in shared}
    assert added == {
        "31.weight": (1024, 512, 3, 3),
        "31.bias": (1024,),
        "33.weight": (1024, 1024, 1, 1),
        "33.bias": (1024,),
    }


def test_taps_and_strides() -> None:
    # Spec section 1.2: conv4_3 has stride 8; pooling 5 none, so conv7 has stride 16; both are after ReLU
    with torch.device("meta"):
        model = ReducedVGG16()
        fine, coarse = model(torch.zeros(1, 3, 64, 96))
    assert (fine.shape, coarse.shape) == ((1, 512, 8, 12), (1, 1024, 4, 6))
    pool, conv6 = model.layers[30], model.layers[31]
    assert isinstance(pool, nn.MaxPool2d)
    assert isinstance(conv6, nn.Conv2d)
    assert (pool.kernel_size, pool.stride, pool.padding) == (3, 1, 1)
    assert (conv6.padding, conv6.dilation) == ((6, 6), (6, 6))
    assert isinstance(model.layers[22], nn.ReLU)
    assert sum(isinstance(layer, nn.Conv2d) for layer in model.layers[:23]) == 10


def test_fully_connected_layers_are_decimated_by_hand() -> None:
    # Spec section 1.2: output 4 n, input channel c, row and column 3 y, 3 x of a 7 x 7 map
    weight = torch.arange(4096 * 25088, dtype=torch.int32).view(4096, 25088)
    six, bias = decimate_fc6(weight.float(), torch.arange(4096.0))
    assert six.shape == (1024, 512, 3, 3)
    for n, c, y, x in [(0, 0, 0, 0), (1, 2, 1, 2), (1023, 511, 2, 0)]:
        assert six[n, c, y, x] == weight[4 * n, c * 49 + 3 * y * 7 + 3 * x].float()
    assert bias[:3].tolist() == [0, 4, 8]
    square = torch.arange(4096 * 4096, dtype=torch.int32).view(4096, 4096)
    seven, _ = decimate_fc7(square.float(), torch.arange(4096.0))
    assert seven.shape == (1024, 1024, 1, 1)
    assert seven[5, 7, 0, 0] == square[20, 28].float()


def test_both_layouts_load(published: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(published, tmp_path / "vgg16.pth")
    model = ReducedVGG16()
    load_weights(model, str(tmp_path / "vgg16.pth"), CONFIG)
    assert all((value == 0.5).all() for value in model.layers.state_dict().values())
    reduced = {key: torch.full((), 0.25).expand(value.shape) for key, value in model.layers.state_dict().items()}
    torch.save(reduced, tmp_path / "vgg16_reducedfc.pth")
    load_weights(model, str(tmp_path / "vgg16_reducedfc.pth"), CONFIG)
    assert all((value == 0.25).all() for value in model.layers.state_dict().values())


def test_no_weights_leave_the_random_start() -> None:
    model = ReducedVGG16()
    before = model.layers[0].weight.clone()  # type: ignore[operator]
    load_weights(model, "none", CONFIG)
    assert torch.equal(model.layers[0].weight, before)  # type: ignore[arg-type]
    assert before.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)  # He, fan out


def test_missing_weights_are_one_line(
    published: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    model = ReducedVGG16()
    with pytest.raises(UserError, match=r"vgg16-397923af\.pth is not in .*--backbone-weights imagenet"):
        load_weights(model, "cached", CONFIG)
    features = {key: value for key, value in published.items() if key.startswith("features")}
    with pytest.raises(UserError, match="its classifier is not VGG-16's"):
        reduced_names(features, "backbone_weights x for vgg16")
    torch.save({**published, "features.28.weight": torch.zeros(512, 512, 1, 1)}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=re.escape("28.weight has shape (512, 512, 1, 1)")):
        load_weights(model, str(tmp_path / "odd.pth"), CONFIG)


def test_weights_without_a_usable_classifier_are_refused(published: dict[str, Tensor], tmp_path: Path) -> None:
    # torchvision's IMAGENET1K_FEATURES holds NaN there
    broken = {**published, "classifier.0.weight": torch.full((), torch.nan).expand(4096, 25088)}
    torch.save(broken, tmp_path / "features.pth")
    with pytest.raises(UserError, match=re.escape("31.weight holds torch.float32 or NaN")):
        load_weights(ReducedVGG16(), str(tmp_path / "features.pth"), CONFIG)


def test_residual_networks_load_as_everywhere(tmp_path: Path) -> None:
    config = Config(backbone="resnet18", norm="batch")
    backbone = build_resnet(config)
    state = {key: torch.ones_like(value) for key, value in backbone.state_dict().items()}
    torch.save(state, tmp_path / "resnet18.pth")
    load_weights(backbone, str(tmp_path / "resnet18.pth"), config)
    assert (backbone.conv1.weight == 1).all()
