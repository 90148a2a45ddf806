"""The evaluator: expected numbers of real detections, AP worked by hand, equal back ends, bad input."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from core import evaluator
from core.cli import run
from core.data.table import Category, NoImages, Table
from core.errors import UserError
from core.evaluator import Backend, DetectionArrays, GroundTruth, coco_metrics, evaluate_boxes
from core.geometry import LEGACY
from core.types import Batch, Detections

BACKENDS = get_args(Backend)
BOX = [10.0, 20.0, 100.0, 50.0]  # medium: 5000 square pixels


def truth_of(boxes: list[list[float]], crowd: list[bool] | None = None) -> GroundTruth:
    """Boxes of class 7 in image 3; image 4 and class 9 have none."""
    rows = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return GroundTruth(
        np.array([3, 4]),
        np.array([7, 9]),
        np.full(len(rows), 3),
        np.full(len(rows), 7),
        rows,
        rows[:, 2] * rows[:, 3],
        np.array(crowd or [False] * len(rows), dtype=np.bool_),
    )


def found_of(*rows: tuple[list[float], float], image: int = 3, category: int = 7) -> DetectionArrays:
    return DetectionArrays(
        np.full(len(rows), image),
        np.full(len(rows), category),
        np.array([box for box, _ in rows], dtype=np.float64).reshape(-1, 4),
        np.array([score for _, score in rows], dtype=np.float64),
    )


def defined(category_ap: dict[Any, float | None]) -> dict[Any, float]:
    return {category: ap for category, ap in category_ap.items() if ap is not None}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("case", "truth", "found"),
    [
        (
            "val2014_100",
            "coco_eval/val2014_100/instances_val2014_100.json",
            "instances_val2014_fakebbox100_results.json",
        ),
        ("coco_mini_val", "coco_mini/annotations/instances_val2017.json", "detections.json"),
    ],
)
def test_expected_numbers(shared: Path, case: str, truth: str, found: str, backend: Backend) -> None:
    folder = shared / "data" / "coco_eval" / case
    expected = json.loads((folder / "expected_bbox.json").read_text())
    result = evaluate_boxes(
        evaluator.read_ground_truth(shared / "data" / truth), evaluator.read_detections(folder / found), backend
    )
    assert result.metrics == pytest.approx(expected["metrics"], abs=1e-9, rel=0)
    assert list(result.metrics) == list(expected["metrics"])
    per_category = {str(category): ap for category, ap in result.category_ap.items()}
    assert defined(per_category) == pytest.approx(defined(expected["per_category_AP"]), abs=1e-9, rel=0)
    assert per_category.keys() == expected["per_category_AP"].keys()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ap_of_right_wrong_right(backend: Backend) -> None:
    second = [300.0, 20.0, 100.0, 50.0]
    found = found_of((BOX, 0.9), ([500.0, 300.0, 20.0, 20.0], 0.8), (second, 0.7))
    # recall 1/2 at precision 1, then recall 1 at precision 2/3: of the 101 recalls 0, .01 .. 1 the first 51 get 1
    expected = (51 + 50 * 2 / 3) / 101
    metrics = coco_metrics(truth_of([BOX, second]), found, backend)
    assert metrics["AP"] == pytest.approx(expected, abs=1e-12)
    assert metrics["AP50"] == pytest.approx(expected, abs=1e-12)
    assert metrics["APm"] == pytest.approx(1)  # the wrong one is small: 400 square pixels
    assert metrics["AR1"] == pytest.approx(0.5)
    assert metrics["AR10"] == pytest.approx(1)
    assert metrics["APs"] == metrics["ARl"] == -1  # nothing to find
    thin = found_of((BOX, 0.9), ([500.0, 0.0, 4.0, 400.0], 0.8), (second, 0.7))  # 1600 square pixels: medium
    assert coco_metrics(truth_of([BOX, second]), thin, backend)["APm"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ap_over_iou_thresholds(backend: Backend) -> None:
    metrics = coco_metrics(truth_of([BOX]), found_of(([10.0, 20.0, 82.0, 50.0], 0.9)), backend)
    # IoU 0.82 reaches .50, .55 .. .80: seven of ten thresholds
    assert metrics["AP"] == pytest.approx(0.7)
    assert metrics["AP50"] == metrics["AP75"] == pytest.approx(1)
    assert metrics["AR100"] == pytest.approx(0.7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hundred_of_a_thousand_detections_count(backend: Backend) -> None:
    """Merged views leave up to 1000 detections of an image; the best 100 of a class take part, as for everyone."""
    wrong = [([300.0 + row, 300.0, 20.0, 20.0], 1 - row / 2000) for row in range(999)]
    for place, expected in ((99, 1 / 100), (100, 0.0)):  # the right one as the 100th: precision 1/100 at recall 1
        rows = [*wrong[:place], (BOX, wrong[place][1] + 1e-4), *wrong[place:]]
        metrics = coco_metrics(truth_of([BOX]), found_of(*rows), backend)
        assert metrics["AP"] == pytest.approx(expected)
        assert metrics["AR100"] == (expected > 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_crowd_is_ignored(backend: Backend) -> None:
    crowd = [300.0, 100.0, 200.0, 200.0]
    inside = [350.0, 150.0, 20.0, 20.0]  # IoU with a crowd is measured over the detection's own area: 1
    found = found_of((inside, 0.9), (inside, 0.8), (BOX, 0.5))
    assert coco_metrics(truth_of([BOX, crowd], [False, True]), found, backend)["AP"] == pytest.approx(1)
    assert coco_metrics(truth_of([BOX]), found, backend)["AP"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_found_and_nothing_to_find(backend: Backend) -> None:
    empty = evaluate_boxes(truth_of([BOX]), evaluator.no_detections(), backend)
    assert empty.metrics == {key: -1 if key[-1] in "sl" else 0 for key in evaluator.METRICS}
    assert empty.category_ap == {7: 0, 9: None}
    for truth in (truth_of([]), truth_of([])._replace(image_ids=np.zeros(0, np.int64))):
        assert set(evaluate_boxes(truth, evaluator.no_detections(), backend).metrics.values()) == {-1}
    assert set(coco_metrics(truth_of([]), found_of((BOX, 0.5)), backend).values()) == {-1}


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_beyond_float_precision(backend: Backend) -> None:
    ids = np.array([2**60, 2**60 + 1])  # one number to a back end that keeps ids as floats
    truth = GroundTruth(ids, ids, ids, ids, np.array([BOX, BOX]), np.array([5000.0, 5000.0]), np.zeros(2, np.bool_))
    right = DetectionArrays(ids, ids, np.array([BOX, BOX]), np.array([0.5, 0.6]))
    assert coco_metrics(truth, right, backend)["AP"] == pytest.approx(1)
    assert coco_metrics(truth, right._replace(image_id=ids[::-1]), backend)["AP"] == 0


def random_case(seed: int) -> tuple[GroundTruth, DetectionArrays]:
    """A few images and classes with unsorted sparse ids, equal scores, crowds, boxes without area, many an image."""
    random = np.random.default_rng(seed)
    images, categories = random.permutation(50)[:6], random.permutation(90)[:3]
    m, n = int(random.integers(1, 60)), int(random.integers(1, 900))
    boxes = np.round(random.uniform(0, 150, (m, 4)) * random.integers(0, 9, (m, 1)).clip(0, 1), 1)
    near = boxes[random.integers(m, size=n)] * random.uniform(0.9, 1.1, (n, 4))
    truth = GroundTruth(
        images,
        categories,
        random.choice(images, m),
        random.choice(categories, m),
        boxes,
        boxes[:, 2] * boxes[:, 3],
        random.random(m) < 0.2,
    )
    scores = np.round(random.random(n), 1)
    return truth, DetectionArrays(random.choice(images[:4], n), random.choice(categories, n), near, scores)


@pytest.mark.parametrize("seed", range(6))
def test_back_ends_agree(seed: int) -> None:
    truth, found = random_case(seed)
    ours, reference = (evaluate_boxes(truth, found, backend) for backend in BACKENDS)
    assert ours.metrics == pytest.approx(reference.metrics, abs=1e-12, rel=0)
    assert defined(ours.category_ap) == pytest.approx(defined(reference.category_ap), abs=1e-12, rel=0)


def test_shards_equal_the_whole() -> None:
    truth, found = random_case(1)
    odd = found.image_id % 2 == 1
    shards = [DetectionArrays(*(field[mask] for field in found)) for mask in (odd, ~odd)]
    joined = evaluator.concatenate([*shards, evaluator.no_detections()])
    assert len(joined.scores) == len(found.scores)
    assert coco_metrics(truth, joined) == coco_metrics(truth, found)
    assert evaluator.concatenate([]).boxes.shape == (0, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_silent(backend: Backend, capfd: pytest.CaptureFixture[str]) -> None:
    coco_metrics(truth_of([BOX]), found_of((BOX, 0.5)), backend)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (found_of((BOX, 0.5), image=5), "detection 0 has image_id 5,"),
        (found_of((BOX, 0.5), category=0), "detection 0 has category_id 0,"),
        (found_of((BOX, 0.5), (BOX, float("nan"))), "detection 1 has score nan;"),
        (found_of(([10.0, 20.0, float("inf"), 50.0], 0.5)), r"detection 0 has bbox \[10.0, 20.0, inf, 50.0\];"),
    ],
)
def test_bad_detections(found: DetectionArrays, words: str) -> None:
    with pytest.raises(UserError, match=words):
        coco_metrics(truth_of([BOX]), found)


def batch_of(sizes: list[list[int]], original_sizes: list[list[int]]) -> Batch:
    count = len(sizes)
    return Batch(
        torch.zeros(count, 3, 1, 1, dtype=torch.uint8),
        torch.tensor(sizes),
        torch.zeros(count, 0, 4),
        torch.zeros(count, 0, dtype=torch.long),
        torch.zeros(count, 0, dtype=torch.bool),
        torch.arange(count) + 3,
        torch.tensor(original_sizes),
    )


def test_detections_return_to_image_pixels() -> None:
    detections = Detections(
        torch.tensor([[[0.0, 0, 0, 0], [0, 0, 0, 0]], [[20, 30, 60, 90], [0, 0, 0, 0]]]),
        torch.tensor([[0.0, 0], [0.25, 0]]),
        torch.tensor([[0, 0], [1, 0]]),
        torch.tensor([[False, False], [True, False]]),
    )
    batch = batch_of([[64, 64], [120, 100]], [[64, 64], [40, 50]])  # the second by 3 in y and 2 in x
    found = evaluator.detection_arrays(detections, batch, np.array([7, 9]))
    assert [field.tolist() for field in found] == [[4], [9], [[10, 10, 20, 20]], [0.25]]
    found = evaluator.detection_arrays(detections, batch, np.array([7, 9]), LEGACY)
    assert found.boxes.tolist() == [[10, 10, 21, 21]]
    none = detections._replace(valid=torch.zeros(2, 2, dtype=torch.bool))
    assert [field.shape for field in evaluator.detection_arrays(none, batch, np.array([7, 9]))] == [
        field.shape for field in evaluator.no_detections()
    ]


ANNOTATION = {"id": 0, "image_id": 3, "category_id": 7, "bbox": BOX, "area": 5000.0, "iscrowd": 0}
TRUTH: dict[str, Any] = {
    "images": [{"id": 3, "file_name": "3.jpg"}, {"id": 4}],
    "categories": [{"id": 9}, {"id": 7}],
    "annotations": [ANNOTATION],
}
DETECTION = {"image_id": 3, "category_id": 7, "bbox": BOX, "score": 0.5}


def test_table_equals_file(tmp_path: Path) -> None:
    boxes = np.array([BOX, [1.5, 2.5, 3.5, 4.5]])
    table = Table(
        categories=(Category(7, "cat"), Category(9, "dog")),
        image_ids=np.array([3, 4, 5]),
        heights=np.array([480, 480, 480], np.int32),
        widths=np.array([640, 640, 640], np.int32),
        name_offsets=np.zeros(4, np.int64),
        name_bytes=np.zeros(0, np.uint8),
        box_offsets=np.array([0, 1, 1, 2]),
        boxes_xywh=boxes,
        labels=np.array([0, 1], np.int32),
        crowd=np.array([False, True]),
        areas=np.array([4000.0, 15.75]),
        annotation_ids=np.array([0, 1]),
        difficult=np.array([False, False]),
        images=NoImages(),
        source="",
    )
    content = {
        "images": [{"id": 3}, {"id": 4}, {"id": 5}],
        "categories": [{"id": 7}, {"id": 9}],
        "annotations": [
            {"image_id": 3, "category_id": 7, "bbox": BOX, "area": 4000},
            {"image_id": 5, "category_id": 9, "bbox": [1.5, 2.5, 3.5, 4.5], "iscrowd": True},
        ],
    }
    (tmp_path / "truth.json").write_text(json.dumps(content))
    pairs = zip(
        evaluator.ground_truth_from_table(table), evaluator.read_ground_truth(tmp_path / "truth.json"), strict=True
    )
    for ours, theirs in pairs:
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


def test_results_file_round_trip(tmp_path: Path) -> None:
    _, found = random_case(2)
    evaluator.write_detections(tmp_path / "found.json", found)
    assert set(json.loads((tmp_path / "found.json").read_text())[0]) == set(DETECTION)
    for ours, theirs in zip(evaluator.read_detections(tmp_path / "found.json"), found, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, truth: object, found: object, *flags: str
) -> int | str | None:
    for name, content in (("truth.json", truth), ("found.json", found)):
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    monkeypatch.setattr(sys, "argv", ["evaluator", str(folder / "truth.json"), str(folder / "found.json"), *flags])
    with pytest.raises(SystemExit) as caught:
        run(evaluator.main)
    return caught.value.code


@pytest.mark.parametrize("backend", BACKENDS)
def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    code = command(tmp_path, monkeypatch, TRUTH, [DETECTION], "--json", "--backend", backend)
    answer = json.loads(capsys.readouterr().out)
    assert code == 0
    assert answer["metrics"]["AP"] == pytest.approx(1)  # although the annotation's id is 0
    assert answer["per_category_AP"] == {"7": pytest.approx(1), "9": None}


def test_command_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path, monkeypatch, TRUTH, []) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "0 detections on 2 images, 1 boxes"
    assert [line.split()[0] for line in lines[1:]] == list(evaluator.METRICS)
    assert lines[1].split()[1] == "0.0000"
    assert lines[4].split()[1] == "none"


@pytest.mark.parametrize(
    ("truth", "found", "words"),
    [
        (None, [], "truth.json: No such file"),
        (TRUTH, None, "found.json: No such file"),
        ("", [], "truth.json: not valid JSON"),
        ('{"images": [', [], "truth.json: not valid JSON"),
        ('{"info": ' + "[" * 100_000, [], "truth.json: not valid JSON"),
        ([], [], "truth.json: not a COCO annotation file (Expected `object`, got `array`)"),
        ({**TRUTH, "images": [{"id": "3"}]}, [], "`$.images[0].id`"),
        ({**TRUTH, "images": [{"id": 3}, {"id": 3}]}, [], "truth.json: image id 3 occurs 2 times"),
        ({**TRUTH, "categories": [{"id": 7}, {"id": 7}]}, [], "truth.json: category id 7 occurs 2 times"),
        ({**TRUTH, "annotations": [{**ANNOTATION, "image_id": 5}]}, [], "annotation 0 has image_id 5"),
        ({**TRUTH, "annotations": [{**ANNOTATION, "category_id": 8}]}, [], "annotation 0 has category_id 8"),
        ({**TRUTH, "annotations": [{**ANNOTATION, "image_id": 2**70}]}, [], "more than 64 bits"),
        ({**TRUTH, "annotations": [{**ANNOTATION, "bbox": [1, 2, 3]}]}, [], "length 4"),
        ({**TRUTH, "annotations": [{**ANNOTATION, "area": float("nan")}]}, [], "annotation 0 has area nan"),
        (TRUTH, {"detections": []}, "found.json: not a COCO results file"),
        (TRUTH, [DETECTION, {"image_id": 3}], "missing required field `category_id` - at `$[1]`"),
        (TRUTH, [{**DETECTION, "score": "high"}], "Expected `float`, got `str`"),
        (TRUTH, [{**DETECTION, "image_id": 3.5}], "Expected `int`, got `float`"),
        (TRUTH, [DETECTION, {**DETECTION, "score": float("nan")}], "found.json: detection 1 has score nan"),
        (TRUTH, "[{'image_id': 3}]", "found.json: not valid JSON"),
        (TRUTH, [{**DETECTION, "image_id": 99}], "found.json: detection 0 has image_id 99"),
        (TRUTH, json.dumps([DETECTION]).replace("0.5", "1e999"), "Number out of range - at `$[0].score`"),
    ],
)
def test_command_refuses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    truth: object,
    found: object,
    words: str,
) -> None:
    assert command(tmp_path, monkeypatch, truth, found) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


def test_help_imports_no_torch() -> None:
    code = "import sys, core.evaluator as e; sys.argv = ['e', '--help']\ntry: e.main()\nexcept SystemExit: pass\n"
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True, capture_output=True)
