"""What promotion does to the anchors of each object, for pictures (Figs. 2 and 4 of the paper)."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from core.boxes import box_centres, box_iou
from core.data.table import Table
from core.decisions import FIRST_LEVEL, OUTCOMES, Decision
from core.train import Picture
from core.types import IGNORED, Assignment, Targets
from padet.coder import decode
from padet.config import Config
from padet.losses import assign
from padet.model import Outputs, float32_outputs, promoted_anchors

SCORE_AXIS = "promoted IoU: that of the promoted anchor with the object (high is good)"
NAMES = np.array(OUTCOMES)


class Stages(NamedTuple):
    """Anchors and their matching before and after promotion, and the boxes that detection makes of them."""

    promoted: Float[Tensor, "B A 4"]
    predicted: Float[Tensor, "B A 4"]
    before: Assignment
    after: Assignment  # without easy negatives


@torch.no_grad()
def explain(outputs: Outputs, targets: Targets, config: Config) -> list[list[Decision]]:
    """The anchors of every object of every image, by falling IoU after promotion, in pixels of the network input.

    An object's anchors are those that are positive for it before or after promotion, and those whose IoU with it
    reaches `negative_iou` before or after, less those that are positive for another object after it. The outcome is
    that of the detection head; `before` among the columns is APM's.

    Args:
        outputs: of the network, in any precision.
        targets: the images' objects; padding is left out.
        config: what the model was trained with.
    """
    outputs = float32_outputs(outputs)
    promoted = promoted_anchors(outputs)
    stages = Stages(promoted, decode(promoted, outputs.deltas), *assign(outputs, targets, config))
    return [
        [_decide(outputs, targets, stages, config, image, int(index)) for index in valid.nonzero()[:, 0]]
        for image, valid in enumerate(targets.valid)
    ]


def pictures_of_run(config: Config, table: Table, device: torch.device) -> Picture | None:
    """What `core.train.fit` draws with, see `core.visualize.run_pictures`; None where no pictures are asked for."""
    if not config.picture_every:
        return None
    from core.visualize import run_pictures  # with matplotlib, which other runs need not wait for

    return run_pictures(explain, SCORE_AXIS, table, config, device)


def _decide(outputs: Outputs, targets: Targets, stages: Stages, config: Config, image: int, index: int) -> Decision:
    """One object's anchors, the best promoted one first, and what each was before and is after promotion."""
    box = targets.boxes[image, index]
    ious = [box_iou(boxes, box) for boxes in (outputs.anchors.boxes, stages.promoted[image])]
    near = torch.maximum(*ious) >= config.negative_iou
    owners = [stage.gt_index[image] for stage in (stages.before, stages.after)]
    mine = (owners[0] == index) | (owners[1] == index)
    taken = (owners[1] >= 0) & (owners[1] != index)
    anchors = ((near | mine) & ~taken).nonzero()[:, 0]
    anchors = anchors[ious[1][anchors].argsort(descending=True, stable=True)]
    before, after = (outcomes(owner[anchors], index) for owner in owners)
    predicted = stages.predicted[image, anchors]
    ends = torch.tensor(outputs.anchors.level_sizes).cumsum(0)
    columns = {"anchor": anchors.cpu().numpy(), "anchor_iou": _doubles(ious[0][anchors]), "before": NAMES[before]}
    if outputs.apm_logits is not None:
        columns["apm_score"] = _doubles(outputs.apm_logits[image, anchors].sigmoid())
    counts = {
        f"positives_{name}": int((owner == index).sum())
        for name, owner in zip(("before", "after"), owners, strict=True)
    }
    lost = int(((near | mine) & taken).sum())
    return Decision(
        box=_doubles(box),
        label=int(targets.labels[image, index]),
        scores=_doubles(ious[1][anchors]),
        outcomes=after,
        levels=FIRST_LEVEL + torch.searchsorted(ends, anchors.cpu(), right=True).numpy(),
        centres=_doubles(box_centres(outputs.anchors.boxes[anchors])),
        boxes=_doubles(predicted),
        ious=_doubles(box_iou(predicted, box)),
        columns=columns,
        facts={**counts, "taken_by_others": lost},
        note=_describe(len(anchors), counts, lost, config),
    )


def outcomes(owner: Int[Tensor, " n"], index: int) -> Int[np.ndarray, " n"]:
    """Places in OUTCOMES of anchors by the object that they learn: another one's positives count as negative."""
    codes = torch.full_like(owner, OUTCOMES.index("negative"))
    codes[owner == IGNORED] = OUTCOMES.index("ignored")
    codes[owner == index] = OUTCOMES.index("positive")
    return codes.cpu().numpy()


def _describe(count: int, counts: dict[str, int], lost: int, config: Config) -> str:
    """One line: how many anchors there are and what promotion does to the number of positives."""
    others = f", {lost} more are other objects' positives" if lost else ""
    change = f"{counts['positives_before']} positive before promotion, {counts['positives_after']} after"
    return f"{count} anchors reach IoU {config.negative_iou:g}{others}; {change}"


def _doubles(values: Tensor) -> Float64[np.ndarray, "..."]:
    return values.double().cpu().numpy()
