"""The main job from end to end: parent, teachers, targets, students and baselines on every held-out speaker.

Every target speaker is held out once, in folds of `fold_size`; students are trained with several seeds and
the same number of updates. What comes out is a table with intervals and what it says in words.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xded.config import Config, DecodeConfig
from xded.corpus.folds import Fold, Split, make_fold
from xded.corpus.manifest import Corpus, Recording
from xded.errors import ConfigError
from xded.models.recogniser import load_recogniser
from xded.parallel import run_all
from xded.scoring import Prediction, read_predictions, write_predictions
from xded.study.plan import BEST_TEACHER, ORACLE, VOTE, stages_for
from xded.teachers.adapt import Teachers, parts_of, same_shape, taught_model, teach
from xded.teachers.aggregation import make_targets
from xded.teachers.crosstest import ask_all, best_by_speaker, oracle, vote
from xded.tokenizer import Tokenizer
from xded.training.data import TrainingData
from xded.training.evaluation import recognise, share_seen
from xded.training.job import Job
from xded.training.run import fit
from xded.training.status import clock

ATTEMPTS = (
    "supervised from scratch",
    "supervised from scratch, with control speech",
    "supervised from the parent",
    "student",
    "student from the parent",
)
SAY_EVERY_S = 10.0
DECODES = {"open": DecodeConfig(), "word list": DecodeConfig(word_list=True)}
Results = dict[str, dict[str, list[Prediction]]]  # system -> decode -> predictions over all folds and seeds


@dataclass(frozen=True)
class Plan:
    """What the demo does besides the config.

    Attributes:
        fold_size: speakers held out together; seeds: number of seeds; updates: of every student.
        attempts: which of `ATTEMPTS`; jobs: processes.
    """

    fold_size: int = 2
    seeds: int = 2
    updates: int = 250
    attempts: tuple[str, ...] = ATTEMPTS
    jobs: int = 2


@dataclass(frozen=True)
class Attempt:
    """One student or baseline: a job and where its predictions go."""

    system: str
    seed: int
    job: Job
    test: tuple[Recording, ...]
    word_list: tuple[str, ...]

    def predictions(self, decode: str) -> Path:
        """Where its predictions of a decode mode are kept."""
        return self.job.out / f"predictions_{file_name(decode)}.jsonl"


def file_name(words: str) -> str:
    """The name of a system or decode mode as part of a file name."""
    return words.replace(", ", "_").replace(" ", "_")


def folds_of(corpus: Corpus, size: int) -> list[tuple[str, ...]]:
    """Target speakers in groups of `size`, dealt like cards so that like names (and bands) are spread."""
    targets = [s for s in corpus.speakers if corpus.role_of(s) == "target"]
    if len(targets) <= size:
        raise ConfigError(
            f"{corpus.path} has {len(targets)} target speakers: folds of {size} leave none to be a teacher.",
            "Give fewer --controls at import, or --fold-size 1.",
        )
    count = -(-len(targets) // size)
    return [tuple(targets[start::count]) for start in range(count)]


def require_starts(config: Config, plan: Plan) -> None:
    """Raises when an attempt cannot start from the parent, which is of another size."""
    begun = [name for name in plan.attempts if name.endswith("from the parent")]
    if begun and not same_shape(taught_model(config), config.model):
        raise ConfigError(
            f"'{begun[0]}' cannot start from a parent of another size ({config.teach.size}, teach.size).",
            f"Name the others: {' '.join(f'--attempt {name!r}' for name in ATTEMPTS if name not in begun)}.",
        )


def with_held_out(config: Config, held_out: Sequence[str], *, controls: bool = True) -> Config:
    """The config of a fold."""
    fold = config.fold.model_copy(update={"held_out": tuple(held_out), "controls": controls})
    return config.model_copy(update={"fold": fold})


def attempt_config(system: str, config: Config, parts: Split, plan: Plan, parent: Path, targets: Path) -> Config:
    """The config of one attempt."""
    objective = config.objective
    if not system.startswith("student"):
        objective = objective.supervised
    init = (parent / "best.pt").resolve() if system.endswith("from the parent") else None
    guide = (parent / "best.pt").resolve() if objective.feature_kd else None
    train = config.train.model_copy(update={"init": init, "guide": guide})
    begun = config.model_copy(update={"train": train})
    train = train.model_copy(update={"stages": begun.stages_run})
    scaled = stages_for(plan.updates, len(parts.train), begun.model_copy(update={"train": train}))
    return config.model_copy(
        update={
            "objective": objective,
            "targets": targets.resolve() if system.startswith("student") else None,
            "train": train.model_copy(update={"stages": scaled}),
        }
    )


def run_attempt(attempt: Attempt) -> None:
    """Trains and tests one attempt; what is finished is kept, and refused when it was made with other settings."""
    kept = {decode: attempt.predictions(decode) for decode in DECODES}
    best = fit(attempt.job, resume=True, quiet=True)
    if all(path.is_file() for path in kept.values()):
        return
    recogniser = load_recogniser(best)
    data = TrainingData(attempt.test, recogniser.student.front_end, recogniser.tokenizer)
    for decode, settings in DECODES.items():
        words = attempt.word_list if settings.word_list else None
        write_predictions(
            kept[decode], recognise(recogniser.student, data, settings, word_list=words, seed=attempt.seed)
        )


@dataclass(frozen=True)
class FoldWork:
    """What the attempts of a fold share."""

    fold: Fold
    parts: Split  # with control speech
    without_controls: Split
    teachers: Teachers
    targets: Path
    folder: Path


def prepare_fold(
    corpus: Corpus, config: Config, plan: Plan, held_out: tuple[str, ...], shared: Teachers | None, out: Path
) -> FoldWork:
    """Teachers (unless the folds share them) and targets of one fold."""
    folder = out / "folds" / "_".join(held_out)
    own = with_held_out(config, held_out)
    fold = make_fold(corpus, own.fold)
    teachers = shared or teach(corpus, own, folder / "teachers", jobs=plan.jobs, quiet=True)
    without = parts_of(corpus, fold, with_held_out(config, held_out, controls=False))
    if any(name.startswith("student") for name in plan.attempts):
        make_targets(corpus, teachers, fold, without.train, own, folder / "targets", jobs=plan.jobs)
    return FoldWork(fold, parts_of(corpus, fold, own), without, teachers, folder / "targets", folder)


def attempts_of(corpus: Corpus, config: Config, plan: Plan, work: FoldWork) -> list[Attempt]:
    """All attempts of a fold, for every seed."""
    tokenizer = Tokenizer.load(work.teachers.tokenizer, config.tokenizer.normaliser)
    has_controls = any(r.role == "control" for r in work.parts.train)
    attempts = []
    for seed in range(plan.seeds):
        for system in plan.attempts:
            controls = system.endswith("with control speech")
            if controls and not has_controls:
                continue
            parts = work.parts if controls else work.without_controls
            own = with_held_out(config, work.fold.held_out, controls=controls).model_copy(update={"seed": seed})
            own = attempt_config(system, own, parts, plan, work.teachers.parent, work.targets)
            out = work.folder / f"{file_name(system)}_seed{seed}"
            test_takes = frozenset(r.take for r in parts.test)
            job = Job(system, own, parts.train, parts.validation, work.fold, test_takes, tokenizer, out)
            attempts.append(Attempt(system, seed, job, parts.test, corpus.texts))
    return attempts


def collect(
    corpus: Corpus, config: Config, plan: Plan, work: FoldWork, attempts: Sequence[Attempt], results: Results
) -> None:
    """Adds a fold's predictions to the results: parent, teachers and attempts."""
    asked = {"parent": work.teachers.parent / "best.pt"}
    forbidden = set(work.fold.held_out)
    asked |= {
        f"teacher {s}": work.teachers.teacher(s) / "best.pt" for s in work.teachers.finished if s not in forbidden
    }
    for decode, settings in DECODES.items():
        out = work.folder / "crosstest" / file_name(decode)
        said = ask_all(asked, work.parts.test, settings, corpus.texts, out, plan.jobs)
        teachers = {name: predictions for name, predictions in said.items() if name != "parent"}
        said |= {
            BEST_TEACHER: best_by_speaker(teachers, config.tokenizer.normaliser),
            VOTE: vote(teachers),
            ORACLE: oracle(teachers, config.tokenizer.normaliser),
        }
        for name, predictions in said.items():
            results.setdefault(name, {}).setdefault(decode, []).extend(predictions)
    for attempt in attempts:
        for decode in DECODES:
            predictions = read_predictions(attempt.predictions(decode))
            results.setdefault(attempt.system, {}).setdefault(decode, []).extend(predictions)


@dataclass(frozen=True)
class Outcome:
    """All predictions, and what each stage cost."""

    results: Results
    folds: tuple[tuple[str, ...], ...]
    seconds: Mapping[str, float]
    words_heard: str  # whether training heard the tested words: seen, mixed or unseen


def _progress(total: int, say: Callable[[str], object]) -> Callable[[int], None]:
    """Takes how many of `total` pieces are done and says it, with the time left, every few seconds."""
    begun = last = time.monotonic()

    def done(count: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SAY_EVERY_S:
            last = now
            say(f"  {count} of {total} done, {clock((now - begun) * (total - count) / count)} left")

    return done


def run(
    corpus: Corpus, config: Config, plan: Plan, out: Path, say: Callable[[str], object] = lambda line: None
) -> Outcome:
    """The whole job; resumable: finished teachers, targets and attempts are kept.

    Args:
        corpus, config: as for `xded teach` and `xded train`; `config.fold.held_out` is ignored.
        plan: folds, seeds, updates.
        out: folder for everything; say: takes progress lines.
    """
    folds = folds_of(corpus, plan.fold_size)
    require_starts(config, plan)
    seconds: dict[str, float] = {}
    begun = time.monotonic()
    shared = None
    # a parent that has heard no target speaker, and its teachers, serve all folds, unless they rehearse other speakers
    if config.teach.parent_on == "controls" and not config.teach.rehearsal:
        say(f"parent, then {sum(len(fold) for fold in folds)} teachers ...")
        shared = teach(corpus, with_held_out(config, ()), out / "teachers", jobs=plan.jobs, quiet=True)
        seconds["parent and teachers"] = time.monotonic() - begun
    works = []
    for number, held_out in enumerate(folds, start=1):
        made = "targets" if shared else "parent, teachers and targets"
        say(f"fold {number} of {len(folds)}: {made} without {', '.join(held_out)} ...")
        works.append(prepare_fold(corpus, config, plan, held_out, shared, out))
    seconds["targets" if shared else "parents, teachers and targets"] = time.monotonic() - begun - sum(seconds.values())
    attempts = [attempts_of(corpus, config, plan, work) for work in works]
    flat = [attempt for group in attempts for attempt in group]
    say(f"{len(flat)} students and baselines, {plan.updates} updates each ...")
    run_all(run_attempt, flat, plan.jobs, _progress(len(flat), say))
    seconds["students and baselines"] = time.monotonic() - begun - sum(seconds.values())
    results: Results = {}
    for work, group in zip(works, attempts, strict=True):
        collect(corpus, config, plan, work, group, results)
    seconds["tests"] = time.monotonic() - begun - sum(seconds.values())
    tested = {(work.folder.name, r.text) for work in works for r in work.parts.test}
    heard = {(work.folder.name, r.text) for work in works for r in work.without_controls.train}
    return Outcome(results, tuple(folds), seconds, share_seen(tested, heard))
