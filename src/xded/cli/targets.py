"""Ask every teacher about every training recording, once, and aggregate the answers into targets.

Example: xded targets --corpus work/uaspeech --teachers work/M08/teachers --held-out M08 --out work/M08/targets
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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
from xded.corpus.manifest import BANDS

if TYPE_CHECKING:
    from xded.config import Config
    from xded.corpus.folds import Fold
    from xded.targets.store import Index
    from xded.teachers.adapt import Teachers


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
        str | None,
        typer.Option(
            metavar="WEIGHTS", help="uniform, reliability, confidence, band, accuracy, likelihood or embedding."
        ),
    ] = None,
    asked: Annotated[str | None, typer.Option(metavar="WHOM", help="all, own or own_and_parent.")] = None,
    best: Annotated[int | None, typer.Option(help="Only so many teachers of the largest weights a recording.")] = None,
    spelled_only: Annotated[
        bool | None,
        typer.Option("--spelled-only/--not-spelled-only", help="No target where the aggregate misspells the prompt."),
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
    """Posteriors of each teacher (decoder steps, CTC frames, words with objective.word_kd), then one aggregate each."""
    changes = {
        "corpus": corpus, "fold.held_out": held_out, "fold.exclude": exclude, "fold.controls": controls,
        "target.heard": heard, "target.aggregation": aggregation, "target.weighting": weighting,
        "target.asked": asked, "target.best": best, "target.spelled_only": spelled_only,
        "target.top_k": top_k, "target.coverage": coverage, "target.min_teachers": min_teachers,
        "objective.temperature": temperature,
    }  # fmt: skip
    tree = resolved(configured(config, changes, settings))
    _make(tree, teachers, out, cores(jobs), as_json)


def _make(tree: Config, teachers: Path, out: Path, jobs: int, as_json: bool) -> None:
    from xded.corpus.folds import make_fold
    from xded.corpus.manifest import read_corpus
    from xded.teachers.adapt import Teachers, parts_of
    from xded.teachers.aggregation import make_targets

    loaded = read_corpus(need_corpus(tree))
    fold = make_fold(loaded, tree.fold)
    parts = parts_of(loaded, fold, tree)
    folder = Teachers(teachers)
    made = make_targets(loaded, folder, fold, parts.train, tree, out, jobs=jobs)
    copyfile(folder.tokenizer, out / TOKENIZER)  # a student of these targets needs it
    bands = {r.recording: r.band for r in parts.train if r.band}
    not_asked = _not_asked(folder, fold, next(iter(made.values())))
    summary = {kind: _summary(index, out / kind, len(parts.train), bands) for kind, index in made.items()}
    if as_json:
        typer.echo(json.dumps({kind: row | {"not_asked": not_asked} for kind, row in summary.items()}, indent=1))
        return
    if not_asked:
        typer.echo("Not asked: " + ", ".join(f"{speaker} ({why})" for speaker, why in not_asked.items()) + ".")
    for kind, row in summary.items():
        by_band = "; " + ", ".join(f"{band} {n}" for band, n in row["effective_by_band"].items())
        typer.echo(
            f"{kind}: {row['recordings']} of {row['of']} training recordings, {len(row['teachers'])} teachers "
            f"({row['effective_teachers']} effective{by_band if row['effective_by_band'] else ''}), "
            f"{row['megabytes']} MB in {out / kind}"
        )
        if row["dropped"]:
            typer.echo(f"  {row['dropped']} recordings have no target: no mean spells their text.")


def _not_asked(teachers: Teachers, fold: Fold, index: Index) -> dict[str, str]:
    """Speakers whose teachers have no part in the targets, and why."""
    from xded.teachers.aggregation import left_out

    forbidden = left_out(teachers, fold)
    silent = sorted({*teachers.finished, *teachers.imported} - {*index.teachers, *forbidden})
    return forbidden | dict.fromkeys(silent, "no training recording to ask about")


def _summary(index: Index, folder: Path, recordings: int, bands: Mapping[str, str]) -> dict[str, Any]:
    by_band = index.effective_by(bands)
    return {
        "recordings": len(index.recordings),
        "of": recordings,
        "teachers": list(index.teachers),
        "effective_teachers": round(index.effective_teachers, 2),
        "effective_by_band": {band: round(by_band[band], 2) for band in BANDS if band in by_band},
        "spelled_only": index.spelled_only,
        "dropped": len(index.dropped),
        "megabytes": round(sum(file.stat().st_size for file in folder.iterdir()) / 2**20, 2),
    }
