"""Show what a run, a folder of runs or a study has done and is doing.

Example: xded status work/debug --watch
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from xded.study.status import View

WIDTH = 160  # characters of a line where there is no terminal


def status(
    run: Annotated[
        Path,
        typer.Argument(help="Run folder, a folder of runs (teach), or a study's folder.", show_default=False),
    ],
    watch: Annotated[
        bool, typer.Option("--watch/--once", help="Show it again and again until it ends, or Ctrl-C; or once.")
    ] = False,
    every: Annotated[
        float, typer.Option("--every", metavar="SECONDS", min=0.1, help="Between two looks with --watch.")
    ] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, once.")] = False,
) -> None:
    """State, progress, losses and WRA as small curves, time left, what failed and why; of runs also their data.

    It reads only; what it looks at may be at work, finished or dead. Without a terminal --watch shows it once.
    """
    from xded.study.status import is_study

    if not is_study(run) and (as_json or not sys.stdout.isatty()):
        _print_runs(run, as_json=as_json)
    elif as_json:
        typer.echo(json.dumps(_look(run).to_dict(), indent=1))
    elif watch and sys.stdout.isatty():
        _watch(run, every)
    else:
        _print(_look(run))


def _look(folder: Path) -> View:
    from xded.study.status import is_study, read_runs, read_study_view

    return read_study_view(folder) if is_study(folder) else read_runs(folder)


def _print(view: View) -> None:
    from rich.console import Console

    from xded.report.status import page

    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(page(view, console.width, blocks=console.encoding.startswith("utf")))


def _print_runs(folder: Path, *, as_json: bool) -> None:
    from dataclasses import asdict

    from xded.study.status import finite, read_curve
    from xded.training.status import read_status, render

    runs = sorted(path.parent for path in folder.rglob("status.json"))
    one = folder in runs or not runs
    several = {str(path.relative_to(folder)): read_status(path) for path in ([folder] if one else runs)}
    if as_json:
        curves = {name: {"curve": asdict(read_curve(folder / name / "metrics.jsonl"))} for name in several}
        listed = finite({name: {**found, **curves[name]} for name, found in several.items()})
        typer.echo(json.dumps(listed["."] if one else listed, indent=1))
        return
    if one:
        typer.echo(render(several["."]), nl=False)
        return
    for name, found in several.items():
        detail = found.get("message") or found.get("last_epoch" if found["state"] == "finished" else "progress")
        typer.echo(f"{name}: {found['state']}" + (f", {detail}" if detail else ""))


def _watch(folder: Path, every_s: float) -> None:
    """Looks again and again; what cannot be read for a moment is said below what was read last."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from xded.errors import XdedError
    from xded.report.status import page

    view, problem = _look(folder), ""
    console = Console(highlight=False)
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            shown = page(view, console.width, console.height, blocks=console.encoding.startswith("utf"))
            live.update(Group(shown, Text(problem, style="red")) if problem else shown, refresh=True)
            if view.over:
                return
            time.sleep(every_s)
            try:
                view, problem = _look(folder), ""
            except XdedError as error:
                problem = str(error)
