"""The recipes of every host: learning rates and biases at the steps of spec check 19."""

import pytest
import torch
from torch import nn

from core.train import build_optimizer, lr_at
from dynamic_atss.config import PRESETS, Config


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.01 / 3), (499, 0.01 / 3), (500, 0.01), (59_999, 0.01), (60_000, 0.001), (79_999, 0.001), (80_000, 0.0001)],
)
def test_one_time_schedule_by_hand(step: int, rate: float) -> None:
    # Check 19; constant warm-up of 500 steps at a third, drops at 60,000 and 80,000 of 90,000
    config = PRESETS["r50_1x"]
    assert config.steps == 90_000
    assert lr_at(step, 90_000, config) == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize(
    ("step", "rate"), [(119_999, 0.01), (120_000, 0.001), (159_999, 0.001), (160_000, 0.0001), (179_999, 0.0001)]
)
def test_two_times_schedule_by_hand(step: int, rate: float) -> None:
    config = PRESETS["r101_2x_ms"]
    assert (config.steps, config.short_side_min, config.short_side, config.long_side) == (180_000, 640, 800, 1333)
    assert lr_at(step, 180_000, config) == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize(("preset", "first"), [("gflv2_r50_1x", 0.001), ("vfnet_r50_1x", 0.1)])
def test_schedules_of_the_hosts_by_hand(preset: str, first: float) -> None:
    # 12 epochs, drops after 8 and 11; linear warm-up from `first` over 500 steps (spec section 4)
    config = PRESETS[preset]
    assert config.epochs == 12
    rates = [lr_at(step, 12_000, config) for step in (0, 250, 500, 7_999, 8_000, 10_999, 11_000)]
    half_way = 0.01 * (first + 0.5 * (1 - first))
    assert rates == pytest.approx([0.01 * first, half_way, 0.01, 0.01, 0.001, 0.001, 0.0001], rel=1e-9)


@pytest.mark.parametrize(
    ("preset", "factor", "decay"), [("r50_1x", 2, 0), ("gflv2_r50_1x", 1, 1e-4), ("vfnet_r50_1x", 2, 0)]
)
def test_biases(preset: str, factor: float, decay: float) -> None:
    # The authors of ATSS and VFNet learn biases twice as fast and do not decay them, GFLV2's treat them as weights.
    layers = nn.Sequential(nn.Conv2d(1, 32, 1), nn.GroupNorm(32, 32))
    weights, biases = build_optimizer(layers, PRESETS[preset]).param_groups
    assert all(parameter.shape == torch.Size([32]) for parameter in biases["params"])
    assert (len(weights["params"]), len(biases["params"])) == (2, 2)  # the norm's weight is decayed, its bias is not
    assert (weights["lr_factor"], weights["weight_decay"], weights["momentum"]) == (1, 1e-4, 0.9)
    assert (biases["lr_factor"], biases["weight_decay"]) == (factor, decay)


def test_rates_scale_with_the_batch() -> None:
    assert Config(batch_size=8).learning_rate == pytest.approx(0.005)
