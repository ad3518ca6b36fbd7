"""Write down what audio files say.

What 'xded export' wrote is run by onnxruntime, without torch.

Example: xded transcribe runs/M08/best.pt take1.wav take2.flac --word-list words.txt
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xded.cli.options import LanguageOption, decode_settings
from xded.errors import EXIT_FINDINGS

if TYPE_CHECKING:
    from xded.decoding import Hypothesis
    from xded.exported import Transcript


def transcribe(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="Checkpoint, run folder, exported folder, or a pretrained recogniser.", show_default=False),
    ],
    audio: Annotated[list[Path], typer.Argument(help="WAV or FLAC files.", show_default=False)],
    decode: Annotated[str | None, typer.Option("--decode", metavar="HEAD", help="ctc or decoder.")] = None,
    beam: Annotated[int | None, typer.Option(help="Beam width.")] = None,
    word_list: Annotated[
        Path | None, typer.Option(help="Text file, a word or phrase a line: only these can come out.")
    ] = None,
    language: LanguageOption = "en",
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, mps.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """One line a file: path, tab, text. A file that cannot be read costs its line, not the others (exit code 3)."""
    from xded.errors import XdedError

    words = None if word_list is None else _words(word_list)
    changes = {"mode": decode, "beam": beam, "word_list": word_list is not None or None}
    hear = _listener(checkpoint, device, language, changes, words)
    failed = False
    for path in audio:
        row: dict[str, object] = {"audio_filepath": str(path)}
        try:
            hypothesis = hear(path)
            row.update(text=hypothesis.text, tokens=list(hypothesis.tokens), score=hypothesis.score)
        except XdedError as error:
            failed = True
            row["error"] = str(error)
        if as_json:
            typer.echo(json.dumps(row, ensure_ascii=False))
        else:
            typer.echo(f"{path}\t{row.get('text', '')}" if "error" not in row else f"{path}\t(error) {row['error']}")
    if failed:
        raise typer.Exit(EXIT_FINDINGS)


def _listener(
    path: Path, device: str, language: str, changes: dict[str, Any], words: list[str] | None
) -> Callable[[Path], Hypothesis | Transcript]:
    """What recognises a file: onnxruntime for an exported folder with graphs, otherwise torch."""
    from xded.exported import ENCODER, Exported, describe, is_exported

    if is_exported(path) and (path / ENCODER).is_file():
        _need_cpu(device)
        return Exported(path, decode_settings(describe(path).as_config(), changes), words).hear

    with _what_stays():
        from xded.decoding import hear
        from xded.models.recogniser import load_recogniser, pick_device

        recogniser = load_recogniser(path, device=str(pick_device(device)), language=language)
    settings = decode_settings(recogniser.config, changes)
    if words is not None:
        recogniser.tokenizer.self_test(words)
    return lambda audio: hear(recogniser, audio, settings, words)


@contextmanager
def _what_stays() -> Iterator[None]:
    """Nothing made in it is looked at for garbage, which would take a seventh of a cold start."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _need_cpu(device: str) -> None:
    from xded.errors import ConfigError

    if device not in ("auto", "cpu"):
        raise ConfigError(
            f"device '{device}': an exported model is run on the CPU.", "Leave out --device, or give the checkpoint."
        )


def _words(path: Path) -> list[str]:
    """The words of a text file, one a line."""
    from xded.errors import ConfigError

    try:
        words = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--word-list {path} cannot be read: {error}.", "Give a text file, a word a line.") from error
    if not words:
        raise ConfigError(f"--word-list {path} holds no words.", "Write a word or phrase on each line.")
    return words
