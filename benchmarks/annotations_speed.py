"""Opening a COCO-train-sized annotation file: our packed table against pycocotools' `COCO()`.

    python -m benchmarks.annotations_speed

The file is generated: 118,000 images, 860,000 boxes, a polygon of 20 points for each box (real train2017 has about
that many bytes per box; pycocotools decodes the polygons, we skip them).
"""

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from core.data.parse import open_annotations
from core.data.table import COLUMNS, NoImages, Table

IMAGES, BOXES, CLASSES, POLYGON_POINTS = 118_000, 860_000, 80, 20


def measure(
    images: int = IMAGES, boxes: int = BOXES, points: int = POLYGON_POINTS, rounds: int = 2, repeats: int = 7
) -> dict[str, Any]:
    """Times in seconds, ratios to pycocotools, and the private memory that a worker gains by reading everything.

    Args:
        images: in the generated file.
        boxes: in the generated file.
        points: corners of each box's polygon; 0 leaves segmentations out.
        rounds: first opens and pycocotools' in turn, of each the fastest counts.
        repeats: later opens, of which the median counts.
    """
    from pycocotools.coco import COCO

    with tempfile.TemporaryDirectory() as folder, _cache_in(Path(folder)):
        path = Path(folder) / "instances.json"
        write_annotations(path, images, boxes, points)
        ours, theirs = [], []
        for _ in range(rounds):
            for cached in Path(folder).glob("*.table"):
                cached.unlink()
            seconds, table = _timed(lambda: open_annotations(path, NoImages()))
            ours.append(seconds)
            with contextlib.redirect_stdout(io.StringIO()):
                theirs.append(_timed(lambda: COCO(str(path)))[0])
        first, reference = min(ours), min(theirs)
        later = [_timed(lambda: open_annotations(path, NoImages()))[0] for _ in range(repeats)]
        growth = {way: _worker_growth(table, way) for way in ("fork", "spawn")}
        return {
            "images": images,
            "boxes": boxes,
            "polygon_points": points,
            "file_megabytes": round(path.stat().st_size / 1e6, 1),
            "pycocotools_s": reference,
            "first_open_s": first,
            "later_open_s": statistics.median(later),
            "first_open_ratio": first / reference,
            "later_open_ratio": statistics.median(later) / reference,
            "worker_private_megabytes": growth,
        }


def write_annotations(path: Path, images: int, boxes: int, points: int) -> None:
    """A COCO annotation file with random boxes, laid out as the official ones."""
    rng = np.random.default_rng(0)
    owners = np.sort(rng.integers(1, images + 1, boxes)).tolist()
    xywh = np.round(rng.uniform([0, 0, 4, 4], [400, 300, 200, 150], (boxes, 4)), 2).tolist()
    classes = rng.integers(1, CLASSES + 1, boxes).tolist()
    polygons = [json.dumps([np.round(rng.uniform(0, 600, 2 * points), 2).tolist()]) for _ in range(1000)]
    with path.open("w") as file:
        file.write('{"info": {"year": 2017}, "licenses": [], "images": [')
        for i in range(1, images + 1):
            entry = {"license": 1, "file_name": f"{i:012d}.jpg", "height": 480, "width": 640, "id": i}
            file.write((", " if i > 1 else "") + json.dumps(entry))
        file.write('], "annotations": [')
        for i in range(boxes):
            shape = f'"segmentation": {polygons[i % 1000]}, ' if points else ""
            x, y, width, height = xywh[i]
            file.write(
                f'{", " if i else ""}{{{shape}"area": {width * height:.4f}, "iscrowd": 0, "image_id": {owners[i]}, '
                f'"bbox": [{x}, {y}, {width}, {height}], "category_id": {classes[i]}, "id": {i + 1}}}'
            )
        names = [{"supercategory": "thing", "id": i, "name": f"thing {i}"} for i in range(1, CLASSES + 1)]
        file.write(f'], "categories": {json.dumps(names)}}}')


def read_everything(table: Table) -> float:
    """Touches every byte of a table."""
    names = sum(len(table.name(index)) for index in range(len(table)))
    return float(names + sum(getattr(table, column).sum(dtype=np.float64) for column in COLUMNS))


def private_megabytes() -> float:
    """Memory that only this process holds (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def _worker_growth(table: Table, way: str) -> float:
    context: Any = multiprocessing.get_context(way)
    source = table if way == "fork" else pickle.dumps(table)  # spawned workers open the table themselves
    receive, send = context.Pipe(duplex=False)
    worker = context.Process(target=_read_and_report, args=(source, send))
    worker.start()
    growth: float = receive.recv()
    worker.join()
    return growth


def _read_and_report(source: Table | bytes, send: Any) -> None:
    before = private_megabytes()
    read_everything(source if isinstance(source, Table) else pickle.loads(source))
    send.send(private_megabytes() - before)


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


@contextlib.contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    before = os.environ.get("ANCHORAGE_CACHE")
    os.environ["ANCHORAGE_CACHE"] = str(folder)
    try:
        yield
    finally:
        del os.environ["ANCHORAGE_CACHE"]
        if before is not None:
            os.environ["ANCHORAGE_CACHE"] = before


if __name__ == "__main__":
    print(json.dumps(measure(), indent=2))
