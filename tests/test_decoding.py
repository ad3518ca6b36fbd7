from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from exported_model import random_student
from xded.config import DecodeConfig, ModelConfig
from xded.decoding import (
    check_max_length,
    ctc_beam,
    ctc_greedy,
    decode,
    decode_encoded,
    decoder_beam,
    decoder_greedy,
    word_list_scores,
)
from xded.errors import CheckpointError, ConfigError, TokenizerError
from xded.features import valid_mask
from xded.models.student import Student
from xded.models.token_tree import TokenTree
from xded.tokenizer import Tokenizer

WORDS = ["ABBA", "BAD", "CAB", "DAD", "A", "DECADE"]


def letters_first(count: int) -> Tokenizer:
    """So many letters and behind them blank, <s>, </s>, <unk>, as NeMo has its blank last."""
    return Tokenizer(json.dumps([chr(65 + i) for i in range(count)]).encode(), "upper")


def specials_first(count: int) -> Tokenizer:
    """<unk> and blank 0, <s> 1, </s> 2, and so many letters."""
    return Tokenizer.train([chr(65 + i) for i in range(count)], "char", 64, "upper")


def shared_end(count: int) -> Tokenizer:
    """The blank first, one id for <s> and </s>, as WeNet and ESPnet write their lists."""
    letters = [chr(65 + i) for i in range(count)]
    return Tokenizer(json.dumps(["<blank>", "<unk>", *letters, "<sos/eos>"]).encode(), "upper")


LAYOUTS = [specials_first, letters_first, shared_end]
MODES = [
    DecodeConfig(mode="ctc"),
    DecodeConfig(mode="ctc", beam=4),
    DecodeConfig(mode="decoder", max_length=6),
    DecodeConfig(mode="decoder", beam=3, max_length=6),
    DecodeConfig(word_list=True),
    DecodeConfig(word_list=True, ctc_weight=0.0),
    DecodeConfig(word_list=True, ctc_weight=1.0),
]


class Fake:
    """The methods of a student, with random tables: every output depends on the whole prefix and recording."""

    def __init__(self, vocabulary: int, seed: int = 0, *, has_ctc: bool = True, has_decoder: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.training = False
        self.has_ctc, self.has_decoder = has_ctc, has_decoder
        self.table = 2 * torch.randn(vocabulary, vocabulary, generator=generator)

    def encode(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return features, lengths

    def ctc_logits(self, encoded: Tensor) -> Tensor:
        return encoded

    def decoder_logits(
        self, tokens: Tensor, encoded: Tensor, encoded_lengths: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        heard = encoded.masked_fill(~valid_mask(encoded_lengths, encoded.shape[1])[:, :, None], 0).sum(1)
        if seen is None:
            seen = torch.ones(2 * tokens.shape[1:]).tril()
        history = seen.float() @ (self.table[tokens] * seen.sum(1)[:, None])
        return (heard[:, None] + history).sin() * 3


def noise(*shape: int, seed: int = 0, scale: float = 1.5) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def collapse(path: tuple[int, ...], blank: int) -> tuple[int, ...]:
    return tuple(token for token, _ in itertools.groupby(path) if token != blank)


def all_texts(log_probs: Tensor, blank: int) -> dict[tuple[int, ...], float]:
    """Log-probability of every text, by adding up every path: [T, V]."""
    frames, vocabulary = log_probs.shape
    texts: dict[tuple[int, ...], float] = defaultdict(lambda: -np.inf)
    for path in itertools.product(range(vocabulary), repeat=frames):
        score = sum(float(log_probs[t, v]) for t, v in enumerate(path))
        text = collapse(path, blank)
        texts[text] = float(np.logaddexp(texts[text], score))
    return texts


def plain_prefix_beam(log_probs: np.ndarray, blank: int, beam: int) -> tuple[tuple[int, ...], float]:
    """Hannun et al. 2014, algorithm 1, word for word and slow."""
    kept: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -np.inf)}
    for frame in log_probs:
        following: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [-np.inf, -np.inf])
        for prefix, (in_blank, in_label) in kept.items():
            both = np.logaddexp(in_blank, in_label)
            for v, p in enumerate(frame):
                if v == blank:
                    following[prefix][0] = np.logaddexp(following[prefix][0], both + p)
                elif prefix and v == prefix[-1]:
                    following[prefix][1] = np.logaddexp(following[prefix][1], in_label + p)
                    following[(*prefix, v)][1] = np.logaddexp(following[(*prefix, v)][1], in_blank + p)
                else:
                    following[(*prefix, v)][1] = np.logaddexp(following[(*prefix, v)][1], both + p)
        ranked = sorted(following.items(), key=lambda item: -np.logaddexp(*item[1]))
        kept = {prefix: (scores[0], scores[1]) for prefix, scores in ranked[:beam]}
    best, scores = max(kept.items(), key=lambda item: np.logaddexp(*item[1]))
    return best, float(np.logaddexp(*scores))


def test_ctc_greedy_merges_repeats_drops_blanks_and_ignores_padding() -> None:
    paths = torch.tensor([[3, 3, 0, 3, 4, 0], [0, 0, 5, 5, 5, 6]])
    log_probs = torch.nn.functional.one_hot(paths, 7).float().mul(9).log_softmax(2)
    found = ctc_greedy(log_probs, torch.tensor([6, 4]), blank=0)
    assert [tokens for tokens, _ in found] == [(3, 3, 4), (5,)]
    assert found[1][1] == pytest.approx(4 * float(log_probs.max()), rel=1e-3)
    assert ctc_greedy(log_probs, torch.tensor([6, 2]), blank=3)[0][0] == (0, 4, 0)


@pytest.mark.parametrize("seed", range(8))
def test_ctc_beam_finds_the_most_probable_text_of_all_paths(seed: int) -> None:
    blank = seed % 3
    log_probs = noise(3, 5, 3, seed=seed).log_softmax(2)
    lengths = torch.tensor([5, 4, 1])
    for row, (tokens, score) in enumerate(ctc_beam(log_probs, lengths, blank, beam=200)):
        texts = all_texts(log_probs[row, : lengths[row]], blank)
        best = max(texts, key=lambda text: texts[text])
        assert tokens == best
        assert score == pytest.approx(texts[best], abs=1e-6)


@pytest.mark.parametrize("beam", [2, 3, 5])
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_ctc_beam_equals_the_plain_algorithm_at_any_width(beam: int, scale: float) -> None:
    """Guards the shortcut that looks at few tokens of each frame only."""
    log_probs = noise(12, 15, 20, seed=beam, scale=scale).log_softmax(2)
    found = ctc_beam(log_probs, torch.full((12,), 15), 0, beam)
    for row in range(12):
        tokens, score = plain_prefix_beam(log_probs[row].double().numpy(), 0, beam)
        assert found[row][0] == tokens
        assert found[row][1] == pytest.approx(score, abs=1e-9)


def test_ctc_beam_finds_a_text_that_greedy_misses() -> None:
    log_probs = torch.tensor([[[0.6, 0.4], [0.6, 0.4]]]).log()  # blank blank 0.36; the label in any way 0.64
    assert ctc_greedy(log_probs, torch.tensor([2]), blank=0)[0][0] == ()
    tokens, score = ctc_beam(log_probs, torch.tensor([2]), 0, beam=2)[0]
    assert tokens == (1,)
    assert score == pytest.approx(np.log(0.64), abs=1e-6)


def sentence_score(model: Fake, encoded: Tensor, length: int, tokens: tuple[int, ...], tokenizer: Tokenizer) -> float:
    inputs = torch.tensor([[tokenizer.bos, *tokens]])
    log_probs = model.decoder_logits(inputs, encoded[None], torch.tensor([length]))[0].log_softmax(1)
    return float(sum(log_probs[u, token] for u, token in enumerate((*tokens, tokenizer.eos))))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(4))
def test_decoder_beam_finds_the_best_of_all_texts(seed: int, layout: Callable[[int], Tokenizer]) -> None:
    tokenizer = layout(3)
    size = tokenizer.size
    model, encoded, lengths = Fake(size, seed), noise(4, 3, size, seed=seed), torch.tensor([3, 1, 2, 3])
    letters = [tokenizer.pieces.index(letter) for letter in "ABC"]
    texts = [t for n in range(4) for t in itertools.product(letters, repeat=n)]
    found = decoder_beam(model, encoded, lengths, tokenizer, max_length=3, beam=40)
    narrow = decoder_beam(model, encoded, lengths, tokenizer, max_length=3, beam=2)
    for row, (tokens, score) in enumerate(found):
        scores = {text: sentence_score(model, encoded[row], int(lengths[row]), text, tokenizer) for text in texts}
        assert tokens == max(scores, key=lambda text: scores[text])
        assert score == pytest.approx(scores[tokens], abs=1e-4)
        assert narrow[row][1] == pytest.approx(scores[narrow[row][0]], abs=1e-4)
        assert narrow[row][1] <= score + 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("max_length", [1, 2, 5])
def test_decoder_greedy_takes_the_best_step_and_stops(max_length: int, layout: Callable[[int], Tokenizer]) -> None:
    tokenizer = layout(4)
    model, encoded, lengths = Fake(tokenizer.size), noise(20, 4, tokenizer.size), torch.full((20,), 4)
    found = decoder_greedy(model, encoded, lengths, tokenizer, max_length)
    assert len({len(tokens) for tokens, _ in found}) > 1  # rows end at different steps
    for row, (tokens, score) in enumerate(found):
        wanted: list[int] = []
        while len(wanted) < max_length:
            inputs = torch.tensor([[tokenizer.bos, *wanted]])
            last = model.decoder_logits(inputs, encoded[row : row + 1], lengths[:1])[0, -1]
            last[[i for i in (tokenizer.unk, tokenizer.blank, tokenizer.bos) if i != tokenizer.eos]] = -torch.inf
            if int(last.argmax()) == tokenizer.eos:
                break
            wanted.append(int(last.argmax()))
        assert tokens == tuple(wanted)
        assert score == pytest.approx(sentence_score(model, encoded[row], 4, tokens, tokenizer), abs=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_word_list_scores_equal_both_heads_by_hand(layout: Callable[[int], Tokenizer]) -> None:
    tokenizer = layout(3)
    size = tokenizer.size
    model, encoded, lengths = Fake(size), noise(3, 4, size), torch.tensor([4, 2, 3])
    words = [tuple(tokenizer.encode(word)) for word in ("A", "BB", "ACB", "CABB")]
    ctc = word_list_scores(model, encoded, lengths, words, 1.0, tokenizer)
    decoder = word_list_scores(model, encoded, lengths, words, 0.0, tokenizer)
    for row, length in enumerate(lengths.tolist()):
        texts = all_texts(encoded[row, :length].log_softmax(1), tokenizer.blank)
        assert ctc[row].tolist() == pytest.approx([texts.get(w, -np.inf) for w in words], abs=1e-5)
        by_hand = [sentence_score(model, encoded[row], length, word, tokenizer) for word in words]
        assert decoder[row].tolist() == pytest.approx(by_hand, abs=1e-5)
    assert ctc[1, 1] == -torch.inf  # a repeated token needs a blank between: three frames
    assert decoder.isfinite().all()
    both = word_list_scores(model, encoded, lengths, words, 0.3, tokenizer)
    torch.testing.assert_close(both, 0.3 * ctc + 0.7 * decoder)


def test_long_word_lists_are_scored_in_parts() -> None:
    model, encoded, tokenizer = Fake(9), noise(1, 5, 9), specials_first(6)
    words = [tuple(w) for n in (1, 2, 3) for w in itertools.product(range(3, 9), repeat=n)]
    assert len(words) == 258
    together = word_list_scores(model, encoded, torch.tensor([5]), words, 0.5, tokenizer)
    alone = [word_list_scores(model, encoded, torch.tensor([5]), [word], 0.5, tokenizer).item() for word in words]
    assert together[0].tolist() == pytest.approx(alone, abs=1e-5)


def test_a_beginning_that_words_share_is_read_once() -> None:
    tree = TokenTree.of([(5, 6), (5,), (5, 6, 7), (8, 6), (5, 6)], bos=1)
    assert tree.tokens.tolist() == [1, 5, 6, 7, 8, 6]
    assert tree.parents.tolist() == [0, 1, 2, 0, 4]
    assert tree.ends.tolist() == [2, 1, 3, 5, 2]
    ways = [set(np.flatnonzero(row)) for row in tree.seen.numpy()]
    assert ways == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 4}, {0, 4, 5}]


class Plain:
    """A student of which decoding does not know that it is one: prefixes are read whole at every step."""

    training, has_ctc, has_decoder = False, True, True

    def __init__(self, student: Student) -> None:
        self.encode, self.ctc_logits, self.decoder_logits = student.encode, student.ctc_logits, student.decoder_logits


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_what_is_kept_of_the_prefixes_changes_no_text(seed: int) -> None:
    """Greedy and beam search of a student's cached steps against its whole decoder at every step."""
    tokenizer = specials_first(9)
    student = random_student(tokenizer.size, seed, decoder_layers=3)
    student.decoder_head.weight *= 4  # sure of itself: long texts
    encoded, lengths = noise(7, 11, student.encoder.width, seed=seed), torch.tensor([11, 1, 4, 9, 11, 6, 2])
    greedy, plain = (decoder_greedy(m, encoded, lengths, tokenizer, 8) for m in (student, Plain(student)))
    assert [tokens for tokens, _ in greedy] == [tokens for tokens, _ in plain]
    assert [score for _, score in greedy] == pytest.approx([score for _, score in plain], abs=1e-4)
    for beam in (2, 5):
        kept, plain = (decoder_beam(m, encoded, lengths, tokenizer, 8, beam) for m in (student, Plain(student)))
        assert [tokens for tokens, _ in kept] == [tokens for tokens, _ in plain]
        assert [score for _, score in kept] == pytest.approx([score for _, score in plain], abs=1e-4)
        assert len({tokens for tokens, _ in kept}) > 2
        assert max(len(tokens) for tokens, _ in kept) > 3


@torch.no_grad()
def test_a_word_list_is_scored_as_every_word_by_itself() -> None:
    """By the whole decoder on one padded row a word, as in training."""
    tokenizer = specials_first(6)
    student = random_student(tokenizer.size)
    encoded, lengths = noise(3, 9, student.encoder.width), torch.tensor([9, 5, 7])
    words = [w for n in (1, 2, 3) for w in itertools.product(range(3, 9), repeat=n)] + [(3, 3), (4, 5, 6, 7, 8)]
    scores = word_list_scores(student, encoded, lengths, words, 0.0, tokenizer)
    rows = [torch.tensor([tokenizer.bos, *word, tokenizer.eos]) for word in words]
    texts = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.eos)  # [W, U + 2]
    counted = valid_mask(torch.tensor([len(word) + 1 for word in words]), texts.shape[1] - 1)
    for row in range(3):
        heard = encoded[row : row + 1].expand(len(words), -1, -1)
        logits = student.decoder_logits(texts[:, :-1], heard, lengths[row].expand(len(words)))
        steps = logits.log_softmax(2).gather(2, texts[:, 1:, None])[:, :, 0]
        wanted = steps.masked_fill(~counted, 0).sum(1)
        assert wanted.std() > 1
        torch.testing.assert_close(scores[row].float(), wanted, atol=1e-4, rtol=0)


LENGTHS = torch.tensor([120, 64, 97, 45, 80])  # frames of five made-up recordings
FEATURES = (noise(5, 120, 80, scale=0.5) + noise(5, 1, 80, seed=1)).masked_fill(
    ~valid_mask(LENGTHS, 120)[:, :, None], 0
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(WORDS, "char", 64, "upper")


@pytest.fixture(scope="module")
def student(tokenizer: Tokenizer) -> Student:
    """A real student that has learnt to hear WORDS[:5] in the five recordings."""
    torch.manual_seed(0)
    model = Student(ModelConfig(size="micro", dropout=0.0), tokenizer.size).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [torch.tensor([tokenizer.bos, *tokenizer.encode(word), tokenizer.eos]) for word in WORDS[:5]]
    texts = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.eos)
    for _ in range(70):
        encoded, lengths = model.encode(FEATURES, LENGTHS)
        logits = model.decoder_logits(texts[:, :-1], encoded, lengths)
        ctc = model.ctc_logits(encoded).log_softmax(2).transpose(0, 1)
        spoken = torch.tensor([len(row) - 2 for row in rows])
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), texts[:, 1:])
        loss = loss + torch.nn.functional.ctc_loss(ctc, texts[:, 1:-1], lengths, spoken)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_a_real_student_decodes_batches_as_it_decodes_one_by_one(
    settings: DecodeConfig, tokenizer: Tokenizer, student: Student
) -> None:
    together = decode(student, FEATURES, LENGTHS, settings, tokenizer, WORDS)
    reverse = decode(student, FEATURES.flip(0), LENGTHS.flip(0), settings, tokenizer, WORDS)[::-1]
    alone = [
        decode(student, FEATURES[i : i + 1, :n], LENGTHS[i : i + 1], settings, tokenizer, WORDS)[0]
        for i, n in enumerate(LENGTHS.tolist())
    ]
    for others in (reverse, alone):
        assert [(h.tokens, h.text) for h in others] == [(h.tokens, h.text) for h in together]
        assert [h.score for h in others] == pytest.approx([h.score for h in together], abs=1e-3)
    assert len({h.text for h in together}) > 2
    assert all(tokenizer.decode(h.tokens) == h.text for h in together)


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_rows_of_a_batch_never_influence_each_other(settings: DecodeConfig, tokenizer: Tokenizer) -> None:
    model, lengths = Fake(tokenizer.size), torch.randint(1, 9, (30,), generator=torch.Generator().manual_seed(1))
    features = noise(30, 12, tokenizer.size)
    features[~valid_mask(lengths, 12)] = 50.0  # padding that would win everywhere if it were read
    together = decode(model, features, lengths, settings, tokenizer, WORDS)
    for i, n in enumerate(lengths.tolist()):
        alone = decode(model, features[i : i + 1, :n], lengths[i : i + 1], settings, tokenizer, WORDS)[0]
        assert (alone.tokens, alone.text) == (together[i].tokens, together[i].text)


def test_a_recording_too_short_for_every_word_gives_an_empty_text(tokenizer: Tokenizer) -> None:
    model, features = Fake(tokenizer.size), noise(2, 6, tokenizer.size)
    words = ["ABBA", "DECADE"]
    short, enough = decode(model, features, torch.tensor([3, 6]), DecodeConfig(word_list=True), tokenizer, words)
    assert (short.tokens, short.text, short.score) == ((), "", -float("inf"))
    assert enough.text in words


def test_what_cannot_be_decoded_is_refused(tokenizer: Tokenizer) -> None:
    model, features, lengths = Fake(tokenizer.size), noise(1, 6, tokenizer.size), torch.tensor([6])
    closed = DecodeConfig(word_list=True)
    with pytest.raises(ConfigError, match="no words"):
        decode(model, features, lengths, closed, tokenizer)
    with pytest.raises(TokenizerError, match=r"'ZOO' \(<unk> for O Z\)"):
        decode(model, features, lengths, closed, tokenizer, ["CAB", "ZOO"])
    for settings in MODES:
        for last in (0, -1):  # of the pieces: one NaN is enough
            damaged = features.clone()
            damaged[0, 2, last] = torch.nan
            with pytest.raises(CheckpointError, match="NaN"):
                decode_encoded(model, damaged, lengths, settings, tokenizer, WORDS)
    model.training = True
    with pytest.raises(ValueError, match="eval"):
        decode(model, features, lengths, DecodeConfig(), tokenizer)


ONE_HEAD = [
    ({"has_decoder": False}, [MODES[0], MODES[1], MODES[6]], [MODES[2], MODES[3], MODES[4]]),
    ({"has_ctc": False}, [MODES[2], MODES[3], MODES[5]], [MODES[0], MODES[1], MODES[4]]),
]


@pytest.mark.parametrize(("heads", "works", "refused"), ONE_HEAD)
def test_a_recogniser_with_one_head_uses_that_one(
    heads: dict[str, bool], works: list[DecodeConfig], refused: list[DecodeConfig]
) -> None:
    tokenizer = letters_first(5)
    model, whole = Fake(tokenizer.size, **heads), Fake(tokenizer.size)
    features, lengths = noise(4, 12, tokenizer.size), torch.tensor([12, 7, 9, 12])
    for settings in works:
        found = decode(model, features, lengths, settings, tokenizer, WORDS)
        assert found == decode(whole, features, lengths, settings, tokenizer, WORDS)
    missing, mode, weight = ("attention decoder", "ctc", 1) if "has_decoder" in heads else ("CTC head", "decoder", 0)
    for settings in refused:
        remedy = f"--set decode.ctc_weight={weight}" if settings.word_list else f"--set decode.mode={mode}"
        with pytest.raises(ConfigError, match=f"has no {missing}.*{remedy}"):
            decode(model, features, lengths, settings, tokenizer, WORDS)


def test_ctc_with_the_blank_last_reads_the_letter_of_row_0() -> None:
    """The study read ids one too low; a blank at V must neither shift ids nor swallow the first piece."""
    tokenizer = letters_first(4)
    path = torch.tensor([[4, 0, 0, 4, 1, 1, 4, 1, 0, 4]])  # - A A - B B - B A -
    logits = 9.0 * torch.nn.functional.one_hot(path, tokenizer.size).float()
    for beam in (1, 4):
        settings = DecodeConfig(mode="ctc", beam=beam)
        (found,) = decode(Fake(tokenizer.size), logits, torch.tensor([10]), settings, tokenizer)
        assert (found.text, found.tokens) == ("ABBA", (0, 1, 1, 0))


def test_max_length_too_short_names_the_prompt(tokenizer: Tokenizer) -> None:
    check_max_length(WORDS, tokenizer, 6)  # </s> is not counted
    with pytest.raises(TokenizerError, match=r"'DECADE' has 6 tokens but max_length is 3: 2 of 6 .*--max-length 6"):
        check_max_length(WORDS, tokenizer, 3)


def test_the_decoder_can_write_a_prompt_of_max_length(tokenizer: Tokenizer) -> None:
    """max_length tokens and then </s>: what `check_max_length` promises."""
    wanted = tokenizer.encode("CAB")

    class Speller(Fake):
        def decoder_logits(self, tokens: Tensor, encoded: Tensor, encoded_lengths: Tensor) -> Tensor:
            script = torch.tensor([*wanted, tokenizer.eos])[: tokens.shape[1]].expand(len(tokens), -1)
            return torch.nn.functional.one_hot(script, tokenizer.size).float() * 20

    for beam in (1, 3):
        settings = DecodeConfig(mode="decoder", beam=beam, max_length=3)
        found = decode(Speller(tokenizer.size), noise(2, 4, tokenizer.size), torch.tensor([4, 2]), settings, tokenizer)
        assert [h.text for h in found] == ["CAB", "CAB"]
