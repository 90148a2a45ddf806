"""Make a released model of TOOD from a checkpoint.

    python -m tood_tal.convert tood_r50_fpn_1x_coco.pth r50.safetensors         # MMDetection's or the authors'
    python -m tood_tal.convert anchor_based.pth r50.safetensors --anchors based # where the file does not say it
    python -m tood_tal.convert runs/tood_tal/quick/best.pt quick.safetensors    # our own

What comes out evaluates with no further option: python -m tood_tal.evaluate r50.safetensors --data data/coco
"""

import re
from dataclasses import replace
from functools import partial
from typing import Literal

from core import cli
from core.arguments import convert_parser
from core.errors import UserError
from core.layouts import HeadNames, Layout
from core.profiles import ProfileName
from tood_tal.config import PRESETS, Config

Anchors = Literal["free", "based"]

PUBLISHED = (  # presets of published runs
    *("r50_1x", "r50_anchor_based_1x", "r50_2x_ms", "r101_2x_ms", "r101_dcn_2x_ms"),
    *("x101_64x4d_2x_ms", "x101_64x4d_dcn_2x_ms"),
)
OWN_NAMES: dict[ProfileName, str] = {  # of layers that the authors and MMDetection call differently
    "official": r"bbox_head\.(\w+_decomp\.la_conv|cls_prob_conv|reg_offset_conv)\d\..*",
    "mmdet": r"bbox_head\.(\w+_decomp\.layer_attention|cls_prob_module|reg_offset_module)\..*",
}
_ENTRY = r"(weight|bias)"
HEAD_NAMES = HeadNames(  # spec section 6; the authors count layers from 1, MMDetection by their place in a sequence
    rules=(
        (r"bbox_head\.inter_convs\.([0-5])\.conv\.weight", r"head.interactive.\1.0.weight"),
        (rf"bbox_head\.inter_convs\.([0-5])\.conv\.conv_offset\.{_ENTRY}", r"head.interactive.\1.0.offset.\2"),
        (rf"bbox_head\.inter_convs\.([0-5])\.gn\.{_ENTRY}", r"head.interactive.\1.1.\2"),
        *(
            rule
            for theirs, ours in (("cls", "cls"), ("reg", "box"))
            for rule in (
                (rf"bbox_head\.{theirs}_decomp\.la_conv1\.{_ENTRY}", rf"head.{ours}_decomposition.attention.0.\1"),
                (rf"bbox_head\.{theirs}_decomp\.la_conv2\.{_ENTRY}", rf"head.{ours}_decomposition.attention.2.\1"),
                (
                    rf"bbox_head\.{theirs}_decomp\.layer_attention\.([02])\.{_ENTRY}",
                    rf"head.{ours}_decomposition.attention.\1.\2",
                ),
                (
                    rf"bbox_head\.{theirs}_decomp\.reduction_conv\.conv\.weight",
                    f"head.{ours}_decomposition.reduction.weight",
                ),
                (rf"bbox_head\.{theirs}_decomp\.reduction_conv\.gn\.{_ENTRY}", rf"head.{ours}_decomposition.norm.\1"),
            )
        ),
        (rf"bbox_head\.tood_cls\.{_ENTRY}", r"head.cls_logits.\1"),
        (rf"bbox_head\.tood_reg\.{_ENTRY}", r"head.bbox_pred.\1"),
        *(
            rule
            for theirs, ours in (("cls_prob", "probability"), ("reg_offset", "offset"))
            for rule in (
                (rf"bbox_head\.{theirs}_conv1\.{_ENTRY}", rf"head.alignment.{ours}.0.\1"),
                (rf"bbox_head\.{theirs}_conv2\.{_ENTRY}", rf"head.alignment.{ours}.2.\1"),
                (rf"bbox_head\.{theirs}_module\.([02])\.{_ENTRY}", rf"head.alignment.{ours}.\1.\2"),
            )
        ),
        (r"bbox_head\.scales\.(\d)\.scale", r"head.decoder.scales.\1.scale"),
    )
)


def main() -> None:
    """Parse the command line, then convert; torch is imported only when there is something to do."""
    parser = convert_parser("tood_tal")
    parser.add_argument(
        "--anchors",
        choices=("free", "based"),
        help="boxes as distances from points, or as deltas from anchors: the weights have the same names and shapes; "
        "default: what the configuration inside the file says, free where there is none",
    )
    arguments = parser.parse_args()
    from core.convert import convert
    from tood_tal.model import TOOD

    convert(arguments, "tood_tal", Config, partial(configure, anchors=arguments.anchors), TOOD, HEAD_NAMES)


def configure(layout: Layout, _: str | None = None, *, anchors: Anchors | None = None) -> Config:
    """The configuration that fits a checkpoint of the authors or of MMDetection.

    What only training needs (schedule, learning rate) is the nearest preset's, not necessarily the checkpoint's own.

    Args:
        layout: what the checkpoint's names say.
        _: the detector that the user names, of methods whose command converts several.
        anchors: what the user says about the boxes.

    Raises:
        UserError: when the file holds another detector, or other boxes than the user says.
    """
    if layout.class_layer != "tood_cls":
        raise UserError(f"{layout.path}: holds no TOOD; its layer of classes is {layout.class_layer}, not tood_cls")
    if re.search(r"style\W+caffe", layout.text):
        raise UserError(f"{layout.path}: MMDetection's Caffe-style backbones are not supported, only style pytorch")
    return replace(
        nearest_preset(layout, choose_anchors(layout, anchors) == "based"),
        backbone=layout.backbone,
        dcn_stages=layout.dcn_stages,
        dcn_groups=layout.dcn_groups,
        dcn_tower=layout.dcn_tower,
        channels=layout.channels,
        profile=choose_profile(layout),
    )


def choose_profile(layout: Layout) -> ProfileName:
    """`official` or `mmdet`, by what the layers are called. UserError for a file with names of both, or of neither."""
    found = [profile for profile, names in OWN_NAMES.items() if any(re.fullmatch(names, key) for key in layout.names)]
    if len(found) != 1:
        told = "both the authors' and MMDetection's" if found else "neither the authors' nor MMDetection's"
        raise UserError(f"{layout.path}: {told} names in TOOD's head; expected cls_prob_conv1 or cls_prob_module, ...")
    return found[0]


def choose_anchors(layout: Layout, asked: Anchors | None) -> Anchors:
    """How the boxes are written: what the configuration inside the file says, else what was asked for, else `free`.

    Raises:
        UserError: when the two differ.
    """
    found = set(re.findall(r"anchor_type\W+anchor_(free|based)\b", layout.text))
    if asked and found and asked not in found:
        raise UserError(f"{layout.path}: its configuration says anchor_{found.pop()}, --anchors says {asked}")
    if asked is None and len(found) > 1:
        raise UserError(f"{layout.path}: its configuration says anchor_free and anchor_based; add --anchors")
    return asked or ("based" if found == {"based"} else "free")


def nearest_preset(layout: Layout, anchor_based: bool) -> Config:
    """The published run with the checkpoint's network; of several the one of its length, else the first."""
    network = (layout.backbone, layout.dcn_stages, layout.dcn_tower, anchor_based)
    fitting = [
        replace(config, preset=name)
        for name, config in PRESETS.items()
        if name in PUBLISHED and (config.backbone, config.dcn_stages, config.dcn_tower, config.anchor_based) == network
    ]
    same_length = [config for config in fitting if config.epochs == layout.mmdet_meta.get("epoch")]
    return (same_length or fitting or [Config(anchor_based=anchor_based)])[0]


if __name__ == "__main__":
    cli.run(main)
