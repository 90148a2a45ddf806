"""A run's two phases: where they meet, resuming across the switch, one graph for each, no half precision."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import core.train
from core.anchors import level_shapes
from core.types import Targets
from tests.runs import read_checkpoint, read_log, tensors_of
from tests.runs import run as run_command
from tood_tal import losses
from tood_tal.config import PRESETS, Config
from tood_tal.losses import compute_losses
from tood_tal.model import build_head, run_head
from tood_tal.train import train

HEADS = {
    "t_head": Config(channels=64),
    "t_head_anchor_based": Config(channels=64, anchor_based=True),
    "parallel": Config(channels=64, head="parallel"),
    "parallel_tap": Config(channels=64, head="parallel_tap"),
}
PLAIN_ATSS = Config(channels=64, head="parallel", quality="centerness", atss_share=1.0)
HALF = (torch.float16, torch.bfloat16)


def small_step(config: Config) -> tuple[nn.Module, list[Tensor], Targets]:
    """A head of three classes whose boxes fit the objects, maps of two images of 64 x 96 pixels, and the objects."""
    torch.manual_seed(0)
    head = build_head(config, 3)
    maps = [torch.randn(2, 64, *shape) for shape in level_shapes((64, 96))]
    boxes = torch.tensor([[[4.0, 4, 36, 30], [30, 20, 80, 60], [50, 2, 70, 22]], [[10, 10, 60, 50], [0] * 4, [0] * 4]])
    labels, valid = torch.tensor([[0, 2, 1], [1, 0, 0]]), torch.tensor([[True] * 3, [True, False, False]])
    return head, maps, Targets(boxes, labels, valid, torch.tensor([[64, 96], [60, 90]]))


def losses_of_step(
    maps: list[Tensor], targets: Targets, step: int, steps: int, *, head: nn.Module, config: Config
) -> dict[str, Tensor]:
    """Head, assignment and losses."""
    return compute_losses(run_head(head, maps, config.anchor_scale), targets, step, steps, config=config)


# where the phases meet


@pytest.mark.parametrize("epoch_steps", [1, 10, 7330, 7393])
@pytest.mark.parametrize(("preset", "epochs"), [("r50_1x", 12), ("r50_2x_ms", 24), ("parallel_tal_18e", 18)])
def test_the_first_four_epochs_assign_by_atss(preset: str, epochs: int, epoch_steps: int) -> None:
    # Check 18; steps count from 1, epochs from 0: epoch 3 ends with step 4 * epoch_steps.
    config, steps = PRESETS[preset], epochs * epoch_steps
    last = 4 * epoch_steps
    found = [config.assigns_by_atss(step, steps) for step in (1, last, last + 1, steps)]
    assert found == [True, True, False, False]


@pytest.mark.parametrize(("share", "expected"), [(0.0, "TTTT"), (0.25, "ATTT"), (0.5, "AATT"), (1.0, "AAAA")])
def test_share_of_a_run(share: float, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def noted(name: str) -> Any:
        original = getattr(losses, name)

        def assign(*arguments: Any, **options: Any) -> Any:
            called.append(name)
            return original(*arguments, **options)

        return assign

    for name in ("assign_atss", "assign_aligned"):
        monkeypatch.setattr(losses, name, noted(name))
    config = Config(channels=64, atss_share=share)
    head, maps, targets = small_step(config)
    with torch.no_grad():
        outputs = run_head(head, maps, config.anchor_scale)
        for step in (1, 2, 3, 4):
            compute_losses(outputs, targets, step, 4, config=config)
    assert "".join({"assign_atss": "A", "assign_aligned": "T"}[name] for name in called) == expected


# resuming


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "data"
    run_command("core.data", "shapes", str(folder), "--train", "5", "--val", "1", "--test", "1")
    return folder


def tiny_run(data: Path, out: Path) -> Config:
    """Three steps, the last of them in TAL, each of them saved."""
    return Config(
        data=str(data),
        out=str(out),
        backbone="resnet18",
        backbone_weights="none",
        frozen_stages=0,
        channels=64,
        short_side=32,
        long_side=64,
        batch_size=2,
        empty_images="keep",
        epochs=None,
        steps=3,
        atss_share=2 / 3,
        save_every=1,
        log_every=1,
        workers=0,
        device="cpu",
    )


def test_resuming_across_the_switch_changes_no_bit(
    drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stopped in step 2, the last of ATSS, it goes on with this step and then with TAL.
    monkeypatch.setattr(core.train, "draw_curves", lambda *_: None)  # slow, and not looked at
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(tiny_run(drawings, whole))
    steps: list[int] = []
    learn = core.train.learn

    def stopping(network: Any, criterion: Any, batch: Any, state: Any, *rest: Any) -> float:
        steps.append(state.step)
        if state.step == 2 and steps.count(2) == 1:
            raise KeyError("stopped")
        return learn(network, criterion, batch, state, *rest)

    monkeypatch.setattr(core.train, "learn", stopping)
    with pytest.raises(KeyError, match="stopped"):
        train(tiny_run(drawings, stopped))
    assert read_checkpoint(stopped)["step"] == 1
    train(tiny_run(drawings, stopped))
    assert steps == [1, 2, 2, 3]
    ours, theirs = tensors_of(read_checkpoint(stopped)), tensors_of(read_checkpoint(whole))
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert read_log(stopped) == read_log(whole)


# one graph


@pytest.mark.compiled
@pytest.mark.parametrize("step", [1, 2], ids=["atss", "tal"])
def test_head_assignment_and_losses_are_one_graph(step: int) -> None:
    # Forward and backward; the second image is smaller, so that some anchors lie in padding.
    config = replace(HEADS["t_head"], atss_share=0.5)
    head, maps, targets = small_step(config)
    parameters = list(head.parameters())
    results = []
    for function in plain_and_compiled(head, config, "aot_eager"):
        terms = function(maps, targets, step, 2)
        total = torch.stack([terms[key] for key in terms if key.startswith("loss_")]).sum()
        results.append((terms, torch.autograd.grad(total, parameters, allow_unused=True)))
    (expected, gradients), (found, others) = results
    assert expected["positives"] > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


@pytest.mark.compiled
@pytest.mark.parametrize("step", [1, 2], ids=["atss", "tal"])
@pytest.mark.parametrize("name", [name for name in HEADS if name != "t_head"])
def test_every_head_is_one_graph(name: str, step: int) -> None:
    config = replace(HEADS[name], atss_share=0.5) if step == 2 or name != "parallel" else PLAIN_ATSS
    head, maps, targets = small_step(config)
    plain, compiled = plain_and_compiled(head, config, "eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(maps, targets, step, 2), plain(maps, targets, step, 2), rtol=1e-5, atol=1e-6
        )


def plain_and_compiled(head: nn.Module, config: Config, backend: str) -> tuple[Any, Any]:
    """Head, assignment and losses as one function, and compiled to one graph."""
    plain = partial(losses_of_step, head=head, config=config)
    torch.compiler.reset()
    return plain, torch.compile(plain, fullgraph=True, dynamic=False, backend=backend)


@pytest.mark.compiled
def test_steps_of_a_phase_share_a_graph() -> None:
    config = Config(channels=64, atss_share=0.5)
    head, maps, targets = small_step(config)
    graphs: list[Any] = []

    def count_graphs(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    step = partial(losses_of_step, head=head, config=config)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=count_graphs)
    with torch.no_grad():
        for number in range(1, 9):
            found = compiled(maps, targets, number, 8)
            torch.testing.assert_close(found, step(maps, targets, number, 8), rtol=1e-5, atol=1e-6)
    assert len(graphs) <= 3  # the first step, all others of the first phase, the second phase


# half precision


class HalfRecorder(TorchDispatchMode):
    """Within `with HalfRecorder() as recorder`, collects the operators that give half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.halved: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) and leaf.dtype in HALF for leaf in tree_leaves(result)):
            self.halved.append(func.overloadpacket.__name__)
        return result


@pytest.mark.parametrize("step", [1, 2], ids=["atss", "tal"])
@pytest.mark.parametrize("config", [*HEADS.values(), PLAIN_ATSS], ids=[*HEADS, "plain_atss"])
def test_nothing_is_assigned_or_lost_in_half_precision(config: Config, step: int) -> None:
    # Also where the caller forgot to end autocast: the same numbers, and no operator that gives halves.
    config = config if config.atss_share == 1 else replace(config, atss_share=0.5)
    head, maps, targets = small_step(config)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = run_head(head, maps, config.anchor_scale)
    expected = compute_losses(outputs, targets, step, 2, config=config)
    with torch.autocast("cpu", torch.bfloat16), HalfRecorder() as recorder:
        found = compute_losses(outputs, targets, step, 2, config=config)
    assert recorder.halved == []
    assert found == expected
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_recorder_sees_half_precision() -> None:
    with torch.autocast("cpu", torch.bfloat16), HalfRecorder() as recorder:
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert recorder.halved
