"""Checks of what teachers and their averages spell: against the texts, and against each other.

All functions are pure. Thresholds marked "measured" lie between two groups of targets: those of 20 demo folds (4 to 8
teachers adapted from one parent; real, simulated-dysarthric and synthetic speech, good and poor teachers), and those of
6 to 8 students that were trained apart from each other on the same corpora.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import binom

from xded.checks.targets import REMAKE
from xded.errors import NAMES_SHOWN, few
from xded.findings import Finding
from xded.targets.store import Kind, Posterior
from xded.tokenizer import Tokenizer

Counts = Mapping[str, Mapping[str, tuple[int, int]]]  # teacher -> speaker -> right outputs, outputs
Spelled = Mapping[str, Mapping[str, "Spikes"]]  # teacher -> recording -> what it spells

SAME_LABELS = 30  # labels that teachers must share before their times are compared
SPIKES_APART = 0.6  # frames between two teachers' spikes, mean: measured 0.08 to 0.34 and 1.04 to 1.62
ONE_APART = 1.0  # frames between one teacher's spikes and the others', mean
DROPPED = 0.07  # share of labels that the average loses: measured 0 to 0.032 and 0.11 to 0.22
SIGNIFICANT = 0.01  # level at which more than chance counts as more
LEAST_OUTPUTS = 20  # listed words that targets must say before they are compared with texts
CONFIDENT = 0.9  # share of outputs that are words of the corpus: who says so many of them knows words
SHIFTS = (-2, -1, 1, 2)  # of token ids
ROLLS = tuple(n for n in range(-5, 6) if n)  # of recordings
CLEARLY = 0.3  # share of right outputs after a shift that is no accident
TAUGHT = 0.3  # share of right outputs on the own speaker from which teachers count as trained
FORCED_OTHER = 3  # predictions that the CTC head, which they are said to come from, does not make
FORCED_WRONG = 5  # wrong predictions that free running and the true text's prefix would hardly share
LEAST_OWN = 5  # outputs on the own speaker that say anything about a teacher
WEAK = 0.5  # of the share of right outputs on the own speaker
EMPTY = 0.05  # share of empty averages: measured 0, in both groups

ONE_PARENT = (
    "Adapt all teachers from one parent (xded teach does), or train with decoder-KD only: xded train --ctc-kd 0 "
    "--decoder-kd 1."
)


@dataclass(frozen=True)
class Spikes:
    """What the most probable CTC path spells, and the frame at which each label is most probable."""

    tokens: tuple[int, ...]
    frames: tuple[int, ...]


def best_path(posterior: Posterior) -> tuple[np.ndarray, np.ndarray]:
    """The most probable id of every step and its probability: [T], [T]."""
    rows = np.arange(len(posterior.ids))
    best = posterior.probabilities.argmax(1)
    return posterior.ids[rows, best], posterior.probabilities[rows, best]


def blank_of(posteriors: Iterable[Posterior]) -> int | None:
    """The CTC blank of posteriors whose tokenizer is not known; none where no frame is certain.

    An id that is more probable than one half is the most probable one, also after softening and in a mean of teachers.
    """
    ids = [best_path(posterior)[0][posterior.least_blank > 0.5] for posterior in posteriors]
    counts = Counter(np.concatenate(ids).tolist()) if ids else Counter()
    return counts.most_common(1)[0][0] if counts else None


def spikes_of(posterior: Posterior, blank: int, shift: int = 0) -> Spikes:
    """Labels of the most probable CTC path, repeats merged and blanks dropped; `shift` is added to every id first."""
    ids, probabilities = best_path(posterior)
    if not len(ids):
        return Spikes((), ())
    starts = np.flatnonzero(np.append(True, ids[1:] != ids[:-1]))
    tokens, frames = [], []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        token = int(ids[start]) + shift
        if token != blank:
            tokens.append(token)
            frames.append(int(start + probabilities[start:end].argmax()))
    return Spikes(tuple(tokens), tuple(frames))


def text_of(posterior: Posterior, kind: Kind, tokenizer: Tokenizer, shift: int = 0, words: Sequence[str] = ()) -> str:
    """The most probable text; ids that the tokenizer, or the list of words, does not have are left out."""
    if kind == "words":
        place = int(best_path(posterior)[0][0]) + shift
        return words[place] if 0 <= place < len(words) else ""
    if kind == "ctc":
        tokens: Sequence[int] = spikes_of(posterior, tokenizer.blank, shift).tokens
    else:
        tokens = (best_path(posterior)[0] + shift).tolist()
    return tokenizer.decode([token for token in tokens if 0 <= token < tokenizer.size])


def teacher_accuracy(counts: Counts, chance: float, where: str, subject: str) -> list[Finding]:
    """Whether teachers recognise their own speaker, and others.

    A teacher that knows nothing among others that do is broken; weak teachers, and weak ones on others' speech, are
    noted: they are not at fault, but they decide what can be distilled.

    Args:
        counts: a teacher is called as its speaker; chance: share of right outputs of one that always says the most
            frequent text.
        where: what was looked at, for the sentence; subject: what the finding is about.
    """
    own = {t: rows[t] for t, rows in counts.items() if rows.get(t, (0, 0))[1] >= LEAST_OWN}
    if not own:
        return []
    others = {t: _sum(pair for s, pair in rows.items() if s != t) for t, rows in counts.items()}
    lost = [t for t, pair in own.items() if _at_chance(pair, chance)]
    broken = [t for t in lost if _is_broken(t, own, counts)]
    table = {t: {"own": list(own.get(t, (0, 0))), "others": list(others[t])} for t in counts}
    mean_own, mean_others = _share(_sum(own.values())), _share(_sum(others.values()))
    asked = _sum(others.values())[1]
    on_others = f"{100 * mean_others:.0f} % on others" if asked else "were never asked about others"
    numbers = f"teachers are {100 * mean_own:.0f} % right on their own speaker and {on_others}"
    evidence = {"teachers": table, "own": mean_own, "others": mean_others, "at_chance": lost, "from": where}
    if broken:
        rows = ", ".join(f"{t} {own[t][0]} of {own[t][1]}" for t in broken[:NAMES_SHOWN])
        return [
            Finding(
                "teacher-accuracy", "warn", subject,
                f"{len(broken)} of {len(counts)} teachers recognise nothing even of their own speaker, whom the others "
                f"understand (right outputs in {where}: {rows}).",
                "Broken teachers pull every target towards noise.",
                f"Look at xded status TEACHERS/teachers/{broken[0]}, train it again with xded teach, or weigh teachers "
                "by what they know: xded targets --weighting reliability.", {**evidence, "broken": broken},
            )
        ]  # fmt: skip
    if len(lost) == len(own) and all(_at_chance(pair, chance) for pair in others.values()):
        what = f"No teacher recognises more than chance, not even its own speaker ({numbers}, in {where})."
        effect = "The targets hold nothing that could be learned; a parent that is not trained yet gives such teachers."
        remedy = "Train the parent longer: xded teach --set teach.parent.stages='[{epochs: 40, peak_lr: 0.001}]'."
    elif lost:
        what = f"{len(lost)} of {len(own)} teachers are at chance on their own speaker ({few(lost)}; {numbers})."
        effect = "Speakers whom nobody understands yet: their teachers add little to the targets."
        remedy = "Weigh teachers by what they know: xded targets --weighting reliability."
    elif asked and mean_others < WEAK * mean_own:
        what = f"In {where}, {numbers}."
        effect = "Each target is a mean of one teacher that knows the speaker and others that do not."
        remedy = "Weigh them: xded targets --weighting reliability, or let the parent hear more: --parent-on both."
    else:
        return []
    return [Finding("teacher-accuracy", "note", subject, what, effect, remedy, evidence)]


def _sum(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    rows = list(pairs)
    return sum(right for right, _ in rows), sum(of for _, of in rows)


def _share(pair: tuple[int, int]) -> float:
    return pair[0] / max(pair[1], 1)


def _at_chance(pair: tuple[int, int], chance: float) -> bool:
    """Whether so many right outputs may be luck."""
    right, of = pair
    return bool(binom.sf(right - 1, of, chance) > SIGNIFICANT)


def _is_broken(teacher: str, own: Mapping[str, tuple[int, int]], counts: Counts) -> bool:
    """Whether the others learned their own speakers and understand this one's far better than the teacher itself."""
    rest = [_share(pair) for other, pair in own.items() if other != teacher]
    here = _sum(rows[teacher] for other, rows in counts.items() if other != teacher and teacher in rows)
    if not rest or not here[1] or float(np.median(rest)) < TAUGHT:
        return False
    right, of = own[teacher]
    return _share(here) > 2 * right / of and bool(binom.cdf(right, of, _share(here)) < SIGNIFICANT)


class Heard(NamedTuple):
    """One recording: what a teacher's predictions say, and what its posteriors of the same recording say."""

    predicted: str
    forced: str  # most probable tokens of the decoder, told the true text
    free: str  # CTC, greedy
    reference: str  # all normalised


def forced_predictions(heard: Mapping[str, Sequence[Heard]], mode: str, subject: str) -> list[Finding]:
    """Predictions that are the most probable tokens of posteriors which had been told the true text.

    Args:
        heard: by teacher; mode: head that the predictions say they were decoded with; subject: what it is about.
    """
    least = FORCED_OTHER if mode == "ctc" else FORCED_WRONG
    forced = []
    for teacher, rows in heard.items():
        telling = sum(row.predicted != (row.free if mode == "ctc" else row.reference) for row in rows)
        if telling >= least and all(row.predicted == row.forced for row in rows):
            forced.append(teacher)
    if not forced:
        return []
    every = [row for teacher in forced for row in heard[teacher]]
    right = 100 * sum(row.predicted == row.reference for row in every) / len(every)
    free = 100 * sum(row.free == row.reference for row in every) / len(every)
    return [
        Finding(
            "teacher-forced", "warn", subject,
            f"All {len(every)} predictions of {len(forced)} of {len(heard)} teachers ({few(forced)}) are what their "
            f"decoder posteriors say when they are told the true text: {right:.0f} % right, where the CTC head of the "
            f"same teachers has {free:.0f} %.",
            "Every step knew the tokens before it: this is no recognition rate, and teachers are taken for better than "
            "they are.",
            "Delete the folder crosstest and give the command again: xded teach.",
            {"teachers": forced, "predictions": len(every), "right_percent": right, "ctc_right_percent": free},
            points=max(0.0, right - free),
        )
    ]  # fmt: skip


def target_text(
    said: Mapping[str, Posterior], kind: Kind, tokenizer: Tokenizer, texts: Mapping[str, str], subject: str,
    words: Sequence[str] = (),
) -> list[Finding]:  # fmt: skip
    """Whether targets say what their recordings say; where not, whether with other ids or other rows they would.

    Targets that say nothing, or nothing that is a text of the corpus, are weak, not wrong: that is no finding here.
    Those of listed words always say a text: by chance, where they are weak.

    Args:
        said: by recording; kind: of the targets; tokenizer: theirs.
        texts: normalised, of all recordings that are known, in the order of the store.
        subject: what the finding is about; words: the list, with kind words.
    """
    names = [name for name in said if name in texts]
    heard = {name: text_of(said[name], kind, tokenizer, words=words) for name in names}
    right = sum(heard[name] == texts[name] for name in names)
    known = Counter(texts.values())
    listed = [name for name in names if heard[name] in known]
    outputs, wanted = Counter(heard[name] for name in listed), Counter(texts[name] for name in listed)
    chance = sum(count * wanted[text] for text, count in outputs.items()) / max(len(listed), 1) ** 2
    by_chance = binom.sf(right - 1, max(len(listed), 1), chance) > SIGNIFICANT
    confident = not words and len(listed) > CONFIDENT * len(names) and right < CLEARLY * len(listed)
    if not names or not (by_chance or confident):
        return []
    by_shift = {
        shift: sum(text_of(said[name], kind, tokenizer, shift, words) == texts[name] for name in names)
        for shift in SHIFTS
    }
    best = max(by_shift, key=lambda shift: by_shift[shift])
    if by_shift[best] > max(CLEARLY * len(names), 2 * right, LEAST_OWN):
        return [_offset(best, by_shift, right, len(names), kind, subject)]
    various = _effective(outputs) >= _effective(wanted) / 2 > 1
    if len(listed) < max(LEAST_OUTPUTS, len(names) / 2) or not various:
        return []
    order = list(texts)
    place = {name: i for i, name in enumerate(order)}
    rolls = {n: sum(heard[r] == texts[order[(place[r] + n) % len(order)]] for r in listed) for n in ROLLS}
    roll = max(rolls, key=lambda n: rolls[n])
    clear = rolls[roll] > max(CLEARLY * len(listed), 2 * right)
    where = f" {rolls[roll]} of them say the text of the recording {roll:+d} places away." if clear else ""
    return [
        Finding(
            "target-text", "refuse" if by_chance and (clear or not words) else "warn", subject,
            f"{len(listed)} of {len(names)} sampled {kind} targets say a word of the corpus, but only {right} say that "
            f"of their own recording (by chance: {100 * chance:.1f} %).{where}",
            "They are other recordings' targets" + (", or their teachers know no word" if words else "")
            + ": the student is taught other words than it hears.", REMAKE,
            {"listed": len(listed), "of": len(names), "right": right, "chance": chance,
             "roll": roll if clear else None, "right_when_rolled": rolls[roll]},
        )
    ]  # fmt: skip


def _effective(counts: Mapping[str, int]) -> float:
    """Effective number of different outputs: one over the chance that two are alike."""
    total = sum(counts.values())
    return total**2 / sum(count**2 for count in counts.values()) if total else 0.0


def _offset(best: int, by_shift: Mapping[int, int], right: int, of: int, kind: Kind, subject: str) -> Finding:
    return Finding(
        "token-offset", "refuse", subject,
        f"The token ids of the {kind} targets are off by {-best:+d}: {right} of {of} sampled ones say the text of "
        f"their recording as they are, {by_shift[best]} when {best:+d} is added to every id.",
        "Every id stands for another piece: the student is taught words that nobody said.",
        f"Store ids as the tokenizer gives them. {REMAKE}",
        {"shift": best, "right": right, "of": of, "right_by_shift": {f"{s:+d}": n for s, n in by_shift.items()}},
        points=100.0 * (by_shift[best] - right) / of,
    )  # fmt: skip


def agreed(spelled: Spelled) -> dict[str, dict[str, Spikes]]:
    """For every recording that two or more teachers spell alike, what these teachers say (the most frequent text)."""
    recordings = {name for rows in spelled.values() for name in rows}
    found = {}
    for name in sorted(recordings):
        said = {t: rows[name] for t, rows in spelled.items() if name in rows and rows[name].tokens}
        if not said:
            continue
        tokens, count = Counter(spikes.tokens for spikes in said.values()).most_common(1)[0]
        if count > 1:
            found[name] = {t: spikes for t, spikes in said.items() if spikes.tokens == tokens}
    return found


def spike_misalignment(spelled: Spelled, frame_rate_hz: float, subject: str) -> list[Finding]:
    """Whether teachers that spell a recording alike do so at the same time.

    Teachers adapted from one parent keep its spikes' places; those of models trained apart differ, and averaging them
    frame by frame loses labels (Kurata & Audhkhasi 2019, arXiv:1904.08311).
    """
    apart: dict[str, list[float]] = {}
    lags: dict[str, list[float]] = {}
    labels = 0
    for said in agreed(spelled).values():
        frames = np.array([spikes.frames for spikes in said.values()], dtype=float)  # [K, U]
        labels += frames.shape[1]
        between = np.abs(frames[:, None] - frames[None]).sum(1) / (len(frames) - 1)  # [K, U]
        late = frames - np.median(frames, axis=0)
        for row, teacher in enumerate(said):
            apart.setdefault(teacher, []).extend(between[row].tolist())
            lags.setdefault(teacher, []).extend(late[row].tolist())
    if labels < SAME_LABELS:
        return []
    overall = float(np.mean([value for values in apart.values() for value in values]))
    means = {t: float(np.mean(values)) for t, values in apart.items() if len(values) >= SAME_LABELS}
    worst = max(means, key=lambda t: means[t]) if means else None
    if overall <= SPIKES_APART and (worst is None or means[worst] <= ONE_APART):
        return []
    who = "" if worst is None else f"; '{worst}' is {means[worst]:.1f} frames from the others"
    return [
        Finding(
            "spike-misalignment", "warn", subject,
            f"Where teachers spell the same, their CTC spikes are {overall:.1f} frames "
            f"({1000 * overall / frame_rate_hz:.0f} ms) apart, mean over {labels} labels (teachers of one parent: 0.1 "
            f"to 0.3 frames){who}.",
            "The frame-by-frame mean of the teachers smears or loses labels: it says blank where each speaks.",
            ONE_PARENT,
            {"frames_apart": overall, "labels": labels, "by_teacher": {t: round(v, 2) for t, v in means.items()},
             "lag_frames": {t: float(np.median(values)) for t, values in lags.items()}},
        )
    ]  # fmt: skip


def blank_average(spelled: Spelled, average: Mapping[str, Spikes], subject: str) -> list[Finding]:
    """Whether the average spells what most teachers spell, and is not empty where each of them says something."""
    recordings = [name for name in average if all(name in rows for rows in spelled.values())]
    if len(spelled) < 2 or not recordings:
        return []
    spoken = [name for name in recordings if all(rows[name].tokens for rows in spelled.values())]
    empty = sum(not average[name].tokens for name in spoken)
    labels = lost = same = 0
    most = {n: said for n, said in agreed(spelled).items() if n in average and 2 * len(said) >= len(spelled)}
    for name, said in most.items():
        tokens = next(iter(said.values())).tokens
        labels += len(tokens)
        lost += max(0, len(tokens) - len(average[name].tokens))
        same += average[name].tokens == tokens
    dropped = labels >= SAME_LABELS and lost > DROPPED * labels
    if not dropped and not (len(spoken) >= LEAST_OUTPUTS and empty > EMPTY * len(spoken)):
        return []
    return [
        Finding(
            "blank-average", "warn", subject,
            f"The average of {len(spelled)} teachers says blank where they speak: of {labels} labels that half of them "
            f"or more agree on it loses {lost} ({100 * lost / max(labels, 1):.0f} %; with one parent 0 to 3 %), and it "
            f"is empty for {empty} of {len(spoken)} recordings of which every teacher says something.",
            "The student learns to leave out letters, or to say nothing.",
            ONE_PARENT,
            {"labels": labels, "lost": lost, "recordings": len(most), "spelled_alike": same, "empty": empty,
             "spoken": len(spoken)},
        )
    ]  # fmt: skip
