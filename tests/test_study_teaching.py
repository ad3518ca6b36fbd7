"""What students of a study start from and listen to: withheld recordings, averaged and larger teachers, rehearsal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_corpus import MODEL, write_corpus
from tiny_study import CONFIG, CTC_KD, TRAIN, run_tiny, tiny_study
from xded.config import SIZES
from xded.corpus.manifest import Corpus, read_corpus, write_manifest
from xded.errors import ConfigError, CorpusError
from xded.models.checkpoints import load
from xded.models.recogniser import load_recogniser
from xded.report.study import report_of
from xded.study.plan import StudyError, build
from xded.study.planner import Planner
from xded.study.steps import Step, Work
from xded.training.job import Job

FROM_PARENT: dict[str, Any] = {"start": "parent", "controls": True}
SHARED: dict[str, Any] = {**FROM_PARENT, "recordings": "shared"}
KINDS = ("parent", "teacher", "posteriors", "targets", "attempt")
WITHHELD = {"without": SHARED, "distilled": {**SHARED, **CTC_KD}, "with all": FROM_PARENT}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"), ("c1", "c2"), ("t1", "t2", "t3", "t4"))


@pytest.fixture(autouse=True)
def larger(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """`micro` is a little larger than the tests' model."""
    size = {key: value for key, value in MODEL.items() if isinstance(value, int)} | {"width": 24}
    monkeypatch.setitem(SIZES, "micro", size)
    return size


def with_teach(**teach: Any) -> dict[str, Any]:
    return {**CONFIG, "teach": {**CONFIG["teach"], **teach}}  # type: ignore[dict-item]


def plan(corpus: Corpus, out: Path, attempts: Mapping[str, Any], **changes: Any) -> Work:
    return Planner(tiny_study(corpus, attempts, **{"held_out": ["t1"], **changes}), corpus, out).plan()


def jobs(work: Work, kind: str) -> dict[str, Job]:
    """Jobs of the pieces that train, by title."""
    return {s.title: s.work.args[0] for s in work.steps if s.kind == kind}  # type: ignore[attr-defined]


def speakers(*parts: Any) -> set[str]:
    return {recording.speaker for part in parts for recording in part}


def everyone(job: Job) -> set[str]:
    return speakers(job.train, job.validation)


# --- withheld recordings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("parent_on", ["both", "controls"])
def test_withheld_recordings_reach_their_own_teachers_and_attempts_with_all_alone(
    corpus: Corpus, tmp_path: Path, parent_on: str
) -> None:
    config = with_teach(parent_on=parent_on)
    work = plan(corpus, tmp_path, WITHHELD, withhold=["t2", "t4"], config=config)
    (parent,) = jobs(work, "parent").values()
    assert everyone(parent) == ({"c1", "c2", "t3"} if parent_on == "both" else {"c1", "c2"})
    teachers = jobs(work, "teacher")
    assert {title: everyone(job) for title, job in teachers.items()} == {f"teacher t{n}": {f"t{n}"} for n in (2, 3, 4)}
    attempts = {title.partition(",")[0]: job for title, job in jobs(work, "attempt").items()}
    assert everyone(attempts["without"]) == everyone(attempts["distilled"]) == {"c1", "c2", "t3"}
    assert everyone(attempts["with all"]) == {"c1", "c2", "t2", "t3", "t4"}
    asked = [speakers(s.work.args[2]) for s in work.steps if s.kind == "posteriors"]  # type: ignore[attr-defined]
    assert len(asked) == 3  # the teachers of the withheld speakers are listened to
    # those of controls alone serve the folds in which t1 trains
    assert all(heard == {"c1", "c2", "t3"} | ({"t1"} if parent_on == "controls" else set()) for heard in asked)
    (targets,) = [s.work.args[2] for s in work.steps if s.kind == "targets"]  # type: ignore[attr-defined]
    assert speakers(targets) == {"c1", "c2", "t3"}


def test_half_is_every_second_training_speaker_of_each_fold_by_band(corpus: Corpus, tmp_path: Path) -> None:
    bands: dict[str, Any] = {"t1": "high", "t2": "low", "t3": "high", "t4": "low"}
    rows = [r.model_copy(update={"band": bands.get(r.speaker)}) for r in corpus.recordings]
    write_manifest(tmp_path / "banded" / "manifest.jsonl", rows)
    banded = read_corpus(tmp_path / "banded")
    study = tiny_study(banded, WITHHELD, withhold="half")
    assert study.withheld(banded, (), ()) == ("t3", "t4")  # t2 t4 t1 t3
    assert study.withheld(banded, ("t4",), ()) == ("t1",)
    assert study.withheld(banded, ("t4",), ("t3",)) == ("t1",)
    assert tiny_study(banded, {"a": {}}).withheld(banded, (), ()) == ()
    assert tiny_study(corpus, WITHHELD, withhold="half").withheld(corpus, ("t1",), ()) == ("t3",)


def test_withholding_changes_what_hears_less_and_nothing_else(corpus: Corpus, tmp_path: Path) -> None:
    of_fold = with_teach(parent_on="both")
    one = plan(corpus, tmp_path, WITHHELD, withhold=["t2"], config=of_fold)
    two = plan(corpus, tmp_path, WITHHELD, withhold=["t3"], config=of_fold)
    assert not {s.key for s in one.steps} & {s.key for s in two.steps}
    # a parent on controls, its teachers, and students of everything do not depend on it
    one = plan(corpus, tmp_path, WITHHELD, withhold=["t2"])
    two = plan(corpus, tmp_path, WITHHELD, withhold=["t3"])
    same = {s.title for s in one.steps if s.key in {other.key for other in two.steps}}
    assert same == {"parent", *(f"teacher t{n}" for n in (2, 3, 4)), "with all, t1, seed 0"}


@pytest.mark.parametrize(
    ("attempts", "withhold", "message"),
    [
        ({"a": SHARED}, None, r"'a' trains on the shared recordings, and none are withheld: set withhold"),
        ({"a": {}}, "half", r"withhold changes no attempt: give one of them recordings: shared"),
        ({"a": SHARED}, [], r"withhold names nobody"),
        (
            {"a": {**SHARED, "set": {"objective.decoder_kd": 1.0, "target.heard": "same_prompt"}}},
            "half",
            r"same_prompt\), and some are withheld. Set target.heard to same_audio",
        ),
    ],
)
def test_withholding_without_sense_is_refused(attempts: dict[str, Any], withhold: Any, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        build({"name": "s", "attempts": attempts, "withhold": withhold}, "x")


def test_who_cannot_be_withheld_is_said_by_the_plan(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="withhold names c1, a control speaker: it has no teacher"):
        plan(corpus, tmp_path, WITHHELD, withhold=["c1"])
    with pytest.raises(CorpusError, match="no speaker 'T2'"):
        plan(corpus, tmp_path, WITHHELD, withhold=["T2"])
    with pytest.raises(StudyError, match="In the fold without t1 nobody's recordings are withheld"):
        plan(corpus, tmp_path, WITHHELD, withhold=["t1"])
    alone = {"a": {"start": "parent", "recordings": "shared"}}
    with pytest.raises(CorpusError, match="no recording is left to train on"):
        plan(corpus, tmp_path, alone, withhold=["t2", "t3", "t4"])
    with pytest.raises(ConfigError, match=r"'fold\.withhold' is decided by the study's withhold"):
        tiny_study(corpus, {"a": {"set": {"fold.withhold": ["t2"]}}})


def test_a_student_knows_withheld_speakers_through_their_teachers_alone(corpus: Corpus, tmp_path: Path) -> None:
    hypotheses = {"half": {"attempt": "distilled", "between": ["without", "with all"], "above": 0.5}}
    study = tiny_study(
        corpus, WITHHELD, held_out=["t1"], withhold=["t2"], config=with_teach(parent_on="both"), hypotheses=hypotheses
    )
    outcome = run_tiny(study, tmp_path)
    heard = {
        cell.attempt: {p.what: p.speakers for p in load_recogniser(cell.run / "best.pt").provenance}
        for cell in outcome.work.cells
    }
    knows = {name: {what for what, who in of.items() if "t2" in who} for name, of in heard.items()}
    assert knows["without"] == set()
    assert {what.removeprefix("model selection of ") for what in knows["distilled"]} == {"teacher t2"}
    assert "with all" in knows["with all"]
    assert "parent" not in knows["with all"]
    report = report_of(outcome, tmp_path, "x")
    assert report.suspicions == ()
    assert report.answers[0].hypothesis == "half"


# --- the mean of the teachers' weights ----------------------------------------------------------------------


def test_a_student_starts_from_the_mean_of_its_teachers_weights(corpus: Corpus, tmp_path: Path) -> None:
    attempts = {"all": {"start": "teachers"}, "two": {"start": "teachers", "teachers": ["t2", "t3"]},
                "one": {"start": "teachers", "teachers": ["t4"]}}  # fmt: skip
    outcome = run_tiny(tiny_study(corpus, attempts, held_out=["t1"], baselines=True), tmp_path)
    steps: dict[str, Step] = {step.title: step for step in outcome.work.steps}
    weights = {
        title: load(step.folder / "best.pt")["model_state_dict"]
        for title, step in steps.items() if step.kind in ("teacher", "soup")
    }  # fmt: skip
    pair, name = (weights["teacher t2"], weights["teacher t3"]), "ctc_head.weight"
    assert torch.allclose(weights["mean of 2 teachers' weights"][name], (pair[0][name] + pair[1][name]) / 2)
    runs = jobs(outcome.work, "attempt")
    inits = {title.partition(",")[0]: runs[title].config.train.init for title in runs}
    assert inits["all"] == steps["mean of 3 teachers' weights"].folder / "best.pt"
    assert inits["two"] == steps["mean of 2 teachers' weights"].folder / "best.pt"
    assert inits["one"] == steps["teacher t4"].folder / "best.pt"
    (cell,) = [c for c in outcome.work.cells if c.attempt == "all"]
    known = load_recogniser(cell.run / "best.pt").provenance
    assert {"teacher t2", "teacher t3", "teacher t4", "parent"} <= {p.what for p in known}
    mean = [r for r in outcome.results if r.system == "mean of the teachers' weights"]
    assert len(mean[0].of("open")) == 8
    assert "mean of the teachers' weights" in report_of(outcome, tmp_path, "x").tables[0].scores


def test_an_attempt_may_choose_teachers_to_start_from_without_listening(corpus: Corpus, tmp_path: Path) -> None:
    work = plan(corpus, tmp_path, {"a": {"start": "teachers", "teachers": ["t2", "t3"]}})
    assert {s.kind for s in work.steps} == {"parent", "teacher", "soup", "attempt"}
    with pytest.raises(StudyError, match=r"never listens to\. .*start: teachers"):
        build({"name": "s", "attempts": {"a": {"teachers": "band", "start": "parent"}}}, "x")


def test_the_mean_of_the_teachers_weights_listens_in_their_place(corpus: Corpus, tmp_path: Path) -> None:
    attempts = {"each": {**CTC_KD}, "mean": {**CTC_KD, "ask": "mean"}}
    outcome = run_tiny(tiny_study(corpus, attempts, held_out=["t1"]), tmp_path)
    titles = [step.title for step in outcome.work.steps if step.kind == "posteriors"]
    assert sorted(titles) == [
        *(f"posteriors of teacher t{n}" for n in (2, 3, 4)), "posteriors of the mean of the teachers' weights"
    ]  # fmt: skip
    each, mean = (next(c for c in outcome.work.cells if c.attempt == name) for name in ("each", "mean"))
    effective = [json.loads((c.targets / "effective.json").read_text())["ctc"] for c in (each, mean) if c.targets]
    assert effective == [3.0, 1.0]
    known = load_recogniser(mean.run / "best.pt").provenance
    assert {"teacher t2", "teacher t3", "teacher t4", "parent"} <= {p.what for p in known}


def test_one_recogniser_cannot_be_weighed_by_teacher(corpus: Corpus, tmp_path: Path) -> None:
    attempts = {"mean": {"ask": "mean", "set": {"objective.ctc_kd": 1.0, "target.weighting": "reliability"}}}
    with pytest.raises(StudyError, match=r"'mean' asks the mean .* target\.weighting reliability"):
        plan(corpus, tmp_path, attempts)


def test_nobody_is_asked_for_an_attempt_that_does_not_listen() -> None:
    with pytest.raises(StudyError, match="asks the mean of its teachers' weights, and never listens"):
        build({"name": "s", "attempts": {"a": {"ask": "mean", "start": "teachers"}}}, "x")


# --- larger teachers ----------------------------------------------------------------------------------------


def test_larger_teachers_teach_a_small_student(corpus: Corpus, tmp_path: Path, larger: dict[str, int]) -> None:
    config = with_teach(size="micro")
    outcome = run_tiny(tiny_study(corpus, {"student": CTC_KD, "alone": {}}, held_out=["t1"], config=config), tmp_path)
    models = {title: job.config.model for kind in ("parent", "teacher", "attempt")
              for title, job in jobs(outcome.work, kind).items()}  # fmt: skip
    widths = {title.partition(",")[0]: model.width for title, model in models.items()}
    assert widths == {"parent": 24, **{f"teacher t{n}": 24 for n in (2, 3, 4)}, "student": 16, "alone": 16}
    assert models["parent"].dropout == models["student, t1, seed 0"].dropout
    for cell in outcome.work.cells:
        assert load_recogniser(cell.run / "best.pt").config.model.width == 16


def test_students_of_several_sizes_share_teachers_of_a_named_size(corpus: Corpus, tmp_path: Path) -> None:
    small = {"set": {"objective.ctc_kd": 1.0, "model.width": 8}}
    work = plan(corpus, tmp_path, {"a": CTC_KD, "b": small}, config=with_teach(size="micro"))
    assert len(jobs(work, "parent")) == 1
    assert len([s for s in work.steps if s.kind == "teacher"]) == 3


@pytest.mark.parametrize("start", ["parent", "teachers"])
def test_a_student_of_another_size_cannot_start_from_them(corpus: Corpus, tmp_path: Path, start: str) -> None:
    attempts = {"a": {"start": start}}
    with pytest.raises(StudyError, match=rf"'a' starts from the {start}, of size micro.*start: scratch, or take teach"):
        plan(corpus, tmp_path, attempts, config=with_teach(size="micro"))
    same = {**with_teach(size="micro"), "model": {"size": "micro"}}
    assert plan(corpus, tmp_path, attempts, config=same).cells


def test_a_pretrained_encoder_has_the_size_that_it_has(corpus: Corpus, tmp_path: Path) -> None:
    archive = Path(__file__).parent / "data" / "nemo_golden.nemo"
    config = {**with_teach(size="micro"), "model": {"pretrained": str(archive), "size": None, "decoder_layers": 1}}
    with pytest.raises(ConfigError, match=r"teach.size micro .* model.pretrained gives everyone its own encoder"):
        plan(corpus, tmp_path, {"a": CTC_KD}, config=config)


# --- rehearsal, controls, guide -----------------------------------------------------------------------------


def test_teachers_that_rehearse_are_of_their_fold_and_the_parent_is_still_shared(
    corpus: Corpus, tmp_path: Path
) -> None:
    config = with_teach(rehearsal=1.5)
    work = plan(corpus, tmp_path, {"a": CTC_KD}, held_out=["t1", "t2"], config=config)
    assert len(jobs(work, "parent")) == 1
    teachers = [s.work.args[0] for s in work.steps if s.kind == "teacher"]  # type: ignore[attr-defined]
    assert len(teachers) == 6
    for job in teachers:
        (held_out,), own = job.fold.held_out, job.out.name
        others = [r for r in job.train if r.speaker != own]
        assert len(others) == round(1.5 * (len(job.train) - len(others)))
        assert held_out not in everyone(job)
        assert speakers(job.validation) == {own}
        assert len({r.recording for r in job.train}) == len(job.train)
    assert len({tuple(r.recording for r in job.train if r.speaker != job.out.name) for job in teachers}) == 6


def test_teachers_do_not_rehearse_withheld_recordings(corpus: Corpus, tmp_path: Path) -> None:
    config = with_teach(rehearsal=9, parent_on="fold")
    work = plan(corpus, tmp_path, WITHHELD, withhold=["t2"], config=config)
    heard = {title: speakers(job.train) for title, job in jobs(work, "teacher").items()}
    # controls that the parent does not hear are strangers to its teachers too
    assert heard == {"teacher t2": {"t2", "t3", "t4"}, "teacher t3": {"t3", "t4"}, "teacher t4": {"t3", "t4"}}


def test_rehearsal_changes_teachers_and_not_the_parent(corpus: Corpus, tmp_path: Path) -> None:
    attempts = {"a": {**CTC_KD, "start": "parent"}, "b": {"set": {"objective.ctc_kd": 1.0, "teach.rehearsal": 1.0}}}
    work = plan(corpus, tmp_path, attempts)
    assert len(jobs(work, "parent")) == 1
    assert len([s for s in work.steps if s.kind == "teacher"]) == 6


def test_the_parent_hears_the_first_controls(corpus: Corpus, tmp_path: Path) -> None:
    work = plan(corpus, tmp_path, {"a": {"start": "parent"}}, config=with_teach(controls=1))
    assert [everyone(job) for job in jobs(work, "parent").values()] == [{"c1"}]
    work = plan(corpus, tmp_path, {"a": {"start": "parent"}}, config=with_teach(controls=1, parent_on="both"))
    assert [everyone(job) for job in jobs(work, "parent").values()] == [{"c1", "t2", "t3", "t4"}]
    with pytest.raises(CorpusError, match=r"hear 3 control speakers; this fold .* trains 2\. Set teach.controls to at"):
        plan(corpus, tmp_path, {"a": {"start": "parent"}}, config=with_teach(controls=3))
    with pytest.raises(ConfigError, match=r"with teach\.parent_on fold the parent hears none"):
        plan(corpus, tmp_path, {"a": {"start": "parent"}}, config=with_teach(controls=1, parent_on="fold"))


def test_a_student_that_imitates_features_is_guided_by_the_parent(corpus: Corpus, tmp_path: Path) -> None:
    attempts = {"guided": {"set": {"objective.feature_kd": 1.0}}, "alone": {}}
    other = {**TRAIN, "weight_decay": 0.5}
    first = plan(corpus, tmp_path, attempts)
    again = plan(corpus, tmp_path, attempts, config=with_teach(parent=other))
    (parent,) = jobs(first, "parent").values()
    assert jobs(first, "attempt")["guided, t1, seed 0"].config.train.guide == parent.out / "best.pt"
    keys = [{cell.attempt: cell.key for cell in work.cells} for work in (first, again)]
    assert keys[0]["alone"] == keys[1]["alone"]
    assert keys[0]["guided"] != keys[1]["guided"]
    outcome = run_tiny(tiny_study(corpus, attempts, held_out=["t1"], config=with_teach(size="micro")), tmp_path / "run")
    metrics = (outcome.work.cells[0].run / "metrics.jsonl").read_text().splitlines()
    assert any("feature_kd" in json.dumps(json.loads(line)) for line in metrics)
    with pytest.raises(ConfigError, match=r"'train\.guide' is decided by the study"):
        tiny_study(corpus, {"a": {"set": {"train.guide": "x.pt"}}})


def test_a_guide_and_a_start_are_told_apart(corpus: Corpus, tmp_path: Path) -> None:
    guided = {"set": {"objective.feature_kd": 1.0}}
    work = plan(corpus, tmp_path, {"new": guided, "begun": {"start": "parent", **guided}}, held_out=["t1"])
    assert len({cell.key for cell in work.cells}) == 2


def test_attempts_share_teachers_whatever_they_change_of_their_own_training(corpus: Corpus, tmp_path: Path) -> None:
    """Otherwise the row of a method would also be that of another parent."""
    changes: dict[str, Any] = {
        "dropout": {"model.dropout": 0.3}, "smoothed": {"objective.label_smoothing": 0.1},
        "noisy": {"augment.noise": 0.5}, "cooling": {"objective.temperature_end": 1.0},
    }  # fmt: skip
    attempts = {n: {"start": "parent", "set": {"objective.ctc_kd": 1.0, **c}} for n, c in changes.items()}
    work = plan(corpus, tmp_path, {"plain": {"start": "parent", **CTC_KD}, **attempts}, held_out=["t1"])
    kinds = Counter(step.kind for step in work.steps)
    assert kinds == {"parent": 1, "teacher": 3, "posteriors": 3, "targets": 1, "attempt": 5}
    (parent,) = jobs(work, "parent").values()
    assert parent.config.model.dropout != 0.3


def test_what_a_student_does_without_targets_is_kept_and_changes_no_teacher(corpus: Corpus, tmp_path: Path) -> None:
    """Consistency is no teacher's: an attempt without targets has it all the same, and a parent never."""
    consistent = {"objective.consistency": 5.0, "train.sampler": "words", "train.speakers_per_word": 2}
    attempts = {"plain": {"start": "parent"}, "consistent": {"start": "parent", "set": consistent}}
    work = plan(corpus, tmp_path, attempts)
    (parent,) = jobs(work, "parent").values()
    assert parent.config.objective.consistency == 0
    weights = {t.partition(",")[0]: job.config.objective.consistency for t, job in jobs(work, "attempt").items()}
    assert weights == {"plain": 0.0, "consistent": 5.0}
    warmer = {"plain": {"start": "parent", "set": {"objective.temperature": 3.0, "objective.temperature_end": 1.0}}}
    assert plan(corpus, tmp_path, warmer).cells[0].key == work.cells[0].key


# --- what teachers are asked --------------------------------------------------------------------------------


def asked_of(work: Work) -> dict[str, set[str]]:
    """Whose recordings each teacher is asked about."""
    pieces = [s.work.args for s in work.steps if s.kind == "posteriors"]  # type: ignore[attr-defined]
    return {teacher: speakers(recordings) for _, teacher, recordings, *_ in pieces}


def test_teachers_of_one_fold_are_asked_about_its_held_out_speaker_where_an_attempt_hears_it(
    corpus: Corpus, tmp_path: Path
) -> None:
    of_fold, others = with_teach(rehearsal=1.0), {"t2", "t3", "t4"}
    attempts = {"a": CTC_KD, "included": {**CTC_KD, "include_held_out": True}}
    alone, beside = (plan(corpus, tmp_path, a, config=of_fold) for a in ({"a": CTC_KD}, attempts))
    assert asked_of(alone) == dict.fromkeys(sorted(others), others)
    assert asked_of(beside) == {teacher: {"t1", *others} for teacher in sorted(others)}
    assert asked_of(plan(corpus, tmp_path, {"a": CTC_KD})) == asked_of(beside)  # teachers of all folds
    # other questions are other pieces, and neither targets nor students change
    one, two = ({kind: {s.key for s in work.steps if s.kind == kind} for kind in KINDS} for work in (alone, beside))
    assert not one["posteriors"] & two["posteriors"]
    assert all(one[kind] <= two[kind] for kind in ("parent", "teacher", "targets", "attempt"))


def test_a_study_asks_as_xded_targets_does(corpus: Corpus, tmp_path: Path) -> None:
    attempts = {"a": {"controls": True, "set": {"objective.ctc_kd": 1.0, "target.asked": "own"}}}
    work = plan(corpus, tmp_path, attempts, config=with_teach(rehearsal=1.0))
    assert asked_of(work) == {"parent": {"c1", "c2"}, **{f"t{n}": {f"t{n}"} for n in (2, 3, 4)}}
    assert run_tiny(tiny_study(corpus, attempts, held_out=["t1"]), tmp_path / "run").complete


# --- what the tables say ------------------------------------------------------------------------------------


def test_tables_say_what_teachers_are_worth_and_how_many_a_student_heard(corpus: Corpus, tmp_path: Path) -> None:
    bands: dict[str, Any] = {"t1": "low", "t2": "high"}
    rows = [r.model_copy(update={"band": bands.get(r.speaker)}) for r in corpus.recordings]
    write_manifest(tmp_path / "banded" / "manifest.jsonl", rows)
    attempts = {"student": CTC_KD, "own": {"set": {"objective.ctc_kd": 1.0, "target.asked": "own"}}, "alone": {}}
    hypotheses = {"gain": {"attempt": "student", "minus": "alone", "above": 0}, "good": {"attempt": "own", "above": 9}}
    banded = read_corpus(tmp_path / "banded")
    study = tiny_study(banded, attempts, held_out=["t1", "t2"], baselines=True, hypotheses=hypotheses)
    outcome = run_tiny(study, tmp_path / "out")
    report = report_of(outcome, tmp_path / "out", "x")
    main = {row[0]: dict(zip(report.tables[0].main.columns, row, strict=True)) for row in report.tables[0].main.rows}
    assert {name: main[name]["teachers"] for name in (*attempts, "parent")} == {
        "student": "3.0", "own": "1.0", "alone": "-", "parent": "-"
    }  # fmt: skip
    teachers = report.tables[0].teachers
    assert teachers is not None
    assert [row[0] for row in teachers.rows] == [*(f"teacher t{n}" for n in range(1, 5)), "mean of the teachers"]
    for result in outcome.results:
        if result.system.startswith("teacher "):
            (job,) = [j for t, j in jobs(outcome.work, "teacher").items() if t == result.system]
            best = load(job.out / "best.pt")
            assert result.own_percent == pytest.approx(100 * best["best"]["wra"])
    gains = report.gains
    assert gains is not None
    assert gains.columns == ("hypothesis", "a - b", "low", "high")
    assert [row[:2] for row in gains.rows] == [("gain", "student - alone")]
    assert "(p " in gains.rows[0][2]
