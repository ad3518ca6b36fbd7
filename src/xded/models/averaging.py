"""Several recognisers of one architecture to one: the mean of their weights (a "soup")."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xded import config as configs
from xded.config import Config
from xded.errors import CheckpointError, ConfigError, few
from xded.models.checkpoints import checked_sha256_of, load
from xded.models.recogniser import describe, provenance_of, resolve, tokenizer_of
from xded.models.student import Student
from xded.models.weights import load_weights

# of the model's settings, those that change neither its weights nor what it computes with them
WITHOUT_EFFECT = ("size", "pretrained", "dropout")
NOT_ALIKE = "Average recognisers that were all adapted from one parent, with one tokenizer and one front end."

Payload = dict[str, Any]


def average(
    paths: Sequence[Path], weights: Sequence[float] | None = None, *, base: Path | None = None, scale: float = 1.0
) -> Payload:
    """A checkpoint that holds the mean of others' weights.

    Model soups (Wortsman et al. 2022, arXiv:2203.05482, section 2, "uniform soup"); with a base, task arithmetic
    (Ilharco et al. 2023, arXiv:2212.04089, section 2): the base and `scale` times the mean difference from it.
    Statistics of batch norms are always the plain mean: extrapolated, a variance could be negative.

    Args:
        paths: checkpoints or run folders, two or more (one, with a base).
        weights: of each, scaled to a sum of 1; none: all alike.
        base: checkpoint that the others were adapted from.
        scale: of the mean difference from the base; 1 is the mean itself.

    Returns:
        What `models.checkpoints.save` writes and `models.recogniser.load_recogniser` reads: the first one's config
        with only those held out or excluded who are so in all, the provenance of all, and `average`: who is in it, with
        which weight, and `parent`, what all of them (or all but that one) began with; none when none says so.

    Raises:
        ConfigError: too few checkpoints, or weights that do not fit them.
        CheckpointError: one is damaged, or they differ in architecture, tokenizer or front end; what differs is named.
    """
    shares = _shares(paths, weights, base)
    paths = [resolve(path) for path in paths]
    base = None if base is None else resolve(base)
    payloads = {path: load(path) for path in (*paths, *([] if base is None else [base]))}
    first = payloads[paths[0]]
    settings = {path: configs.build(payload["config"], f"the config in {path}") for path, payload in payloads.items()}
    for path, payload in payloads.items():
        _require_alike(first, payload, paths[0], path)
    config = _with_fold(settings[paths[0]], list(settings.values()))
    tokenizer = tokenizer_of(first, config.tokenizer.normaliser)
    states = {path: payload["model_state_dict"] for path, payload in payloads.items()}
    student = Student(config.model, tokenizer.size, config.features)
    for path, state in states.items():
        load_weights(student, state, path)
    begun = None if base is None else states[base]
    mixed = _mixed([states[path] for path in paths], shares, begun, scale, dict(student.named_buffers()))
    names = [str(payloads[path].get("name", path.stem)) for path in paths]
    of = [
        {"path": str(path), "name": name, "sha256": checked_sha256_of(path), "weight": share}
        for path, name, share in zip(paths, names, shares, strict=True)
    ]
    heard = tuple(dict.fromkeys(p for payload in payloads.values() for p in provenance_of(payload)))
    parent = common_parent(payloads)
    return {
        **describe(tokenizer, config, f"average of {few(names)}", heard),
        "model_state_dict": mixed,
        "epoch": max(int(payload.get("epoch", 0)) for payload in payloads.values()),
        "average": {"of": of, "base": None if base is None else str(base), "scale": scale, "parent": parent},
    }


def _with_fold(config: Config, everyones: Sequence[Config]) -> Config:
    """The config with the fold of the mean: whoever none of them could hear."""
    folds = [one.fold for one in everyones]
    both = {
        name: tuple(s for s in getattr(config.fold, name) if all(s in getattr(fold, name) for fold in folds))
        for name in ("held_out", "exclude")
    }
    included = any(fold.include_held_out for fold in folds)
    return config.model_copy(update={"fold": config.fold.model_copy(update={**both, "include_held_out": included})})


def _shares(paths: Sequence[Path], weights: Sequence[float] | None, base: Path | None) -> list[float]:
    if len(paths) + (base is not None) < 2:
        raise ConfigError("One checkpoint has no average.", "Name two or more, or one and --base.")
    if len({resolve(path) for path in paths}) < len(paths):
        raise ConfigError("A checkpoint is named twice.", "Name it once, and give it more weight: --weights.")
    given = [1.0] * len(paths) if weights is None else list(weights)
    if len(given) != len(paths) or not all(0 <= weight < float("inf") for weight in given) or not sum(given):
        raise ConfigError(
            f"{len(given)} weights ({', '.join(f'{weight:g}' for weight in given)}) for {len(paths)} checkpoints.",
            "Give --weights one number of 0 or more for each checkpoint, not all of them 0.",
        )
    return [weight / sum(given) for weight in given]


def _mixed(
    states: Sequence[Mapping[str, Tensor]],
    shares: Sequence[float],
    base: Mapping[str, Tensor] | None,
    scale: float,
    buffers: Collection[str],
) -> dict[str, Tensor]:
    """The mean, in double precision; whole numbers are the first one's."""
    mixed: dict[str, Tensor] = {}
    for name, value in states[0].items():
        if not value.is_floating_point():
            mixed[name] = value.clone()
            continue
        mean = torch.zeros_like(value, dtype=torch.double)
        for state, share in zip(states, shares, strict=True):
            mean += share * state[name].double()
        if base is not None and name not in buffers:
            begun = base[name].double()
            mean = begun + scale * (mean - begun)
        mixed[name] = mean.to(value.dtype)
    return mixed


def _require_alike(one: Mapping[str, Any], other: Mapping[str, Any], path: Path, other_path: Path) -> None:
    """Raises when two checkpoints differ in what their weights mean."""
    if one.get("tokenizer_fingerprint") != other.get("tokenizer_fingerprint"):
        raise CheckpointError(
            f"{path} and {other_path} have different tokenizers (fingerprints "
            f"{str(one.get('tokenizer_fingerprint'))[:12]} and {str(other.get('tokenizer_fingerprint'))[:12]}).",
            NOT_ALIKE,
        )
    ours, theirs = _settings(one, path), _settings(other, other_path)
    changed = [f"{key} ({value} and {theirs[key]})" for key, value in ours.items() if value != theirs[key]]
    if changed:
        raise CheckpointError(f"{path} and {other_path} differ in {', '.join(changed)}.", NOT_ALIKE)
    measured = [name for name in one["model_state_dict"] if name.startswith("front_end.")]
    differing = [
        name
        for name in measured
        if not torch.equal(one["model_state_dict"][name], other["model_state_dict"].get(name, torch.empty(0)))
    ]
    if differing:
        raise CheckpointError(
            f"{path} and {other_path} normalise differently: {', '.join(differing)}, of their training recordings.",
            NOT_ALIKE,
        )


def _settings(payload: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Settings on which the meaning of the weights depends, by their keys in the config."""
    config = configs.build(payload["config"], f"the config in {path}")
    model = config.model.model_dump(mode="json")
    return {
        **{f"model.{key}": value for key, value in model.items() if key not in WITHOUT_EFFECT},
        **{f"features.{key}": value for key, value in config.features.model_dump(mode="json").items()},
    }


def common_parent(payloads: Mapping[Path, Mapping[str, Any]]) -> str | None:
    """What all checkpoints began with, as far as they say; one of them may be that parent itself."""
    first = next(iter(payloads.values()))
    if all(payload[key] == first[key] for key in ("config", "provenance") for payload in payloads.values()):
        return "the start of one run"  # from scratch or not: the seed is the same
    began = {path.resolve(): _start_of(configs.build(p["config"], str(path))) for path, p in payloads.items()}
    starts = {start for path, start in began.items() if path not in began.values()}
    return str(starts.pop()) if len(starts) == 1 and None not in starts else None


def _start_of(config: Config) -> Path | None:
    return config.model.pretrained if config.train.init is None else resolve(config.train.init).resolve()
