"""Posteriors that other tools exported: every layout, what is made of them, and the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from exported_logits import (
    CONFIG,
    Rows,
    one,
    rows_of,
    run,
    write_folder,
    write_npz,
    write_pt,
    write_safetensors,
)
from made_targets import RATE_HZ, TOKENIZER, write_corpus
from tiny_corpus import tiny_config
from xded.cli.import_teachers import import_teachers as command
from xded.corpus.folds import make_fold
from xded.corpus.manifest import Corpus, Recording, write_manifest
from xded.errors import CorpusError, LeakageError, TokenizerError
from xded.models.checkpoints import sha256_of
from xded.targets.aggregate import dense
from xded.targets.store import Store, TargetError, read_index
from xded.teachers.adapt import Teachers, parts_of
from xded.teachers.aggregation import make_targets
from xded.teachers.import_checks import scale_of
from xded.teachers.imported import import_teachers
from xded.teachers.posteriors import KINDS
from xded.tokenizer import Tokenizer
from xded.training.job import Job
from xded.training.run import fit


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """T1, T2 and T3 say twelve words twice."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def own(corpus: Corpus) -> dict[str, Rows]:
    """What T1's teacher says of T1's recordings."""
    return rows_of(corpus.select(speakers=["T1"]))


# --- what is stored ----------------------------------------------------------------------------------------------


def test_the_study_s_files_become_stores_that_say_what_they_are(
    corpus: Corpus, own: dict[str, Rows], tmp_path: Path
) -> None:
    logits = write_pt(tmp_path / "logits", "T1", own, corpus)
    found = one(run(logits, corpus, tmp_path / "out", heard=["T3"]))
    assert found.findings == []
    for stream in found.streams:
        assert (stream.recordings, stream.matched, stream.stored, stream.right) == (24, 24, 24, 24)
        assert stream.scales == {"logits": 24}
        assert 0.5 < stream.top < 1.0
    for kind, rows in own.items():
        store = Store(tmp_path / "out" / "posteriors" / "T1" / kind)
        index, file = store.index, logits / "T1" / f"T1_{kind}_logits.pt"
        assert index.teacher_forced == (kind == "decoder")
        assert index.frame_rate_hz == (25.0 if kind == "ctc" else None)
        assert (index.tokenizer, index.temperature) == (TOKENIZER.fingerprint, 2.0)
        assert index.teacher_hashes == {"T1": sha256_of(file)}
        assert [sorted(p.speakers) for p in index.provenance] == [["T1", "T3"]]
        assert {r.recording: r.audio_sha256 for r in corpus.select(["T1"])} == {
            e.recording: e.audio_sha256 for e in index.recordings
        }
        for name, values in rows.items():
            soft = torch.softmax(torch.from_numpy(values) / 2.0, 1).numpy()
            np.testing.assert_allclose(dense(store.read(name), TOKENIZER.size), soft, atol=1e-3)
            assert store.entry(name).true_log_prob > -1.0
    blank = torch.softmax(torch.from_numpy(own["ctc"]["T1_BAD_1"]), 1).numpy()[:, TOKENIZER.blank]
    least = Store(tmp_path / "out" / "posteriors" / "T1" / "ctc").read("T1_BAD_1").least_blank
    np.testing.assert_allclose(least, blank, atol=1e-3)
    assert Tokenizer.load(tmp_path / "out" / "tokenizer.model", "upper").fingerprint == TOKENIZER.fingerprint


@pytest.mark.parametrize("write", [write_pt, write_safetensors, write_folder])
def test_every_layout_says_the_same(
    write: Callable[..., Path], corpus: Corpus, own: dict[str, Rows], tmp_path: Path
) -> None:
    more = (corpus,) if write is write_pt else ()
    run(write_npz(tmp_path / "npz", "T1", own), corpus, tmp_path / "first")
    own = own if write is write_folder else {"decoder": own["decoder"]}  # torch starts slowly
    found = one(run(write(tmp_path / "other", "T1", own, *more), corpus, tmp_path / "second"))
    assert found.findings == []
    for kind, rows in own.items():
        stores = [Store(tmp_path / out / "posteriors" / "T1" / kind) for out in ("first", "second")]
        for name in rows:
            first, second = (dense(store.read(name), TOKENIZER.size) for store in stores)
            np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("suffix", ["pt", "npy"])
def test_one_stacked_array_is_read_where_all_lengths_agree(corpus: Corpus, tmp_path: Path, suffix: str) -> None:
    three = [r for r in corpus.select(["T1"]) if len(TOKENIZER.encode(r.text)) == 4]
    rows = rows_of(three)["decoder"]
    folder = write_pt(tmp_path / "logits", "T1", {"decoder": rows}, corpus) / "T1"
    stacked = np.stack(list(rows.values()))
    if suffix == "pt":
        torch.save(torch.from_numpy(stacked), folder / "T1_decoder_logits.pt")
    else:
        (folder / "T1_decoder_logits.pt").unlink()
        np.save(folder / "T1_decoder_logits.npy", stacked)
    (stream,) = one(run(tmp_path / "logits", corpus, tmp_path / "out")).streams
    assert (stream.stored, stream.right) == (len(three), len(three))
    assert set(stream.missing) == {r.recording for r in corpus.select(["T1"])} - set(rows)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("scale", ["log-probabilities", "probabilities"])
def test_normalised_values_give_the_same_posteriors(
    corpus: Corpus, own: dict[str, Rows], tmp_path: Path, scale: str, dtype: Any
) -> None:
    run(write_npz(tmp_path / "logits", "T1", own), corpus, tmp_path / "first")
    function = torch.softmax if scale == "probabilities" else torch.log_softmax
    other = {
        k: {n: function(torch.from_numpy(a), 1).numpy().astype(dtype) for n, a in v.items()} for k, v in own.items()
    }
    found = one(run(write_npz(tmp_path / "other", "T1", other), corpus, tmp_path / "second"))
    assert [s.scales for s in found.streams] == [{scale: 24}, {scale: 24}]
    stores = [Store(tmp_path / out / "posteriors" / "T1" / "ctc") for out in ("first", "second")]
    for name in own["ctc"]:
        first, second = (dense(store.read(name), TOKENIZER.size) for store in stores)
        np.testing.assert_allclose(first, second, atol=3e-3)


def test_scales_are_told_apart() -> None:
    logits = np.random.default_rng(0).normal(0, 2, (5, 9)).astype(np.float32)
    log_probs = torch.log_softmax(torch.from_numpy(logits), 1).numpy()
    assert scale_of(logits) == "logits"
    assert scale_of(logits - 30) == "logits"
    assert scale_of(log_probs) == "log-probabilities"
    assert scale_of(np.exp(log_probs)) == "probabilities"
    assert scale_of(np.exp(log_probs) / 2) == "neither"
    assert scale_of(np.zeros((5, 9), np.float32)) == "neither"


def test_a_ctc_head_without_start_and_end_fits_a_tokenizer_that_appends_them(corpus: Corpus, tmp_path: Path) -> None:
    """As of NeMo: V pieces and the blank behind them."""
    letters = sorted({letter for text in corpus.texts for letter in text})
    tokenizer = Tokenizer.from_bytes("\n".join(letters).encode(), "upper", "pieces")
    assert (tokenizer.blank, tokenizer.size) == (len(letters), len(letters) + 4)
    said: dict[str, Rows] = {"ctc": {}}
    for r in corpus.select(["T1"]):
        frames = np.zeros((round(r.duration * RATE_HZ), len(letters) + 1), np.float32)
        frames[:, tokenizer.blank] = 5
        frames[range(2, 2 + 2 * len(r.text), 2), tokenizer.encode(r.text)] = 9
        said["ctc"][r.recording] = frames
    logits = write_npz(tmp_path / "logits", "T1", said)
    (stream,) = one(import_teachers(logits, corpus, tokenizer, CONFIG, tmp_path / "out")).streams
    assert (stream.stored, stream.right) == (24, 24)
    posterior = dense(Store(tmp_path / "out" / "posteriors" / "T1" / "ctc").read("T1_BAD_1"), tokenizer.size)
    assert posterior[:, tokenizer.blank + 1 :].max() == 0.0


# --- what is made of it ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teachers(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Teachers:
    """Every speaker's teacher, each of its own speaker's recordings: as in the reference study."""
    folder = tmp_path_factory.mktemp("imported")
    for number, speaker in enumerate(corpus.speakers):
        write_npz(folder / "logits", speaker, rows_of(corpus.select(speakers=[speaker]), number))
    found = run(folder / "logits", corpus, folder / "out")
    assert [i.teacher for i in found if not i.problem and not i.findings] == ["T1", "T2", "T3"]
    return Teachers(folder / "out")


def fold_config(heard: str, **sections: Any) -> Any:
    target = {"top_k": 99, "heard": heard}
    return tiny_config(fold={"held_out": ("T3",), "validation_fraction": 0.2}, target=target, **sections)


def targets_of(corpus: Corpus, teachers: Teachers, config: Any, out: Path) -> dict[Any, Any]:
    fold = make_fold(corpus, config.fold)
    return make_targets(corpus, teachers, fold, parts_of(corpus, fold, config).train, config, out)


def test_imported_teachers_give_targets_that_a_student_learns_from(
    corpus: Corpus, teachers: Teachers, tmp_path: Path
) -> None:
    kd = {"objective": {"decoder_kd": 1.0}, "targets": tmp_path / "targets"}
    config = fold_config("same_prompt", **kd, train={"stages": [{"epochs": 3, "peak_lr": 1e-2}]})
    made = targets_of(corpus, teachers, config, tmp_path / "targets")
    fold = make_fold(corpus, config.fold)
    parts = parts_of(corpus, fold, config)
    assert list(made) == ["decoder"]
    assert made["decoder"].teacher_forced
    assert made["decoder"].teachers == ("T1", "T2")  # T3 is held out
    assert made["decoder"].effective_teachers == 2.0
    assert {e.recording for e in made["decoder"].recordings} == {r.recording for r in parts.train}
    test_takes = frozenset(r.take for r in parts.test)
    job = Job("student", config, parts.train, parts.validation, fold, test_takes, TOKENIZER, tmp_path / "run")
    fit(job, quiet=True)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [row["decoder_kd"] for row in map(json.loads, lines) if "decoder_kd" in row]
    assert losses, lines[:2]
    assert losses[-1] < losses[0]


def test_frames_of_the_study_are_targets_of_their_own_recordings_only(
    corpus: Corpus, teachers: Teachers, tmp_path: Path
) -> None:
    made = targets_of(corpus, teachers, fold_config("same_audio"), tmp_path)
    weights = {e.recording: e.weight for e in made["ctc"].recordings}
    assert all(weight == {name[:2]: 1.0} for name, weight in weights.items())
    name = next(iter(weights))
    target, said = (
        dense(s.read(name), TOKENIZER.size) for s in (Store(tmp_path / "ctc"), Store(tmp_path / "posteriors/T1/ctc"))
    )
    np.testing.assert_allclose(target, said, atol=2e-3)


def test_teachers_that_heard_the_same_audio_are_averaged_frame_by_frame(corpus: Corpus, tmp_path: Path) -> None:
    for number, speaker in enumerate(("T1", "T2")):
        write_npz(tmp_path / "logits", speaker, rows_of(corpus.recordings, number))
    run(tmp_path / "logits", corpus, tmp_path / "out")
    made = targets_of(corpus, Teachers(tmp_path / "out"), fold_config("same_audio"), tmp_path / "targets")
    assert made["ctc"].effective_teachers == made["decoder"].effective_teachers == 2.0


def test_a_teacher_that_has_heard_the_held_out_speaker_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    for speaker in ("T1", "T2"):
        write_npz(tmp_path / "logits", speaker, rows_of(corpus.select(speakers=[speaker])))
    run(tmp_path / "logits", corpus, tmp_path / "out", heard=["T3"])
    with pytest.raises(LeakageError, match=r"teacher T1 .* has heard held-out speaker T3"):
        targets_of(corpus, Teachers(tmp_path / "out"), fold_config("same_prompt"), tmp_path / "targets")
    assert not (tmp_path / "targets").exists()
    with pytest.raises(CorpusError, match="no speaker 'T33'"):
        run(tmp_path / "logits", corpus, tmp_path / "out", heard=["T33"])


def test_targets_at_another_temperature_or_of_other_audio_are_refused(
    corpus: Corpus, teachers: Teachers, tmp_path: Path
) -> None:
    with pytest.raises(TargetError, match="imported at temperature 2; the objective says 4"):
        targets_of(corpus, teachers, fold_config("same_prompt", objective={"temperature": 4.0}), tmp_path / "targets")
    changed = [
        r.model_copy(update={"audio_sha256": "0" * 64}) if r.take == "T1_BAD_1" else r for r in corpus.recordings
    ]
    with pytest.raises(TargetError, match="'T1_BAD_1' describes other audio"):
        targets_of(
            replace(corpus, recordings=tuple(changed)), teachers, fold_config("same_prompt"), tmp_path / "targets"
        )


def test_frames_alone_are_no_targets_of_other_recordings(corpus: Corpus, own: dict[str, Rows], tmp_path: Path) -> None:
    run(write_npz(tmp_path / "logits", "T1", {"ctc": own["ctc"]}), corpus, tmp_path / "out")
    with pytest.raises(TargetError, match="CTC posteriors only") as error:
        targets_of(corpus, Teachers(tmp_path / "out"), fold_config("same_prompt"), tmp_path / "targets")
    assert "--heard same_audio" in error.value.remedy


def test_what_is_there_is_kept_until_files_or_settings_change(
    corpus: Corpus, own: dict[str, Rows], tmp_path: Path
) -> None:
    logits = write_npz(tmp_path / "logits", "T1", own)
    first = run(logits, corpus, tmp_path / "out")
    index = tmp_path / "out" / "posteriors" / "T1" / "ctc" / "index.json"
    written = index.stat().st_mtime_ns
    assert run(logits, corpus, tmp_path / "out") == first
    assert index.stat().st_mtime_ns == written
    run(logits, corpus, tmp_path / "out", tiny_config(objective={"temperature": 3.0}))
    assert read_index(index.parent).temperature == 3.0
    other = Tokenizer.train(["ABCDEF", "GH"], "char", 64, "upper")
    with pytest.raises(TokenizerError, match="another tokenizer"):
        import_teachers(logits, corpus, other, CONFIG, tmp_path / "out")


# --- the command -------------------------------------------------------------------------------------------------


def test_the_command_prints_a_row_a_file_and_every_finding(
    corpus: Corpus, own: dict[str, Rows], tmp_path: Path
) -> None:
    app = typer.Typer()
    app.command()(command)
    (tmp_path / "tokenizer.model").write_bytes(TOKENIZER.model_bytes)
    write_npz(tmp_path / "logits", "T1", own)
    cut = {"decoder": {n: a[:-1] for n, a in rows_of(corpus.select(["T2"]))["decoder"].items()}}
    write_npz(tmp_path / "logits", "T2", cut)
    for kind in KINDS:
        shutil.copy(tmp_path / "logits" / f"T1_{kind}_logits.npz", tmp_path / "logits" / f"T3_{kind}_logits.npz")
    arguments = [tmp_path / "logits", "--corpus", corpus.path, "--tokenizer", tmp_path / "tokenizer.model", "--out"]
    shown = CliRunner().invoke(app, [*map(str, arguments), str(tmp_path / "out"), "--jobs", "1"])
    assert shown.exit_code == 3, shown.output
    cells = [line.split() for line in shown.output.splitlines()]
    assert ["T1", "decoder*", "24", "0", "100.0", "100.0"] in [row[:6] for row in cells]
    assert ["T2", "decoder*", "24", "24", "-", "-"] in [row[:6] for row in cells]
    said = " ".join(shown.output.split())
    assert "T1 = T3" in said
    assert "having heard its own speaker, and nobody else" in said
    again = CliRunner().invoke(app, [*map(str, arguments), str(tmp_path / "out"), "--jobs", "1", "--json"])
    values = json.loads(again.stdout)
    assert [row["teacher"] for row in values["teachers"]] == ["T1", "T2", "T3"]
    assert values["teachers"][0]["files"][1]["teacher_forced"] is True
    assert {f["check"] for f in values["findings"]} >= {"frame-count", "copied-teacher"}


# --- the reference study -----------------------------------------------------------------------------------------


def test_the_study_s_metadata_with_made_logits(shared: Path, tmp_path: Path) -> None:
    """Real ids, words, frame counts and tokenizer; about 30 recordings each of M08 and F03, X-RAY among them."""
    tokenizer = Tokenizer.load(shared / "reference" / "tokenizer.model", "upper_no_punctuation")
    as_exported = Tokenizer.load(shared / "reference" / "tokenizer.model", "upper")
    recordings, random = [], np.random.default_rng(0)
    for speaker in ("M08", "F03"):
        metadata = json.loads((shared / "reference" / "teacher_metadata" / f"{speaker}_metadata.json").read_text())
        rows = list(zip(metadata["utterance_ids"], metadata["target_words"], metadata["ctc_frame_lens"], strict=True))
        rows = [row for place, row in enumerate(rows) if place % 60 == 0 and "-" not in row[1]] + [
            next(row for row in rows if row[1] == "X-RAY")
        ]
        below = tmp_path / "logits" / speaker / speaker
        below.mkdir(parents=True)
        keys = ("utterance_ids", "target_words", "ctc_frame_lens")
        columns = dict(zip(keys, map(list, zip(*rows, strict=True)), strict=True))
        (below / f"{speaker}_metadata.json").write_text(
            json.dumps({**metadata, **columns, "num_utterances": len(rows)})
        )
        ctc, decoder = [], []
        for name, word, frames in rows:
            tokens = as_exported.encode(word)
            steps = random.normal(0, 1, (len(tokens) + 1, 5000))
            steps[range(len(tokens) + 1), [*tokens, 2]] += 12
            decoder.append(torch.tensor(steps, dtype=torch.float32))
            said = random.normal(0, 1, (frames, 5000))
            said[:, 0] += 12
            said[range(5, 5 + 2 * len(tokens), 2), tokens] += 24  # blanks between
            ctc.append(torch.tensor(said, dtype=torch.float32))
            row = {"audio_filepath": tmp_path / f"{name}.wav", "duration": frames / 25, "text": word, "recording": name}
            who = {
                "speaker": speaker,
                "take": name,
                "prompt": word,
                "audio_sha256": name.encode().hex().ljust(64, "0")[:64],
            }
            recordings.append(Recording.model_validate({**row, **who}))
        torch.save(decoder, below / f"{speaker}_decoder_logits.pt")
        if speaker == "M08":
            torch.save(ctc, below / f"{speaker}_ctc_logits.pt")
    write_manifest(tmp_path / "manifest.jsonl", recordings)
    corpus = Corpus(tmp_path / "manifest.jsonl", tuple(recordings))
    imported = import_teachers(tmp_path / "logits", corpus, tokenizer, tiny_config(), tmp_path / "out")
    assert [len(found.streams) for found in imported] == [1, 2]
    for found in imported:
        lost = [r.recording for r in recordings if r.text == "X-RAY" and r.speaker == found.teacher]
        stream = found.streams[-1]
        assert stream.left_out == {"length": lost}  # without the hyphen it has one token less
        assert stream.right == stream.ended == stream.stored == stream.recordings - 1 > 25
        assert [(f.check, f.severity) for f in found.findings if f.severity != "note"] == [("frame-count", "warn")]
    frames = imported[1].streams[0]
    assert (frames.left_out, frames.right) == ({}, frames.recordings)
