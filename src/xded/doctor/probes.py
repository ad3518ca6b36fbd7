"""Active probes: what only running the model shows. `xded doctor RUN --probe`.

Every probe goes through the code that trains, decodes and tests: `loss_parts`, `collate`, `decode`, `recognise`, `fit`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xded.checks.attention import attention
from xded.checks.training import heads_of, trained_heads
from xded.config import Config
from xded.corpus.folds import make_fold
from xded.corpus.manifest import Corpus, Recording
from xded.decoding import word_list_scores
from xded.doctor.probe_training import (
    EIGHT,
    FEWEST_TAKES,
    HUGE,
    LARGE,
    RARE,
    TAKES_OF_WORD,
    WORDS,
    Bench,
    above_chance,
    count_right,
    most_common_share,
    overfit,
    shuffled_labels,
    too_large,
    usable,
)
from xded.errors import ConfigError, CorpusError, XdedError
from xded.findings import Examination, Finding
from xded.models.cross_attention import cross_attention
from xded.models.recogniser import Recogniser
from xded.models.student import Student, decoder_input
from xded.objectives import TopK
from xded.targets.store import Store
from xded.teachers.adapt import parts_of
from xded.teachers.posteriors import extract
from xded.training.data import Batch, collate
from xded.training.evaluation import recognise
from xded.training.losses import loss_parts

SAMPLE = 12  # recordings of a probe of invariance
TAKES = 100  # of the control with other audio; for a large model
TAKES_LARGE = 30
ATTENDED = 24
DISTILLED = ("ctc_kd", "decoder_kd", "word_kd")  # 0 where teacher and student are the same
# those that need nothing but the model itself, and have a size of their own: speakers who agree leave none
LOSSES = ("ctc", "cross_entropy", *DISTILLED, "text_kd")
PARTS = ("encoder", "CTC head", "decoder")

# Healthy models (12 recordings, 4 corpora): outputs differ by 1.5e-6 of their standard deviation, losses by 5e-6.
TOLERANCE = 1e-4
LARGE_CHANGE = 0.1  # of the outputs' standard deviation, or of a loss
LEAST_LOSS = 1e-3  # nats; a smaller loss has no relative change worth the name
# Teacher = student: KD losses of 1e-7 nats and gradients of 4e-4 remain, from 16-bit storage.
SELF_LOSS = 1e-4  # of the loss of a student that disagrees
SELF_GRADIENT = 1e-2
STUBBORN = 10.0  # logit of the one piece that the disagreeing student says
LEAST_BLANK_GRADIENT = 1e-6  # of that student's gradient, where the teacher's blanks contradict it

EXTRA_FRAMES = 64  # feature frames of padding: 16 encoded ones
EXTRA_TOKENS = 3
NEAR_TIES = 1  # outputs of a batch that may differ by rounding
ANY_SIZE = 10**12  # parameters

OWN_CODE = "Every result depends on it: find the change with the tests ('make test') before training again."


def examine_probes(
    examination: Examination,
    recogniser: Recogniser,
    corpus: Corpus,
    config: Config,
    *,
    seed: int = 0,
    only: Collection[str] | None = None,
) -> None:
    """Runs every probe on a checkpoint and the corpus of its run.

    Args:
        examination: findings go there.
        recogniser: the checkpoint, on the CPU; corpus: of its run; config: of its run.
        seed: of the recordings that are drawn, and of the short trainings.
        only: names of `PROBES` (default: all).
    """
    where = str(recogniser.path)
    if not all(value.isfinite().all() for value in recogniser.student.state_dict().values()):
        examination.cannot(f"active probes of {where}", "its weights are not finite.")
        return
    try:
        parts = parts_of(corpus, make_fold(corpus, config.fold), config)
    except XdedError as error:
        examination.cannot(f"active probes of {where}", str(error))
        return
    train = usable(parts.train, recogniser, seed)
    test = usable(parts.test or parts.validation, recogniser, seed) or train
    if len(train) < SAMPLE:
        examination.cannot(f"active probes of {where}", f"only {len(train)} of its training takes can be used.")
        return
    with tempfile.TemporaryDirectory(prefix="xded-probes-") as folder:
        bench = Bench(recogniser, config, train, test, seed, Path(folder))
        for check, probe in PROBES.items():
            if only is not None and check not in only:
                continue
            if too_large(bench, probe.most_parameters):
                size = f"{bench.parameters / 1e6:.0f} M parameters"
                examination.cannot(f"probe '{check}' of {where}", f"training {size} on a processor takes too long.")
                continue
            examination.run(check, where, partial(probe.find, bench), probe.on)


# --- invariances --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rig:
    """A batch with targets of the model itself, and the settings that use every part of the loss."""

    rows: list[dict[str, Any]]
    settings: Config
    batch: Batch


def rig_of(bench: Bench) -> Rig:
    """Extracts the recogniser's own posteriors (once) and reads them back as its targets."""
    recogniser, config = bench.recogniser, bench.config
    every_part = dict.fromkeys(LOSSES, 1.0)
    # a threshold above 1 drops no frame: all of them are compared
    objective = config.objective.supervised.model_copy(update={**every_part, "blank_threshold": 2.0})
    settings = config.model_copy(update={"objective": objective})
    recordings, folder = bench.train[:SAMPLE], bench.folder / "itself"
    extract(recogniser.path, "itself", recordings, settings, folder, sorted({r.text for r in recordings}))
    student = recogniser.student
    data = bench.serve(recordings)
    data.ctc_targets, data.decoder_targets = Store(folder / "ctc"), Store(folder / "decoder")
    data.word_targets, data.text_targets = Store(folder / "words"), data.ctc_targets
    data.frame_rate_hz, data.reduce = student.frame_rate_hz, student.encoder.reduce
    rows = [data[(0, i)] for i in range(len(data))]
    return Rig(rows, settings, collate(rows, recogniser.tokenizer.eos))


def self_distillation(bench: Bench) -> list[Finding]:
    """Teacher = student: no loss and no gradient; a student that says something else has both, at the blank too."""
    rig, student = rig_of(bench), copy.deepcopy(bench.recogniser.student).eval()
    tokenizer = bench.recogniser.tokenizer
    same = _kd(student, rig, bench)
    piece = next(i for i in range(tokenizer.size) if i not in (*tokenizer.unwritten, tokenizer.eos))
    for head in (student.ctc_head, student.decoder_head):
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        head.bias.data[piece] = STUBBORN
    other = _kd(student, rig, bench)
    evidence = {"same": same, "other": other, "temperature": rig.settings.objective.temperature}
    problems = []
    for name in DISTILLED:
        loss, gradient = same[name], same[f"{name}_gradient"]
        if not abs(loss) <= SELF_LOSS * other[name] or not gradient <= SELF_GRADIENT * other[f"{name}_gradient"]:
            problems.append(
                f"{name} is {loss:.2g} nats with a gradient of {gradient:.2g} where teacher and student are the same "
                f"(where they disagree: {other[name]:.2g} and {other[f'{name}_gradient']:.2g})"
            )
    if not other["ctc_kd_blank_gradient"] > LEAST_BLANK_GRADIENT:
        problems.append("ctc_kd gives the blank no gradient: no frame learns to be blank")
    if not problems:
        return []
    return [
        Finding(
            "self-distillation", "refuse", bench.subject, f"{'; '.join(problems)}.",
            "Distillation pulls the student away from what its teachers say.",
            f"Compare temperature, tokens, frames and time steps of targets and loss. {OWN_CODE}",
            evidence, points=50.0,
        )
    ]  # fmt: skip


def _kd(student: Student, rig: Rig, bench: Bench) -> dict[str, float]:
    """KD losses, the norms of their gradients, and that of ctc_kd at the CTC head's blank."""
    measured: dict[str, float] = {}
    for name in DISTILLED:
        student.zero_grad()
        loss = loss_parts(student, rig.batch, rig.settings, bench.recogniser.tokenizer)[name]
        loss.backward()
        squares = [float(p.grad.square().sum()) for p in student.parameters() if p.grad is not None]
        measured[name], measured[f"{name}_gradient"] = float(loss.detach()), sum(squares) ** 0.5
        if name == "ctc_kd":
            assert student.ctc_head.bias.grad is not None
            blank = student.ctc_head.bias.grad[bench.recogniser.tokenizer.blank]
            measured["ctc_kd_blank_gradient"] = float(blank.abs())
    return measured


def padding(bench: Bench) -> list[Finding]:
    """More padding, of frames and of tokens, changes no output and no loss."""
    rig = rig_of(bench)
    batch, eos = rig.batch, bench.recogniser.tokenizer.eos
    assert batch.features is not None
    assert batch.least_blank is not None
    encoded_extra = EXTRA_FRAMES // 4
    wider = replace(
        batch,
        features=F.pad(batch.features, (0, 0, 0, EXTRA_FRAMES)),
        tokens=F.pad(batch.tokens, (0, EXTRA_TOKENS), value=eos),
        ctc_target=_wider(batch.ctc_target, encoded_extra),
        least_blank=F.pad(batch.least_blank, (0, encoded_extra)),
        decoder_target=_wider(batch.decoder_target, EXTRA_TOKENS),
    )
    how = f"{EXTRA_FRAMES} frames and {EXTRA_TOKENS} tokens of padding"
    return _unchanged("padding", bench, rig, wider, list(range(len(rig.rows))), how)


def _wider(target: TopK | None, steps: int) -> TopK:
    assert target is not None
    ids, probabilities = (F.pad(values, (0, 0, 0, steps)) for values in (target.ids, target.probabilities))
    return TopK(ids, probabilities, F.pad(target.rest, (0, steps)))


def batch_order(bench: Bench) -> list[Finding]:
    """Recordings in another order: the same outputs in that order, and the same loss."""
    rig = rig_of(bench)
    order = list(reversed(range(len(rig.rows))))
    turned = collate([rig.rows[i] for i in order], bench.recogniser.tokenizer.eos)
    return _unchanged("batch-order", bench, rig, turned, order, "another order of the batch")


def _unchanged(check: str, bench: Bench, rig: Rig, changed: Batch, order: Sequence[int], how: str) -> list[Finding]:
    """Compares a batch with one in which row `i` is its row `order[i]`: outputs in eval mode, losses in training."""
    before, after = _outputs(bench, rig.batch), _outputs(bench, changed)
    differences: dict[str, float] = {}
    for part, one, other in zip(PARTS, before, after, strict=True):
        worst = max(_difference(one[row], values) for values, row in zip(other, order, strict=True))
        differences[part] = worst / max(1e-9, float(torch.cat([values.flatten() for values in one]).std()))
    losses_before, losses_after = (_losses(bench, rig.settings, batch) for batch in (rig.batch, changed))
    for name in LOSSES:
        change = abs(losses_after[name] - losses_before[name])
        differences[name] = change / max(LEAST_LOSS, abs(losses_before[name]))
    wrong = {name: value for name, value in differences.items() if not value <= TOLERANCE}
    if not wrong:
        return []
    first, largest = next(iter(wrong)), max(wrong.values())
    listed = ", ".join(f"{name} {100 * value:.2g} %" for name, value in wrong.items())
    return [
        Finding(
            check, "warn" if largest < LARGE_CHANGE else "refuse", bench.subject,
            f"{how[0].upper()}{how[1:]} changes, first, the {first.replace('_', ' ')}: {listed} of their own size "
            f"(rounding: {100 * TOLERANCE:g} %).",
            "What is heard depends on which recordings happen to share a batch.",
            f"Look for a mask or a length that is not passed on in the part that changes first. {OWN_CODE}",
            {"relative_change": differences, "recordings": len(rig.rows)},
            points=10.0 if largest < LARGE_CHANGE else 100.0,
        )
    ]  # fmt: skip


def _difference(one: Tensor, other: Tensor) -> float:
    """Largest difference; infinite where shapes differ."""
    return float((one - other).abs().max()) if one.shape == other.shape else float("inf")


@torch.no_grad()
def _outputs(bench: Bench, batch: Batch) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Encoded frames, CTC logits and decoder logits of every recording, valid positions only."""
    student, tokenizer = bench.recogniser.student.eval(), bench.recogniser.tokenizer
    assert batch.features is not None
    encoded, lengths = student.encode(batch.features, batch.feature_lengths)
    frames, steps = lengths.tolist(), (batch.token_lengths + 1).tolist()
    logits = student.ctc_logits(encoded)
    written = student.decoder_logits(decoder_input(batch.tokens, tokenizer.bos), encoded, lengths)
    return (
        [row[:n] for row, n in zip(encoded, frames, strict=True)],
        [row[:n] for row, n in zip(logits, frames, strict=True)],
        [row[:n] for row, n in zip(written, steps, strict=True)],
    )


@torch.no_grad()
def _losses(bench: Bench, settings: Config, batch: Batch) -> dict[str, float]:
    """Parts of the loss in training mode, without dropout; BatchNorm statistics move in a copy."""
    recogniser = bench.recogniser
    sizes = recogniser.config.model.model_copy(update={"dropout": 0.0})
    student = Student(sizes, recogniser.tokenizer.size, recogniser.config.features)
    student.load_state_dict(recogniser.student.state_dict())
    parts = loss_parts(student.train(), batch, settings, recogniser.tokenizer)
    return {name: float(parts[name]) for name in LOSSES}


# --- decoding and listening -----------------------------------------------------------------------------------------


def batch_decoding(bench: Bench) -> list[Finding]:
    """Recordings recognised together and one by one give the same tokens."""
    recogniser, takes = bench.recogniser, bench.test[:SAMPLE]
    words = sorted({recording.text for recording in takes})
    ways: dict[str, dict[str, Any]] = {
        "CTC": {"mode": "ctc", "word_list": False},
        "the decoder": {"mode": "decoder", "word_list": False},
        "the word list": {"word_list": True},
    }
    differing: dict[str, list[str]] = {}
    for way, changes in ways.items():
        together, alone = (
            recognise(
                recogniser.student,
                bench.serve(takes),
                bench.config.decode.model_copy(update={**changes, "beam": 1, "batch_size": size}),
                word_list=words,
            )
            for size in (len(takes), 1)
        )
        pairs = zip(together, alone, strict=True)
        differing[way] = [one.recording for one, other in pairs if one.tokens != other.tokens]
    wrong = {way: names for way, names in differing.items() if names}
    if not wrong:
        return []
    most = max(len(names) for names in wrong.values())
    listed = ", ".join(f"{len(names)} through {way}" for way, names in wrong.items())
    return [
        Finding(
            "batch-decoding", "refuse" if most > NEAR_TIES else "note", bench.subject,
            f"Of {len(takes)} recordings, outputs in a batch differ from outputs one by one: {listed}.",
            "Scores depend on decode.batch_size and on who shares a batch.",
            f"Test with '--set decode.batch_size=1' until it is mended. {OWN_CODE}",
            {"differing": differing, "recordings": len(takes)}, points=100 * most / len(takes),
        )
    ]  # fmt: skip


def shuffled_audio(bench: Bench) -> list[Finding]:
    """With another recording's audio under its name, no recording may be recognised above chance."""
    recogniser, settings = bench.recogniser, bench.config.decode
    swapped = other_audio(bench.test[: TAKES_LARGE if bench.parameters > LARGE else TAKES])
    if len(swapped) < FEWEST_TAKES:
        raise CorpusError(
            f"Only {len(swapped)} test takes with a partner of another text.", f"It needs {FEWEST_TAKES}."
        )
    names = {recording.recording for recording in swapped}
    own = [recording for recording in bench.test if recording.recording in names]
    words = sorted({recording.text for recording in own})
    said = {
        whose: recognise(recogniser.student, bench.serve(recordings), settings, word_list=words)
        for whose, recordings in (("own", own), ("other", swapped))
    }
    right = {whose: count_right(predictions, recogniser) for whose, predictions in said.items()}
    chance, takes = most_common_share(swapped), len(swapped)
    probability = above_chance(right["other"], takes, chance)
    outputs = {prediction.hypothesis for predictions in said.values() for prediction in predictions}
    evidence = {
        "takes": takes, "right_with_own_audio": right["own"], "right_with_other_audio": right["other"],
        "chance": chance, "probability": probability, "distinct_outputs": len(outputs),
    }  # fmt: skip
    shares = f"own audio: {right['own']} of {takes} right, another recording's audio: {right['other']}"
    if probability < RARE:
        return [
            Finding(
                "shuffled-audio", "refuse", bench.subject,
                f"With the audio of other words {right['other']} of {takes} takes are still right (chance "
                f"{100 * chance:.0f} %, p = {probability:.1g}; {shares}).",
                "The text reaches the output without being heard: every WRA is too high.",
                "Find where recognition sees the true text; trust no score until then.",
                evidence, points=100 * (right["other"] / takes - chance),
            )
        ]  # fmt: skip
    if len(outputs) > 1:
        return []
    return [
        Finding(
            "shuffled-audio", "note", bench.subject,
            f"The output is '{outputs.pop()}' whatever the audio ({shares}).",
            "The model does not listen, or has not learned to.",
            "See how it was trained: 'xded status RUN', 'xded inspect RUN'.", evidence,
        )
    ]  # fmt: skip


def other_audio(recordings: Sequence[Recording]) -> list[Recording]:
    """Every recording with the audio of one that has another text; those without such a partner are left out.

    Sorted by text and turned by the largest text's count, every partner has another text, as long as no text has more
    than half of all recordings.
    """
    ordered = sorted(recordings, key=lambda r: r.text)
    turn = round(most_common_share(ordered) * len(ordered))
    keys = ("audio_filepath", "duration", "sample_rate", "audio_sha256")
    pairs = ((one, ordered[(i + turn) % len(ordered)]) for i, one in enumerate(ordered))
    return [
        one.model_copy(update={key: getattr(other, key) for key in keys})
        for one, other in pairs
        if one.text != other.text
    ]


def attention_moves(bench: Bench) -> list[Finding]:
    """Where the decoder looks while it reads the true texts of test takes, and what both heads gain from the audio."""
    config, tokenizer = bench.config, bench.recogniser.tokenizer
    trained = {"ctc", "decoder"} if config.train.init is not None else trained_heads(config.objective)
    if "decoder" not in trained:
        raise ConfigError("The objective gives the decoder no weight.", "Train it with --cross-entropy above 0.")
    data = bench.serve(bench.test[:ATTENDED])
    student, maps = bench.recogniser.student.eval(), []
    for index in range(len(data)):
        batch = collate([data[(0, index)]], tokenizer.eos)
        assert batch.features is not None
        seen = decoder_input(batch.tokens, tokenizer.bos)
        maps.append(cross_attention(student, batch.features, batch.feature_lengths, seen).double().numpy())
    gains = {head: gain_nats(bench, head) for head in sorted(trained)}
    return attention(maps, bench.subject, gains_nats=gains, decoded="decoder" in heads_of(config.decode))


@torch.no_grad()
def gain_nats(bench: Bench, head: str) -> float:
    """How much likelier a head finds a text with its own audio than with that of the other texts, mean."""
    tokenizer, student = bench.recogniser.tokenizer, bench.recogniser.student.eval()
    data = bench.serve(bench.test[:ATTENDED])
    batch = collate([data[(0, i)] for i in range(len(data))], tokenizer.eos)
    texts = [recording.text for recording in data.recordings]
    words = sorted(set(texts))
    assert batch.features is not None
    encoded, lengths = student.encode(batch.features, batch.feature_lengths)
    tokens = [tokenizer.encode(word) for word in words]
    scores = word_list_scores(student, encoded, lengths, tokens, float(head == "ctc"), tokenizer).numpy()
    gains = []
    for row, text in enumerate(texts):
        column = scores[:, words.index(text)]
        others = column[[other != text for other in texts]]
        others = others[np.isfinite(others)]  # a recording too short for the text says nothing
        if len(others):
            gains.append(column[row] - others.mean())
    return float(np.mean(gains)) if gains else 0.0


@dataclass(frozen=True)
class Probe:
    """One probe: what finds, on how much, and the largest model that it trains."""

    find: Callable[[Bench], list[Finding]]
    on: str
    most_parameters: int = ANY_SIZE


PROBES = {
    "overfit": Probe(overfit, f"{EIGHT} recordings", HUGE),
    "self-distillation": Probe(self_distillation, f"{SAMPLE} recordings, both heads"),
    "padding": Probe(padding, f"{SAMPLE} recordings, outputs and losses"),
    "batch-order": Probe(batch_order, f"{SAMPLE} recordings, outputs and losses"),
    "batch-decoding": Probe(batch_decoding, f"{SAMPLE} recordings, CTC, decoder and word list"),
    "shuffled-audio": Probe(shuffled_audio, f"at most {TAKES} test takes"),
    "shuffled-labels": Probe(shuffled_labels, f"at most {WORDS * TAKES_OF_WORD} takes of {WORDS} words", LARGE),
    "attention": Probe(attention_moves, f"at most {ATTENDED} test takes"),
}
