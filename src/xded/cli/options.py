"""Options that several verbs share, and how flags become a config."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from xded.config import Config, DecodeConfig

TOKENIZER = "tokenizer.model"  # where teachers, targets and runs keep their tokenizer

CorpusOption = Annotated[
    Path | None, typer.Option("--corpus", help="Manifest, or the folder that holds manifest.jsonl.", show_default=False)
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="YAML config (a run's config.yaml is one); flags win over it.")
]
HeldOutOption = Annotated[
    list[str] | None,
    typer.Option("--held-out", metavar="SPEAKER", help="Nothing of them may be heard (repeat for more)."),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="SPEAKER", help="Left out altogether (repeat for more)."),
]
LanguageOption = Annotated[
    str, typer.Option("--language", metavar="CODE", help="That a Whisper model is told to write; no other asks.")
]
PretrainedOption = Annotated[
    Path | None,
    typer.Option("--pretrained", help="Encoder to begin with: a .nemo archive, a Hugging Face folder, or hf:NAME."),
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder to write.", show_default=False)]
JobsOption = Annotated[
    int, typer.Option("--jobs", metavar="N", min=0, help="Pieces of work at once, one thread each; 0: one a core.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any config key, e.g. train.batch_size=16 (repeat for more)."),
]


def cores(jobs: int) -> int:
    """`--jobs 0` as the number of cores."""
    from xded.parallel import default_jobs

    return jobs or default_jobs()


def configured(path: Path | None, changes: dict[str, Any], settings: list[str] | None = None) -> Config:
    """The config of a command: defaults, then --config, then flags, then --set.

    Raises:
        ConfigError: a value, key or file that is wrong.
    """
    from xded import config as configs

    config = configs.load(path) if path else configs.Config()
    return configs.override(config, {**changes, **parsed(settings)})


def parsed(settings: list[str] | None) -> dict[str, Any]:
    """Values of `--set` by dotted key.

    Raises:
        ConfigError: one is not KEY=VALUE.
    """
    import yaml

    from xded.errors import ConfigError

    changes: dict[str, Any] = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: no '=' in it.", "Write --set section.key=value.")
        try:
            changes[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"--set {setting}: '{value}' is not valid YAML.", "Write --set section.key=value."
            ) from error
    return changes


def need_corpus(config: Config) -> Path:
    """The corpus of a command.

    Raises:
        ConfigError: none was given.
    """
    from xded.errors import ConfigError

    if config.corpus is None:
        raise ConfigError(
            "No corpus was given.", "Give --corpus DIR; 'xded corpus import --help' shows how to make one."
        )
    return config.corpus


def resolved(config: Config, *, fit: bool = True) -> Config:
    """The same config with absolute paths, so that a run folder can be used from anywhere.

    With `model.pretrained`, the encoder's sizes and features are filled in from there; a run that goes on has them in
    its config (`fit` is false).

    Raises:
        CheckpointError: the pretrained encoder is missing, damaged or of an architecture that is not supported.
    """
    from xded import config as configs

    paths: dict[str, Path | None] = {key: attrgetter(key)(config) for key in configs.PATHS}
    absolute = {
        key: str(path.resolve()) for key, path in paths.items() if path is not None and not str(path).startswith("hf:")
    }
    config = configs.override(config, absolute)
    if fit and config.model.pretrained is not None:
        from xded.models.pretrained import fitted

        config = fitted(config)
    return config


def decode_settings(config: Config, changes: dict[str, Any]) -> DecodeConfig:
    """How to decode: as the checkpoint's config says, with the flags of this command.

    Raises:
        ConfigError: a value that is wrong.
    """
    from xded import config as configs
    from xded.errors import ConfigError

    if changes.get("mode") == "decoder" and not config.model.decoder_layers:
        raise ConfigError("This recogniser has no attention decoder.", "Use its CTC head: --decode ctc.")
    return configs.override(config, {f"decode.{key}": value for key, value in changes.items()}).decode
