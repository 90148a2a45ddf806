"""`python -m padet.convert`: own checkpoints, other input sizes, VGG-16's files, and what is refused."""

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torchvision.models import vgg16

from core import checkpoint, distributed
from core.backbone import build_resnet
from core.commands import load_trained
from core.errors import UserError
from core.inference import load_start_weights
from padet import convert
from padet.checkpoints import whole_parts
from padet.config import SIZES, Config
from padet.model import PADet
from padet.vgg import ReducedVGG16, load_weights
from tests.checkpoints import run

TINY = Config(size=192, backbone="resnet18", norm="batch", channels=16, backbone_weights="none", preset="small", seed=5)
CLASSES = [[1, "circle"], [2, "star"]]


def trained(path: Path, size: int = 192, **content: Any) -> dict[str, Tensor]:
    """Write a checkpoint of random weights, none of which is a start value; returns them."""
    config = dataclasses.replace(TINY, size=size)
    torch.manual_seed(0)
    model = PADet(config, len(CLASSES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    state = model.state_dict()
    facts = {"method": "padet", "config": dataclasses.asdict(config), "categories": CLASSES, "step": 7}
    checkpoint.save(path, {"format": checkpoint.FORMAT, **facts, "model": state, **content})
    return state


def load(path: Path) -> Any:
    """The converted model as `evaluate` gets it."""
    arguments = Namespace(weights=path, device="cpu", deterministic=False)
    return load_trained(arguments, "padet", Config, PADet, distributed.pick_device("cpu"))


# Own checkpoints


def test_own_checkpoint_keeps_every_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state, out = trained(tmp_path / "best.pt"), tmp_path / "out.safetensors"
    run(convert, monkeypatch, tmp_path / "best.pt", out, "--licence", "mine")
    said = capsys.readouterr().out
    assert "resnet18, 2 classes, settings of preset small" in said
    assert "\nlicence: mine\n" in said
    assert f"python -m padet.evaluate {out}" in said
    again = load(out)
    assert (again.config.size, [category.name for category in again.categories]) == (192, ["circle", "star"])
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.model.state_dict().items())


def test_the_average_is_what_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = trained(tmp_path / "a.pt")
    average = {name: tensor + 1 for name, tensor in state.items()}
    trained(tmp_path / "b.pt", average=average)
    run(convert, monkeypatch, tmp_path / "b.pt", tmp_path / "b.safetensors")
    name = "decoder.skips.0.0.weight"
    assert torch.equal(load(tmp_path / "b.safetensors").model.state_dict()[name], average[name])


# Other sizes


def alike(name: str, one: int, other: int) -> bool:
    """Whether both sizes have a tensor, by levels: 192 has 5, 384 has 6, 512 has 7.

    Encoder blocks and skips are one less than levels; extra blocks begin after C3 to C5. Of the heads the last two of a
    size have 4 anchors a cell and no FAM, the others 6; the stem is the same everywhere.
    """
    levels = {192: 5, 384: 6, 512: 7}
    few, many = sorted((levels[one], levels[other]))
    part, *rest = name.split(".")
    if part == "extras":
        return int(rest[0]) < few - 1 - 3
    if part == "decoder":
        return int(rest[1]) < {"skips": few - 1, "ups": few - 2, "enhance": few}[rest[0]]
    if part == "heads":
        level = int(rest[0])
        same = (level < few - 2) == (level < many - 2)
        return level < few and (same or rest[1] == "stem")
    return True


@pytest.mark.parametrize(("one", "other"), [(384, 512), (512, 384), (192, 512)])
def test_another_size_keeps_what_both_have_and_names_the_rest(
    one: int, other: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, out = trained(tmp_path / "best.pt", one), tmp_path / "out.safetensors"
    run(convert, monkeypatch, tmp_path / "best.pt", out, "--size", other)
    said = capsys.readouterr().out
    again = load(out)
    assert again.config == dataclasses.replace(again.config, size=other, seed=5, preset="small")
    torch.manual_seed(5)
    start = PADet(again.config, 2).state_dict()
    new = again.model.state_dict()
    kept = {name for name in new if alike(name, one, other)}
    assert len(new) > len(kept) > 200
    for name, tensor in new.items():
        assert torch.equal(tensor, old[name] if name in kept else start[name]), name
    assert f"size {one} to {other}: {len(kept)} tensors kept" in said
    assert f"--size {other} --weights {out}" in said


def test_layers_that_start_at_random_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path / "best.pt", 384)
    run(convert, monkeypatch, tmp_path / "best.pt", tmp_path / "out.safetensors", "--size", "512")
    said = capsys.readouterr().out.splitlines()
    head = "heads.4.apm_box, heads.4.apm_score, heads.4.boxes, heads.4.classes"
    rest = f"{head}, heads.4.fam, heads.6"
    assert f"starts at random: decoder.enhance.6, decoder.skips.5, decoder.ups.4, extras.2, {rest}" in said
    assert f"left out: {head}" in said
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert "starts at random: decoder.enhance.6" in file.metadata()["provenance"]


def test_a_converted_model_starts_training_at_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, out = trained(tmp_path / "best.pt", 384), tmp_path / "out.safetensors"
    run(convert, monkeypatch, tmp_path / "best.pt", out, "--size", "512")
    config = dataclasses.replace(TINY, size=512, weights=str(out))
    model = PADet(config, 2)
    load_start_weights(model, config, "padet")
    assert torch.equal(model.state_dict()["heads.5.classes.weight"], old["heads.5.classes.weight"])
    with pytest.raises(UserError, match=r"has an unknown tensor decoder\.enhance\.6"):
        load_start_weights(PADet(dataclasses.replace(config, size=384), 2), config, "padet")


def test_the_same_size_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path / "best.pt")
    run(convert, monkeypatch, tmp_path / "best.pt", tmp_path / "a.safetensors")
    run(convert, monkeypatch, tmp_path / "best.pt", tmp_path / "b.safetensors", "--size", "192")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_whole_parts_by_hand() -> None:
    everything = ["a.0.w", "a.0.b", "a.1.w", "a.1.b", "c.w", "d"]
    assert whole_parts({"a.0.w", "a.0.b", "c.w"}, everything) == ["a.0", "c"]
    assert whole_parts({"a.0.w", "a.0.b", "a.1.w", "d"}, everything) == ["a.0", "a.1.w", "d"]
    assert whole_parts(everything, everything) == ["a", "c", "d"]
    assert whole_parts([], everything) == []


# VGG-16


def shaped(shapes: dict[str, Any], value: float) -> dict[str, Tensor]:
    """Tensors of one value that take a few bytes of the file."""
    return {name: torch.full((), value).expand(shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    """Names and shapes of torchvision's VGG-16."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in vgg16().state_dict().items()}


@pytest.fixture(scope="module")
def reduced() -> dict[str, Any]:
    """Names and shapes of a vgg16_reducedfc file."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in ReducedVGG16().layers.state_dict().items()}


@pytest.mark.parametrize(("layout", "pixels"), [("published", "imagenet"), ("reduced", "caffe")])
def test_both_files_of_vgg_become_a_backbone(
    layout: str,
    pixels: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = shaped(request.getfixturevalue(layout), 0.25)
    conv6, conv7 = "classifier.0.weight", "31.weight"
    if layout == "published":  # row 4 n of the layer becomes output n: see test_vgg.py for the rest of the rule
        state[conv6] = torch.arange(4096.0)[:, None].expand(4096, 25088)
    else:
        state[conv7] = 4 * torch.arange(1024.0)[:, None, None, None].expand(1024, 512, 3, 3)
    torch.save(state, tmp_path / "vgg.pth")
    out = tmp_path / "backbone.safetensors"
    run(convert, monkeypatch, tmp_path / "vgg.pth", out, "--licence", "theirs")
    said = capsys.readouterr().out
    assert said.rstrip().endswith(f"--backbone-weights {out}" + (" --pixels caffe" if pixels == "caffe" else ""))
    with safe_open(out, framework="pt") as file:
        assert (file.metadata()["pixels"], file.metadata()["licence"]) == (pixels, "theirs")
    model = ReducedVGG16()
    load_weights(model, str(out), Config())
    layers = model.layers.state_dict()
    assert layers["31.weight"][:, 0, 0, 0].tolist() == [4.0 * n for n in range(1024)]
    assert all((tensor == 0.25).all() for name, tensor in layers.items() if name != "31.weight")


def without(state: dict[str, Tensor], word: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if word not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: without(state, "classifier"), r"vgg\.pth as VGG-16: its classifier is not VGG-16's"),
        (
            lambda state: without(state, "features.28"),
            r"vgg\.pth as VGG-16: 2 missing keys, first 28\.weight, 28\.bias",
        ),
        (
            lambda state: state | {"classifier.3.bias": torch.full((), torch.nan).expand(4096)},
            r"vgg\.pth as VGG-16: 33\.bias holds torch\.float32 or NaN",
        ),
        (lambda _: build_resnet(TINY).state_dict(), r"vgg\.pth as VGG-16: 30 missing keys, first 0\.weight"),
        (lambda _: {}, "holds no tensors"),
    ],
)
def test_other_networks_are_refused(
    change: Any, message: str, published: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(change(shaped(published, 0.5)), tmp_path / "vgg.pth")
    with pytest.raises(UserError, match=message) as error:
        run(convert, monkeypatch, tmp_path / "vgg.pth", tmp_path / "out.safetensors")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.safetensors").exists()


# Mistakes


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.safetensors"
    trained(tmp_path / "best.pt")
    (tmp_path / "text.pth").write_text("words")
    (tmp_path / "there.safetensors").write_text("words")
    content = checkpoint.load(tmp_path / "best.pt")
    checkpoint.save(tmp_path / "paa.pt", {**content, "format": checkpoint.FORMAT, "method": "paa"})
    for arguments, words in (
        ((tmp_path / "none.pth", out), "none.pth: cannot be read: No such file"),
        ((tmp_path / "text.pth", out), "text.pth: not a PyTorch file, or a damaged one"),
        ((tmp_path / "there.safetensors", out), "there.safetensors: not a safetensors file"),
        ((tmp_path / "paa.pt", out), "checkpoint of method 'paa', this command needs 'padet'"),
        ((tmp_path / "best.pt", tmp_path / "out.pt"), "must end in .safetensors"),
        ((tmp_path / "best.pt", tmp_path / "there.safetensors"), "exists; choose another name, or --force"),
        ((tmp_path / "text.pth", out, "--size", "512"), "--size is for our own checkpoints; .*text.pth is none"),
    ):
        with pytest.raises(UserError, match=words) as error:
            run(convert, monkeypatch, *arguments)
        assert "\n" not in str(error.value)
    run(convert, monkeypatch, tmp_path / "best.pt", tmp_path / "there.safetensors", "--force")


def test_only_sizes_that_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(convert, monkeypatch, tmp_path / "a.pt", tmp_path / "b.safetensors", "--size", "300")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(str(size) in said for size in SIZES)
