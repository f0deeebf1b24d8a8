"""What a viewer needs of report.html, asserted on the page that a browser has drawn."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cpt.telemetry.report.history import read_run
from cpt.telemetry.report.page import render_report, write_report
from cpt.telemetry.report.theme import DARK, LIGHT, contrast
from cpt.telemetry.run_overview import run_overview
from tests.support.browser import Browser, Page, running_browser
from tests.support.run_events import (
    checkpoint,
    end,
    guard,
    router,
    run_dir,
    start,
    step,
    traces,
)

LONG_NAME = "english_reference_of_the_untouched_model"
NUM_CHARTS = 15
"""Charts of a run with every panel but replies."""
NARROW = 390
WIDE = 1280
READY = "document.documentElement?.classList.contains('ready')"
FIGURES = "Bokeh.documents[0].roots()"
TEXTS_AND_SURFACES = """(() => {
  const found = [];
  for (const element of document.querySelectorAll("main *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || element.closest(".paint")) continue;
    const style = getComputedStyle(element);
    let below = element;
    while (getComputedStyle(below).backgroundColor === "rgba(0, 0, 0, 0)") {
      below = below.parentElement;
    }
    const surface = getComputedStyle(below).backgroundColor;
    found.push([style.color, surface, element.outerHTML.slice(0, 80)]);
  }
  return found;
})()"""
"""Color of every text with the surface below it."""


def all_kinds_of_events() -> list[dict[str, Any]]:
    """A run with every panel, a second start and a rollback."""
    events = [start(0), guard(0), guard(0, LONG_NAME)]
    for number in range(1, 61):
        if number == 31:
            events.append(start(30, time=1.8e9 + 2000, previous_end=1.8e9 + 1500))
        events.append(
            step(
                number,
                loss=4.0 - 0.02 * number,
                tokens=1000 + 100 * number,
                utilization=0.4,
                peak_memory_bytes=2**33,
                kl_by_source={"en_web": 0.001 * number},
                grad_norm=53.0 if number == 40 else 0.5,
            )
        )
        if number % 20 == 0:
            action = "raise_replay" if number == 40 else "none"
            events += [
                guard(number, state="red", delta_percent=3.0, action=action),
                guard(number, LONG_NAME, state="green"),
                traces(number),
                router(number),
                checkpoint(number),
            ]
    events.append({"event": "rollback", "step": 50, "from_step": 60, "to_step": 50})
    events += [step(51, tokens=6100), step(52, tokens=6200)]
    events += [guard(52, state="red", delta_percent=3.0), guard(52, LONG_NAME, state="green")]
    return [*events, end(52, exit_code=70, cause="rank 1 was killed by signal 9")]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(run_dir(tmp_path_factory.mktemp("run"), *all_kinds_of_events()))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as started:
        yield started


@pytest.fixture(scope="module")
def wide(browser: Browser, report: Path) -> Page:
    return opened(browser, report)


@pytest.fixture(scope="module")
def narrow_and_dark(browser: Browser, report: Path) -> Page:
    return opened(browser, report, width=NARROW, dark=True)


def opened(browser: Browser, report: Path, *, width: int = WIDE, dark: bool = False) -> Page:
    page = browser.open(report.as_uri(), width=width, dark=dark)
    page.wait_for(READY)
    return page


def test_state_and_headline_numbers_are_on_the_first_screen(wide: Page) -> None:
    word = "document.querySelector('.state .word')"
    assert wide.evaluate(f"{word}.innerText").startswith("failed")
    assert wide.evaluate(f"{word}.getBoundingClientRect().bottom") < 300
    first_screen = wide.evaluate("document.querySelector('main').innerText")[:1500]
    for told in (
        "step 52 of 30",
        "rank 1 was killed by signal 9 (exit code 70)",
        "Last loss",
        "Tokens/s, median",
        "Utilization\n40.0 %",
        "Peak memory\n8 GiB",
        "Goodput",
        "The guard now",
        "200 %",
    ):
        assert told in first_screen, told


def test_nothing_complains_in_the_console(wide: Page, narrow_and_dark: Page) -> None:
    assert wide.complaints == [] and narrow_and_dark.complaints == []


def test_page_has_the_width_of_the_window_and_cuts_no_name(
    wide: Page, narrow_and_dark: Page
) -> None:
    for page, width in ((wide, WIDE), (narrow_and_dark, NARROW)):
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert LONG_NAME in page.evaluate("document.body.innerText")
        cut = (
            "[...document.querySelectorAll('h2, h3, li, .tile *')]"
            ".filter((e) => e.clientWidth && e.scrollWidth > e.clientWidth + 1)"
            ".map((e) => e.outerHTML)"
        )
        assert page.evaluate(cut) == []


def test_every_chart_is_drawn_and_has_room(wide: Page, narrow_and_dark: Page) -> None:
    for page in (wide, narrow_and_dark):
        widths = page.evaluate(f"{FIGURES}.map((f) => Bokeh.index[f.id].frame.bbox.width)")
        assert len(widths) == NUM_CHARTS and min(widths) > 110
    scrolled = "document.querySelector('.table').scrollWidth"
    assert (
        narrow_and_dark.evaluate(f"{scrolled} - document.querySelector('.table').clientWidth") <= 0
    )
    widths = narrow_and_dark.evaluate(f"{FIGURES}.map((f) => Bokeh.index[f.id].bbox.width)")
    assert min(widths) > 300  # nothing stands side by side


def test_texts_are_readable_in_both_schemes(wide: Page, narrow_and_dark: Page) -> None:
    for page in (wide, narrow_and_dark):
        found = page.evaluate(TEXTS_AND_SURFACES)
        assert len(found) > 60
        for color, surface, where in found:
            ratio = contrast(as_hex(color), as_hex(surface))
            assert ratio >= 4.5, f"{ratio:.2f} {color} on {surface}: {where}"


def test_charts_follow_the_color_scheme(wide: Page, narrow_and_dark: Page) -> None:
    axis = f"{FIGURES}[0].below[0].major_label_text_color"
    assert wide.evaluate(axis) == LIGHT["ink"] and narrow_and_dark.evaluate(axis) == DARK["ink"]
    wide.show(width=WIDE, dark=True)
    wide.wait_for(f"{axis} === '{DARK['ink']}'")
    painted = wide.evaluate(f"getComputedStyle(Bokeh.index[{FIGURES}[0].id].el).backgroundColor")
    assert as_hex(painted) == DARK["card"]
    wide.show(width=WIDE)
    wide.wait_for(f"{axis} === '{LIGHT['ink']}'")


def test_axis_counts_in_tokens_on_request_and_in_steps_again(wide: Page) -> None:
    shown = f"(([f]) => [f.below[0].axis_label, f.x_range.end])({FIGURES})"
    spans = (
        f"{FIGURES}[0].center.filter((m) => m.type === 'Span' && m.dimension === 'height')"
        ".map((m) => m.location)"
    )
    before = wide.evaluate(shown)
    assert before[0] == "optimizer step" and sorted(wide.evaluate(spans)) == [30, 50]
    wide.evaluate("document.querySelector('input[value=tokens]').click()")
    label, last = wide.evaluate(shown)
    tokens = sum(1000 + 100 * number for number in range(1, 53)) / 1000
    assert label == "thousand predicted tokens"
    assert last > tokens * 0.99
    first_start = sum(1000 + 100 * number for number in range(1, 31)) / 1000
    assert min(wide.evaluate(spans)) == pytest.approx(first_start, rel=0.01)
    wide.evaluate("document.querySelector('input[value=steps]').click()")
    assert wide.evaluate(shown) == before and sorted(wide.evaluate(spans)) == [30, 50]


def test_pointer_on_a_chart_tells_the_values_of_the_step(wide: Page) -> None:
    box = wide.evaluate(
        f"(() => {{const view = Bokeh.index[{FIGURES}[0].id];"
        "view.el.scrollIntoView({block: 'center'});"
        "const box = view.el.getBoundingClientRect();"
        "return [box.x + view.frame.bbox.hcenter, box.y + view.frame.bbox.vcenter]})()"
    )
    wide.show(width=WIDE)
    wide.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] - 5, y=box[1])
    wide.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    texts = (
        "[...document.querySelectorAll('.bk-Tooltip')]"
        ".map((tip) => tip.shadowRoot.querySelector('.bk-tooltip-content').textContent).join()"
    )
    wide.wait_for(f"{texts}.includes('step')")
    told = wide.evaluate(texts)
    assert re.search(r"step\d+", told) and "all" in told and "ja" in told


def test_times_are_told_in_the_zone_of_the_reader_and_in_utc(
    browser: Browser, tmp_path: Path
) -> None:
    events = [start(0), start(0, time=1.8e9 + 60, previous_end=1.8e9 + 30)]
    report = write_report(run_dir(tmp_path, *events))
    page = browser.open("about:blank#zone", width=WIDE)
    page.call("Emulation.setTimezoneOverride", timezoneId="Asia/Tokyo")
    page.call("Page.navigate", url=report.as_uri())
    page.wait_for(f"location.protocol === 'file:' && {READY}")
    told = page.evaluate("document.querySelector('td time').textContent")
    assert "5:00:00" in told and "(2027-01-15 08:00 UTC)" in told
    assert "ago" in page.evaluate("document.querySelector('header time').textContent")


def test_old_page_of_a_running_run_says_that_it_is_old(browser: Browser, tmp_path: Path) -> None:
    folder = run_dir(tmp_path, start(0))
    overview = replace(run_overview(folder), state="running")
    text = render_report(overview, read_run(folder))
    pages = {"new": text, "old": re.sub(r'("age written" datetime=")....', r"\g<1>2020", text)}
    shown = {}
    for name, content in pages.items():
        (folder / f"{name}.html").write_text(content, encoding="utf-8")
        page = opened(browser, folder / f"{name}.html")
        shown[name] = "This page is old" in page.evaluate("document.body.innerText")
    assert shown == {"new": False, "old": True}


def test_paper_gets_every_chart_in_light_colors(narrow_and_dark: Page) -> None:
    page = narrow_and_dark
    page.evaluate("""addEventListener("beforeprint", () => {
        window.copies = [...document.querySelectorAll("canvas.printed")].map((copy) => {
            const scale = copy.width / copy.closest(".charts > div").clientWidth;
            const pixels = copy.getContext("2d").getImageData(0, 0, copy.width, copy.height).data;
            let painted = 0, bright = 0;
            for (let i = 0; i < pixels.length; i += 4) {
                if (pixels[i + 3] < 200) continue;
                painted += 1;
                if (pixels[i] > 225 && pixels[i + 1] > 225 && pixels[i + 2] > 240) bright += 1;
            }
            return [painted, bright, scale];
        });
        window.ink = Bokeh.documents[0].roots()[0].below[0].major_label_text_color;
    }); 1""")
    paper = page.pdf()
    copies = page.evaluate("window.copies")
    assert len(copies) == NUM_CHARTS
    for painted, bright, scale in copies:
        assert painted > 500  # axes and lines
        assert bright < 0.5 * painted  # no line in the light ink of the dark scheme
        assert 0.9 <= scale <= 1.1
    assert page.evaluate("window.ink") == LIGHT["ink"]
    num_pages = len(re.findall(rb"/Type /Page\b", paper))
    assert 2 <= num_pages <= 6
    # and the screen is dark again
    assert page.evaluate("document.querySelectorAll('canvas.printed').length") == 0
    assert page.evaluate(f"{FIGURES}[0].below[0].major_label_text_color") == DARK["ink"]
    assert page.complaints == []


def as_hex(color: str) -> str:
    """Return a computed color, such as rgb(0, 114, 178), as #0072b2."""
    channels = [int(part) for part in re.findall(r"\d+", color)[:3]]
    return "#" + "".join(f"{channel:02x}" for channel in channels)
