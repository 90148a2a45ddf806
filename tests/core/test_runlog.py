"""What a run leaves behind for people."""

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from core import runlog
from core.errors import UserError
from core.runlog import RunLog, cut_log, draw_curves, draw_term_of_runs, environment, read_log, write_json, write_text


def open_log(folder: Path, step: int = 0, **changes: bool) -> RunLog:
    return RunLog(folder, step=step, evaluated=0, steps=10, batch_size=4, **{"tensorboard": False, **changes})


def test_rows_and_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_log(tmp_path) as log:
        log.train(2, {"loss": 0.1 + 0.2, "loss_cls": math.nan, "lr": 0.01})
        log.val(2, {"AP": 0.25, "AP50": 0.5, "AR1": 0.1})
    train, val = read_log(tmp_path / "log.jsonl")
    assert train["loss"] == 0.1 + 0.2  # every digit
    assert train["loss_cls"] is None
    assert set(train) - set(runlog.MACHINE_FIELDS) == {"step", "split", "loss", "loss_cls", "lr"}
    assert val == {"step": 2, "split": "val", "AP": 0.25, "AP50": 0.5, "AR1": 0.1}
    lines = capsys.readouterr().err.splitlines()  # no terminal: one line each, no bar
    assert lines[0].startswith("step 2/10  loss 0.3000  lr 0.01  ")
    assert lines[1] == "step 2/10  val  AP 0.250  AP50 0.500"


def test_speed_and_time_left_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 110.0, 110.0])
    monkeypatch.setattr(runlog.time, "perf_counter", lambda: next(clock))
    with open_log(tmp_path) as log:
        log.train(5, {"loss": 1.0, "lr": 0.1})  # 5 steps of 4 images in 10 s; 5 steps are left
    row = read_log(tmp_path / "log.jsonl")[0]
    assert row["images_per_second"] == 2.0
    assert row["eta_seconds"] == 10.0


def test_resuming_cuts_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    rows = [{"step": step, "split": "train", "x": step / 3} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "spl')  # killed while writing
    assert read_log(path) == rows
    cut_log(path, 2, 0)
    assert path.read_text() == "".join(json.dumps(row) + "\n" for row in rows[:2])
    with open_log(tmp_path, step=2) as log:
        log.val(3, {"AP": 0.0})
    assert [row["step"] for row in read_log(path)] == [1, 2, 3]
    cut_log(path, 2, 3)
    assert [row["step"] for row in read_log(path)] == [1, 2, 3]
    cut_log(path, 2, 2)  # the evaluation was not finished
    assert [row["step"] for row in read_log(path)] == [1, 2]
    cut_log(path, 0, -1)
    assert path.read_text() == ""


def test_zeros_and_foreign_bytes_at_the_end_of_a_log_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    row = {"step": 1, "split": "train"}
    for rest in (bytes(9), b"\xff\xfe{", b'{"step": 2,'):
        path.write_bytes(json.dumps(row).encode() + b"\n" + rest)
        assert read_log(path) == [row]


def test_rows_are_on_the_disk_before_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    with open_log(tmp_path) as log:
        log.train(1, {"loss": 1.0, "lr": 0.1})
        monkeypatch.setattr(runlog.os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
        log.sync()
        monkeypatch.undo()
    assert synced == [(tmp_path / "log.jsonl").stat().st_size]


def test_text_is_whole_on_a_failing_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    write_text(path, "old")

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"config.yaml: cannot be saved: No space left on device"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "metrics.json", {"best": {"AP": math.nan, "step": 3}})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"best": {"AP": None, "step": 3}}


@pytest.mark.parametrize("rows", [0, 1, 200])
def test_curves_of_any_length(tmp_path: Path, rows: int) -> None:
    log: list[dict[str, object]] = []
    for step in range(1, rows + 1):
        loss = None if step == 7 else 1 / step  # a row without a number
        log.append({"step": step, "split": "train", "loss": loss, "loss_cls": loss, "lr": 0.1})
        if step % 50 == 0:
            log.append({"step": step, "split": "val", "AP": step / 400, "AP50": None})
    draw_curves(log, tmp_path / "curves.png", "toy")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1540, 728)
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 10
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_environment_names_what_a_reader_needs() -> None:
    facts = {
        "method": "toy",
        "fingerprint": "f00",
        "licence": "CC0",
        "categories": [[1, "cat"]],
        "model": torch.zeros(1),
    }
    found = environment(torch.device("cpu"), 2, facts)
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (found["ranks"], found["fingerprint"], found["licence"]) == (2, "f00", "CC0")
    assert found["device"].startswith("cpu (")
    assert found["command"].startswith("python ")
    assert "categories" not in found
    json.dumps(found)


def test_commit_is_this_trees_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = runlog.commit()
    if found != "not in git":
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
        assert found.removesuffix("+changes") == head.stdout.strip()
    subprocess.run(["git", "init", "-q", tmp_path], check=True)  # a copy inside a foreign repository
    monkeypatch.setattr(runlog, "__file__", str(tmp_path / "runlog.py"))
    assert runlog.commit() == "not in git"


def test_tensorboard_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"tensorboard: not installed; pip install \"anchorage\[loggers\]\""):
        open_log(tmp_path, tensorboard=True)


def test_tensorboard_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with open_log(tmp_path, tensorboard=True) as log:
        log.train(1, {"loss": 1.0, "lr": 0.1})
    assert any((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("lengths", [(0,), (1,), (200,), (1, 200), (3, 3, 3, 3, 3, 3, 3)])
def test_a_term_of_any_number_of_runs(lengths: tuple[int, ...], tmp_path: Path) -> None:
    runs: dict[str, list[dict[str, object]]] = {
        f"run {place}": [{"step": step, "loss_box": None if step == 7 else 1 / step} for step in range(1, length + 1)]
        for place, length in enumerate(lengths)
    }
    path = tmp_path / "new" / "term.png"  # the folder is made
    draw_term_of_runs(runs, "loss_box", path, "toy")
    with Image.open(path) as picture:
        assert picture.size == (980, 560)
    assert [part.name for part in path.parent.iterdir()] == ["term.png"]
