"""Recordings to batches. Augmentation is a pure function of seed, epoch and recording: no random state can be lost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from xded.audio import read_audio
from xded.augment import augment
from xded.augment_audio import View, audio_part
from xded.config import AugmentConfig, FeatureConfig
from xded.corpus.manifest import Recording
from xded.features import LogMel
from xded.models.hugging_face import HuggingFaceFrontEnd
from xded.objectives import TopK, WordTarget
from xded.targets.store import Posterior, Store
from xded.tokenizer import Tokenizer
from xded.training.curriculum import Curriculum

KEPT_FEATURES = 30_000  # recordings (versions, where audio is augmented) whose features are kept: 3.8 GB at 4 s each
MOST_WORDS = 8  # of a target that lists words: each of them costs a CTC loss
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
    words: WordTarget | None = None  # [B, W, ...], the likeliest ones of each recording
    heard: Tensor | None = None  # [B, U], the text that the teachers hear
    heard_lengths: Tensor | None = None  # [B], 0 where they hear nothing
    guide: Tensor | None = None  # [B, T', D of the guide]

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""

        def move(value: object) -> object:
            if isinstance(value, TopK | WordTarget):
                return type(value)(*(tensor.to(device, non_blocking=True) for tensor in value))
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return Batch(**{f.name: move(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]


def compute_features(path: Path, front_end: FrontEnd, view: View | None = None) -> np.ndarray:
    """Features of a file, or of a version of its audio: [T, F] float32."""
    waveform = read_audio(path, front_end.sample_rate)
    if view is not None:
        waveform = view.of(waveform, front_end.sample_rate)
    features, lengths = front_end(torch.from_numpy(waveform)[None], torch.tensor([len(waveform)]))
    return features[0, : int(lengths[0])].numpy()


@lru_cache(maxsize=KEPT_FEATURES)
def features_of(path: Path, config: FeatureConfig, view: View | None = None) -> np.ndarray:
    """`compute_features` of `LogMel` with normalisation per recording, kept for all runs of this process."""
    return compute_features(path, _front_end(config), view)


@cache
def _front_end(config: FeatureConfig) -> LogMel:
    return LogMel(config)


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
        augmentation: none for validation and tests. Waveforms as features (`is_waveform`) have that of audio alone.
        ctc_targets, decoder_targets, word_targets: stores of aggregated targets, or none.
        text_targets: store of CTC targets of which only the text is read, or none.
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
        word_targets: Store | None = None,
        text_targets: Store | None = None,
        frame_rate_hz: float = 25.0,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.recordings = list(recordings)
        self.front_end, self.tokenizer = copy.deepcopy(front_end).cpu(), tokenizer
        self.augmentation, self.seed = augmentation, seed
        self.ctc_targets, self.decoder_targets = ctc_targets, decoder_targets
        self.word_targets, self.text_targets = word_targets, text_targets
        self.frame_rate_hz, self.reduce = frame_rate_hz, reduce
        self.tokens = [tokenizer.encode(recording.text) for recording in self.recordings]
        self.encoded: list[Tensor] | None = None  # outputs of the frozen encoder
        self.guide: list[Tensor] | None = None  # outputs of the guide's encoder
        self._tokens_of: dict[str, list[int]] = {}
        self.frozen_epochs = 0  # epochs in which they are served
        self.curriculum: Curriculum | None = None  # what batches are drawn from; none: all recordings
        self.opened: dict[str, Path] = {}  # recording -> the file whose audio was served for it
        self.spread: dict[str, float] = {}  # recording -> standard deviation of its features before augmentation
        self._features: dict[tuple[int, View | None], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.recordings)

    def plain(self) -> TrainingData:
        """The same without augmentation and targets; what is opened through it counts as opened."""
        plain = copy.copy(self)
        plain.augmentation = plain.ctc_targets = plain.decoder_targets = plain.encoded = None
        plain.word_targets = plain.text_targets = plain.guide = None
        return plain

    @property
    def lengths(self) -> list[int]:
        """Milliseconds of each recording as it is, whatever augmentation does: what batches are sorted by."""
        return [round(1000 * recording.duration) for recording in self.recordings]

    def view(self, epoch: int, index_of_copy: int) -> View | None:
        """The version of a recording's audio that an epoch hears, the next one every epoch and copy; none: as it is.

        Which one an epoch starts with differs from recording to recording, so that every epoch hears some of each.
        """
        changes = audio_part(self.augmentation) if self.augmentation is not None else None
        if self.augmentation is None or changes is None:
            return None
        copy_number, index = divmod(index_of_copy, len(self))
        number = (epoch + copy_number + index) % self.augmentation.views
        return View(changes, self.seed, self.recordings[index].recording, number) if number else None

    def features(self, index: int, view: View | None = None) -> np.ndarray:
        """Features of a recording, or of a version of its audio, without augmentation of features: [T, F]."""
        path, front_end = self.recordings[index].audio_filepath, self.front_end
        self.opened[self.recordings[index].recording] = path
        if isinstance(front_end, LogMel) and front_end.config.normalisation == "per_recording":
            # asked for as others do who know of no versions: another signature would be kept twice
            return features_of(path, front_end.config, view) if view else features_of(path, front_end.config)
        if (index, view) not in self._features:
            self._features[index, view] = compute_features(path, front_end, view)
        return self._features[index, view]

    def __getitem__(self, item: tuple[int, int]) -> dict:
        epoch, index_of_copy = item  # as in `training.order`
        index = index_of_copy % len(self)
        recording = self.recordings[index]
        row: dict = {"recording": recording.recording, "speaker": recording.speaker, "tokens": self.tokens[index]}
        if self.encoded is not None and epoch < self.frozen_epochs:
            row["encoded"] = self.encoded[index]
            frames = len(self.encoded[index])
        else:
            if recording.recording not in self.spread:
                self.spread[recording.recording] = float(self.features(index).std())
            features = self.features(index, self.view(epoch, index_of_copy))
            if self.augmentation is not None and not self.front_end.is_waveform:
                random = np.random.default_rng([self.seed, epoch, index_of_copy, 1])
                features = augment(features, self.augmentation, random)
            row["features"] = torch.from_numpy(features)
            frames = int(self.reduce(torch.tensor(len(features)))) if self.reduce else 0
        if self.guide is not None:
            row["guide"] = self.guide[index]
        return row | self._targets_of(recording.recording, frames, len(self.tokens[index]) + 1)

    def _targets_of(self, recording: str, frames: int, steps: int) -> dict:
        """What the teachers say of a recording of so many encoded frames and decoder steps."""
        said: dict = {}
        if self.ctc_targets is not None:
            posterior = read_or_nothing(self.ctc_targets, recording, frames)
            rate_hz = self.ctc_targets.index.frame_rate_hz or self.frame_rate_hz
            said["ctc"] = align_by_time(posterior, frames, rate_hz, self.frame_rate_hz)
        if self.decoder_targets is not None:
            said["decoder"] = read_or_nothing(self.decoder_targets, recording, steps)
        if self.word_targets is not None:
            posterior, listed = read_or_nothing(self.word_targets, recording, 1), self.word_targets.index.words
            ids, probabilities = posterior.ids[0], posterior.probabilities[0]
            best = np.argsort(-probabilities, kind="stable")[:MOST_WORDS]
            best = best[probabilities[best] > 0]
            said["words"] = [(self._encoded(listed[ids[i]]), float(probabilities[i])) for i in best]
        if self.text_targets is not None:
            store = self.text_targets
            said["heard"] = [] if recording in store.dropped else self._encoded(store.entry(recording).text or "")
        return said

    def _encoded(self, text: str) -> list[int]:
        """Tokens of a text, which is encoded once."""
        if text not in self._tokens_of:
            self._tokens_of[text] = self.tokenizer.encode(text) if text else []
        return self._tokens_of[text]


def read_or_nothing(store: Store, recording: str, steps: int) -> Posterior:
    """A target; one without any mass, whose losses are 0, where it was dropped because teachers do not spell the text.

    Raises:
        TargetError: there is none although there should be.
    """
    if recording not in store.dropped:
        return store.read(recording)
    width = store.read(store.index.recordings[0].recording).ids.shape[1]  # stored posteriors may be narrower than top_k
    empty = np.zeros((steps, width), np.float32)
    # no teacher hears speech in it: no frame is used
    return Posterior(empty.astype(np.int64), empty, empty[:, 0], np.ones(steps, np.float32))


def _pad(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _pad_posteriors(posteriors: list[Posterior]) -> tuple[TopK, Tensor]:
    target = TopK(
        _pad([torch.from_numpy(p.ids) for p in posteriors]),
        _pad([torch.from_numpy(p.probabilities) for p in posteriors]),
        _pad([torch.from_numpy(p.rest) for p in posteriors]),
    )
    return target, _pad([torch.from_numpy(p.least_blank) for p in posteriors])


def _pad_tokens(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """[B, U], at least one wide, and [B]."""
    padded = torch.zeros(len(rows), max(1, *map(len, rows)), dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row)
    return padded, torch.tensor([len(row) for row in rows])


def _pad_words(rows: list[list[tuple[list[int], float]]]) -> WordTarget:
    """Words of each recording, at least one place wide."""
    most = max(1, *map(len, rows))
    filled = [row + [([], 0.0)] * (most - len(row)) for row in rows]
    tokens, lengths = _pad_tokens([word for row in filled for word, _ in row])
    probabilities = torch.tensor([[probability for _, probability in row] for row in filled])
    return WordTarget(tokens.view(len(rows), most, -1), lengths.view(len(rows), most), probabilities)


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
    heard, heard_lengths = _pad_tokens([row["heard"] for row in rows]) if "heard" in rows[0] else (None, None)
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
        words=_pad_words([row["words"] for row in rows]) if "words" in rows[0] else None,
        heard=heard,
        heard_lengths=heard_lengths,
        guide=_pad([row["guide"] for row in rows]) if "guide" in rows[0] else None,
    )
