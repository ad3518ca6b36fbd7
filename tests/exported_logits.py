"""Logits of made-up teachers that know every word, in the files of other tools, and their import."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from made_targets import RATE_HZ, TOKENIZER, ctc_logits, decoder_logits
from tiny_corpus import tiny_config
from xded.corpus.manifest import Corpus, Recording
from xded.findings import Finding
from xded.teachers.imported import Imported, import_teachers

Rows = dict[str, np.ndarray]  # [T, V] by recording
CONFIG = tiny_config(objective={"temperature": 2.0}, target={"top_k": 99})


def rows_of(recordings: Iterable[Recording], seed: int = 0) -> dict[str, Rows]:
    """Logits of a teacher that knows every word, by kind."""
    random = np.random.default_rng(seed)
    said: dict[str, Rows] = {"ctc": {}, "decoder": {}}
    for r in recordings:
        tokens = TOKENIZER.encode(r.text)
        said["ctc"][r.recording] = ctc_logits(tokens, round(r.duration * RATE_HZ), random, 0).astype(np.float32)
        said["decoder"][r.recording] = decoder_logits(tokens, random).astype(np.float32)
    return said


def write_pt(folder: Path, teacher: str, said: Mapping[str, Rows], corpus: Corpus, **metadata: Any) -> Path:
    """The reference study's files, without a key of the metadata where it is None."""
    below = folder / teacher
    below.mkdir(parents=True, exist_ok=True)
    words = {r.recording: r.text for r in corpus.recordings}
    ids = list(next(iter(said.values())))
    known = {
        "model_name": teacher, "num_utterances": len(ids), "utterance_ids": ids,
        "target_words": [words.get(i, "BAD") for i in ids],
        "ctc_frame_lens": [len(said["ctc"][i]) for i in ids] if "ctc" in said else None,
        "token_lens": [[1.0]] * len(ids),
    }  # fmt: skip
    for kind, rows in said.items():
        torch.save([torch.from_numpy(a) for a in rows.values()], below / f"{teacher}_{kind}_logits.pt")
    kept = {key: value for key, value in (known | metadata).items() if value is not None}
    (below / f"{teacher}_metadata.json").write_text(json.dumps(kept))
    return folder


def write_npz(folder: Path, teacher: str, said: Mapping[str, Rows]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for kind, rows in said.items():
        np.savez_compressed(folder / f"{teacher}_{kind}_logits.npz", **rows)
    return folder


def write_safetensors(folder: Path, teacher: str, said: Mapping[str, Rows]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for kind, rows in said.items():
        save_file({n: torch.from_numpy(a) for n, a in rows.items()}, folder / f"{teacher}_{kind}_logits.safetensors")
    return folder


def write_folder(folder: Path, teacher: str, said: Mapping[str, Rows]) -> Path:
    for kind, rows in said.items():
        (folder / f"{teacher}_{kind}_logits").mkdir(parents=True)
        for name, array in rows.items():
            np.save(folder / f"{teacher}_{kind}_logits" / f"{name}.npy", array)
    return folder


def run(logits: Path, corpus: Corpus, out: Path, config: Any = CONFIG, **options: Any) -> list[Imported]:
    return import_teachers(logits, corpus, TOKENIZER, config, out, **options)


def one(imported: list[Imported]) -> Imported:
    """The only teacher; what stopped it is raised."""
    (found,) = imported
    if found.problem:
        raise found.problem
    return found


def worst(imported: list[Imported]) -> Finding:
    return one(imported).findings[0]
