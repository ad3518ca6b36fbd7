"""Posteriors that other tools exported: files that are hostile, broken or of something else."""

from __future__ import annotations

import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import bad_readers
from exported_logits import (
    Rows,
    one,
    rows_of,
    run,
    worst,
    write_npz,
    write_pt,
)
from made_targets import RATE_HZ, TOKENIZER, write_corpus
from xded.corpus.manifest import Corpus
from xded.errors import CorpusError, XdedError
from xded.findings import Finding
from xded.targets.store import Store, TargetError
from xded.teachers import foreign_files
from xded.teachers.foreign_files import ForeignFileError, open_arrays
from xded.teachers.posteriors import KINDS


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """T1, T2 and T3 say twelve words twice."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def own(corpus: Corpus) -> dict[str, Rows]:
    """What T1's teacher says of T1's recordings."""
    return rows_of(corpus.select(speakers=["T1"]))


# --- matching ----------------------------------------------------------------------------------------------------


def test_ids_that_are_unknown_missing_or_named_twice_are_counted_and_named(
    corpus: Corpus, own: dict[str, Rows], tmp_path: Path
) -> None:
    ids = list(own["decoder"])
    renamed = ["T1_LOST_1", *ids[1:-1], ids[1]]  # the first is unknown, the second named twice
    logits = write_pt(
        tmp_path / "logits", "T1", {"decoder": own["decoder"]}, corpus, utterance_ids=renamed, target_words=None
    )
    found = one(run(logits, corpus, tmp_path / "out"))
    (stream,) = found.streams
    assert stream.left_out == {"unknown": ["T1_LOST_1"], "repeated": [ids[1], ids[1]]}
    assert stream.missing == [ids[0], ids[-1]]
    assert stream.stored == 21
    finding = found.findings[0]
    assert (finding.check, finding.severity) == ("target-coverage", "warn")
    assert "1 are not in the corpus (T1_LOST_1)" in finding.what
    assert f"1 are named more than once, and nobody knows which is meant ({ids[1]})" in finding.what
    assert f"2 of T1 are in the corpus but not in the file ({ids[0]}, {ids[-1]})" in finding.what


def test_a_file_without_any_known_id_is_an_error(corpus: Corpus, own: dict[str, Rows], tmp_path: Path) -> None:
    strange = {kind: {f"x{name}": a for name, a in rows.items()} for kind, rows in own.items()}
    with pytest.raises(TargetError, match=r"none of its 24 ids is a recording .*xT1_BAD_1.*T1_BAD_1"):
        one(run(write_npz(tmp_path / "logits", "T1", strange), corpus, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_teachers_are_speakers_of_the_corpus(corpus: Corpus, own: dict[str, Rows], tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="teachers of M99"):
        run(write_npz(tmp_path / "logits", "M99", own), corpus, tmp_path / "out")
    with pytest.raises(TargetError, match="holds no posteriors of teachers"):
        run(tmp_path / "absent", corpus, tmp_path / "out")


# --- what is wrong with the numbers ------------------------------------------------------------------------------


def refused(logits: Path, corpus: Corpus, out: Path, check: str) -> Finding:
    """The finding for which nothing was stored."""
    found = worst(run(logits, corpus, out))
    assert (found.check, found.severity) == (check, "refuse"), found
    assert not (out / "posteriors").exists()
    return found


def test_rows_of_other_recordings_are_refused(corpus: Corpus, own: dict[str, Rows], tmp_path: Path) -> None:
    names = list(own["ctc"])
    order = np.random.default_rng(1).permutation(len(names))
    moved = {"ctc": {name: own["ctc"][names[i]] for name, i in zip(names, order, strict=True)}}
    durations = [
        r.model_copy(update={"duration": len(moved["ctc"][r.recording]) / RATE_HZ})
        if r.recording in moved["ctc"]
        else r
        for r in corpus.recordings
    ]  # frames fit, words do not
    found = refused(
        write_npz(tmp_path / "logits", "T1", moved), replace(corpus, recordings=tuple(durations)), tmp_path / "out",
        "target-text",
    )  # fmt: skip
    assert "say a word of the corpus" in found.what


@pytest.mark.parametrize("kind", KINDS)
def test_ids_that_are_off_by_one_are_refused(corpus: Corpus, own: dict[str, Rows], tmp_path: Path, kind: Any) -> None:
    shifted = {kind: {name: np.roll(a, 1, axis=1) for name, a in own[kind].items()}}
    found = refused(write_npz(tmp_path / "logits", "T1", shifted), corpus, tmp_path / "out", "token-offset")
    assert found.evidence["shift"] == -1


def test_another_tokenizer_of_the_same_size_is_refused(corpus: Corpus, own: dict[str, Rows], tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(TOKENIZER.size)
    other = {"decoder": {name: a[:, order] for name, a in own["decoder"].items()}}
    found = refused(write_npz(tmp_path / "logits", "T1", other), corpus, tmp_path / "out", "target-text")
    assert "Told the true text" in found.what


def test_one_wrong_length_is_left_out_and_many_are_refused(
    corpus: Corpus, own: dict[str, Rows], tmp_path: Path
) -> None:
    longer = {kind: dict(rows) for kind, rows in own.items()}
    first = next(iter(own["decoder"]))
    for rows in longer.values():
        rows[first] = np.concatenate([rows[first]] * 2)
    found = one(run(write_npz(tmp_path / "logits", "T1", longer), corpus, tmp_path / "out"))
    assert [s.left_out for s in found.streams] == [{"length": [first]}] * 2
    assert {(f.check, f.severity) for f in found.findings} == {("frame-count", "warn")}
    assert first not in Store(tmp_path / "out" / "posteriors" / "T1" / "decoder")
    without_end = {"decoder": {name: a[:-1] for name, a in own["decoder"].items()}}
    what = refused(write_npz(tmp_path / "cut", "T1", without_end), corpus, tmp_path / "no", "frame-count").what
    assert "24 of 24 decoder targets do not have one step for every token of their text and </s>" in what


def test_frames_of_another_rate_are_refused_until_the_rate_is_said(
    corpus: Corpus, own: dict[str, Rows], tmp_path: Path
) -> None:
    twice = {"ctc": {name: np.repeat(a, 2, axis=0) for name, a in own["ctc"].items()}}
    logits = write_npz(tmp_path / "logits", "T1", twice)
    found = refused(logits, corpus, tmp_path / "out", "frame-count")
    assert "--frame-rate" in found.remedy
    assert found.evidence["ratio_median"] == pytest.approx(2.0, abs=0.1)
    assert one(run(logits, corpus, tmp_path / "out", frame_rate_hz=50.0)).findings == []


def test_nan_is_left_out_and_a_file_full_of_it_refused(corpus: Corpus, own: dict[str, Rows], tmp_path: Path) -> None:
    first, *others = own["decoder"]
    own["decoder"][first][0, 3] = np.nan
    found = one(run(write_npz(tmp_path / "logits", "T1", own), corpus, tmp_path / "out"))
    assert found.streams[1].left_out == {"not finite": [first]}
    for name in others[:5]:
        own["decoder"][name][0, 3] = np.inf
    found = one(run(write_npz(tmp_path / "more", "T1", own), corpus, tmp_path / "more_out"))
    assert [s.status for s in found.streams] == ["imported", "refused"]  # the other head is not at fault
    assert sorted(p.name for p in (tmp_path / "more_out" / "posteriors" / "T1").iterdir()) == ["ctc", "imported.json"]


def test_metadata_of_another_run_is_refused(corpus: Corpus, own: dict[str, Rows], tmp_path: Path) -> None:
    frames = [len(a) for a in own["ctc"].values()]
    logits = write_pt(tmp_path / "logits", "T1", {"ctc": own["ctc"]}, corpus, ctc_frame_lens=[frames[-1], *frames[1:]])
    found = refused(logits, corpus, tmp_path / "out", "frame-count")
    assert "another number of frames than the metadata says" in found.what
    words = ["POND", *(name.split("_")[1] for name in list(own["ctc"])[1:])]
    found = worst(
        run(
            write_pt(tmp_path / "words", "T1", {"decoder": own["decoder"]}, corpus, target_words=words),
            corpus,
            tmp_path / "words_out",
        )
    )
    assert (found.check, found.severity) == ("target-text", "warn")
    assert found.evidence["recordings"] == ["T1_BAD_1"]


def test_mixed_scales_and_half_probabilities_are_refused(corpus: Corpus, own: dict[str, Rows], tmp_path: Path) -> None:
    rows = own["decoder"]
    soft = {name: torch.softmax(torch.from_numpy(a), 1).numpy() for name, a in rows.items()}
    mixed = {name: soft[name] if place % 2 else a for place, (name, a) in enumerate(rows.items())}
    refused(write_npz(tmp_path / "a", "T1", {"decoder": mixed}), corpus, tmp_path / "out", "normalisation")
    half = {name: a / 2 for name, a in soft.items()}
    refused(write_npz(tmp_path / "b", "T1", {"decoder": half}), corpus, tmp_path / "out", "normalisation")


def test_one_output_for_all_and_labels_for_posteriors(corpus: Corpus, own: dict[str, Rows], tmp_path: Path) -> None:
    same = {"decoder": {name: own["decoder"][name[:-1] + "1"] for name in own["decoder"]}}
    found = refused(write_npz(tmp_path / "a", "T1", same), corpus, tmp_path / "out", "duplicates")
    assert found.evidence["copies"] == 12
    sharp = {"decoder": {name: 100 * a for name, a in own["decoder"].items()}}
    found = worst(run(write_npz(tmp_path / "b", "T1", sharp), corpus, tmp_path / "out"))
    assert (found.check, found.severity) == ("temperature", "warn")
    assert "nearly labels" in found.what


# --- hostile and broken files ------------------------------------------------------------------------------------


class Bomb:
    """A pickle that would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def _compressed(path: Path) -> None:
    members = zipfile.ZipFile(path)
    with zipfile.ZipFile(path.with_suffix(".tmp"), "w", zipfile.ZIP_DEFLATED) as archive:
        for member in members.namelist():
            archive.writestr(member, members.read(member))
    path.with_suffix(".tmp").replace(path)


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (lambda p: p.write_bytes(p.read_bytes()[:-200]), "is cut off, or no file of torch.save"),
    "code": (lambda p: torch.save([Bomb(p.with_name("owned"))], p), "wants to run code .*mkdir"),
    "plain pickle": (lambda p: p.write_bytes(pickle.dumps(Bomb(p.with_name("owned")))), "is cut off, or no file"),
    "integers": (lambda p: torch.save([torch.ones(3, 5, dtype=torch.long)] * 24, p), "a tensor of torch.int64"),
    "sparse": (lambda p: torch.save([torch.eye(3).to_sparse()] * 24, p), "where plain floating-point numbers"),
    "no tensors": (lambda p: torch.save([1.0] * 24, p), "has a float as entry 0"),
    "a dictionary": (lambda p: torch.save({"a": torch.ones(3, 5)}, p), "holds a dict, where a list"),
    "flat": (lambda p: torch.save([torch.ones(5)] * 24, p), r"entry 0 of shape \[5\], where \[T, V\]"),
    "huge": (lambda p: torch.save([torch.ones(1).expand(2**20, 2**20)] * 24, p), "larger than any recording's"),
    "compressed": (_compressed, "compressed members"),
}  # fmt: skip
UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": UNREADABLE["code"],
    "empty": (lambda p: torch.save([], p), "is empty"),
    "too few": (lambda p: torch.save([torch.ones(3, 5)] * 23, p), "holds 23 recordings, but its metadata lists 24"),
    "wide": (lambda p: torch.save([torch.ones(3, 5)] * 24, p), "has 5 columns, but .* posteriors of another tokenizer"),
}


@pytest.mark.parametrize("fault", UNREADABLE)
def test_a_hostile_file_is_read_by_nobody(tmp_path: Path, fault: str) -> None:
    """What the reading process does, in this one: torch takes a second to start."""
    path = tmp_path / "T1_decoder_logits.pt"
    torch.save([torch.ones(3, 5)] * 24, path)
    assert foreign_files._opener(path)(path)[1][0]().shape == (3, 5)
    damage, expected = UNREADABLE[fault]
    damage(path)
    with pytest.raises((foreign_files.RefusedError, pickle.UnpicklingError)) as error:
        foreign_files._opener(path)(path)
    assert re.search(expected, foreign_files._reason(error.value))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("fault", UNFIT)
def test_a_broken_or_hostile_file_is_an_error_and_leaves_nothing(
    corpus: Corpus, own: dict[str, Rows], tmp_path: Path, fault: str
) -> None:
    logits = write_pt(tmp_path / "logits", "T1", {"decoder": own["decoder"]}, corpus)
    damage, expected = UNFIT[fault]
    damage(logits / "T1" / "T1_decoder_logits.pt")
    with pytest.raises(XdedError, match=expected):
        one(run(logits, corpus, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert not (logits / "T1" / "owned").exists()


def test_arrays_of_objects_and_foreign_members_are_refused(tmp_path: Path) -> None:
    objects = np.array([np.ones((2, 3)), np.ones((1, 3))], dtype=object)
    np.savez(tmp_path / "a.npz", x=objects)
    np.save(tmp_path / "a.npy", objects, allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    save_file({"x": torch.ones(2, 3, dtype=torch.int32)}, tmp_path / "a.safetensors")
    (tmp_path / "c.npz").write_bytes(b"PK nothing")
    for name, expected in {
        "a.npz": "of Python objects, which is a pickle", "a.npy": "of Python objects, which is a pickle",
        "b.npz": "member 'readme.txt'", "a.safetensors": "'x' of I32", "c.npz": "cannot be read",
    }.items():  # fmt: skip
        with pytest.raises(ForeignFileError, match=expected), open_arrays(tmp_path / name) as arrays:
            list(arrays.rows)


@pytest.mark.parametrize(("metadata", "expected"), [
    ({"utterance_ids": None}, "utterance_ids: Field required"),
    ({"num_utterances": 25}, "contradicts itself: utterance_ids 24, num_utterances 25"),
    ({"target_words": ["BAD"]}, "target_words 1"),
    ({"ctc_frame_lens": ["long"] * 24}, "ctc_frame_lens.0"),
])  # fmt: skip
def test_wrong_metadata_is_an_error(
    corpus: Corpus, own: dict[str, Rows], tmp_path: Path, metadata: dict[str, Any], expected: str
) -> None:
    with pytest.raises(TargetError, match=expected):
        one(run(write_pt(tmp_path / "logits", "T1", own, corpus, **metadata), corpus, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_rows_without_ids_need_metadata(corpus: Corpus, own: dict[str, Rows], tmp_path: Path) -> None:
    logits = write_pt(tmp_path / "logits", "T1", own, corpus)
    (logits / "T1" / "T1_metadata.json").unlink()
    with pytest.raises(TargetError, match=r"rows without ids, and T1_metadata\.json is not beside it"):
        one(run(logits, corpus, tmp_path / "out"))


def test_a_reader_that_dies_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.npz").write_bytes(b"")
    monkeypatch.setattr(foreign_files, "_serve", bad_readers.dies)
    with pytest.raises(ForeignFileError, match=r"died .SIGKILL"), open_arrays(tmp_path / "a.npz"):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds a process's memory")
def test_a_reader_may_not_take_more_memory_than_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.npz").write_bytes(b"")
    monkeypatch.setattr(foreign_files, "_serve", bad_readers.greedy)
    with pytest.raises(ForeignFileError, match="asked for too much"), open_arrays(tmp_path / "a.npz"):
        pass
