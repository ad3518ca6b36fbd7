"""Write one HTML page about a study, or about a run: it needs no other file, no script and no network.

Example: xded report work/studies/debug
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a study (running, stopped or done) or of a run.")],
    output: Annotated[
        Path | None, typer.Option("--output", help="File to write (default: FOLDER/report.html).", show_default=False)
    ] = None,
    embed_audio: Annotated[
        bool, typer.Option("--embed-audio", help="Put the sound of a study's worst recordings into the page.")
    ] = False,
) -> None:
    """Verdict, tables, curves, speakers, teachers, confusions, attention, worst recordings, versions and cost."""
    from xded.doctor.run_folder import looks_like_run, read_run
    from xded.errors import ConfigError
    from xded.study.folder import STUDY

    path = output or folder / "report.html"
    if path.is_dir():
        raise ConfigError(f"--output {path} is a folder.", "Name a file, such as report.html in it.")
    if (folder / STUDY).is_file():
        from xded.report.study import report_of
        from xded.report.study_page import write_study_page
        from xded.study.run import read_study

        found = report_of(read_study(folder), folder, str(folder / STUDY))
        write_study_page(found, path, embed_audio=embed_audio)
    elif folder.is_dir() and looks_like_run(folder):
        from xded.report.run_page import draw_run, write_page

        if embed_audio:
            raise ConfigError("--embed-audio: the page of a run shows no recordings by itself.",
                              f"Leave it out, or look at some: xded inspect {folder} --recording ID")  # fmt: skip
        run = read_run(folder)
        write_page(path, run, *draw_run(run), [])
    else:
        raise ConfigError(
            f"{folder} holds neither a study ({STUDY}) nor a run.", "Give a folder that was named with --out."
        )
    typer.echo(path)
