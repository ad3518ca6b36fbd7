"""Posterior stores on disk, their checks, aggregation, weights, pairing by prompt, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tiny_corpus import tiny_config, write_corpus
from xded.corpus.folds import Fold, Provenance
from xded.corpus.manifest import Corpus, Recording
from xded.errors import CorpusError
from xded.models.checkpoints import sha256_of
from xded.targets import store as stores
from xded.targets.aggregate import combine, dense, top_k
from xded.targets.store import Entry, Index, Posterior, Store, StoreWriter, TargetError, read_index
from xded.teachers.aggregation import partners_of
from xded.tokenizer import Tokenizer
from xded.training.data import align_by_time
from xded.training.job import Job
from xded.training.preflight import Gate, check_targets

HASH = "a" * 64


def index(**fields: Any) -> Index:
    known: dict[str, Any] = {
        "kind": "ctc", "temperature": 2.0, "top_k": 4, "vocabulary": 20, "frame_rate_hz": 25.0,
        "teacher_forced": False, "tokenizer": "f" * 64, "teachers": ("M01",), "teacher_hashes": {"M01": HASH},
        "provenance": (Provenance("teacher M01", frozenset({"M01"}), frozenset({"t1", "t2"})),),
    }  # fmt: skip
    return Index(**{**known, **fields})


def softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(exponents / exponents.sum(-1, keepdims=True))


def random_probabilities(steps: int, vocabulary: int = 20, seed: int = 0, scale: float = 2.0) -> np.ndarray:
    return softmax(np.random.default_rng(seed).normal(0, scale, (steps, vocabulary))).astype(np.float32)


def posterior(steps: int, k: int = 4, seed: int = 0, vocabulary: int = 20) -> Posterior:
    blank = np.random.default_rng(seed).uniform(size=steps).astype(np.float32)
    return top_k(random_probabilities(steps, vocabulary, seed), k, blank)


def write(folder: Path, steps: Mapping[str, int], **fields: Any) -> dict[str, Posterior]:
    writer, said = StoreWriter(folder, index(**fields)), {}
    for seed, (recording, count) in enumerate(steps.items()):
        said[recording] = posterior(count, seed=seed)
        writer.add(Entry(recording=recording, audio_sha256=HASH, steps=count), said[recording])
    writer.close()
    return said


# --- the store ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_shard", [2, 3, 100])
def test_round_trip_within_16_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_shard: int) -> None:
    monkeypatch.setattr(stores, "RECORDINGS_PER_SHARD", per_shard)
    said = write(tmp_path, {"r1": 3, "r2": 7, "r3": 1, "r4": 5, "r5": 2})
    store = Store(tmp_path)
    assert len(list(tmp_path.glob("shard_*"))) == -(-5 // per_shard)
    for recording in ("r4", "r1", "r5", "r3", "r2"):  # in any order
        read, wrote = store.read(recording), said[recording]
        np.testing.assert_array_equal(read.ids, wrote.ids)
        np.testing.assert_allclose(read.probabilities, wrote.probabilities, rtol=2**-9, atol=1e-7)
        np.testing.assert_allclose(read.rest, wrote.rest, rtol=2**-9, atol=1e-7)
        np.testing.assert_allclose(read.least_blank, wrote.least_blank, rtol=2**-10)
        np.testing.assert_allclose(read.probabilities.sum(1) + read.rest, 1.0, atol=1e-6)
        assert (read.probabilities.dtype, read.ids.dtype) == (np.float32, np.int64)


def test_index_round_trip_with_provenance(tmp_path: Path) -> None:
    write(tmp_path, {"r1": 3})
    read = read_index(tmp_path)
    assert read.model_copy(update={"recordings": ()}) == index()
    assert read.recordings == (Entry(recording="r1", audio_sha256=HASH, steps=3),)


@pytest.mark.parametrize(("vocabulary", "bits"), [(32_767, "int16"), (32_768, "int32"), (70_000, "int32")])
def test_large_vocabularies_keep_their_ids(tmp_path: Path, vocabulary: int, bits: str) -> None:
    last = Posterior(*(np.array(v) for v in ([[0, vocabulary - 1]], [[0.5, 0.5]], [0.0], [0.5])))
    writer = StoreWriter(tmp_path, index(vocabulary=vocabulary, top_k=2))
    writer.add(Entry(recording="r", audio_sha256=HASH, steps=1), last)
    writer.close()
    assert Store(tmp_path).read("r").ids.tolist() == [[0, vocabulary - 1]]
    assert load_file(tmp_path / "shard_000.safetensors")["ids"].dtype == bits


def test_an_interrupted_writer_leaves_nothing_readable(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "new", index())
    writer.add(Entry(recording="r1", audio_sha256=HASH, steps=3), posterior(3))
    with pytest.raises(TargetError, match=r"no finished posteriors.*xded targets"):
        Store(tmp_path / "new")


def test_writing_over_a_store_unmakes_it_first(tmp_path: Path) -> None:
    write(tmp_path, {"r1": 3})
    StoreWriter(tmp_path, index())  # and is killed
    with pytest.raises(TargetError, match="no finished posteriors"):
        Store(tmp_path)


def test_a_damaged_index_and_damaged_shards_are_named(tmp_path: Path) -> None:
    write(tmp_path, {"r1": 3, "r2": 4})
    shard = tmp_path / "shard_000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(TargetError, match=r"shard_000.safetensors is damaged or missing") as error:
        Store(tmp_path).read("r1")
    assert f"Delete {tmp_path}" in error.value.remedy
    shard.unlink()
    with pytest.raises(TargetError, match="damaged or missing"):
        Store(tmp_path).read("r1")
    write(tmp_path / "other", {"r1": 3})
    (tmp_path / "other" / "shard_000.safetensors").replace(shard)
    with pytest.raises(TargetError, match="it has 3 steps, the index says 7"):
        Store(tmp_path).read("r1")
    (tmp_path / "index.json").write_text('{"kind": "ctc"')
    with pytest.raises(TargetError, match=r"index.json is damaged"):
        Store(tmp_path)


def test_an_unknown_recording_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"r1": 3})
    store = Store(tmp_path)
    assert "r1" in store
    assert "r9" not in store
    with pytest.raises(TargetError, match="nothing about recording 'r9'"):
        store.read("r9")


# --- whether targets belong to a run --------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return write_corpus(tmp_path / "corpus", targets=("t1",), takes=1)


def job(corpus: Corpus, tokenizer: Tokenizer) -> Job:
    config = tiny_config(objective={"ctc_kd": 1.0})
    return Job("student", config, corpus.recordings, (), Fold(()), frozenset(), tokenizer, corpus.path.parent / "run")


def check(store: Store, work: Job) -> None:
    gate = Gate(frozenset())
    check_targets(store, work, gate)
    gate.decide()


def write_for(corpus: Corpus, tokenizer: Tokenizer, folder: Path, hashed: str = "", **fields: Any) -> Store:
    writer = StoreWriter(folder, index(tokenizer=tokenizer.fingerprint, vocabulary=tokenizer.size, **fields))
    for recording in corpus.recordings:
        steps = len(tokenizer.encode(recording.text)) + 1
        entry = Entry(
            recording=recording.recording, audio_sha256=hashed or sha256_of(recording.audio_filepath), steps=steps
        )
        writer.add(entry, posterior(steps, vocabulary=tokenizer.size))
    writer.close()
    return Store(folder)


def test_targets_of_this_run_are_accepted(tmp_path: Path, corpus: Corpus) -> None:
    tokenizer = Tokenizer.train(corpus.texts, "char", 64, "upper")
    for kind in ("ctc", "decoder"):
        check(write_for(corpus, tokenizer, tmp_path / kind, kind=kind), job(corpus, tokenizer))


def test_targets_of_another_tokenizer_are_refused_naming_both(tmp_path: Path, corpus: Corpus) -> None:
    tokenizer = Tokenizer.train(corpus.texts, "char", 64, "upper")
    other = Tokenizer.train([*corpus.texts, "XYZ"], "char", 64, "upper")
    with pytest.raises(TargetError, match="another tokenizer") as error:
        check(write_for(corpus, other, tmp_path / "ctc"), job(corpus, tokenizer))
    for named in (str(tmp_path / "ctc"), tokenizer.fingerprint[:12], other.fingerprint[:12]):
        assert named in str(error.value)


def test_targets_of_another_temperature_are_refused_naming_both(tmp_path: Path, corpus: Corpus) -> None:
    tokenizer = Tokenizer.train(corpus.texts, "char", 64, "upper")
    with pytest.raises(TargetError, match=r"temperature 4; the objective says 2"):
        check(write_for(corpus, tokenizer, tmp_path / "ctc", temperature=4.0), job(corpus, tokenizer))


@pytest.mark.parametrize("in_manifest", [True, False])
def test_targets_of_other_audio_are_refused_naming_the_recording(
    tmp_path: Path, corpus: Corpus, in_manifest: bool
) -> None:
    """Also where the manifest holds no hashes: the files' own are compared."""
    tokenizer = Tokenizer.train(corpus.texts, "char", 64, "upper")
    store = write_for(corpus, tokenizer, tmp_path / "ctc", hashed="b" * 64)
    work = job(corpus, tokenizer)
    if in_manifest:
        work.train = [r.model_copy(update={"audio_sha256": sha256_of(r.audio_filepath)}) for r in work.train]
    with pytest.raises(TargetError, match=rf"'{corpus.recordings[0].recording}' describes other audio"):
        check(store, work)


def test_decoder_targets_of_another_text_are_refused(tmp_path: Path, corpus: Corpus) -> None:
    tokenizer = Tokenizer.train(corpus.texts, "char", 64, "upper")
    store = write_for(corpus, tokenizer, tmp_path / "decoder", kind="decoder")
    work = job(corpus, tokenizer)
    work.train = [work.train[0].model_copy(update={"text": "ABBA"})]
    with pytest.raises(TargetError, match=r"has 3 steps; its text 'ABBA' has 5"):
        check(store, work)


# --- aggregation ----------------------------------------------------------------------------------------


def test_top_k_keeps_the_largest_and_the_rest() -> None:
    said = top_k(np.array([[0.1, 0.5, 0.15, 0.25]], np.float32), 2, np.zeros(1))
    assert dict(zip(said.ids[0].tolist(), said.probabilities[0].tolist(), strict=True)) == {
        1: 0.5,
        3: 0.25,
    }
    assert said.rest[0] == pytest.approx(0.25)
    everything = top_k(random_probabilities(3), 99, np.zeros(3))
    assert everything.ids.shape == (3, 20)
    assert everything.rest.max() < 1e-6


def test_dense_spreads_the_rest_evenly() -> None:
    full = dense(posterior(6, k=4), 20)
    said = posterior(6, k=4)
    np.testing.assert_allclose(full.sum(1), 1.0, atol=1e-5)
    np.testing.assert_array_equal(np.take_along_axis(full, said.ids, 1), said.probabilities)
    assert np.isclose(full[0], said.rest[0] / 16).sum() == 16


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.2, 3.0, 0.5]])
def test_aggregations_are_their_dense_formulas(weights: list[float]) -> None:
    logits = np.random.default_rng(0).normal(0, 2, (3, 5, 20))
    shares = np.array(weights) / sum(weights)
    said = [top_k(softmax(each).astype(np.float32), 20, np.zeros(5)) for each in logits]
    prob = np.einsum("k,ktv->tv", shares, softmax(logits))
    logit = softmax(np.einsum("k,ktv->tv", shares, logits))
    geometric = np.exp(np.einsum("k,ktv->tv", shares, np.log(softmax(logits))))
    geometric /= geometric.sum(-1, keepdims=True)
    np.testing.assert_allclose(combine(said, weights, "prob_mean", 20), prob, atol=1e-5)
    np.testing.assert_allclose(combine(said, weights, "logprob_mean", 20), geometric, atol=1e-5)
    np.testing.assert_allclose(combine(said, weights, "logit_mean", 20), logit, atol=1e-5)
    assert np.abs(prob - logit).max() > 0.01  # they are different things


@pytest.mark.parametrize("how", ["prob_mean", "logprob_mean", "logit_mean"])
def test_one_teacher_or_equal_teachers_are_their_own_mean(how: Any) -> None:
    said = posterior(6, k=4)
    for teachers in (1, 3):
        mean = combine([said] * teachers, [1.0] * teachers, how, 20)
        np.testing.assert_allclose(mean, dense(said, 20), atol=1e-5)


def test_effective_number_of_teachers() -> None:
    def with_weights(*weights: dict[str, float]) -> Index:
        rows = tuple(
            Entry(recording=str(i), audio_sha256=HASH, steps=1, weight=weight) for i, weight in enumerate(weights)
        )
        return index(recordings=rows)

    assert with_weights({"a": 1.0, "b": 1.0, "c": 1.0}).effective_teachers == pytest.approx(3.0)
    assert with_weights({"a": 1.0, "b": 1e-10}).effective_teachers == pytest.approx(1.0)
    assert with_weights({"a": 2.0, "b": 1.0}, {"a": 1.0}).effective_teachers == pytest.approx((9 / 5 + 1) / 2)
    assert index().effective_teachers == 1.0


# --- who heard what -------------------------------------------------------------------------------------


def spoken(speaker: str, prompt: str, take: int, mic: str | None = None) -> Recording:
    name = f"{speaker}_{prompt}_{take}" + (f"_{mic}" if mic else "")
    return Recording(
        audio_filepath=Path("/a") / name, duration=1.0, text=prompt, recording=name, speaker=speaker,
        take=f"{speaker}_{prompt}_{take}", prompt=prompt, mic=mic,
    )  # fmt: skip


def test_same_audio_asks_every_teacher_about_the_recording_itself() -> None:
    recordings = [spoken("a", "CW1", 1), spoken("b", "CW1", 1)]
    pairs = partners_of(recordings, {"a": recordings, "b": recordings}, tiny_config())
    assert pairs == {r.recording: {"a": r.recording, "b": r.recording} for r in recordings}


def asked() -> dict[str, list[Recording]]:
    return {
        "a": [spoken("a", "CW1", 1), spoken("a", "CW2", 1)],
        "b": [spoken("b", "CW1", 1), spoken("b", "CW1", 2)],
        "c": [spoken("c", "CW1", 1), spoken("c", "CW2", 1), spoken("c", "CW3", 1)],
    }


def prompts(pairs: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    return {recording: sorted(heard) for recording, heard in pairs.items()}


@pytest.mark.parametrize(
    ("coverage", "least", "kept"),
    [
        ("all", 1, {"d_CW1_1": ["a", "b", "c"], "d_CW2_1": ["a", "c"], "d_CW3_1": ["c"]}),
        ("partial", 2, {"d_CW1_1": ["a", "b", "c"], "d_CW2_1": ["a", "c"]}),
        ("strict", 1, {"d_CW1_1": ["a", "b", "c"]}),
    ],
)
def test_same_prompt_pairs_by_prompt_with_coverage(coverage: str, least: int, kept: dict[str, list[str]]) -> None:
    student = [spoken("d", prompt, 1) for prompt in ("CW1", "CW2", "CW3", "CW4")]
    config = tiny_config(target={"heard": "same_prompt", "coverage": coverage, "min_teachers": least})
    assert prompts(partners_of(student, asked(), config)) == kept


@pytest.mark.parametrize(
    ("coverage", "least", "kept"),
    [
        ("all", 1, {"d_CW1_1": ["a", "b"], "d_CW2_1": ["a"]}),
        ("partial", 2, {"d_CW1_1": ["a", "b"]}),
        ("strict", 1, {"d_CW1_1": ["a", "b"]}),
    ],
)
def test_same_audio_keeps_what_enough_teachers_have_heard(
    coverage: str, least: int, kept: dict[str, list[str]]
) -> None:
    first, second, third = (spoken("d", prompt, 1) for prompt in ("CW1", "CW2", "CW3"))
    config = tiny_config(target={"heard": "same_audio", "coverage": coverage, "min_teachers": least})
    pairs = partners_of([first, second, third], {"a": [first, second], "b": [first]}, config)
    assert prompts(pairs) == kept


def test_same_prompt_pairs_the_nth_take_with_the_nth_in_a_circle_and_by_microphone() -> None:
    config = tiny_config(target={"heard": "same_prompt"})
    student = [spoken("d", "CW1", take) for take in (1, 2, 3)]
    pairs = partners_of(student, asked(), config)
    assert [pairs[f"d_CW1_{take}"]["b"] for take in (1, 2, 3)] == ["b_CW1_1", "b_CW1_2", "b_CW1_1"]
    assert [pairs[f"d_CW1_{take}"]["a"] for take in (1, 2, 3)] == ["a_CW1_1"] * 3
    teacher = [spoken("a", "CW1", 1, mic) for mic in ("M3", "M5")]
    student = [spoken("d", "CW1", 1, mic) for mic in ("M5", "M3", "M7")]
    pairs = partners_of(student, {"a": teacher}, config)
    assert pairs == {"d_CW1_1_M3": {"a": "a_CW1_1_M3"}, "d_CW1_1_M5": {"a": "a_CW1_1_M5"}}


def test_same_prompt_without_a_shared_prompt_is_an_error() -> None:
    config = tiny_config(target={"heard": "same_prompt", "coverage": "partial", "min_teachers": 4})
    with pytest.raises(CorpusError, match="covered by 4 teachers"):
        partners_of([spoken("d", "CW1", 1)], asked(), config)


# --- frame rates ----------------------------------------------------------------------------------------


def test_alignment_by_time_takes_the_frame_that_is_heard_at_the_same_moment() -> None:
    said = posterior(10)
    assert align_by_time(said, 10, 25.0, 25.0) is said
    half = align_by_time(said, 5, 25.0, 12.5)
    np.testing.assert_array_equal(half.ids, said.ids[[1, 3, 5, 7, 9]])
    double = align_by_time(said, 20, 25.0, 50.0)
    np.testing.assert_array_equal(double.least_blank, said.least_blank.repeat(2))
    longer = align_by_time(said, 11, 25.0, 25.0)  # one frame more at the end: the last one again, nothing is cut
    np.testing.assert_array_equal(longer.rest, said.rest[[*range(10), 9]])


# --- size -----------------------------------------------------------------------------------------------


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_size_of_the_reference_study(tmp_path: Path) -> None:
    """1,785 recordings of 78 frames, 14 teachers, 5,000 pieces, k = 32: < 300 MB, aggregated < 40 MB (of 10^6 bytes).

    50 recordings are written in earnest; shards and index rows grow with the recordings, provenance does not.
    """
    written, recordings, teachers, frames, steps = 50, 1_785, 14, 78, 6
    names = tuple(f"M{t:02d}" for t in range(teachers))
    takes = frozenset(f"M08_B1_CW{i:04d}" for i in range(recordings))
    heard = tuple(Provenance(who, frozenset(names), takes) for who in ("teacher M01", "parent"))

    def cost(kind: str, weight: dict[str, float]) -> float:
        def fill(folder: Path, count: int) -> int:
            fields = index(kind=kind, vocabulary=5_000, top_k=32, provenance=heard, teachers=names)
            writer = StoreWriter(folder, fields)
            for i in range(count):
                length = frames if kind == "ctc" else steps
                said = top_k(random_probabilities(length, 5_000, i), 32, np.zeros(length, np.float32))
                entry = Entry(
                    recording=f"M08_B1_CW{i:04d}_M5", audio_sha256=HASH, steps=length, weight=weight,
                    true_log_prob=None if weight else -1.2345678901234567,
                )  # fmt: skip
                writer.add(entry, said)
            writer.close()
            return bytes_in(folder)

        fixed = fill(tmp_path / "empty", 0)
        return fixed + (fill(tmp_path / f"{kind}{len(weight)}", written) - fixed) / written * recordings

    posteriors = teachers * (cost("ctc", {}) + cost("decoder", {}))
    weights = dict.fromkeys(names, 0.12345678901234568)
    aggregated = cost("ctc", weights) + cost("decoder", weights)
    assert 200e6 < posteriors < 300e6
    assert 15e6 < aggregated < 40e6
    print(f"posteriors {posteriors / 1e6:.0f} MB, aggregated {aggregated / 1e6:.1f} MB")
