"""Every named run: what the paper states about it, and at reduced size a step of either phase and an evaluation."""

import math
from dataclasses import fields, replace
from functools import partial

import pytest
import torch

from core.data.loader import train_batches
from core.data.sources import DataSource, open_data
from core.inference import on_validation
from core.train import NEVER, Guard, learn, lr_at, prepare
from tests.runs import run
from tood_tal.config import ABLATIONS, PRESETS, Config
from tood_tal.losses import compute_losses
from tood_tal.model import TOOD
from tood_tal.postprocess import detect

BASE = Config()
# Spec section 4: backbone, deformable stages, anchor-based, short sides, epochs, epochs of the drops
ONE, TWO = (12, (8, 11)), (24, (16, 22))
RECIPES = {
    "r50_1x": ("resnet50", (), False, (0, 800), *ONE),
    "r50_anchor_based_1x": ("resnet50", (), True, (0, 800), *ONE),
    "r50_2x_ms": ("resnet50", (), False, (480, 800), *TWO),
    "r101_2x_ms": ("resnet101", (), False, (480, 800), *TWO),
    "r101_dcn_2x_ms": ("resnet101", (3, 4, 5), False, (480, 800), *TWO),
    "x101_64x4d_2x_ms": ("resnext101_64x4d", (), False, (480, 800), *TWO),
    "x101_64x4d_dcn_2x_ms": ("resnext101_64x4d", (4, 5), False, (480, 800), *TWO),
}
SHARED_RECIPE = {  # of all of them
    "head": "t_head",
    "quality": "none",
    "conflict": "max_iou",
    "alpha": 1.0,
    "beta": 6.0,
    "topk": 13,
    "atss_topk": 9,
    "anchor_scale": 8.0,
    "batch_size": 16,
    "learning_rate": 0.01,
    "long_side": 1333,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "bias_lr_factor": 1.0,
    "bias_weight_decay": 1e-4,
    "warmup": "linear",
    "warmup_steps": 500,
    "warmup_factor": 0.001,
    "lr_decay": 0.1,
    "clip_grad_norm": 0.0,
    "frozen_stages": 2,
    "norm": "frozen",
    "empty_images": "skip",
    "dcn_groups": 1,
    "score_threshold": 0.05,
    "pre_nms_top": 1000,
    "nms_iou": 0.6,
    "max_detections": 100,
}
CELLS = {  # section 4.3, Tables 1 and 2: head, branch beside the boxes, epochs, epochs with ATSS
    "parallel_atss": ("parallel", "centerness", 12, 12),
    "parallel_atss_anchor_based": ("parallel", "centerness", 12, 12),
    "t_head_atss": ("t_head", "none", 12, 12),
    "t_head_atss_anchor_based": ("t_head", "none", 12, 12),
    "parallel_tal": ("parallel", "none", 12, 4),
    "parallel_tal_18e": ("parallel", "none", 18, 4),
    "parallel_tap_18e": ("parallel_tap", "none", 18, 4),
}
STEPS = 24  # of the reduced run; its first and its last are taken


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_of_the_authors(name: str) -> None:
    config = PRESETS[name]
    backbone, stages, anchor_based, sides, epochs, drops = RECIPES[name]
    assert (config.backbone, config.anchor_based) == (backbone, anchor_based)
    assert (config.dcn_stages, config.dcn_tower) == (stages, bool(stages))
    assert (config.short_side_min, config.short_side) == sides
    assert (config.steps, config.epochs) == (None, epochs)
    assert tuple(round(milestone * epochs) for milestone in config.milestones) == drops
    assert config.atss_share * epochs == 4
    assert {key: getattr(config, key) for key in SHARED_RECIPE} == SHARED_RECIPE


@pytest.mark.parametrize(("name", "epochs", "drops"), [("r50_1x", 12, (8, 11)), ("r101_2x_ms", 24, (16, 22))])
@pytest.mark.parametrize("epoch_steps", [7330, 7393])  # of 117,266 and 118,287 images
def test_schedule_by_hand(name: str, epochs: int, drops: tuple[int, int], epoch_steps: int) -> None:
    # From a thousandth, linear over 500 steps, then a tenth after each drop.
    config, steps = PRESETS[name], epochs * epoch_steps
    first, second = (epoch * epoch_steps for epoch in drops)
    places = [0, 250, 500, first - 1, first, second - 1, second]
    rates = [0.00001, 0.005005, 0.01, 0.01, 0.001, 0.001, 0.0001]
    assert [lr_at(step, steps, config) for step in places] == pytest.approx(rates, rel=1e-9)


@pytest.mark.parametrize("name", CELLS)
def test_cells_of_the_ablation(name: str) -> None:
    config, (head, quality, epochs, atss) = PRESETS[name], CELLS[name]
    assert (config.head, config.quality, config.epochs) == (head, quality, epochs)
    assert round(config.atss_share * epochs, 9) == atss
    assert config.anchor_based == name.endswith("anchor_based")
    assert (config.short_side_min, config.backbone) == (0, "resnet50")


def test_every_recipe_is_a_preset_and_the_paper_s_run_is_the_default() -> None:
    assert set(PRESETS) == {*RECIPES, *ABLATIONS, "small", "quick"}
    assert next(iter(PRESETS)) == "r50_1x"
    assert PRESETS["r50_1x"] == BASE
    assert set(CELLS) <= set(ABLATIONS)


@pytest.mark.parametrize("name", sorted(set(ABLATIONS) - set(CELLS)))
def test_an_ablation_changes_only_what_its_table_does(name: str) -> None:
    preset = PRESETS[name]
    changed = {field.name for field in fields(Config) if getattr(preset, field.name) != getattr(BASE, field.name)}
    tables = {"alpha": {"alpha", "beta"}, "topk": {"topk"}, "conflict": {"conflict"}}
    assert changed
    assert changed <= tables.get(name.split("_")[0], {"atss_share"})


def test_the_paper_s_grid_is_complete() -> None:
    # Table 4, and section 4.3 on m; the missing pair and m = 13 are the default.
    grid = {(PRESETS[name].alpha, PRESETS[name].beta) for name in ABLATIONS if name.startswith("alpha")}
    assert grid | {(1.0, 6.0)} == {(0.5, 2), (0.5, 4), (0.5, 6), (1, 6), (1, 8), (1.5, 8)}
    assert {preset.topk for preset in PRESETS.values()} == {5, 9, 13, 17, 21}


def test_presets_are_all_different() -> None:
    assert len(set(PRESETS.values())) == len(PRESETS)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    """A few drawn images."""
    folder = tmp_path_factory.mktemp("drawings")
    run("core.data", "shapes", str(folder), "--train", "4", "--val", "1", "--test", "1")
    return open_data(str(folder))


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_of_either_phase_and_an_evaluation(name: str, drawings: DataSource) -> None:
    preset = PRESETS[name]
    config = replace(
        preset,
        backbone="resnet18",  # what the presets name is built, and counted, in test_golden_r50.py
        backbone_weights="none",
        frozen_stages=0,
        channels=64,
        short_side=64 if preset.norm == "batch" else 32,
        short_side_min=16 if preset.short_side_min else 0,
        long_side=64,
        batch_size=1,
        lr=1e-4,
        warmup_steps=0,
        workers=0,
        device="cpu",
    )
    device = torch.device("cpu")
    model = TOOD(config, len(drawings.categories))
    if name in ABLATIONS:
        model.backbone.requires_grad_(False)  # they differ above it
    state = prepare(model, config, device)
    batch = next(train_batches(drawings.train, config, start=0, steps=1))
    weight = dict(model.named_parameters())["head.cls_logits.weight"]
    criterion, guard = partial(compute_losses, config=config), Guard(torch.full((), NEVER), {})
    phases = []
    for step in (1, STEPS):
        before = weight.detach().clone()
        state.step, state.sums = step, {}
        learn(state.model, criterion, batch, state, guard, config, STEPS)
        losses = {key for key in state.sums if key.startswith("loss_")}
        assert losses == {"loss_cls", "loss_box"} | ({"loss_centerness"} if preset.quality != "none" else set())
        assert all(math.isfinite(float(state.sums[key])) for key in losses)
        assert not torch.equal(weight, before)
        phases.append(config.assigns_by_atss(step, STEPS))
    assert phases == [preset.atss_share > 0, preset.atss_share == 1]
    metrics = on_validation(partial(detect, config=config), drawings.val, config, device)(model.eval())
    assert 0 <= metrics["AP"] <= 1
