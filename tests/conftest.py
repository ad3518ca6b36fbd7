"""What holds for every test: no network, one thread, and where the shared data lies."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
NO_NETWORK = ROOT / "tests" / "no_network"

# Set before torch or numpy is imported, and for the processes that tests start: sums then do not depend on the
# number of cores.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"

# This process, and through PYTHONPATH every one that it starts.
runpy.run_path(str(NO_NETWORK / "sitecustomize.py"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(NO_NETWORK), os.environ.get("PYTHONPATH"))))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the repository with real recordings and the reference study's files."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: real recordings and reference files are not there to test on")
    return SHARED
