"""T-Head, both assignments, losses, gradients and detections against the published implementations."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.anchors import anchor_grid, anchors_inside, level_shapes
from core.types import Targets
from tests.conftest import golden_arrays
from tests.tood_tal.golden import (
    Arrays,
    check_detections,
    check_gradient,
    check_losses,
    golden_config,
    golden_head,
    golden_targets,
    head_name,
    losses_of,
    run_golden_head,
    stored_outputs,
    stored_rows,
)
from tood_tal.assigner import assign_aligned
from tood_tal.config import Config
from tood_tal.losses import learn, pixel_boxes
from tood_tal.postprocess import detect

FILES = {"head_tood.npz": ("mmdet", False), "head_tood_ab.npz": ("mmdet", True)}
OFFICIAL = {"tood.npz": ("official", False), "tood_ab.npz": ("official", True)}
VARIANTS: dict[str, dict[str, Any]] = {"det": {}, "det_small": {"pre_nms_top": 100, "max_detections": 20}}
PHASES = {"init_": True, "": False}  # of the arrays' names, and whether ATSS assigns


def load(name: str, shared: Path | None = None) -> tuple[Arrays, Config]:
    if name in FILES:
        return golden_arrays(name), golden_config(*FILES[name])
    assert shared is not None
    with np.load(shared / "golden_official" / name) as archive:
        return {key: archive[key] for key in archive.files}, golden_config(*OFFICIAL[name])


def check_head(arrays: Arrays, config: Config) -> None:
    head = golden_head(arrays, config)
    outputs = run_golden_head(arrays, "A", head)
    torch.testing.assert_close(outputs.scores, stored_rows(arrays, "A/cls_score"), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.boxes, stored_rows(arrays, "A/bbox_pred"), rtol=1e-4, atol=1e-4)
    losses = losses_of(outputs, arrays, "A", False, config)
    sum(losses.values(), torch.zeros(())).backward()
    weights = dict(head.named_parameters())
    assert len(weights) == len(arrays["A/param_grad_names"])
    for theirs, norm in zip(arrays["A/param_grad_names"], arrays["A/param_grad_l2"], strict=True):
        gradient = weights[head_name(str(theirs))].grad
        assert gradient is not None
        assert float(gradient.norm()) == pytest.approx(float(norm), rel=1e-3, abs=1e-6), theirs


def check_case(arrays: Arrays, case: str, phase: str, config: Config) -> None:
    outputs, by_atss = stored_outputs(arrays, case), PHASES[phase]
    losses = losses_of(outputs, arrays, case, by_atss, config)
    check_losses(losses, arrays, f"{case}/{phase}")
    sum(losses.values(), torch.zeros(())).backward()
    if f"{case}/{phase}grad_l2_cls_score" in arrays:
        check_gradient(outputs.scores.grad, arrays, f"{case}/{phase}", "cls_score")
        check_gradient(outputs.boxes.grad, arrays, f"{case}/{phase}", "bbox_pred")
    learned = learn(outputs, golden_targets(arrays, case), by_atss, config)
    for image in range(2):
        index = learned.assignment.gt_index[image].clamp(min=-1)  # ignored padding is background there
        if f"{case}/{phase}assign_gt_{image}" in arrays:
            assert np.array_equal(index.numpy() + 1, arrays[f"{case}/{phase}assign_gt_{image}"])


@pytest.mark.parametrize("name", FILES)
def test_mmdet_head(name: str) -> None:
    check_head(*load(name))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("case", "AB")
@pytest.mark.parametrize("name", FILES)
def test_mmdet_losses(name: str, case: str, phase: str) -> None:
    arrays, config = load(name)
    check_case(arrays, case, phase, config)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", FILES)
def test_mmdet_case_without_objects(name: str, phase: str) -> None:
    arrays, config = load(name)
    with torch.no_grad():
        outputs = run_golden_head(arrays, "C", golden_head(arrays, config))
    check_losses(losses_of(outputs, arrays, "C", PHASES[phase], config), arrays, f"C/{phase}")


@pytest.mark.parametrize("case", "AB")
@pytest.mark.parametrize("name", FILES)
def test_mmdet_metrics(name: str, case: str) -> None:
    arrays, _ = load(name)
    outputs, targets = stored_outputs(arrays, case), golden_targets(arrays, case)
    found = assign_aligned(outputs.scores, pixel_boxes(outputs), outputs.grid.points, targets)
    for image in range(2):
        ious = arrays[f"{case}/assign_iou_{image}"]
        ious = np.where(ious < 0, 0, ious)  # -1e8 where nothing is assigned
        np.testing.assert_allclose(found.ious[image] * found.assignment.positive[image], ious, rtol=1e-4, atol=1e-6)
        metric, target = (arrays[f"{case}/{key}_metric_{image}"] for key in ("assign", "norm"))
        np.testing.assert_allclose(found.metric[image], metric, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(found.targets[image], target, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", "AB")
@pytest.mark.parametrize("name", FILES)
def test_mmdet_detections(name: str, case: str, variant: str) -> None:
    arrays, config = load(name)
    outputs, sizes = stored_outputs(arrays, case), torch.from_numpy(arrays[f"{case}/img_shape"])
    check_detections(detect(outputs, sizes, replace(config, **VARIANTS[variant])), arrays, f"{case}/{variant}")


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_head(shared: Path, name: str) -> None:
    check_head(*load(name, shared))


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_cases(shared: Path, name: str) -> None:
    arrays, config = load(name, shared)
    cases = sorted({key[0] for key in arrays if key[1:2] == "/" and key.endswith("loss_total")})
    assert cases
    for case in cases:
        for phase in PHASES:
            if f"{case}/{phase}loss_total" not in arrays:
                continue
            if f"{case}/cls_score_0" in arrays:
                check_case(arrays, case, phase, config)
            targets = golden_targets(arrays, case)
            outputs = stored_outputs(arrays, case) if f"{case}/cls_score_0" in arrays else None
            inside = anchors_inside(anchor_grid(level_shapes((128, 160))), targets.sizes)
            for image in range(2):
                if f"{case}/init_label_weight_{image}" in arrays:
                    assert np.array_equal(inside[image].numpy(), arrays[f"{case}/init_label_weight_{image}"] > 0)
            if outputs is not None and f"{case}/det_bboxes_0" in arrays:
                for variant, changes in VARIANTS.items():
                    found = detect(outputs, targets.sizes, replace(config, **changes))
                    check_detections(found, arrays, f"{case}/{variant}")


def test_twenty_assignments(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(shared / "golden"))
    sys.modules.pop("regen", None)
    import regen  # type: ignore[import-not-found]

    arrays = golden_arrays("assigner_tal.npz")
    grid = anchor_grid(level_shapes((800, 1344)))
    for number in range(int(arrays["num_cases"])):
        case = f"{number:02d}"
        inputs = regen.tal_inputs(int(arrays[f"{case}/seed"]))
        np.testing.assert_allclose(regen.check(*inputs), arrays[f"{case}/check"])
        scores, boxes = (torch.from_numpy(part).float()[None] for part in inputs)
        labels = torch.from_numpy(arrays[f"{case}/gt_labels"].astype(np.int64))[None]
        objects = torch.from_numpy(arrays[f"{case}/gt_bboxes"]).reshape(1, -1, 4)
        targets = Targets(objects, labels, torch.ones_like(labels, dtype=torch.bool), torch.tensor([[800, 1333]]))
        found = assign_aligned(scores, boxes, grid.points, targets)
        positive = arrays[f"{case}/pos_anchor"]
        assert np.array_equal(found.assignment.positive[0].nonzero()[:, 0], positive)
        assert np.array_equal(found.assignment.gt_index[0, positive], arrays[f"{case}/pos_gt"])
        np.testing.assert_allclose(found.ious[0, positive], arrays[f"{case}/pos_iou"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.metric[0, positive], arrays[f"{case}/pos_metric"], rtol=1e-4, atol=1e-9)
