import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import xlwt

from xded.corpus import fsdd, nemo_manifest, speaker_folders, uaspeech
from xded.corpus.checks import check, store
from xded.corpus.manifest import read_corpus
from xded.errors import CorpusError

SHARED = Path(__file__).resolve().parents[2] / "shared"
METADATA = SHARED / "reference" / "teacher_metadata"
WORDS = {
    "D1": "one",
    "LA": "Alpha",
    "C10": "Sentence",
    "CW95": "Write",
    "B1_UW7": "Naturalization",
    "B3_UW7": "Frugality",
}
NAMES = [
    "M08/M08_B1_D1_M2", "M08/M08_B1_D1_M5", "M08/M08_B1_LA_M2", "M08/M08_B3_C10_M2", "M08/M08_B3_CW95_M2",
    "M08/M08_B1_UW7_M2", "M08/M08_B3_UW7_M2", "F03/F03_B3_D1_M7", "control/CF02/CF02_B2_CW95_M8",
]  # fmt: skip


def write_audio(path, sample_rate=16_000):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(zlib.crc32(str(path).encode())).standard_normal(sample_rate // 10)
    soundfile.write(path, 0.1 * noise, sample_rate)


def write_workbook(path, words, sheet="Word_filename", header=("WORD", "FILE NAME")):
    book = xlwt.Workbook()
    book.add_sheet("Speaker")
    page = book.add_sheet(sheet)
    for row, pair in enumerate([header, *((word, key) for key, word in words.items())]):
        for column, value in enumerate(pair):
            page.write(row, column, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(str(path))


def write_uaspeech(folder, names=NAMES, words=WORDS):
    for name in names:
        write_audio(folder / "audio" / f"{name}.wav")
    write_workbook(folder / "speaker_wordlist.xls", words)
    return folder


def imported(found, out):
    candidates, rows = found
    report = check(candidates, rows)
    return read_corpus(store(report, out)), report


def test_uaspeech_names_words_roles_and_bands(tmp_path):
    corpus, report = imported(uaspeech.find(write_uaspeech(tmp_path)), tmp_path / "out")
    assert report.rows == ()
    by_id = {r.recording: r for r in corpus.recordings}
    assert set(by_id) == {name.split("/")[-1] for name in NAMES}
    uncommon = by_id["M08_B3_UW7_M2"]
    assert (uncommon.text, uncommon.prompt, uncommon.block, uncommon.word_type) == ("FRUGALITY", "B3_UW7", "B3", "UW")
    assert by_id["M08_B1_UW7_M2"].text == "NATURALIZATION"
    radio = by_id["M08_B1_LA_M2"]
    assert (radio.text, radio.prompt, radio.word_type, radio.mic) == ("ALPHA", "LA", "L", "M2")
    assert [by_id[f"M08_{name}"].word_type for name in ("B1_D1_M2", "B3_C10_M2", "B3_CW95_M2")] == ["D", "C", "CW"]
    assert by_id["M08_B1_D1_M2"].take == by_id["M08_B1_D1_M5"].take == "M08_B1_D1"
    assert (corpus.role_of("CF02"), corpus.role_of("M08")) == ("control", "target")
    assert [corpus.band_of(speaker) for speaker in ("CF02", "F03", "M08")] == [None, "very_low", "high"]
    assert all(r.audio_filepath.is_relative_to(tmp_path / "audio") for r in corpus.recordings)  # nothing is copied


def test_uaspeech_bands_are_those_of_the_corpus():
    sizes = {band: sum(value == band for value in uaspeech.BAND_OF.values()) for band in uaspeech.BAND_OF.values()}
    assert sizes == {"very_low": 4, "low": 3, "mid": 3, "high": 5}


def test_uaspeech_files_that_cannot_be_used_are_rows(tmp_path):
    names = [*NAMES, "M08/M08_B1_D2_M2", "M08/notes", "M08/M09_B1_D1_M2", "M08/M08_B4_D1_M2"]
    write_uaspeech(tmp_path, names)
    (tmp_path / "audio" / "M08" / "M08_B1_CW95_M2.wav").write_bytes(b"RIFF")
    write_audio(tmp_path / "audio" / "M08" / "M08_B2_CW95_M2.wav", 8_000)
    corpus, report = imported(uaspeech.find(tmp_path), tmp_path / "out")
    assert len(corpus.recordings) == len(NAMES)
    kinds = {row.audio_filepath.stem: row.kind for row in report.rejected}
    assert kinds == {
        "M08_B1_D2_M2": "no word", "notes": "name", "M09_B1_D1_M2": "name", "M08_B4_D1_M2": "name",
        "M08_B1_CW95_M2": "unreadable", "M08_B2_CW95_M2": "wrong rate",
    }  # fmt: skip
    assert "no row 'D2'" in next(row.reason for row in report.rows if row.kind == "no word")


def test_uaspeech_two_copies_of_the_audio_are_refused(tmp_path):
    write_uaspeech(tmp_path, ["original/M08/M08_B1_D1_M2", "noisereduce/M08/M08_B1_D1_M2"])
    with pytest.raises(CorpusError, match=r"M08_B1_D1_M2' is .*noisereduce.* and .*original"):
        check(*uaspeech.find(tmp_path))
    one, rows = uaspeech.find(tmp_path / "audio" / "original", tmp_path / "speaker_wordlist.xls")
    assert (len(one), rows) == (1, [])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "cannot be read as a workbook"),
        (lambda path: path.write_bytes(b"not a workbook" * 100), "cannot be read as a workbook"),
        (lambda path: write_workbook(path, WORDS, sheet="Words"), "sheet 'Word_filename'"),
        (lambda path: write_workbook(path, WORDS, header=("WORD", "KEY")), "'WORD' and 'FILE NAME' are expected"),
        (lambda path: write_workbook(path, {"D1": "one", "D1 ": "two"}), "row 3: 'D1' is both ONE and TWO"),
    ],
)
def test_uaspeech_workbook_errors_name_the_file(tmp_path, make, said):
    path = tmp_path / "list.xls"
    make(path)
    with pytest.raises(CorpusError) as caught:
        uaspeech.read_words(path)
    assert said in caught.value.problem
    assert str(path) in caught.value.problem


def test_uaspeech_without_audio_or_word_list(tmp_path):
    with pytest.raises(CorpusError, match=r"holds no \.wav files"):
        uaspeech.find(tmp_path)
    write_audio(tmp_path / "audio" / "M08" / "M08_B1_D1_M2.wav")
    with pytest.raises(CorpusError, match="--wordlist"):
        uaspeech.find(tmp_path)


def test_uaspeech_takes_every_real_id_and_word(tmp_path):
    """All 24,311 real ids of the reference study's speakers, with empty files; a sample of them with audio."""
    if not METADATA.is_dir():
        pytest.skip(f"{METADATA} is absent")
    words, texts = {}, {}
    for path in sorted(METADATA.glob("*_metadata.json")):
        data = json.loads(path.read_text())
        for name, word in zip(data["utterance_ids"], data["target_words"], strict=True):
            speaker, block, key, _ = name.split("_")
            words[f"{block}_{key}" if key.startswith("UW") else key] = word.lower()
            texts[name] = word
            audio = tmp_path / "audio" / speaker / f"{name}.wav"
            audio.parent.mkdir(parents=True, exist_ok=True)
            audio.touch()
    write_workbook(tmp_path / "speaker_wordlist.xls", words)
    sample = sorted(texts)[::800]
    for name in sample:
        write_audio(tmp_path / "audio" / name.split("_")[0] / f"{name}.wav")
    candidates, rows = uaspeech.find(tmp_path)
    assert rows == []
    assert {c.recording: c.text for c in candidates} == texts
    assert len(words) == 255
    assert {c.word_type for c in candidates} == {"D", "L", "C", "CW", "UW"}
    report = check(candidates)
    assert sorted(r.recording for r in report.kept) == sample
    assert len(report.rejected) == len(texts) - len(sample)


def test_fsdd_names_and_rate(tmp_path):
    for name in ("7_jackson_32", "0_theo_1"):
        write_audio(tmp_path / "recordings" / f"{name}.wav", 8_000)
    write_audio(tmp_path / "recordings" / "3_theo_1.wav", 16_000)
    write_audio(tmp_path / "recordings" / "x_theo_1.wav", 8_000)
    corpus, report = imported(fsdd.find(tmp_path), tmp_path / "out")
    assert [(r.text, r.speaker, r.prompt, r.sample_rate) for r in corpus.recordings] == [
        ("ZERO", "theo", "0", 8_000),
        ("SEVEN", "jackson", "7", 8_000),
    ]
    assert [(row.kind, row.audio_filepath.stem) for row in report.rows] == [
        ("name", "x_theo_1"),
        ("wrong rate", "3_theo_1"),
    ]
    with pytest.raises(CorpusError, match="holds no"):
        fsdd.find(tmp_path / "nowhere")


def write_nemo(folder, *rows):
    path = folder / "train.json"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_nemo_manifest_defaults_come_from_path_and_text(tmp_path):
    for name in ("s1/a", "s2/a"):
        write_audio(tmp_path / "wav" / f"{name}.wav")
    path = write_nemo(
        tmp_path,
        {"audio_filepath": "wav/s1/a.wav", "duration": 0.1, "text": "YES", "spk": 1, "lang": "en"},
        {"audio_filepath": str(tmp_path / "wav/s2/a.wav"), "duration": 0.1, "text": "NO", "spk": 2, "band": "mid",
         "take": "t9", "prompt": "no", "mic": "M3", "role": "control"},
    )  # fmt: skip
    corpus, report = imported(nemo_manifest.find(path, "spk"), tmp_path / "out")
    assert report.rows == ()
    first, second = corpus.recordings
    assert (first.recording, first.take, first.speaker, first.prompt, first.role) == (
        "s1_a", "s1_a", "1", "YES", "target",
    )  # fmt: skip
    assert (second.recording, second.take, second.prompt, second.mic, second.band, second.role) == (
        "s2_a", "t9", "no", "M3", "mid", "control",
    )  # fmt: skip
    with pytest.raises(CorpusError, match=r"no line has the key 'speaker'; keys of the first are .*spk"):
        nemo_manifest.find(path)


def test_nemo_lines_that_cannot_be_used_are_rows_with_their_number(tmp_path):
    write_audio(tmp_path / "a.wav")
    good = {"audio_filepath": "a.wav", "duration": 0.1, "text": "YES", "speaker": "s"}
    path = write_nemo(tmp_path, good, "{", {"text": "x"}, good | {"text": ""}, good | {"speaker": None, "x": 1},
                      good | {"duration": "?"}, good | {"audio_filepath": "b.wav"})  # fmt: skip
    corpus, report = imported(nemo_manifest.find(path), tmp_path / "out")
    assert len(corpus.recordings) == 1
    reasons = " ".join(row.reason for row in report.rejected)
    assert len(report.rejected) == 6
    for number in range(2, 7):
        assert f"{path}, line {number}: " in reasons
    assert "key 'speaker' is missing" in reasons
    assert "b.wav cannot be read" in reasons


def test_own_manifest_imports_as_a_nemo_manifest(tmp_path):
    """A manifest that we wrote goes through the importer unchanged."""
    corpus, _ = imported(uaspeech.find(write_uaspeech(tmp_path)), tmp_path / "one")
    again, _ = imported(nemo_manifest.find(corpus.path), tmp_path / "two")
    assert again.recordings == corpus.recordings


def test_speaker_folders_texts_and_misplaced_files(tmp_path):
    for name in ("anna/turn_left_01.flac", "ben/yes_2.wav", "ben/yes.wav", "loose_1.wav", "ben/old/yes_3.wav"):
        write_audio(tmp_path / "src" / name)
    candidates, rows = speaker_folders.find(tmp_path / "src")
    assert [(c.speaker, c.prompt, c.text, c.take) for c in candidates] == [
        ("anna", "turn_left", "TURN LEFT", "anna_turn_left_01"),
        ("ben", "yes", "YES", "ben_yes_2"),
    ]
    assert [row.audio_filepath.name for row in rows] == ["yes_3.wav", "yes.wav", "loose_1.wav"]
    for content in ('{"yes": "OUI"}', '{"prompt": "yes", "text": "OUI"}\n{"prompt": "yes", "text": "OUI"}\n'):
        (tmp_path / "texts").write_text(content)
        candidates, rows = speaker_folders.find(tmp_path / "src", tmp_path / "texts")
        assert [c.text for c in candidates] == ["OUI"]
        assert "no text for prompt 'turn_left'" in rows[0].reason


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"yes": 1}', '{"prompt":"a","text":"B"}\n{"prompt":"a","text":"C"}']
)
def test_wrong_texts_are_an_error(tmp_path, content):
    (tmp_path / "texts").write_text(content)
    with pytest.raises(CorpusError, match="texts"):
        speaker_folders.read_texts(tmp_path / "texts")


def test_real_digits():
    source = SHARED / "data" / "fsdd"
    if not source.is_dir():
        pytest.skip(f"{source} is absent")
    candidates, rows = fsdd.find(source)
    assert (len(candidates), rows) == (720, [])
    report = check(candidates[::6])
    assert (len(report.kept), report.rows) == (120, ())


def test_real_words_by_manifest_and_by_folder_agree(tmp_path):
    source = SHARED / "data" / "asc16"
    if not source.is_dir():
        pytest.skip(f"{source} is absent")
    listed, rows = nemo_manifest.find(source / "recordings.jsonl")
    assert (len(listed), rows) == (2_560, [])
    found, rows = speaker_folders.find(source, source / "recordings.jsonl")
    assert rows == []
    assert {(c.audio_filepath, c.text, c.prompt) for c in found} == {
        (c.audio_filepath, c.text, c.prompt) for c in listed
    }
    assert len({c.speaker for c in found}) == 16
    assert check(listed[::16]).rows == ()
