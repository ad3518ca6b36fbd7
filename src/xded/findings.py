"""Findings: what was seen to be wrong, the evidence, what it does to the result, what to do. Imports no torch.

A check is a pure function of data that returns findings (none: healthy). Pre-flight, the training loop and
`xded doctor` run the same ones; `Examination` collects what they say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from xded.errors import XdedError

Severity = Literal["refuse", "warn", "note"]
Family = Literal["tokens and text", "data", "teachers and targets", "model and training", "results", "probes"]
SEVERITIES: Final = ("refuse", "warn", "note")


@dataclass(frozen=True)
class Check:
    """What a check looks for. A symptom is explained by other findings and stands after them."""

    family: Family
    title: str
    symptom: bool = False


CHECKS: Final[Mapping[str, Check]] = {
    # tokens and text
    "token-offset": Check("tokens and text", "token ids are decoded without a shift"),
    "tokenizer-mismatch": Check("tokens and text", "one tokenizer everywhere: same pieces, same order"),
    "special-ids": Check("tokens and text", "special ids are where they are expected"),
    "unreachable-prompts": Check("tokens and text", "every prompt can be written"),
    "normaliser-mismatch": Check("tokens and text", "references and outputs are normalised alike"),
    # data
    "wrong-audio": Check("data", "the audio that was loaded is that of the speakers who were meant"),
    "leakage": Check("data", "nothing of the test was heard"),
    "shared-takes": Check("data", "no take (through any microphone) on two sides of a split"),
    "teacher-test-block": Check("data", "the student does not train on takes that teachers are tested on"),
    "truncated-copy": Check("data", "no alphabetical run of recordings is missing"),
    "sample-rate": Check("data", "one sample rate, the declared one"),
    "silence": Check("data", "recordings can be heard"),
    "features": Check("data", "features are not all the same"),
    "clipping": Check("data", "recordings are not clipped"),
    "duplicates": Check("data", "no audio twice"),
    "labels": Check("data", "one prompt has one text, and files say what their labels say"),
    "unspellable": Check("data", "CTC can write every text in the frames it has"),
    "same-simulator": Check("data", "the augmentation is not the simulator that made the test"),
    "audio-files": Check("data", "audio is there, readable, and what the manifest says"),
    # teachers and targets
    "teacher-accuracy": Check("teachers and targets", "teachers recognise their own and others' speech"),
    "effective-teachers": Check("teachers and targets", "more than one teacher has a say"),
    "audio-hash": Check("teachers and targets", "targets describe the recordings' audio"),
    "target-text": Check("teachers and targets", "targets say what the recordings say"),
    "frame-count": Check("teachers and targets", "targets are as long as the recordings"),
    "spike-misalignment": Check("teachers and targets", "teachers' CTC spikes line up"),
    "blank-average": Check("teachers and targets", "the average speaks where every teacher speaks"),
    "temperature": Check("teachers and targets", "targets are at the objective's temperature"),
    "normalisation": Check("teachers and targets", "every distribution sums to one"),
    "teacher-forced": Check("teachers and targets", "teacher-forced posteriors are not taken for predictions"),
    "copied-teacher": Check("teachers and targets", "every teacher says something of its own"),
    "target-coverage": Check("teachers and targets", "targets cover the training recordings"),
    # model and training
    "no-gradient": Check("model and training", "every trainable parameter receives a gradient"),
    "frozen-moved": Check("model and training", "frozen parts do not move"),
    "batchnorm-drift": Check("model and training", "BatchNorm statistics of frozen parts do not move"),
    "partial-load": Check("model and training", "all weights of the start were loaded"),
    "learning-rate": Check("model and training", "the learning rate applied is the one asked for"),
    "warm-up": Check("model and training", "the warm-up ends before the run does"),
    "schedule-restart": Check("model and training", "a resumed run goes on with its schedule"),
    "untrained-head": Check("model and training", "the decoded head was trained"),
    "blank-gradient": Check("model and training", "the blank is trained"),
    "non-finite": Check("model and training", "weights, losses and gradients are finite"),
    "gradients": Check("model and training", "gradients neither explode nor vanish"),
    "skipped-batches": Check("model and training", "no batch was skipped"),
    "curriculum": Check("model and training", "difficulty scores differ and reach the recordings"),
    "attention": Check("model and training", "the decoder's attention moves along the audio"),
    "free-running": Check("model and training", "the decoder does without the true text"),
    "validation": Check("model and training", "validation measures what the test will"),
    "unfinished": Check("model and training", "the run is finished", symptom=True),
    "damaged-checkpoint": Check("model and training", "checkpoints are whole"),
    "stalled": Check("model and training", "WRA rises while the loss falls", symptom=True),
    "blank-only": Check("model and training", "outputs are not empty", symptom=True),
    "collapse": Check("model and training", "outputs differ from recording to recording", symptom=True),
    "over-generation": Check("model and training", "outputs are as long as prompts", symptom=True),
    "loops": Check("model and training", "outputs do not repeat themselves", symptom=True),
    # results
    "report-differs": Check("results", "the report says what its predictions say"),
    "other-rule": Check("results", "WRA means that the whole output equals the prompt"),
    "copies-as-takes": Check("results", "microphone copies are not counted as independent"),
    "same-file": Check("results", "no result under two names"),
    "wrong-speaker": Check("results", "a file is about the speaker in its name"),
    "out-of-range": Check("results", "metrics are possible"),
    "renamed-words": Check("results", "outputs are not other words' names, consistently"),
    # active probes
    "overfit": Check("probes", "eight recordings can be learned by heart"),
    "self-distillation": Check("probes", "teacher = student gives no loss"),
    "padding": Check("probes", "padding changes nothing"),
    "batch-order": Check("probes", "the order in a batch changes nothing"),
    "batch-decoding": Check("probes", "decoding in a batch and alone agree"),
    "shuffled-audio": Check("probes", "with other audio, WRA falls to chance"),
    "shuffled-labels": Check("probes", "with other labels, WRA falls to chance"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        check: a name of `CHECKS`.
        severity: `refuse`: results made with this are void; `warn`: biased or at risk; `note`: worth knowing.
        subject: the file, folder or speaker that it is about.
        what: what is wrong, one sentence with the numbers that matter.
        effect: what it does to the result.
        remedy: what to do next, a command where there is one.
        evidence: the numbers, JSON-able.
        points: WRA that it costs, percentage points, where that is known: the worst of equals stands first.
    """

    check: str
    severity: Severity
    subject: str
    what: str
    effect: str
    remedy: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    points: float = 0.0

    def __post_init__(self) -> None:
        if self.check not in CHECKS or self.severity not in SEVERITIES:
            raise ValueError(f"unknown check '{self.check}' or severity '{self.severity}'")

    @property
    def symptom(self) -> bool:
        """Whether other findings may explain it."""
        return CHECKS[self.check].symptom

    @property
    def rank(self) -> tuple[bool, bool, int, float]:
        """Sorts worst first: notes last; causes before symptoms; then severity; then points lost."""
        return self.severity == "note", self.symptom, SEVERITIES.index(self.severity), -self.points


@dataclass(frozen=True)
class Passed:
    """A check that found nothing; `detail` says on how much."""

    check: str
    subject: str
    detail: str = ""


@dataclass(frozen=True)
class Unchecked:
    """Something that could not be checked, and why."""

    what: str
    why: str


class Examination:
    """Runs checks and keeps what they say."""

    def __init__(self) -> None:
        self._findings: list[Finding] = []
        self.passed: list[Passed] = []
        self.unchecked: list[Unchecked] = []

    def run(self, check: str, subject: str, find: Callable[[], Iterable[Finding]], detail: str = "") -> None:
        """Runs one check; an error for people becomes a line about what could not be checked."""
        try:
            found = list(find())
        except (XdedError, OSError) as error:
            self.cannot(f"{CHECKS[check].title} ({subject})", str(error))
            return
        self._findings += [finding for finding in found if finding not in self._findings]
        if not found:
            self.passed.append(Passed(check, subject, detail))

    def cannot(self, what: str, why: str) -> None:
        """Notes what could not be checked."""
        self.unchecked.append(Unchecked(what, why))

    @property
    def findings(self) -> list[Finding]:
        """All findings, worst first."""
        return sorted(self._findings, key=lambda finding: finding.rank)

    def at_least(self, severity: Severity) -> list[Finding]:
        """Findings that are as bad as `severity`, or worse."""
        return [f for f in self.findings if SEVERITIES.index(f.severity) <= SEVERITIES.index(severity)]

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return {
            "findings": [asdict(f) for f in self.findings],
            "passed": [asdict(p) for p in self.passed],
            "unchecked": [asdict(u) for u in self.unchecked],
        }
