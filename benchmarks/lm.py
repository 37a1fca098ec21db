"""Chooses the learning rates of `python -m jsoftmax lm`: it trains each head with larger and larger ones, on another
split."""

from jsoftmax.cli import _corpus, lm
from jsoftmax.cli._lm_heads import HEADS

HELD_OUT = "scikit-learn"
"""Not the package that `lm` holds out: that one has no say."""
TRAIN, TEST = 200_000, 50_000
ADAM = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
SGD = (10.0, 30.0, 100.0, 300.0)


def run() -> None:
    whole = _corpus.of_packages(HELD_OUT)
    corpus = whole._replace(train=whole.train[:TRAIN], held_out=whole.held_out[:TEST])
    print(f"{corpus.description}; {TRAIN:,} words to train, {lm.EPOCHS} times, {TEST:,} held out", flush=True)
    for name in HEADS:
        if name == "streaming":  # the loss of the dense head
            continue
        ladder = [(ADAM[1], rate) for rate in SGD] if name == "factored" else [(rate, 0.0) for rate in ADAM]
        best = float("inf")
        for rates in ladder:
            row = lm.train(lm.Job(name, None, rates, corpus))
            print(f"{name:10} {row['rates']!s:14} perplexity {row['perplexity']:8.1f}", flush=True)
            if not row["perplexity"] < best:
                break
            best = row["perplexity"]
