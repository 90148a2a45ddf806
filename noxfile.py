"""The gates: `nox` runs what CI runs; `nox -s bench`, `nox -s fresh` and `nox -s oldest` are run on demand.

The default sessions use the current environment, because torch is several gigabytes; `fresh` and `oldest` make a new
one.
"""

import os
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import nox

METHODS = ("paa", "dynamic_atss", "tood_tal", "padet")
SQUARES = ("padet",)  # methods whose network takes squares: --size instead of sides
PACKAGES = ("core", *METHODS, "benchmarks")
WORKERS = ("-n", "auto", "--maxprocesses", "4", "--dist", "worksteal")  # a worker peaks at two gigabytes
UNTRACED = ("-p", "no:jaxtyping", "-o", "addopts=-q --strict-markers")  # torch.compile cannot trace jaxtyping's checks

nox.needs_version = ">=2024.4"
nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "tests", "consistency", "smoke"]


def python(session: nox.Session, *arguments: str, success_codes: tuple[int, ...] = (0,)) -> None:
    """Run a Python module or script with the session's own interpreter."""
    current = session.virtualenv.venv_backend == "none"
    interpreter = sys.executable if current else "python"
    session.run(interpreter, *arguments, external=current, success_codes=success_codes)


def pytest(session: nox.Session, *arguments: str) -> None:
    """Run pytest on all cores with nox's arguments after --, which may select no test at all."""
    nothing_selected = (5,) if session.posargs else ()
    python(session, "-m", "pytest", *WORKERS, *arguments, *session.posargs, success_codes=(0, *nothing_selected))


@nox.session
def lint(session: nox.Session) -> None:
    """Style: ruff's rules and its formatting."""
    python(session, "-m", "ruff", "check", ".")
    python(session, "-m", "ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Static types."""
    python(session, "-m", "mypy", *PACKAGES)


@nox.session
def tests(session: nox.Session) -> None:
    """Every test but the consistency ones; those that trace with torch.compile in a call of their own."""
    pytest(session, "-m", "not compiled and not consistency")
    pytest(session, *UNTRACED, "-m", "compiled")


@nox.session
def consistency(session: nox.Session) -> None:
    """What must hold across packages: import direction, commands, golden arrays, tables that match their results."""
    pytest(session, "-m", "consistency")


@nox.session
def smoke(session: nox.Session) -> None:
    """Every method, side by side: train a few steps on a few drawn images, evaluate, predict, report."""
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/shapes"
        python(session, "-m", "core.data", "shapes", data, "--train", "8", "--val", "4", "--test", "2")
        with ThreadPoolExecutor(min(len(METHODS), os.cpu_count() or 1)) as pool:
            list(pool.map(partial(use, session, data, folder), METHODS))  # raises what the first to fail raised


def use(session: nox.Session, data: str, folder: str, method: str) -> None:
    """A method's commands one after the other, each a process of its own as a user starts it."""
    run = f"{folder}/{method}"
    sides = ("--size", "192") if method in SQUARES else ("--short-side", "96", "--long-side", "128")
    small = ("--channels", "64", *sides, "--batch-size", "2")
    train = ("--preset", "quick", "--data", data, "--steps", "4", *small, "--out", run)
    python(session, "-m", f"{method}.train", *train)
    python(session, "-m", f"{method}.evaluate", f"{run}/best.pt", "--split", "test")
    python(session, "-m", f"{method}.predict", f"{run}/best.pt", f"{data}/test")
    python(session, "-m", f"{method}.report", run, "--out", f"{run}/report.md")


@nox.session
def bench(session: nox.Session) -> None:
    """Speed and memory; arguments after -- choose benchmarks by name."""
    python(session, "-m", "benchmarks.speed", *session.posargs)


def readme_commands(text: str, count: int = 2) -> list[str]:
    """The first shell commands of a README, one for each ```bash block."""
    return [block.strip() for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)][:count]


@nox.session(venv_backend="venv")
def fresh(session: nox.Session) -> None:
    """The README's own two commands in a fresh clone of the last commit and a new virtual environment."""
    with tempfile.TemporaryDirectory() as folder:
        session.run("git", "clone", "--quiet", ".", f"{folder}/clone", external=True)
        shared = os.environ.get("ANCHORAGE_SHARED")
        environment = {"ANCHORAGE_SHARED": str(Path(shared).resolve())} if shared else {}
        with session.chdir(f"{folder}/clone"):
            for command in readme_commands(Path("README.md").read_text(encoding="utf-8")):
                session.run("bash", "-euc", command, env=environment, external=True)


@nox.session(venv_backend="venv")
def oldest(session: nox.Session) -> None:
    """The tests with the oldest supported torch."""
    session.install("torch==2.11.*", "torchvision==0.26.*", "-e", ".[dev]")
    tests(session)
    consistency(session)
