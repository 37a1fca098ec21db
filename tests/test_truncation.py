"""Truncated laws against a sort of the row, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import product, some
from interpreter import evaluated
from platforms import as_on_accelerators

import jsoftmax as js
from jsoftmax import gumbel

INF = np.inf
ROWS = {
    "random": np.random.default_rng(0).normal(0, 3, 1000),
    "ties": np.random.default_rng(1).integers(-3, 4, 400),
    "all equal": np.zeros(7),
    "signed zeros": np.array([0.0, -0.0, 1.0, -1.0]),
    "one class": np.array([2.0]),
    "huge and tiny": np.array([3e38, -3e38, 1e-40, -1e-40, 0.0, -INF]),
    "neighbours": np.nextafter(np.float32(1), np.arange(-3, 3, dtype=np.float32)),
    "left out": np.array([-INF, 1.0, -INF, 0.5]),
}


def by_sort(z, top_k=None, top_p=None, min_p=None):
    """The classes that stay, by p from the largest on; ties stay or go together."""
    z = np.asarray(z, np.float64)
    kept = z > -INF
    if top_k is not None and kept.sum() > top_k:
        kept &= z >= np.sort(z)[-top_k]
    if top_p is not None:
        e = np.where(kept, np.exp(z - z.max()), 0)
        before = np.array([e[z > a].sum() for a in z]) / e.sum()
        kept &= before < top_p
    if min_p is not None:
        kept &= z >= z.max() + np.log(min_p)
    return kept


@pytest.mark.parametrize(("row", "dtype"), product(ROWS, ["float32", "bfloat16"], met=[(0, 1)]))
def test_equals_a_sorted_reference(row, dtype):
    """One compiled program for all numbers, which are traced."""
    z = jnp.asarray(ROWS[row], jnp.float32).astype(dtype)
    given = np.asarray(z.astype(jnp.float32))

    @evaluated
    def cut(top_k, top_p, min_p):
        all_three = js.truncate(z, top_k=top_k, top_p=top_p, min_p=min_p)
        return js.truncate(z, top_k=top_k), js.truncate(z, top_p=top_p), js.truncate(z, min_p=min_p), all_three

    for k, p, m in ((1, 0.5, 0.3), (2, 0.13, 1.0), (5, 0.97, 0.0111), (10_000, 0.71, 0.6)):
        wanted = (
            by_sort(given, top_k=k), by_sort(given, top_p=p), by_sort(given, min_p=m), by_sort(given, k, p, m),
        )  # fmt: skip
        for got, kept in zip(cut(k, p, m), wanted, strict=True):
            assert got.dtype == dtype
            np.testing.assert_array_equal(got.astype(jnp.float32), np.where(kept, given, -INF), f"{k} {p} {m}")


def test_one_number_a_row_and_other_axes():
    z = jax.random.normal(jax.random.key(0), (50, 3))
    got = js.truncate(z, 0, top_k=jnp.array([[1, 7, 50]]), top_p=jnp.array([[0.5, 0.5, 1.0]]))
    for i, (k, p) in enumerate(((1, 0.5), (7, 0.5), (50, 1.0))):
        np.testing.assert_array_equal(np.isfinite(got[:, i]), by_sort(z[:, i], k, p))
    both = js.truncate(z, None, top_k=4)
    assert int(jnp.sum(jnp.isfinite(both))) == 4


def test_other_laws_are_cut_by_their_own_probabilities():
    """A φ that decreases, weights and a mask: the law that is left is that of the whole, normalised again."""
    z, phi = jnp.array([-6.0, -1.0, 0.0, 2.0, 5.0]), js.taylor(2)
    options = {"phi": phi, "log_weights": jnp.log(jnp.array([1.0, 1.0, 1.0, 1.0, 0.1]))}
    where = jnp.array([True, True, True, True, False])
    p = js.softmax(z, where=where, **options)
    cut = js.truncate(z, where=where, top_k=2, **options)
    np.testing.assert_array_equal(np.isfinite(cut), p >= jnp.sort(p)[-2])
    np.testing.assert_allclose(
        js.softmax(cut, **options), jnp.where(jnp.isfinite(cut), p, 0) / p[np.isfinite(cut)].sum()
    )


def test_derivatives_are_those_of_the_classes_that_stay():
    z = np.float32(np.random.default_rng(1).normal(size=9))
    kept = jnp.isfinite(js.truncate(z, top_k=4))
    want = evaluated(jax.hessian(lambda z: js.entropy(z, where=kept)))(z)
    np.testing.assert_allclose(
        evaluated(jax.hessian(lambda z: js.entropy(js.truncate(z, top_k=4))))(z), want, 1e-5, 1e-6
    )


def test_draws_stay_inside():
    cut = js.truncate(np.float32(np.random.default_rng(2).normal(size=64)), top_p=0.5)
    draws = gumbel.categorical(jax.random.key(3), cut, shape=(1000,))
    assert np.all(np.isfinite(cut)[draws])


def test_edges():
    z = jnp.array([[np.nan, 1.0, 0.0], [INF, 1.0, 0.0], [-INF, -INF, -INF], [0.0, 1.0, 0.0]])
    for options in ({"top_k": 1}, {"top_p": 0.1}, {"min_p": 1.0}, {"top_k": 2, "top_p": 0.4, "min_p": 0.2}):
        got = js.truncate(z, **options)
        np.testing.assert_array_equal(got[:3], z[:3])
        np.testing.assert_array_equal(got[3], [-INF, 1.0, -INF])
    out_of_range = [{"top_k": 0}, {"top_p": 0.0}, {"top_k": -3}, {"min_p": 1.5}, {"top_p": np.nan}, {"min_p": np.nan}]
    for options in out_of_range:  # traced: at least one class stays
        got = jax.jit(lambda options: js.truncate(z[3], **options))(options)
        np.testing.assert_array_equal(got, [-INF, 1.0, -INF])
    assert js.truncate(jnp.zeros((2, 0)), top_k=1).shape == (2, 0)
    np.testing.assert_array_equal(js.truncate(z[3], top_p=1.0, min_p=0.0, top_k=99), z[3])
    np.testing.assert_array_equal(js.truncate(z[3], top_k=2**40), z[3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be an integer >= 1"),
        ({"top_k": 2.5}, "top_k must be an integer"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\]"),
        ({"top_k": jnp.ones((2, 3), int)}, "one for each row"),
    ],
)
def test_wrong_calls(options, message):
    with pytest.raises((TypeError, ValueError), match=f"truncate: .*{message}"):
        js.truncate(jnp.zeros((2, 3)), **options)


AS_GIVEN = {"float32": jnp.asarray, "rounded": jnp.round, "bfloat16": lambda z: z.astype(jnp.bfloat16)}


@pytest.mark.parametrize("name", some(AS_GIVEN, ["bfloat16"]))
def test_as_on_accelerators(name):
    """Thresholds by digits of three bits. By default of the fewest digits: a digit left over, and ties, are there,
    too."""
    z = AS_GIVEN[name](3 * jax.random.normal(jax.random.key(4), (3, 500)))

    def cut():
        ways = ({"top_k": 7}, {"top_k": 499}, {"top_p": 0.6})
        return evaluated(lambda z: [js.truncate(z, **way) for way in ways])(z)

    want = cut()
    with as_on_accelerators():
        found = cut()
    for got, wanted in zip(found, want, strict=True):
        np.testing.assert_array_equal(got.astype(jnp.float32), wanted.astype(jnp.float32))
