"""Tables in the READMEs come from result files."""

import json
from pathlib import Path

import pytest

from benchmarks import tables
from core.errors import UserError

PAGE = "before\n<!-- table: quick -->\nold\n<!-- end -->\nafter\n"


def write_quick(results: Path, *ap: float, std: float | None) -> None:
    mean = {"AP": sum(ap) / len(ap), "AP50": 0.75, "AP75": 0.5, "seconds": 90.0}
    detector = {
        "training": "300 x 8 images",
        "runs": [{"seed": seed} for seed in range(len(ap))],
        "mean": mean,
        "std": {"AP": std, "AP50": std, "AP75": std},
    }
    (results / "quick.json").write_text(json.dumps({"detectors": {"paa": detector}}))


def test_table_shows_mean_and_deviation_in_percent(tmp_path: Path) -> None:
    write_quick(tmp_path, 0.40, 0.43, std=0.0212)  # mean 0.415
    row = tables.quick_table(tmp_path).splitlines()[2]
    assert row == "| PAA, preset `quick` | 300 x 8 images | 41.5 ± 2.1 | 75.0 ± 2.1 | 50.0 ± 2.1 | 2 |"


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    write_quick(tmp_path, 0.4, std=None)
    assert "| 40.0 | 75.0 | 50.0 | 1 |" in tables.quick_table(tmp_path)


@pytest.mark.parametrize("name", sorted(tables.TABLES))
def test_missing_results_say_not_measured(name: str, tmp_path: Path) -> None:
    assert "not measured" in tables.TABLES[name](tmp_path)


def test_speed_rows(tmp_path: Path) -> None:
    row = {"name": "atss", "what": "two images", "ours_ms": 12.34, "reference_ms": 1234.0, "ratio": 100.0, "target": 10}
    content = {"rows": [row | {"reference": "the dense form"}], "device": "a CPU", "threads": 2}
    (tmp_path / "speed.json").write_text(json.dumps(content))
    assert "| two images | the dense form | 1,234 | 12.3 | 100.0 | ≥ 10 |" in tables.speed_table(tmp_path)


def test_update_replaces_only_what_stands_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    assert tables.update([page], tmp_path, check=True) == [page]
    assert page.read_text() == PAGE
    assert tables.update([page], tmp_path, check=False) == [page]
    text = page.read_text()
    assert text.startswith("before\n<!-- table: quick -->\n| detector |")
    assert text.endswith("|\n<!-- end -->\nafter\n")
    assert tables.update([page], tmp_path, check=True) == []


def test_unknown_table_names_the_nearest() -> None:
    with pytest.raises(UserError, match="no table named 'quik'; did you mean 'quick'"):
        tables.filled(PAGE.replace("quick", "quik"), Path())


@pytest.mark.consistency
def test_tables_are_up_to_date() -> None:
    pages = [tables.ROOT / page for page in tables.PAGES if (tables.ROOT / page).exists()]
    assert tables.update(pages, tables.RESULTS, check=True) == []
