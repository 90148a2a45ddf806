"""One rank: everything is an identity. Two ranks on Gloo: sums, gathering, and an error that ends all at once."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core import distributed
from core.errors import UserError

TWO_RANKS = """
import sys, torch, numpy as np
from core import cli, distributed
from core.errors import UserError
def main():
    with distributed.process_group("cpu") as device:
        rank = distributed.rank()
        assert distributed.world_size() == 2 and distributed.is_main() == (rank == 0)
        value = torch.tensor([1.0 + rank, 10.0], requires_grad=True)
        total = distributed.sum_over_ranks(value)
        assert total.tolist() == [3.0, 20.0] and not total.requires_grad
        assert value.tolist() == [1.0 + rank, 10.0]
        assert distributed.mean_over_ranks(value).tolist() == [1.5, 10.0]
        assert distributed.sum_over_ranks(torch.tensor(rank)).item() == 1
        assert distributed.gather_objects({"r": rank}) == [{"r": 0}, {"r": 1}]
        assert distributed.broadcast("main" if rank == 0 else None) == "main"
        distributed.barrier()
        if sys.argv[1:] == ["fail"]:
            if rank == 1:
                raise UserError("rank 1 has no data")
            distributed.barrier()
        print("done")
cli.run(main)
"""


def start_two(*arguments: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, *arguments],
            env={**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]


def test_two_ranks() -> None:
    for process in start_two():
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        assert out == "done\n"


def test_failing_rank_says_its_own_error_and_ends_the_others() -> None:
    waiting, failing = start_two("fail")
    assert failing.communicate(timeout=100)[1].splitlines()[-1] == "error: rank 1 has no data"
    assert failing.returncode == 2
    waiting.communicate(timeout=100)  # Gloo itself would wait for half an hour
    assert waiting.returncode != 0


def test_one_rank_is_an_identity() -> None:
    value = torch.tensor([1.0, 2.0], requires_grad=True)
    with distributed.process_group("cpu") as device:
        assert device == torch.device("cpu")
        assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
        assert torch.equal(distributed.sum_over_ranks(value), value)
        assert torch.equal(distributed.mean_over_ranks(value), value)
        assert not distributed.sum_over_ranks(value).requires_grad
        assert distributed.gather_objects(3) == [3]
        assert distributed.broadcast("x") == "x"
        distributed.barrier()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "device 'gpu' is not known; try auto, cpu, cuda or cuda:0"),
        ("meta", "device 'meta' is not supported; try auto, cpu or cuda"),
        ("cuda:99", r"device cuda:99 does not exist: \d+ GPUs here; try --device cpu"),
    ],
)
def test_unknown_devices(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message), distributed.process_group(name):
        pass


def test_local_rank_picks_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert distributed.pick_device("auto") == torch.device("cuda", 3)
    assert distributed.pick_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="cuda:3 does not exist"):
        distributed.pick_device("cuda")


@pytest.mark.compiled
def test_sums_trace_in_one_graph() -> None:
    def normalised(values: torch.Tensor) -> torch.Tensor:
        return values / distributed.mean_over_ranks(values.sum()).clamp(min=1)

    values = torch.tensor([1.0, 3.0])
    compiled = torch.compile(normalised, fullgraph=True, backend="eager")
    assert torch.equal(compiled(values), torch.tensor([0.25, 0.75]))
