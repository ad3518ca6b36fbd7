"""Text to token ids and back: one normalisation, one SentencePiece model, one self-test before anything is trained.

A token id is the row of the model's heads that stands for it: no offset is ever added or taken away. The CTC blank
shares id 0 with `<unk>`, which is why no prompt may need `<unk>`.
"""

from __future__ import annotations

import hashlib
import io
import json
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import sentencepiece

from xded.errors import TokenizerError

NORMALISERS: Final = ("upper", "lower", "upper_no_punctuation", "lower_no_punctuation")
KINDS: Final = ("char", "bpe", "unigram")
LISTED_FAILURES = 10  # words that an error names before it only counts


def normalise(text: str, normaliser: str) -> str:
    """The one place where a text is changed before it is encoded or compared.

    NFC, white space collapsed to single spaces, upper or lower case. `*_no_punctuation` also drops every character that
    is no letter, mark, digit, apostrophe or space (X-RAY becomes XRAY) and writes the typographic apostrophe as '.

    Raises:
        TokenizerError: for an unknown normaliser.
    """
    if normaliser not in NORMALISERS:
        raise TokenizerError(f"Unknown normaliser '{normaliser}'.", f"Use one of {', '.join(NORMALISERS)}.")
    text = unicodedata.normalize("NFC", text)
    text = text.upper() if normaliser.startswith("upper") else text.lower()
    text = unicodedata.normalize("NFC", text)  # changing case may leave a letter and its mark apart
    if normaliser.endswith("no_punctuation"):
        text = "".join(c for c in text.replace("\u2019", "'") if _is_spoken(c))
    return " ".join(text.split())


def _is_spoken(character: str) -> bool:
    """Letters (L), marks (M), digits (N), apostrophe and white space."""
    return character == "'" or character.isspace() or unicodedata.category(character)[0] in "LMN"


class Tokenizer:
    """A SentencePiece model together with the normaliser that goes before it.

    Args:
        model_bytes: the serialized SentencePiece model.
        normaliser: one of `NORMALISERS`.
        source: where the model came from, for errors.

    Raises:
        TokenizerError: bytes that are no SentencePiece model, special ids elsewhere than 0, 1, 2, unknown normaliser.
    """

    unk: Final = 0
    bos: Final = 1
    eos: Final = 2
    blank: Final = 0  # of CTC; shared with <unk>

    def __init__(self, model_bytes: bytes, normaliser: str, source: str = "the tokenizer") -> None:
        normalise("", normaliser)
        self._processor = _processor(model_bytes, source)
        _check_special_ids(self._processor, source)
        self.model_bytes = model_bytes
        self.normaliser = normaliser
        self.source = source
        size = self._processor.get_piece_size()
        self.pieces: tuple[str, ...] = tuple(self._processor.id_to_piece(i) for i in range(size))

    @property
    def size(self) -> int:
        """V, the number of pieces, special ones included."""
        return len(self.pieces)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the pieces in order, the special ids and the normaliser: equal means the same ids and texts."""
        identity = [list(self.pieces), [self.unk, self.bos, self.eos, self.blank], self.normaliser]
        return hashlib.sha256(json.dumps(identity, ensure_ascii=True).encode()).hexdigest()

    @classmethod
    def load(cls, path: Path, normaliser: str) -> Tokenizer:
        """Reads a SentencePiece model file.

        Raises:
            TokenizerError: missing or unreadable file, or see `Tokenizer`.
        """
        try:
            model_bytes = Path(path).read_bytes()
        except OSError as error:
            raise TokenizerError(
                f"{path}: the tokenizer cannot be read ({error.strerror}).",
                "Check the path given with --tokenizer, or leave it out to train a tokenizer on the prompts.",
            ) from error
        return cls(model_bytes, normaliser, str(path))

    @classmethod
    def from_bytes(cls, model_bytes: bytes, normaliser: str) -> Tokenizer:
        """The tokenizer of a checkpoint, which keeps `model_bytes` and `normaliser`."""
        return cls(model_bytes, normaliser, "the checkpoint's tokenizer")

    @classmethod
    def train(cls, texts: Iterable[str], kind: str, vocabulary: int, normaliser: str) -> Tokenizer:
        """Trains a SentencePiece model on the distinct normalised prompts; the same prompts give the same bytes.

        Args:
            texts: the prompts; their order and repetitions do not matter.
            kind: one of `KINDS`.
            vocabulary: upper bound of the number of pieces; a short word list gives fewer.
            normaliser: one of `NORMALISERS`.

        Raises:
            TokenizerError: no texts, a vocabulary too small for the characters, or prompts that fail the self-test.
        """
        texts = sorted(set(texts))
        if kind not in KINDS:
            raise TokenizerError(f"Unknown kind of tokenizer '{kind}'.", f"Use one of {', '.join(KINDS)}.")
        words = sorted({normalise(text, normaliser) for text in texts} - {""})
        if not words:
            raise TokenizerError("There is no prompt to train a tokenizer on.", "Check the texts of the manifest.")
        characters = {c for word in words for c in word} | ({" "} if kind != "char" else set())
        needed = 3 + len(characters)
        if needed > vocabulary:
            raise TokenizerError(
                f"A tokenizer of {vocabulary} pieces is too small: the characters of the prompts need {needed}.",
                f"Set tokenizer.vocabulary to {needed} or more.",
            )
        tokenizer = cls(_train(words, kind, vocabulary), normaliser, f"the trained {kind} tokenizer")
        tokenizer.self_test(texts)
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of the normalised text, without `bos` and `eos`."""
        ids: list[int] = self._processor.encode(normalise(text, self.normaliser))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; `bos`, `eos` and `blank` are dropped wherever they stand, no id is shifted.

        Raises:
            TokenizerError: for an id that the tokenizer does not have.
        """
        kept = [int(i) for i in ids if i not in (self.bos, self.eos, self.blank)]
        for i in kept:
            if not 0 <= i < self.size:
                raise TokenizerError(
                    f"Token id {i} is outside {self.source}, which has {self.size} pieces (0 to {self.size - 1}).",
                    "The model has another tokenizer: use the one in its checkpoint.",
                )
        text: str = self._processor.decode(kept)
        return text

    def self_test(self, texts: Iterable[str], head_size: int | None = None) -> None:
        """Encodes every text, decodes it and compares; run before any training and any evaluation.

        Args:
            texts: every prompt that will be trained or tested.
            head_size: V of the model's heads, when there is a model.

        Raises:
            TokenizerError: listing the words that cannot be written, or the two sizes that differ.
        """
        if head_size is not None and head_size != self.size:
            raise TokenizerError(
                f"{self.source} has {self.size} pieces but the model's heads have {head_size}.",
                "Use the tokenizer that the model was trained with; its checkpoint holds it.",
            )
        texts = sorted(set(texts))
        failures = _failures(self._processor, texts, self.normaliser)
        if not failures:
            return
        listed = "; ".join(failures[:LISTED_FAILURES])
        if len(failures) > LISTED_FAILURES:
            listed += f"; and {len(failures) - LISTED_FAILURES} more"
        others = [n for n in NORMALISERS if not _failures(self._processor, texts, n)]
        remedy = f"Use --set tokenizer.normaliser={others[0]}, which writes all of them, or" if others else "Use"
        raise TokenizerError(
            f"{self.source} with normaliser '{self.normaliser}' cannot write {len(failures)} of {len(texts)} texts: "
            f"{listed}.",
            f"{remedy} a tokenizer that has these characters (without --tokenizer one is trained on the prompts).",
        )


def _processor(model_bytes: bytes, source: str) -> sentencepiece.SentencePieceProcessor:
    """Parses a serialized model; anything else is refused."""
    problem = f"{source} is no SentencePiece model ({len(model_bytes)} bytes)."
    remedy = "Give a SentencePiece .model file (a Git LFS pointer must be fetched first)."
    if not model_bytes:
        raise TokenizerError(problem, remedy)
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    except RuntimeError as error:
        raise TokenizerError(problem, remedy) from error


def _check_special_ids(processor: sentencepiece.SentencePieceProcessor, source: str) -> None:
    """Refuses a model whose special ids are elsewhere, naming what was found."""
    found = {"unk": processor.unk_id(), "bos": processor.bos_id(), "eos": processor.eos_id()}
    wanted = {"unk": Tokenizer.unk, "bos": Tokenizer.bos, "eos": Tokenizer.eos}
    if found != wanted:
        listed = ", ".join(f"{name} {i}" + (" (none)" if i < 0 else "") for name, i in found.items())
        raise TokenizerError(
            f"{source} has its special ids at {listed}; expected unk 0, bos 1, eos 2.",
            "Train the SentencePiece model with --unk_id=0 --bos_id=1 --eos_id=2.",
        )


def _failures(processor: sentencepiece.SentencePieceProcessor, texts: Sequence[str], normaliser: str) -> list[str]:
    """One line for each text that does not come back from encoding and decoding."""
    failures = []
    for text in texts:
        wanted = normalise(text, normaliser)
        ids = processor.encode(wanted)
        got = processor.decode(ids)
        if not wanted:
            failures.append(f"'{text}' (nothing is left of it)")
        elif Tokenizer.unk in ids:
            lost = sorted({c for c in wanted if c != " " and Tokenizer.unk in processor.encode(c)})
            failures.append(f"'{text}' (<unk> for {' '.join(lost) or 'a character'})")
        elif got != wanted:
            failures.append(f"'{text}' (comes back as '{got}')")
    return failures


def _train(words: Sequence[str], kind: str, vocabulary: int) -> bytes:
    """The serialized SentencePiece model of the words."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words),
            model_writer=model,
            model_type=kind,
            vocab_size=vocabulary,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",  # `normalise` is the only normalisation
            # letters of a single word need no word-start token: it would cost every CTC path a step
            add_dummy_prefix=kind != "char",
            byte_fallback=False,
            unk_id=Tokenizer.unk,
            bos_id=Tokenizer.bos,
            eos_id=Tokenizer.eos,
            pad_id=-1,
            num_threads=1,  # the order of sums must not depend on the machine
            minloglevel=3,
        )
    except RuntimeError as error:
        raise TokenizerError(
            f"SentencePiece could not train a {kind} model of up to {vocabulary} pieces on {len(words)} prompts: "
            f"{error}.",
            "Set tokenizer.kind to char, or change tokenizer.vocabulary.",
        ) from error
    return model.getvalue()
