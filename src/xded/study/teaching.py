"""The pieces before the students: parents, teachers, the mean of their weights, posteriors and targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from xded.config import Config, ObjectiveConfig, TeachConfig, TrainConfig
from xded.corpus.manifest import Corpus, Recording
from xded.study.pieces import average_teachers, fit_job, make_targets
from xded.study.plan import Attempt, Study, StudyError
from xded.study.steps import Pieces, key_of, settings
from xded.targets.asking import PARENT, questions
from xded.targets.weighting import need_sense
from xded.teachers.adapt import parent_job, taught, teacher_jobs
from xded.teachers.aggregation import listed_words, needs_parent
from xded.teachers.posteriors import extract
from xded.training.job import Job

# of these the parent is independent
KEYS_OF_TEACHERS = ("teach.teacher.", "teach.rehearsal")
MEAN = "mean"  # asked in place of the teachers
UNNAMED = {PARENT: "the parent", MEAN: "the mean of the teachers' weights"}  # who is asked and is nobody's teacher


@dataclass(frozen=True)
class Made:
    """A recogniser that a piece makes: the piece's key, and the folder of its best.pt."""

    key: str
    run: Path

    @property
    def weights(self) -> Path:
        """Its checkpoint."""
        return self.run / "best.pt"


@dataclass(frozen=True)
class TeacherSet:
    """Parent and teachers of a fold, by speaker, and their tokenizer; `everywhere`: they serve other folds too."""

    parent: Made
    teachers: dict[str, Made]
    tokenizer: Path
    everywhere: bool


class Teaching(Pieces):
    """Plans what the students start from or listen to."""

    def __init__(self, study: Study, corpus: Corpus, out: Path) -> None:
        super().__init__(study, corpus, out)
        self._parents: dict[str, Job] = {}
        self._sets: dict[str, dict[str, Made]] = {}
        self._spoken: dict[tuple[frozenset[str], frozenset[str]], tuple[tuple[Recording, ...], str]] = {}

    def withheld(self, config: Config, held_out: Sequence[str]) -> tuple[str, ...]:
        """Whose recordings do not travel in a fold."""
        return self.study.withheld(self.corpus, held_out, config.fold.exclude)

    def teachers(self, config: Config, held_out: tuple[str, ...]) -> TeacherSet:
        """Parent and teachers of a fold.

        A parent that hears controls only is the same for all folds that hold out target speakers, and so are its
        teachers, unless they rehearse: then those of another fold would have heard this one's held-out speakers.
        """
        controls_only = config.teach.parent_on == "controls"
        shared = controls_only and all(self.corpus.role_of(speaker) == "target" for speaker in held_out)
        withheld = self.withheld(config, held_out)
        usual = {"include_held_out": False, "controls": True}
        of_parent = self._plain(
            self.fold_config(config, () if shared else held_out, withhold=() if controls_only else withheld, **usual)
        )
        of_teachers = of_parent
        if config.teach.rehearsal:
            of_teachers = self._plain(self.fold_config(config, held_out, withhold=withheld, **usual))
        parent, parent_key = self._parent(of_parent)
        made = self._adapted(of_teachers, parent, parent_key)
        # a teacher of a held-out speaker has heard the takes that the fold is tested on
        kept = {speaker: teacher for speaker, teacher in made.items() if speaker not in held_out}
        if not kept:
            raise StudyError(f"The fold without {', '.join(held_out)} has no teacher.", "Hold out fewer speakers.")
        everywhere = shared and not config.teach.rehearsal
        return TeacherSet(Made(parent_key, parent.out), kept, parent.out.parent / "tokenizer.model", everywhere)

    def _plain(self, config: Config) -> Config:
        """What parent and teachers depend on: nothing that is said of the students' training or listening."""
        config = taught(config)
        objective = config.objective.model_copy(update={"temperature": ObjectiveConfig().temperature})
        teach = config.teach.model_copy(update={"size": None})  # the model says it now
        return config.model_copy(update={"objective": objective, "train": TrainConfig(), "teach": teach})

    def _parent(self, config: Config) -> tuple[Job, str]:
        known = {name: value for name, value in settings(config).items() if not name.startswith(KEYS_OF_TEACHERS)}
        key = key_of("parent", known, self.given_tokenizer(config), self.everyone)
        if key not in self._parents:
            job = parent_job(self.corpus, config, self.split_of(config), self.folder("parents", key))
            # a run's own config says how it is made; how others are made is no concern of it
            job = replace(job, config=job.config.model_copy(update={"teach": TeachConfig()}))
            self._parents[key] = job
            self.add(key, "parent", job.name, job.out, (), partial(fit_job, job))
        return self._parents[key], key

    def _adapted(self, config: Config, parent: Job, parent_key: str) -> dict[str, Made]:
        set_key = key_of("teachers", parent_key, settings(config))
        if set_key not in self._sets:
            folder, parts = self.folder("teachers", set_key), self.split_of(config)
            made = {}
            for job in teacher_jobs(self.corpus, config, parts, parent, folder):
                own = replace(job, config=job.config.model_copy(update={"teach": TeachConfig()}))
                speaker = own.out.name
                key = key_of("teacher", set_key, speaker)
                made[speaker] = Made(key, own.out)
                self.add(key, "teacher", own.name, own.out, (parent_key,), partial(fit_job, own))
            self._sets[set_key] = made
        return self._sets[set_key]

    def chosen(self, attempt: Attempt, name: str, found: TeacherSet, held_out: tuple[str, ...]) -> list[str]:
        """Speakers whose teachers an attempt listens to, or starts from."""
        there = list(found.teachers)
        if attempt.teachers == "all":
            return there
        if attempt.teachers == "band":
            bands = {self.corpus.band_of(s) for s in held_out}
            chosen = [s for s in there if self.corpus.band_of(s) in bands]
        else:
            self.corpus.require(attempt.teachers)
            strange = [s for s in attempt.teachers if s not in there and s not in held_out]
            if strange:
                raise StudyError(
                    f"Attempt '{name}' is to listen to the teacher of {strange[0]}, and there is none: "
                    "controls, excluded and validation speakers have no teacher.",
                    f"Choose among {', '.join(there)}, or all.",
                )
            chosen = [s for s in there if s in attempt.teachers]
        if not chosen:
            raise StudyError(
                f"Attempt '{name}' has no teacher in the fold without {', '.join(held_out)}.", "Choose others, or all."
            )
        return chosen

    def soup(self, found: TeacherSet, chosen: Sequence[str]) -> Made:
        """The mean of some teachers' weights; of a single one, that teacher."""
        made = [found.teachers[speaker] for speaker in chosen]
        if len(made) == 1:
            return made[0]
        key = key_of("soup", [teacher.key for teacher in made])
        folder = self.folder("soups", key)
        work = partial(average_teachers, tuple(teacher.weights for teacher in made), folder)
        self.add(key, "soup", f"mean of {len(made)} teachers' weights", folder, [t.key for t in made], work)
        return Made(key, folder)

    def council(
        self, attempt: Attempt, name: str, config: Config, found: TeacherSet, held_out: tuple[str, ...]
    ) -> dict[str, Made]:
        """Who is asked for an attempt's targets: its teachers by speaker, or the mean of their weights.

        Raises:
            StudyError: teachers are told apart, and the mean of their weights is one recogniser.
        """
        chosen = self.chosen(attempt, name, found, held_out)
        if attempt.ask == "each":
            return {speaker: found.teachers[speaker] for speaker in chosen}
        usual = {"weighting": "uniform", "asked": "all", "heard": "same_audio"}
        for key, value in usual.items():
            if getattr(config.target, key) != value:
                raise StudyError(
                    f"Attempt '{name}' asks the mean of its teachers' weights, and target.{key} "
                    f"{getattr(config.target, key)} tells teachers apart.",
                    f"Give it target.{key}: {value}, or ask: each.",
                )
        return {MEAN: self.soup(found, chosen)}

    def targets(
        self,
        config: Config,
        train: Sequence[Recording],
        train_hash: str,
        found: TeacherSet,
        teachers: Mapping[str, Made],
    ) -> tuple[str, Path]:
        """Posteriors of every teacher of a council, then the aggregate.

        Teachers are asked about all recordings of the roles that train, so that one piece serves many attempts: about
        held-out speakers too where attempts include them, or teachers serve the folds that train on them. About
        withheld recordings nobody is asked for an attempt that goes without them. What else a teacher was asked
        changes no target: targets know it by what it would say of everything.
        """
        need_sense(config.target)
        # how T moves while the student trains is no concern of what is stored
        still = config.objective.model_copy(update={"temperature_end": None})
        config = config.model_copy(update={"objective": still})
        made = settings(config, "target.top_k", "target.heard", "objective.temperature")
        words = listed_words(self.corpus, config)
        roles, withheld = frozenset(r.role for r in train), frozenset(config.fold.withhold)
        included = found.everywhere or any(attempt.include_held_out for attempt in self.study.attempts.values())
        useless = frozenset(() if included else config.fold.held_out)
        pool, of_pool = self._spoken_by(roles, withheld | useless)
        asked = questions(self.corpus, list(teachers), pool, config.target)
        council = dict(teachers)
        if config.target.asked != "all":
            council[PARENT] = found.parent
        needs, known, folders = [], [], {}
        for speaker, teacher in council.items():
            rows = asked.get(speaker, ())
            heard = of_pool if rows is pool else self.heard(rows)
            widest = heard if config.target.heard == "same_prompt" else self._spoken_by(roles, withheld)[1]
            known.append(key_of("posteriors", teacher.key, made, widest, *words))
            if rows:
                key = key_of("posteriors", teacher.key, made, heard, *words)
                folders[speaker] = self.folder("posteriors", key)
                work = partial(extract, teacher.weights, speaker, rows, config, folders[speaker], words)
                title = f"posteriors of {UNNAMED.get(speaker, f'teacher {speaker}')}"
                needs.append(self.add(key, "posteriors", title, folders[speaker], (teacher.key,), work))
        parent = found.parent if needs_parent(config) else None
        of_parent = [] if parent is None else [parent.key]
        told = settings(config, "target.", "objective.temperature")
        key, needs = key_of("targets", [*known, *of_parent], told, train_hash), [*needs, *of_parent]
        folder = self.folder("targets", key)
        work = partial(
            make_targets, folders, asked, tuple(train), self.corpus.path, config, folder, found.tokenizer,
            parent.weights if parent else None,
        )  # fmt: skip
        return self.add(key, "targets", f"targets of {len(teachers)} teachers", folder, needs, work), folder

    def _spoken_by(self, roles: frozenset[str], without: frozenset[str]) -> tuple[tuple[Recording, ...], str]:
        """Recordings of some roles, and their hash; made once, as there may be 100,000 of them."""
        if (roles, without) not in self._spoken:
            rows = tuple(r for r in self.corpus.recordings if r.role in roles and r.speaker not in without)
            self._spoken[roles, without] = rows, self.heard(rows)
        return self._spoken[roles, without]
