"""Post-processing: theta, both decodings, thresholds, limits, edges."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from core.types import Detections
from padet.anchors import Anchors
from padet.config import Config
from padet.model import Outputs
from padet.postprocess import candidate_boxes, detect

SIZES = torch.tensor([[192, 192]])


def row_of_boxes(count: int) -> Tensor:
    """Anchors of 10 x 10 pixels side by side, 20 pixels apart."""
    left = torch.arange(count) * 20.0
    return torch.stack([left, torch.full_like(left, 20.0), left + 10, torch.full_like(left, 30.0)], dim=1)


def outputs_of(scores: list[list[float]], apm: list[float] | None = None, **changes: Any) -> Outputs:
    """One image; class probabilities of each anchor, the rest is background; nothing moves."""
    classes = torch.tensor([scores])
    background = 1 - classes.sum(dim=-1, keepdim=True)
    logits = torch.cat([background, classes], dim=-1).log()
    zeros = torch.zeros(*classes.shape[:2], 4)
    score = None if apm is None else torch.tensor([apm], dtype=torch.float64).logit()
    outputs = Outputs(score, zeros, logits, zeros.clone(), (), Anchors(row_of_boxes(len(scores)), (), ()))
    return outputs._replace(**changes)


def run(outputs: Outputs, config: Config | None = None, sizes: Tensor = SIZES) -> Detections:
    return detect(outputs, sizes, config or Config())


def test_both_stages_move_the_box_by_hand() -> None:
    # anchor centre (25, 25), side 10; promoted by 0.1 * 5 * 10 = 5 to the right; then down 0.1 * 10 * 10 = 10
    outputs = outputs_of([[0.1], [0.9]])
    assert outputs.apm_deltas is not None
    outputs.apm_deltas[..., 0] = 5.0
    found = run(outputs._replace(deltas=torch.tensor([0.0, 10, 0, 0]).expand(1, 2, 4)))
    torch.testing.assert_close(found.boxes[0, 0], torch.tensor([25.0, 30, 35, 40]))
    assert found.scores[0].tolist() == pytest.approx([0.9, 0.1])
    assert found.labels[0].tolist() == [0, 0]
    without = run(outputs._replace(apm_deltas=None))
    torch.testing.assert_close(without.boxes[0, 0], torch.tensor([20.0, 20, 30, 30]))


def test_theta_discards_anchors_and_takes_no_part_in_scores() -> None:
    # .005 is below theta, theta itself stays; the score stays that of the class
    outputs = outputs_of([[0.9], [0.8], [0.7]], apm=[0.005, 0.01, 0.5])
    assert outputs.apm_logits is not None
    theta = outputs.apm_logits[0, 1].sigmoid().item()
    assert run(outputs, Config(theta=theta)).scores[0].tolist() == pytest.approx([0.8, 0.7])
    assert run(outputs, Config(theta=0.0)).scores[0].tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert run(outputs._replace(apm_logits=None)).scores[0].tolist() == pytest.approx([0.9, 0.8, 0.7])


def test_class_threshold_is_strict() -> None:
    outputs = outputs_of([[0.25, 0.5]])
    threshold = outputs.logits.softmax(dim=-1)[0, 0, 1].item()
    assert run(outputs, Config(score_threshold=threshold)).labels[0].tolist() == [1]
    assert run(outputs, Config(score_threshold=threshold - 1e-6)).labels[0].tolist() == [1, 0]


def test_an_anchor_can_hold_two_classes() -> None:
    found = run(outputs_of([[0.3, 0.6]]))
    assert found.labels[0].tolist() == [1, 0]
    assert found.scores[0].tolist() == pytest.approx([0.6, 0.3])


def test_boxes_are_clipped_and_dropped_without_area() -> None:
    found = run(outputs_of([[0.9], [0.8], [0.7]]), sizes=torch.tensor([[192, 25]]))
    torch.testing.assert_close(found.boxes[0], torch.tensor([[0.0, 20, 10, 30], [20, 20, 25, 30]]))


def test_overlapping_boxes_of_a_class_are_lowered() -> None:
    # the same box twice: IoU 1; Gaussian exp(-1 / .5)
    outputs = outputs_of([[0.9, 0.0], [0.5, 0.0]])
    boxes = outputs.anchors.boxes[:1].expand(2, 4)
    outputs = outputs._replace(anchors=Anchors(boxes, (), ()))
    assert run(outputs).scores[0].tolist() == pytest.approx([0.9])
    assert run(outputs, Config(nms="gaussian")).scores[0].tolist() == pytest.approx([0.9, 0.0676676], abs=1e-6)


def test_limits() -> None:
    scores = [[0.9, 0.0], [0.8, 0.1], [0.7, 0.2], [0.6, 0.3]]
    outputs = outputs_of(scores)
    assert len(candidate_boxes(outputs, SIZES, Config()).scores) == 7
    pool = candidate_boxes(outputs, SIZES, Config(pre_nms_top=2))
    assert pool.scores.tolist() == pytest.approx([0.9, 0.8, 0.2, 0.3])  # two of each class, in the order of anchors
    assert run(outputs, Config(max_detections=3)).scores[0].tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert Config().max_detections == 300


@pytest.mark.parametrize("count", [0, 1, 4])
def test_images_with_different_numbers_of_detections(count: int) -> None:
    scores = torch.zeros(2, 4, 1)
    scores[0, :count] = torch.linspace(0.9, 0.5, 4)[:count, None]
    single = outputs_of([[0.0]] * 4)
    logits = torch.cat([1 - scores, scores], dim=-1).log()
    zeros = torch.zeros(2, 4, 4)
    both = single._replace(logits=logits, apm_deltas=zeros, deltas=zeros)
    found = run(both, sizes=SIZES.repeat(2, 1))
    assert found.valid.sum(dim=1).tolist() == [count, 0]
    assert found.boxes.shape == (2, count, 4)


def test_a_batch_is_its_images() -> None:
    generator = torch.Generator().manual_seed(0)
    anchors = Anchors(row_of_boxes(9), (), ())
    parts = [torch.randn(3, 9, *shape, generator=generator) for shape in ((), (4,), (4,), (4,))]
    scores, promotion, logits, deltas = parts
    both = Outputs(scores, promotion, logits, deltas, (), anchors)
    together = run(both, sizes=SIZES.repeat(3, 1))
    for image in range(3):
        one = Outputs(*(part[image : image + 1] for part in parts), (), anchors)  # type: ignore[arg-type, call-arg]
        alone = run(one)
        valid = together.valid[image]
        assert torch.equal(alone.boxes[0], together.boxes[image, valid])
        assert torch.equal(alone.scores[0], together.scores[image, valid])


def test_half_precision_is_decoded_in_float32() -> None:
    outputs = outputs_of([[0.9]])
    assert outputs.apm_deltas is not None
    half = outputs._replace(logits=outputs.logits.bfloat16(), deltas=outputs.deltas.bfloat16())
    assert run(half).boxes.dtype == torch.float32
    assert run(half, replace(Config(), score_threshold=0.5)).valid.all()
