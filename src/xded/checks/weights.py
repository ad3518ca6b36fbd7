"""What a checkpoint's weights say: whole, finite, of the model in its own config, moved where they should have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xded.errors import few
from xded.findings import Finding
from xded.models.recogniser import tokenizer_of
from xded.models.student import Student

Weights = Mapping[str, Tensor]
Payload = Mapping[str, Any]

ROWS = ("ctc_head.weight", "decoder_head.weight", "embedding.weight")  # one row a token


def damaged(path: Path, problem: str) -> Finding:
    """A checkpoint of a run that cannot be loaded; `problem` is what loading it said."""
    return Finding(
        "damaged-checkpoint",
        "refuse",
        str(path),
        problem,
        "It cannot be loaded, or holds other weights than were trained.",
        "Use another checkpoint of the run ('xded status RUN' lists them), or train again with --resume.",
        {"bytes": path.stat().st_size},
    )


def fits(weights: Weights, student: Student, subject: str) -> list[Finding]:
    """Names and shapes of a checkpoint against the model that its own config describes."""
    own = student.state_dict()
    missing = sorted(set(own) - set(weights))
    misshapen = sorted(name for name in set(own) & set(weights) if own[name].shape != weights[name].shape)
    unexpected = sorted(set(weights) - set(own))
    if not missing and not misshapen and not unexpected:
        return []
    totals = Counter(name.split(".")[0] for name in own)
    lost = Counter(name.split(".")[0] for name in (*missing, *misshapen))
    shares = "; ".join(f"{totals[g] - count} of {totals[g]} {g} tensors fit" for g, count in lost.most_common())
    lists = {"missing": missing, "of another shape": misshapen, "unexpected": unexpected}
    counts = ", ".join(f"{len(names)} {kind} ({few(names)})" for kind, names in lists.items() if names)
    return [
        Finding(
            "partial-load",
            "refuse",
            subject,
            (shares + ": " if shares else "") + counts + ".",
            "Loaded with strict=False the rest stays random: the outputs mean nothing.",
            "Load it into the model that it was trained as; never with strict=False.",
            {
                "fitting": len(own) - len(missing) - len(misshapen), "of": len(own),
                "groups": {g: {"fitting": totals[g] - count, "of": totals[g]} for g, count in lost.items()}, **lists,
            },
        )
    ]  # fmt: skip


def finite(weights: Weights, subject: str) -> list[Finding]:
    """Weights that are infinite or no numbers, and deviations of zero that turn features into such."""
    bad = [name for name, value in weights.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    flat = [
        name
        for name, value in weights.items()
        if name.endswith(("running_var", "front_end.std")) and value.numel() and not (value > 0).any()
    ]
    findings = []
    if bad or flat:
        what = f"{len(bad)} of {len(weights)} tensors are not finite: {few(bad)}." if bad else ""
        what += f"{' ' if bad else ''}Zero throughout, although they divide: {few(flat)}." if flat else ""
        findings.append(
            Finding(
                "non-finite",
                "refuse",
                subject,
                what,
                "Every output is the same, mostly empty.",
                "Use an earlier checkpoint; train again with a lower learning rate (--peak-lr).",
                {"not_finite": bad, "zero": flat, "tensors": len(weights)},
            )
        )
    return findings


def unmeasured(weights: Weights, subject: str, frozen: Sequence[str] = ()) -> list[Finding]:
    """BatchNorm statistics that are those of a fresh model; `frozen`: prefixes of parts that were never trained."""
    counts = [name for name in weights if name.endswith("num_batches_tracked") and not name.startswith(tuple(frozen))]
    fresh = [name for name in counts if int(weights[name]) == 0 and _is_fresh(weights, name)]
    if not fresh:
        return []
    return [
        Finding(
            "partial-load",
            "refuse",
            subject,
            f"{len(fresh)} of {len(counts)} BatchNorm layers hold the statistics of a fresh model (mean 0, variance 1, "
            f"no batch seen): {few(fresh)}.",
            "In eval mode these layers normalise with numbers that describe nothing.",
            "Load BatchNorm statistics with the weights (they are buffers, not parameters), or train again.",
            {"fresh": fresh, "of": len(counts)},
        )
    ]


def _is_fresh(weights: Weights, name: str) -> bool:
    stem = name.removesuffix("num_batches_tracked")
    mean, variance = weights.get(f"{stem}running_mean"), weights.get(f"{stem}running_var")
    return mean is not None and variance is not None and bool((mean == 0).all()) and bool((variance == 1).all())


def same_head(weights: Weights, subject: str) -> list[Finding]:
    """One head's weights in the place of the other's."""
    ctc, decoder = weights.get("ctc_head.weight"), weights.get("decoder_head.weight")
    if ctc is None or decoder is None or not torch.equal(ctc, decoder):
        return []
    return [
        Finding(
            "untrained-head",
            "refuse",
            subject,
            f"The CTC head's {ctc.numel():,} weights are those of the decoder's head, bit by bit.",
            "One of the two was never trained for what it does: read through it, nothing comes out right.",
            "Load the checkpoint by names, not by positions; train the head that is decoded.",
            {"weights": ctc.numel()},
        )
    ]


def unmoved(before: Weights, after: Weights, names: Iterable[str]) -> list[str]:
    """Of these tensors, those that are bit-identical in two checkpoints."""
    both = (name for name in names if name in before and name in after)
    return [name for name in both if torch.equal(before[name], after[name])]


def changed(before: Weights, after: Weights, prefixes: Sequence[str]) -> tuple[list[str], int]:
    """Names of tensors under `prefixes` that differ between two checkpoints, and how many there are."""
    names = [name for name in after if name.startswith(tuple(prefixes)) and name in before]
    return [name for name in names if not torch.equal(before[name], after[name])], len(names)


def tokenizer(payload: Payload, subject: str) -> list[Finding]:
    """Heads and embedding against the tokenizer that the checkpoint carries, and that against its fingerprint."""
    config = payload.get("config")
    normaliser = config.get("tokenizer", {}).get("normaliser", "upper") if isinstance(config, Mapping) else "upper"
    own = tokenizer_of(payload, normaliser)
    weights: Weights = payload["model_state_dict"]
    rows = {name: weights[name].shape[0] for name in ROWS if name in weights}
    wrong = {name: count for name, count in rows.items() if count != own.size}
    problems = [f"{name} has {count} rows" for name, count in wrong.items()]
    fingerprint = payload.get("tokenizer_fingerprint")
    what = f"The tokenizer in the checkpoint has {own.size} pieces; {', '.join(problems)}." if problems else ""
    if fingerprint != own.fingerprint:
        what += (
            f"{' ' if what else ''}The tokenizer in the checkpoint has fingerprint {own.fingerprint[:12]}; the model "
        )
        what += f"was trained with {str(fingerprint)[:12]}."
    if not what:
        return []
    return [
        Finding(
            "tokenizer-mismatch",
            "refuse",
            subject,
            what,
            "Token ids mean other pieces than in training: every output is wrong, and looks like words.",
            "Put back the tokenizer of the training run (its fingerprint is in status.json).",
            {"pieces": own.size, "rows": rows, "fingerprint": own.fingerprint, "trained_with": fingerprint},
            100.0,
        )
    ]
