"""`xded study import`: results made elsewhere, recomputed from their tokens; what they claim stays apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli_calls import call, done, refused
from evaluation_files import WORDS, averaged, outputs, student, tokenizer, words
from xded.study.imported import imported_results, keep, read_all


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer().model_bytes)
    return path


def imported(*arguments: object) -> dict[str, dict[str, Any]]:
    """Rows of the JSON, by name."""
    found = json.loads(done("study", "import", "--json", *arguments).out)
    return {row["name"]: row for row in found["results"]}


def test_reference_files_give_the_real_history(shared: Path, tmp_path: Path) -> None:
    reference = shared / "reference"
    rows = imported(
        reference / "predictions", "--tokenizer", reference / "tokenizer.model", "--output", tmp_path / "history"
    )
    recomputed = {name: round(row["recomputed_wra_percent"]["value"], 2) for name, row in rows.items()}
    assert recomputed["original"] == 18.54
    assert recomputed["included"] == 20.56
    assert recomputed["zero-shot"] == 39.05
    assert rows["original"]["reported_wra_percent"] == 0.0
    assert rows["original"]["findings"][0]["check"] == "token-offset"
    assert all(row["takes"] == 255 for row in rows.values())
    report = (tmp_path / "history" / "report.md").read_text()
    assert "| original | M08 | 0.00 | 18.54 [14-23] | 255 | token-offset |" in report


def test_ids_are_read_with_the_tokenizer_and_what_the_file_claims_is_only_repeated(tmp_path: Path, model: Path) -> None:
    path = student(tmp_path / "in" / "off_by_one.json", outputs(100), shift=-1)
    rows = imported(path, "--tokenizer", model, "--output", tmp_path / "out")
    row = rows["off_by_one"]
    assert row["recomputed_wra_percent"]["value"] == pytest.approx(100 * 100 / WORDS)
    assert row["reported_wra_percent"] < 5
    assert row["recomputed_from"] == f"ids with {model}"
    low, high = row["recomputed_wra_percent"]["low"], row["recomputed_wra_percent"]["high"]
    assert 10 < high - low < 14  # of 255 takes, not of 765 recordings
    as_it_is = imported(path, "--output", tmp_path / "out2")["off_by_one"]
    assert as_it_is["recomputed_wra_percent"]["value"] < 5
    assert as_it_is["recomputed_from"] == "texts as stored"


def test_files_of_one_name_are_both_kept_and_none_is_taken_twice(tmp_path: Path, model: Path) -> None:
    student(tmp_path / "in" / "a" / "eval x.json", outputs(50))
    student(tmp_path / "in" / "b" / "eval_x.json", outputs(100, seed=1))
    folder, one = tmp_path / "in", tmp_path / "in" / "a" / "eval x.json"
    rows = imported(folder, one, "--tokenizer", model, "--output", tmp_path / "out")
    assert set(rows) == {"eval x", "eval_x (b, 2)"}
    kept = {result.system: result for result in imported_results(tmp_path / "out")}
    assert set(kept) == {"eval x (imported)", "eval_x (b, 2) (imported)"}  # an attempt may be called so, too
    result = kept["eval_x (b, 2) (imported)"]
    assert (result.source, result.held_out, result.reported) == ("imported", ("M08",), pytest.approx(100 * 100 / WORDS))
    assert sum(p.hypothesis == p.reference for p in result.of("open")) == 3 * 100
    assert result.of("word list") == []


def test_one_bad_file_does_not_lose_the_others(tmp_path: Path, model: Path) -> None:
    averaged(tmp_path / "in" / "good.json", [word for word in words() for _ in range(3)])
    student(tmp_path / "in" / "nothing.json", outputs(0), predictions=[])
    called = done("study", "import", tmp_path / "in", "--tokenizer", model, "--output", tmp_path / "out")
    assert "good" in called.out
    assert "Not read" in called.out
    assert "nothing.json" in called.out
    assert "not read: " in (tmp_path / "out" / "report.md").read_text()


def test_nothing_to_import_is_an_error(tmp_path: Path) -> None:
    student(tmp_path / "empty" / "nothing.json", outputs(0), predictions=[])
    refused(call("study", "import", tmp_path / "empty", "--output", tmp_path / "o"), 2, "None of 1 files", "outputs")
    (tmp_path / "other").mkdir()
    refused(call("study", "import", tmp_path / "other", "--output", tmp_path / "o"), 2, "holds no evaluation", "Give")
    refused(call("study", "import", tmp_path / "none", "--output", tmp_path / "o"), 2, "none holds no evaluation")
    assert not (tmp_path / "o").exists()


def test_what_was_kept_is_what_was_read(tmp_path: Path, model: Path) -> None:
    path = student(tmp_path / "x.json", outputs(10))
    rows, unread = read_all([path], {str(model): tokenizer()})
    assert unread == []
    keep(rows, tmp_path / "out")
    (result,) = imported_results(tmp_path / "out")
    assert result.of("open") == list(rows[0].predictions)
