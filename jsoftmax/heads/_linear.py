"""Products that keep their digits on every device."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

# JAX's default for float32 keeps 11 bits on GPUs and 8 on TPUs; squares of scores would lose twice as many digits
precise = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def full_precision(dtype: Any) -> lax.Precision | None:
    """The precision of products of factors of which the narrowest has the dtype: all digits of wide ones."""
    return lax.Precision.HIGHEST if jnp.finfo(dtype).bits >= 32 else None
