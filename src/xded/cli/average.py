"""Average the weights of several recognisers into one: teachers of one parent, or a student and its parent.

Example: xded average work/M08/teachers/teachers/F02 work/M08/teachers/teachers/M05 --out work/M08/soup.pt
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def average(
    checkpoints: Annotated[
        list[Path], typer.Argument(help="Checkpoints or run folders of one architecture.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Checkpoint to write.", show_default=False)],
    weights: Annotated[
        str | None, typer.Option(metavar="W,W", help="Of each, in their order, e.g. 0.7,0.3; none: all alike.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="What they were adapted from: --scale is of the difference from it.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Of the mean difference from --base; 1 is the mean itself.")] = 1.0,
) -> None:
    """The mean is a checkpoint like any other: evaluate it, or start from it with --init."""
    from xded.errors import ConfigError
    from xded.models import averaging
    from xded.models.checkpoints import save

    if scale != 1.0 and base is None:
        raise ConfigError(f"--scale {scale:g} of what?", "Name the checkpoint that they were adapted from: --base.")
    if out.exists():
        raise ConfigError(f"{out} is already there.", "Choose another --out.")
    try:
        shares = None if weights is None else [float(weight) for weight in weights.split(",")]
    except ValueError as error:
        raise ConfigError(f"--weights {weights}: not numbers.", "Write them as in --weights 0.7,0.3.") from error
    payload = averaging.average(checkpoints, shares, base=base, scale=scale)
    save(payload, out)
    for member in payload["average"]["of"]:
        typer.echo(f"{member['weight']:.3f}  {member['name']}  {member['path']}")
    typer.echo(f"{out}\nTest it: xded evaluate {out} --held-out SPEAKER")
    if payload["average"]["parent"] is None:
        typer.echo(
            "Warning: no parent that all of them began with is on record; the mean of weights that were trained apart "
            "recognises nothing.",
            err=True,
        )
