"""What a tokenizer is, and which prompts of a corpus it cannot write.

Example: xded tokenizer tokenizer.model --corpus work/uaspeech
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xded.cli.options import CorpusOption

if TYPE_CHECKING:
    from xded.checks.tokens import Reach
    from xded.tokenizer import Tokenizer


def tokenizer(
    file: Annotated[
        Path,
        typer.Argument(
            help="SentencePiece model, tokenizer.json, vocab.json, list of pieces, or a pretrained recogniser.",
            show_default=False,
        ),
    ],
    corpus: CorpusOption = None,
    normaliser: Annotated[
        str, typer.Option(metavar="NAME", help="upper, lower, upper_no_punctuation or lower_no_punctuation.")
    ] = "upper",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Kind, special ids, fingerprint; with --corpus the best WRA that it allows (exit code 3 where below 100 %)."""
    from xded.corpus.manifest import read_corpus
    from xded.errors import EXIT_FINDINGS
    from xded.models.pretrained import tokenizer_at

    loaded = tokenizer_at(file, normaliser)
    report: dict[str, Any] = {"file": str(file), **_identity(loaded)}
    lost = False
    if corpus is not None:
        takes = {r.take: r for r in read_corpus(corpus).recordings}
        report["corpus"] = _prompts(loaded, str(corpus), [r.text for r in takes.values()])
        lost = bool(report["corpus"]["unspellable"])
    typer.echo(json.dumps(report, indent=1, ensure_ascii=False) if as_json else "\n".join(_lines(report)))
    if lost:
        raise typer.Exit(EXIT_FINDINGS)


def _identity(loaded: Tokenizer) -> dict[str, Any]:
    """What the tokenizer is, whatever it is used for."""
    return {
        "kind": loaded.kind,
        "size": loaded.size,
        "special_ids": {name: getattr(loaded, name) for name in ("unk", "blank", "bos", "eos")},
        "appended": list(loaded.pieces[loaded.size - loaded.appended :]),
        "normaliser": loaded.normaliser,
        "fingerprint": loaded.fingerprint,
    }


def _prompts(loaded: Tokenizer, corpus: str, references: Sequence[str]) -> dict[str, Any]:
    """Which prompts cannot be written, with every normaliser; references: one for each take."""
    from xded.checks.tokens import reach, remedy
    from xded.tokenizer import NORMALISERS

    def row(found: Reach) -> dict[str, Any]:
        return {**asdict(found), "best_wra": round(found.best_wra, 2)}

    reached = {name: row(reach(references, loaded, name)) for name in NORMALISERS}
    own = reached[loaded.normaliser]
    fix = remedy(references, loaded) if own["unspellable"] else None
    return {"path": corpus, **own, "remedy": fix, "normalisers": list(reached.values())}


def _lines(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    special = ", ".join(f"{name} {i}" for name, i in report["special_ids"].items())
    appended = f"; not in the file, appended: {' '.join(report['appended'])}" if report["appended"] else ""
    lines = [
        f"{report['file']}: {report['kind']}, {report['size']} pieces",
        f"special ids: {special}{appended}",
        f"fingerprint: {report['fingerprint']} (normaliser {report['normaliser']})",
    ]
    if "corpus" not in report:
        return lines
    corpus = report["corpus"]
    lines += [f"{corpus['path']}: {corpus['prompts']} prompts, {corpus['takes']} takes"]
    for row in corpus["normalisers"]:
        lines.append(
            f"  {row['normaliser']:<21} cannot write {len(row['unspellable'])} prompts ({row['lost_takes']} takes): "
            f"WRA at most {row['best_wra']:.1f} %"
        )
    if corpus["unspellable"]:
        lines += [f"With {corpus['normaliser']} no output can equal:"]
        lines += [f"  {text} ({why})" for text, why in corpus["unspellable"].items()]
        lines += [corpus["remedy"]]
    return lines
