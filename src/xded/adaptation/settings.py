"""What is asked of an adaptation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from xded.errors import ConfigError

Method = Literal["steps", "prototypes"]
METHODS: tuple[Method, ...] = get_args(Method)
OPEN, LISTED = "open", "word list"  # any text can come out; the best of the listed words


@dataclass(frozen=True)
class Settings:
    """How many takes are heard, how often that is drawn, and how it is adapted.

    Attributes:
        takes: numbers of the speaker's takes that are heard, each a point of the curve; the unheard result is not one.
        draws: times that the takes are drawn; seed: of all draws.
        test_share: of the speaker's takes, set apart for the test of every point.
        methods: `steps` updates all weights, `prototypes` none.
        updates, peak_lr, batch_size, freeze_layers: of steps; the first encoder layers may stay frozen.
        weight: of the prototypes' similarities (cosines) against log-probabilities of words.
    """

    takes: tuple[int, ...] = (5, 10, 20)
    draws: int = 3
    seed: int = 0
    test_share: float = 0.5
    methods: tuple[Method, ...] = METHODS
    updates: int = 20
    peak_lr: float = 3e-4
    batch_size: int = 8
    freeze_layers: int = 0
    weight: float = 16.0

    def __post_init__(self) -> None:
        if not self.takes or list(self.takes) != sorted(set(self.takes)) or self.takes[0] < 1:
            raise ConfigError(
                f"--takes {','.join(map(str, self.takes))}: numbers of takes should rise, from 1 or more "
                "(the unheard result is always there).",
                "Write --takes 5,10,20.",
            )
        if self.peak_lr <= 0:
            raise ConfigError(f"--peak-lr {self.peak_lr:g}: nothing would be learned.", "Give 3e-4, for example.")
        if not 0 < self.test_share < 1:
            raise ConfigError(
                f"--test-share {self.test_share:g} leaves nothing to test, or nothing to hear.",
                "Give 0.5, for example.",
            )

    @property
    def of_each_point(self) -> dict[str, float]:
        """What points depend on that were made before: takes, draws and methods may be added to them."""
        return {
            name: getattr(self, name)
            for name in ("seed", "test_share", "updates", "peak_lr", "batch_size", "freeze_layers", "weight")
        }


def methods_of(names: Sequence[str]) -> tuple[Method, ...]:
    """Methods by their names; all of them where none is named.

    Raises:
        ConfigError: a name that no method has.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ConfigError(f"--method {', '.join(unknown)}: no such method.", f"There are {', '.join(METHODS)}.")
    return cast(tuple[Method, ...], tuple(dict.fromkeys(names))) or METHODS
