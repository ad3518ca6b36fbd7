"""`xded tokenizer`: what a tokenizer is and which prompts it cannot write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from xded.cli.tokenizer import tokenizer as verb
from xded.corpus.manifest import Recording, write_manifest
from xded.errors import TokenizerError
from xded.tokenizer import NORMALISERS, Tokenizer

REFERENCE = Path(__file__).parents[1] / "../shared/reference"


def run(*arguments: object) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(verb)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def report(*arguments: object) -> tuple[int, dict[str, Any]]:
    code, text = run(*arguments, "--json")
    return code, json.loads(text)


def manifest(folder: Path, rows: list[tuple[str, str, str]]) -> Path:
    """Rows: recording, take, text."""
    recordings = [
        Recording(
            audio_filepath=folder / f"{name}.wav", duration=1.0, text=text, recording=name, speaker="M08", take=take,
            prompt=text,
        )
        for name, take, text in rows
    ]  # fmt: skip
    for recording in recordings:
        recording.audio_filepath.touch()  # a manifest is refused where files are missing; nobody listens to them here
    write_manifest(folder / "manifest.jsonl", recordings)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(Tokenizer.train(["xray", "go"], "char", 64, "upper").model_bytes)
    return path


def test_it_says_what_a_tokenizer_is(model: Path, tmp_path: Path) -> None:
    code, said = report(model)
    own = Tokenizer.load(model, "upper")
    assert (code, said["kind"], said["size"], said["fingerprint"]) == (0, "sentencepiece", 9, own.fingerprint)
    assert said["special_ids"] == {"unk": 0, "blank": 0, "bos": 1, "eos": 2}
    assert (said["appended"], "corpus" in said) == ([], False)
    pieces = tmp_path / "pieces.json"
    pieces.write_text('["A", "B"]')
    text = run(pieces)[1]
    assert "pieces, 6 pieces" in text
    assert "unk 5, blank 2, bos 3, eos 4; not in the file, appended: <blank> <s> </s> <unk>" in text


def test_takes_are_counted_not_microphone_copies(model: Path, tmp_path: Path) -> None:
    rows = [("x1", "x", "X-RAY"), ("x2", "x", "X-RAY"), ("g1", "g", "GO"), ("h1", "h", "GO"), ("i1", "i", "GO")]
    corpus = manifest(tmp_path, rows)
    code, said = report(model, "--corpus", corpus)
    found = said["corpus"]
    assert (code, found["takes"], found["prompts"], found["lost_takes"], found["best_wra"]) == (3, 4, 2, 1, 75.0)
    assert found["unspellable"] == {"X-RAY": "<unk> for -"}
    assert found["remedy"] == "Use --set tokenizer.normaliser=upper_no_punctuation."
    assert {row["normaliser"]: row["best_wra"] for row in found["normalisers"]} == {
        "upper": 75.0, "lower": 0.0, "upper_no_punctuation": 100.0, "lower_no_punctuation": 0.0,
    }  # fmt: skip
    code, said = report(model, "--corpus", corpus, "--normaliser", "upper_no_punctuation")
    assert (code, said["corpus"]["unspellable"], said["corpus"]["remedy"]) == (0, {}, None)


def test_without_a_normaliser_that_helps_another_tokenizer_is_the_remedy(model: Path, tmp_path: Path) -> None:
    code, text = run(model, "--corpus", manifest(tmp_path, [("z", "z", "ZULU"), ("g", "g", "GO")]))
    assert code == 3
    assert "ZULU (<unk> for L U Z)" in text
    assert "Use a tokenizer that has these characters" in text


def test_bad_arguments_are_errors(model: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="Unknown normaliser 'loud'"):
        run(model, "--normaliser", "loud")
    with pytest.raises(TokenizerError, match="No such file"):
        run(tmp_path / "absent.model")


def test_the_study_could_never_say_three_of_its_words(tmp_path: Path) -> None:
    if not (REFERENCE / "tokenizer.model").is_file():
        pytest.skip("../shared/reference is absent")
    data = json.loads((REFERENCE / "teacher_metadata/M08_metadata.json").read_text())
    rows = [
        (name, name.rpartition("_")[0], word)
        for name, word in zip(data["utterance_ids"], data["target_words"], strict=True)
    ]
    code, said = report(REFERENCE / "tokenizer.model", "--corpus", manifest(tmp_path, rows))
    found = said["corpus"]
    assert (code, said["size"], found["prompts"], found["takes"]) == (3, 5000, 255, 255)
    assert sorted(found["unspellable"]) == ["ROLY-POLY", "THIRTY-FIVE", "X-RAY"]
    assert (found["lost_takes"], found["best_wra"]) == (3, 98.82)
    assert "upper_no_punctuation" in found["remedy"]
    assert [row["normaliser"] for row in found["normalisers"]] == list(NORMALISERS)
