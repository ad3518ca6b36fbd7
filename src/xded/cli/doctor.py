"""Why is it 0 %? Examine corpora, tokenizers, targets, runs, checkpoints and results, together or alone.

Example: xded doctor runs/M08
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def doctor(
    what: Annotated[
        list[Path],
        typer.Argument(help="Files and folders of any kind; several together are checked against each other."),
    ],
    probe: Annotated[
        bool, typer.Option("--probe", help="Also run the active probes on each run's checkpoint (a minute or two).")
    ] = False,
    passed: Annotated[bool, typer.Option("--passed", help="List the checks that passed, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    seed: Annotated[int, typer.Option(help="Of samples and probes.")] = 0,
) -> None:
    """Findings, worst first; exit code 3 when there is a problem. Nothing is modified."""
    from xded.doctor.examine import examine_all
    from xded.errors import EXIT_FINDINGS
    from xded.report.examination import render

    examination = examine_all(what, probe=probe, seed=seed)
    typer.echo(json.dumps(examination.to_dict(), indent=1) if as_json else render(examination, passed=passed))
    if examination.at_least("warn"):
        raise typer.Exit(EXIT_FINDINGS)
