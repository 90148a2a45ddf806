"""NMS over a batch: worked cases in both geometries, a slow twin, ties and empty input."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from core.boxes import box_iou
from core.geometry import LEGACY, MODERN, Geometry
from core.nms import (
    Candidates,
    batched_nms,
    best_in_groups,
    chosen,
    level_groups,
    nms_indices,
    suppress,
    to_detections,
)


def candidates_of(
    boxes: Sequence[Sequence[float]],
    scores: list[float],
    labels: list[int] | None = None,
    images: list[int] | None = None,
) -> Candidates:
    zeros = [0] * len(boxes)
    return Candidates(
        torch.tensor(boxes).reshape(-1, 4).float(),
        torch.tensor(scores),
        torch.tensor(labels or zeros, dtype=torch.long),
        torch.tensor(images or zeros, dtype=torch.long),
    )


def test_best_in_groups_by_hand() -> None:
    scores = torch.tensor([0.1, 0.9, 0.5, 0.5, 0.7, 0.5])
    groups = torch.tensor([2, 0, 2, 2, 0, 2])
    assert best_in_groups(scores, groups, 1).tolist() == [1, 2]
    assert best_in_groups(scores, groups, 2).tolist() == [1, 4, 2, 3]
    assert best_in_groups(scores, groups, 2, keep_ties=True).tolist() == [1, 4, 2, 3, 5]
    assert best_in_groups(scores, groups, 1, keep_ties=True).tolist() == [1, 2, 3, 5]
    assert best_in_groups(scores, groups, 9).tolist() == [1, 4, 2, 3, 5, 0]
    assert best_in_groups(scores[:0], groups[:0], 1, keep_ties=True).tolist() == []
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        best_in_groups(scores, groups, 0)


def test_groups_of_levels_by_hand() -> None:
    assert level_groups(2, [3, 1, 2]).tolist() == [[0, 0, 0, 1, 2, 2], [3, 3, 3, 4, 5, 5]]
    assert level_groups(0, [3, 1]).shape == (0, 4)


def test_chosen_places_by_hand() -> None:
    expected = [[False, True, False], [False, False, True]]
    assert chosen(torch.tensor([5, 1, 5]), (2, 3)).tolist() == expected
    assert not chosen(torch.tensor([], dtype=torch.long), (2, 3)).any()
    assert chosen(torch.tensor([], dtype=torch.long), (0, 3)).shape == (0, 3)


def test_threshold_is_strict() -> None:
    pair = candidates_of([[0, 0, 10, 10], [0, 0, 10, 5]], [0.9, 0.8])  # IoU exactly 1/2
    assert suppress(pair, 0.5).tolist() == [0, 1]
    assert suppress(pair, 0.4999).tolist() == [0]


def test_geometry_by_hand() -> None:
    # modern IoU 1/4; legacy: intersection 2 x 1 of 2 x 1 and 5 x 1 pixels ... the columns 0..1 of 0..4: 2 / 5
    pair = candidates_of([[0, 0, 4, 0.01], [0, 0, 1, 0.01]], [0.9, 0.8])
    assert suppress(pair, 0.3, MODERN).tolist() == [0, 1]
    assert suppress(pair, 0.3, LEGACY).tolist() == [0]


def test_large_coordinates_keep_their_ious() -> None:
    # IoU 0.599996 and 0.600004 of classes 79 and 78, 1/40 of the rounding that float32 makes at 79 * 4000 pixels
    pair = candidates_of(
        [[0, 0, 7, 7], [0, 2.80003, 7, 7], [3990, 3990, 4000, 4000], [0, 0, 7, 7], [0, 2.79997, 7, 7]],
        [0.9, 0.8, 0.1, 0.9, 0.8],
        [79, 79, 0, 78, 78],
    )
    assert suppress(pair, 0.6).sort()[0].tolist() == [0, 1, 2, 3]


def slow_nms(candidates: Candidates, threshold: float, count: int, geometry: Geometry) -> list[int]:
    """One image after the other, one box after the other."""
    result: list[int] = []
    order = candidates.scores.argsort(descending=True, stable=True).tolist()
    for image in sorted(set(candidates.images.tolist())):
        kept: list[int] = []
        for row in order:
            same = [k for k in kept if candidates.labels[k] == candidates.labels[row]]
            free = all(box_iou(candidates.boxes[k], candidates.boxes[row], geometry) <= threshold for k in same)
            if candidates.images[row] == image and free:
                kept.append(row)
        result += kept[:count]
    return result


def random_candidates(count: int, seed: int) -> Candidates:
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    corners = integers(60, count, 2).float()
    boxes = torch.cat([corners, corners + integers(40, count, 2)], dim=1)  # some without area
    return Candidates(boxes, integers(50, count) / 50, integers(3, count) * 7, integers(4, count))


@pytest.mark.parametrize("geometry", [MODERN, LEGACY])
@pytest.mark.parametrize(("count", "seed"), [(0, 0), (1, 1), (2, 2), (40, 3), (120, 4)])
def test_equals_slow_twin(count: int, seed: int, geometry: Geometry) -> None:
    candidates = random_candidates(count, seed)
    found = nms_indices(candidates, 0.45, 12, geometry)
    assert found.tolist() == slow_nms(candidates, 0.45, 12, geometry)


def test_one_call_an_image_equals_one_call_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU, run here: classes only kept apart by their offset."""
    candidates = random_candidates(200, 5)
    expected = suppress(candidates, 0.45).sort()[0]
    monkeypatch.setattr(Tensor, "is_cuda", True)
    assert suppress(candidates, 0.45).sort()[0].tolist() == expected.tolist()


def test_detections_are_padded_by_falling_score() -> None:
    boxes = [[0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60], [0, 0, 10, 10], [0, 0, 10, 10]]
    detections = batched_nms(
        candidates_of(boxes, [0.5, 0.75, 0.25, 0.5, 0.9], [0, 0, 0, 1, 0], [2, 2, 2, 2, 0]), 3, 0.6, 2
    )
    assert detections.valid.tolist() == [[True, False], [False, False], [True, True]]
    assert detections.scores.tolist() == [[pytest.approx(0.9), 0], [0, 0], [0.75, 0.5]]
    assert detections.labels.tolist() == [[0, 0], [0, 0], [0, 1]]
    assert detections.boxes[2].tolist() == [boxes[1], boxes[3]]
    assert not detections.boxes[1].any()


def test_no_candidates() -> None:
    detections = batched_nms(candidates_of([], [], [], []), 2, 0.6, 100)
    assert detections.boxes.shape == (2, 0, 4)
    assert detections.valid.shape == (2, 0)
    assert to_detections(candidates_of([], []), 0).scores.shape == (0, 0)
