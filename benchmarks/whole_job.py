"""The reference study's job as this project runs it: 1,660 recordings, 5 epochs with a frozen encoder, then 35.

    python benchmarks/whole_job.py --threads 2 [--precision bf16-mixed] [--frozen 1 --unfrozen 2] [--resume]

Trains the student `small` through the public interface (`training.run.fit`, what 'xded train' calls), validation and
checkpoints included, and times every batch from outside: what is waited for it, and until the next one is asked for.
With fewer epochs than the job has, the rest is projected from the mean of those that were measured.

Recordings are made up: synthetic words repeated until they have the lengths of UASpeech's block 3 (quantiles of 24,311
recordings of 15 speakers), 1.4 to 37 s and 3.2 s on average. The tokenizer has 5,000 pieces of made-up words; the 255
prompts have the numbers of tokens that the study's have. The parent has random weights. The objective is supervised:
targets of teachers would add less than a millisecond to a step (see targets_cost.py).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from common import WORK, head, make_voices
from decoding import LENGTHS_OF_WORDS
from xded.config import Config, build
from xded.corpus.folds import Fold
from xded.corpus.manifest import Recording, read_corpus, write_manifest
from xded.corpus.phones import DEFAULT_WORDS
from xded.corpus.synthesiser import say
from xded.corpus.vocoder import SAMPLE_RATE, write_flac
from xded.models.checkpoints import save
from xded.models.recogniser import describe, pick_device
from xded.models.student import Student
from xded.tokenizer import Tokenizer
from xded.training import run
from xded.training.data import Batch
from xded.training.job import Job
from xded.training.order import RunSampler

RECORDINGS, VALIDATION, SPEAKERS, PIECES = 1_660, 100, 14, 5_000
FROZEN, UNFROZEN = 5, 35  # epochs of the study
MADE_UP_WORDS = 20_000  # that pieces are made of
# seconds that so many per cent of UASpeech's recordings do not exceed
PER_CENT = (0, 1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.5, 99.9, 100)
SECONDS = (1.36, 1.6, 1.8, 1.92, 2.12, 2.28, 2.4, 2.56, 2.76, 3.08, 3.6, 4.76, 6.16, 8.52, 11.8, 15.97, 22.76, 36.88)
PRODUCT = {"cpu": (408, 176, 704), "cuda": (8_192, 8_192, 8_192)}  # of the floor; on the CPU a feed-forward layer's


class Stopwatch:
    """What was seen of every batch, a row each.

    A row has `epoch` (from 0), `frozen`, `last` (of its epoch), `waiting_s`, `seconds` and `cpu_s` (until the next
    batch is asked for, so with the step; of an epoch's last batch with validation and checkpoints), `frames`, and
    `padded`, which is their number with padding.
    """

    def __init__(self) -> None:
        self.begun_s = time.perf_counter()
        self.setup_s = 0.0
        self.rows: list[dict[str, float]] = []
        self.asked = np.zeros(2)

    def ask(self) -> None:
        """The loop wants another batch, or has ended: what the last one took is known."""
        now = np.array([time.perf_counter(), time.process_time()])
        if self.rows:
            self.rows[-1] |= dict(zip(("seconds", "cpu_s"), (now - self.asked).tolist(), strict=True))
        else:
            self.setup_s = now[0] - self.begun_s
        self.asked = now

    def get(self, batch: Batch, number: int, per_epoch: int) -> None:
        """The batch is there."""
        values = batch.features if batch.encoded is None else batch.encoded
        assert values is not None
        frames, padded = int(batch.feature_lengths.sum()), values.shape[0] * values.shape[1]
        epoch, place = divmod(number, per_epoch)
        row = {"epoch": epoch, "frozen": batch.encoded is not None, "last": place == per_epoch - 1}
        self.rows.append(row | {"frames": frames, "padded": padded, "waiting_s": time.perf_counter() - self.asked[0]})


@cache
def make_tokenizer() -> tuple[Tokenizer, tuple[str, ...]]:
    """5,000 pieces, and 255 prompts of as many tokens as the study's."""
    random = np.random.default_rng(0)
    parts = ("B BR C CH D F G GR H J K L M N P PL QU R S ST T TR V W X Y Z", "A E I O U EA OU", "N R T S L ND")
    onsets, nuclei, codas = (part.split() for part in parts)
    codas.append("")
    lengths = 1 + random.geometric(0.5, size=MADE_UP_WORDS)
    words = sorted(
        {"".join(str(random.choice(part)) for _ in range(n) for part in (onsets, nuclei, codas)) for n in lengths}
    )
    pieces = Tokenizer.train(words, "unigram", PIECES, "upper")
    by_tokens: dict[int, list[str]] = {}
    for word in words:
        by_tokens.setdefault(len(pieces.encode(word)), []).append(word)
    return pieces, tuple(by_tokens[tokens].pop() for tokens in LENGTHS_OF_WORDS)


def make_recordings(folder: Path, count: int, prompts: Sequence[str]) -> tuple[Recording, ...]:
    """So many recordings, of UASpeech's lengths; those that are there are kept."""
    if not (folder / "manifest.jsonl").is_file():
        random, voices = np.random.default_rng(0), make_voices("W", SPEAKERS, seed=0)
        recordings = []
        for number, share in enumerate(100 * random.random(count)):
            voice, word = voices[number % SPEAKERS], DEFAULT_WORDS[number % len(DEFAULT_WORDS)]
            samples = round(float(np.interp(share, PER_CENT, SECONDS)) * SAMPLE_RATE)
            name = f"{voice.name}_{number:04d}"
            path, text = folder / f"{name}.flac", prompts[number % len(prompts)]
            digest = write_flac(path, np.resize(say(voice, word, number), samples))
            recordings.append(
                Recording(
                    audio_filepath=path, duration=samples / SAMPLE_RATE, text=text, recording=name, take=name,
                    prompt=text, speaker=voice.name, sample_rate=SAMPLE_RATE, audio_sha256=digest,
                )
            )  # fmt: skip
        write_manifest(folder / "manifest.jsonl", recordings)
    return read_corpus(folder).recordings


def make_job(folder: Path, given: argparse.Namespace) -> Job:
    """The study's job, or a smaller one of its kind."""
    pieces, prompts = make_tokenizer()
    count = given.recordings + given.validation
    recordings = make_recordings(folder / f"corpus_{count}", count, prompts)
    stages = [
        {"epochs": epochs, "peak_lr": rate, "freeze_encoder": frozen}
        for epochs, rate, frozen in ((given.frozen, 3e-4, True), (given.unfrozen, 2e-4, False))
        if epochs
    ]
    parent = folder / f"parent_{given.size}.pt"
    train = {
        "stages": stages, "init": parent, "batch_size": 8, "device": given.device, "threads": given.threads,
        "precision": given.precision, "stop_on_collapse": False, "save_every_steps": 100_000,
    }  # fmt: skip
    config = build({"model": {"size": given.size}, "train": train}, "the benchmark")
    torch.manual_seed(0)
    student = Student(config.model, pieces.size, config.features)
    save({**describe(pieces, config, "parent", ()), "model_state_dict": student.state_dict(), "epoch": 1}, parent)
    train_on, held_back = recordings[: given.recordings], recordings[given.recordings :]
    fold = Fold(held_out=("nobody",))
    return Job("student", config, list(train_on), list(held_back), fold, frozenset(), pieces, folder / "run")


def timed_loader(watch: Stopwatch) -> type[DataLoader]:
    """A `DataLoader` of a run that is timed."""

    class Timed(DataLoader):
        def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
            sampler, batches = cast(RunSampler, self.batch_sampler), super().__iter__()
            for number in range(sampler.first, sampler.total):
                watch.ask()
                batch = next(batches)
                watch.get(batch, number, sampler.order.per_epoch)
                yield batch

    return Timed


def train(job: Job, *, resume: bool) -> dict[str, Any]:
    """Trains; seconds before the first batch, and rows of all batches, also of what the run goes on from."""
    path, watch = job.out.with_suffix(".json"), Stopwatch()
    before = json.loads(path.read_text(encoding="utf-8")) if resume and path.is_file() else {"rows": []}
    try:
        with patch.object(run, "DataLoader", timed_loader(watch)):
            run.fit(job, resume=resume)
    finally:
        watch.ask()
        seen = {"setup_s": before.get("setup_s", watch.setup_s), "rows": [*before["rows"], *watch.rows]}
        path.write_text(json.dumps(seen), encoding="utf-8")
    return seen


def operations(config: Config, vocabulary: int) -> tuple[float, float]:
    """Floating-point operations, in products and convolutions, of a forward pass a second of audio: encoder, heads."""
    student = Student(config.model, vocabulary, config.features).eval()
    tokens, frames = torch.ones(8, 3, dtype=torch.int64), torch.full((8,), 200)
    with torch.no_grad(), FlopCounterMode(display=False) as encoding:
        encoded, lengths = student.encode(torch.zeros(8, 200, config.features.mels), frames)
    with torch.no_grad(), FlopCounterMode(display=False) as heads:
        student.ctc_logits(encoded)
        student.decoder_logits(tokens, encoded, lengths)
    return encoding.get_total_flops() / 16.0, heads.get_total_flops() / 16.0


def operations_a_second(config: Config) -> float:
    """Of a matrix product, in the number format of the run, as the run's settings have it."""
    device = "cuda" if pick_device(config.train.device).type == "cuda" else "cpu"
    kind = torch.bfloat16 if "bf16" in config.train.precision else torch.float32
    rows, inner, columns = PRODUCT[device]
    values, weights = (torch.randn(n, inner, device=device).to(kind) for n in (rows, columns))
    seconds = []
    for _ in range(60):
        begun = time.perf_counter()
        for _ in range(20):
            F.linear(values, weights)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begun) / 20)
    return 2 * rows * inner * columns / statistics.median(seconds[10:])


def stage_row(name: str, count: int, rows: list[dict[str, float]], per_epoch: int) -> tuple[str, float]:
    """A row of the table, and seconds an epoch."""
    sums = {key: sum(row[key] for row in rows) for key in rows[0]}
    epochs = sums["last"]
    whole = per_epoch / len(rows)  # a run that was stopped has begun an epoch twice, or half of one
    step_s = statistics.median(row["seconds"] for row in rows)
    after_s = sum(row["seconds"] - step_s for row in rows if row["last"])
    cells = [
        f"{sums['seconds'] * whole:.1f}", f"{sums['cpu_s'] * whole:.1f}", f"{step_s:.3f}",
        f"{100 * sums['waiting_s'] / sums['seconds']:.1f}", f"{100 * (1 - sums['frames'] / sums['padded']):.1f}",
        f"{after_s / max(1, epochs):.1f}",
    ]  # fmt: skip
    return f"| {name} | {count} | {epochs:.0f} | " + " | ".join(cells) + " |", sums["seconds"] * whole


def report(job: Job, seen: dict[str, Any]) -> None:
    """The section."""
    config = job.config
    threads = config.train.threads or torch.get_num_threads()
    print(head("the whole job of the reference study", "whole_job").replace("one thread", f"{threads} thread(s)"))
    seconds = sum(recording.duration for recording in job.train)
    print(
        f"Student `{config.model.size}`, {config.train.precision}, {len(job.train):,} recordings, "
        f"{seconds / 3600:.2f} h, {seconds / len(job.train):.2f} s on average, batch {config.train.batch_size}, "
        f"supervised, validation on {len(job.validation)} after every epoch; {config.train.device}; load "
        f"{os.getloadavg()[0]:.1f}.\n"
    )
    columns = ("stage", "epochs", "measured", "an epoch, s", "CPU-seconds", "median step, s", "waiting for data, %")
    print("|", " | ".join([*columns, "padding, %", "validation and saving, s"]), "|\n| --- |" + " ---: |" * 8)
    means: list[float] = []
    per_epoch = -(-len(job.train) // config.train.batch_size)
    for name, frozen, count in (("encoder frozen", True, FROZEN), ("everything", False, UNFROZEN)):
        rows = [row for row in seen["rows"] if row["frozen"] == frozen]
        if rows:
            line, epoch_s = stage_row(name, count, rows, per_epoch)
            means.append(epoch_s)
            print(line)
    print(
        f"\nBefore the first step (checks; features and encoder outputs of all recordings): {seen['setup_s']:.1f} s. "
        f"Peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6:.0f} MB."
    )
    if len(means) == 2:
        whole_s = seen["setup_s"] + FROZEN * means[0] + UNFROZEN * means[1]
        everything = len({row["epoch"] for row in seen["rows"]}) == FROZEN + UNFROZEN
        how = "measured" if everything else "projected"
        print(f"The whole job, {how}: {whole_s / 60:.1f} minutes.")
        print(floor_lines(config, job.tokenizer.size, seconds, whole_s))


def floor_lines(config: Config, vocabulary: int, audio_s: float, whole_s: float) -> str:
    """What share of a run its products would take at the machine's speed, padding and validation not counted."""
    encoder, heads = operations(config, vocabulary)
    once, frozen, all_of_it = encoder, 3 * heads, 3 * (encoder + heads)  # a backward pass is twice a forward pass
    work = audio_s * (once + FROZEN * frozen + UNFROZEN * all_of_it)
    speed = operations_a_second(config)
    return (
        f"Its floor: {work / 1e12:.1f} TFLOP ({16 * all_of_it / 1e9:.1f} GFLOP a step of 8 x 2 s) at the "
        f"{speed / 1e9:.0f} GFLOP/s that a matrix product reaches here are {work / speed / 60:.1f} minutes: "
        f"{100 * work / speed / whole_s:.0f} % of the time."
    )


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frozen", type=int, default=FROZEN, help="epochs with a frozen encoder that are run")
    parser.add_argument("--unfrozen", type=int, default=UNFROZEN, help="epochs of everything that are run")
    parser.add_argument("--recordings", type=int, default=RECORDINGS)
    parser.add_argument("--validation", type=int, default=VALIDATION, help="recordings for validation")
    parser.add_argument("--size", default="small", help="of the student")
    parser.add_argument("--precision", default="32-true", help="of train.precision")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="go on with the last run, if it was stopped")
    parser.add_argument("--folder", type=Path, default=WORK / "whole_job")
    return parser.parse_args(given)


def main() -> None:
    given = arguments()
    job = make_job(given.folder, given)
    if not given.resume:
        shutil.rmtree(job.out, ignore_errors=True)
    report(job, train(job, resume=given.resume))


if __name__ == "__main__":
    main()
