"""Reliability: the checks find what they look for, and their lines say it."""

import random
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import reliability, reliability_files, reliability_kills, reliability_soak
from benchmarks.reliability_files import KINDS, damage_each, latest_step, save_step
from benchmarks.reliability_kills import Outcome, differences, leaves, same
from benchmarks.reliability_soak import Sample, summary
from core import checkpoint
from core.runlog import write_json, write_text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 5000])
def test_every_kind_of_damage_changes_a_file(kind: str, size: int) -> None:
    draw, whole = random.Random(0), bytes([7]) * size
    for _ in range(50):
        assert KINDS[kind](whole, draw) != whole


def test_damage_that_nobody_notices_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(bytes(range(100)))
    found = damage_each(file, 8, random.Random(0), lambda: len(file.read_bytes()) == 100)
    assert {kind: tuple(part.values()) for kind, part in found.items()} == {
        "truncated": (2, 0), "bits flipped": (2, 2), "pages zeroed": (2, 2), "bytes appended": (2, 0)
    }  # fmt: skip
    assert file.read_bytes() == bytes(range(100))


def test_damaged_checkpoints_are_noticed() -> None:
    result = reliability_files.measure_corruption(8, 4)
    first, second = reliability_files.corruption_rows(result)
    assert first["measured"] == "8 noticed, the previous one used"
    assert second["measured"] == "4 refused"
    assert first["met"]
    assert second["met"]
    result["checkpoints"]["truncated"]["noticed"] -= 1
    assert not reliability_files.corruption_rows(result)[0]["met"]


def test_the_newest_checkpoint_counts_only_with_its_own_tensors(tmp_path: Path) -> None:
    assert latest_step(tmp_path) is None
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    assert latest_step(tmp_path) == 2
    content = checkpoint.load(tmp_path / "last.pt")
    content["model"]["cls_logits.weight"][0, 0] += 1
    checkpoint.save_rotating(tmp_path, content)
    assert latest_step(tmp_path) is None


@pytest.mark.skipif(not (shutil.which("strace") and shutil.which("unshare")), reason="needs strace and unshare")
def test_a_save_ended_at_some_of_its_calls(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_step(base, 1)
    save_step(base, 2)
    calls = reliability_files.calls_of_a_save(base)
    names = [call.name for call in calls]
    assert names.count("fsync") == 2
    assert names.count("rename") == 2
    first, second = (call for call in calls if call.name == "rename")
    assert reliability_files.interfere(base, first, "signal=KILL") == "old"
    assert reliability_files.interfere(base, second, "error=EIO") == "old"


def outcome(name: str, phase: str, code: int) -> Outcome:
    return Outcome("paa", name, phase, code, 1.0)


def test_lines_of_kills() -> None:
    outcomes = [outcome("SIGKILL", phase, -9) for phase in ("step", "evaluation", "writing", "start")]
    outcomes += [outcome("SIGTERM", "evaluation", 0)]
    result = {"runs": [{"differences": []}, {"differences": []}], **reliability_kills.tally(outcomes)}
    kills, terms = reliability_kills.rows(result)
    assert kills["what"].startswith("4 kill -9: 1 in steps, 1 in evaluations, 1 in the writing of a checkpoint")
    assert (kills["measured"], kills["met"]) == ("2 of 2 runs end bit-equal", True)
    assert (terms["measured"], terms["met"]) == ("exit code 0, after 1.0 s at most", True)
    result["runs"][1]["differences"] = ["last.pt/step"]
    assert not reliability_kills.rows(result)[0]["met"]
    result = {
        "runs": [{"differences": []}],
        **reliability_kills.tally([*outcomes[:2], outcome("SIGTERM", "step", -15)]),
    }
    assert [row["met"] for row in reliability_kills.rows(result)] == [False, False]  # no kill met the writing


def finished_run(folder: Path, step: int, value: float, seconds: float) -> Path:
    """What `differences` reads of a run's folder."""
    config = {"out": str(folder), "workers": step % 2, "lr": 0.1}
    for name in ("last.pt", "best.pt"):
        checkpoint.save(folder / name, {"config": config, "model": {"w": torch.tensor([value])}, "nan": float("nan")})
    write_text(folder / "log.jsonl", f'{{"step": 3, "split": "train", "loss": {value}, "eta_seconds": {seconds}}}\n')
    write_json(folder / "metrics.json", {"best": {"AP": 0.5}})
    return folder


def test_every_difference_between_runs_is_named(tmp_path: Path) -> None:
    whole = finished_run(tmp_path / "a", 1, 0.5, 10)
    assert differences(finished_run(tmp_path / "b", 2, 0.5, 20), whole) == []
    other = finished_run(tmp_path / "c", 1, 0.5 + 2**-24, 10)
    assert differences(other, whole) == ["last.pt/model/w", "best.pt/model/w", "log.jsonl"]
    write_json(other / "metrics.json", {})
    assert differences(other, whole)[-1] == "metrics.json"


def test_same_is_bit_by_bit() -> None:
    assert same(float("nan"), float("nan"))
    assert not same(0.0, -0.0)
    assert not same(1, True)
    assert not same(torch.zeros(1), torch.zeros(1, dtype=torch.float64))
    assert dict(leaves({"a": [1, {"b": 2}], "c": ()})) == {"/a/0": 1, "/a/1/b": 2}


def test_memory_after_the_first_minutes() -> None:
    # 100 MB in minute 0; 200 to 203 in minutes 1 to 4; an evaluation's looks do not count
    samples = [Sample(60 * minute + 10, (100.0, 99.0 + minute if minute else 0.0), 30, False) for minute in range(5)]
    samples += [Sample(130, (900.0, 99.0), 99, True)]
    found = summary(samples, settle=1)
    assert (found["growth_mb"], found["descriptor_growth"], found["looks_during_evaluation"]) == (3.0, 0, 1)
    assert found["main_rss_mb_by_minute"] == dict.fromkeys(range(5), 100.0)
    assert summary(samples, settle=0)["growth_mb"] == 103.0
    leaking = [*samples, Sample(300, (104.0, 100.0), 31, False)]
    assert summary(leaking, settle=1)["descriptor_growth"] == 1


def test_lines_of_a_soak() -> None:
    stop = {"exit_code": 0, "processes_left": 0, "seconds": 2.0}
    result = {"minutes": 30, "settle_minutes": 5, "growth_mb": 20.0, "descriptor_growth": 0, "ctrl_c": stop}
    rows = reliability_soak.rows(result)
    assert [row["met"] for row in rows] == [True, True, True]
    assert rows[0]["measured"] == "+20.0 MB at most after minute 5"
    worse = {**result, "growth_mb": 20.1, "descriptor_growth": 1, "ctrl_c": {**stop, "processes_left": 1}}
    assert [row["met"] for row in reliability_soak.rows(worse)] == [False, False, False]


def test_parts_measured_at_other_times_stay() -> None:
    old = {"parts": {"soak": {"a": 1}, "crashes": {"b": 2}}}
    new = reliability.merged(old, "kills", {"c": 3}, {"commit": "x"})
    assert list(new["parts"]) == ["kills", "crashes", "soak"]
    assert new["parts"]["kills"] == {"c": 3, "origin": {"commit": "x"}}
    assert reliability.merged(new, "soak", {"a": 9}, {})["parts"]["soak"] == {"a": 9, "origin": {}}
