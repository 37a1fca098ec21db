"""Functions with rules of their own, and every φ, under every transformation equal the plain definition under it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import covering, named, some
from interpreter import evaluated

import jsoftmax
from jsoftmax import verify
from jsoftmax.verify import DERIVATIVES, FUNCTIONS, LOSSES, OTHERS, PHIS, SPARSE_MAPS


def weighted(value):
    """One number from all outputs, by distinct weights, so that no two outputs can be mistaken for one another."""
    return jnp.sum(jnp.cos(jnp.arange(1.0, 1 + value.size)) * jnp.ravel(value))


SCAN, MAP = "forward over reverse over scan", "reverse over reverse over map of vmap of cond of remat"
OVER_PHI = "vmap over φ, φ and scores"


def ours(function, phi, z, v, ways=(SCAN, MAP, OVER_PHI)):
    """Everything users compose, for rows of scores z and directions v, `[rows, scores, classes]`: two nestings of many
    transformations, and two over φ. Each gives values of order 0 to 2, which share one program."""

    def scalar(z, phi=phi):
        return weighted(function.ours(*z, phi=phi))

    def scan(z):
        return jax.lax.scan(lambda total, row: (total + scalar(row), None), 0.0, z)[0]

    def mixture(z):
        def body(row):
            return jax.lax.cond(row[0, 0] > 9, jnp.sum, jax.checkpoint(scalar), row)

        values = jax.lax.map(jax.vmap(body), z[:, None])
        return jnp.sum(values), values[:, 0]

    def along_v(z):
        gradient, values = jax.grad(mixture, has_aux=True)(z)
        return jnp.sum(v * gradient), (values, gradient)

    results = {}
    if SCAN in ways:
        results[SCAN] = jax.jvp(jax.value_and_grad(scan), (z,), (v,))
    if MAP in ways:
        along, (values, gradient) = jax.grad(along_v, has_aux=True)(z)
        results[MAP] = (values, gradient, along)
    if OVER_PHI in ways and jax.tree.leaves(phi):

        def by_parameters(phi, z):
            return (gradient := jax.grad(lambda phi: scalar(z, phi))(phi)), gradient

        several = jax.tree.map(lambda leaf: jnp.array([leaf, leaf]), phi)
        results[OVER_PHI] = jax.vmap(jax.jacfwd(by_parameters, 1, has_aux=True), (0, None))(several, z[0])
    return results


def plain(function, phi, z, v):
    """The same, assembled from values and derivatives of the plain definition in many digits."""
    xp = verify.ManyDigits()
    outputs = np.size(function.plain(phi, xp, *xp.array(z[0])))
    weigh = xp.array(np.cos(np.arange(1.0, 1 + outputs)))

    def scalar(z, phi=phi):
        return np.sum(weigh * np.ravel(function.plain(phi, xp, *z)))

    rows = [xp.orders(scalar, xp.array(a), xp.array(b)) for a, b in zip(z, v, strict=True)]
    value, gradient, along, _ = (np.array(parts).astype(float) for parts in zip(*rows, strict=True))
    results = {SCAN: ((np.sum(value), gradient), (np.sum(gradient * v), along)), MAP: (value, gradient, along)}
    leaves, structure = jax.tree.flatten(phi)
    if leaves:

        def of_parameters(theta, z):
            return scalar(z, jax.tree.unflatten(structure, list(theta)))

        def by_parameters(z):
            return xp.jacobian(lambda theta: of_parameters(theta, z))(xp.array(leaves))

        mixed = xp.jacobian(by_parameters)(xp.array(z[0])).astype(float)
        first = by_parameters(xp.array(z[0])).astype(float)
        results[OVER_PHI] = [np.array([d, d]) for d in (*mixed, *first)]
    return results


TWO = (jsoftmax.exp, jsoftmax.spherical(0.1))
WAYS = ((SCAN, OVER_PHI), (MAP,))
WITH_RULES = ("fenchel_young_loss", "mixture_log_softmax", "sink_softmax")
EXPRESSIONS = ("entropy_gradient", "cross_entropy_hessian", "spherical_z_loss")
"""Some of those that are expressions of functions above, in the gate. All others have the rules of these two lists, or
of the functions; the sparse maps, which the Fenchel–Young loss takes, are in a scan in test_sparse.py, too."""
OF_LABELS = ("cross_entropy", "kl_to_target", "plackett_luce_log_prob")
"""The other losses are functions of the −log p that the first of these takes."""
EVERY = [(f, TWO[1]) for f in (*FUNCTIONS, *named(LOSSES, OF_LABELS))]
EVERY += [(f, TWO[f in DERIVATIVES]) for f in named(DERIVATIVES + SPARSE_MAPS + OTHERS, WITH_RULES + EXPRESSIONS)]
SHORT = [  # a transformation sees the rules of a function, and those of log φ: each once
    *covering(FUNCTIONS, PHIS, WAYS, met=[(0, 1), (0, 2), (1, 2)]),
    *covering(named(LOSSES, OF_LABELS), TWO, WAYS[:1], met=[(0, 1)]),  # the other way, and φ with names: those above
    *covering(named(DERIVATIVES + SPARSE_MAPS + OTHERS, WITH_RULES), [jsoftmax.exp], WAYS[:1]),
]


@pytest.mark.parametrize(("function", "phi", "ways"), SHORT, ids=lambda a: a[0][:7] if isinstance(a, tuple) else str(a))
def test_survives(function, phi, ways):
    _survives(function, phi, ways)


@pytest.mark.full  # By default each function that has a rule of its own in some of the ways, and each φ: above.
@pytest.mark.parametrize(("function", "phi"), EVERY, ids=str)
def test_survives_every_way(function, phi):
    _survives(function, phi, (SCAN, MAP, OVER_PHI))


def _survives(function, phi, ways):
    phi = verify.rounded(phi)
    z, v = (np.stack([verify.scores(function, phi, seed + i)[:, :3] for i in (0, 1)]) for seed in (3, 5))
    with jax.enable_x64(True):
        got = evaluated(functools.partial(ours, function, phi, ways=ways))(np.float64(z), np.float64(v))
    wanted = plain(function, phi, np.float64(z), np.float64(v))
    assert got.keys() == wanted.keys() & set(ways)
    for name in got:
        for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(wanted[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * (np.max(np.abs(b)) or 1), err_msg=name)


@pytest.mark.parametrize("classes", some([300, 1000], [1000]))
def test_long_rows_in_a_scan(classes):
    """Rows of several blocks and, in the gate, of one sum, at order 2 inside a scan."""
    with jax.enable_x64(True):
        z = jnp.asarray(np.random.default_rng(6).normal(0, 2, (2, classes)))
        v = jnp.cos(z)

        def of(functions, in_a_scan):
            def total(row):
                return sum(weighted(f(row)) for f in functions)

            def scanned(z):
                return jax.lax.scan(lambda carry, row: (carry + total(row), None), 0.0, z)[0]

            def plainly(z):
                return jnp.sum(jax.vmap(total)(z))

            gradient = jax.grad(scanned if in_a_scan else plainly)
            return evaluated(lambda z: jax.jvp(gradient, (z,), (v,)))(z)

        one = [f for f in FUNCTIONS if f.scores == 1]
        ours = of([f.ours for f in one], True)
        wanted = of([functools.partial(f.plain, jsoftmax.exp, verify.Plain) for f in one], False)
        for a, b in zip(ours, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * np.max(np.abs(b)))


def lie(x):
    return jnp.sin(x)


lying_sin = jax.custom_jvp(lie)
lying_sin.defjvp(lambda primals, tangents: (lying_sin(primals[0]), 7 * lying_sin(primals[0]) * tangents[0]))


def test_checkpointed_bodies_keep_rules_at_order_two_in_a_scan():
    """jax 0.10 and 0.11 drop custom_jvp rules inside a scan at order 2 unless the body is checkpointed."""

    def h(x):
        return jnp.sum(jax.lax.map(jax.checkpoint(lying_sin), jnp.stack([x, x]))) / 2

    x = jnp.float32(0.7)
    np.testing.assert_allclose(jax.jvp(jax.grad(h), (x,), (1.0,))[1] / jnp.sin(x), 49, rtol=1e-5)


@pytest.mark.parametrize("classes", some([3, 300, 4500], [3]))
def test_left_out_in_a_scan(classes):
    """A class with a score of −inf at order 2 in a scan, where JAX may differentiate the bodies of functions: the
    results are those without the scan. By default of one length, since all of them take the same rules."""
    with jax.enable_x64(True):
        z = jnp.asarray(np.random.default_rng(7).normal(0, 2, (2, classes))).at[:, 1].set(-jnp.inf)
        v = jnp.cos(jnp.arange(z.size)).reshape(z.shape)

        def total(row):
            log_p = jnp.where(jnp.isneginf(row), 0, jsoftmax.log_softmax(row))
            return 100 * jsoftmax.entropy(row) + jsoftmax.log_normalizer(row) + weighted(jsoftmax.softmax(row) + log_p)

        def scanned(z):
            return jax.lax.scan(lambda carry, row: (carry + total(row), None), 0.0, z)[0]

        def second(f):
            gradient = jax.grad(f)
            return jax.jvp(gradient, (z,), (v,))[1], jax.grad(lambda z: jnp.sum(v * gradient(z)))(z)

        ours, wanted = (
            evaluated(functools.partial(second, f))() for f in (scanned, lambda z: total(z[0]) + total(z[1]))
        )
        for a, b in zip(ours, wanted, strict=True):
            np.testing.assert_array_equal(b[:, 1], 0)
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * np.max(np.abs(b)))
