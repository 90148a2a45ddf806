"""Write the tables of the READMEs from `benchmarks/results/*.json`.

    python -m benchmarks.tables            # rewrites what stands between the markers
    python -m benchmarks.tables --check    # changes nothing; exit code 1 where a table is out of date

A table stands between the lines `<!-- table: NAME -->` and `<!-- end -->`; NAME is a key of `TABLES`.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from core import cli
from core.errors import UserError, nearest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "paa/README.md")
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


def speed_table(results: Path) -> str:
    """What `benchmarks.speed` measured, one row for each case."""
    result = read_result(results / "speed.json")
    if result is None:
        return f"{NOT_MEASURED}\n"
    header = ["what", "compared with", "its ms", "our ms", "times faster", "wanted"]
    table = markdown(header, [speed_cells(row) for row in result["rows"]])
    return f"{table}\n{result['device']}, {result['threads']} threads.\n"


def speed_cells(row: dict[str, Any]) -> list[str]:
    """What was done, what it was compared with, both milliseconds, the ratio and the ratio wanted."""
    times = [_number(row["reference_ms"]), _number(row["ours_ms"])]
    return [row["what"], row["reference"], *times, f"{row['ratio']:.1f}", f"≥ {row['target']:g}"]


TABLES: dict[str, Callable[[Path], str]] = {
    "bccd": bccd_table,
    "coco": coco_table,
    "quick": quick_table,
    "speed": speed_table,
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
