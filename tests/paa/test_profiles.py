"""PAA's own switches: complete, as the specification's table, and without torch."""

import subprocess
import sys
from dataclasses import replace

from core.profiles import PROFILES
from paa.profiles import PAA_PROFILES


def test_every_profile_of_core_has_paas_switches() -> None:
    assert set(PAA_PROFILES) == set(PROFILES)


def test_ours_is_the_authors_method_but_for_three_corrections() -> None:
    ours = PAA_PROFILES["ours"]
    assert (
        replace(ours, normaliser="average", box_normaliser_floor=1e-12, drop_empty_boxes=False)
        == PAA_PROFILES["official"]
    )


def test_mmdet_follows_the_table() -> None:
    mmdet = PAA_PROFILES["mmdet"]
    # spec section 0, rows from "Low-quality match" down
    assert mmdet.low_quality == "overwrite"
    assert mmdet.score_box_weight == 1.3
    assert not mmdet.keep_single
    assert mmdet.first_component_only
    assert not mmdet.all_without_first
    assert mmdet.normaliser == "local"
    assert mmdet.count_images
    assert not mmdet.threshold_on_class
    assert not mmdet.top_over_pairs
    assert mmdet.vote_in_original_pixels


def test_profiles_import_no_torch() -> None:
    code = "import sys, paa.profiles; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
