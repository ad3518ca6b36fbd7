"""Encoders that someone else has trained: started from, frozen, kept in checkpoints, and tested zero-shot."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from cli_calls import call, done, refused
from made_hugging_face import write_ctc, write_whisper
from tiny_corpus import job_for, write_corpus
from xded.cli.options import configured, resolved
from xded.corpus.manifest import Corpus
from xded.errors import CheckpointError, ConfigError
from xded.models.pretrained import begin_with, fitted, is_pretrained, open_pretrained, tokenizer_at
from xded.models.recogniser import load_recogniser
from xded.models.student import Student
from xded.tokenizer import Tokenizer
from xded.training.run import fit

ARCHIVE = Path(__file__).parent / "data" / "nemo_golden.nemo"
STAGES = [{"epochs": 1, "peak_lr": 1e-3, "freeze_encoder": True}, {"epochs": 1, "peak_lr": 1e-3}]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("tones"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of the library: a CTC model that hears waveforms, and a Whisper model."""
    root = tmp_path_factory.mktemp("hub")
    write_ctc(root / "wav2vec2", "wav2vec2")
    write_whisper(root / "whisper")
    return root


def encoder_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_recogniser(checkpoint).student.encoder.state_dict()


def test_sizes_and_features_are_those_of_the_archive_and_the_decoder_keeps_its_own() -> None:
    tree = resolved(configured(None, {"model.pretrained": ARCHIVE, "model.decoder_layers": 2}))
    assert (tree.model.width, tree.model.encoder_layers, tree.features.mels, tree.features.sample_rate) == (
        24, 2, 40, 8_000,
    )  # fmt: skip
    assert (tree.model.decoder_layers, tree.model.decoder_feed_forward) == (2, 88)


def test_an_encoder_of_a_named_size_gets_that_sizes_decoder(shared: Path) -> None:
    archive = shared / "data" / "nemo" / "random_conformer_small.nemo"
    if not archive.is_file():
        pytest.skip(f"{archive} is not there")
    tree = resolved(configured(None, {"model.pretrained": archive}))
    assert tree.model.decoder_feed_forward == 1024
    student = Student(tree.model, 5000, tree.features)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in student.named_children()}
    assert counts["encoder"] == 12_972_608
    assert sum(counts.values()) - counts["encoder"] == pytest.approx(5.1e6, rel=0.02)
    kept = fitted(configured(None, {"model.pretrained": archive, "model.decoder_feed_forward": 64}))
    assert kept.model.decoder_feed_forward == 64


@pytest.mark.parametrize("kind", ["nemo", "wav2vec2", "whisper"])
def test_a_run_begins_with_the_encoder_and_its_checkpoint_needs_the_original_no_more(
    kind: str, corpus: Corpus, hub: Path, tmp_path: Path
) -> None:
    source = tmp_path / ARCHIVE.name if kind == "nemo" else hub / kind
    if kind == "nemo":
        source.write_bytes(ARCHIVE.read_bytes())
    job = job_for(corpus, tmp_path / "run", model={"pretrained": source, "size": "micro"}, train={"stages": STAGES})
    job.config = fitted(job.config)
    before = open_pretrained(source).encoder
    best = fit(job, quiet=True)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["init"].startswith(f"encoder of {source}")
    passed = json.loads((tmp_path / "run" / "findings.json").read_text())["passed"]
    (leakage,) = (check["detail"] for check in passed if check["check"] == "leakage")
    assert f"not on record whom it has heard: pretrained encoder {source.name}" in leakage
    assert status["loaded"]["differing"] == []
    assert status["loaded"]["of"] == len(before)
    assert status["parameters"]["with_gradient"] == status["parameters"]["trainable"] > 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    frozen = [row for row in rows if row["event"] == "frozen"]
    assert frozen[0]["of"] == len(before)
    assert frozen[0]["moved"] == []
    if kind == "nemo":
        source.unlink()
    after = encoder_of(best)
    assert set(after) == set(before)
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    assert moved, "the second stage trains the encoder"


def test_the_own_head_is_used_only_with_the_own_tokenizer(corpus: Corpus, tmp_path: Path) -> None:
    found = open_pretrained(ARCHIVE)
    own = found.own_tokenizer()
    assert own is not None
    assert found.ctc_head is not None
    for tokenizer, heads in ((own, 2), (Tokenizer.train(corpus.texts, "char", 64, "upper"), 0)):
        tree = resolved(configured(None, {"model.pretrained": ARCHIVE}))
        student = Student(tree.model, tokenizer.size, tree.features)
        loaded = begin_with(student, found, tokenizer)
        assert len([name for name in loaded if name.startswith("ctc_head")]) == heads
        same = student.ctc_head.weight.shape[0] > 40 and torch.equal(
            student.ctc_head.weight[:41], found.ctc_head["weight"]
        )
        assert same == (heads == 2)


def test_an_own_head_with_another_blank_is_not_used() -> None:
    found = open_pretrained(ARCHIVE)
    own = found.own_tokenizer()
    assert own is not None
    tree = resolved(configured(None, {"model.pretrained": ARCHIVE}))
    student = Student(tree.model, own.size, tree.features)
    loaded = begin_with(student, dataclasses.replace(found, blank=0), own)
    assert not [name for name in loaded if name.startswith("ctc_head")]


@pytest.mark.parametrize("kind", ["nemo", "wav2vec2", "whisper"])
@pytest.mark.parametrize("closed", [False, True])
def test_zero_shot_on_a_fold_with_its_own_tokenizer(
    kind: str, closed: bool, corpus: Corpus, hub: Path, tmp_path: Path
) -> None:
    source = ARCHIVE if kind == "nemo" else hub / kind
    out = tmp_path / "zero.json"
    words = ["--word-list"] if closed else []
    done("evaluate", source, "--corpus", corpus.path, "--held-out", "t1", "--output", out, *words)
    scores = json.loads(out.read_text())
    assert "not on record" in scores["conditions"]
    assert scores["conditions"]["word_list"] == ("closed" if closed else "open")
    heads = ("attention decoder", "decoder greedy") if kind == "whisper" else ("CTC head", "ctc greedy")
    assert scores["conditions"]["decode"] == (f"word list, {heads[0]}" if closed else heads[1])
    rows = [json.loads(line) for line in (tmp_path / "zero.predictions.jsonl").read_text().splitlines()]
    assert {row["speaker"] for row in rows} == {"t1"}
    if closed:
        normalised = {text.lower() for text in corpus.texts}
        assert {row["hypothesis"].lower() for row in rows} <= normalised


def test_an_archive_hears_as_a_file_is_transcribed(corpus: Corpus) -> None:
    audio = corpus.recordings[0].audio_filepath
    said = done("transcribe", ARCHIVE, audio, "--json")
    assert json.loads(said.out)["tokens"] is not None


def test_a_decoder_that_is_not_there_is_not_decoded(corpus: Corpus, tmp_path: Path) -> None:
    asked = ("--corpus", corpus.path, "--held-out", "t1", "--decode", "decoder", "--output", tmp_path / "o.json")
    refused(call("evaluate", ARCHIVE, *asked), 2, "no attention decoder", "--decode ctc")


def test_an_archives_tokenizer_is_described_like_a_files(corpus: Corpus) -> None:
    own = open_pretrained(ARCHIVE).own_tokenizer("lower")
    assert own is not None
    said = json.loads(done("tokenizer", ARCHIVE, "--normaliser", "lower", "--json").out)
    assert (said["file"], said["fingerprint"]) == (str(ARCHIVE), own.fingerprint)


def test_a_folder_with_an_archive_in_it_names_it(tmp_path: Path) -> None:
    archive = tmp_path / "model.nemo"
    archive.touch()
    with pytest.raises(CheckpointError, match=r"Give the archive in it: .*model\.nemo"):
        open_pretrained(tmp_path)


def test_what_is_no_recogniser_is_said(corpus: Corpus, tmp_path: Path) -> None:
    refused(call("evaluate", ARCHIVE, "--corpus", corpus.path, "--held-out", "t1"), 2, "--output")
    refused(
        call("train", "--corpus", corpus.path, "--pretrained", tmp_path, "--out", tmp_path / "run"), 2, "config.json"
    )
    assert not (tmp_path / "run").exists()
    refused(
        call("evaluate", "hf:nobody/nothing", "--corpus", corpus.path, "--held-out", "t1", "--output", tmp_path / "o"),
        2, "hf download nobody/nothing",
    )  # fmt: skip
    assert not is_pretrained(tmp_path)


def test_a_student_without_a_decoder_has_no_decoder_losses() -> None:
    with pytest.raises(ConfigError, match="decoder_layers 0") as caught:
        configured(None, {"model.decoder_layers": 0})
    assert "given" not in str(caught.value), "the whole config helps nobody"


def test_weights_that_do_not_fit_are_all_named_and_none_is_loaded() -> None:
    found = open_pretrained(ARCHIVE)
    tree = resolved(configured(None, {"model.pretrained": ARCHIVE}))
    student = Student(tree.model.model_copy(update={"encoder_layers": 1}), 12, tree.features)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    tokenizer = tokenizer_at(ARCHIVE, "lower")
    with pytest.raises(CheckpointError) as raised:
        begin_with(student, found, tokenizer)
    unexpected = [name for name in found.encoder if name.startswith("layers.1.")]
    assert unexpected
    assert all(name in str(raised.value) for name in unexpected)
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_an_archive_that_changes_is_read_again(tmp_path: Path) -> None:
    archive = tmp_path / "encoder.nemo"
    archive.write_bytes(ARCHIVE.read_bytes())
    assert open_pretrained(archive) is open_pretrained(archive)
    archive.write_bytes(ARCHIVE.read_bytes()[:1000])
    with pytest.raises(CheckpointError):
        open_pretrained(archive)


def test_a_run_goes_on_without_its_archive(corpus: Corpus, tmp_path: Path) -> None:
    archive, run = tmp_path / "encoder.nemo", tmp_path / "run"
    archive.write_bytes(ARCHIVE.read_bytes())
    stages = "train.stages=[{epochs: 2, peak_lr: 0.001}]"
    done("train", "--corpus", corpus.path, "--pretrained", archive, "--set", stages, "--out", run)
    status = json.loads((run / "status.json").read_text())
    assert "a new CTC head" in status["init"]
    (run / "status.json").write_text(json.dumps(status | {"state": "stopped"}))  # as if it had been killed at its end
    archive.unlink()
    done("train", "--out", run, "--resume")
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    refused(call("train", "--corpus", corpus.path, "--pretrained", archive, "--out", tmp_path / "new"), 2, "no such")
