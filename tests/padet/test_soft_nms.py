"""Soft-NMS: golden check 10, a loop over boxes, ties, edges."""

import math
from typing import Any

import pytest
import torch

from core.boxes import box_iou
from core.nms import Candidates
from padet import soft_nms as module
from padet.soft_nms import Kernel, group_members, soft_nms, weakest_of_best

PAPER: dict[str, Any] = {"iou": 0.3, "sigma": 0.5, "floor": 0.001, "limit": 300}


def by_loop(candidates: Candidates, kernel: Kernel, iou: float, sigma: float, floor: float, limit: int) -> list[Any]:
    """(image, index, score) of what is kept, one box after the other."""
    boxes, scores, labels, images = candidates
    kept = []
    for image in sorted(set(images.tolist())):
        found = []
        for label in sorted(set(labels.tolist())):
            left = [i for i in range(len(boxes)) if images[i] == image and labels[i] == label]
            current = {i: scores[i].item() for i in left}
            while left:
                best = max(left, key=lambda i: (current[i], -i))
                left.remove(best)
                if current[best] >= floor:
                    found.append((best, current[best]))
                for i in left:
                    overlap = box_iou(boxes[best], boxes[i]).item()
                    if kernel == "gaussian":
                        current[i] *= math.exp(-(overlap**2) / sigma)
                    elif overlap > iou:
                        current[i] *= 1 - overlap
        found.sort(key=lambda pair: (-pair[1], pair[0]))
        kept += [(image, index, score) for index, score in found[:limit]]
    return kept


def scene(seed: int, count: int, classes: int = 3, images: int = 2) -> Candidates:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * 30
    boxes = torch.cat([low, low + 5 + torch.rand(count, 2, generator=generator) * 30], dim=1)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return Candidates(
        boxes, torch.rand(count, generator=generator), labels, torch.randint(0, images, (count,), generator=generator)
    )


def same(found: Candidates, expected: list[Any], given: Candidates) -> None:
    assert len(found.scores) == len(expected)
    index = torch.tensor([row[1] for row in expected], dtype=torch.int64)
    assert torch.equal(found.images, given.images[index])
    assert torch.equal(found.labels, given.labels[index])
    assert torch.equal(found.boxes, given.boxes[index])
    torch.testing.assert_close(found.scores, torch.tensor([row[2] for row in expected]), atol=1e-6, rtol=1e-5)


def one_class(boxes: list[list[float]], scores: list[float]) -> Candidates:
    zeros = torch.zeros(len(scores), dtype=torch.int64)
    return Candidates(torch.tensor(boxes, dtype=torch.float32), torch.tensor(scores), zeros, zeros)


FOUR = one_class([[0, 0, 10, 10], [0, 0, 10, 8], [20, 20, 30, 30], [5, 0, 15, 10]], [0.9, 0.8, 0.7, 0.6])


def test_linear_kernel_by_hand() -> None:
    # Check 10: IoU A-B .8, A-D 1/3, B-D 2/7: A .9, C .7, D .6 * 2/3 = .4, B .8 * .2 = .16
    found = soft_nms(FOUR, "linear", **PAPER)
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.7, 0.4, 0.16]))
    assert torch.equal(found.boxes, FOUR.boxes[[0, 2, 3, 1]])


def test_gaussian_kernel_by_hand() -> None:
    # D exp(-(1/9) / .5) * .6 = .480; B .8 * exp(-.64 / .5) = .222, then with D: * exp(-(4/49) / .5) = .189
    found = soft_nms(FOUR, "gaussian", **PAPER)
    d, b = 0.6 * math.exp(-2 / 9), 0.8 * math.exp(-1.28) * math.exp(-8 / 49)
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.7, d, b]))


def test_floor_and_limit() -> None:
    assert soft_nms(FOUR, "linear", **{**PAPER, "floor": 0.17}).scores.tolist() == pytest.approx([0.9, 0.7, 0.4])
    assert soft_nms(FOUR, "linear", **{**PAPER, "limit": 2}).scores.tolist() == pytest.approx([0.9, 0.7])
    twins = one_class([[0, 0, 10, 10], [0, 0, 10, 10]], [0.9, 0.8])
    assert soft_nms(twins, "linear", **PAPER).scores.tolist() == pytest.approx([0.9])  # 0 is below any floor
    assert soft_nms(twins, "linear", **{**PAPER, "floor": 0.0}).scores.tolist() == pytest.approx([0.9])


def test_a_class_goes_on_while_its_best_is_above_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROUNDS", 1)
    assert soft_nms(FOUR, "linear", **{**PAPER, "floor": 0.15}).scores.tolist() == pytest.approx([0.9, 0.7, 0.4, 0.16])


def test_an_iou_of_the_threshold_itself_is_no_overlap() -> None:
    # IoU 1/2 exactly, threshold 1/2
    pair = one_class([[0, 0, 10, 10], [0, 0, 10, 5]], [0.9, 0.8])
    assert soft_nms(pair, "linear", **{**PAPER, "iou": 0.5}).scores.tolist() == pytest.approx([0.9, 0.8])


def test_the_first_of_equal_scores_wins() -> None:
    pair = one_class([[0, 0, 10, 8], [0, 0, 10, 10]], [0.5, 0.5])
    found = soft_nms(pair, "linear", **PAPER)
    assert found.boxes[0].tolist() == [0, 0, 10, 8]
    assert found.scores.tolist() == pytest.approx([0.5, 0.1])


@pytest.mark.parametrize("kernel", ["linear", "gaussian"])
@pytest.mark.parametrize(("count", "limit", "rounds"), [(0, 5, 16), (1, 5, 16), (40, 300, 16), (90, 10, 4), (90, 7, 1)])
def test_against_a_loop(kernel: Kernel, count: int, limit: int, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROUNDS", rounds)
    for seed in range(5):
        given = scene(seed, count)
        settings = {**PAPER, "limit": limit, "floor": 0.05}
        same(soft_nms(given, kernel, **settings), by_loop(given, kernel, **settings), given)


def test_images_and_classes_do_not_touch_each_other() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(4, 1)
    labels, images = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1])
    given = Candidates(boxes, torch.tensor([0.6, 0.7, 0.8, 0.9]), labels, images)
    found = soft_nms(given, "linear", **PAPER)
    assert found.scores.tolist() == pytest.approx([0.7, 0.6, 0.9, 0.8])
    assert found.images.tolist() == [0, 0, 1, 1]


def test_tables_of_groups() -> None:
    assert group_members(torch.tensor([7, 3, 7, 7])).tolist() == [[1, -1, -1], [0, 2, 3]]
    assert group_members(torch.zeros(0, dtype=torch.int64)).shape == (0, 0)
    scores, images = torch.tensor([0.1, 0.5, 0.3, 0.2]), torch.tensor([2, 0, 0, 0])
    assert weakest_of_best(scores, images, 2).tolist() == [pytest.approx(0.3), 0.0, 0.0]
    assert weakest_of_best(torch.tensor([0.0, 0.5, 0.0]), torch.tensor([0, 0, 1]), 1).tolist() == [0.5, 0.0]


def test_large_table_against_the_loop() -> None:
    given = scene(9, 120, classes=1, images=1)
    same(soft_nms(given, "linear", **PAPER), by_loop(given, "linear", **PAPER), given)
