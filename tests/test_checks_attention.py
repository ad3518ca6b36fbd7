"""Attention of the decoder: captured as it is, and judged by whether any head moves, and whether the model hears."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tiny_corpus import MODEL
from xded.checks.attention import attention, dead_heads, movement
from xded.config import ModelConfig
from xded.models.cross_attention import cross_attention, kept_weights
from xded.models.student import Student

HEARS = {"ctc": 8.0, "decoder": 5.0}


def pointer(frames: int, steps: int = 5, width: float = 1.0) -> np.ndarray:
    """A head that goes along the audio: [U, T']."""
    centres = (np.arange(steps)[:, None] + 0.5) / steps * frames
    weights = np.exp(-((np.arange(frames)[None] + 0.5 - centres) ** 2) / (2 * width**2))
    return weights / weights.sum(1, keepdims=True)


def uniform(frames: int, steps: int = 5) -> np.ndarray:
    return np.full((steps, frames), 1.0 / frames)


def fixed(frames: int, steps: int = 5) -> np.ndarray:
    """A head that looks at the middle of every recording in every step."""
    return np.repeat(pointer(frames, 1), steps, axis=0)


def maps(*heads: object) -> list[np.ndarray]:
    """Two layers of these heads for ten recordings of different lengths."""
    return [
        np.stack([np.stack([head(frames) for head in heads])] * 2)  # type: ignore[operator]
        for frames in range(20, 40, 2)
    ]


def test_attention_that_goes_along_the_audio_is_healthy() -> None:
    assert attention(maps(pointer), "run", gains_nats=HEARS, decoded=True) == []


def test_one_living_head_is_enough() -> None:
    assert attention(maps(uniform, pointer, fixed), "run", gains_nats=HEARS, decoded=True) == []


@pytest.mark.parametrize("head", [uniform, fixed])
def test_dead_attention_of_a_decoder_that_is_used_is_a_warning(head: object) -> None:
    (finding,) = attention(maps(head), "run", gains_nats={"ctc": 8.0, "decoder": 0.0}, decoded=True)
    assert (finding.check, finding.severity) == ("attention", "warn")
    assert finding.evidence["dead_heads"] == finding.evidence["heads"] == 2
    assert finding.evidence["gain_nats"]["decoder"] == 0.0
    assert "All 2 heads" in finding.what


@pytest.mark.parametrize(
    ("gains", "decoded"), [({"ctc": 0.1, "decoder": 0.0}, True), ({"ctc": 8.0, "decoder": 0.0}, False)]
)
def test_dead_attention_of_an_untrained_or_unused_decoder_is_a_note(gains: dict[str, float], decoded: bool) -> None:
    (finding,) = attention(maps(uniform), "run", gains_nats=gains, decoded=decoded)
    assert finding.severity == "note"


def test_attention_that_goes_backwards_only_is_a_note() -> None:
    backwards = lambda frames: pointer(frames)[::-1]  # noqa: E731
    (finding,) = attention(maps(backwards), "run", gains_nats=HEARS, decoded=True)
    assert finding.severity == "note"
    assert "does not move along" in finding.what
    assert finding.effect.startswith("None as long as the decoder listens")
    assert finding.evidence["correlation"][0][0] == -1.0


def test_attention_that_brings_nothing_is_a_note() -> None:
    (finding,) = attention(maps(pointer), "run", gains_nats={"ctc": 8.0, "decoder": 0.1}, decoded=True)
    assert finding.severity == "note"
    assert "brings nothing" in finding.what


def test_texts_of_two_steps_say_nothing_about_moving() -> None:
    assert attention([np.stack([uniform(20, 2)[None]])], "run", gains_nats=HEARS, decoded=True) == []


def test_numbers_of_movement() -> None:
    moves = movement(maps(pointer, uniform, fixed))
    assert moves is not None
    assert moves.recordings == 10
    assert dead_heads(moves)[0].tolist() == [False, True, True]
    assert moves.correlation[0] == pytest.approx([1.0, 0.0, 0.0])
    assert moves.moving[0].tolist() == [1.0, 0.0, 0.0]
    assert moves.entropy[0, 1] == pytest.approx(1.0)
    assert moves.span[0, 0] == pytest.approx(0.8, abs=0.05)


def test_captured_weights_are_those_of_the_pass_and_change_nothing() -> None:
    torch.manual_seed(0)
    student = Student(ModelConfig(**{**MODEL, "decoder_layers": 2}), 9).eval()
    features, lengths, tokens = torch.randn(1, 90, 80), torch.tensor([80]), torch.tensor([[1, 4, 5]])
    encoded, frames = student.encode(features, lengths)
    before = student.decoder_logits(tokens, encoded, frames)
    weights = cross_attention(student, features, lengths, tokens)
    assert weights.shape == (2, 2, 3, int(frames[0]))
    assert weights.sum(3) == pytest.approx(torch.ones(2, 2, 3))
    with kept_weights(student) as kept:
        during = student.decoder_logits(tokens, encoded, frames)
    assert len(kept) == 2
    assert torch.allclose(before, during, atol=1e-6)
    assert torch.equal(before, student.decoder_logits(tokens, encoded, frames))
    # the second layer attends with values of the first: its weights are no copy
    assert not torch.allclose(weights[0], weights[1])
    with pytest.raises(ValueError, match="one recording"):
        cross_attention(student, features.repeat(2, 1, 1), lengths.repeat(2), tokens.repeat(2, 1))
