"""What a corpus holds and what it lacks: the numbers as a plain dictionary, and the same as tables."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from xded.corpus.folds import Key, key_of
from xded.corpus.manifest import BANDS, Corpus, Recording
from xded.errors import few

MIN_RUN = 5  # recordings missing one after another in the file list that are named as a run
NAMES_SHOWN = 8
COLUMNS = ("speaker", "role", "band", "takes", "recordings", "prompts", "hours", "Hz", "mics", "missing")


def describe(corpus: Corpus) -> dict[str, Any]:
    """Who, role, band, takes, recordings, prompts, hours, sample rates, microphones, and what is missing.

    A recording counts as missing when most speakers have one of that block, prompt and microphone (the median number
    over all speakers) and this one has fewer. Values are JSON-able.
    """
    recordings = corpus.recordings
    counts = {speaker: Counter(key_of(r) for r in corpus.select([speaker])) for speaker in corpus.speakers}
    expected = _expected(list(counts.values()))
    return {
        "path": str(corpus.path),
        **_totals(recordings),
        "texts": len(corpus.texts),
        "roles": dict(Counter(corpus.role_of(speaker) for speaker in corpus.speakers)),
        "bands": {
            band: names for band in BANDS if (names := [s for s in corpus.speakers if corpus.band_of(s) == band])
        },
        "speakers": [
            {
                "speaker": speaker,
                "role": corpus.role_of(speaker),
                "band": corpus.band_of(speaker),
                **_totals(corpus.select([speaker])),
                "missing": _missing(counts[speaker], expected),
            }
            for speaker in corpus.speakers
        ],
    }


def _totals(recordings: Sequence[Recording]) -> dict[str, Any]:
    """Counts of one speaker's, or all, recordings."""
    seconds = [recording.duration for recording in recordings]
    return {
        "takes": len({recording.take for recording in recordings}),
        "recordings": len(recordings),
        "prompts": len({recording.prompt for recording in recordings}),
        "hours": round(sum(seconds) / 3600, 4),
        "mean_duration_s": round(sum(seconds) / len(seconds), 3),
        "sample_rates": {str(rate): count for rate, count in Counter(r.sample_rate for r in recordings).items()},
        "mics": sorted({recording.mic for recording in recordings if recording.mic}),
        "blocks": sorted({recording.block for recording in recordings if recording.block}),
    }


def _expected(counts: Sequence[Counter[Key]]) -> Counter[Key]:
    """How many recordings of each key most speakers have: the lower median over all speakers."""
    keys = {key for count in counts for key in count}
    return Counter({key: number for key in keys if (number := statistics.median_low([c[key] for c in counts]))})


def _missing(own: Counter[Key], expected: Counter[Key]) -> dict[str, Any]:
    """What one speaker lacks: whole microphones first, then whole prompts, then single recordings, and runs."""
    mics = sorted({mic for _, _, mic in expected})
    absent = [mic for mic in mics if mic and not any(own[key] for key in expected if key[2] == mic)]
    rest = {key: number for key, number in expected.items() if key[2] not in absent}
    lacking = {key: number - own[key] for key, number in rest.items() if own[key] < number}
    prompts = {key[:2] for key in rest}
    whole = {prompt for prompt in prompts if not any(own[key] for key in rest if key[:2] == prompt)}
    single = [key for key in lacking if key[:2] not in whole]
    return {
        "recordings": sum((expected - own).values()),
        "of": sum(expected.values()),
        "mics": absent,
        "prompts": sorted(name_of((*prompt, "")) for prompt in whole),
        "single": {name_of(key): lacking[key] for key in sorted(single, key=name_of)},
        "runs": _runs({key for key in rest if not own[key]}, rest),
    }


def _runs(missing: set[Key], expected: Sequence[Key] | dict[Key, int]) -> list[dict[str, Any]]:
    """Stretches of a block's alphabetical file list that are missing: the mark of a copy that was cut short."""
    runs = []
    for block in sorted({key[0] for key in expected}):
        files = sorted((key for key in expected if key[0] == block), key=name_of)
        start = 0
        for end in range(len(files) + 1):
            if end < len(files) and files[end] in missing:
                continue
            if end - start >= MIN_RUN and end - start < len(files):
                place = "head" if start == 0 else "tail" if end == len(files) else "middle"
                runs.append({"block": block, "place": place, "first": name_of(files[start]),
                             "last": name_of(files[end - 1]), "recordings": end - start})  # fmt: skip
            start = end + 1
    return runs


def name_of(key: Key) -> str:
    """The key as file names have it: B3_CW10_M2, B3_UW7_M2 (whose prompt already holds the block)."""
    block, prompt, mic = key
    return "_".join(part for part in (block, prompt.removeprefix(f"{block}_"), mic) if part)


def render(description: dict[str, Any]) -> RenderableType:
    """The dictionary of `describe` as a table of speakers and a few lines."""
    table = Table(box=None, padding=(0, 1, 0, 0), title=description["path"], title_justify="left")
    unknown = {name for name, values in (("band", "bands"), ("mics", "mics")) if not description[values]}
    columns = [name for name in COLUMNS if name not in unknown]
    for name in columns:
        table.add_column(name, justify="left" if name in ("speaker", "role", "band") else "right", no_wrap=True)
    for row in description["speakers"]:
        cells = {
            **{name: f"{row[name]:,}" for name in ("takes", "recordings", "prompts")},
            "speaker": row["speaker"],
            "role": row["role"],
            "band": row["band"] or "-",
            "hours": f"{row['hours']:.2f}",
            "Hz": " ".join(row["sample_rates"]),
            "mics": str(len(row["mics"])),
            "missing": f"{row['missing']['recordings']:,}",
        }
        table.add_row(*(cells[name] for name in columns))
    roles = ", ".join(f"{count} {role}" for role, count in sorted(description["roles"].items()))
    lines = [
        f"{len(description['speakers'])} speakers ({roles}), {description['takes']:,} takes in "
        f"{description['recordings']:,} recordings of {description['prompts']:,} prompts ({description['texts']:,} "
        f"texts), {description['hours']:.2f} h.",
        *(f"Band {band}: {' '.join(names)}" for band, names in description["bands"].items()),
        *(line for row in description["speakers"] for line in _missing_lines(row)),
    ]
    return Group(table, *lines)


def _missing_lines(row: dict[str, Any]) -> list[str]:
    """What one speaker lacks of what most speakers have, in words."""
    missing = row["missing"]
    if not missing["recordings"]:
        return []
    parts = [f"microphones {' '.join(missing['mics'])}"] if missing["mics"] else []
    for kind, names in (("prompts", missing["prompts"]), ("recordings", list(missing["single"]))):
        if names:
            parts.append(f"{len(names)} {kind if len(names) > 1 else kind[:-1]} ({few(names, NAMES_SHOWN)})")
    lines = [f"{row['speaker']} lacks {missing['recordings']:,} of {missing['of']:,} recordings: {'; '.join(parts)}."]
    for run in missing["runs"]:
        lines.append(
            f"  {run['recordings']} of them in one run, {run['first']} to {run['last']} (the {run['place']} of the "
            "alphabetical file list): a copy cut short, or files that could not be read?"
        )
    return lines
