"""Whether xded answers as NeMo does: NeMo writes archives and what it says, xded reads the archives and is compared.

    python benchmarks/nemo_parity --env work/envs/nemo [--golden]

The folder of `--env` gets an environment of its own with the packages of requirements.txt (2.2 GB; made when absent):
NeMo pins a Lightning of its own and cannot share one with xded. `--golden` also replaces tests/data/nemo_golden.*, the
tiny archive and NeMo's outputs that the test suite keeps.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import ROOT, WORK, head  # noqa: E402
from xded.config import FeatureConfig, ModelConfig  # noqa: E402
from xded.features import LogMel  # noqa: E402
from xded.models.conformer import Conformer  # noqa: E402
from xded.models.nemo import NemoArchive, read_archive  # noqa: E402

GOLDEN = ROOT / "tests" / "data"
LIMIT = 1e-4  # max abs on valid frames

USUAL = {
    "sample_rate": 16_000, "window_size": 0.025, "window_stride": 0.01, "window": "hann", "features": 80, "n_fft": 512,
    "normalize": "per_feature", "log": True, "frame_splicing": 1, "dither": 1e-5, "pad_to": 0, "pad_value": 0.0,
}  # fmt: skip
TELEPHONE = {"sample_rate": 8_000, "window_size": 0.025, "window_stride": 0.01, "features": 40, "n_fft": 256}
SMALL_ENCODER = {"n_layers": 16, "d_model": 176, "n_heads": 4, "conv_kernel_size": 31, "dropout": 0.1}
MEDIUM_ENCODER = SMALL_ENCODER | {"n_layers": 18, "d_model": 256}
TINY_ENCODER = {
    "n_layers": 2, "d_model": 24, "n_heads": 2, "conv_kernel_size": 7, "ff_expansion_factor": 2,
    "subsampling_conv_channels": 16, "dropout": 0.1,
}  # fmt: skip
CASES: list[dict[str, Any]] = [
    # the other defaults of NeMo: frames padded to a multiple of 16, pre-emphasis not mentioned
    {"name": "golden", "encoder": TINY_ENCODER, "preprocessor": TELEPHONE, "pieces": 40, "seconds": [0.7, 0.41, 0.555]},
    {
        "name": "tiny_no_xscaling_no_preemphasis", "pieces": 40, "seconds": [1.3, 0.4, 1.0],
        "encoder": TINY_ENCODER | {"xscaling": False, "att_context_size": [-1, -1]},
        "preprocessor": USUAL | {"preemph": None, "n_fft": None, "pad_to": 16},
    },
    {"name": "tiny_characters", "encoder": TINY_ENCODER, "preprocessor": USUAL, "pieces": 0, "seconds": [1.0, 0.6]},
    {"name": "small", "encoder": SMALL_ENCODER, "preprocessor": USUAL, "pieces": 1024, "seconds": [2.0, 1.6, 1.11]},
    {"name": "small_15s", "encoder": SMALL_ENCODER, "preprocessor": USUAL, "pieces": 1024, "seconds": [15.0, 4.005]},
    {"name": "medium", "encoder": MEDIUM_ENCODER, "preprocessor": USUAL, "pieces": 1024, "seconds": [2.0, 1.6, 1.11]},
    {"name": "medium_15s", "encoder": MEDIUM_ENCODER, "preprocessor": USUAL, "pieces": 1024, "seconds": [15.0, 7.3]},
]  # fmt: skip


def prepare(env: Path) -> Path:
    """The interpreter of NeMo's environment, which is made when it is absent."""
    python = env / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", env], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", HERE / "requirements.txt"], check=True)
    return python


def largest(ours: np.ndarray, theirs: np.ndarray, lengths: np.ndarray) -> float:
    """Max abs difference on valid frames of [B, T, D]."""
    return max(float(np.abs(a[:n] - b[:n]).max()) for a, b, n in zip(ours, theirs, lengths, strict=True))


def text_of(log_probs: np.ndarray, archive: NemoArchive) -> str:
    """CTC greedy: repetitions and blanks (the last row) left out."""
    best = log_probs.argmax(-1)
    blank = len(archive.vocabulary)
    kept = [int(i) for n, i in enumerate(best) if i != blank and (n == 0 or i != best[n - 1])]
    if archive.tokenizer_model is None:
        return "".join(archive.vocabulary[i] for i in kept)
    decoded: str = sentencepiece.SentencePieceProcessor(model_proto=archive.tokenizer_model).decode(kept)
    return decoded


@torch.inference_mode()
def compare(path: Path) -> dict[str, Any]:
    """One case: the largest differences of every stage, and what reading costs."""
    theirs = np.load(path.with_suffix(".npz"))
    archive = read_archive(path)
    front_end = LogMel(FeatureConfig(**archive.features))
    encoder = Conformer(ModelConfig(**archive.model), archive.features["mels"]).eval()
    encoder.load_state_dict(archive.encoder)
    waveforms, samples = torch.from_numpy(theirs["waveforms"] / np.float32(32_768)), torch.from_numpy(theirs["samples"])
    lengths, encoded_lengths = theirs["features_lengths"], theirs["encoded_lengths"]

    def recognise(features: torch.Tensor, frames: torch.Tensor) -> tuple[np.ndarray, np.ndarray, list[str]]:
        encoded, valid = encoder(features, frames)
        logits = torch.nn.functional.linear(encoded, archive.ctc_head["weight"], archive.ctc_head["bias"])
        log_probs = logits.log_softmax(-1).numpy()
        texts = [text_of(row[:count], archive) for row, count in zip(log_probs, valid.tolist(), strict=True)]
        return encoded.numpy(), log_probs, texts

    features, frames = front_end(waveforms, samples)
    assert frames.tolist() == lengths.tolist()
    assert encoder.reduce(frames).tolist() == encoded_lengths.tolist()
    same_features, _, _ = recognise(torch.from_numpy(theirs["features"]), frames)
    encoded, log_probs, texts = recognise(features, frames)
    alone, texts_alone = 0.0, []
    for row, count in enumerate(samples.tolist()):
        one, _, text = recognise(*front_end(waveforms[row : row + 1, :count], samples[row : row + 1]))
        alone = max(alone, largest(one, theirs[f"alone_{row}_encoded"], encoded_lengths[row : row + 1]))
        texts_alone += text
    expected_alone = [theirs[f"alone_{row}_texts"][0] for row in range(len(samples))]
    return {
        "features": largest(features.numpy(), theirs["features"], lengths),
        "encoder, NeMo's features": largest(same_features, theirs["encoded"], encoded_lengths),
        "encoder, from the waveform": largest(encoded, theirs["encoded"], encoded_lengths),
        "alone, without padding": alone,
        "log-probabilities": largest(log_probs, theirs["log_probs"], encoded_lengths),
        "NeMo's own rounding": largest(theirs["encoded"], theirs["encoded_double"], encoded_lengths),
        "largest value": float(np.abs(theirs["encoded"]).max()),
        "texts": f"{sum(a == b for a, b in zip(texts + texts_alone, [*theirs['texts'], *expected_alone], strict=True))}"
        f" of {2 * len(texts)}",
    }


def cost_of_reading(path: Path) -> dict[str, float]:
    """Seconds and peak memory of `read_archive`, in a process of its own with one thread."""
    done = subprocess.run([sys.executable, HERE / "reading.py", path], check=True, capture_output=True, text=True)
    cost: dict[str, float] = json.loads(done.stdout)
    return cost


def figure(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def report(out: Path) -> bool:
    """Prints the tables; whether every case is within the limit."""
    results = {case["name"]: compare(out / f"{case['name']}.nemo") for case in CASES}
    versions = json.loads((out / "versions.json").read_text())
    print(head(f"the same answers as NeMo {versions['nemo']}", "nemo_parity").replace("parity.py", "parity"))
    print(
        "Archives of random weights, written by NeMo; largest absolute difference between xded's output and NeMo's on"
    )
    print("valid frames, float32, in a padded batch of several lengths unless the column says alone.\n")
    columns = list(next(iter(results.values())))
    print("| model |", " | ".join(columns), "|")
    print("| --- |", " | ".join("---:" for _ in columns), "|")
    for name, row in results.items():
        print(f"| {name} |", " | ".join(figure(row[column]) for column in columns), "|")
    print("\n| archive | MB | read, s | CPU-seconds | peak memory of reading, MB | times its size |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name in ("small", "medium"):
        plain, packed = out / f"{name}.nemo", out / f"{name}.gzip.nemo"
        with plain.open("rb") as source, gzip.open(packed, "wb") as target:
            shutil.copyfileobj(source, target)
        for path in (plain, packed):
            size_mb, cost = path.stat().st_size / 1e6, cost_of_reading(path)
            memory = f"{cost['peak_mb']:.1f} | {cost['peak_mb'] / size_mb:.2f}"
            print(f"| {path.name} | {size_mb:.1f} | {cost['seconds']:.2f} | {cost['cpu_seconds']:.2f} | {memory} |")
    compared = ("features", "encoder, NeMo's features", "encoder, from the waveform", "alone, without padding")
    return all(row[stage] < LIMIT for row in results.values() for stage in compared) and all(
        row["texts"].split(" of ")[0] == row["texts"].split(" of ")[1] for row in results.values()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, required=True, help="folder of NeMo's environment")
    parser.add_argument("--golden", action="store_true", help="replace the files that the test suite keeps")
    options = parser.parse_args()
    out = WORK / "nemo_parity"
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    python = prepare(options.env)
    (out / "cases.json").write_text(json.dumps(CASES))
    with (out / "nemo.log").open("w") as log:  # NeMo says a lot
        subprocess.run([python, HERE / "nemo_side.py", out / "cases.json", out], check=True, stdout=log, stderr=log)
    if options.golden:
        GOLDEN.mkdir(exist_ok=True)
        for suffix in (".nemo", ".npz"):
            shutil.copyfile(out / f"golden{suffix}", GOLDEN / f"nemo_golden{suffix}")
    if not report(out):
        sys.exit(f"xded does not answer as NeMo does: over {LIMIT}, or other texts")


if __name__ == "__main__":
    main()
