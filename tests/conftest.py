"""What all tests share: one thread, their order, the committed golden files, and the optional folder of real data."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parent
GOLDEN = FOLDER / "golden"
torch.set_num_threads(1)  # sums depend on how many threads share them; several workers fill the cores
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


def golden_arrays(name: str) -> dict[str, np.ndarray]:
    """All arrays of a committed golden file."""
    with np.load(GOLDEN / name) as archive:
        return {key: archive[key] for key in archive.files}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of whole runs, which stand beside this file, come first: no worker waits for a long one at the end."""
    items.sort(key=lambda item: item.path.parent != FOLDER)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What tests and their fixtures draw without a seed of their own depends on no other test and on no worker."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)


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
