"""What PAA decides about each object, for pictures: Algorithm 1 with the mixture it fits (Figs. 3, 4 and 6)."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor, nn

from core.boxes import box_iou, decode_deltas
from core.data.table import Table
from core.decisions import OUTCOMES, Decision, anchor_levels
from core.errors import UserError
from core.losses import giou_loss, one_hot_labels, sigmoid_focal_loss
from core.types import Targets
from paa import losses
from paa.assigner import Details
from paa.config import Config
from paa.losses import float32_outputs
from paa.model import Outputs

SCORE_AXIS = "anchor score, Eq. 3: focal loss of the class + GIoU loss of the box (low is good)"
POSITIVE, IGNORED, NEGATIVE = (OUTCOMES.index(name) for name in ("positive", "ignored", "negative"))


class Gaussians(NamedTuple):
    """The mixture of one object, Eq. 4."""

    weights: Float64[np.ndarray, " 2"]
    means: Float64[np.ndarray, " 2"]
    variances: Float64[np.ndarray, " 2"]
    steps: int  # of EM


class _Object(NamedTuple):
    """One object of one image."""

    image: int
    number: int  # among the image's objects, padding included
    anchors: Int[Tensor, " n"]  # its candidates by rising anchor score
    order: Int[Tensor, " n"]  # their places among the K of `Details`


def check_assigner(config: Config) -> None:
    """UserError unless Algorithm 1 chooses the positives: the other rules weigh no candidates."""
    if config.assigner != "paa":
        raise UserError(f"assigner {config.assigner!r}: pictures show what assigner paa decides, no other")


@torch.no_grad()
def explain(outputs: Outputs, targets: Targets, config: Config) -> list[list[Decision]]:
    """The candidates of every object of every image, by rising anchor score, in pixels of the network input.

    Args:
        outputs: of the network, in any precision.
        targets: the images' objects; padding is left out.
        config: what the model was trained with.

    Raises:
        UserError: for another assigner than Algorithm 1.
    """
    check_assigner(config)
    outputs = float32_outputs(outputs)
    details = losses.explain(outputs, targets, config)
    return [
        [_decide(outputs, targets, details, config, image, int(index)) for index in valid.nonzero()[:, 0]]
        for image, valid in enumerate(targets.valid)
    ]


def pictures_of_run(config: Config, table: Table, device: torch.device) -> Callable[[nn.Module, int], None] | None:
    """What `core.train.fit` draws with, see `core.visualize.run_pictures`; None where no pictures are asked for.

    Raises:
        UserError: for another assigner than Algorithm 1, before the run begins.
    """
    if not config.picture_every:
        return None
    check_assigner(config)
    from core.visualize import run_pictures  # with matplotlib, which other runs need not wait for

    return run_pictures(explain, SCORE_AXIS, table, config, device)


def mixture_curves(gaussians: Gaussians, x: Float64[np.ndarray, " m"]) -> dict[str, Float64[np.ndarray, " m"]]:
    """The two terms w_k N(x; m_k, v_k) of Eq. 4 and their sum, by names that show the parameters."""
    terms = {}
    for number, (weight, mean, variance) in enumerate(zip(*gaussians[:3], strict=True), start=1):
        density = np.exp(-0.5 * (x - mean) ** 2 / variance) / math.sqrt(2 * math.pi * variance)
        terms[f"{number}: {weight:.2f} · N({mean:.2f}, {math.sqrt(variance):.3f}²)"] = weight * density
    return {**terms, "mixture": sum(terms.values())}


def _decide(outputs: Outputs, targets: Targets, details: Details, config: Config, image: int, index: int) -> Decision:
    """One object's candidates and what became of them."""
    one = _find(details, image, index)
    place = (image, index, one.order)
    outcomes = torch.full_like(one.anchors, NEGATIVE)
    outcomes[details.ignored[place]] = IGNORED
    outcomes[details.positive[place]] = POSITIVE
    gaussians = _gaussians(details, one)
    matched = int((details.match[image] == index).sum())
    numbers = _numbers(outputs, targets, details, config, one)
    return Decision(
        box=_doubles(targets.boxes[image, index]),
        label=int(targets.labels[image, index]),
        scores=_doubles(details.candidates.losses[place]),
        outcomes=outcomes.cpu().numpy(),
        levels=anchor_levels(one.anchors.cpu().numpy(), outputs.grid.level_sizes),
        centres=_doubles(outputs.grid.points[one.anchors]),
        boxes=numbers.pop("boxes"),
        ious=numbers.pop("iou"),
        columns=numbers,
        facts={"scheme": config.scheme, "matched_anchors": matched, "mixture": _plain(gaussians)},
        curves=partial(mixture_curves, gaussians) if gaussians else None,
        note=_describe(matched, len(one.anchors), gaussians, config),
    )


def _find(details: Details, image: int, index: int) -> _Object:
    candidates = details.candidates
    order = candidates.losses[image, index].argsort(stable=True)[: int(candidates.valid[image, index].sum())]
    return _Object(image, index, candidates.anchors[image, index, order], order)


def _numbers(
    outputs: Outputs, targets: Targets, details: Details, config: Config, one: _Object
) -> dict[str, np.ndarray]:
    """What the network says about each candidate, the two losses whose sum is its score, and the mixture's view."""
    gt_box, label = targets.boxes[one.image, one.number], targets.labels[one.image, one.number]
    anchors, logits = outputs.grid.boxes[one.anchors], outputs.logits[one.image, one.anchors]
    deltas, geometry = outputs.deltas[one.image, one.anchors], config.box_geometry
    boxes = decode_deltas(anchors, deltas, geometry, config.switches.clamp_both_sides)
    targeted = one_hot_labels(label.expand(len(anchors)), logits.shape[-1])
    giou = giou_loss(boxes, gt_box.expand_as(boxes), config.rules.giou_eps, config.rules.giou_floor)
    numbers = {
        "boxes": boxes,
        "iou": box_iou(boxes, gt_box, geometry),
        "anchor": one.anchors,
        "anchor_iou": box_iou(anchors, gt_box, geometry),
        "class_score": logits[:, label].sigmoid(),
        "class_loss": sigmoid_focal_loss(logits, targeted).sum(dim=-1),
        "box_loss": config.rules.score_box_weight * giou,
    }
    if outputs.quality_logits is not None:
        numbers[f"predicted_{config.quality}"] = outputs.quality_logits[one.image, one.anchors].sigmoid()
    if details.component is not None and details.log_density is not None:
        numbers["component"] = details.component[one.image, one.number, one.order]
        numbers["log_density"] = details.log_density[one.image, one.number, one.order]
    return {name: _doubles(part) if part.is_floating_point() else part.cpu().numpy() for name, part in numbers.items()}


def _gaussians(details: Details, one: _Object) -> Gaussians | None:
    """The object's mixture; None where a fixed rule separates or fewer than two candidates left nothing to fit."""
    row = one.image * details.positive.shape[1] + one.number
    if details.mixture is None or details.mixture.steps[row] == 0:
        return None
    weights, means, variances, steps = (part[row] for part in details.mixture)
    return Gaussians(_doubles(weights), _doubles(means), _doubles(variances), int(steps))


def _plain(gaussians: Gaussians | None) -> Mapping[str, Any] | None:
    """As JSON has it."""
    if gaussians is None:
        return None
    return {name: part if isinstance(part, int) else part.tolist() for name, part in gaussians._asdict().items()}


def _describe(matched: int, candidates: int, gaussians: Gaussians | None, config: Config) -> str:
    """One line: how many anchors were left at each stage, and how they were separated."""
    if candidates == 0:
        return "no anchor has its largest IoU with this object: it teaches nothing"
    rules = {"number": f"the best {config.fixed_number} are positive", "range": f"exp(-score) > {config.score_range:g}"}
    if config.scheme in rules:
        how = rules[config.scheme]
    elif gaussians is None:
        how = "a single one is not fitted"
    else:
        how = f"mixture after {gaussians.steps} EM steps, scheme {config.scheme}"
    best = f"{candidates} candidates, the best {config.topk} of each level" if candidates > 1 else "1 candidate"
    return f"{matched} anchors matched by IoU, {best}; {how}"


def _doubles(values: Tensor) -> Float64[np.ndarray, "..."]:
    return values.double().cpu().numpy()
