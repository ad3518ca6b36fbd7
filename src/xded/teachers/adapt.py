"""Parent and teachers of a fold, in one resumable step.

The parent is trained on the control speakers, on the training speakers of the fold, or on both; each teacher is
the parent adapted to one speaker, so that the CTC spikes of all teachers line up (Kurata & Audhkhasi 2019,
arXiv:1904.08311). So that a teacher does not forget everyone else, it may hear some recordings of others again
(rehearsal: Robins 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal", Connection Science 7).
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from xded.config import Config, FoldConfig, ModelConfig, ObjectiveConfig, TargetConfig
from xded.corpus.folds import Fold, Split, make_fold, split
from xded.corpus.manifest import Corpus, Recording
from xded.errors import ConfigError, CorpusError, TokenizerError
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


def parent_recordings(
    corpus: Corpus, parts: Split, which: str, controls: int | None = None
) -> tuple[tuple[Recording, ...], tuple[Recording, ...]]:
    """Training and validation recordings of the parent.

    Args:
        which: `controls`, `fold` (target speakers) or `both`.
        controls: only the first so many control speakers, in alphabetical order (default: all).

    Raises:
        CorpusError: nobody is left, or there are not so many controls. ConfigError: no control is heard at all.
    """
    roles = {"controls": {"control"}, "fold": {"target"}, "both": {"control", "target"}}[which]
    speakers = {r.speaker for r in parts.train if r.role in roles}
    if controls is not None:
        healthy = sorted(s for s in speakers if corpus.role_of(s) == "control")
        if "control" not in roles:
            raise ConfigError(
                "teach.controls counts control speakers, and with teach.parent_on fold the parent hears none.",
                "Take teach.controls out, or set teach.parent_on to both.",
            )
        if len(healthy) < controls:
            raise CorpusError(
                f"The parent is to hear {controls} control speakers; this fold of {corpus.path} trains {len(healthy)}.",
                f"Set teach.controls to at most {len(healthy)}, or take it out.",
            )
        speakers -= set(healthy[controls:])
    train, validation = (tuple(r for r in part if r.speaker in speakers) for part in (parts.train, parts.validation))
    if not train:
        raise CorpusError(
            f"{corpus.path} has no {' or '.join(sorted(roles))} speaker to train a parent on.",
            "Train it on the fold's speakers: --parent-on fold (xded demo: --set teach.parent_on=fold).",
        )
    return train, validation


def taught(config: Config) -> Config:
    """The config that parent and teachers are trained with: their own size, and nothing but the true text.

    How the student listens (targets, consistency, adversary) is no concern of theirs: they are kept when that changes.

    Raises:
        ConfigError: `teach.size` beside a pretrained encoder, which has the size that it has.
    """
    truth = ObjectiveConfig(
        ctc=config.objective.ctc,
        cross_entropy=config.objective.cross_entropy,
        label_smoothing=config.objective.label_smoothing,
        temperature=config.objective.temperature,
    )
    changes = {"objective": truth, "targets": None, "target": TargetConfig(), "model": taught_model(config)}
    return config.model_copy(update=changes)


def taught_model(config: Config) -> ModelConfig:
    """The model of parent and teachers: the student's, or the named size with the student's dropout and heads."""
    size, own = config.teach.size, config.model
    if size is None:
        return own
    if own.pretrained is not None or own.hugging_face is not None:
        raise ConfigError(
            f"teach.size {size} names a Conformer, and model.pretrained gives everyone its own encoder.",
            "Take out one of the two.",
        )
    kept: dict[str, object] = {"dropout": own.dropout, "whiten_layers": own.whiten_layers}
    if own.decoder_layers == 0:
        kept["decoder_layers"] = 0
    return ModelConfig.model_validate({"size": size, **kept})


def same_shape(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether the weights of one model fit into another."""
    weightless = {"size", "dropout", "whiten_layers"}
    return one.model_dump(exclude=weightless) == other.model_dump(exclude=weightless)


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


def parent_job(corpus: Corpus, config: Config, parts: Split, out: Path) -> Job:
    """The job of the parent of a fold.

    Args:
        corpus, config: `config.teach` says how; `config.fold` who is held out or withheld.
        parts: of the fold, controls included.
        out: folder of the teachers; the tokenizer is made there when it is missing.

    Raises:
        CorpusError: no speaker for the parent.
    """
    train, validation = parent_recordings(corpus, parts, config.teach.parent_on, config.teach.controls)
    teachers = Teachers(out)
    tokenizer = load_or_train_tokenizer(corpus, parts, config, teachers.tokenizer)
    own = taught(config).model_copy(update={"train": config.teach.parent})
    test_takes = frozenset(r.take for r in parts.test)
    return Job("parent", own, train, validation, make_fold(corpus, config.fold), test_takes, tokenizer, teachers.parent)


def teacher_jobs(
    corpus: Corpus, config: Config, parts: Split, parent: Job, out: Path, speakers: Sequence[str] = ()
) -> list[Job]:
    """The jobs of the teachers of a fold, each of them the parent adapted to one speaker.

    A teacher of a withheld speaker hears that speaker; others never do. Validation is the own speaker's alone, with
    rehearsal too: what a teacher has kept of the others is shown beside it, and chooses no checkpoint.

    Args:
        corpus, config, parts, out: as for `parent_job`.
        parent: its job; its fold may be another one, which held out nobody.
        speakers: only these (default: all target speakers of the fold).

    Raises:
        CorpusError: no speaker for any teacher.
    """
    fold = make_fold(corpus, config.fold)
    own = parts
    if fold.withhold:
        own = parts_of(corpus, replace(fold, withhold=()), _with_controls(config))
    trained = {recording.speaker for recording in own.train}
    # speakers who are kept for validation have nothing to adapt to
    wanted = tuple(speakers) or tuple(s for s in teacher_speakers(corpus, fold) if s in trained)
    adapted = config.teach.teacher.model_copy(update={"init": (parent.out / "best.pt").resolve()})
    base = taught(config).model_copy(update={"train": adapted})
    heard = {r.speaker for r in parent.train}
    others = [r for r in parts.train if r.role == "target" or r.speaker in heard]
    train, validation = (_of_each(part, wanted) for part in (own.train, own.validation))
    return [
        replace(
            parent,
            name=f"teacher {speaker}",
            config=base.model_copy(update={"fold": _without(config, speaker)}),
            train=(*train[speaker], *rehearsed(others, speaker, len(train[speaker]), config)),
            validation=tuple(validation[speaker]),
            fold=fold,
            test_takes=frozenset(r.take for r in parts.test),
            out=Teachers(out).teacher(speaker),
            facts={},
        )
        for speaker in wanted
    ]


def rehearsed(others: Sequence[Recording], speaker: str, count: int, config: Config) -> tuple[Recording, ...]:
    """Recordings of others that a teacher hears beside its own, in the order given.

    `teach.rehearsal` x `count`, or all where there are not so many, drawn without replacement; the draw depends on
    `config.seed`, the speaker and who else trains.

    Args:
        others: training recordings of the fold's target speakers and of the controls that the parent hears.
        count: recordings of the speaker's own.
    """
    if not config.teach.rehearsal:
        return ()
    pool = [r for r in others if r.speaker != speaker]
    wanted = min(round(config.teach.rehearsal * count), len(pool))
    random = np.random.default_rng([config.seed, zlib.crc32(f"rehearsal of {speaker}".encode())])
    return tuple(pool[place] for place in sorted(random.choice(len(pool), wanted, replace=False)))


def _of_each(recordings: Iterable[Recording], speakers: Sequence[str]) -> dict[str, list[Recording]]:
    rows: dict[str, list[Recording]] = {speaker: [] for speaker in speakers}
    for recording in recordings:
        if recording.speaker in rows:
            rows[recording.speaker].append(recording)
    return rows


def _without(config: Config, speaker: str) -> FoldConfig:
    """The fold of a teacher, from whom its own speaker is not withheld."""
    kept = tuple(s for s in config.fold.withhold if s != speaker)
    return config.fold.model_copy(update={"withhold": kept})


def _with_controls(config: Config) -> Config:
    return config.model_copy(update={"fold": config.fold.model_copy(update={"controls": True})})


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
    parts = parts_of(corpus, fold, _with_controls(config))
    if not speakers:
        teacher_speakers(corpus, fold)  # before a tokenizer is made
    parent = parent_job(corpus, config, parts, out)
    return parent, teacher_jobs(corpus, config, parts, parent, out, speakers)


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
