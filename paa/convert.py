"""Make a released model of PAA or ATSS from a checkpoint.

    python -m paa.convert PAA_R_50_FPN_1x.pth r50.safetensors         # the authors'
    python -m paa.convert paa_r50_fpn_1x_coco.pth r50.safetensors     # MMDetection's
    python -m paa.convert runs/paa/quick/best.pt quick.safetensors    # our own

What comes out evaluates with no further option: python -m paa.evaluate r50.safetensors --data data/coco
"""

import re
from dataclasses import replace

from core import cli
from core.arguments import convert_parser
from core.errors import UserError
from core.layouts import Layout
from paa.config import PRESETS, Config

DETECTORS = ("paa", "atss")
ATSS = "atss_centerness"  # the preset of plain ATSS
BRANCHES = {"iou_pred": "paa", "centerness": "atss"}  # the authors' name of what stands beside the boxes
PUBLISHED = (  # presets whose weights the authors have published
    *("r50_1p5x", "r50_1x", "r101_2x_ms", "x101_64x4d_2x_ms", "r101_dcn_2x_ms", "x101_64x4d_dcn_2x_ms"),
    *("x101_32x8d_dcn_2x_ms", "x152_32x8d_dcn_2x_ms"),
)


def main() -> None:
    """Parse the command line, then convert; torch is imported only when there is something to do."""
    arguments = convert_parser("paa", DETECTORS).parse_args()
    from core.convert import convert
    from paa.model import PAA

    convert(arguments, "paa", Config, configure, PAA)


def configure(layout: Layout, asked: str | None) -> Config:
    """The configuration that fits a checkpoint of the authors or of MMDetection.

    What only training needs (schedule, learning rate) is the nearest preset's, not necessarily the checkpoint's own.

    Raises:
        UserError: when the file does not say which detector it holds, or says another one.
    """
    if re.search(r"style\W+caffe", layout.text):
        raise UserError(f"{layout.path}: MMDetection's Caffe-style backbones are not supported, only style pytorch")
    detector = choose_detector(layout, asked)
    base = replace(PRESETS[ATSS], preset=ATSS) if detector == "atss" else nearest_preset(layout)
    return replace(
        base,
        backbone=layout.backbone,
        dcn_stages=layout.dcn_stages,
        dcn_groups=layout.dcn_groups,
        dcn_tower=layout.dcn_tower,
        channels=layout.channels,
        profile=layout.profile,
        geometry=layout.geometry,
    )


def choose_detector(layout: Layout, asked: str | None) -> str:
    """`paa` or `atss`: what the file says, else what was asked for. UserError where it is neither, or they differ.

    MMDetection gives both the same names, so there only the configuration inside the file tells.
    """
    found = {name.lower() for name in re.findall(r"\b(PAA|ATSS)Head\b", layout.text)}
    found |= {BRANCHES[layout.quality]} if layout.quality in BRANCHES else set()
    if asked and found and asked not in found:
        raise UserError(f"{layout.path}: holds {' and '.join(sorted(found))}, --detector says {asked}")
    if not asked and len(found) != 1:
        raise UserError(f"{layout.path}: does not say whether it holds PAA or ATSS; add --detector paa or atss")
    return asked or found.pop()


def nearest_preset(layout: Layout) -> Config:
    """The published run with the checkpoint's backbone; of several the one of its length, else the first."""
    network = (layout.backbone, layout.dcn_stages, layout.dcn_tower)
    fitting = [
        replace(config, preset=name)
        for name, config in PRESETS.items()
        if name in PUBLISHED and (config.backbone, config.dcn_stages, config.dcn_tower) == network
    ]
    same_length = [config for config in fitting if config.steps == layout.meta.get("iteration")]
    return (same_length or fitting or [Config()])[0]


if __name__ == "__main__":
    cli.run(main)
