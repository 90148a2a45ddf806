"""What Combined IoUs decide about each object, for pictures (Fig. 1 and section 3 of the paper)."""

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from core.anchors import anchors_inside
from core.boxes import box_iou
from core.data.table import Table
from core.decisions import OUTCOMES, Decision, anchor_levels
from core.geometry import Geometry
from core.train import Picture
from core.types import Targets
from dynamic_atss.assigner import Details, explain_assignment
from dynamic_atss.config import Config
from dynamic_atss.model import Outputs, float32_outputs, predicted_boxes

SCORE_AXIS = "Combined IoU: weighted sum of the IoUs of prediction and anchor with the object (high is good)"
POSITIVE, NEGATIVE = OUTCOMES.index("positive"), OUTCOMES.index("negative")


@torch.no_grad()
def explain(outputs: Outputs, targets: Targets, config: Config) -> list[list[Decision]]:
    """The candidates of every object of every image, by falling Combined IoU, in pixels of the network input.

    Weights that move with the training (Table 3) stand at their last values.

    Args:
        outputs: of the network, in any precision.
        targets: the images' objects; padding is left out.
        config: what the model was trained with.
    """
    outputs = float32_outputs(outputs)
    boxes = predicted_boxes(outputs, config)
    pred_weight, anchor_weight = config.weights_at(1, 1)
    details = explain_assignment(
        outputs.grid,
        targets,
        boxes,
        geometry=config.box_geometry,
        pred_weight=pred_weight,
        anchor_weight=anchor_weight,
        k=config.topk,
        anchor_valid=anchors_inside(outputs.grid, targets.sizes) if config.switches.exclude_padding else None,
    )
    return [
        [
            _decide(outputs, targets, details, boxes, config.box_geometry, image, int(index))
            for index in valid.nonzero()[:, 0]
        ]
        for image, valid in enumerate(targets.valid)
    ]


def pictures_of_run(config: Config, table: Table, device: torch.device) -> Picture | None:
    """What `core.train.fit` draws with, see `core.visualize.run_pictures`; None where no pictures are asked for."""
    if not config.picture_every:
        return None
    from core.visualize import run_pictures  # with matplotlib, which other runs need not wait for

    return run_pictures(explain, SCORE_AXIS, table, config, device)


def _decide(
    outputs: Outputs,
    targets: Targets,
    details: Details,
    boxes: Tensor,
    geometry: Geometry,
    image: int,
    index: int,
) -> Decision:
    """One object's candidates, best first, and what became of them: positive only where no other object won them."""
    order = details.combined[image, index].masked_fill(~details.valid[image, index], -1).argsort(descending=True)
    order = order[: int(details.valid[image, index].sum())]
    anchors = details.anchors[image, index, order]
    won = details.assignment.gt_index[image, anchors] == index
    predicted, object_box = boxes[image, anchors], targets.boxes[image, index]
    ious = box_iou(predicted, object_box, geometry)
    wanted = int(details.positive[image, index].sum())
    threshold = float(details.thresholds[image, index])
    return Decision(
        box=_doubles(object_box),
        label=int(targets.labels[image, index]),
        scores=_doubles(details.combined[image, index, order]),
        outcomes=torch.where(won, POSITIVE, NEGATIVE).cpu().numpy(),
        levels=anchor_levels(anchors.cpu().numpy(), outputs.grid.level_sizes),
        centres=_doubles(outputs.grid.points[anchors]),
        boxes=_doubles(predicted),
        ious=_doubles(ious),
        columns={
            "anchor": anchors.cpu().numpy(),
            "anchor_iou": _doubles(details.anchor_ious[image, index, order]),
            "predicted_iou": _doubles(ious),
        },
        facts={"threshold": threshold, "wanted": wanted},
        note=_describe(len(order), wanted, int(won.sum()), threshold),
    )


def _describe(candidates: int, wanted: int, won: int, threshold: float) -> str:
    """One line: how many anchors were left at each stage."""
    lost = f", {wanted - won} of them lost to other objects" if wanted > won else ""
    return f"{candidates} candidates, {wanted} reach {threshold:.3f} with their centre inside{lost}"


def _doubles(values: Tensor) -> Float64[np.ndarray, "..."]:
    return values.double().cpu().numpy()
