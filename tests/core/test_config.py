"""Configurations: impossible ones, and the YAML file of a run."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from core.config import PyramidConfig, total_steps
from core.configfile import changed_flags, convert, describe_fields, read_yaml, to_yaml
from core.errors import UserError

CONFIG = PyramidConfig(steps=10)


def read(tmp_path: Path, text: str) -> dict[str, Any]:
    (tmp_path / "c.yaml").write_text(text)
    return read_yaml(tmp_path / "c.yaml", PyramidConfig)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lr": 1e-05, "epochs": 2.0, "steps": None},
        {"dcn_stages": (3, 4), "milestones": (1 / 3,), "out": "a # b", "data": "C: x\\y", "weights": "no"},
        {"data": "日本/é ", "backbone_weights": "1.5", "milestones": ()},
        {"data": "x" * 300 + " " + "y" * 300},
    ],
)
def test_yaml_round_trip(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = replace(CONFIG, **changes)
    values = read(tmp_path, to_yaml(config))
    assert PyramidConfig(**values) == config
    assert values == asdict(config)


def test_hand_written_numbers(tmp_path: Path) -> None:
    values = read(tmp_path, "lr: 1e-4\nwarmup_factor: 1/3\nsteps: 90_000\nmilestones: [2/3, 0.9]\nepochs: null\n")
    assert values == {"lr": 1e-4, "warmup_factor": 1 / 3, "steps": 90_000, "milestones": (2 / 3, 0.9), "epochs": None}
    assert read(tmp_path, "") == {}
    assert read(tmp_path, "# nothing\n") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "c.yaml: unknown field 'stepz'; did you mean 'steps'?"),
        ("7: 3", "c.yaml: unknown field 7"),
        ("steps: many", "c.yaml: steps must be a whole number, got 'many'"),
        ("steps: true", "c.yaml: steps must be a whole number, got True"),
        ("steps: [3]", "c.yaml: steps must be a whole number, got [3]"),
        ("lr: .inf", "c.yaml: lr must be a number, got inf"),
        ("lr: 1e999999999", "c.yaml: lr must be a number, got '1e999999999'"),
        ("compile: 1", "c.yaml: compile must be true or false, got 1"),
        ("milestones: 0.5", "c.yaml: milestones must be a list, got 0.5"),
        ("profile: our", "c.yaml: profile must be one of ours, mmdet, official, got 'our'; did you mean 'ours'?"),
        ("data: null", "c.yaml: data must be text, got None; put it in quotes"),
        ("batch_size: null", "c.yaml: batch_size must be a whole number, got None"),
        ("- a\n- b", "c.yaml: must hold lines of the form `field: value`, got a list"),
        ("just words", "c.yaml: must hold lines of the form `field: value`, got a str"),
        ("a: [1", "c.yaml, line 1: not a YAML file of fields: expected ',' or ']', but got '<stream end>'"),
        ("seed: 1\nlr: 2\nseed: 3", "c.yaml, line 1: not a YAML file of fields: 'seed' is set twice"),
        ("data: &a x\nout: *a", "c.yaml, line 2: not a YAML file of fields: aliases are not allowed"),
        ("data: !!python/object/apply:os.system [true]", "c.yaml, line 1: not a YAML file of fields: could not"),
        ("[" * 100_000, "c.yaml: not a YAML file of fields: maximum recursion depth exceeded"),
    ],
)  # fmt: skip
def test_bad_files_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such configuration file"):
        read_yaml(tmp_path / "absent.yaml", PyramidConfig)
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path, PyramidConfig)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="not a YAML file"):
        read_yaml(tmp_path / "b.yaml", PyramidConfig)


def test_convert_by_hand() -> None:
    assert convert("2/3", float) == 2 / 3
    assert convert("none", float | None) is None
    assert convert(3, float) == 3.0
    assert isinstance(convert(3, float), float)
    assert convert("-4", int) == -4
    assert convert(12345678901234567890, int) == 12345678901234567890


def test_fields_have_sections_and_meanings() -> None:
    fields = {field.name: field for field in describe_fields(PyramidConfig)}
    assert fields["data"].section == "data"
    assert fields["workers"].section == "hardware"
    assert fields["batch_size"].meaning == "images over all ranks"


def test_a_section_is_in_one_piece() -> None:
    fields = describe_fields(PyramidConfig)
    sections = [field.section for field in fields]
    assert list(dict.fromkeys(sections)) == ["data", "model", "schedule", "optimiser", "run", "hardware"]
    assert sections == sorted(sections, key=list(dict.fromkeys(sections)).index)
    data = [field.name for field in fields if field.section == "data"]
    assert data[0] == "data"  # the base's come first ...
    assert data[-3:] == ["short_side", "long_side", "short_side_min"]  # ... and its own join them


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 1.0}, "exactly one of steps and epochs"),
        ({"steps": None}, "exactly one of steps and epochs"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": None, "epochs": 0.0}, "epochs must be above 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"short_side": 1400}, "short_side 1400 is larger than long_side 1333"),
        ({"short_side_min": 900}, "short_side_min must be 0 to short_side 800"),
        ({"channels": 100}, "channels must be a multiple of 32"),
        ({"frozen_stages": 6}, "frozen_stages must be 0 to 5"),
        ({"dcn_stages": (1,)}, "dcn_stages must be among 2, 3, 4, 5"),
        ({"milestones": (0.9, 0.5)}, "milestones must be rising fractions"),
        ({"milestones": (60000.0,)}, "milestones must be rising fractions"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"ema": 1.0}, "ema must be in"),
        ({"rank_timeout": 0.0}, "rank_timeout must be above 0 and at most 10,000 minutes, got 0.0"),
    ],
)
def test_impossible_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_derived_values_by_hand() -> None:
    assert replace(CONFIG, batch_size=8).learning_rate == 0.005  # 0.01 * 8 / 16
    assert replace(CONFIG, batch_size=8, lr=0.02).learning_rate == 0.02
    assert total_steps(CONFIG, 1000) == 10
    assert total_steps(PyramidConfig(epochs=12.0), 117_266) == 87_950  # 12 * 117266 / 16 = 87949.5
    assert total_steps(PyramidConfig(epochs=0.01), 10) == 1


def test_changed_options_are_named_as_flags() -> None:
    old = asdict(replace(CONFIG, lr=0.05, milestones=(0.5, 0.75), deterministic=True, seed=1))
    new = replace(CONFIG, milestones=(), weights="a.pt", out="elsewhere")
    assert changed_flags(old, new, free=("out",)) == [
        "--weights '', now a.pt",
        "--milestones 0.5 0.75, now none",
        "--lr 0.05, now none",
        "--seed 1, now 0",
        "--deterministic on, now off",
    ]
    assert changed_flags(asdict(CONFIG), CONFIG) == []


def test_options_that_one_version_does_not_have() -> None:
    old = asdict(CONFIG)
    del old["ema"]  # an option that is new has its default in old runs
    assert changed_flags(old, CONFIG) == []
    assert changed_flags(old, replace(CONFIG, ema=0.9)) == ["--ema 0.0, now 0.9"]
    assert changed_flags({**old, "old_option": 3}, CONFIG) == ["--old-option 3, now gone"]
