"""How people search on the page: by text, keyboard, filters, an upload, a similar moment."""

import pytest
from PIL import Image

from tests.serve.page.conftest import CAPTION, OPENED, card, count, search, until

pytestmark = pytest.mark.slow

VIDEO = f"document.querySelector('{OPENED}')"


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
