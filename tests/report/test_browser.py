"""The report's page is valid, asks for nothing, runs nothing, and fits a phone and a screen."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import html5lib
import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from report_rows import full_rows

from vmla_convert.report.pages import (
    EMBED_LIMIT_BYTES,
    Code,
    Picture,
    Section,
    Table,
    Text,
    to_html,
    to_markdown,
)
from vmla_convert.report.report import write_report
from vmla_convert.results import put_rows

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LAUNCH_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PHONE, SCREEN = 390, 1280
CELLS = [
    ["cache", "bytes", "cut", "velocity_error", "flow loss", "remark", "seeds"],
    ["dense", "512", "0 %", "0", "+0 %", "–", "0, 1"],
    ["a<b>&", "13", "97.5 %", "0.02 (0.01 to 0.03)", "diverged", "none", "1"],
    ["MLA calibrated 16+8", "25.6", "–", "7.5e-05", "-1.5 %", "–", "0"],
]
NUMERIC = ["bytes", "cut", "velocity_error", "flow loss"]


def png(folder: Path, name: str, size: tuple[int, int] = (1000, 500)) -> str:
    from PIL import Image

    Image.new("RGB", size, "white").save(folder / name)
    return name


def planted_sections(folder: Path) -> list[Section]:
    large = png(folder, "large sheet.png")
    with (folder / large).open("ab") as file:
        file.write(bytes(EMBED_LIMIT_BYTES))
    for name in ("plot.csv", "compare.mp4"):
        (folder / name).touch()
    long = "key = " + ", ".join(map(str, range(100)))
    return [
        Section("Answer", [Text("Use <b>this</b> & that.", lead=True), Code(long, "toml")]),
        Section("Every cache", [Table(CELLS, "All", 2), Text("A note & more.")]),
        Section("Plot", [Picture(png(folder, "plot.png"), 'What "it" shows', "plot.csv")]),
        Section("Sheet", [Picture(large, "A sheet that is too large", "compare.mp4")]),
        Section("Facts", [Table([["fact", "value"], ["rows", "70"], ["devices", "cpu"]], "F")]),
    ]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    path = folder / "report.html"
    path.write_text(to_html("Report <on> & about", planted_sections(folder), folder), "utf-8")
    return path


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole report, which `page_file` is not."""
    folder = tmp_path_factory.mktemp("sweep")
    put_rows(folder / "rows.jsonl", full_rows())
    write_report(folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if executable is None:
        pytest.skip("no chromium found; install: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=LAUNCH_ARGS)
        yield browser
        browser.close()


def artefact(name: str) -> Path:
    """Where a picture for people to look at goes."""
    folder = Path(os.environ.get("VMLA_ARTEFACTS") or ROOT / ".artefacts")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


@dataclass
class Visit:
    """A page that is open, what it asked for and what it complained about."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@contextmanager
def opened(browser: Browser, path: Path) -> Iterator[Visit]:
    """The page at a path; that it said nothing on the console is checked at the end."""
    page = browser.new_page(viewport={"width": SCREEN, "height": 800})
    visit = Visit(page)
    page.on("request", lambda request: visit.requests.append(request.url))
    page.on("console", lambda message: visit.complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: visit.complaints.append(str(error)))
    page.goto(path.as_uri())
    yield visit
    page.close()
    assert visit.complaints == []


@pytest.fixture
def visit(browser: Browser, page_file: Path) -> Iterator[Visit]:
    with opened(browser, page_file) as visit:
        yield visit


@pytest.mark.parametrize("which", ["page_file", "report_file"])
def test_html_is_valid(which: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(which)
    parser = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
    tree = parser.parse(path.read_text("utf-8"))
    ids = [element.get("id") for element in tree.iter() if element.get("id")]
    assert len(set(ids)) == len(ids)
    links = [element.get("href") for element in tree.iter("a")]
    assert {link for link in links if link.startswith("#")} <= {f"#{name}" for name in ids}
    labels = {element.get("aria-labelledby") for element in tree.iter()} - {None}
    assert labels <= set(ids)


def test_markdown_has_the_same_blocks(tmp_path: Path) -> None:
    markdown = to_markdown("t", planted_sections(tmp_path))
    assert '![What "it" shows](plot.png)\n\n[plot.csv](plot.csv)' in markdown
    assert "](large%20sheet.png)" in markdown
    assert "| --- | ---: | ---: | ---: | ---: | --- | --- |" in markdown
    assert r"| **a\<b>&** |" in markdown
    assert "```toml\nkey = 0, 1" in markdown


def test_opens_without_asking_for_anything_else(visit: Visit, page_file: Path) -> None:
    visit.page.wait_for_load_state("networkidle")
    asked = [url for url in visit.requests if not url.startswith("data:")]
    assert asked == [page_file.as_uri(), (page_file.parent / "large sheet.png").as_uri()]
    widths = "[...document.images].map((image) => image.naturalWidth)"
    assert visit.page.evaluate(widths) == [1000, 1000]


def test_every_link_is_relative_and_leads_somewhere(visit: Visit, page_file: Path) -> None:
    links = visit.page.locator("a")
    hrefs = [link.get_attribute("href") or "" for link in links.all()]
    files = [href for href in hrefs if not href.startswith("#")]
    assert files == ["plot.png", "plot.csv", "large%20sheet.png", "compare.mp4"]
    assert all((page_file.parent / href.replace("%20", " ")).is_file() for href in files)


def test_numbers_are_marked_and_the_chosen_line_is(visit: Visit) -> None:
    table = visit.page.locator("table").first
    assert table.locator('thead [data-kind="number"]').all_inner_texts() == NUMERIC
    chosen = table.locator("tr[aria-current] > *").all_inner_texts()
    assert chosen == CELLS[2]


def test_the_answer_is_the_first_and_largest_text(visit: Visit) -> None:
    visit.page.set_viewport_size({"width": PHONE, "height": 844})
    lead = visit.page.locator(".lead")
    assert lead.inner_text() == "Use <b>this</b> & that."
    box = lead.bounding_box()
    assert box is not None
    assert box["y"] + box["height"] < 844
    size = "(element) => parseFloat(getComputedStyle(element).fontSize)"
    paragraph = visit.page.locator("main p:not(.lead)").first
    assert lead.evaluate(size) > 1.2 * paragraph.evaluate(size)


def test_light_and_dark_are_the_systems(visit: Visit) -> None:
    def colours() -> list[str]:
        style = "getComputedStyle(document.body)"
        return visit.page.evaluate(f"[{style}.backgroundColor, {style}.color]")

    visit.page.emulate_media(color_scheme="light")
    paper, ink = colours()
    visit.page.emulate_media(color_scheme="dark")
    night, glow = colours()
    assert brightness(paper) > 4 * brightness(ink)
    assert brightness(glow) > 4 * brightness(night)


def brightness(colour: str) -> int:
    """The sum of the channels of `rgb(r, g, b)`."""
    return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(",")))


def test_contents_lead_to_sections(visit: Visit) -> None:
    for width in (SCREEN, PHONE):
        visit.page.set_viewport_size({"width": width, "height": 844})
        visit.page.get_by_role("link", name="Every cache").click()
        assert visit.page.url.endswith("#section-every-cache")


@pytest.mark.parametrize("width", [PHONE, SCREEN])
def test_a_report_fits_its_width_and_is_kept_as_pictures(
    browser: Browser, page_file: Path, report_file: Path, width: int
) -> None:
    overflow = "document.documentElement.scrollWidth - window.innerWidth"
    for path in (page_file, report_file):
        with opened(browser, path) as visit:
            visit.page.set_viewport_size({"width": width, "height": 844})
            assert visit.page.evaluate(overflow) <= 0
    with opened(browser, report_file) as visit:
        visit.page.set_viewport_size({"width": width, "height": 844})
        for scheme in ("light", "dark"):
            visit.page.emulate_media(color_scheme=scheme)
            path = artefact(f"report-{width}-{scheme}.png")
            visit.page.screenshot(path=path, full_page=True)


def test_a_phone_shows_the_answer_of_a_report_at_once(browser: Browser, report_file: Path) -> None:
    with opened(browser, report_file) as visit:
        visit.page.set_viewport_size({"width": PHONE, "height": 844})
        box = visit.page.locator(".lead").bounding_box()
        assert box is not None
        assert box["y"] + box["height"] < 844


def test_wide_tables_scroll_in_their_box_and_keep_the_first_column(visit: Visit) -> None:
    visit.page.set_viewport_size({"width": PHONE, "height": 844})
    box = visit.page.locator(".wide").first
    assert box.evaluate("(element) => element.scrollWidth > element.clientWidth")
    cell = box.locator("tbody th").first
    before = cell.bounding_box()
    box.evaluate("(element) => element.scrollTo(200, 0)")
    assert cell.bounding_box() == before
