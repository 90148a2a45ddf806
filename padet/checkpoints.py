"""What `padet.convert` does with checkpoints: models for another input size, backbones of VGG-16's weights."""

import argparse
import dataclasses
from collections.abc import Collection

import safetensors.torch
import torch
from torch import Tensor

from core.backbone import check_weights
from core.convert import Described, read_tensors
from core.errors import UserError
from core.files import replace_file
from padet.model import PADet
from padet.vgg import ReducedVGG16, reduced_names


def resized(described: Described, size: int) -> Described:
    """A checkpoint's model for another input size: what both sizes have, by name and shape, keeps its weights.

    So do backbone, extra blocks, decoder and heads of levels with equal stride and equal numbers of anchors (spec
    section 1.1). The rest starts as in a new model with the run's seed.

    Args:
        described: the checkpoint.
        size: of the new model's input, pixels.
    """
    weights, config, facts = described
    new = dataclasses.replace(config, size=size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(new.seed)
        start = PADet(new, len(facts["categories"])).state_dict()
    kept = {name for name in start if name in weights.state and _alike(weights.state[name], start[name])}
    notes = (
        f"size {config.size} to {size}: {len(kept)} tensors kept",
        f"starts at random: {', '.join(whole_parts(start.keys() - kept, start))}",
        f"left out: {', '.join(whole_parts(weights.state.keys() - kept, weights.state))}",
    )
    state = {name: weights.state[name] if name in kept else tensor for name, tensor in start.items()}
    provenance = facts["provenance"]
    provenance = {**provenance, "notes": [*provenance.get("notes", ()), *notes]}
    return Described(
        weights._replace(state=state, theirs={name: name for name in state}, notes=notes),
        new,
        {**facts, "config": dataclasses.asdict(new), "provenance": provenance},
    )


def _alike(mine: Tensor, theirs: Tensor) -> bool:
    return mine.shape == theirs.shape and mine.dtype == theirs.dtype


def whole_parts(names: Collection[str], everything: Collection[str]) -> list[str]:
    """Names of tensors in short, sorted: the outermost modules all of whose tensors are among them.

    Args:
        names: of tensors, with dots between modules.
        everything: names of all tensors of the model.
    """
    chosen = set(names)
    kept = {prefix for name in everything if name not in chosen for prefix in _prefixes(name)}
    return sorted({next(prefix for prefix in _prefixes(name) if prefix not in kept) for name in chosen})


def _prefixes(name: str) -> list[str]:
    """`heads`, `heads.0`, `heads.0.stem` ... up to the whole name."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def convert_vgg(arguments: argparse.Namespace) -> None:
    """Weights of VGG-16 as a file of the reduced network, which `--backbone-weights` takes.

    Files of the reduced layout are taken for Caffe's, whose pixels are BGR minus means.

    Args:
        arguments: of `padet.convert.convert_parser`.

    Raises:
        UserError: a file that is missing, damaged, or of another network.
    """
    path, out = arguments.source, arguments.out
    if arguments.size:
        raise UserError(f"--size is for our own checkpoints; {path} is none, and a backbone fits every size")
    tensors, _ = read_tensors(path)
    prefix = f"{path} as VGG-16"
    published = any(name.startswith("features.") for name in tensors)
    state = reduced_names(tensors, prefix)
    with torch.device("meta"):
        wanted = ReducedVGG16().layers.state_dict()
    check_weights(state, wanted, prefix)
    licence = arguments.licence or "the file states none, its publisher's holds"
    facts = {
        "network": "VGG-16 with reduced fully connected layers",
        "pixels": "imagenet" if published else "caffe",
        "licence": licence,
        "source": path.name,
    }
    replace_file(out, safetensors.torch.save({name: state[name].float().contiguous() for name in wanted}, facts))
    layout = "torchvision's layout" if published else "the reduced layout, pixels BGR minus means as Caffe has them"
    print(f"{path}: VGG-16 in {layout}; licence: {licence}")
    flag = "" if published else " --pixels caffe"
    print(f"written to {out}; train on it: python -m padet.train --backbone-weights {out}{flag}")
