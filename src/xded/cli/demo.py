"""The main job from nothing to a report: corpus, parent, teachers, targets, students, baselines, unheard speakers.

Without --corpus it makes its own small synthetic corpus. Example: xded demo --out work/demo
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xded.cli.options import CorpusOption, JobsOption, SetOption, parsed
from xded.cli.study import carry_out

if TYPE_CHECKING:
    from xded.study.plan import Study


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder to write; what is finished there is kept.")] = Path(
        "work/demo"
    ),
    corpus: CorpusOption = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML of config keys, in place of the built-in study's.")
    ] = None,
    fold_size: Annotated[int, typer.Option(metavar="N", min=1, help="Speakers held out together.")] = 2,
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="Every attempt is trained with so many seeds.")] = 2,
    updates: Annotated[int, typer.Option(metavar="N", min=1, help="Updates of every attempt.")] = 250,
    attempt: Annotated[
        list[str] | None,
        typer.Option("--attempt", help="Only this student or baseline (repeat for more).", show_default=False),
    ] = None,
    jobs: JobsOption = 0,
    settings: SetOption = None,
) -> None:
    """The built-in study 'demo': every target speaker is held out once; then verdicts, tables and what to do next."""
    from xded.study.folder import STUDY, locked, require_format
    from xded.study.plan import folds_of
    from xded.study.run import CORPUS, corpus_of

    study = _study(corpus, config, settings, attempt).model_copy(
        update={"seeds": tuple(range(seeds)), "updates": updates}
    )
    with locked(out):  # nobody else makes the embedded corpus
        require_format(out)
        if study.corpus is None and not (out / CORPUS).is_dir():
            typer.echo("making the embedded corpus ...")
        held_out = folds_of(corpus_of(study, out), fold_size)
    carry_out(study.model_copy(update={"held_out": held_out}), out, str(out / STUDY), jobs=jobs)


def _study(corpus: Path | None, config: Path | None, settings: list[str] | None, attempts: list[str] | None) -> Study:
    """The built-in study with the corpus, config and attempts of this call.

    Raises:
        ConfigError: a value, key or file that is wrong, or teachers for attempts that are called supervised.
        StudyError: an attempt that the study does not have.
    """
    import yaml

    from xded import config as configs
    from xded.errors import ConfigError
    from xded.study.plan import build, built_in

    data = yaml.safe_load(built_in("demo"))
    if corpus is not None:
        data["corpus"] = str(corpus.resolve())
    if config is not None:
        configs.load(config)  # what no config may hold is said with the file's name
        data["config"] = yaml.safe_load(config.read_text(encoding="utf-8"))
    data["config"] |= parsed(settings)
    study = build(data, "the demo")
    objective = study.base().objective
    if taught := [name for name in configs.OF_TEACHERS if getattr(objective, name)]:
        raise ConfigError(
            f"objective.{taught[0]} would make the demo's supervised attempts listen to teachers too.",
            "Take it out; to change one attempt alone: xded study new demo.",
        )
    return study.only(attempts) if attempts else study
