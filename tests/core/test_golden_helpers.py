"""MMDetection 3.3.0's numbers of `golden/helpers.npz` that the shared core reproduces."""

import numpy as np
import pytest
import torch
from torch import Tensor

from core.anchors import anchor_grid, level_shapes
from core.boxes import box_centres, box_iou, clip_boxes, decode_deltas, encode_deltas
from core.losses import centerness_target, giou_loss, iou_loss
from tests.conftest import golden_arrays


@pytest.fixture(scope="module")
def arrays() -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(a)) for name, a in golden_arrays("helpers.npz").items() if a.ndim}


def test_encode(arrays: dict[str, Tensor]) -> None:
    encoded = encode_deltas(arrays["delta_priors"], arrays["delta_gts"])
    torch.testing.assert_close(encoded, arrays["delta_encoded"], rtol=1e-5, atol=1e-5)


def test_decode(arrays: dict[str, Tensor]) -> None:
    decoded = decode_deltas(arrays["delta_priors"], arrays["delta_deltas"])
    torch.testing.assert_close(decoded, arrays["delta_decoded"], rtol=1e-5, atol=1e-3)
    clipped = clip_boxes(decoded[None], torch.tensor([[117, 150]]))[0]
    torch.testing.assert_close(clipped, arrays["delta_decoded_clipped"], rtol=1e-5, atol=1e-3)


def test_iou(arrays: dict[str, Tensor]) -> None:
    a, b = arrays["delta_priors"], arrays["delta_gts"]
    torch.testing.assert_close(box_iou(a[:, None], b[None]), arrays["iou_matrix"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(box_iou(a, b), arrays["iou_aligned"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(1 - iou_loss(a, b), arrays["iou_aligned"], rtol=1e-5, atol=1e-6)


def test_giou(arrays: dict[str, Tensor]) -> None:
    giou = 1 - giou_loss(arrays["delta_priors"], arrays["delta_gts"], eps=1e-6, floor=True)
    torch.testing.assert_close(giou, arrays["giou_aligned"], rtol=1e-5, atol=1e-6)


def test_centerness(arrays: dict[str, Tensor]) -> None:
    target = centerness_target(box_centres(arrays["ctr_anchors"]), arrays["ctr_gts"])
    torch.testing.assert_close(target, arrays["ctr_target"], rtol=1e-5, atol=1e-6)


def test_anchors(arrays: dict[str, Tensor]) -> None:
    grid = anchor_grid(level_shapes((128, 160)))
    assert torch.equal(grid.boxes, torch.cat([arrays[f"anchors_128x160_{level}"] for level in range(5)]))
