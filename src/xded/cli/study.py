"""Studies: attempts, folds, seeds and hypotheses in a file; run, and answered with intervals.

Example: xded study run debug --out work/debug
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xded.cli.options import JobsOption, cores

if TYPE_CHECKING:
    from xded.study.engine import Workers
    from xded.study.plan import Study

app = typer.Typer(
    help="A question as a file of attempts, folds, seeds and hypotheses.\n\n"
    "Example: xded study run debug --out work/debug",
    no_args_is_help=True,
)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="debug, loso, small-from-large, from-parent, withheld or demo.")],
    output: Annotated[Path | None, typer.Option("--output", help="File to write (default: NAME.yaml).")] = None,
) -> None:
    """Write a commented study file.

    Example: xded study new debug
    """
    from xded.study.plan import StudyError, built_in
    from xded.training.status import write_atomically

    text, path = built_in(name), output or Path(f"{name}.yaml")
    if path.exists():
        raise StudyError(f"{path} is there already.", "Choose another --output.")
    write_atomically(path, text)
    typer.echo(f"{path}\nRun it: xded study run {path}")


@app.command()
def run(
    study: Annotated[
        str,
        typer.Argument(
            help="Study file, or a built-in study: debug, loso, small-from-large, from-parent, withheld, demo."
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Folder (default: work/studies/NAME).")] = None,
    corpus: Annotated[Path | None, typer.Option("--corpus", help="Corpus in place of the file's.")] = None,
    held_out: Annotated[
        list[str] | None, typer.Option("--held-out", metavar="SPEAKER", help="Folds in place of the file's.")
    ] = None,
    jobs: JobsOption = 0,
    engine: Annotated[str, typer.Option(help="local: processes of this machine; ray: a Ray cluster.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="With ray: of this machine's cluster (auto, host:6379); none: this machine.")
    ] = None,
    gpus: Annotated[
        float, typer.Option(min=0, help="With ray: GPUs of each piece with a model (0.5: two share one).")
    ] = 0,
    memory_gb: Annotated[float, typer.Option(min=0.1, help="With ray: memory of each piece.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run whatever is not done yet; then verdicts, tables and what to do next.

    Example: xded study run debug --out work/debug
    """
    from xded.errors import ConfigError

    loaded = _load(study, corpus, held_out)
    folder = out or Path("work/studies") / loaded.name
    workers: Workers | None = None
    if engine == "ray":
        from xded.study.ray_workers import RayWorkers

        workers = RayWorkers(address, jobs or None, gpus=gpus, memory_gb=memory_gb)
    elif engine != "local":
        raise ConfigError(f"--engine {engine}: there is no such engine.", "Use local or ray.")
    carry_out(loaded, folder, study, jobs=jobs, workers=workers, as_json=as_json)


@app.command("import")
def import_(
    files: Annotated[list[Path], typer.Argument(help="Evaluation files, or folders of them, made anywhere.")],
    tokenizer: Annotated[
        list[Path] | None,
        typer.Option("--tokenizer", help="SentencePiece model that their ids belong to (or several)."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="Folder to write.", show_default=False)] = Path(
        "work/imported"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Recompute results made elsewhere from their token ids; reported and recomputed figures stand apart.

    Example: xded study import results/ --tokenizer tokenizer.model --output work/history
    """
    from rich.console import Console

    from xded.report.imported import table_of, to_dict
    from xded.study.imported import keep, read_all
    from xded.tokenizer import Tokenizer
    from xded.training.status import write_atomically

    tokenizers = {str(path): Tokenizer.load(path, "upper") for path in tokenizer or ()}
    rows, unread = read_all(files, tokenizers)
    keep(rows, output)
    table = table_of(rows)
    write_atomically(output / "report.md", table.markdown() + "".join(f"- not read: {line}\n" for line in unread))
    write_atomically(output / "results.json", json.dumps(to_dict(rows, unread), indent=1))
    if as_json:
        typer.echo(json.dumps(to_dict(rows, unread), indent=1))
    else:
        Console().print(table.rich())
        typer.echo("\n".join([*(f"Not read: {line}" for line in unread), str(output / "report.md")]))


def carry_out(
    study: Study, out: Path, named: str, *, jobs: int, workers: Workers | None = None, as_json: bool = False
) -> None:
    """Runs whatever is not done yet of a study and says what came of it.

    Args:
        study: validated; out: its folder; named: how `xded study run` is told which study it is.
        jobs: as `--jobs`; workers: where else than on this machine.

    Raises:
        TrainingError: pieces failed; what the others say has been written all the same.
    """
    from xded.errors import TrainingError
    from xded.report.study import finish
    from xded.study.run import run_study

    say = typer.echo if not as_json else (lambda line: None)
    outcome = run_study(study, out, jobs=cores(jobs), workers=workers, say=say)
    report = finish(outcome, out, named)
    typer.echo(json.dumps(report.to_dict(), indent=1) if as_json else report.text())
    failed = outcome.progress.count("failed")
    if failed:
        raise TrainingError(
            f"{failed} of {len(outcome.work.steps)} pieces failed: "
            + "; ".join(sorted(set(outcome.progress.errors.values()))[:3]),
            f"Mend the cause, then: xded study run {named} --out {out}",
        )


def _load(study: str, corpus: Path | None, held_out: list[str] | None) -> Study:
    import yaml

    from xded.study.plan import BUILT_IN, build, built_in, load

    path = Path(study)
    if study not in BUILT_IN or path.is_file():
        data = load(path).model_dump(mode="json")
    else:
        data = yaml.safe_load(built_in(study))
    if corpus is not None:
        data["corpus"] = str(corpus.resolve())
    if held_out:
        data["held_out"] = held_out
    return build(data, study)
