"""Every named run: what the papers state about it, and one step of training and an evaluation at reduced size."""

import math
import re
from dataclasses import fields, replace
from functools import partial

import pytest
import torch

from core.backbone import ARCHITECTURES
from core.complexity import model_complexity
from core.data.loader import train_batches
from core.data.sources import DataSource, open_data
from core.inference import on_validation
from core.train import NEVER, Guard, learn, prepare
from dynamic_atss.config import ABLATIONS, PRESETS, Config
from dynamic_atss.losses import compute_losses
from dynamic_atss.model import DynamicATSS
from dynamic_atss.postprocess import detect
from dynamic_atss.profiles import HOST_PROFILES, NO_FLOOR, HostProfile
from tests.runs import ROOT, run

BASE = Config()
# Spec sections 3.3 and 4: backbone, deformable stages, short sides, steps, milestones in steps
LONG = (180_000, (120_000, 160_000))
RECIPES = {
    "r50_1x": ("resnet50", (), (0, 800), 90_000, (60_000, 80_000)),
    "r50_dcn_1x": ("resnet50", (3, 4, 5), (0, 800), 90_000, (60_000, 80_000)),
    "r101_2x_ms": ("resnet101", (), (640, 800), *LONG),
    "r101_dcn_2x_ms": ("resnet101", (3, 4, 5), (640, 800), *LONG),
    "x101_64x4d_2x_ms": ("resnext101_64x4d", (), (640, 800), *LONG),
    "x101_32x8d_dcn_2x_ms": ("resnext101_32x8d", (4, 5), (640, 800), *LONG),
    "x101_64x4d_dcn_2x_ms": ("resnext101_64x4d", (4, 5), (640, 800), *LONG),
}
HOST_RECIPES = {  # host, weight of the predicted IoU; warm-up's factor; biases: factor of their rate, weight decay
    "gflv2_r50_1x": ("gflv2", 0.0, 0.001, 1.0, 1e-4),
    "gflv2_combined_r50_1x": ("gflv2", 1.0, 0.001, 1.0, 1e-4),
    "vfnet_r50_1x": ("vfnet", 0.0, 0.1, 2.0, 0.0),
    "vfnet_combined_r50_1x": ("vfnet", 1.0, 0.1, 2.0, 0.0),
}
SHARED_RECIPE = {  # of all of them, the column of the assignment included
    "batch_size": 16,
    "learning_rate": 0.01,
    "long_side": 1333,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "warmup_steps": 500,
    "clip_grad_norm": 0.0,
    "frozen_stages": 2,
    "norm": "frozen",
    "empty_images": "skip",
    "dcn_groups": 1,
    "anchor_weight": 1.0,
    "topk": 9,
    "score_threshold": 0.05,
    "pre_nms_top": 1000,
    "nms_iou": 0.6,
    "max_detections": 100,
}
AUTHORS_RECIPE = {
    "host": "atss",
    "bias_lr_factor": 2.0,
    "bias_weight_decay": 0.0,
    "warmup": "constant",
    "warmup_factor": 1 / 3,
}
WIDE = ("r101_dcn_2x_ms", "x101_32x8d_dcn_2x_ms")  # one block a stage of what they name, all others on ResNet-18
PARAMETERS = {  # without deformable convolutions, 80 classes
    "resnet50": 32_295_322,  # the first three: spec PAA section 10, less 2,048 biases of the towers
    "resnet101": 51_287_450,
    "resnext101_64x4d": 90_193_562,
    "resnext101_32x8d": 90_193_562 - 83_455_272 + 88_791_336,  # torchvision's classifiers differ by as much
}
LOSSES = {
    "gflv2": {"loss_cls", "loss_box", "loss_dfl"},
    "vfnet": {"loss_cls", "loss_first", "loss_box"},
}


@pytest.mark.parametrize("combined", [True, False])
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_of_the_authors(name: str, combined: bool) -> None:
    config = PRESETS[name if combined else f"atss_{name}"]
    backbone, stages, sides, steps, milestones = RECIPES[name]
    assert (config.backbone, config.dcn_stages, config.dcn_tower) == (backbone, stages, bool(stages))
    assert (config.short_side_min, config.short_side) == sides
    assert config.steps == steps
    assert tuple(round(milestone * steps) for milestone in config.milestones) == milestones
    shared = SHARED_RECIPE | AUTHORS_RECIPE
    assert {key: getattr(config, key) for key in shared} == shared
    method = (config.pred_weight, config.class_loss, config.quality)
    assert method == ((1.0, "qfl", "iou") if combined else (0.0, "focal", "centerness"))


@pytest.mark.parametrize("name", HOST_RECIPES)
def test_recipe_of_a_host(name: str) -> None:
    config = PRESETS[name]
    found = (config.host, config.pred_weight, config.warmup_factor, config.bias_lr_factor, config.bias_weight_decay)
    assert found == HOST_RECIPES[name]
    assert (config.steps, config.epochs, config.warmup) == (None, 12, "linear")
    assert [milestone * 12 for milestone in config.milestones] == pytest.approx([8, 11])
    assert (config.backbone, config.dcn_stages, config.short_side_min, config.short_side) == ("resnet50", (), 0, 800)
    assert {key: getattr(config, key) for key in SHARED_RECIPE} == SHARED_RECIPE
    assert config.switches.relu_before_p7 == (config.host == "vfnet")
    assert config.pred_source == "refined"


def test_every_recipe_is_a_preset_and_the_paper_s_best_is_the_default() -> None:
    plain = {f"atss_{name}" for name in RECIPES}
    assert set(PRESETS) == {*RECIPES, *plain, *HOST_RECIPES, *ABLATIONS, "small", "quick"}
    assert next(iter(PRESETS)) == "r50_1x"
    assert PRESETS["r50_1x"] == BASE


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_only_what_its_table_does(name: str) -> None:
    changed = {
        field.name for field in fields(Config) if getattr(PRESETS[name], field.name) != getattr(BASE, field.name)
    }
    assert changed
    weights = {"pred_weight", "pred_schedule", "anchor_weight", "anchor_schedule"}
    assert changed <= weights | {"class_loss", "quality"}


def test_presets_are_all_different() -> None:
    assert len(set(PRESETS.values())) == len(PRESETS)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    """A few drawn images."""
    folder = tmp_path_factory.mktemp("drawings")
    run("core.data", "shapes", str(folder), "--train", "4", "--val", "2", "--test", "1")
    return open_data(str(folder))


@pytest.mark.parametrize("name", RECIPES)
def test_size_of_the_whole_model(name: str) -> None:
    config = PRESETS[name]
    depths, width = ARCHITECTURES[config.backbone].depths, 256 if config.backbone.startswith("resnext") else 64
    offsets = [depths[stage - 2] * (27 * (9 * width * 2 ** (stage - 2) + 1)) for stage in config.dcn_stages]
    tower = 2 * 27 * (9 * 256 + 1) if config.dcn_tower else 0
    size = model_complexity(config, DynamicATSS)  # one forward of all layers, on the device without memory
    assert size.parameters == PARAMETERS[config.backbone] + sum(offsets) + tower


@pytest.mark.parametrize("name", PRESETS)
def test_one_step_and_an_evaluation(name: str, drawings: DataSource, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = PRESETS[name]
    one_block = ARCHITECTURES[preset.backbone]._replace(depths=(1, 1, 1, 1))
    monkeypatch.setitem(ARCHITECTURES, preset.backbone, one_block)
    config = replace(
        preset,
        backbone=preset.backbone if name in WIDE else "resnet18",
        backbone_weights="none",
        frozen_stages=0,
        channels=64,
        short_side=64 if preset.norm == "batch" else 32,
        short_side_min=16 if preset.short_side_min else 0,
        long_side=64,
        batch_size=1,
        lr=1e-4,
        workers=0,
        device="cpu",
    )
    device = torch.device("cpu")
    model = DynamicATSS(config, len(drawings.categories))
    state = prepare(model, config, device)
    batch = next(train_batches(drawings.train, config, start=0, steps=1))
    criterion = partial(compute_losses, config=config)
    guard = Guard(torch.full((), NEVER), {})
    weight = dict(model.named_parameters())["head.cls_logits.weight"]
    before = weight.detach().clone()
    state.step = 1
    learn(state.model, criterion, batch, state, guard, config, 1)
    losses = {key for key in state.sums if key.startswith("loss_")}
    assert losses == LOSSES.get(preset.host, {"loss_cls", "loss_box", f"loss_{preset.quality}"})
    assert all(math.isfinite(float(state.sums[key])) for key in losses)
    assert not torch.equal(weight, before)
    metrics = on_validation(partial(detect, config=config), drawings.val, config, device)(model.eval())
    assert 0 <= metrics["AP"] <= 1


def cell(profile: HostProfile, host: str, switch: str) -> str:
    """A switch's value as the README's table writes it."""
    if host != "atss" and switch in ("root_of_score", "rank_on_class"):
        return "-"  # of the branch that these hosts have not
    value = getattr(profile, switch)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "none" if value in (0, NO_FLOOR) else f"{value:g}".replace("e-0", "e-")
    return str(value)


@pytest.mark.consistency
def test_profile_table_says_what_the_profiles_hold() -> None:
    text = (ROOT / "dynamic_atss" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)`: [^|]* \|((?: [\w.-]+ \|){9})$", text, flags=re.MULTILINE)
    found = {switch: [part.strip() for part in cells.strip("|").split("|")] for switch, cells in rows}
    assert found == {
        field.name: [
            cell(HOST_PROFILES[host][name], host, field.name)
            for host in ("atss", "gflv2", "vfnet")
            for name in ("ours", "mmdet", "official")
        ]
        for field in fields(HostProfile)
    }
    assert HOST_PROFILES["gfl"] == HOST_PROFILES["gflv2"]
