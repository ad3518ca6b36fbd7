"""One library's training step, in that library's environment: `worker.py LIBRARY CASE_JSON`, a turn for each line read.

LIBRARY is `xded` (ours.py), `nemo`, `speechbrain` or `transformers`. The others' front ends and encoders have the same
heads and loss, written here with torch's own modules. Answers are JSON lines: first what was built, then the mean
seconds of a turn's steps. They follow one another, as in training; the first of a turn, before which another process
had the processor and its cache, is not counted.
"""

from __future__ import annotations

import json
import math
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RATE = 16_000
MELS = 80
VOCABULARY = 5_000
TOKENS = 6
DECODER_LAYERS, DECODER_FEED_FORWARD = 4, 1_024
DROPOUT, LEARNING_RATE = 0.1, 1e-4
COUNTED = 3  # steps of a turn


class Nemo(nn.Module):
    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor, ConformerEncoder

        self.front_end = AudioToMelSpectrogramPreprocessor(
            sample_rate=RATE, window_size=0.025, window_stride=0.01, features=MELS, n_fft=512, pad_to=0
        )
        self.encoder = ConformerEncoder(
            feat_in=MELS, n_layers=case["layers"], d_model=case["width"], n_heads=4, conv_kernel_size=31,
            subsampling="striding", subsampling_factor=4, subsampling_conv_channels=case["channels"],
            dropout=DROPOUT, dropout_pre_encoder=DROPOUT, dropout_emb=0.0, dropout_att=DROPOUT,
        )  # fmt: skip

    def forward(self, waveforms: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        features, lengths = self.front_end(input_signal=waveforms, length=samples)
        encoded, lengths = self.encoder(audio_signal=features, length=lengths)
        return encoded.transpose(1, 2), lengths


class SpeechBrain(nn.Module):
    """Front end and encoder as in SpeechBrain's LibriSpeech recipe (conformer_small)."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        from speechbrain.lobes.features import Fbank
        from speechbrain.lobes.models.convolution import ConvolutionFrontEnd
        from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR
        from speechbrain.processing.features import InputNormalization

        self.fbank = Fbank(sample_rate=RATE, n_fft=512, n_mels=MELS)
        self.normalise = InputNormalization(norm_type="sentence")
        self.convolutions = ConvolutionFrontEnd(
            input_shape=(8, 10, MELS), num_blocks=2, num_layers_per_block=1, kernel_sizes=[3, 3], strides=[2, 2],
            out_channels=case.get("speechbrain_channels", [case["channels"]] * 2), residuals=[False, False],
        )  # fmt: skip
        self.encoder = TransformerASR(
            input_size=MELS // 4 * case.get("speechbrain_channels", [case["channels"]])[-1], tgt_vocab=VOCABULARY,
            d_model=case["width"], nhead=4, num_encoder_layers=case["layers"], num_decoder_layers=0,
            d_ffn=4 * case["width"], dropout=DROPOUT, activation=nn.GELU, encoder_module="conformer",
            attention_type="RelPosMHAXL", normalize_before=True, causal=False,
        )  # fmt: skip

    def forward(self, waveforms: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        shares = samples / waveforms.shape[1]
        with torch.no_grad():
            features = self.normalise(self.fbank(waveforms), shares)
        encoded = self.encoder.encode(self.convolutions(features), shares)
        return encoded, (shares * encoded.shape[1]).round().long()


class Transformers(nn.Module):
    """transformers' Parakeet encoder, of random weights; the front end is this project's (theirs has no tensors in)."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        from transformers import ParakeetEncoder, ParakeetEncoderConfig

        from xded.config import FeatureConfig
        from xded.features import LogMel

        self.front_end = LogMel(FeatureConfig())
        config = ParakeetEncoderConfig(
            hidden_size=case["width"], num_hidden_layers=case["layers"], num_attention_heads=4,
            intermediate_size=4 * case["width"], conv_kernel_size=31, subsampling_factor=4,
            subsampling_conv_channels=case["channels"], num_mel_bins=MELS, dropout=DROPOUT, attention_dropout=DROPOUT,
            activation_dropout=DROPOUT, layerdrop=0.0,
        )  # fmt: skip
        self.encoder = ParakeetEncoder(config)

    def forward(self, waveforms: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        features, lengths = self.front_end(waveforms, samples)
        valid = torch.arange(features.shape[1])[None] < lengths[:, None]
        output = self.encoder(features, attention_mask=valid)
        return output.last_hidden_state, output.attention_mask.sum(1)


class Heads(nn.Module):
    """CTC head and attention decoder of the reference study's size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ctc = nn.Linear(width, VOCABULARY)
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.scale = math.sqrt(width)
        layer = nn.TransformerDecoderLayer(width, 4, DECODER_FEED_FORWARD, DROPOUT, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, DECODER_LAYERS, norm=nn.LayerNorm(width))
        self.out = nn.Linear(width, VOCABULARY)

    def loss(self, encoded: Tensor, lengths: Tensor, tokens: Tensor, target: Tensor) -> Tensor:
        """CTC on the true text plus KL to given posteriors of the decoder."""
        log_probs = self.ctc(encoded).log_softmax(-1).transpose(0, 1)
        full = torch.full((len(tokens),), TOKENS)
        ctc = F.ctc_loss(log_probs, tokens, lengths, full, zero_infinity=True)
        padding = torch.arange(encoded.shape[1])[None] >= lengths[:, None]
        future = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
        hidden = self.embedding(tokens) * self.scale
        hidden = self.decoder(hidden, encoded, tgt_mask=future, memory_key_padding_mask=padding)
        return 0.5 * ctc + F.kl_div(self.out(hidden).log_softmax(-1), target, reduction="batchmean")


class Peer:
    """Another library's front end and encoder, with heads and a batch."""

    def __init__(
        self, library: str, case: dict[str, Any], waveforms: Tensor, samples: Tensor, tokens: Tensor, target: Tensor
    ) -> None:
        self.batch, self.frozen = (waveforms, samples, tokens, target), bool(case.get("frozen"))
        kind = {"nemo": Nemo, "speechbrain": SpeechBrain, "transformers": Transformers}[library]
        self.encoder: nn.Module = kind(case).train()
        self.heads = Heads(case["width"]).train()
        if self.frozen:
            self.encoder.requires_grad_(False).eval()
        both = (*self.encoder.parameters(), *self.heads.parameters())
        self.parameters = [p for p in both if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, fused=True)

    def loss(self) -> Tensor:
        """Forward and loss."""
        waveforms, samples, tokens, target = self.batch
        with torch.no_grad() if self.frozen else nullcontext():
            encoded, lengths = self.encoder(waveforms, samples)
        return self.heads.loss(encoded, lengths, tokens, target)

    def clip(self) -> Tensor:
        """Norm of the gradient, which is then at most 1."""
        return torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)


def peak_mb() -> float:
    """Largest resident size so far (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def made_up_batch(count: int, seconds: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Waveforms [B, N], samples [B], tokens [B, U], posteriors of the decoder [B, U, V]."""
    waveforms = 0.1 * torch.randn(count, round(seconds * RATE))
    tokens = torch.randint(3, VOCABULARY, (count, TOKENS))
    samples = torch.full((count,), waveforms.shape[1])
    return waveforms, samples, tokens, torch.randn(count, TOKENS, VOCABULARY).softmax(-1)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # what the libraries print goes elsewhere
    os.dup2(2, 1)
    library, case = sys.argv[1], {"dropout": DROPOUT, **json.loads(sys.argv[2])}
    torch.set_num_threads(case["threads"])
    torch.manual_seed(0)
    batch = made_up_batch(case["batch"], case["seconds"])
    if library == "xded":
        from ours import Xded

        trained: Any = Xded(case, *batch)
    else:
        trained = Peer(library, case, *batch)
    for group in trained.optimizer.param_groups:
        group["lr"] = LEARNING_RATE

    def step() -> None:
        trained.optimizer.zero_grad(set_to_none=True)
        loss = trained.loss()
        loss.backward()
        norm = trained.clip()
        trained.optimizer.step()
        assert torch.isfinite(norm), "the step does not learn"

    def turn() -> dict[str, float]:
        step()
        started, cpu_started = perf_counter(), process_time()
        for _ in range(COUNTED):
            step()
        return {
            "seconds": (perf_counter() - started) / COUNTED,
            "cpu_seconds": (process_time() - cpu_started) / COUNTED,
        }

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    answer(encoder_parameters=sum(p.numel() for p in trained.encoder.parameters()))
    for _ in sys.stdin:
        answer(**turn(), peak_mb=peak_mb())


if __name__ == "__main__":
    main()
