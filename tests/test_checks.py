import json
import zlib

import numpy as np
import pytest
import soundfile

from xded.corpus.checks import REPORT_NAME, Candidate, check, check_corpus, store, with_controls
from xded.corpus.manifest import read_corpus
from xded.errors import CorpusError


def make(folder, name, samples=None, sample_rate=16_000, subtype="PCM_16", **fields):
    """A candidate with an audio file; without samples, noise that differs from name to name."""
    path = folder / f"{name}.wav"
    if samples is None:
        seed = zlib.crc32(name.encode())
        samples = 0.1 * np.random.default_rng(seed).standard_normal(sample_rate // 2)
    soundfile.write(path, samples, sample_rate, subtype=subtype)
    base = {"audio_filepath": path, "text": "YES", "recording": name, "speaker": "S1", "take": name, "prompt": "yes"}
    return Candidate(**(base | fields))


def test_good_recordings_are_kept_with_what_was_measured(tmp_path):
    report = check([make(tmp_path, "a"), make(tmp_path, "b", sample_rate=8_000)])
    assert report.rows == ()
    assert [(r.recording, r.sample_rate, r.duration) for r in report.kept] == [("a", 16_000, 0.5), ("b", 8_000, 0.5)]
    assert len({r.audio_sha256 for r in report.kept}) == 2


NOISE = 0.1 * np.random.default_rng(9).standard_normal(8_000)


@pytest.mark.parametrize(
    ("fields", "kind", "said"),
    [
        ({"samples": np.zeros(8_000)}, "silent", "is silent"),
        ({"samples": np.full(8_000, 0.2)}, "silent", "is silent"),
        ({"samples": 1e-4 * NOISE}, "silent", "is silent"),
        ({"sample_rate": 8_000, "samples": NOISE}, "wrong rate", "has 8000 Hz; 16000 Hz is declared"),
        ({"duration": 0.6}, "wrong length", "lasts 0.500 s; 0.600 s is declared"),
        ({"audio_sha256": "0" * 64}, "changed", "SHA-256 differs"),
        ({"text": " "}, "no text", "has no text"),
        ({"samples": NOISE[:400]}, "unreadable", "0.025 s long"),
        ({"samples": np.stack([NOISE, NOISE], 1)}, "unreadable", "2 channels"),
        ({"samples": np.where(np.arange(8_000) == 5, np.inf, NOISE), "subtype": "FLOAT"}, "unreadable", "not finite"),
        ({"audio_filepath": "gone.wav"}, "unreadable", "cannot be read"),
    ],
)
def test_a_bad_file_costs_one_row(tmp_path, fields, kind, said):
    declared = {key: fields.pop(key) for key in ("duration", "audio_sha256", "text", "audio_filepath") if key in fields}
    if "audio_filepath" in declared:
        declared["audio_filepath"] = tmp_path / declared["audio_filepath"]
    if kind == "wrong rate":
        bad = make(tmp_path, "bad", **fields)
        bad = Candidate(**(vars(bad) | {"sample_rate": 16_000}))
    else:
        bad = make(tmp_path, "bad", **fields, **declared)
    report = check([make(tmp_path, "a"), bad, make(tmp_path, "z")])
    assert [r.recording for r in report.kept] == ["a", "z"]
    (row,) = report.rows
    assert (row.status, row.kind) == ("rejected", kind)
    assert said in row.reason
    assert row.remedy


def test_rounded_duration_of_a_foreign_manifest_is_accepted(tmp_path):
    assert len(check([make(tmp_path, "a", duration=0.51)]).kept) == 1


def test_clipped_recording_is_kept_with_a_warning(tmp_path):
    report = check([make(tmp_path, "loud", np.clip(10 * NOISE, -1, 1)), make(tmp_path, "fair")])
    assert len(report.kept) == 2
    assert [(row.status, row.kind) for row in report.rows] == [("warning", "clipped")]
    assert report.summary() == {"kept": 2, "rejected": {}, "warnings": {"clipped": 1}}


def test_duplicate_bytes_keep_the_first_or_none_when_they_disagree(tmp_path):
    same = [make(tmp_path, "a", NOISE), make(tmp_path, "b", NOISE), make(tmp_path, "c")]
    report = check(same)
    assert [r.recording for r in report.kept] == ["a", "c"]
    assert "same bytes as" in report.rows[0].reason
    differ = [same[0], make(tmp_path, "b", NOISE, speaker="S2"), same[2]]
    report = check(differ)
    assert [r.recording for r in report.kept] == ["c"]
    assert len(report.rejected) == 2
    assert "neither can be trusted" in report.rows[0].reason


def test_every_candidate_is_kept_or_has_a_rejected_row(tmp_path):
    found = [make(tmp_path, f"r{n}", np.zeros(8_000) if n % 3 == 0 else None) for n in range(30)]
    report = check(found)
    assert len(report.kept) + len(report.rejected) == 30
    names = [r.recording for r in report.kept]
    assert names == [f"r{n}" for n in range(30) if n % 3]  # the order of the corpus, whatever the threads do


def test_two_files_with_one_recording_id_are_refused(tmp_path):
    (tmp_path / "copy").mkdir()
    with pytest.raises(CorpusError, match=r"'a' is .* and .*copy"):
        check([make(tmp_path, "a"), make(tmp_path / "copy", "a")])


def test_store_writes_manifest_and_report_and_never_overwrites_unasked(tmp_path):
    report = check([make(tmp_path, "a"), make(tmp_path, "quiet", np.zeros(8_000))])
    out = tmp_path / "corpus"
    manifest = store(report, out)
    assert [r.recording for r in read_corpus(manifest).recordings] == ["a"]
    (row,) = [json.loads(line) for line in (out / REPORT_NAME).read_text().splitlines()]
    assert row["status"] == "rejected"
    assert row["audio_filepath"] == str(tmp_path / "quiet.wav")
    with pytest.raises(CorpusError, match="already holds a corpus"):
        store(report, out)
    assert store(report, out, overwrite=True) == manifest


def test_nothing_usable_is_an_error_and_the_report_is_still_written(tmp_path):
    report = check([make(tmp_path, "quiet", np.zeros(8_000))])
    with pytest.raises(CorpusError, match=r"No recording could be used; 1 were rejected.*is silent"):
        store(report, tmp_path / "corpus")
    assert (tmp_path / "corpus" / REPORT_NAME).read_text().count("\n") == 1


def test_check_corpus_sees_a_file_that_changed_since_its_import(tmp_path):
    corpus = read_corpus(store(check([make(tmp_path, "a"), make(tmp_path, "b")]), tmp_path / "corpus"))
    assert check_corpus(corpus).rows == ()
    make(tmp_path, "b", NOISE)
    (row,) = check_corpus(corpus).rows
    assert (row.kind, row.audio_filepath.name) == ("changed", "b.wav")


def test_controls_get_their_role_and_wrong_names_a_suggestion(tmp_path):
    found = [make(tmp_path, "a", speaker="anna"), make(tmp_path, "b", speaker="ben")]
    assert [c.role for c in with_controls(found, ["ben"], "here")] == ["target", "control"]
    with pytest.raises(CorpusError, match="did you mean 'anna'"):
        with_controls(found, ["ana"], "here")
