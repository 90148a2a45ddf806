"""Every host against the published implementations: outputs, assignment, losses, gradients, detections."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from core.anchors import anchors_inside
from core.losses import quality_focal_loss_of_scores
from dynamic_atss.assigner import explain_assignment
from dynamic_atss.config import Config
from dynamic_atss.losses import assign, class_scores
from dynamic_atss.model import predicted_boxes
from dynamic_atss.postprocess import detect
from tests.conftest import golden_arrays
from tests.dynamic_atss.golden import (
    ATSS_MMDET,
    ATSS_OFFICIAL,
    DYNAMIC_OFFICIAL,
    GFL_MMDET,
    GFLV2_OFFICIAL,
    VARIANTS,
    VFNET_MMDET,
    VFNET_OFFICIAL,
    Arrays,
    arrays_of,
    check_detections,
    check_gradient,
    check_losses,
    check_parameter_gradients,
    golden_head,
    golden_targets,
    losses_of,
    run_golden_head,
    stored_outputs,
    stored_rows,
)

MMDET = {  # file, configuration, our name of each loss and the file's
    "atss": (ATSS_MMDET, {"loss_cls": "cls", "loss_box": "bbox", "loss_centerness": "centerness"}),
    "gfl": (GFL_MMDET, {"loss_cls": "cls", "loss_box": "bbox", "loss_dfl": "dfl"}),
    "vfnet": (VFNET_MMDET, {"loss_cls": "cls", "loss_first": "bbox", "loss_box": "bbox_rf"}),
}
LEGACY_HOSTS = {
    "atss.npz": (ATSS_OFFICIAL, {"loss_cls": "cls", "loss_box": "reg", "loss_centerness": "centerness"}),
    "dynamic_atss.npz": (DYNAMIC_OFFICIAL, {"loss_cls": "cls", "loss_box": "reg", "loss_iou": "centerness"}),
}
GFLV2_NAMES = {"loss_cls": "cls", "loss_box": "bbox", "loss_dfl": "dfl"}


def official(shared: Path, name: str) -> Arrays:
    return arrays_of(shared / "golden_official" / name)


def check_outputs_and_gradients(arrays: Arrays, case: str, config: Config, names: dict[str, str]) -> None:
    outputs = stored_outputs(arrays, case, config)
    losses = losses_of(outputs, arrays, case, config)
    check_losses(losses, arrays, case, names)
    sum(losses.values(), torch.zeros(())).backward()
    check_gradient(outputs.logits.grad, arrays, case, "cls_score")
    check_gradient(outputs.regression.grad, arrays, case, "bbox_pred")
    for part, name in ((outputs.quality, "centerness"), (outputs.refined, "bbox_pred_refine")):
        if part is not None:
            check_gradient(part.grad, arrays, case, name)


def check_head(arrays: Arrays, config: Config) -> None:
    head = golden_head(arrays, config)
    outputs = run_golden_head(arrays, "A", config, head)
    maps = [(outputs.logits, "cls_score"), (outputs.regression, "bbox_pred")]
    if outputs.quality is not None:
        maps.append((outputs.quality[..., None], "centerness"))
    if outputs.refined is not None:
        maps.append((outputs.refined, "bbox_pred_refine"))
    for rows, name in maps:
        torch.testing.assert_close(rows, stored_rows(arrays, f"A/{name}"), rtol=1e-4, atol=1e-4)
    check_parameter_gradients(head, losses_of(outputs, arrays, "A", config), arrays)


def check_assignment(arrays: Arrays, case: str, config: Config) -> None:
    outputs = stored_outputs(arrays, case, config)
    assignment = assign(outputs, golden_targets(arrays, case), 1, 1, config)
    for image in range(2):
        index = assignment.gt_index[image].clamp(min=-1)  # ignored padding is background there
        assert np.array_equal(index.numpy() + 1, arrays[f"{case}/assign_gt_{image}"])


@pytest.mark.parametrize("case", "AB")
@pytest.mark.parametrize("host", MMDET)
def test_mmdet(host: str, case: str) -> None:
    config, names = MMDET[host]
    arrays = golden_arrays(f"head_{host}.npz")
    check_outputs_and_gradients(arrays, case, config, names)
    check_assignment(arrays, case, config)


@pytest.mark.parametrize("host", MMDET)
def test_mmdet_head_and_case_without_objects(host: str) -> None:
    config, names = MMDET[host]
    arrays = golden_arrays(f"head_{host}.npz")
    check_head(arrays, config)
    with torch.no_grad():
        outputs = run_golden_head(arrays, "C", config, golden_head(arrays, config))
    check_losses(losses_of(outputs, arrays, "C", config), arrays, "C", names)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", "AB")
@pytest.mark.parametrize("host", MMDET)
def test_mmdet_detections(host: str, case: str, variant: str) -> None:
    config, _ = MMDET[host]
    arrays = golden_arrays(f"head_{host}.npz")
    outputs = stored_outputs(arrays, case, config)
    sizes = torch.from_numpy(arrays[f"{case}/img_shape"])
    check_detections(detect(outputs, sizes, replace(config, **VARIANTS[variant])), arrays, f"{case}/{variant}")


@pytest.mark.parametrize("case", "ABCDEF")
@pytest.mark.parametrize("file", LEGACY_HOSTS)
def test_legacy(shared: Path, file: str, case: str) -> None:
    config, names = LEGACY_HOSTS[file]
    arrays = official(shared, file)
    check_outputs_and_gradients(arrays, case, config, names)
    check_assignment(arrays, case, config)
    for variant, changes in VARIANTS.items():
        outputs, sizes = stored_outputs(arrays, case, config), torch.from_numpy(arrays["img_shape"])
        check_detections(detect(outputs, sizes, replace(config, **changes)), arrays, f"{case}/{variant}")


@pytest.mark.parametrize("file", LEGACY_HOSTS)
def test_legacy_head(shared: Path, file: str) -> None:
    check_head(official(shared, file), LEGACY_HOSTS[file][0])


@pytest.mark.parametrize("case", "ABCDEF")
def test_combined_ious_step_by_step(shared: Path, case: str) -> None:
    arrays = official(shared, "dynamic_atss.npz")
    outputs, targets = stored_outputs(arrays, case, DYNAMIC_OFFICIAL), golden_targets(arrays, case)
    boxes = predicted_boxes(outputs, DYNAMIC_OFFICIAL)
    details = explain_assignment(outputs.grid, targets, boxes, geometry=DYNAMIC_OFFICIAL.box_geometry)
    assert details.predicted_ious is not None
    for image in range(2):
        count = len(arrays[f"{case}/thresh_{image}"])
        valid = details.valid[image, :count]
        found = [sorted(row[mask].tolist()) for row, mask in zip(details.anchors[image, :count], valid, strict=True)]
        assert found == arrays[f"{case}/cand_anchor_{image}"].tolist()
        expected = torch.from_numpy(arrays[f"{case}/thresh_{image}"]).double()
        torch.testing.assert_close(details.thresholds[image, :count], expected, rtol=1e-5, atol=1e-6)
        terms = arrays[f"{case}/thresh_terms_{image}"]
        for g in range(count):
            mask = valid[g]
            parts = [details.predicted_ious[image, g][mask], details.anchor_ious[image, g][mask]]
            mine = [float(value) for part in parts for value in (part.mean(), part.std())]
            np.testing.assert_allclose(mine, terms[g], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", "ABCD")
def test_gflv2(shared: Path, case: str) -> None:
    arrays = official(shared, "gflv2.npz")
    head = golden_head(arrays, GFLV2_OFFICIAL)  # 81 columns, as theirs
    if f"{case}/feat_0" in arrays:
        outputs = run_golden_head(arrays, case, GFLV2_OFFICIAL, head)
    else:  # the file starts from joint scores, which a predicted quality of 1 leaves as they are
        outputs = stored_outputs(arrays, case, GFLV2_OFFICIAL)
        with torch.no_grad():
            outputs = outputs._replace(logits=outputs.logits.logit(), quality=torch.full((2, 428), 50.0))
    torch.testing.assert_close(class_scores(outputs), stored_rows(arrays, f"{case}/cls_score"), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.regression, stored_rows(arrays, f"{case}/bbox_pred"), rtol=1e-4, atol=1e-4)
    losses = losses_of(outputs, arrays, case, GFLV2_OFFICIAL)
    check_losses(losses, arrays, case, GFLV2_NAMES)
    targets = golden_targets(arrays, case)
    assignment = assign(outputs, targets, 1, 1, GFLV2_OFFICIAL)
    inside = anchors_inside(outputs.grid, targets.sizes)
    for image in range(2):
        assert np.array_equal(assignment.gt_index[image].clamp(min=-1).numpy() + 1, arrays[f"{case}/assign_gt_{image}"])
        assert np.array_equal(inside[image].numpy(), arrays[f"{case}/label_weight_{image}"] > 0)
    for variant, changes in VARIANTS.items():
        found = detect(outputs, torch.from_numpy(arrays["img_shape"]), replace(GFLV2_OFFICIAL, **changes))
        check_detections(found, arrays, f"{case}/{variant}")
    if case == "A":
        check_parameter_gradients(head, losses, arrays)
    elif outputs.regression.is_leaf and f"{case}/grad_bbox_pred_0" in arrays:
        sum(losses.values(), torch.zeros(())).backward()
        check_gradient(outputs.regression.grad, arrays, case, "bbox_pred")


def test_gflv2_learns_scores_not_logits() -> None:
    # the classic porting bug: a joint score of .5 treated as a logit would lose .69 instead of ...
    score = torch.tensor([0.5])
    torch.testing.assert_close(quality_focal_loss_of_scores(score, torch.zeros(1)), torch.tensor([0.173287]))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", "AB")
def test_vfnet_official_detections(shared: Path, case: str, variant: str) -> None:
    arrays = golden_arrays("head_vfnet.npz")
    outputs = stored_outputs(arrays, case, VFNET_OFFICIAL)
    sizes = torch.from_numpy(arrays[f"{case}/img_shape"])
    found = detect(outputs, sizes, replace(VFNET_OFFICIAL, **VARIANTS[variant]))
    check_detections(found, official(shared, "vfnet_det.npz"), f"{case}/{variant}")
