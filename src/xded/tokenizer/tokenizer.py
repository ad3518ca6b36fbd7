"""The tokenizer of a recogniser: a format, its special ids, and the normaliser before it."""

from __future__ import annotations

import copy
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import sentencepiece

from xded.errors import TokenizerError
from xded.tokenizer.formats import kind_of, model_of
from xded.tokenizer.models import NAMES, UNKNOWN
from xded.tokenizer.normaliser import NORMALISERS, normalise

KINDS: Final = ("char", "bpe", "unigram")  # that can be trained
LISTED_FAILURES = 10  # words that an error names before it only counts


class Tokenizer:
    """Pieces, special ids and the normaliser that goes before them.

    Special ids (`unk`, `bos`, `eos` and `blank`, that of CTC) come from the file:

    * a SentencePiece model with `<unk>` 0, `<s>` 1, `</s>` 2: the blank shares id 0 with `<unk>`, as in SpeechBrain,
      which is why no prompt may need `<unk>`;
    * any other SentencePiece model: the ids that it states; the rest by name;
    * `tokenizer.json`, `vocab.json` and lists: by name (`models.NAMES`; `<pad>` is the blank where nothing else is);
    * what is missing is appended behind the last piece, in the order `<blank>`, `<s>`, `</s>`, `<unk>`. For a NeMo
      tokenizer of V pieces without start and end this makes the blank V, as in its CTC head of V + 1 rows.

    Attributes:
        kind: "sentencepiece", "tokenizer.json" or "pieces".
        pieces: in the order of their ids, appended ones included.
        appended: how many of them the file does not have; a head made for the file alone has no rows for these, but
            for the blank of a CTC head.
        model_bytes: the file; with `kind` and `normaliser` it gives the same tokenizer again.

    Args:
        model_bytes: content of a file in one of the formats.
        normaliser: one of `NORMALISERS`.
        source: where they came from, for errors.
        kind: none: told by content.

    Raises:
        TokenizerError: bytes that are no tokenizer, special ids that collide, unknown normaliser.
    """

    def __init__(
        self, model_bytes: bytes, normaliser: str, source: str = "the tokenizer", kind: str | None = None
    ) -> None:
        normalise("", normaliser)
        self.kind = kind or kind_of(model_bytes, source)
        self._model = model_of(self.kind, model_bytes, source)
        self.model_bytes = model_bytes
        self.normaliser = normaliser
        self.source = source
        special, appended = _special_ids(self._model.pieces, self._model.known, source)
        self.unk, self.bos, self.eos, self.blank = (special[name] for name in ("unk", "bos", "eos", "blank"))
        self.pieces: tuple[str, ...] = (*self._model.pieces, *appended)
        self.appended = len(appended)

    @property
    def size(self) -> int:
        """V, the number of pieces, special ones included."""
        return len(self.pieces)

    @property
    def unwritten(self) -> tuple[int, ...]:
        """Ids that no text holds and that an attention decoder may not write, `eos` not among them."""
        return tuple(sorted({self.unk, self.bos, self.blank} - {self.eos}))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the pieces in order, the special ids and the normaliser: equal means that ids mean the same.

        How words are cut is not in it: a SentencePiece model and the list of its pieces can be read in each other's
        place, though they may write a word with other pieces.
        """
        identity = [list(self.pieces), [self.unk, self.bos, self.eos, self.blank], self.normaliser]
        return hashlib.sha256(json.dumps(identity, ensure_ascii=True).encode()).hexdigest()

    @classmethod
    def load(cls, path: Path, normaliser: str) -> Tokenizer:
        """Reads a file in any of the formats, told apart by content.

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
    def from_bytes(cls, model_bytes: bytes, normaliser: str, kind: str = "sentencepiece") -> Tokenizer:
        """The tokenizer of a checkpoint, which keeps `model_bytes`, `kind` and `normaliser`."""
        return cls(model_bytes, normaliser, "the checkpoint's tokenizer", kind)

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
        tokenizer = cls(_train(words, kind, vocabulary), normaliser, f"the trained {kind} tokenizer", "sentencepiece")
        tokenizer.self_test(texts)
        return tokenizer

    def with_normaliser(self, normaliser: str) -> Tokenizer:
        """The same pieces behind another normaliser."""
        normalise("", normaliser)
        other = copy.copy(self)
        other.normaliser = normaliser
        return other

    def encode(self, text: str) -> list[int]:
        """Token ids of the normalised text, without `bos` and `eos`."""
        return [self.unk if i == UNKNOWN else i for i in self._model.encode(normalise(text, self.normaliser))]

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
        known = len(self._model.pieces)
        if all(i < known for i in kept):
            return self._model.decode(kept)
        # an appended <unk>, of which the format knows nothing, parts what stands around it
        parts: list[list[int]] = [[]]
        for i in kept:
            if i < known:
                parts[-1].append(i)
            else:
                parts.append([])
        return self.pieces[self.unk].join(self._model.decode(part) for part in parts)

    def unspellable(self, texts: Iterable[str]) -> dict[str, str]:
        """Texts that do not come back from encoding and decoding, and why: no output can ever equal them."""
        failures = {}
        for text in sorted(set(texts)):
            wanted = normalise(text, self.normaliser)
            ids = self.encode(wanted)
            if not wanted:
                failures[text] = "nothing is left of it"
            elif self.unk in ids:
                lost = sorted({c for c in wanted if c != " " and self.unk in self.encode(c)})
                failures[text] = f"<unk> for {' '.join(lost) or 'a character'}"
            elif (got := self.decode(ids)) != wanted:
                failures[text] = f"comes back as '{got}'"
        return failures

    def normalisers_for(self, texts: Iterable[str]) -> list[str]:
        """The normalisers with which every text can be written."""
        texts = set(texts)
        return [name for name in NORMALISERS if not self.with_normaliser(name).unspellable(texts)]

    def self_test(self, texts: Iterable[str], head_size: int | None = None) -> None:
        """Encodes every text, decodes it and compares; run before any training and any evaluation.

        Args:
            texts: every prompt that will be trained or tested, as often as it will be.
            head_size: V of the model's heads, when there is a model.

        Raises:
            TokenizerError: listing the words that cannot be written and the best WRA that they leave, or the two sizes
                that differ.
        """
        if head_size is not None and head_size != self.size:
            raise TokenizerError(
                f"{self.source} has {self.size} pieces but the model's heads have {head_size}.",
                "Use the tokenizer that the model was trained with; its checkpoint holds it.",
            )
        texts = list(texts)
        failures = self.unspellable(texts)
        if not failures:
            return
        distinct = set(texts)
        listed = "; ".join(f"'{text}' ({why})" for text, why in list(failures.items())[:LISTED_FAILURES])
        if len(failures) > LISTED_FAILURES:
            listed += f"; and {len(failures) - LISTED_FAILURES} more"
        best = 100 * sum(text not in failures for text in texts) / len(texts)
        others = self.normalisers_for(distinct)
        remedy = f"Use --set tokenizer.normaliser={others[0]}, which writes all of them, or" if others else "Use"
        raise TokenizerError(
            f"{self.source} with normaliser '{self.normaliser}' cannot write {len(failures)} of {len(distinct)} texts: "
            f"{listed}. WRA could not be above {best:.1f} %.",
            f"{remedy} a tokenizer that has these characters (without --tokenizer one is trained on the prompts).",
        )


def _special_ids(
    pieces: Sequence[str], known: Mapping[str, int], source: str
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Special ids as the file states them, else by name, else behind the last piece; and what is appended there.

    Raises:
        TokenizerError: text would begin or end with the blank or <unk>.
    """
    ids = {piece: i for i, piece in reversed(list(enumerate(pieces)))}
    found, appended = dict(known), list[str]()
    for what in ("blank", "bos", "eos", "unk"):
        if what in found:
            continue
        name = next((name for name in NAMES[what] if name in ids), None)
        if name is None:
            found[what] = len(pieces) + len(appended)
            appended.append(NAMES[what][0])
        else:
            found[what] = ids[name]
    if {found["bos"], found["eos"]} & {found["blank"], found["unk"]}:
        listed = ", ".join(f"{what} {found[what]}" for what in ("unk", "blank", "bos", "eos"))
        raise TokenizerError(
            f"{source} has its special ids at {listed}: start and end of a text need ids of their own.",
            "Train the SentencePiece model with --unk_id=0 --bos_id=1 --eos_id=2.",
        )
    return found, tuple(appended)


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
            unk_id=0,
            bos_id=1,
            eos_id=2,
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
