"""Products that keep their digits on every device."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# JAX's default for float32 keeps 11 bits on GPUs and 8 on TPUs; squares of scores would lose twice as many digits
precise = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def full_precision(dtype: Any) -> lax.Precision | None:
    """The precision of products whose narrowest factor has this dtype: wide factors are multiplied with all digits."""
    return lax.Precision.HIGHEST if jnp.finfo(dtype).bits >= 32 else None


def default_precision(dtype: Any) -> lax.Precision | None:
    """The precision of products if the caller names none; None, for JAX's own, if `jax_default_matmul_precision` is
    set."""
    chosen = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return full_precision(dtype) if chosen is None else None


_DOT_ALGORITHMS = {
    "bfloat16": lax.DotAlgorithmPreset.BF16_BF16_F32,
    "float16": lax.DotAlgorithmPreset.F16_F16_F32,
}


def tangent_precision(dtype: Any, precision: Any) -> lax.DotAlgorithmPreset | None:
    """The precision of products of tangents with factors of this dtype on GPUs and TPUs. If the factors are narrow and
    the caller names no precision, tangents are rounded to their dtype, and products are summed in float32."""
    return _DOT_ALGORITHMS.get(jnp.dtype(dtype).name) if precision is None else None
