"""`python -m paa.convert`: what becomes of the authors', MMDetection's and our own checkpoints, and what is refused."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core import checkpoint, distributed, released
from core.anchors import anchor_grid
from core.commands import load_trained
from core.convert import fill, read_layout, rename_all
from core.data.coco import COCO_CATEGORIES
from core.errors import UserError
from core.layouts import Layout
from paa import convert, evaluate, predict, train
from paa.config import PRESETS, Config
from paa.convert import configure
from paa.model import PAA, Outputs
from paa.postprocess import detect
from tests.checkpoints import mmdet_state, official_shapes, official_state, run, save, small_state
from tests.conftest import GOLDEN
from tests.core.test_golden_r50 import QUALITY, RULE, check_activations, check_detections
from tests.runs import TINY
from tests.runs import run as start


def load(path: Path) -> Any:
    """The converted model as `evaluate` gets it."""
    arguments = Namespace(weights=path, device="cpu", deterministic=False)
    return load_trained(arguments, "paa", Config, PAA, distributed.pick_device("cpu"))


# the authors' and MMDetection's whole networks


def test_the_authors_329_names() -> None:
    shapes = official_shapes("resnet50")
    assert len(shapes) == 329
    state = {
        name: tensor if "cell_anchors" in name else torch.empty(shapes[name], device="meta")
        for name, tensor in official_state({n: s if "cell_anchors" in n else (0,) for n, s in shapes.items()}).items()
    }
    weights = rename_all(Path("x.pth"), state, "official")
    assert (weights.unknown, weights.missing, len(weights.dropped)) == ((), (), 5)
    layout = read_layout(Path("x.pth"), "official", state, weights, {"iteration": 135_000})
    config = configure(layout, None)
    assert config == replace(PRESETS["r50_1p5x"], preset="r50_1p5x", profile="official", geometry="legacy")
    with torch.device("meta"):
        wanted = PAA(config, 80).state_dict()
    assert set(weights.state) == set(wanted)
    sizes = [tensor.numel() for name, tensor in wanted.items() if "running" not in name]
    assert sum(sizes) == 32_297_370  # spec section 10


@pytest.mark.parametrize("detector", ["paa", "atss"])
@torch.no_grad()
def test_mmdet_resnet50_reproduces_every_stored_number(
    detector: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = json.loads((GOLDEN / f"r50_{detector}.json").read_text())
    state = {
        key: torch.as_tensor(RULE["value_for"](key, shape, golden["seed"]), dtype=getattr(torch, kind))
        for key, shape, kind in golden["state_dict"]
    }
    meta = {"config": f"model = dict(bbox_head=dict(type='{detector.upper()}Head'))", "epoch": 12}
    source, out = tmp_path / "mmdet.pth", tmp_path / "out.safetensors"
    torch.save({"meta": meta, "state_dict": state}, source, _use_new_zipfile_serialization=detector == "atss")
    run(convert, monkeypatch, source, out)
    model, config, categories = load(out)
    assert (config.profile, config.geometry, categories) == ("mmdet", "modern", COCO_CATEGORIES)
    assert sum(p.numel() for p in model.parameters()) == golden["num_parameters"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == golden["num_trainable"]
    check_activations({**golden, "quality": QUALITY[detector]}, model)
    head = model.head(model.fpn(model.backbone(torch.from_numpy(RULE["image"](golden["seed"])))))
    grid = anchor_grid(head.shapes, config.box_geometry)
    found = detect(Outputs(head.logits, head.deltas, head.quality, grid), torch.tensor([[256, 320]]), config)
    check_detections(found, golden["detections"])


# small networks of the authors' layout


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "authors.pth", small_state())


def test_converted_weights_are_the_authors(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out.safetensors"
    run(convert, monkeypatch, source, out)
    assert f"python -m paa.evaluate {out}" in capsys.readouterr().out
    content, state = checkpoint.load(out, method="paa"), small_state()
    assert (content["profile"], content["geometry"]) == ("official", "legacy")
    assert content["provenance"]["iteration"] == 90_000
    assert content["categories"] == [list(category) for category in COCO_CATEGORIES]
    pairs = {
        "head.quality.weight": "rpn.head.iou_pred.weight",
        "head.box_tower.9.bias": "rpn.head.bbox_tower.9.bias",
        "fpn.lateral.0.weight": "backbone.fpn.fpn_inner2.weight",
        "fpn.output.4.bias": "backbone.fpn.top_blocks.p7.bias",
        "backbone.layer3.1.bn2.running_var": "backbone.body.layer3.1.bn2.running_var",
    }
    for ours, theirs in pairs.items():
        assert torch.equal(content["model"][ours], state[theirs])
    assert content["model"]["head.scales.2.scale"] == state["rpn.head.scales.2.scale"][0]
    first = out.read_bytes()
    run(convert, monkeypatch, source, out, "--force")
    assert out.read_bytes() == first


def test_deformable_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = small_state(dcn=(4, 5), branch="centerness")
    out = tmp_path / "out.safetensors"
    run(convert, monkeypatch, save(tmp_path / "a.pth", state), out)
    model, config, _ = load(out)
    assert (config.dcn_stages, config.dcn_tower, config.dcn_groups) == ((4, 5), True, 1)
    assert (config.assigner, config.quality, config.score_voting, config.preset) == (
        *("atss", "centerness", False, "atss_centerness"),
    )
    assert torch.equal(model.head.cls_tower[9].offset.weight, state["rpn.head.cls_tower.9.offset.weight"])
    assert torch.equal(model.backbone.layer4[0].conv2.weight, state["backbone.body.layer4.0.conv2.conv.weight"])
    with torch.no_grad():
        outputs = model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([[64, 64]]))
    assert outputs.logits.isfinite().all()


def without_offsets(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if ".offset." in name]:
        del state[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("rpn.head.iou_pred.bias"), r"1 missing: what becomes head\.quality\.bias$"),
        (lambda s: s.pop("rpn.anchor_generator.cell_anchors.4"), r"1 missing: rpn\.anchor_generator\.cell_anchors\.4$"),
        (lambda s: s.update({"rpn.head.extra.weight": torch.ones(1)}), r"1 unknown: rpn\.head\.extra\.weight$"),
        (
            lambda s: s.update({"backbone.body.stem.conv1.weight": torch.ones(64, 3, 3, 3)}),
            r"1 misshapen: backbone\.body\.stem\.conv1\.weight is \(64, 3, 3, 3\), not \(64, 3, 7, 7\)$",
        ),
        (
            lambda s: s["rpn.head.cls_logits.bias"].fill_(torch.nan),
            r"1 with NaN or infinity: rpn\.head\.cls_logits\.bias$",
        ),
        (
            lambda s: s["rpn.anchor_generator.cell_anchors.0"].sub_(4),
            r"cell_anchors\.0 is -31\.5, -31\.5, 31\.5, 31\.5, this detector's is -27\.5, -27\.5, 35\.5, 35\.5$",
        ),
        (lambda s: s.pop("rpn.head.cls_logits.weight"), r"no layer that predicts classes among its \d+ tensors$"),
        (lambda s: s.pop("backbone.body.layer3.1.conv1.weight"), r"1 missing: what becomes backbone\.layer3\.1\.conv1"),
        (
            lambda s: [s.pop(name) for name in list(s) if "layer3.1." in name],
            r"its backbone has 2 \+ 2 \+ 1 \+ 2 blocks with \[\(1, 64\)\] groups and channels .* fits none of resnet18",
        ),
    ],
)
def test_incomplete_checkpoints_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    state = small_state()
    change(state)
    with pytest.raises(UserError, match=message) as error:
        run(convert, monkeypatch, save(tmp_path / "a.pth", state), tmp_path / "out.safetensors")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_deformable_without_its_offsets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = small_state(dcn=(5,))
    without_offsets(state)
    with pytest.raises(UserError, match=r"8 missing: what becomes .*offset"):
        run(convert, monkeypatch, save(tmp_path / "a.pth", state), tmp_path / "out.safetensors")


def test_other_numbers_of_classes_want_their_names(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, out = save(tmp_path / "few.pth", small_state(classes=3)), tmp_path / "out.safetensors"
    with pytest.raises(UserError, match="has 3 classes, not COCO's 80; name them with --classes FILE"):
        run(convert, monkeypatch, few, out)
    (tmp_path / "names.txt").write_text("RBC\nWBC\nPlatelets\n")
    run(convert, monkeypatch, few, out, "--classes", tmp_path / "names.txt", "--licence", "MIT")
    content = checkpoint.load(out)
    assert content["categories"] == [[1, "RBC"], [2, "WBC"], [3, "Platelets"]]
    assert content["licence"] == "MIT"


def test_nothing_is_overwritten_unasked(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine.safetensors"
    mine.write_text("mine")
    for out, message in (
        (mine, r"mine\.safetensors: exists; choose another name, or --force to replace it"),
        (tmp_path / "out.pt", r"out\.pt: the name of a released model must end in \.safetensors"),
        (tmp_path, r"must end in \.safetensors"),
    ):
        with pytest.raises(UserError, match=message):
            run(convert, monkeypatch, source, out)
    assert mine.read_text() == "mine"
    run(convert, monkeypatch, source, mine, "--force")
    with pytest.raises(UserError, match=r"mine\.safetensors: is the file to convert"):
        run(convert, monkeypatch, mine, mine, "--force")
    assert checkpoint.load(mine)["method"] == "paa"


def test_damaged_and_missing_files(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = tmp_path / "cut.pth"
    cut.write_bytes(source.read_bytes()[:-1000])
    for path, message in ((cut, "not a PyTorch file, or a damaged one"), (tmp_path / "no.pth", "No such file")):
        with pytest.raises(UserError, match=message):
            run(convert, monkeypatch, path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


# which detector, which preset


def layout(**fields: Any) -> Layout:
    plain = Layout(Path("x.pth"), "mmdet", "resnet50", (), 1, False, 256, 80, "atss_centerness", {})
    return plain._replace(**fields)


def mmdet_text(text: str) -> dict[str, Any]:
    return {"meta": {"cfg": text, "epoch": 12}}


def test_mmdet_says_its_detector_in_its_configuration_or_is_asked() -> None:
    paa, atss = (mmdet_text(f"bbox_head=dict(type='{name}Head')") for name in ("PAA", "ATSS"))
    assert configure(layout(meta=paa), None).assigner == "paa"
    assert configure(layout(meta=atss), None).assigner == "atss"
    assert configure(layout(), "atss").quality == "centerness"
    assert configure(layout(), "paa").quality == "iou"
    both = mmdet_text("type='PAAHead', teacher='ATSSHead'")
    assert configure(layout(meta=both), "atss").assigner == "atss"
    for meta in ({}, both):
        with pytest.raises(UserError, match="does not say whether it holds PAA or ATSS; add --detector paa or atss"):
            configure(layout(meta=meta), None)
    with pytest.raises(UserError, match="holds paa, --detector says atss"):
        configure(layout(meta=paa), "atss")
    with pytest.raises(UserError, match="holds atss, --detector says paa"):
        configure(layout(source="official", quality="centerness"), "paa")
    with pytest.raises(UserError, match="Caffe-style"):
        configure(layout(meta=mmdet_text("type='PAAHead', backbone=dict(style='caffe')")), None)


@pytest.mark.parametrize(
    ("backbone", "stages", "iteration", "preset"),
    [
        ("resnet50", (), 90_000, "r50_1x"),
        ("resnet50", (), 135_000, "r50_1p5x"),
        ("resnet50", (), 7, "r50_1p5x"),
        ("resnet101", (), 180_000, "r101_2x_ms"),
        ("resnet101", (3, 4, 5), 180_000, "r101_dcn_2x_ms"),
        ("resnext101_64x4d", (), 180_000, "x101_64x4d_2x_ms"),
        ("resnext101_64x4d", (4, 5), 180_000, "x101_64x4d_dcn_2x_ms"),
        ("resnext101_32x8d", (4, 5), 180_000, "x101_32x8d_dcn_2x_ms"),
        ("resnext152_32x8d", (4, 5), 360_000, "x152_32x8d_dcn_2x_ms"),
        ("resnet18", (), 90_000, ""),
        ("resnet50", (3, 4, 5), 90_000, ""),
    ],
)
def test_presets(backbone: str, stages: tuple[int, ...], iteration: int, preset: str) -> None:
    fields = {"backbone": backbone, "dcn_stages": stages, "dcn_tower": bool(stages)}
    found = layout(source="official", quality="iou_pred", meta={"iteration": iteration}, **fields)
    expected = replace(PRESETS.get(preset, Config()), preset=preset, profile="official", geometry="legacy", **fields)
    assert configure(found, None) == expected


@pytest.mark.parametrize(
    "name", ["r101_dcn_2x_ms", "x101_64x4d_dcn_2x_ms", "x101_32x8d_dcn_2x_ms", "x152_32x8d_dcn_2x_ms"]
)
def test_every_large_network_is_known_by_its_names_and_shapes(name: str) -> None:
    config = replace(PRESETS[name], profile="mmdet")
    with torch.device("meta"):
        ours = PAA(config, 80).state_dict()
    theirs = mmdet_state(ours, {"cls_logits": "atss_cls", "bbox_pred": "atss_reg", "quality": "atss_centerness"})
    weights = rename_all(Path("x.pth"), theirs, "mmdet")
    assert weights.unknown == ()
    found = read_layout(Path("x.pth"), "mmdet", theirs, weights, mmdet_text("PAAHead"))
    assert configure(found, None) == replace(config, preset=name)
    assert set(weights.state) == set(ours)


# our own checkpoints, and what the other commands make of a released model


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps with an average of its weights; its data lie beside it."""
    patch, out = pytest.MonkeyPatch(), tmp_path_factory.mktemp("run") / "run"
    start("core.data", "shapes", str(out.parent / "data"), "--train", "4", "--val", "2", "--test", "1")
    flags = ("--steps", 2, "--batch-size", 2, "--workers", 0, "--ema", 0.5, "--score-threshold", 0.001)
    try:
        run(train, patch, "--data", out.parent / "data", *TINY, *flags, "--out", out)
    finally:
        patch.undo()
    return out


def test_own_checkpoint_with_the_average_of_its_weights(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, key in (("best.pt", "model"), ("last.pt", "average")):
        out = tmp_path / f"{name}.safetensors"
        run(convert, monkeypatch, trained / name, out)
        content, source = checkpoint.load(out), checkpoint.load(trained / name)
        assert all(torch.equal(content["model"][part], tensor) for part, tensor in source[key].items())
        assert content["categories"] == source["categories"]
        assert content["provenance"]["step"] == 2
        assert content["config"]["out"] == ""
    again = tmp_path / "again.safetensors"
    run(convert, monkeypatch, tmp_path / "best.pt.safetensors", again)
    assert again.read_bytes() == (tmp_path / "best.pt.safetensors").read_bytes()
    with pytest.raises(
        UserError, match=r"--detector is for files of other projects; .*best.pt itself says what it holds"
    ):
        run(convert, monkeypatch, trained / "best.pt", tmp_path / "x.safetensors", "--detector", "paa")


def test_released_model_evaluates_predicts_and_starts_a_run(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.safetensors"
    run(convert, monkeypatch, trained / "best.pt", out)
    for weights, folder in ((trained / "best.pt", tmp_path / "a"), (out, tmp_path / "b")):
        run(predict, monkeypatch, weights, trained.parent / "data" / "val", "--score", 0, "--out", folder)
    assert (tmp_path / "a" / "predictions.json").read_bytes() == (tmp_path / "b" / "predictions.json").read_bytes()
    flags = ("--steps", 1, "--batch-size", 2, "--workers", 0, "--score-threshold", 0.001)
    run(
        train,
        monkeypatch,
        "--data",
        trained.parent / "data",
        *TINY,
        *flags,
        "--weights",
        out,
        "--lr",
        0,
        "--out",
        tmp_path / "run",
    )
    ours, theirs = checkpoint.load(tmp_path / "run" / "last.pt")["model"], released.load(out)["model"]
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items() if "running" not in name)


def test_converted_model_evaluates_with_no_further_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: Path
) -> None:
    out, folder = tmp_path / "out.safetensors", tmp_path / "data"
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2017").symlink_to(shared / "data" / "coco_mini" / "images" / "val2017")
    content = json.loads((shared / "data" / "coco_mini" / "annotations" / "instances_val2017.json").read_text())
    keep = {image["id"] for image in content["images"][:1]}
    content["images"] = content["images"][:1]
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in keep]
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    run(convert, monkeypatch, save(tmp_path / "a.pth", small_state()), out)
    run(evaluate, monkeypatch, out, "--data", folder)
    metrics = json.loads((tmp_path / "evaluate-val" / "metrics.json").read_text())
    assert len(metrics["per_class"]) == 80
    assert metrics["AP"] >= 0


def test_fill_is_told_of_a_configuration_that_does_not_fit(tmp_path: Path) -> None:
    weights = rename_all(tmp_path, small_state(dcn=(5,)), "official")
    with torch.device("meta"):
        wanted = PAA(Config(backbone="resnet18", channels=64, profile="official", geometry="legacy"), 80).state_dict()
    with pytest.raises(UserError, match=r"8 unknown: .*offset"):
        fill(tmp_path, weights, wanted)
