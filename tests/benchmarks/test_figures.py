"""Figures from run folders: which runs compare, what they are called, that both are drawn."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import figures
from core.configfile import to_yaml
from core.errors import UserError
from core.runlog import COLOURS
from dynamic_atss.config import PRESETS


def write_run(folder: Path, preset: str, losses: list[float | None]) -> Path:
    """A run folder with a log of these box losses, an evaluation among them."""
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(PRESETS[preset]), encoding="utf-8")
    rows = [{"step": step, "split": "train", "loss_box": loss} for step, loss in enumerate(losses, 1)]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, {"step": 9, "split": "val", "AP": 0.1}])
    (folder / "log.jsonl").write_text(text, encoding="utf-8")
    return folder


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.figures", *map(str, arguments)])
    figures.main()


def colours_of(path: Path) -> set[str]:
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    return {f"#{bytes(pixel).hex()}" for pixel in np.unique(pixels, axis=0)}


def test_both_runs_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = write_run(tmp_path / "a", "atss_r50_1x", [1.0, 0.9, None, 0.7, 0.6])
    combined = write_run(tmp_path / "b", "combined", [1.0, 0.8, 0.6, 0.5])
    call(monkeypatch, "dynamic-box-loss", plain, combined, "--out", tmp_path / "loss.png")
    assert {COLOURS[0], COLOURS[1]} <= colours_of(tmp_path / "loss.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "loss.png"]


def test_runs_are_named_after_what_they_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {preset: figures.label(config) for preset, config in PRESETS.items()}
    assert names["atss_r50_1x"] == "ATSS"
    assert names["combined"] == "ATSS + Combined IoUs"
    assert names["predicted_only"] == "ATSS + predicted IoUs only"
    assert names["weights_up_down"] == "ATSS + Combined IoUs, D_up and D_down"
    assert names["gflv2_combined_r50_1x"] == "GFLV2 + Combined IoUs"
    assert names["vfnet_r50_1x"] == "VFNet"
    drawn: list[str] = []
    monkeypatch.setattr(figures, "draw_term_of_runs", lambda rows, *_: drawn.extend(rows))
    seeds = [write_run(tmp_path / name, "combined", [1.0]) for name in ("combined-0", "combined-1")]
    figures.dynamic_box_loss(seeds, tmp_path / "x.png")
    assert drawn == ["ATSS + Combined IoUs (combined-0)", "ATSS + Combined IoUs (combined-1)"]


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = write_run(tmp_path / "a", "atss_r50_1x", [1.0])
    branch = write_run(tmp_path / "b", "r50_1x", [1.0])
    host = write_run(tmp_path / "c", "vfnet_r50_1x", [1.0])
    silent = write_run(tmp_path / "d", "combined", [None])
    out = ("--out", tmp_path / "x.png")
    for arguments, message in (
        ((plain, branch, *out), "b: has quality iou and .*a centerness: their box losses do not compare"),
        ((plain, host, *out), "c: has host vfnet and .*a atss"),
        ((plain, silent, *out), "log.jsonl: no training row has loss_box"),
        ((plain, plain, *out), "a: the same run twice"),
        ((plain, tmp_path, *out), "no run folder, it has no config.yaml"),
        ((plain, silent, "--out", "x.pdf"), "--out x.pdf: a figure is a .png file"),
    ):
        with pytest.raises(UserError, match=message) as error:
            call(monkeypatch, "dynamic-box-loss", *arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no figure named 'dynamic-bx-loss'; did you mean 'dynamic-box-loss'"):
        call(monkeypatch, "dynamic-bx-loss", plain, branch, *out)
    assert not (tmp_path / "x.png").exists()


def test_another_methods_run_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", "combined", [1.0])
    text = (run / "config.yaml").read_text(encoding="utf-8").replace("host: atss", "scheme: c")
    (run / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"config.yaml: unknown field 'scheme'"):
        figures.dynamic_box_loss([run, run], tmp_path / "x.png")
