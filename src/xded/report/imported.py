"""Results made elsewhere: one table, reported beside recomputed, and what the doctor says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from xded.report.tables import Table
from xded.study.imported import Imported

NOT_STATED = "-"


def table_of(rows: Sequence[Imported]) -> Table:
    """One row a file."""
    lines = []
    for row in rows:
        reported = NOT_STATED if row.reported_percent is None else f"{row.reported_percent:.2f}"
        said = row.findings[0].check if row.findings else "nothing"
        speakers = "+".join(row.evaluation.speakers) or NOT_STATED
        takes = str(len(row.evaluation.takes))
        value = row.recomputed
        interval = "" if value.low is None else f" [{value.low:.0f}-{value.high:.0f}]"
        lines.append((row.name, speakers, reported, f"{value.value:.2f}{interval}", takes, said))
    caption = (
        "WRA in per cent. Reported: what the file says, by whatever rule. Recomputed: the whole output equals the "
        "prompt, from the stored token ids where a tokenizer was given; 95 % interval over takes (microphone copies of "
        "a take stay together)."
    )
    columns = ("attempt", "tested on", "reported", "recomputed", "takes", "doctor")
    return Table("Results made elsewhere", columns, tuple(lines), caption)


def to_dict(rows: Sequence[Imported], unread: Sequence[str]) -> dict[str, Any]:
    """JSON-able."""
    return {
        "results": [
            {
                "name": row.name, "file": str(row.evaluation.path), "speakers": row.evaluation.speakers,
                "reported_wra_percent": row.reported_percent, "recomputed_wra_percent": asdict(row.recomputed),
                "recomputed_from": row.how, "takes": len(row.evaluation.takes),
                "recordings": len(row.evaluation.items), "checkpoint": row.evaluation.checkpoint,
                "findings": [asdict(f) for f in row.findings],
            }
            for row in rows
        ],
        "unread": list(unread),
    }  # fmt: skip
