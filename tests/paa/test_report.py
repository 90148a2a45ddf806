"""PAA's published numbers, the accuracy of its IoU prediction, and the command."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.anchors import AnchorGrid, anchor_grid, level_shapes
from core.boxes import box_iou, encode_deltas
from core.errors import UserError
from core.nms import Candidates
from core.published import Published, read_published
from core.types import Targets
from paa.config import PRESETS, Config
from paa.iou_accuracy import PredictedIous, best_ious, describe, detection_ious, positive_ious
from paa.model import Outputs
from paa.report import RESULTS
from tests.runs import TINY, call, run

NOT_THE_PAPERS = ("small", "quick")


@pytest.fixture(scope="module")
def published() -> Published:
    return read_published(RESULTS, PRESETS)


# Published numbers


@pytest.mark.consistency
def test_published_numbers_are_sound_and_every_preset_of_the_paper_has_a_row(published: Published) -> None:
    named = {row.preset for table in published.tables for row in table.rows}  # reading refuses unknown ones
    assert named - {""} == set(PRESETS) - set(NOT_THE_PAPERS)


@pytest.mark.consistency
def test_every_source_is_used(published: Published) -> None:
    used = {s for table in published.tables for row in table.rows for n in row.values.values() for s in n.sources}
    assert used == set(published.sources)


def test_published_numbers_of_the_specification(published: Published) -> None:
    """Some numbers copied once more, from docs/specs/paa.md section 9."""

    def number(table: str, label: str, metric: str = "AP") -> str:
        rows = {(t.name, row.label): row for t in published.tables for row in t.rows}
        return rows[table, label].values[metric].text

    assert number("readme-val", "ResNet-50, 1.5x") == "41.1"
    assert number("readme-test-dev", "ResNet-50, 1.5x") == "41.2"
    assert number("readme-val", "ResNeXt-152-32x8d-DCN, 2x, multi-scale test") == "53.0"
    assert number("table-1-modules", "PAA", "AP75") == "42.8"
    assert number("table-1-modules", "PAA + IoU prediction + score voting") == "41.0"
    assert number("table-1-modules", "PAA + centre-ness") == "unknown"
    assert number("table-3", "ResNet-101", "APl") == "56.3"
    assert number("table-3", "ATSS, ResNeXt-101-64x4d-DCN", "APs") == "29.7"
    assert number("table-4", "K = 13") == "unknown"


# Accuracy of the IoU prediction

CANVAS = (64, 64)
CONFIG = Config(short_side=64, long_side=64)


def perfect_outputs(boxes: Tensor, label: int, predicted_iou: float) -> tuple[Outputs, AnchorGrid]:
    """Two classes; every anchor says `label` and the box of its image's only object, and one IoU for all."""
    grid = anchor_grid(level_shapes(CANVAS), CONFIG.box_geometry, scale=8.0)
    deltas = encode_deltas(grid.boxes, boxes.expand_as(grid.boxes), CONFIG.box_geometry)[None]
    logits = torch.full((1, len(grid.boxes), 2), -9.0)
    logits[..., label] = 2.0
    quality = torch.full((1, len(grid.boxes)), math.log(predicted_iou / (1 - predicted_iou)))
    return Outputs(logits, deltas, quality, grid), grid


def one_object(box: list[float], label: int) -> Targets:
    boxes = torch.tensor([[box, [0.0, 0.0, 0.0, 0.0]]])  # the second row is padding
    return Targets(boxes, torch.tensor([[label, 0]]), torch.tensor([[True, False]]), torch.tensor([CANVAS]))


def test_positive_ious_by_hand() -> None:
    # all anchors predict [8, 8, 40, 40]; the object is [8, 8, 40, 24]: IoU 512 / 1024 = 0.5, said to be 0.8
    outputs, _ = perfect_outputs(torch.tensor([8.0, 8.0, 40.0, 40.0]), 1, 0.8)
    found = positive_ious(outputs, one_object([8, 8, 40, 24], 1), CONFIG)
    assert len(found.true) > 0
    torch.testing.assert_close(found.true, torch.full_like(found.true, 0.5), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.predicted, torch.full_like(found.true, 0.8))
    assert describe([found])["mean_absolute_error"] == pytest.approx(0.3, abs=1e-5)


def test_detection_ious_by_hand() -> None:
    # one detection is left of equal boxes
    outputs, _ = perfect_outputs(torch.tensor([8.0, 8.0, 40.0, 40.0]), 1, 0.8)
    same_class = detection_ious(outputs, one_object([8, 8, 40, 24], 1), CONFIG)
    assert same_class.true.tolist() == pytest.approx([0.5], abs=1e-5)
    assert same_class.predicted.tolist() == pytest.approx([0.8])
    other_class = detection_ious(outputs, one_object([8, 8, 40, 24], 0), CONFIG)
    assert other_class.true.tolist() == [0.0]
    padding_only = one_object([8, 8, 40, 24], 1)._replace(valid=torch.tensor([[False, False]]))
    assert detection_ious(outputs, padding_only, CONFIG).true.tolist() == [0.0]
    nothing = Targets(torch.zeros(1, 0, 4), torch.zeros(1, 0).long(), torch.zeros(1, 0).bool(), torch.tensor([CANVAS]))
    assert detection_ious(outputs, nothing, CONFIG).true.tolist() == [0.0]
    assert len(positive_ious(outputs, nothing, CONFIG).true) == 0
    silent = outputs._replace(logits=torch.full_like(outputs.logits, -9.0))
    assert len(detection_ious(silent, one_object([8, 8, 40, 24], 1), CONFIG).true) == 0


@pytest.mark.parametrize("seed", range(3))
def test_best_ious_is_its_slow_twin(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def boxes(*shape: int) -> Tensor:
        corner = 40 * torch.rand(*shape, 2, generator=generator)
        return torch.cat([corner, corner + 1 + 30 * torch.rand(*shape, 2, generator=generator)], dim=-1)

    valid = torch.rand(2, 3, generator=generator) < 0.7
    labels = torch.randint(2, (2, 3), generator=generator)
    targets = Targets(boxes(2, 3), labels, valid, torch.tensor([CANVAS] * 2))
    images, classes = torch.randint(2, (2, 12), generator=generator).unbind()
    found = Candidates(boxes(12), torch.ones(12), classes, images)
    expected = []
    for box, label, image in zip(found.boxes, found.labels, found.images, strict=True):
        best = 0.0
        for row in range(3):
            if valid[image, row] and labels[image, row] == label:
                best = max(best, float(box_iou(box[None], targets.boxes[image, row][None])))
        expected.append(best)
    torch.testing.assert_close(best_ious(found, targets, CONFIG), torch.tensor(expected))


def test_describe_by_hand() -> None:
    parts = [
        PredictedIous(torch.tensor([0.9, 0.5]), torch.tensor([0.7, 0.6])),
        PredictedIous(torch.tensor([]), torch.tensor([])),
        PredictedIous(torch.tensor([0.2]), torch.tensor([0.5])),
    ]
    # errors +0.2, -0.1, -0.3: mean of sizes 0.2, mean -0.0667
    found = describe(parts)
    assert found == {"mean_absolute_error": pytest.approx(0.2), "mean_error": pytest.approx(-0.2 / 3), "count": 3}
    assert describe(parts[1:2]) == {"mean_absolute_error": None, "mean_error": None, "count": 0}


# The command


def test_a_tiny_run_from_training_to_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    run("core.data", "shapes", str(data), "--train", "4", "--val", "2", "--test", "0")
    length = ("--steps", "3", "--batch-size", "2", "--workers", "0")
    call("paa.train", "--data", str(data), *TINY, *length, "--out", str(out))
    call("paa.report", "--iou-accuracy", str(out / "best.pt"), "--workers", "0", "--device", "cpu")
    accuracy = json.loads((out / "iou-accuracy-val.json").read_text(encoding="utf-8"))
    assert accuracy["positives"]["count"] > 0
    assert 0 <= accuracy["positives"]["mean_absolute_error"] <= 1
    assert (accuracy["images"], accuracy["split"]) == (2, "val")
    assert "mean |predicted IoU - IoU|" in capsys.readouterr().out
    call("paa.report", str(out), "--out", str(tmp_path / "report.md"))
    said = capsys.readouterr().out
    table, _, others = said.partition("## Runs that differ")
    assert "not measured" in table
    assert "IoU error 0." not in table
    assert f"`{out}`" in others
    assert "data data instead of coco" in others
    assert (out / "positives.png").exists()
    assert (tmp_path / "report.md").exists()


def test_a_full_run_would_stand_in_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from core.configfile import to_yaml

    config = replace(PRESETS["r50_1p5x"], preset="r50_1p5x", data="elsewhere/coco", seed=4)
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    evaluations = {"val": {}, "val-plain": {"changes": {"score_voting": False}, "AP": 0.40949}}
    for name, content in evaluations.items():
        (tmp_path / f"evaluate-{name}").mkdir()
        facts = {"AP": 0.411, "data": "coco", "split": "val", "images": 5000, **content}
        (tmp_path / f"evaluate-{name}" / "metrics.json").write_text(json.dumps(facts), encoding="utf-8")
    call("paa.report", str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert sum("AP 41.1" in line and "`r50_1p5x`" in line for line in lines) == 4  # tables 1 twice, 4, README
    assert sum("AP 40.9" in line and "`no_voting`" in line for line in lines) == 1
    assert not any("differ" in line for line in lines)


def test_weights_without_iou_branch_are_refused(tmp_path: Path) -> None:
    from dataclasses import asdict

    from core import checkpoint
    from paa.model import PAA

    config = replace(PRESETS["small"], channels=64, quality="centerness", backbone_weights="none", frozen_stages=0)
    content = {"method": "paa", "config": asdict(config), "categories": [[1, "a"]]}
    checkpoint.save(tmp_path / "w.pt", {**content, "model": PAA(config, 1).state_dict()})
    with pytest.raises(UserError, match=r"w.pt: has no IoU branch, it was trained with quality centerness"):
        call("paa.report", "--iou-accuracy", str(tmp_path / "w.pt"), "--device", "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("runs/x", "--iou-accuracy", "w.pt"), "RUN_DIR and --iou-accuracy do not go together"),
        (("--submission", "d.json", "--name", "x"), "--submission needs --image-info too"),
        (("--submission", "d.json", "--image-info", "i.json"), "--submission needs --name too"),
        (("--name", "x"), "--name belongs to --submission"),
        (("--trim",), "--trim belongs to --submission"),
        (("--iou-accuracy", "w.pt", "--out", "x"), "--out does not go with --iou-accuracy"),
        (("--iou-accuracy", "nowhere.pt"), "nowhere.pt: no such checkpoint"),
        (("nowhere",), "nowhere: no such folder"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        call("paa.report", *arguments)
    assert "\n" not in str(error.value)


def test_submission_prints_the_published_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = {"id": 7, "file_name": "a.jpg", "height": 9, "width": 9}
    info = {"images": [image], "categories": [{"id": 1, "name": "person"}]}
    (tmp_path / "info.json").write_text(json.dumps(info))
    detection = {"image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}
    (tmp_path / "d.json").write_text(json.dumps([detection]))
    flags = ("--image-info", str(tmp_path / "info.json"), "--name", "mine", "--out", str(tmp_path / "s.zip"))
    call("paa.report", "--submission", str(tmp_path / "d.json"), *flags)
    said = capsys.readouterr().out
    assert (tmp_path / "s.zip").exists()
    assert "cocoapi issue 691" in said
    assert "server closed" in said
    assert "50.8" in said
    assert "val2017" not in said
