"""Requests to stop, SIGTERM and Ctrl-C: training and evaluation look at them after every batch."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import torch

from core import distributed

Item = TypeVar("Item")
StopAsked = Callable[[], bool]  # whether this rank was asked to stop


class StopRequested(Exception):
    """An evaluation was left before its end, on all ranks."""


@contextmanager
def stop_requests() -> Iterator[StopAsked]:
    """Whether SIGTERM or Ctrl-C came; a second Ctrl-C interrupts at once. Earlier handlers come back at the end.

    Forked loader workers inherit the handlers: in them SIGTERM ends the process and Ctrl-C is left to the main one.
    """
    asked = threading.Event()
    main_process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != main_process:
            if number == signal.SIGTERM:
                os._exit(0)
            return
        asked.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            print("\nstopping after this batch; Ctrl-C again leaves at once", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():  # Python allows handlers there only
        yield asked.is_set
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def until_asked(items: Iterable[Item], asked: StopAsked, device: torch.device) -> Iterator[Item]:
    """The items, unless a rank is asked to stop. Every rank must go through it, also one without items.

    After each item every rank says whether it was asked and whether it may have more; those with fewer items go on
    saying so until the last one is through, so that all leave it at the same time.

    Raises:
        StopRequested: on every rank, after the item at hand.
    """
    for item in items:
        yield item
        _vote(asked(), True, device)
    while _vote(asked(), False, device):
        pass


def _vote(asked: bool, busy: bool, device: torch.device) -> bool:
    """Whether any rank may have more items; StopRequested where any was asked to stop."""
    if distributed.world_size() > 1:
        asked, busy = (
            distributed.sum_over_ranks(torch.tensor([asked, busy], dtype=torch.float32, device=device)) > 0
        ).tolist()
    if asked:
        raise StopRequested
    return busy
