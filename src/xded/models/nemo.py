"""`.nemo` archives of Conformer-CTC models, read without NeMo and without trust.

An archive is a tar file, plain or gzip-compressed, that holds `model_config.yaml`, `model_weights.ckpt` (a torch zip)
and artifacts named by the config (`nemo:<hex>_tokenizer.model`). Members are read by their exact names; none of them
is written to disk under a name of its own, imported or executed.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import sentencepiece
import torch
import yaml
from torch import Tensor

from xded.config import FeatureConfig, ModelConfig
from xded.errors import CheckpointError
from xded.features import LogMel
from xded.models.checkpoints import is_packed, is_plain, load_tensors
from xded.models.conformer import Conformer
from xded.models.nemo_config import CONFIG, check_target, features_of, model_of, refuse, section_of, vocabulary_of
from xded.models.weights import misfits, shape_of

WEIGHTS = "model_weights.ckpt"
LARGEST_BYTES = {CONFIG: 2**21, WEIGHTS: 2**33}  # 600 M parameters are 2.4 GB
LARGEST_TOKENIZER_BYTES = 2**24
MOST_MEMBERS = 1_000
GZIP_RATIO, GZIP_SLACK_BYTES = 8, 2**26  # float32 weights shrink by a tenth; more than this is a decompression bomb
FRONT_END_TOLERANCE = 1e-5
AGAIN = "Fetch the archive again."

# Names of our Conformer's weights and of NeMo's.
RENAMED = (
    ("subsampling.conv1.", "pre_encode.conv.0."),
    ("subsampling.conv2.", "pre_encode.conv.2."),
    ("subsampling.out.", "pre_encode.out."),
    (".norm_attention.", ".norm_self_att."),
    (".norm_convolution.", ".norm_conv."),
    (".attention.query.", ".self_attn.linear_q."),
    (".attention.key.", ".self_attn.linear_k."),
    (".attention.value.", ".self_attn.linear_v."),
    (".attention.out.", ".self_attn.linear_out."),
    (".attention.position.", ".self_attn.linear_pos."),
    (".attention.content_bias", ".self_attn.pos_bias_u"),
    (".attention.position_bias", ".self_attn.pos_bias_v"),
    (".convolution.pointwise", ".conv.pointwise_conv"),
    (".convolution.depthwise.", ".conv.depthwise_conv."),
    (".convolution.norm.", ".conv.batch_norm."),
)
WINDOW, FILTERBANK = "preprocessor.featurizer.window", "preprocessor.featurizer.fb"
HEAD = "decoder.decoder_layers.0."


@dataclass(frozen=True)
class NemoArchive:
    """What an archive holds, in this project's terms.

    Attributes:
        path, sha256: of the file.
        model: what `config.ModelConfig` must say of the encoder.
        features: what `config.FeatureConfig` must say.
        encoder: weights, by the names of `conformer.Conformer`.
        ctc_head: `weight` [V + 1, D] and `bias` [V + 1]; the last row is the blank.
        tokenizer_model: the serialized SentencePiece model, or None (the vocabulary is a character set).
        vocabulary: the V pieces in the order of the head's rows.
    """

    path: Path
    sha256: str
    model: dict[str, Any]
    features: dict[str, Any]
    encoder: dict[str, Tensor]
    ctc_head: dict[str, Tensor]
    tokenizer_model: bytes | None
    vocabulary: tuple[str, ...]


def read_archive(path: Path) -> NemoArchive:
    """Reads encoder, front end, CTC head and tokenizer; takes about the weights' size in memory.

    Raises:
        CheckpointError: no archive, damaged, hostile, of another architecture, or its parts do not fit together.
    """
    try:
        with path.open("rb") as raw, tempfile.TemporaryFile() as unpacked:
            sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
            members = _members(_plain_tar(raw, unpacked, path), path)
            config = _read_config(members, path)
            sentence_pieces = check_target(config, path)
            features = features_of(section_of(config, "preprocessor", path), config, path)
            model = model_of(encoder := section_of(config, "encoder", path), features["mels"], path)
            vocabulary = vocabulary_of(section_of(config, "decoder", path), path)
            tokenizer = _tokenizer(config, members, vocabulary, path) if sentence_pieces else None
            file, size = members.take(WEIGHTS, LARGEST_BYTES[WEIGHTS])
            _check_size(model, features["mels"], size, path)
            weights = _read_weights(file, path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such archive.", "Check the path.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.", "Check the file.") from error
    head, ours = _mapped(weights, model, features, len(vocabulary), path)
    if not encoder.get("xscaling", True):
        # our Conformer multiplies what `out` gives by sqrt(D), as NeMo's default does
        for name in ("subsampling.out.weight", "subsampling.out.bias"):
            ours[name] = ours[name] / math.sqrt(model["width"])
    return NemoArchive(path, sha256, model, features, ours, head, tokenizer, vocabulary)


# --- the tar file


class _Members:
    """The regular files of an archive by their exact names, `./` left out."""

    def __init__(self, tar: tarfile.TarFile, found: dict[str, tarfile.TarInfo], path: Path) -> None:
        self._tar, self._found, self._path = tar, found, path

    def take(self, name: str, largest_bytes: int) -> tuple[IO[bytes], int]:
        """A file to read from, and its size."""
        member = self._found.get(name)
        if member is None:
            listed = ", ".join(sorted(self._found)) or "nothing"
            raise refuse(self._path, f"has no member {name} (it holds: {listed})")
        if member.size > largest_bytes:
            raise refuse(self._path, f"has a member {name} of {member.size} bytes (at most {largest_bytes} are read)")
        file = self._tar.extractfile(member)
        assert file is not None  # it is a regular file
        return file, member.size


def _plain_tar(raw: IO[bytes], unpacked: IO[bytes], path: Path) -> IO[bytes]:
    """The tar file itself; a compressed one goes into the (nameless, temporary) second file first, up to a limit."""
    raw.seek(0)
    compressed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    if not compressed:
        return raw
    largest = GZIP_RATIO * os.fstat(raw.fileno()).st_size + GZIP_SLACK_BYTES
    try:
        with gzip.open(raw) as packed:
            while block := packed.read(2**20):
                unpacked.write(block)
                if unpacked.tell() > largest:
                    raise refuse(path, f"unpacks to more than {largest} bytes: that is no archive of weights")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise refuse(path, f"is damaged or cut off ({error})", AGAIN) from error
    return unpacked


def _members(file: IO[bytes], path: Path) -> _Members:
    """Lists the members and refuses an archive with one that could mean harm."""
    found: dict[str, tarfile.TarInfo] = {}
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        tar = tarfile.TarFile(fileobj=file)
        for count, member in enumerate(tar):
            name = PurePosixPath(member.name)
            if count >= MOST_MEMBERS:
                raise refuse(path, f"has more than {MOST_MEMBERS} members")
            if name.is_absolute() or ".." in name.parts or "\\" in member.name:
                raise refuse(path, f"has a member that points outside: {member.name!r}")
            if member.isdir():
                continue
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                raise refuse(path, f"has a member that is no regular file (link, device, sparse): {member.name!r}")
            if member.offset_data + member.size > end:
                raise refuse(path, f"is cut off: {member.name!r} says {member.size} bytes", AGAIN)
            if str(name) in found:
                raise refuse(path, f"has two members of the name {str(name)!r}")
            found[str(name)] = member
    except (tarfile.TarError, ValueError) as error:  # ValueError: headers with numbers that make no sense
        raise refuse(path, f"is no whole tar file, plain or gzip ({error})", AGAIN) from error
    return _Members(tar, found, path)


# --- its config


def _read_config(members: _Members, path: Path) -> Mapping[str, Any]:
    file, _ = members.take(CONFIG, LARGEST_BYTES[CONFIG])
    try:
        text = file.read().decode("utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError("it has aliases, by which a few lines can stand for gigabytes")
        config = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise refuse(path, f"has a {CONFIG} that is no plain YAML: {reason}") from error
    if not isinstance(config, Mapping):
        raise refuse(path, f"has a {CONFIG} that holds no mapping")
    return config


def _tokenizer(config: Mapping[str, Any], members: _Members, vocabulary: tuple[str, ...], path: Path) -> bytes:
    """The bytes of the SentencePiece model, whose pieces must be the vocabulary."""
    named = section_of(config, "tokenizer", path).get("model_path")
    if not isinstance(named, str) or not named.startswith("nemo:"):
        raise refuse(path, f"has tokenizer.model_path: {named!r} (supported: nemo:NAME, a member of the archive)")
    file, _ = members.take(named.removeprefix("nemo:"), LARGEST_TOKENIZER_BYTES)
    model_bytes = file.read()
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    except RuntimeError as error:
        raise refuse(path, f"has a {named} that is no SentencePiece model") from error
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    if len(pieces) != len(vocabulary):
        raise refuse(path, f"has a tokenizer of {len(pieces)} pieces but a vocabulary of {len(vocabulary)}", AGAIN)
    for row, (piece, listed) in enumerate(zip(pieces, vocabulary, strict=True)):
        if piece != listed:
            raise refuse(path, f"has piece {row} as {piece!r} in its tokenizer, {listed!r} in its vocabulary", AGAIN)
    return model_bytes


# --- its weights


def _read_weights(file: IO[bytes], path: Path) -> dict[str, Tensor]:
    """Every tensor of the torch zip, by NeMo's names.

    One storage after the other is read out of the tar file: the zip as a whole never is in memory.
    """
    try:
        packed = is_packed(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, UnicodeDecodeError, EOFError) as error:
        raise refuse(path, f"has a {WEIGHTS} that is no torch zip ({error})", AGAIN) from error
    if packed:
        raise refuse(path, f"has a {WEIGHTS} that unpacks to more than its size")
    file.seek(0)
    try:
        weights = load_tensors(file)
    except Exception as error:  # torch raises many types for a damaged or foreign file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise refuse(path, f"has a {WEIGHTS} that holds more than weights, or is damaged: {reason}", AGAIN) from error
    if not isinstance(weights, dict):
        raise refuse(path, f"has a {WEIGHTS} that is no table of weights")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise refuse(path, f"has something else than a weight in its {WEIGHTS}: {name!r}")
        if not is_plain(value):
            raise refuse(path, f"has a weight that is no plain tensor: {name}")
    return weights


def _check_size(model: Mapping[str, Any], mels: int, weights_bytes: int, path: Path) -> None:
    """Refuses a config that describes more parameters than its weights can hold, before any memory is asked for."""
    width, channels = model["width"], model["subsampling_channels"]
    layer = width**2 * (4 * model["feed_forward_factor"] + 8)
    least = model["encoder_layers"] * layer + channels**2 * 9 + channels * (mels // 4) * width
    if 2 * least > weights_bytes:  # 2 bytes each in half precision
        raise refuse(path, f"has {weights_bytes} bytes of weights for a config of at least {least} parameters")


def _expected(model: Mapping[str, Any], mels: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Our Conformer's weights (without their values) by our names, and NeMo's names of them.

    One layer is built and stands for all.
    """
    conformer = Conformer(ModelConfig(**{**model, "encoder_layers": 1}), mels)
    one = {name: value.to("meta") for name, value in conformer.state_dict().items()}
    own: dict[str, Tensor] = {}
    for name, value in one.items():
        copies = model["encoder_layers"] if name.startswith("layers.0.") else 1
        own |= {name.replace("layers.0.", f"layers.{number}."): value for number in range(copies)}
    theirs = {}
    for name in own:
        renamed = name
        for ours, nemos in RENAMED:
            renamed = renamed.replace(ours, nemos)
        theirs[name] = f"encoder.{renamed}"
    return own, theirs


def _mapped(
    weights: Mapping[str, Tensor], model: Mapping[str, Any], features: Mapping[str, Any], pieces: int, path: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """CTC head and encoder under this project's names; all of them, or an error that lists what does not fit."""
    own, theirs = _expected(model, features["mels"])
    front_end = LogMel(FeatureConfig(**features))
    computed = {WINDOW: front_end.window, FILTERBANK: front_end.filterbank[None]}
    # NeMo's point-wise layers are convolutions of width 1, ours are linear
    expected = {
        theirs[name]: value[..., None] if ".pointwise" in name and value.dim() == 2 else value
        for name, value in own.items()
    } | computed
    for name, shape in (("weight", (pieces + 1, model["width"], 1)), ("bias", (pieces + 1,))):
        expected[HEAD + name] = torch.empty(shape, device="meta")
    rows = len(weights[f"{HEAD}bias"]) if f"{HEAD}bias" in weights and weights[f"{HEAD}bias"].dim() else pieces + 1
    if rows != pieces + 1:
        raise refuse(path, f"has a CTC head of {rows} rows for a vocabulary of {pieces} pieces and the blank", AGAIN)
    _check_fit(weights, expected, path)
    for name, values in computed.items():
        difference = (weights[name] - values).abs().max().item()
        if difference > FRONT_END_TOLERANCE:
            raise refuse(path, f"has another {name} than its preprocessor's settings give (by up to {difference:.1e})")
    head = {"weight": weights[f"{HEAD}weight"].float().squeeze(2), "bias": weights[f"{HEAD}bias"].float()}
    return head, {name: weights[theirs[name]].to(value.dtype).reshape(value.shape) for name, value in own.items()}


def _kind(value: Tensor) -> str:
    return shape_of(value) + ("" if value.is_floating_point() else " of whole numbers")


def _check_fit(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Names, shapes, kinds of numbers; and that they are finite."""
    problems = misfits(weights, expected, _kind)
    if problems:
        raise refuse(path, f"has weights that do not fit its {CONFIG}: {problems}")
    broken = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if broken:
        raise refuse(path, f"has weights that are not finite: {', '.join(broken)}", AGAIN)
