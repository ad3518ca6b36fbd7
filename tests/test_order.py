"""Batches of words: whole groups, different speakers, every recording as often, no state that could be lost."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tiny_corpus import job_for, tiny_config, write_corpus
from xded.config import TrainConfig
from xded.errors import ConfigError
from xded.features import LogMel
from xded.models.checkpoints import load
from xded.training.data import TrainingData
from xded.training.loop import Loop
from xded.training.order import Order, RunSampler, Words
from xded.training.run import fit

K = 4


def texts_and_speakers(kind: str) -> list[tuple[str, str]]:
    """(word, speaker) of each recording, shuffled."""
    random = np.random.default_rng(3)
    everyone = [f"s{number}" for number in range(9)]
    said = {
        "balanced": [(f"w{w}", s) for w in range(12) for s in everyone for _ in range(2)],
        "ragged": [(f"w{w}", s) for w in range(12) for s in everyone[: 3 + w % 6] for _ in range(1 + w % 3)],
        "few words": [(f"w{w}", s) for w in range(3) for s in everyone for _ in range(5)],
        "few speakers": [(f"w{w}", s) for w in range(20) for s in everyone[:2]],
        "one alone": [("w0", s) for s in everyone] + [(f"own{n}", everyone[n % 3]) for n in range(17)],
        "one speaker has most": [("w0", "s0")] * 20 + [("w0", s) for s in everyone[1:]],
        "less than a batch": [("w0", "s0"), ("w0", "s1"), ("w1", "s0")],
    }[kind]
    return [said[i] for i in random.permutation(len(said))]


KINDS = ("balanced", "ragged", "few words", "few speakers", "one alone", "one speaker has most", "less than a batch")


def order_of(said: list[tuple[str, str]], batch_size: int = 8, seed: int = 0, together: int = K) -> Order:
    train = TrainConfig(sampler="words", batch_size=batch_size, speakers_per_word=together)
    words = Words.of([text for text, _ in said], [speaker for _, speaker in said], train)
    lengths = tuple(int(n) for n in np.random.default_rng(1).integers(300, 900, len(said)))
    return Order(lengths, batch_size, seed, words=words)


@pytest.mark.parametrize("together", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_recording_comes_k_times_in_k_epochs_and_each_time_as_another_copy(kind: str, together: int) -> None:
    said = texts_and_speakers(kind)
    order = order_of(said, batch_size=12, together=together)
    for cycle in range(2):
        heard: Counter[int] = Counter()
        for epoch in range(cycle * together, (cycle + 1) * together):
            copies = [copy for batch in order.epoch(epoch) for copy in batch]
            assert len(set(copies)) == len(copies) == len(said)
            times = Counter(copy % len(said) for copy in copies)
            assert all({index + n * len(said) for n in range(times[index])} <= set(copies) for index in times)
            heard += times
        assert set(heard.values()) == {together}
        assert len(heard) == len(said)


@pytest.mark.parametrize("kind", KINDS)
def test_there_are_as_many_batches_of_the_same_sizes_as_by_length(kind: str) -> None:
    order = order_of(texts_and_speakers(kind))
    for epoch in range(5):
        sizes = sorted(map(len, order.epoch(epoch)))
        assert sizes == sorted(map(len, Order(order.lengths, 8, 0).epoch(epoch)))


@pytest.mark.parametrize("kind", ["balanced", "ragged", "few words"])
def test_a_batch_holds_groups_of_one_word_by_different_speakers_and_no_word_twice(kind: str) -> None:
    said = texts_and_speakers(kind)
    order = order_of(said)
    for epoch in range(5):
        for batch in order.epoch(epoch):
            whole = len(batch) // K * K if len(batch) < 8 else 8
            groups = [batch[i : i + K] for i in range(0, whole, K)]
            for group in groups:
                texts, speakers = zip(*(said[copy % len(said)] for copy in group), strict=True)
                assert len(set(texts)) == 1
                # words of three speakers have one of them twice
                assert len(set(speakers)) == min(K, len({s for text, s in said if text == texts[0]}))
            assert len({said[group[0] % len(said)][0] for group in groups}) == len(groups)


def test_one_speaker_with_most_recordings_is_in_every_group_as_often_as_their_share() -> None:
    said = texts_and_speakers("one speaker has most")  # 20 of 28: 4 * 20 / 28 is between 2 and 3
    for batch in order_of(said).epoch(0):
        for start in range(0, len(batch), K):
            speakers = [said[copy % len(said)][1] for copy in batch[start : start + K]]
            assert speakers.count("s0") in (2, 3)


def test_words_of_one_speaker_are_mixed_with_each_other() -> None:
    said = texts_and_speakers("one alone")
    groups = [b[i : i + K] for e in range(4) for b in order_of(said, 8).epoch(e) for i in range(0, len(b) - K + 1, K)]
    texts = [{said[copy % len(said)][0] for copy in group} for group in groups]
    assert {"w0"} in texts
    assert all(found == {"w0"} or len(found) > 1 for found in texts[:-1] if "w0" not in found)


def test_recordings_come_about_once_an_epoch() -> None:
    said = texts_and_speakers("balanced")
    order = order_of(said)
    times = [Counter(c % len(said) for batch in order.epoch(e) for c in batch)[i] for e in range(8) for i in range(216)]
    assert times.count(1) > 0.8 * len(times)  # drawn at random: 0.42


def test_order_depends_on_seed_and_epoch_alone() -> None:
    said = texts_and_speakers("ragged")
    late = order_of(said).epoch(9)
    order = order_of(said)
    epochs = [order.epoch(epoch) for epoch in range(10)]
    assert epochs[9] == late
    assert len(set(epochs)) == 10
    assert order_of(said, seed=1).epoch(9) != late


def test_other_speakers_meet_and_other_words_share_a_batch_every_time() -> None:
    said = texts_and_speakers("balanced")
    order = order_of(said)
    words: list[frozenset[str]] = []  # of the first batch of each epoch
    met: list[set[frozenset[int]]] = [set(), set()]  # groups of two cycles
    for epoch in range(2 * K):
        batches = order.epoch(epoch)
        words.append(frozenset(said[copy % len(said)][0] for copy in batches[0]))
        met[epoch // K] |= {
            frozenset(c % len(said) for c in b[i : i + K]) for b in batches for i in range(0, len(b), K)
        }
    assert len(set(words)) >= 6
    assert len(met[0] & met[1]) < 0.1 * len(met[0])


@pytest.mark.parametrize("first", [0, 3, 40])
def test_a_sampler_of_words_that_starts_later_gives_the_rest(first: int) -> None:
    said = texts_and_speakers("ragged")
    whole = list(RunSampler(order_of(said), 4))
    assert list(RunSampler(order_of(said), 4, first)) == whole[first:]


@pytest.mark.parametrize(
    ("train", "said", "message"),
    [
        ({"speakers_per_word": 3}, "balanced", r"batch_size is 8, no multiple .* 3.*train.batch_size=6"),
        ({"speakers_per_word": 16}, "balanced", r"Set train.batch_size=16"),
        ({"curriculum": {"schedule": "sqrt"}}, "balanced", r"curriculum.schedule sqrt.*schedule=none"),
        ({}, "nobody", r"none of the 2 texts .* two speakers.*sampler=length"),
    ],
)
def test_what_cannot_fill_batches_of_words_is_refused(train: dict, said: str, message: str) -> None:
    rows = [("a", "s0"), ("b", "s1")] if said == "nobody" else texts_and_speakers(said)
    with pytest.raises(ConfigError, match=message):
        Words.of([t for t, _ in rows], [s for _, s in rows], TrainConfig.model_validate({"sampler": "words", **train}))


WORDS = {"stages": [{"epochs": 5, "peak_lr": 1e-3}], "batch_size": 4, "sampler": "words", "speakers_per_word": 2}


def test_a_run_of_words_goes_on_as_if_unbroken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_corpus(tmp_path / "corpus", targets=("t1", "t2", "t3"))
    fit(job_for(corpus, tmp_path / "whole", train=WORDS), quiet=True)
    step = Loop.training_step
    with monkeypatch.context() as patch:

        def breaking(self: Loop, batch: object, batch_idx: int) -> object:
            if self.number(batch_idx) == 14:
                raise KeyError
            return step(self, batch, batch_idx)  # type: ignore[arg-type]

        patch.setattr(Loop, "training_step", breaking)
        with pytest.raises(KeyError):
            fit(job_for(corpus, tmp_path / "run", train=WORDS), quiet=True)
    fit(job_for(corpus, tmp_path / "run", train=WORDS), resume=True, quiet=True)
    one, two = (load(tmp_path / name / "latest.pt")["model_state_dict"] for name in ("whole", "run"))
    assert all(one[name].equal(two[name]) for name in one)


def test_a_batch_of_a_run_says_one_word_twice(tmp_path: Path) -> None:
    job = job_for(write_corpus(tmp_path / "corpus", targets=("t1", "t2", "t3")), tmp_path, train=WORDS)
    config = tiny_config(train=WORDS)
    data = TrainingData(job.train, LogMel(config.features), job.tokenizer, augmentation=config.augment)
    order = Order.of(data, config.train, 0)
    batch = [data[item] for item in max(RunSampler(order, 1), key=len)]
    assert len(batch) == 4
    assert [row["tokens"] for row in batch[::2]] == [row["tokens"] for row in batch[1::2]]
    assert all(a["speaker"] != b["speaker"] for a, b in zip(batch[::2], batch[1::2], strict=True))


def test_preflight_refuses_before_anything_is_written(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", targets=("t1",))
    with pytest.raises(ConfigError, match="two speakers"):
        fit(job_for(corpus, tmp_path / "run", train=WORDS), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_corpus_of_the_studys_size_has_little_padding() -> None:
    lengths = tuple(np.random.default_rng(0).lognormal(1.0, 0.8, 1_660).tolist())
    batches = Order(lengths, 8, 0).epoch(0)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert 1 - sum(lengths) / padded < 0.10  # with pools of 16 batches 0.16, in random order 0.60


def test_a_small_corpus_is_not_sorted_as_a_whole() -> None:
    order = Order(tuple(float(i) for i in range(40 * 4)), 4, 0)
    first, second = ({frozenset(batch) for batch in order.epoch(epoch)} for epoch in (0, 1))
    assert len(first & second) < len(first) / 4  # the same batches every epoch would be all of them
