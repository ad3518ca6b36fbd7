"""`python reading.py ARCHIVE`: seconds and peak memory of reading an archive, over what the process had before."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter, process_time

import torch

from xded.models.nemo import read_archive


def peak_mb() -> float:
    """Largest resident size so far (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


if __name__ == "__main__":
    torch.set_num_threads(1)
    before, started, cpu_started = peak_mb(), perf_counter(), process_time()
    archive = read_archive(Path(sys.argv[1]))
    seconds = perf_counter() - started
    cost = {"seconds": seconds, "cpu_seconds": process_time() - cpu_started, "peak_mb": peak_mb() - before}
    print(json.dumps(cost))
