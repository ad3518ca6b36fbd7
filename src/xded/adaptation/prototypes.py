"""Word prototypes of one speaker: what their encoder outputs say about a word, without any training.

After prototypical networks (Snell, Swersky & Zemel 2017, arXiv:1703.05175, equations 1 and 2): a word's prototype is
the mean of its embedded takes, and words are weighed by a softmax over similarities to the prototypes. Here the softmax
is weighted by what the recogniser says by itself, and is over the enrolled words alone (`rescored`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

PARTS = 4  # pieces of equal length whose means are kept apart: the order of sounds is a part of a word


def embedding(encoded: Tensor) -> Tensor:
    """One recording's encoder outputs [T, D] as one vector [PARTS * D]; a part of fewer frames than one is zero."""
    return torch.cat([part.mean(0) if len(part) else encoded.new_zeros(encoded.shape[1])
                      for part in encoded.tensor_split(PARTS)])  # fmt: skip


def similarities(tested: Tensor, heard: Tensor, words: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cosine of every tested recording with the prototype of every enrolled word, seen from the heard takes' mean.

    The mean, of prototypes, is what all words of this speaker have in common; without it all cosines are near 1.

    Args:
        tested: embeddings, [N, E]; heard: of the takes that were heard, [M, E].
        words: the word (its number in the word list) of each of these, M.

    Returns:
        [N, K], and the enrolled words in the order of its columns, [K].
    """
    enrolled, member = torch.tensor(words).unique(return_inverse=True)
    prototypes = torch.stack([heard[member == place].mean(0) for place in range(len(enrolled))])  # [K, E]
    centre = prototypes.mean(0)
    return F.cosine_similarity((tested - centre)[:, None], (prototypes - centre)[None], dim=2), enrolled


def rescored(scores: Tensor, similarity: Tensor, enrolled: Tensor, weight: float) -> Tensor:
    """Log-probabilities of the listed words after the prototypes have had their say.

    P'(w | x) = P(E | x) * P(w | x) exp(weight * s(x, w)) / sum over v in E of P(v | x) exp(weight * s(x, v)) for a word
    w of the enrolled words E, and P'(w | x) = P(w | x) for every other word: prototypes decide between enrolled words
    only. What the recogniser gives to all of them together, P(E | x), stays theirs, so that a word of which no take was
    heard is neither favoured nor put behind. (To give such words the mean similarity instead sounds as fair and is not:
    of many similarities to wrong words, the best always lies above their mean.)

    Args:
        scores: log-linear word-list scores (`decoding.word_list_scores`), -inf where a word does not fit, [N, W].
        similarity: [N, K]; enrolled: the word of each column, [K].
        weight: 0 leaves every decision as it was.

    Returns:
        [N, W]; a row without any word that fits stays -inf.
    """
    log_probs = scores - scores.logsumexp(1, keepdim=True)  # log P(w | x)
    log_probs = log_probs.where(scores > -torch.inf, -torch.inf)
    own = log_probs[:, enrolled]
    said = own + weight * similarity.to(own)
    kept = own.logsumexp(1, keepdim=True) - said.logsumexp(1, keepdim=True)
    changed = log_probs.clone()
    changed[:, enrolled] = (said + kept).where(own > -torch.inf, -torch.inf)
    return changed
