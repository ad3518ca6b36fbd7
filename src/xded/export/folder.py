"""The exported folder: written whole or not at all."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save

from xded import __version__
from xded.errors import CheckpointError, ConfigError
from xded.export.card import Card, read_card, render
from xded.export.onnx import difference, write_onnx
from xded.exported import CARD, CONFIG, TOKENIZER, WEIGHTS, Description, Heard, TokenizerFacts, is_exported
from xded.models.conformer import Conformer
from xded.models.recogniser import Recogniser


@dataclass(frozen=True)
class Options:
    """What of a recogniser goes into the folder."""

    onnx: bool = True
    name_speakers: bool = False
    data_licence: str | None = None


def write_export(recogniser: Recogniser, out: Path, options: Options, *, overwrite: bool = False) -> float | None:
    """Writes a recogniser to a folder that `load_recogniser` and `xded.exported` read.

    Args:
        recogniser: on the CPU.
        out: of the export; nothing is there until all is written.
        overwrite: replace an earlier export (never another folder).

    Returns:
        The largest difference between onnxruntime and torch; none without ONNX graphs.

    Raises:
        CheckpointError: an encoder that is not our Conformer, or graphs that say something else than torch.
        ConfigError: `out` exists, or a package of the extra `onnx` is not installed.
    """
    _check(recogniser, out, overwrite)
    card = read_card(recogniser, options.name_speakers, options.data_licence)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as parts:
        folder = Path(parts) / "new"
        folder.mkdir()
        apart = fill(recogniser, folder, options, card)
        _put(folder, out, Path(parts) / "old")
    return apart


def _put(folder: Path, out: Path, aside: Path) -> None:
    """Moves a whole folder to its place; what is there goes aside, and comes back when that fails."""
    if out.exists():
        out.rename(aside)
    try:
        folder.rename(out)
    except OSError:
        if aside.exists():
            aside.rename(out)
        raise


def _check(recogniser: Recogniser, out: Path, overwrite: bool) -> None:
    """Refuses before anything is written."""
    student = recogniser.student
    if not student.has_ctc or not isinstance(student.encoder, Conformer):
        raise CheckpointError(
            f"{recogniser.path} has another encoder than our Conformer, or no CTC head: it cannot be exported.",
            "Export a student of 'xded train' whose encoder comes from a .nemo archive or from scratch.",
        )
    if not out.exists():
        return
    if not is_exported(out):
        raise ConfigError(f"{out} exists, and no export lies there.", "Choose another --out.")
    if not overwrite:
        raise ConfigError(f"{out} already holds an export.", "Replace it with --overwrite, or choose another --out.")


def fill(recogniser: Recogniser, folder: Path, options: Options, card: Card) -> float | None:
    """Fills an empty folder; returns what `difference` measured."""
    weights = {name: tensor.detach().contiguous() for name, tensor in recogniser.student.state_dict().items()}
    (folder / WEIGHTS).write_bytes(save(weights, metadata={"format": "pt"}))
    (folder / TOKENIZER).write_bytes(recogniser.tokenizer.model_bytes)
    names, apart = [WEIGHTS, TOKENIZER], None
    if options.onnx:
        names += write_onnx(recogniser.student, folder)
        apart = difference(recogniser.student, folder)
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    description = _description(recogniser, card.name, hashes, options.name_speakers)
    (folder / CONFIG).write_text(description.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (folder / CARD).write_text(render(card, description, apart), encoding="utf-8")
    return apart


def _description(recogniser: Recogniser, name: str, hashes: dict[str, str], name_speakers: bool) -> Description:
    """`config.json`: without paths of this machine and, unless they are asked for, without names of speakers."""
    tokenizer, config = recogniser.tokenizer, recogniser.config
    facts = {name: getattr(tokenizer, name) for name in TokenizerFacts.model_fields}
    heard = [
        Heard(what=p.what, speakers=tuple(sorted(p.speakers)), takes=tuple(sorted(p.takes)), known=p.known)
        for p in recogniser.provenance
    ]
    return Description(
        xded=__version__,
        name=name,
        epoch=recogniser.epoch,
        features=config.features,
        model=config.model.model_copy(update={"pretrained": None}),
        decode=config.decode,
        tokenizer=TokenizerFacts.model_validate(facts),
        provenance=tuple(heard) if name_speakers else None,
        source_sha256=recogniser.sha256,
        sha256=hashes,
    )
