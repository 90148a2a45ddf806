"""Reading other projects' files without running them, released models, and what a conversion refuses."""

import argparse
import collections
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor
from torchvision.ops import deform_conv2d

from core import checkpoint, released
from core.backbone import build_backbone, load_backbone_weights
from core.config import PyramidConfig
from core.convert import (
    Weights,
    choose_categories,
    fill,
    read_categories,
    read_layout,
    read_tensors,
    rename_all,
    source_of,
    with_masks,
    without_background,
)
from core.data.coco import COCO_CATEGORIES
from core.data.sources import open_data
from core.data.table import Category
from core.errors import UserError
from core.foreign import Placeholder, read_caffe2, read_torch
from core.layers import DeformConv
from core.layouts import HeadNames, Layout, from_mmdet, from_official

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


class ConfigDict(dict[str, Any]):
    """As mmcv's: a dictionary of a class of its own."""


class Hostile:
    """Makes a folder when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


class Chained:
    """Calls what a call returned, and gives the result a state and items."""

    def __reduce__(self) -> Any:
        return getattr, (Path("x"), "name"), {"state": 1}, iter([1, 2]), iter([("a", 1)])


def save(content: Any, path: Path, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@FORMATS
def test_tensors_come_back_among_foreign_objects(tmp_path: Path, zipped: bool) -> None:
    base = torch.arange(12.0)
    tensors = {
        "whole": base,
        "part": base[3:9].reshape(2, 3).T,  # of the same storage, with another stride
        "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "bfloat": torch.tensor([1.5], dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=np.float64(0.1))
    content = {
        "model": collections.OrderedDict(tensors),
        "optimizer": optimizer.state_dict(),
        "arguments": argparse.Namespace(lr=1),
        "config": ConfigDict(a=1),
        "queue": collections.deque([1, 2], maxlen=3),
        "counts": collections.defaultdict(list, {1: [2]}),
        "array": np.arange(3),
        "place": Path("x"),
        "chained": Chained(),
        "iteration": 5,
    }
    content["model"]._metadata = {"version": 1}
    found = read_torch(save(content, tmp_path / "a.pth", zipped))
    assert list(found["model"]) == list(tensors)
    for name, tensor in tensors.items():
        assert found["model"][name].dtype == tensor.dtype
        assert torch.equal(found["model"][name], tensor.detach()), name
    assert found["iteration"] == 5
    assert dict(found["config"]) == {"a": 1}
    for name in ("arguments", "config", "queue", "counts", "array", "place", "chained"):
        assert type(found[name]) is Placeholder, name


@pytest.mark.parametrize("wrapped", ["zip", "legacy", "pickle", "metadata", "array"])
def test_hostile_pickle_does_nothing(tmp_path: Path, wrapped: str) -> None:
    path, marker = tmp_path / "hostile.pth", tmp_path / "executed"
    if wrapped in ("zip", "legacy"):
        save({"model": {"a": torch.ones(1)}, "optimizer": Hostile(marker)}, path, zipped=wrapped == "zip")
        tensors, _ = read_tensors(path)
        assert list(tensors) == ["a"]
    elif wrapped == "metadata":
        save(Hostile(marker), path)
        with pytest.raises(UserError, match="holds no tensors by their names"):
            read_tensors(path)
    else:
        path.write_bytes(pickle.dumps({"blobs": {"conv1_w": Hostile(marker)}}))
        with pytest.raises(UserError, match="nothing in it was run"):
            (read_caffe2 if wrapped == "array" else read_torch)(path)
    assert not marker.exists()


@FORMATS
def test_cut_and_foreign_files_are_one_line(tmp_path: Path, zipped: bool) -> None:
    whole = save({"model": {"a": torch.arange(1000.0)}}, tmp_path / "a.pth", zipped).read_bytes()
    assert torch.equal(read_torch(tmp_path / "a.pth")["model"]["a"], torch.arange(1000.0))
    for length in (0, 1, 3, 10, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut.pth: not a PyTorch file, or a damaged one") as error:
            read_torch(tmp_path / "cut.pth")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"nowhere.pth: cannot be read: No such file"):
        read_torch(tmp_path / "nowhere.pth")
    with pytest.raises(UserError, match="Is a directory"):
        read_torch(tmp_path)


@pytest.mark.parametrize(
    ("size", "stride", "offset"), [((9,), (1,), 0), ((2,), (8,), 0), ((4,), (1,), 5), ((2,), (-1,), 1)]
)
def test_tensor_beyond_its_storage_is_refused(
    tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    class Lying:
        def __reduce__(self) -> Any:
            storage = torch.storage.TypedStorage(
                wrap_storage=torch.ones(8).untyped_storage(), dtype=torch.float32, _internal=True
            )
            return torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, collections.OrderedDict())

    with pytest.raises(UserError, match="damaged"):
        read_torch(save({"a": Lying()}, tmp_path / "a.pth"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"a": 1}}, "'a' is no tensor"),
        ({"model": {3: torch.ones(1)}}, "'3' is no tensor"),
        ({"model": {}}, "holds no tensors"),
        ([torch.ones(1)], "holds no tensors"),
    ],
)
def test_something_else_than_named_tensors(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_tensors(save(content, tmp_path / "a.pth"))


def test_wrappers_and_prefix_go(tmp_path: Path) -> None:
    state = {"module.rpn.head.a": torch.ones(1), "module.b": torch.zeros(1)}
    for content in (state, {"model": state}, {"state_dict": state}):
        tensors, beside = read_tensors(save(content, tmp_path / "a.pth"))
        assert list(tensors) == ["rpn.head.a", "b"]
        assert beside == {}
    assert source_of(tmp_path, tensors) == "official"
    assert source_of(tmp_path, {"neck.a": torch.ones(1)}) == "mmdet"
    with pytest.raises(UserError, match=r"neither the authors' names nor MMDetection's; the first are w, x, y, \.\.\."):
        source_of(tmp_path, dict.fromkeys("wxyz", torch.ones(1)))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("backbone.layer3.22.bn2.running_var", "backbone.layer3.22.bn2.running_var"),
        ("backbone.layer2.0.conv2.conv_offset.bias", "backbone.layer2.0.conv2.offset.bias"),
        ("neck.lateral_convs.2.conv.weight", "fpn.lateral.2.weight"),
        ("neck.fpn_convs.4.conv.bias", "fpn.output.4.bias"),
        ("bbox_head.reg_convs.3.gn.weight", "head.box_tower.10.weight"),
        ("bbox_head.cls_convs.3.conv.conv_offset.weight", "head.cls_tower.9.offset.weight"),
        ("bbox_head.atss_centerness.bias", "head.quality.bias"),
        ("backbone.bn1.num_batches_tracked", None),
        ("ema_backbone.bn1.weight", None),
        ("head.quality.bias", None),  # a name of ours is none of theirs
        ("bbox_head.cls_convs.4.conv.weight", None),
    ],
)
def test_mmdet_names(theirs: str, ours: str | None) -> None:
    assert from_mmdet(theirs) == ours


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("backbone.body.stem.bn1.running_mean", "backbone.bn1.running_mean"),
        ("backbone.body.layer1.0.downsample.0.weight", "backbone.layer1.0.downsample.0.weight"),
        ("backbone.body.layer4.2.conv2.conv.weight", "backbone.layer4.2.conv2.weight"),
        ("backbone.body.layer4.2.conv2.offset.bias", "backbone.layer4.2.conv2.offset.bias"),
        ("backbone.fpn.fpn_inner2.weight", "fpn.lateral.0.weight"),  # reads C3
        ("backbone.fpn.fpn_layer4.bias", "fpn.output.2.bias"),
        ("backbone.fpn.top_blocks.p6.weight", "fpn.output.3.weight"),
        ("backbone.fpn.top_blocks.p7.weight", "fpn.output.4.weight"),
        ("rpn.head.bbox_tower.10.bias", "head.box_tower.10.bias"),
        ("rpn.head.cls_tower.9.conv.bias", "head.cls_tower.9.bias"),
        ("rpn.head.cls_tower.9.offset.weight", "head.cls_tower.9.offset.weight"),
        ("rpn.head.iou_pred.bias", "head.quality.bias"),
        ("rpn.head.scales.3.scale", "head.scales.3.scale"),
        ("backbone.body.bn1.num_batches_tracked", None),
        ("backbone.layer1.0.conv1.weight", None),
    ],
)
def test_official_names(theirs: str, ours: str | None) -> None:
    assert from_official(theirs) == ours


def test_cell_anchors_are_those_of_the_spec(tmp_path: Path) -> None:
    corners = {0: (-27.5, 35.5), 1: (-55.5, 71.5), 2: (-111.5, 143.5), 3: (-223.5, 287.5), 4: (-447.5, 575.5)}
    name = "rpn.anchor_generator.cell_anchors."  # values: the table of spec PAA section 2
    tensors = {f"{name}{level}": torch.tensor([[a, a, b, b]]) for level, (a, b) in corners.items()}
    weights = rename_all(tmp_path, tensors, "official")
    assert weights.dropped == tuple(tensors)
    assert not [*weights.unknown, *weights.missing, *weights.state]
    fewer = {key: value for key, value in tensors.items() if not key.endswith("3")}
    assert rename_all(tmp_path, fewer, "official").missing == (f"{name}3",)
    assert rename_all(tmp_path, {**tensors, f"{name}5": torch.ones(1, 4)}, "official").unknown == (f"{name}5",)
    for wrong in (torch.tensor([[-32.0, -32, 32, 32]]), tensors[f"{name}0"].repeat(2, 1), tensors[f"{name}0"] + 0.01):
        with pytest.raises(UserError, match=rf"{name}0 is .*, this detector's is -27.5, -27.5, 35.5, 35.5"):
            rename_all(tmp_path, {**tensors, f"{name}0": wrong}, "official")


def test_two_names_for_one_tensor_are_not_both_taken(tmp_path: Path) -> None:
    keys = ("rpn.head.iou_pred.bias", "rpn.head.centerness.bias")
    assert rename_all(tmp_path, dict.fromkeys(keys, torch.ones(1)), "official").unknown == keys[1:]


NAMES = HeadNames(
    rules=((r"bbox_head\.my_cls\.(weight|bias)", r"head.cls_logits.\1"),),
    constants={"bbox_head.bins": (0.0, 1.0, 2.0)},
    background="my_quality",
)


def my_layout(classes: int, *more: str) -> Layout:
    """The layout of a ResNet-18 with a class layer that only `NAMES` knows."""
    blocks = [f"backbone.layer{stage}.{block}.conv2.weight" for stage in range(1, 5) for block in range(2)]
    shapes: dict[str, tuple[int, ...]] = {key: (64 * 2 ** (int(key[14]) - 1),) * 2 + (3, 3) for key in blocks}
    shapes |= {"bbox_head.my_cls.weight": (classes, 64, 3, 3), **dict.fromkeys(more, (1,))}
    tensors = {key: torch.zeros(shape) for key, shape in shapes.items()}
    weights = rename_all(Path("x.pth"), tensors, "mmdet", NAMES)
    return read_layout(Path("x.pth"), "mmdet", tensors, weights, {}, NAMES)


def test_methods_hand_in_the_names_of_their_own_heads() -> None:
    found = my_layout(5, "bbox_head.my_quality.weight")
    assert (found.class_layer, found.quality, found.num_classes, found.channels) == ("my_cls", "", 5, 64)
    assert (found.background, found.class_counts) == (True, (4, 5))
    assert my_layout(5).class_counts == (5,)
    assert from_mmdet("bbox_head.my_cls.bias") is None
    assert from_mmdet("bbox_head.my_cls.bias", NAMES.rules) == "head.cls_logits.bias"


def test_constants_are_checked_and_dropped() -> None:
    bins = {"bbox_head.bins": torch.arange(3.0)}
    weights = rename_all(Path("x.pth"), bins, "mmdet", NAMES)
    assert (weights.dropped, weights.unknown, weights.missing) == (("bbox_head.bins",), (), ())
    assert rename_all(Path("x.pth"), {}, "mmdet", NAMES).missing == ()  # says nothing that is not in the code
    for wrong, told in (([0.0, 1, 3], "0, 1, 3"), ([0.0, 1, 2, 3, 4], r"0, 1, 2, 3, \.\.\. \(5 values\)")):
        with pytest.raises(UserError, match=rf"x.pth: bbox_head.bins is {told}, this detector's is 0, 1, 2$"):
            rename_all(Path("x.pth"), {"bbox_head.bins": torch.tensor(wrong)}, "mmdet", NAMES)


def test_background_column_is_the_last() -> None:
    state = {
        "head.cls_logits.weight": torch.randn(3, 2, 1, 1),
        "head.cls_logits.bias": torch.randn(3),
        "a": torch.ones(3),
    }
    found = without_background(weights_of(state))
    assert torch.equal(found.state["head.cls_logits.weight"], state["head.cls_logits.weight"][:2])
    assert torch.equal(found.state["head.cls_logits.bias"], state["head.cls_logits.bias"][:2])
    assert torch.equal(found.state["a"], state["a"])
    assert len(found.notes) == 1


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_deformable_convolution_without_masks_is_one_with_masks_of_1(groups: int) -> None:
    torch.manual_seed(groups)
    conv, x = DeformConv(8, 4, offset_groups=groups), torch.randn(1, 8, 5, 6)
    offset = torch.nn.Conv2d(8, 18 * groups, 3, padding=1)  # of version 1: offsets alone
    torch.nn.init.normal_(offset.weight, std=0.2)
    found = with_masks(weights_of({f"conv2.offset.{name}": tensor for name, tensor in offset.state_dict().items()}))
    assert len(found.notes) == 1
    state = {name.removeprefix("conv2."): tensor for name, tensor in found.state.items()}
    conv.load_state_dict({"weight": conv.weight, **state})
    torch.testing.assert_close(conv(x), deform_conv2d(x, offset(x), conv.weight, padding=1))
    conv(x).square().sum().backward()
    assert conv.offset.bias is not None
    assert conv.offset.bias.grad is not None
    assert conv.offset.bias.grad[: 18 * groups].abs().min() > 0
    assert conv.offset.bias.grad[18 * groups :].abs().max() == 0  # training leaves the masks as they are


def test_deformable_convolution_with_masks_stays(tmp_path: Path) -> None:
    for channels in (27, 54, 108):
        weights = weights_of({"layer4.0.conv2.offset.bias": torch.zeros(channels)})
        assert with_masks(weights) == weights


def test_fill_names_everything_that_is_wrong() -> None:
    wanted = {"a": torch.zeros(2), "b": torch.zeros(3), "head.scales.0.scale": torch.zeros(()), "n": torch.tensor(0)}
    good = {
        "a": torch.ones(2, dtype=torch.float16),
        "b": torch.ones(3),
        "head.scales.0.scale": torch.ones(1),
        "n": torch.tensor(4),
    }
    filled = fill(Path("x.pth"), weights_of(good), wanted)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in filled.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in wanted.items()
    }
    bad = {"a": torch.ones(2, 1), "head.scales.0.scale": torch.ones(2), "c": torch.ones(1), "n": torch.ones(())}
    with pytest.raises(UserError) as error:
        fill(Path("x.pth"), weights_of(bad)._replace(unknown=("u", "v"), missing=("m",)), wanted)
    assert str(error.value) == (
        "x.pth: not converted; tensors 2 missing: m, what becomes b; 3 unknown: u, v, their c; 3 misshapen: "
        "their a is (2, 1), not (2,), their head.scales.0.scale is (2,), not (), their n is (), not () of torch.int64"
    )
    with pytest.raises(UserError, match=r"tensors 1 with NaN or infinity: their b"):
        fill(Path("x.pth"), weights_of({**good, "b": torch.tensor([1, torch.inf, 1])}), wanted)


def weights_of(state: dict[str, Tensor]) -> Weights:
    return Weights(state, {name: f"their {name}" for name in state})


def layout(num_classes: int, meta: dict[str, Any] | None = None) -> Layout:
    return Layout(Path("x.pth"), "mmdet", "resnet18", (), 1, False, 64, num_classes, "", meta or {})


def test_coco_names_are_those_of_its_files(shared: Path) -> None:
    data = shared / "data" / "coco_mini"
    assert open_data(str(data)).categories == COCO_CATEGORIES


def test_coco_has_80_classes_with_the_known_gaps() -> None:
    ids = [category.id for category in COCO_CATEGORIES]
    assert len(ids) == len({category.name for category in COCO_CATEGORIES}) == 80
    assert set(range(1, 91)) - set(ids) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # never annotated
    assert ids == sorted(ids)


def test_classes_are_cocos_or_asked_for(tmp_path: Path) -> None:
    names = [category.name for category in COCO_CATEGORIES]
    assert choose_categories(layout(80), None) == COCO_CATEGORIES
    for meta in ({"CLASSES": tuple(names)}, {"dataset_meta": {"classes": names}}):
        assert choose_categories(layout(80, {"meta": meta}), None) == COCO_CATEGORIES
    with pytest.raises(
        UserError, match=r"x.pth: has 80 classes \(b, b, b, \.\.\.\), not COCO's 80; name them with --cl"
    ):
        choose_categories(layout(80, {"meta": {"CLASSES": ["b"] * 80}}), None)
    with pytest.raises(UserError, match=r"x.pth: has 3 classes, not COCO's 80; name them with --classes FILE"):
        choose_categories(layout(3), None)
    file = tmp_path / "names.txt"
    file.write_text("red cell\n\n  white cell \n")
    assert choose_categories(layout(2), file) == (Category(1, "red cell"), Category(2, "white cell"))
    with pytest.raises(UserError, match=r"names.txt: names 2 classes, x.pth has 80"):
        choose_categories(layout(80), file)
    maybe = [layout(columns)._replace(background=True) for columns in range(1, 5)]  # 2 classes, a background's column
    assert [len(choose_categories(maybe[columns - 1], file)) for columns in (2, 3)] == [2, 2]
    for columns, told in ((1, "0 or 1"), (4, "3 or 4")):
        with pytest.raises(UserError, match=rf"names.txt: names 2 classes, x.pth has {told}"):
            choose_categories(maybe[columns - 1], file)


def test_classes_of_an_annotation_file_by_rising_id(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(
        '{"images": [], "categories": [{"id": 7, "name": "b"}, {"id": 2, "name": "a", "supercategory": ""}]}'
    )
    assert read_categories(file) == (Category(2, "a"), Category(7, "b"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb\na\n", "the class 'a' is there twice"),
        ('{"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "the class 1 is there twice"),
        ('{"categories": [{"id": "1", "name": "a"}]}', r"neither an annotation file nor a text file of names"),
        ("{", "neither an annotation file"),
        ("\n \n", "names no classes"),
        ("\udcff", "neither an annotation file"),
    ],
)
def test_bad_class_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "classes"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message) as error:
        read_categories(file)
    assert "\n" not in str(error.value)
    assert str(file) in str(error.value)


FACTS: dict[str, Any] = {
    "method": "toy",
    "config": {"steps": 3, "dcn_stages": [3, 4], "lr": None},
    "categories": [[1, "a"], [3, "ü"]],
    "geometry": "legacy",
    "profile": "official",
    "licence": "CC BY 4.0",
    "provenance": {"file": "x.pth"},
}
STATE = {"a": torch.arange(6.0).reshape(2, 3).T, "n": torch.tensor(3), "h": torch.ones(2, dtype=torch.bfloat16)}


def test_released_model_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    released.save(path, STATE, FACTS)
    content = checkpoint.load(path, method="toy")
    model = content.pop("model")
    assert content == FACTS
    assert model.keys() == STATE.keys()
    assert all(torch.equal(model[name], tensor) for name, tensor in STATE.items())
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata()["profile"] == "official"  # readable with other tools
    first = path.read_bytes()
    released.save(path, dict(reversed(STATE.items())), dict(reversed(FACTS.items())))
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert path.read_bytes() == first
    with pytest.raises(UserError, match=r"a.safetensors: checkpoint of method 'toy', this command needs 'paa'"):
        checkpoint.load(path, method="paa")


def test_released_model_with_tensors_of_any_stride(tmp_path: Path) -> None:
    expanded, transposed = torch.ones(1).as_strided((1,), (0,)), torch.arange(6.0).reshape(2, 3).T
    state = {"one": expanded, "rows": torch.ones(1, 2).expand(3, 2), "turned": transposed, "none": torch.zeros(0, 4)}
    state |= {"scalar": torch.tensor(3), "shared": transposed}
    released.save(tmp_path / "a.safetensors", state, FACTS)
    back = released.load(tmp_path / "a.safetensors")["model"]
    assert {name: tensor.tolist() for name, tensor in back.items()} == {k: v.tolist() for k, v in state.items()}


def test_every_flipped_bit_of_a_released_model_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    released.save(path, STATE, FACTS)
    whole = path.read_bytes()
    for index in range(len(whole)):
        damaged = bytearray(whole)
        damaged[index] ^= 1 << index % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError) as error:
            checkpoint.load(path)
        assert "\n" not in str(error.value)


def test_cut_and_foreign_safetensors_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    released.save(path, STATE, FACTS)
    whole = path.read_bytes()
    huge = struct.pack("<Q", 2**62) + whole[8:]
    for data in (b"", whole[:5], whole[:100], whole[:-1], whole + b"x", huge, b"hello" * 100):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"a.safetensors: not a safetensors file, or a damaged one"):
            checkpoint.load(path)
    safetensors.torch.save_file({"a": torch.ones(1)}, path)
    with pytest.raises(UserError, match="no released model of this project"):
        checkpoint.load(path)
    with pytest.raises(UserError, match="no such file"):
        checkpoint.load(tmp_path / "b.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match=r"folder.safetensors: "):
        checkpoint.load(tmp_path / "folder.safetensors")


def test_newer_release_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(released, "FORMAT", 2)
    released.save(tmp_path / "a.safetensors", STATE, FACTS)
    with pytest.raises(UserError, match="checkpoint format 2 is newer than 1"):
        checkpoint.load(tmp_path / "a.safetensors")


def detectron_blobs(backbone: torch.nn.Module) -> dict[str, np.ndarray]:
    """A backbone's convolutions and merged batch norm under Detectron's names (spec PAA section 10)."""
    blobs = {}
    for name, tensor in backbone.state_dict().items():
        if "running" in name:
            continue
        *place, layer, entry = name.split(".")
        if not place:
            blob = {"conv1": "conv1_w", "bn1": f"res_conv1_bn_{'s' if entry == 'weight' else 'b'}"}[layer]
        else:
            inside = place[-1] == "downsample"
            branch = "1" if inside else "2" + "abc"[int(layer[-1]) - 1]
            is_conv = layer.startswith("conv") or (inside and layer == "0")
            last = "w" if is_conv else "bn_s" if entry == "weight" else "bn_b"
            blob = f"res{int(place[0][-1]) + 1}_{place[1]}_branch{branch}_{last}"
        blobs[blob] = tensor.numpy()
        if blob.endswith("_w"):
            blobs[blob[:-1] + "b"] = np.zeros(len(tensor), np.float32)
    return blobs


def test_detectron_pickle(tmp_path: Path) -> None:
    config = PyramidConfig(steps=1, backbone="resnet18", profile="official", geometry="legacy")
    torch.manual_seed(0)
    source, target = build_backbone(config), build_backbone(config)
    for name, tensor in source.state_dict().items():
        if "running" not in name:
            tensor.copy_(torch.randn(tensor.shape))
    blobs = detectron_blobs(source)
    extra = {"fc1000_w": np.ones(3), "pred_b": np.ones(3), "conv1_w_momentum": np.ones(3)}
    path = tmp_path / "R-18.pkl"
    for content in (blobs, {"blobs": {**blobs, **extra}}):
        path.write_bytes(pickle.dumps(content, protocol=2))
        load_backbone_weights(target, str(path), config)
        assert all(
            torch.equal(a, b) for a, b in zip(target.state_dict().values(), source.state_dict().values(), strict=True)
        )
        target = build_backbone(config)
    for name, value, message in (
        ("res2_0_branch2a_b", np.ones(64), "unknown blob res2_0_branch2a_b"),
        ("res9_0_branch2a_w", np.ones(1), "unknown blob res9_0_branch2a_w"),
    ):
        path.write_bytes(pickle.dumps({**blobs, name: value}))
        with pytest.raises(UserError, match=message):
            load_backbone_weights(target, str(path), config)
    path.write_bytes(pickle.dumps({key: value for key, value in blobs.items() if key != "res5_1_branch2b_w"}))
    with pytest.raises(UserError, match=r"1 missing keys, first layer4.1.conv2.weight"):
        load_backbone_weights(target, str(path), config)
    with pytest.raises(UserError, match=r"Detectron's weights need --profile official, got ours"):
        load_backbone_weights(target, str(path), PyramidConfig(steps=1, backbone="resnet18"))
