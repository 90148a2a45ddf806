"""`python -m tood_tal.convert`: the authors' and MMDetection's checkpoints and our own, and what is refused."""

import dataclasses
from argparse import Namespace
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from core import checkpoint, distributed
from core.commands import load_trained
from core.errors import UserError
from core.layouts import Layout, from_mmdet
from tests.checkpoints import Shapes, mmdet_state, run, small_state
from tests.checkpoints import save as save_official
from tests.conftest import golden_arrays
from tests.tood_tal.golden import head_name
from tood_tal import convert
from tood_tal.config import PRESETS, Config
from tood_tal.convert import HEAD_NAMES, configure
from tood_tal.model import TOOD, build_head

PROFILES = ("official", "mmdet")
LAYERS = {  # spec section 6: ours, the authors', MMDetection's
    **{f"interactive.{i}.0.offset": (f"inter_convs.{i}.conv.conv_offset",) * 2 for i in range(2)},
    **{f"interactive.{i}.0": (f"inter_convs.{i}.conv",) * 2 for i in range(6)},
    **{f"interactive.{i}.1": (f"inter_convs.{i}.gn",) * 2 for i in range(6)},
    "cls_decomposition.attention.0": ("cls_decomp.la_conv1", "cls_decomp.layer_attention.0"),
    "cls_decomposition.attention.2": ("cls_decomp.la_conv2", "cls_decomp.layer_attention.2"),
    "cls_decomposition.reduction": ("cls_decomp.reduction_conv.conv",) * 2,
    "cls_decomposition.norm": ("cls_decomp.reduction_conv.gn",) * 2,
    "box_decomposition.attention.0": ("reg_decomp.la_conv1", "reg_decomp.layer_attention.0"),
    "box_decomposition.attention.2": ("reg_decomp.la_conv2", "reg_decomp.layer_attention.2"),
    "box_decomposition.reduction": ("reg_decomp.reduction_conv.conv",) * 2,
    "box_decomposition.norm": ("reg_decomp.reduction_conv.gn",) * 2,
    "cls_logits": ("tood_cls",) * 2,
    "bbox_pred": ("tood_reg",) * 2,
    "alignment.probability.0": ("cls_prob_conv1", "cls_prob_module.0"),
    "alignment.probability.2": ("cls_prob_conv2", "cls_prob_module.2"),
    "alignment.offset.0": ("reg_offset_conv1", "reg_offset_module.0"),
    "alignment.offset.2": ("reg_offset_conv2", "reg_offset_module.2"),
    **{f"decoder.scales.{i}": (f"scales.{i}",) * 2 for i in range(5)},
}


def their_name(ours: str, profile: str) -> str:
    """The name of an entry of our head in a layout."""
    layer, entry = ours.rsplit(".", 1)
    return f"bbox_head.{LAYERS[layer][PROFILES.index(profile)]}.{entry}"


def head_shapes(profile: str, dcn: bool = False) -> Shapes:
    """The names in a checkpoint's head and their shapes, as the table of spec section 6 lists them."""
    shapes: Shapes = {}

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        shapes[f"bbox_head.{name}.weight"] = shape
        shapes.update({f"bbox_head.{name}.bias": shape[:1]} if bias else {})

    for i in range(6):
        layer(f"inter_convs.{i}.conv", 256, 256, 3, 3, bias=False)
        layer(f"inter_convs.{i}.gn", 256)
    for i in range(2 if dcn else 0):
        layer(f"inter_convs.{i}.conv.conv_offset", 108, 256, 3, 3)
    first, second = ("la_conv1", "la_conv2") if profile == "official" else ("layer_attention.0", "layer_attention.2")
    for task in ("cls_decomp", "reg_decomp"):
        layer(f"{task}.{first}", 32, 1536, 1, 1)
        layer(f"{task}.{second}", 6, 32, 1, 1)
        layer(f"{task}.reduction_conv.conv", 256, 1536, 1, 1, bias=False)
        layer(f"{task}.reduction_conv.gn", 256)
    layer("tood_cls", 80, 256, 3, 3)
    layer("tood_reg", 4, 256, 3, 3)
    first, second = ("_conv1", "_conv2") if profile == "official" else ("_module.0", "_module.2")
    for part, out in (("cls_prob", 1), ("reg_offset", 8)):
        layer(f"{part}{first}", 64, 1536, 1, 1)
        layer(f"{part}{second}", out, 64, 3, 3)
    return shapes | {f"bbox_head.scales.{level}.scale": () for level in range(5)}


@cache
def small_model(profile: str, classes: int = 80, **fields: Any) -> TOOD:
    """A narrow network with random weights."""
    torch.manual_seed(0)
    plain: dict[str, Any] = {"backbone": "resnet18", "channels": 64, "profile": profile}
    model = TOOD(Config(**{**plain, **fields}), classes).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # what starts equal would hide a wrong name
            parameter.normal_(std=0.05)
    return model


def state_of(model: TOOD, profile: str) -> dict[str, Tensor]:
    """The tensors of a model under a layout's names."""
    ours = model.state_dict()
    head = {key.removeprefix("head."): tensor for key, tensor in ours.items() if key.startswith("head.")}
    rest = {key: tensor for key, tensor in ours.items() if not key.startswith("head.")}
    counters = {  # of batch norm in training; not needed
        f"{key.removesuffix('running_var')}num_batches_tracked": torch.tensor(7) for key in rest if "running_var" in key
    }
    return mmdet_state(rest, {}) | counters | {their_name(key, profile): tensor for key, tensor in head.items()}


def written(path: Path, profile: str, **fields: Any) -> Path:
    """A checkpoint of a small model."""
    torch.save({"state_dict": state_of(small_model(profile, **fields), profile), "meta": {}}, path)
    return path


def constant(path: Path, change: Any = None, text: str = "") -> Path:
    """MMDetection's checkpoint of a small model with one number for each tensor, one change, and a configuration."""
    names = state_of(small_model("mmdet"), "mmdet")
    state = {key: tensor.new_ones(()).expand(tensor.shape) for key, tensor in names.items()}  # takes no space
    if change:
        change(state)
    torch.save({"state_dict": state, "meta": {"config": text} if text else {}}, path)
    return path


def load(path: Path) -> Any:
    """The converted model as `evaluate` gets it."""
    arguments = Namespace(weights=path, device="cpu", deterministic=False)
    return load_trained(arguments, "tood_tal", Config, TOOD, distributed.pick_device("cpu"))


@torch.no_grad()
def outputs_of(model: TOOD) -> list[Tensor]:
    """Scores and boxes of a small image."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8, generator=generator)
    return list(model(pixels, torch.tensor([[64, 96]]))[:2])


# names


@pytest.mark.parametrize("dcn", [False, True])
@pytest.mark.parametrize("profile", PROFILES)
def test_every_name_and_shape_of_the_heads(profile: str, dcn: bool) -> None:
    shapes = head_shapes(profile, dcn)
    assert len(shapes) == (53 if dcn else 49)  # check 20
    with torch.device("meta"):
        head = build_head(Config(dcn_tower=dcn), 80)
    found = {from_mmdet(key, HEAD_NAMES.rules): shape for key, shape in shapes.items()}
    assert found == {f"head.{key}": tuple(tensor.shape) for key, tensor in head.state_dict().items()}


@pytest.mark.parametrize("dcn", [False, True])
def test_renaming_to_mmdetection_and_back_changes_nothing(dcn: bool) -> None:
    # Check 20: the authors' names to MMDetection's, through ours, and back.
    theirs, there, back = head_shapes("official", dcn), [], []
    for key in theirs:
        ours = from_mmdet(key, HEAD_NAMES.rules)
        assert ours
        there.append(their_name(ours.removeprefix("head."), "mmdet"))
        ours = from_mmdet(there[-1], HEAD_NAMES.rules)
        assert ours
        back.append(their_name(ours.removeprefix("head."), "official"))
    assert set(there) == set(head_shapes("mmdet", dcn))
    assert back == list(theirs)


@pytest.mark.parametrize("file", ["head_tood.npz", "head_tood_ab.npz"])
def test_every_stored_name_of_mmdetections_head(file: str) -> None:
    keys = {f"bbox_head.{key.removeprefix('param/')}" for key in golden_arrays(file) if key.startswith("param/")}
    assert keys == set(head_shapes("mmdet"))


def test_every_stored_name_of_the_authors_head(shared: Path) -> None:
    with np.load(shared / "golden_official" / "tood.npz") as archive:
        keys = {key.removeprefix("param/") for key in archive.files if key.startswith("param/")}
    assert {f"bbox_head.{key}" for key in keys} == set(head_shapes("official"))
    assert all(from_mmdet(f"bbox_head.{key}", HEAD_NAMES.rules) == f"head.{head_name(key)}" for key in keys)


# whole files


@pytest.mark.parametrize(("dcn", "anchors"), [((), ()), ((4, 5), ("--anchors", "based"))])
@pytest.mark.parametrize("profile", PROFILES)
def test_the_converted_model_gives_the_same_outputs(
    profile: str,
    dcn: tuple[int, ...],
    anchors: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fields: dict[str, Any] = {"dcn_stages": dcn, "dcn_tower": bool(dcn), "anchor_based": bool(anchors)}
    out = tmp_path / "out.safetensors"
    run(convert, monkeypatch, written(tmp_path / "a.pth", profile, **fields), out, *anchors)
    source = {"official": "the authors' code", "mmdet": "MMDetection"}[profile]
    assert f"a.pth: {source}" in capsys.readouterr().out
    theirs = small_model(profile, **fields)
    ours, config, _ = load(out)
    assert (config.profile, config.geometry, config.head, config.preset) == (profile, "modern", "t_head", "")
    assert {name: getattr(config, name) for name in fields} == fields
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    torch.testing.assert_close(outputs_of(ours), outputs_of(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "asked", "anchor_based"),
    [
        ("", None, False),
        ("", "free", False),
        ("", "based", True),
        ("bbox_head=dict(type='TOODHead', anchor_type='anchor_based')", None, True),
        ('{"bbox_head": {"anchor_type": "anchor_based"}}', "based", True),
        ("bbox_head=dict(type='TOODHead', anchor_type='anchor_free')", None, False),
        ("anchor_type='anchor_free', teacher=dict(anchor_type='anchor_based')", "based", True),
    ],
)
def test_anchors(text: str, asked: Any, anchor_based: bool) -> None:
    assert configure(layout(meta={"meta": {"config": text}}), anchors=asked).anchor_based is anchor_based


# what is refused


def rename(old: str, new: str) -> Any:
    """A change of one tensor's name."""
    return lambda state: state.update({new: state.pop(old)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("bbox_head.reg_offset_module.2.bias"),
            r"1 missing: what becomes head\.alignment\.offset\.2\.bias$",
        ),
        (lambda s: s.pop("bbox_head.scales.4.scale"), r"1 missing: what becomes head\.decoder\.scales\.4\.scale$"),
        (lambda s: s.pop("bbox_head.inter_convs.5.conv.weight"), r"1 missing: .* head\.interactive\.5\.0\.weight$"),
        (
            rename("bbox_head.inter_convs.5.gn.bias", "bbox_head.inter_convs.6.gn.bias"),
            r"1 missing: what becomes head\.interactive\.5\.1\.bias; 1 unknown: bbox_head\.inter_convs\.6\.gn\.bias$",
        ),
        (lambda s: s.update({"bbox_head.atss_cls.weight": torch.ones(80, 64, 3, 3)}), r"1 unknown: .*\.atss_cls\.w"),
        (lambda s: s.update({"ema_x": torch.ones(1)}), r"1 unknown: ema_x$"),
        (
            lambda s: s.update({"bbox_head.inter_convs.0.conv.bias": torch.ones(64)}),
            r"1 unknown: bbox_head\.inter_convs\.0\.conv\.bias$",
        ),
        (
            lambda s: s.update({"bbox_head.tood_reg.weight": torch.zeros(68, 64, 3, 3)}),
            r"1 misshapen: bbox_head\.tood_reg\.weight is \(68, 64, 3, 3\), not \(4, 64, 3, 3\)$",
        ),
        (
            lambda s: s.update({"bbox_head.tood_cls.bias": torch.full((80,), torch.inf)}),
            r"1 with NaN or infinity: bbox_head\.tood_cls\.bias$",
        ),
        (lambda s: s.pop("bbox_head.tood_cls.weight"), r"no layer that predicts classes among its \d+ tensors$"),
        (
            rename("bbox_head.cls_prob_module.0.bias", "bbox_head.cls_prob_conv1.bias"),
            r"both the authors' and MMDetection's names in TOOD's head",
        ),
        (
            lambda s: s.update({f"bbox_head.inter_convs.{i}.conv.conv_offset.bias": torch.zeros(108) for i in (0, 2)}),
            r"3 missing: .*; 1 unknown: bbox_head\.inter_convs\.2\.conv\.conv_offset\.bias$",
        ),
    ],
)
def test_incomplete_checkpoints_are_refused(
    change: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=message) as error:
        run(convert, monkeypatch, constant(tmp_path / "a.pth", change), tmp_path / "out.safetensors")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_anchors_that_contradict_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = constant(tmp_path / "a.pth", text="anchor_type='anchor_based'")
    with pytest.raises(UserError, match=r"a\.pth: its configuration says anchor_based, --anchors says free$"):
        run(convert, monkeypatch, source, tmp_path / "out.safetensors", "--anchors", "free")
    both = layout(meta={"meta": {"cfg": "anchor_type='anchor_based', a=dict(anchor_type='anchor_free')"}})
    with pytest.raises(UserError, match=r"says anchor_free and anchor_based; add --anchors$"):
        configure(both)


def test_files_of_other_detectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_official(tmp_path / "a.pth", small_state(branch="centerness"))
    with pytest.raises(UserError, match=r"a\.pth: holds no TOOD; its layer of classes is cls_logits, not tood_cls$"):
        run(convert, monkeypatch, source, tmp_path / "out.safetensors")
    with pytest.raises(UserError, match=r"holds no TOOD; its layer of classes is atss_cls, not tood_cls$"):
        configure(layout(class_layer="atss_cls"))
    with pytest.raises(UserError, match="Caffe-style"):
        configure(layout(meta={"meta": {"config": "backbone=dict(style='caffe')"}}))
    with pytest.raises(UserError, match="neither the authors' nor MMDetection's names in TOOD's head"):
        configure(layout(names=frozenset({"bbox_head.tood_cls.weight"})))


# which preset


def layout(**fields: Any) -> Layout:
    plain = Layout(
        *(Path("x.pth"), "mmdet", "resnet50", (), 1, False, 256, 80, "", {}, "tood_cls"),
        names=frozenset({"bbox_head.cls_prob_conv1.weight"}),
    )
    return plain._replace(**fields)


@pytest.mark.parametrize(
    ("network", "anchors", "epoch", "preset"),
    [
        (("resnet50", (), False), None, 12, "r50_1x"),
        (("resnet50", (), False), None, None, "r50_1x"),
        (("resnet50", (), False), None, 24, "r50_2x_ms"),
        (("resnet50", (), False), "based", None, "r50_anchor_based_1x"),
        (("resnet101", (), False), None, 24, "r101_2x_ms"),
        (("resnet101", (3, 4, 5), True), None, None, "r101_dcn_2x_ms"),
        (("resnext101_64x4d", (), False), None, None, "x101_64x4d_2x_ms"),
        (("resnext101_64x4d", (4, 5), True), None, None, "x101_64x4d_dcn_2x_ms"),
        (("resnext101_64x4d", (4, 5), False), None, None, ""),
        (("resnet101", (), False), "based", None, ""),
    ],
)
def test_presets(network: tuple[Any, ...], anchors: Any, epoch: int | None, preset: str) -> None:
    fields = dict(zip(("backbone", "dcn_stages", "dcn_tower"), network, strict=True))
    found = configure(layout(**fields, meta={"meta": {"epoch": epoch}}), anchors=anchors)
    base = PRESETS[preset] if preset else Config(anchor_based=anchors == "based")
    assert found == replace(base, preset=preset, profile="official", **fields)


def test_every_published_network_is_known() -> None:
    assert {name for name in PRESETS if name.endswith(("_1x", "_ms"))} == set(convert.PUBLISHED)


# our own


def test_own_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("ours", classes=2, head="parallel_tap")
    config = Config(head="parallel_tap", backbone="resnet18", channels=64, out="runs/x")
    content = {"config": dataclasses.asdict(config), "categories": [[1, "a"], [5, "b"]], "model": model.state_dict()}
    source, out = tmp_path / "best.pt", tmp_path / "out.safetensors"
    checkpoint.save(source, {"method": "tood_tal", "step": 3, **content})
    run(convert, monkeypatch, source, out)
    found, loaded, categories = load(out)
    assert loaded == replace(config, out="", device="cpu")
    assert [tuple(category) for category in categories] == [(1, "a"), (5, "b")]
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(UserError, match=r"--anchors is for files of other projects; .*best\.pt itself says what"):
        run(convert, monkeypatch, source, tmp_path / "x.safetensors", "--anchors", "free")
