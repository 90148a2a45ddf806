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

MAX_STEPS = 100  # of EM; scikit-learn's, as are the next three
TOLERANCE = 1e-3  # a row stops when its mean log density moves by less
VARIANCE_FLOOR = 1e-6  # added to each variance
MASS_FLOOR = 10 * 2.0**-52  # added to each component's mass, the sum of its responsibilities
BLOCK = 10  # EM steps between two looks at which rows have stopped
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
    share: Float[Tensor, "K M"]  # 1 / n with n the row's number of values, 0 where padded: turns a sum into a mean
    barrier: Float[Tensor, "K M"]  # ln n, inf where padded: makes responsibilities shares of the row
    weight_floor: Float[Tensor, " M"]  # MASS_FLOOR / n


class _State(NamedTuple):
    """EM after a step."""

    weights: Float[Tensor, "2 1 M"]
    means: Float[Tensor, "2 1 M"]
    variances: Float[Tensor, "2 1 M"]
    distances: Float[Tensor, "2 K M"]  # of each value to each mean
    bound: Float[Tensor, " M"]  # mean log density before the step's M part


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
    values, order = losses.double().masked_fill(~valid, torch.inf).sort(dim=1, stable=True)
    mask = valid.gather(1, order)
    values = values.masked_fill(~mask, 0)
    mixture = fit_sorted(values, mask)
    component, log_density = predict(mixture, values)
    outcome = separate(component, log_density, mask, scheme, first_component_only, all_without_first)
    count = valid.sum(dim=1, keepdim=True)
    positive = torch.where(count > 1, outcome.positive, mask & keep_single)
    back = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    component, log_density, positive, ignored = (
        sorted_values.gather(1, back) for sorted_values in (component, log_density, positive, outcome.ignored)
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
    parameters, steps = _fit_operator(values.double(), mask)
    weights, means, variances = parameters.permute(2, 1, 0)
    return Mixture(weights, means, variances, steps)


# An operator of its own, so that torch.compile calls it instead of unrolling a hundred steps into the graph.
@torch.library.custom_op("anchorage::fit_mixture", mutates_args=())
def _fit_operator(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Parameters (2, N, 3) and steps (N,) of `fit_sorted`."""
    rows = _rows(values, mask)
    fitted = mask.sum(dim=1) > 1
    state = _start(rows, mask)
    parameters = torch.cat(state[:3], dim=1).mT.contiguous()
    run = _run_and_drop if values.device.type == "cpu" else _run_all
    return run(rows, state, parameters, fitted)


@_fit_operator.register_fake
def _(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return values.new_empty(2, len(values), 3), values.new_empty(len(values), dtype=torch.int64)


def _rows(values: Float[Tensor, "N K"], mask: Bool[Tensor, "N K"]) -> _Rows:
    inside = mask.T.contiguous()
    values = values.T.masked_fill(~inside, 0).contiguous()
    count = inside.sum(dim=0).clamp(min=1).to(values.dtype)
    barrier = count.log().expand_as(values).masked_fill(~inside, torch.inf)
    return _Rows(values, inside / count, barrier, MASS_FLOOR / count)


def _start(rows: _Rows, mask: Bool[Tensor, "N K"]) -> _State:
    last = (mask.sum(dim=1) - 1).clamp(min=0)
    means = torch.stack([rows.values[:1], rows.values.gather(0, last[None])])
    ones = torch.ones_like(means)
    return _State(ones / 2, means, ones, rows.values - means, torch.full_like(rows.values[0], -torch.inf))


def _run_all(
    rows: _Rows, state: _State, parameters: Float[Tensor, "2 N 3"], fitted: Bool[Tensor, " N"]
) -> tuple[Float[Tensor, "2 N 3"], Int[Tensor, " N"]]:
    """EM of all rows to the bound, without a look at the results."""
    _, result, steps, _ = _run(rows, state, MAX_STEPS)
    return torch.where(fitted[:, None], result, parameters), steps * fitted


def _run_and_drop(
    rows: _Rows, state: _State, parameters: Float[Tensor, "2 N 3"], fitted: Bool[Tensor, " N"]
) -> tuple[Float[Tensor, "2 N 3"], Int[Tensor, " N"]]:
    """EM of the fitted rows in blocks; between them the rows that have stopped are set aside."""
    parameters, steps = parameters.clone(), torch.zeros(len(fitted), dtype=torch.int64)
    index, active = torch.arange(len(fitted)), fitted
    for start in range(0, MAX_STEPS, BLOCK):
        remaining = active.nonzero()[:, 0]
        if len(remaining) == 0:
            break
        if len(remaining) < len(index):
            index = index[remaining]
            rows = _Rows(*(part.index_select(-1, remaining) for part in rows))
            state = _State(*(part.index_select(-1, remaining) for part in state))
        state, parameters[:, index], taken, active = _run(rows, state, min(BLOCK, MAX_STEPS - start))
        steps[index] += taken
    return parameters, steps


def _run(
    rows: _Rows, state: _State, steps: int
) -> tuple[_State, Float[Tensor, "2 M 3"], Int[Tensor, " M"], Bool[Tensor, " M"]]:
    """Some EM steps: the last state, each row's parameters at its stop or else the last, its steps, if it goes on."""
    bounds, trajectory = [state.bound], []
    for _ in range(steps):
        state = _step(rows, state)
        bounds.append(state.bound)
        trajectory.append(torch.cat(state[:3], dim=1))
    moving = (torch.stack(bounds).diff(dim=0).abs() >= TOLERANCE).to(torch.int64).cumprod(dim=0).sum(dim=0)
    taken = (moving + 1).clamp(max=steps)
    chosen = torch.stack(trajectory).gather(0, (taken - 1).expand(1, 2, 3, -1))[0]
    return state, chosen.mT, taken, moving == steps


def _step(rows: _Rows, state: _State) -> _State:
    """One E and M step of all rows. Variances are about the new means, a form that cannot cancel."""
    log_joint = _log_joint(state.weights, state.variances, state.distances)
    log_density = torch.logaddexp(*log_joint.unbind())
    bound = (log_density * rows.share).sum(dim=0)
    responsibility = (log_joint - (log_density + rows.barrier)).exp()
    weights = responsibility.sum(dim=1, keepdim=True) + rows.weight_floor
    means = (responsibility * rows.values).sum(dim=1, keepdim=True) / weights
    distances = rows.values - means
    variances = (responsibility * distances.square()).sum(dim=1, keepdim=True) / weights + VARIANCE_FLOOR
    return _State(weights, means, variances, distances, bound)


def _log_joint(
    weights: Float[Tensor, "2 1 M"], variances: Float[Tensor, "2 1 M"], distances: Float[Tensor, "2 K M"]
) -> Float[Tensor, "2 K M"]:
    """ln(w_k N(x_i; mu_k, v_k)), a term of Eq. 4, without its constant -ln(2 pi) / 2."""
    scale = variances.rsqrt()
    standardised = distances * scale
    return torch.addcmul((weights * scale).log(), standardised, standardised, value=-0.5)


def predict(mixture: Mixture, values: Float[Tensor, "N K"]) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N K"]]:
    """Likelier component (0 on a tie) and log density of every value (Eq. 4)."""
    weights, means, variances = (part.T[:, None] for part in mixture[:3])
    log_joint = _log_joint(weights, variances, values.T - means)
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
        ignored = after_peak & (rank < _densest(log_density, second))
    elif scheme == "d":
        ignored = after_peak & first
    else:
        ignored = torch.zeros_like(mask)
    return Separation(positive, ignored)


def _densest(log_density: Float[Tensor, "N K"], among: Bool[Tensor, "N K"]) -> Int[Tensor, "N 1"]:
    """First position of the largest density among some candidates; 0, which ignores nobody, where there are none."""
    return log_density.masked_fill(~among, -torch.inf).argmax(dim=1, keepdim=True)
