"""Import posteriors that other tools' teachers gave: checked recording by recording, stored for 'xded targets'.

Example: xded import-teachers logits --corpus work/uaspeech --tokenizer tokenizer.model --out work/teachers
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xded.cli.options import (
    ConfigOption,
    CorpusOption,
    JobsOption,
    OutOption,
    SetOption,
    configured,
    cores,
    need_corpus,
    resolved,
)

if TYPE_CHECKING:
    from xded.report.tables import Table
    from xded.teachers.imported import Imported


def import_teachers(
    logits: Annotated[
        Path, typer.Argument(help="Folder with <speaker>_ctc_logits and <speaker>_decoder_logits.", show_default=False)
    ],
    tokenizer: Annotated[Path, typer.Option(help="The teachers' tokenizer.", show_default=False)],
    out: OutOption,
    corpus: CorpusOption = None,
    heard: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEAKER", help="All teachers have heard this one too (repeat for more)."),
    ] = None,
    frame_rate: Annotated[float, typer.Option(metavar="HZ", min=1.0, help="CTC frames a second.")] = 25.0,
    temperature: Annotated[float | None, typer.Option(help="T of the targets.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Entries kept of each posterior.")] = None,
    config: ConfigOption = None,
    jobs: JobsOption = 0,
    settings: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Posteriors of .pt, .npy, .npz, .safetensors or folders of .npy; then 'xded targets' with --teachers OUT."""
    changes = {
        "corpus": corpus, "tokenizer.path": tokenizer, "objective.temperature": temperature, "target.top_k": top_k,
    }  # fmt: skip
    tree = resolved(configured(config, changes, settings))
    from xded.corpus.manifest import read_corpus
    from xded.errors import EXIT_FINDINGS
    from xded.models.pretrained import tokenizer_at
    from xded.teachers.imported import copies, import_teachers

    loaded = read_corpus(need_corpus(tree))
    own = tokenizer_at(tokenizer, tree.tokenizer.normaliser)
    imported = import_teachers(
        logits, loaded, own, tree, out, heard=heard or (), frame_rate_hz=frame_rate, jobs=cores(jobs)
    )
    findings = [finding for one in imported for finding in one.findings] + copies(imported, str(logits))
    if as_json:
        typer.echo(json.dumps(_values(imported, findings), indent=1))
    else:
        _show(imported, findings, heard or [])
    problems = [one.problem for one in imported if one.problem]
    if problems:
        raise problems[0]
    if any(finding.severity == "refuse" for finding in findings):
        raise typer.Exit(EXIT_FINDINGS)


def _values(imported: list[Imported], findings: list[Any]) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "teachers": [
            {"teacher": one.teacher, "problem": str(one.problem) if one.problem else None,
             "files": [asdict(stream) for stream in one.streams]}
            for one in imported
        ],
        "findings": [asdict(finding) for finding in findings],
    }  # fmt: skip


def _show(imported: list[Imported], findings: list[Any], heard: list[str]) -> None:
    from rich.console import Console

    console = Console()
    console.print(_table(imported).rich())
    for finding in findings:
        line = f"{finding.severity}: {finding.subject}: {finding.what} {finding.effect}"
        console.print(f"{line} {finding.remedy}" if finding.severity != "note" else line, markup=False, highlight=False)
    if any(one.streams for one in imported):
        others = f" and {', '.join(sorted(set(heard)))}" if heard else ""
        console.print(
            f"Each teacher counts as having heard its own speaker{others}, and nobody else: the guard against leakage "
            "rests on it. Name everyone else whom teachers or their parent have heard with --heard.",
            markup=False, highlight=False,
        )  # fmt: skip


def _table(imported: list[Imported]) -> Table:
    """One row a file."""
    from xded.report.tables import Table

    rows = []
    for one in imported:
        if one.problem:
            rows.append((one.teacher, *["-"] * 7, "refused"))
        for s in one.streams:
            right = f"{100 * s.right / s.stored:.1f}" if s.stored else "-"
            ended = f"{100 * s.ended / s.stored:.1f}" if s.stored and s.kind == "decoder" else "-"
            scale = "+".join(s.scales) or "-"
            kind = "decoder*" if s.teacher_forced else s.kind
            left = str(sum(map(len, s.left_out.values())))
            rows.append((one.teacher, kind, str(s.recordings), left, right, ended, f"{s.top:.2f}", scale, s.status))
    columns = ("teacher", "head", "in file", "left out", "right", "</s>", "top", "values", "")
    caption = (
        "Of all recordings: the most probable text is the true one, the last step is </s> (per cent); mean probability "
        "of the most probable id. * Teacher-forced on the true text: no recognition rate."
    )
    return Table("Posteriors from elsewhere", columns, tuple(rows), caption)
