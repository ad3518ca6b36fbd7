"""Adapt a checkpoint to a speaker it has never heard from a few of their takes, and test it on their others.

Example: xded adapt runs/M08/best.pt --speaker M08 --takes 5,10,20 --out work/M08/adapted
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from xded.cli.options import CorpusOption, JobsOption, OutOption, cores, decode_settings, need_corpus


def adapt(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint, run folder, or (prototypes alone) any recogniser.", show_default=False)
    ],
    out: OutOption,
    speaker: Annotated[
        list[str] | None,
        typer.Option("--speaker", metavar="SPEAKER", help="Unheard so far (repeat for more); default: held out."),
    ] = None,
    corpus: CorpusOption = None,
    takes: Annotated[str, typer.Option(metavar="N,N,...", help="How many of a speaker's takes are heard.")] = "5,10,20",
    draws: Annotated[int, typer.Option(min=1, help="Times that these takes are drawn.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of test, draws and training.")] = 0,
    test_share: Annotated[float, typer.Option(help="Share of a speaker's takes that is set apart for the test.")] = 0.5,
    method: Annotated[
        list[str] | None, typer.Option("--method", metavar="METHOD", help="steps or prototypes; default: both.")
    ] = None,
    updates: Annotated[int, typer.Option(min=1, help="Of steps: updates of the weights, at least.")] = 20,
    peak_lr: Annotated[float, typer.Option(help="Of steps: peak learning rate.")] = 3e-4,
    freeze_layers: Annotated[int, typer.Option(min=0, help="Of steps: first encoder layers that stay.")] = 0,
    weight: Annotated[float, typer.Option(min=0, help="Of prototypes: weight of their similarities.")] = 16.0,
    decode: Annotated[str | None, typer.Option("--decode", metavar="HEAD", help="ctc or decoder.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Most tokens the decoder may write.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the checkpoint of every adaptation.")] = False,
    jobs: JobsOption = 0,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print curve.json.")] = False,
) -> None:
    """WRA after so many takes, with intervals, beside the unheard result; the tested takes are never heard."""
    from xded.adaptation.curve import adapt as adapt_and_test
    from xded.adaptation.settings import Settings, methods_of
    from xded.corpus.manifest import read_corpus
    from xded.decoding import check_max_length
    from xded.models.recogniser import load_recogniser, pick_device
    from xded.report.adaptation import tables_of, write_pages

    settings = Settings(
        takes=_numbers(takes), draws=draws, seed=seed, test_share=test_share, methods=methods_of(method or ()),
        updates=updates, peak_lr=peak_lr, freeze_layers=freeze_layers, weight=weight,
    )  # fmt: skip
    recogniser = load_recogniser(checkpoint, device=str(pick_device(device)))
    changes: dict[str, Any] = {"mode": decode, "max_length": max_length, "word_list": False}
    decoding = decode_settings(recogniser.config, changes)
    loaded = read_corpus(corpus or need_corpus(recogniser.config))
    speakers = speaker or list(recogniser.config.fold.held_out)
    if decoding.mode == "decoder":
        check_max_length([r.text for r in loaded.select(speakers=speakers)], recogniser.tokenizer, decoding.max_length)
    curve = adapt_and_test(recogniser, loaded, speakers, decoding, settings, out, jobs=cores(jobs), keep=keep)
    written = write_pages(curve, out)
    for note in curve.notes:
        typer.echo(f"Warning: {note}", err=True)
    if as_json:
        typer.echo(curve.to_json())
        return
    from rich.console import Console

    console = Console()
    for table in tables_of(curve):
        console.print(table.rich())
    console.print("\n".join(map(str, written)), highlight=False, soft_wrap=True)


def _numbers(text: str) -> tuple[int, ...]:
    """`5,10,20` as numbers.

    Raises:
        ConfigError: something else.
    """
    from xded.errors import ConfigError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--takes {text}: no list of numbers.", "Write --takes 5,10,20.") from error
