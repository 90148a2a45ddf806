"""PAA's assignment and loss against the usual way: image by image, object by object, one scikit-learn fit an object.

    python -m benchmarks.speed paa-loss

The loop follows spec PAA sections 3 to 5 as the published implementations do: a matrix of IoUs for each image, scores
of the matched anchors only, a Python loop over objects and levels, losses of the positives only. The focal loss is
torchvision's; decoding, IoU and GIoU are the same functions of `core` as ours.
"""

import statistics
import time
import warnings
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.ops import sigmoid_focal_loss

from benchmarks.atss_speed import random_targets
from benchmarks.mixture_speed import sklearn_row
from core.anchors import AnchorGrid, anchor_grid, anchors_inside, level_shapes
from core.boxes import box_iou, decode_deltas, encode_deltas
from core.geometry import MODERN
from core.losses import giou_loss, one_hot_labels
from core.types import BACKGROUND, IGNORED, Targets
from paa.config import Config
from paa.losses import assign, compute_losses
from paa.model import Outputs

CANVAS = (800, 1088)  # pixels, both images
CLASSES = 80
THREADS = 2
LOSSES = ("loss_cls", "loss_box", "loss_iou")
CHUNK = 1 << 21  # anchor-object pairs at a time, in making the data only


def paa_loss_case(
    objects: int = 20, repeats: int = 9, seed: int = 0, canvas: tuple[int, int] = CANVAS
) -> dict[str, object]:
    """Time `paa.losses.compute_losses` and the loop in turn, forward; median milliseconds and their ratio.

    Args:
        objects: of each of the 2 images; the targets are a ratio of 4 with 20 objects and of 10 with 100.
        repeats: number of turns.
        seed: of objects and outputs.
        canvas: height and width of the batch in pixels.

    Returns:
        name, what, ours_ms, reference_ms, ratio, ratio_spread (smallest and largest of one turn), best_ratio (of the
        fastest times), equal (the same object for every anchor, losses within a relative 1e-5), the losses, the number
        of positives and repeats.

    Raises:
        ModuleNotFoundError: without scikit-learn, which is in the extra `dev`.
    """
    config = Config()
    targets = random_targets(seed, objects, canvas)
    outputs = half_trained(targets, canvas, seed)
    ours = lambda: compute_losses(outputs, targets, 0, 1, config=config)  # noqa: E731
    loop = lambda: loop_losses(outputs, targets, config)  # noqa: E731
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        equal, losses = agree(outputs, targets, config), ours()  # also the warm-up
        times = [(_milliseconds(ours), _milliseconds(loop)) for _ in range(repeats)]
    finally:
        torch.set_num_threads(threads)
    ours_ms, reference_ms = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = [reference / own for own, reference in times]
    return {
        "name": f"paa-loss-{objects}",
        "what": f"PAA's assignment and loss, {len(outputs.logits)} images of {canvas[0]} x {canvas[1]} with {objects} "
        f"objects each, CPU, {THREADS} threads, eager",
        "ours_ms": ours_ms,
        "reference_ms": reference_ms,
        "ratio": reference_ms / ours_ms,
        "ratio_spread": [min(ratios), max(ratios)],
        "best_ratio": min(reference for _, reference in times) / min(own for own, _ in times),
        "equal": equal,
        "losses": {name: float(losses[name]) for name in LOSSES},
        "positives": int(assign(outputs, targets, config).positive.sum()),
        "repeats": repeats,
    }


def agree(outputs: Outputs, targets: Targets, config: Config) -> bool:
    """Whether the loop gives every anchor the same object as ours, and the same losses up to the order of sums."""
    ours = compute_losses(outputs, targets, 0, 1, config=config)
    losses, gt_index = loop_losses(outputs, targets, config)
    close = all(torch.isclose(losses[name], ours[name], rtol=1e-5, atol=0) for name in LOSSES)
    return close and torch.equal(gt_index, assign(outputs, targets, config).gt_index)


def half_trained(targets: Targets, canvas: tuple[int, int], seed: int) -> Outputs:
    """Outputs as of a network half-way through training.

    An anchor that overlaps an object by at least 0.1 predicts its box with an error that is small for a third of them,
    and its class the better the more it overlaps and the smaller the error is. All other logits lie around the prior
    of 0.01, all other deltas around 0.
    """
    random = torch.Generator().manual_seed(seed)
    grid = anchor_grid(level_shapes(canvas))
    shape = (len(targets.boxes), len(grid.boxes))
    overlap, nearest = (torch.stack(part) for part in zip(*(_nearest(grid, b) for b in targets.boxes), strict=True))
    rows = torch.arange(len(overlap))[:, None]
    error = torch.where(torch.rand(shape, generator=random) < 1 / 3, 0.3, 2.0)[..., None]
    noise = torch.randn(*shape, 4, generator=random)
    found = encode_deltas(grid.boxes.expand(*shape, 4), targets.boxes[rows, nearest]) + error * noise
    near = overlap >= 0.1
    deltas = torch.where(near[..., None], found, noise / 2)
    logits = -4.6 + torch.randn(*shape, CLASSES, generator=random)
    skill = near * (2 + 4 * overlap - noise.abs().mean(dim=-1) * error[..., 0])
    logits += one_hot_labels(targets.labels[rows, nearest], CLASSES) * skill[..., None]
    return Outputs(logits, deltas, torch.randn(shape, generator=random), grid)


def _nearest(grid: AnchorGrid, gt_boxes: Float[Tensor, "G 4"]) -> tuple[Float[Tensor, " A"], Int[Tensor, " A"]]:
    parts = grid.boxes.split(max(1, CHUNK // len(gt_boxes)))
    largest = [box_iou(part[:, None], gt_boxes[None]).max(dim=1) for part in parts]
    return torch.cat([values for values, _ in largest]), torch.cat([index for _, index in largest])


def loop_losses(outputs: Outputs, targets: Targets, config: Config) -> tuple[dict[str, Tensor], Int[Tensor, "B A"]]:
    """Losses in profile `ours` and the object of every anchor, all by the loop (spec PAA sections 3 and 5)."""
    inside = anchors_inside(outputs.grid, targets.sizes)
    assigned = [_assign_image(outputs, targets, inside[image], image, config) for image in range(len(targets.boxes))]
    focal, giou, cross_entropy, ious = [], [], [], []
    for image, gt_index in enumerate(assigned):
        positive, counted = (gt_index >= 0).nonzero()[:, 0], gt_index != IGNORED
        objects = gt_index[positive]
        labels = torch.full_like(gt_index, BACKGROUND)
        labels[positive] = targets.labels[image, objects]
        classes = one_hot_labels(labels[counted], outputs.logits.shape[-1])
        focal.append(sigmoid_focal_loss(outputs.logits[image, counted], classes).sum())
        boxes = decode_deltas(outputs.grid.boxes[positive], outputs.deltas[image, positive])
        matched = targets.boxes[image, objects]
        iou = box_iou(boxes.detach(), matched)
        giou.append((giou_loss(boxes, matched) * iou).sum())
        quality = outputs.quality_logits
        assert quality is not None
        cross_entropy.append(binary_cross_entropy_with_logits(quality[image, positive], iou, reduction="sum"))
        ious.append(iou)
    weights = torch.cat(ious)
    count = max(len(weights), 1)
    losses = {
        "loss_cls": torch.stack(focal).sum() / count,
        "loss_box": config.box_weight * torch.stack(giou).sum() / weights.sum().clamp(min=1e-6),
        "loss_iou": config.quality_weight * torch.stack(cross_entropy).sum() / count,
    }
    return losses, torch.stack(assigned)


@torch.no_grad()
def _assign_image(
    outputs: Outputs, targets: Targets, inside: Bool[Tensor, " A"], image: int, config: Config
) -> Int[Tensor, " A"]:
    """Object of every anchor of one image, BACKGROUND or IGNORED."""
    rows = targets.valid[image].nonzero()[:, 0].tolist()
    gt_boxes, gt_labels = targets.boxes[image, rows], targets.labels[image, rows]
    gt_index = torch.full_like(inside, BACKGROUND, dtype=torch.int64).masked_fill(~inside, IGNORED)
    if not rows:
        return gt_index
    match = _match_image(outputs.grid.boxes, gt_boxes, inside, config.prematch_iou)
    anchors = (match >= 0).nonzero()[:, 0]
    objects = match[anchors]
    boxes = decode_deltas(outputs.grid.boxes[anchors], outputs.deltas[image, anchors], MODERN)
    classes = one_hot_labels(gt_labels[objects], outputs.logits.shape[-1])
    scores = sigmoid_focal_loss(outputs.logits[image, anchors], classes).sum(dim=-1)
    scores = scores + giou_loss(boxes, gt_boxes[objects])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fits that stop at the last step
        for number, row in enumerate(rows):
            mine = (objects == number).nonzero()[:, 0]
            candidates = _candidates(scores, anchors, mine, outputs.grid.level_sizes, config.topk)
            gt_index[anchors[candidates[_separate(scores[candidates])]]] = row
    return gt_index


def _match_image(
    anchors: Float[Tensor, "A 4"], gt_boxes: Float[Tensor, "G 4"], inside: Bool[Tensor, " A"], threshold: float
) -> Int[Tensor, " A"]:
    """Each anchor's object by IoU, with an object's best anchors restored to their own best object."""
    ious = box_iou(anchors[:, None], gt_boxes[None]).masked_fill(~inside[:, None], -1)
    value, own = ious.max(dim=1)
    match = own.masked_fill(value < threshold, BACKGROUND)
    highest = ious.max(dim=0).values
    favourites = ((ious == highest) & (highest > 0)).nonzero()[:, 0]
    match[favourites] = own[favourites]
    return match


def _candidates(
    scores: Float[Tensor, " m"], anchors: Int[Tensor, " m"], mine: Int[Tensor, " n"], level_sizes: list[int], topk: int
) -> Int[Tensor, " K"]:
    """Which of an object's matched anchors, given by their rows, are among the best of their level."""
    chosen, first = [], 0
    for size in level_sizes:
        place = anchors[mine]
        level = mine[(place >= first) & (place < first + size)]
        chosen.append(level[scores[level].topk(min(topk, len(level)), largest=False).indices])
        first += size
    return torch.cat(chosen)


def _separate(losses: Float[Tensor, " K"]) -> Bool[Tensor, " K"]:
    """Scheme (c) of the paper's Fig. 3; an object with one candidate takes it."""
    if len(losses) < 2:
        return torch.ones_like(losses, dtype=torch.bool)
    return torch.from_numpy(sklearn_row(losses.double().numpy()))


def _milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1000
