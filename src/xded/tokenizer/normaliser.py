"""The one place where a text is changed before it is encoded or compared."""

from __future__ import annotations

import unicodedata
from typing import Final

from xded.errors import TokenizerError

NORMALISERS: Final = ("upper", "lower", "upper_no_punctuation", "lower_no_punctuation")


def normalise(text: str, normaliser: str) -> str:
    """NFC, white space collapsed to single spaces, upper or lower case.

    `*_no_punctuation` also drops every character that is no letter, mark, digit, apostrophe or space (X-RAY becomes
    XRAY) and writes the typographic apostrophe as '.

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
