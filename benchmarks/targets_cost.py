"""What targets cost: on disk and to aggregate at the size of a real study, and in training with 2, 14 and 30 teachers.

    python benchmarks/targets_cost.py >> benchmarks/RESULTS.md

The posteriors are made up (bytes and times depend on their shapes only): 1,785 recordings of 78 CTC frames each on
average, 5,000 pieces, the 32 largest entries kept. Training runs the project's loop in a process of its own for each
measurement, on targets of 2, 14 and 30 teachers in turn, so that other load on the machine meets all alike.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from common import head, make_voices
from whole_job import make_tokenizer
from xded.config import build
from xded.corpus.manifest import Corpus, Recording, read_corpus, write_manifest
from xded.corpus.phones import DEFAULT_WORDS
from xded.corpus.synthesiser import say
from xded.corpus.vocoder import SAMPLE_RATE, write_flac
from xded.models.student import Student
from xded.targets.store import Entry, Index, Kind, Posterior, Store, StoreWriter
from xded.teachers.aggregation import aggregate_all
from xded.teachers.posteriors import KINDS
from xded.tokenizer import Tokenizer
from xded.training.data import TrainingData, collate
from xded.training.loop import Loop, StopOnSignal
from xded.training.order import RunSampler
from xded.training.run import make_trainer
from xded.training.schedule import Schedule

RECORDINGS, MEAN_FRAMES = 1_785, 78
VOCABULARY, KEPT = 5_000, 32
COUNTS = (2, 14, 30)  # of teachers
TEACHERS = tuple(f"t{number:02d}" for number in range(1, COUNTS[-1] + 1))
FRAME_S = 0.04
HEARD = 64  # recordings with audio, on which training is measured
EPOCHS, UNTIMED_UPDATES = 10, 4
REPEATS = 4
WORDS = DEFAULT_WORDS[:30]
CONFIG = build(
    {
        "model": {"size": "micro"},
        "objective": {"ctc_kd": 1.0, "decoder_kd": 1.0},
        "train": {"stages": ({"epochs": EPOCHS, "peak_lr": 1e-3},), "batch_size": 8, "device": "cpu"},
    },
    "the benchmark",
)


def tokenizer() -> Tokenizer:
    """5,000 pieces, which were not made of these words: they take more steps than a real corpus's."""
    return make_tokenizer()[0]


def make_recordings(folder: Path) -> Corpus:
    """Recordings of 38 to 118 frames, 78 on average; the first `HEARD` have audio."""
    random = np.random.default_rng(0)
    above = random.integers(0, 41, size=RECORDINGS // 2)
    frames = MEAN_FRAMES + np.append(np.stack([above, -above], axis=1), 0)
    voice = make_voices("T", 1, seed=0)[0]
    recordings = []
    for number, count in enumerate(frames.tolist()):
        name, word = f"r{number:04d}", WORDS[number % len(WORDS)]
        path, digest = folder / f"{name}.flac", f"{number:064x}"
        path.touch()
        if number < HEARD:
            digest = write_flac(path, np.resize(say(voice, word, number), round(count * FRAME_S * SAMPLE_RATE)))
        recordings.append(
            Recording(
                audio_filepath=path, duration=count * FRAME_S, text=word, recording=name, take=name, prompt=word,
                speaker=TEACHERS[number % len(TEACHERS)], audio_sha256=digest,
            )
        )  # fmt: skip
    write_manifest(folder / "manifest.jsonl", recordings)
    return read_corpus(folder)


def make_posterior(steps: int, random: np.random.Generator) -> Posterior:
    """Distributions over `KEPT` distinct entries and the rest."""
    # multiples of a number that shares no factor with the vocabulary are distinct
    ids = (random.integers(VOCABULARY, size=(steps, 1)) + 37 * np.arange(KEPT)) % VOCABULARY
    weights = random.exponential(size=(steps, KEPT + 1)).astype(np.float32) ** 3
    shares = weights / weights.sum(1, keepdims=True)
    return Posterior(ids, shares[:, 1:], shares[:, 0], random.random(steps).astype(np.float32))


def write_teacher(folder: Path, kind: Kind, name: str, recordings: Sequence[Recording]) -> None:
    """One teacher's posteriors over all recordings."""
    random = np.random.default_rng([TEACHERS.index(name), kind == "ctc"])
    index = Index(
        kind=kind, temperature=2.0, top_k=KEPT, vocabulary=VOCABULARY, teacher_forced=kind == "decoder",
        frame_rate_hz=1 / FRAME_S if kind == "ctc" else None, tokenizer="made up", teachers=(name,),
        teacher_hashes={name: "0" * 64}, provenance=(),
    )  # fmt: skip
    writer, pieces = StoreWriter(folder / kind, index), tokenizer()
    for recording in recordings:
        steps = round(recording.duration / FRAME_S) if kind == "ctc" else len(pieces.encode(recording.text)) + 1
        entry = Entry(recording=recording.recording, audio_sha256=str(recording.audio_sha256), steps=steps)
        writer.add(entry, make_posterior(steps, random))
    writer.close()


def megabytes(folder: Path) -> float:
    """Size of all files below a folder, 10^6 bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def measure_aggregation(posteriors: Path, names: Sequence[str], corpus: Corpus, out: Path) -> float:
    """Aggregates both kinds; CPU-seconds, reading the files included."""
    pieces, folders = tokenizer(), {name: posteriors / name for name in names}
    begun_s = time.process_time()
    asked = dict.fromkeys(names, corpus.recordings)
    aggregate_all(folders, asked, corpus.recordings, corpus, pieces, CONFIG, out)
    return time.process_time() - begun_s


def peak_megabytes() -> float:
    """Most memory this process has held; ru_maxrss would include the parent's at the time of the fork."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))[0]) / 1e3


def measure_training(targets: Path, folder: Path) -> dict[str, float]:
    """Trains for a few epochs; median seconds an update (CPU and wall) and the process's peak memory."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recordings = read_corpus(folder).recordings[:HEARD]
    student, pieces = Student(CONFIG.model, VOCABULARY, CONFIG.features), tokenizer()
    data = TrainingData(
        recordings, student.front_end, pieces, augmentation=CONFIG.augment,
        ctc_targets=Store(targets / "ctc"), decoder_targets=Store(targets / "decoder"),
        frame_rate_hz=student.frame_rate_hz, reduce=student.encoder.subsampling.reduce,
    )  # fmt: skip
    schedule = Schedule.of(CONFIG.train, CONFIG.train.stages, -(-len(data) // CONFIG.train.batch_size))
    times: list[tuple[float, float]] = []

    def watch(event: str, row: dict[str, Any]) -> None:
        if event == "step":
            times.append((time.process_time(), time.perf_counter()))

    with TemporaryDirectory() as out:
        loop = Loop(student, CONFIG, schedule, pieces, data, Path(out), validate=lambda _: {}, watch=watch, extra={})
        sampler = RunSampler(loop.order, EPOCHS)
        loader = DataLoader(data, batch_sampler=sampler, collate_fn=partial(collate, eos=pieces.eos))
        make_trainer(CONFIG, torch.device("cpu"), StopOnSignal(loop.stop_requested)).fit(loop, loader)
    cpu_s, wall_s = np.median(np.diff(np.array(times[UNTIMED_UPDATES:]), axis=0), axis=0).tolist()
    return {"cpu_s": cpu_s, "wall_s": wall_s, "peak_megabytes": peak_megabytes()}


def measure_in_turn(folder: Path) -> dict[int, list[dict[str, float]]]:
    """Each measurement in a fresh process: 2, 14, 30, 30, 14, 2, 2, 14 ... teachers."""
    found: dict[int, list[dict[str, float]]] = {count: [] for count in COUNTS}
    for repeat in range(REPEATS):
        for count in sorted(found, reverse=bool(repeat % 2)):
            command = [sys.executable, __file__, "--measure", str(folder / f"targets{count}"), "--corpus", str(folder)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[count].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def spread(runs: Sequence[dict[str, float]], key: str, form: str) -> str:
    """Median of the repeats and their range."""
    values = sorted(run[key] for run in runs)
    return f"{np.median(values):{form}} ({values[0]:{form}} to {values[-1]:{form}})"


def report(folder: Path) -> None:
    """Measures everything and prints the section."""
    corpus = make_recordings(folder)
    begun_s = time.process_time()
    for name in TEACHERS:
        for kind in KINDS:
            write_teacher(folder / "posteriors" / name, kind, name, corpus.recordings)
    print(f"posteriors written in {time.process_time() - begun_s:.0f} CPU-seconds", file=sys.stderr)
    rows = []
    for count in COUNTS:
        out = folder / f"targets{count}"
        cpu_s = measure_aggregation(folder / "posteriors", TEACHERS[:count], corpus, out)
        size = sum(megabytes(folder / "posteriors" / name) for name in TEACHERS[:count])
        rows.append(f"| {count} | {size:.1f} | {megabytes(out):.1f} | {cpu_s:.0f} |")
        print(rows[-1], file=sys.stderr)
    found = measure_in_turn(folder)
    frames = sum(round(r.duration / FRAME_S) for r in corpus.recordings)
    dense_gigabytes = frames * VOCABULARY * 4 * len(TEACHERS) / 1e9
    print(head("what targets cost with 2, 14 and 30 teachers", "targets_cost"))
    print(
        f"{RECORDINGS:,} recordings, {frames:,} CTC frames, {VOCABULARY:,} pieces, k = {KEPT}, made-up posteriors, "
        f"written and aggregated for real. {len(TEACHERS)} dense float32 CTC posteriors would take "
        f"{dense_gigabytes:.0f} GB. Times are absolute.\n"
    )
    print("| teachers | teachers' posteriors, MB | aggregated targets, MB | aggregation once, CPU-seconds |")
    print("| ---: | ---: | ---: | ---: |\n" + "\n".join(rows))
    print(
        f"\nTraining on these targets, both KD losses, model `micro` with {VOCABULARY:,}-piece heads, batch 8, "
        f"{REPEATS} processes each, in turn: median (range of the repeats' medians). Times are absolute.\n"
    )
    print(
        f"| teachers | CPU-seconds an update | to {COUNTS[0]} teachers' | wall seconds an update | peak memory, MB |\n"
        "| ---: | ---: | ---: | ---: | ---: |"
    )
    for count, runs in found.items():
        ratio = np.median([run["cpu_s"] / other["cpu_s"] for run, other in zip(runs, found[COUNTS[0]], strict=True)])
        cells = (
            spread(runs, "cpu_s", ".3f"), f"{ratio:.3f}", spread(runs, "wall_s", ".3f"),
            spread(runs, "peak_megabytes", ".0f"),
        )  # fmt: skip
        print(f"| {count} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, help="only train on these targets and print a JSON line")
    parser.add_argument("--corpus", type=Path, help="with --measure: folder of the recordings")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure_training(arguments.measure, arguments.corpus)))
        return
    with TemporaryDirectory() as folder:
        report(Path(folder))


if __name__ == "__main__":
    main()
