"""What an assigner decides, as a picture: each object's anchors in the image, their scores, and maps of all cells."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from core.decisions import FIRST_LEVEL, OUTCOMES, Curves, Decision, LevelMap, Outcome, borders

COLOURS: dict[Outcome, str] = {"positive": "#12924a", "ignored": "#d99a00", "negative": "#d62f3a"}
MARKERS: dict[Outcome, str] = {"positive": "o", "ignored": "s", "negative": "x"}
OBJECT_COLOUR = "#ffd43b"
CURVE_COLOURS = ("#12924a", "#d62f3a", "#1f5fa8", "#8a4fa3")
INK, FAINT = "#222222", "#777777"

WIDTH, HEAD_HEIGHT, ROW_HEIGHT = 15.0, 0.75, 3.1  # inches
DPI = 110
CROP = 2.0  # height of the shown part of an image, in heights of the object's box (or widths, where it is flat)
CROP_ASPECT = 1.35  # width of that part over its height
LEAST_CROP = 0.35  # least height of that part, in short sides of the image
USUAL_LEVELS = 5  # P3 to P7 always have their line, further ones where an anchor is on them
LABEL_ROOM = 0.065  # of the shown part's height, between the ranks of two anchors
ROOM = 6.0  # a curve may stand so many times higher than the second highest before the axis cuts it
HEADROOM = 1.4  # of the y axis over the curves, for their names
HEAT = LinearSegmentedColormap.from_list("heat", ["#c7e9b400", "#7fcdbb99", "#1d91c0cc", "#225ea8e6", "#081d58f2"])
PALE = 0.5  # a map lies over the image in grey, of which this much is left beside white
MAPS_WIDTH, MAP_HEIGHT, MAPS_TITLE = 12.0, 1.72, 0.45  # inches


class Row(NamedTuple):
    """One object of a picture."""

    image: UInt8[np.ndarray, "h w 3"]
    title: str
    decision: Decision


def crop_window(box: Float64[np.ndarray, " 4"], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the part of an image that shows an object and its surroundings, whole pixels.

    It is CROP_ASPECT times as wide as high, lies around the box's centre, and is moved into the image and cut where
    the image is smaller.

    Args:
        box: xyxy pixels.
        size: height and width of the image.
    """
    width, height = (float(side) for side in box[2:] - box[:2])
    shown = max(CROP * max(height, width / CROP_ASPECT), LEAST_CROP * min(size), 16.0)
    edges = []
    for centre, wanted, length in zip(
        (box[:2] + box[2:]) / 2, (CROP_ASPECT * shown, shown), (size[1], size[0]), strict=True
    ):
        extent = min(round(wanted), length)
        start = min(max(round(float(centre) - extent / 2), 0), length - extent)
        edges.append((start, start + extent))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom


def draw_decisions(path: Path, rows: Sequence[Row], title: str, subtitle: str, axis: str) -> None:
    """Write a picture of some objects, one row each: positives, the other anchors, and all their scores.

    Args:
        path: PNG file, replaced as a whole.
        rows: from top to bottom; none gives a picture that says so.
        title: first line.
        subtitle: second line.
        axis: what the scores are; their name ends at its first comma or colon.
    """
    figure, head, parts = _figure([ROW_HEIGHT] * len(rows) or [HEAD_HEIGHT])
    _draw_head(head, title, subtitle)
    _draw_legend(head, rows)
    for part, row in zip(parts, rows, strict=False):
        _draw_row(part, row, axis)
    if not rows:
        parts[0].text(0.5, 0.5, "no objects: every anchor learns background", ha="center", va="center", color=FAINT)
    _save(figure, path)


def draw_maps(path: Path, rows: Sequence[Row], title: str, subtitle: str) -> None:
    """Write a picture of some objects' maps: a line for each map, a column for each level, all around the object.

    Args:
        path: PNG file, replaced as a whole.
        rows: from top to bottom, all with maps.
        title: first line.
        subtitle: second line.
    """
    lines = [len(row.decision.maps[0].values) for row in rows]
    figure, head, parts = _figure([MAPS_TITLE + MAP_HEIGHT * count for count in lines], MAPS_WIDTH)
    _draw_head(head, title, subtitle)
    handles = [_object_handle(), Line2D([], [], linestyle="", **_dot(6.0))]
    head.legend(handles, ["object", "positive anchor"], loc="upper right", ncols=2, frameon=False, fontsize=10)
    for part, row in zip(parts, rows, strict=True):
        _draw_object_maps(part, row)
    _save(figure, path)


def _figure(heights: Sequence[float], width: float = WIDTH) -> tuple[Figure, Any, list[Any]]:
    """A figure with room for a head and parts of some heights in inches below it."""
    heights = [HEAD_HEIGHT, *heights]
    figure = Figure(figsize=(width, sum(heights)), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06, wspace=0.0, hspace=0.0)
    FigureCanvasAgg(figure)
    head, *parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    return figure, head, parts


def _save(figure: Figure, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, dpi=DPI, format="png")
    os.replace(temporary, path)


def _draw_head(head: Any, title: str, subtitle: str) -> None:
    head.text(0.008, 0.9, title, ha="left", va="top", fontsize=14, fontweight="bold", color=INK)
    head.text(0.008, 0.44, subtitle, ha="left", va="top", fontsize=9.5, color=FAINT)
    head.set_facecolor("none")


def _draw_legend(head: Any, rows: Sequence[Row]) -> None:
    used = [o for o in OUTCOMES if any(len(row.decision.where(o)) for row in rows)]
    handles = [_object_handle()]
    handles += [Line2D([], [], color=COLOURS[o], marker=MARKERS[o], linewidth=1.6, markersize=6) for o in used]
    handles += [Line2D([], [], color=INK, linewidth=1.1)]
    names = ["object", *("positive, with its rank" if o == "positive" else o for o in used), "separation"]
    head.legend(handles, names, loc="upper right", ncols=5, frameon=False, fontsize=10)


def _object_handle() -> Line2D:
    return Line2D([], [], color=OBJECT_COLOUR, linewidth=3, path_effects=[withStroke(linewidth=5, foreground=INK)])


def _draw_row(part: Any, row: Row, axis: str) -> None:
    grid = part.add_gridspec(2, 3, width_ratios=(1, 1, 2.1), height_ratios=(1.25, 1))
    positives, others = part.add_subplot(grid[:, 0]), part.add_subplot(grid[:, 1])
    name = re.split("[,:]", axis)[0]
    _draw_boxes(positives, row, ("positive",), name)
    _draw_boxes(others, row, ("ignored", "negative"), name)
    positives.set_title(row.title, loc="left", fontsize=11, fontweight="bold", color=INK, in_layout=False)
    if row.decision.curves is None:
        strip = part.add_subplot(grid[:, 2])
        strip.set_title(row.decision.note, loc="left", fontsize=8.5, color=FAINT, pad=9)
    else:
        density, strip = part.add_subplot(grid[0, 2]), part.add_subplot(grid[1, 2])
        strip.sharex(density)
        _draw_density(density, row.decision, row.decision.curves)
    _draw_strip(strip, row.decision, axis)


def _draw_boxes(axes: Any, row: Row, outcomes: Sequence[Outcome], name: str) -> None:
    """Part of the image with the object's box, the predicted boxes of some outcomes and their anchors' centres."""
    decision = row.decision
    left, top, right, bottom = crop_window(decision.box, row.image.shape[:2])
    axes.imshow(row.image[top:bottom, left:right], extent=(left, right, bottom, top), interpolation="bilinear")
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])
    axes.spines[:].set_color("#bbbbbb")
    _outline(axes, decision.box, OBJECT_COLOUR, 3.0, halo=4.6)
    for outcome in outcomes:
        width, alpha = (1.3, 0.9) if outcome == "positive" else (0.7, 0.6)
        for place in decision.where(outcome)[::-1]:
            _outline(axes, decision.boxes[place], COLOURS[outcome], width, alpha)
        _mark_centres(axes, decision, outcome, LABEL_ROOM * (bottom - top))
    axes.set_xlabel("\n".join(_summary(decision, outcome, name) for outcome in outcomes if _shown(decision, outcome)))
    axes.xaxis.label.set(fontsize=8.5, color=INK)


def _shown(decision: Decision, outcome: Outcome) -> bool:
    return outcome != "ignored" or len(decision.where(outcome)) > 0


def _outline(axes: Any, box: np.ndarray, colour: str, width: float, alpha: float = 1.0, halo: float = 0.0) -> None:
    effects = [withStroke(linewidth=halo, foreground=INK)] if halo else None
    x1, y1, x2, y2 = (float(value) for value in box)
    style: dict[str, Any] = {"edgecolor": colour, "linewidth": width, "alpha": alpha, "path_effects": effects}
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **style))


def _mark_centres(axes: Any, decision: Decision, outcome: Outcome, room: float) -> None:
    """A mark at each anchor's centre; positives carry their rank where it does not cover a better one's."""
    numbered: list[np.ndarray] = []
    marker = {"marker": MARKERS[outcome], "color": COLOURS[outcome], "linestyle": "", "zorder": 4}
    plate = {"boxstyle": "round,pad=0.18", "facecolor": COLOURS[outcome], "edgecolor": "white", "linewidth": 0.5}
    for place in decision.where(outcome):
        centre = decision.centres[place]
        free = all((np.abs(centre - other) > room * np.array([1.3, 1.0])).any() for other in numbered)
        if outcome == "positive" and free:
            text = {"fontsize": 6.5, "color": "white", "ha": "center", "va": "center", "clip_on": True, "zorder": 5}
            axes.text(*centre, str(place + 1), bbox=plate, **text)
            numbered.append(centre)
        else:
            axes.plot(*centre, markersize=3.5, **marker)


def _summary(decision: Decision, outcome: Outcome, name: str) -> str:
    """`5 positive: score 0.31 to 0.52, IoU 0.81 to 0.93`; `name` is the score's."""
    places = decision.where(outcome)
    if len(places) == 0:
        return f"0 {outcome}"
    scores, ious = (_range(values[places]) for values in (decision.scores, decision.ious))
    return f"{len(places)} {outcome}: {name} {scores}, IoU {ious}"


def _range(values: np.ndarray) -> str:
    low, high = (f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}" for value in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def _draw_density(axes: Any, decision: Decision, curves: Curves) -> None:
    """The curves over the range of the scores, the borders between outcomes, and the note."""
    low, high = _limits(decision.scores)
    axes.set(xlim=(low, high), yticks=[])
    axes.tick_params(labelbottom=False, bottom=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
    axes.set_title(decision.note, loc="left", fontsize=8.5, color=FAINT, pad=9)
    _shade(axes, decision, low, high)
    x = np.union1d(np.linspace(low, high, 1500), decision.scores)
    *parts, (total_name, total) = curves(x).items()
    for (name, y), colour in zip(parts, CURVE_COLOURS, strict=False):
        axes.fill_between(x, y, color=colour, alpha=0.13, linewidth=0)
        axes.plot(x, y, color=colour, linewidth=1.5, label=name)
    axes.plot(x, total, color=INK, linewidth=1.0, linestyle=(0, (4, 2)), label=total_name)
    top = _height([y for _, y in parts], total)
    axes.set_ylim(0, top)
    if total.max() > top:
        axes.text(x[total.argmax()], 0.8 * top, f" peak {total.max():.3g}", fontsize=7.5, color=FAINT)
    axes.legend(loc="upper right", ncols=4, fontsize=8, borderaxespad=0.2, framealpha=0.7, edgecolor="none")


def _limits(scores: Float64[np.ndarray, " n"]) -> tuple[float, float]:
    """Ends of the x axis: a little beyond the scores, however small they are, and never a point."""
    if len(scores) == 0:
        return 0.0, 1.0
    margin = max(0.05 * float(np.ptp(scores)), 0.01 * float(np.abs(scores).max())) or 0.02
    return float(scores.min()) - margin, float(scores.max()) + margin


def _height(parts: Sequence[np.ndarray], total: np.ndarray) -> float:
    """Upper end of the y axis: the highest point, unless it would flatten every other curve."""
    second = sorted(float(y.max()) for y in parts)[-2] if len(parts) > 1 else float(total.max())
    return HEADROOM * min(float(total.max()), ROOM * second)


def _shade(axes: Any, decision: Decision, low: float, high: float) -> None:
    """The outcome's colour behind the scores that have it, a line at every border."""
    order = np.argsort(decision.scores, kind="stable")
    edges = [low, *borders(decision), high]
    outcomes = decision.outcomes[order]
    for start, end, outcome in zip(edges, edges[1:], outcomes[np.diff(outcomes, prepend=-1) != 0], strict=False):
        axes.axvspan(start, end, color=COLOURS[OUTCOMES[int(outcome)]], alpha=0.06, linewidth=0)
    for border in edges[1:-1]:
        axes.axvline(border, color=INK, linewidth=1.1)


def _draw_strip(axes: Any, decision: Decision, axis: str) -> None:
    """Every anchor at its score on a line of its pyramid level; positives carry their rank."""
    low, high = _limits(decision.scores)
    _shade(axes, decision, low, high)
    levels = range(FIRST_LEVEL, max([FIRST_LEVEL + USUAL_LEVELS, *(decision.levels + 1)]))
    axes.add_collection(LineCollection([[(low, n), (high, n)] for n in levels], colors="#e4e4e4", linewidths=0.8))
    for outcome in reversed(OUTCOMES):
        places = decision.where(outcome)
        axes.plot(
            decision.scores[places],
            decision.levels[places],
            linestyle="",
            marker=MARKERS[outcome],
            markersize=5.5,
            color=COLOURS[outcome],
            alpha=0.9,
            markeredgecolor=COLOURS[outcome] if outcome == "negative" else "white",
            markeredgewidth=1.3 if outcome == "negative" else 0.6,
        )
    _number_ranks(axes, decision, high - low)
    axes.set(ylim=(levels[-1] + 0.6, FIRST_LEVEL - 0.6), yticks=list(levels))
    axes.set_yticklabels([f"P{level}" for level in levels], fontsize=8.5)
    axes.set_xlabel(axis, fontsize=9, color=INK)
    axes.tick_params(colors="#555555", labelsize=8.5, left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")


def _number_ranks(axes: Any, decision: Decision, width: float) -> None:
    """The rank over each positive that has room for it on its level's line, beside the better ones."""
    numbered: list[tuple[int, float, float]] = []
    for place in decision.where("positive"):
        score, level, text = float(decision.scores[place]), int(decision.levels[place]), str(place + 1)
        half = 0.006 * width * len(text)
        if all(level != other or abs(score - x) > half + room for other, x, room in numbered):
            axes.text(score, level - 0.3, text, fontsize=6.5, color=COLOURS["positive"], ha="center", va="bottom")
            numbered.append((level, score, half))


def _draw_object_maps(part: Any, row: Row) -> None:
    """One object: its maps from top to bottom, its levels from left to right, a colour bar for each map."""
    part.suptitle(row.title, x=0.008, ha="left", fontsize=11, fontweight="bold", color=INK)
    maps, names = row.decision.maps, list(row.decision.maps[0].values)
    window = crop_window(row.decision.box, row.image.shape[:2])
    all_axes = part.subplots(len(names), len(maps), squeeze=False)
    for axes, name in zip(all_axes, names, strict=True):
        top = max(shown_maximum(level, name, window) for level in maps) or 1.0
        for panel, level in zip(axes, maps, strict=True):
            drawn = _draw_map(panel, row, level, name, top, window)
        axes[0].set_ylabel(name, fontsize=10, color=INK)
        bar = part.colorbar(drawn, ax=list(axes), pad=0.008, aspect=13, fraction=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors="#555555", labelsize=8, length=2)
        bar.ax.yaxis.set_major_locator(MaxNLocator(4))
    for panel, level in zip(all_axes[0], maps, strict=True):
        panel.set_title(f"P{level.level}", fontsize=9.5, color=FAINT)


def shown_maximum(level: LevelMap, name: str, window: tuple[int, int, int, int]) -> float:
    """The highest number of a map among cells whose centre is shown; 0 where none is.

    Args:
        level: maps of one level.
        name: of the map.
        window: left, top, right, bottom of the shown part of the image, pixels.
    """
    values = level.values[name]
    x, y = (
        first + step * np.arange(n) for first, step, n in zip(level.first, level.step, values.shape[::-1], strict=True)
    )
    left, top, right, bottom = window
    shown = values[np.ix_((y >= top) & (y <= bottom), (x >= left) & (x <= right))]
    return float(shown.max(initial=0.0))


def _draw_map(axes: Any, row: Row, level: LevelMap, name: str, top: float, window: tuple[int, int, int, int]) -> Any:
    """A level's numbers as colours from 0 to `top` over the image, each cell around its centre."""
    left, upper, right, lower = window
    grey = row.image[upper:lower, left:right].mean(axis=2, keepdims=True).repeat(3, axis=2)
    pale = (PALE * grey + (1 - PALE) * 255).astype(np.uint8)
    axes.imshow(pale, extent=(left, right, lower, upper), interpolation="bilinear")
    values = level.values[name]
    height, width = values.shape
    (x, y), (dx, dy) = level.first - level.step / 2, level.step
    extent = (x, x + dx * width, y + dy * height, y)
    drawn = axes.imshow(values, HEAT, vmin=0, vmax=top, extent=extent, interpolation="nearest")
    axes.set(xlim=(left, right), ylim=(lower, upper), xticks=[], yticks=[])
    axes.spines[:].set_color("#bbbbbb")
    _outline(axes, row.decision.box, OBJECT_COLOUR, 2.0, halo=3.4)
    places = row.decision.where("positive")
    centres = row.decision.centres[places[row.decision.levels[places] == level.level]]
    axes.plot(*centres.T, linestyle="", **_dot(4.0))
    return drawn


def _dot(size: float) -> dict[str, Any]:
    """A positive anchor on a map."""
    return {"marker": "o", "markersize": size, "color": "white", "markeredgecolor": INK, "markeredgewidth": 0.8}
