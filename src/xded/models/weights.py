"""Weights into a module: all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from xded.errors import CheckpointError


def shape_of(value: Tensor) -> str:
    """As an error shows it."""
    return str(tuple(value.shape))


def misfits(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], kind_of: Callable[[Tensor], str] = shape_of
) -> str:
    """Every weight that is missing, unexpected or of another kind, by name; empty where all fit."""
    lists = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} {kind_of(found[name])} for {kind_of(expected[name])}"
            for name in sorted(expected.keys() & found.keys())
            if kind_of(found[name]) != kind_of(expected[name])
        ],
    }
    return "; ".join(f"{what}: {', '.join(names)} ({len(names)})" for what, names in lists.items() if names)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Loads every weight or none.

    Args:
        module: what gets them; weights: by its names; path: where they are from, for the error.

    Raises:
        CheckpointError: listing all missing, unexpected and misshapen weights.
    """
    problems = misfits(weights, module.state_dict())
    if problems:
        raise CheckpointError(
            f"{path} does not fit this model: {problems}.",
            "Give the model the size in the checkpoint's config, or leave out --init.",
        )
    module.load_state_dict(dict(weights))
