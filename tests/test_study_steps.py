"""A study as pieces: what two attempts have in common is one piece, and whatever changes a result changes its key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile

from tiny_corpus import WORDS, write_corpus
from tiny_study import CONFIG, CTC_KD, DECODER_KD, TRAIN, tiny_study
from xded.corpus.manifest import Corpus, Recording, read_corpus, write_manifest
from xded.errors import ConfigError, CorpusError
from xded.scoring import Prediction, is_right, read_predictions
from xded.study import folder, pieces, steps
from xded.study.plan import StudyError
from xded.study.planner import Planner
from xded.study.steps import Work
from xded.tokenizer import Tokenizer

FOUR: dict[str, Any] = {"included": {"include_held_out": True, **CTC_KD}, "held out": CTC_KD, "scratch": {},
                        "from the parent": {"start": "parent"}}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"), controls=("c1", "c2"), targets=("t1", "t2", "t3"))


def plan(corpus: Corpus, out: Path, attempts: Mapping[str, Any] = FOUR, **changes: Any) -> Work:
    return Planner(tiny_study(corpus, attempts, **changes), corpus, out).plan()


def keys(work: Work, *kinds: str) -> set[str]:
    return {step.key for step in work.steps if not kinds or step.kind in kinds}


def test_what_attempts_folds_and_seeds_have_in_common_is_done_once(corpus: Corpus, tmp_path: Path) -> None:
    work = plan(corpus, tmp_path, seeds=[0, 1], baselines=True)
    kinds = Counter(step.kind for step in work.steps)
    # one parent, a teacher a speaker, what each says of all recordings; targets: 3 folds, included and held out
    assert kinds == {"parent": 1, "teacher": 3, "posteriors": 3, "targets": 6, "attempt": 24, "test": 3 * 3}
    assert work.single_runs == 2 * 3 * (7 + 7 + 1 + 2) + 9
    assert len({step.folder for step in work.steps}) == len(work.steps)
    order = {step.key: place for place, step in enumerate(work.steps)}
    assert all(order[need] < order[step.key] for step in work.steps for need in step.needs)
    first = [c.key for c in work.cells if c.seed == 0]  # a budget that is too small leaves out seeds, not folds
    assert max(order[key] for key in first) < min(order[c.key] for c in work.cells if c.seed == 1)


def test_zero_shot_is_judged_as_its_own_tokenizer_judges(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = corpus.select(["t1"])[:3]
    heard = [
        Prediction(r.recording, r.take, r.speaker, None, None, r.prompt, reference, hypothesis, ())
        for r, reference, hypothesis in zip(test, ("X-RAY", "TWO", "TO"), (" x-ray.", "Two!", "Two?"), strict=True)
    ]
    monkeypatch.setattr(pieces, "recognise", lambda *_, **__: heard)
    pieces.ask_zero_shot(Path(__file__).parent / "data" / "nemo_golden.nemo", test, corpus.texts, tmp_path)
    for decode in pieces.DECODES:
        kept = read_predictions(pieces.predictions_in(tmp_path, decode))
        assert [is_right(prediction, "upper") for prediction in kept] == [True, True, False]
        assert kept[2].hypothesis == "two"


def test_whether_the_tested_words_were_heard_is_measured(corpus: Corpus, tmp_path: Path) -> None:
    assert plan(corpus, tmp_path, held_out=["t1"]).words_heard == "seen"
    own = [r for r in corpus.recordings if r.speaker != "t1" or r.text == WORDS[0]]  # t1 says nothing else ...
    others = [r for r in own if r.speaker == "t1" or r.text != WORDS[0]]  # ... and nobody else says that
    write_manifest(tmp_path / "few" / "manifest.jsonl", others)
    assert plan(read_corpus(tmp_path / "few"), tmp_path, {"scratch": {}}, held_out=["t1"]).words_heard == "unseen"


def test_a_fold_never_listens_to_the_teacher_of_its_held_out_speaker(corpus: Corpus, tmp_path: Path) -> None:
    work = plan(corpus, tmp_path, seeds=[0], baselines=True)
    by_key = {step.key: step for step in work.steps}
    for cell in work.cells:
        targets = [by_key[need] for need in by_key[cell.key].needs if by_key[need].kind == "targets"]
        heard = {by_key[need].title for target in targets for need in target.needs}
        assert f"posteriors of teacher {cell.held_out[0]}" not in heard
        assert len(heard) in (0, 2)
    assert not any(b.system == f"teacher {b.held_out[0]}" for b in work.baselines)


def test_seeds_share_all_but_the_run_and_a_second_study_in_the_folder_adds_nothing(
    corpus: Corpus, tmp_path: Path
) -> None:
    one, two = plan(corpus, tmp_path, seeds=[0]), plan(corpus, tmp_path, seeds=[0, 1], name="other")
    assert keys(one) < keys(two)
    assert {step.kind for step in two.steps if step.key not in keys(one)} == {"attempt"}
    alone = plan(corpus, tmp_path, {"only": CTC_KD})
    assert keys(alone) < keys(one)  # the name of an attempt changes nothing
    twice = plan(corpus, tmp_path, {"a": CTC_KD, "b": {**CTC_KD, "about": "the same once more"}})
    assert {c.run for c in twice.cells} == {c.run for c in alone.cells}


def set_all(**sections: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda config: {key: {**config.get(key, {}), **sections.get(key, {})} for key in {*config, *sections}}


@pytest.mark.parametrize(
    ("sections", "changed"),
    [
        ({"tokenizer": {"kind": "unigram", "vocabulary": 9}}, "all"),
        ({"tokenizer": {"normaliser": "lower"}}, "all"),
        ({"augment": {"noise": 0.2}}, "all"),
        ({"features": {"preemphasis": 0.5}}, "all"),
        ({"model": {"dropout": 0.2}}, "all"),
        ({"fold": {"validation_fraction": 0.25}}, "all"),
        ({"fold": {"split_seed": 1}}, "all"),
        ({"decode": {"mode": "decoder"}}, "all"),  # validation decodes: it chooses the checkpoint
        ({"objective": {"label_smoothing": 0.1}}, "all"),
        ({"objective": {"temperature": 3.0}}, "heard"),
        ({"target": {"top_k": 4}}, "heard"),
        ({"objective": {"blank_threshold": 0.5}}, "student"),
        ({"train": {"batch_size": 4}}, "attempt"),
        ({"teach": {"teacher": {**TRAIN, "weight_decay": 0.5}}}, "taught"),
        ({"train": {"threads": 3, "device": "cuda", "loggers": ["tensorboard"]}}, "none"),
        ({"teach": {"teacher": {**TRAIN, "threads": 2, "device": "cuda"}}}, "none"),
    ],
)
def test_settings_change_the_keys_of_what_depends_on_them(
    corpus: Corpus, tmp_path: Path, sections: dict[str, Any], changed: str
) -> None:
    attempts = {"student": CTC_KD, "scratch": {}}
    before = plan(corpus, tmp_path, attempts)
    after = plan(corpus, tmp_path, attempts, config=set_all(**sections)(CONFIG))
    titles = {step.title: step.kind for step in after.steps}
    scratch = {title for title in titles if title.startswith("scratch")}
    expected = {
        "all": set(titles),
        "heard": {title for title, kind in titles.items() if kind in ("posteriors", "targets", "attempt")} - scratch,
        "student": {title for title in titles if title.startswith("student")},
        "attempt": {title for title, kind in titles.items() if kind == "attempt"},
        "taught": set(titles) - scratch - {"parent"},
        "none": set(),
    }[changed]
    assert {step.title for step in after.steps if step.key not in keys(before)} == expected


def rewritten(corpus: Corpus, tmp_path: Path, change: Callable[[Recording], dict[str, Any]]) -> Corpus:
    """The corpus with another manifest."""
    path = tmp_path / "changed" / "manifest.jsonl"
    write_manifest(path, [r.model_copy(update=change(r)) for r in corpus.recordings])
    return read_corpus(path)


def test_whatever_the_manifest_says_is_in_the_keys_and_where_it_lies_is_not(corpus: Corpus, tmp_path: Path) -> None:
    before = plan(corpus, tmp_path)
    assert keys(plan(rewritten(corpus, tmp_path, lambda r: {}), tmp_path)) == keys(before)
    bands: dict[str, Any] = {"t1": {"band": "low"}}
    after = plan(rewritten(corpus, tmp_path, lambda r: bands.get(r.speaker, {})), tmp_path)
    assert not keys(after) & keys(before)  # predictions say the band
    one = corpus.recordings[0].recording
    for change in ({"text": "AD"}, {"prompt": "other"}):
        changes: dict[str, Any] = {one: change}
        after = plan(rewritten(corpus, tmp_path, lambda r, of=changes: of.get(r.recording, {})), tmp_path)
        assert not keys(after, "parent") & keys(before)


def test_other_audio_without_a_hash_in_the_manifest_is_another_corpus(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", controls=("c1",), targets=("t1", "t2"))
    assert corpus.recordings[0].audio_sha256 is None
    before = plan(corpus, tmp_path)
    path = corpus.recordings[-1].audio_filepath
    samples, rate = soundfile.read(path)
    soundfile.write(path, -samples, rate, subtype="PCM_16")
    assert not keys(plan(corpus, tmp_path), "attempt") & keys(before)


def test_a_given_tokenizer_is_known_by_what_is_in_it(corpus: Corpus, tmp_path: Path) -> None:
    def with_tokenizer(words: tuple[str, ...], name: str) -> set[str]:
        path = tmp_path / name
        path.write_bytes(Tokenizer.train(words, "char", 64, "upper").model_bytes)
        config = set_all(tokenizer={"path": str(path)})(CONFIG)
        return keys(plan(corpus, tmp_path, {"scratch": {}, "student": CTC_KD}, config=config))

    first = with_tokenizer(WORDS, "a.model")
    assert with_tokenizer(WORDS, "b.model") == first
    assert not with_tokenizer((*WORDS, "ABCDE"), "a.model") & first


def test_format_and_listed_words_are_in_the_keys(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plan(corpus, tmp_path, held_out=["t1"], baselines=True)
    new = rewritten(corpus, tmp_path, lambda r: {"text": "DAD"} if r.recording == "t3_AB_0" else {})
    after = plan(new, tmp_path, {"scratch": {}}, held_out=["t1"], config=set_all(fold={"exclude": ["t3"]})(CONFIG))
    same = plan(corpus, tmp_path, {"scratch": {}}, held_out=["t1"], config=set_all(fold={"exclude": ["t3"]})(CONFIG))
    assert keys(after) != keys(same)  # one more word to choose from
    monkeypatch.setattr(steps, "FORMAT", folder.FORMAT + 1)
    assert not keys(plan(corpus, tmp_path, held_out=["t1"], baselines=True)) & keys(before)


def test_outputs_are_decoded_as_the_attempt_says_and_never_with_an_untrained_head(
    corpus: Corpus, tmp_path: Path
) -> None:
    decoder = {"objective.ctc": 0.0, "decode.mode": "decoder", "decode.beam": 4}
    attempts = {"plain": {}, "decoder": {"set": decoder}, "ctc": {"set": {"objective.cross_entropy": 0.0}}}
    work = plan(corpus, tmp_path, attempts, held_out=["t1"])
    how = {s.title.partition(",")[0]: s.work.args[3] for s in work.steps}  # type: ignore[attr-defined]
    assert {name: (d["open"].mode, d["open"].beam) for name, d in how.items()} == {
        "plain": ("ctc", 1), "decoder": ("decoder", 4), "ctc": ("ctc", 1),
    }  # fmt: skip
    assert all(d["word list"].word_list and not d["open"].word_list for d in how.values())
    assert {name: d["word list"].ctc_weight for name, d in how.items()} == {"plain": 0.5, "decoder": 0.0, "ctc": 1.0}


def test_a_held_out_control_has_not_been_heard_by_the_parent(corpus: Corpus, tmp_path: Path) -> None:
    work = plan(corpus, tmp_path, {"a": {"start": "parent"}}, held_out=["t1", "c1"])
    parents = [step for step in work.steps if step.kind == "parent"]
    heard = [{r.speaker for r in step.work.args[0].train} for step in parents]  # type: ignore[attr-defined]
    assert heard == [{"c1", "c2"}, {"c2"}]
    lonely = replace(corpus, recordings=tuple(r for r in corpus.recordings if r.speaker != "c2"))
    with pytest.raises(CorpusError, match="no control speaker to train a parent on"):
        plan(lonely, tmp_path, {"a": {"start": "parent"}}, held_out=["c1"])


def test_a_parent_of_the_fold_is_made_for_each_fold_and_shared_by_included_and_held_out(
    corpus: Corpus, tmp_path: Path
) -> None:
    config = {**CONFIG, "teach": {**CONFIG["teach"], "parent_on": "both"}}  # type: ignore[dict-item]
    work = plan(corpus, tmp_path, {"included": FOUR["included"], "held out": CTC_KD}, config=config)
    kinds = Counter(step.kind for step in work.steps)
    assert kinds == {"parent": 3, "teacher": 6, "posteriors": 6, "targets": 6, "attempt": 6}


def test_without_baselines_only_what_attempts_need_is_trained(corpus: Corpus, tmp_path: Path) -> None:
    assert {s.kind for s in plan(corpus, tmp_path, {"scratch": {}}).steps} == {"attempt"}
    from_parent = plan(corpus, tmp_path, {"p": {"start": "parent"}}, held_out=["t1"])
    assert {s.kind for s in from_parent.steps} == {"parent", "attempt"}
    one_teacher = plan(corpus, tmp_path, {"a": {**CTC_KD, "teachers": ["t2"]}}, held_out=["t1"])
    assert [s.title for s in one_teacher.steps if s.kind == "teacher"] == ["teacher t2"]
    all_of_it = plan(corpus, tmp_path, {"scratch": {}}, baselines=True)
    assert {b.system for b in all_of_it.baselines} == {"parent", "teacher t1", "teacher t2", "teacher t3"}


def test_teachers_of_an_attempt(corpus: Corpus, tmp_path: Path) -> None:
    bands: dict[str, Any] = {"t1": "low", "t2": "low", "t3": "high"}
    banded = rewritten(corpus, tmp_path, lambda r: {"band": bands.get(r.speaker)})

    def listened_to(teachers: Any, held_out: list[str]) -> list[str]:
        attempts = {"a": {**DECODER_KD, "teachers": teachers}}
        work = plan(banded, tmp_path, attempts, held_out=held_out)
        return [s.title.removeprefix("posteriors of teacher ") for s in work.steps if s.kind == "posteriors"]

    assert listened_to("all", ["t1"]) == ["t2", "t3"]
    assert listened_to("band", ["t1"]) == ["t2"]
    assert listened_to(["t1", "t3"], ["t1"]) == ["t3"]
    with pytest.raises(StudyError, match=r"'a' has no teacher in the fold without t3\. Choose others"):
        listened_to("band", ["t3"])
    with pytest.raises(StudyError, match=r"teacher of c1, and there is none.*Choose among t2, t3"):
        listened_to(["t2", "c1"], ["t1"])
    with pytest.raises(CorpusError, match=r"no speaker 'T2' \(did you mean 't2'"):
        listened_to(["T2"], ["t1"])
    with pytest.raises(StudyError, match="The fold without t1, t2, t3 has no teacher"):
        plan(corpus, tmp_path, {"a": {**CTC_KD, "controls": True}}, held_out=[["t1", "t2", "t3"]])


def test_same_prompt_asks_every_teacher_about_its_own_speaker(corpus: Corpus, tmp_path: Path) -> None:
    attempts = {"a": {"set": {"objective.decoder_kd": 1.0, "target.heard": "same_prompt"}}}
    work = plan(corpus, tmp_path, attempts, held_out=["t1"])
    asked = [{r.speaker for r in s.work.args[2]} for s in work.steps if s.kind == "posteriors"]  # type: ignore[attr-defined]
    assert asked == [{"t2"}, {"t3"}]


def test_a_control_may_train_longer_than_the_study(corpus: Corpus, tmp_path: Path) -> None:
    work = plan(corpus, tmp_path, {"a": {}, "twice": {"updates": 40}}, held_out=["t1"], updates=20)
    jobs = {s.work.args[0].name: s.work.args[0] for s in work.steps if s.kind == "attempt"}  # type: ignore[attr-defined]
    epochs = {name: sum(stage.epochs for stage in job.config.train.stages) for name, job in jobs.items()}
    assert epochs["twice"] == 2 * epochs["a"] > 2


def test_what_cannot_be_trained_or_decided_is_said_by_the_plan(corpus: Corpus, tmp_path: Path) -> None:
    frozen = {"set": {"train.stages": [{"epochs": 1, "peak_lr": 1e-3, "freeze_encoder": True}]}}
    with pytest.raises(StudyError, match="'a' starts from scratch, and every stage of it freezes the encoder"):
        plan(corpus, tmp_path, {"a": frozen}, updates=5)
    with pytest.raises(ConfigError, match="leaves no speaker to train on"):
        plan(corpus, tmp_path, {"a": {}}, held_out=[list(corpus.speakers)])
    one_take = tuple(r for r in corpus.recordings if r.speaker != "t1" or r.recording == "t1_AB_0")
    short = replace(corpus, recordings=one_take)
    hypotheses = {"h": {"attempt": "a", "above": 50}}
    with pytest.raises(StudyError, match=r"No attempt can decide 'h': 'a' is tested on 1 take"):
        plan(short, tmp_path, {"a": {}}, held_out=["t1"], hypotheses=hypotheses)
    plan(short, tmp_path, {"a": {}}, held_out=["t1", "t2"], hypotheses=hypotheses)
