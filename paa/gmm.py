"""The two-component mixture that splits an object's candidates into positives and negatives (section 3.1, Eq. 4).

Every object has its own one-dimensional mixture over at most 45 anchor scores. All of them are fitted in one call: one
row per object, padded with a mask, each row frozen at the step where scikit-learn's `GaussianMixture(2)` would stop.
Inside the loop the values lie candidate-major, (K, N), which makes the sums over candidates vectorise over objects.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paa.profiles import Scheme

MAX_STEPS = 100  # of EM; scikit-learn's default, as are the next two
TOLERANCE = 1e-3  # a row stops when its mean log density moves by less
VARIANCE_FLOOR = 1e-6  # added to each variance
BLOCK = 4  # EM steps between two looks at which rows have stopped
HALF_LOG_2PI = math.log(2 * math.pi) / 2


class Mixture(NamedTuple):
    """Two Gaussians per row. Component 0 started at the row's lowest loss, component 1 at its highest."""

    weights: Float[Tensor, "N 2"]
    means: Float[Tensor, "N 2"]
    variances: Float[Tensor, "N 2"]
    steps: Int[Tensor, " N"]  # EM steps until the stop; 0 for a row with fewer than two values


class Separation(NamedTuple):
    """What becomes of each candidate; one that is neither is negative."""

    positive: Bool[Tensor, "N K"]
    ignored: Bool[Tensor, "N K"]


class Split(NamedTuple):
    """Mixture, its view of each candidate, and the outcome, in the candidates' own order."""

    mixture: Mixture
    component: Int[Tensor, "N K"]  # likelier component, 0 or 1; 0 on a tie
    log_density: Float[Tensor, "N K"]  # of the mixture at the candidate's loss
    separation: Separation


class _Rows(NamedTuple):
    """Rows in work, candidate-major; M is the number of rows that have not been set aside."""

    values: Float[Tensor, "K M"]  # 0 where padded
    share: Float[Tensor, "K M"]  # 1 / number of values, 0 where padded: turns a sum into a mean
    barrier: Float[Tensor, "K M"]  # 0, or inf where padded: makes a responsibility 0


class _Fit(NamedTuple):
    """State of EM. It runs on after a row's stop; `kept` does not."""

    distances: Float[Tensor, "2 K M"]  # of each value to each mean
    parameters: Float[Tensor, "3 2 M"]  # weights, means, variances
    bound: Float[Tensor, " M"]  # mean log density before the last M step
    kept: Float[Tensor, "3 2 M"]  # parameters of a stopped row at its stop
    active: Bool[Tensor, " M"]
    steps: Int[Tensor, " M"]


def split_candidates(
    losses: Float[Tensor, "N K"],
    valid: Bool[Tensor, "N K"],
    scheme: Scheme = "c",
    *,
    keep_single: bool = True,
    first_component_only: bool = False,
    all_without_first: bool = True,
) -> Split:
    """Fit a mixture to every row and separate its candidates (Algorithm 1, lines 12-15, and Fig. 3).

    Args:
        losses: anchor scores of each object's candidates in any order, finite where `valid`.
        valid: False where a row is padded; a row may be empty.
        scheme: which of the paper's four separations, see `separate`.
        keep_single: the candidate of a row with only one becomes positive; otherwise it is negative.
        first_component_only: see `separate`.
        all_without_first: see `separate`.
    """
    values, order = losses.to(_precision(losses)).masked_fill(~valid, torch.inf).sort(dim=1, stable=True)
    mask = valid.gather(1, order)
    values = values.masked_fill(~mask, 0)
    mixture = fit_sorted(values, mask)
    component, log_density = predict(mixture, values)
    outcome = separate(component, log_density, mask, scheme, first_component_only, all_without_first)
    count = valid.sum(dim=1, keepdim=True)
    positive = torch.where(count > 1, outcome.positive, mask & keep_single)
    ignored = outcome.ignored & (count > 1)
    back = order.argsort(dim=1)
    component, log_density, positive, ignored = (
        sorted_values.gather(1, back) for sorted_values in (component, log_density, positive, ignored)
    )
    return Split(mixture, component, log_density, Separation(positive, ignored))


def fit_sorted(values: Float[Tensor, "N K"], mask: Bool[Tensor, "N K"]) -> Mixture:
    """Expectation maximisation of every row as scikit-learn does it (Eq. 4; spec section 4).

    Weights start at 1/2, means at the smallest and largest value, variances at 1. A row stops after the step whose mean
    log density differs from the step's before by less than `TOLERANCE`, or after `MAX_STEPS`; it keeps what that step
    computed. On a CPU, rows that have stopped leave the batch and the loop ends with the last one; on another device
    all rows take `MAX_STEPS` and nothing waits for the device.

    Args:
        values: losses by rising size, finite; what stands where `mask` is False does not matter. A row that is not
            finite gives no sensible mixture, but leaves the other rows alone.
        mask: True on a row's first entries. Rows with fewer than two values are not fitted.
    """
    weights, means, variances, steps = _fit_operator(values.to(_precision(values)), mask)
    return Mixture(weights, means, variances, steps)


# An operator of its own, so that torch.compile calls it instead of unrolling a hundred steps into the graph.
@torch.library.custom_op("anchorage::fit_mixture", mutates_args=())
def _fit_operator(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = _rows(values, mask)
    fit = _start(rows, mask)
    if values.device.type == "cpu":
        kept, steps = _run_and_drop(rows, fit)
    else:
        fit = _run(rows, fit, MAX_STEPS)
        kept, steps = fit.kept, fit.steps
    weights, means, variances = kept.mT.contiguous().unbind()
    return weights.clone(), means.clone(), variances.clone(), steps


@_fit_operator.register_fake
def _(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights, means, variances = (values.new_empty(len(values), 2) for _ in range(3))
    return weights, means, variances, values.new_empty(len(values), dtype=torch.int64)


def _precision(values: Tensor) -> torch.dtype:
    """float64, because EM's stop rule is sharp; Apple's GPUs have none."""
    return torch.float32 if values.device.type == "mps" else torch.float64


def _rows(values: Float[Tensor, "N K"], mask: Bool[Tensor, "N K"]) -> _Rows:
    inside = mask.T.contiguous()
    values = values.T.masked_fill(~inside, 0).contiguous()
    barrier = torch.zeros_like(values).masked_fill(~inside, torch.inf)
    return _Rows(values, inside / inside.sum(dim=0).clamp(min=1).to(values.dtype), barrier)


def _start(rows: _Rows, mask: Bool[Tensor, "N K"]) -> _Fit:
    count = mask.sum(dim=1)
    last = rows.values.gather(0, (count - 1).clamp(min=0)[None])
    means = torch.cat([rows.values[:1], last])
    parameters = torch.stack([torch.full_like(means, 0.5), means, torch.ones_like(means)])
    bound = torch.full_like(means[0], -torch.inf)
    return _Fit(rows.values - means[:, None], parameters, bound, parameters, count > 1, torch.zeros_like(count))


def _run_and_drop(rows: _Rows, fit: _Fit) -> tuple[Float[Tensor, "3 2 N"], Int[Tensor, " N"]]:
    """EM in blocks; between them the rows that have stopped are set aside."""
    kept, steps = fit.kept.clone(), fit.steps.clone()
    index = torch.arange(len(steps))
    for _ in range(0, MAX_STEPS, BLOCK):
        remaining = fit.active.nonzero()[:, 0]
        if len(remaining) == 0:
            break
        if len(remaining) < len(index):
            index = index[remaining]
            rows = _Rows(*(part.index_select(-1, remaining) for part in rows))
            fit = _Fit(*(part.index_select(-1, remaining) for part in fit))
        fit = _run(rows, fit, BLOCK)
        kept[..., index] = fit.kept
        steps[index] = fit.steps
    return kept, steps


def _run(rows: _Rows, fit: _Fit, steps: int) -> _Fit:
    for _ in range(steps):
        fit = _step(rows, fit)
    return fit


def _step(rows: _Rows, fit: _Fit) -> _Fit:
    """One E and M step of all rows, and the test of the stop rule."""
    log_joint = _log_joint(fit.parameters, fit.distances)
    log_density = torch.logaddexp(log_joint[0], log_joint[1])
    bound = (log_density * rows.share).sum(dim=0)
    responsibility = (log_joint - (log_density + rows.barrier)).exp()
    parameters, distances = _maximise(rows.values, responsibility)
    kept = torch.where(fit.active, parameters, fit.kept)
    moved = (bound - fit.bound).abs() >= TOLERANCE
    return _Fit(distances, parameters, bound, kept, fit.active & moved, fit.steps + fit.active)


def _log_joint(parameters: Float[Tensor, "3 2 M"], distances: Float[Tensor, "2 K M"]) -> Float[Tensor, "2 K M"]:
    """ln(w_k N(x_i; mu_k, v_k)), a term of Eq. 4, without its constant -ln(2 pi) / 2."""
    weights, _, variances = parameters
    precision_root = variances.rsqrt()
    standardised = distances * precision_root[:, None]
    return torch.addcmul((weights * precision_root).log()[:, None], standardised, standardised, value=-0.5)


def _maximise(
    values: Float[Tensor, "K M"], responsibility: Float[Tensor, "2 K M"]
) -> tuple[Float[Tensor, "3 2 M"], Float[Tensor, "2 K M"]]:
    """Weights, means and variances from responsibilities; the variance about the new mean, which cannot cancel."""
    mass = responsibility.sum(dim=1) + 10 * torch.finfo(values.dtype).eps
    means = (responsibility * values).sum(dim=1) / mass
    distances = values - means[:, None]
    variances = (responsibility * distances.square()).sum(dim=1) / mass + VARIANCE_FLOOR
    return torch.stack([mass / mass.sum(dim=0), means, variances]), distances


def predict(mixture: Mixture, values: Float[Tensor, "N K"]) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N K"]]:
    """Likelier component (0 on a tie) and log density of every value (Eq. 4)."""
    parameters = torch.stack(mixture[:3]).mT
    log_joint = _log_joint(parameters, values.T - parameters[1][:, None])
    log_density = torch.logaddexp(log_joint[0], log_joint[1]) - HALF_LOG_2PI
    return (log_joint[1] > log_joint[0]).to(torch.int64).T, log_density.T


def separate(
    component: Int[Tensor, "N K"],
    log_density: Float[Tensor, "N K"],
    mask: Bool[Tensor, "N K"],
    scheme: Scheme = "c",
    first_component_only: bool = False,
    all_without_first: bool = True,
) -> Separation:
    """The four separations of Fig. 3, for candidates by rising loss.

    With i* the densest candidate of component 0 and j* that of component 1 (the first of equals):

    - a: component 0 is positive, the rest negative.
    - b: positive up to i*, negative from j*, ignored between; without component 1 the rest is negative.
    - c: positive up to i*, the rest negative. The default.
    - d: positive up to i*, component 0 beyond it ignored, the rest negative.

    Args:
        component: 0 or 1.
        log_density: of the mixture.
        mask: False where padded.
        scheme: a, b, c or d.
        first_component_only: positives up to i* must belong to component 0 (MMDetection); otherwise a candidate of
            component 1 below i* is positive as well (the authors).
        all_without_first: in a row without component 0 all candidates are positive (the authors), otherwise none.

    Note: the paper does not say what happens without component 0; the rule holds for all four schemes.
    """
    first, second = mask & (component == 0), mask & (component == 1)
    rank = torch.arange(mask.shape[1], device=mask.device)
    has_first = first.any(dim=1, keepdim=True)
    up_to_peak = mask & has_first & (rank <= _densest(log_density, first))
    after_peak = mask & has_first & ~up_to_peak
    positive = first if scheme == "a" else up_to_peak & (first | (not first_component_only))
    positive = positive | (mask & ~has_first & all_without_first)
    if scheme == "b":
        ignored = after_peak & (rank < _densest(log_density, second)) & second.any(dim=1, keepdim=True)
    elif scheme == "d":
        ignored = after_peak & first
    else:
        ignored = torch.zeros_like(mask)
    return Separation(positive, ignored)


def _densest(log_density: Float[Tensor, "N K"], among: Bool[Tensor, "N K"]) -> Int[Tensor, "N 1"]:
    """First position of the largest density among some candidates; 0 where there are none."""
    return log_density.masked_fill(~among, -torch.inf).argmax(dim=1, keepdim=True)
