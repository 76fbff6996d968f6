"""Tests of the page in Chromium or Chrome."""

import io
import re
import socket
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from ema_seg.demo.comparing import compare
from ema_seg.demo.examples import Example
from ema_seg.demo.page import build_page, start_page
from ema_seg.inference.masks import colourise

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LOOPBACK = "127.0.0.1"


def noise(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


@pytest.fixture(scope="module")
def hosts():
    """Record the hosts that this process looks up, and check at the end that they are this machine."""
    found, look_up = set(), socket.getaddrinfo

    def record(host, *arguments, **options):
        found.add(host)
        return look_up(host, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", record)
        yield found
    assert LOOPBACK in found
    assert found <= {LOOPBACK, "localhost", None}


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    """Write a picture that viewers turn by its orientation tag."""
    tag = Image.Exif()
    tag[0x0112] = 6
    path = tmp_path_factory.mktemp("pictures") / "turned.jpg"
    Image.fromarray(noise((64, 96))).save(path, exif=tag)
    return path


@pytest.fixture(scope="module")
def expected(models, turned):
    """Segment the pictures before the pages do: a model must not run in two threads at once."""
    return SimpleNamespace(
        results=[model.segmenter(turned) for model in models],
        maps=models[0].segmenter(turned, weight_maps=True).weight_maps,
        example=models[0].segmenter(noise((64, 96), 7)),
    )


@pytest.fixture(scope="module")
def start(hosts, expected):
    pages = []

    def start(models, examples=()):
        page = build_page(models, examples)
        start_page(page, LOOPBACK)
        pages.append(page)
        return page.local_url

    yield start
    for page in pages:
        page.close()


@pytest.fixture(scope="module")
def address(start, models):
    return start(models, [Example("noise", lambda: noise((64, 96), 7)), Example("broken", lambda: "nowhere.png")])


@pytest.fixture
def open_page(browser, capsys):
    """Return a function that opens an address.

    Fail the test on page errors, on requests beyond this machine, and on tracebacks, which Gradio prints.
    """
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    complaints, requests = [], []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(urlsplit(request.url)))

    def open_page(address):
        page.goto(address)
        return page

    yield open_page
    context.close()
    assert complaints == []
    assert "Traceback" not in capsys.readouterr().err
    assert requests
    assert {url.hostname for url in requests if url.scheme not in ("data", "blob")} == {LOOPBACK}


@pytest.fixture
def page(open_page, address):
    return open_page(address)


def drop(page, path):
    page.locator("#picture input[type=file]").set_input_files(path)


def pixels(page, name):
    """Return the pixels of a picture on the page as RGB."""
    image = page.locator(f"#{name} img").first
    image.wait_for()
    return np.array(Image.open(io.BytesIO(page.request.get(image.get_attribute("src")).body())).convert("RGB"))


def wait_for_text(page, name, text):
    page.locator(f"#{name}").get_by_text(text).first.wait_for()


def test_masks_areas_and_differences_are_those_of_the_models(page, expected, turned):
    assert all(len(np.unique(result.mask)) > 1 for result in expected.results)

    drop(page, turned)

    wait_for_text(page, "time-1", re.compile(r"64 x 96 pixels in \d+\.\d\d s"))
    for index, result in enumerate(expected.results):
        assert np.array_equal(pixels(page, f"mask-{index}"), colourise(result.mask, result.palette))
        assert np.array_equal(pixels(page, f"overlay-{index}"), np.array(result.overlay()))
        rows = page.locator(f"#areas-{index} table.areas tr").all_inner_texts()[1:]
        areas = sorted(filter(lambda item: item[1], result.areas().items()), key=lambda item: -item[1])
        assert [row.split() for row in rows] == [[name, f"{share:.2%}"] for name, share in areas]
    difference = compare(*expected.results)
    wait_for_text(page, "difference", f"{difference.share:.2%}")
    assert np.array_equal(pixels(page, "difference-picture"), np.array(difference.draw(expected.results[0].image)))
    assert page.get_by_role("heading", name="with <ema>", exact=True).is_visible()


def test_the_slider_goes_through_the_groups_of_the_chosen_block(page, expected, turned):
    maps = expected.maps
    last, first = list(maps)[-1], next(iter(maps))

    drop(page, turned)

    mean = maps[last].mean(axis=0)
    wait_for_text(page, "range-0", f"{mean.max():.4f}")
    before = pixels(page, "weights-0")
    assert before.shape == (96, 64, 3)
    assert "no attention block" in page.locator("#note-1").inner_text()

    page.locator("#group-0 input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    wait_for_text(page, "range-0", f"{maps[last][1].max():.4f}")
    wait_for_text(page, "range-0", f"{maps[last][1].min():.4f}")
    assert not np.array_equal(pixels(page, "weights-0"), before)

    page.locator("#block-0 input").click()
    page.get_by_role("option", name=first, exact=True).click()
    wait_for_text(page, "range-0", f"{maps[first].mean(axis=0).max():.4f}")
    assert page.locator("#group-0 input[type=range]").get_attribute("max") == str(len(maps[first]))


def test_an_example_is_segmented_and_an_unreadable_one_is_not_there(page, expected):
    page.locator("#examples img").first.click()

    assert page.locator("#examples img").count() == 1
    assert np.array_equal(pixels(page, "mask-0"), colourise(expected.example.mask, expected.example.palette))


def test_a_file_that_is_no_image_is_a_sentence_and_the_next_picture_works(page, tmp_path, turned):
    (tmp_path / "notes.jpg").write_text("no image")

    drop(page, tmp_path / "notes.jpg")

    page.get_by_role("alert").wait_for()
    assert page.get_by_role("alert").inner_text().startswith("notes.jpg: cannot be decoded as an image")
    assert page.locator("#results").is_hidden()
    drop(page, turned)
    page.locator("#weights-0 img").first.wait_for()
    assert page.get_by_role("alert").count() == 0


def test_a_picture_in_windows_has_a_mask_and_a_sentence_instead_of_weight_maps(page, models, turned, monkeypatch):
    monkeypatch.setattr("ema_seg.inference.segmenter._MOST_PIXELS", 64 * 64)
    in_windows, _ = models[0].segment(turned)  # waits for the page's models

    drop(page, turned)

    wait_for_text(page, "note-0", "No weight maps: the picture has 64 x 96 pixels and is predicted in windows")
    assert np.array_equal(pixels(page, "mask-0"), colourise(in_windows.mask, in_windows.palette))
    assert page.locator("#weights-0").is_hidden()
    assert page.get_by_role("alert").count() == 0


def test_one_model_has_no_differences_and_fits_a_phone(open_page, start, models, turned):
    page = open_page(start(models[:1]))
    page.set_viewport_size({"width": 390, "height": 844})

    drop(page, turned)

    page.locator("#weights-0 img").first.wait_for()
    assert page.locator("#difference").is_hidden()
    assert page.locator("#examples").is_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
