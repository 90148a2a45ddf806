"""A run that is killed and started again ends with the bits of a run that was never stopped."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.runs import METHODS, ROOT, call, command, environment, read_checkpoint, read_log, run, tensors_of, tiny

STEPS = 14  # of 2 images from 10: the fifth batch of every epoch ends it, so steps 7 and 12 are in mid-epoch
SAVE_EVERY = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "data"
    run("core.data", "shapes", str(folder), "--train", "10", "--val", "3", "--test", "1")
    return folder


def flags(method: str, data: Path, out: Path, workers: int) -> list[str]:
    schedule = ["--steps", str(STEPS), "--batch-size", "2", "--save-every", str(SAVE_EVERY), "--eval-every", "7"]
    return ["--data", str(data), *tiny(method), *schedule, "--workers", str(workers), "--out", str(out)]


def kill_after(module: str, arguments: list[str], log: Path, steps: int) -> None:
    """Start a run and send SIGKILL once its log holds that many training steps."""
    process = subprocess.Popen(
        command(module, *arguments), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while not log.exists() or log.read_text(encoding="utf-8").count('"train"') < steps:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("method", METHODS)
def test_killed_run_resumes_bit_for_bit(method: str, data: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    call(f"{method}.train", *flags(method, data, whole, workers=0))
    expected, rows = read_checkpoint(whole), read_log(whole)
    assert expected["step"] == STEPS
    for workers, stop in ((0, 6), (2, 10)):
        killed = tmp_path / f"killed-{workers}"
        arguments = flags(method, data, killed, workers)
        kill_after(f"{method}.train", arguments, killed / "log.jsonl", stop)
        assert read_checkpoint(killed)["step"] < STEPS
        run(f"{method}.train", *arguments)  # a process of its own, as after a restart
        ours, theirs = tensors_of(read_checkpoint(killed)), tensors_of(expected)
        assert ours.keys() == theirs.keys()
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
        assert read_log(killed) == rows
        best, other = tensors_of(read_checkpoint(killed, "best.pt")), tensors_of(read_checkpoint(whole, "best.pt"))
        assert all(torch.equal(best[name], other[name]) for name in other)
