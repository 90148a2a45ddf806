"""ATSS as the paper's baseline against both originals: outputs, assignment, losses, gradients, detections."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paa.config import Config
from paa.losses import assign
from paa.postprocess import detect
from tests.conftest import golden_arrays
from tests.paa.golden import (
    ATSS_MMDET,
    ATSS_OFFICIAL,
    LEVELS,
    Arrays,
    check_detections,
    check_losses,
    check_parameter_gradients,
    golden_outputs,
    golden_targets,
    mmdet_head,
    mmdet_names,
    official_arrays,
    official_head,
    official_names,
    stored_rows,
)

VARIANTS: dict[str, dict[str, Any]] = {"det": {}, "det_small": {"pre_nms_top": 100, "max_detections": 20}}


def check_assignment(arrays: Arrays, case: str, config: Config) -> None:
    assignment = assign(golden_outputs(arrays, case, config), golden_targets(arrays, case), config)
    for image in range(2):
        assert np.array_equal(assignment.gt_index[image].numpy() + 1, arrays[f"{case}/assign_gt_{image}"])


@pytest.mark.parametrize("case", "ABC")
def test_mmdet_losses(case: str) -> None:
    arrays = golden_arrays("head_atss.npz")
    check_losses(arrays, case, ATSS_MMDET, {"loss_cls": "cls", "loss_box": "bbox", "loss_centerness": "centerness"})


@pytest.mark.parametrize("case", "AB")
def test_mmdet_assignment(case: str) -> None:
    check_assignment(golden_arrays("head_atss.npz"), case, replace(ATSS_MMDET, profile="mmdet"))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", "AB")
def test_mmdet_detections(case: str, variant: str) -> None:
    arrays = golden_arrays("head_atss.npz")
    outputs = golden_outputs(arrays, case, ATSS_MMDET)
    sizes = torch.from_numpy(arrays[f"{case}/img_shape"])
    check_detections(detect(outputs, sizes, replace(ATSS_MMDET, **VARIANTS[variant])), arrays, f"{case}/{variant}")


@pytest.mark.parametrize("case", "ABCDEF")
def test_official_losses(shared: Path, case: str) -> None:
    arrays = official_arrays(shared, "atss.npz")
    check_losses(arrays, case, ATSS_OFFICIAL, {"loss_cls": "cls", "loss_box": "reg", "loss_centerness": "centerness"})


@pytest.mark.parametrize("case", "ABCDEF")
def test_official_assignment(shared: Path, case: str) -> None:
    check_assignment(official_arrays(shared, "atss.npz"), case, ATSS_OFFICIAL)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", "ABCDEF")
def test_official_detections(shared: Path, case: str, variant: str) -> None:
    arrays = official_arrays(shared, "atss.npz")
    outputs = golden_outputs(arrays, case, ATSS_OFFICIAL)
    sizes = torch.from_numpy(arrays["img_shape"])
    check_detections(detect(outputs, sizes, replace(ATSS_OFFICIAL, **VARIANTS[variant])), arrays, f"{case}/{variant}")


def check_outputs(arrays: Arrays, head: Any) -> None:
    with torch.no_grad():
        outputs = head([torch.from_numpy(arrays[f"A/feat_{level}"]) for level in range(len(LEVELS))])
    for rows, name in (
        (outputs.logits, "cls_score"),
        (outputs.deltas, "bbox_pred"),
        (outputs.quality[..., None], "centerness"),
    ):
        torch.testing.assert_close(rows, stored_rows(arrays, f"A/{name}"), rtol=1e-4, atol=1e-4)


def test_mmdet_head() -> None:
    arrays = golden_arrays("head_atss.npz")
    check_outputs(arrays, mmdet_head(arrays))
    check_parameter_gradients(arrays, ATSS_MMDET, mmdet_head(arrays), mmdet_names(arrays))


def test_official_head(shared: Path) -> None:
    arrays = official_arrays(shared, "atss.npz")
    check_outputs(arrays, official_head(arrays))
    check_parameter_gradients(arrays, ATSS_OFFICIAL, official_head(arrays), official_names(arrays))
