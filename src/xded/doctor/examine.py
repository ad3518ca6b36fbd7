"""`xded doctor`: recognises what was given, adds what that names, runs every check that can be run."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path

from xded import evaluations
from xded.checks import tokens
from xded.checks.training import heads_of
from xded.corpus.manifest import MANIFEST_NAME
from xded.doctor import corpora, listings, posteriors, probes, results, runs
from xded.doctor.given import Given
from xded.doctor.run_folder import RunFolder, looks_like_run, read_run
from xded.errors import ConfigError, XdedError
from xded.evaluations import read_evaluation
from xded.findings import Examination
from xded.models.recogniser import load_recogniser
from xded.targets.store import Store
from xded.teachers.adapt import Teachers
from xded.tokenizer import Tokenizer

NORMALISER = "upper"  # of a tokenizer file given alone: the study's; runs say their own
TOKENIZER_SUFFIXES = (".model", ".ckpt")
TOKENIZER_NAMES = ("tokenizer.json", "vocab.json", "tokens.txt")
LARGEST_TOKENIZER = 20_000_000  # bytes; a .ckpt may be gigabytes of weights
DEEPEST = 6  # folders below a folder that was given
LARGEST_JSON = 500_000_000  # bytes
EXPECTED = (
    "expected a corpus, a tokenizer, teachers, posteriors or targets, a run folder, a checkpoint, an evaluation or "
    "predictions file, a metadata file or difficulty scores"
)


def examine_all(paths: Sequence[Path], *, probe: bool = False, seed: int = 0) -> Examination:
    """Examines files and folders together; nothing is modified.

    Args:
        paths: what to examine, of any kind.
        probe: also run the active probes on every run that has a checkpoint and a corpus (minutes).
        seed: of the samples and of the probes.

    Raises:
        ConfigError: a path does not exist.
    """
    absent = [str(path) for path in paths if not path.exists()]
    if absent:
        raise ConfigError(f"{', '.join(absent)}: no such file or folder.", "Check the path.")
    examination, given = Examination(), Given()
    gatherer = Gatherer(examination, given)
    for path in paths:
        if not gatherer.take(path.resolve()):
            examination.cannot(str(path), f"its shape is unknown; {EXPECTED}.")
    gatherer.add_related()
    for examine in (corpora.examine, posteriors.examine, runs.examine, results.examine):
        examine(examination, given)
    for run in given.runs:
        if probe:
            probe_run(examination, run, given, seed)
        elif run.config is not None and "decoder" in heads_of(run.config.decode):
            probe_run(examination, run, given, seed, only=("attention",))  # a second; the others take minutes
    return examination


class Gatherer:
    """Sorts paths into `given`; each is read once, and what cannot be read is noted."""

    def __init__(self, examination: Examination, given: Given) -> None:
        self.examination, self.given = examination, given
        self.seen: set[Path] = set()

    def take(self, path: Path, depth: int = 0) -> bool:
        """Recognises a path, or what lies below it; whether anything was."""
        if path in self.seen:
            return True
        known = self._folder(path) if path.is_dir() else self._file(path)
        if known or not path.is_dir() or depth == DEEPEST:
            return known
        inside = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
        taken = [self.take(entry, depth + 1) for entry in inside]
        return any(taken)

    def _try(self, path: Path, read: Callable[[], None]) -> bool:
        """Reads something that was recognised; an error is noted, the rest goes on."""
        self.seen.add(path)
        try:
            read()
        except (XdedError, OSError) as error:
            self.examination.cannot(str(path), str(error))
        return True

    def _folder(self, path: Path) -> bool:
        if (path / MANIFEST_NAME).is_file():
            return self._try(path, lambda: self._corpus(path))
        stores = posteriors.stores_in(path)
        if stores:
            self.seen.add(path)
            for store in stores:
                self._try(store, lambda store=store: self._store(store))  # type: ignore[misc]
            return True
        if (path / "teachers").is_dir() and (path / "parent").is_dir():
            self.seen.add(path)
            self.given.teachers.append(Teachers(path))
            for run in (path / "parent", *sorted((path / "teachers").iterdir())):
                self.take(run)
            return True
        if looks_like_run(path):
            return self._try(path, lambda: self._run(path))
        return False

    def _file(self, path: Path) -> bool:
        if path.name == MANIFEST_NAME or (path.suffix == ".jsonl" and corpora.is_manifest(path)):
            return self._try(path, lambda: self._corpus(path))
        of_tokenizer = path.suffix in TOKENIZER_SUFFIXES or path.name in TOKENIZER_NAMES
        if of_tokenizer and path.stat().st_size < LARGEST_TOKENIZER:
            return self._try(path, lambda: self._tokenizer(path))
        if path.suffix == ".pt":
            return self._try(path, lambda: self._run(path))
        if path.suffix == ".json" and path.stat().st_size > LARGEST_JSON:
            return False
        if listings.recognise(path):
            return self._try(path, lambda: self.given.listings.append(listings.read_listing(path)))
        if evaluations.recognise(path):
            return self._try(path, lambda: self.given.evaluations.append(read_evaluation(path)))
        if runs.is_difficulty(path):
            return self._try(path, lambda: self.given.difficulty.append(path))
        return False

    def _corpus(self, path: Path) -> None:
        corpus = corpora.read_leniently(path, self.examination)
        if corpus is not None:
            self.given.corpora.append(corpus)

    def _store(self, path: Path) -> None:
        self.given.stores.append(Store(path))

    def _tokenizer(self, path: Path) -> None:
        find = partial(tokens.model_file, path.read_bytes(), str(path))
        self.examination.run("special-ids", str(path), find)
        self.given.tokenizers[path] = Tokenizer.load(path, NORMALISER)

    def _run(self, path: Path) -> None:
        run = read_run(path)
        self.given.runs.append(run)
        if path.is_dir():
            for name in ("scores.json", "predictions.jsonl"):
                if (path / name).is_file():
                    self.take(path / name)
                    break  # the scores bring their predictions with them

    def add_related(self) -> None:
        """Adds what the given things name: a run's corpus and targets, the tokenizers of runs and evaluations."""
        for run in list(self.given.runs):
            for path in _named_by(run.config):
                self._add(path, f"named in {run.path}")
        for evaluation in self.given.evaluations:
            for path in _near(evaluation.path, evaluation.tokenizer_path):
                if path not in self.seen:
                    self._try(path, lambda path=path: self._tokenizer(path))  # type: ignore[misc]

    def _add(self, path: Path, why: str) -> None:
        if not path.exists():
            self.examination.cannot(str(path), f"{why}, but it is not there.")
        elif not self.take(path.resolve()):
            self.examination.cannot(str(path), f"{why}, but its shape is unknown.")


def _named_by(config: object) -> list[Path]:
    paths = [getattr(config, name, None) for name in ("corpus", "targets")]
    return [Path(path) for path in paths if path is not None]


def _near(path: Path, named: str | None) -> Iterable[Path]:
    """Tokenizers that an evaluation may have been decoded with: the named one, those beside it and one folder up."""
    if named and Path(named).is_file():
        yield Path(named).resolve()
    for folder in (path.parent, path.parent.parent):
        for suffix in TOKENIZER_SUFFIXES:
            for found in sorted(folder.glob(f"*{suffix}")):
                if found.stat().st_size < LARGEST_TOKENIZER and os.access(found, os.R_OK):
                    yield found.resolve()


def probe_run(
    examination: Examination, run: RunFolder, given: Given, seed: int, only: Collection[str] | None = None
) -> None:
    """Active probes (all, or only these) of a run that has a checkpoint and a corpus."""
    what = f"{'active probes' if only is None else ', '.join(only)} of {run.path}"
    path = run.checkpoints.get("best.pt") or next(iter(run.checkpoints.values()), None)
    if path is None or run.config is None:
        examination.cannot(what, "it has no checkpoint.")
        return
    try:
        recogniser = load_recogniser(path)
    except XdedError as error:
        examination.cannot(what, str(error))
        return
    if not (recogniser.student.has_ctc and recogniser.student.has_decoder):
        examination.cannot(what, "they need a CTC head and a decoder.")
        return
    wanted = run.config.corpus
    corpus = next((c for c in given.corpora if wanted and Path(wanted).resolve() in (c.path, c.path.parent)), None)
    corpus = corpus or next(iter(given.corpora), None)
    if corpus is None:
        examination.cannot(what, "no corpus was given, and the run's is not there.")
        return
    probes.examine_probes(examination, recogniser, corpus, run.config, seed=seed, only=only)
