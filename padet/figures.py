"""What both modules do in an image, as the paper's Figs. 4 and 6 show it: promotion, scores, sampled places."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from core.boxes import box_iou
from core.plots import crop_window
from core.types import Assignment, Batch
from padet.balance import IOU_EDGES
from padet.config import Config
from padet.losses import assign
from padet.model import Outputs, float32_outputs, promoted_anchors

INITIAL, PROMOTED, OBJECT = "#d6279b", "#12924a", "#2f6fde"  # the colours of Fig. 6
INK, FAINT = "#222222", "#777777"
SHOWN = 4  # anchors whose sampled places are drawn
BARS = ("<.5", ".5", ".6", ".7", ".8", ".9")  # of the histogram: lower ends


class Sampled(NamedTuple):
    """A positive anchor of an aligned level and where FAM reads for its cell; pixels of the network input."""

    initial: Float64[np.ndarray, " 4"]
    promoted: Float64[np.ndarray, " 4"]
    object: Float64[np.ndarray, " 4"]
    regular: Float64[np.ndarray, "9 2"]  # (x, y), places of a plain 3x3 convolution
    aligned: Float64[np.ndarray, "9 2"]
    level: int  # 0 is the finest


@torch.no_grad()
def draw_promotion(path: Path, model: nn.Module, batch: Batch, config: Config) -> None:
    """One picture of a batch of one: positives before and after, scores of all levels, sampled places.

    Args:
        path: PNG file, replaced as a whole; its folder is made.
        model: in evaluation mode, on the batch's device.
        batch: one image.
        config: what the model was trained with.
    """
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        outputs = model(batch.images, batch.sizes)
    outputs = float32_outputs(outputs)
    stages = assign(outputs, batch.targets, config)
    sampled = sampled_anchors(outputs, batch, stages[1])
    maps = score_maps(outputs)
    image = batch.images[0].permute(1, 2, 0).cpu().numpy()
    heights = [3.6, *([2.1] if maps else []), *([3.2] if sampled else [])]
    figure = Figure(figsize=(12, sum(heights)), facecolor="white")
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    parts = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    _draw_stages(next(parts), image, outputs, batch, stages)
    if maps:
        _draw_maps(next(parts), maps)
    if sampled:
        _draw_samples(next(parts), image, sampled)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, dpi=100, format="png")
    os.replace(temporary, path)


def score_maps(outputs: Outputs) -> list[Float[np.ndarray, "_ _"]]:
    """APM's best score in each cell of every level of the first image; none where there are no scores."""
    if outputs.apm_logits is None:
        return []
    levels = outputs.apm_logits[0].sigmoid().split(outputs.anchors.level_sizes)
    shapes = zip(levels, outputs.anchors.sides, strict=True)
    return [level.view(side, side, -1).amax(dim=2).cpu().numpy() for level, side in shapes]


def sampled_places(
    offsets: Float[Tensor, "18 H W"], row: int, column: int, stride: float
) -> tuple[Float64[np.ndarray, "9 2"], Float64[np.ndarray, "9 2"]]:
    """Where a plain 3x3 convolution and FAM read for a cell, (x, y) pixels.

    Args:
        offsets: of the level, in cells, (dy, dx) for each of the nine places row by row.
        row: of the cell.
        column: of the cell.
        stride: pixels of a cell.
    """
    steps = torch.arange(-1, 2)
    places = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1).view(9, 2)  # (dy, dx)
    cells = places + torch.tensor([row, column]) + 0.5
    moved = cells + offsets[:, row, column].view(9, 2).cpu()
    regular, aligned = ((some.flip(1) * stride).double().numpy() for some in (cells, moved))
    return regular, aligned


def sampled_anchors(outputs: Outputs, batch: Batch, final: Assignment) -> list[Sampled]:
    """Of each of the largest objects the promoted anchor with the largest IoU on an aligned level, if it has one."""
    sizes, promoted = outputs.anchors.level_sizes, promoted_anchors(outputs)[0]
    aligned = sum(sizes[: len(outputs.offsets)])
    ends = torch.tensor(sizes).cumsum(0)
    areas = (batch.boxes[0, :, 2:] - batch.boxes[0, :, :2]).prod(dim=1).masked_fill(~batch.valid[0], -1)
    found: list[Sampled] = []
    for index in areas.argsort(descending=True)[: int(batch.valid[0].sum())].tolist():
        positives = (final.gt_index[0, :aligned] == index).nonzero()[:, 0]
        if len(positives) == 0 or len(found) == SHOWN:
            continue
        box = batch.boxes[0, index]
        anchor = int(positives[box_iou(promoted[positives], box).argmax()])
        level = int(torch.searchsorted(ends, anchor, right=True))
        side, per_cell = outputs.anchors.sides[level], outputs.anchors.per_cell[level]
        cell = (anchor - sum(sizes[:level])) // per_cell
        places = sampled_places(outputs.offsets[level][0], cell // side, cell % side, batch.images.shape[-1] / side)
        before, after, whole = (
            one.double().cpu().numpy() for one in (outputs.anchors.boxes[anchor], promoted[anchor], box)
        )
        found.append(Sampled(before, after, whole, *places, level))
    return found


def _draw_stages(
    part: Any, image: np.ndarray, outputs: Outputs, batch: Batch, stages: tuple[Assignment, Assignment]
) -> None:
    """Fig. 4 (b), (c), (d): positives before and after promotion, and their IoUs."""
    panels = part.subplots(1, 3, width_ratios=(1, 1, 1.1))
    references = (outputs.anchors.boxes, promoted_anchors(outputs)[0])
    looks = (("before promotion", INITIAL), ("after promotion", PROMOTED))
    for place, (boxes, stage, (name, colour)) in enumerate(zip(references, stages, looks, strict=True)):
        positive = stage.positive[0]
        learned = batch.boxes[0][stage.gt_index[0][positive]] if positive.any() else batch.boxes.new_zeros(0, 4)
        ious = box_iou(boxes[positive], learned)
        axes = panels[place]
        _show(axes, image, (0, 0, image.shape[1], image.shape[0]))
        for box in batch.boxes[0][batch.valid[0]]:
            _outline(axes, box, OBJECT, 2.0)
        for box in boxes[positive]:
            _outline(axes, box, colour, 0.9)
        axes.set_title(f"{name}: {int(positive.sum())} positives", fontsize=10, color=INK, loc="left")
        bars = torch.bucketize(ious, ious.new_tensor(IOU_EDGES), right=True).bincount(minlength=len(BARS)).cpu().numpy()
        panels[2].bar(np.arange(len(BARS)) + 0.4 * place - 0.2, bars, 0.38, color=colour, label=name)
    panels[2].set_xticks(range(len(BARS)), BARS)
    panels[2].set_xlabel("IoU with the object that is learned, from", fontsize=9)
    panels[2].set_title("positives", fontsize=10, color=INK, loc="left")
    panels[2].spines[["top", "right"]].set_visible(False)
    panels[2].legend(frameon=False, fontsize=9)


def _draw_maps(part: Any, maps: list[np.ndarray]) -> None:
    """Fig. 4 (a): the best APM score of each cell, all levels on one scale."""
    panels = part.subplots(1, len(maps), squeeze=False)[0]
    top = max(float(level.max()) for level in maps)
    for number, (axes, level) in enumerate(zip(panels, maps, strict=True), start=1):
        drawn = axes.imshow(level, cmap="gray", vmin=0, vmax=top)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"level {number}, {len(level)} x {len(level)}", fontsize=9, color=INK)
    part.colorbar(drawn, ax=panels.tolist(), shrink=0.8, label="best APM score")


def _draw_samples(part: Any, image: np.ndarray, sampled: list[Sampled]) -> None:
    """Fig. 6: an anchor before and after promotion, its object, and the nine places that are read for it."""
    panels = part.subplots(1, SHOWN, squeeze=False)[0]
    for axes, one in zip(panels, sampled, strict=False):
        corners = np.concatenate([one.initial, one.promoted, one.object]).reshape(-1, 2)
        points = np.concatenate([corners, one.regular, one.aligned])
        window = crop_window(np.concatenate([points.min(axis=0), points.max(axis=0)]), image.shape[:2])
        _show(axes, image, window)
        for box, colour in ((one.object, OBJECT), (one.initial, INITIAL), (one.promoted, PROMOTED)):
            _outline(axes, box, colour, 1.6)
        dots = {"linestyle": "", "marker": "o", "markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.5}
        axes.plot(*one.regular.T, color=INITIAL, **dots)
        axes.plot(*one.aligned.T, color=PROMOTED, **dots)
        axes.plot(*((one.object[:2] + one.object[2:]) / 2), **{**dots, "color": OBJECT})
        largest = np.abs(one.aligned - one.regular).max()
        axes.set_title(f"level {one.level + 1}, moved by {largest:.1f} px at most", fontsize=9, color=INK)
    for axes in panels[len(sampled) :]:
        axes.set_axis_off()
    text = "blue: object and its centre; magenta: initial anchor, plain 3 x 3; green: promoted anchor, FAM"
    part.supxlabel(text, fontsize=9, color=FAINT)


def _show(axes: Any, image: np.ndarray, window: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = window
    axes.imshow(image[top:bottom, left:right], extent=(left, right, bottom, top), interpolation="bilinear")
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])
    axes.spines[:].set_color("#bbbbbb")


def _outline(axes: Any, box: Any, colour: str, width: float) -> None:
    x1, y1, x2, y2 = (float(value) for value in box)
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=width))
