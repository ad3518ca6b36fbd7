"""Bare lists of recordings: the metadata that the reference study keeps beside a teacher's posteriors.

`<speaker>_metadata.json` holds `model_name` (the speaker), `num_utterances`, and in one order `utterance_ids`
(`M08_B3_CW95_M2`), `target_words` and `ctc_frame_lens` (25 a second).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, NonNegativeInt, ValidationError, model_validator

from xded.corpus.uaspeech import NAME
from xded.errors import CorpusError

FRAMES_A_SECOND = 25  # of the study's CTC posteriors
MARK = b'"utterance_ids"'
HEAD = 65_536  # bytes in which the mark has to stand
REMEDY = "Write the file again with the posteriors that it describes, or leave it out."


@dataclass(frozen=True)
class Listed:
    """What a list knows of a recording. `frames`: CTC frames, where the list has them."""

    recording: str
    speaker: str
    take: str
    prompt: str
    text: str
    block: str | None = None
    mic: str | None = None
    word_type: str | None = None
    frames: int | None = None

    @property
    def duration(self) -> float | None:
        """Seconds, to one frame."""
        return None if self.frames is None else self.frames / FRAMES_A_SECOND


@dataclass(frozen=True)
class Listing:
    """A list: whose it says it is, its recordings, and how many it says it has."""

    path: Path
    speaker: str
    recordings: tuple[Listed, ...]
    declared: int | None = None


class Metadata(BaseModel):
    """The file; keys that tell nothing here (`token_lens` is always 1) are ignored."""

    model_name: str
    utterance_ids: list[str]
    target_words: list[str]
    ctc_frame_lens: list[NonNegativeInt] | None = None
    num_utterances: int | None = None

    @model_validator(mode="after")
    def _one_length(self) -> Metadata:
        lengths = {"utterance_ids": len(self.utterance_ids), "target_words": len(self.target_words)}
        if self.ctc_frame_lens is not None:
            lengths["ctc_frame_lens"] = len(self.ctc_frame_lens)
        if len(set(lengths.values())) > 1:
            raise ValueError(f"lists of different lengths, so that nobody knows what belongs together: {lengths}")
        if not self.utterance_ids:
            raise ValueError("it lists no recordings")
        return self


def recognise(path: Path) -> bool:
    """Whether a file looks like such a list; it may still be damaged."""
    if path.suffix != ".json":
        return False
    try:
        with path.open("rb") as file:
            return MARK in file.read(HEAD)
    except OSError:
        return False


def read_listing(path: Path) -> Listing:
    """Reads a list.

    Raises:
        CorpusError: it is damaged, a list is missing, or its lists differ in length.
    """
    try:
        data = Metadata.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror}).", "Check the path.") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CorpusError(f"{path}: {place + ': ' if place else ''}{first['msg'][:200]}.", REMEDY) from error
    frames: Sequence[int | None] = data.ctc_frame_lens or [None] * len(data.utterance_ids)
    rows = zip(data.utterance_ids, data.target_words, frames, strict=True)
    return Listing(path, data.model_name, tuple(_listed(*row, data.model_name) for row in rows), data.num_utterances)


def _listed(recording: str, text: str, frames: int | None, speaker: str) -> Listed:
    """A recording by its id: UASpeech's says everything, any other one is a take of its own."""
    match = NAME.fullmatch(recording)
    if match is None:
        return Listed(recording, speaker, recording, text, text, frames=frames)
    kind, block = match["type"] or "L", match["block"]
    return Listed(
        recording, match["speaker"], recording.removesuffix(f"_{match['mic']}"),
        f"{block}_{match['word']}" if kind == "UW" else match["word"], text, block, match["mic"], kind, frames,
    )  # fmt: skip
