"""What writing teachers' posteriors costs beyond the forward passes that they come from.

    python benchmarks/posteriors.py --threads 2 >> benchmarks/RESULTS.md

Recordings, tokenizer and model of `whole_job.py`; the teachers have random weights whose CTC heads prefer the blank, so
that they say about as much as real ones. In turn for every teacher: `extract`, which 'xded targets' calls (loads the
teacher, softens, keeps the 32 largest entries, writes both kinds), and the same recogniser's plain forward pass (both
heads, teacher-forced) over the same batches. Both find the features in memory, as the second teacher of a process does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from common import WORK, head
from whole_job import make_recordings, make_tokenizer
from xded.config import Config, build
from xded.corpus.manifest import Recording
from xded.models.checkpoints import save
from xded.models.recogniser import Recogniser, describe, load_recogniser
from xded.models.student import Student, decoder_input
from xded.teachers.posteriors import extract
from xded.tokenizer import Tokenizer
from xded.training.data import TrainingData
from xded.training.evaluation import batches

RECORDINGS, TEACHERS = 1_785, 14
BLANK_LEAD = 6.0  # nats, of the blank before the other pieces


def write_teacher(path: Path, number: int, config: Config, pieces: Tokenizer) -> None:
    """A teacher of random weights."""
    torch.manual_seed(number)
    student = Student(config.model, pieces.size, config.features)
    student.ctc_head.weight.data *= 3.0
    student.ctc_head.bias.data[pieces.blank] += BLANK_LEAD
    facts = describe(pieces, config, f"teacher {number}", ())
    save({**facts, "model_state_dict": student.state_dict(), "epoch": 1}, path)


@torch.inference_mode()
def plain_forward(recogniser: Recogniser, data: TrainingData, batch_size: int) -> None:
    """Both heads' logits of all recordings, which are thrown away."""
    student = recogniser.student
    for _, batch in batches(data, batch_size):
        assert batch.features is not None
        encoded, lengths = student.encode(batch.features, batch.feature_lengths)
        student.ctc_logits(encoded)
        student.decoder_logits(decoder_input(batch.tokens, recogniser.tokenizer.bos), encoded, lengths)


def timed(work: Callable[[], object]) -> np.ndarray:
    """Wall seconds and CPU-seconds."""
    before = np.array([time.perf_counter(), time.process_time()])
    work()
    return np.array([time.perf_counter(), time.process_time()]) - before


def measure_teacher(
    number: int, recordings: Sequence[Recording], config: Config, pieces: Tokenizer, folder: Path
) -> dict[str, np.ndarray]:
    """Wall and CPU-seconds of all features (in the first turn), of plain passes and of `extract`, in changing order."""
    path, name = folder / "teacher.pt", f"t{number:02d}"
    write_teacher(path, number, config, pieces)
    recogniser = load_recogniser(path)
    data = TrainingData(recordings, recogniser.student.front_end, pieces)
    runs: dict[str, Callable[[], object]] = {
        "plain": lambda: plain_forward(recogniser, data, config.decode.batch_size),
        "extract": lambda: extract(path, name, recordings, config, folder / "out" / name),
    }
    times = {"features": timed(lambda: [data.features(place) for place in range(len(data))])}
    return times | {kind: timed(runs[kind]) for kind in sorted(runs, reverse=bool(number % 2))}


def report(given: argparse.Namespace) -> None:
    """Measures everything and prints the section."""
    torch.set_num_threads(given.threads)
    pieces, prompts = make_tokenizer()
    recordings = make_recordings(given.folder / f"corpus_{given.recordings}", given.recordings, prompts)
    config = build({"model": {"size": given.size}}, "the benchmark")
    with TemporaryDirectory() as temporary:
        out = Path(temporary)
        turns = [measure_teacher(number, recordings, config, pieces, out) for number in range(given.teachers)]
        megabytes = sum(file.stat().st_size for file in (out / "out").rglob("*") if file.is_file()) / 1e6
    extracting, plain = (np.stack([turn[kind] for turn in turns]) for kind in ("extract", "plain"))
    print(head("posteriors of teachers", "posteriors").replace("one thread", f"{given.threads} thread(s)"))
    print(
        f"{given.teachers} teachers, `{given.size}`, {len(recordings):,} recordings of "
        f"{statistics.fmean(r.duration for r in recordings):.2f} s on average, batches of {config.decode.batch_size} "
        f"of like length; {megabytes / given.teachers:.1f} MB written a teacher; load {os.getloadavg()[0]:.1f}.\n"
    )
    print("| | wall seconds a teacher, median (range) | CPU-seconds |\n| --- | ---: | ---: |")
    for name, rows in (("forward passes alone", plain), ("posteriors, written", extracting)):
        cells = [f"{np.median(c):.1f} ({c.min():.1f} to {c.max():.1f})" for c in rows.T]
        print(f"| {name} | " + " | ".join(cells) + " |")
    wall, cpu = np.median(plain / extracting, axis=0)
    print(f"| speed of posteriors over that of passes, median of turns | {wall:.2f} | {cpu:.2f} |")
    features_s, features_cpu_s = turns[0]["features"]
    print(
        f"\nFeatures of all recordings, once a process: {features_s:.1f} s ({features_cpu_s:.1f} CPU-seconds). "
        f"All teachers, with features: {(features_s + extracting[:, 0].sum()) / 60:.1f} minutes."
    )


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", type=int, default=TEACHERS)
    parser.add_argument("--recordings", type=int, default=RECORDINGS)
    parser.add_argument("--size", default="small", help="of the teachers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=WORK / "whole_job", help="where the recordings are kept")
    return parser.parse_args(given)


def main() -> None:
    report(arguments())


if __name__ == "__main__":
    main()
