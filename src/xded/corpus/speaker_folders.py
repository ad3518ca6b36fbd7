"""One folder per speaker: <speaker>/<prompt>_<take>.flac (or .wav)."""

from __future__ import annotations

import json
import re
from pathlib import Path

from xded.corpus.checks import Candidate, Row
from xded.errors import CorpusError

SUFFIXES = (".flac", ".wav")
NAME = re.compile(r"(?P<prompt>.+)_(?P<take>\d+)")


def find(source: Path, texts: Path | None = None) -> tuple[list[Candidate], list[Row]]:
    """Finds the recordings of a folder of speakers' folders.

    Args:
        source: the folder that holds one folder per speaker.
        texts: file with the text of every prompt (see `read_texts`); none: the prompt in capitals, `_` as space.

    Returns:
        Candidates in the order of their paths, and a row for each audio file that is placed or named otherwise,
        or whose prompt has no text.

    Raises:
        CorpusError: no audio files, or a file of texts that cannot be used.
    """
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES) if source.is_dir() else []
    if not files:
        raise CorpusError(f"{source} holds no .flac or .wav files.", "Give the folder with one folder per speaker.")
    written = read_texts(texts) if texts is not None else None
    candidates, rows = [], []
    for path in files:
        match = NAME.fullmatch(path.stem)
        if match is None or path.parent.parent != source:
            rows.append(Row("rejected", path, f"{path} is not <speaker>/<prompt>_<take number>{path.suffix}.",
                            "Rename or move it, or leave it out of the folder.", "name"))  # fmt: skip
            continue
        prompt, speaker = match["prompt"], path.parent.name
        text = prompt.replace("_", " ").upper() if written is None else written.get(prompt)
        if text is None:
            rows.append(Row("rejected", path, f"{path}: {texts} has no text for prompt '{prompt}'.",
                            "Add the prompt to that file.", "no text"))  # fmt: skip
            continue
        name = f"{speaker}_{path.stem}"
        candidates.append(
            Candidate(audio_filepath=path, text=text, recording=name, speaker=speaker, take=name, prompt=prompt)
        )
    return candidates, rows


def read_texts(path: Path) -> dict[str, str]:
    """Text of every prompt, from a JSON object {prompt: text} or from JSON lines with `prompt` and `text`.

    Raises:
        CorpusError: no such file, neither of the two forms, no texts, or a prompt with two texts.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: no texts can be read ({error}).", "Check the path given with --texts.") from error
    form = "Write one JSON object {prompt: text}, or JSON lines with 'prompt' and 'text'."
    try:
        rows = [json.loads(content)]
    except json.JSONDecodeError:
        try:
            rows = [json.loads(line) for line in content.split("\n") if line.strip()]
        except json.JSONDecodeError as error:
            raise CorpusError(f"{path} is not JSON ({error}).", form) from error
    texts: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise CorpusError(f"{path}, object {number}: {row!r:.60} is not an object.", form)
        pairs = {row["prompt"]: row["text"]} if {"prompt", "text"} <= set(row) else row
        for prompt, text in pairs.items():
            if not isinstance(prompt, str) or not isinstance(text, str):
                raise CorpusError(f"{path}, object {number}: {prompt!r:.40}: {text!r:.40} is not text.", form)
            if texts.setdefault(prompt, text) != text:
                raise CorpusError(f"{path}: prompt '{prompt}' is both '{texts[prompt]}' and '{text}'.", "Keep one.")
    if not texts:
        raise CorpusError(f"{path} holds no texts.", form)
    return texts
