"""The losses: golden checks 7, 8, 15 and 16, loops over anchors, normalisers, counters."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.types import BACKGROUND, IGNORED, Assignment, Targets
from padet import losses
from padet.anchors import Anchors
from padet.config import Config, Fam
from padet.losses import apm_score_loss, box_loss, class_loss, compute_losses
from padet.model import Outputs, PADet

TINY = Config(size=192, backbone="resnet18", norm="batch", channels=32, backbone_weights="none")


def targets_of(boxes: list[list[list[float]]]) -> Targets:
    """Objects of each image by rising label, padded."""
    count = max(len(image) for image in boxes)
    padded, valid = torch.zeros(len(boxes), count, 4), torch.zeros(len(boxes), count, dtype=torch.bool)
    for row, image in enumerate(boxes):
        padded[row, : len(image)] = torch.tensor(image).view(-1, 4)
        valid[row, : len(image)] = True
    return Targets(padded, torch.arange(count).repeat(len(boxes), 1), valid, torch.full((len(boxes), 2), 192))


def assigned(*index: int) -> Assignment:
    return Assignment(torch.tensor([index]), torch.tensor([index]))


def random_outputs(images: int = 2, anchors: int = 12, classes: int = 3) -> Outputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(images, anchors, *shape, generator=generator)

    low = torch.rand(anchors, 2, generator=generator) * 30
    boxes = torch.cat([low, low + 5 + torch.rand(anchors, 2, generator=generator) * 20], dim=1)
    logits = normal() - 4  # about half of the scores are below theta
    return Outputs(logits, normal(4), normal(classes + 1), normal(4), (), Anchors(boxes, (), ()))


OBJECTS: list[list[list[float]]] = [[[3.0, 3, 20, 18], [20, 10, 40, 40], [5, 5, 12, 30]], [[10.0, 10, 30, 30]]]


def test_apm_score_loss_by_hand() -> None:
    # Check 8: one positive, two negatives, one ignored, all logits 0: 3 ln 2
    loss = apm_score_loss(torch.zeros(1, 4), assigned(0, BACKGROUND, BACKGROUND, IGNORED))
    assert loss.item() == pytest.approx(3 * math.log(2))


def test_apm_box_loss_by_hand() -> None:
    # Check 8: errors (0.5, 2, 0, 0): 0.125 + 1.5; with the scores and N_apm = 1 the sum is 3.7044415
    box = torch.tensor([0.0, 0, 10, 10])
    deltas = torch.tensor([0.5, 2, 0, 0]).expand(1, 4, 4)
    assignment = assigned(0, BACKGROUND, BACKGROUND, IGNORED)
    loss = box_loss(deltas, box.expand(1, 4, 4), targets_of([[box.tolist()]]), assignment)
    assert loss.item() == pytest.approx(1.625)
    assert loss.item() + apm_score_loss(torch.zeros(1, 4), assignment).item() == pytest.approx(3.7044415)


def test_class_loss_by_hand() -> None:
    # Check 7: the filter drops the negative of .005; a positive and a negative stay, zero logits, C = 80: 2 ln 81
    loss = class_loss(torch.zeros(1, 3, 81), assigned(0, IGNORED, BACKGROUND))
    assert loss.item() == pytest.approx(8.7888983, abs=1e-6)


def test_class_loss_knows_its_classes() -> None:
    # background is column 0, label k is column k + 1: a logit of ln 3 against three zeros is a probability of 1/2
    logits = torch.zeros(1, 2, 4)
    logits[0, 0, 0] = logits[0, 1, 3] = math.log(3)
    assert class_loss(logits, assigned(BACKGROUND, 2)).item() == pytest.approx(2 * math.log(2))


def test_mined_losses_by_hand() -> None:
    # one positive, ratio 1: of the negatives the one with the larger loss stays
    logits = torch.tensor([[0.0, 1.0, -1.0]])
    loss = apm_score_loss(logits, assigned(0, BACKGROUND, BACKGROUND), ratio=1.0)
    assert loss.item() == pytest.approx(math.log(2) + math.log1p(math.e))
    classes = torch.zeros(1, 3, 2)
    classes[0, 1, 0] = 5.0  # surely background
    loss = class_loss(classes, assigned(0, BACKGROUND, BACKGROUND), ratio=1.0)
    assert loss.item() == pytest.approx(2 * math.log(2))


def test_terms_against_a_loop() -> None:
    outputs, targets, config = random_outputs(), targets_of(OBJECTS), Config()
    initial, final = losses.assign(outputs, targets, config)
    assert not torch.equal(initial.gt_index, final.gt_index)
    assert outputs.apm_logits is not None
    assert outputs.apm_deltas is not None
    references = losses.promoted_anchors(outputs)
    expected = dict.fromkeys(("loss_apm_score", "loss_apm_box", "loss_class", "loss_box"), 0.0)
    for image in range(2):
        for anchor in range(12):
            first, second = initial.gt_index[image, anchor].item(), final.gt_index[image, anchor].item()
            p = outputs.apm_logits[image, anchor].sigmoid().item()
            if first != IGNORED:
                expected["loss_apm_score"] -= math.log(p if first >= 0 else 1 - p)
            if second != IGNORED:
                wanted = 1 + targets.labels[image, int(second)].item() if second >= 0 else 0
                probability = outputs.logits[image, anchor].softmax(dim=0)[int(wanted)].item()
                expected["loss_class"] -= math.log(probability)
            for name, index, deltas, reference in (
                ("loss_apm_box", first, outputs.apm_deltas, outputs.anchors.boxes[anchor]),
                ("loss_box", second, outputs.deltas, references[image, anchor]),
            ):
                if index >= 0:
                    goal = losses.encode(reference, targets.boxes[image, int(index)])
                    expected[name] += F.smooth_l1_loss(deltas[image, anchor], goal, reduction="sum").item()
    counts = [stage.positive.sum().item() for stage in (initial, final)]
    found = compute_losses(outputs, targets, 1, 10, config=config)
    for name, total in expected.items():
        assert found[name].item() == pytest.approx(total / counts["apm" not in name], rel=1e-5)
    assert found["positives_initial"].item() == counts[0] / 2
    assert found["positives"].item() == counts[1] / 2
    assert found["negatives_initial"].item() == (initial.gt_index == BACKGROUND).sum().item() / 2
    assert found["negatives"].item() == (final.gt_index == BACKGROUND).sum().item() / 2
    assert "max_offset" not in found


@pytest.mark.parametrize(
    ("score", "box", "names"),
    [
        (True, True, {"loss_apm_score", "loss_apm_box", "loss_class", "loss_box"}),
        (True, False, {"loss_apm_score", "loss_class", "loss_box"}),
        (False, True, {"loss_apm_box", "loss_class", "loss_box"}),
        (False, False, {"loss_class", "loss_box"}),
    ],
)
def test_terms_of_every_row_of_table_2(score: bool, box: bool, names: set[str]) -> None:
    # Spec section 3.3: without boxes APM matches once, without scores nothing is filtered
    outputs = random_outputs()
    outputs = outputs._replace(
        apm_logits=outputs.apm_logits if score else None, apm_deltas=outputs.apm_deltas if box else None
    )
    found = compute_losses(outputs, targets_of(OBJECTS), 1, 10, config=Config())
    assert {name for name in found if name.startswith("loss")} == names
    initial, final = losses.assign(outputs, targets_of(OBJECTS), Config())
    assert torch.equal(initial.positive, final.positive) == (not box)
    assert torch.equal(initial.gt_index, final.gt_index) == (not box and not score)


@pytest.mark.parametrize("targets", [targets_of([[], []]), targets_of(OBJECTS)._replace(valid=torch.zeros(2, 3) > 0)])
def test_images_without_objects(targets: Targets) -> None:
    # Check 16: finite, box terms exactly 0, normalisers 1
    outputs = random_outputs()
    for part in (outputs.apm_deltas, outputs.deltas, outputs.logits):
        assert part is not None
        part.requires_grad_()
    found = compute_losses(outputs, targets, 1, 10, config=Config())
    assert found["loss_apm_box"].item() == found["loss_box"].item() == 0
    assert all(term.isfinite() for term in found.values())
    assert outputs.apm_logits is not None
    assert found["loss_apm_score"].item() == pytest.approx(F.softplus(outputs.apm_logits).sum().item(), rel=1e-5)
    sum(term for name, term in found.items() if name.startswith("loss")).backward()  # type: ignore[union-attr]
    assert outputs.deltas.grad is not None
    assert not outputs.deltas.grad.any()


def test_divisors_count_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    # two ranks, 3 and 1 positives here, 5 and 0 there: (8, 1) / 2; nothing anywhere: 1 / 2
    monkeypatch.setattr(losses, "world_size", lambda: 2)
    monkeypatch.setattr(losses, "sum_over_ranks", lambda counts: counts + torch.tensor([5.0, 0.0]))
    stages = assigned(0, 1, 1, IGNORED), assigned(0, BACKGROUND, BACKGROUND, IGNORED)
    assert losses.divisors(*stages).tolist() == [4, 0.5]
    none = assigned(BACKGROUND, IGNORED)
    monkeypatch.setattr(losses, "sum_over_ranks", lambda counts: counts)
    assert losses.divisors(none, none).tolist() == [0.5, 0.5]


def gradients(term: str, **changes: Any) -> dict[str, Tensor]:
    """What one term gives the first level's APM convolutions, once FAM's offsets have weights."""
    torch.manual_seed(0)
    config = replace(TINY, **changes)
    model = PADet(config, 3)
    head: Any = model.heads[0]
    for conv in (head.fam.offset, head.fam.shift):
        if conv is not None:
            torch.nn.init.normal_(conv.weight, std=0.1)
    pixels = torch.randint(0, 256, (2, 3, 192, 192), dtype=torch.uint8)
    outputs = model(pixels, torch.full((2, 2), 192))
    targets = targets_of([[[20.0, 20, 40, 40], [100, 90, 120, 130]], [[10.0, 50, 60, 100]]])
    compute_losses(outputs, targets, 1, 10, config=config)[term].backward()
    names = {"score": head.apm_score.weight, "box": head.apm_box.weight}
    return {name: torch.zeros(1) if weight.grad is None else weight.grad for name, weight in names.items()}


@pytest.mark.parametrize("term", ["loss_class", "loss_box"])
@pytest.mark.parametrize(
    ("fam", "detach", "reaches"),
    [("disentangled", False, True), ("disentangled", True, False), ("implicit", False, False)],
)
def test_detection_reaches_apm_only_through_offsets(term: str, fam: Fam, detach: bool, reaches: bool) -> None:
    # Check 15
    found = gradients(term, fam=fam, fam_detach=detach)
    assert not found["score"].any()
    assert bool(found["box"].any()) == reaches


def test_apm_learns_its_own_terms() -> None:
    assert gradients("loss_apm_score")["score"].any()
    assert gradients("loss_apm_box")["box"].any()


def test_largest_offset_is_logged() -> None:
    offsets = (torch.zeros(2, 18, 3, 3), torch.tensor([-7.5, 2.0]).view(2, 1, 1, 1).expand(2, 18, 1, 1))
    found = compute_losses(random_outputs()._replace(offsets=offsets), targets_of(OBJECTS), 1, 10, config=Config())
    assert found["max_offset"].item() == (7.5 + 2) / 2  # the mean over images, so that ranks agree


def test_half_precision_outputs_lose_nothing() -> None:
    outputs = random_outputs()

    def converted(given: Outputs, kind: torch.dtype) -> Outputs:
        parts = given.apm_logits, given.apm_deltas, given.logits, given.deltas
        scores, promotion, logits, deltas = (None if part is None else part.to(kind) for part in parts)
        assert logits is not None
        assert deltas is not None
        return Outputs(scores, promotion, logits, deltas, (), given.anchors)

    rounded = converted(outputs, torch.bfloat16)
    exact = converted(rounded, torch.float32)
    both = [compute_losses(each, targets_of(OBJECTS), 1, 10, config=Config()) for each in (rounded, exact)]
    assert all(both[0][name] == both[1][name] for name in both[0])
    assert both[0]["loss_class"].dtype == torch.float32
