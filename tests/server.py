"""A web server on this machine that sends one response."""

import contextlib
import http.server
import threading


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requested.append(self.path)
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(self.server.length))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(body, status=200, length=None):
    """(base URL, list of requested paths) of a server that sends `body` to every request."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.body, server.status, server.requested = body, status, []
    server.length = len(body) if length is None else length
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/models", server.requested
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
