"""Small PASCAL VOC folders with drawn images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image


class Thing(NamedTuple):
    """One object as an XML file states it."""

    name: str
    corners: tuple[float | str, float | str, float | str, float | str]  # xmin, ymin, xmax, ymax
    difficult: int = 0


Things = Sequence[Thing]
FIELDS = ("xmin", "ymin", "xmax", "ymax")
WIDTH, HEIGHT = 64, 48


def xml_text(file_name: str, things: Things) -> str:
    """An annotation file as VOC's own look, but for what nobody reads."""
    objects = "".join(
        f"<object><name>{thing.name}</name><pose>Left</pose><difficult>{thing.difficult}</difficult><bndbox>"
        + "".join(f"<{field}>{value}</{field}>" for field, value in zip(FIELDS, thing.corners, strict=True))
        + "</bndbox><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>\n"
        for thing in things
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    source = "<source><database>drawn</database><image>flickr</image></source>"
    return f"<annotation>\n<filename>{file_name}</filename>{source}{size}\n{objects}</annotation>\n"


def write_year(folder: Path, images: Mapping[str, Things], lists: Mapping[str, Sequence[str]]) -> Path:
    """A single year's folder: XML and pixels of every image, and lists by their names."""
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for seed, (name, things) in enumerate(images.items()):
        (folder / "Annotations" / f"{name}.xml").write_text(xml_text(f"{name}.jpg", things))
        pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg")
    for name, members in lists.items():
        (folder / "ImageSets/Main" / f"{name}.txt").write_text("".join(f"{member}\n" for member in members))
    return folder
