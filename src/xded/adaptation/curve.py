"""The curve: how well a recogniser understands a new speaker of whom it has heard so many takes.

What it understands without having heard the speaker is a result of its own (`Curve.unheard`) and no point of the curve.
Every point is of the same test takes, which no adaptation hears.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from pydantic import TypeAdapter

from xded.adaptation.hearing import Heard, Subject, Unheard, hear_prototypes, hear_steps, hear_unheard
from xded.adaptation.settings import LISTED, OPEN, Method, Settings
from xded.adaptation.takes import set_apart
from xded.config import DecodeConfig
from xded.corpus.folds import Fold, guard
from xded.corpus.manifest import Corpus
from xded.errors import ConfigError, LeakageError, few
from xded.exported import is_exported
from xded.models.pretrained import is_pretrained
from xded.models.recogniser import Recogniser
from xded.scoring import Comparison, Estimate, Prediction, Scores, compare, is_right, score, write_predictions
from xded.tokenizer import normalise
from xded.training.evaluation import conditions_of
from xded.training.status import write_atomically

CURVE, SETTINGS = "curve.json", "settings.json"


@dataclass(frozen=True)
class Point:
    """What is understood after `takes` takes of each speaker were heard, over all draws (`seed` of the predictions).

    Attributes:
        scores: intervals resample the test's takes; `by_draw_wra_percent` (mean of speakers) shows what the draw does.
        over_unheard: paired with the unheard result on the same test takes.
        same_words_percent: share of the tested predictions whose word is that of a take that was heard.
        same_words, other_words: WRA of these and of the others; none where there are none.
    """

    takes: int
    method: Method
    decode: str
    scores: Scores
    by_draw_wra_percent: tuple[float, ...]
    over_unheard: Comparison
    same_words_percent: float
    same_words: Estimate | None
    other_words: Estimate | None

    @property
    def name(self) -> str:
        """Row of a table."""
        return f"{self.takes} takes, {self.method}"


@dataclass(frozen=True)
class Speaker:
    """A speaker's takes: those of the test, and the others in the order in which each draw hears them."""

    band: str | None
    test: tuple[str, ...]
    orders: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Curve:
    """All of curve.json. `unheard` is by decode mode; `notes` are what a reader has to know before any number."""

    checkpoint: str
    checkpoint_sha256: str
    corpus: str
    settings: Settings
    speakers: dict[str, Speaker]
    notes: tuple[str, ...]
    unheard: dict[str, Scores]
    heard: tuple[Point, ...]

    def to_json(self) -> str:
        """The text of curve.json."""
        return TypeAdapter(Curve).dump_json(self, indent=1).decode()

    @classmethod
    def from_json(cls, text: str) -> Curve:
        """Reads `to_json`."""
        return TypeAdapter(Curve).validate_json(text)


def adapt(
    recogniser: Recogniser,
    corpus: Corpus,
    speakers: Sequence[str],
    decode: DecodeConfig,
    settings: Settings,
    out: Path,
    *,
    jobs: int = 1,
    keep: bool = False,
    quiet: bool = False,
) -> Curve:
    """Tests unheard, adapts, tests again; writes curve.json and the predictions of every point into `out`.

    Args:
        recogniser, corpus, speakers: who adapts, to whom.
        decode: how any text is written; word lists are scored beside it.
        settings: how many takes, how often, by which methods.
        out: folder; finished adaptations in it are kept, and takes, draws and methods may be added later.
        jobs: adaptations at once; keep: their weights too (a checkpoint for each).
        quiet: no progress on standard error.

    Raises:
        LeakageError: the recogniser has heard a speaker.
        CorpusError: an unknown speaker, or too few takes.
        ConfigError: `out` is of other settings, or steps are asked of what is no checkpoint.
    """
    subject, notes = subject_of(recogniser, corpus, speakers, decode, settings)
    _begin(out, subject, settings)
    unheard = hear_unheard(subject)
    heard: Heard = {}
    if "steps" in settings.methods:
        heard |= hear_steps(subject, settings, out, jobs, keep, quiet)
    if "prototypes" in settings.methods:
        heard |= hear_prototypes(subject, settings)
    curve = curve_of(subject, settings, notes, unheard, heard)
    _write(out, curve, unheard, heard)
    return curve


def subject_of(
    recogniser: Recogniser, corpus: Corpus, speakers: Sequence[str], decode: DecodeConfig, settings: Settings
) -> tuple[Subject, tuple[str, ...]]:
    """All checks, then takes set apart and words listed; also what a reader has to know.

    Raises:
        XdedError: as `adapt`.
    """
    if not speakers:
        raise ConfigError("No speaker to adapt to: the run held nobody out.", "Name one with --speaker SPEAKER.")
    corpus.require(speakers)
    check_unheard(recogniser, corpus, speakers)
    if "steps" in settings.methods and (is_pretrained(recogniser.path) or is_exported(recogniser.path)):
        raise ConfigError(
            f"{recogniser.path} is no checkpoint of a run: training cannot go on from it.",
            "Use prototypes alone (--method prototypes), or a checkpoint that 'xded train' made from it.",
        )
    apart = tuple(
        set_apart(corpus, speaker, settings.takes[-1], settings.draws, settings.test_share, settings.seed)
        for speaker in sorted(set(speakers))
    )
    tokenizer = recogniser.tokenizer
    lost = set(tokenizer.unspellable(corpus.texts))
    unknown = [provenance.what for provenance in recogniser.provenance if not provenance.known]
    notes = []
    if lost:
        notes.append(f"The tokenizer cannot write {few(sorted(lost))}: left out of the word list, and always wrong.")
    if unknown:
        notes.append(f"It is not on record whom {', '.join(unknown)} has heard: the speakers may not be unheard.")
    words = {normalise(text, tokenizer.normaliser) for text in corpus.texts if text not in lost}
    decodes = {name: decode.model_copy(update={"word_list": name == LISTED}) for name in (OPEN, LISTED)}
    return Subject(recogniser, corpus, apart, decodes, tuple(sorted(words))), tuple(notes)


def check_unheard(recogniser: Recogniser, corpus: Corpus, speakers: Sequence[str]) -> None:
    """Refuses speakers whom the recogniser has heard: there would be no unheard result to start from.

    Raises:
        LeakageError: naming what has heard whom, and who is left.
    """
    takes = {recording.take for recording in corpus.select(speakers=speakers)}
    try:
        guard(Fold(tuple(speakers)), recogniser.provenance, takes)
    except LeakageError as error:
        heard = {speaker for provenance in recogniser.provenance for speaker in provenance.speakers}
        left = [speaker for speaker in corpus.speakers if speaker not in heard]
        remedy = f"Adapt to a speaker that it has not heard: --speaker {few(left)}." if left else (
            "Train one that has not heard the speaker: xded train --held-out SPEAKER."
        )  # fmt: skip
        raise LeakageError(error.problem, remedy) from error


def _begin(out: Path, subject: Subject, settings: Settings) -> None:
    """Keeps in `out` what its points depend on.

    Raises:
        ConfigError: points of other settings are there already.
    """
    now = {
        "checkpoint": subject.recogniser.sha256,
        "corpus": hashlib.sha256(subject.corpus.path.read_bytes()).hexdigest(),
        "decode": subject.decodes[OPEN].model_dump(mode="json"),
        **settings.of_each_point,
    }
    path = out / SETTINGS
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{key} was {before.get(key)}, now {now[key]}" for key in now if before.get(key) != now[key]]
        if changed:
            raise ConfigError(f"{out} was begun with other settings: {'; '.join(changed)}.", "Choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(now, indent=1))


# --- scores -----------------------------------------------------------------------------------------------


def curve_of(subject: Subject, settings: Settings, notes: tuple[str, ...], unheard: Unheard, heard: Heard) -> Curve:
    """Scores of everything, each with the conditions that it was made under."""
    recogniser, corpus = subject.recogniser, subject.corpus
    order = sorted(heard, key=lambda key: (settings.methods.index(key[1]), key[2], key[0]))
    return Curve(
        checkpoint=str(recogniser.path),
        checkpoint_sha256=recogniser.sha256,
        corpus=str(corpus.path),
        settings=settings,
        speakers={
            one.speaker: Speaker(
                corpus.band_of(one.speaker), tuple(sorted({recording.take for recording in one.test})), one.orders
            )
            for one in subject.speakers
        },
        notes=notes,
        unheard={
            decode: score(said, normaliser=recogniser.tokenizer.normaliser, word_list=corpus.texts,
                          conditions={**_alone(subject, decode), "heard": "0 takes of the speaker"})
            for decode, said in unheard.items()
        },
        heard=tuple(_point(subject, settings, key, heard[key], unheard[key[2]]) for key in order),
    )  # fmt: skip


def _alone(subject: Subject, decode: str) -> dict[str, str]:
    """The conditions of a test of the recogniser as it is."""
    return conditions_of(subject.recogniser, subject.corpus, subject.test, subject.decodes[decode])


def _point(
    subject: Subject,
    settings: Settings,
    key: tuple[int, Method, str],
    said: Sequence[Prediction],
    before: Sequence[Prediction],
) -> Point:
    """Scores of one point, under conditions that say what was heard; `before` is the unheard result."""
    takes, method, decode = key
    normaliser, alone = subject.recogniser.tokenizer.normaliser, _alone(subject, decode)
    spoken = {
        (apart.speaker, draw): {recording.text for recording in apart.heard(draw, takes)}
        for apart in subject.speakers
        for draw in range(settings.draws)
    }
    same = [p for p in said if p.reference in spoken[p.speaker, p.seed]]
    other = [p for p in said if p.reference not in spoken[p.speaker, p.seed]]
    conditions = {**alone, "speakers": "seen", "heard": f"{takes} takes of the speaker ({method})"}
    if alone["words"] != "unknown" and same:
        conditions["words"] = "seen" if alone["words"] == "seen" or not other else "mixed"
    scores = score(said, normaliser=normaliser, word_list=subject.corpus.texts, conditions=conditions)
    # as often as there are draws: a take then weighs the same on both sides
    again = [replace(p, seed=draw) for p in before for draw in range(settings.draws)]

    def wra(part: Sequence[Prediction]) -> Estimate | None:
        return score(part, normaliser=normaliser, conditions=conditions).overall.wra_percent if part else None

    return Point(
        takes, method, decode, scores,
        by_draw_wra_percent=tuple(_mean_wra(said, draw, normaliser) for draw in range(settings.draws)),
        over_unheard=compare(scores, score(again, normaliser=normaliser, conditions=alone, resamples=0)),
        same_words_percent=100 * len(same) / len(said), same_words=wra(same), other_words=wra(other),
    )  # fmt: skip


def _mean_wra(predictions: Sequence[Prediction], draw: int, normaliser: str) -> float:
    """Mean of the speakers' WRA of one draw, per cent."""
    right: dict[str, list[bool]] = {}
    for p in predictions:
        if p.seed == draw:
            right.setdefault(p.speaker, []).append(is_right(p, normaliser))
    return 100 * fmean(fmean(of_speaker) for of_speaker in right.values())


def _write(out: Path, curve: Curve, unheard: Unheard, heard: Heard) -> None:
    """curve.json, and predictions in files that say by name what was heard."""
    files = {f"unheard_{decode}": said for decode, said in unheard.items()}
    files |= {f"heard_{takes}_{method}_{decode}": said for (takes, method, decode), said in heard.items()}
    paths = {out / f"predictions_{name.replace(' ', '_')}.jsonl": said for name, said in files.items()}
    for stale in set(out.glob("predictions_*.jsonl")) - set(paths):
        stale.unlink()  # of takes that an earlier call asked for: curve.json says nothing of them any more
    for path, said in paths.items():
        write_predictions(path, said)
    write_atomically(out / CURVE, curve.to_json())
