"""Every public function, with its options, where JAX promotes neither dtypes nor ranks. Programs are traced only."""

import functools
import inspect

import jax
import jax.numpy as jnp
import pytest
from cells import and_full, returning
from modes import strict_promotion

import jsoftmax as js
from jsoftmax import attention, gumbel, heads, losses, segments
from jsoftmax.heads import adaptive, factored
from jsoftmax.losses import TopTargets

KEY, K, V, D = jax.random.key(0), 4, 10, 3
Z, LABELS, Q = jnp.zeros((2, 3, K)), jnp.zeros((2, 3), int), jnp.full((2, 3, K), 1 / K)
KEPT, W = jnp.arange(K) != 2, jnp.zeros(K)  # of a class each, where the scores have rows
PHI, PER_ROW = js.spherical(0.1), jnp.ones((2, 3, 1))
ROWS = LABELS == 0
MASKED = {"where": KEPT, "log_weights": W}
SCORES = {**MASKED, "phi": PHI}
OF_LABELS = {**SCORES, "where": jnp.broadcast_to(KEPT, Z.shape)}
IDS = jnp.zeros(4, int)


def on_scores(f, *given, **options):
    """Calls without options, with all of them, and of one row."""
    every = [(f, given, {}), (f, given, options), (f, given, {"axis": (0, 2), **options})]
    return every if "axis" in inspect.signature(f).parameters else every[:2]


def draws(f, *given, **options):
    of = functools.partial(f, KEY)
    return [
        (of, given, options),
        (of, given, {**SCORES, **options}),
        (of, given, {"axis": 1, "log_weights": jnp.zeros((3, 1)), **options}),
    ]


def losses_of(f, **options):
    top = TopTargets(jnp.zeros((2, 3, 2), int), jnp.full((2, 3, 2), 0.3))
    masks = {"where": jnp.broadcast_to(KEPT, Z.shape), "log_weights": W, "phi": PHI}
    weights = {"class_weights": jnp.ones(K)}
    of_labels = functools.partial(f, labels=LABELS)
    shared = {name: value for name, value in options.items() if name != "margin"}
    return [
        (of_labels, (Z,), {}),
        (of_labels, (Z,), {**masks, **weights, **options}),
        (of_labels, (Z,), {"where": ROWS, "ignore_label": 1, **weights, **options}),
        (f, (Z, Q), {**masks, **weights, **shared}),
        (f, (Z, Q), {"where": ROWS}),
        (functools.partial(f, labels=top), (Z,), {"log_weights": W}),
        (functools.partial(f, labels=jnp.zeros(2, int), axis=(1, 2)), (Z,), {"class_weights": jnp.ones((3, K))}),
    ]


HIDDEN, WEIGHT, BIAS = jnp.zeros((2, 3, D)), jnp.zeros((V, D)), jnp.zeros(V)
OF_CLASSES = {"where": jnp.arange(V) != 3, "log_weights": jnp.zeros(V)}
HEAD = {**OF_CLASSES, "soft_cap": 3.0, "temperature": 2.0, "banned": jnp.full((2, 3, 2), -1), "phi": PHI}
LOSS = {"label_smoothing": 0.1, "z_loss": 0.1}
BLOCKS = {"block_size": (2, 3)}
MANY = jnp.zeros((2, 3, V))


def of_head(f, *after, options=HEAD, **extra):
    """Calls with a bias: plain, with all options, and in blocks or shards that do not divide the classes."""

    def call(hidden, weight, bias, **o):
        return f(hidden, weight, *after, bias, **o)

    given = HIDDEN, WEIGHT, BIAS
    cut = [BLOCKS, {"shards": 2}] if "shards" in inspect.signature(f).parameters else []
    return [(call, given, o) for o in ({}, {**options, **extra}, *({**options, **extra, **c} for c in cut))]


def drawn_head(**extra):
    def call(hidden, weight, bias, **o):
        return heads.linear_categorical(KEY, hidden, weight, bias, **o)

    return [(call, (HIDDEN, WEIGHT, BIAS), {**o, **extra}) for o in ({}, HEAD, {**HEAD, **BLOCKS})]


def of_two_heads(f, **extra):
    def call(hidden, weight, bias, **o):
        return f(hidden, weight, hidden, weight, bias, bias, **o)

    return [(call, (HIDDEN, WEIGHT, BIAS), {**o, **extra}) for o in ({}, HEAD, {**HEAD, **BLOCKS})]


def of_samples(f):
    def call(hidden, weight, bias, **o):
        return f(KEY, hidden, weight, LABELS, 3, log_proposal=jnp.zeros(V), bias=bias, **o)

    return [(call, (HIDDEN, WEIGHT, BIAS), o) for o in ({}, {"where": ROWS, "phi": PHI})]


QUERY, KEYS = jnp.zeros((2, 5, 4, D)), jnp.zeros((2, 7, 2, D))
LENGTHS = {"query_seq_lengths": jnp.array([3, 5]), "key_value_seq_lengths": jnp.array([7, 4])}
ATTENTION = {"mask": jnp.ones((2, 1, 5, 7), bool), "is_causal": True, "local_window_size": (3, 1), "soft_cap": 0.7}


def of_attention(f):
    given = QUERY, KEYS, KEYS, jnp.zeros((1, 4, 1, 7))
    every = {**LENGTHS, **ATTENTION, "phi": PHI}

    def with_sink(query, key, value, bias, sink, **o):
        return f(query, key, value, bias, sink=sink, **o)

    return [
        (f, given[:3], {}),
        (f, given, LENGTHS),
        (f, given, {"is_causal": True}),
        (with_sink, (*given, jnp.zeros(4)), every),
        (with_sink, (*given, jnp.zeros(4)), {**every, "block_size": (2, 3)}),
    ]


PARAMS = jax.eval_shape(lambda: adaptive.init(KEY, 16, V, (4, 6), head_bias=True))
WIDE = jnp.zeros((2, 3, 16))


def of_adaptive(f):
    return [(f, (PARAMS, WIDE), o) for o in ({}, {"phi": PHI})]


def of_operator(f, *more):
    def call(z, v, *more, **o):
        A = f(z, *more, **o)
        one = A.mv(v), A.diagonal(), A.trace(), A.as_matrix(), A.transpose().mv(v)
        return *one, A.solve(v, 0.1), *A.slogdet(0.1), A.solve(v, jnp.ones((2, 3))), *A.slogdet(jnp.ones((2, 3)))

    return [(call, (Z, Z, *more), o) for o in ({}, MASKED, SCORES)]


def pinv(z, v):
    return js.softmax_jacobian(z).pinv_mv(v)


def factored_step(weight):
    step = factored.loss_and_update(
        factored.init(weight), HIDDEN[:, 0], LABELS[:, 0], 0.1, loss=factored.z_loss(), weight_decay=0.01
    )
    return step.loss, factored.to_weight(factored.refresh(step.state)), factored.rows(step.state, LABELS[:, 0])


def factored_loss(weight, hidden):
    return factored.loss(factored.init(weight), hidden, LABELS[:, 0], loss=factored.log_loss(js.taylor(2)))


LONG = jnp.zeros((3, 2, 40_000))
CALLS = {
    **{
        f.__name__: on_scores(f, Z, **SCORES)
        for f in (js.entropy, js.varentropy, js.softmax, js.log_softmax, js.log_normalizer)
    },
    **{
        f"{f.__name__} of long rows": [(f, (z,), o) for o in ({}, {"where": jnp.arange(z.shape[-1]) != 3})]
        for f in (js.entropy, js.softmax, js.log_softmax, js.log_normalizer, js.sparsemax)
        for z in (LONG,)
    },
    "tsallis_entropy": on_scores(js.tsallis_entropy, Z, jnp.float32(1.5), **SCORES),
    "renyi_entropy": on_scores(js.renyi_entropy, Z, jnp.float32(1.5), **SCORES),
    "kl_divergence": on_scores(js.kl_divergence, Z, Z, **SCORES),
    "jensen_shannon_divergence": on_scores(js.jensen_shannon_divergence, Z, Z, beta=0.3, **SCORES),
    "entropy_expansion": on_scores(js.entropy_expansion, Z, Z, **SCORES),
    **{
        f.__name__: of_operator(f)
        for f in (js.softmax_jacobian, js.log_normalizer_hessian, js.fisher_information, js.entropy_hessian)
    },
    "pinv": [(pinv, (Z, Z), {})],
    "cross_entropy_hessian": of_operator(js.cross_entropy_hessian, Q),
    "entropy_gradient": on_scores(js.entropy_gradient, Z, **SCORES),
    "softmax_second_derivative": on_scores(js.softmax_second_derivative, Z, **SCORES),
    "softmax_second_derivative_product": on_scores(js.softmax_second_derivative_product, Z, Z, Z, **SCORES),
    "sparsemax": on_scores(js.sparsemax, Z, where=KEPT)[:2],
    "entmax15": on_scores(js.entmax15, Z, where=KEPT)[:2],
    "entmax": on_scores(js.entmax, Z, jnp.float32(1.3), where=KEPT)[:2],
    "sink_softmax": [(js.sink_softmax, (Z, jnp.zeros(())), o) for o in ({}, {"where": KEPT})],
    "mixture_log_softmax": [(js.mixture_log_softmax, (MANY, jnp.zeros((2, 3))), {"phi": PHI})],
    "fenchel_young_loss": [
        (lambda z, **o: js.fenchel_young_loss(z, LABELS, **o), (Z,), {}),
        (lambda z, **o: js.fenchel_young_loss(z, LABELS, **o), (Z,), {"alpha": 1.3, "ignore_label": 1}),
        (lambda z, **o: js.fenchel_young_loss(z, LABELS, **o), (Z,), {"where": jnp.broadcast_to(KEPT, Z.shape)}),
        (js.fenchel_young_loss, (Z, Q), {"where": ROWS}),
    ],
    "temperature_for_entropy": [
        (lambda z, **o: js.temperature_for_entropy(z, 0.5, **o), (Z,), o) for o in ({}, {"where": KEPT, "phi": PHI})
    ],
    "truncate": [
        (js.truncate, (Z,), {**SCORES, **o})
        for o in ({"top_k": 2}, {"top_p": 0.5, "min_p": 0.1}, {"top_k": jnp.ones((2, 3, 1), int), "axis": -1})
    ],
    "cross_entropy": losses_of(losses.cross_entropy, margin=0.1, label_smoothing=0.1, z_loss=0.1)[:5],
    "cross_entropy of more": losses_of(losses.cross_entropy)[5:],
    "focal_cross_entropy": losses_of(losses.focal_cross_entropy),
    "poly_cross_entropy": losses_of(losses.poly_cross_entropy),
    "kl_to_target": [
        (losses.kl_to_target, (Z, Q), o)
        for o in ({}, {"where": jnp.broadcast_to(KEPT, Z.shape), "log_weights": W, "phi": PHI}, {"where": ROWS})
    ],
    "log_prob": [(lambda z, **o: losses.log_prob(z, LABELS, **o), (Z,), o) for o in ({}, OF_LABELS)],
    "plackett_luce_log_prob": [
        (lambda z, **o: losses.plackett_luce_log_prob(z, jnp.zeros((2, 3, 2), int), **o), (Z,), o)
        for o in ({}, OF_LABELS)
    ],
    "spherical_z_loss": [
        (lambda z, **o: losses.spherical_z_loss(z, LABELS, **o), (Z,), o) for o in ({}, {"where": ROWS})
    ],
    "categorical": [
        call
        for o in (
            {},
            {"shape": (5, 2, 3)},
            {"shape": (3, 2, 3), "replace": False},
            {"mode": "high", "shape": (5, 2, 3)},
        )
        for call in draws(gumbel.categorical, Z, **o)[: 2 if o else 3]
    ],
    "categorical of many classes": draws(gumbel.categorical, LONG)[:1],
    "gumbel_top_k": draws(lambda *a, **o: gumbel.gumbel_top_k(*a, 2, **o), Z),
    "log_inclusion_probability": [(gumbel.log_inclusion_probability, (Z, PER_ROW), {})],
    **{
        f.__name__: [
            *draws(lambda *a, f=f, **o: f(*a, **o), Z, jnp.float32(0.5)),
            *draws(lambda *a, f=f, **o: f(*a, **o), Z, PER_ROW, shape=(5, 2, 3))[:2],
        ]
        for f in (gumbel.gumbel_softmax, gumbel.exp_concrete, gumbel.reinmax)
    },
    "gumbel_softmax, hard": draws(gumbel.gumbel_softmax, Z, PER_ROW, hard=True, shape=(5, 2, 3))[:2],
    "subset_softmax": draws(lambda k, z, t, **o: gumbel.subset_softmax(k, z, 2, t, **o), Z, PER_ROW, shape=(5, 2, 3))[
        :2
    ],
    "conditional_gumbels": [
        (lambda z, **o: gumbel.conditional_gumbels(KEY, z, LABELS, **o), (Z,), o)
        for o in ({}, SCORES, {"maximum": 1.0}, {"maximum": jnp.ones((2, 3))})
    ],
    "rao_blackwellised": [
        (lambda z, t, **o: gumbel.rao_blackwellised(KEY, z, LABELS, t, 3, **o), (Z, t), o)
        for t in (jnp.float32(0.5), PER_ROW)
        for o in ({}, SCORES)
    ],
    **{
        f.__name__: [(f, (Z, Z, t), o) for t in (jnp.float32(0.5), PER_ROW) for o in ({}, SCORES)]
        for f in (gumbel.exp_concrete_log_density, gumbel.concrete_log_density, gumbel.binary_concrete_log_density)
    },
    "linear_cross_entropy": of_head(heads.linear_cross_entropy, LABELS, margin=0.1, ignore_label=1, **LOSS),
    "linear_cross_entropy of distributions": of_head(heads.linear_cross_entropy, MANY, **LOSS),
    "linear_cross_entropy_sum": of_head(
        heads.linear_cross_entropy_sum, LABELS, margin=0.1, ignore_label=1, token_weights=jnp.ones((2, 3)), **LOSS
    ),
    "linear_cross_entropy_sum of distributions": of_head(heads.linear_cross_entropy_sum, MANY, **LOSS),
    "linear_statistics": of_head(heads.linear_statistics, LABELS, ignore_label=1),
    "linear_log_normalizer": of_head(heads.linear_log_normalizer),
    "linear_top_k": of_head(heads.linear_top_k, 2),
    "linear_kl": of_two_heads(heads.linear_kl),
    "linear_jsd": of_two_heads(heads.linear_jsd, beta=0.3),
    "linear_categorical": [
        *drawn_head(),
        *drawn_head(min_p=0.2, return_log_prob=True),
        *drawn_head(top_k=3, shape=(4, 2, 3)),
        *drawn_head(shape=(4, 2, 3), replace=False),
    ],
    "log_uniform_proposal": [(lambda: heads.log_uniform_proposal(V), (), {})],
    "nce_loss": of_samples(heads.nce_loss),
    "sampled_cross_entropy": of_samples(heads.sampled_cross_entropy),
    "quadratic_cross_entropy": [
        (lambda h, w, b, **o: heads.quadratic_cross_entropy(h, w, LABELS, b, phi=js.taylor(2), **o), given, o)
        for given in ((HIDDEN, WEIGHT, BIAS), (HIDDEN[0, 0], WEIGHT, BIAS))[:1]
        for o in ({}, {"where": OF_CLASSES["where"]})
    ],
    "dot_product_attention": of_attention(attention.dot_product_attention),
    "attention_statistics": of_attention(attention.attention_statistics),
    **{
        f.__name__: [
            (lambda z, f=f, **o: f(z, IDS, num_segments=2, **o), (z,), o)
            for z in (jnp.zeros(4),)
            for o in ({}, {"where": IDS == 0, "log_weights": jnp.zeros(4), "phi": PHI})
        ]
        for f in (
            segments.segment_softmax,
            segments.segment_log_softmax,
            segments.segment_log_normalizer,
            segments.segment_entropy,
        )
    },
    "adaptive.log_prob": of_adaptive(lambda p, h, **o: adaptive.log_prob(p, h, jnp.zeros(h.shape[:-1], int), **o)),
    "adaptive.log_prob of rows": [
        (
            lambda p, h: adaptive.log_prob(p, h, LABELS, where=ROWS, ignore_label=1),
            (PARAMS, WIDE),
            {},
        )
    ],
    "adaptive.log_probs": of_adaptive(adaptive.log_probs),
    "adaptive.entropy": of_adaptive(adaptive.entropy),
    "adaptive.predict": of_adaptive(adaptive.predict),
    "adaptive.top_k": of_adaptive(lambda *a, **o: adaptive.top_k(*a, 3, **o)),
    "adaptive.categorical": [
        *of_adaptive(functools.partial(adaptive.categorical, KEY)),
        *of_adaptive(functools.partial(adaptive.categorical, KEY, return_log_prob=True)),
    ],
    "factored.loss_and_update": [(lambda: factored_step(WEIGHT), (), {})],
    "factored.loss": [(factored_loss, (WEIGHT, HIDDEN[:, 0]), {})],
}


def trace(order, f, given, options):
    """Traces the derivative of a call along all that is given, or a Hessian product; the call itself, if nothing is."""

    def values(*given):
        return f(*given, **options)

    def total(*given):
        found = [a for a in jax.tree.leaves(values(*given)) if jnp.issubdtype(a.dtype, jnp.floating)]
        return sum((jnp.sum(a.astype(jnp.float32)) for a in found), jnp.float32(0))

    f_of_order = total if order == 1 else jax.grad(total, tuple(range(len(given))))
    jax.eval_shape((lambda *given: jax.jvp(f_of_order, given, given)) if given else values, *given)


@pytest.mark.parametrize(("name", "order"), and_full([(name, 1) for name in CALLS], [(name, 2) for name in CALLS]))
def test_nothing_is_promoted(name, order):
    """By default value and derivative rule of the call with most options: the other calls take fewer steps of the same
    functions, or of the other kind of labels. In the gate every call, and of that one the Hessian product, which needs
    the gradient."""
    most = max(CALLS[name], key=lambda call: len(call[2]))
    with strict_promotion():
        for call in [most] if order == 1 else CALLS[name]:
            trace(order if call is most else 1, *call)


def test_every_function_is_here():
    """All that a user calls with arrays, by its last name."""
    rooms = (js, losses, gumbel, heads, attention, segments, adaptive, factored)
    public = {name for room in rooms for name in room.__all__ if inspect.isfunction(getattr(room, name))}
    makers = returning(js, js.phi.Phi)
    steps = {"init", "refresh", "rows", "to_weight", "log_loss", "z_loss"}  # in factored_step
    tools = {"from_torch", "to_torch", "to_state", "measure_cost_model", "plan_clusters"}
    assert public - makers - steps - tools == {name.split(" of ")[0].split(".")[-1] for name in CALLS} & public
