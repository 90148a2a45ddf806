"""TOOD's outputs to detections: threshold, the best of each level, class-wise NMS (supplement; spec section 3)."""

from jaxtyping import Float, Int
from torch import Tensor

from core.anchors import anchor_strides
from core.boxes import box_area, clip_boxes
from core.nms import Candidates, best_in_groups, chosen, level_groups, nms_indices, to_detections
from core.types import Detections
from tood_tal.config import Config
from tood_tal.model import Outputs


def detect(
    outputs: Outputs, sizes: Int[Tensor, "B 2"], config: Config, original_sizes: Int[Tensor, "B 2"] | None = None
) -> Detections:
    """Detections of a batch by falling score, boxes in pixels of the network input.

    Args:
        outputs: of the model.
        sizes: height and width of each resized image, to which boxes are clipped.
        config: thresholds, limits, profile.
        original_sizes: of the image files; part of every method's signature, not needed here.

    Returns:
        At most `max_detections` of an image.
    """
    pool = candidate_boxes(outputs, sizes, config)
    index = nms_indices(pool, config.nms_iou, config.max_detections, config.box_geometry)
    return to_detections(pool.select(index), len(sizes))


def candidate_boxes(outputs: Outputs, sizes: Int[Tensor, "B 2"], config: Config) -> Candidates:
    """What reaches NMS: pairs over the threshold, the best `pre_nms_top` of each level, clipped."""
    rules = config.rules
    groups = level_groups(len(outputs.scores), outputs.grid.level_sizes, outputs.scores.device)
    wanted = outputs.scores > config.score_threshold
    if rules.best_locations:
        best = best_in_groups(outputs.scores.amax(dim=-1).flatten(), groups.flatten(), config.pre_nms_top)
        wanted &= chosen(best, groups.shape)[..., None]
    images, anchors, labels = wanted.nonzero().unbind(1)
    if not rules.best_locations:
        best = best_in_groups(outputs.scores[images, anchors, labels], groups[images, anchors], config.pre_nms_top)
        images, anchors, labels = images[best], anchors[best], labels[best]
    boxes = outputs.boxes[images, anchors] * anchor_strides(outputs.grid)[anchors][:, None]
    if rules.clip:
        boxes = clip_boxes(boxes[:, None], sizes[images], config.box_geometry)[:, 0]
    pool = Candidates(boxes, detection_scores(outputs, images, anchors, labels), labels, images)
    return pool.select(box_area(boxes).nonzero()[:, 0]) if rules.drop_empty_boxes else pool


def detection_scores(
    outputs: Outputs, images: Int[Tensor, " n"], anchors: Int[Tensor, " n"], labels: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """The class score, as it is; plain ATSS multiplies it by centre-ness."""
    scores = outputs.scores[images, anchors, labels]
    return scores if outputs.quality is None else scores * outputs.quality[images, anchors].float().sigmoid()
