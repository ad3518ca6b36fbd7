"""The benchmarks' claims at small scale: the severity dial turns the right way; synthetic speech carries to real."""

from __future__ import annotations

from pathlib import Path

import pytest

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
