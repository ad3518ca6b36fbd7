"""Outputs that are empty, few, too long, repeating or random are seen; weak but sound recognisers are not blamed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

import evaluation_files as files
from xded.checks.outputs import Outputs, Row, look, loops, measure
from xded.findings import Finding


def rows(ids: Sequence[Sequence[int]]) -> list[Row]:
    return [(word, files.read_at(tokens, 0), tokens) for (_, word), tokens in zip(files.names("M08"), ids, strict=True)]


def seen(ids: Sequence[Sequence[int]]) -> Outputs:
    return measure(rows(ids), takes=[name[:-3] for name, _ in files.names("M08")], encode=files.ids_of)


def checks(found: Sequence[Finding]) -> dict[str, str]:
    return {finding.check: finding.severity for finding in found}


@pytest.mark.parametrize("right", [0, 7, 100, 250])
def test_sound_recognisers_are_silent(right: int) -> None:
    """However few words are right: outputs are words, as many as there are prompts."""
    assert look(seen(files.outputs(right)), "e") == []


def test_a_weak_recogniser_that_prefers_some_words_is_silent() -> None:
    """As in the study's weakest sound results: half of the prompts ever come out, some of them often."""
    random = np.random.default_rng(0)
    weights = 1 / np.arange(1, 131)
    ids = [files.ids_of(files.words()[random.choice(130, p=weights / weights.sum())]) for _ in range(files.RECORDINGS)]
    assert look(seen(ids), "e") == []


def test_empty_outputs() -> None:
    outputs = seen([[]] * files.RECORDINGS)
    assert checks(look(outputs, "e")) == {"blank-only": "refuse"}
    assert outputs.empty == 1.0
    text_only = measure([(word, "", None) for _, word in files.names("M08")])
    assert checks(look(text_only, "e")) == {"blank-only": "refuse"}


@pytest.mark.parametrize(("distinct", "severity"), [(2, "refuse"), (22, "refuse"), (45, "warn"), (140, None)])
def test_few_outputs(distinct: int, severity: str | None) -> None:
    ids = [files.ids_of(files.words()[i % distinct]) for i in range(files.RECORDINGS)]
    found = checks(look(seen(ids), "e"))
    assert found == ({"collapse": severity} if severity else {})


def test_mostly_empty_is_a_collapse_while_some_outputs_are_left() -> None:
    ids = [files.ids_of(files.words()[i % 6]) if i % 7 == 0 else [] for i in range(files.RECORDINGS)]
    (found,) = look(seen(ids), "e")
    assert (found.check, found.severity) == ("collapse", "refuse")
    assert found.what.startswith("7 distinct outputs for 255 prompts in 765 recordings")
    assert "86 % are empty" in found.what


def test_a_handful_of_ids_in_ever_new_orders() -> None:
    """CTC whose blank was never trained: hundreds of distinct outputs, made of a few ids."""
    random = np.random.default_rng(0)
    ids = [(10 * random.integers(20, 25, size=random.integers(3, 12))).tolist() for _ in range(files.RECORDINGS)]
    outputs = seen(ids)
    assert outputs.distinct > 300
    found = look(outputs, "e")
    assert checks(found) == {"collapse": "refuse", "over-generation": "warn"}
    assert outputs.types == 5


def test_too_long_outputs() -> None:
    long = [[*a, *b, *a] for a, b in zip(files.outputs(0), files.outputs(0, seed=1), strict=True)]
    (found,) = look(seen(long), "e")
    assert (found.check, found.severity) == ("over-generation", "warn")
    assert found.evidence["words"] == pytest.approx(3.0)
    a_little = [[*a, *(b if i % 3 else [])] for i, (a, b) in enumerate(zip(files.outputs(0), long, strict=True))]
    assert measure(rows(files.outputs(0))).length == pytest.approx(1.0)
    assert checks(look(seen(a_little), "e")) == {"over-generation": "warn"}
    some = [[*a, *(a if i % 2 else [])] for i, a in enumerate(files.outputs(0))]
    assert look(seen(some), "e") == []  # 1.5 words: an open vocabulary does that


def test_repetition() -> None:
    ids = [[*a, *a, *a] if i % 2 else a for i, a in enumerate(files.outputs(0))]
    found = look(seen(ids), "e")
    assert checks(found)["loops"] == "warn"
    assert found[-1].evidence["repeats"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("said", "expected"),
    [("YES YES YES", True), ("A B A B A B", True), ("A B C A B C A B C", True), ("NO NO", False), ("A B A B", False)],
)
def test_what_a_loop_is(said: str, expected: bool) -> None:
    assert loops(said.split()) is expected


def random_ids() -> list[list[int]]:
    """A head that was never trained: mostly ids that no prompt needs, long, ever different."""
    random = np.random.default_rng(0)
    needed = sorted({i for word in files.words() for i in files.ids_of(word)})
    pieces = [*(set(range(3, files.tokenizer().size)) - set(needed)), *needed[:60]]
    return [random.choice(pieces, size=random.integers(15, 35)).tolist() for _ in range(files.RECORDINGS)]


def test_untrained_head_is_not_taken_for_a_collapse() -> None:
    outputs = seen(random_ids())
    found = look(outputs, "e")
    assert checks(found) == {"untrained-head": "refuse", "over-generation": "warn"}
    assert "765 distinct outputs for 765 recordings" in found[0].what
    assert outputs.familiar == pytest.approx(0.22, abs=0.03)


def test_untrained_head_from_words_alone_and_from_ids_alone() -> None:
    words = [
        (word, files.read_at(ids, 0), None) for (_, word), ids in zip(files.names("M08"), random_ids(), strict=True)
    ]
    assert checks(look(measure(words), "e"))["untrained-head"] == "refuse"
    many = np.random.default_rng(0).integers(0, 5000, size=(files.RECORDINGS, 25)).tolist()
    ids = [(word, None, row) for (_, word), row in zip(files.names("M08"), many, strict=True)]
    assert checks(look(measure(ids), "e"))["untrained-head"] == "refuse"


def test_long_outputs_of_the_right_words_are_no_untrained_head() -> None:
    random = np.random.default_rng(0)
    ids = [files.ids_of(" ".join(random.choice(files.words(), 12))) for _ in range(files.RECORDINGS)]
    assert checks(look(seen(ids), "e")) == {"over-generation": "warn"}


@pytest.mark.parametrize("ids", [[[]], [[5]], [[5, 5, 5, 5, 5, 5]]])
def test_small_samples_get_notes(ids: list[list[int]]) -> None:
    words = files.words()[:4]
    small = measure([(words[i % 4], files.read_at(ids[0], 0), ids[0]) for i in range(8)], encode=files.ids_of)
    found = look(small, "e")
    assert found
    assert {finding.severity for finding in found} == {"note"}


def test_severity_can_be_bounded() -> None:
    assert checks(look(seen([[]] * files.RECORDINGS), "e", worst="note")) == {"blank-only": "note"}
    assert checks(look(seen(random_ids()), "e", worst="warn"))["untrained-head"] == "warn"
