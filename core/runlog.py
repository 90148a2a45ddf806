"""What a run leaves behind for people: log.jsonl, the progress bar, curves.png, metrics.json, environment.json."""

import io
import itertools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from core.errors import UserError
from core.files import replace_file

LOG = "log.jsonl"
SHOWN = ("AP", "AP50", "AP75", "VOC07", "VOC12")  # of the metrics, in lines and curves; the last two of VOC data only
MACHINE_FIELDS = (
    "images_per_second",
    "eta_seconds",
    "gpu_memory_mb",
)  # the only log fields that two equal runs differ in
PACKAGES = (
    *("torch", "torchvision", "numpy", "pillow", "simplejpeg"),
    *("pycocotools", "faster-coco-eval", "msgspec", "safetensors"),
)
COLOURS = ("#1f5fa8", "#d9702b", "#2f8f5b", "#8a4fa3", "#b5343c", "#6b6b6b")


class RunLog:
    """Appends a run's numbers to log.jsonl and shows them: a bar on a terminal, else one line each.

    Only the main rank makes one.
    """

    def __init__(
        self, folder: Path, *, step: int, evaluated: int, steps: int, batch_size: int, tensorboard: bool
    ) -> None:
        self.steps = steps
        self.batch_size = batch_size
        cut_log(folder / LOG, step, evaluated)
        self.file = (folder / LOG).open("a", encoding="utf-8")
        self.events = _tensorboard_writer(folder, step) if tensorboard else None
        self.quiet = not sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=self.quiet, dynamic_ncols=True, smoothing=0.05)
        self.restart_clock(step)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        self.file.close()
        if self.events is not None:
            self.events.close()

    def sync(self) -> None:
        """Force the rows so far to the disk."""
        os.fsync(self.file.fileno())

    def restart_clock(self, step: int) -> None:
        """Measure speed from here on."""
        self.clock, self.clock_step = time.perf_counter(), step

    def train(self, step: int, values: Mapping[str, float]) -> None:
        """Log a training step; adds images per second and the time that the rest of the run will take."""
        pace = (time.perf_counter() - self.clock) / max(1, step - self.clock_step)  # seconds a step
        left = pace * (self.steps - step)
        machine = {"images_per_second": round(self.batch_size / pace, 2), "eta_seconds": round(left, 1)}
        if torch.cuda.is_available():
            machine["gpu_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
        self._write({"step": step, "split": "train", **values, **machine})
        speed = f"{machine['images_per_second']:.1f} images/s"
        self.bar.set_postfix_str(f"loss {values['loss']:.3f}, lr {values['lr']:.2g}, {speed}", refresh=False)
        self._say(
            f"step {step}/{self.steps}  loss {values['loss']:.4f}  lr {values['lr']:.3g}  {speed}  {_clock(left)} left"
        )
        self.restart_clock(step)

    def val(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log an evaluation."""
        self._write({"step": step, "split": "val", **metrics})
        shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items() if name in SHOWN)
        self.say(f"step {step}/{self.steps}  val  {shown}")

    def say(self, line: str) -> None:
        """One line on stderr, above the bar where there is one."""
        tqdm.write(line, file=sys.stderr)

    def _say(self, line: str) -> None:
        if self.quiet:
            self.say(line)

    def _write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(_finite(row)) + "\n")
        self.file.flush()
        if self.events is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.events.add_scalar(f"{row['split']}/{name}", value, row["step"])


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that does not exist is null."""
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tensorboard_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError('tensorboard: not installed; pip install "anchorage[loggers]" or --no-tensorboard') from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log.jsonl; a last line that a crash cut short is left out. No file: no rows."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def cut_log(path: Path, step: int, evaluated: int) -> None:
    """Drop what a resumed run writes again: training rows after a step, evaluations after the last finished one."""
    last = {"train": step, "val": evaluated}
    kept = [json.dumps(row) + "\n" for row in read_log(path) if row["step"] <= last[row["split"]]]
    write_text(path, "".join(kept))


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole. UserError when the disk is full; the old file stays as it was."""
    replace_file(path, text.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file as a whole; numbers that do not exist become null."""
    write_text(path, json.dumps(_finite(content), indent=2) + "\n")


def commit() -> str:
    """This source tree's commit, with `+changes` where tracked files differ; `not in git` for an installed copy."""
    folder = Path(__file__).parent
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return "not in git"
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{_git(folder, 'rev-parse', 'HEAD')}{'+changes' if changes else ''}"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment(device: torch.device, world_size: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader needs to repeat a run: commit, command, versions, machine, data.

    Args:
        device: of this rank.
        world_size: number of ranks.
        facts: what the checkpoint says about the run; its plain scalars (method, fingerprint, licence ...) are copied.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "commit": commit(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in PACKAGES},
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "device": f"{device} ({name})",
        "ranks": world_size,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **{key: value for key, value in facts.items() if isinstance(value, (str, int, float))},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def draw_curves(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Losses, learning rate and validation AP of log rows as one picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [row for row in rows if row["split"] == "train"]
    val = [row for row in rows if row["split"] == "val"]
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 2))
    losses, scores, rate = (
        figure.add_subplot(grid[:, 0]),
        figure.add_subplot(grid[0, 1]),
        figure.add_subplot(grid[1, 1]),
    )
    names = [key for key in train[0] if key.startswith("loss")] if train else []
    _plot_losses(losses, train, names)
    _plot_scores(scores, val)
    rate.step([row["step"] for row in train], [row["lr"] for row in train], color=COLOURS[0], linewidth=1.6)
    _style(rate, "Learning rate")
    rate.set_xlabel("step")
    rate.set_ylim(bottom=0)
    losses.set_xlim(left=0)
    scores.sharex(losses)
    rate.sharex(losses)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    _save_figure(figure, path)


def draw_term(rows: Sequence[Mapping[str, Any]], name: str, path: Path, title: str) -> None:
    """One logged number of training, such as the positives of an image, over the steps.

    Args:
        rows: of the log; those without a number leave a gap.
        name: key of the number.
        path: the picture, replaced as a whole.
        title: above it.
    """
    draw_term_of_runs({"": rows}, name, path, title)


def draw_term_of_runs(runs: Mapping[str, Sequence[Mapping[str, Any]]], name: str, path: Path, title: str) -> None:
    """The same logged number of several runs, smoothed, with each run's name.

    Args:
        runs: rows of the log by the run's name; rows without a number leave a gap. A single run needs no name.
        name: key of the number.
        path: the picture, replaced as a whole.
        title: above it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (run, rows), colour in zip(runs.items(), itertools.cycle(COLOURS), strict=False):
        steps = [row["step"] for row in rows]
        values = [row[name] if row.get(name) is not None else math.nan for row in rows]
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.9)
        axes.plot(steps, _smooth(values), color=colour, linewidth=2, label=run)
    _style(axes, title)
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    if len(runs) > 1:
        axes.legend(frameon=False, fontsize=9)
    _save_figure(figure, path)


def _save_figure(figure: Any, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=140, format="png")
    replace_file(path, picture.getvalue())


def _plot_losses(axes: Any, train: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    steps = [row["step"] for row in train]
    for name, colour in zip(names, ("#222222", *COLOURS), strict=False):
        values = [row[name] if row[name] is not None else math.nan for row in train]
        axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.9)
        axes.plot(steps, _smooth(values), color=colour, linewidth=2.2 if name == "loss" else 1.6, label=name)
    _style(axes, "Training loss")
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    if names:
        axes.legend(frameon=False, fontsize=9)


def _plot_scores(axes: Any, val: Sequence[Mapping[str, Any]]) -> None:
    names = [name for name in SHOWN if val and val[-1].get(name) is not None]
    for name, colour in zip(names, COLOURS, strict=False):
        values = [row.get(name) for row in val]
        points = [value if value is not None else math.nan for value in values]
        style = {"color": colour, "marker": "o", "markersize": 4, "linewidth": 1.6}
        axes.plot([row["step"] for row in val], points, label=f"{name} {points[-1]:.3f}", **style)
    _style(axes, "Validation")
    axes.set_ylim(0, 1)
    if names:
        axes.legend(frameon=False, fontsize=9, loc="upper left", ncols=3, columnspacing=1.2, handlelength=1.4)
    else:
        axes.text(0.5, 0.5, "no evaluation yet", ha="center", va="center", transform=axes.transAxes, color="#888888")


def _style(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color="#333333")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.tick_params(colors="#555555", labelsize=9)


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred running mean over a twentieth of the curve; rows without a number are left out of it."""
    reach = max(1, len(values) // 40)
    smooth = []
    for index in range(len(values)):
        window = [v for v in values[max(0, index - reach) : index + reach + 1] if math.isfinite(v)]
        smooth.append(sum(window) / len(window) if window else math.nan)
    return smooth
