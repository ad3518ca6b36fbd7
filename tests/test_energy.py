"""Energy of a piece of work, from counters in a made-up sysfs folder."""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path

import pytest

from xded.training import energy
from xded.training.energy import Counter, Meter, busy_s, counters

TICKS = os.sysconf("SC_CLK_TCK")


def zone(root: Path, folder: str, name: str, uj: int, most_uj: int = 1_000_000) -> Path:
    """A zone of powercap; returns its counter."""
    path = root / folder
    path.mkdir(parents=True, exist_ok=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{uj}\n")
    (path / "max_energy_range_uj").write_text(f"{most_uj}\n")
    return path / "energy_uj"


def stat(path: Path, busy: float, idle: float = 500.0) -> Path:
    """/proc/stat of a machine that has worked for some seconds, some of them in guests."""
    numbers = [busy / 2, 0, busy / 2, idle, 7, 0, 0, 0, busy / 4, 0]
    path.write_text("cpu  " + " ".join(str(round(n * TICKS)) for n in numbers) + "\ncpu0 1 2 3\n")
    return path


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """CPU seconds of this process, as it is told."""
    said = [10.0]
    monkeypatch.setattr(energy, "own_s", lambda: said[0])
    return said


def test_packages_and_their_memory_are_counted_and_nothing_twice(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    zone(tmp_path, "intel-rapl:0:0", "core", 1)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 1)
    zone(tmp_path, "intel-rapl:1", "package-1", 1)
    zone(tmp_path, "intel-rapl:2", "psys", 1)
    found = [counter.path for counter in counters(tmp_path)]
    assert [path.parent.name for path in found] == ["intel-rapl:0", "intel-rapl:0:1", "intel-rapl:1"]
    assert memory in found


def test_a_counter_that_turned_over_lost_nothing(tmp_path: Path) -> None:
    counter = Counter(tmp_path, 1000)
    assert counter.since_uj(100, 300) == 200
    assert counter.since_uj(900, 50) == 150


def test_busy_is_neither_idle_nor_waiting_nor_counted_twice(tmp_path: Path) -> None:
    assert busy_s(stat(tmp_path / "stat", 200.0)) == pytest.approx(200.0)
    assert busy_s() > 0


def test_a_piece_is_given_its_share_of_what_all_counters_counted(tmp_path: Path, own: list[float]) -> None:
    one = zone(tmp_path, "intel-rapl:0", "package-0", 999_999_000, 1_000_000_000)
    two = zone(tmp_path, "intel-rapl:1", "package-1", 0, 1_000_000_000)
    clock = stat(tmp_path / "stat", 100.0)
    with Meter(tmp_path, clock) as meter:
        one.write_text("59999000")  # 60 J, over the end
        two.write_text("20000000")  # 20 J
        stat(clock, 140.0)
        own[0] = 20.0  # 10 of 40 CPU seconds
    assert meter.joules == pytest.approx(20.0)


def test_a_long_piece_is_looked_at_before_its_counter_turns_over_twice(
    tmp_path: Path, own: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "LOOK_EVERY_S", 0.001)
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0, 10_000_000)
    clock = stat(tmp_path / "stat", 100.0)
    looked = threading.Event()
    read = Counter.read_uj

    def noted(self: Counter) -> int:
        uj = read(self)
        if uj == waited_for[0]:
            looked.set()
        return uj

    waited_for = [math.nan]
    monkeypatch.setattr(Counter, "read_uj", noted)
    with Meter(tmp_path, clock) as meter:
        for uj in (9_000_000, 4_000_000, 2_000_000):  # 9 + 5 + 8 J
            waited_for[0] = uj
            looked.clear()
            temporary = counter.with_name("new")
            temporary.write_text(str(uj))
            temporary.replace(counter)
            assert looked.wait(10)
        stat(clock, 110.0)
        own[0] = 20.0
    assert meter.joules == pytest.approx(22.0)


def test_nothing_is_known_without_a_counter_that_can_be_read(tmp_path: Path, own: list[float]) -> None:
    def measured(folder: Path, clock: Path) -> float | None:
        with Meter(folder, clock) as meter:
            own[0] += 1.0
        return meter.joules

    clock = stat(tmp_path / "stat", 100.0)
    assert measured(tmp_path / "absent", clock) is None
    counter = zone(tmp_path / "there", "intel-rapl:0", "package-0", 5)
    assert measured(tmp_path / "there", clock) == 0.0
    assert measured(tmp_path / "there", tmp_path / "no stat") is None
    counter.write_text("locked\n")
    assert measured(tmp_path / "there", clock) is None
    counter.unlink()  # as when only root may read it
    counter.mkdir()
    assert measured(tmp_path / "there", clock) is None


def test_a_counter_that_goes_away_meanwhile_leaves_nothing_known(tmp_path: Path, own: list[float]) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 5)
    with Meter(tmp_path, stat(tmp_path / "stat", 100.0)) as meter:
        counter.unlink()
        own[0] = 11.0
    assert meter.joules is None


def test_an_error_in_the_piece_is_not_swallowed(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 5)
    with pytest.raises(KeyError), Meter(tmp_path, stat(tmp_path / "stat", 1.0)):
        raise KeyError
