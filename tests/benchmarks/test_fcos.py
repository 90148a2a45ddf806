"""The FCOS baseline: the parts that are ours."""

import numpy as np
import pytest
import torch

from benchmarks.baselines import fcos
from core.data.sources import open_data
from core.evaluator import DetectionArrays


def test_learning_rate_by_hand() -> None:
    # 0.01 / 16 * 8 = 0.005; step 10 of the 50 of warm-up; a tenth after step 180 of 240
    rates = [fcos.learning_rate(step, 240, 8) for step in (10, 50, 180, 181)]
    assert rates == pytest.approx([0.001, 0.005, 0.005, 0.0005])


def test_flip_by_hand() -> None:
    image = torch.arange(10, dtype=torch.uint8).reshape(1, 1, 10)
    flipped = fcos.flip(fcos.Example(image, torch.tensor([[1.0, 2.0, 4.0, 6.0]]), torch.tensor([0])))
    assert flipped.boxes.tolist() == [[6.0, 2.0, 9.0, 6.0]]  # 10 - 4 and 10 - 1
    assert flipped.image[0, 0, 0] == 9
    assert fcos.flip(flipped).boxes.tolist() == [[1.0, 2.0, 4.0, 6.0]]


def test_above_keeps_what_exceeds_the_threshold() -> None:
    found = DetectionArrays(np.arange(3), np.arange(3), np.zeros((3, 4)), np.array([0.1, 0.2, 0.3]))
    assert fcos.above(found, 0.2).image_id.tolist() == [2]


def test_example_is_resized_with_its_boxes() -> None:
    table = open_data("shapes", seed=0, splits=("val",)).val
    example = fcos.load_example(table, 0)
    assert example.image.shape == (3, *fcos.SIZE)
    x, y, width, height = table.boxes_xywh[table.box_slice(0)][0]
    right, bottom = 342 / table.widths[0], 256 / table.heights[0]
    expected = [x * right, y * bottom, (x + width) * right, (y + height) * bottom]
    torch.testing.assert_close(example.boxes[0], torch.tensor(expected, dtype=torch.float32))


def test_one_step_trains_what_is_not_frozen_and_detects_in_image_pixels() -> None:
    torch.manual_seed(0)
    table = open_data("shapes", seed=0, splits=("val",)).val
    net = fcos.build_fcos(len(table.categories), "none")
    frozen, trained = net.backbone.body.layer1[0].conv1.weight, net.backbone.body.layer2[0].conv1.weight
    before = frozen.clone(), trained.clone()
    fcos.train(net, [fcos.load_example(table, 0)], steps=1, batch_size=1, seed=0, device=torch.device("cpu"))
    assert torch.equal(frozen, before[0])
    assert not torch.equal(trained, before[1])
    net.score_thresh = 0.0
    found = fcos.detect_image(net.eval(), table, 0, torch.device("cpu"))
    assert len(found.scores) == fcos.MAX_DETECTIONS
    assert set(found.image_id.tolist()) == {int(table.image_ids[0])}
    assert set(found.category_id.tolist()) <= {category.id for category in table.categories}
    corners = found.boxes[:, :2] + found.boxes[:, 2:]
    assert (corners <= np.array([table.widths[0], table.heights[0]]) + 1e-3).all()
