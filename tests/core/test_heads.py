"""The parallel head against MMDetection's and the authors' outputs, and its order, start and options."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from core.heads import ParallelHead, rows
from core.layers import DeformConv
from core.layouts import from_mmdet, from_official
from tests.conftest import golden_arrays
from tests.core.detector import count


def check_outputs(head: ParallelHead, arrays: dict[str, np.ndarray], case: str, quality: str) -> None:
    """Compare every output of every level with a golden case."""
    with torch.no_grad():
        outputs = head([torch.from_numpy(arrays[f"{case}/feat_{level}"]) for level in range(5)])
    assert outputs.quality is not None
    assert outputs.shapes == ((16, 20), (8, 10), (4, 5), (2, 3), (1, 2))
    ours = {"cls_score": outputs.logits, "bbox_pred": outputs.deltas, quality: outputs.quality[..., None]}
    for name, array in ours.items():
        for level, part in enumerate(array.split([320, 80, 20, 6, 2], dim=1)):
            stored = arrays[f"{case}/{name}_{level}"]  # (B, C, H, W)
            expected = torch.from_numpy(stored).permute(0, 2, 3, 1).reshape(part.shape)
            torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "quality"), [("paa", "iou_pred"), ("atss", "centerness")])
def test_golden_mmdet(method: str, quality: str) -> None:
    arrays = golden_arrays(f"head_{method}.npz")
    head = ParallelHead(64, 80, tower_bias=False)
    state = {}
    for key, value in arrays.items():
        if key.startswith("param/"):
            name = from_mmdet(f"bbox_head.{key.removeprefix('param/')}")
            assert name is not None
            state[name.removeprefix("head.")] = torch.from_numpy(value)
    head.load_state_dict(state)
    for case in "ABC":
        if f"{case}/cls_score_0" in arrays:
            check_outputs(head, arrays, case, quality)


@pytest.mark.parametrize(("method", "quality"), [("paa", "iou_pred"), ("atss", "centerness")])
def test_golden_official(shared: Path, method: str, quality: str) -> None:
    with np.load(shared / "golden_official" / f"{method}.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    head = ParallelHead(64, 80, tower_bias=True)
    state = {
        str(from_official(key.replace("param/", "rpn.head."))).removeprefix("head."): torch.from_numpy(value)
        for key, value in arrays.items()
        if key.startswith("param/")
    }
    head.load_state_dict({key: value.reshape(()) if "scales" in key else value for key, value in state.items()})
    cases = sorted({key.split("/")[0] for key in arrays if "/feat_0" in key})
    assert cases
    for case in cases:
        check_outputs(head, arrays, case, quality)


def pyramid(channels: int, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 6), (2, 3), (1, 2), (1, 1), (1, 1))
    return [torch.randn(batch, channels, *shape, generator=generator) for shape in shapes]


def test_rows_by_hand() -> None:
    maps = torch.arange(12.0).reshape(1, 2, 2, 3)  # channel 0 holds 0..5 row by row, channel 1 6..11
    assert rows(maps)[0].tolist() == [[0, 6], [1, 7], [2, 8], [3, 9], [4, 10], [5, 11]]


def test_rows_of_channels_last_is_a_view() -> None:
    maps = torch.randn(2, 4, 3, 5).to(memory_format=torch.channels_last)
    assert rows(maps).data_ptr() == maps.data_ptr()


def test_every_anchor_starts_at_the_prior() -> None:
    head = ParallelHead(32, 3, tower_bias=False)
    for predictor in (head.cls_logits, head.bbox_pred, head.quality):
        assert predictor is not None
        torch.nn.init.zeros_(predictor.weight)
    outputs = head(pyramid(32))
    torch.testing.assert_close(outputs.logits, torch.full((2, 34, 3), -4.59512), atol=1e-5, rtol=0)  # -ln 99
    assert not outputs.deltas.any()
    assert outputs.quality is not None
    assert outputs.quality.shape == (2, 34)
    assert not outputs.quality.any()


def test_scales_act_on_deltas_of_their_level_alone() -> None:
    torch.manual_seed(0)
    head = ParallelHead(32, 3, tower_bias=False)
    before = head(pyramid(32))
    head.load_state_dict({"scales.1.scale": torch.tensor(3.0)}, strict=False)
    after = head(pyramid(32))
    factors = torch.ones(34)
    factors[24:30] = 3  # level 1: 2 x 3 cells after 4 x 6
    torch.testing.assert_close(after.deltas, before.deltas * factors[None, :, None])
    assert torch.equal(after.logits, before.logits)
    assert before.quality is not None
    assert after.quality is not None
    assert torch.equal(after.quality, before.quality)


def test_quality_reads_the_box_tower() -> None:
    head = ParallelHead(32, 3, tower_bias=False)
    outputs = head(pyramid(32))
    assert outputs.quality is not None
    outputs.quality.sum().backward()
    assert all(parameter.grad is not None for parameter in head.box_tower.parameters())
    assert all(parameter.grad is None for parameter in head.cls_tower.parameters())


def test_without_quality() -> None:
    head = ParallelHead(32, 3, tower_bias=False, quality=False)
    assert head(pyramid(32)).quality is None
    assert not any("quality" in key for key in head.state_dict())


@pytest.mark.parametrize(("tower_bias", "expected"), [(True, 4_920_666), (False, 4_918_618)])
def test_parameter_count(tower_bias: bool, expected: int) -> None:
    with torch.device("meta"):
        assert count(ParallelHead(256, 80, tower_bias=tower_bias)) == expected  # spec PAA section 10


def test_dcn_parameter_count() -> None:
    with torch.device("meta"):
        head = ParallelHead(256, 80, tower_bias=True, dcn_tower=True)
    assert count(head) == 4_920_666 + 2 * (27 * 256 * 9 + 27)
    for tower in (head.cls_tower, head.box_tower):
        assert [type(layer) for layer in tower].count(DeformConv) == 1
        assert isinstance(tower[9], DeformConv)


def test_channels_last_changes_nothing() -> None:
    torch.manual_seed(0)
    head = ParallelHead(32, 3, tower_bias=True, dcn_tower=True)
    plain = head(pyramid(32))
    last = head.to(memory_format=torch.channels_last)(
        [maps.to(memory_format=torch.channels_last) for maps in pyramid(32)]
    )
    torch.testing.assert_close(plain.logits, last.logits, rtol=1e-4, atol=1e-4)  # other kernels, other order of sums
    torch.testing.assert_close(plain.deltas, last.deltas, rtol=1e-4, atol=1e-4)
