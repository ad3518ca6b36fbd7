"""Several recognisers to one: what the mean is, whom it has heard, what it is refused for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cli_calls import call, done, refused
from tiny_corpus import job_for, write_corpus
from xded.corpus.folds import Provenance
from xded.corpus.manifest import Corpus, read_corpus
from xded.errors import CheckpointError, ConfigError, LeakageError
from xded.models.averaging import average, common_parent
from xded.models.checkpoints import load, save
from xded.models.recogniser import load_recogniser, provenance_of
from xded.training.run import fit

TRAIN = {"stages": [{"epochs": 1, "peak_lr": 3e-3}], "checkpoint_every_epochs": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent of a control speaker, and a teacher for each of two speakers, adapted from it; t3 is held out."""
    folder = tmp_path_factory.mktemp("soup")
    corpus = write_corpus(folder / "corpus", controls=("c1",), targets=("t1", "t2", "t3"))
    fit(job(corpus, folder / "parent", "parent", exclude=["t1", "t2"]), quiet=True)
    for speaker, other in (("t1", "t2"), ("t2", "t1")):
        fit(job(corpus, folder / speaker, f"teacher {speaker}", folder / "parent", exclude=[other]), quiet=True)
    return folder


def job(corpus: Corpus, out: Path, name: str, init: Path | None = None, **fold: list[str]) -> Any:
    made = job_for(corpus, out, name=name, train={**TRAIN, "init": init}, fold={"held_out": ["t3"], **fold})
    made.config = made.config.model_copy(update={"corpus": corpus.path})
    return made


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return load(path / "best.pt")["model_state_dict"]


def assert_close(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    torch.testing.assert_close(dict(found), dict(wanted), rtol=1e-6, atol=1e-7)


def changed(folder: Path, path: Path, **keys: Any) -> Path:
    """A copy of the first teacher with other keys; those of the config by their dotted names."""
    payload = load(folder / "t1" / "best.pt")
    for key, value in keys.items():
        if "__" in key:
            section, name = key.split("__")
            payload["config"][section][name] = value
        else:
            payload[key] = value
    save(payload, path)
    return path


def test_the_mean_is_weighted_whole_numbers_are_kept_and_everyone_heard_is_on_record(folder: Path) -> None:
    one, two = state_of(folder / "t1"), state_of(folder / "t2")
    payload = average([folder / "t1", folder / "t2" / "best.pt"], [3, 1])
    for name, value in payload["model_state_dict"].items():
        wanted = 0.75 * one[name] + 0.25 * two[name] if value.is_floating_point() else one[name]
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-7)
        assert value.dtype == one[name].dtype
    heard = [{s for p in provenance_of(x) for s in p.speakers} for x in (payload, load(folder / "t1" / "best.pt"))]
    assert heard == [{"c1", "t1", "t2"}, {"c1", "t1"}]
    recorded = payload["average"]
    assert [(m["name"], m["weight"]) for m in recorded["of"]] == [("teacher t1", 0.75), ("teacher t2", 0.25)]
    assert recorded["parent"] == str((folder / "parent" / "best.pt").resolve())


def test_a_mean_of_the_same_weights_is_these_weights_and_order_means_nothing(folder: Path, tmp_path: Path) -> None:
    copy = changed(folder, tmp_path / "copy.pt")
    one = load(folder / "t1" / "best.pt")
    same = average([folder / "t1", copy])
    assert all(value.equal(one["model_state_dict"][name]) for name, value in same["model_state_dict"].items())
    two = [average([folder / a, folder / b])["model_state_dict"] for a, b in (("t1", "t2"), ("t2", "t1"))]
    torch.testing.assert_close(*two, rtol=1e-6, atol=1e-7)


def test_task_arithmetic_goes_from_the_base_and_never_makes_a_negative_variance(folder: Path) -> None:
    base, one, two = (state_of(folder / name) for name in ("parent", "t1", "t2"))
    paths = [folder / "t1", folder / "t2"]
    mean = average(paths)["model_state_dict"]
    assert_close(average(paths, base=folder / "parent")["model_state_dict"], mean)
    far = average(paths, base=folder / "parent", scale=30.0)["model_state_dict"]
    name = "ctc_head.weight"
    torch.testing.assert_close(far[name], base[name] + 30 * ((one[name] + two[name]) / 2 - base[name]))
    statistics = [name for name in far if name.endswith(("running_mean", "running_var"))]
    assert statistics
    assert all(far[name].equal(mean[name]) for name in statistics)
    back = average([folder / "t1"], base=folder / "parent", scale=0.0)["model_state_dict"]
    assert all(back[name].equal(base[name]) for name, _ in load_recogniser(folder / "t1").student.named_parameters())


def test_student_and_parent_have_a_common_parent_and_strangers_have_none(folder: Path, tmp_path: Path) -> None:
    parent = str((folder / "parent" / "best.pt").resolve())
    assert average([folder / "t1", folder / "parent"], [0.3, 0.7])["average"]["parent"] == parent
    assert average([folder / "t1"], base=folder / "parent")["average"]["parent"] == parent
    other = changed(folder, tmp_path / "other.pt", train__init=str(tmp_path / "elsewhere.pt"))
    assert average([folder / "t1", other])["average"]["parent"] is None
    scratch = [changed(folder, tmp_path / f"{seed}.pt", train__init=None) for seed in (1, 2)]
    payloads = {path: {**load(path), "provenance": [str(path)]} for path in scratch}
    assert common_parent(payloads) is None
    assert "one run" in str(average([folder / "t1" / "best.pt", folder / "t1" / "checkpoint_epoch_1.pt"])["average"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tokenizer_fingerprint": "f" * 64}, r"t1/best.pt and .*x.pt have different tokenizers .*ffffffffffff\)"),
        ({"model__width": 24, "model__heads": 3}, r"differ in model.width \(16 and 24\), model.heads \(2 and 3\)"),
        ({"model__whiten_layers": 1}, r"differ in model.whiten_layers \(0 and 1\)"),
        ({"features__mels": 64}, r"differ in features.mels \(80 and 64\)"),
    ],
)
def test_recognisers_of_another_make_are_refused(folder: Path, tmp_path: Path, keys: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        average([folder / "t1", changed(folder, tmp_path / "x.pt", **keys)])
    assert "one parent" in error.value.remedy


def test_what_changes_nothing_is_not_compared(folder: Path, tmp_path: Path) -> None:
    average([folder / "t1", changed(folder, tmp_path / "x.pt", model__dropout=0.5, model__size="tiny")])


def test_weights_that_do_not_fit_their_config_are_refused(folder: Path, tmp_path: Path) -> None:
    state = state_of(folder / "t1")
    del state["ctc_head.bias"]
    with pytest.raises(CheckpointError, match=r"x.pt does not fit this model: missing: ctc_head.bias"):
        average([folder / "t1", changed(folder, tmp_path / "x.pt", model_state_dict=state)])


def test_another_normaliser_is_refused(folder: Path, tmp_path: Path) -> None:
    paths = []
    for number, mean in enumerate((0.0, 0.1)):
        state = {**state_of(folder / "t1"), "front_end.mean": torch.full((80,), mean), "front_end.std": torch.ones(80)}
        path = tmp_path / f"{number}.pt"
        paths.append(changed(folder, path, features__normalisation="global", model_state_dict=state))
    with pytest.raises(CheckpointError, match=r"0.pt and .*1.pt normalise differently: front_end.mean, of"):
        average(paths)
    average([paths[0], changed(folder, tmp_path / "2.pt", **{**load(paths[0]), "name": "again"})])


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["t1"], None, "One checkpoint has no average"),
        (["t1", "t1"], None, "named twice"),
        (["t1", "t2"], [1.0], r"1 weights \(1\) for 2 checkpoints"),
        (["t1", "t2"], [1.0, -1.0], r"2 weights \(1, -1\) for 2"),
        (["t1", "t2"], [0.0, 0.0], "not all of them 0"),
        (["t1", "t2"], [float("nan"), 1.0], "2 weights"),
    ],
)
def test_weights_that_are_none_are_refused(folder: Path, names: list[str], weights: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        average([folder / name for name in names], weights)


def test_the_verb_makes_a_checkpoint_that_can_be_tested_and_started_from(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept" / "soup.pt"
    said = done("average", folder / "t1", folder / "t2", "--weights", "0.7,0.3", "--out", out)
    assert said.err == ""
    assert said.out.splitlines()[0].split()[:3] == ["0.700", "teacher", "t1"]
    assert load_recogniser(out).name == "average of teacher t1, teacher t2"
    done("evaluate", out, "--held-out", "t3", "--output", tmp_path / "scores.json")
    corpus = read_corpus(folder / "corpus")
    fit(job(corpus, tmp_path / "run", "student", out), quiet=True)
    heard = {s for p in provenance_of(load(tmp_path / "run" / "best.pt")) for s in p.speakers}
    assert heard == {"c1", "t1", "t2"}
    with pytest.raises(LeakageError, match="teacher t2 has heard held-out speaker t2"):
        fit(job(corpus, tmp_path / "leaky", "student", out, held_out=["t2"]), quiet=True)
    assert load(out)["config"]["fold"]["exclude"] == []
    assert "No problem found" in call("doctor", out).out
    apart = done(
        "average", folder / "t1", folder / "t2", "--base", folder / "parent", "--scale", "1.5",
        "--out", tmp_path / "far.pt",
    )  # fmt: skip
    assert "Warning" not in apart.err


def test_the_verb_warns_of_strangers_and_refuses_what_it_cannot_do(folder: Path, tmp_path: Path) -> None:
    other = changed(folder, tmp_path / "other.pt", train__init=str(tmp_path / "elsewhere.pt"))
    said = done("average", folder / "t1", other, "--out", tmp_path / "soup.pt")
    assert "Warning: no parent that all of them began with is on record" in said.err
    both = ["average", folder / "t1", folder / "t2", "--out"]
    refused(call(*both, tmp_path / "soup.pt"), 2, "is already there", "--out")
    refused(call(*both, tmp_path / "new.pt", "--weights", "a,b"), 2, "--weights a,b: not numbers", "0.7,0.3")
    refused(call(*both, tmp_path / "new.pt", "--scale", 2), 2, "--scale 2 of what?", "--base")
    assert not (tmp_path / "new.pt").exists()


def test_provenance_is_the_union_even_of_what_is_not_known(folder: Path, tmp_path: Path) -> None:
    unknown = {"what": "pretrained encoder x.nemo", "speakers": [], "takes": [], "known": False}
    other = changed(folder, tmp_path / "other.pt", provenance=[unknown])
    heard = provenance_of(average([folder / "t1", other]))
    assert Provenance("pretrained encoder x.nemo", frozenset(), known=False) in heard
    assert {s for p in heard for s in p.speakers} == {"c1", "t1"}
