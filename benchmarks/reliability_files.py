"""Checkpoints that were damaged, saves that were cut off, and disks that fail or are full (Linux).

    python -m benchmarks.reliability corruption crashes

Crashes and input/output errors are real: `strace` ends the saving process at its n-th system call, or lets that call
fail. The full disk is a small file system in memory (tmpfs) in a mount namespace of its own.
"""

import contextlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from core import checkpoint, released
from core.errors import UserError
from core.files import UNFINISHED, remove_unfinished
from core.heads import ParallelHead

ROOT = Path(__file__).parents[1]
PAGE = 4096  # bytes
OLD, NEW = 2, 3  # steps of the checkpoint before and of the one that is cut off
IN_TMPFS = "from benchmarks.reliability_files import print_full_disk; print_full_disk()"
FILE_CALLS = ("openat", "read", "write", "close", "fsync", "rename", "newfstatat", "fstat", "lseek", "mkdir", "unlink")


class Call(NamedTuple):
    """A system call of a save: the `number`-th of that name, from 1."""

    name: str
    number: int


def measure_corruption(count: int = 300, released_count: int = 100, seed: int = 0) -> dict[str, Any]:
    """Damage the newest checkpoint of a run folder, and a released model, in many ways; each must be noticed.

    Args:
        count: number of damaged checkpoints, of each kind a quarter.
        released_count: the same of released models.
        seed: of places and bytes.
    """
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder, file = Path(name, "run"), Path(name, "model.safetensors")
        for step in (1, OLD):
            save_step(folder, step, channels=64)
        size = (folder / checkpoint.LAST).stat().st_size
        used = damage_each(folder / checkpoint.LAST, count, draw, lambda: latest_step(folder) == 1)
        released.save(file, small_model(64).state_dict(), {"method": "toy", "config": {}, "categories": []})
        refused = damage_each(file, released_count, draw, lambda: _refused(file))
    return {"seed": seed, "checkpoint_bytes": size, "checkpoints": used, "released": refused}


def damage_each(file: Path, count: int, draw: random.Random, noticed: Callable[[], bool]) -> dict[str, dict[str, int]]:
    """Damage a file again and again; of each kind how often, and how often it was `noticed`. The file ends whole."""
    whole = file.read_bytes()
    found = {kind: {"damaged": 0, "noticed": 0} for kind in KINDS}
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        damaged = KINDS[kind](whole, draw)
        assert damaged != whole
        file.write_bytes(damaged)
        found[kind]["damaged"] += 1
        found[kind]["noticed"] += noticed()
    file.write_bytes(whole)
    return found


def truncated(whole: bytes, draw: random.Random) -> bytes:
    """Its beginning, of any length."""
    return whole[: draw.randrange(len(whole))]


def flipped(whole: bytes, draw: random.Random) -> bytes:
    """One to eight flipped bits."""
    data = bytearray(whole)
    for place in draw.sample(range(8 * len(whole)), draw.randint(1, 8)):
        data[place // 8] ^= 1 << place % 8
    return bytes(data)


def zeroed(whole: bytes, draw: random.Random) -> bytes:
    """One to four pages of zeros in place of others."""
    data = bytearray(whole)
    pages = [start for start in range(0, len(whole), PAGE) if any(whole[start : start + PAGE])]
    for start in draw.sample(pages, draw.randint(1, min(4, len(pages)))):
        data[start : start + PAGE] = bytes(len(data[start : start + PAGE]))
    return bytes(data)


def appended(whole: bytes, draw: random.Random) -> bytes:
    """Up to two pages of zeros or other bytes behind it."""
    length = draw.randint(1, 2 * PAGE)
    return whole + (draw.randbytes(length) if draw.random() < 0.5 else bytes(length))


KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": truncated,
    "bits flipped": flipped,
    "pages zeroed": zeroed,
    "bytes appended": appended,
}


def small_model(channels: int) -> ParallelHead:
    """A head with random weights."""
    return ParallelHead(channels, 3, tower_bias=False)


def save_step(folder: Path, step: int, channels: int = 32) -> None:
    """Save a checkpoint as training does, of a small head."""
    torch.manual_seed(step)
    head = small_model(channels)
    checkpoint.save_rotating(folder, {"method": "toy", "step": step, "model": head.state_dict()})


def latest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint that can be loaded, its tensors looked at; None where there is none."""
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            content = checkpoint.load_latest(folder, method="toy")
        except UserError:
            return None
    if content is None:
        return None
    torch.manual_seed(content["step"])
    channels = content["model"]["cls_logits.weight"].shape[1]
    expected = small_model(channels).state_dict()
    equal = all(torch.equal(content["model"][name], tensor) for name, tensor in expected.items())
    return content["step"] if equal else None


def _refused(file: Path) -> bool:
    try:
        released.load(file)
    except UserError:
        return True
    return False


def corruption_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of the table."""
    rows = []
    for key, what, outcome in (
        ("checkpoints", "damaged `last.pt`", "noticed, the previous one used"),
        ("released", "damaged released model", "refused"),
    ):
        damaged, noticed = (sum(kind[word] for kind in result[key].values()) for word in ("damaged", "noticed"))
        kinds = ", ".join(KINDS)
        rows.append(
            {
                "what": f"{damaged} times {what}: {kinds}",
                "measured": f"{noticed} {outcome}",
                "wanted": "all",
                "met": noticed == damaged,
            }
        )
    return rows


def measure_crashes(offsets: int = 30) -> dict[str, Any]:
    """End a save at each of its system calls, let each call on a file fail, and fill the disk at several sizes.

    Args:
        offsets: number of places in a checkpoint at which the disk is full.

    Raises:
        UserError: where strace or unshare are not installed.
    """
    for program in ("strace", "unshare"):
        if shutil.which(program) is None:
            raise UserError(f"{program}: not installed; this part needs it")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name, "base")
        for step in (1, OLD):
            save_step(base, step)
        calls = calls_of_a_save(base)
        crashes = [interfere(base, call, "signal=KILL") for call in calls]
        errors = [interfere(base, call, "error=EIO") for call in calls if call.name in FILE_CALLS]
        disk = full_disk(Path(name, "disk"), offsets)
    return {
        "calls": dict(Counter(call.name for call in calls)),
        "crashes": dict(Counter(crashes)),
        "errors": dict(Counter(errors)),
        "full_disk": disk,
    }


def calls_of_a_save(base: Path) -> list[Call]:
    """The system calls of a save over a copy of a run folder, in their order."""
    with _copy(base) as folder:
        _, trace = traced_save(folder, [])
    names = [match[1] for match in re.finditer(r"^(\w+)\(", trace, re.MULTILINE)]
    seen: Counter[str] = Counter()
    calls = []
    for name in names:
        seen[name] += 1
        calls.append(Call(name, seen[name]))
    return [call for call in calls if call.name != "exit_group"]


def interfere(base: Path, call: Call, what: str) -> str:
    """Save over a copy of a run folder while strace does something at one system call; says what is there then.

    `old` or `new`: that checkpoint can be loaded, and a next save works. `unnoticed new`: the save was not ended, for
    it took another way this time. Anything else is a loss.
    """
    with _copy(base) as folder:
        status, _ = traced_save(folder, ["-e", f"inject={call.name}:{what}:when={call.number}"])
        step = latest_step(folder)
        if step not in (OLD, NEW):
            return f"nothing can be loaded after {call.name} {call.number}"
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) not in (0, 2):
            return f"a traceback after {call.name} {call.number}"
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0 and step != NEW:
            return f"an unsaved checkpoint without a word after {call.name} {call.number}"
        remove_unfinished(folder)
        save_step(folder, NEW + 1)
        if latest_step(folder) != NEW + 1 or any(path.name.endswith(UNFINISHED) for path in folder.iterdir()):
            return f"no next save after {call.name} {call.number}"
    return "old" if step == OLD else "new"


def traced_save(folder: Path, options: Sequence[str]) -> tuple[int, str]:
    """Save step `NEW` in a forked process under strace; its wait status and its system calls.

    The exit code is 0, 2 for a UserError, or 3 for any other exception.
    """
    wait, go = os.pipe()
    process = os.fork()
    if process == 0:
        code = 3
        try:
            os.read(wait, 1)
            save_step(folder, NEW)
            code = 0
        except UserError:
            code = 2
        finally:
            os._exit(code)
    log = folder.parent / f"{folder.name}.trace"
    command = ["strace", "-p", str(process), "-o", str(log), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        said = strace.stderr.readline()
        os.write(go, b"x")
        _, status = os.waitpid(process, 0)
        if "attached" not in said:
            raise UserError(f"strace cannot look at processes here: {said.strip()}")
        strace.communicate()
    os.close(wait)
    os.close(go)
    text = log.read_text(errors="replace")
    log.unlink()
    return status, text


def full_disk(folder: Path, offsets: int) -> dict[str, Any]:
    """`fill_disk` in a small file system of its own, as a process that may mount one."""
    folder.mkdir()
    command = ["unshare", "-rm", sys.executable, "-c", IN_TMPFS, str(folder), str(offsets)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"no file system of its own for the full disk: {done.stderr.strip()[-300:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def print_full_disk() -> None:
    """The command behind `full_disk`: mounts a tmpfs at the first argument and prints what `fill_disk` found."""
    folder, offsets = Path(sys.argv[1]), int(sys.argv[2])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "none", str(folder)], check=True)
    print(json.dumps(fill_disk(folder, offsets)))


def fill_disk(disk: Path, offsets: int) -> dict[str, Any]:
    """Save while only part of a checkpoint fits on the disk, for parts of many sizes.

    Args:
        disk: folder of a small file system.
        offsets: number of sizes, from nothing to all but a page.
    """
    run, filler = disk / "run", disk / "filler"
    outcomes: Counter[str] = Counter()
    for index in range(offsets):
        for step in (1, OLD):
            save_step(run, step)
        size = (run / checkpoint.LAST).stat().st_size
        room = os.statvfs(disk)
        free = room.f_bavail * room.f_frsize
        filler.write_bytes(bytes(free - (size - 1) * index // offsets // PAGE * PAGE))
        outcomes[_save_on_full_disk(run)] += 1
        filler.unlink()
        save_step(run, NEW)
        if latest_step(run) != NEW:
            outcomes["no next save"] += 1
        shutil.rmtree(run)
    return {"checkpoint_bytes": size, "offsets": offsets, "outcomes": dict(outcomes)}


def _save_on_full_disk(run: Path) -> str:
    message = "saved"
    try:
        save_step(run, NEW)
    except UserError as error:
        message = str(error)
    if "No space left on device" not in message:
        return f"not noticed: {message}"
    if latest_step(run) != OLD or not checkpoint.is_whole(run / checkpoint.PREVIOUS):
        return "the old one is lost"
    return "unfinished file left" if any(path.name.endswith(UNFINISHED) for path in run.iterdir()) else "old"


def crash_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of the table."""
    rows = []
    for key, what in (
        ("crashes", "a save ended by SIGKILL at each of its {count} system calls"),
        ("errors", "a save whose {count} calls on files failed in turn with an input/output error"),
    ):
        found = result[key]
        count, good = sum(found.values()), {name: found.get(name, 0) for name in ("old", "new")}
        rows.append(
            {
                "what": what.format(count=count),
                "measured": f"{good['old']} times the old, {good['new']} times the new checkpoint can be loaded",
                "wanted": "old or new",
                "met": sum(good.values()) == count,
            }
        )
    disk = result["full_disk"]
    old = disk["outcomes"].get("old", 0)
    rows.append(
        {
            "what": f"a save on a disk that is full, at {disk['offsets']} places of the checkpoint",
            "measured": f"{old} times the old one can be loaded, said in one line",
            "wanted": "all",
            "met": old == disk["offsets"],
        }
    )
    return rows


@contextlib.contextmanager
def _copy(base: Path) -> Any:
    with tempfile.TemporaryDirectory() as name:
        yield Path(shutil.copytree(base, Path(name, "run")))
