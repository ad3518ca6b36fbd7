"""Files in which other tools keep what a teacher says.

Files of one teacher begin with its speaker's name: `<speaker>_decoder_logits` (teacher-forced on the true text, a step
a token and a last one for </s>) and `<speaker>_ctc_logits`. Each is `.pt` (a list of [T, V] tensors, or one [N, T, V])
or `.npy` ([N, T, V]), both in the order of `utterance_ids` in `<speaker>_metadata.json` beside them, or `.npz` or
`.safetensors` (an array a recording, under its id), or a folder of `<recording id>.npy`. Values are logits,
log-probabilities or probabilities at T = 1.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from xded.models.checkpoints import sha256_of
from xded.targets.store import Kind, TargetError
from xded.teachers.foreign_files import SUFFIXES
from xded.teachers.posteriors import KINDS

NAME = re.compile(r"(?P<teacher>.+)_(?P<kind>ctc|decoder)_logits")
LAYOUT = (
    f"Expected <speaker>_ctc_logits or <speaker>_decoder_logits ({', '.join(SUFFIXES)}, or a folder of .npy), with "
    "<speaker>_metadata.json beside .pt and .npy."
)


class Metadata(BaseModel):
    """What the reference study writes beside its logits; other keys are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    utterance_ids: tuple[str, ...]
    target_words: tuple[str, ...] | None = None
    ctc_frame_lens: tuple[int, ...] | None = None
    num_utterances: int | None = None


@dataclass(frozen=True)
class Export:
    """Files of one teacher."""

    teacher: str
    files: dict[Kind, Path]
    metadata: Path


def find_exports(folder: Path) -> list[Export]:
    """Files of teachers anywhere below a folder, by teacher.

    Raises:
        TargetError: there are none, or two files for one head of one teacher.
    """
    found: dict[str, dict[Kind, Path]] = {}
    kind_of: dict[str, Kind] = {kind: kind for kind in KINDS}
    for path in sorted(folder.rglob("*_logits*")):
        match = NAME.fullmatch(path.name if path.is_dir() else path.stem)
        if match is None or not (path.is_dir() or path.suffix in SUFFIXES):
            continue
        files, kind = found.setdefault(match["teacher"], {}), kind_of[match["kind"]]
        if files.setdefault(kind, path) != path:
            raise TargetError(f"{files[kind]} and {path} are of the same teacher and head.", "Give one of them.")
    if not found:
        raise TargetError(f"{folder} holds no posteriors of teachers.", LAYOUT)
    exports = []
    for teacher, files in sorted(found.items()):
        beside = next(iter(files.values())).with_name(f"{teacher}_metadata.json")
        exports.append(Export(teacher, {kind: files[kind] for kind in KINDS if kind in files}, beside))
    return exports


def read_metadata(path: Path) -> Metadata:
    """Ids, words and frame counts of a teacher's recordings.

    Raises:
        TargetError: missing, of another form, or lists of different lengths.
    """
    try:
        metadata = Metadata.model_validate_json(path.read_bytes())
    except OSError as error:
        raise TargetError(
            f"{path} cannot be read ({error.strerror}).", f"It says whose rows are whose. {LAYOUT}"
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise TargetError(
            f"{path} is no metadata of posteriors ({place + ': ' if place else ''}{first['msg']}).",
            "Expected JSON with utterance_ids, and target_words and ctc_frame_lens where they are known.",
        ) from error
    counts = {"utterance_ids": len(metadata.utterance_ids), "num_utterances": metadata.num_utterances}
    counts |= {
        name: None if values is None else len(values)
        for name, values in (("target_words", metadata.target_words), ("ctc_frame_lens", metadata.ctc_frame_lens))
    }
    said = {name: count for name, count in counts.items() if count is not None}
    if len(set(said.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in said.items())
        raise TargetError(f"{path} contradicts itself: {listed}.", "Export metadata and posteriors again, together.")
    return metadata


def hash_of(path: Path) -> str:
    """SHA-256 of a file, or of the names and hashes of a folder's arrays."""
    if not path.is_dir():
        return sha256_of(path)
    rows = [f"{file.name} {sha256_of(file)}" for file in sorted(path.glob("*.npy"))]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()
