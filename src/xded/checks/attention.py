"""Does the decoder's attention move along the audio, and does the decoder listen to it?

A small decoder that knows its few words may write them from two glances: its attention need not move like a pointer.
Only one that is dead (the same weight everywhere, or always the same place) in every head is a problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from xded.findings import Finding, Severity

# Heads of 72 healthy models (4 corpora, micro and tiny, 250 to 800 updates): entropy 0.45 to 0.76, span 0.29 to 0.80;
# best correlation of a model 0.12 to 0.91; no head dead. At 30 updates from random weights: entropy 0.96 to 0.99, all
# dead.
UNIFORM = 0.95  # entropy over that of equal weights; above, a head looks everywhere alike
STILL = 0.05  # share of the audio; a head whose centre moves less within and between recordings looks at one place
FEWEST_STEPS = 3  # of a text, to speak of moving
MOVES = 0.5  # rank correlation of step and centre
ALONG = 0.3  # mean of the best head
# Nats by which a text is likelier with its own audio than with another's. The same 72 models: CTC head 15 to 66,
# decoder 5 to 19; at 30 updates, when attention is still uniform everywhere, below 0.4.
LEARNED_NATS = 2.0
LISTENS_NATS = 0.5


@dataclass(frozen=True)
class Movement:
    """What every head of every layer does, each [layers, heads].

    Attributes:
        entropy: of a step's weights over that of equal weights, mean; 1 is no preference at all.
        span: how far the centre of mass moves within a recording, share of the recording, mean.
        spread: how much it differs between recordings at the first step, standard deviation, share of the recording.
        correlation: rank correlation of step and centre, mean over recordings; 1 is along the audio.
        moving: share of recordings in which it is above `MOVES`.
    """

    recordings: int
    entropy: np.ndarray
    span: np.ndarray
    spread: np.ndarray
    correlation: np.ndarray
    moving: np.ndarray


def movement(maps: Sequence[np.ndarray]) -> Movement | None:
    """Statistics of attention maps [layers, heads, U, T']; texts of fewer than three steps are left out."""
    maps = [weights for weights in maps if weights.shape[2] >= FEWEST_STEPS and weights.shape[3] > 1]
    if not maps:
        return None
    entropy, span, first, correlation = [], [], [], []
    for weights in maps:
        frames = weights.shape[3]
        information = -(weights * np.log(np.maximum(weights, 1e-12))).sum(3) / np.log(frames)
        centres = weights @ ((np.arange(frames) + 0.5) / frames)  # [layers, heads, U]
        entropy.append(information.mean(2))
        span.append(np.ptp(centres, axis=2))
        first.append(centres[:, :, 0])
        correlation.append(np.apply_along_axis(_along, 2, centres))
    return Movement(
        len(maps), np.mean(entropy, 0), np.mean(span, 0), np.std(first, 0), np.mean(correlation, 0),
        np.mean(np.array(correlation) > MOVES, 0),
    )  # fmt: skip


def _along(centres: np.ndarray) -> float:
    """Rank correlation of step and centre; 0 where the centre never moves."""
    return 0.0 if np.ptp(centres) < 1e-9 else float(spearmanr(np.arange(len(centres)), centres).statistic)


def dead_heads(moves: Movement) -> np.ndarray:
    """[layers, heads]: heads that look everywhere alike, or always at one place."""
    uniform = moves.entropy > UNIFORM
    fixed = (moves.span < STILL) & (moves.spread < STILL)
    return uniform | fixed


def attention(
    maps: Sequence[np.ndarray], subject: str, *, gains_nats: Mapping[str, float], decoded: bool
) -> list[Finding]:
    """Looks for attention that is dead in every head, in a model that has learned something.

    Args:
        maps: cross-attention of one recording each, [layers, heads, U, T'].
        subject: the checkpoint.
        gains_nats: of each trained head (`ctc`, `decoder`): how much likelier a text is with its own audio than with
            another recording's. The CTC head's says whether there is anything to hear in what the encoder says.
        decoded: whether results come from the decoder.
    """
    moves = movement(maps)
    if moves is None:
        return []
    dead = dead_heads(moves)
    learned = max(gains_nats.values(), default=0.0) > LEARNED_NATS
    deaf = learned and gains_nats.get("decoder", 0.0) <= LISTENS_NATS
    still = bool(moves.correlation.max() < ALONG)
    if not (dead.all() or deaf or still):
        return []
    numbers = (
        f"entropy {moves.entropy.mean():.2f} of 1, the centre moves over {100 * moves.span.mean():.0f} % of the audio, "
        f"best rank correlation with time {moves.correlation.max():.2f}, {moves.recordings} recordings"
    )
    if dead.all():
        severity: Severity = "warn" if decoded and learned else "note"
        what = f"All {dead.size} heads of the decoder's attention are dead ({numbers})"
    else:
        severity = "note"
        what = f"The decoder's attention {'does not move along' if still else 'moves, but brings nothing of'} the audio"
        what += f" ({numbers})"
    gain = gains_nats.get("decoder", 0.0)
    what += f"; a text is {gain:.2f} nats likelier to the decoder with its own audio than with another recording's"
    what += "." if learned else ", and neither head has learned much yet."
    return [
        Finding(
            "attention", severity, subject, what,
            "None as long as the decoder listens: a few known words can be told from a glance."
            if gain > LISTENS_NATS and not dead.all()
            else "The decoder writes what is frequent, or what an average of the audio tells it, not what is said.",
            "See it: 'xded inspect RUN --recording R'. Decode with CTC (--decode ctc), or train longer, with more "
            "weight on the decoder (--cross-entropy).",
            _evidence(moves, dead, gains_nats),
        )
    ]  # fmt: skip


def _evidence(moves: Movement, dead: np.ndarray, gains_nats: Mapping[str, float]) -> dict[str, Any]:
    numbers = ("entropy", "span", "spread", "correlation", "moving")
    return {
        "recordings": moves.recordings,
        "dead_heads": int(dead.sum()),
        "heads": int(dead.size),
        "gain_nats": {head: round(value, 3) for head, value in gains_nats.items()},
        **{name: np.round(getattr(moves, name), 3).tolist() for name in numbers},
    }
