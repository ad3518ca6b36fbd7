"""Batches: how much of them is padding, at the lengths of the study's recordings, and how long training waits for data.

    python benchmarks/batches.py >> benchmarks/RESULTS.md

Lengths are the CTC frame counts of the study's speakers where its files lie beside the repository. Waiting is measured
on the project's sampler, data and loss, two threads, loading in the process that trains (as training does): in the
first epoch features are computed, later they are in memory.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch.utils.data import DataLoader

from common import ROOT, head, make_voices, record
from xded.audio import read_audio
from xded.config import build
from xded.corpus.manifest import Recording
from xded.corpus.phones import DEFAULT_WORDS
from xded.corpus.vocoder import SAMPLE_RATE, write_flac
from xded.models.student import Student
from xded.tokenizer import Tokenizer
from xded.training.data import TrainingData, collate
from xded.training.losses import loss_parts, weighted_sum
from xded.training.optimizer import AdamW
from xded.training.order import Order, RunSampler

METADATA = ROOT.parent / "shared" / "reference" / "teacher_metadata"
EPOCHS = 40  # of the study


def study_lengths() -> tuple[int, ...]:
    """Milliseconds of all recordings of the study's speakers: 40 ms a CTC frame."""
    files = sorted(METADATA.glob("*_metadata.json"))
    counts = [json.loads(file.read_text(encoding="utf-8"))["ctc_frame_lens"] for file in files]
    return tuple(40 * int(count) for rows in counts for count in rows)


def report_padding() -> None:
    """Share of frames that are padding, of three epochs."""
    everything = study_lengths()
    drawn = tuple(np.random.default_rng(0).choice(everything, 1_660).tolist())
    print("| recordings | batch | padding, % | in random order, % |\n| ---: | ---: | ---: | ---: |")
    for lengths in (drawn, everything):
        for size in (8, 32):
            shares = []
            for epoch in range(3):
                order = np.random.default_rng(epoch).permutation(len(lengths)).tolist()
                unsorted = [order[i : i + size] for i in range(0, len(order), size)]
                both = (Order(lengths, size, 0).epoch(epoch), unsorted)
                padded = [sum(len(b) * max(lengths[i] for i in b) for b in batches) for batches in both]
                shares.append([100 * (1 - sum(lengths) / total) for total in padded])
            ours, random = np.mean(shares, axis=0).tolist()
            print(f"| {len(lengths):,} | {size} | {ours:.1f} | {random:.1f} |")


def lengthened(recording: Recording, number: int) -> Recording:
    """The recording again and again until it lasts 1.5 to 4.5 s, 3 s on average as in the study."""
    duration_s = 1.5 + number % 31 / 10
    digest = write_flac(
        recording.audio_filepath, np.resize(read_audio(recording.audio_filepath), round(duration_s * SAMPLE_RATE))
    )
    return recording.model_copy(update={"duration": duration_s, "audio_sha256": digest})


def waiting(size: str, threads: int, folder: Path) -> dict[str, float]:
    """Trains three epochs; share of the wall-clock time in which the loop waited for a batch, per cent."""
    torch.set_num_threads(threads)
    words = DEFAULT_WORDS[:24]
    recordings = record(folder, make_voices("W", 2, seed=0), words, 2)
    recordings = [lengthened(recording, number) for number, recording in enumerate(recordings)]
    config = build({"model": {"size": size}}, "the benchmark")
    tokenizer = Tokenizer.train(words, "char", 64, "upper")
    student = Student(config.model, tokenizer.size, config.features)
    data = TrainingData(recordings, student.front_end, tokenizer, augmentation=config.augment)
    optimiser = AdamW([student], 0.01, lr=1e-4)
    sampler = RunSampler(Order(tuple(data.lengths), 8, 0), 3)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=partial(collate, eos=tokenizer.eos))
    spent = np.zeros((3, 2))
    batches, per_epoch = iter(loader), len(sampler) // 3
    for number in range(len(sampler)):
        begun = time.perf_counter()
        batch = next(batches)
        got = time.perf_counter()
        optimiser.zero_grad()
        weighted_sum(loss_parts(student, batch, config, tokenizer), config).backward()
        optimiser.step()
        spent[number // per_epoch] += got - begun, time.perf_counter() - got
    first, later = spent[0], spent[1:].mean(axis=0)
    run = first + (EPOCHS - 1) * later
    shares = [float(100 * times[0] / times.sum()) for times in (first, later, run)]
    return {**dict(zip(("first", "later", "run"), shares, strict=True)), "step_s": float(later[1] / per_epoch)}


def report_waiting(folder: Path) -> None:
    """Loading in the process that trains, as training does."""
    print(f"\n| model | threads | step, s | waiting in the first epoch, % | in later ones, % | of {EPOCHS} epochs, % |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for size in ("micro", "small"):
        found = waiting(size, 2, folder / size)
        shares = " | ".join(f"{found[key]:.1f}" for key in ("first", "later", "run"))
        print(f"| {size} | 2 | {found['step_s']:.3f} | {shares} |")


def main() -> None:
    print(head("batches: padding, and waiting for data", "batches"))
    if METADATA.is_dir():
        report_padding()
    with TemporaryDirectory() as folder:
        report_waiting(Path(folder))


if __name__ == "__main__":
    main()
