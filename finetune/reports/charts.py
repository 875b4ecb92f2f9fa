"""Curves of a run as SVG that stands in a page: its ink is the page's, in light and in dark.

matplotlib draws with placeholder colours, which are then replaced by the page's own variables; text
stays text in the page's font. Each drawing has a name and a description for those who do not see
it. The same numbers give the same bytes.
"""

from __future__ import annotations

import html
import io
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.reports.metrics import (
    MOST_BINS,
    Numbers,
    Series,
    Training,
    smoothed,
    span_of,
    thinned,
)
from finetune.reports.wording import decimal, power, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What is drawn with, and what stands in the page for it (pages/report.css).
_INK, _GRID, _RAW, _FIRST, _SECOND, _MARK = (f"#0102{n:02x}" for n in range(3, 9))
_VARIABLES = {
    _INK: "var(--faint)",
    _GRID: "var(--line)",
    _RAW: "var(--curve-raw)",
    _FIRST: "var(--curve-1)",
    _SECOND: "var(--curve-2)",
    _MARK: "var(--curve-mark)",
}
_WIDTH, _HEIGHT = 5.4, 2.7  # inches of 72 units; about the size it has in a column
_FONT = "system-ui, sans-serif"
_ID = re.compile(r'\b(id="|xlink:href="#|url\(#)')
_USED = re.compile(r'(?:xlink:href="#|url\(#)([^")]+)')


@dataclass(frozen=True)
class Key:
    """An entry of a drawing's legend.

    Attributes:
        curve: raw, 1, 2 or mark; the class in the page's style.
        text: what it is.
    """

    curve: str
    text: str


@dataclass(frozen=True)
class Chart:
    """One drawing.

    Attributes:
        name: short, for ids.
        title: above it.
        description: what it shows, in words.
        keys: its legend.
        svg: the drawing.
    """

    name: str
    title: str
    description: str
    keys: tuple[Key, ...]
    svg: str


def draw(training: Training) -> list[Chart]:
    """Every curve the metrics have numbers for."""
    return [chart for chart in _charts(training) if chart is not None]


def thinning_note(training: Training) -> str:
    """What the drawings leave out; empty where every step is drawn."""
    num_steps = len(training.steps)
    if num_steps <= 2 * MOST_BINS:
        return ""
    return (
        f"{num_steps:,} steps are drawn as {MOST_BINS} stretches, of each its smallest and its "
        "largest value; metrics.jsonl has every step."
    )


def _charts(training: Training) -> Iterator[Chart | None]:
    yield _loss(training)
    yield _heldout(training)
    yield _column(training, "learning_rate", "Learning rate", power)
    yield _column(training, "grad_norm", "Gradient norm", decimal, marks=True)
    yield _curve("speed", "Tokens a second", training.speed, whole, has_raw=True)
    if training.memory is not None:
        name, series = training.memory
        yield _curve("memory", name.replace("_", " ").capitalize(), series, whole)


def _loss(training: Training) -> Chart | None:
    """Every step faint, smoothed over it, held-out losses and spikes on top."""
    series = training.series("loss")
    if not len(series[0]):
        return None
    span = span_of(len(series[0]))
    even = smoothed(series[1], span)
    title, description = "Loss, nats a token", _describe("Training loss", series, decimal)
    description += f" Smoothed it ends at {decimal(float(even[-1]))}."
    keys = [Key("raw", "training, each step"), Key("1", f"smoothed over {span} steps")]
    if training.heldout:
        keys.append(Key("2", "held out"))
        description += f" Held-out loss at last {decimal(training.heldout[-1][1])}."
    steps = _spike_points(training, series)
    if len(steps[0]):
        keys.append(Key("mark", "spike"))
        description += f" Marked as spikes: {len(steps[0]):,}."

    def plot(axes: Axes) -> None:
        _raw(axes, series)
        axes.plot(*thinned((series[0], even)), color=_FIRST, linewidth=1.6)
        if training.heldout:
            _points(axes, *zip(*training.heldout, strict=True))
        _limit(axes, [*_inner(series[1]), *even, *(loss for _, loss in training.heldout)])
        _marks(axes, steps)

    return Chart("loss", title, description, tuple(keys), _svg("loss", title, description, plot))


def _heldout(training: Training) -> Chart | None:
    if len(training.heldout) < 2:
        return None
    losses = [loss for _, loss in training.heldout]
    title = "Held-out loss, nats a token"
    best = min(training.heldout, key=lambda pair: pair[1])
    description = (
        f"Held-out loss at {len(losses)} steps: from {decimal(losses[0])} to {decimal(losses[-1])},"
        f" lowest {decimal(best[1])} at step {best[0]:,}."
    )

    def plot(axes: Axes) -> None:
        _points(axes, *zip(*training.heldout, strict=True))

    svg = _svg("heldout", title, description, plot)
    return Chart("heldout", title, description, (Key("2", "held out"),), svg)


def _column(
    training: Training,
    column: str,
    title: str,
    show: Callable[[float], str],
    marks: bool = False,
) -> Chart | None:
    series = training.series(column)
    points = _spike_points(training, series) if marks else None
    return _curve(column, title, series, show, marks, points)


def _curve(
    name: str,
    title: str,
    series: Series,
    show: Callable[[float], str],
    has_raw: bool = False,
    points: Series | None = None,
) -> Chart | None:
    """One line; a noisy one faint, with a smoothed one on it."""
    if not len(series[0]):
        return None
    span = span_of(len(series[0]))
    even = smoothed(series[1], span) if has_raw else series[1]
    description = _describe(title, series, show)
    keys = [Key("1", f"smoothed over {span} steps" if has_raw else "each step")]
    if has_raw:
        keys.insert(0, Key("raw", "each step"))
    if points is not None and len(points[0]):
        keys.append(Key("mark", "spike"))
        description += f" Marked as spikes: {len(points[0]):,}."

    def plot(axes: Axes) -> None:
        if has_raw:
            _raw(axes, series)
        axes.plot(*thinned((series[0], even)), color=_FIRST, linewidth=1.6)
        if has_raw:
            _limit(axes, [*_inner(series[1]), *even])
        if points is not None:
            _marks(axes, points)

    return Chart(name, title, description, tuple(keys), _svg(name, title, description, plot))


def _describe(what: str, series: Series, show: Callable[[float], str]) -> str:
    steps, values = series
    low = int(values.argmin())
    first, last, least = (show(float(v)) for v in (values[0], values[-1], values[low]))
    return (
        f"{what} over {len(values):,} steps: from {first} to {last}, lowest {least} at step "
        f"{int(steps[low]):,}."
    )


def _spike_points(training: Training, series: Series) -> Series:
    """The steps with a spike, at the values of this curve."""
    spiked = {step for step, _ in training.spikes}
    chosen = [place for place, step in enumerate(series[0]) if int(step) in spiked]
    return series[0][chosen], series[1][chosen]


def _raw(axes: Axes, series: Series) -> None:
    axes.plot(*thinned(series), color=_RAW, linewidth=0.8)


def _points(axes: Axes, steps: Sequence[float], values: Sequence[float]) -> None:
    marker = "o" if len(steps) <= 60 else ""
    axes.plot(steps, values, color=_SECOND, linewidth=1.4, marker=marker, markersize=3.5)


def _marks(axes: Axes, points: Series) -> None:
    """Crosses; one above the picture's edge stands at the edge."""
    low, high = axes.get_ylim()
    style: dict[str, Any] = {"marker": "x", "markersize": 5, "markeredgewidth": 1.5}
    heights = np.minimum(points[1], high)
    axes.plot(points[0], heights, color=_MARK, linestyle="none", clip_on=False, **style)
    axes.set_ylim(low, high)


def _inner(values: Numbers) -> Numbers:
    """The values that are not far outside: a spike must not flatten the rest of the curve."""
    low, high = sorted(values)[len(values) // 50], sorted(values)[-1 - len(values) // 50]
    room = 0.5 * (high - low)
    return values[(values >= low - room) & (values <= high + room)]


def _limit(axes: Axes, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - room, high + room)


def _svg(name: str, title: str, description: str, plot: Callable[[Axes], None]) -> str:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its font cache
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "path.simplify": True}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        plot(axes)
        _style(axes)
        file = io.StringIO()
        nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _for_page(file.getvalue(), name, title, description)


def _style(axes: Axes) -> None:
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.tick_params(colors=_INK, labelsize=10.5, length=0)
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.locator_params(axis="y", nbins=5)
    axes.set_xlabel("step", color=_INK, fontsize=10.5)
    for text in (axes.yaxis.get_offset_text(), axes.xaxis.get_offset_text()):
        text.set_color(_INK)
        text.set_fontsize(10.5)
    axes.margins(x=0.02)


def _for_page(svg: str, name: str, title: str, description: str) -> str:
    """The drawing alone, its ids unlike any other's, its colours the page's."""
    body = svg[svg.index("<svg") :]
    head, inner = body.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None, "matplotlib writes the size of what it drew"
    inner = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", inner, flags=re.DOTALL)
    inner = re.sub(r"<defs>\s*</defs>", "", inner)
    used = set(_USED.findall(inner))
    inner = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", inner)
    inner = _ID.sub(rf"\g<1>{name}-", inner)
    inner = re.sub(r"(font: [^';\"]*|font-family: )'[^;\"]*", rf"\g<1>{_FONT}", inner)
    for colour, variable in _VARIABLES.items():
        inner = inner.replace(colour, variable)
    inner = re.sub(r">\s+<", "><", inner).strip()
    label = html.escape(f"{title}. {description}", quote=True)
    return (
        f'<svg {box[0]} role="img" aria-label="{label}"><title>{html.escape(title)}</title>{inner}'
    )
