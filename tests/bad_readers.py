"""Processes that read files from elsewhere and go wrong; with few imports, because each starts anew."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from xded.teachers import foreign_files


def dies(connection: Connection, path: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def greedy(connection: Connection, path: str) -> None:
    foreign_files._bound_memory(Path(path))
    try:
        np.ones(foreign_files.ROOM_BYTES // 8 + 2**24)
    except MemoryError:
        connection.send_bytes(b'{"error": "asked for too much"}')
