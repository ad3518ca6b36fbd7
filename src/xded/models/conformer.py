"""Conformer encoder (Gulati et al. 2020, arXiv:2005.08100), laid out as NeMo's Conformer-CTC.

Relative positions after Transformer-XL (Dai et al. 2019), 4x striding subsampling, macaron feed-forward
layers, batch norm in the convolution module. Tensors are [B, T, D] throughout; point-wise convolutions
are linear layers, which is the same arithmetic and faster.
"""

from __future__ import annotations

import math
from functools import cached_property

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
MASKS_AT_ONCE = 4_096  # channels


class RecordingDropout:
    """Dropout of one pass with one mask per recording and channel, shared by all frames.

    Cheaper than a mask per frame (random numbers cost a tenth of a small step), and as strong a regulariser (Gal &
    Ghahramani 2016, arXiv:1512.05287). Masks are drawn many at a time, as each draw has its price.

    Args:
        probability: of being dropped; like: [B, ...], what is dropped is of this many recordings, type and place.
    """

    def __init__(self, probability: float, like: Tensor) -> None:
        self.probability, self.drawn = probability, like.new_empty(len(like), 1, 0)

    def __call__(self, values: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return values * self._mask(values.shape[2]) if self.probability else values

    def add(self, values: Tensor, branch: Tensor, share: float = 1.0) -> Tensor:
        """values + share * dropout(branch), in one pass: [B, T, D] twice -> [B, T, D]."""
        if self.probability:
            return torch.addcmul(values, branch, self._mask(branch.shape[2]), value=share)
        return torch.add(values, branch, alpha=share)

    def _mask(self, width: int) -> Tensor:
        if self.drawn.shape[2] < width:
            kept = 1.0 - self.probability
            self.drawn = keep(self.drawn.new_empty(len(self.drawn), 1, max(width, MASKS_AT_ONCE)), kept).div_(kept)
        mask, self.drawn = self.drawn.tensor_split([width], dim=2)
        return mask


class Valid:
    """Which frames belong to their recording, in the forms in which the layers ask for it."""

    def __init__(self, mask: Tensor, dtype: torch.dtype) -> None:
        self.mask = mask  # [B, T]
        self.bias = masked(mask, dtype)[:, None]  # of attention: [B, 1, T]

    @cached_property
    def places(self) -> Tensor:
        """Their numbers [N] among all B * T."""
        return self.mask.flatten().nonzero()[:, 0]


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch norm over the valid frames only, so that padding changes nothing in training either.

    Processes that share a batch normalise with the statistics of the whole batch. `counted` says whether the
    recordings of this process are part of it.
    """

    counted = True

    def forward(self, values: Tensor, valid: Valid) -> Tensor:  # type: ignore[override]
        """[B, T, D] -> [B, T, D] (padding undefined)."""
        if not self.training:
            assert self.running_mean is not None
            assert self.running_var is not None
            scale = self.weight * torch.rsqrt(self.running_var + self.eps)
            return (values - self.running_mean) * scale + self.bias
        normalise = super().forward if collective.count() == 1 else self._normalise_together
        frames = values.flatten(0, 1)
        # not values[mask]: the gradient of that is ten times as slow on a processor
        normalised = normalise(frames.index_select(0, valid.places)).to(values.dtype)
        return torch.zeros_like(frames).index_copy_(0, valid.places, normalised).view_as(values)

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
    """Sinusoids for the distances frames .. -(frames-1): [2 frames, D]."""
    distances = torch.arange(frames, -frames, -1, device=device, dtype=torch.float32)
    steps = torch.arange(0, width, 2, device=device, dtype=torch.float32)
    angles = distances[:, None] * torch.exp(steps * -(math.log(10_000.0) / width))
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :width]


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

    def forward(self, values: Tensor, position: Tensor, valid: Valid) -> Tensor:
        """[B, T, D] and projected relative positions, by head [H, D/H, 2T] -> [B, T, D]."""
        scale = 1.0 / math.sqrt(self.head_width)  # of the queries: their products are many more
        weight = torch.cat([self.query.weight * scale, self.key.weight, self.value.weight])  # one product for three
        asked = scale * (self.query.bias + self.content_bias.flatten())
        projected = F.linear(values, weight, torch.cat([asked, self.key.bias, self.value.bias]))
        content, key, value = in_heads(projected, self.head_width).chunk(3)  # [H, B, T, D/H]
        instead = scale * (self.position_bias - self.content_bias)
        query = content + instead.to(content.dtype)[:, None, None]

        def attended(content: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
            distance = torch.matmul(query.flatten(1, 2), position).unflatten(1, query.shape[1:3])
            return attend(content, key, value, relative_shift(distance) + bias, self.dropout if self.training else 0.0)

        scores = self.heads * values.shape[1] ** 2  # of a recording
        if self.training and values.is_cpu and len(values) * scores > SCORES_AT_ONCE:
            # of long recordings few at a time, so that their scores stay in the processor's cache
            at_once = max(1, SCORES_AT_ONCE // scores)
            split = [part.split(at_once, dim=1) for part in (content, query, key, value)]
            parts = zip(*split, valid.bias.split(at_once), strict=True)
            output = torch.cat([attended(*part) for part in parts], dim=1)
        else:
            output = attended(content, query, key, value, valid.bias)
        return self.out(joined(output))


class FeedForward(nn.Module):
    """Half-step feed-forward layer with Swish."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, width * factor)
        self.linear2 = nn.Linear(width * factor, width)

    def forward(self, values: Tensor, dropout: RecordingDropout) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.linear2(dropout(F.silu(self.linear1(values))))


class Convolution(nn.Module):
    """Gated point-wise, depth-wise, batch norm, Swish, point-wise."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.pointwise1 = nn.Linear(width, 2 * width)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = MaskedBatchNorm(width)
        self.pointwise2 = nn.Linear(width, width)

    def forward(self, values: Tensor, valid: Valid) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        gated = F.glu(self.pointwise1(values), dim=2) * valid.mask[:, :, None]
        local = depthwise(gated, self.depthwise.weight, self.depthwise.bias)
        return self.pointwise2(F.silu(self.norm(local, valid)))


class ConformerLayer(nn.Module):
    """Feed-forward, attention, convolution, feed-forward, each with a residual; a layer norm at the end."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.norm_feed_forward1 = nn.LayerNorm(width)
        self.feed_forward1 = FeedForward(width, config.feed_forward_factor)
        self.norm_attention = nn.LayerNorm(width)
        self.attention = RelativeAttention(width, config.heads, config.dropout)
        self.norm_convolution = nn.LayerNorm(width)
        self.convolution = Convolution(width, config.kernel)
        self.norm_feed_forward2 = nn.LayerNorm(width)
        self.feed_forward2 = FeedForward(width, config.feed_forward_factor)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, values: Tensor, position: Tensor, valid: Valid, dropout: RecordingDropout) -> Tensor:
        """[B, T, D] and projected relative positions, by head [H, D/H, 2T] -> [B, T, D]."""
        if not self.training:
            dropout = RecordingDropout(0.0, values)
        values = dropout.add(values, self.feed_forward1(self.norm_feed_forward1(values), dropout), 0.5)
        values = dropout.add(values, self.attention(self.norm_attention(values), position, valid))
        values = dropout.add(values, self.convolution(self.norm_convolution(values), valid))
        values = dropout.add(values, self.feed_forward2(self.norm_feed_forward2(values), dropout), 0.5)
        return self.norm_out(values)


class Conformer(nn.Module):
    """The encoder: features [B, T, mels] to encoded frames [B, T/4, D].

    `mixing` is the share of batches in training whose recordings mix the statistics of the first layer's outputs.
    """

    mixing = 0.0

    def __init__(self, config: ModelConfig, mels: int) -> None:
        super().__init__()
        self.width, self.whitened, self.dropout = config.width, config.whiten_layers, config.dropout
        self.subsampling = Subsampling(mels, config.subsampling_channels, config.width)
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
        valid, dropout = Valid(mask, hidden.dtype), RecordingDropout(self.dropout if self.training else 0.0, hidden)
        hidden = dropout(hidden * math.sqrt(self.width))
        for number, (layer, position) in enumerate(zip(self.layers, self._positions(hidden), strict=True)):
            hidden = layer(hidden, position, valid, dropout)
            if number == 0 and self.training and self.mixing and float(torch.rand(())) < self.mixing:
                hidden = mix_style(hidden, mask)
            if number < self.whitened:
                hidden = whiten(hidden, mask)
        return hidden, lengths

    def _positions(self, hidden: Tensor) -> Tensor:
        """Relative positions, projected for all layers by one product: [B, T, D] -> [layers, H, D/H, 2T]."""
        parts = [layer.attention for layer in self.layers if isinstance(layer, ConformerLayer)]
        positions = relative_positions(hidden.shape[1], self.width, hidden.device).to(hidden.dtype)
        projected = F.linear(positions, torch.cat([part.position.weight for part in parts]))
        return projected.unflatten(1, (len(parts), -1, parts[0].head_width)).permute(1, 2, 3, 0).contiguous()
