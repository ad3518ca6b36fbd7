"""A study file: attempts, held-out speakers, seeds, hypotheses and what to do next, validated before any training."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from xded import config as configs
from xded.checks.ordering import unordered_by_targets
from xded.config import Config, Section, StageConfig
from xded.corpus.manifest import BANDS, Corpus
from xded.errors import ConfigError, XdedError

Verdict = Literal["supported", "rejected", "undecided"]
DecodeName = Literal["open", "word list"]
BUILT_IN = ("debug", "loso", "small-from-large", "from-parent", "withheld", "demo")
SUSPECT: Final = "suspect"
EVALUATION = "evaluation"  # what `next` calls the examination of the evaluation itself
# systems that a study's tables hold besides its attempts
PARENT = "parent"
SOUP = "mean of the teachers' weights"
ZERO_SHOT = "pretrained, zero-shot"
TEACHER = "teacher "  # and the speaker
MEAN_TEACHER = "mean of the teachers"
BEST_TEACHER = "best teacher"  # of each speaker, chosen after the fact
VOTE = "vote of the teachers"
ORACLE = "any-teacher oracle"
ROWS = (PARENT, SOUP, ZERO_SHOT, MEAN_TEACHER, BEST_TEACHER, VOTE, ORACLE)
# config keys that the study decides, and where
DECIDED = {
    "corpus": "the study's corpus",
    "targets": "the study, from the attempt's teachers",
    "seed": "the study's seeds",
    "fold.held_out": "the study's held_out",
    "fold.include_held_out": "the attempt's include_held_out",
    "fold.controls": "the attempt's controls",
    "fold.withhold": "the study's withhold and the attempt's recordings",
    "train.init": "the attempt's start",
    "train.guide": "the study: it is the fold's parent",
}


class StudyError(XdedError):
    """A study file, or a folder of a study, that cannot be used."""


class Attempt(Section):
    """One configured training, repeated for every fold and seed."""

    about: str = Field("", description="what it is for, one line")
    set: dict[str, Any] = Field({}, description="config keys that differ from the study's, such as objective.ctc_kd")
    include_held_out: bool = Field(False, description="half of the held-out speakers' takes train too")
    start: Literal["scratch", "parent", "teachers"] = Field(
        "scratch", description="weights that it starts from; teachers: the mean of its teachers' weights"
    )
    controls: bool = Field(False, description="train on the control speakers too")
    recordings: Literal["all", "shared"] = Field(
        "all", description="that it trains on; shared: without those that the study withholds"
    )
    teachers: Literal["all", "band"] | tuple[str, ...] = Field(
        "all",
        description="whose posteriors are aggregated (or weights averaged): all, those of the held-out speaker's band, "
        "or these",
    )
    ask: Literal["each", "mean"] = Field(
        "each",
        description="whose posteriors are the targets: each teacher's, aggregated, or those of the mean of their "
        "weights, which listens once where K teachers listen K times",
    )
    updates: int | None = Field(None, ge=1, description="of this attempt in place of the study's: a control, say so")
    expected: float | None = Field(None, description="WRA that was hoped for, per cent; never mixed with results")


class Hypothesis(Section):
    """A claim about an attempt's WRA, per cent, on all folds together; with `minus`, about the gap between two.

    With `between: [low, high]` it is about the share of the gap from `low` to `high` that the attempt makes up,
    (attempt - low) / (high - low): 0.5 is half of it.
    """

    attempt: str
    minus: str | None = Field(None, description="attempt whose WRA is taken off (paired by take)")
    between: tuple[str, str] | None = Field(None, description="attempts whose gap it makes up in part: low, high")
    decode: DecodeName = "open"
    above: float | None = Field(None, description="supported when the whole interval lies above")
    below: float | None = Field(None, description="supported when the whole interval lies below")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.above is None) == (self.below is None):
            raise ValueError("give either above or below")
        if self.minus == self.attempt:
            raise ValueError(f"the gap between '{self.attempt}' and itself is always 0")
        if self.between is not None:
            if self.minus is not None:
                raise ValueError("give either minus or between")
            if len({self.attempt, *self.between}) < 3:
                raise ValueError("between names two attempts, and neither is the attempt itself")
            return self
        # the whole interval has to be able to lie on either side
        least, most = (-100.0, 100.0) if self.minus is not None else (0.0, 100.0)
        decidable = least <= self.threshold < most if self.above is not None else least < self.threshold <= most
        if not decidable:
            what = "gaps lie" if self.minus is not None else "WRA lies"
            raise ValueError(f"nothing can decide it: {what} between {least:g} and {most:g}")
        return self

    @property
    def threshold(self) -> float:
        """`above` or `below`, in per cent or points."""
        threshold = self.above if self.above is not None else self.below
        assert threshold is not None
        return threshold if self.between is None else 100.0 * threshold

    @property
    def others(self) -> tuple[str, ...]:
        """Attempts that the attempt is held against."""
        return self.between or (() if self.minus is None else (self.minus,))


class Rung(Section):
    """A step of the ladder: `says` holds from `above` to the next rung."""

    above: float
    says: str


class Ladder(Section):
    """What a WRA means, in words."""

    attempt: str
    decode: DecodeName = "open"
    rungs: tuple[Rung, ...] = Field(min_length=1)

    def says(self, wra_percent: float) -> str:
        """The words for a WRA."""
        for rung in sorted(self.rungs, key=lambda rung: -rung.above):
            if wra_percent >= rung.above:
                return rung.says
        return "below the lowest rung"


class NextStep(Section):
    """A row of the decision table: what to do when every named hypothesis has the named verdict."""

    when: dict[str, Verdict | Literal["suspect"]] = Field(min_length=1)
    do: str = Field(description="what to do and why")
    command: str = Field("", description="the command, with {study}, {out}, {run} and {held_out} filled in")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, verdict in self.when.items():
            if (name == EVALUATION) != (verdict == SUSPECT):
                raise ValueError(f"'{name}: {verdict}' never holds: the evaluation, and nothing else, can be suspect")
        try:
            self.command.format(study="", out="", run="", held_out="")
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(f"command '{self.command}': only {{study}}, {{out}}, {{run}}, {{held_out}}") from error
        return self


class Budget(Section):
    """What a study may cost; attempts that do not fit are left out and named."""

    minutes: float | None = Field(None, gt=0, description="wall-clock minutes; none: as long as it takes")


class Study(Section):
    """A whole study file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    question: str = ""
    corpus: Path | None = Field(None, description="manifest, or the folder that holds it; none: the embedded corpus")
    held_out: Literal["all"] | tuple[str | tuple[str, ...], ...] = Field(
        "all", description="folds: a speaker or a list of speakers each; all: every target speaker once"
    )
    withhold: Literal["half"] | tuple[str, ...] | None = Field(
        None,
        description="training speakers whose recordings do not travel: no parent hears them, only their own teachers "
        "and attempts with recordings: all; half: every second training target speaker, by band and name",
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0, 1, 2), min_length=1)
    updates: int | None = Field(None, ge=1, description="of every attempt, so that they are comparable; none: config's")
    budget: Budget = Budget()
    config: dict[str, Any] = Field(
        {}, description="of all attempts: sections of 'xded train --help-config', or dotted keys, which win"
    )
    attempts: dict[str, Attempt] = Field(min_length=1)
    baselines: bool = Field(
        True, description="test the parent and every teacher too; false trains only what attempts start from or hear"
    )
    hypotheses: dict[str, Hypothesis] = Field({}, description="claims that the attempts decide")
    ladder: Ladder | None = None
    next: tuple[NextStep, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for where, name in self._mentions():
            if name not in self.attempts:
                near = difflib.get_close_matches(name, self.attempts, 1)
                hint = f" (did you mean '{near[0]}'?)" if near else ""
                raise ValueError(f"{where} is about attempt '{name}', which the study does not have{hint}")
        for name in self.attempts:
            if name in ROWS or name.startswith((TEACHER, f"{PARENT}, ")):
                raise ValueError(f"an attempt cannot be called '{name}': the tables have a row of that name")
        if EVALUATION in self.hypotheses:
            raise ValueError(f"a hypothesis cannot be called '{EVALUATION}': in next, that is the examination")
        unknown = {name for step in self.next for name in step.when} - self.hypotheses.keys() - {EVALUATION}
        if unknown:
            raise ValueError(f"next asks for the hypothesis '{sorted(unknown)[0]}', which the study does not have")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is listed twice")
        if self.held_out != "all":
            folds = [(one,) if isinstance(one, str) else one for one in self.held_out]
            if not folds or not all(folds):
                raise ValueError("held_out names nobody; all: every target speaker once")
            times = Counter(speaker for fold in folds for speaker in fold)
            if twice := [speaker for speaker, count in times.items() if count > 1]:
                raise ValueError(f"held_out names {twice[0]} twice: every speaker is tested once")
        self._check_withheld()
        return self

    def _check_withheld(self) -> None:
        shared = [name for name, attempt in self.attempts.items() if attempt.recordings == "shared"]
        if self.withhold is None and shared:
            raise ValueError(
                f"attempt '{shared[0]}' trains on the shared recordings, and none are withheld: set withhold (half, or "
                "names), or recordings: all"
            )
        if self.withhold is not None and not shared:
            raise ValueError("withhold changes no attempt: give one of them recordings: shared, or take it out")
        if self.withhold == ():
            raise ValueError("withhold names nobody; half: every second training target speaker")

    def _mentions(self) -> Iterable[tuple[str, str]]:
        for name, hypothesis in self.hypotheses.items():
            yield f"hypothesis '{name}'", hypothesis.attempt
            for other in hypothesis.others:
                yield f"hypothesis '{name}'", other
        if self.ladder is not None:
            yield "the ladder", self.ladder.attempt

    def folds(self, corpus: Corpus) -> list[tuple[str, ...]]:
        """Held-out speakers of each fold.

        Raises:
            CorpusError: a name that the corpus does not have. StudyError: nobody to hold out.
        """
        if self.held_out == "all":
            targets = [s for s in corpus.speakers if corpus.role_of(s) == "target"]
            if not targets:
                raise StudyError(
                    f"held_out: all, but {corpus.path} has no target speaker.", "Name the speakers in held_out."
                )
            return [(speaker,) for speaker in targets]
        folds = [(one,) if isinstance(one, str) else tuple(one) for one in self.held_out]
        corpus.require(speaker for fold in folds for speaker in fold)
        return folds

    def withheld(self, corpus: Corpus, held_out: Iterable[str], exclude: Iterable[str]) -> tuple[str, ...]:
        """Training target speakers of a fold whose recordings do not travel; without `withhold` nobody.

        `half`: every second one in the order of bands, then names, so that the bands are halved too.

        Raises:
            CorpusError: a name that the corpus does not have. StudyError: nobody is left to withhold, or one who has no
                teacher that could travel.
        """
        if self.withhold is None:
            return ()
        gone = {*held_out, *exclude}
        targets = [s for s in corpus.speakers if corpus.role_of(s) == "target" and s not in gone]
        if self.withhold == "half":
            place = {band: number for number, band in enumerate((*BANDS, None))}
            chosen = sorted(targets, key=lambda s: (place[corpus.band_of(s)], s))[1::2]
        else:
            corpus.require(self.withhold)
            if healthy := [s for s in self.withhold if corpus.role_of(s) == "control"]:
                raise StudyError(
                    f"withhold names {healthy[0]}, a control speaker: it has no teacher that could travel.",
                    "Name target speakers, or half.",
                )
            chosen = [s for s in targets if s in self.withhold]
        if not chosen:
            raise StudyError(
                f"In the fold without {', '.join(held_out)} nobody's recordings are withheld.",
                "Withhold others too, or hold out fewer speakers.",
            )
        return tuple(sorted(chosen))

    def only(self, names: Collection[str]) -> Self:
        """The study with some of its attempts, without what it says of others.

        Raises:
            StudyError: an attempt that it does not have.
        """
        if unknown := sorted(set(names) - self.attempts.keys()):
            raise StudyError(
                f"Study '{self.name}' has no attempt '{unknown[0]}'.", f"Choose among: {'; '.join(self.attempts)}."
            )
        claims = {name: h for name, h in self.hypotheses.items() if {h.attempt, *h.others} <= {*names}}
        kept = {
            "attempts": {name: attempt for name, attempt in self.attempts.items() if name in names},
            "hypotheses": claims,
            "ladder": self.ladder if self.ladder is not None and self.ladder.attempt in names else None,
            "next": tuple(step for step in self.next if step.when.keys() <= {EVALUATION, *claims}),
        }
        return self.model_copy(update=kept)

    def base(self) -> Config:
        """The config of all attempts."""
        where = f"the config of study '{self.name}'"
        _refuse_decided(self.config, where)
        sections = {key: value for key, value in self.config.items() if "." not in key}
        dotted = {key: value for key, value in self.config.items() if "." in key}
        return configs.override(configs.build(sections, where), dotted, where)

    def config_of(self, name: str) -> Config:
        """The config of an attempt, without fold, seed, start and targets.

        Raises:
            ConfigError: a key that is unknown, that the study decides, or settings that contradict each other.
        """
        attempt = self.attempts[name]
        _refuse_decided(attempt.set, f"attempt '{name}' of study '{self.name}'")
        changes = {**attempt.set, "fold.controls": attempt.controls, "fold.include_held_out": attempt.include_held_out}
        return configs.override(self.base(), changes, f"attempt '{name}' of study '{self.name}'")


def folds_of(corpus: Corpus, size: int) -> tuple[tuple[str, ...], ...]:
    """Target speakers in groups of `size`, dealt like cards so that like names (and bands) are spread.

    Raises:
        StudyError: a fold would leave no teacher.
    """
    targets = [s for s in corpus.speakers if corpus.role_of(s) == "target"]
    if len(targets) <= size:
        raise StudyError(
            f"{corpus.path} has {len(targets)} target speakers: folds of {size} leave none to be a teacher.",
            "Give fewer --controls at import, or --fold-size 1.",
        )
    count = -(-len(targets) // size)
    return tuple(tuple(targets[start::count]) for start in range(count))


def stages_for(updates: int, recordings: int, config: Config) -> tuple[StageConfig, ...]:
    """The config's stages with epochs scaled so that all together make about `updates` updates."""
    per_epoch = -(-recordings // config.train.batch_size) / config.train.accumulate
    total = sum(stage.epochs for stage in config.train.stages)
    epochs = updates / per_epoch
    return tuple(s.model_copy(update={"epochs": max(1, round(epochs * s.epochs / total))}) for s in config.train.stages)


def load(path: Path) -> Study:
    """Reads and validates a study file.

    Raises:
        StudyError: every wrong key with its place. ConfigError: an attempt's settings are wrong or contradictory.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StudyError(
            f"{path} cannot be read as YAML: {error}.", "Write one with 'xded study new debug'."
        ) from error
    if not isinstance(data, Mapping):
        raise StudyError(f"{path} holds no mapping.", "Write one with 'xded study new debug'.")
    return build(data, str(path))


def build(data: Mapping[str, Any], where: str) -> Study:
    """Validates a mapping into a `Study`, every attempt's config included."""
    try:
        study = Study.model_validate(data)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            place = ".".join(str(part) for part in item["loc"]) or "the study"
            problems.append(f"{place}: {item['msg'].removeprefix('Value error, ')}")
        raise StudyError(f"{where}: " + "; ".join(problems) + ".", "Compare with 'xded study new debug'.") from error
    for name, attempt in study.attempts.items():
        _require_sense(study.config_of(name), attempt, f"{where}: attempt '{name}'")
    return study


def _require_sense(config: Config, attempt: Attempt, who: str) -> None:
    """Raises when parts of an attempt contradict each other or have no effect."""
    listens = uses_targets(config)
    if attempt.teachers != "all" and not listens and attempt.start != "teachers":
        raise StudyError(
            f"{who} chooses teachers ({attempt.teachers}) that it never listens to.",
            "Give it objective.ctc_kd or objective.decoder_kd, or start: teachers, or leave teachers out.",
        )
    if attempt.ask == "mean" and not listens:
        raise StudyError(
            f"{who} asks the mean of its teachers' weights, and never listens.",
            "Give it objective.ctc_kd or objective.decoder_kd, or leave ask out.",
        )
    if listens and attempt.recordings == "shared" and config.target.heard == "same_prompt":
        raise StudyError(
            f"{who} asks teachers about their own speakers' recordings (same_prompt), and some are withheld.",
            "Set target.heard to same_audio, or recordings to all.",
        )
    if listens and attempt.recordings == "shared" and config.target.weighting == "embedding":
        raise StudyError(
            f"{who} weighs teachers by recordings of their speakers (target.weighting: embedding), and some are "
            "withheld.",
            "Set target.weighting to likelihood, or recordings to all.",
        )
    _require_difficulty(config, attempt, who)


def _require_difficulty(config: Config, attempt: Attempt, who: str) -> None:
    """Raises when an attempt's curriculum needs a parent or targets that the attempt does not have."""
    asked = config.train.curriculum
    if asked.schedule == "none":
        return
    if asked.difficulty == "parent" and attempt.start == "scratch":
        raise StudyError(
            f"{who} orders recordings by the parent's loss (train.curriculum.difficulty), and starts from scratch.",
            "Give it start: parent, or set train.curriculum.difficulty to duration, targets or random.",
        )
    if (without := unordered_by_targets(config, config.target.spelled_only)) is not None:
        raise StudyError(f"{who} {without[0]}", without[1])


def uses_targets(config: Config) -> bool:
    """Whether a config's objective needs teachers' targets."""
    return bool(config.objective.kinds)


def _refuse_decided(data: Mapping[str, Any], where: str, prefix: str = "") -> None:
    """Raises for a key, dotted or nested, whose value the study would overwrite."""
    for key, value in data.items():
        if prefix + key in DECIDED:
            raise ConfigError(
                f"{where}: '{prefix}{key}' is decided by {DECIDED[prefix + key]}.", "Take the key out and set that."
            )
        if isinstance(value, Mapping):
            _refuse_decided(value, where, f"{prefix}{key}.")


def built_in(name: str) -> str:
    """The text of a built-in study file.

    Raises:
        StudyError: there is none of that name.
    """
    if name not in BUILT_IN:
        raise StudyError(f"There is no built-in study '{name}'.", f"Choose among {', '.join(BUILT_IN)}.")
    return (Path(__file__).parent / f"{name.replace('-', '_')}.yaml").read_text(encoding="utf-8")
