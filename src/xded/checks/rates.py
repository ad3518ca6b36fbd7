"""The learning rate as it was applied, against the one that the config asks for. Imports no torch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median

from xded.checks.training import Row, events, number
from xded.config import StageConfig
from xded.findings import Finding

Schedule = Callable[[int], float]  # update (from 0) -> the learning rate that the config asks for

RATE_TOLERANCE = 1e-3  # share; the schedule is a pure function: what is written is exactly what was asked
RATE_FACTOR = 2.0  # beyond, the run is another one than its config describes
PEAK_SHARE = 0.9  # a warm-up that ends comes at least as near to the peak before the decay sets in
RISING_ROWS = 3  # a schedule that decays does not rise over so many


def rates(rows: Sequence[Row], subject: str, schedule: Schedule, stages: Sequence[StageConfig]) -> list[Finding]:
    """The learning rate applied against the one asked for; a restart or an endless warm-up is called by its name."""
    steps = events(rows, "step", "update", "lr")
    endless = _endless_warm_up(steps, subject, stages)
    if endless is not None:
        return [endless]
    applied = [(int(row["update"]), float(row["lr"])) for row in steps]
    wrong = [(update, lr) for update, lr in applied if update >= 1 and not _equal(lr, schedule(update - 1))]
    restart = _restart(rows, applied, wrong, subject, schedule)
    if restart is not None:
        return [restart]
    if not wrong:
        return []
    ratio = median(lr / schedule(update - 1) for update, lr in wrong)
    far = not 1 / RATE_FACTOR < ratio < RATE_FACTOR
    update, lr = wrong[0]
    return [
        Finding(
            "learning-rate",
            "refuse" if far else "warn",
            subject,
            f"{len(wrong)} of {len(applied)} logged updates ran at another learning rate than asked for, {ratio:.3g} "
            f"times as high in the median (update {update}: {lr:.3g} instead of {schedule(update - 1):.3g}).",
            "The run is not the one that its config describes; it learns too fast or not at all.",
            "Train again; the learning rate must be set from the schedule before every update.",
            {
                "ratio": ratio,
                "wrong": len(wrong),
                "logged": len(applied),
                "first": {"update": update, "applied": lr, "asked": schedule(update - 1)},
            },
        )
    ]


def _equal(lr: float, asked: float) -> bool:
    return abs(lr - asked) <= RATE_TOLERANCE * asked


def _endless_warm_up(steps: Sequence[Row], subject: str, stages: Sequence[StageConfig]) -> Finding | None:
    """A stage in which the learning rate rises from first to last and stays below its peak."""
    by_stage: dict[int, list[Row]] = defaultdict(list)
    for row in steps:
        by_stage[int(number(row, "stage") or 1)].append(row)
    for stage, rows in by_stage.items():
        lrs = [float(row["lr"]) for row in rows]
        planned = number(rows[-1], "updates")
        over = stage + 1 in by_stage or (planned is not None and rows[-1]["update"] >= PEAK_SHARE * planned)
        rising = len(lrs) >= RISING_ROWS and all(a < b for a, b in pairwise(lrs))
        peak = stages[stage - 1].peak_lr if 0 < stage <= len(stages) else math.inf
        if over and rising and lrs[-1] < PEAK_SHARE * peak < math.inf:
            return Finding(
                "warm-up",
                "refuse",
                subject,
                f"The learning rate of stage {stage} still rises at its end: {lrs[-1]:.3g} after update "
                f"{rows[-1]['update']}, {100 * lrs[-1] / peak:.0f} % of the peak {peak:g}.",
                "The warm-up is longer than the run, so that the model never trained at the learning rate asked for.",
                f"Train again with --set train.warmup_steps={max(1, int(rows[-1]['update']) // 10)}.",
                {"stage": stage, "last_lr": lrs[-1], "peak_lr": peak, "update": int(rows[-1]["update"])},
            )
    return None


def _restart(
    rows: Sequence[Row],
    applied: Sequence[tuple[int, float]],
    wrong: Sequence[tuple[int, float]],
    subject: str,
    schedule: Schedule,
) -> Finding | None:
    """A schedule, or the count of updates, that began anew in the middle of the run."""
    again = [b[0] for a, b in pairwise(applied) if b[0] <= a[0]]
    resumed = [int(row["update"]) for row in events(rows, "start", "update") if row.get("resumed") is True]
    right = [update for update, _ in applied if wrong and update < wrong[0][0]]
    unnoted = range(right[-1], wrong[0][0]) if right else ()  # a start that nothing tells of
    fell = bool(right) and wrong[0][1] < schedule(right[-1] - 1) / RATE_FACTOR  # as a new warm-up does
    at = next((update for update in (*resumed, *unnoted) if update and _anew(update, wrong, schedule, fell)), None)
    if at is None and not again:
        return None
    where = f"after update {at}" if at is not None else f"at a second update {again[0]}"
    first = next(((update, lr) for update, lr in wrong if at is None or update > at), None)
    seen = f": update {first[0]} ran at {first[1]:.3g} instead of {schedule(first[0] - 1):.3g}" if first else ""
    return Finding(
        "schedule-restart",
        "warn",
        subject,
        f"The schedule started again {where}{seen}.",
        "A second warm-up undoes part of what was learned, and the run ends before its learning rate has decayed.",
        "Train again in one piece, or go on with 'xded train --resume', which keeps the count of updates.",
        {"update": at if at is not None else again[0], "resumed": resumed, "wrong": len(wrong)},
    )


def _anew(start: int, wrong: Sequence[tuple[int, float]], schedule: Schedule, fell: bool) -> bool:
    """Whether wrong rates begin after `start` and are those of a schedule that begins there, or of a new warm-up."""
    if not wrong or wrong[0][0] <= start:
        return False
    if all(_equal(lr, schedule(update - 1 - start)) for update, lr in wrong):
        return True
    return fell and (len(wrong) == 1 or wrong[0][1] < wrong[1][1])
