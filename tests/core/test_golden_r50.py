"""Whole ResNet-50 detectors against MMDetection 3.3.0: names, parameter counts and activations (golden/r50_*.json)."""

import json
import runpy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from core.config import TrainConfig
from core.layouts import from_mmdet
from tests.conftest import GOLDEN
from tests.core.detector import Detector, count, meta_detector

QUALITY = {"paa": "iou_pred", "atss": "centerness"}
RULE = runpy.run_path(str(GOLDEN / "weight_rule.py"))


@pytest.fixture(scope="module", params=["paa", "atss"])
def golden(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The stored numbers of one model."""
    content = json.loads((GOLDEN / f"r50_{request.param}.json").read_text())
    return content | {"quality": QUALITY[request.param]}


@pytest.mark.parametrize("profile", ["ours", "mmdet"])
def test_parameter_counts(golden: dict[str, Any], profile: Any) -> None:
    model = meta_detector(TrainConfig(steps=1, profile=profile))
    assert count(model) == golden["num_parameters"]
    assert count(model, trainable=True) == golden["num_trainable"]
    for name, part in {"backbone": model.backbone, "neck": model.fpn, "head": model.head}.items():
        assert count(part) == golden[f"num_parameters_{name}"]


def activations(model: Any, pixels: Tensor) -> Iterator[tuple[str, Tensor]]:
    """All maps under MMDetection's names."""
    features = model.backbone(pixels)
    pyramid = model.fpn(features)
    yield from zip(("C3", "C4", "C5"), features, strict=True)
    yield from zip(("P3", "P4", "P5", "P6", "P7"), pyramid, strict=True)
    outputs = model.head(pyramid)
    sizes = [height * width for height, width in outputs.shapes]
    assert outputs.quality is not None
    arrays = {"cls_score": outputs.logits, "bbox_pred": outputs.deltas, "quality": outputs.quality[..., None]}
    for name, array in arrays.items():
        for level, (rows, shape) in enumerate(zip(array.split(sizes, dim=1), outputs.shapes, strict=True)):
            yield f"{name}_{level}", rows.unflatten(1, shape).permute(0, 3, 1, 2)


@torch.no_grad()
def test_names_and_activations(golden: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = Detector(TrainConfig(steps=1, profile="mmdet"))
    state = {}
    for key, shape, _ in golden["state_dict"]:
        name = from_mmdet(key)
        if name is not None:
            state[name] = torch.as_tensor(RULE["value_for"](key, shape, golden["seed"]), dtype=torch.float32)
    model.load_state_dict(state, assign=True)  # strict: every name of theirs and ours is used
    model.train()  # batch norm must not notice
    check_activations(golden, model)


def check_activations(golden: dict[str, Any], model: Any) -> None:
    """Compare every stored summary with a model's maps of the stored input."""
    stored = golden["activations"]
    seen = {"C2"}  # the one map that is no output of the backbone
    for name, maps in activations(model, torch.from_numpy(RULE["image"](golden["seed"]))):
        name = name.replace("quality", golden["quality"])
        expected, flat = stored[name], maps.flatten().double()
        seen.add(name)
        assert list(maps.shape) == expected["shape"]
        places = np.linspace(0, len(flat) - 1, 16).astype(int)
        measured = [flat.mean(), flat.std(), flat.abs().max(), *flat[:8], *flat[places]]
        wanted = [expected["mean"], expected["std"], expected["absmax"], *expected["first8"]]
        wanted += expected["at_16_even_positions"]
        np.testing.assert_allclose(measured, wanted, rtol=0, atol=1e-3 * expected["std"], err_msg=name)
    assert seen == set(stored)
