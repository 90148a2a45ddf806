"""Leaving an evaluation: after the item at hand, on one rank and on two with unlike shares."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from core.config import PyramidConfig
from core.data.loader import _load
from core.data.sources import open_data
from core.inference import on_validation
from core.stopping import StopRequested, stop_requests, until_asked
from core.types import Detections

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]

TWO_RANKS = """
import json, torch
from core import distributed
from core.stopping import StopRequested, until_asked

CASES = (  # items of both ranks, the rank that is asked, at which of its looks (from 1)
    ((3, 3), None, 0), ((3, 1), None, 0), ((0, 2), None, 0), ((0, 0), None, 0),
    ((4, 4), 0, 2), ((4, 4), 1, 2), ((5, 1), 0, 3), ((5, 1), 1, 3), ((1, 5), 1, 6),
)

def through(shares, asked_rank, at):
    seen, looks, rank = 0, 0, distributed.rank()
    def asked():
        nonlocal looks
        looks += 1
        return rank == asked_rank and looks >= at
    try:
        for _ in until_asked(range(shares[rank]), asked, torch.device("cpu")):
            seen += 1
    except StopRequested:
        return [seen, "left"]
    return [seen, "all"]

with distributed.process_group("cpu"):
    print(json.dumps(distributed.gather_objects([through(*case) for case in CASES])))
"""


def items_until(items: int, look: int) -> tuple[list[int], bool]:
    """The items that come through where the request is there at a look (from 1), and whether it was left."""
    looks = iter(range(1, 100))
    seen = []
    try:
        for item in until_asked(range(items), lambda: next(looks) >= look, CPU):
            seen.append(item)
    except StopRequested:
        return seen, True
    return seen, False


def test_the_item_at_hand_is_the_last() -> None:
    assert items_until(3, look=99) == ([0, 1, 2], False)
    assert items_until(3, look=1) == ([0], True)
    assert items_until(3, look=2) == ([0, 1], True)
    assert items_until(0, look=99) == ([], False)


def test_two_ranks_leave_together() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS],
            env={**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    answers = [process.communicate(timeout=100)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    first, second = json.loads(answers[0])
    assert answers[0] == answers[1]
    whole = [([3, "all"], [3, "all"]), ([3, "all"], [1, "all"]), ([0, "all"], [2, "all"]), ([0, "all"], [0, "all"])]
    left = [([2, "left"], [2, "left"])] * 2 + [([3, "left"], [1, "left"])] * 2 + [([1, "left"], [5, "left"])]
    assert list(zip(first, second, strict=True)) == whole + left


class Interrupted(nn.Module):
    """Finds nothing; in its second batch Ctrl-C comes."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        """The number of images."""
        self.batches += 1
        if self.batches == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return torch.zeros(len(images))


def find_nothing(outputs: Tensor, sizes: Tensor, *, original_sizes: Tensor) -> Detections:
    """No detection in any image."""
    batch = len(outputs)
    none = torch.zeros(batch, 0)
    return Detections(torch.zeros(batch, 0, 4), none, none.long(), none.bool())


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_ends_after_the_batch_at_hand(workers: int) -> None:
    table = open_data("shapes", 0, splits=("test",)).split("test")
    config = PyramidConfig(steps=1, batch_size=1, short_side=64, long_side=96, workers=workers, device="cpu")
    model, evaluate = Interrupted(), on_validation(find_nothing, table, config, CPU)
    with stop_requests() as asked, pytest.raises(StopRequested):
        evaluate(model, asked)
    assert model.batches == 2


def leave_in_the_middle() -> None:
    """End as a run does that was left during an evaluation: something still holds the loader."""
    config = PyramidConfig(steps=1, batch_size=1, short_side=64, long_side=96, workers=2, device="cpu")
    batches = _load(torch.tensor, range(100), config)
    next(batches)
    HELD.append(batches)
    sys.exit(3)


HELD: list[object] = []


def test_a_process_that_leaves_takes_its_loader_workers_along() -> None:
    process = multiprocessing.get_context("fork").Process(target=leave_in_the_middle)
    process.start()
    process.join(60)
    hangs = process.is_alive()
    process.kill()
    assert not hangs
    assert process.exitcode == 3
