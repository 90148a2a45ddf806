"""PAA's batched mixture against scikit-learn's `GaussianMixture`, one fit an object, as the authors' code calls it.

python -m benchmarks.speed paa-mixture
"""

import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch

from paa.gmm import Separation, split_candidates

CANDIDATES = 45  # of an object: 9 on each of 5 levels
THREADS = 1  # of torch; arrays this small gain nothing from more


def mixture_case(objects: int = 60, repeats: int = 7, seed: int = 0) -> dict[str, object]:
    """Time both in turn from losses to positives, on the CPU, eager; median milliseconds and their ratio.

    Args:
        objects: number of mixtures; the targets are a ratio of 40 with 60 objects and of 70 with 300.
        repeats: number of turns.
        seed: of the losses.

    Returns:
        name, what, ours_ms, sklearn_ms, ratio, ratio_spread (smallest and largest of one turn), decisions_equal (both
        chose the same positives everywhere), steps (median and largest number of EM steps) and repeats.

    Raises:
        ModuleNotFoundError: without scikit-learn, which is in the extra `dev`.
    """
    losses = candidate_losses(objects, seed)
    rows, valid = torch.from_numpy(losses), torch.ones(losses.shape, dtype=torch.bool)
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        split, reference = split_candidates(rows, valid), sklearn_positives(losses)  # also the warm-up
        times = [
            (_milliseconds(lambda: split_candidates(rows, valid)), _milliseconds(lambda: sklearn_positives(losses)))
            for _ in range(repeats)
        ]
    finally:
        torch.set_num_threads(threads)
    ours_ms, sklearn_ms = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = [theirs / ours for ours, theirs in times]
    steps = split.mixture.steps
    return {
        "name": f"paa-mixture-{objects}",
        "what": f"mixtures of {objects} objects, {CANDIDATES} candidates each, CPU, {THREADS} thread, eager",
        "ours_ms": ours_ms,
        "sklearn_ms": sklearn_ms,
        "ratio": sklearn_ms / ours_ms,
        "ratio_spread": [min(ratios), max(ratios)],
        "decisions_equal": _equal(split.separation, reference),
        "steps": [int(steps.median()), int(steps.max())],
        "repeats": repeats,
    }


def candidate_losses(objects: int, seed: int) -> np.ndarray:
    """Anchor scores as half-way through training, (objects, 45) float32: a share of good anchors, and a long tail."""
    random = np.random.default_rng(seed)
    shape = (objects, CANDIDATES)
    level = random.uniform(0.3, 1.2, (objects, 1))  # hard objects lose more everywhere
    good = level + np.abs(random.normal(0, 0.25, shape))
    rest = level + 0.8 + random.gamma(2, 0.3, shape)
    share = random.uniform(0.1, 0.6, (objects, 1))
    return np.where(random.random(shape) < share, good, rest).astype(np.float32)


def sklearn_positives(losses: np.ndarray) -> np.ndarray:
    """Positives of every row by scheme (c), one scikit-learn fit a row in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fits that stop at the last step
        return np.stack([sklearn_row(row) for row in losses.astype(np.float64)])


def sklearn_row(losses: np.ndarray) -> np.ndarray:
    """Positives of one row of at least two float64 losses by scheme (c), in the order given."""
    from sklearn.mixture import GaussianMixture

    order = np.argsort(losses, kind="stable")
    column = losses[order, None]
    mixture = GaussianMixture(
        2,
        weights_init=[0.5, 0.5],
        means_init=[column[0], column[-1]],
        precisions_init=np.ones((2, 1, 1)),
    ).fit(column)
    density = np.where(mixture.predict(column) == 0, mixture.score_samples(column), -np.inf)
    last = len(losses) - 1 if np.isneginf(density).all() else int(density.argmax())
    positive = np.zeros(len(losses), dtype=bool)
    positive[order[: last + 1]] = True
    return positive


def _equal(separation: Separation, reference: np.ndarray) -> bool:
    return bool(np.array_equal(separation.positive.numpy(), reference))


def _milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1000
