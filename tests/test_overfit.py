"""A detector memorises four drawn images: data, model, assignment, loss, optimiser, detections and AP fit together."""

import json
from pathlib import Path

import pytest

from tests.runs import METHODS, SQUARES, call, read_log, run


@pytest.mark.parametrize("method", METHODS)
def test_memorises_four_images(method: str, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    run("core.data", "shapes", str(data), "--train", "4", "--val", "1", "--test", "1", "--seed", "3")
    sides = (
        ("--size", "192", "--augment", "none") if method in SQUARES else ("--short-side", "96", "--long-side", "192")
    )
    network = ("--preset", "quick", "--channels", "64", *sides)
    schedule = ("--steps", "160", "--batch-size", "4", "--log-every", "10", "--workers", "0")
    run(f"{method}.train", "--data", str(data), *network, *schedule, "--device", "cpu", "--out", str(out))
    losses = [row["loss"] for row in read_log(out) if row["split"] == "train"]
    assert losses[-1] < losses[0] / 2
    call(f"{method}.evaluate", str(out / "last.pt"), "--split", "train", "--out", str(tmp_path / "train"))
    metrics = json.loads((tmp_path / "train" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["AP50"] >= 0.8
