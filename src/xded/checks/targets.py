"""Checks of teachers' posteriors and of targets by their indexes: of what audio, how long, whose, how warm.

`checks.posteriors` looks at the numbers themselves. All functions are pure; `indexes` maps a short name of each store
("ctc", "posteriors/M01/decoder") to its index, and `subject` is the folder that they lie in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from xded.corpus.manifest import Recording
from xded.errors import NAMES_SHOWN, few
from xded.findings import Finding
from xded.targets.store import Entry, Index, Kind
from xded.tokenizer import NORMALISERS, Tokenizer

ALONE = 1.1  # effective number of teachers a recording: below, the others together have about 5 % of the weight
ALWAYS_THE_SAME = 1.5  # effective number over all recordings: above, the one teacher differs between recordings
FRAMES_OFF = 2.5  # rounding at both ends, the front end's padding and the subsampling come to less
SHARE_OFF = 0.05  # of the length: other front ends pad more, and manifests round durations
FEW_OFF = 0.01  # share of recordings that may have got a wrong duration in the manifest
LEAST_COVERED = 0.5  # below, most of what could be learned from is thrown away
FORCED_RECORDINGS = 10  # free-running outputs that all have the true length by chance: fewer tell nothing
FLAWLESS = 0.98  # share of right outputs above which free running has the true lengths anyway
RECOGNISED = 0.9  # share of right CTC outputs above which the decoder may well be that good

REMAKE = "Make them anew: xded targets --corpus CORPUS --teachers TEACHERS --held-out SPEAKER --out TARGETS."


def effective_teachers(index: Index, subject: str) -> list[Finding]:
    """Whether several teachers have a say in an aggregate: (sum w)^2 / sum w^2 a recording, and over all of them."""
    weights = [entry.weight for entry in index.recordings if entry.weight]
    if not weights:
        return []
    rows = np.array([[weight.get(teacher, 0.0) for teacher in index.teachers] for weight in weights])  # [N, K]
    total = rows.sum(1, keepdims=True)
    impossible = int((~np.isfinite(rows).all(1) | (rows < 0).any(1) | (total[:, 0] <= 0)).sum())
    if impossible:
        return [
            Finding(
                "effective-teachers", "refuse", subject,
                f"The weights of the teachers are negative, infinite or all zero for {impossible} of {len(rows)} "
                "recordings.",
                "These targets are no mean of anything.", REMAKE, {"impossible": impossible, "recordings": len(rows)},
            )
        ]  # fmt: skip
    effective = float((total[:, 0] ** 2 / (rows**2).sum(1)).mean())
    if len(index.teachers) < 2 or effective >= ALONE:
        return []
    means = (rows / total).mean(0)
    shares = {index.teachers[i]: round(float(means[i]), 4) for i in np.argsort(-means)}
    overall = float(1 / (means**2).sum())
    first, most = next(iter(shares.items()))
    same = overall < ALWAYS_THE_SAME
    remedy = (
        "target.best 1 asks for one teacher a recording; for more of them: xded targets --best 3 (or without --best)."
        if index.best == 1
        else "Weigh them alike, or less sharply: xded targets --weighting uniform (with the options of the first time)."
    )
    who = f"'{first}' has {100 * most:.0f} % of it" if same else f"'{first}' most often ({100 * most:.0f} %)"
    return [
        Finding(
            "effective-teachers", "warn" if same else "note", subject,
            f"Of {len(index.teachers)} teachers {effective:.2f} have a say, on average over {len(rows)} recordings: "
            f"one teacher has all the weight, {who}.",
            "The student learns from one teacher; what the others know is lost." if same
            else "Every recording's target is one teacher's posterior, not a mean of several.",
            remedy,
            {"effective": effective, "effective_overall": overall, "teachers": len(index.teachers),
             "shares": shares},
        )
    ]  # fmt: skip


def audio_hashes(indexes: Mapping[str, Index], hashes: Mapping[str, Collection[str]], subject: str) -> list[Finding]:
    """Whether targets describe the audio that the corpus has.

    Args:
        indexes: by name.
        hashes: SHA-256 of each known recording's file (several, where several corpora have the recording).
        subject: what the finding is about.
    """
    wrong: dict[str, list[Entry]] = {}
    for name, index in indexes.items():
        odd = [e for e in index.recordings if e.audio_sha256 not in hashes.get(e.recording, (e.audio_sha256,))]
        if odd:
            wrong[name] = odd
    if not wrong:
        return []
    most = max(wrong, key=lambda name: len(wrong[name]))
    worst = [entry.recording for entry in wrong[most]]
    known = sum(entry.recording in hashes for entry in indexes[most].recordings)
    every = {value for values in hashes.values() for value in values}
    swapped = sum(entry.audio_sha256 in every for entry in wrong[most])
    others = f"; {swapped} of these files belong to other recordings" if swapped else ""
    return [
        Finding(
            "audio-hash", "refuse", subject,
            f"The targets of {len(worst)} of {known} recordings describe other audio than the corpus has "
            f"({few(worst)}){others}.",
            "The student hears one recording and is taught what teachers said about another.",
            "Make the targets anew from this corpus, or train on the corpus that they were made from: "
            "xded targets --corpus CORPUS --teachers TEACHERS --out TARGETS.",
            {"wrong": len(worst), "of": known, "of_other_recordings": swapped,
             "stores": {name: len(rows) for name, rows in wrong.items()}},
        )
    ]  # fmt: skip


def frame_counts(
    indexes: Mapping[str, Index], durations_s: Mapping[str, float], tokens: Mapping[str, int], subject: str
) -> list[Finding]:
    """Whether CTC targets have the frames that durations ask for, and decoder targets the steps that texts ask for.

    Teachers' posteriors must also agree with each other about every recording that they share. All three are one fault
    seen from three sides: the first finding is returned, and the others' numbers are in its evidence.

    Args:
        indexes: by name.
        durations_s: of the known recordings, seconds.
        tokens: number of tokens of their texts, without </s>; empty without a tokenizer.
        subject: what the findings are about.
    """
    frames: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    steps: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, index in indexes.items():
        if index.kind == "ctc" and index.frame_rate_hz:
            rows = [e for e in index.recordings if e.recording in durations_s]
            wanted = np.array([durations_s[e.recording] for e in rows]) * index.frame_rate_hz
            if rows:
                frames[name] = np.array([e.steps for e in rows]), wanted
        elif index.kind == "decoder" and index.teacher_forced:
            rows = [e for e in index.recordings if e.recording in tokens]
            if rows:
                steps[name] = np.array([e.steps for e in rows]), np.array([tokens[e.recording] + 1 for e in rows])
    found = [
        *_frames_off(frames, subject), *_steps_off(steps, subject),
        *_lengths_that_differ(indexes, "ctc", subject), *_lengths_that_differ(indexes, "decoder", subject),
    ]  # fmt: skip
    if not found:
        return []
    worst = min(found, key=lambda finding: finding.rank)
    also = [finding.what for finding in found if finding is not worst]
    return [replace(worst, evidence={**worst.evidence, "also": also})]


def _frames_off(frames: Mapping[str, tuple[np.ndarray, np.ndarray]], subject: str) -> list[Finding]:
    off = {
        name: np.abs(there - wanted) > np.maximum(FRAMES_OFF, SHARE_OFF * wanted)
        for name, (there, wanted) in frames.items()
    }
    if not any(rows.any() for rows in off.values()):
        return []
    worst = max(off, key=lambda name: off[name].mean())
    there, wanted = frames[worst]
    ratios = there / np.maximum(wanted, 1e-9)
    low, middle, high = np.percentile(ratios, [5, 50, 95]).tolist()
    count, many = int(off[worst].sum()), off[worst].mean() > FEW_OFF
    rate = many and abs(middle - 1) > 2 * SHARE_OFF and high - low < SHARE_OFF + 2 * FRAMES_OFF / np.median(wanted)
    return [
        Finding(
            "frame-count", "refuse" if many else "warn", subject,
            f"{count} of {len(there)} CTC targets do not have the frames of their recording: frames over duration and "
            f"frame rate are {middle:.2f} in the middle, {low:.2f} to {high:.2f} for 90 % of them ({worst}).",
            "All are longer or shorter alike: the frame rate in the index is wrong, and targets are stretched over "
            "the audio." if rate else
            "They are of other recordings, or of other cuts of them: frame for frame they have nothing to do with the "
            "student's audio.",
            f"Check the durations (xded corpus describe CORPUS). {REMAKE}",
            {"off": count, "of": len(there), "ratio_low": low, "ratio_median": middle, "ratio_high": high,
             "stores": {name: int(rows.sum()) for name, rows in off.items() if rows.any()}},
        )
    ]  # fmt: skip


def _steps_off(steps: Mapping[str, tuple[np.ndarray, np.ndarray]], subject: str) -> list[Finding]:
    off = {name: int((there != wanted).sum()) for name, (there, wanted) in steps.items() if (there != wanted).any()}
    if not off:
        return []
    worst = max(off, key=lambda name: off[name])
    of = len(steps[worst][0])
    return [
        Finding(
            "frame-count", "refuse", subject,
            f"{off[worst]} of {of} decoder targets do not have one step for every token of their text and </s> "
            f"({worst}).",
            "They are of other texts: every step teaches the wrong token.",
            f"Check that the texts and the tokenizer are those of the teachers. {REMAKE}",
            {"off": off[worst], "of": of, "stores": off},
        )
    ]  # fmt: skip


def _lengths_that_differ(indexes: Mapping[str, Index], kind: Kind, subject: str) -> list[Finding]:
    """Posteriors of one kind, and their aggregate, that disagree about the steps of a recording."""
    of_kind = [index for index in indexes.values() if index.kind == kind and index.heard == "same_audio"]
    known: dict[str, int] = {}
    differ: dict[str, float] = {}
    for index in of_kind:
        for entry in index.recordings:
            steps = known.setdefault(entry.recording, entry.steps)
            if steps != entry.steps:
                longest, shortest = max(steps, entry.steps), max(min(steps, entry.steps), 1)
                differ[entry.recording] = max(longest / shortest, differ.get(entry.recording, 1.0))
    if not differ:
        return []
    ratio = float(np.median(list(differ.values())))
    return [
        Finding(
            "frame-count", "refuse", subject,
            f"{len(of_kind)} sets of {kind} posteriors disagree about the length of {len(differ)} of {len(known)} "
            f"recordings ({few(list(differ))}), the longest being {ratio:.2f} times the shortest.",
            "They did not hear the same audio with the same front end: step for step they cannot be averaged.", REMAKE,
            {"differ": len(differ), "of": len(known), "kind": kind, "ratio_median": ratio},
        )
    ]  # fmt: skip


def temperature(indexes: Mapping[str, Index], wanted: Mapping[str, float], subject: str) -> list[Finding]:
    """Whether posteriors and targets have one temperature, that of the objectives that use them.

    Args:
        indexes: by name; wanted: temperature of each objective, by the name of its run; subject: the targets' folder.
    """
    found = []
    made = {name: index.temperature for name, index in indexes.items()}
    if len(set(made.values())) > 1:
        by_value = {f"{value:g}": [n for n, v in made.items() if v == value] for value in sorted(set(made.values()))}
        listed = "; ".join(f"T = {value}: {few(names)}" for value, names in by_value.items())
        found.append(
            Finding(
                "temperature", "refuse", subject,
                f"Posteriors and targets were made at {len(by_value)} temperatures ({listed}).",
                "A mean of distributions of different sharpness listens most to the sharpest teacher.",
                f"Use one temperature for all. {REMAKE[:-1]} --temperature T.", {"stores": by_value},
            )
        )  # fmt: skip
    targets = {made[name] for name, index in indexes.items() if index.aggregation is not None} or set(made.values())
    for run, value in wanted.items():
        other = sorted(t for t in targets if abs(t - value) > 1e-6)
        if other:
            found.append(
                Finding(
                    "temperature", "refuse", subject,
                    f"The targets were made at T = {', '.join(f'{t:g}' for t in other)}, but the objective of {run} "
                    f"divides the student's logits by T = {value:g}.",
                    "The student is pulled towards distributions that are too flat or too sharp for it: even the "
                    "teacher itself would have a loss.",
                    f"Make the targets anew with --temperature {value:g}, or train with "
                    f"--set objective.temperature={other[0]:g}.",
                    {"targets": other, "objective": value, "run": run},
                )
            )  # fmt: skip
    return found


def tokenizers(
    indexes: Mapping[str, Index], others: Mapping[str, str], given: Mapping[str, Tokenizer], subject: str
) -> list[Finding]:
    """Whether posteriors, targets and what uses them write with one tokenizer.

    Args:
        indexes: by name.
        others: fingerprints of the runs and teachers that belong to them, by name.
        given: tokenizers that were given beside them: one of them should be theirs, whatever its normaliser.
        subject: what the findings are about.
    """
    prints = {**{name: index.tokenizer for name, index in indexes.items()}, **others}
    distinct = sorted(set(prints.values()))
    if len(distinct) > 1:
        by_print = {value[:12]: [name for name, p in prints.items() if p == value] for value in distinct}
        listed = "; ".join(f"{few(names)}: {value}" for value, names in by_print.items())
        return [
            Finding(
                "tokenizer-mismatch", "refuse", subject,
                f"{len(distinct)} tokenizers are in use (fingerprints: {listed}).",
                "The same id stands for different pieces: targets teach words that nobody said.",
                "Train teachers and student with one tokenizer, and make the targets with these teachers: "
                "xded teach, then xded targets.",
                {"fingerprints": by_print, "vocabularies": {n: i.vocabulary for n, i in indexes.items()}},
            )
        ]  # fmt: skip
    if not given or not indexes or find_tokenizer(distinct[0], given.values()) is not None:
        return []
    first = next(iter(indexes.values()))
    sizes = {name: tokenizer.size for name, tokenizer in given.items()}
    same = [name for name, size in sizes.items() if size == first.vocabulary]
    return [
        Finding(
            "tokenizer-mismatch", "warn" if same else "note", subject,
            f"None of the tokenizers given ({few(list(given))}) is that of the targets (fingerprint "
            f"{distinct[0][:12]}, {first.vocabulary} pieces)"
            + (f", though {few(same)} has as many pieces." if same else "."),
            "Read or trained with another tokenizer, every id of the targets means another piece.",
            "Use the teachers' tokenizer (tokenizer.model in the folder of xded teach), or make the targets anew.",
            {"fingerprint": distinct[0], "vocabulary": first.vocabulary, "sizes": sizes, "same_size": same},
        )
    ]  # fmt: skip


def find_tokenizer(fingerprint: str, tokenizers: Collection[Tokenizer]) -> Tokenizer | None:
    """The tokenizer with this fingerprint, with the normaliser that gives it; none when there is none."""
    for tokenizer in tokenizers:
        for normaliser in (tokenizer.normaliser, *NORMALISERS):
            candidate = tokenizer.with_normaliser(normaliser)
            if candidate.fingerprint == fingerprint:
                return candidate
    return None


def coverage(index: Index, recordings: Sequence[Recording], subject: str) -> list[Finding]:
    """Whether targets cover the training recordings.

    Control speakers may have none, with `same_prompt` many prompts have too few teachers, and targets may have been
    dropped on purpose: that is worth a note.

    Args:
        index: of the targets; recordings: what the student trains on; subject: what the finding is about.
    """
    there, dropped = {entry.recording for entry in index.recordings}, set(index.dropped)
    wanted = [r for r in recordings if r.recording not in dropped]
    return [*_missing(index, wanted, there, subject), *_dropped(index, len(recordings), len(wanted), subject)]


def _missing(index: Index, recordings: Sequence[Recording], there: Collection[str], subject: str) -> list[Finding]:
    missing = Counter(r.speaker for r in recordings if r.recording not in there)
    if not missing:
        return []
    covered = len(recordings) - missing.total()
    wanted = Counter(r.speaker for r in recordings if r.role == "target")
    without = sorted(s for s, count in wanted.items() if missing[s] == count)
    share = 1 - sum(missing[s] for s in wanted) / max(wanted.total(), 1)
    gaps = index.heard == "same_audio" and bool(without or share < LEAST_COVERED)
    return [
        Finding(
            "target-coverage", "refuse" if not covered else "warn" if gaps else "note", subject,
            f"The {index.kind} targets cover {covered} of {len(recordings)} training recordings "
            f"({100 * covered / len(recordings):.0f} %)"
            + (f", and none of {few(without)}." if without else "."),
            "The student trains on the covered recordings only: the others are left out." if covered
            else "There is nothing to learn from: they are targets of another corpus or fold.",
            "Make the targets anew from this corpus and fold"
            + (", or use --coverage all." if index.heard == "same_prompt" else ". " + REMAKE),
            {"covered": covered, "of": len(recordings), "missing_by_speaker": dict(missing), "without": without},
        )
    ]  # fmt: skip


def _dropped(index: Index, of: int, left: int, subject: str) -> list[Finding]:
    if left == of:
        return []
    return [
        Finding(
            "target-coverage", "note", subject,
            f"{of - left} of {of} training recordings have no {index.kind} target on purpose: no mean spells their "
            "text (spelled_only).",
            "The student learns them from their text alone.",
            "Make the targets without --spelled-only where teachers are to be imitated in their errors too.",
            {"dropped": of - left, "of": of},
        )
    ]  # fmt: skip


def frames_of_other_recordings(index: Index, subject: str) -> list[Finding]:
    """CTC frames that were averaged over different recordings of a prompt: they do not line up in time."""
    if index.kind != "ctc" or index.heard != "same_prompt" or index.aggregation is None:
        return []
    return [
        Finding(
            "target-coverage", "refuse", subject,
            f"The CTC targets of {len(index.recordings)} recordings are means over different recordings of the same "
            "prompt (heard: same_prompt).",
            "Frame 10 of one speaker's take is not frame 10 of another's: the mean says nothing about the student's "
            "audio.",
            "Let every teacher hear the recording itself: xded targets --heard same_audio, or train without CTC-KD.",
            {"recordings": len(index.recordings), "teachers": len(index.teachers)},
        )
    ]  # fmt: skip


def copied_hashes(hashes: Mapping[str, str], subject: str) -> list[Finding]:
    """Teachers that are one and the same checkpoint: SHA-256 of each."""
    names: dict[str, list[str]] = {}
    for teacher, value in hashes.items():
        names.setdefault(value, []).append(teacher)
    same = [teachers for teachers in names.values() if len(teachers) > 1]
    if not same:
        return []
    return [copied("the same checkpoint", same, len(hashes), subject)]


def copied(what: str, same: Sequence[Sequence[str]], teachers: int, subject: str) -> Finding:
    """The finding that teachers are copies of each other: `same` lists the groups, of `teachers` in all."""
    left = teachers - sum(len(group) - 1 for group in same)
    listed = "; ".join(" = ".join(group) for group in same[:NAMES_SHOWN])
    return Finding(
        "copied-teacher", "refuse" if left == 1 else "warn", subject,
        f"{sum(len(group) for group in same)} of {teachers} teachers are {what} under several names ({listed}).",
        "The ensemble is one teacher: no mean, no vote." if left == 1
        else f"The ensemble has {left} teachers, and one of them counts several times.",
        "Train every speaker's teacher: xded teach, then xded targets.",
        {"groups": [list(group) for group in same], "teachers": teachers, "distinct": left},
    )  # fmt: skip


def teacher_forced(
    index: Index, tokens: Mapping[str, int], right: float, ctc_right: float | None, subject: str
) -> list[Finding]:
    """Decoder posteriors that followed the true text but are marked as free-running.

    Args:
        index: of decoder posteriors; tokens: number of tokens of each known text, without </s>.
        right: share of a sample whose most probable tokens are the true text; ctc_right: the same of the teacher's
            CTC head, where that is there.
        subject: what the finding is about.
    """
    rows = [entry for entry in index.recordings if entry.recording in tokens]
    if index.kind != "decoder" or index.teacher_forced or len(rows) < FORCED_RECORDINGS:
        return []
    if any(entry.steps != tokens[entry.recording] + 1 for entry in rows):
        return []  # outputs have lengths of their own
    noted = sum(entry.true_log_prob is not None for entry in rows)  # only known to who followed the true text
    if right > FLAWLESS and (ctc_right is None or ctc_right > RECOGNISED) and not noted:
        return []
    than = "" if ctc_right is None else f" (the CTC head of the same teacher: {100 * ctc_right:.0f} %)"
    return [
        Finding(
            "teacher-forced", "warn", subject,
            f"Decoder posteriors are marked as free-running, but all {len(rows)} of them have exactly one step for "
            f"every token of the true text and </s>; read as predictions they are {100 * right:.0f} % right{than}.",
            "They followed the true text: every step was told the tokens before it, so that this is no recognition "
            "rate and the teacher is taken for better than it is.",
            "Judge teachers by what they recognise: xded teach writes crosstest.json. Make the posteriors anew with "
            "xded targets, which marks them.",
            {"recordings": len(rows), "right": right, "ctc_right": ctc_right, "noted": noted},
        )
    ]  # fmt: skip
