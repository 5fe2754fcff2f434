"""A web server of files that answers ranges, counts what it sends, and may fail."""

import contextlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Web:
    """Files by their names.

    Attributes:
        sent: bytes of answers.
        failures: requests that will be answered by 503.
    """

    def __init__(self, folder):
        self.folder, self.sent, self.failures = folder, 0, 0
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, body):
                if web.failures:
                    web.failures -= 1
                    self.send_error(503)
                    return
                path = web.folder / self.path.lstrip("/")
                if not path.is_file():
                    self.send_error(404)
                    return
                data = path.read_bytes()
                found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                self.send_response(206 if found else 200)
                size, start, end = len(data), 0, len(data)
                if found:
                    start, end = int(found[1]), min(int(found[2] or size - 1) + 1, size)
                    self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Length", str(end - start))
                self.send_header("ETag", f'"{hash(data):x}"')
                self.end_headers()
                if body:
                    web.sent += end - start
                    self.wfile.write(data[start:end])

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"


@contextlib.contextmanager
def serving(folder):
    web = Web(folder)
    thread = threading.Thread(target=web.server.serve_forever, daemon=True)
    thread.start()
    yield web
    web.server.shutdown()
    web.server.server_close()
    thread.join()
