"""What a study shares, and what a second Ray worker is worth.

Sharing: one study of 14 folds against 14 studies of one fold each (the first `--singles` of them are run, and scaled).
Ray: the same study with 1 and with 2 workers of one machine, and with the local engine; the tables must be identical.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

from common import WORK, head
from xded.corpus.synthetic import make_embedded_corpus
from xded.report.study_tables import tables_of
from xded.study.engine import LocalWorkers, Workers
from xded.study.plan import Study, build
from xded.study.ray_workers import RayWorkers
from xded.study.run import Outcome, run_study

FOLDS = 14
QUICK = {"batch_size": 16, "threads": 1, "validate_every_epochs": 100, "checkpoint_every_epochs": 1000}


def study(corpus: Path, held_out: list[str], *, updates: int, seeds: int) -> Study:
    """Student and supervised baseline, from scratch and from the parent."""
    return build(
        {
            "name": "cost", "corpus": str(corpus), "held_out": held_out, "seeds": list(range(seeds)),
            "updates": updates,
            "config": {
                "model": {"size": "micro"},
                "train": {"stages": [{"epochs": 1, "peak_lr": 0.003}], **QUICK},
                "teach": {
                    "parent_on": "controls",
                    "parent": {"stages": [{"epochs": 10, "peak_lr": 0.003}], **QUICK},
                    "teacher": {"stages": [{"epochs": 10, "peak_lr": 0.001}], **QUICK},
                },
            },
            "attempts": {
                "supervised from scratch": {},
                "supervised from the parent": {"start": "parent"},
                "student": {"set": {"objective.ctc_kd": 1.0}},
                "student from the parent": {"set": {"objective.ctc_kd": 1.0}, "start": "parent"},
            },
        },
        "the benchmark",
    )  # fmt: skip


def fresh(name: str) -> Path:
    """An empty folder: nothing may be found finished."""
    folder = WORK / "study_cost" / name
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def seconds_of(outcome: Outcome) -> float:
    """What all pieces took together."""
    return sum(outcome.progress.seconds.values())


def timed(plan: Study, out: Path, workers: Workers) -> tuple[Outcome, float]:
    """A study and its wall-clock seconds."""
    begun = time.perf_counter()
    outcome = run_study(plan, out, workers=workers)
    assert outcome.complete, outcome.progress.errors
    return outcome, time.perf_counter() - begun


def rows_of(outcome: Outcome) -> list[tuple[str, ...]]:
    """The main table."""
    table = tables_of(outcome.study, outcome.results, outcome.corpus.texts, "open", outcome.work.words_heard).main
    return list(table.rows)


def sharing(corpus: Path, speakers: list[str], singles: int, jobs: int) -> list[str]:
    """14 folds together against one by one."""
    together, _ = timed(study(corpus, speakers, updates=60, seeds=1), fresh("together"), LocalWorkers(jobs))
    alone = [
        timed(study(corpus, [speaker], updates=60, seeds=1), fresh(f"alone_{speaker}"), LocalWorkers(jobs))[0]
        for speaker in speakers[:singles]
    ]
    single = sum(map(seconds_of, alone)) / len(alone)
    pieces = sum(len(outcome.work.steps) for outcome in alone) / len(alone)
    whole = seconds_of(together)
    return [
        f"\n{FOLDS} folds, 4 attempts of 60 updates, 1 seed, 4 control speakers; seconds: of all pieces together.\n",
        "| | pieces | seconds |", "| --- | ---: | ---: |",
        f"| one study of {FOLDS} folds | {len(together.work.steps)} | {whole:.0f} |",
        f"| {FOLDS} studies of one fold (measured: {singles}) | {FOLDS * pieces:.0f} | {FOLDS * single:.0f} |",
        f"| ratio | {len(together.work.steps) / (FOLDS * pieces):.2f} | {whole / (FOLDS * single):.2f} |",
    ]  # fmt: skip


def ray(corpus: Path, speakers: list[str], updates: int) -> list[str]:
    """One worker, two workers, and the local engine."""
    plan = study(corpus, speakers[:2], updates=updates, seeds=2)
    lines = [f"\n2 folds, 4 attempts of {updates} updates, 2 seeds; Ray on one machine.\n",
             "| workers | wall-clock s | times as fast | table |", "| --- | ---: | ---: | --- |"]  # fmt: skip
    first: tuple[float, list[tuple[str, ...]]] | None = None
    for name, slots in (("Ray, 1", 1), ("Ray, 2", 2), ("local, 2", 0)):
        workers = RayWorkers(None, slots) if slots else LocalWorkers(2)
        outcome, seconds = timed(plan, fresh(name.replace(", ", "_")), workers)
        first = first or (seconds, rows_of(outcome))
        same = "identical" if rows_of(outcome) == first[1] else "DIFFERENT"
        lines.append(f"| {name} | {seconds:.0f} | {first[0] / seconds:.2f} | {same} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--singles", type=int, default=2, help="studies of one fold that are really run")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--updates", type=int, default=120, help="of each attempt in the comparison of workers")
    parser.add_argument("--only", choices=("sharing", "ray"))
    given = parser.parse_args()
    folder = WORK / "study_cost" / "corpus"
    if not (folder / "manifest.jsonl").is_file():
        make_embedded_corpus(folder, controls=4, targets=FOLDS, words=6, takes=3, seed=0)
    speakers = [f"T{n:02d}" for n in range(1, FOLDS + 1)]
    lines = [head("what a study shares, and Ray", "study_cost")]
    if given.only != "ray":
        lines += sharing(folder, speakers, given.singles, given.jobs)
    if given.only != "sharing":
        lines += ray(folder, speakers, given.updates)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
