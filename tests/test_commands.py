"""What every method's commands have in common: they answer at once, and a mistake is one line."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.consistency

ROOT = Path(__file__).parents[1]
METHODS = sorted({path.parent.name for path in ROOT.glob("*/config.py")} - {"core"})
COMMANDS = ("train", "evaluate", "predict", "visualize", "report", "convert")
HEAVY = (  # runs a module as `python -m` does, then tells which heavy packages it has loaded
    "import runpy, sys\n"
    "name, *sys.argv[1:] = sys.argv[1:]\n"
    "try:\n"
    "    runpy.run_module(name, run_name='__main__', alter_sys=True)\n"
    "finally:\n"
    "    loaded = {'torch', 'numpy', 'torchvision'} & set(sys.modules)\n"
    "    print('loaded:', *sorted(loaded))\n"
)


def answer(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a module with arguments, in the repository; the last line of stdout names the heavy packages it loaded."""
    return subprocess.run(
        [sys.executable, "-c", HEAVY, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )


def answer_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str, *arguments: str
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that needs torch, run as `python -m` does but in this process."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as leaving:
        runpy.run_module(module, run_name="__main__")
    assert isinstance(leaving.value.code, int)
    return leaving.value.code, *capsys.readouterr()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_without_torch(method: str, command: str) -> None:
    result = answer(f"{method}.{command}", "--help")
    assert result.returncode == 0, result.stderr
    assert f"python -m {method}.{command}" in result.stdout
    assert result.stdout.splitlines()[-1] == "loaded:"


@pytest.mark.parametrize("method", METHODS)
def test_dry_run_prints_the_recipe_and_the_size_of_the_model(
    method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--preset", "quick", "--seed", "3", "--dry-run")
    code, out, _ = answer_here(monkeypatch, capsys, f"{method}.train", *flags)
    assert code == 0
    assert re.search(r"^seed: 3\b", out, flags=re.MULTILINE)
    assert re.search(r"^# model [\d,]+ parameters .* [\d.]+ GFLOPs", out, flags=re.MULTILINE)
    mistake = answer(f"{method}.train", "--preset", "quik", "--dry-run")
    assert (mistake.returncode, mistake.stdout) == (2, "loaded:\n")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("train", "--preset", "quik"), "'quick'"),
        (("train", "--batchsize", "4"), "'--batch-size'"),
        (("train", "--precision", "fp23"), "'fp32'"),
        (("train", "--batch-size", "0"), "batch_size"),
        (("evaluate", "a.pt", "--splt", "val"), "'--split'"),
        (("predict", "a.pt", "b.jpg", "--scor", "0.5"), "'--score'"),
        (("report", "--submision", "d.json"), "'--submission'"),
    ],
)
def test_mistake_is_one_line_that_names_the_nearest(method: str, arguments: tuple[str, ...], names: str) -> None:
    command, *flags = arguments
    result = answer(f"{method}.{command}", *flags)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert names in result.stderr
    assert result.stdout == "loaded:\n"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_missing_weights_are_one_line(
    method: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = () if command == "evaluate" else ("photo.jpg",)
    code, _, errors = answer_here(monkeypatch, capsys, f"{method}.{command}", str(tmp_path / "none.pt"), *image)
    assert code == 2
    assert errors.startswith(f"error: {tmp_path / 'none.pt'}")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_users_own_core_folder_is_named(method: str, tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "__init__.py").write_text("")
    result = subprocess.run(
        [sys.executable, "-m", f"{method}.train", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert str(tmp_path / "core") in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("method", METHODS)
def test_missing_data_says_where_to_get_it_and_what_to_try(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    flags = ("--data", str(tmp_path / "coco"), "--out", str(out))
    code, _, errors = answer_here(monkeypatch, capsys, f"{method}.train", *flags)
    assert code == 2
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert str(tmp_path / "coco") in errors
    assert "--data shapes" in errors
    assert not out.exists()


def test_readme_and_continuous_integration_run_the_same_command() -> None:
    blocks = re.findall(r"```bash\n(.*?)\n```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks[0].endswith("python -m paa.train --preset quick")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert f"{{ {blocks[1]}; }} 2>&1" in script
