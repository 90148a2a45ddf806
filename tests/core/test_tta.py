"""Test-time augmentation: the authors' merge and windows, worked numbers, slow twins, what must not depend on views."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from core.boxes import box_iou
from core.config import PyramidConfig
from core.data.sources import open_data
from core.data.table import Table
from core.geometry import LEGACY, MODERN, Geometry, GeometryName
from core.inference import detect_table
from core.nms import Candidates
from core.tta import (
    View,
    describe_views,
    flip_boxes,
    flip_images,
    group_leaders,
    in_window,
    merge,
    paper_views,
    soft_vote,
    view_candidates,
    vote,
)
from core.types import Detections

CPU = torch.device("cpu")


def candidates_of(
    boxes: Sequence[Sequence[float]],
    scores: list[float],
    labels: list[int] | None = None,
    images: list[int] | None = None,
) -> Candidates:
    zeros = [0] * len(boxes)
    return Candidates(
        torch.tensor(boxes).reshape(-1, 4).float(),
        torch.tensor(scores, dtype=torch.float32),
        torch.tensor(labels or zeros, dtype=torch.long),
        torch.tensor(images or zeros, dtype=torch.long),
    )


def sorted_rows(found: Candidates) -> Candidates:
    return found.select(found.scores.argsort(descending=True, stable=True))


# The authors' numbers


@pytest.fixture(scope="module")
def official(shared: Path) -> dict[str, np.ndarray]:
    with np.load(shared / "golden_official" / "paa_extra.npz") as archive:
        return {key: archive[key] for key in archive.files if not key.startswith("gmm")}


@pytest.mark.parametrize("name", ["soft_vote", "vote"])
@pytest.mark.parametrize("case", range(4))
def test_golden_merge(official: dict[str, np.ndarray], case: int, name: str) -> None:
    boxes, scores, labels = (official[f"merge/{case}/{field}"] for field in ("boxes", "scores", "labels"))
    pool = Candidates(*map(torch.from_numpy, (boxes, scores, labels.astype(np.int64), np.zeros(len(boxes), np.int64))))
    if name == "vote":
        found = vote(pool, LEGACY)
        found_boxes, found_scores, found_labels = found.boxes, found.scores, found.labels
    else:
        detections = merge([pool], 1, LEGACY)
        assert detections.valid.all()
        found_boxes, found_scores, found_labels = (field[0] for field in detections[:3])
    expected = [official[f"merge/{case}/{name}_{field}"] for field in ("bboxes", "scores", "labels")]
    assert len(found_scores) == len(expected[1])
    torch.testing.assert_close(found_scores, torch.from_numpy(expected[1]), rtol=1e-5, atol=1e-6)
    assert found_labels.tolist() == expected[2].tolist()
    torch.testing.assert_close(found_boxes, torch.from_numpy(expected[0]), rtol=0, atol=0.01)


@pytest.mark.parametrize("row", range(4))
def test_golden_window(official: dict[str, np.ndarray], row: int) -> None:
    low, high = official["filter/range"][row].astype(float).tolist()
    keep = in_window(torch.from_numpy(official["filter/boxes"]), (low, high), LEGACY)
    assert keep.tolist() == official[f"filter/keep_{row}"].tolist()


# Worked numbers


def test_merge_by_hand() -> None:
    # Spec PAA section 13, check 20. IoU+1: 10 x 11 pixels shared of 121 + 121 - 110 = 132, 0.8333 >= 0.66. Mean of x1:
    # (0.9 * 0 + 0.6 * 1) / 1.5 = 0.4; the second box stays with 0.6 * (1 - 0.8333) = 0.1, the best one with 0 does not.
    pool = candidates_of([[1, 0, 11, 10], [0, 0, 10, 10]], [0.6, 0.9])
    detections = merge([pool], 1, LEGACY)
    torch.testing.assert_close(detections.boxes[0], torch.tensor([[0.4, 0, 10.4, 10], [1, 0, 11, 10]]))
    torch.testing.assert_close(detections.scores[0], torch.tensor([0.9, 0.1]))
    voted = vote(pool, LEGACY)
    torch.testing.assert_close(voted.boxes, torch.tensor([[0.4, 0, 10.4, 10]]))
    assert voted.scores.tolist() == pytest.approx([0.9])


def test_modern_merge_by_hand() -> None:
    # IoU 9 * 10 / (100 + 100 - 90) = 0.8182: 0.6 * 0.1818 = 0.1091
    detections = merge([candidates_of([[0, 0, 10, 10], [1, 0, 11, 10]], [0.9, 0.6])], 1, MODERN)
    torch.testing.assert_close(detections.scores[0], torch.tensor([0.9, 0.10909]), rtol=0, atol=1e-5)


def test_members_below_the_lowest_score_go() -> None:
    # 0.29 * (1 - 0.8333) = 0.0483 goes, 0.31 * 0.1667 = 0.0517 stays
    pair = [[0, 0, 10, 10], [1, 0, 11, 10]]
    assert len(soft_vote(candidates_of(pair, [0.9, 0.29]), LEGACY).scores) == 1
    assert len(soft_vote(candidates_of(pair, [0.9, 0.31]), LEGACY).scores) == 2


def test_the_smallest_iou_joins() -> None:
    # 33 of 50 square pixels: exactly 0.66. The third box has 22 of 50 and 22 of 33, but the second leads no group.
    row = candidates_of([[0, 0, 50, 1], [0, 0, 33, 1], [0, 0, 22, 1]], [0.9, 0.8, 0.7])
    assert float(box_iou(*row.boxes[:2].double())) == 0.66
    assert group_leaders(row, MODERN, 0.66).tolist() == [0, 0, 2]
    assert group_leaders(row, MODERN, 0.6601).tolist() == [0, 1, 1]


def test_lone_boxes_pass_unchanged() -> None:
    pool = candidates_of([[0, 0, 10.1, 10], [0, 0, 10.1, 10], [50, 0, 60.3, 9]], [0.2, 0.01, 0.7], [0, 4, 0])
    for function in (vote, soft_vote):  # an equal box of another class, a far one of the same; none too weak
        found = function(pool)
        assert found.scores.tolist() == pool.scores[[2, 0, 1]].tolist()
        assert torch.equal(found.boxes, pool.boxes[[2, 0, 1]])
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(100, 4, generator=generator, dtype=torch.float64).cumsum(dim=1)  # one of each class
    pool = Candidates(boxes, boxes[:, 0], torch.arange(100), torch.zeros(100, dtype=torch.long))
    assert torch.equal(vote(pool).boxes, boxes[boxes[:, 0].argsort(descending=True)])


def test_boxes_without_area_or_score_pass() -> None:
    pool = candidates_of([[3, 3, 3, 3], [3, 3, 3, 3], [0, 0, 9, 9], [0, 0, 9, 9]], [0.5, 0.4, 0, 0])
    assert vote(pool).boxes.tolist() == [[3, 3, 3, 3], [3, 3, 3, 3], [0, 0, 9, 9]]
    assert torch.equal(soft_vote(pool).boxes, vote(pool).boxes)


def test_nothing_found() -> None:
    empty = candidates_of([], [])
    assert len(vote(empty).boxes) == len(soft_vote(empty).boxes) == 0
    assert merge([empty, empty], 3).boxes.shape == (3, 0, 4)
    assert merge([empty, candidates_of([[0, 0, 1, 1]], [0.5], images=[1])], 3).valid.sum(dim=1).tolist() == [0, 1, 0]


def test_the_best_thousand_of_an_image() -> None:
    boxes = [[20.0 * i, 20.0 * j, 20.0 * i + 9, 20.0 * j + 9] for i in range(40) for j in range(30)]
    pool = candidates_of(boxes, [(i + 1) / 1200 for i in range(1200)])
    both = Candidates(*(torch.cat([a, b]) for a, b in zip(pool, pool._replace(images=pool.images + 1), strict=True)))
    detections = merge([both], 2)
    assert detections.scores.shape == (2, 1000)
    assert detections.scores[1].tolist() == pool.scores.flip(0)[:1000].tolist()


def test_window_by_hand() -> None:
    # Spec PAA section 13, check 20: at scale 1800 boxes of less than 96 x 96 pixels count.
    (window,) = {view.window for view in paper_views(800, 1333) if view.short_side == 1800}
    assert window == (0, 96)
    corners = torch.tensor([[0.0, 0, 99, 89], [0, 0, 95, 95], [0, 0, 99, 99], [0, 0, 94, 95]])  # +1 sides
    assert in_window(corners, window, LEGACY).tolist() == [0, 3]
    sides = torch.tensor([[0.0, 0, 100, 90], [0, 0, 96, 96], [0, 0, 0, 96], [0, 0, 95, 96]])
    assert in_window(sides, window, MODERN).tolist() == [0, 3]
    assert in_window(sides, None, MODERN).tolist() == [0, 1, 2, 3]


def test_paper_views() -> None:
    views = paper_views(800, 1333)
    assert len(views) == 26
    assert views[:2] == (View(800, 1333), View(800, 1333, flip=True))
    assert [view.short_side for view in views[::2]] == [
        *(800, 400, 500, 600, 640, 700, 900, 1000, 1100, 1200, 1300, 1400, 1800)
    ]
    for view, mirrored in zip(views[::2], views[1::2], strict=True):
        assert mirrored == view._replace(flip=True)
        assert view.long_side == (1333 if view.short_side <= 800 else 3000)
    windows = {view.short_side: view.window for view in views}
    assert windows[500] == (96, 10000)
    assert windows[700] == (64, 10000)
    assert windows[1000] == (0, 10000)
    assert windows[1200] == (0, 256)
    assert windows[1400] == (0, 192)


def test_views_of_a_smaller_model() -> None:
    views = paper_views(200, 350)  # a quarter of the paper's
    assert views[0] == View(200, 350)
    assert views[2] == View(100, 333, window=(24, 2500))
    assert views[-1] == View(450, 750, flip=True, window=(0, 24))
    assert all(1 <= view.short_side <= view.long_side for view in paper_views(1, 1))
    # twice (1 + 1/4 + 25/64 + ... + 81/16) = 42.7
    assert describe_views(views) == (
        "test-time augmentation: 26 views of each image, short sides 100 to 450 px, plain and mirrored; "
        "43 times the pixels of one"
    )


# Mirroring


def test_images_are_mirrored_inside_their_own_width() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, 3, 4, 6), dtype=torch.uint8, generator=generator)
    sizes = torch.tensor([[4, 6], [2, 5], [3, 1]])
    flipped = flip_images(images, sizes)
    for image, mirrored, (_, width) in zip(images, flipped, sizes.tolist(), strict=True):
        assert torch.equal(mirrored[:, :, :width], image[:, :, :width].flip(2))
        assert torch.equal(mirrored[:, :, width:], image[:, :, width:])
    assert torch.equal(flip_images(flipped, sizes), images)


def test_boxes_are_mirrored_by_hand() -> None:
    boxes = torch.tensor([[10.0, 20, 39, 59]])
    assert flip_boxes(boxes, torch.tensor([100]), LEGACY).tolist() == [[60, 20, 89, 59]]  # spec section 13, check 5
    assert flip_boxes(boxes, torch.tensor([100]), MODERN).tolist() == [[61, 20, 90, 59]]


@pytest.mark.parametrize("geometry", [MODERN, LEGACY])
def test_view_candidates_by_hand(geometry: Geometry) -> None:
    # The second image is 50 x 40 (width x height) in the view and 100 x 60 in the plain one: x by 2, y by 1.5.
    boxes = torch.tensor([[[5.0, 5, 10, 10], [0, 0, 0, 0]], [[10, 10, 20, 30], [0, 0, 40, 40]]])
    detections = Detections(
        boxes,
        torch.tensor([[0.9, 0], [0.8, 0.7]]),
        torch.tensor([[3, 0], [1, 2]]),
        torch.tensor([[True, False], [True, True]]),
    )
    sizes, plain_sizes = torch.tensor([[40, 40], [40, 50]]), torch.tensor([[40, 40], [60, 100]])
    view = View(40, 60, flip=True, window=(0.0, 30.0))  # the 40 x 40 box is too large
    found = view_candidates(detections, view, torch.tensor([7, 4]), sizes, plain_sizes, geometry)
    one = geometry.plus_one
    expected = [[30 - one, 5, 35 - one, 10], [2 * (30 - one), 15, 2 * (40 - one), 45]]
    torch.testing.assert_close(found.boxes, torch.tensor(expected))
    assert found.scores.tolist() == pytest.approx([0.9, 0.8])
    assert found.labels.tolist() == [3, 1]
    assert found.images.tolist() == [7, 4]


# The merge's slow twin


def slow_soft_vote(found: Candidates, threshold: float, geometry: Geometry) -> tuple[list[list[float]], int]:
    """Class after class, group after group: rows of label, score, box; and the number of groups."""
    rows, groups = [], 0
    for label in sorted(set(found.labels.tolist())):
        part = found.select((found.labels == label).nonzero()[:, 0])
        left = part.scores.argsort(descending=True, stable=True).tolist()
        while left:
            best = left[0]
            ious = {row: float(box_iou(part.boxes[best].double(), part.boxes[row].double(), geometry)) for row in left}
            group = [row for row in left if row == best or ious[row] >= threshold]
            left = [row for row in left if row not in group]
            groups += 1
            if len(group) == 1:
                rows.append([label, float(part.scores[best]), *part.boxes[best].tolist()])
                continue
            weights = part.scores[group].double()
            mean = (part.boxes[group].double() * weights[:, None]).sum(dim=0) / weights.sum()
            rows.append([label, float(part.scores[best]), *mean.tolist()])
            for row in group:
                score = float(part.scores[row]) * (1 - ious[row])
                if score >= 0.05:
                    rows.append([label, score, *part.boxes[row].tolist()])
    return rows, groups


def random_candidates(count: int, seed: int) -> Candidates:
    """Jittered copies of a few boxes, some equal scores and equal boxes among them, of three classes."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(5, 2, generator=generator) * 60
    originals = torch.cat([corners, corners + 20 + torch.rand(5, 2, generator=generator) * 30], dim=1)
    boxes = originals[torch.randint(5, (count,), generator=generator)]
    boxes = (boxes + torch.randint(-3, 4, (count, 4), generator=generator)).contiguous()
    scores = torch.randint(1, 40, (count,), generator=generator) / 40
    labels = torch.randint(3, (count,), generator=generator) * 5
    return Candidates(boxes, scores, labels, torch.zeros(count, dtype=torch.long))


@pytest.mark.parametrize("geometry", [MODERN, LEGACY])
@pytest.mark.parametrize(("count", "seed"), [(0, 0), (1, 1), (2, 2), (30, 3), (150, 4)])
def test_equals_slow_twin(count: int, seed: int, geometry: Geometry) -> None:
    pool = random_candidates(count, seed)
    rows, groups = slow_soft_vote(pool, 0.66, geometry)
    found = soft_vote(pool, geometry)
    assert len(found.scores) == len(rows)
    assert len(vote(pool, geometry).scores) == groups
    table = torch.cat([found.labels[:, None].double(), found.scores[:, None].double(), found.boxes.double()], dim=1)
    order = sorted(range(len(rows)), key=lambda row: table[row].round(decimals=3).tolist())
    expected = sorted(rows, key=lambda row: [round(value, 3) for value in row])
    torch.testing.assert_close(
        table[order], torch.tensor(expected, dtype=torch.float64).reshape(-1, 6), rtol=0, atol=2e-3
    )


def test_images_are_merged_apart() -> None:
    parts = [random_candidates(40, seed)._replace(images=torch.full((40,), seed)) for seed in range(3)]
    together = merge(parts, 3)
    mixed = Candidates(*(torch.stack(fields, dim=1).flatten(0, 1) for fields in zip(*parts, strict=True)))
    assert all(torch.equal(a, b) for a, b in zip(together, merge([mixed], 3), strict=True))
    for image, part in enumerate(parts):
        alone = merge([part._replace(images=torch.zeros_like(part.images))], 1)
        count = int(together.valid[image].sum())
        assert torch.equal(together.boxes[image, :count], alone.boxes[0])
        assert torch.equal(together.scores[image, :count], alone.scores[0])


# Views of a split, with a stand-in for the network: it finds the white rectangle of each image


class Pixels(nn.Module):
    """The image as it is."""

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        """RGB bytes in, RGB bytes out."""
        assert (images.shape[-1] - int(sizes[:, 1].max())) < 32
        return images


class Finder:
    """Detections as a method's post-processing gives them; counts how often it looks."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.canvases: list[tuple[int, int]] = []

    def __call__(self, images: Tensor, sizes: Tensor, original_sizes: Tensor) -> Detections:
        """The box around the white pixels of each image (score .9), a shifted copy (.6), and one elsewhere (.3)."""
        self.canvases.append((images.shape[2], images.shape[3]))
        boxes = []
        for image, (height, width) in zip(images, sizes.tolist(), strict=True):
            rows, columns = (image[0, :height, :width] > 127).nonzero().unbind(1)
            far = 1 - self.geometry.plus_one
            box = torch.stack([columns.min(), rows.min(), columns.max() + far, rows.max() + far])
            boxes.append(torch.stack([box, box + torch.tensor([1, 0, 1, 0]), torch.tensor([0, 0, 3, 3])]))
        count = len(boxes)
        scores = torch.tensor([0.9, 0.6, 0.3]).repeat(count, 1)
        labels = torch.tensor([0, 0, 1]).repeat(count, 1)
        return Detections(torch.stack(boxes).float(), scores, labels, torch.ones(count, 3, dtype=torch.bool))


RECTANGLES = {(64, 48): (10, 8, 40, 30), (48, 64): (5, 20, 25, 60), (66, 48): (30, 2, 60, 40), (90, 40): (8, 4, 24, 36)}


@pytest.fixture(scope="module")
def rectangles(tmp_path_factory: pytest.TempPathFactory) -> Table:
    folder = tmp_path_factory.mktemp("rectangles")
    images, annotations = [], []
    for number, (size, (x1, y1, x2, y2)) in enumerate(RECTANGLES.items(), start=1):
        picture = Image.new("RGB", size)
        picture.paste((255, 255, 255), (x1, y1, x2, y2))
        picture.save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": size[0], "height": size[1]})
        box = [x1, y1, x2 - x1, y2 - y1]
        fields = {"bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        annotations.append({"id": number, "image_id": number, "category_id": 1, **fields})
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    (folder / "a.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "d.yaml").write_text("train: {images: ., annotations: a.json}\nval: {images: ., annotations: a.json}\n")
    return open_data(str(folder / "d.yaml")).val


def config_of(geometry: GeometryName, batch_size: int = 2) -> PyramidConfig:
    return PyramidConfig(
        steps=1, batch_size=batch_size, short_side=48, long_side=90, workers=0, device="cpu", geometry=geometry
    )


@pytest.mark.parametrize("geometry", ["modern", "legacy"])
def test_each_view_alone_finds_the_rectangles(rectangles: Table, geometry: GeometryName) -> None:
    config = config_of(geometry)
    for view in (View(48, 90), View(48, 90, flip=True), View(96, 180), View(96, 180, flip=True), View(144, 200, True)):
        found = detect_table(Pixels(), Finder(config.box_geometry), rectangles, config, CPU, [view])
        best = found.scores > 0.85
        boxes = found.boxes[best][found.image_id[best].argsort()]
        expected = [(x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in RECTANGLES.values()]
        np.testing.assert_allclose(boxes, expected, atol=0.01 if view.short_side == 48 else 0.76)


def test_one_view_equals_no_views(rectangles: Table) -> None:
    config = config_of("modern")
    views = paper_views(48, 90)
    plain = detect_table(Pixels(), Finder(MODERN), rectangles, config, CPU)
    single = detect_table(Pixels(), Finder(MODERN), rectangles, config, CPU, views[:1])
    for a, b in zip(plain, single, strict=True):
        assert a.tobytes() == b.tobytes()
    merged = detect_table(Pixels(), Finder(MODERN), rectangles, config, CPU, views[:2])
    assert len(merged.scores) != len(plain.scores) or merged.boxes.tobytes() != plain.boxes.tobytes()


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_views_are_merged(rectangles: Table, batch_size: int) -> None:
    """The rectangle is found in every view, so its group's mean stays; the windows decide about the small box."""
    config, finder = config_of("legacy", batch_size), Finder(LEGACY)
    views = paper_views(48, 90)
    found = detect_table(Pixels(), finder, rectangles, config, CPU, views)
    for number, (x1, y1, x2, y2) in enumerate(RECTANGLES.values(), start=1):
        mine = found.image_id == number
        best = np.flatnonzero(mine & (found.category_id == 1))[0]  # by falling score
        assert found.scores[best] == pytest.approx(0.9)
        np.testing.assert_allclose(found.boxes[best], (x1, y1, x2 - x1, y2 - y1), atol=1)
    assert finder.canvases[0] == finder.canvases[1]  # as it is and mirrored
    assert len(finder.canvases) >= 26 * len(RECTANGLES) / batch_size
    alone = detect_table(Pixels(), Finder(LEGACY), rectangles, config_of("legacy", 1), CPU, views)
    order, other = (np.argsort(part.image_id, kind="stable") for part in (found, alone))
    for a, b in zip(found, alone, strict=True):
        assert a[order].tobytes() == b[other].tobytes()


def test_the_window_is_of_the_view(rectangles: Table) -> None:
    # The rectangle of the first image, 30 x 22 px, is 60 x 44 at twice the size: an area of 51.4 squared.
    config, plain = config_of("modern", 1), View(48, 90, window=(9999.0, 10000.0))
    for window, count in (((51.0, 52.0), 1), ((25.0, 26.0), 0)):
        views = [plain, View(96, 180, window=window)]
        found = detect_table(Pixels(), Finder(MODERN), rectangles, config, CPU, views)
        assert (found.image_id == 1).sum() == count
