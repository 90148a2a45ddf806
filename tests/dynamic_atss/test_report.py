"""Published numbers of Dynamic ATSS and its hosts, and the command."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from core.configfile import to_yaml
from core.errors import UserError
from core.published import Published, PublishedTable, read_published
from dynamic_atss.config import PRESETS
from dynamic_atss.report import RESULTS
from tests.runs import ROOT, TINY, call, run

NOT_THE_PAPERS = ("small", "quick")
PARTS = ("anchor_weight", "pred_weight", "class_loss", "quality")  # what the rows of Table 2 differ in
SPECIFICATION = ROOT / "docs" / "specs" / "dynamic_atss.md"


@pytest.fixture(scope="module")
def published() -> Published:
    return read_published(RESULTS, PRESETS)


def table_of(published: Published, name: str) -> PublishedTable:
    return next(table for table in published.tables if table.name == name)


# Published numbers


@pytest.mark.consistency
def test_published_numbers_are_sound_and_every_preset_of_the_paper_has_a_row(published: Published) -> None:
    named = {row.preset for table in published.tables for row in table.rows}  # reading refuses unknown ones
    assert named - {""} == set(PRESETS) - set(NOT_THE_PAPERS)


@pytest.mark.consistency
def test_every_source_is_used(published: Published) -> None:
    used = {s for table in published.tables for row in table.rows for n in row.values.values() for s in n.sources}
    assert used == set(published.sources)


def specified_rows(number: int) -> list[list[str]]:
    """The cells of a table of section 6 of the specification, row by row."""
    text = SPECIFICATION.read_text(encoding="utf-8")
    lines = text[text.index(f"\nTable {number} [P]") + 1 :].splitlines()[3:]
    end = next(place for place, line in enumerate(lines) if not line.startswith("|"))
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines[:end]]


@pytest.mark.parametrize(("number", "count"), [(1, 4), (2, 7), (3, 8), (4, 4), (5, 25)])
def test_tables_are_those_of_the_specification(published: Published, number: int, count: int) -> None:
    rows, expected = table_of(published, f"table-{number}").rows, specified_rows(number)
    assert len(rows) == len(expected) == count
    for row, cells in zip(rows, expected, strict=True):
        assert [float(number.text) for number in row.values.values()] == [float(cell) for cell in cells[-6:]], row.label


def test_rows_name_the_runs_that_their_labels_describe(published: Published) -> None:
    """Assignment, class loss and branch of each preset, from the specification's own columns."""
    for row, (anchor, predicted, loss, branch, *_) in zip(
        table_of(published, "table-2").rows, specified_rows(2), strict=True
    ):
        config = PRESETS[row.preset]
        assert (config.anchor_weight, config.pred_weight) == (float(bool(anchor)), float(bool(predicted)))
        assert (config.class_loss, config.quality) == (loss.lower(), branch.lower())
        assert config == replace(PRESETS["r50_1x"], **{name: getattr(config, name) for name in PARTS})
    for row, (predicted, anchor, *_) in zip(table_of(published, "table-3").rows, specified_rows(3), strict=True):
        config = PRESETS[row.preset]
        assert config.pred_schedule == ("up" if predicted == "D_up" else "constant")
        assert config.anchor_schedule == ("down" if anchor == "D_down" else "constant")
        assert config.pred_weight == float(predicted.replace("D_up", "1"))
        assert config.anchor_weight == float(anchor.replace("D_down", "1"))
        assert (config.class_loss, config.quality) == ("focal", "centerness")


def test_rows_of_table_5_name_their_backbone(published: Published) -> None:
    for row, (method, backbone, schedule, *_) in zip(
        table_of(published, "table-5").rows, specified_rows(5), strict=True
    ):
        name = backbone.lower().replace("-", "_") + f"_{schedule}" + "_ms" * (schedule == "2x")
        wanted = {"ATSS": f"atss_{name}", "Dynamic ATSS": name}.get(method, "")
        assert row.preset == wanted, row.label


def test_repositories_numbers(published: Published) -> None:
    """Copied once more, from the specification's section 6."""
    expected = {
        "ATSS, ResNet-50, 1x": ("39.3", "39.3"),
        "ATSS, ResNet-50-DCN, 1x": ("43.2", "43.0"),
        "ATSS, ResNet-101, 2x": ("43.5", "43.6"),
        "GFL, ResNet-50, 1x": ("40.2", "40.3"),
        "GFLV2, ResNet-50, 1x": ("41.0", "41.1"),
        "GFLV2, ResNet-50, 2x, multi-scale training": ("43.9", "44.4"),
        "VFNet, ResNet-50, 1x": ("41.6", "41.6"),
        "VFNet, ResNet-50, 2x, multi-scale training": ("44.5", "44.8"),
        "VFNet, ResNet-50-DCN, 2x, multi-scale training": ("47.8", "48.0"),
    }
    val, test = (table_of(published, f"repositories-{split}").rows for split in ("val", "test-dev"))
    found = {a.label: (a.values["AP"].text, b.values["AP"].text) for a, b in zip(val, test, strict=True)}
    assert found == expected
    others = [row.values["AP"].text for row in table_of(published, "others").rows]
    assert others == ["39.3", "40.2", "39.4", "41.5", "40.2", "42.9", "41.6", "44.8", "48.0"]


# The command


def test_a_tiny_run_from_training_to_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    run("core.data", "shapes", str(data), "--train", "4", "--val", "2", "--test", "0")
    length = ("--steps", "2", "--batch-size", "2", "--workers", "0")
    call("dynamic_atss.train", "--data", str(data), *TINY, *length, "--out", str(out))
    capsys.readouterr()
    call("dynamic_atss.report", str(out), "--out", str(tmp_path / "report.md"))
    said = capsys.readouterr().out
    table, _, others = said.partition("## Runs that differ")
    assert "not measured" in table
    assert f"`{out}`" in others
    assert "data data instead of coco" in others
    assert "IoU error" not in others  # of a method that measures it
    assert (out / "positives.png").exists()
    assert (tmp_path / "report.md").exists()


@pytest.mark.parametrize(
    ("preset", "rows"),
    [("combined", 3), ("atss_r50_1x", 3), ("r50_1x", 1), ("gflv2_r50_1x", 2), ("vfnet_combined_r50_1x", 1)],
)
def test_a_full_run_would_stand_in_its_rows(
    preset: str, rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(PRESETS[preset], preset=preset, data="elsewhere/coco", seed=4)
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    facts = {"AP": 0.3987, "data": "coco", "split": "val", "images": 5000}
    (tmp_path / "evaluate-val").mkdir()
    (tmp_path / "evaluate-val" / "metrics.json").write_text(json.dumps(facts), encoding="utf-8")
    call("dynamic_atss.report", str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    measured = [line for line in lines if "AP 39.9" in line]
    assert len(measured) == rows
    assert all(f"`{preset}`" in line for line in measured)
    assert not any("Runs that differ" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("runs/x", "--submission", "d.json"), "RUN_DIR and --submission do not go together"),
        (("--submission", "d.json", "--name", "x"), "--submission needs --image-info too"),
        (("--trim",), "--trim belongs to --submission"),
        (("nowhere",), "nowhere: no such folder"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        call("dynamic_atss.report", *arguments)
    assert "\n" not in str(error.value)


def test_submission_prints_the_published_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = {"id": 7, "file_name": "a.jpg", "height": 9, "width": 9}
    info = {"images": [image], "categories": [{"id": 1, "name": "person"}]}
    (tmp_path / "info.json").write_text(json.dumps(info))
    detection = {"image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}
    (tmp_path / "d.json").write_text(json.dumps([detection]))
    flags = ("--image-info", str(tmp_path / "info.json"), "--name", "mine", "--out", str(tmp_path / "s.zip"))
    call("dynamic_atss.report", "--submission", str(tmp_path / "d.json"), *flags)
    said = capsys.readouterr().out
    assert (tmp_path / "s.zip").exists()
    assert re.search(r"^\| Dynamic ATSS, ResNet-50-DCN, 1x .* 44\.4 .* server closed", said, flags=re.MULTILINE)
    assert "val2017" not in said
    assert said.endswith("python -m dynamic_atss.report tells what the letters stand for\n")
