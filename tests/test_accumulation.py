"""Every method learns a batch in parts as it learns it at once, also on two ranks."""

from pathlib import Path

import pytest
import torch

from tests.runs import FROZEN_NORM, METHODS, call, read_checkpoint, read_log, run, tiny


@pytest.mark.parametrize("method", METHODS)
def test_parts_equal_the_whole(method: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    run("core.data", "shapes", str(data), "--train", "8", "--val", "2", "--test", "1")
    schedule = ("--steps", "3", "--batch-size", "4", "--workers", "0", "--lr", "0.001")
    network = (*tiny(method), *FROZEN_NORM.get(method, ()))
    arguments = (f"{method}.train", "--data", str(data), *network, *schedule)
    call(*arguments, "--out", str(tmp_path / "whole"))
    if method == METHODS[0]:  # two ranks with two parts each
        run(*arguments, "--accumulate", "2", "--out", str(tmp_path / "parts"), ranks=2)
    else:
        call(*arguments, "--accumulate", "4", "--out", str(tmp_path / "parts"))
    # Gradients are summed in another order: float32 rounding, grown over three steps.
    for whole, parts in zip(read_log(tmp_path / "whole"), read_log(tmp_path / "parts"), strict=True):
        assert whole.pop("split") == parts.pop("split")
        assert whole == pytest.approx(parts, rel=1e-4, abs=1e-6)
    wanted, found = (read_checkpoint(tmp_path / name)["model"] for name in ("whole", "parts"))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
