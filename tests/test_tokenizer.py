from __future__ import annotations

import io
import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import sentencepiece

from xded import config
from xded.errors import TokenizerError
from xded.tokenizer import KINDS, NORMALISERS, Tokenizer, normalise

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "x-ray", "o'clock"]
REFERENCE = Path(__file__).parents[1] / "../shared/reference"


def needs_reference() -> Path:
    if not (REFERENCE / "tokenizer.model").exists():
        pytest.skip("../shared/reference is absent")
    return REFERENCE


def study_words() -> list[str]:
    words: set[str] = set()
    for path in (needs_reference() / "teacher_metadata").glob("*_metadata.json"):
        words |= set(json.loads(path.read_text())["target_words"])
    return sorted(words)


def trained_with(**options: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS), model_writer=model, model_type="char", minloglevel=3, **options
    )
    return model.getvalue()


def test_normalisers_and_kinds_are_those_of_the_config() -> None:
    fields = config.TokenizerConfig.model_fields
    assert typing.get_args(fields["normaliser"].annotation) == NORMALISERS
    assert typing.get_args(fields["kind"].annotation) == KINDS


@pytest.mark.parametrize(
    ("text", "normaliser", "wanted"),
    [
        (" come \t on\n", "upper", "COME ON"),
        ("X-RAY", "upper", "X-RAY"),
        ("X-ray", "upper_no_punctuation", "XRAY"),
        ("O\u2019Clock!", "lower_no_punctuation", "o'clock"),
        ("cafe\u0301", "upper", "CAF\u00c9"),  # a letter and its mark become one character
        ("- ?", "upper_no_punctuation", ""),
        ("Straße 7", "upper", "STRASSE 7"),
    ],
)
def test_normalise(text: str, normaliser: str, wanted: str) -> None:
    assert normalise(text, normaliser) == wanted
    assert normalise(wanted, normaliser) == wanted


def test_an_unknown_normaliser_is_named() -> None:
    with pytest.raises(TokenizerError, match=r"'UPPER'.*upper_no_punctuation"):
        normalise("a", "UPPER")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("words", [WORDS, ["a"], ["come on", "go"], [f"wörd{i}" for i in range(40)]])
def test_tiny_word_lists_train_and_come_back(kind: str, words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer.train(words, kind, 64, "upper")
    assert tokenizer.pieces[:3] == ("<unk>", "<s>", "</s>")
    assert tokenizer.size <= 64
    assert [tokenizer.decode(tokenizer.encode(word)) for word in words] == [word.upper() for word in words]
    assert capfd.readouterr() == ("", "")  # SentencePiece's log would drown the progress


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_deterministic_and_ignores_order(kind: str) -> None:
    first = Tokenizer.train(WORDS, kind, 64, "upper")
    assert Tokenizer.train([*WORDS[::-1], *WORDS], kind, 64, "upper").model_bytes == first.model_bytes


def test_characters_cost_no_word_start_token() -> None:
    assert len(Tokenizer.train(WORDS, "char", 64, "upper").encode("zero")) == 4


def test_a_vocabulary_too_small_for_the_characters_says_how_many_are_needed() -> None:
    with pytest.raises(TokenizerError, match=r"5 pieces.*need 6.*6 or more"):
        Tokenizer.train(["ab", "bc"], "char", 5, "upper")
    assert Tokenizer.train(["ab", "bc"], "char", 6, "upper").size == 6


def test_texts_of_which_nothing_is_left_are_refused() -> None:
    with pytest.raises(TokenizerError, match="no prompt"):
        Tokenizer.train(["-"], "char", 64, "upper_no_punctuation")
    with pytest.raises(TokenizerError, match="'-' \\(nothing is left of it\\)"):
        Tokenizer.train(["-", "a"], "char", 64, "upper_no_punctuation")


def test_decoding_drops_special_ids_and_never_shifts() -> None:
    tokenizer = Tokenizer.train(WORDS, "char", 64, "upper")
    ids = tokenizer.encode("seven")
    assert tokenizer.decode([1, *ids, 0, 2, 2]) == "SEVEN"
    assert [tokenizer.decode([i]) for i in range(3, tokenizer.size)] == list(tokenizer.pieces[3:])
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("wrong", [-1, 10_000])
def test_an_id_that_does_not_exist_is_an_error(wrong: int) -> None:
    tokenizer = Tokenizer.train(WORDS, "char", 64, "upper")
    with pytest.raises(TokenizerError, match=f"Token id {wrong} .*{tokenizer.size} pieces"):
        tokenizer.decode([3, wrong])


def test_fingerprint_follows_pieces_and_normaliser(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(WORDS, "char", 64, "upper")
    (tmp_path / "t.model").write_bytes(tokenizer.model_bytes)
    assert Tokenizer.load(tmp_path / "t.model", "upper").fingerprint == tokenizer.fingerprint
    assert Tokenizer.from_bytes(tokenizer.model_bytes, "lower").fingerprint != tokenizer.fingerprint
    assert Tokenizer.train(WORDS[1:], "char", 64, "upper").fingerprint != tokenizer.fingerprint


def test_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"absent\.model.*No such file.*--tokenizer"):
        Tokenizer.load(tmp_path / "absent.model", "upper")
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(TokenizerError, match=rf"bad\.model is no SentencePiece model \({len(content)} bytes\)"):
            Tokenizer.load(tmp_path / "bad.model", "upper")


def test_special_ids_elsewhere_are_refused_with_what_was_found() -> None:
    model = trained_with(vocab_size=40, hard_vocab_limit=False, unk_id=3, bos_id=-1, eos_id=1, pad_id=0)
    with pytest.raises(TokenizerError, match=r"unk 3, bos -1 \(none\), eos 1; expected unk 0, bos 1, eos 2"):
        Tokenizer.from_bytes(model, "upper")


def test_self_test_compares_pieces_and_head() -> None:
    tokenizer = Tokenizer.train(WORDS, "char", 64, "upper")
    tokenizer.self_test(WORDS, head_size=tokenizer.size)
    with pytest.raises(TokenizerError, match=f"{tokenizer.size} pieces but the model's heads have 5001"):
        tokenizer.self_test(WORDS, head_size=5001)


def test_self_test_lists_ten_words_counts_the_rest_and_says_what_is_missing() -> None:
    tokenizer = Tokenizer.train(["abc"], "char", 64, "upper")
    with pytest.raises(TokenizerError) as caught:
        tokenizer.self_test(["abc", *(f"a{c}" for c in "defghijklmno")])
    assert "cannot write 12 of 13 texts: 'ad' (<unk> for D)" in str(caught.value)
    assert str(caught.value).count("<unk> for") == 10
    assert "and 2 more" in str(caught.value)


def test_self_test_names_the_normaliser_that_would_do() -> None:
    tokenizer = Tokenizer.train(["xray", "go"], "char", 64, "upper")
    with pytest.raises(TokenizerError, match=r"--set tokenizer\.normaliser=upper_no_punctuation"):
        tokenizer.self_test(["X-RAY", "GO"])
    with pytest.raises(TokenizerError, match=r"--set tokenizer\.normaliser=upper, "):
        Tokenizer.from_bytes(tokenizer.model_bytes, "lower").self_test(["go"])
    with pytest.raises(TokenizerError) as caught:
        tokenizer.self_test(["zulu"])
    assert "tokenizer.normaliser" not in str(caught.value)


def test_a_text_that_comes_back_changed_fails() -> None:
    with pytest.raises(TokenizerError, match="comes back as 'A B'"):
        Tokenizer.train(["a\u2581b"], "char", 64, "upper")  # SentencePiece's own sign for a space


def test_the_study_tokenizer_writes_all_words_but_three() -> None:
    path, words = needs_reference() / "tokenizer.model", study_words()
    tokenizer = Tokenizer.load(path, "upper")
    assert (tokenizer.size, len(words)) == (5000, 255)
    with pytest.raises(TokenizerError) as caught:
        tokenizer.self_test(words, head_size=5000)
    assert "cannot write 3 of 255 texts: 'ROLY-POLY' (<unk> for -); 'THIRTY-FIVE'" in str(caught.value)
    assert "'X-RAY'" in str(caught.value)
    assert "--set tokenizer.normaliser=upper_no_punctuation" in caught.value.remedy
    Tokenizer.load(path, "upper_no_punctuation").self_test(words, head_size=5000)
    assert sum(len(tokenizer.encode(word)) == 1 for word in words) == 145
    assert tokenizer.decode([2715, 129]) == "YALE"


def test_stored_predictions_of_the_study_decode_to_its_true_accuracy() -> None:
    """The study read every id one too low and reported 0.00 % here."""
    tokenizer = Tokenizer.load(needs_reference() / "tokenizer.model", "upper")
    rows = json.loads((REFERENCE / "predictions/eval_M08_nemo_decoder.json").read_text())["predictions"]
    right = sum(tokenizer.decode(row["prediction_tokens"]) == row["target"] for row in rows)
    assert round(100 * right / len(rows), 2) == 18.54


def test_importing_the_tokenizer_does_not_import_torch() -> None:
    code = "import sys, xded.tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
