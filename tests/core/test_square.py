"""Images that become squares: what the commands do, and what such a configuration does not have."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core import commands
from core.configfile import describe_fields
from core.errors import UserError
from core.geometry import MODERN
from core.profiles import PROFILES
from core.types import Detections
from tests.core.square import SquareConfig

CONFIG = SquareConfig(steps=1, device="cpu")
PYRAMID_FIELDS = {"short_side", "long_side", "short_side_min", "geometry", "profile", "dcn_stages", "frozen_stages"}


def test_detections_go_back_by_each_axis_own_ratio() -> None:
    seen = []

    class Model(nn.Module):
        def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
            seen.append((tuple(images.shape), sizes.tolist()))
            return images

    def detect(outputs: Tensor, sizes: Tensor, original_sizes: Tensor) -> Detections:
        one = torch.ones(1, 1)
        return Detections(torch.tensor([[[16.0, 16, 32, 64]]]), one, one.long(), one.bool())

    image = np.zeros((128, 320, 3), np.uint8)
    boxes, _, _ = commands.detect_image(Model(), detect, image, CONFIG, torch.device("cpu"))
    assert seen == [((1, 3, 64, 64), [[64, 64]])]
    assert boxes.tolist() == [[80, 32, 160, 128]]  # x by 320 / 64, y by 128 / 64


def test_other_scales_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = commands.Trained(nn.Identity(), CONFIG, ())
    monkeypatch.setattr(commands, "load_trained", lambda *_: trained)
    arguments = argparse.Namespace(device="cpu", weights=Path("best.pt"), tta=True)

    def nothing(*_: object) -> Any:
        raise AssertionError

    with pytest.raises(UserError, match=r"--tta looks at several image sizes, best.pt takes squares of 64 px only"):
        commands.evaluate(arguments, "toy", SquareConfig, nothing, nothing)


def test_what_only_pyramids_have_is_absent() -> None:
    names = [field.name for field in describe_fields(SquareConfig)]
    assert not PYRAMID_FIELDS & set(names)
    assert (CONFIG.box_geometry, CONFIG.switches, CONFIG.conventions) == (MODERN, PROFILES["ours"], {})
    assert CONFIG.short_sides == (64, 64)
