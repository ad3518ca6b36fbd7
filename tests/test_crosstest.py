"""The cross-test of results from elsewhere and of our own teachers: numbers by hand, ties, gaps, bad files."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

import evaluation_files as files
from tiny_corpus import tiny_config, write_corpus
from xded.cli.crosstest import crosstest as command
from xded.errors import EXIT_FINDINGS, ScoringError
from xded.report.crosstest import rows_of
from xded.scoring import Prediction, write_predictions
from xded.teachers.adapt import teach
from xded.teachers.crosstest import effective_recordings, examine, over_takes, vote, wra
from xded.teachers.results import read_results, teacher_of

WORDS = ("ONE", "TWO", "THREE", "FOUR")
EPOCH = {"batch_size": 8, "threads": 1, "device": "cpu", "stages": [{"epochs": 1, "peak_lr": 1e-3}]}


def call(*arguments: object) -> Result:
    """`xded crosstest ARGUMENTS`; our errors come out as exceptions, as the main command catches them."""
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def said(speaker: str, *outputs: str, mics: int = 1) -> list[Prediction]:
    """Outputs for WORDS, one take a word, `mics` recordings of each."""
    return [
        files.prediction(f"{speaker}_{word}_{mic}", word, output, take=f"{speaker}_{word}", speaker=speaker)
        for word, output in zip(WORDS, outputs, strict=True)
        for mic in range(mics)
    ]


def pairs(speaker: str, *outputs: str, mics: int = 2) -> list[tuple[str, str, str]]:
    return [
        (f"{speaker}_B3_CW{i}_M{mic}", word, output)
        for i, (word, output) in enumerate(zip(WORDS, outputs, strict=True), start=1)
        for mic in range(2, 2 + mics)
    ]


# --- numbers ------------------------------------------------------------------------------------------------


def test_mean_best_vote_oracle_by_hand() -> None:
    three = {
        "a": said("x", "ONE", "two", "NO", ""),
        "b": said("x", "ONE", "NO", "NO", ""),
        "c": said("x", "NO", "ON", "THREE", "FOUR"),
    }
    (tested,), apart = examine(three, "upper")
    assert apart == []
    assert {name: s.overall.wra_percent.value for name, s in tested.scores.items()} == {"a": 50, "b": 25, "c": 50}
    assert tested.mean.value == pytest.approx(125 / 3)
    assert tested.best == "a"
    assert tested.oracle.value == 100
    v = tested.vote  # ONE right; TWO: three outputs tie, one of them right; NO beats THREE; nothing beats FOUR
    assert (v.shared.value, v.first_name.value) == (pytest.approx(100 * (1 + 1 / 3) / 4), 50)
    assert (v.worst.value, v.best.value, v.tied_percent) == (25, 50, 25)
    assert wra(vote(three), "upper").value == v.first_name.value


def test_order_of_teachers_changes_nothing_but_the_first_name() -> None:
    random = np.random.default_rng(0)
    outputs = {name: random.choice([*WORDS, ""], size=(5, 4)) for name in "abcde"}
    one, two = (
        {new: said("x", *outputs[old][0]) for new, old in zip("abcde", order, strict=True)}
        for order in ("abcde", "edcba")
    )
    (first,), (second,) = examine(one, "upper")[0], examine(two, "upper")[0]
    for number in ("mean", "oracle"):
        assert getattr(first, number) == getattr(second, number)
    for number in ("shared", "worst", "best", "tied_percent"):
        assert getattr(first.vote, number) == getattr(second.vote, number)
    assert first.vote.worst.value <= first.vote.shared.value <= first.vote.best.value
    assert first.vote.best.value <= first.oracle.value


def test_a_single_teacher_is_its_own_mean_vote_and_oracle() -> None:
    (tested,), _ = examine({"a": said("x", "ONE", "TWO", "NO", "NO")}, "upper")
    numbers = (tested.mean, tested.vote.shared, tested.vote.worst, tested.vote.best, tested.oracle)
    assert {n.value for n in numbers} == {50.0}
    assert tested.vote.tied_percent == 0


def test_a_speakers_own_teacher_has_scores_and_no_vote() -> None:
    rows = {"x": said("x", *WORDS), "y": said("x", "ONE", "NO", "NO", "NO"), "z": said("x", "ONE", "TWO", "NO", "NO")}
    (tested,), _ = examine(rows, "upper")
    assert tested.scores["x"].overall.wra_percent.value == 100
    assert (tested.best, tested.mean.value, tested.oracle.value) == ("z", 37.5, 50)


def test_copies_of_a_take_are_no_new_recordings() -> None:
    takes = [f"t{i}" for i in range(40) for _ in range(7)]
    together = np.repeat(np.arange(40) % 2, 7)
    assert effective_recordings(together, takes) == pytest.approx(40)
    alone = np.random.default_rng(0).random(280) < 0.5
    assert effective_recordings(alone, takes) > 200
    assert effective_recordings(np.ones(280), takes) == 40
    narrow, wide = over_takes(alone, [str(i) for i in range(280)]), over_takes(together, takes)
    assert wide.high is not None
    assert wide.low is not None
    assert narrow.high is not None
    assert narrow.low is not None
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    assert over_takes(np.array([1, 0]), ["t", "t"]).low is None


def test_intervals_agree_with_those_of_scores() -> None:
    random = np.random.default_rng(1)
    rows = [
        files.prediction(f"r{i}_{mic}", "ONE", "ONE" if right else "NO", take=f"r{i}", speaker="x")
        for i, right in enumerate(random.random(200) < 0.6)
        for mic in range(3)
    ]
    own = over_takes(np.array([p.hypothesis == "ONE" for p in rows], float), [p.take for p in rows])
    scored = wra(rows, "upper")
    assert own.value == pytest.approx(scored.value)
    assert (own.low, own.high) == (pytest.approx(scored.low, abs=1), pytest.approx(scored.high, abs=1))


def test_numbers_are_on_what_all_teachers_have() -> None:
    rows = {"a": said("x", *WORDS), "b": said("x", "ONE", "TWO", "NO", "NO")[:3], "c": said("y", *WORDS)}
    rows["b"][0] = files.prediction("x_ONE_0", "WON", "WON", take="x_ONE", speaker="x")
    x, y = examine(rows, "upper")[0]
    assert (x.recordings, x.takes, x.disputed, dict(x.lacking)) == (2, 2, ("x_ONE_0",), {"b": ("x_FOUR_0",)})
    assert (x.scores["a"].overall.wra_percent.value, x.scores["b"].overall.wra_percent.value) == (100, 50)
    assert set(y.scores) == {"c"}
    assert rows_of([x, y])[2][1][0] is None  # c was not tested on x
    rows["b"] = said("x", *WORDS)[3:]
    rows["a"] = said("x", *WORDS)[:3]
    tested, apart = examine(rows, "upper")
    assert ([t.speaker for t in tested], apart) == (["y"], ["x"])


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "speakers", "teacher"),
    [
        ("M08/teacher_F02.txt", ["M08"], "F02"),
        ("M08/teacher_M08.txt", ["M08"], "M08"),
        ("F02/wer_M08.txt", ["M08"], "F02"),
        ("wer_M08.txt", ["M08"], "M08"),
        ("F02.jsonl", ["M05", "M08"], "F02"),
        ("runs/F02/predictions.jsonl", ["M08"], "F02"),
        ("predictions.jsonl", ["M08"], "predictions"),
        ("F02/M08.predictions.jsonl", ["M08"], "F02"),
        ("eval_M08_debug.json", ["M08"], "eval_M08_debug"),
    ],
)
def test_teachers_are_named_by_file_or_folder(name: str, speakers: Sequence[str], teacher: str) -> None:
    assert teacher_of(Path("results") / name, Path("results"), speakers) == teacher


def write_reports(folder: Path) -> Path:
    files.report(folder / "M08" / "teacher_a.txt", pairs("M08", "ONE", "TWO", "NO", "NO"))
    files.report(folder / "M08" / "teacher_b.txt", pairs("M08", "ONE", "NO", "THREE", "NO"))
    files.report(folder / "M05" / "teacher_a.txt", pairs("M05", *WORDS))
    return folder


def test_reports_become_one_matrix(tmp_path: Path) -> None:
    result = call(write_reports(tmp_path / "in"), "--json", "--out", tmp_path / "out")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    m08 = data["speakers"]["M08"]
    assert (m08["takes"], m08["recordings"]) == (4, 8)  # two microphones
    assert m08["mean_teacher"]["value"] == 50
    assert "ties shared" in m08["vote"]["tie_rule"]
    assert m08["vote"]["tied_percent"] == 50
    assert json.loads((tmp_path / "out" / "crosstest.json").read_text()) == data
    rows = {row["teacher"]: row for row in csv.DictReader((tmp_path / "out" / "crosstest.csv").open())}
    assert (rows["a"]["M08"], rows["b"]["M05"], rows["vote"]["M08"]) == ("50.00", "", "50.00")
    assert float(rows["a"]["M08_low"]) < 50 < float(rows["a"]["M08_high"])
    assert "| any-teacher oracle | 100.0 [100.0-100.0] | 75.0" in (tmp_path / "out" / "crosstest.md").read_text()
    table = call(tmp_path / "in").output
    assert "ties shared" in " ".join(table.split())


def test_bad_files_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    folder = write_reports(tmp_path)
    short = files.report(folder / "M08" / "teacher_c.txt", pairs("M08", *WORDS))
    short.write_text("\n".join(short.read_text().splitlines()[:-5]))
    (folder / "M08" / "teacher_d.txt").write_text("")
    (folder / "M08" / "notes.md").write_text("not a result")
    files.report(folder / "again" / "teacher_a.txt", pairs("M08", *WORDS))
    files.student(folder / "ids.json", files.outputs(3), speaker="M08")
    data = json.loads((folder / "ids.json").read_text())
    files.write(
        folder / "ids.json", {**data, "predictions": [{**r, "prediction_text": ""} for r in data["predictions"]]}
    )
    result = call(folder, "--json")
    assert result.exit_code == EXIT_FINDINGS
    problems = json.loads(result.stdout)["problems"]
    assert len(problems) == 4
    everything = " ".join(problems)
    for reason in ("says it holds 8 outputs and holds 7", "teacher_d.txt is no evaluation", "--tokenizer", "of 'a'"):
        assert reason in everything
    assert set(json.loads(result.stdout)["speakers"]["M08"]["teachers"]) == {"a", "b"}


def test_gaps_are_counted_and_named(tmp_path: Path) -> None:
    files.report(tmp_path / "teacher_a.txt", pairs("M08", *WORDS))
    files.report(tmp_path / "teacher_b.txt", pairs("M08", *WORDS)[:6])
    result = call(tmp_path)
    assert result.exit_code == EXIT_FINDINGS
    assert "'b' lacks 2 recordings that other teachers have: M08_B3_CW4_M2, M08_B3_CW4_M3" in result.output


def test_our_own_predictions_and_token_ids(tmp_path: Path) -> None:
    (tmp_path / "F02").mkdir()
    (tmp_path / "F03").mkdir()
    rows = [files.prediction(n, w, w, take=n[:-3], speaker="M08") for n, w in files.names("M08")]
    write_predictions(tmp_path / "F02" / "predictions.jsonl", rows)
    (tmp_path / "F02" / "env.json").write_text("{}")  # of a run: no result, and nothing to complain about
    files.student(tmp_path / "F03" / "shifted.json", files.outputs(51), shift=-1)
    results = read_results(tmp_path, {"t": files.tokenizer()})
    assert (set(results.said), results.problems, results.undecoded) == ({"F02", "shifted"}, (), ())
    (tested,), _ = examine(results.said, "upper")
    assert tested.scores["shifted"].overall.wra_percent.value == pytest.approx(20)
    assert [path.name for path in read_results(tmp_path, {}).undecoded] == ["shifted.json"]


def test_folders_without_results_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ScoringError, match="does not exist"):
        call(tmp_path / "no")
    with pytest.raises(ScoringError, match="holds no evaluation"):
        call(tmp_path)
    (tmp_path / "a.txt").write_text("%WER 12.0 [ 1 / 8 ]\n")
    with pytest.raises(ScoringError, match=r"None of the 1 files .* holds no alignments"):
        call(tmp_path)


def test_the_reference_study(shared: Path) -> None:
    folder = shared / "reference" / "crosstest"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    results = read_results(folder, {})
    tested = {t.speaker: t for t in examine(results.said, "upper")[0]}
    expected: dict[str, Any] = {
        "M08": (77.38, 87.84, "F02", (87.6, 87.7), 97.65),
        "M05": (36.92, 47.90, "F03", (48.0, 49.6), 77.54),
    }
    for speaker, (mean, best, name, voted, oracle) in expected.items():
        t = tested[speaker]
        assert (t.recordings, t.takes, len(t.scores), t.best) == (1785, 255, 14, name)
        assert t.mean.value == pytest.approx(mean, abs=0.005)
        assert t.scores[name].overall.wra_percent.value == pytest.approx(best, abs=0.005)
        assert voted[0] <= t.vote.shared.value <= voted[1]
        assert t.vote.worst.value < voted[0] < voted[1] < t.vote.best.value
        assert t.oracle.value == pytest.approx(oracle, abs=0.005)
        assert 255 < t.effective_recordings[name] < 450
    assert tested["M08"].vote.shared.value == pytest.approx(87.70, abs=0.005)
    assert tested["M05"].vote.shared.value == pytest.approx(49.08, abs=0.005)


# --- our own teachers ---------------------------------------------------------------------------------------


def test_our_own_teachers(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", ("c1",), ("t1", "t2", "t3"))
    sections: dict[str, Any] = {"teach": {"parent": EPOCH, "teacher": EPOCH, "parent_on": "controls"}}
    teachers = teach(corpus, tiny_config(fold={"held_out": ("t3",)}, **sections), tmp_path / "teachers", quiet=True)
    result = call(teachers.folder, "--corpus", tmp_path / "corpus", "--json", "--jobs", "1")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert set(data["speakers"]["t3"]["teachers"]) == {"t1", "t2"}
    assert data["speakers"]["t3"]["takes"] == 8
    kept = json.loads(call(teachers.folder / "crosstest", "--json").stdout)  # the same, from the files it keeps
    assert kept["speakers"] == data["speakers"]
    shutil.copytree(teachers.teacher("t1"), teachers.teacher("t9"), ignore=shutil.ignore_patterns("*.pt*", "*.json"))
    result = call(teachers.folder, "--corpus", tmp_path / "corpus", "--jobs", "1")
    assert (result.exit_code, "Not finished and left out: t9" in result.output) == (EXIT_FINDINGS, True)
