"""What all losses share: rows that do not count, weights of 0, what a wrong label says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import some
from interpreter import evaluated

import jsoftmax as js
from jsoftmax import losses

Z = jnp.array([[0.5, -1.0, 2.0], [0.1, 0.2, 0.3]])
LABELS = jnp.array([2, -1])

# loss, and the parameters that can be learned
PARAMETERS = {
    "phi": (losses.cross_entropy, lambda a: {"phi": js.spherical(a)}),
    "margin": (losses.cross_entropy, lambda a: {"margin": a}),
    "smoothing": (losses.cross_entropy, lambda a: {"label_smoothing": a}),
    "z_loss": (losses.cross_entropy, lambda a: {"z_loss": a}),
    "weights": (losses.cross_entropy, lambda a: {"class_weights": a * jnp.array([1.0, 2.0, 3.0])}),
    "prior": (losses.cross_entropy, lambda a: {"log_weights": a * jnp.array([1.0, 2.0, 3.0])}),
    "gamma": (losses.focal_cross_entropy, lambda a: {"gamma": a}),
    "epsilon": (losses.poly_cross_entropy, lambda a: {"epsilon": a}),
    "scale": (losses.spherical_z_loss, lambda a: {"scale": a}),
    "shift": (losses.spherical_z_loss, lambda a: {"shift": a}),
    "alpha": (js.fenchel_young_loss, lambda a: {"alpha": 1 + a}),
}


FEW = ("phi", "weights", "gamma", "scale")
"""Of each kind of parameter; no loss has code of its own for rows that do not count."""


@pytest.mark.parametrize("name", some(PARAMETERS, FEW))
def test_rows_that_do_not_count_leave_no_nan(name):
    """Backwards, too: the gradient in every parameter is that of the other row alone."""
    loss, options = PARAMETERS[name]

    def total(a, z, labels, **more):
        return jnp.sum(loss(z, labels, **options(a), **more))

    rows = jnp.array([True, False])

    @evaluated
    def found(a, z):
        of_one = jax.value_and_grad(total)(a, Z[:1], LABELS[:1])
        both = [jax.value_and_grad(total)(a, z, LABELS, **more) for more in ({"ignore_label": -1}, {"where": rows})]
        return of_one, both, total(a, z, LABELS)

    for z in (Z, Z.at[1].set(jnp.nan)):
        want, both, of_all = found(0.5, z)
        for got in both:
            np.testing.assert_allclose(got, want, rtol=1e-6)
        assert np.isnan(of_all)


@pytest.mark.parametrize(
    "loss", [losses.cross_entropy, losses.focal_cross_entropy, losses.poly_cross_entropy], ids=lambda f: f.__name__
)
def test_a_weight_of_zero_leaves_an_infinite_loss_out(loss):
    z = jnp.array([0.0, 1.0, -jnp.inf])
    f = functools.partial(loss, z, jnp.array(2))
    assert f() == jnp.inf
    value, slope = jax.value_and_grad(lambda w: f(class_weights=w))(jnp.array([1.0, 1.0, 0.0]))
    assert value == 0
    np.testing.assert_array_equal(slope, 0)
    finite, slope = jax.value_and_grad(lambda w: loss(z, jnp.array(1), class_weights=w))(jnp.array([1.0, 0.0, 1.0]))
    assert finite == 0
    np.testing.assert_allclose(slope[1], loss(z, jnp.array(1)))


def test_smoothing_of_1_leaves_the_label_out():
    z = jnp.array([0.0, 1.0, -jnp.inf])
    of_spread = losses.cross_entropy(z[:2], jnp.array(0), label_smoothing=1.0)
    np.testing.assert_allclose(losses.cross_entropy(z, jnp.array(2), label_smoothing=1.0), of_spread)


WRONG = [
    (lambda: losses.cross_entropy(Z, jnp.eye(3, dtype=int)[:2]), "labels.astype(float)"),
    (lambda: losses.cross_entropy(Z, LABELS[:, None]), "labels.reshape(2,)"),
    (lambda: losses.cross_entropy(Z, LABELS[:1]), "are (1,): name others"),
    (lambda: losses.cross_entropy(Z, LABELS.astype(float)), "labels.astype(int)"),
    (lambda: losses.kl_to_target(Z, jnp.ones(3) / 3), "jnp.broadcast_to(targets, (2, 3))"),
    (lambda: losses.cross_entropy(Z, LABELS, where=jnp.ones(3, bool)), "to leave classes out"),
    (lambda: losses.focal_cross_entropy(Z, LABELS, gamma=float("inf")), "gamma must be >= 0 and finite; got inf"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong[1])
def test_messages_name_the_way_out(wrong):
    call, way_out = wrong
    with pytest.raises(ValueError, match="must") as caught:
        call()
    assert way_out in str(caught.value), caught.value
