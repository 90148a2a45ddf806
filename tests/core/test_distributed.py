"""One rank: everything is an identity. Two ranks on Gloo: sums, gathering, and an error that ends all at once."""

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from core import distributed
from core.errors import UserError

TWO_RANKS = """
import os, sys, time, torch
from pathlib import Path
from core import cli, distributed
from core.errors import UserError

def sums():
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
    model = torch.nn.BatchNorm1d(3)
    model.running_mean += rank
    model.weight.data += rank
    distributed.broadcast_model(model)
    assert model.running_mean.tolist() == [0.0] * 3 and model.weight.tolist() == [1.0] * 3
    distributed.barrier()
    print("done")

def fails():
    if distributed.rank() == 1:
        raise UserError("rank 1 has no data")
    distributed.barrier()

def fails_while_the_other_is_busy():
    if distributed.rank() == 1:
        raise UserError("rank 1 has no data")
    time.sleep(100)

def breaks():
    if distributed.rank() == 1:
        raise KeyError("a mistake of ours")
    distributed.barrier()

def all_fail():
    raise UserError("nowhere: no such data")

def is_killed():
    if distributed.rank() == 1:
        os.kill(os.getpid(), 9)
    distributed.barrier()

def is_stuck():
    if distributed.rank() == 1:
        time.sleep(100)
    distributed.barrier()

def start(case, rank, port, folder):
    child = os.fork()
    if not child:
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for number, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{case}-{rank}.{stream}", os.O_CREAT | os.O_WRONLY), number)
        def main():
            with distributed.process_group("cpu", 0.2 if case == "is_stuck" else 5):
                globals()[case]()
        cli.run(main)
    return child

torch.set_num_threads(1)
folder = Path(sys.argv[1])
children = {}
for case_port in sys.argv[2:]:
    case, port = case_port.split(":")
    for rank in "01":
        children[start(case, rank, port, folder)] = folder / f"{case}-{rank}.code"
for child, path in children.items():
    path.write_text(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""
CASES = (
    "sums",
    "fails",
    "fails_while_the_other_is_busy",
    "breaks",
    "all_fail",
    "is_killed",
    "is_stuck",
)


class Ended(NamedTuple):
    """What a rank left."""

    code: int
    out: str
    err: list[str]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Ended]]:
    """What the two ranks of every case left. They all run at once, forked from one process that has loaded torch."""
    folder = tmp_path_factory.mktemp("ranks")
    with ExitStack() as stack:
        ports = []
        for _ in CASES:
            free = stack.enter_context(socket.socket())
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    cases = [f"{case}:{port}" for case, port in zip(CASES, ports, strict=True)]
    command = [sys.executable, "-c", TWO_RANKS, str(folder), *cases]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True, timeout=300)

    def read(case: str) -> list[Ended]:
        texts = [[(folder / f"{case}-{rank}.{kind}").read_text() for kind in ("code", "out", "err")] for rank in "01"]
        return [
            Ended(int(code), out, [line for line in err.splitlines() if not NOISE.match(line)])
            for code, out, err in texts
        ]

    return read


NOISE = re.compile(r"\[[WE]\d+ |  warnings.warn|Exception raised from |frame #|$")  # of torch's own sockets


def test_two_ranks(ended: Callable[[str], list[Ended]]) -> None:
    assert ended("sums") == [(0, "done\n", []), (0, "done\n", [])]


@pytest.mark.parametrize("case", ["fails", "fails_while_the_other_is_busy"])
def test_a_failing_rank_says_its_own_error_and_ends_the_other(ended: Callable[[str], list[Ended]], case: str) -> None:
    waiting, failing = ended(case)  # Gloo itself would wait for half an hour
    assert failing == (2, "", ["error: rank 1 has no data"])
    assert waiting == (1, "", ["rank 0 of 2 ends, since rank 1 failed: rank 1 has no data"])


def test_a_mistake_of_ours_keeps_its_traceback(ended: Callable[[str], list[Ended]]) -> None:
    waiting, failing = ended("breaks")
    assert failing.code == 1
    assert "Traceback" in failing.err[0]
    assert "KeyError: 'a mistake of ours'" in failing.err[-1]
    assert waiting.err == ["rank 0 of 2 ends, since rank 1 failed: 'a mistake of ours'"]


def test_an_error_of_all_ranks_is_said_once(ended: Callable[[str], list[Ended]]) -> None:
    both = ended("all_fail")
    assert [rank.code for rank in both] == [2, 2]
    assert [line for rank in both for line in rank.err] == ["error: nowhere: no such data"]


@pytest.mark.parametrize(
    ("case", "problem", "code"),
    [
        ("is_killed", "the connection to another rank broke; it was killed, or its machine is gone", -signal.SIGKILL),
        ("is_stuck", "another rank gave no answer for 0.2 minutes; is it stuck?", 1),
    ],
)
def test_a_rank_that_is_gone_or_stuck_ends_the_run(
    ended: Callable[[str], list[Ended]], case: str, problem: str, code: int
) -> None:
    alive, lost = ended(case)
    assert alive.code == 2
    assert len(alive.err) == 1
    assert alive.err[0].startswith(f"error: rank 0 of 2: {problem} (")
    assert lost == (code, "", [])


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
