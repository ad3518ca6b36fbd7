"""TORGO (Rudzicz, Namasivayam & Wolff, Language Resources and Evaluation 2012): words and sentences, two microphones.

<speaker>/Session<n>/prompts/<number>.txt holds what was asked for, wav_headMic/<number>.wav and
wav_arrayMic/<number>.wav are two copies of one take. F01 ... M05 are dysarthric speakers, FC01 ... MC04 controls. The
corpus publishes Frenchay assessments, no word intelligibility, so no band is set.
"""

from __future__ import annotations

import re
from pathlib import Path

from xded.corpus.checks import Candidate, Row
from xded.errors import CorpusError
from xded.tokenizer import normalise

SPEAKER = re.compile(r"[FM](?P<control>C?)\d\d")
HINT = re.compile(r"(?P<word>[^\[\]]*\S)\s*\[[^\]]*\]\s*")  # "tear [as in tear up that paper]": a note to the reader
NO_SPEECH = "xxx"
IMAGE = re.compile(r"\.jpe?g|/", re.IGNORECASE)


def find(source: Path, sentences: bool = False) -> tuple[list[Candidate], list[Row]]:
    """Finds the recordings of a TORGO folder (speakers' folders in it, or in F, FC, M and MC below it).

    A note in brackets behind a word is left out of its text; apart from that texts stay as they are.

    Args:
        source: the corpus folder.
        sentences: keep prompts of several words too.

    Returns:
        Candidates in the order of their paths, and a row for each file whose prompt is missing or is no word.

    Raises:
        CorpusError: no recordings at their usual places.
    """
    places = [path for depth in ("*", "*/*") for path in source.glob(f"{depth}/Session*/wav_*Mic/*.wav")]
    files = sorted(path for path in places if SPEAKER.fullmatch(path.parents[2].name))
    if not files:
        raise CorpusError(
            f"{source} holds no <speaker>/Session<n>/wav_headMic/<number>.wav.",
            "Give the folder that holds TORGO's F01, M01, FC01 ... (or F, FC, M and MC).",
        )
    candidates, rows = [], []
    for path in files:
        found = _candidate(path, sentences)
        if isinstance(found, Row):
            rows.append(found)
        else:
            candidates.append(found)
    return candidates, rows


def _candidate(path: Path, sentences: bool) -> Candidate | Row:
    """One file, or why it is left out."""
    session, speaker = path.parents[1], path.parents[2].name
    prompt = session / "prompts" / f"{path.stem}.txt"
    try:
        text = prompt.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        return Row("rejected", path, f"{path}: its prompt {prompt} cannot be read ({error.strerror}).",
                   "The corpus lacks some prompts: nothing to mend.", "no text")  # fmt: skip
    hint = HINT.fullmatch(text)
    text = hint["word"] if hint else text
    if not text or NO_SPEECH in text.casefold() or IMAGE.search(text) or "[" in text:
        return Row("rejected", path, f"{path}: the prompt '{text:.60}' is no text to read.",
                   "An instruction, a picture or a failed recording: nothing to mend.", "no word")  # fmt: skip
    if len(text.split()) > 1 and not sentences:
        return Row("rejected", path, f"{path}: the prompt '{text:.60}' is no single word.",
                   "Keep prompts of several words with --sentences.", "sentence")  # fmt: skip
    take = f"{speaker}_{session.name}_{path.stem}"
    mic = path.parent.name.removeprefix("wav_")
    control = SPEAKER.fullmatch(speaker)
    return Candidate(
        audio_filepath=path,
        text=text,
        recording=f"{take}_{mic}",
        speaker=speaker,
        take=take,
        prompt=normalise(text, "upper_no_punctuation") or text,
        block=session.name,
        mic=mic,
        role="control" if control and control["control"] else "target",
    )
