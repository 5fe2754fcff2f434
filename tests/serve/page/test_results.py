"""What the page shows: the library, results, errors, on screens of all sizes."""

import contextlib
import re

import numpy as np
import pytest

from tests.serve.page.conftest import HTML, OPENED, card, count, search, submit, until

pytestmark = pytest.mark.slow

NOTHING = {"query": "nothing like it", "cut": False, "found": False, "hits": []}


def test_the_library_newest_first_and_by_folder_in_pages(open_page, page):
    def names():
        return page.locator(".card .name").all_inner_texts()

    page.wait_for_selector(".card")
    assert len(names()) == 6 and not page.is_visible("#pager")
    years = {text[-4:] for text in page.locator(".card .date").all_inner_texts()}
    assert "2023" in years
    page.select_option("#order", "folder")
    page.wait_for_selector(".folder h2")
    assert page.locator(".folder h2").all_inner_texts() == ["/", "sub"]
    assert names()[-1] == "sub/b.mp4"
    page.locator(".card").nth(5).focus()  # the only one of its row
    for key, index in (("ArrowUp", 0), ("ArrowDown", 5)):
        page.keyboard.press(key)
        focused = "[...document.querySelectorAll('.card')].indexOf(document.activeElement)"
        assert page.evaluate(focused) == index
    page.keyboard.press("Enter")
    page.wait_for_selector(OPENED)
    assert page.locator(".chart").count() == 0
    assert "score" not in page.inner_text(".moment .about p")
    address = page.evaluate("location.hash")
    assert address == "#index=moments&order=folder"

    file = {"file_id": 1, "name": "x.mp4", "start": 0, "end": 4, "moments": 7, "missing": False}
    offsets = []

    def answer(route):
        offsets.append(int(re.search(r"\boffset=(\d+)", route.request.url)[1]))
        files = [file | {"modified": offsets[-1]}] * 24
        route.fulfill(json={"total": 49, "files": files})

    page.route("**/api/files?*", answer)
    page.select_option("#order", "newest")
    for button, number in (("#forth", 2), ("#forth", 3), ("#forth", 3), ("#back", 2)):
        page.focus(button)
        page.keyboard.press("Enter")
        page.wait_for_selector(f'#page:text-is("Page {number} of 3")')
    until(page, "!document.body.classList.contains('busy')")
    assert offsets == [0, 24, 48, 24]
    assert "7 moments" in page.inner_text(".card")
    page.go_back()
    page.wait_for_selector('#page:text-is("Page 3 of 3")')


def test_files_with_html_names_without_codec_or_gone(page):
    search(page, "a dog")
    html = card(page, HTML)
    assert html.locator(".name").inner_text() == HTML
    html.click()
    page.wait_for_selector(".moment h2")
    assert page.inner_text(".moment h2") == HTML
    assert page.locator('img[src="x"]').count() == 0
    assert page.title() != "run"
    card(page, "old.avi").click()
    page.wait_for_selector('.moment [role="alert"]')
    assert "cannot play" in page.inner_text(".screen")
    assert page.locator(OPENED).count() == 0
    with page.expect_download() as download:
        page.click(".moment a")
    assert download.value.suggested_filename == "old.avi"
    page.wait_for_selector(".chart")  # its scores are shown all the same
    gone = card(page, "gone.mp4")
    assert "file is gone" in gone.inner_text()
    gone.click()
    assert "moved or deleted" in page.inner_text(".moment")
    assert page.locator(OPENED).count() == 0


def test_errors_are_shown_and_retried(page):
    search(page, "a dog")
    page.route("**/api/search?*", lambda route: route.abort())
    page.press("#query", "Enter")
    page.wait_for_selector("#error:visible")
    assert "does not answer" in page.inner_text("#reason")
    assert count(page) == 0
    page.unroute("**/api/search?*")
    message = "the index <i>is</i> broken"
    page.route("**/api/search?*", lambda route: route.fulfill(status=503, json={"error": message}))
    page.click("#retry")
    page.wait_for_selector(f'#reason:text-is("{message}")')
    page.unroute("**/api/search?*")
    page.click("#retry")
    page.wait_for_selector(".card")
    assert not page.is_visible("#error")
    page.route("**/api/search?*", lambda route: route.fulfill(json=NOTHING))
    submit(page, "nothing like it")
    page.wait_for_selector("#empty-title:text-is('Nothing found for “nothing like it”')")
    assert "Try other words" in page.inner_text("#empty-text")
    assert count(page) == 0
    page.unroute("**/api/search?*")
    page.click("#anyway")
    page.wait_for_selector('#status:has-text("6 results for “nothing like it”")')


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_many_results_with_long_names(open_page, width):
    page = open_page(viewport={"width": width, "height": 600})
    assert page.locator("#choose").inner_text().startswith("Index")
    name = "/".join(["x" * 150] * 2) + ".mp4"
    hit = {
        "file_id": 10**6,
        "name": name,
        "score": -0.512,
        "caption": "",
        "missing": False,
        "modified": 0,
    }
    hit |= {"start": 3599.25, "end": 3725.0}

    def answer(route):
        requested = int(re.search(r"\bk=(\d+)", route.request.url)[1])
        route.fulfill(json={"query": "many", "cut": False, "hits": [hit] * min(requested, 40)})

    page.route("**/api/search?*", answer)
    submit(page, "many")
    for shown, title in [(12, "First 12"), (24, "First 24"), (40, "40")]:
        page.wait_for_selector(f'#status:text-is("{title} results for “many”")')
        assert count(page) == shown
        assert page.is_visible("#more") == (shown < 40)
        if shown < 40:
            page.click("#more")
    assert page.locator(".when").first.inner_text() == "59:59.3 – 1:02:05"
    page.wait_for_selector('.picture:has-text("no preview")')  # there is no such file
    # The name in two full lines without a break before it, the score in one.
    lines = "node => Math.round(node.clientHeight / parseFloat(getComputedStyle(node).lineHeight))"
    assert page.eval_on_selector(".card .name", lines) == 2
    assert page.eval_on_selector(".card .name", "node => node.scrollHeight > node.clientHeight")
    first = "node => node.firstChild.nodeType === Node.TEXT_NODE"
    assert page.eval_on_selector(".card .name", first)
    rows = """node => {
        const range = document.createRange();
        range.selectNodeContents(node);
        return range.getClientRects().length;
    }"""
    assert page.eval_on_selector(".card .score", rows) == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # What is found next is seen from its beginning.
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    assert page.evaluate("scrollY") > 100
    page.evaluate("document.getElementById('form').requestSubmit()")
    until(page, "!document.body.classList.contains('busy')")
    status, header = (page.locator(at).bounding_box() for at in ("#status", "header"))
    assert max(0, header["y"] + header["height"]) <= status["y"] < 300


def test_an_older_answer_never_replaces_a_newer_one_and_a_truncated_query_is_reported(page):
    routes = []
    page.route("**/api/search?q=slow*", lambda route: routes.append(route))
    submit(page, "slow")
    page.wait_for_selector('#status:has-text("slow")')
    assert page.evaluate("document.body.classList.contains('busy')")
    search(page, "quick")
    with contextlib.suppress(Exception):  # the page has given it up
        routes[0].fulfill(json={"query": "slow", "cut": False, "hits": []})
    page.wait_for_timeout(300)
    assert "quick" in page.inner_text("#status")
    assert count(page) == 6 and not page.is_visible("#cut")
    submit(page, "dog " * 60)
    page.wait_for_selector("#cut:visible")
    assert count(page) == 6


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_in_light_and_dark(open_page, scheme):
    size = {"width": 390, "height": 844}
    page = open_page(viewport=size, color_scheme=scheme, has_touch=True)
    page.click("#filters summary")
    search(page, "a rather long query that a phone cannot show in one line")

    def luminance(selector, which):
        """Of rgb(r, g, b), as WCAG defines it."""
        value = page.eval_on_selector(selector, f"node => getComputedStyle(node).{which}")
        values = np.array([int(v) for v in re.findall(r"\d+", value)[:3]]) / 255
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    paper = luminance("body", "backgroundColor")
    assert paper < 0.05 if scheme == "dark" else paper > 0.8
    pairs = ("body", "body"), ("#status", "body"), (".card .score", ".card"), ("#search", "#search")
    for text, under in pairs:
        colours = luminance(text, "color"), luminance(under, "backgroundColor")
        assert (max(colours) + 0.05) / (min(colours) + 0.05) > 4.5
    card(page, HTML).tap()
    page.wait_for_selector(".chart")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
