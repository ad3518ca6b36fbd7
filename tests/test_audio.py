import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from xded.audio import decode, read_audio
from xded.errors import CorpusError


def tone(hz=440.0, duration_s=0.5, sample_rate=16_000):
    time_s = np.arange(int(duration_s * sample_rate)) / sample_rate
    return (0.3 * np.sin(2 * np.pi * hz * time_s)).astype(np.float32)


def encoded(samples, sample_rate=16_000, container="WAV", subtype="PCM_16"):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, sample_rate, format=container, subtype=subtype)
    return buffer.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("container", "subtype"),
    [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "PCM_U8"), ("WAV", "FLOAT"), ("WAV", "DOUBLE"), ("WAVEX", "PCM_16"),
     ("WAVEX", "FLOAT"), ("FLAC", "PCM_16"), ("FLAC", "PCM_24")],
)  # fmt: skip
def test_allowed_formats_decode_to_the_same_samples(tmp_path, container, subtype):
    read = read_audio(write(tmp_path / "a", encoded(tone(), container=container, subtype=subtype)))
    assert read.dtype == np.float32
    assert read.shape == (8_000,)
    np.testing.assert_allclose(read, tone(), atol=1 / 100)


def test_another_rate_is_resampled_without_moving_the_pitch(tmp_path):
    path = write(tmp_path / "a.wav", encoded(tone(sample_rate=8_000), 8_000))
    read = read_audio(path, 16_000)
    assert abs(len(read) - 8_000) <= 1
    np.testing.assert_allclose(read[800:7_000], tone()[800:7_000], atol=0.01)


@pytest.mark.parametrize(
    ("container", "subtype"),
    [("WAV", "IMA_ADPCM"), ("WAV", "MS_ADPCM"), ("WAV", "ULAW"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III"),
     ("AIFF", "PCM_16"), ("CAF", "PCM_16")],
)  # fmt: skip
def test_other_codecs_never_reach_the_decoder(monkeypatch, container, subtype):
    data = encoded(tone(), container=container, subtype=subtype)
    monkeypatch.setattr(soundfile, "SoundFile", lambda *_: pytest.fail("libsndfile has seen the file"))
    with pytest.raises(CorpusError, match=r"WAV \(PCM or float\) and FLAC are read|PCM \(1\) and float \(3\) are read"):
        decode(data, "file")


@pytest.mark.parametrize("damage", ["empty", "text", "header only", "cut short", "flac cut short", "flac junk"])
def test_damaged_files_are_refused_by_name(tmp_path, damage):
    wav, flac = encoded(tone()), encoded(tone(), container="FLAC")
    data = {
        "empty": b"",
        "text": b"This is not audio at all.",
        "header only": wav[:30],
        "cut short": wav[: len(wav) // 2],
        "flac cut short": flac[: len(flac) // 2],
        "flac junk": b"fLaC" + bytes(500),
    }[damage]
    with pytest.raises(CorpusError) as caught:
        read_audio(write(tmp_path / "bad.wav", data))
    assert "bad.wav" in caught.value.problem
    assert caught.value.remedy


def test_header_that_asks_for_gigabytes_is_refused_before_a_buffer_is_made():
    flac = bytearray(encoded(tone(), container="FLAC"))
    flac[21] |= 0x0F  # high bits of the 36-bit sample count in STREAMINFO
    flac[22:26] = b"\xff\xff\xff\xff"
    with pytest.raises(CorpusError, match=r"s long; 0\.05 to 60 s are read"):
        decode(bytes(flac), "bomb.flac")
    wav = bytearray(encoded(tone(duration_s=0.1)))
    struct.pack_into("<I", wav, 24, 1_000_000_000)
    with pytest.raises(CorpusError, match="sample rate of"):
        decode(bytes(wav), "rate.wav")


@pytest.mark.parametrize(("duration_s", "good"), [(0.04, False), (0.06, True), (59.9, True), (60.1, False)])
def test_length_limits(duration_s, good):
    data = encoded(tone(duration_s=duration_s, sample_rate=4_000), 4_000)
    if good:
        assert decode(data, "x")[1] == 4_000
    else:
        with pytest.raises(CorpusError, match="s long"):
            decode(data, "x")


def test_stereo_is_refused_with_a_remedy():
    with pytest.raises(CorpusError, match="2 channels") as caught:
        decode(encoded(np.stack([tone(), tone()], axis=1)), "stereo.wav")
    assert "ffmpeg" in caught.value.remedy


def test_samples_that_are_not_finite_are_refused():
    samples = tone()
    samples[100] = np.nan
    with pytest.raises(CorpusError, match="not finite"):
        decode(encoded(samples, subtype="FLOAT"), "nan.wav")


def test_missing_file_is_an_error_of_ours(tmp_path):
    with pytest.raises(CorpusError, match=r"gone\.wav cannot be read"):
        read_audio(tmp_path / "gone.wav")


def test_random_damage_never_raises_anything_else():
    generator = np.random.default_rng(0)
    originals = [encoded(tone(duration_s=0.1)), encoded(tone(duration_s=0.1), container="FLAC")]
    refused = 0
    for number in range(400):
        data = bytearray(originals[number % 2])
        for _ in range(generator.integers(1, 6)):
            data[generator.integers(0, 60 if number % 4 < 2 else len(data))] = generator.integers(0, 256)
        try:
            samples, _ = decode(bytes(data[: generator.integers(1, len(data) + 1)]), "x")
            assert np.isfinite(samples).all()
        except CorpusError:
            refused += 1
    assert refused > 200
