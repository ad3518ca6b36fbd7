"""Labels: whose file it is and which word it holds, as names, prompts and other recordings say; audio twice."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from xded.checks.data import NAMES_SHOWN, SLIP_SHARE, Named, few, severity_of
from xded.corpus.fsdd import DIGITS
from xded.corpus.manifest import Recording
from xded.corpus.uaspeech import NAME
from xded.findings import Finding, Severity

# a part of the file names that names the speaker (or the word) in this share of the recordings names it in all
NAMING = 0.8
# ... and is taken for one at all when its values are speakers (or words) of the corpus in this share
KNOWN = 0.95
# more files of others than this are no slip of a hand: the look-up is wrong
MISFILED_SHARE = 0.01
# prompts that most takes call by one text have that text
MAJORITY = 0.6
Words = Mapping[str, str]


def _parts(row: Recording) -> dict[str, str]:
    """Parts of a file's path that may name a speaker or a word."""
    *_, above, folder, name = "", "", *row.audio_filepath.as_posix().split("/")
    parts = {f"part {place}": part for place, part in enumerate(re.split(r"[_\-. ]", name.rpartition(".")[0]))}
    return parts | {"folder": folder, "folder above": above}


def named_otherwise(
    rows: Sequence[Recording], own: Callable[[Recording], str], extra: Callable[[Recording], Words] = lambda row: {}
) -> list[tuple[Recording, str]]:
    """Recordings whose file name says another speaker (or word) than their line does, and which.

    Which part of the names to read is learned from the corpus: the one that agrees with the lines. Where none agrees
    but one always holds a speaker (or word) of the corpus, spelled with letters, all lines are wrong.

    Args:
        own: what the line says; extra: further parts than the file name's.
    """
    mine = [own(row).casefold() for row in rows]
    known = {folded: own(row) for folded, row in zip(mine, rows, strict=True)}
    if len(known) < 2:
        return []
    values: dict[str, list[str | None]] = defaultdict(lambda: [None] * len(rows))
    for place, row in enumerate(rows):
        for slot, value in {**_parts(row), **extra(row)}.items():
            values[slot][place] = value.casefold()
    naming: list[tuple[float, str]] = []
    for slot, said in values.items():
        if sum(value in known for value in said) >= KNOWN * len(rows):
            naming.append((sum(a == b for a, b in zip(said, mine, strict=True)) / len(rows), slot))
    agreement, slot = max(naming, default=(0.0, ""))
    if not slot or (agreement < NAMING and not _telling(values[slot], known)):
        return []
    return [(row, known[said]) for row, said, right in zip(rows, values[slot], mine, strict=True)
            if said is not None and said in known and said != right]  # fmt: skip


def _telling(said: Sequence[str | None], known: Collection[str]) -> bool:
    """Whether values can be nothing but speakers or words: there are several to choose from, and none is a number."""
    return len(known) >= 3 and all(re.search(r"[^\W\d]", value) for value in said if value)


def wrong_files(rows: Sequence[Recording], subject: str) -> list[Finding]:
    """Recordings that point to another speaker's audio: by the names of the files, and by files that several share."""
    return _misnamed(rows, subject) or _shared_between_speakers(rows, subject)


def _misnamed(rows: Sequence[Recording], subject: str) -> list[Finding]:
    wrong = named_otherwise(rows, lambda row: row.speaker)
    if not wrong:
        return []
    owners = Counter(said for _, said in wrong)
    most, count = owners.most_common(1)[0]
    lines = [row for row, _ in wrong]
    whole = _whole_speakers(lines, rows)
    lost = f"; nothing of {few(whole)} is left" if whole else ""
    first = f"'{lines[0].recording}' of {lines[0].speaker} is {lines[0].audio_filepath.name}"
    return [_wrong_audio(
        severity_of(lines, rows, MISFILED_SHARE), subject,
        f"{len(wrong):,} of {len(rows):,} recordings point to a file that is another speaker's by its name, most often "
        f"{most}'s ({count:,}){lost}; {first}.",
        100 * len(wrong) / len(rows),
        {"wrong": len(wrong), "of": len(rows), "heard": dict(owners.most_common()), "unheard": whole},
    )]  # fmt: skip


def _shared_between_speakers(rows: Sequence[Recording], subject: str) -> list[Finding]:
    crossed = [row for group in _of_many(same_audio(rows)) for row in group]
    if not _systematic(crossed, rows):
        return []
    speakers = sorted({row.speaker for row in crossed})
    files = len({row.audio_sha256 or str(row.audio_filepath) for row in crossed})
    return [_wrong_audio(
        "refuse", subject,
        f"{len(crossed):,} recordings of {len(speakers)} speakers ({few(speakers)}) are {files:,} pieces of audio: "
        "speakers share each other's.",
        100 * (len(crossed) - files) / len(rows),
        {"recordings": len(crossed), "files": files, "speakers": speakers},
    )]  # fmt: skip


def _whole_speakers(wrong: Sequence[Named], everything: Sequence[Named]) -> list[str]:
    """Speakers of whom every recording is wrong."""
    mine, all_ = Counter(r.speaker for r in wrong), Counter(r.speaker for r in everything)
    return sorted(who for who, count in mine.items() if count == all_[who])


def _wrong_audio(severity: Severity, subject: str, what: str, points: float, evidence: Mapping[str, object]) -> Finding:
    return Finding(
        "wrong-audio", severity, subject, what,
        "Speakers who are meant are not heard, others are heard in their place: folds and unheard speakers are void.",
        "Look at audio_filepath in the manifest beside 'speaker', and import the corpus again ('xded corpus import').",
        evidence, points,
    )  # fmt: skip


def of_others(speaker: str, rows: Sequence[Named], subject: str) -> list[Finding]:
    """Recordings in a list of one speaker that are somebody else's by their ids."""
    owners = Counter(row.speaker for row in rows if row.speaker != speaker)
    if not owners:
        return []
    wrong = owners.total()
    return [_wrong_audio(
        "refuse" if wrong >= MISFILED_SHARE * len(rows) else "warn", subject,
        f"The list is {speaker}'s, and {wrong:,} of its {len(rows):,} recordings are of {few(sorted(owners))}.",
        100 * wrong / len(rows), {"speaker": speaker, "wrong": wrong, "of": len(rows), "heard": dict(owners)},
    )]  # fmt: skip


def ids_twice(rows: Sequence[Named], subject: str) -> list[Finding]:
    """Recordings that a list names more than once."""
    again = [name for name, count in Counter(row.recording for row in rows).items() if count > 1]
    if not again:
        return []
    return [Finding(
        "duplicates", "warn", subject, f"{len(again):,} recordings are listed more than once: {few(again)}.",
        "What belongs to which line is uncertain, and copies count twice.",
        "Make the list and the posteriors again together.", {"recordings": len(again)},
    )]  # fmt: skip


def same_audio(rows: Iterable[Recording]) -> list[list[Recording]]:
    """Groups of recordings that share a file, or a file's bytes as far as their SHA-256 is known.

    A recording that is there twice (on two sides of a split) is no copy of itself.
    """
    by_path: dict[str, dict[str, Recording]] = defaultdict(dict)
    for row in rows:
        by_path[str(row.audio_filepath)][row.recording] = row
    by_bytes: dict[str, list[Recording]] = defaultdict(list)
    for path, group in by_path.items():
        first = next(iter(group.values()))
        by_bytes[first.audio_sha256 or path] += group.values()
    return [group for group in by_bytes.values() if len(group) > 1]


def _of_many(groups: Sequence[list[Recording]]) -> list[list[Recording]]:
    """Audio of three or more speakers; what two share may be one speaker under a second name."""
    return [group for group in groups if len({row.speaker for row in group}) > 2]


def takes_of_same_bytes(rows: Iterable[Recording]) -> dict[str, str]:
    """Takes whose audio is that of another take: id -> a name that they share."""
    return {row.take: f"the audio of {group[0].take}" for group in same_audio(rows) for row in group
            if len({other.take for other in group}) > 1}  # fmt: skip


def _systematic(crossed: Sequence[Recording], rows: Sequence[Recording]) -> bool:
    """Whether shared audio is a fault of the look-up rather than a file copied twice."""
    return bool(crossed) and severity_of(crossed, rows) == "refuse"


def duplicates(rows: Sequence[Recording], subject: str) -> list[Finding]:
    """Audio under two ids. Audio that speakers share wholesale is the business of `wrong_files`."""
    groups = same_audio(rows)
    crossed = _of_many(groups)
    if _systematic([row for group in crossed for row in group], rows):
        groups = [group for group in groups if group not in crossed]
    if not groups:
        return []
    whole = _whole_speakers([row for group in groups if len({r.speaker for r in group}) > 1 for row in group], rows)
    disagree = [g for g in groups if len({(r.speaker, r.text) for r in g}) > 1]
    copies = sum(len(group) - 1 for group in groups)
    worst = (disagree or groups)[0]
    said = f"; {len(disagree)} of them under different speakers or texts" if disagree else ""
    said += (
        f"; all of {' and '.join(whole)}: one person under two names, or one's files in the other's place"
        if whole
        else ""
    )
    several = {str(row.audio_filepath) for row in worst}
    how = "have the same bytes" if len(several) > 1 else "are one file"
    return [Finding(
        "duplicates", "refuse" if len(disagree) >= SLIP_SHARE * len(rows) or len(several) == 1 else "warn", subject,
        f"{copies:,} of {len(rows):,} recordings are copies of others{said}: "
        f"{' and '.join(row.recording for row in worst[:2])} {how}.",
        "Copies under ids of their own fall on both sides of a split and count as independent takes"
        + ("; one of two texts or speakers is wrong." if disagree else "."),
        "Keep one line of each in the manifest; 'xded corpus check CORPUS' names them all.",
        {"copies": copies, "of": len(rows), "disagreeing": len(disagree),
         "examples": [[row.recording for row in group[:3]] for group in groups[:NAMES_SHOWN]]},
        100 * copies / len(rows),
    )]  # fmt: skip


def _same(text: str) -> str:
    """A text without case, spaces and punctuation: X-ray and XRAY are no two labels."""
    return re.sub(r"[\W_]+", "", text.casefold())


def labels(rows: Sequence[Named], subject: str) -> list[Finding]:
    """Texts that their prompt has not elsewhere, that UASpeech's codes forbid, or that another prompt has."""
    right = _usual_texts(rows)
    wrong = [(row, want) for row in rows if (want := right.get((row.speaker, row.prompt))) and want != _same(row.text)]
    coded = [(row, want) for row in rows if (want := _coded(row)) and not _same(row.text).startswith(want)]
    if not wrong and not coded:
        return []
    found, why = (wrong, "their prompt has elsewhere") if len(wrong) >= len(coded) else (coded, "their code says")
    lines = [row for row, _ in found]
    row, want = found[0]
    shift = _shift(rows, {row.recording: want for row, want in found})
    return [_labels(
        lines, rows, subject,
        f"have another text than {why}: '{row.recording}' is '{row.text}' instead of '{want}'{shift}.",
    )]  # fmt: skip


def _usual_texts(rows: Sequence[Named]) -> dict[tuple[str, str], str]:
    """The text of (speaker, prompt), where takes agree on one: everybody's, or else the speaker's own.

    Prompts that are numbered anew for every speaker have no text of their own.
    """
    takes: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
    for row in rows:
        takes[row.prompt][f"{row.take} {row.text}"] = row.speaker, _same(row.text)
    usual: dict[tuple[str, str], str] = {}
    for prompt, said in takes.items():
        texts = Counter(text for _, text in said.values())
        top, count = texts.most_common(1)[0]
        everybodys = count >= MAJORITY * texts.total()
        for speaker in {who for who, _ in said.values()}:
            own = Counter(text for who, text in said.values() if who == speaker)
            usual[speaker, prompt] = top if everybodys else own.most_common(1)[0][0]
    return usual


def _coded(row: Named) -> str:
    """How the text of a UASpeech code has to start: D7 is SEVEN, LK (KILO) starts with K."""
    if not NAME.fullmatch(row.recording):
        return ""
    digit = re.fullmatch(r"D(\d)", row.prompt)
    return DIGITS[int(digit[1])].casefold() if digit else row.prompt[1].casefold() if row.prompt[0] == "L" else ""


def _shift(rows: Sequence[Named], wanted: Mapping[str, str]) -> str:
    """Whether wrong texts are right for the line before or after."""
    places = [place for place, row in enumerate(rows) if row.recording in wanted]
    for step, which in ((1, "next"), (-1, "previous")):
        hits = [
            _same(rows[place + step].text).startswith(wanted[rows[place].recording])
            for place in places if 0 <= place + step < len(rows)
        ]  # fmt: skip
        if len(hits) > 2 and sum(hits) >= NAMING * len(hits):
            return f"; the right texts stand in the {which} line: they are shifted by one"
    return ""


def misnamed_words(rows: Sequence[Recording], subject: str) -> list[Finding]:
    """Files whose name, or prompt, is a word of the corpus, but another one than their text (or prompt)."""

    def prompt(row: Recording) -> Words:
        return {"prompt": row.prompt}

    by_text = named_otherwise(rows, lambda row: row.text, prompt)
    by_prompt = named_otherwise(rows, lambda row: row.prompt)
    found, what = max((by_text, "text"), (by_prompt, "prompt"), key=lambda pair: len(pair[0]))
    if not found:
        return []
    row, said = found[0]
    own = row.text if what == "text" else row.prompt
    return [_labels(
        [line for line, _ in found], rows, subject,
        f"are named after another word than their {what}: '{row.recording}' ({row.audio_filepath.name}) has the "
        f"{what} '{own}' and is named '{said}'.",
    )]  # fmt: skip


def _labels(wrong: Sequence[Named], rows: Sequence[Named], subject: str, what: str) -> Finding:
    share = len(wrong) / len(rows)
    speakers = Counter(row.speaker for row in wrong)
    return Finding(
        "labels", severity_of(wrong, rows), subject,
        f"{len(wrong):,} of {len(rows):,} recordings ({few(sorted(speakers))}) {what}",
        f"{share:.0%} of what is learned and scored is wrong: no recogniser can be right there.",
        "Write the texts again from the word list (a sort that moves one column is the usual cause), then "
        "'xded corpus import'.",
        {"wrong": len(wrong), "of": len(rows), "speakers": dict(speakers),
         "examples": [row.recording for row in wrong[:NAMES_SHOWN]]}, 100 * share,
    )  # fmt: skip
