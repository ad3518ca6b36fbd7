"""The study's evaluations, real ones and twins of those that lie elsewhere: the right diagnosis stands first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import evaluation_files as files
from xded.corpus.manifest import Corpus, Recording
from xded.doctor.given import Given
from xded.doctor.results import examine
from xded.doctor.run_folder import RunFolder
from xded.errors import XdedError
from xded.evaluations import read_evaluation
from xded.findings import Examination, Finding
from xded.scoring import score, write_predictions
from xded.tokenizer import Tokenizer

CONDITIONS = {"speakers": "unseen", "words": "seen", "word_list": "open", "decode": "ctc greedy"}
REAL = {
    "eval_M05_nemo_hybrid_decoder": (0.06, 17.70),
    "eval_M08_debug": (0.0, 20.56),
    "eval_M08_nemo_decoder": (0.0, 18.54),
    "eval_M08_nemo_hybrid_subset_decoder": (0.0, 80.62),
}
DEAD = {
    "eval_M08_nemo_ctc_final": "collapse",
    "eval_results_M05_decKD_len1": "collapse",
    "eval_results_M08_decKD_len1_afterfix": "collapse",
}


def doctor(*paths: Path, tokenizer: Tokenizer | None = None, given: Given | None = None) -> Examination:
    given = given or Given()
    given.evaluations += [read_evaluation(path) for path in paths]
    if tokenizer is not None:
        given.tokenizers[Path("tokenizer.model")] = tokenizer
    examination = Examination()
    examine(examination, given)
    return examination


def of(examination: Examination, check: str) -> list[Finding]:
    return [finding for finding in examination.findings if finding.check == check]


def serious(examination: Examination) -> list[str]:
    return [finding.check for finding in examination.at_least("warn")]


@pytest.fixture(scope="session")
def study(shared: Path) -> Path:
    return shared / "reference"


@pytest.fixture(scope="session")
def study_tokenizer(study: Path) -> Tokenizer:
    return Tokenizer.load(study / "tokenizer.model", "upper")


@pytest.mark.parametrize("name", REAL)
def test_real_files_with_an_offset(study: Path, study_tokenizer: Tokenizer, name: str) -> None:
    reported, recomputed = REAL[name]
    first, *others = doctor(study / f"predictions/{name}.json", tokenizer=study_tokenizer).findings
    assert (first.check, first.severity) == ("token-offset", "refuse")
    assert first.evidence["reported_wra"] == pytest.approx(reported, abs=0.01)
    assert first.evidence["recomputed_wra"] == recomputed
    assert first.evidence["recomputed_first_word"] == recomputed
    assert f"{recomputed:.2f} %" in first.what
    assert {finding.severity for finding in others} == {"note"}


@pytest.mark.parametrize("name", REAL)
def test_real_files_reveal_their_offset_without_a_tokenizer(study: Path, name: str) -> None:
    examination = doctor(study / f"predictions/{name}.json")
    first = examination.findings[0]
    assert (first.check, first.severity, first.evidence["stored_shift"]) == ("token-offset", "refuse", -1)
    assert 0 < first.evidence["recomputed_wra_at_least"] <= REAL[name][1]
    assert "give its .model file" in examination.unchecked[0].why


@pytest.mark.parametrize("name", DEAD)
def test_real_files_that_are_dead(study: Path, study_tokenizer: Tokenizer, name: str) -> None:
    examination = doctor(study / f"predictions/{name}.json", tokenizer=study_tokenizer)
    first = examination.findings[0]
    assert (first.check, first.severity) == (DEAD[name], "refuse")
    assert {finding.severity for finding in of(examination, "token-offset")} == ({"note"} if "nemo" in name else set())
    if "len1" in name:
        (ceiling,) = of(examination, "unreachable-prompts")
        assert ceiling.evidence["too_long"] == 110
        assert ceiling.evidence["ceiling_percent"] == pytest.approx(56.9, abs=0.05)


def test_real_zero_shot(study: Path, study_tokenizer: Tokenizer) -> None:
    examination = doctor(study / "predictions/eval_nemo_pretrained_M08.json", tokenizer=study_tokenizer)
    (first,) = examination.at_least("warn")
    assert (first.check, first.severity) == ("other-rule", "warn")
    assert first.evidence["reported"] == pytest.approx(41.68, abs=0.01)
    assert first.evidence["wra"] == 39.05


def test_the_same_checkpoint_through_its_other_head_is_a_proof(study: Path, study_tokenizer: Tokenizer) -> None:
    paths = [study / f"predictions/eval_M08_nemo_{name}.json" for name in ("ctc", "decoder")]
    examination = doctor(*paths, tokenizer=study_tokenizer)
    untrained, *others = [f for f in examination.findings if f.subject.endswith("eval_M08_nemo_ctc.json")]
    assert (untrained.check, untrained.severity) == ("untrained-head", "refuse")
    assert "1781 distinct outputs for 1785 recordings" in untrained.what
    assert "18.54 % in" in untrained.what
    assert [(f.check, f.severity) for f in others[:2]] == [("over-generation", "warn"), ("token-offset", "note")]
    (copies,) = of(examination, "copies-as-takes")
    assert (copies.severity, copies.subject) == ("note", "2 files")
    assert not of(examination, "same-file")
    assert not of(examination, "wrong-speaker")


@pytest.mark.parametrize("speaker", ["M05", "M08"])
def test_real_cross_tests_are_healthy(study: Path, speaker: str) -> None:
    examination = doctor(*sorted((study / f"crosstest/{speaker}").iterdir())[::4])
    assert serious(examination) == []
    assert examination.unchecked == []


# --- twins ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("speaker", "mics", "takes"),
    [("M01", 3, 7), ("M01", 3, 13), ("M16", 6, 40), ("M08", 7, 205)],
)
def test_offset_twins(tmp_path: Path, speaker: str, mics: int, takes: int) -> None:
    """From 2.75 % (7 of 255 takes) to 80 %, all reported as (nearly) nothing."""
    ids = files.outputs(takes, mics=mics, seed=takes)
    path = files.student(tmp_path / f"eval_{speaker}.json", ids, shift=-1, speaker=speaker, mics=mics)
    examination = doctor(path, tokenizer=files.tokenizer())
    assert serious(examination) == ["token-offset"]
    first = examination.findings[0]
    assert (first.severity, first.evidence["recomputed_wra"]) == ("refuse", pytest.approx(100 * takes / 255, abs=0.01))


def test_rare_hits_spread_over_takes_and_microphones(tmp_path: Path) -> None:
    """2.75 % of 765 recordings where one microphone of three is right at most, outputs of any length."""
    random = np.random.default_rng(3)
    ids = files.outputs(0, mics=3)
    for place in random.permutation(255)[:21]:
        ids[3 * place + int(random.integers(3))] = files.ids_of(files.words()[place])
    path = files.student(tmp_path / "eval_M01.json", ids, shift=-1, speaker="M01", mics=3)
    first = doctor(path, tokenizer=files.tokenizer()).findings[0]
    assert (first.check, first.severity, first.evidence["recomputed_wra"]) == ("token-offset", "refuse", 2.75)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("distinct", [2, 15, 45])
def test_collapsed_twins(tmp_path: Path, offset: int, distinct: int) -> None:
    random = np.random.default_rng(distinct)
    said = [files.ids_of(word) for word in files.words()[:distinct]]
    ids = [said[i] for i in random.integers(distinct, size=files.RECORDINGS)]
    path = files.student(tmp_path / "eval_M08.json", ids, shift=-offset)
    examination = doctor(path, tokenizer=files.tokenizer())
    assert examination.findings[0].check == "collapse"
    assert [f.severity for f in of(examination, "token-offset")] == (["note"] if offset else [])


def babble(words: tuple[int, int], seed: int = 0) -> list[list[int]]:
    """CTC of a student that was never taught the words: several of the list's, hundreds of distinct outputs."""
    random = np.random.default_rng(seed)
    listed = np.array(files.words())
    return [files.ids_of(" ".join(random.choice(listed, random.integers(*words)))) for _ in range(files.RECORDINGS)]


@pytest.mark.parametrize(
    ("shift", "changes"), [(-1, {}), (-1, {"wra": None}), (0, {"tokenizer": None, "wra": {"value": None}})]
)
def test_long_outputs(tmp_path: Path, shift: int, changes: dict[str, Any]) -> None:
    path = files.student(tmp_path / "eval_M08.json", babble((2, 7)), shift=shift, **changes)
    examination = doctor(path, tokenizer=files.tokenizer())
    assert examination.findings[0].check == "over-generation"
    assert "over-generation" in serious(examination)
    assert {f.severity for f in of(examination, "token-offset")} <= {"note"}


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_no_tokenizer_in_the_file_and_no_texts(tmp_path: Path, with_tokenizer: bool) -> None:
    random = np.random.default_rng(0)
    ids = [random.integers(3, 5000, size=random.integers(12, 30)).tolist() for _ in range(files.RECORDINGS)]
    path = files.student(tmp_path / "eval_M08.json", [[]] * files.RECORDINGS, tokenizer=None, wra=None)
    data = json.loads(path.read_text())
    for row, tokens in zip(data["predictions"], ids, strict=True):
        row["prediction_tokens"], row["prediction_text"] = tokens, " ".join(map(str, tokens))
    examination = doctor(files.write(path, data), tokenizer=files.tokenizer() if with_tokenizer else None)
    checks = [finding.check for finding in examination.findings]
    assert checks[0] in ("special-ids", "untrained-head")
    assert "untrained-head" in checks[:2]
    assert "blank-only" not in checks


@pytest.mark.parametrize(("words", "speaker"), [(20, "M08"), (64, "M01")])
def test_averaged_weights(tmp_path: Path, words: int, speaker: str) -> None:
    """Weights that were not loaded: dozens of strange words each, "accuracy" -2000 to -6500 %."""
    random = np.random.default_rng(words)
    strange = np.array([f"{a}{b}" for a in files.words()[:60] for b in files.words()[60:100]])
    texts = [" ".join(random.choice(strange, random.integers(words - 5, words + 5))) for _ in range(files.RECORDINGS)]
    path = files.averaged(tmp_path / "excluded" / f"HIGH_{speaker}_results.json", texts, speaker=speaker)
    first, second, *_ = doctor(path, tokenizer=files.tokenizer()).findings
    assert (first.check, first.severity) == ("untrained-head", "refuse")
    assert (second.check, second.severity) == ("out-of-range", "warn")
    assert "It is 100 - WER" in second.what


def test_everything_empty(tmp_path: Path) -> None:
    path = files.averaged(tmp_path / "test_F02_averaged_donorF03.json", [""] * files.RECORDINGS, speaker="F02")
    examination = doctor(path)
    assert serious(examination) == ["blank-only"]
    assert examination.findings[0].severity == "refuse"


@pytest.mark.parametrize("percent", [2.9, 12.0, 41.0])
def test_zero_shot_twins(tmp_path: Path, percent: float) -> None:
    """Lower case, no ids, several words now and then, a few silences: weak but sound."""
    random = np.random.default_rng(int(percent))
    rows = []
    for name, word in files.names("M08"):
        made_up = " ".join(random.choice(files.words(), random.integers(1, 3))).lower()
        text = word.lower() if random.random() < percent / 100 else made_up if random.random() < 0.95 else ""
        rows.append({"utterance_id": name, "target": word, "prediction": text})
    path = files.write(tmp_path / "eval_nemo_pretrained_M08.json", {"model": "m", "predictions": rows})
    assert serious(doctor(path, tokenizer=files.tokenizer())) == []


def test_mislabelled_cross_test_among_sound_ones(tmp_path: Path) -> None:
    def made(model: str, test: str, inside: str) -> Path:
        random = np.random.default_rng([int(name[1:]) for name in (model, test, inside)])
        rows = [
            (n, w, w if random.random() < 0.6 else str(random.choice(files.words()))) for n, w in files.names(inside)
        ]
        return files.report(tmp_path / f"{model} cross" / f"wer_{test}.txt", rows)

    wrong = made("M01", "M01", "F05")
    examination = doctor(wrong, made("M01", "F04", "F04"), made("M10", "F05", "F05"))
    (found,) = examination.at_least("warn")
    assert (found.check, found.subject) == ("wrong-speaker", str(wrong))
    assert found.evidence == {"named": "M01", "inside": "F05", "recordings": files.RECORDINGS}


def test_copies_of_a_result(tmp_path: Path) -> None:
    first = files.student(tmp_path / "eval_results_M08_epoch70.json", files.outputs(51))
    second = tmp_path / "eval_results_M08_epoch70_teacher.json"
    second.write_bytes(first.read_bytes())
    (found,) = doctor(first, second, tokenizer=files.tokenizer()).at_least("warn")
    assert (found.check, found.subject) == ("same-file", str(second))


# --- ours -----------------------------------------------------------------------------------------------------


def ours(folder: Path, outputs: Sequence[Sequence[int]], mics: int = 2) -> Path:
    folder.mkdir(parents=True)
    rows = [
        files.prediction(name, word, files.read_at(ids, 0), ids, take=name[:-3], speaker="M08")
        for (name, word), ids in zip(files.names("M08", mics), outputs, strict=True)
    ]
    write_predictions(folder / "predictions.jsonl", rows)
    (folder / "scores.json").write_text(score(rows, normaliser="upper", conditions=CONDITIONS).to_json())
    return folder / "predictions.jsonl"


@pytest.mark.parametrize("right", [0, 10, 130, 255])
def test_our_sound_evaluations(tmp_path: Path, right: int) -> None:
    path = ours(tmp_path / "M08", files.outputs(right, mics=2))
    examination = doctor(path, path.with_name("scores.json"), tokenizer=files.tokenizer())
    assert examination.findings == []
    assert {p.check for p in examination.passed} >= {"token-offset", "report-differs", "collapse", "copies-as-takes"}


def test_poor_outputs_of_a_run_that_learned_nothing_are_only_noted(tmp_path: Path) -> None:
    path = ours(tmp_path / "run", [[]] * 510)
    for wra, severity in ((0.01, "note"), (0.4, "refuse")):
        run = RunFolder(path.parent, rows=[{"event": "epoch", "wra": wra}])
        examination = doctor(path, given=Given(runs=[run]))
        assert [(f.check, f.severity) for f in examination.findings] == [("blank-only", severity)]


def test_a_corpus_says_whose_takes_they_are(tmp_path: Path) -> None:
    """Ids without speaker or take in them: only the corpus knows that the file is about anna, and what is a copy."""
    rows = [
        Recording(
            audio_filepath=tmp_path / f"{i}.wav", duration=1.0, text=word, recording=f"r{i}", speaker="anna",
            take=f"t{i // 3}", prompt=word,
        )
        for i, (_, word) in enumerate(files.names("M08"))
    ]  # fmt: skip
    corpus = Corpus(tmp_path / "manifest.jsonl", tuple(rows))
    ben = [row.model_copy(update={"recording": "b", "speaker": "ben"}) for row in rows[:1]]
    given = Given(corpora=[corpus, Corpus(tmp_path / "other.jsonl", tuple(ben))])
    predictions = [{"utterance_id": r.recording, "target": r.text, "prediction": r.text} for r in rows]
    path = files.write(tmp_path / "eval_ben.json", {"predictions": predictions})
    examination = doctor(path, given=given)
    assert serious(examination) == ["wrong-speaker"]
    assert of(examination, "wrong-speaker")[0].evidence["inside"] == "anna"
    (copies,) = of(examination, "copies-as-takes")
    assert (copies.evidence["recordings"], copies.evidence["takes"]) == (765, 255)


def test_tokenizer_and_corpus(tmp_path: Path) -> None:
    rows = [
        Recording(
            audio_filepath=tmp_path / "a.wav", duration=1.0, text=text, recording=text, speaker="s", take=text,
            prompt=text,
        )
        for text in ("AB", "A-B")
    ]  # fmt: skip
    corpus = Corpus(tmp_path / "manifest.jsonl", tuple(rows))
    for words, expected in ((["AB"], ["unreachable-prompts"]), (["A-B"], [])):
        given = Given(corpora=[corpus])
        assert serious(doctor(tokenizer=Tokenizer.train(words, "char", 64, "upper"), given=given)) == expected


def test_scores_alone(tmp_path: Path) -> None:
    path = ours(tmp_path / "run", files.outputs(50, mics=2))
    path.unlink()
    examination = doctor(path.with_name("scores.json"))
    assert examination.findings == []
    assert "no predictions.jsonl lies beside it" in examination.unchecked[0].why


def test_a_recording_twice_is_said_and_the_rest_is_checked(tmp_path: Path) -> None:
    path = files.student(tmp_path / "e.json", files.outputs(51), shift=-1)
    data = json.loads(path.read_text())
    data["predictions"].append(data["predictions"][0])
    examination = doctor(files.write(path, data), tokenizer=files.tokenizer())
    assert any("two predictions" in u.why for u in examination.unchecked)
    assert "wrong-speaker" in {p.check for p in examination.passed}


def test_errors_are_for_people(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(XdedError, match=r"expected predictions\.jsonl"):
        doctor(tmp_path / "x.json")
