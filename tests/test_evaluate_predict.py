"""`evaluate` and `predict` of every method on a model of two steps: what they write, and what they refuse."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core import commands
from core.commands import ImageSource, output_names
from core.errors import UserError
from core.evaluator import METRICS, evaluate_boxes, read_detections, read_ground_truth
from core.tta import paper_views
from tests.runs import METHODS, SQUARES, call, run, tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "data"
    run("core.data", "shapes", str(folder), "--train", "4", "--val", "5", "--test", "2")
    return folder


@pytest.fixture(scope="module", params=METHODS)
def trained(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A method and its checkpoint. A low threshold: an untrained model would find nothing."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    schedule = ("--steps", "2", "--batch-size", "2", "--workers", "0", "--score-threshold", "0.001")
    call(f"{request.param}.train", "--data", str(data), *tiny(request.param), *schedule, "--out", str(out))
    return request.param, out / "best.pt"


@pytest.fixture
def resizable(trained: tuple[str, Path]) -> tuple[str, Path]:
    """`trained`, if its network takes images of more than one size."""
    if trained[0] in SQUARES:
        pytest.skip("takes squares of one size")
    return trained


@pytest.fixture(autouse=True)
def undo_deterministic() -> Iterator[None]:
    """The flag --deterministic sets it for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)


def test_evaluate_writes_what_the_evaluator_says(
    trained: tuple[str, Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    method, weights = trained
    call(f"{method}.evaluate", str(weights), "--workers", "0", "--out", str(tmp_path))
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    found = read_detections(tmp_path / "detections.json")
    assert len(found.scores) > 0
    expected = evaluate_boxes(read_ground_truth(data / "annotations" / "instances_val.json"), found, "pycocotools")
    assert {name: metrics[name] for name in METRICS} == pytest.approx(expected.metrics, abs=1e-9)
    assert [entry["name"] for entry in metrics["per_class"]] == ["circle", "square", "triangle", "star"]
    assert "5 images" in capsys.readouterr().out


def test_deterministic_detections_are_the_same_bytes_for_any_batch_size(
    trained: tuple[str, Path], tmp_path: Path
) -> None:
    method, weights = trained
    written = []
    for size in ("1", "2", "5", "8"):
        flags = ("--workers", "0", "--deterministic", "--batch-size", size, "--out", str(tmp_path / size))
        call(f"{method}.evaluate", str(weights), *flags)
        written.append((tmp_path / size / "detections.json").read_bytes())
    assert written[0] == written[1] == written[2] == written[3]


def test_deterministic_detections_are_the_same_bytes_for_any_order_of_images(
    trained: tuple[str, Path], data: Path, tmp_path: Path
) -> None:
    method, weights = trained
    content = json.loads((data / "annotations" / "instances_val.json").read_text(encoding="utf-8"))
    content["images"] = content["images"][3:] + content["images"][2::-1]
    (tmp_path / "shuffled.json").write_text(json.dumps(content), encoding="utf-8")
    images = data / "val" if (data / "val").is_dir() else data / "images" / "val"
    (tmp_path / "shuffled.yaml").write_text(
        f"val: {{images: '{images}', annotations: shuffled.json}}", encoding="utf-8"
    )
    written = []
    for name, flags in (("plain", ()), ("shuffled", ("--data", str(tmp_path / "shuffled.yaml")))):
        out = ("--workers", "0", "--deterministic", "--batch-size", "2", "--out", str(tmp_path / name))
        call(f"{method}.evaluate", str(weights), *flags, *out)
        written.append((tmp_path / name / "detections.json").read_bytes())
    assert written[0] == written[1]


def test_batches_move_detections_by_rounding_only(trained: tuple[str, Path], tmp_path: Path) -> None:
    method, weights = trained
    found = []
    for size in ("1", "2", "5", "8"):
        flags = ("--workers", "0", "--batch-size", size, "--out", str(tmp_path / size))
        call(f"{method}.evaluate", str(weights), *flags)
        found.append(read_detections(tmp_path / size / "detections.json"))
    for other in found[1:]:
        one, two = (
            np.lexsort((part.boxes[:, 0].round(1), part.category_id, part.image_id)) for part in (found[0], other)
        )
        assert (found[0].category_id[one] == other.category_id[two]).all()
        np.testing.assert_allclose(other.scores[two], found[0].scores[one], atol=1e-5, rtol=0)
        np.testing.assert_allclose(other.boxes[two], found[0].boxes[one], atol=0.01, rtol=0)


def test_deterministic_detections_are_the_same_bytes_for_any_number_of_ranks(
    trained: tuple[str, Path], tmp_path: Path
) -> None:
    method, weights = trained
    written = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        flags = ("--workers", "0", "--deterministic", "--device", "cpu", "--out", str(out))
        if ranks == 1:
            call(f"{method}.evaluate", str(weights), *flags)
        else:
            run(f"{method}.evaluate", str(weights), *flags, ranks=ranks)
        written.append((out / "detections.json").read_bytes())
    assert written[0] == written[1]


def use_views(monkeypatch: pytest.MonkeyPatch, part: slice) -> None:
    """Only some of the 26 views: they would take a while."""
    monkeypatch.setattr(commands, "paper_views", lambda *size: paper_views(*size)[part])


def test_views_change_detections_and_one_view_does_not(
    resizable: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    method, weights = resizable
    found = {}
    for name, flags, part in (("plain", (), 0), ("one", ("--tta",), 1), ("four", ("--tta",), 4)):
        use_views(monkeypatch, slice(part))
        out = tmp_path / name
        call(f"{method}.evaluate", str(weights), "--workers", "0", *flags, "--out", str(out))
        printed = capsys.readouterr().out
        assert ("4 views of each image, short sides 32 to 64 px" in printed) == (name == "four")
        assert json.loads((out / "metrics.json").read_text(encoding="utf-8"))["tta"] == (name != "plain")
        found[name] = (out / "detections.json").read_bytes()
    assert found["one"] == found["plain"]
    assert found["four"] != found["plain"]


def test_merged_detections_are_the_same_bytes_for_any_batch_size(
    resizable: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, weights = resizable
    use_views(monkeypatch, slice(0, 12, 5))
    written = []
    for size in ("1", "3"):
        flags = ("--tta", "--workers", "0", "--deterministic", "--batch-size", size, "--out", str(tmp_path / size))
        call(f"{method}.evaluate", str(weights), *flags)
        written.append((tmp_path / size / "detections.json").read_bytes())
    assert written[0] == written[1]


def test_views_go_to_a_folder_of_their_own(resizable: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    method, weights = resizable
    use_views(monkeypatch, slice(2))
    call(f"{method}.evaluate", str(weights), "--workers", "0", "--tta")
    assert (weights.parent / "evaluate-val-tta" / "metrics.json").exists()


def test_a_network_of_squares_refuses_views(trained: tuple[str, Path]) -> None:
    method, weights = trained
    if method not in SQUARES:
        pytest.skip("takes images of any size")
    with pytest.raises(UserError, match="takes squares of 192 px only"):
        call(f"{method}.evaluate", str(weights), "--workers", "0", "--tta")


def test_batch_size_moves_detections_by_rounding_only(trained: tuple[str, Path], tmp_path: Path) -> None:
    method, weights = trained
    parts = []
    for size in ("1", "5"):
        out = tmp_path / size
        call(f"{method}.evaluate", str(weights), "--workers", "0", "--batch-size", size, "--out", str(out))
        parts.append(read_detections(out / "detections.json"))
    one, five = (part._asdict() for part in parts)
    order = [np.lexsort((part["scores"].round(4), part["category_id"], part["image_id"])) for part in (one, five)]
    assert len(order[0]) == len(order[1])
    np.testing.assert_allclose(one["scores"][order[0]], five["scores"][order[1]], atol=1e-4)


def test_predict_draws_every_image_once(trained: tuple[str, Path], data: Path, tmp_path: Path) -> None:
    method, weights = trained
    other = tmp_path / "other"
    first = sorted((data / "val").iterdir())[0]
    shutil.copytree(data / "val", other)
    flags = ("--score", "0", "--out", str(tmp_path / "out"))
    call(f"{method}.predict", str(weights), str(other), str(first), *flags)
    records = json.loads((tmp_path / "out" / "predictions.json").read_text(encoding="utf-8"))
    assert len(records) == 6
    drawn = [record["drawn"] for record in records]
    assert len(set(drawn)) == 6  # the same file name twice gets a number
    for record in records:
        with Image.open(tmp_path / "out" / record["drawn"]) as picture:
            assert picture.size == (record["width"], record["height"])
        scores = [detection["score"] for detection in record["detections"]]
        assert scores == sorted(scores, reverse=True)
        for detection in record["detections"]:
            x1, y1, x2, y2 = detection["box"]
            assert -0.01 <= x1 <= x2 <= record["width"] + 0.01
            assert -0.01 <= y1 <= y2 <= record["height"] + 0.01


def test_predict_finds_what_evaluate_finds(trained: tuple[str, Path], data: Path, tmp_path: Path) -> None:
    method, weights = trained
    content = json.loads((data / "annotations" / "instances_val.json").read_text(encoding="utf-8"))
    image = content["images"][0]
    call(f"{method}.evaluate", str(weights), "--workers", "0", "--deterministic", "--out", str(tmp_path))
    found = read_detections(tmp_path / "detections.json")
    rows = found.image_id == image["id"]
    flags = ("--score", "0", "--deterministic", "--out", str(tmp_path / "predicted"))
    call(f"{method}.predict", str(weights), str(data / "val" / image["file_name"]), *flags)
    (record,) = json.loads((tmp_path / "predicted" / "predictions.json").read_text(encoding="utf-8"))
    boxes = np.array([detection["box"] for detection in record["detections"]])
    boxes[:, 2:] -= boxes[:, :2]
    np.testing.assert_allclose(boxes, found.boxes[rows], atol=0.02)


def test_test_dev_writes_detections_and_no_numbers(
    trained: tuple[str, Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    method, weights = trained
    coco, out = tmp_path / "coco", tmp_path / "out"
    shutil.copytree(data / "test", coco / "test2017")
    content = json.loads((data / "annotations" / "instances_test.json").read_text(encoding="utf-8"))
    del content["annotations"]
    (coco / "annotations").mkdir()
    (coco / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps(content), encoding="utf-8")
    flags = ("--data", str(coco), "--split", "test-dev", "--workers", "0")
    call(f"{method}.evaluate", str(weights), *flags, "--out", str(out))
    assert [path.name for path in out.iterdir()] == ["detections.json"]
    found = read_detections(out / "detections.json")
    assert set(found.image_id) <= {image["id"] for image in content["images"]}
    assert len(found.scores) > 0
    said = capsys.readouterr().out
    assert "2 images of coco test-dev; no AP" in said
    assert f"python -m {method}.report --submission" in said


def test_other_classes_are_refused(trained: tuple[str, Path], data: Path, tmp_path: Path) -> None:
    method, weights = trained
    renamed = tmp_path / "data"
    shutil.copytree(data, renamed)
    for path in (renamed / "annotations").iterdir():
        path.write_text(path.read_text(encoding="utf-8").replace('"star"', '"stair"'), encoding="utf-8")
    with pytest.raises(UserError, match=r"class 4 'star' is 4 'stair' in .*instances_val"):
        call(f"{method}.evaluate", str(weights), "--data", str(renamed), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.jpg",), "nowhere.jpg: no such image or folder"),
        (("EMPTY",), "no images in this folder"),
        (("TEXT",), "not an image"),
        (("IMAGE", "--score", "2"), r"--score must be in \[0, 1\], got 2.0"),
        (("IMAGE", "--device", "gpu"), "device 'gpu' is not known"),
    ],
)
def test_predict_refuses(
    trained: tuple[str, Path],
    data: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    method, weights = trained
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("words")
    places = {"EMPTY": tmp_path / "empty", "TEXT": tmp_path / "text.jpg", "IMAGE": next((data / "val").iterdir())}
    words = [str(places.get(word, word)) for word in arguments]
    with pytest.raises(UserError, match=message) as error:
        call(f"{method}.predict", str(weights), *words, "--out", str(tmp_path / "out"))
    assert "\n" not in str(error.value)


def test_predict_never_draws_over_what_it_reads(trained: tuple[str, Path], data: Path, tmp_path: Path) -> None:
    method, weights = trained
    own = tmp_path / "own"
    own.mkdir()
    first = next((data / "val").iterdir())
    Image.open(first).save(own / "mine.png")
    before = (own / "mine.png").read_bytes()
    with pytest.raises(UserError, match=r"mine.png: is one of the images to read"):
        call(f"{method}.predict", str(weights), str(own), "--out", str(own))
    assert (own / "mine.png").read_bytes() == before


def test_names_of_pictures_are_all_different() -> None:
    names = ["a/a.jpg", "b/a.png", "b/a-2.png", "c/a.jpg", "c/b.jpg"]
    assert output_names([ImageSource(name, lambda: np.zeros((1, 1, 3), np.uint8)) for name in names]) == [
        *("a.png", "a-2.png", "a-2-2.png", "a-3.png", "b.png")
    ]
