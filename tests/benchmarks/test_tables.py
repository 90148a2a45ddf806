"""Tables in the READMEs come from result files."""

import json
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.run import COMPARISONS
from core.errors import UserError
from dynamic_atss.config import PRESETS as DYNAMIC_PRESETS
from paa.config import PRESETS
from padet.config import PRESETS as PADET_PRESETS
from tood_tal.config import PRESETS as TOOD_PRESETS

COUNTED = {"presets", "dynamic-presets", "tood-presets", "padet-presets"}  # not measured
PAGE = "before\n<!-- table: quick -->\nold\n<!-- end -->\nafter\n"


def write_quick(results: Path, *ap: float, std: float | None) -> None:
    mean = {"AP": sum(ap) / len(ap), "AP50": 0.75, "AP75": 0.5, "seconds": 90.0}
    detector = {
        "training": "300 x 8 images",
        "runs": [{"seed": seed} for seed in range(len(ap))],
        "mean": mean,
        "std": {"AP": std, "AP50": std, "AP75": std},
    }
    (results / "quick.json").write_text(json.dumps({"detectors": {"paa": detector}}))


def test_table_shows_mean_and_deviation_in_percent(tmp_path: Path) -> None:
    write_quick(tmp_path, 0.40, 0.43, std=0.0212)  # mean 0.415
    row = tables.quick_table(tmp_path).splitlines()[2]
    assert row == "| PAA, preset `quick` | 300 x 8 images | 41.5 ± 2.1 | 75.0 ± 2.1 | 50.0 ± 2.1 | 2 |"


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    write_quick(tmp_path, 0.4, std=None)
    assert "| 40.0 | 75.0 | 50.0 | 1 |" in tables.quick_table(tmp_path)


@pytest.mark.parametrize("name", sorted(tables.TABLES.keys() - COUNTED))
def test_missing_results_say_not_measured(name: str, tmp_path: Path) -> None:
    assert "not measured" in tables.TABLES[name](tmp_path)


def test_elastic_table_by_hand(tmp_path: Path) -> None:
    kills = [{"recovery_seconds": seconds} for seconds in (3.0, 9.0, 4.0)]
    killed = {"paa": {"kills": kills, "equal": True}, "tood_tal": {"kills": kills[:1], "equal": False}}
    results = {"killed": killed, "resized": {"paa": {"weights_differ": 2e-7}}, "nodes": {"paa": {"equal": True}}}
    results["empty"] = {"tood_tal": {"steps": 500, "finite": True}}
    write = {"results": results, "device": "cpu", "cpus": 2}
    (tmp_path / "elastic.json").write_text(json.dumps(write))
    rows = tables.elastic_table(tmp_path).splitlines()[2:4]
    assert rows == [
        "| paa | 3; equal; 4 (at most 9) | equal | 2.0e-07 | not measured |",
        "| tood_tal | 1; DIFFERENT; 3 (at most 3) | not measured | not measured | 500 steps, losses finite |",
    ]


def write_ablations(path: Path, **ap: float) -> None:
    """Two seeds of each detector, 2 points of AP apart from their mean."""
    detectors = {
        key: {
            "training": "some steps",
            "runs": [{"seed": 0}, {"seed": 1}],
            "mean": {"AP": mean, "AP50": 0.5, "AP75": 0.5},
            "std": {"AP": 0.02, "AP50": 0.0, "AP75": 0.0},
        }
        for key, mean in ap.items()
    }
    path.write_text(json.dumps({"detectors": detectors, "licence_note": "free"}))


def test_ablations_within_noise_are_called_so(tmp_path: Path) -> None:
    # Standard error sqrt(.02^2 / 2 + .02^2 / 2) = .02; with 2 degrees of freedom 4.303 of them are .086.
    write_ablations(tmp_path / "bccd_ablations.json", paa=0.4, scheme_a=0.48, no_quality=0.31)
    table = tables.ablation_table(tmp_path)
    assert "| scheme (a) | 48.0 ± 2.0 | 50.0 ± 0.0 | 50.0 ± 0.0 | 2 | +8.0, not separable |" in table
    assert "| without IoU prediction | 31.0 ± 2.0 | 50.0 ± 0.0 | 50.0 ± 0.0 | 2 | -9.0 |" in table
    assert "| scheme (b) | not measured | not measured | not measured | not measured | not measured |" in table


def test_rows_of_dynamic_atss_stand_beside_atss(tmp_path: Path) -> None:
    write_ablations(tmp_path / "dynamic_bccd.json", atss=0.4, combined=0.41, predicted_only=0.3)
    lines = tables.dynamic_table(tmp_path).splitlines()
    assert lines[2].endswith("| 40.0 ± 2.0 | 50.0 ± 0.0 | 50.0 ± 0.0 | 2 |  |")
    assert lines[3] == "| Combined IoUs | 41.0 ± 2.0 | 50.0 ± 0.0 | 50.0 ± 0.0 | 2 | +1.0, not separable |"
    assert lines[4].endswith("| not measured | not measured |")
    assert lines[6] == "| predicted IoUs only | 30.0 ± 2.0 | 50.0 ± 0.0 | 50.0 ± 0.0 | 2 | -10.0 |"
    assert lines[-1] == "Each: some steps, preset `small` otherwise. free"


def test_cells_of_tood_stand_above_the_paper_s(tmp_path: Path) -> None:
    path = tmp_path / "tood_bccd.json"
    write_ablations(path, parallel_atss=0.4, t_head_tal=0.5)
    content = json.loads(path.read_text())
    for measured in content["detectors"].values():
        measured["mean"] |= {
            "rank_correlation": 0.4321,
            "top_iou": None,
            "correct": 800.5,
            "redundant": 1234,
            "error": 9,
        }
        measured["std"] |= {"rank_correlation": 0.0123, "top_iou": None, "correct": 20.2, "redundant": 5, "error": 1}
    path.write_text(json.dumps(content))
    lines = tables.tood_table(tmp_path).splitlines()
    numbers = "50.0 ± 0.0 | 50.0 ± 0.0 | 0.432 ± 0.012 | none | 800 ± 20 | 1,234 ± 5 | 9 ± 1 | 2 |"
    assert lines[2] == f"| parallel head, ATSS | 40.0 ± 2.0 | {numbers}  |"
    assert lines[3].startswith("| T-Head, ATSS | not measured |")
    assert lines[5] == f"| T-Head, TAL | 50.0 ± 2.0 | {numbers} +10.0 |"
    assert lines[9] == (
        "| T-Head, TAL, the paper | 42.5 | 59.8 | 46.4 | 0.452 | 0.661 | 30,734 | 15,242 | 69,013 | - | +3.3 |"
    )
    assert len({line.count("|") for line in lines[:10]}) == 1
    assert lines[11] == "Each: some steps, preset `small` otherwise. free"
    content["detectors"]["parallel_atss"]["std"] = dict.fromkeys(measured["std"])
    path.write_text(json.dumps(content))
    assert "| 40.0 | 50.0 | 50.0 | 0.432 | none | 800 | 1,234 | 9 | 2 |" in tables.tood_table(tmp_path)


def test_rows_of_padet_tell_what_detection_learned_from(tmp_path: Path) -> None:
    write_ablations(tmp_path / "padet_bccd.json", baseline=0.3, all=0.4)
    result = json.loads((tmp_path / "padet_bccd.json").read_text())
    for key, negatives in (("baseline", 4500.0), ("all", 150.0)):
        measured = result["detectors"][key]
        measured["mean"] |= {"VOC07": 0.7, "positives": 30.0, "negatives": negatives}
        measured["std"]["VOC07"] = 0.01
    (tmp_path / "padet_bccd.json").write_text(json.dumps(result))
    lines = tables.padet_table(tmp_path).splitlines()
    assert lines[0] == "| row | AP | AP50 | AP75 | VOC07 | positives : negatives | seeds | AP beside the first row |"
    assert lines[2].endswith("| 30.0 ± 2.0 | 50.0 ± 0.0 | 50.0 ± 0.0 | 70.0 ± 1.0 | 1 : 150.0 | 2 |  |")
    assert lines[3] == "| APM scores |" + " not measured |" * 7
    assert lines[11].endswith("| 70.0 ± 1.0 | 1 : 5.0 | 2 | +10.0 |")  # above 4.303 x .02
    assert lines[-1] == "Each: some steps, preset `small` otherwise. free"


def test_every_row_of_a_comparison_is_shown() -> None:
    for name, rows in (
        ("bccd-ablations", tables.ABLATION_ROWS),
        ("dynamic-bccd", tables.DYNAMIC_ROWS),
        ("tood-bccd", tables.TOOD_ROWS),
        ("padet-bccd", tables.PADET_ROWS),
    ):
        assert sorted(row[0] for row in rows) == sorted(COMPARISONS[name].detectors)


def test_preset_sizes() -> None:
    rows = tables.presets_table(Path()).splitlines()
    assert "| `r50_1x` | resnet50 | - | 90,000 of 16 | 800 | 0.01 | 32,295,322 | 32,069,978 |" in rows[3]
    assert "| `r101_dcn_2x_ms` | resnet101 | C3 C4 C5 towers | 180,000 of 16 | 640-800 | 0.01 |" in rows[6]
    assert len(rows) == 2 + len(PRESETS)


def test_preset_sizes_of_dynamic_atss() -> None:
    rows = {line.split("`")[1]: line for line in tables.dynamic_presets_table(Path()).splitlines()[2:]}
    assert set(rows) == set(DYNAMIC_PRESETS)
    # totals of spec section 7; trained are all but stem and C2, 225,344 less
    assert (
        "| gflv2 | P + A | - | resnet50 | - | 12 epochs of 16 | 800 | 0.01 | 32,441,946 | 32,216,602 |"
        in (rows["gflv2_combined_r50_1x"])
    )
    assert (
        "| vfnet | A | - | resnet50 | - | 12 epochs of 16 | 800 | 0.01 | 32,891,554 | 32,666,210 |"
        in (rows["vfnet_r50_1x"])
    )
    assert (
        "| atss | A | focal, centerness | resnet50 | - | 90,000 of 16 | 800 | 0.01 | 32,295,322 |"
        in (rows["atss_r50_1x"])
    )
    for name, compared in (
        ("predicted_only", "P"),
        ("weights_0p5_1", "0.5 P + A"),
        ("weights_1_1p5", "P + 1.5 A"),
        ("weights_up_down", "D_up P + D_down A"),
    ):
        assert f"| atss | {compared} | focal, centerness |" in rows[name]


def test_preset_sizes_of_tood() -> None:
    rows = {line.split("`")[1]: line for line in tables.tood_presets_table(Path()).splitlines()[2:]}
    assert set(rows) == set(TOOD_PRESETS)
    # totals of spec section 1.7; trained are all but stem and C2, 225,344 less
    for name, cells in (
        ("r50_1x", "T-Head | points | ATSS 4 epochs, TAL 1, 6, 13 | resnet50 | - | 12 epochs of 16 | 800 | 0.01 |"),
        ("r50_anchor_based_1x", "T-Head | anchors | ATSS 4 epochs, TAL 1, 6, 13 |"),
        (
            "r101_dcn_2x_ms",
            "T-Head | points | ATSS 4 epochs, TAL 1, 6, 13 | resnet101 | C3 C4 C5 towers | 24 epochs of",
        ),
        ("parallel_atss", "parallel | points | ATSS | resnet50 | - | 12 epochs of 16 | 800 |"),
        (
            "parallel_tap_18e",
            "parallel + TAP | points | ATSS 4 epochs, TAL 1, 6, 13 | resnet50 | - | 18 epochs of 16 |",
        ),
        ("alpha_1p5_beta_8", "T-Head | points | ATSS 4 epochs, TAL 1.5, 8, 13 |"),
        ("atss_1_epoch", "T-Head | points | ATSS 1 epoch, TAL 1, 6, 13 |"),
        ("no_atss_phase", "T-Head | points | TAL 1, 6, 13 |"),
        ("conflict_min_area", "T-Head | points | ATSS 4 epochs, TAL 1, 6, 13, min_area |"),
        ("quick", "T-Head | points | ATSS 33 %, TAL 1, 6, 13 | resnet18 |"),
    ):
        assert f"| `{name}` | {cells}" in rows[name]
    assert "| 32,200,494 | 31,975,150 |" in rows["r50_1x"]
    assert "| 53,619,760 |" in rows["r101_dcn_2x_ms"]
    assert "| 97,813,444 |" in rows["x101_64x4d_dcn_2x_ms"]


def test_preset_sizes_of_padet() -> None:
    rows = {line.split("`")[1]: line for line in tables.padet_presets_table(Path()).splitlines()[2:]}
    assert set(rows) == set(PADET_PRESETS)
    # parameters and GMAC of spec section 1.5
    for name, cells in (
        ("vgg16_384", "scores and boxes | disentangled | vgg16 | 384 | coco | 160 epochs of 32 | 0.002 | 39,631,504"),
        ("vgg16_512", "scores and boxes | disentangled | vgg16 | 512 | coco | 160 epochs of 32 | 0.002 | 43,109,936"),
        (
            "r101_384",
            "scores and boxes | disentangled | resnet101 | 384 | coco | 160 epochs of 32 | 0.002 | 62,040,208",
        ),
        ("baseline", "- | - | vgg16 | 384 | coco | 160 epochs of 32 | 0.002 | "),
        ("apm_c", "scores | - | vgg16 |"),
        ("apm_r", "boxes | - | vgg16 |"),
        ("voc_vgg16_512", "scores and boxes | disentangled | vgg16 | 512 | voc | 250 epochs of 32 |"),
    ):
        assert rows[name].startswith(f"| `{name}` | {cells}")
    for name, giga in (("vgg16_384", 58.7), ("vgg16_512", 104.4)):
        assert float(rows[name].split("|")[-2]) == pytest.approx(giga, rel=0.01)


def write_speed(results: Path, threads: int, *rows: dict[str, object]) -> None:
    (results / "speed.json").write_text(json.dumps({"rows": rows, "device": "a CPU", "threads": threads}))


TIMES: dict[str, object] = {
    "what": "two images",
    "reference": "the dense form",
    "reference_ms": 1234.0,
    "ours_ms": 12.34,
    "ratio": 100.0,
    "target": 10,
}


def test_speed_rows(tmp_path: Path) -> None:
    write_speed(tmp_path, 2, TIMES)
    table = tables.speed_table(tmp_path)
    assert "| two images | the dense form | 1,234 | 12.3 | 100.0 | ≥ 10 |\n\na CPU, 2 threads where" in table
    assert "MB" not in table


def test_memory_has_a_table_of_its_own(tmp_path: Path) -> None:
    write_speed(tmp_path, 1, TIMES, {"what": "one image", "peak_mb": 98.07, "limit_mb": 500})
    tail = tables.speed_table(tmp_path).split("≥ 10 |\n")[1]
    assert tail == (
        "\n| what | MB at most | wanted |\n| --- | ---: | ---: |\n| one image | 98.1 | ≤ 500 |\n"
        "\na CPU, 1 thread where a row does not say otherwise.\n"
    )


def test_shares_have_a_table_of_their_own(tmp_path: Path) -> None:
    part = {"what": "more", "added_ms": 0.8121, "step_ms": 6417.5, "share": 0.01265, "limit": 3}
    write_speed(tmp_path, 1, TIMES, part)
    tail = tables.speed_table(tmp_path).split("≥ 10 |\n")[1]
    assert tail.startswith("\n| what | its ms | the step's ms | % of the step | wanted |\n")
    assert "\n| more | 0.812 | 6,418 | 0.01 | ≤ 3 |\n\na CPU" in tail


def test_update_replaces_only_what_stands_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    assert tables.update([page], tmp_path, check=True) == [page]
    assert page.read_text() == PAGE
    assert tables.update([page], tmp_path, check=False) == [page]
    text = page.read_text()
    assert text.startswith("before\n<!-- table: quick -->\n| detector |")
    assert text.endswith("|\n<!-- end -->\nafter\n")
    assert tables.update([page], tmp_path, check=True) == []


def test_unknown_table_names_the_nearest() -> None:
    with pytest.raises(UserError, match="no table named 'quik'; did you mean 'quick'"):
        tables.filled(PAGE.replace("quick", "quik"), Path())


@pytest.mark.consistency
def test_tables_are_up_to_date() -> None:
    pages = [tables.ROOT / page for page in tables.PAGES if (tables.ROOT / page).exists()]
    assert tables.update(pages, tables.RESULTS, check=True) == []


def test_balance_of_padet_by_hand(tmp_path: Path) -> None:
    names = tables.BALANCES
    ratios = {f"settings.{name}.negatives_per_positive": 10.0 * i for i, name in enumerate(names, start=1)}
    initial = {"mean": {"settings.initial.negatives_per_positive": 500.0, "boxes": 14.6}}
    (tmp_path / "padet_initial.json").write_text(json.dumps({"detectors": {"initial": initial}}))
    (tmp_path / "padet_trained.json").write_text(json.dumps({"detectors": {"padet": {"mean": ratios}}}))
    rows = tables.padet_balance_table(tmp_path).splitlines()[2:]
    assert rows[0].endswith("| 1 : 625 | 1 : 66 | 1 : 105 | 1 : 9.7 |")
    assert "| 1 : 500 |" in rows[1]
    assert "| 1 : 1000 |" in rows[2]  # twice as many objects as COCO's 7.3
    assert rows[3].endswith("| 1 : 10.0 | 1 : 20.0 | 1 : 30.0 | 1 : 40.0 |")
    assert tables.padet_balance_table(tmp_path / "none").count("not measured") == 6
