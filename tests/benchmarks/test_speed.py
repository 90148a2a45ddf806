"""Speed comparisons: what becomes of a measured case."""

import pytest

from benchmarks import speed
from benchmarks.evaluator_speed import voting_case


def test_row_and_its_line() -> None:
    case = {"name": "a", "what": "two images", "reference_ms": 30.0, "ours_ms": 2.0, "equal": True, "repeats": 3}
    row = speed.row(case, "the loop", 10)
    assert row["ratio"] == 15
    assert row["details"] == case
    assert speed.line(row) == "two images\n    the loop 30.00 ms, ours 2.00 ms: 15.0 times faster, wanted 10"


def test_missed_target_and_different_results_are_said() -> None:
    row = speed.row({"name": "a", "what": "", "reference_ms": 3.0, "ours_ms": 1.0, "equal": False}, "", 10)
    assert speed.line(row).endswith("3.0 times faster, wanted 10, MISSED, DIFFERENT RESULTS")


def test_memory_and_its_line() -> None:
    peak = speed.Peak(name="a", what="one image", peak_mb=98.4, limit_mb=500, details={})
    assert speed.line(peak) == "one image\n    98 MB, at most 500 wanted"
    peak["peak_mb"] = 500.5
    assert speed.line(peak).endswith("wanted, MISSED")


@pytest.mark.parametrize("classes", [1, 10])
def test_voting_gives_the_loop_s_boxes(classes: int) -> None:
    case = voting_case(boxes=60, classes_each=classes, repeats=1)
    assert case["equal"]


def test_rows_that_are_not_measured_anew_stay_with_their_run() -> None:
    run = {"command": "all", "started": "then", "device": "cpu", "threads": 2}
    old = {**run, "commit": "1", "rows": [{"name": name, "what": "", "ratio": 1.0} for name in "ab"]}
    new = speed.row({"name": "b", "what": "", "reference_ms": 3.0, "ours_ms": 1.0, "equal": True}, "", 2)
    more = speed.row({"name": "c", "what": "", "reference_ms": 3.0, "ours_ms": 1.0, "equal": True}, "", 2)
    rows = speed.merge_rows(old, {**run, "commit": "2"}, [new, more])
    assert [(row["name"], row["ratio"], row["origin"]["commit"]) for row in rows] == [
        ("a", 1.0, "1"),
        ("b", 3.0, "2"),
        ("c", 3.0, "2"),
    ]
    again = speed.merge_rows({**run, "commit": "2", "rows": rows}, {**run, "commit": "3"}, [new])
    assert [row["origin"]["commit"] for row in again] == ["1", "3", "2"]
