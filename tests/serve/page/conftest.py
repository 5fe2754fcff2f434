"""The page in a real browser, over a real server: how tests open it and act on it."""

import re
import shutil

import pytest

from tests.processes import HANG
from tests.search import library
from tests.serve.conftest import served
from tests.video import videos
from vop_jax.search.searcher import open_searcher
from vop_jax.serve.app import Settings, make_app

HTML = "<img src=x onerror=\"document.title='run'\">.mp4"
CAPTION = "<b>grey</b> becomes white"
OPENED = ".moment video"


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def address(films):
    with served(make_app(films[1], Settings(workers=1)), shutdown=0.5) as (port, _):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="session")
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
