"""Runs of two ranks that lose ranks, sit on two machines, or have a rank that never sees an object.

    python -m benchmarks.elastic                                                # all; about an hour on two cores
    python -m benchmarks.elastic empty                                          # some of killed, nodes, resized, empty
    python -m benchmarks.elastic --out benchmarks/results/elastic.json          # kept for the README's table; what is
                                                                                # not measured anew stays as it was

killed: ranks are ended by SIGKILL at random moments under `torchrun --max-restarts`. nodes: each of two network
namespaces, joined by a virtual cable, starts torchrun in a folder of its own, and the second one's rank is killed; it
needs Linux, root and `ip` (iproute2). resized: a run of one rank goes on with two, then with one again. All must end
with the weights of a run that nothing happened to. empty: 500 steps in which all images of the second rank are empty.
Networks and images are tiny; CPU.
"""

import argparse
import atexit
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import checkpoint, cli
from core.config import TrainConfig
from core.data.sampler import training_sampler
from core.data.sources import open_data
from core.errors import UserError, nearest
from core.runlog import LOG, environment, read_log, write_json
from core.shapes import write_shapes

ROOT = Path(__file__).parents[1]
PYRAMID = ("--frozen-stages", "0", "--channels", "64", "--short-side", "64", "--long-side", "96")
FROZEN_NORM = ("--norm", "frozen", "--block-norm", "frozen")  # trained ones need more than a rank's one image
NETWORKS = {
    "paa": PYRAMID,
    "dynamic_atss": PYRAMID,
    "tood_tal": PYRAMID,
    "padet": ("--size", "192", "--channels", "32", *FROZEN_NORM),
}
KILLS = {"paa": 3, "dynamic_atss": 3, "tood_tal": 2, "padet": 2}
STEPS_A_KILL = 20
EMPTY_STEPS = 500
PATIENCE = 3600.0  # seconds after which a run counts as hung
PORT = 29411  # of the rendezvous between the namespaces
NODES = {"elastic-a": "10.203.0.1", "elastic-b": "10.203.0.2"}  # network namespaces and their addresses


def arguments(method: str, data: Path, out: str, steps: int) -> list[str]:
    """A method's tiny run of two ranks."""
    run = ("--data", str(data), "--out", out, "--steps", str(steps), "--batch-size", "2", "--log-every", "1")
    often = ("--save-every", "10", "--eval-every", "20", "--workers", "1", "--device", "cpu", "--rank-timeout", "5")
    network = ("--preset", "small", "--backbone-weights", "none", *NETWORKS[method])
    return ["-m", f"{method}.train", *network, *run, *often]


def start(
    launch: Sequence[str], run: Sequence[str], folder: Path, log: Path, **variables: str
) -> subprocess.Popen[str]:
    """torchrun in a folder, what it prints in a file; it ends with this process."""
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*launch, *run],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables},
            stdout=file,
            stderr=file,
            text=True,
        )
    atexit.register(process.terminate)
    return process


def torchrun(*options: str) -> list[str]:
    """The launcher of this interpreter."""
    return [sys.executable, "-m", "torch.distributed.run", *options]


ONE_NODE = torchrun("--standalone", "--nproc-per-node", "2")


def finish(processes: Sequence[subprocess.Popen[str]], log: Path) -> None:
    """Wait for all.

    Raises:
        UserError: if one fails, with the end of what it printed.
    """
    for process in processes:
        if process.wait(PATIENCE):
            raise UserError(f"exit code {process.returncode}: {log.read_text(encoding='utf-8')[-2000:]}")


def fingerprint(folder: Path) -> str:
    """SHA-256 of weights and momentum at the end of a run."""
    content = checkpoint.load(folder / checkpoint.LAST)
    digest = hashlib.sha256(str(content["step"]).encode())
    for tensor in tensors({"model": content["model"], "optimizer": content["optimizer"]["state"]}):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors inside nested containers."""
    if isinstance(value, Tensor):
        yield value.contiguous()
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors(part)


def undisturbed(method: str, data: Path, folder: Path, steps: int) -> str:
    """The fingerprint of a run that nothing happens to, on one node."""
    log = folder / f"{method}.txt"
    finish([start(ONE_NODE, arguments(method, data, method, steps), folder, log)], log)
    return fingerprint(folder / method)


def rank_process(launcher: int, rank: int) -> int | None:
    """The process of a rank among torchrun's children, or None while there is none."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text(encoding="utf-8").split():
        try:
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if f"RANK={rank}".encode() in variables:
            return int(child)
    return None


def last_step(run: Path) -> int:
    """Step of the log's last training row, 0 without one."""
    return max((row["step"] for row in read_log(run / LOG) if row["split"] == "train"), default=0)


def wait_until(condition: Any, process: subprocess.Popen[str], log: Path, what: str) -> None:
    """Look again and again. UserError where the run ends or shows nothing in time."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            shown = log.read_text(encoding="utf-8")[-2000:]
            raise UserError(f"{what}: the run ended with {process.poll()} or hung: {shown}")
        time.sleep(0.02)


def kill_rank(launcher: subprocess.Popen[str], rank: int, run: Path, printed: Path) -> float:
    """Kill a rank; returns the seconds until the restarted run has logged a step."""
    log = run / LOG
    before = log.stat().st_ino
    victim = rank_process(launcher.pid, rank)
    if victim is None:
        raise UserError(f"{run}: no process of rank {rank}")
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    wait_until(
        lambda: log.stat().st_ino != before, launcher, printed, f"{run} after a kill"
    )  # cut to the checkpoint's step
    rows = len(read_log(log))
    wait_until(lambda: len(read_log(log)) > rows, launcher, printed, f"{run} after a restart")
    return time.monotonic() - began


def killed(method: str, data: Path, folder: Path) -> dict[str, Any]:
    """Ranks killed at random moments under `--max-restarts`, in turn the first and the second."""
    kills, chance = KILLS[method], random.Random(method)
    steps = STEPS_A_KILL * (kills + 1)
    run, log = folder / "killed" / method, folder / f"killed-{method}.txt"
    run.parent.mkdir(exist_ok=True)
    launch = torchrun("--standalone", "--nproc-per-node", "2", "--max-restarts", str(kills))
    process = start(launch, arguments(method, data, method, steps), run.parent, log)
    recoveries = []
    for index in range(kills):
        step = STEPS_A_KILL * index + chance.randrange(3, STEPS_A_KILL)
        wait_until(lambda step=step: last_step(run) >= step, process, log, str(run))
        time.sleep(chance.uniform(0, 0.3))  # in a step, an evaluation, or a save
        seconds = kill_rank(process, index % 2, run, log)
        recoveries.append({"rank": index % 2, "after_step": step, "recovery_seconds": round(seconds, 2)})
    finish([process], log)
    equal = fingerprint(run) == undisturbed(method, data, folder, steps)
    return {"method": method, "steps": steps, "kills": recoveries, "equal": equal}


@contextmanager
def two_networks() -> Iterator[None]:
    """Two network namespaces with a virtual cable between them.

    Raises:
        UserError: where they cannot be made.
    """
    (first, one), (second, two) = NODES.items()
    commands = [
        f"ip netns add {first}",
        f"ip netns add {second}",
        f"ip link add {first} netns {first} type veth peer name {second} netns {second}",
        *(f"ip -n {name} addr add {address}/24 dev {name}" for name, address in ((first, one), (second, two))),
        *(f"ip -n {name} link set {device} up" for name in NODES for device in (name, "lo")),
    ]
    if shutil.which("ip") is None:
        raise UserError("nodes: no command ip here; install iproute2")
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                raise UserError(f"nodes: {command}: {done.stderr.strip()}")
        yield
    finally:
        for name in NODES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def nodes(method: str, data: Path, folder: Path) -> dict[str, Any]:
    """One rank in each of two network namespaces; the second's is killed once."""
    steps = 2 * STEPS_A_KILL
    log = folder / f"nodes-{method}.txt"
    first = folder / next(iter(NODES))
    with two_networks():
        processes = []
        for name, address in NODES.items():
            (folder / name).mkdir(exist_ok=True)
            meet = ("--rdzv-id", method, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{NODES[first.name]}:{PORT}")
            group = ("--nnodes", "2", "--nproc-per-node", "1", "--local-addr", address, "--max-restarts", "1")
            host = ("--rdzv-conf", f"is_host={name == first.name}")  # torchrun knows a host by a name that resolves
            launch = ["ip", "netns", "exec", name, *torchrun(*group, *meet, *host)]
            run = arguments(method, data, method, steps)
            processes.append(start(launch, run, folder / name, log, GLOO_SOCKET_IFNAME=name))
        wait_until(lambda: last_step(first / method) >= STEPS_A_KILL - 5, processes[0], log, str(first))
        by_process = {rank_process(process.pid, 1): process for process in processes}
        by_process.pop(None, None)
        (victim,) = by_process
        before = (first / method / LOG).stat().st_ino
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        wait_until(lambda: (first / method / LOG).stat().st_ino != before, processes[0], log, "nodes after a kill")
        seconds = time.monotonic() - began
        finish(processes, log)
    written = [name for name in NODES if (folder / name / method).exists()]
    equal = fingerprint(folder / written[0] / method) == undisturbed(method, data, folder, steps)
    return {"method": method, "steps": steps, "restart_seconds": round(seconds, 2), "written": written, "equal": equal}


def drop_boxes(folder: Path, config: TrainConfig, places: slice) -> None:
    """Take the boxes from those training images of a folder that come at some places of the global batches.

    Args:
        folder: as `core.shapes.write_shapes` leaves it. A run that sees an image twice sees it in another place too.
        config: of the run, with `steps`.
        places: of the images that become empty.
    """
    assert config.steps is not None
    table = open_data(str(folder)).train
    sampler = training_sampler(table, config)
    plans = [sampler.batch(step) for step in range(1, config.steps + 1)]
    emptied = {int(table.image_ids[row]) for plan in plans for row in plan.images[places]}
    path = folder / "annotations" / "instances_train.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] not in emptied]
    if not content["annotations"]:
        raise UserError(f"{folder}: no image has kept its boxes; draw more")
    path.write_text(json.dumps(content), encoding="utf-8")


def empty(method: str, data: Path, folder: Path) -> dict[str, Any]:
    """500 steps in which the second of two ranks sees empty images only."""
    config = importlib.import_module(f"{method}.config").PRESETS["small"]
    config = replace(config, steps=EMPTY_STEPS, epochs=None, batch_size=2, empty_images="keep")
    drawn, half_empty = folder / "drawn", folder / f"half-{method}"
    if not drawn.exists():
        write_shapes(drawn, {"train": 2 * EMPTY_STEPS + 20, "val": 2, "test": 1}, 0)
    shutil.copytree(drawn, half_empty)
    drop_boxes(half_empty, config, slice(1, 2))
    log = folder / f"empty-{method}.txt"
    run = [
        *arguments(method, half_empty, f"empty-{method}", EMPTY_STEPS),
        "--empty-images",
        "keep",
        "--eval-every",
        "0",
        "--save-every",
        str(EMPTY_STEPS),
    ]
    began = time.monotonic()
    finish([start(ONE_NODE, run, folder, log)], log)
    seconds = time.monotonic() - began
    shutil.rmtree(half_empty)
    rows = [row for row in read_log(folder / f"empty-{method}" / LOG) if row["split"] == "train"]
    losses = [row["loss"] for row in rows]
    return {
        "method": method,
        "steps": len(rows),
        "seconds": round(seconds, 1),
        "finite": None not in losses,
        "first_losses": statistics.mean(losses[:20]),
        "last_losses": statistics.mean(losses[-20:]),
    }


def resized(method: str, data: Path, folder: Path) -> dict[str, Any]:
    """A run stopped by SIGTERM after a third and two thirds of its steps, of one rank, two, and one; against one rank.

    With frozen batch norm: a trained one counts over the images of a rank.
    """
    steps = 3 * STEPS_A_KILL
    log = folder / f"resized-{method}.txt"
    one, two = torchrun("--standalone", "--nproc-per-node", "1"), ONE_NODE
    for out, launches in (("changed", (one, two, one)), ("whole", (one,))):
        for index, launch in enumerate(launches, start=1):
            run = [*arguments(method, data, f"{method}-{out}", steps), "--log-every", "3"]
            process = start(launch, run, folder, log)
            if index < len(launches):
                reached = index * STEPS_A_KILL
                wait_until(lambda: last_step(folder / f"{method}-{out}") >= reached, process, log, out)  # noqa: B023
                process.send_signal(signal.SIGTERM)
                process.wait(PATIENCE)
            else:
                finish([process], log)
    changed, whole = (checkpoint.load(folder / f"{method}-{out}" / checkpoint.LAST) for out in ("changed", "whole"))
    logs = [read_log(folder / f"{method}-{out}" / LOG) for out in ("changed", "whole")]
    pairs = [(a["loss"], b["loss"]) for a, b in zip(*logs, strict=True) if a["split"] == "train"]
    weights = [(changed["model"][name].double(), value.double()) for name, value in whole["model"].items()]
    return {
        "method": method,
        "steps": steps,
        "weights_differ": max(float((a - b).abs().max()) for a, b in weights),
        "losses_differ": max(abs(a - b) / b for a, b in pairs),
    }


CHECKS = {"killed": killed, "nodes": nodes, "resized": resized, "empty": empty}


def main() -> None:
    """The command."""
    parser = cli.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(CHECKS)} [all]")
    parser.add_argument("--method", choices=list(NETWORKS), help="one method [all]")
    parser.add_argument("--out", type=Path, help="JSON file for the results and where they come from")
    options = parser.parse_args()
    for name in options.names:
        if name not in CHECKS:
            raise UserError(f"no check named {name!r}{nearest(name, CHECKS)}")
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary, "data")
        write_shapes(data, {"train": 16, "val": 3, "test": 1}, 0)
        for name in options.names or CHECKS:
            for method in [options.method] if options.method else NETWORKS:
                folder = Path(temporary, name)
                folder.mkdir(exist_ok=True)
                result = CHECKS[name](method, data, folder)
                print(f"{name}: {json.dumps(result)}", flush=True)
                if options.out:
                    keep(options.out, name, result)


def keep(path: Path, name: str, result: dict[str, Any]) -> None:
    """Put one result into the file, in the place of an earlier one of the same check and method."""
    facts = environment(torch.device("cpu"), 2, {}) | {"seeds": [0], "threads": 1}
    facts["licence_note"] = "Data: generated in the benchmarks, no licence."
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    origin = {key: facts[key] for key in ("commit", "command", "started")}
    results = {**content.get("results", {})}
    results[name] = {**results.get(name, {}), result["method"]: {**result, "origin": origin}}
    write_json(path, facts | {"results": results})


if __name__ == "__main__":
    cli.run(main)
