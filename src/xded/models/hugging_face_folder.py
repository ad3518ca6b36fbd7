"""Folders of the Hugging Face hub: config, front end, weights and tokenizer of a speech model, all of it or nothing.

A folder is hostile until shown otherwise: files are read by their exact names, weights as safetensors or by
`load_tensors`, and a folder that wants code of its own to be run is refused. Nothing is ever downloaded.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from xded.errors import CheckpointError, need_extra
from xded.models.checkpoints import is_packed, is_plain, load_tensors, sha256_of
from xded.models.hugging_face import (
    FAMILIES,
    NOT_KEPT,
    PURPOSE,
    Family,
    HuggingFaceEncoder,
    HuggingFaceFrontEnd,
    library_config,
    whisper_part,
)  # fmt: skip
from xded.models.weights import misfits

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # each may be split: NAME.index.json then lists the parts
OLD_NAMES = {  # of weight norm, before torch 2.0
    ".weight_g": ".parametrizations.weight.original0",
    ".weight_v": ".parametrizations.weight.original1",
}
VOCABULARY = "vocab.json"
COUNTER = "num_batches_tracked"  # of batch norm: used by nothing, and not in every file
DECODER_PREFIXES = ("model.decoder.", "decoder.")  # of Whisper
OUTPUT = "proj_out."  # its output layer, the same tensor as its embedding
MASK = "masked_spec_embed"  # what a masked frame becomes
AGAIN = "Get the folder again: hf download ORG/NAME --local-dir DIR."


@dataclass(frozen=True)
class Seq2Seq:
    """The half of a Whisper model that writes (`models.whisper.WhisperRecogniser`).

    Attributes:
        decoder: weights, by the names of the recogniser's `decoder`.
        writing: ids: what it is prompted with for a language (`prompts`), `end`, and what it may not write anywhere
            (`suppress`) or at the start (`begin_suppress`).
    """

    decoder: Mapping[str, Tensor]
    writing: Mapping[str, Any]


@dataclass(frozen=True)
class HuggingFaceModel:
    """What a folder holds.

    Attributes:
        path, sha256: the folder, and a hash over the names and bytes of the files that were read.
        model_type: of its config.json.
        encoder_settings, front_end_settings: what `HuggingFaceEncoder` and `HuggingFaceFrontEnd` are built from.
        sample_rate: Hz.
        encoder: float32 weights, by the names of `HuggingFaceEncoder`, all of them.
        ctc_head: `weight` [V, D] and `bias` [V], or None.
        tokenizer: bytes and their kind (`Tokenizer.from_bytes`), or None.
        blank: id of the CTC blank, where there is a head.
        seq2seq: the decoder of a Whisper model, or None.
        left_out: weights that are no part of the encoder, or of a head or decoder that is used.
    """

    path: Path
    sha256: str
    model_type: str
    encoder_settings: Mapping[str, Any]
    front_end_settings: Mapping[str, Any]
    sample_rate: int
    encoder: Mapping[str, Tensor]
    ctc_head: Mapping[str, Tensor] | None
    tokenizer: tuple[bytes, str] | None
    blank: int | None
    seq2seq: Seq2Seq | None
    left_out: tuple[str, ...]


class _Folder:
    """Files of a folder by name; remembers which were read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.read: set[str] = set()

    def file(self, name: str) -> Path | None:
        path = self.path / name
        if not path.is_file():
            return None
        self.read.add(name)
        return path

    def json(self, name: str) -> dict[str, Any] | None:
        path = self.file(name)
        if path is None:
            return None
        try:
            found = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise self.error(f"{name} is not valid JSON: {error}") from error
        if not isinstance(found, dict):
            raise self.error(f"{name} holds no mapping")
        if name != VOCABULARY and found.get("auto_map"):
            raise CheckpointError(
                f"{path} wants code of its own to be run (auto_map), which xded never does.",
                f"Give a model of the library's own: {', '.join(FAMILIES)}.",
            )
        return found

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem}.", AGAIN)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self.read):
            digest.update(f"{name}\0{sha256_of(self.path / name)}\n".encode())
        return digest.hexdigest()


def read_folder(path: Path) -> HuggingFaceModel:
    """Reads a speech model.

    Args:
        path: a folder, or a name of the hub (`org/name`) that is in this machine's cache of it.

    Raises:
        CheckpointError: it is missing, incomplete, damaged, hostile, of a type that is not supported, or its weights
            are not exactly those of its config.
        ConfigError: `transformers` is not installed.
    """
    folder = _Folder(_find(path))
    config = folder.json("config.json")
    if config is None:
        raise folder.error("there is no config.json")
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise CheckpointError(
            f"{folder.path}: models of type {model_type!r} are not supported.", f"Give one of: {', '.join(FAMILIES)}."
        )
    settings = _encoder_settings(folder, config)
    front_end = _front_end(folder, family, settings)
    weights = _weights(folder)
    prefix = next((p for p in family.prefixes if any(name.startswith(p) for name in weights)), family.prefixes[-1])
    encoder = {f"model.{n.removeprefix(prefix)}": value for n, value in weights.items() if n.startswith(prefix)}
    if f"model.{MASK}" not in encoder:
        # models that were never trained with masks; without the vector there is nothing to mask with
        settings = settings | {key: 0.0 for key in ("mask_time_prob", "mask_feature_prob") if key in settings}
    fitting = _fitted(folder, encoder, _expected(settings))
    ctc_head = _ctc_head(folder, family, config, weights, settings)
    seq2seq = _seq2seq(folder, weights, settings) if model_type == "whisper" else None
    rows = settings["vocab_size"] if seq2seq else None if ctc_head is None else len(ctc_head["bias"])
    tokenizer = _tokenizer(folder, family, rows)
    used = [prefix]
    if family.head and ctc_head:
        used.append(family.head)
    if seq2seq:
        used += [*DECODER_PREFIXES, OUTPUT]
    return HuggingFaceModel(
        path=folder.path, sha256=folder.sha256(), model_type=str(model_type),
        encoder_settings=settings, front_end_settings=front_end.settings, sample_rate=front_end.sample_rate,
        encoder=fitting, ctc_head=ctc_head, seq2seq=seq2seq,
        tokenizer=tokenizer, blank=None if ctc_head is None else config.get("pad_token_id", 0),
        left_out=tuple(sorted(name for name in weights if not name.startswith(tuple(used)))),
    )  # fmt: skip


def _find(path: Path) -> Path:
    """The folder that a path or a name of the hub means.

    Raises:
        CheckpointError: there is none; for a name it says what to download.
    """
    if path.is_dir():
        return path
    name = str(path)
    if path.exists() or not HUB_NAME.fullmatch(name):
        raise CheckpointError(
            f"{path}: no such folder.", "Give the folder that holds the model's config.json, or a name as 'org/name'."
        )
    hub = need_extra("huggingface_hub", "transformers", PURPOSE)
    try:
        return Path(hub.snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:  # not in the cache; no name of the hub
        raise CheckpointError(
            f"{name} is neither a folder nor in this machine's cache of the Hugging Face hub, and xded downloads "
            "nothing.",
            f"Where there is a network: hf download {name} --local-dir models/{path.name}. Then give that folder.",
        ) from error


def _encoder_settings(folder: _Folder, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the encoder is built from, every value spelt out: defaults may differ between versions of the library."""
    if config.get("quantization_config"):
        raise folder.error("its weights are quantised, which is not supported")
    if config.get("add_adapter"):
        raise folder.error("an encoder with add_adapter is not supported: its convolutions mix padding into the end")
    if str(config["model_type"]).startswith("parakeet") and config["model_type"] != "parakeet_encoder":
        inner = config.get("encoder_config")
        if not isinstance(inner, dict):
            raise folder.error("config.json has no encoder_config")
        config = {**inner, "model_type": "parakeet_encoder"}
    full = json.loads(json.dumps(library_config(config).to_dict()))
    return {key: value for key, value in full.items() if key not in NOT_KEPT and not key.startswith("_")}


def _front_end(folder: _Folder, family: Family, settings: Mapping[str, Any]) -> HuggingFaceFrontEnd:
    """The front end of the folder, which must be the one that the encoder was made for."""
    found = folder.json("preprocessor_config.json")
    if found is None:
        found = (folder.json("processor_config.json") or {}).get("feature_extractor")
    if not isinstance(found, dict):
        raise folder.error("there is no preprocessor_config.json")
    kind = found.get("feature_extractor_type", family.front_end)
    if kind != family.front_end:
        raise folder.error(f"its front end is a {kind}, and its encoder needs a {family.front_end}")
    front_end = HuggingFaceFrontEnd({**found, "feature_extractor_type": kind})
    bands = settings.get("num_mel_bins", 1)
    if front_end.width != (1 if front_end.is_waveform else bands):
        raise folder.error(f"its front end makes {front_end.width} values a frame, and its encoder takes {bands}")
    if "max_source_positions" in settings and front_end.extractor.nb_max_frames != 2 * settings["max_source_positions"]:
        raise folder.error(
            f"its front end makes at most {front_end.extractor.nb_max_frames} frames, and its encoder takes "
            f"{2 * settings['max_source_positions']}"
        )
    return front_end


# --- weights ---------------------------------------------------------------------------------------------------


def _weights(folder: _Folder) -> dict[str, Tensor]:
    """All weights of the folder, by the library's present names."""
    for name in WEIGHT_FILES:
        parts: Iterable[str] | None = None
        if folder.file(name) is not None:
            parts = [name]
        elif (index := folder.json(f"{name}.index.json")) is not None:
            parts = _parts(folder, index, f"{name}.index.json")
        if parts is not None:
            weights: dict[str, Tensor] = {}
            for part in parts:
                found = _read_weights(folder, part)
                if twice := sorted(weights.keys() & found.keys()):
                    raise folder.error(f"weights that are in two files: {', '.join(twice)}")
                weights |= found
            return {_present_name(key): value for key, value in weights.items()}
    raise folder.error(f"there are no weights: neither {' nor '.join(WEIGHT_FILES)}")


def _parts(folder: _Folder, index: Mapping[str, Any], name: str) -> list[str]:
    """Files that an index lists; they must lie beside it."""
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise folder.error(f"{name} lists no files")
    parts = sorted({str(part) for part in listed.values()})
    if away := [part for part in parts if Path(part).name != part]:
        raise folder.error(f"{name} names files of other folders: {', '.join(away)}")
    return parts


def _read_weights(folder: _Folder, name: str) -> dict[str, Tensor]:
    path = folder.file(name)
    if path is None:
        raise folder.error(f"{name} is missing")
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        elif zipfile.is_zipfile(path) and is_packed(path):
            raise ValueError("it unpacks to more than its size")
        else:
            found = load_tensors(path)
    except Exception as error:  # both raise many types for a damaged or hostile file
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise folder.error(f"{name} is damaged or holds more than weights ({said})") from error
    if not isinstance(found, dict) or not all(is_plain(value) for value in found.values()):
        raise folder.error(f"{name} holds more than weights")
    # one number may stand for a whole tensor; tied weights are one tensor under two names
    held = {(value.data_ptr(), value.shape): value.nbytes for value in found.values()}
    if sum(held.values()) > path.stat().st_size:
        raise folder.error(f"{name} unpacks to more than its size")
    return {key: value.float() if value.is_floating_point() else value for key, value in found.items()}


def _present_name(name: str) -> str:
    for old, new in OLD_NAMES.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _expected(settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names and shapes of an encoder's weights, without memory for them."""
    with torch.device("meta"):
        return HuggingFaceEncoder(settings).state_dict()


def _fitted(folder: _Folder, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that are expected.

    Raises:
        CheckpointError: listing all that are missing, unexpected or of another shape.
    """
    fitting = dict(found)
    for name in expected:
        if name.endswith(COUNTER):
            fitting.setdefault(name, torch.tensor(0))
    problems = misfits(fitting, expected)
    if problems:
        raise folder.error(f"its weights are not those of its config: {problems}")
    return {name: fitting[name] for name in expected}


def _ctc_head(
    folder: _Folder, family: Family, config: Mapping[str, Any], weights: Mapping[str, Tensor],
    settings: Mapping[str, Any],
) -> dict[str, Tensor] | None:  # fmt: skip
    """`weight` [V, D] and `bias` [V] of a model with a CTC head; a convolution of width 1 is a linear layer."""
    architectures = config.get("architectures") or ()
    if family.head is None:
        return None
    found = {name: weights.get(family.head + name) for name in ("weight", "bias")}
    weight, bias = found["weight"], found["bias"]
    if weight is None or bias is None:
        if any(str(name).endswith("ForCTC") for name in architectures):
            raise folder.error(f"its weights are not those of its config: {family.head}weight or bias is missing")
        return None
    weight = weight.squeeze(2) if weight.dim() == 3 and weight.shape[2] == 1 else weight
    rows, width = config.get("vocab_size", len(bias)), settings["hidden_size"]
    if weight.shape != (rows, width) or bias.shape != (rows,):
        raise folder.error(
            f"its CTC head is {tuple(weight.shape)} and {tuple(bias.shape)} for a vocabulary of {rows} and a width of "
            f"{width}"
        )
    return {"weight": weight, "bias": bias}


# --- Whisper's decoder and tokenizers --------------------------------------------------------------------------


def _seq2seq(folder: _Folder, weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Seq2Seq | None:
    """The decoder of a Whisper model and what it is prompted with; None without either."""
    prefix = next((p for p in DECODER_PREFIXES if any(name.startswith(p) for name in weights)), None)
    generation = folder.json("generation_config.json") or {}
    last = generation.get("no_timestamps_token_id")
    if prefix is None or last is None:
        return None
    if settings["tie_word_embeddings"] is not True:
        raise folder.error("its output layer is not tied to its embedding, which is not supported")
    with torch.device("meta"):
        expected = whisper_part("WhisperDecoder", library_config(settings)).state_dict()
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    start, task = generation.get("decoder_start_token_id"), (generation.get("task_to_id") or {}).get("transcribe")
    languages = generation.get("lang_to_id") or {}
    prompts = {code.strip("<|>"): [start, number, task, last] for code, number in languages.items()}
    end = generation.get("eos_token_id")
    writing: dict[str, Any] = {
        "prompts": prompts or {"en": [start, last]},  # models of one language have no codes
        "end": end[0] if isinstance(end, list) else end,
        "suppress": generation.get("suppress_tokens") or [],
        "begin_suppress": generation.get("begin_suppress_tokens") or [],
    }
    lists = [[writing["end"]], writing["suppress"], writing["begin_suppress"], *writing["prompts"].values()]
    for number in (number for listed in lists for number in listed):
        if not isinstance(number, int) or not 0 <= number < settings["vocab_size"]:
            raise folder.error(f"generation_config.json has the id {number!r}; there are {settings['vocab_size']}")
    return Seq2Seq(_fitted(folder, own, expected), writing)


def _tokenizer(folder: _Folder, family: Family, rows: int | None) -> tuple[bytes, str] | None:
    """The tokenizer's file and its kind; every piece must have a row in a head of `rows`."""
    kinds = {"tokenizer.json": "tokenizer.json"}
    if family.head == "lm_head.":  # Whisper's vocab.json says nothing without its list of merges
        kinds = {VOCABULARY: "pieces", **kinds}
    for name, kind in kinds.items():
        found = folder.json(name)
        if found is None:
            continue
        ids = _ids(found) if kind == "tokenizer.json" else list(found.values())
        if not ids or not all(isinstance(number, int) for number in ids):
            raise folder.error(f"{name} maps no pieces to ids (or those of several languages)")
        if rows is not None and max(ids) >= rows:
            raise folder.error(f"{name} has ids up to {max(ids)}, and its head has {rows} rows")
        if family.front_end == "WhisperFeatureExtractor":
            found["pre_tokenizer"] = _after_space(found.get("pre_tokenizer"))
            return json.dumps(found, ensure_ascii=False).encode(), kind
        return (folder.path / name).read_bytes(), kind
    return None


def _after_space(split: Any) -> Any:
    """Whisper's pre-tokenizer for texts that begin with a space, as all that it was trained to write do."""
    if isinstance(split, dict) and split.get("type") == "ByteLevel":
        return {**split, "add_prefix_space": True}
    if isinstance(split, dict) and split.get("type") == "Sequence":
        return {**split, "pretokenizers": [_after_space(part) for part in split.get("pretokenizers", ())]}
    return split


def _ids(found: Mapping[str, Any]) -> list[Any]:
    """Ids of the pieces of a tokenizer.json."""
    vocabulary = (found.get("model") or {}).get("vocab") or ()
    return list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
