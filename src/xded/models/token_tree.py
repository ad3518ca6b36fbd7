"""Words as one text that branches, for a decoder that is to score them all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenTree:
    """Words of which every beginning is there once, however many share it.

    A decoder reads it as it reads one text when each step attends to the tokens on its own way only (tree attention,
    Miao et al. 2023, arXiv:2305.09781, section 4.1): audio is attended to by N queries, not by every word's.

    Attributes:
        tokens: <s> and then all others, each behind the one that it follows, [N].
        parents: place of the token before, for all but <s>, [N - 1].
        seen: which tokens lie on the way from <s> to each, itself included, [N, N].
        ends: place of the last token of each word, [W].
    """

    tokens: Tensor
    parents: Tensor
    seen: Tensor
    ends: Tensor

    @classmethod
    def of(cls, words: Sequence[Sequence[int]], bos: int) -> TokenTree:
        """The tree of W words, none empty; `bos` is the id of <s>."""
        places: dict[tuple[int, ...], int] = {(): 0}
        for word in words:
            for length in range(1, len(word) + 1):
                places.setdefault(tuple(word[:length]), len(places))
        prefixes = list(places)[1:]
        parents = [places[prefix[:-1]] for prefix in prefixes]
        seen = np.eye(len(places), dtype=bool)
        for place, parent in enumerate(parents, start=1):
            seen[place] |= seen[parent]
        return cls(
            torch.tensor([bos, *(prefix[-1] for prefix in prefixes)]),
            torch.tensor(parents),
            torch.from_numpy(seen),
            torch.tensor([places[tuple(word)] for word in words]),
        )
