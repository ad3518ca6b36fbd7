"""`doctor.posteriors`: from folders to findings, what cannot be read said, and nothing said of healthy ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from made_targets import (
    KINDS,
    TEACHERS,
    TEMPERATURE,
    TOKENIZER,
    WORDS,
    Made,
    make,
    permuted,
    shifted,
    write_corpus,
)
from tiny_corpus import tiny_config
from tiny_corpus import write_corpus as write_tones
from xded.corpus.folds import make_fold
from xded.corpus.manifest import Corpus
from xded.doctor.given import Given
from xded.doctor.posteriors import examine, sets_of, stores_in
from xded.doctor.run_folder import RunFolder
from xded.errors import XdedError
from xded.findings import Examination
from xded.scoring import Prediction, write_predictions
from xded.targets.aggregate import combine, top_k
from xded.targets.store import Index, Kind, Store
from xded.teachers.adapt import Teachers, parts_of, teach
from xded.teachers.aggregation import make_targets

Change = Callable[[Made], None]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def open_all(folder: Path, examination: Examination) -> list[Store]:
    """As the doctor opens what it is given."""
    found = []
    for path in stores_in(folder):
        try:
            found.append(Store(path))
        except XdedError as error:
            examination.cannot(str(path), str(error))
    return found


def diagnose(folder: Path, corpus: Corpus | None = None, **given: object) -> Examination:
    examination = Examination()
    known = Given(corpora=[corpus] if corpus else [], stores=open_all(folder, examination), **given)  # type: ignore[arg-type]
    examine(examination, known)
    return examination


def problems(examination: Examination) -> list[tuple[str, str]]:
    return [(f.severity, f.check) for f in examination.at_least("warn")]


# --- what lies where ---------------------------------------------------------------------------------------


def test_a_folder_of_targets_is_recognised_from_every_level(tmp_path: Path) -> None:
    root = make().write(tmp_path / "targets")
    every = stores_in(root)
    assert len(every) == 8
    assert set(stores_in(root / "posteriors")) == {path for path in every if "posteriors" in path.parts}
    assert stores_in(root / "posteriors" / "T1") == [root / "posteriors" / "T1" / kind for kind in KINDS]
    assert stores_in(root / "ctc") == [root / "ctc"]
    assert stores_in(tmp_path) == []
    (one,) = sets_of(Store(path) for path in every)
    assert (one.root, set(one.targets), set(one.posteriors["ctc"])) == (root, set(KINDS), set(TEACHERS))


def test_other_programs_indexes_are_no_stores(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"pages": []}')
    assert stores_in(tmp_path) == []


def test_two_folders_of_targets_are_two_sets(tmp_path: Path) -> None:
    stores = [Store(path) for name in ("a", "b") for path in stores_in(make().write(tmp_path / name))]
    assert [one.root.name for one in sets_of(stores)] == ["a", "b"]


def test_half_written_and_damaged_stores_are_said_and_the_rest_is_checked(tmp_path: Path, corpus: Corpus) -> None:
    root = make(recordings=corpus.recordings).write(tmp_path)
    shutil.rmtree(root / "decoder")
    (root / "decoder").mkdir()  # as a writer leaves it that was killed
    (root / "posteriors" / "T1" / "ctc" / "index.json").write_text("{")
    shard = root / "posteriors" / "T2" / "ctc" / "shard_000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    found = diagnose(root, corpus)
    assert problems(found) == []
    said = {Path(u.what).relative_to(root).as_posix(): u.why for u in found.unchecked if u.what.startswith(str(root))}
    assert "no finished posteriors" in said["decoder"]
    assert "damaged or of another version" in said["posteriors/T1/ctc"]
    assert "damaged or missing" in said["posteriors/T2/ctc"]
    assert any("the ctc posteriors of T1" in u.what for u in found.unchecked)
    assert {"spike-misalignment", "audio-hash", "target-text"} - {p.check for p in found.passed} == {
        "spike-misalignment"  # a single teacher is left
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: {**arrays, "rest": arrays["rest"][:-3]},
        lambda arrays: {**arrays, "ids": arrays["ids"][:, 0].copy()},
        lambda arrays: {name: values for name, values in arrays.items() if name != "least_blank"},
    ],
)
def test_arrays_that_do_not_fit_together_are_damage(tmp_path: Path, corpus: Corpus, change: Callable) -> None:
    root = make(recordings=corpus.recordings).write(tmp_path)
    shard = root / "ctc" / "shard_000.safetensors"
    shard.write_bytes(save(change(load_file(shard))))
    found = diagnose(root, corpus)
    assert problems(found) == []
    assert [u.what for u in found.unchecked] == [str(root / "ctc")]
    assert "damaged or missing" in found.unchecked[0].why


# --- healthy and not -----------------------------------------------------------------------------------------


def test_healthy_targets_pass_every_check(tmp_path: Path, corpus: Corpus) -> None:
    found = diagnose(make(recordings=corpus.recordings).write(tmp_path), corpus)
    assert (found.findings, found.unchecked) == ([], [])
    assert {p.check for p in found.passed} == {
        "tokenizer-mismatch", "temperature", "effective-teachers", "copied-teacher", "target-coverage", "audio-hash",
        "frame-count", "normalisation", "target-text", "spike-misalignment", "blank-average", "teacher-accuracy",
        "teacher-forced",
    }  # fmt: skip


def in_all(change: Callable[[dict], dict]) -> Change:
    """A change of the averages of both kinds."""

    def plant(made: Made) -> None:
        made.averages = {kind: change(rows) for kind, rows in made.averages.items()}

    return plant


def copy_first(made: Made) -> None:
    for kind in KINDS:
        made.said[kind] = dict.fromkeys(TEACHERS, made.said[kind]["T1"])
    made.average()


def average_of_first(made: Made) -> None:
    made.averages = {kind: made.said[kind]["T1"] for kind in KINDS}


def rows_permuted(made: Made) -> None:
    for kind in KINDS:
        made.said[kind] = {t: permuted(rows) for t, rows in made.said[kind].items()}
    made.average()


def noise(made: Made) -> None:
    random = np.random.default_rng(0)
    for kind in KINDS:
        for posterior in made.said[kind]["T2"].values():
            shares = random.dirichlet(np.full(posterior.ids.shape[1] + 1, 0.5), len(posterior.ids)).astype(np.float32)
            posterior.probabilities, posterior.rest = shares[:, 1:], shares[:, 0]
            posterior.least_blank = np.zeros(len(shares), np.float32)
        made.noted[kind]["T2"] = dict.fromkeys(made.noted[kind]["T2"], -5.0)
    made.average()


def unscaled(made: Made) -> None:
    for posterior in made.averages["ctc"].values():
        posterior.rest = posterior.rest * 0


@pytest.mark.parametrize(
    ("plant", "check", "severity"),
    [
        (in_all(permuted), "target-text", "refuse"),
        (in_all(lambda rows: shifted(rows, 1)), "token-offset", "refuse"),
        (copy_first, "copied-teacher", "refuse"),
        (average_of_first, "effective-teachers", "refuse"),
        (rows_permuted, "target-text", "refuse"),
        (noise, "teacher-accuracy", "warn"),
        (unscaled, "normalisation", "refuse"),
    ],
)
def test_planted_faults_stand_first(tmp_path: Path, corpus: Corpus, plant: Change, check: str, severity: str) -> None:
    made = make(recordings=corpus.recordings)
    plant(made)
    found = diagnose(made.write(tmp_path), corpus)
    assert (severity, check) in problems(found)[:2]
    assert len({f.check for f in found.at_least("warn")}) <= 3


@pytest.mark.parametrize(
    ("fields", "check", "severity"),
    [
        ({"temperature": 1.0}, "temperature", "refuse"),
        ({"teacher_forced": False}, "teacher-forced", "warn"),
        ({"teacher_hashes": {"T1": "a" * 64, "T2": "a" * 64, "T3": "a" * 64}}, "copied-teacher", "refuse"),
    ],
)
def test_indexes_that_say_something_else(
    tmp_path: Path, corpus: Corpus, fields: dict[str, object], check: str, severity: str
) -> None:
    found = diagnose(make(recordings=corpus.recordings).write(tmp_path, **fields), corpus)
    assert problems(found) == [(severity, check)]


def test_audio_that_was_changed_since(tmp_path: Path, corpus: Corpus) -> None:
    root = make(recordings=corpus.recordings).write(tmp_path)
    other = [r.model_copy(update={"audio_sha256": "f" * 64}) for r in corpus.recordings]
    changed = Corpus(corpus.path, (*other[:30], *corpus.recordings[30:]))
    found = diagnose(root, changed)
    assert problems(found) == [("refuse", "audio-hash")]
    assert found.findings[0].evidence["wrong"] == 30


def test_without_hashes_in_the_manifest_files_are_read(tmp_path: Path, corpus: Corpus) -> None:
    bare = Corpus(corpus.path, tuple(r.model_copy(update={"audio_sha256": None}) for r in corpus.recordings))
    made = make(recordings=corpus.recordings)
    assert problems(diagnose(made.write(tmp_path / "good"), bare)) == []
    made.recordings = [r.model_copy(update={"audio_sha256": "f" * 64}) for r in made.recordings]
    assert problems(diagnose(made.write(tmp_path / "bad"), bare)) == [("refuse", "audio-hash")]


def test_without_corpus_or_tokenizer_the_rest_is_checked(tmp_path: Path) -> None:
    made = make()
    made.said["ctc"]["T2"] = make(lags={"T2": 4}).said["ctc"]["T2"]
    root = made.average().write(tmp_path)
    (root / "tokenizer.model").unlink()
    found = diagnose(root)
    assert ("warn", "spike-misalignment") in problems(found)
    assert any("no tokenizer with their fingerprint" in u.why for u in found.unchecked)
    assert "teacher-accuracy" not in {p.check for p in found.passed}


def test_a_corpus_of_other_recordings_is_said(tmp_path: Path, corpus: Corpus) -> None:
    others = tuple(r.model_copy(update={"recording": f"x{r.recording}"}) for r in corpus.recordings)
    found = diagnose(make(recordings=corpus.recordings).write(tmp_path), Corpus(corpus.path, others))
    assert found.findings == []
    assert any("no corpus that was given has its recordings" in u.why for u in found.unchecked)


# --- listed words ----------------------------------------------------------------------------------------------


LISTED = tuple(sorted(WORDS))


def over_words(made: Made) -> Made:
    """The same teachers, asked for listed words: a sure one each, mostly the right one."""
    made.said["words"], made.noted["words"] = {}, {}
    for number, teacher in enumerate(TEACHERS):
        random = np.random.default_rng([7, number])
        made.said["words"][teacher], made.noted["words"][teacher] = {}, {}
        for recording in made.recordings:
            logits = random.normal(0, 0.7, len(LISTED))
            logits[LISTED.index(recording.text)] += 5.0
            soft = np.exp(logits / TEMPERATURE) / np.exp(logits / TEMPERATURE).sum()
            log_prob = logits[LISTED.index(recording.text)] - np.log(np.exp(logits).sum())
            made.said["words"][teacher][recording.recording] = top_k(soft[None].astype(np.float32), 6, np.zeros(1))
            made.noted["words"][teacher][recording.recording] = float(log_prob)
    return made


def write_words(root: Path, made: Made, average: bool = True, **fields: object) -> Path:
    """Their stores beside the others, as `xded targets` lays them out with objective.word_kd."""
    common = {"vocabulary": len(LISTED), "words": LISTED, "top_k": 6, **fields}
    if average:
        rows = made.said["words"]
        made.averages["words"] = {
            r: top_k(combine([rows[t][r] for t in TEACHERS], [1] * 3, "logprob_mean", len(LISTED)), 6, np.zeros(1))
            for r in rows["T1"]
        }
    made.write_one(root / "words", made.averages["words"], made.index("words", **common))
    for teacher in TEACHERS:
        index = made.index("words", teacher, **common)
        made.write_one(root / "posteriors" / teacher / "words", made.said["words"][teacher], index)
    return root


@pytest.fixture
def words(corpus: Corpus) -> Made:
    return over_words(make(recordings=corpus.recordings))


def test_healthy_words_pass_every_check(tmp_path: Path, corpus: Corpus, words: Made) -> None:
    found = diagnose(write_words(words.write(tmp_path), words), corpus)
    assert (found.findings, found.unchecked) == ([], [])
    passed = {p.check for p in found.passed if p.detail.startswith("words")}
    assert passed == {"normalisation", "target-text", "effective-teachers", "copied-teacher", "target-coverage"}


def test_words_that_are_no_distribution_or_not_listed(tmp_path: Path, corpus: Corpus, words: Made) -> None:
    shorter = write_words(tmp_path / "shorter", words, words=LISTED[:-1])
    found = diagnose(shorter, corpus)
    assert ("refuse", "normalisation") in problems(found)
    assert found.findings[0].evidence["faults"].keys() == {"an id outside the vocabulary"}
    for posterior in words.said["words"]["T2"].values():
        posterior.probabilities *= 0.5
    found = diagnose(write_words(tmp_path / "halved", words, average=False), corpus)
    assert problems(found) == [("refuse", "normalisation")]
    assert found.findings[0].evidence["stores"].keys() == {"posteriors/T2/words"}


def test_words_of_other_recordings(tmp_path: Path, corpus: Corpus, words: Made) -> None:
    root = write_words(words.write(tmp_path / "whole"), words)
    words.averages["words"] = permuted(words.averages["words"])
    found = diagnose(write_words(root, words, average=False), corpus)
    assert problems(found) == [("refuse", "target-text")]
    assert "words targets of 16 of 16 sampled recordings are not the mean" in found.findings[0].what
    alone = tmp_path / "alone"
    shutil.copytree(root / "words", alone / "words")
    shutil.copyfile(root / "tokenizer.model", alone / "tokenizer.model")
    found = diagnose(alone, corpus)  # or is it that nobody knows a word?
    assert problems(found) == [("warn", "target-text")]
    assert "or their teachers know no word" in found.findings[0].effect


def test_answers_about_words_under_other_names(tmp_path: Path, corpus: Corpus, words: Made) -> None:
    words.said["words"] = {teacher: permuted(said) for teacher, said in words.said["words"].items()}
    root = write_words(words.write(tmp_path), words)
    shutil.rmtree(root / "words")
    found = diagnose(root, corpus)
    assert problems(found) == [("refuse", "target-text")]
    assert "the true text has another probability than was noted" in found.findings[0].what


def test_a_list_of_words_that_is_off_by_one(tmp_path: Path, corpus: Corpus, words: Made) -> None:
    root = words.write(tmp_path)
    found = diagnose(write_words(root, words, words=(*LISTED[1:], LISTED[0])), corpus)
    assert problems(found) == [("refuse", "token-offset")]


def test_weak_answers_about_words_are_no_fault(tmp_path: Path, corpus: Corpus, words: Made) -> None:
    """They always say a word of the corpus; more often the right one than by chance is enough."""
    right = {n: p for i, (n, p) in enumerate(words.said["words"]["T1"].items()) if i % 5 == 0}
    wrong = permuted(words.said["words"]["T1"])
    words.averages["words"] = {name: right.get(name, wrong[name]) for name in wrong}
    shutil.rmtree(write_words(words.write(tmp_path), words, average=False) / "posteriors")
    assert problems(diagnose(tmp_path, corpus)) == []


def test_words_that_a_run_lacks(tmp_path: Path, corpus: Corpus, words: Made) -> None:
    root = write_words(words.write(tmp_path / "targets"), words)
    run = run_of(root, corpus, word_kd=1.0)
    assert problems(diagnose(root, corpus, runs=[run])) == []
    some = list(words.averages["words"].items())[:20]
    words.averages["words"] = dict(some)
    found = diagnose(write_words(root, words, average=False), corpus, runs=[run])
    assert [f.what for f in found.findings if f.check == "target-coverage"] == [
        "The words targets cover 20 of 66 training recordings (30 %), and none of T2, T3."
    ]
    shutil.rmtree(root / "words")
    found = diagnose(root, corpus, runs=[run])
    assert any(u.what.startswith("the words targets of") for u in found.unchecked)


# --- runs and cross-tests -----------------------------------------------------------------------------------


def run_of(
    root: Path, corpus: Corpus, temperature: float = 2.0, held_out: tuple[str, ...] = (), **weights: float
) -> RunFolder:
    objective = {"ctc_kd": 1.0, "decoder_kd": 1.0, "temperature": temperature, **weights}
    config = tiny_config(objective=objective, targets=str(root), corpus=str(corpus.path), fold={"held_out": held_out})
    return RunFolder(root.parent / "run", config)


def test_a_run_at_another_temperature(tmp_path: Path, corpus: Corpus) -> None:
    root = make(recordings=corpus.recordings).write(tmp_path / "targets")
    assert problems(diagnose(root, corpus, runs=[run_of(root, corpus)])) == []
    found = diagnose(root, corpus, runs=[run_of(root, corpus, 1.0)])
    assert problems(found) == [("refuse", "temperature")]
    supervised = RunFolder(tmp_path, tiny_config(objective={"temperature": 1.0}))
    assert problems(diagnose(root, corpus, runs=[supervised])) == []


def test_a_run_whose_recordings_have_no_targets(tmp_path: Path, corpus: Corpus) -> None:
    root = make(recordings=corpus.select(["T1"])).write(tmp_path / "targets")
    found = diagnose(root, corpus, runs=[run_of(root, corpus)])
    assert problems(found) == [("warn", "target-coverage")]
    assert set(found.findings[0].evidence["missing_by_speaker"]) == {"T2", "T3"}
    held_out = run_of(root, corpus, held_out=("T2", "T3"))
    assert problems(diagnose(root, corpus, runs=[held_out])) == []


def test_the_cross_test_of_teachers(tmp_path: Path) -> None:
    def heard_as(teacher: str, speaker: str, number: int) -> Prediction:
        words = "BAD", "CAB", "ACE", "DAB"
        knows = teacher != "T2" and number < 9
        name = f"{speaker}_{number}"
        text = words[number % 4] if knows else "X"
        return Prediction(name, name, speaker, None, None, "p", words[number % 4], text, (5,))

    for teacher in TEACHERS:
        rows = [heard_as(teacher, speaker, n) for speaker in TEACHERS for n in range(12)]
        (tmp_path / "crosstest").mkdir(exist_ok=True)
        write_predictions(tmp_path / "crosstest" / f"{teacher}.jsonl", rows)
    examination = Examination()
    examine(examination, Given(teachers=[Teachers(tmp_path), Teachers(tmp_path / "none")]))
    assert problems(examination) == [("warn", "teacher-accuracy")]
    assert examination.findings[0].evidence["broken"] == ["T2"]
    assert [u.why for u in examination.unchecked] == ["there is no cross-test."]


def test_a_cross_test_that_was_told_the_true_texts(tmp_path: Path, corpus: Corpus) -> None:
    made = make(recordings=corpus.recordings)
    for posterior in made.said["ctc"]["T1"].values():  # its CTC head says nothing, its decoder is told everything
        posterior.ids = np.where(posterior.ids == 0, posterior.ids[:, :1], 0) * 0
    made.write(tmp_path / "targets")
    (tmp_path / "teachers" / "crosstest").mkdir(parents=True)
    (tmp_path / "teachers" / "tokenizer.model").write_bytes(TOKENIZER.model_bytes)
    for teacher in TEACHERS:
        rows = [
            Prediction(r.recording, r.take, r.speaker, None, None, r.prompt, r.text, r.text, (5,))
            for r in corpus.recordings
        ]
        write_predictions(tmp_path / "teachers" / "crosstest" / f"{teacher}.jsonl", rows)
    examination = Examination()
    stores = [s for s in open_all(tmp_path / "targets", examination) if s.index.aggregation is None]
    known = Given(stores=stores, teachers=[Teachers(tmp_path / "teachers")])
    examine(examination, known)
    (found,) = [f for f in examination.findings if f.check == "teacher-forced"]
    assert found.evidence["teachers"] == ["T1"]
    assert found.evidence["ctc_right_percent"] == 0
    (tmp_path / "teachers" / "crosstest" / "decode.json").write_text('{"mode":"decoder"}')
    again = Examination()
    examine(again, known)
    assert "teacher-forced" not in {f.check for f in again.findings}


# --- real ones --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("takes", "targets", "target"), [(3, ("t1", "t2", "t3"), {}), (2, ("t1", "t2"), {"top_k": 3})])
def test_hardly_trained_teachers_are_no_fault(
    tmp_path: Path, takes: int, targets: tuple[str, ...], target: dict[str, int]
) -> None:
    corpus = write_tones(tmp_path / "corpus", ("c1",), targets, takes)
    few = {"batch_size": 8, "threads": 1, "device": "cpu", "stages": [{"epochs": 3, "peak_lr": 3e-3}]}
    config = tiny_config(teach={"parent": few, "teacher": few}, fold={"held_out": targets[-1:]}, target=target)
    teachers = teach(corpus, config, tmp_path / "teachers", quiet=True)
    fold = make_fold(corpus, config.fold)
    recordings = parts_of(corpus, fold, config).train
    indexes: dict[Kind, Index] = make_targets(corpus, teachers, fold, recordings, config, tmp_path / "targets")
    assert len(indexes["ctc"].recordings) == len(recordings)
    found = diagnose(tmp_path / "targets", corpus, teachers=[teachers])
    assert problems(found) == []
    assert "audio-hash" in {p.check for p in found.passed}
    assert TOKENIZER.fingerprint != indexes["ctc"].tokenizer
