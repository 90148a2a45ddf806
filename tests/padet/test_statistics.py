"""Counts of positives and negatives: by hand, against a loop over anchors, and the command."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.boxes import box_iou
from core.data.loader import eval_batches
from core.shapes import shapes_table
from core.types import Assignment, Targets
from padet import statistics
from padet.balance import (
    IOU_NAMES,
    add_up,
    boxes_per_image,
    count,
    describe,
    initial_sums,
    report_lines,
    setting_sums,
    table_targets,
)
from padet.config import SMALL, Config
from padet.model import Outputs, promoted_anchors
from tests.padet.test_assigner import match_by_loop
from tests.padet.test_visualize import random_batch, tiny_run

CONFIG = Config(size=192, backbone="resnet18")


def test_counts_by_hand() -> None:
    """Boxes of IoU 1, 1/2 and 1/4 with their object, one of IoU 0, one ignored; an image without objects."""
    square = [0.0, 0, 10, 10]
    boxes = torch.tensor([square, [0.0, 0, 10, 5], [0.0, 0, 5, 5], [50.0, 50, 60, 60], [0.0, 0, 10, 4]])
    objects = torch.tensor([[square], [[0.0] * 4]])
    valid = torch.tensor([[True], [False]])
    targets = Targets(objects, torch.zeros(2, 1, dtype=torch.int64), valid, torch.full((2, 2), 192))
    gt_index = torch.tensor([[0, 0, 0, -1, -2], [-1] * 5])
    sums = count(Assignment(gt_index, gt_index), boxes, targets)
    assert sums.tolist() == [1, 3, 1, 1, 1, 1, 0, 0, 0, 1]
    found = describe(sums + sums)
    assert found["images"] == 2
    assert (found["positives"], found["negatives"], found["ignored"]) == (3, 1, 1)
    assert found["negatives_per_positive"] == pytest.approx(1 / 3)
    assert found["others_per_positive"] == pytest.approx(2 / 3)
    assert found["positives_by_iou"] == dict(zip(IOU_NAMES, [1, 1, 0, 0, 0, 1], strict=True))


@pytest.mark.parametrize("valid", [torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 0, dtype=torch.bool)])
def test_nothing_has_no_mean(valid: torch.Tensor) -> None:
    outputs, targets = random_batch()
    objects = valid.shape[1]
    empty = targets._replace(boxes=targets.boxes[:, :objects], labels=targets.labels[:, :objects], valid=valid)
    found = {name: describe(sums) for name, sums in setting_sums(outputs, empty, CONFIG).items()}
    assert list(found) == ["initial", "APM_C", "APM_R", "APM_CR"]
    assert all(
        one["images"] == 0 and one["positives"] is one["negatives_per_positive"] is None for one in found.values()
    )
    assert "none" in report_lines(found)[1]


def count_by_loop(outputs: Outputs, targets: Targets, promote: bool, score: bool) -> list[float]:
    """What `count` sums, anchor by anchor."""
    total = [0.0] * (4 + len(IOU_NAMES))
    assert outputs.apm_logits is not None
    for image in range(len(targets.valid)):
        boxes = promoted_anchors(outputs)[image] if promote else outputs.anchors.boxes
        objects = targets.boxes[image][targets.valid[image]]
        owners = match_by_loop(boxes, objects)
        total[0] += 1
        for anchor, owner in enumerate(owners):
            easy = score and float(outputs.apm_logits[image, anchor].sigmoid()) < 0.01
            if owner >= 0:
                total[1] += 1
                iou = float(box_iou(boxes[anchor], objects[owner]))
                total[4 + sum(iou >= edge for edge in (0.5, 0.6, 0.7, 0.8, 0.9))] += 1
            elif owner == -1 and not easy:
                total[2] += 1
            else:
                total[3] += 1
    return total


def test_settings_against_a_loop() -> None:
    outputs, targets = random_batch()
    some = slice(-300, None)  # the loop is slow
    assert outputs.apm_logits is not None
    assert outputs.apm_deltas is not None
    outputs = outputs._replace(
        apm_logits=outputs.apm_logits[:, some],
        apm_deltas=outputs.apm_deltas[:, some],
        anchors=outputs.anchors._replace(boxes=outputs.anchors.boxes[some]),
    )
    found = setting_sums(outputs, targets, CONFIG)
    for name, promote, score in (
        ("initial", False, False),
        ("APM_C", False, True),
        ("APM_R", True, False),
        ("APM_CR", True, True),
    ):
        assert found[name].tolist() == count_by_loop(outputs, targets, promote, score), name
    assert len({tuple(sums.tolist()) for sums in found.values()}) == 4


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"apm_logits": None}, ["initial", "APM_R"]),
        ({"apm_deltas": None}, ["initial", "APM_C"]),
        ({"apm_logits": None, "apm_deltas": None}, ["initial"]),
    ],
)
def test_a_model_has_the_settings_of_its_parts(changes: dict[str, Any], names: list[str]) -> None:
    outputs, targets = random_batch()
    assert list(setting_sums(outputs._replace(**changes), targets, CONFIG)) == names


def test_initial_counts_are_those_of_read_images() -> None:
    """Boxes from the table alone give what the loader's batches give."""
    table, config = shapes_table("val", 12, 0), replace(SMALL, data="shapes", workers=0, batch_size=5)
    read = add_up(initial_sums(batch.targets, config) for batch in eval_batches(table, config))
    told = add_up(initial_sums(targets, config) for targets in table_targets(table, config))
    assert told["initial"].tolist() == read["initial"].tolist()
    assert told["initial"][0] == 12


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["statistics", *words, "--device", "cpu", "--workers", "0"])
    statistics.main()


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    weights, data = tiny_run(tmp_path)
    run(monkeypatch, str(weights), "--steps", "1", "--batch-size", "2")
    record = json.loads((weights.parent / "anchors-train.json").read_text())
    assert list(record["settings"]) == ["initial", "APM_C", "APM_R", "APM_CR"]
    assert record["settings"]["initial"]["images"] == 2
    assert record["weights"] == str(weights)
    out = tmp_path / "new" / "initial.json"
    run(monkeypatch, "--preset", "quick", "--data", str(data), "--out", str(out))
    assert json.loads(out.read_text())["settings"]["initial"]["positives"] > 1
    assert "means over 3 images with objects of data val" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "error: give either WEIGHTS or --preset"),
        (["best.pt", "--preset", "quick"], "error: give either WEIGHTS or --preset"),
        (["--preset", "quick", "--steps", "0"], "error: --steps must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *words)
    assert capsys.readouterr().err.startswith(message)


def test_objects_of_images_that_have_any() -> None:
    """Images whose boxes are all crowd have none."""
    table = shapes_table("val", 3, 0)
    assert boxes_per_image(table) == len(table.labels) / 3
    crowd = table.crowd.copy()
    crowd[table.box_slice(0)] = True
    assert boxes_per_image(replace(table, crowd=crowd)) == (~crowd).sum() / 2
    assert boxes_per_image(replace(table, crowd=np.ones_like(crowd))) == 0.0
