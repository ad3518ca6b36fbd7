from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import exported_model
from cli_calls import call, done, refused
from exported_model import corpus, exported, recogniser
from xded.config import DecodeConfig
from xded.errors import CheckpointError
from xded.exported import Exported, ctc_greedy, ctc_words
from xded.exported import describe as describe_folder

WITHOUT_TORCH = """
import sys
sys.modules.update(torch=None, lightning=None, transformers=None)  # importing them raises
from xded.cli import main
main()
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text("ab\nBAD\ncab\nDA\nBB\nADDA\nBADCABDABADCABDABADCABDABADCABDABADCAB\n")
    return path


def files() -> list[Path]:
    return [recording.audio_filepath for recording in corpus().recordings[::2]]


@pytest.mark.parametrize("mode", ["ctc", "decoder", "word list"])
def test_export_says_what_the_checkpoint_says(words: Path, mode: str) -> None:
    recogniser()
    flags = ("--word-list", words) if mode == "word list" else ("--decode", mode)
    of_torch, of_onnx = (
        [json.loads(line) for line in done("transcribe", model, *files(), *flags, "--json").out.splitlines()]
        for model in (exported_model.FOLDER / "run", exported())
    )
    scores = [[row.pop("score") for row in rows] for rows in (of_torch, of_onnx)]
    assert of_onnx == of_torch
    assert len({row["text"] for row in of_onnx}) > 2  # they do differ from recording to recording
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-2)


def test_transcribing_needs_no_torch(words: Path) -> None:
    wanted = done("transcribe", exported(), *files(), "--word-list", words).out
    command = [sys.executable, "-c", WITHOUT_TORCH, "transcribe", exported(), *files(), "--word-list", words]
    ran = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, wanted), ran.stderr


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("encoder.onnx", lambda b: b[:-9], "encoder.onnx is damaged: its SHA-256 is not the one in config.json"),
        ("tokenizer.model", lambda b: b"x" + b, "tokenizer.model is damaged"),
        ("config.json", lambda b: b.replace(b'"heads"', b'"hands"'), "describes no exported model (model.hands"),
        ("config.json", lambda b: b[:200], "describes no exported model"),
    ],
)
def test_damaged_folder_is_refused(tmp_path: Path, name: str, change: object, said: str) -> None:
    folder = shutil.copytree(exported(), tmp_path / "out")
    assert callable(change)
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    refused(call("transcribe", folder, files()[0]), 2, said, "Export the checkpoint again with 'xded export'")


def test_graph_that_cannot_be_run_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(exported(), tmp_path / "out")
    own = describe_folder(folder).sha256["encoder.onnx"]
    (folder / "encoder.onnx").write_bytes(b"no graph")
    config = (folder / "config.json").read_text()
    digest = hashlib.sha256(b"no graph").hexdigest()
    (folder / "config.json").write_text(config.replace(own, digest))
    refused(call("transcribe", folder, files()[0]), 2, "encoder.onnx cannot be run: ")


def test_what_an_export_cannot_do_is_said_at_once(tmp_path: Path) -> None:
    refused(call("transcribe", exported(), files()[0], "--beam", 4), 2, "no beam search", "--beam 1")
    refused(call("transcribe", exported(), files()[0], "--device", "cuda"), 2, "is run on the CPU", "--device")
    folder = shutil.copytree(exported(), tmp_path / "out")
    (folder / "decoder.onnx").unlink()
    called = call("transcribe", folder, files()[0], "--decode", "decoder")
    refused(called, 2, "decoder.onnx cannot be read", "xded export")
    assert call("transcribe", folder, files()[0], "--decode", "ctc").code == 0


def test_word_that_the_tokenizer_cannot_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("AB\nXYZ\n")
    called = call("transcribe", exported(), files()[0], "--word-list", tmp_path / "words.txt")
    refused(called, 2, "cannot write 1 of 2 texts: 'XYZ'")


def test_a_file_that_cannot_be_read_costs_its_line(tmp_path: Path) -> None:
    called = call("transcribe", exported(), tmp_path / "no.wav", files()[0])
    assert called.code == 3
    assert "no.wav cannot be read" in called.out.splitlines()[0]
    assert len(called.out.splitlines()) == 2


def test_ctc_words_is_the_ctc_loss() -> None:
    log_probs = torch.randn(7, 5, dtype=torch.double, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    words = [(1,), (2, 2), (1, 1, 1), (1, 2, 3, 4), (2, 2, 2, 2), (1, 1, 1, 1, 1), (4, 3, 2, 1, 4, 3, 2, 1)]
    wanted = [
        -float(F.ctc_loss(log_probs, torch.tensor(word), torch.tensor(7), torch.tensor(len(word)), reduction="sum"))
        for word in words
    ]
    assert wanted[-2:] == [-np.inf, -np.inf]  # repeats need blanks between them
    np.testing.assert_allclose(ctc_words(log_probs.numpy(), words, 0), wanted, rtol=1e-9)


def test_ctc_greedy_merges_repeats_and_drops_blanks() -> None:
    path = [1, 1, 3, 1, 2, 2, 3, 3]
    log_probs = np.full((len(path), 4), -5.0)
    log_probs[range(len(path)), path] = -0.5
    assert ctc_greedy(log_probs, blank=3) == ((1, 1, 2), -4.0)


def test_outputs_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(CheckpointError, match="NaN"):
        Exported(exported(), DecodeConfig()).run(np.full(16_000, np.nan, dtype=np.float32))
