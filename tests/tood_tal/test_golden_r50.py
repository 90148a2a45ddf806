"""Whole detectors: parameter counts of every network, and converted files against MMDetection 3.3.0 (r50_*.json)."""

import json
from argparse import Namespace
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from core import distributed
from core.anchors import level_shapes
from core.commands import load_trained
from core.data.coco import COCO_CATEGORIES
from tests.checkpoints import run
from tests.conftest import GOLDEN
from tests.core.detector import count
from tests.core.test_golden_r50 import RULE, check_detections, check_maps, head_maps, pyramid_maps
from tood_tal import convert
from tood_tal.config import PRESETS, Config
from tood_tal.convert import PUBLISHED
from tood_tal.model import TOOD, build_head
from tood_tal.postprocess import detect

SIZE = (256, 320)
PYRAMID = 3_868_672
FROZEN = 225_344  # stem and layer1 of ResNet-50 and -101 with their batch norm
HEAD, DCN_HEAD = 4_823_790, 4_823_790 + 497_880
FILES = {"r50_tood.json": ("free", "r50_1x"), "r50_tood_ab.json": ("based", "r50_anchor_based_1x")}


def meta_model(config: Config) -> TOOD:
    """A model without memory: enough to count."""
    with torch.device("meta"):
        return TOOD(config, 80)


# parameter counts of spec section 1.7


@pytest.mark.parametrize(
    ("preset", "backbone", "head", "total"),
    [
        ("r50_1x", 23_508_032, HEAD, 32_200_494),
        ("r50_anchor_based_1x", 23_508_032, HEAD, 32_200_494),
        ("r50_2x_ms", 23_508_032, HEAD, 32_200_494),
        ("r101_2x_ms", 42_500_160, HEAD, 51_192_622),
        ("r101_dcn_2x_ms", 42_500_160 + 1_929_258, DCN_HEAD, 53_619_760),
        ("x101_64x4d_2x_ms", 81_406_272, HEAD, 90_098_734),
        ("x101_64x4d_dcn_2x_ms", 81_406_272 + 7_216_830, DCN_HEAD, 97_813_444),
    ],
)
def test_counts_of_the_published_networks(preset: str, backbone: int, head: int, total: int) -> None:
    detector = meta_model(PRESETS[preset])
    assert (count(detector.backbone), count(detector.fpn), count(detector.head)) == (backbone, PYRAMID, head)
    assert count(detector) == total
    if not preset.startswith("x101"):
        assert count(detector, trainable=True) == total - FROZEN  # 31,975,150 of ResNet-50, the paper's 31.98 million


def test_every_published_network_is_counted() -> None:
    (marker,) = (mark for mark in test_counts_of_the_published_networks.pytestmark)  # type: ignore[attr-defined]
    assert {values[0] for values in marker.args[1]} == set(PUBLISHED)


@pytest.mark.parametrize(
    ("preset", "head", "trainable"),
    [
        ("parallel_atss", 4_918_618, 32_069_978),  # the paper's 32.07 million
        ("parallel_tal", 4_916_313, 32_067_673),
        ("t_head_atss", HEAD, 31_975_150),
    ],
)
def test_counts_of_the_four_cells(preset: str, head: int, trainable: int) -> None:
    detector = meta_model(PRESETS[preset])
    assert count(detector.head) == head
    assert count(detector, trainable=True) == trainable


def test_number_of_tensors() -> None:
    with torch.device("meta"):
        assert len(build_head(Config(), 80).state_dict()) == 49
    assert len(meta_model(Config()).state_dict()) == 383 - 53  # MMDetection's batch norm counts its steps too


def test_multiply_adds_of_the_head() -> None:
    # Spec section 1.7: 4,720,704 for each of the 21,330 cells of an 800 x 1280 image; attention once a level and task.
    shapes = level_shapes((800, 1280))
    with torch.device("meta"):
        head, pyramid = build_head(Config(), 80), [torch.zeros(1, 256, *shape) for shape in shapes]
    with FlopCounterMode(display=False) as counter:
        head(pyramid)
    attention = 5 * 2 * (1536 * 32 + 32 * 6)
    assert counter.get_total_flops() == 2 * (4_720_704 * 21_330 + attention)


# the golden files


def stored_state(golden: dict[str, Any]) -> dict[str, Tensor]:
    """The stored names with the weights of the rule."""
    return {
        key: torch.as_tensor(RULE["value_for"](key, shape, golden["seed"]), dtype=getattr(torch, kind))
        for key, shape, kind in golden["state_dict"]
    }


def first_stage(detector: TOOD, pixels: Tensor) -> Iterator[tuple[str, Tensor]]:
    """C2, which the backbone keeps to itself."""
    body = detector.backbone
    yield "C2", body.layer1(body.maxpool(body.relu(body.bn1(body.conv1(pixels)))))


@pytest.mark.parametrize("file", FILES)
@torch.no_grad()
def test_mmdet_resnet50_reproduces_every_stored_number(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anchors, preset = FILES[file]
    golden = json.loads((GOLDEN / file).read_text())
    source, out = tmp_path / "mmdet.pth", tmp_path / "out.safetensors"
    config_text = f"bbox_head=dict(type='TOODHead', anchor_type='anchor_{anchors}')"
    torch.save({"meta": {"config": config_text}, "state_dict": stored_state(golden)}, source)
    run(convert, monkeypatch, source, out)
    arguments = Namespace(weights=out, device="cpu", deterministic=False)
    trained: Any = load_trained(arguments, "tood_tal", Config, TOOD, distributed.pick_device("cpu"))
    detector, config, categories = trained
    assert (config.profile, config.preset, config.anchor_based) == ("mmdet", preset, anchors == "based")
    assert categories == COCO_CATEGORIES
    for name, part in {"backbone": detector.backbone, "neck": detector.fpn, "head": detector.head}.items():
        assert count(part) == golden[f"num_parameters_{name}"]
    assert count(detector) == golden["num_parameters"]
    assert count(detector, trainable=True) == golden["num_trainable"]
    pixels = torch.from_numpy(RULE["image"](golden["seed"]))
    maps = dict(pyramid_maps(detector, pixels))
    outputs = detector.detect([maps[f"P{level}"] for level in range(3, 8)])
    named = head_maps({"cls_score": outputs.scores, "bbox_pred": outputs.boxes}, level_shapes(SIZE))
    check_maps(golden["activations"], chain(first_stage(detector, pixels), maps.items(), named))
    check_detections(detect(outputs, torch.tensor([SIZE]), config), golden["detections"])
