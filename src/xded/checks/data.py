"""Who was heard: the audio against who was meant, leakage, takes on two sides of a split, texts that CTC cannot write.

`checks.labels` and `checks.recordings` look at the recordings themselves.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Protocol

from pydantic import BaseModel, NonNegativeInt

from xded import errors
from xded.corpus.folds import Fold, Provenance, guard
from xded.corpus.uaspeech import NAME
from xded.errors import LeakageError
from xded.findings import Finding, Severity

SIDES = ("train", "validation", "test")
NAMES_SHOWN = 6
few = partial(errors.few, shown=NAMES_SHOWN)
# 1 % of other recordings' audio is more than a handful of misnamed files: the lookup of files is wrong
WRONG_SHARE = 0.01
# validation that has heard half of its takes in training measures memory, not recognition
VOID_SHARE = 0.5
# wrong labels or audio above this share, or half of somebody's, are no slip: what is learned is wrong
SLIP_SHARE = 0.05
OF_SPEAKER = 0.5
LEAST_OF_SPEAKER = 4  # recordings of a speaker before a share of them means something
# an unfinished count: that a speaker is absent by chance has to be this improbable
CHANCE = 1e-6
LEAST_SPREAD = 1e-3  # of log-mel features: normalised ones have 1, raw ones of speech 2 to 4
SEPARATORS = "_-. "
# microphone copies have the same length: most recordings have such a twin of their own prompt, ...
TWIN_SHARE = 0.5
# ... which means nothing where any two recordings of a speaker may well be equally long (cut to a fixed length)
TWIN_BY_CHANCE = 0.1


class Named(Protocol):
    """What is known of a recording without its audio: a line of a manifest, or of a mere list."""

    @property
    def recording(self) -> str: ...  # noqa: D102
    @property
    def speaker(self) -> str: ...  # noqa: D102
    @property
    def take(self) -> str: ...  # noqa: D102
    @property
    def prompt(self) -> str: ...  # noqa: D102
    @property
    def text(self) -> str: ...  # noqa: D102
    @property
    def block(self) -> str | None: ...  # noqa: D102
    @property
    def mic(self) -> str | None: ...  # noqa: D102
    @property
    def word_type(self) -> str | None: ...  # noqa: D102
    @property
    def duration(self) -> float | None: ...  # noqa: D102


class Side(BaseModel):
    """One side of a run. `heard` counts recordings by the owner of the file that was really opened for them."""

    meant: dict[str, NonNegativeInt] = {}
    heard: dict[str, NonNegativeInt] = {}
    files: NonNegativeInt = 0  # distinct files that were opened
    strangers: NonNegativeInt = 0  # of them, files that are no recording's of the corpus
    spread: float | None = None  # mean over recordings of the standard deviation of their features


class DataCard(BaseModel):
    """`data.json` of a run folder."""

    train: Side
    validation: Side = Side()
    takes: dict[str, list[str]] = {}


def severity_of(wrong: Sequence[Named], everything: Sequence[Named], limit: float = SLIP_SHARE) -> Severity:
    """`refuse` when the wrong ones are more than a share of all, or half of one speaker's."""
    mine, all_ = Counter(r.speaker for r in wrong), Counter(r.speaker for r in everything)
    whole = any(count >= OF_SPEAKER * all_[who] and all_[who] >= LEAST_OF_SPEAKER for who, count in mine.items())
    return "refuse" if whole or len(wrong) >= limit * len(everything) else "warn"


def same_simulator(severity: float, made: Iterable[str | None], subject: str) -> list[Finding]:
    """Whether augmentation by the dysarthria simulator meets recordings that our own simulators made.

    Args:
        severity: highest one of the augmentation; made: `simulated_by` of the corpus's recordings.
    """
    counts = Counter(name for name in made if name is not None)
    if not severity or not counts:
        return []
    return [Finding(
        "same-simulator", "note", subject,
        f"The same simulator is in training and test: augment.dysarthria is {severity:g}, and "
        f"{sum(counts.values()):,} recordings were made by our own {' and '.join(sorted(counts))}.",
        "The student rehearses the model of dysarthria that it is tested on: what that gains is the simulator's own "
        "and says nothing of people with dysarthria.",
        "Report the gain apart, or compare with augment.dysarthria=0.",
        {"severity": severity, "simulated_by": dict(counts)},
    )]  # fmt: skip


def wrong_audio(card: DataCard, subject: str) -> list[Finding]:
    """Whether each speaker was heard as often as meant, on either side.

    Args:
        card: counts by speaker; a count that is still incomplete is no fault.
        subject: the run.
    """
    findings = []
    for name, side in (("training", card.train), ("validation", card.validation)):
        findings += (
            _wrong_owner(name, side, subject) or _unheard(name, side, subject) or _few_files(name, side, subject)
        )
    return findings


def _wrong_owner(name: str, side: Side, subject: str) -> list[Finding]:
    """Recordings that were served with a file of somebody else."""
    meant, heard = sum(side.meant.values()), sum(side.heard.values())
    surplus = {who: count - side.meant.get(who, 0) for who, count in side.heard.items()}
    wrong = sum(count for count in surplus.values() if count > 0)
    if side.strangers:  # the card counts their files; what nobody of the corpus owns is what is missing
        wrong += max(side.strangers, meant - heard)
    if not wrong or not meant:
        return []
    most = max(side.heard, key=lambda who: side.heard[who], default="")
    unheard = sorted(who for who, count in side.meant.items() if count and not side.heard.get(who))
    parts = [f"{wrong:,} of {meant:,} {name} recordings were served with the audio of another speaker"]
    if most and surplus[most] > 0:
        parts.append(f"{most} was heard {side.heard[most]:,} times ({side.meant.get(most, 0):,} meant)")
    if side.strangers:
        parts.append(f"{side.strangers:,} files belong to nobody in the corpus")
    if unheard:
        parts.append(f"{few(unheard)} ({len(unheard)} of {len(side.meant)} speakers) not at all")
    severity: Severity = "refuse" if unheard or wrong >= WRONG_SHARE * meant else "warn"
    evidence = {"side": name, "wrong": wrong, "recordings": meant, "unheard": unheard, **side.model_dump()}
    return [_wrong(severity, subject, "; ".join(parts) + ".", 100 * wrong / meant, evidence)]


def _unheard(name: str, side: Side, subject: str) -> list[Finding]:
    """Speakers of whom nothing was opened, unless so little was opened by now that this may be chance."""
    meant, heard = sum(side.meant.values()), sum(side.heard.values())
    if not heard or not meant:
        return []
    left = max(0.0, 1 - heard / meant)
    unheard = sorted(
        who for who, count in side.meant.items() if not side.heard.get(who) and left**count < CHANCE and count
    )
    if not unheard:
        return []
    lost = sum(side.meant[who] for who in unheard)
    what = f"{few(unheard)} should have been heard in {lost:,} of {meant:,} {name} recordings, and never were."
    return [_wrong("refuse", subject, what, 100 * lost / meant, {"side": name, "unheard": unheard, "lost": lost})]


def _few_files(name: str, side: Side, subject: str) -> list[Finding]:
    """Fewer files than recordings: some file stands for several."""
    heard = sum(side.heard.values())
    wrong = heard - side.files
    if wrong <= 0:
        return []
    what = f"{heard:,} {name} recordings were served from {side.files:,} files: {wrong:,} had another one's audio."
    severity: Severity = "refuse" if wrong >= WRONG_SHARE * heard else "warn"
    return [_wrong(severity, subject, what, 100 * wrong / heard, {"side": name, "wrong": wrong, **side.model_dump()})]


def _wrong(severity: Severity, subject: str, what: str, points: float, evidence: Mapping[str, object]) -> Finding:
    return Finding(
        "wrong-audio", severity, subject, what,
        "The model learns other voices than the report names: whatever it says about unheard speakers is void.",
        "Open every recording's own audio_filepath where audio is looked up; 'xded corpus check CORPUS' looks at the "
        "files; then train again.", evidence, points,
    )  # fmt: skip


def flat_features(card: DataCard, subject: str) -> list[Finding]:
    """Whether what the encoder is given carries anything: a recording's features must differ from each other."""
    spread = card.train.spread
    if spread is None or spread > LEAST_SPREAD:
        return []
    return [Finding(
        "features", "refuse", subject,
        f"The features of a recording hardly differ: their standard deviation is {spread:.2g} on average "
        "(1 where they are normalised per recording).",
        "The model cannot tell recordings apart: it learns which words are frequent, and nothing else.",
        "Look at the front end and its normaliser: 'xded inspect RUN --recording ID' draws the features.",
        {"spread": spread}, 100.0,
    )]  # fmt: skip


def never_heard(included: Iterable[str], card: DataCard, subject: str) -> list[Finding]:
    """Speakers who were said to be included in training and of whom no recording was even asked for."""
    absent = sorted(who for who in included if not card.train.heard.get(who) and not card.train.meant.get(who))
    if not absent or not card.train.heard:
        return []
    total = sum(card.train.heard.values())
    what = f"{few(absent)} should be included in training, but none of the {total:,} recordings heard is theirs."
    return [Finding(
        "wrong-audio", "refuse", subject, what,
        "A result 'with the speaker included' is one without: the comparison says nothing.",
        "Train again with --include-held-out and look at the counts in data.json.",
        {"unheard": absent, "heard": card.train.heard}, 100.0,
    )]  # fmt: skip


def sources_said(provenances: Collection[Provenance], test_takes: Collection[str]) -> str:
    """What the check for leakage looked at; of sources that are not on record it can say nothing."""
    unknown = sorted({p.what for p in provenances if not p.known})
    said = f"{len(provenances)} sources, {len(test_takes):,} test takes"
    return said + (f"; not on record whom it has heard: {', '.join(unknown)}" if unknown else "")


def leakage(fold: Fold, provenances: Iterable[Provenance], test_takes: Collection[str], subject: str) -> list[Finding]:
    """What of the test, or of the excluded speakers, has been heard (see `corpus.folds.guard`)."""
    listed = tuple(provenances)
    try:
        guard(fold, listed, test_takes)
    except LeakageError as error:
        forbidden = {*fold.exclude, *(() if fold.include_held_out else fold.held_out)}
        takes = {take for p in listed for take in p.takes & set(test_takes)}
        guilty = [p.what for p in listed if p.speakers & forbidden or p.takes & set(test_takes)]
        speakers = sorted({who for p in listed for who in p.speakers & forbidden})
        return [Finding(
            "leakage", "refuse", subject,
            f"{len(guilty)} of {len(listed)} sources have heard what the fold forbids ({len(takes)} test takes): "
            + error.problem.removeprefix("Leakage: "),
            "The test is no test: its speaker, or its very takes, were heard before.",
            error.remedy,
            {"sources": guilty, "speakers": speakers, "test_takes": len(takes)}, 100.0,
        )]  # fmt: skip
    return []


def shared_takes(sides: Mapping[str, Collection[str]], spoken: Mapping[str, str], subject: str) -> list[Finding]:
    """Takes on two sides of a split.

    Args:
        sides: `train`, `validation`, `test` (any of them) -> ids of takes.
        spoken: take id -> name of what was really spoken, for ids that are copies (`spoken_takes`).
        subject: the run or the split.
    """
    findings = []
    for earlier, later in combinations([side for side in SIDES if sides.get(side)], 2):
        heard = {spoken.get(take, take) for take in sides[earlier]}
        shared = [take for take in set(sides[later]) if spoken.get(take, take) in heard]
        if not shared:
            continue
        copies = sum(take not in set(sides[earlier]) for take in shared)
        share = len(shared) / len(set(sides[later]))
        by_mic = f", {copies:,} of them under another id (a microphone's copy, or a copied file)" if copies else ""
        chosen = "The best checkpoint is chosen by what it has heard" if later == "validation" else "The test was heard"
        severity: Severity = "refuse" if later == "test" or share >= VOID_SHARE else "warn"
        findings.append(Finding(
            "shared-takes", severity, subject,
            f"{len(shared):,} of {len(set(sides[later])):,} {later} takes are in {_long(earlier)} too{by_mic}.",
            f"{chosen}: {later} figures are too good, and say nothing about unheard speech.",
            "Give all microphone copies of a spoken word one take id in the manifest and let xded split by take.",
            {"sides": [earlier, later], "shared": len(shared), "of": len(set(sides[later])), "under_another_id": copies,
             "examples": sorted(shared)[:NAMES_SHOWN]}, 100 * share,
        ))  # fmt: skip
    return findings


def _long(side: str) -> str:
    return "training" if side == "train" else side


def spoken_takes(rows: Sequence[Named]) -> dict[str, str]:
    """Take ids that are microphone copies of one spoken take: id -> a name that the copies share.

    Told by names (as in UASpeech, or a take id that ends in the recording's microphone), or, where names tell nothing,
    by length: recordings of one speaker and prompt that agree to the millisecond while others do not.
    """
    spoken = {row.take: _without_mic(row.take, row.mic, row.speaker) for row in rows}
    found = _merged(spoken)
    return found or _merged(_by_length(rows))


def spoken_by_name(takes: Iterable[str]) -> dict[str, str]:
    """As `spoken_takes`, from nothing but ids with a microphone in them (UASpeech)."""
    return _merged({take: _without_mic(take, None, "") for take in takes})


def _merged(spoken: Mapping[str, str]) -> dict[str, str]:
    """Only the ids that share their name with another."""
    counts = Counter(spoken.values())
    return {take: name for take, name in spoken.items() if counts[name] > 1}


def _without_mic(take: str, mic: str | None, speaker: str) -> str:
    """A take id without its microphone; microphone-less names of two speakers differ."""
    match = NAME.fullmatch(take)
    if match:
        return take.removesuffix(f"_{match['mic']}")
    if mic and take.endswith(mic) and take.removesuffix(mic)[-1:] in SEPARATORS:
        return f"{speaker} {take.removesuffix(mic).rstrip(SEPARATORS)}"
    return take


def _by_length(rows: Sequence[Named]) -> dict[str, str]:
    """Takes named by speaker, prompt and milliseconds, where equal lengths mean something; otherwise nothing."""
    lengths: dict[str, Counter[int]] = defaultdict(Counter)
    groups: dict[tuple[str, str, str, int], set[str]] = defaultdict(set)
    sizes: Counter[tuple[str, str, str]] = Counter()
    timed = [row for row in rows if row.duration is not None]
    for row in timed:
        assert row.duration is not None
        milliseconds = round(1000 * row.duration)
        lengths[row.speaker][milliseconds] += 1
        sizes[row.speaker, row.block or "", row.prompt] += 1
        groups[row.speaker, row.block or "", row.prompt, milliseconds].add(row.take)
    twins = sum(len(takes) for takes in groups.values() if len(takes) > 1)
    inside = sum(len(takes) * (len(takes) - 1) for takes in groups.values())
    equal = sum(count * (count - 1) for counts in lengths.values() for count in counts.values()) - inside
    pairs = sum(counts.total() * (counts.total() - 1) for counts in lengths.values())
    others = pairs - sum(size * (size - 1) for size in sizes.values())  # ordered pairs of two prompts
    if not twins or not others or twins < TWIN_SHARE * len(timed):
        return {}
    mean_size = sum(size * size for size in sizes.values()) / len(timed)
    if 1 - (1 - equal / others) ** (mean_size - 1) > TWIN_BY_CHANCE:
        return {}
    return {take: " ".join(map(str, key)) for key, takes in groups.items() for take in takes}


def copies_with_own_takes(rows: Sequence[Named], subject: str) -> list[Finding]:
    """Microphone copies that each have a take id of their own: a split by take would tear them apart."""
    spoken = spoken_takes(rows)
    if not spoken:
        return []
    takes, words = len(spoken), len(set(spoken.values()))
    return [Finding(
        "shared-takes", "warn", subject,
        f"{takes:,} takes are {words:,} spoken ones through several microphones: each copy has a take id of its own.",
        "Splits, intervals and tests count takes: copies of one spoken word fall on both sides, and intervals are "
        f"{(takes / words) ** 0.5:.1f} times too narrow.",
        "Give the copies one take id (a NeMo manifest: key 'take') and import again with 'xded corpus import'.",
        {"takes": takes, "spoken": words, "examples": sorted(spoken)[:NAMES_SHOWN]},
    )]  # fmt: skip


def teacher_test_block(tested: Mapping[str, Collection[str]], trained: Collection[str], subject: str) -> list[Finding]:
    """Takes that teachers were tested on and that a run trains on.

    Args:
        tested: teacher -> takes of its cross-test; trained: takes of the run; subject: the run.
    """
    heard = set(trained)
    shared = {teacher: len(heard & set(takes)) for teacher, takes in tested.items()}
    takes = {take for names in tested.values() for take in names}
    both = heard & takes
    if not both:
        return []
    return [Finding(
        "teacher-test-block", "warn", subject,
        f"{len(both):,} of the {len(takes):,} takes that {sum(map(bool, shared.values()))} teachers were tested on are "
        f"among the run's {len(heard):,} training takes.",
        "Teachers are scored on speech that the run has learned by heart: the two cannot be compared.",
        "Use one fold for both (fold.split_seed, fold.validation and fold.validation_fraction as in the teachers' "
        "config.yaml), or test the teachers again with 'xded teach'.",
        {"shared": len(both), "tested": len(takes), "trained": len(heard), "by_teacher": shared},
    )]  # fmt: skip


def unspellable(rows: Iterable[tuple[str, int, int]], spelling: str, subject: str) -> list[Finding]:
    """Recordings too short for their text.

    Args:
        rows: recording, frames that CTC needs (`objectives.ctc_frames_needed`), encoded frames that it has.
        spelling: the tokenizer; subject: the corpus.
    """
    listed = list(rows)
    short = [(recording, needed, there) for recording, needed, there in listed if needed > there]
    if not short:
        return []
    severity: Severity = "refuse" if len(short) >= WRONG_SHARE * len(listed) else "warn"
    examples = "; ".join(f"{recording} needs {needed} and has {there}" for recording, needed, there in short[:3])
    return [Finding(
        "unspellable", severity, subject,
        f"{len(short):,} of {len(listed):,} recordings have fewer frames than CTC needs for their text ({spelling}): "
        f"{examples}.",
        "Their CTC loss is infinite: xded refuses to train on them, other tools drop them silently.",
        "Leave them out of the manifest, use a tokenizer with longer pieces (--set tokenizer.kind=bpe), or train "
        "without CTC (xded train --ctc 0).",
        {"recordings": len(short), "of": len(listed), "examples": [row[0] for row in short[:NAMES_SHOWN]]},
        100 * len(short) / len(listed),
    )]  # fmt: skip
