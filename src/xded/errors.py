"""Errors for people: the value, the place, what was expected, what to do next."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from types import ModuleType

EXIT_OK = 0
EXIT_FAILURE = 1  # something went wrong that no argument could have prevented (disk full, NaN loss)
EXIT_USAGE = 2  # an argument, a config or an input file is wrong
EXIT_FINDINGS = 3  # the command worked and found problems in what it looked at
EXIT_INTERRUPTED = 130

NAMES_SHOWN = 5

GO_ON = "Give the same command again; xded train needs --resume for that."


class XdedError(Exception):
    """An error with a remedy. `exit_code` is what the command line returns for it.

    Args:
        problem: one sentence: what is wrong, with the value and the place.
        remedy: one sentence: what to do next, a command where there is one.
    """

    exit_code = EXIT_USAGE

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem} {self.remedy}"


class CorpusError(XdedError):
    """A manifest, a corpus folder or a recording cannot be used."""


class LeakageError(XdedError):
    """Material of a held-out speaker reached something that must not have heard it."""


class TokenizerError(XdedError):
    """Words that the tokenizer cannot write, or a tokenizer that does not belong to the model."""


class ConfigError(XdedError):
    """A config value is missing, unknown or contradicts another."""


class CheckpointError(XdedError):
    """A checkpoint is damaged, missing or of another make."""


class ScoringError(XdedError):
    """Predictions or scores that cannot be read, scored or compared."""


class TrainingError(XdedError):
    """Training had to stop: the loss is not finite, the disk is full."""

    exit_code = EXIT_FAILURE


def few(names: Iterable[str], shown: int = NAMES_SHOWN) -> str:
    """The first few names, and the count of the rest."""
    listed = list(names)
    more = len(listed) - shown
    return ", ".join(listed[:shown]) + (f" and {more} more" if more > 0 else "")


def need_extra(package: str, extra: str, purpose: str) -> ModuleType:
    """A package that only an extra of this project installs.

    Args:
        package: what is imported; extra: of this project; purpose: what needs it, to begin a sentence with.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package.partition(".")[0]:
            raise
        raise ConfigError(
            f"{purpose} needs the package '{package}', which is not installed.",
            f"Install it: pip install 'xded[{extra}]'.",
        ) from error
