"""The report as a page: opened in a real browser, read, clicked and attacked."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from archdsl.search.report.html import page, write_page
from tests.search.results import made_up

ATTACK = (
    "<b>&lt;i&gt;</script><script>document.title='owned'</script>"
    "<img src=x onerror=document.title='owned'>"
)
WRITTEN_BEFORE = Path(__file__).parents[2] / "written_before" / "study"
NONE = "\N{EN DASH}"  # in a cell that has no figure
# what is drawn in each section, and at least how many of it
MARKS = {
    "front": (".scatterlayer .point", 10),
    "baselines": ("svg.interval circle", 4),
    "curves": (".scatterlayer .js-line", 5),
    "choices": ("#importance-bars .fill", 3),
    "parallel": ("path", 5),
    "routers": (".heat td", 6),
    "winner": (".tree tbody tr", 10),
    "validation": (".scatterlayer .point", 20),
    "spending": (".fill", 8),
    "trials": ("tbody tr", 30),
    "settings": ("dd", 5),
}


class Scripts(HTMLParser):
    """The scripts of a page, as a browser takes them apart."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags = [""]
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "script":
            self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags[-1] == "script":
            self.texts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.tags.append("")


def hostile(value: Any, *, key: str = "") -> Any:
    """The result with markup in every text that a stranger may have written."""
    match value:
        case dict() if key in ("choices", "importance", "shares", "entropies", "versions"):
            return {name + ATTACK: hostile(inner) for name, inner in value.items()}
        case dict():
            return {name: hostile(inner, key=name) for name, inner in value.items()}
        case list():
            return [hostile(inner, key=key) for inner in value]
        case str() if key != "axes":
            return f"{value} {ATTACK}" if key != "role" else value
        case _:
            return value


@pytest.fixture(scope="module")
def _browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    found = shutil.which("chromium"), shutil.which("chromedriver")
    if None in found:
        # where everything must be tested, a missing browser is a failure
        (pytest.fail if os.environ.get("ARCHDSL_CI") else pytest.skip)("chromium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = str(found[0])
    for option in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "no-first-run",
        "force-prefers-reduced-motion",  # what is scrolled to is there at once
        "window-size=1200,900",
        f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(found[1])))
    try:
        yield driver
    finally:
        driver.quit()


class Reader:
    """Opens a result in the browser and looks at it."""

    def __init__(self, driver: webdriver.Chrome, file: Path) -> None:
        self.driver, self.file = driver, file

    def open(self, result: dict[str, Any], fragment: str = "") -> None:
        write_page(result, self.file)
        self.driver.get("about:blank")
        for kind in ("browser", "performance"):
            self._log(kind)
        self.driver.get(f"{self.file.as_uri()}{fragment}")

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def show(self, selector: str) -> None:
        self.js(f"document.querySelector('{selector}').scrollIntoView({{behavior: 'instant'}})")

    def js(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def wait(self, selector: str, least: int = 1) -> list[WebElement]:
        WebDriverWait(self.driver, 30, 0.05).until(
            lambda _: len(self.all(selector)) >= least, f"fewer than {least} x {selector}"
        )
        return self.all(selector)

    def wait_for_text(self, selector: str, text: str) -> None:
        """Until this is the text of the element: a link is followed after its click returns."""
        WebDriverWait(self.driver, 30, 0.05, [StaleElementReferenceException]).until(
            lambda _: [element.text.strip() for element in self.all(selector)] == [text.strip()],
            f"{selector} does not show {text!r}",
        )

    def read_through(self) -> None:
        """To the end of the page, until every picture is drawn."""
        for section in self.all("main section"):
            self.js_on(section, "arguments[0].scrollIntoView({behavior: 'instant'})")
        for plot in self.all(".plot"):
            self.js_on(plot, "arguments[0].scrollIntoView({behavior: 'instant'})")
            WebDriverWait(self.driver, 30, 0.05).until(
                lambda _, plot=plot: plot.get_attribute("data-drawn")  # type: ignore[misc]
            )

    def js_on(self, element: WebElement, script: str) -> Any:
        return self.driver.execute_script(script, element)

    def _log(self, kind: str) -> list[dict[str, Any]]:
        """What was logged since it was last asked for."""
        return list(self.driver.execute("getLog", {"type": kind})["value"])

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self._log("browser")]

    def requests(self) -> set[str]:
        """Schemes of all that was asked for."""
        events = [json.loads(e["message"])["message"] for e in self._log("performance")]
        urls = [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]
        assert urls, "the log holds not even the page"
        return {url.partition(":")[0] for url in urls}

    def column(self, number: int) -> list[str]:
        return [str(cell.text) for cell in self.all(f"#trials-table td:nth-child({number})")]


@pytest.fixture
def reader(_browser: webdriver.Chrome, tmp_path: Path) -> Reader:
    return Reader(_browser, tmp_path / "report.html")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without plotly, which load ten times as fast."""
    monkeypatch.setitem(sys.modules, "plotly.offline", None)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return made_up(60)


def test_every_section_is_drawn_and_nothing_is_fetched(
    reader: Reader, result: dict[str, Any]
) -> None:
    reader.open(result)
    assert reader.one("h1").text == result["verdict"]
    assert reader.one("p.costs").text == result["costs_sentence"]
    notes = [str(node.text) for node in reader.all("p.validation")]
    assert notes == [result["noise"]["sentence"], result["trust_sentence"]]
    reader.read_through()
    for section, (selector, least) in MARKS.items():
        assert len(reader.all(f"#{section} {selector}")) >= least, section
    scored = sum(any(s["text"]["loss"] for s in t["rungs"]) for t in result["trials"])
    points = scored + len(result["front"]) + 5  # winner, three baselines, one ablation
    assert len(reader.all("#front .scatterlayer .point")) == points
    assert len(reader.all("#front .errorbars path.yerror")) == 5
    assert reader.one("#baselines tbody tr:last-child .warn").text == "out of memory"
    baselines = [entry["name"] for entry in result["entries"] if entry["role"] == "baseline"]
    assert [str(label.text) for label in reader.all("#front .textpoint")] == baselines
    assert {str(label.text) for label in reader.all("#front .legendtext")} >= set(baselines)
    wide = reader.one("#baselines-table")
    assert reader.js_on(wide, "return arguments[0].scrollWidth <= arguments[0].clientWidth")
    assert reader.complaints() == []
    assert reader.requests() <= {"file", "data", "blob"}


@pytest.mark.usefixtures("bare")
def test_the_first_screen_says_what_was_allowed_and_what_was_executed(
    reader: Reader, result: dict[str, Any]
) -> None:
    noisy = {"share": 0.9, "sentence": "Warning: mostly noise."}
    reader.open(result | {"noise": noisy})
    told = {
        str(figure.find_element(By.TAG_NAME, "dt").text): str(figure.text)
        for figure in reader.all("#figures > div")
    }
    assert told["Parameters"].endswith("of 162.0M allowed")
    assert re.search(r"nominal; [\d.]+[MG] executed", told["FLOPs per token"])
    assert re.search(r"over 3 seeds; text: \d\.\d+ bits per byte", told["Loss of the winner"])
    for place in ("header", "#choices"):
        assert reader.one(f"{place} p.note").text == noisy["sentence"]
    assert "bits/byte" in reader.one("#baselines tbody tr").text
    assert re.search(r"\d[MG]?\n[\d.]+[MG] executed", reader.one("#baselines tbody tr").text)
    assert "proxies read text as bytes" in reader.one("#front-note").text
    heads = [str(head.text) for head in reader.all("#trials-table thead th")]
    assert {"executed FLOPs/token", "nominal FLOPs/token"} <= set(heads)
    assert reader.complaints() == []


@pytest.mark.usefixtures("bare")
def test_one_seed_has_no_interval(reader: Reader) -> None:
    reader.open(made_up(12, seeds=1))
    assert "one seed: no interval" in reader.one("h1").text
    assert "one seed: no interval" in reader.one("#figures").text
    assert reader.complaints() == []


@pytest.mark.usefixtures("bare")
def test_each_spec_is_one_click_away(reader: Reader, result: dict[str, Any]) -> None:
    reader.open(result)
    reader.show("#trials")
    reader.one("tr[data-trial='3'] td.long").click()
    reader.wait_for_text("#spec", result["trials"][3]["spec"])
    assert reader.driver.current_url.endswith("#trial-3")
    assert reader.js("return document.activeElement.id") == "close"
    reader.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not reader.one("#panel").is_displayed()
    reader.one("tr[data-trial='5'] a").send_keys(Keys.ENTER)
    reader.wait_for_text("#panel h2", f"Trial 5 {result['trials'][5]['outcome']}")
    reader.one("#close").click()
    assert reader.js("return document.activeElement.textContent") == "5"
    assert "#" not in reader.driver.current_url
    reader.driver.back()
    WebDriverWait(reader.driver, 30).until(lambda _: reader.one("#panel").is_displayed())
    reader.driver.forward()
    WebDriverWait(reader.driver, 30).until(lambda _: not reader.one("#panel").is_displayed())


@pytest.mark.slow
def test_a_point_and_a_baseline_show_their_specs(reader: Reader, result: dict[str, Any]) -> None:
    reader.open(result)
    reader.show("#front")
    star = reader.wait("#front .scatterlayer .trace:last-child .point")[0]
    ActionChains(reader.driver).move_to_element(star).pause(0.3).click().perform()
    reader.wait_for_text("#spec", result["entries"][0]["spec"])
    reader.one("#close").click()
    reader.one("#baselines a[href='#entry-2']").click()
    reader.wait_for_text("#spec", result["entries"][2]["spec"])


@pytest.mark.usefixtures("bare")
def test_a_link_to_a_trial_opens_it_and_its_spec_is_copied(
    reader: Reader, result: dict[str, Any]
) -> None:
    reader.open(result, "#trial-12")
    reader.wait_for_text("#panel h2", f"Trial 12 {result['trials'][12]['outcome']}")
    reader.one("#copy").click()
    WebDriverWait(reader.driver, 10).until(lambda _: reader.one("#copy").text != "Copy")
    assert reader.one("#copy").text in ("Copied", "Selected: press Ctrl+C")


@pytest.mark.usefixtures("bare")
def test_the_table_is_sorted_and_filtered(reader: Reader, result: dict[str, Any]) -> None:
    reader.open(result)
    reader.show("#trials")
    losses = {}
    for way in ("ascending", "descending"):
        reader.one("#trials-table th:nth-child(3) button").click()
        assert reader.one("#trials-table th:nth-child(3)").get_attribute("aria-sort") == way
        said = reader.column(3)
        losses[way] = [float(text) for text in said if text != NONE]
        assert said[len(losses[way]) :] == [NONE] * (len(said) - len(losses[way]))
    assert losses["ascending"] == sorted(losses["ascending"]) == losses["descending"][::-1]
    reader.one("#find").send_keys("random x3")
    sought = [t["trial"] for t in result["trials"] if {"random", "x3"} <= set(t["words"].split())]
    shown = [row for row in reader.all("#trials-table tbody tr") if row.is_displayed()]
    assert sorted(int(row.get_attribute("data-trial") or -1) for row in shown) == sought != []
    assert reader.one("#found").text == f"{len(sought)} of 60"


@pytest.mark.usefixtures("bare")
def test_a_drag_along_an_axis_keeps_what_passes_there(
    reader: Reader, result: dict[str, Any]
) -> None:
    reader.open(result)
    reader.show("#parallel")
    lines = len(reader.all("#parallel path"))
    grip = reader.all("#parallel .grip")[-1]
    half = ActionChains(reader.driver).move_to_element(grip).click_and_hold()
    half.move_by_offset(0, 140).release().perform()
    kept = lines - len(reader.all("#parallel path.out"))
    assert 0 < kept < lines
    ActionChains(reader.driver).move_to_element(grip).click().perform()
    assert reader.all("#parallel path.out") == []


@pytest.mark.usefixtures("bare")
def test_text_of_strangers_stays_text(reader: Reader, result: dict[str, Any]) -> None:
    bad = hostile(result)
    data, script = Scripts(page(bad)).texts
    assert json.loads(data) == bad
    assert ATTACK not in script
    reader.open(bad, "#trial-3")
    assert ATTACK in reader.one("#spec").text
    assert reader.driver.title == f"{bad['name']}: search report"
    assert reader.all("img") == []
    assert reader.complaints() == []


@pytest.mark.slow
def test_text_of_strangers_stays_text_in_pictures(reader: Reader, result: dict[str, Any]) -> None:
    bad = hostile(result)
    reader.open(bad)
    reader.read_through()
    reader.show("#front")
    star = reader.all("#front .scatterlayer .trace:last-child .point")[0]
    ActionChains(reader.driver).move_to_element(star).pause(0.3).perform()
    reader.wait("#front .hoverlayer .hovertext")
    said = reader.js("return document.querySelector('.hovertext').textContent")
    assert "<b>&lt;i&gt;</script>" in said.replace("\N{ZERO WIDTH SPACE}", "")
    assert reader.driver.title == f"{bad['name']}: search report"
    assert reader.all("img") == []
    assert reader.complaints() == []


@pytest.mark.slow
def test_a_search_that_was_cut_short(reader: Reader, result: dict[str, Any]) -> None:
    rest: dict[str, Any] = {"entries": [], "trust": None, "shared": None, "importance": {}}
    reader.open(result | rest | {"trust_sentence": "", "interrupted": True})
    reader.read_through()
    assert "has not been compared with its baselines yet" in reader.one("#baselines").text
    assert "interrupted" in reader.one("header").text
    assert reader.complaints() == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1200])
def test_no_width_cuts_the_page(reader: Reader, result: dict[str, Any], width: int) -> None:
    reader.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    reader.open(result)
    heights = [reader.js("return document.documentElement.scrollHeight")]
    reader.read_through()
    heights.append(reader.js("return document.documentElement.scrollHeight"))
    wide = reader.js("return document.documentElement.scrollWidth - innerWidth")
    reader.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide <= 0
    assert heights[0] == heights[1]  # nothing jumps when pictures are drawn


@pytest.mark.usefixtures("bare")
def test_without_plotly_the_page_says_what_it_needs(reader: Reader, result: dict[str, Any]) -> None:
    reader.open(result)
    assert reader.file.stat().st_size < 2_000_000
    assert "pip install 'archdsl[plots]'" in reader.one("#front").text
    reader.one("#curves .switch button:last-child").click()
    assert len(reader.all("#trials-table tbody tr")) == 60
    assert reader.complaints() == []


@pytest.mark.slow
def test_a_search_of_300_trials(reader: Reader) -> None:
    reader.open(made_up(300, axes=("loss", "flops", "kv")))
    assert reader.file.stat().st_size < 9_000_000
    reader.read_through()
    assert len(reader.all("#trials-table tbody tr")) == 300
    assert reader.one("#front .colorbar").text.endswith("KV cache bytes per token")
    assert reader.js("return performance.memory.usedJSHeapSize") < 400e6
    assert reader.complaints() == []


@pytest.mark.usefixtures("bare")
def test_a_result_of_an_earlier_version_is_shown(reader: Reader) -> None:
    old = json.loads((WRITTEN_BEFORE / "result.json").read_text())
    assert {entry["role"] for entry in old["entries"]} >= {"winner", "control"}
    reader.open(old)
    tags = [str(tag.text) for tag in reader.all("#baselines .tag")]
    assert set(tags) >= {"winner", "baseline"}
    assert "control" not in tags
    assert len(reader.all("#trials-table tbody tr")) == len(old["trials"])
    assert reader.complaints() == []
