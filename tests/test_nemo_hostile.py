"""Archives that are damaged, hostile, or not what they say: refused whole, with every name that is wrong."""

from __future__ import annotations

import copy
import gzip
import io
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from made_nemo import GOLDEN, members_of, refused, saved, weights_of, with_config, with_weights, write_tar
from xded.models import nemo

# --- hostile and damaged tar files


def info_of(name: str, kind: bytes = tarfile.REGTYPE, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize(
    ("info", "said"),
    [
        (info_of("../model.txt"), "points outside"),
        (info_of("a/../../b"), "points outside"),
        (info_of("/etc/cron.d/x"), "points outside"),
        (info_of("..\\x"), "points outside"),
        (info_of("x", tarfile.SYMTYPE, linkname="/etc/passwd"), "no regular file"),
        (info_of("x", tarfile.LNKTYPE, linkname="model_config.yaml"), "no regular file"),
        (info_of("x", tarfile.CHRTYPE), "no regular file"),
        (info_of("x", tarfile.BLKTYPE), "no regular file"),
        (info_of("x", tarfile.FIFOTYPE), "no regular file"),
        (info_of("model_config.yaml"), "two members"),
        (info_of("./model_weights.ckpt"), "two members"),
    ],
    ids=lambda value: value.name if isinstance(value, tarfile.TarInfo) else "",
)
def test_hostile_members_are_refused(info: tarfile.TarInfo, said: str, tmp_path: Path) -> None:
    assert said in refused(write_tar(tmp_path / "x.nemo", members_of(), extra=(copy.copy(info),)))


def test_link_in_the_place_of_the_weights_is_refused(tmp_path: Path) -> None:
    members = members_of()
    (tmp_path / "elsewhere.ckpt").write_bytes(members.pop("model_weights.ckpt"))
    link = info_of("model_weights.ckpt", tarfile.SYMTYPE, linkname=str(tmp_path / "elsewhere.ckpt"))
    assert "model_weights.ckpt" in refused(write_tar(tmp_path / "x.nemo", members, extra=(link,)))


@pytest.mark.parametrize("name", ["model_config.yaml", "model_weights.ckpt", "tokenizer"])
def test_missing_member_is_named(name: str, tmp_path: Path) -> None:
    members = {key: data for key, data in members_of().items() if not key.endswith((name, f"{name}.model"))}
    assert name in refused(write_tar(tmp_path / "x.nemo", members))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("compressed", [False, True])
def test_truncated_archive_is_refused(share: float, compressed: bool, tmp_path: Path) -> None:
    whole = gzip.compress(GOLDEN.read_bytes()) if compressed else GOLDEN.read_bytes()
    path = tmp_path / "x.nemo"
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path)


def test_archive_without_its_last_byte_of_weights_is_refused(tmp_path: Path) -> None:
    with tarfile.open(GOLDEN) as tar:
        last = max(tar, key=lambda member: member.offset)
    path = tmp_path / "x.nemo"
    path.write_bytes(GOLDEN.read_bytes()[: last.offset_data + last.size - 1])
    assert "cut off" in refused(path)


def test_flipped_bytes_under_gzip_are_refused(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(GOLDEN.read_bytes()))
    packed[len(packed) // 2] ^= 255
    path = tmp_path / "x.nemo"
    path.write_bytes(packed)
    assert "damaged" in refused(path)


@pytest.mark.parametrize("data", [b"", b"no archive", bytes(20_000), gzip.compress(b"no archive")])
def test_something_else_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.nemo"
    path.write_bytes(data)
    refused(path)
    path.unlink()
    assert "no such archive" in refused(path)
    path.mkdir()
    refused(path)


def test_declared_size_is_not_believed(tmp_path: Path) -> None:
    header = info_of("huge", size=2**42).tobuf(tarfile.GNU_FORMAT)
    whole = write_tar(tmp_path / "a.nemo", members_of()).read_bytes()
    path = tmp_path / "x.nemo"
    path.write_bytes(header + whole)
    assert "cut off" in refused(path)
    path.write_bytes(gzip.compress(header + whole))
    assert "cut off" in refused(path)


def test_members_and_unpacking_have_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.nemo"
    large = members_of() | {"model_config.yaml": b"#" * (2**21 + 1)}
    assert "model_config.yaml of 2097153 bytes" in refused(write_tar(path, large))
    monkeypatch.setattr(nemo, "GZIP_SLACK_BYTES", 2**20)
    path.write_bytes(gzip.compress(bytes(2**24)))
    assert "unpacks to more" in refused(path)
    many = tuple(info_of(f"file{number}") for number in range(1_000))
    assert "more than 1000 members" in refused(write_tar(path, members_of(), extra=many))


# --- weights


class Bomb:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("bomb",)


@pytest.mark.parametrize("value", [Bomb(), {"a": Bomb()}, {"a": [1]}, [torch.zeros(1)], {1: torch.zeros(1)}])
def test_weights_that_are_more_than_weights_are_refused(
    value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = {**weights_of(), **value} if isinstance(value, dict) else value
    refused(write_tar(tmp_path / "x.nemo", members_of() | {"model_weights.ckpt": saved(weights)}))
    assert not (tmp_path / "bomb").exists()


def test_compressed_and_foreign_weights_are_refused(tmp_path: Path) -> None:
    weights = members_of()["model_weights.ckpt"]
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(weights)) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    path = tmp_path / "x.nemo"
    padding = bytes(len(weights))  # large enough for what the config describes
    for data, said in (
        (packed.getvalue() + padding, "torch zip"),
        (padding, "torch zip"),
        (weights[:-90], "torch zip"),
    ):
        assert said in refused(write_tar(path, members_of() | {"model_weights.ckpt": data}))
    padded = padding + packed.getvalue()  # a zip file may begin anywhere
    assert "unpacks to more" in refused(write_tar(path, members_of() | {"model_weights.ckpt": padded}))


def test_a_config_that_unfolds_is_refused(tmp_path: Path) -> None:
    bomb = "\n".join(["a: &a [x, x]", "b: &b [*a, *a]", "target: [*b, *b]"])  # some more lines: gigabytes
    members = members_of() | {"model_config.yaml": bomb.encode()}
    assert "no plain YAML: it has aliases" in refused(write_tar(tmp_path / "x.nemo", members))


def test_every_name_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    gone = [
        f"encoder.layers.1.feed_forward{n}.linear{m}.{k}" for n in (1, 2) for m in (1, 2) for k in ("weight", "bias")
    ]

    def change(weights: dict[str, Tensor]) -> None:
        for name in gone:
            del weights[name]
        weights["encoder.layers.2.norm_out.weight"] = torch.zeros(24)
        weights["joint.x"] = torch.zeros(1)
        weights["encoder.layers.0.conv.pointwise_conv1.weight"] = torch.zeros(48, 24)
        weights["encoder.layers.0.norm_out.bias"] = torch.zeros(24, dtype=torch.int64)

    problem = refused(with_weights(tmp_path / "x.nemo", change))
    listed = [*gone, "encoder.layers.2.norm_out.weight", "joint.x", "encoder.layers.0.norm_out.bias"]
    assert [name for name in listed if name not in problem] == []
    assert "encoder.layers.0.conv.pointwise_conv1.weight (48, 24) for (48, 24, 1)" in problem
    assert "(8)" in problem  # how many are missing


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("encoder.layers.0.norm_out.bias", torch.full((24,), float("nan")), "not finite"),
        ("encoder.layers.0.norm_out.bias", torch.zeros(24).to_sparse(), "no plain tensor"),
        ("encoder.layers.0.norm_out.bias", torch.zeros(24, device="meta"), "no plain tensor"),
        ("preprocessor.featurizer.window", torch.hamming_window(200, periodic=False), "featurizer.window"),
        ("preprocessor.featurizer.fb", torch.zeros(1, 40, 129), "featurizer.fb"),
        ("decoder.decoder_layers.0.bias", torch.zeros(40), "40 rows for a vocabulary of 40 pieces and the blank"),
        ("decoder.decoder_layers.0.bias", torch.zeros(100), "100 rows for a vocabulary of 40 pieces and the blank"),
    ],
)
def test_weights_of_another_model_are_refused(name: str, value: Tensor, said: str, tmp_path: Path) -> None:
    assert said in refused(with_weights(tmp_path / "x.nemo", lambda weights: weights.update({name: value})))


# --- tokenizer


def test_vocabulary_must_be_the_tokenizers(tmp_path: Path) -> None:
    def longer(config: dict[str, Any]) -> None:
        config["decoder"]["vocabulary"].append("more")
        config["decoder"]["num_classes"] = 41

    def other(config: dict[str, Any]) -> None:
        config["decoder"]["vocabulary"][3] = "other"

    def numbers(config: dict[str, Any]) -> None:
        config["decoder"]["vocabulary"][3] = 3

    path = tmp_path / "x.nemo"
    assert "40 pieces but a vocabulary of 41" in refused(with_config(path, longer))
    assert "'other'" in refused(with_config(path, other))
    assert "decoder.vocabulary" in refused(with_config(path, numbers))


def test_tokenizer_must_be_a_sentencepiece_model(tmp_path: Path) -> None:
    members = members_of()
    name = next(key for key in members if key.endswith("_tokenizer.model"))
    assert "no SentencePiece model" in refused(write_tar(tmp_path / "x.nemo", members | {name: b"version https://git"}))
