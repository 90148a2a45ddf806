"""One process or many: start, rank, and sums over ranks.

Without `torchrun` there is one rank, and every function here gives back what it got.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.errors import UserError

T = TypeVar("T")


@contextmanager
def process_group(device_name: str = "auto") -> Iterator[torch.device]:
    """This rank's device; under `torchrun` also the group of all ranks (NCCL on CUDA, Gloo elsewhere).

    A rank that fails leaves at once with its own error: it waits for nobody, and its closed connections end the others.

    Args:
        device_name: `auto` (CUDA if there is one, else CPU), `cpu`, `cuda`, `cuda:1`.

    Raises:
        UserError: for a device that does not exist here.
    """
    device = pick_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means float32: TF32 keeps 10 bits of a product
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield device
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
    failed = True
    try:
        yield device
        failed = False
    except SystemExit as leaving:
        failed = bool(leaving.code)
        raise
    finally:
        if not (failed and backend == "nccl"):  # NCCL's shutdown would wait for the collectives of the other ranks
            dist.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """The device of that name for this rank; `auto` and `cuda` take the local rank's GPU.

    Raises:
        UserError: for a device that does not exist here.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is not known; try auto, cpu, cuda or cuda:0") from None
    if device.type == "cuda":
        device = torch.device("cuda", local_rank) if device.index is None else device
        if device.index >= torch.cuda.device_count():
            raise UserError(f"device {device} does not exist: {torch.cuda.device_count()} GPUs here; try --device cpu")
    elif device.type != "cpu":
        raise UserError(f"device {name!r} is not supported; try auto, cpu or cuda")
    return device


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this rank writes files and talks."""
    return rank() == 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of this tensor on all ranks, without gradient. Every rank must call it, also one without objects."""
    total = tensor.detach()
    if world_size() > 1:
        total = total.clone()
        dist.all_reduce(total)
    return total


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """`sum_over_ranks` divided by the number of ranks: a loss normaliser, since DDP averages gradients over ranks."""
    return sum_over_ranks(tensor) / world_size()


def gather_objects(value: T) -> list[T]:
    """The values of all ranks, in rank order, on every rank. For small plain values."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """The main rank's value, on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def broadcast_buffers(model: nn.Module) -> None:
    """Give every rank the main rank's buffers: trained batch norm counts per rank, but one model is evaluated."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


@contextmanager
def main_first() -> Iterator[None]:
    """The main rank goes through the block before the others start: it downloads, they find the file."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()
