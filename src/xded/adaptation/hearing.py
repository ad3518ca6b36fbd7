"""What a recogniser makes of a speaker's test takes: as it is, after steps, and with prototypes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from xded.adaptation.prototypes import embedding, rescored, similarities
from xded.adaptation.settings import LISTED, Method, Settings
from xded.adaptation.steps import Piece, hear_adapted, job_of
from xded.adaptation.takes import Apart
from xded.config import DecodeConfig
from xded.corpus.manifest import Corpus, Recording
from xded.decoding import word_list_scores
from xded.models.recogniser import Recogniser
from xded.parallel import run_all
from xded.scoring import Prediction
from xded.tokenizer import normalise
from xded.training.data import TrainingData
from xded.training.evaluation import batches, predicted, recognise

Unheard = dict[str, list[Prediction]]  # by decode mode
Heard = dict[tuple[int, Method, str], list[Prediction]]  # by takes that were heard, method and decode mode


@dataclass(frozen=True)
class Subject:
    """Whom to adapt to whom: a recogniser, the corpus, its speakers' takes, how it is decoded, the listed words."""

    recogniser: Recogniser
    corpus: Corpus
    speakers: tuple[Apart, ...]
    decodes: Mapping[str, DecodeConfig]
    words: tuple[str, ...]

    @property
    def test(self) -> list[Recording]:
        """Of all speakers."""
        return [recording for apart in self.speakers for recording in apart.test]

    @property
    def device(self) -> torch.device:
        """Where the recogniser is."""
        return next(self.recogniser.student.parameters()).device

    def data(self, recordings: Sequence[Recording]) -> TrainingData:
        """Recordings as the recogniser gets them."""
        return TrainingData(recordings, self.recogniser.student.front_end, self.recogniser.tokenizer)


def hear_unheard(subject: Subject) -> Unheard:
    """The recogniser as it is, on the test: as `xded evaluate` hears these recordings."""
    student, data, seed = subject.recogniser.student, subject.data(subject.test), subject.recogniser.config.seed
    return {
        decode: recognise(student, data, config, word_list=subject.words if config.word_list else None, seed=seed)
        for decode, config in subject.decodes.items()
    }


def hear_steps(subject: Subject, settings: Settings, out: Path, jobs: int, keep: bool, quiet: bool) -> Heard:
    """The method `steps`: for each number of takes, speaker and draw a run of its own."""
    pieces = []
    for apart in subject.speakers:
        for draw in range(settings.draws):
            for takes in settings.takes:
                folder = out / "runs" / apart.speaker / f"draw_{draw}" / f"heard_{takes}"
                job = job_of(subject.recogniser, subject.corpus, apart, takes, draw, settings, folder)
                device = str(subject.device)
                pieces.append(Piece(takes, draw, job, apart.test, subject.decodes, subject.words, device, keep))

    def say(count: int) -> None:
        if not quiet:
            print(f"{count} of {len(pieces)} adaptations done", file=sys.stderr, flush=True)

    heard: Heard = {}
    for piece, said in zip(pieces, run_all(hear_adapted, pieces, jobs, say), strict=True):
        for decode, predictions in said.items():
            heard.setdefault((piece.takes, "steps", decode), []).extend(predictions)
    return heard


@torch.inference_mode()
def hear_prototypes(subject: Subject, settings: Settings) -> Heard:
    """The method `prototypes`, which only chooses among listed words."""
    tokenizer = subject.recogniser.tokenizer
    tokens = [tuple(tokenizer.encode(word)) for word in subject.words]
    number = {word: place for place, word in enumerate(subject.words)}
    heard: Heard = {}
    for apart in subject.speakers:
        tested, scores = _embedded(subject, apart.test, tokens)
        pool, _ = _embedded(subject, apart.pool)
        words = [number.get(normalise(recording.text, tokenizer.normaliser)) for recording in apart.pool]
        for draw in range(settings.draws):
            for takes in settings.takes:
                wanted = {recording.recording for recording in apart.heard(draw, takes)}
                known = [
                    (place, word)
                    for place, (recording, word) in enumerate(zip(apart.pool, words, strict=True))
                    if recording.recording in wanted and word is not None
                ]
                changed = scores
                if known:
                    places, enrolled = zip(*known, strict=True)
                    changed = rescored(scores, *similarities(tested, pool[list(places)], enrolled), settings.weight)
                chosen = _chosen(subject, apart.test, changed, tokens, draw)
                heard.setdefault((takes, "prototypes", LISTED), []).extend(chosen)
    return heard


def _embedded(
    subject: Subject, recordings: Sequence[Recording], tokens: Sequence[Sequence[int]] = ()
) -> tuple[Tensor, Tensor]:
    """Embeddings [N, E] of recordings, and the scores [N, W] of words where words are given."""
    student, config = subject.recogniser.student.eval(), subject.decodes[LISTED]
    embeddings: dict[int, Tensor] = {}
    scores = torch.zeros(len(recordings), len(tokens), dtype=torch.double)
    for places, batch in batches(subject.data(recordings), config.batch_size):
        batch = batch.to(subject.device)
        assert batch.features is not None
        encoded, lengths = student.encode(batch.features, batch.feature_lengths)
        if tokens:
            tokenizer = subject.recogniser.tokenizer
            scores[places] = word_list_scores(student, encoded, lengths, tokens, config.ctc_weight, tokenizer)
        for place, outputs, length in zip(places, encoded, lengths.tolist(), strict=True):
            embeddings[place] = embedding(outputs[:length]).cpu().double()
    return torch.stack([embeddings[place] for place in range(len(recordings))]), scores


def _chosen(
    subject: Subject, test: Sequence[Recording], scores: Tensor, tokens: Sequence[tuple[int, ...]], draw: int
) -> list[Prediction]:
    """The best word of every recording; none where no word fits into it."""
    best, places = scores.max(dim=1)
    chosen = []
    for recording, value, place in zip(test, best.tolist(), places.tolist(), strict=True):
        if value > -torch.inf:
            chosen.append(predicted(recording, tokens[place], subject.words[place], draw))
        else:
            chosen.append(predicted(recording, (), "", draw))
    return chosen
