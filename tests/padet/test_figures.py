"""Pictures of Figs. 4 and 6: which cell's places are read, scores of levels, the command."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from core.types import Batch
from padet.figures import sampled_anchors, sampled_places, score_maps
from padet.losses import assign
from tests.padet.test_visualize import CONFIG, random_batch, tiny_run


def test_sampled_places_by_hand() -> None:
    """Row 1, column 2 of stride 8 has its centre at (20, 12); one cell down moves the first place by 8 pixels of y."""
    offsets = torch.zeros(18, 3, 4)
    offsets[0, 1, 2], offsets[17, 1, 2] = 1.0, -0.5  # dy of the first place, dx of the last
    regular, aligned = sampled_places(offsets, 1, 2, 8.0)
    assert regular.tolist() == [[x, y] for y in (4.0, 12.0, 20.0) for x in (12.0, 20.0, 28.0)]
    assert aligned[0].tolist() == [12.0, 12.0]
    assert aligned[8].tolist() == [24.0, 20.0]
    np.testing.assert_array_equal(aligned[1:8], regular[1:8])


def test_sampled_anchors_and_score_maps() -> None:
    """The largest object first, its best promoted anchor, in the cell that the anchor is centred on."""
    outputs, targets = random_batch()
    sides = outputs.anchors.sides[:3]
    outputs = outputs._replace(offsets=tuple(torch.zeros(2, 18, side, side) for side in sides))
    after = assign(outputs, targets, CONFIG)[1]
    images = torch.zeros(2, 3, 192, 192, dtype=torch.uint8)
    batch = Batch(images, targets.sizes, *targets[:3], torch.arange(2), targets.sizes)
    found = sampled_anchors(outputs, batch, after)
    assert len(found) > 0
    areas = [float(np.prod(one.object[2:] - one.object[:2])) for one in found]
    assert areas == sorted(areas, reverse=True)
    for one in found:
        np.testing.assert_allclose(one.regular[4], (one.initial[:2] + one.initial[2:]) / 2, atol=1e-4)
        np.testing.assert_array_equal(one.regular, one.aligned)
        assert 0 <= one.level < 3
    maps = score_maps(outputs)
    assert [level.shape for level in maps] == [(side, side) for side in outputs.anchors.sides]
    assert outputs.apm_logits is not None
    assert maps[0][0, 1] == pytest.approx(float(outputs.apm_logits[0, 6:12].sigmoid().max()))
    assert maps[-1][0, 0] == pytest.approx(float(outputs.apm_logits[0, -4:].sigmoid().max()))
    assert score_maps(outputs._replace(apm_logits=None)) == []


def test_command_draws_both_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from padet.visualize import main

    weights, _ = tiny_run(tmp_path)
    monkeypatch.setattr(sys, "argv", ["visualize", str(weights), "000001.png", "--device", "cpu"])
    main()
    out = weights.parent / "visualize-val"
    assert (out / "000001.png").stat().st_size > 1000
    assert (out / "more" / "000001.png").stat().st_size > 1000
