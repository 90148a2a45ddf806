"""Released models: a safetensors file that says what it is, so that it needs nothing beside it.

Its metadata hold method, configuration, classes, geometry, profile, a licence note, where the weights come from, and a
SHA-256 over all of this and every tensor. Metadata are text: what is no text is written as JSON.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from core.errors import UserError
from core.files import replace_file

SUFFIX = ".safetensors"
FORMAT = 1  # raised when older code could not read newer files
CHECKSUM = "sha256"
JSON_FIELDS = ("format", "config", "categories", "provenance")


def save(path: str | Path, state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a model and what must be known about it; at every moment the path holds the old file or the new one.

    Args:
        path: a name that ends in .safetensors.
        state: tensors by the model's own names.
        facts: `method`, `config` (plain values by field), `categories` (pairs of id and name, by label), `geometry`,
            `profile`, `licence` and `provenance` (plain values).

    Raises:
        UserError: when the disk is full or the folder cannot be written.
    """
    whole = (
        torch.contiguous_format
    )  # one element expanded to a tensor counts as contiguous, but its bytes cannot be viewed
    tensors = {name: tensor.detach().cpu().clone(memory_format=whole) for name, tensor in state.items()}
    metadata = {name: json.dumps(value) if name in JSON_FIELDS else value for name, value in facts.items()}
    metadata["format"] = json.dumps(FORMAT)
    metadata[CHECKSUM] = _digest(tensors, metadata)
    replace_file(Path(path), _ordered(safetensors.torch.save(tensors, metadata)))


def load(path: str | Path) -> dict[str, Any]:
    """The facts of a released model, and its tensors on the CPU as `model`.

    Raises:
        UserError: when it is missing, damaged, or a safetensors file of something else.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, the file is no mapping
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (safetensors.SafetensorError, struct.error, ValueError, UnicodeDecodeError):
        raise UserError(f"{path}: not a safetensors file, or a damaged one") from None
    checksum = metadata.pop(CHECKSUM, None)
    if checksum is None or "format" not in metadata:
        raise UserError(f"{path}: a safetensors file, but no released model of this project")
    if checksum != _digest(tensors, metadata):
        raise UserError(f"{path}: released model is damaged, its checksum does not fit")
    facts = {name: json.loads(text) if name in JSON_FIELDS else text for name, text in metadata.items()}
    return {**facts, "model": tensors}


def _ordered(data: bytes) -> bytes:
    """The same file with its header in alphabetical order: the library's is another each time, and so are the bytes."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:start]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)  # tensors stay aligned
    return len(header).to_bytes(8, "little") + header + data[start:]


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over metadata, names, types, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
