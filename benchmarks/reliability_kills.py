"""Runs that are killed again and again end with the bits of a run that nobody touched (Linux).

    python -m benchmarks.reliability kills

Every run is a process of its own, forked from one that has imported torch, so that a start takes a second. It says in
shared memory what it is doing. A signal comes after a drawn delay; two in five wait further, one for the writing of a
checkpoint and one for an evaluation, and come a drawn moment into it.
"""

import importlib
import json
import mmap
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import core.checkpoint
import core.train
from core import cli
from core.runlog import LOG, MACHINE_FIELDS, read_log

PYRAMID = (
    *("--preset", "small", "--backbone-weights", "none", "--frozen-stages", "0", "--channels", "64"),
    *("--short-side", "64", "--long-side", "96"),
)
METHODS: dict[str, tuple[str, ...]] = {  # one has an average of the weights, one trained batch norm
    "paa": PYRAMID,
    "dynamic_atss": (*PYRAMID, "--ema", "0.9"),
    "tood_tal": PYRAMID,
    "padet": ("--preset", "small", "--backbone-weights", "none", "--size", "192", "--channels", "32"),
}
SCHEDULE = ("--steps", "14", "--batch-size", "2", "--save-every", "3", "--eval-every", "7", "--log-every", "1")
DATA = ("--train", "10", "--val", "4", "--test", "1")  # an epoch is 5 steps: most saves are in the middle of one
PHASES = ("start", "step", "evaluation", "writing", "between")  # of a run, as its byte of shared memory says
START, STEP, EVALUATION, WRITING, BETWEEN = range(len(PHASES))
WAITED = (STEP, EVALUATION, WRITING)  # phases that kills must have met
MOST_SIGNALS = 9  # in one run
PATIENCE = 1200  # seconds that a run may take; longer is a hang


class Outcome(NamedTuple):
    """What a signal did."""

    method: str
    signal: str
    phase: str  # when it was sent
    exit_code: int  # negative: ended by that signal
    seconds: float  # until the process had ended


def measure(
    kills: int = 50, terms: int = 20, seed: int = 0, methods: Mapping[str, Sequence[str]] = METHODS
) -> dict[str, Any]:
    """Interrupt runs of all methods in turn until all signals are sent, and compare every finished one.

    Args:
        kills: number of SIGKILLs.
        terms: number of SIGTERMs.
        seed: of signals, moments and numbers of workers.
        methods: package to its options.
    """
    torch.set_num_threads(1)
    draw = random.Random(seed)
    signals = [signal.SIGKILL] * kills + [signal.SIGTERM] * terms
    draw.shuffle(signals)
    outcomes: list[Outcome] = []
    compared: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        os.environ["ANCHORAGE_CACHE"] = name
        data = folder / "data"
        wait_for(start("core.data.__main__", ["shapes", str(data), *DATA], folder / "output", shared_byte()))
        references = {method: reference(method, options, data, folder) for method, options in methods.items()}
        for number, method in enumerate(cycle(methods)):
            if not signals:
                break
            whole, seconds = references[method]
            out = folder / f"run-{number}"
            few, signals = signals[:MOST_SIGNALS], signals[MOST_SIGNALS:]
            done, left = interrupted_run(method, [*methods[method], "--data", str(data)], out, few, seconds, draw)
            signals = left + signals
            outcomes += done
            different = differences(out, whole)
            compared.append({"method": method, "signals": len(done), "differences": different})
            print(f"kills: {method}, {len(done)} signals, {len(different)} differences", flush=True)
            remove(out)
    return {"seed": seed, "signals": [outcome._asdict() for outcome in outcomes], "runs": compared, **tally(outcomes)}


def reference(method: str, options: Sequence[str], data: Path, folder: Path) -> tuple[Path, float]:
    """The folder of a run that nobody touches, and its seconds."""
    out, began = folder / f"whole-{method}", time.monotonic()
    arguments = [*options, "--data", str(data), *SCHEDULE, "--device", "cpu", "--workers", "0", "--out", str(out)]
    wait_for(start(f"{method}.train", arguments, folder / "output", shared_byte()))
    return out, time.monotonic() - began


def interrupted_run(
    method: str,
    options: Sequence[str],
    out: Path,
    signals: Sequence[signal.Signals],
    seconds: float,
    draw: random.Random,
) -> tuple[list[Outcome], list[signal.Signals]]:
    """Start a run, send a signal, start it again and so on; then let it end.

    Args:
        method: package.
        options: of its command.
        out: run folder.
        signals: to send in this order.
        seconds: that the whole run takes without them; a delay is at most a quarter of it.
        draw: random numbers.

    Returns:
        What the signals did, and those left over because the run ended first.
    """
    outcomes: list[Outcome] = []
    left = list(signals)
    output = out.with_suffix(".output")
    while True:
        workers = str(draw.choice((0, 2)))
        phase = shared_byte()
        arguments = [*options, *SCHEDULE, "--device", "cpu", "--workers", workers, "--out", str(out)]
        run = start(f"{method}.train", arguments, output, phase)
        if not left:
            wait_for(run, output)
            return outcomes, left
        wanted = {0: WRITING, 1: EVALUATION}.get(draw.randrange(5))
        wait_for_moment(run, phase, left[0], wanted, draw.uniform(0, seconds / 4), draw.uniform(0, 0.3))
        if not run.is_alive():
            wait_for(run, output)
            return outcomes, left
        sent, met = time.monotonic(), PHASES[phase[0]]
        os.kill(run.pid or 0, left[0])
        run.join(PATIENCE)
        if run.exitcode is None:
            run.kill()
            raise RuntimeError(f"{method}: alive {PATIENCE} s after {left[0].name}")
        outcomes.append(Outcome(method, left[0].name, met, run.exitcode, round(time.monotonic() - sent, 2)))
        left = left[1:]


def wait_for_moment(
    run: BaseProcess, phase: mmap.mmap, number: signal.Signals, wanted: int | None, delay: float, into: float
) -> None:
    """Return when it is time for a signal, or the run has ended.

    SIGTERM waits until the run has begun: before, it ends a process as any other, and nothing is there to be saved.
    """
    run.join(delay)
    while run.is_alive() and number == signal.SIGTERM and phase[0] == START:
        time.sleep(0.01)
    while run.is_alive() and wanted is not None and phase[0] != wanted:
        time.sleep(0.001)
    if wanted is not None:
        run.join(into)


def start(module: str, arguments: Sequence[str], output: Path, phase: mmap.mmap) -> BaseProcess:
    """A command in a forked process, which tells its phase."""
    process = multiprocessing.get_context("fork").Process(target=_command, args=(module, arguments, output, phase))
    process.start()
    return process


def _command(module: str, arguments: Sequence[str], output: Path, phase: mmap.mmap) -> None:
    with output.open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.argv = sys.orig_argv[1:] = [module, *arguments]
    core.train.learn = _telling(core.train.learn, STEP, phase)
    core.train.validate = _telling(core.train.validate, EVALUATION, phase)
    core.checkpoint.replace_file = _telling(core.checkpoint.replace_file, WRITING, phase)
    cli.run(importlib.import_module(module).main)


def _telling(function: Callable[..., Any], number: int, phase: mmap.mmap) -> Callable[..., Any]:
    """The function, which writes its phase down while it runs."""

    def told(*arguments: Any, **named: Any) -> Any:
        before, phase[0] = phase[0], number
        try:
            return function(*arguments, **named)
        finally:
            phase[0] = before if before != START else BETWEEN

    return told


def shared_byte() -> mmap.mmap:
    """Memory that a forked process shares, zero at first."""
    return mmap.mmap(-1, 1)


def wait_for(run: BaseProcess, output: Path | None = None) -> None:
    """Wait for the end of a command that must succeed."""
    run.join(PATIENCE)
    if run.exitcode != 0:
        run.kill()
        said = output.read_text()[-2000:] if output else ""
        raise RuntimeError(f"exit code {run.exitcode} of {run.name}: {said}")


def differences(folder: Path, whole: Path) -> list[str]:
    """Paths of everything that differs between two finished runs: tensors, plain values, log rows but times."""
    found = []
    for name in ("last.pt", "best.pt"):
        ours, theirs = (dict(leaves(run_content(run / name))) for run in (folder, whole))
        keys = sorted(ours.keys() | theirs.keys())
        found += [
            name + key for key in keys if key not in ours or key not in theirs or not same(ours[key], theirs[key])
        ]
    logs = [[_without_times(row) for row in read_log(run / LOG)] for run in (folder, whole)]
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (folder, whole)]
    return found + [LOG] * (logs[0] != logs[1]) + ["metrics.json"] * (metrics[0] != metrics[1])


def run_content(path: Path) -> dict[str, Any]:
    """A checkpoint without its folder and number of workers."""
    content = core.checkpoint.load(path)
    config = {key: value for key, value in content["config"].items() if key not in ("out", "workers")}
    return {**content, "config": config}


def leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """All tensors and plain values inside nested containers, by their path."""
    if not isinstance(value, (dict, list, tuple)):
        yield where, value
        return
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(child, f"{where}/{key}")


def same(ours: Any, theirs: Any) -> bool:
    """Equal bit by bit."""
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    return type(ours) is type(theirs) and repr(ours) == repr(theirs)


def tally(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """How many signals met which phase, and how the processes ended."""
    kills, terms = ([o for o in outcomes if o.signal == name] for name in ("SIGKILL", "SIGTERM"))
    return {
        "kill_phases": dict(Counter(outcome.phase for outcome in kills)),
        "term_phases": dict(Counter(outcome.phase for outcome in terms)),
        "term_exit_codes": sorted({outcome.exit_code for outcome in terms}),
        "longest_term_seconds": max((outcome.seconds for outcome in terms), default=0.0),
    }


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of the table."""
    runs = result["runs"]
    equal = sum(not run["differences"] for run in runs)
    kills, terms = result["kill_phases"], result["term_phases"]
    phases = ", ".join(f"{kills.get(PHASES[phase], 0)} in {what}" for phase, what in _WORDS.items())
    codes = ", ".join(map(str, result["term_exit_codes"]))
    return [
        {
            "what": f"{sum(kills.values())} kill -9: {phases}, the others between or at the start",
            "measured": f"{equal} of {len(runs)} runs end bit-equal",
            "wanted": "all",
            "met": equal == len(runs) and all(kills.get(PHASES[phase]) for phase in WAITED),
        },
        {
            "what": f"{sum(terms.values())} SIGTERM in the same runs, {terms.get('evaluation', 0)} in evaluations",
            "measured": f"exit code {codes}, after {result['longest_term_seconds']:.1f} s at most",
            "wanted": "code 0",
            "met": result["term_exit_codes"] == [0],
        },
    ]


_WORDS = {STEP: "steps", EVALUATION: "evaluations", WRITING: "the writing of a checkpoint"}


def remove(folder: Path) -> None:
    """Make room: a checkpoint of a small model is many megabytes."""
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def _without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in MACHINE_FIELDS}
