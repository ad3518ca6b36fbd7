"""A whole study planned: every attempt in every fold with every seed, what it needs, and what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from xded.config import Config, TeachConfig, TrainConfig
from xded.corpus.folds import Split, make_fold
from xded.corpus.manifest import Corpus, Recording
from xded.models.pretrained import open_pretrained, tokenizer_at
from xded.study.pieces import ask_about, ask_zero_shot, fit_and_test
from xded.study.plan import (
    PARENT,
    SOUP,
    TEACHER,
    ZERO_SHOT,
    Attempt,
    Study,
    StudyError,
    stages_for,
    uses_targets,
)
from xded.study.steps import Baseline, Cell, Work, decodes_of, key_of, settings, without_targets
from xded.study.teaching import Made, TeacherSet, Teaching
from xded.teachers.adapt import same_shape, taught_model
from xded.tokenizer import Tokenizer
from xded.training.evaluation import share_seen
from xded.training.job import Job

FEWEST_TAKES = 2  # that have an interval


class Planner(Teaching):
    """Plans a study."""

    def __init__(self, study: Study, corpus: Corpus, out: Path) -> None:
        super().__init__(study, corpus, out)
        self.folds = tuple(study.folds(corpus))
        self._parts: dict[str, tuple[Split, list[str]]] = {}
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

    def _closure(self, key: str) -> set[str]:
        """A piece and all that it needs."""
        return {key}.union(*(self._closure(need) for need in self.steps[key].needs))

    def parts(self, config: Config) -> tuple[Split, list[str]]:
        """The split of a fold, and hashes of what is in its three parts."""
        key = config.fold.model_dump_json()
        if key not in self._parts:
            parts = self.split_of(config)
            self._parts[key] = parts, [self.heard(part) for part in (parts.train, parts.validation, parts.test)]
            self._tested |= {(key, recording.text) for recording in parts.test}
            self._trained |= {(key, recording.text) for recording in parts.train}
        return self._parts[key]

    def _check_hypotheses(self) -> None:
        """Raises when a hypothesis rests on so few test takes that there will never be an interval."""
        for name, hypothesis in self.study.hypotheses.items():
            config = self.study.config_of(hypothesis.attempt)
            tested = [self.parts(self.fold_config(config, held_out))[0].test for held_out in self.folds]
            takes = {recording.take for part in tested for recording in part}
            if len(takes) < FEWEST_TAKES:
                raise StudyError(
                    f"No attempt can decide '{name}': '{hypothesis.attempt}' is tested on {len(takes)} take, which "
                    "has no interval.",
                    "Hold out more speakers, or speakers with more takes.",
                )

    # --- attempts -----------------------------------------------------------------------------------------

    def _cell(self, name: str, held_out: tuple[str, ...], seed: int) -> Cell:
        attempt, config = self.study.attempts[name], self.study.config_of(name)
        without = self.withheld(config, held_out) if attempt.recordings == "shared" else ()
        own = self.fold_config(config, held_out, withhold=without)
        own = own.model_copy(update={"seed": seed, "teach": TeachConfig()})
        parts, hashes = self.parts(own)
        hears, guided = uses_targets(own), bool(own.objective.feature_kd)
        needy = hears or guided or attempt.start != "scratch"
        found = self.teachers(self._of_study(config), held_out) if needy else None
        start, needs = self._start(attempt, name, config, found, held_out)
        targets = None
        if found is not None and hears:
            council = self.council(attempt, name, own, found, held_out)
            key, targets = self.targets(own, parts.train, hashes[0], found, council)
            needs.append(key)
        else:
            own = without_targets(own)
        train = own.train.model_copy(update={"init": None if start is None else start.weights})
        if found is not None and guided:
            train = train.model_copy(update={"guide": found.parent.weights})
            needs += [] if found.parent.key in needs else [found.parent.key]
        train = self._for_updates(name, own.model_copy(update={"train": train}), parts)
        own = own.model_copy(update={"train": train, "targets": targets})
        # the same piece may be what an attempt starts from, or its guide
        roles = [{"start": start and start.key, "guide": found.parent.key}] if found is not None and guided else []
        key = key_of("attempt", settings(own), self.given_tokenizer(own), needs, hashes, self.corpus.texts, *roles)
        job = Job(
            name, own, parts.train, parts.validation, make_fold(self.corpus, own.fold),
            frozenset(r.take for r in parts.test), self._tokenizer(own, parts, hashes, found), self.folder("runs", key),
        )  # fmt: skip
        title = f"{name}, {'+'.join(held_out)}, seed {seed}"
        work = partial(fit_and_test, job, parts.test, self.corpus.texts, decodes_of(own), seed)
        self.add(key, "attempt", title, job.out, needs, work)
        return Cell(name, held_out, seed, key, job.out, targets, own.objective.kinds)

    def _of_study(self, config: Config) -> Config:
        """An attempt's config for its parent and teachers: what an attempt changes of the student's training, its
        augmentation, dropout and smoothing, is not changed for them, so that attempts differ in one thing."""
        base = self.study.base()
        model = config.model.model_copy(update={"dropout": base.model.dropout})
        objective = config.objective.model_copy(update={"label_smoothing": base.objective.label_smoothing})
        return config.model_copy(update={"augment": base.augment, "model": model, "objective": objective})

    def _start(
        self, attempt: Attempt, name: str, config: Config, found: TeacherSet | None, held_out: tuple[str, ...]
    ) -> tuple[Made | None, list[str]]:
        """What an attempt begins with (none: from scratch), and the pieces that make it."""
        if attempt.start == "scratch" or found is None:
            return None, []
        if not same_shape(taught_model(config), config.model):
            raise StudyError(
                f"Attempt '{name}' starts from the {attempt.start}, of size {config.teach.size} (teach.size), and its "
                f"own model is of another ({config.model.size or 'as its fields say'}).",
                "Give it start: scratch, or take teach.size out.",
            )
        if attempt.start == "parent":
            start = found.parent
        else:
            start = self.soup(found, self.chosen(attempt, name, found, held_out))
        return start, [start.key]

    def _for_updates(self, name: str, config: Config, parts: Split) -> TrainConfig:
        """The train section with as many epochs as the number of updates of the study, or the attempt's own, takes."""
        updates = self.study.attempts[name].updates or self.study.updates
        if updates is None:
            return config.train
        stages = config.stages_run
        if not stages:
            raise StudyError(
                f"Attempt '{name}' starts from scratch, and every stage of it freezes the encoder.",
                "Give it start: parent, or a stage that trains the encoder.",
            )
        run = config.model_copy(update={"train": config.train.model_copy(update={"stages": stages})})
        return config.train.model_copy(update={"stages": stages_for(updates, len(parts.train), run)})

    def _tokenizer(self, config: Config, parts: Split, hashes: Sequence[str], found: TeacherSet | None) -> Tokenizer:
        """The teachers', the given one, or one made of the training texts (the same texts give the same tokenizer)."""
        section = config.tokenizer
        if found is not None:
            return Tokenizer.load(found.tokenizer, section.normaliser)
        if section.path is not None:
            return tokenizer_at(section.path, section.normaliser)
        key = section.model_dump_json() + hashes[0]
        if key not in self._tokenizers:
            texts = {recording.text for recording in parts.train}
            self._tokenizers[key] = Tokenizer.train(texts, section.kind, section.vocabulary, section.normaliser)
        return self._tokenizers[key]

    # --- baselines ------------------------------------------------------------------------------------------

    def _baselines(self, held_out: tuple[str, ...]) -> list[Baseline]:
        """Parent and teachers of the study's config, tested on the fold; the mean of all teachers' weights, where an
        attempt starts from such a mean.
        """
        config = self.study.base()
        found = self.teachers(config, held_out)
        parts, hashes = self.parts(self.fold_config(config, held_out, include_held_out=False))
        decodes = decodes_of(without_targets(config))
        decoded = {name: how.model_dump(mode="json") for name, how in decodes.items()}
        systems = {PARENT: found.parent}
        if any(attempt.start == "teachers" for attempt in self.study.attempts.values()):
            systems[SOUP] = self.soup(found, list(found.teachers))
        systems |= {f"{TEACHER}{s}": teacher for s, teacher in found.teachers.items()}
        baselines = []
        for system, made in systems.items():
            key = key_of("test", made.key, hashes[2], decoded, self.corpus.texts)
            folder = self.folder("tests", key)
            work = partial(ask_about, made.weights, parts.test, self.corpus.texts, decodes, folder)
            self.add(key, "test", f"test of {system} on {'+'.join(held_out)}", folder, (made.key,), work)
            baselines.append(Baseline(system, held_out, key, folder, made.run))
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
