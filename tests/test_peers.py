"""Agreement with PyTorch and the package entmax: with their numbers from a file, and with them if they are
installed."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest

import jsoftmax as js
from jsoftmax import gumbel, losses
from jsoftmax.heads import adaptive

LIVE = all(importlib.util.find_spec(name) for name in ("torch", "entmax"))


@pytest.fixture(scope="module", params=["file", *(["live"] if LIVE else [])])
def numbers(request):
    return peers.measure() if request.param == "live" else json.loads(peers.FILE.read_text())


def same(ours, theirs, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(ours, np.float32(theirs), rtol=rtol, atol=atol)


def agrees(f, theirs, cotangent):
    value = jax.jit(f)(peers.Z)
    same(value, theirs["value"])
    product = jax.jit(lambda z, cotangent: jax.vjp(f, z)[1](cotangent)[0])
    same(product(peers.Z, jnp.asarray(cotangent(value))), theirs["product"])


def test_cross_entropy(numbers):
    for name, options in peers.CROSS_ENTROPY.items():
        same(losses.cross_entropy(peers.Z, peers.LABELS, **options), numbers["torch"]["cross_entropy"][name])
    same(losses.cross_entropy(peers.Z, peers.Q), numbers["torch"]["distributions"])
    smoothed = losses.cross_entropy(peers.Z, peers.Q, label_smoothing=0.1)
    same(smoothed, numbers["torch"]["smoothed distributions"])


@pytest.mark.full  # Against the densities as they are written: test_gumbel.py.
def test_densities_of_relaxed_samples(numbers):
    """PyTorch's ExpRelaxedCategorical, RelaxedOneHotCategorical and RelaxedBernoulli."""
    assert numbers["torch"]["concrete"].keys() == {str(t) for t in peers.TEMPERATURES}
    for temperature, theirs in numbers["torch"]["concrete"].items():
        log_x, tau = np.float32(theirs["log_x"]), float(temperature)
        same(gumbel.exp_concrete_log_density(log_x, peers.Z, tau), theirs["exp_concrete"])
        same(gumbel.concrete_log_density(np.exp(log_x), peers.Z, tau), theirs["concrete"])
        same(gumbel.binary_concrete_log_density(np.exp(log_x), peers.Z, tau), theirs["binary"], rtol=1e-4)


@pytest.mark.full  # Against the conditions of the maximum: test_sparse.py; against the definition: test_oracle.py.
def test_sparse_maps(numbers):
    theirs = numbers["entmax"]
    agrees(js.sparsemax, theirs["sparsemax"], lambda _: peers.G)
    agrees(js.entmax15, theirs["entmax15"], lambda _: peers.G)
    for alpha, of_alpha in theirs["bisect"].items():
        agrees(lambda z, alpha=float(alpha): js.entmax(z, alpha), of_alpha, lambda _: peers.G)


def test_fenchel_young_losses(numbers):
    for alpha, of_alpha in numbers["entmax"]["losses"].items():
        agrees(lambda z, a=float(alpha): js.fenchel_young_loss(z, peers.LABELS, a), of_alpha, jnp.ones_like)


@pytest.mark.full  # Against the plain definition: test_heads_adaptive.py.
def test_adaptive_softmax(numbers):
    """torch.nn.AdaptiveLogSoftmaxWithLoss: values, gradients by the weights' names, the mode."""
    theirs, params = numbers["torch"]["adaptive"], adaptive.from_torch(peers.ADAPTIVE)
    assert params.cutoffs == (*peers.CUTOFFS, peers.CLASSES)
    log_prob, pull = jax.vjp(lambda p, h: adaptive.log_prob(p, h, peers.CLASS_OF), params, jnp.asarray(peers.Z))
    by_weights, by_hidden = pull(jnp.ones(4))
    same(log_prob, theirs["log_prob"])
    same(by_hidden, theirs["by_hidden"])
    ours = adaptive.to_state(by_weights)
    assert ours.keys() == theirs["by_weights"].keys()
    for name, value in ours.items():
        same(value, theirs["by_weights"][name])
    same(adaptive.log_probs(params, peers.Z), theirs["log_probs"])
    np.testing.assert_array_equal(adaptive.predict(params, peers.Z), theirs["predict"])


@pytest.mark.skipif(not LIVE, reason="needs torch")
def test_adaptive_softmax_from_and_to_torch():
    import torch  # noqa: PLC0415

    for bias in (True, False):
        theirs = torch.nn.AdaptiveLogSoftmaxWithLoss(6, peers.CLASSES, [3, 8], peers.DIV_VALUE, head_bias=bias)
        params = adaptive.from_torch(theirs)
        made = adaptive.init(jax.random.key(0), 6, peers.CLASSES, (3, 8), div_value=peers.DIV_VALUE, head_bias=bias)
        assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)
        with torch.no_grad():
            want = theirs.log_prob(torch.tensor(peers.Z)).numpy()
            same(adaptive.log_probs(params, peers.Z), want)
            theirs.load_state_dict(adaptive.to_torch(made))
            same(adaptive.log_probs(made, peers.Z), theirs.log_prob(torch.tensor(peers.Z)).numpy())
        narrow = adaptive.from_torch(theirs.to(torch.bfloat16))
        assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.bfloat16)}
