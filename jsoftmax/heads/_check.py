"""Checks the arguments of the streaming heads, and sorts the tokens so that those that count come first."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jsoftmax import maps
from jsoftmax._precision import default_precision
from jsoftmax.checks.arguments import (
    accumulation_dtype,
    as_floating,
    as_scores,
    broadcast_number,
    check_log_weights,
    check_option,
    check_where,
    is_concrete_number,
    is_int,
    option_if_given,
)
from jsoftmax.checks.labels import NO_LABELS, in_range
from jsoftmax.checks.top_targets import TopTargets, mass_is_in_range, reject_per_class_options
from jsoftmax.heads._head import PER_TOKEN, Head, Plan, vocabulary
from jsoftmax.heads._implementation import check_implementation
from jsoftmax.heads._labels import add_labels, check_banned
from jsoftmax.sharding import (
    AxisName,
    check_axis_name,
    check_not_explicit,
    check_parts,
    check_sharded,
    match_varying_axes,
    shard_count,
)


class CheckedHead(NamedTuple):
    """A head, its plan, and what is needed to put results of tokens back into the tokens' shape."""

    head: Head
    plan: Plan
    batch: tuple[int, ...]
    rows: Array | None
    """bool `[N]`: which tokens count."""
    order: Array | None
    """The order in which the head has the tokens."""
    token_weights: Array | None
    """`[tokens]`, in the order of the head; 0 for tokens that do not count."""
    top: TopTargets | None = None
    """`[..., k]`; its indices are the head's labels."""
    several: tuple[int, ...] | None = None
    """The axes of several labels of each token, which come before the tokens' axes."""
    counted: Array | None = None
    """bool `[N, m]`: which labels count, if a token has several."""

    def in_dtype(self, dtype: Any) -> Head:
        """The head with its numbers in the accumulation dtype of `dtype`, the common dtype of two heads."""
        wide = accumulation_dtype(dtype)
        names = ("hidden", "log_weights", "soft_cap", "temperature", "margin")
        cast = {name: getattr(self.head, name) for name in names}
        return self.head._replace(**{name: None if a is None else a.astype(wide) for name, a in cast.items()})

    def restore(self, result: Array, ignored: Any = 0) -> Array:
        """Results `[tokens, …]` of the head as `[..., …]`; tokens that do not count get the value `ignored`."""
        result = result[: math.prod(self.batch)]
        if self.order is not None and self.rows is not None:
            rows = self.rows.reshape(-1, *[1] * (result.ndim - 1))
            result = jnp.where(rows, result[jnp.argsort(self.order)], ignored)
        return result.reshape(*self.batch, *result.shape[1:])

    def restore_labels(self, result: Array) -> Array:
        """Results `[tokens, m]` of labels as `[...]`, or as `[*several, ...]`; 0 for labels that do not count."""
        result = self.restore(result)
        if self.several is None:
            return result[..., 0]
        if self.counted is not None:
            result = jnp.where(self.counted.reshape(result.shape), result, 0)
        return jnp.moveaxis(result, -1, 0).reshape(*self.several, *self.batch)


def check(
    function: str,
    hidden: Any,
    weight: Any,
    bias: Any,
    *,
    labels: Any = NO_LABELS,
    phi: Any,
    soft_cap: Any = None,
    temperature: Any = 1.0,
    margin: Any = 0.0,
    ignore_label: Any = None,
    where: Any = None,
    log_weights: Any = None,
    banned: Any = None,
    block_size: Any = None,
    precision: Any = None,
    axis_name: Any = None,
    shards: Any = 1,
    token_weights: Any = None,
    per_token: Any = (),
    chunk: int = 1,
    implementation: Any = "xla",
    names: tuple[str, str, str] = ("hidden", "weight", "bias"),
) -> CheckedHead:
    """All arguments as a `Head`, in the accumulation dtype except for arrays of the vocabulary.

    per_token: which of `_labels.SEVERAL` and `_labels.TOP` a token may have instead of one label or a distribution.
    """
    maps.check_phi_of_blocks(function, phi)
    order = names if labels is NO_LABELS else (*names[:2], "labels", names[2])
    hidden, weight = (_check_floating(function, n, a, order) for n, a in zip(names, (hidden, weight), strict=False))
    _check_shapes(function, hidden, weight, names)
    axis_name = check_axis_name(function, axis_name)
    check_sharded(function, names[1], weight, axis_name)
    check_not_explicit(function, names[1], weight)
    shards = _check_shards(function, shards, axis_name, weight)
    classes, batch = weight.shape[0], hidden.shape[:-1]
    dtype = jnp.result_type(hidden, weight)
    wide = accumulation_dtype(dtype)
    of_one = {names[2]: bias, "where": where, "log_weights": log_weights}
    check_parts(function, (classes,), (0,), axis_name, **of_one)
    if bias is not None:
        bias = as_scores(function, names[2], bias)
        if bias.shape != (classes,):
            raise ValueError(
                f"{function}: {names[2]} must have one number for each class, shape {(classes,)}; got shape "
                f"{bias.shape}. Leave it out if there is no bias."
            )
    for argument, value in (("where", where), ("log_weights", log_weights)):
        _check_of_classes(function, argument, value, classes)
    where = check_where(function, where, (classes,))
    log_weights = check_log_weights(function, log_weights, (classes,), wide)
    cap = None if soft_cap is None else check_option(function, soft_cap, wide, soft_cap=(_TINY, math.inf))
    head = Head(
        hidden=hidden.reshape(math.prod(batch), hidden.shape[-1]).astype(wide),
        weight=weight,
        bias=bias,
        log_weights=None if log_weights is None else jnp.broadcast_to(log_weights, (classes,)),
        where=None if where is None else jnp.broadcast_to(where, (classes,)),
        banned=check_banned(function, banned, batch),
        phi=phi,
        soft_cap=cap,
        temperature=option_if_given(function, temperature, wide, default=1.0, temperature=(_TINY, math.inf)),
        margin=option_if_given(function, margin, wide, margin=(-math.inf, math.inf)),
    )
    rows = None
    of_shard = classes if axis_name is not None else classes // shards
    whole_rows = token_weights is not None
    tokens, of_classes = _block_sizes(function, block_size, head, whole_rows, classes=of_shard, chunk=chunk)
    precision = _check_precision(function, precision, dtype)
    plan = Plan(tokens, of_classes, dtype, precision, axis_name, shards)
    top = several = counted = None
    if labels is not NO_LABELS:
        head, rows, top, several, counted = add_labels(
            function, labels, head, batch, axis_name, ignore_label, per_token
        )
    if token_weights is not None:
        token_weights, rows = _check_token_weights(function, token_weights, batch, head, plan, rows, top)
    if rows is not None or head.hidden.shape[0] > plan.tokens:
        check_not_explicit(function, names[0], head.hidden)
    given = _in_order(head, plan, batch, rows, token_weights)
    plan = check_implementation(function, implementation, head, plan, top)
    given = given._replace(plan=plan, top=top, several=several, counted=counted)
    return given if block_size is not None else _with_accelerator_block(given, -(-of_shard // chunk), chunk)


def _check_token_weights(  # noqa: PLR0917  (what they are checked against)
    function: str,
    token_weights: Any,
    batch: tuple[int, ...],
    head: Head,
    plan: Plan,
    rows: Array | None,
    top: TopTargets | None,
) -> tuple[Array, Array | None]:
    """The weights `[N]`, and which tokens count. A token with weight 0 and a label out of range is padding."""
    of_tokens = broadcast_number(function, "token_weights", token_weights, batch, "the tokens' shape")
    weights = match_varying_axes(of_tokens.reshape(-1).astype(head.hidden.dtype), head.hidden)
    all_count = is_concrete_number(token_weights) and token_weights != 0
    if head.labels is None or all_count:
        return weights, rows
    valid = is_valid(head, plan)
    if top is not None:
        mass = top.probabilities.reshape(valid.shape)
        valid = mass_is_in_range(TopTargets(head.labels, mass), valid)
    counts = (weights != 0) | valid[:, 0]
    return weights, counts if rows is None else rows & counts


_TINY = 1e-37


def _with_accelerator_block(given: CheckedHead, chunks: int, chunk: int) -> CheckedHead:
    """Sets the blocks for GPUs and TPUs: all tokens, and as many classes as give _SCORES or _SUM_SCORES scores."""
    tokens, scores = given.head.hidden.shape[0], _SCORES if given.token_weights is None else _SUM_SCORES
    if not tokens:
        return given
    classes = chunk * classes_of_block(tokens * chunk, chunks, scores)
    return given._replace(plan=given.plan._replace(accelerator_block=(tokens, classes)))


def classes_of_block(tokens: int, classes: int, scores: int) -> int:
    """How many classes give a block of this many scores: a divisor of `classes`, if one is near."""
    return _near_divisor(classes, max(1, scores // tokens))


def _check_floating(function: str, argument: str, a: Any, order: tuple[str, ...]) -> Array:
    way_out = f"Check the order of the arguments: {', '.join(order)}. Convert integers by {argument}.astype(float)."
    return as_floating(function, argument, a, way_out, "real and floating")


def _check_shapes(function: str, hidden: Array, weight: Array, names: tuple[str, ...]) -> None:
    if weight.ndim != 2:
        raise ValueError(
            f"{function}: {names[1]} must have two axes, [classes, features]; got shape {weight.shape}. Pass a weight "
            f"[features, classes] as {names[1]}.T."
        )
    if not weight.shape[0]:
        raise ValueError(
            f"{function}: {names[1]} must have at least one class; got shape {weight.shape}. The axes are [classes, "
            "features]."
        )
    if not weight.shape[1]:
        raise ValueError(
            f"{function}: {names[1]} must have at least one feature; got shape {weight.shape}. If the scores are "
            "biases alone, use jsoftmax.losses.cross_entropy."
        )
    if not hidden.ndim or hidden.shape[-1] != weight.shape[1]:
        fits = hidden.ndim and hidden.shape[-1] == weight.shape[0]
        way_out = f"Pass a weight [features, classes] as {names[1]}.T" if fits else f"{names[1]} is [classes, features]"
        raise ValueError(
            f"{function}: {names[0]} must end in as many features as {names[1]} has, {weight.shape[1]}; got shapes "
            f"{hidden.shape} and {weight.shape}. {way_out}."
        )


def _check_shards(function: str, shards: Any, axis_name: AxisName, weight: Array) -> int:
    """The number of parts that the classes have, or are to be cut into."""
    if not is_int(shards) or shards < 1:
        raise (TypeError if not is_int(shards) else ValueError)(
            f"{function}: shards must be a positive int known at trace time; got {shards!r}. It is the number of "
            "devices over which the classes of the weight are sharded, or a multiple of it."
        )
    if shards > 1 and axis_name is not None:
        raise ValueError(
            f"{function}: shards is for a whole weight under jit, axis_name for a part inside jax.shard_map; got both, "
            f"{shards} and {axis_name!r}. Leave shards out inside shard_map."
        )
    if weight.shape[0] % shards:
        raise ValueError(
            f"{function}: shards must divide the number of classes, {weight.shape[0]}; got {shards}. Pad the weight to "
            "a multiple, and leave the padding out by where=…."
        )
    return int(shards) if axis_name is None else shard_count(axis_name)


def _check_of_classes(function: str, argument: str, value: Any, classes: int) -> None:
    """Rejects a mask or weights of tokens where those of classes are wanted."""
    shape = jnp.shape(value) if isinstance(value, jax.Array | np.ndarray) else ()
    if shape not in ((), (1,), (classes,)):
        raise ValueError(
            f"{function}: {argument} must have one value for each class, shape {(classes,)}; got shape {shape}. "
            "To leave tokens out, use ignore_label if there are labels; otherwise mask the result."
        )


def _check_precision(function: str, precision: Any, dtype: Any) -> Any:
    """A `jax.lax.Precision`, which is hashable.

    If it is left out and `jax_default_matmul_precision` is not set, float32 and float64 factors are multiplied with all
    their digits. JAX's default keeps 11 bits of float32 on GPUs and 8 on TPUs.
    """
    if precision is None:
        return default_precision(dtype)
    try:
        return jax.lax.Precision(precision)
    except ValueError:
        wanted = ", ".join(repr(p.name.lower()) for p in jax.lax.Precision)
        raise ValueError(
            f"{function}: precision must be None, a jax.lax.Precision or one of {wanted}; got "
            f"{precision!r}. Leave it out: float32 factors keep all their digits."
        ) from None


def _block_sizes(
    function: str, block_size: Any, head: Head, whole_rows: bool, *, classes: int, chunk: int
) -> tuple[int, int]:
    """Tokens and classes of a block. The classes are whole chunks, and a divisor of a shard's classes if one is
    near."""
    tokens, classes = max(1, head.hidden.shape[0]), -(-classes // chunk) * chunk
    of_tokens, of_classes = _DEFAULTS.get(jax.default_backend(), _DEFAULTS["gpu"])
    if whole_rows:
        of_tokens = min(of_tokens, 256)
    if block_size is None:
        return min(tokens, of_tokens), chunk * _near_divisor(classes // chunk, of_classes // chunk)
    pair = block_size if isinstance(block_size, tuple) else (of_tokens, block_size)
    if len(pair) != 2 or not all(is_int(n) and n > 0 for n in pair):
        raise ValueError(
            f"{function}: block_size must be a positive int, the classes of a block, or a pair (tokens, classes); got "
            f"{block_size!r}. Leave it out to have it chosen for you."
        )
    return min(tokens, pair[0]), max(1, min(classes, -(-pair[1] // chunk) * chunk))


_DEFAULTS = {"cpu": (1024, 2048), "gpu": (4096, 4096)}
"""Tokens and classes of a block, by backend. Those of CPU are measured (benchmarks/NOTES.md); GPUs and TPUs take theirs
if the caller gives the classes only."""

_SCORES, _SUM_SCORES = 2**26, 2**28
"""The number of scores of a block in programs for GPUs and TPUs: 256 MiB of float32. Sums over tokens, which are made
for speed, take four times as many: larger blocks need fewer kernels, and read hidden states less often."""


def _near_divisor(classes: int, wanted: int) -> int:
    """The largest divisor of `classes` between half and twice what is wanted; if there is none, what is wanted."""
    if classes <= 2 * wanted:
        return max(1, classes)
    divisors = (n for n in range(2 * wanted, wanted // 2, -1) if classes % n == 0)
    return next(divisors, wanted)


def _in_order(head: Head, plan: Plan, batch: tuple[int, ...], rows: Array | None, weights: Array | None) -> CheckedHead:
    """Sorts the tokens that count to the front, replaces the others by harmless ones, and pads to whole blocks."""
    order = None
    if rows is not None:
        order = jnp.argsort(~rows, stable=True)
        counts = rows[order]

        def taken(a: Any, instead: Any = 0) -> Any:
            return None if a is None else jnp.where(counts.reshape(-1, *[1] * (a.ndim - 1)), a[order], instead)

        # tokens that do not count become copies of the first that does: scores of zeros might lie outside φ's domain
        first = jnp.where(counts[:1, None], lax.stop_gradient(head.hidden[order][:1]), 0)
        harmless = {"hidden": taken(head.hidden, first), "banned": taken(head.banned, -1)}
        head = head._replace(counted=jnp.sum(rows, dtype=jnp.int32), **(_each(head, taken) | harmless))
        weights = taken(weights)
    length = -head.hidden.shape[0] % plan.tokens

    def padded(a: Any, mode: str = "constant") -> Any:
        return None if a is None else jnp.pad(a, [(0, length), *[(0, 0)] * (a.ndim - 1)], mode)

    if length:
        repeated = {name: padded(getattr(head, name), "edge") for name in ("hidden", "banned")}
        head = head._replace(**(_each(head, padded) | repeated))
        weights = padded(weights)
    return CheckedHead(head, plan, batch, rows, order, weights)


def _each(head: Head, f: Any) -> dict[str, Any]:
    """f of each field that belongs to tokens."""
    return {name: f(getattr(head, name)) for name in PER_TOKEN}


def check_pair(function: str, p: CheckedHead, q: CheckedHead) -> None:
    """Checks that two heads have the same tokens and the same number of classes."""
    if p.batch != q.batch:
        raise ValueError(
            f"{function}: hidden_p and hidden_q must have the same tokens; got shapes {p.batch} and {q.batch} before "
            "the features. Broadcast one of them: jnp.broadcast_to."
        )
    classes = [given.head.weight.shape[0] for given in (p, q)]
    if classes[0] != classes[1]:
        raise ValueError(
            f"{function}: weight_p and weight_q must have the same classes; got {classes[0]} and {classes[1]}. Pad the "
            "smaller one, and leave the padding out by where=…."
        )


def loss_options(
    function: str, given: CheckedHead, label_smoothing: Any, z_loss: Any
) -> tuple[Array | None, Array | None]:
    """Both options in the accumulation dtype; None for a plain 0."""
    option = functools.partial(option_if_given, function, dtype=given.head.hidden.dtype)
    smoothing = option(label_smoothing, label_smoothing=(0.0, 1.0))
    if given.top is not None:
        reject_per_class_options(function, label_smoothing=smoothing, banned=given.head.banned)
    return smoothing, option(z_loss, z_loss=(0.0, math.inf))


def is_valid(head: Head, plan: Plan) -> Array:
    """Whether labels are in range."""
    return in_range(head.labels, vocabulary(head, plan))[1]
