"""The doctor on corpora, bare lists, and on what runs have heard: real files with one fault each."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from tiny_corpus import SAMPLE_RATE, WORDS, write_corpus
from xded.config import build
from xded.corpus import checks, fsdd, nemo_manifest
from xded.corpus.folds import Provenance
from xded.corpus.manifest import Recording, read_corpus, write_manifest
from xded.corpus.synthetic import make_embedded_corpus
from xded.doctor import corpora
from xded.doctor.given import Given
from xded.doctor.listings import read_listing, recognise
from xded.doctor.run_folder import RunFolder
from xded.errors import CorpusError
from xded.findings import Examination
from xded.models.checkpoints import save
from xded.models.recogniser import describe
from xded.scoring import Prediction, write_predictions
from xded.teachers.adapt import Teachers
from xded.tokenizer import Tokenizer

SPEAKERS = ("t1", "t2", "t3", "t4")


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus", controls=("c1",), targets=SPEAKERS, takes=4)


def lines_of(corpus):
    return [json.loads(line) for line in corpus.path.read_text().splitlines()]


def rewrite(corpus, change):
    """The manifest with every line changed; no line where the change returns None."""
    rows = [row for line in lines_of(corpus) if (row := change(line)) is not None]
    corpus.path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def examined(*paths, **given):
    examination, everything = Examination(), Given(**given)
    for path in paths:
        found = corpora.read_leniently(path, examination)
        if found is not None:
            everything.corpora.append(found)
    corpora.examine(examination, everything)
    json.dumps(examination.to_dict())
    return examination


def seen(examination):
    return [(finding.check, finding.severity) for finding in examination.findings]


def passed(examination):
    return {line.check for line in examination.passed}


# --- healthy corpora -------------------------------------------------------------------------------------------------


def test_a_healthy_corpus_passes_every_check(corpus):
    examination = examined(corpus.path.parent)
    assert (seen(examination), examination.unchecked) == ([], [])
    assert passed(examination) == {
        "audio-files", "truncated-copy", "shared-takes", "labels", "wrong-audio", "duplicates", "sample-rate",
        "silence", "clipping", "unspellable",
    }  # fmt: skip
    assert any(line.detail == "80 of 80 opened" for line in examination.passed)


def test_the_embedded_corpus_is_healthy(tmp_path):
    make_embedded_corpus(tmp_path, controls=1, targets=2, words=8, takes=2)
    assert seen(examined(tmp_path)) == []


def test_real_corpora_are_healthy(shared, tmp_path):
    nemo = nemo_manifest.find(shared / "data" / "asc16" / "recordings.jsonl")
    checks.store(checks.check(*fsdd.find(shared / "data" / "fsdd")), tmp_path / "fsdd")
    (tmp_path / "asc16").mkdir()
    write_manifest(tmp_path / "asc16" / "manifest.jsonl", [Recording(**vars(found)) for found in nemo[0]])
    for name in ("fsdd", "asc16"):
        examination = examined(tmp_path / name)
        assert (seen(examination), examination.unchecked) == ([], [])
    assert any("600 of 2,560 opened; 'xded corpus check" in line.detail for line in examination.passed)


# --- manifests that read_corpus refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "check", "count"),
    [
        (
            lambda row: row | {"audio_filepath": f"gone/{row['take']}.wav"} if row["speaker"] == "t1" else row,
            "audio-files",
            16,
        ),
        (lambda row: row | {"duration": -1} if row["speaker"] == "t1" else row, "audio-files", 16),
        (lambda row: row | {"recording": "same"} if row["text"] == "AB" else row, "duplicates", 19),
        (lambda row: row | {"take": "same"} if row["text"] in ("AB", "BAD") else row, "labels", 36),
        (lambda row: row | {"role": "control"} if row["recording"] == "t2_AB_1" else row, "labels", 1),
    ],
)
def test_a_refused_manifest_becomes_findings_and_the_rest_is_checked(corpus, change, check, count):
    rewrite(corpus, change)
    with pytest.raises(CorpusError):
        read_corpus(corpus.path)
    examination = examined(corpus.path)
    finding = examination.findings[0]
    assert (finding.check, finding.severity, finding.evidence["lines"]) == (check, "refuse", count)
    assert "line " in finding.what
    assert {"silence", "clipping", "truncated-copy"} <= passed(examination)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "no manifest can be read"),
        ("", "holds no recordings"),
        ('{"audio_filepath": "a.wav", "text": "A", "duration": 1}\n', "xded corpus import nemo"),
        ("[1, 2]\n", "none of its 1 lines is a recording"),
    ],
)
def test_what_is_no_manifest_is_said(tmp_path, text, why):
    path = tmp_path / "manifest.jsonl"
    if text is not None:
        path.write_text(text)
    examination = examined(path)
    assert examination.findings == []
    assert why in examination.unchecked[0].why


def test_manifests_are_recognised_by_their_first_line(tmp_path, corpus):
    other = tmp_path / "predictions.jsonl"
    other.write_text('{"recording": "a"}\n')
    binary = tmp_path / "x.jsonl"
    binary.write_bytes(bytes(range(256)))
    assert [corpora.is_manifest(path) for path in (corpus.path, other, binary, tmp_path)] == [True, False, False, False]


# --- audio -----------------------------------------------------------------------------------------------------------


def sound(corpus, speaker, change, rate=SAMPLE_RATE):
    """One speaker's files, changed on disk."""
    for row in corpus.recordings:
        if row.speaker == speaker:
            samples, _ = soundfile.read(row.audio_filepath)
            soundfile.write(row.audio_filepath, change(samples), rate, subtype="PCM_16")


@pytest.mark.parametrize(
    ("change", "check", "severity"),
    [
        (lambda samples: 0 * samples, "silence", "refuse"),
        (lambda samples: np.clip(9 * samples, -1, 1), "clipping", "warn"),
        (lambda samples: samples[: len(samples) // 2], "audio-files", "refuse"),
    ],
)
def test_one_speakers_bad_files_are_found(corpus, change, check, severity):
    sound(corpus, "t2", change)
    examination = examined(corpus.path)
    assert seen(examination) == [(check, severity)]
    assert examination.findings[0].evidence["speakers"] == {"t2": 16}


def test_a_rate_that_is_not_the_declared_one_is_found(corpus):
    rewrite(corpus, lambda row: row | {"sample_rate": SAMPLE_RATE})
    sound(corpus, "t2", lambda samples: samples[::2], SAMPLE_RATE // 2)
    finding = examined(corpus.path).findings[0]
    assert (finding.check, finding.severity, finding.evidence["bad"]) == ("sample-rate", "refuse", 16)


def test_copied_files_are_found_by_their_bytes(corpus):
    own = {row.recording: row.audio_filepath for row in corpus.recordings}
    own["t1_AB_1"].write_bytes(own["t1_AB_0"].read_bytes())
    rewrite(corpus, lambda row: {**row, "duration": soundfile.info(own[row["recording"]]).duration})
    assert seen(examined(corpus.path)) == [("duplicates", "warn")]
    for row in corpus.recordings:  # the study's: everybody is the first speaker, under everybody's names
        if row.speaker != "c1":
            row.audio_filepath.write_bytes(own[f"t1_{row.prompt}_{row.recording[-1]}"].read_bytes())
    rewrite(corpus, lambda row: {**row, "duration": soundfile.info(own[row["recording"]]).duration})
    examination = examined(corpus.path)
    assert seen(examination)[0] == ("wrong-audio", "refuse")
    assert examination.findings[0].evidence["speakers"] == list(SPEAKERS)


def test_files_of_the_first_speaker_for_all_come_first(corpus):
    """In the manifest: other findings follow from it and stand below."""
    rewrite(corpus, lambda row: {**row, "audio_filepath": row["audio_filepath"].replace(row["speaker"], "t1")})
    examination = examined(corpus.path)
    assert seen(examination)[0] == ("wrong-audio", "refuse")
    assert examination.findings[0].evidence["wrong"] == 64


def test_the_sample_is_even_over_speakers_and_repeatable(corpus):
    rows = corpus.recordings
    first = corpora.open_some(rows, 10)
    assert sorted(row.speaker for row, _, _ in first) == sorted(("c1", *SPEAKERS) * 2)
    assert [row for row, _, _ in first] == [row for row, _, _ in corpora.open_some(rows, 10)]


def test_files_left_out_at_the_import_are_said(corpus):
    row = {"status": "rejected", "audio_filepath": "a.wav", "reason": "silent.", "remedy": "", "kind": "silent"}
    report = corpus.path.parent / checks.REPORT_NAME
    report.write_text(json.dumps(row) + "\n")
    assert seen(examined(corpus.path)) == [("audio-files", "note")]
    report.write_text("{half a li")
    examination = examined(corpus.path)
    assert seen(examination) == []
    assert "check.jsonl cannot be read" in examination.unchecked[0].why


# --- lines -----------------------------------------------------------------------------------------------------------


def test_a_take_for_every_microphone_is_found(corpus):
    copies = [
        row | {"recording": f"{row['recording']}_{mic}", "take": f"{row['take']}_{mic}", "mic": mic,
               "audio_filepath": f"{mic}/{row['audio_filepath']}"}
        for row in lines_of(corpus) for mic in ("M1", "M2")
    ]  # fmt: skip
    sources = [row.audio_filepath for row in corpus.recordings for _ in range(2)]
    for row, source in zip(copies, sources, strict=True):
        path = corpus.path.parent / row["audio_filepath"]
        path.parent.mkdir(exist_ok=True)
        samples, _ = soundfile.read(source)
        soundfile.write(path, samples * (0.5 if row["mic"] == "M2" else 1.0), SAMPLE_RATE, subtype="PCM_16")
    corpus.path.write_text("".join(json.dumps(row) + "\n" for row in copies))
    examination = examined(corpus.path)
    assert seen(examination) == [("shared-takes", "warn")]
    assert (examination.findings[0].evidence["takes"], examination.findings[0].evidence["spoken"]) == (160, 80)


def test_texts_too_long_for_ctc_are_found(corpus):
    rewrite(corpus, lambda row: row | ({"duration": 0.06} if row["recording"] == "t1_BAD_0" else {}))
    alone = examined(corpus.path)
    assert ("unspellable", "refuse") in seen(alone)  # letter by letter
    tokenizer = Tokenizer.train(WORDS, "char", 64, "upper")
    with_tokenizer = examined(corpus.path, tokenizers={corpus.path: tokenizer})
    found = next(f for f in with_tokenizer.findings if f.check == "unspellable")
    assert (found.evidence["recordings"], found.evidence["examples"]) == (1, ["t1_BAD_0"])


# --- bare lists ------------------------------------------------------------------------------------------------------


def metadata(folder, speaker="M08", words=("D1", "D2", "LA"), mics=(2, 3), **changes):
    ids = [f"{speaker}_B3_{word}_M{mic}" for word in words for mic in mics]
    texts = {"D1": "ONE", "D2": "TWO", "LA": "ALPHA"}
    row = {
        "model_name": speaker, "num_utterances": len(ids), "utterance_ids": ids,
        "target_words": [texts.get(name.split("_")[2], "WORD") for name in ids], "token_lens": [1.0] * len(ids),
        "ctc_frame_lens": [40 + len(name) for name in ids],
    }  # fmt: skip
    path = folder / f"{speaker}_metadata.json"
    path.write_text(json.dumps(row | changes))
    return path


def test_a_list_says_what_it_knows(tmp_path):
    path = metadata(tmp_path, words=("D1", "UW7"))
    assert recognise(path)
    listing = read_listing(path)
    assert (listing.speaker, len(listing.recordings), listing.declared) == ("M08", 4, 4)
    last = listing.recordings[-1]
    assert (last.recording, last.take, last.prompt) == ("M08_B3_UW7_M3", "M08_B3_UW7", "B3_UW7")
    assert (last.block, last.mic, last.word_type, last.frames, last.duration) == ("B3", "M3", "UW", 53, 2.12)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_words": ["ONE"]}, "lists of different lengths"),
        ({"utterance_ids": "M08"}, "utterance_ids"),
        ({"utterance_ids": [], "target_words": [], "ctc_frame_lens": []}, "it lists no recordings"),
        ({"model_name": None}, "model_name"),
    ],
)
def test_a_malformed_list_is_an_error_for_people(tmp_path, changes, said):
    with pytest.raises(CorpusError, match=said):
        read_listing(metadata(tmp_path, **changes))


def test_half_a_list_and_other_files(tmp_path):
    path = metadata(tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    assert recognise(path)
    with pytest.raises(CorpusError, match="Invalid JSON"):
        read_listing(path)
    other = tmp_path / "scores.json"
    other.write_text('{"predictions": [{"utterance_id": 1}]}')
    assert not recognise(other)
    assert not recognise(tmp_path)


def test_lists_are_examined_together(tmp_path):
    healthy = [read_listing(metadata(tmp_path, speaker)) for speaker in ("M08", "M09", "F02")]
    examination = examined(listings=healthy)
    assert (seen(examination), examination.unchecked) == ([], [])
    mislabelled = metadata(tmp_path, "M01", model_name="F05", num_utterances=9)
    again = json.loads(mislabelled.read_text())
    again["utterance_ids"][1] = again["utterance_ids"][0]
    again["target_words"][0] = again["target_words"][1] = "TWO"
    mislabelled.write_text(json.dumps(again))
    examination = examined(listings=[*healthy, read_listing(mislabelled)])
    assert seen(examination) == [
        ("wrong-audio", "refuse"), ("labels", "refuse"), ("truncated-copy", "warn"), ("duplicates", "warn"),
    ]  # fmt: skip
    assert "The list is F05's, and 6 of its 6 recordings are of M01." in examination.findings[0].what


def test_the_studys_lists_have_one_fault(shared):
    files = sorted((shared / "reference" / "teacher_metadata").glob("*.json"))
    examination = examined(listings=[read_listing(path) for path in files if recognise(path)])
    assert [(f.check, f.subject, f.evidence["recordings"]) for f in examination.findings] == [
        ("truncated-copy", "F03", 169)
    ]


# --- runs ------------------------------------------------------------------------------------------------------------


def run_of(corpus, out, heard=None, takes=None, held_out="t4", provenance=(), **fold):
    """A run folder that trained on t1 to t3 and held t4 out."""
    out.mkdir(parents=True, exist_ok=True)
    meant = dict.fromkeys(("t1", "t2", "t3"), 12)
    heard = meant if heard is None else heard
    side = {"meant": meant, "heard": heard, "files": sum(heard.values()), "strangers": 0}
    known = {"train": "0", "validation": "1"}
    by_side = {name: [r.take for r in corpus.recordings if r.speaker in meant and r.take[-1] == number]
               for name, number in known.items()}  # fmt: skip
    by_side["test"] = [r.take for r in corpus.recordings if r.speaker == held_out]
    data = {"train": side, "takes": {**by_side, **(takes or {})}}
    config = build({"fold": {"held_out": [held_out], **fold}}, "the test")
    tokenizer = Tokenizer.train(WORDS, "char", 64, "upper")
    save({"model_state_dict": {}, **describe(tokenizer, config, "student", tuple(provenance))}, out / "best.pt")
    return RunFolder(out, config=config, data=data, checkpoints={"best.pt": out / "best.pt"})


HONEST = Provenance("student", frozenset({"t1", "t2", "t3"}), frozenset({"t1_AB_0"}))


def test_a_healthy_run_passes(corpus, tmp_path):
    run = run_of(corpus, tmp_path / "run", provenance=[HONEST])
    examination = examined(corpus.path, runs=[run])
    assert (seen(examination), examination.unchecked) == ([], [])
    assert any(line.check == "leakage" and line.detail == "2 sources, 16 test takes" for line in examination.passed)


def test_a_checkpoint_alone_says_what_it_heard_and_brings_its_tokenizer(corpus, tmp_path):
    leaky = Provenance("student", frozenset({"t1", "t4"}), frozenset({"t4_AB_0"}))
    path = run_of(corpus, tmp_path / "run", provenance=[leaky]).checkpoints["best.pt"]
    rewrite(corpus, lambda row: row | ({"duration": 0.06} if row["recording"] == "t1_BAD_0" else {}))
    examination = examined(corpus.path, runs=[RunFolder(path, checkpoints={"best.pt": path})])
    found = {finding.check: finding for finding in examination.findings}
    assert found["leakage"].evidence["speakers"] == ["t4"]
    assert f"(tokenizer of {path})" in found["unspellable"].what


def test_a_run_that_heard_one_voice(corpus, tmp_path):
    examination = examined(runs=[run_of(corpus, tmp_path / "run", heard={"t1": 36}, provenance=[HONEST])])
    assert seen(examination) == [("wrong-audio", "refuse")]
    assert "t1 was heard 36 times (12 meant)" in examination.findings[0].what


def test_an_included_speaker_that_was_never_added(corpus, tmp_path):
    run = run_of(corpus, tmp_path / "run", provenance=[HONEST], include_held_out=True)
    examination = examined(runs=[run])
    assert seen(examination) == [("wrong-audio", "refuse")]
    assert "t4 should be included" in examination.findings[0].what


@pytest.mark.parametrize("where", ["checkpoint", "data", "targets"])
def test_leakage_anywhere_is_found(corpus, tmp_path, where):
    parent = Provenance("parent", frozenset({"t4"}), frozenset({"t4_AB_0", "t4_AB_1"}))
    leaky = {"t1": 12, "t2": 12, "t3": 12, "t4": 3}
    run = run_of(
        corpus, tmp_path / "run", provenance=[HONEST, *([parent] if where == "checkpoint" else [])],
        heard=leaky if where == "data" else None,
    )  # fmt: skip
    stores = []
    if where == "targets":
        run.config = run.config.model_copy(update={"targets": tmp_path / "targets"})
        other_fold = SimpleNamespace(folder=tmp_path / "others" / "ctc", index=SimpleNamespace(provenance=[parent]))
        own = SimpleNamespace(folder=tmp_path / "targets" / "ctc", index=SimpleNamespace(provenance=[parent]))
        assert seen(examined(runs=[run], stores=[other_fold])) == []
        stores = [own]
    examination = examined(runs=[run], stores=stores)
    finding = next(f for f in examination.findings if f.check == "leakage")
    assert (finding.severity, finding.evidence["speakers"]) == ("refuse", ["t4"])
    assert finding.evidence["test_takes"] == (0 if where == "data" else 2)


def test_a_split_across_microphones_is_found_in_the_data_card(corpus, tmp_path):
    takes = {"train": ["t1_B1_AB_M1"], "validation": ["t1_B1_AB_M2"]}
    run = run_of(corpus, tmp_path / "run", takes=takes, provenance=[HONEST])
    assert seen(examined(runs=[run])) == []  # the names tell nothing by themselves
    uaspeech = {"train": ["M01_B1_D1_M2", "M01_B1_D2_M3"], "validation": ["M01_B1_D1_M3"]}
    run = run_of(corpus, tmp_path / "run", takes=uaspeech, provenance=[HONEST])
    examination = examined(runs=[run])
    assert seen(examination) == [("shared-takes", "refuse")]
    assert "1 of 1 validation takes are in training too, 1 of them under another id" in examination.findings[0].what


def test_what_a_run_does_not_say_is_noted(corpus, tmp_path):
    bare = RunFolder(tmp_path)
    odd = run_of(corpus, tmp_path / "odd", provenance=[HONEST])
    odd.data = {"train": {"meant": "everybody"}}
    broken = run_of(corpus, tmp_path / "broken")
    (tmp_path / "broken" / "best.pt").write_bytes(b"no checkpoint")
    silent = run_of(corpus, tmp_path / "silent", provenance=[HONEST], include_held_out=True)
    silent.data, silent.checkpoints = None, {}
    examination = examined(runs=[bare, odd, broken, silent])
    assert examination.findings == []
    said = " ".join(f"{line.what}: {line.why}" for line in examination.unchecked)
    for part in ("no data.json", "of another shape (train.meant", "best.pt is damaged", "neither a checkpoint nor"):
        assert part in said


def predictions(corpus, takes):
    return [
        Prediction(r.recording, r.take, r.speaker, None, None, r.prompt, r.text, r.text, (1,))
        for r in corpus.recordings if r.take in takes
    ]  # fmt: skip


def test_training_on_the_teachers_test_takes_is_found(corpus, tmp_path):
    folder = tmp_path / "teachers"
    (folder / "crosstest").mkdir(parents=True)
    parent = run_of(corpus, folder / "parent", provenance=[HONEST])
    own = run_of(corpus, folder / "teachers" / "t1", provenance=[HONEST])
    student = run_of(corpus, tmp_path / "student", provenance=[HONEST])
    other_fold = run_of(corpus, tmp_path / "other", provenance=[HONEST], held_out="c1")
    other_fold.data["takes"] = {"train": student.data["takes"]["validation"]}
    tested = [*student.data["takes"]["validation"], *student.data["takes"]["test"]]
    for teacher in ("t1", "t2"):
        write_predictions(folder / "crosstest" / f"{teacher}.jsonl", predictions(corpus, tested))
    (folder / "tokenizer.model").write_bytes(Tokenizer.train(WORDS, "char", 64, "upper").model_bytes)
    runs = [parent, own, student, other_fold]
    examination = examined(teachers=[Teachers(folder)], runs=runs)
    assert (seen(examination), examination.unchecked) == ([], [])
    student.data["takes"]["train"] += student.data["takes"]["validation"][:5]
    student.data["takes"]["validation"] = []
    (folder / "crosstest" / "t3.jsonl").write_text("half a line")
    examination = examined(teachers=[Teachers(folder)], runs=runs)
    assert seen(examination) == [("teacher-test-block", "warn")]
    assert examination.findings[0].what.startswith("5 of the 28 takes that 2 teachers were tested on")
    assert "t3.jsonl" in examination.unchecked[0].what
