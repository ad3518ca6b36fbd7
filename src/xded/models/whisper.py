"""Whisper (Radford et al. 2022, arXiv:2212.04356) as it was trained: a zero-shot baseline in a student's place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xded.errors import CheckpointError, ConfigError
from xded.models.hugging_face import HuggingFaceEncoder, HuggingFaceFrontEnd, library_config, whisper_part
from xded.models.hugging_face_folder import AGAIN, HuggingFaceModel
from xded.models.weights import load_weights


class WhisperRecogniser(nn.Module):
    """Front end, encoder and decoder of a Whisper model; what decoding and evaluation ask of a student.

    Args:
        settings: of its config.json.
        front_end: of its preprocessor_config.json.
        writing: see `Seq2Seq`.
        vocabulary: V of the tokenizer. Pieces that the model has no rows for are never written, and neither are ids
            that the tokenizer has no pieces for (time stamps).
        language: code of the language that it is told to write, such as `en`.

    Attributes:
        bos, eos: ids of <|startoftranscript|> and <|endoftext|>.

    Raises:
        CheckpointError: settings that the library does not take.
        ConfigError: a language that it was not trained on.
    """

    decoder: Any
    prompt: Tensor
    suppressed: Tensor
    not_first: Tensor
    has_ctc = False
    has_decoder = True

    def __init__(
        self,
        settings: Mapping[str, Any],
        front_end: Mapping[str, Any],
        writing: Mapping[str, Any],
        vocabulary: int,
        language: str = "en",
    ) -> None:
        super().__init__()
        self.front_end = HuggingFaceFrontEnd(front_end)
        self.encoder = HuggingFaceEncoder(settings)
        self.decoder = whisper_part("WhisperDecoder", library_config(settings))
        self.vocabulary = vocabulary
        prompts = writing["prompts"]
        if language not in prompts:
            raise ConfigError(
                f"This Whisper model was not trained on the language '{language}'.",
                f"Give one of: {', '.join(prompts)}.",
            )
        self.bos, self.eos = prompts[language][0], writing["end"]
        self.register_buffer("prompt", torch.tensor([prompts[language]]), persistent=False)
        self.register_buffer("suppressed", torch.tensor(writing["suppress"], dtype=torch.long), persistent=False)
        self.register_buffer("not_first", torch.tensor(writing["begin_suppress"], dtype=torch.long), persistent=False)

    @property
    def most_tokens(self) -> int:
        """Longest text that the decoder has positions for, beside the prompt."""
        return int(self.decoder.max_target_positions) - self.prompt.shape[1]

    @property
    def frame_rate_hz(self) -> float:
        """Encoded frames a second."""
        return self.front_end.sample_rate / self.front_end.hop_samples / 2.0

    def encode(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, T, mels] and valid frames [B] -> encoded [B, T', D] and [B].

        The decoder was trained to hear the silence up to 30 s too, so that all T' frames are valid.
        """
        encoded = self.encoder.encode_silence_too(features, lengths)
        return encoded, torch.full_like(lengths, encoded.shape[1])

    def ctc_logits(self, encoded: Tensor) -> Tensor:
        """There is no CTC head.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("A Whisper model has no CTC head.", "Use its decoder: --set decode.mode=decoder.")

    def decoder_logits(
        self, tokens: Tensor, encoded: Tensor, encoded_lengths: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        """Next-token scores after every prefix; minus infinity for what the model may not write.

        The prompt (<|startoftranscript|>, language, <|transcribe|>, <|notimestamps|>) stands where `tokens` have <s>.

        Args:
            tokens: [B, U], starting with <s>.
            encoded: [B, T', D].
            encoded_lengths: [B], all T'.
            seen: [U, U], which tokens each step has seen, itself and <s> among them, where texts branch (a word list);
                otherwise tokens 0..u.

        Returns:
            [B, U, V]; every step has seen the prompt.

        Raises:
            ConfigError: the text is longer than the decoder's positions.
        """
        if seen is None:
            seen = torch.ones(2 * tokens.shape[1:], dtype=torch.bool, device=tokens.device).tril()
        places = seen.sum(1) - 1  # tokens of the text up to each step
        if int(places.max()) > self.most_tokens:
            raise ConfigError(
                f"This Whisper model writes at most {self.most_tokens} tokens.", "Use a lower --max-length."
            )
        prompt = self.prompt.expand(len(tokens), -1)
        said = self.decoder(input_ids=prompt, encoder_hidden_states=encoded, use_cache=True)
        hidden = said.last_hidden_state[:, -1:]
        if len(places) > 1:
            heard = F.pad(seen[1:, 1:], (prompt.shape[1], 0), value=True)
            mask = torch.zeros(heard.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(~heard, -torch.inf)
            more = self.decoder(
                input_ids=tokens[:, 1:],
                attention_mask=mask.expand(len(tokens), 1, -1, -1),
                position_ids=(prompt.shape[1] - 1 + places[1:])[None],
                encoder_hidden_states=encoded,
                past_key_values=said.past_key_values,
                use_cache=True,
            )
            hidden = torch.cat([hidden, more.last_hidden_state], dim=1)
        logits = F.linear(hidden, self.decoder.embed_tokens.weight)
        logits = logits.index_fill(2, self.suppressed, -torch.inf)
        first = logits[:, :1].index_fill(2, self.not_first, -torch.inf)
        logits = torch.cat([first, logits[:, 1:]], dim=1)
        return F.pad(logits, (0, self.vocabulary - logits.shape[2]), value=-torch.inf)  # cuts where that is negative

    def parameter_counts(self) -> dict[str, int]:
        """Parameters in all, trainable and frozen: nothing is trained."""
        total = sum(p.numel() for p in self.parameters())
        return {"total": total, "trainable": 0, "frozen": total}


def whisper_recogniser(model: HuggingFaceModel, vocabulary: int, language: str = "en") -> WhisperRecogniser:
    """The recogniser of a Whisper folder, in eval mode; `vocabulary` is V of its tokenizer.

    Raises:
        CheckpointError: it has no decoder, or nothing that says how the decoder is prompted.
        ConfigError: a language that it was not trained on.
    """
    if model.seq2seq is None:
        raise CheckpointError(
            f"{model.path} has no decoder, or no generation_config.json that says what the decoder is prompted with.",
            AGAIN,
        )
    recogniser = WhisperRecogniser(
        model.encoder_settings, model.front_end_settings, model.seq2seq.writing, vocabulary, language
    )
    load_weights(recogniser.encoder, model.encoder, model.path)
    load_weights(recogniser.decoder, model.seq2seq.decoder, model.path)
    return recogniser.requires_grad_(False).eval()
