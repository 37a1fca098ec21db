"""Frozen dataclasses as pytrees, whose structure knows their class; derivatives along some leaves of a pytree."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import jax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array


def static(default: Any = dataclasses.MISSING) -> Any:
    """A field that is structure, and so part of the compiled program."""
    return dataclasses.field(default=default, metadata={"static": True})


_Class = TypeVar("_Class", bound=type)


@dataclass_transform(frozen_default=True)
def pytree_class(cls: _Class) -> _Class:
    """A frozen dataclass that is a pytree: numbers and arrays are leaves, `static` fields are structure.

    The class is part of the structure too. `jax.tree_util.register_dataclass` leaves it out: with it the structures of
    softplus and sigsoftmax compare equal (jax 0.10 to 0.12), and a compiled program of one may serve for the other.

    JAX also rebuilds such an object with tracers, or with anything else, as its leaves. Neither `__init__` nor
    `__post_init__` runs then, so that a check of what the user gives does not see these leaves.
    """
    made = dataclasses.dataclass(frozen=True, repr=False)(cls)
    names = [(f.name, bool(f.metadata.get("static"))) for f in dataclasses.fields(made)]
    leaves, fixed = ([name for name, is_static in names if is_static == wanted] for wanted in (False, True))
    keys = [jax.tree_util.GetAttrKey(name) for name in leaves]

    def structure(value: Any) -> tuple[Any, ...]:
        return (made, *(getattr(value, name) for name in fixed))

    def values(value: Any) -> list[Any]:
        return [getattr(value, name) for name in leaves]

    def rebuilt(aux: Any, children: Any) -> Any:
        value = object.__new__(made)
        for name, given in (*zip(fixed, aux[1:], strict=True), *zip(leaves, children, strict=True)):
            object.__setattr__(value, name, given)
        return value

    jax.tree_util.register_pytree_with_keys(
        made,
        lambda value: (list(zip(keys, values(value), strict=True)), structure(value)),
        rebuilt,
        lambda value: (values(value), structure(value)),
    )
    return made


def without_zeros(dots: Any) -> Any:
    """The tangents, with None in place of symbolic zeros."""
    return jax.tree.map(lambda dot: None if isinstance(dot, SymbolicZero) else dot, dots)


def jvp_of_live(f: Callable[[Any], Any], given: Any, dots: Any) -> tuple[Any, Any]:
    """f and its derivative along the tangents that are not None. The others are left out, not 0: zero times an infinite
    derivative would be NaN."""
    leaves, structure = jax.tree.flatten(given)
    rates = structure.flatten_up_to(dots)
    live = [i for i, rate in enumerate(rates) if rate is not None]

    def of_live(values: list[Array]) -> Any:
        filled = dict(zip(live, values, strict=True))
        return f(jax.tree.unflatten(structure, [filled.get(i, leaf) for i, leaf in enumerate(leaves)]))

    return jax.jvp(of_live, ([leaves[i] for i in live],), ([rates[i] for i in live],))
