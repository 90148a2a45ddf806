"""Post-processing of PAA: golden detections of both originals, worked numbers, a slow twin, edge cases."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from core.anchors import AnchorGrid, anchor_grid, level_shapes
from core.boxes import box_iou, clip_boxes, decode_deltas
from core.geometry import GEOMETRIES, LEGACY, MODERN, Geometry
from core.nms import Candidates, nms_indices
from core.types import Detections
from paa.config import Config
from paa.model import Outputs
from paa.postprocess import detect, unified_score, vote
from paa.profiles import PAA_PROFILES
from tests.conftest import golden_arrays

MMDET = Config(profile="mmdet")
OFFICIAL = Config(profile="official", geometry="legacy")
VARIANTS = {
    "det": {},
    "detnv": {"score_voting": False},
    "det_small": {"pre_nms_top": 100, "max_detections": 20},
    "detnv_small": {"score_voting": False, "pre_nms_top": 100, "max_detections": 20},
}


def outputs_of(arrays: dict[str, np.ndarray], case: str, geometry: Geometry) -> Outputs:
    def flat(name: str) -> Tensor:
        levels = [torch.from_numpy(arrays[f"{case}/{name}_{level}"]) for level in range(5)]
        return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)

    quality = "centerness" if f"{case}/centerness_0" in arrays else "iou_pred"
    grid = anchor_grid(level_shapes((128, 160)), geometry)
    return Outputs(flat("cls_score"), flat("bbox_pred"), flat(quality)[..., 0], grid)


def check_golden(
    detections: Detections, arrays: dict[str, np.ndarray], prefix: str, scale: Tensor | None = None
) -> None:
    for image in range(2):
        boxes, scores, labels = (
            torch.from_numpy(arrays[f"{prefix}_{name}_{image}"]) for name in ("bboxes", "scores", "labels")
        )
        valid = detections.valid[image]
        assert int(valid.sum()) == len(boxes)
        order = scores.argsort(descending=True, stable=True)  # the files order voted detections by class
        found = detections.boxes[image][valid]
        found = found if scale is None else found / scale.repeat(2)
        torch.testing.assert_close(detections.scores[image][valid], scores[order], rtol=1e-4, atol=1e-6)
        assert detections.labels[image][valid].tolist() == labels[order].tolist()
        torch.testing.assert_close(found, boxes[order], rtol=0, atol=0.01)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", "AB")
def test_golden_mmdet(case: str, variant: str) -> None:
    arrays = golden_arrays("head_paa.npz")
    outputs = outputs_of(arrays, case, MODERN)
    sizes = torch.from_numpy(arrays[f"{case}/img_shape"])
    detections = detect(outputs, sizes, replace(MMDET, **VARIANTS[variant]))
    check_golden(detections, arrays, f"{case}/{variant}")
