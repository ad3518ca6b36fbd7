"""Tiny random Hugging Face models, and folders of them as the library writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from xded.models.hugging_face import HuggingFaceEncoder, HuggingFaceFrontEnd
from xded.models.hugging_face_folder import HuggingFaceModel, read_folder

transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")

RATE = 16_000
SAMPLES = (15_200, 9_000, 12_345)  # of the recordings of a batch
PIECES = ("<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNO")
LIKE_WAV2VEC2 = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "conv_dim": [8] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
    "vocab_size": len(PIECES), "pad_token_id": 0, "mask_time_prob": 0.3, "mask_time_length": 4,
}  # fmt: skip
STABLE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
PARAKEET = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "subsampling_conv_channels": 4, "num_mel_bins": 16, "conv_kernel_size": 5,
}  # fmt: skip
CTC = {
    "wav2vec2": ("Wav2Vec2", LIKE_WAV2VEC2),
    "wav2vec2-stable": ("Wav2Vec2", LIKE_WAV2VEC2 | STABLE),
    "hubert": ("Hubert", LIKE_WAV2VEC2),
    "hubert-batch-norm": ("Hubert", LIKE_WAV2VEC2 | {"conv_pos_batch_norm": True}),
    "wavlm": ("WavLM", LIKE_WAV2VEC2),
    "wavlm-stable": ("WavLM", LIKE_WAV2VEC2 | STABLE),
    "parakeet": ("Parakeet", {"encoder_config": PARAKEET, "vocab_size": len(PIECES), "pad_token_id": 0}),
}
GROUPED = ("wav2vec2", "hubert", "hubert-batch-norm", "wavlm")  # feat_extract_norm: group
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
TEXT = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>"]


def waveforms() -> tuple[torch.Tensor, torch.Tensor]:
    """A padded batch [B, N] with rubbish in its padding, and the samples of each recording."""
    random = torch.Generator().manual_seed(3)
    envelope = torch.linspace(0.2, 1.0, max(SAMPLES)).sin()
    return torch.randn(len(SAMPLES), max(SAMPLES), generator=random) * 0.1 * envelope, torch.tensor(SAMPLES)


def shake(model: nn.Module) -> Any:
    """The model with weights that no initialisation leaves at 0 or 1."""
    random = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if value.is_floating_point() and "embed_positions" not in name:
            noise = 0.3 * torch.randn(value.shape, generator=random)
            value += noise.abs() if "running_var" in name else noise
    return model.eval()


def write_json(path: Path, found: Any) -> None:
    path.write_text(json.dumps(found))


def write_ctc(folder: Path, kind: str) -> Any:
    """A folder as `save_pretrained` leaves it; returns the library's model."""
    name, settings = CTC[kind]
    torch.manual_seed(0)
    config = getattr(transformers, "ParakeetCTCConfig" if name == "Parakeet" else f"{name}Config")(**settings)
    model = shake(getattr(transformers, f"{name}ForCTC")(config))
    model.save_pretrained(folder)
    if name == "Parakeet":
        transformers.ParakeetFeatureExtractor(feature_size=16).save_pretrained(folder)
        words = {"type": "Metaspace", "replacement": "|", "prepend_scheme": "never"}
        letters = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(PIECES)}, "merges": []}
        pad = {"id": 0, "content": "<pad>", **PLAIN, "special": True}
        tokenizer = {"version": "1.0", "added_tokens": [pad], "pre_tokenizer": words, "decoder": words}
        write_json(folder / "tokenizer.json", {**tokenizer, "model": letters})
    else:
        transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
        write_json(folder / "vocab.json", {piece: i for i, piece in enumerate(PIECES)})
    return model


def whisper_tokenizer() -> dict[str, Any]:
    """A tokenizer.json of bytes, whose first special id follows the letters."""
    letters = [*"abcdefghijkl", "Ġ"]
    added = [
        {"id": len(letters) + i, "content": text, **PLAIN, "special": True}
        for i, text in enumerate(TEXT)
    ]  # fmt: skip
    bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(letters)}, "merges": []}
    return {"version": "1.0", "added_tokens": added, "pre_tokenizer": bytes_of, "decoder": bytes_of, "model": model}


def write_whisper(folder: Path, languages: bool = True) -> Any:
    """The same for Whisper, which hears one second here."""
    tokenizer = whisper_tokenizer()
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=50, max_target_positions=24, num_mel_bins=16,
        vocab_size=24, pad_token_id=ids["<|endoftext|>"], bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|endoftext|>"], decoder_start_token_id=ids["<|startoftranscript|>"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = shake(transformers.WhisperForConditionalGeneration(config))
    model.model.decoder.embed_positions.weight.data.normal_(std=2.0)  # or it would write one letter again and again
    model.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(folder)
    write_json(folder / "tokenizer.json", tokenizer)
    generation = {
        "decoder_start_token_id": ids["<|startoftranscript|>"], "eos_token_id": ids["<|endoftext|>"],
        "no_timestamps_token_id": ids["<|notimestamps|>"], "suppress_tokens": [5], "begin_suppress_tokens": [2, 13],
    }  # fmt: skip
    if languages:
        generation |= {
            "lang_to_id": {"<|en|>": ids["<|en|>"], "<|de|>": ids["<|de|>"]},
            "task_to_id": {"transcribe": ids["<|transcribe|>"]},
        }
    write_json(folder / "generation_config.json", generation)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Every kind: its folder, which no test may change, and the library's model."""
    root = tmp_path_factory.mktemp("hub")
    written = {kind: (root / kind, write_ctc(root / kind, kind)) for kind in CTC}
    return written | {"whisper": (root / "whisper", write_whisper(root / "whisper"))}


@pytest.fixture(scope="module")
def found(folders: dict[str, tuple[Path, Any]]) -> dict[str, HuggingFaceModel]:
    return {kind: read_folder(folder) for kind, (folder, _) in folders.items()}


def build(model: HuggingFaceModel) -> tuple[HuggingFaceFrontEnd, HuggingFaceEncoder]:
    """What a checkpoint would rebuild: from settings that went through JSON, and the weights."""
    front_end = HuggingFaceFrontEnd(json.loads(json.dumps(model.front_end_settings)))
    encoder = HuggingFaceEncoder(json.loads(json.dumps(model.encoder_settings)))
    encoder.load_state_dict(dict(model.encoder))
    return front_end, encoder.eval()


def library_features(folder: Path, waveform: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the library's own front end makes of one recording."""
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    return dict(extractor(waveform.numpy(), sampling_rate=RATE, return_tensors="pt"))


def rewrite(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Other weights, as the file that the library wrote before safetensors."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(weights, folder / "pytorch_model.bin")
