"""One split of a data set as packed flat arrays, memory-mapped from a cache file.

No Python object per image or box: two million images with thirty million boxes are twelve arrays, and every worker
process maps the same pages.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64, UInt8

MAGIC = b"anchorage table\n"
FORMAT = 2  # of the cache file; another number is rebuilt
ALIGNMENT = 64  # bytes; every array starts at a multiple of it
PREFIX = len(MAGIC) + 12  # magic, length of the header (8 bytes), CRC-32 of the header (4 bytes)


class Category(NamedTuple):
    """A class of objects as the annotation file numbers and names it."""

    id: int
    name: str


@runtime_checkable
class ImageReader(Protocol):
    """Where a table's pixels come from: a folder of files, or a program that draws them."""

    def read(self, table: "Table", index: int) -> UInt8[np.ndarray, "h w 3"]:
        """RGB bytes of image `index`, of exactly the size that the table states."""
        ...


@dataclass(frozen=True, eq=False)
class Table:
    """N images and their M boxes, ordered by image; P = N + 1. The arrays are read-only."""

    categories: tuple[Category, ...]  # by rising id; the label of a box is its position here
    image_ids: Int64[np.ndarray, " N"]
    heights: Int32[np.ndarray, " N"]
    widths: Int32[np.ndarray, " N"]
    name_offsets: Int64[np.ndarray, " P"]  # file name i is name_bytes[name_offsets[i] : name_offsets[i + 1]], UTF-8
    name_bytes: UInt8[np.ndarray, " L"]
    box_offsets: Int64[np.ndarray, " P"]  # boxes of image i are rows box_offsets[i] : box_offsets[i + 1]
    boxes_xywh: Float64[np.ndarray, "M 4"]  # as annotated: left, top, width, height in pixels
    labels: Int32[np.ndarray, " M"]  # 0..C-1
    crowd: Bool[np.ndarray, " M"]  # a region of many objects: never a target, ignored by the evaluator
    areas: Float64[np.ndarray, " M"]  # as annotated (COCO: of the mask), otherwise width * height
    annotation_ids: Int64[np.ndarray, " M"]
    difficult: Bool[np.ndarray, " M"]  # of VOC: a target, but neither missed nor wrong when it is evaluated
    images: ImageReader
    source: str  # the annotation file, for messages
    licence: str = ""  # what the annotation file says about rights
    notes: tuple[str, ...] = ()  # what was mended when the file was read
    digest: str = ""  # SHA-256 of the content
    protocol: Literal["coco", "voc"] = "coco"  # voc: evaluated by PASCAL VOC's rules too
    cache: Path | None = None  # the file that the arrays are mapped from

    def __len__(self) -> int:
        return len(self.image_ids)

    def name(self, index: int) -> str:
        """File name of an image, relative to the folder of its split."""
        return self.name_bytes[self.name_offsets[index] : self.name_offsets[index + 1]].tobytes().decode()

    def read_image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """RGB pixels of an image. UserError if the file is missing, damaged or not of the stated size."""
        return self.images.read(self, index)

    def box_slice(self, index: int) -> slice:
        """Rows of an image's boxes in the arrays of boxes."""
        return slice(int(self.box_offsets[index]), int(self.box_offsets[index + 1]))

    def __reduce__(self) -> tuple[Callable[..., "Table"], tuple[Any, ...]]:
        """A worker process maps the cache file itself instead of receiving a copy."""
        columns = None if self.cache else {name: getattr(self, name) for name in COLUMNS}
        rest = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in COLUMNS}
        return _rebuild, (columns, rest)


# dtype and trailing shape of every array, in the order of the cache file
COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "image_ids": ("<i8", ()),
    "heights": ("<i4", ()),
    "widths": ("<i4", ()),
    "name_offsets": ("<i8", ()),
    "name_bytes": ("|u1", ()),
    "box_offsets": ("<i8", ()),
    "boxes_xywh": ("<f8", (4,)),
    "labels": ("<i4", ()),
    "crowd": ("|b1", ()),
    "areas": ("<f8", ()),
    "annotation_ids": ("<i8", ()),
    "difficult": ("|b1", ()),
}


class NoImages:
    """Reader of a table that is only used for its annotations."""

    def read(self, table: Table, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Always fails."""
        raise ValueError(f"the table of {table.source} was opened without images")


def _rebuild(columns: dict[str, np.ndarray] | None, rest: dict[str, Any]) -> Table:
    if columns is None:
        mapped = _map_arrays(rest["cache"], verify=False)  # who sent this table has read all of it
        if mapped is None or mapped[0]["meta"]["digest"] != rest["digest"]:
            raise ValueError(f"the cache {rest['cache']} changed while it was in use")
        columns = mapped[1]
    return Table(**{**columns, **rest})


def pack_names(names: list[str]) -> tuple[Int64[np.ndarray, " P"], UInt8[np.ndarray, " L"]]:
    """File names as offsets and one array of UTF-8 bytes."""
    encoded = [name.encode() for name in names]
    lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return offsets, np.frombuffer(b"".join(encoded), dtype=np.uint8)


def table_digest(table: Table) -> str:
    """SHA-256 over categories and all arrays: equal content, equal digest; `difficult` counts where it is set."""
    state = hashlib.sha256(json.dumps(table.categories).encode())
    for name in COLUMNS:
        if name == "difficult" and not table.difficult.any():
            continue
        array = np.ascontiguousarray(getattr(table, name))
        state.update(f"{name} {array.shape}".encode())
        state.update(_bytes(array))
    return state.hexdigest()


def cache_folder() -> Path:
    """Where packed tables are kept: ANCHORAGE_CACHE, else anchorage/ in XDG_CACHE_HOME, else ~/.cache/anchorage."""
    if own := os.environ.get("ANCHORAGE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anchorage"


def cached_table(
    identity: str, key: dict[str, Any], build: Callable[[], Table], images: ImageReader, folder: Path | None = None
) -> Table:
    """The table of a source from its cache file, or built and then cached.

    Args:
        identity: what the source is (an annotation file's path); names the cache file.
        key: everything that makes a cached table stale when it changes (size, time of change ...), plain values.
        build: makes the table when no cache file with this key is sound.
        images: reader of the pixels, not cached.
        folder: of the cache file; default `cache_folder()`.

    A cache that cannot be written costs one warning line; the table then lives in this process's memory.
    """
    folder = folder or cache_folder()
    path = folder / f"{hashlib.sha256(identity.encode(errors='surrogateescape')).hexdigest()[:32]}.table"
    table = read_table(path, key, images)
    if table is not None:
        return table
    with _only_one_builds(path):
        table = read_table(path, key, images)
        if table is not None:
            return table
        table = dataclasses.replace(build(), images=images)
        table = dataclasses.replace(table, digest=table_digest(table))
        try:
            write_table(path, table, key)
        except OSError as error:
            warn(f"cannot write the annotation cache in {folder} ({error.strerror}); it is parsed again next time")
            return table
        return read_table(path, key, images) or table


def warn(message: str) -> None:
    """One line on stderr, from the first process of a distributed run only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr)


@contextlib.contextmanager
def _only_one_builds(path: Path) -> Iterator[None]:
    """Lets the ranks of a run wait for the first to write; where locks do not work, each writes its own by rename."""
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError, ImportError):
        import fcntl  # not on every platform

        path.parent.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context(path.with_suffix(".lock").open("ab"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        stack = stack.pop_all()
    try:
        yield
    finally:
        stack.close()


def write_table(path: Path, table: Table, key: dict[str, Any]) -> None:
    """Writes the cache file under a temporary name and renames it. OSError leaves nothing behind."""
    arrays = {name: np.ascontiguousarray(getattr(table, name), dtype=kind) for name, (kind, _) in COLUMNS.items()}
    layout, position, crc = {}, 0, 0
    for name, array in arrays.items():
        layout[name] = [position, len(array)]
        crc = zlib.crc32(_bytes(array), crc)
        crc = zlib.crc32(bytes(-array.nbytes % ALIGNMENT), crc)
        position += array.nbytes + -array.nbytes % ALIGNMENT
    meta = {"source": table.source, "licence": table.licence, "notes": table.notes, "digest": table.digest}
    meta["protocol"] = table.protocol
    content = {"format": FORMAT, "key": key, "meta": meta, "categories": table.categories}
    header = json.dumps(content | {"layout": layout, "bytes": position, "crc": crc}).encode()
    header += b" " * (-(PREFIX + len(header)) % ALIGNMENT)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(MAGIC + len(header).to_bytes(8, "little") + zlib.crc32(header).to_bytes(4, "little") + header)
            for array in arrays.values():
                file.write(_bytes(array))
                file.write(bytes(-array.nbytes % ALIGNMENT))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_table(path: Path, key: dict[str, Any], images: ImageReader) -> Table | None:
    """The table of a cache file, or None if the file is missing, damaged, foreign or of another key."""
    mapped = _map_arrays(path)
    if mapped is None or mapped[0]["key"] != json.loads(json.dumps(key)):
        return None
    header, columns = mapped
    rest = header["meta"] | {"images": images, "cache": path}
    rest["notes"] = tuple(rest["notes"])
    rest["categories"] = tuple(Category(*pair) for pair in header["categories"])
    return Table(**{**columns, **rest})


def _map_arrays(path: Path, verify: bool = True) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Header and read-only arrays of a cache file, or None unless header, size and, to `verify`, check sum agree."""
    try:
        raw = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    except (OSError, ValueError):  # ValueError: an empty file cannot be mapped
        return None
    length = int.from_bytes(raw[len(MAGIC) : len(MAGIC) + 8].tobytes(), "little")
    if raw[: len(MAGIC)].tobytes() != MAGIC or PREFIX + length > len(raw):
        return None
    text = raw[PREFIX : PREFIX + length].tobytes()
    if zlib.crc32(text) != int.from_bytes(raw[PREFIX - 4 : PREFIX].tobytes(), "little"):
        return None
    header = json.loads(text)  # our own bytes: the check sum agrees
    data = raw[PREFIX + length :]
    if header["format"] != FORMAT or len(data) != header["bytes"]:
        return None
    if verify and zlib.crc32(_bytes(data)) != header["crc"]:
        return None
    columns = {}
    for name, (kind, shape) in COLUMNS.items():
        position, count = header["layout"][name]
        end = position + count * int(np.prod(shape)) * np.dtype(kind).itemsize
        columns[name] = data[position:end].view(kind).reshape(count, *shape)
    return header, columns


def _bytes(array: np.ndarray) -> memoryview | bytes:
    """The memory of a contiguous array; numpy exports none for an array without elements."""
    return array.reshape(-1).view(np.uint8).data if array.size else b""
