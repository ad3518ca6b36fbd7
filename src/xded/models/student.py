"""The recogniser of this project: an encoder, a CTC head and an attention decoder over one vocabulary.

Parent, teachers, students and baselines are all of this class.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from xded.config import FeatureConfig, ModelConfig
from xded.features import LogMel, valid_mask
from xded.models import processor
from xded.models.attention import masked
from xded.models.conformer import Conformer
from xded.models.decoder import Decoder
from xded.models.hugging_face import HuggingFaceEncoder, HuggingFaceFrontEnd

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

    The encoder is our Conformer, or that of a Hugging Face folder with its own front end.

    Args:
        config: sizes; `decoder_layers: 0` leaves the decoder out.
        vocabulary: V, number of pieces of the tokenizer; both heads have V outputs.
        features: the front end of the Conformer, which is part of the model (its settings travel with the weights).
    """

    positions: Tensor
    has_ctc = True

    def __init__(self, config: ModelConfig, vocabulary: int, features: FeatureConfig | None = None) -> None:
        super().__init__()
        processor.prepare()
        features = features or FeatureConfig()
        self.config, self.vocabulary = config, vocabulary
        self.front_end: LogMel | HuggingFaceFrontEnd
        self.encoder: Conformer | HuggingFaceEncoder
        if config.hugging_face is None:
            self.front_end, self.encoder = LogMel(features), Conformer(config, features.mels)
        else:
            self.front_end = HuggingFaceFrontEnd(config.hugging_face.front_end)
            self.encoder = HuggingFaceEncoder(config.hugging_face.encoder)
        self.ctc_head = nn.Linear(self.encoder.width, vocabulary)
        if self.has_decoder:
            self._make_decoder(config, vocabulary)

    @property
    def has_decoder(self) -> bool:
        """Whether there is an attention decoder beside the CTC head."""
        return self.config.decoder_layers > 0

    def _make_decoder(self, config: ModelConfig, vocabulary: int) -> None:
        # what the decoder attends to has its own width
        alike = self.encoder.width == config.width
        self.bridge = nn.Identity() if alike else nn.Linear(self.encoder.width, config.width)
        self.embedding = nn.Embedding(vocabulary, config.width)
        self.register_buffer("positions", sinusoids(MOST_TOKENS, config.width), persistent=False)
        self.decoder = Decoder(config)
        self.decoder_dropout = nn.Dropout(config.dropout)
        self.decoder_head = nn.Linear(config.width, vocabulary)
        for parameter in self.decoder.parameters():  # nn.TransformerDecoder copies one layer: start them apart
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)

    @property
    def frame_rate_hz(self) -> float:
        """Encoded frames a second, of a recording that is long."""
        seconds = torch.tensor([100, 200])  # the frames at the ends are in both
        fewer, more = self.encoded_frames(seconds * self.front_end.sample_rate).tolist()
        return (more - fewer) / 100.0

    def encoded_frames(self, samples: Tensor) -> Tensor:
        """Encoded frames of recordings of `samples` [B] samples."""
        return self.encoder.reduce(self.front_end.frames(samples))

    def encode(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, T, mels] and valid frames [B] -> encoded [B, T', D] and valid encoded frames [B]."""
        return self.encoder(features, lengths)

    def ctc_logits(self, encoded: Tensor) -> Tensor:
        """[B, T', D] -> [B, T', V]."""
        return self.ctc_head(encoded)

    def decoder_logits(
        self, tokens: Tensor, encoded: Tensor, encoded_lengths: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        """Next-token scores after every prefix.

        Args:
            tokens: [B, U], starting with <s>; tokens after the end of a row change nothing before it.
            encoded: [B, T', D].
            encoded_lengths: [B].
            seen: [U, U], which tokens each step has seen, itself and <s> among them, where texts branch (a word list);
                otherwise tokens 0..u.

        Returns:
            [B, U, V].
        """
        if seen is None:
            seen = torch.ones(2 * tokens.shape[1:], dtype=torch.bool, device=tokens.device).tril()
        positions = self.positions[seen.sum(1) - 1]
        hidden = self.decoder_dropout(self.embedding(tokens) * math.sqrt(self.config.width) + positions)
        valid = valid_mask(encoded_lengths, encoded.shape[1])[:, None]
        hidden = self.decoder(hidden, self.bridge(encoded), masked(seen, encoded.dtype), masked(valid, encoded.dtype))
        return self.decoder_head(hidden)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters in all, trainable and frozen."""
        total = sum(p.numel() for p in self.parameters())
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return {"total": total, "trainable": trainable, "frozen": total - trainable}
