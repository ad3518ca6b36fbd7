"""What faults are planted into: a small corpus, teachers, targets and students, all real and all healthy.

They are made once with the commands that a user would give, and kept in work/benchmarks/faults/bench.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import yaml

from xded.audio import read_audio
from xded.cli import app
from xded.corpus.manifest import Corpus, Recording, read_corpus, write_manifest
from xded.corpus.synthetic import make_embedded_corpus
from xded.errors import XdedError
from xded.findings import Family
from xded.parallel import run_all
from xded.scoring import Prediction, read_predictions
from xded.tokenizer import Tokenizer

SAMPLE_RATE = 16_000
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
MICROPHONES = {"M3": 1.0, "M5": 0.8, "M7": 0.6}  # and their gains
HISS = 0.002  # of every microphone by itself, full scale 1
CONTROLS, TARGETS, TAKES = 2, 5, 3
HELD_OUT = "T05"
CORPUS_SEED = 3  # gives the held-out speaker a mild and the others all kinds of severities
RECIPE = {
    "model": {"size": "micro"},
    "fold": {"held_out": [HELD_OUT], "validation_fraction": 0.2},
    "objective": {"ctc": 0.5, "cross_entropy": 0.5},
    "train": {
        "stages": [{"epochs": 1, "peak_lr": 0.003, "freeze_encoder": True}, {"epochs": 5, "peak_lr": 0.002}],
        "batch_size": 16, "threads": 1, "device": "cpu", "checkpoint_every_epochs": 1000,
    },
    "teach": {
        "parent": {
            "stages": [{"epochs": 10, "peak_lr": 0.003}], "batch_size": 16, "threads": 1, "device": "cpu",
            "validate_every_epochs": 2, "checkpoint_every_epochs": 1000,
        },
        "teacher": {
            "stages": [{"epochs": 6, "peak_lr": 0.001}], "batch_size": 8, "threads": 1, "device": "cpu",
            "validate_every_epochs": 2, "checkpoint_every_epochs": 1000,
        },
    },
}  # fmt: skip
OTHER_TEACHERS = ("teachers_of_three", "teachers_of_controls")
FROM_SCRATCH = [{"epochs": 9, "peak_lr": 0.003}]


@dataclass(frozen=True)
class Case:
    """A planted fault, or (with nothing expected) a healthy variant.

    Attributes:
        name: of the case; family: of the check that should name the fault; expected: checks that name its cause.
        story: what a careless engineer did.
        plant: makes the things in a folder; returns what is handed to the doctor.
        probe: whether the doctor is asked with --probe.
        meanwhile: the fault in the code, where that is still there when the doctor looks (active probes run the code).
    """

    name: str
    family: Family | None
    expected: frozenset[str]
    story: str
    plant: Plant
    probe: bool = False
    meanwhile: Callable[[], AbstractContextManager[object]] = nullcontext


Plant = Callable[["Workbench", Path], list[Path]]
FAULTS: dict[str, Case] = {}
HEALTHY: dict[str, Case] = {}


def fault(name: str, family: Family, *expected: str, **more: Any) -> Callable[[Plant], Plant]:
    """Registers a planting function; its docstring is the story."""

    def register(plant: Plant) -> Plant:
        FAULTS[name] = Case(name, family, frozenset(expected), _story(plant), plant, **more)
        return plant

    return register


def healthy(name: str, **more: Any) -> Callable[[Plant], Plant]:
    """Registers a function that makes a healthy variant."""

    def register(plant: Plant) -> Plant:
        HEALTHY[name] = Case(name, None, frozenset(), _story(plant), plant, **more)
        return plant

    return register


def _story(plant: Plant) -> str:
    return " ".join((plant.__doc__ or "").split())


def xded(*words: object) -> None:
    """Runs an `xded` command in this process; an error for people is raised."""
    app([str(word) for word in words], standalone_mode=False)


def attempt(*words: object) -> None:
    """Runs a command that may be refused or stopped: what lies there afterwards is what the doctor gets."""
    try:
        xded(*words)
    except XdedError as error:
        print(f"xded {words[0]}: {error}")


@dataclass(frozen=True)
class Workbench:
    """The healthy ingredients; each is made when it is first asked for, unless an earlier call left it."""

    folder: Path

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        out = self.folder / name
        done = self.folder / f"{name}.done"
        if not done.exists():
            shutil.rmtree(out, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            with quietly(self.folder / f"{name}.log"):
                make(out)
            done.touch()
        return out

    def make_all(self, jobs: int) -> None:
        """Makes everything, so that several processes can use it."""
        _ = self.recipe
        run_all(_make, [(self.folder, name) for name in ("student", "scratch", *OTHER_TEACHERS)], jobs)

    @cached_property
    def recipe(self) -> Path:
        """The config file that every command gets."""
        path = self.folder / "recipe.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump({**RECIPE, "corpus": str(self.corpus)}), encoding="utf-8")
        return path

    @cached_property
    def corpus(self) -> Path:
        """Seven speakers, eight words, three takes, three microphones; ids as in UASpeech."""
        return self._made("corpus", make_corpus).resolve()

    def read(self) -> Corpus:
        """The corpus, read."""
        return read_corpus(self.corpus)

    @cached_property
    def teachers(self) -> Path:
        """Parent and teachers of the fold, cross-tested."""
        return self._made("teachers", lambda out: xded("teach", "--config", self.recipe, "--out", out, "--jobs", 1))

    @cached_property
    def teachers_of_three(self) -> Path:
        """Parent and teachers of another fold: T03 is held out, T05 is heard."""
        words = ("teach", "--config", self.recipe, "--out")
        return self._made("teachers_t03", lambda out: xded(*words, out, "--held-out", "T03", "--jobs", 1))

    @cached_property
    def teachers_of_controls(self) -> Path:
        """A parent that has heard the controls only, and two teachers."""
        words = ("teach", "--config", self.recipe, "--jobs", 1, "--parent-on", "controls")
        longer = ("--set", "teach.parent.stages=[{epochs: 25, peak_lr: 0.003}]")
        exclude = ("--exclude", "T01", "--exclude", "T02")
        return self._made("teachers_controls", lambda out: xded(*words, *longer, *exclude, "--out", out))

    @cached_property
    def targets(self) -> Path:
        """Targets of the fold's target speakers."""
        return self._made("targets", lambda out: make_targets(self, out))

    @cached_property
    def student(self) -> Path:
        """A student from the parent, with CTC-KD, evaluated."""
        return self._made("student", lambda out: self.evaluate(self.train(out, *self.from_parent, *self.distilled)))

    @cached_property
    def scratch(self) -> Path:
        """A supervised recogniser from scratch, with the controls' speech, evaluated."""
        return self._made("scratch", lambda out: self.evaluate(self.train(out, *self.from_scratch)))

    @property
    def from_parent(self) -> tuple[object, ...]:
        """Flags of a run that starts from the parent and hears target speakers only."""
        return "--init", self.teachers / "parent", "--no-controls"

    @property
    def from_scratch(self) -> tuple[object, ...]:
        """Flags of a run that starts from nothing."""
        return ("--set", f"train.stages={yaml.safe_dump(FROM_SCRATCH, default_flow_style=True).strip()}")

    @property
    def distilled(self) -> tuple[object, ...]:
        """Flags of CTC-KD."""
        return "--targets", self.targets, "--ctc-kd", 1

    def train(self, out: Path, *flags: object) -> Path:
        """One run; what is refused or stopped stays as it is."""
        attempt("train", "--config", self.recipe, "--out", out, "--quiet", *flags)
        return out

    def evaluate(self, run: Path, *flags: object) -> Path:
        """Scores and predictions of a run."""
        attempt("evaluate", run, "--device", "cpu", *flags)
        return run

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of teachers, targets and students."""
        return Tokenizer.load(self.teachers / "tokenizer.model", "upper")

    def predictions(self) -> list[Prediction]:
        """What the student said."""
        return read_predictions(self.student / "predictions.jsonl")

    def predictions_of(self, run: Path) -> list[Prediction]:
        """What a run said."""
        return read_predictions(run / "predictions.jsonl")

    @property
    def words(self) -> tuple[str, ...]:
        """The prompts, in the order of the word list."""
        return WORDS

    def copy(self, source: Path, out: Path) -> Path:
        """A copy of an ingredient that may be changed."""
        shutil.copytree(source, out)
        return out


def _make(job: tuple[Path, str]) -> None:
    folder, name = job
    getattr(Workbench(folder), name)


def make_targets(bench: Workbench, out: Path, *flags: object) -> None:
    """`xded targets` as the students need them."""
    words = ("targets", "--config", bench.recipe, "--teachers", bench.teachers, "--no-controls", "--out", out)
    xded(*words, "--jobs", 1, *flags)


def make_corpus(out: Path) -> None:
    """The embedded corpus through several microphones, filed like UASpeech: T01_B2_zero_M5."""
    clean = make_embedded_corpus(
        out / "clean", controls=CONTROLS, targets=TARGETS, words=WORDS, takes=TAKES, seed=CORPUS_SEED
    )
    recordings = []
    for number, row in enumerate(read_corpus(clean).recordings):
        speaker, word, count = row.take.split("_")
        take = f"{speaker}_B{count}_{word}"
        for place, (mic, gain) in enumerate(MICROPHONES.items()):
            random = np.random.default_rng([number, place])
            audio = gain * read_audio(row.audio_filepath)
            path = out / "audio" / speaker / f"{take}_{mic}.flac"
            write_audio(path, audio + random.normal(0.0, HISS, len(audio)))
            changes = {"recording": f"{take}_{mic}", "take": take, "block": f"B{count}", "mic": mic}
            recordings.append(row.model_copy(update={**changes, "audio_filepath": path, "audio_sha256": None}))
    shutil.rmtree(out / "clean")
    write_manifest(out / "manifest.jsonl", recordings)


def write_audio(path: Path, audio: np.ndarray, rate: int = SAMPLE_RATE) -> Path:
    """A 16-bit file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.clip(audio, -1.0, 1.0), rate, subtype="PCM_16")
    return path


def write_corpus(out: Path, recordings: Iterable[Recording]) -> Path:
    """A manifest in a folder of its own; audio stays where it is."""
    out.mkdir(parents=True, exist_ok=True)
    write_manifest(out / "manifest.jsonl", recordings)
    return out


def changed(
    recordings: Sequence[Recording], which: Callable[[Recording], bool], change: Callable[[Recording], Recording]
) -> list[Recording]:
    """Recordings, some of them changed."""
    return [change(row) if which(row) else row for row in recordings]


@contextmanager
def quietly(log: Path) -> Iterator[None]:
    """Everything that is printed goes to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        yield
