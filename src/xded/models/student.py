"""The recogniser of this project: Conformer encoder, CTC head and attention decoder over one vocabulary.

Parent, teachers, students and baselines are all of this class.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from xded.config import FeatureConfig, ModelConfig
from xded.features import LogMel, valid_mask
from xded.models.conformer import Conformer

MOST_TOKENS = 512  # longest prefix that the decoder's positions are made for


def sinusoids(length: int, width: int) -> Tensor:
    """Absolute positions of Vaswani et al. 2017 (section 3.5): [length, width]."""
    steps = torch.arange(0, width, 2, dtype=torch.float32)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * torch.exp(steps * -(math.log(10_000.0) / width))
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :width]


def decoder_input(tokens: Tensor, bos: int) -> Tensor:
    """What the decoder has seen before each step of the text: [B, U] ending in </s> -> [B, U] starting with <s>."""
    return torch.cat([torch.full_like(tokens[:, :1], bos), tokens[:, :-1]], dim=1)


class Student(nn.Module):
    """Encoder + CTC head + attention decoder.

    Args:
        config: sizes.
        vocabulary: V, number of pieces of the tokenizer; both heads have V outputs.
        features: the front end, which is part of the model (its settings travel with the weights).
    """

    positions: Tensor

    def __init__(self, config: ModelConfig, vocabulary: int, features: FeatureConfig | None = None) -> None:
        super().__init__()
        features = features or FeatureConfig()
        self.config, self.vocabulary = config, vocabulary
        self.front_end = LogMel(features)
        self.encoder = Conformer(config, features.mels)
        self.ctc_head = nn.Linear(config.width, vocabulary)
        self.embedding = nn.Embedding(vocabulary, config.width)
        self.register_buffer("positions", sinusoids(MOST_TOKENS, config.width), persistent=False)
        layer = nn.TransformerDecoderLayer(
            config.width, config.heads, config.decoder_feed_forward, config.dropout, batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, config.decoder_layers, norm=nn.LayerNorm(config.width))
        self.decoder_dropout = nn.Dropout(config.dropout)
        self.decoder_head = nn.Linear(config.width, vocabulary)
        for parameter in self.decoder.parameters():  # nn.TransformerDecoder copies one layer: start them apart
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)

    @property
    def frame_rate_hz(self) -> float:
        """Encoded frames a second."""
        return 1.0 / (4.0 * self.front_end.config.hop_s)

    def encoded_frames(self, samples: Tensor) -> Tensor:
        """Encoded frames of recordings of `samples` [B] samples."""
        return self.encoder.subsampling.reduce(self.front_end.frames(samples))

    def encode(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, T, mels] and valid frames [B] -> encoded [B, T', D] and valid encoded frames [B]."""
        return self.encoder(features, lengths)

    def ctc_logits(self, encoded: Tensor) -> Tensor:
        """[B, T', D] -> [B, T', V]."""
        return self.ctc_head(encoded)

    def decoder_logits(self, tokens: Tensor, encoded: Tensor, encoded_lengths: Tensor) -> Tensor:
        """Next-token scores after every prefix.

        Args:
            tokens: [B, U], starting with <s>; tokens after the end of a row change nothing before it.
            encoded: [B, T', D].
            encoded_lengths: [B].

        Returns:
            [B, U, V]; step u has seen tokens 0..u.
        """
        steps = tokens.shape[1]
        hidden = self.embedding(tokens) * math.sqrt(self.config.width) + self.positions[:steps]
        future = torch.ones(steps, steps, dtype=torch.bool, device=tokens.device).triu(1)
        padding = ~valid_mask(encoded_lengths, encoded.shape[1])
        hidden = self.decoder(self.decoder_dropout(hidden), encoded, tgt_mask=future, memory_key_padding_mask=padding)
        return self.decoder_head(hidden)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters in all, trainable and frozen."""
        total = sum(p.numel() for p in self.parameters())
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return {"total": total, "trainable": trainable, "frozen": total - trainable}
