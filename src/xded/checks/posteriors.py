"""Checks of what teachers' posteriors and targets say, on a sample of recordings.

`Said` maps recordings to posteriors as they lie on disk, not rescaled (`Store.as_stored`). All functions are pure.
`checks.teachers` compares what is said with texts and with other teachers.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from xded.checks.targets import REMAKE, copied
from xded.findings import Finding
from xded.targets.aggregate import combine
from xded.targets.store import Index, Posterior
from xded.tokenizer import Tokenizer

Said = Mapping[str, Posterior]  # by recording, as stored

SUM_OFF = 0.01  # 16 bits cost 0.0004
TEMPERATURES = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 8.0)
UNSURE = (0.05, 0.95)  # blank probabilities between which temperature shows
UNSURE_FRAMES = 30
LEAST = 1e-8  # probability that 16 bits can still tell from 0
BLANK_OFF = 0.02  # measured: 0.0001 at the true T = 2; 0.12 for T = 1, 0.05 for 1.5, 0.06 for 3
LEAST_LOG_PROB = -1.0  # per token: below, the text's probability hangs on entries too small for 16 bits
KNOWN_TEXTS = 10  # recordings that a teacher must know before they tell anything
LOG_PROB_OFF = 1.0  # per token; measured 0.000 where all entries are kept
LEAST_MEANS = 5  # recordings whose mean can be computed again: with fewer, their lengths are at fault
MEAN_OFF = 0.01  # total variation; measured: 0.00005


def normalisation(said: Mapping[str, Said], vocabulary: int, subject: str) -> list[Finding]:
    """Whether every step is a distribution: no NaN, nothing negative or above 1, sum 1, ids known and listed once.

    Args:
        said: by the store's name; vocabulary: V; subject: what the finding is about.
    """
    faults: dict[str, Counter[str]] = {}
    steps, sums = 0, []
    for name, recordings in said.items():
        for posterior in recordings.values():
            counts, total = _faulty_steps(posterior, vocabulary)
            steps += len(posterior.ids)
            sums.append(total)
            if counts:
                faults.setdefault(name, Counter()).update(counts)
    if not faults:
        return []
    all_faults = sum(faults.values(), Counter())
    listed = ", ".join(f"{what} in {count}" for what, count in all_faults.most_common())
    middle = float(np.nanmedian(np.concatenate(sums)))
    return [
        Finding(
            "normalisation", "refuse", subject,
            f"Stored steps are no probability distributions: of {steps} sampled, {listed} (they sum to {middle:.3f} in "
            "the middle).",
            "KL against something that is no distribution has no meaning; the loss may fall all the same.",
            f"Store probabilities with all the mass beyond the top k as the rest. {REMAKE}",
            {"steps": steps, "sum_median": middle, "faults": dict(all_faults),
             "stores": {name: dict(counts) for name, counts in faults.items()}},
        )
    ]  # fmt: skip


def _faulty_steps(posterior: Posterior, vocabulary: int) -> tuple[Counter[str], np.ndarray]:
    values = np.concatenate([posterior.probabilities, posterior.rest[:, None]], axis=1)
    total = values.sum(1)
    finite = np.isfinite(values).all(1)
    in_order = np.sort(posterior.ids, axis=1)
    counts = {
        "NaN or infinity": ~finite,
        "a value below 0 or above 1": finite & ((values < 0) | (values > 1 + SUM_OFF)).any(1),
        "a sum other than 1": finite & (np.abs(total - 1) > SUM_OFF),
        "an id outside the vocabulary": ((posterior.ids < 0) | (posterior.ids >= vocabulary)).any(1),
        "an id listed twice": (in_order[:, 1:] == in_order[:, :-1]).any(1),
    }
    return Counter({what: int(rows.sum()) for what, rows in counts.items() if rows.any()}), total


def sharpness(
    said: Mapping[str, Said], declared: Mapping[str, float], vocabulary: int, blank: int, subject: str
) -> list[Finding]:
    """Whether teachers' CTC posteriors have the temperature that they declare.

    A single teacher's store keeps the blank's probability at T = 1 (`least_blank`) beside the softened distribution;
    p_1 is proportional to p_T^T, so only the true T brings the two together.

    Args:
        said, declared: posteriors and T of the index, by teacher; vocabulary: V; blank: the CTC blank's id;
            subject: what the finding is about.
    """
    found: dict[str, float] = {}
    error = 0.0
    for teacher, recordings in said.items():
        off = _blank_error(recordings, declared[teacher], vocabulary, blank)
        if off <= BLANK_OFF:
            continue
        others = {t: _blank_error(recordings, t, vocabulary, blank) for t in TEMPERATURES}
        best = min(others, key=lambda t: others[t])
        if others[best] < off / 3:
            found[teacher], error = best, max(error, off)
    if not found:
        return []
    true, said_to_be = Counter((found[t], declared[t]) for t in found).most_common(1)[0][0]
    return [
        Finding(
            "temperature", "refuse", subject,
            f"The posteriors of {len(found)} of {len(said)} teachers say T = {said_to_be:g} but are as sharp as T = "
            f"{true:g} (the blank's probability is off by {error:.2f} at the declared T).",
            "The student's logits are divided by another temperature than the teachers': even the teacher itself would "
            "have a loss.",
            f"{REMAKE[:-1]} --temperature {said_to_be:g}.",
            {"declared": said_to_be, "found": found, "blank_off": error},
        )
    ]  # fmt: skip


def _blank_error(said: Said, temperature: float, vocabulary: int, blank: int) -> float:
    """Median distance between the blank's probability at T = 1 and the one that a temperature gives; 0 for too few."""
    off = []
    for posterior in said.values():
        unsure = (posterior.least_blank > UNSURE[0]) & (posterior.least_blank < UNSURE[1])
        probability = np.exp(sharpened(posterior, [blank], temperature, vocabulary)[:, 0])
        off.append(np.abs(probability - posterior.least_blank)[unsure])
    every = np.concatenate(off) if off else np.array([])
    return float(np.median(every)) if len(every) >= UNSURE_FRAMES else 0.0


def sharpened(posterior: Posterior, tokens: Sequence[int], temperature: float, vocabulary: int) -> np.ndarray:
    """Log-probabilities at T = 1 of some tokens, from a posterior at `temperature`: [T, tokens].

    p_1 is proportional to p_T^T; the rest is spread evenly over the entries that were not kept, as in `dense`.
    """
    unlisted = vocabulary - posterior.ids.shape[1]
    share = posterior.rest / max(unlisted, 1)
    logs = temperature * np.log(np.maximum(np.column_stack([posterior.probabilities, share]), LEAST))
    weight = np.append(np.zeros(posterior.ids.shape[1]), np.log(unlisted) if unlisted > 0 else -np.inf)
    norm = np.logaddexp.reduce(logs + weight, axis=1)
    found = []
    for token in tokens:
        here = posterior.ids == token
        found.append(np.where(here.any(1), np.where(here, logs[:, :-1], -np.inf).max(1), logs[:, -1]))
    return np.asarray(np.stack(found, axis=1) - norm[:, None])


def copied_posteriors(said: Mapping[str, Said], subject: str) -> list[Finding]:
    """Teachers that say exactly the same of every sampled recording: copies, whatever they are called."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for teacher, recordings in said.items():
        key = tuple(
            zlib.crc32(recordings[name].probabilities.tobytes(), zlib.crc32(recordings[name].ids.tobytes()))
            for name in sorted(recordings)
        )
        groups.setdefault(key, []).append(teacher)
    same = [teachers for key, teachers in groups.items() if key and len(teachers) > 1]
    return [copied("the same posteriors", same, len(said), subject)] if same else []


def aggregate_of_others(target: Said, said: Mapping[str, Said], index: Index, subject: str) -> list[Finding]:
    """Whether targets are the mean of the posteriors that they name, computed again.

    Args:
        target: of some recordings; said: by teacher, of the same recordings; index: of the targets.
        subject: what the findings are about.
    """
    if index.aggregation is None or not said:
        return []
    weights = {entry.recording: entry.weight for entry in index.recordings if entry.recording in target}
    means: dict[str, np.ndarray] = {}
    for recording in target:
        shares = {t: w for t, w in weights[recording].items() if t in said and recording in said[t]}
        if len(shares) < len(weights[recording]) or not shares:
            continue  # a teacher's posteriors are not there
        scaled = [rescaled(said[t][recording]) for t in shares]
        if len({len(p.ids) for p in (*scaled, target[recording])}) == 1:
            mean = combine(scaled, list(shares.values()), index.aggregation, index.vocabulary)
            means[recording] = mean
    if len(means) < min(LEAST_MEANS, len(target)):
        return []
    off = [r for r, mean in means.items() if distance(target[r], mean) > MEAN_OFF]
    if len(off) <= len(means) / 20:
        return []
    evidence = {"off": len(off), "of": len(means)}
    single = [
        t for t in said if all(distance(target[r], dense_of(said[t][r], index.vocabulary)) <= MEAN_OFF for r in means)
    ]
    start = f"The {index.kind} targets of {len(off)} of {len(means)} sampled recordings are not the mean of the "
    if single:
        return [
            Finding(
                "effective-teachers", "refuse", subject,
                f"{start}{len(said)} teachers' posteriors beside them: they are those of '{single[0]}' alone.",
                "The student learns from one teacher; what the others know is lost.", REMAKE,
                {**evidence, "teacher": single[0], "effective": 1.0, "teachers": len(said)},
            )
        ]  # fmt: skip
    return [
        Finding(
            "target-text", "refuse", subject,
            f"{start}posteriors beside them, which they name as their teachers'.",
            "They are of other recordings, other teachers or other weights than their index says: nobody knows what "
            "the student is taught.", REMAKE, evidence,
        )
    ]  # fmt: skip


def rescaled(posterior: Posterior) -> Posterior:
    """The posterior summing to exactly 1, as `Store.read` gives it."""
    total = np.maximum(posterior.probabilities.sum(1) + posterior.rest, 1e-10)
    return Posterior(
        posterior.ids, posterior.probabilities / total[:, None], posterior.rest / total, posterior.least_blank
    )


def dense_of(posterior: Posterior, vocabulary: int) -> np.ndarray:
    """[T, V] of one posterior as stored."""
    return combine([rescaled(posterior)], [1.0], "prob_mean", vocabulary)


def distance(posterior: Posterior, full: np.ndarray) -> float:
    """Total variation over the listed entries between a posterior [T, k] and distributions [T, V], mean over steps."""
    if len(posterior.ids) != len(full):
        return 1.0
    listed = np.take_along_axis(full, posterior.ids, axis=1)
    return float(0.5 * np.abs(rescaled(posterior).probabilities - listed).sum(1).mean())


def rows_of_others(
    said: Mapping[str, Said],
    noted: Mapping[str, Mapping[str, float | None]],
    tokens: Mapping[str, Sequence[int]],
    index: Index,
    tokenizer: Tokenizer,
    subject: str,
) -> list[Finding]:
    """Whether posteriors give the true texts the probability that was noted when they were made.

    Args:
        said, noted: posteriors and `true_log_prob`, by teacher and recording; tokens: of the true texts, without </s>;
            of listed words, the place of the true one.
        index: of one of the teachers (kind, temperature, vocabulary); tokenizer: theirs; subject: what the finding is
            about.
    """
    off: dict[str, tuple[int, int]] = {}
    for teacher, recordings in said.items():
        differences = []
        for name, posterior in recordings.items():
            wanted = noted[teacher].get(name)
            if wanted is not None and wanted > LEAST_LOG_PROB and tokens.get(name):
                differences.append(abs(wanted - true_log_prob(posterior, tokens[name], index, tokenizer)))
        wrong = sum(not difference <= LOG_PROB_OFF for difference in differences)
        if len(differences) >= KNOWN_TEXTS and wrong > len(differences) / 2:
            off[teacher] = wrong, len(differences)
    if not off:
        return []
    worst = max(off, key=lambda teacher: off[teacher][0])
    return [
        Finding(
            "target-text", "refuse", subject,
            f"The {index.kind} posteriors of {len(off)} of {len(said)} teachers do not belong to the recordings that "
            f"the index gives them: the true text has another probability than was noted when they were made ({worst}: "
            f"{off[worst][0]} of {off[worst][1]} recordings that this teacher knew).",
            "The student hears one recording and is taught what teachers said about another.", REMAKE,
            {"teachers": {teacher: {"off": wrong, "of": of} for teacher, (wrong, of) in off.items()}},
        )
    ]  # fmt: skip


def true_log_prob(posterior: Posterior, tokens: Sequence[int], index: Index, tokenizer: Tokenizer) -> float:
    """Log-probability a token of a text at T = 1, from a posterior as stored; -inf where it does not fit."""
    if index.kind == "words":
        return float(sharpened(posterior, tokens, index.temperature, index.vocabulary)[0, 0])
    wanted = list(dict.fromkeys([tokenizer.blank, *tokens, tokenizer.eos]))
    log_probs = sharpened(posterior, wanted, index.temperature, index.vocabulary)  # [T, distinct tokens]
    places = [wanted.index(token) for token in tokens]
    if index.kind == "decoder":
        steps = [*places, wanted.index(tokenizer.eos)]
        return float(log_probs[np.arange(len(steps)), steps].mean()) if len(steps) == len(log_probs) else -np.inf
    loss = F.ctc_loss(
        torch.from_numpy(log_probs.astype(np.float32))[:, None], torch.tensor([places]),
        torch.tensor([len(log_probs)]), torch.tensor([len(places)]), blank=0, reduction="none",
    )  # fmt: skip
    return -float(loss[0]) / len(places)
