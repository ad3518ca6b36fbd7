"""From what teachers say to targets: whom a study or `xded targets` lets answer, and what is kept of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cli_calls import call, done
from tiny_corpus import tiny_config, write_corpus
from xded.config import Config
from xded.corpus.folds import Provenance, make_fold
from xded.corpus.manifest import Corpus, Recording
from xded.decoding import word_list_scores
from xded.errors import ConfigError
from xded.models.recogniser import load_recogniser
from xded.targets.aggregate import combine, dense, top_k
from xded.targets.asking import PARENT
from xded.targets.store import Entry, Index, Kind, Posterior, Store, StoreWriter, TargetError, audio_hash, read_index
from xded.teachers.adapt import Teachers, parts_of, teach
from xded.teachers.aggregation import aggregate_all, make_targets, voices_of
from xded.teachers.posteriors import extract
from xded.tokenizer import Tokenizer
from xded.training.data import TrainingData
from xded.training.evaluation import recognise

KINDS: tuple[Kind, ...] = ("ctc", "decoder", "words")
WORDS = ("AB", "BAD", "CAB", "DA")
TARGETS = ("t1", "t2", "t3")
ONE_EPOCH = {"batch_size": 8, "threads": 1, "device": "cpu", "stages": [{"epochs": 1, "peak_lr": 1e-3}]}
SURE = 0.98


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A control, three target speakers, four words, two takes: 32 recordings."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), ("c1",), TARGETS)


def config_of(**target: Any) -> Config:
    sections = {"objective": {"word_kd": 1.0}, "target": {"top_k": 4, **target}, "fold": {"held_out": ("t3",)}}
    teaching = {"parent": ONE_EPOCH, "teacher": ONE_EPOCH, "parent_on": "controls"}
    return tiny_config(teach=teaching, **sections)


# --- posteriors that are made up -----------------------------------------------------------------------------


def sometimes_right(teacher: str, recording: Recording) -> str:
    """What a teacher of `Council` hears."""
    if teacher == "t2":
        return recording.text
    place = WORDS.index(recording.text) + int(recording.take[-1]) + int(recording.speaker[1]) + 2
    return WORDS[(place + (teacher == PARENT)) % 4]


class Council:
    """Teachers of t1, t2 and t3 and the parent, whose answers are written by hand; t3 is held out.

    The teacher of t2 always hears the prompt, the others hear it sometimes, unless `heard` says otherwise.
    """

    def __init__(self, corpus: Corpus, folder: Path, heard: Callable[[str, Recording], str] | None = None) -> None:
        self.corpus, self.folder, self.heard = corpus, folder, heard or sometimes_right
        self.tokenizer = Tokenizer.train(corpus.texts, "char", 64, "upper")
        self.train = [r for r in corpus.recordings if r.speaker != "t3"]
        for teacher in (*TARGETS, PARENT):
            for kind in KINDS:
                self.write(teacher, kind)

    def write(self, teacher: str, kind: Kind, words: Sequence[str] = WORDS, unknown: str = "") -> None:
        tokenizer = self.tokenizer
        vocabulary = len(words) if kind == "words" else tokenizer.size
        index = Index(
            kind=kind, temperature=2.0, top_k=min(4, vocabulary), vocabulary=vocabulary,
            frame_rate_hz=25.0 if kind == "ctc" else None, teacher_forced=kind == "decoder",
            tokenizer=tokenizer.fingerprint, teachers=(teacher,), teacher_hashes={teacher: teacher * 4},
            provenance=(Provenance(f"teacher {teacher}", frozenset({teacher}), frozenset({f"{teacher}_AB_0"})),),
            words=tuple(words) if kind == "words" else (),
        )  # fmt: skip
        writer = StoreWriter(self.folder / teacher / kind, index)
        for recording in self.corpus.recordings:
            text = self.heard(teacher, recording)
            ids = self.ids(text, recording, kind)
            right = text == recording.text
            log_prob = float(np.log(SURE if right else 0.01))
            entry = Entry(recording.recording, audio_hash(recording), len(ids), true_log_prob=log_prob, text=text)
            nothing: dict[str, Any] = {unknown: None} if unknown else {}
            writer.add(replace(entry, **nothing), self.posterior(ids, vocabulary))
        writer.close()

    def ids(self, text: str, recording: Recording, kind: Kind) -> list[int]:
        tokens = self.tokenizer.encode(text)
        if kind == "words":
            return [WORDS.index(text)]
        if kind == "ctc":
            frames = [id for token in tokens for id in (token, self.tokenizer.blank)]
            return (frames + [self.tokenizer.blank] * 8)[:8]
        steps = len(self.tokenizer.encode(recording.text)) + 1
        return [*tokens, self.tokenizer.eos, *tokens][:steps]  # what follows </s> is not to be read

    def posterior(self, ids: Sequence[int], vocabulary: int) -> Posterior:
        full = np.full((len(ids), vocabulary), (1 - SURE) / (vocabulary - 1), np.float32)
        full[np.arange(len(ids)), ids] = SURE
        return top_k(full, 4, full[:, self.tokenizer.blank] if vocabulary > 4 else np.zeros(len(ids), np.float32))

    def decide(self, out: Path, teachers: Sequence[str] = ("t1", "t2", PARENT), **target: Any) -> dict[Kind, Store]:
        folders = {teacher: self.folder / teacher for teacher in teachers}
        asked = dict.fromkeys(teachers, self.corpus.recordings)
        made = aggregate_all(folders, asked, self.train, self.corpus, self.tokenizer, config_of(**target), out)
        assert tuple(made) == KINDS
        return {kind: Store(out / kind) for kind in made}


@pytest.fixture(scope="module")
def council(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Council:
    return Council(corpus, tmp_path_factory.mktemp("council"))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_elitist_choice_finds_the_teacher_that_is_right(council: Council, tmp_path: Path) -> None:
    """Of each recording its own best: t2 where t1 errs, and the first name where both are right."""
    for kind, store in council.decide(tmp_path, weighting="reliability", best=1).items():
        assert store.index.best == 1
        assert store.index.effective_teachers == 1.0
        for recording, entry in zip(council.train, store.index.recordings, strict=True):
            chosen = "t1" if council.heard("t1", recording) == recording.text else "t2"
            assert list(entry.weight) == [chosen]
            assert entry.text == recording.text
            alone = Store(council.folder / chosen / kind)
            said = dense(alone.read(recording.recording), alone.index.vocabulary)
            np.testing.assert_allclose(dense(store.read(recording.recording), len(said[0])), said, atol=2e-3)
    assert {next(iter(e.weight)) for e in store.index.recordings} == {"t1", "t2"}


@pytest.mark.parametrize("weighting", ["reliability", "confidence", "band", "accuracy", "likelihood"])
def test_every_weighting_serves_every_kind_and_no_order_matters(
    council: Council, tmp_path: Path, weighting: str
) -> None:
    there = council.decide(tmp_path / "there", ("t1", "t2"), weighting=weighting)
    council.decide(tmp_path / "turned", ("t2", "t1"), weighting=weighting)
    council.decide(tmp_path / "best", ("t1", "t2"), weighting=weighting, best=2)
    assert bytes_of(tmp_path / "there") == bytes_of(tmp_path / "turned")
    for kind, store in there.items():
        weights = [entry.weight for entry in store.index.recordings]
        assert all(set(weight) == {"t1", "t2"} and min(weight.values()) > 0 for weight in weights)
        best = Store(tmp_path / "best" / kind)
        assert best.index.recordings == store.index.recordings
        assert (tmp_path / "best" / kind / "shard_000.safetensors").read_bytes() == (
            tmp_path / "there" / kind / "shard_000.safetensors"
        ).read_bytes()
    # t2 is always right: on the whole, and where t1 errs
    right = [council.heard("t1", recording) == recording.text for recording in council.train]
    if weighting in ("accuracy", "likelihood"):
        assert all(w["t2"] > w["t1"] for w in weights)
    if weighting == "reliability":
        assert [w["t2"] == w["t1"] for w in weights] == right


@pytest.mark.parametrize("weighting", ["accuracy", "likelihood"])
def test_what_does_not_train_has_no_part_in_weights(corpus: Corpus, tmp_path: Path, weighting: str) -> None:
    """Held-out speakers, takes of validation: the teachers were asked about them, one piece of a study serves all."""
    made = Council(corpus, tmp_path / "council")
    made.train = [r for r in made.train if (r.speaker, r.text) != ("t2", "DA")]
    trains = {r.recording for r in made.train}
    before = made.decide(tmp_path / "before", ("t1", "t2"), weighting=weighting)["ctc"].index.recordings
    old = read_index(made.folder / "t1" / "ctc")
    made.heard = lambda t, r: sometimes_right(t, r) if r.recording in trains else "CAB"
    made.write("t1", "ctc")
    new = read_index(made.folder / "t1" / "ctc")
    changed = [b for a, b in zip(old.recordings, new.recordings, strict=True) if a != b]
    assert {entry.recording[:2] for entry in changed} == {"t2", "t3"}
    assert not {entry.recording for entry in changed} & trains
    assert made.decide(tmp_path / "after", ("t1", "t2"), weighting=weighting)["ctc"].index.recordings == before


def test_spelled_only_keeps_exactly_the_recordings_that_are_spelled(council: Council, tmp_path: Path) -> None:
    everything = council.decide(tmp_path / "all", ("t1",))
    kept = council.decide(tmp_path / "kept", ("t1",), spelled_only=True)
    for kind in KINDS:
        assert not everything[kind].index.spelled_only
        assert kept[kind].index.spelled_only
        assert [e.recording for e in everything[kind].index.recordings] == [r.recording for r in council.train]
        right = {r.recording for r in council.train if council.heard("t1", r) == r.text}
        assert 0 < len(right) < len(council.train)
        assert {e.recording for e in kept[kind].index.recordings} == right
        assert everything[kind].dropped == frozenset()
        assert kept[kind].dropped == {r.recording for r in council.train} - right
        for recording in council.train:
            assert (recording.recording in kept[kind]) == (recording.recording in right)
            spells = everything[kind].entry(recording.recording).text == recording.text
            assert spells == (recording.recording in right)
            if recording.recording in right:
                one, other = (made[kind].read(recording.recording) for made in (everything, kept))
                np.testing.assert_array_equal(one.probabilities, other.probabilities)


def test_the_text_of_decoder_steps_ends_at_the_first_end(corpus: Corpus, tmp_path: Path) -> None:
    """DA where BAD was said has a step left after </s>; BAD where DA was said has a letter in the place of </s>."""
    other = {"BAD": "DA", "DA": "BAD"}
    made = Council(corpus, tmp_path / "council", lambda teacher, recording: other.get(recording.text, recording.text))
    store = made.decide(tmp_path / "out", ("t1",))["decoder"]
    assert {(r.text, store.entry(r.recording).text) for r in made.train} == {
        ("AB", "AB"), ("CAB", "CAB"), ("BAD", "DA"), ("DA", "BAD"),
    }  # fmt: skip
    assert {store.entry(r.recording).steps for r in made.train if r.text == "BAD"} == {4}


def test_own_teachers_answer_their_speakers_and_the_parent_the_others(council: Council, tmp_path: Path) -> None:
    for kind, store in council.decide(tmp_path, asked="own").items():
        assert store.index.asked == "own"
        assert PARENT in store.index.teachers
        assert store.index.teacher_hashes[PARENT] == PARENT * 4
        assert f"teacher {PARENT}" in {p.what for p in store.index.provenance}
        for recording, entry in zip(council.train, store.index.recordings, strict=True):
            who = PARENT if recording.speaker == "c1" else recording.speaker
            assert entry.weight == {who: 1.0}
            alone = Store(council.folder / who / kind).read(recording.recording)
            size = store.index.vocabulary
            np.testing.assert_allclose(dense(store.read(recording.recording), size), dense(alone, size), atol=2e-3)


def test_own_teacher_and_parent_answer_together(council: Council, tmp_path: Path) -> None:
    stores = council.decide(tmp_path, asked="own_and_parent", weighting="reliability", aggregation="prob_mean")
    for kind, store in stores.items():
        for recording, entry in zip(council.train, store.index.recordings, strict=True):
            who = [PARENT] if recording.speaker == "c1" else [PARENT, recording.speaker]
            assert sorted(entry.weight) == sorted(who)
            said = [Store(council.folder / t / kind).read(recording.recording) for t in entry.weight]
            size = store.index.vocabulary
            expected = combine(said, list(entry.weight.values()), "prob_mean", size)
            np.testing.assert_allclose(dense(store.read(recording.recording), size), expected, atol=2e-3)


def test_a_parent_that_was_asked_is_not_heard_among_all(council: Council, tmp_path: Path) -> None:
    council.decide(tmp_path / "with")
    council.decide(tmp_path / "without", ("t1", "t2"))
    assert bytes_of(tmp_path / "with") == bytes_of(tmp_path / "without")


@pytest.mark.parametrize("asked", ["own", "own_and_parent"])
def test_a_parent_that_is_needed_and_not_there_is_asked_for(council: Council, tmp_path: Path, asked: str) -> None:
    with pytest.raises(TargetError, match=rf"target\.asked is {asked}, and there are no ctc posteriors of the parent"):
        council.decide(tmp_path, ("t1", "t2"), asked=asked)


def test_lists_of_words_that_differ_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    made = Council(corpus, tmp_path / "council")
    made.write("t2", "words", tuple(reversed(WORDS)))
    with pytest.raises(TargetError, match="t2 were asked about another list of words than t1"):
        made.decide(tmp_path / "out")


@pytest.mark.parametrize(
    ("weighting", "missing"), [("accuracy", "text"), ("likelihood", "true_log_prob"), ("reliability", "true_log_prob")]
)
def test_what_imported_teachers_do_not_say_is_refused(
    corpus: Corpus, tmp_path: Path, weighting: str, missing: str
) -> None:
    made = Council(corpus, tmp_path / "council")
    made.write("t1", "ctc", unknown=missing)
    with pytest.raises(TargetError, match=r"not on record (what|how probable) teacher t1") as error:
        made.decide(tmp_path / "out", weighting=weighting)
    assert "uniform, confidence or band" in error.value.remedy


def test_words_of_all_teachers_are_needed_where_they_are_read(corpus: Corpus, tmp_path: Path) -> None:
    made = Council(corpus, tmp_path / "council")
    shutil.rmtree(made.folder / "t1" / "words")
    with pytest.raises(TargetError, match="targets of words, and there are none of teachers t1"):
        made.decide(tmp_path / "out")


def test_effective_teachers_by_band(council: Council, tmp_path: Path) -> None:
    index = council.decide(tmp_path, asked="own_and_parent")["ctc"].index
    groups = {r.recording: "nobody" if r.speaker == "c1" else "somebody" for r in council.train[:-1]}
    assert index.effective_by(groups) == {"nobody": 1.0, "somebody": 2.0}
    assert index.effective_teachers == pytest.approx((8 * 1 + 16 * 2) / 24)


def test_stores_of_earlier_versions_are_read(council: Council, tmp_path: Path) -> None:
    council.decide(tmp_path)
    path = tmp_path / "ctc" / "index.json"
    told = json.loads(path.read_text())
    for name in ("asked", "best", "spelled_only", "dropped", "words"):
        del told[name]
    for row in told["recordings"]:
        del row["text"]
    path.write_text(json.dumps(told))
    store = Store(tmp_path / "ctc")
    assert (store.index.asked, store.index.best, store.index.spelled_only, store.index.words) == (
        "all",
        None,
        False,
        (),
    )
    assert store.entry(council.train[0].recording).text is None
    assert len(store.read(council.train[0].recording).ids) == 8


def test_who_was_never_asked_about_was_not_dropped(council: Council, tmp_path: Path) -> None:
    folders, asked = {"t1": council.folder / "t1"}, {"t1": council.train[:-5]}
    config = config_of(spelled_only=True)
    aggregate_all(folders, asked, council.train, council.corpus, council.tokenizer, config, tmp_path)
    store = Store(tmp_path / "ctc")
    assert store.dropped
    assert not any(r.recording in store or r.recording in store.dropped for r in council.train[-5:])


def test_a_store_that_does_not_say_what_it_dropped_is_made_anew(council: Council, tmp_path: Path) -> None:
    """Earlier versions did not: nothing told what was dropped from what was missing."""
    council.decide(tmp_path, ("t1",), spelled_only=True)
    path = tmp_path / "ctc" / "index.json"
    told = json.loads(path.read_text())
    del told["dropped"]
    path.write_text(json.dumps(told))
    with pytest.raises(TargetError, match=r"not on record which recordings were dropped.*Delete .* make it anew"):
        Store(tmp_path / "ctc")


# --- posteriors of real teachers -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teachers(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Teachers:
    """Of t1, t2 and t3, who is held out of the targets; the parent has heard c1."""
    config = config_of()
    everyone = config.model_copy(update={"fold": config.fold.model_copy(update={"held_out": ()})})
    return teach(corpus, everyone, tmp_path_factory.mktemp("teachers"), quiet=True)


def train_of(corpus: Corpus, config: Config) -> Sequence[Recording]:
    return parts_of(corpus, make_fold(corpus, config.fold), config).train


def targets_of(corpus: Corpus, teachers: Teachers, config: Config, out: Path) -> Mapping[Kind, Index]:
    return make_targets(corpus, teachers, make_fold(corpus, config.fold), train_of(corpus, config), config, out)


def test_posteriors_come_with_what_the_teacher_hears_and_with_words(
    corpus: Corpus, teachers: Teachers, tmp_path: Path
) -> None:
    config, train = config_of(), train_of(corpus, config_of())
    extract(teachers.parent / "best.pt", PARENT, train, config, tmp_path, corpus.texts)
    recogniser = load_recogniser(teachers.parent)
    data = TrainingData(train, recogniser.student.front_end, recogniser.tokenizer)
    heard = [p.hypothesis for p in recognise(recogniser.student, data, config.decode)]
    stores = {kind: Store(tmp_path / kind) for kind in KINDS}
    for store in stores.values():
        assert [e.text for e in store.index.recordings] == heard
        assert store.index.teachers == (PARENT,)
    words = stores["words"]
    assert words.index.words == WORDS
    assert (words.index.vocabulary, words.index.top_k) == (4, 4)
    tokens = [tuple(recogniser.tokenizer.encode(word)) for word in WORDS]
    for place in (0, 7, 20):
        features = torch.from_numpy(data.features(place))[None]
        with torch.inference_mode():
            encoded, lengths = recogniser.student.encode(features, torch.tensor([features.shape[1]]))
            scores = word_list_scores(recogniser.student, encoded, lengths, tokens, 1.0, recogniser.tokenizer)[0]
        said = words.read(train[place].recording)
        assert said.ids.shape == (1, 4)
        np.testing.assert_allclose(dense(said, 4)[0], torch.softmax(scores / 2.0, 0), atol=2e-3)
        true = torch.log_softmax(scores, 0)[WORDS.index(train[place].text)]
        assert words.entry(train[place].recording).true_log_prob == pytest.approx(float(true), abs=1e-3)


def test_words_are_asked_for_only_where_the_objective_reads_them(
    corpus: Corpus, teachers: Teachers, tmp_path: Path
) -> None:
    plain = config_of().model_copy(update={"objective": tiny_config().objective})
    assert set(targets_of(corpus, teachers, plain, tmp_path)) == {"ctc", "decoder"}
    assert not list(tmp_path.rglob("words"))
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("posteriors/*/*/*.safetensors")}
    made = targets_of(corpus, teachers, config_of(), tmp_path)
    assert tuple(made) == KINDS
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # only the words were asked for
    assert {e.text for e in made["words"].recordings} <= set(WORDS)


def test_a_recording_whose_text_is_not_listed_is_refused(corpus: Corpus, teachers: Teachers, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="word list does not have DA"):
        extract(teachers.parent / "best.pt", PARENT, corpus.recordings, config_of(), tmp_path, WORDS[:3])
    with pytest.raises(TargetError, match="need a list of words"):
        extract(teachers.parent / "best.pt", PARENT, corpus.recordings, config_of(), tmp_path)


def test_posteriors_without_texts_are_made_anew(corpus: Corpus, teachers: Teachers, tmp_path: Path) -> None:
    arguments = teachers.teacher("t1") / "best.pt", "t1", corpus.recordings[:6], config_of(), tmp_path, WORDS
    extract(*arguments)
    path = tmp_path / "ctc" / "index.json"
    told = json.loads(path.read_text())
    for row in told["recordings"]:
        del row["text"]
    path.write_text(json.dumps(told))
    extract(*arguments)
    assert all(entry.text is not None for entry in read_index(tmp_path / "ctc").recordings)


def test_only_who_is_listened_to_is_asked(corpus: Corpus, teachers: Teachers, tmp_path: Path) -> None:
    own = targets_of(corpus, teachers, config_of(asked="own"), tmp_path / "own")
    assert own["ctc"].teachers == (PARENT, "t1", "t2")
    told = {p.name: {e.recording[:2] for e in read_index(p / "ctc").recordings} for p in tmp_path.glob("own/post*/*")}
    assert told == {PARENT: {"c1"}, "t1": {"t1"}, "t2": {"t2"}}
    both = targets_of(corpus, teachers, config_of(asked="own_and_parent", weighting="accuracy"), tmp_path / "both")
    assert all(len(e.weight) == (1 if e.recording.startswith("c1") else 2) for e in both["ctc"].recordings)
    assert {"parent", "teacher t1", "teacher t2"} <= {p.what for p in both["ctc"].provenance}


def test_voices_are_of_the_training_recordings(
    corpus: Corpus, teachers: Teachers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(weighting="embedding")
    train = train_of(corpus, config)
    voices, provenance = voices_of(teachers.parent / "best.pt", train, 4)
    assert set(voices) == {"c1", "t1", "t2"}
    alone, _ = voices_of(teachers.parent / "best.pt", train, 1)
    for speaker in voices:
        np.testing.assert_allclose(voices[speaker], alone[speaker], atol=1e-5)
    opened = set()
    real = TrainingData.features

    def features(self: TrainingData, index: int, *view: Any) -> np.ndarray:
        opened.add(self.recordings[index].recording)
        return real(self, index, *view)

    monkeypatch.setattr(TrainingData, "features", features)
    made = targets_of(corpus, teachers, config, tmp_path)
    assert opened == {r.recording for r in train}
    for entry in made["ctc"].recordings:
        own = entry.recording[:2]
        if own in entry.weight:
            assert entry.weight[own] == max(entry.weight.values())
    assert set(provenance) <= set(made["ctc"].provenance)


def test_a_parent_that_compares_voices_is_in_the_provenance(
    council: Council, teachers: Teachers, tmp_path: Path
) -> None:
    """Also where no teacher comes from it."""
    folders = {teacher: council.folder / teacher for teacher in ("t1", "t2")}
    asked, parent = dict.fromkeys(folders, council.train), teachers.parent / "best.pt"
    common = folders, asked, council.train, council.corpus, council.tokenizer, config_of(weighting="embedding")
    made = aggregate_all(*common, tmp_path, parent)
    heard = {p.what: p.speakers for p in made["words"].provenance}
    assert heard["parent"] == {"c1"}
    with pytest.raises(TargetError, match="needs the parent's checkpoint"):
        aggregate_all(*common, tmp_path)


def test_choices_that_do_not_fit_are_refused_before_anything_is_asked(
    corpus: Corpus, teachers: Teachers, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="takes every teacher for as good"):
        targets_of(corpus, teachers, config_of(best=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    orphans = Teachers(tmp_path / "orphans")
    (orphans.folder / "teachers").mkdir(parents=True)
    for path in (teachers.folder / "teachers").iterdir():
        (orphans.folder / "teachers" / path.name).symlink_to(path)
    orphans.tokenizer.symlink_to(teachers.tokenizer)
    with pytest.raises(TargetError, match=r"has no parent, and target\.asked is own_and_parent"):
        targets_of(corpus, orphans, config_of(asked="own_and_parent"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_who_was_not_asked_and_how_many_are_heard(
    corpus: Corpus, teachers: Teachers, tmp_path: Path
) -> None:
    common = ["targets", "--corpus", corpus.path, "--teachers", teachers.folder, "--jobs", 1, "--top-k", 4]
    common += ["--held-out", "t3", "--asked", "own_and_parent", "--out", tmp_path]
    said = done(*common).out.splitlines()
    assert said[0] == "Not asked: t3 (held out)."
    assert said[1].startswith("ctc: 21 of 21 training recordings, 3 teachers (1.67 effective), ")
    choices = ["--weighting", "reliability", "--best", 1, "--exclude", "t1", "--not-spelled-only", "--json"]
    told = json.loads(done(*common, *choices).out)["ctc"]
    assert told["not_asked"] == {"t1": "excluded", "t3": "held out"}
    assert (told["teachers"], told["effective_teachers"]) == (["parent", "t2"], 1.0)
    strange = call(*common, "--spelled-only")
    assert strange.code == 0
    dropped = len(read_index(tmp_path / "ctc").dropped)
    assert f"  {dropped} recordings have no target: no mean spells their text." in strange.out
