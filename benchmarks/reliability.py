"""Long checks that runs, checkpoints and processes survive what happens to them.

    python -m benchmarks.reliability              # everything
    python -m benchmarks.reliability soak kills   # some parts; the others' results stay
    python -m benchmarks.tables                   # writes the table in core/README.md

Each part's numbers go into `benchmarks/results/reliability.json` with the run that they come from.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import reliability_files, reliability_kills, reliability_soak
from core import cli
from core.errors import UserError, nearest
from core.runlog import environment, write_json

OUT = Path(__file__).parent / "results" / "reliability.json"
LICENCE_NOTE = "Data: drawn shapes, no licence."


class Part(NamedTuple):
    """One check."""

    measure: Callable[[], dict[str, Any]]  # its numbers
    rows: Callable[
        [dict[str, Any]], list[dict[str, Any]]
    ]  # of the table: what, measured, wanted, and whether it is met


PARTS: dict[str, Part] = {
    "kills": Part(reliability_kills.measure, reliability_kills.rows),
    "corruption": Part(reliability_files.measure_corruption, reliability_files.corruption_rows),
    "crashes": Part(reliability_files.measure_crashes, reliability_files.crash_rows),
    "soak": Part(reliability_soak.measure, reliability_soak.rows),
}


def merged(old: Mapping[str, Any], name: str, part: Mapping[str, Any], origin: Mapping[str, Any]) -> dict[str, Any]:
    """An earlier file's content with one part measured anew, in the order of `PARTS`."""
    parts = {**old.get("parts", {}), name: {**part, "origin": dict(origin)}}
    order = [key for key in PARTS if key in parts] + [key for key in parts if key not in PARTS]
    return {"licence_note": LICENCE_NOTE, "parts": {key: parts[key] for key in order}}


def main() -> None:
    """The command."""
    parser = cli.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(PARTS)} [all]")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file of the results [benchmarks/results/...]")
    options = parser.parse_args()
    for name in options.names:
        if name not in PARTS:
            raise UserError(f"no part named {name!r}{nearest(name, PARTS)}")
    for name in options.names or PARTS:
        origin = environment(torch.device("cpu"), 1, {})
        result = PARTS[name].measure()
        result["rows"] = PARTS[name].rows(result)
        for row in result["rows"]:
            verdict = "" if row["met"] else ", MISSED"
            print(f"{name}: {row['what']}: {row['measured']}, wanted {row['wanted']}{verdict}", flush=True)
        old = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
        write_json(options.out, merged(old, name, result, origin))


if __name__ == "__main__":
    cli.run(main)
