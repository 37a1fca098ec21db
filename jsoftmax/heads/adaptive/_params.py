"""The weights of an adaptive softmax, their checks, and their conversion from and to PyTorch."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from jsoftmax.checks.arguments import all_known, is_int, optional_package, public
from jsoftmax.checks.sampling import check_key


class Tail(NamedTuple):
    """A cluster of rare classes, scored after a projection to fewer dimensions."""

    projection: Any
    """P `[width, d]`."""
    weight: Any
    """W `[classes, width]`; scores are W P h."""


class AdaptiveParams(NamedTuple):
    """The weights, a pytree; cutoffs and sizes are in the shapes."""

    head: Any
    """`[cutoffs[0] + tails, d]`: the frequent classes, then one row for each tail."""
    bias: Any
    """`[cutoffs[0] + tails]`, or None."""
    tails: tuple[Tail, ...]
    """In the order of their classes."""

    @property
    def cutoffs(self) -> tuple[int, ...]:
        """The first class of each tail, and the number of classes at the end."""
        sizes = [self.head.shape[0] - len(self.tails), *(tail.weight.shape[0] for tail in self.tails)]
        return tuple(itertools.accumulate(sizes))


@public
def init(
    key: PRNGKeyArray | ArrayLike,
    d: int,
    num_classes: int,
    cutoffs: Sequence[int],
    *,
    div_value: int | float = 4.0,
    head_bias: bool = False,
    dtype: Any = jnp.float32,
) -> AdaptiveParams:
    """Weights of an adaptive softmax over classes sorted by frequency, the most frequent first.

    Head: the classes below cutoffs[0], and one row for each tail. Tail i = 0, 1, …: the classes in [cutoffs[i],
    cutoffs[i+1]), of width ⌊d / div_value^{i+1}⌋     (MATH 12.5)

    Args:
      key: a PRNG key.
      d: the dimension of the hidden vectors.
      num_classes: V.
      cutoffs: increasing ints in [1, V), as `plan_clusters` gives them; () makes it a plain softmax.
      div_value: how much narrower each tail is than the one before.
      head_bias: whether the head has a bias.
      dtype: the dtype of the weights.
    Returns: `AdaptiveParams`, uniform in ±1/√fan-in, as in PyTorch.
    Raises: TypeError or ValueError for sizes that are no ints or do not increase, or a tail without width.
    Source: Grave, Joulin, Cissé, Grangier, Jégou 2017; conventions of torch.nn.AdaptiveLogSoftmaxWithLoss.

    >>> params = init(jax.random.key(0), 64, 1000, (100, 400))
    >>> params.head.shape, [tail.weight.shape for tail in params.tails]
    ((102, 64), [(300, 16), (600, 4)])
    """
    check_key("init", key)
    d, num_classes = _check_size("d", d), _check_size("num_classes", num_classes)
    if not isinstance(cutoffs, list | tuple) or not all(is_int(cutoff) for cutoff in cutoffs):
        raise TypeError(f"init: cutoffs must be a tuple of ints; got {cutoffs!r}. Write e.g. (2000, 20000).")
    edges = [0, *map(int, cutoffs), num_classes]
    if any(a >= b for a, b in itertools.pairwise(edges)):
        raise ValueError(
            f"init: cutoffs must increase inside [1, num_classes - 1]; got {tuple(cutoffs)} for {num_classes} classes. "
            "The number of classes is not one of them."
        )
    if not all_known(div_value, lambda a: (a > 0) & (a < math.inf)):
        raise ValueError(f"init: div_value must be > 0 and finite; got {div_value}. 4 is usual.")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"init: dtype must be floating; got {dtype}. Take e.g. jnp.float32.")
    widths = tail_widths(d, len(cutoffs), div_value)
    if 0 in widths:
        raise ValueError(
            f"init: every tail must keep a width of at least 1, d // div_value**i; got widths {widths} for d = {d}. "
            "Take fewer cutoffs or a smaller div_value."
        )
    keys = iter(jax.random.split(key, 2 + 2 * len(widths)))

    def linear(shape: tuple[int, ...], fan_in: int) -> Array:
        limit = fan_in**-0.5
        return jax.random.uniform(next(keys), shape, dtype, -limit, limit)

    columns = edges[1] + len(widths)
    head, bias = linear((columns, d), d), linear((columns,), d) if head_bias else None
    sizes = [b - a for a, b in itertools.pairwise(edges[1:])]
    return AdaptiveParams(
        head,
        bias,
        tuple(Tail(linear((w, d), d), linear((size, w), w)) for w, size in zip(widths, sizes, strict=True)),
    )


def tail_widths(d: int, tails: int, div_value: int | float) -> list[int]:
    """The width of each tail, ⌊d / div_value^{i+1}⌋, as PyTorch rounds it."""
    return [int(d // div_value ** (i + 1)) for i in range(tails)]


def _check_size(argument: str, value: Any) -> int:
    if not is_int(value) or value < 1:
        raise (ValueError if is_int(value) else TypeError)(
            f"init: {argument} must be an int >= 1; got {value!r}. It shapes the weights: pass a Python int."
        )
    return int(value)


def check_params(function: str, params: Any) -> AdaptiveParams:
    """Checks that weights are `AdaptiveParams` whose shapes fit together."""
    if not isinstance(params, AdaptiveParams):
        raise TypeError(
            f"{function}: params must be AdaptiveParams; got {type(params).__name__}. Make them by "
            "jsoftmax.heads.adaptive.init or from_torch."
        )
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(params)]
    d, columns = np.shape(params.head)[-1:], np.shape(params.head)[:1]
    fits = len(np.shape(params.head)) == 2 and columns[0] > len(params.tails)
    fits = fits and (params.bias is None or np.shape(params.bias) == columns)
    for tail in params.tails:
        projection, weight = np.shape(tail.projection), np.shape(tail.weight)
        fits = fits and len(projection) == len(weight) == 2 and projection == (weight[1], *d)
    if not fits:
        raise ValueError(
            f"{function}: params must have shapes that fit: head [cutoff + tails, d], bias [cutoff + tails], of each "
            f"tail a projection [width, d] and a weight [classes, width]; got {shapes}. Make them by init."
        )
    return params


@public
def from_torch(module_or_state: Any) -> AdaptiveParams:
    """Weights of a torch.nn.AdaptiveLogSoftmaxWithLoss.

    Args:
      module_or_state: the module, or its state_dict: a mapping from 'head.weight', 'head.bias', 'tail.0.0.weight',
        'tail.0.1.weight', … to tensors, or to anything that numpy can convert. PyTorch is not imported.
    Returns: `AdaptiveParams` with the same dtype.
    Raises: TypeError for anything else, ValueError for other names or shapes that do not fit.

    >>> state = to_state(init(jax.random.key(0), 8, 20, (5,)))
    >>> sorted(state)
    ['head.weight', 'tail.0.0.weight', 'tail.0.1.weight']
    >>> from_torch(state).cutoffs
    (5, 20)
    """
    state = module_or_state.state_dict() if hasattr(module_or_state, "state_dict") else module_or_state
    if not isinstance(state, Mapping):
        raise TypeError(
            f"from_torch: module_or_state must be a module or its state_dict; got {type(state).__name__}. Pass "
            "module.state_dict()."
        )
    rest = {name: value for name, value in state.items() if name not in ("head.weight", "head.bias")}
    names = [[f"tail.{i}.{j}.weight" for j in range(2)] for i in range(len(rest) // 2)]
    if "head.weight" not in state or set(rest) != set(itertools.chain(*names)):
        raise ValueError(
            "from_torch: module_or_state must have head.weight, head.bias or not, and tail.i.0.weight and "
            f"tail.i.1.weight for i = 0, 1, …; got {sorted(state)}. Pass the state_dict of that module alone, without "
            "a prefix."
        )
    bias = state.get("head.bias")
    params = AdaptiveParams(
        _as_jax(state["head.weight"]),
        None if bias is None else _as_jax(bias),
        tuple(Tail(*(_as_jax(state[name]) for name in pair)) for pair in names),
    )
    return check_params("from_torch", params)


def _as_jax(tensor: Any) -> Float[Array, "..."]:
    """A tensor as an array. numpy cannot convert PyTorch's bfloat16, which goes through float32."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        if "bfloat16" in str(tensor.dtype):
            return jnp.asarray(tensor.float().numpy()).astype(jnp.bfloat16)
        tensor = tensor.numpy()
    return jnp.asarray(np.array(tensor))  # a copy: PyTorch may write to its own


@public
def to_state(params: AdaptiveParams) -> dict[str, Any]:
    """The weights by the names that PyTorch has for them, as numpy arrays; bfloat16 as float32.

    Args:
      params: as `init` makes them.
    Returns: a dict, copies; `from_torch` is its inverse.
    Raises: TypeError or ValueError for other `params`.

    >>> from jsoftmax.heads import adaptive
    >>> params = adaptive.init(jax.random.key(0), 8, 20, (5,))
    >>> {name: value.shape for name, value in to_state(params).items()}
    {'head.weight': (6, 8), 'tail.0.0.weight': (2, 8), 'tail.0.1.weight': (15, 2)}
    """
    params = check_params("to_state", params)
    named = {"head.weight": params.head}
    if params.bias is not None:
        named["head.bias"] = params.bias
    for i, tail in enumerate(params.tails):
        named |= {f"tail.{i}.{j}.weight": value for j, value in enumerate(tail)}
    return {
        name: np.array(value.astype(jnp.float32) if value.dtype == jnp.bfloat16 else value)
        for name, value in named.items()
    }


@public
def to_torch(params: AdaptiveParams) -> dict[str, Any]:
    """The weights as a state_dict for torch.nn.AdaptiveLogSoftmaxWithLoss.

    module = AdaptiveLogSoftmaxWithLoss(d, V, cutoffs, div_value, head_bias); module.load_state_dict(to_torch(params))

    Args:
      params: as `init` makes them.
    Returns: a dict of tensors, copies; bfloat16 as float32, which load_state_dict casts.
    Raises: ModuleNotFoundError without PyTorch; TypeError or ValueError for other `params`.
    """
    torch = optional_package("to_torch", "torch", "torch")
    return {name: torch.from_numpy(value) for name, value in to_state(params).items()}
