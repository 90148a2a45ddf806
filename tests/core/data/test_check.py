"""The checker: every check finds what is planted for it, agrees with the strict readers, and can be mended."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from core.data import sources
from core.data.check import (
    BoxView,
    Checked,
    check_data,
    fills_image,
    image_rows,
    outside,
    partly_outside,
    repeated_names,
    repeated_rows,
    same_boxes,
    stretched,
    tiny,
)
from core.data.findings import count_split, to_json, to_text
from core.data.lenient import BoxRows, ImageRows
from core.data.problems import CHECKS, CODES, check_table
from core.data.repair import write_repaired
from core.data.sources import SPLITS, open_data, split_names
from core.errors import UserError
from tests.core.data.planted import PLANTED, Place, Planted

README = Path(__file__).parents[3] / "core/README.md"


def cases(only: str = "") -> Any:
    chosen = [case for case in PLANTED if only in ("", CHECKS[case.check].severity)]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name or case.check)


def errors(checked: Checked) -> set[str]:
    return {name for name in checked.problems.counts if CHECKS[name].severity == "error"}


def accepts(data: Path, *, images: bool = True) -> bool:
    """Whether the strict readers take every split (and image) as they stand, without leaving anything out."""
    try:
        splits = split_names(str(data))
        source = open_data(str(data), splits=splits)
        for table in source.tables.values():
            for index in range(len(table) if images else 0):
                table.read_image(index)
    except UserError:
        return False
    return not any("dropped" in note for table in source.tables.values() for note in table.notes)


def content_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_check_is_planted() -> None:
    assert {case.check for case in PLANTED} == set(CHECKS)
    names = [case.name or case.check for case in PLANTED]
    assert len(names) == len(set(names))
    assert len(CHECKS) >= 30
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in CHECKS)


def test_a_clean_set_has_no_problem(tmp_path: Path) -> None:
    folder = Place(tmp_path / "coco").write()
    checked = check_data(str(folder), pixels=True)
    assert checked.problems.counts == {}
    assert accepts(folder)
    assert to_text(checked) == (
        "train: 4 images (0 without boxes), 24 boxes and 0 crowd; small 24, medium 0, large 0; cat 12, dog 12\n"
        "val: 3 images (0 without boxes), 18 boxes and 0 crowd; small 18, medium 0, large 0; cat 9, dog 9\n\n"
        "0 errors, 0 warnings: training can read this data."
    )


class Made(NamedTuple):
    """A planted case and what the checker says of it."""

    folder: Path
    data: Path
    checked: Checked


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Planted], Made]:
    """Plants every case once for all tests, which only read it."""
    made: dict[str, Made] = {}

    def make(case: Planted) -> Made:
        name = case.name or case.check
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            data = case.plant(folder)
            made[name] = Made(folder, data, check_data(str(data)))
        return made[name]

    return make


@cases()
def test_planted_problem_is_found(make: Callable[[Planted], Made], case: Planted) -> None:
    checked = make(case).checked
    first = checked.problems.found[case.check][0]
    assert first.file.endswith(case.file)
    assert first.id == case.id or (case.id is None and "coco" in first.file)
    assert case.value is None or first.value == case.value
    assert f"  {case.check}: " in to_text(checked)
    if CHECKS[case.check].severity == "error":
        assert errors(checked) == {case.check}  # nothing else is said of it
    else:
        assert not errors(checked)


@cases()
def test_strict_readers_agree(make: Callable[[Planted], Made], case: Planted) -> None:
    assert accepts(make(case).data) == (CHECKS[case.check].severity == "warning")


@cases("error")
def test_repaired_copy_passes(tmp_path: Path, make: Callable[[Planted], Made], case: Planted) -> None:
    made = make(case)
    before = content_of(made.folder)
    write_repaired(made.checked, tmp_path / "out")
    again = check_data(str(tmp_path / "out/data.yaml"))
    assert not errors(again)
    assert accepts(tmp_path / "out/data.yaml")
    assert content_of(made.folder) == before
    left_out = CHECKS[case.check].repair == "split left out" and case.name != "yaml-split"
    assert set(again.splits) == ({"train"} if left_out else {"train", "val"})


def boxes_left(folder: Path, split: str = "val") -> dict[int, dict[str, Any]]:
    content = json.loads((folder / f"annotations/{split}.json").read_text())
    return {entry["id"]: entry for entry in content["annotations"]}


def repaired(tmp_path: Path, name: str) -> tuple[list[str], Path]:
    """Notes and folder of the repaired copy of a planted case."""
    case = next(case for case in PLANTED if name == (case.name or case.check))
    checked = check_data(str(case.plant(tmp_path)))
    return write_repaired(checked, tmp_path / "out"), tmp_path / "out"


def test_repair_drops_only_the_bad_box(tmp_path: Path) -> None:
    notes, out = repaired(tmp_path, "box-outside")
    original = json.loads((tmp_path / "coco/annotations/instances_val2017.json").read_text())
    assert list(boxes_left(out).values()) == [entry for entry in original["annotations"] if entry["id"] != 2]
    assert notes == [
        "train: 4 of 4 images kept",
        "train: 24 of 24 boxes kept",
        "val: 3 of 3 images kept",
        "val: 17 of 18 boxes kept; dropped: box-outside 1",
    ]


def test_repair_drops_boxes_with_their_image(tmp_path: Path) -> None:
    notes, out = repaired(tmp_path, "image-corrupt")
    assert {entry["image_id"] for entry in boxes_left(out).values()} == {11, 13}
    assert "val: 2 of 3 images kept; dropped: image-corrupt 1" in notes
    assert "val: 12 of 18 boxes kept; dropped: with their image 6" in notes


def test_repair_of_images_with_one_id(tmp_path: Path) -> None:
    notes, _ = repaired(tmp_path / "equal", "image-id-duplicate")
    assert "val: 3 of 4 images kept; dropped: image-id-duplicate 1" in notes
    assert "val: 18 of 18 boxes kept" in notes
    notes, out = repaired(tmp_path / "other", "two-files-one-id")  # nobody knows whose the boxes of 12 are
    assert "val: 2 of 4 images kept; dropped: image-id-duplicate 2" in notes
    assert {entry["image_id"] for entry in boxes_left(out).values()} == {11, 13}


def test_repair_mends_what_is_certain(tmp_path: Path) -> None:
    for name, note in [
        ("image-size-invalid", "val: sizes of images taken from their files: 1"),
        ("image-size-swapped", "val: sizes of images taken from their files: 1"),
        ("area-invalid", "val: areas removed: 1"),
        ("box-id-duplicate", "val: annotation ids renumbered: 1"),
        ("category-id-duplicate", "val: categories dropped for an id used before: 1"),
        ("number-in-text", "val: entries with numbers in text converted: 1"),
        ("width-in-text", "val: entries with numbers in text converted: 1"),
    ]:
        notes, out = repaired(tmp_path / name, name)
        assert note in notes
        assert "val: 18 of 18 boxes kept" in notes
        assert len(boxes_left(out)) == 18
    content = json.loads((tmp_path / "image-size-invalid/out/annotations/val.json").read_text())
    assert content["images"][1] == {"id": 12, "file_name": "12.png", "height": 48, "width": 64}
    assert "area" not in boxes_left(tmp_path / "area-invalid/out")[2]
    assert boxes_left(tmp_path / "number-in-text/out")[2]["image_id"] == 11


def test_repair_makes_classes_agree_by_name(tmp_path: Path) -> None:
    notes, out = repaired(tmp_path, "swapped-ids")
    assert "val: categories renumbered: 2" in notes
    val = json.loads((out / "annotations/val.json").read_text())
    assert val["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert [boxes_left(out)[number]["category_id"] for number in (1, 2, 3)] == [2, 1, 2]  # cats were called 1
    notes, out = repaired(tmp_path / "new", "categories-differ")
    assert "train: categories added from other splits: 1" in notes
    assert [c["name"] for c in json.loads((out / "annotations/val.json").read_text())["categories"]] == [
        "cat",
        "dog",
        "kite",
    ]
    assert boxes_left(out)[2]["category_id"] == 3


def test_repair_keeps_unread_parts(tmp_path: Path) -> None:
    place = Place(tmp_path / "coco")
    place.val |= {"info": {"year": 2026}, "licenses": [{"id": 1, "name": "free"}]}
    place.val["annotations"][0]["segmentation"] = [[1.25, 2, 3]]
    place.val["annotations"][1] |= {"area": -1, "note": None}
    write_repaired(check_data(str(place.write())), tmp_path / "out")
    content = json.loads((tmp_path / "out/annotations/val.json").read_text())
    assert content["info"] == {"year": 2026}
    assert content["licenses"] == [{"id": 1, "name": "free"}]
    assert content["annotations"][0] == place.val["annotations"][0]
    del place.val["annotations"][1]["area"]
    assert content["annotations"][1] == place.val["annotations"][1]


def test_repaired_json_has_no_nan(tmp_path: Path) -> None:
    _, out = repaired(tmp_path, "json-nan")
    assert boxes_left(out)[1]["segmentation"] == [[None]]
    assert "json-nan" not in check_data(str(out / "data.yaml")).problems.counts


def test_repaired_voc_keeps_its_boxes(tmp_path: Path) -> None:
    notes, out = repaired(tmp_path, "voc-zero")
    assert "val: VOC's XML became a COCO file; objects marked difficult are ordinary ones there" in notes
    assert [entry["bbox"] for entry in boxes_left(out).values()] == [[9, 7, 31, 23], [2, 3, 18, 22], [9, 7, 31, 23]]
    before = open_data(str(tmp_path / "voc"))
    after = open_data(str(out / "data.yaml"))
    np.testing.assert_array_equal(after.train.boxes_xywh, before.train.boxes_xywh)
    np.testing.assert_array_equal(after.train.labels, before.train.labels)
    assert after.categories == before.categories


def test_corners_counted_from_0(tmp_path: Path) -> None:
    case = next(case for case in PLANTED if case.check == "voc-zero-based")
    checked = check_data(str(case.plant(tmp_path)), one_based=False)
    assert "voc-zero-based" not in checked.problems.counts
    write_repaired(checked, tmp_path / "out")
    assert boxes_left(tmp_path / "out")[1]["bbox"] == [0, 4, 20, 21]


def test_drawn_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SHAPES_SPLITS", {"train": 12, "val": 2})
    checked = check_data("shapes")
    assert not errors(checked)
    assert {name: count_split(split)["images"] for name, split in checked.splits.items()} == {"train": 12, "val": 2}
    assert sum(entry["boxes"] for entry in count_split(checked.splits["train"])["classes"]) > 12


def test_nothing_is_left_to_write(tmp_path: Path) -> None:
    place = Place(tmp_path / "coco")
    for split in ("train", "val"):
        for path in (place.folder / f"{split}2017").iterdir():
            path.unlink()
    checked = check_data(str(place.write()))
    assert checked.problems.counts["image-missing"] == {"train": 4, "val": 3}
    with pytest.raises(UserError, match="nothing to write"):
        write_repaired(checked, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", range(12))
def test_several_problems_at_once(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    place = Place(tmp_path / "coco")
    bad = [{"bbox": [70, 1, 2, 3]}, {"bbox": [1, 1, 0, 3]}, {"image_id": 77}, {"category_id": "x"}, {"area": -2}]
    chosen = rng.choice(len(bad), rng.integers(0, len(bad)), replace=False)
    for row, number in zip(rng.choice(18, len(chosen), replace=False), chosen, strict=True):
        place.val["annotations"][row] |= bad[number]
    if seed % 3 == 0:
        place.path("val", 12).unlink()
    data = place.write()
    checked = check_data(str(data))
    assert checked.problems.count("error") == len(chosen) + (seed % 3 == 0)
    assert accepts(data) == (not errors(checked))
    write_repaired(checked, tmp_path / "out")
    assert not errors(check_data(str(tmp_path / "out/data.yaml")))
    assert accepts(tmp_path / "out/data.yaml")


def test_missing_image_names_its_neighbour(tmp_path: Path) -> None:
    place = Place(tmp_path / "coco")
    place.path("val", 12).rename(place.path("val", 12).with_suffix(".PNG"))
    problem = check_data(str(place.write())).problems.found["image-missing"][0]
    assert problem.note == "is not there; there is 12.PNG"


def test_boxes_of_an_unreadable_image_entry_are_no_problem_of_their_own(tmp_path: Path) -> None:
    place = Place(tmp_path / "coco")
    place.val["images"][1]["file_name"] = None
    place.val["categories"][1]["name"] = None
    assert errors(check_data(str(place.write()))) == {"field-wrong-type", "categories-differ"}


def test_pixels_finds_what_headers_do_not_tell(tmp_path: Path) -> None:
    place = Place(tmp_path / "coco")
    content = place.path("val", 12).read_bytes()
    middle = len(content) // 2
    place.path("val", 12).write_bytes(content[:middle] + bytes(200) + content[middle + 200 :])
    with Image.open(place.path("val", 13)) as image:
        place.val["images"].append(place.new_image("val", 14))
        image.save(place.path("val", 14), compress_level=0)  # the same pixels in other bytes
    data = str(place.write())
    assert set(check_data(data).problems.counts) == {"image-without-boxes"}
    found = check_data(data, pixels=True).problems
    assert set(found.counts) == {"image-without-boxes", "image-corrupt", "image-duplicate"}
    assert found.found["image-corrupt"][0].id == 12
    assert found.found["image-duplicate"][0].note.endswith("13.png")


def test_json_of_hostile_values(tmp_path: Path) -> None:
    place = Place(tmp_path / "coco")
    values = ["x" * 10**6, 10**300, "\x1b[31m\n", "\ud800", [[[1]]], {"a": 1}, True, None, 1e999]
    for entry, value in zip(place.val["annotations"], values, strict=False):
        entry["category_id"] = value
    place.val["images"][0]["file_name"] = "\x1b\ud800"
    checked = check_data(str(place.write()), examples=100)
    text = json.dumps(to_json(checked), allow_nan=False) + to_text(checked)
    assert "\x1b" not in text
    assert len(text) < 20_000
    text.encode()
    write_repaired(checked, tmp_path / "out")
    assert not errors(check_data(str(tmp_path / "out/data.yaml")))


# Rules over many boxes, against obvious loops


def random_view(seed: int, count: int) -> BoxView:
    rng = np.random.default_rng(seed)
    xywh = rng.integers(-3, 12, (count, 4)).astype(float)
    xywh[:, 2:] = abs(xywh[:, 2:]) * rng.choice([1, 1, 9], (count, 1))
    sizes = rng.choice([8.0, 10.0, np.nan], (2, count))
    return BoxView(xywh, sizes[0], sizes[1], np.full(count, np.nan), rng.integers(0, 2, count))


@pytest.mark.parametrize("count", [0, 1, 300])
def test_rules_by_hand(count: int) -> None:
    view = random_view(count, count)
    for row, (x, y, w, h) in enumerate(view.xywh.tolist()):
        height, width = view.heights[row].item(), view.widths[row].item()
        assert outside(view)[row] == (x >= width or y >= height or x + w <= 0 or y + h <= 0)
        assert partly_outside(view)[row] == (x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1)
        assert tiny(view)[row] == (w < 2 or h < 2)
        assert stretched(view)[row] == (min(w, h) >= 2 and max(w, h) > 20 * min(w, h))
        assert fills_image(view)[row] == (w >= width and h >= height and not view.crowd[row])


@pytest.mark.parametrize("count", [0, 1, 2, 200])
def test_same_boxes_by_hand(count: int) -> None:
    rng = np.random.default_rng(count)
    one = np.ones(count, np.int64)
    boxes = BoxRows(
        positions=one,
        ids=one,
        image_ids=rng.integers(0, 3, count),
        category_ids=rng.integers(0, 2, count),
        crowd=(rng.random(count) < 0.2).astype(np.int64),
        difficult=one.astype(bool),
        xywh=rng.integers(0, 3, (count, 4)).astype(float),
        areas=one.astype(float),
        drop=(rng.random(count) < 0.2).astype(np.int16),
    )
    again, other = same_boxes(boxes)
    groups: dict[tuple[float, ...], list[int]] = {}
    for row in range(count):
        if not boxes.drop[row] and not boxes.crowd[row]:
            groups.setdefault((boxes.image_ids[row], *boxes.xywh[row]), []).append(row)
    kinds = [[boxes.category_ids[row].item() for row in rows] for rows in groups.values()]
    assert again.sum() == sum(len(some) - len(set(some)) for some in kinds)
    assert other.sum() == sum(len(set(some)) - 1 for some in kinds)
    assert not (again & other).any()
    assert not (boxes.drop[again | other] + boxes.crowd[again | other]).any()


def test_repeated_and_rows() -> None:
    assert repeated_rows(np.array([3, 1, 3, 3, 2])).tolist() == [False, False, True, True, False]
    assert repeated_names(["b", "a", "b"]).tolist() == [False, False, True]
    empty = np.zeros(0, np.int64)
    assert repeated_rows(empty).tolist() == repeated_names([]).tolist() == []
    images = ImageRows(
        np.arange(3), np.array([5, 2, 5]), np.ones(3, int), np.ones(3, int), ["", "", ""], np.zeros(3, np.int16)
    )
    assert image_rows(images, np.array([5, 2, 9, -1])).tolist() == [0, 1, -1, -1]
    none = ImageRows(empty, empty, empty, empty, [], np.zeros(0, np.int16))
    assert image_rows(none, np.array([5])).tolist() == [-1]


# The command


def command(*arguments: object) -> tuple[int, str, list[str]]:
    """Exit code, output and error lines of `python -m core.data check`."""
    done = subprocess.run(
        [sys.executable, "-m", "core.data", "check", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr.splitlines()


def test_command(tmp_path: Path) -> None:
    place = Place(tmp_path / "coco")
    for entry in place.val["annotations"][:5]:
        entry["bbox"] = [99, 1, 2, 3]
    data = place.write()
    code, out, lines = command(data, "--json", tmp_path / "found.json", "--examples", 2)
    assert (code, lines) == (2, [f"error: data {data}: 5 errors, listed above"])
    assert "  box-outside: 5 (val 5)" in out
    assert out.count("annotation ") == 2
    assert "... and 3 more" in out
    code, out, lines = command(data, "--json", "-", "--examples", 2)
    assert (code, lines) == (2, [f"error: data {data}: 5 errors"])
    content = json.loads(out)
    assert content == json.loads((tmp_path / "found.json").read_text())
    assert_schema(content)
    code, out, lines = command(data, "--fix", tmp_path / "out")
    assert (code, lines) == (0, [])
    assert f"train on it with --data {tmp_path / 'out/data.yaml'}" in out
    assert "val: 13 of 18 boxes kept; dropped: box-outside 5" in out
    code, _, lines = command(data, "--fix", tmp_path / "out")
    assert (code, lines) == (2, [f"error: {tmp_path / 'out'}: is not empty; name a new folder"])


def assert_schema(content: dict[str, Any]) -> None:
    """The form that `core/README.md` promises."""
    assert set(content) == {"data", "errors", "warnings", "splits", "checks"}
    assert set(content["splits"]) <= set(SPLITS)
    for split in content["splits"].values():
        sizes = {"images", "without_boxes", "boxes", "crowd", "difficult", "small", "medium", "large"}
        assert {key for key, value in split.items() if isinstance(value, int)} == sizes
        assert all(set(entry) == {"id", "name", "boxes"} for entry in split["classes"])
    for check in content["checks"]:
        assert set(check) == {"name", "severity", "meaning", "repair", "count", "splits", "examples"}
        assert sum(check["splits"].values()) <= check["count"] > 0
        for example in check["examples"]:
            assert set(example) == {"split", "file", "entry", "id", "field", "value", "note"}


def test_command_mistakes_and_help(tmp_path: Path) -> None:
    code, out, _ = command("--help")
    assert code == 0
    assert all(flag in out for flag in ("--pixels", "--json", "--fix", "--examples", "exit code: 0"))
    for arguments, part in [
        ((tmp_path / "nowhere",), "no such folder"),
        ((tmp_path / "nowhere.yaml",), "no such folder"),
        ((tmp_path, "--examples", -1), "--examples must not be negative"),
        (("shapes", "--fix", tmp_path / "out"), "nothing to mend"),
    ]:
        code, _, lines = command(*arguments)
        assert (code, len(lines)) == (2, 1), lines
        assert part in lines[0]


def test_readme_lists_the_checks() -> None:
    assert check_table() in README.read_text(encoding="utf-8")


def test_codes_fit_their_type() -> None:
    assert max(CODES.values()) + 1 < 2**15
    assert 0 not in CODES.values()


@pytest.mark.parametrize("data", ["bccd.yaml", "bccd/VOC", "coco_mini.yaml"])
def test_real_data(shared: Path, data: str) -> None:
    checked = check_data(str(shared / "data" / data))
    expected = {"bccd/VOC": {"box-zero-area": {"train": 1, "val": 1}}}.get(data, {})
    assert {name: dict(checked.problems.counts[name]) for name in errors(checked)} == expected
    assert accepts(shared / "data" / data, images=False) == (not expected)
