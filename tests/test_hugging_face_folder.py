"""Folders of the Hugging Face hub: what is read from them, and what is refused."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from made_hugging_face import (
    LIKE_WAV2VEC2,
    RATE,
    build,
    folders,
    found,
    rewrite,
    shake,
    transformers,
    waveforms,
    write_ctc,
    write_json,
)
from xded import errors
from xded.config import DecodeConfig
from xded.decoding import decode_encoded
from xded.errors import CheckpointError, ConfigError, CorpusError
from xded.models.hugging_face import FAMILIES, HuggingFaceEncoder, HuggingFaceFrontEnd, library
from xded.models.hugging_face_folder import HuggingFaceModel, read_folder
from xded.models.whisper import whisper_recogniser
from xded.tokenizer import Tokenizer

__all__ = ["folders", "found"]  # fixtures

# --- reading ---------------------------------------------------------------------------------------------------


def test_old_names_torch_files_and_parts_hold_the_same(tmp_path: Path, found: dict[str, HuggingFaceModel]) -> None:
    model = write_ctc(tmp_path, "wav2vec2")
    old = {
        name.replace(".parametrizations.weight.original0", ".weight_g").replace(
            ".parametrizations.weight.original1", ".weight_v"
        ): value.half() if "lm_head" in name else value
        for name, value in model.state_dict().items()
    }
    rewrite(tmp_path, {**old, "quantizer.codevectors": torch.zeros(3)})
    (tmp_path / "preprocessor_config.json").rename(tmp_path / "old.json")
    kept = json.loads((tmp_path / "old.json").read_text())
    write_json(tmp_path / "processor_config.json", {"feature_extractor": kept})
    again = read_folder(tmp_path)
    assert again.left_out == ("quantizer.codevectors",)
    assert again.ctc_head is not None
    assert again.ctc_head["weight"].dtype == torch.float32
    assert again.encoder.keys() == found["wav2vec2"].encoder.keys()
    assert all(torch.equal(again.encoder[name], value) for name, value in found["wav2vec2"].encoder.items())
    assert again.front_end_settings == found["wav2vec2"].front_end_settings

    shutil.rmtree(tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    shutil.copy(found["wav2vec2"].path / "preprocessor_config.json", tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    parts = read_folder(tmp_path)
    assert all(torch.equal(parts.encoder[name], value) for name, value in found["wav2vec2"].encoder.items())
    assert parts.sha256 != again.sha256


def test_what_is_handed_over(found: dict[str, HuggingFaceModel]) -> None:
    for kind, model in found.items():
        assert model.sample_rate == RATE
        assert model.left_out == (), kind
        assert model.tokenizer is not None
        head_of_its_own = kind != "whisper"
        assert (model.ctc_head is not None) == head_of_its_own == (model.seq2seq is None)
        tokenizer = Tokenizer.from_bytes(model.tokenizer[0], "upper", model.tokenizer[1])
        if head_of_its_own:
            assert tokenizer.blank == model.blank == 0
            assert tokenizer.decode(tokenizer.encode("DEAF ACE")) == "DEAF ACE"


def test_a_pretraining_checkpoint_is_an_encoder_without_a_head(tmp_path: Path) -> None:
    config = transformers.Wav2Vec2Config(**LIKE_WAV2VEC2, codevector_dim=8, proj_codevector_dim=8)
    model = shake(transformers.Wav2Vec2ForPreTraining(config))
    model.save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    found = read_folder(tmp_path)
    assert found.ctc_head is None
    assert found.tokenizer is None
    assert {name.partition(".")[0] for name in found.left_out} == {"quantizer", "project_hid", "project_q"}
    build(found)


def test_an_encoder_alone_has_the_same_weights(tmp_path: Path, folders: dict[str, tuple[Path, Any]]) -> None:
    for kind, part in (("hubert", "hubert"), ("parakeet", "encoder")):
        folder, model = folders[kind]
        alone = tmp_path / kind
        getattr(model, part).save_pretrained(alone)
        shutil.copy(folder / "preprocessor_config.json", alone)
        found = read_folder(alone)
        assert found.ctc_head is None
        whole = read_folder(folder).encoder
        assert all(torch.equal(value, whole[name]) for name, value in found.encoder.items())


def test_a_ctc_model_is_decoded_with_its_own_tokenizer(found: dict[str, HuggingFaceModel]) -> None:
    class Heard(nn.Module):
        has_ctc, has_decoder = True, False

        def __init__(self, model: HuggingFaceModel) -> None:
            super().__init__()
            self.front_end, self.encoder = build(model)
            self.head = model.ctc_head

        def encode(self, *features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.encoder(*features)

        def ctc_logits(self, encoded: torch.Tensor) -> torch.Tensor:
            assert self.head is not None
            return nn.functional.linear(encoded, self.head["weight"], self.head["bias"])

        def decoder_logits(self, *_: torch.Tensor) -> torch.Tensor:
            raise AssertionError

    model = found["hubert"]
    assert model.tokenizer is not None
    heard, tokenizer = Heard(model).eval(), Tokenizer.from_bytes(model.tokenizer[0], "upper", model.tokenizer[1])
    encoded = heard.encode(*heard.front_end(*waveforms()))
    settings = DecodeConfig(word_list=True, ctc_weight=1.0)
    for hypothesis in decode_encoded(heard, *encoded, settings, tokenizer, ["DEAF ACE", "CAB"]):
        assert hypothesis.text in ("DEAF ACE", "CAB")
        assert np.isfinite(hypothesis.score)


# --- bad input -------------------------------------------------------------------------------------------------


def change(folder: Path, name: str, **changes: Any) -> None:
    found = json.loads((folder / name).read_text())
    write_json(folder / name, {key: value for key, value in {**found, **changes}.items() if value is not None})


def lose(folder: Path, name: str) -> None:
    (folder / name).unlink()


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weights": Path("/")}, folder / "pytorch_model.bin")


def unfolding(folder: Path) -> None:
    """One number as a tensor of two million."""
    rewrite(folder, {"wav2vec2.x": torch.zeros(1, dtype=torch.half).expand(2**20, 2)})


def compressed(folder: Path) -> None:
    rewrite(folder, {"wav2vec2.x": torch.zeros(2**20)})
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as stored:
        members = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in members.items():
            packed.writestr(name, data)


def other_weights(folder: Path, model: Any) -> None:
    weights = model.state_dict()
    weights.pop("wav2vec2.feature_projection.projection.bias")
    weights.pop("wav2vec2.encoder.layers.1.final_layer_norm.bias")
    weights["wav2vec2.encoder.layers.2.extra"] = torch.zeros(2)
    weights["wav2vec2.encoder.layer_norm.weight"] = torch.zeros(5)
    rewrite(folder, weights)


def away(folder: Path) -> None:
    lose(folder, "model.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"lm_head.weight": "../secret.safetensors"}})


BAD = {
    "no config": (lambda f: lose(f, "config.json"), "no config.json.*hf download"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
    "a list": (lambda f: write_json(f / "config.json", [1]), "holds no mapping"),
    "other type": (lambda f: change(f, "config.json", model_type="bert"), "'bert'.*wav2vec2.*parakeet_ctc"),
    "no type": (lambda f: change(f, "config.json", model_type=None), "None.*not supported"),
    "own code": (lambda f: change(f, "config.json", auto_map={"AutoModel": "evil.Model"}), "code of its own"),
    "own front end": (
        lambda f: change(f, "preprocessor_config.json", auto_map={"AutoFeatureExtractor": "evil.E"}), "code of its own"
    ),
    "wrong value": (lambda f: change(f, "config.json", hidden_size="big"), "can have this config.*hidden_size"),
    "sizes apart": (lambda f: change(f, "config.json", num_attention_heads=3), "can have this config.*num_heads"),
    "quantised": (lambda f: change(f, "config.json", quantization_config={"bits": 4}), "quantised"),
    "adapter": (lambda f: change(f, "config.json", add_adapter=True), "add_adapter"),
    "no front end": (lambda f: lose(f, "preprocessor_config.json"), "no preprocessor_config.json"),
    "other front end": (
        lambda f: change(f, "preprocessor_config.json", feature_extractor_type="WhisperFeatureExtractor"),
        "WhisperFeatureExtractor, and its encoder needs a Wav2Vec2",
    ),
    "wide front end": (lambda f: change(f, "preprocessor_config.json", feature_size=2), "makes 2 values"),
    "no weights": (lambda f: lose(f, "model.safetensors"), "neither model.safetensors nor pytorch_model.bin"),
    "cut off": (cut, "model.safetensors is damaged"),
    "more than weights": (pickled, "pytorch_model.bin is damaged or holds more than weights"),
    "unfolding": (unfolding, "pytorch_model.bin unpacks to more than its size"),
    "compressed": (compressed, "pytorch_model.bin.*it unpacks to more than its size"),
    "part elsewhere": (away, "files of other folders: ../secret.safetensors"),
    "no head": (lambda f: rewrite(f, {}), "missing: model.encoder"),
    "small head": (lambda f: change(f, "config.json", vocab_size=19), r"CTC head is \(20, 16\).*vocabulary of 19"),
    "large vocabulary": (lambda f: change(f, "vocab.json", ZZ=20), "ids up to 20, and its head has 20 rows"),
    "languages": (lambda f: write_json(f / "vocab.json", {"eng": {"A": 1}}), "several languages"),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(folders: dict[str, tuple[Path, Any]]) -> Path:
    return folders["wav2vec2"][0]


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_refused(case: str, plain: Path, tmp_path: Path) -> None:
    spoil, message = BAD[case]
    folder = tmp_path / "model"
    shutil.copytree(plain, folder)
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as refused:
        read_folder(folder)
    assert refused.value.remedy


def test_every_weight_that_does_not_fit_is_listed(folders: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder, model = folders["wav2vec2"]
    shutil.copytree(folder, tmp_path / "model")
    other_weights(tmp_path / "model", model)
    with pytest.raises(CheckpointError) as refused:
        read_folder(tmp_path / "model")
    for part in (
        "missing: model.encoder.layers.1.final_layer_norm.bias, model.feature_projection.projection.bias (2)",
        "unexpected: model.encoder.layers.2.extra (1)",
        "of another shape: model.encoder.layer_norm.weight (5,) for (16,) (1)",
    ):
        assert part in refused.value.problem


def test_bad_whisper_folders_are_refused(folders: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    def spoilt(name: str, **changes: Any) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(folders["whisper"][0], folder)
        change(folder, name, **changes)
        return folder

    with pytest.raises(CheckpointError, match="at most 200 frames, and its encoder takes 100"):
        read_folder(spoilt("preprocessor_config.json", chunk_length=2))
    with pytest.raises(CheckpointError, match="the id 99; there are 24"):
        read_folder(spoilt("generation_config.json", suppress_tokens=[99]))
    with pytest.raises(CheckpointError, match="not tied"):
        read_folder(spoilt("config.json", tie_word_embeddings=False))
    silent = read_folder(spoilt("generation_config.json", no_timestamps_token_id=None))
    with pytest.raises(CheckpointError, match=r"no generation_config\.json"):
        whisper_recogniser(silent, 24)


def test_recordings_of_impossible_length_are_refused(found: dict[str, HuggingFaceModel]) -> None:
    front_end, _ = build(found["whisper"])
    with pytest.raises(CorpusError, match=r"1\.1 s is longer than the 1 s that Whisper hears"):
        front_end(torch.zeros(1, 17_600), torch.tensor([17_600]))
    front_end, encoder = build(found["wav2vec2"])
    with pytest.raises(CorpusError, match="300 feature frames is too short"):
        encoder(*front_end(torch.randn(2, 900), torch.tensor([900, 300])))
    front_end, _ = build(found["parakeet"])
    with pytest.raises(CorpusError, match=r"200 samples \(12 ms\)"):
        front_end(torch.randn(1, 200), torch.tensor([200]))


def test_names_of_the_hub_are_looked_up_in_the_cache_alone(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    real, asked = huggingface_hub.snapshot_download, []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **more: asked.append(more) or real(*a, **more))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"hf download some/model --local-dir models/model"):
        read_folder(Path("some/model"))
    for wrong in ("nowhere", "a/b/c", str(plain / "config.json")):
        with pytest.raises(CheckpointError, match="no such folder"):
            read_folder(Path(wrong))
    cached = tmp_path / "models--some--model"
    shutil.copytree(plain, cached / "snapshots" / "0123")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    assert read_folder(Path("some/model")).sha256 == read_folder(plain).sha256
    assert asked == [{"local_files_only": True}] * 2


def test_the_library_is_imported_when_it_is_used_and_its_absence_names_the_extra(
    found: dict[str, HuggingFaceModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    library.cache_clear()
    monkeypatch.setattr(errors, "import_module", absent)
    message = r"'transformers', which is not installed.*xded\[transformers\]"
    with pytest.raises(ConfigError, match=message):
        HuggingFaceFrontEnd(found["hubert"].front_end_settings)
    with pytest.raises(ConfigError, match=message):
        HuggingFaceEncoder(found["hubert"].encoder_settings)


def test_settings_of_another_type_make_no_encoder(found: dict[str, HuggingFaceModel]) -> None:
    with pytest.raises(CheckpointError, match="'bert' are not supported"):
        HuggingFaceEncoder({**found["hubert"].encoder_settings, "model_type": "bert"})


def test_every_supported_type_is_one_of_the_librarys() -> None:
    for name, family in FAMILIES.items():
        assert transformers.AutoConfig.for_model(name).model_type == name
        assert hasattr(transformers, family.front_end)
