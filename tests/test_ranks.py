"""Two processes train as one does with the same global batch, also where one of them never sees an object."""

import json
from pathlib import Path

import pytest
import torch

from core.config import PyramidConfig
from core.data.sampler import training_sampler
from core.data.sources import open_data
from tests.runs import FROZEN_NORM, METHODS, call, read_checkpoint, read_log, run, tiny

STEPS = 4


def write_half_empty(folder: Path) -> None:
    """Drawn images of which those that the second of two ranks gets in the first steps have lost their boxes."""
    run("core.data", "shapes", str(folder), "--train", "8", "--val", "2", "--test", "1")
    table = open_data(str(folder)).train
    config = PyramidConfig(steps=STEPS, batch_size=2, empty_images="keep")
    emptied = {
        int(table.image_ids[training_sampler(table, config).batch(step).images[1]]) for step in range(1, STEPS + 1)
    }
    path = folder / "annotations" / "instances_train.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] not in emptied]
    assert content["annotations"]
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one(method: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_half_empty(data)
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
