"""Which kind of tokenizer some bytes are, by their content."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from xded.errors import TokenizerError, few
from xded.tokenizer.models import READ, PieceList, PieceModel, SentencePiece, TokenizerJson, in_order, refuse_repeated

FORMATS: Final = ("sentencepiece", "tokenizer.json", "pieces")
_LFS: Final = b"version https://git-lfs.github.com/spec/"
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")  # in every SentencePiece model, in no text
_WITH_ID: Final = re.compile(r"(\S+| )\s+(\d+)")
_WITH_SCORE: Final = re.compile(r"\S+\t-?\d+(\.\d+)?(e-?\d+)?")
_DISAMBIGUATION: Final = re.compile(r"#\d+")  # of k2 and Kaldi, behind the pieces; no row of a head stands for them


def kind_of(data: bytes, source: str) -> str:
    """One of `FORMATS`.

    Raises:
        TokenizerError: an empty file, a Git LFS pointer, or content that is none of them.
    """
    if not data.strip():
        raise TokenizerError(f"{source} is empty ({len(data)} bytes).", READ)
    if data.startswith(_LFS):
        raise TokenizerError(
            f"{source} is a Git LFS pointer ({len(data)} bytes), not the file itself.",
            "Fetch it: git lfs pull, or download it from the model's page.",
        )
    if data.startswith(b"PK\x03\x04"):
        raise TokenizerError(f"{source} is no tokenizer but a zip archive (a PyTorch checkpoint is one).", READ)
    text = _text(data)
    if text is None:
        return "sentencepiece"
    parsed = _json(text, source)
    if isinstance(parsed, dict) and isinstance(parsed.get("model"), dict):
        return "tokenizer.json"
    return "pieces"


def model_of(kind: str, data: bytes, source: str) -> PieceModel:
    """Reads one of `FORMATS`.

    Raises:
        TokenizerError: the bytes are no such tokenizer, or a kind that is not known.
    """
    if kind == "sentencepiece":
        return SentencePiece(data, source)
    if kind == "tokenizer.json":
        return TokenizerJson(data, source)
    if kind == "pieces":
        return PieceList(_pieces(data, source), source)
    raise TokenizerError(
        f"{source} is of kind '{kind}'; known are {', '.join(FORMATS)}.", "Use the version of xded that wrote it."
    )


def _text(data: bytes) -> str | None:
    """The text of a text file; none for binary data."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return None if _CONTROL.search(text) else text


def _json(text: str, source: str) -> Any:
    """A JSON object or list; none for other texts, which may begin with a bracket too."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        refuse_repeated((name for name, _ in pairs), source)
        return dict(pairs)

    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError:
        return None


def _pieces(data: bytes, source: str) -> tuple[str, ...]:
    """The pieces of a list in any of its forms, by id."""
    text = _text(data)
    if text is None:
        raise TokenizerError(f"{source} is no list of pieces but binary data ({len(data)} bytes).", READ)
    parsed = _json(text, source)
    if isinstance(parsed, dict):
        if parsed and all(type(i) is int for i in parsed.values()):
            return in_order(parsed.items(), source)
        raise TokenizerError(f"{source} is a JSON object that gives no ids to pieces (keys: {few(parsed)}).", READ)
    if isinstance(parsed, list):
        if all(isinstance(piece, str) for piece in parsed):
            return in_order(((piece, i) for i, piece in enumerate(parsed)), source)
        raise TokenizerError(f"{source} is a JSON list of something else than pieces.", READ)
    lines = [line.rstrip("\r") for line in text.rstrip("\r\n").split("\n")]
    if len(lines) == 1 and not _WITH_ID.fullmatch(lines[0]):
        return in_order(((character, i) for i, character in enumerate(lines[0])), source)
    return _listed(lines, source)


def _listed(lines: list[str], source: str) -> tuple[str, ...]:
    """The pieces of a text file with one a line."""
    matches = [_WITH_ID.fullmatch(line) for line in lines]
    numbered = [(match[1], int(match[2])) for match in matches if match]
    if len(numbered) == len(lines):
        numbered.sort(key=lambda pair: pair[1])
        while numbered and _DISAMBIGUATION.fullmatch(numbered[-1][0]):
            numbered.pop()
        return in_order(numbered, source)
    if all(_WITH_SCORE.fullmatch(line) for line in lines):
        raise TokenizerError(
            f"{source} lists pieces with scores: it is the .vocab file of a SentencePiece model.",
            "Give the .model file beside it.",
        )
    for number, line in enumerate(lines, 1):
        if line != " " and (not line or line.split() != [line]):
            what = f"is '{line:.40}'" if line else "is empty"
            raise TokenizerError(
                f"{source} is no list of pieces: line {number} {what}, expected one piece (or on all lines a piece and "
                "its id).",
                READ,
            )
    return in_order(((piece, i) for i, piece in enumerate(lines)), source)
