"""How time and memory grow with recordings, speakers, vocabulary and length; what opening a million recordings costs.

    python benchmarks/growth.py >> benchmarks/RESULTS.md

Manifests are synthetic (empty files stand for audio: nothing here listens), and every measurement is a process of its
own. CPU-seconds are the median of a few repeats after one untimed call where calls are short; memory is the peak above
what the process held before the part began. The exponent b of "cost = a x size^b" is the slope of a least-squares line
through the logarithms. Writes docs/growth.svg.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SPEAKERS, SPEAKERS_RECORDINGS = 15, 30_000  # where the other is varied
MILLION, MILLION_SPEAKERS = 1_000_000, 1_000
LIMIT_S, LIMIT_MEGABYTES = 30, 2_000
HELD_OUT = "S0001"
PROMPTS, MICS, BLOCKS = 255, 7, 3  # at most, as in UASpeech
BANDS = ("very_low", "low", "mid", "high")
FRAMES, KEPT, PIECES = 75, 8, 64  # of made-up posteriors
TEACHERS = ("S0002", "S0003")
LONG_S = 0.5  # shorter work is repeated
REPEATS = 7


def rows_of(count: int, speakers: int) -> Iterator[dict[str, Any]]:
    """Lines of a manifest: every speaker says every prompt into all microphones, in three blocks, then once more."""
    for speaker in range(speakers):
        name, role = f"S{speaker:04d}", "target" if speaker % 3 else "control"
        who = {"speaker": name, "role": role} | ({"band": BANDS[speaker % 4]} if role == "target" else {})
        for number in range(count // speakers):
            said, mic = divmod(number, MICS)
            prompt, block, again = said % PROMPTS, said // PROMPTS % BLOCKS + 1, said // (PROMPTS * BLOCKS)
            take = f"{name}_B{block}_W{prompt}_{again}"
            recording = f"{take}_M{mic}"
            yield who | {
                "audio_filepath": f"audio/{name}/{recording}.flac", "duration": 1.5 + number % 97 / 25,
                "text": f"W{prompt}", "recording": recording, "take": take, "prompt": f"W{prompt}",
                "block": f"B{block}", "mic": f"M{mic}", "word_type": "CW", "sample_rate": 16_000,
                "audio_sha256": hashlib.sha256(recording.encode()).hexdigest(),
            }  # fmt: skip


def make_manifest(folder: Path, count: int, speakers: int) -> Path:
    """A manifest, and an empty file for every line."""
    for speaker in range(speakers):
        (folder / "audio" / f"S{speaker:04d}").mkdir(parents=True)
    with (folder / "manifest.jsonl").open("w", encoding="utf-8") as file:
        for row in rows_of(count, speakers):
            (folder / row["audio_filepath"]).touch()
            file.write(json.dumps(row) + "\n")
    return folder


def opening(folder: Path, _: float) -> Callable[[], object]:
    """`read_corpus`, the fold, its split, and which teachers cover which prompt."""
    from xded.config import FoldConfig
    from xded.corpus.folds import coverage, key_of, make_fold, split
    from xded.corpus.manifest import read_corpus

    def work() -> None:
        corpus = read_corpus(folder)
        fold = make_fold(corpus, FoldConfig(held_out=(HELD_OUT,)))
        parts = split(corpus, fold, controls=True, validation="takes", validation_fraction=0.1, seed=0)
        heard: dict[str, set[tuple[str, str, str]]] = {}
        for recording in parts.train:
            if recording.role == "target":
                heard.setdefault(recording.speaker, set()).add(key_of(recording))
        coverage(heard, "partial", len(heard) // 2)

    return work


def sampling(folder: Path, _: float) -> Callable[[], object]:
    """All batches of an epoch."""
    from xded.corpus.manifest import read_corpus
    from xded.training.order import Order, RunSampler

    lengths = tuple(round(1000 * recording.duration) for recording in read_corpus(folder).recordings)

    def work() -> None:
        for _ in RunSampler(Order(lengths, 8, 0), 1):
            pass

    return work


def planning(folder: Path, _: float) -> Callable[[], object]:
    """A study of two folds, three seeds and three attempts, with all teachers."""
    from xded.corpus.manifest import read_corpus
    from xded.study.plan import build
    from xded.study.planner import Planner

    corpus = read_corpus(folder)
    settings = {
        "name": "growth", "corpus": str(folder), "held_out": [HELD_OUT, "S0002"],
        "config": {"model": {"size": "micro"}, "tokenizer": {"kind": "char", "vocabulary": 64}},
        "attempts": {
            "supervised": {"start": "parent"},
            "student": {"set": {"objective.ctc_kd": 1.0}},
            "student from the parent": {"set": {"objective.ctc_kd": 1.0}, "start": "parent"},
        },
    }  # fmt: skip
    study = build(settings, "the benchmark")
    out = folder / "study"
    return lambda: Planner(study, corpus, out).plan()


def write_posteriors(folder: Path, _: float) -> Callable[[], object]:
    """CTC posteriors of two teachers, for `aggregating`; no measurement."""
    from xded.corpus.manifest import read_corpus
    from xded.targets.store import Entry, Index, Posterior, StoreWriter

    recordings = read_corpus(folder).recordings

    def write(name: str) -> None:
        index = Index(
            kind="ctc", temperature=2.0, top_k=KEPT, vocabulary=PIECES, teacher_forced=False, frame_rate_hz=25.0,
            tokenizer="made up", teachers=(name,), teacher_hashes={name: "0" * 64}, provenance=(),
        )  # fmt: skip
        writer, random = StoreWriter(folder / "posteriors" / name / "ctc", index), np.random.default_rng(0)
        for recording in recordings:
            weights = random.random((FRAMES, KEPT + 1), dtype=np.float32)
            shares = weights / weights.sum(1, keepdims=True)
            ids = (random.integers(PIECES, size=(FRAMES, 1)) + 7 * np.arange(KEPT)) % PIECES
            entry = Entry(recording=recording.recording, audio_sha256=str(recording.audio_sha256), steps=FRAMES)
            writer.add(entry, Posterior(ids, shares[:, 1:], shares[:, 0], shares[:, 0]))
        writer.close()

    return lambda: [write(name) for name in TEACHERS]


def aggregating(folder: Path, _: float) -> Callable[[], object]:
    """The mean of two teachers' CTC posteriors, read and written."""
    from xded.config import build
    from xded.corpus.manifest import read_corpus
    from xded.teachers.aggregation import aggregate_all
    from xded.tokenizer import Tokenizer

    corpus, config = read_corpus(folder), build({}, "the benchmark")
    asked = dict.fromkeys(TEACHERS, corpus.recordings)
    folders = {name: folder / "posteriors" / name for name in TEACHERS}
    pieces = Tokenizer.train(["ABCDEFGHIJKLMNOPQRSTUVWXYZ"], "char", PIECES, "upper")  # reads some of the made-up ids
    return lambda: aggregate_all(folders, asked, corpus.recordings, corpus, pieces, config, folder / "targets")


def make_student(vocabulary: int) -> tuple[Any, Any, Any]:
    """A `micro` student with so many pieces, its config, and a tokenizer for its special ids."""
    import torch

    from xded.config import build
    from xded.models.student import Student
    from xded.tokenizer import Tokenizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = build({"model": {"size": "micro"}}, "the benchmark")
    words = ["".join(chr(65 + (n * k + k) % 26) for k in range(1, 6)) for n in range(26)]
    return Student(config.model, vocabulary, config.features), config, Tokenizer.train(words, "char", 64, "upper")


def stepping(_: Path, vocabulary: float) -> Callable[[], object]:
    """Forward, CTC and cross-entropy, backward, AdamW: `micro`, 8 recordings of 3 s."""
    import torch

    from xded.training.data import Batch
    from xded.training.losses import loss_parts, weighted_sum
    from xded.training.optimizer import AdamW

    student, config, tokenizer = make_student(int(vocabulary))
    optimiser = AdamW([student], 0.01, lr=1e-4)
    batch = Batch(
        recordings=[f"r{n}" for n in range(8)], speakers=["s"] * 8, features=torch.randn(8, 300, config.features.mels),
        feature_lengths=torch.full((8,), 300), encoded=None, encoded_lengths=None,
        tokens=torch.randint(3, int(vocabulary), (8, 6)), token_lengths=torch.full((8,), 5), ctc_target=None,
        least_blank=None, decoder_target=None,
    )  # fmt: skip

    def work() -> None:
        optimiser.zero_grad()
        weighted_sum(loss_parts(student, batch, config, tokenizer), config).backward()
        optimiser.step()

    return work


def decoding(_: Path, vocabulary: float) -> Callable[[], object]:
    """Greedy decoding with both heads, 20 decoder steps: `micro`, 8 recordings of 3 s."""
    import torch

    from xded.decoding import ctc_greedy, decoder_greedy

    student, config, tokenizer = make_student(int(vocabulary))
    student.eval()
    features, lengths = torch.randn(8, 300, config.features.mels), torch.full((8,), 300)

    @torch.no_grad()
    def work() -> None:
        encoded, frames = student.encode(features, lengths)
        ctc_greedy(student.ctc_logits(encoded).log_softmax(-1), frames, tokenizer.blank)
        decoder_greedy(student, encoded, frames, tokenizer, 20)

    return work


def encoding(_: Path, seconds: float) -> Callable[[], object]:
    """The encoder of `micro`, one recording."""
    import torch

    student, config, _ = make_student(64)
    student.eval()
    features = torch.randn(1, round(100 * seconds), config.features.mels)
    lengths = torch.tensor([features.shape[1]])

    @torch.no_grad()
    def work() -> None:
        student.encode(features, lengths)

    return work


@dataclass(frozen=True)
class Part:
    """A curve of the plot: `work` at each of some sizes of an axis."""

    axis: str
    name: str
    work: Callable[[Path, float], Callable[[], object]]
    sizes: tuple[float, ...]


RECORDINGS = (1_000, 3_000, 10_000, 30_000, 100_000)
MANY_SPEAKERS = (15, 50, 150, 500, 1_000)
PARTS = (
    Part("recordings", "open and plan a fold", opening, RECORDINGS),
    Part("recordings", "batches of an epoch", sampling, RECORDINGS),
    Part("recordings", "plan a study", planning, RECORDINGS),
    Part("recordings", "aggregate targets", aggregating, RECORDINGS[:-2]),
    Part("speakers", "open and plan a fold", opening, MANY_SPEAKERS),
    Part("speakers", "plan a study", planning, MANY_SPEAKERS),
    Part("vocabulary", "training step", stepping, (40, 150, 500, 1_500, 5_000)),
    Part("vocabulary", "greedy decoding", decoding, (40, 150, 500, 1_500, 5_000)),
    Part("length, s", "encoder", encoding, (1, 3, 10, 30)),
)
WORKS = {work.__name__: work for work in (*(part.work for part in PARTS), write_posteriors)}


def memory(key: str) -> float:
    """Memory of this process, 10^6 bytes: VmRSS now, VmHWM at most."""
    return int(re.findall(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))[0]) / 1e3


def measure(name: str, folder: Path, size: float) -> dict[str, float]:
    """Runs a piece of work in this process: CPU and wall seconds, memory above what was held before, and in all."""
    work = WORKS[name](folder, size)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again here
    times = []
    for _ in range(REPEATS + 1):
        begun = time.perf_counter(), time.process_time()
        work()
        times.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
        if times[0][1] > LONG_S:
            break
    wall_s, cpu_s = np.median(times[1:] or times, axis=0).tolist()
    return {"wall_s": wall_s, "cpu_s": cpu_s, "megabytes": max(memory("VmHWM") - before, 0), "peak": memory("VmHWM")}


def measured(work: str, folder: Path, size: float = 0) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--measure", work, "--folder", str(folder), "--size", str(size)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(work, folder.name, size, found, file=sys.stderr)
    return found


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of a line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(costs, 1e-9)), 1)[0])


def measure_parts(folder: Path) -> dict[Part, list[dict[str, float]]]:
    """Every part at every size; manifests are made once."""
    made: dict[tuple[int, int], Path] = {}

    def manifest(part: Part, size: float) -> Path:
        if part.axis not in ("recordings", "speakers"):
            return folder
        counts = (int(size), SPEAKERS) if part.axis == "recordings" else (SPEAKERS_RECORDINGS, int(size))
        if counts not in made:
            made[counts] = make_manifest(folder / "{}x{}".format(*counts), *counts)
        return made[counts]

    found = {}
    for part in PARTS:
        if part.work is aggregating:
            for size in part.sizes:
                measured(write_posteriors.__name__, manifest(part, size))
        found[part] = [measured(part.work.__name__, manifest(part, size), size) for size in part.sizes]
    return found


def table(found: dict[Part, list[dict[str, float]]]) -> list[str]:
    """One row a part: cost at the smallest and the largest size, exponents of all sizes and of the last two."""
    lines = [
        "| against | part | sizes | CPU-seconds | exponent | of the last two | memory, MB | of the last two |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for part, runs in found.items():
        cpu_s, megabytes = [run["cpu_s"] for run in runs], [run["megabytes"] for run in runs]
        last = exponent(part.sizes[-2:], cpu_s[-2:]), exponent(part.sizes[-2:], megabytes[-2:])
        # what is less than a megabyte is noise of the allocator
        grown = f"{last[1]:.2f}" if megabytes[-2] >= 1 else ""
        span = f"{part.sizes[0]:,} to {part.sizes[-1]:,} | {cpu_s[0]:.2g} to {cpu_s[-1]:.2g}"
        lines.append(
            f"| {part.axis} | {part.name} | {span} | "
            f"{exponent(part.sizes, cpu_s):.2f} | {last[0]:.2f} | {megabytes[0]:.0f} to {megabytes[-1]:.0f} | {grown} |"
        )
    return lines


def plot(found: dict[Part, list[dict[str, float]]], path: Path) -> None:
    """Time above, memory below, one column an axis, a grey line where growth is linear."""
    matplotlib.rcParams.update(
        {"svg.hashsalt": "growth", "svg.fonttype": "none", "font.size": 10}
    )  # same numbers, same bytes
    axes = list(dict.fromkeys(part.axis for part in found))
    figure, panels = plt.subplots(2, len(axes), figsize=(13, 6.4), sharex="col", layout="constrained")
    colours = {}
    for column, axis in enumerate(axes):
        parts = [part for part in found if part.axis == axis]
        for row, (key, label) in enumerate((("cpu_s", "CPU-seconds"), ("megabytes", "memory above the start, MB"))):
            panel = panels[row][column]
            for part in parts:
                colour = colours.setdefault(part.name, f"C{len(colours)}")
                costs = [run[key] for run in found[part]]
                if max(costs) < 1 and key == "megabytes":
                    continue
                name = f"{part.name} ({exponent(part.sizes, costs):.2f})" if key == "cpu_s" else None
                panel.loglog(part.sizes, costs, marker="o", markersize=4, color=colour, label=name)
            low, high = panel.get_ylim()
            low, high = (
                low / 1.5,
                max(high * 4 ** len(parts), 300 * low),
            )  # flat curves look flat, and the legend has room
            first, last = parts[0].sizes[0], parts[0].sizes[-1]
            start = (low * high) ** 0.5 * (first / last) ** 0.5
            panel.plot([first, last], [start, start * last / first], color="0.75", linestyle="--", zorder=0)
            panel.set(ylim=(low, high))
            panel.grid(alpha=0.3)
            if column == 0:
                panel.set_ylabel(label)
        panels[0][column].legend(frameon=False, fontsize=8.5, loc="upper left")
        panels[0][column].set_title(f"against {axis}")
        panels[1][column].set_xlabel(axis)
    figure.suptitle("Cost against size; in brackets the exponent, dashed: linear", fontsize=11)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def heading(title: str) -> str:
    """Heading of a section."""
    from common import head  # imports torch, whose memory is no part of what opening a manifest takes

    return head(title, "growth")


def report_growth(folder: Path) -> None:
    """Measures all parts and prints the section."""
    found = measure_parts(folder)
    print(heading("growth"))
    print(
        "Cost = a x size^b: the exponent b of all sizes by least squares, and of the two largest alone, where fixed "
        "costs weigh least; memory is the peak above what the process held before.\n"
    )
    print("\n".join(table(found)))
    plot(found, ROOT / "docs" / "growth.svg")


def report_million(folder: Path) -> None:
    """Opens a million recordings and plans a fold."""
    made = make_manifest(folder / "million", MILLION, MILLION_SPEAKERS)
    print(heading("a million recordings"))
    size = (made / "manifest.jsonl").stat().st_size / 1e6
    print(
        f"{MILLION:,} recordings of {MILLION_SPEAKERS:,} speakers, a manifest of {size:.0f} MB, an empty file for each."
    )
    print(f"Limits: {LIMIT_S} s and {LIMIT_MEGABYTES:,} MB.\n")
    print("| opened, fold planned: wall, s | CPU-seconds | peak memory of the process, MB |\n| ---: | ---: | ---: |")
    for _ in range(2):
        run = measured(opening.__name__, made)
        print(f"| {run['wall_s']:.1f} | {run['cpu_s']:.1f} | {run['peak']:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("growth", "million"), help="one section")
    parser.add_argument("--measure", choices=sorted(WORKS), help="only do this and print a JSON line")
    parser.add_argument("--folder", type=Path, help="with --measure: folder of the manifest")
    parser.add_argument("--size", type=float, default=0, help="with --measure: of the vocabulary, or seconds")
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure, given.folder, given.size)))
        return
    with TemporaryDirectory() as name:
        if given.only in (None, "growth"):
            report_growth(Path(name))
        if given.only in (None, "million"):
            report_million(Path(name))


if __name__ == "__main__":
    main()
