"""Which recordings each batch of a run holds: a pure function of the seed and the batch's number.

That is what makes a resumed run identical to an unbroken one: there is no random state to lose.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
from torch.utils.data import Sampler

from xded.config import TrainConfig
from xded.errors import ConfigError
from xded.training.curriculum import Curriculum
from xded.training.data import TrainingData

# batches whose recordings are sorted by length together, so that little is padding: a quarter of an epoch, no fewer and
# no more than these (a small corpus sorted as a whole would have the same batches every epoch, and learns less)
POOL_BATCHES = (16, 64)
Batches = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)  # of a run there is one: comparing its 100,000 numbers at every batch would cost
class Words:
    """The training recordings by what is said in them and by whom.

    Words that one speaker alone says count as one word: nobody else's recording goes with theirs.

    Attributes:
        word: of each recording, a number from 0; voice: of each recording, the number of its word and speaker.
        together: K, recordings of a word in a batch.
        said: recordings of each word; first: of each word, those of the words before it.
    """

    word: np.ndarray
    voice: np.ndarray
    together: int
    said: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[Hashable], speakers: Sequence[str], train: TrainConfig) -> Self | None:
        """Words of recordings by their texts and speakers; none where the config does not ask for them.

        Raises:
            ConfigError: they cannot fill the batches.
        """
        if train.sampler == "length":
            return None
        together = train.speakers_per_word
        if train.batch_size % together:
            raise ConfigError(
                f"train.batch_size is {train.batch_size}, no multiple of train.speakers_per_word {together}.",
                f"Set train.batch_size={max(1, train.batch_size // together) * together}.",
            )
        if train.curriculum.schedule != "none":
            raise ConfigError(
                f"train.sampler is words, and train.curriculum.schedule {train.curriculum.schedule}: both say whom a "
                "batch is drawn from.",
                "Set train.curriculum.schedule=none, or train.sampler=length.",
            )
        heard: dict[Hashable, set[str]] = {}
        for text, speaker in zip(texts, speakers, strict=True):
            heard.setdefault(text, set()).add(speaker)
        if all(len(said_by) < 2 for said_by in heard.values()):
            raise ConfigError(
                f"train.sampler is words, and none of the {len(heard)} texts to train on is said by two speakers.",
                "Train on more speakers, or set train.sampler=length.",
            )
        shared = [text if len(heard[text]) > 1 else None for text in texts]
        word, voice = _numbers(shared), _numbers(list(zip(shared, speakers, strict=True)))
        said = np.bincount(word)
        return cls(word, voice, together, said, np.cumsum(said) - said)

    def groups(self, seed: int, cycle: int) -> np.ndarray:
        """What is heard together in K epochs: indices [N, K], each recording K times, a row of one word.

        A word of n recordings has n rows. The copies of its recordings, speaker by speaker, are dealt to them like
        cards, so that a row holds floor or ceiling of K c / n recordings of a speaker who has c of the n: K different
        speakers where nobody has more than a K-th of them. The copies of a recording lie in rows one after the other,
        and every K-th row of a word comes in the same K-th of the order: once in about every epoch.
        """
        random = np.random.default_rng([seed, cycle, 1])
        count, together = len(self.word), self.together
        speakers = random.permutation(int(self.voice.max()) + 1)[self.voice]
        copies = np.lexsort((random.random(count), speakers, self.word)).repeat(together)
        word = self.word[copies]
        place, rows = np.arange(count * together) - together * self.first[word], self.said[word]
        groups = np.empty((count, together), dtype=np.int64)
        groups[self.first[word] + place % rows, place // rows] = copies
        word = self.word[groups[:, 0]]
        begin = random.integers(together, size=len(self.said))
        part = (np.arange(count) - self.first[word] + begin[word]) % together
        return groups[np.lexsort((random.random(count), part))]


def _numbers(names: Sequence[Hashable]) -> np.ndarray:
    """Names as numbers from 0, in the order in which they come."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in names])


@dataclass(frozen=True, eq=False)
class Order:
    """The batches of a run: as many, of the same sizes, in every epoch and by every sampler.

    By length (`words` is none), each recording comes once an epoch, in batches of like lengths. A curriculum changes
    whom the batches are drawn from. By words, a batch holds groups of K recordings of a word by different speakers (the
    batches of XDED, Lee, Kim and Kwak 2022, arXiv:2211.14058), no word twice where there are enough words, and each
    recording comes exactly K times in every K epochs; what fills the last, smaller batch may be less than a group.

    A recording that an epoch holds again has its index plus a multiple of the number of recordings: another copy,
    augmented in another way.

    Attributes:
        lengths: of the recordings, in any unit.
    """

    lengths: tuple[int, ...]
    batch_size: int
    seed: int
    curriculum: Curriculum | None = None
    words: Words | None = None

    @classmethod
    def of(cls, data: TrainingData, train: TrainConfig, seed: int) -> Self:
        """The order that a config asks for.

        Raises:
            ConfigError: see `Words.of`.
        """
        words = Words.of([tuple(tokens) for tokens in data.tokens], [r.speaker for r in data.recordings], train)
        return cls(tuple(data.lengths), train.batch_size, seed, data.curriculum, words)

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def epoch(self, epoch: int) -> Batches:
        """Indices of every batch of an epoch (from 0)."""
        return _batches(self, epoch)

    def batch(self, number: int) -> tuple[int, ...]:
        """Indices of a batch, by its number in the whole run."""
        epoch, place = divmod(number, self.per_epoch)
        return self.epoch(epoch)[place]


@lru_cache(maxsize=4)  # an epoch is asked for once a batch; a long run has thousands of epochs
def _batches(order: Order, epoch: int) -> Batches:
    random = np.random.default_rng([order.seed, epoch])
    batches = _by_length(order, epoch, random) if order.words is None else _by_words(order, order.words, epoch, random)
    return tuple(batches[i] for i in random.permutation(len(batches)))


def _by_length(order: Order, epoch: int, random: np.random.Generator) -> list[tuple[int, ...]]:
    lengths, batch_size, curriculum = order.lengths, order.batch_size, order.curriculum
    fewest, most = POOL_BATCHES
    count, pool = len(lengths), batch_size * min(most, max(fewest, order.per_epoch // 4))
    offered = np.arange(count) if curriculum is None else curriculum.offered(epoch, batch_size)
    passes = [offered[random.permutation(len(offered))] + copy * count for copy in range(-(-count // len(offered)))]
    drawn = np.concatenate(passes)[:count]
    batches: list[tuple[int, ...]] = []
    for start in range(0, count, pool):
        by_length = sorted(drawn[start : start + pool].tolist(), key=lambda i: lengths[i % count])
        batches += [tuple(by_length[i : i + batch_size]) for i in range(0, len(by_length), batch_size)]
    return batches


@lru_cache(maxsize=2)
def _groups(words: Words, seed: int, cycle: int) -> np.ndarray:
    return words.groups(seed, cycle)


def _by_words(order: Order, words: Words, epoch: int, random: np.random.Generator) -> list[tuple[int, ...]]:
    count, batches, together = len(order.lengths), order.per_epoch, words.together
    last = count - (batches - 1) * order.batch_size  # recordings in the smaller batch
    over = last % together  # of them, those that are no whole group
    cycle, part = divmod(epoch, together)
    drawn, whole = _groups(words, order.seed, cycle), (count - over) // together
    # of N groups in K epochs, `over` are left when each epoch has its whole ones: each gets a K-th of what they hold
    left = drawn[together * whole :].ravel()[part * over : (part + 1) * over]
    drawn = drawn[part * whole : (part + 1) * whole]
    # groups of a word one after the other, dealt like cards: into different batches
    drawn = drawn[np.argsort(random.permutation(len(words.said))[words.word[drawn[:, 0]]], kind="stable")]
    held: list[list[int]] = [[] for _ in range(batches)]
    room = [order.batch_size // together] * (batches - 1) + [last // together]
    places = [place for group in range(max(room)) for place in range(batches) if group < room[place]]
    for place, group in zip(places, drawn.tolist(), strict=True):
        held[place] += group
    held[-1] += left.tolist()
    heard: dict[int, int] = {}
    for batch in held:
        for row, index in enumerate(batch):
            batch[row] = index + count * heard.get(index, 0)
            heard[index] = heard.get(index, 0) + 1
    return [tuple(batch) for batch in held]


class RunSampler(Sampler[list[tuple[int, int]]]):
    """All batches of a run in one sequence, from `first` on: lists of (epoch, index).

    Of `count` processes each gets every count-th recording of a batch. One for which nothing is left gets the first
    recording, which does not count (`Loop`): every process has to take part in every batch.
    """

    def __init__(self, order: Order, epochs: int, first: int = 0, *, rank: int = 0, count: int = 1) -> None:
        self.order, self.first, self.total = order, first, order.per_epoch * epochs
        self.rank, self.count = rank, count

    def __len__(self) -> int:
        return self.total - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in range(self.first, self.total):
            batch = self.order.batch(number)
            epoch = number // self.order.per_epoch
            yield [(epoch, index) for index in batch[self.rank :: self.count] or batch[:1]]
