import gc
import json

import pytest

from xded.corpus.manifest import Corpus, Recording, read_corpus, write_manifest
from xded.errors import CorpusError


def make_row(folder, name="a", **changes):
    audio = folder / "audio" / f"{name}.wav"
    audio.parent.mkdir(parents=True, exist_ok=True)
    audio.touch()
    row = {"audio_filepath": f"audio/{name}.wav", "duration": 1.0, "text": "YES"}
    row |= {"recording": name, "speaker": "S1", "take": name, "prompt": "yes"}
    row.update(changes)
    return {key: value for key, value in row.items() if value is not ...}


def write_lines(folder, *rows):
    path = folder / "manifest.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_written_manifest_reads_back_and_is_relative_on_disk(tmp_path):
    (tmp_path / "elsewhere.wav").touch()
    inside = Recording.model_validate(make_row(tmp_path / "in", band="low", mic="M2"))
    inside = inside.model_copy(update={"audio_filepath": tmp_path / "in" / "audio" / "a.wav"})
    outside = inside.model_copy(
        update={"audio_filepath": tmp_path / "elsewhere.wav", "recording": "b", "text": "NO\u2028 É", "take": "b"}
    )
    path = tmp_path / "in" / "manifest.jsonl"
    write_manifest(path, [inside, outside])
    first, second = (json.loads(line) for line in path.read_text(encoding="utf-8").strip().split("\n"))
    assert first["audio_filepath"] == "audio/a.wav"
    assert "block" not in first  # empty keys are left out
    assert second["audio_filepath"] == str(tmp_path / "elsewhere.wav")
    corpus = read_corpus(tmp_path / "in")  # the folder does as well as the file
    assert corpus.recordings == (inside, outside)
    assert not list((tmp_path / "in").glob("*.part"))


def test_unknown_keys_and_blank_lines_of_foreign_manifests_are_ignored(tmp_path):
    path = write_lines(tmp_path, make_row(tmp_path, offset=0.0, lang="en"), "", make_row(tmp_path, "b"))
    assert [recording.recording for recording in read_corpus(path).recordings] == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": ...}, "key 'text' is missing"),
        ({"duration": "long"}, "'duration' is 'long'"),
        ({"duration": -1}, "'duration' is -1"),
        ({"duration": float("inf")}, "'duration' is inf"),
        ({"text": "  "}, "'text' is empty"),
        ({"speaker": ""}, "'speaker' is empty"),
        ({"speaker": "../../S1"}, "'speaker' is '../../S1': Value error, it names folders"),
        ({"speaker": "S\\1"}, "it names folders"),
        ({"speaker": ".."}, "it names folders"),
        ({"band": "awful"}, "'band' is 'awful'"),
        ({"audio_sha256": "abc"}, "'audio_sha256' is 'abc'"),
        ({"recording": "first"}, "recording id 'first' is used twice"),
        ({"audio_filepath": "audio/gone.wav"}, "audio file not found: "),
        ({"audio_filepath": "audio/first.wav"}, "share the file"),
        ({"role": "control"}, "speaker 'S1' has two roles, target and control"),
        ({"band": "low"}, "speaker 'S1' has two bands, None and low"),
        ({"take": "first", "text": "NO"}, "take 'first' has two speakers, prompts or texts"),
        ({"take": "first", "speaker": "S2"}, "take 'first' has two speakers, prompts or texts"),
    ],
)
def test_wrong_line_is_named_with_file_line_and_remedy(tmp_path, changes, said):
    path = write_lines(tmp_path, make_row(tmp_path, "first"), "", make_row(tmp_path, "a", **changes))
    with pytest.raises(CorpusError) as caught:
        read_corpus(path)
    assert said in str(caught.value)
    assert f"{path}: line 3: " in str(caught.value)
    assert "xded corpus import" in caught.value.remedy


@pytest.mark.parametrize("line", ["{", "[1, 2]", "[" * 100_000, "null", '{"duration": 1' + "0" * 5_000 + "}"])
def test_line_that_is_no_object_is_named(tmp_path, line):
    with pytest.raises(CorpusError, match="line 2: "):
        read_corpus(write_lines(tmp_path, make_row(tmp_path), line))


def test_lines_that_only_the_slow_parser_reads_are_recordings_like_others(tmp_path):
    nested = json.dumps(make_row(tmp_path, "a"))[:-1] + ', "extra": ' + "[" * 300 + "]" * 300 + "}\r"
    plain, strange = read_corpus(write_lines(tmp_path, make_row(tmp_path, "b"), nested)).recordings
    assert strange.audio_filepath == tmp_path / "audio" / "a.wav"
    assert strange == plain.model_copy(update={"audio_filepath": strange.audio_filepath, "recording": "a", "take": "a"})


def test_recordings_share_nothing_that_a_copy_changes(tmp_path):
    first, second = read_corpus(write_lines(tmp_path, make_row(tmp_path), make_row(tmp_path, "b"))).recordings
    changed = first.model_copy(update={"mic": "M2"})
    assert changed.model_dump(exclude_unset=True)["mic"] == "M2"
    assert "mic" not in first.model_dump(exclude_unset=True) | second.model_dump(exclude_unset=True)


def test_text_that_is_not_utf_8_is_refused_with_its_line(tmp_path):
    path = write_lines(tmp_path, make_row(tmp_path))
    path.write_bytes(path.read_bytes() + b'{"text": "M\xfcll"}\n')
    with pytest.raises(CorpusError, match=r"not UTF-8 text \(line 2: .*0xfc"):
        read_corpus(path)
    assert gc.isenabled()  # reading stops the collector


def test_several_problems_are_reported_at_once_and_counted(tmp_path):
    rows = [make_row(tmp_path, f"r{number}", text=...) for number in range(9)]
    with pytest.raises(CorpusError) as caught:
        read_corpus(write_lines(tmp_path, *rows))
    assert str(caught.value).count("'text' is missing") == 5
    assert "line 5: " in str(caught.value)
    assert "and 4 more problems" in str(caught.value)


@pytest.mark.parametrize("content", [None, "", "\n \n", b"\xff\xfe\x00"])
def test_missing_blank_or_binary_manifest(tmp_path, content):
    path = tmp_path / "manifest.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CorpusError) as caught:
        read_corpus(path)
    assert str(path) in caught.value.problem


def test_write_refuses_contradictions_and_keeps_the_old_file(tmp_path):
    path = write_lines(tmp_path, make_row(tmp_path))
    before = path.read_bytes()
    row = Recording.model_validate(make_row(tmp_path))
    for rows in ([], [row, row.model_copy(update={"audio_filepath": tmp_path / "b.wav"})]):
        with pytest.raises(CorpusError):
            write_manifest(path, rows)
    assert path.read_bytes() == before


def test_corpus_selects_by_speaker_and_role_and_suggests_names(tmp_path):
    rows = [
        make_row(tmp_path, "x", speaker="M08", band="high"),
        make_row(tmp_path, "y", speaker="CF02", role="control", text="NO"),
    ]
    corpus = read_corpus(write_lines(tmp_path, *rows))
    assert isinstance(corpus, Corpus)
    assert corpus.speakers == ("CF02", "M08")
    assert corpus.texts == ("NO", "YES")
    assert [r.recording for r in corpus.select(role="control")] == ["y"]
    assert [r.recording for r in corpus.select(["M08"])] == ["x"]
    assert [r.recording for r in corpus.select(["M08", "CF02"])] == ["x", "y"]
    assert corpus.select(["M08"], "control") == ()
    assert (corpus.role_of("CF02"), corpus.band_of("M08"), corpus.band_of("CF02")) == ("control", "high", None)
    with pytest.raises(CorpusError, match="no speaker 'm8' \\(did you mean 'M08'\\?\\)"):
        corpus.select(["m8"])
