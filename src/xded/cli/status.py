"""Show what a run has done and is doing.

Example: xded status runs/M08
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def status(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """State, data, teachers, parameters, stages, progress, expected finish, checkpoints."""
    from xded.training.status import read_status, render

    found = read_status(run)
    typer.echo(json.dumps(found, indent=1) if as_json else render(found), nl=as_json)
