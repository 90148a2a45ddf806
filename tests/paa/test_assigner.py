"""PAA's assignment: worked numbers, an object-by-object twin on random scenes, edge cases, tracing."""

import numpy as np
import pytest
import torch
from jaxtyping import Float
from sklearn.mixture import GaussianMixture
from torch import Tensor

from core.anchors import AnchorGrid, anchor_grid, anchors_inside, level_shapes
from core.boxes import box_iou, decode_deltas, encode_deltas
from core.geometry import LEGACY, MODERN, Geometry
from core.losses import giou_loss, one_hot_labels, sigmoid_focal_loss
from core.profiles import ProfileName
from core.types import BACKGROUND, IGNORED, Targets
from paa import assigner
from paa.assigner import (
    Details,
    Matches,
    anchor_scores,
    assign_paa,
    explain_assignment,
    match_chunk,
    prematch,
    resolve_matches,
    select_candidates,
)
from paa.profiles import PAA_PROFILES, LowQualityRule, PaaProfile

CLASSES = 5
CANVAS = (96, 128)


def make_targets(images: list[list[list[float]]], slots: int | None = None) -> Targets:
    """Targets of images given as lists of boxes; labels count up."""
    slots = max(map(len, images)) if slots is None else slots
    boxes = torch.zeros(len(images), slots, 4)
    labels = torch.zeros(len(images), slots, dtype=torch.int64)
    valid = torch.zeros(len(images), slots, dtype=torch.bool)
    for i, image in enumerate(images):
        if image:
            boxes[i, : len(image)] = torch.tensor(image)
        labels[i, : len(image)] = torch.arange(len(image)) % CLASSES
        valid[i, : len(image)] = True
    return Targets(boxes, labels, valid, torch.tensor([CANVAS] * len(images)))


def random_scene(
    seed: int, counts: list[int], geometry: Geometry = MODERN
) -> tuple[Tensor, Tensor, AnchorGrid, Targets]:
    """Random boxes, and predictions that are right here and there."""
    generator = torch.Generator().manual_seed(seed)
    grid = anchor_grid(level_shapes(CANVAS), geometry)
    images = []
    for count in counts:
        sides = 6 + 90 * torch.rand(count, 2, generator=generator) ** 2
        corners = torch.rand(count, 2, generator=generator) * (torch.tensor([128.0, 96.0]) - sides).clamp(min=1)
        images.append(torch.cat([corners, corners + sides], dim=1).tolist())
    targets = make_targets(images, slots=max(counts) + seed % 3)
    anchors = len(grid.boxes)
    logits = torch.randn(len(counts), anchors, CLASSES, generator=generator) * 2 - 1
    deltas = torch.randn(len(counts), anchors, 4, generator=generator)
    return logits, deltas, grid, targets


def twin_match(iou: Tensor, low_quality: LowQualityRule, threshold: float) -> list[int]:
    """Section 3.1 for one image, anchor by anchor; iou is objects x anchors."""
    objects, anchors = iou.shape
    match = [BACKGROUND] * anchors
    for a in range(anchors):
        best = max(range(objects), key=lambda g: float(iou[g, a])) if objects else BACKGROUND
        if objects and iou[best, a] >= threshold:
            match[a] = best
    for g in range(objects):
        for a in range(anchors):
            if iou[g, a] == iou[g].max() and iou[g, a] > 0:
                own = max(range(objects), key=lambda h: float(iou[h, a]))
                match[a] = own if low_quality == "own" else g
    return match


def twin_positives(losses: list[float], profile: PaaProfile) -> list[bool]:
    """Sections 3.4 to 3.6 for one object, with scikit-learn; losses by rising size."""
    if len(losses) < 2:
        return [profile.keep_single] * len(losses)
    column = np.array(losses, dtype=np.float64)[:, None]
    mixture = GaussianMixture(
        2, weights_init=[0.5, 0.5], means_init=[column[0], column[-1]], precisions_init=np.ones((2, 1, 1))
    ).fit(column)
    component, density = mixture.predict(column), mixture.score_samples(column)
    first = [i for i in range(len(losses)) if component[i] == 0]
    if not first:
        return [profile.all_without_first] * len(losses)
    peak = max(first, key=lambda i: density[i])
    return [i <= peak and (component[i] == 0 or not profile.first_component_only) for i in range(len(losses))]


def twin_assign(
    scene: tuple[Tensor, Tensor, AnchorGrid, Targets],
    geometry: Geometry,
    profile: PaaProfile,
    clamp_both_sides: bool,
    anchor_valid: Tensor | None,
    topk: int,
) -> tuple[Tensor, Tensor]:
    """The whole of section 3 with loops over images, objects, levels and anchors."""
    logits, deltas, grid, targets = scene
    gt_index = torch.full(logits.shape[:2], BACKGROUND)
    for image in range(len(logits)):
        usable = torch.ones(len(grid.boxes), dtype=torch.bool) if anchor_valid is None else anchor_valid[image]
        boxes = targets.boxes[image][targets.valid[image]]
        iou = box_iou(boxes[:, None], grid.boxes[None], geometry).masked_fill(~usable, 0)
        match = twin_match(iou, profile.low_quality, 0.1)
        decoded = decode_deltas(grid.boxes, deltas[image], geometry, clamp_both_sides)
        for g in range(len(boxes)):
            hot = one_hot_labels(targets.labels[image, g], CLASSES).expand_as(logits[image])
            focal = sigmoid_focal_loss(logits[image], hot).sum(dim=-1)
            giou = giou_loss(decoded, boxes[g], profile.giou_eps, profile.giou_floor)
            losses = (focal + profile.score_box_weight * giou).tolist()
            candidates: list[tuple[float, int]] = []
            first = 0
            for size in grid.level_sizes:
                candidates += sorted((losses[a], a) for a in range(first, first + size) if match[a] == g)[:topk]
                first += size
            candidates.sort()
            for (_, a), positive in zip(
                candidates, twin_positives([loss for loss, _ in candidates], profile), strict=True
            ):
                if positive:
                    gt_index[image, a] = g
        gt_index[image, ~usable] = IGNORED
    labels = gt_index.clone()
    for image, a in (gt_index >= 0).nonzero().tolist():
        labels[image, a] = targets.labels[image, gt_index[image, a]]
    return gt_index, labels


@pytest.mark.parametrize(
    ("name", "geometry"), [("ours", MODERN), ("ours", LEGACY), ("mmdet", MODERN), ("official", LEGACY)]
)
@pytest.mark.parametrize(("seed", "counts"), [(0, [1, 0]), (1, [6, 2]), (2, [25])])
def test_against_loops(name: ProfileName, geometry: Geometry, seed: int, counts: list[int]) -> None:
    scene = random_scene(seed, counts, geometry)
    profile = PAA_PROFILES[name]
    logits, deltas, grid, targets = scene
    sizes = torch.tensor([[64, 100]] * len(counts))
    anchor_valid = None if name == "official" else anchors_inside(grid, sizes)
    both = name != "official"
    topk = 3 if seed == 2 else 9
    expected = twin_assign(scene, geometry, profile, both, anchor_valid, topk)
    ours = assign_paa(
        logits,
        deltas,
        grid,
        targets,
        geometry=geometry,
        profile=profile,
        clamp_both_sides=both,
        anchor_valid=anchor_valid,
        topk=topk,
    )
    assert (ours.gt_index >= 0).any()
    assert torch.equal(ours.gt_index, expected[0])
    assert torch.equal(ours.labels, expected[1])


def match_iou(rows: list[list[float]], low_quality: LowQualityRule, chunk: int = 10) -> list[int]:
    iou = torch.tensor(rows)[None]
    nobody = torch.full((1, iou.shape[2]), BACKGROUND)
    matches = Matches(-torch.ones(1, iou.shape[2]), nobody, nobody)
    for start in range(0, len(rows), chunk):
        matches = match_chunk(matches, iou[:, start : start + chunk], start)
    return resolve_matches(matches, 0.1, low_quality)[0].tolist()


@pytest.mark.parametrize("chunk", [1, 2])
def test_low_quality_match_worked(chunk: int) -> None:
    rows = [[0.70, 0.05, 0.30, 0.02], [0.60, 0.04, 0.09, 0.01]]  # spec section 13, check 12
    assert match_iou(rows, "own", chunk) == [0, BACKGROUND, 0, BACKGROUND]
    assert match_iou(rows, "overwrite", chunk) == [1, BACKGROUND, 0, BACKGROUND]


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_ties_of_a_match(chunk: int) -> None:
    # anchor 0: equal IoU with objects 0 and 1, the first has it. Object 2: both its best anchors, below the threshold.
    rows = [[0.5, 0.0, 0.0], [0.5, 0.0, 0.0], [0.0, 0.05, 0.05]]
    assert match_iou(rows, "own", chunk) == [0, 2, 2]
    assert match_iou(rows, "overwrite", chunk) == [1, 2, 2]  # later objects overwrite


def test_object_that_touches_no_anchor_takes_none() -> None:
    assert match_iou([[0.0, 0.0], [0.4, 0.2]], "own") == [1, 1]
    assert match_iou([[0.4, 0.2], [0.0, 0.0]], "overwrite") == [0, 0]


def test_prematch_chunks_and_padding_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, grid, targets = random_scene(3, [9, 4])
    whole = prematch(grid.boxes, targets)
    padded = Targets(
        torch.cat([targets.boxes, torch.full((2, 3, 4), 50.0)], dim=1),
        torch.cat([targets.labels, torch.zeros(2, 3, dtype=torch.int64)], dim=1),
        torch.cat([targets.valid, torch.zeros(2, 3, dtype=torch.bool)], dim=1),
        targets.sizes,
    )
    assert torch.equal(prematch(grid.boxes, padded), whole)
    monkeypatch.setattr(assigner, "IOU_CHUNK", 1)
    assert torch.equal(prematch(grid.boxes, targets), whole)


def test_anchor_score_worked() -> None:
    # spec section 13, check 8: all logits at ln(1/99), zero deltas, 80 classes
    logits = torch.full((1, 2, 80), -4.59512)
    box, anchor = [0.0, 0.0, 31.0, 31.0], torch.tensor([[-27.5, -27.5, 35.5, 35.5]] * 2)
    targets = Targets(torch.tensor([[box]]), torch.tensor([[7]]), torch.tensor([[True]]), torch.tensor([[800, 1344]]))
    boxes = decode_deltas(anchor, torch.zeros(1, 2, 4), LEGACY)
    match = torch.tensor([[0, BACKGROUND]])
    scores = anchor_scores(logits, boxes, match, targets)
    assert scores[0, 0].item() == pytest.approx(1.886315, abs=1e-5)  # 1.128441 + 0.757874
    assert scores[0, 1].item() == float("inf")
    assert anchor_scores(logits, boxes, match, targets, 1.3)[0, 0].item() == pytest.approx(2.113677, abs=1e-5)


def test_candidates_worked() -> None:
    # check 14: 12 matched anchors on the first level, 3 on the second; an object without any beside it
    scores = torch.cat([torch.arange(12.0).flip(0), torch.tensor([5.0, 3.0, 4.0]), torch.tensor([0.0])])[None]
    match = torch.tensor([[1] * 15 + [BACKGROUND]])
    candidates = select_candidates(scores, match, 2, [12, 4], topk=9)
    assert candidates.valid.sum(dim=2).tolist() == [[0, 12]]
    assert candidates.anchors[0, 1, :9].tolist() == [11, 10, 9, 8, 7, 6, 5, 4, 3]  # 0, 1 and 2 miss the cut
    assert candidates.anchors[0, 1, 9:12].tolist() == [13, 14, 12]
    assert candidates.losses[0, 1, 9:12].tolist() == [3, 4, 5]
    assert candidates.losses[0, 1, 12:].isinf().all()


def test_candidates_of_equal_score_by_anchor() -> None:
    candidates = select_candidates(torch.ones(1, 3000), torch.zeros(1, 3000, dtype=torch.int64), 1, [3000], topk=3)
    assert candidates.anchors.tolist() == [[[0, 1, 2]]]


def perfect_scene(boxes: list[list[float]], slots: int | None = None) -> tuple[Tensor, Tensor, AnchorGrid, Targets]:
    grid = anchor_grid(level_shapes(CANVAS))
    targets = make_targets([boxes], slots)
    deltas = torch.zeros(1, len(grid.boxes), 4)
    return torch.zeros(1, len(grid.boxes), CLASSES), deltas, grid, targets


def test_single_low_iou_candidate() -> None:
    # check 13: an 8 px box overlaps anchors of 64 px and more with IoU at most 1/64, so only its best anchors match
    scene = perfect_scene([[0.0, 0.0, 8.0, 8.0]])
    iou = box_iou(scene[3].boxes[0], scene[2].boxes)
    assert iou.max() < 0.1
    details = explain_assignment(*scene, anchor_valid=(torch.arange(len(iou)) == iou.argmax())[None])
    assert details.candidates.valid.sum() == 1
    assert details.assignment.gt_index.eq(0).sum() == 1
    mmdet = assign_paa(
        *scene, profile=PAA_PROFILES["mmdet"], anchor_valid=(torch.arange(len(iou)) == iou.argmax())[None]
    )
    assert not mmdet.positive.any()


@pytest.mark.parametrize("slots", [0, 2])
def test_no_objects(slots: int) -> None:
    details = explain_assignment(*perfect_scene([], slots))
    assert (details.assignment.gt_index == BACKGROUND).all()
    assert (details.assignment.labels == BACKGROUND).all()
    assert details.candidates.valid.shape == (1, slots, 45)


def test_padding_anchors_are_ignored_and_never_candidates() -> None:
    logits, deltas, grid, targets = random_scene(4, [5, 5])
    anchor_valid = anchors_inside(grid, torch.tensor([[40, 40], [96, 128]]))
    details = explain_assignment(logits, deltas, grid, targets, anchor_valid=anchor_valid)
    assert torch.equal(details.assignment.gt_index == IGNORED, ~anchor_valid)
    assert torch.equal(details.assignment.labels == IGNORED, ~anchor_valid)
    image = details.candidates.valid.nonzero()[:, 0]
    assert anchor_valid[image, details.candidates.anchors[details.candidates.valid]].all()


@pytest.mark.parametrize("scheme", ["b", "d"])
def test_doubtful_candidates_are_ignored(scheme: str) -> None:
    logits, deltas, grid, targets = random_scene(5, [4])
    details = explain_assignment(3 * logits, deltas, grid, targets, scheme=scheme)  # type: ignore[arg-type]
    ignored = details.candidates.anchors[details.ignored]
    assert len(ignored)
    assert sorted(ignored.tolist()) == (details.assignment.gt_index[0] == IGNORED).nonzero()[:, 0].tolist()


def test_every_positive_is_a_candidate_of_its_own_object() -> None:
    details = explain_assignment(*random_scene(6, [7, 3]))
    for image, g, k in details.positive.nonzero().tolist():
        anchor = details.candidates.anchors[image, g, k]
        assert details.match[image, anchor] == g
        assert details.assignment.gt_index[image, anchor] == g
    assert details.positive.sum() == details.assignment.positive.sum()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_predictions_stay_with_their_anchor(bad: float) -> None:
    logits, deltas, grid, targets = random_scene(7, [4, 4])
    clean = assign_paa(logits, deltas, grid, targets)
    deltas[0, 5], logits[0, 9], logits[0, 11, 2] = bad, bad, float("nan")
    details = explain_assignment(logits, deltas, grid, targets)
    assert torch.equal(details.assignment.gt_index[1], clean.gt_index[1])
    assert not details.assignment.positive[0, [9, 11]].any()
    assert details.candidates.losses[details.candidates.valid].isfinite().all()
    assert all(part.isfinite().all() for part in details.mixture)
    everything = assign_paa(logits + float("nan"), deltas, grid, targets)
    assert not everything.positive.any()


def test_no_gradient_and_float32_under_low_precision() -> None:
    logits, deltas, grid, targets = random_scene(8, [4])
    logits.requires_grad_()
    details = explain_assignment(logits, deltas, grid, targets)
    assert not details.scores.requires_grad
    half = explain_assignment(logits.to(torch.bfloat16), deltas.to(torch.bfloat16), grid, targets)
    assert half.scores.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        autocast = explain_assignment(logits, deltas, grid, targets)
    assert torch.equal(autocast.scores, details.scores)


def test_good_predictions_are_chosen() -> None:
    """Anchors that predict the object well win over equally placed ones that do not."""
    logits, deltas, grid, targets = perfect_scene([[10.0, 10.0, 80.0, 80.0]])
    logits -= 3
    matched = (prematch(grid.boxes, targets)[0] >= 0).nonzero()[:, 0]
    right = matched[3:7]
    exact: Float[Tensor, "n 4"] = encode_deltas(grid.boxes[right], targets.boxes[0, :1])
    deltas[0, right] = exact
    logits[0, right, 0] = torch.tensor([0.0, 0.6, 0.9, 1.0])  # focal losses .043, .016, .009, .008
    # the densest of the four good ones is not the first, and what is sorted before it is positive too
    positive = assign_paa(logits, deltas, grid, targets).positive[0].nonzero()[:, 0].tolist()
    assert set(positive) < set(right.tolist())
    assert positive[-1] == right[-1]
    assert len(positive) >= 2


def test_topk_must_be_positive() -> None:
    with pytest.raises(ValueError, match="topk must be at least 1, got 0"):
        assign_paa(*perfect_scene([[10.0, 10.0, 80.0, 80.0]]), topk=0)


@pytest.mark.compiled
@pytest.mark.parametrize("counts", [[0, 0], [3, 1]])
def test_traces_whole(counts: list[int]) -> None:
    scene = random_scene(9, counts)
    anchor_valid = anchors_inside(scene[2], torch.tensor([[64, 100]] * 2))
    compiled = torch.compile(explain_assignment, fullgraph=True, backend="eager")
    ours: Details = compiled(*scene, anchor_valid=anchor_valid)
    assert torch.equal(
        ours.assignment.gt_index, explain_assignment(*scene, anchor_valid=anchor_valid).assignment.gt_index
    )
