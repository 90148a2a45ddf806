"""From JPEG files to batches: our loader against PIL and floats, the usual way with torchvision.

    python -m benchmarks.loader_speed

Both decode 640x480 JPEG files, resize them to 1067x800 by Pillow's bilinear filter, mirror half of them and pad them
into batches of 8. Ours are bytes, which the device normalises later; theirs are normalised floats.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional

from core.data.loader import train_batches
from core.data.sampler import BatchPlan, training_sampler
from core.data.sources import open_data
from core.data.table import Table
from paa.config import Config

FILES, BATCH, BATCHES, ROUNDS = 32, 8, 6, 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PillowFloats(Dataset[Any]):
    """The same images in the same order as floats, one at a time."""

    def __init__(self, table: Table, folder: Path, plans: list[BatchPlan]) -> None:
        self.files = [folder / table.name(int(row)) for plan in plans for row in plan.images]
        self.flips = [bool(flip) for plan in plans for flip in plan.flips]
        self.size = plans[0].short_side

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.files[index]) as file:
            image = file.convert("RGB")
        scale = self.size / min(image.size)
        size = (int(image.width * scale + 0.5), int(image.height * scale + 0.5))
        image = image.resize(size, Image.Resampling.BILINEAR)
        if self.flips[index]:
            image = functional.hflip(image)
        return functional.normalize(functional.to_tensor(image), MEAN, STD)


def collate(images: list[torch.Tensor]) -> torch.Tensor:
    """Images in the corner of a batch whose sides are multiples of 32."""
    height, width = (-(-max(image.shape[side] for image in images) // 32) * 32 for side in (1, 2))
    batch = torch.zeros(len(images), 3, height, width)
    for place, image in zip(batch, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return batch


def write_images(folder: Path) -> Path:
    """A COCO folder of noisy slopes, about as many bytes a file as COCO's have; its folder of images."""
    rng = np.random.default_rng(0)
    (folder / "annotations").mkdir()
    images = folder / "train"
    images.mkdir()
    y, x = np.mgrid[:480, :640]
    for number in range(1, FILES + 1):
        slopes = np.stack([x * 200 // 640, y * 200 // 480, (x * number + y) % 200], axis=2)
        pixels = (slopes + rng.integers(0, 55, (480, 640, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.jpg", quality=85)
    numbers = range(1, FILES + 1)
    content = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": 480, "width": 640} for n in numbers],
        "annotations": [{"id": n, "image_id": n, "category_id": 1, "bbox": [9, 9, 50, 60]} for n in numbers],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return images


def loader_cases(workers: tuple[int, ...] = (0, 1, 2), rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Milliseconds an image of both ways, for each number of workers; the fastest of some rounds in turn counts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as place:
            images = write_images(Path(place))
            table = open_data(place).train
            size = sum(file.stat().st_size for file in images.iterdir()) / FILES / 1000
            return [_case(table, images, count, rounds, size) for count in workers]
    finally:
        torch.set_num_threads(threads)


def _case(table: Table, folder: Path, workers: int, rounds: int, kilobytes: float) -> dict[str, Any]:
    config = Config(batch_size=BATCH, workers=workers, short_side=800, long_side=1333, seed=0)
    plans = [training_sampler(table, config).batch(step) for step in range(1, BATCHES + 2)]

    def ours() -> Iterator[torch.Tensor]:
        for batch in train_batches(table, config, start=0, steps=BATCHES + 1):
            yield batch.images

    def theirs() -> Iterator[torch.Tensor]:
        yield from DataLoader(
            PillowFloats(table, folder, plans), batch_size=BATCH, num_workers=workers, collate_fn=collate
        )

    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        times["ours"].append(_seconds_an_image(ours))
        times["theirs"].append(_seconds_an_image(theirs))
    first, second = next(ours()), next(theirs())
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    own = ((first / 255 - mean) / std)[:, :, :800, :1067]
    fastest = {name: min(values) for name, values in times.items()}
    return {
        "name": f"loader-{workers}",
        "what": f"an image from a JPEG file of 640x480 and {kilobytes:.0f} kB into a batch at 1067x800, 1 thread, "
        + (f"{workers} worker{'s' * (workers > 1)}" if workers else "no workers"),
        "reference_ms": fastest["theirs"] * 1000,
        "ours_ms": fastest["ours"] * 1000,
        "images_per_second": {name: 1 / value for name, value in fastest.items()},
        "rounds_s": times,
        "equal": bool(torch.allclose(own, second[:, :, :800, :1067], atol=1e-5)),
    }


def _seconds_an_image(batches: Callable[[], Iterator[torch.Tensor]]) -> float:
    """From the first batch on, so that starting workers does not count."""
    stream = batches()
    next(stream)
    start = time.perf_counter()
    count = sum(len(images) for images in stream)
    return (time.perf_counter() - start) / count


if __name__ == "__main__":
    print(json.dumps(loader_cases(), indent=2))
