"""`python -m <method>.report`: published numbers beside those of run folders (imports no torch).

Published numbers are a method's `results.yaml`. A measured number stands in a row only if its run's configuration is
that row's, field by field; every other run is listed below the tables with what makes it another one.
"""

import argparse
import dataclasses
import json
import re
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.cli import OneLineParser
from core.config import TrainConfig
from core.configfile import config_from_values, describe_fields, read_mapping
from core.errors import UserError
from core.files import replace_file
from core.published import METRICS, SPLITS, Published, PublishedTable, Row, row_config

NOT_MEASURED, SERVER_CLOSED = "not measured", "server closed"
CLOSED_NOTE = "The COCO test-dev server takes no submissions any more (cocoapi issue 691): nothing can be measured."
NO_CELL = "-"
FREE_SECTIONS = ("run", "hardware")  # of the configuration: what may differ between two runs of a row ...
BINDING = ("precision",)  # ... except these
SHOWN_DIFFERENCES = 6  # of a run; the others are counted
IOU_ACCURACY = "iou-accuracy-{split}.json"  # what --iou-accuracy writes beside the weights
ALIGNMENT = "alignment-{split}/alignment.json"  # and the alignment analysis


# Measured numbers


class Measurement(NamedTuple):
    """Numbers of one model on one split."""

    run: Path  # the run folder
    config: TrainConfig  # as trained, with what the evaluation changed
    data: str  # short name of the data
    images: int | None  # of the split, where known
    split: str
    tta: bool
    values: Mapping[str, float]  # keys of METRICS
    commit: str
    device: str


def find_runs(folder: Path) -> list[Path]:
    """The run folders inside a folder, sorted; none where it does not exist."""
    trained = {path.parent for path in folder.glob("*/config.yaml")}
    return sorted(trained | {path.parents[1] for path in folder.glob("*/evaluate-*/metrics.json")})


def read_runs(folders: Iterable[Path], method: str, config_type: type[TrainConfig]) -> list[Measurement]:
    """All measurements of run folders. UserError for the first folder that is none or is damaged."""
    return [measurement for folder in folders for measurement in read_run(folder, method, config_type)]


def read_run(folder: Path, method: str, config_type: type[TrainConfig]) -> list[Measurement]:
    """What was measured of a run: at its end, by `evaluate`, by `--iou-accuracy` and of its alignment.

    The numbers of its end are those of the last step, as the papers report them, not of the best one. They are left out
    where `evaluate` measured the same. A folder of converted weights is one too, if `evaluate` has been there.

    Raises:
        UserError: neither a config.yaml nor an evaluation, or a file that cannot be read.
    """
    evaluations = {path: _read_json(path) for path in sorted(folder.glob("evaluate-*/metrics.json"))}
    config = _run_config(folder, evaluations, method, config_type)
    environment = _read_json(folder / "environment.json") if (folder / "environment.json").exists() else {}
    commit, changes = str(environment.get("commit", ""))[:10], str(environment.get("commit", "")).endswith("+changes")
    facts = {"commit": commit + "+changes" * changes, "device": str(environment.get("device", ""))}
    name = str(environment.get("data", Path(config.data).name))
    found: list[Measurement] = []
    for path, content in evaluations.items():
        values: dict[Any, Any] = {**dataclasses.asdict(config), **_object(content, "changes", path)}
        _add(found, _measurement(folder, config_from_values(values, config_type, str(path)), name, content, facts))
    path = folder / "metrics.json"
    if path.exists():
        _add(found, _measurement(folder, config, name, _object(_read_json(path), "last", path), facts))
    for path in (folder / IOU_ACCURACY.format(split=split) for split in SPLITS):
        if path.exists():
            content = _read_json(path)
            error = _object(content, "positives", path).get("mean_absolute_error")
            _add(found, _measurement(folder, config, name, {**content, "iou_error": error}, facts))
    for path in (folder / ALIGNMENT.format(split=split) for split in SPLITS):
        if path.exists():
            _add(found, _measurement(folder, config, name, _read_json(path), facts))
    return [measurement for measurement in found if measurement.values]


def _add(found: list[Measurement], one: Measurement) -> None:
    """Append a measurement, or what it adds to an earlier one of the same model and data."""
    for place, other in enumerate(found):
        if (one.data, one.split, one.tta, one.config) == (other.data, other.split, other.tta, other.config):
            found[place] = other._replace(values={**one.values, **other.values})
            return
    found.append(one)


def _run_config(
    folder: Path, evaluations: Mapping[Path, Mapping[str, Any]], method: str, config_type: type[TrainConfig]
) -> TrainConfig:
    """Of the run's config.yaml, or of the weights beside it that were evaluated."""
    path = folder / "config.yaml"
    if path.exists():
        return config_from_values(read_mapping(path), config_type, str(path))
    names = [Path(str(content["weights"])).name for content in evaluations.values() if "weights" in content]
    if not names:
        kind = "no such folder" if not folder.is_dir() else "no run folder, it has neither config.yaml nor evaluate-*/"
        raise UserError(f"{folder}: {kind}")
    from core import checkpoint

    weights = folder / names[0]
    content = checkpoint.load(weights, method=method)
    return config_from_values(_object(content, "config", weights), config_type, str(weights))


def _measurement(
    folder: Path, config: TrainConfig, name: str, content: Mapping[str, Any], facts: Mapping[str, str]
) -> Measurement:
    """From a file's content; numbers that are missing, null or -1 (nothing to find) are left out."""
    values = {metric: content[metric] for metric in METRICS if isinstance(content.get(metric), float | int)}
    return Measurement(
        run=folder,
        config=config,
        data=str(content.get("data", name)),
        images=content.get("images"),
        split=str(content.get("split", "val")),
        tta=bool(content.get("tta", False)),
        values={metric: float(value) for metric, value in values.items() if value != -1},
        **facts,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold an object with fields, got a {type(content).__name__}")
    return content


def _object(content: Mapping[str, Any], key: str, path: Path) -> dict[Any, Any]:
    value = content.get(key, {})
    if not isinstance(value, dict):
        raise UserError(f"{path}: {key} must be an object with fields, got {value!r}")
    return value


def differences(measured: Measurement, wanted: TrainConfig, images: Mapping[str, int]) -> list[str]:
    """What makes a run another one than `wanted`, such as `steps 240 instead of 135000`; empty if nothing does.

    Seeds, hardware, logging and paths may differ; precision may not. Of the data its short name counts (`coco`, also
    `coco2017` or `mscoco`; `VOC07+12` of a VOCdevkit) and, where it is known, the number of COCO's images.

    Args:
        measured: the run.
        wanted: the configuration it is compared with.
        images: number of images of the papers' splits.
    """
    found = []
    for field in describe_fields(type(wanted)):
        mine, theirs = getattr(measured.config, field.name), getattr(wanted, field.name)
        free = field.section in FREE_SECTIONS and field.name not in BINDING
        free |= field.name == "warmup_steps" and wanted.warmup_epochs is not None  # a run counts them from its epochs
        if field.name != "data" and not free and mine != theirs:
            found.append(f"{field.name} {_shown(mine)} instead of {_shown(theirs)}")
    data = Path(wanted.data).name
    if _data_key(measured.data) != _data_key(data):
        found.insert(0, f"data {measured.data} instead of {data}")
    elif _data_key(data) == "coco" and measured.images not in (None, images.get(measured.split)):
        found.insert(0, f"{measured.images} images instead of {images.get(measured.split, 'a known number')}")
    return found


def _data_key(name: str) -> str:
    key = re.sub(r"[-_ ]?2017$", "", name.lower())
    return {"mscoco": "coco", "vocdevkit": "voc07+12"}.get(key, key)  # a whole devkit calls itself VOC07+12


def _shown(value: Any) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return " ".join(_shown(part) for part in value)
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.4g}" if isinstance(value, float) else str(value) or "none"


def measurements_of(
    row: Row,
    table: PublishedTable,
    measured: Sequence[Measurement],
    presets: Mapping[str, TrainConfig],
    images: Mapping[str, int],
) -> list[Measurement]:
    """The measurements that answer a row: same configuration, data, split and way of testing."""
    if not row.preset:
        return []
    wanted = row_config(row, presets)
    return [
        one
        for one in measured
        if one.split == table.split
        and one.tta == row.tta
        and set(one.values) & set(table.metrics)
        and not differences(one, wanted, images)
    ]


# Tables


def report(published: Published, measured: Sequence[Measurement], presets: Mapping[str, TrainConfig]) -> str:
    """All published tables with measured numbers beside them, then the runs that are no row, in Markdown."""
    parts = [
        f"# {published.title}",
        "Published AP in points; " + "measured AP likewise, of runs of exactly that preset.",
    ]
    used: list[Measurement] = []
    for table in published.tables:
        answers = [measurements_of(row, table, measured, presets, published.images) for row in table.rows]
        used += [one for some in answers for one in some]
        parts += [f"## {table.title}", published_table(table, answers)]
        notes = [table.note.strip(), *(f"{row.label}: {row.note}" for row in table.rows if row.note)]
        notes += [CLOSED_NOTE] if table.split == "test-dev" else []
        parts += ["\n".join(f"- {note}" for note in notes if note)] if any(notes) else []
    others = [one for one in measured if one not in used]
    if others:
        parts += [
            "## Runs that differ from their preset, or are no row of a table",
            others_table(others, presets, published),
        ]
    if measured:
        parts += ["## Where the measured numbers come from", origins_table(measured)]
    parts += ["## Sources", "\n".join(f"- [{letter}] {meaning}" for letter, meaning in published.sources.items())]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def published_table(table: PublishedTable, answers: Sequence[Sequence[Measurement]]) -> str:
    """One table; `answers` are the measurements of each row."""
    header = ["row", "preset", *(METRICS[metric].heading for metric in table.metrics), "source", "measured"]
    rows = [
        [
            row.label,
            _preset_cell(row),
            *(row.values[metric].text for metric in table.metrics),
            _source_cell(row, table.metrics),
            _measured_cell(row, table, found),
        ]
        for row, found in zip(table.rows, answers, strict=True)
    ]
    return markdown(header, rows, right=range(2, 2 + len(table.metrics)))


def _preset_cell(row: Row) -> str:
    if not row.preset:
        return NO_CELL
    flags = [_flag(name.replace("_", "-"), value) for name, value in row.changes.items()]
    return f"`{' '.join([row.preset, *flags, *(['--tta'] if row.tta else [])])}`"


def _flag(name: str, value: Any) -> str:
    return f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name} {value}"


def _source_cell(row: Row, metrics: Sequence[str]) -> str:
    """The letters of a row's sources; where its numbers have different ones, which are whose."""
    by_sources: dict[str, list[str]] = {}
    for metric in metrics:
        letters = " ".join(f"[{letter}]" for letter in row.values[metric].sources)
        if letters:
            by_sources.setdefault(letters, []).append(METRICS[metric].heading)
    if len(by_sources) == 1:
        return next(iter(by_sources))
    return ", ".join(f"{names[0]}{f' to {names[-1]}' if len(names) > 1 else ''} {s}" for s, names in by_sources.items())


def _measured_cell(row: Row, table: PublishedTable, found: Sequence[Measurement]) -> str:
    if not row.preset:
        return NO_CELL
    if table.split == "test-dev":
        return SERVER_CLOSED
    if not found:
        return NOT_MEASURED
    runs = f" ({len(found)} runs)" if len(found) > 1 else ""
    parts = []
    for metric in table.metrics:
        values = [one.values[metric] for one in found if metric in one.values]
        if values:
            parts.append(f"{METRICS[metric].heading} {summary(values, metric)}")
    return ", ".join(parts) + runs


def summary(values: Sequence[float], metric: str) -> str:
    """`41.0`, or `41.0 ± 0.2` over several runs: mean and sample standard deviation, AP in points."""
    _, factor, digits = METRICS[metric]
    mean = f"{factor * statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {factor * statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def others_table(others: Sequence[Measurement], presets: Mapping[str, TrainConfig], published: Published) -> str:
    """Runs that answer no row, with what makes them different from the preset they began as."""
    some = [metric for metric in ("VOC07", "VOC12", "iou_error") if any(metric in one.values for one in others)]
    metrics = ["AP", "AP50", "AP75", *some]
    header = ["run", "preset", "data", *(METRICS[metric].heading for metric in metrics), "differs"]
    rows = []
    for one in others:
        cells = [summary([one.values[m]], m) if m in one.values else NO_CELL for m in metrics]
        data = f"{one.data} {one.split}{', multi-scale test' if one.tta else ''}"
        rows.append([f"`{one.run}`", f"`{one.config.preset}`", data, *cells, _why(one, presets, published)])
    return markdown(header, rows, right=range(3, len(header) - 1))


def _why(one: Measurement, presets: Mapping[str, TrainConfig], published: Published) -> str:
    if one.config.preset not in presets:
        return "began as no known preset"
    found = differences(one, presets[one.config.preset], published.images)
    if not found:
        return "nothing; no row of a table"
    more = len(found) - SHOWN_DIFFERENCES
    return ", ".join(found[:SHOWN_DIFFERENCES]) + (f" and {more} more" if more > 0 else "")


def origins_table(measured: Sequence[Measurement]) -> str:
    """Commit and device of each run."""
    origins = dict.fromkeys((one.run, one.config.seed, one.commit, one.device) for one in measured)
    rows = [[f"`{run}`", str(seed), commit or "unknown", device or "unknown"] for run, seed, commit, device in origins]
    return markdown(["run", "seed", "commit", "device"], rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A Markdown table whose columns are aligned in plain text too; `right` are the columns aligned right."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    rule = ["-" * (width - 1) + ":" if column in right else "-" * width for column, width in enumerate(widths)]
    lines = [
        [cell.rjust(width) if column in right else cell.ljust(width) for column, (cell, width) in enumerate(parts)]
        for parts in (zip(row, widths, strict=True) for row in cells)
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], rule, *lines[1:]])


# Command


def report_parser(method: str) -> OneLineParser:
    """`python -m <method>.report [RUN_DIR...]`, and what prepares a submission to COCO's test server."""
    parser = OneLineParser(
        prog=f"python -m {method}.report",
        description="Published numbers beside the measured ones of run folders, as Markdown tables.",
    )
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN_DIR", help=f"run folders; default: all in runs/{method}"
    )
    parser.add_argument(
        "--out", type=Path, help="also write the tables into this Markdown file; of --submission: the zip"
    )
    group = parser.add_argument_group("submission to COCO test-dev")
    group.add_argument("--submission", type=Path, metavar="DETECTIONS.json", help="check it and make the zip")
    group.add_argument("--image-info", type=Path, metavar="FILE", help="annotations/image_info_test-dev2017.json")
    group.add_argument("--name", help="of the method, part of the file's name")
    group.add_argument(
        "--trim", action="store_true", help="keep the 100 best detections of each image, drop the others"
    )
    return parser


def check_modes(arguments: argparse.Namespace, more: Mapping[str, object] | None = None) -> None:
    """UserError where a command line of `report_parser` mixes the things that the command does, or lacks a part of one.

    Args:
        arguments: of the command line.
        more: values of a method's own flags that choose something else to do, by the flag's name.
    """
    modes = {"RUN_DIR": arguments.runs, "--submission": arguments.submission, **(more or {})}
    given = [name for name, value in modes.items() if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} do not go together; run the command once for each")
    of_submission = {"--image-info": arguments.image_info, "--name": arguments.name, "--trim": arguments.trim}
    for name, value in of_submission.items():
        if value and not arguments.submission:
            raise UserError(f"{name} belongs to --submission DETECTIONS.json")
        if not value and arguments.submission and name != "--trim":
            raise UserError(f"--submission needs {name} too")


def submit(arguments: argparse.Namespace, method: str, published: Published) -> None:
    """Write the zip for COCO's test-dev server, then say what it is good for."""
    from core.submission import write_submission

    out = write_submission(
        arguments.submission, arguments.image_info, arguments.name, arguments.out, trim=arguments.trim
    )
    print(f"written to {out}\n{CLOSED_NOTE}")
    for table in published.tables:
        if table.split == "test-dev":
            print(f"\n{table.title}:\n\n{published_table(table, [[]] * len(table.rows))}", end="")
    print(f"\npython -m {method}.report tells what the letters stand for")


def print_report(
    folders: Sequence[Path], out: Path | None, method: str, published: Published, presets: Mapping[str, TrainConfig]
) -> None:
    """Print the tables, write them into `out` if given, and draw each run's number of positives where it was logged.

    Without folders all of runs/<method> are read; a damaged one among these costs a warning line, a named one ends the
    command with UserError.
    """
    config_type = type(next(iter(presets.values())))
    if folders:
        measured = read_runs(folders, method, config_type)
    else:
        measured = list(_readable(find_runs(Path("runs", method)), method, config_type))
    text = report(published, measured, presets)
    print(text, end="")
    if out is not None:
        replace_file(out, text.encode())
        print(f"\nwritten to {out}")
    for folder in folders:
        _draw_positives(folder)


def _readable(folders: Iterable[Path], method: str, config_type: type[TrainConfig]) -> Iterator[Measurement]:
    for folder in folders:
        try:
            yield from read_run(folder, method, config_type)
        except UserError as error:
            print(f"warning: left out: {error}", file=sys.stderr)


def _draw_positives(folder: Path) -> None:
    """`positives.png` of a run whose log has the term."""
    if not (folder / "log.jsonl").exists():
        return
    from core.runlog import LOG, draw_term, read_log

    rows = [row for row in read_log(folder / LOG) if row.get("split") == "train" and row.get("positives") is not None]
    if rows:
        draw_term(rows, "positives", folder / "positives.png", f"{folder}: positive anchors of an image")
        print(f"drawn: {folder / 'positives.png'}")
