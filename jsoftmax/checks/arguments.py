"""The checks that all public functions share, each written once: dtypes, axes, masks and error messages."""

import functools
import importlib
import inspect
import math
import operator
import re
import types
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Bool, Integer, PRNGKeyArray

from jsoftmax.checks.keywords import reject_keywords

Axis = int | tuple[int, ...] | None

SCORES_SHAPE = "the scores' shape"


def accumulation_dtype(dtype: Any) -> Any:
    """The dtype in which sums are computed: float32 at least."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def widened(a: jax.Array) -> jax.Array:
    """The same numbers in the accumulation dtype."""
    return a.astype(accumulation_dtype(a.dtype))


def read(scores: jax.Array) -> jax.Array:
    """Scores in the accumulation dtype. Scores in bfloat16 are rounded again here (MATH 4.1).

    If they are made in the same program, XLA computes them in float32, and drops their rounding for one reader but not
    for another for which it stores them. Rounding them where they are read gives all readers the same numbers.
    """
    wide = widened(scores)
    return lax.reduce_precision(wide, 8, 7) if scores.dtype == jnp.bfloat16 else wide


_Function = TypeVar("_Function", bound=Callable[..., Any])


_ARRAYS = {"z", "z_p", "z_q", "logits", "labels", "targets", "key", "where", "log_weights", "class_weights"}
_STATIC = {"axis", "axis_name", "keepdims", "ignore_label", "shape", "replace", "mode", "k"}


def _all_plain(arguments: Iterable[tuple[str, Any]]) -> bool:
    """Whether arguments may be passed to `jax.jit` before they are checked. These are arrays whose values no check
    needs, a φ, and static arguments that are hashable."""
    for name, value in arguments:
        if name in _ARRAYS:
            plain = value is None or (isinstance(value, jax.Array) and not isinstance(value, Tracer))
        elif name == "phi":
            plain = hasattr(value, "log_phi")
        else:
            plain = name in _STATIC and (value is None or type(value) in {int, str, bool, tuple})
        if not plain:
            return False
    return True


def public(f: _Function) -> _Function:
    """Decorates a public function. Called outside `jit`, its checks and its arithmetic are one compiled program, if the
    arguments allow it. Every keyword that it does not have raises an error that says what to write instead."""
    signature = inspect.signature(f)
    parameters = signature.parameters
    names, all_plain = tuple(parameters), _all_plain
    compiled = jax.jit(f, static_argnames=tuple(_STATIC & parameters.keys()))
    known, reject = frozenset(names), functools.partial(reject_keywords, f.__name__, names)
    places = tuple(p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD)

    def call(*args: Any, **keywords: Any) -> Any:
        if keywords and not (known.issuperset(keywords) and keywords.keys().isdisjoint(places[: len(args)])):
            reject(keywords, places[: len(args)])
        plain = len(args) <= len(names) and all_plain(zip(names, args, strict=False)) and all_plain(keywords.items())
        return compiled(*args, **keywords) if plain else f(*args, **keywords)

    # the globals must be those of f, because doctest finds a module's functions by them
    same = types.FunctionType(call.__code__, f.__globals__, f.__name__, None, call.__closure__)
    wrapper: Any = functools.wraps(f)(same)
    wrapper.__signature__ = _Signature(list(parameters.values()), return_annotation=signature.return_annotation)
    return cast("_Function", wrapper)


class _Signature(inspect.Signature):
    """A signature that `help` shows as it is written in the source. The text is made when it is shown."""

    def _in_words(self) -> inspect.Signature:
        shown = [p.replace(annotation=_Words(p.annotation)) for p in self.parameters.values()]
        return inspect.Signature(shown, return_annotation=_Words(self.return_annotation))

    def __str__(self) -> str:
        return str(self._in_words())

    def format(self, **options: Any) -> str:
        """What Python 3.13 calls for `help`."""
        return self._in_words().format(**options)  # pyright: ignore[reportAttributeAccessIssue]


class _Words:
    """An annotation that is shown as it is written in the source."""

    def __init__(self, annotation: Any) -> None:
        self.annotation = annotation

    def __repr__(self) -> str:
        written = inspect.formatannotation(self.annotation)
        return _written_unions().get(written, re.sub(r"\b(?:\w+\.)+(?=\w)", "", written))


@functools.cache
def _written_unions() -> dict[str, str]:
    """Python's text for annotations that are unions, mapped to the text of the source."""
    from jsoftmax.checks.top_targets import TopTargets  # noqa: PLC0415  (it imports this module)

    integers: Any = Integer[ArrayLike, "..."]
    mask: Any = Bool[ArrayLike, "..."]
    unions: dict[str, Any] = {
        "ArrayLike": ArrayLike,
        "ArrayLike | None": ArrayLike | None,
        "Bool[ArrayLike, '...'] | None": mask | None,
        "Integer[ArrayLike, '...']": integers,
        "Integer[ArrayLike, '...'] | None": integers | None,
        "PRNGKeyArray | ArrayLike": PRNGKeyArray | ArrayLike,
        "ArrayLike | TopTargets": ArrayLike | TopTargets,
    }
    return {inspect.formatannotation(union): written for written, union in unions.items()}


def as_scores(function: str, argument: str, z: Any) -> jax.Array:
    """`z` as a floating-point array; integers and booleans promote as in `jax.nn.softmax`."""
    array = as_array(function, argument, z)
    if jnp.issubdtype(array.dtype, jnp.floating):
        return _with_infinity(function, argument, array)
    if jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == jnp.bool_:
        return array.astype(jnp.result_type(float))
    raise TypeError(
        f"{function}: {argument} must be real (floating point, or integers, which promote); got dtype {array.dtype}. "
        "Pass real scores, e.g. jnp.real(z) or jnp.abs(z)."
    )


def _with_infinity(function: str, argument: str, array: jax.Array) -> jax.Array:
    """The array, if its dtype has −∞, by which a class is left out. Some dtypes of 8 and 4 bits have not."""
    if array.dtype.itemsize > 1 or np.isinf(np.array(-np.inf).astype(array.dtype)):
        return array
    raise TypeError(
        f"{function}: {argument} must have a dtype with infinities, since −inf leaves a class out; got {array.dtype}. "
        f"Widen it first: {argument}.astype(jnp.bfloat16)."
    )


def canonical_axis(function: str, axis: Any, ndim: int) -> tuple[int, ...]:
    """`axis` as a tuple of distinct integers in [0, ndim), in the order given."""
    if axis is None:
        return tuple(range(ndim))
    wanted = "an int, a tuple of ints or None"
    try:
        given = axis if isinstance(axis, tuple) else (axis,)
        if any(isinstance(a, bool | np.bool_) for a in given):
            raise TypeError
        axes = tuple(operator.index(a) for a in given)
    except TypeError:
        way_out = _phi_by_name(axis) or "Write axis=-1 for the last axis, or a tuple such as axis=(-2, -1)."
        raise TypeError(f"{function}: axis must be {wanted}, known at trace time; got {axis!r}. {way_out}") from None
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(
                f"{function}: axis {a} is out of range for scores with {ndim} dimension(s); wanted {wanted} in "
                f"[{-ndim}, {ndim}). Give the scores a class axis, e.g. z[None], or name an axis that they have."
            )
    canonical = tuple(a % ndim for a in axes)
    if len(set(canonical)) < len(canonical):
        raise ValueError(
            f"{function}: axis names an axis twice; got {axis!r}, wanted {wanted}. Name each axis only once."
        )
    return canonical


def one_axis(function: str, axis: Any, axes: tuple[int, ...]) -> int:
    """The one axis of a canonical tuple."""
    if len(axes) != 1:
        raise ValueError(f"{function}: axis must be one axis; got {axis}. Flatten the class axes first, by reshape.")
    return axes[0]


def check_where(function: str, where: Any, shape: tuple[int, ...], what: str = SCORES_SHAPE) -> jax.Array | None:
    """`where` as a boolean array that broadcasts to a shape: that of the scores, or of another array that it masks. It
    gets as many axes as the shape has."""
    if where is None:
        return None
    array = as_array(function, "where", where)
    if array.dtype != jnp.bool_:
        raise TypeError(
            f"{function}: where must be boolean; got dtype {array.dtype}. "
            "Compare first, e.g. where=mask > 0, or pass weights as log_weights=jnp.log(w)."
        )
    return _check_broadcast(function, "where", array, shape, what)


def check_log_weights(function: str, log_weights: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array | None:
    """`log_weights` in the accumulation dtype; they must broadcast to the scores' shape, and get as many axes."""
    if log_weights is None:
        return None
    array = as_scores(function, "log_weights", log_weights).astype(dtype)
    return _check_broadcast(function, "log_weights", array, shape)


def joint_shape(function: str, arrays: dict[str, jax.Array]) -> tuple[int, ...]:
    """The shape that the score arrays of a function broadcast to."""
    try:
        return jnp.broadcast_shapes(*(array.shape for array in arrays.values()))
    except ValueError:
        got = " and ".join(str(array.shape) for array in arrays.values())
        raise ValueError(
            f"{function}: {' and '.join(arrays)} must have shapes that broadcast together; got {got}. "
            "Add axes of length 1 where they are to be repeated, e.g. z[:, None]."
        ) from None


def per_row(
    function: str, argument: str, value: Any, shape: tuple[int, ...], *, axes: tuple[int, ...], dtype: Any
) -> jax.Array:
    """One number for each row of scores of this shape, as an array of length 1 along the class axes."""
    array = as_number(function, argument, value).astype(dtype)
    rows = tuple(1 if i in axes else length for i, length in enumerate(shape))
    try:
        return jnp.broadcast_to(array, rows)
    except ValueError:
        raise ValueError(
            f"{function}: {argument} must be one number, or one for each row, of shape {rows} with length 1 along the "
            f"classes; got shape {array.shape}. Write {argument}[..., None]."
        ) from None


def broadcast_number(function: str, argument: str, value: Any, shape: tuple[int, ...], what: str) -> jax.Array:
    """A number, or an array that broadcasts to this shape, as an array of this shape."""
    array = as_number(function, argument, value)
    try:
        return jnp.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(
            f"{function}: {argument} must be a number or broadcast to {what} {shape}; got shape {array.shape}. "
            "Write one number for all, or an array of that shape."
        ) from None


def wide_integers(array: jax.Array) -> jax.Array:
    """Class numbers in 32 bits at least, because the number of classes may exceed int8."""
    return array if array.dtype.itemsize >= 4 else array.astype(jnp.int32)


def is_concrete_number(value: Any) -> bool:
    """Whether `value` is a plain number."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def known_numbers(value: Any) -> np.ndarray | None:
    """The numbers of a value that is known at trace time, for a check of their range; None for a traced array."""
    if isinstance(value, Tracer) or (isinstance(value, jax.Array) and not value.is_fully_addressable):
        return None
    if not is_concrete_number(value) and not isinstance(value, np.ndarray | np.generic | jax.Array):
        return None
    array = np.asarray(value)
    if array.dtype.kind in "iu":
        return array
    return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else None


def all_known(value: Any, holds: Callable[[np.ndarray], Any]) -> bool:
    """Whether a condition holds for all numbers of `value`; True if they are not known at trace time."""
    numbers = known_numbers(value)
    return numbers is None or bool(np.all(holds(numbers)))


def as_number(function: str, argument: str, value: Any) -> jax.Array:
    """`value` as an array of numbers. Booleans do not count as numbers."""
    array = as_scores(function, argument, value)
    if isinstance(value, bool) or getattr(value, "dtype", np.dtype(float)) == np.bool_:
        raise TypeError(
            f"{function}: {argument} must be a number, or an array of numbers; got {value!r}. If a boolean is "
            "meant, write 1.0 for True and 0.0 for False."
        )
    return array


def check_option(function: str, value: Any, dtype: Any, **limits: tuple[float, float]) -> jax.Array:
    """A number in the given dtype. Its limits are checked if it is known at trace time."""
    ((argument, (low, high)),) = limits.items()
    if not all_known(value, lambda a: (low <= a) & (a <= high) & np.isfinite(a)):
        above = "> 0" if 0 < low < 1e-30 else f">= {low:g}"
        limit = (
            "finite" if math.isinf(low) else f"{above} and finite" if math.isinf(high) else f"in [{low:g}, {high:g}]"
        )
        raise ValueError(f"{function}: {argument} must be {limit}; got {value}. Choose a number in that range.")
    array = as_number(function, argument, value)
    if array.ndim:
        raise ValueError(
            f"{function}: {argument} must be one number; got shape {array.shape}. For several use jax.vmap."
        )
    return array.astype(dtype)


def option_if_given(
    function: str, value: Any, dtype: Any, *, default: float = 0.0, **limits: tuple[float, float]
) -> jax.Array | None:
    """As `check_option`, but None for the default as a plain number, so that an unused option costs nothing."""
    checked = check_option(function, value, dtype, **limits)
    return None if is_concrete_number(value) and value == default else checked


def check_flag(function: str, argument: str, value: Any) -> bool:
    """Checks that a value is a boolean known at trace time."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise TypeError(
        f"{function}: {argument} must be True or False, known at trace time; got {value!r}. Write {argument}=True or "
        f"{argument}=False."
    )


def is_int(value: Any) -> bool:
    """Whether `value` is an integer known at trace time. Booleans do not count as integers."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def optional_package(function: str, package: str, install: str) -> Any:
    """An optional package, imported when a function needs it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{function}: the package {package!r} is missing. Run pip install {install}."
        ) from None


def as_array(function: str, argument: str, value: Any) -> jax.Array:
    """`value` as an array of any dtype. Lists, tuples and strings are rejected."""
    if isinstance(value, list | tuple | str) or value is None:
        _reject(function, argument, value)
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError):
        _reject(function, argument, value)


def as_floating(function: str, argument: str, value: Any, way_out: str, wanted: str = "floating") -> jax.Array:
    """`value` as an array of a floating dtype. Integers are rejected, because they are often another argument."""
    array = as_array(function, argument, value)
    if jnp.issubdtype(array.dtype, jnp.floating):
        return _with_infinity(function, argument, array)
    raise TypeError(f"{function}: {argument} must be {wanted}; got dtype {array.dtype}. {way_out}")


def _reject(function: str, argument: str, value: Any) -> NoReturn:
    dtype = getattr(value, "dtype", None)
    got = type(value).__name__ if dtype is None else f"{type(value).__name__} of dtype {dtype}"
    convert = f"jnp.asarray({argument})" if dtype is None else f"{argument}.astype(float)"
    way_out = _phi_by_name(value) or f"Convert it first: {convert}."
    raise TypeError(f"{function}: {argument} must be an array or a number; got {got}. {way_out}")


def _phi_by_name(value: Any) -> str:
    """The way out where a φ stands in the place of another argument."""
    return "Pass a φ by keyword: phi=…" if hasattr(value, "log_phi") else ""


def broadcasts_to(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether an array of a shape broadcasts to the wanted shape."""
    try:
        return jnp.broadcast_shapes(shape, wanted) == wanted
    except ValueError:
        return False


def _check_broadcast(
    function: str, argument: str, array: jax.Array, shape: tuple[int, ...], what: str = SCORES_SHAPE
) -> jax.Array:
    if broadcasts_to(array.shape, shape):
        return lax.broadcast_to_rank(array, len(shape))  # jax_numpy_rank_promotion="raise" wants equal ranks
    if 0 < array.ndim < len(shape) and array.shape == shape[: array.ndim]:
        behind = ", ".join([":"] * array.ndim + ["None"] * (len(shape) - array.ndim))
        way_out = f"If there is one for each row, write {argument}[{behind}]."
    else:
        way_out = f"Give {argument} axes of length 1 where it is to be repeated, or use jnp.broadcast_to."
    raise ValueError(f"{function}: {argument} must broadcast to {what} {shape}; got shape {array.shape}. {way_out}")
