"""What the losses and validations of a run say: does it learn, has it collapsed, can its numbers be trusted.

Imports no torch. A recogniser that is badly trained but correct is no fault: it gets a note. A CTC model from scratch
writes nothing but blanks at first, and a short run may end there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from xded.checks.training import Row, events, number, strings
from xded.config import DecodeConfig
from xded.findings import CHECKS, Finding, Severity

COLLAPSED_VALIDATIONS = 3  # in a row: one bad validation is noise
FEW_OUTPUTS = 2  # "", and one word
ENOUGH_REFERENCES = 5  # fewer different prompts make few different outputs a success
ENOUGH_RECORDINGS = 10
HAD_WRA = 0.05  # with at least `HAD_RIGHT` recordings right: the run could recognise something
HAD_RIGHT = 2.0
DIVERGED = 1.2  # train loss over its lowest before
LATE = 0.6  # share of the run after which a run that never wrote anything and no longer learns is given up
STILL_FALLING = 0.98  # mean train loss of the last third of the epochs over that of the middle third
FEW_EPOCHS = 9  # fewer have no thirds to compare: epochs of a short run with a decaying rate differ by their noise
LEARNED = 0.3  # loss at the end over that of the first epoch: the model fits what it hears
TEACHER_FORCED = 0.6  # share of decoder steps right from which on the decoder counts as trained
EMPTY = 0.9
FITTED = 0.5  # loss at the end over that of the first epoch: the model fits something
FEWER = 0.75  # outputs for each different prompt
CHANCE = 1.5  # times the WRA of one word that is always said
COPIES = 3  # recordings of each prompt
REPEATING = 0.3  # share of outputs
LONG_OUTPUT = 2.0  # times the tokens needed, and one more
STALLED_WRA = 0.02
STALLED_VALIDATIONS = 5
BOUND_SLACK = 0.1  # WRA; ties and batches of another padding may turn a word
TEACHER_FORCED_GAP = 0.4
FEW_TAKES = 20  # the interval of a WRA on 20 takes is 40 points wide


def validated(rows: Sequence[Row]) -> list[Row]:
    """Epoch rows with a validation."""
    return [row for row in rows if row.get("event", "epoch") == "epoch" and number(row, "wra") is not None]


def still_falls(losses: Sequence[float]) -> bool:
    """Whether a loss (one value an epoch) still falls; with few epochs nobody can say, and it may."""
    third = len(losses) // 3
    if len(losses) < FEW_EPOCHS:
        return True
    return not fmean(losses[-third:]) >= STILL_FALLING * fmean(losses[-2 * third : -third])


def _losses(rows: Sequence[Row]) -> list[float]:
    return [float(row["train_loss"]) for row in rows if number(row, "train_loss") is not None]


def _few_outputs(row: Row) -> bool:
    distinct, references = number(row, "distinct"), number(row, "references")
    return distinct is not None and distinct <= FEW_OUTPUTS and (references or 0) >= ENOUGH_REFERENCES


def _variety(row: Row) -> str:
    """How many different things are said, and how many there are to say."""
    many = "s" * (row["distinct"] != 1)
    return f"{row['distinct']:.0f} distinct output{many} for {row['references']:.0f} different prompts"


def collapsed(history: Sequence[Row], epochs: int, subject: str = "the run") -> Finding | None:
    """Whether a run is beyond hope, asked after each validation; one whose loss still falls never is.

    Args:
        history: rows of all epochs so far, validated or not.
        epochs: of the whole run.
        subject: its name.
    """
    rows = validated(history)
    last = rows[-COLLAPSED_VALIDATIONS:]
    if len(last) < COLLAPSED_VALIDATIONS or not all(_few_outputs(row) for row in last):
        return None
    before = rows[:-COLLAPSED_VALIDATIONS]
    evidence = {
        "distinct": [row["distinct"] for row in rows], "wra": [row["wra"] for row in rows],
        "train_loss": _losses(history), "epochs": epochs,
    }  # fmt: skip
    now = _variety(last[-1])
    if before and _lost(before, last):
        best = max(float(row["wra"]) for row in before)
        what = (
            f"The run has collapsed: {now} in {COLLAPSED_VALIDATIONS} validations in a row, after a WRA of "
            f"{100 * best:.1f} % and up to {max(number(row, 'distinct') or 0 for row in before):.0f} distinct outputs."
        )
        return _hopeless(what, subject, evidence)
    done = number(rows[-1], "epoch") or 0.0
    never = all(_few_outputs(row) for row in rows)
    if never and done >= LATE * epochs and len(history) >= FEW_EPOCHS and not still_falls(_losses(history)):
        what = (
            f"After {done:.0f} of {epochs} epochs there were never more than {FEW_OUTPUTS} distinct outputs ({now}), "
            f"and the loss no longer falls ({_losses(history)[-1]:.3g})."
        )
        return _hopeless(what, subject, evidence)
    return None


def _lost(before: Sequence[Row], last: Sequence[Row]) -> bool:
    """Whether a run that could write something no longer can, and no longer learns."""
    lowest, now = min(_losses(before), default=0.0), min(_losses(last), default=0.0)
    right = any(
        float(row["wra"]) >= HAD_WRA and float(row["wra"]) * (number(row, "recordings") or 0) >= HAD_RIGHT
        for row in before
        if not _few_outputs(row)  # the one word that is always written is right now and then
    )
    wrote = any((number(row, "distinct") or 0) >= ENOUGH_REFERENCES for row in before)
    return (right and not now < STILL_FALLING * lowest) or (wrote and not now < DIVERGED * lowest)


def _hopeless(what: str, subject: str, evidence: Mapping[str, Any]) -> Finding:
    return Finding(
        "collapse",
        "refuse",
        subject,
        what,
        "Further epochs cost time and change nothing.",
        "Lower the learning rate (--peak-lr), start from a parent (--init); 'xded doctor RUN' looks for the cause.",
        evidence,
    )


def outputs(rows: Sequence[Row], subject: str, mode: str = "ctc") -> list[Finding]:
    """Empty, constant, endless or repeating outputs at the end of a run; `mode`: the head that is decoded.

    They are warnings where the model has been trained or could do better before, and notes where it may just need
    more training.
    """
    history = events(rows, "epoch")
    checked = validated(history)
    if not checked:
        return []
    last = checked[-1]
    recordings = number(last, "recordings") or 0
    if recordings < ENOUGH_RECORDINGS:
        return []
    losses = _losses(history)
    stuck = len(losses) >= FEW_EPOCHS and not still_falls(losses)
    lost = len(checked) > 1 and _lost(checked[:-1], checked[-1:])
    learned = (number(last, "teacher_forced") or 0) >= TEACHER_FORCED or (
        len(losses) > 1 and losses[-1] <= LEARNED * losses[0]
    )
    findings = []
    empty = number(last, "empty") or 0.0
    if empty >= EMPTY:
        findings.append(
            _symptom("blank-only", stuck or lost, subject, f"{100 * empty:.0f} % of outputs are empty", last)
        )
    elif _few_outputs(last):
        findings.append(_symptom("collapse", stuck or lost, subject, _variety(last), last))
    elif mode == "ctc" and len(losses) >= FEW_EPOCHS and losses[-1] <= FITTED * losses[0] and _by_chance(last):
        what = f"{_variety(last)}, right no more often than one word that is always said,"
        findings.append(_symptom("collapse", False, subject, what, last))
    tokens, needed = number(last, "tokens"), number(last, "needed")
    if tokens is not None and needed is not None and tokens > LONG_OUTPUT * needed + 1:
        what = f"Outputs are {tokens:.1f} tokens long in the mean, prompts {needed:.1f}"
        findings.append(_symptom("over-generation", learned, subject, what, last))
    repeats = number(last, "repeats") or 0.0
    if repeats > REPEATING:
        what = f"{100 * repeats:.0f} % of outputs say a token three times in a row"
        findings.append(_symptom("loops", learned, subject, what, last))
    return findings


def _by_chance(row: Row) -> bool:
    """Fewer outputs than prompts, and as good as a guess: what a CTC head writes that hears nothing, or has just begun.

    A decoder writes its commonest words for long before it listens.
    """
    distinct, references, recordings = (number(row, key) or 0.0 for key in ("distinct", "references", "recordings"))
    enough = references >= ENOUGH_REFERENCES and recordings >= COPIES * references
    return enough and distinct <= FEWER * references and float(row["wra"]) <= CHANCE / references


def _symptom(check: str, bad: bool, subject: str, what: str, row: Row) -> Finding:
    keys = ("epoch", "update", "wra", "empty", "distinct", "references", "tokens", "needed", "repeats", "train_loss")
    severity: Severity = "warn" if bad else "note"
    after = f" at the end (epoch {row.get('epoch')}, update {row.get('update')}, WRA {100 * row['wra']:.1f} %)."
    more = "" if bad else " The run may simply be too short: its loss still falls, or it had few updates."
    return Finding(
        check,
        severity,
        subject,
        what + after + more,
        "None of these outputs can be right.",
        "Look at the findings above first; then train longer (--epochs) or from a parent (--init)."
        if bad
        else "Train longer (--epochs), or start from a parent (--init).",
        {key: row[key] for key in keys if key in row},
    )


def stalled(rows: Sequence[Row], subject: str) -> list[Finding]:
    """A loss on unheard recordings that falls far while no word comes out right."""
    checked = [row for row in validated(events(rows, "epoch")) if number(row, "val_loss") is not None]
    if len(checked) < STALLED_VALIDATIONS or (number(checked[-1], "recordings") or 0) < ENOUGH_RECORDINGS:
        return []
    first, last = float(checked[0]["val_loss"]), float(checked[-1]["val_loss"])
    best = max(float(row["wra"]) for row in checked)
    if best > STALLED_WRA or not 0 < last <= LEARNED * first:
        return []
    return [
        Finding(
            "stalled",
            "warn",
            subject,
            f"The validation loss fell from {first:.2f} to {last:.2f} while WRA stayed at {100 * best:.1f} % or below "
            f"in {len(checked)} validations.",
            "What the loss measures is not what is decoded.",
            "Compare the decoded head, the tokenizer and the token ids with those of training: 'xded doctor RUN'.",
            {"first_val_loss": first, "val_loss": last, "best_wra": best, "validations": len(checked)},
        )
    ]


def free_running(rows: Sequence[Row], subject: str, decode: DecodeConfig) -> list[Finding]:
    """Teacher-forced accuracy against free running, where the decoder is what is decoded.

    Greedy free running writes the true text exactly when every teacher-forced step is right, so that WRA cannot be
    lower than 1 - (share of wrong steps) * (most steps of a text); less is a fault of the decoding.
    """
    checked = validated(events(rows, "epoch", "teacher_forced", "needed"))
    if not checked or decode.mode != "decoder":
        return []
    last = checked[-1]
    forced, wra = float(last["teacher_forced"]), float(last["wra"])
    steps = 2 * (float(last["needed"]) + 1)  # longest text, generously
    least = 1.0 - (1.0 - forced) * steps
    numbers = {"teacher_forced": forced, "wra": wra, "least_wra": least, "epoch": last.get("epoch")}
    if decode.max_length >= steps and wra < least - BOUND_SLACK:
        return [
            Finding(
                "free-running",
                "refuse",
                subject,
                f"With the true text before it the decoder gets {100 * forced:.1f} % of its steps right, so that at "
                f"least {100 * least:.0f} % of words must come out; {100 * wra:.1f} % do.",
                "The decoder is decoded otherwise than it was trained: another first token, other ids, another mask.",
                "Compare the decoder's input in training and in decoding, step by step, on one recording.",
                numbers,
                100 * (least - wra),
            )
        ]
    if forced >= TEACHER_FORCED and forced - wra > TEACHER_FORCED_GAP:
        return [
            Finding(
                "free-running",
                "note",
                subject,
                f"With the true text before it the decoder gets {100 * forced:.1f} % of its steps right; running "
                f"freely it gets {100 * wra:.1f} % of words right.",
                "With few known words, later tokens follow from earlier ones: the teacher-forced number flatters.",
                "Judge by WRA, never by teacher-forced accuracy or by the decoder's loss.",
                numbers,
            )
        ]
    return []


def validation(rows: Sequence[Row], subject: str, data: Mapping[str, Any] | None) -> list[Finding]:
    """Whether validation can measure what the test will; `data`: the run's data card."""
    effect = "The checkpoint that is kept is not chosen by what the test measures."
    train, held = (((data or {}).get(side) or {}) for side in ("train", "validation"))
    speakers, heard = (set(side.get("meant") or ()) if isinstance(side, Mapping) else set() for side in (held, train))
    takes = (data or {}).get("takes")
    kept = strings(takes.get("validation")) if isinstance(takes, Mapping) else []
    epochs = events(rows, "epoch")
    if epochs and not validated(epochs) and not kept:
        what = "The run kept no recordings for validation: its last epoch counts as its best."
        return [_about_validation(subject, what, effect, "--set fold.validation_fraction=0.1", {"takes": 0})]
    findings = []
    if kept and len(kept) < FEW_TAKES:
        what = f"Validation has {len(kept)} takes: one more right is {100 / len(kept):.0f} points of WRA."
        findings.append(
            _about_validation(subject, what, effect, "--set fold.validation_fraction=0.2", {"takes": len(kept)})
        )
    if speakers and len(heard) > 1 and speakers <= heard:
        what = f"All {len(speakers)} validation speakers are heard in training; the test's are not."
        remedy = "--set fold.validation=speakers"
        findings.append(_about_validation(subject, what, effect, remedy, {"speakers": sorted(speakers)}))
    return findings


def _about_validation(subject: str, what: str, effect: str, setting: str, evidence: Mapping[str, Any]) -> Finding:
    return Finding("validation", "note", subject, what, effect, f"Train with {setting}.", evidence)


def unfinished(status: Mapping[str, Any], subject: str) -> list[Finding]:
    """A run that is not (yet) at its end, and checks that it was told to go past."""
    findings = [
        Finding(
            check,
            "warn",
            subject,
            f"The run was started although '{check}' refused (--force).",
            "What that check protects against may have happened.",
            "Read the run's findings.json; train again without --force.",
            {"forced": check},
        )
        for check in strings(status.get("forced"))
        if check in CHECKS
    ]
    state = status.get("state")
    if state in ("finished", None):
        return findings
    message = str(status.get("message") or "")
    findings.append(
        Finding(
            "unfinished",
            "warn" if state == "failed" else "note",
            subject,
            f"The run is {state} at update {status.get('update', 0)}" + (f": {message}" if message else "."),
            "Its checkpoints are those of an unfinished run." if state != "running" else "Its numbers are not final.",
            "Wait for its end." if state == "running" else "Go on with the same command and --resume.",
            {"state": state, "update": status.get("update")},
        )
    )
    return findings
