"""Checkpoints: tensors and plain values in a file that is whole or refused.

A file is what `torch.save` writes, followed by a mark and the SHA-256 of everything before it. `torch.load(path,
weights_only=True)` reads it too. Nothing in it can run code, and a flipped, missing or added byte is found.
"""

import errno
import hashlib
import io
import os
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core import released
from core.errors import UserError
from core.files import replace_file

FORMAT = 1  # raised when older code could not read newer files
MARK = b"\nanchorage sha256 "
TRAILER_BYTES = len(MARK) + hashlib.sha256().digest_size
LAST, PREVIOUS = "last.pt", "previous.pt"


class CorruptCheckpoint(UserError):
    """The bytes of a checkpoint are not the ones that were written."""


def save(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint; at every moment the path holds the old file or the new one, both whole.

    Raises:
        ValueError: for a value that is neither a tensor nor plain (None, bool, int, float, str, list, tuple, dict).
        UserError: when the disk is full or the folder cannot be written; the old file stays as it was.
    """
    path = Path(path)
    replace_file(path, _to_bytes(content))


def save_rotating(folder: str | Path, content: Mapping[str, Any]) -> None:
    """Write `last.pt` and keep the one before as `previous.pt`; at every moment one of them can be loaded.

    A damaged `last.pt` does not replace a whole `previous.pt`. Raises as `save`.
    """
    last, previous = Path(folder, LAST), Path(folder, PREVIOUS)
    replace_file(last, _to_bytes(content), keep_as=previous if is_whole(last) else None)


def load(path: str | Path, *, method: str | None = None) -> dict[str, Any]:
    """Read a checkpoint or a released model onto the CPU.

    Args:
        path: file written by `save`, or a .safetensors file written by `core.released.save`.
        method: package whose checkpoint it must be; None accepts any.

    Raises:
        CorruptCheckpoint: when its checksum does not fit.
        UserError: when it is missing, not ours, a pickle that would run code, too new, or another method's.
    """
    content = released.load(path) if Path(path).suffix == released.SUFFIX else _load_pt(path)
    version = content.pop("format", None) if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise UserError(f"{path}: not a checkpoint of this project")
    if version > FORMAT:
        raise UserError(f"{path}: checkpoint format {version} is newer than {FORMAT}; update this package")
    if method is not None and content.get("method") != method:
        raise UserError(f"{path}: checkpoint of method {content.get('method')!r}, this command needs {method!r}")
    return content


def _load_pt(path: str | Path) -> Any:
    data = _read(Path(path))
    if data[-TRAILER_BYTES:-32] != MARK:
        raise _explain_foreign(path, data)
    if hashlib.sha256(data[:-TRAILER_BYTES]).digest() != data[-32:]:
        raise CorruptCheckpoint(f"{path}: checkpoint is damaged, its checksum does not fit")
    return _unpickle(path, data)


def load_latest(folder: str | Path, *, method: str | None = None) -> dict[str, Any] | None:
    """The newest whole checkpoint of a run folder, or None where there is none.

    Falls back to `previous.pt`, with a line on stderr, when `last.pt` is damaged or missing.

    Raises:
        UserError: when there are checkpoints and none can be loaded, or it is another method's.
    """
    last, previous = Path(folder, LAST), Path(folder, PREVIOUS)
    if not last.exists() and not previous.exists():
        return None
    try:
        if last.exists():
            return load(last, method=method)
        problem = f"{last}: missing"
    except CorruptCheckpoint as error:
        if not previous.exists():
            raise
        problem = str(error)
    print(f"warning: {problem}; going on from {previous}", file=sys.stderr)
    try:
        return load(previous, method=method)
    except CorruptCheckpoint as error:
        hint = "choose another --out, with --weights best.pt to start from the best model"
        raise CorruptCheckpoint(f"{problem}; {error}; {hint}") from None


def load_weights(model: nn.Module, content: Mapping[str, Any], path: str | Path) -> None:
    """Put a checkpoint's `model` into a model of the same layout.

    Raises:
        UserError: naming the first tensor that is missing, left over or of another shape.
    """
    state, wanted = content.get("model"), model.state_dict()
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds no model weights")
    for name in sorted(wanted.keys() ^ state.keys()):
        problem = "has no" if name in wanted else "has an unknown"
        raise UserError(f"{path}: {problem} tensor {name}; was it trained with another configuration?")
    for name, tensor in wanted.items():
        if tensor.shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)}, this model needs {tuple(tensor.shape)}"
            raise UserError(f"{path}: tensor {name} is {shapes}; is the number of classes or channels another?")
    model.load_state_dict(state)


def is_ours(path: str | Path) -> bool:
    """Whether a file is a checkpoint or a released model of this project by its name or its last bytes; no more."""
    if Path(path).suffix == released.SUFFIX:
        return True
    try:
        with Path(path).open("rb") as file:
            file.seek(-TRAILER_BYTES, os.SEEK_END)
            return file.read(len(MARK)) == MARK
    except OSError:  # missing, or too short
        return False


def is_whole(path: str | Path) -> bool:
    """Whether a file exists and its checksum fits."""
    try:
        data = _read(Path(path))
    except UserError:
        return False
    return data[-TRAILER_BYTES:-32] == MARK and hashlib.sha256(data[:-TRAILER_BYTES]).digest() == data[-32:]


def _to_bytes(content: Mapping[str, Any]) -> bytes:
    check_plain(content, "content")
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    data = buffer.getvalue()
    return data + MARK + hashlib.sha256(data).digest()


def check_plain(value: object, where: str) -> None:
    """Only what `weights_only` reads back; exact types, since a subclass would be pickled by reference to its class."""
    if value is None or type(value) in (bool, int, float, str, Tensor):
        return
    if type(value) in (list, tuple):
        for index, part in enumerate(value):  # type: ignore[arg-type, var-annotated]
            check_plain(part, f"{where}[{index}]")
    elif isinstance(value, Mapping) and type(value).__module__ in ("builtins", "collections"):
        for key, part in value.items():
            if type(key) not in (str, int):
                raise ValueError(f"{where} has the key {key!r}; keys must be text or whole numbers")
            check_plain(part, f"{where}[{key!r}]")
    else:
        raise ValueError(f"{where} is a {type(value).__name__}; checkpoints hold tensors and plain values only")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except OSError as error:
        if error.errno == errno.EIO:
            raise CorruptCheckpoint(f"{path}: checkpoint is damaged, the disk cannot read it") from None
        raise UserError(f"{path}: checkpoint cannot be read: {error.strerror}") from None


def _unpickle(path: str | Path, data: bytes) -> Any:
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if re.search("unsupported global|can only create|trying to call", str(error), re.IGNORECASE):
            raise UserError(f"{path}: holds a pickle that would run code when opened; refused") from None
        raise CorruptCheckpoint(f"{path}: not a checkpoint, or a damaged one") from None
    except Exception:  # damaged bytes make torch.load fail in many ways
        raise CorruptCheckpoint(f"{path}: not a checkpoint, or a damaged one") from None


def _explain_foreign(path: str | Path, data: bytes) -> UserError:
    """Why a file without our checksum is refused."""
    if MARK in data:
        return CorruptCheckpoint(f"{path}: checkpoint is damaged, bytes were added or lost")
    try:
        content = _unpickle(path, data)
    except UserError as error:
        return error
    if isinstance(content, dict) and "format" in content:
        return CorruptCheckpoint(f"{path}: checkpoint is damaged, its end is missing")
    return UserError(f"{path}: a PyTorch file, but no checkpoint of this project")
