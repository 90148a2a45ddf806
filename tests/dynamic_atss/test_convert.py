"""`python -m dynamic_atss.convert`: every host's checkpoints of other projects and our own, and what is refused."""

import dataclasses
from argparse import Namespace
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import deform_conv2d

from core import checkpoint, distributed
from core.commands import load_trained
from core.errors import UserError
from core.layouts import Layout, from_mmdet, from_official
from dynamic_atss import convert, predict
from dynamic_atss.config import PRESETS, Config
from dynamic_atss.convert import HEAD_NAMES, SETTINGS, configure
from dynamic_atss.model import DynamicATSS
from tests.checkpoints import mmdet_state, run, save, small_state
from tests.conftest import golden_arrays
from tests.dynamic_atss.golden import arrays_of, head_name

LAYERS = {  # MMDetection's names of the layers of our heads
    "gfl": {"cls_logits": "gfl_cls", "bbox_pred": "gfl_reg"},
    "gflv2": {"cls_logits": "gfl_cls", "bbox_pred": "gfl_reg", "quality": "reg_conf"},
    "vfnet": {
        "cls_logits": "vfnet_cls",
        "bbox_pred": "vfnet_reg",
        "box_star": "vfnet_reg_refine_dconv",
        "refine_pred": "vfnet_reg_refine",
        "cls_star": "vfnet_cls_dconv",
        "refine_scales": "scales_refine",
    },
    "atss": {"cls_logits": "atss_cls", "bbox_pred": "atss_reg", "quality": "atss_centerness"},
}


@cache
def small_model(host: str, classes: int = 80, **fields: Any) -> DynamicATSS:
    """A narrow network of MMDetection's architecture with random weights."""
    torch.manual_seed(0)
    plain = {"backbone": "resnet18", "channels": 64, "profile": "mmdet"}
    model = DynamicATSS(replace(SETTINGS[host], **{**plain, **fields}), classes).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # what starts equal would hide a wrong name
            parameter.normal_(std=0.05)
    return model


def mmdet_file(path: Path, host: str, model: DynamicATSS, **meta: Any) -> Path:
    """A checkpoint of MMDetection's layout; returns its path."""
    state = mmdet_state(model.state_dict(), LAYERS[host])
    if host.startswith("gfl"):
        state["bbox_head.integral.project"] = torch.linspace(0, 16, 17)
    torch.save({"state_dict": state, "meta": meta}, path)
    return path


def changed(source: Path, change: Any) -> Path:
    """The same file with another state."""
    content = torch.load(source, weights_only=True)
    change(content["state_dict"])
    torch.save(content, source)
    return source


def load(path: Path) -> Any:
    """The converted model as `evaluate` gets it."""
    arguments = Namespace(weights=path, device="cpu", deterministic=False)
    return load_trained(arguments, "dynamic_atss", Config, DynamicATSS, distributed.pick_device("cpu"))


@torch.no_grad()
def outputs_of(model: DynamicATSS) -> list[Tensor]:
    """What a model says about a small image."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8, generator=generator)
    return [part for part in model(pixels, torch.tensor([[64, 96]]))[:4] if part is not None]


# names


@pytest.mark.parametrize("file", ["head_atss.npz", "head_gfl.npz", "head_vfnet.npz"])
def test_every_name_of_mmdetections_heads(file: str) -> None:
    keys = [key.removeprefix("param/") for key in golden_arrays(file) if key.startswith("param/")]
    check_names(keys)


def test_every_name_of_the_authors_heads(shared: Path) -> None:
    folder = shared / "golden_official"
    check_names([key.removeprefix("param/") for key in arrays_of(folder / "gflv2.npz") if key.startswith("param/")])
    for file in ("atss.npz", "dynamic_atss.npz"):
        for key in (key.removeprefix("param/") for key in arrays_of(folder / file) if key.startswith("param/")):
            assert from_official(f"rpn.head.{key}") == f"head.{head_name(key)}"


def check_names(keys: list[str]) -> None:
    assert len(keys) > 30
    for key in keys:
        found, wanted = from_mmdet(f"bbox_head.{key}", HEAD_NAMES.rules), head_name(key)
        assert found == (wanted and f"head.{wanted}")
        assert found or f"bbox_head.{key}" in HEAD_NAMES.constants


# the authors' ATSS and Dynamic ATSS


@pytest.mark.parametrize(("detector", "dcn"), [("atss", ()), ("dynamic_atss", (4, 5))])
def test_the_authors_checkpoints(
    detector: str, dcn: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, out = small_state(branch="centerness", dcn=dcn), tmp_path / "out.safetensors"
    source = save(tmp_path / "a.pth", state)
    with pytest.raises(
        UserError, match="does not say whether it holds ATSS or Dynamic ATSS; add --detector atss or dyn"
    ):
        run(convert, monkeypatch, source, out)
    assert not out.exists()
    run(convert, monkeypatch, source, out, "--detector", detector)
    model, config, _ = load(out)
    assert (config.host, config.profile, config.geometry) == ("atss", "official", "legacy")
    assert (config.dcn_stages, config.dcn_tower) == (dcn, bool(dcn))
    published = {"atss": (0.0, "focal", "centerness"), "dynamic_atss": (1.0, "qfl", "iou")}
    assert (config.pred_weight, config.class_loss, config.quality) == published[detector]
    assert torch.equal(model.head.quality.weight, state["rpn.head.centerness.weight"])
    assert torch.equal(model.head.box_tower[6].bias, state["rpn.head.bbox_tower.6.bias"])
    assert torch.equal(model.head.scales[2].scale, state["rpn.head.scales.2.scale"][0])
    if dcn:
        assert torch.equal(model.head.cls_tower[9].offset.weight, state["rpn.head.cls_tower.9.offset.weight"])
        assert torch.equal(model.backbone.layer4[0].conv2.weight, state["backbone.body.layer4.0.conv2.conv.weight"])
    assert all(part.isfinite().all() for part in outputs_of(model))


# GFL, GFLV2, VFNet and ATSS under MMDetection's names


@pytest.mark.parametrize(
    ("host", "dcn"), [("atss", ()), ("gfl", (3, 4, 5)), ("gflv2", ()), ("vfnet", ()), ("vfnet", (3, 4, 5))]
)
def test_every_host_gives_the_same_outputs(
    host: str, dcn: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, out = small_model(host, dcn_stages=dcn, dcn_tower=bool(dcn)), tmp_path / "out.safetensors"
    asked = ("--detector", "atss") if host == "atss" else ()
    run(convert, monkeypatch, mmdet_file(tmp_path / "a.pth", host, theirs), out, *asked)
    ours, config, _ = load(out)
    assert (config.host, config.dcn_stages, config.dcn_tower, config.preset) == (host, dcn, bool(dcn), "")
    assert config.profile == ("official" if host == "gflv2" else "mmdet")
    assert config.pred_weight == 0
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    torch.testing.assert_close(outputs_of(ours), outputs_of(theirs))


def test_background_column_of_gflv2_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, out = small_model("gflv2", classes=81), tmp_path / "out.safetensors"
    source = mmdet_file(tmp_path / "a.pth", "gflv2", theirs)
    run(convert, monkeypatch, source, out)
    told = capsys.readouterr().out
    assert "80 classes" in told
    assert "\nleft out: the background's column of the class layer\n" in told
    assert "the authors' code on MMDetection" in told
    ours, config, categories = load(out)
    assert (len(categories), config.profile) == (80, "official")
    assert checkpoint.load(out)["provenance"]["notes"] == ["left out: the background's column of the class layer"]
    logits, *others = outputs_of(theirs)
    torch.testing.assert_close(outputs_of(ours), [logits[..., :80], *others])
    run(convert, monkeypatch, source, out, "--force", "--profile", "mmdet")
    assert checkpoint.load(out)["profile"] == "mmdet"


def test_the_names_tell_whether_there_is_a_background_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = mmdet_file(tmp_path / "a.pth", "gflv2", small_model("gflv2", classes=4)), tmp_path / "o.safetensors"
    with pytest.raises(UserError, match=r"has 3 or 4 classes, not COCO's 80; name them with --classes FILE"):
        run(convert, monkeypatch, source, out)
    names = tmp_path / "names.txt"
    for count in (2, 5):
        names.write_text("\n".join("abcde"[:count]))
        with pytest.raises(UserError, match=rf"names {count} classes, .*a\.pth has 3 or 4"):
            run(convert, monkeypatch, source, out, "--classes", names)
    for count in (3, 4):
        names.write_text("\n".join("abcde"[:count]))
        run(convert, monkeypatch, source, out, "--classes", names, "--force")
        assert len(checkpoint.load(out)["model"]["head.cls_logits.bias"]) == count
    run(convert, monkeypatch, mmdet_file(tmp_path / "b.pth", "gflv2", small_model("gflv2")), out, "--force")
    assert "notes" not in checkpoint.load(out)["provenance"]  # 80 columns are COCO's classes


def test_only_gflv2_has_a_background_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = mmdet_file(tmp_path / "a.pth", "gfl", small_model("gfl", classes=81))
    with pytest.raises(UserError, match="has 81 classes, not COCO's 80"):
        run(convert, monkeypatch, source, tmp_path / "out.safetensors")


def test_deformable_convolutions_without_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, out = small_model("gfl", dcn_stages=(5,), dcn_groups=2), tmp_path / "out.safetensors"

    def cut(state: dict[str, Tensor]) -> None:
        for key in [key for key in state if "conv_offset" in key]:
            state[key] = state[key][:36].clone()

    run(convert, monkeypatch, changed(mmdet_file(tmp_path / "a.pth", "gfl", theirs), cut), out)
    assert "added: masks of 1 to its deformable convolutions" in capsys.readouterr().out
    ours, config, _ = load(out)
    assert (config.dcn_stages, config.dcn_groups, config.dcn_tower) == ((5,), 2, False)
    conv, x = ours.backbone.layer4[1].conv2, torch.randn(1, 512, 5, 6)
    with torch.no_grad():
        offsets = conv.offset(x)[:, :36]
        torch.testing.assert_close(conv(x), deform_conv2d(x, offsets, conv.weight, padding=1))
        assert torch.equal(conv.offset.weight[:36], theirs.backbone.layer4[1].conv2.offset.weight[:36])


@pytest.mark.parametrize("profile", ["mmdet", "official"])
def test_vfnet_gets_the_profile_that_is_asked_for(
    profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = mmdet_file(tmp_path / "a.pth", "vfnet", small_model("vfnet")), tmp_path / "out.safetensors"
    run(convert, monkeypatch, source, out, "--profile", profile)
    content = checkpoint.load(out)
    assert (content["profile"], content["geometry"]) == (profile, "modern")
    assert load(out)[1].switches.relu_before_p7


def test_converted_model_predicts_with_no_further_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = mmdet_file(tmp_path / "a.pth", "gflv2", small_model("gflv2", 81)), tmp_path / "out.safetensors"
    run(convert, monkeypatch, source, out)
    Image.fromarray(np.full((60, 90, 3), 128, dtype=np.uint8)).save(tmp_path / "x.png")
    run(predict, monkeypatch, out, tmp_path / "x.png", "--out", tmp_path / "drawn")
    assert (tmp_path / "drawn" / "predictions.json").exists()


# what is refused


@pytest.mark.parametrize(
    ("host", "change", "message"),
    [
        ("gflv2", lambda s: s.pop("bbox_head.reg_conf.2.bias"), r"1 missing: what becomes head\.quality\.2\.bias$"),
        (
            "gfl",
            lambda s: s.update({"bbox_head.integral.project": torch.arange(17.0) / 2}),
            r"is 0, 0\.5, 1, 1\.5, .*is 0, 1",
        ),
        (
            "gfl",
            lambda s: s.update({"bbox_head.integral.project": torch.arange(33.0)}),
            r"\(33 values\), .* \(17 values\)$",
        ),
        (
            "gfl",
            lambda s: s.update({"bbox_head.gfl_reg.weight": torch.zeros(132, 64, 3, 3)}),
            r"1 misshapen: bbox_head\.gfl_reg\.weight is \(132, 64, 3, 3\), not \(68, 64, 3, 3\)$",
        ),
        (
            "vfnet",
            lambda s: s.pop("bbox_head.vfnet_cls_dconv.weight"),
            r"1 missing: what becomes head\.cls_star\.weight$",
        ),
        (
            "vfnet",
            lambda s: s.update({"bbox_head.reg_conf.0.bias": torch.ones(64)}),
            r"1 unknown: bbox_head\.reg_conf\.0\.b",
        ),
        (
            "vfnet",
            lambda s: s["bbox_head.vfnet_cls.bias"].fill_(torch.nan),
            r"1 with NaN or infinity: bbox_head\.vfnet_cls",
        ),
        ("vfnet", lambda s: s.update({"ema_x": torch.ones(1)}), r"1 unknown: ema_x$"),
        ("gfl", lambda s: s.pop("bbox_head.gfl_cls.weight"), r"no layer that predicts classes among its \d+ tensors$"),
    ],
)
def test_incomplete_checkpoints_are_refused(
    host: str, change: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = changed(mmdet_file(tmp_path / "a.pth", host, small_model(host)), change)
    with pytest.raises(UserError, match=message) as error:
        run(convert, monkeypatch, source, tmp_path / "out.safetensors")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_gfl_without_its_constant_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = changed(
        mmdet_file(tmp_path / "a.pth", "gfl", small_model("gfl")), lambda s: s.pop("bbox_head.integral.project")
    )
    run(convert, monkeypatch, source, tmp_path / "out.safetensors")


# which detector, preset and profile


def layout(**fields: Any) -> Layout:
    plain = Layout(Path("x.pth"), "mmdet", "resnet50", (), 1, False, 256, 80, "atss_centerness", {}, "atss_cls")
    return plain._replace(**fields)


GFL = {"class_layer": "gfl_cls", "quality": ""}
GFLV2 = {"class_layer": "gfl_cls", "quality": "reg_conf", "background": True}
VFNET = {"class_layer": "vfnet_cls", "quality": ""}
OFFICIAL = {"source": "official", "class_layer": "cls_logits", "quality": "centerness"}


def written(text: str) -> dict[str, Any]:
    return {"meta": {"meta": {"cfg": text}}}


@pytest.mark.parametrize(
    ("fields", "asked", "message"),
    [
        ({}, None, "does not say whether it holds ATSS or Dynamic ATSS; add --detector atss or dynamic_atss$"),
        (OFFICIAL, None, "does not say whether it holds ATSS or Dynamic ATSS; add --detector atss or dynamic_atss$"),
        (OFFICIAL, "gfl", "holds atss or dynamic_atss, --detector says gfl$"),
        (GFL, "gflv2", "holds gfl, --detector says gflv2$"),
        (VFNET, "atss", "holds vfnet, --detector says atss$"),
        (OFFICIAL | {"quality": "iou_pred"}, "atss", "holds PAA; convert it with python -m paa.convert$"),
        (written("type='PAAHead'"), "atss", "holds PAA; convert it with python -m paa.convert$"),
        (written("type='ATSSHead'"), "dynamic_atss", "holds atss, --detector says dynamic_atss$"),
        (written("backbone=dict(style='caffe')"), "atss", "Caffe-style"),
    ],
)
def test_files_of_other_detectors(fields: dict[str, Any], asked: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        configure(layout(**fields), asked)


def test_the_names_or_the_configuration_inside_say_the_detector() -> None:
    assert configure(layout(**written("type='ATSSHead'")), None).host == "atss"
    assert configure(layout(**written("type='ATSSHead', teacher='PAAHead'")), "atss").host == "atss"
    for fields, host in ((GFL, "gfl"), (GFLV2, "gflv2"), (VFNET, "vfnet")):
        assert configure(layout(**fields), None).host == host
        assert configure(layout(**fields), host).host == host


def test_the_profile_is_that_of_the_names_where_they_say_one() -> None:
    assert configure(layout(**OFFICIAL), "atss", "official").profile == "official"
    with pytest.raises(UserError, match="has the names of profile official, --profile says mmdet"):
        configure(layout(**OFFICIAL), "atss", "mmdet")
    with pytest.raises(UserError, match="has the names of profile mmdet, --profile says official"):
        configure(layout(), "atss", "official")
    for fields, default in ((GFL, "mmdet"), (GFLV2, "official"), (VFNET, "mmdet")):
        profiles = [configure(layout(**fields), None, asked).profile for asked in (None, "mmdet", "official")]
        assert profiles == [default, "mmdet", "official"]


@pytest.mark.parametrize(
    ("network", "preset"),
    [
        (("resnet50", (), False), "r50_1x"),
        (("resnet50", (3, 4, 5), True), "r50_dcn_1x"),
        (("resnet101", (), False), "r101_2x_ms"),
        (("resnet101", (3, 4, 5), True), "r101_dcn_2x_ms"),
        (("resnext101_64x4d", (), False), "x101_64x4d_2x_ms"),
        (("resnext101_64x4d", (4, 5), True), "x101_64x4d_dcn_2x_ms"),
        (("resnext101_32x8d", (4, 5), True), "x101_32x8d_dcn_2x_ms"),
        (("resnet18", (), False), ""),
        (("resnet50", (3, 4, 5), False), ""),
    ],
)
def test_presets(network: tuple[Any, ...], preset: str) -> None:
    fields = dict(zip(("backbone", "dcn_stages", "dcn_tower"), network, strict=True))
    both = {"profile": "official", "geometry": "legacy", **fields}
    for detector, prefix, settings in (("dynamic_atss", "", Config()), ("atss", "atss_", PRESETS["atss_r50_1x"])):
        name = f"{prefix}{preset}" if preset else ""
        expected = replace(PRESETS.get(name, settings), preset=name, **both)
        assert configure(layout(**OFFICIAL, **fields), detector) == expected
    for layers, name in ((GFLV2, "gflv2_r50_1x"), (VFNET, "vfnet_r50_1x")):
        found = configure(layout(**layers, **fields), None)
        known = network == ("resnet50", (), False)
        assert found == replace(PRESETS[name], preset=name if known else "", profile=found.profile, **fields)


def test_every_large_network_is_known_by_its_names() -> None:
    assert {preset for preset in PRESETS if preset.endswith("_ms")} == {
        name for names in convert.PUBLISHED.values() for name in names if name.endswith("_ms")
    }


# our own


def test_own_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("vfnet", classes=2)
    config = replace(PRESETS["vfnet_combined_r50_1x"], backbone="resnet18", channels=64, out="runs/x")
    content = {"config": dataclasses.asdict(config), "categories": [[1, "a"], [5, "b"]], "model": model.state_dict()}
    source, out = tmp_path / "best.pt", tmp_path / "out.safetensors"
    checkpoint.save(source, {"method": "dynamic_atss", "step": 3, **content})
    run(convert, monkeypatch, source, out)
    found, loaded, categories = load(out)
    assert loaded == replace(config, out="", device="cpu")
    assert [tuple(category) for category in categories] == [(1, "a"), (5, "b")]
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    for flag, value in (("detector", "vfnet"), ("profile", "mmdet")):
        with pytest.raises(UserError, match=rf"--{flag} is for files of other projects; .*best\.pt itself says what"):
            run(convert, monkeypatch, source, tmp_path / "x.safetensors", f"--{flag}", value)
