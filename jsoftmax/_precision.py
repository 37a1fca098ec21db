"""Products that keep their digits on every device."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# JAX's default for float32 keeps 11 bits on GPUs and 8 on TPUs; squares of scores would lose twice as many digits
precise = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def full_precision(dtype: Any) -> lax.Precision | None:
    """The precision of products of factors of which the narrowest has the dtype: all digits of wide ones."""
    return lax.Precision.HIGHEST if jnp.finfo(dtype).bits >= 32 else None


def default_precision(dtype: Any) -> lax.Precision | None:
    """The same, where the caller names none; JAX's own where `jax_default_matmul_precision` is set."""
    chosen = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return full_precision(dtype) if chosen is None else None


_DOT_ALGORITHMS = {
    "bfloat16": lax.DotAlgorithmPreset.BF16_BF16_F32,
    "float16": lax.DotAlgorithmPreset.F16_F16_F32,
}


def tangent_precision(dtype: Any, precision: Any) -> lax.DotAlgorithmPreset | None:
    """For products of tangents with factors of the dtype on GPUs and TPUs: rounded to a narrow dtype, and summed in
    float32, where the caller names no precision."""
    return _DOT_ALGORITHMS.get(jnp.dtype(dtype).name) if precision is None else None
