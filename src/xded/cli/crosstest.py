"""Every teacher on every speaker: mean, best, vote and oracle, for results from elsewhere or our own teachers.

Example: xded crosstest results/crosstest --out work/crosstest
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xded.cli.options import CorpusOption, JobsOption, cores
from xded.errors import EXIT_FINDINGS, ScoringError, few

if TYPE_CHECKING:
    from xded.report.tables import Table
    from xded.scoring import Prediction
    from xded.teachers.adapt import Teachers
    from xded.teachers.crosstest import Tested
    from xded.teachers.results import Results

PARENT_CONFIG = "config.yaml"


def crosstest(
    source: Annotated[
        Path,
        typer.Argument(
            help="Results (wer_*.txt of SpeechBrain, evaluation JSON, predictions.jsonl), or a folder of 'xded teach'.",
            show_default=False,
        ),
    ],
    corpus: CorpusOption = None,
    tokenizer: Annotated[
        list[Path] | None,
        typer.Option("--tokenizer", metavar="FILE", help="Decodes token ids in results (repeat for more)."),
    ] = None,
    normaliser: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of outputs and prompts; default: upper, or the teachers' own."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write crosstest.json, .csv and .md here.", show_default=False)
    ] = None,
    jobs: JobsOption = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """WRA of each teacher on each speaker with intervals over takes. Exit code 3 when something had to be left out."""
    from xded.report.crosstest import left_out, table_of, to_dict
    from xded.teachers.adapt import Teachers
    from xded.teachers.crosstest import examine

    teachers = Teachers(source)
    if (teachers.parent / PARENT_CONFIG).is_file():
        said, own, problems = _ask(teachers, corpus, jobs)
        undecoded: list[Path] = []
    else:
        results = _read(source, corpus, tokenizer or [])
        said, own, problems = results.said, "upper", list(results.problems)
        undecoded = list(results.undecoded)
    used = normaliser or own
    tested, apart = examine(said, used)
    problems += [f"{speaker}: no recording that all of its teachers have." for speaker in apart]
    if not tested:
        raise ScoringError(f"{source}: nothing to compare. {problems[0]}", "Test the teachers on the same recordings.")
    problems += left_out(tested)
    table, data = table_of(tested, used), {**to_dict(tested, used), "problems": problems}
    written = _write(out, table, data, tested) if out else []
    if as_json:
        typer.echo(json.dumps(data, ensure_ascii=False, indent=1))
    else:
        _print(table, problems, undecoded, written)
    if problems:
        raise typer.Exit(EXIT_FINDINGS)


def _read(source: Path, corpus: Path | None, tokenizers: list[Path]) -> Results:
    from xded.corpus.manifest import read_corpus
    from xded.teachers.results import read_results
    from xded.tokenizer import Tokenizer

    if not source.exists():
        raise ScoringError(f"{source} does not exist.", "Give a folder of results, or of 'xded teach'.")
    loaded = {str(path): Tokenizer.load(path, "upper") for path in tokenizers}
    return read_results(source, loaded, read_corpus(corpus) if corpus else None)


def _ask(teachers: Teachers, corpus: Path | None, jobs: int) -> tuple[Mapping[str, list[Prediction]], str, list[str]]:
    """Our own teachers, tested as 'xded teach' does with the fold and the decoding of their config."""
    from xded import config as configs
    from xded.cli.options import need_corpus
    from xded.corpus.manifest import read_corpus
    from xded.teachers.crosstest import crosstest as ask

    config = configs.load(teachers.parent / PARENT_CONFIG)
    loaded = read_corpus(corpus or need_corpus(config))
    said = ask(loaded, teachers, config, jobs=cores(jobs))
    begun = {folder.name for folder in (teachers.folder / "teachers").iterdir() if folder.is_dir()}
    unfinished = sorted(begun - set(teachers.finished))
    problems = [f"Not finished and left out: {few(unfinished)}."] if unfinished else []
    return said, config.tokenizer.normaliser, problems


def _write(out: Path, table: Table, data: dict[str, Any], tested: Sequence[Tested]) -> list[Path]:
    from xded.report.crosstest import csv_of
    from xded.training.status import write_atomically

    texts = {"json": json.dumps(data, ensure_ascii=False, indent=1), "csv": csv_of(tested), "md": table.markdown()}
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"crosstest.{suffix}" for suffix in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write_atomically(path, text)
    return paths


def _print(table: Table, problems: Sequence[str], undecoded: Sequence[Path], written: Sequence[Path]) -> None:
    from rich.console import Console

    Console().print(table.rich())
    for problem in problems:
        typer.echo(f"Problem: {problem}")
    if undecoded:
        names = few(str(path) for path in undecoded)
        typer.echo(f"Texts as stored, though there are token ids: {names}. --tokenizer FILE decodes and compares them.")
    for path in written:
        typer.echo(path)
