"""Free Spoken Digit Dataset: {digit}_{speaker}_{index}.wav at 8 kHz, all in one folder."""

from __future__ import annotations

import re
from pathlib import Path

from xded.corpus.checks import Candidate, Row
from xded.errors import CorpusError

DIGITS = ("ZERO", "ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE")
SAMPLE_RATE = 8_000
NAME = re.compile(r"(?P<digit>\d)_(?P<speaker>[^_]+)_(?P<index>\d+)")


def find(source: Path) -> tuple[list[Candidate], list[Row]]:
    """Finds the recordings of a folder of digits.

    Args:
        source: the dataset's folder, or its `recordings`.

    Returns:
        Candidates in the order of their names, and a row for each .wav with another name.

    Raises:
        CorpusError: no .wav files.
    """
    folder = source / "recordings" if (source / "recordings").is_dir() else source
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".wav") if folder.is_dir() else []
    if not files:
        raise CorpusError(f"{folder} holds no .wav files.", "Give the folder with files like 7_jackson_32.wav.")
    candidates, rows = [], []
    for path in files:
        match = NAME.fullmatch(path.stem)
        if match is None:
            rows.append(Row("rejected", path, f"{path} is not named {{digit}}_{{speaker}}_{{index}}.wav.",
                            "Rename it, or leave it out of the folder.", "name"))  # fmt: skip
            continue
        candidates.append(
            Candidate(
                audio_filepath=path,
                text=DIGITS[int(match["digit"])],
                recording=path.stem,
                speaker=match["speaker"],
                take=path.stem,
                prompt=match["digit"],
                word_type="D",
                sample_rate=SAMPLE_RATE,
            )
        )
    return candidates, rows
