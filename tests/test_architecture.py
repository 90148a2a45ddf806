"""The shape of the source: which package may import which, what must stay light, what every function carries."""

import ast
import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.profiles import PROFILES

pytestmark = pytest.mark.consistency

ROOT = Path(__file__).parents[1]
METHODS = frozenset(path.parent.name for path in ROOT.glob("*/config.py")) - {"core"}
PACKAGES = ("core", *sorted(METHODS), "benchmarks")
LIGHT = (  # import neither torch nor numpy, so that --help and mistakes in flags answer at once
    "core",
    "core.data",
    "core.cli",
    "core.config",
    "core.errors",
    "core.geometry",
    "core.profiles",
    "core.published",
    "core.report",
    *(f"{method}{part}" for method in sorted(METHODS) for part in ("", ".config", ".report")),
    *(f"{path.parent.name}.profiles" for path in sorted(ROOT.glob("*/profiles.py"))),
)
MACHINE_PATH = re.compile(r"(?<![\w.}])/(work|opt|root|home|Users|mnt)/")
LEFTOVER = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def forbidden_imports(package: str, tree: ast.Module) -> list[str]:
    """Imports, anywhere in a file of `package`, that point against the arrows benchmarks -> methods -> core."""
    above = {"core": METHODS | {"benchmarks", "tests"}, "benchmarks": frozenset({"tests"})}
    banned = above.get(package, METHODS - {package} | {"benchmarks", "tests"})
    return [name for name in imported_modules(tree) if name.split(".")[0] in banned]


def imported_modules(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def public_functions(tree: ast.Module) -> Iterator[Function]:
    """Functions and methods without a leading underscore, nested ones left out."""
    for scope in ast.walk(tree):
        if isinstance(scope, ast.Module | ast.ClassDef):
            functions = [node for node in scope.body if isinstance(node, Function)]
            yield from (node for node in functions if not node.name.startswith("_"))


def incomplete(function: Function) -> str:
    """What a public function lacks, or the empty string."""
    arguments = function.args
    named = [a for a in arguments.posonlyargs + arguments.args + arguments.kwonlyargs if a.arg not in ("self", "cls")]
    missing = [argument.arg for argument in named if argument.annotation is None]
    return ", ".join(
        ([] if ast.get_docstring(function) else ["docstring"])
        + ([] if function.returns else ["return type"])
        + [f"type of {name}" for name in missing]
    )


def test_imports_point_from_benchmarks_to_methods_to_core() -> None:
    crossings = {
        f"{path.relative_to(ROOT)} -> {name}"
        for path in sources(*PACKAGES)
        for name in forbidden_imports(path.relative_to(ROOT).parts[0], ast.parse(path.read_text(encoding="utf-8")))
    }
    assert not crossings


@pytest.mark.parametrize(
    ("package", "code", "found"),
    [
        ("core", "import paa.gmm", ["paa.gmm"]),
        ("core", "def f():\n    from paa import gmm", ["paa"]),
        ("core", "from core import boxes", []),
        ("paa", "from core.boxes import box_iou\nfrom paa.gmm import separate", []),
        ("paa", "from benchmarks import speed", ["benchmarks"]),
        ("benchmarks", "import paa, core, tests.conftest", ["tests.conftest"]),
    ],
)
def test_forbidden_imports_are_found(package: str, code: str, found: list[str]) -> None:
    assert forbidden_imports(package, ast.parse(code)) == found


def test_imports_are_absolute() -> None:
    relative = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources(*PACKAGES)
        for name in imported_modules(ast.parse(path.read_text(encoding="utf-8")))
        if name.startswith(".")
    ]
    assert not relative


def test_light_modules_import_no_torch() -> None:
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'numpy'} & set(sys.modules)\n"
        "    if heavy: sys.exit(f'{name} imports {heavy}')\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *LIGHT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_public_functions_are_documented_and_typed() -> None:
    lacking = [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}: {incomplete(function)}"
        for path in sources(*PACKAGES)
        for function in public_functions(ast.parse(path.read_text(encoding="utf-8")))
        if incomplete(function)
    ]
    assert not lacking


def test_incomplete_functions_are_found() -> None:
    code = "class A:\n    def f(self, a, *, b: int): ...\n    def _g(self, a): ...\ndef h() -> None:\n    'Does.'\n"
    assert [incomplete(function) for function in public_functions(ast.parse(code))] == [
        "",
        "docstring, return type, type of a",
    ]


def test_no_machine_paths_and_no_leftovers() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), ROOT / "noxfile.py", ROOT / ".ci" / "run"]
    pages += [page for package in PACKAGES for page in (ROOT / package).rglob("*.md")]
    found = [
        f"{path.relative_to(ROOT)}:{number} {line.strip()}"
        for path in [*sources(*PACKAGES, "tests"), *pages]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE_PATH.search(line) or LEFTOVER.search(line)
    ]
    assert not found


def test_profile_table_says_what_the_profiles_hold() -> None:
    text = (ROOT / "core" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)`: .* \| (yes|no) \| (yes|no) \| (yes|no) \|$", text, flags=re.MULTILINE)
    switches = [field.name for field in dataclasses.fields(PROFILES["ours"])]
    expected = [
        (name, *("yes" if getattr(PROFILES[profile], name) else "no" for profile in ("ours", "mmdet", "official")))
        for name in switches
    ]
    assert rows == expected
