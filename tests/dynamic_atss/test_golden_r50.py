"""Whole detectors of every host: parameter counts, and converted files against MMDetection 3.3.0 (r50_*.json)."""

import json
from argparse import Namespace
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core import distributed
from core.anchors import level_shapes
from core.commands import load_trained
from core.convert import read_layout, rename_all
from core.data.coco import COCO_CATEGORIES
from core.errors import UserError
from core.heads import ParallelHead
from dynamic_atss import convert, model
from dynamic_atss.config import PRESETS, Config
from dynamic_atss.convert import HEAD_NAMES, configure
from dynamic_atss.model import DynamicATSS, Outputs
from dynamic_atss.postprocess import detect
from tests.checkpoints import official_shapes, official_state, run
from tests.conftest import GOLDEN
from tests.core.test_golden_r50 import RULE, check_detections, check_maps, head_maps, pyramid_maps

SIZE = (256, 320)
PYRAMID = 3_868_672
FROZEN = 225_344  # stem and layer1 with their batch norm
HOSTS = ("atss", "gfl", "vfnet")


def meta_model(config: Config, num_classes: int = 80) -> DynamicATSS:
    """A model without memory: enough to count."""
    with torch.device("meta"):
        return DynamicATSS(config, num_classes)


def count(module: torch.nn.Module, trainable: bool = False) -> int:
    """Parameters, batch norm's weight and bias among them where they are buffers."""
    if trainable:
        return sum(p.numel() for p in module.parameters() if p.requires_grad)
    return sum(tensor.numel() for name, tensor in module.state_dict().items() if "running" not in name)


# parameter counts of spec section 7


@pytest.mark.parametrize(
    ("preset", "changes", "body", "head", "total"),
    [
        ("atss_r50_1x", {}, 23_508_032, 4_918_618, 32_295_322),
        ("atss_r50_1x", {"profile": "mmdet"}, 23_508_032, 4_918_618, 32_295_322),
        ("gflv2_r50_1x", {"host": "gfl"}, 23_508_032, 5_063_833, 32_440_537),
        ("gflv2_r50_1x", {}, 23_508_032, 5_065_242, 32_441_946),
        ("gflv2_combined_r50_1x", {"profile": "official"}, 23_508_032, 5_065_242, 32_441_946),
        ("vfnet_r50_1x", {}, 23_508_032, 5_514_850, 32_891_554),
        ("vfnet_combined_r50_1x", {"profile": "official"}, 23_508_032, 5_514_850, 32_891_554),
    ],
)
def test_counts_of_the_hosts(preset: str, changes: dict[str, Any], body: int, head: int, total: int) -> None:
    detector = meta_model(replace(PRESETS[preset], **changes))
    parts = (count(detector.backbone), count(detector.fpn), count(detector.head))
    assert parts == (body, PYRAMID, head)
    assert count(detector) == total
    assert count(detector, trainable=True) == total - FROZEN


@pytest.mark.parametrize("branch", ["", "atss_"])
@pytest.mark.parametrize(
    ("preset", "body", "total"),
    [
        ("r50_1x", 23_508_032, 32_297_370),
        ("r50_dcn_1x", 24_379_295, 33_293_103),
        ("r101_2x_ms", 42_500_160, 51_289_498),
        ("r101_dcn_2x_ms", 44_429_418, 53_343_226),
        ("x101_64x4d_2x_ms", 81_406_272, 90_195_610),
        ("x101_64x4d_dcn_2x_ms", 88_623_102, 97_536_910),
        ("x101_32x8d_dcn_2x_ms", 93_959_166, 102_872_974),
    ],
)
def test_counts_of_the_authors_networks(branch: str, preset: str, body: int, total: int) -> None:
    config = replace(PRESETS[f"{branch}{preset}"], profile="official", geometry="legacy")
    detector = meta_model(config)
    assert (count(detector.backbone), count(detector)) == (body, total)
    assert count(detector.head) == 4_920_666 + (124_470 if config.dcn_tower else 0)
    if preset == "r50_1x":
        assert count(detector, trainable=True) == 32_021_850


def test_counts_beside_the_presets() -> None:
    assert count(meta_model(replace(PRESETS["gflv2_r50_1x"], profile="official"), 81)) == 32_444_251
    plain = replace(PRESETS["x101_32x8d_dcn_2x_ms"], dcn_stages=(), dcn_tower=False)
    assert count(meta_model(plain).backbone) == 86_742_336
    for preset in ("atss_r50_1x", "gflv2_r50_1x", "vfnet_r50_1x"):  # 27 offsets and masks of both towers' last layers
        heads = [count(meta_model(replace(PRESETS[preset], dcn_tower=dcn)).head) for dcn in (False, True)]
        assert heads[1] - heads[0] == 124_470


@pytest.mark.parametrize("detector", ["atss", "dynamic_atss"])
def test_the_authors_329_names(detector: str) -> None:
    shapes = official_shapes("resnet50", branch="centerness")
    assert len(shapes) == 329
    anchors = official_state({name: shape for name, shape in shapes.items() if "cell_anchors" in name})
    state = {name: anchors.get(name, torch.empty(shape, device="meta")) for name, shape in shapes.items()}
    weights = rename_all(Path("x.pth"), state, "official", HEAD_NAMES)
    assert (weights.unknown, weights.missing, len(weights.dropped)) == ((), (), 5)
    layout = read_layout(Path("x.pth"), "official", state, weights, {}, HEAD_NAMES)
    config = configure(layout, detector)
    preset = {"atss": "atss_r50_1x", "dynamic_atss": "r50_1x"}[detector]
    assert config == replace(PRESETS[preset], preset=preset, profile="official", geometry="legacy")
    assert set(weights.state) == set(meta_model(config).state_dict())


# the golden files


def stored_state(golden: dict[str, Any]) -> dict[str, Tensor]:
    """The stored names with the weights of the rule."""
    return {
        key: torch.as_tensor(RULE["value_for"](key, shape, golden["seed"]), dtype=getattr(torch, kind))
        for key, shape, kind in golden["state_dict"]
    }


def named(outputs: Outputs) -> dict[str, Tensor]:
    """The head's outputs by MMDetection's names; of VFNet's boxes only the refined are stored."""
    if outputs.refined is not None:
        return {"cls_score": outputs.logits, "bbox_pred_refine": outputs.refined}
    arrays = {"cls_score": outputs.logits, "bbox_pred": outputs.regression}
    return arrays | ({} if outputs.quality is None else {"centerness": outputs.quality[..., None]})


@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_mmdet_resnet50_reproduces_every_stored_number(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = json.loads((GOLDEN / f"r50_{host}.json").read_text())
    state = stored_state(golden)
    source, out = tmp_path / "mmdet.pth", tmp_path / "out.safetensors"
    content = {"meta": {"config": f"bbox_head=dict(type='{host.upper()}Head')"}, "state_dict": state}
    if host == "gfl":  # the file gave the rule's values to this constant too, and drew boxes by them
        bins = state["bbox_head.integral.project"]
        told = r"integral\.project is .*, this detector's is 0, 1, 2, 3, \.\.\. \(17 values\)"
        with pytest.raises(UserError, match=told):
            rename_all(source, state, "mmdet", HEAD_NAMES)
        state["bbox_head.integral.project"] = torch.linspace(0, 16, 17)
        monkeypatch.setattr(model, "expected_distances", lambda x: x.unflatten(-1, (4, 17)).softmax(-1) @ bins)
    torch.save(content, source, _use_new_zipfile_serialization=host != "vfnet")
    run(convert, monkeypatch, source, out)
    arguments = Namespace(weights=out, device="cpu", deterministic=False)
    device = distributed.pick_device("cpu")
    trained: Any = load_trained(arguments, "dynamic_atss", Config, DynamicATSS, device)
    detector, config, categories = trained
    found = (config.host, config.profile, config.geometry, categories)
    assert found == (host, "mmdet", "modern", COCO_CATEGORIES)
    assert config.preset == {"atss": "atss_r50_1x", "gfl": "", "vfnet": "vfnet_r50_1x"}[host]
    assert isinstance(detector.head, ParallelHead) == (host == "atss")
    for name, part in {"backbone": detector.backbone, "neck": detector.fpn, "head": detector.head}.items():
        assert count(part) == golden[f"num_parameters_{name}"]
    assert count(detector) == golden["num_parameters"]
    assert count(detector, trainable=True) == golden["num_trainable"]
    pixels = torch.from_numpy(RULE["image"](golden["seed"]))
    maps = dict(pyramid_maps(detector, pixels))
    outputs = detector.detect([maps[f"P{level}"] for level in range(3, 8)])
    check_maps(golden["activations"], chain(maps.items(), head_maps(named(outputs), level_shapes(SIZE))))
    atol = 5e-4 if host == "gfl" else 0.02  # the rule's bins make GFL's boxes 0.1 pixels wide
    check_detections(detect(outputs, torch.tensor([SIZE]), config), golden["detections"], atol)
