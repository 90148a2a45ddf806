"""Outputs to detections: theta, the two decodings, class scores, soft-NMS (paper, section 4; spec section 5)."""

from jaxtyping import Int
from torch import Tensor

from core.boxes import box_area, clip_boxes
from core.nms import Candidates, best_in_groups, to_detections
from core.types import Detections
from padet.coder import decode
from padet.config import Config
from padet.model import Outputs, float32_outputs, promoted_anchors
from padet.soft_nms import soft_nms


def detect(
    outputs: Outputs, sizes: Int[Tensor, "B 2"], config: Config, original_sizes: Int[Tensor, "B 2"] | None = None
) -> Detections:
    """Detections of a batch by falling score, boxes in pixels of the network input.

    Args:
        outputs: of the model, any float type; everything here is float32 or better.
        sizes: height and width of each resized image, to which boxes are clipped.
        config: thresholds, soft-NMS, limits.
        original_sizes: of the image files; part of every method's signature, not needed here, since soft-NMS's IoU is
            the same before and after each axis is scaled.
    """
    pool = candidate_boxes(float32_outputs(outputs), sizes, config)
    kept = soft_nms(
        pool,
        config.nms,
        iou=config.nms_iou,
        sigma=config.nms_sigma,
        floor=config.score_floor,
        limit=config.max_detections,
    )
    return to_detections(kept, len(sizes))


def candidate_boxes(outputs: Outputs, sizes: Int[Tensor, "B 2"], config: Config) -> Candidates:
    """What reaches soft-NMS: pairs of anchor and class over both thresholds, the best of each class, clipped.

    An anchor whose APM score is below theta gives none; that score takes no further part (spec section 5, step 2).
    Boxes that clipping leaves without area are dropped.
    """
    scores = outputs.logits.softmax(dim=-1)[..., 1:]
    wanted = scores > config.score_threshold
    if outputs.apm_logits is not None:
        wanted &= (outputs.apm_logits.sigmoid() >= config.theta)[..., None]
    images, anchors, labels = wanted.nonzero().unbind(1)
    boxes = decode(promoted_anchors(outputs)[images, anchors], outputs.deltas[images, anchors])
    boxes = clip_boxes(boxes[:, None], sizes[images])[:, 0]
    pool = Candidates(boxes, scores[images, anchors, labels], labels, images)
    pool = pool.select(box_area(boxes).nonzero()[:, 0])
    classes = pool.images * scores.shape[-1] + pool.labels
    # in the order of anchors, which decides between equal scores
    return pool.select(best_in_groups(pool.scores, classes, config.pre_nms_top).sort()[0])
