"""Calls of `xded` as its entry point makes them, without a new process: importing torch takes seconds."""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from xded.cli import main


@dataclass(frozen=True)
class Called:
    """Exit code and what a call wrote."""

    code: int
    out: str
    err: str


def call(*arguments: object) -> Called:
    """Runs `xded ARGUMENTS`; an exception that `main` does not handle is a bug and comes out as it is."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with _argv(["xded", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Called(code, out.getvalue(), err.getvalue())


def done(*arguments: object) -> Called:
    """`call`, which must end with exit code 0."""
    called = call(*arguments)
    assert called.code == 0, called.err
    return called


@contextmanager
def _argv(words: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before


def refused(called: Called, code: int, *fragments: str) -> None:
    """Asserts an error for people: exit code, nothing on standard output, one paragraph that says all of it."""
    assert called.code == code, (called.out, called.err)
    assert called.out == ""
    assert called.err.startswith("xded: ")
    assert called.err.endswith(".\n")
    assert called.err.count("\n") == 1, called.err
    missing = [fragment for fragment in fragments if fragment not in called.err]
    assert not missing, called.err


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder and the hash of its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
