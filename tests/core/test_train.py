"""The loop on a toy model: schedule, optimiser, non-finite steps, stop and resume, ranks."""

import gc
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import core.train
from core import checkpoint
from core.config import PyramidConfig
from core.data.loader import _load
from core.errors import UserError
from core.runlog import MACHINE_FIELDS, read_log
from core.stopping import stop_requests, until_asked
from core.train import (
    FREE_FIELDS,
    NEVER,
    Guard,
    build_optimizer,
    clip_gradients,
    fit,
    lr_at,
    mask_nonfinite_step,
    random_states,
    seed_everything,
    set_lr,
    set_random_states,
    share_of_rank,
)
from core.types import Batch
from tests.core.toy_run import STEPS, Toy, ToyConfig, batches, criterion, evaluate, run_toy

ROOT = Path(__file__).parents[2]
TOY_RUN = [sys.executable, "-m", "tests.core.toy_run"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_toy(ToyConfig(out=str(folder)))
    return folder


@pytest.fixture(autouse=True)
def no_curves(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the uninterrupted run draws its curves: matplotlib is most of the time of these short runs."""
    monkeypatch.setattr("core.train.draw_curves", lambda *arguments: None)


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Equal bit by bit, through dicts and lists."""
    assert type(left) is type(right), where
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype, where
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}/{index}")
    else:
        assert left == right, where


def assert_same_run(folder: Path, whole: Path) -> None:
    """Equal tensors, random states and log rows but for times."""
    contents = [checkpoint.load(f / "last.pt") for f in (folder, whole)]
    for content in contents:
        for name in ("out", "picture_every"):
            content["config"].pop(name)
        content.pop("commit")
        for own in content["ranks"]:
            own["random"].pop("python")  # the type checks of the test run draw from it
    assert_same(contents[0], contents[1])
    best = [checkpoint.load(f / "best.pt")["model"] for f in (folder, whole)]
    assert_same(best[0], best[1])
    rows = [read_log(f / "log.jsonl") for f in (folder, whole)]
    for row in rows[0] + rows[1]:
        for name in MACHINE_FIELDS:
            row.pop(name, None)
    assert rows[0] == rows[1]


def stop_toy_at(step: int, number: signal.Signals) -> Callable[[ToyConfig], None]:
    """Runs the toy and sends this process a signal while that step's batch is made."""

    def run(config: ToyConfig) -> None:
        def own_batches(start: int) -> Iterator[Batch]:
            for current, batch in enumerate(batches(start, STEPS, config.batch_size), start=start + 1):
                if current == step:
                    os.kill(os.getpid(), number)
                yield batch

        fit_toy(config, own_batches)

    return run


def fit_toy(
    config: ToyConfig, own_batches: Any, own_criterion: Any = criterion, picture: Any = None
) -> dict[str, float]:
    seed_everything(config.seed)
    metadata = {"method": "toy", "fingerprint": "f", "licence": "none"}
    given: dict[str, Any] = {"steps": STEPS, "device": torch.device("cpu"), "metadata": metadata, "picture": picture}
    return fit(Toy(config.toy_noise), own_criterion, own_batches, evaluate, config, **given)


# schedule and optimiser


def test_lr_of_the_papers_run_by_hand() -> None:
    config = PyramidConfig(steps=90_000)  # base 0.01, constant warm-up 1/3 for 500, milestones at 60k and 80k
    expected = {0: 0.01 / 3, 499: 0.01 / 3, 500: 0.01, 59_999: 0.01, 60_000: 0.001, 79_999: 0.001, 80_000: 0.0001}
    for step, lr in expected.items():
        assert lr_at(step, 90_000, config) == pytest.approx(lr, rel=1e-12), step


def test_linear_warmup_by_hand() -> None:
    config = PyramidConfig(steps=100_000, warmup="linear", warmup_factor=0.1, warmup_steps=500, lr=1.0)
    # step 250 is half-way: 0.1 + 0.9 / 2
    for step, lr in {0: 0.1, 250: 0.55, 500: 1.0}.items():
        assert lr_at(step, 100_000, config) == pytest.approx(lr, rel=1e-12)


def test_short_runs_keep_the_schedules_shape() -> None:
    config = PyramidConfig(steps=240, lr=1.0)  # warm-up a tenth: 24; drops at 160 and 213.3 -> 213
    rates = [lr_at(step, 240, config) for step in range(240)]
    assert [rates.count(rate) for rate in sorted(set(rates))] == [27, 53, 24, 136]  # 0.01, 0.1, 1/3, 1
    assert rates[23] == pytest.approx(1 / 3)
    assert rates[24] == 1.0
    assert lr_at(0, 5, config) == 1.0  # five steps have no tenth


def test_biases_have_their_own_rate_and_decay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
    model[1].weight.requires_grad_(False)
    config = PyramidConfig(steps=10, lr=0.01, bias_lr_factor=2.0, bias_weight_decay=0.0)
    optimizer = build_optimizer(model, config)
    set_lr(optimizer, 0.01)
    weights, biases = optimizer.param_groups
    assert (weights["lr"], weights["weight_decay"], len(weights["params"])) == (0.01, 1e-4, 1)
    assert (biases["lr"], biases["weight_decay"], len(biases["params"])) == (0.02, 0.0, 2)
    assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)


def test_update_by_hand() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 2.0)
    optimizer = build_optimizer(layer, PyramidConfig(steps=10, lr=0.1, weight_decay=0.5))
    for _ in range(2):
        layer.weight.grad = torch.tensor([[1.0]])
        optimizer.step()
    # v1 = 1 + 0.5 * 2 = 2, w = 2 - 0.2 = 1.8; v2 = 0.9 * 2 + 1 + 0.5 * 1.8 = 3.7, w = 1.8 - 0.37 = 1.43
    torch.testing.assert_close(layer.weight.detach(), torch.tensor([[1.43]]))


def test_clipping_by_hand() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])  # norm 5
    assert clip_gradients(layer, 0.0).item() == 5.0
    assert layer.weight.grad.tolist() == [[3.0, 4.0]]
    assert clip_gradients(layer, 1.0).item() == 5.0
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.6, 0.8]]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_nonfinite_update_does_nothing(memory_format: torch.memory_format) -> None:
    layer = nn.Conv2d(3, 4, 3).to(memory_format=memory_format)
    optimizer = build_optimizer(layer, PyramidConfig(steps=10, lr=0.1))
    guard = Guard(torch.full((), NEVER), {})

    def update(step: int, scale: float) -> None:
        loss = layer(torch.ones(1, 3, 4, 4)).sum() * scale
        loss.backward()
        mask_nonfinite_step(optimizer, loss, clip_gradients(layer, 0.0), step, guard)
        optimizer.step()
        optimizer.zero_grad()

    def everything() -> list[Tensor]:
        return [*layer.parameters(), *(state["momentum_buffer"] for state in optimizer.state.values())]

    update(1, 1.0)
    before = [p.detach().clone() for p in layer.parameters()] + [
        s["momentum_buffer"].clone() for s in optimizer.state.values()
    ]
    update(2, math.nan)
    update(3, math.inf)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert int(guard.first_bad) == 2
    update(4, 1.0)
    assert not torch.equal(before[0], layer.weight)


def test_random_states_go_back() -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), float(np.random.rand()), random.random()  # noqa: NPY002

    states = random_states()
    first = draw()
    set_random_states(states)
    assert draw() == first


# a run's folder


def test_run_folder_is_complete(whole: Path) -> None:
    files = {path.name for path in whole.iterdir()}
    weights = {"last.pt", "previous.pt", "best.pt"}
    assert files == {"config.yaml", "log.jsonl", "curves.png", "metrics.json", "environment.json"} | weights
    rows = read_log(whole / "log.jsonl")
    assert [(row["step"], row["split"]) for row in rows] == [
        (3, "train"), (6, "train"), (6, "val"), (9, "train"), (12, "train"), (12, "val")
    ]  # fmt: skip
    assert all(row["loss"] == pytest.approx(row["loss_cls"] + row["loss_size"]) for row in rows if "loss" in row)
    environment = json.loads((whole / "environment.json").read_text())
    assert environment["fingerprint"] == "f"
    assert environment["licence"] == "none"
    best = checkpoint.load(whole / "best.pt", method="toy")
    assert best["metrics"]["AP"] == max(row["AP"] for row in rows if row["split"] == "val")
    assert json.loads((whole / "metrics.json").read_text())["best"]["step"] == best["step"]
    assert "optimizer" not in best


def test_logged_loss_is_the_mean_of_the_interval(tmp_path: Path, whole: Path) -> None:
    run_toy(ToyConfig(out=str(tmp_path / "every"), log_every=1))
    single = [row["loss"] for row in read_log(tmp_path / "every" / "log.jsonl") if row["split"] == "train"]
    pooled = [row["loss"] for row in read_log(whole / "log.jsonl") if row["split"] == "train"]
    assert pooled == pytest.approx([sum(single[i : i + 3]) / 3 for i in range(0, STEPS, 3)], rel=1e-6)


@pytest.mark.parametrize(
    "fail_at", [4, 6, 8]
)  # before the first save; after one between two log lines; after one at both
def test_resume_after_an_error_is_bit_equal(tmp_path: Path, whole: Path, fail_at: int) -> None:
    config = ToyConfig(out=str(tmp_path / "run"))
    with pytest.raises(RuntimeError, match="the loader died"):
        run_toy(config, fail_at=fail_at)
    run_toy(config)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("place", ["draw_curves", "write_json"])
def test_resume_after_an_error_in_an_evaluation(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    original = getattr(core.train, place)

    def fail(*arguments: Any) -> None:
        if "metrics.json" in str(arguments) or place == "draw_curves":
            raise RuntimeError("power cut")
        original(*arguments)

    config = ToyConfig(out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(f"core.train.{place}", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            run_toy(config)
    run_toy(config)
    assert_same_run(tmp_path / "run", whole)


def test_resume_after_a_kill_is_bit_equal(tmp_path: Path, whole: Path) -> None:
    config = ToyConfig(out=str(tmp_path / "run"))
    settings = {"out": config.out, "kill_at": 9}
    done = subprocess.run([*TOY_RUN, json.dumps(settings)], cwd=ROOT, capture_output=True, timeout=100)
    assert done.returncode == -signal.SIGKILL
    run_toy(config)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("number", "step"),  # an evaluation is due; nothing is due; the last step
    [(signal.SIGTERM, 6), (signal.SIGTERM, 7), (signal.SIGTERM, 12), (signal.SIGINT, 7)],
)
def test_stop_request_saves_and_resumes(tmp_path: Path, whole: Path, number: signal.Signals, step: int) -> None:
    config = ToyConfig(out=str(tmp_path / "run"))
    with pytest.raises(SystemExit) as leaving:
        stop_toy_at(step, number)(config)
    assert leaving.value.code == 0
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] == step
    run_toy(config)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_loader_workers_too_saves_and_resumes(tmp_path: Path, whole: Path, number: signal.Signals) -> None:
    def make(step: int) -> Batch:
        return next(batches(step - 1, step, 4))

    def own_batches(start: int) -> Iterator[Batch]:
        for step, batch in enumerate(_load(make, range(start + 1, STEPS + 1), config), start=start + 1):
            if step == 7:  # as `timeout`, a batch system or Ctrl-C do
                workers = multiprocessing.active_children()
                subprocess.run(["kill", f"-{int(number)}", *(str(process.pid) for process in workers)], check=True)
                for process in workers:
                    process.join(0.3)  # one that ends here would end the run
                os.kill(os.getpid(), number)
            yield batch

    config = ToyConfig(out=str(tmp_path / "run"), workers=2)
    with pytest.raises(SystemExit) as leaving:
        fit_toy(config, own_batches)
    assert leaving.value.code == 0
    fit_toy(config, own_batches)
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_request_in_an_evaluation_leaves_it(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    looked = []

    def slow_evaluation(model: nn.Module, stop_asked: Any) -> dict[str, float]:
        for item in until_asked(range(5), stop_asked, torch.device("cpu")):
            looked.append(item)
            if item == 1:
                os.kill(os.getpid(), number)
        return evaluate(model, stop_asked)

    config = ToyConfig(out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr("tests.core.toy_run.evaluate", slow_evaluation)
        with pytest.raises(SystemExit) as leaving:
            run_toy(config)
    assert leaving.value.code == 0
    assert looked == [0, 1]
    saved = checkpoint.load(tmp_path / "run" / "last.pt")
    assert (saved["step"], saved["evaluated"]) == (6, -1)
    run_toy(config)
    assert_same_run(tmp_path / "run", whole)


def test_second_interrupt_is_immediate() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop_requests() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_damaged_last_checkpoint_falls_back(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ToyConfig(out=str(tmp_path / "run"))
    with pytest.raises(RuntimeError):
        run_toy(config, fail_at=11)
    last = tmp_path / "run" / "last.pt"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    run_toy(config)
    assert "checksum" in capsys.readouterr().err
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("state", ["damaged", "missing"])
def test_best_that_cannot_be_read_is_said(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str], state: str
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    best = tmp_path / "run" / "best.pt"
    best.write_bytes(best.read_bytes()[:-1])
    if state == "missing":
        best.unlink()
    run_toy(ToyConfig(out=str(tmp_path / "run")))
    error = capsys.readouterr().err
    assert error.startswith(f"warning: {best} is {state}; a later evaluation writes it anew only if it beats best at")
    assert error.count("\n") == 1


def test_unfinished_files_of_a_killed_run_go(tmp_path: Path) -> None:
    config = ToyConfig(out=str(tmp_path / "run"))
    with pytest.raises(RuntimeError):
        run_toy(config, fail_at=7)
    for name in (".last.pt.part", ".best.pt.part", ".curves.png.part"):
        (tmp_path / "run" / name).write_bytes(b"half")
    (tmp_path / "run" / "notes.part").write_text("mine")
    run_toy(config)
    assert [path.name for path in (tmp_path / "run").glob("*.part")] == ["notes.part"]


@pytest.mark.parametrize(("every", "expected"), [(5, [5, 10, 12]), (0, [])])
def test_pictures_leave_no_trace_in_a_run(tmp_path: Path, whole: Path, every: int, expected: list[int]) -> None:
    drawn = []

    def picture(model: nn.Module, step: int) -> None:
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        torch.rand(3)  # a careless one
        drawn.append(step)

    config = ToyConfig(out=str(tmp_path / "run"), picture_every=every)
    fit_toy(config, lambda start: batches(start, STEPS, config.batch_size), picture=picture)
    assert drawn == expected
    assert_same_run(tmp_path / "run", whole)


def test_drawings_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures refer to themselves, so that only Python's collector frees them; by itself it comes late."""
    drawn: list[Any] = []
    left: list[int] = []

    class Figure:
        def __init__(self) -> None:
            self.canvas = self

    def draw(*arguments: Any) -> None:
        left.append(sum(figure() is not None for figure in drawn))
        drawn.append(weakref.ref(Figure()))

    monkeypatch.setattr("core.train.draw_curves", draw)
    config = ToyConfig(out=str(tmp_path / "run"), picture_every=3)
    gc.disable()
    try:
        fit_toy(config, lambda start: batches(start, STEPS, config.batch_size), picture=draw)
    finally:
        gc.enable()
    assert left == [0] * 6  # four pictures, two curves


def test_finished_run_says_so(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    metrics = run_toy(ToyConfig(out=str(whole)), fail_at=1)
    assert "is a finished run: best at step" in capsys.readouterr().out
    assert metrics["step"] in (6, 12)
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def test_other_configuration_is_refused(whole: Path) -> None:
    config = ToyConfig(out=str(whole))
    with pytest.raises(
        UserError, match=r"holds another run \(--lr 0.05, now 0.1; --seed 0, now 3\); choose another --out"
    ):
        run_toy(replace(config, lr=0.1, seed=3))
    free = {"workers": 0, "device": "auto", "compile": True, "preset": "x", "data": "moved"}
    run_toy(replace(config, log_every=7, save_every=9, picture_every=3, **free))  # the same numbers: finished


def test_every_other_option_and_fact_is_refused(whole: Path) -> None:
    """All fields but the free ones are compared, whatever their type; facts beside the options too."""
    content = checkpoint.load(whole / "last.pt")
    config = ToyConfig(out=str(whole))
    facts = {name: content[name] for name in ("method", "fingerprint", "licence", "config", "steps", "commit")}
    core.train._refuse_other_run(content, facts, config, whole)
    for name, value in content["config"].items():
        other = {**content["config"], name: not value if isinstance(value, bool) else "another"}
        if name in FREE_FIELDS:
            core.train._refuse_other_run({**content, "config": other}, facts, config, whole)
        else:
            with pytest.raises(UserError, match=rf"another run \(--{name.replace('_', '-')} .*, now .*\); choose"):
                core.train._refuse_other_run({**content, "config": other}, facts, config, whole)
    for name in ("fingerprint", "licence", "steps", "method"):
        with pytest.raises(UserError, match=rf"another run \({name} x, now "):
            core.train._refuse_other_run({**content, name: "x"}, facts, config, whole)
    core.train._refuse_other_run({**content, "commit": "x"}, facts, config, whole)
    long = {**content, "fingerprint": "0" * 64}
    with pytest.raises(UserError, match=r"\(fingerprint 000000000000... \(64 characters\), now f\)"):
        core.train._refuse_other_run(long, facts, config, whole)


def test_nonfinite_step_is_named_and_nothing_is_saved(tmp_path: Path) -> None:
    def poisoned(outputs: Tensor, targets: Any, step: int, steps: int) -> dict[str, Tensor]:
        terms = criterion(outputs, targets, step, steps)
        return {name: term * (math.nan if step == 7 else 1.0) for name, term in terms.items()}

    config = ToyConfig(out=str(tmp_path / "run"))
    with pytest.raises(UserError, match="step 7: loss or gradient is not finite, images 700, 701, 702, 703;"):
        fit_toy(config, lambda start: batches(start, STEPS, 4), poisoned)
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] == 6
    assert read_log(tmp_path / "run" / "log.jsonl")[-1]["step"] == 6


def test_batches_that_end_early_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batches ended after step 4 of 12"):
        fit_toy(ToyConfig(out=str(tmp_path / "run")), lambda start: batches(start, 4, 4))


def test_metadata_must_be_plain(tmp_path: Path) -> None:
    device, config = torch.device("cpu"), ToyConfig(out=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"metadata\['where'\] is a PosixPath"):
        fit(
            Toy(0),
            criterion,
            lambda start: batches(start, 1, 4),
            evaluate,
            config,
            steps=1,
            device=device,
            metadata={"where": tmp_path},
        )
    assert not (tmp_path / "run").exists()


def test_average_of_weights_is_what_is_evaluated(tmp_path: Path, whole: Path) -> None:
    run_toy(ToyConfig(out=str(tmp_path / "run"), ema=0.9))
    averaged, plain = checkpoint.load(tmp_path / "run" / "last.pt"), checkpoint.load(whole / "last.pt")
    assert_same(averaged["model"], plain["model"])  # training itself is unchanged
    assert not torch.equal(averaged["average"]["last.weight"], averaged["model"]["last.weight"])
    best = checkpoint.load(tmp_path / "run" / "best.pt")
    if best["step"] == STEPS:
        assert_same(best["model"], averaged["average"])


def test_resumed_average_is_bit_equal(tmp_path: Path) -> None:
    for name in ("whole", "run"):
        config = ToyConfig(out=str(tmp_path / name), ema=0.9)
        if name == "run":
            with pytest.raises(RuntimeError):
                run_toy(config, fail_at=8)
        run_toy(config)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def run_two(folder: Path, **settings: Any) -> None:
    """The toy on two ranks, in processes of their own; the second never sees an object."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    settings = {"out": str(folder), "toy_noise": 0.0, "no_objects_on": 1, **settings}
    ranks = [
        subprocess.Popen(
            [*TOY_RUN, json.dumps(settings)],
            cwd=ROOT,
            env={**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]
    for process in ranks:
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 0, error.decode()[-2000:]
        assert b"Warning" not in error


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks that nothing interrupted."""
    folder = tmp_path_factory.mktemp("two") / "run"
    run_two(folder)
    return folder


def assert_close_runs(folder: Path, other: Path) -> None:
    """Losses and weights of different numbers of ranks. Sums in another order: rtol 1e-5."""
    one, two = (checkpoint.load(run / "last.pt") for run in (folder, other))
    torch.testing.assert_close(two["model"], one["model"], rtol=1e-5, atol=1e-7)
    for left, right in zip(*(read_log(run / "log.jsonl") for run in (folder, other)), strict=True):
        assert left.pop("split") == right.pop("split")
        for name in MACHINE_FIELDS:
            left.pop(name, None), right.pop(name, None)
        assert left == pytest.approx(right, rel=1e-5)


def test_two_ranks_equal_one(tmp_path: Path, two: Path) -> None:
    """Also when the second rank never has an object."""
    config = ToyConfig(out=str(tmp_path / "one"), toy_noise=0.0)
    fit_toy(config, lambda start: merged_ranks(start, config.batch_size))
    assert len(checkpoint.load(two / "last.pt")["ranks"]) == 2
    assert_close_runs(tmp_path / "one", two)


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path, two: Path) -> None:
    """One rank, then two, then one; each stop is inside a log interval of three steps."""
    config = ToyConfig(out=str(tmp_path / "run"), toy_noise=0.0)

    def stopped_at(step: int) -> Callable[[int], Iterator[Batch]]:
        def own_batches(start: int) -> Iterator[Batch]:
            for current, batch in enumerate(merged_ranks(start, config.batch_size), start=start + 1):
                if current == step:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        return own_batches

    with pytest.raises(SystemExit):
        fit_toy(config, stopped_at(4))
    run_two(tmp_path / "run", stop_at=8)
    content = checkpoint.load(tmp_path / "run" / "last.pt")
    assert content["step"] == 8
    assert len(content["ranks"]) == 2
    fit_toy(config, stopped_at(0))
    assert_close_runs(tmp_path / "run", two)


def test_share_of_rank_by_hand() -> None:
    saved = [
        {"random": "first", "sums": {"loss": torch.tensor(4.0)}, "summed": 2},
        {"random": "second", "sums": {"loss": torch.tensor(8.0)}, "summed": 2},
    ]
    assert share_of_rank(saved, 1, 2) is saved[1]
    assert share_of_rank(saved, 0, 1) == {"random": "first", "sums": {"loss": torch.tensor(6.0)}, "summed": 2}
    assert share_of_rank(saved, 1, 4) == {"random": "second", "sums": {"loss": torch.tensor(6.0)}, "summed": 2}
    assert share_of_rank(saved, 3, 4) == {"random": "first", "sums": {"loss": torch.tensor(6.0)}, "summed": 2}


def test_a_killed_rank_is_restarted_and_the_weights_are_the_same(tmp_path: Path, two: Path) -> None:
    settings = {"out": str(tmp_path / "run"), "toy_noise": 0.0, "no_objects_on": 1, "kill_at": 8}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [sys.executable, *launch, "-m", "tests.core.toy_run", json.dumps(settings)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "steps 7 to 12" in done.stdout  # it went on from the checkpoint of step 6
    assert_same_run(tmp_path / "run", two)


def merged_ranks(start: int, batch_size: int) -> Iterator[Batch]:
    """The two ranks' batches joined; the second has no objects."""
    pairs = zip(*(batches(start, STEPS, batch_size, rank, 2, empty=1) for rank in (0, 1)), strict=True)
    for pair in pairs:
        yield Batch(*(torch.cat(tensors) for tensors in zip(*pair, strict=True)))
