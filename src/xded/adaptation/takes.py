"""A new speaker's takes: a test that no adaptation hears, and the order in which each draw hears the others."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from xded.corpus.manifest import Corpus, Recording
from xded.errors import CorpusError


@dataclass(frozen=True)
class Apart:
    """One speaker's recordings: `test` is the same whatever was heard; `orders` lists the other takes, once a draw."""

    speaker: str
    test: tuple[Recording, ...]
    pool: tuple[Recording, ...]
    orders: tuple[tuple[str, ...], ...]

    def heard(self, draw: int, takes: int) -> tuple[Recording, ...]:
        """Recordings of a draw's first `takes` takes, all microphones of each: fewer takes are a part of more."""
        wanted = set(self.orders[draw][:takes])
        return tuple(recording for recording in self.pool if recording.take in wanted)


def set_apart(corpus: Corpus, speaker: str, most: int, draws: int, test_share: float, seed: int) -> Apart:
    """Divides a speaker's takes into test and pool, and draws the orders in which the pool is heard.

    Both are drawn word by word: one take of every word, in random order, comes before the second take of any. So the
    test has its share of every word, and a few takes are of as many words, as if a list had been read out once.

    Args:
        corpus, speaker: whose takes.
        most: takes that will be heard at most.
        draws: orders to draw.
        test_share: of the speaker's takes, in the test.
        seed: of all draws; another speaker's coming or going changes nothing.

    Raises:
        CorpusError: an unknown speaker, or fewer than `most` takes beside the test.
    """
    corpus.require((speaker,))
    recordings = corpus.select(speakers=(speaker,))
    texts = {recording.take: recording.text for recording in recordings}
    stream = zlib.crc32(speaker.encode())
    order = word_by_word(texts, np.random.default_rng([seed, stream]))
    tested = set(order[: round(len(order) * test_share)])
    pool = {take: text for take, text in texts.items() if take not in tested}
    if len(pool) < most or not tested:
        raise CorpusError(
            f"Speaker {speaker} has {len(texts)} takes: {len(tested)} are set apart for the test and {len(pool)} are "
            f"left, but {most} are to be heard.",
            "Ask for fewer (--takes 5,10), or set fewer apart (--test-share 0.3).",
        )
    orders = (word_by_word(pool, np.random.default_rng([seed, stream, 1 + draw])) for draw in range(draws))
    return Apart(
        speaker,
        tuple(recording for recording in recordings if recording.take in tested),
        tuple(recording for recording in recordings if recording.take in pool),
        tuple(orders),
    )


def word_by_word(texts: Mapping[str, str], random: np.random.Generator) -> tuple[str, ...]:
    """Takes (take -> its text) in a random order in which no word comes again before all others that are left."""
    rounds: dict[str, int] = {}
    places: list[tuple[int, str]] = []
    for take in _shuffled(sorted(texts), random):
        rounds[texts[take]] = rounds.get(texts[take], 0) + 1
        places.append((rounds[texts[take]], take))
    return tuple(take for _, take in sorted(places, key=lambda place: place[0]))  # stable: random within a round


def _shuffled(names: Sequence[str], random: np.random.Generator) -> list[str]:
    return [names[index] for index in random.permutation(len(names))]
