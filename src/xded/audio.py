"""Audio files: an allowlist read from the header, decoding with checks, resampling.

Only WAV with PCM or float samples and FLAC are opened. The header is read here before libsndfile sees the file,
because libsndfile sets up a codec while it opens a file and its ADPCM readers have had overflows
(CVE-2021-3246, CVE-2022-33065), and because it shortens a truncated WAV without a word.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import soundfile
import soxr

from xded.errors import CorpusError

MIN_DURATION_S = 0.05
MAX_DURATION_S = 60.0
MIN_SAMPLE_RATE = 4_000
MAX_SAMPLE_RATE = 192_000
MAX_BYTES = 128 * 2**20  # 60 s of 192 kHz 64-bit samples are 88 MiB
WAV_CODECS = {1: "PCM", 3: "float"}
WAV_EXTENSIBLE = 0xFFFE
CONVERT = "Convert it, for example with 'ffmpeg -i IN -ac 1 -ar 16000 OUT.wav', and import again."


def read_audio(path: Path, sample_rate: int = 16_000) -> np.ndarray:
    """Reads one recording.

    Args:
        path: a mono WAV (PCM or float) or FLAC file of at most 60 s.
        sample_rate: Hz of the result; a file at another rate is resampled (soxr, high quality).

    Returns:
        float32 [N], full scale at 1.

    Raises:
        CorpusError: missing, of another format, damaged, not mono, not finite, shorter or longer than allowed.
    """
    samples, file_rate = decode(load_bytes(path), str(path))
    if file_rate == sample_rate:
        return samples
    return soxr.resample(samples, file_rate, sample_rate).astype(np.float32, copy=False)


def load_bytes(path: Path) -> bytes:
    """The file's bytes. Raises CorpusError when it is missing, unreadable or larger than any allowed recording."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CorpusError(
                f"{path} has {size:,} bytes; a recording has at most {MAX_BYTES:,}.",
                f"Cut it into recordings of at most {MAX_DURATION_S:g} s.",
            )
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(
            f"{path} cannot be read ({error.strerror or error}).", "Check the path and its permissions."
        ) from error


def decode(data: bytes, where: str) -> tuple[np.ndarray, int]:
    """Decodes the bytes of a WAV or FLAC file at the file's own rate.

    Args:
        data: the whole file.
        where: its name, for errors.

    Returns:
        (float32 [N], sample rate in Hz). All samples are finite and all that the header declares are there.

    Raises:
        CorpusError: see `read_audio`.
    """
    _check_header(data, where)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_shape(file.channels, file.samplerate, file.frames, where)
            declared, sample_rate = file.frames, file.samplerate
            samples = file.read(dtype="float32")
    except soundfile.LibsndfileError as error:
        raise CorpusError(
            f"{where} does not decode ({error.error_string}).", "Copy it again from its source."
        ) from error
    if len(samples) != declared:
        raise CorpusError(
            f"{where} declares {declared} samples and holds {len(samples)}.", "Copy it again from its source."
        )
    if not np.isfinite(samples).all():
        raise CorpusError(f"{where} holds samples that are not finite (NaN or infinity).", "Export it again as PCM.")
    return samples, sample_rate


def _check_shape(channels: int, sample_rate: int, frames: int, where: str) -> None:
    """Refuses, before a buffer is made for it, what the header says."""
    if channels != 1:
        raise CorpusError(
            f"{where} has {channels} channels; a recording is one microphone's copy.",
            "Write each microphone to a file of its own, for example 'ffmpeg -i IN -af \"pan=mono|c0=c0\" OUT.wav'.",
        )
    if not MIN_SAMPLE_RATE <= sample_rate <= MAX_SAMPLE_RATE:
        raise CorpusError(
            f"{where} has a sample rate of {sample_rate} Hz; {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE} Hz are read.",
            CONVERT,
        )
    duration_s = frames / sample_rate
    if not MIN_DURATION_S <= duration_s <= MAX_DURATION_S:
        raise CorpusError(
            f"{where} is {duration_s:.3g} s long; {MIN_DURATION_S:g} to {MAX_DURATION_S:g} s are read.",
            "Cut it to one spoken prompt, or leave it out of the corpus.",
        )


def _check_header(data: bytes, where: str) -> None:
    """Refuses everything but FLAC and WAV with PCM or float samples, and a WAV that is shorter than it declares."""
    if data[:4] == b"fLaC":
        return
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        found = "an empty file" if not data else f"a file that starts with {data[:4]!r}"
        raise CorpusError(f"{where} is {found}; WAV (PCM or float) and FLAC are read.", CONVERT)
    position, codec = 12, None
    while position + 8 <= len(data):
        name, size = data[position : position + 4], struct.unpack_from("<I", data, position + 4)[0]
        body = position + 8
        if name == b"fmt " and codec is None:
            codec = _wav_codec(data[body : body + size])
            if codec not in WAV_CODECS:
                raise CorpusError(f"{where} is WAV with codec {codec}; PCM (1) and float (3) are read.", CONVERT)
        if name == b"data":
            if codec is None:
                break
            if body + size > len(data):
                raise CorpusError(
                    f"{where} declares {size} bytes of samples and holds {len(data) - body}: it is cut short.",
                    "Copy it again from its source.",
                )
            return
        position = body + size + size % 2
    raise CorpusError(f"{where} is WAV without a format or without samples.", "Copy it again from its source.")


def _wav_codec(chunk: bytes) -> int | None:
    """Codec number of a WAV format chunk; for the extensible format the first two bytes of its sub-format."""
    if len(chunk) < 16:
        return None
    codec: int = struct.unpack_from("<H", chunk)[0]
    if codec == WAV_EXTENSIBLE and len(chunk) >= 26:
        codec = struct.unpack_from("<H", chunk, 24)[0]
    return codec
