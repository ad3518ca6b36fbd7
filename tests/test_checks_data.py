"""Checks of who was heard, of labels, and of what recordings are: each fires on a small fault and not on its twin."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from xded.checks import data, labels, recordings
from xded.checks.data import DataCard
from xded.corpus.checks import Row
from xded.corpus.folds import Fold, Provenance
from xded.corpus.manifest import Recording
from xded.doctor.listings import read_listing

WORDS = ("bird", "cat", "dog", "eight", "four", "go", "left", "nine", "no", "off", "on", "yes")
SPEAKERS = ("anna", "ben", "cora", "dora")


def make(speaker="anna", word="cat", take=1, **changes):
    """A recording of a corpus in which nothing is wrong."""
    name = f"{speaker}_{word}_{take}"
    digest = hashlib.sha256(name.encode())
    row = {
        "audio_filepath": Path("/corpus/audio") / speaker / f"{name}.wav", "text": word.upper(), "recording": name,
        "speaker": speaker, "take": name, "prompt": word, "sample_rate": 16_000, "audio_sha256": digest.hexdigest(),
        "duration": 0.5 + int.from_bytes(digest.digest()[:4], "big") / 2**32,
    }  # fmt: skip
    return Recording.model_validate(row | changes)


def corpus(takes=2, speakers=SPEAKERS, words=WORDS, **changes):
    return [make(who, word, take, **changes) for who in speakers for word in words for take in range(1, takes + 1)]


def through_microphones(rows, mics=("M2", "M5", "M7"), own_takes=False, column=True):
    """Every recording through several microphones: same length, same take (or, wrongly, a take of its own)."""
    copies = []
    for row in rows:
        for mic in mics:
            name = f"{row.recording}_{mic}"
            changes = {"recording": name, "audio_filepath": row.audio_filepath.with_stem(name), "audio_sha256": None}
            changes |= {"take": name if own_takes else row.take, "mic": mic if column else None}
            copies.append(row.model_copy(update=changes))
    return copies


def only(findings, check, severity):
    assert [(f.check, f.severity) for f in findings] == [(check, severity)]
    json.dumps(findings[0].evidence)
    return findings[0]


# --- the data card ---------------------------------------------------------------------------------------------------


def card(meant, heard, files=None, strangers=0, **more):
    total = sum(heard.values()) + strangers if files is None else files
    side = {"meant": meant, "heard": heard, "files": total, "strangers": strangers}
    return DataCard.model_validate({"train": side, **more})


MEANT = dict.fromkeys(SPEAKERS, 20)


@pytest.mark.parametrize(
    ("heard", "strangers", "severity", "wrong", "unheard"),
    [
        ({"anna": 80}, 0, "refuse", 60, ["ben", "cora", "dora"]),  # the study's: the first speaker's audio for all
        ({**MEANT, "anna": 40, "dora": 0}, 0, "refuse", 20, ["dora"]),  # said to be included, never heard
        ({**MEANT, "anna": 21, "ben": 19}, 0, "refuse", 1, []),
        ({**MEANT, "dora": 0}, 20, "refuse", 20, ["dora"]),
        ({}, 1, "refuse", 80, list(SPEAKERS)),  # one foreign file for everything
    ],
)
def test_audio_of_others_is_seen_in_the_data_card(heard, strangers, severity, wrong, unheard):
    finding = only(data.wrong_audio(card(MEANT, heard, strangers=strangers), "run"), "wrong-audio", severity)
    assert (finding.evidence["wrong"], finding.evidence["unheard"]) == (wrong, unheard)
    assert f"{wrong} of 80 training recordings" in finding.what
    assert finding.points == pytest.approx(100 * wrong / 80)


def test_the_study_is_named_in_its_own_numbers():
    meant = {f"S{number:02d}": 125 for number in range(1, 14)} | {"F02": 135}
    finding = only(data.wrong_audio(card(meant, {"F02": 1760}), "run"), "wrong-audio", "refuse")
    assert "1,625 of 1,760 training recordings" in finding.what
    assert "F02 was heard 1,760 times (135 meant)" in finding.what
    assert "13 of 14 speakers" in finding.what


def test_one_file_of_many_is_a_warning():
    meant = {"anna": 500, "ben": 500}
    assert only(data.wrong_audio(card(meant, {"anna": 501, "ben": 499}), "run"), "wrong-audio", "warn")


def test_one_file_for_several_recordings_of_a_speaker_is_seen():
    finding = only(data.wrong_audio(card(MEANT, MEANT, files=4), "run"), "wrong-audio", "refuse")
    assert "80 training recordings were served from 4 files" in finding.what


def test_speakers_who_come_to_nothing_are_seen_and_chance_is_not():
    half = card({"anna": 400, "ben": 400}, {"anna": 400})
    assert only(data.wrong_audio(half, "run"), "wrong-audio", "refuse").evidence["unheard"] == ["ben"]
    early = card({"anna": 400, "ben": 4}, {"anna": 300})
    assert data.wrong_audio(early, "run") == []


def test_audio_as_meant_is_silent_on_both_sides():
    validation = {"meant": {"anna": 2}, "heard": {}, "files": 0, "strangers": 0}  # not validated yet
    healthy = card(MEANT, MEANT, validation=validation)
    assert data.wrong_audio(healthy, "run") == []
    assert data.never_heard(["anna"], healthy, "run") == []
    assert data.wrong_audio(card({}, {}), "run") == data.wrong_audio(card({}, {"anna": 3}), "run") == []


def test_an_included_speaker_without_audio_is_seen():
    finding = only(data.never_heard(["zoe"], card(MEANT, MEANT), "run"), "wrong-audio", "refuse")
    assert "none of the 80 recordings heard is theirs" in finding.what


# --- leakage, splits, test blocks ------------------------------------------------------------------------------------


def test_leakage_is_counted():
    fold = Fold(("dora",))
    sources = [
        Provenance("the parent", frozenset({"anna", "dora"}), frozenset({"t1", "t2"})),
        Provenance("teacher anna", frozenset({"anna"})),
    ]
    finding = only(data.leakage(fold, sources, {"t1", "t2", "t3"}, "run"), "leakage", "refuse")
    assert finding.what.startswith("1 of 2 sources have heard what the fold forbids (2 test takes): the parent")
    assert finding.evidence["speakers"] == ["dora"]
    assert data.leakage(fold, sources[1:], {"t1", "t2", "t3"}, "run") == []


@pytest.mark.parametrize(
    ("sides", "severity", "shared"),
    [
        ({"train": ["a", "b"], "validation": ["b", "c", "d"]}, "warn", 1),
        ({"train": ["a", "b"], "validation": ["b"]}, "refuse", 1),
        ({"train": ["a", "b", "c"], "test": ["b", "d", "e", "f"]}, "refuse", 1),
        ({"validation": ["a", "b"], "test": ["a"]}, "refuse", 1),
    ],
)
def test_takes_on_two_sides_are_counted(sides, severity, shared):
    finding = only(data.shared_takes(sides, {}, "run"), "shared-takes", severity)
    assert finding.evidence["shared"] == shared


def test_takes_on_their_own_sides_are_silent():
    assert data.shared_takes({"train": ["a"], "validation": ["b"], "test": ["c"]}, {}, "run") == []


@pytest.mark.parametrize("column", [True, False])
def test_a_random_split_across_microphones_is_seen_whatever_the_take_ids_say(column):
    rows = through_microphones(corpus(), own_takes=True, column=column)
    takes = [row.take for row in rows]
    sides = {"validation": takes[::10], "train": [take for place, take in enumerate(takes) if place % 10]}
    assert data.shared_takes(sides, {}, "run") == []
    finding = only(data.shared_takes(sides, data.spoken_takes(rows), "run"), "shared-takes", "refuse")
    assert finding.what.startswith("29 of 29 validation takes are in training too, 29 of them under another id")
    warning = only(data.copies_with_own_takes(rows, "corpus"), "shared-takes", "warn")
    assert (warning.evidence["takes"], warning.evidence["spoken"]) == (288, 96)


def test_the_microphones_in_take_ids_tell_copies_of_one_length():
    rows = through_microphones(corpus(duration=1.0), own_takes=True)
    assert only(data.copies_with_own_takes(rows, "corpus"), "shared-takes", "warn").evidence["spoken"] == 96


@pytest.mark.parametrize(
    "rows",
    [
        through_microphones(corpus()),
        corpus(takes=4),
        corpus(takes=4, duration=1.0),  # cut to one length: equal lengths tell nothing
        [row.model_copy(update={"duration": round(row.duration, 1)}) for row in corpus(takes=4)],
    ],
)
def test_real_takes_are_not_taken_for_copies(rows):
    assert data.copies_with_own_takes(rows, "corpus") == []


def test_uaspeech_ids_alone_tell_copies():
    assert data.spoken_by_name(["M08_B1_CW3_M2", "M08_B1_CW3_M5", "M08_B1_CW4_M2"]) == {
        "M08_B1_CW3_M2": "M08_B1_CW3", "M08_B1_CW3_M5": "M08_B1_CW3",
    }  # fmt: skip


def test_training_on_the_teachers_test_block_is_counted():
    tested = {"anna": {"a", "b", "c"}, "ben": {"c", "d"}}
    finding = only(data.teacher_test_block(tested, ["b", "c", "x"], "run"), "teacher-test-block", "warn")
    assert finding.what.startswith("2 of the 4 takes that 2 teachers were tested on are among the run's 3 training")
    assert data.teacher_test_block(tested, ["x", "y"], "run") == []


def test_texts_too_long_for_their_frames_are_counted():
    rows = [("a", 5, 25), ("b", 9, 8), ("c", 8, 8)]
    finding = only(data.unspellable(rows, "letters", "corpus"), "unspellable", "refuse")
    assert finding.what.startswith("1 of 3 recordings")
    assert "b needs 9 and has 8" in finding.what
    assert only(data.unspellable(rows + [("d", 1, 9)] * 200, "letters", "corpus"), "unspellable", "warn")
    assert data.unspellable([rows[0], rows[2]], "letters", "corpus") == []


# --- whose file, which word ------------------------------------------------------------------------------------------


def test_files_of_one_speaker_for_all_are_seen_by_their_names():
    rows = [row.model_copy(update={"audio_filepath": make("anna", row.prompt).audio_filepath}) for row in corpus(1)]
    finding = only(labels.wrong_files(rows, "corpus"), "wrong-audio", "refuse")
    assert finding.evidence["wrong"] == 36
    assert finding.evidence["heard"] == {"anna": 36}
    assert "nothing of ben, cora, dora is left" in finding.what
    assert labels.duplicates(rows, "corpus") == []  # the same fault is not reported twice


def test_files_of_one_speaker_for_all_are_seen_by_their_bytes():
    """Copied under the right names."""
    rows = [row.model_copy(update={"audio_sha256": make("anna", row.prompt).audio_sha256}) for row in corpus(1)]
    finding = only(labels.wrong_files(rows, "corpus"), "wrong-audio", "refuse")
    assert finding.what.startswith("48 recordings of 4 speakers (anna, ben, cora, dora) are 12 pieces of audio")
    assert labels.duplicates(rows, "corpus") == []


def test_some_misfiled_recordings_are_seen_and_the_speaker_named_as_the_corpus_does():
    rows = corpus(takes=10, speakers=("Anna", "Ben"))
    rows[5] = rows[5].model_copy(update={"audio_filepath": make("Ben", "bird", 6).audio_filepath.with_stem("ben_x")})
    finding = only(labels.wrong_files(rows, "corpus"), "wrong-audio", "warn")
    assert (finding.evidence["wrong"], finding.evidence["heard"]) == (1, {"Ben": 1})


@pytest.mark.parametrize(
    "name",
    ["{speaker}/{word}_{take}.wav", "0000{speaker}/{word}_{take:02d}.flac", "{word}_{speaker}_{take}.wav",
     "take{number}.wav"],
)  # fmt: skip
@pytest.mark.parametrize("speakers", [SPEAKERS, ("01", "02", "03", "04")])
def test_names_that_agree_or_tell_nothing_are_silent(name, speakers):
    rows = [
        row.model_copy(update={"audio_filepath": Path("/c") / name.format(
            speaker=row.speaker, word=row.prompt, take=int(row.take[-1]), number=number)})
        for number, row in enumerate(corpus(4, speakers))
    ]  # fmt: skip
    assert labels.wrong_files(rows, "corpus") == []
    assert labels.misnamed_words(rows, "corpus") == []


def test_duplicates_and_their_contradictions():
    rows = corpus(4)
    assert labels.duplicates(rows, "corpus") == []
    assert labels.duplicates(rows * 2, "both sides of a split") == []
    rows[1] = rows[1].model_copy(update={"audio_sha256": rows[0].audio_sha256})
    finding = only(labels.duplicates(rows, "corpus"), "duplicates", "warn")
    assert "1 of 192 recordings are copies" in finding.what
    assert finding.evidence["disagreeing"] == 0
    rows[5] = rows[5].model_copy(update={"audio_sha256": rows[100].audio_sha256})
    finding = only(labels.duplicates(rows, "corpus"), "duplicates", "warn")
    assert (finding.evidence["copies"], finding.evidence["disagreeing"]) == (2, 1)
    rows[7] = rows[7].model_copy(update={"audio_filepath": rows[8].audio_filepath})
    assert only(labels.duplicates(rows, "corpus"), "duplicates", "warn").evidence["copies"] == 3
    one_file = [rows[7], rows[8], *rows[20:40]]
    assert "are one file" in only(labels.duplicates(one_file, "corpus"), "duplicates", "refuse").what


def test_one_speaker_under_two_names():
    """All files of one are copies of another's: not known to be wrong audio, yet no second speaker."""
    rows = [row.model_copy(update={"audio_sha256": make("anna", row.prompt, row.take[-1]).audio_sha256})
            if row.speaker == "ben" else row for row in corpus()]  # fmt: skip
    assert labels.wrong_files(rows, "corpus") == []
    finding = only(labels.duplicates(rows, "corpus"), "duplicates", "refuse")
    assert "24 of 96 recordings are copies of others" in finding.what
    assert "all of anna and ben: one person under two names" in finding.what
    same = labels.takes_of_same_bytes(rows)
    assert len(same) == 48
    sides = {"train": ["anna_cat_1", "cora_cat_1"], "test": ["ben_cat_1", "ben_cat_2"]}
    assert only(data.shared_takes(sides, same, "run"), "shared-takes", "refuse").evidence["shared"] == 1
    assert labels.takes_of_same_bytes(corpus()) == {}


def text_of(row, text):
    return row.model_copy(update={"text": text})


def test_texts_shifted_by_a_line_are_seen():
    rows = corpus(4)
    assert labels.labels(rows, "corpus") == []
    shifted = [text_of(row, before.text) for row, before in zip(rows, [rows[-1], *rows], strict=False)]
    finding = only(labels.labels(shifted, "corpus"), "labels", "refuse")
    assert finding.what.startswith(
        "48 of 192 recordings (anna, ben, cora, dora) have another text than their prompt has"
    )
    assert "shifted by one" in finding.what


def test_words_shifted_in_the_list_are_seen_by_prompt_and_by_file_name():
    after = dict(zip(WORDS, [*WORDS[1:], WORDS[0]], strict=True))
    rows = [text_of(row, after[row.prompt].upper()) for row in corpus()]
    assert labels.labels(rows, "corpus") == []  # every prompt has one text
    finding = only(labels.misnamed_words(rows, "corpus"), "labels", "refuse")
    assert finding.evidence["wrong"] == 96
    both = [row.model_copy(update={"prompt": after[row.prompt]}) for row in rows]
    assert only(labels.misnamed_words(both, "corpus"), "labels", "refuse").evidence["wrong"] == 96
    other_language = [text_of(row, row.text[::-1]) for row in corpus()]
    assert labels.misnamed_words(other_language, "corpus") == []


def test_one_speakers_word_list_against_the_others():
    rows = corpus()
    wrong = [text_of(row, WORDS[WORDS.index(row.prompt) - 1].upper()) if row.speaker == "ben" else row for row in rows]
    finding = only(labels.labels(wrong, "corpus"), "labels", "refuse")
    assert finding.evidence["speakers"] == {"ben": 24}
    slip = [text_of(rows[0], "BRID"), *rows[1:]]
    assert only(labels.labels(slip, "corpus"), "labels", "warn").evidence["wrong"] == 1


def test_uaspeech_codes_tell_wrong_words():
    def coded(text_of_code):
        return [
            make("M08", code, recording=f"M08_B1_{code}_M{mic}", take=f"M08_B1_{code}", text=text)
            for code, text in text_of_code.items() for mic in (3, 5)
        ]  # fmt: skip

    right = {"D0": "ZERO", "D1": "ONE", "D2": "TWO", "LA": "ALPHA", "LX": "X-RAY", "CW1": "THE", "C3": "LINE"}
    assert labels.labels(coded(right), "corpus") == []
    wrong = right | {"D0": "ONE", "D1": "TWO", "D2": "THREE"}
    finding = only(labels.labels(coded(wrong), "corpus"), "labels", "refuse")
    assert "6 of 14 recordings" in finding.what
    assert "instead of 'zero'" in finding.what


@pytest.mark.parametrize(
    "rows",
    [
        [text_of(row, row.text.lower().replace("O", "-o")) if row.speaker == "ben" else row for row in corpus()],
        # prompts that are numbered anew for every speaker have no text of their own
        [row.model_copy(update={"prompt": str((WORDS.index(row.prompt) + SPEAKERS.index(row.speaker)) % 12)})
         for row in corpus()],
    ],
)  # fmt: skip
def test_spelling_and_numbered_prompts_are_no_wrong_labels(rows):
    assert labels.labels(rows, "corpus") == []


# --- missing in a row ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gone", "place", "first", "last"),
    [(WORDS[:4], "head", "bird", "eight"), (WORDS[-4:], "tail", "no", "yes"), (WORDS[3:9], "middle", "eight", "no")],
)
def test_a_copy_cut_short_is_seen(gone, place, first, last):
    rows = [row for row in corpus(3) if (row.speaker, row.prompt in gone) != ("cora", True)]
    finding = only(recordings.truncated_copy(rows), "truncated-copy", "warn")
    assert finding.subject == "cora"
    found = [finding.evidence[key] for key in ("recordings", "place", "first", "last")]
    assert found == [3 * len(gone), place, first, last]


@pytest.mark.parametrize(
    "lacks",
    [
        lambda row: False,
        lambda row: row.speaker == "cora" and row.prompt in WORDS[:2],
        lambda row: row.speaker == "cora" and row.prompt in WORDS[::3],
        lambda row: row.speaker in ("cora", "dora") and row.prompt in WORDS[:6],  # another word list
        lambda row: row.speaker == "cora" and row.word_type == "D",  # a kind of words never recorded
        lambda row: row.speaker == "cora" and row.block == "B2",  # a session that never was
    ],
)
def test_other_gaps_are_no_cut(lacks):
    rows = [
        make(who, word, 1, recording=f"{who}{block}{word}", word_type="D" if word in WORDS[:4] else "C", block=block)
        for who in SPEAKERS for block in ("B1", "B2") for word in WORDS
    ]  # fmt: skip
    assert recordings.truncated_copy([row for row in rows if not lacks(row)]) == []


MANY = tuple(f"w{number:02d}" for number in range(40))


@pytest.mark.parametrize(
    "lacks",
    [
        {"cora": MANY[:2]},
        {"cora": MANY[:6], "dora": MANY[:6]},  # another word list: no two copies break off at one file
        {"cora": [*MANY[3:6], *MANY[7:30:2]]},  # so much is missing that some of it stands together
        {"ben": MANY[-9:], "cora": [*MANY[-9:-5], *MANY[-4:]], "dora": [*MANY[-9:-3], *MANY[-2:]]},  # extra words
    ],
)
def test_gaps_that_chance_or_design_explain_are_no_cut(lacks):
    rows = [row for row in corpus(1, words=MANY) if row.prompt not in lacks.get(row.speaker, ())]
    assert recordings.truncated_copy(rows) == []


def test_missing_microphones_are_no_cut_and_widen_none():
    rows = through_microphones(corpus(1))
    rows = [row for row in rows if not (row.speaker == "anna" and row.mic == "M2")]
    assert recordings.truncated_copy(rows) == []
    cut = [row for row in rows if not (row.speaker == "ben" and f"{row.prompt}_{row.mic}" < "eight_M3")]
    finding = only(recordings.truncated_copy(cut), "truncated-copy", "warn")
    assert (finding.evidence["recordings"], finding.evidence["last"]) == (10, "eight_M2")  # eight's first copy too


def test_the_studys_f03_is_found_and_nobody_else(shared):
    files = sorted((shared / "reference" / "teacher_metadata").glob("*.json"))
    lists = [read_listing(path) for path in files]
    rows = [row for listing in lists for row in listing.recordings]
    assert (len(lists), len(rows)) == (15, 24_311)
    finding = only(recordings.truncated_copy(rows), "truncated-copy", "warn")
    assert finding.subject == "F03"
    assert (finding.evidence["recordings"], finding.evidence["of"]) == (169, 1785)
    assert (finding.evidence["first"], finding.evidence["last"]) == ("B3_C10_M2", "B3_CW14_M2")
    assert finding.evidence["chance"] < 1e-30
    alone = [f.subject for listing in lists for f in recordings.truncated_copy(listing.recordings)]
    assert alone == ["F03"]  # against UASpeech's word list
    assert labels.labels(rows, "lists") == []
    assert data.copies_with_own_takes(rows, "lists") == []


def test_a_list_shorter_than_it_says():
    assert only(recordings.fewer_than_declared(10, 9, "list"), "truncated-copy", "warn").evidence["listed"] == 9
    assert recordings.fewer_than_declared(9, 9, "list") == recordings.fewer_than_declared(None, 9, "list") == []


# --- what files are --------------------------------------------------------------------------------------------------


def test_mixed_rates_are_seen():
    rows = corpus()
    assert recordings.sample_rates(rows, "corpus") == []
    mixed = [row.model_copy(update={"sample_rate": 8_000}) if row.speaker == "ben" else row for row in rows]
    finding = only(recordings.sample_rates(mixed, "corpus"), "sample-rate", "warn")
    assert "24 of 96 recordings (ben) are not at 16000 Hz" in finding.what


def opened(kind, bad):
    rows = corpus(speakers=[*SPEAKERS, "ed", "flo", "gus", "hal"])
    return [(row, Row("warning", row.audio_filepath, "why", "how", kind) if bad(row) else None) for row in rows]


@pytest.mark.parametrize(
    ("check", "kind", "few", "many"),
    [
        ("silence", "silent", "warn", "refuse"),
        ("clipping", "clipped", "note", "warn"),
        ("sample-rate", "wrong rate", "warn", "refuse"),
        ("audio-files", "changed", "warn", "refuse"),
        ("audio-files", "unreadable", "warn", "refuse"),
    ],
)
def test_bad_files_are_counted(check, kind, few, many):
    one = only(recordings.heard(check, opened(kind, lambda row: row.recording == "ben_cat_1"), "c"), check, few)
    assert one.evidence["bad"] == 1
    speaker = only(recordings.heard(check, opened(kind, lambda row: row.speaker == "ben"), "c"), check, many)
    assert (speaker.evidence["bad"], speaker.evidence["speakers"]) == (24, {"ben": 24})
    others = {other for other in recordings.KINDS if other != check}
    assert all(not recordings.heard(name, opened(kind, lambda row: True), "c") for name in others)
    assert recordings.heard(check, opened(kind, lambda row: False), "c") == []


def test_files_left_out_at_the_import_are_counted():
    rows = [Row("rejected", Path("a.wav"), "a.wav is silent.", "", "silent")]
    rows += [Row("warning", Path("b.wav"), "b.wav is clipped.", "", "clipped")]
    assert only(recordings.left_out(rows, 99, "corpus"), "audio-files", "note").evidence["left_out"] == {"silent": 1}
    assert only(recordings.left_out(rows * 9, 91, "corpus"), "audio-files", "warn")
    assert recordings.left_out(rows[1:], 99, "corpus") == []


def test_every_kind_of_row_belongs_to_one_check():
    kinds = Counter(kind for kinds in recordings.KINDS.values() for kind in kinds)
    assert set(kinds.values()) == {1}
    assert set(recordings.SAID) == set(recordings.KINDS)


@pytest.mark.parametrize(("spread", "expected"), [(0.0, 1), (1.0, 0), (None, 0)])
def test_features_that_are_all_the_same(spread: float | None, expected: int) -> None:
    card = data.DataCard.model_validate({"train": {"spread": spread}})
    found = data.flat_features(card, "run")
    assert [(f.check, f.severity) for f in found] == [("features", "refuse")] * expected
