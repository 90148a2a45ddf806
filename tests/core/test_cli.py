"""Flags from config fields: layers, help, and one line for every mistake."""

import errno
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from core import cli
from core.config import PyramidConfig
from core.errors import UserError

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Config(PyramidConfig):
    """A method of its own."""

    steps: int | None = 100
    topk: int = 9  # anchors offered to each object, 50% of them useful
    size: Literal[320, 512] = 320  # pixels
    voting: bool = True  # refine boxes
    pair: tuple[float, float] = (0.1, 0.2)  # two thresholds

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk < 1:
            raise ValueError(f"topk must be at least 1, got {self.topk}")


PRESETS = {
    "r50_1x": Config(),
    "quick": Config(data="shapes", steps=30, batch_size=8),
    "long": Config(steps=None, epochs=12.0),
}


def parse(*argv: str) -> Config:
    return cli.parse_config(PRESETS, "toy", "Train a toy.", argv)


def refuse(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of a refused command line."""
    with pytest.raises(SystemExit) as leaving:
        parse(*argv)
    captured = capsys.readouterr()
    assert leaving.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.strip()


def test_no_flag_is_the_first_preset() -> None:
    config = parse()
    assert config == Config(preset="r50_1x", out="runs/toy/r50_1x")


def test_every_field_is_a_flag() -> None:
    line = """--preset quick --topk 13 --size 512 --no-voting --pair 1/4 0.5 --milestones 1/2 3/4 --dcn-stages 3 4 5
        --lr 1e-3 --seed 7 --compile --short-side-min 640 --warmup linear --backbone resnet18 --steps 1e3
        --data ../x/bccd.yaml --weights best.pt --workers 0"""
    config = parse(*line.split())
    assert (config.topk, config.size, config.voting, config.pair) == (13, 512, False, (0.25, 0.5))
    assert (config.milestones, config.dcn_stages, config.lr) == ((0.5, 0.75), (3, 4, 5), 0.001)
    assert (config.seed, config.compile, config.short_side_min, config.warmup) == (7, True, 640, "linear")
    assert (config.backbone, config.steps, config.data, config.workers) == ("resnet18", 1000, "../x/bccd.yaml", 0)
    assert config.batch_size == 8  # the preset's


def test_order_is_preset_file_flags(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: quick\nseed: 3\ntopk: 5\n")
    config = parse("--config", str(file), "--topk", "6")
    assert (config.preset, config.batch_size, config.seed, config.topk) == ("quick", 8, 3, 6)
    assert parse("--config", str(file), "--preset", "r50_1x").batch_size == 16


@pytest.mark.parametrize(
    ("argv", "steps", "epochs"),
    [
        (["--steps", "5"], 5, None),
        (["--epochs", "2.5"], None, 2.5),
        (["--preset", "long"], None, 12.0),
        (["--preset", "long", "--steps", "7"], 7, None),
        (["--preset", "quick", "--epochs", "1"], None, 1.0),
    ],
)
def test_steps_and_epochs_replace_each_other(argv: list[str], steps: int | None, epochs: float | None) -> None:
    config = parse(*argv)
    assert (config.steps, config.epochs) == (steps, epochs)


def test_a_warmup_in_steps_replaces_the_one_in_epochs() -> None:
    presets = {"a": Config(warmup_epochs=5.0)}
    config = cli.resolve(presets, "toy", {}, {"warmup_steps": 7})
    assert (config.warmup_steps, config.warmup_epochs) == (7, None)
    again = cli.resolve(presets, "toy", {"warmup_steps": 7, "warmup_epochs": 2.0}, {})  # as a run writes it
    assert (again.warmup_steps, again.warmup_epochs) == (7, 2.0)
    assert cli.resolve(presets, "toy", {}, {}).warmup_epochs == 5.0


def test_flag_replaces_the_files_length(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 3\n")
    assert (parse("--config", str(file)).steps, parse("--config", str(file)).epochs) == (None, 3.0)
    assert (
        parse("--config", str(file), "--steps", "9").steps,
        parse("--config", str(file), "--steps", "9").epochs,
    ) == (9, None)


@pytest.mark.parametrize(
    ("argv", "out"),
    [
        ([], "runs/toy/r50_1x"),
        (["--preset", "quick"], "runs/toy/quick"),
        (["--data", "shapes"], "runs/toy/r50_1x-shapes"),
        (["--data", "../shared/bccd.yaml"], "runs/toy/r50_1x-bccd"),
        (["--data", "data/coco.v2/"], "runs/toy/r50_1x-coco.v2"),
        (["--out", "here", "--data", "x"], "here"),
    ],
)
def test_run_folder(argv: list[str], out: str) -> None:
    assert parse(*argv).out == out


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--topkk", "3"], "error: unknown flag --topkk; did you mean '--topk'?"),
        (["--short_side", "3"], "error: unknown flag --short_side; did you mean '--short-side'?"),
        (["--zzzzzz=3"], "error: unknown flag --zzzzzz"),
        (["--step", "3"], "error: unknown flag --step; did you mean '--steps'?"),  # no abbreviations
        (["quick"], "error: unexpected argument 'quick'"),
        (["--preset", "quik"], "error: unknown preset 'quik', there are r50_1x, quick, long; did you mean 'quick'?"),
        (["--geometry", "old"], "error: --geometry must be one of modern, legacy, got 'old'"),
        (["--size", "321"], "error: --size must be one of 320, 512, got '321'; did you mean '320'?"),
        (["--topk", "x"], "error: --topk must be a whole number, got 'x'"),
        (["--topk", "1.5"], "error: --topk must be a whole number, got '1.5'"),
        (["--lr", "nan"], "error: --lr must be a number, got 'nan'"),
        (["--lr", "1/0"], "error: --lr must be a number, got '1/0'"),
        (["--lr"], "error: --lr: expected one argument"),
        (["--pair", "1"], "error: --pair: expected 2 arguments"),
        (["--topk", "0"], "error: topk must be at least 1, got 0"),
        (["--steps", "3", "--epochs", "2"], "error: set exactly one of steps and epochs, got steps 3 and epochs 2.0"),
        (["--config", "absent.yaml"], "error: absent.yaml: no such configuration file"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], line: str) -> None:
    assert refuse(capsys, *argv) == line


def test_dry_run_is_a_configuration_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["--preset", "quick", "--milestones", "1/3", "--seed", "9", "--dcn-stages"]
    with pytest.raises(SystemExit) as leaving:
        parse(*argv, "--dry-run")
    assert leaving.value.code == 0
    printed = capsys.readouterr().out
    assert "# learning rate 0.005: 0.01 * 8 / 16 images" in printed
    assert "# run folder runs/toy/quick" in printed
    (tmp_path / "dry.yaml").write_text(printed)
    assert parse("--config", str(tmp_path / "dry.yaml")) == parse(*argv)


def test_dry_run_of_a_given_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--lr", "0.02", "--dry-run")
    assert "# learning rate 0.02: as given" in capsys.readouterr().out


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "data: --data",
        "hardware: --device",
        "toy: --topk N anchors offered to each object, 50% of them useful [9]",
    ):
        assert part in text
    for field in cli.describe_fields(Config):
        assert f"--{field.name.replace('_', '-')}" in text
        assert field.meaning, f"{field.name} has no comment"


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from core import cli; from core.config import PyramidConfig\n"
        "try: cli.parse_config({'a': PyramidConfig(steps=1)}, 'toy', 'x', sys.argv[1:])\n"
        "except SystemExit: print(sorted({'torch', 'numpy'} & set(sys.modules)))\n"
    )
    for flag in ("--help", "--stepz", "--dry-run"):
        done = subprocess.run([sys.executable, "-c", code, flag], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_subcommands_name_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli.OneLineParser(prog="data")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check").add_argument("--repair", metavar="FILE")
    for argv, line in (
        (["chek"], "did you mean 'check'?"),
        (["check", "--repare", "x"], "error: unknown flag --repare; did you mean '--repair'?"),
        ([], "error: the following arguments are required: command"),
    ):
        with pytest.raises(SystemExit) as leaving:
            parser.parse_args(argv)
        assert leaving.value.code == 2
        error = capsys.readouterr().err
        assert line in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a.json: broken\n twice"), 2, "error: a.json: broken twice\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device", "x.pt"), 2, "error: x.pt: No space left on device\n"),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), 2, "error: runs: Permission denied\n"),
    ],
)
def test_run_says_one_line(capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as leaving:
        cli.run(main)
    assert leaving.value.code == code
    assert capsys.readouterr().err == line


def test_run_keeps_our_own_mistakes() -> None:
    def main() -> Any:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        cli.run(main)
    with pytest.raises(SystemExit) as leaving:
        cli.run(lambda: None)
    assert leaving.value.code == 0


def test_closed_pipe_is_no_traceback() -> None:
    code = "from core import cli; cli.run(lambda: print('x' * 100000))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 2
    assert done.stderr == "error: the reader of this output closed it\n"
