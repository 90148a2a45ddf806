"""What Task Alignment Learning decides about each object, for pictures (section 3.2; maps as in Fig. 1)."""

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from core.anchors import anchors_inside
from core.boxes import box_iou
from core.data.table import Table
from core.decisions import OUTCOMES, Decision, LevelMap, anchor_levels, level_maps
from core.train import Picture
from core.types import Targets
from tood_tal.assigner import Details, explain_assignment
from tood_tal.config import Config
from tood_tal.losses import pixel_boxes
from tood_tal.model import Outputs

SCORE_AXIS = "t, the alignment metric: score ^ alpha · IoU ^ beta of prediction and object (high is good)"
POSITIVE, NEGATIVE = OUTCOMES.index("positive"), OUTCOMES.index("negative")


@torch.no_grad()
def explain(outputs: Outputs, targets: Targets, config: Config) -> list[list[Decision]]:
    """The anchors offered to every object of every image, by falling t, in pixels of the network input.

    It is TAL's choice throughout, also for a model in its first phase, where ATSS chooses instead.

    Args:
        outputs: of the network.
        targets: the images' objects; padding is left out.
        config: what the model was trained with.
    """
    boxes = pixel_boxes(outputs)
    details = explain_assignment(
        outputs.scores,
        boxes,
        outputs.grid.points,
        targets,
        alpha=config.alpha,
        beta=config.beta,
        topk=config.topk,
        conflict=config.conflict,
        anchor_valid=anchors_inside(outputs.grid, targets.sizes),
    )
    return [
        [_decide(outputs, targets, details, boxes, config, image, int(index)) for index in valid.nonzero()[:, 0]]
        for image, valid in enumerate(targets.valid)
    ]


def pictures_of_run(config: Config, table: Table, device: torch.device) -> Picture | None:
    """What `core.train.fit` draws with, see `core.visualize.run_pictures`; None where no pictures are asked for."""
    if not config.picture_every:
        return None
    from core.visualize import run_pictures  # with matplotlib, which other runs need not wait for

    return run_pictures(explain, SCORE_AXIS, table, config, device)


def _decide(
    outputs: Outputs, targets: Targets, details: Details, boxes: Tensor, config: Config, image: int, index: int
) -> Decision:
    """One object's candidates, best first, and what became of them: positive only where no other object won them."""
    offered = details.metric[image, index] > 0
    anchors, metric = details.anchors[image, index, offered], details.metric[image, index, offered]
    won = details.result.assignment.gt_index[image, anchors] == index
    kept, label = int(details.positive[image, index].sum()), targets.labels[image, index]
    return Decision(
        box=_doubles(targets.boxes[image, index]),
        label=int(label),
        scores=_doubles(metric),
        outcomes=torch.where(won, POSITIVE, NEGATIVE).cpu().numpy(),
        levels=anchor_levels(anchors.cpu().numpy(), outputs.grid.level_sizes),
        centres=_doubles(outputs.grid.points[anchors]),
        boxes=_doubles(boxes[image, anchors]),
        ious=_doubles(details.ious[image, index, offered]),
        columns={
            "anchor": anchors.cpu().numpy(),
            "class_score": _doubles(outputs.scores[image, anchors, label]),
            "t": _doubles(metric),
            "t_hat": _doubles(details.result.targets[image, anchors] * won),
        },
        facts={"offered": len(anchors), "kept": kept},
        note=_describe(len(anchors), kept, int(won.sum()), config),
        maps=_maps(outputs, boxes[image], targets, config, image, index),
    )


def _maps(outputs: Outputs, boxes: Tensor, targets: Targets, config: Config, image: int, index: int) -> list[LevelMap]:
    """Class score, IoU and t of every cell with one object, level by level."""
    scores = outputs.scores[image, :, targets.labels[image, index]]
    ious = box_iou(boxes, targets.boxes[image, index])
    named = {"score": scores, "IoU": ious, "t": scores**config.alpha * ious**config.beta}
    doubles = {name: _doubles(values) for name, values in named.items()}
    return level_maps(doubles, outputs.grid.shapes, outputs.grid.strides)


def _describe(offered: int, kept: int, won: int, config: Config) -> str:
    """One line: how many anchors were left at each stage."""
    if offered == 0:
        return "no prediction of this class overlaps the object: t is 0 everywhere, it teaches nothing"
    lost = f", {kept - won} of them lost to other objects" if kept > won else ""
    atss = "; this model learnt by ATSS alone" if config.atss_share == 1 else ""
    return f"{offered} anchors of highest t, {kept} have their centre inside{lost}{atss}"


def _doubles(values: Tensor) -> Float64[np.ndarray, "..."]:
    return values.double().cpu().numpy()
