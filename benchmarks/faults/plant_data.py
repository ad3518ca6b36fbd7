"""Faults of the data: whose audio, which side of a split, what is in the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import numpy as np

from faults.workbench import HELD_OUT, SAMPLE_RATE, Workbench, changed, fault, write_audio, write_corpus
from xded.audio import read_audio
from xded.corpus.folds import Split
from xded.corpus.manifest import Recording
from xded.teachers.adapt import parts_of
from xded.training.data import TrainingData

FAMILY: Final = "data"


def with_audio(
    bench: Workbench,
    out: Path,
    which: Callable[[Recording], bool],
    change: Callable[[np.ndarray], np.ndarray],
    rate: int = SAMPLE_RATE,
) -> Path:
    """A corpus in which some recordings have other audio; their durations in the manifest are right."""

    def rewritten(row: Recording) -> Recording:
        audio = change(read_audio(row.audio_filepath))
        path = write_audio(out / "audio" / row.speaker / row.audio_filepath.name, audio, rate)
        return row.model_copy(update={"audio_filepath": path, "duration": len(audio) / rate})

    return write_corpus(out, changed(bench.read().recordings, which, rewritten))


def from_parent_with_split(bench: Workbench, out: Path, split: Callable[[Split], Split]) -> Path:
    """A supervised run from the parent on a split of somebody's own, and what training refuses is overridden."""

    def parts(*args: Any) -> Split:
        return split(parts_of(*args))

    with patch("xded.teachers.adapt.parts_of", parts), patch("xded.training.preflight.guard"):
        return bench.train(out, *bench.from_parent, "--force", "shared-takes")


@fault("audio of the first speaker only", FAMILY, "wrong-audio")
def first_speaker(bench: Workbench, out: Path) -> list[Path]:
    """For every prompt the loader opens the file of the alphabetically first speaker who said it (the study's)."""
    start = TrainingData.__init__

    def init(self: TrainingData, *args: Any, **more: Any) -> None:
        start(self, *args, **more)
        first: dict[tuple[str | None, ...], Path] = {}
        for row in sorted(self.recordings, key=lambda row: row.recording):
            first.setdefault((row.prompt, row.mic), row.audio_filepath)
        self.recordings = [
            row.model_copy(update={"audio_filepath": first[row.prompt, row.mic]}) for row in self.recordings
        ]

    with patch.object(TrainingData, "__init__", init):
        run = bench.train(out / "run", *bench.from_parent, *bench.distilled)
    return [bench.evaluate(run)]


@fault("'included' speaker not heard", FAMILY, "wrong-audio")
def included_but_not_heard(bench: Workbench, out: Path) -> list[Path]:
    """With --include-held-out the list of the run names the held-out speaker, but the loader swaps in others' files."""
    start = TrainingData.__init__

    def init(self: TrainingData, *args: Any, **more: Any) -> None:
        start(self, *args, **more)
        others = {(row.prompt, row.mic): row.audio_filepath for row in self.recordings if row.speaker != HELD_OUT}
        self.recordings = changed(
            self.recordings,
            lambda row: row.speaker == HELD_OUT,
            lambda row: row.model_copy(update={"audio_filepath": others[row.prompt, row.mic]}),
        )

    with patch.object(TrainingData, "__init__", init):
        run = bench.train(out / "run", *bench.from_parent, "--include-held-out")
    return [bench.evaluate(run)]


@fault("files of two speakers swapped", FAMILY, "wrong-audio", "labels", "audio-files")
def swapped_speakers(bench: Workbench, out: Path) -> list[Path]:
    """A script that wrote the manifest mixed up two speakers' folders."""
    rows = {row.recording: row for row in bench.read().recordings}
    other = {"T01": "T02", "T02": "T01"}

    def swap(row: Recording) -> Recording:
        twin = rows[other[row.speaker] + row.recording.removeprefix(row.speaker)]
        return row.model_copy(update={"audio_filepath": twin.audio_filepath, "duration": twin.duration})

    return [write_corpus(out / "corpus", changed(list(rows.values()), lambda row: row.speaker in other, swap))]


@fault("parent of another fold", FAMILY, "leakage")
def parent_of_another_fold(bench: Workbench, out: Path) -> list[Path]:
    """The student starts from the parent of the fold without T03, which has heard the held-out T05; no guard."""
    with patch("xded.training.preflight.guard"):
        run = bench.train(out / "run", "--init", bench.teachers_of_three / "parent", "--no-controls")
    return [bench.evaluate(run)]


@fault("random split across microphones", FAMILY, "shared-takes")
def random_split(bench: Workbench, out: Path) -> list[Path]:
    """Recordings are dealt to training and validation at random: of most takes, one microphone is on either side."""

    def deal(parts: Split) -> Split:
        rows = [*parts.train, *parts.validation]
        order = np.random.default_rng(42).permutation(len(rows))
        kept = len(rows) // 10
        return replace(
            parts, train=tuple(rows[i] for i in order[kept:]), validation=tuple(rows[i] for i in order[:kept])
        )

    return [bench.evaluate(from_parent_with_split(bench, out / "run", deal))]


@fault("a microphone of the test speaker in training", FAMILY, "leakage", "shared-takes")
def microphone_of_test(bench: Workbench, out: Path) -> list[Path]:
    """One microphone of the held-out speaker trains, the others are the test; the guard is off."""

    def move(parts: Split) -> Split:
        heard = tuple(row for row in parts.test if row.mic == "M7")
        return replace(parts, train=parts.train + heard, test=tuple(row for row in parts.test if row.mic != "M7"))

    return [bench.evaluate(from_parent_with_split(bench, out / "run", move))]


@fault("validation on training recordings", FAMILY, "shared-takes", "validation", "leakage")
def validated_on_training(bench: Workbench, out: Path) -> list[Path]:
    """The validation set is a slice of the training set that nobody took out of it."""
    run = from_parent_with_split(bench, out / "run", lambda parts: replace(parts, validation=parts.train[::7]))
    return [bench.evaluate(run)]


@fault("student trains on the teachers' test takes", FAMILY, "teacher-test-block", "shared-takes")
def teachers_test_block(bench: Workbench, out: Path) -> list[Path]:
    """The student's takes are dealt with another seed than the teachers': it trains on what teachers are tested on."""
    run = bench.train(out / "run", *bench.from_parent, "--set", "fold.split_seed=1")
    return [bench.evaluate(run), bench.teachers]


@fault("truncated copy of a speaker", FAMILY, "truncated-copy")
def truncated(bench: Workbench, out: Path) -> list[Path]:
    """The copy of one speaker's folder broke off: the first 20 of 72 files are missing (F03 in the study)."""
    rows = bench.read().recordings
    gone = sorted(row.audio_filepath.name for row in rows if row.speaker == "T02")[:20]
    return [write_corpus(out / "corpus", [row for row in rows if row.audio_filepath.name not in gone])]


@fault("one speaker at 8 kHz", FAMILY, "sample-rate", "audio-files")
def other_rate(bench: Workbench, out: Path) -> list[Path]:
    """One speaker's files were recorded at 8 kHz; the manifest says 16 kHz for all."""
    return [with_audio(bench, out / "corpus", lambda row: row.speaker == "T03", lambda audio: audio[::2], 8_000)]


@fault("8 kHz files labelled 16 kHz", FAMILY, "sample-rate", "audio-files")
def lying_header(bench: Workbench, out: Path) -> list[Path]:
    """One speaker's 8 kHz samples were written with a 16 kHz header: twice as fast; durations as in the word list."""
    durations = {row.recording: row.duration for row in bench.read().recordings}
    folder = with_audio(bench, out / "corpus", lambda row: row.speaker == "T03", lambda audio: audio[::2])
    path = folder / "manifest.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps({**row, "duration": durations[row["recording"]]}) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [folder]


@fault("dead microphone", FAMILY, "silence")
def dead_microphone(bench: Workbench, out: Path) -> list[Path]:
    """One microphone recorded nothing for one speaker."""
    return [with_audio(bench, out / "corpus", lambda row: (row.speaker, row.mic) == ("T04", "M7"), np.zeros_like)]


@fault("overdriven microphone", FAMILY, "clipping")
def clipped(bench: Workbench, out: Path) -> list[Path]:
    """The gain was far too high in one speaker's session."""
    return [with_audio(bench, out / "corpus", lambda row: row.speaker == "T01", lambda audio: 25 * audio)]


@fault("gaps filled with copies", FAMILY, "duplicates")
def copied_takes(bench: Workbench, out: Path) -> list[Path]:
    """One speaker missed a session: somebody filled the third block with copies of the first."""
    first = {(r.prompt, r.mic): r for r in bench.read().recordings if (r.speaker, r.block) == ("T01", "B1")}

    def copy(row: Recording) -> Recording:
        source = first[row.prompt, row.mic]
        path = out / "corpus" / "audio" / row.audio_filepath.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.audio_filepath.read_bytes())
        return row.model_copy(update={"audio_filepath": path, "duration": source.duration})

    rows = changed(bench.read().recordings, lambda r: (r.speaker, r.block) == ("T01", "B3"), copy)
    return [write_corpus(out / "corpus", rows)]


@fault("labels one line down", FAMILY, "labels")
def labels_one_down(bench: Workbench, out: Path) -> list[Path]:
    """In one speaker's sheet the column of words slipped by one line."""
    words = sorted({row.text for row in bench.read().recordings})
    after = dict(zip(words, [*words[1:], words[0]], strict=True))
    slip = changed(
        bench.read().recordings,
        lambda row: row.speaker == "T03",
        lambda row: row.model_copy(update={"text": after[row.text], "prompt": after[row.text]}),
    )
    return [write_corpus(out / "corpus", slip)]


@fault("a prompt with two spellings", FAMILY, "labels")
def two_spellings(bench: Workbench, out: Path) -> list[Path]:
    """Whoever transcribed two of the speakers wrote 'for' where the prompt was 'four'."""
    rows = changed(
        bench.read().recordings,
        lambda row: row.speaker in ("T01", "T02") and row.text == "four",
        lambda row: row.model_copy(update={"text": "for"}),
    )
    return [write_corpus(out / "corpus", rows)]


@fault("trimmed to a click", FAMILY, "unspellable", "audio-files")
def trimmed(bench: Workbench, out: Path) -> list[Path]:
    """A speech detector cut one speaker's recordings down to 80 ms."""
    corpus = with_audio(bench, out / "corpus", lambda r: r.speaker == "T02", lambda audio: audio[4_000:5_280])
    return [corpus, bench.student]


@fault("the test speaker under a second name", FAMILY, "leakage", "duplicates", "shared-takes", "wrong-audio")
def second_name(bench: Workbench, out: Path) -> list[Path]:
    """A second import brought the held-out speaker's files back as T06, who then trains."""
    rows = list(bench.read().recordings)
    for row in [row for row in rows if row.speaker == HELD_OUT]:
        names = {key: getattr(row, key).replace(HELD_OUT, "T06") for key in ("recording", "take", "speaker")}
        path = out / "corpus" / "audio" / f"{names['recording']}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row.audio_filepath.read_bytes())
        rows.append(row.model_copy(update={**names, "audio_filepath": path}))
    corpus = write_corpus(out / "corpus", rows)
    run = bench.train(out / "run", *bench.from_parent, "--corpus", corpus)
    return [bench.evaluate(run), corpus]


@fault("audio missing on disk", FAMILY, "audio-files")
def missing_audio(bench: Workbench, out: Path) -> list[Path]:
    """The manifest is whole; of one speaker's files, 30 never arrived and 10 arrived empty."""
    corpus = with_audio(bench, out / "corpus", lambda row: row.speaker == "T04", lambda audio: audio)
    files = sorted((corpus / "audio" / "T04").iterdir())
    for path in files[:30]:
        path.unlink()
    for path in files[30:40]:
        path.write_bytes(b"")
    return [corpus]
