"""The main job from nothing to a report: corpus, parent, teachers, targets, students, baselines, unheard speakers.

Without --corpus it makes its own small synthetic corpus. Example: xded demo --out work/demo
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xded.cli.options import ConfigOption, CorpusOption, JobsOption, SetOption, configured, cores, resolved

if TYPE_CHECKING:
    from xded.demo import Outcome, Plan


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder to write; what is finished there is kept.")] = Path(
        "work/demo"
    ),
    corpus: CorpusOption = None,
    config: ConfigOption = None,
    fold_size: Annotated[int, typer.Option(metavar="N", min=1, help="Speakers held out together.")] = 2,
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="Students trained with so many seeds.")] = 2,
    updates: Annotated[int, typer.Option(metavar="N", min=1, help="Updates of every student.")] = 250,
    attempt: Annotated[
        list[str] | None,
        typer.Option("--attempt", help="Only this student or baseline (repeat for more).", show_default=False),
    ] = None,
    jobs: JobsOption = 0,
    settings: SetOption = None,
) -> None:
    """Parent, teachers, targets, students and baselines; every target speaker is held out once; then the table."""
    tree = resolved(configured(config or preset(), {"corpus": corpus}, settings))
    from xded.corpus.manifest import read_corpus
    from xded.demo import ATTEMPTS, Plan, run
    from xded.errors import ConfigError

    unknown = sorted(set(attempt or ()) - set(ATTEMPTS))
    if unknown:
        raise ConfigError(f"--attempt '{unknown[0]}' is none of the demo's.", f"Choose among: {'; '.join(ATTEMPTS)}.")

    if tree.corpus is None:
        typer.echo("making the embedded corpus ...")
    loaded = read_corpus(tree.corpus or embedded(out / "corpus"))
    tree = tree.model_copy(update={"corpus": loaded.path})
    plan = Plan(fold_size, seeds, updates, tuple(attempt or ATTEMPTS), cores(jobs))
    outcome = run(loaded, tree, plan, out, typer.echo)
    write_report(outcome, plan, loaded.texts, tree.tokenizer.normaliser, out)


def preset() -> Path:
    """The config that the demo runs with when none is given."""
    return Path(__file__).parents[1] / "demo.yaml"


def embedded(folder: Path) -> Path:
    """The demo's small part of the embedded corpus: 8 control and 8 target speakers, 10 words, 4 takes."""
    from xded.corpus.synthetic import make_embedded_corpus

    manifest = folder / "manifest.jsonl"
    return (
        manifest
        if manifest.is_file()
        else make_embedded_corpus(folder, controls=8, targets=8, words=10, takes=4, seed=0)
    )


def write_report(outcome: Outcome, plan: Plan, words: tuple[str, ...], normaliser: str, out: Path) -> None:
    """Prints the tables and sentences, and writes them to OUT/report.md and every score to OUT/scores/."""
    from rich.console import Console

    from xded.demo import DECODES, file_name
    from xded.report.main_job import band_table, in_words, main_table, scores_of
    from xded.training.status import write_atomically

    scores = scores_of(outcome.results, normaliser, words, DECODES, outcome.words_heard)
    folds = ", ".join("+".join(fold) for fold in outcome.folds)
    title = (
        f"Unheard speakers: {_count(len(outcome.folds), 'fold')} ({folds}), {_count(plan.seeds, 'seed')}, "
        f"{_count(plan.updates, 'update')} each"
    )
    tables = [main_table(scores, len(words), title), *(t for t in (band_table(scores, "open"),) if t)]
    sentences = in_words(scores)
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in outcome.seconds.items())
    cost = f"Time of the last call: {seconds} ({_count(plan.jobs, 'process', 'es')}); what it found finished was kept."
    console = Console()
    for table in tables:
        console.print(table.rich(), end="\n\n")
    for line in (*sentences, cost):
        console.print(line, highlight=False, markup=False)
    folder = out / "scores"
    folder.mkdir(parents=True, exist_ok=True)
    for system, by_decode in scores.items():
        for decode, result in by_decode.items():
            name = f"{file_name(system)}.{file_name(decode)}.json"
            write_atomically(folder / name, result.to_json())
    parts = [table.markdown() for table in tables] + ["".join(f"- {s}\n" for s in sentences), f"{cost}\n"]
    write_atomically(out / "report.md", "\n".join(parts))
    typer.echo(f"{out / 'report.md'}")


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"
