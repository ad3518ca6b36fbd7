"""Ask every teacher about every training recording, once, and aggregate the answers into targets.

Example: xded targets --corpus work/uaspeech --teachers work/M08/teachers --held-out M08 --out work/M08/targets
"""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xded.cli.options import (
    TOKENIZER,
    ConfigOption,
    CorpusOption,
    ExcludeOption,
    HeldOutOption,
    JobsOption,
    OutOption,
    SetOption,
    configured,
    cores,
    need_corpus,
    resolved,
)

if TYPE_CHECKING:
    from xded.targets.store import Index


def targets(
    teachers: Annotated[Path, typer.Option("--teachers", help="Folder of 'xded teach'.", show_default=False)],
    out: OutOption,
    corpus: CorpusOption = None,
    held_out: HeldOutOption = None,
    exclude: ExcludeOption = None,
    config: ConfigOption = None,
    heard: Annotated[str | None, typer.Option(metavar="HEARD", help="same_audio or same_prompt.")] = None,
    aggregation: Annotated[
        str | None, typer.Option(metavar="MEAN", help="prob_mean, logprob_mean or logit_mean.")
    ] = None,
    weighting: Annotated[
        str | None, typer.Option(metavar="WEIGHTS", help="uniform, reliability, confidence or band.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="T of the targets.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Entries kept of each posterior.")] = None,
    coverage: Annotated[
        str | None, typer.Option(metavar="MODE", help="strict, partial or all (with same_prompt).")
    ] = None,
    min_teachers: Annotated[int | None, typer.Option(help="With coverage partial.")] = None,
    controls: Annotated[
        bool | None, typer.Option("--controls/--no-controls", help="Control speakers train too.")
    ] = None,
    jobs: JobsOption = 0,
    settings: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Posteriors of each teacher (decoder steps and CTC frames), then one aggregate a recording."""
    changes = {
        "corpus": corpus, "fold.held_out": held_out, "fold.exclude": exclude, "fold.controls": controls,
        "target.heard": heard, "target.aggregation": aggregation, "target.weighting": weighting,
        "target.top_k": top_k, "target.coverage": coverage, "target.min_teachers": min_teachers,
        "objective.temperature": temperature,
    }  # fmt: skip
    tree = resolved(configured(config, changes, settings))
    from xded.corpus.folds import make_fold
    from xded.corpus.manifest import read_corpus
    from xded.teachers.adapt import Teachers, parts_of
    from xded.teachers.posteriors import make_targets

    loaded = read_corpus(need_corpus(tree))
    fold = make_fold(loaded, tree.fold)
    parts = parts_of(loaded, fold, tree)
    folder = Teachers(teachers)
    made = make_targets(loaded, folder, fold, parts.train, tree, out, jobs=cores(jobs))
    copyfile(folder.tokenizer, out / TOKENIZER)  # a student of these targets needs it
    summary = {kind: _summary(index, out / kind, len(parts.train)) for kind, index in made.items()}
    if as_json:
        typer.echo(json.dumps(summary, indent=1))
        return
    for kind, row in summary.items():
        typer.echo(
            f"{kind}: {row['recordings']} of {row['of']} training recordings, {len(row['teachers'])} teachers "
            f"({row['effective_teachers']} effective), {row['megabytes']} MB in {out / kind}"
        )


def _summary(index: Index, folder: Path, recordings: int) -> dict[str, Any]:
    return {
        "recordings": len(index.recordings),
        "of": recordings,
        "teachers": list(index.teachers),
        "effective_teachers": round(index.effective_teachers, 2),
        "megabytes": round(sum(file.stat().st_size for file in folder.iterdir()) / 2**20, 2),
    }
