"""PADet's matching and soft-NMS against loops, and the whole detector against torchvision's SSD300.

    python -m benchmarks.speed padet-match padet-nms padet-whole

The loop of matching goes image by image as SSD's published implementations in Python do: a matrix of IoUs for each
image, every anchor's best object by that matrix, then object by object in Python the best free pair of those left, as
SSD's matcher takes them (spec PADet section 2.2). The loop of soft-NMS goes image by image, class by class and box by
box: take the best box, lower the scores of the others, each step vectorised over them. Both loops use the IoU of
`core`.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import ssd300_vgg16
from torchvision.models.detection.ssd import SSD

from core.boxes import box_iou
from core.complexity import measure
from core.nms import Candidates
from core.types import BACKGROUND, IGNORED, Targets
from padet.anchors import build_anchors
from padet.assigner import FORCED_IOU, match_anchors
from padet.config import Config
from padet.model import PADet
from padet.postprocess import detect
from padet.soft_nms import soft_nms

SIZE, IMAGES, OBJECTS = 512, 32, 40  # 32,756 anchors
CLASSES, EACH = 80, 400  # candidates of an image: of each class
LIMIT = 300  # detections of an image
SSD_SIDE = 300  # pixels
CANDIDATES = 1000  # pairs of anchor and class that reach NMS in either detector
SOFT_NMS = {"iou": 0.3, "sigma": 0.5, "floor": 0.001}
THREADS = 2


def match_case(
    objects: int = OBJECTS, images: int = IMAGES, size: int = SIZE, repeats: int = 5, seed: int = 0
) -> dict[str, Any]:
    """Time `padet.assigner.match_anchors` and the loop in turn.

    Args:
        objects: of each image, 8 pixels to the whole image wide, log-uniform.
        images: of the batch.
        size: of the input, which says how many anchors there are.
        repeats: number of turns.
        seed: of the objects.

    Returns:
        name, what, ours_ms and reference_ms (medians), ratio, ratio_spread (smallest and largest of one turn),
        best_ratio (of the fastest times), equal (the same object for every anchor), positives and repeats.
    """
    anchors, targets = build_anchors(size, "coco").boxes, random_targets(seed, images, objects, size)
    ours = lambda: match_anchors(anchors, targets).gt_index  # noqa: E731
    loop = lambda: loop_match(anchors, targets)  # noqa: E731
    found, expected = ours(), loop()
    return {
        "name": "padet-match",
        "what": f"PADet's matching, {images} images, {objects} objects each, {len(anchors)} anchors, CPU, {THREADS} "
        "threads, eager",
        **timed_in_turn(ours, loop, repeats),
        "equal": bool(torch.equal(found, expected)),
        "positives": int((found >= 0).sum()),
    }


def random_targets(seed: int, images: int, objects: int, size: int) -> Targets:
    """Objects with sides from 8 pixels to the image's, log-uniform, anywhere in the image."""
    generator = torch.Generator().manual_seed(seed)
    sides = 8 * (size / 8) ** torch.rand(images, objects, 2, generator=generator)
    corners = torch.rand(images, objects, 2, generator=generator) * (size - sides)
    labels = torch.randint(CLASSES, (images, objects), generator=generator)
    valid = torch.ones(images, objects, dtype=torch.bool)
    return Targets(torch.cat([corners, corners + sides], dim=-1), labels, valid, torch.full((images, 2), size))


def loop_match(anchors: Float[Tensor, "A 4"], targets: Targets) -> Int[Tensor, "B A"]:
    """The same matching image by image and object by object."""
    return torch.stack([_match_image(anchors, *image) for image in zip(targets.boxes, targets.valid, strict=True)])


def _match_image(
    anchors: Float[Tensor, "A 4"], boxes: Float[Tensor, "G 4"], valid: Bool[Tensor, " G"]
) -> Int[Tensor, " A"]:
    ious = box_iou(boxes[:, None], anchors[None]).masked_fill(~valid[:, None], 0.0)
    best, owner = ious.max(dim=0)
    gt_index = torch.where(best >= 0.5, owner, torch.where(best < 0.3, BACKGROUND, IGNORED))
    values, picks = (part.tolist() for part in ious.max(dim=1))
    left, taken = set(range(len(boxes))), set[int]()
    while left:
        row = max(left, key=lambda one: (values[one], -one))
        if values[row] <= FORCED_IOU:
            break
        if picks[row] in taken:  # its best anchor is another's by now: look for the best of those left
            free = ious[row].clone()
            free[list(taken)] = 0.0
            value, pick = free.max(dim=0)
            values[row], picks[row] = value.item(), int(pick)
            continue
        gt_index[picks[row]] = row
        taken.add(picks[row])
        left.remove(row)
    return gt_index


def soft_nms_case(
    limit: int | None = LIMIT, classes: int = CLASSES, each: int = EACH, repeats: int = 5, seed: int = 0
) -> dict[str, Any]:
    """Time `padet.soft_nms` and the loop in turn, linear kernel, on one image.

    Args:
        limit: detections of an image; None for as many as there are.
        classes: that have candidates.
        each: candidates of a class.
        repeats: number of turns.
        seed: of the candidates.

    Returns:
        name, what, ours_ms and reference_ms (medians), ratio, ratio_spread (smallest and largest of one turn),
        best_ratio (of the fastest times), equal (in float64: the same boxes in the same order, scores within 1e-6),
        difference (largest, of scores), kept and repeats.
    """
    pool = random_pool(classes, each, seed)
    most = len(pool.scores) if limit is None else limit
    ours = lambda: soft_nms(pool, "linear", **SOFT_NMS, limit=most)  # noqa: E731
    loop = lambda: loop_soft_nms(pool, most)  # noqa: E731
    exact = pool._replace(boxes=pool.boxes.double(), scores=pool.scores.double())  # so that rounding swaps no boxes
    found, expected = soft_nms(exact, "linear", **SOFT_NMS, limit=most), loop_soft_nms(exact, most)
    same = torch.equal(found.labels, expected.labels) and torch.equal(found.boxes, expected.boxes)
    difference = float((found.scores - expected.scores).abs().amax()) if same and len(found.scores) else 0.0
    return {
        "name": f"padet-nms-{limit or 'all'}",
        "what": f"soft-NMS, {classes} classes with {each} candidates each, "
        f"{f'the best {limit}' if limit else 'no limit'}, CPU, {THREADS} threads, eager",
        **timed_in_turn(ours, loop, repeats),
        "equal": same and difference <= 1e-6,
        "difference": difference,
        "kept": len(found.scores),
    }


def random_pool(classes: int, each: int, seed: int) -> Candidates:
    """Candidates of one image, those of a class around ten places, with scores from 0.01 to 1, most of them low."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(classes, 10, 2, generator=generator) * SIZE
    chosen = torch.randint(10, (classes, each, 1), generator=generator).expand(-1, -1, 2)
    centres = places.gather(1, chosen) + torch.randn(classes, each, 2, generator=generator) * 8
    half = torch.rand(classes, each, 2, generator=generator) * 30 + 20
    boxes = torch.cat([centres - half, centres + half], dim=-1).flatten(0, 1)
    scores = 0.01 ** torch.rand(classes * each, generator=generator)
    labels = torch.arange(classes).repeat_interleave(each)
    return Candidates(boxes, scores, labels, torch.zeros_like(labels))


def loop_soft_nms(pool: Candidates, limit: int) -> Candidates:
    """The same soft-NMS of one image class by class and box by box; a class ends where its best is below the floor."""
    lowered = torch.zeros_like(pool.scores)
    for label in pool.labels.unique():
        index = (pool.labels == label).nonzero()[:, 0]
        scores = pool.scores[index]
        while len(index):
            score, pick = scores.max(dim=0)
            if score < SOFT_NMS["floor"]:
                break
            lowered[index[pick]] = score
            ious = box_iou(pool.boxes[index[pick], None], pool.boxes[index])
            scores = torch.where(ious > SOFT_NMS["iou"], scores * (1 - ious), scores)
            others = torch.arange(len(index)) != pick
            index, scores = index[others], scores[others]
    order = lowered.argsort(descending=True, stable=True)[:limit]
    return pool._replace(scores=lowered).select(order[lowered[order] > 0])


def whole_case(
    config: Config | None = None, candidates: int = CANDIDATES, repeats: int = 9, seed: int = 0
) -> dict[str, Any]:
    """Milliseconds per GMAC from image to detections: PADet, and torchvision's SSD300 with VGG-16, in turn.

    Both have random weights and COCO's classes; a GMAC is 1e9 multiply-adds of convolutions, of one image. Untrained
    scores are about equal for all classes; the threshold of each detector is set so that as many pairs of anchor and
    class reach NMS in both. The image has the network's size. Both keep their maps channels last, as our commands do.

    Args:
        config: of PADet; VGG-16 at 384 x 384 by default. Its biases must start at 0, so that its scores are as SSD's.
        candidates: pairs of anchor and class that reach NMS.
        repeats: number of turns.
        seed: of weights and images.

    Returns:
        name, what, ours_ms and reference_ms (medians, per GMAC of its own), ratio, ratio_spread (smallest and largest
        of one turn), best_ratio (of the fastest times), gmacs and reference_gmacs, detections and
        reference_detections, and repeats.
    """
    config = config or Config(backbone_weights="none", prior=0.0)
    torch.manual_seed(seed)
    model = PADet(config, CLASSES).eval()
    ssd = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=CLASSES + 1).eval()
    for network in (model, ssd):
        network.to(memory_format=torch.channels_last)
    sizes = torch.tensor([[config.size, config.size]])
    images = torch.randint(256, (1, 3, config.size, config.size), dtype=torch.uint8)
    picture = torch.rand(3, SSD_SIDE, SSD_SIDE)
    gmacs, ssd_gmacs = measure(model, (config.size, config.size)).multiply_adds / 1e9, ssd_multiply_adds(ssd) / 1e9
    with torch.inference_mode():
        config = replace(config, score_threshold=threshold_of(model(images, sizes).logits, candidates))
        ssd.score_thresh = threshold_of(ssd_logits(ssd, picture), candidates)
        ours = lambda: detect(model(images, sizes), sizes, config)  # noqa: E731
        theirs = lambda: ssd([picture])  # noqa: E731
        found, ssd_found = ours(), theirs()
        times = timed_in_turn(ours, theirs, repeats, gmacs, ssd_gmacs)
    return {
        "name": "padet-whole",
        "what": f"PADet, {config.backbone}, {config.size} x {config.size}, {gmacs:.1f} GMACs, from image to "
        f"detections; ms per GMAC of each network, CPU, {THREADS} threads, eager",
        **times,
        "gmacs": gmacs,
        "reference_gmacs": ssd_gmacs,
        "detections": int(found.valid.sum()),
        "reference_detections": len(ssd_found[0]["scores"]),
    }


def threshold_of(logits: Float[Tensor, "1 A K"], count: int) -> float:
    """The class score above which `count` pairs of anchor and class lie; class 0 is background."""
    scores = logits.softmax(dim=-1)[..., 1:].flatten()
    return float(scores.topk(min(count + 1, len(scores))).values[-1])


def ssd_logits(ssd: SSD, picture: Float[Tensor, "3 H W"]) -> Float[Tensor, "1 A K"]:
    """Class logits of torchvision's SSD for one image."""
    images, _ = ssd.transform([picture])
    logits: Tensor = ssd.head(list(ssd.backbone(images.tensors).values()))["cls_logits"]
    return logits


def ssd_multiply_adds(ssd: SSD) -> int:
    """Multiply-adds of backbone and head for one image, counted as `core.complexity` counts."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ssd_logits(ssd, torch.rand(3, SSD_SIDE, SSD_SIDE))
    return counter.get_total_flops() // 2


def timed_in_turn(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    repeats: int,
    our_work: float = 1.0,
    their_work: float = 1.0,
) -> dict[str, Any]:
    """ours_ms and reference_ms (medians) per unit of work, ratio, ratio_spread, best_ratio and repeats."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        ours(), theirs()  # warm-up
        times = [(_milliseconds(ours) / our_work, _milliseconds(theirs) / their_work) for _ in range(repeats)]
    finally:
        torch.set_num_threads(threads)
    ours_ms, reference_ms = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = [reference / own for own, reference in times]
    return {
        "ours_ms": ours_ms,
        "reference_ms": reference_ms,
        "ratio": reference_ms / ours_ms,
        "ratio_spread": [min(ratios), max(ratios)],
        "best_ratio": min(reference for _, reference in times) / min(own for own, _ in times),
        "repeats": repeats,
    }


def _milliseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1000
