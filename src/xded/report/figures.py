"""Pictures of a run and of recordings, as PNG with the numbers that they show in words. No pyplot, no display."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from xded.doctor.inspection import Attention, CtcPosterior, Curves, Inspected, first_last, rate_error

DPI = 150  # pictures are shown at two thirds of their pixels: sharp where a screen has more
WIDTH_IN = 9.0
# Okabe & Ito 2008 without the yellow, which white paper swallows: told apart with any colour vision
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("solid", "dashed", "dotted")
GREY, LIGHT = "#555555", "#D9D9D9"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "text.usetex": False,
    "text.parse_math": False,  # a prompt with dollar signs is no formula
}
MARKED = 40  # points of a line up to which each is marked
LABEL_SHARE = 0.009  # share of the time axis that a character of a label takes
CHARACTERS_PER_IN = 11.5  # of a title
SEEN = 0.1  # probability from which a piece that is no spike is drawn
CAPTIONS = {
    "Where the decoder looks": "A decoder that listens moves to the right while it writes. When all steps look alike "
    "or at one place, it writes without listening: it knows the words by heart, or its attention was not trained.",
    "What CTC heads say over time": "Pieces should come in the order of the text, each as a spike, with blank in "
    "between. Where teachers' spikes stand at different times, their average says blank and the student learns "
    "silence.",
    "Loss and its parts": "A part that does not fall is not learned: look at its weight, its targets and its gradient. "
    "A validation loss that rises while the others fall: the recordings are learned by heart.",
    "Learning rate": "The dots should lie on the line. A warm-up that the line does not have: a resumed run started "
    "its schedule anew.",
    "Gradient norms by layer": "Layers should lie within one or two powers of ten of each other. A layer that is grey "
    "was frozen or not used; one that stays at zero learns nothing.",
    "Validation": "Few distinct outputs or many empty ones while the loss falls: the model says the same for everyone. "
    "Steps right given the true text, but no WRA: the decoder needs the true text to go on.",
}
PART_NAMES = {
    "ctc": "CTC",
    "ctc_kd": "CTC-KD",
    "cross_entropy": "cross-entropy",
    "decoder_kd": "decoder-KD",
    "word_kd": "word-KD",
    "text_kd": "text-KD",
    "feature_kd": "feature-KD",
    "consistency": "consistency",
    "word_consistency": "consistency of words",
    "adversary": "adversary",
}


@dataclass(frozen=True)
class Picture:
    """A PNG, the name of its file, its title, what it shows in words and numbers, and how to read it."""

    name: str
    title: str
    text: str
    caption: str
    png: bytes
    width: int  # CSS pixels
    height: int


def _picture(name: str, title: str, text: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> Picture:
    """Draws and saves within one style: matplotlib makes some texts only while it saves."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return Picture(name, title, text, CAPTIONS[title], buffer.getvalue(), round(size[0] * 100), round(size[1] * 100))


# --- one recording --------------------------------------------------------------------------------------


def attention_picture(heard: Inspected, name: str) -> Picture:
    """Log-mel features above the cross-attention of every decoder layer, for each text."""
    columns, layers = len(heard.attention), len(heard.attention[0].weights)
    steps = max(len(attention.pieces) for attention in heard.attention)
    panel_in = max(1.4, 0.3 + 0.16 * steps)
    size = (WIDTH_IN if columns == 1 else 11.0, 1.9 + layers * (panel_in + 0.25))

    def draw(figure: Figure) -> None:
        _title(figure, f"Where the decoder looks: {called(heard)}", size[0])
        grid = figure.subplots(
            layers + 1, columns, sharex=True, squeeze=False, gridspec_kw={"height_ratios": [1.2] + [panel_in] * layers}
        )
        most = max(float(attention.weights.max()) for attention in heard.attention)
        for column, attention in zip(grid.T, heard.attention, strict=True):
            draw_features(column[0], heard.features, heard.hop_s, heard.band_hz)
            column[0].set_title(_wrapped(f"{attention.what}: {_spelled(attention)}", size[0] / columns))
            for layer, axes in enumerate(column[1:]):
                image = draw_attention(axes, attention, layer, most)
            column[-1].set_xlabel("time (s)")
        grid[0, 0].set_ylabel("mel band (kHz)")
        figure.colorbar(image, ax=grid[1:, :], label="attention weight", fraction=0.03, pad=0.01)

    text = f"Cross-attention of the decoder for {called(heard)}. " + " ".join(map(attention_words, heard.attention))
    return _picture(name, "Where the decoder looks", text, size, draw)


def attention_words(attention: Attention) -> str:
    """Where each layer looks, in words and seconds."""
    said = []
    for number, layer in enumerate(attention.numbers()["layers"], start=1):
        moved = f", later than before in {layer['steps_forward']} of {layer['steps']} steps" if layer["steps"] else ""
        said.append(f"layer {number} looks at {layer['from_s']:.2f} s first, at {layer['to_s']:.2f} s last{moved}")
    return f"{attention.what.capitalize()} ({_spelled(attention)}): {'; '.join(said)}."


def draw_attention(axes: Axes, attention: Attention, layer: int, most: float) -> Any:
    """One layer: steps downwards, time to the right; dots mark the mean time of each step."""
    weights = attention.weights[layer]
    steps, frames = weights.shape
    step_s = attention.frame_s
    extent = (-0.5 * step_s, (frames - 0.5) * step_s, steps - 0.5, -0.5)
    image = axes.imshow(
        weights, aspect="auto", interpolation="nearest", cmap="cividis", norm=PowerNorm(0.5, 0.0, most), extent=extent
    )
    axes.plot(attention.centres_s[layer], np.arange(steps), "o", ms=3.5, mfc="white", mec="black", mew=0.6)
    axes.set_yticks(range(steps), attention.pieces, fontsize=8)
    axes.set_ylabel("step writes")
    axes.set_title(f"decoder layer {layer + 1}, mean over heads (dots: mean time)", fontsize=9)
    return image


def ctc_picture(heard: Inspected, name: str) -> Picture:
    """Log-mel features above the CTC posteriors of the student, the target and every teacher, on one time axis."""
    panels = list(heard.ctc)
    heights = [1.1] + [1.2 if p.who in ("student", "target") else 0.95 for p in panels]
    styles = _piece_styles(panels)

    def draw(figure: Figure) -> None:
        _title(figure, f"What CTC heads say over time: {called(heard)}", WIDTH_IN)
        grid = figure.subplots(len(heights), 1, sharex=True, gridspec_kw={"height_ratios": heights})
        draw_features(grid[0], heard.features, heard.hop_s, heard.band_hz)
        grid[0].set_ylabel("mel band (kHz)")
        grid[0].set_title("log-mel features, as the encoder gets them", fontsize=9)
        for axes, posterior in zip(grid[1:], panels, strict=True):
            _ctc(axes, posterior, styles)
        half_s = heard.ctc[0].frame_s / 2  # room for a label at the first frame
        grid[-1].set_xlim(-half_s, len(heard.features) * heard.hop_s + half_s)
        grid[-1].set_xlabel("time (s); grey area: probability of the blank")
        grid[len(grid) // 2].set_ylabel("probability")

    words = "; ".join(
        f"{p.who} at T = {p.temperature:g} reads {p.text or '(nothing)'} "
        f"({_count(len(p.spikes), 'spike')}, mean blank {p.numbers()['blank']:.2f})"
        for p in panels
    )
    text = f"CTC posteriors over time for {called(heard)}: {words}."
    return _picture(name, "What CTC heads say over time", text, (WIDTH_IN, 0.8 + 1.25 * sum(heights)), draw)


def _ctc(axes: Axes, posterior: CtcPosterior, styles: dict[int, tuple[str, str]]) -> None:
    times_s = np.arange(len(posterior.probabilities)) * posterior.frame_s
    axes.fill_between(times_s, posterior.blank, color=LIGHT, linewidth=0)
    for token, (colour, dash) in styles.items():
        probability = posterior.probabilities[:, token]
        if probability.max() >= SEEN:
            axes.plot(times_s, probability, color=colour, linestyle=dash, linewidth=1.4)
    rows = label_rows(posterior, times_s[-1])
    for spike, row in zip(posterior.spikes, rows, strict=True):
        place = (spike.time_s, 1.03 + 0.2 * row)
        axes.annotate(spike.piece, place, ha="center", va="bottom", fontsize=8, color=styles[spike.token][0])
    axes.set_ylim(0, 1.25 + 0.2 * max(rows, default=0))
    axes.set_yticks([0, 0.5, 1])
    axes.set_title(f"{posterior.who} (T = {posterior.temperature:g}): {posterior.text or '(nothing)'}", fontsize=9)


def label_rows(posterior: CtcPosterior, duration_s: float) -> list[int]:
    """The row above the curves that each spike's label stands in, so that long pieces stand clear of each other."""
    ends_s: list[float] = []
    rows = []
    for spike in posterior.spikes:
        half_s = LABEL_SHARE * (1 + len(spike.piece)) * duration_s / 2
        row = next((row for row, end_s in enumerate(ends_s) if end_s <= spike.time_s - half_s), len(ends_s))
        ends_s[row : row + 1] = [spike.time_s + half_s]
        rows.append(row)
    return rows


def _piece_styles(panels: Sequence[CtcPosterior]) -> dict[int, tuple[str, str]]:
    """A colour and dashes for every piece that is worth a line, the same in all panels."""
    spikes = [spike.token for posterior in panels for spike in posterior.spikes]
    seen = [int(i) for p in panels for i in np.flatnonzero(p.probabilities.max(0) >= SEEN) if i != 0]
    tokens = list(dict.fromkeys([*spikes, *seen]))
    colours = len(COLOURS)
    return {token: (COLOURS[i % colours], DASHES[i // colours % len(DASHES)]) for i, token in enumerate(tokens)}


def draw_features(axes: Axes, features: np.ndarray, hop_s: float, band_hz: np.ndarray) -> None:
    """Log-mel features [T, mels]: bands upwards, labelled in kHz; time to the right."""
    frames, bands = features.shape
    extent = (-0.5 * hop_s, (frames - 0.5) * hop_s, -0.5, bands - 0.5)
    low, high = np.percentile(features, [1, 99])
    axes.imshow(
        features.T, aspect="auto", origin="lower", cmap="Greys", vmin=low, vmax=high, extent=extent,
        interpolation="nearest",
    )  # fmt: skip
    marks_khz = [khz for khz in (0.5, 1, 2, 4, 8, 16) if 1000 * khz <= band_hz[-1]]
    places = np.interp([1000 * khz for khz in marks_khz], band_hz, np.arange(bands))
    axes.set_yticks(places, [f"{khz:g}" for khz in marks_khz])


def _title(figure: Figure, title: str, width_in: float) -> None:
    figure.suptitle(_wrapped(title, width_in), x=0.01, ha="left", fontsize=11)


def _wrapped(text: str, width_in: float) -> str:
    """Lines that fit into a width at the size of a title."""
    return textwrap.fill(text, int(CHARACTERS_PER_IN * width_in))


def called(heard: Inspected) -> str:
    """The recording: id, speaker, text, seconds."""
    r = heard.recording
    return f"{r.recording} (speaker {r.speaker}, '{r.text}', {r.duration:.2f} s)"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _spelled(attention: Attention) -> str:
    return " ".join(attention.pieces)


# --- a run ----------------------------------------------------------------------------------------------


def run_pictures(curves: Curves, weights: dict[str, float], clip: float | None) -> list[Picture]:
    """All curves of a run for which it logged anything.

    Args:
        curves: its metrics.
        weights: of each part of the loss in the objective; clip: norm at which gradients are clipped.
    """
    pictures = []
    if len(curves.update):
        pictures.append(loss_picture(curves, weights))
        pictures.append(rate_picture(curves))
        pictures.append(gradient_picture(curves, clip))
    if len(curves.epoch):
        pictures.append(validation_picture(curves))
    return pictures


def loss_picture(curves: Curves, weights: dict[str, float]) -> Picture:
    """Parts of the loss, unweighted, and the loss itself."""
    lines = {"loss (weighted sum)": curves.step.get("loss", np.full(len(curves.update), np.nan))}
    for part in curves.parts:
        weight = f" (weight {weights[part]:g})" if part in weights else ""
        lines[PART_NAMES[part] + weight] = curves.step[part]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, (label, values) in enumerate(lines.items()):
            _line(axes, curves.update, values, label, COLOURS[-1 if place == 0 else (place - 1) % (len(COLOURS) - 1)])
        if "val_loss" in curves.validated and "update" in curves.validated:
            ends = curves.validated["update"]
            axes.plot(ends, curves.validated["val_loss"], "D", ms=4, color=GREY, label="validation (true text)")
        logarithmic(axes, np.concatenate([*lines.values(), curves.validated.get("val_loss", np.empty(0))]))
        _title(figure, "Loss and its parts over training", WIDTH_IN)
        axes.set_ylabel("mean since the epoch began (nats)")
        _updates(axes, curves)

    said = [_range_words(label, values) for label, values in lines.items()]
    if "val_loss" in curves.validated:
        said.append(_range_words("validation", curves.validated["val_loss"]))
    return _picture("loss.png", "Loss and its parts", f"Loss over training: {'; '.join(said)}.", (WIDTH_IN, 3.6), draw)


def rate_picture(curves: Curves) -> Picture:
    """The learning rate as applied over the planned one."""
    applied = curves.step.get("lr", np.full(len(curves.update), np.nan))
    off = rate_error(curves)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        # no line through them: between two logged updates nobody knows
        size = 4.0 if len(applied) <= MARKED else 2.0
        axes.plot(curves.update, applied, "o", ms=size, color=COLOURS[0], label="applied, as logged")
        if curves.planned is not None:
            axes.plot(curves.planned.updates, curves.planned.rates, color=COLOURS[1], linewidth=0.9, label="planned")
        _from_zero(axes, np.concatenate([applied, *([] if curves.planned is None else [curves.planned.rates])]))
        _title(figure, "Learning rate: as applied, and as planned", WIDTH_IN)
        axes.set_ylabel("learning rate")
        _updates(axes, curves)

    plan = "the plan is not known" if off is None else f"at most {100 * off:.1f} % off the plan"
    text = f"Learning rate over training: {_range_words('applied', applied)}; {plan}."
    return _picture("learning_rate.png", "Learning rate", text, (WIDTH_IN, 2.8), draw)


def gradient_picture(curves: Curves, clip: float | None) -> Picture:
    """The norm of the whole gradient, and of every layer's where the run logged it."""
    whole = curves.step.get("gradient_norm", np.full(len(curves.update), np.nan))
    groups = len(curves.groups)
    heights = [2.2, 0.8 + 0.19 * groups] if groups else [2.2]

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
        top = grid[0, 0]
        _line(top, curves.update, whole, "whole model, before clipping", COLOURS[0])
        for label, values, colour in (
            ("CTC head, row of the blank", curves.blank, COLOURS[1]),
            ("CTC head, mean of the other rows", curves.rows, COLOURS[2]),
        ):
            if np.isfinite(values).any():
                _line(top, curves.gradient_update, values, label, colour)
        if clip is not None:
            top.axhline(clip, color=GREY, linewidth=0.9, linestyle="dashed", label=f"clipped at {clip:g}")
        logarithmic(top, np.concatenate([whole, curves.blank, curves.rows]))
        _title(figure, "Gradient norms over training", WIDTH_IN)
        top.set_ylabel("L2 norm")
        _updates(top, curves, last=not groups)
        if groups:
            _gradient_map(figure, grid[1, 0], curves)
            _updates(grid[1, 0], curves, legend=False)

    said = [_range_words("whole model", whole)]
    said.append(_layer_words(curves) or "this run did not log them by layer (an older version of xded did not)")
    text = f"Gradient norms over training: {'; '.join(said)}."
    return _picture("gradients.png", "Gradient norms by layer", text, (WIDTH_IN, 0.6 + sum(heights)), draw)


def _layer_words(curves: Curves) -> str:
    """The layers with the largest and the smallest median gradient, and those that had a gradient of zero."""
    finite = {name: norms[np.isfinite(norms)] for name, norms in zip(curves.groups, curves.norms.T, strict=True)}
    medians = {name: float(np.median(norms)) for name, norms in finite.items() if len(norms)}
    if not medians:
        return ""
    small, large = min(medians, key=medians.__getitem__), max(medians, key=medians.__getitem__)
    zero = [name for name, norms in finite.items() if (norms == 0).any()]
    said = f"medians by layer from {medians[small]:.3g} ({small}) to {medians[large]:.3g} ({large})"
    return said + (f"; zero at times: {', '.join(zero)}" if zero else "")


def _gradient_map(figure: Figure, axes: Axes, curves: Curves) -> None:
    """Layers downwards, updates to the right, norms as colours; grey where nothing was logged, orange at zero."""
    updates, norms = curves.gradient_update, curves.norms
    positive = norms[np.isfinite(norms) & (norms > 0)]
    low, high = (positive.min(), positive.max()) if len(positive) else (0.1, 1.0)
    colours = mpl.colormaps["cividis"].with_extremes(bad=LIGHT, under=COLOURS[1])
    middles = (updates[1:] + updates[:-1]) / 2
    edges = np.concatenate([[updates[0] - 0.5], middles, [updates[-1] + 0.5]])
    # LogNorm hides zeros like missing values: a hair under the least norm they get the colour of "under"
    shown = np.where(norms == 0, low / 2, np.where(np.isfinite(norms), norms, np.nan))
    norm = LogNorm(low, high if high > low else low * 10)
    mesh = axes.pcolormesh(edges, np.arange(len(curves.groups) + 1), shown.T, norm=norm, cmap=colours)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(curves.groups)) + 0.5, curves.groups, fontsize=8)
    axes.set_title("by layer (grey: no gradient, as when frozen; orange: zero)", fontsize=9)
    bar = figure.colorbar(
        mesh, ax=axes, label="L2 norm", fraction=0.03, pad=0.01, ticks=_decades(low, high), format="%g"
    )
    bar.ax.yaxis.set_minor_formatter(NullFormatter())


def validation_picture(curves: Curves) -> Picture:
    """WRA, empty outputs and, above them, how many different outputs there were."""
    shares = {
        "WRA": ("wra", COLOURS[0]),
        "empty outputs": ("empty", COLOURS[1]),
        "steps right given the true text": ("teacher_forced", COLOURS[2]),
    }
    shares = {label: kept for label, kept in shares.items() if kept[0] in curves.validated}
    distinct = curves.validated.get("distinct", np.full(len(curves.epoch), np.nan))

    def draw(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [2, 1]})
        for label, (key, colour) in shares.items():
            _line(top, curves.epoch, 100 * curves.validated[key], label, colour)
        top.set_ylim(-3, 103)
        top.set_ylabel("per cent")
        _title(figure, "Validation over epochs", WIDTH_IN)
        _legend(top)
        _line(bottom, curves.epoch, distinct, "distinct outputs", COLOURS[3])
        references = curves.validated.get("references", np.empty(0))
        if np.isfinite(references).any():
            wanted = np.nanmax(references)
            bottom.axhline(wanted, color=GREY, linestyle="dashed", linewidth=0.9, label=f"distinct texts: {wanted:.0f}")
        _from_zero(bottom, np.concatenate([distinct, references]))
        bottom.set_ylabel("count")
        bottom.set_xlabel("epoch")
        _whole_numbers(bottom, curves.epoch)
        _legend(bottom)

    said = [_range_words(label, 100 * curves.validated[key], " %") for label, (key, _) in shares.items()]
    said.append(_range_words("distinct outputs", distinct))
    validated = int(np.isfinite(distinct).sum())
    text = f"Validation, {validated} times in {len(curves.epoch)} epochs: {'; '.join(said)}."
    return _picture("validation.png", "Validation", text, (WIDTH_IN, 4.2), draw)


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, label: str, colour: str) -> None:
    """A line through the numbers that are there; few of them are marked."""
    there = np.isfinite(y)
    marker = "o" if there.sum() <= MARKED else None
    axes.plot(x[there], y[there], color=colour, linewidth=1.3, marker=marker, ms=3.5, label=label)


def logarithmic(axes: Axes, values: np.ndarray) -> None:
    """A logarithmic axis where the numbers span more than a linear one can show."""
    finite = values[np.isfinite(values)]
    if len(finite) and finite.min() > 0 and finite.max() > 20 * finite.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(_decades(finite.min(), finite.max()))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        _from_zero(axes, values)


def _decades(low: float, high: float) -> LogLocator:
    """Marks of a logarithmic scale: 1, 2 and 5 of every decade, of many decades only the 1 of some."""
    return LogLocator(subs=(1.0, 2.0, 5.0) if high < 1e3 * low else (1.0,), numticks=8)


def _from_zero(axes: Axes, values: np.ndarray) -> None:
    """A linear axis that starts at 0."""
    finite = values[np.isfinite(values)]
    most = float(finite.max()) if len(finite) else 0.0
    axes.set_ylim(0, 1.08 * most if most > 0 else 1.0)


def _updates(axes: Axes, curves: Curves, *, last: bool = True, legend: bool = True) -> None:
    """The axis of updates, with lines where a stage begins and where the run was started again."""
    stage = curves.step.get("stage", np.ones(len(curves.update)))
    changes = curves.update[1:][np.diff(stage) > 0]
    for label, places, dash in (
        ("next stage, as logged", changes, "dotted"),
        ("started again", curves.resumed, "dashdot"),
    ):
        for number, place in enumerate(places):
            axes.axvline(place, color=GREY, linewidth=0.9, linestyle=dash, label=label if number == 0 else None)
    _whole_numbers(axes, curves.update)
    if last:
        axes.set_xlabel("update")
    if legend:
        _legend(axes)


def _whole_numbers(axes: Axes, values: np.ndarray) -> None:
    """An axis of counts, with room around a single one."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    room = max(0.5, 0.01 * (values[-1] - values[0]))
    axes.set_xlim(values[0] - room, values[-1] + room)


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, frameon=False, fontsize=8)


def _range_words(label: str, values: np.ndarray, unit: str = "") -> str:
    """First and last of a curve, and its extremes where they are neither."""
    ends = first_last(values)
    if ends is None:
        return f"{label} not logged"
    if ends["least"] == ends["most"]:
        return f"{label} {ends['last']:.4g}{unit}"
    said = f"{label} from {ends['first']:.4g}{unit} to {ends['last']:.4g}{unit}"
    extremes = [
        f"{name} {ends[name]:.4g}{unit}"
        for name in ("least", "most")
        if ends[name] not in (ends["first"], ends["last"])
    ]
    return said + (f" ({', '.join(extremes)})" if extremes else "")
