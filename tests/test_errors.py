"""One table of wrong calls. Each message names function and argument, what it got, what it wanted, and the way out."""

import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import returning

import jsoftmax as js
from jsoftmax import attention, gumbel, heads, losses, optim, segments
from jsoftmax.verify import DERIVATIVES, FUNCTIONS

Z = jnp.zeros((2, 3))
J = js.softmax_jacobian(Z)


def raw(f):
    """The function without the run-time type checks of the tests, whose errors come first."""
    return inspect.unwrap(f)


WRONG = [  # call, error, what the message says
    (lambda: raw(js.taylor)(3), ValueError, "taylor: order must be an even integer", "got 3", "taylor(2)"),
    (lambda: raw(js.taylor)(0), ValueError, "taylor: order", "got 0"),
    (lambda: raw(js.taylor)(18), ValueError, "taylor: order", "[2, 16]", "got 18"),
    (lambda: raw(js.taylor)(2.0), TypeError, "taylor: order", "float", "taylor(2)"),
    (lambda: jax.jit(raw(js.taylor))(2), TypeError, "taylor: order", "traced"),
    (lambda: js.spherical(0), ValueError, "spherical: epsilon must be > 0", "got 0"),
    (lambda: js.spherical(-1.0), ValueError, "spherical: epsilon", "got -1.0"),
    (lambda: js.spherical("a"), TypeError, "spherical: epsilon", "got str"),
    (lambda: js.q_exponential(float("nan")), ValueError, "q_exponential: q", "finite"),
    (lambda: js.relu_power(0.5, 0.1), ValueError, "relu_power: power must be >= 1", "got 0.5"),
    (lambda: js.relu_power(2, 0.0), ValueError, "relu_power: epsilon must be > 0"),
    (raw(js.from_callable), ValueError, "from_callable: exactly one", "neither"),
    (lambda: raw(js.from_callable)(jnp.exp, log_phi=jnp.log), ValueError, "from_callable: exactly one", "both"),
    (lambda: raw(js.from_callable)(3), TypeError, "from_callable: phi must be a function", "int"),
    (lambda: raw(js.from_callable)(js.exp), TypeError, "from_callable: phi", "phi=jsoftmax.softplus"),
    (lambda: raw(js.from_callable)(jnp.exp, slope=1), TypeError, "from_callable: slope must be a function"),
    (lambda: js.softmax(Z, phi=js.from_callable(jnp.sum)), ValueError, "from_callable", "one by one", "(2, 3)"),
    (
        lambda: js.from_callable(np.exp),
        TypeError,
        "from_callable: the functions must map",
        "in jax.numpy",
        "TracerArrayConversionError: The numpy.ndarray conversion method",
        "such as jnp.log, not those of math",
    ),
    (
        lambda: js.from_callable(math.log),
        TypeError,
        "from_callable: ",
        "TypeError: Only scalar arrays",
        "not those of math or numpy",
    ),
    (js.softplus, TypeError, "softplus: z must be an array", "got none", "pass it as phi=…"),
    (js.taylor(2), TypeError, "taylor(2): z must be an array", "a φ already: pass it as phi=…"),
    *(
        (lambda f=f: f(Z.astype(jnp.float8_e4m3fn)), TypeError, f"{name} must have a dtype with inf", ".astype(jnp.bfl")
        for name, f in {
            "softmax: z": js.softmax,
            "kl_divergence: z_p": lambda z: js.kl_divergence(z, z),
            "cross_entropy: logits": lambda z: losses.cross_entropy(z, jnp.zeros(2, int)),
            "linear_log_normalizer: hidden": lambda z: heads.linear_log_normalizer(z, z),
        }.items()
    ),
    (lambda: raw(js.entropy)(Z, js.softplus), TypeError, "entropy: axis must be", "Pass a φ by keyword: phi=…"),
    (
        lambda: raw(js.softmax_jacobian)(Z, js.taylor(2)),
        TypeError,
        "softmax_jacobian: where must be an array",
        "Pass a φ by keyword: phi=…",
    ),
    (
        lambda: js.from_callable(jax.tree_util.Partial(lambda z, a: z * a["scale"], {"scale": 1.0})),
        TypeError,
        "from_callable: the functions must map",
        "as f(parameters, z)",
    ),
    (lambda: js.softmax(Z, phi=js.spherical(jnp.ones(4))), (ValueError, TypeError), "broadcast"),
    (lambda: raw(js.entropy_expansion)(Z, Z, 3), ValueError, "entropy_expansion: order must be 1 or 2", "got 3"),
    (lambda: raw(js.entropy_expansion)(Z, Z, None), ValueError, "entropy_expansion: order", "got None"),
    (lambda: js.kl_divergence(Z, jnp.zeros(4)), ValueError, "kl_divergence: z_p and z_q", "(2, 3) and (4,)"),
    (
        lambda: js.jensen_shannon_divergence(Z, Z, beta=1.5),
        ValueError,
        "jensen_shannon_divergence: beta must be in [0, 1]",
        "got 1.5",
    ),
    (
        lambda: js.jensen_shannon_divergence(Z, Z, beta=jnp.ones(2) / 2),
        ValueError,
        "jensen_shannon_divergence: beta must be one number",
    ),
    (lambda: js.entropy_expansion(Z, jnp.zeros(4)), ValueError, "entropy_expansion: z and dz", "broadcast"),
    (lambda: raw(type(js.exp).log)(js.exp, [1.0]), TypeError, "exp.log: z", "jnp.asarray(z)"),
    (lambda: J.mv(jnp.zeros(2)), ValueError, "DiagonalPlusLowRank.mv: v must have 3 classes last", "(2,)", "jax.vmap"),
    (lambda: J.mv(jnp.zeros((5, 3))), ValueError, "DiagonalPlusLowRank.mv: v", "batch (2,)", "(5, 3)"),
    (
        lambda: J.solve(jnp.zeros(3), jnp.ones(3)),
        ValueError,
        "DiagonalPlusLowRank.solve: damping",
        "batch (2,)",
        "(3,)",
    ),
    (
        lambda: js.entropy_hessian(Z[0]).pinv_mv(Z[0]),
        ValueError,
        "DiagonalPlusLowRank.pinv_mv: the operator",
        "solve(b, damping)",
    ),
    (J.to_lineax, ValueError, "DiagonalPlusLowRank.to_lineax: the operator must be one matrix", "jax.vmap"),
    (
        lambda: js.cross_entropy_hessian(Z, jnp.zeros(4)),
        ValueError,
        "cross_entropy_hessian: z and q",
        "(2, 3) and (4,)",
    ),
    (
        lambda: js.cross_entropy_hessian(Z, jnp.zeros(3, int)),
        TypeError,
        "cross_entropy_hessian: q must be floating weights",
        "jax.nn.one_hot(labels, K)",
    ),
]

EVERY = [  # keywords that are wrong for every function of scores
    ({"phi": jnp.exp}, TypeError, "phi must be a φ", "from_callable(f)"),
    ({"phi": js.taylor}, TypeError, "phi must be a φ", "phi=jsoftmax.taylor(…)"),
    ({"phi": "exp"}, TypeError, "phi must be a φ", "'exp'"),
    ({"axis": 2}, ValueError, "axis 2 is out of range", "2 dimension(s)", "[-2, 2)"),
    ({"axis": (0, -2)}, ValueError, "axis names an axis twice", "(0, -2)"),
    ({"axis": 1.0}, TypeError, "axis must be an int", "got 1.0"),
    ({"axis": "last"}, TypeError, "axis must be an int", "'last'"),
    ({"where": jnp.ones(3)}, TypeError, "where must be boolean", "float32", "log_weights"),
    ({"where": jnp.ones(4, bool)}, ValueError, "where must broadcast", "(2, 3)", "(4,)"),
    ({"where": jnp.ones((5, 2, 3), bool)}, ValueError, "where must broadcast", "(5, 2, 3)"),
    ({"where": [True, False, True]}, TypeError, "where must be an array", "list", "jnp.asarray(where)"),
    ({"log_weights": jnp.ones(4)}, ValueError, "log_weights must broadcast", "(4,)"),
    ({"log_weights": jnp.ones(3) * 1j}, TypeError, "log_weights must be real", "complex64"),
]

SCORES = [
    (jnp.ones(3) * 1j, TypeError, "must be real", "complex64", "jnp.real"),
    ([1.0, 2.0], TypeError, "must be an array", "list", "jnp.asarray"),
    ("scores", TypeError, "must be an array", "str"),
    (None, TypeError, "must be an array", "NoneType"),
    (jnp.float32(1.0), ValueError, "axis -1 is out of range", "0 dimension(s)"),
    (np.array(["a"]), TypeError, "must be"),
]


KEY, LABELS, HIDDEN, WEIGHT = jax.random.key(0), jnp.array([0, 1]), jnp.zeros((4, 5)), jnp.zeros((7, 5))
QUERY = jnp.zeros((3, 1, 2))

TOP = losses.TopTargets(jnp.array([[0], [1]]), jnp.ones((2, 1)))

FROM_ELSEWHERE = [  # as other libraries are called, or with an object of the wrong kind
    (lambda: js.softmax(Z, dim=-1), TypeError, "softmax: got an unexpected keyword dim=", "axis=…"),
    (lambda: js.softmax(Z, mask=None), TypeError, "softmax: got an unexpected keyword mask=", "where=…"),
    (lambda: js.softmax(Z, reduction="sum"), TypeError, "softmax: got an unexpected keyword reduction=", "jnp.mean(…)"),
    (lambda: js.entropy(Z, base=2), TypeError, "entropy: got an unexpected keyword base=", "jnp.log(base)"),
    (lambda: js.truncate(Z, p=0.5), TypeError, "truncate: got an unexpected keyword p=", "Write top_p="),
    (lambda: js.gumbel.categorical(KEY, Z, num_samples=2), TypeError, "keyword num_samples=", "Write shape="),
    *(
        (lambda f=f: raw(f)(Z, TOP), TypeError, f"{f.__name__}: labels must be integers or a distribution; got TopT")
        for f in (js.fenchel_young_loss, losses.spherical_z_loss, losses.log_prob)
    ),
    (
        lambda: raw(heads.linear_statistics)(HIDDEN, WEIGHT, TOP),
        TypeError,
        "linear_statistics: labels must be integers or a distribution; got TopTargets",
        "heads.linear_cross_entropy, which has the scores of a linear layer",
    ),
    (
        lambda: raw(heads.quadratic_cross_entropy)(HIDDEN, WEIGHT, TOP, phi=js.taylor(2)),
        TypeError,
        "quadratic_cross_entropy: labels must be integers; got TopTargets",
        "heads.linear_cross_entropy",
    ),
    (lambda: losses.cross_entropy(Z, LABELS, ignore_index=-1), TypeError, "cross_entropy: ", "ignore_label=…"),
    (lambda: losses.cross_entropy(Z, LABELS, weight=None), TypeError, "cross_entropy: ", "class_weights=…"),
    (lambda: gumbel.gumbel_softmax(KEY, Z, tau=0.5), TypeError, "gumbel_softmax: ", "temperature=…"),
    (lambda: js.entropy(logits=Z), TypeError, "entropy: got an unexpected keyword logits=", "Write z=…"),
    (lambda: js.softmax(input=Z), TypeError, "softmax: got an unexpected keyword input=", "Write z=…"),
    (lambda: js.softmax(x=Z), TypeError, "softmax: got an unexpected keyword x=", "Write z=…"),
    (lambda: losses.cross_entropy(z=Z, labels=LABELS), TypeError, "unexpected keyword z=", "Write logits=…"),
    (lambda: losses.cross_entropy(Z, target=LABELS), TypeError, "unexpected keyword target=", "Write labels=…"),
    (lambda: losses.cross_entropy(Z, targets=LABELS), TypeError, "unexpected keyword targets=", "Write labels=…"),
    (lambda: losses.kl_to_target(Z, target=Z), TypeError, "unexpected keyword target=", "Write targets=…"),
    (lambda: losses.kl_to_target(Z, labels=Z), TypeError, "unexpected keyword labels=", "Write targets=…"),
    (lambda: losses.cross_entropy(scores=Z), TypeError, "unexpected keyword scores=", "Write logits=…"),
    (lambda: losses.plackett_luce_log_prob(input=Z), TypeError, "unexpected keyword input=", "Write scores=…"),
    (lambda: js.kl_divergence(logits=Z), TypeError, "arguments are z_p, z_q,", "Write z_p=…"),
    (lambda: js.segments.segment_softmax(src=Z), TypeError, "unexpected keyword src=", "Write z=…"),
    (lambda: js.segments.segment_softmax(Z, index=LABELS), TypeError, "keyword index=", "Write segment_ids=…"),
    (lambda: js.segments.segment_softmax(Z, LABELS, dim_size=2), TypeError, "dim_size=", "Write num_segments=…"),
    (lambda: raw(js.truncate)(Z, 50, 0.9), ValueError, "truncate: axis must", "50", "name them: top_k=50, top_p=0.9."),
    (lambda: raw(js.truncate)(Z, 0.9), ValueError, "truncate: axis must", "got axis 0.9", "name them: top_p=0.9."),
    (lambda: raw(js.truncate)(Z, 1, 0.9), ValueError, "truncate: axis must", "where 0.9", "name them: top_p=0.9."),
    (lambda: raw(js.truncate)(Z, -3), ValueError, "truncate: axis -3 is out of range"),
    (
        lambda: raw(heads.linear_log_normalizer)(LABELS, WEIGHT),
        TypeError,
        "linear_log_normalizer: hidden must be real and floating",
        "Check the order of the arguments: hidden, weight, bias. Convert integers by hidden.astype(float).",
    ),
    (
        lambda: raw(heads.linear_cross_entropy)(HIDDEN, LABELS, WEIGHT),
        TypeError,
        "linear_cross_entropy: weight must be real and floating",
        "Check the order of the arguments: hidden, weight, labels, bias. Convert integers by weight.astype(float).",
    ),
    (lambda: js.truncate(Z, k=2), TypeError, "truncate: got an unexpected keyword k=", "Write top_k=…"),
    (lambda: js.softmax(Z, -1, axis=-1), TypeError, "softmax: axis is given twice, as argument 2 and as axis="),
    *(
        (lambda f=f, name=name: f(HIDDEN, WEIGHT, LABELS, **{name: None}), TypeError, f"{f.__name__}: ", name, way_out)
        for f in (heads.linear_cross_entropy, heads.linear_cross_entropy_sum, heads.linear_statistics)
        for name, way_out in (
            (
                "weight",
                "as argument 2 and as weight=. Leave one out. Multiply each loss by the weight of its label: jn",
            ),
            ("weights", "jnp.asarray(w)[labels] * loss"),
            ("class_weights", "token_weights=jnp.asarray(w)[labels]"),
        )
    ),
    *(
        (lambda f=f: f(HIDDEN, WEIGHT, LABELS, token_weights=1.0), TypeError, f"{f.__name__}: ", "write w * loss, or")
        for f in (heads.linear_cross_entropy, heads.linear_statistics)
    ),
    (
        lambda: heads.linear_top_k(HIDDEN, WEIGHT, 2, weight=None),
        TypeError,
        "linear_top_k: weight is given twice, as argument 2 and as weight=. Leave one out.",
    ),
    (
        lambda: heads.linear_top_k(HIDDEN, WEIGHT, 2, weights=None),
        TypeError,
        "Only losses of labels have such weights.",
    ),
    (lambda: js.entropy(Z, class_weights=None), TypeError, "keyword class_weights=", "Only losses of labels have such"),
    (lambda: js.softmax(Z, -1, None, js.exp, phi=js.exp), TypeError, "positional"),
    (lambda: js.temperature_for_entropy(Z, targets=1.0), TypeError, "keyword targets=", "Write target=…"),
    (lambda: js.softmax(Z, tau=0.5), TypeError, "keyword tau=", "Divide the scores by the temperature;"),
    (
        lambda: js.softmax(Z, keepdim=True),
        TypeError,
        "keyword keepdim=",
        "call it keepdims=; this one does not have it.",
    ),
    *(
        (lambda f=f, name=name: f(QUERY, QUERY, QUERY, **{name: None}), TypeError, f"{f.__name__}: ", f"{name}=;", way)
        for f in (attention.dot_product_attention, attention.attention_statistics)
        for name, way in (
            ("causal", "Write is_causal=…"),
            ("where", "Write mask=…"),
            ("attn_mask", "Write mask=…"),
            ("dropout_p", "There is no dropout: apply it to the result."),
            ("dropout_rate", "There is no dropout: apply it to the result."),
            (
                "implementation",
                "Leave it out: there is one for all platforms. For the kernels of cuDNN use jax.nn.dot_",
            ),
            ("logits_soft_cap", "Write soft_cap=…"),
            ("temperature", "Write scale=1/(temperature * sqrt(H))"),
        )
    ),
    (
        lambda: heads.linear_log_normalizer(HIDDEN, WEIGHT, chunk_size=2),
        TypeError,
        "linear_log_normalizer: got an unexpected keyword chunk_size=",
        "Write block_size=…",
    ),
    (
        lambda: heads.linear_categorical(KEY, HIDDEN, WEIGHT, top_p=0.5),
        TypeError,
        "linear_categorical: got an unexpected keyword top_p=",
        "by found = heads.linear_top_k(…)",
        "truncate(found.log_prob, top_p=…)",
    ),
    (
        lambda: heads.sampled_cross_entropy(KEY, HIDDEN, WEIGHT, LABELS, temperature=2.0),
        TypeError,
        "sampled_cross_entropy: got an unexpected keyword temperature=",
        "in a linear layer, hidden and bias.",
    ),
    (lambda: js.entropy(probs=Z), TypeError, "keyword probs=", "not probabilities: pass jnp.log(probs)."),
    (lambda: js.entropy(p=Z), TypeError, "keyword p=", "not probabilities: pass jnp.log(p)."),
    (lambda: losses.cross_entropy(probs=Z), TypeError, "keyword probs=", "not probabilities: pass jnp.log(probs)."),
    (lambda: js.softmax(Z, top_p=0.5), TypeError, "keyword top_p=", "Cut the scores first, and pass the result: trunc"),
    (lambda: js.softmax(Z, implementation="xla"), TypeError, "implementation=", "Leave it out: this function has only"),
    (lambda: js.softmax(Z, causal=True), TypeError, "keyword causal=", "call it is_causal=; this one does not have it"),
    (lambda: js.softmax(Z, axes=-1), TypeError, "softmax: got an unexpected keyword axes=", "Write axis=…"),
    (lambda: js.softmax(Z, unheard_of=1), TypeError, "softmax: got an unexpected keyword unheard_of=", "Leave it out."),
    (lambda: raw(js.entropy)(Z, where=LABELS > 0), ValueError, "entropy: where must broadcast", "where[:, None]"),
    (lambda: raw(js.softmax)(Z, axis=True), TypeError, "softmax: axis must be an int", "got True"),
    (
        lambda: raw(js.softmax)(np.array([1, None])),
        TypeError,
        "softmax: z must be",
        "ndarray of dtype object",
        "astype",
    ),
    (lambda: raw(js.entmax)(Z, jnp.array(0.9)), ValueError, "entmax: alpha must be >= 1", "got 0.8999"),
    (lambda: raw(js.entmax)(Z, np.array([0.9, 2.0])[:, None]), ValueError, "entmax: alpha must be >= 1"),
    (
        lambda: raw(losses.cross_entropy)(Z, LABELS, label_smoothing=np.array(1.5)),
        ValueError,
        "cross_entropy: label_smoothing must be in [0, 1]",
        "got 1.5",
    ),
    (lambda: raw(losses.cross_entropy)(Z, LABELS, margin=True), TypeError, "cross_entropy: margin must be a number"),
    (lambda: raw(losses.cross_entropy)(Z, LABELS[:, None]), ValueError, "cross_entropy: ", "labels.reshape(2,)"),
    (lambda: raw(gumbel.gumbel_softmax)(KEY, Z, 0.5, hard="yes"), TypeError, "gumbel_softmax: hard must be True or"),
    (lambda: raw(gumbel.gumbel_top_k)(KEY, 2, Z), TypeError, "gumbel_top_k: k must be an int", "after the scores"),
    (
        lambda: raw(heads.linear_categorical)(KEY, HIDDEN, WEIGHT, shape=(16,)),
        ValueError,
        "linear_categorical: shape must end in",
        "shape=(n, 4)",
    ),
    (
        lambda: raw(heads.linear_cross_entropy_sum)(HIDDEN, WEIGHT, jnp.zeros((16, 4), int)),
        ValueError,
        "linear_cross_entropy_sum: integer labels",
        "jnp.broadcast_to(hidden, (16, 4, d))",
    ),
    (
        lambda: raw(heads.linear_cross_entropy)(HIDDEN, WEIGHT, jnp.zeros((16, 4), int), margin=0.5),
        ValueError,
        "linear_cross_entropy: margin must be left out where a token has several labels",
        "jnp.broadcast_to(hidden, (16, 4, d))",
    ),
    (
        lambda: raw(heads.linear_cross_entropy)(HIDDEN, WEIGHT, jnp.zeros((4, 1), int)),
        ValueError,
        "linear_cross_entropy: integer labels",
        "labels.reshape(4,)",
    ),
]


def check(call, error, *parts):
    with pytest.raises(error) as caught:
        call()
    for part in parts:
        assert re.search(re.escape(part), str(caught.value)), (part, str(caught.value))


@pytest.mark.parametrize("case", WRONG + FROM_ELSEWHERE, ids=lambda case: case[2])
def test_wrong_arguments(case):
    check(*case)


ROOMS = [js, losses, segments, gumbel, heads, heads.adaptive, heads.factored, attention, optim]
WITHOUT_SCORES = returning(js, js.phi.Phi) | {"log_loss", "z_loss"}
"""These make a φ or a loss."""


@pytest.mark.parametrize("module", ROOMS, ids=lambda m: m.__name__)
def test_every_function_answers_keywords_that_it_does_not_have(module):
    """The answer comes before a function looks at its arguments: for keywords of others, and for any other one."""
    names = {name for name in module.__all__ if inspect.isfunction(getattr(module, name))} - WITHOUT_SCORES
    assert names
    for name in names:
        f, start = getattr(module, name), f"{name}: got an unexpected keyword "
        check(lambda f=f: f(reduction="mean"), TypeError, start, "reduction=", "jnp.sum")
        check(lambda f=f: f(unheard_of=None), TypeError, start, "unheard_of=; its arguments are ")


# the named derivatives have their classes last, and no axis
PAIRS = [(f, case) for f in FUNCTIONS for case in EVERY]
PAIRS += [(f, case) for f in DERIVATIVES for case in EVERY if "axis" not in case[0]]


@pytest.mark.parametrize(("function", "case"), PAIRS, ids=[f"{f}-{case[2]}" for f, case in PAIRS])
def test_wrong_keywords(function, case):
    keywords, error, *parts = case
    f = raw(getattr(js, function.name))
    check(lambda: f(*(Z,) * function.scores, *function.arguments, **keywords), error, f"{function.name}: ", *parts)


@pytest.mark.parametrize("case", SCORES, ids=lambda case: case[2] + str(type(case[0])))
@pytest.mark.parametrize("function", FUNCTIONS + DERIVATIVES, ids=str)
def test_wrong_scores(function, case):
    z, error, *parts = case
    f = raw(getattr(js, function.name))
    check(lambda: f(*(z,) * function.scores, *function.arguments), error, f"{function.name}: ", *parts)


def test_nothing_raises_for_the_values_of_traced_arguments():
    assert np.isnan(jax.jit(lambda e: js.softmax(jnp.zeros(2), phi=js.spherical(e)))(-1.0)).all()
