"""The page in a real browser, over a real server."""

import contextlib
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.processes import HANG
from tests.search import library
from tests.serve.conftest import served
from tests.video import videos
from vop_jax.search.searcher import open_searcher
from vop_jax.serve.app import Settings, make_app

pytestmark = pytest.mark.slow

HTML = "<img src=x onerror=\"document.title='run'\">.mp4"
NOTHING = {"query": "nothing like it", "cut": False, "found": False, "hits": []}
CAPTION = "<b>grey</b> becomes white"
OPENED = ".moment video"
VIDEO = f"document.querySelector('{OPENED}')"


@pytest.fixture(scope="module")
def films(tmp_path_factory, retriever):
    """(folder, {name: searcher} of two indexes): browsers cannot play one file, and one is gone."""
    root = tmp_path_factory.mktemp("page")
    folder = root / "films"
    library.write_films(folder, count=3, seconds=4)
    videos.write(folder / HTML, 30, width=32, height=32)
    videos.write(folder / "old.avi", 40, codec="mpeg4", width=32, height=32)
    videos.write(folder / "gone.mp4", 40, width=32, height=32)
    (root / "captions.csv").write_text(f"video,caption\na.mp4,{CAPTION}\nsub/b.mp4,another\n")
    library.make(root / "moments", folder, retriever, root / "captions.csv", window=1.0)
    library.make(root / "whole", folder, retriever)
    (folder / "gone.mp4").unlink()
    names = ("moments", "whole")
    return folder, {name: open_searcher(root / name, retriever=retriever) for name in names}


@pytest.fixture(scope="module")
def address(films):
    with served(make_app(films[1], Settings(workers=1)), shutdown=0.5) as (port, _):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium or Chrome")
    switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with (
        playwright.sync_playwright() as started,
        started.chromium.launch(executable_path=path, args=switches) as browser,
    ):
        yield browser


@pytest.fixture
def open_page(browser, address):
    """Opens the page, which may neither raise an error nor load from another host."""
    contexts, urls, wrong = [], [], []

    def open_one(hash="", **options):
        context = browser.new_context(**options)
        context.set_default_timeout(1000 * HANG)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: urls.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: "Security Policy" in line.text and wrong.append(line.text))
        page.goto(f"{address}/{hash}")
        page.wait_for_selector("#empty:visible, .card")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not wrong
    assert urls and all(url.startswith(f"{address}/") for url in urls)


@pytest.fixture
def page(open_page):
    return open_page()


def submit(page, query):
    page.fill("#query", query)
    page.press("#query", "Enter")


def search(page, query):
    submit(page, query)
    page.wait_for_selector(f'#status:has-text("results for “{query}”")')


def until(page, expression):
    """Waits for an expression; the page's security policy forbids Playwright's own way."""
    for _ in range(20 * HANG):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never: {expression}")


def card(page, name):
    return page.locator(".card", has=page.locator(".name", has_text=re.compile(re.escape(name))))


def count(page):
    """Results that the page shows."""
    return page.locator(".card").count()


def test_the_start_page_describes_the_index_and_keeps_a_text_typed_before_it_is_ready(
    page, address
):
    assert page.inner_text("#empty-title") == "6 videos to search"
    assert page.evaluate("document.activeElement.id") == "query"
    page.click("#about summary")
    assert "films" in page.inner_text("#facts")
    routes = []
    page.route("**/api/indexes*", lambda route: routes.append(route))
    page.goto(f"{address}/?again", wait_until="commit")
    page.fill("#query", "a dog")
    while not routes:
        page.wait_for_timeout(50)
    routes[0].continue_()
    page.wait_for_selector("#empty:visible")
    assert page.input_value("#query") == "a dog"
    page.press("#query", "Enter")
    page.wait_for_selector('#status:has-text("results for “a dog”")')


def test_type_click_play_and_seek(page, films):
    # A moment that begins later than its clip.
    queries = ("grey", "white", "a dog", "red", "it moves", "night", "sea", "two", "b", "z")
    hits = ((query, hit) for query in queries for hit in films[1]["moments"].text(query))
    query, hit = next(
        (q, h) for q, h in hits if h.start > 0 and h.path in ("a.mp4", "sub/b.mp4", "c.mp4")
    )
    search(page, query)
    card(page, hit.path).click()
    until(page, f"{VIDEO}?.currentTime > {hit.start + 0.2}")
    began, duration = page.evaluate(f"[{VIDEO}.played.start(0), {VIDEO}.duration]")
    assert began == pytest.approx(hit.start, abs=0.15)
    # The slider goes with the video, the video with the slider.
    page.wait_for_selector(".chart")
    assert page.locator(".chart .best").count() == 1
    assert page.locator(".chart .bar").count() >= 2
    until(page, f"{VIDEO}.paused")  # the moment's end
    box = page.locator(".chart").bounding_box()
    page.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + 10)
    expected = pytest.approx(duration / 4, abs=0.1)
    assert page.evaluate(f"{VIDEO}.currentTime") == expected
    assert float(page.input_value(".chart input")) == expected
    assert "score" in page.get_attribute(".chart input", "aria-valuetext")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(f"{VIDEO}.currentTime") > duration / 4
    # A second click closes it.
    card(page, hit.path).click()
    assert page.locator(".moment").count() == 0


def test_keyboard_alone(page):
    page.keyboard.press("Escape")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    page.keyboard.type("a dog / a cat")
    page.keyboard.press("Enter")
    page.wait_for_selector('#status:has-text("results for")')
    focused = "[...document.querySelectorAll('.card')].indexOf(document.activeElement)"
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == 0
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    for arrow in ("Right", "Right", "Left"):
        page.keyboard.press(f"Arrow{arrow}")
    assert page.evaluate(focused) == 1
    page.keyboard.press("Enter")
    page.wait_for_selector(".moment")
    opened = page.locator('.card[aria-expanded="true"] .name').inner_text()
    assert page.get_attribute(".moment", "aria-label") == opened
    page.keyboard.press("Escape")
    assert page.locator(".moment").count() == 0
    assert page.evaluate(focused) == 1
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")  # into what is open
    page.keyboard.press("Escape")
    assert page.evaluate(focused) == 1
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.id") == "query"


def test_the_address_keeps_the_query(open_page, page):
    search(page, "a dog")
    page.select_option("#index", "whole")
    until(page, "!document.body.classList.contains('busy')")
    address = page.evaluate("location.hash")
    search(page, "a cat")
    page.go_back()
    page.wait_for_selector('#status:has-text("a dog")')
    assert page.input_value("#query") == "a dog"
    other = open_page(address)
    other.wait_for_selector('#status:has-text("results for")')
    assert (other.input_value("#query"), other.input_value("#index")) == ("a dog", "whole")
    # Whole clips alone are in that index.
    assert all(text.startswith("0:00 ") for text in other.locator(".when").all_inner_texts())


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


def test_similar_moments_and_the_moments_before_and_after(page):
    search(page, "a dog")
    card(page, "c.mp4").click()
    page.wait_for_selector(".chart")
    following = page.locator('.moment [aria-label="Next moment"]')
    following.focus()
    spans = [page.inner_text(".moment .about p").partition(" · ")[0]]
    for _ in range(20):
        if following.get_attribute("aria-disabled") == "true":
            break
        shown = page.inner_text(".moment .about p")
        page.keyboard.press("Enter")
        until(page, f"document.querySelector('.moment .about p').innerText !== {shown!r}")
        page.wait_for_load_state("networkidle")
        spans.append(page.inner_text(".moment .about p").partition(" · ")[0])
    assert spans == sorted(set(spans)) and spans[-1].endswith("0:04.2")
    assert page.evaluate("document.activeElement.innerText") == "Next"
    page.locator(".moment button", has_text="Find similar").click()
    page.wait_for_selector('#status:has-text("results like c.mp4, ")')
    assert page.input_value("#query") == ""
    assert count(page) == 5 and card(page, "c.mp4").count() == 0
    address = page.evaluate("location.hash")
    page.locator("li", has=card(page, "a.mp4")).locator(".similar").click()
    page.wait_for_selector('#status:has-text("results like a.mp4, 0:0")')
    page.go_back()
    page.wait_for_selector('#status:has-text("results like c.mp4, ")')
    assert page.evaluate("location.hash") == address
    page.select_option("#index", "whole")  # that index has other moments
    page.wait_for_selector("#library:visible")


def test_filters(page):
    search(page, "a dog")
    assert count(page) == 6
    page.click("#filters summary")
    page.focus("#folder")
    until(page, "document.querySelector('#folders option')?.value === 'sub'")
    page.fill("#folder", "none")
    until(page, "!document.querySelector('#folders option')")
    page.fill("#folder", "sub")
    page.press("#folder", "Enter")
    until(page, "document.querySelectorAll('.card').length === 1")
    assert page.inner_text(".card .name") == "sub/b.mp4"
    page.fill("#until", "2001-01-01")
    page.wait_for_selector("#empty:visible")
    assert page.inner_text("#empty-title") == "Nothing found for “a dog”"
    assert "clear them" in page.inner_text("#empty-text")
    page.click("#clear")
    until(page, "document.querySelectorAll('.card').length === 6")


def test_upload_of_a_clip(page, films):
    page.set_input_files("#file", films[0] / "a.mp4")
    page.wait_for_selector('#status:has-text("results like")')
    # The clip itself is first, and its caption is listed; the caption's HTML is text.
    assert "a.mp4" in page.inner_text("#status")
    assert page.locator(".card .name").first.inner_text() == "a.mp4"
    assert page.locator(".card .score").first.inner_text() == "1.000"
    assert CAPTION in page.locator("#captions button").all_inner_texts()
    page.locator(".card").first.click()
    page.wait_for_selector(OPENED)
    assert page.locator(".chart").count() == 0  # there is no text to explain
    # The same clip with other prompts.
    page.select_option("#index", "whole")
    until(page, "!document.body.classList.contains('busy')")
    assert page.locator(".card .name").first.inner_text() == "a.mp4"
    assert "like a.mp4" in page.inner_text("#status")
    page.select_option("#index", "moments")
    page.wait_for_selector("#captions:visible")
    page.locator("#captions button", has_text=CAPTION).click()
    page.wait_for_selector('#status:has-text("results for")')
    assert page.input_value("#query") == CAPTION
    assert not page.is_visible("#captions")


def test_upload_of_a_picture_and_of_no_video(page, tmp_path):
    Image.new("RGB", (32, 32), "grey").save(tmp_path / "grey.png")
    page.set_input_files("#file", tmp_path / "grey.png")
    page.wait_for_selector('#status:has-text("6 results like grey.png")')
    # The same, dropped.
    page.evaluate(
        """bytes => {
            const files = new DataTransfer();
            files.items.add(new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"}));
            for (const name of ["dragenter", "drop"])
                window.dispatchEvent(new DragEvent(name, {dataTransfer: files, cancelable: true}));
        }""",
        list((tmp_path / "grey.png").read_bytes()),
    )
    page.wait_for_selector('#status:has-text("results like dropped.png")')
    assert not page.is_visible("#drop")
    (tmp_path / "clip.mp4").write_bytes(b"no video at all")
    page.set_input_files("#file", tmp_path / "clip.mp4")
    page.wait_for_selector("#error:visible")
    reason = page.inner_text("#reason").strip()
    assert reason and "\n" not in reason


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
