"""Teachers' posteriors to one target: done once, so that training costs the same for 2 and for 14 teachers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xded.config import Aggregation
from xded.targets.store import Posterior

LEAST = 1e-10


def dense(posterior: Posterior, vocabulary: int) -> np.ndarray:
    """[T, k] and rest [T] -> [T, V]; the rest is spread evenly over the entries that were not kept."""
    kept = posterior.ids.shape[1]
    share = posterior.rest / max(vocabulary - kept, 1)
    full = np.repeat(share[:, None], vocabulary, axis=1).astype(np.float32)
    np.put_along_axis(full, posterior.ids, posterior.probabilities, axis=1)
    return full


def top_k(probabilities: np.ndarray, k: int, least_blank: np.ndarray) -> Posterior:
    """[T, V] -> the k largest entries of each step, the rest as one mass."""
    k = min(k, probabilities.shape[1])
    ids = (
        np.argpartition(probabilities, -k, axis=1)[:, -k:].copy()  # a view would keep all V of them
        if k < probabilities.shape[1]
        else np.tile(np.arange(k), (len(probabilities), 1))
    )
    listed = np.take_along_axis(probabilities, ids, axis=1)
    return Posterior(ids, listed, np.maximum(0.0, 1.0 - listed.sum(1)), least_blank)


def combine(posteriors: Sequence[Posterior], weights: Sequence[float], how: Aggregation, vocabulary: int) -> np.ndarray:
    """Weighted mean of K teachers' distributions: K x [T, k] -> [T, V].

    `prob_mean` averages probabilities; `logprob_mean` averages log-probabilities and renormalises (the
    geometric mean); `logit_mean` averages logits centred per step over the vocabulary and takes the softmax. Softmax
    ignores a constant per step, so the mean of the logits and of the log-probabilities is the same
    distribution: the two names are kept because the literature uses both.
    """
    shares = np.asarray(weights, dtype=np.float64)
    shares = shares / shares.sum()
    total = np.zeros((len(posteriors[0].ids), vocabulary), dtype=np.float32)
    for posterior, share in zip(posteriors, shares, strict=True):
        full = dense(posterior, vocabulary)
        total += np.float32(share) * (full if how == "prob_mean" else np.log(np.maximum(full, LEAST)))
    if how == "prob_mean":
        return total / total.sum(1, keepdims=True)
    total = np.exp(total - total.max(1, keepdims=True))
    return total / total.sum(1, keepdims=True)
