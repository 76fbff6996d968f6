"""Tests of the page of a comparison, most of them in Chromium or Chrome."""

import json
import re
from urllib.parse import urlsplit

import pytest

from ema_seg.comparison.page import write_page
from tests.comparison.comparisons import FAILURE, make_comparison


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    directory = tmp_path_factory.mktemp("comparison")
    return write_page(make_comparison(directory), directory)


@pytest.fixture
def page(browser, page_file):
    """Open the page from disk, offline; fail the test on console messages, errors and requests beyond the page."""
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900})
    page = context.new_page()
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(page_file.as_uri())
    yield page
    context.close()
    assert complaints == []
    assert {urlsplit(url).scheme for url in requests} <= {"file", "data"}
    assert [url for url in requests if url.startswith("file")] == [page_file.as_uri()]


def labels(page):
    return page.eval_on_selector_all("#rows tbody tr", "rows => rows.map(row => row.dataset.label)")


def test_the_page_holds_the_comparison_and_loads_nothing(page_file, tmp_path):
    text = page_file.read_text()
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    data = json.loads(embedded)
    pictures, claims = data.pop("pictures"), data.pop("shown_claims")

    assert data == make_comparison(tmp_path)
    assert [claim["verdict"] for claim in claims] == ["supported", "contradicted", "undecided"]
    assert set(pictures) == {path for example in data["examples"] for path in example["files"].values()}
    assert all(uri.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for uri in pictures.values())
    assert not re.search(r"""(src|href)\s*=\s*["']?https?:""", text)


@pytest.mark.slow
def test_a_click_sorts_and_a_second_one_turns_round(page):
    assert labels(page)[0] == "none"
    button = page.get_by_role("button", name="mIoU", exact=False).first

    button.click()
    downwards = labels(page)
    assert downwards[0] == "ema, encoder"
    assert downwards[-1] == "gam, encoder"  # has no score: last in both directions
    assert page.locator("#rows th[aria-sort=descending]").count() == 1

    page.keyboard.press("Enter")  # the button keeps the focus
    upwards = labels(page)
    assert upwards[:-1] == downwards[-2::-1]
    assert upwards[-1] == "gam, encoder"


def test_every_column_sorts(page):
    everything = set(labels(page))
    for index in range(page.locator("#rows thead button").count()):
        page.locator("#rows thead button").nth(index).click()
        assert set(labels(page)) == everything


def test_filters_reach_table_and_plots(page):
    page.get_by_label("Filter").fill("ema")
    assert labels(page) == ["ema, decoder", "ema, encoder"]
    assert page.locator("#pareto g.point:not(.faded)").count() == 2
    assert page.locator("#forest g.point").count() == 2
    assert page.locator("#classes tbody tr").count() == 2

    page.locator('select[data-key="placement"]').select_option("encoder")
    assert labels(page) == ["ema, encoder"]
    page.get_by_label("Filter").fill("nothing like it")
    assert "No configuration matches" in page.locator("#rows tbody").inner_text()


def test_a_point_tells_its_numbers_to_mouse_and_keyboard(page):
    assert page.locator("#tooltip").is_hidden()
    page.locator('#pareto g[data-label="ema, decoder"] .dot').hover()
    text = page.locator("#tooltip").inner_text()
    assert text.startswith("ema, decoder\nmIoU 7")
    assert "+1.90 points to none, [" in text
    assert "images/s 5" in text

    page.keyboard.press("Escape")
    assert page.locator("#tooltip").is_hidden()
    page.locator('#pareto g[data-label="none"]').focus()
    assert page.locator("#tooltip").inner_text().startswith("none\n")


def test_a_cell_tells_its_interval(page):
    page.locator('#classes tr[data-label="ema, encoder"] td').first.hover()

    text = page.locator("#tooltip").inner_text()
    assert re.match("ema, encoder, small\nIoU [0-9.]+ %\n[+\u2212][0-9.]+ points, \\[", text)


def test_claims_have_their_verdict_and_evidence(page):
    claims = page.locator("#claims .claim")

    assert claims.count() == 3
    assert page.locator("#claims .verdict").all_inner_texts() == [
        "Supported.",
        "Contradicted.",
        "Undecided; about 7 more seeds would decide it.",
    ]
    cells = claims.nth(0).locator("tbody tr").nth(0).locator("td").all_inner_texts()
    assert cells == ["ema over none </script>", "mIoU", "+1.20 [+0.70, +1.70] points", "3", "0.020", "supported"]
    assert claims.nth(0).locator("tbody tr").nth(1).locator("td").nth(5).inner_text() == "(supported)"
    assert claims.nth(0).locator("b").count() == 0  # text, and not markup
    assert "Missing: fur of ema over none." in claims.nth(2).inner_text()


@pytest.mark.slow
def test_reasons_are_text_and_not_markup(page):
    row = page.locator('#rows tr[data-label="cbam, decoder"]')

    assert f"seed 2 failed: {FAILURE}" in row.inner_text()
    assert row.locator("b").count() == 0
    assert page.locator("h1").inner_text() == "attention & placement </script>"


def clip(page, index):
    return page.locator("#wipe img").nth(index).evaluate("image => image.style.clipPath")


def test_the_slider_wipes_between_the_predictions(page):
    before = clip(page, 2)
    page.locator("#wipe").scroll_into_view_if_needed()
    box = page.locator("#wipe").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    page.mouse.up()
    dragged = clip(page, 2)
    assert before != dragged == "inset(0px 0px 0px 25%)"
    assert page.locator("#slider").input_value() == "25"

    page.locator("#slider").focus()
    page.keyboard.press("ArrowRight")
    assert clip(page, 2) == "inset(0px 0px 0px 26%)"


def test_examples_can_be_chosen_and_the_truth_shown(page):
    caption = page.locator("#example-caption")
    assert "+12.30 points against none" in caption.inner_text()

    page.get_by_label("loses most").check()
    assert "night/<0001>&" in caption.inner_text()
    page.locator("#example-row").select_option("ema, encoder")
    assert page.locator(".side.right").inner_text() == "ema, encoder"
    page.get_by_label("truth instead of the baseline").check()
    assert page.locator(".side.left").inner_text() == "truth"
    page.locator("#opacity").fill("20")
    assert page.locator("#wipe img.mask").first.evaluate("image => image.style.opacity") == "0.2"
    assert page.locator("#wipe img").evaluate_all("images => images.every(image => image.naturalWidth > 0)")


def test_curves_can_be_chosen(page):
    assert page.locator("#curves polyline").count() == 7
    page.locator("#curve-controls").get_by_label("none").uncheck()
    assert page.locator("#curves polyline").count() == 6
    page.get_by_label("Show").select_option("train/loss")
    assert "training loss" in page.locator("#curves svg").text_content()


def test_the_configuration_under_the_pointer_or_with_the_focus_is_marked_everywhere(page):
    page.locator('#forest g[data-label="ema, encoder"] .dot').hover()
    marked = page.locator(".marked")
    assert {marked.nth(place).get_attribute("data-label") for place in range(marked.count())} == {"ema, encoder"}
    for part in ("#rows tr", "#pareto g", "#forest g", "#classes tr", "#curves polyline"):
        assert page.locator(f"{part}.marked").count() == 1, part
    assert page.locator('#pareto g[data-label="none"]').evaluate("node => getComputedStyle(node).opacity") == "0.25"

    page.locator('#pareto g[data-label="none"]').focus()
    assert page.locator("#rows tr.marked").get_attribute("data-label") == "none"
    page.locator("h1").hover()
    assert page.locator(".marked").count() == 0


def test_all_columns_fit_a_screen_of_1280_pixels(page):
    page.set_viewport_size({"width": 1280, "height": 900})

    assert page.evaluate("document.querySelector('#rows').scrollWidth <= document.querySelector('.scroll').clientWidth")


def test_a_narrow_screen_scrolls_tables_and_not_the_page(page):
    page.set_viewport_size({"width": 360, "height": 700})

    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("document.querySelector('#rows').scrollWidth") > 360


def test_one_row_without_baseline_is_a_page_too(browser, tmp_path):
    comparison = make_comparison(tmp_path, rows=1)
    comparison |= {"examples": [], "notes": [], "baseline": None, "settings": []}
    comparison["rows"][0] |= {"curves": {}, "baseline": False, "settings": {}}
    complaints = []
    page = browser.new_page()
    page.on("pageerror", lambda error: complaints.append(str(error)))

    page.goto(write_page(comparison, tmp_path).as_uri())

    assert complaints == []
    assert labels(page) == ["none"]
    for section in ("notes", "forest-section", "classes-section", "examples-section", "curves-section"):
        assert page.locator(f"#{section}").is_hidden()
    page.close()
