"""Batches: the same with any number of workers, ranks and starting points."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from core.config import PyramidConfig
from core.data.loader import Sample, eval_batches, padded_count, scaled_batches, train_batches
from core.data.sampler import augmentation_random, training_sampler
from core.data.sources import open_data
from core.data.table import Table
from core.errors import UserError
from core.shapes import shapes_table
from core.types import Batch
from tests.core.square import SquareConfig

CONFIG = PyramidConfig(
    data="shapes", steps=6, batch_size=4, short_side=64, short_side_min=48, long_side=100, workers=0, device="cpu"
)


@pytest.fixture
def drawn() -> Table:
    return shapes_table("train", 10, seed=3)


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for name, x, y in zip(Batch._fields, a, b, strict=True):
            assert x.dtype == y.dtype, name
            assert torch.equal(x, y), name


def batches(table: Table, config: PyramidConfig = CONFIG, start: int = 0, **ranks: Any) -> list[Batch]:
    return list(train_batches(table, config, start=start, steps=6, **ranks))


def test_workers_change_nothing(drawn: Table) -> None:
    alone = batches(drawn)
    plans = map(training_sampler(drawn, CONFIG).batch, range(1, 7))
    assert [b.image_ids.tolist() for b in alone] == [(plan.images + 1).tolist() for plan in plans]
    assert_same(alone, batches(drawn, replace(CONFIG, workers=2)))


@pytest.mark.parametrize("start", [1, 3, 5, 6])
def test_any_step_can_be_the_first(drawn: Table, start: int) -> None:
    assert_same(batches(drawn)[start:], batches(drawn, start=start))


def test_ranks_cut_the_global_batch(drawn: Table) -> None:
    shares = [batches(drawn, rank=rank, world_size=2) for rank in range(2)]
    joined = [Batch(*map(torch.cat, zip(*parts, strict=True))) for parts in zip(*shares, strict=True)]
    assert_same(batches(drawn), joined)
    with pytest.raises(UserError, match="batch_size 4 does not divide among 3 processes"):
        batches(drawn, world_size=3)


def test_seeds_differ(drawn: Table) -> None:
    assert not torch.equal(batches(drawn)[0].image_ids, batches(drawn, replace(CONFIG, seed=1))[0].image_ids)


@pytest.mark.parametrize("geometry", ["modern", "legacy"])
def test_boxes_lie_on_the_pixels(drawn: Table, geometry: str) -> None:
    """A box marked in the image is found where the batch says, flipped and resized."""

    class Marked:
        def read(self, table: Table, index: int) -> np.ndarray:
            image = np.zeros((int(table.heights[index]), int(table.widths[index]), 3), np.uint8)
            x, y, w, h = (int(side) for side in table.boxes_xywh[table.box_slice(index)][0])
            image[y : y + h, x : x + w] = 255
            return image

    object.__setattr__(drawn, "images", Marked())
    plus_one = 1.0 if geometry == "legacy" else 0.0
    for batch in batches(drawn, replace(CONFIG, geometry=geometry)):  # type: ignore[arg-type]
        for image, box in zip(batch.images, batch.boxes[:, 0], strict=True):
            mask = image[0] > 127
            columns, rows = mask.any(0).nonzero()[:, 0], mask.any(1).nonzero()[:, 0]
            found = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
            found[2:] -= plus_one
            assert (found - box).abs().max() <= 1.5, (found, box)


def test_padding_is_zero_and_flags_agree(drawn: Table) -> None:
    for batch in batches(drawn):
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous()
        height, width = batch.images.shape[-2:]
        for image, (h, w), original in zip(batch.images, batch.sizes.tolist(), batch.original_sizes, strict=True):
            assert h <= height
            assert w <= width
            assert not image[:, h:].any()
            assert not image[:, :, w:].any()
            assert image[:, h - 1, w - 1].any()
            assert abs(h / w - original[0] / original[1]) < 0.02
        assert not batch.boxes[~batch.valid].any()
        assert not batch.labels[~batch.valid].any()
        assert (batch.boxes[batch.valid][:, 2:] > batch.boxes[batch.valid][:, :2]).all()


def test_objects_of_every_image(drawn: Table) -> None:
    for batch in batches(drawn):
        for row, number in enumerate(batch.image_ids.tolist()):
            labels = drawn.labels[drawn.box_slice(number - 1)]
            assert batch.labels[row][batch.valid[row]].tolist() == labels.tolist()


def test_padded_count() -> None:
    assert [padded_count(n) for n in (0, 1, 4, 5, 6, 7, 9, 13, 17, 25, 33, 100)] == [
        4, 4, 4, 6, 6, 8, 12, 16, 24, 32, 48, 128
    ]  # fmt: skip


def test_crowd_is_never_a_target(folder: Path) -> None:
    val = open_data(str(folder)).val
    (batch,) = [b for b in eval_batches(val, CONFIG, batch_size=1) if b.image_ids.tolist() == [30]]
    assert not batch.valid.any()
    train = open_data(str(folder)).train
    config = replace(CONFIG, batch_size=2)
    assert {int(i) for b in train_batches(train, config, start=0, steps=3) for i in b.image_ids} == {10}
    config = replace(config, empty_images="keep")
    found = list(train_batches(train, config, start=0, steps=6))
    assert {int(i) for b in found for i in b.image_ids} == {10, 20, 30}
    assert all(not b.valid[b.image_ids != 10].any() for b in found)


def rows(found: Iterator[Batch]) -> list[int]:
    return [int(number) for batch in found for number in batch.image_ids]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 13])  # of ten images
def test_evaluation_sees_every_image_once(drawn: Table, world_size: int) -> None:
    parts = [rows(eval_batches(drawn, CONFIG, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert sorted(number for part in parts for number in part) == list(range(1, 11))


def test_evaluation_batches_share_only_their_own_canvas(drawn: Table) -> None:
    config = replace(CONFIG, short_side=60)
    alone = {int(b.image_ids[0]): b for b in eval_batches(drawn, replace(config, deterministic=True))}
    assert len(alone) == 10
    sizes = set()
    for batch in eval_batches(drawn, config, batch_size=3):
        sizes.add(len(batch.sizes))
        canvas = tuple(batch.images.shape[-2:])
        for row, (number, size) in enumerate(zip(batch.image_ids.tolist(), batch.sizes.tolist(), strict=True)):
            assert tuple(-(-side // 32) * 32 for side in size) == canvas
            assert torch.equal(batch.images[row], alone[number].images[0])
    assert max(sizes) == 3


@pytest.mark.parametrize(("batch_size", "world_size", "workers"), [(3, 1, 0), (4, 2, 2), (1, 1, 0)])
def test_scaled_batches_hold_the_same_images_at_every_scale(
    drawn: Table, batch_size: int, world_size: int, workers: int
) -> None:
    config = replace(CONFIG, short_side=60, short_side_min=0, batch_size=batch_size, workers=workers)
    scales = [(60, 100), (40, 100), (120, 150)]
    seen = []
    for rank in range(world_size):
        found = list(scaled_batches(drawn, config, scales, rank=rank, world_size=world_size))
        plain = list(eval_batches(drawn, config, rank=rank, world_size=world_size))
        assert_same([batch for (batch,) in found[::3]], plain)  # the configuration's own scale: one batch each
        for index, batches_of_scale in enumerate(found):
            numbers = rows(iter(batches_of_scale))
            assert sorted(numbers) == sorted(plain[index // 3].image_ids.tolist())
            scaled = replace(config, short_side=scales[index % 3][0], long_side=scales[index % 3][1])
            alone = {int(b.image_ids[0]): b for b in eval_batches(drawn, scaled, batch_size=1)}
            for batch in batches_of_scale:
                for row, number in enumerate(batch.image_ids.tolist()):
                    assert torch.equal(batch.images[row], alone[number].images[0])
                    assert torch.equal(batch.sizes[row], alone[number].sizes[0])
            if index % 3 == 2:  # four times the pixels: a quarter of the images at a time
                assert all(len(batch.image_ids) <= max(1, batch_size // world_size // 4) for batch in batches_of_scale)
        seen += [number for batch in plain for number in batch.image_ids.tolist()]
    assert sorted(seen) == list(range(1, 11))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_one_line(folder: Path, workers: int) -> None:
    config = replace(CONFIG, workers=workers, batch_size=1)
    (folder / "train2017/sub/b.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"sub/b.png: not an image") as caught:
        list(train_batches(open_data(str(folder)).train, config, start=0, steps=3))
    assert "\n" not in str(caught.value)
    Image.new("RGB", (9, 9)).save(folder / "val2017/a.png")
    with pytest.raises(UserError, match=r"a.png: is 9x9 pixels .* says 64x48"):
        list(eval_batches(open_data(str(folder)).val, config))


def test_squares(drawn: Table) -> None:
    config = SquareConfig(steps=3, batch_size=4, workers=0, device="cpu")
    found = [*train_batches(drawn, config, start=0, steps=3), *eval_batches(drawn, config)]
    assert {tuple(batch.images.shape[-2:]) for batch in found} == {(64, 64)}
    assert rows(eval_batches(drawn, config)) == list(range(1, 11))  # one canvas: in the table's order
    for batch in found:
        assert (batch.sizes == 64).all()
        for number, boxes, valid in zip(batch.image_ids.tolist(), batch.boxes, batch.valid, strict=True):
            row = number - 1
            w, h = drawn.boxes_xywh[drawn.box_slice(row), 2:].T
            # each axis has its own ratio, so a box has the same share of the image as before
            expected = np.stack([w / drawn.widths[row], h / drawn.heights[row]], axis=1)
            assert np.allclose((boxes[valid][:, 2:] - boxes[valid][:, :2]).numpy() / 64, expected, atol=1e-6)


def mark(sample: Sample, size: tuple[int, int], random: np.random.Generator) -> Sample:
    """An image that holds its own random numbers, without the first of its boxes."""
    image = random.integers(0, 256, (*size, 3), dtype=np.uint8)
    assert (sample.boxes[:, 2:] <= sample.image.shape[1::-1]).all()  # pixels of the file
    return Sample(image, sample.boxes[1:], sample.labels[1:])


def test_augmentation_is_a_function_of_seed_step_and_place(drawn: Table) -> None:
    config = SquareConfig(steps=6, batch_size=4, workers=0, device="cpu", seed=5)
    augmented: dict[str, Any] = {"steps": 6, "augment": mark}
    found = list(train_batches(drawn, config, start=0, **augmented))
    for step, batch in enumerate(found, start=1):
        plan = training_sampler(drawn, config).batch(step)
        assert batch.image_ids.tolist() == (plan.images + 1).tolist()
        for place, (image, number, valid) in enumerate(
            zip(batch.images, batch.image_ids.tolist(), batch.valid, strict=True)
        ):
            expected = augmentation_random(5, step, place).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            assert (image.permute(1, 2, 0).numpy() == expected).all()
            assert valid.sum() == max(len(drawn.labels[drawn.box_slice(number - 1)]) - 1, 0)
    assert_same(found, list(train_batches(drawn, replace(config, workers=2), start=0, **augmented)))
    assert_same(found[4:], list(train_batches(drawn, config, start=4, **augmented)))
    shares = [list(train_batches(drawn, config, start=0, rank=rank, world_size=2, **augmented)) for rank in range(2)]
    assert_same(found, [Batch(*map(torch.cat, zip(*parts, strict=True))) for parts in zip(*shares, strict=True)])


def test_coco_mini(shared: Path) -> None:
    data = open_data(str(shared / "data/coco_mini"))
    config = replace(CONFIG, short_side=800, short_side_min=0, long_side=1333, batch_size=2, profile="official")
    batch = next(iter(train_batches(data.train, config, start=0, steps=1)))
    height, width = batch.images.shape[-2:]
    assert (height % 32, width % 32) == (0, 0)
    assert min(batch.sizes[0].tolist()) == 800
    assert len(eval_rows := rows(eval_batches(data.val, replace(config, short_side=64, long_side=100)))) == 158
    assert sorted(eval_rows) == sorted(data.val.image_ids.tolist())
