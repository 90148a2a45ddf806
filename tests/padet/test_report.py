"""Published numbers of PADet, and the command."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from core.config import with_warmup_steps
from core.configfile import to_yaml
from core.errors import UserError
from core.published import Published, PublishedTable, read_published
from padet import report
from padet.config import PRESETS
from padet.report import RESULTS
from tests.runs import ROOT, run, tiny

# our own shorter schedule and rows that the paper does not have
NOT_THE_PAPERS = ("small", "quick", "vgg16_384_quarter", "baseline_mined", "fam_alone")
SPECIFICATION = ROOT / "docs" / "specs" / "padet.md"


@pytest.fixture(scope="module")
def published() -> Published:
    return read_published(RESULTS, PRESETS)


def table_of(published: Published, name: str) -> PublishedTable:
    return next(table for table in published.tables if table.name == name)


def numbers_of(table: PublishedTable) -> list[list[str]]:
    return [[number.text for number in row.values.values()] for row in table.rows]


# Published numbers


@pytest.mark.consistency
def test_published_numbers_are_sound_and_every_preset_of_the_paper_has_a_row(published: Published) -> None:
    named = {row.preset for table in published.tables for row in table.rows}  # reading refuses unknown ones
    assert named - {""} == set(PRESETS) - set(NOT_THE_PAPERS)


@pytest.mark.consistency
def test_every_source_is_used(published: Published) -> None:
    used = {s for table in published.tables for row in table.rows for n in row.values.values() for s in n.sources}
    assert used == set(published.sources)


def specified(header: str) -> list[list[str]]:
    """The cells of the table in section 6 of the specification whose header begins so, row by row."""
    text = SPECIFICATION.read_text(encoding="utf-8")
    text = text[text.index("\n## 6. Published results") : text.index("\n## 7. ")]
    lines = text[text.index(f"\n| {header} |") + 1 :].splitlines()[2:]
    end = next(place for place, line in enumerate(lines) if not line.startswith("|"))
    return [[cell.strip().replace("\u2013", "none") for cell in line.strip("|").split("|")] for line in lines[:end]]


def test_tables_1_and_2_are_those_of_the_specification(published: Published) -> None:
    rows = specified("T1 variant")
    assert numbers_of(table_of(published, "table-1")) == [cells[1:7] for cells in rows]
    assert numbers_of(table_of(published, "table-2")) == [cells[9:15] for cells in rows[:5]]
    assert len(rows) == 6


def test_tables_3_and_4_are_those_of_the_specification(published: Published) -> None:
    rows = specified("T3")
    assert numbers_of(table_of(published, "table-3")) == [cells[1:6] for cells in rows[:3]]
    areas = [cells[9:15] for cells in rows]  # small, medium and large of the baseline, then of the whole method
    by_iou = [*zip(*areas[:3], strict=True), *zip(*areas[3:], strict=True)]
    assert numbers_of(table_of(published, "table-4")) == [list(cells) for cells in by_iou]


def test_table_5_is_that_of_the_specification(published: Published) -> None:
    text = SPECIFICATION.read_text(encoding="utf-8")
    sentence = re.search(r"^Table 5, VOC07 test mAP: (.*?)\.\n", text, flags=re.MULTILINE | re.DOTALL)
    assert sentence
    expected = re.findall(r"\d\d\.\d", sentence[1])
    assert [cells[0] for cells in numbers_of(table_of(published, "table-5"))] == expected
    assert len(expected) == 9


def test_table_6_and_val2017_are_those_of_the_specification(published: Published) -> None:
    ours, others = specified("Backbone"), specified("Method")
    assert numbers_of(table_of(published, "table-6")) == [cells[2:9] for cells in (*others, *ours)]
    assert numbers_of(table_of(published, "readme-val")) == [[cells[9]] for cells in ours]


def test_rows_of_tables_1_and_2_name_the_runs_that_they_describe(published: Published) -> None:
    """Components of each preset, from the specification's sections 3.2 and 3.3."""
    runs = [PRESETS[row.preset] for row in table_of(published, "table-1").rows]
    sources = ["none", "implicit", "explicit_l", "explicit_s", "explicit_ls", "disentangled"]
    assert [config.fam for config in runs] == sources
    assert all(config == replace(PRESETS["vgg16_384"], fam=config.fam) for config in runs)
    runs = [PRESETS[row.preset] for row in table_of(published, "table-2").rows]
    ticks = [(config.apm_score, config.apm_box, config.fam != "none") for config in runs]
    assert ticks == [(False,) * 3, (True, False, False), (False, True, False), (True, True, False), (True,) * 3]


def test_rows_name_backbone_size_and_data(published: Published) -> None:
    for name in ("table-5", "table-6", "readme-val"):
        for row in table_of(published, name).rows:
            if row.preset:
                config = PRESETS[row.preset]
                backbone = {"vgg16": "VGG-16", "resnet101": "ResNet-101"}[config.backbone]
                assert row.label.removeprefix("PADet, ") == f"{backbone}, {config.size}"
                assert config.anchors == ("voc" if name == "table-5" else "coco")


# The command


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["padet.report", *arguments])
    report.main()


def test_a_tiny_run_from_training_to_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    run("core.data", "shapes", str(data), "--train", "4", "--val", "2", "--test", "0")
    length = ("--steps", "2", "--batch-size", "2", "--workers", "0")
    run("padet.train", "--data", str(data), *tiny("padet"), *length, "--out", str(out))
    call(monkeypatch, str(out), "--out", str(tmp_path / "report.md"))
    said = capsys.readouterr().out
    table, _, others = said.partition("## Runs that differ")
    assert "not measured" in table
    assert f"`{out}`" in others
    assert "data data instead of coco" in others
    assert (out / "positives.png").exists()
    assert (tmp_path / "report.md").exists()


@pytest.mark.parametrize(
    ("preset", "data", "metric", "rows"),
    [
        ("vgg16_384", "coco", "AP", 4),  # tables 1, 2, 4 and the project's page; table 3 wants AP50
        ("baseline", "coco", "AP50", 3),  # tables 2 and 3, and its APs in table 4
        ("r101_512", "coco", "AP", 1),
        ("voc_vgg16_384", "VOC07+12", "VOC07", 1),
    ],
)
def test_a_full_run_would_stand_in_its_rows(
    preset: str,
    data: str,
    metric: str,
    rows: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = replace(with_warmup_steps(PRESETS[preset], 117_266), preset=preset, data="elsewhere", seed=4)
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    images = 5000 if data == "coco" else 4952
    facts = {metric: 0.3987, "APs": 0.1, "data": data, "split": "val", "images": images}
    (tmp_path / "evaluate-val").mkdir()
    (tmp_path / "evaluate-val" / "metrics.json").write_text(json.dumps(facts), encoding="utf-8")
    call(monkeypatch, str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    name = {"VOC07": "VOC07 mAP"}.get(metric, metric)
    measured = [line for line in lines if f"{name} 39.9" in line or "APs 10.0" in line]
    assert len(measured) == rows
    assert all(f"`{preset}`" in line for line in measured)
    assert not any("Runs that differ" in line for line in lines)


def test_a_devkit_of_one_year_is_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(PRESETS["voc_vgg16_384"], preset="voc_vgg16_384")
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (tmp_path / "evaluate-val").mkdir()
    facts = {"VOC07": 0.7, "AP": 0.4, "data": "VOC07", "split": "val", "images": 4952}
    (tmp_path / "evaluate-val" / "metrics.json").write_text(json.dumps(facts), encoding="utf-8")
    call(monkeypatch, str(tmp_path))
    assert "data VOC07 instead of VOCdevkit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("runs/x", "--submission", "d.json"), "RUN_DIR and --submission do not go together"),
        (("--submission", "d.json", "--name", "x"), "--submission needs --image-info too"),
        (("nowhere",), "nowhere: no such folder"),
    ],
)
def test_mistakes(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        call(monkeypatch, *arguments)
    assert "\n" not in str(error.value)


def test_submission_prints_the_published_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = {"id": 7, "file_name": "a.jpg", "height": 9, "width": 9}
    info = {"images": [image], "categories": [{"id": 1, "name": "person"}]}
    (tmp_path / "info.json").write_text(json.dumps(info))
    detection = {"image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}
    (tmp_path / "d.json").write_text(json.dumps([detection]))
    flags = ("--image-info", str(tmp_path / "info.json"), "--name", "mine", "--out", str(tmp_path / "s.zip"))
    call(monkeypatch, "--submission", str(tmp_path / "d.json"), *flags)
    said = capsys.readouterr().out
    assert (tmp_path / "s.zip").exists()
    assert re.search(r"^\| PADet, ResNet-101, 512 .* 28\.6 .* 40\.0 .* server closed", said, flags=re.MULTILINE)
    assert "val2017" not in said
