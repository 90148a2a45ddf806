"""Whole ResNet-50 detectors against MMDetection 3.3.0: names, parameter counts and activations (golden/r50_*.json)."""

import json
import runpy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from core.config import PyramidConfig
from core.layouts import from_mmdet
from core.types import Detections
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
    model = meta_detector(PyramidConfig(steps=1, profile=profile))
    assert count(model) == golden["num_parameters"]
    assert count(model, trainable=True) == golden["num_trainable"]
    for name, part in {"backbone": model.backbone, "neck": model.fpn, "head": model.head}.items():
        assert count(part) == golden[f"num_parameters_{name}"]


def activations(model: Any, pixels: Tensor) -> Iterator[tuple[str, Tensor]]:
    """All maps under MMDetection's names."""
    maps = dict(pyramid_maps(model, pixels))
    yield from maps.items()
    outputs = model.head([maps[f"P{level}"] for level in range(3, 8)])
    assert outputs.quality is not None
    arrays = {"cls_score": outputs.logits, "bbox_pred": outputs.deltas, "quality": outputs.quality[..., None]}
    yield from head_maps(arrays, outputs.shapes)


def pyramid_maps(model: Any, pixels: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The maps of backbone and pyramid under MMDetection's names."""
    features = model.backbone(pixels)
    yield from zip(("C3", "C4", "C5"), features, strict=True)
    yield from zip(("P3", "P4", "P5", "P6", "P7"), model.fpn(features), strict=True)


def head_maps(arrays: Mapping[str, Tensor], shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[str, Tensor]]:
    """Rows of all anchors, by MMDetection's name, as the maps of each level."""
    sizes = [height * width for height, width in shapes]
    for name, array in arrays.items():
        for level, (rows, shape) in enumerate(zip(array.split(sizes, dim=1), shapes, strict=True)):
            yield f"{name}_{level}", rows.unflatten(1, shape).permute(0, 3, 1, 2)


@torch.no_grad()
def test_names_and_activations(golden: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = Detector(PyramidConfig(steps=1, profile="mmdet"))
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
    maps = activations(model, torch.from_numpy(RULE["image"](golden["seed"])))
    check_maps(golden["activations"], ((name.replace("quality", golden["quality"]), map_) for name, map_ in maps))


def check_maps(stored: Mapping[str, Any], found: Iterable[tuple[str, Tensor]]) -> None:
    """Compare every stored summary with the map of its name."""
    seen = {"C2"}  # the one map that is no output of the backbone
    for name, maps in found:
        expected, flat = stored[name], maps.flatten().double()
        seen.add(name)
        assert list(maps.shape) == expected["shape"]
        places = np.linspace(0, len(flat) - 1, 16).astype(int)
        measured = [flat.mean(), flat.std(), flat.abs().max(), *flat[:8], *flat[places]]
        wanted = [expected["mean"], expected["std"], expected["absmax"], *expected["first8"]]
        wanted += expected["at_16_even_positions"]
        np.testing.assert_allclose(measured, wanted, rtol=0, atol=1e-3 * expected["std"], err_msg=name)
    assert seen == set(stored)


def check_detections(found: Detections, stored: Mapping[str, Any], atol: float = 0.02) -> None:
    """Compare an image's detections with stored ones: rounded, and in another order where several score the same."""
    valid = found.valid[0]
    arrays = (found.boxes[0][valid], found.scores[0][valid], found.labels[0][valid])
    left = list(zip(stored["boxes"], stored["scores"], stored["labels"], strict=True))
    for box, score, label in zip(*(array.tolist() for array in arrays), strict=True):
        near = [
            index
            for index, (b, s, c) in enumerate(left)
            if c == label and abs(s - score) < 2e-4 and np.allclose(b, box, rtol=0, atol=atol)
        ]
        assert near, (box, score, label)
        del left[near[0]]
    assert left == []
