"""Published tables, what counts as a measurement of a row, and the submission's zip."""

import json
import math
import re
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from core import checkpoint
from core.config import PyramidConfig
from core.configfile import to_yaml
from core.errors import UserError
from core.evaluator import DetectionArrays, read_detections
from core.published import Published, read_published
from core.report import (
    Measurement,
    differences,
    find_runs,
    markdown,
    measurements_of,
    print_report,
    read_run,
    read_runs,
    report,
    summary,
)
from core.runlog import draw_term
from core.submission import best_of_images, write_submission


@dataclass(frozen=True, kw_only=True)
class Config(PyramidConfig):
    """A method with one field of its own."""

    steps: int | None = 90_000
    topk: int = 9  # candidates


PRESETS = {"r50": Config(), "r50_long": Config(steps=180_000), "toy": Config(data="shapes", steps=10)}
CONTENT: dict[str, Any] = {
    "title": "Toy",
    "images": {"val": 5000},
    "sources": {"P": "the paper", "T": "another paper"},
    "tables": [
        {
            "name": "one",
            "title": "Table 1",
            "split": "val",
            "metrics": ["AP", "AP50"],
            "note": "in words",
            "rows": [
                {"label": "short", "preset": "r50", "values": {"AP": [41.0, "P"], "AP50": [59.4, "T"]}, "note": "odd"},
                {"label": "long", "preset": "r50_long", "values": {"AP": ["≈ 42", "P"], "AP50": "unknown"}},
                {
                    "label": "K 5",
                    "preset": "r50",
                    "changes": {"topk": 5},
                    "values": {"AP": ["fails", "P, T"], "AP50": "none"},
                },
                {"label": "others'", "values": {"AP": ["< 3.5", "P"], "AP50": "unknown"}},
            ],
        },
        {
            "name": "two",
            "title": "Table 2",
            "split": "test-dev",
            "metrics": ["AP"],
            "rows": [{"label": "views", "preset": "r50", "tta": True, "values": {"AP": [44, "P"]}}],
        },
        {
            "name": "three",
            "title": "Table 3",
            "split": "val",
            "metrics": ["iou_error"],
            "rows": [{"label": "short", "preset": "r50", "values": {"iou_error": ["< 0.1", "P"]}}],
        },
    ],
}


def published(tmp_path: Path, content: dict[str, Any]) -> Published:
    path = tmp_path / "results.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return read_published(path, PRESETS)


def write_run(folder: Path, config: Config, data: str = "coco", ap: float | None = 0.4123, **more: Any) -> Path:
    """A run folder as `fit` leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(replace(config, preset=config.preset or "r50")))
    environment = {"commit": "0123456789abcdef", "device": "cpu (toy)", "data": data, **more}
    (folder / "environment.json").write_text(json.dumps(environment))
    if ap is not None:
        best = {"AP": 0.9, "AP50": 0.9, "AP75": -1, "step": 1}
        last = {"AP": ap, "AP50": 0.5, "AP75": -1, "step": 2}
        (folder / "metrics.json").write_text(json.dumps({"best": best, "last": last}))
    return folder


def write_evaluation(run: Path, name: str = "val", **content: Any) -> None:
    """What `evaluate` leaves beside the weights."""
    facts = {"weights": "best.pt", "data": "coco", "split": "val", "tta": False, "images": 5000, "changes": {}}
    (run / f"evaluate-{name}").mkdir()
    (run / f"evaluate-{name}" / "metrics.json").write_text(json.dumps({**facts, "AP": 0.415, "AP50": 0.6, **content}))


def measured(config: Config = PRESETS["r50"], **changes: Any) -> Measurement:
    values = {"AP": 0.41, "AP50": 0.6}
    return Measurement(Path("run"), config, "coco", 5000, "val", False, values, "", "")._replace(**changes)


def single_spaced(text: str) -> str:
    """Tables without the spaces that align them."""
    return re.sub(" +", " ", text)


# Published numbers


def test_published_numbers_by_hand(tmp_path: Path) -> None:
    one, two, three = published(tmp_path, CONTENT).tables
    assert [row.values["AP"].text for row in one.rows] == ["41.0", "≈ 42", "fails", "< 3.5"]
    assert [row.values["AP50"].text for row in one.rows] == ["59.4", "unknown", "none", "unknown"]
    assert one.rows[2].values["AP"].sources == ("P", "T")
    assert (two.rows[0].tta, one.rows[0].tta) == (True, False)
    assert three.metrics == ("iou_error",)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("tables", 0, "rows", 0, "preset"),
            "r5",
            "table 'one': row 'short': unknown preset 'r5'; did you mean 'r50'?",
        ),
        (("tables", 0, "rows", 0, "values", "AP"), 41.0, r"row 'short': AP must be \[number, source\], .*got 41.0"),
        (("tables", 0, "rows", 0, "values", "AP"), [41.0], r"AP must be \[number, source\]"),
        (("tables", 0, "rows", 0, "values", "AP"), [41.0, "Q"], "AP: unknown source 'Q', there are P, T"),
        (("tables", 0, "rows", 0, "values", "AP"), [41.0, 5], "AP: source must be text, got 5"),
        (("tables", 0, "rows", 0, "values", "AP"), [math.nan, "P"], "AP: nan must be a number"),
        (("tables", 0, "rows", 0, "values", "AP"), [True, "P"], "AP: True must be a number"),
        (("tables", 0, "rows", 0, "values", "AP"), ["about 5", "P"], "AP: 'about 5' must be a number"),
        (("tables", 0, "rows", 0, "values"), {"AP": "unknown"}, "row 'short': values lacks AP50"),
        (("tables", 0, "rows", 0, "values", "APx"), "none", "unknown key 'APx'; did you mean 'AP'?"),
        (("tables", 0, "rows", 0, "label"), 5, "row 5: label must be text, got 5; put it in quotes"),
        (("tables", 0, "rows", 0, "tta"), "yes", "tta must be true or false, got 'yes'"),
        (("tables", 0, "rows", 0, "changes"), {"topc": 5}, "row 'short': unknown field 'topc'; did you mean 'topk'?"),
        (("tables", 0, "rows", 0, "changes"), {"topk": "x"}, "row 'short': topk must be a whole number"),
        (("tables", 0, "rows", 3, "tta"), True, "changes and tta need a preset"),
        (("tables", 0, "rows", 1, "label"), "short", "table 'one': 'short' occurs 2 times"),
        (("tables", 0, "rows"), [], "rows must be a list with something in it"),
        (("tables", 0, "rows"), ["x"], "table 'one': a row must be a mapping, got 'x'"),
        (("tables", 0, "metrics"), ["AP500"], "unknown metric 'AP500'; did you mean 'AP50'"),
        (("tables", 0, "split"), "vall", "split must be one of .*; did you mean 'val'?"),
        (("tables", 0, "note"), ["x"], "note must be text"),
        (("tables", 1, "name"), "one", "tables: 'one' occurs 2 times"),
        (("tables",), "x", "tables must be a list"),
        (("tables",), [7], "a table must be a mapping, got 7"),
        (("images",), {"val": "many"}, "images must map splits to numbers of images, got 'val': 'many'"),
        (("sources",), ["P"], "sources must be a mapping"),
        (("title",), None, "title must be text"),
        (("titel",), "Toy", "unknown key 'titel'; did you mean 'title'?"),
    ],
)
def test_wrong_published_numbers(tmp_path: Path, path: tuple[Any, ...], value: Any, message: str) -> None:
    content = json.loads(json.dumps(CONTENT))
    *inner, last = path
    place = content
    for key in inner:
        place = place[key]
    place[last] = value
    with pytest.raises(UserError, match=message) as error:
        published(tmp_path, content)
    assert str(error.value).startswith(str(tmp_path / "results.yaml"))
    assert "\n" not in str(error.value)


# Which run answers which row


def test_a_row_is_answered_by_runs_of_exactly_its_configuration(tmp_path: Path) -> None:
    content = published(tmp_path, CONTENT)
    table = content.tables[0]

    def answered(one: Measurement) -> list[str]:
        rows = [row for row in table.rows if measurements_of(row, table, [one], PRESETS, content.images)]
        return [row.label for row in rows]

    assert answered(measured()) == ["short"]
    assert answered(measured(replace(PRESETS["r50"], topk=5))) == ["K 5"]  # whatever preset it began as
    assert answered(measured(replace(PRESETS["r50"], preset="r50_long"))) == ["short"]
    assert answered(measured(PRESETS["r50_long"])) == ["long"]
    assert answered(measured(replace(PRESETS["r50"], steps=240))) == []
    assert answered(measured(tta=True)) == []
    assert answered(measured(split="test", images=None)) == []
    assert answered(measured(data="bccd")) == []
    assert answered(measured(images=16)) == []
    assert answered(measured(values={"iou_error": 0.1})) == []


def test_differences_by_hand() -> None:
    images = {"val": 5000}
    same = replace(PRESETS["r50"], seed=3, device="cpu", workers=8, out="x", data="elsewhere/coco", compile=True)
    assert differences(measured(same), PRESETS["r50"], images) == []
    for name in ("coco", "COCO", "coco2017", "coco-2017", "mscoco"):
        assert differences(measured(data=name), PRESETS["r50"], images) == []
    voc = replace(PRESETS["r50"], data="somewhere/VOCdevkit")
    assert differences(measured(data="VOC07+12"), voc, images) == []
    assert differences(measured(data="VOC07"), voc, images) == ["data VOC07 instead of VOCdevkit"]
    warm = replace(PRESETS["r50"], warmup_epochs=5.0)
    assert differences(measured(replace(warm, warmup_steps=9)), warm, images) == []
    assert differences(measured(replace(PRESETS["r50"], warmup_steps=9)), PRESETS["r50"], images) != []
    other = replace(PRESETS["r50"], steps=240, precision="bf16", milestones=(0.5,), dcn_tower=True, lr=0.02)
    assert differences(measured(other, data="coco_mini"), PRESETS["r50"], images) == [
        "data coco_mini instead of coco",
        "dcn_tower on instead of off",
        "steps 240 instead of 90000",
        "milestones 0.5 instead of 0.6667 0.8889",
        "lr 0.02 instead of none",
        "precision bf16 instead of fp32",
    ]
    assert differences(measured(images=16), PRESETS["r50"], images) == ["16 images instead of 5000"]
    assert differences(measured(images=None), PRESETS["r50"], images) == []


# Run folders


def test_a_runs_own_numbers_are_those_of_its_last_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", PRESETS["r50"])
    (one,) = read_run(folder, "toy", Config)
    assert one.values == {"AP": 0.4123, "AP50": 0.5}  # not the best; AP75 -1 is none
    assert (one.data, one.split, one.tta, one.commit, one.device) == ("coco", "val", False, "0123456789", "cpu (toy)")
    assert asdict(one.config) == asdict(replace(PRESETS["r50"], preset="r50"))


def test_an_evaluation_takes_the_place_of_the_runs_own_numbers(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", PRESETS["r50"])
    write_evaluation(folder)
    (one,) = read_run(folder, "toy", Config)
    assert one.values["AP"] == 0.415
    write_evaluation(folder, "val-again")  # the same question once more
    write_evaluation(folder, "val-tta", tta=True, AP=0.43)
    write_evaluation(folder, "val-k5", changes={"topk": 5}, AP=0.40)
    write_evaluation(folder, "test", data="bccd", split="test", images=72, AP=None)
    found = read_run(folder, "toy", Config)
    answers = [(one.split, one.tta, getattr(one.config, "topk"), one.values.get("AP")) for one in found]  # noqa: B009
    assert sorted(answers) == [
        ("test", False, 9, None),
        ("val", False, 5, 0.40),
        ("val", False, 9, 0.415),
        ("val", True, 9, 0.43),
    ]


def test_iou_accuracy_is_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", PRESETS["r50"])
    content = {"positives": {"mean_absolute_error": 0.0831}, "data": "coco", "split": "val", "images": 5000}
    (folder / "iou-accuracy-val.json").write_text(json.dumps(content))
    (one,) = read_run(folder, "toy", Config)
    assert one.values == {"AP": 0.4123, "AP50": 0.5, "iou_error": 0.0831}
    text = single_spaced(report(published(tmp_path, CONTENT), read_run(folder, "toy", Config), PRESETS))
    assert "| short | `r50` | < 0.1 | [P] | IoU error 0.083 |" in text


def test_a_folder_of_weights_is_a_run_where_they_were_evaluated(tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    config = asdict(replace(PRESETS["r50"], profile="official", preset="r50"))
    checkpoint.save(folder / "weights.pt", {"method": "toy", "config": config})
    write_evaluation(folder, weights="elsewhere/converted/weights.pt")
    assert find_runs(tmp_path) == [folder]
    (one,) = read_run(folder, "toy", Config)
    assert one.values["AP"] == 0.415
    assert differences(one, PRESETS["r50"], {"val": 5000}) == ["profile official instead of ours"]
    with pytest.raises(UserError, match="checkpoint of method 'toy', this command needs 'paa'"):
        read_run(folder, "paa", Config)


def test_changes_of_the_source_tree_are_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", PRESETS["r50"], commit="0123456789abcdef+changes")
    assert read_run(folder, "toy", Config)[0].commit == "0123456789+changes"


def test_folders_without_numbers(tmp_path: Path) -> None:
    assert read_run(write_run(tmp_path / "started", PRESETS["r50"], ap=None), "toy", Config) == []
    assert find_runs(tmp_path / "nowhere") == []
    assert find_runs(tmp_path) == [tmp_path / "started"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no run folder"):
        read_runs([tmp_path / "empty"], "toy", Config)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read_runs([tmp_path / "nowhere"], "toy", Config)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.yaml", "topc: 3", "unknown field 'topc'"),
        ("config.yaml", "topk: [", "not a YAML file"),
        ("metrics.json", "{", "metrics.json: cannot be read"),
        ("metrics.json", "[]", "must hold an object with fields, got a list"),
        ("metrics.json", '{"last": 3}', "last must be an object with fields, got 3"),
        ("environment.json", "", "environment.json: cannot be read"),
    ],
)
def test_damaged_folders(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: str,
    text: str,
    message: str,
) -> None:
    folder = write_run(tmp_path / "runs" / "toy" / "bad", PRESETS["r50"])
    write_run(tmp_path / "runs" / "toy" / "good", PRESETS["r50"])
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_run(folder, "toy", Config)
    assert "\n" not in str(error.value)
    monkeypatch.chdir(tmp_path)
    print_report([], None, "toy", published(tmp_path, CONTENT), PRESETS)  # looks into runs/toy
    said = capsys.readouterr()
    assert "AP 41.2, AP50 50.0" in said.out
    assert said.err.startswith("warning: left out: runs/toy/bad")
    assert said.err.count("\n") == 1


# Tables


def test_report_without_runs(tmp_path: Path) -> None:
    text = single_spaced(report(published(tmp_path, CONTENT), [], PRESETS))
    assert "| short | `r50` | 41.0 | 59.4 | AP [P], AP50 [T] | not measured |" in text
    assert "| K 5 | `r50 --topk 5` | fails | none | [P] [T] | not measured |" in text
    assert "| others' | - | < 3.5 | unknown | [P] | - |" in text
    assert "| views | `r50 --tta` | 44 | [P] | server closed |" in text
    assert "- in words\n- short: odd" in text
    assert "cocoapi issue 691" in text
    assert "differ" not in text
    assert text.endswith("- [P] the paper\n- [T] another paper\n")


def test_report_with_runs(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", PRESETS["r50"], ap=0.41),
        write_run(tmp_path / "b", replace(PRESETS["r50"], seed=1), ap=0.412),
        write_run(tmp_path / "c", replace(PRESETS["r50"], steps=240), data="bccd", ap=0.7),
        write_run(tmp_path / "d", replace(PRESETS["toy"], preset="toy"), data="shapes", ap=0.8),
        write_run(tmp_path / "e", replace(PRESETS["r50"], preset="gone", topk=2), ap=0.3),
    ]
    text = single_spaced(report(published(tmp_path, CONTENT), read_runs(runs, "toy", Config), PRESETS))
    # mean 41.1, sample deviation sqrt(2 * 0.1^2) = 0.14
    assert "AP 41.1 ± 0.1, AP50 50.0 ± 0.0 (2 runs)" in text
    assert "70.0" not in text.partition("## Runs that differ")[0]
    others = text.partition("## Runs that differ")[2].partition("## Where")[0]
    assert "| 70.0 | 50.0 |" in others
    assert "data bccd instead of coco, steps 240 instead of 90000" in others
    assert "| `toy` | shapes val | 80.0 |" in others
    assert "nothing; no row of a table" in others
    assert "began as no known preset" in others
    assert f"| `{tmp_path}/b` | 1 | 0123456789 | cpu (toy) |" in text


def test_many_differences_are_counted(tmp_path: Path) -> None:
    config = replace(
        PRESETS["r50"], steps=1, topk=1, channels=64, short_side=64, momentum=0, batch_size=2, ema=0.5, preset="r50"
    )
    text = report(published(tmp_path, CONTENT), [measured(config)], PRESETS)
    assert "short_side 64 instead of 800" in text
    assert " and 1 more |" in text


def test_summary_by_hand() -> None:
    assert summary([0.4149], "AP") == "41.5"
    assert summary([0.40, 0.42], "AP") == "41.0 ± 1.4"  # sqrt(1 + 1)
    assert summary([0.0831], "iou_error") == "0.083"
    assert summary([-0.4125, -0.4127], "rank_correlation") == "-0.413 ± 0.000"
    assert summary([30261.0], "correct") == "30261"


def test_markdown_is_aligned_and_cannot_be_broken() -> None:
    table = markdown(["a", "number"], [["x|y", "1"], ["z", "22.5"]], right=[1])
    assert table == "| a    | number |\n| ---- | -----: |\n| x\\|y |      1 |\n| z    |   22.5 |\n"
    assert markdown(["a"], []) == "| a   |\n| --- |\n"


def test_print_report_writes_the_file_and_draws_positives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", PRESETS["r50"])
    rows: list[dict[str, Any]] = [{"step": 20, "split": "train", "loss": 1.0}, {"step": 20, "split": "val", "AP": 0.1}]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = published(tmp_path, CONTENT)
    print_report([folder], tmp_path / "r.md", "toy", content, PRESETS)
    said = capsys.readouterr().out
    assert (tmp_path / "r.md").read_text(encoding="utf-8") in said
    assert not (folder / "positives.png").exists()  # an older log without the number
    rows[0]["positives"] = 12.5
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print_report([folder], None, "toy", content, PRESETS)
    assert f"drawn: {folder / 'positives.png'}" in capsys.readouterr().out
    assert (folder / "positives.png").exists()


@pytest.mark.parametrize("count", [0, 1, 200])
def test_draw_term_of_any_length(tmp_path: Path, count: int) -> None:
    rows = [{"step": step, "positives": None if step == 7 else 50 / step} for step in range(1, count + 1)]
    draw_term(rows, "positives", tmp_path / "positives.png", "toy")
    with Image.open(tmp_path / "positives.png") as picture:
        assert picture.size == (980, 560)
    assert [path.name for path in tmp_path.iterdir()] == ["positives.png"]


# Submission


def write_detections_file(path: Path, **changes: Any) -> Path:
    """Three sound detections of images 30 and 10; changes go into the second."""
    rows = [
        {"image_id": 30, "category_id": 2, "bbox": [1.5, 2, 3, 4], "score": 0.5},
        {"image_id": 10, "category_id": 90, "bbox": [0, 0, 0, 4], "score": 1.0, **changes},
        {"image_id": 30, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 0.0},
    ]
    path.write_text(json.dumps(rows))
    return path


def write_image_info(path: Path) -> Path:
    images = [{"id": number, "file_name": f"{number}.jpg", "height": 48, "width": 64} for number in (30, 10)]
    categories = [{"id": 90, "name": "toothbrush"}, {"id": 2, "name": "bicycle"}]
    path.write_text(json.dumps({"images": images, "categories": categories}))
    return path


def test_submission_holds_one_file_with_the_detections(tmp_path: Path) -> None:
    detections, info = write_detections_file(tmp_path / "d.json"), write_image_info(tmp_path / "info.json")
    out = write_submission(detections, info, "paa_r50", None, trim=False)
    assert out == tmp_path / "detections_test-dev2017_paa_r50_results.zip"
    with zipfile.ZipFile(out) as archive:
        assert archive.namelist() == ["detections_test-dev2017_paa_r50_results.json"]
        archive.extractall(tmp_path / "inside")
    again = read_detections(tmp_path / "inside" / "detections_test-dev2017_paa_r50_results.json")
    for mine, theirs in zip(again, read_detections(detections), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    before = out.read_bytes()
    assert write_submission(detections, info, "paa_r50", out, trim=True).read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": 31}, "detection 1: image_id 31 is no image"),
        ({"category_id": 3}, "detection 1: category_id 3 is no category"),
        ({"score": 1.5}, r"detection 1: score 1.5 is not in \[0, 1\]"),
        ({"score": -0.1}, "score -0.1 is not"),
        ({"score": math.nan}, "score nan is not"),
        ({"bbox": [0, 0, -1, 2]}, r"bbox \[0.0, 0.0, -1.0, 2.0\] \(x, y, width, height\) has a negative side"),
        ({"bbox": [0, math.inf, 1, 2]}, "is not finite"),
        ({"bbox": [0, 1, 2]}, "not a COCO results file"),
        ({"score": "high"}, "not a COCO results file"),
    ],
)
def test_submission_refuses(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    detections, info = write_detections_file(tmp_path / "d.json", **changes), write_image_info(tmp_path / "info.json")
    with pytest.raises(UserError, match=message) as error:
        write_submission(detections, info, "paa", tmp_path / "out.zip", trim=False)
    assert str(error.value).startswith(str(detections))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.zip").exists()


def test_submission_refuses_odd_names_and_files(tmp_path: Path) -> None:
    detections, info = write_detections_file(tmp_path / "d.json"), write_image_info(tmp_path / "info.json")
    for name in ("", "../paa", "a b", ".x"):
        with pytest.raises(UserError, match="--name must be letters"):
            write_submission(detections, info, name, None, trim=False)
    with pytest.raises(UserError, match=r"out.json: a submission is a .zip file"):
        write_submission(detections, info, "paa", tmp_path / "out.json", trim=False)
    with pytest.raises(UserError, match=r"nowhere.json: No such file"):
        write_submission(detections, tmp_path / "nowhere.json", "paa", None, trim=False)
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(UserError, match="holds no detections"):
        write_submission(tmp_path / "empty.json", info, "paa", None, trim=False)


def test_submission_counts_a_hundred_of_an_image(tmp_path: Path) -> None:
    row = {"image_id": 30, "category_id": 2, "bbox": [0, 0, 1, 1]}
    rows = [{**row, "score": number / 1000} for number in range(101)] + [{**row, "image_id": 10, "score": 0.0}]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    info = write_image_info(tmp_path / "info.json")
    with pytest.raises(UserError, match=r"image 30 has 101 detections, .* --trim keeps these"):
        write_submission(tmp_path / "d.json", info, "paa", None, trim=False)
    out = write_submission(tmp_path / "d.json", info, "paa", None, trim=True)
    with zipfile.ZipFile(out) as archive:
        kept = json.loads(archive.read(archive.namelist()[0]))
    assert [entry["score"] for entry in kept] == [*(number / 1000 for number in range(1, 101)), 0.0]


@pytest.mark.parametrize("seed", range(4))
def test_best_of_images_is_its_slow_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, 40)) if seed else 0
    images, scores = rng.integers(0, 4, count), rng.integers(0, 5, count) / 5  # many ties
    found = DetectionArrays(images, np.zeros(count, np.int64), np.zeros((count, 4)), scores)
    expected = np.zeros(count, dtype=bool)
    for image in set(images.tolist()):
        rows = [row for row in range(count) if images[row] == image]
        expected[sorted(rows, key=lambda row: -scores[row])[:3]] = True  # Python's sort is stable
    np.testing.assert_array_equal(best_of_images(found, 3), expected)
