"""The embedded corpus: enough speakers and words, severities in every band, and the same bytes for the same seed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import soundfile

from xded.corpus.manifest import read_corpus
from xded.corpus.phones import DEFAULT_WORDS
from xded.corpus.synthetic import embedded_voices, make_embedded_corpus
from xded.errors import CorpusError


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path):
    for name, seed in (("one", 7), ("two", 7), ("three", 8)):
        make_embedded_corpus(tmp_path / name, controls=1, targets=2, words=3, takes=2, seed=seed)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert len(digests(tmp_path / "one")) == 3 * 3 * 2 + 1
    three = digests(tmp_path / "three")
    assert not set(digests(tmp_path / "one").values()) & set(three.values())


def test_the_manifest_says_what_the_files_hold(tmp_path: Path):
    corpus = read_corpus(make_embedded_corpus(tmp_path / "corpus", controls=2, targets=2, words=2, takes=2))
    assert corpus.speakers == ("C01", "C02", "T01", "T02")
    assert corpus.texts == ("one", "zero")
    assert len(corpus.recordings) == 4 * 2 * 2
    assert len({row.take for row in corpus.recordings}) == len(corpus.recordings)
    for row in corpus.recordings:
        info = soundfile.info(row.audio_filepath)
        assert (info.samplerate, info.channels) == (row.sample_rate, 1) == (16_000, 1)
        assert info.duration == pytest.approx(row.duration)
        assert row.audio_sha256 == hashlib.sha256(row.audio_filepath.read_bytes()).hexdigest()
        assert row.role == ("control" if row.speaker.startswith("C") else "target")
        assert (row.band is None) == (row.role == "control")
        assert row.word_type == "D"


def test_no_two_recordings_are_alike(tmp_path: Path):
    make_embedded_corpus(tmp_path / "corpus", controls=1, targets=1, words=list(DEFAULT_WORDS), takes=2)
    found = digests(tmp_path / "corpus")
    assert len(set(found.values())) == len(found)


def test_the_default_voices_are_many_and_of_every_band(tmp_path: Path):
    corpus = read_corpus(make_embedded_corpus(tmp_path / "corpus", words=1, takes=1))
    controls = {row.speaker for row in corpus.select(role="control")}
    targets = {row.speaker for row in corpus.select(role="target")}
    assert len(controls) >= 6
    assert len(targets) >= 9
    assert {corpus.band_of(speaker) for speaker in targets} == {"very_low", "low", "mid", "high"}


def test_adding_speakers_keeps_the_healthy_voices():
    few, many = embedded_voices(1, 2), embedded_voices(3, 9)
    by_name = {voice.name: voice for voice in many}
    for voice in few:
        assert by_name[voice.name].f0_hz == voice.f0_hz
        assert by_name[voice.name].timing == voice.timing


def test_words_can_be_named(tmp_path: Path):
    corpus = read_corpus(
        make_embedded_corpus(tmp_path / "corpus", controls=1, targets=0, words=["Tango", "echo"], takes=1)
    )
    assert corpus.texts == ("echo", "tango")
    assert {row.word_type for row in corpus.recordings} == {"L"}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"words": 31}, "31 words"),
        ({"words": 0}, "0 words"),
        ({"words": []}, "is empty"),
        ({"words": ["sevn"]}, "did you mean 'seven'"),
        ({"takes": 0}, "0 takes"),
        ({"controls": 0, "targets": 0}, "0 control and 0 target"),
    ],
)
def test_counts_and_words_that_make_no_corpus_are_refused(tmp_path: Path, change: dict, problem: str):
    with pytest.raises(CorpusError, match=problem):
        make_embedded_corpus(tmp_path / "corpus", **change)
    assert not (tmp_path / "corpus").exists()
