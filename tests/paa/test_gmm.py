"""The mixture: worked goldens of the specification, both originals' numbers, scikit-learn, properties."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.mixture import GaussianMixture
from torch import Tensor

from paa.gmm import Split, _rows, _run_all, _start, _step, fit_sorted, predict, separate, split_candidates
from tests.conftest import golden_arrays

MMDET = {"keep_single": False, "first_component_only": True, "all_without_first": False}

# Spec PAA section 13, check 15: losses, steps, first weight, means, variances, component of each
G1 = [0.22, 0.25, 0.3, 0.38, 1.5, 1.62, 1.7, 1.85, 2.1]
G2 = [0.3, 1.0]
G3 = [0.5] * 5
G4 = [0.26, 0.85, 1.07, 1.14, 1.16, 1.39, 1.53, 2.33]
G5 = [0.42, 0.55, 0.58, 0.61, 0.7, 0.74, 0.9, 1.05, 1.3, 1.33, 1.48, 1.61, 1.75, 1.9, 2.2]
WORKED = {
    "G1": (G1, 7, 0.444444, (0.2875, 1.754), (0.00366975, 0.042865), "000011111"),
    "G2": (G2, 3, 0.5, (0.606479, 0.693521), (0.12060689, 0.12060689), "01"),
    "G3": (G3, 3, 0.5, (0.5, 0.5), (1e-6, 1e-6), "00000"),
    "G4": (G4, 17, 0.527196, (1.181762, 1.254705), (0.03947928, 0.60037553), "10000011"),
    "G5": (G5, 20, 0.408457, (0.619073, 1.501951), (0.0161279, 0.16092758), "000000111111111"),
}
DENSITIES = {
    "G1": [0.4532, 0.8823, 1.0527, -0.0918, -0.6844, -0.1413, 0.0341, -0.0394, -1.3283],
    "G4": [-2.2367, -0.7444, 0.1312, 0.2439, 0.2576, -0.1614, -0.7844, -2.3759],
}


def split(rows: list[list[float]], scheme: str = "c", **switches: bool) -> Split:
    """The split of rows of any lengths."""
    width = max(map(len, rows))
    losses = torch.tensor([row + [0.0] * (width - len(row)) for row in rows], dtype=torch.float64)
    valid = torch.tensor([[i < len(row) for i in range(width)] for row in rows])
    return split_candidates(losses, valid, scheme, **switches)  # type: ignore[arg-type]


def signs(result: Split, row: int = 0) -> str:
    """One letter per candidate: + positive, 0 ignored, - negative."""
    positive, ignored = result.separation
    return "".join("+" if p else "0" if i else "-" for p, i in zip(positive[row], ignored[row], strict=True))


@pytest.mark.parametrize("name", WORKED)
def test_fit_worked(name: str) -> None:
    losses, steps, weight, means, variances, components = WORKED[name]
    result = split([losses])
    assert result.mixture.steps.tolist() == [steps]
    assert result.mixture.weights[0].tolist() == pytest.approx([weight, 1 - weight], abs=1e-6)
    assert result.mixture.means[0].tolist() == pytest.approx(means, abs=1e-6)
    assert result.mixture.variances[0].tolist() == pytest.approx(variances, abs=1e-8)
    assert "".join(map(str, result.component[0].tolist())) == components
    if name in DENSITIES:
        assert result.log_density[0].tolist() == pytest.approx(DENSITIES[name], abs=6e-5)


@pytest.mark.parametrize(
    ("losses", "scheme", "expected"),
    [
        (G1, "a", "++++-----"),
        (G1, "b", "+++000---"),
        (G1, "c", "+++------"),
        (G1, "d", "+++0-----"),
        (G2, "c", "+-"),
        (G3, "c", "+----"),
        (G3, "b", "+----"),  # no component 1: the rest is negative
        (G4, "c", "+++++---"),  # the first is of component 1 and positive all the same
        (G5, "a", "++++++---------"),
        (G5, "b", "++++000000-----"),
        (G5, "c", "++++-----------"),
        (G5, "d", "++++00---------"),
    ],
)
def test_separation_worked(losses: list[float], scheme: str, expected: str) -> None:
    assert signs(split([losses], scheme)) == expected


def test_mmdet_takes_component_0_only() -> None:
    assert signs(split([G4], first_component_only=True)) == "-++++---"  # check 15: 5 positives officially, 4 here


def test_row_without_component_0() -> None:
    component, density = torch.ones(1, 3, dtype=torch.int64), torch.tensor([[0.1, 0.3, 0.2]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    for scheme in "abcd":
        positive, ignored = separate(component, density, mask, scheme)  # type: ignore[arg-type]
        assert positive.tolist() == [[True, True, False]]
        assert not ignored.any()
    positive, ignored = separate(component, density, mask, "c", all_without_first=False)
    assert not positive.any()
    assert not ignored.any()


def test_equal_densities_take_the_first() -> None:
    component, density = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.float64)
    positive, _ = separate(component, density, torch.ones(1, 3, dtype=torch.bool))
    assert positive.tolist() == [[True, False, False]]


def test_none_and_one_candidate() -> None:
    losses, valid = torch.tensor([[9.0, 9.0], [9.0, 0.7]]), torch.tensor([[False, False], [False, True]])
    for scheme in "abcd":
        result = split_candidates(losses, valid, scheme)  # type: ignore[arg-type]
        assert [signs(result, row) for row in (0, 1)] == ["--", "-+"]
        assert result.mixture.steps.tolist() == [0, 0]
        assert all(part.isfinite().all() for part in result.mixture)
    assert signs(split_candidates(losses, valid, keep_single=False), 1) == "--"


def test_no_rows() -> None:
    result = split_candidates(torch.zeros(0, 45), torch.zeros(0, 45, dtype=torch.bool))
    assert result.separation.positive.shape == (0, 45)
    assert result.mixture.means.shape == (0, 2)


def golden_rows(arrays: dict[str, np.ndarray], prefix: str) -> tuple[Tensor, Tensor]:
    """Sets of candidate losses as padded rows."""
    offsets = arrays[prefix + "offsets"]
    valid = torch.arange(45) < torch.from_numpy(np.diff(offsets))[:, None]
    losses = torch.zeros(valid.shape)
    losses[valid] = torch.from_numpy(arrays[prefix + "values"])
    return losses, valid


def check_golden(arrays: dict[str, np.ndarray], prefix: str, atol: float, **switches: bool) -> None:
    losses, valid = golden_rows(arrays, prefix)
    result = split_candidates(losses, valid, **switches)  # type: ignore[arg-type]
    stable = torch.from_numpy(arrays[prefix + "stable"])
    assert stable.sum() > 150
    values = stable[:, None].expand_as(valid)[valid]
    for name, ours in (("positive", result.separation.positive), ("component", result.component.to(torch.int8))):
        assert torch.equal(ours[valid][values], torch.from_numpy(arrays[prefix + name])[values]), name
    assert not result.separation.ignored.any()
    fitted = stable & (valid.sum(dim=1) > 1)
    parameters = torch.cat(result.mixture[:3], dim=1)[fitted]
    torch.testing.assert_close(parameters, torch.from_numpy(arrays[prefix + "params"])[fitted], rtol=0, atol=atol)
    assert result.mixture.steps[fitted].tolist() == arrays[prefix + "converged"][fitted.numpy(), 1].tolist()


def test_golden_mmdet() -> None:
    check_golden(golden_arrays("paa_gmm.npz"), "", 1e-5, **MMDET)  # theirs in float32


def test_golden_official(shared: Path) -> None:
    with np.load(shared / "golden_official" / "paa_extra.npz") as archive:
        arrays = {key: archive[key] for key in archive.files if key.startswith("gmm/")}
    check_golden(arrays, "gmm/", 1e-10)
    equal = arrays["gmm/kind"] == 9  # all values equal: the count is certain, not which
    losses, valid = golden_rows(arrays, "gmm/")
    counts = split_candidates(losses, valid).separation.positive.sum(dim=1).numpy()
    assert np.array_equal(counts[equal], arrays["gmm/num_positive"][equal])


def random_rows(seed: int, rows: int = 40, width: int = 45) -> tuple[Tensor, Tensor]:
    """Rows of 0 to `width` losses with two groups."""
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(rows, width, generator=generator, dtype=torch.float64)
    losses = losses + 1.5 * (torch.rand(rows, width, generator=generator) < 0.6)
    valid = torch.rand(rows, width, generator=generator) < torch.rand(rows, 1, generator=generator)
    return losses, valid


def test_against_scikit_learn() -> None:
    losses, valid = random_rows(0)
    result = split_candidates(losses, valid)
    for row in (valid.sum(dim=1) > 1).nonzero()[:, 0].tolist():
        column = losses[row][valid[row]].sort().values[:, None].numpy()
        reference = GaussianMixture(
            2, weights_init=[0.5, 0.5], means_init=[column[0], column[-1]], precisions_init=np.ones((2, 1, 1))
        ).fit(column)
        assert result.mixture.steps[row] == reference.n_iter_
        assert result.mixture.weights[row].tolist() == pytest.approx(reference.weights_, rel=1e-9)
        assert result.mixture.means[row].tolist() == pytest.approx(reference.means_[:, 0], rel=1e-9)
        assert result.mixture.variances[row].tolist() == pytest.approx(reference.covariances_[:, 0, 0], rel=1e-8)
        own = losses[row][valid[row]][:, None].numpy()
        assert result.component[row][valid[row]].tolist() == reference.predict(own).tolist()
        assert result.log_density[row][valid[row]].tolist() == pytest.approx(reference.score_samples(own), abs=1e-8)


def test_rows_that_stop_leave_the_others_alone() -> None:
    rows = [G1, G2, G3, G4, G5]
    together = split(rows)
    for i, row in enumerate(rows):
        alone = split([row])
        assert signs(together, i)[: len(row)] == signs(alone)
        assert together.mixture.steps[i] == alone.mixture.steps[0]
        for ours, theirs in zip(together.mixture[:3], alone.mixture[:3], strict=True):
            torch.testing.assert_close(ours[i], theirs[0], rtol=1e-12, atol=1e-14)


def test_stops_at_the_last_step_and_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paa.gmm.MAX_STEPS", 5)
    column = np.array(G5)[:, None]
    with pytest.warns(Warning, match="converge"):
        reference = GaussianMixture(
            2, max_iter=5, weights_init=[0.5, 0.5], means_init=[[0.42], [2.2]], precisions_init=np.ones((2, 1, 1))
        ).fit(column)
    mixture = split([G5]).mixture
    assert mixture.steps.tolist() == [5]
    assert mixture.means[0].tolist() == pytest.approx(reference.means_[:, 0], rel=1e-10)


def test_run_to_the_bound_equals_run_and_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other devices do, on the CPU."""
    losses, valid = random_rows(1)
    dropping = split_candidates(losses, valid)
    monkeypatch.setattr("paa.gmm._run_and_drop", _run_all)
    bound = split_candidates(losses, valid)
    for ours, theirs in zip(bound.mixture, dropping.mixture, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert torch.equal(bound.separation.positive, dropping.separation.positive)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_bad_row_does_not_poison_others(bad: float) -> None:
    result = split([G1, [bad, *G1[1:]], [bad] * 9])
    assert signs(result, 0) == "+++------"
    assert result.mixture.means[0].tolist() == pytest.approx([0.2875, 1.754], abs=1e-6)


def test_offset_does_not_cancel() -> None:
    """An uncentred variance E[x^2] - mean^2 would lose all digits at an offset of 1e5 and spread of 1e-2."""
    near, far = split([[0.0, 0.01, 0.02, 5.0, 5.01]]), split([[1e5, 1e5 + 0.01, 1e5 + 0.02, 1e5 + 5, 1e5 + 5.01]])
    torch.testing.assert_close(far.mixture.variances, near.mixture.variances, rtol=1e-4, atol=0)
    assert signs(far) == signs(near)


def test_component_that_loses_all_values_stays_finite() -> None:
    values, mask = torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
    rows = _rows(values, mask)
    start = _start(rows, mask)
    far = torch.tensor([[[1.5]], [[1e6]]], dtype=torch.float64)
    after = _step(rows, start._replace(means=far, distances=rows.values - far))
    # ten epsilons over two values; its mean, a sum of nothing over them, is 0
    assert after.weights[:, 0, 0].tolist() == pytest.approx([1, 5 * 2**-52], rel=1e-12)
    assert after.means[:, 0, 0].tolist() == pytest.approx([1.5, 0], rel=1e-12)


losses_of_one_object = st.lists(st.floats(0.0, 20.0, width=32), min_size=1, max_size=45)


@settings(max_examples=60, deadline=None)
@given(losses_of_one_object, st.randoms(use_true_random=False))
def test_properties(losses: list[float], random: object) -> None:
    order = list(range(len(losses)))
    random.shuffle(order)  # type: ignore[attr-defined]
    result, shuffled = split([losses]), split([[losses[i] for i in order], [1.0, 2.0]])
    positive = result.separation.positive[0]
    values = torch.tensor(losses, dtype=torch.float64)
    # the same values are positive in any order, and whatever other rows there are
    again = shuffled.separation.positive[0, : len(losses)]
    assert values[positive].sort().values.tolist() == values[order][again].sort().values.tolist()
    # a prefix of the sorted losses that contains the smallest
    assert 1 <= positive.sum() <= len(losses)
    assert values[positive].min() == values.min()
    if not positive.all():
        assert values[positive].max() <= values[~positive].min()


@settings(max_examples=25, deadline=None)
@given(losses_of_one_object, st.integers(1, 5))
def test_padding_changes_nothing(losses: list[float], extra: int) -> None:
    values = torch.tensor([losses], dtype=torch.float64)
    mask = torch.ones(1, len(losses), dtype=torch.bool)
    values = values.sort(dim=1).values
    padded = torch.cat([values, torch.full((1, extra), 7.0, dtype=torch.float64)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros(1, extra, dtype=torch.bool)], dim=1)
    alone, wide = fit_sorted(values, mask), fit_sorted(padded, padded_mask)
    assert (alone.steps - wide.steps).abs() <= 1  # sums of another length round differently, so may a stop
    if alone.steps == wide.steps:
        torch.testing.assert_close(alone.means, wide.means, rtol=1e-6, atol=1e-8)


def test_predict_tie_is_component_0() -> None:
    mixture = split([G3]).mixture
    component, _ = predict(mixture, torch.full((1, 1), 0.5, dtype=torch.float64))
    assert component.tolist() == [[0]]


@pytest.mark.compiled
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_traces_whole(backend: str) -> None:
    losses, valid = random_rows(2)
    compiled = torch.compile(split_candidates, fullgraph=True, backend=backend)
    ours, theirs = compiled(losses, valid), split_candidates(losses, valid)
    assert torch.equal(ours.separation.positive, theirs.separation.positive)
    torch.testing.assert_close(ours.mixture.means, theirs.mixture.means, rtol=1e-12, atol=0)
