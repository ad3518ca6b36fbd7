"""An examination as text: findings worst first, then what passed and what could not be checked."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

from xded.findings import CHECKS, Examination, Finding

WIDTH = 100
EVIDENCE_SHOWN = 8  # entries; --json has all
LONGEST_VALUE = 60  # characters


def render(examination: Examination, *, passed: bool = False) -> str:
    """The text of `xded doctor`.

    Args:
        passed: also list every check that found nothing.
    """
    width = min(WIDTH, shutil.get_terminal_size().columns)
    findings = examination.findings
    parts = [_headline(examination), ""]
    for number, finding in enumerate(findings, start=1):
        parts += [_one(number, finding, width), ""]
    if examination.unchecked:
        parts.append("Could not be checked:")
        parts += [_wrap(f"{u.what}: {u.why}", "  - ", width) for u in examination.unchecked] + [""]
    if passed and examination.passed:
        parts.append("Passed:")
        for p in examination.passed:
            detail = f" ({p.detail})" if p.detail else ""
            parts.append(_wrap(f"{CHECKS[p.check].title}{detail}, {p.subject} [{p.check}]", "  - ", width))
        parts.append("")
    return "\n".join(parts)


def _headline(examination: Examination) -> str:
    counts = {s: sum(f.severity == s for f in examination.findings) for s in ("refuse", "warn", "note")}
    problems = counts["refuse"] + counts["warn"]
    verdict = "No problem found" if problems == 0 else f"{problems} problem{'s' if problems > 1 else ''} found"
    notes = f", {counts['note']} note{'s' if counts['note'] > 1 else ''}" if counts["note"] else ""
    return (
        f"{verdict}{notes}; {len(examination.passed)} checks passed, "
        f"{len(examination.unchecked)} things could not be checked."
    )


def _one(number: int, finding: Finding, width: int) -> str:
    lines = [f"{number}. {finding.severity.upper()} {finding.check}: {finding.subject}", finding.what]
    if finding.evidence:
        lines.append(f"Evidence: {_evidence(finding.evidence)}")
    lines += [f"Effect: {finding.effect}", f"Do: {finding.remedy}"]
    return "\n".join(_wrap(line, "" if place == 0 else "   ", width) for place, line in enumerate(lines))


def _evidence(evidence: Mapping[str, Any]) -> str:
    shown = [f"{name.replace('_', ' ')} {_value(value)}" for name, value in list(evidence.items())[:EVIDENCE_SHOWN]]
    return "; ".join(shown) + ("; more with --json" if len(evidence) > EVIDENCE_SHOWN else "")


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        value = ", ".join(f"{k} {_value(v)}" for k, v in value.items())
    elif isinstance(value, list | tuple):
        value = ", ".join(_value(v) for v in value)
    return textwrap.shorten(str(value), LONGEST_VALUE, placeholder=" ...")


def _wrap(text: str, indent: str, width: int) -> str:
    """Wrapped, never inside a word: commands stay whole, so that they can be copied."""
    after = " " * len(indent)
    return textwrap.fill(
        text, width, initial_indent=indent, subsequent_indent=after, break_long_words=False, break_on_hyphens=False
    )
