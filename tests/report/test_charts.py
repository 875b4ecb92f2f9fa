"""Drawings: the page's own ink, ids that meet no others, words for those who do not see them."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from tolerances import DRAWN_POINTS

from finetune import pages
from finetune.reports import charts
from finetune.reports.metrics import Training

PAGES = Path(pages.__file__).parent


def training(num_steps: int = 50, **more) -> Training:
    rng = np.random.default_rng(0)
    steps = tuple(
        {
            "step": n,
            "loss": 3 / n + 0.1 * rng.random(),
            "grad_norm": 1 + rng.random(),
            "learning_rate": 1e-3 / n,
            "tokens": 100,
            "seconds": 0.5 + rng.random(),
            **({"spikes": ["loss 9"]} if n == 7 else {}),
            **more,
        }
        for n in range(1, num_steps + 1)
    )
    return Training(steps, ((10, 1.0), (num_steps, 0.5)))


def parsed(chart: charts.Chart) -> ET.Element:
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return ET.fromstring(chart.svg.replace("<svg", f"<svg {spaces}", 1))


def points_of(chart: charts.Chart, variable: str) -> list[tuple[float, float]]:
    """The points of the longest line of that colour."""
    paths = [
        element.get("d", "")
        for element in parsed(chart).iter("{http://www.w3.org/2000/svg}path")
        if f"stroke: var({variable})" in element.get("style", "")
    ]
    longest = max(paths, key=len)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", longest)]


def test_every_curve_is_drawn():
    names = [chart.name for chart in charts.draw(training(peak_memory_mib=123.0))]
    assert names == ["loss", "heldout", "learning_rate", "grad_norm", "speed", "memory"]
    assert charts.draw(Training()) == []


def test_ink_and_font_are_the_pages():
    for chart in charts.draw(training()):
        colours = re.findall(r"(?:fill|stroke): ([^;\"]+)", chart.svg)
        assert {c for c in colours if not c.startswith("var(")} <= {"none"}
        assert "#0102" not in chart.svg and "DejaVu" not in chart.svg
        used = set(re.findall(r"var\((--[a-z0-9-]+)\)", chart.svg))
        assert {"--faint", "--line"} <= used
        css = "".join((PAGES / name).read_text() for name in ("page.css", "report.css"))
        assert all(f"{name}:" in css for name in used)


def test_ids_are_unlike_any_others():
    drawn = charts.draw(training())
    ids = [found for chart in drawn for found in re.findall(r'\bid="([^"]*)"', chart.svg)]
    assert ids and len(ids) == len(set(ids))
    for chart in drawn:
        own = set(re.findall(r'\bid="([^"]*)"', chart.svg))
        assert all(name.startswith(f"{chart.name}-") for name in own)
        assert set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', chart.svg)) == own


def test_words_say_what_is_drawn():
    made = training()
    loss = charts.draw(made)[0]
    root = parsed(loss)
    assert root.get("role") == "img"
    values = [line["loss"] for line in made.steps]
    assert f"from {values[0]:.4f} to {values[-1]:.4f}, lowest {min(values):.4f}" in loss.description
    assert root.get("aria-label") == f"{loss.title}. {loss.description}"
    assert "Marked as spikes: 1." in loss.description
    assert [key.curve for key in loss.keys] == ["raw", "1", "2", "mark"]


def test_the_line_is_the_numbers():
    made = training(30)
    points = points_of(charts.draw(made)[2], "--curve-1")
    rates = [line["learning_rate"] for line in made.steps]
    drawn = np.array(points)
    assert len(drawn) == 30
    for place, values in ((0, [line["step"] for line in made.steps]), (1, rates)):
        slope, offset = np.polyfit(values, drawn[:, place], 1)
        assert np.abs(slope * np.array(values) + offset - drawn[:, place]).max() < DRAWN_POINTS
    assert drawn[0, 1] < drawn[-1, 1]  # y grows downwards: the rate falls


def test_long_runs_are_thinned_and_it_is_said():
    few, many = training(50), training(20_000)
    assert charts.thinning_note(few) == ""
    assert "20,000 steps are drawn as 400 stretches" in charts.thinning_note(many)
    assert sum(len(chart.svg) for chart in charts.draw(many)) < 300_000


def test_the_same_numbers_give_the_same_bytes():
    assert charts.draw(training()) == charts.draw(training())


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, -5.0])
@pytest.mark.parametrize("num_steps", [1, 2, 40])
def test_strange_numbers_are_drawn(value, num_steps):
    made = training(num_steps, loss=value, grad_norm=value, learning_rate=value)
    assert len(charts.draw(made)) >= 4
