"""What a function keeps for its backward pass: one array of the scores' size and numbers of rows, or what its record
says.

For many scores, p, log p and losses of labels keep two such arrays, of which a program reads one: p on CPU, the scores
elsewhere.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from cells import and_full

import jsoftmax as js
from jsoftmax import losses
from jsoftmax.sums.cpu import paths
from jsoftmax.verify import FUNCTIONS, LOSSES, OTHERS, SPARSE_MAPS

SHAPES = [(6, 12), (2 * paths.LARGE // 512, 512)]
"""Few scores and many; rows of several lengths and the masks of losses are far fewer than either."""


def kept(f, *scores):
    """How many arrays of the scores' size jax.vjp keeps: of floats, and of flags."""
    leaves = jax.tree.leaves(jax.eval_shape(lambda *z: jax.vjp(f, *z)[1], *scores))
    large = [a.dtype for a in leaves if a.size >= scores[0].size]
    floats = sum(a.size // scores[0].size for a in leaves if jnp.issubdtype(a.dtype, jnp.floating))
    return floats, large.count(bool)


EVERY = [*FUNCTIONS, *LOSSES, *SPARSE_MAPS, *OTHERS]
OWN = [f for f in EVERY if f.keeps is not None or f.keeps_of_many is not None]
OF_KEPT = and_full([(f, shape) for f in OWN for shape in SHAPES], itertools.product(EVERY, SHAPES))
"""By default those that keep another number of arrays than they have scores."""


@pytest.mark.parametrize(("function", "shape"), OF_KEPT, ids=str)
def test_kept(function, shape):
    scores = [jnp.zeros(shape)] * function.scores
    floats, flags = kept(functools.partial(function.with_rows(shape[0]).ours, phi=js.exp), *scores)
    few = function.scores if function.keeps is None else function.keeps
    assert floats == (few if shape == SHAPES[0] or function.keeps_of_many is None else function.keeps_of_many)
    assert flags <= 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1, "margin": 0.5}], ids=str)
def test_kept_by_the_options_of_cross_entropy(options, shape):
    f = functools.partial(losses.cross_entropy, labels=jnp.zeros(shape[0], int), **options)
    assert kept(f, jnp.zeros(shape)) == (1 + (shape != SHAPES[0]), int("label_smoothing" in options))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("f", "most"), [(js.softmax, 2), (js.log_softmax, 2), (js.entropy, 1), (losses.cross_entropy, 2)]
)
def test_kept_of_narrow_scores(f, most, shape):
    """Narrow scores keep no more than wide ones; the p of labels and of the entropy is float32."""
    arguments = (jnp.zeros(shape[0], int),) if f is losses.cross_entropy else ()
    narrow, wide = (kept(lambda z: f(z, *arguments), jnp.zeros(shape, dtype))[0] for dtype in (jnp.bfloat16, float))
    assert narrow == wide == (1 if shape == SHAPES[0] else most)
