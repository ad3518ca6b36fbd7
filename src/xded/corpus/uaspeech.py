"""UASpeech (Kim et al., Interspeech 2008): audio/<speaker>/<speaker>_<block>_<word>_<mic>.wav and a word-list workbook.

765 words per speaker in three blocks; in each the same 155 words (digits D, radio alphabet L, computer commands C,
common words CW) and 100 uncommon words (UW) of its own. M2 to M8 are microphones of one array: copies of one take.
"""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path
from typing import Any

import xlrd

from xded.corpus.checks import Candidate, Row
from xded.corpus.manifest import Band
from xded.errors import CorpusError

SHEET = "Word_filename"
WORD_COLUMN, KEY_COLUMN = "WORD", "FILE NAME"
SAMPLE_RATE = 16_000
NAME = re.compile(
    r"(?P<speaker>(?P<control>C?)[FM]\d\d)_(?P<block>B[123])_(?P<word>(?P<type>CW|UW|C|D)\d{1,3}|L[A-Z])_(?P<mic>M\d)"
)
# Word intelligibility, heard by listeners: up to 25, 50, 75, 100 % (the corpus's own speaker table)
BAND_OF: dict[str, Band] = {
    "M01": "very_low", "M04": "very_low", "M12": "very_low", "F03": "very_low",
    "M07": "low", "F02": "low", "M16": "low",
    "M05": "mid", "M11": "mid", "F04": "mid",
    "M08": "high", "M09": "high", "M10": "high", "M14": "high", "F05": "high",
}  # fmt: skip


def find(source: Path, wordlist: Path | None = None) -> tuple[list[Candidate], list[Row]]:
    """Finds the recordings of a UASpeech folder.

    Args:
        source: the corpus folder (with `audio` in it), or any folder with the speakers' folders below it.
        wordlist: the workbook; none: `speaker_wordlist.xls` in the corpus folder or in its `doc`.

    Returns:
        Candidates in the order of their names, and a row for each file whose name or word is not known.

    Raises:
        CorpusError: no audio files, no workbook, or a workbook without the expected sheet and columns.
    """
    folder = source / "audio" if (source / "audio").is_dir() else source
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".wav") if folder.is_dir() else []
    if not files:
        raise CorpusError(f"{folder} holds no .wav files.", "Give the folder that holds UASpeech's 'audio' folder.")
    words = read_words(wordlist or _find_wordlist(source))
    candidates, rows = [], []
    for path in files:
        match = NAME.fullmatch(path.stem)
        if match is None or match["speaker"] != path.parent.name:
            expected = "expected <speaker>/<speaker>_<block>_<word>_<mic>.wav"
            rows.append(Row("rejected", path, f"{path} is not named as in UASpeech; {expected}.",
                            "Rename it, or leave it out of the folder.", "name"))  # fmt: skip
            continue
        prompt = facts(match)["prompt"]
        if prompt not in words:
            rows.append(Row("rejected", path, f"{path}: the word list has no row '{prompt}'.",
                            "Use the workbook of the same release as the audio.", "no word"))  # fmt: skip
            continue
        candidates.append(
            Candidate(
                audio_filepath=path,
                text=words[prompt],
                recording=path.stem,
                speaker=match["speaker"],
                sample_rate=SAMPLE_RATE,
                **facts(match),
            )
        )
    return candidates, rows


def facts(match: re.Match[str]) -> dict[str, Any]:
    """What a recording's name tells (a match of `NAME`): take, prompt, block, mic, role, band, word_type."""
    return {
        "take": match[0].removesuffix(f"_{match['mic']}"),
        "prompt": f"{match['block']}_{match['word']}" if match["type"] == "UW" else match["word"],
        "block": match["block"],
        "mic": match["mic"],
        "role": "control" if match["control"] else "target",
        "band": BAND_OF.get(match["speaker"]),
        "word_type": match["type"] or "L",
    }


def read_words(path: Path) -> dict[str, str]:
    """Word of every file-name key (`D1`, `LA`, `C10`, `CW95`, `B3_UW7`), upper-cased.

    Raises:
        CorpusError: not a workbook, no sheet `Word_filename`, no columns WORD and FILE NAME, or a key with two words.
    """
    try:
        book = xlrd.open_workbook(str(path), logfile=io.StringIO(), on_demand=True)
        sheet = book.sheet_by_name(SHEET)
    except (OSError, xlrd.XLRDError, xlrd.compdoc.CompDocError, struct.error, IndexError, AssertionError) as error:
        raise CorpusError(
            f"{path} cannot be read as a workbook with a sheet '{SHEET}' ({error}).",
            "Give UASpeech's speaker_wordlist.xls (the old .xls format) with --wordlist.",
        ) from error
    table = [[str(value).strip() for value in sheet.row_values(row)] for row in range(sheet.nrows)]
    header = [name.upper() for name in table[0]] if table else []
    if WORD_COLUMN not in header or KEY_COLUMN not in header:
        raise CorpusError(
            f"{path}, sheet '{SHEET}': the first row is {header}; '{WORD_COLUMN}' and '{KEY_COLUMN}' are expected.",
            "Give UASpeech's own speaker_wordlist.xls with --wordlist.",
        )
    words: dict[str, str] = {}
    for number, row in enumerate(table[1:], start=2):
        key, word = row[header.index(KEY_COLUMN)], row[header.index(WORD_COLUMN)].upper()
        if key and word and words.setdefault(key, word) != word:
            raise CorpusError(
                f"{path}, sheet '{SHEET}', row {number}: '{key}' is both {words[key]} and {word}.",
                "Remove the wrong row.",
            )
    return words


def _find_wordlist(source: Path) -> Path:
    """The workbook in its usual places."""
    places = [source / "speaker_wordlist.xls", source / "doc" / "speaker_wordlist.xls"]
    for place in places:
        if place.is_file():
            return place
    raise CorpusError(
        f"No word list: neither {places[0]} nor {places[1]} exists.", "Give the workbook with --wordlist FILE."
    )
