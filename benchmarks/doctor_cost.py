"""What `xded doctor` costs without probes: 25,000 recordings, 14 teachers' posteriors, their targets and a run.

    python benchmarks/doctor_cost.py >> benchmarks/RESULTS.md

The posteriors are made up but healthy, so that no check ends early: every teacher spells every recording with its own
probabilities, 75 frames each, 5,000 pieces, the 32 largest entries kept, and the targets are their mean. Audio is one
FLAC file of 3 s a recording (a tone with faint noise, all of them different). The run is a real one of two updates. The
4 GB of files stay in work/benchmarks/doctor_cost and are used again; the measurement is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import WORK, head
from xded.config import build
from xded.corpus.folds import Fold, Provenance
from xded.corpus.manifest import Corpus, Recording, read_corpus, write_manifest
from xded.corpus.vocoder import SAMPLE_RATE, write_flac
from xded.doctor.examine import examine_all
from xded.targets.store import RECORDINGS_PER_SHARD, Entry, Index, Kind, Posterior, StoreWriter
from xded.teachers.posteriors import KINDS
from xded.tokenizer import Tokenizer
from xded.training.job import Job
from xded.training.run import fit

TEACHERS = tuple(f"T{number:02d}" for number in range(1, 15))
HELD_OUT = "T15"
PROMPTS, MICS, HELD_OUT_PROMPTS = 255, 7, 10  # as in UASpeech's third block
PIECES, KEPT = 5_000, 32
FRAMES, FRAME_RATE_HZ, TEMPERATURE = 75, 25.0, 2.0
DURATION_S = FRAMES / FRAME_RATE_HZ
TOP, FLOOR = 0.8, 0.01  # probability of the first entry, and how much it differs between teachers
TRAINED_ON = 16  # recordings of the run
FREE_GIGABYTES = 12
LIMIT_S, LIMIT_MEGABYTES = 30, 2_000
REPEATS = 3


def make_words(count: int) -> list[str]:
    """Different words of two to four syllables."""
    random = np.random.default_rng(0)
    syllables = [c + v for c in "BDFGKLMNPRSTVZ" for v in "AEIOU"]
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(random.choice(syllables, size=random.integers(2, 5)))] = None
    return list(words)


def make_tokenizer() -> Tokenizer:
    """As many pieces as the study's tokenizer has, or nearly."""
    return Tokenizer.train(make_words(20_000), "unigram", PIECES, "upper")


def make_corpus(folder: Path) -> Corpus:
    """25,060 recordings: 14 speakers with 255 prompts through 7 microphones, and a held-out one with 10 prompts."""
    recordings = []
    seconds = np.arange(round(DURATION_S * SAMPLE_RATE)) / SAMPLE_RATE
    random = np.random.default_rng(0)
    words = make_words(PROMPTS)
    for speaker in (*TEACHERS, HELD_OUT):
        for word in words[: HELD_OUT_PROMPTS if speaker == HELD_OUT else PROMPTS]:
            tone = 0.1 * np.sin(2 * np.pi * random.uniform(150, 900) * seconds)
            for mic in range(1, MICS + 1):
                name, path = f"{speaker}_{word}_M{mic}", folder / speaker / f"{speaker}_{word}_M{mic}.flac"
                noise = random.integers(-2, 3, size=len(tone)) / 2**15
                digest = write_flac(path, (tone + noise).astype(np.float32))
                row = {"audio_filepath": path, "duration": DURATION_S, "text": word, "recording": name}
                who = {"speaker": speaker, "take": f"{speaker}_{word}", "prompt": word, "mic": f"M{mic}"}
                file = {"sample_rate": SAMPLE_RATE, "audio_sha256": digest}
                recordings.append(Recording.model_validate({**row, **who, **file}))
    write_manifest(folder / "manifest.jsonl", recordings)
    return read_corpus(folder)


def steps_of(recording: Recording, kind: Kind, tokenizer: Tokenizer) -> np.ndarray:
    """The most probable id of every step: [T] or [U + 1]."""
    tokens = tokenizer.encode(recording.text)
    if kind == "decoder":
        return np.array([*tokens, tokenizer.eos])
    path = np.zeros(FRAMES, dtype=int)
    path[5 + 8 * np.arange(len(tokens))] = tokens
    return path


def entries_of(path: np.ndarray) -> np.ndarray:
    """[T, k] ids: the most probable one first, the others different from it and from each other."""
    others = (path[:, None] + 1 + 37 * np.arange(KEPT - 1)) % PIECES  # 37 shares no factor with the vocabulary
    return np.column_stack([path, others])


def shares_of(steps: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """[T, k] probabilities, and the rest [T]."""
    first = TOP - FLOOR * random.random((steps, 1), dtype=np.float32)
    others = random.random((steps, KEPT), dtype=np.float32)
    others *= (1 - first) / others.sum(1, keepdims=True)
    return np.column_stack([first, others[:, 1:]]), others[:, 0]


def index_of(kind: Kind, teachers: Sequence[str], tokenizer: Tokenizer, **fields: Any) -> Index:
    return Index(
        kind=kind, temperature=TEMPERATURE, top_k=KEPT, vocabulary=tokenizer.size,
        frame_rate_hz=FRAME_RATE_HZ if kind == "ctc" else None, teacher_forced=kind == "decoder",
        tokenizer=tokenizer.fingerprint, teachers=tuple(teachers),
        teacher_hashes={name: f"{TEACHERS.index(name):064x}" for name in teachers},
        provenance=(Provenance("parent", frozenset(TEACHERS)),), **fields,
    )  # fmt: skip


def write_targets(folder: Path, recordings: Sequence[Recording], tokenizer: Tokenizer) -> None:
    """Posteriors of every teacher over all recordings, and their mean, a shard at a time."""
    for kind in KINDS:
        writers = {
            name: StoreWriter(folder / "posteriors" / name / kind, index_of(kind, [name], tokenizer))
            for name in TEACHERS
        }
        mean = index_of(kind, TEACHERS, tokenizer, aggregation="prob_mean", weighting="uniform")
        writers["mean"] = StoreWriter(folder / kind, mean)
        for first in range(0, len(recordings), RECORDINGS_PER_SHARD):
            write_shards(writers, recordings[first : first + RECORDINGS_PER_SHARD], kind, tokenizer)
        for writer in writers.values():
            writer.close()


def write_shards(
    writers: dict[str, StoreWriter], recordings: Sequence[Recording], kind: Kind, tokenizer: Tokenizer
) -> None:
    paths = [steps_of(recording, kind, tokenizer) for recording in recordings]
    path = np.concatenate(paths)
    ids, ends = entries_of(path), np.cumsum([len(rows) for rows in paths])
    total, total_rest = np.zeros(ids.shape, np.float32), np.zeros(len(ids), np.float32)
    least_blank = np.ones(len(ids), np.float32)
    for name in TEACHERS:
        random = np.random.default_rng([TEACHERS.index(name), len(ids)])
        shares, rest = shares_of(len(ids), random)
        blank = np.where(path == tokenizer.blank, shares[:, 0] ** 2 / (shares**2).sum(1), 0.0)
        sure = np.log(shares[:, 0] ** 2 / (shares**2).sum(1))  # of the first entry at T = 1
        add(writers[name], recordings, ends, (ids, shares, rest, blank), sure, {})
        total += shares / len(TEACHERS)
        total_rest += rest / len(TEACHERS)
        least_blank = np.minimum(least_blank, blank)
    add(writers["mean"], recordings, ends, (ids, total, total_rest, least_blank), None, dict.fromkeys(TEACHERS, 1.0))


def add(
    writer: StoreWriter,
    recordings: Sequence[Recording],
    ends: np.ndarray,
    columns: tuple[np.ndarray, ...],
    sure: np.ndarray | None,
    weight: dict[str, float],
) -> None:
    for recording, end, steps in zip(recordings, ends, np.diff(ends, prepend=0), strict=True):
        rows = slice(end - steps, end)
        noted = None if sure is None else float(sure[rows].mean())
        entry = Entry(recording.recording, str(recording.audio_sha256), int(steps), weight, noted)
        writer.add(entry, Posterior(*(column[rows] for column in columns)))


def train_run(corpus: Corpus, targets: Path, tokenizer: Tokenizer, out: Path) -> None:
    """A real run, of two updates, that names the corpus and the targets."""
    sections = {
        "corpus": str(corpus.path), "targets": str(targets), "model": {"size": "micro"},
        "fold": {"held_out": (HELD_OUT,)}, "objective": {"ctc_kd": 1.0, "decoder_kd": 1.0, "temperature": TEMPERATURE},
        "train": {"stages": ({"epochs": 1, "peak_lr": 1e-3},), "batch_size": 8, "device": "cpu", "threads": 1},
    }  # fmt: skip
    config = build(sections, "the benchmark")
    train = [r for r in corpus.recordings if r.speaker != HELD_OUT][:TRAINED_ON]
    fit(Job("student", config, train, [], Fold((HELD_OUT,)), frozenset(), tokenizer, out), quiet=True)


def make_all(folder: Path) -> None:
    """Writes everything, once."""
    done = folder / "complete"
    if done.is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free / 1e9
    if free < FREE_GIGABYTES:
        raise SystemExit(f"{folder} needs {FREE_GIGABYTES} GB of free disk; {free:.0f} GB are left.")
    begun_s = time.perf_counter()
    corpus, tokenizer = make_corpus(folder / "corpus"), make_tokenizer()
    print(f"{len(corpus.recordings)} recordings in {time.perf_counter() - begun_s:.0f} s", file=sys.stderr)
    heard = [r for r in corpus.recordings if r.speaker != HELD_OUT]
    write_targets(folder / "targets", heard, tokenizer)
    (folder / "targets" / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    print(f"posteriors after {time.perf_counter() - begun_s:.0f} s", file=sys.stderr)
    train_run(corpus, folder / "targets", tokenizer, folder / "run")
    done.touch()


def measure(folder: Path) -> dict[str, Any]:
    """Everything given together: wall and CPU seconds, peak memory, what was found."""
    begun_s = time.perf_counter()
    examination = examine_all([folder / "corpus", folder / "targets", folder / "run"])
    wall_s = time.perf_counter() - begun_s
    peak = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return {
        "wall_s": wall_s, "cpu_s": time.process_time(), "peak_megabytes": int(peak[0]) / 1e3,
        "checks": len(examination.passed) + len(examination.findings),
        "findings": dict(Counter(f"{f.severity} {f.check}" for f in examination.findings)),
        "unchecked": [f"{u.what}: {u.why}" for u in examination.unchecked],
    }  # fmt: skip


def report(folder: Path) -> None:
    """Measures in fresh processes and prints the section."""
    make_all(folder)
    runs = []
    for _ in range(REPEATS):
        begun_s = time.perf_counter()
        command = [sys.executable, __file__, "--measure", str(folder)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        runs.append({**json.loads(done.stdout.splitlines()[-1]), "process_s": time.perf_counter() - begun_s})
    size = sum(path.stat().st_size for path in (folder / "targets").rglob("*") if path.is_file()) / 1e9
    recordings = len((folder / "corpus" / "manifest.jsonl").read_text(encoding="utf-8").splitlines())
    print(head("what the doctor costs", "doctor_cost"))
    print(
        f"{recordings:,} recordings of 3 s, {len(TEACHERS)} teachers' posteriors and their mean ({size:.1f} GB, k = "
        f"{KEPT}), a run of two updates; {REPEATS} processes, one after the other, files in the page cache. Most: "
        f"{max(r['process_s'] for r in runs):.1f} s from the start of Python to its end (limit {LIMIT_S}), "
        f"{max(r['peak_megabytes'] for r in runs):.0f} MB (limit {LIMIT_MEGABYTES}).\n"
    )
    print(
        "| process, s | examination, s | CPU-seconds | peak memory, MB | checks |\n| ---: | ---: | ---: | ---: | ---: |"
    )
    for run in runs:
        cells = (f"{run[key]:.1f}" for key in ("process_s", "wall_s", "cpu_s"))
        print(f"| {' | '.join(cells)} | {run['peak_megabytes']:.0f} | {run['checks']} |")
    print(f"\nFindings: {runs[0]['findings'] or 'none'}. Not checked: {'; '.join(runs[0]['unchecked']) or 'nothing'}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, help="only examine what lies in this folder and print a JSON line")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    report(WORK / "doctor_cost")


if __name__ == "__main__":
    main()
