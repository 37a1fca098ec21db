"""What the tests of sharded functions share."""

import math
import re

import jax
import numpy as np
from jax.sharding import AxisType

from jsoftmax.verify import jit_formulas

DEVICES = 4


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((DEVICES,), ("v",), axis_types=(kind,), devices=jax.devices("cpu")[:DEVICES])


def assert_close(found, want, rtol):
    """Asserts a relative tolerance. Small numbers may also differ by a hundredth of it, relative to the largest
    number."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol / 100 * np.max(np.abs(b)))


KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def program(f, *given):
    """The compiled program, as XLA prints it: what devices exchange does not depend on how kernels are compiled."""
    return jit_formulas(f).lower(*given).compile().as_text()


def collectives(f, *given):
    """The kinds of the operations between devices in the compiled program, and how many all-reduces are in no loop."""
    text = program(f, *given)
    entry = text[text.index("\nENTRY ") :]
    found = re.findall(rf" ({KINDS})(?:-start)?\(", text)
    return found, len(re.findall(r" all-reduce(?:-start)?\(", entry))


def exchanged(f, *given):
    """The operations of the compiled program between devices, each with the length of the longest array it hands on."""
    found = re.findall(rf"= ([^=\n]*?) ({KINDS})(?:-start)?\(", program(f, *given))

    def longest(out):
        return max(math.prod(map(int, re.findall(r"\d+", shape))) for shape in re.findall(r"\[([\d,]*)\]", out))

    return [(kind, longest(out)) for out, kind in found]
