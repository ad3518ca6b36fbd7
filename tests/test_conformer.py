"""Encoder and student: NeMo's numbers, sizes, padding in eval and in training, causality of the decoder."""

from __future__ import annotations

import io
import itertools
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from xded.config import FeatureConfig, ModelConfig
from xded.features import valid_mask
from xded.models.attention import attend, keep
from xded.models.conformer import (
    MaskedBatchNorm,
    RecordingDropout,
    RelativeAttention,
    Subsampling,
    Valid,
    relative_positions,
)
from xded.models.student import Student

RENAMED = (
    ("encoder.", ""),
    ("pre_encode.conv.0", "subsampling.conv1"),
    ("pre_encode.conv.2", "subsampling.conv2"),
    ("pre_encode.out", "subsampling.out"),
    ("norm_self_att", "norm_attention"),
    ("norm_conv.", "norm_convolution."),
    ("self_attn.linear_q", "attention.query"),
    ("self_attn.linear_k", "attention.key"),
    ("self_attn.linear_v", "attention.value"),
    ("self_attn.linear_out", "attention.out"),
    ("self_attn.linear_pos", "attention.position"),
    ("self_attn.pos_bias_u", "attention.content_bias"),
    ("self_attn.pos_bias_v", "attention.position_bias"),
    ("conv.pointwise_conv", "convolution.pointwise"),
    ("conv.depthwise_conv", "convolution.depthwise"),
    ("conv.batch_norm", "convolution.norm"),
)


def tiny(dropout: float = 0.0, **fields: int) -> Student:
    torch.manual_seed(0)
    numbers = {
        "width": 16, "encoder_layers": 2, "heads": 2, "kernel": 5, "feed_forward_factor": 2,
        "subsampling_channels": 4, "decoder_layers": 2, "decoder_feed_forward": 16, **fields,
    }  # fmt: skip
    return Student(ModelConfig.model_validate({"size": None, "dropout": dropout, **numbers}), 7, FeatureConfig(mels=16))


def ragged(lengths: list[int], mels: int = 16) -> Tensor:
    """Random features [B, T, mels], zero beyond each recording."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(len(lengths), max(lengths), mels, generator=generator)
    return torch.where(valid_mask(torch.tensor(lengths), max(lengths))[:, :, None], features, 0.0)


def nemo_weights(archive_path: Path) -> dict[str, Tensor]:
    """The encoder of NeMo's checkpoint under this project's names."""
    with tarfile.open(archive_path) as archive:
        member = archive.extractfile("./model_weights.ckpt")
        assert member is not None
        stored = torch.load(io.BytesIO(member.read()), weights_only=True)
    weights = {}
    for name, value in stored.items():
        if name.startswith("encoder."):
            for theirs, ours in RENAMED:
                name = name.replace(theirs, ours)
            weights[name] = value.squeeze(-1) if "pointwise" in name and value.dim() == 3 else value
    return weights


def test_encoder_equals_nemo(shared: Path) -> None:
    recorded = np.load(shared / "data" / "nemo" / "nemo_parity.npz")
    student = Student(ModelConfig(size="small"), 10).eval()
    student.encoder.load_state_dict(
        nemo_weights(shared / "data" / "nemo" / "random_conformer_small.nemo")
    )  # strict: every weight has its counterpart
    features = torch.from_numpy(recorded["features"]).transpose(1, 2)
    with torch.inference_mode():
        encoded, lengths = student.encode(features, torch.from_numpy(recorded["features_len"]))
    assert lengths.tolist() == recorded["encoder_len"].tolist()
    assert len(set(lengths.tolist())) > 1  # several lengths, so that padding is in play
    for row, frames in enumerate(lengths.tolist()):
        theirs = recorded["encoder_out_BDT"][row, :, :frames].T
        assert np.abs(encoded[row, :frames].numpy() - theirs).max() < 1e-4


def test_small_has_nemos_encoder_and_the_studys_heads_and_decoder() -> None:
    student = Student(ModelConfig(size="small"), 5_000)
    encoder = sum(p.numel() for p in student.encoder.parameters())
    assert encoder == 12_972_608
    assert 5.0e6 < student.parameter_counts()["total"] - encoder < 5.2e6


@pytest.mark.parametrize(("size", "limit"), [("tiny", 1_000_000), ("micro", 300_000)])
def test_sizes_keep_their_promise(size: str, limit: int) -> None:
    counts = Student(ModelConfig.model_validate({"size": size}), 40).parameter_counts()
    assert 0.8 * limit < counts["total"] < limit
    assert counts["trainable"] == counts["total"]


@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing(training: bool) -> None:
    """In training too: batch-norm statistics are those of the valid frames."""
    lengths = [37, 80, 61]
    student = tiny().train(training)
    alone = tiny().train(training)
    longer = torch.cat([ragged(lengths), torch.zeros(3, 23, 16)], dim=1)
    short, frames = alone.encode(ragged(lengths), torch.tensor(lengths))
    long, same = student.encode(longer, torch.tensor(lengths))
    assert frames.tolist() == same.tolist() == [10, 20, 16]
    mask = valid_mask(frames, short.shape[1])
    assert (long[:, : short.shape[1]] - short)[mask].abs().max() < 1e-5
    for name, value in alone.state_dict().items():  # running statistics
        torch.testing.assert_close(student.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_a_batch_gives_what_each_recording_gives_alone() -> None:
    lengths = [37, 80, 61]
    student, features = tiny().eval(), ragged([37, 80, 61])
    together, frames = student.encode(features, torch.tensor(lengths))
    for row, (length, count) in enumerate(zip(lengths, frames.tolist(), strict=True)):
        alone, _ = student.encode(features[row : row + 1, :length], torch.tensor([length]))
        assert alone.shape[1] == count
        assert (alone[0] - together[row, :count]).abs().max() < 1e-5


def test_padding_gets_no_gradient() -> None:
    student = tiny().train()
    features = ragged([37, 80]).requires_grad_()
    encoded, frames = student.encode(features, torch.tensor([37, 80]))
    encoded[valid_mask(frames, encoded.shape[1])].square().sum().backward()
    assert features.grad is not None
    assert features.grad[0, :37].any()
    assert not features.grad[0, 40:].any()  # the convolutions see at most 3 frames beyond the end


def test_masked_batch_norm_is_batch_norm_over_the_valid_frames() -> None:
    values, mask = torch.randn(3, 9, 4), valid_mask(torch.tensor([9, 4, 6]), 9)
    ours, plain, valid = MaskedBatchNorm(4), nn.BatchNorm1d(4), Valid(mask, values.dtype)
    torch.testing.assert_close(ours(values, valid)[mask], plain(values[mask]))
    torch.testing.assert_close(ours.running_var, plain.running_var)
    ours.eval()
    plain.eval()
    torch.testing.assert_close(ours(values, valid)[mask], plain(values[mask]))


def test_masked_batch_norm_has_the_gradient_of_the_valid_frames() -> None:
    values, mask = torch.randn(3, 9, 4, requires_grad=True), valid_mask(torch.tensor([9, 4, 6]), 9)
    weights = torch.randn(3, 9, 4)
    ours, plain = (torch.autograd.grad((weights[mask] * out).sum(), values)[0] for out in (
        MaskedBatchNorm(4)(values, Valid(mask, values.dtype))[mask], nn.BatchNorm1d(4)(values[mask])
    ))  # fmt: skip
    torch.testing.assert_close(ours, plain)
    assert not ours[~mask].any()


@pytest.mark.parametrize("frames", [1, 5])
def test_attention_by_its_definition(frames: int) -> None:
    """Transformer-XL, section 3.3: scores of content and of the distance i - j, term by term, padding left out."""
    torch.manual_seed(0)
    layer = RelativeAttention(8, 2, dropout=0.0).double()
    nn.init.normal_(layer.content_bias)
    nn.init.normal_(layer.position_bias)
    values = torch.randn(2, frames, 8, dtype=torch.float64)
    positions = relative_positions(frames, 8, values.device).double()  # of the distances T .. -(T - 1)
    mask = valid_mask(torch.tensor([frames, max(1, frames - 2)]), frames)
    by_head = layer.position(positions).unflatten(1, (2, 4)).permute(1, 2, 0)  # [H, D/H, 2T]
    parts = (layer.query, layer.key, layer.value)
    query, key, value = (part(values).unflatten(2, (2, 4)).transpose(1, 2) for part in parts)  # [B, H, T, D/H]
    scores = torch.full((2, 2, frames, frames), -torch.inf, dtype=torch.float64)
    for b, h, i, j in itertools.product(range(2), range(2), range(frames), range(frames)):
        if mask[b, j]:
            content = (query[b, h, i] + layer.content_bias[h]) @ key[b, h, j]
            distance = (query[b, h, i] + layer.position_bias[h]) @ by_head[h, :, frames - (i - j)]
            scores[b, h, i, j] = (content + distance) / 2.0  # sqrt of D/H = 4
    expected = layer.out((scores.softmax(3) @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(values, by_head, Valid(mask, values.dtype)), expected)


def test_attention_of_few_recordings_at_a_time_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = RelativeAttention(8, 2, dropout=0.0).train()
    values, position = torch.randn(5, 6, 8), torch.randn(2, 4, 12)
    valid = Valid(valid_mask(torch.tensor([6, 2, 5, 6, 1]), 6), values.dtype)
    outputs = []
    for most in (2**21, 2 * 2 * 6 * 6, 1):  # all, two, one at a time
        monkeypatch.setattr("xded.models.conformer.SCORES_AT_ONCE", most)
        outputs.append(layer(values, position, valid))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])


def test_positions_are_distances() -> None:
    rows = relative_positions(3, 4, torch.device("cpu"))
    assert rows[:, 0].tolist() == pytest.approx([math.sin(d) for d in (3, 2, 1, 0, -1, -2)])


def test_attention_weights_are_dropped_each_by_itself() -> None:
    torch.manual_seed(0)
    kept = keep(torch.empty(101, 7, 101), 0.9)  # a number of entries that 4 does not divide
    assert kept.unique().tolist() == [0.0, 1.0]
    assert kept.mean() == pytest.approx(0.9, abs=0.005)
    flat = kept.flatten()
    for apart in (1, 2, 3, 4, 101, 707):  # neighbours come from the same 64 bits
        assert float(torch.corrcoef(torch.stack([flat[apart:], flat[:-apart]]))[0, 1]) == pytest.approx(0.0, abs=0.015)
    assert [float(flat[i::4].mean()) for i in range(4)] == [pytest.approx(0.9, abs=0.01)] * 4
    assert keep(torch.empty(1_000), 1.0 - 1e-9).all()
    torch.manual_seed(3)
    first = keep(torch.empty(50), 0.5)
    torch.manual_seed(3)
    assert torch.equal(first, keep(torch.empty(50), 0.5))


def test_attention_with_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 3, 4).expand(1, 400, 3, 4) for _ in range(3))
    without, with_dropout = (attend(query, key, value, torch.zeros(3, 3), dropout) for dropout in (0.0, 0.2))
    torch.testing.assert_close(with_dropout.mean(1), without.mean(1), atol=0.1, rtol=0.0)
    assert with_dropout.std(1).min() > 0.05


def test_recording_dropout_drops_whole_channels_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    ones = torch.ones(200, 5, 50)
    dropout = RecordingDropout(0.25, ones)
    out = dropout(ones)
    assert out.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (out == out[:, :1]).all()  # one mask for all frames
    assert abs(out.mean() - 1.0) < 0.02
    added = dropout.add(ones, ones, 0.5)
    assert added.unique().tolist() == [1.0, pytest.approx(1 + 0.5 * 4 / 3)]
    assert (added == added[:, :1]).all()
    none = RecordingDropout(0.0, ones)
    assert (none(ones) == 1.0).all()
    assert (none.add(ones, ones, 0.5) == 1.5).all()


def test_masks_that_are_drawn_together_are_independent() -> None:
    torch.manual_seed(0)
    wide = torch.ones(2, 1, 1_500)
    dropout = RecordingDropout(0.5, wide)
    masks = torch.stack([dropout(wide).flatten() for _ in range(7)])  # more than is drawn at once
    apart = torch.corrcoef(masks) - torch.eye(7)
    assert apart.abs().max() < 0.08  # 1 / sqrt(3,000) is 0.018


def test_a_frozen_layer_drops_nothing() -> None:
    student = tiny(0.3).train()
    features, lengths = ragged([60, 80]), torch.tensor([60, 80])
    student.encoder.layers[0].eval()
    seen: list[Tensor] = []
    student.encoder.layers[0].register_forward_hook(lambda _, given, found: seen.extend([given[0], found]))
    student.encode(features, lengths)
    given, found = seen
    mask = valid_mask(student.encoder.reduce(lengths), given.shape[1])
    layer, position = student.encoder.layers[0], student.encoder._positions(given)[0]
    off = RecordingDropout(0.0, given)
    torch.testing.assert_close(layer(given, position, Valid(mask, given.dtype), off), found)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 8, 9, 100, 101])
def test_reduce_is_what_subsampling_does(frames: int) -> None:
    out, lengths = Subsampling(16, 4, 8)(torch.randn(1, frames, 16), torch.tensor([frames]))
    assert out.shape[1] == lengths.item() == -(-frames // 4)


@pytest.mark.parametrize("bf16", [False, True])
def test_subsampling_by_its_definition(bf16: bool) -> None:
    """Padding that the first convolution wrote to is silent for the second; bf16 has another layout in memory."""
    torch.manual_seed(0)
    layer, lengths = Subsampling(16, 8, 12), torch.tensor([21, 9, 2])
    features = torch.randn(3, 21, 16) * valid_mask(lengths, 21)[:, :, None]
    nn.init.ones_(layer.conv1.bias)

    def plain() -> Tensor:
        hidden = nn.functional.relu(layer.conv1(features[:, None]))
        hidden = hidden * valid_mask((lengths + 1) // 2, 11)[:, None, :, None]
        hidden = nn.functional.relu(layer.conv2(hidden))
        return layer.out(torch.cat([hidden[:, channel] for channel in range(8)], dim=2))  # [B, T/4, 8 mels/4]

    def of_autocast() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return layer(features, lengths)[0]

    close = {"atol": 0.02, "rtol": 0.05} if bf16 else {"atol": 1e-5, "rtol": 1e-5}
    weights = torch.randn(3, 6, 12)
    found, wanted = of_autocast().float(), plain()
    torch.testing.assert_close(found, wanted, **close)
    parameters = list(layer.parameters())
    for own, other in zip(
        torch.autograd.grad((weights * found).sum(), parameters),
        torch.autograd.grad((weights * wanted).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(own / other.norm(), other / other.norm(), **close)


def test_encoded_frames_follow_from_the_samples() -> None:
    student = tiny()
    samples = torch.tensor([800, 16_000, 12_345])
    features, lengths = student.front_end(torch.randn(3, 16_000), samples)
    _, frames = student.encode(features, lengths)
    assert student.encoded_frames(samples).tolist() == frames.tolist()
    assert student.frame_rate_hz == 25.0


def decoder_input(student: Student) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, 7, (2, 6), generator=generator)
    tokens[:, 0] = 1
    return tokens, torch.randn(2, 9, 16, generator=generator), torch.tensor([9, 5])


def test_the_decoder_sees_no_later_token() -> None:
    student = tiny().eval()
    tokens, encoded, lengths = decoder_input(student)
    before = student.decoder_logits(tokens, encoded, lengths)
    for step in range(1, 6):
        changed = tokens.clone()
        changed[:, step:] = (changed[:, step:] - 2) % 4 + 3
        assert not (changed == tokens).all()
        after = student.decoder_logits(changed, encoded, lengths)
        assert (after[:, :step] - before[:, :step]).abs().max() < 1e-6
        assert (after[:, step] - before[:, step]).abs().max() > 1e-4  # and does see this one
    prefix = student.decoder_logits(tokens[:, :3], encoded, lengths)
    assert (prefix - before[:, :3]).abs().max() < 1e-5


def test_the_decoder_sees_the_valid_frames_and_no_padding() -> None:
    student = tiny().eval()
    tokens, encoded, lengths = decoder_input(student)
    before = student.decoder_logits(tokens, encoded, lengths)
    padding, frame = encoded.clone(), encoded.clone()
    padding[1, 5:] = 100.0
    frame[1, 4] = 100.0
    assert (student.decoder_logits(tokens, padding, lengths) - before).abs().max() < 1e-6
    assert (student.decoder_logits(tokens, frame, lengths)[1] - before[1]).abs().max() > 1e-3


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second = tiny().state_dict(), tiny().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
