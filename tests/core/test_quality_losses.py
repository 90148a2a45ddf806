"""Quality focal, varifocal and distribution focal loss: by hand, loops, MMDetection's values and gradients."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from core.losses import (
    distribution_focal_loss,
    one_hot_labels,
    quality_focal_loss,
    quality_focal_loss_of_scores,
    varifocal_loss,
)
from tests.conftest import golden_arrays

ONE = torch.ones(1, dtype=torch.bool)


def scalar(value: float) -> Tensor:
    return torch.tensor([value])


@pytest.mark.parametrize(
    ("logit", "values"),
    [(0.0, (0.062383, 0.173287, 0.554518, 0.129965)), (1.0, (0.002439, 0.701868, 0.410609, 0.526401))],
)
def test_by_hand(logit: float, values: tuple[float, ...]) -> None:
    # Spec Dynamic ATSS, check 11. p = .5, q = .8: .3^2 * ln 2 = .062383; q = 0: .5^2 * ln 2 = .173287;
    # varifocal .8 * ln 2 = .554518, and .75 * .5^2 * ln 2 = .129965.
    x = scalar(logit)
    found = [
        quality_focal_loss(x, scalar(0.8)),
        quality_focal_loss(x, scalar(0.0)),
        varifocal_loss(x, scalar(0.8), ONE),
        varifocal_loss(x, scalar(0.0), ~ONE),
    ]
    torch.testing.assert_close(torch.cat(found), torch.tensor(values), rtol=0, atol=1e-6)
    torch.testing.assert_close(quality_focal_loss_of_scores(x.sigmoid(), scalar(0.8)), found[0], rtol=1e-4, atol=1e-7)


def test_zero_where_the_score_is_the_quality() -> None:
    assert quality_focal_loss(scalar(math.log(4)), scalar(0.8)).item() == pytest.approx(0, abs=1e-9)


def test_a_positive_of_no_quality() -> None:
    # quality focal treats it as a negative, varifocal leaves it alone
    assert quality_focal_loss(scalar(0.0), scalar(0.0)).item() == pytest.approx(0.25 * math.log(2))
    assert varifocal_loss(scalar(0.0), scalar(0.0), ONE).item() == 0


def test_distribution_by_hand() -> None:
    # Spec check 15: uniform bins give ln 17. With logits 2 at bin 3 and 1 at bin 4, Z = e^2 + e + 15 = 25.1073,
    # ce3 = 3.2232 - 2, ce4 = 3.2232 - 1; at y = 3.3: .7 * 1.2232 + .3 * 2.2232 = 1.5232.
    logits = torch.zeros(2, 17)
    logits[1, 3], logits[1, 4] = 2.0, 1.0
    found = distribution_focal_loss(logits, torch.tensor([5.25, 3.3]))
    torch.testing.assert_close(found, torch.tensor([2.833213, 1.523160]), rtol=0, atol=1e-5)
    whole = distribution_focal_loss(logits[1:], torch.tensor([3.0]))
    assert whole.item() == pytest.approx(math.log(math.exp(2) + math.e + 15) - 2, rel=1e-6)


def test_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, generator=generator).double() * 3
    q = torch.rand(40, generator=generator).double() * (torch.arange(40) % 3 == 0)
    bins = torch.randn(40, 17, generator=generator).double()
    y = torch.rand(40, generator=generator).double() * 15.9
    found = (quality_focal_loss(logits, q), varifocal_loss(logits, q, q > 0), distribution_focal_loss(bins, y))
    for i, (x, target) in enumerate(zip(logits.tolist(), q.tolist(), strict=True)):
        p = 1 / (1 + math.exp(-x))
        cross_entropy = -(target * math.log(p) + (1 - target) * math.log(1 - p))
        assert found[0][i].item() == pytest.approx(abs(target - p) ** 2 * cross_entropy, rel=1e-9)
        weight = target if target > 0 else 0.75 * p**2
        assert found[1][i].item() == pytest.approx(weight * cross_entropy, rel=1e-9)
        low = math.floor(y[i])
        shares = bins[i].softmax(0)
        expected = -(low + 1 - y[i]) * shares[low].log() - (y[i] - low) * shares[low + 1].log()
        assert found[2][i].item() == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("tag", ["qfl_logit", "qfl_none", "qfl_prob", "vfl", "dfl"])
def test_golden(tag: str, index: int) -> None:
    arrays = golden_arrays("losses.npz")
    name = f"{tag}_{index}"
    case = {
        key.partition("/")[2]: torch.from_numpy(value) for key, value in arrays.items() if key.startswith(f"{name}/")
    }
    pred = case["pred"].requires_grad_()
    if tag == "dfl":
        loss = 0.25 * (distribution_focal_loss(pred, case["target"]) * case["weight"]).sum() / 4.0
    elif tag == "vfl":
        loss = varifocal_loss(pred, case["target"], case["target"] > 0).sum() / 7.0
    else:
        labels = case["target_label"]
        classes = one_hot_labels(labels.where(labels < pred.shape[1], torch.tensor(-1)), pred.shape[1])
        function = quality_focal_loss_of_scores if tag == "qfl_prob" else quality_focal_loss
        rows = function(pred, classes * case["target_score"][:, None]).sum(dim=1) * case["weight"]
        loss = rows if tag == "qfl_none" else rows.sum() / 7.0
    torch.testing.assert_close(loss.detach(), case["value"].reshape(loss.shape), rtol=1e-4, atol=1e-7)
    (loss * case["cotangent"] if tag == "qfl_none" else loss).sum().backward()
    torch.testing.assert_close(pred.grad, case["grad"], rtol=1e-3, atol=1e-6)


def test_finite_for_any_input() -> None:
    logits = torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4]).repeat(2).requires_grad_()
    targets = torch.tensor([0.0, 0.6]).repeat_interleave(5)
    loss = quality_focal_loss(logits, targets).sum() + varifocal_loss(logits, targets, targets > 0).sum()
    loss.backward()
    scores = torch.tensor([0.0, 1.0, 0.0, 1.0], requires_grad=True)
    bounded = quality_focal_loss_of_scores(scores, torch.tensor([0.0, 0.0, 0.5, 0.5]))
    bounded.sum().backward()
    assert scores.grad is not None
    assert logits.grad is not None
    assert np.isfinite([loss.item(), *bounded.tolist(), *logits.grad.tolist(), *scores.grad.tolist()]).all()


def test_no_gradient_for_the_target() -> None:
    target = torch.tensor([0.4], requires_grad=True)
    logits = torch.zeros(1, requires_grad=True)
    for loss in (
        quality_focal_loss(logits, target),
        varifocal_loss(logits, target, ONE),
        quality_focal_loss_of_scores(logits.sigmoid(), target),
    ):
        loss.sum().backward()
    assert target.grad is None
