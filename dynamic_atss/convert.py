"""Make a released model of Dynamic ATSS or of a detector that it improves from a checkpoint.

    python -m dynamic_atss.convert ATSS_R_50_FPN_1x.pth atss.safetensors --detector atss    # ATSS's authors'
    python -m dynamic_atss.convert R_50.pth dynamic.safetensors --detector dynamic_atss     # Dynamic ATSS's authors'
    python -m dynamic_atss.convert gfocalv2_r50_1x.pth gflv2.safetensors                    # GFLV2's authors'
    python -m dynamic_atss.convert vfnet_r50_fpn_1x_coco.pth vfnet.safetensors              # MMDetection's
    python -m dynamic_atss.convert runs/dynamic_atss/quick/best.pt quick.safetensors        # our own

What comes out evaluates with no further option: python -m dynamic_atss.evaluate atss.safetensors --data data/coco
"""

import re
from dataclasses import replace
from functools import partial

from core import cli
from core.arguments import convert_parser
from core.errors import UserError
from core.layouts import HeadNames, Layout
from core.profiles import ProfileName
from dynamic_atss.config import PRESETS, Config

DETECTORS = ("dynamic_atss", "atss", "gfl", "gflv2", "vfnet")
PROFILES = ("mmdet", "official")
HOSTS = {"gfl_cls": "gfl", "vfnet_cls": "vfnet"}  # MMDetection's class layers whose name says the detector
NAMED = {"ATSSHead": "atss", "PAAHead": "paa"}  # in the configuration that MMDetection writes beside the weights
BACKBONES = (
    *("r50_1x", "r50_dcn_1x", "r101_2x_ms", "r101_dcn_2x_ms"),
    *("x101_64x4d_2x_ms", "x101_32x8d_dcn_2x_ms", "x101_64x4d_dcn_2x_ms"),
)
PUBLISHED = {  # presets of published runs, one for each backbone
    "dynamic_atss": BACKBONES,
    "atss": tuple(f"atss_{name}" for name in BACKBONES),
    "gfl": (),
    "gflv2": ("gflv2_r50_1x",),
    "vfnet": ("vfnet_r50_1x",),
}
SETTINGS = {  # of a detector where no preset has the checkpoint's backbone
    "dynamic_atss": Config(),
    "atss": PRESETS["atss_r50_1x"],
    "gfl": replace(PRESETS["gflv2_r50_1x"], host="gfl"),
    "gflv2": PRESETS["gflv2_r50_1x"],
    "vfnet": PRESETS["vfnet_r50_1x"],
}

HEAD_NAMES = HeadNames(
    rules=(
        (r"bbox_head\.(?:gfl|vfnet)_cls\.(weight|bias)", r"head.cls_logits.\1"),
        (r"bbox_head\.(?:gfl|vfnet)_reg\.(weight|bias)", r"head.bbox_pred.\1"),
        (r"bbox_head\.reg_conf\.([02])\.(weight|bias)", r"head.quality.\1.\2"),
        (r"bbox_head\.vfnet_reg_conv\.conv\.weight", "head.box_conv.0.weight"),
        (r"bbox_head\.vfnet_reg_conv\.gn\.(weight|bias)", r"head.box_conv.1.\1"),
        (r"bbox_head\.vfnet_reg_refine_dconv\.weight", "head.box_star.weight"),
        (r"bbox_head\.vfnet_reg_refine\.(weight|bias)", r"head.refine_pred.\1"),
        (r"bbox_head\.vfnet_cls_dconv\.weight", "head.cls_star.weight"),
        (r"bbox_head\.scales_refine\.(\d)\.scale", r"head.refine_scales.\1.scale"),
    ),
    constants={"bbox_head.integral.project": tuple(map(float, range(17)))},  # the bins 0 ... 16
    background="reg_conf",  # the authors of GFLV2 trained 81 columns (spec section 5.1)
)


def main() -> None:
    """Parse the command line, then convert; torch is imported only when there is something to do."""
    parser = convert_parser("dynamic_atss", DETECTORS)
    parser.add_argument(
        "--profile",
        choices=PROFILES,
        help="whose detections are to be reproduced, for GFL, GFLV2 and VFNet, whose authors built on MMDetection; "
        "default: official for GFLV2, which only they have, mmdet for the others",
    )
    arguments = parser.parse_args()
    from core.convert import convert
    from dynamic_atss.model import DynamicATSS

    chosen = partial(configure, profile=arguments.profile)
    convert(arguments, "dynamic_atss", Config, chosen, DynamicATSS, HEAD_NAMES)


def configure(layout: Layout, asked: str | None, profile: ProfileName | None = None) -> Config:
    """The configuration that fits a checkpoint of the authors or of MMDetection.

    What only training needs (schedule, learning rate) is the nearest preset's, not necessarily the checkpoint's own.

    Args:
        layout: what the checkpoint's names say.
        asked: the detector that the user names.
        profile: what the user wants where the names do not tell the authors' code from MMDetection's.

    Raises:
        UserError: when the file does not say which detector it holds, or says another one, or has another profile.
    """
    if re.search(r"style\W+caffe", layout.text):
        raise UserError(f"{layout.path}: MMDetection's Caffe-style backbones are not supported, only style pytorch")
    detector = choose_detector(layout, asked)
    return replace(
        nearest_preset(layout, detector),
        backbone=layout.backbone,
        dcn_stages=layout.dcn_stages,
        dcn_groups=layout.dcn_groups,
        dcn_tower=layout.dcn_tower,
        channels=layout.channels,
        profile=choose_profile(layout, detector, profile),
        geometry=layout.geometry,
    )


def choose_detector(layout: Layout, asked: str | None) -> str:
    """One of `DETECTORS`: what the file says, else what was asked for. UserError where it is none, or they differ.

    The authors of ATSS and of Dynamic ATSS call all layers alike, so there only the user can tell.
    """
    found = detectors_named(layout)
    if found == {"paa"}:
        raise UserError(f"{layout.path}: holds PAA; convert it with python -m paa.convert")
    possible = found - {"paa"} or {"atss", "dynamic_atss"}
    if asked and asked not in possible:
        raise UserError(f"{layout.path}: holds {' or '.join(sorted(possible))}, --detector says {asked}")
    if not asked and len(found) != 1:
        raise UserError(
            f"{layout.path}: does not say whether it holds ATSS or Dynamic ATSS; add --detector atss or dynamic_atss"
        )
    return asked or found.pop()


def detectors_named(layout: Layout) -> set[str]:
    """The detectors that names of layers, or the configuration inside a file of MMDetection, speak of."""
    if layout.class_layer in HOSTS:
        host = HOSTS[layout.class_layer]
        return {"gflv2" if host == "gfl" and layout.quality == "reg_conf" else host}
    if layout.quality == "iou_pred":
        return {"paa"}
    return {detector for name, detector in NAMED.items() if re.search(rf"\b{name}\b", layout.text)}


def choose_profile(layout: Layout, detector: str, asked: ProfileName | None) -> ProfileName:
    """`official` or `mmdet`. UserError where the names say the other one than was asked for.

    MMDetection has no GFLV2, so its checkpoints are the authors'; VFNet's are taken for MMDetection's.
    """
    if detector in ("atss", "dynamic_atss"):
        if asked not in (None, layout.profile):
            raise UserError(f"{layout.path}: has the names of profile {layout.profile}, --profile says {asked}")
        return layout.profile
    return asked or ("official" if detector == "gflv2" else "mmdet")


def nearest_preset(layout: Layout, detector: str) -> Config:
    """The published run of a detector with the checkpoint's backbone, else the detector's settings without a name."""
    network = (layout.backbone, layout.dcn_stages, layout.dcn_tower)
    for name in PUBLISHED[detector]:
        config = PRESETS[name]
        if (config.backbone, config.dcn_stages, config.dcn_tower) == network:
            return replace(config, preset=name)
    return SETTINGS[detector]


if __name__ == "__main__":
    cli.run(main)
