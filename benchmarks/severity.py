"""How many words a recogniser trained on healthy voices still understands as the severity dial is turned.

    python benchmarks/severity.py >> benchmarks/RESULTS.md

Three sources: (a) the synthesiser's own dysarthria, in its articulation; (b) the simulator on the synthesiser's healthy
voices; (c) the simulator on real speakers of `asc16`, when that corpus is there. Writes docs/severity.svg.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from common import REAL, ROOT, WORK, head, make_voices, predictions_of, record, train_recogniser, wra_of
from xded.audio import read_audio
from xded.corpus.dysarthria import simulate
from xded.corpus.manifest import Recording
from xded.corpus.phones import DEFAULT_WORDS
from xded.corpus.severity import make_profile
from xded.corpus.vocoder import SAMPLE_RATE, seeded, write_flac
from xded.models.recogniser import Recogniser
from xded.scoring import Estimate

SEVERITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
WORDS = DEFAULT_WORDS[:30]
ASC16_TEST = ("07", "09", "11", "13", "15", "16")
OPEN, LISTED = "open, CTC greedy", "word list"
Rows = dict[str, dict[str, list[Estimate]]]  # source -> decoding -> WRA at each severity


def synthesised(folder: Path, severity: float, voices: int, words: Sequence[str]) -> list[Recording]:
    """Test voices say every word once, with dysarthria in their articulation."""
    return record(folder / f"{severity:g}", make_voices("T", voices, seed=1, severity=severity), words, 1)


def simulated(healthy: Sequence[Recording], folder: Path, severity: float) -> list[Recording]:
    """Recordings through the simulator: every speaker keeps type and emphasis, every take its randomness."""
    written = []
    for recording in healthy:
        waveform = read_audio(recording.audio_filepath)
        profile = make_profile(severity, speaker=recording.speaker)
        path = folder / f"{severity:g}" / f"{recording.recording}.flac"
        changed = simulate(waveform, profile, seeded("simulate", 0, recording.take))
        changes = {"audio_filepath": path, "duration": len(changed) / SAMPLE_RATE}
        written.append(recording.model_copy(update={**changes, "audio_sha256": write_flac(path, changed)}))
    return written


def synthetic_recogniser(folder: Path, voices: int, words: Sequence[str], updates: int) -> Recogniser:
    """Trained on healthy synthetic voices, none of them a test voice."""
    train = record(folder / "train", make_voices("H", voices, seed=0), words, 2)
    validation = record(folder / "validation", make_voices("V", 4, seed=0), words, 1)
    tested = [voice.name for voice in make_voices("T", voices, seed=1)]
    return train_recogniser(folder / "run", train, validation, tested, updates=updates)


def measure_synthetic(folder: Path) -> Rows:
    """Sources (a) and (b): 24 test voices x 30 words."""
    recogniser = synthetic_recogniser(folder, 40, WORDS, 1200)
    healthy = synthesised(folder / "healthy", 0.0, 24, WORDS)
    articulated = [synthesised(folder / "synthesiser", s, 24, WORDS) for s in SEVERITIES]
    degraded = [simulated(healthy, folder / "simulator", s) for s in SEVERITIES]
    return {
        "synthesiser's dysarthria": both_decodings(recogniser, articulated, WORDS),
        "simulator on synthetic voices": both_decodings(recogniser, degraded, WORDS),
    }


def asc16_recordings() -> list[Recording]:
    """All of asc16."""
    rows = [json.loads(line) for line in (REAL / "asc16" / "recordings.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        Recording.model_validate(
            {**row, "audio_filepath": REAL / "asc16" / row["audio_filepath"], "recording": row["take"]}
        )
        for row in rows
    ]


def measure_real(folder: Path) -> Rows:
    """Source (c): 6 real speakers x 40 words x 2 takes, by a recogniser trained on the 10 others as they are."""
    recordings = asc16_recordings()
    words = sorted({r.text for r in recordings})
    others = [r for r in recordings if r.speaker not in ASC16_TEST]
    train = [r for r in others if not r.take.endswith("_04")]
    validation = [r for r in others if r.take.endswith("_04")]
    recogniser = train_recogniser(folder / "run", train, validation, ASC16_TEST, updates=1500)
    healthy = [r for r in recordings if r.speaker in ASC16_TEST and r.take.endswith(("_01", "_02"))]
    degraded = [simulated(healthy, folder / "simulator", s) for s in SEVERITIES]
    return {"simulator on real voices": both_decodings(recogniser, degraded, words)}


def both_decodings(
    recogniser: Recogniser, tests: Sequence[Sequence[Recording]], words: Sequence[str]
) -> dict[str, list[Estimate]]:
    """WRA of each test, open and with the word list."""
    return {
        OPEN: [wra_of(predictions_of(recogniser, test)) for test in tests],
        LISTED: [wra_of(predictions_of(recogniser, test, words)) for test in tests],
    }


def plot(rows: Rows, path: Path) -> None:
    """One panel a decoding, one line a source; bars are 95 % intervals over takes."""
    matplotlib.rcParams.update({"svg.hashsalt": "severity", "font.size": 11})  # same numbers, same bytes
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
    styles = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"))
    for panel, decoding in zip(panels, (OPEN, LISTED), strict=True):
        panel.plot([0, 1], [100, 0], color="0.7", linestyle="--", label="100 x (1 - severity)")
        for place, ((source, by_decoding), (colour, marker)) in enumerate(zip(rows.items(), styles, strict=False)):
            values = by_decoding[decoding]
            below_above = [[e.value - (e.low or 0) for e in values], [(e.high or 0) - e.value for e in values]]
            shifted = [severity + 0.008 * (place - 1) for severity in SEVERITIES]  # so that bars do not hide each other
            panel.errorbar(
                shifted, [e.value for e in values], yerr=below_above, color=colour, marker=marker, markersize=5,
                capsize=3, linewidth=1.6, label=source,
            )  # fmt: skip
        panel.set(title=decoding, xlabel="severity", xticks=[0, 0.2, 0.4, 0.6, 0.8, 1.0], ylim=(-2, 103))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("WRA of unseen speakers, %")
    panels[0].legend(frameon=False, fontsize=10)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def table(rows: Rows) -> str:
    """A Markdown table: one row a source and decoding, one column a severity."""
    lines = ["| WRA, % | " + " | ".join(f"{s:g}" for s in SEVERITIES) + " |", "| --- |" + " --- |" * len(SEVERITIES)]
    for source, by_decoding in rows.items():
        for decoding, values in by_decoding.items():
            lines.append(f"| {source}, {decoding} | " + " | ".join(str(e) for e in values) + " |")
    return "\n".join(lines)


def main() -> None:
    begun_s = time.process_time()
    folder = WORK / "severity"
    rows = measure_synthetic(folder / "synthetic")
    if (REAL / "asc16").is_dir():
        rows |= measure_real(folder / "asc16")
    kept = {source: {d: [asdict(e) for e in values] for d, values in of.items()} for source, of in rows.items()}
    (folder / "severity.json").write_text(json.dumps(kept, indent=1), encoding="utf-8")
    (ROOT / "docs").mkdir(exist_ok=True)
    plot(rows, ROOT / "docs" / "severity.svg")
    print(head("WRA against severity", "severity"))
    print(
        "WRA of a 0.3 M recogniser trained on healthy voices only, test speakers unseen, with 95 % intervals over "
        "takes.\n"
    )
    print(table(rows))
    print(f"\nOne training seed a recogniser. Absolute: {time.process_time() - begun_s:.0f} CPU-seconds in all.")


if __name__ == "__main__":
    main()
