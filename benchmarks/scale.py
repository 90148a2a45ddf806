"""A training set of 2 million images and 30 million boxes: opening it, memory, and how fast batches are planned.

    python -m benchmarks.scale                                             # needs 2 GB of disk and 8 GB of memory
    python -m benchmarks.scale --out benchmarks/results/scale.json         # kept for the README's table

The table is drawn at random and written by the code that caches annotation files; parsing is measured on a JSON file of
a tenth of the size, as that of the whole would have four gigabytes.
"""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.annotations_speed import private_megabytes, write_annotations
from core import cli
from core.data.parse import open_annotations
from core.data.sampler import training_sampler
from core.data.table import Category, NoImages, Table, cached_table, pack_names
from core.runlog import environment, write_json
from paa.config import Config

IMAGES, BOXES, CLASSES = 2_000_000, 30_000_000, 365
PLANS = 2000  # batches planned
KEY = {"drawn": 1}


def drawn_table(images: int, boxes: int) -> Table:
    """A table with random sizes and boxes, about a third of the images upright."""
    rng = np.random.default_rng(0)
    long, short = rng.integers(480, 1025, images), rng.integers(320, 769, images)
    upright = rng.random(images) < 0.33
    offsets, names = pack_names([f"patch{i % 50}/{i:09d}.jpg" for i in range(images)])
    sides = rng.uniform([0, 0, 4, 4], [300, 300, 200, 200], (boxes, 4))
    owners = np.bincount(rng.integers(0, images, boxes), minlength=images)
    return Table(
        categories=tuple(Category(i, f"thing {i}") for i in range(1, CLASSES + 1)),
        image_ids=np.arange(1, images + 1),
        heights=np.where(upright, long, short).astype(np.int32),
        widths=np.where(upright, short, long).astype(np.int32),
        name_offsets=offsets,
        name_bytes=names,
        box_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(owners)]),
        boxes_xywh=sides,
        labels=rng.integers(0, CLASSES, boxes, dtype=np.int32),
        crowd=np.zeros(boxes, bool),
        areas=sides[:, 2] * sides[:, 3],
        annotation_ids=np.arange(1, boxes + 1),
        difficult=np.zeros(boxes, bool),
        images=NoImages(),
        source="drawn",
    )


def measure(images: int = IMAGES, boxes: int = BOXES, plans: int = PLANS, folder: Path | None = None) -> dict[str, Any]:
    """Seconds and megabytes; each part in a process of its own.

    Args:
        images: of the table.
        boxes: of the table.
        plans: batches of 16 planned, half of them at the start of an epoch and half across its end.
        folder: for the files, which are deleted again; default the system's.
    """
    before = os.environ.get("ANCHORAGE_CACHE")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        os.environ["ANCHORAGE_CACHE"] = place
        try:
            written = _apart(_write, images, boxes)
            size = sum(file.stat().st_size for file in Path(place).glob("*.table"))
            opened = [_apart(_open) for _ in range(2)]
            path = Path(place, "instances.json")
            _apart(write_annotations, path, images // 10, boxes // 10, 0)
            parsed = _apart(_parse, path)
            return {
                "images": images,
                "boxes": boxes,
                "table_megabytes": size / 1e6,
                "write": written,
                "open": min(opened, key=lambda one: one["open_s"]),
                "plan": _apart(_plan, plans),
                "workers": {way: _worker_growth(way, plans) for way in ("fork", "spawn")},
                "json": parsed,
            }
        finally:
            del os.environ["ANCHORAGE_CACHE"]
            if before is not None:
                os.environ["ANCHORAGE_CACHE"] = before


def _apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a new process, whose memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def _opened(build: Callable[[], Table] | None = None) -> Table:
    return cached_table("scale", KEY, build or _unwanted, NoImages())


def _unwanted() -> Table:
    raise ValueError("the cached table was not found")


def _write(images: int, boxes: int) -> dict[str, float]:
    table = drawn_table(images, boxes)
    start = time.perf_counter()
    _opened(lambda: table)
    return {"write_s": time.perf_counter() - start}


def _open() -> dict[str, float]:
    before, start = private_megabytes(), time.perf_counter()
    _opened()
    seconds = time.perf_counter() - start
    return {"open_s": seconds, "private_megabytes": private_megabytes() - before}


def _plan(plans: int) -> dict[str, float]:
    table, config = _opened(), Config(batch_size=16)
    before, start = private_megabytes(), time.perf_counter()
    sampler = training_sampler(table, config)
    made = time.perf_counter()
    sampler.batch(1)
    first = time.perf_counter()
    seam = len(table) // 16 - plans // 4
    steps = [*range(2, plans // 2 + 2), *range(seam, seam + plans // 2)]
    for step in steps:
        sampler.batch(step)
    return {
        "sampler_s": made - start,
        "first_batch_s": first - made,
        "batches_per_second": len(steps) / (time.perf_counter() - first),
        "private_megabytes": private_megabytes() - before,
        "peak_resident_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _worker_growth(way: str, plans: int) -> dict[str, float]:
    """What a worker holds for itself after planning batches, and how long it takes to be ready."""
    context: Any = multiprocessing.get_context(way)
    receive, send = context.Pipe(duplex=False)
    sampler = training_sampler(_opened(), Config(batch_size=16))
    start = time.perf_counter()
    worker = context.Process(target=_work, args=(sampler, send, plans))
    worker.start()
    ready, growth = receive.recv()
    worker.join()
    return {"ready_s": ready - start, "private_megabytes": growth}


def _work(sampler: Any, send: Any, plans: int) -> None:
    ready, before = time.perf_counter(), private_megabytes()
    for step in range(1, plans // 4 + 1):
        sampler.batch(step)
    send.send((ready, private_megabytes() - before))


def _parse(path: Path) -> dict[str, float]:
    size, before, start = path.stat().st_size / 1e6, _peak(), time.perf_counter()
    table = open_annotations(path, NoImages())
    first = time.perf_counter() - start
    return {
        "images": len(table),
        "boxes": len(table.boxes_xywh),
        "file_megabytes": size,
        "first_open_s": first,
        "peak_megabytes": _peak() - before,
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """The command."""
    parser = cli.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES, metavar="N", help="of the table [2,000,000]")
    parser.add_argument("--boxes", type=int, default=BOXES, metavar="N", help="of the table [30,000,000]")
    parser.add_argument("--folder", type=Path, help="for the files, deleted again [the system's]")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers and where they come from")
    options = parser.parse_args()
    measured = measure(options.images, options.boxes, folder=options.folder)
    print(json.dumps(measured, indent=2))
    if options.out:
        facts = environment(torch.device("cpu"), 1, {}) | {"seeds": [0]}
        facts["licence_note"] = "Data: generated in the benchmarks, no licence."
        write_json(options.out, facts | measured)


if __name__ == "__main__":
    cli.run(main)
