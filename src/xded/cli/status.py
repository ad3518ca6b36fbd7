"""Show what a run has done and is doing.

Example: xded status runs/M08
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def status(
    run: Annotated[Path, typer.Argument(help="Run folder, or a folder of runs (teach, demo).", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """State, data, teachers, parameters, stages, progress, expected finish, checkpoints; a line for each of several."""
    from xded.training.status import read_status, render

    runs = sorted(path.parent for path in run.rglob("status.json"))
    if run in runs or not runs:
        found = read_status(run)
        typer.echo(json.dumps(found, indent=1) if as_json else render(found), nl=as_json)
        return
    several = {str(path.relative_to(run)): read_status(path) for path in runs}
    if as_json:
        typer.echo(json.dumps(several, indent=1))
        return
    for name, found in several.items():
        detail = found.get("message") or found.get("last_epoch" if found["state"] == "finished" else "progress")
        typer.echo(f"{name}: {found['state']}" + (f", {detail}" if detail else ""))
