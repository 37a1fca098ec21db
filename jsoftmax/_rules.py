"""Functions with a derivative rule, each compiled by itself."""

import functools
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import jax

_P = ParamSpec("_P")
_Result = TypeVar("_Result")


class CompiledRule(Generic[_P, _Result]):
    """A function with a derivative rule, compiled by itself, because rules call it many times and JAX then keeps its
    trace.

    `jax.jit` is outside of `jax.custom_jvp`. The rule calls this object, not the body; so higher orders use the rule
    and the trace, too.
    """

    def __init__(self, f: Callable[_P, _Result], static: tuple[str, ...]) -> None:
        self._with_rule = jax.custom_jvp(f, nondiff_argnames=static)
        self._compiled = jax.jit(self._with_rule, static_argnames=static)
        functools.update_wrapper(self, f)

    def __call__(self, *args: _P.args, **keywords: _P.kwargs) -> _Result:
        return self._compiled(*args, **keywords)

    def defjvp(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Decorates the rule, which takes the static arguments, in their order, and then primals and tangents."""
        return self._with_rule.defjvp(rule)


def compiled_rule(*static: str) -> Callable[[Callable[_P, _Result]], CompiledRule[_P, _Result]]:
    """Decorates the body of a function; its rule follows by `defjvp`. static: the names of arguments that are not
    arrays. A φ or a mask must never be among them."""

    def decorate(f: Callable[_P, _Result]) -> CompiledRule[_P, _Result]:
        return CompiledRule(f, static)

    return decorate
