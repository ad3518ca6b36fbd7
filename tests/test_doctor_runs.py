"""The doctor on real small runs: silent on healthy recipes, and the planted fault stands first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny_corpus import job_for, tiny_config, write_corpus
from xded.corpus.manifest import Corpus
from xded.doctor import runs
from xded.doctor.given import Given
from xded.doctor.run_folder import read_run
from xded.findings import Examination, Finding
from xded.models.checkpoints import load, save
from xded.models.decoder import Decoder
from xded.training import optimizer
from xded.training.loop import Loop
from xded.training.run import fit
from xded.training.schedule import Schedule

EPOCHS = 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def parent(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, of which tests take copies."""
    return trained(corpus, tmp_path_factory.mktemp("runs") / "parent")


@pytest.fixture
def run(parent: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(parent, tmp_path / "run"))


def trained(corpus: Corpus, out: Path, **sections: Any) -> Path:
    train = {"stages": ({"epochs": EPOCHS, "peak_lr": 1e-3},), **sections.pop("train", {})}
    fit(job_for(corpus, out, train=train, **sections), quiet=True)
    return out


def examined(*paths: Path, given: Given | None = None) -> Examination:
    examination, given = Examination(), given or Given()
    given.runs = [read_run(path) for path in paths]
    runs.examine(examination, given)
    return examination


def worst(examination: Examination) -> Finding:
    problems = examination.at_least("warn")
    assert problems, "no problem was found"
    return problems[0]


# --- healthy --------------------------------------------------------------------------------------

SCRATCH: dict[str, dict[str, Any]] = {
    "another seed": {"seed": 3},
    "16 epochs, large batches": {
        "train": {"stages": ({"epochs": 16, "peak_lr": 3e-3},), "batch_size": 7, "validate_every_epochs": 4},
    },
    "accumulate 2": {"train": {"accumulate": 2, "stages": ({"epochs": 3, "peak_lr": 1e-3},)}},
    "CTC alone, global normaliser": {
        "objective": {"ctc": 1.0, "cross_entropy": 0.0}, "features": {"normalisation": "global"},
    },
    "decoder alone, constant rate": {
        "objective": {"ctc": 0.0}, "decode": {"mode": "decoder"}, "train": {"decay": "constant"},
    },
    "a first layer that is never trained": {"train": {"freeze_layers": 1}},
    "no validation": {"fold": {"validation_fraction": 0.0}},
    "words, moving average": {
        "train": {"sampler": "words", "speakers_per_word": 2, "batch_size": 4, "average": "ema"},
        "augment": {"mix_style": 0.5},
    },
}  # fmt: skip
FROM_PARENT: dict[str, dict[str, Any]] = {
    "all at once": {},
    "two stages": {"stages": ({"epochs": 1, "peak_lr": 1e-3, "freeze_encoder": True}, {"epochs": 2, "peak_lr": 1e-3})},
    "frozen throughout": {"stages": ({"epochs": 2, "peak_lr": 1e-3, "freeze_encoder": True},)},
    "first layer frozen, accumulate 3": {"freeze_layers": 1, "accumulate": 3},
    "layer by layer, mean of the last": {
        "stages": [{"epochs": 2, "peak_lr": 1e-3, "freeze_layers": count} for count in (1, 0)],
        "average": "last",
    },
}


@pytest.mark.parametrize("recipe", SCRATCH)
def test_healthy_runs_from_scratch_have_no_problem(corpus: Corpus, tmp_path: Path, recipe: str) -> None:
    examination = examined(trained(corpus, tmp_path / "run", **SCRATCH[recipe]))
    assert examination.at_least("warn") == []
    assert examination.unchecked == []
    checked = {passed.check for passed in examination.passed}
    assert {"no-gradient", "learning-rate", "skipped-batches", "gradients", "tokenizer-mismatch"} <= checked


@pytest.mark.parametrize("recipe", FROM_PARENT)
def test_healthy_runs_from_a_parent_have_no_problem(corpus: Corpus, parent: Path, tmp_path: Path, recipe: str) -> None:
    train = {"init": str(parent / "best.pt"), **FROM_PARENT[recipe]}
    examination = examined(trained(corpus, tmp_path / "run", train=train))
    assert examination.at_least("warn") == []
    assert examination.unchecked == []
    assert {"partial-load", "no-gradient"} <= {passed.check for passed in examination.passed}


def test_a_checkpoint_alone_of_layers_that_thawed_has_no_problem(corpus: Corpus, parent: Path, tmp_path: Path) -> None:
    train = {"init": str(parent / "best.pt"), **FROM_PARENT["layer by layer, mean of the last"]}
    assert examined(trained(corpus, tmp_path / "run", train=train) / "latest.pt").at_least("warn") == []


# --- faults planted in training -------------------------------------------------------------------


def test_no_gradient_through_the_decoder(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "forward", torch.no_grad()(Decoder.forward))
    finding = worst(examined(trained(corpus, tmp_path / "run")))
    assert (finding.check, finding.severity) == ("no-gradient", "refuse")
    silent = finding.evidence["silent"]
    assert "embedding.weight" in silent
    assert not any(name.startswith(("encoder", "ctc_head", "decoder_head")) for name in silent)


def test_a_head_that_the_optimiser_does_not_know(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_ctc_head(student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        return [{"params": [p for name, p in student.named_parameters() if not name.startswith("ctc_head")]}]

    monkeypatch.setattr(optimizer, "parameter_groups", without_ctc_head)
    finding = worst(examined(trained(corpus, tmp_path / "run")))
    assert finding.check == "no-gradient"
    assert finding.evidence["silent"] == ["ctc_head.bias", "ctc_head.weight"]


@pytest.mark.parametrize(
    ("mend", "check", "severity"),
    [
        (lambda encoder: encoder.train(), "batchnorm-drift", "warn"),
        (lambda encoder: encoder.requires_grad_(True), "frozen-moved", "refuse"),
    ],
    ids=["statistics", "weights"],
)
def test_frozen_layers_that_move(
    corpus: Corpus, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    mend: Callable[[nn.Module], object], check: str, severity: str,
) -> None:  # fmt: skip
    set_stage = Loop.set_stage

    def leaky(self: Loop, stage: int) -> None:
        set_stage(self, stage)
        mend(self.student.encoder)

    monkeypatch.setattr(Loop, "set_stage", leaky)
    train = {"freeze_layers": 1, "init": str(parent / "best.pt")}
    out = trained(corpus, tmp_path / "run", train=train)
    finding = worst(examined(out))
    assert (finding.check, finding.severity) == (check, severity)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = "".join(json.dumps(row) + "\n" for row in rows if row["event"] != "frozen")
    (out / "metrics.jsonl").write_text(kept)  # without the run's own account: from the checkpoints alone
    assert worst(examined(out)).evidence == finding.evidence


def test_another_learning_rate(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        rate = Schedule.learning_rate
        patch.setattr(Schedule, "learning_rate", lambda self, update: 5.0 * rate(self, update))
        out = trained(corpus, tmp_path / "run")
    finding = worst(examined(out))
    assert (finding.check, finding.severity) == ("learning-rate", "refuse")
    assert finding.evidence["ratio"] == pytest.approx(5.0)


def test_batches_that_are_passed_over(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Loop.training_step

    def forgiving(self: Loop, batch: Any, batch_idx: int) -> Tensor | None:
        loss = step(self, batch, batch_idx)
        return None if batch_idx % 3 == 0 else loss

    monkeypatch.setattr(Loop, "training_step", forgiving)
    finding = worst(examined(trained(corpus, tmp_path / "run")))
    assert (finding.check, finding.severity) == ("skipped-batches", "refuse")
    assert finding.evidence["updates"] > finding.evidence["optimiser_steps"]


def test_a_blank_without_gradient(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after_backward = Loop.on_after_backward

    def blankless(self: Loop) -> None:
        after_backward(self)
        grad = self.student.ctc_head.weight.grad
        assert grad is not None
        grad[self.tokenizer.blank] = 0.0

    monkeypatch.setattr(Loop, "on_after_backward", blankless)
    assert worst(examined(trained(corpus, tmp_path / "run"))).check == "blank-gradient"


# --- faults planted in the folder -----------------------------------------------------------------


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **changes}))


def test_the_checkpoint_is_read_through_a_head_that_was_not_trained(corpus: Corpus, tmp_path: Path) -> None:
    out = trained(corpus, tmp_path / "run", objective={"ctc": 1.0, "cross_entropy": 0.0})
    edit(out / "scores.json", conditions={"decode": "ctc beam 8"})
    assert examined(out).at_least("warn") == []
    edit(out / "scores.json", conditions={"decode": "decoder greedy"})
    finding = worst(examined(out))
    assert (finding.check, finding.severity) == ("untrained-head", "refuse")
    assert "scores.json: decoder greedy" in finding.what
    edit(out / "scores.json", conditions={"decode": "word list, both heads"})
    assert worst(examined(out)).evidence["untrained"] == ["decoder"]


def test_validation_through_a_head_that_was_not_trained_is_a_warning_where_the_result_is_not(run: Path) -> None:
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("  ctc: 0.5\n", "  ctc: 0.0\n"))
    assert worst(examined(run)).severity == "refuse"
    edit(run / "scores.json", conditions={"decode": "decoder greedy"})
    finding = worst(examined(run))
    assert (finding.check, finding.severity) == ("untrained-head", "warn")
    assert "the config's decode section" in finding.what


def test_a_partial_load(run: Path) -> None:
    edit(run / "status.json", loaded={"tensors": 22, "of": 146, "differing": ["encoder.a", "encoder.b"]})
    assert worst(examined(run)).what.startswith("Only 22 of 146 tensors were loaded")


def test_a_run_that_collapsed(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    outputs = {"recordings": 40, "references": 20, "tokens": 3.0, "needed": 3.0, "repeats": 0.0, "empty": 0.0}
    wras = (0.1, 0.3, 0.4, 0.0, 0.0, 0.0, 0.0)
    rows += [
        {
            "event": "epoch",
            "epoch": i,
            "train_loss": 1.0 if wra else 4.0,
            "wra": wra,
            "distinct": 1 + 40 * wra,
            **outputs,
        }
        for i, wra in enumerate(wras)
    ]
    rows = [row for row in rows if row["event"] != "epoch" or row["recordings"] == 40]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = examined(run).at_least("warn")
    assert [(f.check, f.severity, f.symptom) for f in problems] == [("collapse", "refuse", True)]
    assert "after a WRA of 40.0 % and up to 17 distinct outputs" in problems[0].what


def change_weights(run: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    for name in ("best.pt", "latest.pt"):
        payload = load(run / name)
        change(payload["model_state_dict"])
        save(payload, run / name)


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda state: state["ctc_head.weight"].fill_(torch.nan), "non-finite"),
        (lambda state: state.pop("encoder.layers.0.norm_out.weight"), "partial-load"),
        (lambda state: state["ctc_head.weight"].copy_(state["decoder_head.weight"]), "untrained-head"),
        (lambda state: state.update({"ctc_head.weight": torch.zeros(99, 16)}), "tokenizer-mismatch"),
    ],
)
def test_weights_that_are_wrong(run: Path, change: Callable[[dict[str, Tensor]], object], check: str) -> None:
    change_weights(run, change)
    top = [finding.check for finding in examined(run).at_least("warn")[:2]]
    assert check in top
    assert check in [finding.check for finding in examined(run / "best.pt").at_least("warn")[:2]]  # the file alone


def test_a_damaged_checkpoint_does_not_hide_the_rest(run: Path) -> None:
    data = (run / "best.pt").read_bytes()
    (run / "best.pt").write_bytes(data[: len(data) // 2])
    examination = examined(run)
    assert [f.check for f in examination.at_least("warn")] == ["damaged-checkpoint"]
    assert {"no-gradient", "learning-rate", "non-finite"} <= {passed.check for passed in examination.passed}


# --- half a folder, files alone -------------------------------------------------------------------


UNKNOWN_SHAPE = b'{"state": 3, "parameters": 7, "loaded": [], "event": "step", "update": "one", "takes": 1, "train": 2}'


@pytest.mark.parametrize("content", [None, b"[1, 2", UNKNOWN_SHAPE], ids=["absent", "half", "unknown shape"])
def test_whatever_is_missing_or_damaged_the_rest_is_checked(run: Path, content: bytes | None) -> None:
    for name in ("config.yaml", "status.json", "metrics.jsonl", "data.json", "best.pt", "latest.pt"):
        kept = (run / name).read_bytes()
        (run / name).unlink()
        if content is not None:
            (run / name).write_bytes(content)
        examination = examined(run)
        assert len(examination.passed) > 8
        problems = {(finding.check, Path(finding.subject).name) for finding in examination.at_least("warn")}
        assert problems <= {("damaged-checkpoint", name), ("unfinished", "run")}
        (run / name).write_bytes(kept)


def test_a_checkpoint_alone_and_a_stranger(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.pt"
    shutil.copy(run / "best.pt", alone)
    examination = examined(alone)
    assert examination.at_least("warn") == []
    assert {"non-finite", "partial-load", "tokenizer-mismatch", "no-gradient"} <= {p.check for p in examination.passed}
    stranger = tmp_path / "stranger.pt"
    stranger.write_bytes(b"PK\x03\x04 of another project")
    unknown = examined(stranger)
    assert unknown.findings == []
    assert "cannot be read as a checkpoint" in unknown.unchecked[0].why


def test_a_killed_run_is_a_note(run: Path) -> None:
    edit(run / "status.json", state="running", pid=2**22 + 1)
    notes = [finding for finding in examined(run).findings if finding.check == "unfinished"]
    assert [(note.severity, "killed" in note.what) for note in notes] == [("note", True)]


def test_difficulty_scores_are_recognised_and_checked(corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "difficulty.json"
    path.write_text(json.dumps({row.recording: i / 100 for i, row in enumerate(corpus.recordings)}))
    assert runs.is_difficulty(path)
    assert examined(given=Given(corpora=[corpus], difficulty=[path])).findings == []
    path.write_text(json.dumps({f"{word}_{i}": i / 100 for i in range(20) for word in ("AB", "DA")}))
    finding = worst(examined(given=Given(corpora=[corpus], difficulty=[path])))
    assert (finding.check, finding.evidence["reached"]) == ("curriculum", 0)
    path.write_text("{")
    assert not runs.is_difficulty(path)
    assert "cannot be read" in examined(given=Given(difficulty=[path])).unchecked[0].why


def test_the_batches_of_an_epoch_follow_from_the_counts() -> None:
    schedule = Schedule.of(job_config(accumulate=3), job_config(accumulate=3).stages, 7)
    rows: list[dict[str, Any]] = [{"event": "step", "updates": schedule.updates, "epochs": schedule.epochs}]
    assert 7 in runs.batches_per_epoch(rows, 3)
    rows += [{"event": "epoch", "epoch": e, "update": (7 * e - 1) // 3 + 1} for e in range(1, schedule.epochs + 1)]
    assert runs.batches_per_epoch(rows, 3) == [7]
    assert runs.batches_per_epoch([], 3) == []


def job_config(accumulate: int) -> Any:
    stages = ({"epochs": 8, "peak_lr": 1e-3},)
    return tiny_config(train={"accumulate": accumulate, "stages": stages}).train
