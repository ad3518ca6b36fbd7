"""Config: errors that name the key and the nearest one, sizes, overrides, YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from xded.config import SIZES, Config, ModelConfig, build, load, override, to_yaml
from xded.errors import ConfigError


@pytest.mark.parametrize(
    ("data", "key", "near"),
    [
        ({"trian": {}}, "trian", "train"),
        ({"train": {"bach_size": 4}}, "train.bach_size", "batch_size"),
        ({"train": {"stages": [{"epochs": 1, "peek_lr": 1.0}]}}, "train.stages.0.peek_lr", "peak_lr"),
        ({"teach": {"parent": {"wait_decay": 0.1}}}, "teach.parent.wait_decay", "weight_decay"),
    ],
)
def test_an_unknown_key_is_named_with_its_place_and_the_nearest_known_one(data: dict, key: str, near: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(data, "my.yaml")
    assert f"unknown key '{key}' (did you mean '{near}'?)" in str(error.value)
    assert "my.yaml" in str(error.value)
    assert "--help-config" in error.value.remedy


def test_an_unknown_key_like_nothing_gets_no_guess() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'zzzz'[;.]"):
        build({"zzzz": 1}, "my.yaml")


def test_every_wrong_value_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        build({"train": {"batch_size": 0}, "decode": {"mode": "ctcc"}, "seed": -1}, "my.yaml")
    for place in ("train.batch_size", "decode.mode", "seed"):
        assert place in str(error.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"model": {"width": 90, "heads": 4}}, "width 90 is not a multiple of heads 4"),
        ({"model": {"kernel": 14}}, "kernel 14 is even"),
        ({"model": {"size": "huge"}}, "model.size"),
        ({"model": {"size": ["tiny"]}}, "model.size"),
        ({"objective": {"ctc": 0, "cross_entropy": 0, "ctc_kd": 1}}, "ground truth has no weight"),
        ({"objective": {"ctc_kd": 1}, "target": {"heard": "same_prompt"}}, "ctc_kd needs heard: same_audio"),
        ({"objective": {"ctc_kd": 1}, "augment": {"tempo": 0.1}}, "augment.tempo moves frames"),
        ({"objective": {"feature_kd": 1}, "augment": {"speed": 0.1}}, "set it to 0 with feature_kd"),
        ({"objective": {"word_consistency": 1}}, "word_consistency needs several speakers"),
        ({"train": {"stages": []}}, "train.stages"),
    ],
)
def test_contradictions_are_refused_in_words(data: dict, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(data, "my.yaml")
    assert said in str(error.value)


def test_decoder_kd_may_use_other_audio_and_tempo() -> None:
    config = build(
        {"objective": {"decoder_kd": 1}, "target": {"heard": "same_prompt"}, "augment": {"tempo": 0.1}}, "my.yaml"
    )
    assert config.objective.decoder_kd == 1


def test_a_size_fills_the_fields_and_a_field_beside_it_wins() -> None:
    model = ModelConfig(size="small", decoder_layers=2)
    assert (model.width, model.encoder_layers, model.decoder_layers) == (176, 16, 2)
    assert build({"model": {"width": 40}}, "x").model.encoder_layers == SIZES["tiny"]["encoder_layers"]


def test_every_size_sets_the_same_fields() -> None:
    """`override` relies on it: what one size sets, the next one replaces."""
    assert len({frozenset(size) for size in SIZES.values()}) == 1


def test_overriding_the_size_replaces_its_numbers_and_keeps_the_rest() -> None:
    config = build({"model": {"size": "tiny", "width": 44, "dropout": 0.3}}, "x")
    changed = override(config, {"model.size": "micro", "model.decoder_layers": 3, "seed": None})
    assert changed.model.width == SIZES["micro"]["width"]
    assert changed.model.decoder_layers == 3
    assert changed.model.dropout == 0.3


def test_overriding_another_field_keeps_the_model() -> None:
    config = build({"model": {"size": "micro", "width": 32}}, "x")
    changed = override(config, {"train.batch_size": 3, "fold.held_out": ("M08",)})
    assert changed.model == config.model
    assert (changed.train.batch_size, changed.fold.held_out) == (3, ("M08",))


def test_overriding_an_unknown_key_is_an_error_with_a_guess() -> None:
    with pytest.raises(ConfigError, match="did you mean 'batch_size'"):
        override(Config(), {"train.batch_sise": 3})


@pytest.mark.parametrize("size", [*SIZES, None])
def test_yaml_round_trip(tmp_path: Path, size: str | None) -> None:
    config = build(
        {
            "corpus": "work/corpus",
            "model": {"size": size, "width": 16, "heads": 2},
            "fold": {"held_out": ["M08", "Ä1"]},
            "train": {"stages": [{"epochs": 3, "peak_lr": 1e-4, "freeze_encoder": True}], "init": "p/best.pt"},
        },
        "x",
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load(path) == config


def test_configs_are_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().train.batch_size = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("content", "said"), [(b"train: [", "not valid YAML"), (b"", "no mapping"), (b"seed: \xff", "cannot be read")]
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as error:
        load(path)
    assert str(path) in str(error.value)


def test_a_missing_config_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)
