"""What turns text into pieces: a SentencePiece model, Hugging Face's `tokenizer.json`, a bare list of pieces.

Each has `pieces` (in the order of their ids), `known` (the special ids that it fixes itself), `encode`, which writes
`UNKNOWN` or its own <unk> for what it cannot write, and `decode`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final, Protocol

import sentencepiece

from xded.errors import TokenizerError, few, need_extra

UNKNOWN: Final = -1  # a character that no piece of a list stands for
SPACE: Final = "\u2581"  # SentencePiece's sign for a space
DELIMITERS: Final = ("|", "<space>", SPACE, " ")  # of wav2vec 2.0, ESPnet, SentencePiece's characters, NeMo
NAMES: Final = {  # of special pieces, in SentencePiece, Hugging Face, ESPnet, FunASR, WeNet and k2
    "unk": ("<unk>", "[UNK]", "<UNK>"),
    "blank": ("<blank>", "<blk>", "<pad>", "[PAD]"),
    "bos": ("<s>", "<sos>", "<bos>", "[CLS]", "<sos/eos>", "<|startoftranscript|>"),
    "eos": ("</s>", "<eos>", "[SEP]", "<sos/eos>", "<|endoftext|>"),
}
_SPECIAL: Final = frozenset(name for names in NAMES.values() for name in names)


READ: Final = (
    "Read are SentencePiece models (.model, SpeechBrain's .ckpt), Hugging Face's tokenizer.json and vocab.json, and "
    "lists of pieces (one a line with or without its id, a JSON list, or a single line of characters)."
)


class PieceModel(Protocol):
    """What a tokenizer needs of a format."""

    pieces: tuple[str, ...]
    known: dict[str, int]

    def encode(self, text: str) -> list[int]:
        """Ids of a normalised text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, among which are no special ones but <unk>."""
        ...


class SentencePiece:
    """A serialized SentencePiece model; SpeechBrain keeps the same bytes in a `.ckpt`."""

    def __init__(self, data: bytes, source: str) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise TokenizerError(
                f"{source} is no tokenizer: {len(data)} bytes that are neither text nor a whole SentencePiece model.",
                READ,
            ) from error
        processor = self._processor
        self.pieces = tuple(processor.id_to_piece(i) for i in range(processor.get_piece_size()))
        ids = {"unk": processor.unk_id(), "bos": processor.bos_id(), "eos": processor.eos_id()}
        self.known = {name: i for name, i in ids.items() if i >= 0}
        if self.known == {"unk": 0, "bos": 1, "eos": 2}:
            self.known["blank"] = 0  # as in SpeechBrain and the reference study: no prompt may need <unk>

    def encode(self, text: str) -> list[int]:
        """Ids as the model segments the text."""
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """As SentencePiece writes it; <unk> becomes U+2047."""
        text: str = self._processor.decode(list(ids))
        return text


class TokenizerJson:
    """Hugging Face's `tokenizer.json`; its own special tokens are not written into texts."""

    def __init__(self, data: bytes, source: str) -> None:
        library = need_extra("tokenizers", "transformers", "A tokenizer.json")
        try:
            self._tokenizer: Any = library.Tokenizer.from_str(data.decode("utf-8-sig"))
        except Exception as error:  # the library has no class of its own for it
            raise TokenizerError(
                f"{source} cannot be read as a tokenizer.json: {error}.",
                "Save it again with a newer transformers, or give the vocab.json beside it.",
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.pieces = in_order(self._tokenizer.get_vocab(with_added_tokens=True).items(), source)
        self.known: dict[str, int] = {}
        added = self._tokenizer.get_added_tokens_decoder()
        self._silent = {i for i, token in added.items() if token.special and token.content not in NAMES["unk"]}

    def encode(self, text: str) -> list[int]:
        """Ids without the special tokens that its template would add."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """As its own decoder writes it, without white space at the ends."""
        spoken = [i for i in ids if i not in self._silent]
        text: str = self._tokenizer.decode(spoken, skip_special_tokens=False)
        return text.strip()


class PieceList:
    """A list of pieces (or characters) without a model: text is cut greedily, the longest piece first.

    A list does not say how the tokenizer that it came from cuts words; where there is a SentencePiece model or a
    tokenizer.json beside it, that one gives the ids which its recogniser was trained with.

    Words: where pieces of several characters begin with U+2581, every word begins with it, as in SentencePiece;
    otherwise the first of "|", "<space>", U+2581 and " " that is a piece stands for the space between words.
    """

    def __init__(self, pieces: tuple[str, ...], source: str) -> None:
        _refuse_marked(pieces, source)
        self.pieces = pieces
        self.known: dict[str, int] = {}
        self._ids = {piece: i for i, piece in enumerate(pieces) if piece not in _SPECIAL}
        self._word_starts = any(piece.startswith(SPACE) and len(piece) > 1 for piece in pieces)
        delimiter = next((d for d in DELIMITERS if d in self._ids), None)
        self._delimiter = None if self._word_starts or delimiter is None else self._ids.pop(delimiter)
        if self._delimiter is not None:
            self._ids[" "] = self._delimiter
        self._longest = max((len(piece) for piece in self._ids), default=1)

    def encode(self, text: str) -> list[int]:
        """The longest piece at each place; `UNKNOWN` for a character that begins none."""
        if self._word_starts and text:
            text = SPACE + text.replace(" ", SPACE)
        ids, place = [], 0
        while place < len(text):
            ends = range(min(len(text), place + self._longest), place, -1)
            end = next((end for end in ends if text[place:end] in self._ids), None)
            ids.append(UNKNOWN if end is None else self._ids[text[place:end]])
            place = place + 1 if end is None else end
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Pieces joined, with single spaces between words."""
        text = "".join(" " if i == self._delimiter else self.pieces[i] for i in ids)
        return " ".join((text.replace(SPACE, " ") if self._word_starts else text).split())


def _refuse_marked(pieces: Sequence[str], source: str) -> None:
    """Lists whose pieces are no plain text: joined they would give other words than they stand for."""
    if set(map(chr, range(0x100, 0x144))) <= set(pieces):  # how GPT-2 writes bytes
        marks = "of a byte-level BPE"
    elif any(piece.startswith("##") and len(piece) > 2 for piece in pieces):
        marks = "of WordPiece ('##')"
    elif any(piece.endswith("@@") and len(piece) > 2 for piece in pieces):
        marks = "of subword-nmt ('@@')"
    else:
        return
    raise TokenizerError(
        f"{source} lists the pieces {marks}, which do not say how a word is cut.",
        "Give the tokenizer.json or the SentencePiece model that lies beside it.",
    )


def in_order(ids: Iterable[tuple[str, int]], source: str) -> tuple[str, ...]:
    """Pieces by id, from pairs (piece, id).

    Raises:
        TokenizerError: a piece or an id twice, an empty piece, ids that are not 0 to V - 1.
    """
    pairs = sorted(ids, key=lambda pair: pair[1])
    pieces = tuple(piece for piece, _ in pairs)
    refuse_repeated(pieces, source)
    if not pieces or "" in pieces:
        raise TokenizerError(
            f"{source} has {'an empty piece' if pieces else 'no pieces'}.", "Give the whole list of pieces."
        )
    wrong = next((place for place, (_, i) in enumerate(pairs) if i != place), None)
    if wrong is not None:
        raise TokenizerError(
            f"{source} has {len(pairs)} pieces but its ids are not 0 to {len(pairs) - 1}: id {wrong} is missing, "
            f"'{pairs[wrong][0]}' has {pairs[wrong][1]}.",
            "A token id is a row of the model's heads: give the whole vocabulary, the special pieces too.",
        )
    return pieces


def refuse_repeated(pieces: Iterable[str], source: str) -> None:
    """Pieces that are listed twice, and so have two ids.

    Raises:
        TokenizerError: naming them.
    """
    twice = [repr(piece) for piece, count in Counter(pieces).items() if count > 1]
    if twice:
        raise TokenizerError(
            f"{source} lists pieces more than once: {few(twice)}.",
            "Each piece is one id: fetch the file again, or mend the copy.",
        )
