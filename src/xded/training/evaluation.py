"""Recordings in, predictions out: what validation, `xded evaluate`, cross-tests and the baselines share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from statistics import fmean

import torch
from torch import Tensor

from xded import decoding
from xded.checks.outputs import loops
from xded.config import Config, DecodeConfig
from xded.corpus.manifest import Corpus, Recording
from xded.decoding import Hypothesis
from xded.models.recogniser import Recogniser
from xded.models.student import Student
from xded.scoring import Prediction, score
from xded.tokenizer import Tokenizer
from xded.training.data import Batch, TrainingData, collate
from xded.training.losses import loss_parts, weighted_sum

# for WRA that is not reported by itself: validation, and cells of a matrix that states the conditions
UNSTATED = {"speakers": "unknown", "words": "unknown", "word_list": "open", "decode": "greedy"}
MOST_AT_ONCE_MS = 120_000  # of audio in a batch without gradients: memory grows with it


def batches(data: TrainingData, batch_size: int) -> Iterator[tuple[list[int], Batch]]:
    """All recordings of `data` without augmentation, those of like length together, and of long ones fewer."""
    lengths = data.lengths
    order = sorted(range(len(data)), key=lambda i: lengths[i])
    while order:
        # from the longest one on, which says how many fit
        count = max(1, min(batch_size, MOST_AT_ONCE_MS // max(1, lengths[order[-1]])))
        places = order[-count:]
        del order[-count:]
        yield places, collate([data[(0, place)] for place in places], data.tokenizer.eos)


@torch.inference_mode()
def recognise(
    student: Student,
    data: TrainingData,
    config: DecodeConfig,
    *,
    word_list: Sequence[str] | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> list[Prediction]:
    """Recognises every recording of `data`, in its order."""
    student.eval()
    device = device or next(student.parameters()).device
    found: dict[int, Hypothesis] = {}
    for places, batch in batches(data, config.batch_size):
        encoded, lengths = _encode(student, batch.to(device))
        hypotheses = decoding.decode_encoded(student, encoded, lengths, config, data.tokenizer, word_list)
        found.update(zip(places, hypotheses, strict=True))
    return _in_order(data, found, seed)


def _encode(student: Student, batch: Batch) -> tuple[Tensor, Tensor]:
    assert batch.features is not None
    return student.encode(batch.features, batch.feature_lengths)


def _in_order(data: TrainingData, found: Mapping[int, Hypothesis], seed: int) -> list[Prediction]:
    return [
        predicted(recording, found[place].tokens, found[place].text, seed)
        for place, recording in enumerate(data.recordings)
    ]


def predicted(recording: Recording, tokens: Sequence[int], text: str, seed: int) -> Prediction:
    """A line of predictions.jsonl."""
    return Prediction(
        recording=recording.recording,
        take=recording.take,
        speaker=recording.speaker,
        band=recording.band,
        word_type=recording.word_type,
        prompt=recording.prompt,
        reference=recording.text,
        hypothesis=text,
        tokens=tuple(tokens),
        seed=seed,
    )


@torch.inference_mode()
def validate(student: Student, data: TrainingData, config: Config) -> dict[str, float]:
    """Loss on the true text and WRA on recordings that training has not heard; shares are of 1."""
    if len(data) == 0:
        return {}
    student.eval()
    device = next(student.parameters()).device
    truth = config.model_copy(update={"objective": config.objective.supervised})
    greedy = config.decode.model_copy(update={"beam": 1, "word_list": False})
    sums: Counter[str] = Counter()
    found: dict[int, Hypothesis] = {}
    for places, batch in batches(data, config.decode.batch_size):
        batch = batch.to(device)
        batch.encoded, batch.encoded_lengths = _encode(student, batch)
        parts = loss_parts(student, batch, truth, data.tokenizer)
        parts["val_loss"] = weighted_sum(parts, truth)
        sums.update({name: float(value) * len(places) for name, value in parts.items()})
        hypotheses = decoding.decode_encoded(student, batch.encoded, batch.encoded_lengths, greedy, data.tokenizer)
        found.update(zip(places, hypotheses, strict=True))
    measured = {name: sums[name] / len(data) for name in ("val_loss", "teacher_forced") if name in sums}
    return {**measured, **summarise(_in_order(data, found, seed=0), data.tokenizer)}


def summarise(predictions: Sequence[Prediction], tokenizer: Tokenizer) -> dict[str, float]:
    """What tells a recogniser from a collapsed one, without intervals; shares are of 1, lengths in tokens."""
    overall = score(predictions, normaliser=tokenizer.normaliser, conditions=UNSTATED, resamples=0).overall
    references = [p.reference for p in predictions]
    return {
        "wra": overall.wra_percent.value / 100,
        "empty": overall.empty_percent.value / 100,
        "distinct": float(overall.distinct_outputs),
        "recordings": float(len(predictions)),
        "references": float(len(set(references))),
        "tokens": fmean(len(p.tokens) for p in predictions),
        "needed": fmean(len(tokenizer.encode(text)) for text in references),
        "repeats": fmean(loops(p.tokens) for p in predictions),
    }


def conditions_of(
    recogniser: Recogniser, corpus: Corpus, test: Sequence[Recording], config: DecodeConfig
) -> dict[str, str]:
    """What a score must say: speakers and words seen or not, word list, decode mode."""
    speakers = {speaker for p in recogniser.provenance for speaker in p.speakers}
    takes = {take for p in recogniser.provenance for take in p.takes}
    words = {recording.text for recording in corpus.recordings if recording.take in takes}
    seen = share_seen({r.speaker for r in test}, speakers)
    unknown = ", ".join(p.what for p in recogniser.provenance if not p.known)
    return {
        **({"not on record": f"whom it has heard: {unknown}"} if unknown else {}),
        "speakers": "unknown" if unknown and seen == "unseen" else seen,
        "words": share_seen({r.text for r in test}, words) if words else "unknown",
        **decoded_how(config),
    }


def decoded_how(config: DecodeConfig) -> dict[str, str]:
    """What a score must say of the decoding: word list open or closed, and the search."""
    search = "greedy" if config.beam == 1 else f"beam {config.beam}"
    return {
        "word_list": "closed" if config.word_list else "open",
        "decode": f"word list, {_listed_by(config)}" if config.word_list else f"{config.mode} {search}",
    }


def _listed_by(config: DecodeConfig) -> str:
    """Which heads choose among listed words: one that a recogniser does not have counts nothing."""
    return {0.0: "attention decoder", 1.0: "CTC head"}.get(config.ctc_weight, "both heads")


def share_seen(tested: Set[Hashable], heard: Set[Hashable]) -> str:
    """Whether training has heard all, some or none of the tested speakers (or words)."""
    if tested <= heard:
        return "seen"
    return "mixed" if tested & heard else "unseen"
