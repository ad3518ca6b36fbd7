"""A study or a run at work, for the terminal: a row an attempt with small curves. Imports no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from xded.study.status import RunView, View
from xded.training.status import clock

BLOCKS, ASCII = "▁▂▃▄▅▆▇█", "_.-=+*%#"
FIRST = ("running", "failed", "interrupted", "unreadable")  # shown where there is no room for all
COLOURS = {
    "running": "cyan", "done": "green", "finished": "green", "failed": "bold red", "killed": "red",
    "interrupted": "red", "left out": "red", "unreadable": "red", "waiting": "dim",
}  # fmt: skip
NARROWEST, WIDEST = 6, 24  # characters of a curve
OTHER_COLUMNS = 82  # characters that a row takes beside its two curves
CAPTION = "loss: of training; WRA: of validation, its curve from 0 to 100 %; time: left, or taken"
ROOMY = 100  # characters of a line that has room for the epoch too
FURNITURE = 10  # lines around the rows: heading, counts, table head, what is left over
MOST_FAILURES = 5  # reasons that are said where there is little room


def sparkline(
    values: Sequence[float], width: int, *, low: float | None = None, high: float | None = None, levels: str = BLOCKS
) -> str:
    """Values as one line of blocks, the last one at its end; what is not finite is a `!`.

    Args:
        values: in order; width: most characters.
        low, high: what the lowest and the highest block stand for; none: the lowest and highest of the values.
    """
    if len(values) > width:
        values = [values[round(place * (len(values) - 1) / max(1, width - 1))] for place in range(width)]
    finite = [value for value in values if math.isfinite(value)]
    bottom = min(finite, default=0.0) if low is None else low
    top = max(finite, default=0.0) if high is None else high

    def block(value: float) -> str:
        if not math.isfinite(value):
            return "!"
        share = (value - bottom) / (top - bottom) if top > bottom else 0.0
        return levels[min(len(levels) - 1, max(0, int(share * len(levels))))]

    return "".join(map(block, values))


def page(view: View, width: int, height: int | None = None, *, blocks: bool = True) -> RenderableType:
    """Everything about a study, a run or a folder of runs.

    Args:
        width: characters of a line; height: lines that there are; none: as many as it takes.
        blocks: whether the terminal can write block characters.
    """
    shown, hidden = view.rows, Counter[str]()
    if height is not None:
        room = max(3, height - FURNITURE - len(view.others) - len(view.lines) - min(MOST_FAILURES, len(view.failures)))
        shown, hidden = _within(view.rows, room)
    most = None if height is None else MOST_FAILURES
    parts: list[RenderableType] = [_heading(view), *map(Text, view.lines), *_failures(view, most)]
    if shown or view.others:
        parts.append(_table((*shown, *view.others), width, BLOCKS if blocks else ASCII))
        parts.append(Text(CAPTION, style="dim"))
    if hidden:
        counts = ", ".join(f"{count} {state}" for state, count in hidden.items())
        parts.append(Text(f"and {sum(hidden.values())} more: {counts}", style="dim"))
    return Group(*parts)


def _heading(view: View) -> Text:
    text = Text.assemble((view.name, "bold"), ": ", (view.state, COLOURS.get(view.state, "")))
    if view.pieces:
        text.append(f", {' · '.join(f'{count} {state}' for state, count in view.pieces.items())}")
    if view.left_s is not None:
        text.append(f", {clock(view.left_s)} left")
    elif view.state == "running" and view.pieces:
        text.append(", time left not known yet")
    if view.sentence:
        text.append(f"\n{view.sentence}", style="red" if view.state in ("killed", "failed") else "dim")
    return text


def _within(rows: Sequence[RunView], room: int) -> tuple[tuple[RunView, ...], Counter[str]]:
    """As many rows as there is room for, in their order: first those that run or went wrong; and who is left out."""
    if len(rows) <= room:
        return tuple(rows), Counter()
    order = sorted(range(len(rows)), key=lambda place: rows[place].state not in FIRST)
    kept = set(order[:room])
    hidden = Counter(row.state for place, row in enumerate(rows) if place not in kept)
    return tuple(row for place, row in enumerate(rows) if place in kept), hidden


def _table(rows: Sequence[RunView], width: int, levels: str) -> Table:
    curve = min(WIDEST, max(NARROWEST, (width - OTHER_COLUMNS) // 2))
    table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False)
    for number, name in enumerate(rows[0].about):
        table.add_column(name.replace("_", " "), min_width=4 if number else 12, overflow="fold")
    table.add_column("state", no_wrap=True)
    if width >= ROOMY:
        table.add_column("epoch", no_wrap=True)
    for name in ("update", "loss", "WRA %", "best"):
        table.add_column(name, no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    for row in rows:
        names = (Text(str(value)) for value in row.about.values())
        cells = [Text(row.state, style=COLOURS.get(row.state, "")), *map(Text, _measured(row, curve, levels))]
        table.add_row(*names, *(cell for place, cell in enumerate(cells) if place != 1 or width >= ROOMY))
    return table


def _measured(row: RunView, width: int, levels: str) -> Iterator[str]:
    """Epoch, update, loss, validation WRA and its best; time left of what runs, else time taken."""
    curve, wra = row.curve, row.curve.wra_percent
    yield "" if curve.epoch is None else f"{curve.epoch}/{curve.epochs}"
    yield "" if curve.update is None else f"{curve.update}/{curve.updates}"
    yield f"{sparkline(curve.loss, width, levels=levels)} {curve.loss[-1]:.3g}" if curve.loss else ""
    yield f"{sparkline(wra, width, low=0.0, high=100.0, levels=levels)} {wra[-1]:.0f}" if wra else ""
    yield "" if row.best_wra_percent is None else f"{row.best_wra_percent:.0f}"
    time_s = row.left_s if row.left_s is not None else row.seconds
    yield "" if time_s is None else clock(time_s)


def _failures(view: View, most: int | None) -> list[Text]:
    """What failed and why; what was left out for the same reason is one line. Then what is odd about a row."""
    titles: dict[str, list[str]] = {}
    for title, why in view.failures:
        titles.setdefault(why, []).append(title)
    lines = []
    for why, those in list(titles.items())[:most]:
        named = those[0] if len(those) == 1 else f"{those[0]} and {len(those) - 1} more"
        lines.append(Text.assemble((named, "bold red"), f": {why}"))
    if most is not None and len(titles) > most:
        lines.append(Text(f"and {len(titles) - most} more reasons", style="dim"))
    said = set(titles) | {view.sentence}
    for row in (*view.rows, *view.others):
        name = ", ".join(str(value) for value in row.about.values() if value != "")
        if row.why and row.why not in said and row.state != "failed":
            lines.append(Text(f"{name}: {row.why}", style="red"))
        if row.curve.unreadable:
            lines.append(Text(f"{name}: {row.curve.unreadable} lines of metrics.jsonl cannot be read", style="red"))
    return lines
