"""What methods share they share to the bit: plain ATSS in each of them, the batches of a seed; TOOD's profile table."""

import importlib
import re
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

import dynamic_atss.config
import dynamic_atss.losses
import dynamic_atss.model
import paa.config
import paa.losses
import paa.model
import tood_tal.config
import tood_tal.losses
import tood_tal.model
from core.anchors import AnchorGrid, anchor_grid, anchors_inside, level_shapes
from core.atss import assign_atss
from core.config import PyramidConfig
from core.data.loader import train_batches
from core.profiles import ProfileName
from core.shapes import shapes_table
from core.types import Assignment, Targets
from tests.runs import METHODS, ROOT, SQUARES
from tood_tal.profiles import TOOD_PROFILES, TOODProfile

pytestmark = pytest.mark.consistency

CANVAS, CLASSES, SCALE = (128, 192), 3, 4.0


def scene(seed: int, objects: int) -> tuple[AnchorGrid, Targets]:
    """Two images with up to `objects` objects each, the second one smaller than the canvas, one object twice."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(2, objects, 2, generator=generator) * torch.tensor([160.0, 96.0])
    half = 2 + 40 * torch.rand(2, objects, 2, generator=generator) ** 2
    boxes = torch.cat([centres - half, centres + half], dim=-1)
    boxes[:, 1:2] = boxes[:, :1]
    valid = torch.arange(objects) < torch.tensor([[objects], [objects // 2]])
    labels = torch.randint(CLASSES, (2, objects), generator=generator)
    return anchor_grid(level_shapes(CANVAS), scale=SCALE), Targets(
        boxes, labels, valid, torch.tensor([CANVAS, (90, 150)])
    )


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tood_first_phase(grid: AnchorGrid, targets: Targets) -> Assignment:
    size = len(grid.boxes)
    config = tood_tal.config.Config(anchor_scale=SCALE)
    outputs = tood_tal.model.Outputs(random(2, size, CLASSES).sigmoid(), random(2, size, 4), None, None, grid)
    return tood_tal.losses.learn(outputs, targets, config.assigns_by_atss(1, 12), config).assignment


def dynamic_without_predictions(grid: AnchorGrid, targets: Targets) -> Assignment:
    config = replace(dynamic_atss.config.PRESETS["atss_r50_1x"], anchor_scale=SCALE, profile="mmdet")
    size = len(grid.boxes)
    outputs = dynamic_atss.model.Outputs(
        random(2, size, CLASSES), random(2, size, 4), random(2, size, 1)[..., 0], None, grid
    )
    return dynamic_atss.losses.assign(outputs, targets, 1, 12, config)


def atss_beside_paa(grid: AnchorGrid, targets: Targets) -> Assignment:
    config = replace(paa.config.PRESETS["atss_centerness"], anchor_scale=SCALE, profile="mmdet")
    size = len(grid.boxes)
    outputs = paa.model.Outputs(random(2, size, CLASSES), random(2, size, 4), random(2, size, 1)[..., 0], grid)
    return paa.losses.assign(outputs, targets, config)


@pytest.mark.parametrize("method", [tood_first_phase, dynamic_without_predictions, atss_beside_paa])
@pytest.mark.parametrize("objects", [0, 2, 12])
def test_plain_atss_of_every_method_is_cores(method: Callable[[AnchorGrid, Targets], Assignment], objects: int) -> None:
    positives = 0
    for seed in range(3):
        grid, targets = scene(seed, objects)
        geometry = tood_tal.config.Config().box_geometry
        expected, _ = assign_atss(grid, targets, geometry, anchor_valid=anchors_inside(grid, targets.sizes))
        found = method(grid, targets)
        assert torch.equal(found.gt_index, expected.gt_index)
        assert torch.equal(found.labels, expected.labels)
        positives += int(found.positive.sum())
    assert (positives > 0) == (objects > 0)


def test_equal_seeds_give_methods_of_one_recipe_the_same_batches() -> None:
    """All but those of squares, which have an augmentation of their own."""
    table = shapes_table("train", 12, 0)
    seen = {}
    pyramids = [method for method in METHODS if method not in SQUARES]
    for method in pyramids:
        presets: dict[str, PyramidConfig] = importlib.import_module(f"{method}.config").PRESETS
        config = replace(presets["small"], seed=5, workers=0, batch_size=4, short_side=64, long_side=96)
        seen[method] = list(train_batches(table, config, start=0, steps=4))
    first = seen.pop(pyramids[0])
    assert not torch.equal(first[0].images, first[1].images)
    for method, batches in seen.items():
        for mine, theirs in zip(batches, first, strict=True):
            assert torch.equal(mine.images, theirs.images), method
            assert all(torch.equal(a, b) for a, b in zip(mine.targets, theirs.targets, strict=True)), method


def test_toods_profile_table_says_what_its_profiles_hold() -> None:
    text = (ROOT / "tood_tal" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)`: .* \| ([\w.-]+) \| ([\w.-]+) \| ([\w.-]+) \|$", text, flags=re.MULTILINE)

    def cell(value: object) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return f"{value:g}" if isinstance(value, float) else str(value)

    names: tuple[ProfileName, ...] = ("ours", "mmdet", "official")
    expected = [
        (field.name, *(cell(getattr(TOOD_PROFILES[name], field.name)) for name in names))
        for field in fields(TOODProfile)
    ]
    assert rows == expected
