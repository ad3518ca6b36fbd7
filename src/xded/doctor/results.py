"""Evaluation files under examination: their ids, their outputs, what they report, what they are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from xded.checks import outputs, results, tokens
from xded.checks.readings import SHIFTS, Reading, as_stored, preferred, read_with, writer
from xded.corpus.manifest import Recording
from xded.doctor.given import Given
from xded.errors import XdedError
from xded.evaluations import Evaluation, take_of, with_takes
from xded.findings import Examination, Finding, Severity
from xded.models.recogniser import tokenizer_of
from xded.tokenizer import Tokenizer

LEARNED = 0.2  # best WRA on validation, of 1: below it, a run's poor outputs are what its own records say of it
SAME_CHECKPOINT_POINTS = 5.0  # WRA; another evaluation of the same checkpoint that is this much better is a proof


@dataclass(frozen=True)
class Opened:
    """An evaluation with everything that its checks need.

    Attributes:
        stored: as it was read; evaluation: with the takes that names and corpora know.
        takes: recording -> take, as far as they know.
        tokenizers: by name; readings: of the ids with each of them; believed: the reading to go by.
    """

    stored: Evaluation
    evaluation: Evaluation
    takes: Mapping[str, str]
    tokenizers: Mapping[str, Tokenizer]
    readings: Sequence[Reading]
    believed: Reading | None

    @property
    def subject(self) -> str:
        """What findings are about."""
        return str(self.stored.path)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """That of the reading to go by."""
        return self.tokenizers.get(self.believed.tokenizer) if self.believed else None


def examine(examination: Examination, given: Given) -> None:
    """Everything that evaluations (with the tokenizers and corpora given beside them) can be checked for."""
    evaluations = list({e.path: e for e in given.evaluations}.values())
    known = {r.recording: r for corpus in given.corpora for r in corpus.recordings}
    speakers = {s for e in evaluations for s in e.speakers} | {s for c in given.corpora for s in c.speakers}
    opened = [_open(examination, e, known, given) for e in evaluations if e.items]
    for empty in (e for e in evaluations if not e.items):
        examination.run("out-of-range", str(empty.path), partial(results.out_of_range, empty))
        examination.cannot(f"what {empty.path} says of its outputs", "no predictions.jsonl lies beside it.")
    for one in opened:
        symptoms = _symptoms(one, _worst(one.evaluation, given), opened)
        for check in ("untrained-head", "blank-only", "collapse", "over-generation", "loops"):
            found = [finding for finding in symptoms if finding.check == check]
            examination.run(check, one.subject, partial(list, found), _size(one.evaluation))
        _ids(examination, one, bool(symptoms))
        _reported(examination, one)
        examination.run("wrong-speaker", one.subject, partial(results.wrong_speaker, one.evaluation, speakers))
    if opened:
        detail = f"{len(opened)} evaluations"
        examination.run("same-file", detail, partial(results.same_file, [o.stored for o in opened]))
        examination.run("copies-as-takes", detail, partial(results.copies_unstated, [o.evaluation for o in opened]))
    _tokenizers(examination, given)


def _size(evaluation: Evaluation) -> str:
    return f"{len(evaluation.items)} outputs of {len(evaluation.takes)} takes"


def _open(examination: Examination, stored: Evaluation, known: Mapping[str, Recording], given: Given) -> Opened:
    mine = {item.recording: known[item.recording] for item in stored.items if item.recording in known}
    named = {item.recording: take for item in stored.items if (take := take_of(item.recording))}
    # a name that tells the take is right even where the manifest is not
    takes = {**{name: r.take for name, r in mine.items()}, **named}
    evaluation = with_takes(stored, takes, {name: r.speaker for name, r in mine.items()})
    tokenizers = {**_of_run(examination, evaluation, given), **{str(p): t for p, t in given.tokenizers.items()}}
    readings = read_with(evaluation, tokenizers)
    return Opened(stored, evaluation, takes, tokenizers, readings, preferred(readings) or as_stored(evaluation))


def _of_run(examination: Examination, evaluation: Evaluation, given: Given) -> dict[str, Tokenizer]:
    """The tokenizer of the checkpoint beside an evaluation of ours."""
    path = evaluation.path.parent / "best.pt"
    if not path.is_file() or not any(run.path == evaluation.path.parent for run in given.runs):
        return {}
    try:
        payload = given.facts(path)
        normaliser = payload["config"]["tokenizer"]["normaliser"]
        return {str(path): tokenizer_of(payload, normaliser)}
    except (XdedError, KeyError, TypeError, AttributeError) as error:
        examination.cannot(f"the ids in {evaluation.path}", f"the tokenizer in {path} cannot be read ({error}).")
        return {}


def _worst(evaluation: Evaluation, given: Given) -> Severity:
    """Poor outputs of a run that recognised little on its own validation are explained there, and are only noted."""
    for run in given.runs:
        if run.path == evaluation.path.parent:
            measured = [row["wra"] for row in run.rows if isinstance(row.get("wra"), int | float)]
            return "refuse" if max(measured, default=0.0) >= LEARNED else "note"
    return "refuse"


def _symptoms(one: Opened, worst: Severity, others: Sequence[Opened]) -> list[Finding]:
    """What the outputs look like; of a head that was never trained, the proof when another evaluation holds it."""
    evaluation, reading = one.evaluation, one.believed
    texts: Sequence[str | None] = reading.texts if reading else [None] * len(evaluation.items)
    seen = outputs.measure(
        [(item.reference, text, item.tokens) for item, text in zip(evaluation.items, texts, strict=True)],
        takes=[item.take for item in evaluation.items],
        encode=one.tokenizer.encode if one.tokenizer else None,
        shifts=SHIFTS,
        normaliser=evaluation.normaliser,
    )
    return [
        _proven(finding, one, others) if finding.check == "untrained-head" else finding
        for finding in outputs.look(seen, one.subject, worst)
    ]


def _proven(finding: Finding, one: Opened, others: Sequence[Opened]) -> Finding:
    state = (one.stored.checkpoint, one.stored.epoch, one.stored.val_loss)
    wra = one.believed.wra if one.believed else 0.0
    for other in others:
        same = (other.stored.checkpoint, other.stored.epoch, other.stored.val_loss) == state and None not in state
        if other is not one and same and other.believed and other.believed.wra >= wra + SAME_CHECKPOINT_POINTS:
            return replace(
                finding,
                what=f"{finding.what} The same checkpoint ({state[0]}, epoch {state[1]}, validation loss "
                f"{state[2]:.4f}) has WRA {other.believed.wra:.2f} % in {other.subject}: the weights are sound, the "
                "head that was read is not.",
                evidence={**finding.evidence, "same_checkpoint": other.subject, "its_wra": other.believed.wra},
                points=other.believed.wra - wra,
            )
    return finding


def _ids(examination: Examination, one: Opened, explained: bool) -> None:
    """Ids against texts, and what can be written at all."""
    evaluation, reading, tokenizer, subject = one.evaluation, one.believed, one.tokenizer, one.subject
    size = _size(evaluation)
    if one.readings:
        examination.run("token-offset", subject, partial(tokens.token_offset, evaluation, one.readings), size)
        examination.run("tokenizer-mismatch", subject, partial(tokens.tokenizer_mismatch, evaluation, one.readings))
    elif evaluation.has_tokens:
        find = partial(tokens.offset_without_tokenizer, evaluation, explained=explained)
        examination.run("token-offset", subject, find, size)
        examination.cannot(f"what the ids in {subject} mean", "no tokenizer was given: give its .model file too.")
    if tokenizer is not None and reading is not None:
        name = reading.tokenizer
        if evaluation.texts is None or writer(one.readings) is not None:  # otherwise `tokenizer-mismatch` has said it
            examination.run("special-ids", subject, partial(tokens.special_ids, evaluation, name, tokenizer), size)
        references = [item.reference for item in {item.take: item for item in evaluation.items}.values()]
        find = partial(
            tokens.unreachable_prompts, references, name, tokenizer, subject,
            max_length=tokens.visible_cap(evaluation, tokenizer), reading=reading,
        )  # fmt: skip
        examination.run("unreachable-prompts", subject, find, f"{len(evaluation.references)} prompts")
    if reading is not None:
        examination.run("normaliser-mismatch", subject, partial(tokens.normaliser_mismatch, evaluation, reading), size)
        examination.run("renamed-words", subject, partial(results.renamed_words, evaluation, reading), size)


def _reported(examination: Examination, one: Opened) -> None:
    """What the file says of its outputs, against them."""
    evaluation, subject, size = one.evaluation, one.subject, _size(one.evaluation)
    stored = as_stored(evaluation)
    if evaluation.reported:
        examination.run("out-of-range", subject, partial(results.out_of_range, evaluation), size)
        if stored is not None:
            examination.run("report-differs", subject, partial(results.report_differs, evaluation, stored), size)
            examination.run("other-rule", subject, partial(results.other_rule, evaluation, stored), size)
    if one.stored.source == "predictions":
        examination.run("copies-as-takes", subject, partial(results.copies_as_takes, one.stored, one.takes), size)


def _tokenizers(examination: Examination, given: Given) -> None:
    """Tokenizers against each other, and against the texts of the corpora."""
    named = {str(path): tokenizer for path, tokenizer in given.tokenizers.items()}
    if len(named) > 1:
        detail = f"{len(named)} tokenizers"
        examination.run("tokenizer-mismatch", detail, partial(tokens.tokenizers_differ, named))
    for corpus in given.corpora:
        texts = [r.text for r in {r.take: r for r in corpus.recordings}.values()]
        for name, tokenizer in named.items():
            find = partial(tokens.unreachable_prompts, texts, name, tokenizer, str(corpus.path))
            examination.run("unreachable-prompts", str(corpus.path), find, f"{len(corpus.texts)} texts, {name}")
