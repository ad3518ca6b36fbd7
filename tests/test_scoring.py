from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from xded.errors import ScoringError
from xded.report.tables import confusion_table, score_table
from xded.scoring import (
    Prediction,
    Scores,
    compare,
    read_predictions,
    score,
    write_predictions,
)
from xded.tokenizer import Tokenizer

REFERENCE = Path(__file__).parents[1] / "../shared/reference"
CONDITIONS = {"speakers": "unseen", "words": "seen", "word_list": "open", "decode": "ctc greedy"}


def said(reference: str, hypothesis: str, take: str, **changes: object) -> Prediction:
    prediction = Prediction(take, take, "S1", "low", "D", reference, reference, hypothesis, (3, 4))
    return dataclasses.replace(prediction, **changes)


def scored(*predictions: Prediction, **options: object) -> Scores:
    return score(predictions, **{"normaliser": "upper", "conditions": CONDITIONS, **options})


def study(name: str) -> list[Prediction]:
    """Stored outputs of the reference study: 7 microphones of each take, `M08_B3_CW95_M2`."""
    if not (REFERENCE / "predictions").is_dir():
        pytest.skip("../shared/reference is absent")
    tokenizer = Tokenizer.load(REFERENCE / "tokenizer.model", "upper")
    predictions = []
    for row in json.loads((REFERENCE / "predictions" / name).read_text())["predictions"]:
        speaker, block, word, _ = row["utterance_id"].split("_")
        kind = "L" if word.startswith("L") else word.rstrip("0123456789")
        text = tokenizer.decode(row["prediction_tokens"])
        take, tokens = f"{speaker}_{block}_{word}", tuple(row["prediction_tokens"])
        predictions.append(
            Prediction(row["utterance_id"], take, speaker, "high", kind, word, row["target"], text, tokens)
        )
    return predictions


def test_wra_needs_the_whole_hypothesis() -> None:
    """The study counted the first word only: "yes yes yes" was right."""
    s = scored(said("YES", "yes yes yes", "1"), said("NO", " no ", "2"), said("X-RAY", "XRAY", "3"), said("A", "", "4"))
    assert s.overall.wra_percent.value == 25.0
    assert scored(said("X-RAY", "XRAY", "3"), normaliser="upper_no_punctuation").overall.wra_percent.value == 100.0


def test_error_rates_of_empty_long_and_one_letter_words() -> None:
    s = scored(said("A", "", "1"), said("I", "I", "2"), said("COME ON", "COME", "3"), said("GO", "GO GO", "4")).overall
    assert s.wer_percent.value == pytest.approx(100 * 3 / 5)  # A deleted, ON deleted, GO inserted
    assert s.cer_percent.value == pytest.approx(100 * (1 + 0 + 3 + 3) / (1 + 1 + 7 + 2))
    assert (s.empty_percent.value, s.words_per_output.value, s.distinct_outputs) == (25.0, 1.0, 4)
    assert scored(said("A", "", "1")).overall.wer_percent.value == 100.0
    assert scored(said("A", "B C", "1")).overall.wer_percent.value == 200.0


def test_share_of_listed_outputs() -> None:
    rows = (said("A", "b", "1"), said("A", "a b", "2"), said("A", "c", "3"), said("A", "", "4"))
    listed = scored(*rows, word_list=["A", "B", "-"]).overall.listed_percent
    assert listed is not None
    assert listed.value == 25.0
    assert scored(*rows).overall.listed_percent is None


def test_confusions_count_takes_before_predictions() -> None:
    rows = [said("A", "B", "1", recording=f"1_{mic}") for mic in range(5)]
    rows += [said("A", "C", "2"), said("A", "C", "3"), said("A", "A", "4")]
    got = [(c.reference, c.hypothesis, c.takes, c.predictions) for c in scored(*rows).overall.confusions]
    assert got == [("A", "C", 2, 2), ("A", "B", 1, 5)]


def test_groups_hold_their_own_predictions() -> None:
    s = scored(
        said("A", "A", "1", speaker="S2", band="high", word_type=None),
        said("A", "B", "2", speaker="S1", band="very_low"),
        said("A", "A", "3", speaker="S1", band="very_low"),
    )
    assert {k: v.wra_percent.value for k, v in s.by_speaker.items()} == {"S1": 50.0, "S2": 100.0}
    assert list(s.by_band) == ["very_low", "high"]
    assert {k: v.takes for k, v in s.by_word_type.items()} == {"D": 2, "none": 1}
    assert s.speaker_mean_wra_percent.value == 75.0
    assert scored(said("A", "A", "1", band=None)).by_band == {}


def test_one_take_or_one_speaker_gives_no_interval() -> None:
    s = scored(said("A", "A", "1"), said("A", "A", "1", recording="1b"))
    assert (s.overall.recordings, s.overall.takes) == (2, 1)
    assert s.overall.wra_percent.low is None
    assert s.speaker_mean_wra_percent.high is None


def test_no_resamples_give_numbers_without_intervals() -> None:
    s = scored(*(said("A", "A", str(i), speaker=f"S{i % 2}") for i in range(9)), resamples=0)
    assert (s.overall.wra_percent.value, s.overall.wra_percent.low) == (100.0, None)
    assert s.speaker_mean_wra_percent.high is None


def test_copies_and_seeds_of_a_take_do_not_narrow_the_interval() -> None:
    takes = [said("A", "A" if i % 3 else "B", str(i)) for i in range(60)]
    copies = [
        dataclasses.replace(p, recording=f"{p.recording}_{m}", seed=s) for p in takes for m in range(7) for s in (0, 1)
    ]
    one, many = scored(*takes).overall, scored(*copies).overall
    assert many.wra_percent == one.wra_percent
    assert (many.predictions, many.recordings, many.takes) == (840, 420, 60)


def test_interval_agrees_with_the_binomial_and_is_seeded() -> None:
    takes = [said("A", "A" if i < 160 else "B", str(i)) for i in range(200)]
    wra = scored(*takes).overall.wra_percent
    half_width = 100 * 1.96 * np.sqrt(0.8 * 0.2 / 200)
    assert wra.value == 80.0
    assert wra.low == pytest.approx(80 - half_width, abs=1)
    assert wra.high == pytest.approx(80 + half_width, abs=1)
    assert scored(*takes) == scored(*takes)
    assert scored(*takes[::-1]).overall.wra_percent == wra
    assert scored(*takes, seed=1, resamples=100).overall.wra_percent != wra


def test_mean_over_speakers_resamples_speakers_too() -> None:
    rows = [said("A", "A" if s % 2 else "B", f"{s}_{t}", speaker=f"S{s}") for s in range(10) for t in range(50)]
    s = scored(*rows)
    mean = s.speaker_mean_wra_percent
    assert mean.value == s.overall.wra_percent.value == 50.0
    assert mean.high is not None
    assert mean.low is not None
    assert mean.high - mean.low > 50  # ten speakers at 0 or 100: standard error 16
    overall = s.overall.wra_percent
    assert overall.high is not None
    assert overall.low is not None
    assert overall.high - overall.low < 10


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "no predictions"),
        ([said("A", "A", "1")] * 2, {}, "Recording '1' has two predictions of seed 0"),
        ([said("A", "A", "1"), said("A", "A", "1", recording="2", speaker="S2")], {}, "'S1' and 'S2'"),
        ([said("-", "A", "1")], {"normaliser": "upper_no_punctuation"}, "nothing is left of its reference '-'"),
        ([said("A", "A", "1")], {"conditions": {**CONDITIONS, "speakers": "new"}}, "'speakers'.*'new'.*unseen"),
        ([said("A", "A", "1")], {"conditions": {"speakers": "seen"}}, "'words'.*None"),
    ],
)
def test_what_cannot_be_scored_is_refused(rows: list[Prediction], options: dict[str, object], message: str) -> None:
    with pytest.raises(ScoringError, match=message):
        scored(*rows, **options)


def test_predictions_come_back_from_the_file(tmp_path: Path) -> None:
    rows = [said("É ‘x’", "", "1", band=None, tokens=()), said("A", "B\n", "2", seed=3)]
    write_predictions(tmp_path / "predictions.jsonl", rows)
    assert read_predictions(tmp_path / "predictions.jsonl") == rows
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.jsonl"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"tokens":[3,4]', '"tokens":["x"]', r"line 2: 'tokens\.0'"),
        ('"reference":', '"refrence":', "line 2: 'reference': Field required"),
        ('"seed":0}', '"seed":0', "line 2: Invalid JSON"),
        ('"seed":0}', '"seed":0,"score":1}', "line 2: 'score': Unexpected"),
    ],
)
def test_a_damaged_prediction_is_named_by_its_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, [said("A", "A", "1"), said("A", "A", "2")])
    first, second = path.read_text().splitlines()
    assert old in second
    path.write_text(first + "\n" + second.replace(old, new) + "\n")
    with pytest.raises(ScoringError, match=message):
        read_predictions(path)
    with pytest.raises(ScoringError, match=r"absent\.jsonl cannot be read"):
        read_predictions(tmp_path / "absent.jsonl")


def test_scores_come_back_from_json_and_damage_is_named() -> None:
    rows = [said("A", "A" if i % 2 else "", str(i), speaker=f"S{i % 3}") for i in range(12)]
    s = scored(*rows, word_list=["A"], conditions={**CONDITIONS, "fold": "M08"})
    assert Scores.from_json(s.to_json()) == s
    with pytest.raises(ScoringError, match=r"old\.json holds no scores: 'overall'"):
        Scores.from_json(s.to_json().replace('"overall"', '"all"'), "old.json")


def test_every_view_states_its_conditions() -> None:
    rows = [said("A", "A" if i % 2 else "[/b]", str(i), speaker=f"S{i % 3}") for i in range(12)]
    s = scored(*rows, word_list=["A"], conditions={**CONDITIONS, "fold": "M08"})
    stated = (
        "speakers unseen, words seen, open word list, decode ctc greedy, normaliser upper, 12 takes, 12 recordings, "
        "1 seed, fold M08"
    )
    assert s.statement == stated
    for view in (score_table(s), confusion_table(s)):
        output = io.StringIO()
        Console(file=output, width=300).print(view)
        assert stated in " ".join(output.getvalue().split())
    output = io.StringIO()
    Console(file=output, width=80).print(score_table(s))
    assert f"50.0 [{s.overall.wra_percent.low:.1f}, {s.overall.wra_percent.high:.1f}]" in output.getvalue()  # not cut


def test_compare_is_paired_and_antisymmetric() -> None:
    """Two models that agree on most takes differ clearly although their own intervals overlap."""
    a = scored(*(said("A", "A" if i < 120 else "B", str(i)) for i in range(200)))
    b = scored(*(said("A", "A" if i < 108 else "B", str(i)) for i in range(200)))
    forth, back = compare(a, b), compare(b, a)
    assert (forth.a_wra_percent, forth.b_wra_percent) == (60.0, 54.0)
    assert forth.difference_points.value == pytest.approx(6.0)
    assert forth.difference_points.low is not None
    assert forth.difference_points.low > 2
    assert forth.p_value < 0.002  # exact: 2 * 2 ** -12
    assert back.difference_points.value == pytest.approx(-6.0)
    assert compare(a, a).p_value == 1.0
    assert compare(a, a).difference_points.value == 0.0


def test_p_value_agrees_with_the_exact_sign_test() -> None:
    a = scored(*(said("A", "A" if i < 5 else "B", str(i)) for i in range(6)))
    b = scored(*(said("A", "A" if i == 5 else "B", str(i)) for i in range(6)))
    assert compare(a, b).p_value == pytest.approx(2 * (1 + 6) / 2**6, abs=0.02)  # |5 - 1| or more of 6 signs


def test_p_value_does_not_count_copies_as_evidence() -> None:
    def copies(right: int) -> Scores:
        return scored(
            *(said("A", "A" if t < right else "B", str(t), recording=f"{t}_{m}") for t in range(9) for m in range(7))
        )

    assert compare(copies(7), copies(4)).p_value == pytest.approx(2 / 2**3, abs=0.02)


def test_compare_refuses_other_takes_and_names_other_conditions() -> None:
    a, b = scored(said("A", "A", "1")), scored(said("A", "A", "2"))
    with pytest.raises(ScoringError, match="2 are only in one of them, such as '1'"):
        compare(a, b)
    with pytest.raises(ScoringError, match="normalisers 'upper' and 'lower'"):
        compare(a, scored(said("A", "A", "1"), normaliser="lower"))
    other = scored(said("A", "A", "1"), conditions={**CONDITIONS, "decode": "decoder beam 8"})
    assert compare(a, other).differing == ("decode: ctc greedy / decoder beam 8",)


def test_study_predictions_give_the_true_numbers_and_clustered_intervals() -> None:
    predictions = study("eval_M08_nemo_hybrid_subset_decoder.json")
    words = [p.reference for p in predictions]
    s = scored(*predictions, word_list=words)
    assert (s.overall.recordings, s.overall.takes, s.overall.distinct_outputs) == (1785, 255, 235)
    wra, listed = s.overall.wra_percent, s.overall.listed_percent
    assert round(wra.value, 2) == 80.62
    assert listed is not None
    assert round(listed.value, 1) == 98.0
    assert round(s.overall.wer_percent.value, 1) == 19.4
    assert {k: round(v.wra_percent.value, 1) for k, v in s.by_word_type.items()} == {
        "C": 84.2, "CW": 76.1, "D": 81.4, "L": 95.6, "UW": 80.4,
    }  # fmt: skip
    assert wra.low == pytest.approx(76, abs=0.7)
    assert wra.high == pytest.approx(85, abs=0.7)
    unclustered = scored(*(dataclasses.replace(p, take=p.recording) for p in predictions)).overall.wra_percent
    assert unclustered.high is not None
    assert unclustered.high - unclustered.value == pytest.approx(1.85, abs=0.2)


def test_study_predictions_compare() -> None:
    a, b = (scored(*study(f"eval_M08_nemo_{n}decoder.json")) for n in ("hybrid_subset_", ""))
    assert round(b.overall.wra_percent.value, 2) == 18.54
    comparison = compare(a, b)
    assert comparison.difference_points.value == pytest.approx(62.07, abs=0.01)
    assert comparison.p_value == pytest.approx(1 / 10_001)


def test_24_000_predictions_take_about_a_second() -> None:
    rng = np.random.default_rng(0)
    words = [f"WORD{i}" for i in range(255)]
    rows = []
    for take in range(3400):
        reference = words[take % 255]
        for mic in range(7):
            heard = words[rng.integers(255)] if rng.random() < 0.4 else reference
            changes = {"speaker": f"S{take % 15}", "recording": f"{take}_{mic}", "word_type": f"T{take % 5}"}
            rows.append(said(reference, heard, str(take), **changes))
    start = time.process_time()
    s = scored(*rows, word_list=words)
    assert time.process_time() - start < 3.0  # about 0.7 s; a plain bootstrap of every group takes 20
    assert compare(s, s).p_value == 1.0


def test_scoring_does_not_import_torch() -> None:
    code = "import sys, xded.scoring; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
