"""The network: golden checks 3 and 14, parameter counts, shapes, the order of anchors."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from core.complexity import model_complexity
from core.errors import UserError
from padet.config import PRESETS, Config, Fam, level_sides
from padet.model import PADet, _join, normalize, promoted_anchors

TINY = Config(size=192, backbone="resnet18", norm="batch", channels=32, backbone_weights="none")


def tiny(num_classes: int = 3, **changes: Any) -> PADet:
    torch.manual_seed(0)
    return PADet(replace(TINY, **changes), num_classes)


def images(count: int = 2, size: int = 192) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(2))
    return pixels.to(torch.uint8), torch.full((count, 2), size)


def parameters(config: Config, num_classes: int) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in PADet(config, num_classes).parameters())


@pytest.mark.parametrize(
    ("preset", "num_classes", "count"),
    [
        ("vgg16_384", 80, 39_631_504),
        ("vgg16_512", 80, 43_109_936),
        ("r101_384", 80, 62_040_208),
        ("r101_512", 80, 65_518_640),
        ("voc_vgg16_384", 20, 35_205_904),
    ],
)
def test_parameter_counts(preset: str, num_classes: int, count: int) -> None:
    # Spec section 1.5
    assert parameters(PRESETS[preset], num_classes) == count


@pytest.mark.parametrize(("preset", "gmac"), [("vgg16_384", 58.7), ("vgg16_512", 104.4)])
def test_multiply_adds(preset: str, gmac: float) -> None:
    # Spec section 1.5
    assert model_complexity(PRESETS[preset], PADet).multiply_adds / 1e9 == pytest.approx(gmac, rel=0.01)


@pytest.mark.parametrize("backbone", ["vgg16", "resnet18", "resnet50"])
@pytest.mark.parametrize("size", [192, 384, 512])
def test_level_shapes(size: int, backbone: str) -> None:
    # Check 3; VGG and ResNet have the same strides
    norm = "frozen" if backbone == "vgg16" else "batch"
    with torch.device("meta"):
        model = PADet(Config(size=size, backbone=backbone, norm=norm, channels=32), 3).eval()  # type: ignore[arg-type]
        levels = model.pyramid(torch.zeros(1, 3, size, size))
        assert [tuple(level.shape) for level in levels] == [(1, 32, side, side) for side in level_sides(size)]
        outputs = model.detect(levels)
    anchors = sum(outputs.anchors.level_sizes)
    assert outputs.apm_logits is not None
    assert outputs.apm_deltas is not None
    assert outputs.apm_logits.shape == (1, anchors)
    assert outputs.apm_deltas.shape == (1, anchors, 4)
    assert outputs.logits.shape == (1, anchors, 4)
    assert outputs.deltas.shape == (1, anchors, 4)
    assert outputs.anchors.boxes.shape == (anchors, 4)
    assert [level.shape[-1] for level in outputs.offsets] == list(level_sides(size)[:-2])


def test_start_at_the_prior() -> None:
    # Check 14: predictor weights zeroed; 1 - 0.02 background
    model = tiny(num_classes=80).eval()
    heads: list[Any] = list(model.heads)
    for head in heads:
        nn.init.zeros_(head.apm_score.weight)
        nn.init.zeros_(head.classes.weight)
    outputs = model(*images())
    assert outputs.apm_logits is not None
    torch.testing.assert_close(outputs.apm_logits.sigmoid(), torch.full((2, 4576), 0.02))
    assert outputs.apm_logits[0, 0].item() == pytest.approx(-3.8918, abs=1e-4)
    torch.testing.assert_close(outputs.logits.softmax(dim=-1)[..., 0], torch.full((2, 4576), 0.98))
    assert outputs.logits[0, 0, 0].item() == pytest.approx(8.2738, abs=1e-4)  # ln(80 * 49)
    voc: Any = tiny(num_classes=20).heads[0]
    assert voc.classes.bias[[0, 1, 20, 21]].tolist() == pytest.approx([6.8876, 0, 0, 6.8876], abs=1e-4)


def test_without_a_prior_biases_start_at_zero() -> None:
    heads: list[Any] = list(tiny(prior=0.0).heads)
    assert not any(bias.any() for head in heads for bias in (head.classes.bias, head.apm_score.bias))


def test_rows_belong_to_their_anchors() -> None:
    # channel a * k + j of cell (y, x) is number j of anchor (y * W + x) * A + a
    maps = [torch.arange(6 * 4 * 9.0).view(1, 24, 3, 3), torch.arange(100.0, 116.0).view(1, 16, 1, 1)]
    joined = _join(tuple(maps), 4)
    assert joined.shape == (1, 9 * 6 + 4, 4)
    for y, x, a, j in [(0, 0, 0, 0), (0, 1, 0, 0), (2, 1, 5, 3)]:
        assert joined[0, (y * 3 + x) * 6 + a, j] == maps[0][0, a * 4 + j, y, x]
    assert joined[0, 54 + 2].tolist() == [108, 109, 110, 111]


def test_class_rows_follow_the_same_order() -> None:
    model = tiny(num_classes=2).eval()
    head: Any = model.heads[-1]
    nn.init.zeros_(head.classes.weight)
    with torch.no_grad():
        head.classes.bias.copy_(torch.arange(12.0))
    outputs = model.detect([torch.zeros(1, 32, side, side) for side in (24, 12, 6, 3, 1)])
    assert outputs.logits[0, -4:].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


@pytest.mark.parametrize(
    ("changes", "score", "box", "aligned"),
    [
        ({}, True, True, 3),
        ({"fam": "none"}, True, True, 0),
        ({"apm_score": False}, False, True, 3),
        ({"apm_box": False, "fam": "none"}, True, False, 0),
        ({"apm_score": False, "apm_box": False, "fam": "none"}, False, False, 0),
        ({"apm_score": False, "apm_box": False, "fam": "implicit"}, False, False, 3),
    ],
)
def test_component_switches(changes: dict[str, Any], score: bool, box: bool, aligned: int) -> None:
    # Spec section 3.3
    outputs = tiny(**changes).eval()(*images())
    assert (outputs.apm_logits is not None, outputs.apm_deltas is not None, len(outputs.offsets)) == (
        score,
        box,
        aligned,
    )
    references = promoted_anchors(outputs)
    assert torch.equal(references[0], outputs.anchors.boxes) == (not box)
    assert not references.requires_grad


def test_one_image_trains_only_without_batch_statistics() -> None:
    one = images(1)
    with pytest.raises(UserError, match="--batch-size"):
        tiny().train()(*one)
    tiny(block_norm="frozen", norm="frozen").train()(*one)
    tiny().eval()(*one)


def test_another_canvas_is_refused() -> None:
    with pytest.raises(ValueError, match="192 x 192"):
        tiny().eval()(torch.zeros(1, 3, 192, 224, dtype=torch.uint8), torch.tensor([[192, 224]]))


def test_pixels_of_both_kinds_of_weights() -> None:
    pixels = torch.tensor([124, 116, 104], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    sizes = torch.tensor([[2, 2]])
    red = (124 - 123.675) / 58.395
    assert normalize(pixels, sizes, "imagenet")[0, 0, 0, 0].item() == pytest.approx(red, abs=1e-6)
    assert normalize(pixels, sizes, "caffe")[0, :, 0, 0].tolist() == [0.0, -1.0, 1.0]  # blue, green, red


def test_decoder_adds_the_upsampled_level() -> None:
    model = tiny().eval()
    decoder = model.decoder
    maps = [torch.rand(1, width, side, side) for width, side in zip((128, 256, 512, 512), (24, 12, 6, 3), strict=True)]
    coarse = decoder.skips[3](maps[3])
    raised = nn.functional.interpolate(coarse, size=(6, 6), mode="bilinear", align_corners=False)
    third = decoder.skips[2](maps[2]) + decoder.ups[2](raised)
    levels = decoder(maps)
    torch.testing.assert_close(levels[3], decoder.enhance[3](coarse))
    torch.testing.assert_close(levels[2], decoder.enhance[2](third))
    torch.testing.assert_close(levels[4], decoder.enhance[4](nn.functional.max_pool2d(coarse, 2)))


@pytest.mark.compiled
@pytest.mark.parametrize("fam", ["none", "disentangled"])
def test_whole_network_traces(fam: Fam) -> None:
    model = tiny(fam=fam).train()
    batch = images()
    compiled = torch.compile(model, fullgraph=True, backend="eager")(*batch)
    expected = model(*batch)
    for part in ("apm_logits", "apm_deltas", "logits", "deltas"):
        torch.testing.assert_close(getattr(compiled, part), getattr(expected, part), atol=1e-4, rtol=1e-4)
    assert compiled.anchors.sides == expected.anchors.sides
    compiled.logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())
