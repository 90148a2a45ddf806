"""Two processes train as one does with the same global batch, also where one of them never sees an object."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.elastic import drop_boxes
from core.shapes import write_shapes
from tests.runs import FROZEN_NORM, METHODS, call, read_checkpoint, read_log, run, tiny

STEPS = 4


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one(method: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    config = importlib.import_module(f"{method}.config").PRESETS["small"]
    config = replace(config, steps=STEPS, epochs=None, batch_size=2, empty_images="keep")
    write_shapes(data, {"train": 2 * STEPS, "val": 2, "test": 1}, seed=0)
    drop_boxes(data, config, places=slice(1, 2))
    results = {}
    for ranks in (1, 2):
        out = tmp_path / f"ranks-{ranks}"
        schedule = (
            "--steps",
            str(STEPS),
            "--batch-size",
            "2",
            "--empty-images",
            "keep",
            "--workers",
            "0",
            "--lr",
            "0.001",
        )
        network = *tiny(method), *FROZEN_NORM.get(method, ())
        arguments = (f"{method}.train", "--data", str(data), *network, *schedule, "--out", str(out))
        if ranks == 1:
            call(*arguments)
        else:
            run(*arguments, ranks=ranks)
        results[ranks] = read_log(out), read_checkpoint(out)
    # Gradients are summed in another order: float32 rounding, grown over four steps.
    for one, two in zip(results[1][0], results[2][0], strict=True):
        assert one.pop("split") == two.pop("split")
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)
    one, two = results[1][1]["model"], results[2][1]["model"]
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
