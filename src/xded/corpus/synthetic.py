"""The embedded corpus: made on the spot from our own voices, so that everything runs with nothing to download.

Control speakers are healthy, target speakers have simulated dysarthria with severities spread as in UASpeech. See
`synthesiser` and `severity` for what the dial does and for what it is not: nobody has listened to these voices.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from xded.corpus.manifest import MANIFEST_NAME, Recording, write_manifest
from xded.corpus.phones import DEFAULT_WORDS, WORD_TYPES, spell
from xded.corpus.severity import SYNTHESISER, band_of_severity, spread_severities
from xded.corpus.synthesiser import Voice, make_voice, say
from xded.corpus.vocoder import SAMPLE_RATE, write_flac
from xded.errors import CorpusError


def embedded_voices(controls: int, targets: int, seed: int = 0) -> list[Voice]:
    """Voices C01, C02 ... (healthy) and T01, T02 ... (dysarthric), male and female in turn."""
    names = {f"{letter}{number:02d}": number for letter, count in (("C", controls), ("T", targets))
             for number in range(1, count + 1)}  # fmt: skip
    severities = spread_severities((name for name in names if name.startswith("T")), seed)
    return [
        make_voice(name, sex="m" if number % 2 else "f", severity=severities.get(name, 0.0), seed=seed)
        for name, number in names.items()
    ]


def make_embedded_corpus(
    out: Path,
    *,
    controls: int = 6,
    targets: int = 9,
    words: int | Sequence[str] = 30,
    takes: int = 4,
    seed: int = 0,
) -> Path:
    """Writes the embedded corpus: FLAC files in `out/audio/<speaker>/` and, last, `out/manifest.jsonl`.

    Args:
        out: folder; made when missing.
        controls: how many healthy speakers.
        targets: how many speakers with dysarthria.
        words: how many of `phones.DEFAULT_WORDS` (the first ten are the digits), or words of the lexicon.
        takes: how often every speaker says every word.
        seed: decides voices, severities and takes; the same arguments write the same bytes on the same machine
            (another processor or library version may round the last bit of a sample otherwise).

    Returns:
        The path of the manifest.

    Raises:
        CorpusError: a count is out of range, or the lexicon does not hold a word; nothing is written then.
    """
    chosen = _chosen_words(words)
    if controls < 0 or targets < 0 or controls + targets < 1 or takes < 1:
        raise CorpusError(
            f"An embedded corpus of {controls} control and {targets} target speakers with {takes} takes is empty.",
            "Ask for at least one speaker and one take.",
        )
    out = out.resolve()
    recordings = [
        _write_take(out, voice, word, take)
        for voice in embedded_voices(controls, targets, seed)
        for word in chosen
        for take in range(1, takes + 1)
    ]
    manifest = out / MANIFEST_NAME
    write_manifest(manifest, recordings)
    return manifest


def _chosen_words(words: int | Sequence[str]) -> tuple[str, ...]:
    """Words to say, each known to the lexicon, none twice."""
    if isinstance(words, int):
        if not 1 <= words <= len(DEFAULT_WORDS):
            raise CorpusError(
                f"An embedded corpus of {words} words is not to be had: there are {len(DEFAULT_WORDS)} default words.",
                f"Use 1 to {len(DEFAULT_WORDS)}, or name words of the lexicon.",
            )
        return DEFAULT_WORDS[:words]
    chosen = tuple(dict.fromkeys(word.lower() for word in words))
    for word in chosen:
        spell(word)
    if not chosen:
        raise CorpusError("The list of words for the embedded corpus is empty.", "Name at least one word.")
    return chosen


def _write_take(out: Path, voice: Voice, word: str, take: int) -> Recording:
    """Says and writes one take."""
    waveform = say(voice, word, take)
    name = f"{voice.name}_{word}_{take}"
    path = out / "audio" / voice.name / f"{word}_{take}.flac"
    severity = voice.profile.severity
    return Recording(
        audio_filepath=path,
        duration=len(waveform) / SAMPLE_RATE,
        text=word,
        recording=name,
        speaker=voice.name,
        take=name,
        prompt=word,
        role="target" if severity > 0 else "control",
        band=band_of_severity(severity) if severity > 0 else None,
        word_type=WORD_TYPES[word],
        simulated_by=SYNTHESISER,
        sample_rate=SAMPLE_RATE,
        audio_sha256=write_flac(path, waveform),
    )
