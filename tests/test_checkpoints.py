"""Checkpoints: whole at every moment, hashed, refused when damaged or foreign."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_corpus import job_for, write_corpus
from xded.errors import CheckpointError, ConfigError, TrainingError
from xded.models.checkpoints import load, load_latest, previous, save, sha256_of, sidecar
from xded.models.recogniser import load_recogniser, pick_device
from xded.training.run import fit

PAYLOAD: dict[str, Any] = {"model_state_dict": {"w": torch.arange(1000.0)}, "config": {"seed": 1}, "batch": 3}


def numbered(batch: int) -> dict[str, Any]:
    return {**PAYLOAD, "batch": batch}


def test_round_trip_with_hash(tmp_path: Path) -> None:
    path = tmp_path / "new" / "best.pt"
    save(PAYLOAD, path)
    read = load(path)
    assert torch.equal(read["model_state_dict"]["w"], PAYLOAD["model_state_dict"]["w"])
    assert sidecar(path).read_text() == sha256_of(path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["best.pt", "best.pt.sha256"]  # nothing temporary is left


def test_latest_keeps_its_predecessor(tmp_path: Path) -> None:
    latest = tmp_path / "latest.pt"
    for batch in (1, 2, 3):
        save(numbered(batch), latest, keep_previous=True)
    assert (load(latest)["batch"], load(previous(latest))["batch"]) == (3, 2)
    payload, warning = load_latest(tmp_path)
    assert (payload["batch"], warning) == (3, None)


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "gone"])
def test_a_damaged_latest_gives_its_predecessor_and_a_warning_that_names_it(tmp_path: Path, damage: str) -> None:
    latest = tmp_path / "latest.pt"
    for batch in (1, 2):
        save(numbered(batch), latest, keep_previous=True)
    content = bytearray(latest.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        latest.unlink()
    else:
        latest.write_bytes({"bit": bytes(content), "cut": bytes(content[:-100]), "empty": b""}[damage])
    payload, warning = load_latest(tmp_path)
    assert payload["batch"] == 1
    assert warning is not None
    assert str(latest) in warning
    assert "latest.previous.pt" in warning


def test_a_predecessor_never_has_the_hash_of_another_file(tmp_path: Path) -> None:
    """A kill between the renames leaves latest.pt without a hash; the next save must not make it unreadable."""
    latest = tmp_path / "latest.pt"
    for batch in (1, 2):
        save(numbered(batch), latest, keep_previous=True)
    sidecar(latest).unlink()
    save(numbered(3), latest, keep_previous=True)
    assert (load(latest)["batch"], load(previous(latest))["batch"]) == (3, 2)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "cannot be read as a checkpoint"), (b"hello", "cannot be read as a checkpoint")],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "best.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as error:
        load(path)
    assert str(path) in str(error.value)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({**PAYLOAD, "evil": Evil()}, tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        load(tmp_path / "best.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("payload", [{"config": {}}, {"model_state_dict": {}}, [1, 2]])
def test_foreign_checkpoints_are_refused_naming_what_is_missing(tmp_path: Path, payload: Any) -> None:
    torch.save(payload, tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match=r"no checkpoint of xded: it has no (model_state_dict|config)"):
        load(tmp_path / "best.pt")


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"best.pt: no such checkpoint.*xded status"):
        load_recogniser(tmp_path)


def refuse(code: int) -> Any:
    def write(*args: Any, **named: Any) -> None:
        raise OSError(code, os.strerror(code))

    return write


@pytest.mark.parametrize("where", ["torch.save", "fsync", "device"])
def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    latest = tmp_path / "latest.pt"
    save(numbered(1), latest, keep_previous=True)
    if where == "torch.save":
        monkeypatch.setattr(torch, "save", refuse(errno.ENOSPC))
    elif where == "fsync":
        monkeypatch.setattr(os, "fsync", refuse(errno.EDQUOT))
    elif not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    else:
        (tmp_path / "latest.pt.tmp").symlink_to("/dev/full")  # really writes, really refused
    with pytest.raises(TrainingError, match=r"disk is full.*latest.pt could not be written") as error:
        save(numbered(2), latest, keep_previous=True)
    assert "--resume" in error.value.remedy
    assert load(latest)["batch"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest.pt", "latest.pt.sha256"]


def test_what_torch_makes_of_a_full_disk_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **named: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="PytorchStreamWriter"):  # room enough: something else is wrong
        save(PAYLOAD, tmp_path / "best.pt")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(TrainingError, match="disk is full"):
        save(PAYLOAD, tmp_path / "best.pt")


def test_a_recogniser_comes_back_as_it_was_trained(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", takes=1)
    job = job_for(corpus, tmp_path / "run", name="teacher t1", train={"stages": [{"epochs": 1, "peak_lr": 1e-3}]})
    recogniser = load_recogniser(fit(job, quiet=True))
    assert (recogniser.name, recogniser.epoch, recogniser.config) == ("teacher t1", 1, job.config)
    assert recogniser.tokenizer.fingerprint == job.tokenizer.fingerprint
    assert recogniser.sha256 == sha256_of(tmp_path / "run" / "best.pt")
    assert {speaker for p in recogniser.provenance for speaker in p.speakers} == {"t1", "t2"}
    assert not recogniser.student.training
    stored = load(tmp_path / "run" / "best.pt")
    for name, value in recogniser.student.state_dict().items():
        assert torch.equal(value, stored["model_state_dict"][name])
    for key in ("epoch", "train_loss", "val_loss", "model_state_dict", "config"):
        assert key in stored


def test_weights_that_do_not_fit_their_own_config_are_listed(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", takes=1)
    job = job_for(corpus, tmp_path / "run", train={"stages": [{"epochs": 1, "peak_lr": 1e-3}]})
    payload = load(fit(job, quiet=True))
    payload["model_state_dict"].pop("ctc_head.bias")
    save(payload, tmp_path / "changed.pt")
    with pytest.raises(CheckpointError, match=r"missing: ctc_head.bias \(1\)"):
        load_recogniser(tmp_path / "changed.pt")


def test_unusable_devices_are_named() -> None:
    assert pick_device("cpu").type == "cpu"
    for name in ("cuda:99", "gpu9"):
        with pytest.raises(ConfigError, match=f"device '{name}' cannot be used here"):
            pick_device(name)
