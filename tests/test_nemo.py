""".nemo archives: NeMo's own answers, and everything that must be refused.

tests/data/nemo_golden.* were written by NeMo itself (benchmarks/nemo_parity); hostile archives are made from it here.
"""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from torch import Tensor

from made_nemo import GOLDEN, LIMIT, members_of, refused, with_config, with_weights, write_tar
from xded.config import FeatureConfig, ModelConfig
from xded.features import LogMel
from xded.models.conformer import Conformer
from xded.models.nemo import NemoArchive, read_archive

# --- NeMo's answers


def greedy(log_probs: Tensor, archive: NemoArchive) -> str:
    best = log_probs.argmax(-1).tolist()
    blank = len(archive.vocabulary)
    ids = [i for n, i in enumerate(best) if i != blank and (n == 0 or i != best[n - 1])]
    text: str = sentencepiece.SentencePieceProcessor(model_proto=archive.tokenizer_model).decode(ids)
    return text


class Reader:
    """An archive in use: waveforms to features, encoded frames, log-probabilities and texts."""

    def __init__(self, archive: NemoArchive) -> None:
        self.archive = archive
        self.front_end = LogMel(FeatureConfig(**archive.features))
        self.encoder = Conformer(ModelConfig(**archive.model), archive.features["mels"]).eval()
        self.encoder.load_state_dict(archive.encoder)

    @torch.inference_mode()
    def encode(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        encoded, valid = self.encoder(features, lengths)
        return encoded, valid

    def texts(self, encoded: Tensor, valid: Tensor) -> list[str]:
        head = self.archive.ctc_head
        logits = torch.nn.functional.linear(encoded, head["weight"], head["bias"])
        return [greedy(row[:count], self.archive) for row, count in zip(logits, valid.tolist(), strict=True)]


def close(ours: Tensor, theirs: np.ndarray, lengths: list[int]) -> bool:
    return all(np.abs(ours[row, :n].numpy() - theirs[row, :n]).max() < LIMIT for row, n in enumerate(lengths))


def test_golden_archive_answers_as_nemo_did() -> None:
    said = np.load(GOLDEN.with_suffix(".npz"))
    reader = Reader(read_archive(GOLDEN))
    waveforms, samples = torch.from_numpy(said["waveforms"] / np.float32(32_768)), torch.from_numpy(said["samples"])
    features, frames = reader.front_end(waveforms, samples)
    encoded, valid = reader.encode(features, frames)

    assert said["features"].shape[1] % 16 == 0  # NeMo's pad_to of 16 made it longer than ours
    assert said["features"].shape[1] > features.shape[1] - 1
    assert frames.tolist() == said["features_lengths"].tolist()
    assert valid.tolist() == said["encoded_lengths"].tolist()
    assert len(set(valid.tolist())) == len(valid) == 3
    assert close(features, said["features"], frames.tolist())
    assert close(encoded, said["encoded"], valid.tolist())
    assert reader.texts(encoded, valid) == said["texts"].tolist()
    assert len(set(said["texts"])) > 1
    padded, _ = reader.encode(torch.from_numpy(said["features"]), frames)  # as NeMo padded them
    assert close(padded, said["encoded"], valid.tolist())
    for row, count in enumerate(samples.tolist()):  # without padding
        one, length = reader.encode(*reader.front_end(waveforms[row : row + 1, :count], samples[row : row + 1]))
        assert close(one, said[f"alone_{row}_encoded"], length.tolist())
        assert reader.texts(one, length) == said[f"alone_{row}_texts"].tolist()


def test_small_answers_as_nemo_did(shared: Path) -> None:
    said = np.load(shared / "data" / "nemo" / "nemo_parity.npz")
    reader = Reader(read_archive(shared / "data" / "nemo" / "random_conformer_small.nemo"))
    waveforms, samples = torch.from_numpy(said["waveform"]), torch.from_numpy(said["waveform_len"])
    features, frames = reader.front_end(waveforms, samples)
    encoded, valid = reader.encode(features, frames)

    assert valid.tolist() == said["encoder_len"].tolist()
    assert close(features, said["features"].transpose(0, 2, 1), frames.tolist())
    assert close(encoded, said["encoder_out_BDT"].transpose(0, 2, 1), valid.tolist())
    rows = zip(torch.from_numpy(said["ctc_log_probs"]), valid.tolist(), strict=True)
    assert reader.texts(encoded, valid) == [greedy(row[:count], reader.archive) for row, count in rows]
    one, length = reader.encode(*reader.front_end(waveforms[:1], samples[:1]))
    assert close(one, said["single_encoder_out_BDT_float64"].transpose(0, 2, 1), length.tolist())
    assert sum(value.numel() for value in reader.encoder.parameters()) == 12_972_608


def test_sizes_and_features_are_those_of_the_config() -> None:
    archive = read_archive(GOLDEN)
    assert archive.model == {
        "size": None, "width": 24, "encoder_layers": 2, "heads": 2, "kernel": 7, "feed_forward_factor": 2,
        "subsampling_channels": 16, "dropout": 0.1,
    }  # fmt: skip
    assert archive.features == {
        "sample_rate": 8_000, "mels": 40, "window_s": 0.025, "hop_s": 0.01, "n_fft": 256, "preemphasis": 0.97,
        "normalisation": "per_recording",
    }  # fmt: skip
    assert len(archive.vocabulary) == 40
    assert {name: tuple(value.shape) for name, value in archive.ctc_head.items()} == {"weight": (41, 24), "bias": (41,)}


@pytest.mark.parametrize("how", ["bare names", "gzip", "half precision"])
def test_same_archive_in_another_wrapping(how: str, tmp_path: Path) -> None:
    path = tmp_path / "x.nemo"
    if how == "bare names":
        write_tar(path, members_of())
    elif how == "gzip":
        path.write_bytes(gzip.compress(GOLDEN.read_bytes()))
    else:
        with_weights(
            path, lambda w: w.update({k: v.half() for k, v in w.items() if k[:3] != "pre" and v.is_floating_point()})
        )
    golden, archive = read_archive(GOLDEN), read_archive(path)
    assert archive.vocabulary == golden.vocabulary
    assert archive.tokenizer_model == golden.tokenizer_model
    assert archive.sha256 != golden.sha256
    for name, value in golden.encoder.items():
        assert archive.encoder[name].dtype == value.dtype
        torch.testing.assert_close(archive.encoder[name], value.half().to(value.dtype) if how[0] == "h" else value)


def test_no_xscaling_is_the_same_as_a_smaller_first_layer(tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["encoder"]["xscaling"] = False

    scaled, plain = read_archive(GOLDEN).encoder, read_archive(with_config(tmp_path / "x.nemo", change)).encoder
    changed = {name for name in scaled if not torch.equal(scaled[name], plain[name])}
    assert changed == {"subsampling.out.weight", "subsampling.out.bias"}
    for name in changed:
        torch.testing.assert_close(plain[name] * math.sqrt(24), scaled[name])


def test_characters_need_no_tokenizer(tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["target"] = "nemo.collections.asr.models.ctc_models.EncDecCTCModel"
        config["decoder"]["vocabulary"] = [chr(65 + i) for i in range(40)]
        del config["tokenizer"]

    archive = read_archive(with_config(tmp_path / "x.nemo", change))
    assert archive.tokenizer_model is None
    assert archive.vocabulary[:3] == ("A", "B", "C")


@pytest.mark.parametrize("compressed", [False, True])
def test_memory_stays_below_twice_the_archive(compressed: bool, shared: Path, tmp_path: Path) -> None:
    path = shared / "data" / "nemo" / "random_conformer_small.nemo"
    if compressed:
        packed = tmp_path / "x.nemo"
        packed.write_bytes(gzip.compress(path.read_bytes(), compresslevel=1))
        path = packed
    script = Path(__file__).parents[1] / "benchmarks" / "nemo_parity" / "reading.py"
    done = subprocess.run([sys.executable, script, path], capture_output=True, text=True, check=True)
    cost = json.loads(done.stdout)
    assert cost["peak_mb"] < 1.7 * path.stat().st_size / 1e6  # measured: 1.27 and 1.39; promised: below 2
    assert cost["cpu_seconds"] < 4  # measured: 0.3 and 0.6


# --- other models


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("encoder", "_target_", "os.system"),
        ("encoder", "_target_", "nemo.collections.asr.modules.SqueezeformerEncoder"),
        ("encoder", "subsampling", "dw_striding"),
        ("encoder", "subsampling_factor", 8),
        ("encoder", "causal_downsampling", True),
        ("encoder", "self_attention_model", "abs_pos"),
        ("encoder", "self_attention_model", "rel_pos_local_attn"),
        ("encoder", "att_context_size", [70, 13]),
        ("encoder", "att_context_size", [[70, 13], [-1, -1]]),
        ("encoder", "att_context_style", "chunked_limited"),
        ("encoder", "conv_norm_type", "layer_norm"),
        ("encoder", "conv_context_size", "causal"),
        ("encoder", "untie_biases", False),
        ("encoder", "use_bias", False),
        ("encoder", "reduction", "pooling"),
        ("encoder", "feat_out", 512),
        ("encoder", "adapters", {"x": 1}),
        ("preprocessor", "_target_", "nemo.collections.asr.modules.AudioToMFCCPreprocessor"),
        ("preprocessor", "normalize", "all_features"),
        ("preprocessor", "window", "hamming"),
        ("preprocessor", "frame_splicing", 3),
        ("preprocessor", "log", False),
        ("preprocessor", "log", 1),
        ("preprocessor", "log_zero_guard_value", 1e-5),
        ("preprocessor", "mag_power", 1.0),
        ("preprocessor", "highfreq", 3_000),
        ("preprocessor", "lowfreq", 20),
        ("preprocessor", "exact_pad", True),
        ("preprocessor", "window_size", 0.02507),
        ("decoder", "_target_", "nemo.collections.asr.modules.RNNTDecoder"),
        ("decoder", "num_classes", 7),
        ("tokenizer", "type", "wpe"),
        ("tokenizer", "model_path", "/etc/passwd"),
    ],
)
def test_other_settings_are_refused_by_name(section: str, key: str, value: Any, tmp_path: Path) -> None:
    problem = refused(with_config(tmp_path / "x.nemo", lambda config: config[section].update({key: value})))
    assert f"{section}.{key}" in problem
    assert key == "adapters" or str(value) in problem


@pytest.mark.parametrize("target", ["nemo.collections.asr.models.rnnt_bpe_models.EncDecRNNTBPEModel", "os.system", 3])
def test_other_models_are_refused(target: Any, tmp_path: Path) -> None:
    assert repr(target) in refused(with_config(tmp_path / "x.nemo", lambda config: config.update(target=target)))


def test_settings_without_effect_change_nothing(tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["preprocessor"] |= {"dither": 1.0, "pad_to": 0, "stft_conv": True, "n_fft": None}
        config["encoder"] |= {"stochastic_depth_drop_prob": 0.3, "pos_emb_max_len": 9, "conv_context_size": [3, 3]}
        config["encoder"]["att_context_size"] = [[-1, -1]]

    archive, golden = read_archive(with_config(tmp_path / "x.nemo", change)), read_archive(GOLDEN)
    assert (archive.model, archive.features) == (golden.model, golden.features)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("encoder", "d_model", 8_192),  # 40 GB in the layers
        ("encoder", "n_layers", 10**9),
        ("encoder", "n_layers", "two"),
        ("encoder", "d_model", float("nan")),
        ("encoder", "n_heads", 5),
        ("encoder", "conv_kernel_size", 8),
        ("encoder", "feat_in", 80),
        ("preprocessor", "sample_rate", "${sample_rate}"),
        ("preprocessor", "features", -1),
        ("preprocessor", "n_fft", 100),
    ],
)
def test_impossible_sizes_are_refused(section: str, key: str, value: Any, tmp_path: Path) -> None:
    refused(with_config(tmp_path / "x.nemo", lambda config: config[section].update({key: value})))


@pytest.mark.parametrize(
    "text",
    [
        b"!!python/object/apply:os.system ['touch bomb']",
        b"encoder: !include /etc/passwd",
        b"[" * 100_000,
        b"a: [",
        b"\xff\xfe\x00",
        b"- 1",
        b"",
        b"target: nemo.collections.asr.models.ctc_bpe_models.EncDecCTCModelBPE",
    ],
    ids=["python tag", "own tag", "deep", "broken", "no text", "list", "empty", "no sections"],
)
def test_config_that_is_no_plain_table_is_refused(text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "model_config.yaml" in refused(write_tar(tmp_path / "x.nemo", members_of() | {"model_config.yaml": text}))
    assert not (tmp_path / "bomb").exists()
