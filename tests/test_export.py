from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from torch import Tensor

import exported_model
from cli_calls import call, contents, done, refused
from exported_model import SPEAKERS, corpus, exported, random_student, recogniser
from tiny_corpus import job_for, write_corpus
from xded.corpus.manifest import read_corpus
from xded.decoding import ctc_greedy, decoder_greedy
from xded.errors import CheckpointError
from xded.export import onnx
from xded.export.card import hide
from xded.export.folder import Options, write_export
from xded.exported import describe
from xded.models.decoder_step import DecoderStep
from xded.models.recogniser import load_recogniser
from xded.models.student import Student
from xded.training.run import fit

NAMES = {"README.md", "config.json", "decoder.onnx", "encoder.onnx", "model.safetensors", "tokenizer.model"}


def audio(*seconds: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Bursts of noise between silences, padded with what must not be heard: [B, N] and [B]."""
    samples = torch.tensor([round(16_000 * s) for s in seconds])
    generator = torch.Generator().manual_seed(seed)
    waveforms = torch.randn(len(samples), int(samples.max()), generator=generator)
    waveforms *= (torch.arange(waveforms.shape[1]) // 1_500 % 3 > 0).float()
    return waveforms, samples


@torch.no_grad()
def test_decoder_step_by_step_is_the_decoder_on_the_whole_prefix() -> None:
    student = random_student(9, decoder_layers=3, heads=4)
    generator = torch.Generator().manual_seed(1)
    encoded, lengths = torch.randn(3, 13, 16, generator=generator), torch.tensor([13, 1, 8])
    tokens = torch.randint(9, (3, 7), generator=generator)
    wanted = student.decoder_logits(tokens, encoded, lengths)
    step = DecoderStep(student)
    memory, (keys, values) = step.remember(encoded), step.start(3)
    for place in range(7):
        logits, keys, values = step(tokens[:, place : place + 1], *memory, lengths, keys, values)
        torch.testing.assert_close(logits, wanted[:, place], rtol=1e-5, atol=1e-5)
    assert wanted.std() > 0.5  # far enough from a constant to tell
    assert keys.shape == (3, 3, 4, 7, 4)


@pytest.mark.parametrize("seconds", [(1.0,), (0.06,), (9.3,), (0.4, 1.31, 0.9), (0.5,) * 5], ids=str)
@torch.no_grad()
def test_graphs_say_what_torch_says(seconds: tuple[float, ...]) -> None:
    student, tokenizer = recogniser().student, recogniser().tokenizer
    waveforms, samples = audio(*seconds)
    encoded, lengths = student.encode(*student.front_end(waveforms, samples))
    wanted = student.ctc_logits(encoded).log_softmax(-1)
    encoder = onnxruntime.InferenceSession(exported() / "encoder.onnx")
    got_lengths, log_probs, got_encoded, *memory = encoder.run(
        None, {"waveforms": waveforms.numpy(), "samples": samples.numpy()}
    )
    assert got_lengths.tolist() == lengths.tolist()
    for row, length in enumerate(lengths.tolist()):
        np.testing.assert_allclose(log_probs[row, :length], wanted[row, :length], atol=1e-3)
        np.testing.assert_allclose(got_encoded[row, :length], encoded[row, :length], atol=1e-3)
    found = ctc_greedy(wanted, lengths, tokenizer.blank)
    assert [t for t, _ in ctc_greedy(torch.from_numpy(log_probs), lengths, tokenizer.blank)] == [t for t, _ in found]
    assert len(seconds) != 3 or len({t for t, _ in found}) == 3  # the model does hear differences

    decoder = onnxruntime.InferenceSession(exported() / "decoder.onnx")
    keys, values = (part[:, :, :, :0] for part in memory)
    tokens = torch.full((len(samples), 1), tokenizer.bos)
    texts = decoder_greedy(student, encoded, lengths, tokenizer, max_length=8)
    for place in range(8):
        inputs = (tokens[:, -1:].numpy(), *memory, got_lengths, keys, values)
        logits, keys, values = decoder.run(onnx.DECODER_OUTPUTS, dict(zip(onnx.DECODER_INPUTS, inputs, strict=True)))
        np.testing.assert_allclose(logits, student.decoder_logits(tokens, encoded, lengths)[:, -1], atol=1e-3)
        logits[:, list(tokenizer.unwritten)] = -np.inf
        tokens = torch.cat([tokens, torch.from_numpy(logits.argmax(1))[:, None]], dim=1)
        for row, (text, _) in enumerate(texts):
            assert place >= len(text) or tokens[row, place + 1] == text[place]


def test_padding_changes_nothing_that_is_heard() -> None:
    waveforms, samples = audio(0.5, 1.5)
    encoder = onnxruntime.InferenceSession(exported() / "encoder.onnx")
    names = ["lengths", "ctc_log_probs"]
    lengths, together = encoder.run(names, {"waveforms": waveforms.numpy(), "samples": samples.numpy()})
    alone = waveforms[:1, : samples[0]].numpy()
    _, single = encoder.run(names, {"waveforms": alone, "samples": samples[:1].numpy()})
    np.testing.assert_allclose(together[0, : lengths[0]], single[0, : lengths[0]], atol=1e-4)


def test_folder_is_a_recogniser_again_that_is_tested_elsewhere(tmp_path: Path) -> None:
    assert {path.name for path in exported().iterdir()} == NAMES
    again, original = load_recogniser(exported()), recogniser()
    weights = original.student.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in again.student.state_dict().items())
    assert again.tokenizer.fingerprint == original.tokenizer.fingerprint
    assert (again.sha256, again.config.decode) == (original.sha256, original.config.decode)
    tested = ("evaluate", exported(), "--corpus", corpus().path, "--held-out", "QUIN")
    refused(call(*tested), 2, "--output")
    done(*tested, "--output", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["conditions"]["speakers"] == "unknown", "who was heard is withheld"


def test_no_speaker_and_no_path_is_in_the_export() -> None:
    for path in exported().iterdir():
        content = path.read_bytes()
        hidden = [*SPEAKERS, str(exported_model.FOLDER), sys.prefix, str(Path(onnx.__file__).parents[2])]
        assert not [text for text in hidden if text.encode() in content], path.name
    assert describe(exported()).provenance is None
    assert describe(exported()).name == "teacher (speaker)"


def test_named_speakers_are_in_the_export(tmp_path: Path) -> None:
    write_export(recogniser(), tmp_path / "out", Options(onnx=False, name_speakers=True, data_licence="by ZORA"))
    (heard,) = describe(tmp_path / "out").provenance or ()
    assert (heard.what, heard.speakers, len(heard.takes)) == ("teacher ZORA", ("ZORA",), 8)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("teacher ZORA") == 2
    assert "consent: by ZORA." in card
    assert {path.name for path in (tmp_path / "out").iterdir()} == NAMES - {"decoder.onnx", "encoder.onnx"}
    assert "encoder.onnx" not in card


def test_hide_takes_whole_ids_also_out_of_the_names_of_files() -> None:
    said = "teacher M1 (M10, F1), M1_ctc_logits.pt, take_M1, AM1"
    hidden = "teacher (speaker) (M10, (speaker)), (speaker)_ctc_logits.pt, take_(speaker), AM1"
    assert hide(said, {"M1", "F1"}) == hidden


def test_speakers_that_are_called_by_numbers_cost_no_number(tmp_path: Path) -> None:
    own = recogniser()
    heard = dataclasses.replace(own.provenance[0], what="teacher 1", speakers=frozenset({"1", "8", "0"}))
    fold = own.config.fold.model_copy(update={"held_out": ("12",)})
    config = own.config.model_copy(update={"fold": fold})
    named = dataclasses.replace(own, name="student without 12", provenance=(heard,), config=config)
    write_export(named, tmp_path / "out", Options(onnx=False))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| teacher (speaker) | 1 | 3 | 8 |" in card
    assert "| control | none | 1 | 8 | 8 | 0.00 |" in card
    assert describe(tmp_path / "out").name == "student without (speaker)"


def test_without_a_run_nothing_is_claimed() -> None:
    card = (exported() / "README.md").read_text()
    assert "**This model was not tested.** No scores are kept" in card
    assert card.index("not tested") < card.index("##")
    assert "how many of them were trained is not on record" in card
    assert "whether it is sound is not known" in card
    assert "| control | none | 1 | 8 | 8 | 0.00 |" in card
    assert "consent: not on record" in card


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two speakers, tested on a third, whose bands are known."""
    folder = tmp_path_factory.mktemp("card")
    write_corpus(folder / "corpus", controls=("HEALTHY",), targets=("MILD", "SEVERE"))
    manifest = folder / "corpus" / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    bands = {"HEALTHY": None, "MILD": "high", "SEVERE": "very_low"}
    manifest.write_text("".join(json.dumps({**row, "band": bands[row["speaker"]]}) + "\n" for row in rows))
    job = job_for(read_corpus(manifest), folder / "run", fold={"held_out": ["SEVERE"]})
    fit(dataclasses.replace(job, config=job.config.model_copy(update={"corpus": manifest})), quiet=True)
    done("evaluate", folder / "run")
    return folder / "run"


def test_card_says_who_was_heard_and_tested_and_how_sure_that_is(run: Path, tmp_path: Path) -> None:
    kept = json.loads((run / "findings.json").read_text())
    found = {"check": "shared-takes", "severity": "refuse", "subject": "SEVERE", "what": "SEVERE", "effect": "SEVERE"}
    (run / "findings.json").write_text(json.dumps({**kept, "findings": [found], "forced": ["shared-takes"]}))
    said = done("export", run, "--out", tmp_path / "out", "--no-onnx").out
    assert said.splitlines()[-1] == f"Use it: xded transcribe {tmp_path / 'out'} take.wav"
    card = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["pipeline_tag"] == "automatic-speech-recognition"
    assert "license" not in header
    scores = json.loads((run / "scores.json").read_text())["overall"]["wra_percent"]
    wra = f"{scores['value']:.1f} [{scores['low']:.1f}, {scores['high']:.1f}]"
    assert (
        f"**WRA {wra} %** (speakers unseen, words seen, open word list, decode ctc greedy, normaliser upper, 8 takes"
        in card
    )
    assert "The tested words were heard in training" in card
    assert "The tested speakers" not in card
    assert "One speaker was tested" in card
    assert "| speaker 1 | very low | 8 |" in card
    assert "| very low | 8 |" in card
    assert "| control | none | 1 | 8 | 8 | 0.00 |" in card
    assert "| target | high | 1 | 8 | 8 | 0.00 |" in card
    assert "0 frozen and 8,218 trained in the last stage" in card
    assert "1 finding, " in card
    assert "| refuse | no take (through any microphone) on two sides of a split (overruled) |" in card
    assert not [name for name in ("HEALTHY", "MILD", "SEVERE") if name in card]


def test_scores_of_another_checkpoint_are_not_shown(run: Path, tmp_path: Path) -> None:
    done("export", run / "latest.pt", "--out", tmp_path / "out", "--no-onnx")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**This model was not tested.** The scores beside this checkpoint are those of best.pt." in card
    assert "WRA 0" not in card


def test_card_without_the_corpus_says_so(run: Path, tmp_path: Path) -> None:
    corpus = run.parent / "corpus"
    corpus.rename(corpus.with_name("elsewhere"))
    try:
        done("export", run, "--out", tmp_path / "out", "--no-onnx")
    finally:
        corpus.with_name("elsewhere").rename(corpus)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "not known for all that was heard: the corpus is not where the run found it." in card
    assert "| student | 1 | 2 | 14 |" in card


def test_what_stands_there_is_replaced_only_on_request(tmp_path: Path) -> None:
    run = exported_model.FOLDER / "run"
    recogniser()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.json").write_text("{}")
    called = call("export", run, "--out", tmp_path / "notes", "--no-onnx", "--overwrite")
    refused(called, 2, "notes exists, and no export lies there", "--out")
    done("export", run, "--out", tmp_path / "out", "--no-onnx")
    before = contents(tmp_path)
    refused(call("export", run, "--out", tmp_path / "out", "--no-onnx"), 2, "already holds an export", "--overwrite")
    assert contents(tmp_path) == before
    (tmp_path / "out" / "README.md").write_text("changed")
    done("export", run, "--out", tmp_path / "out", "--no-onnx", "--overwrite")
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "out"]


def test_graphs_that_say_something_else_leave_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copied(student: Student, folder: Path) -> tuple[str, ...]:
        for name in ("encoder.onnx", "decoder.onnx"):
            shutil.copyfile(exported() / name, folder / name)
        return "encoder.onnx", "decoder.onnx"

    monkeypatch.setattr("xded.export.folder.write_onnx", copied)
    own = recogniser()
    assert (write_export(own, tmp_path / "out", Options()) or 1.0) < onnx.TOLERANCE
    before = contents(tmp_path)
    other = dataclasses.replace(own, student=random_student(own.tokenizer.size, seed=1))
    with pytest.raises(CheckpointError, match="onnxruntime differs from torch by up to"):
        write_export(other, tmp_path / "out", Options(), overwrite=True)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_the_extra_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recogniser()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    called = call("export", exported_model.FOLDER / "run", "--out", tmp_path / "out")
    assert called.code == 2
    assert "Export to ONNX needs the package 'onnxscript'" in called.err
    assert "pip install 'xded[onnx]'" in called.err
    assert list(tmp_path.iterdir()) == []


def test_other_encoders_are_refused(tmp_path: Path) -> None:
    own = random_student(7)
    own.encoder = torch.nn.Identity()  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match="another encoder than our Conformer"):
        write_export(dataclasses.replace(recogniser(), student=own), tmp_path / "out", Options())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_model_without_a_decoder_has_one_graph(tmp_path: Path) -> None:
    own = recogniser()
    student = random_student(own.tokenizer.size, decoder_layers=0)
    alone = own.config.decode.model_copy(update={"ctc_weight": 1.0})
    config = own.config.model_copy(update={"model": student.config, "decode": alone})
    apart = write_export(dataclasses.replace(own, student=student, config=config), tmp_path / "out", Options())
    assert apart is not None
    assert {path.name for path in (tmp_path / "out").iterdir()} == NAMES - {"decoder.onnx"}
    assert "decoder.onnx" not in (tmp_path / "out" / "README.md").read_text()
    assert describe(tmp_path / "out").as_config().model.decoder_layers == 0
    (tmp_path / "words.txt").write_text("AB\nBAD\n")
    audio = exported_model.corpus().recordings[0].audio_filepath
    said = done("transcribe", tmp_path / "out", audio, "--word-list", tmp_path / "words.txt").out
    assert said.split("\t")[1] in ("AB\n", "BAD\n")
    called = call("transcribe", tmp_path / "out", audio, "--decode", "decoder")
    refused(called, 2, "no attention decoder", "--decode ctc")
