"""TOOD's published numbers, and the command."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from core.configfile import to_yaml
from core.errors import UserError
from core.published import Published, PublishedTable, Row, read_published
from tests.runs import ROOT, TINY, run
from tood_tal import report
from tood_tal.config import PRESETS
from tood_tal.report import RESULTS

NOT_THE_PAPERS = ("small", "quick")
SPECIFICATION = (ROOT / "docs" / "specs" / "tood.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def published() -> Published:
    return read_published(RESULTS, PRESETS)


def table_of(published: Published, name: str) -> PublishedTable:
    return next(table for table in published.tables if table.name == name)


def numbers(row: Row) -> list[str]:
    return [number.text for number in row.values.values()]


def specified_rows(heading: str, columns: int) -> list[list[str]]:
    """The cells of the first table below a heading of the specification, its last columns without blanks."""
    lines = SPECIFICATION[SPECIFICATION.index(heading) :].splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("|---"))
    end = next(place for place, line in enumerate(lines[start:], start) if not line.startswith("|"))
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines[start + 1 : end]]
    return [[*row[:-columns], *(cell.replace(" ", "") for cell in row[-columns:])] for row in rows]


# Published numbers


@pytest.mark.consistency
def test_published_numbers_are_sound_and_every_preset_of_the_paper_has_a_row(published: Published) -> None:
    named = {row.preset for table in published.tables for row in table.rows}  # reading refuses unknown ones
    assert named - {""} == set(PRESETS) - set(NOT_THE_PAPERS)


@pytest.mark.consistency
def test_every_source_is_used(published: Published) -> None:
    used = {s for table in published.tables for row in table.rows for n in row.values.values() for s in n.sources}
    assert used == set(published.sources)


@pytest.mark.parametrize(
    ("name", "heading", "count", "columns"),
    [
        ("table-1", "Table 1, head swap", 8, 3),
        ("table-2", "Table 2, sample assignment", 14, 3),
        ("table-5", "### 5.4 test-dev", 4, 6),
        ("table-6", "Table 6, alignment analysis", 4, 6),
    ],
)
def test_tables_are_those_of_the_specification(
    published: Published, name: str, heading: str, count: int, columns: int
) -> None:
    rows, expected = table_of(published, name).rows, specified_rows(heading, columns)
    assert len(rows) == len(expected) == count
    for row, cells in zip(rows, expected, strict=True):
        assert [float(text) for text in numbers(row)] == [float(cell) for cell in cells[-columns:]], row.label


def test_tables_3_and_4_are_those_of_the_specification(published: Published) -> None:
    text = re.search(r"^Table 3, .*?\n(?=m ∈)", SPECIFICATION, flags=re.MULTILINE | re.DOTALL)
    assert text is not None
    third, fourth = text[0].split("\nTable 4")
    triples = [found.split("/") for found in re.findall(r"\d\d\.\d/\d\d\.\d/\d\d\.\d", third)]
    assert [numbers(row) for row in table_of(published, "table-3").rows] == [triples[place] for place in (1, 0, 3, 2)]
    pairs = re.findall(r"\(([\d.]+),([\d.]+)\) ([\d./]*\d)", fourth)
    rows = table_of(published, "table-4").rows
    assert len(pairs) == len(rows) == 6
    for row, (alpha, beta, triple) in zip(rows, pairs, strict=True):
        assert numbers(row) == triple.split("/")
        config = PRESETS[row.preset]
        assert (config.alpha, config.beta) == (float(alpha), float(beta))
        assert row.label == f"alpha {alpha}, beta {beta}"


def test_rivals_are_those_of_the_specification(published: Published) -> None:
    line = re.search(r"^Rivals' AP in the same table — (.*)$", SPECIFICATION, flags=re.MULTILINE)
    assert line is not None
    expected = re.findall(r"\d\d\.\d", line[1])
    found = [numbers(row)[0] for row in table_of(published, "table-5-others").rows]
    assert sorted(found) == sorted(expected)


def test_other_implementations_numbers(published: Published) -> None:
    """Copied once more, from the specification's sections 5.1, 5.2 and 5.6."""
    expected = {
        "r50_1x": ("42.5", "42.7", "42.4"),
        "r50_anchor_based_1x": ("42.4", "42.8", "42.4"),
        "r50_2x_ms": ("", "", "44.5"),
        "r101_2x_ms": ("46.2", "46.7", "46.1"),
        "x101_64x4d_2x_ms": ("47.6", "48.5", "47.6"),
        "r101_dcn_2x_ms": ("49.2", "49.6", "49.3"),
        "x101_64x4d_dcn_2x_ms": ("50.5", "51.1", ""),
        "": ("", "", "42.5"),  # PaddleDetection's
    }
    names = ("readme-val", "readme-test-dev", "others")
    columns = [{row.preset: numbers(row)[0] for row in table_of(published, name).rows} for name in names]
    assert {preset: tuple(column.get(preset, "") for column in columns) for preset in expected} == expected
    assert sum(len(column) for column in columns) == 19
    assert numbers(table_of(published, "first-phase").rows[0]) == ["≈ 41.8"]


def test_rows_name_the_runs_that_their_labels_describe(published: Published) -> None:
    """Head, assignment and length of each preset, from the labels."""
    for name in ("table-1", "table-2", "table-3", "table-6"):
        for row in table_of(published, name).rows:
            if not row.preset:
                continue
            config, label = PRESETS[row.preset], row.label
            t_head = "T-Head" in label or label.startswith("TOOD")
            assert config.head == ("t_head" if t_head else "parallel_tap" if "TAP" in label else "parallel"), label
            assert (config.atss_share == 1) == ("ATSS" in label), label
            assert config.anchor_based == ("anchor-based" in label)
            assert config.epochs == (18 if "*" in label else 12)
            assert (config.quality == "centerness") == (not t_head and "ATSS" in label)
            assert config.epochs * config.atss_share in (4, 12)
    for row in table_of(published, "topk").rows:
        assert row.label == f"m = {PRESETS[row.preset].topk}"
    epochs = [round(12 * PRESETS[row.preset].atss_share) for row in table_of(published, "first-phase").rows]
    assert epochs == [0, 1, 2, 4, 8]


# The command


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["tood_tal.report", *arguments])
    report.main()


def test_a_tiny_run_from_training_to_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    run("core.data", "shapes", str(data), "--train", "4", "--val", "2", "--test", "0")
    length = ("--steps", "2", "--batch-size", "2", "--workers", "0")
    run("tood_tal.train", "--data", str(data), *TINY, *length, "--out", str(out))
    call(monkeypatch, str(out), "--out", str(tmp_path / "report.md"))
    said = capsys.readouterr().out
    table, _, others = said.partition("## Runs that differ")
    assert "not measured" in table
    assert f"`{out}`" in others
    assert "data data instead of coco" in others
    assert (out / "positives.png").exists()
    assert (tmp_path / "report.md").exists()


@pytest.mark.parametrize(("preset", "rows"), [("r50_1x", 8), ("parallel_atss", 4), ("no_atss_phase", 1)])
def test_a_full_run_would_stand_in_its_rows(
    preset: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(PRESETS[preset], preset=preset, data="elsewhere/coco", seed=4)
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    facts = {"data": "coco", "split": "val", "images": 5000}
    alignment = {"rank_correlation": -0.0123, "top_iou": 0.6543, "correct": 30001, "redundant": 2, "error": 3}
    for folder, file, values in (("evaluate", "metrics", {"AP": 0.3987}), ("alignment", "alignment", alignment)):
        (tmp_path / f"{folder}-val").mkdir()
        (tmp_path / f"{folder}-val" / f"{file}.json").write_text(json.dumps(facts | values), encoding="utf-8")
    call(monkeypatch, str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    measured = [line for line in lines if "AP 39.9" in line]
    assert len(measured) == rows
    assert all(f"`{preset}`" in line for line in measured)
    assert not any("Runs that differ" in line for line in lines)
    aligned = [line for line in measured if "rank correlation -0.012, IoU of the top 10 0.654, correct 30001" in line]
    assert len(aligned) == (preset != "no_atss_phase")


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
