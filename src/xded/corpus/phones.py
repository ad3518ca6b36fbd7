"""What the formant synthesiser knows of English: phones as formant and noise targets, a small lexicon, error rules.

Phones are ARPAbet without stress marks. All frequencies are those of an adult male voice, in Hz; a voice scales them
by its vocal tract. Vowel formants are the men's means of Peterson & Barney (1952, table II), those of approximants,
nasals and noises follow the synthesis tables of Klatt (1980), rounded; diphthongs run between two vowel targets.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from xded.errors import CorpusError

Formants = tuple[float, float, float]  # F1, F2, F3 in Hz

# Peterson & Barney (1952); AX is the schwa of a uniform tube, not in their table.
VOWELS: Mapping[str, Formants] = {
    "IY": (270, 2290, 3010),
    "IH": (390, 1990, 2550),
    "EH": (530, 1840, 2480),
    "AE": (660, 1720, 2410),
    "AH": (640, 1190, 2390),
    "AA": (730, 1090, 2440),
    "AO": (570, 840, 2410),
    "UH": (440, 1020, 2240),
    "UW": (300, 870, 2240),
    "ER": (490, 1350, 1690),
    "AX": (500, 1450, 2450),
}

DIPHTHONGS: Mapping[str, tuple[Formants, Formants]] = {
    "EY": ((480, 2000, 2550), (330, 2250, 2900)),
    "AY": ((730, 1200, 2500), (360, 2100, 2700)),
    "OW": ((540, 1000, 2350), (380, 800, 2250)),
    "AW": ((730, 1250, 2450), (400, 900, 2300)),
    "OY": ((550, 850, 2400), (380, 2000, 2600)),
}

APPROXIMANTS: Mapping[str, Formants] = {
    "W": (300, 650, 2200),
    "Y": (280, 2250, 3000),
    "R": (320, 1080, 1400),
    "L": (360, 1050, 2800),
}

NASALS: Mapping[str, Formants] = {
    "M": (270, 950, 2200),
    "N": (270, 1700, 2600),
    "NG": (270, 2200, 2700),
}


@dataclass(frozen=True)
class Noise:
    """A fricative or the burst of a stop.

    `locus_hz` is where F2 of a neighbouring vowel points to at the closure and `locus_weight` how far it gets there
    (locus theory: Delattre, Liberman & Cooper 1955; locus equations: Sussman 1991).
    """

    locus_hz: float
    locus_weight: float
    centre_hz: float
    bandwidth_hz: float
    level_db: float
    voiced: bool


FRICATIVES: Mapping[str, Noise] = {
    "F": Noise(1100, 0.5, 4500, 3500, -22, False),
    "V": Noise(1100, 0.5, 4500, 3500, -27, True),
    "TH": Noise(1400, 0.5, 5500, 2500, -24, False),
    "DH": Noise(1400, 0.5, 5500, 2500, -29, True),
    "S": Noise(1750, 0.6, 5600, 1200, -6, False),
    "Z": Noise(1750, 0.6, 5600, 1200, -12, True),
    "SH": Noise(1900, 0.6, 3000, 1000, -6, False),
    "ZH": Noise(1900, 0.6, 3000, 1000, -12, True),
}

STOPS: Mapping[str, Noise] = {
    "P": Noise(900, 0.6, 900, 900, -16, False),
    "B": Noise(900, 0.6, 900, 900, -20, True),
    "T": Noise(1750, 0.6, 4300, 1500, -10, False),
    "D": Noise(1750, 0.6, 4300, 1500, -14, True),
    "K": Noise(2000, 0.5, 2100, 700, -10, False),
    "G": Noise(2000, 0.5, 2100, 700, -14, True),
}

AFFRICATES: Mapping[str, str] = {"CH": "T", "JH": "D"}  # the stop whose closure they share
ASPIRATE = "HH"

PHONES = frozenset({*VOWELS, *DIPHTHONGS, *APPROXIMANTS, *NASALS, *FRICATIVES, *STOPS, *AFFRICATES, ASPIRATE})

# Consonant errors of dysarthric speakers, as maps of phones. Voicing, manner (stopping), place and gliding errors and
# weak frication are the kinds that Rudzicz (2013) and Hernandez et al. (2019) count in TORGO and other corpora.
CONSONANT_RULES: Mapping[str, Mapping[str, str]] = {
    "voice": {"P": "B", "T": "D", "K": "G", "F": "V", "S": "Z", "TH": "DH"},
    "devoice": {"B": "P", "D": "T", "G": "K", "V": "F", "Z": "S"},
    "stop": {"S": "T", "F": "P", "TH": "T", "Z": "D", "V": "B", "SH": "T"},
    "front": {"K": "T", "G": "D", "SH": "S", "NG": "N", "CH": "T"},
    "back": {"T": "K", "D": "G", "S": "SH"},
    "glide": {"R": "W", "L": "W"},
    "weaken": {"S": "HH", "F": "HH", "SH": "HH", "TH": "HH", "K": "HH"},
    "nasalise": {"B": "M", "D": "N", "G": "NG"},
}
REDUCED_VOWELS = ("AX", "AH", "ER")  # what a severely reduced vowel may become

WordType = Literal["D", "C", "L", "CW"]

# Word types carry UASpeech's letters: digits, computer commands, the radio alphabet, common words.
_WORDS: Mapping[WordType, Mapping[str, str]] = {
    "D": {
        "zero": "Z IH R OW",
        "one": "W AH N",
        "two": "T UW",
        "three": "TH R IY",
        "four": "F AO R",
        "five": "F AY V",
        "six": "S IH K S",
        "seven": "S EH V AX N",
        "eight": "EY T",
        "nine": "N AY N",
    },
    "C": {
        "command": "K AX M AE N D",
        "line": "L AY N",
        "paste": "P EY S T",
        "sentence": "S EH N T AX N S",
        "delete": "D IH L IY T",
        "enter": "EH N T ER",
        "copy": "K AA P IY",
        "cut": "K AH T",
        "select": "S AX L EH K T",
        "backspace": "B AE K S P EY S",
        "escape": "IH S K EY P",
        "tab": "T AE B",
        "cursor": "K ER S ER",
        "paragraph": "P AE R AX G R AE F",
        "upward": "AH P W ER D",
        "downward": "D AW N W ER D",
        "left": "L EH F T",
        "right": "R AY T",
        "shift": "SH IH F T",
    },
    "L": {
        "alpha": "AE L F AX",
        "bravo": "B R AA V OW",
        "charlie": "CH AA R L IY",
        "delta": "D EH L T AX",
        "echo": "EH K OW",
        "golf": "G AA L F",
        "hotel": "HH OW T EH L",
        "india": "IH N D IY AX",
        "tango": "T AE NG G OW",
        "yankee": "Y AE NG K IY",
    },
    "CW": {
        "water": "W AO T ER",
        "people": "P IY P AX L",
        "they": "DH EY",
        "which": "W IH CH",
        "about": "AX B AW T",
        "could": "K UH D",
        "number": "N AH M B ER",
        "sound": "S AW N D",
        "just": "JH AH S T",
        "long": "L AO NG",
    },
}

LEXICON: Mapping[str, tuple[str, ...]] = {
    word: tuple(phones.split()) for words in _WORDS.values() for word, phones in words.items()
}
WORD_TYPES: Mapping[str, WordType] = {word: kind for kind, words in _WORDS.items() for word in words}

# The embedded corpus takes the first words of this list: digits first, so that ten words are the ten digits.
DEFAULT_WORDS: tuple[str, ...] = (
    *_WORDS["D"],
    *("command", "line", "paste", "sentence", "delete", "copy", "select", "backspace", "upward", "shift"),
    *("alpha", "bravo", "charlie", "hotel", "yankee"),
    *("water", "people", "about", "number", "just"),
)


def is_vowel(phone: str) -> bool:
    """Whether a phone is a vowel or a diphthong."""
    return phone in VOWELS or phone in DIPHTHONGS


def spell(word: str) -> tuple[str, ...]:
    """Phones of a word of the lexicon (any case).

    Raises:
        CorpusError: the lexicon does not hold the word.
    """
    phones = LEXICON.get(word.lower())
    if phones is None:
        near = difflib.get_close_matches(word.lower(), LEXICON, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise CorpusError(
            f"The synthesiser cannot say {word!r}: {hint}its lexicon holds {len(LEXICON)} words.",
            f"Use words of the lexicon: {', '.join(LEXICON)}.",
        )
    return phones
