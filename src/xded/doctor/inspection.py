"""What happened in a run, as numbers: its curves, and what its model makes of a recording."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xded.checks.training import events, number
from xded.config import LOSS_PARTS, Config, FeatureConfig, ObjectiveConfig
from xded.corpus.manifest import Corpus, Recording
from xded.decoding import decode_encoded
from xded.doctor.runs import batches_per_epoch
from xded.errors import ConfigError, CorpusError
from xded.features import LogMel, hertz_to_mel, mel_to_hertz
from xded.models.cross_attention import cross_attention
from xded.models.recogniser import Recogniser
from xded.models.student import decoder_input
from xded.targets.aggregate import dense
from xded.targets.store import Store, TargetError, audio_hash
from xded.tokenizer import Tokenizer
from xded.training.data import compute_features
from xded.training.schedule import Schedule

NEAR_IDS = 3
APPLIED = ("lr", "gradient_norm")
VALIDATED = ("val_loss", "wra", "empty", "distinct", "teacher_forced")
NETWORK = ("subsampling", "encoder", "ctc_head", "embedding", "decoder", "decoder_norm", "decoder_head")


@dataclass(frozen=True)
class Attention:
    """Where the decoder looks while it writes a text.

    Attributes:
        what: "true text" (teacher-forced) or "free-running output".
        pieces: what each step writes, the end of the text included, U.
        weights: [layers, U, T'], mean over heads; the weights of a step sum to 1.
        frame_s: seconds from one encoded frame to the next.
    """

    what: str
    pieces: tuple[str, ...]
    weights: np.ndarray
    frame_s: float

    @property
    def centres_s(self) -> np.ndarray:
        """Mean time that each layer looks at in each step: [layers, U]."""
        return self.weights @ (np.arange(self.weights.shape[2]) * self.frame_s)

    def numbers(self) -> dict[str, Any]:
        """Where every layer looks, first to last step, and how often a step looks later than the one before."""
        centres = self.centres_s
        forward = np.diff(centres, axis=1) > 0
        layers = [
            {
                "from_s": round(float(row[0]), 3),
                "to_s": round(float(row[-1]), 3),
                "steps_forward": int(moves.sum()),
                "steps": len(moves),
            }
            for row, moves in zip(centres, forward, strict=True)
        ]
        return {"what": self.what, "pieces": list(self.pieces), "layers": layers}


@dataclass(frozen=True)
class Spike:
    """A piece that a CTC head writes, where it is most certain of it."""

    frame: int
    token: int
    piece: str
    time_s: float
    probability: float


@dataclass(frozen=True)
class CtcPosterior:
    """What one CTC head says over time.

    Attributes:
        who: "student", "target", "teacher M08".
        text: its most probable path as text.
        temperature: T of the softmax.
        probabilities: [T', V].
        frame_s: seconds from one frame to the next.
        spikes: pieces of the most probable path.
        blank: probability of the blank, [T'].
    """

    who: str
    text: str
    temperature: float
    probabilities: np.ndarray
    frame_s: float
    spikes: tuple[Spike, ...]
    blank: np.ndarray

    def numbers(self) -> dict[str, Any]:
        """What it reads, where its spikes are, and how much of the time it says blank."""
        spikes = [
            {"piece": s.piece, "time_s": round(s.time_s, 3), "probability": round(s.probability, 3)}
            for s in self.spikes
        ]
        blank = round(float(self.blank.mean()), 3)
        return {"who": self.who, "reads": self.text, "temperature": self.temperature, "blank": blank, "spikes": spikes}


@dataclass(frozen=True)
class Inspected:
    """One recording, as the model hears it and what it says.

    Attributes:
        model: who listened: name, checkpoint, epoch.
        features: [T, mels] as the encoder gets them; hop_s: seconds between them; band_hz: centre of each mel band.
        ctc_text, decoder_text: greedy outputs of both heads.
        notes: what could not be shown and what to mind.
    """

    recording: Recording
    model: str
    features: np.ndarray
    hop_s: float
    band_hz: np.ndarray
    ctc_text: str
    decoder_text: str
    attention: tuple[Attention, ...]
    ctc: tuple[CtcPosterior, ...]
    notes: tuple[str, ...]

    def numbers(self) -> dict[str, Any]:
        """Everything that fits into a few lines of JSON."""
        return {
            "recording": self.recording.recording,
            "model": self.model,
            "speaker": self.recording.speaker,
            "text": self.recording.text,
            "duration_s": self.recording.duration,
            "ctc_output": self.ctc_text,
            "decoder_output": self.decoder_text,
            "attention": [a.numbers() for a in self.attention],
            "ctc": [c.numbers() for c in self.ctc],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Teaching:
    """CTC posteriors that a run learned from: the target and each teacher, by what to call them.

    `notes` says what is missing.
    """

    stores: dict[str, Store]
    notes: tuple[str, ...] = ()


def find_recordings(corpus: Corpus, ids: Iterable[str]) -> list[Recording]:
    """The recordings of these ids, in the order given.

    Raises:
        CorpusError: an id that the corpus does not have, with the nearest ones.
    """
    known = {r.recording: r for r in corpus.recordings}
    found = []
    for name in ids:
        if name not in known:
            near = difflib.get_close_matches(name, known, NEAR_IDS, cutoff=0.4) or list(known)[:NEAR_IDS]
            listed = ", ".join(f"'{other}'" for other in near)
            raise CorpusError(
                f"{corpus.path} has no recording '{name}'; the nearest are {listed}.",
                "Give an id that stands as 'recording' in the manifest.",
            )
        found.append(known[name])
    return found


def open_teaching(recogniser: Recogniser, given: Path | None) -> Teaching:
    """Opens the CTC posteriors beside a run.

    Args:
        recogniser: of the run; its config names the folder of targets.
        given: another folder, which must be there.

    Raises:
        ConfigError: `given` is no folder of `xded targets`.
    """
    folder = given or recogniser.config.targets
    if folder is None:
        return Teaching({}, ("The run has no targets: only the student is shown.",))
    folders = {"target": folder / "ctc"}
    folders |= {f"teacher {path.parent.name}": path for path in sorted(folder.glob("posteriors/*/ctc"))}
    there = {who: path for who, path in folders.items() if (path / "index.json").is_file()}
    if not there:
        missing = f"{folder} holds no CTC posteriors of 'xded targets'"
        if given is not None:
            raise ConfigError(f"{missing}.", "Give the folder that was named with --out there.")
        return Teaching({}, (f"{missing}: only the student is shown. Where are they? --targets DIR.",))
    stores, notes = {}, []
    for who, path in there.items():
        try:
            store = Store(path)
        except TargetError as error:
            notes.append(str(error))
            continue
        if store.index.tokenizer == recogniser.tokenizer.fingerprint:
            stores[who] = store
        else:
            notes.append(f"{path} was made with another tokenizer: {who} is not shown.")
    return Teaching(stores, tuple(notes))


@torch.inference_mode()
def inspect_recording(recogniser: Recogniser, recording: Recording, teaching: Teaching) -> Inspected:
    """Lets a model hear one recording and keeps what happens inside.

    Raises:
        CorpusError: the audio cannot be read. TokenizerError: a text that the tokenizer cannot write.
        ConfigError: a recogniser without one of the two heads, or that does not hear log-mel features.
    """
    student, tokenizer, config = recogniser.student, recogniser.tokenizer, recogniser.config
    if not (isinstance(student.front_end, LogMel) and student.has_ctc and student.has_decoder):
        raise ConfigError(
            f"{recogniser.path} cannot be drawn: pictures need a log-mel front end, a CTC head and a decoder.",
            "Give a run of a Conformer student with a decoder.",
        )
    tokenizer.self_test([recording.text])
    features = compute_features(recording.audio_filepath, student.front_end)
    heard = torch.from_numpy(features)[None].to(next(student.parameters()).device)
    lengths = torch.tensor([len(features)], device=heard.device)
    encoded, encoded_lengths = student.encode(heard, lengths)
    greedy = config.decode.model_copy(update={"beam": 1, "word_list": False})
    written = {
        head: decode_encoded(student, encoded, encoded_lengths, greedy.model_copy(update={"mode": head}), tokenizer)[0]
        for head in ("ctc", "decoder")
    }
    texts = {"true text": tokenizer.encode(recording.text)}
    if list(written["decoder"].tokens) != texts["true text"]:
        texts["free-running output"] = list(written["decoder"].tokens)
    frame_s = 1.0 / student.frame_rate_hz
    attention = [_attention(recogniser, what, heard, lengths, tokens, frame_s) for what, tokens in texts.items()]
    logits = student.ctc_logits(encoded)[0, : int(encoded_lengths[0])].double().cpu()
    taught, notes = _taught(recogniser, recording, teaching)
    own = [
        _posterior(tokenizer, "student", temperature, torch.softmax(logits / temperature, 1).numpy(), frame_s)
        for temperature in sorted({1.0, *(posterior.temperature for posterior in taught)})
    ]
    return Inspected(
        recording=recording,
        model=f"{recogniser.name}, {recogniser.path.name}, epoch {recogniser.epoch}",
        features=features,
        hop_s=config.features.hop_s,
        band_hz=band_centres_hz(config.features),
        ctc_text=written["ctc"].text,
        decoder_text=written["decoder"].text,
        attention=tuple(attention),
        ctc=(*own, *taught),
        notes=(_heard_by(recogniser, recording), *_untrained(config.objective), *notes),
    )


def band_centres_hz(config: FeatureConfig) -> np.ndarray:
    """Centre of each mel band: [mels]."""
    top = float(hertz_to_mel(np.array(config.sample_rate / 2)))
    return mel_to_hertz(np.linspace(0.0, top, config.mels + 2)[1:-1])


def _attention(
    recogniser: Recogniser, what: str, features: Tensor, lengths: Tensor, tokens: list[int], frame_s: float
) -> Attention:
    tokenizer = recogniser.tokenizer
    written = torch.tensor([[*tokens, tokenizer.eos]], device=features.device)
    seen = decoder_input(written, tokenizer.bos)
    weights = cross_attention(recogniser.student, features, lengths, seen).mean(1).double().cpu().numpy()
    return Attention(what, tuple(tokenizer.pieces[i] for i in written[0].tolist()), weights, frame_s)


def _posterior(
    tokenizer: Tokenizer, who: str, temperature: float, probabilities: np.ndarray, frame_s: float
) -> CtcPosterior:
    """Adds the most probable path: its spikes and its text."""
    path = probabilities.argmax(1).tolist()
    spikes = []
    for token, places in groupby(range(len(path)), key=lambda frame: path[frame]):
        if token != tokenizer.blank:
            frame = max(places, key=lambda frame: probabilities[frame, token])
            certain = float(probabilities[frame, token])
            spikes.append(Spike(frame, token, tokenizer.pieces[token], frame * frame_s, certain))
    text = tokenizer.decode(spike.token for spike in spikes)
    blank = probabilities[:, tokenizer.blank]
    return CtcPosterior(who, text, temperature, probabilities, frame_s, tuple(spikes), blank)


def _taught(recogniser: Recogniser, recording: Recording, teaching: Teaching) -> tuple[list[CtcPosterior], list[str]]:
    """What target and teachers say about a recording, and why some say nothing."""
    posteriors, notes, silent = [], list(teaching.notes), []
    for who, store in teaching.stores.items():
        if recording.recording not in store:
            silent.append(who)
            continue
        index = store.index
        if store.entry(recording.recording).audio_sha256 != audio_hash(recording):
            notes.append(f"{who} describes other audio than this recording's (another SHA-256).")
        try:
            said = dense(store.read(recording.recording), index.vocabulary)
        except TargetError as error:
            notes.append(str(error))
            continue
        frame_s = 1.0 / (index.frame_rate_hz or recogniser.student.frame_rate_hz)
        posteriors.append(_posterior(recogniser.tokenizer, who, index.temperature, said, frame_s))
    if silent:
        notes.append(
            f"{', '.join(silent)} {'say' if len(silent) > 1 else 'says'} nothing about this recording: targets are "
            "made of training recordings only."
        )
    return posteriors, notes


def _heard_by(recogniser: Recogniser, recording: Recording) -> str:
    """Whether the model or its teachers have heard the take or the speaker: what the pictures then mean."""
    take = [p.what for p in recogniser.provenance if recording.take in p.takes]
    if take:
        return f"This take was heard by: {', '.join(dict.fromkeys(take))}."
    known = any(recording.speaker in p.speakers for p in recogniser.provenance)
    others = "were heard" if known else "were not heard either"
    return f"Nobody has heard this take; other takes of speaker {recording.speaker} {others}."


def _untrained(objective: ObjectiveConfig) -> list[str]:
    notes = []
    if "ctc" not in objective.heads:
        notes.append("This run did not train the CTC head (ctc, ctc_kd, word_kd and text_kd have no weight).")
    if "decoder" not in objective.heads:
        notes.append("This run did not train the decoder (cross_entropy and decoder_kd have no weight).")
    return notes


@dataclass(frozen=True)
class Planned:
    """The learning rate that the config's schedule gives: [N] updates (from 1) and rates."""

    updates: np.ndarray
    rates: np.ndarray


@dataclass(frozen=True)
class Curves:
    """A run's metrics as arrays; NaN where a row lacks a number.

    Attributes:
        update: [N], of the logged steps; step: [N] each: loss, lr, gradient_norm, stage and the parts of the loss.
        epoch: [E]; validated: [E] each: train_loss, val_loss, wra, empty, distinct, teacher_forced, references ...
        gradient_update: [M]; groups: G names; norms: [M, G]; blank, rows: [M], of the CTC head's weights.
        resumed: updates after which the run was started again.
        planned: none where the schedule cannot be known.
    """

    update: np.ndarray
    step: dict[str, np.ndarray]
    epoch: np.ndarray
    validated: dict[str, np.ndarray]
    gradient_update: np.ndarray
    groups: tuple[str, ...]
    norms: np.ndarray
    blank: np.ndarray
    rows: np.ndarray
    resumed: tuple[int, ...]
    planned: Planned | None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts of the loss that were logged."""
        return tuple(name for name in LOSS_PARTS if name in self.step)

    def numbers(self) -> dict[str, Any]:
        """First, last, smallest and largest of what matters."""
        return {
            "updates": int(self.update[-1]) if len(self.update) else 0,
            **{name: first_last(self.step[name]) for name in ("loss", *self.parts, *APPLIED) if name in self.step},
            **{name: first_last(self.validated[name]) for name in VALIDATED if name in self.validated},
            "learning_rate_off_plan": rate_error(self),
            "gradients": {name: first_last(column) for name, column in zip(self.groups, self.norms.T, strict=True)},
        }


def curves_of(rows: Sequence[Mapping[str, Any]], config: Config | None) -> Curves:
    """Metrics rows of a run as arrays; rows of older runs have less in them.

    Args:
        rows: of metrics.jsonl.
        config: of the run, where it could be read.
    """
    steps, epochs, gradients = (
        events(rows, "step", "update"),
        events(rows, "epoch", "epoch"),
        events(rows, "gradients", "update"),
    )
    logged = [row["norms"] if isinstance(row.get("norms"), Mapping) else {} for row in gradients]
    groups = sorted({name for norms in logged for name in norms}, key=_place_in_network)
    return Curves(
        update=_column(steps, "update"),
        step=_columns(steps),
        epoch=_column(epochs, "epoch"),
        validated=_columns(epochs),
        gradient_update=_column(gradients, "update"),
        groups=tuple(groups),
        norms=np.array([_column(logged, name) for name in groups]).reshape(len(groups), len(logged)).T,
        blank=_column(gradients, "blank"),
        rows=_column(gradients, "rows"),
        resumed=tuple(int(row["update"]) for row in events(rows, "start", "update") if row.get("resumed")),
        planned=_planned(rows, config),
    )


def first_last(values: np.ndarray) -> dict[str, float] | None:
    """First, last, least and most of the finite values; none without any."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    named = {"first": finite[0], "last": finite[-1], "least": finite.min(), "most": finite.max()}
    return {name: float(f"{value:.4g}") for name, value in named.items()}


def rate_error(curves: Curves) -> float | None:
    """Largest difference between the learning rate applied and the planned one, as a share of the planned one."""
    if curves.planned is None or "lr" not in curves.step:
        return None
    planned = np.interp(curves.update, curves.planned.updates, curves.planned.rates)
    off = np.abs(curves.step["lr"] / planned - 1.0)
    return float(f"{off[np.isfinite(off)].max(initial=0.0):.4g}")


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    return np.array([number(row, key) for row in rows], dtype=float)


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    names = dict.fromkeys(key for row in rows for key in row if number(row, key) is not None)
    return {name: _column(rows, name) for name in names}


def _place_in_network(group: str) -> tuple[int, int]:
    """From the audio to the outputs; layers by number."""
    name, _, layer = group.partition(".")
    return (NETWORK.index(name) if name in NETWORK else len(NETWORK), int(layer) if layer.isdigit() else 0)


def _planned(rows: Sequence[Mapping[str, Any]], config: Config | None) -> Planned | None:
    """The schedule of a run, with the number of batches in an epoch worked out from its rows."""
    sizes = batches_per_epoch(rows, config.train.accumulate) if config else []
    if config is None or not sizes:
        return None
    schedule = Schedule.of(config.train, config.stages_run, sizes[-1])
    updates = np.arange(1, schedule.updates + 1)
    return Planned(updates, np.array([schedule.learning_rate(int(update) - 1) for update in updates]))
