"""Parent and teachers of their own size, with withheld recordings and rehearsal, from the corpus to the student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tiny_corpus import MODEL, job_for, tiny_config, write_corpus
from xded.config import SIZES, Config
from xded.corpus.folds import Fold, make_fold, split
from xded.corpus.manifest import Corpus
from xded.errors import ConfigError
from xded.models.recogniser import load_recogniser
from xded.report.tables import crosstest_values
from xded.scoring import Prediction
from xded.teachers.adapt import jobs_of, parts_of, same_shape, taught_model, teach
from xded.teachers.aggregation import make_targets
from xded.training.run import fit

ONE_EPOCH = {"batch_size": 8, "threads": 1, "device": "cpu", "stages": [{"epochs": 1, "peak_lr": 1e-3}]}
OPTIONS: dict[str, Any] = {"controls": True, "validation": "takes", "validation_fraction": 0.25, "seed": 0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"), ("c1",), ("t1", "t2", "t3"))


@pytest.fixture(autouse=True)
def larger(monkeypatch: pytest.MonkeyPatch) -> None:
    """`micro` is a little larger than the tests' model."""
    size = {key: value for key, value in MODEL.items() if isinstance(value, int)} | {"width": 24}
    monkeypatch.setitem(SIZES, "micro", size)


def config_of(**sections: Any) -> Config:
    teach_section = {"parent": ONE_EPOCH, "teacher": ONE_EPOCH, **sections.pop("teach", {})}
    fold = {"held_out": ("t1",), **sections.pop("fold", {})}
    return tiny_config(teach=teach_section, fold=fold, **sections)


def test_a_withheld_speaker_is_in_no_part_and_the_others_are_split_as_before(corpus: Corpus) -> None:
    before, after = (split(corpus, Fold(("t1",), withhold=names), **OPTIONS) for names in ((), ("t3",)))
    for part in ("train", "validation", "test"):
        assert getattr(after, part) == tuple(r for r in getattr(before, part) if r.speaker != "t3")
    for names in ({"held_out": ("t3",)}, {"held_out": (), "exclude": ("t3",)}):
        with pytest.raises(ConfigError, match=r"t3: (held out|excluded) and withheld at once"):
            make_fold(corpus, config_of(fold={**names, "withhold": ("t3",)}).fold)
    with pytest.raises(ConfigError, match=r"fold\.withhold needs heard: same_audio"):
        config_of(fold={"withhold": ("t3",)}, target={"heard": "same_prompt"})


def test_large_travelling_teachers_teach_a_small_student_what_it_cannot_hear(corpus: Corpus, tmp_path: Path) -> None:
    config = config_of(fold={"withhold": ("t3",)}, teach={"size": "micro"}, objective={"ctc_kd": 1.0})
    teachers = teach(corpus, config, tmp_path / "teachers", quiet=True)
    assert teachers.finished == ("t2", "t3")
    assert {load_recogniser(run).config.model.width for run in (teachers.parent, teachers.teacher("t3"))} == {24}
    assert "t3" not in {s for p in load_recogniser(teachers.parent).provenance for s in p.speakers}
    fold = make_fold(corpus, config.fold)
    parts = parts_of(corpus, fold, config)
    made = make_targets(corpus, teachers, fold, parts.train, config, tmp_path / "targets")
    assert {r.speaker for r in parts.train} == {"c1", "t2"}
    assert made["ctc"].teachers == ("t2", "t3")
    assert {entry.recording for entry in made["ctc"].recordings} == {r.recording for r in parts.train}
    job = job_for(
        corpus, tmp_path / "run", **{**config.model_dump(exclude_unset=True), "targets": tmp_path / "targets"}
    )
    student = load_recogniser(fit(job, quiet=True))
    assert student.config.model.width == 16
    assert {p.what for p in student.provenance if "t3" in p.speakers} == {"teacher t3", "model selection of teacher t3"}


def test_a_named_size_keeps_what_is_no_size() -> None:
    plain = tiny_config()
    assert taught_model(plain) == plain.model
    own = plain.model.model_copy(update={"dropout": 0.3, "decoder_layers": 0})
    larger = plain.model_copy(update={"model": own, "teach": plain.teach.model_copy(update={"size": "micro"})})
    found = taught_model(larger)
    assert (found.width, found.dropout, found.decoder_layers) == (24, 0.3, 0)
    assert not same_shape(found, own)
    assert same_shape(own, own.model_copy(update={"dropout": 0.0, "size": "micro"}))


def test_rehearsal_is_drawn_once_and_for_all(corpus: Corpus, tmp_path: Path) -> None:
    def trained(rehearsal: float, seed: int = 0) -> dict[str, list[str]]:
        config = config_of(teach={"rehearsal": rehearsal}, seed=seed)
        return {job.out.name: [r.recording for r in job.train] for job in jobs_of(corpus, config, tmp_path)[1]}

    none, some = trained(0), trained(0.5)
    assert some == trained(0.5)
    assert some != trained(0.5, seed=1)
    for speaker, own in none.items():
        assert all(name.startswith(speaker) for name in own)
        assert some[speaker][: len(own)] == own
        assert len(some[speaker]) == len(own) + round(0.5 * len(own))
        assert not any(name.startswith(("t1", speaker)) for name in some[speaker][len(own) :])
    assert set(trained(99)["t2"]) == {*none["t2"], *none["t3"], *(r.recording for r in jobs_of(
        corpus, config_of(), tmp_path)[0].train if r.speaker == "c1")}  # fmt: skip


def test_own_and_others_stand_beside_each_other() -> None:
    def said(speaker: str, *right: bool) -> list[Prediction]:
        return [
            Prediction(f"{speaker}{n}", f"{speaker}{n}", speaker, None, None, "A", "A", "A" if ok else "B", ())
            for n, ok in enumerate(right)
        ]

    values = crosstest_values(
        {"t2": said("t1", True, False) + said("t2", True) + said("t3", False, False),
         "t3": said("t1", True, True) + said("t2", True) + said("t3", True, False)}, "upper", ("t1",),
    )  # fmt: skip
    shown = {name: {side: row[side]["value"] for side in ("own", "others", "held out")} for name, row in values.items()
             if "own" in row}  # fmt: skip
    assert shown == {
        "t2": {"own": 100.0, "others": 25.0, "held out": 50.0},
        "t3": {"own": 50.0, "others": 100.0, "held out": 100.0},
    }
