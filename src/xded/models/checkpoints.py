"""Checkpoints that survive kills, full disks and bit rot: atomic, hashed, loaded with `weights_only=True`.

A checkpoint is one `.pt` file; its SHA-256 lies beside it in `<name>.sha256`, written last. `latest.pt`
keeps its predecessor as `latest.previous.pt`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from xded.errors import GO_ON, CheckpointError, TrainingError

FREE_SPACE = f"The last good checkpoint is untouched. Free some space, then: {GO_ON}"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked_sha256_of(path: Path) -> str:
    """SHA-256 of a checkpoint that `load` has just compared with the one beside it (which may be missing)."""
    kept = sidecar(path)
    return kept.read_text().strip() if kept.is_file() else sha256_of(path)


def sidecar(path: Path) -> Path:
    """Where a checkpoint's hash is kept."""
    return path.with_name(path.name + ".sha256")


def previous(path: Path) -> Path:
    """Where the predecessor of `latest.pt` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def disk_is_full(error: BaseException) -> bool:
    """Whether the system refused to write for want of space (or of quota)."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _write_durably(path: Path, write: Any) -> None:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def save(payload: Mapping[str, Any], path: Path, *, keep_previous: bool = False) -> None:
    """Writes a checkpoint so that `path` is at every moment a whole one.

    Raises:
        TrainingError: the disk is full; what was there before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        _write_durably(temporary, lambda file: torch.save(dict(payload), file))
        digest = sha256_of(temporary)
        hash_temporary = sidecar(temporary)
        _write_durably(hash_temporary, lambda file: file.write(digest.encode()))
    except (OSError, RuntimeError) as error:
        needed = temporary.stat().st_size if temporary.exists() else 0
        temporary.unlink(missing_ok=True)
        sidecar(temporary).unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        if disk_is_full(error) or free < 2 * needed + 2**20:
            raise TrainingError(
                f"The disk is full: {path} could not be written ({free / 2**20:.0f} MB free).", FREE_SPACE
            ) from error
        raise
    if keep_previous and path.exists():
        # at no moment may a whole file have the hash of another beside it: without one it still loads
        sidecar(previous(path)).unlink(missing_ok=True)
        path.replace(previous(path))
        if sidecar(path).exists():
            sidecar(path).replace(sidecar(previous(path)))
    sidecar(path).unlink(missing_ok=True)
    temporary.replace(path)
    hash_temporary.replace(sidecar(path))


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint, checked against its hash.

    Raises:
        CheckpointError: it is missing, damaged or no checkpoint of this project.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such checkpoint.",
            "List a run's checkpoints with 'xded status RUN'; a model of the Hugging Face hub is 'hf:org/name'.",
        )
    digest = sidecar(path)
    if digest.is_file() and digest.read_text().strip() != sha256_of(path):
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is not the one in {digest.name}.",
            "Use another checkpoint of the run ('xded status RUN' lists them).",
        )
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged or foreign file
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: {(str(error) or type(error).__name__).splitlines()[0]}.",
            "Use another checkpoint of the run ('xded status RUN' lists them).",
        ) from error
    missing = {"model_state_dict", "config"} - set(payload) if isinstance(payload, dict) else {"model_state_dict"}
    if missing:
        raise CheckpointError(
            f"{path} is no checkpoint of xded: it has no {' and no '.join(sorted(missing))}.",
            "Give a .pt file of an xded run.",
        )
    return payload


def load_tensors(file: IO[bytes] | Path, *, mapped: bool = False) -> Any:
    """What `torch.save` wrote elsewhere: tensors and plain containers, nothing that runs code.

    Args:
        file: open file, or a path.
        mapped: leave the numbers on disk until they are used; needs a path.

    Raises:
        Exception: of many types, for a damaged or foreign file; the caller says which file it is.
    """
    return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


def is_packed(file: IO[bytes] | Path) -> bool:
    """Whether the members of a zip file are larger than they look: torch stores them as they are.

    Raises:
        Exception: of several types, where it is no zip file.
    """
    with zipfile.ZipFile(file) as parts:
        listed = parts.infolist()
    size = file.stat().st_size if isinstance(file, Path) else file.seek(0, os.SEEK_END)
    stored = all(part.compress_type == zipfile.ZIP_STORED for part in listed)
    return not stored or sum(part.file_size for part in listed) > size


def is_plain(value: Any) -> bool:
    """Whether something is a dense tensor in main memory."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
    return dense and value.device.type == "cpu"


def load_latest(folder: Path) -> tuple[dict[str, Any], str | None]:
    """`latest.pt` of a run, or its predecessor when it is damaged.

    Returns:
        The checkpoint, and a warning that names the damaged file (or None).
    """
    latest = folder / "latest.pt"
    try:
        return load(latest), None
    except CheckpointError as error:
        if not previous(latest).is_file():
            raise
        return load(previous(latest)), f"{error.problem} Going on from {previous(latest).name}."
