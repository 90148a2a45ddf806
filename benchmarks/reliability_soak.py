"""Half an hour of training: memory and file descriptors of all its processes, and what is left after Ctrl-C (Linux).

    python -m benchmarks.reliability soak

The run trains, evaluates, saves and draws pictures; its processes are looked at in /proc. Memory is resident memory
(RSS) of the training process and its loader workers together, in moments without an evaluation, which has workers of
its own.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.runlog import LOG, read_log

ROOT = Path(__file__).parents[1]
WORKERS = 2
DATA = ("--train", "400", "--val", "40", "--test", "1")  # drawn images, written to files
RUN = (
    *("--preset", "small", "--backbone-weights", "none", "--frozen-stages", "0"),
    *("--channels", "64", "--short-side", "64", "--long-side", "96", "--batch-size", "2", "--steps", "1000000"),
    *("--eval-every", "60", "--save-every", "20", "--log-every", "10", "--picture-every", "30"),
    *("--workers", str(WORKERS), "--device", "cpu"),
)
MOST_GROWTH_MB = 20


class Sample(NamedTuple):
    """One look at a run."""

    second: float  # since its start
    rss_mb: tuple[float, ...]  # of the training process and its loader workers
    descriptors: int  # open files, pipes and sockets of the same
    evaluating: bool  # more processes than usual: an evaluation's own workers


def measure(minutes: float = 30, settle: float = 5, every: float = 1.0) -> dict[str, Any]:
    """Train for a while, then press Ctrl-C.

    Args:
        minutes: length of the run.
        settle: minutes that do not count.
        every: seconds between two looks.
    """
    samples = []
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        open(Path(folder, "output"), "w+") as output,
    ):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ANCHORAGE_CACHE": folder}
        data, out = str(Path(folder, "data")), str(Path(folder, "run"))
        shapes = [sys.executable, "-m", "core.data", "shapes", data, *DATA]
        subprocess.run(shapes, cwd=ROOT, env=environment, stdout=output, check=True)
        command = [sys.executable, "-m", "paa.train", "--data", data, *RUN, "--out", out]
        run = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )  # a process group of its own, as in a terminal
        try:
            start = time.monotonic()
            while (second := time.monotonic() - start) < 60 * minutes:
                if run.poll() is not None:
                    raise RuntimeError(f"the run ended by itself: {Path(output.name).read_text()[-2000:]}")
                sample = look_at(run.pid, second)
                if sample is not None:
                    samples.append(sample)
                time.sleep(every)
            pressed = time.monotonic()
            os.killpg(run.pid, signal.SIGINT)
            code = run.wait(60)
            stopping = time.monotonic() - pressed
            left = [pid for pid, (_, group) in processes().items() if group == run.pid]
        finally:
            for pid, (_, group) in processes().items():
                if group == run.pid:
                    os.kill(pid, signal.SIGKILL)
        steps = read_log(Path(out, LOG))[-1]["step"]
    return summary(samples, settle) | {
        "minutes": minutes,
        "settle_minutes": settle,
        "seconds_between_looks": every,
        "ctrl_c": {"exit_code": code, "seconds": round(stopping, 1), "processes_left": len(left)},
        "steps": steps,
        "command": " ".join(["python", "-m", "paa.train", *RUN]),
    }


def look_at(pid: int, second: float) -> Sample | None:
    """Memory and descriptors of a run now; None before its workers are there."""
    workers = sorted(child for child, (parent, _) in processes().items() if parent == pid)
    if len(workers) < WORKERS:
        return None
    try:
        family = [pid, *workers[:WORKERS]]  # an evaluation's workers have higher numbers, being younger
        rss = tuple(rss_mb(member) for member in family)
        descriptors = sum(len(os.listdir(f"/proc/{member}/fd")) for member in family)
    except OSError:  # one of them has just ended
        return None
    return Sample(second, rss, descriptors, len(workers) > WORKERS)


def processes() -> dict[int, tuple[int, int]]:
    """All living processes: number to parent and process group; the dead that nobody has waited for are left out."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has ended
            continue
        if state != "Z":
            found[int(folder.name)] = int(parent), int(group)
    return found


def rss_mb(pid: int) -> float:
    """Resident memory of a process in megabytes (2^20 bytes)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def summary(samples: Sequence[Sample], settle: float) -> dict[str, Any]:
    """Medians of each minute, and how far they rise after the first minutes.

    Args:
        samples: all looks at a run.
        settle: minutes that do not count.
    """
    minutes: dict[int, list[Sample]] = {}
    for sample in samples:
        if not sample.evaluating:
            minutes.setdefault(int(sample.second // 60), []).append(sample)
    rss = {minute: statistics.median(sum(sample.rss_mb) for sample in group) for minute, group in minutes.items()}
    descriptors = {minute: statistics.median_high(s.descriptors for s in group) for minute, group in minutes.items()}
    counted = [minute for minute in sorted(rss) if minute >= settle]
    first = counted[0]
    return {
        "looks": len(samples),
        "looks_during_evaluation": sum(sample.evaluating for sample in samples),
        "rss_mb_by_minute": {minute: round(value, 1) for minute, value in rss.items()},
        "main_rss_mb_by_minute": {
            minute: round(statistics.median(sample.rss_mb[0] for sample in group), 1)
            for minute, group in minutes.items()
        },
        "descriptors_by_minute": descriptors,
        "highest_descriptors": max(sample.descriptors for sample in samples if not sample.evaluating),
        "growth_mb": round(max(rss[minute] for minute in counted) - rss[first], 1),
        "descriptor_growth": max(descriptors[minute] for minute in counted) - descriptors[first],
    }


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of the table."""
    stop = result["ctrl_c"]
    length = f"{result['minutes']:g} minutes of training, {WORKERS} loader workers"
    stopped = f"exit code {stop['exit_code']}, {stop['processes_left']} processes left, {stop['seconds']:g} s"
    memory = f"{result['growth_mb']:+.1f} MB at most after minute {result['settle_minutes']:g}"
    return [
        {
            "what": f"{length}: memory of all processes",
            "measured": memory,
            "wanted": f"≤ {MOST_GROWTH_MB} MB",
            "met": result["growth_mb"] <= MOST_GROWTH_MB,
        },
        {
            "what": "the same: open file descriptors",
            "measured": f"{result['descriptor_growth']:+d}",
            "wanted": "constant",
            "met": result["descriptor_growth"] == 0,
        },
        {
            "what": "the same: Ctrl-C",
            "measured": stopped,
            "wanted": "code 0, none left",
            "met": stop["exit_code"] == 0 and not stop["processes_left"],
        },
    ]
