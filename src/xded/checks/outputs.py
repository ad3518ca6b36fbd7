"""What outputs look like: empty, a handful for everything, too long, repeating, or those of a head never trained.

All of these are symptoms except the last: they say that something went wrong, not what. They take plain rows, so that
predictions of any make can be looked at. Thresholds lie between what was measured on sound and on failed recognisers
of a 255-word task (38 evaluations with 2 to 1785 distinct outputs), and small samples get notes only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Final

from xded.findings import Finding, Severity
from xded.tokenizer import normalise

Row = tuple[str, str | None, Sequence[int] | None]  # reference, text of the output, ids of the output

ENOUGH_TAKES: Final = 100  # with fewer takes (or prompts) it is the recogniser's own records that say what is wrong
ENOUGH_REFERENCES: Final = 8
EMPTY: Final = 0.95  # share; the weakest sound recogniser of the study was silent in 8 % of its outputs
FEW_OUTPUTS: Final = 1 / 4  # distinct outputs for each distinct prompt; sound ones had 0.48 to 2.5
VERY_FEW_OUTPUTS: Final = 1 / 8
FEW_TOKENS: Final = 1 / 20  # effective number of ids in use, of that of the prompts; sound ones had 0.4 to 0.9
VERY_FEW_TOKENS: Final = 1 / 30  # without a trained blank: 0.026
LONG: Final = 2.0  # times what prompts need; sound ones had up to 1.7 (zero-shot, moderate dysarthria)
REPEATING: Final = 0.3  # share of outputs
# of a head without training: nearly every output is another one, three times too long, made of what no prompt needs
UNTRAINED_DISTINCT: Final = 0.9
UNTRAINED_LONG: Final = 3.0
UNTRAINED_FAMILIAR: Final = 0.5  # share of ids (or words) that some prompt needs; random heads 0.08, trained ones 0.99
UNTRAINED_TYPES: Final = 1.0  # distinct ids (or words) for each distinct prompt; a random head had 8, trained ones 0.8
UNTRAINED_TYPES_ALONE: Final = 3.0  # the same where nothing says what ids mean
UNTRAINED_WRA: Final = 0.01


@dataclass(frozen=True)
class Outputs:
    """Numbers about the outputs of one evaluation. Shares are of 1; "effective" numbers are inverse Simpson indices.

    Attributes:
        wra: whole output equals the reference; none where there is no text.
        words, words_needed: means over outputs and references; none where there is no text.
        tokens: mean ids per output; none without ids.
        tokens_needed: mean ids per reference; without a tokenizer its letters, which are at least as many.
        types, types_effective: different ids in use; needed_effective: the same of the references, with a tokenizer.
        familiar: share of the ids (without a tokenizer: of the words) that some reference has; none where unknown.
        repeats: share of outputs that say up to three ids or words three times in a row.
    """

    recordings: int
    takes: int
    references: int
    distinct: int
    effective: float
    wra: float | None
    empty: float
    words: float | None
    words_needed: float | None
    tokens: float | None
    tokens_needed: float | None
    types: int
    types_effective: float | None
    needed_effective: float | None
    familiar: float | None
    repeats: float

    @property
    def enough(self) -> bool:
        """Whether there is enough to call it more than a note."""
        return self.takes >= ENOUGH_TAKES and self.references >= ENOUGH_REFERENCES

    @property
    def length(self) -> float:
        """How many times longer outputs are than references, in ids or in words, whichever is more."""
        ratios = [0.0]
        if self.words is not None and self.words_needed:
            ratios.append(self.words / self.words_needed)
        if self.tokens is not None and self.tokens_needed:
            ratios.append(max(0.0, self.tokens - 1) / self.tokens_needed)  # one more is </s>'s fault, not a habit
        return max(ratios)

    def numbers(self) -> dict[str, Any]:
        """For the evidence."""
        return {
            key: round(value, 4) if isinstance(value, float) else value
            for key, value in asdict(self).items()
            if value is not None
        }


def measure(
    rows: Sequence[Row],
    *,
    takes: Sequence[Hashable] | None = None,
    encode: Callable[[str], Sequence[int]] | None = None,
    shifts: Iterable[int] = (0,),
    normaliser: str = "upper",
) -> Outputs:
    """Looks at outputs.

    Args:
        rows: one for each recording, at least one.
        takes: the take of each row; none: every row is one.
        encode: text to ids, of the tokenizer that the ids belong to.
        shifts: offsets between ids and the tokenizer's that are possible; the most familiar counts.
        normaliser: of references and texts.
    """
    references = [normalise(reference, normaliser) for reference, _, _ in rows]
    texts = [None if text is None else normalise(text, normaliser) for _, text, _ in rows]
    ids = [tuple(tokens) if tokens is not None else None for _, _, tokens in rows]
    has_text, has_ids = any(text is not None for text in texts), any(ids)
    said: list[Hashable] = list(ids if has_ids else texts)
    parts: list[Sequence[Hashable]] = [
        tokens if has_ids and tokens is not None else (text or "").split()
        for text, tokens in zip(texts, ids, strict=True)
    ]
    needed = {text: tuple(encode(text)) for text in set(references)} if encode else None
    used = Counter(i for tokens in ids for i in tokens or ())
    wanted = Counter(i for text in references for i in needed[text]) if needed else Counter()
    spoken = Counter(word for text in texts for word in (text or "").split())
    return Outputs(
        recordings=len(rows),
        takes=len(set(takes)) if takes is not None else len(rows),
        references=len(set(references)),
        distinct=len(set(said)),
        effective=_effective(Counter(said)),
        wra=fmean(text == reference for text, reference in zip(texts, references, strict=True)) if has_text else None,
        empty=fmean(not part for part in parts),
        words=fmean(len((text or "").split()) for text in texts) if has_text else None,
        words_needed=fmean(len(text.split()) for text in references) if has_text else None,
        tokens=fmean(len(tokens or ()) for tokens in ids) if has_ids else None,
        tokens_needed=fmean(len(needed[t]) if needed else len(t.replace(" ", "")) for t in references),
        types=len(used) if has_ids else len(spoken),
        types_effective=_effective(used) if has_ids else None,
        needed_effective=_effective(wanted) if needed else None,
        familiar=_familiar(used, wanted, spoken, references, shifts),
        repeats=fmean(loops(part) for part in parts),
    )


def _effective(counts: Counter[Any]) -> float:
    total = counts.total()
    return total**2 / sum(n * n for n in counts.values()) if total else 0.0


def _familiar(
    used: Counter[int], wanted: Counter[int], spoken: Counter[str], references: Sequence[str], shifts: Iterable[int]
) -> float | None:
    if used and wanted:
        return max(sum(n for i, n in used.items() if i + shift in wanted) for shift in shifts) / used.total()
    if not spoken:
        return None
    words = {word for text in set(references) for word in text.split()}
    return sum(n for word, n in spoken.items() if word in words) / spoken.total()


def loops(parts: Sequence[Hashable]) -> bool:
    """Whether one, two or three ids or words come three times in a row."""
    return any(
        parts[i : i + n] == parts[i + n : i + 2 * n] == parts[i + 2 * n : i + 3 * n]
        for n in (1, 2, 3)
        for i in range(len(parts) - 3 * n + 1)
    )


def look(outputs: Outputs, subject: str, worst: Severity = "refuse") -> list[Finding]:
    """All checks of this module; `worst` bounds their severity, for a recogniser that had no chance to learn."""
    return [
        *untrained_head(outputs, subject, worst),
        *blank_only(outputs, subject, worst),
        *collapse(outputs, subject, worst),
        *over_generation(outputs, subject, worst),
        *repetition(outputs, subject, worst),
    ]


def _finding(
    check: str, severity: Severity, worst: Severity, outputs: Outputs, subject: str,
    what: str, effect: str, remedy: str,
) -> Finding:  # fmt: skip
    order: tuple[Severity, ...] = ("note", "warn", "refuse")
    if not outputs.enough:
        severity = "note"
    severity = min(severity, worst, key=order.index)
    return Finding(check, severity, subject, what, effect, remedy, outputs.numbers())


def untrained_head(outputs: Outputs, subject: str, worst: Severity = "refuse") -> list[Finding]:
    """Outputs as they come from weights that were never trained, or never loaded."""
    if outputs.familiar is None:
        strange = outputs.types >= UNTRAINED_TYPES_ALONE * outputs.references
        made_of = f"{outputs.types} different ids for {outputs.references} prompts"
    else:
        strange = outputs.familiar <= UNTRAINED_FAMILIAR and outputs.types >= UNTRAINED_TYPES * outputs.references
        unit = "ids" if outputs.needed_effective is not None else "words"
        made_of = f"{outputs.types} different {unit}, of whose uses {100 * outputs.familiar:.0f} % are any prompt's"
    varied = outputs.distinct >= UNTRAINED_DISTINCT * outputs.recordings
    if not (strange and varied and outputs.length >= UNTRAINED_LONG and (outputs.wra or 0.0) <= UNTRAINED_WRA):
        return []
    size = f"{outputs.tokens:.1f} ids" if outputs.tokens is not None else f"{outputs.words or 0:.1f} words"
    return [
        _finding(
            "untrained-head", "refuse", worst, outputs, subject,
            f"The outputs are those of weights that were never trained or never loaded: {outputs.distinct} distinct "
            f"outputs for {outputs.recordings} recordings, {size} each ({outputs.length:.0f} times too long), made of "
            f"{made_of}.",
            "the result says nothing about the model: it was read through the wrong head, or its weights are random",
            "Decode the head that was trained (--decode decoder for a decoder-KD model, and the reverse), and load "
            "weights strictly, all of them; 'xded doctor CHECKPOINT' names heads without gradient.",
        )
    ]  # fmt: skip


def blank_only(outputs: Outputs, subject: str, worst: Severity = "refuse") -> list[Finding]:
    """Next to nothing is written."""
    if outputs.empty < EMPTY:
        return []
    return [
        _finding(
            "blank-only", "refuse", worst, outputs, subject,
            f"{100 * outputs.empty:.1f} % of the {outputs.recordings} outputs are empty.",
            "the recogniser says blank (or ends) everywhere: nothing was learned, or its input is broken (NaN, "
            "silence, a normaliser without statistics)",
            "Check features, learning rate and the blank's share in the targets: 'xded doctor RUN', then --probe.",
        )
    ]  # fmt: skip


def collapse(outputs: Outputs, subject: str, worst: Severity = "refuse") -> list[Finding]:
    """A handful of outputs, or of ids, whatever is said."""
    if outputs.empty >= EMPTY or outputs.references < 2:
        return []
    share = outputs.distinct / outputs.references
    severity: Severity
    if share <= FEW_OUTPUTS:
        severity = "refuse" if share <= VERY_FEW_OUTPUTS else "warn"
        what = (
            f"{outputs.distinct} distinct outputs for {outputs.references} prompts in {outputs.recordings} recordings "
            f"({outputs.effective:.1f} if all were equally frequent)"
        )
    elif outputs.types_effective is not None and outputs.needed_effective:
        share = outputs.types_effective / outputs.needed_effective
        if share > FEW_TOKENS:
            return []
        severity = "refuse" if share <= VERY_FEW_TOKENS else "warn"
        what = (
            f"The outputs are made of {outputs.types} ids, a few of them all the time "
            f"({outputs.types_effective:.1f} if all were equally frequent; prompts need {outputs.needed_effective:.0f})"
        )
    else:
        return []
    empty = f"; {100 * outputs.empty:.0f} % are empty" if outputs.empty >= 0.05 else ""
    wra = f"; WRA {100 * outputs.wra:.2f} %" if outputs.wra is not None else ""
    return [
        _finding(
            "collapse", severity, worst, outputs, subject, f"{what}{empty}{wra}.",
            "outputs hardly depend on what was said, and what is right is right by chance: no result",
            "Look for parts without gradient, a frozen or random encoder, targets of other recordings, too high a "
            "learning rate: 'xded doctor RUN', then --probe (overfit 8 recordings).",
        )
    ]  # fmt: skip


def over_generation(outputs: Outputs, subject: str, worst: Severity = "refuse") -> list[Finding]:
    """Outputs far longer than prompts."""
    if outputs.length < LONG:
        return []
    sizes = []
    if outputs.tokens is not None:
        sizes.append(f"{outputs.tokens:.1f} ids (prompts {outputs.tokens_needed:.1f})")
    if outputs.words is not None:
        sizes.append(f"{outputs.words:.2f} words (prompts {outputs.words_needed:.2f})")
    silent = " and none is empty" if outputs.empty == 0 else ""
    return [
        _finding(
            "over-generation", "warn", worst, outputs, subject,
            f"Outputs are {outputs.length:.1f} times too long: {', '.join(sizes)} each{silent}.",
            "a whole output that is too long is wrong, even when the word is in it",
            "For CTC check that the blank is trained (its row of the head needs a gradient), for a decoder that </s> "
            "is; 'xded evaluate' with --word-list shows what the model knows all the same.",
        )
    ]  # fmt: skip


def repetition(outputs: Outputs, subject: str, worst: Severity = "refuse") -> list[Finding]:
    """Outputs that go round in circles."""
    if outputs.repeats < REPEATING:
        return []
    return [
        _finding(
            "loops", "warn", worst, outputs, subject,
            f"{100 * outputs.repeats:.0f} % of the outputs repeat the same ids or words three times or more in a row.",
            "the decoder does not move on along the audio, or never learned to end",
            "Look at its attention ('xded inspect RUN --recording R'); decode with CTC, or train longer.",
        )
    ]  # fmt: skip
