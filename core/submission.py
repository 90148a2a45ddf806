"""The zip that COCO's test-dev server took: detections that are checked first."""

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from core.data.parse import open_annotations
from core.data.table import NoImages
from core.errors import UserError
from core.evaluator import DetectionArrays, encode_detections, read_detections
from core.files import replace_file

MOST_DETECTIONS = 100  # of an image: COCO counts no more
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def write_submission(detections: Path, image_info: Path, name: str, out: Path | None, *, trim: bool) -> Path:
    """Check a detections file and write it as a submission to COCO test-dev 2017.

    Args:
        detections: a COCO results file.
        image_info: COCO's image_info_test-dev2017.json: the images and classes that may occur.
        name: of the method, part of the file's name.
        out: the zip; None: beside the detections.
        trim: keep the 100 best detections of each image instead of refusing more.

    Returns:
        The zip, which holds one file at its root, detections_test-dev2017_<name>_results.json.

    Raises:
        UserError: naming the first detection that is wrong.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"--name must be letters, digits, dots, dashes and underscores, got {name!r}")
    entry = f"detections_test-dev2017_{name}_results"
    out = out or detections.parent / f"{entry}.zip"
    if out.suffix.lower() != ".zip":
        raise UserError(f"--out {out}: a submission is a .zip file")
    table = open_annotations(image_info, NoImages(), annotated=False)
    found = read_detections(detections)
    category_ids = np.array([category.id for category in table.categories], dtype=np.int64)
    check_submission(found, table.image_ids, category_ids, str(detections))
    best = best_of_images(found, MOST_DETECTIONS)
    if not trim and not best.all():
        image = found.image_id[~best][0]
        count = int((found.image_id == image).sum())
        raise UserError(
            f"{detections}: image {image} has {count} detections, COCO counts the {MOST_DETECTIONS} best of an image;"
            " --trim keeps these"
        )
    content = encode_detections(DetectionArrays(*(column[best] for column in found)))
    replace_file(out, zipped(f"{entry}.json", content))
    return out


def check_submission(
    found: DetectionArrays, image_ids: Int64[np.ndarray, " N"], category_ids: Int64[np.ndarray, " C"], source: str
) -> None:
    """Refuse what the server refused.

    Args:
        found: all detections.
        image_ids: of the test set.
        category_ids: of its classes.
        source: of the detections, for messages.

    Raises:
        UserError: no detection; an unknown image or category, a number that is not finite, a negative side, a score
            outside [0, 1].
    """

    def refuse(bad: Any, field: str, values: Any, why: str) -> None:
        if bad.any():
            row = int(np.argmax(bad))
            raise UserError(f"{source}: detection {row}: {field} {values[row].tolist()} {why}")

    if not len(found.scores):
        raise UserError(f"{source}: holds no detections")
    refuse(~np.isin(found.image_id, image_ids), "image_id", found.image_id, "is no image of the image info file")
    known = np.isin(found.category_id, category_ids)
    refuse(~known, "category_id", found.category_id, "is no category of the image info file; COCO's go from 1 to 90")
    refuse(~np.isfinite(found.boxes).all(axis=1), "bbox", found.boxes, "is not finite")
    refuse((found.boxes[:, 2:] < 0).any(axis=1), "bbox", found.boxes, "(x, y, width, height) has a negative side")
    refuse(~((found.scores >= 0) & (found.scores <= 1)), "score", found.scores, "is not in [0, 1]")


def best_of_images(found: DetectionArrays, count: int) -> Bool[np.ndarray, " n"]:
    """The detections that are among their image's best `count`; of equal scores the earlier ones."""
    order = np.lexsort((-found.scores, found.image_id))  # by image, then by falling score; equals keep their order
    images = found.image_id[order]
    place = np.arange(len(images)) - np.searchsorted(images, images)
    best = np.zeros(len(images), dtype=np.bool_)
    best[order] = place < count
    return best


def zipped(name: str, content: bytes) -> bytes:
    """A zip with one file; the same bytes for the same content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
