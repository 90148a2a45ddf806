"""One process or many: start, rank, sums over ranks, and an end for all when one fails.

Without `torchrun` there is one rank, and every function here gives back what it got.
"""

import atexit
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.errors import UserError

T = TypeVar("T")


MEETING = 5.0  # minutes that a rank may take to start, at least, however short it may be silent later
GRACE = 3.0  # seconds by which the other ranks outlive the failed one: torchrun names the first that left
FOREVER = timedelta(days=365)
CONNECTION = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)
TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)


@contextmanager
def process_group(device_name: str = "auto", minutes: float = 10.0) -> Iterator[torch.device]:
    """This rank's device; under `torchrun` also the group of all ranks (NCCL on CUDA, Gloo elsewhere).

    A rank that fails says its own error first. The others, on all nodes, learn of it and leave seconds later.

    Args:
        device_name: `auto` (CUDA if there is one, else CPU), `cpu`, `cuda`, `cuda:1`.
        minutes: how long a rank waits for one that neither answers nor ends.

    Raises:
        UserError: for a device that does not exist here; where another rank was killed or is stuck.
    """
    device = pick_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means float32: TF32 keeps 10 bits of a product
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield device
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    own, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meeting = max(minutes, MEETING)
    store = _store(timedelta(minutes=meeting), is_master=own == 0 and not _agent_has_store())
    group = _meet(store, own, count, meeting)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(group, store),
        rank=own,
        world_size=count,
        timeout=timedelta(minutes=minutes),
        device_id=device if device.type == "cuda" else None,
    )
    alarm = _Alarm(group, minutes)
    try:
        yield device
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            alarm.close()
            raise
        instead = alarm.ring(error)
        if instead is error:
            raise
        raise instead from None
    alarm.close()


def _agent_has_store() -> bool:
    """Whether torchrun holds the store where ranks meet; otherwise the main rank does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store(patience: timedelta, is_master: bool = False) -> dist.Store:
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, is_master=is_master)
    store.set_timeout(patience)
    return store


def _meet(store: dist.Store, own_rank: int, count: int, minutes: float) -> str:
    """A name for this group of ranks, which no earlier group of the same store had.

    torchrun's store outlives a restart and still holds the addresses of ranks that are gone, which the new ones would
    try (torch 2.15). So nothing read from it counts, unless it answers a word that is new: every other rank says one,
    and the main rank answers until all have confirmed.

    Raises:
        UserError: naming ranks that do not come.
    """
    word = uuid.uuid4().hex
    if own_rank:
        store.set(f"hello {own_rank}", word)
        group = store.get(word).decode()
        store.set(f"{group} {own_rank}", "")
        return group
    missing, end = set(range(1, count)), time.monotonic() + 60 * minutes
    while missing:
        for other in tuple(missing):
            if store.check([f"{word} {other}"]):
                missing.discard(other)
            elif store.check([f"hello {other}"]):
                store.set(store.get(f"hello {other}").decode(), word)
        if time.monotonic() > end:
            names = ", ".join(map(str, sorted(missing)))
            raise UserError(f"rank 0 of {count}: no sign of rank {names} within {minutes:g} minutes")
        time.sleep(0.01)
    return word


class _Alarm:
    """Word from the first rank that fails to all others, through the store where the ranks met.

    A closed connection would not do: it says nothing to a rank that loads data, computes, or waits inside NCCL, and the
    error that it causes elsewhere may be printed before the one that matters.
    """

    def __init__(self, group: str, minutes: float) -> None:
        self.minutes = minutes
        self.leaving = False
        self.name = f"rank {rank()} of {world_size()}"
        self.keys = [f"word to {other}" for other in range(world_size())]
        self.key = self.keys[rank()]
        self.store = dist.PrefixStore(group, _store(timedelta(seconds=3 * GRACE)))
        watched = dist.PrefixStore(group, _store(FOREVER))  # a connection that waits does nothing else meanwhile
        self.thread = threading.Thread(target=self._watch, args=(watched,), daemon=True)
        self.thread.start()

    def close(self, failed: bool = False) -> None:
        """End the watch and the group."""
        with suppress(dist.DistError):  # without torchrun the main rank holds the store, and may have left
            self.store.set(self.key, "")
        self.thread.join()
        if not (failed and dist.get_backend() == "nccl"):  # its end would wait for the collectives of the other ranks
            dist.destroy_process_group()

    def ring(self, error: BaseException) -> BaseException:
        """Tell the others, once this process has said its error; gives back what this rank is to raise.

        That is its error, or in one line what a lost connection means, or a silent end where the error only follows
        from another rank's or repeats it.
        """
        self.leaving = True
        lost = isinstance(error, (dist.DistError, RuntimeError)) and CONNECTION.search(str(error)) is not None
        own = self._explain(error) if lost else error
        try:
            if self.store.add("failures", 1) == 1:
                atexit.register(self._tell, f"rank {rank()} failed: {_line(own)}")
                return own
            atexit.register(self.close, failed=True)  # not now: closed connections end others before the word does
            word = self.store.get(self.key).decode()
        except dist.DistError:  # the store's process has gone
            return own
        if not lost and not word.endswith(f"failed: {_line(own)}"):
            return own
        time.sleep(GRACE)
        if lost:
            self._say(word)
        return SystemExit(2 if isinstance(error, UserError) else 1)

    def _explain(self, error: BaseException) -> UserError:
        if TIMED_OUT.search(str(error)):
            problem = f"another rank gave no answer for {self.minutes:g} minutes; is it stuck?"
        else:
            problem = "the connection to another rank broke; it was killed, or its machine is gone"
        return UserError(f"{self.name}: {problem} ({_line(error)[:200]})")

    def _tell(self, word: str) -> None:
        with suppress(dist.DistError):
            for key in self.keys:
                if key != self.key:
                    self.store.set(key, word)
        self.close(failed=True)

    def _watch(self, store: dist.Store) -> None:
        try:
            word = store.get(self.key).decode()
        except dist.DistError:  # the store's process has gone, which ends collectives too
            return
        if word and not self.leaving:
            time.sleep(GRACE)
        if word and not self.leaving:  # not even torchrun's SIGTERM reached it: it waits or computes
            self._say(word)
            os._exit(1)

    def _say(self, word: str) -> None:
        """One line on each node."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{self.name} ends, since {word}", file=sys.stderr, flush=True)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


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


def broadcast_model(model: nn.Module) -> None:
    """Give every rank the main rank's weights and buffers, so that only its machine needs their files."""
    if world_size() > 1:
        model.load_state_dict(broadcast(model.state_dict() if is_main() else {}))


def broadcast_buffers(model: nn.Module) -> None:
    """Give every rank the main rank's buffers: trained batch norm counts per rank, but one model is evaluated."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()
