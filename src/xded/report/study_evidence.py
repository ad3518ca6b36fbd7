"""What a study's page shows besides scores, read from the pieces' folders: curves, attention, worst recordings, makers.

What cannot be read is named in words and left out; the rest of the page is made.
"""

from __future__ import annotations

import io
import json
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from rapidfuzz.distance import Levenshtein

from xded.audio import read_audio
from xded.config import FeatureConfig
from xded.corpus.manifest import Recording
from xded.doctor.inspection import Curves, Inspected, Teaching, curves_of, inspect_recording
from xded.doctor.run_folder import read_run
from xded.errors import XdedError
from xded.models.recogniser import load_recogniser
from xded.report.study_tables import StudyTables
from xded.scoring import Prediction, is_right
from xded.study.outcome import Result
from xded.study.pieces import DECODES
from xded.study.plan import DecodeName
from xded.study.run import Outcome
from xded.study.steps import Cell
from xded.tokenizer import normalise
from xded.training.data import features_of

MOST_WATCHED = 3  # attempts whose attention is shown
MOST_WORST = 5  # recordings
NOTHING = "(nothing)"


@dataclass(frozen=True)
class Learning:
    """Curves of an attempt's runs that have logged anything, one a fold and seed."""

    attempt: str
    cells: tuple[Cell, ...]
    curves: tuple[Curves, ...]


@dataclass(frozen=True)
class Bad:
    """A test recording that the attempts got wrong.

    Attributes:
        right, asked: predictions of all attempts and seeds (open).
        outputs: attempt -> decode mode -> output -> how often.
        features: [T, mels]; `audio`: FLAC at the study's sample rate, where it was asked for.
    """

    recording: Recording
    right: int
    asked: int
    outputs: Mapping[str, Mapping[DecodeName, Counter[str]]]
    features: np.ndarray
    audio: bytes | None


def learning_of(outcome: Outcome) -> list[Learning]:
    """Curves of every attempt in the file's order, runs in progress included."""
    found = []
    for attempt in outcome.study.attempts:
        pairs = []
        for cell in outcome.work.cells:
            if cell.attempt == attempt and (cell.run / "metrics.jsonl").is_file():
                run = read_run(cell.run)
                curves = curves_of(run.rows, run.config)
                if len(curves.update):
                    pairs.append((cell, curves))
        if pairs:
            found.append(Learning(attempt, tuple(c for c, _ in pairs), tuple(c for _, c in pairs)))
    return found


def best_first(tables: Sequence[StudyTables], attempts: Iterable[str]) -> list[str]:
    """Attempts by their WRA, by the mean of the decode modes; those without results are left out."""
    values: dict[str, list[float]] = defaultdict(list)
    for table in tables:
        for name in attempts:
            if name in table.scores:
                values[name].append(table.scores[name].overall.wra_percent.value)
    return sorted(values, key=lambda name: -float(np.mean(values[name])))


def watched(outcome: Outcome, best: Sequence[str], problems: list[str]) -> list[tuple[str, Inspected]]:
    """One test recording, heard by the first run of each of the best attempts.

    Args:
        best: attempts, the best first; problems: what could not be read is added to it.
    """
    runs = [(name, cell) for name in best[:MOST_WATCHED] if (cell := _first_done(outcome, name))]
    if not runs:
        return []
    tested = [{p.recording for p in _predictions(outcome, name, cell.held_out)} for name, cell in runs]
    common = set.intersection(*tested) or tested[0]
    # a long text has more steps to look at
    recording = max(
        (r for r in outcome.corpus.recordings if r.recording in common), key=lambda r: (len(r.text), r.recording)
    )
    found = []
    for name, cell in runs:
        try:
            recogniser = load_recogniser(cell.run / "best.pt")
            found.append((name, inspect_recording(recogniser, recording, Teaching({}))))
        except XdedError as error:
            problems.append(f"Attention of '{name}': {error}")
    return found


def _first_done(outcome: Outcome, attempt: str) -> Cell | None:
    cells = (c for c in outcome.work.cells if c.attempt == attempt and outcome.progress.states[c.key] == "done")
    return next(cells, None)


def _predictions(outcome: Outcome, attempt: str, held_out: tuple[str, ...]) -> list[Prediction]:
    return [p for r in _attempts(outcome) if (r.system, r.held_out) == (attempt, held_out) for p in r.of("open")]


def _attempts(outcome: Outcome) -> list[Result]:
    return [r for r in outcome.results if r.source == "attempt"]


def worst(outcome: Outcome, problems: list[str], *, audio: bool) -> list[Bad]:
    """The takes that the attempts recognise least often, then those whose outputs are farthest from the text.

    Args:
        problems: what could not be read is added to it; audio: also keep the sound.
    """
    base = outcome.study.base()
    normaliser = base.tokenizer.normaliser
    asked: dict[str, list[Prediction]] = defaultdict(list)
    for result in _attempts(outcome):
        for p in result.of("open"):
            asked[p.take].append(p)

    def badness(take: str) -> tuple[float, float, str]:
        rows = asked[take]
        far = [Levenshtein.distance(normalise(p.hypothesis, normaliser), normalise(p.reference, normaliser))
               / len(p.reference) for p in rows]  # fmt: skip
        return float(np.mean([is_right(p, normaliser) for p in rows])), -float(np.mean(far)), take

    takes = [take for share, _, take in sorted(map(badness, asked)) if share < 1][:MOST_WORST]
    known = {r.recording: r for r in outcome.corpus.recordings}
    found = []
    for take in takes:
        rows, recording = asked[take], known[asked[take][0].recording]
        try:
            features = features_of(recording.audio_filepath, base.features)
            sound = flac(recording.audio_filepath, base.features) if audio else None
        except XdedError as error:
            problems.append(f"Recording {recording.recording}: {error}")
            continue
        right = sum(is_right(p, normaliser) for p in rows)
        found.append(Bad(recording, right, len(rows), _outputs(outcome, take), features, sound))
    return found


def _outputs(outcome: Outcome, take: str) -> dict[str, dict[DecodeName, Counter[str]]]:
    """What every attempt wrote for a take, over folds and seeds."""
    found: dict[str, dict[DecodeName, Counter[str]]] = {}
    for result in _attempts(outcome):
        for decode in DECODES:
            said = Counter(p.hypothesis or NOTHING for p in result.of(decode) if p.take == take)
            if said:
                found.setdefault(result.system, {})[decode] = said
    return found


def flac(path: Path, features: FeatureConfig) -> bytes:
    """A recording as FLAC, mono, 16 bits, at the sample rate that the models hear."""
    buffer = io.BytesIO()
    waveform = read_audio(path, features.sample_rate)
    soundfile.write(buffer, waveform, features.sample_rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def environments(outcome: Outcome, problems: list[str]) -> tuple[list[tuple[str, str, int]], list[str]]:
    """Versions that the runs were made with, and the commands that made them.

    Returns:
        (what, version, runs) of every distinct pair; the commands, each once.
    """
    counts: Counter[tuple[str, str]] = Counter()
    commands: dict[str, None] = {}
    for step in outcome.work.steps:
        path = step.folder / "env.json"
        if not path.is_file():
            continue
        try:
            env: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            versions = {**env["packages"], "Python": env["python"], "platform": env["platform"]}
            commands[shlex.join(env["command"])] = None
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"{path} cannot be read: {error}")
            continue
        counts.update((what, str(version)) for what, version in versions.items())
    return [(what, version, runs) for (what, version), runs in sorted(counts.items())], list(commands)
