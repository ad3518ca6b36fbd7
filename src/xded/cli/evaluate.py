"""Test a checkpoint on held-out speakers.

A pretrained recogniser (a .nemo archive, a Hugging Face folder, hf:NAME) is tested zero-shot, with its own tokenizer.

Example: xded evaluate runs/M08/best.pt --held-out M08 --decode decoder --max-length 10
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xded.cli.options import CorpusOption, LanguageOption, decode_settings

if TYPE_CHECKING:
    from xded.config import DecodeConfig
    from xded.corpus.manifest import Corpus, Recording
    from xded.models.recogniser import Recogniser
    from xded.scoring import Prediction, Scores


def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint, run folder, or a pretrained recogniser.", show_default=False)
    ],
    held_out: Annotated[
        list[str] | None,
        typer.Option("--held-out", metavar="SPEAKER", help="Test on them (repeat for more); default: the run's own."),
    ] = None,
    corpus: CorpusOption = None,
    decode: Annotated[str | None, typer.Option("--decode", metavar="HEAD", help="ctc or decoder.")] = None,
    beam: Annotated[int | None, typer.Option(help="Beam width; 1 is greedy.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Most tokens the decoder may write.")] = None,
    word_list: Annotated[
        bool, typer.Option("--word-list", help="Choose among the corpus's words with both heads.")
    ] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Must be the checkpoint's own; checked.", show_default=False)
    ] = None,
    language: LanguageOption = "en",
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    output: Annotated[
        Path | None, typer.Option(help="Scores (JSON); default: scores.json in the run.", show_default=False)
    ] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only so many takes, drawn at random (seed 0).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """WRA, WER, CER with intervals over takes; predictions.jsonl beside the scores."""
    from xded.decoding import check_max_length
    from xded.models.recogniser import load_recogniser, pick_device
    from xded.report.tables import score_table

    if output is None:
        output = _beside(checkpoint)
    recogniser = load_recogniser(checkpoint, device=str(pick_device(device)), language=language)
    loaded, test = _test_recordings(recogniser, corpus, held_out, samples)
    changes: dict[str, Any] = {"mode": decode, "beam": beam, "max_length": max_length, "word_list": word_list or None}
    settings = decode_settings(recogniser.config, changes)
    _check_tokenizer(recogniser, tokenizer, test)
    if settings.mode == "decoder" or settings.word_list:
        check_max_length([r.text for r in test], recogniser.tokenizer, settings.max_length)
    scores, predictions = _tested(recogniser, loaded, test, settings, samples)
    kept = _keep(scores, predictions, output)
    _warn_of_heard(recogniser, test)
    if as_json:
        typer.echo(scores.to_json())
        return
    from rich.console import Console

    console = Console()
    console.print(score_table(scores))
    console.print(f"{output}\n{kept}", highlight=False, soft_wrap=True)


def _tested(
    recogniser: Recogniser, corpus: Corpus, test: Sequence[Recording], settings: DecodeConfig, samples: int | None
) -> tuple[Scores, list[Prediction]]:
    """Recognises the recordings, and scores what comes out under conditions that are stated."""
    from xded.scoring import score
    from xded.training.data import TrainingData
    from xded.training.evaluation import conditions_of, recognise

    data = TrainingData(test, recogniser.student.front_end, recogniser.tokenizer)
    words = _listed_words(recogniser, corpus, test) if settings.word_list else None
    predictions = recognise(recogniser.student, data, settings, word_list=words, seed=recogniser.config.seed)
    conditions = conditions_of(recogniser, corpus, test, settings)
    if samples:
        conditions["samples"] = f"at most {samples} takes, drawn at random"
    normaliser = recogniser.tokenizer.normaliser
    return score(predictions, normaliser=normaliser, word_list=corpus.texts, conditions=conditions), predictions


def _beside(checkpoint: Path) -> Path:
    """Where scores go by default: into the run's folder.

    Raises:
        ConfigError: what is tested is no run.
    """
    from xded.errors import ConfigError
    from xded.exported import is_exported
    from xded.models.pretrained import is_pretrained
    from xded.models.recogniser import resolve

    if is_pretrained(checkpoint) or is_exported(checkpoint):
        raise ConfigError(
            f"{checkpoint} is no run, and its scores do not belong beside it.",
            "Say where they go: --output work/zero-shot/scores.json.",
        )
    return resolve(checkpoint).parent / "scores.json"


def _listed_words(recogniser: Recogniser, corpus: Corpus, test: Sequence[Recording]) -> list[str]:
    """The corpus's words that the recogniser's tokenizer can write; the others are named on standard error."""
    from xded.errors import few

    lost = recogniser.tokenizer.unspellable(corpus.texts)
    if lost:
        takes = {r.take for r in test if r.text in lost}
        typer.echo(
            f"Warning: the tokenizer of {recogniser.path} cannot write {few(lost)}: left out of the word list, "
            f"{len(takes)} of {len({r.take for r in test})} tested takes are lost.",
            err=True,
        )
    return [text for text in corpus.texts if text not in lost]


def _keep(scores: Scores, predictions: Sequence[Prediction], output: Path) -> Path:
    """Writes scores to `output` and predictions beside it; returns where the predictions are."""
    from xded.scoring import write_predictions
    from xded.training.status import write_atomically

    output.parent.mkdir(parents=True, exist_ok=True)
    kept = output.with_name("predictions.jsonl" if output.name == "scores.json" else f"{output.stem}.predictions.jsonl")
    write_predictions(kept, predictions)
    write_atomically(output, scores.to_json())
    return kept


def _warn_of_heard(recogniser: Recogniser, test: list[Recording]) -> None:
    """Says on standard error which tested speakers the checkpoint has heard, and how many of the tested takes."""
    heard = sorted({r.speaker for r in test} & {s for p in recogniser.provenance for s in p.speakers})
    if heard:
        takes = {r.take for r in test}
        known = takes & {t for p in recogniser.provenance for t in p.takes}
        typer.echo(
            f"Warning: {recogniser.path} has heard {', '.join(heard)} (and {len(known)} of the {len(takes)} tested "
            "takes): this is no test on an unheard speaker.",
            err=True,
        )


def _test_recordings(
    recogniser: Recogniser, corpus: Path | None, held_out: list[str] | None, samples: int | None
) -> tuple[Corpus, list[Recording]]:
    """The held-out speakers' recordings, or with `--include-held-out` those that the split kept for the test."""
    import numpy as np

    from xded.cli.options import need_corpus
    from xded.corpus.folds import make_fold
    from xded.corpus.manifest import read_corpus
    from xded.errors import ConfigError
    from xded.teachers.adapt import parts_of

    config = recogniser.config
    loaded = read_corpus(corpus or need_corpus(config))
    speakers = tuple(held_out or config.fold.held_out)
    if not speakers:
        raise ConfigError("No speaker to test on: the run held nobody out.", "Name one with --held-out SPEAKER.")
    fold = config.fold.model_copy(update={"held_out": speakers})
    if set(speakers) <= set(config.fold.held_out):
        fold = config.fold  # the run's own split: with --include-held-out half of their takes were heard
    test = [r for r in parts_of(loaded, make_fold(loaded, fold), config).test if r.speaker in speakers]
    if samples:
        takes = sorted({r.take for r in test})
        drawn = set(np.random.default_rng(0).permutation(takes)[:samples].tolist())
        test = [r for r in test if r.take in drawn]
    return loaded, test


def _check_tokenizer(recogniser: Recogniser, path: Path | None, test: list[Recording]) -> None:
    """Refuses another tokenizer than the checkpoint's, and of a run of ours prompts that it cannot write."""
    from xded.errors import TokenizerError
    from xded.models.pretrained import is_pretrained, tokenizer_at

    own = recogniser.tokenizer
    if path is not None:
        given = tokenizer_at(path, own.normaliser)
        if given.fingerprint != own.fingerprint:
            raise TokenizerError(
                f"{path} is not the tokenizer of {recogniser.path} (fingerprint {given.fingerprint[:12]}, "
                f"the checkpoint's is {own.fingerprint[:12]}).",
                "Leave out --tokenizer: the checkpoint carries its own.",
            )
    if not is_pretrained(recogniser.path):
        own.self_test([r.text for r in test], head_size=recogniser.student.vocabulary)
