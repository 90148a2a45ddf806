"""The coder: golden checks 4 and 5, its inverse, its clamps."""

import math

import pytest
import torch
from torch import Tensor

from core.boxes import box_iou
from padet.coder import decode, encode


def corners(*centre_and_size: float) -> Tensor:
    """Normalised (cx, cy, w, h) as xyxy; the coder knows only ratios, so the unit does not matter."""
    cx, cy, w, h = centre_and_size
    return torch.tensor([[cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]], dtype=torch.float64)


ANCHOR = corners(0.5, 0.5, 0.2, 0.4)
PROMOTED = corners(0.52, 0.48, 0.2442806, 0.3274923)
OBJECT = corners(0.55, 0.47, 0.30, 0.30)


def test_promotion_and_final_box_by_hand() -> None:
    # Check 4: 0.5 + 0.1 * 1 * 0.2 = 0.52; 0.2 * exp(0.2) = 0.2442806
    promoted = decode(ANCHOR, torch.tensor([[1.0, -0.5, 1, -1]], dtype=torch.float64))
    torch.testing.assert_close(promoted, PROMOTED, atol=1e-7, rtol=0)
    box = decode(promoted, torch.tensor([[0.5, 1.0, 0, 0.5]], dtype=torch.float64))
    torch.testing.assert_close(box, corners(0.5322140, 0.5127492, 0.2442806, 0.3619350), atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("reference", "deltas"),
    [
        (ANCHOR, (2.5, -0.75, 2.0273255, -1.4384104)),
        (PROMOTED, (1.2280961, -0.3053507, 1.0273255, -0.4384104)),
    ],
)
def test_targets_by_hand(reference: Tensor, deltas: tuple[float, ...]) -> None:
    # Check 5: (0.55 - 0.5) / 0.2 / 0.1 = 2.5; ln(0.3 / 0.2) / 0.2 = 2.0273255
    expected = torch.tensor([deltas], dtype=torch.float64)
    torch.testing.assert_close(encode(reference, OBJECT), expected, atol=1e-6, rtol=0)


def test_promotion_raises_the_iou() -> None:
    # Check 5
    assert box_iou(ANCHOR, OBJECT).item() == pytest.approx(0.5454545, abs=1e-7)
    assert box_iou(PROMOTED, OBJECT).item() == pytest.approx(0.7461343, abs=1e-6)


def test_decode_inverts_encode_at_any_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(2, 50, 2, generator=generator, dtype=torch.float64)
    boxes = torch.cat([low, low + 0.01 + torch.rand(2, 50, 2, generator=generator, dtype=torch.float64)], dim=-1)
    deltas = encode(boxes[0], boxes[1])
    torch.testing.assert_close(decode(boxes[0], deltas), boxes[1])
    torch.testing.assert_close(encode(boxes[0] * 384, boxes[1] * 384), deltas)


def test_clamps() -> None:
    # a log size of at most ln(1000 / 16), from above only; an object without width counts as a millionth
    grown = decode(ANCHOR, torch.tensor([[0.0, 0, 1e9, -1e3]], dtype=torch.float64))
    assert (grown[0, 2] - grown[0, 0]).item() == pytest.approx(0.2 * 1000 / 16)
    assert (grown[0, 3] - grown[0, 1]).item() == pytest.approx(0.4 * math.exp(-200), abs=1e-15)
    flat = encode(ANCHOR, corners(0.5, 0.5, 0, 0.4))
    assert flat[0, 2].item() == pytest.approx(math.log(1e-6) / 0.2)
    assert flat.isfinite().all()


def test_half_precision_is_decoded_in_float32() -> None:
    assert decode(ANCHOR.float(), torch.zeros(1, 4, dtype=torch.bfloat16)).dtype == torch.float32
