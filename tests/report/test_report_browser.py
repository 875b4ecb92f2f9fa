"""A real browser shows the page: nothing fetched, no complaint, nothing wider than the screen."""

from __future__ import annotations

import pytest
from browser import browsing, find_browser
from reported import write_result

from finetune.__main__ import main as command

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the path")
SCREENS = [(1280, 900), (390, 844)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(BROWSER, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(run, tmp_path):
    """The page of a run whose rows have long words and long texts."""
    long = "x" * 900 + " " + "word " * 100
    lines = [
        {"where": f"{'deep/' * 30}rows.jsonl:{i}", "prompt": long, "expected": [long]}
        | {"written": long, "score": float(i % 2)}
        for i in range(12)
    ]
    models = ("adapter", "base", "merged", "other-model-with-a-long-name")
    compared = {name: {"loss": {"difference": -0.5, "low": -1, "high": 0}} for name in models[1:]}
    write_result(run, dict.fromkeys(models, lines), compared=compared, data="y" * 300)
    run.write_state(state="failed", exit_code=4, reason="z" * 300)
    assert command(["report", str(run.path), "--out", str(tmp_path / "page.html")]) == 0
    return tmp_path / "page.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height"), SCREENS)
def test_the_page_is_shown(browser, page, width, height, dark):
    browser.open(page, width, height, dark)
    assert browser.complaints == []
    assert browser.requests == [page.as_uri()]
    browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.value("innerWidth") == width
    assert browser.value("document.documentElement.scrollWidth") == width
    # What is wider than the screen lies in a box of its own that scrolls.
    outside = """[...document.body.querySelectorAll('*')]
        .filter(e => !e.closest('.scroll, svg') && e.getBoundingClientRect().right > innerWidth + 1)
        .map(e => e.tagName + '.' + e.className)"""
    assert browser.value(outside) == []
    # Every drawing has ink that stands out from the ground, in both modes.
    colours = browser.value(
        "[...document.querySelectorAll('svg text')].map(e => getComputedStyle(e).fill)"
    )
    ground = browser.value("getComputedStyle(document.body).backgroundColor")
    assert colours and min(contrast(colour, ground) for colour in set(colours)) > 4.5
    assert (contrast(ground, "rgb(0, 0, 0)") < 2) == dark
    for variable in ("--curve-1", "--curve-2", "--curve-mark", "--ink", "--faint", "--accent"):
        paint = f"document.body.style.outlineColor = 'var({variable})'"
        browser.value(paint)
        colour = browser.value("getComputedStyle(document.body).outlineColor")
        assert contrast(colour, ground) > 3, variable
    assert browser.screenshot()[:4] == b"\x89PNG"


def test_a_script_in_a_page_would_not_run(browser, page):
    """The policy itself: even markup that got through could do nothing."""
    text = page.read_text()
    script = "<script>document.title = 'run'</script><img src='http://example.org/x.png'>"
    page.write_text(text.replace("</body>", f"{script}</body>"))
    browser.open(page, 1280, 900, False)
    assert browser.value("document.title") != "run"
    assert len(browser.complaints) >= 2
    assert all("Content Security Policy" in complaint for complaint in browser.complaints)


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio of two colours as browsers write them."""
    light = sorted(luminance(colour) for colour in (one, other))
    return (light[1] + 0.05) / (light[0] + 0.05)


def luminance(colour: str) -> float:
    parts = colour[colour.index("(") + 1 : -1].replace(",", " ").split()[:3]
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (float(part) / 255 for part in parts)
    ]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
