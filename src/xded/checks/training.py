"""What a run's own records say: gradients, updates, frozen parts, loading, heads. Imports no torch.

Rows are lines of metrics.jsonl, a status is status.json; what is absent or of another shape is passed over.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from xded.config import LOSS_PARTS, DecodeConfig, ObjectiveConfig
from xded.errors import few
from xded.findings import Finding, Severity

Row = Mapping[str, Any]

BATCHNORM = ("running_mean", "running_var", "num_batches_tracked")
LOSSES = ("loss", *LOSS_PARTS)
HEADS = {"ctc": "CTC head", "decoder": "attention decoder"}
LOWER_RATE = "Lower the learning rate (--peak-lr), start from a parent (--init), look for recordings that are wrong."

SILENT_SHARE = 0.05  # of the trainable parameters; below, a few biases and not a part of the model
SKIPPED_SHARE = 0.05  # of the updates
SCALER_SKIPS = 32  # updates that the loss scaler of 16-mixed may leave out while it looks for its scale
# Norms before clipping. 800 healthy runs of 0.01 to 0.6 M parameters: never above 75, the median of the last quarter
# 0.02 to 5 times that of the first.
EXPLODED_NORM = 500.0
EXPLODED_GROWTH = 100.0
GROWN_NORM = 10.0
VANISHED_SHARE = 1e-5  # of the largest part's norm; parts of healthy runs lie within a factor of 350
EXPLODED_LOSS = 100.0  # train loss of an epoch, and ten times that of the first update (small after a parent)
EXPLODED_LOSS_FACTOR = 10.0
FEW_ROWS = 4  # fewer rows have no trend
BLANK_SHARE = 1e-4  # of the other rows' gradient; in healthy runs the blank's is one half to ten times theirs


def number(row: Row, key: str) -> float | None:
    """A number of a row, or nothing where it holds something else."""
    value = row.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def events(rows: Iterable[Row], event: str, *needed: str) -> list[Row]:
    """Rows of one event that hold these numbers, finite ones."""

    def whole(row: Row) -> bool:
        return all((value := number(row, key)) is not None and math.isfinite(value) for key in needed)

    return [row for row in rows if row.get("event") == event and whole(row)]


def strings(value: Any) -> list[str]:
    """The strings of a list; nothing when it is none."""
    return [item for item in value if isinstance(item, str)] if isinstance(value, (list, tuple)) else []


# --- gradients and updates --------------------------------------------------------------------------------------


def no_gradient(subject: str, silent: Sequence[str], silent_size: int, trainable: int, total: int) -> list[Finding]:
    """Trainable parameters that the objective uses and that no gradient ever reached; sizes in parameters."""
    if not silent:
        return []
    parts = sorted({".".join(name.split(".")[: 3 if ".layers." in name else 1]) for name in silent})
    share = silent_size / max(1, trainable)
    return [
        Finding(
            "no-gradient",
            "refuse" if share >= SILENT_SHARE else "warn",
            subject,
            f"{max(0, trainable - silent_size):,} of {total:,} parameters receive a gradient; {silent_size:,} that "
            f"should ({100 * share:.1f} % of the trainable ones) never did: {few(parts)}.",
            "These parts stay as they began, however long the run.",
            "Look for torch.no_grad, detach() or a part that the loss does not use; train again.",
            {"silent": list(silent), "silent_parameters": silent_size, "trainable": trainable, "total": total},
        )
    ]


def blank_gradient(rows: Sequence[Row], subject: str) -> list[Finding]:
    """A CTC blank that is not trained although the others are."""
    watched = [row for row in events(rows, "gradients", "blank", "rows") if row["rows"] > 0]
    if not watched or any(row["blank"] > BLANK_SHARE * row["rows"] for row in watched):
        return []
    share = median(row["blank"] / row["rows"] for row in watched)
    return [
        Finding(
            "blank-gradient",
            "refuse",
            subject,
            f"The CTC blank receives {share:.1g} of the gradient of other tokens in all {len(watched)} logged updates.",
            "No frame learns to be blank: outputs are several tokens too long.",
            "Let the loss include the blank (its mass must be trained, not removed and renormalised); train again.",
            {"share": share, "logged": len(watched)},
        )
    ]


def skipped_batches(
    subject: str, skipped: int, updates: int, *, steps: int | None = None, mixed: bool = False
) -> list[Finding]:
    """Batches that led to no update.

    Args:
        subject: the run.
        skipped: as the run counted them.
        updates: that the run says it has made; steps: that the optimiser's state says.
        mixed: the run used 16-mixed, whose loss scaler skips some at first.
    """
    lost = max(skipped, updates - steps if steps is not None else 0)
    if lost <= (SCALER_SKIPS if mixed else 0):
        return []
    share = lost / max(1, updates)
    return [
        Finding(
            "skipped-batches",
            "refuse" if share >= SKIPPED_SHARE else "warn",
            subject,
            f"{lost} of {updates} batches or updates ({100 * share:.1f} %) changed nothing"
            + ("." if steps is None else f"; the optimiser has made {steps} steps."),
            "Recordings were left out without a word: those that fail are often the long or the damaged ones.",
            "Look for errors that are caught and passed over, then train again; 'xded corpus check' names bad files.",
            {"skipped": skipped, "updates": updates, "optimiser_steps": steps},
        )
    ]


def gradients(rows: Sequence[Row], subject: str, clip: float) -> list[Finding]:
    """Gradients that explode or, in some part of the model, vanish."""
    norms = [row["gradient_norm"] for row in events(rows, "step", "gradient_norm")]
    parts: dict[str, list[float]] = defaultdict(list)
    for row in events(rows, "gradients"):
        if isinstance(row.get("norms"), Mapping):
            for group in row["norms"]:
                value = number(row["norms"], group)
                parts[str(group)] += [] if value is None else [value]
    medians = {group: median(values) for group, values in parts.items() if values}
    findings = _exploded_loss(rows, subject)
    if len(norms) >= FEW_ROWS:
        quarter = max(1, len(norms) // 4)
        first, last = median(norms[:quarter]), median(norms[-quarter:])
        if median(norms) > EXPLODED_NORM or last > max(EXPLODED_GROWTH * first, GROWN_NORM):
            findings.append(_exploded(subject, first, last, clip, medians))
    if len(medians) > 1 and all(len(values) >= FEW_ROWS for values in parts.values()):
        usual = max(medians.values())
        vanished = {group: value for group, value in medians.items() if value < VANISHED_SHARE * usual}
        findings += [_vanished(subject, vanished, usual, medians)] if vanished else []
    return findings


def _exploded_loss(rows: Sequence[Row], subject: str) -> list[Finding]:
    steps, epochs = events(rows, "step", "loss"), events(rows, "epoch", "train_loss")
    highest = max((row["train_loss"] for row in epochs), default=0.0)
    if not steps or highest <= max(EXPLODED_LOSS, EXPLODED_LOSS_FACTOR * steps[0]["loss"]):
        return []
    first, last = steps[0]["loss"], epochs[-1]["train_loss"]
    return [
        Finding(
            "gradients",
            "warn",
            subject,
            f"The training loss exploded: {first:.3g} at the first logged update, {highest:.3g} in the mean of an "
            f"epoch, {last:.3g} in the last.",
            "The weights were thrown far away; what is learned afterwards starts from noise.",
            LOWER_RATE,
            {"first_loss": first, "highest": highest, "last": last},
        )
    ]


def _exploded(subject: str, first: float, last: float, clip: float, parts: Mapping[str, float]) -> Finding:
    largest = max(parts, key=lambda group: parts[group], default=None)
    return Finding(
        "gradients",
        "warn",
        subject,
        f"The gradient's norm is {last:.3g} in the last quarter of the run ({first:.3g} in the first; clipped at "
        f"{clip:g})" + (f"; the largest part is {largest} ({parts[largest]:.3g})." if largest else "."),
        "Clipping leaves the direction of a few outliers and little of the rest: the run does not converge.",
        LOWER_RATE,
        {"first_quarter": first, "last_quarter": last, "clip": clip, "parts": dict(parts)},
    )


def _vanished(subject: str, vanished: Mapping[str, float], usual: float, parts: Mapping[str, float]) -> Finding:
    worst = min(vanished, key=lambda group: vanished[group])
    return Finding(
        "gradients",
        "warn",
        subject,
        f"The gradient of {few(list(vanished))} vanishes: that of {worst} is {vanished[worst]:.2g}, other parts have "
        f"up to {usual:.2g}.",
        "These parts hardly learn.",
        "Look for a saturated or detached layer above them; train again.",
        {"vanished": dict(vanished), "largest": usual, "parts": dict(parts)},
    )


def non_finite(rows: Sequence[Row], subject: str, *, mixed: bool = False, message: str = "") -> list[Finding]:
    """Losses and gradients that are infinite or no numbers; `message`: last words of a run that failed."""
    keys = (
        *LOSSES,
        "val_loss",
        "train_loss",
        *(f"train_{name}" for name in LOSSES),
        *(() if mixed else ("gradient_norm",)),
    )
    seen: Counter[str] = Counter()
    updates = []
    for row in rows:
        bad = [key for key in keys if (value := number(row, key)) is not None and not math.isfinite(value)]
        norms = row.get("norms")
        if isinstance(norms, Mapping) and not mixed:
            bad += [str(group) for group in norms if not math.isfinite(number(norms, group) or 0.0)]
        seen.update(bad)
        updates += [number(row, "update")] if bad else []
    stopped = any(word in message for word in ("loss is nan", "loss is inf", "norm is nan", "norm is inf"))
    if not seen and not stopped:
        return []
    where = f"{few(list(seen))} in {len(updates)} rows, first at update {updates[0]:.0f}" if seen else message
    return [
        Finding(
            "non-finite",
            "refuse",
            subject,
            f"Not finite: {where}" + ("" if where.endswith(".") else "."),
            "From the first such update on, weights are no numbers and outputs are empty or constant.",
            "Look at the recordings that are named ('xded corpus check'), lower the learning rate, use 32-true.",
            {"rows": dict(seen), "first_update": updates[0] if updates else None, "message": message},
        )
    ]


# --- frozen parts, loading, heads ----------------------------------------------------------------------------------


def frozen(rows: Sequence[Row], subject: str) -> list[Finding]:
    """What moved of the parts that a stage froze."""
    findings = []
    for row in events(rows, "frozen", "of"):
        where = f"stage {row['stage']}" if number(row, "stage") else "the run"
        findings += moved(subject, strings(row.get("moved")), int(row["of"]), where)
    return findings


def moved(subject: str, names: Sequence[str], of: int, where: str) -> list[Finding]:
    """Frozen tensors that changed during `where`: parameters, and statistics of BatchNorm apart."""
    drifted = [name for name in names if name.endswith(BATCHNORM)]
    changed = [name for name in names if not name.endswith(BATCHNORM)]
    findings = []
    if changed:
        findings.append(
            Finding(
                "frozen-moved",
                "refuse",
                subject,
                f"{len(changed)} of {of} frozen tensors changed during {where}: {few(changed)}.",
                "The parts that should keep what the parent knew were trained with the rest.",
                "Clear requires_grad of the frozen part (or leave it out of the optimiser); train again.",
                {"moved": changed, "of": of},
            )
        )
    if drifted:
        findings.append(
            Finding(
                "batchnorm-drift",
                "warn",
                subject,
                f"{len(drifted)} BatchNorm statistics of frozen parts drifted during {where}: {few(drifted)}.",
                "The frozen part no longer computes what it computed in the parent, although its weights are the same.",
                "Put frozen parts into eval mode after every model.train(); train again.",
                {"moved": drifted, "of": of},
            )
        )
    return findings


def partial_load(subject: str, tensors: int, of: int, names: Sequence[str]) -> list[Finding]:
    """A start of which only some tensors were loaded; `names`: those that were not."""
    if tensors >= of and not names:
        return []
    groups = Counter(name.split(".")[0] for name in names)
    shares = ", ".join(f"{count} of {group}" for group, count in groups.most_common())
    return [
        Finding(
            "partial-load",
            "refuse",
            subject,
            f"Only {tensors} of {of} tensors were loaded" + (f"; not loaded: {shares}." if shares else "."),
            "The rest is random: the run did not start from the model that is named, or is not that model.",
            "Load with strict names and shapes ('xded train --init' does), with the model size of the checkpoint.",
            {"loaded": tensors, "of": of, "missing": dict(groups), "names": list(names)},
        )
    ]


def heads_of(decode: DecodeConfig) -> set[str]:
    """Heads that have a say in the output."""
    if not decode.word_list:
        return {decode.mode}
    return {head for head, weight in (("ctc", decode.ctc_weight), ("decoder", 1 - decode.ctc_weight)) if weight > 0}


def trained_heads(objective: ObjectiveConfig) -> set[str]:
    """Heads that the objective trains."""
    return set(objective.heads)


def untrained_head(
    subject: str,
    decoded: Iterable[str],
    trained: Iterable[str],
    how: str,
    *,
    inherited: bool = False,
    validation: bool = False,
) -> list[Finding]:
    """Heads that are decoded and that this run did not train.

    Args:
        subject: the run or the evaluation.
        decoded, trained: `ctc`, `decoder`; how: the decoding, in words.
        inherited: the run starts from a model, which may have trained the head; a warning then.
        validation: only validation decodes so, not the test; a warning then.
    """
    left = sorted(set(decoded) - set(trained))
    if not left:
        return []
    severity: Severity = "warn" if inherited or validation else "refuse"
    heads = " and ".join(HEADS.get(head, head) for head in left)
    others = sorted(set(trained) & set(HEADS))
    return [
        Finding(
            "untrained-head",
            severity,
            subject,
            f"Outputs are read from the {heads} ({how}), which this run did not train.",
            "What the encoder learned does not reach this head"
            + (", and the best checkpoint is chosen by it." if validation else ": near 0 % WRA, whatever the loss."),
            f"Decode the trained head: 'xded evaluate RUN --decode {others[0] if others else 'ctc'}', or give the "
            f"{heads} a weight in the objective.",
            {"decoded": sorted(set(decoded)), "trained": others, "untrained": left},
            100.0 if severity == "refuse" else 0.0,
        )
    ]
