"""An interpolated trigram with modified Kneser–Ney smoothing, for comparison."""

from typing import NamedTuple

import numpy as np


class _Order(NamedTuple):
    """Discounted counts of one order: p(w | h) = share(h w) + rest(h) p(w | shorter h)."""

    keys: np.ndarray
    """The n-grams with counts, sorted, each as one number."""
    share: np.ndarray
    contexts: np.ndarray
    rest: np.ndarray


class Trigram:
    """p(w | u v) = [c(u v w) − D]₊ / c(u v) + γ(u v) p(w | v), and so on down to uniform; sums to one over the words.

    Lower orders count the contexts in which an n-gram occurs, not how often it occurs. D is one of three numbers, for
    counts of 1, 2 and more. Source: Chen & Goodman 1999, section 4.1.6.
    """

    def __init__(self, text: np.ndarray, classes: int) -> None:
        self.classes = classes
        u, v, w = (text[i : len(text) - 2 + i].astype(np.int64) for i in range(3))
        trigrams, counts = np.unique((u * classes + v) * classes + w, return_counts=True)
        bigrams, in_contexts = np.unique(trigrams % classes**2, return_counts=True)
        unigrams, in_bigrams = np.unique(bigrams % classes, return_counts=True)
        found = ((trigrams, counts), (bigrams, in_contexts), (unigrams, in_bigrams))
        self._orders = [self._discounted(keys, counts) for keys, counts in found]

    def _discounted(self, keys: np.ndarray, counts: np.ndarray) -> _Order:
        n1, n2, n3, n4 = (max(np.sum(counts == i), 1) for i in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        discounts = np.array([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        # a small text may ask for less than nothing or more than the count
        discounts = np.clip(discounts, 0.1, [0.9, 1.9, 2.9])[np.minimum(counts, 3) - 1]
        contexts, of = np.unique(keys // self.classes, return_inverse=True)
        totals = np.bincount(of, counts)
        return _Order(keys, (counts - discounts) / totals[of], contexts, np.bincount(of, discounts) / totals)

    def probabilities(self, u: np.ndarray, v: np.ndarray, w: np.ndarray) -> np.ndarray:
        """p(w | u v), elementwise."""
        v_w = v.astype(np.int64) * self.classes + w
        p = np.full(np.shape(w), 1 / self.classes)
        for order, key in zip(self._orders[::-1], (w, v_w, u.astype(np.int64) * self.classes**2 + v_w), strict=True):
            share = _look_up(order.keys, order.share, key, 0.0)
            p = share + _look_up(order.contexts, order.rest, key // self.classes, 1.0) * p
        return p

    def perplexity(self, text: np.ndarray, end: int) -> float:
        """exp of the mean of −log p over all words, the first of which follows two ends."""
        u, v = (np.concatenate([np.full(n, end), text])[: len(text)] for n in (2, 1))
        return float(np.exp(-np.mean(np.log(self.probabilities(u, v, text)))))


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, missing: float) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], missing)
