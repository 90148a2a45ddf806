"""Checkpoints: whole or refused."""

import errno
import os
import pickle
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from core import checkpoint
from core.errors import UserError

CONTENT: dict[str, Any] = {
    "method": "toy",
    "model": {"weight": torch.arange(6.0).reshape(2, 3)},
    "nested": [(1, 2.5, None, True, "x"), {3: {}}],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "a.pt", CONTENT)
    return tmp_path / "a.pt"


def refuse(path: Path, message: str, **kwargs: Any) -> UserError:
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.load(path, **kwargs)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return caught.value


def test_round_trip(file: Path) -> None:
    content = checkpoint.load(file, method="toy")
    assert torch.equal(content.pop("model")["weight"], CONTENT["model"]["weight"])
    assert content == {key: value for key, value in CONTENT.items() if key != "model"}
    plain = torch.load(file, weights_only=True)
    assert plain["format"] == checkpoint.FORMAT
    assert os.listdir(file.parent) == ["a.pt"]


def test_every_flipped_bit_is_found(file: Path) -> None:
    whole = file.read_bytes()
    for index in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[index] ^= 1 << index % 8
        file.write_bytes(damaged)
        with pytest.raises(UserError):
            checkpoint.load(file)
        assert not checkpoint.is_whole(file)


@pytest.mark.parametrize("change", ["cut one", "cut trailer", "cut half", "add one", "add zeros", "empty"])
def test_lost_and_added_bytes_are_found(file: Path, change: str) -> None:
    whole = file.read_bytes()
    file.write_bytes(
        {
            "cut one": whole[:-1],
            "cut trailer": whole[: -checkpoint.TRAILER_BYTES],
            "cut half": whole[: len(whole) // 2],
            "add one": whole + b"x",
            "add zeros": whole + bytes(100),
            "empty": b"",
        }[change]
    )
    assert isinstance(refuse(file, "damaged"), checkpoint.CorruptCheckpoint)
    assert not checkpoint.is_whole(file)


class Hostile:
    """Runs a command when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("wrapped", ["pickle", "torch", "with our checksum"])
def test_pickle_that_would_run_code_is_refused(tmp_path: Path, wrapped: str) -> None:
    path, marker = tmp_path / "hostile.pt", tmp_path / "executed"
    if wrapped == "pickle":
        path.write_bytes(pickle.dumps({"format": 1, "model": Hostile(marker)}, protocol=2))
    else:
        torch.save({"format": 1, "model": Hostile(marker)}, path)
    if wrapped == "with our checksum":
        import hashlib

        data = path.read_bytes()
        path.write_bytes(data + checkpoint.MARK + hashlib.sha256(data).digest())
    refuse(path, "holds a pickle that would run code when opened; refused")
    assert not marker.exists()


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    refuse(path, "no such checkpoint")
    refuse(tmp_path, "cannot be read: Is a directory")
    path.write_bytes(b"hello world" * 100)
    refuse(path, "not a checkpoint, or a damaged one")
    torch.save({"model": {}}, path)
    refuse(path, "a PyTorch file, but no checkpoint of this project")


def test_other_method_and_newer_format_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(file, "checkpoint of method 'toy', this command needs 'paa'", method="paa")
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    checkpoint.save(file, CONTENT)
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    refuse(file, "checkpoint format 2 is newer than 1")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.float64(1), r"content\['x'\] is a float64"),
        (np.zeros(2), r"content\['x'\] is a ndarray"),
        ([{"y": Path("a")}], r"content\['x'\]\[0\]\['y'\] is a PosixPath"),
        ({(1, 2): 3}, r"content\['x'\] has the key \(1, 2\)"),
        (nn.Parameter(torch.zeros(1)), r"content\['x'\] is a Parameter"),
    ],
)
def test_only_plain_values_are_saved(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path / "a.pt", {"x": value})
    assert not any(tmp_path.iterdir())


def save_step(folder: Path, step: int) -> None:
    checkpoint.save_rotating(folder, {"method": "toy", "step": step, "weight": torch.full((100,), float(step))})


def latest_step(folder: Path) -> int:
    content = checkpoint.load_latest(folder, method="toy")
    assert content is not None
    return content["step"]


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_rotation_keeps_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoint.load_latest(tmp_path) is None
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    assert latest_step(tmp_path) == 3
    assert checkpoint.load(tmp_path / "previous.pt")["step"] == 2
    assert not capsys.readouterr().err
    damage(tmp_path / "last.pt")
    assert latest_step(tmp_path) == 2
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path}/last.pt: checkpoint is damaged")


def test_damaged_file_does_not_replace_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    damage(tmp_path / "last.pt")
    save_step(tmp_path, 3)
    assert checkpoint.load(tmp_path / "previous.pt")["step"] == 1
    damage(tmp_path / "last.pt")
    damage(tmp_path / "previous.pt")
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load_latest(tmp_path)


@pytest.mark.parametrize("crash_at", [0, 1])
def test_one_is_loadable_after_a_crash_at_any_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: int
) -> None:
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    renames: list[Any] = []
    rename = os.replace

    def crash(source: Any, target: Any) -> None:
        if len(renames) == crash_at:
            raise KeyboardInterrupt  # passes `except OSError`, as a power cut would
        renames.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_step(tmp_path, 3)
    monkeypatch.undo()
    assert latest_step(tmp_path) == 2
    save_step(tmp_path, 3)
    assert latest_step(tmp_path) == 3


@contextmanager
def small_disk() -> Iterator[None]:
    """Files of this process may not pass 1000 bytes: writing fails half-way, as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_leaves_old_files(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    reason = r"last.pt: cannot be saved: File too large; what was there before is unharmed"
    with pytest.raises(UserError, match=reason), small_disk():
        save_step(tmp_path, 3)
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "previous.pt"]
    assert latest_step(tmp_path) == 2
    assert checkpoint.load(tmp_path / "previous.pt")["step"] == 1


def test_full_disk_at_fsync_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(tmp_path, 1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_step(tmp_path, 2)
    assert os.listdir(tmp_path) == ["last.pt"]
    assert latest_step(tmp_path) == 1


def test_files_that_the_disk_cannot_read_count_as_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    read = Path.read_bytes

    def broken(path: Path) -> bytes:
        if path.name == "last.pt":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", broken)
    assert latest_step(tmp_path) == 1
    assert "last.pt: checkpoint is damaged, the disk cannot read it; going on from" in capsys.readouterr().err
    save_step(tmp_path, 3)
    assert checkpoint.load(tmp_path / "previous.pt")["step"] == 1


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failing_disk_keeps_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """EIO at the n-th fsync (file, folder) or rename (to previous.pt, to last.pt)."""
    real = getattr(os, call)
    for failing in (1, 2):
        folder = tmp_path / str(failing)
        for step in (1, 2):
            save_step(folder, step)
        calls = []

        def fail(*arguments: Any, failing: int = failing, calls: list[Any] = calls) -> None:
            calls.append(arguments)
            if len(calls) == failing:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(UserError, match="cannot be saved: Input/output error"):
                save_step(folder, 3)
        assert latest_step(folder) in (2, 3)
        assert not list(folder.glob(".*"))
        save_step(folder, 4)
        assert latest_step(folder) == 4


def test_two_damaged_checkpoints_are_one_line_with_a_way_out(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    damage(tmp_path / "last.pt")
    damage(tmp_path / "previous.pt")
    with pytest.raises(checkpoint.CorruptCheckpoint) as caught:
        checkpoint.load_latest(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/last.pt: checkpoint is damaged")
    assert f"; {tmp_path}/previous.pt: checkpoint is damaged" in message
    assert message.endswith("choose another --out, with --weights best.pt to start from the best model")


def test_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"a.pt: cannot be saved: File exists"):
        checkpoint.save(tmp_path / "file" / "a.pt", CONTENT)


def test_weights_of_another_layout_are_refused(file: Path) -> None:
    with pytest.raises(UserError, match=r"a.pt: has no tensor bias"):
        checkpoint.load_weights(nn.Linear(3, 2), CONTENT, file)
    with pytest.raises(UserError, match=r"has an unknown tensor weight"):
        checkpoint.load_weights(nn.Identity(), CONTENT, file)
    with pytest.raises(UserError, match=r"tensor weight is \(2, 3\), this model needs \(5, 3\)"):
        checkpoint.load_weights(nn.Linear(3, 5, bias=False), CONTENT, file)
    layer = nn.Linear(3, 2, bias=False)
    checkpoint.load_weights(layer, CONTENT, file)
    assert torch.equal(layer.weight, CONTENT["model"]["weight"])
