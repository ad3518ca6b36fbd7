"""The decoder against torch's own, which has the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from xded.config import ModelConfig
from xded.features import valid_mask
from xded.models.attention import attend, dropout, masked
from xded.models.decoder import Decoder
from xded.models.student import Student

SIZES = {
    "size": None, "width": 16, "encoder_layers": 1, "heads": 4, "kernel": 5, "feed_forward_factor": 2,
    "subsampling_channels": 4, "decoder_layers": 3, "decoder_feed_forward": 24,
}  # fmt: skip


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embedded tokens [B, U, D], encoded frames [B, T', D], which are seen [U, U], which are valid [B, T']."""
    random = torch.Generator().manual_seed(0)
    hidden, encoded = (torch.randn(3, steps, 16, generator=random) for steps in (5, 9))
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    seen[4, 2] = False  # a tree of words
    return hidden.requires_grad_(), encoded.requires_grad_(), seen, valid_mask(torch.tensor([9, 1, 4]), 9)


def decoder(share: float) -> Decoder:
    torch.manual_seed(1)
    made = Decoder(ModelConfig(**{**SIZES, "dropout": share}))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def ours(made: Decoder, hidden: Tensor, encoded: Tensor, seen: Tensor, valid: Tensor) -> Tensor:
    return made(hidden, encoded, masked(seen, hidden.dtype), masked(valid[:, None], hidden.dtype))


@pytest.mark.parametrize("training", [False, True])
def test_values_and_gradients_are_those_of_torch(training: bool) -> None:
    made = decoder(0.0).train(training)
    hidden, encoded, seen, valid = inputs()
    found = ours(made, hidden, encoded, seen, valid)
    wanted = nn.TransformerDecoder.forward(made, hidden, encoded, ~seen, memory_key_padding_mask=~valid)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    weights = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2))
    sources = [hidden, encoded, *made.parameters()]
    for own, other in zip(
        torch.autograd.grad((weights * found).sum(), sources),
        torch.autograd.grad((weights * wanted).sum(), sources),
        strict=True,
    ):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_dropout_is_where_torch_has_it() -> None:
    """The spread of many passes: dropout of one kind left out, or twice as strong, changes it by more."""
    made = decoder(0.2).train()
    hidden, encoded, seen, valid = (part.detach() for part in inputs())
    many = (hidden[:1].expand(4_000, -1, -1), encoded[:1].expand(4_000, -1, -1))
    passes = {
        "ours": ours(made, *many, seen, valid[:1].expand(4_000, -1)),
        "torch": nn.TransformerDecoder.forward(made, *many, ~seen),
    }
    assert passes["ours"].std(0) == pytest.approx(passes["torch"].std(0), rel=0.1)
    assert passes["ours"].mean(0) == pytest.approx(passes["torch"].mean(0), abs=0.05)


def test_a_frozen_layer_drops_nothing() -> None:
    made = decoder(0.5).train()
    for layer in made.layers:
        layer.eval()
    hidden, encoded, seen, valid = inputs()
    frozen = ours(made, hidden, encoded, seen, valid)
    assert torch.equal(frozen, ours(made.eval(), hidden, encoded, seen, valid))
    made.layers[1].train()
    assert not torch.equal(frozen, ours(made, hidden, encoded, seen, valid))


def test_single_entries_are_dropped() -> None:
    torch.manual_seed(0)
    dropped = dropout(torch.ones(300, 100), 0.25)
    assert dropped.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert dropped.mean() == pytest.approx(1.0, abs=0.02)
    assert (dropout(torch.ones(9), 0.0) == 1.0).all()


def test_a_query_that_may_attend_to_nothing_has_a_mean_and_no_nan() -> None:
    query, key, value = torch.randn(2, 1, 1, 4), torch.randn(2, 1, 3, 4) / 100, torch.randn(2, 1, 3, 4)
    attended = attend(query, key, value, masked(torch.zeros(3, dtype=torch.bool), query.dtype), 0.0)
    torch.testing.assert_close(attended, value.mean(2, keepdim=True), atol=0.1, rtol=0.0)


def test_mixed_precision_stays_close() -> None:
    torch.manual_seed(0)
    student = Student(ModelConfig(**SIZES), 9).eval()
    tokens, encoded, frames = torch.tensor([[1, 4, 5]]), torch.randn(1, 6, 16), torch.tensor([6])
    with torch.no_grad():
        wanted = student.decoder_logits(tokens, encoded, frames)
        with torch.autocast("cpu", torch.bfloat16):
            found = student.decoder_logits(tokens, encoded, frames)
    torch.testing.assert_close(found.float(), wanted, atol=0.05, rtol=0.05)
