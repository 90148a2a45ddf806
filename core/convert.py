"""From a checkpoint of the authors' code, of MMDetection or of our own training to a released model.

Nothing is guessed: every tensor of the source is used or stands on a list of what is dropped, every tensor of the model
is filled, all in the right shape, or nothing is written (spec PAA section 13, check 24).
"""

import argparse
import dataclasses
import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import msgspec
import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from core import checkpoint, released
from core.anchors import STRIDES, level_anchors
from core.backbone import ARCHITECTURES
from core.config import BackboneName, PyramidConfig, TrainConfig
from core.configfile import config_from_values
from core.data.coco import COCO_CATEGORIES
from core.data.table import Category
from core.errors import UserError
from core.foreign import read_torch
from core.geometry import LEGACY
from core.layouts import CELL_ANCHORS, MMDET_DROPPED, NO_NAMES, HeadNames, Layout, from_mmdet, from_official

SHOWN = 3  # names that an error line tells of each problem
SOURCES = {"official": "the authors' code", "mmdet": "MMDetection"}
FULL_MASK = 50.0  # mask logit of a deformable convolution without masks: its sigmoid is 1 in every float type
COCO_NOTE = "COCO's annotations are CC BY 4.0, its images have each their own Flickr licence"

Config = TypeVar("Config", bound=TrainConfig)
Pyramid = TypeVar("Pyramid", bound=PyramidConfig)
BuildModel = Callable[[Any, int], nn.Module]  # (config, number of classes)
Configure = Callable[[Layout, str | None], Pyramid]  # (what a source's names say, --detector)


class Weights(NamedTuple):
    """A checkpoint's tensors by our names, and what became of its own names."""

    state: dict[str, Tensor]  # by our names
    theirs: dict[str, str]  # the source's names of these
    unknown: tuple[str, ...] = ()  # no rule renames them, or to something that another is already
    dropped: tuple[str, ...] = ()  # known and not needed
    missing: tuple[str, ...] = ()  # checked and then dropped elsewhere, but not there
    notes: tuple[str, ...] = ()  # what was done to some of them


class Described(NamedTuple):
    """A checkpoint that was read: its weights, the configuration that fits them and what is to be told about them."""

    weights: Weights
    config: Any
    facts: dict[str, Any]  # of `released.save`


def convert(
    arguments: argparse.Namespace,
    method: str,
    config_type: type[Pyramid],
    configure: Configure[Pyramid],
    build: BuildModel,
    names: HeadNames = NO_NAMES,
) -> None:
    """Read a checkpoint, check every tensor of it, and write a released model that needs no further option.

    Args:
        arguments: of `core.arguments.convert_parser`.
        method: package name that the released model carries.
        config_type: the method's configuration.
        configure: the configuration for a source's layout and the detector that was asked for.
        build: makes the method's model.
        names: of the method's own heads in MMDetection's layout.

    Raises:
        UserError: a file that is missing, damaged, of another layout or incomplete, or one that would be overwritten.
    """
    check_target(arguments.source, arguments.out, arguments.force)
    if checkpoint.is_ours(arguments.source):
        described = read_own(arguments, method, config_type)
    else:
        described = read_foreign(arguments, method, configure, names)
    write(arguments, method, described, build)


def write(arguments: argparse.Namespace, method: str, described: Described, build: BuildModel, use: str = "") -> None:
    """Check every tensor of a checkpoint that was read, write the released model and tell what it is.

    Args:
        arguments: of `core.arguments.convert_parser`; `source` and `out` of them.
        method: package name that the released model carries.
        described: the checkpoint.
        build: makes the method's model.
        use: what the last line tells to do with the file; empty: to evaluate it.

    Raises:
        UserError: tensors that are missing, unknown, misshapen or not finite; nothing is written then.
    """
    weights, config, facts = described
    with torch.device("meta"):
        wanted = build(config, len(facts["categories"])).state_dict()
    tensors = fill(arguments.source, weights, wanted)
    released.save(arguments.out, tensors, facts)
    count = sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith(("_mean", "_var", "_tracked")))
    kept = f"{len(tensors)} tensors with {count:,} parameters"
    like = f", settings of preset {config.preset}" if config.preset else ""
    classes = f"{len(facts['categories'])} classes"
    print(f"{arguments.source}: {facts['provenance']['source']}, {config.backbone}, {classes}{like}")
    print(f"{kept}{f'; {len(weights.dropped)} others checked or not needed' if weights.dropped else ''}")
    for note in weights.notes:
        print(note)
    told = ", ".join(f"{name} {value}" for name, value in config.conventions.items())
    print(f"{told}{'; ' if told else ''}licence: {facts['licence']}")
    evaluate = f"evaluate it: python -m {method}.evaluate {arguments.out} --data {config.data}"
    print(f"written to {arguments.out}; {use or evaluate}")


def check_target(path: Path, out: Path, force: bool) -> None:
    """UserError where `out` is no file of a released model, `path` itself, or there already and not to be replaced."""
    if out.suffix != released.SUFFIX:
        raise UserError(f"{out}: the name of a released model must end in {released.SUFFIX}")
    if out.exists() and path.exists() and out.samefile(path):
        raise UserError(f"{out}: is the file to convert; choose another name")
    if out.is_dir() or (out.exists() and not force):
        raise UserError(f"{out}: exists; choose another name" + ("" if out.is_dir() else ", or --force to replace it"))


def read_own(arguments: argparse.Namespace, method: str, config_type: type[Config]) -> Described:
    """A checkpoint or released model of ours; the average of the weights where there is one.

    Raises:
        UserError: missing, damaged, another method's, or options that are for files of other projects.
    """
    path = arguments.source
    for flag in ("detector", "classes", "profile", "anchors"):
        if getattr(arguments, flag, None) is not None:
            raise UserError(f"--{flag} is for files of other projects; {path} itself says what it holds")
    content = checkpoint.load(path, method=method)
    state = content.get("average") or content.get("model")
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds no model weights")
    try:
        config = dataclasses.replace(config_from_values(content["config"], config_type, str(path)), out="")
        categories = [Category(int(number), str(name)) for number, name in content["categories"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: its configuration or classes are missing or damaged ({error})") from None
    told = {
        name: content[name] for name in ("step", "metrics", "commit", "data", "data_fingerprint") if name in content
    }
    provenance = content.get("provenance") or {"source": "trained with this project", **_origin(path), **told}
    licence = arguments.licence or content.get("licence") or "not stated"
    facts = _facts(method, config, categories, licence, provenance)
    return Described(Weights(state, {name: name for name in state}), config, facts)


def read_foreign(
    arguments: argparse.Namespace, method: str, configure: Configure[Pyramid], names: HeadNames = NO_NAMES
) -> Described:
    """A checkpoint of the authors' code or of MMDetection. Arguments as of `convert`.

    Raises:
        UserError: missing, damaged, of neither layout, with other anchors, or not saying enough about itself.
    """
    path = arguments.source
    tensors, meta = read_tensors(path)
    source = source_of(path, tensors)
    weights = rename_all(path, tensors, source, names)
    layout = read_layout(path, source, tensors, weights, meta, names)
    config = configure(layout, arguments.detector)
    categories = choose_categories(layout, arguments.classes)
    weights = with_masks(without_background(weights) if len(categories) < layout.num_classes else weights)
    licence = arguments.licence or "the file states none, its publisher's holds" + (
        f"; {COCO_NOTE}" if categories == COCO_CATEGORIES else ""
    )
    told = ("iteration", "epoch", "iter", "time", "mmdet_version")
    beside = {**meta, **layout.mmdet_meta}
    history = {name: beside[name] for name in told if type(beside.get(name)) in (int, str)}
    history |= {"notes": list(weights.notes)} if weights.notes else {}
    trained_by = SOURCES[source] if config.profile == layout.profile else f"{SOURCES[config.profile]} on MMDetection"
    provenance = {"source": trained_by, **_origin(path), **history}
    return Described(weights, config, _facts(method, config, categories, licence, provenance))


def _facts(
    method: str, config: TrainConfig, categories: Collection[Category], licence: str, provenance: dict[str, Any]
) -> dict[str, Any]:
    """What a released model says about itself."""
    return {
        "method": method,
        "config": dataclasses.asdict(config),
        "categories": [list(category) for category in categories],
        **config.conventions,
        "licence": licence,
        "provenance": provenance,
    }


def _origin(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        return {"file": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[Any, Any]]:
    """The tensors of another project's checkpoint by its own names, and what else the file holds; no code is run.

    Raises:
        UserError: missing, damaged, or something else than named tensors.
    """
    content = read_torch(path)
    beside = content if isinstance(content, dict) else {}
    wrappers = [name for name in ("state_dict", "model") if isinstance(beside.get(name), dict)]
    state = beside[wrappers[0]] if wrappers else beside
    if not state:
        raise UserError(f"{path}: holds no tensors by their names")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: {str(key)[:80]!r} is no tensor; expected the weights, as they are or in `model`")
    names = [key.removeprefix("module.") for key in state]  # of DistributedDataParallel
    rest = {key: value for key, value in beside.items() if key not in wrappers} if wrappers else {}
    return dict(zip(names, state.values(), strict=True)), rest


def source_of(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """`official` or `mmdet`, by how the names begin. UserError for other names."""
    for name, beginnings in {"mmdet": ("bbox_head.", "neck."), "official": ("rpn.", "backbone.body.")}.items():
        if any(key.startswith(beginnings) for key in tensors):
            return name
    raise UserError(f"{path}: neither the authors' names nor MMDetection's; the first are {_some(tensors)}")


def rename_all(path: Path, tensors: Mapping[str, Tensor], source: str, names: HeadNames = NO_NAMES) -> Weights:
    """A source's tensors by our names.

    Raises:
        UserError: naming the first of the anchors, or of other constants which they store, that is not ours.
    """
    anchors = dict(cell_anchors()) if source == "official" else {}
    constants = {key: torch.tensor(values) for key, values in names.constants.items()} | anchors
    state, theirs, unknown, dropped = {}, {}, [], []
    for key, tensor in tensors.items():
        name = from_official(key) if source == "official" else from_mmdet(key, names.rules)
        if name is not None and name not in state:
            state[name], theirs[name] = tensor, key
        elif key in constants:
            wanted = constants[key]
            if tensor.shape != wanted.shape or not torch.allclose(tensor.float(), wanted, rtol=0, atol=1e-3):
                raise UserError(f"{path}: {key} is {_values(tensor)}, this detector's is {_values(wanted)}")
            dropped.append(key)
        elif source == "mmdet" and re.fullmatch(MMDET_DROPPED, key):
            dropped.append(key)
        else:
            unknown.append(key)
    missing = tuple(key for key in anchors if key not in tensors)
    return Weights(state, theirs, tuple(unknown), tuple(dropped), missing)


def cell_anchors() -> Iterator[tuple[str, Tensor]]:
    """The authors' name and our box (1, 4) of the anchor in each level's first cell (spec PAA section 2)."""
    for level, stride in enumerate(STRIDES):
        yield CELL_ANCHORS.format(level=level), level_anchors((1, 1), stride, LEGACY)[0]


def without_background(weights: Weights) -> Weights:
    """The same without the class layer's last column, which says how much an anchor looks like background."""
    state = dict(weights.state)
    for name in ("head.cls_logits.weight", "head.cls_logits.bias"):
        if name in state:
            state[name] = state[name][:-1]
    return weights._replace(state=state, notes=(*weights.notes, "left out: the background's column of the class layer"))


def with_masks(weights: Weights) -> Weights:
    """The same with masks of 1 where deformable convolutions have none (version 1): 9 logits beside 18 offsets.

    Their gradient is 0, so that further training keeps them.
    """
    state = dict(weights.state)
    for name, tensor in weights.state.items():
        part = re.search(r"\.offset\.(weight|bias)$", name)
        if part and tensor.dim() and _masks_lacking(len(tensor)):
            logits = tensor.new_full((len(tensor) // 2, *tensor.shape[1:]), FULL_MASK if part[1] == "bias" else 0)
            state[name] = torch.cat([tensor, logits])
    added = any(len(state[name]) > len(tensor) for name, tensor in weights.state.items() if tensor.dim())
    notes = ("added: masks of 1 to its deformable convolutions, which have none",) if added else ()
    return weights._replace(state=state, notes=(*weights.notes, *notes))


def _masks_lacking(channels: int) -> bool:
    """Whether these are 18 offsets a group, not 27 with masks; three groups or six divide no layer's channels."""
    return channels % 18 == 0 and channels % 27 > 0


def read_layout(
    path: Path,
    source: str,
    tensors: Mapping[str, Tensor],
    weights: Weights,
    meta: Mapping[Any, Any],
    names: HeadNames = NO_NAMES,
) -> Layout:
    """Backbone, deformable stages and sizes, from names and shapes alone.

    Raises:
        UserError: for a backbone that is none of ours, or without the layer that predicts classes.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.state.items()}
    classes = shapes.get("head.cls_logits.weight", ())
    if len(classes) != 4:
        raise UserError(f"{path}: no layer that predicts classes among its {len(tensors)} tensors")
    stages = [re.fullmatch(r"backbone\.(?:body\.)?layer([1-4])\.\d+\.conv2\.\w+\.\w+", key) for key in tensors]
    offsets = [shape[0] for name, shape in shapes.items() if re.search(r"layer.*conv2\.offset\.weight$", name)]
    per_group = 18 if offsets and _masks_lacking(offsets[0]) else 27
    return Layout(
        path=path,
        source="official" if source == "official" else "mmdet",
        backbone=_backbone(path, shapes),
        dcn_stages=tuple(sorted({int(match[1]) + 1 for match in stages if match})),  # layer1 is C2
        dcn_groups=max(1, offsets[0] // per_group) if offsets else 1,
        dcn_tower=any(re.search(r"_tower\.9\.\w+\.|_convs\.\d\.conv\.conv_offset\.", key) for key in tensors),
        channels=classes[1],
        num_classes=classes[0],
        quality=_layer(weights, "head.quality"),
        meta=meta,
        class_layer=_layer(weights, "head.cls_logits"),
        background=bool(names.background) and any(f".{names.background}." in key for key in tensors),
        names=frozenset(tensors),
    )


def _layer(weights: Weights, ours: str) -> str:
    """What the source calls a layer of our head; empty without it."""
    theirs = next((theirs for name, theirs in weights.theirs.items() if name.startswith(f"{ours}.")), "")
    return theirs.removeprefix("rpn.head.").removeprefix("bbox_head.").split(".")[0]


def _backbone(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> BackboneName:
    """The known backbone with these numbers of blocks, this kind of block, and these groups in its 3x3."""
    blocks = {match.groups() for name in shapes if (match := re.match(r"backbone\.layer([1-4])\.(\d+)\.", name))}
    depths = tuple(sum(stage == number for stage, _ in blocks) for number in "1234")
    bottleneck = any(name.endswith(".conv3.weight") for name in shapes)
    groups = {  # number and channels in C2 of the groups; a stage's channels are twice those of the one before
        (shape[0] // shape[1], shape[1] >> (int(match[1]) - 1))
        for name, shape in shapes.items()
        if (match := re.fullmatch(r"backbone\.layer([1-4])\.\d+\.conv2\.weight", name)) and len(shape) == 4
    }
    for name in get_args(BackboneName):
        known = ARCHITECTURES[name]
        same_blocks = (known.depths, known.block is Bottleneck) == (depths, bottleneck)
        if same_blocks and (known.groups, known.width_per_group) in groups:
            return name
    found = f"{' + '.join(map(str, depths))} blocks with {sorted(groups)} groups and channels in the 3x3 of C2"
    raise UserError(f"{path}: its backbone has {found}, which fits none of {', '.join(ARCHITECTURES)}")


def choose_categories(layout: Layout, file: Path | None) -> tuple[Category, ...]:
    """The classes by label: of `file`, or COCO's where there are 80 and the checkpoint names no others.

    Raises:
        UserError: when they must be given, or the file does not fit.
    """
    names = tuple(category.name for category in COCO_CATEGORIES)
    counts = " or ".join(map(str, layout.class_counts))
    if file is None:
        if len(names) in layout.class_counts and layout.class_names in (None, names):
            return COCO_CATEGORIES
        named = f" ({', '.join(layout.class_names[:SHOWN])}, ...)" if layout.class_names else ""
        raise UserError(
            f"{layout.path}: has {counts} classes{named}, not COCO's 80; name them with --classes FILE, an "
            "annotation file or a text file with one name a line, in the order of training"
        )
    categories = read_categories(file)
    if len(categories) not in layout.class_counts:
        raise UserError(f"{file}: names {len(categories)} classes, {layout.path} has {counts}")
    return categories


class _Named(msgspec.Struct):
    id: int
    name: str


class _Annotations(msgspec.Struct):
    categories: list[_Named]


def read_categories(file: Path) -> tuple[Category, ...]:
    """Classes of a COCO annotation file by rising id, or of a text file, one name a line, with ids from 1.

    Raises:
        UserError: missing, malformed, empty, or naming one twice.
    """
    try:
        data = file.read_bytes()
        if data.lstrip()[:1] == b"{":
            entries = msgspec.json.decode(data, type=_Annotations).categories
            categories = [Category(entry.id, entry.name) for entry in sorted(entries, key=lambda entry: entry.id)]
        else:
            lines = [line.strip() for line in data.decode("utf-8").splitlines()]
            categories = [Category(number, name) for number, name in enumerate(filter(None, lines), start=1)]
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; expected classes") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file}: neither an annotation file nor a text file of names ({error})") from None
    for values in zip(*categories, strict=True):
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise UserError(f"{file}: the class {twice!r} is there twice")
    if not categories:
        raise UserError(f"{file}: names no classes")
    return tuple(categories)


def fill(path: Path, weights: Weights, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model in its own types and shapes.

    Args:
        path: of the file that the weights come from.
        weights: by our names.
        wanted: every tensor of the model; only type and shape matter.

    Raises:
        UserError: one line with the numbers and first names of all that is missing, unknown, misshapen or not finite.
    """
    scale = re.compile(r"head\.scales\.\d\.scale")  # the authors' have one element, ours no axis
    state = {
        name: tensor.reshape(()) if scale.fullmatch(name) and tensor.shape == (1,) else tensor
        for name, tensor in weights.state.items()
    }
    both = [name for name in wanted if name in state]
    wrong = [name for name in both if _kind(state[name]) != _kind(wanted[name])]
    finite = [name for name in both if name not in wrong]
    problems = {
        "missing": [*weights.missing, *(f"what becomes {name}" for name in wanted if name not in state)],
        "unknown": [*weights.unknown, *(weights.theirs[name] for name in state if name not in wanted)],
        "misshapen": [f"{weights.theirs[name]} is {_kind(state[name])}, not {_kind(wanted[name])}" for name in wrong],
        "with NaN or infinity": [weights.theirs[name] for name in finite if not state[name].isfinite().all()],
    }
    told = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
    if told:
        raise UserError(f"{path}: not converted; tensors {'; '.join(told)}")
    return {name: state[name].to(wanted[name].dtype) for name in wanted}


def _kind(tensor: Tensor) -> str:
    """Shape of a tensor of floats, of any width; with the type where it holds others."""
    return f"{tuple(tensor.shape)}" + ("" if tensor.is_floating_point() else f" of {tensor.dtype}")


def _some(names: Collection[str]) -> str:
    shown = [name[:80] for name in list(names)[:SHOWN]]
    return ", ".join(shown) + (", ..." if len(names) > SHOWN else "")


def _values(tensor: Tensor) -> str:
    more = f", ... ({tensor.numel()} values)" if tensor.numel() > 4 else ""
    return ", ".join(f"{value:g}" for value in tensor.flatten()[:4].tolist()) + more
