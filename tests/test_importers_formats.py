"""Corpora of other toolkits: TORGO, Kaldi, SpeechBrain, Lhotse, Hugging Face; read, written, and read back."""

from __future__ import annotations

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from xded.corpus import hugging_face_dataset, kaldi, lhotse, nemo_manifest, speechbrain_csv, torgo, uaspeech
from xded.corpus.checks import Candidate, Row, check, store
from xded.corpus.exporting import WRITERS, write
from xded.corpus.manifest import Corpus, Recording, read_corpus, write_manifest
from xded.errors import ConfigError, CorpusError

Found = tuple[list[Candidate], list[Row]]


def tone(path: Path, seconds: float = 0.25, rate: int = 16_000, channels: int = 1) -> Path:
    """A sine with noise that depends on the file's name: no two files are alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(zlib.crc32(str(path).encode())).standard_normal(int(seconds * rate))
    wave = 0.3 * np.sin(2 * np.pi * 300 * np.arange(len(noise)) / rate) + 0.01 * noise
    soundfile.write(path, np.repeat(wave[:, None], channels, axis=1), rate, subtype="PCM_16")
    return path


def imported(found: Found, out: Path) -> Corpus:
    """The corpus that `xded corpus import` makes; nothing may be rejected."""
    report = check(*found)
    assert report.rows == ()
    return read_corpus(store(report, out))


def reasons(rows: Iterable[Row]) -> str:
    return "\n".join(f"{row.reason} {row.remedy}" for row in rows)


# --- TORGO --------------------------------------------------------------------------------------------------


def write_torgo(folder: Path) -> Path:
    prompts = {"0001": "stick", "0002": "[say Ah-P-Eee repeatedly]", "0003": "tear [as in tear up that paper]",
               "0004": "The quick brown fox jumps.", "0005": "input/images/farm.jpg", "0006": "xxx"}  # fmt: skip
    for speaker in ("F/F01", "M/M05", "FC/FC01"):
        session = folder / speaker / "Session1"
        for number, text in prompts.items():
            (session / "prompts").mkdir(parents=True, exist_ok=True)
            (session / "prompts" / f"{number}.txt").write_text(f"{text}\n")
            for mic in ("headMic", "arrayMic"):
                tone(session / f"wav_{mic}" / f"{number}.wav")
    tone(folder / "F" / "F01" / "Session1" / "wav_headMic" / "0099.wav")
    (folder / "F" / "F01" / "Session1" / "phn_headMic").mkdir()
    return folder


def test_torgo_keeps_words_and_both_microphones(tmp_path: Path) -> None:
    candidates, rows = torgo.find(write_torgo(tmp_path / "TORGO"))
    report = check(candidates, rows)
    by_id = {r.recording: r for r in report.kept}
    assert len(by_id) == 3 * 2 * 2
    head, array = by_id["F01_Session1_0001_headMic"], by_id["F01_Session1_0001_arrayMic"]
    assert head.take == array.take == "F01_Session1_0001"
    assert (head.text, head.prompt, head.mic, head.block) == ("stick", "STICK", "headMic", "Session1")
    assert by_id["F01_Session1_0003_headMic"].text == "tear"  # what stands in brackets is not read aloud
    assert by_id["FC01_Session1_0001_headMic"].role == "control"
    kinds = [row.kind for row in report.rejected]
    assert {kind: kinds.count(kind) for kind in kinds} == {"no word": 18, "sentence": 6, "no text": 1}
    read_corpus(store(report, tmp_path / "out"))


def test_torgo_sentences_when_asked_and_speakers_without_group_folders(tmp_path: Path) -> None:
    write_torgo(tmp_path)
    candidates, _ = torgo.find(tmp_path / "F", sentences=True)
    assert {c.text for c in candidates} == {"stick", "tear", "The quick brown fox jumps."}
    assert {c.speaker for c in candidates} == {"F01"}
    with pytest.raises(CorpusError, match="Session"):
        torgo.find(tmp_path / "nowhere")


# --- Kaldi --------------------------------------------------------------------------------------------------


def write_kaldi(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("wav_scp", "wav.scp")).write_text(text)
    return folder


def test_kaldi_folder(tmp_path: Path) -> None:
    one, two = tone(tmp_path / "wav" / "a 1.wav"), tone(tmp_path / "data" / "b.wav")
    folder = write_kaldi(
        tmp_path / "data", wav_scp=f"anna-1 {one}\nben-2 b.wav\n", text="anna-1 turn  left\nben-2 YES\n",
        utt2spk="anna-1 anna\nben-2 ben\n", utt2uniq="anna-1 t7\nben-2 ben-2\n", spk2gender="anna f\nben m\n",
    )  # fmt: skip
    corpus = imported(kaldi.find(folder), tmp_path / "out")
    first, second = corpus.recordings
    assert (first.recording, first.speaker, first.text, first.take) == ("anna-1", "anna", "turn  left", "t7")
    assert (first.audio_filepath, second.audio_filepath) == (one, two)


def test_kaldi_commands_are_never_run(tmp_path: Path) -> None:
    mark, good = tmp_path / "ran", tone(tmp_path / "a.wav")
    folder = write_kaldi(
        tmp_path / "d",
        wav_scp=f"a-1 {good}\na-2 touch {mark}; sox x.flac -t wav - |\na-3 |touch {mark}\na-4 raw.ark:17\na-5\n"
        f"a-1 {good}\na-6 gone.wav\na-7 {good}\na-8 {good}\n",
        text="a-1 YES\na-2 NO\na-3 NO\na-4 NO\na-6 NO\na-8 NO\na-9 NO\n",
        utt2spk="".join(f"a-{i} a\n" for i in range(1, 8)),
    )
    report = check(*kaldi.find(folder))
    assert [r.recording for r in report.kept] == ["a-1"]
    said = reasons(report.rejected)
    for part in ("line 2: a-2: 'touch", "commands are never run. Run it once yourself", "line 3: a-3: '|touch",
                 "line 4: a-4: 'raw.ark:17' lies in an archive", "line 5: nothing stands behind 'a-5'",
                 "line 6: 'a-1' stands in line 1 too", "gone.wav cannot be read",
                 "line 8: a-7 is not in text. Add it there",
                 "line 9: a-8 is not in utt2spk. Add it there",
                 "a-9 is not in wav.scp"):  # fmt: skip
        assert part in said
    assert {r.kind for r in report.rejected if r.reason and " is not in " in r.reason} >= {"no text", "no speaker"}
    assert not mark.exists()


def test_kaldi_segments_must_be_whole_files(tmp_path: Path) -> None:
    """Lhotse, for one, writes a segment for every whole file."""
    for name in ("a", "b"):
        tone(tmp_path / f"{name}.wav")
    folder = write_kaldi(
        tmp_path, wav_scp="rec a.wav\nlong b.wav\n", text="".join(f"s-{i} YES\n" for i in range(1, 7)),
        utt2spk="".join(f"s-{i} s\n" for i in range(1, 7)),
        segments="s-1 rec 0.00 0.25\ns-2 long 0 0.1\ns-3 long 0.1 0.2\ns-4 gone 0 1\ns-5 rec x 1\n",
    )  # fmt: skip
    report = check(*kaldi.find(folder))
    assert [(r.recording, r.audio_filepath.name) for r in report.kept] == [("s-1", "a.wav")]
    said = reasons(report.rejected)
    for part in ("b.wav lasts 0.250 s; 0.100 s is declared", "segments, line 3: s-3 is a part of a longer file",
                 "line 4: s-4 is cut from gone", "line 5: s-5 has no start",
                 "text, line 6: s-6 is not in segments"):  # fmt: skip
        assert part in said
    (folder / "text").unlink()
    with pytest.raises(CorpusError, match="holds no text"):
        kaldi.find(folder)


def recording(path: Path, name: str, speaker: str, text: str, **more: Any) -> Recording:
    base = {"audio_filepath": tone(path), "duration": 0.25, "recording": name, "speaker": speaker, "text": text}
    return Recording.model_validate({**base, "take": name, "prompt": text, "sample_rate": 16_000, **more})


def test_kaldi_is_written_sorted_as_kaldi_wants(tmp_path: Path) -> None:
    b, capital = (recording(tmp_path / f"{s}.wav", name, s, "X") for s, name in (("b", "7_b"), ("B", "8_B")))
    write_manifest(tmp_path / "manifest.jsonl", [b, capital])
    corpus = read_corpus(tmp_path)
    write(corpus, "kaldi", tmp_path / "kaldi")
    lines = (tmp_path / "kaldi" / "utt2spk").read_text().splitlines()
    assert lines == ["B-8_B B", "b-7_b b"]  # LC_ALL=C: capitals first; ids begin with the speaker
    assert (tmp_path / "kaldi" / "spk2utt").read_text().splitlines() == ["B B-8_B", "b b-7_b"]
    assert (tmp_path / "kaldi" / "utt2uniq").read_text().splitlines() == ["B-8_B 8_B", "b-7_b 7_b"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"recording": "a b"}, "no white space: a b"),
        ({"speaker": "a\tb"}, "no white space"),
        ({"text": "YES\nb-1 NO"}, "no line breaks: r1"),
    ],
)
def test_what_kaldi_cannot_hold_is_refused(tmp_path: Path, changes: dict[str, str], problem: str) -> None:
    r = recording(tmp_path / "1.wav", "r1", "s", "YES").model_copy(update=changes)
    with pytest.raises(CorpusError, match=problem):
        kaldi.write(Corpus(tmp_path, (r,)), tmp_path / "out")
    fine = {"recording": "r1", "speaker": "s", "text": "YES"}
    piped = r.model_copy(update={**fine, "audio_filepath": Path("touch y |")})
    with pytest.raises(CorpusError, match="take these paths for commands"):
        kaldi.write(Corpus(tmp_path, (piped,)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- SpeechBrain --------------------------------------------------------------------------------------------


def write_csv(path: Path, columns: Sequence[str], *rows: Sequence[object]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_speechbrain_csv_in_any_order_of_columns(tmp_path: Path) -> None:
    tone(tmp_path / "audio" / "M08" / "M08_B3_C10_M5.wav")
    tone(tmp_path / "audio" / "M08" / "M08_B3_C10_M6.wav")
    path = write_csv(
        tmp_path / "M08.csv", ["wrd", "ID", "wav", "duration", "spk_id"],
        ["LINE", "M08_B3_C10_M5", "$data_root/M08/M08_B3_C10_M5.wav", "0.25", "M08"],
        ["LINE", "M08_B3_C10_M6", "$data_root/M08/M08_B3_C10_M6.wav", 0.25, "M08"],
    )  # fmt: skip
    corpus = imported(speechbrain_csv.find(path, root=tmp_path / "audio"), tmp_path / "out")
    first, second = corpus.recordings
    assert first.take == second.take == "M08_B3_C10"  # UASpeech's names tell: microphones are no takes of their own
    assert (first.prompt, first.mic, first.band, first.word_type, first.block) == ("C10", "M5", "high", "C", "B3")
    with pytest.raises(CorpusError, match=r"placeholder \$data_root.* --root"):
        speechbrain_csv.find(path)
    with pytest.raises(CorpusError, match="no column who; its columns are wrd, ID, wav, duration, spk_id"):
        speechbrain_csv.find(path, speaker_key="who")


def test_speechbrain_lines_that_cannot_be_used(tmp_path: Path) -> None:
    good = tone(tmp_path / "a.wav")
    path = write_csv(
        tmp_path / "x.csv", ["ID", "duration", "wav", "start", "spk_id", "wrd"],
        ["a", "0.25", "a.wav", "", "s", "YES, PLEASE"], ["b", "x", "a.wav", "", "s", "NO"],
        ["c", "0.25", "a.wav", "1.5", "s", "NO"], ["d", "0.25", "a.wav"], ["e", "0.25", "a.wav", "", "", "NO"],
        ["f", "7.5", str(good), "", "s", "NO"], ["g", "1", "a\0.wav", "", "s", "NO"],
    )  # fmt: skip
    report = check(*speechbrain_csv.find(path))
    assert [(r.recording, r.text) for r in report.kept] == [("a", "YES, PLEASE")]
    said = reasons(report.rejected)
    for part in ("line 3: 'duration' is 'x'", "line 4: c is a part of a longer file", "line 5: 6 columns are named",
                 "line 6: 'speaker' is empty", "a.wav lasts 0.250 s; 7.500 s is declared",
                 "line 8: the path holds a zero byte"):  # fmt: skip
        assert part in said
    (tmp_path / "x.csv").write_text('ID,duration,wav,spk_id,wrd\na,1,a.wav,s,"YES')
    with pytest.raises(CorpusError, match="cannot be read as CSV"):
        speechbrain_csv.find(path)


# --- Lhotse -------------------------------------------------------------------------------------------------


def cut(source: str, **changes: Any) -> dict[str, Any]:
    """A cut as Lhotse 1.33 writes it."""
    made = {
        "id": "rec-1-0", "start": 0.0, "duration": 0.25, "channel": 0,
        "supervisions": [{"id": "sup-1", "recording_id": "rec-1", "start": 0.0, "duration": 0.25, "channel": 0,
                          "text": "Yes", "language": "English", "speaker": "anna", "custom": {"take": "t3"}}],
        "recording": {"id": "rec-1", "sources": [{"type": "file", "channels": [0], "source": source}],
                      "sampling_rate": 16000, "num_samples": 4000, "duration": 0.25, "channel_ids": [0]},
        "custom": {"band": "mid"}, "type": "MonoCut",
    }  # fmt: skip
    return {**made, **changes}


def write_cuts(path: Path, *cuts: dict[str, Any]) -> Path:
    text = "".join(json.dumps(c) + "\n" for c in cuts)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["cuts.jsonl", "cuts.jsonl.gz"])
def test_lhotse_cuts(tmp_path: Path, name: str) -> None:
    audio = tone(tmp_path / "a.wav")
    corpus = imported(lhotse.find(write_cuts(tmp_path / name, cut("a.wav"))), tmp_path / "out")
    (r,) = corpus.recordings
    assert (r.recording, r.speaker, r.text, r.take, r.band) == ("rec-1-0", "anna", "Yes", "t3", "mid")
    assert (r.audio_filepath, r.sample_rate) == (audio, 16_000)


def test_lhotse_cuts_that_are_no_whole_files(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    tone(tmp_path / "a.wav")
    made = cut("a.wav")
    sources = [
        [{"type": "command", "channels": [0], "source": f"touch {mark}"}],
        [{"type": "url", "channels": [0], "source": "http://localhost/a.wav"}],
        [{"type": "file", "channels": [0, 1], "source": "a.wav"}],
        [{"type": "shar", "channels": [0], "source": ""}],
        [{"type": "file", "channels": [0], "source": "a.wav"}] * 2,
    ]
    bad = [cut("a.wav", recording={**made["recording"], "sources": s}) for s in sources]
    bad += [cut("a.wav", start=0.1, duration=0.1), cut("a.wav", supervisions=[]), {"id": "m", "type": "MixedCut"},
            cut("a.wav", recording={**made["recording"], "transforms": [{"name": "Speed"}]}), {"id": "x"},
            cut("a.wav", supervisions=[{"text": "Yes"}]), cut("a.wav", start=float("nan"))]  # fmt: skip
    candidates, rows = lhotse.find(write_cuts(tmp_path / "cuts.jsonl", *bad))
    assert candidates == []
    said = reasons(rows)
    for part in ("line 1: cut 'rec-1-0' has its audio from command", "line 2: cut 'rec-1-0' has its audio from url",
                 "line 3: cut 'rec-1-0' lies in a file of 2 channels", "line 4", "audio from file, file",
                 "line 6: cut 'rec-1-0' is a part of a longer file", "line 7: cut 'rec-1-0' has 0 supervisions",
                 "line 8: a MixedCut", "line 9: cut 'rec-1-0' is changed", "line 10: 'start'",
                 "line 11: key 'speaker' is missing", "line 12: 'start'", "save_audios"):  # fmt: skip
        assert part in said
    assert not mark.exists()
    (tmp_path / "cuts.jsonl.gz").write_bytes(b"\x1f\x8b\x08 cut short")
    with pytest.raises(CorpusError, match="cannot be read"):
        lhotse.find(tmp_path / "cuts.jsonl.gz")


# --- Hugging Face -------------------------------------------------------------------------------------------


def table(folder: Path, names: Sequence[str], **more: list[Any]) -> pyarrow.Table:
    """Rows as `datasets` stores them, with its features in the schema's metadata."""
    sounds = [{"bytes": tone(folder / name).read_bytes(), "path": name} for name in names]
    columns: dict[str, Any] = {
        "audio": pyarrow.array(sounds, pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
        "sentence": [Path(name).stem.upper() for name in names],
        "who": [i % 2 for i in range(len(names))],
        **more,
    }
    features = {"audio": {"_type": "Audio"}, "who": {"names": ["anna", "ben"], "_type": "ClassLabel"}}
    made = pyarrow.table(columns)
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def save_to_disk(folder: Path, rows: pyarrow.Table) -> Path:
    folder.mkdir(parents=True)
    name = "data-00000-of-00001.arrow"
    with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, rows.schema) as stream:
        stream.write_table(rows, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}], "_fingerprint": "0"}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def parquet(folder: Path, rows: pyarrow.Table) -> Path:
    (folder / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(rows, folder / "data" / "train-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("make", [save_to_disk, parquet])
def test_arrow_and_parquet(tmp_path: Path, make: Callable[[Path, pyarrow.Table], Path]) -> None:
    names = ["yes.wav", "no.wav", "left.flac"]
    source = make(tmp_path / "set", table(tmp_path / "src", names))
    found = hugging_face_dataset.find(source, tmp_path / "out", "who", "sentence")
    corpus = imported(found, tmp_path / "out")
    assert [(r.recording, r.text, r.speaker) for r in corpus.recordings] == [
        ("yes", "YES", "anna"), ("no", "NO", "ben"), ("left", "LEFT", "anna"),
    ]  # fmt: skip
    for r, name in zip(corpus.recordings, names, strict=True):
        assert r.audio_filepath == tmp_path / "out" / "audio" / name
        assert r.audio_filepath.read_bytes() == (tmp_path / "src" / name).read_bytes()


def test_all_splits_of_a_dataset_dict_and_ids_that_are_no_file_names(tmp_path: Path) -> None:
    one = table(tmp_path / "src", ["yes.wav"], id=["../../x/1"], take=["t1"])
    two = table(tmp_path / "src", ["no.wav"], id=["x/1"], take=["t2"])
    save_to_disk(tmp_path / "set" / "train", one)
    save_to_disk(tmp_path / "set" / "test", two)
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    found = hugging_face_dataset.find(tmp_path / "set", tmp_path / "out", "who", "sentence")
    corpus = imported(found, tmp_path / "out")
    assert {(r.recording, r.take) for r in corpus.recordings} == {("../../x/1", "t1"), ("x/1", "t2")}
    assert all(r.audio_filepath.parent == tmp_path / "out" / "audio" for r in corpus.recordings)


def test_rows_and_folders_that_cannot_be_used(tmp_path: Path) -> None:
    rows = table(tmp_path / "src", ["yes.wav", "no.wav", "up.wav"]).to_pydict()
    rows["audio"][0]["bytes"], rows["audio"][1] = b"ID3 is mp3", {"bytes": None, "path": None}
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    made = pyarrow.table({**rows, "audio": pyarrow.array(rows["audio"], kind)})
    source = parquet(tmp_path / "set", made)
    candidates, refused = hugging_face_dataset.find(source, tmp_path / "out", "who", "sentence")
    assert [(c.recording, c.speaker) for c in candidates] == [("up", "0")]  # a number without names stays one
    said = reasons(refused)
    assert "line 1: the audio of yes begins with b'ID3 '; WAV and FLAC are read" in said
    assert "has neither bytes nor a path" in said
    assert [path.name for path in (tmp_path / "out" / "audio").iterdir()] == ["up.wav"]
    with pytest.raises(CorpusError, match="no column speaker, text; its columns are audio, sentence, who"):
        hugging_face_dataset.find(source, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()
    next(source.rglob("*.parquet")).write_bytes(b"PAR1 cut short")
    with pytest.raises(CorpusError, match="cannot be read"):
        hugging_face_dataset.find(source, tmp_path / "out", "who", "sentence")
    with pytest.raises(CorpusError, match=r"holds no state\.json"):
        hugging_face_dataset.find(tmp_path / "src", tmp_path / "out")


@pytest.mark.parametrize("content", ["{}", "[", '{"_data_files": [{"filename": "../secret.arrow"}]}'])
def test_a_state_that_points_elsewhere_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(CorpusError, match=r"state\.json"):
        hugging_face_dataset.find(tmp_path, tmp_path / "out")


def test_a_damaged_arrow_file_is_an_error(tmp_path: Path) -> None:
    source = save_to_disk(tmp_path / "set", table(tmp_path / "src", ["yes.wav", "no.wav"]))
    file = next(source.glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CorpusError, match="cannot be read"):
        hugging_face_dataset.find(source, tmp_path / "out", "who", "sentence")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = parquet(tmp_path / "set", table(tmp_path / "src", ["yes.wav"]))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"xded\[arrow\]"):
        hugging_face_dataset.find(source, tmp_path / "out", "who", "sentence")


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_audiofolder(tmp_path: Path, suffix: str) -> None:
    for name in ("train/a.wav", "train/b.wav", "c.wav"):
        tone(tmp_path / "set" / name)
    rows = [{"file_name": name, "text": "YES", "speaker": 7} for name in ("a.wav", "b.wav", "gone.wav")]
    path = tmp_path / "set" / "train" / f"metadata.{suffix}"
    if suffix == "csv":
        write_csv(path, list(rows[0]), *(list(row.values()) for row in rows))
    else:
        path.write_text("\n".join([*map(json.dumps, rows), "{", '{"file_name": "a.wav"}']))
    candidates, bad = hugging_face_dataset.find(tmp_path / "set", tmp_path / "out")
    report = check(candidates, bad)
    assert [(r.recording, r.speaker) for r in report.kept] == [("train_a", "7"), ("train_b", "7")]
    assert len(report.rejected) == (1 if suffix == "csv" else 3)


def test_an_audiofolder_does_not_overwrite_the_audio_that_it_is_made_of(tmp_path: Path) -> None:
    audio = tmp_path / "set" / "audio"
    rows = [recording(audio / "b.wav", "a", "ann", "yes"), recording(audio / "a.wav", "b", "ann", "no")]  # crosswise
    before = {row.audio_filepath: row.audio_filepath.read_bytes() for row in rows}
    with pytest.raises(CorpusError, match="where the corpus has its own audio: a, b"):
        hugging_face_dataset.write(Corpus(tmp_path / "manifest.jsonl", tuple(rows)), tmp_path / "set")
    assert {path: path.read_bytes() for path in before} == before


# --- there and back -----------------------------------------------------------------------------------------

READERS: dict[str, Callable[[Path, Path], Found]] = {
    "nemo": lambda folder, out: nemo_manifest.find(folder),
    "kaldi": lambda folder, out: kaldi.find(folder),
    "speechbrain": lambda folder, out: speechbrain_csv.find(folder / "recordings.csv"),
    "lhotse": lambda folder, out: lhotse.find(folder / "cuts.jsonl"),
    "datasets": hugging_face_dataset.find,
}
NOT_KEPT = {"kaldi": {"prompt", "block", "mic", "role", "band", "word_type"}, "datasets": {"audio_filepath"}}


def there_and_back(corpus: Corpus, to: str, folder: Path) -> None:
    write(corpus, to, folder / "there")
    again = imported(READERS[to](folder / "there", folder / "back"), folder / "back")
    lost = NOT_KEPT.get(to, set())
    assert {r.recording: r.model_dump(exclude=lost) for r in again.recordings} == {
        r.recording: r.model_dump(exclude=lost) for r in corpus.recordings
    }


def test_every_writer_has_a_reader() -> None:
    assert READERS.keys() == WRITERS.keys()


@pytest.mark.parametrize("to", READERS)
def test_there_and_back_with_microphones_bands_and_unusual_texts(tmp_path: Path, to: str) -> None:
    takes = {"take": "t1", "prompt": "P 1", "role": "control", "block": "B1", "word_type": "D"}
    rows = [
        recording(tmp_path / "1.wav", "anna_1_M2", "anna", 'say "yes", ça va', mic="M2", **takes),
        recording(tmp_path / "2.wav", "anna_1_M3", "anna", 'say "yes", ça va', mic="M3", **takes),
        recording(tmp_path / "3 x.wav", "ben_1", "ben", "it's $5", band="very_low"),
        recording(tmp_path / "4.wav", "ben_2", "ben", "1", band="very_low"),
    ]
    write_manifest(tmp_path / "manifest.jsonl", rows)
    corpus = imported(nemo_manifest.find(tmp_path), tmp_path / "corpus")  # with the files' hashes
    there_and_back(corpus, to, tmp_path / to)


@pytest.mark.parametrize("to", READERS)
def test_real_words_there_and_back(tmp_path: Path, shared: Path, to: str) -> None:
    source = shared / "data" / "asc16" / "recordings.jsonl"
    if not source.is_file():
        pytest.skip(f"{source} is absent")
    candidates, rows = nemo_manifest.find(source)
    corpus = imported((candidates[::20], rows), tmp_path / "corpus")
    assert len(corpus.recordings) == 128
    there_and_back(corpus, to, tmp_path / to)


def test_uaspeech_there_and_back_keeps_what_its_names_tell(tmp_path: Path) -> None:
    """Kaldi has no place for microphones and bands; the names tell them again."""
    names = ("M08_B3_C10_M5", "M08_B3_C10_M6", "CF02_B1_UW7_M2")
    rows = []
    for name in names:
        match = uaspeech.NAME.fullmatch(name)
        assert match is not None
        facts = uaspeech.facts(match)
        rows.append(recording(tmp_path / f"{name}.wav", name, match["speaker"], facts["prompt"].lower(), **facts))
    write_manifest(tmp_path / "manifest.jsonl", rows)
    corpus = imported(nemo_manifest.find(tmp_path), tmp_path / "corpus")
    write(corpus, "kaldi", tmp_path / "kaldi")
    again = imported(kaldi.find(tmp_path / "kaldi"), tmp_path / "again")
    assert sorted(again.recordings, key=lambda r: r.recording) == sorted(corpus.recordings, key=lambda r: r.recording)
