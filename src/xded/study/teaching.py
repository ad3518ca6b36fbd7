"""The pieces before the students: parents, teachers, the mean of their weights, posteriors and targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from xded.config import Config, ObjectiveConfig, TeachConfig, TrainConfig
from xded.corpus.manifest import Corpus, Recording
from xded.study.pieces import average_teachers, fit_job, make_targets
from xded.study.plan import Attempt, Study, StudyError
from xded.study.steps import Pieces, key_of, settings
from xded.targets.weighting import PARENT, need_sense
from xded.teachers.adapt import parent_job, taught, teacher_jobs
from xded.teachers.aggregation import listed_words, needs_parent
from xded.teachers.posteriors import extract
from xded.training.job import Job

# of these the parent is independent
KEYS_OF_TEACHERS = ("teach.teacher.", "teach.rehearsal")


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
    """Parent and teachers of a fold, by speaker, and their tokenizer."""

    parent: Made
    teachers: dict[str, Made]
    tokenizer: Path


class Teaching(Pieces):
    """Plans what the students start from or listen to."""

    def __init__(self, study: Study, corpus: Corpus, out: Path) -> None:
        super().__init__(study, corpus, out)
        self._parents: dict[str, Job] = {}
        self._sets: dict[str, dict[str, Made]] = {}
        self._questions: dict[tuple[str | frozenset[str], frozenset[str]], tuple[tuple[Recording, ...], str]] = {}

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
        return TeacherSet(Made(parent_key, parent.out), kept, parent.out.parent / "tokenizer.model")

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

    def targets(
        self, config: Config, train: Sequence[Recording], train_hash: str, found: TeacherSet, chosen: Sequence[str]
    ) -> tuple[str, Path]:
        """Posteriors of every chosen teacher, then the aggregate.

        Teachers are asked about all recordings of the roles that train, held-out speakers too: one piece serves the
        attempts that include them, those that do not, and with shared teachers all folds. About withheld recordings
        nobody is asked for an attempt that goes without them.
        """
        need_sense(config.target)
        # how T moves while the student trains is no concern of what is stored
        still = config.objective.model_copy(update={"temperature_end": None})
        config = config.model_copy(update={"objective": still})
        made = settings(config, "target.top_k", "target.heard", "objective.temperature")
        words = listed_words(self.corpus, config)
        roles, withheld = frozenset(r.role for r in train), frozenset(config.fold.withhold)
        needs, folders, heard_by = [], {}, {}
        council = {speaker: found.teachers[speaker] for speaker in chosen}
        if config.target.asked != "all":
            council[PARENT] = found.parent
        for speaker, teacher in council.items():
            asked, heard = self._asked(speaker if config.target.heard == "same_prompt" else roles, withheld)
            heard_by[speaker] = asked
            key = key_of("posteriors", teacher.key, made, heard, *words)
            folders[speaker] = self.folder("posteriors", key)
            work = partial(extract, teacher.weights, speaker, asked, config, folders[speaker], words)
            title = "posteriors of the parent" if speaker == PARENT else f"posteriors of teacher {speaker}"
            needs.append(self.add(key, "posteriors", title, folders[speaker], (teacher.key,), work))
        parent = found.parent if needs_parent(config) else None
        if parent is not None and parent.key not in needs:
            needs.append(parent.key)
        key = key_of("targets", needs, settings(config, "target.", "objective.temperature"), train_hash)
        folder = self.folder("targets", key)
        work = partial(
            make_targets, folders, heard_by, tuple(train), self.corpus.path, config, folder, found.tokenizer,
            parent.weights if parent else None,
        )  # fmt: skip
        return self.add(key, "targets", f"targets of {len(chosen)} teachers", folder, needs, work), folder

    def _asked(self, whom: str | frozenset[str], withheld: frozenset[str]) -> tuple[tuple[Recording, ...], str]:
        """Recordings of a speaker or of some roles, and their hash; made once, as there may be 100,000 of them."""
        if (whom, withheld) not in self._questions:
            if isinstance(whom, str):
                rows = self.corpus.select(speakers=[whom])
            else:
                rows = tuple(r for r in self.corpus.recordings if r.role in whom and r.speaker not in withheld)
            self._questions[whom, withheld] = rows, self.heard(rows)
        return self._questions[whom, withheld]
