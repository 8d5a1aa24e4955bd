"""The report's page is valid, asks for nothing, fits a phone and a screen, and its tables sort."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import html5lib
import pytest
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from vmla_convert.pipelines.report import write_report
from vmla_convert.pipelines.report.cells import cell_value, html_table, numeric_columns
from vmla_convert.pipelines.report.pages import (
    EMBED_LIMIT_BYTES,
    Section,
    to_html,
    to_markdown,
)
from vmla_convert.results import Row, append_rows

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parent.parent
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
ABSENT = "–"
# Each column of numbers in ascending order, as the page must sort it; `absent` comes last.
SORTED_COLUMNS = {
    "velocity_error": ["0", "7.5e-05", "0.00211", "0.028", "0.3", "diverged", ABSENT],
    "loss above dense": ["−92.7 %", "+0 %", "+2.0 %", "+14 %", "+140 %", "+1640 %", ABSENT],
    "scalars/token": ["13", "24.7 (24)", "25 (16+8)", "73–74", "256 (224+32)", "1536", ABSENT],
    "cache": ["512 kB", "44 MB", "440 MB", "6.04 GB", "7 GiB", "12.7 GB", ABSENT],
    "PSNR": ["-3 dB", "1.3 ± 0.2", "2", "9.5", "12.7", "100", ABSENT],
}
# Neither ascending nor descending, and the same for every column.
SHUFFLE = [3, 6, 0, 5, 1, 4, 2]
INITS = ["random", "calibrated", "spectral", "a<b>&", "rank 9", "rank 10", "dense"]


def planted_table() -> list[list[str]]:
    columns = list(SORTED_COLUMNS.values())
    lines = [[INITS[i], *(column[i] for column in columns)] for i in SHUFFLE]
    return [["init", *SORTED_COLUMNS], *lines]


def png(folder: Path, name: str, size: tuple[int, int] = (1000, 500)) -> str:
    from PIL import Image

    Image.new("RGB", size, "white").save(folder / name)
    return name


def sweep_rows() -> list[Row]:
    """A sweep with recovery over inits, layers and sizes, as a user's report shows it."""
    rows = [
        Row("flow_loss", 0.04, "mse", "dense"),
        Row("cache_scalars_per_token", 1536, "scalars", "dense"),
    ]
    for i, init in enumerate(("calibrated", "spectral", "random")):
        for rank in (96, 192, 224, 288):
            fields: dict[str, Any] = {
                "run": f"{init}-{rank}",
                "init": init,
                "kv_lora_rank": rank,
                "qk_rope_head_dim": 32,
                "latent": "joint",
            }
            rows.append(Row("cache_scalars_per_token", rank + 32, "scalars", **fields))
            for step in (0, 100, 500):
                error = 8**i / rank / (1 + step / 50)
                rows.append(Row("velocity_error", error, "share", step=step, **fields))
                rows.append(Row("flow_loss", 0.04 * (1 + 9 * error), "mse", step=step, **fields))
    return rows


def planted_sections(folder: Path) -> list[Section]:
    large = png(folder, "large sheet.png")
    with (folder / large).open("ab") as file:
        file.write(bytes(EMBED_LIMIT_BYTES))
    for name in ("plot.csv", "compare.mp4"):
        (folder / name).touch()
    facts = [["fact", "value"], ["rows", "70"], ["devices", "cpu"], ["latent", "joint, split"]]
    return [
        Section("Answer", lead="Use <b>this</b> & that. It cuts the cache by 90.2 %."),
        Section("Every setting", table=planted_table(), marked=3, paragraphs=["A note & more."]),
        Section("Plot", image=png(folder, "plot.png"), alt='What "it" shows', data="plot.csv"),
        Section("Plot", image=large, alt="A sheet that is too large", link="compare.mp4"),
        Section("Провенанс", table=facts),
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
    append_rows(folder / "rows.jsonl", sweep_rows())
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


def texts(rows: Locator, column: int) -> list[str]:
    return rows.locator(f":nth-child({column + 1})").all_inner_texts()


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("0.00211", 0.00211), ("7.5e-05", 7.5e-05), ("+14 %", 14), ("−92.7 %", -92.7),
        ("-3", -3), ("6.04 GB", 6.04e9), ("440 MB", 440e6), ("1 KiB", 1024), ("1.3 ± 0.2", 1.3),
        ("1.3 ± 0.2 GB", 1.3e9), ("24.7 (24)", 24.7), ("25 (16+8)", 25), ("73–74", 73),
        ("4.3×", 4.3), ("2 min", 120), ("diverged", float("inf")), ("calibrated", None),
        ("16+8", None), ("2 latents", None), ("0, 1", None), ("1.2.3", None), ("", None),
    ],
)  # fmt: skip
def test_a_cell_is_worth_its_number_in_the_base_unit(cell: str, value: float | None) -> None:
    assert cell_value(cell) == (None if value is None else pytest.approx(value))


def test_a_column_holds_numbers_when_all_its_cells_do() -> None:
    table = [["a", "b", "c", "d"], ["1", "1", "x", ABSENT], [ABSENT, "x", "y", ABSENT]]
    assert numeric_columns(table) == [True, False, False, False]


def test_cells_carry_the_value_they_are_sorted_by_and_absent_ones_none() -> None:
    html = html_table([["size"], ["440 MB"], [ABSENT], ["diverged"]], None, "sizes")
    assert re.findall(r'data-sort="(.*?)"', html) == ["440000000.0", "Infinity"]


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


def test_the_check_of_html_finds_errors() -> None:
    with pytest.raises(html5lib.html5parser.ParseError):
        html5lib.HTMLParser(strict=True).parse("<!doctype html><title>x</title><div><p>x</div></p>")


def test_images_stay_within_the_budget_of_the_page(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(4)]
    for name in names:
        (tmp_path / name).write_bytes(bytes(EMBED_LIMIT_BYTES))
    html = to_html("t", [Section(name, image=name) for name in names], tmp_path)
    assert len(html) < 3_000_000
    assert html.count("data:image/png") == 2
    assert '<img src="3.png"' in html


def test_markdown_links_the_data_of_a_plot() -> None:
    markdown = to_markdown("t", [Section("s", image="p.png", alt="a", data="p.csv")])
    assert "![a](p.png)\n\n[p.csv](p.csv)" in markdown


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


@pytest.mark.parametrize("column", range(len(SORTED_COLUMNS)))
def test_a_click_sorts_numbers_as_numbers_and_absent_ones_last(visit: Visit, column: int) -> None:
    name, expected = list(SORTED_COLUMNS.items())[column]
    table = visit.page.locator("table").first
    header = table.locator("thead th", has_text=name)
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert texts(table.locator("tbody tr"), column + 1) == expected
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "descending"
    assert texts(table.locator("tbody tr"), column + 1) == [*expected[-2::-1], ABSENT]


def test_words_sort_too_and_the_marked_line_stays_marked(visit: Visit) -> None:
    table = visit.page.locator("table").first
    marked = table.locator("tr[aria-current]").inner_text()
    table.locator("thead button").first.click()
    expected = ["a<b>&", "calibrated", "dense", "random", "rank 9", "rank 10", "spectral"]
    assert texts(table.locator("tbody tr"), 0) == expected
    assert table.locator("tr[aria-current]").inner_text() == marked


def test_keyboard_sorts_and_one_column_at_a_time_is_sorted(visit: Visit) -> None:
    table = visit.page.locator("table").first
    buttons = table.locator("thead button")
    buttons.nth(0).press("Enter")
    visit.page.keyboard.press("Tab")
    visit.page.keyboard.press("Space")
    headers = table.locator("thead th")
    assert headers.nth(0).get_attribute("aria-sort") is None
    assert headers.nth(1).get_attribute("aria-sort") == "ascending"
    assert texts(table.locator("tbody tr"), 1) == SORTED_COLUMNS["velocity_error"]


def test_each_table_sorts_alone(visit: Visit) -> None:
    first, second = visit.page.locator("table").all()
    before = first.inner_text()
    second.locator("thead button").first.click()
    assert texts(second.locator("tbody tr"), 0) == ["devices", "latent", "rows"]
    assert first.inner_text() == before


def test_the_button_turns_light_into_dark_and_back(visit: Visit) -> None:
    def background() -> str:
        return visit.page.evaluate("getComputedStyle(document.body).backgroundColor")

    light = background()
    toggle = visit.page.get_by_role("button", name="Light or dark")
    toggle.click()
    assert background() != light
    toggle.click()
    assert background() == light
    visit.page.emulate_media(color_scheme="dark")
    assert background() == light


def test_contents_are_folded_on_a_phone_and_open_on_a_screen(visit: Visit) -> None:
    link = visit.page.get_by_role("link", name="Every setting")
    assert link.is_visible()
    visit.page.set_viewport_size({"width": PHONE, "height": 844})
    link.wait_for(state="hidden")
    visit.page.locator("summary").click()
    link.click()
    assert visit.page.url.endswith("#section-every-setting")


def test_everything_can_be_read_without_a_script(browser: Browser, page_file: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    assert page.get_by_role("link", name="Every setting").is_visible()
    assert page.locator("table").count() == 2
    assert page.locator("button").count() == 0
    context.close()


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


def test_wide_tables_scroll_in_their_box_with_the_first_column_in_sight(visit: Visit) -> None:
    visit.page.set_viewport_size({"width": PHONE, "height": 844})
    box = visit.page.locator(".wide").first
    assert box.evaluate("(element) => element.scrollWidth > element.clientWidth")
    cell = box.locator("tbody th").first
    before = cell.bounding_box()
    box.evaluate("(element) => element.scrollTo(200, 0)")
    assert cell.bounding_box() == before
