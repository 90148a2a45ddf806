"""Every host's outputs to detections: score, threshold, the best of each level, class-wise NMS (spec sections 2, 5)."""

from jaxtyping import Float, Int
from torch import Tensor

from core.anchors import anchor_strides
from core.boxes import box_area, clip_boxes
from core.nms import Candidates, best_in_groups, chosen, level_groups, nms_indices, to_detections
from core.types import Detections
from dynamic_atss.config import Config
from dynamic_atss.losses import class_scores
from dynamic_atss.model import Outputs, decode, final_regression, float32_outputs


def detect(
    outputs: Outputs, sizes: Int[Tensor, "B 2"], config: Config, original_sizes: Int[Tensor, "B 2"] | None = None
) -> Detections:
    """Detections of a batch by falling score, boxes in pixels of the network input.

    Args:
        outputs: of the model, any float type; everything here is float32 or better.
        sizes: height and width of each resized image, to which boxes are clipped.
        config: host, thresholds, limits, profile, geometry.
        original_sizes: of the image files; part of every method's signature, not needed here.

    Returns:
        At most `max_detections` of an image; a few more where several are exactly as good as the last one and the
        profile keeps ties.
    """
    pool = candidate_boxes(float32_outputs(outputs), sizes, config)
    ties = config.rules.keep_ties
    index = nms_indices(pool, config.nms_iou, config.max_detections, config.box_geometry, keep_ties=ties)
    return to_detections(pool.select(index), len(sizes))


def scores_of(outputs: Outputs, config: Config) -> tuple[Float[Tensor, "B A C"], Float[Tensor, "B A C"]]:
    """What the threshold is put on, and the score of the detection; the ATSS host joins class and branch in it."""
    if config.host != "atss":
        scores = class_scores(outputs)
        return scores, scores
    assert outputs.quality is not None
    classes = outputs.logits.sigmoid()
    joined = classes * outputs.quality.sigmoid()[..., None]
    return classes, joined.sqrt() if config.rules.root_of_score else joined


def candidate_boxes(outputs: Outputs, sizes: Int[Tensor, "B 2"], config: Config) -> Candidates:
    """What reaches NMS: pairs over the threshold, the best `pre_nms_top` of each level, decoded and clipped."""
    rules = config.rules
    classes, scores = scores_of(outputs, config)
    groups = level_groups(len(outputs.logits), outputs.grid.level_sizes, outputs.logits.device)
    wanted = classes > config.score_threshold
    if rules.best_locations:
        best = best_in_groups(classes.amax(dim=-1).flatten(), groups.flatten(), config.pre_nms_top)
        wanted &= chosen(best, groups.shape)[..., None]
    images, anchors, labels = wanted.nonzero().unbind(1)
    if not rules.best_locations:
        ranked = (classes if rules.rank_on_class else scores)[images, anchors, labels]
        best = best_in_groups(ranked, groups[images, anchors], config.pre_nms_top)
        images, anchors, labels = images[best], anchors[best], labels[best]
    grid = outputs.grid
    boxes = decode(
        final_regression(outputs)[images, anchors][None],
        grid.boxes[anchors][None],
        grid.points[anchors][None],
        anchor_strides(grid)[anchors][None],
        config,
    )[0]
    boxes = clip_boxes(boxes[:, None], sizes[images], config.box_geometry)[:, 0]
    pool = Candidates(boxes, scores[images, anchors, labels], labels, images)
    return pool.select(box_area(boxes).nonzero()[:, 0]) if rules.drop_empty_boxes else pool
