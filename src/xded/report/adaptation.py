"""What a few recordings of a new speaker are worth: tables, a picture and a page. The unheard result stands apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from xded import __version__
from xded.adaptation.curve import Curve
from xded.adaptation.settings import LISTED, OPEN
from xded.report.pages import Drawing, Grid, page
from xded.report.study_figures import FAINT, ONE, TWO, WIDTH_IN, drawn
from xded.report.tables import Table, cell
from xded.scoring import Estimate, Scores
from xded.training.status import now, write_atomically

TEMPLATE = "adaptation.html"
PAGE, PICTURE = "report.html", "curve.svg"
MEAN = "mean"
MOST_PICTURES = 12  # speakers with a picture of their own: keeps the page small
COLOURS = {OPEN: ONE, LISTED: TWO}
MARKERS = {"steps": "o", "prototypes": "s"}
DASHES = {"steps": "solid", "prototypes": "dashed"}
# what stands alone has no page that would say colours, font and namespaces
ALONE = {"currentColor": "#1a1a1a", "var(--line)": "#8a8f94", "var(--one)": "#0072b2", "var(--two)": "#d55e00"}
SPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
HOW = {
    "steps": "steps: at least {updates} updates (whole epochs) of all weights{frozen} on the true text of these takes "
    "(peak learning rate {peak_lr:g}, no validation: the last weights are tested).",
    "prototypes": "prototypes: no training. A word's prototype is the mean of its takes' encoder outputs; listed words "
    "with a prototype share what the recogniser gives to them together by log-probability + {weight:g} x cosine; other "
    "words keep theirs.",
}


@dataclass(frozen=True)
class Line:
    """One method and decode mode in a picture: (takes heard, WRA in per cent)."""

    method: str
    decode: str
    points: tuple[tuple[int, Estimate], ...]


def of_speaker(scores: Scores, speaker: str) -> Estimate:
    """WRA of one speaker, or the mean over speakers."""
    if speaker == MEAN:
        return scores.speaker_mean_wra_percent if len(scores.by_speaker) > 1 else scores.overall.wra_percent
    return scores.by_speaker[speaker].wra_percent


def columns_of(curve: Curve) -> tuple[str, ...]:
    """Speakers, and their mean where there are several."""
    return (*((MEAN,) if len(curve.speakers) > 1 else ()), *curve.speakers)


def tables_of(curve: Curve) -> list[Table]:
    """The unheard result; what was understood after hearing the speaker; what hearing gained."""
    heard = [_heard(curve, decode) for decode in curve.unheard]
    return [_unheard(curve), *(table for table in heard if table.rows), _gained(curve), _words(curve)]


def _unheard(curve: Curve) -> Table:
    columns, (first, *_) = columns_of(curve), curve.unheard.values()
    listed = curve.unheard[LISTED].conditions["decode"]
    return Table(
        "Unheard: 0 takes of the speaker",
        ("decode", *columns),
        tuple((name, *(cell(of_speaker(scores, one)) for one in columns)) for name, scores in curve.unheard.items()),
        f"WRA in per cent, in brackets 95 % over takes. {first.statement}; closed word list: {listed}."
        + (" The interval of the mean is over speakers and their takes." if len(curve.speakers) > 1 else ""),
    )


def _heard(curve: Curve, decode: str) -> Table:
    columns = columns_of(curve)
    points = [point for point in curve.heard if point.decode == decode]
    rows = tuple((point.name, *(cell(of_speaker(point.scores, one)) for one in columns)) for point in points)
    caption = (
        "Not an unheard test: the recogniser has heard so many takes of the tested speaker. The test is of others, the "
        f"same as above; mean over {curve.settings.draws} draws of the takes."
    )
    return Table(f"After hearing the speaker ({decode})", ("heard", *columns), rows, caption)


def _gained(curve: Curve) -> Table:
    rows = tuple(
        (
            f"{point.name}, {point.decode}",
            str(point.over_unheard.difference_points),
            _p(point.over_unheard.p_value),
            f"{min(point.by_draw_wra_percent):.1f} to {max(point.by_draw_wra_percent):.1f}",
        )
        for point in curve.heard
    )
    caption = (
        "Points of WRA over the unheard result on the same takes of all speakers, and the p-value of a paired "
        "permutation test, of each alone. Draws: WRA (mean of speakers) of the worst and the best draw."
    )
    return Table("What hearing gained", ("heard", "points", "p", "draws"), rows, caption)


def _words(curve: Curve) -> Table:
    rows = tuple(
        (
            f"{point.name}, {point.decode}",
            f"{point.same_words_percent:.0f} %",
            _or_none(point.same_words),
            _or_none(point.other_words),
        )
        for point in curve.heard
    )
    caption = "Share of the tested takes whose word is that of a take that was heard; WRA of these, and of all others."
    return Table("Words that were heard, and others", ("heard", "share", "WRA", "others"), rows, caption)


def _or_none(estimate: Estimate | None) -> str:
    return "-" if estimate is None else cell(estimate)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def how_of(curve: Curve) -> list[str]:
    """How it was adapted and tested, in sentences."""
    s = curve.settings
    frozen = f" but the first {s.freeze_layers} encoder layers" if s.freeze_layers else ""
    said = [HOW[method].format(**{**vars(s), "frozen": frozen}) for method in s.methods]
    return [
        f"{s.test_share:.0%} of each speaker's takes are set apart, and every number is of these. The others are drawn "
        f"{s.draws} times (seed {s.seed}), one take of every word before the second of any; fewer takes are the first "
        "of more. All microphones of a take go with it.",
        *said,
    ]


# --- the picture ------------------------------------------------------------------------------------------


def lines_of(curve: Curve, speaker: str) -> list[Line]:
    """Methods and decode modes as lines of (takes, WRA)."""
    found: dict[tuple[str, str], list[tuple[int, Estimate]]] = {}
    for point in curve.heard:
        found.setdefault((point.method, point.decode), []).append((point.takes, of_speaker(point.scores, speaker)))
    return [Line(method, decode, tuple(points)) for (method, decode), points in found.items()]


def curve_drawing(curve: Curve, speaker: str, name: str) -> Drawing:
    """WRA by the number of takes heard; the unheard result stands in a panel of its own, joined to nothing."""
    lines = lines_of(curve, speaker)
    unheard = {decode: of_speaker(scores, speaker) for decode, scores in curve.unheard.items()}

    def draw(figure: Figure) -> None:
        apart, axes = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [1, 4]})
        for place, (decode, value) in enumerate(unheard.items()):
            _mark(apart, [(place, value)], COLOURS[decode], fmt="D", markerfacecolor="none")
            axes.axhline(value.value, color=COLOURS[decode], linewidth=0.8, linestyle="dotted")
        apart.set_xticks(range(len(unheard)), ["list" if decode == LISTED else decode for decode in unheard])
        apart.set_xlim(-0.6, len(unheard) - 0.4)
        apart.set_xlabel("unheard")
        apart.set_ylabel("WRA (%)")
        for number, line in enumerate(lines):
            aside = (number - (len(lines) - 1) / 2) * 0.025 * curve.settings.takes[-1]  # intervals beside each other
            points = [(takes + aside, value) for takes, value in line.points]
            style: dict[str, Any] = {"fmt": MARKERS[line.method], "linestyle": DASHES[line.method]}
            _mark(axes, points, COLOURS[line.decode], label=f"{line.method}, {line.decode}", **style)
        axes.set_xticks(curve.settings.takes)
        axes.set_xlim(0, curve.settings.takes[-1] * 1.08)
        axes.set_ylim(0, 100)
        axes.set_xlabel("takes of the speaker heard")
        axes.grid(axis="y", color=FAINT, linewidth=0.3)
        figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)

    title = "Mean of speakers" if speaker == MEAN else f"Speaker {speaker}"
    return drawn(name, title, _in_words(title, unheard, lines), "", (WIDTH_IN, 3.4), draw)


def _mark(axes: Axes, points: Sequence[tuple[float, Estimate]], colour: str, **style: Any) -> None:
    """A line through values, each with its interval where it has one."""
    values = [value for _, value in points]
    spread = [
        [0.0 if value.low is None else max(0.0, value.value - value.low) for value in values],
        [0.0 if value.high is None else max(0.0, value.high - value.value) for value in values],
    ]
    axes.errorbar([x for x, _ in points], [value.value for value in values], spread, color=colour, elinewidth=0.8,
                  markersize=4.5, **style)  # fmt: skip


def _in_words(title: str, unheard: dict[str, Estimate], lines: Sequence[Line]) -> str:
    before = ", ".join(f"{value} % ({decode})" for decode, value in unheard.items())
    after = "; ".join(
        f"{line.method}, {line.decode}: " + ", ".join(f"{value} % after {takes} takes" for takes, value in line.points)
        for line in lines
    )
    return f"WRA of {title.lower()}. Unheard: {before}. {after}."


# --- files ------------------------------------------------------------------------------------------------


def write_pages(curve: Curve, out: Path) -> list[Path]:
    """Writes or replaces curve.svg and report.html; returns their paths."""
    names = columns_of(curve)
    drawings = [curve_drawing(curve, name, f"curve{number}") for number, name in enumerate(names[: MOST_PICTURES + 1])]
    alone = drawings[0].svg.replace("<svg ", f'<svg {SPACES} font-family="sans-serif" style="background: #ffffff" ', 1)
    for of_page, colour in ALONE.items():
        alone = alone.replace(of_page, colour)
    write_atomically(out / PICTURE, alone)
    write_atomically(out / PAGE, render(curve, drawings))
    return [out / PAGE, out / PICTURE]


def render(curve: Curve, drawings: Sequence[Drawing]) -> str:
    """The page as HTML; every text is escaped."""
    unheard, *heard = tables_of(curve)
    speakers = Grid(
        "Speakers",
        ("speaker", "band", "test takes", "takes to draw from"),
        tuple((name, s.band or "-", str(len(s.test)), str(len(s.orders[0]))) for name, s in curve.speakers.items()),
        "Which takes each draw heard, in which order: curve.json.",
    )
    return page(
        TEMPLATE,
        curve=curve,
        unheard=_grid(unheard),
        heard=[_grid(table) for table in heard],
        drawings=drawings,
        left_out=columns_of(curve)[len(drawings) :],
        speakers=speakers,
        how=how_of(curve),
        written=now(),
        version=__version__,
    )


def _grid(table: Table) -> Grid:
    return Grid(table.title, table.columns, table.rows, table.caption)
