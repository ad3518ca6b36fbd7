"""What decoding costs: greedy text of the decoder, a word list of 255 words with both heads, cold starts.

    OMP_NUM_THREADS=2 python benchmarks/decoding.py >> benchmarks/RESULTS.md

Random weights, model `small`, 5,000 pieces. Recordings of 1.5 to 6 s, 3 s on average, as UASpeech's; 255 words of 1 to
7 tokens, 1.97 on average and 145 of one token, as in the reference study. "Plain" is the same model without what is
kept or shared: the whole prefix at every step, a padded row a word that attends to its own copy of the recording. Both
are measured in turn in one run, and their results compared. Cold starts are whole processes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from common import head
from xded import decoding
from xded.config import build
from xded.export.folder import Options, write_export
from xded.features import valid_mask
from xded.models.checkpoints import save
from xded.models.recogniser import describe, load_recogniser
from xded.models.student import Student
from xded.tokenizer import Tokenizer

RECORDINGS, BATCH, PIECES = 1_785, 16, 5_000
SAMPLE_RATE = 16_000
LENGTHS_OF_WORDS = [1] * 145 + [2] * 38 + [3] * 33 + [4] * 20 + [5] * 12 + [6] * 5 + [7] * 2
TOKENS_IN_USE = 356
MAX_LENGTH = 20
CONFIG = build({"model": {"size": "small"}}, "the benchmark")

Clock = tuple[float, float]  # CPU-seconds and wall seconds


def timed(work: Callable[[], Any]) -> tuple[Any, Clock]:
    """A result and what it took."""
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    result = work()
    return result, (time.process_time() - cpu_s, time.perf_counter() - wall_s)


def tokenizer() -> Tokenizer:
    """5,000 pieces with the blank first; texts are never read, only ids."""
    letters = [f"{number:04d}" for number in range(PIECES - 3)]
    return Tokenizer(json.dumps(["<blank>", "<unk>", *letters, "<sos/eos>"]).encode(), "upper")


def word_tokens(random: np.random.Generator) -> list[tuple[int, ...]]:
    """255 words, distinct, of the lengths above."""
    words: dict[tuple[int, ...], None] = {}
    for length in LENGTHS_OF_WORDS:
        word: tuple[int, ...] = ()
        while not word or word in words:
            word = tuple((2 + random.integers(TOKENS_IN_USE, size=length)).tolist())
        words[word] = None
    return list(words)


def durations_s(count: int, random: np.random.Generator) -> np.ndarray:
    """Seconds of recordings, 1.5 to 6 and 3 on average, sorted as evaluation sorts them."""
    return np.sort(1.5 + 4.5 * random.beta(1.5, 3.0, size=count))


class Plain:
    """A student of which decoding does not know that it is one."""

    training, has_ctc, has_decoder = False, True, True

    def __init__(self, student: Student) -> None:
        self.encode, self.ctc_logits, self.decoder_logits = student.encode, student.ctc_logits, student.decoder_logits


def plain_decoder_words(
    student: Student, encoded: Tensor, lengths: Tensor, words: Sequence[Sequence[int]], tokenizer: Tokenizer
) -> Tensor:
    """Log-probabilities of words and </s>, a padded row a word: [B, W]."""
    rows = [torch.tensor([tokenizer.bos, *word, tokenizer.eos]) for word in words]
    texts = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.eos)  # [W, U + 2]
    counted = valid_mask(torch.tensor([len(word) + 1 for word in words]), texts.shape[1] - 1)
    scores = []
    for heard, length in zip(encoded, lengths.tolist(), strict=True):
        parts = []
        for part in texts.split(decoding.WORDS_AT_ONCE):
            each = heard[None, :length].expand(len(part), -1, -1)
            logits = student.decoder_logits(part[:, :-1], each, torch.full((len(part),), length))
            parts.append(logits.log_softmax(2).gather(2, part[:, 1:, None])[:, :, 0])
        scores.append(torch.cat(parts).double().masked_fill(~counted, 0.0).sum(1))
    return torch.stack(scores)


class Table:
    """Seconds a recording of each part, by batch."""

    def __init__(self) -> None:
        self.found: dict[str, list[Clock]] = {}

    def time(self, name: str, recordings: int, work: Callable[[], Any]) -> Any:
        result, (cpu_s, wall_s) = timed(work)
        self.found.setdefault(name, []).append((cpu_s / recordings, wall_s / recordings))
        return result

    def of(self, name: str) -> Clock:
        """Means over batches, which differ in length."""
        cpu_s, wall_s = (fmean(column) for column in zip(*self.found[name], strict=True))
        return cpu_s, wall_s

    def total(self, *names: str) -> Clock:
        cpu_s, wall_s = (sum(column) for column in zip(*map(self.of, names), strict=True))
        return cpu_s, wall_s


@torch.inference_mode()
def measure(student: Student, count: int) -> tuple[Table, dict[str, float]]:
    """All parts on `count` recordings in batches of like length, plain and as it is in turn."""
    random, table, pieces = np.random.default_rng(0), Table(), tokenizer()
    words, seconds = word_tokens(random), durations_s(count, random)
    apart: dict[str, float] = {"word list": 0.0, "greedy": 0.0, "other words": 0, "other texts": 0}
    for start in range(0, count, BATCH):
        samples = torch.from_numpy((seconds[start : start + BATCH] * SAMPLE_RATE).astype(np.int64))
        waves = torch.from_numpy(random.normal(size=(len(samples), int(samples.max()))).astype(np.float32))
        n = len(samples)
        features, lengths = table.time("features", n, lambda w=waves, s=samples: student.front_end(w, s))
        encoded, frames = table.time("encoder", n, lambda f=features, t=lengths: student.encode(f, t))
        encoded = encoded * (1 + 3 * torch.rand(n, 1, 1, generator=torch.Generator().manual_seed(start)))
        given = encoded, frames, words

        def score(weight: float, given: Any = given) -> Tensor:
            return decoding.word_list_scores(student, *given, weight, pieces)

        ctc = table.time("CTC", n, lambda s=score: s(1.0))
        decoder = table.time("decoder", n, lambda s=score: s(0.0))
        plain = table.time("decoder, plain", n, lambda g=given: plain_decoder_words(student, *g, pieces))
        apart["word list"] = max(apart["word list"], float((decoder - plain).abs().max()))
        apart["other words"] += int(((ctc + decoder).argmax(1) != (ctc + plain).argmax(1)).sum())
        found = {
            name: table.time(
                name, n, lambda m=model, e=encoded, f=frames: decoding.decoder_greedy(m, e, f, pieces, MAX_LENGTH)
            )
            for name, model in (("greedy", student), ("greedy, plain", Plain(student)))
        }
        for one, other in zip(found["greedy"], found["greedy, plain"], strict=True):
            apart["greedy"] = max(apart["greedy"], abs(one[1] - other[1]))
            apart["other texts"] += one[0] != other[0]
    return table, apart


def process(command: Sequence[str], repeats: int) -> list[Clock]:
    """CPU and wall seconds of whole processes; the first, which fills the file cache, is not counted."""
    clocks = []
    for _ in range(repeats + 1):
        before, begun_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        wall_s, after = time.perf_counter() - begun_s, resource.getrusage(resource.RUSAGE_CHILDREN)
        clocks.append((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall_s))
    return clocks[1:]


def cold_starts(folder: Path, repeats: int) -> list[str]:
    """Rows: `transcribe` of 3 s from nothing, with torch and with onnxruntime, and what importing torch costs."""
    pieces = Tokenizer.train(["ALPHA BRAVO CHARLIE DELTA"], "char", 64, "upper")
    torch.manual_seed(0)
    student = Student(CONFIG.model, pieces.size, CONFIG.features).eval()
    facts = describe(pieces, CONFIG, "benchmark", ())
    save({**facts, "model_state_dict": student.state_dict(), "epoch": 1}, folder / "run" / "best.pt")
    write_export(load_recogniser(folder / "run"), folder / "export", Options())
    audio = folder / "audio.wav"
    soundfile.write(audio, 0.1 * np.random.default_rng(0).normal(size=3 * SAMPLE_RATE), SAMPLE_RATE)
    xded = str(Path(sysconfig.get_path("scripts")) / "xded")
    commands = {
        "`python -c 'import torch'`": (sys.executable, "-c", "import torch"),
        "`xded transcribe RUN`, torch": (xded, "transcribe", str(folder / "run"), str(audio)),
        "`xded transcribe EXPORT`, onnxruntime": (xded, "transcribe", str(folder / "export"), str(audio)),
        "`xded --help`": (xded, "--help"),
    }
    rows = [
        "| process | CPU-seconds, min | median | wall seconds, min | median |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, command in commands.items():
        cpu_s, wall_s = zip(*process(command, repeats), strict=True)
        cells = (min(cpu_s), median(cpu_s), min(wall_s), median(wall_s))
        rows.append(f"| {name} | " + " | ".join(f"{seconds:.2f}" for seconds in cells) + " |")
    return rows


def report(count: int, repeats: int) -> None:
    """Measures everything and prints the section."""
    torch.manual_seed(0)
    student = Student(CONFIG.model, PIECES, CONFIG.features).eval()
    student.decoder_head.weight.data *= 30  # unlike texts, of unlike lengths
    measure(student, BATCH)  # warms up
    table, apart = measure(student, count)
    print(head("decoding", "decoding").replace("one thread", f"{torch.get_num_threads()} thread(s)"))
    print(
        f"Random weights, model `small`, {PIECES:,} pieces, {count} recordings of 1.5 to 6 s in batches of {BATCH}, "
        f"{len(LENGTHS_OF_WORDS)} words; milliseconds a recording, means; load "
        f"{os.getloadavg()[0]:.1f}.\n"
    )
    print("| part | CPU, ms | wall, ms | plain: CPU, ms | wall, ms | times as fast (CPU) |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    shared = "features", "encoder", "CTC"
    rows: list[tuple[str, Clock, Clock | None]] = [
        *((name, table.of(name), None) for name in shared),
        ("decoder, word list", table.of("decoder"), table.of("decoder, plain")),
        ("word list in all", table.total(*shared, "decoder"), table.total(*shared, "decoder, plain")),
        ("decoder, greedy", table.of("greedy"), table.of("greedy, plain")),
    ]
    for name, new, old in rows:
        cells = [1000 * seconds for seconds in (*new, *(old or ()))]
        ratio = f"{old[0] / new[0]:.1f}" if old else ""
        print(f"| {name} | " + " | ".join([*(f"{ms:.1f}" for ms in cells), *([""] * (4 - len(cells))), ratio]) + " |")
    new, old = rows[-2][1:]
    assert old
    print(
        f"\n{RECORDINGS:,} recordings, word list, both heads, features and encoder included: "
        f"{RECORDINGS * new[1] / 60:.1f} minutes (plain: {RECORDINGS * old[1] / 60:.1f}); "
        f"{RECORDINGS * new[0]:.0f} CPU-seconds (plain: {RECORDINGS * old[0]:.0f}). "
        f"Largest difference of a log-probability: word list {apart['word list']:.1e}, greedy {apart['greedy']:.1e}; "
        f"other words chosen: {apart['other words']}, other texts: {apart['other texts']}.\n"
    )
    with TemporaryDirectory() as folder:
        print("\n".join(cold_starts(Path(folder), repeats)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=int, default=12 * BATCH, help="that are measured")
    parser.add_argument("--repeats", type=int, default=10, help="of a cold start")
    given = parser.parse_args()
    report(given.recordings, given.repeats)


if __name__ == "__main__":
    main()
