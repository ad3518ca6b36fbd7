"""Runs the cases and makes the tables."""

from __future__ import annotations

import argparse
import json
import shutil
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, WORK, head
from faults import (
    plant_data,
    plant_later,
    plant_probes,
    plant_results,
    plant_targets,
    plant_tokens,
    plant_training,
    variants,
)
from faults.workbench import CORPUS_SEED, FAULTS, HEALTHY, Case, Workbench, quietly
from xded.findings import CHECKS, Finding
from xded.parallel import run_all

# importing them registers their cases
PLANTERS = (plant_tokens, plant_data, plant_targets, plant_training, plant_results, plant_probes, plant_later, variants)
FOLDER = WORK / "faults"
WITHIN = 2  # a fault is found when it is the first or second finding
RESULTS = ROOT / "benchmarks" / "RESULTS.md"


@dataclass(frozen=True)
class Outcome:
    """What the doctor said of one case, worst first; `error` where it failed."""

    name: str
    findings: tuple[Finding, ...]
    error: str
    planting_s: float
    doctor_s: float

    @property
    def case(self) -> Case:
        """The case."""
        return {**FAULTS, **HEALTHY}[self.name]

    @property
    def rank(self) -> int | None:
        """Place of the first problem (a note is none) that names the cause, from 1."""
        names = [f.check for f in self.findings if f.severity != "note"]
        return next((place for place, name in enumerate(names, start=1) if name in self.case.expected), None)

    @property
    def found(self) -> bool:
        """Whether the fault is the first or second finding."""
        return self.rank is not None and self.rank <= WITHIN

    def count(self, severity: str) -> int:
        """Findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)


@dataclass(frozen=True)
class Order:
    """One case for a worker process. `again`: examine what an earlier call planted."""

    name: str
    folder: Path
    again: bool = False


def examine(case: Case, paths: Sequence[Path]) -> list[Finding]:
    """What `xded doctor PATHS` finds."""
    from xded.doctor.examine import examine_all

    with case.meanwhile():
        return examine_all(paths, probe=case.probe).findings


def run_case(order: Order) -> Outcome:
    """Plants a case and examines it."""
    case = {**FAULTS, **HEALTHY}[order.name]
    out = order.folder / "planted" / case.name.replace(" ", "_").replace("/", "_")
    planted = out / "planted.json"
    log = order.folder / "logs" / f"{out.name}.log"
    log.unlink(missing_ok=True)
    with quietly(log):
        begun_s = time.perf_counter()
        if order.again and planted.is_file():
            paths = [Path(path) for path in json.loads(planted.read_text(encoding="utf-8"))]
        else:
            shutil.rmtree(out, ignore_errors=True)
            paths = case.plant(Workbench(order.folder / "bench"), out)
            out.mkdir(parents=True, exist_ok=True)
            planted.write_text(json.dumps([str(path) for path in paths]), encoding="utf-8")
        planted_s = time.perf_counter()
        findings, error = [], ""
        try:
            findings = examine(case, paths)
        except Exception as failure:  # a doctor that fails on a fault has missed it
            error = f"{type(failure).__name__}: {failure}".splitlines()[0]
            traceback.print_exc()
    return Outcome(case.name, tuple(findings), error, planted_s - begun_s, time.perf_counter() - planted_s)


def said(finding: Finding | None) -> str:
    """A finding in a cell."""
    return f"{finding.check} ({finding.severity})" if finding else ""


def fault_table(outcomes: Sequence[Outcome]) -> str:
    """One row a fault, and the totals."""
    lines = [
        "| fault | family | expected | first finding | second finding | rank | doctor, s |",
        "| --- | --- | --- | --- | --- | ---: | ---: |",
    ]
    for outcome in outcomes:
        first, second, *_ = (*outcome.findings, None, None)
        rank = "missed" if outcome.rank is None else str(outcome.rank)
        cells = (
            outcome.name, str(outcome.case.family), " or ".join(sorted(outcome.case.expected)),
            outcome.error or said(first), said(second), rank, f"{outcome.doctor_s:.1f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    found = sum(outcome.found for outcome in outcomes)
    first_of_all = sum(outcome.rank == 1 for outcome in outcomes)
    families = list(dict.fromkeys(str(outcome.case.family) for outcome in outcomes))
    lines += [
        "",
        f"{found} of {len(outcomes)} faults named as the first or second finding ({100 * found / len(outcomes):.1f} %; "
        f"{first_of_all} as the first), notes not counted. "
        + "; ".join(f"{family}: {_of([o.found for o in outcomes if o.case.family == family])}" for family in families)
        + ".",
    ]
    later = [outcome.found for outcome in outcomes if outcome.case.plant.__module__ == plant_later.__name__]
    if later:
        lines[-1] += f" Of the faults that were written when the doctor was finished (`plant_later.py`): {_of(later)}."
    return "\n".join(lines)


def _of(right: Sequence[bool]) -> str:
    return f"{sum(right)} of {len(right)}"


def healthy_table(outcomes: Sequence[Outcome]) -> str:
    """One row a variant, and the totals."""
    lines = ["| healthy variant | refuse | warn | note | doctor, s |", "| --- | ---: | ---: | ---: | ---: |"]
    for outcome in outcomes:
        named = sorted({said(f) for f in outcome.findings if f.severity != "note"})
        counts = " | ".join(str(outcome.count(severity)) for severity in ("refuse", "warn", "note"))
        name = outcome.name + (f": {outcome.error or ', '.join(named)}" if named or outcome.error else "")
        lines.append(f"| {name} | {counts} | {outcome.doctor_s:.1f} |")
    refused = sum(outcome.count("refuse") > 0 for outcome in outcomes)
    warned = sum(outcome.count("warn") > 0 for outcome in outcomes)
    lines += [
        "",
        f"False alarms among {len(outcomes)} healthy variants: {refused} at refuse level, {warned} at warn level.",
    ]
    return "\n".join(lines)


def section(outcomes: Sequence[Outcome], wall_s: float) -> str:
    """The section of RESULTS.md."""
    faults = [outcome for outcome in outcomes if outcome.name in FAULTS]
    healthy = [outcome for outcome in outcomes if outcome.name in HEALTHY]
    text = head("planted faults and healthy variants, and what the doctor says of them", "faults").replace(
        "faults.py", "faults"
    )
    text += (
        f"\nEach fault is planted by itself in real artefacts of the embedded corpus (seed {CORPUS_SEED}: 2 control "
        "and 5 target speakers, 8 words, 3 takes, 3 microphones; runs of 90 to 200 updates, training seed 0 unless "
        "named); the code in `benchmarks/faults/plant_*.py` says how. Expected: the checks that name the cause. "
        f"{wall_s / 60:.1f} minutes in all (absolute).\n"
    )
    if faults:
        text += f"\n{fault_table(faults)}\n"
    if healthy:
        text += f"\n{healthy_table(healthy)}\n"
    return text


def run(names: Iterable[str], folder: Path, *, jobs: int = 1, again: bool = False) -> list[Outcome]:
    """Plants and examines the cases of these names."""
    if jobs > 1:
        Workbench(folder / "bench").make_all(jobs)
    return run_all(run_case, [Order(name, folder, again) for name in names], jobs)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python benchmarks/faults", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only cases whose names hold one of these words")
    parser.add_argument("--healthy", action="store_true", help="only the healthy variants")
    parser.add_argument("--faults", action="store_true", help="only the faults")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="examine what an earlier call planted")
    parser.add_argument("--write", action="store_true", help="append the tables to benchmarks/RESULTS.md")
    args = parser.parse_args()
    order = list(dict.fromkeys(check.family for check in CHECKS.values()))
    faults = sorted(FAULTS, key=lambda name: order.index(FAULTS[name].family or order[0]))
    names = [*([] if args.healthy else faults), *([] if args.faults else HEALTHY)]
    names = [name for name in names if not args.only or any(word in name for word in args.only)]
    begun_s = time.perf_counter()
    outcomes = run(names, FOLDER, jobs=args.jobs, again=args.again)
    text = section(outcomes, time.perf_counter() - begun_s)
    print(text)
    if args.write:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(text)
