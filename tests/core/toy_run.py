"""A tiny detector-shaped run for the tests of the loop; `python -m tests.core.toy_run JSON` runs it.

Keys of the JSON: the fields of ToyConfig, and `kill_at`, `fail_at` or `stop_at` (a step), `no_objects_on` (a rank),
`threads`. Of several ranks the second is the one that dies or is asked to stop.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core import cli, distributed
from core.config import PyramidConfig
from core.stopping import StopAsked
from core.train import fit, seed_everything
from core.types import Batch, Targets

STEPS = 12


@dataclass(frozen=True, kw_only=True)
class ToyConfig(PyramidConfig):
    """A run of seconds."""

    steps: int | None = STEPS
    batch_size: int = 4
    lr: float | None = 0.05
    save_every: int = 5
    log_every: int = 3
    eval_every: int = 6
    device: str = "cpu"
    warmup: Any = "linear"
    toy_noise: float = 0.1  # of the random draw in the forward pass


class Toy(nn.Module):
    """Two convolutions and a random draw, so that random states matter."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        """Class logits of every image."""
        features = self.first(images.float() / 255).relu()
        if self.training and self.noise:
            features = features + self.noise * torch.randn(())
        return self.last(features).mean(dim=(2, 3))


def batches(
    start: int, steps: int, batch_size: int, rank: int = 0, world_size: int = 1, empty: int = -1
) -> Iterator[Batch]:
    """Images of a pure function of the step; a rank named by `empty` has no objects."""
    for step in range(start + 1, steps + 1):
        generator = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (batch_size, 3, 8, 8), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 2, (batch_size, 1), generator=generator)
        valid = torch.rand(batch_size, 1, generator=generator) < 0.7
        if empty >= 0:
            valid[empty::world_size] = False
        own = slice(rank, None, world_size)
        count = len(images[own])
        yield Batch(
            images[own],
            torch.full((count, 2), 8),
            torch.zeros(count, 1, 4),
            labels[own],
            valid[own],
            100 * step + torch.arange(batch_size)[own],
            torch.full((count, 2), 8),
        )


def criterion(outputs: Tensor, targets: Targets, step: int, steps: int) -> dict[str, Tensor]:
    """A loss normalised by the number of objects on all ranks, as the methods' are."""
    each = nn.functional.cross_entropy(outputs, targets.labels[:, 0], reduction="none")
    count = distributed.mean_over_ranks(targets.valid.sum().float()).clamp(min=1e-6)
    return {"loss_cls": (each * targets.valid[:, 0]).sum() / count, "loss_size": outputs.square().mean() * 0.01}


def evaluate(model: nn.Module, stop_asked: StopAsked) -> dict[str, float]:
    """A made-up metric of the weights."""
    weight = sum(float(p.double().sum()) for p in model.parameters())
    return {"AP": 0.5 + 0.1 * float(torch.tensor(weight).sin()), "AP50": 0.9}


def run_toy(
    config: ToyConfig, *, kill_at: int = 0, fail_at: int = 0, stop_at: int = 0, no_objects_on: int = -1
) -> dict[str, float]:
    """Train the toy; optionally die by SIGKILL or an exception, or get SIGTERM, when a step's batch is asked for.

    A run that torchrun has restarted is not killed again.
    """
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"

    def own_batches(start: int) -> Iterator[Batch]:
        assert config.steps is not None
        ranks = distributed.rank(), distributed.world_size()
        stream = batches(start, config.steps, config.batch_size, *ranks, no_objects_on)
        for step, batch in enumerate(stream, start=start + 1):
            last = distributed.rank() == distributed.world_size() - 1
            if step == kill_at and last and not restarted:
                os.kill(os.getpid(), signal.SIGKILL)
            if step == stop_at and last:
                os.kill(os.getpid(), signal.SIGTERM)
            if step == fail_at and last:
                raise RuntimeError("the loader died")
            yield batch

    assert config.steps is not None
    with distributed.process_group(config.device) as device:
        seed_everything(config.seed)
        model = Toy(config.toy_noise)
        metadata = {"method": "toy", "fingerprint": "f", "licence": "none"}
        return fit(
            model, criterion, own_batches, evaluate, config, steps=config.steps, device=device, metadata=metadata
        )


def main() -> None:
    """Run with the settings of the command line's JSON."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings.pop("threads", 1))
    extra = {key: settings.pop(key) for key in ("kill_at", "fail_at", "stop_at", "no_objects_on") if key in settings}
    run_toy(ToyConfig(**settings), **extra)


if __name__ == "__main__":
    cli.run(main)
