"""What a piece of work costs in energy, where Linux lets one read it (RAPL counters under powercap). Imports no torch.

The counters are of whole processor packages and of the memory beside them. A piece is given the part of it that its
CPU time is of the CPU time of everything that ran on the machine meanwhile: pieces side by side then add up to no more
than the machine used. GPUs are not in it.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

POWERCAP = Path("/sys/class/powercap")
STAT = Path("/proc/stat")
LOOK_EVERY_S = 60.0  # a counter starts again at 0 after some 10 to 60 minutes of work
IDLE = (3, 4)  # of the numbers of a line `cpu` in /proc/stat: idle, waiting for disks
GUEST = 8  # from here on they are in the ones before, too


@dataclass(frozen=True)
class Counter:
    """Energy that a package, or its memory, has used: goes up to `most_uj`, then starts again at 0."""

    path: Path
    most_uj: int

    def read_uj(self) -> int:
        """Microjoules."""
        return int(self.path.read_text())

    def since_uj(self, before_uj: int, now_uj: int) -> int:
        """Microjoules between two readings, less than a turn of the counter apart."""
        return now_uj - before_uj if now_uj >= before_uj else now_uj + self.most_uj - before_uj


def counters(root: Path = POWERCAP) -> tuple[Counter, ...]:
    """The counters of all packages and of memory; none where one of them cannot be read (mostly root alone may).

    Other zones are parts of a package (cores, graphics) or hold it (the platform).
    """
    found = []
    try:
        for zone in sorted(root.glob("intel-rapl:*")):
            if (zone / "name").read_text().strip().startswith(("package", "dram")):
                found.append(Counter(zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())))
        for counter in found:
            counter.read_uj()
    except (OSError, ValueError):
        return ()
    return tuple(found)


def busy_s(stat: Path = STAT) -> float:
    """CPU seconds that the machine has worked since it was started."""
    ticks = [int(value) for value in stat.read_text().splitlines()[0].split()[1:]][:GUEST]
    return (sum(ticks) - sum(ticks[place] for place in IDLE)) / float(os.sysconf("SC_CLK_TCK"))


def own_s() -> float:
    """CPU seconds of this process, and of those that it has started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Meter:
    """Measures while it is open; afterwards `joules` are this process's, or none where that is not known."""

    def __init__(self, powercap: Path = POWERCAP, stat: Path = STAT) -> None:
        self.stat, self.joules = stat, None if not (found := counters(powercap)) else 0.0
        self._counters, self._over = found, threading.Event()
        self._watch = threading.Thread(target=self._look_now_and_then, daemon=True)

    def __enter__(self) -> Self:
        try:
            self._seen = {counter: counter.read_uj() for counter in self._counters}
            self._busy_s, self._own_s, self._used_uj = busy_s(self.stat), own_s(), 0
        except (OSError, ValueError, IndexError):
            self._counters, self.joules = (), None
        if self._counters:
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._counters:
            return
        self._over.set()
        self._watch.join()
        self._look()
        if self.joules is not None:
            busy = busy_s(self.stat) - self._busy_s
            share = min(1.0, (own_s() - self._own_s) / busy) if busy > 0 else 0.0
            self.joules = round(share * self._used_uj / 1e6, 1)

    def _look_now_and_then(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            self._look()

    def _look(self) -> None:
        try:
            for counter, before in self._seen.items():
                now = counter.read_uj()
                self._used_uj += counter.since_uj(before, now)
                self._seen[counter] = now
        except (OSError, ValueError):
            self.joules = None
