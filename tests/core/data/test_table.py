"""The cache file: when it is used, when it is rebuilt, and what happens when it cannot be written."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from core.data import parse, table
from core.data.parse import open_annotations
from core.data.table import COLUMNS, NoImages, Table, table_digest

REAL_PARSE = parse.parse_coco


def annotations(folder: Path) -> Path:
    return folder / "annotations" / "instances_train2017.json"


def assert_equal(a: Table, b: Table) -> None:
    assert (a.categories, a.digest, a.licence, a.source) == (b.categories, b.digest, b.licence, b.source)
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), strict=True)


def parsed_now(path: Path) -> Table:
    fresh = REAL_PARSE(path, NoImages())
    return dataclasses.replace(fresh, digest=table_digest(fresh))


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Grows by one with each parse."""
    calls: list[Path] = []

    def counted(path: Path, images: NoImages, *, annotated: bool) -> Table:
        calls.append(path)
        return REAL_PARSE(path, images, annotated=annotated)

    monkeypatch.setattr(parse, "parse_coco", counted)
    return calls


def test_second_open_reads_the_cache(folder: Path, cache: Path, parses: list[Path]) -> None:
    first = open_annotations(annotations(folder), NoImages())
    second = open_annotations(annotations(folder), NoImages())
    assert len(parses) == 1
    assert_equal(first, second)
    assert_equal(first, parsed_now(annotations(folder)))
    assert first.cache is not None
    assert first.cache.parent == cache
    assert not first.boxes_xywh.flags.writeable


def test_a_changed_file_is_parsed_again(folder: Path, parses: list[Path]) -> None:
    path = annotations(folder)
    before = open_annotations(path, NoImages())
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [5, 6, 7.5, 9]  # same size, so only the time tells
    path.write_text(json.dumps(content))
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    after = open_annotations(path, NoImages())
    assert len(parses) == 2
    assert after.digest != before.digest
    assert before.boxes_xywh[1].tolist() == [5, 6, 7.5, 8]  # a mapped table outlives its file's replacement


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "old format"])
def test_a_damaged_cache_is_rebuilt(
    folder: Path, parses: list[Path], damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = annotations(folder)
    first = open_annotations(path, NoImages())
    assert first.cache is not None
    raw = bytearray(first.cache.read_bytes())
    if damage == "truncated":
        raw = raw[:-1]
    elif damage == "empty":
        raw = bytearray()
    elif damage == "foreign":
        raw = bytearray(b"something else" * 100)
    else:
        monkeypatch.setattr(table, "FORMAT", 99)
    changed = first.cache.with_suffix(".new")
    changed.write_bytes(raw)
    os.replace(changed, first.cache)
    again = open_annotations(path, NoImages())
    assert len(parses) == 2
    assert_equal(again, parsed_now(path))


def test_flipped_bits_are_found(folder: Path) -> None:
    first = open_annotations(annotations(folder), NoImages())
    assert first.cache is not None
    raw = first.cache.read_bytes()
    key = table._map_arrays(first.cache)[0]["key"]  # type: ignore[index]
    spoilt = first.cache.with_suffix(".spoilt")
    for position in range(0, len(raw), 7):
        spoilt.write_bytes(raw[:position] + bytes([raw[position] ^ 16]) + raw[position + 1 :])
        assert table.read_table(spoilt, key, NoImages()) is None, position


def test_a_cache_that_cannot_be_written(folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.write_text("a file where the folder should be")
    opened = open_annotations(annotations(folder), NoImages())
    assert_equal(opened, parsed_now(annotations(folder)))
    assert opened.cache is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"warning: cannot write the annotation cache in {cache}")
    assert_equal(pickle.loads(pickle.dumps(opened)), opened)


def test_a_full_disk_leaves_nothing_behind(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert len(open_annotations(annotations(folder), NoImages())) == 3
    assert "No space left on device" in capsys.readouterr().err
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_workers_map_the_file(folder: Path) -> None:
    opened = open_annotations(annotations(folder), NoImages())
    packed = pickle.dumps(opened)
    assert opened.boxes_xywh.tobytes() not in packed
    assert_equal(pickle.loads(packed), opened)


def test_a_worker_refuses_a_cache_that_was_replaced(folder: Path) -> None:
    path = folder / "annotations" / "instances_train2017.json"
    packed = pickle.dumps(open_annotations(path, NoImages()))
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"][0] += 1
    path.write_text(json.dumps(content) + " ")
    open_annotations(path, NoImages())
    with pytest.raises(ValueError, match="changed while it was in use"):
        pickle.loads(packed)


def test_processes_that_open_at_once(folder: Path, cache: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from core.data.parse import open_annotations; "
        "from core.data.table import NoImages; print(open_annotations(Path(sys.argv[1]), NoImages()).digest)"
    )
    command = [sys.executable, "-c", code, str(annotations(folder))]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    digests = {process.communicate()[0] for process in running}
    assert len(digests) == 1
    assert [path.suffix for path in sorted(cache.iterdir())] == [".lock", ".table"]


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANCHORAGE_CACHE", "/a")
    assert table.cache_folder() == Path("/a")
    monkeypatch.delenv("ANCHORAGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert table.cache_folder() == Path("/b/anchorage")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert table.cache_folder() == Path("/c/.cache/anchorage")
