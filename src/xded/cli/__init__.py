"""Command line: one thin file a verb. Importing it loads no torch."""

from __future__ import annotations

import sys

import typer

import xded.cli.corpus as corpus
import xded.cli.demo as demo
import xded.cli.evaluate as evaluate
import xded.cli.status as status
import xded.cli.targets as targets
import xded.cli.teach as teach
import xded.cli.train as train
import xded.cli.transcribe as transcribe
from xded import __version__
from xded.errors import EXIT_INTERRUPTED, XdedError

EXIT_CODES = (
    "Exit codes: 0 done; 1 something failed (disk full, loss not finite); 2 a wrong argument, config or input; "
    "3 done, and problems were found; 130 interrupted."
)

app = typer.Typer(
    help="Distil many speaker-specific recognisers into one, and test it on a speaker it has never heard.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    if version:
        typer.echo(f"xded {__version__}")
        raise typer.Exit


app.command("demo", help=demo.__doc__)(demo.demo)
app.add_typer(corpus.app, name="corpus")
app.command("teach", help=teach.__doc__)(teach.teach)
app.command("targets", help=targets.__doc__)(targets.targets)
app.command("train", help=train.__doc__)(train.train)
app.command("evaluate", help=evaluate.__doc__)(evaluate.evaluate)
app.command("transcribe", help=transcribe.__doc__)(transcribe.transcribe)
app.command("status", help=status.__doc__)(status.status)


def main() -> None:
    """Entry point: an `XdedError` becomes one paragraph on standard error and its exit code."""
    try:
        app()
    except XdedError as error:
        print(f"xded: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("xded: interrupted.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
