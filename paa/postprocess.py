"""PAA's outputs to detections: unified score, class-wise NMS, score voting (paper section 3.3, spec section 6)."""

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from core.boxes import box_area, box_iou, clip_boxes, decode_deltas
from core.geometry import MODERN, Geometry
from core.nms import Candidates, best_in_groups, chosen, level_groups, nms_indices, to_detections
from core.types import Detections
from paa.config import Config
from paa.model import Outputs

VOTING_IOU = 0.01  # neighbours overlap a box by more; the paper says by anything above 0 (spec section 14)
CHUNK = 1 << 20  # (kept box, neighbour) pairs worked on at a time: about 100 MB


def detect(
    outputs: Outputs, sizes: Int[Tensor, "B 2"], config: Config, original_sizes: Int[Tensor, "B 2"] | None = None
) -> Detections:
    """Detections of a batch by falling score, boxes in pixels of the network input (spec PAA section 6).

    Args:
        outputs: of the model, any float type; everything here is float32 or better.
        sizes: height and width of each resized image, to which boxes are clipped.
        config: thresholds, limits, profile, geometry; `score_voting` switches the last step.
        original_sizes: height and width of each image file. Only profile `mmdet` looks at it: NMS and voting then
            measure in the file's pixels, which changes nothing but rounding unless the geometry is legacy.

    Returns:
        At most `max_detections` of an image; a few more where several are exactly as good as the last one, unless the
        profile is `mmdet`. Voting moves boxes, never scores, labels or order.
    """
    switches = config.rules
    pool = candidate_boxes(outputs, sizes, config)
    scales = None
    if switches.vote_in_original_pixels and original_sizes is not None:
        scales = (sizes / original_sizes).flip(-1).repeat(1, 2)[pool.images]  # x, y, x, y
        pool = pool._replace(boxes=pool.boxes / scales)
    geometry = config.box_geometry
    index = nms_indices(pool, config.nms_iou, config.max_detections, geometry, keep_ties=switches.keep_ties)
    kept = pool.select(index)
    if config.score_voting:
        kept = kept._replace(boxes=vote(kept, pool, config.voting_sigma, geometry))
    if scales is not None:
        kept = kept._replace(boxes=kept.boxes * scales[index])
    return to_detections(kept, len(sizes))


def unified_score(
    class_scores: Float[Tensor, "*#n"], ious: Float[Tensor, "*#n"] | None, root: bool = True
) -> Float[Tensor, "*n"]:
    """sqrt(class score * predicted IoU), Eq. 1 with lambda 1; the class score alone where there is no IoU branch.

    Note: the paper has the product; the root is the authors' code's and keeps the order. MMDetection's ATSS has none.
    """
    if ious is None:
        return class_scores
    return (class_scores * ious).sqrt() if root else class_scores * ious


def candidate_boxes(outputs: Outputs, sizes: Int[Tensor, "B 2"], config: Config) -> Candidates:
    """What reaches NMS: pairs over the score threshold, the best `pre_nms_top` of each level, decoded and clipped.

    The profile says whether the threshold is put on the class score or on the unified score, and whether a level's best
    are (anchor, class) pairs or anchors (spec PAA section 6, steps 1 and 2; section 11 for ATSS).
    """
    switches = config.rules
    class_scores = _float(outputs.logits).sigmoid()
    quality = None if outputs.quality_logits is None else _float(outputs.quality_logits).sigmoid()[..., None]
    score = partial(unified_score, root=switches.root_of_score)
    groups = level_groups(len(outputs.logits), outputs.grid.level_sizes, outputs.logits.device)
    wanted = (class_scores if switches.threshold_on_class else score(class_scores, quality)) > config.score_threshold
    if not switches.top_over_pairs:
        best_class = score(class_scores.amax(dim=-1, keepdim=True), quality)
        best = best_in_groups(best_class.flatten(), groups.flatten(), config.pre_nms_top)
        wanted &= chosen(best, groups.shape)[..., None]
    images, anchors, labels = wanted.nonzero().unbind(1)
    pair_scores = class_scores[images, anchors, labels]
    scores = score(pair_scores, None if quality is None else quality[images, anchors, 0])
    if switches.top_over_pairs:
        ranked = pair_scores if switches.rank_on_class else scores
        best = best_in_groups(ranked, groups[images, anchors], config.pre_nms_top)
        images, anchors, labels, scores = images[best], anchors[best], labels[best], scores[best]
    boxes = decode_deltas(
        outputs.grid.boxes[anchors],
        _float(outputs.deltas)[images, anchors],
        config.box_geometry,
        config.switches.clamp_both_sides,
    )
    boxes = clip_boxes(boxes[:, None], sizes[images], config.box_geometry)[:, 0]
    pool = Candidates(boxes, scores, labels, images)
    return pool.select(box_area(boxes).nonzero()[:, 0]) if switches.drop_empty_boxes else pool


def _float(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def vote(
    kept: Candidates, pool: Candidates, sigma: float = 0.025, geometry: Geometry = MODERN, chunk: int = CHUNK
) -> Float[Tensor, "k 4"]:
    """Score voting (section 3.3): every kept box becomes a weighted mean of the candidates around it.

    box = sum_i w_i box_i / sum_i w_i with w_i = exp(-(1 - IoU_i)^2 / sigma) * score_i, over all candidates of the same
    image and class with IoU > 0.01: the box itself and those that NMS suppressed too. IoUs are those before voting.

    Args:
        kept: what NMS left.
        pool: what NMS was given.
        sigma: width of the weight. Deviation: the paper prints 0.0025, where voting almost does nothing; the authors'
            code has 0.025 (spec section 6).
        geometry: how the IoU measures boxes.
        chunk: (kept box, candidate) pairs worked on at a time; bounds memory.

    Returns:
        New boxes of `kept`. A box that not even overlaps itself (it has no area), or whose weights are all 0, stays.
    """
    classes = int(pool.labels.max()) + 1 if len(pool.labels) else 1
    keys = pool.images * classes + pool.labels
    order = keys.argsort(stable=True)
    pool, kept_keys = pool.select(order), kept.images * classes + kept.labels
    first, last = (torch.searchsorted(keys[order], kept_keys, side=side) for side in ("left", "right"))
    width = max(1, int((last - first).max())) if len(first) else 1  # members of the largest group
    rows = max(1, chunk // width)
    parts = zip(kept.boxes.split(rows), first.split(rows), last.split(rows), strict=True)
    return torch.cat([_vote_rows(boxes, start, end, pool, width, sigma, geometry) for boxes, start, end in parts])


def _vote_rows(
    boxes: Float[Tensor, "k 4"],
    first: Int[Tensor, " k"],
    last: Int[Tensor, " k"],
    pool: Candidates,
    width: int,
    sigma: float,
    geometry: Geometry,
) -> Float[Tensor, "k 4"]:
    """`vote` for boxes whose group is rows first : last of the sorted pool, at most `width` of them; in float64."""
    rows = first[:, None] + torch.arange(width, device=boxes.device)
    member = rows < last[:, None]
    rows = rows.clamp(max=len(pool.scores) - 1)
    neighbours = pool.boxes[rows].double()
    ious = box_iou(boxes[:, None].double(), neighbours, geometry)
    weights = (-(1 - ious).square() / sigma).exp() * pool.scores[rows]
    weights = weights.masked_fill(~member | (ious <= VOTING_IOU), 0)
    total = weights.sum(dim=1, keepdim=True)
    voted = (weights[:, None] @ neighbours)[:, 0] / total
    return torch.where(total > 0, voted, boxes).to(boxes.dtype)
