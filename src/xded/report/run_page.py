"""One page about a run: findings, data, curves, inspected recordings, scores. It needs no other file and no script."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xded import __version__
from xded.doctor.inspection import Curves, Inspected, curves_of
from xded.doctor.run_folder import RunFolder
from xded.errors import ScoringError
from xded.findings import CHECKS, SEVERITIES
from xded.report.figures import PART_NAMES, Picture, run_pictures
from xded.report.pages import Grid, page
from xded.scoring import Scores
from xded.training.status import now, write_atomically

TEMPLATE = "run_page.html"
# keys of status.json in the order of the page; others are for machines
FACTS = (
    *("state", "message", "next", "data", "held_out", "teachers", "targets", "init", "tokenizer", "last_epoch"),
    *("started", "updated"),
)
CURVE_NAMES = {
    **PART_NAMES,
    "lr": "learning rate",
    "gradient_norm": "gradient norm before clipping",
    "val_loss": "validation loss",
    "wra": "WRA (share of 1)",
    "empty": "empty outputs (share of 1)",
    "distinct": "distinct outputs",
    "teacher_forced": "steps right given the true text (share of 1)",
}
FINDING_KEYS = ("check", "severity", "subject", "what", "effect", "remedy")


def write_page(
    path: Path,
    run: RunFolder,
    curves: Curves,
    run_pictures: Sequence[Picture],
    recordings: Sequence[tuple[Inspected, Sequence[Picture]]],
) -> None:
    """Writes or replaces the page, in one step.

    Args:
        path: of the page.
        run: what could be read of the run folder.
        curves: its metrics; run_pictures: drawn from them.
        recordings: what was inspected, each with its pictures.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render(run, curves, run_pictures, recordings))


def draw_run(run: RunFolder) -> tuple[Curves, list[Picture]]:
    """The run's metrics, and their pictures."""
    curves = curves_of(run.rows, run.config)
    weights = run.config.objective.model_dump() if run.config else {}
    clip = run.config.train.gradient_clip if run.config else None
    return curves, run_pictures(curves, weights, clip)


def render(
    run: RunFolder,
    curves: Curves,
    run_pictures: Sequence[Picture],
    recordings: Sequence[tuple[Inspected, Sequence[Picture]]],
) -> str:
    """The page as HTML; every text is escaped."""
    status = run.status or {}
    findings, findings_problem = _findings(run.path)
    scores, scores_problem = _scores(run)
    return page(
        TEMPLATE,
        name=status.get("name", run.path.name),
        state=run.state,
        path=run.path,
        problems=[*run.problems, *filter(None, (findings_problem, scores_problem))],
        findings=findings,
        facts=_facts(status),
        data=_data_card(run.data),
        run_pictures=run_pictures,
        curves=_curve_grids(curves),
        recordings=[(heard, pictures, _recording_grids(heard)) for heard, pictures in recordings],
        scores=scores,
        written=now(),
        version=__version__,
    )


def _findings(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    """Findings that are kept in the run (none without a file) and how many; else why they cannot be shown."""
    path = folder / "findings.json"
    if not path.is_file():
        return None, None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return None, f"findings.json cannot be read: {error}"
    passed = len(found.get("passed", [])) if isinstance(found, Mapping) else 0
    if isinstance(found, Mapping):
        found = found.get("findings")
    if not isinstance(found, list) or not all(
        isinstance(f, Mapping) and f.get("severity") in SEVERITIES for f in found
    ):
        return None, "findings.json holds no findings"
    rows = [{key: str(finding.get(key, "")) for key in FINDING_KEYS} for finding in found]
    for row in rows:
        row["title"] = CHECKS[row["check"]].title if row["check"] in CHECKS else row["check"]
    counts = f"{len(rows) or 'No'} finding{'' if len(rows) == 1 else 's'} kept in the run, {passed} checks passed."
    return {"rows": rows, "counts": counts}, None


def _facts(status: Mapping[str, Any]) -> Grid | None:
    """The status in words."""
    rows = [(key.replace("_", " "), str(status[key])) for key in FACTS if status.get(key)]
    tables = {"parameters": status.get("parameters")}
    tables |= {f"stage {number}": stage for number, stage in enumerate(status.get("stages") or [], start=1)}
    for name, table in tables.items():
        if isinstance(table, Mapping):
            rows.append((name, ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in table.items())))
    return Grid("The run", ("fact", "value"), tuple(rows)) if rows else None


def _data_card(data: Mapping[str, Any] | None) -> list[Grid]:
    """Whose recordings were meant and whose were opened, for each side of the split."""
    grids = []
    for side in ("train", "validation"):
        card = (data or {}).get(side)
        if not isinstance(card, Mapping) or not all(isinstance(card.get(key), Mapping) for key in ("meant", "heard")):
            continue
        meant, heard = card["meant"], card["heard"]
        counts = [(s, str(meant.get(s, 0)), str(heard.get(s, 0))) for s in sorted({*meant, *heard})]
        counts.append(("all", str(sum(meant.values())), str(sum(heard.values()))))
        extra = f"{card.get('files', '?')} distinct audio files, {card.get('strangers', '?')} of nobody in the corpus"
        grids.append(Grid(f"Recordings for {side}: {extra}", ("speaker", "meant", "opened"), tuple(counts)))
    takes = (data or {}).get("takes")
    if isinstance(takes, Mapping):
        rows = [(side, str(len(listed))) for side, listed in takes.items()]
        grids.append(Grid("Takes", ("side", "takes"), tuple(rows)))
    return grids


def _curve_grids(curves: Curves) -> list[Grid]:
    """First, last and extreme values of all curves, for those who cannot see them."""
    numbers = curves.numbers()
    gradients = numbers.pop("gradients")
    grids = []
    for caption, named in (
        ("Curves", {key: value for key, value in numbers.items() if isinstance(value, Mapping)}),
        ("Gradient norms by layer (L2)", gradients),
    ):
        rows = [
            (CURVE_NAMES.get(name, name), *(f"{value[key]:.4g}" for key in ("first", "last", "least", "most")))
            for name, value in named.items()
            if value is not None
        ]
        if rows:
            grids.append(Grid(caption, ("curve", "first", "last", "least", "most"), tuple(rows)))
    return grids


def _recording_grids(heard: Inspected) -> list[Grid]:
    """Numbers of the pictures of one recording."""
    attention = [
        (
            f"{a['what']}, layer {number}",
            f"{layer['from_s']:.2f}",
            f"{layer['to_s']:.2f}",
            f"{layer['steps_forward']} of {layer['steps']}",
        )
        for a in (attention.numbers() for attention in heard.attention)
        for number, layer in enumerate(a["layers"], start=1)
    ]
    ctc = [
        (
            f"{c['who']} (T = {c['temperature']:g})",
            c["reads"] or "(nothing)",
            f"{c['blank']:.2f}",
            " ".join(f"{spike['piece']} {spike['time_s']:.2f}" for spike in c["spikes"]),
        )
        for c in (posterior.numbers() for posterior in heard.ctc)
    ]
    return [
        Grid(
            "Mean time that the decoder looks at",
            ("text, layer", "first step (s)", "last step (s)", "steps that look later than the one before"),
            tuple(attention),
        ),
        Grid("CTC", ("head", "reads", "mean blank", "spikes (s)"), tuple(ctc)),
    ]


def _scores(run: RunFolder) -> tuple[tuple[str, Grid] | None, str | None]:
    """The statement and the table of scores.json, and why they cannot be shown."""
    path = run.path / "scores.json"
    if run.scores is None:
        return None, None
    try:
        scores = Scores.from_json(path.read_text(encoding="utf-8"), path.name)
    except ScoringError as error:
        return None, error.problem
    rows = [
        (name, str(s.takes), str(s.wra_percent), str(s.cer_percent), str(s.empty_percent), str(s.distinct_outputs))
        for name, s in {"all": scores.overall, **scores.by_speaker}.items()
    ]
    columns = ("speaker", "takes", "WRA % [95 %]", "CER % [95 %]", "empty % [95 %]", "distinct outputs")
    return (scores.statement, Grid("Scores", columns, tuple(rows))), None
