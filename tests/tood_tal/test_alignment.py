"""The alignment analysis of Table 6: numbers by hand, a slow twin, edges, and the command."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core import checkpoint
from core.anchors import anchor_grid, level_shapes
from core.boxes import box_iou
from core.data.sources import open_data
from core.errors import UserError
from core.types import Detections, Targets
from tests.runs import ROOT, run
from tood_tal import alignment
from tood_tal.analysis import (
    ObjectAlignment,
    align_image,
    align_objects,
    average_ranks,
    count_boxes,
    describe,
    masked_mean,
    rank_correlation,
    ranking_scores,
    summary,
)
from tood_tal.config import PRESETS, Config
from tood_tal.losses import pixel_boxes
from tood_tal.model import TOOD, Outputs

SIZES = torch.tensor([[64, 64]])
NAN = math.nan


def random_boxes(generator: torch.Generator, *shape: int) -> Tensor:
    corner = 40 * torch.rand(*shape, 2, generator=generator)
    return torch.cat([corner, corner + 4 + 30 * torch.rand(*shape, 2, generator=generator)], dim=-1)


def widths(*sides: float) -> Tensor:
    """Boxes of height 10 from the origin: two of them have the ratio of their widths as IoU."""
    return torch.tensor([[0.0, 0.0, side, 10.0] for side in sides])


# Ranks


def test_ranks_and_their_correlation_by_hand() -> None:
    values = torch.tensor([[0.3, 0.9, 0.3, 0.1, 7.0]])
    valid = torch.tensor([[True, True, True, True, False]])
    assert average_ranks(values, valid)[0, :4].tolist() == [2.5, 4, 2.5, 1]
    others = torch.tensor([[0.5, 0.6, 0.7, 0.4, 0.0]])  # ranks 2, 3, 4, 1
    # from the mean of 2.5: (0, 1.5, 0, -1.5) and (-.5, .5, 1.5, -1.5); products 0.75 + 2.25; squares 4.5 and 5
    assert rank_correlation(values, others, valid).tolist() == pytest.approx([3 / math.sqrt(4.5 * 5)])


@pytest.mark.parametrize(("values", "valid"), [([0.5, 0.5, 0.5], 3), ([0.1, 0.2, 0.3], 1), ([0.1, 0.2, 0.3], 0)])
def test_nothing_to_rank(values: list[float], valid: int) -> None:
    there = torch.arange(3)[None] < valid
    assert rank_correlation(torch.tensor([values]), torch.tensor([[0.1, 0.2, 0.3]]), there).isnan().all()


def test_correlation_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(8, (2, 5, 30), generator=generator).float()
    expected = [stats.spearmanr(*rows).statistic for rows in zip(a, b, strict=True)]
    assert rank_correlation(a, b, torch.ones(5, 30, dtype=torch.bool)).tolist() == pytest.approx(expected)


def test_mean_of_the_valid() -> None:
    found = masked_mean(
        torch.tensor([[0.5, 0.7, 9.0], [1.0, 1.0, 1.0]]), torch.tensor([[True, True, False], [False] * 3])
    )
    assert found[0] == pytest.approx(0.6)
    assert found[1].isnan()


# Before NMS


def test_one_object_by_hand() -> None:
    """The box of IoU 0.05 does not belong to the object, however high its score."""
    boxes = widths(100, 80, 60, 40, 5)
    scores = torch.tensor([[0.5, 0.9], [0.6, 0.1], [0.2, 0.1], [0.2, 0.1], [0.9, 0.1]])
    found = align_image(scores, boxes, widths(100), torch.tensor([0]))
    # ranks by score 3, 4, 1.5, 1.5; by IoU 4, 3, 2, 1: products .5*1.5 + 1.5*.5 + .5 + 1.5; squares 4.5 and 5
    assert found.correlation.tolist() == pytest.approx([3.5 / math.sqrt(4.5 * 5)])
    assert found.top_iou.tolist() == pytest.approx([0.7])


def test_a_prediction_belongs_to_the_object_it_overlaps_most() -> None:
    boxes, labels = widths(100, 90, 70), torch.tensor([0, 0, 1])
    scores = torch.tensor([[0.3, 0.2], [0.2, 0.1], [0.1, 0.3]])
    found = align_image(scores, boxes, widths(100, 72, 60), labels)
    # first: 1 and .9; second: 70 / 72; third, of another class: .6, 60 / 90, 60 / 70
    assert found.top_iou.tolist() == pytest.approx([0.95, 70 / 72, (0.6 + 60 / 90 + 60 / 70) / 3])
    assert found.correlation.tolist() == pytest.approx([1, NAN, 0.5], nan_ok=True)
    twins = align_image(scores, boxes, widths(100, 100), torch.tensor([0, 0]))  # equal objects share
    assert twins.top_iou.tolist() == pytest.approx([(1 + 0.9 + 0.7) / 3] * 2)


def test_the_most_confident_count() -> None:
    """60 predictions: the 50 best scored are in order, the others would spoil it; the IoU is that of the 10 best."""
    ious = torch.cat([torch.linspace(0.95, 0.3, 50), torch.linspace(0.99, 0.96, 10)])
    scores = torch.linspace(0.9, 0.1, 60)[:, None]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    found = align_image(scores[order], widths(*(100 * ious[order]).tolist()), widths(100), torch.tensor([0]))
    assert found.correlation.tolist() == pytest.approx([1])
    assert found.top_iou.tolist() == pytest.approx([float(ious[:10].mean())])


def slow_object(scores: Tensor, boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor, number: int) -> tuple[float, float]:
    """One object, prediction by prediction."""
    mine = []
    for score, box in zip(scores[:, gt_labels[number]].tolist(), boxes, strict=True):
        ious = [float(box_iou(box, other)) for other in gt_boxes]
        rivals = [iou for iou, label in zip(ious, gt_labels, strict=True) if label == gt_labels[number]]
        if ious[number] >= 0.1 and ious[number] == max(rivals):
            mine.append((score, ious[number]))
    mine = sorted(mine, key=lambda pair: -pair[0])[:50]  # stable, as ours is
    if not mine:
        return NAN, NAN
    top = [iou for _, iou in mine[:10]]
    ranks = []
    for column in zip(*mine, strict=True):
        ranks.append([sum(v < w for v in column) + (sum(v == w for v in column) + 1) / 2 for w in column])
    middle = (len(mine) + 1) / 2
    a, b = ([rank - middle for rank in row] for row in ranks)
    spread = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / spread if spread else NAN, sum(top) / len(top)


@pytest.mark.parametrize(("anchors", "objects"), [(120, 3), (40, 3), (5, 4), (1, 1), (30, 0)])
def test_image_is_its_slow_twin(anchors: int, objects: int) -> None:
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        scores = (20 * torch.rand(anchors, 2, generator=generator)).floor() / 20  # many equal ones
        boxes, gt_boxes = random_boxes(generator, anchors), random_boxes(generator, objects)
        labels = torch.randint(2, (objects,), generator=generator)
        found = align_image(scores, boxes, gt_boxes, labels)
        expected = [slow_object(scores, boxes, gt_boxes, labels, number) for number in range(objects)]
        for column, wanted in zip(found, zip(*expected, strict=True) if expected else ((), ()), strict=True):
            assert column.tolist() == pytest.approx(list(wanted), nan_ok=True)


def test_plain_atss_ranks_by_centerness_too() -> None:
    outputs = random_outputs(seed=0)
    assert torch.equal(ranking_scores(outputs), outputs.scores)
    branch = torch.randn(outputs.scores.shape[:2])
    found = ranking_scores(outputs._replace(quality=branch))
    torch.testing.assert_close(found[0, 3], outputs.scores[0, 3] * branch[0, 3].sigmoid())


def random_outputs(seed: int) -> Outputs:
    generator, grid = torch.Generator().manual_seed(seed), anchor_grid(level_shapes((64, 64)))
    scores = torch.rand(2, len(grid.boxes), 2, generator=generator)
    return Outputs(scores, random_boxes(generator, 2, len(grid.boxes)) / 8, None, None, grid)


def test_batches_leave_padding_out_and_clip() -> None:
    outputs, generator = random_outputs(seed=1), torch.Generator().manual_seed(1)
    valid = torch.tensor([[True, False, True], [False, False, False]])
    targets = Targets(random_boxes(generator, 2, 3), torch.tensor([[0, 1, 1]] * 2), valid, SIZES.expand(2, 2) - 16)
    boxes, objects = pixel_boxes(outputs)[0], (targets.boxes[0, valid[0]], targets.labels[0, valid[0]])
    for profile, expected in (("ours", boxes.clamp(0, 48)), ("mmdet", boxes)):
        found = align_objects(outputs, targets, Config(profile=profile))  # type: ignore[arg-type]
        wanted = align_image(outputs.scores[0], expected, *objects)
        assert torch.equal(found.top_iou, wanted.top_iou)
        assert torch.equal(found.correlation, wanted.correlation)
        assert len(wanted.top_iou) == 2


def test_objects_together_by_hand() -> None:
    parts = [
        ObjectAlignment(torch.tensor([0.5, NAN]).double(), torch.tensor([0.8, 0.6]).double()),
        ObjectAlignment(torch.tensor([]).double(), torch.tensor([]).double()),
        ObjectAlignment(torch.tensor([0.1, NAN]).double(), torch.tensor([0.7, NAN]).double()),
    ]
    assert describe(parts) == {
        "objects": 4,
        "rank_correlation": pytest.approx(0.3),
        "rank_correlation_objects": 2,
        "top_iou": pytest.approx(0.7),
        "top_iou_objects": 3,
    }
    nothing = describe(parts[1:2])
    assert (nothing["rank_correlation"], nothing["top_iou"], nothing["objects"]) == (None, None, 0)


# After NMS


def detections(boxes: Tensor, labels: list[int]) -> Detections:
    """Of one image, with a row of padding."""
    count = len(boxes)
    return Detections(
        torch.cat([boxes, torch.zeros(1, 4)])[None],
        torch.linspace(0.9, 0.1, count + 1)[None],
        torch.tensor([[*labels, 0]]),
        torch.tensor([[True] * count + [False]]),
    )


def one_image(boxes: Tensor, labels: list[int]) -> Targets:
    return Targets(boxes[None], torch.tensor([labels]).reshape(1, -1), torch.ones(1, len(boxes)).bool(), SIZES)


def test_boxes_by_hand() -> None:
    targets = one_image(widths(100), [0])
    # hits .9 and .5, errors .49 and .11, neither .1 nor another class's
    found = detections(widths(90, 50, 49, 11, 10, 100), [0, 0, 0, 0, 0, 1])
    assert count_boxes(found, targets) == (1, 1, 2)
    two = one_image(torch.cat([widths(100), widths(100) + 300]), [0, 0])
    assert count_boxes(detections(torch.cat([widths(90), widths(80) + 300]), [0, 0]), two) == (2, 0, 0)
    assert count_boxes(found, targets._replace(valid=torch.tensor([[False]]))) == (0, 0, 0)


def test_no_objects_and_no_boxes() -> None:
    empty = one_image(torch.zeros(0, 4), [])
    assert count_boxes(detections(widths(90), [0]), empty) == (0, 0, 0)
    none = Detections(*(part[:, :0] for part in detections(widths(90), [0])))
    assert count_boxes(none, one_image(widths(100), [0])) == (0, 0, 0)
    assert count_boxes(none, empty) == (0, 0, 0)


@pytest.mark.parametrize("seed", range(4))
def test_boxes_are_their_slow_twin(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(2, 5, generator=generator) < 0.8
    targets = Targets(random_boxes(generator, 2, 5), torch.randint(2, (2, 5), generator=generator), valid, SIZES)
    near = (targets.boxes.repeat(1, 8, 1) + 4 * torch.randn(2, 40, 4, generator=generator)).clamp(min=0)
    labels = torch.randint(2, (2, 40), generator=generator)
    there = torch.rand(2, 40, generator=generator) < 0.9
    found = Detections(near, torch.linspace(1, 0, 40).expand(2, 40), labels, there)
    correct = redundant = error = 0
    for image in range(2):
        taken = set()
        for box, label, real in zip(near[image], labels[image], there[image], strict=True):
            pairs = [
                (float(box_iou(box, targets.boxes[image, row])), -row)
                for row in range(5)
                if real and valid[image, row] and targets.labels[image, row] == label
            ]
            best, row = max(pairs, default=(0.0, 0))
            correct += best >= 0.5 and row not in taken
            redundant += best >= 0.5 and row in taken
            error += 0.1 < best < 0.5
            taken |= {row} if best >= 0.5 else set()
    assert count_boxes(found, targets) == (correct, redundant, error)
    assert min(correct, redundant, error) > 0


# The command


def test_summary_says_what_is_measured_and_what_is_not() -> None:
    result = {"objects": 3, "rank_correlation": None, "rank_correlation_objects": 0, "top_iou": 0.5}
    result |= {"top_iou_objects": 1, "correct": 1, "redundant": 2, "error": 3, "detections": 7}
    lines = summary(result).splitlines()
    assert lines[0] == (
        "before NMS: rank correlation none over 0 of 3 objects, IoU of the 10 most confident 0.5000 over 1"
    )
    assert lines[1] == "after NMS: 1 correct, 2 redundant, 3 errors of 7 boxes"


def test_help_needs_no_torch() -> None:
    code = "import sys, tood_tal.alignment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


CELLS: dict[str, dict[str, object]] = {
    "plain_atss": {"head": "parallel", "quality": "centerness", "atss_share": 1.0},
    "t_head": {"score_threshold": 0.0, "max_detections": 7},
    "anchor_based_tap": {"head": "parallel_tap", "anchor_based": True},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn images: 1 of train, 2 of val."""
    folder = tmp_path_factory.mktemp("data") / "drawn"
    run("core.data", "shapes", str(folder), "--train", "1", "--val", "2", "--test", "0")
    return folder


def saved(folder: Path, data: Path, changes: dict[str, object]) -> Path:
    """Random weights of a small model that knows the data's classes."""
    start = {"channels": 64, "backbone_weights": "none", "frozen_stages": 0, "short_side": 64, "long_side": 96}
    config = replace(PRESETS["small"], data=str(data), **{**start, **changes})  # type: ignore[arg-type]
    categories = [[category.id, category.name] for category in open_data(str(data), 0).categories]
    torch.manual_seed(0)
    content = {"method": "tood_tal", "config": asdict(config), "categories": categories}
    checkpoint.save(folder / "w.pt", {**content, "model": TOOD(config, len(categories)).state_dict()})
    return folder / "w.pt"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["tood_tal.alignment", *arguments, "--device", "cpu"])
    alignment.main()


@pytest.mark.parametrize("cell", CELLS)
def test_weights_of_every_kind(
    cell: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = saved(tmp_path, data, CELLS[cell])
    call(monkeypatch, str(weights), "--workers", "0")
    content = json.loads((tmp_path / "alignment-val" / "alignment.json").read_text(encoding="utf-8"))
    assert content["objects"] >= content["top_iou_objects"] >= content["rank_correlation_objects"] > 0
    assert (content["images"], content["split"], content["weights"]) == (2, "val", str(weights))
    assert content["detections"] == (14 if cell == "t_head" else 0)
    assert set(content["protocol"]) == {"predictions", "rank_correlation", "top_iou", "boxes"}
    said = capsys.readouterr().out
    assert f"rank correlation {content['rank_correlation']:.4f} over" in said
    assert said.endswith(f"2 images of drawn val; written to {tmp_path / 'alignment-val' / 'alignment.json'}\n")


def test_other_folder_and_split(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = saved(tmp_path, data, {})
    options = ("--data", str(data), "--split", "train", "--out", str(tmp_path / "there"), "--workers", "0")
    call(monkeypatch, str(weights), *options)
    assert json.loads((tmp_path / "there" / "alignment.json").read_text(encoding="utf-8"))["images"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.pt",), "nowhere.pt: no such checkpoint"),
        (("w.pt", "--data", "nowhere"), "nowhere"),
        (("w.pt", "--batch-size", "0"), "batch_size"),
    ],
)
def test_mistakes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    saved(tmp_path, data, {})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        call(monkeypatch, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]
