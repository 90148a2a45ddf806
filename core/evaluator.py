"""COCO average precision of a detections file, or of detections held in arrays.

    python -m core.evaluator GROUND_TRUTH.json DETECTIONS.json                        # the 12 numbers as a table
    python -m core.evaluator GROUND_TRUTH.json DETECTIONS.json --json                 # and per category, as JSON
    python -m core.evaluator GROUND_TRUTH.json DETECTIONS.json --backend pycocotools  # by the reference implementation

The protocol is pycocotools'; faster-coco-eval computes the same numbers several times faster and is the default. Both
get the same checked, renumbered records: what one would refuse the other never sees. (Imports no torch.)
"""

import contextlib
import gc
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
import numpy as np
from jaxtyping import Bool, Float64, Int64

from core.cli import OneLineParser, run
from core.data.table import Table
from core.errors import UserError
from core.files import replace_file
from core.geometry import MODERN, Geometry

if TYPE_CHECKING:
    import core.types

Backend = Literal["faster", "pycocotools"]

METRICS = {  # name: what it averages over, in pycocotools' order
    "AP": "IoU .50:.95, all sizes",
    "AP50": "IoU .50",
    "AP75": "IoU .75",
    "APs": "area below 32^2",
    "APm": "area 32^2 to 96^2",
    "APl": "area above 96^2",
    "AR1": "recall, 1 detection an image and class",
    "AR10": "recall, 10 detections",
    "AR100": "recall, 100 detections",
    "ARs": "recall, area below 32^2",
    "ARm": "recall, area 32^2 to 96^2",
    "ARl": "recall, area above 96^2",
}


class DetectionArrays(NamedTuple):
    """Detections of any number of images in original image pixels, one row each, in any order."""

    image_id: Int64[np.ndarray, " n"]
    category_id: Int64[np.ndarray, " n"]  # ids of the annotation file, not labels
    boxes: Float64[np.ndarray, "n 4"]  # left, top, width, height
    scores: Float64[np.ndarray, " n"]


class GroundTruth(NamedTuple):
    """What detections are compared with: the images looked at, the classes, and M annotated boxes."""

    image_ids: Int64[np.ndarray, " N"]
    category_ids: Int64[np.ndarray, " C"]  # of label 0..C-1
    box_image_ids: Int64[np.ndarray, " M"]
    box_category_ids: Int64[np.ndarray, " M"]
    boxes: Float64[np.ndarray, "M 4"]  # left, top, width, height
    areas: Float64[np.ndarray, " M"]  # decide small, medium or large; COCO: of the mask, not of the box
    crowd: Bool[np.ndarray, " M"]  # regions of many objects, VOC's difficult ones: detections of them do not count


class CocoResult(NamedTuple):
    """Numbers in [0, 1]; -1 (metrics) or None (a category) where there is nothing to find."""

    metrics: dict[str, float]  # the keys of METRICS
    category_ap: dict[int, float | None]  # AP of each category id


def ground_truth_from_table(table: Table) -> GroundTruth:
    """Ground truth of one split, from the arrays that training reads. VOC's difficult boxes count as crowd."""
    category_ids = np.array([category.id for category in table.categories], dtype=np.int64)
    return GroundTruth(
        np.asarray(table.image_ids, dtype=np.int64),
        category_ids,
        np.repeat(table.image_ids, np.diff(table.box_offsets)).astype(np.int64),
        category_ids[table.labels],
        np.asarray(table.boxes_xywh, dtype=np.float64),
        np.asarray(table.areas, dtype=np.float64),
        np.asarray(table.crowd | table.difficult, dtype=np.bool_),
    )


def no_detections() -> DetectionArrays:
    """Zero detections."""
    return DetectionArrays(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))


def concatenate(parts: Sequence[DetectionArrays]) -> DetectionArrays:
    """Detections of several batches or ranks as one."""
    return DetectionArrays(*(np.concatenate(fields) for fields in zip(no_detections(), *parts, strict=True)))


def detection_arrays(
    detections: "core.types.Detections",
    batch: "core.types.Batch",
    category_ids: Int64[np.ndarray, " C"],
    geometry: Geometry = MODERN,
) -> DetectionArrays:
    """Detections of a batch, moved from the network input back to the pixels of their image files.

    Each axis is divided by its own resize ratio, then a box becomes (x1, y1, width, height) with width x2 - x1, or
    x2 - x1 + 1 in legacy geometry (spec PAA section 6, step 6).

    Args:
        detections: in pixels of the network input, labels 0..C-1, from any device.
        batch: whose images they are; its `sizes`, `original_sizes` and `image_ids` are read.
        category_ids: the annotation file's id of every label.
        geometry: how the model measures boxes.
    """
    valid = detections.valid.cpu().numpy()
    rows = np.nonzero(valid)[0]
    ratios = batch.sizes.cpu().numpy() / batch.original_sizes.cpu().numpy()
    corners = detections.boxes.double().cpu().numpy()[valid] / np.tile(ratios[:, ::-1], 2)[rows]
    return DetectionArrays(
        batch.image_ids.cpu().numpy().astype(np.int64)[rows],
        category_ids[detections.labels.cpu().numpy()[valid]],
        np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2] + geometry.plus_one], axis=1),
        detections.scores.double().cpu().numpy()[valid],
    )


def coco_metrics(
    ground_truth: GroundTruth, detections: DetectionArrays, backend: Backend = "faster"
) -> dict[str, float]:
    """The 12 COCO numbers, keys as in METRICS. Arguments, values and errors as of `evaluate_boxes`."""
    return evaluate_boxes(ground_truth, detections, backend).metrics


def evaluate_boxes(
    ground_truth: GroundTruth, detections: DetectionArrays, backend: Backend = "faster", source: str = "detections"
) -> CocoResult:
    """The 12 COCO numbers and the AP of each category, in full float64 precision and without any output.

    No detections at all give zeros. A number over nothing to find, such as APs without small objects, is -1.

    Args:
        ground_truth: images without detections count too.
        detections: of these images; at most 100 of an image and category take part.
        backend: who computes: faster-coco-eval or the reference, pycocotools. The numbers are equal.
        source: of the detections, for messages.

    Raises:
        UserError: a score or box that is not finite, an image or category id that the ground truth lacks.
    """
    check_detections(ground_truth, detections, source)
    images, categories = np.unique(ground_truth.image_ids), np.unique(ground_truth.category_ids)
    if not len(images) or not len(categories):
        return CocoResult(dict.fromkeys(METRICS, -1.0), {})
    with contextlib.redirect_stdout(io.StringIO()), _paused_collector():
        precision, recall = (_faster if backend == "faster" else _pycocotools)(
            _dataset(images, categories, _truth_records(ground_truth, images, categories)),
            _dataset(images, categories, _detection_records(detections, images, categories)),
        )
    return CocoResult(_summary(precision, recall), _category_ap(precision, categories))


def check_detections(ground_truth: GroundTruth, detections: DetectionArrays, source: str) -> None:
    """UserError for an unknown image or category id, or a number that is not finite."""
    for name, ids, known in (
        ("image_id", detections.image_id, ground_truth.image_ids),
        ("category_id", detections.category_id, ground_truth.category_ids),
    ):
        unknown = np.flatnonzero(~np.isin(ids, known))
        if len(unknown):
            row = int(unknown[0])
            raise UserError(f"{source}: detection {row} has {name} {ids[row]}, which the ground truth does not know")
    _check_finite(source, "detection", score=detections.scores, bbox=detections.boxes)


def _check_finite(source: str, what: str, **fields: Float64[np.ndarray, "..."]) -> None:
    for name, values in fields.items():
        rows = np.flatnonzero(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))
        if len(rows):
            row = int(rows[0])
            raise UserError(f"{source}: {what} {row} has {name} {values[row].tolist()}; it must be finite")


def _truth_records(truth: GroundTruth, images: np.ndarray, categories: np.ndarray) -> list[dict[str, Any]]:
    return _records(
        np.searchsorted(images, truth.box_image_ids),
        np.searchsorted(categories, truth.box_category_ids),
        truth.boxes,
        truth.areas,
        truth.crowd,
        np.zeros(len(truth.boxes)),
    )


def _detection_records(found: DetectionArrays, images: np.ndarray, categories: np.ndarray) -> list[dict[str, Any]]:
    return _records(
        np.searchsorted(images, found.image_id),
        np.searchsorted(categories, found.category_id),
        found.boxes,
        found.boxes[:, 2] * found.boxes[:, 3],
        np.zeros(len(found.boxes), dtype=np.bool_),
        found.scores,
    )


def _records(*columns: np.ndarray) -> list[dict[str, Any]]:
    """What both back ends read, in the order of the columns below.

    Dense numbers stand for the files' ids: faster-coco-eval holds ids as floats, and to both an annotation id of 0
    means "not matched". A rank keeps the order of the ids, which decides between equal scores.
    """
    return [
        {"id": row, "image_id": i, "category_id": c, "bbox": box, "area": area, "iscrowd": int(crowd), "score": score}
        for row, (i, c, box, area, crowd, score) in enumerate(zip(*(c.tolist() for c in columns), strict=True), start=1)
    ]


def _dataset(images: np.ndarray, categories: np.ndarray, records: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "images": [{"id": row} for row in range(len(images))],
        "categories": [{"id": row} for row in range(len(categories))],
        "annotations": records,
    }


@contextlib.contextmanager
def _paused_collector() -> Iterator[None]:
    """No garbage collection while half a million records are made: it would walk them again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _faster(truth: dict[str, Any], found: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Precision (T, R, C, area, max detections) and recall (T, C, area, max detections) by faster-coco-eval."""
    from faster_coco_eval import COCO, COCOeval_faster

    evaluation = COCOeval_faster(
        _indexed(COCO(), truth), _indexed(COCO(), found), iouType="bbox", print_function=lambda *_: None
    )
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


def _pycocotools(truth: dict[str, Any], found: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The same by the reference implementation."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    evaluation = COCOeval(_indexed(COCO(), truth), _indexed(COCO(), found), iouType="bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


def _indexed(coco: Any, dataset: dict[str, Any]) -> Any:
    """A back end's COCO object of records in memory: `loadRes` would refuse an empty list and make polygons."""
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _summary(precision: np.ndarray, recall: np.ndarray) -> dict[str, float]:
    """pycocotools' `summarize`: means over what is defined; areas all, small, medium, large, detections 1, 10, 100."""
    ap = [_mean(part) for part in (precision[..., 0, 2], precision[0, ..., 0, 2], precision[5, ..., 0, 2])]
    ap += [_mean(precision[..., area, 2]) for area in (1, 2, 3)]
    ar = [_mean(recall[..., 0, count]) for count in (0, 1, 2)] + [_mean(recall[..., area, 2]) for area in (1, 2, 3)]
    return dict(zip(METRICS, ap + ar, strict=True))


def _category_ap(precision: np.ndarray, categories: np.ndarray) -> dict[int, float | None]:
    means = [_mean(precision[:, :, row, 0, 2]) for row in range(len(categories))]
    return {category: None if mean < 0 else mean for category, mean in zip(categories.tolist(), means, strict=True)}


def _mean(values: np.ndarray) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0


# Files


class _Image(msgspec.Struct):
    id: int


class _Category(msgspec.Struct):
    id: int


class _Annotation(msgspec.Struct, gc=False):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: int | bool = 0


class _GroundTruth(msgspec.Struct):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Annotation]


class _Detection(msgspec.Struct, gc=False):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    score: float


def read_ground_truth(path: Path) -> GroundTruth:
    """Ground truth of a COCO annotation file, every box as it stands there: evaluation drops and mends nothing.

    An annotation without `area` gets width * height, without `iscrowd` 0. Its own id is not read.

    Raises:
        UserError: missing, not JSON, wrong types, duplicate or unknown ids, numbers that are not finite.
    """
    content: _GroundTruth = _decode(path, _GroundTruth, "a COCO annotation file")
    image_ids = _unique_ids(path, "image", [image.id for image in content.images])
    category_ids = _unique_ids(path, "category", [category.id for category in content.categories])
    rows = content.annotations
    boxes = np.array([row.bbox for row in rows], dtype=np.float64).reshape(-1, 4)
    areas = [row.bbox[2] * row.bbox[3] if row.area is None else row.area for row in rows]
    truth = GroundTruth(
        image_ids,
        category_ids,
        _known_ids(path, "image_id", [row.image_id for row in rows], image_ids),
        _known_ids(path, "category_id", [row.category_id for row in rows], category_ids),
        boxes,
        np.array(areas, dtype=np.float64),
        np.array([bool(row.iscrowd) for row in rows], dtype=np.bool_),
    )
    _check_finite(str(path), "annotation", bbox=truth.boxes, area=truth.areas)
    return truth


def read_detections(path: Path) -> DetectionArrays:
    """Detections of a COCO results file: a list of {image_id, category_id, bbox, score}.

    Raises:
        UserError: missing, not JSON, or wrong types. `evaluate_boxes` checks the values.
    """
    rows: list[_Detection] = _decode(path, list[_Detection], "a COCO results file")
    return DetectionArrays(
        _ids(path, [row.image_id for row in rows]),
        _ids(path, [row.category_id for row in rows]),
        np.array([row.bbox for row in rows], dtype=np.float64).reshape(-1, 4),
        np.array([row.score for row in rows], dtype=np.float64),
    )


def write_detections(path: Path, detections: DetectionArrays) -> None:
    """A COCO results file that `read_detections` reads back to the same float64 values."""
    replace_file(path, encode_detections(detections))


def encode_detections(detections: DetectionArrays) -> bytes:
    """The JSON of `write_detections`."""
    columns = [column.tolist() for column in detections]
    return msgspec.json.encode([_Detection(*row) for row in zip(*columns, strict=True)])


def _decode(path: Path, kind: Any, what: str) -> Any:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected {what}") from None
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: not {what} ({error})") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return _decode_with_nan(path, raw, kind, what, error)


def _decode_with_nan(path: Path, raw: bytes, kind: Any, what: str, reason: Exception) -> Any:
    """Python writes NaN and Infinity, which are no JSON, and reads them: so the check of values can name the entry."""
    try:
        return msgspec.convert(json.loads(raw), type=kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: not {what} ({error})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON ({reason})") from None


def _ids(path: Path, values: list[int]) -> Int64[np.ndarray, " n"]:
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError:
        raise UserError(f"{path}: id {max(values, key=abs)} has more than 64 bits") from None


def _unique_ids(path: Path, what: str, values: list[int]) -> Int64[np.ndarray, " n"]:
    ids, counts = np.unique(_ids(path, values), return_counts=True)
    if (counts > 1).any():
        raise UserError(f"{path}: {what} id {ids[counts > 1][0]} occurs {counts.max()} times")
    return _ids(path, values)


def _known_ids(path: Path, field: str, values: list[int], known: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " m"]:
    ids = _ids(path, values)
    unknown = np.flatnonzero(~np.isin(ids, known))
    if len(unknown):
        raise UserError(f"{path}: annotation {unknown[0]} has {field} {ids[unknown[0]]}, which the file does not list")
    return ids


# Command


def main() -> None:
    """Run the command."""
    parser = OneLineParser(prog="python -m core.evaluator", description="The 12 COCO numbers of a detections file.")
    parser.add_argument("ground_truth", type=Path, metavar="GROUND_TRUTH.json", help="a COCO annotation file")
    parser.add_argument("detections", type=Path, metavar="DETECTIONS.json", help="a COCO results file")
    parser.add_argument("--json", action="store_true", help="print JSON, with the AP of each category")
    parser.add_argument("--backend", choices=("faster", "pycocotools"), default="faster", help="who computes")
    arguments = parser.parse_args()
    truth, found = read_ground_truth(arguments.ground_truth), read_detections(arguments.detections)
    result = evaluate_boxes(truth, found, arguments.backend, source=str(arguments.detections))
    if arguments.json:
        print(json.dumps({"metrics": result.metrics, "per_category_AP": result.category_ap}, indent=2))
        return
    print(f"{len(found.scores)} detections on {len(truth.image_ids)} images, {len(truth.boxes)} boxes")
    for name, value in result.metrics.items():
        print(f"{name:<6} {'none' if value < 0 else f'{value:.4f}'}   {METRICS[name]}")


if __name__ == "__main__":
    run(main)
