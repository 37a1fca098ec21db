"""DiagonalPlusLowRank against dense linear algebra, for each operator and each φ: one list of each."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest
from cells import and_full, covering, some
from interpreter import evaluated
from modes import strict_promotion

import jsoftmax as js
from jsoftmax import verify

OPERATORS = {
    "softmax_jacobian": js.softmax_jacobian,
    "log_normalizer_hessian": js.log_normalizer_hessian,
    "entropy_hessian": js.entropy_hessian,
    "cross_entropy_hessian": lambda z, **keywords: js.cross_entropy_hessian(z, jnp.cos(z), **keywords),
}
every_operator = pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS)


def batch(phi, rows=3):
    """Scores `[rows, classes]` in φ's domain."""
    return np.stack([verify.scores(verify.FUNCTIONS[0], phi, seed)[0] for seed in range(rows)])


OF_DENSE = and_full(
    [
        ("softmax_jacobian", js.exp),
        ("softmax_jacobian", js.quadratic(2, 1, 1)),
        ("log_normalizer_hessian", js.spherical(0.1)),
        ("entropy_hessian", js.softplus),
        ("cross_entropy_hessian", js.relu_power(2, 0.1)),
    ],
    covering(OPERATORS, js.PHIS, met=[(0, 1)]),
    itertools.product(OPERATORS, (js.exp, js.spherical(0.1))),
)
"""By default each operator, in the gate each φ. Each operator of each φ, as a matrix: `python -m jsoftmax verify`."""


@pytest.mark.parametrize(("name", "phi"), OF_DENSE, ids=str)
def test_equals_dense(name, phi):
    """Every method against the dense matrix in float64, damped so that D > 0; the operators are often indefinite."""
    with jax.enable_x64(True):
        z = np.float64(batch(phi))
        v, b = np.sin(1 + z), np.cos(2 * z)

        @evaluated
        def results(z, v, b):
            A = OPERATORS[name](z, phi=phi)
            damping = 0.1 - jnp.minimum(jnp.min(A.d, -1), 0)
            solved, (sign, logabs) = A.solve(b, damping), A.slogdet(damping)
            return (A.mv(v), A.transpose().mv(v), A.diagonal(), A.trace(), solved, sign, logabs), A.as_matrix(), damping

        got, dense, damping = results(z, v, b)
        assert dense.shape == (*z.shape, z.shape[-1])
        damped = dense + damping[:, None, None] * np.eye(z.shape[-1])
        sign, logabs = np.linalg.slogdet(damped)
        want = (
            np.einsum("nij,nj->ni", dense, v),
            np.einsum("nij,ni->nj", dense, v),
            np.einsum("nii->ni", dense),
            np.einsum("nii->n", dense),
            np.linalg.solve(damped, b[..., None])[..., 0],
            sign,
            logabs,
        )
        for a, w in zip(got, want, strict=True):
            np.testing.assert_allclose(a, w, rtol=1e-9, atol=1e-12 * np.max(np.abs(w)))


def test_sign_of_a_diagonal_below_0():
    """One of three entries."""
    u = jnp.array([[1.0], [0.5], [0.25]])
    A = js.DiagonalPlusLowRank(jnp.array([2.0, -1.0, 3.0]), u, u)
    (sign, logabs), dense = evaluated(lambda A: (A.slogdet(), A.as_matrix()))(A)
    assert sign == -1
    np.testing.assert_allclose(logabs, np.linalg.slogdet(dense)[1], rtol=1e-6)


def test_some_are_indefinite():
    """What the solves above are tested on."""
    eigenvalues = np.linalg.eigvalsh(evaluated(lambda z: js.entropy_hessian(z).as_matrix())(batch(js.exp)))
    assert np.any(eigenvalues > 1e-2)
    assert np.any(eigenvalues < -1e-2)


@every_operator
def test_symmetric_where_it_says_so(make):
    for phi in (js.exp, js.softplus):
        A = make(batch(phi), phi=phi)
        dense = np.asarray(A.as_matrix())
        assert A.symmetric == np.allclose(dense, dense.swapaxes(-1, -2), rtol=1e-5, atol=1e-7)


@functools.partial(jax.jit, static_argnums=0)
def solved(make, z, b, damping):
    """The operator, its dense matrix and the solution for b."""
    A = make(z)
    return A, A.as_matrix(), A.solve(b, damping)


@pytest.mark.parametrize("damping", some([1e-4, 1e-2, 1.0], [1e-4]))  # the least is the worst conditioned
def test_solve_is_no_worse_than_dense(damping):
    """float32, long rows, some almost one-hot: the error is a dense solve's, or κ ulp."""
    rng = np.random.default_rng(0)
    z = np.float32(rng.normal(0, 3, (4, 200)))
    z[2:, 7] += 12
    b = np.float32(rng.normal(size=z.shape))
    for make in (js.softmax_jacobian, js.entropy_hessian):
        A, dense, solution = solved(make, z, b, damping)
        exact = np.float64(dense) + damping * np.eye(200)
        D = np.float64(A.d) + damping
        want = np.linalg.solve(exact, b[..., None])[..., 0]
        error = np.linalg.norm(solution - want, axis=-1) / np.linalg.norm(want, axis=-1)
        positive = np.all(D > 0, -1)
        assert make is js.entropy_hessian or np.all(positive)
        bound = 1.2e-7 * np.linalg.cond(exact)
        assert np.all(error[positive] <= 4 * bound[positive])


def test_a_tiny_entry_of_the_damped_diagonal_costs_its_condition():
    """As the docstring says: the error is of the order of κ(D) ulp then."""
    rng, diagonal = np.random.default_rng(1), jax.jit(lambda z: js.entropy_hessian(z).d)
    for _ in range(20):
        z, b = np.float32(rng.normal(0, 2, 12)), np.float32(rng.normal(size=12))
        d = np.asarray(diagonal(z))
        damping = np.float32(1e-4 - np.min(d))
        D = np.float64(d + damping)
        _, dense, solution = solved(js.entropy_hessian, z, b, damping)
        exact = np.float64(dense) + np.float64(damping) * np.eye(12)
        want = np.linalg.solve(exact, b)
        error = np.linalg.norm(solution - want) / np.linalg.norm(want)
        assert error <= 4 * 1.2e-7 * (np.linalg.cond(exact) + np.max(D) / np.min(D))


def test_shapes_belong_together():
    d, u = jnp.ones(3), jnp.ones((3, 1))
    np.testing.assert_array_equal(js.DiagonalPlusLowRank(d, u, u).as_matrix(), np.eye(3) + 1)
    for parts in ((d, d, d), (d, u, jnp.ones((3, 2))), (d, u[:2], u[:2]), (d, u[:, :0], u[:, :0]), (d[0], d, d)):
        with pytest.raises(ValueError, match=r"DiagonalPlusLowRank: d must be \[..., K\]"):
            js.DiagonalPlusLowRank(*parts)
    axes = js.DiagonalPlusLowRank(0, 0, 0)
    A = js.DiagonalPlusLowRank(jnp.ones((2, 3)), jnp.ones((2, 3, 1)), jnp.ones((2, 3, 1)))
    np.testing.assert_array_equal(jax.vmap(lambda A: A.mv(d), in_axes=(axes,))(A), np.full((2, 3), 4))


def test_strict_promotion():
    with strict_promotion():

        @evaluated
        def results(z, v):
            A = js.softmax_jacobian(z)
            return A.mv(v), A.pinv_mv(v), A.solve(v, 0.1), *A.slogdet(0.1), A.as_matrix(), A.trace()

        for result in results(np.float32([0.0, 1.0, -np.inf]), np.ones(3, np.float32)):
            assert result.dtype == jnp.float32
            assert np.all(np.isfinite(result))


def test_a_zero_of_the_damped_diagonal_is_nan_in_its_row():

    @evaluated
    def results(z):
        A = js.softmax_jacobian(z)
        return (A.solve(jnp.ones(3)), *A.slogdet()), A.solve(jnp.ones(3), jnp.array([0.1, 0.2]))

    undamped, damped = results(jnp.array([[0.0, 1.0, -jnp.inf], [0.0, 1.0, 2.0]]))
    for result in undamped:
        assert np.all(np.isnan(result[0]))
    assert np.all(np.isfinite(damped))


@pytest.mark.parametrize("keep", [[True] * 5, [True, False, True, True, False]])
def test_pseudo_inverse(keep):

    @evaluated
    def inverse_and_dense(z, where):
        J = js.softmax_jacobian(z, where)
        return jax.vmap(J.pinv_mv)(jnp.eye(5)), J.as_matrix()

    with jax.enable_x64(True):
        inverse, dense = inverse_and_dense(np.array([0.3, -1.0, 2.0, 0.0, -0.7]), np.array(keep))
        np.testing.assert_allclose(inverse, np.linalg.pinv(dense, rtol=1e-10), rtol=1e-9, atol=1e-12)


def test_lives_inside_transformations():
    """A pytree in jit, vmap, scan and grad: the same values, no retrace for new scores."""
    z, v = batch(js.exp), jnp.array([1.0, 2.0, -1.0, 0.5])

    @evaluated
    def products(z):
        A = js.entropy_hessian(z)
        return A, A.mv(v), jax.vmap(lambda A: A.mv(v))(A), jax.lax.scan(lambda carry, A: (carry, A.mv(v)), 0.0, A)[1]

    A, want, mapped, scanned = products(z)
    np.testing.assert_allclose(mapped, want, rtol=1e-6)
    np.testing.assert_allclose(scanned, want, rtol=1e-6)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def solve(A):
        return A.solve(v, 3.0)

    for shift in (0.0, 1.0):
        solve(js.entropy_hessian(z + shift * v * z))

    def through(z):
        return jnp.sum(js.softmax_jacobian(z).solve(v, 0.5) ** 2)

    def dense(z):
        return jnp.sum(jnp.linalg.solve(jax.jacobian(jax.nn.softmax)(z) + 0.5 * jnp.eye(4), v) ** 2)

    for transform in (jax.grad, jax.hessian):
        found, want = (evaluated(transform(f))(z[0]) for f in (through, dense))
        np.testing.assert_allclose(found, want, rtol=2e-4, atol=1e-5)
    assert repr(A) == "DiagonalPlusLowRank(shape=(3, 4, 4), rank=2)"


def test_lineax():
    A = js.softmax_jacobian(jnp.array([0.0, 1.0, 2.0]))
    operator = A.to_lineax()
    np.testing.assert_allclose(operator.as_matrix(), A.as_matrix(), rtol=1e-6, atol=1e-8)
    assert lineax.is_symmetric(operator)
    assert not lineax.is_symmetric(js.softmax_jacobian(jnp.array([0.0, 1.0]), phi=js.softplus).to_lineax())
    damped = operator + lineax.IdentityLinearOperator(operator.in_structure())
    solution = lineax.linear_solve(damped, jnp.arange(3.0), lineax.AutoLinearSolver(well_posed=True))
    np.testing.assert_allclose(solution.value, A.solve(jnp.arange(3.0), 1.0), rtol=1e-5)
