"""Hugging Face speech models: the library's own forward pass is what ours is compared with, on tiny random ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from made_hugging_face import (
    CTC,
    SAMPLES,
    build,
    folders,
    found,
    library_features,
    rewrite,
    transformers,
    waveforms,
    write_ctc,
    write_whisper,
)
from xded.config import DecodeConfig
from xded.decoding import decode, word_list_scores
from xded.errors import ConfigError
from xded.features import valid_mask
from xded.models.hugging_face_folder import HuggingFaceModel, read_folder
from xded.models.whisper import WhisperRecogniser, whisper_recogniser
from xded.tokenizer import Tokenizer

__all__ = ["folders", "found"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # pytest resets the filter

# --- the same numbers as the library ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CTC)
def test_a_padded_batch_gives_what_the_library_gives_for_each_recording_alone(
    kind: str, folders: dict[str, tuple[Path, Any]], found: dict[str, HuggingFaceModel]
) -> None:
    folder, model = folders[kind]
    front_end, encoder = build(found[kind])
    head = found[kind].ctc_head
    assert head is not None
    waves, samples = waveforms()
    with torch.no_grad():
        features, lengths = front_end(waves, samples)
        assert lengths.tolist() == front_end.frames(samples).tolist()
        encoded, encoded_lengths = encoder(features, lengths)
        logits = nn.functional.linear(encoded, head["weight"], head["bias"])
        for row, count in enumerate(SAMPLES):
            alone = library_features(folder, waves[row, :count])
            alone.pop("attention_mask", None) if front_end.is_waveform else None
            wanted = model(**alone).logits[0]
            got = logits[row, : encoded_lengths[row]]
            valid = len(wanted) if front_end.is_waveform else len(got)
            assert len(got) == valid, "as many frames as the library"
            torch.testing.assert_close(got, wanted[:valid], atol=1e-5, rtol=1e-5)


def test_parakeet_frames_are_those_that_the_library_calls_valid(
    folders: dict[str, tuple[Path, Any]], found: dict[str, HuggingFaceModel]
) -> None:
    folder, model = folders["parakeet"]
    front_end, encoder = build(found["parakeet"])
    for count in range(3000, 6000, 77):
        ours = encoder.reduce(front_end.frames(torch.tensor([count])))
        mask = library_features(folder, torch.zeros(count))["attention_mask"]
        assert ours.tolist() == model._get_output_attention_mask(mask).sum(1).tolist(), f"{count} samples"


@pytest.mark.parametrize("count", [800, 9_000, 15_999, 16_000])
def test_whisper_encodes_valid_frames_as_the_library_does_with_its_silence(
    count: int, folders: dict[str, tuple[Path, Any]], found: dict[str, HuggingFaceModel]
) -> None:
    folder, model = folders["whisper"]
    front_end, encoder = build(found["whisper"])
    waves, _ = waveforms()
    wave = torch.cat([waves[0], waves[1]])[:count]
    with torch.no_grad():
        filled = library_features(folder, wave)["input_features"]
        wanted = model.model.encoder(filled).last_hidden_state[0]
        features, lengths = front_end(torch.stack([wave, wave * 0.01]), torch.tensor([count, count // 2]))
        assert features.shape[1] == lengths[0] <= 100, "the silence up to 30 s is not kept"
        torch.testing.assert_close(features[0], filled[0].T[: lengths[0]], atol=1e-5, rtol=0)
        encoded, encoded_lengths = encoder(features, lengths)
        torch.testing.assert_close(encoder.encode_silence_too(features, lengths)[0], wanted, atol=1e-5, rtol=1e-5)
    assert encoded_lengths[0] == (lengths[0] + 1) // 2
    torch.testing.assert_close(encoded[0], wanted[: encoded_lengths[0]], atol=1e-5, rtol=1e-5)


def test_silence_is_encoded_as_the_library_does(
    folders: dict[str, tuple[Path, Any]], found: dict[str, HuggingFaceModel]
) -> None:
    folder, model = folders["whisper"]
    front_end, encoder = build(found["whisper"])
    wave = torch.zeros(5_000)
    with torch.no_grad():
        wanted = model.model.encoder(library_features(folder, wave)["input_features"]).last_hidden_state
        got = encoder.encode_silence_too(*front_end(wave[None], torch.tensor([5_000])))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [*CTC, "whisper"])
def test_neither_neighbours_nor_the_length_of_the_padding_change_a_recording(
    kind: str, found: dict[str, HuggingFaceModel]
) -> None:
    front_end, encoder = build(found[kind])
    waves, samples = waveforms()
    with torch.no_grad():
        features, lengths = front_end(waves, samples)
        together, _ = encoder(nn.functional.pad(features, (0, 0, 0, 5)), lengths)
        for row, length in enumerate(lengths.tolist()):
            alone, kept = encoder(features[row : row + 1, :length], lengths[row : row + 1])
            torch.testing.assert_close(together[row, : kept[0]], alone[0], atol=1e-5, rtol=1e-5)


# --- training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*CTC, "whisper"])
def test_every_trainable_parameter_gets_a_gradient_and_no_other(kind: str, found: dict[str, HuggingFaceModel]) -> None:
    front_end, encoder = build(found[kind])
    encoder.requires_grad_(False)
    encoder.train().requires_grad_(True)
    features, lengths = front_end(*waveforms())
    torch.manual_seed(0)
    encoded, encoded_lengths = encoder(features, lengths)
    (encoded * valid_mask(encoded_lengths, encoded.shape[1])[:, :, None]).square().sum().backward()
    without = [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    fixed = [name for name, p in encoder.named_parameters() if not p.requires_grad]
    assert fixed == (["model.embed_positions.weight"] if kind == "whisper" else [])


@pytest.mark.parametrize("kind", ["wav2vec2", "wavlm-stable", "hubert-batch-norm", "parakeet"])
def test_training_depends_on_torchs_seed_alone_and_moves_no_statistics(
    kind: str, found: dict[str, HuggingFaceModel]
) -> None:
    front_end, encoder = build(found[kind])
    features, lengths = front_end(*waveforms())
    encoder.train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    outputs = []
    for of_numpy, of_torch in ((1, 7), (2, 7), (2, 8)):
        np.random.seed(of_numpy)
        torch.manual_seed(of_torch)
        outputs.append(encoder(features, lengths)[0].detach())
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    after = encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_masks_hide_the_share_that_the_config_says_and_never_a_whole_word(found: dict[str, HuggingFaceModel]) -> None:
    _, encoder = build(found["wav2vec2"])
    torch.manual_seed(0)
    lengths, samples = torch.tensor([40, 4, 20]), 16_000
    masks = torch.stack([encoder._time_masks(lengths, samples) for _ in range(400)]).float()
    assert masks.shape[1:] == (3, 49)
    hidden = masks.sum(dim=(0, 2)) / (400 * lengths)
    assert hidden[1] == 0
    assert 0.2 < hidden[0] < 0.3, "0.3 less what overlaps"
    assert masks[:, 0, 40:].sum() == masks[:, 2, 20:].sum() == 0


def test_masks_of_a_model_without_a_vector_for_them_are_off(tmp_path: Path) -> None:
    # facebook/wav2vec2-base-960h is such a model
    model = write_ctc(tmp_path, "wav2vec2")
    weights = {name: value for name, value in model.state_dict().items() if not name.endswith("masked_spec_embed")}
    rewrite(tmp_path, weights)
    found = read_folder(tmp_path)
    _, encoder = build(found)
    assert not encoder.has_masks
    assert not any("masked_spec_embed" in name for name in encoder.state_dict())


def test_parts_that_can_be_frozen(found: dict[str, HuggingFaceModel]) -> None:
    for kind, model in found.items():
        _, encoder = build(model)
        assert isinstance(encoder.get_submodule("layers.1"), nn.Module), kind
        encoder.get_submodule("subsampling").requires_grad_(False)
        encoder.layers.requires_grad_(False)
        left = {name.partition("model.")[2] for name, p in encoder.named_parameters() if p.requires_grad}
        behind = {"encoder.layer_norm.weight", "encoder.layer_norm.bias", "layer_norm.weight", "layer_norm.bias"}
        assert left <= behind | {"masked_spec_embed"}, f"{kind}: {left} lies before the layers and would train"


# --- Whisper writes --------------------------------------------------------------------------------------------


def whisper(found: dict[str, HuggingFaceModel], **more: Any) -> tuple[WhisperRecogniser, Tokenizer]:
    model = found["whisper"]
    assert model.tokenizer is not None
    tokenizer = Tokenizer.from_bytes(model.tokenizer[0], "lower_no_punctuation", model.tokenizer[1])
    return whisper_recogniser(model, tokenizer.size, **more), tokenizer


def test_decoder_logits_are_the_librarys_after_the_prompt(
    folders: dict[str, tuple[Path, Any]], found: dict[str, HuggingFaceModel]
) -> None:
    folder, model = folders["whisper"]
    recogniser, tokenizer = whisper(found)
    prompt = [14, 15, 17, 18]  # <|startoftranscript|> <|en|> <|transcribe|> <|notimestamps|>
    assert (tokenizer.bos, tokenizer.eos) == (recogniser.bos, recogniser.eos) == (14, 13)
    waves, samples = waveforms()
    tokens = torch.tensor([[14, 3, 4, 12], [14, 5, 6, 7], [14, 0, 1, 2]])
    with torch.no_grad():
        encoded, lengths = recogniser.encode(*recogniser.front_end(waves, samples))
        got = recogniser.decoder_logits(tokens, encoded, lengths)
        for row, count in enumerate(SAMPLES):
            filled = library_features(folder, waves[row, :count])["input_features"]
            written = torch.tensor([[*prompt, *tokens[row, 1:].tolist()]])
            wanted = model(input_features=filled, decoder_input_ids=written).logits[0, 3:]
            wanted[:, 5], wanted[0, [2, 13]] = -torch.inf, -torch.inf
            assert got.shape[2] == tokenizer.size
            rows = min(tokenizer.size, 24)
            torch.testing.assert_close(got[row, :, :rows], wanted[:, :rows], atol=1e-5, rtol=1e-5)
            assert (got[row, :, rows:] == -torch.inf).all(), "pieces without a row are never written"


def test_greedy_text_is_what_the_library_generates(
    folders: dict[str, tuple[Path, Any]], found: dict[str, HuggingFaceModel]
) -> None:
    folder, model = folders["whisper"]
    recogniser, tokenizer = whisper(found)
    waves, samples = waveforms()
    settings = DecodeConfig(mode="decoder", max_length=8)
    heard = decode(recogniser, *recogniser.front_end(waves, samples), settings, tokenizer)
    for row, count in enumerate(SAMPLES):
        filled = library_features(folder, waves[row, :count])["input_features"]
        generation = transformers.GenerationConfig.from_pretrained(folder)
        ids = model.generate(filled, generation_config=generation, language="en", task="transcribe", max_new_tokens=8)
        wanted = ids[0].tolist()
        assert len(set(wanted)) > 2, "no copy of one token"
        assert not set(wanted) & {tokenizer.eos, *tokenizer.unwritten}
        assert list(heard[row].tokens) == wanted


def test_a_shared_recording_is_attended_to_once_with_the_same_result(found: dict[str, HuggingFaceModel]) -> None:
    recogniser, tokenizer = whisper(found)
    waves, samples = waveforms()
    words = ["cab", "bad", "deaf ace", "l"]
    tokens = [tokenizer.encode(word) for word in words]
    assert tokens[0][0] == 12, "a text begins with a space"
    with torch.no_grad():
        encoded, lengths = recogniser.encode(*recogniser.front_end(waves, samples))
        scores = word_list_scores(recogniser, encoded, lengths, tokens, 0.0, tokenizer)
        for row in range(len(SAMPLES)):
            for word, ids in enumerate(tokens):
                inputs = torch.tensor([[tokenizer.bos, *ids]])
                log_probs = recogniser.decoder_logits(inputs, encoded[row : row + 1], lengths[:1]).log_softmax(2)
                wanted = sum(float(log_probs[0, step, token]) for step, token in enumerate([*ids, tokenizer.eos]))
                assert scores[row, word] == pytest.approx(wanted, abs=1e-4)


def test_whisper_chooses_from_a_word_list_and_says_that_it_has_no_ctc_head(found: dict[str, HuggingFaceModel]) -> None:
    recogniser, tokenizer = whisper(found)
    features = recogniser.front_end(*waveforms())
    settings = DecodeConfig(word_list=True, ctc_weight=0.0)
    assert {h.text for h in decode(recogniser, *features, settings, tokenizer, ["cab", "bad"])} <= {"cab", "bad"}
    with pytest.raises(ConfigError, match="no CTC head"):
        decode(recogniser, *features, DecodeConfig(mode="ctc"), tokenizer)
    with pytest.raises(ConfigError, match="no CTC head"):
        recogniser.ctc_logits(features[0])


def test_other_languages_and_models_of_one_language(tmp_path: Path, found: dict[str, HuggingFaceModel]) -> None:
    german, _ = whisper(found, language="de")
    assert german.prompt.tolist() == [[14, 16, 17, 18]]
    with pytest.raises(ConfigError, match=r"'fr'.*en, de"):
        whisper(found, language="fr")
    write_whisper(tmp_path, languages=False)
    english, _ = whisper({"whisper": read_folder(tmp_path)})
    assert english.prompt.tolist() == [[14, 18]]
    with pytest.raises(ConfigError, match="at most 22 tokens"):
        english.decoder_logits(torch.zeros(1, 24, dtype=torch.long), torch.zeros(1, 50, 16), torch.tensor([50]))
