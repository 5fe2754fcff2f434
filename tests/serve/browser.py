"""A real browser, and a server in a thread for it."""

import contextlib
import shutil
import socket
import threading
import time

import pytest

SWITCHES = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextlib.contextmanager
def chromium():
    """Playwright's browser; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("needs Chromium or Chrome")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=list(SWITCHES))
        yield browser
        browser.close()


@contextlib.contextmanager
def served(app, **limits):
    """(address, server) of an app that runs in a thread."""
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    from vop_jax.serve.server import Limits, make_server

    listening = socket.create_server(("127.0.0.1", 0))
    server = make_server(app, Limits(**limits))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
