"""What a run's records say: every check fires on its fault and is silent on the healthy twin."""

from __future__ import annotations

import math
from typing import Any

import pytest

from xded.checks import rates as learning_rates
from xded.checks import training
from xded.config import DecodeConfig, ObjectiveConfig, StageConfig, TrainConfig
from xded.findings import Finding
from xded.training.schedule import Schedule

EPOCHS, BATCHES = 10, 20
STAGES = (StageConfig(epochs=EPOCHS, peak_lr=1e-3),)
SCHEDULE = Schedule.of(TrainConfig(stages=STAGES, warmup_steps=2000), STAGES, BATCHES)
UPDATES = EPOCHS * BATCHES
LOGGED = [1, *range(10, UPDATES + 1, 10)]


def step(update: int, lr: float, **more: Any) -> dict[str, Any]:
    row = {"event": "step", "update": update, "updates": UPDATES, "epochs": EPOCHS, "stage": 1, "lr": lr}
    return {**row, "epoch": 1 + (update - 1) // BATCHES, "gradient_norm": 3.0, "loss": 1.0, "ctc": 1.0, **more}


def healthy() -> list[dict[str, Any]]:
    start = {"event": "start", "update": 0, "resumed": False}
    return [start, *(step(update, SCHEDULE.learning_rate(update - 1)) for update in LOGGED)]


def rates(rows: list[dict[str, Any]]) -> list[Finding]:
    return learning_rates.rates(rows, "run", SCHEDULE.learning_rate, STAGES)


def only(findings: list[Finding], check: str, severity: str) -> Finding:
    assert [(f.check, f.severity) for f in findings] == [(check, severity)]
    return findings[0]


# --- learning rate ----------------------------------------------------------------------------------------------


def test_the_schedule_itself_is_no_finding() -> None:
    assert rates(healthy()) == []


def test_a_resumed_run_that_goes_on_is_no_finding() -> None:
    rows = healthy()
    rows.insert(12, {"event": "start", "update": 105, "resumed": True})
    assert rates(rows) == []


@pytest.mark.parametrize(("factor", "severity"), [(10.0, "refuse"), (0.01, "refuse"), (1.2, "warn")])
def test_another_learning_rate(factor: float, severity: str) -> None:
    rows = [{**row, "lr": row["lr"] * factor} if "lr" in row else row for row in healthy()]
    finding = only(rates(rows), "learning-rate", severity)
    assert finding.evidence["ratio"] == pytest.approx(factor)
    assert finding.evidence["wrong"] == len(LOGGED)
    assert f"{factor:.3g} times" in finding.what


def test_a_learning_rate_of_zero() -> None:
    finding = only(rates([{**row, "lr": 0.0} if "lr" in row else row for row in healthy()]), "learning-rate", "refuse")
    assert finding.evidence["ratio"] == 0.0


def test_a_warm_up_that_outlasts_the_run() -> None:
    finding = only(rates([step(u, 1e-3 * u / 800) for u in LOGGED]), "warm-up", "refuse")
    assert finding.evidence["last_lr"] == pytest.approx(1e-3 * 200 / 800)
    assert "25 % of the peak 0.001" in finding.what


def test_a_warm_up_under_way_in_a_running_run_is_no_finding() -> None:
    long = StageConfig(epochs=1000, peak_lr=1e-3)
    schedule = Schedule.of(TrainConfig(stages=(long,), warmup_steps=2000), (long,), BATCHES)
    rows = [step(u, schedule.learning_rate(u - 1), updates=schedule.updates) for u in LOGGED]
    assert learning_rates.rates(rows, "run", schedule.learning_rate, (long,)) == []


def restarted(at: int, *, say: bool) -> list[dict[str, Any]]:
    """A run whose schedule begins anew after update `at`."""
    rows = healthy()[:1]
    rows += [step(u, SCHEDULE.learning_rate(u - 1)) for u in LOGGED if u <= at]
    rows += [{"event": "start", "update": at, "resumed": True}] if say else []
    return rows + [step(u, SCHEDULE.learning_rate(u - 1 - at)) for u in LOGGED if u > at]


@pytest.mark.parametrize("say", [True, False], ids=["start row", "no start row"])
def test_a_schedule_that_restarts(say: bool) -> None:
    finding = only(rates(restarted(100, say=say)), "schedule-restart", "warn")
    assert finding.evidence["update"] == 100
    assert "after update 100" in finding.what


@pytest.mark.parametrize("say", [True, False], ids=["start row", "no start row"])
def test_another_warm_up_of_its_own(say: bool) -> None:
    rows = [row for row in restarted(100, say=say) if row["event"] == "start" or row["update"] <= 100]
    rows += [step(u, 1e-6 * (u - 100)) for u in LOGGED if u > 100]
    finding = only(rates(rows), "schedule-restart", "warn")
    assert "update 110 ran at 1e-05" in finding.what


def test_a_schedule_stepped_once_an_epoch_is_no_restart() -> None:
    rows = [step(u, SCHEDULE.learning_rate((u - 1) // BATCHES)) for u in LOGGED]
    assert only(rates(rows), "learning-rate", "refuse").evidence["wrong"] == len(LOGGED) - 1


def test_updates_that_are_counted_anew() -> None:
    rows = [*healthy()[:10], {"event": "start", "update": 80, "resumed": True}, *healthy()[1:]]
    assert only(rates(rows), "schedule-restart", "warn").evidence["update"] == 1


def test_the_second_stage_is_no_restart() -> None:
    stages = (StageConfig(epochs=5, peak_lr=3e-4), StageConfig(epochs=5, peak_lr=2e-4))
    schedule = Schedule.of(TrainConfig(stages=stages), stages, BATCHES)
    rows = [step(u, schedule.learning_rate(u - 1), stage=1 + (u > 100)) for u in LOGGED]
    assert learning_rates.rates(rows, "run", schedule.learning_rate, stages) == []


# --- gradients and updates ----------------------------------------------------------------------------------------


def test_the_study_s_decoder_without_gradient() -> None:
    silent = [f"encoder.layers.{i}.norm.weight" for i in range(8)] + ["decoder.layers.0.linear1.weight"]
    finding = only(
        training.no_gradient("run", silent, 9_541_304, 10_266_304, 10_266_304), "no-gradient", "refuse"
    )  # fmt: skip
    assert finding.what.startswith("725,000 of 10,266,304 parameters receive a gradient; 9,541,304")
    assert "encoder.layers.0" in finding.what
    assert "and 4 more" in finding.what


def test_a_bias_without_gradient_is_a_warning_and_none_is_nothing() -> None:
    assert only(training.no_gradient("run", ["ctc_head.bias"], 22, 280_000, 280_000), "no-gradient", "warn")
    assert training.no_gradient("run", [], 0, 280_000, 280_000) == []


def gradient_rows(**norms: float) -> list[dict[str, Any]]:
    parts = {"subsampling": 2.0, "encoder.0": 1.0, "ctc_head": 0.5, **norms}
    return [{"event": "gradients", "update": u, "norms": parts, "blank": 0.3, "rows": 0.2} for u in LOGGED]


def test_a_blank_without_gradient() -> None:
    assert training.blank_gradient(gradient_rows(), "run") == []
    rows = [{**row, "blank": 1e-9} for row in gradient_rows()]
    finding = only(training.blank_gradient(rows, "run"), "blank-gradient", "refuse")
    assert finding.evidence["share"] == pytest.approx(5e-9)
    rows[3]["blank"] = 0.3  # once is enough: the blank is part of the loss
    assert training.blank_gradient(rows, "run") == []


def test_a_part_whose_gradient_vanishes() -> None:
    assert training.gradients(gradient_rows(), "run", 1.0) == []
    rows = gradient_rows(**{"encoder.0": 1e-7, "subsampling": 1e-9})
    finding = only(training.gradients(rows, "run", 1.0), "gradients", "warn")
    assert finding.evidence["vanished"] == {"subsampling": 1e-9, "encoder.0": 1e-7}
    assert "that of subsampling is 1e-09" in finding.what


def test_gradients_that_explode() -> None:
    rows = healthy()
    assert training.gradients(rows, "run", 1.0) == []
    growing = [{**row, "gradient_norm": 1.5 ** row["update"]} for row in rows if "lr" in row and row["update"] < 60]
    finding = only(training.gradients(growing + gradient_rows(), "run", 1.0), "gradients", "warn")
    assert finding.evidence["last_quarter"] > 100 * finding.evidence["first_quarter"]
    assert "largest part is subsampling" in finding.what
    always = [{**row, "gradient_norm": 4000.0} for row in rows if "lr" in row]
    assert "4e+03" in only(training.gradients(always, "run", 1.0), "gradients", "warn").what


def test_a_loss_that_explodes() -> None:
    rows = [*healthy(), *({"event": "epoch", "train_loss": loss} for loss in (230.0, 780.0, 9.0))]
    finding = only(training.gradients(rows, "run", 1.0), "gradients", "warn")
    assert finding.evidence == {"first_loss": 1.0, "highest": 780.0, "last": 9.0}
    from_parent = [*healthy(), {"event": "epoch", "train_loss": 60.0}]  # 60 times the first, and nothing unusual
    assert training.gradients(from_parent, "run", 1.0) == []


def test_losses_and_gradients_that_are_no_numbers() -> None:
    assert training.non_finite([*healthy(), *gradient_rows()], "run") == []
    rows = [*healthy(), step(210, 1e-4, loss=math.nan, ctc=math.inf)]
    finding = only(training.non_finite(rows, "run"), "non-finite", "refuse")
    assert finding.evidence["rows"] == {"loss": 1, "ctc": 1}
    assert finding.evidence["first_update"] == 210
    parts = gradient_rows(**{"encoder.0": math.nan})
    assert training.non_finite(parts, "run")[0].evidence["rows"] == {"encoder.0": len(LOGGED)}


def test_the_loss_scaler_may_overflow_but_the_loss_may_not() -> None:
    rows = [*healthy(), step(210, 1e-4, gradient_norm=math.inf)]
    assert training.non_finite(rows, "run", mixed=True) == []
    assert only(training.non_finite(rows, "run"), "non-finite", "refuse")


def test_the_last_words_of_a_run_that_stopped_for_it() -> None:
    message = "Training stopped before an update: the loss is nan, in the batch of recordings a, b."
    assert "the loss is nan" in only(training.non_finite([], "run", message=message), "non-finite", "refuse").what
    assert training.non_finite([], "run", message="The disk is full.") == []


def test_skipped_batches() -> None:
    assert training.skipped_batches("run", 0, 200, steps=200) == []
    finding = only(training.skipped_batches("run", 0, 200, steps=150), "skipped-batches", "refuse")
    assert finding.what.startswith("50 of 200 batches or updates (25.0 %)")
    assert only(training.skipped_batches("run", 2, 200), "skipped-batches", "warn").evidence["skipped"] == 2
    assert training.skipped_batches("run", 5, 200, steps=195, mixed=True) == []
    assert only(training.skipped_batches("run", 90, 200, mixed=True), "skipped-batches", "refuse")


# --- frozen parts, loading, heads ------------------------------------------------------------------------------------


def test_frozen_parts_that_move() -> None:
    row = {"event": "frozen", "update": 40, "stage": 1, "of": 30, "moved": []}
    assert training.frozen([row], "run") == []
    moved = ["encoder.layers.0.out.weight", "encoder.layers.0.convolution.norm.running_mean"]
    findings = training.frozen([{**row, "moved": moved}], "run")
    assert [(f.check, f.severity) for f in findings] == [("frozen-moved", "refuse"), ("batchnorm-drift", "warn")]
    assert findings[0].evidence == {"moved": moved[:1], "of": 30}
    assert findings[1].evidence == {"moved": moved[1:], "of": 30}
    assert "during stage 1" in findings[0].what


def test_a_partial_load() -> None:
    assert training.partial_load("run", 146, 146, []) == []
    names = [f"encoder.{i}" for i in range(124)]
    finding = only(training.partial_load("run", 22, 146, names), "partial-load", "refuse")
    assert finding.what == "Only 22 of 146 tensors were loaded; not loaded: 124 of encoder."


BOTH, CTC_ONLY = ObjectiveConfig(), ObjectiveConfig(ctc=1.0, cross_entropy=0.0)


@pytest.mark.parametrize(
    ("decode", "objective", "untrained"),
    [
        (DecodeConfig(), BOTH, []),
        (DecodeConfig(mode="decoder"), BOTH, []),
        (DecodeConfig(), CTC_ONLY, []),
        (DecodeConfig(mode="decoder"), CTC_ONLY, ["decoder"]),
        (DecodeConfig(mode="decoder"), ObjectiveConfig(cross_entropy=0.0, decoder_kd=1.0), []),
        (DecodeConfig(), ObjectiveConfig(ctc=0.0), ["ctc"]),
        (DecodeConfig(), ObjectiveConfig(ctc=0.0, ctc_kd=1.0), []),
        (DecodeConfig(word_list=True), CTC_ONLY, ["decoder"]),
        (DecodeConfig(word_list=True, ctc_weight=1.0), CTC_ONLY, []),
        (DecodeConfig(word_list=True, ctc_weight=0.0), ObjectiveConfig(ctc=0.0), []),
    ],
)
def test_heads_that_are_decoded_but_not_trained(
    decode: DecodeConfig, objective: ObjectiveConfig, untrained: list[str]
) -> None:
    trained = training.trained_heads(objective)
    findings = training.untrained_head("run", training.heads_of(decode), trained, "here")
    if not untrained:
        assert findings == []
        return
    finding = only(findings, "untrained-head", "refuse")
    assert finding.evidence["untrained"] == untrained
    assert finding.points == 100.0
    inherited = training.untrained_head("run", training.heads_of(decode), trained, "here", inherited=True)
    assert only(inherited, "untrained-head", "warn")


def test_rows_of_another_shape_are_passed_over() -> None:
    rows: list[dict[str, Any]] = [
        {"event": "step", "update": "ten", "lr": None}, {"event": "gradients", "norms": [1, 2]}, {"event": "step"},
        {"event": "frozen", "of": 3, "moved": 7}, {"event": "start", "update": 5, "resumed": "yes"},
        {"event": "step", "update": math.nan, "lr": 1e-3}, {"event": "gradients", "norms": {"a": "x"}},
    ]  # fmt: skip
    assert rates(rows) == []
    assert training.gradients(rows, "run", 1.0) == []
    assert training.blank_gradient(rows, "run") == []
    assert training.frozen(rows, "run") == []
    assert training.non_finite(rows[:2], "run") == []
