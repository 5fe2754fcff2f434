"""python -m tests.serve.screenshots ADDRESS QUERY FOLDER: the pictures of the docs."""

import io
import pathlib
import sys

from PIL import Image

from tests.serve.browser import chromium

VIEWS = {
    "serve.png": {"color_scheme": "light", "viewport": {"width": 1160, "height": 946}},
    "serve_phone.png": {
        "color_scheme": "dark",
        "viewport": {"width": 390, "height": 844},
        "is_mobile": True,
        "has_touch": True,
    },
}


def main(address: str, query: str, folder: str) -> None:
    """Takes pictures of the first result of a query, open at its best frame."""
    with chromium() as browser:
        for name, view in VIEWS.items():
            page = browser.new_context(**view).new_page()
            page.goto(address)
            page.fill("#query", query)
            page.press("#query", "Enter")
            page.click(".card >> nth=0")
            page.wait_for_selector(".reading button")
            page.evaluate("document.querySelector('video').pause()")
            page.click(".reading button")
            page.mouse.move(0, 0)
            page.evaluate("document.activeElement.blur()")
            page.wait_for_load_state("networkidle")
            page.wait_for_timeout(4000)  # until the player's own controls have faded
            picture = Image.open(io.BytesIO(page.screenshot()))
            picture.convert("RGB").save(pathlib.Path(folder, name), optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
