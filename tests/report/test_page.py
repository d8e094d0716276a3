"""The HTML report in a real browser: it asks nobody, fits a phone, zooms, and follows the theme."""

import os
import shutil

import pytest
from PIL import Image
from run_folders import measure, write_run

from fedsam.report.page import html
from fedsam.report.table import ResultTable
from fedsam.runs.run import load_all

CHROMIUM = shutil.which("chromium")
WIDTHS = {"phone": (390, 844), "desk": (1280, 900)}
LOW = "document.getElementById('accuracy-0')._fullLayout.xaxis.range[0]"
ZOOM = "name => document.getElementById(name)._fullLayout.xaxis.range"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for alpha in (0, 0.5, 100):
        for n, method in enumerate(("fedavg", "fedasam")):
            for seed in (0, 1):
                values = [0.1 * k + 0.01 * alpha**0.5 + 0.02 * n + 0.01 * seed for k in range(1, 8)]
                given = {"alpha": alpha, "algorithm": method, "seed": seed}
                run = write_run(folder / f"{alpha}-{method}-{seed}", values, **given)
                numbers = {"lambda_1": 9.0 - 4 * n + seed, "trace": 100.0 + alpha}
                measure(run, 0.9, 0.8 - 0.1 * n + 0.01 * seed, hessian=numbers)
                Image.new("RGB", (1600, 500), "teal").save(run / "flatness-surface.png")
    hostile = "</script><img src=x onerror=alert(1)>"
    write_run(folder / hostile.replace("/", "-"), [0.5], seed=7, data_root=hostile)
    file = folder / "report.html"
    file.write_text(html(ResultTable(load_all([folder])), 0.4))
    return file


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        assert "CI" not in os.environ, "CI must have a chromium"
        pytest.skip("needs Debian's chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, page_file):
    """Return a function that opens the page, and what it asked for and complained of."""
    contexts = []

    def go(kind="desk", scheme="light"):
        width, height = WIDTHS[kind]
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            has_touch=kind == "phone",
            is_mobile=kind == "phone",
        )
        contexts.append(context)
        page, asked, said = context.new_page(), [], []
        page.set_default_timeout(120_000)  # five megabytes of script on a busy machine
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append("a dialog"))
        page.goto(page_file.as_uri())
        page.wait_for_selector("#partition-2 .main-svg")
        return page, asked, said

    yield go
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", WIDTHS)
def test_it_draws_everything_asks_nobody_and_fits(opened, page_file, kind, scheme):
    page, asked, said = opened(kind, scheme)
    assert asked == [page_file.as_uri()]
    assert said == []
    plots = page.locator(".plot")
    assert plots.count() == page.locator(".plot .main-svg").count() // 3 > 10
    width = WIDTHS[kind][0]
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    boxes = [plots.nth(n).bounding_box() for n in range(3)]
    assert all(box["width"] > 300 for box in boxes)
    beside = boxes[1]["y"] == boxes[0]["y"]
    assert beside == (kind == "desk")  # panels side by side, or one below the other
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 30)")
    text = page.locator("#accuracy-0 .xtitle").evaluate("e => getComputedStyle(e).fill")
    assert text == ("rgb(28, 36, 48)" if scheme == "light" else "rgb(227, 231, 238)")


@pytest.mark.parametrize("kind", WIDTHS)
def test_its_pictures_are_inside_and_have_a_text(opened, kind):
    page, asked, said = opened(kind)
    images = page.locator("figure img")
    assert images.count() == 12
    images.last.scroll_into_view_if_needed()
    wait(page, "[...document.images].every(image => image.naturalWidth == 1600)")
    assert images.first.bounding_box()["width"] <= WIDTHS[kind][0]
    assert images.nth(0).get_attribute("alt") == page.locator("figcaption").nth(0).inner_text()
    assert "flatness surface" in images.nth(0).get_attribute("alt")
    assert "τ = " in page.locator("#taus").inner_text()
    assert page.locator(".measures").count() == 3  # a table an alpha
    assert len(asked) == 1
    assert said == []


def wait(page, condition):
    """Wait for it from outside: Playwright's own wait evaluates text in the page, whose policy
    forbids that."""
    for _ in range(600):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    pytest.fail(f"never came true: {condition}")


def test_it_follows_a_change_of_the_theme(opened):
    page, _, said = opened()
    page.emulate_media(color_scheme="dark")
    fill = "getComputedStyle(document.querySelector('#accuracy-0 .xtitle')).fill"
    wait(page, f"{fill} == 'rgb(227, 231, 238)'")
    assert said == []


def test_a_drag_zooms_and_a_double_click_goes_back(opened):
    page, _, _ = opened()
    whole = page.evaluate(ZOOM, "accuracy-0")
    page.locator("#accuracy-0").scroll_into_view_if_needed()
    box = page.locator("#accuracy-0 .nsewdrag").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.25 * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.75 * box["width"], middle, steps=5)
    page.mouse.up()
    wait(page, f"{LOW} > 5")
    low, high = page.evaluate(ZOOM, "accuracy-0")
    span = whole[1] - whole[0]
    assert (low - whole[0]) / span == pytest.approx(0.25, abs=0.02)
    assert (high - whole[0]) / span == pytest.approx(0.75, abs=0.02)
    page.mouse.dblclick(box["x"] + 10, middle)
    wait(page, f"{LOW} < 5")
    assert page.evaluate(ZOOM, "accuracy-0") == pytest.approx(whole)


def test_its_tables_say_what_the_runs_were(opened, page_file):
    page, _, said = opened()
    rows = page.locator("#headlines tbody tr")
    assert rows.nth(0).locator("td").all_inner_texts()[0].startswith("fedavg")
    assert page.locator("#headlines td.best").count() == 3
    head = page.locator("#runs thead th").all_inner_texts()
    assert head[:2] == ["run", "data_root"]
    assert {"alpha", "algorithm", "seed", "minimizer"} < set(head)
    assert page.locator("#runs tbody tr").count() == 13
    assert "onerror" in page.locator("#runs").inner_text()  # as text: nothing was executed
    assert said == []
    page.click("details summary")
    wait(page, "document.querySelector('#shared').offsetHeight > 0")
    cells = [row.locator("th, td") for row in page.locator("#shared tr").all()]
    shared = dict(row.all_text_contents() for row in cells)  # which need no layout
    assert shared["dataset"] == "digits"
    assert "alpha" not in shared
