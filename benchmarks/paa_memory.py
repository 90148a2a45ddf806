"""Peak memory of PAA's assignment of an image with very many objects.

python -m benchmarks.speed paa-memory
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.atss_speed import random_targets
from core.anchors import anchor_grid, level_shapes
from core.types import Targets
from paa.config import Config
from paa.losses import assign
from paa.model import Outputs

CANVAS = (800, 1344)  # pixels; 22,400 anchors
OBJECTS, CLASSES = 1000, 80
THREADS = 2


def paa_memory_case(objects: int = OBJECTS, canvas: tuple[int, int] = CANVAS, seed: int = 0) -> dict[str, Any]:
    """Megabytes by which `paa.losses.assign` raises a fresh process at most, from the ready outputs on (Linux).

    Returns:
        name, what, peak_mb and the number of positives.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        peak, positives = fresh.submit(_measure, objects, canvas, seed).result()
    anchors = sum(height * width for height, width in level_shapes(canvas))
    return {
        "name": f"paa-memory-{objects}",
        "what": f"PAA's assignment, one image with {objects} objects, {anchors} anchors, {CLASSES} classes, CPU, "
        f"{THREADS} threads",
        "peak_mb": peak,
        "positives": positives,
    }


def _measure(objects: int, canvas: tuple[int, int], seed: int) -> tuple[float, int]:
    """Random outputs: the work is the same as with a network's, and making them leaves no freed memory to be reused."""
    torch.set_num_threads(THREADS)
    targets = Targets(*(part[:1] for part in random_targets(seed, objects, canvas)))
    grid = anchor_grid(level_shapes(canvas))
    random, anchors = torch.Generator().manual_seed(seed), len(grid.boxes)
    logits, deltas = (torch.randn(1, anchors, width, generator=random) for width in (CLASSES, 4))
    outputs = Outputs(logits, deltas, torch.randn(1, anchors, generator=random), grid)
    forget_peak()
    before = memory_mb("VmRSS")
    assignment = assign(outputs, targets, Config())
    return memory_mb("VmHWM") - before, int(assignment.positive.sum())


def forget_peak() -> None:
    """From here on the peak counts from what is in use now."""
    Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM


def memory_mb(field: str) -> float:
    """VmRSS, what this process has in memory now, or VmHWM, the most it had, in MB of 1024 x 1024 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024
