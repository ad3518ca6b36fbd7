"""Who is asked about which recordings, and who is listened to."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tiny_corpus import write_corpus
from xded.config import TargetConfig
from xded.corpus.manifest import Corpus
from xded.targets.asking import PARENT, listened_to, questions

TEACHERS = ("t1", "t2")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"), ("c1",), ("t1", "t2", "t3"), takes=1)


def test_who_is_listened_to() -> None:
    there = ("a", "b", PARENT)
    assert listened_to(there, "a", "all") == ["a", "b"]
    assert listened_to(there, "a", "own") == ["a"]
    assert listened_to(there, "control", "own") == [PARENT]
    assert listened_to(("a", "b"), "control", "own") == []
    assert listened_to(there, "b", "own_and_parent") == ["b", PARENT]
    assert listened_to(there, "control", "own_and_parent") == [PARENT]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ({}, {"t1": {"c1", "t1", "t2"}, "t2": {"c1", "t1", "t2"}}),
        ({"asked": "own"}, {"t1": {"t1"}, "t2": {"t2"}, PARENT: {"c1"}}),
        ({"asked": "own_and_parent"}, {"t1": {"t1"}, "t2": {"t2"}, PARENT: {"c1", "t1", "t2"}}),
        ({"asked": "own", "weighting": "accuracy"}, {t: {"c1", "t1", "t2"} for t in (*TEACHERS, PARENT)}),
        ({"heard": "same_prompt"}, {"t1": {"t1"}, "t2": {"t2"}}),
    ],
)
def test_everyone_is_asked_about_what_they_are_listened_to_about(
    corpus: Corpus, target: dict[str, Any], expected: dict[str, set[str]]
) -> None:
    train = [r for r in corpus.recordings if r.speaker != "t3"]
    asked = questions(corpus, TEACHERS, train, TargetConfig(**target))
    assert {teacher: {r.speaker for r in rows} for teacher, rows in asked.items()} == expected
    for rows in asked.values():
        assert list(rows) == [r for r in train if r in rows]


def test_who_has_nothing_to_say_is_not_asked(corpus: Corpus) -> None:
    others = corpus.select(["t2", "t3"])
    assert set(questions(corpus, TEACHERS, others, TargetConfig(asked="own"))) == {"t2", PARENT}
    assert set(questions(corpus, TEACHERS, corpus.select(["t2"]), TargetConfig(asked="own"))) == {"t2"}


def test_test_takes_are_not_asked_about_where_each_hears_its_own_speaker(corpus: Corpus) -> None:
    takes = frozenset(r.take for r in corpus.select(["t1"])[:2])
    asked = questions(corpus, TEACHERS, corpus.recordings, TargetConfig(heard="same_prompt"), takes)
    assert [len(rows) for rows in asked.values()] == [2, 4]
    assert not {r.take for rows in asked.values() for r in rows} & takes


def test_it_is_light() -> None:
    """What plans studies, or shows how they stand, must not wait for torch."""
    code = "import sys, xded.targets.asking; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
