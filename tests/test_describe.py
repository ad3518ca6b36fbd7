import functools
import io
import json
import operator
from pathlib import Path

import pytest
from rich.console import Console

from xded.corpus.describe import describe, render
from xded.corpus.manifest import Corpus, Recording
from xded.corpus.uaspeech import BAND_OF, NAME

METADATA = Path(__file__).resolve().parents[2] / "shared" / "reference" / "teacher_metadata"


def corpus_of(names):
    """A corpus without audio from UASpeech ids."""
    recordings = []
    for name in names:
        match = NAME.fullmatch(name)
        word = match["word"]
        recordings.append(
            Recording(
                audio_filepath=Path(f"/{name}.wav"), duration=1.8, text=word, recording=name, speaker=match["speaker"],
                take=name.rsplit("_", 1)[0], prompt=f"{match['block']}_{word}" if word.startswith("UW") else word,
                block=match["block"], mic=match["mic"], role="control" if match["control"] else "target",
                band=BAND_OF.get(match["speaker"]), sample_rate=16_000,
            )
        )  # fmt: skip
    return Corpus(Path("manifest.jsonl"), tuple(recordings))


def grid(speaker, words, mics=("M2", "M3"), blocks=("B1",)):
    return [f"{speaker}_{block}_{word}_{mic}" for block in blocks for word in words for mic in mics]


def shown(description):
    console = Console(file=io.StringIO(), width=120, highlight=False, markup=False)
    console.print(render(description), soft_wrap=True)
    return console.file.getvalue()


def speaker_of(description, name):
    return next(row for row in description["speakers"] if row["speaker"] == name)


def test_totals_count_takes_apart_from_microphone_copies():
    description = describe(corpus_of(grid("M08", ["D1", "D2", "LA"]) + grid("CF02", ["D1", "D2", "LA"])))
    assert (description["takes"], description["recordings"], description["prompts"]) == (6, 12, 3)
    assert description["hours"] == pytest.approx(12 * 1.8 / 3600)
    assert description["roles"] == {"control": 1, "target": 1}
    assert description["bands"] == {"high": ["M08"]}
    assert description["sample_rates"] == {"16000": 12}
    assert speaker_of(description, "M08")["mics"] == ["M2", "M3"]
    assert json.loads(json.dumps(description)) == description
    assert "2 speakers (1 control, 1 target), 6 takes in 12 recordings of 3 prompts" in shown(description)
    assert "lacks" not in shown(description)


def test_missing_is_what_most_speakers_have():
    words = ["D1", "D2", "LA", "LB", "UW7"]
    names = grid("M08", words) + grid("M09", words) + grid("M10", [*words, "C1"])  # nobody else has C1: not missing
    names += grid("M11", words[1:], mics=["M3"])
    names.remove("M09_B1_LA_M3")
    description = describe(corpus_of(names))
    assert speaker_of(description, "M08")["missing"]["recordings"] == 0
    assert speaker_of(description, "M09")["missing"]["single"] == {"B1_LA_M3": 1}
    lacks = speaker_of(description, "M11")["missing"]
    assert (lacks["recordings"], lacks["of"]) == (5 + 1, 10)
    assert lacks["mics"] == ["M2"]
    assert lacks["prompts"] == ["B1_D1"]
    assert "M11 lacks 6 of 10 recordings: microphones M2; 1 prompt (B1_D1)." in shown(description)


def test_of_two_speakers_neither_is_the_measure_of_the_other():
    description = describe(corpus_of(grid("M08", ["D1", "D2"]) + grid("M09", ["D2", "D3"])))
    assert [row["missing"]["recordings"] for row in description["speakers"]] == [0, 0]


def test_takes_of_a_prompt_are_counted():
    def row(speaker, number):
        name = f"{speaker}_{number}"
        return Recording(audio_filepath=Path(name), duration=1, text="YES", recording=name, speaker=speaker, take=name,
                         prompt="yes")  # fmt: skip

    rows = [row(speaker, number) for speaker, takes in (("a", 4), ("b", 4), ("c", 3)) for number in range(takes)]
    description = describe(Corpus(Path("m"), tuple(rows)))
    assert [speaker["missing"]["single"] for speaker in description["speakers"]] == [{}, {}, {"yes": 1}]


def test_a_run_missing_from_the_file_list_is_named():
    words = [f"CW{number}" for number in range(1, 31)]
    names = [grid(speaker, words, blocks=("B1", "B2")) for speaker in ("M08", "M09", "M10")]
    cut = sorted(name for name in names[2] if "_B2_" in name)[:7]
    names[2] = [name for name in names[2] if name not in cut]
    runs = speaker_of(describe(corpus_of(functools.reduce(operator.iadd, names, []))), "M10")["missing"]["runs"]
    assert runs == [
        {"block": "B2", "place": "head", "first": cut[0][4:], "last": cut[-1][4:], "recordings": 7},
    ]


def test_reference_study_speakers():
    if not METADATA.is_dir():
        pytest.skip(f"{METADATA} is absent")
    names = [name for path in METADATA.glob("*.json") for name in json.loads(path.read_text())["utterance_ids"]]
    description = describe(corpus_of(names))
    assert (description["recordings"], description["prompts"]) == (24_311, 255)
    assert description["bands"]["very_low"] == ["F03", "M01", "M04", "M12"]
    f03 = speaker_of(description, "F03")["missing"]
    assert (f03["recordings"], f03["of"]) == (169, 1_785)
    assert len(f03["prompts"]) == 24
    assert f03["single"] == {"B3_CW14_M2": 1}
    assert f03["runs"] == [
        {"block": "B3", "place": "head", "first": "B3_C10_M2", "last": "B3_CW14_M2", "recordings": 169}
    ]
    assert speaker_of(description, "M01")["missing"]["mics"] == ["M2", "M3", "M4", "M8"]
    assert speaker_of(description, "M04")["missing"]["mics"] == ["M2", "M4"]
    assert speaker_of(description, "M08")["missing"]["recordings"] == 0
    assert "the head of the alphabetical file list" in shown(description)
