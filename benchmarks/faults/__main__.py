"""Plants every fault by itself and asks the doctor: is it named first or second, are healthy variants left alone?

    python benchmarks/faults [--only NAME ...] [--healthy | --faults] [--jobs 2] [--write]

Everything is planted below work/benchmarks/faults; --again examines what an earlier call planted.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder is the package `faults`, in workers too
    from faults.report import main

    main()
