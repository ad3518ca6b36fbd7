"""Who runs have heard: their data cards, and what their checkpoints, targets and teachers say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor

from xded import config as configs
from xded.checks import data
from xded.checks.data import DataCard
from xded.config import Config
from xded.corpus.folds import Fold, Provenance
from xded.doctor.given import Given
from xded.doctor.run_folder import RunFolder
from xded.errors import XdedError
from xded.findings import Examination
from xded.models.recogniser import provenance_of, tokenizer_of
from xded.scoring import read_predictions
from xded.teachers.adapt import Teachers
from xded.tokenizer import Tokenizer


@dataclass
class Run:
    """What is known of whom a run has heard."""

    path: Path
    config: Config | None
    card: DataCard | None = None
    sources: list[Provenance] = field(default_factory=list)
    tokenizer: Tokenizer | None = None


def read(examination: Examination, given: Given, folder: RunFolder) -> Run:
    """Reads a run's data card and its best (or else any) checkpoint."""
    run = Run(folder.path, folder.config)
    run.card = _card(examination, folder)
    path = folder.checkpoints.get("best.pt") or next(iter(folder.checkpoints.values()), None)
    if path is None:
        return run
    try:
        payload = given.facts(path)
        run.sources = list(provenance_of(payload))
        run.config = run.config or configs.build(payload["config"], f"the config in {path}")
        if isinstance(payload["tokenizer_model"], Tensor):
            run.tokenizer = tokenizer_of(payload, run.config.tokenizer.normaliser)
    except XdedError as error:
        examination.cannot(f"what {path} has heard", str(error))
    except (KeyError, TypeError) as error:
        examination.cannot(f"what {path} has heard", f"it was written by another program or version ({error}).")
    return run


def _card(examination: Examination, run: RunFolder) -> DataCard | None:
    what = f"whose audio {run.path} heard"
    if run.data is None:
        if run.path.is_dir():
            examination.cannot(what, "it has no data.json, which is written at the end of the first epoch.")
        return None
    try:
        return DataCard.model_validate(run.data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        examination.cannot(what, f"data.json is of another shape ({place}: {first['msg']}).")
        return None


def examine(examination: Examination, runs: Sequence[Run], given: Given, same: Mapping[str, str]) -> None:
    """Checks of every run, and of teachers against runs.

    Args:
        same: take -> what was really spoken, for takes that are copies.
    """
    for run in runs:
        if run.card is not None:
            _card_alone(examination, run, run.card, same)
        _leakage(examination, run, given)
    for teachers in given.teachers:
        _tested(examination, teachers, runs)


def _card_alone(examination: Examination, run: Run, card: DataCard, same: Mapping[str, str]) -> None:
    subject, takes = str(run.path), {take for side in card.takes.values() for take in side}
    included = run.config.fold.held_out if run.config and run.config.fold.include_held_out else ()
    examination.run(
        "wrong-audio",
        subject,
        lambda: [*data.wrong_audio(card, subject), *data.never_heard(included, card, subject)],
        f"{sum(card.train.heard.values()):,} recordings of {len(card.train.heard)} speakers",
    )
    examination.run("features", subject, partial(data.flat_features, card, subject))
    copies = {**data.spoken_by_name(takes), **same}
    counts = ", ".join(f"{len(names):,} {side}" for side, names in card.takes.items())
    examination.run("shared-takes", subject, partial(data.shared_takes, card.takes, copies, subject), f"{counts} takes")


def _leakage(examination: Examination, run: Run, given: Given) -> None:
    """Whether a run, its start, its targets or its data have heard what its fold forbids."""
    if run.config is None or not (run.config.fold.held_out or run.config.fold.exclude):
        return
    subject, config, sources = str(run.path), run.config.fold, list(run.sources)
    fold = Fold(config.held_out, config.exclude, config.include_held_out)
    test: frozenset[str] = frozenset()
    if run.card is not None:
        train, takes = run.card.train, run.card.takes
        test = frozenset(takes.get("test", ()))
        speakers = frozenset(train.heard or train.meant)
        sources.append(Provenance("the training data", speakers, frozenset(takes.get("train", ()))))
    for store in given.stores:
        if run.config.targets is not None and store.folder.resolve().parent == run.config.targets.resolve():
            sources += store.index.provenance
    if not sources:
        examination.cannot(f"leakage into {subject}", "neither a checkpoint nor data.json says what it has heard.")
    elif fold.include_held_out and not test:
        why = "it includes the held-out speakers, and nothing says which of their takes are for the test."
        examination.cannot(f"leakage into {subject}", why)
    else:
        unique = tuple(dict.fromkeys(sources))
        detail = data.sources_said(unique, test)
        examination.run("leakage", subject, partial(data.leakage, fold, unique, test, subject), detail)


def _tested(examination: Examination, teachers: Teachers, runs: Sequence[Run]) -> None:
    """Whether runs of the teachers' fold train on takes that the teachers are tested on."""
    tested = _crosstest(examination, teachers)
    parent = next((run.config for run in runs if run.path == teachers.parent), None)
    if not tested or parent is None:
        return
    for run in runs:
        if run.card is None or run.config is None or run.config.fold.held_out != parent.fold.held_out:
            continue
        own = run.path.name if run.path.parent == teachers.folder / "teachers" else None
        of_interest = {name: takes for name, takes in tested.items() if own in (None, name)}
        trained, subject = run.card.takes.get("train", []), str(run.path)
        detail = f"{len(of_interest)} teachers, {len(trained):,} training takes"
        compare = partial(data.teacher_test_block, of_interest, trained, subject)
        examination.run("teacher-test-block", subject, compare, detail)


def _crosstest(examination: Examination, teachers: Teachers) -> dict[str, set[str]]:
    """Takes that each teacher was tested on."""
    tested = {}
    for path in sorted((teachers.folder / "crosstest").glob("*.jsonl")):
        try:
            tested[path.stem] = {prediction.take for prediction in read_predictions(path)}
        except XdedError as error:
            examination.cannot(str(path), str(error))
    return tested
