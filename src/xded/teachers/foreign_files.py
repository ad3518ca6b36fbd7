"""Arrays in files that other programs wrote, read in a process of its own that may neither run code nor eat memory.

A file is taken for hostile until it is read: torch loads tensors only (`weights_only=True`), NumPy no objects, types
and shapes are checked before anything is converted, and on Linux the process may not grow by more than the file and
`ROOM_BYTES`. What comes back are plain bytes, one recording at a time, never a pickle; a process that dies is an error
that says so.

Formats: `.pt` (a list of [T, V] tensors, or one [N, T, V]), `.npy` (one [N, T, V]), `.npz` and `.safetensors` (an array
a recording, by its id), and a folder of `<recording id>.npy`. A NumPy array of objects is a pickle and is refused.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import signal
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np

from xded.errors import XdedError

if TYPE_CHECKING:
    import torch

SUFFIXES: Final = (".pt", ".npy", ".npz", ".safetensors")  # and folders
ROOM_BYTES: Final = 2**30  # above what is there before the file is opened and the size of the file
MOST_VALUES: Final = 2**26  # of one recording: 256 MB as float32, at 5000 pieces and 25 frames/s nine minutes
MOST_NAMES_BYTES: Final = 2**28
LONGEST_REASON: Final = 300  # characters
ASK_AGAIN = "Write the file again with the tool that made it, and copy it anew."

NamedArray = tuple[str | None, np.ndarray]  # id of the recording where the file has ids; [T, V] float32


@dataclass(frozen=True)
class Arrays:
    """What a file holds.

    names: ids of the recordings; none where the file has only an order. count: of recordings.
    rows: [T, V] float32 of each, read while it is iterated (once).
    """

    names: tuple[str, ...] | None
    count: int
    rows: Iterator[np.ndarray]


class ForeignFileError(XdedError):
    """A file from elsewhere cannot be read, or is none of the kind that it should be."""


class RefusedError(Exception):
    """The reason why a file is not read further."""


# --- this process ------------------------------------------------------------------------------------------------


@contextmanager
def open_arrays(path: Path) -> Iterator[Arrays]:
    """Arrays of a file, read in another process while they are asked for: one recording in memory at a time.

    Raises:
        ForeignFileError: when opened or while it is read: no such format, damaged, wants to run code, too large.
    """
    if path.suffix not in SUFFIXES and not path.is_dir():
        raise ForeignFileError(f"{path}: '{path.suffix}' is no format of posteriors.", f"Use {', '.join(SUFFIXES)}.")
    context = multiprocessing.get_context("spawn")  # nothing of this process lies in the other one's memory
    here, there = context.Pipe(duplex=False)
    reader = context.Process(target=_serve, args=(there, str(path)), daemon=True)
    reader.start()
    there.close()  # else a reader that dies would not be noticed
    try:
        header = _receive_json(here, reader, path)
        names = None if header["names"] is None else tuple(map(str, header["names"]))
        yield Arrays(names, int(header["count"]), _rows(here, reader, path, int(header["count"])))
    finally:
        here.close()  # a reader that still wants to send ends by that
        reader.join(timeout=5)
        if reader.is_alive():
            reader.kill()
            reader.join()
        reader.close()


def _rows(connection: Connection, reader: Any, path: Path, count: int) -> Iterator[np.ndarray]:
    for _ in range(count):
        steps, width = _receive_json(connection, reader, path)["shape"]
        data = _receive(connection, reader, path, 4 * MOST_VALUES)
        yield np.frombuffer(bytearray(data), np.float32).reshape(steps, width)  # torch wants it writable


def _receive_json(connection: Connection, reader: Any, path: Path) -> dict[str, Any]:
    """What stands before values; an error there says why there are no more."""
    said: dict[str, Any] = json.loads(_receive(connection, reader, path, MOST_NAMES_BYTES))
    if "error" in said:
        raise ForeignFileError(f"{path} {said['error']}.", ASK_AGAIN)
    return said


def _receive(connection: Connection, reader: Any, path: Path, most: int) -> bytes:
    try:
        return connection.recv_bytes(most)
    except (EOFError, OSError) as error:
        reader.join(timeout=5)
        code = reader.exitcode
        died = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        raise ForeignFileError(
            f"{path}: the process that read it died ({died}): the file is damaged, or asks for more memory than it "
            "is large.",
            ASK_AGAIN,
        ) from error


# --- the other process -------------------------------------------------------------------------------------------


def _serve(connection: Connection, path: str) -> None:
    """Sends names and count, then shape and values of each array; or the reason why not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever reads decides
    try:
        _send(connection, Path(path))
    except BrokenPipeError:
        pass  # nobody asks any more
    except Exception as error:  # torch, zip, NumPy and safetensors raise many types for a damaged file
        connection.send_bytes(json.dumps({"error": _reason(error)[:LONGEST_REASON]}).encode())
    finally:
        connection.close()


def _send(connection: Connection, path: Path) -> None:
    if path.suffix in (".pt", ".safetensors"):  # seconds and memory, which the other formats do without
        import torch

        torch.set_num_threads(1)
    _bound_memory(path)
    names, arrays = _opener(path)(path)
    connection.send_bytes(json.dumps({"names": names, "count": len(arrays)}).encode())
    for array in arrays:
        values = np.ascontiguousarray(array())
        connection.send_bytes(json.dumps({"shape": values.shape}).encode())
        connection.send_bytes(memoryview(values.data).cast("B"))


def _bound_memory(path: Path) -> None:
    """On Linux: this process may grow by the file (it is mapped) and `ROOM_BYTES`, then allocations fail."""
    pages = Path("/proc/self/statm")
    if not pages.is_file():
        return
    import resource

    now = int(pages.read_text().split()[0]) * resource.getpagesize()
    limit = now + (path.stat().st_size if path.is_file() else 0) + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _reason(error: Exception) -> str:
    """A clause for people: what is wrong with the file."""
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, RefusedError):
        return said
    if type(error).__name__ == "UnpicklingError":  # torch's word for what `weights_only` refuses
        wanted = re.search(r"GLOBAL (\S+)", said)
        return f"wants to run code ({wanted[1]})" if wanted else "is no file of tensors alone"
    if isinstance(error, MemoryError):
        return "asks for more memory than it is large"
    return f"cannot be read ({said})"


def _opener(path: Path) -> Any:
    if path.is_dir():
        return _open_folder
    return {".pt": _open_torch, ".npy": _open_npy, ".npz": _open_npz, ".safetensors": _open_safetensors}[path.suffix]


def _need_shape(what: str, shape: tuple[int, ...], dimensions: int = 2) -> None:
    """Refuses arrays that are no [T, V] (or [N, T, V]), are empty or are too large, before they are converted."""
    if len(shape) != dimensions or not all(shape):
        form = "[T, V]" if dimensions == 2 else "[N, T, V]"
        raise RefusedError(f"has {what} of shape {list(shape)}, where {form} is expected")
    if shape[-1] * shape[-2] > MOST_VALUES:
        raise RefusedError(f"has {what} of shape {list(shape)}, larger than any recording's")


def _of_tensor(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().float().numpy()
    return array


def _need_floats(what: str, tensor: Any) -> None:
    import torch

    from xded.models.checkpoints import is_plain

    if not is_plain(tensor) or not tensor.dtype.is_floating_point:
        kind = f"a tensor of {tensor.dtype}" if isinstance(tensor, torch.Tensor) else f"a {type(tensor).__name__}"
        raise RefusedError(f"has {kind} as {what}, where plain floating-point numbers are expected")


def _open_torch(path: Path) -> tuple[None, list[Any]]:
    import torch

    from xded.models.checkpoints import is_packed, load_tensors

    if not zipfile.is_zipfile(path):
        raise RefusedError("is cut off, or no file of torch.save (PyTorch 1.6 or later)")
    if is_packed(path):
        raise RefusedError("has compressed members, which torch.save does not write")
    said = load_tensors(path, mapped=True)
    if isinstance(said, torch.Tensor):
        _need_floats("its content", said)
        _need_shape("a tensor", tuple(said.shape), 3)
    elif not isinstance(said, list):
        raise RefusedError(f"holds a {type(said).__name__}, where a list of tensors is expected")
    for place, tensor in enumerate(said if isinstance(said, list) else []):
        _need_floats(f"entry {place}", tensor)
        _need_shape(f"entry {place}", tuple(tensor.shape))
    return None, [partial(_of_tensor, said[place]) for place in range(len(said))]


def _floats(array: np.ndarray) -> np.ndarray:
    """As float32, copied out of the file's memory."""
    return np.array(array, dtype=np.float32)


def _need_npy(what: str, shape: tuple[int, ...], kind: np.dtype, dimensions: int = 2) -> None:
    if kind.hasobject:
        raise RefusedError(f"has {what} of Python objects, which is a pickle; save one plain array a recording")
    if kind.kind != "f":
        raise RefusedError(f"has {what} of {kind}, where floating-point numbers are expected")
    _need_shape(what, shape, dimensions)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an `.npy` stream."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise RefusedError(f"has a member of .npy version {version}, where 1.0 or 2.0 is expected")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, kind = read(file)
    return shape, kind


def _mapped(path: Path, what: str, dimensions: int) -> np.ndarray:
    with path.open("rb") as file:
        shape, kind = _header(file)
    _need_npy(what, shape, kind, dimensions)
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _open_npy(path: Path) -> tuple[None, list[Any]]:
    stacked = _mapped(path, "an array", 3)
    return None, [partial(_floats, stacked[place]) for place in range(len(stacked))]


def _open_folder(path: Path) -> tuple[list[str], list[Any]]:
    files = sorted(path.glob("*.npy"))
    return [file.stem for file in files], [lambda f=file: _floats(_mapped(f, f.name, 2)) for file in files]


def _open_npz(path: Path) -> tuple[list[str], list[Any]]:
    archive = zipfile.ZipFile(path)  # stays open as long as its members are asked for
    names = archive.namelist()
    foreign = [name for name in names if not name.endswith(".npy")]
    if foreign:
        raise RefusedError(f"has a member '{foreign[0]}', where arrays (.npy) are expected")

    def read(name: str) -> np.ndarray:
        with archive.open(name) as file:
            _need_npy(f"'{name}'", *_header(file))
        with archive.open(name) as file:
            return _floats(np.lib.format.read_array(file, allow_pickle=False))

    return [name.removesuffix(".npy") for name in names], [partial(read, name) for name in names]


def _open_safetensors(path: Path) -> tuple[list[str], list[Any]]:
    from safetensors import safe_open

    file = safe_open(path, framework="pt")  # NumPy has no bfloat16
    names = list(file.keys())

    def read(name: str) -> np.ndarray:
        part = file.get_slice(name)
        if part.get_dtype() not in ("F16", "BF16", "F32", "F64"):
            raise RefusedError(f"has '{name}' of {part.get_dtype()}, where floating-point numbers are expected")
        _need_shape(f"'{name}'", tuple(part.get_shape()))
        return _of_tensor(file.get_tensor(name))

    return names, [partial(read, name) for name in names]
