"""What `train`, `evaluate` and `predict` do, the same for every method: each hands in its model, losses and so on."""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from core import checkpoint, distributed
from core.anchors import SIZE_DIVISOR
from core.backbone import load_backbone_weights
from core.config import TrainConfig, total_steps, with_warmup_steps
from core.configfile import config_from_values
from core.data.images import read_image
from core.data.loader import Augment, train_batches
from core.data.sampler import training_images
from core.data.sources import TEST_DEV, open_data
from core.data.table import Category, Table
from core.data.transforms import network_sizes, resize
from core.draw import draw_detections
from core.errors import UserError
from core.evaluator import METRICS, evaluate_boxes, write_detections
from core.folding import fold_norms
from core.inference import (
    Detect,
    check_categories,
    describe_run,
    detect_batch,
    detect_table,
    example_images,
    ground_truth,
    load_start_weights,
    on_validation,
)
from core.runlog import write_json, write_text
from core.train import Picture, fit, seed_everything
from core.tta import describe_views, paper_views
from core.types import Batch, Detections
from core.voc import VOC_METRICS, VocResult, evaluate_voc

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
SHAPES_SHOWN = 8  # images that `predict shapes` draws

Config = TypeVar("Config", bound=TrainConfig)
BuildModel = Callable[[Any, int], nn.Module]  # (config, number of classes)


class Trained(NamedTuple):
    """A model with its weights, in evaluation mode, and what its checkpoint says about it."""

    model: nn.Module
    config: Any  # the method's configuration, with the command line's hardware options
    categories: tuple[Category, ...]


def train(
    config: Config,
    method: str,
    build: BuildModel,
    compute_losses: Callable[..., dict[str, torch.Tensor]],
    detect: Detect,
    pictures: Callable[[Config, Table, torch.device], Picture | None],
    load_weights: Callable[[Any, str, Any], None] = load_backbone_weights,
    augment: Augment | None = None,
) -> dict[str, float]:
    """One run from data to the best model, in the order in which it happens; returns the best metrics on val.

    Args:
        config: of the method.
        method: package name, which the checkpoints carry.
        build: makes the method's model.
        compute_losses: the method's criterion; gets `config=`.
        detect: the method's post-processing; gets `config=`.
        pictures: makes what draws the method's assignment during training, see `core.train.fit`.
        load_weights: fills the model's backbone from `config.backbone_weights`, see `core.backbone`.
        augment: the method's own augmentation in place of resizing and mirroring.
    """
    with distributed.process_group(config.device, config.rank_timeout) as device:
        data = open_data(config.data, config.seed, voc_one_based=config.voc_one_based)
        images = len(training_images(data.train, config.empty_images))
        steps, config = total_steps(config, images), with_warmup_steps(config, images)
        seed_everything(config.seed, deterministic=config.deterministic)
        model: Any = build(config, len(data.categories))
        if distributed.is_main():
            if not config.weights:
                load_weights(model.backbone, config.backbone_weights, config)
            load_start_weights(model, config, method)
        distributed.broadcast_model(model)
        share = {"rank": distributed.rank(), "world_size": distributed.world_size()}
        best = fit(
            model,
            partial(compute_losses, config=config),
            lambda start: train_batches(data.train, config, start=start, steps=steps, augment=augment, **share),
            on_validation(partial(detect, config=config), data.val, config, device),
            config,
            steps=steps,
            device=device,
            metadata=describe_run(method, data, config),
            picture=pictures(config, data.val, device),
        )
        if distributed.is_main():
            command = f"python -m {method}.predict {config.out}/best.pt {example_images(data)} --score 0.5"
            print(f"draw its detections: {command}")
    return best


def evaluate(
    arguments: argparse.Namespace,
    method: str,
    config_type: type[Config],
    build: BuildModel,
    detect: Detect,
    changes: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """The 12 COCO numbers of a checkpoint on a split, printed and written with all detections into a folder.

    Data of a VOC folder give both VOC numbers too (`core.voc`).

    Args:
        arguments: of `core.arguments.evaluate_parser`.
        method: package name that the checkpoint must carry.
        config_type: the method's configuration.
        build: makes the method's model.
        detect: the method's post-processing; gets `config=`.
        changes: configuration fields that the method's own flags set.

    Raises:
        UserError: weights or data that are missing, damaged or do not fit each other.
    """
    with distributed.process_group(arguments.device) as device:
        trained = load_trained(arguments, method, config_type, build, device, changes)
        if arguments.tta and trained.config.resize_rule == "square":
            side = trained.config.scale[0]
            raise UserError(f"--tta looks at several image sizes, {arguments.weights} takes squares of {side} px only")
        data = open_data(
            arguments.data or trained.config.data,
            trained.config.seed,
            splits=(arguments.split,),
            voc_one_based=trained.config.voc_one_based,
        )
        table = data.split(arguments.split)
        check_categories(table, trained.categories, str(arguments.weights))
        detect = partial(detect, config=trained.config)
        views = paper_views(*trained.config.scale) if arguments.tta else ()
        out = arguments.out or arguments.weights.parent / f"evaluate-{arguments.split}{'-tta' if views else ''}"
        if distributed.is_main():
            out.mkdir(parents=True, exist_ok=True)
            if views:
                print(describe_views(views), flush=True)  # it will take a while
        fold_norms(trained.model)
        found = detect_table(trained.model, detect, table, trained.config, device, views)
        if not distributed.is_main():
            return {}
        if arguments.split == TEST_DEV:
            write_detections(out / "detections.json", found)
            print(f"{len(found.scores)} detections on {len(table)} images of {data.name} {TEST_DEV}; no AP")
            print(f"written to {out}; python -m {method}.report --submission makes the zip of a submission")
            return {}
        truth = ground_truth(table)
        result = evaluate_boxes(truth, found, arguments.backend)
        voc = evaluate_voc(truth, found) if table.protocol == "voc" else VocResult({}, {})
        metrics = result.metrics | voc.metrics
        write_detections(out / "detections.json", found)
        per_class = [
            {"id": category.id, "name": category.name, "AP": result.category_ap[category.id]}
            | voc.category_ap.get(category.id, {})
            for category in table.categories
        ]
        facts = {"weights": str(arguments.weights), "data": data.name, "split": arguments.split, "tta": arguments.tta}
        facts |= {"images": len(table), "changes": dict(changes or {})}
        write_json(out / "metrics.json", {**metrics, "per_class": per_class, **facts})
        print(f"{len(found.scores)} detections on {len(table)} images of {data.name} {arguments.split}")
        for name, value in metrics.items():
            print(f"{name:<6} {'none' if value < 0 else f'{value:.4f}'}   {(METRICS | VOC_METRICS)[name]}")
        print(f"written to {out}")
    return metrics


def predict(
    arguments: argparse.Namespace, method: str, config_type: type[Config], build: BuildModel, detect: Detect
) -> None:
    """Draw detections into copies of images and write them to `predictions.json`. Arguments as of `evaluate`."""
    if not 0 <= arguments.score <= 1:
        raise UserError(f"--score must be in [0, 1], got {arguments.score}")
    device = distributed.pick_device(arguments.device)
    trained = load_trained(arguments, method, config_type, build, device)
    detect = partial(detect, config=trained.config)
    fold_norms(trained.model)
    names = [category.name for category in trained.categories]
    out = arguments.out or arguments.weights.parent / "predictions"
    sources = list(find_images(arguments.images, trained.config))
    refuse_overwriting(sources, out)
    out.mkdir(parents=True, exist_ok=True)
    records = []
    with tempfile.TemporaryDirectory(dir=out) as unfinished:  # nothing is left behind when an image cannot be read
        for source, target in zip(tqdm(sources, disable=not sys.stderr.isatty()), output_names(sources), strict=True):
            image = source.read()
            boxes, scores, labels = detect_image(trained.model, detect, image, trained.config, device)
            keep = scores >= arguments.score
            boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
            draw_detections(image, boxes, scores, labels, names).save(Path(unfinished, target))
            records.append(prediction_record(source.name, target, image, boxes, scores, labels, trained.categories))
        for record in records:
            os.replace(Path(unfinished, record["drawn"]), out / record["drawn"])
    write_text(out / "predictions.json", json.dumps(records, indent=1) + "\n")
    count = sum(len(record["detections"]) for record in records)
    print(f"{count} detections with score {arguments.score:g} or more in {len(records)} images, drawn in {out}")


def load_trained(
    arguments: argparse.Namespace,
    method: str,
    config_type: type[Config],
    build: BuildModel,
    device: torch.device,
    asked: Mapping[str, Any] | None = None,
) -> Trained:
    """The model of a checkpoint on the device, configured as it was trained but for hardware and what is `asked`."""
    content = checkpoint.load(arguments.weights, method=method) if distributed.is_main() else {}
    content = distributed.broadcast(content)
    try:
        config = config_from_values(content["config"], config_type, str(arguments.weights))
        categories = tuple(Category(int(number), str(name)) for number, name in content["categories"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{arguments.weights}: its configuration or classes are missing or damaged ({error})") from None
    changes = {name: getattr(arguments, name, None) for name in ("workers", "batch_size", "precision")}
    changes = {name: value for name, value in changes.items() if value is not None} | {"device": arguments.device}
    changes |= {"deterministic": True} if arguments.deterministic else {}
    changes |= asked or {}
    try:
        config = dataclasses.replace(config, **changes)
    except ValueError as error:
        raise UserError(str(error)) from None
    seed_everything(config.seed, deterministic=config.deterministic)
    model = build(config, len(categories))
    if "average" in content and content["average"] is not None:
        content = {**content, "model": content["average"]}  # what training evaluated
    checkpoint.load_weights(model, content, arguments.weights)
    model = model.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    return Trained(model, config, categories)


class ImageSource(NamedTuple):
    """An image to predict on: a name for the report and what reads its pixels."""

    name: str
    read: Callable[[], np.ndarray]


def find_images(arguments: Sequence[str], config: TrainConfig) -> Iterator[ImageSource]:
    """Files, the images inside folders (sorted, not recursive), and for the word shapes some drawn test images.

    Raises:
        UserError: for a path that does not exist or a folder without images.
    """
    for argument in arguments:
        path = Path(argument)
        if argument == "shapes" and not path.exists():
            table = open_data("shapes", config.seed, splits=("test",)).split("test")
            yield from (_drawn(table, index) for index in range(min(SHAPES_SHOWN, len(table))))
        elif path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            if not files:
                raise UserError(f"{path}: no images in this folder; looked for {', '.join(IMAGE_SUFFIXES)}")
            yield from (ImageSource(str(file), partial(read_image, file)) for file in files)
        elif path.is_file():
            yield ImageSource(str(path), partial(read_image, path))
        else:
            raise UserError(f"{path}: no such image or folder")


def _drawn(table: Table, index: int) -> ImageSource:
    return ImageSource(f"shapes-{index}.png", partial(table.read_image, index))


def output_names(sources: Sequence[ImageSource]) -> list[str]:
    """A file name for each picture: the image's own, with a number where two would be the same."""
    names: dict[str, None] = {}
    for source in sources:
        stem, number = Path(source.name).stem, 1
        name = f"{stem}.png"
        while name in names:
            number += 1
            name = f"{stem}-{number}.png"
        names[name] = None
    return list(names)


def refuse_overwriting(sources: Sequence[ImageSource], out: Path) -> None:
    """UserError if a picture would take the place of one of the images that are read."""
    read = {Path(source.name).resolve() for source in sources}
    for name in output_names(sources):
        if (out / name).resolve() in read:
            raise UserError(f"{out / name}: is one of the images to read; choose another --out")


@torch.no_grad()
def detect_image(
    model: nn.Module, detect: Detect, image: np.ndarray, config: TrainConfig, device: torch.device
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (n, 4) xyxy in pixels of the image, scores and labels by falling score; RGB bytes (H, W, 3) in."""
    original = np.array([image.shape[:2]], dtype=np.int64)
    size = network_sizes(original, config.scale, config.resize_rule)
    height, width = (int(side) for side in size[0])
    pixels = torch.zeros(3, *(-(-side // SIZE_DIVISOR) * SIZE_DIVISOR for side in (height, width)), dtype=torch.uint8)
    pixels[:, :height, :width] = torch.from_numpy(resize(image, (height, width)).copy()).permute(2, 0, 1)
    sizes, originals = torch.from_numpy(size), torch.from_numpy(original)
    batch = Batch(
        pixels[None],
        sizes,
        torch.zeros(1, 0, 4),
        torch.zeros(1, 0, dtype=torch.int64),
        torch.zeros(1, 0, dtype=torch.bool),
        torch.zeros(1, dtype=torch.int64),
        originals,
    )
    detections = detect_batch(model, detect, batch.to(device), config)
    return original_boxes(detections, sizes, originals)


def original_boxes(
    detections: Detections, sizes: torch.Tensor, originals: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes of a batch of one in pixels of the image file, with scores and labels."""
    valid = detections.valid[0].cpu()
    ratios = (originals / sizes)[0].flip(0).repeat(2)
    boxes = detections.boxes[0].cpu()[valid] * ratios
    return boxes.numpy(), detections.scores[0].cpu()[valid].numpy(), detections.labels[0].cpu()[valid].numpy()


def prediction_record(
    name: str,
    drawn: str,
    image: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    categories: Sequence[Category],
) -> dict[str, Any]:
    """One image of `predictions.json`: boxes are x1, y1, x2, y2 in pixels of the file."""
    return {
        "image": name,
        "drawn": drawn,
        "width": image.shape[1],
        "height": image.shape[0],
        "detections": [
            {
                "box": [round(float(value), 2) for value in box],
                "score": round(float(score), 4),
                "category_id": categories[int(label)].id,
                "name": categories[int(label)].name,
            }
            for box, score, label in zip(boxes, scores, labels, strict=True)
        ],
    }
