"""PAA's assignment against both originals, stage by stage."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from core.anchors import anchor_grid, level_shapes
from core.geometry import LEGACY, MODERN
from core.types import Targets
from paa.assigner import Details, explain_assignment
from paa.profiles import PAA_PROFILES
from tests.conftest import golden_arrays

BACKGROUND_LABEL = 80  # of the golden files
SHAPES = level_shapes((128, 160))


def targets_of(arrays: dict[str, np.ndarray], case: str) -> Targets:
    boxes = [torch.from_numpy(arrays[f"{case}/gt_bboxes_{image}"]) for image in range(2)]
    labels = [torch.from_numpy(arrays[f"{case}/gt_labels_{image}"]).long() for image in range(2)]
    pad = torch.nn.utils.rnn.pad_sequence
    valid = pad([torch.ones(len(part), dtype=torch.bool) for part in labels], batch_first=True)
    return Targets(pad(boxes, batch_first=True), pad(labels, batch_first=True), valid, torch.tensor([[128, 160]] * 2))


def flat(arrays: dict[str, np.ndarray], case: str, name: str, channels: int) -> Tensor:
    """A head output of all levels, (2, A, channels); zeros where the file has none (its case without objects)."""
    if f"{case}/{name}_0" not in arrays:
        return torch.zeros(2, sum(height * width for height, width in SHAPES), channels)
    levels = [torch.from_numpy(arrays[f"{case}/{name}_{level}"]) for level in range(5)]
    return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)


def explain(arrays: dict[str, np.ndarray], case: str, official: bool) -> Details:
    geometry = LEGACY if official else MODERN
    return explain_assignment(
        flat(arrays, case, "cls_score", 80),
        flat(arrays, case, "bbox_pred", 4),
        anchor_grid(SHAPES, geometry),
        targets_of(arrays, case),
        geometry=geometry,
        profile=PAA_PROFILES["official" if official else "mmdet"],
        clamp_both_sides=not official,
    )


def check_labels(details: Details, image: int, expected: np.ndarray) -> None:
    labels = details.assignment.labels[image]
    assert np.array_equal(labels.where(labels >= 0, BACKGROUND_LABEL).numpy(), expected)
    assert torch.equal(labels >= 0, details.assignment.positive[image])


@pytest.mark.parametrize("case", "ABC")
def test_golden_mmdet(case: str) -> None:
    arrays = golden_arrays("head_paa.npz")
    details = explain(arrays, case, official=False)
    for image in range(2):
        match = details.match[image]
        assert np.array_equal(match.numpy() + 1, arrays[f"{case}/assign_gt_{image}"])
        scores = details.scores[image][match >= 0]
        torch.testing.assert_close(scores, torch.from_numpy(arrays[f"{case}/pos_loss_{image}"]), rtol=1e-5, atol=1e-6)
        check_labels(details, image, arrays[f"{case}/paa_label_{image}"])
    assert details.assignment.positive.sum(dim=1).tolist() == arrays[f"{case}/num_pos_paa"].tolist()


@pytest.mark.parametrize("case", "ABCDEF")
def test_golden_official(case: str, shared: Path) -> None:
    with np.load(shared / "golden_official" / "paa.npz") as archive:
        arrays = {key: archive[key] for key in archive.files if key.startswith(f"{case}/")}
    details = explain(arrays, case, official=True)
    for image in range(2):
        match = details.match[image]
        assert np.array_equal(match.numpy() + 1, arrays[f"{case}/prematch_gt_{image}"])
        assert np.array_equal((match >= 0).nonzero()[:, 0].numpy(), arrays[f"{case}/prematch_anchor_{image}"])
        scores = torch.from_numpy(arrays[f"{case}/prematch_loss_{image}"])
        torch.testing.assert_close(details.scores[image][match >= 0], scores, rtol=1e-5, atol=1e-6)
        check_candidates(details, image, arrays, case)
        check_labels(details, image, arrays[f"{case}/final_label_{image}"])
        positive = details.assignment.positive[image].nonzero()[:, 0].numpy()
        assert np.array_equal(positive, arrays[f"{case}/pos_anchor_{image}"])
    assert details.assignment.positive.sum() == arrays[f"{case}/num_pos"]


def check_candidates(details: Details, image: int, arrays: dict[str, np.ndarray], case: str) -> None:
    """Candidates and mixture of each object."""
    offsets = arrays[f"{case}/cand_offset_{image}"]
    slots = details.candidates.valid.shape[1]
    for g in range(len(offsets) - 1):
        mine = details.candidates.anchors[image, g][details.candidates.valid[image, g]]
        theirs = arrays[f"{case}/cand_anchor_{image}"][offsets[g] : offsets[g + 1]]
        assert sorted(mine.tolist()) == theirs.tolist()
        row = image * slots + g
        assert details.mixture.steps[row] == arrays[f"{case}/gmm_steps_{image}"][g]
        if len(mine) > 1:
            parameters = torch.cat([part[row] for part in details.mixture[:3]])
            expected = torch.from_numpy(arrays[f"{case}/gmm_params_{image}"][g])
            torch.testing.assert_close(parameters, expected, rtol=0, atol=1e-5)
