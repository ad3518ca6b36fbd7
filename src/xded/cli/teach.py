"""Train a parent and one teacher a target speaker, and test every teacher on every speaker. Finished ones are kept.

Example: xded teach --corpus work/uaspeech --held-out M08 --out work/M08/teachers
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from xded.cli.options import (
    ConfigOption,
    CorpusOption,
    ExcludeOption,
    HeldOutOption,
    JobsOption,
    OutOption,
    PretrainedOption,
    SetOption,
    configured,
    cores,
    need_corpus,
    resolved,
)


def teach(
    out: OutOption,
    corpus: CorpusOption = None,
    held_out: HeldOutOption = None,
    exclude: ExcludeOption = None,
    config: ConfigOption = None,
    parent_on: Annotated[
        str | None, typer.Option(metavar="WHO", help="Who the parent hears: controls, fold or both.")
    ] = None,
    freeze_layers: Annotated[int | None, typer.Option(help="First encoder layers that teachers keep.")] = None,
    model_size: Annotated[str | None, typer.Option(metavar="SIZE", help="micro, tiny, small or base.")] = None,
    pretrained: PretrainedOption = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer file; default: one is trained.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed.")] = None,
    jobs: JobsOption = 0,
    settings: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the cross-test matrix as JSON.")] = False,
) -> None:
    """Parent, teachers, cross-test matrix with vote and any-teacher oracle."""
    changes = {
        "corpus": corpus, "fold.held_out": held_out, "fold.exclude": exclude, "teach.parent_on": parent_on,
        "teach.teacher.freeze_layers": freeze_layers, "model.size": model_size, "tokenizer.path": tokenizer,
        "model.pretrained": pretrained, "seed": seed,
    }  # fmt: skip
    tree = resolved(configured(config, changes, settings))
    from xded.corpus.manifest import read_corpus
    from xded.report.tables import crosstest_table, crosstest_values
    from xded.teachers.adapt import teach as train_teachers
    from xded.teachers.crosstest import crosstest
    from xded.training.status import write_atomically

    loaded = read_corpus(need_corpus(tree))
    teachers = train_teachers(loaded, tree, out, jobs=cores(jobs))
    said = crosstest(loaded, teachers, tree, jobs=cores(jobs))
    values = crosstest_values(said, tree.tokenizer.normaliser, tree.fold.held_out)
    write_atomically(out / "crosstest.json", json.dumps(values, indent=1))
    if as_json:
        typer.echo(json.dumps(values, indent=1))
    else:
        from rich.console import Console

        Console().print(crosstest_table(values))
