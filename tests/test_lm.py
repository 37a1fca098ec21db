"""The language model: what the corpus keeps, the trigram by brute force, and every head against the plain formula."""

import argparse
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsoftmax as js
from jsoftmax import cli
from jsoftmax.cli import _corpus, _lm_heads, _lm_network, lm
from jsoftmax.cli._corpus import END, UNKNOWN
from jsoftmax.cli._trigram import Trigram
from jsoftmax.heads import adaptive, factored

DOCSTRING = """Return the sum.

It calls :func:`add` on ``x``
and 3.5 more.

.. versionadded:: 1.0

Parameters
----------
first : array_like
    The numbers to add.

    They may be *complex*.
second : int, optional
    Along which axis.

See Also
--------
add : Adds two numbers.

Examples
--------
The sum of two.

>>> add(1, 2)
printed
"""
WORDS = _corpus.tokens("the sum of two small numbers is small and the product of one large number is never the sum")


@pytest.fixture(scope="module")
def text():
    """Some paragraphs of a few words, with order in them."""
    draw = np.random.default_rng(0)
    starts = draw.integers(0, len(WORDS), 400)
    paragraphs = [" ".join(WORDS[(s + i) % len(WORDS)] for i in range(draw.integers(5, 12))) for s in starts]
    return "\n\n".join(f"{paragraph} {i}{'abcdefghij'[i % 10]}." for i, paragraph in enumerate(paragraphs))


@pytest.fixture(scope="module")
def corpus(text):
    paragraphs = [_corpus.tokens(p) for p in text.split("\n\n")]
    return _corpus.corpus(paragraphs[:360], paragraphs[360:], "a test")


def test_prose_has_no_doctests_and_no_names_of_tables():
    found = [" ".join(_corpus.tokens(p)) for p in _corpus.prose(DOCSTRING)]
    assert found == [
        *("return the sum .", "it calls add on x and N more .", "the numbers to add .", "they may be complex ."),
        *("along which axis .", "the sum of two ."),
    ]


def test_packages_are_read_without_an_import(tmp_path, monkeypatch):
    (tmp_path / "unlucky").mkdir()
    (tmp_path / "unlucky" / "__init__.py").write_text('"""First."""\nraise RuntimeError\ndef f():\n    "Second."\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert list(_corpus.docstrings("unlucky")) == ["First.", "Second."]
    with pytest.raises(ModuleNotFoundError, match="absent"):
        list(_corpus.docstrings("absent"))


def test_split_shares_no_paragraph():
    train = [("a", "b", "a"), ("b", "a"), ("rare", "a"), ("b", "a"), ()]
    found = _corpus.corpus(train, [("b", "a"), ("a", "new"), ("a", "new")], "")
    assert found.words == ("a", END, "b", UNKNOWN)  # by count, and by name where that is equal
    assert [found.words[i] for i in found.train] == ["a", "b", "a", END, "b", "a", END, UNKNOWN, "a", END]
    assert [found.words[i] for i in found.held_out] == ["a", UNKNOWN, END]
    assert found.unknown == 1 / 3
    np.testing.assert_array_equal(found.counts, [4, 3, 2, 1])


def test_a_whole_package_is_held_out(monkeypatch):
    made = {"numpy": ["Of arrays.\n\nShared words."], "scipy": ["Shared words."], "sklearn": ["Of models."]}
    monkeypatch.setattr(_corpus, "docstrings", made.__getitem__)
    found = _corpus.of_packages("numpy")
    assert "held out numpy" in found.description
    assert [found.words[i] for i in found.train].count(END) == 2
    assert [found.words[i] for i in found.held_out] == [UNKNOWN, UNKNOWN, ".", END]


def test_trigram_sums_to_one_and_is_the_formula(corpus):
    classes, train = len(corpus.words), corpus.train
    model = Trigram(train, classes)
    every = np.arange(classes)
    for u, v in [train[5:7], train[100:102], (0, 0), (classes - 1, classes - 2)]:
        p = model.probabilities(np.full(classes, u), np.full(classes, v), every)
        assert np.all(p > 0)
        np.testing.assert_allclose(p.sum(), 1, rtol=1e-12)
    # Chen & Goodman 1999, written out with dictionaries
    grams = [list(zip(train, train[1:], train[2:], strict=False))]
    counts = [{g: grams[0].count(g) for g in set(grams[0])}]
    for _ in range(2):
        shorter = [g[1:] for g in counts[-1]]
        counts.append({g: shorter.count(g) for g in set(shorter)})

    def p(order, history, w):
        if order == 3:
            return 1 / classes
        seen = {g: n for g, n in counts[order].items() if g[:-1] == history}
        if not seen:
            return p(order + 1, history[1:], w)
        n = [max(sum(c == i for c in counts[order].values()), 1) for i in range(5)]
        y = n[1] / (n[1] + 2 * n[2])
        D = [0, *(min(max(i - (i + 1) * y * n[i + 1] / n[i], 0.1), i - 0.1) for i in (1, 2, 3))]
        total = sum(seen.values())
        c = seen.get((*history, w), 0)
        rest = sum(D[min(n, 3)] for n in seen.values()) / total
        return (c - D[min(c, 3)]) / total + rest * p(order + 1, history[1:], w)

    stream = [corpus.words.index(END)] * 2 + corpus.held_out[:40].tolist()
    ours = model.probabilities(*(np.array(stream[i : len(stream) - 2 + i]) for i in range(3)))
    plain = [p(0, (u, v), w) for u, v, w in zip(stream, stream[1:], stream[2:], strict=False)]
    np.testing.assert_allclose(ours, plain, rtol=1e-10)
    perplexity = model.perplexity(corpus.held_out[:40], corpus.words.index(END))
    np.testing.assert_allclose(perplexity, math.exp(-np.mean(np.log(plain))), rtol=1e-10)


def test_windows_hold_every_word_once():
    text = np.arange(1, 76)
    contexts, labels, counts = _lm_network.windows(text, 0)
    assert contexts.shape == labels.shape == counts.shape == (3, _lm_network.CONTEXT)
    np.testing.assert_array_equal(labels[counts], text)
    np.testing.assert_array_equal(contexts[counts], np.arange(75))


def plain_log_prob(head, above, hidden, phi):
    """log p of all words, in float64, by the definition."""
    definition = np.exp if phi == js.exp else (lambda z: 1 + z + z**2 / 2)
    if head == "adaptive":
        first = above.cutoffs[0]
        w = definition(hidden @ np.asarray(above.head, np.float64).T)
        parts = [w[:, :first] / w.sum(-1, keepdims=True)]
        for i, (projection, weight) in enumerate(above.tails):
            tail = definition(hidden @ np.asarray(projection, np.float64).T @ np.asarray(weight, np.float64).T)
            parts.append(w[:, first + i, None] / w.sum(-1, keepdims=True) * tail / tail.sum(-1, keepdims=True))
        return np.log(np.concatenate(parts, -1))
    weight = factored.to_weight(above) if head == "factored" else above
    w = definition(hidden @ np.asarray(weight, np.float64).T)
    return np.log(w / w.sum(-1, keepdims=True))


@pytest.mark.full  # It is about the experiment.
@pytest.mark.parametrize("head", _lm_heads.HEADS)
def test_each_head_learns_and_its_perplexity_is_the_definition(head, corpus):
    phi, end = _lm_heads.choose_phi(head, None), corpus.words.index(END)
    job = lm.Job(head, None, (_lm_heads.HEADS[head].rate, _lm_heads.HEADS[head].sgd_rate), corpus)
    trainer = _lm_heads.Trainer(head, phi, corpus, 200, job.rates)
    contexts, labels, _ = _lm_network.windows(corpus.train, end)
    before = trainer.perplexity(corpus.held_out, end, 8)
    for turn in range(30):
        trainer.state, value = trainer.step(trainer.state, contexts[:16], labels[:16], np.int32(turn))
        assert np.isfinite(value)
    after = trainer.perplexity(corpus.held_out, end, 8)
    assert after < 0.7 * before
    contexts, labels, counts = _lm_network.windows(corpus.held_out, end)
    hidden = np.asarray(_lm_network.hidden(trainer.state[0], jnp.asarray(contexts)), np.float64)
    log_p = plain_log_prob(head, trainer.state[1], hidden, phi)
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, rtol=1e-10)
    own = log_p[np.arange(len(log_p)), labels.reshape(-1)][counts.reshape(-1)]
    np.testing.assert_allclose(after, np.exp(-own.mean()), rtol=2e-5)


@pytest.mark.full  # It is about the experiment.
def test_every_head_begins_alike(corpus):
    steps = {}
    for head in ("dense", "streaming", "adaptive"):
        trainer = _lm_heads.Trainer(head, js.exp, corpus, 10, (1e-3, 0.0))
        steps[head] = trainer.state
    for a, b in itertools.combinations(steps.values(), 2):
        jax.tree.map(np.testing.assert_array_equal, a[0], b[0])
    np.testing.assert_array_equal(steps["dense"][1], steps["streaming"][1])
    assert isinstance(steps["adaptive"][1], adaptive.AdaptiveParams)


@pytest.mark.full  # It runs the experiment from end to end.
def test_command(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "text.txt").write_text(text)
    given = ["--text", str(tmp_path / "text.txt"), "--quick", "--output", str(tmp_path / "lm.json")]
    assert cli.main(["lm", "--head", "factored", *given]) == 0
    out = capsys.readouterr().out
    assert "held out its last tenth" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    found = json.loads((tmp_path / "lm.json").read_text())
    assert [row["head"] for row in found["rows"]] == ["trigram", "factored"]
    trigram, row = found["rows"]
    assert row["phi"] == "taylor(2)"
    for number in (trigram["perplexity"], row["perplexity"]):
        assert 1 < number < found["vocabulary"]
        assert f"{number:.1f}" in out
    assert min(row[name] for name in ("tokens_per_second", "temporaries_MiB", "seconds")) > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--head", "quadratic", "--phi", "exp"], "must be of order 2 for the head quadratic"),
        (["--head", "all", "--phi", "softplus"], "got softplus"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--text", "{short}"], "at least 100 words"),
        (["--quick", "--learning-rate", "-1"], "must be one or two numbers > 0"),
        (["--quick", "--output", "nowhere/x.json"], "folder that exists"),
    ],
)
def test_wrong_arguments(options, said, tmp_path, capsys):
    (tmp_path / "short").write_text("Too short.")
    assert cli.main(["lm", *(option.format(short=tmp_path / "short") for option in options)]) == 2
    out = capsys.readouterr().out
    assert out.startswith("lm: ")
    assert said in out


def test_small_text_where_the_packages_are_missing(monkeypatch, capsys):
    def missing(held_out):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    monkeypatch.setattr(_corpus, "of_packages", missing)
    monkeypatch.setattr(lm, "train", None)
    arguments = argparse.Namespace(text=None, quick=False, hold_out="numpy")
    assert lm._read(arguments).description.startswith("Python's help topics")
    assert "'scipy' is missing" in capsys.readouterr().out
