"""python -m core.data: exit codes and lines, as a user sees them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from core.data.sources import open_data
from core.shapes import draw_image


def command(*arguments: object) -> tuple[int, str, list[str]]:
    """Exit code, output and error lines of `python -m core.data`."""
    done = subprocess.run(
        [sys.executable, "-m", "core.data", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr.splitlines()


def test_shapes_writes_what_data_shapes_draws(tmp_path: Path) -> None:
    code, out, errors = command("shapes", tmp_path / "drawn", "--train", 2, "--val", 1, "--test", 0, "--seed", 5)
    assert (code, errors) == (0, [])
    assert "2 train, 1 val images" in out
    data = open_data(str(tmp_path / "drawn"))
    assert set(data.tables) == {"train", "val"}
    assert (data.train.read_image(1) == draw_image(5, "train", 1)).all()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    code, _, errors = command("shapes", tmp_path / "drawn")
    assert (code, errors) == (2, [f"error: {tmp_path / 'drawn'}: is not empty; name a new folder"])


def test_check(folder: Path, content: dict[str, Any]) -> None:
    code, out, errors = command("check", folder)
    assert (code, errors) == (0, [])
    assert "train: 3 images (1 without boxes), 2 boxes and 1 crowd; small 2, medium 0, large 0; cat 1, kite 1" in out
    (folder / "train2017/a.png").unlink()
    (folder / "train2017/c.png").write_text("no image")
    content["annotations"][0]["bbox"] = "x"
    (folder / "annotations/instances_val2017.json").write_text(json.dumps(content))
    code, out, errors = command("check", folder)
    found = [line.split(":")[0].strip() for line in out.splitlines() if line.startswith("  ") and line[2] != " "]
    assert code == 2
    assert found[:3] == ["field-wrong-type", "image-missing", "image-unreadable"]
    assert errors == [f"error: data {folder}: 3 errors, listed above"]


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    for arguments, part in [
        (("check", tmp_path / "nowhere"), "no such folder"),
        (("shapes", tmp_path / "new", "--train", -1), "must not be negative"),
        (("shapes", tmp_path / "new", "--train", 0, "--val", 0, "--test", 0), "nothing to draw"),
        (("chek", "x"), "did you mean 'check'"),
    ]:
        code, _, errors = command(*arguments)
        assert (code, len(errors)) == (2, 1), errors
        assert errors[0].startswith("error: ")
        assert part in errors[0]
    assert list(tmp_path.glob("new*")) == []
