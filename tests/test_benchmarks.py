"""The benchmarks at small scale: the severity dial turns the right way; synthetic speech carries to real; what is timed
is what is meant."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from xded.corpus.manifest import Recording

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.mark.slow
def test_wra_falls_with_severity(tmp_path: Path) -> None:
    import severity
    from common import predictions_of, wra_of

    words = severity.WORDS[:10]
    recogniser = severity.synthetic_recogniser(tmp_path, voices=24, words=words, updates=250)
    healthy = severity.synthesised(tmp_path / "healthy", 0.0, 12, words)

    def wra_percent(recordings: list[Recording]) -> float:
        return wra_of(predictions_of(recogniser, recordings)).value

    untouched = wra_percent(healthy)
    articulated = [wra_percent(severity.synthesised(tmp_path / "voices", s, 12, words)) for s in (0.5, 1.0)]
    simulated = [wra_percent(severity.simulated(healthy, tmp_path / "simulator", s)) for s in (0.5, 1.0)]

    assert untouched > 80
    for source, (middle, worst) in {"synthesiser": articulated, "simulator": simulated}.items():
        assert untouched > middle + 10 > worst + 20, f"{source}: {untouched}, {middle}, {worst}"


@pytest.mark.slow
def test_synthetic_digits_carry_to_real_ones(shared: Path, tmp_path: Path) -> None:
    import synthetic_to_real
    from common import predictions_of, wra_of

    test = synthetic_to_real.real_digits()[::6]
    recogniser = synthetic_to_real.digit_recogniser(tmp_path, test, voices=30, updates=250, seed=0)

    found = wra_of(predictions_of(recogniser, test, sorted({r.text for r in test})))

    assert found.low is not None
    assert found.low > 2 * synthetic_to_real.CHANCE_PERCENT


def test_our_step_agrees_with_float64_and_bf16_is_what_it_says() -> None:
    from train_step.ours import Xded, agreement
    from train_step.worker import made_up_batch

    waveforms, samples, *texts = made_up_batch(3, 0.5)
    case = {"layers": 2, "width": 16, "channels": 8, "dropout": 0.0}

    def apart(bf16: bool) -> dict[str, float]:
        torch.manual_seed(0)
        return agreement(Xded({**case, "bf16": bf16}, waveforms, samples // torch.tensor([1, 2, 1]), *texts))

    assert max(apart(bf16=False).values()) < 1e-4
    assert 1e-3 < apart(bf16=True)["gradient"] < 0.2


def test_a_frozen_step_trains_the_heads_alone() -> None:
    from train_step.ours import Xded
    from train_step.worker import made_up_batch

    ours = Xded({"layers": 1, "width": 16, "channels": 8, "dropout": 0.1, "frozen": True}, *made_up_batch(2, 0.5))
    ours.loss().backward()

    got = {name.split(".")[0] for name, p in ours.student.named_parameters() if p.grad is not None}
    assert got == {"ctc_head", "embedding", "decoder", "decoder_head"}


def test_the_whole_job_counts_all_of_its_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import whole_job

    settings = "--frozen 1 --unfrozen 2 --recordings 18 --validation 2 --size micro --threads 1 --folder"
    job = whole_job.make_job(tmp_path, whole_job.arguments([*settings.split(), str(tmp_path)]))
    seen = whole_job.train(job, resume=False)
    stages = [(row["epoch"], row["frozen"]) for row in seen["rows"]]
    assert stages == [(epoch, epoch == 0) for epoch in range(3) for _ in range(3)]
    assert all(0 < row["waiting_s"] < row["seconds"] and row["frames"] <= row["padded"] for row in seen["rows"])
    assert whole_job.train(job, resume=True) == seen  # of a finished run nothing is left to measure

    whole_job.report(job, seen)
    assert "The whole job, projected" in capsys.readouterr().out


def test_an_epoch_is_what_its_batches_say() -> None:
    import whole_job

    row = {"seconds": 2.0, "cpu_s": 3.0, "waiting_s": 0.5, "frames": 90, "padded": 100, "last": False}
    rows = [row, row, row, {**row, "seconds": 6.0, "last": True}]
    line, seconds = whole_job.stage_row("everything", 35, rows, per_epoch=8)  # half of an epoch was seen

    assert math.isclose(seconds, 24.0)
    assert line == "| everything | 35 | 1 | 24.0 | 24.0 | 2.000 | 16.7 | 10.0 | 4.0 |"


def test_posteriors_are_written_while_they_are_timed(tmp_path: Path) -> None:
    import posteriors
    import whole_job
    from xded.config import build

    pieces, prompts = whole_job.make_tokenizer()
    recordings = whole_job.make_recordings(tmp_path / "corpus", 4, prompts)
    config = build({"model": {"size": "micro"}}, "the test")
    turn = posteriors.measure_teacher(0, recordings, config, pieces, tmp_path)

    assert set(turn) == {"features", "plain", "extract"}
    assert all((tmp_path / "out" / "t00" / kind / "index.json").is_file() for kind in ("ctc", "decoder"))
