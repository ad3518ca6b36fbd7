"""What versions of the audio cost: each change to audio alone and all together, beside features and a training step.

    OMP_NUM_THREADS=1 python benchmarks/augmentation.py >> benchmarks/RESULTS.md

Recordings are synthetic words, tiled to one and to three seconds. A version is made once and kept, so that a run pays
for `augment.views` - 1 of them (version 0 is the recording as it is), however many epochs it has: the last columns say
what share of a supervised run of 40 epochs that is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from common import head, make_voices
from xded.audio import read_audio
from xded.augment import augment
from xded.augment_audio import View, audio_part
from xded.config import AugmentConfig, Config, build
from xded.corpus.manifest import Recording
from xded.corpus.phones import DEFAULT_WORDS
from xded.corpus.synthesiser import say
from xded.corpus.vocoder import SAMPLE_RATE, write_flac
from xded.models.student import Student
from xded.tokenizer import Tokenizer
from xded.training.data import TrainingData, collate, compute_features
from xded.training.losses import loss_parts, weighted_sum

CHANGES: dict[str, dict[str, Any]] = {
    "speed": {"speed": 0.1},
    "pitch": {"pitch": 2.0},
    "noise": {"noise_db": 5.0},
    "reverberation": {"reverberation_s": 0.5},
    "dysarthria": {"dysarthria": 0.5},
}
DURATIONS_S = (1, 3)
RECORDINGS, REPEATS, BATCH, EPOCHS, VIEWS = 16, 3, 16, 40, 4


def cpu_ms(work: Callable[[int], Any]) -> float:
    """CPU-milliseconds a recording of `work`, which gets its number: median of the repeats."""
    work(0)
    taken = []
    for _ in range(REPEATS):
        begun_s = time.process_time()
        for number in range(RECORDINGS):
            work(number)
        taken.append(1000 * (time.process_time() - begun_s) / RECORDINGS)
    return median(taken)


def recorded(folder: Path, duration_s: int) -> list[Recording]:
    """Words of synthetic voices, repeated until they last so long."""
    recordings = []
    for voice, word in zip(make_voices("V", RECORDINGS, seed=0), DEFAULT_WORDS, strict=False):
        waveform = np.resize(say(voice, word, 1), duration_s * SAMPLE_RATE)
        path = folder / f"{voice.name}_{duration_s}.flac"
        digest = write_flac(path, waveform)
        row = {"audio_filepath": path, "duration": duration_s, "text": word, "prompt": word, "audio_sha256": digest}
        name = {"recording": path.stem, "take": path.stem, "speaker": voice.name}
        recordings.append(Recording.model_validate(row | name))
    return recordings


def step_ms(config: Config, recordings: Sequence[Recording]) -> float:
    """CPU-milliseconds a recording of one supervised update."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train({r.text for r in recordings}, "char", 64, config.tokenizer.normaliser)
    student = Student(config.model, tokenizer.size, config.features).train()
    data = TrainingData(recordings, student.front_end, tokenizer)
    batch = collate([data[(0, i)] for i in range(BATCH)], tokenizer.eos)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)

    def update(_: int) -> None:
        optimizer.zero_grad()
        weighted_sum(loss_parts(student, batch, config, tokenizer), config).backward()
        optimizer.step()

    return cpu_ms(update) / BATCH


def costs(recordings: Sequence[Recording]) -> dict[str, float]:
    """CPU-milliseconds a recording, by what is done."""
    tiny, small = (build({"model": {"size": size}}, "the benchmark") for size in ("tiny", "small"))
    front_end = Student(tiny.model, 30, tiny.features).front_end
    paths = [recording.audio_filepath for recording in recordings]
    waveforms = [read_audio(path) for path in paths]
    kept = [compute_features(path, front_end) for path in paths]
    random = np.random.default_rng(0)
    found = {"read, and features": cpu_ms(lambda n: compute_features(paths[n], front_end))}
    for name, asked in {**CHANGES, "all five": {k: v for one in CHANGES.values() for k, v in one.items()}}.items():
        changes = audio_part(AugmentConfig(**asked))
        assert changes is not None
        views = [View(changes, 0, recording.recording, 1) for recording in recordings]
        found[name] = cpu_ms(lambda n, views=views: views[n].of(waveforms[n], SAMPLE_RATE))
    found["masks, warp and noise of features"] = cpu_ms(lambda n: augment(kept[n], AugmentConfig(), random))
    for size, config in (("tiny", tiny), ("small", small)):
        found[f"step of `{size}`"] = step_ms(config, recordings)
    return found


def main() -> None:
    torch.set_num_threads(1)
    print(head("augmentation of audio: CPU-milliseconds a recording", "augmentation"))
    with TemporaryDirectory() as folder:
        by_duration = {seconds: costs(recorded(Path(folder), seconds)) for seconds in DURATIONS_S}
    titles = [f"{seconds} s" for seconds in DURATIONS_S]
    shares = [f"of a run of `{size}` at {title}, %" for title in titles for size in ("tiny", "small")]
    print(f"| | {' | '.join([*titles, *shares])} |\n| --- |{' ---: |' * len([*titles, *shares])}")
    for name in by_duration[DURATIONS_S[0]]:
        cells = [f"{found[name]:.2f}" for found in by_duration.values()]
        for found in by_duration.values():
            made = found[name] + found["read, and features"]  # a version has features of its own
            runs = [EPOCHS * (found[f"step of `{size}`"] + found["masks, warp and noise of features"])
                    for size in ("tiny", "small")]  # fmt: skip
            cells += [f"{100 * (VIEWS - 1) * made / run:.1f}" if name in (*CHANGES, "all five") else "" for run in runs]
        print(f"| {name} | {' | '.join(cells)} |")
    size_mb = [AugmentConfig().views * 100 * seconds * 80 * 4 / 1e6 for seconds in DURATIONS_S]
    print(f"\nFeatures of {VIEWS} versions in memory: {' and '.join(f'{mb:.2f} MB' for mb in size_mb)} a recording.")
    print(f"Runs of {EPOCHS} epochs, {VIEWS} versions, batches of {BATCH}. Times are absolute.")


if __name__ == "__main__":
    main()
