"""A study as pieces of work with content hashes: what two attempts have in common is one piece, done once.

A piece's key is a hash of everything its result depends on (settings, recordings with their audio's hashes, keys of
what it needs), never of where it lies or when it ran. Its folder is named after the key. Studies that are run in one
folder share their pieces, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from xded.config import Config, DecodeConfig, ObjectiveConfig, TargetConfig, TeachConfig, TrainConfig
from xded.corpus.folds import Split, make_fold
from xded.corpus.manifest import Corpus, Recording
from xded.models.pretrained import fitted, open_pretrained, tokenizer_at
from xded.study.folder import FORMAT
from xded.study.pieces import aggregate_all, ask_about, ask_zero_shot, fit_and_test, fit_job, predictions_in
from xded.study.plan import (
    PARENT,
    TEACHER,
    ZERO_SHOT,
    Attempt,
    DecodeName,
    Study,
    StudyError,
    stages_for,
    uses_targets,
)
from xded.targets.store import audio_hash
from xded.teachers.adapt import Teachers, jobs_of, parts_of
from xded.teachers.posteriors import extract
from xded.tokenizer import Tokenizer
from xded.training.evaluation import share_seen
from xded.training.job import Job
from xded.training.run import PATHS, flat

Kind = Literal["parent", "teacher", "posteriors", "targets", "attempt", "test"]
# on these no result depends, or something else in the key stands for them
PLACE_ONLY = PATHS | {
    f"{section}.{key}"
    for section in ("train", "teach.parent", "teach.teacher")
    for key in ("device", "threads", "loggers", "init")
}
KEY_CHARACTERS = 12  # of a folder's name
FEWEST_TAKES = 2  # that have an interval


@dataclass(frozen=True)
class Step:
    """A piece of work: `work` may run in another process or on another machine that sees the same folders."""

    key: str
    kind: Kind
    title: str
    folder: Path
    needs: tuple[str, ...]
    work: Callable[[], object]


@dataclass(frozen=True)
class Cell:
    """An attempt in one fold with one seed: its run folder and where its predictions are."""

    attempt: str
    held_out: tuple[str, ...]
    seed: int
    key: str
    run: Path

    def predictions(self, decode: DecodeName) -> Path:
        """Predictions of a decode mode."""
        return predictions_in(self.run, decode)


@dataclass(frozen=True)
class Baseline:
    """A recogniser that was there before the students, asked about a fold's test recordings."""

    system: str  # "parent", "teacher M05"
    held_out: tuple[str, ...]
    key: str
    folder: Path

    def predictions(self, decode: DecodeName) -> Path:
        """Predictions of a decode mode."""
        return predictions_in(self.folder, decode)


@dataclass(frozen=True)
class Work:
    """All pieces of a study in an order that satisfies their needs, and where the results will be."""

    steps: tuple[Step, ...]
    cells: tuple[Cell, ...]
    baselines: tuple[Baseline, ...]
    folds: tuple[tuple[str, ...], ...]
    single_runs: int  # steps that there would be if every attempt of every fold and seed were run by itself
    words_heard: str = "unknown"  # whether training has heard the tested words: seen, mixed or unseen


def key_of(*parts: Any) -> str:
    """SHA-256 of JSON-able parts, and of the format of pieces."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True).encode()).hexdigest()


def settings(config: Config, *sections: str) -> dict[str, Any]:
    """Config values on which a result depends: all, or those of some sections; never paths or devices."""
    leaves = flat(config.model_dump(mode="json"))
    kept = {key: value for key, value in leaves.items() if key not in PLACE_ONLY}
    if config.model.pretrained is not None:
        kept["model.pretrained"] = open_pretrained(config.model.pretrained).sha256
    return {key: value for key, value in kept.items() if not sections or key.startswith(sections)}


def decodes_of(config: Config) -> dict[DecodeName, DecodeConfig]:
    """How the outputs of a run are decoded: as its config says, and with the listed words.

    Listed words are scored with both heads, but for a head that the objective never trains.
    """
    objective, weight = config.objective, config.decode.ctc_weight
    if not (objective.ctc or objective.ctc_kd):
        weight = 0.0
    elif not (objective.cross_entropy or objective.decoder_kd):
        weight = 1.0
    listed = {"word_list": True, "ctc_weight": weight}
    return {
        "open": config.decode.model_copy(update={"word_list": False}),
        "word list": config.decode.model_copy(update=listed),
    }


def without_targets(config: Config) -> Config:
    """The config of a supervised run: what is said of targets has no part in it."""
    objective = config.objective
    truth = ObjectiveConfig(
        ctc=objective.ctc, cross_entropy=objective.cross_entropy, label_smoothing=objective.label_smoothing
    )
    return config.model_copy(update={"objective": truth, "target": TargetConfig()})


class Planner:
    """Collects the pieces; a piece that is there already is not added again.

    Args:
        study, corpus: what and on what; out: the study's folder.
    """

    def __init__(self, study: Study, corpus: Corpus, out: Path) -> None:
        self.study, self.corpus, self.out = study, corpus, out.resolve()
        self.folds = tuple(study.folds(corpus))
        self.steps: dict[str, Step] = {}
        self._heard = {r.recording: key_of(r.model_dump(mode="json", exclude={"audio_filepath"}), audio_hash(r))
                       for r in corpus.recordings}  # fmt: skip
        self._everyone = self.heard(corpus.recordings)
        self._parts: dict[str, tuple[Split, list[str]]] = {}
        self._sets: dict[str, TeacherSet] = {}
        self._questions: dict[str | frozenset[str], tuple[tuple[Recording, ...], str]] = {}
        self._tokenizers: dict[str, Tokenizer] = {}
        self._tested: set[tuple[str, str]] = set()  # split and word
        self._trained: set[tuple[str, str]] = set()

    def plan(self) -> Work:
        """Everything: first all folds with the first seed, then with the next one.

        Raises:
            XdedError: a fold or an attempt that cannot be trained, before anything is.
        """
        cells, baselines = [], []
        for seed in self.study.seeds:
            for held_out in self.folds:
                cells += [self._cell(name, held_out, seed) for name in self.study.attempts]
                if self.study.baselines and seed == self.study.seeds[0]:
                    baselines += self._baselines(held_out)
        self._check_hypotheses()
        closures = [self._closure(cell.key) for cell in cells]
        wanted = set().union(*closures, *(self._closure(baseline.key) for baseline in baselines))
        steps = tuple(step for key, step in self.steps.items() if key in wanted)  # not teachers that nobody listens to
        order = {name: place for place, name in enumerate(self.study.attempts)}
        cells.sort(key=lambda cell: (self.folds.index(cell.held_out), order[cell.attempt]))
        alone = sum(map(len, closures)) + len(baselines)
        words_heard = share_seen(self._tested, self._trained)
        return Work(steps, tuple(cells), tuple(baselines), self.folds, alone, words_heard)

    def add(
        self, key: str, kind: Kind, title: str, folder: Path, needs: Sequence[str], work: Callable[[], object]
    ) -> str:
        """Adds a piece unless it is there."""
        self.steps.setdefault(key, Step(key, kind, title, folder, tuple(needs), work))
        return key

    def folder(self, kind: str, key: str) -> Path:
        """Folder of a piece."""
        return self.out / "pieces" / kind / key[:KEY_CHARACTERS]

    def heard(self, recordings: Iterable[Recording]) -> str:
        """What a result depends on of recordings: their order, their audio and all that the manifest says of them."""
        return hashlib.sha256("".join(self._heard[r.recording] for r in recordings).encode()).hexdigest()

    def _closure(self, key: str) -> set[str]:
        """A piece and all that it needs."""
        return {key}.union(*(self._closure(need) for need in self.steps[key].needs))

    def _fold_config(self, config: Config, held_out: Sequence[str], **changes: Any) -> Config:
        fold = config.fold.model_copy(update={"held_out": tuple(held_out), **changes})
        return fitted(config.model_copy(update={"fold": fold, "corpus": self.corpus.path}))

    def parts(self, config: Config) -> tuple[Split, list[str]]:
        """The split of a fold, and hashes of what is in its three parts."""
        key = config.fold.model_dump_json()
        if key not in self._parts:
            parts = parts_of(self.corpus, make_fold(self.corpus, config.fold), config)
            self._parts[key] = parts, [self.heard(part) for part in (parts.train, parts.validation, parts.test)]
            self._tested |= {(key, recording.text) for recording in parts.test}
            self._trained |= {(key, recording.text) for recording in parts.train}
        return self._parts[key]

    def _check_hypotheses(self) -> None:
        """Raises when a hypothesis rests on so few test takes that there will never be an interval."""
        for name, hypothesis in self.study.hypotheses.items():
            config = self.study.config_of(hypothesis.attempt)
            tested = [self.parts(self._fold_config(config, held_out))[0].test for held_out in self.folds]
            takes = {recording.take for part in tested for recording in part}
            if len(takes) < FEWEST_TAKES:
                raise StudyError(
                    f"No attempt can decide '{name}': '{hypothesis.attempt}' is tested on {len(takes)} take, which "
                    "has no interval.",
                    "Hold out more speakers, or speakers with more takes.",
                )

    # --- parent and teachers ----------------------------------------------------------------------------

    def _teachers(self, config: Config, held_out: tuple[str, ...]) -> TeacherSet:
        """Parent and teachers of a fold; a parent that hears controls only is the same for all folds without them."""
        controls_only = config.teach.parent_on == "controls"
        shared = controls_only and all(self.corpus.role_of(speaker) == "target" for speaker in held_out)
        own = self._fold_config(config, () if shared else held_out, include_held_out=False, controls=True)
        own = without_targets(own).model_copy(update={"train": TrainConfig()})
        key = key_of("teachers", settings(own), self._given_tokenizer(own), self._everyone)
        if key not in self._sets:
            self._sets[key] = self._teacher_set(own, key)
        everyone = self._sets[key]
        # a teacher of a held-out speaker has heard the takes that the fold is tested on
        keys = {speaker: made for speaker, made in everyone.keys.items() if speaker not in held_out}
        if not keys:
            raise StudyError(f"The fold without {', '.join(held_out)} has no teacher.", "Hold out fewer speakers.")
        return replace(everyone, keys=keys)

    def _teacher_set(self, config: Config, set_key: str) -> TeacherSet:
        folder = self.folder("teachers", set_key)
        # a run's own config says how it is made; how others are made is no concern of it
        first, others = jobs_of(self.corpus, config, folder)
        parent, *teachers = (
            replace(job, config=job.config.model_copy(update={"teach": TeachConfig()})) for job in (first, *others)
        )
        parent_key = self.add(key_of("parent", set_key), "parent", parent.name, parent.out, (),
                              partial(fit_job, parent))  # fmt: skip
        keys = {}
        for job in teachers:
            speaker = job.out.name
            key = key_of("teacher", set_key, speaker)
            keys[speaker] = self.add(key, "teacher", job.name, job.out, (parent_key,), partial(fit_job, job))
        return TeacherSet(Teachers(folder), parent_key, keys)

    def _chosen(self, attempt: Attempt, name: str, teachers: TeacherSet, held_out: tuple[str, ...]) -> list[str]:
        """Speakers whose teachers an attempt listens to."""
        if attempt.teachers == "all":
            return list(teachers.keys)
        if attempt.teachers == "band":
            bands = {self.corpus.band_of(s) for s in held_out}
            chosen = [s for s in teachers.keys if self.corpus.band_of(s) in bands]
        else:
            self.corpus.require(attempt.teachers)
            strange = [s for s in attempt.teachers if s not in teachers.keys and s not in held_out]
            if strange:
                raise StudyError(
                    f"Attempt '{name}' is to listen to the teacher of {strange[0]}, and there is none: "
                    "controls, excluded and validation speakers have no teacher.",
                    f"Choose among {', '.join(teachers.keys)}, or all.",
                )
            chosen = [s for s in teachers.keys if s in attempt.teachers]
        if not chosen:
            raise StudyError(
                f"Attempt '{name}' has no teacher in the fold without {', '.join(held_out)}.", "Choose others, or all."
            )
        return chosen

    def _targets(
        self,
        config: Config,
        train: Sequence[Recording],
        train_hash: str,
        teachers: TeacherSet,
        chosen: Sequence[str],
    ) -> tuple[str, Path]:
        """Posteriors of every chosen teacher, then the aggregate.

        Teachers are asked about all recordings of the roles that train, held-out speakers too: one piece serves the
        attempts that include them, those that do not, and with shared teachers all folds.
        """
        made = settings(config, "target.top_k", "target.heard", "objective.temperature")
        roles = frozenset(r.role for r in train)
        needs, folders, heard_by = [], {}, {}
        for speaker in chosen:
            asked, heard = self._asked(speaker if config.target.heard == "same_prompt" else roles)
            heard_by[speaker] = asked
            key = key_of("posteriors", teachers.keys[speaker], made, heard)
            folders[speaker] = self.folder("posteriors", key)
            best = teachers.folder.teacher(speaker) / "best.pt"
            work = partial(extract, best, speaker, asked, config, folders[speaker])
            needs.append(
                self.add(key, "posteriors", f"posteriors of teacher {speaker}", folders[speaker],
                         (teachers.keys[speaker],), work)
            )  # fmt: skip
        key = key_of("targets", needs, settings(config, "target.", "objective.temperature"), train_hash)
        folder = self.folder("targets", key)
        work = partial(aggregate_all, folders, heard_by, tuple(train), self.corpus.path, config, folder)
        return self.add(key, "targets", f"targets of {len(chosen)} teachers", folder, needs, work), folder

    def _asked(self, whom: str | frozenset[str]) -> tuple[tuple[Recording, ...], str]:
        """Recordings of a speaker or of some roles, and their hash; made once, as there may be 100,000 of them."""
        if whom not in self._questions:
            if isinstance(whom, str):
                rows = self.corpus.select(speakers=[whom])
            else:
                rows = tuple(r for r in self.corpus.recordings if r.role in whom)
            self._questions[whom] = rows, self.heard(rows)
        return self._questions[whom]

    # --- attempts -----------------------------------------------------------------------------------------

    def _cell(self, name: str, held_out: tuple[str, ...], seed: int) -> Cell:
        attempt, config = self.study.attempts[name], self.study.config_of(name)
        own = self._fold_config(config, held_out).model_copy(update={"seed": seed, "teach": TeachConfig()})
        fold = make_fold(self.corpus, own.fold)
        parts, hashes = self.parts(own)
        hears, from_parent = uses_targets(own), attempt.start == "parent"
        teachers = self._teachers(config, held_out) if hears or from_parent else None
        needs: list[str] = []
        init = targets = None
        if from_parent:
            assert teachers is not None
            init = teachers.folder.parent / "best.pt"
            needs.append(teachers.parent_key)
        if hears:
            assert teachers is not None
            chosen = self._chosen(attempt, name, teachers, held_out)
            key, targets = self._targets(config, parts.train, hashes[0], teachers, chosen)
            needs.append(key)
        else:
            own = without_targets(own)
        train = own.train.model_copy(update={"init": init})
        if self.study.updates is not None:
            stages = own.model_copy(update={"train": train}).stages_run
            if not stages:
                raise StudyError(
                    f"Attempt '{name}' starts from scratch, and every stage of it freezes the encoder.",
                    "Give it start: parent, or a stage that trains the encoder.",
                )
            plain = own.model_copy(update={"train": train.model_copy(update={"stages": stages})})
            train = train.model_copy(update={"stages": stages_for(self.study.updates, len(parts.train), plain)})
        own = own.model_copy(update={"train": train, "targets": targets})
        key = key_of("attempt", settings(own), self._given_tokenizer(own), needs, hashes, self.corpus.texts)
        job = Job(
            name, own, parts.train, parts.validation, fold, frozenset(r.take for r in parts.test),
            self._tokenizer(own, parts, hashes, teachers), self.folder("runs", key),
        )  # fmt: skip
        title = f"{name}, {'+'.join(held_out)}, seed {seed}"
        work = partial(fit_and_test, job, parts.test, self.corpus.texts, decodes_of(own), seed)
        self.add(key, "attempt", title, job.out, needs, work)
        return Cell(name, held_out, seed, key, job.out)

    def _given_tokenizer(self, config: Config) -> str | None:
        """Hash of the tokenizer that the config names; one that is trained follows from settings and recordings."""
        path = config.tokenizer.path
        if path is None:
            return None
        return hashlib.sha256(tokenizer_at(path, config.tokenizer.normaliser).model_bytes).hexdigest()

    def _tokenizer(self, config: Config, parts: Split, hashes: Sequence[str], teachers: TeacherSet | None) -> Tokenizer:
        """The teachers', the given one, or one made of the training texts (the same texts give the same tokenizer)."""
        section = config.tokenizer
        if teachers is not None:
            return Tokenizer.load(teachers.folder.tokenizer, section.normaliser)
        if section.path is not None:
            return tokenizer_at(section.path, section.normaliser)
        key = section.model_dump_json() + hashes[0]
        if key not in self._tokenizers:
            texts = {recording.text for recording in parts.train}
            self._tokenizers[key] = Tokenizer.train(texts, section.kind, section.vocabulary, section.normaliser)
        return self._tokenizers[key]

    # --- baselines ------------------------------------------------------------------------------------------

    def _baselines(self, held_out: tuple[str, ...]) -> list[Baseline]:
        """Parent and teachers of the study's config, tested on the fold."""
        config = self.study.base()
        teachers = self._teachers(config, held_out)
        parts, hashes = self.parts(self._fold_config(config, held_out, include_held_out=False))
        decodes = decodes_of(without_targets(config))
        decoded = {name: how.model_dump(mode="json") for name, how in decodes.items()}
        systems = {PARENT: (teachers.parent_key, teachers.folder.parent)}
        systems |= {f"{TEACHER}{s}": (key, teachers.folder.teacher(s)) for s, key in teachers.keys.items()}
        baselines = []
        for system, (made, run) in systems.items():
            key = key_of("test", made, hashes[2], decoded, self.corpus.texts)
            folder = self.folder("tests", key)
            work = partial(ask_about, run / "best.pt", parts.test, self.corpus.texts, decodes, folder)
            title = f"test of {system} on {'+'.join(held_out)}"
            self.add(key, "test", title, folder, (made,), work)
            baselines.append(Baseline(system, held_out, key, folder))
        return [*self._zero_shot(config, held_out, parts.test, hashes[2]), *baselines]

    def _zero_shot(
        self, config: Config, held_out: tuple[str, ...], test: Sequence[Recording], test_hash: str
    ) -> list[Baseline]:
        """The pretrained model by itself, where it is a recogniser and no bare encoder."""
        path = config.model.pretrained
        if path is None or not open_pretrained(path).recognises:
            return []
        key = key_of("zero-shot", open_pretrained(path).sha256, test_hash, self.corpus.texts)
        folder = self.folder("tests", key)
        work = partial(ask_zero_shot, path, test, self.corpus.texts, folder)
        self.add(key, "test", f"test of {ZERO_SHOT} on {'+'.join(held_out)}", folder, (), work)
        return [Baseline(ZERO_SHOT, held_out, key, folder)]


@dataclass(frozen=True)
class TeacherSet:
    """Parent and teachers of a fold: where they lie, and the keys of the pieces that make them."""

    folder: Teachers
    parent_key: str
    keys: dict[str, str]
