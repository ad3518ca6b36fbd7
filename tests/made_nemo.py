"""Archives made of the golden one that NeMo wrote: members taken out, changed, and put back."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from xded.errors import CheckpointError
from xded.models.nemo import read_archive

GOLDEN = Path(__file__).parent / "data" / "nemo_golden.nemo"
LIMIT = 1e-4  # of the largest difference from NeMo, float32, on valid frames


def members_of(path: Path = GOLDEN) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name.removeprefix("./"): tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]


def write_tar(path: Path, members: dict[str, bytes], *, extra: tuple[tarfile.TarInfo, ...] = ()) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in extra:
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    return path


def with_config(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    members = members_of()
    config = yaml.safe_load(members["model_config.yaml"])
    change(config)
    return write_tar(path, members | {"model_config.yaml": yaml.safe_dump(config).encode()})


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def weights_of(path: Path = GOLDEN) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = torch.load(io.BytesIO(members_of(path)["model_weights.ckpt"]), weights_only=True)
    return stored


def with_weights(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    weights = weights_of()
    change(weights)
    return write_tar(path, members_of() | {"model_weights.ckpt": saved(weights)})


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_archive(path)
    assert str(path) in caught.value.problem
    assert caught.value.remedy
    return caught.value.problem
