"""An exported recogniser at work: onnxruntime, numpy and the tokenizer; torch is not needed.

`encoder.onnx` goes from the waveform to the CTC head, so that the front end is the one that was trained with.
`decoder.onnx` is one step of the attention decoder. What is done with their outputs is that of `decoding`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from pydantic import Field, ValidationError

from xded.audio import read_audio
from xded.config import Config, DecodeConfig, FeatureConfig, ModelConfig, ObjectiveConfig, Section, TokenizerConfig
from xded.errors import CheckpointError, ConfigError, need_extra
from xded.tokenizer import Tokenizer, normalise

CONFIG, WEIGHTS, TOKENIZER, CARD = "config.json", "model.safetensors", "tokenizer.model", "README.md"
ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
FORMAT: Final = "xded export 1"
AGAIN = "Export the checkpoint again with 'xded export'."
WORDS_AT_ONCE = 128  # of a word list in one run of the decoder; bounds memory


class TokenizerFacts(Section):
    """Of the tokenizer whose bytes lie in `tokenizer.model`."""

    kind: str = Field(description="format of the bytes")
    normaliser: str
    size: int = Field(description="pieces and special ids: rows of the heads", ge=1)
    fingerprint: str
    bos: int
    eos: int
    blank: int = Field(description="of CTC")
    unwritten: tuple[int, ...] = Field(description="ids that no text holds")


class Heard(Section):
    """What an artefact that the model comes from has heard."""

    what: str
    speakers: tuple[str, ...]
    takes: tuple[str, ...]
    known: bool = True


class Description(Section):
    """`config.json` of an exported folder: all that is needed to build the model again."""

    format: Literal["xded export 1"] = FORMAT
    xded: str = Field(description="version that wrote it")
    name: str
    epoch: int
    features: FeatureConfig
    model: ModelConfig
    decode: DecodeConfig
    tokenizer: TokenizerFacts
    provenance: tuple[Heard, ...] | None = Field(description="none: withheld, because speakers' ids are health data")
    source_sha256: str = Field(description="of the checkpoint")
    sha256: dict[str, str] = Field(description="of the files beside this one")

    def as_config(self) -> Config:
        """As the config of a checkpoint; what an export does not keep (corpus, training) has its defaults."""
        tokenizer = TokenizerConfig.model_validate({"normaliser": self.tokenizer.normaliser})
        objective = ObjectiveConfig() if self.model.decoder_layers else ObjectiveConfig(cross_entropy=0.0)
        return Config(
            features=self.features, model=self.model, decode=self.decode, tokenizer=tokenizer, objective=objective
        )


@dataclass(frozen=True)
class Transcript:
    """What one recording was heard as, and its log-probability (of a word list: the mix of both heads)."""

    tokens: tuple[int, ...]
    text: str
    score: float


def is_exported(folder: Path) -> bool:
    """Whether a folder was written by `xded export`."""
    try:
        return FORMAT in (folder / CONFIG).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def describe(folder: Path) -> Description:
    """Reads `config.json`.

    Raises:
        CheckpointError: missing, damaged or of another program.
    """
    path = folder / CONFIG
    try:
        description = Description.model_validate_json(path.read_bytes())
        description.as_config()  # its sections may contradict each other
        return description
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).", AGAIN) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path} describes no exported model ({place}: {first['msg']}).", AGAIN) from error


def checked(folder: Path, name: str, description: Description) -> bytes:
    """The bytes of a file of the export.

    Raises:
        CheckpointError: it is missing, or not the one that was exported.
    """
    path = folder / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).", AGAIN) from error
    if hashlib.sha256(content).hexdigest() != description.sha256.get(name):
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {CONFIG}.", AGAIN)
    return content


def tokenizer_of(folder: Path, description: Description) -> Tokenizer:
    """The tokenizer of an exported folder.

    Raises:
        CheckpointError: it is damaged, or not the one that the model was trained with.
        TokenizerError: it cannot be read.
    """
    facts = description.tokenizer
    tokenizer = Tokenizer.from_bytes(checked(folder, TOKENIZER, description), facts.normaliser, facts.kind)
    if tokenizer.fingerprint != facts.fingerprint:
        raise CheckpointError(f"{folder / TOKENIZER} is not the tokenizer of the model beside it.", AGAIN)
    return tokenizer


class Exported:
    """A recogniser in a folder that `xded export` wrote, on the CPU.

    Args:
        folder: the export.
        settings: head and word list; search is greedy.
        words: to choose from, with `settings.word_list`.

    Raises:
        CheckpointError: a file is missing, damaged or of another make.
        ConfigError: onnxruntime is not installed; a beam; a word list without words.
        TokenizerError: words that the tokenizer cannot write.
    """

    def __init__(self, folder: Path, settings: DecodeConfig, words: Sequence[str] | None = None) -> None:
        if settings.beam > 1:
            raise ConfigError("An exported model has no beam search.", "Use --beam 1, or give the checkpoint itself.")
        self.folder, self.settings = folder, settings
        self.description = describe(folder)
        self.tokenizer = tokenizer_of(folder, self.description)
        if settings.word_list:
            self.words = sorted({normalise(word, self.tokenizer.normaliser) for word in words or ()})
            if not self.words:
                raise ConfigError("Word-list decoding has no words.", "Give the words with --word-list, one a line.")
            self.tokenizer.self_test(self.words)
            self.word_tokens = [tuple(self.tokenizer.encode(word)) for word in self.words]
        self._encoder = self._session(ENCODER)
        if settings.ctc_weight < 1 if settings.word_list else settings.mode == "decoder":
            self._decoder = self._session(DECODER)

    def _session(self, name: str) -> Any:
        runtime = need_extra("onnxruntime", "onnx", "An exported model")
        content = checked(self.folder, name, self.description)
        options = runtime.SessionOptions()
        # starting costs more than one word: 0.17 s instead of 0.38 s with an 18 M model, and the word itself no more
        options.intra_op_num_threads = 1
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        try:
            return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises types of its own
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{self.folder / name} cannot be run: {reason}.", AGAIN) from error

    def hear(self, path: Path) -> Transcript:
        """Recognises one audio file.

        Raises:
            CheckpointError: the model's outputs are NaN.
            CorpusError: the file cannot be read.
        """
        outputs = self.run(read_audio(path, self.description.features.sample_rate))
        if self.settings.word_list:
            return self._choose(outputs)
        if self.settings.mode == "ctc":
            tokens, score = ctc_greedy(outputs["ctc_log_probs"][0], self.tokenizer.blank)
        else:
            tokens, score = self._decoder_greedy(outputs)
        return Transcript(tokens, self.tokenizer.decode(tokens), score)

    def run(self, waveform: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs of `encoder.onnx` for one waveform [N], by name, without frames beyond the recording."""
        names = [output.name for output in self._encoder.get_outputs()]
        inputs = {"waveforms": waveform[None], "samples": np.array([len(waveform)])}
        outputs = dict(zip(names, self._encoder.run(names, inputs), strict=True))
        frames = int(outputs["lengths"][0])
        outputs["ctc_log_probs"] = _numbers(outputs["ctc_log_probs"][:, :frames])  # [1, T', V]
        return outputs

    def _start(self, heard: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
        """What the decoder is given besides tokens before the first step: `rows` texts about one recording."""
        memory = {name: heard[name].repeat(rows, axis=1) for name in ("memory_keys", "memory_values")}
        none = memory["memory_keys"][:, :, :, :0]
        return {**memory, "lengths": heard["lengths"].repeat(rows), "past_keys": none, "past_values": none}

    def _step(self, tokens: np.ndarray, state: dict[str, np.ndarray]) -> np.ndarray:
        """Log-probabilities of the token after `tokens` [B], [B, V]; `state` becomes that of the next step."""
        logits, keys, values = self._decoder.run(["logits", "keys", "values"], {"tokens": tokens[:, None], **state})
        state.update(past_keys=keys, past_values=values)
        return _log_softmax(_numbers(logits))

    def _decoder_greedy(self, heard: dict[str, np.ndarray]) -> tuple[tuple[int, ...], float]:
        """The most probable next token at every step until </s>, and the log-probability of all, </s> included."""
        special, tokens, score = self.tokenizer, [self.tokenizer.bos], 0.0
        state = self._start(heard, 1)
        for step in range(self.settings.max_length + 1):
            log_probs = self._step(np.array(tokens[-1:]), state)
            log_probs[:, list(special.unwritten)] = -np.inf
            token = special.eos if step == self.settings.max_length else int(log_probs[0].argmax())
            score += float(log_probs[0, token])
            if token == special.eos:
                break
            tokens.append(token)
        return tuple(tokens[1:]), score

    def _choose(self, heard: dict[str, np.ndarray]) -> Transcript:
        """The listed word that a log-linear mix of both heads prefers; none where no word fits into the recording."""
        tokens, weight = self.word_tokens, self.settings.ctc_weight
        scores = np.zeros(len(tokens))
        if weight > 0:
            scores += weight * ctc_words(heard["ctc_log_probs"][0], tokens, self.tokenizer.blank)
        if weight < 1:
            parts = [tokens[i : i + WORDS_AT_ONCE] for i in range(0, len(tokens), WORDS_AT_ONCE)]
            scores += (1 - weight) * np.concatenate([self._decoder_words(heard, part) for part in parts])
        best = int(scores.argmax())
        if scores[best] == -np.inf:
            return Transcript((), "", -np.inf)
        return Transcript(tokens[best], self.words[best], float(scores[best]))

    def _decoder_words(self, heard: dict[str, np.ndarray], words: Sequence[Sequence[int]]) -> np.ndarray:
        """Decoder log-probability of each word and </s>: [W]."""
        rows, scores = np.arange(len(words)), np.zeros(len(words))
        state = self._start(heard, len(words))
        lengths = np.array([len(word) for word in words])
        steps = int(lengths.max()) + 1
        wanted = np.array([[*word, *[self.tokenizer.eos] * (steps - len(word))] for word in words])  # [W, U + 1]
        given = np.full(len(words), self.tokenizer.bos)
        for step in range(steps):
            log_probs = self._step(given, state)
            given = wanted[:, step]
            scores += np.where(step <= lengths, log_probs[rows, given], 0.0)
        return scores


def ctc_greedy(log_probs: np.ndarray, blank: int) -> tuple[tuple[int, ...], float]:
    """`decoding.ctc_greedy` of one recording: [T, V] -> tokens and the log-probability of the best path."""
    path = log_probs.argmax(1)
    new = np.concatenate([[True], path[1:] != path[:-1]])
    return tuple(path[new & (path != blank)].tolist()), float(log_probs.max(1).sum())


def ctc_words(log_probs: np.ndarray, words: Sequence[Sequence[int]], blank: int) -> np.ndarray:
    """CTC log-likelihood of words (Graves et al. 2006, section 4.1); -inf for those that need more frames.

    Args:
        log_probs: [T, V].
        words: W lists of tokens, none empty.
        blank: id of the CTC blank.

    Returns:
        [W], double.
    """
    lengths = np.array([len(word) for word in words])
    labels = np.full((len(words), 2 * lengths.max() + 1), blank)  # a blank before, between and after the tokens
    for row, word in enumerate(words):
        labels[row, 1 : 2 * len(word) : 2] = word
    skip = np.zeros(labels.shape, dtype=bool)  # where a path may come from two places before
    skip[:, 2:] = (labels[:, 2:] != blank) & (labels[:, 2:] != labels[:, :-2])
    reached = np.full(labels.shape, -np.inf)  # log-probability of all paths that end at a place
    reached[:, 0] = 0.0  # as if a frame before the first had been blank
    for frame in log_probs.astype(np.double):
        one, two = (np.pad(reached, ((0, 0), (by, 0)), constant_values=-np.inf)[:, :-by] for by in (1, 2))
        reached = np.logaddexp(np.logaddexp(reached, one), np.where(skip, two, -np.inf)) + frame[labels]
    rows = np.arange(len(words))
    return np.logaddexp(reached[rows, 2 * lengths], reached[rows, 2 * lengths - 1])


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    normalised: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalised


def _numbers(outputs: np.ndarray) -> np.ndarray:
    """The outputs, unless there is a NaN among them, which every search would turn into some text."""
    if np.isnan(outputs).any():
        raise CheckpointError("The model's outputs are not numbers (NaN).", "Its weights are damaged: export another.")
    return outputs
