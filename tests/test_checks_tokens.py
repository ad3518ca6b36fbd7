"""Every check on ids and texts fires on a planted fault, with the numbers, and is silent on the healthy twin."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

import evaluation_files as files
from xded.checks import tokens
from xded.checks.readings import Reading, as_stored, preferred, read_with, writer
from xded.evaluations import Evaluation, read_evaluation
from xded.findings import Finding
from xded.tokenizer import Tokenizer


def offset(evaluation: Evaluation, tokenizer: Tokenizer | None = None) -> list[Finding]:
    return tokens.token_offset(evaluation, read_with(evaluation, {"t": tokenizer or files.tokenizer()}))


def other_tokenizer() -> Tokenizer:
    """The same pieces in another order: the same size, other meanings."""
    model = io.BytesIO()
    pieces = [piece for piece in reversed(files.tokenizer().pieces) if piece[0] != "<"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(files.words()), model_writer=model, model_type="bpe",
        vocab_size=len(pieces) + 3 + 40, user_defined_symbols=pieces, hard_vocab_limit=False, unk_id=0, bos_id=1,
        eos_id=2, pad_id=-1, num_threads=1, minloglevel=3, normalization_rule_name="identity",
    )  # fmt: skip
    return Tokenizer.from_bytes(model.getvalue(), "upper")


@pytest.mark.parametrize("shift", [-1, 1, 2])
def test_offset_is_found_with_the_recomputed_wra(tmp_path: Path, shift: int) -> None:
    e = read_evaluation(files.student(tmp_path / "e.json", files.outputs(51), shift=shift))
    (found,) = offset(e)
    assert (found.check, found.severity) == ("token-offset", "refuse")
    assert found.evidence["recomputed_wra"] == pytest.approx(20.0)
    assert (found.evidence["stored_shift"], found.evidence["right_shift"]) == (shift, 0)
    assert found.points == pytest.approx(20.0 - found.evidence["stored_wra"], abs=0.01)
    assert "20.00 %" in found.what
    assert "over 255 takes" in found.what


def test_healthy_ids_have_no_offset(tmp_path: Path) -> None:
    for seed in range(2):
        for right in (0, 2, 20, 250):
            e = read_evaluation(files.student(tmp_path / "e.json", files.outputs(right, seed=seed)))
            assert offset(e) == []


def test_rare_hits_are_found(tmp_path: Path) -> None:
    """The study's smallest: 2.75 % of 765 recordings of 255 takes, reported as 0.00 %."""
    e = read_evaluation(files.student(tmp_path / "e.json", files.outputs(7, mics=3), shift=-1, speaker="M01", mics=3))
    (found,) = offset(e)
    assert found.severity == "refuse"
    assert found.evidence["recomputed_wra"] == pytest.approx(2.75, abs=0.01)


@pytest.mark.parametrize("said", [5, 9, 123])
def test_one_word_for_everything_has_no_offset_that_matters(tmp_path: Path, said: int) -> None:
    """A shift may turn the one word into a prompt, which is then right once: chance."""
    e = read_evaluation(files.student(tmp_path / "e.json", [[said]] * files.RECORDINGS))
    assert [f for f in offset(e) if f.severity != "note"] == []


def test_chance_hits_on_a_small_word_list_are_no_offset(tmp_path: Path) -> None:
    """Ten prompts with ten takes each, one output: under another shift it is right in every tenth take."""
    words = files.words()[:10]
    stands_before = files.ids_of(words[3])[0] - 1
    rows = [
        {"utterance_id": f"{word}-{i}", "target": word, "prediction_tokens": [stands_before],
         "prediction_text": files.read_at([stands_before], 0)}
        for word in words for i in range(10)
    ]  # fmt: skip
    e = read_evaluation(files.write(tmp_path / "e.json", {"predictions": rows}))
    readings = read_with(e, {"t": files.tokenizer()})
    assert max(r.wra for r in readings) == 10.0
    assert tokens.token_offset(e, readings) == []


def test_offset_of_a_dead_recogniser_is_a_note(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    ids = [random.integers(300, 480, size=8).tolist() for _ in range(files.RECORDINGS)]
    (found,) = offset(read_evaluation(files.student(tmp_path / "e.json", ids, shift=-1)))
    assert (found.severity, found.points) == ("note", 0.0)
    assert "it changes nothing here" in found.effect


def test_labels_that_were_trained_one_off(tmp_path: Path) -> None:
    """Texts are decoded rightly, but the model learned other ids."""
    shifted = [[i - 1 for i in ids] for ids in files.outputs(60)]
    (found,) = offset(read_evaluation(files.student(tmp_path / "e.json", shifted)))
    assert (found.severity, found.evidence["right_shift"], found.evidence["stored_shift"]) == ("refuse", 1, 0)
    assert "labels were shifted" in found.remedy


def test_shifted_ids_with_right_texts_are_a_note(tmp_path: Path) -> None:
    shifted = [[i + 1 for i in ids] for ids in files.outputs(60)]
    (found,) = offset(read_evaluation(files.student(tmp_path / "e.json", shifted, shift=-1)))
    assert (found.severity, found.points) == ("note", 0.0)
    assert "its texts are right" in found.effect


def test_ids_without_texts(tmp_path: Path) -> None:
    path = files.student(tmp_path / "e.json", [[i - 1 for i in ids] for ids in files.outputs(60)])
    data = json.loads(path.read_text())
    for row in data["predictions"]:
        row["prediction_text"] = ""
    (found,) = offset(read_evaluation(files.write(path, data)))
    assert (found.severity, found.evidence["right_shift"]) == ("refuse", 1)


def test_unreadable_becomes_readable_where_nothing_is_right(tmp_path: Path) -> None:
    """WRA is 0 whatever the shift, but with one of them outputs become words of the list."""
    shifted = [[i + 1 for i in ids] for ids in files.outputs(0)]
    found = [f for f in offset(read_evaluation(files.student(tmp_path / "e.json", shifted))) if f.severity == "warn"]
    assert [f.evidence["right_shift"] for f in found] == [-1]


def test_the_file_alone_reveals_its_offset(tmp_path: Path) -> None:
    e = read_evaluation(files.student(tmp_path / "e.json", adjacent(), shift=-1))
    (found,) = tokens.offset_without_tokenizer(e)
    assert (found.severity, found.evidence["stored_shift"]) == ("refuse", -1)
    assert found.evidence["recomputed_wra_at_least"] > 10.0
    assert tokens.offset_without_tokenizer(read_evaluation(files.student(tmp_path / "h.json", adjacent()))) == []


def adjacent() -> list[list[int]]:
    """Single-token outputs that are often right, among outputs of the pieces between them."""
    random = np.random.default_rng(1)
    ids = files.outputs(150)
    return [[int(random.integers(3, 290))] if random.random() < 0.4 else row for row in ids]


def test_a_stated_offset_without_tokenizer_and_evidence(tmp_path: Path) -> None:
    dead = read_evaluation(files.student(tmp_path / "e.json", [[300, 301, 302]] * files.RECORDINGS, shift=-1))
    assert [f.severity for f in tokens.offset_without_tokenizer(dead)] == ["warn"]
    assert [f.severity for f in tokens.offset_without_tokenizer(dead, explained=True)] == ["note"]
    unshifted = read_evaluation(files.student(tmp_path / "u.json", [[300, 301, 302]] * files.RECORDINGS))
    assert tokens.offset_without_tokenizer(unshifted) == []


def test_texts_of_another_tokenizer_of_the_same_size(tmp_path: Path) -> None:
    other, own = other_tokenizer(), files.tokenizer()
    path = files.student(tmp_path / "e.json", files.outputs(51))
    data = json.loads(path.read_text())
    for row in data["predictions"]:
        row["prediction_text"] = other.decode(row["prediction_tokens"])
    e = read_evaluation(files.write(path, data))
    both = read_with(e, {"own": own, "other": other})
    assert [r.tokenizer for r in (writer(both), preferred(both)) if r] == ["other", "own"]
    assert tokens.token_offset(e, both) == []
    for readings, writer_named in ((both, "other"), (read_with(e, {"own": own}), "another tokenizer")):
        (found,) = tokens.tokenizer_mismatch(e, readings)
        assert (found.check, found.severity) == ("tokenizer-mismatch", "refuse")
        assert found.evidence["recomputed_wra"] == pytest.approx(20.0)
        assert writer_named in found.what


def test_a_tokenizer_that_is_not_this_evaluations(tmp_path: Path) -> None:
    e = read_evaluation(files.student(tmp_path / "e.json", files.outputs(51)))
    readings = read_with(e, {"other": other_tokenizer()})
    (found,) = tokens.tokenizer_mismatch(e, readings)
    assert found.severity == "warn"
    assert [r.texts for r in [preferred(readings)] if r] == [e.texts]  # not what the wrong tokenizer makes of the ids
    assert tokens.tokenizer_mismatch(e, read_with(e, {"own": files.tokenizer(), "other": other_tokenizer()})) == []


def test_tokenizers_of_one_size() -> None:
    a, b = (Tokenizer.train(words, "char", 64, "upper") for words in (["AB", "CD"], ["AB", "CE"]))
    (found,) = tokens.tokenizers_differ({"a": a, "b": b})
    assert (found.check, found.severity, found.evidence["ids_that_differ"]) == ("tokenizer-mismatch", "warn", 1)
    same = Tokenizer.from_bytes(a.model_bytes, "upper")
    longer = Tokenizer.train(["ABCDEF"], "char", 64, "upper")
    assert tokens.tokenizers_differ({"a": a, "same": same, "longer": longer}) == []


def test_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    ids = files.outputs(51)
    ids[5] = [9999]
    e = read_evaluation(files.student(tmp_path / "e.json", ids))
    (found,) = tokens.special_ids(e, "t", files.tokenizer())
    assert (found.severity, found.evidence["outside"], found.evidence["example"]) == ("refuse", 1, 9999)
    healthy = read_evaluation(files.student(tmp_path / "h.json", files.outputs(51)))
    assert tokens.special_ids(healthy, "t", files.tokenizer()) == []


def test_special_ids_left_in_outputs(tmp_path: Path) -> None:
    ids = [[*row, 2] for row in files.outputs(51)]
    e = read_evaluation(files.student(tmp_path / "e.json", ids))
    (found,) = tokens.special_ids(e, "t", files.tokenizer())
    assert (found.severity, found.evidence["</s>"]) == ("note", files.RECORDINGS)
    few = read_evaluation(files.student(tmp_path / "f.json", [*ids[:3], *files.outputs(51)[3:]]))
    assert tokens.special_ids(few, "t", files.tokenizer()) == []


def test_a_model_file_that_leaves_the_blank_open() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["AB CD"]), model_writer=model, model_type="char", vocab_size=20, minloglevel=3,
        hard_vocab_limit=False, unk_id=3, bos_id=1, eos_id=2, pad_id=0,
    )  # fmt: skip
    (found,) = tokens.model_file(model.getvalue(), "t.model")
    assert (found.check, found.severity, found.subject) == ("special-ids", "warn", "t.model")
    assert "unk 3, blank 0, bos 1, eos 2" in found.what
    assert tokens.model_file(files.tokenizer().model_bytes, "t.model") == []
    nemo = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["AB CD"]), model_writer=nemo, model_type="char", vocab_size=20, minloglevel=3,
        hard_vocab_limit=False, bos_id=-1, eos_id=-1,
    )  # fmt: skip
    assert tokens.model_file(nemo.getvalue(), "t.model") == []
    (refused,) = tokens.model_file(b"PK\x03\x04", "t.ckpt")
    assert (refused.severity, "zip archive" in refused.what) == ("refuse", True)


def test_prompts_that_cannot_be_written() -> None:
    tokenizer = Tokenizer.train(["AB", "BA"], "char", 64, "upper")
    references = ["AB", "BA", "A-B", "AB"]
    (found,) = tokens.unreachable_prompts(references, "t", tokenizer, "corpus")
    assert (found.check, found.severity) == ("unreachable-prompts", "refuse")
    assert (found.evidence["unwritable"], found.evidence["ceiling_percent"]) == (1, 75.0)
    assert "upper_no_punctuation" in found.remedy
    assert tokens.unreachable_prompts(["AB", "BA"], "t", tokenizer, "corpus") == []


def test_prompts_beyond_the_greatest_length() -> None:
    tokenizer = Tokenizer.train(["A", "ABBA"], "char", 64, "upper")
    references = ["A"] * 99 + ["ABBA"]
    (found,) = tokens.unreachable_prompts(references, "t", tokenizer, "e", max_length=2)
    assert (found.severity, found.evidence["too_long"], found.evidence["ceiling_percent"]) == ("warn", 1, 99.0)
    assert tokens.unreachable_prompts(references, "t", tokenizer, "e", max_length=4) == []


def test_a_lower_case_tokenizer_is_no_fault() -> None:
    lower = Tokenizer.from_bytes(Tokenizer.train(["ab", "ba"], "char", 64, "lower").model_bytes, "upper")
    assert tokens.unreachable_prompts(["AB", "BA"], "t", lower, "corpus") == []


def limited(evaluation: Evaluation) -> list[Finding]:
    tokenizer = files.tokenizer()
    references = [item.reference for item in evaluation.items]
    reading = preferred(read_with(evaluation, {"t": tokenizer}))
    cap = tokens.visible_cap(evaluation, tokenizer)
    return tokens.unreachable_prompts(references, "t", tokenizer, "e", max_length=cap, reading=reading)


def test_a_limit_of_the_decoding_shows_and_costs(tmp_path: Path) -> None:
    (found,) = limited(read_evaluation(files.student(tmp_path / "e.json", [row[:1] for row in files.outputs(200)])))
    assert (found.severity, found.evidence["max_length"], found.evidence["too_long"]) == ("refuse", 1, 77)
    assert found.evidence["ceiling_percent"] == pytest.approx(100 * 178 / 255, abs=0.01)
    assert 15 < found.points <= 100 * 77 / 255
    assert limited(read_evaluation(files.student(tmp_path / "h.json", files.outputs(100)))) == []


def test_short_outputs_of_a_poor_recogniser_are_only_noted(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    short = [[int(i)] for i in random.integers(3, 290, files.RECORDINGS)]
    (found,) = limited(read_evaluation(files.student(tmp_path / "e.json", short)))
    assert (found.severity, found.evidence["max_length"]) == ("note", 1)
    assert found.points < 1.0


def test_normaliser_mismatch() -> None:
    rows = [(f"r{i}", "X-RAY" if i < 30 else "YES", "XRAY" if i < 30 else "YES") for i in range(100)]
    e = files.evaluation(rows)
    (found,) = tokens.normaliser_mismatch(e, stored(e))
    assert (found.check, found.severity, found.points) == ("normaliser-mismatch", "refuse", 30.0)
    assert found.evidence["wra_by_normaliser"]["upper_no_punctuation"] == 100.0
    few = files.evaluation([*rows[:3], *rows[30:]])
    assert [f.severity for f in tokens.normaliser_mismatch(few, stored(few))] == ["note"]  # 3 takes prove nothing
    healthy = files.evaluation(rows[30:])
    assert tokens.normaliser_mismatch(healthy, stored(healthy)) == []


def test_case_counts_only_where_the_report_counted_it() -> None:
    rows = [(f"r{i}", "YES", "yes") for i in range(50)]
    for reported, found in ((100.0, []), (0.0, ["refuse"])):
        e = files.evaluation(rows, {"wra": reported})
        assert [f.severity for f in tokens.normaliser_mismatch(e, stored(e))] == found


def test_an_offset_is_not_taken_for_a_matter_of_case(tmp_path: Path) -> None:
    """Reported 0 % is what lower-case references would give as well, but it is the shift's doing."""
    path = files.student(tmp_path / "e.json", files.outputs(51), shift=-1, wra={"value": 0.0})
    data = json.loads(path.read_text())
    for row in data["predictions"]:
        row["target"] = row["target"].lower()
    e = read_evaluation(files.write(path, data))
    readings = read_with(e, {"t": files.tokenizer()})
    (found,) = tokens.token_offset(e, readings)
    assert found.evidence["recomputed_wra"] == 20.0
    believed = preferred(readings)
    assert believed is not None
    assert tokens.normaliser_mismatch(e, believed) == []


def stored(evaluation: Evaluation) -> Reading:
    reading = as_stored(evaluation)
    assert reading is not None
    return reading
