"""VOC's average precision: by hand, against a slow twin in the devkit's own coordinates, against COCO's matching."""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core import commands
from core.data.sources import DataSource, open_data
from core.errors import UserError
from core.evaluator import (
    DetectionArrays,
    GroundTruth,
    coco_metrics,
    evaluate_boxes,
    ground_truth_from_table,
    no_detections,
)
from core.inference import ground_truth
from core.voc import Curve, VocResult, area_ap, class_curves, eleven_point_ap, evaluate_voc, judge, paired_ious
from tests.core.voc_folder import Thing, write_year
from tests.runs import METHODS, TINY, run

CLASS, OTHER = 7, 9
NEAR = [10.0, 10, 40, 40]
FAR = [100.0, 100, 40, 40]
NOWHERE = [300.0, 300, 5, 5]


def truth_of(*boxes: list[float], difficult: tuple[int, ...] = (), images: tuple[int, ...] = ()) -> GroundTruth:
    """Objects of CLASS, in image 1 where `images` does not say otherwise; there is a class OTHER without any."""
    count = len(boxes)
    return GroundTruth(
        np.array([1, 2, 3]),
        np.array([CLASS, OTHER]),
        np.array(images or [1] * count, dtype=np.int64),
        np.full(count, CLASS),
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.ones(count),
        np.isin(np.arange(count), difficult),
    )


def found_of(*rows: tuple[list[float], float], images: tuple[int, ...] = ()) -> DetectionArrays:
    """Detections of CLASS as (box, score)."""
    return DetectionArrays(
        np.array(images or [1] * len(rows), dtype=np.int64),
        np.full(len(rows), CLASS),
        np.array([box for box, _ in rows], dtype=np.float64).reshape(-1, 4),
        np.array([score for _, score in rows], dtype=np.float64),
    )


def numbers(truth: GroundTruth, found: DetectionArrays) -> tuple[float, float]:
    metrics = evaluate_voc(truth, found).metrics
    return metrics["VOC07"], metrics["VOC12"]


def test_two_objects_three_detections() -> None:
    # right .9, wrong .8, right .7: recalls 1/2, 1/2, 1 with precisions 1, 1/2, 2/3. Points 0 to .5: 1; .6 to 1: 2/3
    # (6 * 1 + 5 * 2/3) / 11 = 0.8484848 (spec PADet, check 13); area 1/2 * 1 + 1/2 * 2/3 = 0.8333333
    found = found_of((NEAR, 0.9), (NOWHERE, 0.8), (FAR, 0.7))
    assert numbers(truth_of(NEAR, FAR), found) == pytest.approx((0.8484848, 5 / 6), abs=1e-7)
    result = evaluate_voc(truth_of(NEAR, FAR), found)
    assert result.category_ap[CLASS] == pytest.approx(result.metrics)
    assert result.category_ap[OTHER] == {"VOC07": None, "VOC12": None}  # no objects: not in the mean


def test_a_second_detection_is_wrong() -> None:
    # right .9, wrong .8 (twice), right .7: as above
    found = found_of((NEAR, 0.9), (NEAR, 0.8), (FAR, 0.7))
    assert numbers(truth_of(NEAR, FAR), found) == pytest.approx((0.8484848, 5 / 6), abs=1e-7)


def test_a_second_detection_never_falls_back() -> None:
    # Objects [0, 10) and [2, 12) of equal height. Both detections are [0, 10): IoU 1 with the first, 8 / 12 with the
    # second.
    truth = truth_of([0, 0, 10, 10], [2, 0, 10, 10])
    found = found_of(([0, 0, 10, 10], 0.9), ([0, 0, 10, 10], 0.8))
    assert judge(truth, found).tolist() == [1, 0]
    assert numbers(truth, found) == pytest.approx((6 / 11, 1 / 2))
    assert coco_metrics(truth, found)["AP50"] == pytest.approx(1)  # COCO gives it the second object


def test_difficult_objects_do_not_count() -> None:
    # One object to find. .9 and .8 see the difficult one and are left out; .7 is right, .6 wrong.
    truth = truth_of(NEAR, FAR, difficult=(0,))
    found = found_of((NEAR, 0.9), (NEAR, 0.8), (FAR, 0.7), (NOWHERE, 0.6))
    assert judge(truth, found).tolist() == [-1, -1, 1, 0]
    assert numbers(truth, found) == pytest.approx((1, 1))
    assert numbers(truth_of(NEAR, difficult=(0,)), found) == (-1, -1)  # nothing but difficult: nothing to find
    # Overlapping a difficult object less than half is wrong as anywhere
    assert judge(truth, found_of(([10, 10, 40, 19.9], 0.9))).tolist() == [0]


def test_the_most_overlapped_object_decides_even_if_difficult() -> None:
    # [0, 10) against [0, 9), difficult, IoU .9, and [2, 12), IoU 8 / 12: left out, the second object stays unfound
    truth = truth_of([0, 0, 9, 10], [2, 0, 10, 10], difficult=(0,))
    assert judge(truth, found_of(([0, 0, 10, 10], 0.9))).tolist() == [-1]


def test_half_is_enough() -> None:
    truth = truth_of([0, 0, 10, 10])
    assert judge(truth, found_of(([0, 0, 10, 5], 0.9))).tolist() == [1]
    assert judge(truth, found_of(([0, 0, 10, 4.999], 0.9))).tolist() == [0]


def test_ties() -> None:
    # Equal scores: the first given is right. Equal IoUs: the first object is the one.
    truth = truth_of(NEAR, NEAR)
    assert judge(truth, found_of((NEAR, 0.5), (NEAR, 0.5))).tolist() == [1, 0]
    truth = truth_of(NEAR, NEAR, difficult=(0,))
    assert judge(truth, found_of((NEAR, 0.5))).tolist() == [-1]
    wrong_first = found_of((NOWHERE, 0.5), (NEAR, 0.5))
    assert numbers(truth_of(NEAR), wrong_first) == pytest.approx((1 / 2, 1 / 2))


def test_images_and_classes_are_apart() -> None:
    truth = truth_of(NEAR, images=(1,))
    assert judge(truth, found_of((NEAR, 0.9), (NEAR, 0.8), images=(2, 1))).tolist() == [0, 1]
    other = found_of((NEAR, 0.9))._replace(category_id=np.array([OTHER]))
    assert judge(truth, other).tolist() == [0]
    assert numbers(truth, other) == (0, 0)


def test_nothing() -> None:
    assert numbers(truth_of(NEAR), no_detections()) == (0, 0)
    assert numbers(truth_of(), no_detections()) == (-1, -1)
    assert numbers(truth_of(), found_of((NEAR, 0.5))) == (-1, -1)


def test_refuses_what_it_cannot_place() -> None:
    with pytest.raises(UserError, match="mine: detection 0 has image_id 8"):
        evaluate_voc(truth_of(NEAR), found_of((NEAR, 0.5), images=(8,)), "mine")
    with pytest.raises(UserError, match="score nan"):
        evaluate_voc(truth_of(NEAR), found_of((NEAR, np.nan)))


def test_a_recall_of_three_tenths_reaches_the_fourth_point() -> None:
    # 3 of 10 found without a mistake: points 0, .1, .2 and .3 count, though 3 * .1 > .3 as floats
    curve = Curve(np.arange(1, 4), np.arange(1, 4), 10)
    assert eleven_point_ap(curve) == pytest.approx(4 / 11)
    assert area_ap(curve) == pytest.approx(0.3)


def test_iou_is_the_devkits_with_its_extra_pixel() -> None:
    # Pixels 1..10 against 6..15 of one row: 5 shared of 15. The devkit: (10 - 6 + 1) / (10 + 10 - 5)
    boxes = np.array([[0.0, 0, 10, 1], [5, 0, 10, 1], [0, 0, 0, 0]])
    assert paired_ious(boxes[[0, 2, 0]], boxes[[1, 2, 2]]).tolist() == [pytest.approx(1 / 3), 0, 0]


def slow_voc(truth: GroundTruth, found: DetectionArrays) -> VocResult:
    """Class by class, detection by detection, object by object, on first and last pixels counted from 1."""
    per_class: dict[int, dict[str, float | None]] = {}
    objects = np.concatenate([truth.boxes[:, :2] + 1, truth.boxes[:, :2] + truth.boxes[:, 2:]], axis=1).tolist()
    boxes = np.concatenate([found.boxes[:, :2] + 1, found.boxes[:, :2] + found.boxes[:, 2:]], axis=1).tolist()
    for category in truth.category_ids.tolist():
        mine = [i for i in range(len(objects)) if truth.box_category_ids[i] == category]
        count = sum(not truth.crowd[i] for i in mine)
        rows = [row for row in range(len(boxes)) if found.category_id[row] == category]
        taken: set[int] = set()
        marks = []
        for row in sorted(rows, key=lambda row: -found.scores[row]):
            best, chosen = 0.0, -1
            for i in mine:
                if truth.box_image_ids[i] != found.image_id[row]:
                    continue
                iou = devkit_iou(boxes[row], objects[i])
                if iou > best:
                    best, chosen = iou, i
            if best < 0.5:
                marks.append(0)
            elif not truth.crowd[chosen]:
                marks.append(int(chosen not in taken))
                taken.add(chosen)
        per_class[category] = {"VOC07": None, "VOC12": None}
        if count:
            right = [sum(marks[: i + 1]) for i in range(len(marks))]
            points = [(r / count, r / (i + 1)) for i, r in enumerate(right)]  # recall, precision
            eleven = [max((p for r, p in points if r >= k / 10 - 1e-12), default=0) for k in range(11)]
            area = sum(max(p for _, p in points[i:]) / count for i, mark in enumerate(marks) if mark)
            per_class[category] = {"VOC07": sum(eleven) / 11, "VOC12": area}
    means = {}
    for name in ("VOC07", "VOC12"):
        values = [ap[name] for ap in per_class.values()]
        defined = [value for value in values if value is not None]
        means[name] = sum(defined) / len(defined) if defined else -1
    return VocResult(means, per_class)


def devkit_iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]) + 1, min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return 0
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def random_scene(seed: int, images: int, objects: int, detections: int) -> tuple[GroundTruth, DetectionArrays]:
    """Objects on a coarse grid and detections near them: many ties of IoU and score, IoUs of exactly one half too."""
    random = np.random.default_rng(seed)
    ids, classes = random.permutation(1000)[: images + 1], np.array([3, 1, 90])
    boxes = random.integers(1, 5, (objects, 4)) * 10.0
    truth = GroundTruth(
        ids,
        classes,
        random.choice(ids[:-1], objects) if images else np.zeros(0, np.int64),
        random.choice(classes[:2], objects),
        boxes,
        np.ones(objects),
        random.random(objects) < 0.3,
    )
    source = random.integers(objects, size=detections) if objects else None
    near = boxes[source] if source is not None else np.full((detections, 4), 10.0)
    return truth, DetectionArrays(
        truth.box_image_ids[source] if source is not None else random.choice(ids, detections),
        np.where(random.random(detections) < 0.1, 90, truth.box_category_ids[source])
        if source is not None
        else random.choice(classes, detections),
        np.maximum(near + random.integers(-1, 2, (detections, 4)) * random.choice([0, 5], (detections, 1)), 1),
        random.integers(1, 8, detections) / 8,
    )


@pytest.mark.parametrize(
    ("images", "objects", "detections"), [(1, 0, 0), (1, 0, 5), (1, 1, 0), (1, 1, 1), (3, 20, 60), (9, 60, 200)]
)
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_slow_twin(seed: int, images: int, objects: int, detections: int) -> None:
    truth, found = random_scene(seed, images, objects, detections)
    ours, slow = evaluate_voc(truth, found), slow_voc(truth, found)
    assert ours.metrics == pytest.approx(slow.metrics, abs=1e-12)
    assert ours.category_ap.keys() == slow.category_ap.keys()
    for category, values in ours.category_ap.items():
        assert values == pytest.approx(slow.category_ap[category], abs=1e-12)


def test_matching_equals_cocos_where_objects_lie_apart() -> None:
    """Without difficult or overlapping objects both rules match the same: our curve, read at COCO's points, is AP50."""
    random = np.random.default_rng(0)
    count = 130
    boxes = np.stack([np.arange(count) * 50.0, np.zeros(count), np.full(count, 20.0), np.full(count, 30.0)], axis=1)
    truth = truth_of(*boxes.tolist(), images=tuple((np.arange(count) // 10 % 3 + 1).tolist()))
    source = random.integers(count, size=200)
    found = DetectionArrays(
        truth.box_image_ids[source],
        np.full(200, CLASS),
        boxes[source] + random.normal(0, 3, (200, 4)),
        random.permutation(200) / 200,
    )
    curve = class_curves(truth, found)[CLASS]
    precision, recall = curve.right / curve.found, curve.right / curve.objects
    best = np.maximum.accumulate(precision[::-1])[::-1]
    points = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
    coco = np.append(best, 0)[points].mean()
    expected = evaluate_boxes(truth, found).metrics["AP50"]
    assert coco == pytest.approx(expected, abs=1e-9)
    assert 0.3 < expected < 0.95
    assert area_ap(curve) == pytest.approx(expected, abs=0.01)  # 101 points against the exact area


def test_five_thousand_images_take_seconds() -> None:
    random = np.random.default_rng(0)
    images, each = 5000, 100
    boxes = random.uniform(1, 300, (12 * images, 4))
    truth = GroundTruth(
        np.arange(images),
        np.arange(20),
        np.repeat(np.arange(images), 12),
        random.integers(20, size=len(boxes)),
        boxes,
        np.ones(len(boxes)),
        random.random(len(boxes)) < 0.1,
    )
    found = DetectionArrays(
        np.repeat(np.arange(images), each),
        random.integers(20, size=images * each),
        random.uniform(1, 300, (images * each, 4)),
        random.random(images * each),
    )
    begin = time.process_time()
    assert 0 < evaluate_voc(truth, found).metrics["VOC12"] < 1
    assert time.process_time() - begin < 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images for training, two for validation; one dog is difficult, one box has no extent."""
    dog, flat = Thing("dog", (5, 5, 40, 40)), Thing("dog", (7, 7, 7, 9))
    images = {"000001": [dog], "000002": [dog], "000003": [dog, flat], "000004": [Thing("dog", (1, 1, 9, 9), 1)]}
    return write_year(
        tmp_path_factory.mktemp("voc") / "dogs", images, {"train": ["000001", "000002"], "val": ["000003", "000004"]}
    )


def test_ground_truth_of_a_voc_folder(folder: Path) -> None:
    table = open_data(str(folder)).val
    assert table.notes
    truth = ground_truth(table)
    assert truth.crowd.tolist() == [
        False,
        True,
    ]  # the difficult one is neither right nor wrong for COCO's numbers either
    assert truth.boxes.tolist() == [[4, 4, 36, 36], [0, 0, 9, 9]]
    assert ground_truth_from_table(table).crowd.tolist() == truth.crowd.tolist()
    found = DetectionArrays(np.array([3, 4]), np.array([12, 12]), truth.boxes, np.array([0.5, 0.9]))
    metrics = evaluate_boxes(truth, found).metrics | evaluate_voc(truth, found).metrics
    assert [metrics[name] for name in ("AP", "AP50", "VOC07", "VOC12")] == pytest.approx([1, 1, 1, 1])


def test_train_and_evaluate_on_a_voc_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    method, out = METHODS[0], tmp_path / "run"
    schedule = ("--steps", "1", "--batch-size", "2", "--workers", "0", "--no-voc-one-based")
    said = run(f"{method}.train", "--data", str(folder), *TINY, *schedule, "--out", str(out))
    assert "VOC07 0." in said.stdout
    best = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["best"]
    assert 0 <= best["VOC07"] <= 1
    assert 0 <= best["VOC12"] <= 1
    environment = json.loads((out / "environment.json").read_text(encoding="utf-8"))
    assert environment["data_fingerprint"] == open_data(str(folder), voc_one_based=False).fingerprint
    opened: list[DataSource] = []

    def opening(*arguments: Any, **named: Any) -> DataSource:
        opened.append(open_data(*arguments, **named))
        return opened[0]

    monkeypatch.setattr(commands, "open_data", opening)
    monkeypatch.setattr(sys, "argv", ["", str(out / "best.pt"), "--workers", "0", "--out", str(tmp_path / "e")])
    importlib.import_module(f"{method}.evaluate").main()
    assert opened[0].val.boxes_xywh[0].tolist() == [5, 5, 35, 35]  # corners counted from 0, as in training
    printed = capsys.readouterr().out
    assert "VOC07  0." in printed
    assert "VOC12  0." in printed
    metrics = json.loads((tmp_path / "e/metrics.json").read_text(encoding="utf-8"))
    assert {name: metrics[name] for name in ("AP", "VOC07", "VOC12")} == {n: best[n] for n in ("AP", "VOC07", "VOC12")}
    assert [entry["name"] for entry in metrics["per_class"] if entry["VOC07"] is not None] == ["dog"]
