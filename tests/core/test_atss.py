from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from core.anchors import AnchorGrid, anchor_grid, anchors_inside, level_shapes
from core.atss import adaptive_threshold, assign_atss, atss_candidates, labels_of, nearest_cells, resolve_conflicts
from core.boxes import box_centres, box_iou, centres_inside
from core.geometry import LEGACY, MODERN, Geometry
from core.losses import centerness_target
from core.types import BACKGROUND, IGNORED, Assignment, Targets
from tests.conftest import golden_arrays
from tests.core.operators import Recorder


def padded(images: list[Tensor], sizes: Tensor, extra: int = 0) -> Targets:
    """Targets of images with these boxes, `extra` padding rows more than needed; labels count up from 0."""
    count = max(len(boxes) for boxes in images) + extra
    boxes = torch.zeros(len(images), count, 4)
    for row, image in zip(boxes, images, strict=True):
        row[: len(image)] = image
    valid = torch.arange(count) < torch.tensor([len(image) for image in images])[:, None]
    return Targets(boxes, torch.arange(count).expand(len(images), -1) % 80 * valid, valid, sizes)


# the obvious twin


def nearest_one_by_one(points: Tensor, centre: Tensor, numbers: list[int], k: int) -> list[int]:
    """The k of these anchors nearest to a centre, by (distance, number)."""
    gaps = points.double() - centre.double()
    distances = (gaps[:, 0] ** 2 + gaps[:, 1] ** 2).tolist()
    return sorted(numbers, key=lambda number: (distances[number], number))[:k]


def assign_one_by_one(
    grid: AnchorGrid, boxes: Tensor, geometry: Geometry, k: int, anchor_valid: list[bool]
) -> tuple[list[int], list[float]]:
    """ATSS of one image as the paper's Algorithm 1 tells it, object by object, anchor by anchor."""
    owner, quality = [BACKGROUND if valid else IGNORED for valid in anchor_valid], [0.0] * len(anchor_valid)
    ious = box_iou(grid.boxes[:, None], boxes[None], geometry)
    inside = centres_inside(grid.points[:, None], boxes[None])
    for g, centre in enumerate(box_centres(boxes)):
        candidates, first = [], 0
        for size in grid.level_sizes:
            numbers = [a for a in range(first, first + size) if anchor_valid[a]]
            candidates += nearest_one_by_one(grid.points, centre, numbers, k)
            first += size
        values = np.array([ious[a, g].item() for a in candidates])
        if len(values) < 2:
            continue
        threshold = values.mean() + values.std(ddof=1)
        for a, value in zip(candidates, values.tolist(), strict=True):
            if value >= threshold and inside[a, g] and value > quality[a]:
                owner[a], quality[a] = g, value
    return owner, quality


def random_scene(count: int, canvas: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Boxes inside, across and beyond the canvas; many on whole or half strides, some twice, some tiny or huge."""
    height, width = canvas
    centres = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 1.4 - 0.2 * max(canvas)
    sides = 2 ** (torch.rand(count, 2, generator=generator) * 9)
    kind = torch.randint(5, (count, 1), generator=generator)
    centres = torch.where(kind == 0, (centres / 8).round() * 8, centres)
    centres = torch.where(kind == 1, (centres / 8).round() * 8 + 4, centres)
    sides = torch.where(kind <= 1, (sides / 2).ceil() * 2, sides)
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=-1)
    return torch.where(kind == 2, boxes.roll(1, 0), boxes)


CANVASES = [(8, 8), (32, 32), (64, 256), (160, 96), (288, 320)]


@pytest.mark.parametrize("geometry", [MODERN, LEGACY], ids=["modern", "legacy"])
@pytest.mark.parametrize("canvas", CANVASES, ids=str)
def test_against_the_twin(canvas: tuple[int, int], geometry: Geometry) -> None:
    generator = torch.Generator().manual_seed(canvas[0] + canvas[1])
    grid = anchor_grid(level_shapes(canvas), geometry)
    images = [random_scene(count, canvas, generator) for count in (0, 1, 2, 9, 60)]
    sizes = torch.rand(len(images), 2, generator=generator) * torch.tensor(canvas)
    targets = padded(images, sizes.ceil().long(), extra=2)
    for anchor_valid in (None, anchors_inside(grid, targets.sizes)):
        assignment, iou = assign_atss(grid, targets, geometry, anchor_valid=anchor_valid)
        for image, boxes in enumerate(images):
            mask = [True] * len(grid.boxes) if anchor_valid is None else anchor_valid[image].tolist()
            owner, quality = assign_one_by_one(grid, boxes, geometry, 9, mask)
            assert assignment.gt_index[image].tolist() == owner
            assert iou[image].tolist() == quality
            assert assignment.labels[image].tolist() == owner  # labels count up from 0


@pytest.mark.parametrize("k", [1, 2, 5, 13])
def test_other_numbers_of_candidates(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    grid = anchor_grid(level_shapes((96, 160)))
    boxes = random_scene(30, (96, 160), generator)
    assignment, _ = assign_atss(grid, padded([boxes], torch.tensor([[96, 160]])), MODERN, k)
    assert assignment.gt_index[0].tolist() == assign_one_by_one(grid, boxes, MODERN, k, [True] * len(grid.boxes))[0]


@pytest.mark.parametrize("shape", [(1, 1), (1, 20), (20, 1), (2, 3), (9, 9), (30, 24)])
def test_nearest_cells_wherever_the_centre_lies(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    height, width = shape
    spread = torch.tensor([1.0, 4, 40, 1e4, 1e7])[torch.randint(5, (300, 1), generator=generator)]
    centres = (torch.randn(300, 2, generator=generator) * spread + torch.tensor([width / 2, height / 2])).double()
    centres[::2] = (centres[::2] * 2).round() / 2  # cells and midpoints: equal distances
    points = torch.tensor([[column, row] for row in range(height) for column in range(width)])
    for rows, columns in {(height, width), (-(-height // 2), width), (1, -(-width // 3))}:
        numbers = [n for n in range(height * width) if n // width < rows and n % width < columns]
        index, exists = nearest_cells(centres[None], shape, torch.tensor([[columns, rows]]), 9)
        for centre, found, there in zip(centres, index[0].tolist(), exists[0].tolist(), strict=True):
            expected = nearest_one_by_one(points, centre, numbers, 9)
            assert [cell for cell, ok in zip(found, there, strict=True) if ok] == expected


# candidates


def test_candidates_by_hand() -> None:
    # one level of 3 x 4 cells, stride 8, modern: points at 0, 8, 16, 24. Centre (8, 8) is cell 5.
    # then its four neighbours 1, 4, 6, 9 at 8 px, by number, then the corners 0, 2, 8, 10 at 11.3 px
    grid = anchor_grid(((3, 4),), strides=(8,))
    boxes = torch.tensor([[[4.0, 4, 12, 12]]])
    found = atss_candidates(grid, boxes, torch.tensor([[True]]), MODERN)
    assert found.anchor_index.tolist() == [[[5, 1, 4, 6, 9, 0, 2, 8, 10]]]
    assert found.valid.all()
    three = atss_candidates(grid, boxes, torch.tensor([[True]]), MODERN, k=3)
    assert three.anchor_index.tolist() == [[[5, 1, 4]]]


def test_candidates_skip_padding_anchors_and_padding_objects() -> None:
    grid = anchor_grid(((3, 4),), strides=(8,))
    boxes = torch.tensor([[4.0, 4, 12, 12]]).repeat(2, 2, 1)
    left = torch.tensor([[True, False, False, False]] * 3).flatten()  # only the first column of the first image
    anchor_valid = torch.stack([left, torch.ones(12, dtype=torch.bool)])
    found = atss_candidates(
        grid, boxes, torch.tensor([[True, False], [False, True]]), MODERN, anchor_valid=anchor_valid
    )
    assert found.anchor_index[0].tolist() == [[4, 0, 8] + [0] * 6, [0] * 9]
    assert found.valid.sum(dim=-1).tolist() == [[3, 0], [0, 9]]


def test_an_image_without_valid_anchors() -> None:
    grid = anchor_grid(level_shapes((64, 64)))
    targets = padded([torch.tensor([[8.0, 8, 40, 40]])], torch.tensor([[0, 0]]))
    anchor_valid = torch.zeros(1, len(grid.boxes), dtype=torch.bool)
    assert not atss_candidates(grid, targets.boxes, targets.valid, MODERN, anchor_valid=anchor_valid).valid.any()
    assignment, iou = assign_atss(grid, targets, MODERN, anchor_valid=anchor_valid)
    assert (assignment.gt_index == IGNORED).all()
    assert (iou == 0).all()


def test_distances_are_compared_in_float64() -> None:
    # x is the float32 above 4, so column 1 (x = 8) is nearer than column 0 by a millionth of a pixel; four rows above
    # the centre both distances are 32.2 px in float32, and the lower number would come first
    x = np.nextafter(np.float32(4), np.float32(5)).item()
    grid = anchor_grid(((1, 2),), strides=(8,))
    found = atss_candidates(grid, torch.tensor([[[x, 32, x, 32]]]), torch.tensor([[True]]), MODERN, k=2)
    assert found.anchor_index.tolist() == [[[1, 0]]]


def test_k_must_be_positive() -> None:
    grid = anchor_grid(((1, 1),), strides=(8,))
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        atss_candidates(grid, torch.zeros(1, 1, 4), torch.tensor([[True]]), MODERN, k=0)


# threshold and conflicts


def test_adaptive_threshold_by_hand() -> None:
    # spec PAA section 13, check 17. mean .3, deviations .04 + .01 + 0 + .01 + .04 over 4: std .158114
    rising, one_low = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]), torch.tensor([0.1, 0.5, 0.5, 0.5, 0.9])
    valid = torch.tensor([[True] * 5, [True] * 4 + [False]])  # mean .4, (.09 + 3 * .01) / 3: std .2
    thresholds = adaptive_threshold(torch.stack([rising, one_low])[None], valid[None])[0]
    torch.testing.assert_close(thresholds, torch.tensor([0.458114, 0.6]).double(), rtol=0, atol=1e-6)
    assert (rising >= thresholds[0]).sum() == 1
    assert (one_low[:4] >= thresholds[1]).sum() == 0


def test_threshold_is_reached_by_equal_ious() -> None:
    value = torch.rand(50, generator=torch.Generator().manual_seed(0))
    thresholds = adaptive_threshold(value[None, :, None].expand(1, 50, 45), torch.ones(1, 50, 45, dtype=torch.bool))
    assert torch.equal(thresholds[0], value.double())


def test_equal_candidates_are_all_positive() -> None:
    # centre between four cells, 4 px from each in x and y: four equal IoUs, deviation 0, threshold their value
    grid = anchor_grid(((4, 4),), strides=(8,))
    targets = padded([torch.tensor([[4.0, 4, 20, 20]])], torch.tensor([[32, 32]]))
    assignment, _ = assign_atss(grid, targets, MODERN, k=4)
    assert assignment.positive[0].nonzero()[:, 0].tolist() == [5, 6, 9, 10]


def test_one_candidate_has_no_deviation() -> None:
    threshold = adaptive_threshold(torch.tensor([[[0.7, 0.0]]]), torch.tensor([[[True, False]]]))
    assert not (torch.tensor(1.0) >= threshold).any()


def test_conflicts_by_hand() -> None:
    # anchor 3: objects 0, 1, 2 offer .5, .7, .7 -> the first best, 1. anchor 1: only 2 wants it, at quality 0.
    # anchor 0: 0 has .9 there but does not want it
    index = torch.tensor([[[3, 0], [3, 0], [3, 1]]])
    positive = torch.tensor([[[True, False], [True, False], [True, True]]])
    quality = torch.tensor([[[0.5, 0.9], [0.7, 0.1], [0.7, 0.0]]])
    gt_index, best = resolve_conflicts(index, positive, quality, 5)
    assert gt_index.tolist() == [[-1, 2, -1, 1, -1]]
    torch.testing.assert_close(best, torch.tensor([[0, 0, 0, 0.7, 0]]))


def test_labels_by_hand() -> None:
    assert labels_of(torch.tensor([[1, -1, 0]]), torch.tensor([[7, 3]])).tolist() == [[3, -1, 7]]
    assert labels_of(torch.tensor([[-1, -1]]), torch.zeros(1, 0, dtype=torch.long)).tolist() == [[-1, -1]]


def test_twins_go_to_the_first() -> None:
    grid = anchor_grid(level_shapes((128, 160)))
    box = torch.tensor([[30.0, 30, 94, 94]])
    targets = padded([box.repeat(3, 1)], torch.tensor([[128, 160]]))
    assignment, _ = assign_atss(grid, targets, MODERN)
    assert set(assignment.gt_index.flatten().tolist()) == {BACKGROUND, 0}


# whole batches


def test_no_objects() -> None:
    grid = anchor_grid(level_shapes((128, 160)))
    sizes = torch.tensor([[128, 160], [60, 60]])
    for extra in (0, 3):
        targets = padded([torch.zeros(0, 4)] * 2, sizes, extra)
        assignment, iou = assign_atss(grid, targets, MODERN, anchor_valid=anchors_inside(grid, sizes))
        assert (assignment.gt_index[0] == BACKGROUND).all()
        assert (assignment.labels[0] == BACKGROUND).all()
        assert set(assignment.labels[1].tolist()) == {BACKGROUND, IGNORED}
        assert (iou == 0).all()
        assert not assignment.positive.any()


def test_images_of_a_batch_do_not_meet() -> None:
    generator = torch.Generator().manual_seed(5)
    grid = anchor_grid(level_shapes((160, 96)))
    images = [random_scene(count, (160, 96), generator) for count in (3, 20, 7)]
    sizes = torch.tensor([[160, 96], [100, 90], [50, 96]])
    together = assign_atss(grid, padded(images, sizes), MODERN, anchor_valid=anchors_inside(grid, sizes))
    for i, boxes in enumerate(images):
        size = sizes[i : i + 1]
        alone = assign_atss(grid, padded([boxes], size), MODERN, anchor_valid=anchors_inside(grid, size))
        assert torch.equal(together[0].gt_index[i], alone[0].gt_index[0])
        assert torch.equal(together[1][i], alone[1][0])


def test_stays_sparse_and_never_waits() -> None:
    grid = anchor_grid(level_shapes((800, 1344)))
    boxes = random_scene(1000, (800, 1344), torch.Generator().manual_seed(0))
    targets = padded([boxes], torch.tensor([[800, 1333]]))
    anchor_valid = anchors_inside(grid, targets.sizes)
    with Recorder() as recorder:
        assign_atss(grid, targets, MODERN, anchor_valid=anchor_valid)
    assert recorder.largest <= 1000 * 45 * 4  # corners of all candidates, not 1000 * 22400 pairs
    assert recorder.waiting == []


@pytest.mark.compiled
def test_traces() -> None:
    generator = torch.Generator().manual_seed(1)
    grid = anchor_grid(level_shapes((64, 96)))
    traced = torch.compile(assign_atss, fullgraph=True, backend="eager")
    for count in (0, 1, 7, 12):
        targets = padded([random_scene(count, (64, 96), generator)] * 2, torch.tensor([[64, 96], [40, 60]]))
        for anchor_valid in (None, anchors_inside(grid, targets.sizes)):
            expected, iou = assign_atss(grid, targets, MODERN, anchor_valid=anchor_valid)
            assignment, traced_iou = traced(grid, targets, MODERN, anchor_valid=anchor_valid)
            assert torch.equal(assignment.gt_index, expected.gt_index)
            assert torch.equal(assignment.labels, expected.labels)
            assert torch.equal(traced_iou, iou)


# MMDetection's and the authors' numbers


def test_golden_assigner() -> None:
    arrays = golden_arrays("assigner_atss.npz")
    cases = [f"{case:02d}" for case in range(int(arrays["num_cases"]))]
    images = [torch.from_numpy(arrays[f"{case}/gt_bboxes"]).reshape(-1, 4) for case in cases]
    targets = padded(images, torch.tensor([[800, 1333]] * len(cases)))
    grid = anchor_grid(level_shapes((800, 1344)))
    assignment, iou = assign_atss(grid, targets, MODERN, anchor_valid=anchors_inside(grid, targets.sizes))
    for i, case in enumerate(cases):
        anchors = assignment.positive[i].nonzero()[:, 0]
        assert anchors.tolist() == arrays[f"{case}/pos_anchor"].tolist()
        assert assignment.gt_index[i, anchors].tolist() == arrays[f"{case}/pos_gt"].tolist()
        stored = torch.from_numpy(arrays[f"{case}/pos_iou"]).reshape(-1)
        torch.testing.assert_close(iou[i, anchors], stored, rtol=1e-6, atol=1e-7)


def head_targets(arrays: dict[str, np.ndarray], case: str) -> Targets:
    images = [torch.from_numpy(arrays[f"{case}/gt_bboxes_{i}"]).reshape(-1, 4) for i in range(2)]
    targets = padded(
        images, torch.from_numpy(arrays["img_shape"] if "img_shape" in arrays else arrays[f"{case}/img_shape"])
    )
    labels = targets.labels.clone()
    for i, image in enumerate(images):
        labels[i, : len(image)] = torch.from_numpy(arrays[f"{case}/gt_labels_{i}"]).long()
    return targets._replace(labels=labels)


def check_head(arrays: dict[str, np.ndarray], case: str, assignment: Assignment, background: int) -> None:
    for i in range(2):
        assert (assignment.gt_index[i] + 1).tolist() == arrays[f"{case}/assign_gt_{i}"].tolist()
        labels = assignment.labels[i].where(assignment.positive[i], background)
        assert labels.tolist() == arrays[f"{case}/assign_label_{i}"].tolist()


@pytest.mark.parametrize("case", ["A", "B", "C"])
def test_golden_head(case: str) -> None:
    arrays = golden_arrays("head_atss.npz")
    grid = anchor_grid(level_shapes((128, 160)))
    targets = head_targets(arrays, case)
    assignment, iou = assign_atss(grid, targets, MODERN)
    check_head(arrays, case, assignment, background=-1)
    for i in range(2):
        stored = torch.from_numpy(arrays[f"{case}/assign_iou_{i}"]).clamp(min=0)  # -1e8 where there is none
        torch.testing.assert_close(iou[i], stored, rtol=1e-6, atol=1e-7)


def test_golden_official(shared: Path) -> None:
    with np.load(shared / "golden_official" / "atss.npz") as archive:
        arrays = {key: archive[key] for key in archive.files if "/feat" not in key and "param/" not in key}
    grid = anchor_grid(level_shapes((128, 160)), LEGACY)
    assert torch.equal(grid.boxes, torch.cat([torch.from_numpy(arrays[f"anchors_{level}"]) for level in range(5)]))
    cases = sorted({key.split("/")[0] for key in arrays if key.endswith("/assign_gt_0")})
    assert cases
    for case in cases:
        targets = head_targets(arrays, case)
        check_official(arrays, case, grid, targets)


def check_official(arrays: dict[str, np.ndarray], case: str, grid: AnchorGrid, targets: Targets) -> None:
    found = atss_candidates(grid, targets.boxes, targets.valid, LEGACY)
    ious = box_iou(grid.boxes[found.anchor_index], targets.boxes[:, :, None], LEGACY)
    thresholds = adaptive_threshold(ious, found.valid)
    assignment, _ = assign_atss(grid, targets, LEGACY)
    check_head(arrays, case, assignment, background=80)
    for i, valid in enumerate(targets.valid):
        assert found.anchor_index[i, valid].sort().values.tolist() == arrays[f"{case}/cand_anchor_{i}"].tolist()
        stored = torch.from_numpy(arrays[f"{case}/thresh_{i}"]).double()
        torch.testing.assert_close(thresholds[i, valid], stored, rtol=1e-6, atol=1e-7)
        positive = assignment.positive[i]
        boxes = targets.boxes[i][assignment.gt_index[i, positive]]
        centerness = centerness_target(grid.points[positive], boxes)
        stored = torch.from_numpy(arrays[f"{case}/pos_centerness_target_{i}"])
        torch.testing.assert_close(centerness, stored, rtol=1e-4, atol=1e-5)
