"""Named comparisons of detectors, each kept in one file of `benchmarks/results/`.

    ANCHORAGE_SHARED=DATA_FOLDER python -m benchmarks.run bccd-fcos              # PAA and torchvision's FCOS, 3 seeds
    ANCHORAGE_SHARED=DATA_FOLDER python -m benchmarks.run bccd --seeds 1         # PAA trained longer
    ANCHORAGE_SHARED=DATA_FOLDER python -m benchmarks.run bccd-ablations         # rows of PAA's paper, tiny, 2 seeds
    ANCHORAGE_SHARED=DATA_FOLDER python -m benchmarks.run dynamic-bccd           # rows of Dynamic ATSS's, likewise
    ANCHORAGE_SHARED=DATA_FOLDER python -m benchmarks.run tood-bccd              # TOOD's table 6, likewise, 3 seeds
    ANCHORAGE_SHARED=DATA_FOLDER python -m benchmarks.run padet-bccd             # rows of PADet's, likewise
    ANCHORAGE_SHARED=DATA_FOLDER python -m benchmarks.run padet-trained          # PADet trained longer, and Fig. 1
    ANCHORAGE_SHARED=DATA_FOLDER python -m benchmarks.run padet-initial          # Fig. 1 without training, on COCO
    ANCHORAGE_SHARED=DATA_FOLDER python -m benchmarks.run padet-memorise         # PADet learns 8 images by heart
    python -m benchmarks.run quick                                               # the README's first command

The file is written after every run. A comparison that was cut off goes on with the run it had not finished; a run made
by another command than today's is made again.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from core import cli
from core.errors import UserError, nearest
from core.runlog import LOG, commit, environment, read_log, write_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
METRICS = ("AP", "AP50", "AP75")
ALIGNMENT = ("rank_correlation", "top_iou", "correct", "redundant", "error")  # of `tood_tal.alignment`
SHARED = "$ANCHORAGE_SHARED"  # stands for the folder of real data in recorded commands


@dataclass(frozen=True)
class Detector:
    """Something to train and test: commands in which {seed} and {out} are filled in, run one after the other."""

    training: str  # for the table
    commands: tuple[str, ...]  # modules and their arguments
    metrics: str  # JSON file with the test metrics that the commands leave, {out} filled in; empty: nothing is tested
    analyses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # further files; numbers kept, a.b for b in a
    also: tuple[str, ...] = ()  # kept of the test metrics beside `METRICS`
    logged: tuple[str, ...] = ()  # kept of the run's training log, as means over its last quarter
    after: str = ""  # the detector of the same seed whose run folder its commands read


@dataclass(frozen=True)
class Comparison:
    """Detectors trained on the same data with the same seeds."""

    file: str  # in benchmarks/results
    seeds: int  # default number
    data: str
    licence_note: str
    detectors: dict[str, Detector]


def trained(
    method: str,
    training: str,
    data: str,
    flags: str,
    split: str,
    also: tuple[str, ...] = (),
    logged: tuple[str, ...] = (),
) -> Detector:
    """A method trained with these flags and then tested on a split of its data."""
    train = f"{method}.train --data {data} {flags} --seed {{seed}} --out {{out}}"
    evaluate = f"{method}.evaluate {{out}}/best.pt --data {data} --split {split} --out {{out}}/{split}"
    return Detector(training, (train, evaluate), f"{{out}}/{split}/metrics.json", also=also, logged=logged)


BCCD = f"{SHARED}/data/bccd.yaml"
RESNET18 = f"{SHARED}/data/weights/resnet18_pqf_fp16.pth"
BCCD_DATA = "BCCD (Shenggan/BCCD_Dataset, MIT), 205 training images; AP on its 72 test images"
BCCD_NOTE = (
    "Equal budget: the same images, size, steps and start; each detector with its own recipe (FCOS: lr 0.005, float32; "
    "PAA: lr 0.01, bf16, chosen in two trial runs; FCOS was not tuned). Data: BCCD, MIT licence. Both start from the "
    "ResNet-18 weights of Permute, Quantize, and Fine-tune (Uber Non-Commercial License): results for non-commercial "
    "use only."
)
# A short run: a higher rate than the paper's, bounded gradients, and late drops, as the peer has them.
SHORT_RUN = "--lr 0.01 --clip-grad-norm 5 --warmup linear --warmup-factor 0.1 --milestones 0.75 0.9 --precision bf16"
BCCD_START = f"--preset small --backbone-weights {RESNET18}"
BCCD_SMALL = f"{BCCD_START} --short-side 256 --long-side 342 --channels 256 {SHORT_RUN} --steps 240 --batch-size 8"
BCCD_LARGE = f"{BCCD_START} --short-side 384 --long-side 512 --channels 256 {SHORT_RUN} --steps 280 --batch-size 8"

COCO_NOTE = (
    "Data: COCO 2017, labels CC BY 4.0, images each under its own Flickr licence, many non-commercial. Weights of "
    "Permute, Quantize, and Fine-tune (Uber Non-Commercial License): results for non-commercial use only."
)
MEMORISE = Detector(
    "900 x 4 images of 480 px, bf16",
    (
        f"benchmarks.subset {SHARED}/data/coco_mini.yaml --images 16 --out {{out}}/sixteen.yaml",
        f"paa.train --preset small --data {{out}}/sixteen.yaml --backbone-weights {RESNET18} --channels 128 "
        f"--short-side 480 --long-side 800 --anchor-scale 4 --steps 900 --batch-size 4 {SHORT_RUN} --seed {{seed}} "
        "--out {out}/run",
        "paa.evaluate {out}/run/best.pt --split train --out {out}/train",
    ),
    "{out}/train/metrics.json",
)

# The papers' ablations at a budget of minutes: preset small as it is, so rows differ in the named flags alone.
ABLATION_NOTE = BCCD_NOTE[BCCD_NOTE.index("Data:") :].replace("Both start", "All start")
ABLATION_TRAINING = "240 x 8 images of 192 px, bf16"
ABLATION_START = f"{BCCD_START} {SHORT_RUN} --steps 240 --batch-size 8"
ABLATION_FLAGS = {
    "paa": "",
    "scheme_a": "--scheme a",
    "scheme_b": "--scheme b",
    "scheme_d": "--scheme d",
    "fixed_number": "--scheme number --fixed-number 10",
    "score_range": "--scheme range --score-range 0.1",
    "centerness": "--quality centerness",
    "no_quality": "--quality none",
}
ABLATIONS = {
    name: trained("paa", ABLATION_TRAINING, BCCD, f"{ABLATION_START} {flags}".strip(), "test")
    for name, flags in ABLATION_FLAGS.items()
}
ABLATIONS["no_voting"] = Detector(  # the weights of `paa`, tested again
    ABLATION_TRAINING,
    (f"paa.evaluate {{out}}/../paa-{{seed}}/best.pt --data {BCCD} --split test --no-score-voting --out {{out}}/test",),
    "{out}/test/metrics.json",
    after="paa",
)

# Dynamic ATSS: rows of its Tables 2 and 3. The log is finer than usual, for the picture of the box loss.
HARD_TARGETS = "--class-loss focal --quality centerness"
DYNAMIC_FLAGS = {
    "atss": f"--pred-weight 0 {HARD_TARGETS}",
    "combined": HARD_TARGETS,
    "combined_qfl": "--quality centerness",
    "combined_qfl_iou": "",
    "predicted_only": f"--anchor-weight 0 {HARD_TARGETS}",
    "up_down": f"--pred-schedule up --anchor-schedule down {HARD_TARGETS}",
}
DYNAMIC = {
    name: trained("dynamic_atss", ABLATION_TRAINING, BCCD, f"{ABLATION_START} --log-every 2 {flags}".strip(), "test")
    for name, flags in DYNAMIC_FLAGS.items()
}

# TOOD: the four cells of head and assignment, its Table 6.
TOOD_FLAGS = {
    "parallel_atss": "--head parallel --quality centerness --atss-share 1",
    "t_head_atss": "--atss-share 1",
    "parallel_tal": "--head parallel",
    "t_head_tal": "",
}


def aligned(flags: str) -> Detector:
    """TOOD trained with these flags, tested, and its alignment of scores and boxes analysed on the same split."""
    tested = trained("tood_tal", ABLATION_TRAINING, BCCD, f"{ABLATION_START} {flags}".strip(), "test")
    analyse = f"tood_tal.alignment {{out}}/best.pt --data {BCCD} --split test --out {{out}}/test"
    return replace(tested, commands=(*tested.commands, analyse), analyses={"{out}/test/alignment.json": ALIGNMENT})


# PADet: rows of its Tables 2 and 1. The VOC folder, because VOC's own AP is the method's; its corners count from 0.
# The rate was chosen from 0.004, 0.01 and 0.02 by one run of `all` each, on the images of val.
PADET_STEPS = 240
PADET_RUN = SHORT_RUN.replace("--lr 0.01", "--lr 0.02")
PADET_TRAINING = f"{PADET_STEPS} x 8 images of 192 px, bf16"
PADET_DATA = f"{SHARED}/data/bccd/VOC"
PADET_START = f"{BCCD_START} --no-voc-one-based {PADET_RUN} --steps {PADET_STEPS} --batch-size 8"
PADET_FLAGS = {
    "baseline": "--no-apm-score --no-apm-box --fam none",
    "apm_c": "--no-apm-box --fam none",
    "apm_r": "--no-apm-score --fam none",
    "fa": "--no-apm-score --no-apm-box --fam implicit",
    "apm": "--fam none",
    "implicit": "--fam implicit",
    "explicit_l": "--fam explicit_l",
    "explicit_s": "--fam explicit_s",
    "explicit_ls": "--fam explicit_ls",
    "all": "--fam disentangled",
}
PADET = {
    name: trained(
        "padet",
        PADET_TRAINING,
        PADET_DATA,
        f"{PADET_START} {flags}",
        "test",
        also=("VOC07",),
        logged=("positives", "negatives"),
    )
    for name, flags in PADET_FLAGS.items()
}

# PADet trained until it is of use, and the balance of its anchors (Fig. 1 of its paper) in augmented training batches.
PADET_LONG = f"{BCCD_START} --no-voc-one-based {PADET_RUN} --steps 720 --batch-size 8"
PADET_BALANCE = tuple(
    f"settings.{setting}.{name}"
    for setting in ("initial", "APM_C", "APM_R", "APM_CR")
    for name in ("positives", "negatives", "negatives_per_positive")
)
PADET_COUNT = f"--data {PADET_DATA} --steps 50 --out {{out}}/balance.json"
INITIAL = ("boxes", *(name for name in PADET_BALANCE if ".initial." in name))
COUNT_INITIAL = f"--preset vgg16_384 --data {SHARED}/data/coco_mini.yaml --steps 40 --out {{out}}/balance.json"
padet_initial = Detector(
    "none: 40 x 32 training images, augmented",
    (f"padet.statistics {COUNT_INITIAL}",),
    "",
    analyses={"{out}/balance.json": INITIAL},
)
LONG = "720 x 8 images of 192 px, bf16"
padet_long = trained("padet", LONG, PADET_DATA, PADET_LONG, "test", also=("VOC07",))
baseline_long = trained("padet", LONG, PADET_DATA, f"{PADET_LONG} {PADET_FLAGS['baseline']}", "test", also=("VOC07",))
padet_long = replace(
    padet_long,
    commands=(*padet_long.commands, f"padet.statistics {{out}}/best.pt {PADET_COUNT}"),
    analyses={"{out}/balance.json": PADET_BALANCE},
)

PADET_MEMORISE = Detector(  # check 17 of spec PADet section 9
    "300 x 4 images of 384 px, bf16, not augmented",
    (
        f"benchmarks.subset {BCCD} --images 8 --out {{out}}/eight.yaml",
        f"padet.train {BCCD_START} --data {{out}}/eight.yaml --size 384 --augment none {PADET_RUN} --steps 300 "
        "--batch-size 4 --seed {seed} --out {out}/run",
        "padet.evaluate {out}/run/best.pt --split train --out {out}/train",
        "padet.statistics {out}/run/best.pt --split train --out {out}/balance.json",
    ),
    "{out}/train/metrics.json",
    analyses={"{out}/balance.json": tuple(name for name in PADET_BALANCE if name.endswith("positives"))},
)

COMPARISONS = {
    "bccd-fcos": Comparison(
        file="bccd_peer.json",
        seeds=3,
        data=BCCD_DATA,
        licence_note=BCCD_NOTE,
        detectors={
            "fcos": Detector(
                "240 x 8 images",
                (
                    f"benchmarks.baselines.fcos --data {BCCD} --backbone-weights {RESNET18} --steps 240 "
                    "--batch-size 8 --seed {seed} --out {out}/metrics.json",
                ),
                "{out}/metrics.json",
            ),
            "paa": trained("paa", "240 x 8 images, bf16", BCCD, BCCD_SMALL, "test"),
        },
    ),
    "bccd": Comparison(
        file="bccd_paa.json",
        seeds=1,
        data=BCCD_DATA,
        licence_note=BCCD_NOTE,
        detectors={"paa": trained("paa", "280 x 8 images of 384 px, bf16", BCCD, BCCD_LARGE, "test")},
    ),
    "bccd-ablations": Comparison(
        file="bccd_ablations.json",
        seeds=2,
        data=BCCD_DATA,
        licence_note=ABLATION_NOTE,
        detectors=ABLATIONS,
    ),
    "dynamic-bccd": Comparison(
        file="dynamic_bccd.json",
        seeds=2,
        data=BCCD_DATA,
        licence_note=ABLATION_NOTE,
        detectors=DYNAMIC,
    ),
    "tood-bccd": Comparison(
        file="tood_bccd.json",
        seeds=3,
        data=BCCD_DATA,
        licence_note=ABLATION_NOTE,
        detectors={name: aligned(flags) for name, flags in TOOD_FLAGS.items()},
    ),
    "padet-bccd": Comparison(
        file="padet_bccd.json",
        seeds=2,
        data=BCCD_DATA,
        licence_note=ABLATION_NOTE,
        detectors=PADET,
    ),
    "padet-trained": Comparison(
        file="padet_trained.json",
        seeds=1,
        data=BCCD_DATA,
        licence_note=ABLATION_NOTE,
        detectors={"padet": padet_long, "baseline": baseline_long},
    ),
    "padet-memorise": Comparison(
        file="padet_memorise.json",
        seeds=1,
        data="the 8 images of lowest id of BCCD's training images; AP on the same images",
        licence_note=ABLATION_NOTE,
        detectors={"padet": PADET_MEMORISE},
    ),
    "padet-initial": Comparison(
        file="padet_initial.json",
        seeds=1,
        data="coco_mini: 160 training images of COCO 2017",
        licence_note=COCO_NOTE[: COCO_NOTE.index(" Weights")],
        detectors={"initial": padet_initial},
    ),
    "coco-memorise": Comparison(
        file="coco_memorise.json",
        seeds=1,
        data="the 16 images of lowest id of COCO train2017's part in coco_mini; AP on the same images",
        licence_note=COCO_NOTE,
        detectors={"paa": MEMORISE},
    ),
    "quick": Comparison(
        file="quick.json",
        seeds=1,
        data="shapes: drawn images; AP on held-out ones",
        licence_note="Data: drawn by core.shapes, no licence. No pretrained weights.",
        detectors={"paa": trained("paa", "preset quick", "shapes", "--preset quick", "val")},
    ),
}


def compare(name: str, seeds: int, results: Path, runs: Path, only: Sequence[str] = (), jobs: int = 1) -> None:
    """All runs of a comparison that its file lacks, seed by seed so that the detectors keep pace.

    Args:
        name: of the comparison.
        seeds: number of seeds.
        results: folder of the result file.
        runs: folder of the run folders.
        only: the detectors to run; all by default.
        jobs: runs at a time, each with its part of the cores.
    """
    comparison = COMPARISONS[name]
    path = results / comparison.file
    path.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(path.read_text(encoding="utf-8"))["detectors"] if path.exists() else {}
    writing = threading.Lock()
    started: dict[tuple[str, int], Future[None]] = {}

    def run(key: str, seed: int) -> None:
        detector = comparison.detectors[key]
        if (detector.after, seed) in started:
            started[detector.after, seed].result()
        measured = one_run(detector, seed, runs / name / f"{key}-{seed}", jobs)
        with writing:
            others = [run for run in kept_runs(done, key, detector) if run["seed"] != seed]
            done[key] = summary(detector, [*others, measured])
            ordered = sorted(done, key=[*comparison.detectors, *done].index)
            write_json(path, header(comparison, done) | {"detectors": {key: done[key] for key in ordered}})

    with ThreadPoolExecutor(jobs) as pool:
        for seed in range(seeds):
            for key, detector in comparison.detectors.items():
                if only and key not in only:
                    continue
                if any(run["seed"] == seed for run in kept_runs(done, key, detector)):
                    print(f"{key}, seed {seed}: already in {path.name}")
                else:
                    started[key, seed] = pool.submit(run, key, seed)
        try:
            for future in started.values():
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def kept_runs(done: dict[str, Any], key: str, detector: Detector) -> list[dict[str, Any]]:
    """The runs of a detector in a result file that were made by the commands that it has now."""
    return [run for run in done.get(key, {}).get("runs", []) if is_current(run, detector)]


def is_current(run: dict[str, Any], detector: Detector) -> bool:
    """Whether a kept run was made by the commands that the detector has now."""
    return run["commands"] == recorded(detector, run["seed"])


def recorded(detector: Detector, seed: int) -> list[str]:
    """The commands as they are kept: with the seed, without any machine's folders."""
    return [f"python -m {part}".replace("{seed}", str(seed)).replace("{out}", "OUT") for part in detector.commands]


def one_run(detector: Detector, seed: int, out: Path, jobs: int = 1) -> dict[str, Any]:
    """Train and test once in an empty folder; with several jobs at a time, on its part of the cores.

    Returns:
        seed, commands, commit, wall seconds of all commands, jobs, AP, AP50, AP75 in [0, 1] on the tested images, and
        what else the detector keeps of metrics, further analyses and log.

    Raises:
        UserError: if a command fails; it has printed why.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    process_environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if jobs > 1 else {})
    start = time.perf_counter()
    for command in detector.commands:
        words = [fill(word, seed, out) for word in command.split()]
        print(f"+ python -m {' '.join(words)}", flush=True)
        done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=process_environment, check=False)
        if done.returncode:
            raise UserError(f"python -m {' '.join(words)} failed")
    seconds = time.perf_counter() - start
    kept: dict[str, Any] = {}
    for file, names in sources(detector).items():
        content = json.loads(Path(fill(file, seed, out)).read_text(encoding="utf-8"))
        kept |= {name: number(content, name) for name in names}
    kept |= late_means(out, detector.logged)
    made = {"seed": seed, "commands": recorded(detector, seed), "commit": commit(), "seconds": seconds, "jobs": jobs}
    return made | kept


def sources(detector: Detector) -> dict[str, tuple[str, ...]]:
    """The files that a detector's numbers stand in, and which are kept of each."""
    metrics = {detector.metrics: (*METRICS, *detector.also)} if detector.metrics else {}
    return {**metrics, **detector.analyses}


def number(content: Any, name: str) -> Any:
    """`number({"a": {"b": 1}}, "a.b")` is 1."""
    for key in name.split("."):
        content = content[key]
    return content


def late_means(run: Path, names: Sequence[str]) -> dict[str, float]:
    """Means of logged numbers of training over the last quarter of a run folder's steps."""
    if not names:
        return {}
    rows = [row for row in read_log(run / LOG) if row["split"] == "train"]
    late = [row for row in rows if row["step"] > 0.75 * rows[-1]["step"]]
    return {name: statistics.mean(row[name] for row in late) for name in names}


def fill(word: str, seed: int, out: Path) -> str:
    """A word of a command with seed, run folder and data folder in place."""
    if SHARED in word:
        word = word.replace(SHARED, shared_folder())
    return word.replace("{seed}", str(seed)).replace("{out}", str(out))


def shared_folder() -> str:
    """The folder of real data and weights. UserError if ANCHORAGE_SHARED names none."""
    folder = os.environ.get("ANCHORAGE_SHARED", "")
    if not folder or not Path(folder).is_dir():
        raise UserError(f"ANCHORAGE_SHARED={folder}: set it to the folder that holds data/bccd.yaml and data/weights")
    return folder


def summary(detector: Detector, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The runs by seed, the mean and the sample standard deviation of each number, null where there is none."""
    names = (*(name for kept in sources(detector).values() for name in kept), *detector.logged, "seconds")
    columns = {name: [run[name] for run in runs] for name in names}
    return {
        "training": detector.training,
        "runs": sorted(runs, key=lambda run: run["seed"]),
        "mean": {name: None if None in column else statistics.mean(column) for name, column in columns.items()},
        "std": {
            name: None if None in column or len(runs) < 2 else statistics.stdev(column)
            for name, column in columns.items()
        },
    }


def header(comparison: Comparison, done: dict[str, Any]) -> dict[str, Any]:
    """Where the numbers come from: command, commit, versions, device, seeds, data, licence note."""
    seeds = sorted({run["seed"] for detector in done.values() for run in detector["runs"]})
    origin = {"seeds": seeds, "data": comparison.data, "licence_note": comparison.licence_note}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return environment(device, 1, {}) | origin


def main() -> None:
    """The command."""
    parser = cli.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help=f"one of {', '.join(COMPARISONS)}")
    parser.add_argument("--seeds", type=int, help="number of seeds, counted from 0 [the comparison's own]")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks"), help="where run folders go")
    parser.add_argument("--only", nargs="+", default=[], metavar="DETECTOR", help="run these detectors now [all]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its part of the cores [1]")
    options = parser.parse_args()
    if options.name not in COMPARISONS:
        raise UserError(f"no comparison named {options.name!r}{nearest(options.name, COMPARISONS)}")
    seeds = COMPARISONS[options.name].seeds if options.seeds is None else options.seeds
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: need at least one")
    if options.jobs < 1:
        raise UserError(f"--jobs {options.jobs}: need at least one")
    for key in options.only:
        if key not in (known := COMPARISONS[options.name].detectors):
            raise UserError(f"no detector named {key!r} in {options.name}{nearest(key, known)}")
    compare(options.name, seeds, RESULTS, options.runs.absolute(), options.only, options.jobs)


if __name__ == "__main__":
    cli.run(main)
