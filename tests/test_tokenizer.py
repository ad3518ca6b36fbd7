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
    for name in ("t.model", "tokenizer.ckpt"):  # SpeechBrain's name for the same bytes
        (tmp_path / name).write_bytes(tokenizer.model_bytes)
        assert Tokenizer.load(tmp_path / name, "upper").fingerprint == tokenizer.fingerprint
    assert Tokenizer.from_bytes(tokenizer.model_bytes, "lower").fingerprint != tokenizer.fingerprint
    assert Tokenizer.train(WORDS[1:], "char", 64, "upper").fingerprint != tokenizer.fingerprint


# from the code before there was another kind than SentencePiece: checkpoints and targets are bound by them
FINGERPRINTS = {
    "char": "d9aafed730beb3277f23c2a3847c1ebb1df569bb9277e6fa298678680a23d384",
    "bpe": "4b25c6c47ee32919b06d442a3acb49bf029dba04801d8d3314bed04824373ddf",
    "unigram": "5564380a46518c9a2c8171fadd1794ade328d80561280a1d57d9ff2b9badf95d",
}


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprints_stay_what_they_were(kind: str) -> None:
    tokenizer = Tokenizer.train(WORDS, kind, 64, "upper")
    assert tokenizer.fingerprint == FINGERPRINTS[kind]
    assert (tokenizer.kind, tokenizer.appended, tokenizer.unwritten) == ("sentencepiece", 0, (0, 1))


def test_the_study_tokenizer_keeps_its_fingerprint() -> None:
    tokenizer = Tokenizer.load(needs_reference() / "tokenizer.model", "upper")
    assert tokenizer.fingerprint == "bb56b292e29996bd684154887044cf692126537bc1ef9a65565e86292d5b8f67"
    assert tokenizer.with_normaliser("upper_no_punctuation").fingerprint.startswith("e9f99e73246d")


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    return {name: getattr(tokenizer, name) for name in ("unk", "blank", "bos", "eos")}


def as_json(content: object) -> bytes:
    return json.dumps(content).encode()


def test_a_sentencepiece_model_without_start_and_end_gets_nemos_blank() -> None:
    model = trained_with(vocab_size=40, hard_vocab_limit=False, bos_id=-1, eos_id=-1)
    tokenizer = Tokenizer(model, "lower")
    own = sentencepiece.SentencePieceProcessor(model_proto=model)
    size = own.get_piece_size()
    assert special_ids(tokenizer) == {"unk": 0, "blank": size, "bos": size + 1, "eos": size + 2}
    assert tokenizer.pieces[size:] == ("<blank>", "<s>", "</s>")
    assert (tokenizer.size, tokenizer.appended) == (size + 3, 3)
    assert tokenizer.encode("seven") == own.encode("seven")
    assert tokenizer.decode([size + 1, *tokenizer.encode("seven"), size, size + 2]) == "seven"


def test_a_sentencepiece_model_with_other_special_ids_keeps_them() -> None:
    """T5's habit; the padding is what CTC recognisers of the Hugging Face hub call blank."""
    model = trained_with(vocab_size=40, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    tokenizer = Tokenizer(model, "lower")
    assert special_ids(tokenizer) == {"unk": 2, "blank": 0, "bos": tokenizer.size - 1, "eos": 1}
    tokenizer.self_test(["seven", "x-ray"])
    # with <unk> 0, <s> 1 and </s> 2 the blank stays 0, whatever else there is
    assert Tokenizer(trained_with(vocab_size=40, hard_vocab_limit=False, pad_id=3), "lower").blank == 0


def test_special_ids_that_collide_are_refused() -> None:
    model = trained_with(vocab_size=40, hard_vocab_limit=False, unk_id=3, bos_id=1, eos_id=2, eos_piece="<pad>")
    with pytest.raises(TokenizerError, match="unk 3, blank 2, bos 1, eos 2: start and end of a text need ids"):
        Tokenizer(model, "upper")


def test_the_vocabulary_of_wav2vec2() -> None:
    pieces = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]  # of facebook/wav2vec2-base-960h
    tokenizer = Tokenizer(as_json({piece: i for i, piece in enumerate(pieces)}), "upper")
    assert special_ids(tokenizer) == {"unk": 3, "blank": 0, "bos": 1, "eos": 2}
    assert (tokenizer.kind, tokenizer.size, tokenizer.appended) == ("pieces", 32, 0)
    assert tokenizer.encode("come on") == [pieces.index(c) for c in "COME|ON"]
    assert tokenizer.decode([0, *tokenizer.encode("hello"), 4, 4, *tokenizer.encode("o'clock"), 4]) == "HELLO O'CLOCK"
    assert tokenizer.unspellable(["x-ray", "a|b", "xray"]) == {"x-ray": "<unk> for -", "a|b": "<unk> for |"}
    shuffled = dict(sorted((piece, i) for i, piece in enumerate(pieces)))
    assert Tokenizer(as_json(shuffled), "upper").fingerprint == tokenizer.fingerprint  # ids count, not lines


LISTS = {
    "one a line": "<blank>\n<unk>\nA\nB\nAB\n<sos/eos>\n",
    "with ids": "<blank> 0\nAB 4\nA 2\nB 3\n<unk> 1\n<sos/eos> 5\n",
    "with tabs and Windows line ends": "<blank>\t0\r\n<unk>\t1\r\nA\t2\r\nB\t3\r\nAB\t4\r\n<sos/eos>\t5\r\n",
    "with the symbols of k2": "<blank> 0\n<unk> 1\nA 2\nB 3\nAB 4\n<sos/eos> 5\n#0 6\n#1 7\n",
    "JSON list": '["<blank>", "<unk>", "A", "B", "AB", "<sos/eos>"]',
    "JSON object": '{"AB": 4, "<blank>": 0, "<unk>": 1, "A": 2, "B": 3, "<sos/eos>": 5}',
    "with a byte order mark": "\ufeff<blank>\n<unk>\nA\nB\nAB\n<sos/eos>",
}


@pytest.mark.parametrize("text", LISTS.values(), ids=LISTS.keys())
def test_every_form_of_a_list_is_the_same_tokenizer(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_bytes(text.encode())
    tokenizer = Tokenizer.load(tmp_path / "tokens.txt", "upper")
    assert tokenizer.pieces == ("<blank>", "<unk>", "A", "B", "AB", "<sos/eos>")
    assert special_ids(tokenizer) == {"unk": 1, "blank": 0, "bos": 5, "eos": 5}
    assert tokenizer.unwritten == (0, 1)  # the decoder must be able to end
    again = Tokenizer.from_bytes(tokenizer.model_bytes, "upper", tokenizer.kind)
    assert again.fingerprint == tokenizer.fingerprint == Tokenizer(LISTS["JSON list"].encode(), "upper").fingerprint


def test_lists_are_cut_greedily_with_the_longest_piece_first() -> None:
    tokenizer = Tokenizer(as_json(["A", "B", "C", "AB", "BCA"]), "upper")
    assert [tokenizer.pieces[i] for i in tokenizer.encode("abca")] == ["AB", "C", "A"]
    assert special_ids(tokenizer) == {"blank": 5, "bos": 6, "eos": 7, "unk": 8}
    assert tokenizer.encode("axb") == [0, 8, 1]
    assert tokenizer.decode([0, 8, 1, 5, 7]) == "A<unk>B"  # not a text that could be right
    with pytest.raises(TokenizerError, match="<unk> for B C D"):  # ABC leaves D over; A and BCD would do
        Tokenizer(as_json(["A", "AB", "ABC", "BCD"]), "upper").self_test(["ABCD"])


def test_pieces_of_sentencepiece_in_a_list_begin_words() -> None:
    tokenizer = Tokenizer("<unk>\n\u2581CO\nME\n\u2581\nON\nC\n".encode(), "upper")
    ids = tokenizer.encode("come on")
    assert [tokenizer.pieces[i] for i in ids] == ["\u2581CO", "ME", "\u2581", "ON"]
    assert tokenizer.decode(ids) == "COME ON"


@pytest.mark.parametrize("space", ["|", "<space>", "\u2581", " "])
def test_a_piece_for_the_space_stands_between_words_only(space: str) -> None:
    tokenizer = Tokenizer(as_json([space, *"COMEN"]), "upper")
    assert tokenizer.encode("come on") == [1, 2, 3, 4, 0, 2, 5]
    tokenizer.self_test(["come on", "no"])


def test_one_line_is_a_character_set() -> None:
    tokenizer = Tokenizer(b" ABCDEFGHIJKLMNOPQRSTUVWXYZ'\n", "upper")
    assert (tokenizer.size, tokenizer.blank) == (32, 28)
    tokenizer.self_test(["come on", "o'clock"])
    assert tokenizer.unspellable(["X-RAY"]) == {"X-RAY": "<unk> for -"}


def hugging_face(kind: str) -> bytes:
    """A small tokenizer.json, as `tokenizers` writes it."""
    library = pytest.importorskip("tokenizers")
    words = [word.upper() for word in WORDS]
    if kind == "byte-level":  # as Whisper's
        made = library.Tokenizer(library.models.BPE())
        made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = library.decoders.ByteLevel()
        special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>"]
        alphabet = library.pre_tokenizers.ByteLevel.alphabet()
        trainer = library.trainers.BpeTrainer(
            vocab_size=280, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    else:  # as Parakeet's
        made = library.Tokenizer(library.models.Unigram())
        made.pre_tokenizer = library.pre_tokenizers.Metaspace()
        made.decoder = library.decoders.Metaspace()
        trainer = library.trainers.UnigramTrainer(
            vocab_size=60, unk_token="<unk>", special_tokens=["<unk>", "<pad>"], show_progress=False
        )
    made.train_from_iterator(words, trainer)
    made.enable_padding(length=9)
    return made.to_str().encode()


def test_a_tokenizer_json_with_padding_as_blank() -> None:
    tokenizer = Tokenizer(hugging_face("unigram"), "upper")
    assert tokenizer.kind == "tokenizer.json"
    size = tokenizer.size
    assert special_ids(tokenizer) == {"unk": 0, "blank": 1, "bos": size - 2, "eos": size - 1}
    tokenizer.self_test(WORDS)
    ids = tokenizer.encode("seven")
    assert 0 < len(ids) < 9  # its padding is no part of the text
    assert tokenizer.decode([size - 2, 1, *ids, 1, size - 1]) == "SEVEN"
    assert tokenizer.unspellable(["zu7u"]) == {"zu7u": "<unk> for 7"}
    assert Tokenizer.from_bytes(tokenizer.model_bytes, "upper", "tokenizer.json").fingerprint == tokenizer.fingerprint


def test_a_byte_level_tokenizer_json() -> None:
    tokenizer = Tokenizer(hugging_face("byte-level"), "upper")
    known = tokenizer.size - tokenizer.appended
    assert special_ids(tokenizer) == {"eos": 0, "bos": 1, "blank": known, "unk": known + 1}
    tokenizer.self_test([*WORDS, "any text at all: \u00e9"])
    assert tokenizer.decode([1, 2, *tokenizer.encode("seven"), 0]) == "SEVEN"  # <|en|> is no text
    assert tokenizer.decode([*tokenizer.encode("x"), tokenizer.unk, *tokenizer.encode("ray")]) == "X<unk>RAY"


BAD = {
    "empty": (b" \n", r"is empty \(2 bytes\).*Read are SentencePiece models"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "Git LFS pointer.*git lfs pull"),
    "PyTorch checkpoint": (b"PK\x03\x04\x00\x00", "zip archive.*Read are SentencePiece models"),
    "cut off": (b"\x0a\x0e\x0a\x05<unk>", "9 bytes that are neither text nor a whole SentencePiece model.*Read are"),
    "duplicates": (b'["A", "B", "A"]', "pieces more than once: 'A'"),
    "duplicate keys": (b'{"A": 0, "B": 1, "A": 2}', "pieces more than once: 'A'"),
    "no id 0": (b"A 1\nB 2\n", r"2 pieces but its ids are not 0 to 1: id 0 is missing, 'A' has 1"),
    "an id twice": (b'{"A": 0, "B": 1, "C": 1}', "id 2 is missing, 'C' has 1"),
    "no pieces": (b"[]", "has no pieces"),
    "empty piece": (b'["A", ""]', "has an empty piece"),
    "languages": (b'{"eng": {"A": 0}}', r"gives no ids to pieces \(keys: eng\)"),
    "numbers": (b"[1, 2]", "something else than pieces"),
    "prose": (b"A tokenizer.\nNot.\n", "line 1 is 'A tokenizer.', expected one piece"),
    "a hole": (b"A\n\nB\n", "line 2 is empty"),
    ".vocab": (b"<unk>\t0\n\xe2\x96\x81A\t-3.25\n", "with scores.*Give the .model file"),
    "WordPiece": (b"A\nB\n##B\n", "WordPiece.* do not say how a word is cut.*tokenizer.json"),
    "subword-nmt": (b"A@@\nB\n", "subword-nmt"),
    "byte-level": (json.dumps([chr(i) for i in range(33, 400)]).encode(), "byte-level BPE"),
    "broken tokenizer.json": (b'{"model": {"type": "BPE"}}', "cannot be read as a tokenizer.json"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD.keys())
def test_what_is_no_tokenizer_is_refused_with_what_was_found(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=rf"bad\.model .*{message}"):
        Tokenizer.load(tmp_path / "bad.model", "upper")


def test_files_that_cannot_be_opened_and_kinds_that_are_not_known(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"absent\.model.*No such file.*--tokenizer"):
        Tokenizer.load(tmp_path / "absent.model", "upper")
    with pytest.raises(TokenizerError, match=r"kind 'morse'; known are sentencepiece"):
        Tokenizer.from_bytes(b"A", "upper", "morse")
    with pytest.raises(TokenizerError, match="neither text nor a whole SentencePiece model"):
        Tokenizer.from_bytes(b'["A"]', "upper")  # a checkpoint without a kind holds a SentencePiece model


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


def test_self_test_says_what_the_texts_cost() -> None:
    tokenizer = Tokenizer.train(["xray", "go"], "char", 64, "upper")
    with pytest.raises(TokenizerError, match=r"cannot write 1 of 2 texts.*WRA could not be above 75\.0 %"):
        tokenizer.self_test(["GO", "X-RAY", "GO", "GO"])
    assert tokenizer.normalisers_for(["GO", "X-RAY"]) == ["upper_no_punctuation"]


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


@pytest.mark.parametrize("data", [b'["A", "B", "|"]', b"AB '"], ids=["list", "characters"])
def test_a_checkpoint_keeps_every_kind_and_old_ones_are_sentencepiece(data: bytes) -> None:
    from xded.models.recogniser import describe, tokenizer_of  # loads torch, which the tokenizer does not need

    for tokenizer in (Tokenizer(data, "upper"), Tokenizer.train(["AB"], "char", 64, "upper")):
        payload = describe(tokenizer, config.Config(), "student", ())
        again = tokenizer_of(payload, "upper")
        assert (again.kind, again.fingerprint) == (tokenizer.kind, payload["tokenizer_fingerprint"])
    del payload["tokenizer_kind"]
    assert tokenizer_of(payload, "upper").fingerprint == tokenizer.fingerprint


def test_importing_the_tokenizer_does_not_import_torch() -> None:
    code = "import sys, xded.tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
