"""How a speaker is impaired: severity, type, the emphasis of each sign, bands, and severities spread as in UASpeech.

Which signs there are, and which type has which, follows Darley, Aronson & Brown (1969). `severity` is read as
1 - intelligibility: the simulator and the synthesiser are scaled so that a recogniser trained on healthy voices loses
roughly that share of words (docs/severity.md: within 8 points up to 0.3, up to 18 more in the middle). It is a dial,
not validated against listeners.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from xded.corpus.manifest import Band
from xded.corpus.vocoder import seeded
from xded.errors import CorpusError

SIMULATOR, SYNTHESISER = "simulator", "synthesiser"  # `Recording.simulated_by`: both impair by the profiles here
Kind = Literal["spastic", "athetoid", "ataxic", "flaccid", "hypokinetic"]

# Share of words that listeners understood of UASpeech's 15 speakers in use (Kim et al. 2008, published table), %:
# M04 F03 M12 M01 M07 F02 M16 M05 M11 F04 M09 M14 M08 M10 F05.
UASPEECH_INTELLIGIBILITY = (2, 6, 7, 15, 28, 29, 43, 58, 62, 62, 86, 90, 93, 93, 95)


@dataclass(frozen=True)
class Emphasis:
    """How much of each sign there is, from 0 (none) to about 1 (strong); `tempo` below 0 is hurried speech."""

    tempo: float  # slowing
    pauses: float  # pauses within the word
    monopitch: float
    undershoot: float  # articulators that do not arrive
    centralisation: float  # vowels drawn to the middle
    breathiness: float
    decay: float  # loudness falls through the word
    nasality: float
    voicing: float  # breaks, voiced for voiceless and the reverse
    irregularity: float  # of tempo, pitch (tremor), loudness and targets


# After the clusters of Darley, Aronson & Brown (1969); the numbers are ours.
EMPHASIS: Mapping[Kind, Emphasis] = {
    "spastic": Emphasis(1.0, 0.6, 1.0, 1.0, 1.0, 0.3, 0.3, 0.7, 0.6, 0.3),
    "athetoid": Emphasis(0.8, 1.0, 0.5, 0.8, 0.8, 0.5, 0.5, 0.5, 1.0, 1.0),
    "ataxic": Emphasis(0.9, 0.8, 0.4, 0.7, 0.6, 0.3, 0.3, 0.2, 0.6, 1.0),
    "flaccid": Emphasis(0.6, 0.5, 0.7, 0.9, 0.8, 1.0, 0.9, 1.0, 0.5, 0.3),
    "hypokinetic": Emphasis(-0.25, 0.5, 1.0, 1.0, 0.9, 0.9, 1.0, 0.2, 0.5, 0.3),
}
MOST_EMPHASIS = 1.15  # a speaker has 0.75 to this times the emphasis of the type
# Most of UASpeech's speakers are spastic; its other types are athetoid, mixed and unknown.
_KIND_SHARES: Mapping[Kind, float] = {
    "spastic": 0.6,
    "athetoid": 0.16,
    "ataxic": 0.08,
    "flaccid": 0.08,
    "hypokinetic": 0.08,
}


@dataclass(frozen=True)
class Profile:
    """One speaker's dysarthria: it stays the same from word to word."""

    severity: float  # 0 healthy to 1
    kind: Kind
    emphasis: Emphasis  # of this speaker at severity 1

    @cached_property
    def amounts(self) -> Emphasis:
        """The emphasis scaled by the severity; no sign exceeds 1."""
        scaled = {name: min(1.0, self.severity * value) for name, value in dataclasses.asdict(self.emphasis).items()}
        return Emphasis(**scaled)


def make_profile(severity: float, kind: Kind | None = None, *, speaker: str, seed: int = 0) -> Profile:
    """A speaker's profile: the emphasis of the type, each sign varied by 0.75 to 1.15 for this speaker.

    The variation and, where `kind` is None, the type depend on `speaker` and `seed` only, so that changing the
    severity turns one dial.

    Raises:
        CorpusError: the severity is outside 0..1 or the type is unknown.
    """
    if not 0 <= severity <= 1:
        raise CorpusError(f"Severity {severity} of speaker {speaker!r} is outside 0..1.", "Use 0 (healthy) to 1.")
    rng = seeded("profile", seed, speaker)
    drawn: Kind = rng.choice(np.array(list(_KIND_SHARES)), p=list(_KIND_SHARES.values())).item()
    chosen = kind or drawn
    if chosen not in EMPHASIS:
        raise CorpusError(f"Dysarthria type {chosen!r} is unknown.", f"Use one of {', '.join(EMPHASIS)}.")
    varied = {
        name: value * rng.uniform(0.75, MOST_EMPHASIS) for name, value in dataclasses.asdict(EMPHASIS[chosen]).items()
    }
    return Profile(severity, chosen, Emphasis(**varied))


def band_of_severity(severity: float) -> Band:
    """UASpeech's band, with intelligibility read as 1 - severity: very_low to 25 %, low to 50, mid to 75, high."""
    intelligibility = 1 - severity
    if intelligibility <= 0.25:
        return "very_low"
    if intelligibility <= 0.5:
        return "low"
    return "mid" if intelligibility <= 0.75 else "high"


def spread_severities(speakers: Iterable[str], seed: int = 0) -> dict[str, float]:
    """Severities for speakers, spread as UASpeech's: evenly spaced ranks of its table, dealt out in a random order."""
    names = sorted(set(speakers))
    table = 1 - np.array(UASPEECH_INTELLIGIBILITY) / 100
    middle = (len(table) - 1) / 2
    places = np.linspace(0, len(table) - 1, len(names)) if len(names) != 1 else np.array([middle])
    ranks = np.rint(places).astype(int)
    order = seeded("spread", seed).permutation(len(names))
    return {names[place]: round(float(table[rank]), 2) for place, rank in zip(order, ranks, strict=True)}
