"""Backbones against torchvision's, their counts, freezing and deformable stages, and the loading of weights."""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from core.backbone import ARCHITECTURES, ResNetBackbone, build_backbone, load_backbone_weights
from core.config import PyramidConfig
from core.errors import UserError
from core.layers import DeformConv, FrozenBatchNorm
from tests.core.detector import Detector, count, meta_detector


def config(**fields: Any) -> PyramidConfig:
    values: dict[str, Any] = {"steps": 1, "backbone": "resnet18"} | fields
    return PyramidConfig(**values)


def meta_backbone(**fields: Any) -> ResNetBackbone:
    with torch.device("meta"):
        return build_backbone(config(**fields))


def affine_count(module: nn.Module) -> int:
    return sum(2 * len(norm.weight) for norm in module.modules() if isinstance(norm, FrozenBatchNorm))


def bottleneck_convs(depths: tuple[int, ...], groups: int, width_per_group: int) -> int:
    """Weights of a bottleneck network's convolutions, layer by layer."""
    total, previous = 64 * 3 * 7 * 7, 64
    for stage, depth in enumerate(depths):
        width = groups * width_per_group * 2**stage
        out = 256 * 2**stage
        for block in range(depth):
            total += previous * width + width * (width // groups) * 9 + width * out
            total += previous * out if block == 0 else 0
            previous = out
    return total


# spec PAA section 10: backbone, convolutions, batch norm affine, total with it, trainable in profile official
SPEC_COUNTS = [
    ("resnet50", 23_454_912, 53_120, 32_297_370, 32_021_850),
    ("resnet101", 42_394_816, 105_344, 51_289_498, 50_961_754),
    ("resnext101_64x4d", 81_203_392, 202_880, 90_195_610, 89_595_226),
]


@pytest.mark.parametrize(("name", "convs", "affine", "total", "trainable"), SPEC_COUNTS)
def test_spec_counts(name: str, convs: int, affine: int, total: int, trainable: int) -> None:
    official = meta_detector(config(backbone=name, profile="official"))
    assert count(official.backbone) == convs
    assert affine_count(official) == affine
    assert count(official.fpn) == 3_868_672
    assert count(official) + affine == total
    assert count(official, trainable=True) == trainable
    for profile in ("ours", "mmdet"):
        model = meta_detector(config(backbone=name, profile=profile))
        assert count(model.backbone) == convs + affine
        assert count(model) == total - 2048  # eight tower convolutions without their 256 biases


def test_frozen_conv_weights_of_resnet50() -> None:
    backbone = meta_backbone(backbone="resnet50", profile="official")
    assert count(backbone) - count(backbone, trainable=True) == 222_400  # spec PAA section 13, check 23


@pytest.mark.parametrize("name", [name for name, a in ARCHITECTURES.items() if a.block is Bottleneck])
def test_bottleneck_counts_by_formula(name: str) -> None:
    architecture = ARCHITECTURES[name]
    expected = bottleneck_convs(architecture.depths, architecture.groups, architecture.width_per_group)
    assert count(meta_backbone(backbone=name, profile="official")) == expected


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "resnext152_32x8d"])
def test_names_and_shapes_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        oracle = torchvision.models.get_model(name, weights=None)
    expected = {key: value.shape for key, value in oracle.state_dict().items() if not key.startswith("fc.")}
    expected = {key: shape for key, shape in expected.items() if not key.endswith("num_batches_tracked")}
    backbone = meta_backbone(backbone=name)
    assert {key: value.shape for key, value in backbone.state_dict().items()} == expected
    strides = {name: module.stride for name, module in oracle.named_modules() if isinstance(module, nn.Conv2d)}
    assert {name: m.stride for name, m in backbone.named_modules() if isinstance(m, nn.Conv2d)} == strides
    wide = oracle.fc.in_features
    assert backbone.out_channels == (wide // 4, wide // 2, wide)


def randomise(network: nn.Module) -> None:
    """Values that keep activations near one, and statistics that matter."""
    generator = torch.Generator().manual_seed(0)
    for key, value in network.state_dict().items():
        if key.endswith("running_mean"):
            value.copy_(torch.randn(value.shape, generator=generator) / 10)
        elif key.endswith("running_var") or (value.dim() == 1 and key.endswith("weight")):
            value.copy_(torch.rand(value.shape, generator=generator) / 2 + 0.5)


def oracle_features(oracle: ResNet, x: Tensor) -> list[Tensor]:
    x = oracle.layer1(oracle.maxpool(oracle.relu(oracle.bn1(oracle.conv1(x)))))
    c3 = oracle.layer2(x)
    c4 = oracle.layer3(c3)
    return [c3, c4, oracle.layer4(c4)]


@torch.no_grad()
def test_features_equal_torchvision() -> None:
    torch.manual_seed(0)
    oracle = torchvision.models.resnet18(weights=None).eval()
    randomise(oracle)
    backbone = build_backbone(config()).train()
    backbone.load_state_dict({key: oracle.state_dict()[key] for key in backbone.state_dict()})
    x = torch.randn(2, 3, 65, 96)
    for ours, theirs in zip(backbone(x), oracle_features(oracle, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_training_mode_leaves_the_state_alone() -> None:
    backbone = build_backbone(config()).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    x = torch.randn(2, 3, 32, 32)
    trained = backbone(x)
    for ours, evaluated in zip(trained, backbone.eval()(x), strict=True):
        assert torch.equal(ours, evaluated)
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, before[key])


def test_caffe2_stride() -> None:
    for name, places in (("resnet50", (2, 1)), ("resnext101_32x8d", (1, 2)), ("resnet18", (2, 1))):
        backbone = meta_backbone(backbone=name, profile="official")
        for stage, conv1, conv2 in zip(backbone.stages, (1, *[places[0]] * 3), (1, *[places[1]] * 3), strict=True):
            first: Any = next(iter(stage))
            assert (first.conv1.stride, first.conv2.stride) == ((conv1, conv1), (conv2, conv2))
    modern: Any = next(iter(meta_backbone(backbone="resnet50").layer2))
    assert (modern.conv1.stride, modern.conv2.stride) == ((1, 1), (2, 2))


@pytest.mark.parametrize(("profile", "eps", "parameters"), [("ours", 1e-5, True), ("official", 0.0, False)])
def test_batch_norm_treatment(profile: str, eps: float, parameters: bool) -> None:
    backbone = meta_backbone(profile=profile, frozen_stages=0)
    norms = [module for module in backbone.modules() if isinstance(module, FrozenBatchNorm)]
    assert len(norms) == 20
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    for norm in norms:
        assert norm.eps == eps
        assert isinstance(norm.weight, nn.Parameter) == parameters


@pytest.mark.parametrize("frozen", range(6))
def test_frozen_stages(frozen: int) -> None:
    backbone = meta_backbone(frozen_stages=frozen)
    stages = {"conv1": 1, "bn1": 1, "layer1": 2, "layer2": 3, "layer3": 4, "layer4": 5}
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (stages[name.split(".")[0]] > frozen)


def test_frozen_stages_build_no_graph() -> None:
    backbone = build_backbone(config(frozen_stages=4))
    c3, c4, c5 = backbone(torch.randn(1, 3, 32, 32))
    assert (c3.requires_grad, c4.requires_grad, c5.requires_grad) == (False, False, True)


def test_start_keeps_the_scale() -> None:
    torch.manual_seed(0)
    backbone = build_backbone(config(backbone="resnet50"))
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 64, 64))
    assert all(0.02 < feature.std() < 2 for feature in features)  # 0.12, 0.08, 0.04; without zeros 2.4, 12, 17


@pytest.mark.parametrize(
    ("name", "stages", "blocks"),
    [("resnet50", (3, 4, 5), 13), ("resnext101_64x4d", (4, 5), 26), ("resnet18", (2, 5), 4), ("resnet18", (), 0)],
)
def test_deformable_stages(name: str, stages: tuple[int, ...], blocks: int) -> None:
    plain, backbone = meta_backbone(backbone=name), meta_backbone(backbone=name, dcn_stages=stages)
    deformed = [(key, m) for key, m in backbone.named_modules() if isinstance(m, DeformConv)]
    assert len(deformed) == blocks
    assert {int(key[len("layer")]) + 1 for key, _ in deformed} == set(stages)
    assert all(key.endswith(".conv2") for key, _ in deformed)
    for key, module in deformed:
        twin: Any = plain.get_submodule(key)
        assert module.offset.weight.shape == (27, twin.in_channels, 3, 3)  # spec PAA section 10
        assert (module.weight.shape, module.stride, module.groups) == (twin.weight.shape, twin.stride, twin.groups)
    extra = sum(27 * (module.in_channels * 9 + 1) for _, module in deformed)
    assert count(backbone) == count(plain) + extra


def test_deformable_groups() -> None:
    backbone = meta_backbone(dcn_stages=(5,), dcn_groups=4)
    module = backbone.get_submodule("layer4.0.conv2")
    assert isinstance(module, DeformConv)
    assert len(module.offset.weight) == 108
    with pytest.raises(UserError, match="dcn_groups 3 does not divide the 512 channels"):
        meta_backbone(dcn_stages=(5,), dcn_groups=3)


def test_deformable_stages_run_in_both_profiles() -> None:
    for profile in ("ours", "official"):
        backbone = build_backbone(config(backbone="resnet50", profile=profile, dcn_stages=(5,)))
        c3, c4, c5 = backbone(torch.randn(1, 3, 33, 64))
        assert [tuple(c.shape[2:]) for c in (c3, c4, c5)] == [(5, 8), (3, 4), (2, 2)]


# loading weights


@cache
def resnet18_state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return torchvision.models.resnet18(weights=None).state_dict()


def torchvision_state(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    state = resnet18_state()
    return {key: value.to(dtype, copy=True) if value.is_floating_point() else value for key, value in state.items()}


@pytest.fixture(scope="module")
def untouched() -> Iterator[ResNetBackbone]:
    """A backbone that no test may change."""
    backbone = build_backbone(config())
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    yield backbone
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    ("dtype", "wrapper"), [(torch.float32, None), (torch.float16, "model"), (torch.float16, "state_dict")]
)
def test_load_file(tmp_path: Path, dtype: torch.dtype, wrapper: str | None) -> None:
    state = torchvision_state(dtype)
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "w.pth")
    backbone = build_backbone(config())
    load_backbone_weights(backbone, str(tmp_path / "w.pth"), config())
    for key, value in backbone.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[key].float())


def test_load_safetensors_into_deformable(tmp_path: Path) -> None:
    state = torchvision_state()
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    fields = config(dcn_stages=(4, 5))
    backbone = build_backbone(fields)
    load_backbone_weights(backbone, str(tmp_path / "w.safetensors"), fields)
    loaded = backbone.state_dict()
    assert torch.equal(loaded["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])
    assert not loaded["layer4.1.conv2.offset.weight"].any()


def test_learning_batch_norm(tmp_path: Path) -> None:
    fields = config(norm="batch", frozen_stages=0)
    backbone = build_backbone(fields).train()
    torch.save(torchvision_state(), tmp_path / "w.pth")
    load_backbone_weights(backbone, str(tmp_path / "w.pth"), fields)
    assert torch.equal(backbone.state_dict()["bn1.running_mean"], torch.zeros(64))
    backbone(torch.randn(2, 3, 64, 64))
    assert backbone.state_dict()["bn1.running_mean"].any()


def test_none_changes_nothing(untouched: ResNetBackbone) -> None:
    load_backbone_weights(untouched, "none", config())


def broken_state(change: str) -> Any:
    state: dict[str, Any] = torchvision_state()
    if change == "missing":
        del state["layer1.0.conv1.weight"], state["layer2.0.bn1.bias"]
    elif change == "unknown":
        state["layer1.9.conv1.weight"] = torch.zeros(1)
    elif change == "shape":
        state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    elif change == "nan":
        state["bn1.bias"][3] = torch.nan
    elif change == "integer":
        state["bn1.bias"] = torch.zeros(64, dtype=torch.int64)
    elif change == "text":
        state["bn1.bias"] = "hello"
    elif change == "list":
        return [1, 2]
    elif change == "numbers":
        return {1: torch.zeros(1)}
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "resnet18: 2 missing keys, first layer1.0.conv1.weight, layer2.0.bn1.bias"),
        ("unknown", "resnet18: 1 unknown keys, first layer1.9.conv1.weight"),
        ("shape", r"conv1.weight has shape \(64, 1, 7, 7\), expected \(64, 3, 7, 7\)"),
        ("nan", "bn1.bias .* expected finite floats"),
        ("integer", "bn1.bias .* expected finite floats"),
        ("text", "expected a dictionary of tensors"),
        ("list", "expected a dictionary of tensors"),
        ("numbers", "expected a dictionary of tensors"),
    ],
)
def test_wrong_contents(untouched: ResNetBackbone, tmp_path: Path, change: str, message: str) -> None:
    torch.save(broken_state(change), tmp_path / "w.pth")
    with pytest.raises(UserError, match=message) as error:
        load_backbone_weights(untouched, str(tmp_path / "w.pth"), config())
    assert "\n" not in str(error.value)
    assert "w.pth" in str(error.value)


class Bomb:
    """A pickle that would write a file when loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("kind", ["bomb", "empty", "text", "bytes", "cut", "cut.safetensors", "folder"])
def test_unreadable_files(
    untouched: ResNetBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / kind
    if kind == "bomb":
        torch.save({"bn1.bias": Bomb()}, path)
    elif kind == "folder":
        path.mkdir()
    elif kind.startswith("cut"):
        save = safetensors.torch.save_file if kind.endswith("safetensors") else torch.save
        save(torchvision_state(), path)
        path.write_bytes(path.read_bytes()[:100_000])
    else:
        path.write_bytes({"empty": b"", "text": b"not weights at all\n" * 9, "bytes": b"\x80\x02s."}[kind])
    with pytest.raises(
        UserError, match=f"backbone_weights .*{kind}: (cannot be read as tensors|no such file)"
    ) as error:
        load_backbone_weights(untouched, str(path), config())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()


def test_missing_file(untouched: ResNetBackbone) -> None:
    with pytest.raises(
        UserError, match=r"backbone_weights nowhere.pth: no such file; give a file, cached, imagenet or none"
    ):
        load_backbone_weights(untouched, "nowhere.pth", config())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch cache and no connection."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return tmp_path / "checkpoints"


def test_imagenet_from_cache(hub: Path) -> None:
    hub.mkdir()
    state = torchvision_state()
    torch.save(state, hub / "resnet18-f37072fd.pth")
    backbone = build_backbone(config())
    load_backbone_weights(backbone, "cached", config())
    assert torch.equal(backbone.state_dict()["conv1.weight"], state["conv1.weight"])


def test_imagenet_download(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(url: str, dst: str, hash_prefix: str) -> None:
        assert (url.rsplit("/", 1)[1], hash_prefix) == ("resnet18-f37072fd.pth", "f37072fd")
        torch.save(torchvision_state(), dst)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fake)
    load_backbone_weights(build_backbone(config()), "imagenet", config())
    assert (hub / "resnet18-f37072fd.pth").exists()


@pytest.mark.parametrize(
    ("fields", "source", "message"),
    [
        ({}, "imagenet", r"cannot download resnet18-f37072fd.pth \(<urlopen error .*; give a local file or none"),
        ({}, "cached", "resnet18-f37072fd.pth is not in .*--backbone-weights imagenet"),
        ({"backbone": "resnext152_32x8d"}, "cached", "torchvision has none for resnext152_32x8d; give a file or none"),
        ({"profile": "official"}, "imagenet", "do not fit profile official's Caffe2 backbone"),
    ],
)
def test_no_imagenet(hub: Path, fields: dict[str, Any], source: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_backbone_weights(meta_backbone(**fields), source, config(**fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_real_half_precision_file(shared: Path, name: str) -> None:
    fields = config(backbone=name)
    backbone = build_backbone(fields)
    source = str(shared / "data" / "weights" / f"{name}_pqf_fp16.pth")
    load_backbone_weights(backbone, source, fields)
    assert all(value.dtype == torch.float32 for value in backbone.state_dict().values())
    other = config(backbone="resnet34")
    with pytest.raises(UserError, match=r"(missing|unknown) keys"):
        load_backbone_weights(meta_backbone(backbone="resnet34"), source, other)


@pytest.mark.compiled
@pytest.mark.parametrize("profile", ["ours", "official"])
def test_whole_network_traces(profile: str) -> None:
    fields: dict[str, Any] = {"profile": profile, "channels": 64, "dcn_stages": (5,), "dcn_tower": True}
    torch.manual_seed(0)
    model = Detector(config(**fields), num_classes=3)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    sizes = torch.tensor([[64, 96], [50, 70]])
    compiled = torch.compile(model, fullgraph=True, backend="eager")(images, sizes)
    expected = model(images, sizes)
    torch.testing.assert_close(compiled.logits, expected.logits)
    torch.testing.assert_close(compiled.deltas, expected.deltas)
    torch.testing.assert_close(compiled.quality, expected.quality)
    assert compiled.shapes == expected.shapes
    compiled.logits.square().sum().backward()
    assert all(p.grad is not None for p in model.backbone.layer4.parameters() if p.requires_grad)
