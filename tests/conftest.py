"""What all tests share: a thread limit, the committed golden files, and the optional folder of real data."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"
torch.set_num_threads(min(2, os.cpu_count() or 1))


def golden_arrays(name: str) -> dict[str, np.ndarray]:
    """All arrays of a committed golden file."""
    with np.load(GOLDEN / name) as archive:
        return {key: archive[key] for key in archive.files}


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Packed annotation tables of the tests stay out of the user's cache folder."""
    os.environ["ANCHORAGE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and official reference numbers; skips where ANCHORAGE_SHARED is not set."""
    folder = os.environ.get("ANCHORAGE_SHARED")
    if not folder:
        pytest.skip("ANCHORAGE_SHARED is not set")
    path = Path(folder).resolve()
    if not (path / "data").is_dir():
        pytest.fail(f"ANCHORAGE_SHARED={folder}: no folder {path / 'data'}")
    return path
