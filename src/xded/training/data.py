"""Recordings to batches. Order, augmentation and dropout are pure functions of (seed, batch number).

That is what makes a resumed run identical to an unbroken one: there is no random state to lose.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from xded.audio import read_audio
from xded.augment import augment
from xded.config import AugmentConfig, FeatureConfig
from xded.corpus.manifest import Recording
from xded.features import LogMel
from xded.models.hugging_face import HuggingFaceFrontEnd
from xded.objectives import TopK
from xded.targets.store import Posterior, Store
from xded.tokenizer import Tokenizer
from xded.training.curriculum import Curriculum

KEPT_FEATURES = 30_000  # recordings whose features a process keeps: 3.8 GB at 4 s each
POOL_BATCHES = 16  # batches whose recordings are sorted by length together, so that little is padding
FrontEnd = LogMel | HuggingFaceFrontEnd


@dataclass
class Batch:
    """What one step sees. Exactly one of `features` and `encoded` is given."""

    recordings: list[str]
    speakers: list[str]
    features: Tensor | None  # [B, T, mels]
    feature_lengths: Tensor  # [B]
    encoded: Tensor | None  # [B, T', D]: cached outputs of a frozen encoder
    encoded_lengths: Tensor | None  # [B]
    tokens: Tensor  # [B, U + 1], ending in </s>, padded with </s>
    token_lengths: Tensor  # [B], without </s>
    ctc_target: TopK | None  # [B, T', k]
    least_blank: Tensor | None  # [B, T']
    decoder_target: TopK | None  # [B, U + 1, k]

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""

        def move(value: object) -> object:
            if isinstance(value, TopK):
                return TopK(*(tensor.to(device, non_blocking=True) for tensor in value))
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return Batch(**{f.name: move(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]


@lru_cache(maxsize=4)  # an epoch is asked for once a batch; a long run has thousands of epochs
def batches_of_epoch(
    lengths: tuple[int, ...], batch_size: int, seed: int, epoch: int, curriculum: Curriculum | None = None
) -> tuple[tuple[int, ...], ...]:
    """Indices of every batch of an epoch: shuffled, with recordings of like length together.

    A curriculum changes whom the batches are drawn from, not their number or their sizes. A recording that an epoch
    holds again has its index plus a multiple of the number of recordings: another copy, augmented in another way.
    """
    random = np.random.default_rng([seed, epoch])
    count, pool = len(lengths), batch_size * POOL_BATCHES
    offered = np.arange(count) if curriculum is None else curriculum.offered(epoch, batch_size)
    passes = [offered[random.permutation(len(offered))] + copy * count for copy in range(-(-count // len(offered)))]
    order = np.concatenate(passes)[:count]
    batches: list[tuple[int, ...]] = []
    for start in range(0, count, pool):
        by_length = sorted(order[start : start + pool].tolist(), key=lambda i: lengths[i % count])
        batches += [tuple(by_length[i : i + batch_size]) for i in range(0, len(by_length), batch_size)]
    return tuple(batches[i] for i in random.permutation(len(batches)))


def batch_of(
    lengths: tuple[int, ...], batch_size: int, seed: int, number: int, curriculum: Curriculum | None = None
) -> tuple[int, tuple[int, ...]]:
    """Epoch (from 0) and indices (as in `batches_of_epoch`) of a batch, by its number in the whole run."""
    epoch, place = divmod(number, -(-len(lengths) // batch_size))
    return epoch, batches_of_epoch(lengths, batch_size, seed, epoch, curriculum)[place]


def compute_features(path: Path, front_end: FrontEnd) -> np.ndarray:
    """Features of a file: [T, F] float32."""
    waveform = read_audio(path, front_end.sample_rate)
    features, lengths = front_end(torch.from_numpy(waveform)[None], torch.tensor([len(waveform)]))
    return features[0, : int(lengths[0])].numpy()


@lru_cache(maxsize=KEPT_FEATURES)
def features_of(path: Path, config: FeatureConfig) -> np.ndarray:
    """`compute_features` of `LogMel` with normalisation per recording, kept for all runs of this process."""
    return compute_features(path, _front_end(config))


@cache
def _front_end(config: FeatureConfig) -> LogMel:
    return LogMel(config)


class RunSampler(Sampler[list[tuple[int, int]]]):
    """All batches of a run in one sequence, from `first` on: lists of (epoch, index).

    Of `count` processes each gets every count-th recording of a batch. One for which nothing is left gets the first
    recording, which does not count (`Loop`): every process has to take part in every batch.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, epochs: int, first: int = 0, *,
        rank: int = 0, count: int = 1, curriculum: Curriculum | None = None,
    ) -> None:  # fmt: skip
        self.lengths, self.batch_size, self.seed = tuple(lengths), batch_size, seed
        self.first, self.total = first, -(-len(lengths) // batch_size) * epochs
        self.rank, self.count, self.curriculum = rank, count, curriculum

    def __len__(self) -> int:
        return self.total - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = -(-len(self.lengths) // self.batch_size)
        for epoch in range(self.first // per_epoch, self.total // per_epoch):
            # asked for once: to look it up hashes all lengths, which for every batch would be quadratic
            batches = batches_of_epoch(self.lengths, self.batch_size, self.seed, epoch, self.curriculum)
            for batch in batches[max(0, self.first - epoch * per_epoch) :]:
                yield [(epoch, index) for index in batch[self.rank :: self.count] or batch[:1]]


def align_by_time(posterior: Posterior, frames: int, target_rate_hz: float, student_rate_hz: float) -> Posterior:
    """The posterior at the student's frame times: nearest target frame to each frame's centre."""
    if abs(target_rate_hz - student_rate_hz) < 1e-6 and len(posterior.ids) == frames:
        return posterior
    centres_s = (np.arange(frames) + 0.5) / student_rate_hz
    places = np.clip((centres_s * target_rate_hz).astype(int), 0, len(posterior.ids) - 1)
    return Posterior(
        posterior.ids[places], posterior.probabilities[places], posterior.rest[places], posterior.least_blank[places]
    )


class TrainingData(Dataset[dict]):
    """Recordings of one side of a split, with features computed once and kept in memory.

    Args:
        recordings: what to serve.
        front_end: makes features; tokenizer: makes token ids.
        augmentation: none for validation and tests, nor of waveforms: it is of log-mel features.
        ctc_targets, decoder_targets: stores of aggregated targets, or none.
        frame_rate_hz: encoded frames a second of the student; reduce: feature frames -> encoded frames.
    """

    def __init__(
        self,
        recordings: Sequence[Recording],
        front_end: FrontEnd,
        tokenizer: Tokenizer,
        *,
        augmentation: AugmentConfig | None = None,
        seed: int = 0,
        ctc_targets: Store | None = None,
        decoder_targets: Store | None = None,
        frame_rate_hz: float = 25.0,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.recordings = list(recordings)
        self.front_end, self.tokenizer = copy.deepcopy(front_end).cpu(), tokenizer
        self.augmentation, self.seed = augmentation, seed
        self.ctc_targets, self.decoder_targets = ctc_targets, decoder_targets
        self.frame_rate_hz, self.reduce = frame_rate_hz, reduce
        self.tokens = [tokenizer.encode(recording.text) for recording in self.recordings]
        self.encoded: list[Tensor] | None = None  # outputs of the frozen encoder
        self.frozen_epochs = 0  # epochs in which they are served
        self.curriculum: Curriculum | None = None  # what batches are drawn from; none: all recordings
        self.opened: dict[str, Path] = {}  # recording -> the file whose audio was served for it
        self.spread: dict[str, float] = {}  # recording -> standard deviation of its features before augmentation
        self._features: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.recordings)

    def plain(self) -> TrainingData:
        """The same without augmentation and targets; what is opened through it counts as opened."""
        plain = copy.copy(self)
        plain.augmentation = plain.ctc_targets = plain.decoder_targets = plain.encoded = None
        return plain

    @property
    def lengths(self) -> list[int]:
        """Milliseconds of each recording: what batches are sorted by."""
        return [round(1000 * recording.duration) for recording in self.recordings]

    def features(self, index: int) -> np.ndarray:
        """Features of a recording without augmentation: [T, F]."""
        path, front_end = self.recordings[index].audio_filepath, self.front_end
        self.opened[self.recordings[index].recording] = path
        if isinstance(front_end, LogMel) and front_end.config.normalisation == "per_recording":
            return features_of(path, front_end.config)
        if index not in self._features:
            self._features[index] = compute_features(path, front_end)
        return self._features[index]

    def __getitem__(self, item: tuple[int, int]) -> dict:
        epoch, index_of_copy = item  # as in `batches_of_epoch`
        index = index_of_copy % len(self)
        recording = self.recordings[index]
        row: dict = {"recording": recording.recording, "speaker": recording.speaker, "tokens": self.tokens[index]}
        if self.encoded is not None and epoch < self.frozen_epochs:
            row["encoded"] = self.encoded[index]
            frames = len(self.encoded[index])
        else:
            features = self.features(index)
            self.spread.setdefault(recording.recording, float(features.std()))
            if self.augmentation is not None and not self.front_end.is_waveform:
                random = np.random.default_rng([self.seed, epoch, index_of_copy, 1])
                features = augment(features, self.augmentation, random)
            row["features"] = torch.from_numpy(features)
            frames = int(self.reduce(torch.tensor(len(features)))) if self.reduce else 0
        if self.ctc_targets is not None:
            posterior = self.ctc_targets.read(recording.recording)
            rate_hz = self.ctc_targets.index.frame_rate_hz or self.frame_rate_hz
            row["ctc"] = align_by_time(posterior, frames, rate_hz, self.frame_rate_hz)
        if self.decoder_targets is not None:
            row["decoder"] = self.decoder_targets.read(recording.recording)
        return row


def _pad(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _pad_posteriors(posteriors: list[Posterior]) -> tuple[TopK, Tensor]:
    target = TopK(
        _pad([torch.from_numpy(p.ids) for p in posteriors]),
        _pad([torch.from_numpy(p.probabilities) for p in posteriors]),
        _pad([torch.from_numpy(p.rest) for p in posteriors]),
    )
    return target, _pad([torch.from_numpy(p.least_blank) for p in posteriors])


def collate(rows: list[dict], eos: int) -> Batch:
    """Pads rows of `TrainingData` into a `Batch`."""
    features = [row["features"] for row in rows if "features" in row]
    encoded = [row["encoded"] for row in rows if "encoded" in row]
    most = max(len(row["tokens"]) for row in rows) + 1
    tokens = torch.full((len(rows), most), eos)
    for i, row in enumerate(rows):
        tokens[i, : len(row["tokens"])] = torch.tensor(row["tokens"])
    ctc, least_blank = _pad_posteriors([row["ctc"] for row in rows]) if "ctc" in rows[0] else (None, None)
    decoder = _pad_posteriors([row["decoder"] for row in rows])[0] if "decoder" in rows[0] else None
    return Batch(
        recordings=[row["recording"] for row in rows],
        speakers=[row["speaker"] for row in rows],
        features=_pad(features) if features else None,
        feature_lengths=torch.tensor([len(f) for f in features or encoded]),
        encoded=_pad(encoded) if encoded else None,
        encoded_lengths=torch.tensor([len(e) for e in encoded]) if encoded else None,
        tokens=tokens,
        token_lengths=torch.tensor([len(row["tokens"]) for row in rows]),
        ctc_target=ctc,
        least_blank=least_blank,
        decoder_target=decoder,
    )
