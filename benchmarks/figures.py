"""Figures of a paper, drawn from run folders.

    python -m benchmarks.figures dynamic-box-loss RUN_A RUN_B --out box_loss.png    # Dynamic ATSS, figures 3 to 5

Any two runs of `dynamic_atss` will do; those of `python -m benchmarks.run dynamic-bccd` lie in
runs/benchmarks/dynamic-bccd/DETECTOR-SEED. Drawn is `loss_box`, whose value depends on what weighs the boxes: runs of
different hosts or branches do not compare and are refused.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from core import cli
from core.configfile import config_from_values, read_mapping
from core.errors import UserError, nearest
from core.runlog import LOG, draw_term_of_runs, read_log
from dynamic_atss.config import Config

HOSTS = {"atss": "ATSS", "gfl": "GFL", "gflv2": "GFLV2", "vfnet": "VFNet"}
TERM = "loss_box"


def dynamic_box_loss(runs: Sequence[Path], out: Path) -> None:
    """The box loss of runs with and without Combined IoUs (Zhang et al. 2022, figures 3 to 5).

    Args:
        runs: two run folders of `dynamic_atss`.
        out: the picture, replaced as a whole.

    Raises:
        UserError: no run folder, a log without the term, or runs whose box losses do not compare.
    """
    configs = [read_config(run) for run in runs]
    for field in ("host", "quality"):
        values = [getattr(config, field) for config in configs]
        if len(set(values)) > 1:
            raise UserError(
                f"{runs[1]}: has {field} {values[1]} and {runs[0]} {values[0]}: their box losses do not compare"
            )
    names = [label(config) for config in configs]
    if len(set(names)) < len(names):
        names = [f"{name} ({run.name})" for name, run in zip(names, runs, strict=True)]
    if len(set(names)) < len(names):
        raise UserError(f"{runs[1]}: the same run twice")
    rows = {name: train_rows(run) for name, run in zip(names, runs, strict=True)}
    draw_term_of_runs(rows, TERM, out, "Box loss of the positives in training")


def read_config(run: Path) -> Config:
    """The configuration of a run folder. UserError if it is none of `dynamic_atss`."""
    path = run / "config.yaml"
    if not path.exists():
        raise UserError(f"{run}: no run folder, it has no config.yaml")
    return config_from_values(read_mapping(path), Config, str(path))


def label(config: Config) -> str:
    """`ATSS + Combined IoUs`: host and assignment of a run, without constant weights."""
    if config.pred_weight == 0:
        return HOSTS[config.host]
    kind = "Combined IoUs" if config.anchor_weight > 0 else "predicted IoUs only"
    schedules = [
        name
        for name, schedule in (("D_up", config.pred_schedule), ("D_down", config.anchor_schedule))
        if schedule != "constant"
    ]
    return f"{HOSTS[config.host]} + {kind}" + (f", {' and '.join(schedules)}" if schedules else "")


def train_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's log that have the term. UserError if there is none."""
    rows = [row for row in read_log(run / LOG) if row.get("split") == "train" and row.get(TERM) is not None]
    if not rows:
        raise UserError(f"{run / LOG}: no training row has {TERM}")
    return rows


FIGURES: dict[str, Callable[[Sequence[Path], Path], None]] = {"dynamic-box-loss": dynamic_box_loss}


def main() -> None:
    """The command."""
    parser = cli.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help=f"one of {', '.join(FIGURES)}")
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="the picture")
    options = parser.parse_args()
    if options.name not in FIGURES:
        raise UserError(f"no figure named {options.name!r}{nearest(options.name, FIGURES)}")
    if options.out.suffix.lower() != ".png":
        raise UserError(f"--out {options.out}: a figure is a .png file")
    FIGURES[options.name](options.runs, options.out)
    print(f"written to {options.out}")


if __name__ == "__main__":
    cli.run(main)
