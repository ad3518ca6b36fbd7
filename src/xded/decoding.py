"""Outputs of the student become text: greedy and beam search for both heads, and scoring of a list of words.

Scores are natural-log probabilities, never normalised by length. No search depends on the other recordings of a batch:
decoding together and one by one gives the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from xded.audio import read_audio
from xded.config import DecodeConfig
from xded.errors import CheckpointError, ConfigError, TokenizerError
from xded.features import valid_mask
from xded.models.decoder_step import DecoderStep
from xded.models.student import Student
from xded.models.token_tree import TokenTree
from xded.tokenizer import Tokenizer, normalise

if TYPE_CHECKING:
    from xded.models.recogniser import Recogniser as LoadedRecogniser

Found = tuple[tuple[int, ...], float]  # tokens without <s> and </s>, log-probability
WORDS_AT_ONCE = 128  # of a word list; bounds memory: 128 words of 7 tokens at V = 5000 take at most 20 MiB of logits


class Recogniser(Protocol):
    """What decoding needs of `models.student.Student`."""

    training: bool

    @property
    def has_ctc(self) -> bool:
        """Whether `ctc_logits` can be asked."""
        ...

    @property
    def has_decoder(self) -> bool:
        """Whether `decoder_logits` can be asked."""
        ...

    def encode(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, F], [B] -> encoded [B, T', D], lengths [B]."""
        ...

    def ctc_logits(self, encoded: Tensor) -> Tensor:
        """[B, T', D] -> [B, T', V]."""
        ...

    def decoder_logits(
        self, tokens: Tensor, encoded: Tensor, encoded_lengths: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        """[B, U] starting with <s>, [B, T', D], [B], and what each step has seen, [U, U] -> [B, U, V]."""
        ...


@dataclass(frozen=True)
class Hypothesis:
    """What one recording was heard as, and its score (of a word list: see `word_list_scores`)."""

    tokens: tuple[int, ...]
    text: str
    score: float


def ctc_greedy(log_probs: Tensor, lengths: Tensor, blank: int) -> list[Found]:
    """The most probable path of each recording, repeats merged and blanks dropped (Graves et al. 2006, section 3.2).

    Args:
        log_probs: [B, T, V], normalised over V.
        lengths: valid frames, [B].
        blank: id of the CTC blank.

    Returns:
        Tokens and the log-probability of that one path, [B].
    """
    best, path = log_probs.max(dim=2)  # [B, T]
    valid = valid_mask(lengths, log_probs.shape[1])
    new = torch.ones_like(valid)
    new[:, 1:] = path[:, 1:] != path[:, :-1]
    kept = (valid & new & (path != blank)).cpu()
    scores = best.masked_fill(~valid, 0).sum(1).tolist()
    return [(tuple(row[keep].tolist()), score) for row, keep, score in zip(path.cpu(), kept, scores, strict=True)]


def ctc_beam(log_probs: Tensor, lengths: Tensor, blank: int, beam: int) -> list[Found]:
    """Prefix beam search (Graves 2012, section 7.5; Hannun et al. 2014, algorithm 1, without a language model).

    Args:
        log_probs: [B, T, V], normalised over V.
        lengths: valid frames, [B].
        blank: id of the CTC blank.
        beam: prefixes kept after each frame.

    Returns:
        Tokens and the log-probability of all paths that were kept for them, [B].
    """
    frames = log_probs.double().cpu().numpy()
    return [_prefix_beam(frames[b, :length], blank, beam) for b, length in enumerate(lengths.tolist())]


def _prefix_beam(log_probs: np.ndarray, blank: int, beam: int) -> Found:
    """Prefix beam search of one recording, [T, V]."""
    prefixes: list[tuple[int, ...]] = [()]
    in_blank, in_label = np.array([0.0]), np.array([-np.inf])  # log-probability of paths that end in either
    # Only tokens among the 2 * beam best of a frame can start one of its `beam` best new prefixes: of these tokens, at
    # most beam - 1 lead to prefixes that are kept already, and one (the repeated last label) counts for less.
    labels = np.delete(np.arange(log_probs.shape[1]), blank)
    order = labels[np.argsort(-log_probs[:, labels], axis=1, kind="stable")[:, : 2 * beam]]
    for frame, tokens in zip(log_probs, order, strict=True):
        last = np.array([prefix[-1] if prefix else blank for prefix in prefixes])
        total = np.logaddexp(in_blank, in_label)
        stay_blank = total + frame[blank]
        stay_label = np.where(last != blank, in_label + frame[last], -np.inf)
        # a label after itself is a new one only behind a blank
        longer = np.where(tokens == last[:, None], in_blank[:, None], total[:, None]) + frame[tokens]
        place = {prefix: i for i, prefix in enumerate(prefixes)}
        for i, prefix in enumerate(prefixes):
            parent = place.get(prefix[:-1]) if prefix else None
            if parent is not None:  # both ways to this prefix count together
                before = in_blank[parent] if last[parent] == last[i] else total[parent]
                stay_label[i] = np.logaddexp(stay_label[i], before + frame[last[i]])
                longer[parent, tokens == last[i]] = -np.inf
        scores = np.concatenate([np.logaddexp(stay_blank, stay_label), longer.ravel()])
        kept = np.argsort(-scores, kind="stable")[:beam]
        kept = kept[scores[kept] > -np.inf]
        old, new = kept[kept < len(prefixes)], kept[kept >= len(prefixes)] - len(prefixes)
        parents, columns = np.divmod(new, len(tokens))
        prefixes = [prefixes[i] for i in old] + [
            (*prefixes[i], int(tokens[j])) for i, j in zip(parents, columns, strict=True)
        ]
        in_blank = np.concatenate([stay_blank[old], np.full(len(new), -np.inf)])
        in_label = np.concatenate([stay_label[old], longer.ravel()[new]])
    total = np.logaddexp(in_blank, in_label)
    best = int(total.argmax())
    return prefixes[best], float(total[best])


def decoder_greedy(
    model: Recogniser, encoded: Tensor, lengths: Tensor, tokenizer: Tokenizer, max_length: int
) -> list[Found]:
    """The most probable next token at every step until </s>.

    Args:
        model: in eval mode.
        encoded: [B, T, D].
        lengths: valid frames, [B].
        tokenizer: of the model; its `unwritten` ids are never chosen.
        max_length: most tokens before </s>; a row that has them ends there.

    Returns:
        Tokens and their log-probability, that of </s> included, [B].
    """
    rows, eos = len(encoded), tokenizer.eos
    writing = _Writing(model, encoded, lengths, tokenizer)
    tokens = torch.full((rows, 1), tokenizer.bos, device=encoded.device)
    scores = torch.zeros(rows, device=encoded.device)
    running = torch.ones(rows, dtype=torch.bool, device=encoded.device)
    for step in range(max_length + 1):
        log_probs = writing.next_log_probs(tokens)  # [B, V]
        best, token = log_probs.max(dim=1)
        if step == max_length:  # only the end may follow
            best, token = log_probs[:, eos], torch.full_like(token, eos)
        scores += torch.where(running, best, 0.0)
        tokens = torch.cat([tokens, torch.where(running, token, eos)[:, None]], dim=1)
        running &= token != eos
        if not running.any():
            break
    written = [row[: row.index(eos)] for row in tokens[:, 1:].tolist()]
    return [(tuple(row), score) for row, score in zip(written, scores.tolist(), strict=True)]


def decoder_beam(
    model: Recogniser, encoded: Tensor, lengths: Tensor, tokenizer: Tokenizer, max_length: int, beam: int
) -> list[Found]:
    """Beam search over unfinished prefixes; the best finished text is kept beside the beam and cannot be crowded out.

    A row is done when no prefix in its beam is more probable than its best finished text, as a longer text never gets
    more probable.

    Args:
        model: in eval mode.
        encoded: [B, T, D].
        lengths: valid frames, [B].
        tokenizer: of the model; its `unwritten` ids are never chosen.
        max_length: most tokens before </s>.
        beam: K, prefixes kept after each step.

    Returns:
        Tokens and their log-probability, that of </s> included, [B].
    """
    rows, device, eos = len(encoded), encoded.device, tokenizer.eos
    writing = _Writing(model, encoded, lengths, tokenizer, beam)
    tokens = torch.full((rows, beam, 1), tokenizer.bos, device=device)  # [B, K, U]
    scores = torch.full((rows, beam), -torch.inf, device=device)
    scores[:, 0] = 0.0  # the beam starts as one prefix
    best: list[Found] = [((), -float("inf"))] * rows
    for step in range(max_length + 1):
        log_probs = writing.next_log_probs(tokens.flatten(0, 1))
        candidates = scores[:, :, None] + log_probs.unflatten(0, (rows, beam))  # [B, K, V]
        ended, which = candidates[:, :, eos].max(dim=1)
        for row, (score, k) in enumerate(zip(ended.tolist(), which.tolist(), strict=True)):
            if score > best[row][1]:
                best[row] = tuple(tokens[row, k, 1:].tolist()), score
        candidates[:, :, eos] = -torch.inf
        scores, flat = candidates.flatten(1).topk(beam, dim=1)
        hopeless = [score <= found[1] for score, found in zip(scores[:, 0].tolist(), best, strict=True)]
        if step == max_length or all(hopeless):
            break
        parent, token = flat // log_probs.shape[1], flat % log_probs.shape[1]
        prefixes = tokens.gather(1, parent[:, :, None].expand(-1, -1, tokens.shape[2]))
        tokens = torch.cat([prefixes, token[:, :, None]], dim=2)
        writing.go_on_with(parent)
    return best


class _Writing:
    """A decoder at work on `texts` prefixes of each recording (N = B * texts rows, those of a recording together).

    A student keeps what it has computed of the prefixes; any other model reads them again at every step.
    """

    def __init__(
        self, model: Recogniser, encoded: Tensor, lengths: Tensor, tokenizer: Tokenizer, texts: int = 1
    ) -> None:
        self.model, self.unwritten, self.texts = model, list(tokenizer.unwritten), texts
        self.lengths = lengths.repeat_interleave(texts)
        self.step = DecoderStep(model) if isinstance(model, Student) else None
        if self.step:
            self.memory = [part.repeat_interleave(texts, 1) for part in self.step.remember(encoded)]
            self.past: Sequence[Tensor] = self.step.start(len(self.lengths))
        else:
            self.encoded = encoded.repeat_interleave(texts, 0)

    def next_log_probs(self, tokens: Tensor) -> Tensor:
        """Log-probabilities of the token after each prefix, without those that no text holds: [N, U] -> [N, V]."""
        if self.step:
            logits, *self.past = self.step(tokens[:, -1:], *self.memory, self.lengths, *self.past)
        else:
            logits = self.model.decoder_logits(tokens, self.encoded, self.lengths)[:, -1]
        log_probs = _log_probs(logits)
        log_probs[:, self.unwritten] = -torch.inf
        return log_probs

    def go_on_with(self, parents: Tensor) -> None:
        """The next prefixes are longer by one than these of the same recording, [B, texts]."""
        if self.step:
            rows = torch.arange(len(parents), device=parents.device)[:, None] * self.texts + parents
            self.past = [part[:, rows.flatten()] for part in self.past]


def word_list_scores(
    model: Recogniser,
    encoded: Tensor,
    lengths: Tensor,
    word_tokens: Sequence[Sequence[int]],
    ctc_weight: float,
    tokenizer: Tokenizer,
) -> Tensor:
    """Log-linear mix of both heads for every recording and word (joint decoding, Watanabe et al. 2017).

    ctc_weight * log P_ctc(word) + (1 - ctc_weight) * log P_decoder(word, </s>). A head of weight 0 is not run. A word
    that needs more frames than the recording has gets -inf (unless the CTC head has no weight).

    Args:
        model: in eval mode.
        encoded: [B, T, D].
        lengths: valid frames, [B].
        word_tokens: W lists of tokens, none empty.
        ctc_weight: 0 to 1.
        tokenizer: of the model.

    Returns:
        [B, W], double.

    Raises:
        ConfigError: a head that has weight is not there.
    """
    _need(model, ctc=ctc_weight > 0, decoder=ctc_weight < 1, ctc_weight=ctc_weight)
    scores = torch.zeros(len(encoded), len(word_tokens), dtype=torch.double)
    targets, target_lengths = _pad(word_tokens, tokenizer.eos)
    starts = range(0, len(word_tokens), WORDS_AT_ONCE) if ctc_weight < 1 else ()
    trees = [TokenTree.of(word_tokens[start : start + WORDS_AT_ONCE], tokenizer.bos) for start in starts]
    for row, length in enumerate(lengths.tolist()):
        heard = encoded[row : row + 1, :length]  # without padding: other recordings cannot change it
        if ctc_weight > 0:
            log_probs = _log_probs(model.ctc_logits(heard)[0])
            scores[row] += ctc_weight * _ctc_words(log_probs, targets, target_lengths, tokenizer.blank)
        if ctc_weight < 1:
            words = torch.cat([_decoder_words(model, heard, tree, tokenizer.eos) for tree in trees])
            scores[row] += (1 - ctc_weight) * words
    return scores


def _need(model: Recogniser, *, ctc: bool, decoder: bool, ctc_weight: float | None = None) -> None:
    """Refuses a decoding that asks for a head that the model does not have.

    Raises:
        ConfigError: naming the head and the setting (that of word lists, where `ctc_weight` is given).
    """
    if ctc and not model.has_ctc:
        missing, other, mode, weight = "CTC head", "attention decoder", "decoder", 0
    elif decoder and not model.has_decoder:
        missing, other, mode, weight = "attention decoder", "CTC head", "ctc", 1
    else:
        return
    if ctc_weight is None:
        raise ConfigError(
            f"The recogniser has no {missing}, which is to be decoded.",
            f"Use its {other}: --set decode.mode={mode} (--decode {mode}).",
        )
    raise ConfigError(
        f"The recogniser has no {missing}, but decode.ctc_weight {ctc_weight:g} lets it score the word list.",
        f"Use its {other} alone: --set decode.ctc_weight={weight}.",
    )


def _log_probs(logits: Tensor) -> Tensor:
    """Log-probabilities over the last dimension, in single precision at least.

    Raises:
        CheckpointError: when there is a NaN, which every search would turn into some text.
    """
    log_probs = logits.float().log_softmax(dim=-1)
    if log_probs[..., 0].isnan().any():  # one NaN makes the whole distribution NaN
        raise CheckpointError(
            "The model's outputs are not numbers (NaN).", "Its weights are damaged: use an earlier checkpoint."
        )
    return log_probs


def _pad(word_tokens: Sequence[Sequence[int]], eos: int) -> tuple[Tensor, Tensor]:
    """Words as [W, U], padded with </s>, and their lengths [W]."""
    lengths = torch.tensor([len(tokens) for tokens in word_tokens])
    targets = torch.full((len(word_tokens), int(lengths.max())), eos)
    for row, tokens in enumerate(word_tokens):
        targets[row, : len(tokens)] = torch.tensor(tokens)
    return targets, lengths


def _ctc_words(log_probs: Tensor, targets: Tensor, target_lengths: Tensor, blank: int) -> Tensor:
    """CTC log-likelihood of words [W, U] given [T, V]: [W]; -inf for words that do not fit into T frames."""
    # the forward recursion only reads the blank and the words' tokens: the others need not be copied for every word
    used, columns = torch.cat([targets.new_tensor([blank]), targets.flatten()]).unique(return_inverse=True)
    frames = log_probs.cpu().double()[:, None, used]  # on the CPU: the same on every device, and MPS has no CTC
    labels = columns[1:].view_as(targets)
    scores = []
    for part, lengths in zip(labels.split(WORDS_AT_ONCE), target_lengths.split(WORDS_AT_ONCE), strict=True):
        each = torch.full_like(lengths, len(frames))
        expanded = frames.expand(-1, len(part), -1)  # [T, W, used]
        scores.append(-F.ctc_loss(expanded, part, each, lengths, blank=int(columns[0]), reduction="none"))
    return torch.cat(scores)


def _decoder_words(model: Recogniser, heard: Tensor, tree: TokenTree, eos: int) -> Tensor:
    """Decoder log-probability of the words of a tree and </s> given encoded [1, T, D]: [W]."""
    tokens, frames = tree.tokens.to(heard.device), torch.tensor([heard.shape[1]], device=heard.device)
    log_probs = _log_probs(model.decoder_logits(tokens[None], heard, frames, tree.seen.to(heard.device)))[0]  # [N, V]
    steps = F.pad(log_probs[tree.parents, tokens[1:]], (1, 0)).cpu().double()  # <s> is given
    ends = log_probs[tree.ends, eos].cpu().double()
    return torch.where(tree.seen[tree.ends], steps, 0.0).sum(1) + ends


def decode(
    model: Recogniser,
    features: Tensor,
    lengths: Tensor,
    settings: DecodeConfig,
    tokenizer: Tokenizer,
    word_list: Iterable[str] | None = None,
) -> list[Hypothesis]:
    """Recognises one batch.

    Args:
        model: in eval mode.
        features: [B, T, F].
        lengths: valid frames, [B].
        settings: head, beam, length and word list.
        tokenizer: of the model.
        word_list: the words to choose from, with `settings.word_list`.

    Returns:
        One hypothesis for each recording, [B].

    Raises:
        CheckpointError: the model's outputs are NaN.
        ConfigError: `settings.word_list` without words; a head that the model does not have.
        TokenizerError: a listed word that the tokenizer cannot write.
    """
    with torch.no_grad():
        encoded, encoded_lengths = model.encode(features, lengths)
    return decode_encoded(model, encoded, encoded_lengths, settings, tokenizer, word_list)


def hear(
    recogniser: LoadedRecogniser, path: Path, config: DecodeConfig, word_list: Sequence[str] | None = None
) -> Hypothesis:
    """Recognises one audio file.

    Raises:
        CorpusError: it cannot be read. Otherwise as `decode`.
    """
    waveform = read_audio(path, recogniser.student.front_end.sample_rate)
    device = next(recogniser.student.parameters()).device
    with torch.inference_mode():
        samples = torch.tensor([len(waveform)], device=device)
        features, lengths = recogniser.student.front_end(torch.from_numpy(waveform)[None].to(device), samples)
        features = features[:, : int(lengths[0])]
        return decode(recogniser.student, features, lengths, config, recogniser.tokenizer, word_list)[0]


@torch.no_grad()
def decode_encoded(
    model: Recogniser,
    encoded: Tensor,
    lengths: Tensor,
    settings: DecodeConfig,
    tokenizer: Tokenizer,
    word_list: Iterable[str] | None = None,
) -> list[Hypothesis]:
    """`decode` for encoder outputs [B, T, D] with valid frames [B], where they are kept."""
    if model.training:
        raise ValueError("decoding with dropout gives other words every time: call model.eval() first")
    if settings.word_list:
        return _choose_words(model, encoded, lengths, settings, tokenizer, word_list)
    _need(model, ctc=settings.mode == "ctc", decoder=settings.mode == "decoder")
    if settings.mode == "ctc":
        log_probs = _log_probs(model.ctc_logits(encoded))
        if settings.beam == 1:
            found = ctc_greedy(log_probs, lengths, tokenizer.blank)
        else:
            found = ctc_beam(log_probs, lengths, tokenizer.blank, settings.beam)
    elif settings.beam == 1:
        found = decoder_greedy(model, encoded, lengths, tokenizer, settings.max_length)
    else:
        found = decoder_beam(model, encoded, lengths, tokenizer, settings.max_length, settings.beam)
    return [Hypothesis(tokens, tokenizer.decode(tokens), score) for tokens, score in found]


def _choose_words(
    model: Recogniser,
    encoded: Tensor,
    lengths: Tensor,
    settings: DecodeConfig,
    tokenizer: Tokenizer,
    word_list: Iterable[str] | None,
) -> list[Hypothesis]:
    """The best listed word of each recording; none (an empty text) where no listed word fits into the recording."""
    words = sorted({normalise(word, tokenizer.normaliser) for word in word_list or ()})
    if not words:
        raise ConfigError("Word-list decoding has no words.", "Give the words with --word-list, one a line.")
    tokenizer.self_test(words)
    tokens = [tuple(tokenizer.encode(word)) for word in words]
    scores, best = word_list_scores(model, encoded, lengths, tokens, settings.ctc_weight, tokenizer).max(dim=1)
    return [
        Hypothesis(tokens[i], words[i], score) if score > -torch.inf else Hypothesis((), "", score)
        for i, score in zip(best.tolist(), scores.tolist(), strict=True)
    ]


def check_max_length(texts: Iterable[str], tokenizer: Tokenizer, max_length: int) -> None:
    """Refuses a `max_length` that the decoder cannot write some prompt with; </s> is not counted.

    Raises:
        TokenizerError: naming the longest prompt, its number of tokens and how many prompts are too long.
    """
    needed = {text: len(tokenizer.encode(text)) for text in texts}
    too_long = [text for text, tokens in needed.items() if tokens > max_length]
    if too_long:
        longest = max(too_long, key=lambda text: (needed[text], text))
        raise TokenizerError(
            f"Prompt '{longest}' has {needed[longest]} tokens but max_length is {max_length}: "
            f"{len(too_long)} of {len(needed)} prompts could never be right.",
            f"Use --max-length {needed[longest]} or more.",
        )
