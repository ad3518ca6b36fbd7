"""Command line: one thin file a verb. Importing it loads no torch."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import NoReturn

import typer

import xded.cli.adapt as adapt
import xded.cli.average as average
import xded.cli.corpus as corpus
import xded.cli.crosstest as crosstest
import xded.cli.demo as demo
import xded.cli.doctor as doctor
import xded.cli.evaluate as evaluate
import xded.cli.export as export
import xded.cli.import_teachers as import_teachers
import xded.cli.inspect as inspect
import xded.cli.report as report
import xded.cli.status as status
import xded.cli.study as study
import xded.cli.targets as targets
import xded.cli.teach as teach
import xded.cli.tokenizer as tokenizer
import xded.cli.train as train
import xded.cli.transcribe as transcribe
from xded import __version__
from xded.errors import EXIT_FAILURE, EXIT_INTERRUPTED, XdedError

EXIT_CODES = (
    "Exit codes: 0 done; 1 something failed (disk full, loss not finite); 2 a wrong argument, config or input; "
    "3 done, and problems were found; 130 interrupted."
)

# what the system may refuse, whatever the arguments are; any other OSError is a bug and shows its traceback
REFUSALS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), ("the disk is full", "Free some space")),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), ("permission denied", "Mend its permissions")),
    errno.ENOTDIR: ("a file stands where a folder is needed", "Choose another path"),
    errno.EEXIST: ("a file stands where a folder is needed", "Choose another path"),
    errno.EISDIR: ("a folder stands where a file is needed", "Choose another path"),
    errno.EMFILE: ("too many files are open", "Raise 'ulimit -n'"),
    errno.EIO: ("the disk reports an error", "Check the disk"),
}

app = typer.Typer(
    help="Distil many speaker-specific recognisers into one, and test it on a speaker it has never heard.\n\n"
    "Example: xded demo --out work/demo",
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


def _add(name: str, module_doc: str | None, command: Callable[..., None]) -> None:
    """Adds a verb; the first sentence of its module's docstring stands in the list of verbs."""
    text = module_doc or ""
    app.command(name, help=text, short_help=text.partition(".")[0].partition(":")[0] + ".")(command)


_add("demo", demo.__doc__, demo.demo)
app.add_typer(corpus.app, name="corpus", short_help="Import, export, describe, check, synthesise or simulate a corpus.")
_add("teach", teach.__doc__, teach.teach)
_add("crosstest", crosstest.__doc__, crosstest.crosstest)
_add("import-teachers", import_teachers.__doc__, import_teachers.import_teachers)
_add("targets", targets.__doc__, targets.targets)
_add("train", train.__doc__, train.train)
_add("evaluate", evaluate.__doc__, evaluate.evaluate)
_add("adapt", adapt.__doc__, adapt.adapt)
_add("transcribe", transcribe.__doc__, transcribe.transcribe)
_add("average", average.__doc__, average.average)
_add("export", export.__doc__, export.export)
_add("tokenizer", tokenizer.__doc__, tokenizer.tokenizer)
app.add_typer(study.app, name="study", short_help="Run a question as declared, and answer it with intervals.")
_add("doctor", doctor.__doc__, doctor.doctor)
_add("inspect", inspect.__doc__, inspect.inspect)
_add("report", report.__doc__, report.report)
_add("status", status.__doc__, status.status)


def main() -> None:
    """Entry point: an error with a remedy becomes one paragraph on standard error and its exit code."""
    try:
        app()
    except XdedError as error:
        _stop(str(error), error.exit_code)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        problem, remedy = REFUSALS[error.errno]
        place = error.filename or _output() or "the output"
        _stop(f"{place}: {problem}. {remedy} and give the same command again: what is finished is kept.", EXIT_FAILURE)
    except KeyboardInterrupt:
        _stop("interrupted. Give the same command again to go on: what is finished is kept.", EXIT_INTERRUPTED)


def _output() -> str | None:
    """What --out or --output names: the system does not say which file a write that failed was for."""
    for word, following in pairwise([*sys.argv, ""]):
        flag, _, value = word.partition("=")
        if flag in ("--out", "--output"):
            return value or following
    return None


def _stop(paragraph: str, exit_code: int) -> NoReturn:
    print(f"xded: {' '.join(paragraph.split())}", file=sys.stderr)
    sys.exit(exit_code)
