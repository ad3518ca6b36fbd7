import json
from pathlib import Path

import pytest

from xded.config import FoldConfig
from xded.corpus.folds import Fold, Provenance, coverage, guard, key_of, make_fold, split
from xded.corpus.manifest import Corpus, Recording
from xded.errors import ConfigError, CorpusError, LeakageError

METADATA = Path(__file__).resolve().parents[2] / "shared" / "reference" / "teacher_metadata"
OPTIONS = {"controls": True, "validation": "takes", "validation_fraction": 0.2, "seed": 0}


def make_corpus(targets=("M01", "M05", "M08", "F02"), controls=("CF02", "CM04"), words=10, mics=("M2", "M3")):
    recordings = []
    for speaker in (*targets, *controls):
        for word in range(words):
            for mic in mics:
                take = f"{speaker}_B1_CW{word}"
                recordings.append(
                    Recording(
                        audio_filepath=Path(f"/{take}_{mic}.wav"), duration=1, text=f"W{word}", speaker=speaker,
                        recording=f"{take}_{mic}", take=take, prompt=f"CW{word}", block="B1", mic=mic,
                        role="control" if speaker in controls else "target",
                    )
                )  # fmt: skip
    return Corpus(Path("manifest.jsonl"), tuple(recordings))


def takes(recordings):
    return {recording.take for recording in recordings}


def speakers(recordings):
    return {recording.speaker for recording in recordings}


def test_make_fold_checks_its_names():
    corpus = make_corpus()
    fold = make_fold(corpus, FoldConfig(held_out=("M08",), exclude=("M01",), include_held_out=True))
    assert fold == Fold(("M08",), ("M01",), True)
    with pytest.raises(CorpusError, match="no speaker 'M8' \\(did you mean 'M08'\\?\\)"):
        make_fold(corpus, FoldConfig(held_out=("M8",)))
    with pytest.raises(ConfigError, match="M08: held out and excluded"):
        make_fold(corpus, FoldConfig(held_out=("M08",), exclude=("M08",)))
    with pytest.raises(ConfigError, match="no speaker to train on"):
        make_fold(corpus, FoldConfig(held_out=corpus.speakers))


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("validation", ["takes", "speakers"])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_take_is_in_two_parts_and_copies_stay_together(include, validation, seed):
    corpus = make_corpus()
    fold = Fold(("M08",), ("M01",), include)
    parts = split(corpus, fold, **OPTIONS | {"validation": validation, "seed": seed})
    sets = [takes(part) for part in (parts.train, parts.validation, parts.test)]
    assert not (sets[0] & sets[1])
    assert not (sets[0] & sets[2])
    assert not (sets[1] & sets[2])
    assert all(len(part) == 2 * len(names) for part, names in zip(vars(parts).values(), sets, strict=True))
    assert sum(len(part) for part in vars(parts).values()) == len(corpus.recordings) - 20
    assert "M01" not in speakers(parts.train + parts.validation + parts.test)
    assert speakers(parts.test) == {"M08"}


def test_held_out_speaker_is_only_tested_unless_included():
    corpus = make_corpus()
    parts = split(corpus, Fold(("M08",)), **OPTIONS)
    assert len(takes(parts.test)) == 10
    assert "M08" not in speakers(parts.train + parts.validation)
    parts = split(corpus, Fold(("M08",), include_held_out=True), **OPTIONS)
    assert len(takes(parts.test)) == 5
    assert len([take for take in takes(parts.train + parts.validation) if take.startswith("M08")]) == 5


def test_validation_takes_are_the_same_share_of_every_speaker():
    parts = split(make_corpus(), Fold(("M08",)), **OPTIONS)
    for speaker in ("M01", "M05", "F02", "CF02", "CM04"):
        assert len([take for take in takes(parts.validation) if take.startswith(speaker)]) == 2
    words = {frozenset(r.prompt for r in parts.validation if r.speaker == speaker) for speaker in ("M01", "M05", "F02")}
    assert len(words) > 1  # each speaker's takes are drawn by themselves, not the same words of all
    assert split(make_corpus(), Fold(("M08",)), **OPTIONS | {"validation_fraction": 0}).validation == ()


@pytest.mark.parametrize("seed", range(6))
def test_validation_speakers_are_whole_target_speakers(seed):
    parts = split(make_corpus(), Fold(("M08",)), **OPTIONS | {"validation": "speakers", "seed": seed})
    (kept,) = speakers(parts.validation)
    assert kept in {"M01", "M05", "F02"}
    assert len(takes(parts.validation)) == 10
    assert kept not in speakers(parts.train)


def test_controls_train_only_when_asked():
    parts = split(make_corpus(), Fold(("M08",)), **OPTIONS | {"controls": False})
    assert speakers(parts.train + parts.validation) == {"M01", "M05", "F02"}
    held_out_control = split(make_corpus(), Fold(("CF02",)), **OPTIONS | {"controls": False})
    assert speakers(held_out_control.test) == {"CF02"}


def test_split_depends_on_the_seed_alone_and_not_on_other_speakers_or_order():
    corpus = make_corpus()
    first = split(corpus, Fold(("M08",)), **OPTIONS)
    assert split(corpus, Fold(("M08",)), **OPTIONS) == first
    assert takes(split(corpus, Fold(("M08",)), **OPTIONS | {"seed": 1}).validation) != takes(first.validation)
    shuffled = Corpus(corpus.path, corpus.recordings[::-1])
    assert takes(split(shuffled, Fold(("M08",)), **OPTIONS).validation) == takes(first.validation)
    fewer = split(corpus, Fold(("M08",), ("M01",)), **OPTIONS)
    assert takes(fewer.validation) == {take for take in takes(first.validation) if not take.startswith("M01")}


def test_nothing_left_to_train_on_is_an_error():
    corpus = make_corpus(targets=("M08",), controls=("CF02",))
    with pytest.raises(CorpusError, match="no recording is left to train on"):
        split(corpus, Fold(("M08",)), **OPTIONS | {"controls": False})


def test_guard_names_artefact_speakers_and_takes():
    fold = Fold(("M08",), ("M01",))
    guard(fold, [Provenance("the parent", frozenset({"CF02"})), Provenance("teacher M05", frozenset({"CF02", "M05"}))])
    with pytest.raises(LeakageError) as caught:
        guard(
            fold,
            [
                Provenance("teacher M08", frozenset({"M08"}), frozenset({"M08_B1_CW1"})),
                Provenance("the normaliser", frozenset({"M01", "M05"})),
                Provenance("the student", frozenset({"M05"}), frozenset({"M05_B1_CW1"})),
            ],
            test_takes={"M08_B1_CW1"},
        )
    said = caught.value.problem
    assert "teacher M08 has heard held-out speaker M08 (1 test takes: M08_B1_CW1)" in said
    assert "the normaliser has heard excluded speaker M01" in said
    assert "the student" not in said


@pytest.mark.parametrize("what", ["the parent", "teacher M05", "targets", "the normaliser", "model selection"])
def test_guard_catches_each_artefact_of_a_real_split(what):
    corpus, fold = make_corpus(), Fold(("M08",))
    parts = split(corpus, fold, **OPTIONS)
    tested = takes(parts.test)
    guard(fold, [Provenance(what, frozenset(speakers(parts.train)), frozenset(takes(parts.train)))], tested)
    planted = (*parts.train, parts.test[3])
    with pytest.raises(LeakageError, match=what):
        guard(fold, [Provenance(what, frozenset(speakers(planted)), frozenset(takes(planted)))], tested)


def test_guard_of_an_including_fold_forbids_test_takes_only():
    corpus, fold = make_corpus(), Fold(("M08",), include_held_out=True)
    parts = split(corpus, fold, **OPTIONS)
    tested = takes(parts.test)
    guard(fold, [Provenance("student", frozenset(speakers(parts.train)), frozenset(takes(parts.train)))], tested)
    with pytest.raises(LeakageError, match=f"student has heard 5 test takes .*{min(tested)}"):
        guard(fold, [Provenance("student", frozenset({"M08"}), frozenset(tested))], tested)
    with pytest.raises(LeakageError, match="does not say which takes"):
        guard(fold, [Provenance("parent", frozenset({"M08"}))], tested)
    with pytest.raises(ValueError, match="test_takes"):
        guard(fold, [])


def test_coverage_modes():
    keys = [("B1", f"CW{number}", "M2") for number in range(3)]
    recorded = {"a": keys, "b": keys[:2], "c": keys[:1]}
    assert coverage(recorded, "strict", 1) == {keys[0]: ("a", "b", "c")}
    assert coverage(recorded, "partial", 2) == {keys[0]: ("a", "b", "c"), keys[1]: ("a", "b")}
    assert coverage(recorded, "all", 9)[keys[2]] == ("a",)
    with pytest.raises(CorpusError, match=r"covered by 4 teachers .*at most 3"):
        coverage(recorded, "partial", 4)
    with pytest.raises(CorpusError, match="no teachers"):
        coverage({}, "all", 1)


def test_key_of_a_recording_without_block_or_microphone():
    recording = make_corpus().recordings[0]
    assert key_of(recording) == ("B1", "CW0", "M2")
    assert key_of(recording.model_copy(update={"block": None, "mic": None})) == ("", "CW0", "")


@pytest.mark.parametrize(
    ("left_out", "teachers", "strict", "twelve", "ten", "mean", "every"),
    [
        (["M08"], 14, 693, 1506, 1530, 13.24, 1785),
        (["M05"], 14, 693, 1506, 1530, 13.24, 1785),
        (["M08", "M01"], 13, 1155, 1506, 1530, 12.74, 1785),
        (["M05", "M01"], 13, 1155, 1506, 1530, 12.74, 1785),
        (["M16"], 14, 693, 1506, 1760, 12.82, 1785),
        (["M01"], 14, 1155, 1530, 1760, 13.25, 1785),  # also M08 included with M01 excluded: the study's own run
    ],
)
def test_coverage_of_the_reference_study(left_out, teachers, strict, twelve, ten, mean, every):
    if not METADATA.is_dir():
        pytest.skip(f"{METADATA} is absent")
    recorded = {}
    for path in METADATA.glob("*_metadata.json"):
        data = json.loads(path.read_text())
        if data["model_name"] not in left_out:
            recorded[data["model_name"]] = {tuple(name.split("_")[1:]) for name in data["utterance_ids"]}
    assert len(recorded) == teachers
    assert len(coverage(recorded, "strict", 1)) == strict
    assert len(coverage(recorded, "partial", 12)) == twelve
    kept = coverage(recorded, "partial", 10)
    assert len(kept) == ten
    assert sum(map(len, kept.values())) / len(kept) == pytest.approx(mean, abs=0.005)
    assert len(coverage(recorded, "all", 1)) == every
