"""A batch learnt in parts has the gradient of the whole batch."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from core.accumulation import backward_in_parts, split, whole_outputs
from core.errors import UserError
from core.train import describe_batch
from core.types import Batch, Targets
from tests.core.toy_run import ToyConfig, batches, run_toy

PLAIN = torch.autocast("cpu", enabled=False)


class Outputs(NamedTuple):
    logits: Tensor
    maps: tuple[Tensor, ...]
    unused: Tensor
    nothing: None
    shape: tuple[int, int]
    anchors: Tensor


class Network(nn.Module):
    """Outputs of every kind that methods have; as many anchors as a part has images."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.last, self.unused = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 1, 1)

    def forward(self, images: Tensor, sizes: Tensor) -> Outputs:
        features = self.norm(self.conv(images.double() / 255)).relu()
        logits, maps = self.last(features).mean(dim=(2, 3)), (features[:, :1], features.mean(dim=1))
        return Outputs(logits, maps, self.unused(features), None, (8, 8), torch.arange(2.0))


def loss_of(outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
    """Normalised over the batch, and not a sum over images."""
    each = nn.functional.cross_entropy(outputs.logits, targets.labels[:, 0], reduction="none")
    weights = targets.valid[:, 0] * outputs.logits.detach().softmax(dim=1)[:, 0]
    first, second = outputs.maps
    assert outputs.anchors.tolist() == [0.0, 1.0]
    return {
        "loss_cls": (each * weights).sum() / weights.sum(),
        "loss_maps": first.square().mean().sqrt() * second.std(),
        "positives": targets.valid.sum(),
    }


def gradients(parts: int, norm: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor], Network]:
    torch.manual_seed(0)
    network = Network(norm).double()
    (batch,) = batches(0, 1, 4)
    if parts:
        losses = backward_in_parts(network, loss_of, batch, parts, PLAIN)
    else:  # the obvious way
        losses = loss_of(network(batch.images, batch.sizes), batch.targets)
        (losses["loss_cls"] + losses["loss_maps"]).backward()
    return {n: p.grad for n, p in network.named_parameters() if p.grad is not None}, losses, network


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_have_the_gradient_of_the_whole(parts: int) -> None:
    wanted, losses, _ = gradients(0)
    found, same, _ = gradients(parts)
    assert found.keys() == wanted.keys() == {"conv.weight", "conv.bias", "last.weight", "last.bias"}
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-14)
    for name, value in losses.items():
        torch.testing.assert_close(same[name], value)


def test_running_statistics_move_once_for_each_part() -> None:
    _, _, network = gradients(2, norm=True)
    torch.manual_seed(0)
    twin = Network(norm=True).double()
    (batch,) = batches(0, 1, 4)
    for piece in split(batch, 2):
        twin(piece.images, piece.sizes)
    assert isinstance(network.norm, nn.BatchNorm2d)
    assert isinstance(twin.norm, nn.BatchNorm2d)
    assert network.norm.momentum == 0.1
    torch.testing.assert_close(network.norm.running_mean, twin.norm.running_mean)
    torch.testing.assert_close(network.norm.running_var, twin.norm.running_var)


def test_outputs_that_weights_do_not_move_are_those_of_the_first_part() -> None:
    (batch,) = batches(0, 1, 4)
    outputs, learned, _ = whole_outputs(Network(norm=False).double(), split(batch, 2), PLAIN)
    assert learned == [True, True, True, True, False, False, False, False]
    assert [len(leaf) for leaf in outputs[:4]] == [4, 4, 4, 4]
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in outputs[:4])


def test_parts_must_be_equal() -> None:
    (batch,) = batches(0, 1, 4)
    pieces = split(batch, 2)
    assert [piece.image_ids.tolist() for piece in pieces] == [[100, 101], [102, 103]]
    assert all(isinstance(piece, Batch) for piece in pieces)
    with pytest.raises(ValueError, match="4 images cannot be cut into 3 equal parts"):
        split(batch, 3)


def test_a_run_refuses_unequal_parts(tmp_path: Path) -> None:
    config = ToyConfig(out=str(tmp_path / "run"), accumulate=3, toy_noise=0.0)
    with pytest.raises(UserError, match="accumulate 3 does not divide the 4 images of a process into equal parts"):
        run_toy(config)
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        replace(config, accumulate=0)


@pytest.mark.parametrize(
    ("changes", "ranks", "said"),
    [
        ({}, 1, "learning rate 0.05, 4 images a step"),
        ({"accumulate": 2}, 1, "learning rate 0.05, 4 images a step (2 parts of 2)"),
        (
            {"lr": None},
            2,
            "learning rate 0.0025 (0.01 x 4 / 16 images, linear scaling), 4 images a step (2 processes of 2)",
        ),
        (
            {"batch_size": 16, "lr": None, "accumulate": 2},
            4,
            "learning rate 0.01, 16 images a step (4 processes x 2 parts of 2)",
        ),
    ],
)
def test_the_first_line_says_where_the_rate_comes_from(changes: dict[str, Any], ranks: int, said: str) -> None:
    assert describe_batch(replace(ToyConfig(), **changes), ranks) == said
