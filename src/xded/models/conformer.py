"""Conformer encoder (Gulati et al. 2020, arXiv:2005.08100), laid out as NeMo's Conformer-CTC.

Relative positions after Transformer-XL (Dai et al. 2019), 4x striding subsampling, macaron feed-forward
layers, batch norm in the convolution module. Tensors are [B, T, D] throughout; point-wise convolutions
are linear layers, which is the same arithmetic and faster.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xded.config import ModelConfig
from xded.features import valid_mask
from xded.models import collective
from xded.models.attention import attend, in_heads, joined, keep, masked
from xded.models.depthwise import depthwise
from xded.models.style import mix_style, whiten

SCORES_AT_ONCE = 2**21  # of attention in training, on a processor


class RecordingDropout(nn.Module):
    """Dropout with one mask per recording and channel, shared by all frames.

    Cheaper than a mask per frame (random numbers cost a tenth of a small step), and as strong
    a regulariser (Gal & Ghahramani 2016, arXiv:1512.05287).
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, values: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return values * self._mask(values) if self.training and self.probability else values

    def add(self, values: Tensor, branch: Tensor, share: float = 1.0) -> Tensor:
        """values + share * dropout(branch), in one pass: [B, T, D] twice -> [B, T, D]."""
        if self.training and self.probability:
            return torch.addcmul(values, branch, self._mask(branch), value=share)
        return torch.add(values, branch, alpha=share)

    def _mask(self, values: Tensor) -> Tensor:
        probability = 1.0 - self.probability
        return keep(values[:, :1], probability) / probability


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch norm over the valid frames only, so that padding changes nothing in training either.

    Processes that share a batch normalise with the statistics of the whole batch. `counted` says whether the
    recordings of this process are part of it.
    """

    counted = True

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """[B, T, D] and mask [B, T] -> [B, T, D] (padding undefined)."""
        if not self.training:
            assert self.running_mean is not None
            assert self.running_var is not None
            scale = self.weight * torch.rsqrt(self.running_var + self.eps)
            return (values - self.running_mean) * scale + self.bias
        normalise = super().forward if collective.count() == 1 else self._normalise_together
        frames, valid = values.flatten(0, 1), mask.flatten().nonzero()[:, 0]
        # not values[mask]: the gradient of that is ten times as slow on a processor
        normalised = normalise(frames.index_select(0, valid)).to(values.dtype)
        return torch.zeros_like(frames).index_copy(0, valid, normalised).view_as(values)

    def _normalise_together(self, values: Tensor) -> Tensor:
        """Batch norm over the frames of all processes (as torch's SyncBatchNorm, which only GPUs have): [N, D].

        In double precision, in which the variance may be the mean square less the squared mean.
        """
        own = (values if self.counted else values[:0]).double()
        sums = torch.cat([own.new_tensor([len(own)]), own.sum(0), own.square().sum(0)])
        count, total, squares = collective.total(sums).split([1, self.num_features, self.num_features])
        mean = total / count
        variance = squares / count - mean.square()
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            unbiased = variance * count / (count - 1)
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps).to(self.weight.dtype)
        return (values - mean.to(self.weight.dtype)) * scale + self.bias


class Subsampling(nn.Module):
    """Two 3x3 convolutions of stride 2 and a linear layer: a quarter of the frames (NeMo `striding`)."""

    def __init__(self, mels: int, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, kernel_size=3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)
        reduced = int(self.reduce(torch.tensor(mels)))
        self.out = nn.Linear(channels * reduced, width)

    @staticmethod
    def reduce(lengths: Tensor) -> Tensor:
        """Frames left of `lengths` frames."""
        for _ in range(2):
            lengths = torch.div(lengths - 1, 2, rounding_mode="floor") + 1
        return lengths

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, mels] -> [B, T/4, D] and the frames left [B]."""
        # in bf16 a processor convolves quickest with the channels last in memory, in float32 with them first
        last = features.is_cpu and torch.is_autocast_enabled("cpu")
        layout = torch.channels_last if last else torch.contiguous_format
        columns, kernel = features[:, None].to(memory_format=layout), self.conv1.weight.to(memory_format=layout)
        hidden = F.conv2d(columns, kernel, self.conv1.bias, self.conv1.stride, self.conv1.padding)
        # what the first convolution wrote beyond the recording must not leak back through the second
        half = torch.div(lengths - 1, 2, rounding_mode="floor") + 1
        hidden.detach().mul_(valid_mask(half, hidden.shape[2])[:, None, :, None])  # ReLU gives no gradient to zeros
        hidden = self.conv2(hidden.relu_()).transpose(1, 2).flatten(2).relu_()  # [B, T/4, C mels/4]
        return self.out(hidden), self.reduce(lengths)


def relative_positions(frames: int, width: int, device: torch.device) -> Tensor:
    """Sinusoids for the distances frames .. -(frames-1): [1, 2 frames, D]."""
    distances = torch.arange(frames, -frames, -1, device=device, dtype=torch.float32)
    steps = torch.arange(0, width, 2, device=device, dtype=torch.float32)
    angles = distances[:, None] * torch.exp(steps * -(math.log(10_000.0) / width))
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[None, :, :width]


def relative_shift(distance: Tensor) -> Tensor:
    """What each query gives to the distances T .. -(T-1), sorted by key: [..., T, 2T] -> [..., T, T]."""
    frames = distance.shape[-2]
    # row i, column j must hold the distance i - j: in rows of 2T - 1 from place T on, it does
    return distance.flatten(-2)[..., frames:].unflatten(-1, (frames, 2 * frames - 1))[..., :frames]


class RelativeAttention(nn.Module):
    """Multi-head self-attention with relative positions (Transformer-XL, section 3.3)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.position = nn.Linear(width, width, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(heads, self.head_width))
        self.position_bias = nn.Parameter(torch.zeros(heads, self.head_width))
        self.dropout = dropout

    def forward(self, values: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """[B, T, D], [1, 2T, D] and mask [B, T] -> [B, T, D]."""
        scale = 1.0 / math.sqrt(self.head_width)  # of the queries: their products are many more
        weight = torch.cat([self.query.weight * scale, self.key.weight, self.value.weight])  # one product for three
        bias = torch.cat([self.query.bias * scale, self.key.bias, self.value.bias])
        query, key, value = in_heads(F.linear(values, weight, bias), self.head_width).chunk(3)  # [H, B, T, D/H]
        biases = (scale * torch.stack([self.content_bias, self.position_bias])).to(query.dtype)
        content, query = query + biases[0, :, None, None], query + biases[1, :, None, None]
        position = self.position(positions[0]).unflatten(1, (-1, self.head_width)).permute(1, 2, 0)  # [H, D/H, 2T]

        def attended(content: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
            distance = torch.matmul(query.flatten(1, 2), position).unflatten(1, query.shape[1:3])
            bias = relative_shift(distance) + masked(mask, distance.dtype)[:, None]
            return attend(content, key, value, bias, self.dropout if self.training else 0.0)

        if self.training and values.is_cpu and self.heads * mask.numel() * mask.shape[1] > SCORES_AT_ONCE:
            # of long recordings few at a time, so that their scores stay in the processor's cache
            at_once = max(1, SCORES_AT_ONCE // (self.heads * mask.shape[1] ** 2))
            split = [part.split(at_once, dim=1) for part in (content, query, key, value)]
            parts = zip(*split, mask.split(at_once), strict=True)
            output = torch.cat([attended(*part) for part in parts], dim=1)
        else:
            output = attended(content, query, key, value, mask)
        return self.out(joined(output))


class FeedForward(nn.Module):
    """Half-step feed-forward layer with Swish."""

    def __init__(self, width: int, factor: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, width * factor)
        self.linear2 = nn.Linear(width * factor, width)
        self.dropout = RecordingDropout(dropout)

    def forward(self, values: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.linear2(self.dropout(F.silu(self.linear1(values))))


class Convolution(nn.Module):
    """Gated point-wise, depth-wise, batch norm, Swish, point-wise."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.pointwise1 = nn.Linear(width, 2 * width)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = MaskedBatchNorm(width)
        self.pointwise2 = nn.Linear(width, width)

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        """[B, T, D] and mask [B, T] -> [B, T, D]."""
        gated = F.glu(self.pointwise1(values), dim=2) * mask[:, :, None]
        local = depthwise(gated, self.depthwise.weight, self.depthwise.bias)
        return self.pointwise2(F.silu(self.norm(local, mask)))


class ConformerLayer(nn.Module):
    """Feed-forward, attention, convolution, feed-forward, each with a residual; a layer norm at the end."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.norm_feed_forward1 = nn.LayerNorm(width)
        self.feed_forward1 = FeedForward(width, config.feed_forward_factor, config.dropout)
        self.norm_attention = nn.LayerNorm(width)
        self.attention = RelativeAttention(width, config.heads, config.dropout)
        self.norm_convolution = nn.LayerNorm(width)
        self.convolution = Convolution(width, config.kernel)
        self.norm_feed_forward2 = nn.LayerNorm(width)
        self.feed_forward2 = FeedForward(width, config.feed_forward_factor, config.dropout)
        self.norm_out = nn.LayerNorm(width)
        self.dropout = RecordingDropout(config.dropout)

    def forward(self, values: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """[B, T, D], [1, 2T, D] and mask [B, T] -> [B, T, D]."""
        add = self.dropout.add
        values = add(values, self.feed_forward1(self.norm_feed_forward1(values)), 0.5)
        values = add(values, self.attention(self.norm_attention(values), positions, mask))
        values = add(values, self.convolution(self.norm_convolution(values), mask))
        values = add(values, self.feed_forward2(self.norm_feed_forward2(values)), 0.5)
        return self.norm_out(values)


class Conformer(nn.Module):
    """The encoder: features [B, T, mels] to encoded frames [B, T/4, D].

    `mixing` is the share of batches in training whose recordings mix the statistics of the first layer's outputs.
    """

    mixing = 0.0

    def __init__(self, config: ModelConfig, mels: int) -> None:
        super().__init__()
        self.width, self.whitened = config.width, config.whiten_layers
        self.subsampling = Subsampling(mels, config.subsampling_channels, config.width)
        self.dropout = RecordingDropout(config.dropout)
        self.layers = nn.ModuleList(ConformerLayer(config) for _ in range(config.encoder_layers))

    @staticmethod
    def reduce(lengths: Tensor) -> Tensor:
        """Encoded frames of `lengths` feature frames."""
        return Subsampling.reduce(lengths)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes a batch.

        Args:
            features: [B, T, mels], padded with zeros.
            lengths: [B], valid frames.

        Returns:
            Encoded frames [B, T', D] (padding undefined) and the valid ones of each [B].
        """
        hidden, lengths = self.subsampling(features, lengths)
        mask = valid_mask(lengths, hidden.shape[1])
        positions = relative_positions(hidden.shape[1], self.width, hidden.device).to(hidden.dtype)
        hidden = self.dropout(hidden * math.sqrt(self.width))
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, positions, mask)
            if number == 0 and self.training and self.mixing and float(torch.rand(())) < self.mixing:
                hidden = mix_style(hidden, mask)
            if number < self.whitened:
                hidden = whiten(hidden, mask)
        return hidden, lengths
