"""Every named run: what the paper states about it, and one step of training and an evaluation at reduced size."""

import math
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
from paa.config import ABLATIONS, PRESETS, Config
from paa.losses import compute_losses
from paa.model import PAA
from paa.postprocess import detect
from tests.runs import run

BASE = Config()
# Spec section 8: backbone, deformable stages, short sides, learning rate, batch, steps, milestones in steps
RECIPES = {
    "r50_1x": ("resnet50", (), (0, 800), 0.01, 16, 90_000, (60_000, 80_000)),
    "r50_1p5x": ("resnet50", (), (0, 800), 0.01, 16, 135_000, (90_000, 120_000)),
    "r101_2x_ms": ("resnet101", (), (640, 800), 0.01, 16, 180_000, (120_000, 160_000)),
    "x101_64x4d_2x_ms": ("resnext101_64x4d", (), (640, 800), 0.01, 16, 180_000, (120_000, 160_000)),
    "r101_dcn_2x_ms": ("resnet101", (3, 4, 5), (640, 800), 0.01, 16, 180_000, (120_000, 160_000)),
    "x101_64x4d_dcn_2x_ms": ("resnext101_64x4d", (4, 5), (640, 800), 0.01, 16, 180_000, (120_000, 160_000)),
    "x101_32x8d_dcn_2x_ms": ("resnext101_32x8d", (4, 5), (640, 800), 0.01, 16, 180_000, (120_000, 160_000)),
    "x152_32x8d_dcn_2x_ms": ("resnext152_32x8d", (4, 5), (640, 800), 0.005, 8, 360_000, (240_000, 320_000)),
}
SHARED_RECIPE = {  # of all of them
    "long_side": 1333,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "bias_lr_factor": 2.0,
    "bias_weight_decay": 0.0,
    "warmup": "constant",
    "warmup_steps": 500,
    "warmup_factor": 1 / 3,
    "clip_grad_norm": 0.0,
    "frozen_stages": 2,
    "norm": "frozen",
    "empty_images": "skip",
    "dcn_groups": 1,
}
PARAMETERS = {  # without deformable convolutions, 80 classes
    "resnet50": 32_295_322,  # the first three: spec section 10, less 2,048 biases of the towers
    "resnet101": 51_287_450,
    "resnext101_64x4d": 90_193_562,
    "resnext101_32x8d": 90_193_562 - 83_455_272 + 88_791_336,  # torchvision's classifiers differ by as much
    # 4 blocks of C3 and 13 of C4 more: two 1 x 1 and a 3 x 3 convolution in 32 groups, and their three norms
    "resnext152_32x8d": 95_529_626 + 4 * (2 * 512**2 + 512 * 16 * 9 + 3072) + 13 * (2 * 1024**2 + 1024 * 32 * 9 + 6144),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str) -> None:
    config = PRESETS[name]
    backbone, stages, sides, lr, batch, steps, milestones = RECIPES[name]
    assert (config.backbone, config.dcn_stages, config.dcn_tower) == (backbone, stages, bool(stages))
    assert (config.short_side_min, config.short_side) == sides
    assert config.learning_rate == pytest.approx(lr)
    assert (config.batch_size, config.steps) == (batch, steps)
    assert tuple(round(milestone * steps) for milestone in config.milestones) == milestones
    assert {key: getattr(config, key) for key in SHARED_RECIPE} == SHARED_RECIPE


def test_every_recipe_is_a_preset_and_the_paper_s_run_is_the_default() -> None:
    assert set(PRESETS) == {*RECIPES, *ABLATIONS, "small", "quick"}
    assert next(iter(PRESETS)) == "r50_1p5x"


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_only_what_it_is_named_after(name: str) -> None:
    config = PRESETS[name]
    changed = {field.name for field in fields(Config) if getattr(config, field.name) != getattr(BASE, field.name)}
    method = {"assigner", "quality", "scheme", "fixed_number", "score_range", "score_voting", "topk", "anchor_scale"}
    assert changed
    assert changed <= method | {"box_weight", "quality_weight"}


def test_ablations_are_all_different() -> None:
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
    size = model_complexity(config, PAA)  # one forward of all layers, on the device without memory
    assert size.parameters == PARAMETERS[config.backbone] + sum(offsets) + tower
    assert size.canvas == (800, 1280)


@pytest.mark.parametrize("name", PRESETS)
def test_one_step_and_an_evaluation(name: str, drawings: DataSource, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = PRESETS[name]
    # the paper's backbones in full width, one block for each stage; the ablations, which share one, on the smallest
    one_block = ARCHITECTURES[preset.backbone]._replace(depths=(1, 1, 1, 1))
    monkeypatch.setitem(ARCHITECTURES, preset.backbone, one_block)
    config = replace(
        preset,
        backbone="resnet18" if name in ABLATIONS else preset.backbone,
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
    model = PAA(config, len(drawings.categories))
    state = prepare(model, config, device)
    batch = next(train_batches(drawings.train, config, start=0, steps=1))
    criterion = partial(compute_losses, config=config)
    guard = Guard(torch.full((), NEVER), {})
    before = model.head.cls_logits.weight.clone()
    state.step = 1
    learn(state.model, criterion, batch, state, guard, config, 1)
    losses = {key for key in state.sums if key.startswith("loss_")}
    assert losses == {"loss_cls", "loss_box", *({f"loss_{preset.quality}"} if preset.quality != "none" else ())}
    assert all(math.isfinite(float(state.sums[key])) for key in losses)
    assert not torch.equal(model.head.cls_logits.weight, before)
    metrics = on_validation(partial(detect, config=config), drawings.val, config, device)(model.eval())
    assert 0 <= metrics["AP"] <= 1
