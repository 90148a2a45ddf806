"""What `visualize` does, and the pictures of a training run: the same for every method; each has its `explain`."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from torch import nn
from tqdm import tqdm

from core import distributed
from core.commands import BuildModel, Config, ImageSource, Trained, load_trained, output_names, refuse_overwriting
from core.config import TrainConfig
from core.data.images import ImageFolder
from core.data.loader import eval_plans, make_batch
from core.data.sources import DataSource, open_data
from core.data.table import Category, Table
from core.decisions import OUTCOMES, Decision, borders
from core.errors import UserError
from core.inference import check_categories
from core.plots import Row, draw_decisions, draw_maps
from core.runlog import write_json
from core.types import Batch, Targets

SHAPES_SHOWN = 4  # images that `visualize shapes` draws
OBJECTS_SHOWN, MAPS_SHOWN = 6, 3  # of an image, the largest
RUN_IMAGES, RUN_OBJECTS = 3, 2  # of a training run's pictures
RECORD = "assignments.json"
RUN_FOLDER = "assignments"  # in a run folder
MAPS_FOLDER = "maps"  # in the folder of the pictures

Explain = Callable[[Any, Targets, Any], list[list[Decision]]]  # (outputs, targets, config), pixels of the network input
DrawMore = Callable[[Path, nn.Module, Batch, Any], None]  # (file, model, batch of one, config)


class Shown(NamedTuple):
    """An image and what is decided about its objects, largest first, in pixels of the image file."""

    name: str
    pixels: UInt8[np.ndarray, "h w 3"]
    decisions: list[Decision]


def visualize(
    arguments: argparse.Namespace,
    method: str,
    config_type: type[Config],
    build: BuildModel,
    explain: Explain,
    axis: str,
    draw_more: DrawMore | None = None,
) -> None:
    """Draw what the assigner decides about the objects of images, and write all candidates to `assignments.json`.

    Where the method hands in maps, those of each image's largest objects are drawn into a folder `maps`.

    Args:
        arguments: of `core.arguments.visualize_parser`.
        method: package name that the checkpoint must carry.
        config_type: the method's configuration.
        build: makes the method's model.
        explain: the method's decisions.
        axis: what their scores are.
        draw_more: draws a further picture of each image, into the subfolder `more` under the same name.

    Raises:
        UserError: weights or data that are missing, damaged or do not fit each other; images that the data lack.
    """
    device = distributed.pick_device(arguments.device)
    trained = load_trained(arguments, method, config_type, build, device)
    data, rows = find_rows(arguments, trained)
    table = data.split(arguments.split)
    out = arguments.out or arguments.weights.parent / f"visualize-{arguments.split}"
    sources = [ImageSource(image_path(table, row), partial(table.read_image, row)) for row in rows]
    for folder in (out, out / MAPS_FOLDER):
        refuse_overwriting(sources, folder)
    shown = []
    for row in tqdm(rows, disable=not sys.stderr.isatty()):
        batch = image_batch(table, row, trained.config).to(device)
        decisions = explain_image(trained.model, explain, batch, trained.config)
        shown.append(Shown(table.name(row), table.read_image(row), decisions))
    out.mkdir(parents=True, exist_ok=True)
    records = []
    for row, image, target in zip(rows, shown, output_names(sources), strict=True):
        where = f"{arguments.weights}, {data.name} {arguments.split}"
        draw_image(out / target, image, trained.categories, axis, where)
        draw_image_maps(out / MAPS_FOLDER / target, image, trained.categories, where)
        records.append(record(int(table.image_ids[row]), image, target, trained.categories))
        if draw_more:
            draw_more(
                out / "more" / target, trained.model, image_batch(table, row, trained.config).to(device), trained.config
            )
    facts = {"method": method, "weights": str(arguments.weights), "data": data.name, "split": arguments.split}
    write_json(out / RECORD, {**facts, "score": axis, "images": records})
    objects = [decision for image in shown for decision in image.decisions]
    positives = sum(len(decision.where("positive")) for decision in objects)
    print(
        f"{positives} positives of {len(objects)} objects in {len(shown)} images, drawn in {out}; numbers in {RECORD}"
    )


def find_rows(arguments: argparse.Namespace, trained: Trained) -> tuple[DataSource, list[int]]:
    """The data set and the rows of its split that the command line names.

    The word shapes means some drawn images, of the same split.

    Raises:
        UserError: an image that the split lacks, or whose name several of its images share; other classes.
    """
    drawn = arguments.images == ["shapes"]
    spec = "shapes" if drawn else arguments.data or trained.config.data
    config = trained.config
    data = open_data(spec, config.seed, splits=(arguments.split,), voc_one_based=config.voc_one_based)
    table = data.split(arguments.split)
    check_categories(table, trained.categories, str(arguments.weights))
    if drawn:
        return data, list(range(min(SHAPES_SHOWN, len(table))))
    return data, named_rows(table, arguments.images, f"{arguments.split} of {data.name}")


def named_rows(table: Table, images: Sequence[str], where: str) -> list[int]:
    """Rows of images given by file name, by a path that ends in it, or by id, each row once.

    Args:
        table: to look in.
        images: as the user wrote them.
        where: the table's name, for messages.

    Raises:
        UserError: no such image, or several of the name.
    """
    by_name: dict[str, list[int]] = {}
    for row in range(len(table)):
        by_name.setdefault(PurePath(table.name(row)).name, []).append(row)
    by_id = {int(number): row for row, number in enumerate(table.image_ids)}
    rows: dict[int, None] = {}
    for image in images:
        found = [row for row in by_name.get(PurePath(image).name, []) if _same_end(image, table.name(row))]
        if not found and image.isdecimal() and int(image) in by_id:
            found = [by_id[int(image)]]
        if not found:
            raise UserError(f"{image}: no image of this name or id in {where}; choose another --split or --data")
        if len(found) > 1:
            names = ", ".join(table.name(row) for row in found[:3])
            raise UserError(f"{image}: {len(found)} images of {where} have this name ({names}); give more of the path")
        rows[found[0]] = None
    return list(rows)


def _same_end(first: str, second: str) -> bool:
    """Whether the shorter of two paths is the end of the longer."""
    return all(a == b for a, b in zip(PurePath(first).parts[::-1], PurePath(second).parts[::-1], strict=False))


def image_path(table: Table, row: int) -> str:
    """The file of an image, or the name of a drawn one."""
    reader = table.images
    return str(reader.folder / table.name(row)) if isinstance(reader, ImageFolder) else table.name(row)


def image_batch(table: Table, row: int, config: TrainConfig) -> Batch:
    """One image with its objects as evaluation sees it, a batch of one."""
    (plan,) = eval_plans(table, config, np.array([row]), config.scale, 1)
    return make_batch(table, config, plan, slice(None))


@torch.no_grad()
def explain_image(model: nn.Module, explain: Explain, batch: Batch, config: TrainConfig) -> list[Decision]:
    """What the assigner decides about the objects of a batch of one, largest first, in pixels of the image file.

    The model must be in evaluation mode and on the batch's device.
    """
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        outputs = model(batch.images, batch.sizes)
    ratio = (batch.original_sizes / batch.sizes)[0].flip(0).double().cpu().numpy()
    decisions = [to_file_pixels(decision, ratio) for decision in explain(outputs, batch.targets, config)[0]]
    return sorted(decisions, key=lambda decision: -float(np.prod(decision.box[2:] - decision.box[:2])))


def to_file_pixels(decision: Decision, ratio: Float64[np.ndarray, " 2"]) -> Decision:
    """A decision with its places multiplied by the image file's width and height over those of the network input."""
    corners = np.tile(ratio, 2)
    maps = [one._replace(first=one.first * ratio, step=one.step * ratio) for one in decision.maps]
    return decision._replace(
        box=decision.box * corners, centres=decision.centres * ratio, boxes=decision.boxes * corners, maps=maps
    )


def draw_image(path: Path, image: Shown, categories: Sequence[Category], axis: str, where: str) -> None:
    """One image's picture: a row for each of its largest objects."""
    rows = picture_rows(image, categories)
    left_out = len(image.decisions) - len(rows)
    count = "no objects" if not rows else "1 object" if len(rows) == 1 else f"{len(rows)} objects"
    if left_out:
        count = f"the largest {len(rows)} of {len(image.decisions)} objects; the others stand in {RECORD}"
    draw_decisions(path, rows, image.name, f"{where}: {count}", axis)


def draw_image_maps(path: Path, image: Shown, categories: Sequence[Category], where: str) -> None:
    """The maps of an image's largest objects; no picture where the method hands in none."""
    rows = [row for row in picture_rows(image, categories)[:MAPS_SHOWN] if row.decision.maps]
    if rows:
        path.parent.mkdir(exist_ok=True)
        names = ", ".join(rows[0].decision.maps[0].values)
        draw_maps(path, rows, image.name, f"{where}: {names} of every cell with the largest objects")


def picture_rows(image: Shown, categories: Sequence[Category]) -> list[Row]:
    """The largest objects, numbered."""
    return [
        Row(image.pixels, f"{number}  {object_title(decision, categories)}", decision)
        for number, decision in enumerate(image.decisions[:OBJECTS_SHOWN], start=1)
    ]


def object_title(decision: Decision, categories: Sequence[Category]) -> str:
    """`square, 80 x 82 px`."""
    width, height = decision.box[2:] - decision.box[:2]
    return f"{categories[decision.label].name}, {width:.0f} x {height:.0f} px"


def record(image_id: int, image: Shown, drawn: str, categories: Sequence[Category]) -> dict[str, Any]:
    """One image of `assignments.json`: boxes are x1, y1, x2, y2 in pixels of the file."""
    return {
        "image": image.name,
        "image_id": image_id,
        "drawn": drawn,
        "width": image.pixels.shape[1],
        "height": image.pixels.shape[0],
        "objects": [
            {
                "shown": number < OBJECTS_SHOWN,
                "category_id": categories[decision.label].id,
                "name": categories[decision.label].name,
                "box": _plain(decision.box),
                "borders": borders(decision),
                **decision.facts,
                "candidates": list(candidate_records(decision)),
            }
            for number, decision in enumerate(image.decisions)
        ],
    }


def candidate_records(decision: Decision) -> Iterator[dict[str, Any]]:
    """One anchor of an object after the other, by rank."""
    for place in range(len(decision.scores)):
        yield {
            "rank": place + 1,
            "outcome": OUTCOMES[decision.outcomes[place]],
            "score": float(decision.scores[place]),
            "level": f"P{decision.levels[place]}",
            "centre": _plain(decision.centres[place]),
            "box": _plain(decision.boxes[place]),
            "iou": float(decision.ious[place]),
            **{name: column[place].item() for name, column in decision.columns.items()},
        }


def _plain(values: np.ndarray) -> list[float]:
    return [round(float(value), 3) for value in values]


def run_pictures(
    explain: Explain, axis: str, table: Table, config: TrainConfig, device: torch.device
) -> Callable[[nn.Module, int], None] | None:
    """What `fit` draws with during a run: always the same images, into `assignments/step-000100.png` of its folder.

    The images are read now, so that one that cannot be read stops the run before it begins. None on all ranks but the
    main one, which alone draws.

    Args:
        explain: the method's decisions.
        axis: what their scores are.
        table: its first images with an object are drawn.
        config: of the run.
        device: of the model.
    """
    if not distributed.is_main():
        return None
    counts = [int((~table.crowd[table.box_slice(row)]).sum()) for row in range(len(table))]
    rows = np.flatnonzero(counts)[:RUN_IMAGES].tolist()
    names, images = [table.name(row) for row in rows], [table.read_image(row) for row in rows]
    batches = [image_batch(table, row, config).to(device) for row in rows]

    def draw(model: nn.Module, step: int) -> None:
        parts = [
            Row(image, f"{name}  {object_title(decision, table.categories)}", decision)
            for name, image, batch in zip(names, images, batches, strict=True)
            for decision in explain_image(model, explain, batch, config)[:RUN_OBJECTS]
        ]
        folder = Path(config.out, RUN_FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        where = f"{config.out}: the largest objects of the first images of val, network in evaluation mode"
        draw_decisions(folder / f"step-{step:06d}.png", parts, f"step {step}", where, axis)

    return draw
