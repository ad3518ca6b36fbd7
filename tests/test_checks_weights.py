"""What a checkpoint's weights say: each check fires on a planted fault and is silent on the checkpoint as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_corpus import tiny_config
from xded.checks import weights
from xded.findings import Finding
from xded.models.recogniser import describe
from xded.models.student import Student
from xded.tokenizer import Tokenizer

WORDS = ("AB", "BAD", "CAB", "DA")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(WORDS, "char", 64, "upper")


@pytest.fixture(scope="module")
def student(tokenizer: Tokenizer) -> Student:
    """A model that has seen a batch, so that its BatchNorm statistics are measured."""
    config = tiny_config()
    torch.manual_seed(0)
    made = Student(config.model, tokenizer.size, config.features)
    made.train().encode(torch.randn(2, 40, 80), torch.tensor([40, 30]))
    return made.eval()


@pytest.fixture
def state(student: Student) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in student.state_dict().items()}


@pytest.fixture
def payload(tokenizer: Tokenizer, state: dict[str, Tensor]) -> dict[str, Any]:
    return {**describe(tokenizer, tiny_config(), "student", ()), "model_state_dict": state}


def only(findings: list[Finding], check: str) -> Finding:
    assert [(f.check, f.severity) for f in findings] == [(check, "refuse")]
    return findings[0]


def test_a_healthy_checkpoint_has_no_finding(
    student: Student, state: dict[str, Tensor], payload: dict[str, Any]
) -> None:
    assert weights.fits(state, student, "best.pt") == []
    assert weights.finite(state, "best.pt") == []
    assert weights.unmeasured(state, "best.pt") == []
    assert weights.same_head(state, "best.pt") == []
    assert weights.tokenizer(payload, "best.pt") == []


def test_weights_of_another_model_are_counted_by_part(student: Student, state: dict[str, Tensor]) -> None:
    encoder = [name for name in state if name.startswith("encoder.")]
    for name in encoder[:5]:
        state[f"model.{name}"] = state.pop(name)
    state["ctc_head.weight"] = state["ctc_head.weight"][:3]
    finding = only(weights.fits(state, student, "best.pt"), "partial-load")
    assert f"{len(encoder) - 5} of {len(encoder)} encoder tensors fit; 1 of 2 ctc_head tensors fit" in finding.what
    assert (len(finding.evidence["missing"]), len(finding.evidence["unexpected"])) == (5, 5)
    assert finding.evidence["of another shape"] == ["ctc_head.weight"]
    assert finding.evidence["fitting"] == finding.evidence["of"] - 6


def test_weights_that_are_no_numbers(state: dict[str, Tensor]) -> None:
    state["decoder_head.bias"][2] = torch.nan
    finding = only(weights.finite(state, "best.pt"), "non-finite")
    assert finding.what == f"1 of {len(state)} tensors are not finite: decoder_head.bias."


def test_deviations_of_zero(state: dict[str, Tensor]) -> None:
    state["front_end.std"] = torch.zeros(80)
    name = next(name for name in state if name.endswith("running_var"))
    state[name][:] = 0.0
    assert only(weights.finite(state, "best.pt"), "non-finite").evidence["zero"] == [name, "front_end.std"]


def test_batchnorm_that_has_seen_nothing(state: dict[str, Tensor]) -> None:
    tracked = [name for name in state if name.endswith("num_batches_tracked")]
    for name in tracked:
        stem = name.removesuffix("num_batches_tracked")
        state[name] = torch.tensor(0)
        state[f"{stem}running_mean"][:], state[f"{stem}running_var"][:] = 0.0, 1.0
    finding = only(weights.unmeasured(state, "best.pt"), "partial-load")
    assert finding.evidence == {"fresh": tracked, "of": len(tracked)}
    assert weights.unmeasured(state, "best.pt", ["encoder.layers.0."]) == []  # frozen from scratch: never trained


def test_one_head_in_the_place_of_the_other(state: dict[str, Tensor]) -> None:
    state["ctc_head.weight"] = state["decoder_head.weight"].clone()
    assert "bit by bit" in only(weights.same_head(state, "best.pt"), "untrained-head").what


def test_heads_and_tokenizer_of_other_sizes(payload: dict[str, Any]) -> None:
    other = Tokenizer.train((*WORDS, "FIG"), "char", 64, "upper")
    payload["tokenizer_model"] = describe(other, tiny_config(), "student", ())["tokenizer_model"]
    finding = only(weights.tokenizer(payload, "best.pt"), "tokenizer-mismatch")
    assert finding.evidence["pieces"] == other.size
    assert f"ctc_head.weight has {payload['vocabulary']} rows" in finding.what
    assert "fingerprint" in finding.what


def test_a_tokenizer_of_the_same_size_with_other_pieces(payload: dict[str, Any], tokenizer: Tokenizer) -> None:
    other = Tokenizer.train([word.replace("D", "E") for word in WORDS], "char", 64, "upper")
    assert other.size == tokenizer.size
    payload["tokenizer_model"] = describe(other, tiny_config(), "student", ())["tokenizer_model"]
    finding = only(weights.tokenizer(payload, "best.pt"), "tokenizer-mismatch")
    assert finding.evidence["trained_with"] == tokenizer.fingerprint


def test_what_moved_and_what_did_not(state: dict[str, Tensor]) -> None:
    after = {name: value.clone() for name, value in state.items()}
    assert weights.changed(state, after, ["encoder."])[0] == []
    assert weights.unmoved(state, after, ["ctc_head.weight", "absent"]) == ["ctc_head.weight"]
    after["encoder.layers.0.norm_out.bias"] += 0.1
    after["ctc_head.weight"] += 0.1
    encoder = sum(name.startswith("encoder.") for name in state)
    assert weights.changed(state, after, ["encoder."]) == (["encoder.layers.0.norm_out.bias"], encoder)
    assert weights.unmoved(state, after, ["ctc_head.weight"]) == []


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    path.write_bytes(b"1234")
    finding = only([weights.damaged(path, "best.pt is damaged.")], "damaged-checkpoint")
    assert finding.evidence == {"bytes": 4}
