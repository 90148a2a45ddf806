"""Two processes train as one does with the same global batch, also where one of them never sees an object."""

from pathlib import Path

import pytest
import torch

from tests.runs import METHODS, TINY, read_checkpoint, read_log, run

STEPS = 4


def write_half_empty(folder: Path) -> None:
    """Drawn images of which every second has lost its boxes."""
    import json

    run("core.data", "shapes", str(folder), "--train", "8", "--val", "2", "--test", "1")
    path = folder / "annotations" / "instances_train.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = {image["id"] for image in content["images"][::2]}
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] in kept]
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one(method: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_half_empty(data)
    results = {}
    for ranks in (1, 2):
        out = tmp_path / f"ranks-{ranks}"
        schedule = ("--steps", str(STEPS), "--batch-size", "2", "--empty-images", "keep", "--workers", "0")
        run(f"{method}.train", "--data", str(data), *TINY, *schedule, "--out", str(out), ranks=ranks)
        results[ranks] = read_log(out), read_checkpoint(out)
    # Gradients are summed in another order: float32 rounding, grown over four steps.
    for one, two in zip(results[1][0], results[2][0], strict=True):
        assert one.pop("split") == two.pop("split")
        if "loss" in one:
            assert one == pytest.approx(two, rel=1e-4, abs=1e-6)
    one, two = results[1][1]["model"], results[2][1]["model"]
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
