"""Agreement with PyTorch and the package entmax: their numbers from a file, and live where they are installed."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest

import jsoftmax as js
from jsoftmax import gumbel, losses

LIVE = all(importlib.util.find_spec(name) for name in ("torch", "entmax"))


@pytest.fixture(scope="module", params=["file", *(["live"] if LIVE else [])])
def numbers(request):
    return peers.measure() if request.param == "live" else json.loads(peers.FILE.read_text())


def same(ours, theirs, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(ours, np.float32(theirs), rtol=rtol, atol=atol)


def agrees(f, theirs, cotangent):
    value, pull = jax.vjp(f, peers.Z)
    same(value, theirs["value"])
    same(pull(jnp.asarray(cotangent(value)))[0], theirs["product"])


def test_cross_entropy(numbers):
    for name, options in peers.CROSS_ENTROPY.items():
        same(losses.cross_entropy(peers.Z, peers.LABELS, **options), numbers["torch"]["cross_entropy"][name])
    same(losses.cross_entropy(peers.Z, peers.Q), numbers["torch"]["distributions"])
    smoothed = losses.cross_entropy(peers.Z, peers.Q, label_smoothing=0.1)
    same(smoothed, numbers["torch"]["smoothed distributions"])


def test_densities_of_relaxed_samples(numbers):
    """PyTorch's ExpRelaxedCategorical, RelaxedOneHotCategorical and RelaxedBernoulli."""
    assert numbers["torch"]["concrete"].keys() == {str(t) for t in peers.TEMPERATURES}
    for temperature, theirs in numbers["torch"]["concrete"].items():
        log_x, tau = np.float32(theirs["log_x"]), float(temperature)
        same(gumbel.exp_concrete_log_density(log_x, peers.Z, tau), theirs["exp_concrete"])
        same(gumbel.concrete_log_density(np.exp(log_x), peers.Z, tau), theirs["concrete"])
        same(gumbel.binary_concrete_log_density(np.exp(log_x), peers.Z, tau), theirs["binary"], rtol=1e-4)


def test_sparse_maps(numbers):
    theirs = numbers["entmax"]
    agrees(js.sparsemax, theirs["sparsemax"], lambda _: peers.G)
    agrees(js.entmax15, theirs["entmax15"], lambda _: peers.G)
    for alpha, of_alpha in theirs["bisect"].items():
        agrees(lambda z, alpha=float(alpha): js.entmax(z, alpha), of_alpha, lambda _: peers.G)


def test_fenchel_young_losses(numbers):
    for alpha, of_alpha in numbers["entmax"]["losses"].items():
        agrees(lambda z, a=float(alpha): js.fenchel_young_loss(z, peers.LABELS, a), of_alpha, jnp.ones_like)
