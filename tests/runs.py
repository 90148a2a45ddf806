"""Small training runs of any method as a user starts them: command lines, in processes of their own or in this one."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from core.runlog import MACHINE_FIELDS

ROOT = Path(__file__).parents[1]
METHODS = sorted({path.parent.name for path in ROOT.glob("*/config.py")} - {"core"})
TINY = (  # a network and images that take milliseconds a step
    *(
        "--preset",
        "small",
        "--backbone-weights",
        "none",
        "--frozen-stages",
        "0",
        "--channels",
        "64",
        "--short-side",
        "64",
        "--long-side",
        "96",
    ),
    *("--log-every", "1", "--device", "cpu"),
)

SQUARES = ("padet",)  # methods whose network takes squares of a few sizes
TINY_SQUARE = (
    *("--preset", "small", "--size", "192", "--channels", "32", "--backbone-weights", "none"),
    *("--log-every", "1", "--device", "cpu"),
)
FROZEN_NORM = {"padet": ("--norm", "frozen", "--block-norm", "frozen")}  # by default each rank has its own statistics


def tiny(method: str) -> tuple[str, ...]:
    """A network and images of that method that take milliseconds a step."""
    return TINY_SQUARE if method in SQUARES else TINY


def command(module: str, *arguments: str, ranks: int = 1) -> list[str]:
    """A module's command line, under torchrun for several ranks."""
    if ranks == 1:
        return [sys.executable, "-m", module, *arguments]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *launch, "-m", module, *arguments]


def environment() -> dict[str, str]:
    """One thread a process: equal arithmetic everywhere, and no fight for the cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(module: str, *arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run to the end; fails the test with the command's own words."""
    result = subprocess.run(
        command(module, *arguments, ranks=ranks),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def call(module: str, *arguments: str) -> None:
    """A command in this process, which has loaded torch already; its mistakes arrive as UserError."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        importlib.import_module(module).main()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's log without the fields that measure the machine."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in MACHINE_FIELDS} for row in rows]


def read_checkpoint(folder: Path, name: str = "last.pt") -> dict[str, Any]:
    """A run's checkpoint as plain torch reads it."""
    content: dict[str, Any] = torch.load(folder / name, weights_only=True)
    return content


def tensors_of(value: Any, where: str = "") -> dict[str, torch.Tensor]:
    """All tensors inside nested containers, by their path."""
    if isinstance(value, torch.Tensor):
        return {where: value}
    if not isinstance(value, (dict, list, tuple)):
        return {}
    children = value.items() if isinstance(value, dict) else enumerate(value)
    return {name: tensor for key, child in children for name, tensor in tensors_of(child, f"{where}/{key}").items()}
