"""Every named run: the paper's recipe, check 11, one step and an evaluation at reduced size; impossible settings."""

import math
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch

from core.config import with_warmup_steps
from core.data.loader import train_batches
from core.data.sources import DataSource, open_data
from core.inference import on_validation
from core.train import NEVER, Guard, learn, lr_at, prepare
from padet.config import ABLATIONS, PRESETS, Config
from padet.losses import compute_losses
from padet.model import PADet
from padet.postprocess import detect
from tests.runs import run

BASE = Config()
PAPER = {
    "batch_size": 32,
    "learning_rate": 2e-3,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "bias_weight_decay": 5e-4,
    "bias_lr_factor": 1.0,
    "clip_grad_norm": 0.0,
    "warmup": "linear",
    "positive_iou": 0.5,
    "negative_iou": 0.3,
    "theta": 0.01,
    "neg_pos_ratio": 0.0,
    "apm_neg_pos_ratio": 0.0,
    "score_threshold": 0.01,
    "nms": "linear",
    "nms_iou": 0.3,
    "nms_sigma": 0.5,
    "score_floor": 0.001,
    "max_detections": 300,
    "fam": "disentangled",
    "fam_detach": False,
    "prior": 0.02,
    "empty_images": "skip",
}
RECIPES = {  # backbone, norm, size, anchors, epochs, epochs of the drops, epochs of warm-up
    "vgg16_384": ("vgg16", "frozen", 384, "coco", 160, [100, 140], 5),
    "vgg16_512": ("vgg16", "frozen", 512, "coco", 160, [100, 140], 5),
    "r101_384": ("resnet101", "batch", 384, "coco", 160, [100, 140], 5),
    "r101_512": ("resnet101", "batch", 512, "coco", 160, [100, 140], 5),
    "vgg16_384_quarter": ("vgg16", "frozen", 384, "coco", 40, [25, 35], 1),
    "voc_vgg16_384": ("vgg16", "frozen", 384, "voc", 250, [150, 200], 5),
    "voc_vgg16_512": ("vgg16", "frozen", 512, "voc", 250, [150, 200], 5),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str) -> None:
    # Spec sections 4.3 and 4.5
    config = PRESETS[name]
    assert {key: getattr(config, key) for key in PAPER} == PAPER
    assert config.epochs is not None
    drops = [milestone * config.epochs for milestone in config.milestones]
    found = (config.backbone, config.norm, config.size, config.anchors, config.epochs, drops, config.warmup_epochs)
    assert found == (*RECIPES[name][:5], pytest.approx(RECIPES[name][5]), RECIPES[name][6])


def test_the_default_is_the_paper_s_smaller_model() -> None:
    assert next(iter(PRESETS)) == "vgg16_384"
    assert PRESETS["vgg16_384"] == BASE
    assert set(PRESETS) == {*RECIPES, *ABLATIONS, "small", "quick"}
    assert len(set(PRESETS.values())) == len(PRESETS)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 1e-6),
        (2500, 1.0005e-3),  # half-way in warm-up
        (5000, 2e-3),
        (99_999, 2e-3),
        (100_000, 2e-4),
        (139_999, 2e-4),
        (140_000, 2e-5),
        (159_999, 2e-5),
    ],
)
def test_learning_rate_by_hand(step: int, rate: float) -> None:
    # Check 11, with 1000 steps an epoch
    config = with_warmup_steps(BASE, 32_000)
    assert (config.warmup_steps, config.warmup_epochs) == (5000, 5.0)
    assert lr_at(step, 160_000, config) == pytest.approx(rate, rel=1e-9)


def test_warmup_takes_a_tenth_of_a_short_run_at_most() -> None:
    config = with_warmup_steps(replace(BASE, epochs=None, steps=100), 32_000)
    assert lr_at(9, 100, config) < 2e-3
    assert lr_at(10, 100, config) == pytest.approx(2e-3)


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_only_components(name: str) -> None:
    changed = {
        field.name for field in fields(Config) if getattr(PRESETS[name], field.name) != getattr(BASE, field.name)
    }
    assert changed
    assert changed <= {"apm_score", "apm_box", "fam"} | ({"neg_pos_ratio"} if name == "baseline_mined" else set())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 300}, "size must be 192, 384 or 512: levels of size / 8 cells are halved down to 3 x 3 or 2 x 2"),
        ({"prior": 0.01}, "prior"),
        ({"prior": 1.0}, "prior"),
        ({"theta": 0.03}, "prior"),
        ({"apm_box": False}, "fam disentangled"),
        ({"norm": "batch"}, "vgg16 has no batch norm"),
        ({"backbone": "resnet18", "pixels": "caffe"}, "pixels caffe"),
        ({"negative_iou": 0.6}, "negative_iou 0.6"),
        ({"nms_sigma": 0.0}, "nms_sigma"),
        ({"nms_iou": 1.5}, "nms_iou"),
        ({"max_detections": 0}, "max_detections"),
        ({"neg_pos_ratio": -1.0}, "neg_pos_ratio"),
        ({"warmup_epochs": -1.0}, "warmup_epochs"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        replace(BASE, **changes)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    """A few drawn images."""
    folder = tmp_path_factory.mktemp("drawings")
    run("core.data", "shapes", str(folder), "--train", "4", "--val", "2", "--test", "1")
    return open_data(str(folder))


@pytest.mark.parametrize("name", ["vgg16_384", "voc_vgg16_384", *ABLATIONS])
def test_one_step_and_an_evaluation(name: str, drawings: DataSource) -> None:
    preset = PRESETS[name]
    config = replace(
        preset,
        backbone="resnet18",
        norm="batch",
        backbone_weights="none",
        channels=32,
        size=192,
        batch_size=2,
        lr=1e-4,
        workers=0,
        device="cpu",
    )
    device = torch.device("cpu")
    torch.manual_seed(0)
    model = PADet(config, len(drawings.categories))
    state = prepare(model, config, device)
    batch = next(train_batches(drawings.train, config, start=0, steps=1))
    assert batch.images.shape == (2, 3, 192, 192)
    weight = dict(model.named_parameters())["heads.0.classes.weight"]
    before = weight.detach().clone()
    state.step = 1
    guard = Guard(torch.full((), NEVER), {})
    learn(state.model, partial(compute_losses, config=config), batch, state, guard, config, 1)
    losses = {key for key in state.sums if key.startswith("loss_")}
    apm = {"loss_apm_score"} if config.apm_score else set()
    assert losses == apm | ({"loss_apm_box"} if config.apm_box else set()) | {"loss_class", "loss_box"}
    assert all(math.isfinite(float(state.sums[key])) for key in losses)
    assert not torch.equal(weight, before)
    metrics = on_validation(partial(detect, config=config), drawings.val, config, device)(model.eval())
    assert 0 <= metrics["AP"] <= 1


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_built_as_it_is(name: str) -> None:
    config = PRESETS[name]
    with torch.device("meta"):
        pixels = torch.zeros(2, 3, config.size, config.size, dtype=torch.uint8)
        outputs = PADet(config, 80).eval()(pixels, torch.full((2, 2), config.size))
    assert outputs.logits.shape == (2, {192: 4_576, 384: 18_400, 512: 32_756}[config.size], 81)
