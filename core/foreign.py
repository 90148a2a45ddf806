"""Files of other projects, read without running anything that they hold.

A pickle names classes and functions, and opening it calls them. Here only tensors (or, for Caffe2's weights, arrays)
are made; every other class or function that a file names becomes a `Placeholder`. `torch.load(weights_only=True)` is as
safe, but refuses the whole file where it meets a class that it does not know, and older checkpoints hold many beside
their weights: configurations, optimisers, NumPy numbers.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError

ZIP_START = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first object of what torch.save wrote before release 1.6
STORAGE_TYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote, of any release: containers, plain values and tensors, the rest as placeholders.

    Raises:
        UserError: missing, damaged, or no such file.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(len(ZIP_START)) == ZIP_START
            file.seek(0)
            return _read_zip(file) if zipped else _read_legacy(file, path.stat().st_size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception:  # damaged bytes make the readers fail in many ways
        raise UserError(f"{path}: not a PyTorch file, or a damaged one; nothing in it was run") from None


def read_caffe2(path: Path) -> dict[str, Tensor]:
    """The blobs of one of Detectron's pickles as tensors by their names.

    Raises:
        UserError: missing, damaged, or holding anything but arrays.
    """
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
        blobs = content.get("blobs", content)
        return {str(name): torch.from_numpy(np.array(value)) for name, value in blobs.items()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception:
        raise UserError(f"{path}: not a pickle of named arrays, or a damaged one; nothing in it was run") from None


class Placeholder(dict[Any, Any]):
    """Stands for an object, a class's instance or a function's result, that is not needed and was not made.

    Whatever a pickle does to such an object it may do to this one; entries set like a dictionary's are kept.
    """

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__()

    def __call__(self, *arguments: object, **options: object) -> "Placeholder":
        """A result, where the object was to be called."""
        return self

    def __setstate__(self, state: object) -> None:
        """Forget the state."""

    def append(self, item: object) -> None:
        """Forget an item of a list."""

    add = extend = append

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


def _rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: object) -> Tensor:
    """A tensor that lies in a storage; torch refuses one that would reach beyond it."""
    return storage.as_strided(size, stride, offset)


def _first(value: Tensor, *rest: object) -> Tensor:
    """A parameter as the tensor it holds."""
    return value


MADE: dict[str, Any] = {  # what a PyTorch file may name; everything else becomes a placeholder
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_parameter": _first,
    **{f"torch.{name}Storage": dtype for name, dtype in STORAGE_TYPES.items()},
    **{f"torch.cuda.{name}Storage": dtype for name, dtype in STORAGE_TYPES.items()},
}


class _TensorUnpickler(pickle.Unpickler):
    """Makes tensors and placeholders; `storage` finds the flat tensor behind a reference to one."""

    def __init__(self, file: io.BufferedIOBase, storage: Callable[..., Tensor]) -> None:
        super().__init__(file, encoding="latin1")
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a class or function of that name."""
        return MADE.get(f"{module}.{name}", Placeholder)

    def persistent_load(self, reference: Any) -> Any:
        """("storage", type, key, device, numel, ...) as a flat tensor; other references (to source code) as nothing."""
        kind, *details = reference
        if kind != "storage":
            return Placeholder()
        dtype, key, _, numel = details[:4]
        return self.storage(dtype, str(key), numel)


def _no_storage(dtype: torch.dtype, key: str, numel: int) -> NoReturn:
    raise ValueError("a storage where there is none")


def _read_zip(file: io.BufferedIOBase) -> Any:
    """torch.save's format since release 1.6: <folder>/data.pkl, and each storage's bytes in <folder>/data/<key>."""
    storages: dict[str, Tensor] = {}
    with zipfile.ZipFile(file) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        folder = name.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("written on a machine of another byte order")

        def storage(dtype: torch.dtype, key: str, numel: int) -> Tensor:
            if key not in storages:
                data = bytearray(archive.read(f"{folder}data/{key}"))
                storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            return storages[key]

        return _TensorUnpickler(io.BytesIO(archive.read(name)), storage).load()


def _read_legacy(file: io.BufferedReader, size: int) -> Any:
    """torch.save's format before release 1.6: five pickles, then the number of items and bytes of each storage."""
    storages: dict[str, Tensor] = {}

    def storage(dtype: torch.dtype, key: str, numel: int) -> Tensor:
        if numel * dtype.itemsize > size:
            raise ValueError("a storage larger than the file")
        if key not in storages:
            storages[key] = torch.empty(numel, dtype=dtype)
        return storages[key]

    if _TensorUnpickler(file, _no_storage).load() != LEGACY_MAGIC:
        raise ValueError("no such file")
    _, system = (_TensorUnpickler(file, _no_storage).load() for _ in range(2))
    if not system["little_endian"]:
        raise ValueError("written on a machine of another byte order")
    content = _TensorUnpickler(file, storage).load()
    for key in _TensorUnpickler(file, _no_storage).load():
        target = storages[str(key)].view(torch.uint8).numpy()
        numel = int.from_bytes(file.read(8), "little")
        if numel != len(storages[str(key)]) or file.readinto(target.data) != len(target):
            raise ValueError("a storage is cut")
    return content


_RECONSTRUCT = np.zeros(1).__reduce__()[0]  # NumPy's own maker of empty arrays, wherever this release keeps it
ARRAYS: dict[str, Any] = {  # what a pickle of arrays may name; everything else becomes a placeholder
    "numpy.core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy._core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),
    "collections.OrderedDict": OrderedDict,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Makes arrays and placeholders."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a class or function of that name."""
        return ARRAYS.get(f"{module}.{name}", Placeholder)
