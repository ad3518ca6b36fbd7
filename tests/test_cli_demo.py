"""`xded demo`: the built-in study with the corpus, folds, seeds, attempts and config of the call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli_calls import call, contents, done, refused
from tiny_corpus import write_corpus
from tiny_study import CONFIG
from xded.corpus.manifest import read_corpus
from xded.corpus.synthetic import make_embedded_corpus
from xded.study import run as study_run
from xded.study.folder import STATE
from xded.study.plan import Study, StudyError, build, built_in, folds_of, load

SUPERVISED, STUDENT = "supervised from scratch", "student from scratch"
FROM_TEACHERS = "student from the teachers"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of tones and a config of a tiny model."""
    here = tmp_path_factory.mktemp("here")
    write_corpus(here / "corpus", controls=("c1",), targets=("t1", "t2", "t3"))
    (here / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    return here


def call_of(here: Path, out: Path, *more: object) -> tuple[object, ...]:
    files = ("--corpus", here / "corpus", "--config", here / "tiny.yaml")
    return "demo", *files, "--out", out, "--seeds", 1, "--updates", 2, "--jobs", 1, *more


def demo_study() -> Study:
    return build(yaml.safe_load(built_in("demo")), "demo")


def test_what_the_demo_compares() -> None:
    study = demo_study()
    shown = {name: (a.start, a.ask, study.config_of(name).objective.ctc_kd) for name, a in study.attempts.items()}
    assert shown == {
        SUPERVISED: ("scratch", "each", 0.0), STUDENT: ("scratch", "mean", 1.0),
        "supervised from the parent": ("parent", "each", 0.0), FROM_TEACHERS: ("teachers", "each", 0.0),
    }  # fmt: skip
    assert all(attempt.controls and attempt.about for attempt in study.attempts.values())
    claims = [(h.attempt, h.minus, h.above, h.decode) for h in study.hypotheses.values()]
    assert claims == [
        (STUDENT, SUPERVISED, 0.0, "open"), (FROM_TEACHERS, "supervised from the parent", 0.0, "open")
    ]  # fmt: skip


@pytest.mark.slow
def test_demo_from_end_to_end_and_again(here: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    words = call_of(here, out, "--set", "teach.rehearsal=1.0", "--set", "train.batch_size=4")
    first = done(*words)
    assert first.out.splitlines()[-2:] == [str(out / "report.html"), str(out / "report.md")]
    assert all((out / name).is_file() for name in ("report.html", "report.md", "results.json"))
    results = json.loads((out / "results.json").read_text())
    rows = {(t["title"], row[0]) for t in results["tables"] for row in t["rows"]}
    for system in ("chance", "parent", "teacher t1", "best teacher", "vote of the teachers", *demo_study().attempts):
        assert any(name == system for _, name in rows), system
    assert {a["hypothesis"] for a in results["answers"]} == set(demo_study().hypotheses)
    kept = load(out / "study.yaml")
    assert (kept.held_out, kept.seeds, kept.updates) == ((("t1", "t3"), ("t2",)), (0,), 2)
    assert (kept.base().teach.rehearsal, kept.base().train.batch_size) == (1.0, 4)
    pieces = contents(out / "pieces")
    done(*words)
    assert contents(out / "pieces") == pieces  # nothing was done again: each piece says when it was made
    view = json.loads(done("status", out, "--json").out)
    assert (view["name"], view["state"], len(view["rows"])) == ("demo", "finished", 8)


@pytest.mark.slow
def test_only_some_attempts_leave_the_claims_about_others_out(here: Path, tmp_path: Path) -> None:
    done(*call_of(here, tmp_path, "--attempt", SUPERVISED, "--fold-size", 1))
    kept = load(tmp_path / "study.yaml")
    assert (list(kept.attempts), kept.hypotheses) == ([SUPERVISED], {})
    assert [set(step.when) for step in kept.next] == [{"evaluation"}]
    cells = json.loads((tmp_path / STATE).read_text())["cells"]
    assert [(cell["attempt"], cell["held_out"]) for cell in cells] == [(SUPERVISED, [f"t{n}"]) for n in (1, 2, 3)]


def test_a_study_keeps_what_it_says_of_the_attempts_that_are_left() -> None:
    study = demo_study().only([STUDENT, SUPERVISED])
    assert list(study.attempts) == [SUPERVISED, STUDENT]
    assert list(study.hypotheses) == ["distillation helps from scratch"]
    assert [dict(step.when) for step in study.next] == [
        {"evaluation": "suspect"},
        *({"distillation helps from scratch": verdict} for verdict in ("supported", "rejected", "undecided")),
    ]
    build(study.model_dump(mode="json"), "what is left")
    debug = build(yaml.safe_load(built_in("debug")), "debug")
    assert debug.only(["included"]).ladder == debug.ladder
    assert debug.only(["original"]).ladder is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--attempt", "student"], ("no attempt 'student'", f"Choose among: {SUPERVISED}; {STUDENT}; ")),
        (["--fold-size", 3], ("has 3 target speakers: folds of 3 leave none to be a teacher", "--fold-size 1")),
        (["--set", "objective.ctc_kd=1"], ("supervised attempts listen to teachers too", "xded study new demo")),
        (["--set", "seed=3"], ("'seed' is decided by the study's seeds",)),
        (["--set", "train.batchsize=3"], ("unknown key 'train.batchsize' (did you mean 'batch_size'?)",)),
        (["--set", "teach.size=tiny"], ("'supervised from the parent' starts from the parent, of size tiny",)),
        (["--config", "no.yaml"], ("no.yaml: no such config file",)),
    ],
)
def test_what_the_demo_refuses_before_any_training(
    here: Path, tmp_path: Path, more: list[Any], said: tuple[str, ...]
) -> None:
    refused(call(*call_of(here, tmp_path / "out"), *more), 2, *said)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"tokenizer.model"}  # nothing was trained


def test_without_a_corpus_the_embedded_one_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def make(folder: Path, **options: Any) -> Path:
        asked.append(options)
        return make_embedded_corpus(folder, **{**options, "words": 1, "takes": 1})

    monkeypatch.setattr(study_run, "make_embedded_corpus", make)
    words = ("demo", "--out", tmp_path, "--fold-size", 8)
    first = call(*words)
    assert (first.code, first.out) == (2, "making the embedded corpus ...\n")
    assert "has 8 target speakers: folds of 8 leave none" in first.err
    refused(call(*words), 2, "folds of 8 leave none")
    assert asked == [{"controls": 8, "targets": 8, "words": 10, "takes": 4, "seed": 0}]
    assert folds_of(read_corpus(tmp_path / "corpus"), 2) == demo_study().held_out


def test_folds_are_dealt_like_cards(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, controls=("c1",), targets=("t1", "t2", "t3", "t4", "t5"))
    assert folds_of(corpus, 1) == tuple((f"t{n}",) for n in range(1, 6))
    assert folds_of(corpus, 2) == (("t1", "t4"), ("t2", "t5"), ("t3",))
    assert folds_of(corpus, 4) == (("t1", "t3", "t5"), ("t2", "t4"))
    with pytest.raises(StudyError, match="folds of 5 leave none to be a teacher"):
        folds_of(corpus, 5)
