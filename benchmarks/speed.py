"""Our routines beside the usual or the obvious way of doing the same, timed in one run; and what memory they take.

    python -m benchmarks.speed                                              # all
    python -m benchmarks.speed paa-mixture atss                             # some
    python -m benchmarks.speed --out benchmarks/results/speed.json          # kept for the README's table; what is not
                                                                            # measured anew stays as it was

Each line shows both times, how many times faster ours is, and how many are wanted; or megabytes, or a share of a
training step, and how much is allowed. Compare only times of one run.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, final

import torch

from benchmarks.annotations_speed import measure as measure_annotations
from benchmarks.atss_speed import atss_case
from benchmarks.dynamic_speed import dynamic_added_case, dynamic_assign_case, dynamic_memory_case
from benchmarks.evaluator_speed import evaluator_case, voting_case
from benchmarks.loader_speed import loader_cases
from benchmarks.mixture_speed import mixture_case
from benchmarks.paa_memory import paa_memory_case
from benchmarks.paa_speed import paa_loss_case
from benchmarks.padet_speed import match_case, soft_nms_case, whole_case
from benchmarks.tood_speed import tood_assign_case, tood_loss_case, tood_memory_case
from core import cli
from core.errors import UserError, nearest
from core.runlog import environment, write_json

ORIGIN = ("commit", "command", "started", "device", "threads")  # of a row's run


@final
class Row(TypedDict):
    """One comparison."""

    name: str
    what: str  # the work done by both
    reference: str  # what ours is compared with
    reference_ms: float
    ours_ms: float
    ratio: float  # reference_ms / ours_ms
    target: float  # the ratio wanted
    equal: bool | None  # whether both gave the same result; None where there is none to compare
    details: dict[str, Any]  # all that was measured


@final
class Peak(TypedDict):
    """One measurement of memory."""

    name: str
    what: str  # the work done
    peak_mb: float  # the most it took above what was there before
    limit_mb: float  # the most it may take
    details: dict[str, Any]  # all that was measured


@final
class Share(TypedDict):
    """What a part adds to the time of the whole."""

    name: str
    what: str  # part and whole
    added_ms: float
    step_ms: float  # of the whole
    share: float  # added_ms in percent of step_ms
    limit: float  # the most percent wanted
    details: dict[str, Any]  # all that was measured


def row(case: dict[str, Any], reference: str, target: float) -> Row:
    """A row from a measured case that holds `name`, `what`, `reference_ms` and `ours_ms`."""
    return Row(
        name=case["name"],
        what=case["what"],
        reference=reference,
        reference_ms=case["reference_ms"],
        ours_ms=case["ours_ms"],
        ratio=case["reference_ms"] / case["ours_ms"],
        target=target,
        equal=case.get("equal"),
        details=case,
    )


def mixture() -> list[Row]:
    """PAA's two-component mixtures of 60 and of 300 objects, from losses to positives."""
    cases = [(mixture_case(60), 40), (mixture_case(300), 70)]
    return [
        row(_renamed(case, sklearn_ms="reference_ms", decisions_equal="equal"), "scikit-learn", target)
        for case, target in cases
    ]


def paa_loss() -> list[Row]:
    """PAA's assignment and loss with 20 and with 100 objects in an image."""
    return [
        row(paa_loss_case(objects), "loop over objects and levels, scikit-learn", target)
        for objects, target in ((20, 4), (100, 10))
    ]


def paa_memory() -> list[Peak]:
    """Memory of PAA's assignment with 1,000 objects in an image."""
    case = paa_memory_case()
    return [Peak(name=case["name"], what=case["what"], peak_mb=case["peak_mb"], limit_mb=500, details=case)]


def atss() -> list[Row]:
    """Plain ATSS with sparse candidates."""
    return [row(atss_case(), "anchors x objects matrices", 10)]


def dynamic_assign() -> list[Row]:
    """Combined IoUs with sparse candidates."""
    return [row(dynamic_assign_case(), "anchors x objects matrices", 10)]


def dynamic_memory() -> list[Peak]:
    """Memory of Combined IoUs with 5,000 objects in an image."""
    case = dynamic_memory_case()
    return [Peak(name=case["name"], what=case["what"], peak_mb=case["peak_mb"], limit_mb=1000, details=case)]


def dynamic_added() -> list[Share]:
    """What Combined IoUs add to ATSS's assignment, beside a training step."""
    case = dynamic_added_case()
    added, step = case["added_ms"], case["step_ms"]
    name, what = case["name"], case["what"]
    return [Share(name=name, what=what, added_ms=added, step_ms=step, share=case["share"], limit=3, details=case)]


def tood_assign() -> list[Row]:
    """TAL's assignment, a fixed number of pairs at a time."""
    return [row(tood_assign_case(), "anchors x objects matrices", 4)]


def tood_memory() -> list[Peak]:
    """Memory of TAL's assignment with 5,000 objects in an image."""
    case = tood_memory_case()
    return [Peak(name=case["name"], what=case["what"], peak_mb=case["peak_mb"], limit_mb=1000, details=case)]


def tood_loss() -> list[Row]:
    """TAL's assignment and loss with 20 and with 100 objects in an image."""
    return [row(tood_loss_case(objects), "loop over objects", target) for objects, target in ((20, 1.5), (100, 4))]


def padet_match() -> list[Row]:
    """PADet's matching of a batch."""
    return [row(match_case(), "loop over images and objects", 3)]


def padet_nms() -> list[Row]:
    """Soft-NMS of all classes at once, with PADet's limit and without one."""
    return [row(soft_nms_case(limit), "loop over classes and boxes", 20) for limit in (300, None)]


def padet_whole() -> list[Row]:
    """PADet from image to detections; at most 1.1 times SSD300's time for as many multiply-adds."""
    return [row(whole_case(), "SSD300, torchvision", round(1 / 1.1, 3))]


def evaluator() -> list[Row]:
    """COCO metrics as `core.evaluator` computes them by default."""
    case: dict[str, Any] = evaluator_case()
    times = {"ours_ms": case["ours_s"] * 1000, "reference_ms": case["pycocotools_s"] * 1000}
    return [row(case | times, "pycocotools", 5)]


def voting() -> list[Row]:
    """PAA's score voting of boxes with 2 and with 10 classes each."""
    return [row(voting_case(classes_each=classes), "loop over classes and boxes", 5) for classes in (2, 10)]


def annotations() -> list[Row]:
    """Opening a COCO-train-sized annotation file the first time and from its cache."""
    case = measure_annotations()
    theirs = case["pycocotools_s"] * 1000
    file = f"{case['file_megabytes']:.0f} MB of annotations"
    growth = max(case["worker_private_megabytes"].values())
    first = {"name": "annotations-first", "what": f"{file}, first open", "ours_ms": case["first_open_s"] * 1000}
    later = {
        "name": "annotations-later",
        "what": f"{file}, later opens; a worker that reads all grows by {growth:.0f} MB",
        "ours_ms": case["later_open_s"] * 1000,
    }
    reference = {"reference_ms": theirs}
    return [row(case | first | reference, "pycocotools", 2), row(case | later | reference, "pycocotools", 100)]


def loader() -> list[Row]:
    """From JPEG files to batches, for 0, 1 and 2 workers."""
    rows = []
    for case in loader_cases():
        pace = " against our ".join(f"{case['images_per_second'][name]:.1f}" for name in ("theirs", "ours"))
        rows.append(row(case, f"PIL, floats; {pace} images/s", 3))
    return rows


BENCHMARKS: dict[str, Callable[[], list[Row] | list[Peak] | list[Share]]] = {
    "paa-mixture": mixture,
    "paa-loss": paa_loss,
    "paa-memory": paa_memory,
    "atss": atss,
    "dynamic-assign": dynamic_assign,
    "dynamic-memory": dynamic_memory,
    "dynamic-added": dynamic_added,
    "tood-assign": tood_assign,
    "tood-memory": tood_memory,
    "tood-loss": tood_loss,
    "padet-match": padet_match,
    "padet-nms": padet_nms,
    "padet-whole": padet_whole,
    "voting": voting,
    "evaluator": evaluator,
    "annotations": annotations,
    "loader": loader,
}


def line(result: Row | Peak | Share) -> str:
    """A row as printed: work, both times, ratio and target, and what is wrong; or work, megabytes or share, limit."""
    if "peak_mb" in result:
        verdict = "" if result["peak_mb"] <= result["limit_mb"] else ", MISSED"
        return f"{result['what']}\n    {result['peak_mb']:.0f} MB, at most {result['limit_mb']:g} wanted{verdict}"
    if "share" in result:
        verdict = "" if result["share"] <= result["limit"] else ", MISSED"
        return (
            f"{result['what']}\n"
            f"    {result['added_ms']:.1f} ms of {result['step_ms']:.0f} ms: {result['share']:.2f} %, "
            f"at most {result['limit']:g} % wanted{verdict}"
        )
    verdict = "" if result["ratio"] >= result["target"] else ", MISSED"
    verdict += ", DIFFERENT RESULTS" if result["equal"] is False else ""
    return (
        f"{result['what']}\n"
        f"    {result['reference']} {result['reference_ms']:.2f} ms, ours {result['ours_ms']:.2f} ms: "
        f"{result['ratio']:.1f} times faster, wanted {result['target']:g}{verdict}"
    )


def main() -> None:
    """The command."""
    parser = cli.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(BENCHMARKS)} [all]")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers and where they come from")
    options = parser.parse_args()
    for name in options.names:
        if name not in BENCHMARKS:
            raise UserError(f"no benchmark named {name!r}{nearest(name, BENCHMARKS)}")
    rows: list[Row | Peak | Share] = []
    for name in options.names or BENCHMARKS:
        for result in BENCHMARKS[name]():
            print(f"{name}: {line(result)}", flush=True)
            rows.append(result)
    if options.out:
        facts = environment(torch.device("cpu"), 1, {}) | {"seeds": [0]}
        facts["licence_note"] = "Data: generated in the benchmarks, no licence."
        old = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
        write_json(options.out, facts | {"rows": merge_rows(old, facts, rows)})


def merge_rows(
    old: Mapping[str, Any], facts: Mapping[str, Any], rows: Sequence[Row | Peak | Share]
) -> list[dict[str, Any]]:
    """An earlier file's rows with today's in their places or behind them, each with the run that it comes from."""
    kept: dict[tuple[str, str], dict[str, Any]] = {}
    for source, some in ((old, old.get("rows", [])), (facts, rows)):
        for one in some:
            origin = one.get("origin") or {key: source[key] for key in ORIGIN}
            kept[one["name"], one["what"]] = {**one, "origin": origin}
    return list(kept.values())


def _renamed(case: dict[str, Any], **names: str) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in case.items()}


if __name__ == "__main__":
    cli.run(main)
