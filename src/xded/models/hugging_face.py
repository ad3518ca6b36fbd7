"""Speech encoders of the library `transformers`: wav2vec 2.0, HuBERT, WavLM, Whisper's encoder, Parakeet.

The arithmetic is the library's own; here is what makes its models fit a student: features of one recording at a time,
results that do not depend on the other recordings of a batch, and folders that are read without running anything of
theirs. The library is imported when a model is built, never before, and it is never given a name to look up.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from xded.errors import CheckpointError, CorpusError, need_extra
from xded.features import valid_mask

PURPOSE = "A Hugging Face model"


@dataclass(frozen=True)
class Family:
    """What a `model_type` of a config.json means here.

    Attributes:
        front_end: class of its feature extractor.
        prefixes: what may stand before the names of the encoder's weights in its files, the likeliest first.
        head: prefix of its CTC head.
    """

    front_end: str
    prefixes: tuple[str, ...]
    head: str | None = None


FAMILIES = {
    "wav2vec2": Family("Wav2Vec2FeatureExtractor", ("wav2vec2.", ""), "lm_head."),
    "hubert": Family("Wav2Vec2FeatureExtractor", ("hubert.", ""), "lm_head."),
    "wavlm": Family("Wav2Vec2FeatureExtractor", ("wavlm.", ""), "lm_head."),
    "whisper": Family("WhisperFeatureExtractor", ("model.encoder.", "encoder.")),
    "parakeet_ctc": Family("ParakeetFeatureExtractor", ("encoder.",), "ctc_head."),
    "parakeet_rnnt": Family("ParakeetFeatureExtractor", ("encoder.",)),  # the encoder alone: no CTC head
    "parakeet_tdt": Family("ParakeetFeatureExtractor", ("encoder.",)),
    "parakeet_encoder": Family("ParakeetFeatureExtractor", ("",)),
}
# keys of a config.json that say nothing of the encoder; those that begin with "_" choose code to run, and go too
NOT_KEPT = {
    "architectures", "auto_map", "attn_implementation", "dtype", "torch_dtype", "transformers_version", "id2label",
    "label2id", "problem_type", "task_specific_params", "forced_decoder_ids", "suppress_tokens",
    "begin_suppress_tokens", "output_attentions", "output_hidden_states", "return_dict",
}  # fmt: skip


@cache
def library() -> Any:
    """The package `transformers`, without its warnings and progress bars.

    Raises:
        ConfigError: it is not installed.
    """
    transformers = need_extra("transformers", "transformers", PURPOSE)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # WavLM gives torch a boolean and a float mask together
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask and attn_mask")
    return transformers


class HuggingFaceFrontEnd(nn.Module):
    """The feature extractor that a preprocessor_config.json describes, for one recording at a time.

    Args:
        settings: of the file; `feature_extractor_type` chooses the class.

    Attributes:
        sample_rate: Hz.
        width: F, values of a frame.
        is_waveform: whether the features are the waveform itself, [B, N, 1], scaled to mean 0 and variance 1 where
            `do_normalize` says so; otherwise they are log-mel frames. Masks and warps of mel bands then mean nothing.
        hop_samples: from frame to frame.

    Raises:
        CheckpointError: another class, or settings that it does not take.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.settings = dict(settings)
        self.kind = str(settings.get("feature_extractor_type"))
        kinds = sorted({family.front_end for family in FAMILIES.values()})
        if self.kind not in kinds:
            raise CheckpointError(
                f"The front end {self.kind} is not supported.", f"Give a model whose front end is {', '.join(kinds)}."
            )
        maker = getattr(library(), self.kind)
        known = set(inspect.signature(maker).parameters) - {"kwargs", "dither"}  # no noise: features are computed once
        try:
            self.extractor = maker(**{key: value for key, value in settings.items() if key in known})
            self.sample_rate, self.width = int(self.extractor.sampling_rate), int(self.extractor.feature_size)
            self.is_waveform = self.kind == "Wav2Vec2FeatureExtractor"
            self.hop_samples = 1 if self.is_waveform else int(self.extractor.hop_length)
        except Exception as error:  # the library raises many types for a value that it cannot use
            raise CheckpointError(
                f"{self.kind} does not take these settings: {error}.", "Get the preprocessor_config.json again."
            ) from error
        self.settings = {key: value for key, value in settings.items() if key in {*known, "feature_extractor_type"}}

    def frames(self, samples: Tensor) -> Tensor:
        """Valid frames of recordings of `samples` [B] samples.

        Whisper's are those that hear any of the recording: it pads to 30 s, and its last frames reach into the silence.
        """
        if self.kind == "WhisperFeatureExtractor":
            touched = (samples - 1 + self.extractor.n_fft // 2) // self.hop_samples + 1
            longest = self.extractor.nb_max_frames
            return torch.where(samples <= self.extractor.n_samples, touched.clamp(max=longest), touched)
        return torch.div(samples, self.hop_samples, rounding_mode="floor")

    @torch.no_grad()
    def forward(self, waveforms: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Features of a batch.

        Args:
            waveforms: [B, N], padded.
            samples: [B], valid samples of each.

        Returns:
            Features [B, T, F], zero outside the recording, and the valid frames of each [B].

        Raises:
            CorpusError: a recording is too short for a frame, or longer than Whisper hears.
        """
        pairs = zip(waveforms, samples.tolist(), strict=True)
        rows = [torch.as_tensor(self._features(row[:count].cpu().numpy())) for row, count in pairs]
        features = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return features.to(waveforms.device), self.frames(samples)

    def _features(self, waveform: np.ndarray) -> np.ndarray:
        """Features of one recording: [N] -> [T, F]."""
        count, rate = len(waveform), self.sample_rate
        frames = int(self.frames(torch.tensor(count)))
        if frames < 2:  # Parakeet divides by the frames less one
            raise CorpusError(
                f"A recording of {count} samples ({1000 * count / rate:.0f} ms) is too short for {self.kind}.",
                "Take it out of the manifest.",
            )
        if self.kind == "WhisperFeatureExtractor":
            if count > self.extractor.n_samples:
                raise CorpusError(
                    f"A recording of {count / rate:.1f} s is longer than the {self.extractor.chunk_length} s that "
                    "Whisper hears.",
                    "Cut it, or take it out of the manifest.",
                )
            # silence up to where the last frame ends: what further silence holds, the encoder knows
            padded = min(frames * self.hop_samples + self.extractor.n_fft, self.extractor.n_samples)
            found = self.extractor(waveform, sampling_rate=rate, max_length=padded, return_tensors="np")
            return np.ascontiguousarray(found["input_features"][0].T[:frames])
        found = self.extractor(waveform, sampling_rate=rate, return_tensors="np")
        return found["input_values"][0][:, None] if self.is_waveform else found["input_features"][0][:frames]


class MaskedGroupNorm(nn.GroupNorm):
    """Group norm over the valid frames of each recording; `lengths` [B] are set before every pass."""

    lengths: Tensor

    def forward(self, values: Tensor) -> Tensor:
        """[B, C, T] -> [B, C, T], with one group per channel."""
        mask = valid_mask(self.lengths, values.shape[2])[:, None]
        if bool(mask.all()):
            return super().forward(values)
        count = self.lengths[:, None, None]
        centred = values - (values * mask).sum(2, keepdim=True) / count
        variance = (centred * mask).square().sum(2, keepdim=True) / count
        return centred * torch.rsqrt(variance + self.eps) * self.weight[:, None] + self.bias[:, None]


class PaddingFreeBatchNorm(nn.BatchNorm1d):
    """Batch norm whose padding stays 0, as a convolution behind it needs; `lengths` [B] are set before every pass."""

    lengths: Tensor

    def forward(self, values: Tensor) -> Tensor:
        """[B, C, T] -> [B, C, T]."""
        return super().forward(values) * valid_mask(self.lengths, values.shape[2])[:, None]


class HuggingFaceEncoder(nn.Module):
    """The encoder that a config.json describes, with random weights.

    What a recording becomes does not depend on those it shares a batch with. Models with `feat_extract_norm: group`
    (wav2vec2-base, hubert-base) were trained on recordings without padding, and the library says to give them padded
    batches without a mask, which changes every result with the length of the padding: their group norm averages over
    all frames. Here it averages over the valid ones, so that a batch gives what the library gives for each alone.

    In training, all randomness is torch's. Spans of frames are masked as `mask_time_prob` and `mask_time_length` say
    (wav2vec 2.0, HuBERT, WavLM), but for `mask_time_min_masks`, which would hide half of a word, and recordings shorter
    than a span. Masks of channels and LayerDrop are off: all processes of a run have to train the same parameters.
    Batch norm (Parakeet) keeps the statistics that it was trained with. Dropout is the library's.

    Args:
        settings: of a config.json; `model_type` decides.

    Attributes:
        width: D.

    Raises:
        CheckpointError: settings that the library does not take.
    """

    model: Any

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.settings = dict(settings)
        config = library_config(settings)
        self.kind = str(config.model_type)
        for name in ("layerdrop", "encoder_layerdrop"):
            if hasattr(config, name):
                setattr(config, name, 0.0)
        try:
            if self.kind == "whisper":
                self.model = whisper_part("WhisperEncoder", config)
            else:
                self.model = library().AutoModel.from_config(config, trust_remote_code=False)
        except Exception as error:  # the library raises many types for sizes that do not go together
            raise CheckpointError(
                f"No {self.kind} can have this config: {' '.join(str(error).split())}.", "Get its config.json again."
            ) from error
        self.config: Any = self.model.config
        self.config.mask_feature_prob = 0.0
        self.width = int(self.config.hidden_size)
        masks = getattr(self.config, "apply_spec_augment", False) and self.config.mask_time_prob > 0
        self.has_masks = bool(masks) and hasattr(self.model, "masked_spec_embed")
        if not self.is_log_mel:
            self._mask_norms()
        self.requires_grad_()

    def _mask_norms(self) -> None:
        """Puts norms that know where a recording ends in the place of those that do not."""
        first, positions = self.model.feature_extractor.conv_layers[0], self.model.encoder.pos_conv_embed
        if isinstance(norm := getattr(first, "layer_norm", None), nn.GroupNorm):
            first.layer_norm = MaskedGroupNorm(norm.num_groups, norm.num_channels, norm.eps)
        if isinstance(norm := getattr(positions, "batch_norm", None), nn.BatchNorm1d):  # of some HuBERTs
            positions.batch_norm = PaddingFreeBatchNorm(norm.num_features, norm.eps)

    @property
    def is_log_mel(self) -> bool:
        """Whether its features are log-mel frames, and not a waveform."""
        return self.kind in ("whisper", "parakeet_encoder")

    @property
    def layers(self) -> nn.ModuleList:
        """The layers, first to last."""
        return self.model.layers if self.is_log_mel else self.model.encoder.layers

    @property
    def subsampling(self) -> nn.ModuleList:
        """All that comes before the layers, the convolutions that shorten time first."""
        if self.kind == "whisper":
            return nn.ModuleList([self.model.conv1, self.model.conv2])
        if self.is_log_mel:
            return nn.ModuleList([self.model.subsampling])
        parts = [self.model.feature_extractor, self.model.feature_projection, self.model.encoder.pos_conv_embed]
        if not self.config.do_stable_layer_norm:  # a stable one has its norm behind the layers
            parts.append(self.model.encoder.layer_norm)
        return nn.ModuleList(parts)

    def train(self, mode: bool = True) -> Self:
        """Batch norm stays in eval mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Whisper's positions are never trained, and what masked frames become only where frames are masked."""
        super().requires_grad_(requires_grad)
        if self.kind == "whisper":
            self.model.embed_positions.requires_grad_(False)
        elif hasattr(self.model, "masked_spec_embed") and not self.has_masks:
            self.model.masked_spec_embed.requires_grad_(False)
        return self

    def reduce(self, lengths: Tensor) -> Tensor:
        """Encoded frames of `lengths` feature frames."""
        config = self.config
        if self.kind == "whisper":
            return (lengths + 1) // 2
        if self.is_log_mel:
            kernel, stride = config.subsampling_conv_kernel_size, config.subsampling_conv_stride
            for _ in range(int(math.log2(config.subsampling_factor))):
                lengths = (lengths + 2 * ((kernel - 1) // 2) - kernel) // stride + 1
            return lengths
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            lengths = ((lengths - kernel) // stride + 1).clamp(min=0)
        return lengths

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes a batch.

        Args:
            features: [B, T, F], padded with zeros.
            lengths: [B], valid frames.

        Returns:
            Encoded frames [B, T', D] (padding undefined) and the valid ones of each [B].

        Raises:
            CorpusError: a recording is too short for one encoded frame.
        """
        encoded_lengths = self.reduce(lengths)
        if int(encoded_lengths.min()) < 1:
            raise CorpusError(
                f"A recording of {int(lengths.min())} feature frames is too short for one frame of {self.kind}.",
                "Take it out of the manifest.",
            )
        mask = valid_mask(lengths, features.shape[1])
        if self.kind == "whisper":
            encoded = self.encode_silence_too(features, lengths)
        elif self.is_log_mel:
            encoded = self.model(input_features=features, attention_mask=mask).last_hidden_state
        else:
            for module in self.model.modules():
                if isinstance(module, MaskedGroupNorm):
                    module.lengths = (lengths - self.config.conv_kernel[0]) // self.config.conv_stride[0] + 1
                elif isinstance(module, PaddingFreeBatchNorm):
                    module.lengths = encoded_lengths
            more = {"mask_time_indices": self._time_masks(encoded_lengths, features.shape[1])} if self._masking else {}
            encoded = self.model(features[:, :, 0], attention_mask=mask.long(), **more).last_hidden_state
        return encoded[:, : int(encoded_lengths.max())], encoded_lengths

    def encode_silence_too(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Whisper's encoded frames of each recording and of the silence that fills it up to 30 s.

        Silence is the floor of its front end: 8 below the loudest value of the recording in log10, at least log10 of
        1e-10, and (x + 4) / 4 of that (`WhisperFeatureExtractor`).

        Args:
            features: [B, T, F].
            lengths: [B], valid frames.

        Returns:
            [B, `max_source_positions`, D].
        """
        features = features[:, : int(lengths.max())]
        valid = valid_mask(lengths, features.shape[1])[:, :, None]
        loudest = features.masked_fill(~valid, -torch.inf).amax(dim=(1, 2))
        silence = (loudest - 2.0).clamp(min=-1.5)[:, None, None].to(features.dtype)
        rest = 2 * self.config.max_source_positions - features.shape[1]
        filled = torch.cat([torch.where(valid, features, silence), silence.expand(-1, rest, features.shape[2])], dim=1)
        return self.model(filled.transpose(1, 2)).last_hidden_state

    @property
    def _masking(self) -> bool:
        return self.training and self.has_masks

    def _time_masks(self, encoded_lengths: Tensor, samples: int) -> Tensor:
        """Which encoded frames of a batch are hidden (SpecAugment; wav2vec 2.0, arXiv:2006.11477, appendix B)."""
        span = int(self.config.mask_time_length)
        masks = torch.zeros(len(encoded_lengths), int(self.reduce(torch.tensor(samples))), dtype=torch.bool)
        for row, frames in enumerate(encoded_lengths.tolist()):
            count = int(self.config.mask_time_prob * frames / span + float(torch.rand(())))
            if frames > span:
                for start in torch.randint(frames - span + 1, (count,)).tolist():
                    masks[row, start : start + span] = True
        return masks.to(encoded_lengths.device)


def whisper_part(name: Literal["WhisperEncoder", "WhisperDecoder"], config: Any) -> Any:
    """One half of a Whisper model; the library's auto classes only make both."""
    whisper = need_extra("transformers.models.whisper.modeling_whisper", "transformers", PURPOSE)
    return getattr(whisper, name)(config)


def library_config(settings: Mapping[str, Any]) -> Any:
    """The library's config object of a config.json, or of what a checkpoint keeps of one.

    Raises:
        CheckpointError: settings that the library does not take.
    """
    kept = {key: value for key, value in settings.items() if key not in NOT_KEPT and not key.startswith("_")}
    model_type = kept.pop("model_type", None)
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"Models of type {model_type!r} are not supported.", f"Give one of: {', '.join(FAMILIES)}."
        )
    configs = library().AutoConfig
    try:
        return configs.for_model(model_type, **kept)
    except Exception as error:  # the library raises many types for a value that it cannot use
        raise CheckpointError(
            f"No {model_type} can have this config: {' '.join(str(error).split())}.", "Get its config.json again."
        ) from error
