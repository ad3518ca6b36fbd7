"""What the readers and writers of other toolkits' corpora share.

Other toolkits know recordings, texts and speakers; few know takes. Without one, every recording is a take of its own,
unless its name is UASpeech's, which tells take, prompt, microphone, role and band. Our own keys (take, prompt, block,
mic, role, band, word_type, simulated_by) are written wherever a format has room for them, and read again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from xded.corpus import uaspeech
from xded.corpus.checks import Candidate, Row
from xded.corpus.manifest import Recording, validate
from xded.errors import CorpusError, few

OWN_KEYS: Final = ("take", "prompt", "block", "mic", "role", "band", "word_type", "simulated_by")
ANY_DURATION_S: Final = 1.0  # stands in where a format declares none, while the other keys are checked


def candidate(audio: Path, text: object, recording: object, speaker: object, more: Mapping[str, Any]) -> Candidate:
    """A recording of a foreign corpus.

    Args:
        audio: absolute path.
        text, recording, speaker: as the corpus has them; numbers become text.
        more: our own keys, `duration` (s), `sample_rate` (Hz) where the corpus has them; others are ignored, and so is
            what is empty.

    Raises:
        ValueError: names every key that is missing or wrong.
    """
    given = {key: value for key, value in more.items() if value is not None and value != ""}
    ids = {"text": text, "recording": recording, "speaker": speaker}
    named = {key: str(value) for key, value in ids.items() if value is not None}
    match = uaspeech.NAME.fullmatch(named.get("recording", ""))
    known = uaspeech.facts(match) if match and match["speaker"] == named.get("speaker") else {}
    defaults = {"take": named.get("recording"), "prompt": named.get("text"), "duration": ANY_DURATION_S}
    own = {key: str(given[key]) for key in OWN_KEYS if key in given}
    numbers = {key: given[key] for key in ("duration", "sample_rate") if key in given}
    if "\0" in str(audio):
        raise ValueError("the path holds a zero byte")
    checked = validate(defaults | known | own | numbers | named | {"audio_filepath": str(audio)})
    fields = {key: getattr(checked, key) for key in Candidate.__dataclass_fields__}
    return Candidate(**fields | {"duration": checked.duration if "duration" in given else None})


def bad_line(path: Path, number: int, problem: str, remedy: str, kind: str = "line") -> Row:
    """A row for a line of a list that cannot be used."""
    return Row("rejected", path, f"{path}, line {number}: {problem}.", remedy, kind)


def own_keys(recording: Recording) -> dict[str, str]:
    """What we know of a recording beyond audio, text and speaker."""
    return {key: value for key in OWN_KEYS if (value := getattr(recording, key)) is not None}


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Lines that are not blank, and their numbers.

    Raises:
        CorpusError: no such file, or no text.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path} cannot be read ({error}).", "Check the path, and that the file is UTF-8.") from error
    return [(number, line.removesuffix("\r")) for number, line in enumerate(lines, start=1) if line.strip()]


def refuse(what: str, names: Iterable[str], remedy: str) -> None:
    """Raises CorpusError when a format cannot hold some recordings; nothing is written then."""
    found = sorted(set(names))
    if found:
        raise CorpusError(f"{what}: {few(found)}.", remedy)


def write_files(folder: Path, files: Mapping[str, str]) -> list[Path]:
    """Writes text files into a folder, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        temporary = folder / (name + ".part")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / name)
    return [folder / name for name in files]
