"""Weights into a module: all of them or none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from xded.errors import CheckpointError


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Loads every weight or none.

    Args:
        module: what gets them; weights: by its names; path: where they are from, for the error.

    Raises:
        CheckpointError: listing all missing, unexpected and misshapen weights.
    """
    own = module.state_dict()
    missing, unexpected = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    misshapen = [
        f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}"
        for name in sorted(set(own) & set(weights))
        if own[name].shape != weights[name].shape
    ]
    if missing or unexpected or misshapen:
        lists = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        problems = "; ".join(f"{kind}: {', '.join(names)} ({len(names)})" for kind, names in lists if names)
        raise CheckpointError(
            f"{path} does not fit this model: {problems}.",
            "Give the model the size in the checkpoint's config, or leave out --init.",
        )
    module.load_state_dict(dict(weights))
