"""Plans of cutoffs: the cost of a softmax on the present device, and the cutoffs of least cost (MATH 12.6)."""

import itertools
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jsoftmax.checks.arguments import is_int, public
from jsoftmax.heads.adaptive._functions import log_prob
from jsoftmax.heads.adaptive._params import AdaptiveParams, Tail, tail_widths


class CostModel(NamedTuple):
    """g(k, B, w) = c + e k w + (a w + b) max(k₀B₀, kB) seconds: B rows of width w, k classes     (MATH 12.6)

    With b = e = 0 and w = d it is the max(c + λ k₀B₀, c + λ kB) of the paper, where λ = a d.
    """

    overhead: float
    """c, the time of a tail without classes or rows."""
    per_product: float
    """a, for one multiplication and addition of the scores, with its share of the gradients."""
    per_score: float = 0.0
    """b, for the softmax of one score, whatever the width."""
    per_weight: float = 0.0
    """e, for one number of the weights' gradient, which is written whatever the rows are."""
    floor: float = 0.0
    """k₀B₀, the number of scores below which a product gets no faster."""

    def __call__(self, classes: Any, rows: Any, width: Any) -> Any:
        """g(k, B, w)."""
        of_scores = (self.per_product * width + self.per_score) * np.maximum(self.floor, classes * rows)
        return self.overhead + self.per_weight * classes * width + of_scores


@public
def measure_cost_model(
    d: int,
    batch: int,
    *,
    classes: tuple[int, ...] = (128, 2048, 32768),
    repeats: int = 5,
    dtype: Any = jnp.float32,
) -> CostModel:
    """Times `log_prob` and its gradients on the present device, with tails of several sizes, and fits the cost model.

    Least squares of the relative errors over c, a, b, e ≥ 0, with the k₀B₀ among the sizes that fits best   (MATH 12.6)

    Args:
      d: the dimension of the hidden vectors. Tails of width d and ⌈d/16⌉ are timed.
      batch: the rows of one step. A 64th and a quarter of them are in the tail.
      classes: the sizes of the tail. Each program is compiled and run; all together take some ten seconds.
      repeats: the runs of each program, of which the fastest counts. Nothing else should run meanwhile.
      dtype: the dtype of the weights and hidden vectors.
    Returns: `CostModel`, in seconds.
    Raises: TypeError or ValueError if `d`, `batch`, `repeats` or one of `classes` is no int >= 1, or there are fewer
      than two sizes.
    Source: Grave et al. 2017, section 4, for one product of matrices.

    >>> model = measure_cost_model(8, 4, classes=(64, 512), repeats=1)
    >>> bool(model(1000, 1000, 8) > 0)
    True
    """
    given = {"d": d, "batch": batch, "repeats": repeats} | {f"classes[{i}]": k for i, k in enumerate(classes)}
    for argument, value in given.items():
        if not is_int(value) or value < 1:
            raise (ValueError if is_int(value) else TypeError)(
                f"measure_cost_model: {argument} must be an int >= 1; got {value!r}. Pass a Python int."
            )
    if len(classes) < 2:
        raise ValueError(
            f"measure_cost_model: classes must be at least two sizes; got {classes}. Leave it out for three."
        )
    rows, widths = dict.fromkeys((-(-batch // 64), -(-batch // 4))), dict.fromkeys((d, -(-d // 16)))
    points = list(itertools.product(classes, rows, widths))
    seconds = [_seconds(point, d, batch, repeats, dtype) for point in points]
    return _fit(np.array(points, float), np.array(seconds))


def _seconds(point: tuple[int, int, int], d: int, batch: int, repeats: int, dtype: Any) -> float:
    """The time of the fastest of several runs of the loss and its gradients, with some rows in a tail and a head of one
    class."""
    classes, rows, width = point
    tail = Tail(jnp.full((width, d), 0.01, dtype), jnp.full((classes, width), 0.01, dtype))
    params = AdaptiveParams(jnp.zeros((2, d), dtype), None, (tail,))
    hidden, labels = jnp.ones((batch, d), dtype), (jnp.arange(batch) < rows).astype(jnp.int32)

    def loss(params: AdaptiveParams, hidden: Any) -> Any:
        return jnp.mean(log_prob(params, hidden, labels))

    run = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(params, hidden).compile()
    jax.block_until_ready(run(params, hidden))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(params, hidden))
        times.append(time.perf_counter() - start)
    return min(times)


def _fit(points: np.ndarray, seconds: np.ndarray) -> CostModel:
    """The model with the least squared relative error, over every k₀B₀ and every choice of which numbers are not 0."""
    classes, rows, width = points.T
    scores = classes * rows
    best = (math.inf, CostModel(0.0, 0.0))
    for floor in (0.0, *np.unique(scores)[:-2]):
        counted = np.maximum(floor, scores)
        terms = np.stack([np.ones_like(counted), counted * width, counted, classes * width], 1) / seconds[:, None]
        scale = np.linalg.norm(terms, axis=0)
        for used in itertools.product((True, False), repeat=4):
            chosen = np.flatnonzero(used)
            values = np.zeros(4)
            values[chosen] = np.linalg.lstsq((terms / scale)[:, chosen], np.ones(len(seconds)), rcond=None)[0]
            error = float(np.sum((terms / scale @ values - 1) ** 2))
            if np.all(values >= 0) and error < best[0] * (1 - 1e-9):
                best = (error, CostModel(*(float(v) for v in (*values / scale, floor))))
    return best[1]


class ClusterPlan(NamedTuple):
    """Cutoffs for `init`, and what one step costs by the model."""

    cutoffs: tuple[int, ...]
    seconds: float


@public
def plan_clusters(
    frequencies: ArrayLike,
    d: int,
    batch: int,
    cost_model: CostModel,
    *,
    div_value: int | float = 4.0,
    max_tails: int = 4,
    candidates: int = 400,
) -> ClusterPlan:
    """The cutoffs whose expected cost is least, by dynamic programming for every number of tails.

    g(k_head + J, B, d) + Σ_i [g(k_i, p_i B, w_i) + a d w_i p_i B],   w_i = ⌊d / div_value^i⌋     (MATH 12.6)

    p_i is the frequency of tail i, and the last term is the projection of its rows. Only time counts, not what narrow
    tails cost in perplexity. Every further tail is narrower, so limit `max_tails`. The sum is for comparing plans; a
    step takes longer.

    Args:
      frequencies: `[V]` counts or probabilities, not negative, in decreasing order. Their values are read, so they must
        not be traced.
      d: the dimension of the hidden vectors.
      batch: B, the rows of one step.
      cost_model: made by `measure_cost_model`, or from numbers of your own.
      div_value: how much narrower each tail is than the one before, as in `init`.
      max_tails: the most tails that are tried; the paper takes up to 4.
      candidates: how many cutoffs are tried. If there are more classes, the candidates lie on a logarithmic grid, above
        16,384 at multiples of 512, which need no padding. Otherwise each class is a candidate.
    Returns: `ClusterPlan`; its cutoffs are () if a plain softmax costs least.
    Raises: TypeError or ValueError for arguments of the wrong kind or sign, or frequencies that increase.
    Source: Grave et al. 2017, section 4.

    >>> model = CostModel(overhead=1e-3, per_product=1e-11)
    >>> plan_clusters(1 / np.arange(1, 10_001), 256, 1024, model).cutoffs
    (23, 612)
    """
    counts = _check_plan(frequencies, d=d, batch=batch, max_tails=max_tails, candidates=candidates)
    if not isinstance(cost_model, CostModel):
        raise TypeError(
            f"plan_clusters: cost_model must be a CostModel; got {type(cost_model).__name__}. Make one by "
            "measure_cost_model(d, batch)."
        )
    edges = _grid(len(counts), candidates)
    mass = np.concatenate([[0.0], np.cumsum(counts) / np.sum(counts)])[edges]
    widths = [w for w in tail_widths(d, max_tails, div_value) if w]
    sizes: Any = {"d": d, "batch": batch, "cost_model": cost_model}
    plans = [_best_cutoffs(edges, mass, widths[:tails], **sizes) for tails in range(len(widths) + 1)]
    return min(plans, key=lambda plan: plan.seconds)


def _best_cutoffs(
    edges: np.ndarray, mass: np.ndarray, widths: list[int], *, d: int, batch: int, cost_model: CostModel
) -> ClusterPlan:
    """Dynamic programming for one number of tails. Its table has the least cost of the first i tails that end at each
    edge."""
    least = cost_model(edges + len(widths), batch, d)
    before = []
    for width in widths:
        rows = batch * (mass[None, :] - mass[:, None])
        size = edges[None, :] - edges[:, None]
        tail = cost_model(size, np.maximum(rows, 0), width) + cost_model.per_product * d * width * rows
        total = np.where(size > 0, least[:, None] + tail, math.inf)
        before.append(np.argmin(total, 0))
        least = np.min(total, 0)
    at, cutoffs = len(edges) - 1, []
    for step in reversed(before):
        at = int(step[at])
        cutoffs.append(int(edges[at]))
    return ClusterPlan(tuple(reversed(cutoffs)), float(least[-1]))


def _grid(classes: int, candidates: int) -> np.ndarray:
    """Edges in [1, classes], the last of which is classes."""
    if classes <= candidates:
        return np.arange(1, classes + 1)
    edges = np.geomspace(1, classes, candidates)
    edges = np.where(edges > 2**14, np.round(edges / 512) * 512, np.round(edges))
    return np.unique(np.append(edges[edges < classes], classes).astype(int))


def _check_plan(frequencies: Any, **sizes: Any) -> np.ndarray:
    for argument, value in sizes.items():
        low = 0 if argument == "max_tails" else 2 if argument == "candidates" else 1
        if not is_int(value) or value < low:
            raise (ValueError if is_int(value) else TypeError)(
                f"plan_clusters: {argument} must be an int >= {low}; got {value!r}. Pass a Python int."
            )
    if isinstance(frequencies, Tracer):
        raise TypeError(
            "plan_clusters: frequencies must be numbers, because a plan shapes the program; got a traced array. "
            "Call it outside of jit."
        )
    counts = np.asarray(frequencies, float)
    if counts.ndim != 1 or not counts.size or not np.all(counts >= 0) or not 0 < np.sum(counts) < math.inf:
        raise ValueError(
            "plan_clusters: frequencies must be a [V] array of counts that are not negative and not all 0; got shape "
            f"{counts.shape}. Count the classes: np.bincount(labels)."
        )
    if np.any(counts[1:] > counts[:-1]):
        raise ValueError(
            "plan_clusters: frequencies must be in decreasing order, since classes are numbered by frequency; got some "
            "that increase. Renumber the classes: order = np.argsort(-frequencies)."
        )
    return counts
