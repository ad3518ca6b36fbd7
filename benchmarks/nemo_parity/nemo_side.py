"""Runs inside NeMo's environment: builds Conformer-CTC models of random weights, saves them, and keeps what they say.

`python nemo_side.py CASES.json OUT`; of each case OUT gets `NAME.nemo`, written by NeMo, and `NAME.npz`: NeMo's output
at every stage. Only NeMo and what it brings are imported here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import nemo
import numpy as np
import sentencepiece
import torch
from nemo.collections.asr.models import EncDecCTCModel, EncDecCTCModelBPE
from omegaconf import OmegaConf

MODULES = "nemo.collections.asr.modules"
LETTERS = "aeiounrstlmdkpbgfhvwj"


def pseudo_words(count: int) -> list[str]:
    """Made-up texts to train a tokenizer on."""
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list(LETTERS), generator.integers(2, 9))) for _ in range(count)]
    return [" ".join(words[i : i + 4]) for i in range(0, count, 4)]


def make_tokenizer(folder: Path, pieces: int) -> Path:
    """A folder as NeMo expects it: tokenizer.model and vocab.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(pseudo_words(20_000)), model_prefix=str(folder / "tokenizer"), vocab_size=pieces,
        model_type="bpe", bos_id=-1, eos_id=-1, minloglevel=3,
        normalization_rule_name="identity",  # NeMo's default table alone has 240 kB
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces_listed = [processor.id_to_piece(i) for i in range(1, processor.get_piece_size())]
    (folder / "vocab.txt").write_text("\n".join(pieces_listed) + "\n", encoding="utf-8")
    return folder


def build(case: dict[str, Any], out: Path) -> EncDecCTCModel:
    """The model of a case, its weights shaken away from the zeros and ones that layers start with."""
    torch.manual_seed(0)
    encoder, preprocessor = case["encoder"], case["preprocessor"]
    rate = preprocessor["sample_rate"]
    config: dict[str, Any] = {
        "sample_rate": rate,
        "log_prediction": False,
        "preprocessor": {"_target_": f"{MODULES}.AudioToMelSpectrogramPreprocessor", **preprocessor},
        "encoder": {"_target_": f"{MODULES}.ConformerEncoder", "feat_in": preprocessor["features"], **encoder},
        "decoder": {
            "_target_": f"{MODULES}.ConvASRDecoder", "feat_in": encoder["d_model"], "num_classes": -1, "vocabulary": [],
        },
        "decoding": {"strategy": "greedy_batch"},
        "optim": {"name": "adamw"},
    }  # fmt: skip
    if case["pieces"]:
        folder = make_tokenizer(out / "tokenizers" / case["name"], case["pieces"])
        config["tokenizer"] = {"dir": str(folder), "type": "bpe"}
        model = EncDecCTCModelBPE(cfg=OmegaConf.create(config))
    else:
        config["decoder"] |= {"vocabulary": [" ", *LETTERS], "num_classes": len(LETTERS) + 1}
        config["labels"] = [" ", *LETTERS]
        model = EncDecCTCModel(cfg=OmegaConf.create(config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name or "pos_bias" in name:
                value.add_(0.2 * torch.randn(value.shape, generator=generator))
        for name, value in model.named_buffers():
            if name.endswith("running_mean"):
                value.add_(0.2 * torch.randn(value.shape, generator=generator))
            elif name.endswith("running_var"):
                value.mul_(0.5 + torch.rand(value.shape, generator=generator))
        model.decoder.decoder_layers[0].weight.mul_(2.0)  # so that the blank does not win everywhere
    return model.eval()


def waveforms(seconds: list[float], rate: int, padding: float) -> tuple[np.ndarray, np.ndarray]:
    """Gliding tones with noise, int16: [B, N], samples [B]; the noise goes on beyond the end at the level `padding`."""
    generator = np.random.default_rng(2)
    samples = np.array([round(length * rate) for length in seconds])
    batch = generator.normal(0.0, 300.0, (len(samples), samples.max()))
    batch = np.where(np.arange(batch.shape[1]) < samples[:, None], batch, padding * batch)
    for row, count in zip(batch, samples, strict=True):
        time_s = np.arange(count) / rate
        for _ in range(4):
            start, slope = generator.uniform(100, rate / 4, 2)
            row[:count] += 1_500 * np.sin(2 * np.pi * (start + 0.3 * slope * np.sin(3 * time_s)) * time_s)
    return np.clip(batch, -32_767, 32_767).round().astype(np.int16), samples


def outputs(model: EncDecCTCModel, batch: np.ndarray, samples: np.ndarray) -> dict[str, np.ndarray]:
    """What the model says at every stage; time before channels, as in xded."""
    signal, length = torch.from_numpy(batch.astype(np.float32) / 32_768), torch.from_numpy(samples)
    features, feature_lengths = model.preprocessor(input_signal=signal, length=length)
    encoded, encoded_lengths = model.encoder(audio_signal=features, length=feature_lengths)
    log_probs = model.decoder(encoder_output=encoded)
    texts = model.decoding.ctc_decoder_predictions_tensor(log_probs, decoder_lengths=encoded_lengths)
    return {
        "features": features.transpose(1, 2).numpy(), "features_lengths": feature_lengths.numpy(),
        "encoded": encoded.transpose(1, 2).numpy(), "encoded_lengths": encoded_lengths.numpy(),
        "log_probs": log_probs.numpy(), "texts": np.array([getattr(text, "text", text) for text in texts]),
    }  # fmt: skip


@torch.no_grad()
def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for case in cases:
        model = build(case, out)
        model.save_to(str(out / f"{case['name']}.nemo"))
        # without pre-emphasis NeMo hears what lies beyond the end of a recording: there it must be silence
        padding = 1.0 if case["preprocessor"].get("preemph", True) else 0.0
        batch, samples = waveforms(case["seconds"], case["preprocessor"]["sample_rate"], padding)
        kept = {"waveforms": batch, "samples": samples, **outputs(model, batch, samples)}
        for row, count in enumerate(samples):  # alone: no padding
            alone = outputs(model, batch[row : row + 1, :count], samples[row : row + 1])
            kept |= {f"alone_{row}_{key}": alone[key] for key in ("encoded", "texts")}
        exact, _ = model.encoder.double()(
            audio_signal=torch.from_numpy(kept["features"]).double().transpose(1, 2),
            length=torch.from_numpy(kept["features_lengths"]),
        )
        kept["encoded_double"] = exact.transpose(1, 2).numpy()
        np.savez_compressed(out / f"{case['name']}.npz", **kept)
        print(case["name"], list(kept["texts"]), flush=True)
    versions = {"nemo": nemo.__version__, "torch": torch.__version__}
    (out / "versions.json").write_text(json.dumps(versions))


if __name__ == "__main__":
    main()
