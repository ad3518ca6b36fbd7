"""One library's training step, in that library's environment: `worker.py LIBRARY CASE_JSON`, a step for each line read.

LIBRARY is `xded`, `nemo` or `speechbrain`. Of a step every part but front end and encoder is the same code for all.
Answers are JSON lines: first what was built, then the seconds of each step.
"""

from __future__ import annotations

import json
import math
import os
import sys
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
DROPOUT = 0.1


class Xded(nn.Module):
    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        from xded.config import FeatureConfig, ModelConfig
        from xded.features import LogMel
        from xded.models import processor
        from xded.models.conformer import Conformer

        processor.prepare()
        self.front_end = LogMel(FeatureConfig())
        config = ModelConfig(
            size=None, width=case["width"], encoder_layers=case["layers"], heads=4, kernel=31, feed_forward_factor=4,
            subsampling_channels=case["channels"], dropout=DROPOUT,
        )  # fmt: skip
        self.encoder = Conformer(config, MELS)

    def forward(self, waveforms: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(*self.front_end(waveforms, samples))


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


def peak_mb() -> float:
    """Largest resident size so far (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # what the libraries print goes elsewhere
    os.dup2(2, 1)
    library, case = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(case["threads"])
    torch.manual_seed(0)
    model = {"xded": Xded, "nemo": Nemo, "speechbrain": SpeechBrain}[library](case).train()
    heads = Heads(case["width"]).train()
    parameters = [p for module in (model, heads) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    waveforms = 0.1 * torch.randn(case["batch"], round(case["seconds"] * RATE))
    samples = torch.full((case["batch"],), waveforms.shape[1])
    tokens = torch.randint(3, VOCABULARY, (case["batch"], TOKENS))
    target = torch.randn(case["batch"], TOKENS, VOCABULARY).softmax(-1)

    def step() -> dict[str, float]:
        started, cpu_started = perf_counter(), process_time()
        optimizer.zero_grad(set_to_none=True)
        encoded, lengths = model(waveforms, samples)
        loss = heads.loss(encoded, lengths, tokens, target)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        assert torch.isfinite(norm), "the step does not learn"
        return {"seconds": perf_counter() - started, "cpu_seconds": process_time() - cpu_started}

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    answer(encoder_parameters=learning, parameters=learning + sum(p.numel() for p in heads.parameters()))
    for _ in sys.stdin:
        answer(**step(), peak_mb=peak_mb())


if __name__ == "__main__":
    main()
