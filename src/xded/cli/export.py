"""Take a recogniser elsewhere: ONNX, safetensors and a model card.

Example: xded export runs/M08 --out exported/M08
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xded.cli.options import OutOption


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint or run folder.", show_default=False)],
    out: OutOption,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Write encoder.onnx and decoder.onnx too.")] = True,
    name_speakers: Annotated[
        bool, typer.Option("--name-speakers", help="Name speakers: ids are health data, left out otherwise.")
    ] = False,
    data_licence: Annotated[
        str | None, typer.Option(metavar="TEXT", help="For the card: licence of the data, and consent.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Weights, config.json, tokenizer, ONNX graphs, README.md: all or nothing. onnxruntime is compared with torch."""
    from xded.export.folder import Options, write_export
    from xded.models.recogniser import load_recogniser

    recogniser = load_recogniser(checkpoint)
    apart = write_export(recogniser, out, Options(onnx, name_speakers, data_licence), overwrite=overwrite)
    typer.echo(out)
    if apart is not None:
        typer.echo(f"onnxruntime differs from torch by at most {apart:.1g} in a logit.")
    typer.echo(f"Use it: xded transcribe {out} take.wav")
