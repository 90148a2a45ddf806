"""Loss functions: one value per element or box, no reduction, float32 or better also under autocast.

Sums and normalisers stand in each method's own `losses.py`, where its equation is. Binary cross entropy is torch's.
"""

import torch
import torch.nn.functional as F
import torchvision.ops
from jaxtyping import Bool, Float, Int
from torch import Tensor

CACHED_ROWS = 1024  # of logits, worked on together on a CPU: 80 classes of them are 320 kB
SOFTPLUS_LINEAR = 40.0  # ln(1 + e^x) is x to float64 precision from here on
TINY = 1e-12  # keeps a ratio of distances finite where a box has no area


def one_hot_labels(labels: Int[Tensor, "*n"], num_classes: int) -> Float[Tensor, "*n {num_classes}"]:
    """Targets of one-vs-all classification: 1 at an anchor's class; all 0 for BACKGROUND and IGNORED (below 0).

    An ignored anchor needs weight 0 as well, for the caller to apply.
    """
    classes = torch.arange(num_classes, device=labels.device)
    return (labels[..., None] == classes).to(torch.float32)


def sigmoid_focal_loss(
    logits: Float[Tensor, "*n"], targets: Float[Tensor, "*n"], alpha: float = 0.25, gamma: float = 2.0
) -> Float[Tensor, "*n"]:
    """Focal loss per element (Lin et al. 2017, Eq. 5): torchvision's, in float32 or better.

    Args:
        logits: before the sigmoid, of any size.
        targets: 1 where the class is right, otherwise 0 (`one_hot_labels`).
        alpha: weight of the positive class; the negatives get 1 - alpha.
        gamma: exponent of the modulating factor.

    Returns:
        -alpha (1-p)^gamma ln p where the target is 1, -(1-alpha) p^gamma ln(1-p) where it is 0.
    """
    logits = _at_least_float32(logits)
    return torchvision.ops.sigmoid_focal_loss(logits, targets.to(logits.dtype), alpha, gamma)


def summed_focal_loss(
    logits: Float[Tensor, "*n C"], labels: Int[Tensor, "*n"], alpha: float = 0.25, gamma: float = 2.0
) -> Float[Tensor, "*n"]:
    """Focal loss summed over classes (Lin et al. 2017, Eq. 5), in float32 or better.

    The sum of `sigmoid_focal_loss` with `one_hot_labels`, in a third of the passes over the logits: every class is
    taken as a negative, but for each anchor's own, whose logit is replaced by one that costs nothing.

    Args:
        logits: before the sigmoid, finite.
        labels: class of each anchor; below 0 (BACKGROUND, IGNORED): none is right.
        alpha: weight of the positive class; the negatives get 1 - alpha.
        gamma: exponent of the modulating factor.
    """
    logits = _at_least_float32(logits)
    rows, labels_of_rows = logits.flatten(0, -2), labels.flatten()
    # A CPU is several times faster on pieces that stay in its cache; a GPU wants one piece.
    size = CACHED_ROWS if rows.device.type == "cpu" else max(1, len(rows))
    pieces = zip(rows.split(size), labels_of_rows.split(size), strict=True)
    return torch.cat([_summed_focal(*piece, alpha, gamma) for piece in pieces]).view(labels.shape)


def _summed_focal(
    logits: Float[Tensor, "n C"], labels: Int[Tensor, " n"], alpha: float, gamma: float
) -> Float[Tensor, " n"]:
    right, index = labels >= 0, labels.clamp(min=0)[:, None]
    own = logits.gather(-1, index)[:, 0]
    others = logits.scatter(-1, index, torch.where(right, -torch.inf, own)[:, None])
    negatives = (others.sigmoid() ** gamma * F.softplus(others, threshold=SOFTPLUS_LINEAR)).sum(dim=-1)
    positive = (-own).sigmoid() ** gamma * F.softplus(-own, threshold=SOFTPLUS_LINEAR)
    return (1 - alpha) * negatives + alpha * positive * right


def quality_focal_loss(
    logits: Float[Tensor, "*n"], targets: Float[Tensor, "*n"], beta: float = 2.0
) -> Float[Tensor, "*n"]:
    """Quality focal loss per element, |q - p|^beta * BCE(p, q) (Li et al. 2020, GFL, Eq. 2); p = sigmoid(logit).

    Args:
        logits: before the sigmoid, of any size.
        targets: q in [0, 1]: the quality of a positive in its class's column, 0 elsewhere. It gets no gradient.
        beta: exponent of the modulating factor.

    Returns:
        Values with a gradient through both factors. At q = 0 they are p^beta * -ln(1 - p).
    """
    logits, targets = _at_least_float32(logits), targets.detach()
    return (targets - logits.sigmoid()).abs().pow(beta) * F.binary_cross_entropy_with_logits(
        logits, targets.to(logits.dtype), reduction="none"
    )


def quality_focal_loss_of_scores(
    scores: Float[Tensor, "*n"], targets: Float[Tensor, "*n"], beta: float = 2.0
) -> Float[Tensor, "*n"]:
    """`quality_focal_loss` of scores in [0, 1] instead of logits, as GFLV2's joint scores are.

    Logarithms are bounded by -100, torch's rule, so that a score of exactly 0 or 1 stays finite.
    """
    scores, targets = _at_least_float32(scores), targets.detach()
    return (targets - scores).abs().pow(beta) * F.binary_cross_entropy(
        scores, targets.to(scores.dtype), reduction="none"
    )


def varifocal_loss(
    logits: Float[Tensor, "*n"],
    targets: Float[Tensor, "*n"],
    positive: Bool[Tensor, "*#n"],
    alpha: float = 0.75,
    gamma: float = 2.0,
) -> Float[Tensor, "*n"]:
    """Varifocal loss per element (Zhang et al. 2021, VarifocalNet, Eq. 2).

    Args:
        logits: before the sigmoid, of any size.
        targets: q in [0, 1]: the quality of a positive in its class's column, 0 elsewhere. It gets no gradient.
        positive: the elements that are a positive's own class; also with q = 0, where their loss is 0.
        alpha: weight of the negatives.
        gamma: exponent of the negatives' modulating factor.

    Returns:
        q * BCE(p, q) where positive, alpha * p^gamma * -ln(1 - p) elsewhere, with a gradient through both factors.
    """
    logits, targets = _at_least_float32(logits), targets.detach()
    targets = targets.to(logits.dtype)
    weight = torch.where(positive, targets, alpha * logits.sigmoid().pow(gamma))
    return weight * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def distribution_focal_loss(logits: Float[Tensor, "*n bins"], targets: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Distribution focal loss per side (Li et al. 2020, GFL, Eq. 6): cross entropy with the two bins around the target.

    Args:
        logits: of the bins 0 ... n, before the softmax.
        targets: y in [0, n), in bins; the lower bin gets weight floor(y) + 1 - y, the upper one the rest.
    """
    logits = _at_least_float32(logits)
    low = targets.floor()
    index = low.long()[..., None]
    both = logits.log_softmax(dim=-1).gather(-1, torch.cat([index, index + 1], dim=-1))
    return -(both[..., 0] * (low + 1 - targets) + both[..., 1] * (targets - low))


def giou_loss(
    pred: Float[Tensor, "*#n 4"], target: Float[Tensor, "*#n 4"], eps: float = 1e-7, floor: bool = False
) -> Float[Tensor, "*n"]:
    """GIoU loss 1 - (I/U - (E-U)/E) per box, in [0, 2] (Rezatofighi et al. 2019, Algorithm 1; spec PAA section 2).

    Sides are x2 - x1 in both geometries. A prediction turned inside out has no area; its x2, y2 are raised to its x1,
    y1 (the authors of PAA), with `floor` they stay where they are and enclose (MMDetection). Values and gradients are
    finite for coordinates up to 1e18 pixels.

    Args:
        pred: predicted boxes, receive the gradient.
        target: boxes with x2 >= x1 and y2 >= y1.
        eps: square pixels added to union and enclosing area.
        floor: raise both areas to at least `eps` instead of adding it (MMDetection, with eps 1e-6).

    Note: torchvision's `generalized_box_iou_loss` has the same formula, but indexes with a mask, which waits for the
    device and cannot be traced.
    """
    pred, target = _at_least_float32(pred), _at_least_float32(target)
    if not floor:
        pred = _raise_corners(pred)
    intersection, union = _intersection_and_union(pred, target)
    corners_low, corners_high = torch.minimum(pred, target)[..., :2], torch.maximum(pred, target)[..., 2:]
    enclosing = _guard(_area(corners_high - corners_low), eps, floor)
    union = _guard(union, eps, floor)
    return 1 - (intersection / union - (enclosing - union) / enclosing)


def iou_loss(pred: Float[Tensor, "*#n 4"], target: Float[Tensor, "*#n 4"], eps: float = 1e-7) -> Float[Tensor, "*n"]:
    """IoU loss 1 - I/U per box, in [0, 1], with the conventions of `giou_loss`.

    Boxes that do not overlap lose 1 and get no gradient through the intersection.
    """
    pred, target = _raise_corners(_at_least_float32(pred)), _at_least_float32(target)
    intersection, union = _intersection_and_union(pred, target)
    return 1 - intersection / (union + eps)


def centerness_target(points: Float[Tensor, "*#n 2"], boxes: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*n"]:
    """Centre-ness sqrt(min(l,r)/max(l,r) * min(t,b)/max(t,b)) of points in boxes (Tian et al. 2019, FCOS, Eq. 3).

    1 at the middle of the box, 0 on its border and outside. `points` are anchor centres, so the geometry enters only
    through them.
    """
    to_low, to_high = points - boxes[..., :2], boxes[..., 2:] - points
    nearer, farther = torch.minimum(to_low, to_high), torch.maximum(to_low, to_high)
    ratios = nearer.clamp(min=0) / farther.clamp(min=TINY)
    return (ratios[..., 0] * ratios[..., 1]).sqrt()


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _raise_corners(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[..., :2], torch.maximum(boxes[..., :2], boxes[..., 2:])], dim=-1)


def _intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    sides = (torch.minimum(a, b)[..., 2:] - torch.maximum(a, b)[..., :2]).clamp(min=0)
    intersection = _area(sides)
    own = _area((a[..., 2:] - a[..., :2]).clamp(min=0))
    return intersection, own + _area(b[..., 2:] - b[..., :2]) - intersection


def _area(sides: Tensor) -> Tensor:
    return sides[..., 0] * sides[..., 1]  # not prod(dim=-1), whose gradient waits for the device


def _guard(area: Tensor, eps: float, floor: bool) -> Tensor:
    return area.clamp(min=eps) if floor else area + eps
