"""Runs a study: plan, lock, engine, state; what is finished is never done again."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import yaml

from xded.corpus.manifest import Corpus, read_corpus
from xded.corpus.synthetic import make_embedded_corpus
from xded.errors import CorpusError
from xded.models.checkpoints import sha256_of
from xded.study.engine import LocalWorkers, Progress, Workers, is_done, run
from xded.study.folder import STUDY, locked, read_state, require_format, write_state
from xded.study.imported import imported_results
from xded.study.outcome import Result, collect
from xded.study.plan import Study, StudyError, load
from xded.study.planner import Planner
from xded.study.steps import Kind, Step, Work
from xded.training.loggers import need_packages
from xded.training.loop import InterruptedRunError
from xded.training.status import StatusError, clock, now, read_status, write_atomically

STATE_EVERY_S = 2.0
SAY_EVERY_S = 15.0
TRAINING: tuple[Kind, ...] = ("parent", "teacher", "attempt")  # kinds of pieces that take most of the time
CORPUS = "corpus"  # folder of the embedded corpus
StudyState = Literal["running", "killed", "finished", "failed"]


@dataclass(frozen=True)
class Outcome:
    """A study after a run, or as its folder shows it: what was to be done, what became of it, and the results.

    `minutes` are those of the last call; `state` says whether it is still at work.
    """

    study: Study
    corpus: Corpus
    work: Work
    progress: Progress
    results: tuple[Result, ...]
    minutes: float
    state: StudyState = "finished"

    @property
    def complete(self) -> bool:
        """Whether everything was done."""
        return all(state in ("done", "not needed") for state in self.progress.states.values())


def corpus_of(study: Study, out: Path) -> Corpus:
    """The study's corpus; without one, the embedded corpus of the demo, made in the study's folder."""
    if study.corpus is not None:
        return read_corpus(study.corpus)
    folder = out / CORPUS
    if not (folder / "manifest.jsonl").is_file():
        make_embedded_corpus(folder, controls=8, targets=8, words=10, takes=4, seed=0)
    return read_corpus(folder)


def run_study(
    study: Study,
    out: Path,
    *,
    jobs: int = 1,
    workers: Workers | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Outcome:
    """Does whatever of a study is not done yet.

    Args:
        study: a validated study; out: its folder.
        jobs: pieces at once on this machine; workers: where else (a cluster); they are closed at the end.
        say: takes progress lines.

    Raises:
        XdedError: the plan cannot be carried out (said before any training), or another process is at it.
        InterruptedRunError: it was asked to stop; training that was under way has been saved.
    """
    try:
        return _run(study, out, workers or LocalWorkers(jobs), say)
    except (KeyboardInterrupt, InterruptedRunError) as error:
        raise InterruptedRunError(
            f"Study {study.name} was stopped; what is finished is kept.",
            f"Go on: xded study run {out / STUDY} --out {out}",
        ) from error


def _run(study: Study, out: Path, workers: Workers, say: Callable[[str], object]) -> Outcome:
    with locked(out), closing(workers):  # what is still at work ends before another process may begin
        require_format(out)
        require_loggers(study)
        corpus = corpus_of(study, out)
        require_audio(corpus)
        work = Planner(study, corpus, out).plan()
        _tell_of_unused(out, work, say)
        write_atomically(out / STUDY, to_yaml(study))
        watcher = _Watcher(study, work, out, say, workers.slots)
        progress = run(work.steps, workers, fits=watcher.fits, watch=watcher)
        watcher(progress, final=True)
        results = [*collect(work, progress, corpus.texts, study.base().tokenizer.normaliser), *imported_results(out)]
        minutes = (time.monotonic() - watcher.begun) / 60
        return Outcome(study, corpus, work, progress, tuple(results), minutes, ended(progress))


def require_loggers(study: Study) -> None:
    """Raises when a run of the study would find that a logger's package is missing.

    Raises:
        ConfigError: it is not installed.
    """
    for name in study.attempts:
        config = study.config_of(name)
        need_packages({*config.train.loggers, *config.teach.parent.loggers, *config.teach.teacher.loggers})


def require_audio(corpus: Corpus) -> None:
    """Raises when audio is not what the manifest says; only files are read that are newer than the manifest.

    Raises:
        CorpusError: files were changed after the corpus was made.
    """
    made = corpus.path.stat().st_mtime
    newer = [r for r in corpus.recordings if r.audio_sha256 and r.audio_filepath.stat().st_mtime > made]
    changed = [r.audio_filepath for r in newer if sha256_of(r.audio_filepath) != r.audio_sha256]
    if changed:
        raise CorpusError(
            f"{len(changed)} audio files of {corpus.path} are not what it says, such as {changed[0]} "
            "(its SHA-256 differs).",
            "Put the files back, or import the corpus again: results of other audio belong to another corpus.",
        )


def _tell_of_unused(out: Path, work: Work, say: Callable[[str], object]) -> None:
    """Says that what a folder holds was made for something else; otherwise all would be done again without a word."""
    try:
        state = read_state(out)
    except StudyError:
        return  # it has not begun, or its state will be written anew
    keys = {step.key for step in work.steps}
    unused = [p for p in state["pieces"] if p["state"] == "done" and p["key"] not in keys]
    if unused:
        say(
            f"{len(unused)} finished pieces, such as '{unused[0]['title']}', are for another corpus or other settings "
            "than now; they are kept, and not used."
        )


def to_yaml(study: Study) -> str:
    """The text of OUT/study.yaml; it can be used from anywhere."""
    if study.corpus is not None:
        study = study.model_copy(update={"corpus": study.corpus.resolve()})
    return yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False)


def ended(progress: Progress) -> StudyState:
    """State of a study when its call ends."""
    return "failed" if progress.count("failed") else "finished"


def read_study(out: Path) -> Outcome:
    """A study as its folder shows it, running, killed or finished: nothing is run, and no lock is needed.

    Raises:
        StudyError: no study is there, its corpus is gone, or its finished pieces are not those of its study.yaml.
    """
    state, study = read_state(out), load(out / STUDY)
    if study.corpus is None and not (out / CORPUS).is_dir():
        raise StudyError(f"{out / CORPUS} is gone.", f"Make it again: xded study run {out / STUDY} --out {out}")
    corpus = read_corpus(study.corpus or out / CORPUS)
    work = Planner(study, corpus, out).plan()
    kept = {piece["key"]: piece for piece in state["pieces"]}
    strange = [p["title"] for key, p in kept.items() if p["state"] == "done" and key not in {s.key for s in work.steps}]
    if strange:
        raise StudyError(
            f"{out}: {len(strange)} finished pieces, such as '{strange[0]}', are not those of its {STUDY}: the corpus "
            "or the study has changed, or another version of xded made them.",
            f"Put the old ones back, or run it again: xded study run {out / STUDY} --out {out}",
        )
    progress = _progress_of(work, kept, running=state["state"] == "running")
    results = [*collect(work, progress, corpus.texts, study.base().tokenizer.normaliser), *imported_results(out)]
    begun, last = (datetime.fromisoformat(state[key]) for key in ("started", "heartbeat"))
    return Outcome(study, corpus, work, progress, tuple(results), (last - begun).total_seconds() / 60, state["state"])


def _progress_of(work: Work, kept: dict[str, dict[str, Any]], *, running: bool) -> Progress:
    """What became of each piece: the pieces' own marks say what is done, state.json the rest.

    Args:
        kept: pieces of state.json by key; running: whether the study is still at work.
    """
    progress = Progress({})
    for step in work.steps:
        piece = kept.get(step.key, {})
        state = piece.get("state", "waiting")
        if is_done(step):
            progress.finish(step)
        elif state in ("failed", "left out", "not needed"):
            progress.states[step.key] = state
            if piece.get("error"):
                progress.errors[step.key] = piece["error"]
        else:
            progress.states[step.key] = "running" if state == "running" and running else "waiting"
    return progress


def said_by(step: Step) -> list[float]:
    """Seconds from start to end that a run at work expects of itself, once it has made a step; else nothing."""
    try:
        status = read_status(step.folder)
        begun, end = (datetime.fromisoformat(status[key]) for key in ("started", "expected_finish"))
    except (StatusError, KeyError, TypeError, ValueError):
        return []
    return [(end - begun).total_seconds()] if status["state"] == "running" else []


class _Watcher:
    """Writes the state and says how far it is."""

    def __init__(self, study: Study, work: Work, out: Path, say: Callable[[str], object], slots: int) -> None:
        self.study, self.work, self.out, self.say, self.slots = study, work, out, say, slots
        self.begun = time.monotonic()
        self.started = now()
        self.last_state = self.last_line = -SAY_EVERY_S
        self.shown: dict[str, str] = {}

    def __call__(self, progress: Progress, final: bool = False) -> None:
        elapsed = time.monotonic()
        changed = progress.states != self.shown  # with one slot nothing else is said while a piece runs
        if final or changed or elapsed - self.last_state >= STATE_EVERY_S:
            self.last_state, self.shown = elapsed, dict(progress.states)
            write_state(self.out, self.state(progress, final))
        if elapsed - self.last_line >= SAY_EVERY_S and not final:
            self.last_line = elapsed
            running = [s.title for s in self.work.steps if progress.states[s.key] == "running"]
            self.say(f"{progress.count('done')} of {len(self.work.steps)} pieces done{self._left(progress)}; "
                     f"running: {'; '.join(running) or 'nothing'}")  # fmt: skip

    def _left(self, progress: Progress) -> str:
        seconds = self.left_s(progress)
        return ", time left not known yet" if seconds is None else f", {clock(seconds)} left"

    def fits(self, step: Step, progress: Progress) -> bool:
        """Whether the budget has room for one more piece of the kind, as far as is known what one takes."""
        if self.study.budget.minutes is None:
            return True
        expected_s = self._mean_s(progress).get(step.kind, 0.0)
        return time.monotonic() - self.begun + expected_s <= 60 * self.study.budget.minutes

    def _mean_s(self, progress: Progress) -> dict[str, float]:
        """What finished pieces of each kind took."""
        known: dict[str, list[float]] = {}
        for step in self.work.steps:
            if step.key in progress.seconds:
                known.setdefault(step.kind, []).append(progress.seconds[step.key])
        return {kind: fmean(seconds) for kind, seconds in known.items()}

    def _expected_s(self, progress: Progress) -> dict[str, float]:
        """What a piece of each kind takes, as far as is known: what finished ones took, else what one at work says."""
        known = self._mean_s(progress)
        said: dict[str, list[float]] = {}
        for step in self.work.steps:
            if progress.states[step.key] == "running" and step.kind in TRAINING and step.kind not in known:
                said.setdefault(step.kind, []).extend(said_by(step))
        return known | {kind: fmean(seconds) for kind, seconds in said.items() if seconds}

    def left_s(self, progress: Progress) -> float | None:
        """Seconds left, were all workers busy to the end; none before a training of each kind that is left is known.

        The teachers, which come first, take a fraction of what an attempt does.
        """
        known = self._expected_s(progress)
        left = [s for s in self.work.steps if progress.states[s.key] in ("waiting", "running")]
        if not known or {step.kind for step in left} & set(TRAINING) - known.keys():
            return None
        return sum(known.get(step.kind, fmean(known.values())) for step in left) / self.slots

    def state(self, progress: Progress, final: bool) -> dict[str, Any]:
        """What state.json says."""
        return {
            "study": self.study.name,
            "state": ended(progress) if final else "running",
            "started": self.started,
            "heartbeat": now(),
            "left_s": None if final else self.left_s(progress),
            "pieces": [
                {
                    "key": s.key, "kind": s.kind, "title": s.title, "folder": str(s.folder),
                    "state": progress.states[s.key], "seconds": progress.seconds.get(s.key),
                    "error": progress.errors.get(s.key),
                }
                for s in self.work.steps
            ],
            "cells": [
                {"attempt": c.attempt, "held_out": list(c.held_out), "seed": c.seed, "run": str(c.run), "key": c.key}
                for c in self.work.cells
            ],
        }  # fmt: skip
