"""Comparisons: what is kept of a run, and that a comparison which was cut off goes on."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import run
from core import cli
from core.errors import UserError
from dynamic_atss.config import PRESETS
from padet.config import PRESETS as PADET_PRESETS
from tood_tal.config import PRESETS as TOOD_PRESETS

DETECTOR = run.Detector("2 x 1 images", ("x.train --seed {seed} --out {out}",), "{out}/metrics.json")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Replaces training; holds the run folders and seeds asked for."""
    calls: list[tuple[str, int]] = []

    def one_run(detector: run.Detector, seed: int, out: Path, jobs: int) -> dict[str, Any]:
        calls.append((out.name, seed))
        metrics = {"AP": 0.1 * (seed + 1), "AP50": 0.5, "AP75": 0.2}
        return {"seed": seed, "commands": run.recorded(detector, seed), "seconds": 3.0} | metrics

    comparison = run.Comparison("two.json", 2, "drawn", "free", {"a": DETECTOR, "b": DETECTOR})
    monkeypatch.setattr(run, "one_run", one_run)
    monkeypatch.setitem(run.COMPARISONS, "two", comparison)
    return calls


def test_comparison_goes_on_run_by_run(trained: list[tuple[str, int]], tmp_path: Path) -> None:
    run.compare("two", 1, tmp_path, tmp_path)
    run.compare("two", 2, tmp_path, tmp_path)
    run.compare("two", 2, tmp_path, tmp_path)
    assert trained == [("a-0", 0), ("b-0", 0), ("a-1", 1), ("b-1", 1)]
    result = json.loads((tmp_path / "two.json").read_text())
    assert (result["seeds"], result["data"], result["licence_note"]) == ([0, 1], "drawn", "free")
    assert {"command", "commit", "packages", "device", "threads"} <= set(result)
    assert [kept["seed"] for kept in result["detectors"]["b"]["runs"]] == [0, 1]


def test_runs_of_another_command_are_made_again(
    trained: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.compare("two", 1, tmp_path, tmp_path)
    other = run.Detector("3 x 1 images", ("x.train --steps 3 --seed {seed}",), "m.json")
    monkeypatch.setitem(run.COMPARISONS["two"].detectors, "b", other)
    run.compare("two", 1, tmp_path, tmp_path)
    assert trained == [("a-0", 0), ("b-0", 0), ("b-0", 0)]
    result = json.loads((tmp_path / "two.json").read_text())
    assert result["detectors"]["b"]["training"] == "3 x 1 images"
    assert len(result["detectors"]["b"]["runs"]) == 1


def test_jobs_at_a_time_give_the_same_file(
    trained: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = replace(DETECTOR, after="a")
    comparison = run.Comparison("two.json", 2, "drawn", "free", {"a": DETECTOR, "late": late, "b": DETECTOR})
    monkeypatch.setitem(run.COMPARISONS, "two", comparison)
    run.compare("two", 2, tmp_path / "one", tmp_path)
    run.compare("two", 2, tmp_path / "three", tmp_path, jobs=3)
    one, three = (json.loads((tmp_path / name / "two.json").read_text()) for name in ("one", "three"))
    assert list(three["detectors"]) == ["a", "late", "b"]
    assert three["detectors"] == one["detectors"]
    assert sorted(trained[6:]) == sorted(trained[:6])


def test_a_failing_run_ends_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = run.Detector("", ("no_such_module",), "")
    monkeypatch.setitem(run.COMPARISONS, "bad", run.Comparison("bad.json", 1, "", "", {"x": broken, "y": broken}))
    with pytest.raises(UserError, match="python -m no_such_module failed"):
        run.compare("bad", 1, tmp_path, tmp_path, jobs=2)


def test_numbers_inside_numbers() -> None:
    assert run.number({"a": {"b": 1}, "c": 2}, "a.b") == 1
    assert run.number({"a": {"b": 1}, "c": 2}, "c") == 2


def test_summary_by_hand() -> None:
    runs = [{"seed": s, "AP": ap, "AP50": 0.5, "AP75": 0.2, "seconds": 60.0} for s, ap in ((1, 0.3), (0, 0.5))]
    kept = run.summary(DETECTOR, runs)
    assert kept["mean"]["AP"] == pytest.approx(0.4)
    assert kept["std"]["AP"] == pytest.approx(0.1414214, abs=1e-6)  # sqrt((0.01 + 0.01) / (2 - 1))
    assert [one["seed"] for one in kept["runs"]] == [0, 1]
    assert run.summary(DETECTOR, runs[:1])["std"] == {"AP": None, "AP50": None, "AP75": None, "seconds": None}


def test_kept_commands_name_no_machine_folder() -> None:
    kept = run.recorded(run.COMPARISONS["bccd-fcos"].detectors["paa"], seed=2)
    assert kept[0].startswith("python -m paa.train --data $ANCHORAGE_SHARED/data/bccd.yaml")
    assert kept[0].endswith("--seed 2 --out OUT")


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("atss", "atss_r50_1x"),
        ("combined", "combined"),
        ("combined_qfl", "combined_qfl"),
        ("combined_qfl_iou", "r50_1x"),
        ("predicted_only", "predicted_only"),
        ("up_down", "weights_up_down"),
    ],
)
def test_rows_of_dynamic_atss_are_those_of_its_paper(name: str, preset: str) -> None:
    """The flags of each row set what the preset of the paper's row sets; all else is equal among the rows."""
    detectors = run.COMPARISONS["dynamic-bccd"].detectors
    words = detectors[name].commands[0].replace("{seed}", "0").split()
    assert words[0] == "dynamic_atss.train"
    config = cli.parse_config(PRESETS, "dynamic_atss", "", words[1:])
    base = cli.parse_config(
        PRESETS, "dynamic_atss", "", detectors["atss"].commands[0].replace("{seed}", "0").split()[1:]
    )
    method = ("host", "pred_weight", "pred_schedule", "anchor_weight", "anchor_schedule", "class_loss", "quality")
    assert {field: getattr(config, field) for field in method} == {
        field: getattr(PRESETS[preset], field) for field in method
    }
    assert replace(base, **{field: getattr(config, field) for field in method}) == config
    assert (config.preset, config.steps, config.batch_size, config.precision) == ("small", 240, 8, "bf16")


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("parallel_atss", "parallel_atss"),
        ("t_head_atss", "t_head_atss"),
        ("parallel_tal", "parallel_tal"),
        ("t_head_tal", "r50_1x"),
    ],
)
def test_cells_of_tood_are_those_of_its_paper(name: str, preset: str) -> None:
    """The flags of each cell set what the preset of the paper's row sets; all else is equal among the cells."""
    detectors = run.COMPARISONS["tood-bccd"].detectors
    method = ("head", "quality", "atss_share")
    (config, base) = (
        cli.parse_config(TOOD_PRESETS, "tood_tal", "", detectors[key].commands[0].replace("{seed}", "0").split()[1:])
        for key in (name, "t_head_tal")
    )
    wanted = {field: getattr(TOOD_PRESETS[preset], field) for field in method}
    assert {field: getattr(config, field) for field in method} == wanted
    assert replace(base, **wanted) == config
    assert (config.preset, config.steps, config.batch_size, config.precision) == ("small", 240, 8, "bf16")
    words = [command.split()[0] for command in detectors[name].commands]
    assert words == ["tood_tal.train", "tood_tal.evaluate", "tood_tal.alignment"]


def test_alignment_is_kept_beside_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file with numbers of both kinds; a correlation that does not exist has no mean."""
    found = {"AP": 0.1, "AP50": 0.2, "AP75": 0.3, "rank_correlation": None, "top_iou": 0.5}
    found |= {"correct": 5, "redundant": 6, "error": 7}

    def work(words: list[str], **_: object) -> SimpleNamespace:
        (tmp_path / "both-0" / "numbers.json").write_text(json.dumps(found))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(run.subprocess, "run", work)
    monkeypatch.setattr(run, "commit", lambda: "c0ffee")
    again = "{out}/../both-0/numbers.json"
    both = run.Detector("few", ("x.train",), "{out}/numbers.json", analyses={again: run.ALIGNMENT})
    kept = run.one_run(both, 0, tmp_path / "both-0")
    assert {name: kept[name] for name in found} == found
    assert "correct" not in run.one_run(replace(both, analyses={}), 0, tmp_path / "both-0")
    mean, std = (run.summary(both, [kept, {**kept, "seed": 1, "error": 9}])[part] for part in ("mean", "std"))
    assert (mean["rank_correlation"], mean["error"], mean["AP"]) == (None, 8, pytest.approx(0.1))
    assert (std["rank_correlation"], std["error"]) == (None, pytest.approx(1.4142136))


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("baseline", "baseline"),
        ("apm_c", "apm_c"),
        ("apm_r", "apm_r"),
        ("fa", "fam_alone"),
        ("apm", "apm"),
        ("implicit", "fam_implicit"),
        ("explicit_l", "fam_explicit_l"),
        ("explicit_s", "fam_explicit_s"),
        ("explicit_ls", "fam_explicit_ls"),
        ("all", "vgg16_384"),
    ],
)
def test_rows_of_padet_are_those_of_its_paper(name: str, preset: str) -> None:
    """The flags of each row set what the preset of the paper's row sets; all else is equal among the rows."""
    detectors = run.COMPARISONS["padet-bccd"].detectors
    configs = {
        key: cli.parse_config(PADET_PRESETS, "padet", "", detector.commands[0].replace("{seed}", "0").split()[1:])
        for key, detector in detectors.items()
    }
    config, base = configs[name], configs["all"]
    method = ("apm_score", "apm_box", "fam")
    assert detectors[name].commands[0].startswith("padet.train ")
    assert {field: getattr(config, field) for field in method} == {
        field: getattr(PADET_PRESETS[preset], field) for field in method
    }
    assert replace(base, **{field: getattr(config, field) for field in method}) == config
    assert (config.preset, config.size, config.batch_size, config.precision) == ("small", 192, 8, "bf16")
    assert config.data.endswith("bccd/VOC")
    assert not config.voc_one_based
    assert detectors[name].also == ("VOC07",)


def test_means_of_the_last_quarter(tmp_path: Path) -> None:
    rows = [{"split": "train", "step": step, "positives": float(step)} for step in (5, 10, 15, 16, 20)]
    rows.append({"split": "val", "step": 20})
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert run.late_means(tmp_path, ("positives",)) == {"positives": 18.0}  # steps 16 and 20; 15 is three quarters
    assert run.late_means(tmp_path / "no log", ()) == {}


def test_run_keeps_metrics_and_log_that_its_detector_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        metrics = {"AP": 0.1, "AP50": 0.2, "AP75": 0.05, "VOC07": 0.3, "VOC12": 0.25}
        (tmp_path / "out" / "metrics.json").write_text(json.dumps(metrics))
        (tmp_path / "out" / "log.jsonl").write_text(json.dumps({"split": "train", "step": 1, "positives": 7.0}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", execute)
    monkeypatch.setattr(run, "commit", lambda: "abc")
    detector = replace(DETECTOR, also=("VOC07",), logged=("positives",))
    kept = run.one_run(detector, 0, tmp_path / "out")
    assert (kept["AP"], kept["VOC07"], kept["positives"], "VOC12" in kept) == (0.1, 0.3, 7.0, False)
    assert run.summary(detector, [kept])["mean"]["positives"] == 7.0
    assert run.summary(detector, [kept])["std"]["VOC07"] is None


def test_words_are_filled_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ANCHORAGE_SHARED", str(tmp_path))
    assert run.fill(run.BCCD, 0, tmp_path) == f"{tmp_path}/data/bccd.yaml"
    monkeypatch.delenv("ANCHORAGE_SHARED")
    with pytest.raises(UserError, match="ANCHORAGE_SHARED="):
        run.fill(run.BCCD, 0, tmp_path)


def test_failing_command_stops(tmp_path: Path) -> None:
    detector = run.Detector("", ("no_such_module_{seed}",), "")
    with pytest.raises(UserError, match="python -m no_such_module_0 failed"):
        run.one_run(detector, 0, tmp_path / "out")
