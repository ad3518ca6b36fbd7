"""Look into a run: how it learned, where its decoder looks, what its CTC head and the teachers say about a recording.

Example: xded inspect runs/M08 --recording M08_B2_CW1_M5
"""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xded.cli.options import CorpusOption

if TYPE_CHECKING:
    from xded.doctor.inspection import Inspected
    from xded.doctor.run_folder import RunFolder


def inspect(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    recording: Annotated[
        list[str],
        typer.Option("--recording", metavar="ID", help="Recording to look at (repeat for more).", show_default=False),
    ],
    corpus: CorpusOption = None,
    targets: Annotated[
        Path | None, typer.Option(help="Folder of 'xded targets'; default: the run's own.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for report.html and figures; default: the run.", show_default=False),
    ] = None,
    checkpoint: Annotated[str, typer.Option(metavar="NAME", help="Checkpoint in the run folder.")] = "best.pt",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written, and the numbers, as JSON.")] = False,
) -> None:
    """Attention, CTC posteriors, gradients, losses and learning rate as pictures and in report.html."""
    from xded.doctor.run_folder import read_run
    from xded.errors import ConfigError
    from xded.report.figures import attention_picture, ctc_picture
    from xded.report.run_page import draw_run, write_page

    if not run.is_dir():
        raise ConfigError(f"{run} is no run folder.", "Give the folder that was named with --out.")
    folder, recording = read_run(run), list(dict.fromkeys(recording))
    heard = _listen(folder, checkpoint, recording, corpus, targets)
    curves, pictures = draw_run(folder)
    drawn = [
        (one, [attention_picture(one, f"{name}_attention.png"), ctc_picture(one, f"{name}_ctc.png")])
        for one, name in zip(heard, map(file_name, recording), strict=True)
    ]
    out = out or run
    report = out / "report.html"
    (out / "figures").mkdir(parents=True, exist_ok=True)
    written = []
    for picture in (*pictures, *(picture for _, own in drawn for picture in own)):
        written.append(out / "figures" / picture.name)
        written[-1].write_bytes(picture.png)
    write_page(report, folder, curves, pictures, drawn)
    if as_json:
        numbers = {"training": curves.numbers(), "recordings": [one.numbers() for one in heard]}
        typer.echo(json.dumps({"report": str(report), "pictures": list(map(str, written)), **numbers}, indent=1))
        return
    for one in heard:
        typer.echo(
            f"{one.recording.recording} ('{one.recording.text}'): CTC '{one.ctc_text}', decoder '{one.decoder_text}'"
        )
        for note in one.notes:
            typer.echo(f"  {note}")
    typer.echo("\n".join(map(str, [*written, report])))


def _listen(
    folder: RunFolder, checkpoint: str, recording: list[str], corpus: Path | None, targets: Path | None
) -> list[Inspected]:
    """Loads the checkpoint once and lets it hear every recording."""
    from xded.cli.options import need_corpus
    from xded.corpus.manifest import read_corpus
    from xded.doctor.inspection import find_recordings, inspect_recording, open_teaching
    from xded.models.recogniser import load_recogniser

    recogniser = load_recogniser(folder.path / checkpoint)
    found = find_recordings(read_corpus(corpus or need_corpus(recogniser.config)), recording)
    teaching = open_teaching(recogniser, targets)
    return [inspect_recording(recogniser, one, teaching) for one in found]


def file_name(recording: str) -> str:
    """A recording's id as a file name; ids that share one after cleaning are told apart by a hash."""
    clean = re.sub(r"[^\w.-]", "_", recording)[:80]
    return clean if clean == recording else f"{clean}_{zlib.crc32(recording.encode()):08x}"
