"""Parent and teachers of a fold, in one resumable step.

The parent is trained on the control speakers, on the training speakers of the fold, or on both; each teacher is
the parent adapted to one speaker, so that the CTC spikes of all teachers line up (Kurata & Audhkhasi 2019,
arXiv:1904.08311).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from xded.config import Config, TargetConfig
from xded.corpus.folds import Fold, Split, make_fold, split
from xded.corpus.manifest import Corpus, Recording, by_speaker
from xded.errors import CorpusError, TokenizerError
from xded.models.pretrained import tokenizer_at
from xded.parallel import run_all
from xded.tokenizer import Tokenizer
from xded.training.job import Job
from xded.training.run import fit, is_finished

IMPORTED = "imported.json"  # what was seen of posteriors from elsewhere; written last


def teacher_speakers(corpus: Corpus, fold: Fold) -> tuple[str, ...]:
    """Target speakers of the fold that each get a teacher.

    Raises:
        CorpusError: there are none.
    """
    left_out = set(fold.exclude) if fold.include_held_out else {*fold.held_out, *fold.exclude}
    speakers = tuple(s for s in corpus.speakers if corpus.role_of(s) == "target" and s not in left_out)
    if not speakers:
        raise CorpusError(
            f"The fold without {', '.join(fold.held_out) or 'anyone'} has no target speaker left to be a teacher.",
            "Hold out or exclude fewer speakers, or give fewer --controls at import.",
        )
    return speakers


def parent_recordings(corpus: Corpus, parts: Split, which: str) -> tuple[tuple[Recording, ...], tuple[Recording, ...]]:
    """Training and validation recordings of the parent: `controls`, `fold` (target speakers) or `both`."""
    roles = {"controls": {"control"}, "fold": {"target"}, "both": {"control", "target"}}[which]
    train, validation = (tuple(r for r in part if r.role in roles) for part in (parts.train, parts.validation))
    if not train:
        raise CorpusError(
            f"{corpus.path} has no {' or '.join(sorted(roles))} speaker to train a parent on.",
            "Train it on the fold's speakers: --parent-on fold (xded demo: --set teach.parent_on=fold).",
        )
    return train, validation


def load_or_train_tokenizer(corpus: Corpus, parts: Split, config: Config, path: Path) -> Tokenizer:
    """The tokenizer at `path`; else the config's; else one trained on the texts of the training recordings.

    Raises:
        TokenizerError: the config names another one than lies at `path`, or it cannot write a text (then none is kept).
    """
    texts = {r.text for r in corpus.recordings if r.speaker not in config.fold.exclude}
    named = config.tokenizer.path
    given = None if named is None else tokenizer_at(named, config.tokenizer.normaliser)
    if path.is_file():
        kept = Tokenizer.load(path, config.tokenizer.normaliser)
        if given is not None and given.fingerprint != kept.fingerprint:
            raise TokenizerError(f"{path} is another tokenizer than {named}.", "Choose another --out.")
        kept.self_test(texts)
        return kept
    if given is not None:
        tokenizer = given
    else:
        tokenizer = Tokenizer.train(
            {recording.text for recording in parts.train},
            config.tokenizer.kind,
            config.tokenizer.vocabulary,
            config.tokenizer.normaliser,
        )
    tokenizer.self_test(texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(tokenizer.model_bytes)
    temporary.replace(path)
    return tokenizer


@dataclass(frozen=True)
class Teachers:
    """A folder with a parent and its teachers."""

    folder: Path

    @property
    def parent(self) -> Path:
        """Run folder of the parent."""
        return self.folder / "parent"

    @property
    def tokenizer(self) -> Path:
        """SentencePiece model of parent, teachers and students."""
        return self.folder / "tokenizer.model"

    def teacher(self, speaker: str) -> Path:
        """Run folder of a speaker's teacher."""
        return self.folder / "teachers" / speaker

    @property
    def finished(self) -> tuple[str, ...]:
        """Speakers whose teachers are finished."""
        return tuple(sorted(run.name for run in (self.folder / "teachers").glob("*") if is_finished(run)))

    def posteriors(self, speaker: str) -> Path:
        """Folder of posteriors that another tool's teacher gave."""
        return self.folder / "posteriors" / speaker

    @property
    def imported(self) -> tuple[str, ...]:
        """Speakers whose teachers are known by such posteriors only."""
        return tuple(sorted(report.parent.name for report in self.folder.glob(f"posteriors/*/{IMPORTED}")))


def parts_of(corpus: Corpus, fold: Fold, config: Config) -> Split:
    """The split that the config describes."""
    return split(
        corpus,
        fold,
        controls=config.fold.controls,
        validation=config.fold.validation,
        validation_fraction=config.fold.validation_fraction,
        seed=config.fold.split_seed,
    )


def _fit(job: Job) -> Path:
    return fit(job, resume=True, quiet=True)


def jobs_of(corpus: Corpus, config: Config, out: Path, speakers: Sequence[str] = ()) -> tuple[Job, list[Job]]:
    """The job of the parent, and one of each teacher.

    Args:
        corpus, config: `config.teach` says how; `config.fold` who is held out.
        out: folder of the teachers; the tokenizer is made there when it is missing.
        speakers: only these teachers (default: all target speakers of the fold).

    Raises:
        CorpusError: no speaker for the parent or for any teacher.
    """
    fold = make_fold(corpus, config.fold)
    with_controls = config.model_copy(update={"fold": config.fold.model_copy(update={"controls": True})})
    parts = parts_of(corpus, fold, with_controls)
    # speakers who are kept for validation have nothing to adapt to
    trained = {recording.speaker for recording in parts.train}
    wanted = tuple(speakers) or tuple(s for s in teacher_speakers(corpus, fold) if s in trained)
    teachers = Teachers(out)
    train, validation = parent_recordings(corpus, parts, config.teach.parent_on)
    tokenizer = load_or_train_tokenizer(corpus, parts, config, teachers.tokenizer)
    test_takes = frozenset(r.take for r in parts.test)
    supervised = config.objective.supervised
    # how targets will be made is no concern of the teachers: they are kept when only that changes
    base = config.model_copy(update={"objective": supervised, "targets": None, "target": TargetConfig()})
    parent = base.model_copy(update={"train": config.teach.parent})
    own = Job("parent", parent, train, validation, fold, test_takes, tokenizer, teachers.parent)
    adapted = config.teach.teacher.model_copy(update={"init": (teachers.parent / "best.pt").resolve()})
    trained_on, validated_on = by_speaker(parts.train), by_speaker(parts.validation)
    todo = [
        replace(
            own,
            name=f"teacher {speaker}",
            config=base.model_copy(update={"train": adapted}),
            train=tuple(trained_on.get(speaker, ())),
            validation=tuple(validated_on.get(speaker, ())),
            out=teachers.teacher(speaker),
            facts={},
        )
        for speaker in wanted
    ]
    return own, todo


def teach(
    corpus: Corpus, config: Config, out: Path, *, jobs: int = 1, quiet: bool = False, speakers: Sequence[str] = ()
) -> Teachers:
    """Trains the parent and one teacher a target speaker; finished ones are kept.

    Args:
        corpus, config, out, speakers: as for `jobs_of`.
        jobs: teachers trained at once.
    """
    parent, todo = jobs_of(corpus, config, out, speakers)
    if not quiet:
        names = ", ".join(job.out.name for job in todo)
        print(f"Parent, then one teacher for each of {len(todo)} speakers: {names}", file=sys.stderr)
    fit(parent, resume=True, quiet=quiet)
    for job in todo:
        if is_finished(job.out):
            _fit(job)  # returns at once, or refuses another config: no need for another process
    rest = [job for job in todo if not is_finished(job.out)]

    def say(count: int) -> None:
        if not quiet:
            print(f"{count} of {len(rest)} teachers done", file=sys.stderr, flush=True)

    run_all(_fit, rest, jobs, say)
    return Teachers(out)
