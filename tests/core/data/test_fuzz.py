"""Hostile data sets, a tenth of `python -m benchmarks.fuzz`: read or refused in one line, nothing else opened."""

from functools import partial
from pathlib import Path

import pytest

from benchmarks import fuzz
from core.errors import UserError


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> fuzz.Watch:
    """An audit hook cannot be taken off again: one for all tests here, idle outside of its `with`."""
    return fuzz.Watch(tmp_path_factory.mktemp("allowed"))


def test_hostile_files_are_read_or_refused() -> None:
    tallies = fuzz.measure(seed=1, share=0.12)
    assert [fault for tally in tallies.values() for fault in tally.faults] == []
    assert sum(tally.files for tally in tallies.values()) >= 300
    for kind in ("COCO annotation files", "VOC annotation files and lists", "malformed images"):
        assert 0 < tallies[kind].refused < tallies[kind].files  # neither all noise nor all harmless


def test_equal_seeds_spoil_alike() -> None:
    first, second, third = (fuzz.spoil_json(fuzz.random.Random(seed)) for seed in (4, 4, 5))
    assert first == second != third


def raising(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (KeyError("id"), "KeyError"),
        (UserError("no file has this id"), "names no file"),
        (UserError("a.json: bad\nnews: id"), "not one printable line"),
        (UserError("a.json: something is wrong"), "names none of id"),
        (UserError("a.json: id is " + "9" * 500), "514 characters"),
        (UserError("a.json: id is 9"), ""),
    ],
)
def test_what_counts_as_a_fault(watch: fuzz.Watch, error: Exception, fault: str) -> None:
    tally = fuzz.Tally()
    fuzz.run_case(fuzz.Case("cut", (Path("a.json"),), ("id",), partial(raising, error)), watch, tally)
    assert (tally.files, tally.refused) == (1, isinstance(error, UserError))
    assert len(tally.faults) == bool(fault)
    assert all(fault in line for line in tally.faults)


def test_files_outside_are_noticed(watch: fuzz.Watch, tmp_path: Path) -> None:
    (tmp_path / "b").write_text("")
    Path(watch.allowed[-1], "a").write_text("")
    Path(watch.allowed[-1], "link").symlink_to(tmp_path / "b")
    with watch:
        Path(watch.allowed[-1], "a").read_text()
    assert watch.seen == []
    for place in (tmp_path / "b", Path(watch.allowed[-1], "link")):
        with watch:
            place.read_text()
        assert watch.seen == [f"open {(tmp_path / 'b').resolve()}"]
    (tmp_path / "b").read_text()
    assert len(watch.seen) == 1  # idle again
