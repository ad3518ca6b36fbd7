"""Posteriors of made-up teachers that know every word, and their mean: no training, all numbers as after it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torch.nn.functional as F

from xded.checks import teachers as spelling
from xded.corpus.folds import Provenance
from xded.corpus.manifest import Corpus, Recording, read_corpus, write_manifest
from xded.findings import Finding
from xded.models.checkpoints import sha256_of
from xded.targets.aggregate import combine, top_k
from xded.targets.store import Entry, Index, Kind, Posterior, StoreWriter
from xded.tokenizer import Tokenizer

WORDS = ("BAD", "CAB", "FACE", "DIG", "GLAD", "HIKE", "JOLT", "KIND", "LAMB", "MOP", "NICE", "POND")
TEACHERS = ("T1", "T2", "T3")
KINDS: tuple[Kind, ...] = ("ctc", "decoder")
RATE_HZ, SAMPLE_RATE, TEMPERATURE, KEPT = 25.0, 16_000, 2.0, 8
WHERE = "targets of the test"
TOKENIZER = Tokenizer.train(WORDS, "char", 64, "upper")

Said = dict[str, Posterior]


@dataclass
class Made:
    """What `xded targets` would have written: by kind, then by teacher, then by recording."""

    recordings: list[Recording]
    said: dict[Kind, dict[str, Said]]
    noted: dict[Kind, dict[str, dict[str, float]]]
    averages: dict[Kind, Said] = field(default_factory=dict)

    @property
    def texts(self) -> dict[str, str]:
        return {r.recording: r.text for r in self.recordings}

    @property
    def tokens(self) -> dict[str, list[int]]:
        return {r.recording: TOKENIZER.encode(r.text) for r in self.recordings}

    def index(self, kind: Kind, teacher: str | None = None, **fields: Any) -> Index:
        """Index of one teacher's posteriors, or of the mean."""
        names = TEACHERS if teacher is None else (teacher,)
        rows = self.averages[kind] if teacher is None else self.said[kind][teacher]
        weight = dict.fromkeys(TEACHERS, 1.0) if teacher is None else {}
        hashes = {r.recording: str(r.audio_sha256) for r in self.recordings}
        noted: Mapping[str, float] = self.noted[kind][teacher] if teacher else {}
        known: dict[str, Any] = {
            "kind": kind, "temperature": TEMPERATURE, "top_k": KEPT, "vocabulary": TOKENIZER.size,
            "frame_rate_hz": RATE_HZ if kind == "ctc" else None, "teacher_forced": kind == "decoder",
            "tokenizer": TOKENIZER.fingerprint, "teachers": names,
            "teacher_hashes": {name: f"{int(name[1:]):064x}" for name in names},
            "aggregation": None if teacher else "logprob_mean", "weighting": None if teacher else "uniform",
            "provenance": (Provenance("parent", frozenset(TEACHERS)),),
            "recordings": tuple(Entry(n, hashes[n], len(p.ids), weight, noted.get(n)) for n, p in rows.items()),
        }  # fmt: skip
        return Index(**{**known, **fields})

    def indexes(self, **fields: Any) -> dict[str, Index]:
        """All indexes by name."""
        means: dict[str, Index] = {kind: self.index(kind, **fields) for kind in KINDS}
        return means | {f"posteriors/{t}/{k}": self.index(k, t, **fields) for k in KINDS for t in TEACHERS}

    def average(self) -> Made:
        """The same with new averages."""
        for kind in KINDS:
            teachers = self.said[kind]
            self.averages[kind] = {
                name: top_k(
                    combine([teachers[t][name] for t in teachers], [1] * len(teachers), "logprob_mean", TOKENIZER.size),
                    KEPT,
                    np.min([teachers[t][name].least_blank for t in teachers], axis=0),
                )
                for name in teachers[TEACHERS[0]]
            }
        return self

    def write(self, folder: Path, **fields: Any) -> Path:
        """All stores and the tokenizer, as `xded targets` lays them out; `fields` go into every index."""
        for kind in KINDS:
            self.write_one(folder / kind, self.averages[kind], self.index(kind, **fields))
            for teacher in TEACHERS:
                path = folder / "posteriors" / teacher / kind
                self.write_one(path, self.said[kind][teacher], self.index(kind, teacher, **fields))
        (folder / "tokenizer.model").write_bytes(TOKENIZER.model_bytes)
        return folder

    @staticmethod
    def write_one(folder: Path, said: Said, index: Index) -> None:
        writer = StoreWriter(folder, index.model_copy(update={"recordings": ()}))
        for entry in index.recordings:
            writer.add(entry, said[entry.recording])
        writer.close()


def make(seed: int = 0, recordings: Sequence[Recording] = (), lags: Mapping[str, int] | None = None) -> Made:
    """Posteriors of three teachers; `lags` moves a teacher's spikes by frames."""
    rows = list(recordings) or [
        made_up(f"{t}_{word}_{take}", t, word, 1.0 + 0.1 * ((5 * i + take) % 10))
        for t in TEACHERS for i, word in enumerate(WORDS) for take in (1, 2)
    ]  # fmt: skip
    made = Made(rows, {kind: {} for kind in KINDS}, {kind: {} for kind in KINDS})
    for number, teacher in enumerate(TEACHERS):
        random = np.random.default_rng([seed, number])
        for kind in KINDS:
            made.said[kind][teacher], made.noted[kind][teacher] = {}, {}
        for recording in rows:
            tokens = TOKENIZER.encode(recording.text)
            frames = round(recording.duration * RATE_HZ)
            ctc = ctc_logits(tokens, frames, random, (lags or {}).get(teacher, 0))
            decoder = decoder_logits(tokens, random)
            both: dict[Kind, np.ndarray] = {"ctc": ctc, "decoder": decoder}
            for kind, logits in both.items():
                posterior, log_prob = softened(logits, tokens, kind)
                made.said[kind][teacher][recording.recording] = posterior
                made.noted[kind][teacher][recording.recording] = log_prob
    return made.average()


def made_up(name: str, speaker: str, word: str, duration_s: float) -> Recording:
    """A recording whose file does not exist."""
    row = {"audio_filepath": f"{name}.wav", "duration": duration_s, "text": word, "recording": name, "prompt": word}
    digest = name.encode().hex().ljust(64, "0")[:64]
    return Recording.model_validate({**row, "speaker": speaker, "take": name, "audio_sha256": digest})


def ctc_logits(tokens: Sequence[int], frames: int, random: np.random.Generator, lag: int) -> np.ndarray:
    """[T, V]: a spike a token with an unsure frame on each side, blank elsewhere."""
    logits = random.normal(0.0, 0.7, (frames, TOKENIZER.size))
    logits[:, TOKENIZER.blank] += 7.0
    places = 4 + np.round((frames - 12) * np.arange(len(tokens)) / len(tokens)).astype(int) + lag
    for place, token in zip(places, tokens, strict=True):
        logits[place - 1 : place + 2, TOKENIZER.blank] -= [2.0, 6.0, 2.0]
        logits[place - 1 : place + 2, token] += [3.5, 7.0, 3.5]
    return logits


def decoder_logits(tokens: Sequence[int], random: np.random.Generator) -> np.ndarray:
    """[U + 1, V]."""
    logits = random.normal(0.0, 0.7, (len(tokens) + 1, TOKENIZER.size))
    logits[np.arange(len(tokens) + 1), [*tokens, TOKENIZER.eos]] += 7.0
    return logits


def softened(logits: np.ndarray, tokens: Sequence[int], kind: Kind) -> tuple[Posterior, float]:
    """The posterior at `TEMPERATURE` as it is stored, and the true text's log-probability a token at T = 1."""
    soft = F.softmax(torch.from_numpy(logits) / TEMPERATURE, dim=1).numpy().astype(np.float32)
    log_probs = F.log_softmax(torch.from_numpy(logits), dim=1)
    steps = torch.tensor([*tokens, TOKENIZER.eos])
    if kind == "decoder":
        return top_k(soft, KEPT, np.zeros(len(soft), np.float32)), float(log_probs[range(len(steps)), steps].mean())
    blank = log_probs[:, TOKENIZER.blank].exp().numpy().astype(np.float32)
    lengths = torch.tensor([len(soft)]), torch.tensor([len(tokens)])
    loss = F.ctc_loss(log_probs[:, None], steps[None, :-1], *lengths, blank=TOKENIZER.blank)
    return top_k(soft, KEPT, blank), -float(loss)


def permuted(said: Said, seed: int = 0) -> Said:
    """Every posterior under another recording's name."""
    names = list(said)
    order = np.random.default_rng(seed).permutation(len(names))
    return {name: said[names[i]] for name, i in zip(names, order, strict=True)}


def shifted(said: Said, by: int) -> Said:
    """All token ids off by some."""
    return {n: replace(p, ids=(p.ids + by) % TOKENIZER.size) for n, p in said.items()}


def write_corpus(folder: Path) -> Corpus:
    """A corpus with (silent) files of the lengths that `make` gives its recordings."""
    rows: list[Recording] = []
    for recording in make().recordings:
        path = folder / f"{recording.recording}.wav"
        folder.mkdir(parents=True, exist_ok=True)
        sound = np.random.default_rng(len(rows)).normal(0, 0.01, round(recording.duration * SAMPLE_RATE))
        soundfile.write(path, sound, SAMPLE_RATE, subtype="PCM_16")
        rows.append(recording.model_copy(update={"audio_filepath": path, "audio_sha256": sha256_of(path)}))
    write_manifest(folder / "manifest.jsonl", rows)
    return read_corpus(folder)


def only(findings: list[Finding], check: str, severity: str) -> Finding:
    """The one finding, of this check and severity; its evidence can be written as JSON."""
    assert [(f.check, f.severity) for f in findings] == [(check, severity)]
    json.dumps(findings[0].evidence)
    return findings[0]


def spelled(made: Made, kind: Kind = "ctc") -> dict[str, dict[str, spelling.Spikes]]:
    return {
        t: {n: spelling.spikes_of(p, TOKENIZER.blank) for n, p in rows.items()} for t, rows in made.said[kind].items()
    }


def averages(made: Made) -> dict[str, spelling.Spikes]:
    return {name: spelling.spikes_of(p, TOKENIZER.blank) for name, p in made.averages["ctc"].items()}
