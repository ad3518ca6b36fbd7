"""What every part of the loss costs: the time of a training step with it over that of the plain supervised step.

    python benchmarks/objectives.py [--sizes micro tiny] [--repeats 15] >> benchmarks/RESULTS.md

16 recordings of 1 s in a batch (4 words by 4 speakers), 40 characters, 8 listed words a recording, targets as they are
read from disk (top 32). A step is forward, loss, backward and AdamW, in seconds of the processor; the ways take turns,
one step each, so that other work on the machine slows all of them alike; ratios are medians over the turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import head
from xded.config import Config, ObjectiveConfig, build
from xded.models.student import Student
from xded.objectives import TopK, WordTarget
from xded.tokenizer import Tokenizer
from xded.training.auxiliary import Auxiliary
from xded.training.data import MOST_WORDS, Batch
from xded.training.losses import loss_parts, weighted_sum
from xded.training.optimizer import AdamW

WORDS = ("ABLE", "BRAVO", "CANDLE", "DREAM")
RECORDINGS, FEATURE_FRAMES, WARM_UP = 16, 100, 3
KEPT = 32
EVERY = {"ctc_kd": 1.0, "decoder_kd": 1.0, "word_kd": 1.0, "text_kd": 1.0, "feature_kd": 1.0, "consistency": 5.0,
         "word_consistency": 1.0, "adversary": 0.1}  # fmt: skip
WAYS: dict[str, dict[str, float]] = {
    "supervised": {},
    **{name: {name: weight} for name, weight in EVERY.items()},
    "ctc_kd, T moving": {"ctc_kd": 1.0, "temperature_end": 1.0},
    "all of them": EVERY,
}


def spread(*shape: int, entries: int) -> TopK:
    """Random distributions of which the largest entries are kept."""
    listed, ids = torch.randn(*shape, entries).softmax(-1).topk(min(KEPT, entries), dim=-1)
    return TopK(ids, listed, (1.0 - listed.sum(-1)).clamp(min=0.0))


def make_batch(student: Student, tokenizer: Tokenizer, width: int) -> Batch:
    """Four words by four speakers, with every kind of target."""
    texts = [WORDS[i // 4] for i in range(RECORDINGS)]
    rows = [torch.tensor([*tokenizer.encode(text), tokenizer.eos]) for text in texts]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.eos)
    lengths = torch.tensor([len(row) - 1 for row in rows])
    frames = int(student.encoder.reduce(torch.tensor(FEATURE_FRAMES)))
    ctc = spread(RECORDINGS, frames, entries=tokenizer.size)
    listed = WordTarget(
        torch.randint(3, tokenizer.size, (RECORDINGS, MOST_WORDS, 6)),
        torch.randint(3, 7, (RECORDINGS, MOST_WORDS)),
        torch.randn(RECORDINGS, MOST_WORDS).softmax(1),
    )
    return Batch(
        recordings=[f"r{i}" for i in range(RECORDINGS)], speakers=[f"s{i % 4}" for i in range(RECORDINGS)],
        features=torch.randn(RECORDINGS, FEATURE_FRAMES, 80), feature_lengths=torch.full((RECORDINGS,), FEATURE_FRAMES),
        encoded=None, encoded_lengths=None, tokens=tokens, token_lengths=lengths, ctc_target=ctc,
        least_blank=torch.rand(RECORDINGS, frames), decoder_target=spread(*tokens.shape, entries=tokenizer.size),
        words=listed, heard=tokens, heard_lengths=lengths, guide=torch.randn(RECORDINGS, frames, width),
    )  # fmt: skip


class Way:
    """One model that learns in one way."""

    def __init__(self, size: str, weights: dict[str, float], tokenizer: Tokenizer) -> None:
        config = build({"model": {"size": size}}, "the benchmark")
        torch.manual_seed(0)
        self.tokenizer = tokenizer
        self.config = Config.model_construct(objective=ObjectiveConfig.model_validate(weights))
        self.student = Student(config.model, tokenizer.size, config.features).train()
        width = 2 * self.student.encoder.width  # of a larger guide: with a projection
        self.auxiliary = Auxiliary(self.student.encoder.width, width, [f"s{i}" for i in range(4)], 0)
        self.optimiser = AdamW([self.student, self.auxiliary], 0.01, lr=1e-4)
        self.batch = make_batch(self.student, tokenizer, width)

    def step(self) -> float:
        """Seconds of the processor that one step takes."""
        begin = time.process_time()
        self.optimiser.zero_grad()
        parts = loss_parts(self.student, self.batch, self.config, self.tokenizer, self.auxiliary, 0.5)
        loss: Tensor = weighted_sum(parts, self.config, 0.5)
        loss.backward()
        self.optimiser.step()
        return time.process_time() - begin


def measure(size: str, repeats: int, tokenizer: Tokenizer) -> dict[str, list[float]]:
    """Seconds of every step of every way."""
    ways = {name: Way(size, weights, tokenizer) for name, weights in WAYS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    random = np.random.default_rng(0)
    for turn in range(WARM_UP + repeats):
        for name in random.permutation(list(ways)).tolist():
            taken = ways[name].step()
            if turn >= WARM_UP:
                seconds[name].append(taken)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["micro", "tiny"])
    parser.add_argument("--repeats", type=int, default=15, help="steps of each that are counted")
    options = parser.parse_args()
    torch.set_num_threads(1)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    tokenizer = Tokenizer.train({*WORDS, *alphabet}, "char", 64, "upper")
    print(head("what every part of the loss costs", "objectives"))
    print(f"{RECORDINGS} recordings of 1 s, {tokenizer.size} pieces; times the supervised step (quartiles).\n")
    print("| part | " + " | ".join(options.sizes) + " |\n| --- |" + " ---: |" * len(options.sizes))
    found: dict[str, dict[str, Any]] = {size: measure(size, options.repeats, tokenizer) for size in options.sizes}
    for name in WAYS:
        cells = []
        for size in options.sizes:
            plain, seconds = found[size]["supervised"], found[size][name]
            low, middle, high = statistics.quantiles([a / b for a, b in zip(seconds, plain, strict=True)], n=4)
            if name == "supervised":
                cells.append(f"{1000 * statistics.median(seconds):.0f} ms")
            else:
                cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
