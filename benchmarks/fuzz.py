"""Hostile data sets: what reading fuzzed annotation files and malformed images does.

    python -m benchmarks.fuzz                                              # all, about two minutes
    python -m benchmarks.fuzz --out benchmarks/results/fuzz.json           # kept for the README's table
    python -m benchmarks.fuzz --seed 1 --share 0.1                         # other files, a tenth as many

A file may be read or refused. A fault is anything but one printable line that names the file and the field; and, seen
by an audit hook, a file opened outside the data folder, the cache and Python's own, a program started or a connection
made. Structure-aware changes keep the file's form and spoil a field; the others change bytes.
"""

import argparse
import copy
import faulthandler
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import numpy as np
import torch
from PIL import Image

from core import cli
from core.configfile import read_yaml
from core.data.images import read_image
from core.data.loader import read_sample
from core.data.sampler import training_sampler
from core.data.sources import open_data
from core.errors import UserError
from core.geometry import GEOMETRIES
from core.runlog import environment, write_json
from paa.config import Config

ROOT = Path(__file__).parents[1]
LONGEST = 400  # characters of a message beside the path
DEEP = "<deep>"  # stands for lists in lists, which `json.dumps` cannot write
NESTED = "[" * 50_000 + "]" * 50_000
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 2**31, 2**63, -(2**64), 10**400, 0.5, -0.5, 1e308, -1e308, 5e-324),
    *(float("nan"), float("inf"), -float("inf"), "", "x", "0", " ", "a\0b", "\ud800", "\x1b[31m\n", "x" * 5000),
    *("/etc/passwd", "../../../etc/passwd", "a/../../b", "~root/x", "C:\\x", "file:///etc/passwd", "."),
    *([], {}, [[]], [None] * 4, [1, 2, 3], [1, 2, 3, 4, 5], {"id": 1}, DEEP),
)
# A spoilt field may show in another: a wrong id as an unknown one, a wrong size as a box outside or at the image.
SHOWS_AS = {
    "height": ("height", "bbox", "pixels"),
    "width": ("width", "bbox", "pixels"),
    "file_name": ("file_name", "image file", "cannot be read", "pixels", "not an image"),
    "bbox": ("bbox", "wider and higher"),
}
TOUCHING = {"open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.mkdir"}  # events that begin with a path
STARTING = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "socket.getaddrinfo"}


class Case(NamedTuple):
    """A spoilt file in its place, and how to read it."""

    what: str  # done to it
    names: tuple[Path, ...]  # a message must name one of them
    words: tuple[str, ...]  # and have one of these, if there are any
    read: Callable[[], None]


@dataclass
class Tally:
    """What became of the cases of one kind."""

    files: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    faults: list[str] = field(default_factory=list)


class Watch:
    """Notes, while it is active, what an audit hook sees beyond the allowed folders."""

    def __init__(self, *allowed: Path) -> None:
        own = (sys.prefix, sys.base_prefix, *sys.path, str(ROOT))  # Python's own
        self.allowed = tuple(os.path.realpath(place) for place in (*own, *map(str, allowed)) if place)
        self.seen: list[str] = []
        self.active = False
        sys.addaudithook(self._hook)

    def __enter__(self) -> "Watch":
        self.seen, self.active = [], True
        return self

    def __exit__(self, *error: object) -> None:
        self.active = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in STARTING:
            self.seen.append(f"{event} {arguments[0]!r}")
        elif event in TOUCHING and isinstance(arguments[0], (str, bytes, os.PathLike)):
            place = os.path.realpath(os.fsdecode(arguments[0]))
            if not any(place == root or place.startswith(root + os.sep) for root in self.allowed):
                self.seen.append(f"{event} {place}")


def read_data(spec: Path) -> None:
    """Opens a data set and reads all its images, as training does. UserError as there."""
    data = open_data(str(spec))
    for table in data.tables.values():
        training_sampler(table, Config()).batch(1)
        for row in range(len(table)):
            read_sample(table, row, GEOMETRIES["modern"])


def run_case(case: Case, watch: Watch, tally: Tally) -> None:
    """Reads a case and adds to the tally what became of it."""
    flaws: list[str] = []
    tally.files += 1
    start = time.perf_counter()
    with watch:
        try:
            case.read()
        except UserError as error:
            tally.refused += 1
            flaws += message_flaws(str(error), case)
        except Exception as error:
            flaws.append(f"{type(error).__name__}: {str(error)[:200]}")
    tally.slowest_s = max(tally.slowest_s, time.perf_counter() - start)
    tally.faults += [f"{case.what}: {flaw}" for flaw in (*flaws, *watch.seen)]


def message_flaws(message: str, case: Case) -> list[str]:
    """What is wrong with a message."""
    flaws = []
    if not message.isprintable():
        flaws.append(f"not one printable line: {message[:200]!r}")
    if not any(str(name) in message for name in case.names):
        flaws.append(f"names no file: {message[:200]!r}")
    if case.words and not any(word in message for word in case.words):
        flaws.append(f"names none of {', '.join(case.words)}: {message[:300]!r}")
    if len(message) > LONGEST + len(str(case.names[0])):
        flaws.append(f"{len(message)} characters: {message[:100]!r}")
    return flaws


def picture(height: int = 48, width: int = 64) -> Image.Image:
    """Slopes, an edge and a little noise."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 30, (height, width, 3))
    slopes = np.stack([x * 200 // width, y * 200 // height, (x + y > height) * 200], axis=2)
    return Image.fromarray((slopes + noise).astype(np.uint8))


def sound_coco() -> dict[str, Any]:
    """Three images, five boxes, two classes."""
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 48, "width": 64, "license": 1} for i in (1, 5, 9)]
    boxes = [
        {"id": n, "image_id": i, "category_id": c, "bbox": [n, 2.5, 10, 12], "area": 120.0, "iscrowd": 0}
        for n, (i, c) in enumerate(((1, 3), (1, 7), (5, 3), (5, 7), (9, 3)), start=1)
    ]
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "kite"}]
    licences = [{"id": 1, "name": "CC BY 4.0"}]
    return {"info": {}, "licenses": licences, "images": images, "annotations": boxes, "categories": categories}


def json_text(content: Any) -> bytes:
    """JSON with all that `json.dumps` allows, and lists in lists where `DEEP` stands."""
    return json.dumps(content).replace(f'"{DEEP}"', NESTED).encode()


def spoil_json(rng: random.Random) -> tuple[bytes, str, tuple[str, ...]]:
    """A COCO file with one field, entry or list spoilt; what was done, and words that a message may have."""
    content = sound_coco()
    part = rng.choice(("images", "annotations", "annotations", "categories"))
    entries = content[part]
    row, value = rng.randrange(len(entries)), copy.deepcopy(rng.choice(VALUES))
    name = rng.choice([key for key in entries[row] if key != "license"])
    where = f"{part}[{row}].{name}"
    words = SHOWS_AS.get(name, (name,))
    way = rng.choice(("set", "set", "set", "delete", "coordinate", "repeat", "entry", "top", "drop", "unknown"))
    if way == "set":
        entries[row][name] = value
    elif way == "delete":
        del entries[row][name]
    elif way == "coordinate":
        where, words = "annotations[1].bbox", SHOWS_AS["bbox"]
        content["annotations"][1]["bbox"][rng.randrange(4)] = value
    elif way == "repeat":
        where, words = f"{part}[{row}] twice", ("id",)
        entries.insert(rng.randrange(len(entries)), copy.deepcopy(entries[row]))
    elif way == "entry":
        where, words = f"{part}[{row}]", (part[:4],)
        entries[row] = value
    elif way == "top":
        where, words = part, (part[:4], "id", "no COCO", "wider and higher")
        content[part] = value
    elif way == "drop":
        where, words = part, (part,)
        del content[part]
    else:
        where, words = f"{part}[{row}].unknown", ("no valid JSON",)
        entries[row]["unknown"] = value
    if value in (DEEP, "\ud800"):  # no JSON: there is a place, but no entry
        words = (*words, "no valid JSON")
    return json_text(content), f"{way} {where} = {repr(value)[:40]}", words


def spoil_bytes(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Bytes with one to eight random changes, and what was done last."""
    data = bytearray(content)
    what = ""
    for _ in range(rng.choice((1, 1, 2, 8))):
        place, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 8, 64))
        what = rng.choice(("flip", "cut", "insert", "copy", "zero", "end", "token"))
        if what == "flip" and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif what == "cut":
            del data[place : place + length]
        elif what == "insert":
            data[place:place] = rng.randbytes(length)
        elif what == "copy":
            data[place:place] = data[place : place + 8 * length]
        elif what == "zero":
            data[place : place + length] = bytes(length)
        elif what == "end":
            del data[max(place, 1) :]
        else:
            data[place:place] = rng.choice(
                (b"}, {", b"]]", b'"', b"\xff\xd9", b"NaN", b"&a;", b"\\u0000", b"\xed\xa0\x80")
            )
    return bytes(data), what


def coco_folder(folder: Path) -> Path:
    """A sound COCO folder; its annotation file."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "train").mkdir()
    for entry in sound_coco()["images"]:
        picture().save(folder / "train" / entry["file_name"])
    return folder / "annotations" / "instances_train.json"


def coco_cases(folder: Path, rng: random.Random, count: int) -> Iterator[Case]:
    """Fuzzed COCO files, in halves by structure and by bytes."""
    file = coco_folder(folder)
    names = (file, folder / "train")
    for index in range(count):
        if index % 2:
            text, what, words = spoil_json(rng)
        else:
            text, what = spoil_bytes(rng, json_text(sound_coco()))
            words = ()
        file.write_bytes(text)
        yield Case(what, names, words, partial(read_data, folder))


VOC_TEXT = """<annotation>
  <filename>{name}.jpg</filename>
  <source><image>flickr</image></source>
  <size><width>64</width><height>48</height><depth>3</depth></size>
  <object><name>cat</name><difficult>0</difficult>
    <bndbox><xmin>3</xmin><ymin>4</ymin><xmax>20</xmax><ymax>30</ymax></bndbox></object>
  <object><name>dog</name><difficult>1</difficult>
    <bndbox><xmin>1</xmin><ymin>1</ymin><xmax>64</xmax><ymax>48</ymax></bndbox></object>
</annotation>
"""
VOC_SHOWS_AS = {
    "width": ("width", "size", "pixels", "outside"),
    "height": ("height", "size", "pixels", "outside"),
    "filename": ("filename", "image file", "cannot be read", "not an image"),
    **{corner: (corner, "bndbox", "wider and higher") for corner in ("xmin", "ymin", "xmax", "ymax")},
    **{
        name: (name, "object", "lacks", "annotation", "wider and higher") for name in ("bndbox", "object", "annotation")
    },
    "source": (),
    "image": (),
    "depth": (),
}
DECLARED = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "{}"><!ENTITY c SYSTEM "file:///etc/passwd">]>'


def spoil_xml(rng: random.Random) -> tuple[bytes, str, tuple[str, ...]]:
    """A VOC file with one element spoilt; what was done, and words that a message may have."""
    text = VOC_TEXT.format(name="000001")
    tags = sorted(set(re.findall(r"<(\w+)>", text)))
    tag = rng.choice(tags)
    words = VOC_SHOWS_AS.get(tag, (tag,))
    way = rng.choice(("set", "set", "set", "delete", "repeat", "declare", "deep", "rename"))
    element = rng.choice(re.findall(rf"<{tag}>.*?</{tag}>", text, flags=re.DOTALL))
    value = (
        str(rng.choice(VALUES)) if rng.random() < 0.8 else rng.choice(("&c;", "&#0;", "<x/>", "<![CDATA[1]]>", "NaN"))
    )
    if way == "set":
        shown = value if value[:1] in "&<" and value else escape(value)
        text = text.replace(element, f"<{tag}>{shown}</{tag}>", 1)
        words = (*words, "XML", "UTF-8") if words else ()
    elif way == "delete":
        text, words = text.replace(element, "", 1), (*words, "XML") if words else ()
    elif way == "repeat":
        text, words = text.replace(element, element * 3, 1), ()
    elif way == "declare":
        text, words = DECLARED.format("x" * 100) + text, ("DOCTYPE",)
    elif way == "deep":
        text, words = text.replace(element, "<a>" * 50_000 + "</a>" * 50_000, 1), (*words, "XML")
    else:
        text = text.replace(element, element.replace(tag, "other"), 1)
    return text.encode("utf-8", "surrogatepass"), f"{way} {tag} = {value[:40]!r}", words


def voc_cases(folder: Path, rng: random.Random, count: int) -> Iterator[Case]:
    """Fuzzed XML files and lists of a VOC folder."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    listing = folder / "ImageSets" / "Main" / "train.txt"
    for number in (1, 2):
        picture().save(folder / "JPEGImages" / f"00000{number}.jpg")
        (folder / "Annotations" / f"00000{number}.xml").write_text(VOC_TEXT.format(name=f"00000{number}"))
    file = folder / "Annotations" / "000001.xml"
    sound, names = file.read_bytes(), (folder,)
    for index in range(count):
        listing.write_text("000001\n000002\n")
        file.write_bytes(sound)
        if index % 7 == 6:
            line = str(rng.choice(VALUES)).encode("utf-8", "surrogatepass")
            text, what = (
                (b"000001\n" + line + b"\n", "list") if rng.random() < 0.5 else spoil_bytes(rng, b"000001\n000002\n")
            )
            listing.write_bytes(text)
            yield Case(f"{what} {text[:40]!r}", names, (), partial(read_data, folder))
        elif index % 2:
            text, what, words = spoil_xml(rng)
            file.write_bytes(text)
            yield Case(what, names, words, partial(read_data, folder))
        else:
            text, what = spoil_bytes(rng, sound)
            file.write_bytes(text)
            yield Case(what, names, (), partial(read_data, folder))


YAML_VALUES = (
    *("", "~", "[", "{a: b", "[" * 20_000, "{a: " * 5_000, "&a [*a, *a]", "*a"),
    *("!!python/object/apply:os.system ['true']", "!!python/name:os.system"),
    *("0x" + "f" * 20_000, "1" * 20_000, "1" + ":59" * 5_000, ".nan", ".inf", "-.inf"),
    *("1e999", "2001-99-99", "'\\0'", '"\\0"'),
    *('"\\ud800"', "\ufeff", "\x85", "\x1b[31m", "? [a, b]\n: c", "<<: 1", "x" * 20_000),
    *("/etc", "/dev/zero", "../..", "~root"),
    *("[1, 2]", "{images: 3}", "!!binary abc", "!!set {a}", "yes", "1_000", "0o7", "|\n  a\n  b", "- a", "a: b"),
)  # fmt: skip


def yaml_cases(folder: Path, rng: random.Random, count: int) -> Iterator[Case]:
    """Fuzzed dataset files and configurations."""
    annotations = coco_folder(folder / "data")
    annotations.write_bytes(json_text(sound_coco()))
    dataset = b"train:\n  images: data/train\n  annotations: data/annotations/instances_train.json\n"
    config = b"steps: 10\nlearning_rate: 0.01\nbackbone: resnet18\nmilestones: [0.5, 0.75]\ncompile: false\n"
    for index in range(count):
        sound, file = (dataset, folder / "data.yaml") if index % 2 else (config, folder / "config.yaml")
        if index % 4 < 2:
            lines = sound.decode().splitlines()
            row, value = rng.randrange(len(lines)), rng.choice(YAML_VALUES)
            key = lines[row].split(":")[0]
            lines[row] = rng.choice((f"{key}: {value}", f"{key}: {value}", value, f"{lines[row]}\n{lines[row]}"))
            text, what = "\n".join(lines).encode("utf-8", "surrogatepass"), f"{key}: {value[:40]!r}"
        else:
            text, what = spoil_bytes(rng, sound)
        file.write_bytes(text)
        read = partial(read_data, file) if index % 2 else partial(read_config, file)
        yield Case(what, (file, folder), (), read)


def read_config(path: Path) -> None:
    """A configuration as `--config` reads it."""
    read_yaml(path, Config)


def special_cases(folder: Path) -> Iterator[Case]:
    """Things that are no plain file where an annotation file, an image, a list or a YAML is expected."""
    file = coco_folder(folder / "coco")
    image = folder / "coco" / "train" / "5.jpg"
    yaml = folder / "data.yaml"
    target = folder / "coco"
    for place, spec in ((file, target), (image, target), (yaml, yaml)):
        for what, make in (
            ("a pipe", os.mkfifo),
            ("a link to a device without end", lambda path: path.symlink_to("/dev/zero")),
            ("a link to itself", lambda path: path.symlink_to(path)),
            ("a link to nothing", lambda path: path.symlink_to("nowhere")),
            ("a folder", Path.mkdir),
            ("nothing in it", Path.touch),
        ):
            file.write_bytes(json_text(sound_coco()))
            remove(place)
            make(place)
            yield Case(f"{place.name} is {what}", (place, target), (), partial(read_data, spec))
            remove(place)
            if place == image:
                picture().save(image)


def remove(path: Path) -> None:
    """Whatever is there, if anything is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sound_images() -> dict[str, bytes]:
    """A picture in every format and mode that is read."""
    rgb = picture()
    grey16 = Image.fromarray(np.asarray(rgb)[..., 0].astype(np.uint16) * 256)
    kinds: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "jpeg": (rgb, "JPEG", {}),
        "progressive": (rgb, "JPEG", {"progressive": True}),
        "restarts": (rgb, "JPEG", {"restart_marker_rows": 1}),
        "cmyk": (rgb.convert("CMYK"), "JPEG", {}),
        "png": (rgb, "PNG", {}),
        "palette": (rgb.convert("P"), "PNG", {}),
        "16 bits": (grey16, "PNG", {}),
        "alpha": (rgb.convert("RGBA"), "WEBP", {}),
        "gif": (rgb.convert("P"), "GIF", {}),
        "bmp": (rgb, "BMP", {}),
        "tiff": (rgb, "TIFF", {"compression": "tiff_lzw"}),
        "ppm": (rgb, "PPM", {}),
        "jpeg 2000": (rgb, "JPEG2000", {}),
    }
    files = {}
    for name, (image, form, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        files[name] = buffer.getvalue()
    return files


def image_cases(folder: Path, rng: random.Random, count: int) -> Iterator[Case]:
    """Malformed image files in a sound data set."""
    annotations = coco_folder(folder)
    annotations.write_bytes(json_text(sound_coco()))
    file = folder / "train" / "5.jpg"
    sound = sound_images()
    for index in range(count):
        kind = list(sound)[index % len(sound)]
        data, what = spoil_bytes(rng, sound[kind])
        if index % 5 == 0:  # where sizes stand
            place, wide = rng.randrange(min(200, len(data))), rng.choice((2, 4))
            data, what = data[:place] + rng.choice((b"\xff", b"\0", b"\x7f")) * wide + data[place + wide :], "header"
        file.write_bytes(data)
        yield Case(f"{kind} {what}", (file,), (), partial(read_data, folder))


def noticed_flips(kind: str, rng: random.Random, count: int) -> dict[str, int]:
    """How many single changed bits of an image's second half the strict reader and Pillow notice."""
    content = sound_images()[kind]
    noticed = {"flips": count, "ours": 0, "pillow": 0}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "image")
        for _ in range(count):
            data = bytearray(content)
            data[rng.randrange(len(data) // 2, len(data) - 2)] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            try:
                read_image(path)
            except UserError:
                noticed["ours"] += 1
            try:
                with Image.open(path) as image:
                    image.load()
            except Exception:
                noticed["pillow"] += 1
    return noticed


KINDS: dict[str, tuple[Callable[[Path, random.Random, int], Iterable[Case]], int]] = {
    "COCO annotation files": (coco_cases, 1300),
    "VOC annotation files and lists": (voc_cases, 700),
    "dataset and configuration YAML": (yaml_cases, 400),
    "malformed images": (image_cases, 200),
    "pipes, devices, links, folders": (lambda folder, rng, count: special_cases(folder), 18),
}


def measure(seed: int, share: float) -> dict[str, Tally]:
    """Reads every kind of case.

    Args:
        seed: of the changes.
        share: of the full number of cases.
    """
    tallies = {}
    with tempfile.TemporaryDirectory() as place:
        before = os.environ.get("ANCHORAGE_CACHE")
        os.environ["ANCHORAGE_CACHE"] = f"{place}/cache"
        watch = Watch(Path(place))
        try:
            for number, (kind, (cases, count)) in enumerate(KINDS.items()):
                tallies[kind] = Tally()
                rng = random.Random(f"{seed} {kind}")
                for case in cases(Path(place, f"data{number}"), rng, max(1, round(count * share))):
                    run_case(case, watch, tallies[kind])
                shutil.rmtree(f"{place}/cache", ignore_errors=True)
        finally:
            del os.environ["ANCHORAGE_CACHE"]
            if before is not None:
                os.environ["ANCHORAGE_CACHE"] = before
    return tallies


def main() -> None:
    """The command."""
    parser = cli.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the changes [0]")
    parser.add_argument("--share", type=float, default=1.0, metavar="X", help="of the full number of files [1]")
    parser.add_argument("--out", type=Path, help="JSON file for the counts and where they come from")
    options = parser.parse_args()
    faulthandler.dump_traceback_later(1200, exit=True)  # a file that hangs the reader
    tallies = measure(options.seed, options.share)
    for kind, tally in tallies.items():
        read = tally.files - tally.refused
        print(f"{kind}: {tally.files} files, {tally.refused} refused, {read} read, {len(tally.faults)} faults")
        for fault, times in Counter(tally.faults).most_common(20):
            print(f"    {times} x {fault}")
    rng = random.Random(options.seed)
    flips = {
        kind: noticed_flips(kind, rng, max(1, round(1000 * options.share))) for kind in ("jpeg", "progressive", "png")
    }
    print(f"changed bits noticed: {flips}")
    faulthandler.cancel_dump_traceback_later()
    if options.out:
        facts = environment(torch.device("cpu"), 1, {}) | {"seeds": [options.seed]}
        facts["licence_note"] = "Data: generated in the benchmarks, no licence."
        kinds = {kind: vars(tally) for kind, tally in tallies.items()}
        write_json(options.out, facts | {"kinds": kinds, "noticed_flips": flips})
    if any(tally.faults for tally in tallies.values()):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
