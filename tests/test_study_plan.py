"""Study files: what is refused before any training, with place and remedy; what the built-in ones say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cli_calls import call, done, refused
from tiny_corpus import write_corpus
from xded.config import Config, ModelConfig
from xded.errors import ConfigError, CorpusError
from xded.study import outcome
from xded.study.plan import BUILT_IN, DECIDED, MEAN_TEACHER, ZERO_SHOT, StudyError, build, built_in, load, stages_for
from xded.training.run import flat

MINIMAL: dict[str, Any] = {"name": "s", "attempts": {"a": {}, "b": {}}}


def test_built_in_studies_are_valid_and_debug_asks_what_it_is_to_ask() -> None:
    studies = {name: build(yaml.safe_load(built_in(name)), name) for name in BUILT_IN}
    debug = studies["debug"]
    assert debug.attempts["included"].include_held_out
    assert debug.config_of("included").objective.decoder_kd == 1.0
    claims = {name: (h.attempt, h.above, h.below) for name, h in debug.hypotheses.items()}
    assert claims["domain shift"] == ("included", 60.0, None)
    assert claims["training broken"] == ("included", None, 10.0)
    assert debug.ladder is not None
    words = [debug.ladder.says(wra) for wra in (70.1, 69.9, 50, 20, 19.9, 0)]
    assert words[0] == "training works"
    assert words == [words[0], "training works in part", words[1], "mixed", "training is broken", words[4]]
    assert studies["loso"].held_out == "all"
    large = studies["small-from-large"]
    assert {large.config_of(name).teach.size for name in large.attempts} == {"tiny"}
    assert {(a.controls, a.start) for a in large.attempts.values()} == {(True, "scratch")}
    assert {a.controls for a in studies["from-parent"].attempts.values()} == {True}
    recovered = studies["withheld"].hypotheses["at least half is recovered"]
    assert (recovered.between, recovered.above) == (("without", "with all"), 0.5)
    everything = [name for name, attempt in studies["withheld"].attempts.items() if attempt.recordings == "all"]
    assert everything == ["with all"]
    with pytest.raises(StudyError, match="no built-in study 'dbug'"):
        built_in("dbug")


def test_new_writes_a_file_that_loads_and_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "d.yaml"
    assert f"xded study run {path}" in done("study", "new", "debug", "--output", path).out
    assert load(path).name == "debug"
    assert path.read_text().lstrip().startswith("#")  # it is commented
    refused(call("study", "new", "debug", "--output", path), 2, "is there already", "--output")
    refused(call("study", "new", "nothing"), 2, "no built-in study 'nothing'", "debug, loso")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attempt": {}}, r"attempt: Extra inputs"),
        ({"attempts": {}}, r"attempts: .*at least 1"),
        ({"seeds": [0, 0]}, r"a seed is listed twice"),
        ({"seeds": [-1]}, r"seeds\.0: .*greater than or equal to 0"),
        ({"held_out": []}, r"held_out names nobody"),
        ({"held_out": [[]]}, r"held_out names nobody"),
        ({"held_out": ["t1", ["t2", "t1"]]}, r"held_out names t1 twice"),
        ({"attempts": {"teacher t1": {}}}, r"cannot be called 'teacher t1'"),
        ({"attempts": {"parent": {}}}, r"cannot be called 'parent'"),
        ({"hypotheses": {"h": {"attempt": "c", "above": 5}}}, r"'h' is about attempt 'c', .* does not have"),
        ({"hypotheses": {"h": {"attempt": "a", "minus": "bb", "above": 5}}}, r"attempt 'bb'.*mean 'b'\?"),
        ({"hypotheses": {"h": {"attempt": "a", "minus": "a", "above": 5}}}, r"and itself is always 0"),
        ({"hypotheses": {"h": {"attempt": "a"}}}, r"either above or below"),
        ({"hypotheses": {"h": {"attempt": "a", "above": 5, "below": 7}}}, r"either above or below"),
        ({"hypotheses": {"h": {"attempt": "a", "above": 100}}}, r"nothing can decide it: WRA lies between 0 and 100"),
        ({"hypotheses": {"h": {"attempt": "a", "below": 0}}}, r"nothing can decide it: WRA"),
        ({"hypotheses": {"h": {"attempt": "a", "minus": "b", "below": -100}}}, r"nothing can decide it: gaps"),
        ({"hypotheses": {"h": {"attempt": "a", "minus": "b", "between": ["b", "c"], "above": 1}}}, r"minus or between"),
        ({"hypotheses": {"h": {"attempt": "a", "between": ["b", "a"], "above": 1}}}, r"neither is the attempt itself"),
        ({"hypotheses": {"h": {"attempt": "a", "between": ["b", "b"], "above": 1}}}, r"between names two attempts"),
        ({"hypotheses": {"h": {"attempt": "a", "between": ["b", "c"], "above": 1}}}, r"'h' is about attempt 'c'"),
        ({"hypotheses": {"evaluation": {"attempt": "a", "above": 5}}}, r"cannot be called 'evaluation'"),
        ({"ladder": {"attempt": "x", "rungs": [{"above": 0, "says": "y"}]}}, r"the ladder is about attempt 'x'"),
        ({"next": [{"when": {"h": "supported"}, "do": "x"}]}, r"next asks for the hypothesis 'h'"),
        ({"next": [{"when": {"evaluation": "rejected"}, "do": "x"}]}, r"'evaluation: rejected' never holds"),
        ({"next": [{"when": {"h": "suspect"}, "do": "x"}]}, r"'h: suspect' never holds"),
        ({"next": [{"when": {"evaluation": "suspect"}, "do": "x", "command": "rm {home}"}]}, r"command 'rm \{home\}'"),
        ({"budget": {"minutes": 0}}, r"budget\.minutes"),
    ],
)
def test_a_wrong_key_is_named_with_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=r"(?s)file\.yaml: .*" + message):
        build({**MINIMAL, **change}, "file.yaml")


@pytest.mark.parametrize("threshold", [{"above": 0}, {"above": 99}, {"below": 100}, {"below": 1}])
def test_thresholds_that_can_be_passed_on_both_sides_are_accepted(threshold: dict[str, float]) -> None:
    build({**MINIMAL, "hypotheses": {"h": {"attempt": "a", **threshold}}}, "x")


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        ({"objective.ctc_kd": 1.0, "target.heard": "same_prompt"}, "ctc_kd needs heard: same_audio"),
        ({"objective.ctc_kd": 1.0, "augment.tempo": 0.1}, "augment.tempo"),
        ({"objective.ctc": 0.0, "objective.cross_entropy": 0.0}, "ground truth has no weight"),
        ({"objective.ctc_dk": 1.0}, "did you mean 'ctc_kd'"),
        ({"train.init": "x.pt"}, r"'train\.init' is decided by the attempt's start"),
        ({"fold": {"held_out": ["t1"]}}, r"'fold\.held_out' is decided by the study's held_out"),
        ({"seed": 4}, r"'seed' is decided by the study's seeds"),
    ],
)
def test_contradictory_attempt_is_named_before_any_training(attempt: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"attempt 'odd' of study 's'.*{message}"):
        build({**MINIMAL, "attempts": {"odd": {"set": attempt}}}, "x")


def test_what_the_study_decides_cannot_be_set_for_all_attempts_either() -> None:
    with pytest.raises(ConfigError, match=r"the config of study 's': 'fold\.controls' is decided by the attempt's"):
        build({**MINIMAL, "config": {"fold": {"controls": True}}}, "x")
    known = flat(Config().model_dump(mode="json"))
    assert DECIDED.keys() <= known.keys()


def test_dotted_keys_of_all_attempts_win_over_sections() -> None:
    dotted = {"train.batch_size": 3, "model.size": "tiny"}
    study = build({**MINIMAL, "config": {**dotted, "train": {"batch_size": 9, "threads": 1}}}, "x")
    config = study.config_of("a")
    assert (config.train.batch_size, config.train.threads) == (3, 1)
    assert config.model == ModelConfig(size="tiny")
    with pytest.raises(ConfigError, match=r"the config of study 's': 'train\.init' is decided by the attempt's start"):
        build({**MINIMAL, "config": {"train.init": "x.pt"}}, "x")
    with pytest.raises(ConfigError, match=r"the config of study 's': unknown key 'train\.batchsize'"):
        build({**MINIMAL, "config": {"train.batchsize": 3}}, "x")


def test_teachers_of_an_attempt_that_listens_to_none_are_refused() -> None:
    with pytest.raises(StudyError, match=r"'a' chooses teachers \(band\) that it never listens to"):
        build({**MINIMAL, "attempts": {"a": {"teachers": "band", "start": "parent"}}}, "x")
    build({**MINIMAL, "attempts": {"a": {"teachers": "band", "set": {"objective.decoder_kd": 1.0}}}}, "x")


def test_speakers_whose_recordings_are_withheld_cannot_be_compared_by_them() -> None:
    attempt = {"recordings": "shared", "set": {"objective.ctc_kd": 1.0, "target.weighting": "embedding"}}
    with pytest.raises(StudyError, match=r"'a' weighs teachers by recordings.*embedding.*withheld.*likelihood"):
        build({**MINIMAL, "withhold": "half", "attempts": {"a": attempt}}, "x")
    build({**MINIMAL, "attempts": {"a": {**attempt, "recordings": "all"}}}, "x")
    attempt["set"] = {"objective.ctc_kd": 1.0, "target.weighting": "likelihood"}
    build({**MINIMAL, "withhold": "half", "attempts": {"a": attempt}}, "x")


def test_names_of_table_rows_are_those_that_attempts_cannot_have() -> None:
    for name in (
        MEAN_TEACHER,
        ZERO_SHOT,
        outcome.BEST_TEACHER,
        outcome.VOTE,
        outcome.ORACLE,
        f"parent, {outcome.SNAPPED}",
    ):
        with pytest.raises(StudyError, match="cannot be called"):
            build({**MINIMAL, "attempts": {name: {}}}, "x")


def test_folds_of_a_corpus(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, controls=("c1",), targets=("t1", "t2"))
    assert build(MINIMAL, "x").folds(corpus) == [("t1",), ("t2",)]
    assert build({**MINIMAL, "held_out": [["t1", "t2"], "c1"]}, "x").folds(corpus) == [("t1", "t2"), ("c1",)]
    with pytest.raises(CorpusError, match=r"no speaker 'T1' \(did you mean 't1'\?\)"):
        build({**MINIMAL, "held_out": ["T1"]}, "x").folds(corpus)
    healthy = write_corpus(tmp_path / "healthy", controls=("c1", "c2"), targets=())
    with pytest.raises(StudyError, match=r"held_out: all, but .* has no target speaker"):
        build(MINIMAL, "x").folds(healthy)


def test_updates_are_shared_by_the_stages_as_their_epochs_are() -> None:
    config = Config.model_validate(
        {"train": {"batch_size": 8, "stages": [{"epochs": 1, "peak_lr": 1e-3}, {"epochs": 3, "peak_lr": 1e-3}]}}
    )
    epochs = [stage.epochs for stage in stages_for(400, 80, config)]  # 10 updates an epoch
    assert epochs == [10, 30]
    assert [stage.epochs for stage in stages_for(1, 80, config)] == [1, 1]


@pytest.mark.parametrize(("text", "message"), [("a: [", "cannot be read as YAML"), ("- a", "holds no mapping")])
def test_a_file_that_is_no_study_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    refused(call("study", "run", path, "--out", tmp_path / "out"), 2, message, "xded study new debug")
    assert not (tmp_path / "out").exists()
    refused(call("study", "run", tmp_path / "none.yaml", "--out", tmp_path / "out"), 2, "none.yaml", "study new")


def test_unknown_engine_is_refused(tmp_path: Path) -> None:
    refused(call("study", "run", "debug", "--out", tmp_path, "--engine", "slurm"), 2, "--engine slurm", "local or ray")
