"""What a `.nemo` archive's `model_config.yaml` says, in this project's terms.

Strings in it are compared with tables, never imported. What this project's Conformer and features cannot answer exactly
as NeMo does is refused by name. Keys and defaults are those of nemo_toolkit 3.0.0 (`ConformerEncoder`,
`AudioToMelSpectrogramPreprocessor`, `ConvASRDecoder`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xded.errors import CheckpointError

CONFIG = "model_config.yaml"
SUPPORTED = "a Conformer-CTC model: 4x striding, relative positions, batch norm, unlimited context"
REMEDY = f"Give a .nemo archive of {SUPPORTED}."

# Values of settings that this project computes; the first is what NeMo takes where the key is absent.
NO_EFFECT = None  # any value: it changes training, memory or speed, not the answer
BPE, CHARACTERS = "nemo.collections.asr.models.ctc_bpe_models", "nemo.collections.asr.models.ctc_models"
MODULES = "nemo.collections.asr.modules"
TARGETS = {
    f"{BPE}.EncDecCTCModelBPE": True,  # with a SentencePiece tokenizer
    "nemo.collections.asr.models.EncDecCTCModelBPE": True,
    f"{CHARACTERS}.EncDecCTCModel": False,
    "nemo.collections.asr.models.EncDecCTCModel": False,
}
Settings = Mapping[str, tuple[Any, ...] | None]
PREPROCESSOR: Settings = {
    "_target_": (
        f"{MODULES}.AudioToMelSpectrogramPreprocessor",
        f"{MODULES}.audio_preprocessing.AudioToMelSpectrogramPreprocessor",
    ),
    "n_window_size": (None,), "n_window_stride": (None,), "window": ("hann",), "normalize": ("per_feature",),
    "lowfreq": (0,), "log": (True,), "log_zero_guard_type": ("add",), "log_zero_guard_value": (2**-24,),
    "frame_splicing": (1,), "exact_pad": (False,), "pad_value": (0,), "mag_power": (2.0,), "mel_norm": ("slaney",),
    "dither": NO_EFFECT, "pad_to": NO_EFFECT, "rng": NO_EFFECT, "nb_augmentation_prob": NO_EFFECT,
    "nb_max_freq": NO_EFFECT, "use_torchaudio": NO_EFFECT, "stft_exact_pad": NO_EFFECT, "stft_conv": NO_EFFECT,
}  # fmt: skip
PREPROCESSOR_SIZES = {"sample_rate", "features", "window_size", "window_stride", "n_fft", "preemph", "highfreq"}
ENCODER: Settings = {
    "_target_": (f"{MODULES}.ConformerEncoder", f"{MODULES}.conformer_encoder.ConformerEncoder"),
    "self_attention_model": ("rel_pos",), "subsampling": ("striding",), "subsampling_factor": (4,),
    "causal_downsampling": (False,), "reduction": (None,), "xscaling": (True, False), "untie_biases": (True,),
    "att_context_size": (None, [-1, -1], [[-1, -1]]), "att_chunk_context_size": (None,),
    "att_context_style": ("regular",), "conv_norm_type": ("batch_norm",), "conv_context_style": ("regular",),
    "use_bias": (True,), "reduction_position": NO_EFFECT, "reduction_factor": NO_EFFECT, "global_tokens": NO_EFFECT,
    "global_tokens_spacing": NO_EFFECT, "global_attn_separate": NO_EFFECT, "att_context_probs": NO_EFFECT,
    "pos_emb_max_len": NO_EFFECT, "dropout_pre_encoder": NO_EFFECT, "dropout_emb": NO_EFFECT,
    "dropout_att": NO_EFFECT, "stochastic_depth_drop_prob": NO_EFFECT, "stochastic_depth_mode": NO_EFFECT,
    "stochastic_depth_start_layer": NO_EFFECT, "subsampling_conv_chunking_factor": NO_EFFECT,
    "use_pytorch_sdpa": NO_EFFECT, "use_pytorch_sdpa_backends": NO_EFFECT, "sync_max_audio_length": NO_EFFECT,
}  # fmt: skip
ENCODER_SIZES = {
    "feat_in", "feat_out", "n_layers", "d_model", "n_heads", "ff_expansion_factor", "subsampling_conv_channels",
    "conv_kernel_size", "conv_context_size", "dropout",
}  # fmt: skip
DECODER: Settings = {
    "_target_": (f"{MODULES}.ConvASRDecoder", f"{MODULES}.conv_asr.ConvASRDecoder"),
    "add_blank": (True,), "init_mode": NO_EFFECT,
    "feat_in": NO_EFFECT,  # the shape of the weights says it
}  # fmt: skip
DECODER_SIZES = {"num_classes", "vocabulary"}
TOKENIZER: Settings = {"type": ("bpe",), "custom_tokenizer": (None,)}  # what NeMo calls bpe is any SentencePiece model


def refuse(path: Path, problem: str, remedy: str = REMEDY) -> CheckpointError:
    """The error for an archive: `problem` is what a sentence says that begins with its path."""
    return CheckpointError(f"{path} {problem}.", remedy)


def check_target(config: Mapping[str, Any], path: Path) -> bool:
    """Whether the model has a SentencePiece tokenizer; any class but the two that are known is refused."""
    target = config.get("target")
    if not isinstance(target, str) or target not in TARGETS:
        raise refuse(path, f"holds a model of class {target!r} (supported: {', '.join(TARGETS)})")
    return TARGETS[target]


def section_of(config: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    """A section of the config, checked against its table."""
    section = config.get(name)
    if not isinstance(section, Mapping):
        raise refuse(path, f"has no section '{name}' in its {CONFIG}")
    tables: Mapping[str, tuple[Settings, set[str] | None]] = {
        "preprocessor": (PREPROCESSOR, PREPROCESSOR_SIZES),
        "encoder": (ENCODER, ENCODER_SIZES),
        "decoder": (DECODER, DECODER_SIZES),
        "tokenizer": (TOKENIZER, None),  # its other keys are names of artifacts
    }
    settings, sizes = tables[name]
    for key, supported in settings.items():
        if supported is NO_EFFECT:
            continue
        value = section.get(key, supported[0])
        if not any(_same(value, other) for other in supported):
            listed = " or ".join(repr(other) for other in supported)
            raise refuse(path, f"has {name}.{key}: {value!r} (supported: {listed})")
    unknown = sorted(str(key) for key in section if key not in settings and key not in (sizes or section))
    if unknown:
        raise refuse(path, f"has settings that are not known here: {', '.join(f'{name}.{key}' for key in unknown)}")
    return section


def _same(value: Any, other: Any) -> bool:
    """Equal, and not by way of True being 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _number(section: Mapping[str, Any], key: str, low: float, high: float, path: Path, default: Any = None) -> Any:
    """A number within limits that keep a hostile config from asking for all memory."""
    value = section.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise refuse(path, f"has {key}: {value!r} in its {CONFIG} (expected: a number from {low} to {high})")
    return value


def _whole(section: Mapping[str, Any], key: str, low: int, high: int, path: Path, default: Any = None) -> int:
    value = _number(section, key, low, high, path, default)
    if value != int(value):
        raise refuse(path, f"has {key}: {value!r} in its {CONFIG} (expected: a whole number)")
    return int(value)


def features_of(section: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What `config.FeatureConfig` must say to compute the archive's features."""
    rate = _whole(section, "sample_rate", 1_000, 192_000, path, 16_000)
    if not _same(config.get("sample_rate", rate), rate):
        raise refuse(path, f"has sample_rate: {config['sample_rate']!r} beside preprocessor.sample_rate: {rate}")
    samples = {}
    for key, default in (("window_size", 0.02), ("window_stride", 0.01)):
        exact = _number(section, key, 1e-4, 1.0, path, default) * rate
        samples[key] = int(exact)  # NeMo cuts off
        if samples[key] != round(exact) or samples[key] < 1:
            raise refuse(path, f"has preprocessor.{key}: {section.get(key)!r}, which is {exact:.3f} samples")
    n_fft = 2 ** math.ceil(math.log2(samples["window_size"]))
    if section.get("n_fft"):
        n_fft = _whole(section, "n_fft", samples["window_size"], 2**16, path)
    if not _same(highest := section.get("highfreq") or rate / 2, rate / 2):
        raise refuse(path, f"has preprocessor.highfreq: {highest!r} (supported: half of the sample rate)")
    emphasis = section.get("preemph", 0.97)
    return {
        "sample_rate": rate,
        "mels": _whole(section, "features", 8, 1_024, path, 64),
        "window_s": section.get("window_size", 0.02),
        "hop_s": section.get("window_stride", 0.01),
        "n_fft": n_fft,
        "preemphasis": 0.0 if emphasis is None else _number(section, "preemph", 0.0, 1.0, path, 0.97),
        "normalisation": "per_recording",
    }


def model_of(section: Mapping[str, Any], mels: int, path: Path) -> dict[str, Any]:
    """What `config.ModelConfig` must say of the encoder."""
    width = _whole(section, "d_model", 8, 8_192, path)
    heads = _whole(section, "n_heads", 1, 256, path, 4)
    kernel = _whole(section, "conv_kernel_size", 3, 1_001, path, 31)
    channels = _whole(section, "subsampling_conv_channels", -1, 8_192, path, -1)
    if _whole(section, "feat_in", 8, 1_024, path) != mels:
        raise refuse(path, f"has encoder.feat_in: {section['feat_in']} for features of {mels} mels")
    if section.get("feat_out", -1) not in (-1, 0, width):
        raise refuse(path, f"has encoder.feat_out: {section['feat_out']!r} (supported: -1 or {width})")
    if width % heads or width % 2 or kernel % 2 == 0 or channels == 0:
        raise refuse(
            path, f"has a width of {width}, {heads} heads, kernels of {kernel}, {channels} channels: impossible"
        )
    sides = section.get("conv_context_size")
    if sides not in (None, [kernel // 2, kernel // 2]):
        raise refuse(path, f"has encoder.conv_context_size: {sides!r} (supported: None, as far to both sides)")
    return {
        "size": None,
        "width": width,
        "encoder_layers": _whole(section, "n_layers", 1, 128, path),
        "heads": heads,
        "kernel": kernel,
        "feed_forward_factor": _whole(section, "ff_expansion_factor", 1, 64, path, 4),
        "subsampling_channels": width if channels == -1 else channels,
        "dropout": float(_number(section, "dropout", 0.0, 0.99, path, 0.1)),
    }


def vocabulary_of(section: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """The pieces in the order of the head's rows."""
    pieces = section.get("vocabulary")
    if not isinstance(pieces, list) or not pieces or not all(isinstance(piece, str) for piece in pieces):
        raise refuse(path, "has no list of texts as its decoder.vocabulary")
    classes = section.get("num_classes", -1)
    if classes not in (-1, 0, len(pieces)):
        raise refuse(path, f"has decoder.num_classes: {classes!r} for a vocabulary of {len(pieces)} pieces")
    return tuple(pieces)
