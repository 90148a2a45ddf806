"""Write the tables of the READMEs from `benchmarks/results/*.json`.

    python -m benchmarks.tables            # rewrites what stands between the markers
    python -m benchmarks.tables --check    # changes nothing; exit code 1 where a table is out of date

A table stands between the lines `<!-- table: NAME -->` and `<!-- end -->`; NAME is a key of `TABLES`.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import nn

from core import cli
from core.complexity import Complexity, model_complexity
from core.config import PyramidConfig, TrainConfig
from core.errors import UserError, nearest
from dynamic_atss.config import PRESETS as DYNAMIC_PRESETS
from dynamic_atss.config import Config as DynamicConfig
from dynamic_atss.model import DynamicATSS
from paa.config import PRESETS as PAA_PRESETS
from paa.config import Config as PAAConfig
from paa.model import PAA
from padet.config import PRESETS as PADET_PRESETS
from padet.config import Config as PADetConfig
from padet.model import PADet
from tood_tal.config import PRESETS as TOOD_PRESETS
from tood_tal.config import Config as TOODConfig
from tood_tal.model import TOOD

Pyramid = TypeVar("Pyramid", bound=PyramidConfig)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    "README.md",
    "core/README.md",
    "paa/README.md",
    "dynamic_atss/README.md",
    "tood_tal/README.md",
    "padet/README.md",
)
MARKED = re.compile(r"(?P<head><!-- table: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<tail><!-- end -->)", re.DOTALL)
NOT_MEASURED = "not measured"


def read_result(path: Path) -> dict[str, Any] | None:
    """A result file, or None where it does not exist: nothing was measured."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table ending in a newline; the first column is aligned left, the others right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *rows))


def percent(summary: dict[str, Any], metric: str) -> str:
    """`40.7 ± 1.2`: mean and sample standard deviation over seeds in percent; one seed has no deviation."""
    mean, deviation = summary["mean"][metric], summary["std"][metric]
    return f"{100 * mean:.1f}" if deviation is None else f"{100 * mean:.1f} ± {100 * deviation:.1f}"


def detector_row(results: Path, file: str, key: str, label: str) -> list[str]:
    """A detector's cells: training, AP, AP50, AP75, seeds; `not measured` without its file."""
    result = read_result(results / file)
    if result is None or key not in result["detectors"]:
        return [label, *[NOT_MEASURED] * 5]
    measured = result["detectors"][key]
    return [
        label,
        measured["training"],
        *(percent(measured, metric) for metric in ("AP", "AP50", "AP75")),
        str(len(measured["runs"])),
    ]


def detector_table(results: Path, rows: Sequence[tuple[str, str, str]]) -> str:
    """One row for each (result file, detector in it, label)."""
    header = ["detector", "training", "AP", "AP50", "AP75", "seeds"]
    return markdown(header, [detector_row(results, *row) for row in rows])


def bccd_table(results: Path) -> str:
    """PAA and its peer on blood cells, and the licence note of the weights both start from."""
    rows = [
        ("bccd_peer.json", "fcos", "FCOS, torchvision, ResNet-18"),
        ("bccd_peer.json", "paa", "PAA, ResNet-18, equal budget"),
        ("bccd_paa.json", "paa", "PAA, ResNet-18, larger images"),
    ]
    notes = {result["licence_note"]: None for file, *_ in rows if (result := read_result(results / file))}
    return "\n".join([detector_table(results, rows), *(f"{note}\n" for note in notes)])


def quick_table(results: Path) -> str:
    """The README's first command on held-out drawings."""
    return detector_table(results, [("quick.json", "paa", "PAA, preset `quick`")])


def coco_table(results: Path) -> str:
    """Real images learnt by heart."""
    rows = [("coco_memorise.json", "paa", "PAA, ResNet-18, 16 COCO images, tested on the same")]
    result = read_result(results / rows[0][0])
    note = f"\n{result['licence_note']}\n" if result else ""
    return detector_table(results, rows) + note


STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # two-sided, 1, 2 ... 10 degrees
ABLATION_ROWS = (
    ("paa", "PAA: scheme (c), IoU prediction, score voting"),
    ("no_voting", "without score voting"),
    ("no_quality", "without IoU prediction"),
    ("centerness", "centre-ness instead of IoU prediction"),
    ("scheme_a", "scheme (a)"),
    ("scheme_b", "scheme (b)"),
    ("scheme_d", "scheme (d)"),
    ("fixed_number", "fixed number of positives, 10"),
    ("score_range", "fixed score range, above 0.1"),
)


DYNAMIC_ROWS = (
    ("atss", "ATSS: focal loss, centre-ness"),
    ("combined", "Combined IoUs"),
    ("combined_qfl", "Combined IoUs, quality focal loss"),
    ("combined_qfl_iou", "Combined IoUs, quality focal loss, IoU branch: the default"),
    ("predicted_only", "predicted IoUs only"),
    ("up_down", "predicted IoUs weighted by D_up, anchor IoUs by D_down"),
)
PADET_ROWS = (
    ("baseline", "baseline: neither APM nor FAM"),
    ("apm_c", "APM scores"),
    ("apm_r", "APM boxes"),
    ("fa", "FAM alone, offsets from features"),
    ("apm", "APM scores and boxes, no FAM"),
    ("implicit", "APM, FAM with offsets from features"),
    ("explicit_l", "APM, FAM with offsets from locations"),
    ("explicit_s", "APM, FAM with offsets from shapes"),
    ("explicit_ls", "APM, FAM with offsets from both together"),
    ("all", "APM, FAM with offsets from both apart: the default"),
)


class Table6(NamedTuple):
    """A row of TOOD's paper: AP in points of COCO's val2017, then the alignment analysis of its Table 6."""

    ap: float
    ap50: float
    ap75: float
    rank_correlation: float
    top_iou: float
    correct: int
    redundant: int
    error: int


TOOD_ROWS = (  # AP of Tables 1 to 3, anchor-free
    ("parallel_atss", "parallel head, ATSS", Table6(39.2, 57.4, 42.2, 0.408, 0.637, 30261, 25428, 92677)),
    ("t_head_atss", "T-Head, ATSS", Table6(41.1, 58.4, 44.5, 0.440, 0.644, 30601, 21838, 79189)),
    ("parallel_tal", "parallel head, TAL", Table6(40.3, 58.5, 43.8, 0.415, 0.643, 30506, 15927, 72320)),
    ("t_head_tal", "T-Head, TAL", Table6(42.5, 59.8, 46.4, 0.452, 0.661, 30734, 15242, 69013)),
)
TOOD_NOTE = (
    "Rank correlation and IoU are those before NMS, boxes are counted after it, the paper's on COCO's 5,000 images of "
    "val2017; which predictions belong to an object is a choice of ours (`tood_tal/analysis.py`), because the paper "
    "does not say."
)


def ablation_table(results: Path) -> str:
    """Rows of PAA's paper at a budget of minutes."""
    return beside_first(results, "bccd_ablations.json", ABLATION_ROWS)


def dynamic_table(results: Path) -> str:
    """Rows of Dynamic ATSS's paper at a budget of minutes."""
    return beside_first(results, "dynamic_bccd.json", DYNAMIC_ROWS)


def tood_table(results: Path) -> str:
    """TOOD's Table 6 at a budget of minutes, above the paper's own numbers."""
    header = ["row", "AP", "AP50", "AP75", "rank correlation", "IoU of the top 10", "correct", "redundant", "error"]
    result = read_result(results / "tood_bccd.json")
    base, _, first = TOOD_ROWS[0]
    rows = [[label, *alignment_cells(result, key), difference(result, key, base)] for key, label, _ in TOOD_ROWS]
    for key, label, paper in TOOD_ROWS:
        gap = "" if key == base else f"{paper.ap - first.ap:+.1f}"
        points, means = (f"{value:.1f}" for value in paper[:3]), (f"{value:.3f}" for value in paper[3:5])
        rows.append([f"{label}, the paper", *points, *means, *(f"{count:,}" for count in paper[5:]), "-", gap])
    table = markdown([*header, "seeds", "AP beside the first row"], rows)
    return table + (f"{training_note(result, base)}\n{TOOD_NOTE}\n" if result else "")


def alignment_cells(result: dict[str, Any] | None, key: str) -> list[str]:
    """A detector's AP, AP50, AP75, alignment analysis and number of seeds; `not measured` where it was not run."""
    if result is None or key not in result["detectors"]:
        return [NOT_MEASURED] * 9
    measured = result["detectors"][key]
    return [
        *(percent(measured, metric) for metric in ("AP", "AP50", "AP75")),
        *(spread(measured, name, ".3f") for name in ("rank_correlation", "top_iou")),
        *(spread(measured, name, ",.0f") for name in ("correct", "redundant", "error")),
        str(len(measured["runs"])),
    ]


def spread(summary: dict[str, Any], name: str, form: str) -> str:
    """`0.41 ± 0.02`: mean and sample standard deviation over seeds, `none` where a seed has no such number."""
    mean, deviation = summary["mean"][name], summary["std"][name]
    if mean is None:
        return "none"
    return f"{mean:{form}}" if deviation is None else f"{mean:{form}} ± {deviation:{form}}"


def padet_table(results: Path) -> str:
    """Rows of Tables 2 and 1 of PADet's paper at a budget of minutes, with what detection learned from."""
    columns = {"VOC07": lambda measured: percent(measured, "VOC07"), "positives : negatives": balance}
    return beside_first(results, "padet_bccd.json", PADET_ROWS, columns)


PADET_COCO = "160 images of COCO, augmented, VGG-16 at 384"
BALANCES = {"initial": 625.0, "APM_C": 66.0, "APM_R": 105.0, "APM_CR": 9.7}  # Fig. 1: negatives to a positive
COCO_OBJECTS = 7.3  # of an image of COCO train2017 that has any


def padet_trained_table(results: Path) -> str:
    """PADet and its baseline, trained three times as long as the rows of its ablation."""
    rows = [
        ("padet_bccd.json", "baseline", "baseline: neither APM nor FAM"),
        ("padet_bccd.json", "all", "PADet"),
        ("padet_trained.json", "baseline", "baseline, three times as long"),
        ("padet_trained.json", "padet", "PADet, three times as long"),
        ("padet_memorise.json", "padet", "PADet, 8 images by heart, tested on the same"),
    ]
    return detector_table(results, rows)


def padet_balance_table(results: Path) -> str:
    """Fig. 1 of PADet's paper: negatives to a positive, by what has been promoted."""
    rows = [["the paper, COCO", *(f"1 : {ratio:g}" for ratio in BALANCES.values())]]
    coco, cells = read_result(results / "padet_initial.json"), read_result(results / "padet_trained.json")
    initial, scaled = NOT_MEASURED, NOT_MEASURED
    if coco:
        mean = coco["detectors"]["initial"]["mean"]
        ratio = mean["settings.initial.negatives_per_positive"]
        initial, scaled = f"1 : {ratio:.0f}", f"1 : {ratio * mean['boxes'] / COCO_OBJECTS:.0f}"
    rows += [[PADET_COCO, initial, *[""] * 3], [f"the same at {COCO_OBJECTS} objects an image", scaled, *[""] * 3]]
    measured = [NOT_MEASURED] * 4
    if cells:
        mean = cells["detectors"]["padet"]["mean"]
        measured = [f"1 : {mean[f'settings.{name}.negatives_per_positive']:.1f}" for name in BALANCES]
    rows.append(["blood cells, the trained model above", *measured])
    return markdown(["images", "initial anchors", "APM scores", "APM boxes", "both"], rows)


def balance(measured: dict[str, Any]) -> str:
    """`1 : 9.7`: negatives for each positive that a detector learned from late in training."""
    return f"1 : {measured['mean']['negatives'] / measured['mean']['positives']:.1f}"


def beside_first(
    results: Path,
    file: str,
    names: Sequence[tuple[str, str]],
    columns: Mapping[str, Callable[[dict[str, Any]], str]] | None = None,
) -> str:
    """Each row's AP beside the first one's, then training and licence of all.

    Args:
        results: folder of the result file.
        file: its name.
        names: (detector, label) of every row.
        columns: further cells of a measured detector by their heading.
    """
    columns = columns or {}
    result = read_result(results / file)
    base = names[0][0]
    rows = []
    for key, label in names:
        _, _, *cells, seeds = detector_row(results, file, key, label)
        measured = result["detectors"].get(key) if result else None
        further = [cell(measured) if measured else NOT_MEASURED for cell in columns.values()]
        rows.append([label, *cells, *further, seeds, difference(result, key, base)])
    table = markdown(["row", "AP", "AP50", "AP75", *columns, "seeds", "AP beside the first row"], rows)
    return table + (training_note(result, base) if result else "")


def training_note(result: dict[str, Any], key: str) -> str:
    """What all rows of an ablation have in common; `key` is a detector that was run."""
    training = result["detectors"][key]["training"]
    return f"\nEach: {training}, preset `small` otherwise. {result['licence_note']}\n"


def difference(result: dict[str, Any] | None, key: str, base: str) -> str:
    """How far a detector's mean AP lies from another's, and whether 95 % confidence tells them apart.

    The standard error of the difference of two means over n and m seeds is sqrt(s^2 / n + t^2 / m); it counts as many
    times as Student's distribution with n + m - 2 degrees of freedom says.
    """
    if result is None or key not in result["detectors"] or base not in result["detectors"] or key == base:
        return "" if key == base else NOT_MEASURED
    ours, theirs = (result["detectors"][name] for name in (key, base))
    gap = 100 * (ours["mean"]["AP"] - theirs["mean"]["AP"])
    if ours["std"]["AP"] is None or theirs["std"]["AP"] is None:
        return f"{gap:+.1f}, one seed"
    error = 100 * math.hypot(*(part["std"]["AP"] / math.sqrt(len(part["runs"])) for part in (ours, theirs)))
    freedom = len(ours["runs"]) + len(theirs["runs"]) - 2
    times = STUDENT_95[min(freedom, len(STUDENT_95)) - 1]
    return f"{gap:+.1f}" if abs(gap) >= times * error else f"{gap:+.1f}, not separable"


RECIPE_HEADER = ("backbone", "deformable", "steps of images", "short side", "learning rate")
SIZE_HEADER = ("parameters", "trained", "GFLOPs")


def presets_table(results: Path) -> str:
    """Every named run of PAA with the size of its model; the numbers are counted, not measured."""

    def head(config: PAAConfig) -> Hashable:
        return config.quality == "none"

    rows = [
        [f"`{name}`", *preset_cells(PAA_PRESETS[name]), *size_cells(size)]
        for name, size in sizes_of(PAA_PRESETS, PAA, head).items()
    ]
    return markdown(["preset", *RECIPE_HEADER, *SIZE_HEADER], rows)


def dynamic_presets_table(results: Path) -> str:
    """Every named run of Dynamic ATSS and its hosts with the size of its model."""

    def head(config: DynamicConfig) -> Hashable:
        return config.host

    rows = []
    for name, size in sizes_of(DYNAMIC_PRESETS, DynamicATSS, head).items():
        config = DYNAMIC_PRESETS[name]
        rows.append([f"`{name}`", *method_cells(config), *preset_cells(config), *size_cells(size)])
    return markdown(["preset", "host", "assignment by", "class loss, branch", *RECIPE_HEADER, *SIZE_HEADER], rows)


def padet_presets_table(results: Path) -> str:
    """Every named run of PADet with the size of its model."""
    counted: dict[Hashable, Complexity] = {}
    rows = []
    for name, config in PADET_PRESETS.items():
        body = (config.backbone, config.norm, config.channels, config.size, config.block_norm)
        key = (*body, config.apm_score, config.apm_box, config.fam)
        if key not in counted:
            counted[key] = model_complexity(config, PADet)
        rows.append([f"`{name}`", *padet_cells(config), *size_cells(counted[key])])
    parts = ("APM", "offsets from", "backbone", "size", "anchors", "run", "learning rate")
    return markdown(["preset", *parts, *SIZE_HEADER], rows)


def padet_cells(config: PADetConfig) -> list[str]:
    """What APM predicts, what the offsets of FAM come from, then backbone and recipe."""
    apm = [part for part, there in (("scores", config.apm_score), ("boxes", config.apm_box)) if there]
    return [
        " and ".join(apm) or "-",
        config.fam if config.fam != "none" else "-",
        config.backbone,
        str(config.size),
        config.anchors,
        run_length(config),
        f"{config.learning_rate:g}",
    ]


def method_cells(config: DynamicConfig) -> list[str]:
    """Host, what its assignment compares (A: anchor's IoU, P: predicted IoU), and the ATSS host's losses."""
    terms = (
        (config.pred_weight, "D_up " * (config.pred_schedule == "up"), "P"),
        (config.anchor_weight, "D_down " * (config.anchor_schedule == "down"), "A"),
    )
    compared = " + ".join(
        f"{'' if weight == 1 else f'{weight:g} '}{schedule}{iou}" for weight, schedule, iou in terms if weight
    )
    losses = f"{config.class_loss}, {config.quality}" if config.host == "atss" else "-"
    return [config.host, compared, losses]


def tood_presets_table(results: Path) -> str:
    """Every named run of TOOD with the size of its model."""

    def head(config: TOODConfig) -> Hashable:
        return config.head, config.quality, config.anchor_based

    rows = []
    for name, size in sizes_of(TOOD_PRESETS, TOOD, head).items():
        config = TOOD_PRESETS[name]
        rows.append([f"`{name}`", *alignment_method_cells(config), *preset_cells(config), *size_cells(size)])
    return markdown(["preset", "head", "boxes", "assignment", *RECIPE_HEADER, *SIZE_HEADER], rows)


def alignment_method_cells(config: TOODConfig) -> list[str]:
    """Head, what boxes are relative to, and what assigns: TAL with its alpha, beta and m, after some epochs of ATSS."""
    heads = {"t_head": "T-Head", "parallel": "parallel", "parallel_tap": "parallel + TAP"}
    boxes = "anchors" if config.anchor_based else "points"
    tal = f"TAL {config.alpha:g}, {config.beta:g}, {config.topk}" + ", min_area" * (config.conflict == "min_area")
    share = config.atss_share
    length = plural(round(config.epochs * share), "epoch") if config.epochs else f"{100 * share:.0f} %"
    start = f"ATSS {length}, " if share else ""
    return [heads[config.head], boxes, "ATSS" if share == 1 else start + tal]


def sizes_of(
    presets: Mapping[str, Pyramid],
    model: Callable[[Pyramid, int], nn.Module],
    head: Callable[[Pyramid], Hashable],
) -> dict[str, Complexity]:
    """The size of each preset's model; those of equal architecture are counted once.

    Args:
        presets: of a method.
        model: its network.
        head: what else than backbone and width makes its networks differ.
    """
    counted: dict[Hashable, Complexity] = {}
    sizes = {}
    for name, config in presets.items():
        body = (config.backbone, config.norm, config.frozen_stages, config.channels, config.dcn_stages)
        key = (*body, config.dcn_tower, config.short_side, config.long_side, head(config))
        if key not in counted:
            counted[key] = model_complexity(config, model)
        sizes[name] = counted[key]
    return sizes


def preset_cells(config: PyramidConfig) -> list[str]:
    """Backbone and recipe of a preset."""
    stages = "".join(f"C{stage} " for stage in config.dcn_stages) + ("towers" if config.dcn_tower else "")
    side = f"{config.short_side_min}-{config.short_side}" if config.short_side_min else str(config.short_side)
    return [
        config.backbone,
        stages or "-",
        run_length(config),
        side,
        f"{config.learning_rate:g}",
    ]


def run_length(config: TrainConfig) -> str:
    """`90,000 of 16`: steps, or `12 epochs of 16`, and images of a step."""
    length = f"{config.epochs:g} epochs" if config.steps is None else f"{config.steps:,}"
    return f"{length} of {config.batch_size}"


def size_cells(size: Complexity) -> list[str]:
    """Parameters, those trained, and GFLOPs of one image."""
    return [f"{size.parameters:,}", f"{size.trainable:,}", f"{size.multiply_adds / 1e9:.1f}"]


def speed_table(results: Path) -> str:
    """What `benchmarks.speed` measured: comparisons, then memory, then shares of a training step."""
    result = read_result(results / "speed.json")
    if result is None:
        return f"{NOT_MEASURED}\n"
    times = [speed_cells(row) for row in result["rows"] if "ratio" in row]
    peaks = [memory_cells(row) for row in result["rows"] if "peak_mb" in row]
    shares = [share_cells(row) for row in result["rows"] if "share" in row]
    tables = [
        markdown(["what", "compared with", "its ms", "our ms", "times faster", "wanted"], times) if times else "",
        markdown(["what", "MB at most", "wanted"], peaks) if peaks else "",
        markdown(["what", "its ms", "the step's ms", "% of the step", "wanted"], shares) if shares else "",
        f"{result['device']}, {plural(result['threads'], 'thread')} where a row does not say otherwise.\n",
    ]
    return "\n".join(table for table in tables if table)


def speed_cells(row: dict[str, Any]) -> list[str]:
    """What was done, what it was compared with, both milliseconds, the ratio and the ratio wanted."""
    times = [_number(row["reference_ms"]), _number(row["ours_ms"])]
    ratio = f"{row['ratio']:.1f}" if row["ratio"] >= 1 else f"{row['ratio']:.2f}"
    return [row["what"], row["reference"], *times, ratio, f"≥ {row['target']:g}"]


def memory_cells(row: dict[str, Any]) -> list[str]:
    """What was done, the megabytes it took at most and those allowed."""
    return [row["what"], _number(row["peak_mb"]), f"≤ {row['limit_mb']:g}"]


def share_cells(row: dict[str, Any]) -> list[str]:
    """What a part adds, both milliseconds, the percentage and the most wanted."""
    return [
        row["what"],
        _number(row["added_ms"]),
        _number(row["step_ms"]),
        f"{row['share']:.2f}",
        f"≤ {row['limit']:g}",
    ]


def reliability_table(results: Path) -> str:
    """What `benchmarks.reliability` found, and on which machine."""
    result = read_result(results / "reliability.json")
    if result is None:
        return f"{NOT_MEASURED}\n"
    parts = result["parts"].values()
    cells = [[row["what"], row["measured"], row["wanted"]] for part in parts for row in part["rows"]]
    devices = sorted({f"{part['origin']['device']}, {plural(part['origin']['cpus'], 'core')}" for part in parts})
    return f"{markdown(['what', 'measured', 'wanted'], cells)}\n{'; '.join(devices)}. {result['licence_note']}\n"


def fuzz_table(results: Path) -> str:
    """What reading hostile files did."""
    result = read_result(results / "fuzz.json")
    if result is None:
        return f"{NOT_MEASURED}\n"
    header = ["hostile files", "files", "refused in one line", "read", "faults"]
    rows = [
        [
            kind,
            f"{one['files']:,}",
            f"{one['refused']:,}",
            f"{one['files'] - one['refused']:,}",
            str(len(one["faults"])),
        ]
        for kind, one in result["kinds"].items()
    ]
    flips = [
        [kind, *(f"{100 * one[reader] / one['flips']:.0f} %" for reader in ("ours", "pillow"))]
        for kind, one in result["noticed_flips"].items()
    ]
    noticed = markdown(["one changed bit in the second half of", "noticed here", "by Pillow"], flips)
    return f"{markdown(header, rows)}\n{noticed}"


def scale_table(results: Path) -> str:
    """Opening and sampling a very large training set."""
    result = read_result(results / "scale.json")
    if result is None:
        return f"{NOT_MEASURED}\n"
    plan, workers, parsed = result["plan"], result["workers"], result["json"]
    rows = [
        ["table on the disk", f"{result['table_megabytes']:,.0f} MB"],
        ["open it from the cache, all of it verified", f"{result['open']['open_s']:.1f} s"],
        ["memory of its own that opening takes", f"{result['open']['private_megabytes']:.0f} MB"],
        ["choose the training images, make the sampler", f"{plan['sampler_s']:.1f} s"],
        ["plan the first batch: shuffle the epoch", f"{plan['first_batch_s']:.1f} s"],
        ["plan further batches", f"{plan['batches_per_second']:,.0f} a second"],
        *(
            [f"a worker ({way}): ready after, then memory of its own", f"{one['ready_s']:.1f} s, {growth(one)}"]
            for way, one in workers.items()
        ),
        [
            f"parse JSON of {parsed['images']:,} images, {parsed['boxes']:,} boxes, {parsed['file_megabytes']:,.0f} MB",
            f"{parsed['first_open_s']:.1f} s, {parsed['peak_megabytes']:,.0f} MB at most",
        ],
    ]
    return markdown([f"{result['images']:,} images, {result['boxes']:,} boxes", "measured"], rows)


def growth(worker: dict[str, float]) -> str:
    """`35 MB`: what a worker holds for itself."""
    return f"{worker['private_megabytes']:.0f} MB"


def plural(count: int, noun: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def elastic_table(results: Path) -> str:
    """What `benchmarks.elastic` saw, a row for each method."""
    result = read_result(results / "elastic.json")
    if result is None:
        return f"{NOT_MEASURED}\n"
    found = result["results"]
    methods = [method for method in PACKAGES if any(method in found.get(check, {}) for check in ELASTIC_CELLS)]
    rows = [
        [
            method,
            *(
                cell(found[check][method]) if method in found.get(check, {}) else NOT_MEASURED
                for check, cell in ELASTIC_CELLS.items()
            ),
        ]
        for method in methods
    ]
    header = ["method", "ranks killed; weights; seconds to the next step", "two nodes, one rank killed; weights"]
    header += ["1, 2, 1 ranks: weights differ by", "second rank without objects"]
    machine = (
        f"{result['device']}, {plural(result['cpus'], 'core')}, shared with other work, so seconds are upper limits."
    )
    return f"{markdown(header, rows)}\n{machine}\n"


def killed_cell(found: dict[str, Any]) -> str:
    """How many were killed, whether the end was the same, median and longest recovery."""
    seconds = [kill["recovery_seconds"] for kill in found["kills"]]
    return f"{len(seconds)}; {same(found)}; {statistics.median(seconds):.0f} (at most {max(seconds):.0f})"


def resized_cell(found: dict[str, Any]) -> str:
    """The largest difference of a weight."""
    return f"{found['weights_differ']:.1e}"


def empty_cell(found: dict[str, Any]) -> str:
    """How far the run came."""
    return f"{found['steps']} steps, losses {'finite' if found['finite'] else 'NOT FINITE'}"


def same(found: dict[str, Any]) -> str:
    """Whether a run ended with the bits of the undisturbed one."""
    return "equal" if found["equal"] else "DIFFERENT"


PACKAGES = ("paa", "dynamic_atss", "tood_tal", "padet")
ELASTIC_CELLS: dict[str, Callable[[dict[str, Any]], str]] = {
    "killed": killed_cell,
    "nodes": same,
    "resized": resized_cell,
    "empty": empty_cell,
}

TABLES: dict[str, Callable[[Path], str]] = {
    "ablations": ablation_table,
    "bccd": bccd_table,
    "coco": coco_table,
    "dynamic-bccd": dynamic_table,
    "dynamic-presets": dynamic_presets_table,
    "elastic": elastic_table,
    "padet-balance": padet_balance_table,
    "padet-bccd": padet_table,
    "fuzz": fuzz_table,
    "padet-presets": padet_presets_table,
    "padet-trained": padet_trained_table,
    "presets": presets_table,
    "quick": quick_table,
    "reliability": reliability_table,
    "scale": scale_table,
    "speed": speed_table,
    "tood-bccd": tood_table,
    "tood-presets": tood_presets_table,
}


def filled(text: str, results: Path) -> str:
    """A page with all its tables written anew.

    Raises:
        UserError: if a marker names no table.
    """

    def table(match: re.Match[str]) -> str:
        if match["name"] not in TABLES:
            raise UserError(f"no table named {match['name']!r}{nearest(match['name'], TABLES)}")
        return match["head"] + TABLES[match["name"]](results) + match["tail"]

    return MARKED.sub(table, text)


def update(pages: Sequence[Path], results: Path, check: bool) -> list[Path]:
    """The pages whose tables are out of date; rewritten unless `check`."""
    stale = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        new = filled(text, results)
        if new != text:
            stale.append(page)
            if not check:
                page.write_text(new, encoding="utf-8")
    return stale


def main() -> None:
    """The command."""
    parser = cli.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a table is out of date")
    check = parser.parse_args().check
    stale = update([ROOT / page for page in PAGES if (ROOT / page).exists()], RESULTS, check)
    names = ", ".join(str(page.relative_to(ROOT)) for page in stale)
    if check and stale:
        print(f"out of date: {names}; run python -m benchmarks.tables", file=sys.stderr)
        sys.exit(1)
    print(f"written: {names}" if stale else "all tables are up to date")


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


if __name__ == "__main__":
    cli.run(main)
