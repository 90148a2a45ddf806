"""What PADet's pictures say against the assignment itself, the command, and pictures during a run."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.decisions import OUTCOMES
from core.shapes import write_shapes
from core.types import Targets
from padet.anchors import build_anchors
from padet.config import BASELINE, SMALL, Config
from padet.explain import explain
from padet.losses import assign
from padet.model import Outputs
from padet.train import train

CONFIG = Config(size=192, backbone="resnet18")
TINY = replace(
    SMALL,
    steps=2,
    batch_size=2,
    backbone_weights="none",
    channels=32,
    log_every=1,
    device="cpu",
    workers=0,
    data="shapes",
)


def random_batch(seed: int = 0) -> tuple[Outputs, Targets]:
    """Two images of 192 x 192 with three objects and one; about half of the APM's scores are below theta."""
    generator = torch.Generator().manual_seed(seed)
    anchors = build_anchors(192)
    count = len(anchors.boxes)
    low = torch.rand(2, 3, 2, generator=generator) * 60
    boxes = torch.cat([low, low + 20 + 80 * torch.rand(2, 3, 2, generator=generator)], dim=-1)
    valid = torch.tensor([[True, True, True], [True, False, False]])
    deltas = torch.randn(2, 2, count, 4, generator=generator)
    logits = torch.randn(2, count, generator=generator) - 4.6
    outputs = Outputs(logits, deltas[0], torch.zeros(2, count, 4), deltas[1], (), anchors)
    return outputs, Targets(boxes, torch.tensor([[0, 2, 1], [2, 0, 0]]), valid, torch.full((2, 2), 192))


@pytest.mark.parametrize("score", [True, False])
@pytest.mark.parametrize("box", [True, False])
def test_pictures_show_the_assignment(score: bool, box: bool) -> None:
    """Every positive of either stage is an anchor of its object, with the outcome that it has there."""
    outputs, targets = random_batch()
    outputs = outputs._replace(
        apm_logits=outputs.apm_logits if score else None, apm_deltas=outputs.apm_deltas if box else None
    )
    config = replace(BASELINE, size=192, backbone="resnet18", apm_score=score, apm_box=box)
    before, after = (stage.gt_index for stage in assign(outputs, targets, config))
    level_of = np.repeat(np.arange(3, 8), outputs.anchors.level_sizes)
    explained = explain(outputs, targets, config)
    assert [len(decisions) for decisions in explained] == [3, 1]
    for image, decisions in enumerate(explained):
        for number, one in enumerate(decisions):
            anchors = one.columns["anchor"]
            positives = torch.nonzero(after[image] == number).flatten().tolist()
            assert sorted(anchors[one.where("positive")].tolist()) == positives
            assert one.facts["positives_after"] == len(positives) > 0
            assert (after[image, anchors[one.where("ignored")]] == -2).all()
            assert (after[image, anchors[one.where("negative")]] == -1).all()
            first = torch.nonzero(before[image] == number).flatten().tolist()
            assert one.facts["positives_before"] == len(first)
            assert set(anchors[one.columns["before"] == "positive"].tolist()) <= set(first)
            assert (np.diff(one.scores) <= 0).all()
            assert (one.levels == level_of[anchors]).all()
            assert ("apm_score" in one.columns) == score
            if not box:
                np.testing.assert_array_equal(one.columns["anchor_iou"], one.scores)


def test_promotion_by_hand() -> None:
    """Golden check 5: IoU 0.5454545 before, 0.7461343 after."""
    outputs, _ = random_batch()
    anchors = outputs.anchors._replace(boxes=torch.tensor([[40.0, 30, 60, 70], [140.0, 140, 180, 180]]), sides=(1,))
    anchors = anchors._replace(per_cell=(2,))
    deltas = torch.tensor([[[1.0, -0.5, 1, -1], [0, 0, 0, 0]]])
    boxes = torch.tensor([[[40.0, 32, 70, 62], [140, 140, 180, 170]]])
    targets = Targets(boxes, torch.tensor([[1, 0]]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([[192, 192]]))
    logits, zeros = torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2, 4)
    ((first, second),) = explain(Outputs(logits, deltas, zeros, zeros, (), anchors), targets, CONFIG)
    assert first.columns["anchor_iou"].tolist() == pytest.approx([0.5454545])
    assert first.scores.tolist() == pytest.approx([0.7461343])
    assert first.ious.tolist() == pytest.approx([0.7461343])
    assert first.columns["apm_score"].tolist() == [0.5]
    assert first.centres.tolist() == [[50.0, 50.0]]
    assert [OUTCOMES[code] for code in first.outcomes] == first.columns["before"].tolist() == ["positive"]
    assert second.columns["anchor"].tolist() == [1]
    assert second.scores.tolist() == [0.75]
    assert first.note == "1 anchors reach IoU 0.3; 1 positive before promotion, 1 after"


def test_an_image_without_objects() -> None:
    outputs, targets = random_batch()
    empty = targets._replace(valid=torch.zeros_like(targets.valid))
    assert explain(outputs, empty, CONFIG) == [[], []]


def tiny_run(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """Two steps on a few drawn images: the weights, and the data's folder."""
    write_shapes(folder / "data", {"train": 4, "val": 3, "test": 1}, seed=0)
    train(replace(TINY, data=str(folder / "data"), out=str(folder / "run"), **changes))
    return folder / "run" / "last.pt", folder / "data"


def test_run_draws_and_the_command_shows_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from padet.visualize import main

    weights, _ = tiny_run(tmp_path, picture_every=2)
    assert (weights.parent / "assignments" / "step-000002.png").stat().st_size > 1000
    monkeypatch.setattr(sys, "argv", ["visualize", str(weights), "000001.png", "2", "--device", "cpu"])
    main()
    out = weights.parent / "visualize-val"
    record = json.loads((out / "assignments.json").read_text())
    assert record["method"] == "padet"
    assert [image["image"] for image in record["images"]] == ["000001.png", "000002.png"]
    for image in record["images"]:
        assert (out / image["drawn"]).stat().st_size > 1000
    candidates = [one for image in record["images"] for thing in image["objects"] for one in thing["candidates"]]
    assert {one["before"] for one in candidates} <= set(OUTCOMES)
