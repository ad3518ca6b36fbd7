"""Pictures of a study as SVG inside the page: the page's colours by day and by night, text that can be read and zoomed.

Every picture is about as wide as a phone; several stand side by side where there is room.
"""

from __future__ import annotations

import io
import re
import textwrap
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from xded.config import FeatureConfig
from xded.doctor.inspection import Curves, Inspected, band_centres_hz
from xded.report.figures import STYLE, attention_words, called, draw_attention, draw_features, logarithmic
from xded.report.pages import Drawing
from xded.report.study_evidence import Bad, Learning
from xded.scoring import Estimate
from xded.study.plan import DecodeName, Hypothesis
from xded.study.verdict import Answer

WIDTH_IN = 3.75
CSS_PER_IN = 96
POINTS = 800  # of all lines of a picture: keeps the page small
MOST_LINES = 24  # runs that get a line of their own
MANY_RUNS = 3  # beyond, their mean stands out
ROW_IN = 0.36  # a speaker with two bars
# what matplotlib is told -> what the page says; the first two are named in the style
INK, FAINT, ONE, TWO = "#010101", "#020202", "#030303", "#040404"
REFERENCE = re.compile(r"(href=\"#|url\(#)([^\")]+)")
XLINK = "{http://www.w3.org/1999/xlink}"
CSS_COLOURS = {INK: "currentColor", FAINT: "var(--line)", ONE: "var(--one)", TWO: "var(--two)"}
SVG_STYLE = {
    **STYLE,
    "font.size": 9.0,
    "svg.fonttype": "none",  # text stays text
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.labelcolor": INK,
}
COLOUR_OF: Mapping[DecodeName, str] = {"open": ONE, "word list": TWO}
Bars = Mapping[DecodeName, Mapping[str, Estimate]]


def drawn(
    name: str, title: str, text: str, caption: str, size: tuple[float, float], draw: Callable[[Figure], None]
) -> Drawing:
    """Draws within the page's style."""
    with mpl.rc_context({**SVG_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    width, height = (round(CSS_PER_IN * inches) for inches in size)
    return Drawing(name, title, text, caption, _for_page(buffer.getvalue(), name, text, width, height), width, height)


def _for_page(svg: str, name: str, text: str, width: int, height: int) -> str:
    """What matplotlib wrote, without what a page does not need: namespaces, unused ids, empty groups, digits."""
    root = ElementTree.fromstring(svg)
    used = {name for _, name in REFERENCE.findall(svg)}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text, element.tail = (part and part.strip() for part in (element.text, element.tail))
        element.attrib = {
            key.replace(XLINK, "xlink:"): _for_attribute(key, value, name)
            for key, value in element.attrib.items()
            if key != "id" or value in used
        }
        element[:] = [child for child in element if not child.tag.endswith(("}metadata", "}style"))]
    _unwrap(root)
    points = f"{width * 72 / CSS_PER_IN:g} {height * 72 / CSS_PER_IN:g}"
    root.attrib = {"role": "img", "aria-label": text, "width": f"{width}", "height": f"{height}",
                   "viewBox": f"0 0 {points}"}  # fmt: skip
    return ElementTree.tostring(root, encoding="unicode")


def _for_attribute(key: str, value: str, name: str) -> str:
    """A value with names of this picture, the page's colours, no fonts of this machine, and tenths of a point."""
    if value.startswith("data:"):
        return value
    if key == "id":
        return f"{name}-{value}"
    if key == f"{XLINK}href":
        return f"#{name}-{value[1:]}"
    value = REFERENCE.sub(rf"\g<1>{name}-\g<2>", value)
    value = re.sub(r"font: ([\d.]+px) [^;]+", r"font-size: \1", value)
    value = re.sub(r"font-family: [^;]+;?", "", value)
    digits = 3 if key == "transform" else 1
    value = re.sub(r"-?\d+\.\d+", lambda found: f"{round(float(found[0]), digits):g}", value)
    for colour, css in CSS_COLOURS.items():
        value = value.replace(colour, css)
    return " ".join(value.split())


def _unwrap(element: ElementTree.Element) -> None:
    """Takes children out of groups that say nothing."""
    children = []
    for child in element:
        _unwrap(child)
        children += list(child) if child.tag == "g" and not child.attrib else [child]
    element[:] = children


# --- verdicts ---------------------------------------------------------------------------------------------


def answers_drawing(answers: Sequence[Answer], hypotheses: Mapping[str, Hypothesis]) -> Drawing | None:
    """Every hypothesis: its value with the interval, and the threshold that it is held against."""
    shown = [a for a in answers if a.wra_percent is not None]
    if not shown:
        return None
    thresholds = [hypotheses[a.hypothesis].threshold for a in shown]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, (answer, threshold) in enumerate(zip(shown, thresholds, strict=True)):
            value, side = answer.wra_percent, "above" if hypotheses[answer.hypothesis].above is not None else "below"
            assert value is not None
            _interval(axes, value, place, ONE, 7.0)
            axes.plot(
                [threshold] * 2, [place - 0.25, place + 0.25], color=TWO, linewidth=2.5, linestyle=(0, (1.2, 0.6))
            )
            label = f"{_wrapped(answer.hypothesis, 44)} ({side} {threshold:g})"
            axes.annotate(label, (0, place - 0.3), xycoords=("axes fraction", "data"), va="bottom")
        ends = [v for a in shown if (e := a.wra_percent) for v in (e.value, e.low, e.high) if v is not None]
        low, high = min(0.0, *ends, *thresholds), max(*ends, *thresholds)
        room = 0.05 * max(high - low, 1.0)
        axes.set_xlim(low - room, high + room)
        axes.set_ylim(len(shown) - 0.6, -0.8)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("WRA (%), or points")

    text = "; ".join(
        f"{a.hypothesis}: {a.wra_percent}, threshold {t:g}, {a.verdict}" for a, t in zip(shown, thresholds, strict=True)
    )
    caption = "Dot and line: value and 95 % interval. Dotted bar: the threshold. A line that crosses it: undecided."
    return drawn("answers", "Hypotheses", f"Hypotheses. {text}.", caption, (WIDTH_IN, 0.75 + 0.6 * len(shown)), draw)


def _interval(axes: Axes, value: Estimate, place: float, colour: str, size: float) -> None:
    if value.low is not None and value.high is not None:
        axes.plot([value.low, value.high], [place] * 2, color=colour, linewidth=2.0, solid_capstyle="butt")
    axes.plot(value.value, place, "o", color=colour, ms=size)


# --- learning ---------------------------------------------------------------------------------------------


def learning_drawing(learning: Learning, name: str) -> Drawing:
    """Loss and validation WRA of all runs of an attempt, with the stages marked."""
    losses = [(c.update, c.step["loss"]) for c in learning.curves if "loss" in c.step]
    scored = [(c.validated["update"], 100 * c.validated["wra"]) for c in learning.curves
              if {"wra", "update"} <= c.validated.keys()]  # fmt: skip
    scored = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in scored if np.isfinite(y).any()]
    last = max(float(c.update[-1]) for c in learning.curves)
    stages = _stages(learning.curves)

    def draw(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True)
        _runs(top, losses, ONE)
        logarithmic(top, np.concatenate([y for _, y in losses] or [np.empty(0)]))
        top.set_ylabel("loss (nats)")
        _runs(bottom, scored, TWO)
        bottom.set_ylim(-3, 103)
        bottom.set_ylabel("validation WRA (%)")
        bottom.set_xlabel("update")
        bottom.set_xlim(0, last)
        bottom.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        for number, update in enumerate(stages, start=2):
            for axes in (top, bottom):
                axes.axvline(update, color=INK, linewidth=0.9, linestyle="dashed")
            top.annotate(f" stage {number}", (update, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8)

    said = [f"{_runs_in_words(learning)}, up to update {last:.0f}"]
    said.append(f"stage {', '.join(f'{n} begins after update {u:.0f}' for n, u in enumerate(stages, start=2))}"
                if stages else "one stage")  # fmt: skip
    said += [_range("mean loss", losses, ""), _range("mean validation WRA", scored, " %")]
    title = learning.attempt
    return drawn(name, title, f"Learning curves of '{title}': {'; '.join(said)}.", "", (WIDTH_IN, 3.4), draw)


def _runs_in_words(learning: Learning) -> str:
    folds = {c.held_out for c in learning.cells}
    seeds = {c.seed for c in learning.cells}
    return f"{len(learning.cells)} runs ({len(folds)} folds, {len(seeds)} seeds)"


def _stages(curves: Iterable[Curves]) -> list[float]:
    """Last updates of all stages but the last, of the run that got farthest."""
    farthest = max(curves, key=lambda c: c.update[-1])
    stage = farthest.step.get("stage", np.ones(len(farthest.update)))
    return [float(u) for u in farthest.update[:-1][np.diff(stage) > 0]]


def _runs(axes: Axes, lines: Sequence[tuple[np.ndarray, np.ndarray]], colour: str) -> None:
    """A line a run, thinned so that the picture stays small; of many runs their mean stands out."""
    shown = lines[:MOST_LINES]
    each = max(12, POINTS // (2 * max(1, len(shown))))
    many = len(lines) > MANY_RUNS
    kept = [np.unique(np.linspace(0, len(x) - 1, min(each, len(x))).round().astype(int)) for x, _ in shown]
    thin = [(x[places], y[places]) for (x, y), places in zip(shown, kept, strict=True)]
    marker = "o" if any(len(x) == 1 for x, _ in thin) else None
    _broken_line(axes, thin, color=colour, linewidth=0.8 if many else 1.4, alpha=0.5 if many else 1.0, marker=marker)
    if many and (mean := _mean(lines)) is not None:
        axes.plot(*mean, color=colour, linewidth=2.4)


def _mean(lines: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean of the runs over the updates that all of them have reached; none when they share no stretch."""
    if not lines:
        return None
    low, high = max(float(x[0]) for x, _ in lines), min(float(x[-1]) for x, _ in lines)
    if low > high:
        return None
    grid = np.unique(np.concatenate([x for x, _ in lines]))
    grid = grid[(grid >= low) & (grid <= high)]
    grid = grid[np.unique(np.linspace(0, len(grid) - 1, min(100, len(grid))).round().astype(int))]
    return grid, np.mean([np.interp(grid, x, y) for x, y in lines], axis=0)


def _range(what: str, lines: Sequence[tuple[np.ndarray, np.ndarray]], unit: str) -> str:
    mean = _mean(lines)
    if mean is None:
        return f"{what} not known"
    ends = [float(y[-1]) for _, y in lines]
    first, last = mean[1][0], mean[1][-1]
    return f"{what} from {first:.3g}{unit} to {last:.3g}{unit} (runs end between {min(ends):.3g} and {max(ends):.3g})"


# --- speakers and bands -----------------------------------------------------------------------------------


def bars_drawing(name: str, title: str, what: str, bars: Bars) -> Drawing:
    """Horizontal bars with intervals: a row a speaker (or system), a bar a decode mode.

    Args:
        what: what a row is, for the text; bars: decode mode -> row -> WRA in per cent.
    """
    rows = list(dict.fromkeys(row for of in bars.values() for row in of))
    labels = [_wrapped(row, 22) for row in rows]
    thick = 0.8 / len(bars)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (decode, of) in enumerate(bars.items()):
            colour = COLOUR_OF[decode]
            middles = {row: place - 0.4 + thick * (number + 0.5) for place, row in enumerate(rows) if row in of}
            boxes = [((0, y - 0.41 * thick), (of[row].value, y + 0.41 * thick)) for row, y in middles.items()]
            shape = Path.make_compound_path(*(Path(Bbox(box).corners()[[0, 1, 3, 2, 0]], closed=True) for box in boxes))
            filled: dict[str, Any] = {"hatch": "//////", "fill": False} if number else {"facecolor": colour}
            axes.add_patch(PathPatch(shape, edgecolor=colour, linewidth=0.8, **filled))
            _broken_line(axes, [((of[row].low, of[row].high), (y, y)) for row, y in middles.items()
                                if of[row].low is not None], color=INK, linewidth=1.2)  # fmt: skip
            for row, y in middles.items():
                axes.annotate(f"{of[row].value:.0f}", (1.02, y), xycoords=("axes fraction", "data"), va="center",
                              fontsize=8, color=colour)  # fmt: skip
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("WRA (%)")

    said = "; ".join(
        f"{row}: " + ", ".join(f"{of[row]} % ({decode})" for decode, of in bars.items() if row in of) for row in rows
    )
    text = f"WRA of {title} by {what}. {said}."
    return drawn(name, title, text, "", (WIDTH_IN, 0.65 + ROW_IN * len(rows) * (0.5 + 0.25 * len(bars))), draw)


def _broken_line(axes: Axes, pieces: Sequence[tuple[Any, Any]], **style: Any) -> None:
    """Several (x, y) lines as one element of the picture."""
    if pieces:
        x, y = (np.concatenate([[*piece[axis], np.nan] for piece in pieces]) for axis in (0, 1))
        axes.plot(x.astype(float), y.astype(float), **style)


def _wrapped(label: str, most: int) -> str:
    return textwrap.fill(label, most, max_lines=2, placeholder=" …")


# --- recordings -------------------------------------------------------------------------------------------


def attention_drawing(attempt: str, heard: Inspected, name: str) -> Drawing:
    """Log-mel features above the attention of every decoder layer while the true text is written."""
    attention = heard.attention[0]
    layers, steps, _ = attention.weights.shape
    panel_in = max(1.0, 0.35 + 0.15 * steps)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(layers + 1, 1, sharex=True, gridspec_kw={"height_ratios": [1.0] + [panel_in] * layers})
        draw_features(grid[0], heard.features, heard.hop_s, heard.band_hz)
        grid[0].set_ylabel("kHz")
        for layer, axes in enumerate(grid[1:]):
            draw_attention(axes, attention, layer, float(attention.weights.max()))
            axes.set_title(f"decoder layer {layer + 1}", fontsize=8)
        _raw_images(grid)
        grid[-1].set_xlabel("time (s)")

    said = f"CTC output: {heard.ctc_text or '(nothing)'}. Decoder output: {heard.decoder_text or '(nothing)'}."
    text = f"Cross-attention of '{attempt}' for {called(heard)}. {attention_words(attention)}"
    return drawn(name, attempt, text, said, (WIDTH_IN, 0.9 + 1.0 + layers * (panel_in + 0.3)), draw)


def spectrogram_drawing(bad: Bad, config: FeatureConfig, name: str) -> Drawing:
    """Log-mel features of a recording."""
    recording = bad.recording

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        draw_features(axes, bad.features, config.hop_s, band_centres_hz(config))
        _raw_images([axes])
        axes.set_ylabel("mel band (kHz)")
        axes.set_xlabel("time (s)")

    loud = bad.features.mean(1)
    text = (
        f"Log-mel spectrogram of {recording.recording}, '{recording.text}', {recording.duration:.2f} s; loudest at "
        f"{float(loud.argmax()) * config.hop_s:.2f} s."
    )
    return drawn(name, "Log-mel spectrogram", text, "", (WIDTH_IN, 1.8), draw)


def _raw_images(grid: Iterable[Axes]) -> None:
    """One pixel of an image for one number: the browser enlarges it."""
    for axes in grid:
        for image in axes.images:
            image.set_interpolation("none")
