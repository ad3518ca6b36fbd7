"""Checks of posteriors from elsewhere, from what was seen of all their recordings.

What `checks.targets`, `checks.posteriors` and `checks.teachers` know already is asked there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import numpy as np

from xded.checks.posteriors import SUM_OFF
from xded.checks.targets import FRAMES_OFF, SHARE_OFF, frame_counts
from xded.checks.teachers import LEAST_OUTPUTS, target_text
from xded.errors import few
from xded.findings import Finding, Severity
from xded.targets.store import Index, Kind, Posterior
from xded.tokenizer import Tokenizer

Reason = Literal["unknown", "repeated", "text", "frames", "length", "not finite", "scale"]
MOST_LEFT_OUT: Final = 0.05  # share of the recordings: above, the fault is in the files and not in some recordings
SURE: Final = 0.9999  # probability from which a step says no more than one id does
MOST_SURE: Final = 0.99  # share of such steps
FORCED_RIGHT: Final = 0.05  # share of right outputs that any teacher reaches when it is told the true text
NO_SCALE: Final = "neither"
REMEDY: Final = "Export them again with the tokenizer and the recordings of this corpus, then: xded import-teachers."


@dataclass
class Stream:
    """What was seen of one file: one teacher, one head. JSON-able."""

    teacher: str
    kind: Kind
    file: str
    sha256: str
    teacher_forced: bool
    recordings: int = 0  # in the file
    matched: int = 0  # of them, in the corpus and named once
    stored: int = 0
    steps: int = 0  # of the stored ones
    left_out: dict[Reason, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)  # recordings of the teacher's speaker that the file does not have
    scales: dict[str, int] = field(default_factory=dict)  # logits, log-probabilities, probabilities
    right: int = 0  # stored recordings whose most probable text is the true one
    ended: int = 0  # decoder: stored recordings whose last step is </s>
    top: float = 0.0  # probability of the most probable id at T = 1, mean over steps
    sure: float = 0.0  # share of steps (CTC: that are not blank) in which it is above `SURE`
    twins: list[list[str]] = field(default_factory=list)  # recordings with the very same numbers
    status: Literal["imported", "refused"] = "imported"

    def leave_out(self, reason: Reason, recording: str) -> None:
        """Notes a recording that is not stored."""
        self.left_out.setdefault(reason, []).append(recording)

    def share(self, reason: Reason) -> float:
        """Share of the matched recordings that are left out for a reason."""
        return len(self.left_out.get(reason, ())) / max(self.matched, 1)


@dataclass(frozen=True)
class Seen:
    """What is kept of the recordings until all have been seen.

    lengths: index with the steps of all matched recordings; best: the most probable id of each step of the stored ones.
    """

    lengths: Index
    best: Mapping[str, Posterior]
    texts: Mapping[str, str]  # normalised
    tokens: Mapping[str, Sequence[int]]
    durations_s: Mapping[str, float]


def scale_of(values: np.ndarray) -> str:
    """What [T, V] are: `logits`, `log-probabilities` (the same to a softmax), `probabilities`, or `neither`."""
    highest = float(values.max())
    if highest <= 1 + SUM_OFF and float(values.min()) >= 0:
        return "probabilities" if bool((np.abs(values.sum(1) - 1) <= SUM_OFF).all()) else NO_SCALE
    if highest <= SUM_OFF and bool((np.abs(np.log(np.exp(values).sum(1))) <= SUM_OFF).all()):
        return "log-probabilities"
    return "logits"


def frames_off(frames: int, duration_s: float, frame_rate_hz: float) -> bool:
    """Whether CTC frames are not those of a duration, by the rule of `checks.targets.frame_counts`."""
    wanted = duration_s * frame_rate_hz
    return abs(frames - wanted) > max(FRAMES_OFF, SHARE_OFF * wanted)


def findings_of(stream: Stream, seen: Seen, tokenizer: Tokenizer) -> list[Finding]:
    """Everything that is wrong with one file, worst first."""
    subject = f"{stream.teacher} ({stream.kind}, {stream.file})"
    found = [*_ids(stream, subject), *_lengths(stream, seen, subject), *_left_out(stream, subject)]
    found += [*_scales(stream, subject), *_twins(stream, subject), *_one_hot(stream, subject)]
    texts = {name: seen.texts[name] for name in seen.best}
    spelled = target_text(seen.best, stream.kind, tokenizer, texts, subject)
    found += [replace(finding, remedy=REMEDY) for finding in spelled] or _nothing_right(stream, subject)
    return sorted(found, key=lambda finding: finding.rank)


def _ids(stream: Stream, subject: str) -> list[Finding]:
    """Recordings that the corpus does not have, that are named twice, or that the file does not have."""
    parts, evidence = [], {}
    rows: dict[str, tuple[str, Sequence[str]]] = {
        "unknown": ("are not in the corpus", stream.left_out.get("unknown", [])),
        "repeated": ("are named more than once, and nobody knows which is meant", stream.left_out.get("repeated", [])),
        "missing": (f"of {stream.teacher} are in the corpus but not in the file", stream.missing),
    }
    for name, (what, recordings) in rows.items():
        if recordings:
            parts.append(f"{len(set(recordings))} {what} ({few(dict.fromkeys(recordings))})")
            evidence[name] = len(recordings)
    if not parts:
        return []
    half = evidence.get("unknown", 0) > stream.recordings / 2
    return [
        Finding(
            "target-coverage", "warn" if half or "repeated" in evidence else "note", subject,
            f"Of {stream.recordings} recordings in the file {stream.matched} are matched: {'; '.join(parts)}.",
            "They are left out; targets cover the others.",
            "Ids of the file must be recording ids of the corpus: compare them with the manifest.", evidence,
        )
    ]  # fmt: skip


def _lengths(stream: Stream, seen: Seen, subject: str) -> list[Finding]:
    """Steps against texts, or frames against durations, where more than some recordings are off."""
    if stream.share("length") <= MOST_LEFT_OUT:
        return []
    remedy = REMEDY if stream.kind == "decoder" else f"Say the rate with --frame-rate, or: {REMEDY}"
    tokens = {name: len(ids) for name, ids in seen.tokens.items()}
    found = frame_counts({stream.kind: seen.lengths}, seen.durations_s, tokens, subject)
    return [replace(finding, severity="refuse", remedy=remedy) for finding in found]


# reason: check, what was seen, what it would do
REASONS: Final[Mapping[Reason, tuple[str, str, str]]] = {
    "text": ("target-text", "have another word in the metadata than in the corpus",
             "The teacher was told another word than the student hears."),
    "frames": ("frame-count", "have another number of frames than the metadata says",
               "Metadata and posteriors were not written together: ids may belong to other rows."),
    "length": ("frame-count", "are not as long as their text (decoder: a step a token and one for </s>) or their audio "
               "(CTC: frames of the duration)", "Every step would teach another token or another moment."),
    "not finite": ("normalisation", "have NaN or infinity", "A single one makes every weight NaN."),
    "scale": ("normalisation", "are between 0 and 1 but do not sum to 1: neither logits nor probabilities",
              "No distribution follows from them."),
}  # fmt: skip


def _left_out(stream: Stream, subject: str) -> list[Finding]:
    """Recordings at fault: left out when they are few, a reason to refuse the file when they are many."""
    found = []
    for reason, (check, what, effect) in REASONS.items():
        names, many = stream.left_out.get(reason, []), stream.share(reason) > MOST_LEFT_OUT
        if not names or (reason == "length" and many):  # `_lengths` knows more
            continue
        severity: Severity = "refuse" if many or reason == "frames" else "warn"
        after = "" if severity == "refuse" else " They are left out."
        found.append(
            Finding(
                check, severity, subject,
                f"{len(names)} of {stream.matched} recordings {what} ({few(names)}).", effect + after, REMEDY,
                {"reason": reason, "recordings": names, "of": stream.matched},
            )
        )  # fmt: skip
    return found


def _scales(stream: Stream, subject: str) -> list[Finding]:
    """Logits here and probabilities there."""
    if len(stream.scales) < 2:
        return []
    listed = ", ".join(f"{count} of {scale}" for scale, count in stream.scales.items())
    return [
        Finding(
            "normalisation", "refuse", subject, f"One file holds recordings on several scales: {listed}.",
            "Nobody knows which of them were softened already.", REMEDY, {"scales": stream.scales},
        )
    ]  # fmt: skip


def _twins(stream: Stream, subject: str) -> list[Finding]:
    """Different recordings with the very same numbers."""
    copies = sum(len(group) - 1 for group in stream.twins)
    if not copies:
        return []
    shown = "; ".join(" = ".join(group[:3]) for group in stream.twins[:3])
    many = copies > MOST_LEFT_OUT * stream.matched
    return [
        Finding(
            "duplicates", "refuse" if many else "warn", subject,
            f"{copies} of {stream.matched} recordings have exactly the numbers of another one ({shown}).",
            "The same audio stands under two names, or the export wrote one output several times.",
            f"Check the audio of these recordings (xded corpus check). {REMEDY}",
            {"copies": copies, "groups": stream.twins},
        )
    ]  # fmt: skip


def _one_hot(stream: Stream, subject: str) -> list[Finding]:
    """Posteriors that are labels."""
    if stream.sure <= MOST_SURE:
        return []
    return [
        Finding(
            "temperature", "warn", subject,
            f"{100 * stream.sure:.1f} % of the steps put more than {SURE} on one id (T = 1): these are nearly labels.",
            "The student learns what the text says anyway: what teachers know about similar words is not in it.",
            "Export logits and not decisions; a higher --temperature softens what there is.", {"sure": stream.sure},
        )
    ]  # fmt: skip


def _nothing_right(stream: Stream, subject: str) -> list[Finding]:
    """Outputs that are hardly ever the text, and no other text of the corpus either."""
    share = stream.right / max(stream.stored, 1)
    if stream.stored < LEAST_OUTPUTS or share > (FORCED_RIGHT if stream.kind == "decoder" else 0.0):
        return []
    if stream.kind == "ctc":
        what = f"None of {stream.stored} most probable CTC texts is the true one"
        effect = "The teacher knows nothing of these recordings, or its tokenizer has other pieces."
    else:
        what = (
            f"Told the true text, the decoder says it in {stream.right} of {stream.stored} recordings, and "
            f"{stream.ended} end in </s>"
        )
        effect = "Another tokenizer of the same size, other rows, or steps that begin elsewhere: it would teach noise."
    severity: Severity = "warn" if stream.kind == "ctc" else "refuse"
    evidence = {"right": stream.right, "of": stream.stored, "ended": stream.ended}
    return [Finding("target-text", severity, subject, f"{what}.", effect, REMEDY, evidence)]
