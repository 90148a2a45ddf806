"""Which anchors are positive: PAA's probabilistic assignment (section 3.1, Algorithm 1; spec section 3).

Four stages, each a function of padded tensors: match every anchor to at most one object by IoU, score the matched
anchors by the losses of their own predictions, keep each object's best few of every level, and split those by a mixture
of two Gaussians. Since an anchor has one object, the candidates come out of one sort of the anchors by (object, level,
score); no anchors x objects matrix is kept.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from core.anchors import AnchorGrid
from core.boxes import box_iou, centres_inside, decode_deltas
from core.geometry import MODERN, Geometry
from core.losses import giou_loss, summed_focal_loss
from core.types import BACKGROUND, IGNORED, Assignment, Targets
from paa.gmm import Mixture, Separation, split_candidates
from paa.profiles import PAA_PROFILES, LowQualityRule, PaaProfile, Scheme

IOU_CHUNK = 1 << 21  # largest number of anchor-object IoUs held at once ...
CACHED_IOUS = 1 << 18  # ... and on a CPU, which is twice as fast where they stay in its cache
HARD_IOU, HARD_BACKGROUND = 0.5, 0.4  # RetinaNet, section 4: positive from, background below


class Matches(NamedTuple):
    """What matching has found among the objects seen so far."""

    best_iou: Float[Tensor, "B A"]  # largest IoU of the anchor with any object; -1 where there is none
    best_object: Int[Tensor, "B A"]  # the first object that attains it; BACKGROUND where there is none
    favourite_of: Int[Tensor, "B A"]  # the last object that has no better anchor than this one; BACKGROUND if none


class Candidates(NamedTuple):
    """Each object's best anchors of every level, level by level by rising score; K is levels * topk."""

    anchors: Int[Tensor, "B G K"]  # anchor index; any where not valid
    losses: Float[Tensor, "B G K"]  # anchor score; inf where not valid
    valid: Bool[Tensor, "B G K"]


class Details(NamedTuple):
    """The assignment and every stage that led to it, for tests and pictures."""

    assignment: Assignment
    match: Int[Tensor, "B A"]  # object of each anchor by IoU, or BACKGROUND
    scores: Float[Tensor, "B A"]  # anchor score; inf where unmatched
    candidates: Candidates
    mixture: Mixture | None  # rows are the batch's objects, B * G; None, as the next two, where a fixed rule separates
    component: Int[Tensor, "B G K"] | None
    log_density: Float[Tensor, "B G K"] | None
    positive: Bool[Tensor, "B G K"]  # of the candidates
    ignored: Bool[Tensor, "B G K"]


def assign_paa(
    logits: Float[Tensor, "B A C"],
    deltas: Float[Tensor, "B A 4"],
    grid: AnchorGrid,
    targets: Targets,
    *,
    geometry: Geometry = MODERN,
    profile: PaaProfile = PAA_PROFILES["ours"],
    clamp_both_sides: bool = True,
    anchor_valid: Bool[Tensor, "B A"] | None = None,
    topk: int = 9,
    threshold: float = 0.1,
    scheme: Scheme = "c",
    fixed_number: int = 9,
    score_range: float = 0.1,
) -> Assignment:
    """Positives and negatives of a batch (Algorithm 1). No gradient flows through it.

    Args:
        logits: class scores before the sigmoid.
        deltas: box regression of every anchor.
        grid: anchors of the canvas.
        targets: padded objects; an image may have none.
        geometry: convention of boxes and anchors.
        profile: whose rules to follow where implementations differ.
        clamp_both_sides: of the delta coder, see `core.boxes.decode_deltas`.
        anchor_valid: anchors that take part (`core.anchors.anchors_inside`); the others become IGNORED. None: all.
        topk: K, candidates of an object on each level.
        threshold: smallest IoU of a match by IoU.
        scheme: separation of the candidates, see `paa.gmm.separate`; `number` and `range`: see `fixed_separation`.
        fixed_number: of `fixed_separation`.
        score_range: of `fixed_separation`.

    Returns:
        Positives carry object and class; IGNORED are invalid anchors and, in schemes b and d, doubtful candidates; all
        other anchors are BACKGROUND. Anchors whose score is not finite are never positive.

    Raises:
        ValueError: if topk is below 1.
    """
    return explain_assignment(
        logits,
        deltas,
        grid,
        targets,
        geometry=geometry,
        profile=profile,
        clamp_both_sides=clamp_both_sides,
        anchor_valid=anchor_valid,
        topk=topk,
        threshold=threshold,
        scheme=scheme,
        fixed_number=fixed_number,
        score_range=score_range,
    ).assignment


@torch.no_grad()
def explain_assignment(
    logits: Float[Tensor, "B A C"],
    deltas: Float[Tensor, "B A 4"],
    grid: AnchorGrid,
    targets: Targets,
    *,
    geometry: Geometry = MODERN,
    profile: PaaProfile = PAA_PROFILES["ours"],
    clamp_both_sides: bool = True,
    anchor_valid: Bool[Tensor, "B A"] | None = None,
    topk: int = 9,
    threshold: float = 0.1,
    scheme: Scheme = "c",
    fixed_number: int = 9,
    score_range: float = 0.1,
) -> Details:
    """`assign_paa` with everything that led to the assignment; same arguments."""
    if topk < 1:
        raise ValueError(f"topk must be at least 1, got {topk}")
    match = prematch(grid.boxes, targets, geometry, threshold, profile.low_quality, anchor_valid)
    decoded = decode_deltas(grid.boxes, deltas, geometry, clamp_both_sides)
    scores = anchor_scores(
        logits, decoded, match, targets, profile.score_box_weight, profile.giou_eps, profile.giou_floor
    )
    candidates = select_candidates(scores, match, targets.valid.shape[1], grid.level_sizes, topk)
    mixture = component = log_density = None
    if scheme == "number" or scheme == "range":
        positive, ignored = fixed_separation(candidates, fixed_number if scheme == "number" else None, score_range)
    else:
        split = split_candidates(
            candidates.losses.flatten(0, 1),
            candidates.valid.flatten(0, 1),
            scheme,
            keep_single=profile.keep_single,
            first_component_only=profile.first_component_only,
            all_without_first=profile.all_without_first,
        )
        mixture, parts = split.mixture, (split.component, split.log_density, *split.separation)
        component, log_density, positive, ignored = (part.view_as(candidates.valid) for part in parts)
    return Details(
        assignment=_spread(candidates, positive, ignored, targets, match, anchor_valid),
        match=match,
        scores=scores,
        candidates=candidates,
        mixture=mixture,
        component=component,
        log_density=log_density,
        positive=positive,
        ignored=ignored,
    )


def prematch(
    anchors: Float[Tensor, "A 4"],
    targets: Targets,
    geometry: Geometry = MODERN,
    threshold: float = 0.1,
    low_quality: LowQualityRule = "own",
    anchor_valid: Bool[Tensor, "B A"] | None = None,
) -> Int[Tensor, "B A"]:
    """Object of every anchor by IoU alone, BACKGROUND where none (Algorithm 1, line 3; spec section 3.1).

    An anchor goes to the object of its largest IoU (the first of equals) if that reaches `threshold`. The anchors with
    an object's largest IoU, all of several, are matched below the threshold too: with "own" to the object of their own
    largest IoU (the authors), so that an object can end without any; with "overwrite" to that object, also away from
    their own, later objects first (MMDetection).

    Note: an object whose largest IoU is 0 has no best anchors; the originals take all of its anchors.
    """
    batch, objects = targets.valid.shape
    pairs = CACHED_IOUS if anchors.device.type == "cpu" else IOU_CHUNK
    chunk = max(1, pairs // (batch * len(anchors)))
    nobody = torch.full((batch, len(anchors)), BACKGROUND, device=anchors.device)
    matches = Matches(torch.full_like(nobody, -1, dtype=anchors.dtype), nobody, nobody)
    anchors = anchors.T.contiguous().T  # each coordinate in one piece, which pairs up in half the time
    for start in range(0, objects, chunk):
        boxes = targets.boxes[:, start : start + chunk, None]
        exists = targets.valid[:, start : start + chunk, None]
        if anchor_valid is not None:
            exists = exists & anchor_valid[:, None]
        matches = match_chunk(matches, torch.where(exists, box_iou(boxes, anchors, geometry), -1.0), start)
    return resolve_matches(matches, threshold, low_quality)


def match_chunk(matches: Matches, iou: Float[Tensor, "B g A"], start: int) -> Matches:
    """Matches after some more objects, numbered from `start`; an IoU of -1 says that the pair does not exist."""
    value, index = iou.max(dim=1)
    better = value > matches.best_iou
    highest = iou.amax(dim=2, keepdim=True)
    highest = highest.masked_fill(highest <= 0, torch.inf)  # attained by none
    number = torch.arange(start, start + iou.shape[1], device=iou.device, dtype=torch.int32)[:, None]
    favourite_of = torch.where(iou == highest, number, BACKGROUND).amax(dim=1)
    return Matches(
        torch.where(better, value, matches.best_iou),
        torch.where(better & (value >= 0), index + start, matches.best_object),
        torch.maximum(favourite_of, matches.favourite_of),
    )


def resolve_matches(matches: Matches, threshold: float, low_quality: LowQualityRule) -> Int[Tensor, "B A"]:
    """Object of every anchor, BACKGROUND where none; see `prematch`."""
    favourite = matches.favourite_of >= 0
    matched = (matches.best_iou >= threshold) | favourite
    own = torch.where(matched, matches.best_object, BACKGROUND)
    return torch.where(favourite, matches.favourite_of, own) if low_quality == "overwrite" else own


def anchor_scores(
    logits: Float[Tensor, "B A C"],
    boxes: Float[Tensor, "B A 4"],
    match: Int[Tensor, "B A"],
    targets: Targets,
    box_weight: float = 1.0,
    giou_eps: float = 1e-7,
    giou_floor: bool = False,
) -> Float[Tensor, "B A"]:
    """How badly each anchor predicts its matched object, in float32 or better (Eq. 3, the negative log of Eq. 1).

    The focal loss summed over classes plus `box_weight` (lambda_1) times the GIoU loss; low is good. Infinite where an
    anchor is unmatched; infinite or NaN where a diverged network's output is.

    Args:
        logits: class scores before the sigmoid.
        boxes: decoded predictions.
        match: object of each anchor, or BACKGROUND.
        targets: the objects.
        box_weight: 1 in the paper.
        giou_eps: see `core.losses.giou_loss`.
        giou_floor: see `core.losses.giou_loss`.
    """
    labels = _per_anchor(targets.labels, match, BACKGROUND)
    matched_boxes = _per_anchor(targets.boxes, match, 0)
    class_loss = summed_focal_loss(logits, labels)
    scores = class_loss + box_weight * giou_loss(boxes, matched_boxes, giou_eps, giou_floor)
    return scores.masked_fill(match < 0, torch.inf)


def select_candidates(
    scores: Float[Tensor, "B A"], match: Int[Tensor, "B A"], objects: int, level_sizes: list[int], topk: int = 9
) -> Candidates:
    """Each object's `topk` matched anchors of lowest score on every level (Algorithm 1, lines 5-11).

    Args:
        scores: anchor scores. An anchor whose score is infinite or NaN is no candidate: it must not reach the mixture.
        match: object of each anchor, or BACKGROUND.
        objects: G, number of objects of an image, padding included.
        level_sizes: number of anchors of each level.
        topk: K, candidates of an object on each level, fewer where it has fewer anchors. Of equal scores the lower
            anchor index comes first.
    """
    levels = len(level_sizes)
    level = torch.cat([torch.full((size,), i, device=match.device) for i, size in enumerate(level_sizes)])
    group = torch.where(scores.isfinite() & (match >= 0), match * levels + level, objects * levels)
    order = scores.argsort(dim=1, stable=True)
    order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))
    borders = torch.arange(objects * levels + 1, device=match.device).expand(len(match), -1).contiguous()
    starts = torch.searchsorted(group.gather(1, order), borders)
    position = starts[:, :-1, None] + torch.arange(topk, device=match.device)
    valid = (position < starts[:, 1:, None]).view(len(match), objects, levels * topk)
    index = order.gather(1, position.flatten(1).clamp(max=order.shape[1] - 1))
    losses = scores.gather(1, index).view_as(valid).masked_fill(~valid, torch.inf)
    return Candidates(index.view_as(valid), losses, valid)


def fixed_separation(candidates: Candidates, number: int | None, score_range: float) -> Separation:
    """The two simpler separations of Table 1, right; nothing is ignored.

    With a `number`, that many candidates of an object are positive, those of the lowest anchor score (FNP); of equal
    ones the first. Without, all are whose score is above `score_range` (FSR).

    Note: the paper does not define the score of its FSR rows; with exp(-anchor score) in (0, 1], the product of Eq. 1,
    a fresh network's anchors have at most 0.15, which is why 0.3 "fails to train".
    """
    if number is None:
        positive = candidates.valid & ((-candidates.losses).exp() > score_range)
    else:
        rank = candidates.losses.argsort(dim=-1, stable=True).argsort(dim=-1)
        positive = candidates.valid & (rank < number)
    return Separation(positive, torch.zeros_like(positive))


@torch.no_grad()
def assign_hard_iou(
    grid: AnchorGrid, targets: Targets, geometry: Geometry = MODERN, anchor_valid: Bool[Tensor, "B A"] | None = None
) -> Assignment:
    """RetinaNet's rule with one anchor a location, the baseline of section 4.2 (spec section 8).

    Positive from IoU 0.5, background below 0.4, ignored between; an object's best anchors are matched at any IoU, to
    their own best object. A match whose anchor has its centre outside the object, or less than 0.01 px inside, is
    ignored.
    """
    matched = prematch(grid.boxes, targets, geometry, HARD_IOU, "own", anchor_valid)
    doubtful = (matched < 0) & (prematch(grid.boxes, targets, geometry, HARD_BACKGROUND, "own", anchor_valid) >= 0)
    centred = centres_inside(grid.points, _per_anchor(targets.boxes, matched, 0))
    ignored = doubtful | ((matched >= 0) & ~centred)
    if anchor_valid is not None:
        ignored = ignored | ~anchor_valid
    labels = _per_anchor(targets.labels, matched, BACKGROUND)
    return Assignment(matched.masked_fill(ignored, IGNORED), labels.masked_fill(ignored, IGNORED))


def _per_anchor(values: Tensor, match: Int[Tensor, "B A"], nobody: int) -> Tensor:
    """Each anchor's row of its object's values, (B, G) or (B, G, 4); anchors without an object get `nobody`."""
    row = values.new_full((len(values), 1, *values.shape[2:]), nobody)
    index = torch.where(match >= 0, match, values.shape[1])
    if values.dim() == 3:
        index = index[..., None].expand(-1, -1, values.shape[2])
    return torch.cat([values, row], dim=1).gather(1, index)


def _spread(
    candidates: Candidates,
    positive: Bool[Tensor, "B G K"],
    ignored: Bool[Tensor, "B G K"],
    targets: Targets,
    match: Int[Tensor, "B A"],
    anchor_valid: Bool[Tensor, "B A"] | None,
) -> Assignment:
    """From candidates to anchors: no anchor is a candidate twice, so every one is written at most once."""
    outcome = torch.full_like(match, BACKGROUND)
    if anchor_valid is not None:
        outcome = outcome.masked_fill(~anchor_valid, IGNORED)
    number = torch.arange(positive.shape[1], device=match.device)[:, None].expand_as(positive)
    value = torch.where(positive, number, IGNORED)
    place = torch.where(positive | ignored, candidates.anchors, match.shape[1])  # one column more takes the negatives
    spare = torch.cat([outcome, outcome.new_empty(len(outcome), 1)], dim=1)
    gt_index = spare.scatter(1, place.flatten(1), value.flatten(1))[:, :-1]
    labels = _per_anchor(targets.labels, gt_index, BACKGROUND)
    return Assignment(gt_index, torch.where(gt_index == IGNORED, IGNORED, labels))
