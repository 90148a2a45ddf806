"""Checkpoints of MMDetection and of the authors' code: their names turned into ours (imports no torch).

What several methods share stands here: backbones, pyramid, towers, ATSS's layers. A method hands in a `HeadNames` for
what only its own heads have.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from core.config import BackboneName
from core.geometry import GeometryName
from core.profiles import ProfileName

Rules = tuple[tuple[str, str], ...]  # pattern of a whole name, our name

_ENTRY = r"(weight|bias|running_mean|running_var)"
_BLOCK = r"(layer[1-4]\.\d+)\."

MMDET_RULES: Rules = (
    (rf"backbone\.(conv1|bn1)\.{_ENTRY}", r"backbone.\1.\2"),
    (rf"backbone\.{_BLOCK}(conv[123]|bn[123]|downsample\.[01])\.{_ENTRY}", r"backbone.\1.\2.\3"),
    (rf"backbone\.{_BLOCK}conv2\.conv_offset\.(weight|bias)", r"backbone.\1.conv2.offset.\2"),
    (r"neck\.lateral_convs\.(\d)\.conv\.(weight|bias)", r"fpn.lateral.\1.\2"),
    (r"neck\.fpn_convs\.(\d)\.conv\.(weight|bias)", r"fpn.output.\1.\2"),
    (r"bbox_head\.atss_cls\.(weight|bias)", r"head.cls_logits.\1"),
    (r"bbox_head\.atss_reg\.(weight|bias)", r"head.bbox_pred.\1"),
    (r"bbox_head\.atss_centerness\.(weight|bias)", r"head.quality.\1"),  # PAA's IoU branch has this name too
    (r"bbox_head\.scales\.(\d)\.scale", r"head.scales.\1.scale"),
    *(  # the tower's convolution, norm and ReLU are three layers in a row of ours
        rule
        for theirs, ours in (("cls", "cls"), ("reg", "box"))
        for index in range(4)
        for rule in (
            (rf"bbox_head\.{theirs}_convs\.{index}\.conv\.weight", f"head.{ours}_tower.{3 * index}.weight"),
            (rf"bbox_head\.{theirs}_convs\.{index}\.gn\.(weight|bias)", rf"head.{ours}_tower.{3 * index + 1}.\1"),
            (
                rf"bbox_head\.{theirs}_convs\.{index}\.conv\.conv_offset\.(weight|bias)",
                rf"head.{ours}_tower.{3 * index}.offset.\1",
            ),
        )
    ),
)
MMDET_DROPPED = rf"backbone\.({_BLOCK})?(bn[123]|downsample\.1)\.num_batches_tracked"  # of batch norm in training only

OFFICIAL_RULES: Rules = (
    (rf"backbone\.body\.stem\.(conv1|bn1)\.{_ENTRY}", r"backbone.\1.\2"),
    (rf"backbone\.body\.{_BLOCK}(conv[123]|bn[123]|downsample\.[01])\.{_ENTRY}", r"backbone.\1.\2.\3"),
    (rf"backbone\.body\.{_BLOCK}conv2\.offset\.(weight|bias)", r"backbone.\1.conv2.offset.\2"),
    (rf"backbone\.body\.{_BLOCK}conv2\.conv\.weight", r"backbone.\1.conv2.weight"),  # deformable
    *((rf"backbone\.fpn\.fpn_inner{stage}\.(weight|bias)", rf"fpn.lateral.{stage - 2}.\1") for stage in (2, 3, 4)),
    *((rf"backbone\.fpn\.fpn_layer{stage}\.(weight|bias)", rf"fpn.output.{stage - 2}.\1") for stage in (2, 3, 4)),
    *((rf"backbone\.fpn\.top_blocks\.p{level}\.(weight|bias)", rf"fpn.output.{level - 3}.\1") for level in (6, 7)),
    (r"rpn\.head\.cls_tower\.(\d+(?:\.offset)?)(?:\.conv)?\.(weight|bias)", r"head.cls_tower.\1.\2"),
    (r"rpn\.head\.bbox_tower\.(\d+(?:\.offset)?)(?:\.conv)?\.(weight|bias)", r"head.box_tower.\1.\2"),
    (r"rpn\.head\.(cls_logits|bbox_pred)\.(weight|bias)", r"head.\1.\2"),
    (r"rpn\.head\.(?:iou_pred|centerness)\.(weight|bias)", r"head.quality.\1"),
    (r"rpn\.head\.scales\.(\d)\.scale", r"head.scales.\1.scale"),
)
CELL_ANCHORS = "rpn.anchor_generator.cell_anchors.{level}"  # the authors' anchors of the first cell, checked, not kept

DETECTRON_RULES: Rules = (
    (r"conv1_w", "conv1.weight"),
    (r"res_conv1_bn_s", "bn1.weight"),
    (r"res_conv1_bn_b", "bn1.bias"),
    *(
        (rf"res{stage}_(\d+)_branch{branch}_{blob}", rf"layer{stage - 1}.\1.{ours}.{entry}")
        for stage in (2, 3, 4, 5)
        for branch, conv, norm in (
            ("2a", "conv1", "bn1"),
            ("2b", "conv2", "bn2"),
            ("2c", "conv3", "bn3"),
            ("1", "downsample.0", "downsample.1"),
        )
        for blob, ours, entry in (("w", conv, "weight"), ("bn_s", norm, "weight"), ("bn_b", norm, "bias"))
    ),
)
DETECTRON_DROPPED = r"(fc1000|pred)_[wb]|.*_momentum"  # the classifier and the optimiser's
DETECTRON_BIAS = r"(conv1|res[2-5]_\d+_branch(1|2[abc]))_b"  # of convolutions in front of batch norm: zeros


class HeadNames(NamedTuple):
    """What a method's heads are called in MMDetection's layout; `MMDET_RULES` hold for what these rules do not name."""

    rules: Rules = ()
    constants: Mapping[str, tuple[float, ...]] = {}  # entries that never change: checked where they are, not kept
    background: str = ""  # name of a layer beside which the class layer may have a last column, the background's


NO_NAMES = HeadNames()


class Layout(NamedTuple):
    """What names, shapes and the plain values beside them say about a checkpoint."""

    path: Path
    source: Literal["official", "mmdet"]
    backbone: BackboneName
    dcn_stages: tuple[int, ...]
    dcn_groups: int
    dcn_tower: bool
    channels: int
    num_classes: int  # columns of the class layer
    quality: str  # what the source calls the branch beside the boxes; empty without one
    meta: Mapping[Any, Any]  # what the file holds beside the weights
    class_layer: str = ""  # what the source calls the layer that predicts classes
    background: bool = False  # the last of the columns may be the background's
    names: frozenset[str] = frozenset()  # what the source calls its tensors

    @property
    def profile(self) -> ProfileName:
        """Whose implementation the weights were trained with, by their names."""
        return self.source

    @property
    def class_counts(self) -> tuple[int, ...]:
        """How many classes there may be, the likelier number first."""
        return (self.num_classes - 1, self.num_classes) if self.background else (self.num_classes,)

    @property
    def geometry(self) -> GeometryName:
        """The box convention that they were trained with."""
        return "legacy" if self.source == "official" else "modern"

    @property
    def mmdet_meta(self) -> Mapping[Any, Any]:
        """What MMDetection writes beside the weights: its configuration, classes and versions; empty elsewhere."""
        meta = self.meta.get("meta")
        return meta if isinstance(meta, Mapping) else {}

    @property
    def text(self) -> str:
        """Every text that MMDetection writes beside the weights; its configuration is one of them."""
        return "\n".join(value for value in self.mmdet_meta.values() if isinstance(value, str))

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The classes that MMDetection writes beside the weights, if it does."""
        dataset = self.mmdet_meta.get("dataset_meta")  # since 3.0
        places = [self.mmdet_meta, dataset] if isinstance(dataset, Mapping) else [self.mmdet_meta]
        for place in places:
            for key in ("CLASSES", "classes"):
                names = place.get(key)
                if isinstance(names, (tuple, list)) and names:
                    return tuple(str(name) for name in names)
        return None


def from_mmdet(key: str, rules: Rules = ()) -> str | None:
    """Our name of an entry of an MMDetection model, or None for what ours have not.

    Args:
        key: its name there.
        rules: of a method's own layers, looked at first; ATSS's and PAA's need none.
    """
    return rename(key, (*rules, *MMDET_RULES))


def from_official(key: str) -> str | None:
    """Our name of an entry of the authors' PAA or ATSS model, or None for what ours have not."""
    return rename(key, OFFICIAL_RULES)


def rename(key: str, rules: Rules) -> str | None:
    """Our name of a key by the first rule that fits the whole of it, or None."""
    for pattern, ours in rules:
        match = re.fullmatch(pattern, key)
        if match:
            return match.expand(ours)
    return None
