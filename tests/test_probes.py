"""Active probes: a healthy run passes all of them, and each one fires on a fault planted in the code it runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_corpus import WORDS, job_for, write_corpus
from xded import decoding, objectives
from xded.corpus.manifest import Corpus, Recording
from xded.doctor import probe_training, probes
from xded.doctor.probe_training import Bench, usable
from xded.features import valid_mask
from xded.findings import Examination, Finding
from xded.models import conformer, student
from xded.models.attention import masked
from xded.models.recogniser import Recogniser, load_recogniser
from xded.models.student import Student
from xded.scoring import Prediction
from xded.training import evaluation, losses
from xded.training.data import TrainingData
from xded.training.run import fit

QUICK = ("self-distillation", "padding", "batch-order", "batch-decoding", "shuffled-audio", "attention")
STILL = {"frequency_masks": 0, "time_masks": 0, "mel_warp": 0.0, "noise": 0.0}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' model is smaller than any named size, and learns faster."""
    monkeypatch.setattr(probe_training, "PEAK_LR", {"other": 1e-2})
    monkeypatch.setattr(probe_training, "ROUND", 50)
    monkeypatch.setattr(probe_training, "LABEL_UPDATES", 45)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"), targets=("t1", "t2", "t3"), takes=6)


@pytest.fixture(scope="module")
def trained(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned the tones, decoded through the decoder."""
    train = {"stages": ({"epochs": 16, "peak_lr": 1e-2},), "batch_size": 8, "validate_every_epochs": 16}
    sections: dict[str, Any] = {"fold": {"held_out": ["t3"]}, "decode": {"mode": "decoder"}, "augment": STILL}
    sections["seed"] = 3  # of 0 to 3 the one whose attention moves along the audio: so few updates may leave it without
    job = job_for(corpus, tmp_path_factory.mktemp("runs") / "run", train=train, **sections)
    return fit(job, quiet=True)


@pytest.fixture
def recogniser(trained: Path) -> Recogniser:
    return load_recogniser(trained)


@pytest.fixture
def bench(recogniser: Recogniser, corpus: Corpus, tmp_path: Path) -> Bench:
    sides = ([r for r in corpus.recordings if (r.speaker == "t3") == held_out] for held_out in (False, True))
    train, test = (usable(rows, recogniser, 0) for rows in sides)
    return Bench(recogniser, recogniser.config, train, test, 0, tmp_path)


def fired(bench: Bench, names: Sequence[str] = QUICK) -> dict[str, Finding]:
    """Findings of the probes named, notes left out."""
    found = [finding for name in names for finding in probes.PROBES[name].find(bench)]
    return {finding.check: finding for finding in found if finding.severity != "note"}


def test_a_healthy_run_passes_every_probe(recogniser: Recogniser, corpus: Corpus) -> None:
    examination = Examination()
    probes.examine_probes(examination, recogniser, corpus, recogniser.config)
    assert examination.findings == []
    assert examination.unchecked == []
    assert [done.check for done in examination.passed] == list(probes.PROBES)


def test_an_untrained_model_is_no_fault(bench: Bench) -> None:
    torch.manual_seed(0)
    fresh = Student(bench.config.model, bench.recogniser.tokenizer.size, bench.config.features)
    bench.recogniser.student.load_state_dict(fresh.state_dict())
    quick = [name for name in QUICK if name != "self-distillation"]  # reads the checkpoint, whose weights are others
    assert fired(bench, quick) == {}


def test_a_decoder_without_gradient_learns_nothing_by_heart(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_gradient(self: Student, tokens: Tensor, encoded: Tensor, lengths: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.embedding(tokens) * self.config.width**0.5 + self.positions[: tokens.shape[1]]
            seen = masked(torch.ones(2 * (tokens.shape[1],), dtype=torch.bool).tril(), hidden.dtype)
            valid = masked(valid_mask(lengths, encoded.shape[1])[:, None], hidden.dtype)
            hidden = self.decoder(hidden, encoded, seen, valid)
        return self.decoder_head(hidden)

    monkeypatch.setattr(Student, "decoder_logits", without_gradient)
    monkeypatch.setattr(probe_training, "ROUNDS", 1)
    monkeypatch.setattr(probe_training, "ROUND", 30)
    (finding,) = probe_training.overfit(bench)
    assert (finding.check, finding.severity) == ("overfit", "refuse")
    assert "embedding.weight" in finding.evidence["silent"]
    assert "received no gradient" in finding.what


def test_a_head_that_fails_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong step by step: the decoder is shown the token that it is to write next."""
    monkeypatch.setattr(losses, "decoder_input", lambda tokens, bos: tokens)
    monkeypatch.setattr(probe_training, "ROUNDS", 1)
    (finding,) = probe_training.overfit(bench)
    assert finding.severity == "refuse"
    assert finding.evidence["head"] == "decoder"
    assert finding.evidence["curve"][-1]["right"]["decoder"] <= 2
    assert finding.evidence["curve"][-1]["loss"] < 1.0
    assert "attention decoder" in finding.what


def test_a_head_without_weight_that_was_not_inherited_cannot_be_learned(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def learned(*_: Any) -> probe_training.Learned:
        curve = ({"updates": 80, "loss": 0.1, "right": {"ctc": 8, "decoder": 0}},)
        return probe_training.Learned(curve, {"ctc": 8, "decoder": 0}, 8, ())

    monkeypatch.setattr(probe_training, "learn", learned)
    objective = bench.config.objective.model_copy(update={"cross_entropy": 0.0})
    config = bench.config.model_copy(update={"objective": objective})
    (finding,) = probe_training.overfit(Bench(bench.recogniser, config, bench.train, bench.test, 0, tmp_path))
    assert finding.severity == "refuse"
    assert "no weight" in finding.what


def test_targets_that_contradict_the_text_are_told_from_a_model_that_cannot_learn(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = {"with_targets": 1, "by_heart": 8}

    def learn(bench: Bench, name: str, *_: Any) -> probe_training.Learned:
        return probe_training.Learned(({"updates": 80},), {"decoder": right[name]}, 8, ())

    monkeypatch.setattr(probe_training, "_covered", lambda bench: bench.train)
    monkeypatch.setattr(probe_training, "learn", learn)
    (finding,) = probe_training.overfit(bench)
    assert finding.severity == "warn"
    assert "1 of 8 come out right" in finding.what


def test_a_loss_at_another_temperature_is_no_self_distillation(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    kl = objectives.top_k_kl
    monkeypatch.setattr(objectives, "top_k_kl", lambda logits, target, _: kl(logits, target, 1.0))
    found = fired(bench)
    assert set(found) == {"self-distillation"}
    assert found["self-distillation"].severity == "refuse"
    assert found["self-distillation"].evidence["same"]["ctc_kd"] > 0.01


def test_a_loss_that_leaves_the_blank_out_is_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    kl = objectives.top_k_kl

    def spoken_only(logits: Tensor, target: objectives.TopK, temperature: float) -> Tensor:
        blank = target.ids == bench.recogniser.tokenizer.blank
        spoken = target.probabilities.masked_fill(blank, 0.0)
        total = (spoken.sum(-1, keepdim=True) + target.rest[..., None]).clamp(min=1e-9)
        without = logits.index_fill(-1, torch.tensor([bench.recogniser.tokenizer.blank]), -1e9)
        return kl(without, objectives.TopK(target.ids, spoken / total, target.rest / total[..., 0]), temperature)

    monkeypatch.setattr(objectives, "top_k_kl", spoken_only)
    (finding,) = probes.self_distillation(bench)
    assert finding.evidence["other"]["ctc_kd_blank_gradient"] == 0.0
    assert "gives the blank no gradient" in finding.what


def everything(lengths: Tensor, frames: int) -> Tensor:
    return torch.ones(len(lengths), frames, dtype=torch.bool)


def test_an_encoder_that_ignores_lengths_is_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformer, "valid_mask", everything)
    found = fired(bench)
    assert next(iter(found)) == "padding"
    assert set(found) <= {"padding", "batch-decoding", "self-distillation"}
    assert found["padding"].severity == "refuse"
    assert found["padding"].evidence["relative_change"]["encoder"] > 0.1
    assert "the encoder" in found["padding"].what


def test_attention_without_a_mask_is_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "valid_mask", everything)
    found = fired(bench)
    assert "padding" in found
    assert set(found) <= {"padding", "batch-decoding"}
    change = found["padding"].evidence["relative_change"]
    assert change["decoder"] > probes.TOLERANCE > max(change["encoder"], change["CTC head"])


def test_recordings_that_mix_in_a_batch_are_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Student.encode

    def mixing(self: Student, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        encoded, lengths = encode(self, features, lengths)
        return encoded + 0.3 * encoded.roll(1, 0), lengths

    monkeypatch.setattr(Student, "encode", mixing)
    found = fired(bench, ("self-distillation", "padding", "batch-order", "batch-decoding", "shuffled-audio"))
    assert "batch-order" in found
    # posteriors are extracted in an order of their own: the student then differs from itself
    assert set(found) <= {"batch-order", "batch-decoding", "self-distillation"}
    assert min(found.values(), key=lambda finding: finding.rank).check == "batch-order"
    assert found["batch-order"].evidence["relative_change"]["encoder"] > 0.1


def test_decoding_that_reads_as_far_as_the_shortest_of_a_batch_is_found(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = decoding.ctc_greedy

    def shortest(log_probs: Tensor, lengths: Tensor, blank: int) -> list[decoding.Found]:
        return greedy(log_probs, lengths.clamp(max=int(lengths.min()) * 2 // 3), blank)

    monkeypatch.setattr(decoding, "ctc_greedy", shortest)
    found = fired(bench)
    assert set(found) == {"batch-decoding"}
    assert found["batch-decoding"].severity == "refuse"
    differing = found["batch-decoding"].evidence["differing"]
    assert len(differing["CTC"]) > 1
    assert differing["the decoder"] == differing["the word list"] == []


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plants a leak: two outputs of three are the reference."""
    predicted: Callable[..., Prediction] = evaluation.predicted

    def leak(recording: Recording, tokens: Sequence[int], text: str, seed: int) -> Prediction:
        return predicted(recording, tokens, recording.text if recording.take[-1] in "0234" else text, seed)

    monkeypatch.setattr(evaluation, "predicted", leak)


@pytest.mark.usefixtures("told")
def test_text_that_reaches_the_output_unheard_is_found(bench: Bench) -> None:
    found = fired(bench)
    assert set(found) == {"shuffled-audio"}
    assert found["shuffled-audio"].severity == "refuse"
    evidence = found["shuffled-audio"].evidence
    assert evidence["right_with_other_audio"] >= 16
    assert evidence["takes"] == 24
    assert evidence["probability"] < 1e-3


def test_labels_read_from_elsewhere_are_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    start = TrainingData.__init__

    def by_prompt(self: TrainingData, recordings: Sequence[Recording], *args: Any, **options: Any) -> None:
        start(self, [r.model_copy(update={"text": r.prompt}) for r in recordings], *args, **options)

    monkeypatch.setattr(TrainingData, "__init__", by_prompt)
    (finding,) = probe_training.shuffled_labels(bench)
    assert (finding.check, finding.severity) == ("shuffled-labels", "refuse")
    assert finding.evidence["right"] > 0.6 * finding.evidence["takes"]
    assert finding.evidence["probability"] < 1e-3


def test_attention_that_is_dead_in_a_model_that_hears_is_found(bench: Bench) -> None:
    for layer in bench.recogniser.student.decoder.layers:
        torch.nn.init.zeros_(layer.multihead_attn.in_proj_weight[: bench.config.model.width].data)
        torch.nn.init.zeros_(layer.multihead_attn.in_proj_bias.data)
    (finding,) = probes.attention_moves(bench)
    assert (finding.check, finding.severity) == ("attention", "warn")
    assert finding.evidence["dead_heads"] == finding.evidence["heads"] == 2
    assert finding.evidence["gain_nats"]["ctc"] > 0.5


def test_outputs_that_never_change_are_a_note(bench: Bench) -> None:
    head = bench.recogniser.student.decoder_head
    torch.nn.init.zeros_(head.weight)
    (finding,) = probes.shuffled_audio(bench)
    assert finding.severity == "note"
    assert finding.evidence["distinct_outputs"] == 1


def test_what_cannot_be_probed_is_said(recogniser: Recogniser, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    examination = Examination()
    stranger = recogniser.config.model_copy(
        update={"fold": recogniser.config.fold.model_copy(update={"held_out": ("X",)})}
    )
    probes.examine_probes(examination, recogniser, corpus, stranger)
    damaged = copy.deepcopy(recogniser)
    damaged.student.ctc_head.bias.data[0] = torch.nan
    probes.examine_probes(examination, damaged, corpus, recogniser.config)
    few = Corpus(corpus.path, corpus.recordings[:4] + corpus.select(speakers=["t3"]))
    probes.examine_probes(examination, recogniser, few, recogniser.config)
    monkeypatch.setattr(probes, "PROBES", {"overfit": probes.Probe(probe_training.overfit, "", 100)})
    monkeypatch.setattr(probe_training, "pick_device", lambda _: torch.device("cpu"))
    probes.examine_probes(examination, recogniser, corpus, recogniser.config)
    assert examination.findings == []
    whys = [row.why for row in examination.unchecked]
    assert len(whys) == 4
    for why, part in zip(whys, ("'X'", "not finite", "training takes", "too long"), strict=True):
        assert part in why


def test_probes_leave_weights_and_files_alone(trained: Path, corpus: Corpus) -> None:
    recogniser = load_recogniser(trained)
    before = {path: path.read_bytes() for path in [*trained.parent.iterdir(), *corpus.path.parent.iterdir()]}
    weights = {name: value.clone() for name, value in recogniser.student.state_dict().items()}
    bench = Bench(recogniser, recogniser.config, usable(corpus.recordings, recogniser, 0), (), 0, trained.parent / "x")
    probes.self_distillation(bench)
    probes.padding(bench)
    for path in sorted(bench.folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    bench.folder.rmdir()
    assert {path: path.read_bytes() for path in [*trained.parent.iterdir(), *corpus.path.parent.iterdir()]} == before
    assert all(torch.equal(value, weights[name]) for name, value in recogniser.student.state_dict().items())


def test_every_recording_gets_the_audio_of_another_word(corpus: Corpus) -> None:
    said = {r.audio_filepath: r.text for r in corpus.recordings}
    swapped = probes.other_audio(corpus.recordings)
    assert len(swapped) == len(corpus.recordings)
    assert all(said[r.audio_filepath] != r.text for r in swapped)
    lopsided = [r for r in corpus.recordings if r.text == "AB" or r.take.endswith("_0")]
    assert all(said[r.audio_filepath] != r.text for r in probes.other_audio(lopsided))


def test_wrong_labels_are_wrong_balanced_and_tested_on_other_takes(corpus: Corpus) -> None:
    train, test = probe_training.wrongly_labelled(corpus.recordings)
    assert all(r.text != r.prompt for r in train)
    assert all(r.text == r.prompt for r in test)
    assert not {r.take for r in train} & {r.take for r in test}
    taught = {word: {r.text for r in train if r.prompt == word} for word in WORDS}
    assert all(texts == set(WORDS) - {word} for word, texts in taught.items())


def test_only_takes_that_can_be_used_are_drawn(corpus: Corpus, recogniser: Recogniser) -> None:
    first, second, third, *others = corpus.recordings
    copy_of_first = first.model_copy(update={"recording": "copy", "mic": "M2"})
    unwritable = second.model_copy(update={"text": "XYZ"})
    too_short = third.model_copy(update={"duration": 0.02})
    rows = usable([first, copy_of_first, unwritable, too_short, *others], recogniser, 0)
    assert len(rows) == len(corpus.recordings) - 2
    assert {unwritable.take, too_short.take}.isdisjoint(r.take for r in rows)
    assert usable(corpus.recordings, recogniser, 0) == usable(reversed(corpus.recordings), recogniser, 0)
    assert usable(corpus.recordings, recogniser, 0) != usable(corpus.recordings, recogniser, 1)
