"""One case of every check of `core.data.problems`, planted in a set that is otherwise clean."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tests.core.data.test_images import png_header
from tests.core.voc_folder import Thing, write_year, xml_text

WIDTH, HEIGHT = 64, 48
CLASSES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]


class Place:
    """A clean COCO folder: train has the images 1 to 4, val 11 to 13; each has six boxes, three of each class."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.train = self._split("train", range(1, 5))
        self.val = self._split("val", range(11, 14))

    def _split(self, split: str, ids: range) -> dict[str, Any]:
        images = [self.new_image(split, number) for number in ids]
        boxes = [
            {"id": 6 * i + k + 1, "image_id": entry["id"], "category_id": 1 + k % 2, "iscrowd": 0, **self._box(i, k)}
            for i, entry in enumerate(images)
            for k in range(6)
        ]
        return {"images": images, "annotations": boxes, "categories": [dict(entry) for entry in CLASSES]}

    @staticmethod
    def _box(i: int, k: int) -> dict[str, Any]:
        return {"bbox": [2 + 8 * k, 3 + i + k, 6 + k, 9.5 + i], "area": (6 + k) * (9.5 + i)}

    def new_image(self, split: str, number: int, width: int = WIDTH, height: int = HEIGHT) -> dict[str, Any]:
        """Draws an image and gives its entry."""
        path = self.path(split, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return {"id": number, "file_name": path.name, "height": height, "width": width}

    def path(self, split: str, number: int) -> Path:
        """The image file of a number."""
        return self.folder / f"{split}2017" / f"{number}.png"

    def annotations(self, split: str) -> Path:
        """The annotation file of a split."""
        return self.folder / "annotations" / f"instances_{split}2017.json"

    def both(self, entry: dict[str, Any]) -> None:
        """Adds a category to both splits."""
        for content in (self.train, self.val):
            content["categories"].append(dict(entry))

    def write(self) -> Path:
        """Writes both annotation files."""
        self.annotations("train").parent.mkdir(parents=True, exist_ok=True)
        for split in ("train", "val"):
            self.annotations(split).write_text(json.dumps(getattr(self, split)))
        return self.folder

    def yaml(self, **changes: dict[str, str]) -> Path:
        """Writes annotation files and a dataset YAML."""
        self.write()
        path = self.folder / "my.yaml"
        splits = {
            split: {"images": f"{split}2017", "annotations": f"annotations/instances_{split}2017.json"}
            for split in ("train", "val")
        }
        path.write_text(json.dumps(splits | changes))
        return path


class Planted(NamedTuple):
    """A check, how to plant a case of it, and what must be found."""

    check: str
    plant: Callable[[Path], Path]  # makes a data set in a folder; what --data names
    file: str  # end of the path in the first example
    id: int | str | None = None
    value: Any = None
    name: str = ""  # of the case; the check's own by default


def coco(check: str, change: Callable[[Place], object], file: str = "instances_val2017.json", **found: Any) -> Planted:
    """A case in a COCO folder; `change` may write the files itself and then gives what --data names."""

    def plant(folder: Path) -> Path:
        place = Place(folder / "coco")
        named = change(place)
        return named if isinstance(named, Path) else place.write()

    return Planted(check, plant, file, **found)


def box(check: str, _id: int = 2, name: str = "", **changes: Any) -> Planted:
    """A case in the second annotation of val; the first changed field is what must be found."""
    value = next(iter(changes.values()))

    def change(place: Place) -> None:
        place.val["annotations"][1].update(changes)

    return coco(check, change, id=_id, value=str(value) if isinstance(value, float) else value, name=name)


def image(check: str, value: Any = None, name: str = "", **changes: Any) -> Planted:
    """A case in the entry of image 12."""
    value = next(iter(changes.values())) if value is None else value
    return coco(check, lambda place: place.val["images"][1].update(changes), id=12, value=value, name=name)


def text(content: str) -> Callable[[Place], Path]:
    """Another content of val's annotation file."""

    def change(place: Place) -> Path:
        place.write()
        place.annotations("val").write_text(content)
        return place.folder

    return change


def without(place: Place, key: str) -> None:
    del place.val["annotations"][1][key]


def save(content: bytes) -> Callable[[Place], None]:
    """Another content of the file of image 12."""

    def change(place: Place) -> None:
        place.path("val", 12).write_bytes(content)

    return change


def cut(place: Place, share: float = 0.5, last: int | None = None) -> None:
    path = place.path("val", 12)
    content = path.read_bytes()
    path.write_bytes(content[: last or int(share * len(content))])


def turned(place: Place) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = place.path("val", 12)
    with Image.open(path) as opened:
        opened.copy().save(path, exif=exif)


def turned_and_swapped(place: Place) -> None:
    turned(place)
    place.val["images"][1].update(height=WIDTH, width=HEIGHT)


def with_alpha(place: Place) -> None:
    path = place.path("val", 12)
    with Image.open(path) as opened:
        opened.convert("RGBA").save(path)


def added(place: Place, number: int, **size: int) -> None:
    entry = place.new_image("val", number, **size)
    place.val["images"].append(entry)


def copied(place: Place, split: str, number: int) -> None:
    added(place, 19)
    shutil.copy(place.path(split, number), place.path("val", 19))


def twice(place: Place, file_name: str, number: int = 12) -> None:
    place.val["images"].append(place.val["images"][1] | {"id": number, "file_name": file_name})


def same_box(place: Place, row: int) -> None:
    place.val["annotations"][row]["bbox"] = place.val["annotations"][0]["bbox"]


def corners(place: Place) -> None:
    for entry in place.val["annotations"]:
        x, y, width, height = entry["bbox"]
        entry["bbox"] = [x, y, x + width, y + height]


def fractions(place: Place) -> None:
    for entry in place.val["annotations"]:
        entry.update(bbox=[number / WIDTH for number in entry["bbox"]], area=None)


def one_kite(place: Place, others: int = 0) -> None:
    place.both({"id": 3, "name": "kite"})
    entries = place.train["annotations"]
    entries[1]["category_id"] = 3
    more = ({**entries[0], "id": 1000 + i, "bbox": [i / 10, 1, 9.5, 9.5]} for i in range(others))
    entries.extend(more)
    boxes = place.val["annotations"]
    boxes[1]["category_id"] = 3


def kite_in_val(place: Place) -> None:
    place.both({"id": 3, "name": "kite"})
    place.val["annotations"][1]["category_id"] = 3


def swapped_ids(place: Place) -> None:
    place.val["categories"] = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]


def renamed_folder(place: Place) -> None:
    (place.folder / "val2017").rename(place.folder / "elsewhere")


def only_train(place: Place) -> Path:
    place.write()
    place.annotations("val").unlink()
    return place.folder


def shared_folder(place: Place) -> Path:
    for split in ("train", "val"):
        shutil.copytree(place.folder / f"{split}2017", place.folder / "all", dirs_exist_ok=True)
    place.val["images"].append(place.train["images"][0])
    return place.yaml(
        train={"images": "all", "annotations": "annotations/instances_train2017.json"},
        val={"images": "all", "annotations": "annotations/instances_val2017.json"},
    )


def voc(check: str, change: Callable[[Path], object], file: str, name: str = "", **found: Any) -> Planted:
    """A case in a VOC folder: train lists a and b, val c and d; each has a cat and a dog."""

    def plant(folder: Path) -> Path:
        things = [Thing("cat", (3, 4, 20, 25)), Thing("dog", (10, 8, 40, 30))]
        year = write_year(folder / "voc", dict.fromkeys("abcd", things), {"train": "ab", "val": "cd"})
        change(year)
        return year

    return Planted(check, plant, file, **found, name=name)


def listed(name: str, split: str = "val") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "ImageSets/Main" / f"{split}.txt"
        path.write_text((path.read_text() if path.is_file() else "") + f"{name}\n")

    return change


def xml(old: str, new: str, file: str = "c") -> Callable[[Path], None]:
    """Another word in an XML file, where it stands first."""

    def change(folder: Path) -> None:
        path = folder / "Annotations" / f"{file}.xml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return change


def other_file_name(folder: Path) -> None:
    shutil.copy(folder / "JPEGImages/c.jpg", folder / "JPEGImages/other.jpg")
    (folder / "JPEGImages/c.jpg").unlink()
    xml("c.jpg", "other.jpg")(folder)


def without_box(folder: Path) -> None:
    path = folder / "Annotations/c.xml"
    start, _, rest = path.read_text().partition("<bndbox>")
    path.write_text(start + rest.partition("</bndbox>")[2])


NAN = math.nan
FILE = "val2017/12.png"
PLANTED = [
    coco("yaml-invalid", lambda place: place.yaml(val={"images": "val2017"}), "my.yaml"),
    coco("yaml-invalid", lambda place: place.yaml(vall={}), "my.yaml", name="yaml-split"),
    coco(
        "annotations-missing",
        lambda place: place.yaml(val={"images": "val2017", "annotations": "nowhere.json"}),
        "nowhere.json",
    ),
    coco("json-invalid", text("{")),
    coco("json-invalid", text(""), name="json-empty"),
    coco("not-coco", text('{"images": []}')),
    coco("not-coco", text('{"images": 5, "annotations": [], "categories": []}'), name="not-a-list"),
    coco("images-none", lambda place: place.val.update(images=[], annotations=[])),
    coco("categories-none", lambda place: place.val.update(categories=[], annotations=[])),
    coco("image-folder-missing", renamed_folder),
    coco("json-nan", lambda place: place.val["annotations"][0].update(segmentation=[[NAN]])),
    coco("split-missing", only_train, "coco"),
    coco("entry-no-object", lambda place: place.val["annotations"].append(5), value=5),
    coco("field-missing", lambda place: without(place, "bbox"), id=2),
    coco("field-missing", lambda place: without(place, "id"), name="id-missing"),
    box("field-wrong-type", bbox="1 2 3 4"),
    box("field-wrong-type", image_id="11", name="number-in-text"),
    box("field-wrong-type", bbox=[1, 2, 3], name="three-numbers"),
    image("field-wrong-type", file_name=5, name="name-is-number"),
    image("field-wrong-type", width="64", name="width-in-text"),
    box("number-too-large", image_id=2**63),
    image("number-too-large", height=2**63, name="height-too-large"),
    coco("image-id-duplicate", lambda place: twice(place, "12.png"), id=12, value=12),
    coco("image-id-duplicate", lambda place: twice(place, "11.png"), id=12, value=12, name="two-files-one-id"),
    image("image-size-invalid", value=[WIDTH, 0], height=0),
    image("path-escape", file_name="../12.png"),
    image("path-escape", file_name="/12.png", name="absolute"),
    image("file-name-invalid", file_name="a\\12.png"),
    image("file-name-invalid", file_name="", name="empty-name"),
    coco("file-name-duplicate", lambda place: twice(place, "12.png", 14), id=14, value="12.png"),
    coco("image-without-boxes", lambda place: added(place, 14), id=14, value="14.png"),
    coco(
        "image-only-crowd",
        lambda place: [entry.update(iscrowd=1) for entry in place.val["annotations"][6:12]],
        id=12,
        value="12.png",
    ),
    coco("image-tiny", lambda place: added(place, 14, width=31), id=14, value=[31, HEIGHT]),
    coco("image-aspect", lambda place: added(place, 14, width=401, height=50), id=14, value=[401, 50]),
    coco("image-missing", lambda place: place.path("val", 12).unlink(), FILE, id=12),
    coco("image-unreadable", save(b"no image"), FILE, id=12),
    coco("image-too-large", save(png_header(2**15, 2**15)), FILE, id=12),
    coco("image-corrupt", cut, FILE, id=12),
    image("image-size-mismatch", width=WIDTH + 1, value=f"{WIDTH}x{HEIGHT}")._replace(file=FILE),
    image("image-size-swapped", width=HEIGHT, height=WIDTH, value=f"{WIDTH}x{HEIGHT}")._replace(file=FILE),
    coco("image-size-swapped", turned_and_swapped, FILE, id=12, value=f"{WIDTH}x{HEIGHT}", name="turned"),
    coco("image-ends-early", lambda place: cut(place, last=-12), FILE, id=12),
    coco("image-rotated", turned, FILE, id=12, value=6),
    coco("image-converted", with_alpha, FILE, id=12, value="RGBA"),
    coco("image-duplicate", lambda place: copied(place, "val", 12), "val2017/19.png"),
    coco("file-not-listed", lambda place: place.new_image("val", 14), "val2017/14.png"),
    box("box-id-duplicate", _id=1, id=1),
    box("box-image-unknown", image_id=99),
    box("box-category-unknown", category_id=9),
    box("box-not-finite", bbox=[1, NAN, 3, 4])._replace(value=[1, "nan", 3, 4]),
    box("box-beyond", bbox=[1e300, 2, 3, 4]),
    box("box-negative", bbox=[1, 2, -3, 4]),
    box("box-zero-area", bbox=[1, 2, 0, 4]),
    box("box-outside", bbox=[WIDTH, 2, 3, 4]),
    box("area-invalid", area=-1)._replace(value=-1),
    box("area-invalid", area=NAN, name="area-nan"),
    box("crowd-invalid", iscrowd=2),
    box("box-partly-outside", bbox=[50, 2, 20, 8], area=100),
    box("box-tiny", bbox=[1, 1, 1.5, 8], area=9),
    box("box-aspect", bbox=[1, 1, 50, 2.25], area=90),
    box("box-fills-image", bbox=[0, 0, WIDTH, HEIGHT], area=100),
    coco("box-duplicate", lambda place: same_box(place, 2), id=3, value=[2, 3, 6, 9.5]),
    coco("box-two-classes", lambda place: same_box(place, 1), id=2, value=[2, 3, 6, 9.5]),
    box("area-misfit", area=10**4),
    coco("boxes-normalised", fractions),
    coco("boxes-corners", corners),
    coco(
        "category-id-duplicate", lambda place: place.val["categories"].append({"id": 2, "name": "x"}), id=2, value="x"
    ),
    coco("category-name-duplicate", lambda place: place.both({"id": 3, "name": "cat"}), "train2017.json", id=3),
    coco("category-name-similar", lambda place: place.both({"id": 3, "name": "Cat "}), "train2017.json", id=3),
    coco("category-name-blank", lambda place: place.both({"id": 3, "name": " "}), "train2017.json", id=3),
    coco("category-id-gap", lambda place: place.both({"id": 5, "name": "kite"}), "train2017.json"),
    coco("category-unused", lambda place: place.both({"id": 3, "name": "kite"}), "train2017.json", id=3, value="kite"),
    coco("category-rare", one_kite, "train2017.json", id=3, value="kite"),
    coco("class-imbalance", lambda place: one_kite(place, 100), "train2017.json"),
    coco("categories-differ", lambda place: place.val["categories"][1].update(name="kite")),
    coco("categories-differ", swapped_ids, name="swapped-ids"),
    coco("category-not-learned", kite_in_val, id=3, value="kite"),
    coco(
        "splits-identical",
        lambda place: place.yaml(val={"images": "train2017", "annotations": "annotations/instances_train2017.json"}),
        "train2017.json",
    ),
    coco("split-overlap", shared_folder, "all/1.png"),
    coco("split-leak", lambda place: copied(place, "train", 1), "val2017/19.png"),
    voc("voc-list-name", listed("../x"), "Main/val.txt", value="../x"),
    voc("voc-list-duplicate", listed("c"), "Main/val.txt", value="c"),
    voc("voc-xml-missing", lambda folder: (folder / "Annotations/c.xml").unlink(), "Annotations/c.xml"),
    voc("voc-xml-invalid", lambda folder: (folder / "Annotations/c.xml").write_text("<a"), "Annotations/c.xml"),
    voc("voc-xml-invalid", xml("<annotation>", "<!DOCTYPE a><annotation>"), "Annotations/c.xml", name="doctype"),
    voc("voc-difficult-invalid", xml("<difficult>0", "<difficult>2"), "Annotations/c.xml", id=1, value="2"),
    voc("voc-list-passed-over", listed("ghost", "test"), "Main/test.txt"),
    voc("voc-filename-differs", other_file_name, "Annotations/c.xml", value="other.jpg"),
    voc("voc-class-unknown", xml(">cat<", ">cta<"), "voc", value="cta"),
    voc("voc-zero-based", xml("<xmin>3<", "<xmin>0<"), "Annotations/c.xml", id=1, value=[-1, 3, 21, 22]),
    voc(
        "voc-xml-not-listed",
        lambda folder: (folder / "Annotations/e.xml").write_text(xml_text("e.jpg", [])),
        "Annotations/e.xml",
    ),
    voc("field-missing", xml("<name>cat</name>", ""), "c.xml", id=1, name="voc-no-name"),
    voc("field-missing", xml("<xmin>3</xmin>", ""), "c.xml", id=1, name="voc-no-corner"),
    voc("field-missing", without_box, "c.xml", id=1, name="voc-no-box"),
    voc("field-missing", xml("<filename>c.jpg</filename>", ""), "c.xml", name="voc-no-filename"),
    voc("path-escape", xml(">c.jpg", ">../c.jpg"), "c.xml", value="../c.jpg", name="voc-escape"),
    voc("file-name-invalid", xml(">c.jpg", ">x/c.jpg"), "c.xml", value="x/c.jpg", name="voc-folder"),
    voc("image-size-invalid", xml("<width>64</width>", "<width>?</width>"), "c.xml", value="?", name="voc-width"),
    voc(
        "image-size-mismatch", xml("<width>64<", "<width>63<"), "JPEGImages/c.jpg", id=3, value="64x48", name="voc-size"
    ),
    voc("field-wrong-type", xml("<xmin>3<", "<xmin>three<"), "c.xml", id=1, value="three", name="voc-word"),
    voc("box-not-finite", xml("<xmin>3<", "<xmin>nan<"), "c.xml", id=1, value="nan", name="voc-nan"),
    voc("box-beyond", xml("<xmax>20<", "<xmax>1e300<"), "c.xml", id=1, value="1e300", name="voc-beyond"),
    voc("box-negative", xml("<xmax>20<", "<xmax>2<"), "c.xml", id=1, value=[3, 4, 2, 25], name="voc-negative"),
    voc("box-zero-area", xml("<xmax>20<", "<xmax>3<"), "c.xml", id=1, value=[3, 4, 3, 25], name="voc-zero"),
    voc(
        "box-outside", xml("<xmin>3</xmin><ymin>4</ymin><xmax>20<", "<xmin>70</xmin><ymin>4</ymin><xmax>90<"), "c.xml"
    )._replace(id=1, value=[70, 4, 90, 25], name="voc-outside"),
]
