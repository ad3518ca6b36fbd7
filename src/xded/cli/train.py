"""Train a student, or a supervised baseline (without --targets), for one fold.

Example: xded train --corpus work/uaspeech --held-out M08 --targets work/M08/targets --ctc-kd 1 --out runs/M08
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xded.cli.options import (
    TOKENIZER,
    ConfigOption,
    CorpusOption,
    ExcludeOption,
    HeldOutOption,
    PretrainedOption,
    SetOption,
    configured,
    need_corpus,
    resolved,
)

if TYPE_CHECKING:
    from xded.config import Config
    from xded.corpus.folds import Split
    from xded.corpus.manifest import Corpus
    from xded.tokenizer import Tokenizer


def train(
    out: Annotated[Path | None, typer.Option("--out", help="Run folder.", show_default=False)] = None,
    corpus: CorpusOption = None,
    held_out: HeldOutOption = None,
    exclude: ExcludeOption = None,
    config: ConfigOption = None,
    targets: Annotated[Path | None, typer.Option(help="Folder of 'xded targets'.", show_default=False)] = None,
    init: Annotated[Path | None, typer.Option(help="Checkpoint to start from.", show_default=False)] = None,
    pretrained: PretrainedOption = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer file; none: one is trained.")] = None,
    model_size: Annotated[str | None, typer.Option(metavar="SIZE", help="micro, tiny, small or base.")] = None,
    ctc: Annotated[float | None, typer.Option(help="Weight of CTC on the true text.")] = None,
    cross_entropy: Annotated[float | None, typer.Option(help="Weight of the decoder's cross-entropy.")] = None,
    ctc_kd: Annotated[float | None, typer.Option(help="Weight of CTC-KD.")] = None,
    decoder_kd: Annotated[float | None, typer.Option(help="Weight of decoder-KD.")] = None,
    temperature: Annotated[float | None, typer.Option(help="T of the targets.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of the last stage.")] = None,
    peak_lr: Annotated[float | None, typer.Option(help="Peak learning rate of the last stage.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Recordings in a batch.")] = None,
    controls: Annotated[
        bool | None, typer.Option("--controls/--no-controls", help="Control speakers train too.")
    ] = None,
    include_held_out: Annotated[
        bool, typer.Option("--include-held-out", help="Diagnostic: hear half of their takes.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Seed.")] = None,
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps.")] = None,
    devices: Annotated[int | None, typer.Option(metavar="N", help="Devices that share each batch.")] = None,
    settings: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from latest.pt.")] = False,
    force: Annotated[
        list[str] | None,
        typer.Option("--force", metavar="CHECK", help="Go on although this check refuses; recorded (repeat for more)."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on the console.")] = False,
    show_config: Annotated[bool, typer.Option("--show-config", help="Print the whole config and stop.")] = False,
    help_config: Annotated[bool, typer.Option("--help-config", help="Print every config key and stop.")] = False,
) -> None:
    """One run: checks, two-stage training, checkpoints."""
    if help_config:
        typer.echo(_every_key())
        return
    changes: dict[str, Any] = {
        "corpus": corpus, "fold.held_out": held_out, "fold.exclude": exclude, "fold.controls": controls,
        "fold.include_held_out": include_held_out or None, "targets": targets, "train.init": init,
        "model.pretrained": pretrained, "tokenizer.path": tokenizer, "model.size": model_size, "objective.ctc": ctc,
        "objective.cross_entropy": cross_entropy, "objective.ctc_kd": ctc_kd, "objective.decoder_kd": decoder_kd,
        "objective.temperature": temperature, "train.batch_size": batch_size, "train.device": device,
        "train.devices": devices, "seed": seed,
    }  # fmt: skip
    begun = out / "config.yaml" if resume and config is None and out is not None else None
    going_on = begun is not None and begun.is_file()
    asked = configured(begun if going_on else config, changes, settings)
    tree = resolved(with_last_stage(asked, epochs, peak_lr), fit=not going_on)
    if show_config:
        from xded.config import to_yaml

        typer.echo(to_yaml(tree), nl=False)
        return
    run(tree, out, resume, quiet, frozenset(force or ()))


def with_last_stage(tree: Config, epochs: int | None, peak_lr: float | None) -> Config:
    """The config with epochs and learning rate of its last stage replaced."""
    from xded import config as configs

    stages = tree.model_dump()["train"]["stages"]
    last = {**stages[-1], **{k: v for k, v in (("epochs", epochs), ("peak_lr", peak_lr)) if v is not None}}
    return configs.override(tree, {"train.stages": (*stages[:-1], last)})


def _tokenizer(corpus: Corpus, parts: Split, tree: Config, out: Path, first: bool) -> Tokenizer:
    """That of --tokenizer, else of the checkpoint to start from, else of the targets, else one is trained.

    It is kept in `out` by the first of several processes; the others train the same one again.
    """
    from xded import config as configs
    from xded.models.recogniser import load_recogniser
    from xded.teachers.adapt import load_or_train_tokenizer

    if tree.tokenizer.path is None and tree.train.init is not None:
        return load_recogniser(tree.train.init).tokenizer
    if tree.tokenizer.path is None and tree.targets is not None and (tree.targets / TOKENIZER).is_file():
        tree = configs.override(tree, {"tokenizer.path": tree.targets / TOKENIZER})
    if not any(out.glob("*.pt")):
        if not first:
            with TemporaryDirectory() as folder:
                return load_or_train_tokenizer(corpus, parts, tree, Path(folder) / TOKENIZER)
        (out / TOKENIZER).unlink(missing_ok=True)  # left by a run that was refused
    return load_or_train_tokenizer(corpus, parts, tree, out / TOKENIZER)


def run(tree: Config, out: Path | None, resume: bool, quiet: bool, force: frozenset[str]) -> None:
    """Splits, finds the tokenizer, trains."""
    from xded.corpus.folds import make_fold
    from xded.corpus.manifest import read_corpus
    from xded.errors import ConfigError
    from xded.teachers.adapt import parts_of
    from xded.training.job import Job
    from xded.training.processes import place_of
    from xded.training.run import fit

    if out is None:
        raise ConfigError("No run folder was given.", "Give --out DIR.")
    corpus = read_corpus(need_corpus(tree))
    fold = make_fold(corpus, tree.fold)
    parts = parts_of(corpus, fold, tree)
    place = place_of(tree.train)
    first = place is None or place.first  # of several processes that torchrun or srun has started
    tokenizer = _tokenizer(corpus, parts, tree, out, first)
    name = "student" if tree.objective != tree.objective.supervised else "supervised"
    job = Job(name, tree, parts.train, parts.validation, fold, frozenset(r.take for r in parts.test), tokenizer, out)
    job.force = force
    best = fit(job, resume=resume, quiet=quiet)
    held_out = " ".join(f"--held-out {speaker}" for speaker in fold.held_out)
    if first:
        typer.echo(f"{best}\nTest it: xded evaluate {best} {held_out}".rstrip())


def _every_key() -> str:
    """Every config key with type, default and meaning, from the models themselves."""
    from pydantic import BaseModel

    from xded.config import Config

    def lines(model: type[BaseModel], prefix: str) -> list[str]:
        found: list[str] = []
        for name, field in model.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found += lines(kind, f"{prefix}{name}.")
            else:
                default = field.default
                shown = json.dumps([s.model_dump() for s in default]) if name == "stages" else default
                found.append(f"{prefix}{name} = {shown}\n    {field.description or ''}")
        return found

    return "\n".join(lines(Config, ""))
