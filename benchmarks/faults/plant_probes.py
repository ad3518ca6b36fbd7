"""Faults in the code that no file shows: only `xded doctor --probe` can see them, with the faulty code in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor

from faults.plant_training import around
from faults.workbench import Workbench, fault
from xded.models import conformer
from xded.models.conformer import Valid
from xded.models.student import Student
from xded.objectives import TopK
from xded.training.data import Batch

FAMILY: Final = "probes"


@contextmanager
def no_masks() -> Iterator[None]:
    """Attention and convolution see the padding."""

    def unmasked(original: Callable[..., Valid], mask: Tensor, dtype: torch.dtype) -> Valid:
        return original(torch.ones_like(mask), dtype)

    with around(conformer, "Valid", unmasked):
        yield


@fault("padding is heard", FAMILY, "padding", "batch-decoding", probe=True, meanwhile=no_masks)
def padding_is_heard(bench: Workbench, out: Path) -> list[Path]:
    """Attention and convolution of the encoder have no mask: what a recording sounds like depends on its neighbours."""
    with no_masks():
        return [bench.evaluate(bench.train(out / "run", *bench.from_parent))]


def decoder_without_mask() -> Any:
    """The decoder attends to padding."""
    return around(
        Student,
        "decoder_logits",
        lambda original, self, tokens, encoded, lengths, *seen: original(
            self, tokens, encoded, torch.full_like(lengths, encoded.shape[1]), *seen
        ),
    )


@fault("decoder without a memory mask", FAMILY, "padding", "batch-decoding", probe=True, meanwhile=decoder_without_mask)
def no_memory_mask(bench: Workbench, out: Path) -> list[Path]:
    """The decoder attends to the padded frames of shorter recordings (the study's had no mask)."""
    with decoder_without_mask():
        return [bench.evaluate(bench.train(out / "run", *bench.from_parent, "--set", "decode.mode=decoder"))]


def other_temperature_of_student() -> Any:
    """The student's side of the KL is not softened."""

    def kl(original: Callable[..., Tensor], logits: Tensor, target: TopK, temperature: float) -> Tensor:
        return original(logits * temperature, target, temperature)

    from xded import objectives

    return around(objectives, "top_k_kl", kl)


@fault("student not softened", FAMILY, "self-distillation", probe=True, meanwhile=other_temperature_of_student)
def student_not_softened(bench: Workbench, out: Path) -> list[Path]:
    """The KL compares softened teachers with an unsoftened student: it is not 0 where they agree."""
    with other_temperature_of_student():
        return [bench.evaluate(bench.train(out / "run", *bench.from_parent, *bench.distilled))]


@contextmanager
def texts_of_neighbours() -> Iterator[None]:
    """Texts stay where they were when the batch is sorted by length."""
    from xded.training import data

    collate = data.collate

    def mixed(rows: list[dict], eos: int) -> Batch:
        tokens = [row["tokens"] for row in rows]
        return collate([{**row, "tokens": text} for row, text in zip(rows, tokens[1:] + tokens[:1], strict=True)], eos)

    with (
        patch("xded.training.data.collate", mixed),
        patch("xded.training.run.collate", mixed),
        patch("xded.training.evaluation.collate", mixed),
    ):
        yield


@fault(
    "texts of other recordings in the batch",
    FAMILY,
    *("overfit", "shuffled-labels", "shuffled-audio"),
    probe=True,
    meanwhile=texts_of_neighbours,
)
def mixed_texts(bench: Workbench, out: Path) -> list[Path]:
    """Collating sorts audio by length but not the texts: every recording gets its neighbour's."""
    with texts_of_neighbours():
        return [bench.evaluate(bench.train(out / "run", *bench.from_scratch))]


@contextmanager
def reference_in_the_output() -> Iterator[None]:
    """Recognition returns the reference."""
    from xded.training import evaluation

    def leaked(original: Callable[..., Any], recording: Any, tokens: Any, text: str, seed: int) -> Any:
        return original(recording, tokens, recording.text.upper(), seed)

    with around(evaluation, "predicted", leaked):
        yield


@fault(
    "the reference leaks into the output",
    FAMILY,
    *("shuffled-audio", "shuffled-labels"),
    probe=True,
    meanwhile=reference_in_the_output,
)
def leaked_reference(bench: Workbench, out: Path) -> list[Path]:
    """A cache keyed by prompt returns the reference for every recording of it: 100 % whatever the audio."""
    with reference_in_the_output():
        return [bench.evaluate(bench.train(out / "run", *bench.from_parent))]
