"""What the tests of sharded functions share."""

import re

import jax
import numpy as np
from jax.sharding import AxisType

DEVICES = 4


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((DEVICES,), ("v",), axis_types=(kind,))


def assert_close(found, want, rtol):
    """Relatively, and for small numbers to a hundredth of that of the largest."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol / 100 * np.max(np.abs(b)))


def collectives(f, *given):
    """Which operations of the compiled program are between devices, and how many all-reduces are in no loop."""
    text = jax.jit(f).lower(*given).compile().as_text()
    entry = text[text.index("\nENTRY ") :]
    found = re.findall(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)
    return found, len(re.findall(r" all-reduce(?:-start)?\(", entry))
