"""Adaptation to a new speaker: one test for every point, takes within takes, the unheard result apart, no leakage."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cli_calls import call, contents, done, refused
from tiny_corpus import WORDS, job_for, write_corpus
from xded.adaptation import steps
from xded.adaptation.curve import Curve, adapt
from xded.adaptation.prototypes import PARTS, embedding, rescored, similarities
from xded.adaptation.settings import Settings
from xded.adaptation.takes import set_apart, word_by_word
from xded.corpus.manifest import Corpus, Recording, read_corpus
from xded.errors import ConfigError, CorpusError, LeakageError
from xded.models.recogniser import load_recogniser
from xded.report.adaptation import tables_of, write_pages
from xded.scoring import read_predictions
from xded.training.data import TrainingData
from xded.training.evaluation import recognise
from xded.training.run import fit

PLAIN = dict.fromkeys(("frequency_masks", "time_masks", "mel_warp", "noise"), 0)
NEW = "t6"  # half an octave above the speakers who train
QUICK: dict[str, Any] = {"takes": (2, 8), "draws": 1, "updates": 20, "peak_lr": 3e-3}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a recogniser of two of its speakers, and its adaptation to a third with both methods."""
    work = tmp_path_factory.mktemp("work")
    corpus = write_corpus(work / "corpus", targets=("t1", "t2", "t3", "t4", "t5", NEW), takes=6)
    fold = {"held_out": (NEW,), "exclude": ("t3", "t4", "t5"), "validation_fraction": 0}
    stages = ({"epochs": 25, "peak_lr": 1e-2},)
    train = {"stages": stages, "batch_size": 16, "validate_every_epochs": 99, "checkpoint_every_epochs": 99}
    fit(job_for(corpus, work / "run", fold=fold, augment=PLAIN, train=train), quiet=True)
    adapted(work, work / "adapted")
    return work


def adapted(work: Path, out: Path, speakers: tuple[str, ...] = (NEW,), keep: bool = False, **changes: Any) -> Curve:
    recogniser = load_recogniser(work / "run")
    settings = Settings(**{**QUICK, **changes})
    corpus = read_corpus(work / "corpus")
    return adapt(recogniser, corpus, speakers, recogniser.config.decode, settings, out, quiet=True, keep=keep)


def curve_in(work: Path) -> Curve:
    return Curve.from_json((work / "adapted" / "curve.json").read_text())


# --- takes ------------------------------------------------------------------------------------------------


def corpus_of(takes: dict[str, int], mics: int = 1) -> Corpus:
    """Speakers with so many takes, of seven words in turn, at so many microphones."""
    rows = [
        Recording(audio_filepath=Path(f"{s}{n}{m}.wav"), duration=1.0, text=f"W{n % 7}", prompt=f"W{n % 7}",
                  recording=f"{s}{n}{m}", take=f"{s}{n}", speaker=s)
        for s, count in takes.items() for n in range(count) for m in range(mics)
    ]  # fmt: skip
    return Corpus(Path("manifest.jsonl"), tuple(rows))


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_test_is_one_for_all_and_fewer_takes_are_a_part_of_more(share: float) -> None:
    corpus = corpus_of({"a": 42, "b": 42}, mics=3)
    apart = set_apart(corpus, "a", 20, 4, share, 0)
    test = {r.take for r in apart.test}
    assert len(test) == round(42 * share)
    assert len(apart.test) == 3 * len(test), "all microphones of a take are on one side"
    for draw in range(4):
        before: set[str] = set()
        for takes in range(1, 21):
            heard = apart.heard(draw, takes)
            now = {r.take for r in heard}
            assert (len(now), len(heard)) == (takes, 3 * takes)
            assert before < now
            assert not now & test
            before = now
    assert len({apart.orders[draw][:7] for draw in range(4)}) == 4, "draws differ"


def test_draws_depend_on_speaker_and_seed_alone() -> None:
    alone, beside = (set_apart(corpus_of(t), "a", 9, 2, 0.5, 0) for t in ({"a": 42}, {"0": 9, "a": 42, "z": 5}))
    assert alone == beside
    assert set_apart(corpus_of({"a": 42}), "a", 9, 3, 0.5, 0).orders[:2] == alone.orders, "more draws keep the first"
    assert set_apart(corpus_of({"a": 42}), "a", 9, 2, 0.5, 1).orders != alone.orders


def test_every_word_comes_once_before_any_comes_again() -> None:
    texts = {f"take{n}": f"W{n % 5}" for n in range(20)}
    orders = {word_by_word(texts, np.random.default_rng(seed)) for seed in range(20)}
    for order in orders:
        for start in range(0, 20, 5):
            assert {texts[take] for take in order[start : start + 5]} == {f"W{n}" for n in range(5)}
    assert len(orders) == 20
    test = Counter(r.text for r in set_apart(corpus_of({"a": 28}), "a", 5, 1, 0.5, 0).test)
    assert set(test.values()) == {2}, "the test has its share of every word"


def test_too_few_takes_are_refused_with_numbers() -> None:
    with pytest.raises(CorpusError, match=r"has 24 takes: 12 are set apart.*12 are left, but 20.*--takes"):
        set_apart(corpus_of({"a": 24}), "a", 20, 1, 0.5, 0)
    with pytest.raises(CorpusError, match="no speaker 'A'"):
        set_apart(corpus_of({"a": 24}), "A", 2, 1, 0.5, 0)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"takes": (5, 3)}, "should rise"),
        ({"takes": (0, 5)}, "always there"),
        ({"takes": ()}, "--takes"),
        ({"test_share": 1.0}, "nothing to hear"),
        ({"peak_lr": 0.0}, "--peak-lr 0"),
    ],
)
def test_settings_that_make_no_curve_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Settings(**wrong)


# --- prototypes -------------------------------------------------------------------------------------------


def test_prototypes_of_a_perfect_encoder_recover_enrolled_words() -> None:
    random = torch.Generator().manual_seed(0)
    places = torch.randn(10, 32, generator=random, dtype=torch.double)  # of ten words
    words = torch.arange(10).repeat(3)
    tested, common = places[words], torch.full((32,), 50.0)  # what all words share must not hide the rest
    enrolled = [7, 2, 5, 9, 2]
    similarity, columns = similarities(tested + common, places[enrolled] + common, enrolled)
    assert columns.tolist() == [2, 5, 7, 9]
    scores = 0.3 * torch.randn(30, 10, generator=random, dtype=torch.double)  # the recogniser itself knows nothing
    best = rescored(scores, similarity, columns, 4.0)[:, columns].argmax(1)
    known = torch.isin(words, columns)
    assert columns[best[known]].tolist() == words[known].tolist()


def test_words_without_a_take_keep_exactly_what_they_had() -> None:
    random = torch.Generator().manual_seed(1)
    scores = 5 * torch.randn(50, 12, generator=random, dtype=torch.double)
    scores[:, 3] = -torch.inf  # does not fit, and is enrolled
    scores[4] = -torch.inf
    similarity, enrolled = 2 * torch.rand(50, 4, generator=random, dtype=torch.double) - 1, torch.tensor([1, 3, 6, 8])
    before, after = scores.softmax(1), rescored(scores, similarity, enrolled, 4.0).exp()
    others = [word for word in range(12) if word not in enrolled.tolist()]
    fits = [row for row in range(50) if row != 4]
    torch.testing.assert_close(after[fits][:, others], before[fits][:, others])
    torch.testing.assert_close(after[fits][:, enrolled].sum(1), before[fits][:, enrolled].sum(1))
    assert not torch.allclose(after[fits], before[fits])
    assert (after[fits, 3] == 0).all()
    assert (after[4] == 0).all()
    order = rescored(scores, torch.zeros(50, 4, dtype=torch.double), enrolled, 4.0)[fits].argsort(1)
    assert (order == scores[fits].argsort(1)).all(), "equal similarities decide nothing"
    one = rescored(scores, similarity[:, :1], enrolled[:1], 4.0)[fits]  # it has nothing to decide between
    torch.testing.assert_close(one, scores[fits].log_softmax(1))


def test_embedding_keeps_the_order_of_sounds() -> None:
    encoded = torch.arange(10.0)[:, None].expand(10, 3)
    assert embedding(encoded).shape == (PARTS * 3,)
    assert not torch.equal(embedding(encoded), embedding(encoded.flip(0)))
    short = embedding(encoded[:2])
    assert short.shape == (PARTS * 3,)
    assert short.isfinite().all()


# --- the curve --------------------------------------------------------------------------------------------


def test_unheard_is_plain_evaluation_to_the_digit(work: Path) -> None:
    recogniser, curve = load_recogniser(work / "run"), curve_in(work)
    tested = set(curve.speakers[NEW].test)
    rows = [r for r in read_corpus(work / "corpus").recordings if r.take in tested]
    data = TrainingData(rows, recogniser.student.front_end, recogniser.tokenizer)
    for name, listed in (("open", False), ("word_list", True)):
        settings = recogniser.config.decode.model_copy(update={"word_list": listed})
        plain = recognise(recogniser.student, data, settings, word_list=WORDS)
        assert read_predictions(work / "adapted" / f"predictions_unheard_{name}.jsonl") == plain


def test_every_score_says_what_was_heard(work: Path) -> None:
    curve = curve_in(work)
    for scores in curve.unheard.values():
        assert (scores.conditions["speakers"], scores.conditions["heard"]) == ("unseen", "0 takes of the speaker")
    assert [(p.takes, p.method, p.decode) for p in curve.heard] == [
        *((takes, "steps", "open") for takes in (2, 8)),
        *((takes, "steps", "word list") for takes in (2, 8)),
        *((takes, "prototypes", "word list") for takes in (2, 8)),
    ]
    for point in curve.heard:
        assert point.scores.conditions["speakers"] == "seen"
        assert f"heard {point.takes} takes of the speaker ({point.method})" in point.scores.statement
        assert point.scores.takes.keys() == set(curve.speakers[NEW].test)
        assert any(line.startswith("speakers: seen / unseen") for line in point.over_unheard.differing)
    assert [p.same_words_percent for p in curve.heard] == [50.0, 100.0] * 3  # two of four words, then all
    assert curve.heard[1].other_words is None
    named = {path.name for path in (work / "adapted").glob("predictions*")}
    assert all("_unheard_" in name or "_heard_" in name for name in named)
    assert len(named) == 8


def test_hearing_a_speaker_with_a_systematic_shift_helps(work: Path) -> None:
    curve = curve_in(work)
    unheard = curve.unheard["word list"].overall.wra_percent.value
    few, more = (p.scores.overall.wra_percent.value for p in curve.heard if p.decode == "open")
    # how much more 8 takes bring than 2, twelve tested takes cannot tell
    assert min(few, more) > curve.unheard["open"].overall.wra_percent.value + 25
    for point in curve.heard:
        if point.takes == 8 and point.decode == "word list":
            assert point.scores.overall.wra_percent.value > unheard + 10, point.method
            gained = point.scores.overall.wra_percent.value - unheard
            assert point.over_unheard.difference_points.value == pytest.approx(gained)


def test_same_call_gives_the_same_and_does_nothing_again(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not list((work / "adapted").rglob("*.pt")), "weights are not kept unless asked for"
    adapted(work, work / "again", takes=(8,))
    kept = contents(work / "adapted")
    for name, digest in contents(work / "again").items():
        if name.startswith("predictions"):
            assert kept[name] == digest, name
    monkeypatch.setattr(steps, "fit", lambda *_, **__: pytest.fail("a finished adaptation was done again"))
    adapted(work, work / "adapted")
    assert contents(work / "adapted") == kept


def test_fewer_takes_later_leave_no_predictions_that_the_curve_does_not_know(work: Path) -> None:
    adapted(work, work / "shrunk", methods=("prototypes",))
    adapted(work, work / "shrunk", methods=("prototypes",), takes=(8,))
    assert [path.name for path in sorted((work / "shrunk").glob("predictions_heard*"))] == [
        "predictions_heard_8_prototypes_word_list.jsonl"
    ]


def test_other_settings_in_the_same_folder_are_refused(work: Path) -> None:
    before = contents(work / "adapted")
    with pytest.raises(ConfigError, match=r"other settings: updates was 20, now 21.*--out"):
        adapted(work, work / "adapted", updates=21)
    assert contents(work / "adapted") == before


def test_no_similarity_changes_nothing(work: Path) -> None:
    curve = adapted(work, work / "none", methods=("prototypes",), weight=0.0)
    for point in curve.heard:
        assert point.scores.takes.keys() == curve.unheard["word list"].takes.keys()
        assert point.over_unheard.difference_points.value == 0
        said = read_predictions(work / "none" / f"predictions_heard_{point.takes}_prototypes_word_list.jsonl")
        assert said == read_predictions(work / "none" / "predictions_unheard_word_list.jsonl")


def test_adapted_weights_say_what_they_have_heard(work: Path) -> None:
    curve = adapted(work, work / "kept", keep=True, methods=("steps",), takes=(2,), updates=1)
    kept = load_recogniser(work / "kept" / "runs" / NEW / "draw_0" / "heard_2")
    heard = [p for p in kept.provenance if NEW in p.speakers]
    assert [p.takes for p in heard] == [set(curve.speakers[NEW].orders[0][:2])]
    with pytest.raises(LeakageError, match=f"has heard held-out speaker {NEW}"):
        adapt(kept, read_corpus(work / "corpus"), (NEW,), kept.config.decode, Settings(takes=(2,)), work / "never")


def test_who_was_heard_is_refused_before_anything_is_written(work: Path) -> None:
    with pytest.raises(LeakageError, match=r"student has heard held-out speaker t1.*has not heard: --speaker t3"):
        adapted(work, work / "leak", speakers=(NEW, "t1"))
    with pytest.raises(CorpusError, match="t7"):
        adapted(work, work / "leak", speakers=("t7",))
    assert not (work / "leak").exists()


# --- what people see --------------------------------------------------------------------------------------


def test_command_writes_a_curve_a_picture_and_a_page(work: Path) -> None:
    out = work / "cli"
    words = ("adapt", work / "run", "--takes", "2,4", "--draws", 2, "--method", "prototypes", "--speaker", NEW,
             "--speaker", "t5", "--corpus", work / "corpus", "--out", out)  # fmt: skip
    shown = done(*words).out
    text = " ".join(shown.split())
    assert "Unheard: 0 takes of the speaker" in text
    assert "Not an unheard test" in text
    assert shown.splitlines()[-2:] == [str(out / "report.html"), str(out / "curve.svg")]
    assert max(map(len, shown.splitlines()[:-2])) <= 80
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3, "the mean and two speakers"
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    alone = (out / "curve.svg").read_text()
    assert alone.startswith("<svg xmlns=")
    assert not {"currentColor", "var("} & set(re.findall(r"currentColor|var\(", alone)), "needs no page"
    assert json.loads(done(*words, "--json").out) == json.loads((out / "curve.json").read_text())


def test_command_refuses_what_makes_no_sense(work: Path) -> None:
    run, out = work / "run", ("--corpus", work / "corpus", "--out", work / "refused")
    refused(call("adapt", run, *out, "--takes", "five"), 2, "--takes five", "5,10,20")
    refused(call("adapt", run, *out, "--method", "magic"), 2, "--method magic", "steps, prototypes")
    refused(call("adapt", run, *out, "--speaker", "t1"), 2, "Leakage", "t1", "--speaker t3")
    refused(call("adapt", run, *out), 2, f"Speaker {NEW} has 24 takes", "--takes", "--test-share")
    assert not (work / "refused").exists()


def test_texts_of_a_corpus_are_escaped_on_the_page(work: Path, tmp_path: Path) -> None:
    said = (work / "adapted" / "curve.json").read_text().replace(f'"{NEW}"', '"<b>&</b>"')
    write_pages(Curve.from_json(said), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;&amp;&lt;/b&gt;" in page
    assert "<b>" not in page
    assert tables_of(Curve.from_json(said))[0].columns == ("decode", "<b>&</b>")
