"""Matching, theta's filter and mining: golden checks 6 and 7, slow twins, ties, edges."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from core.boxes import box_iou
from core.types import BACKGROUND, IGNORED, Assignment, Targets
from padet import assigner
from padet.assigner import (
    FORCED_IOU,
    Ask,
    ask_anew,
    ask_held,
    best_free_anchors,
    best_pairs,
    chunks_of_ious,
    filter_easy_negatives,
    give_anchors,
    match_anchors,
    mine_negatives,
)


def targets_of(boxes: Tensor, valid: Tensor | None = None) -> Targets:
    """Objects (B, G, 4) with labels 10, 11, ..."""
    batch, count = boxes.shape[:2]
    labels = (10 + torch.arange(count)).repeat(batch, 1)
    valid = torch.ones(batch, count, dtype=torch.bool) if valid is None else valid
    return Targets(boxes, labels, valid, torch.full((batch, 2), 64))


def match_by_loop(anchors: Tensor, objects: Tensor, high: float = 0.5, low: float = 0.3) -> list[int]:
    """One image, one anchor and object at a time; IoUs are core's."""
    ious = [[box_iou(a, o).item() for o in objects] for a in anchors]
    result = []
    for row in ious:
        best = max(row, default=0.0)
        result.append(row.index(best) if row and best >= high else BACKGROUND if best < low else IGNORED)
    pairs = [(-ious[a][o], o, a) for a in range(len(anchors)) for o in range(len(objects)) if ious[a][o] > FORCED_IOU]
    free_objects, free_anchors = set(range(len(objects))), set(range(len(anchors)))
    for _, o, a in sorted(pairs):
        if o in free_objects and a in free_anchors:
            result[a] = o
            free_objects.remove(o)
            free_anchors.remove(a)
    return result


def scenes(seed: int, batch: int, anchors: int, objects: int) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors of each image, objects and their mask. Corners are small whole numbers: IoUs are equal all the time."""
    generator = torch.Generator().manual_seed(seed)

    def boxes(count: int, largest: int) -> Tensor:
        low = torch.randint(0, 5, (batch, count, 2), generator=generator).float()
        return torch.cat([low, low + torch.randint(1, largest, (batch, count, 2), generator=generator)], dim=-1)

    valid = torch.rand(batch, objects, generator=generator) < 0.8
    return boxes(anchors, 5), boxes(objects, 5), valid


def all_ious(boxes: Tensor, objects: Tensor) -> Tensor:
    return torch.cat([ious for _, ious in chunks_of_ious(boxes, objects)], dim=2)


def held(boxes: Tensor, objects: Tensor) -> Ask:
    """How a GPU asks."""
    return partial(ask_held, all_ious(boxes, objects))


@pytest.mark.parametrize(("asker", "chunk"), [(held, 2**17), (partial(partial, ask_anew), 40)])
@pytest.mark.parametrize("anchors", [1, 3, 12, 25])
@pytest.mark.parametrize("objects", [1, 2, 5, 9, 14])
def test_matching_against_a_loop_on_a_thousand_scenes(
    anchors: int, objects: int, asker: Callable[[Tensor, Tensor], Ask], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assigner, "CPU_PAIRS", chunk)
    monkeypatch.setattr(assigner, "asker", asker)
    boxes, present, valid = scenes(100 * anchors + objects, 50, anchors, objects)
    found = match_anchors(boxes, targets_of(present, valid))
    for image in range(50):
        numbers = valid[image].nonzero()[:, 0].tolist()
        slow = match_by_loop(boxes[image], present[image, valid[image]])
        assert found.gt_index[image].tolist() == [numbers[o] if o >= 0 else o for o in slow]
        assert found.labels[image].tolist() == [10 + numbers[o] if o >= 0 else o for o in slow]


def test_scenes_have_ties_and_conflicts() -> None:
    boxes, present, _ = scenes(1209, 50, 12, 9)
    ious = all_ious(boxes, present)
    best = ious.max(dim=2)
    assert ((ious == best.values[..., None]).sum(dim=2) > 1).any()  # an object with two best anchors
    assert any(len(set(image.tolist())) < 9 for image in best.indices)  # an anchor wanted by two objects


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
def test_ious_are_those_of_core_whatever_the_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assigner, "CPU_PAIRS", chunk)
    boxes, objects, _ = scenes(3, 4, 11, 6)
    boxes, objects = boxes + torch.rand(boxes.shape) * 0.3, objects - torch.rand(objects.shape) * 0.3
    expected = box_iou(boxes[:, None], objects[:, :, None])
    assert torch.equal(all_ious(boxes, objects), expected)
    for found, best in zip(best_pairs(boxes, objects), (*expected.max(dim=1), *expected.max(dim=2)), strict=True):
        assert torch.equal(found, best)
    shared = all_ious(boxes[0], objects)
    assert torch.equal(shared, box_iou(boxes[:1, None], objects[:, :, None]))


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
def test_the_first_of_equal_ious_whatever_the_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assigner, "CPU_PAIRS", chunk)
    boxes = torch.tensor([[20.0, 20, 24, 24], [0, 0, 4, 4], [9, 9, 12, 12], [0, 0, 4, 4]])
    best, owner, values, anchors = best_pairs(boxes, torch.tensor([[[0.0, 0, 4, 4], [0, 0, 4, 4], [90, 90, 91, 91]]]))
    assert best.tolist() == [[0, 1, 0, 1]]
    assert owner.tolist() == [[0, 0, 0, 0]]
    assert values.tolist() == [[1, 1, 0]]
    assert anchors.tolist() == [[1, 1, 0]]


def chosen(ious: list[list[float]]) -> tuple[list[int], list[bool]]:
    matrix = torch.tensor([ious])
    anchors, given = best_free_anchors(*matrix.max(dim=2), partial(ask_held, matrix))
    return anchors[0].tolist(), given[0].tolist()


def test_own_anchors_by_hand() -> None:
    # Check 6: GT0 wants a0 (.6), GT1 a2 (.35) although GT0 overlaps it more
    assert chosen([[0.6, 0.2, 0.45, 0.1, 0.4], [0.1, 0.28, 0.35, 0.05, 0.1]]) == ([0, 2], [True, True])
    # Check 6, conflict: both want a0; GT0 overlaps it more, GT1 takes a1
    assert chosen([[0.9, 0.2], [0.8, 0.3]]) == ([0, 1], [True, True])
    # GT2 displaces GT1 from a0, GT1 displaces GT0 from a1, for which a2 is left
    assert chosen([[0.5, 0.4, 0.1], [0.9, 0.8, 0.0], [0.95, 0.0, 0.0]]) == ([2, 1, 0], [True, True, True])
    # the same without IoU with a2: nothing is left
    assert chosen([[0.5, 0.4, 0.0], [0.9, 0.8, 0.0], [0.95, 0.0, 0.0]])[1] == [False, True, True]


def test_an_object_displaced_in_the_last_round_has_no_anchor() -> None:
    # GT2 keeps a1 from GT1, which then takes a0 from GT0, which asks for a1 in round 3 and is turned away
    anchors, given = chosen([[0.5, 0.1], [0.6, 0.7], [0.0, 0.9]])
    assert given == [False, True, True]
    assert anchors[1:] == [0, 1]


def test_ties_by_hand() -> None:
    assert chosen([[0.4, 0.4], [0.4, 0.4]]) == ([0, 1], [True, True])  # the first object, the first anchor
    assert chosen([[0.4], [0.4]])[1] == [True, False]
    assert chosen([[0.0, 0.0]])[1] == [False]
    assert chosen([[1e-6, 0.0]])[1] == [False]  # the IoU must be above


def test_matching_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # Check 6: a0 to GT0, a1 negative (.28), a2 forced to GT1, a3 negative, a4 (.4) ignored
    ious = torch.tensor([[[0.6, 0.2, 0.45, 0.1, 0.4], [0.1, 0.28, 0.35, 0.05, 0.1]]])
    monkeypatch.setattr(assigner, "best_pairs", lambda *_: (*ious.max(dim=1), *ious.max(dim=2)))
    monkeypatch.setattr(assigner, "asker", lambda *_: partial(ask_held, ious.clone()))
    found = match_anchors(torch.zeros(5, 4), targets_of(torch.zeros(1, 2, 4)))
    assert found.gt_index.tolist() == [[0, BACKGROUND, 1, BACKGROUND, IGNORED]]
    assert found.labels.tolist() == [[10, BACKGROUND, 11, BACKGROUND, IGNORED]]


def test_thresholds_include_their_own_value() -> None:
    # IoU exactly 1/2 is positive; exactly .25 is ignored when negatives are below .25
    anchors = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 2], [0, 0, 2, 2], [0, 0, 2, 1]])
    found = match_anchors(anchors, targets_of(torch.tensor([[[0.0, 0, 4, 4]]])), 0.5, 0.25)
    assert found.gt_index.tolist() == [[0, 0, IGNORED, BACKGROUND]]


@pytest.mark.parametrize("count", [0, 3])
def test_images_without_objects_have_only_negatives(count: int) -> None:
    anchors = torch.tensor([[0.0, 0, 4, 4], [2, 2, 9, 9]])
    padding = torch.tensor([0.0, 0, 4, 4]).expand(2, count, 4)  # a box that would match, were it an object
    found = match_anchors(anchors, targets_of(padding, torch.zeros(2, count, dtype=torch.bool)))
    assert found.gt_index.tolist() == [[BACKGROUND] * 2] * 2
    assert found.labels.tolist() == [[BACKGROUND] * 2] * 2


def test_more_objects_than_anchors_and_objects_without_area() -> None:
    same = torch.tensor([[[0.0, 0, 4, 4]] * 3])
    assert match_anchors(same[0, :2], targets_of(same)).gt_index.tolist() == [[0, 1]]
    flat = torch.tensor([[[2.0, 2, 2, 3], [0, 0, 4, 4]]])
    assert match_anchors(same[0, :2], targets_of(flat)).gt_index.tolist() == [[1, 1]]


def test_no_object_is_lost_where_anchors_crowd() -> None:
    # twenty equal objects on twenty equal promoted anchors: one each
    boxes = torch.tensor([8.0, 8, 24, 24]).expand(1, 20, 4)
    assert match_anchors(boxes, targets_of(boxes)).gt_index.tolist() == [list(range(20))]


def test_give_anchors_takes_nothing_from_others() -> None:
    index = torch.tensor([[0, BACKGROUND, IGNORED]])
    given = give_anchors(index, torch.tensor([[2, 0]]), torch.tensor([[True, False]]))
    assert given.tolist() == [[0, BACKGROUND, 0]]


def test_theta_filter_by_hand() -> None:
    # Check 7: a positive of .001 stays, a negative of .005 goes, one of .02 and one of theta itself stay
    logits = torch.tensor([[0.001, 0.005, 0.02, 0.01, 0.001]], dtype=torch.float64).logit()
    index = torch.tensor([[3, BACKGROUND, BACKGROUND, BACKGROUND, IGNORED]])
    theta = logits[0, 3].sigmoid().item()
    kept = filter_easy_negatives(Assignment(index, index), logits, theta)
    assert kept.gt_index.tolist() == [[3, IGNORED, BACKGROUND, BACKGROUND, IGNORED]]
    assert torch.equal(kept.labels, kept.gt_index)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (2.0, [[0, IGNORED, BACKGROUND, BACKGROUND, IGNORED], [IGNORED] * 5]),  # losses 3 and 2 of 1, 3, 2
        (1.0, [[0, IGNORED, BACKGROUND, IGNORED, IGNORED], [IGNORED] * 5]),
        (9.0, [[0, BACKGROUND, BACKGROUND, BACKGROUND, IGNORED], [IGNORED] * 5]),
    ],
)
def test_mining_by_hand(ratio: float, expected: list[list[int]]) -> None:
    index = torch.tensor([[0, BACKGROUND, BACKGROUND, BACKGROUND, IGNORED], [BACKGROUND] * 5])
    losses = torch.tensor([[9.0, 1, 3, 2, 9], [1, 2, 3, 4, 5]])  # the second image has no positive
    assert mine_negatives(Assignment(index, index), losses, ratio).gt_index.tolist() == expected


def test_mining_keeps_the_first_of_equal_losses() -> None:
    index = torch.tensor([[0, BACKGROUND, BACKGROUND, BACKGROUND]])
    assert mine_negatives(Assignment(index, index), torch.zeros(1, 4), 1.0).gt_index.tolist() == [
        [0, BACKGROUND, IGNORED, IGNORED]
    ]
