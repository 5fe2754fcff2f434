"""A Hub of this machine: repositories of files in commits, over the HTTP that its clients speak."""

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN = "hf_local"
REFUSED = "metadata of the card"


class Hub(ThreadingHTTPServer):
    """Models by OWNER/NAME: the newest commit is main.

    Attributes:
        repositories: {OWNER/NAME: [(commit, {path: bytes})]}, oldest commit first.
        private: the repositories that only TOKEN reads.
        requests: "METHOD path" of each request so far.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories, self.private, self.requests = {}, set(), []

    def commit(self, repository, files):
        """Adds a commit with these files to a repository, which may be new; returns its name."""
        commits = self.repositories.setdefault(repository, [])
        tree = {**(commits[-1][1] if commits else {}), **files}
        name = hashlib.sha1(f"{repository} {len(commits)}".encode()).hexdigest()
        commits.append((name, tree))
        return name

    def find(self, repository, revision):
        """(commit, {path: bytes}) of main or of a commit; None if there is none."""
        commits = self.repositories[repository]
        if revision == "main":
            return commits[-1] if commits else ("0" * 40, {})
        return next((commit for commit in commits if commit[0] == revision), None)


@contextmanager
def running():
    """A `Hub` that answers."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def answer(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code="", message=""):
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def parts(self, pattern):
        """The unquoted groups of a pattern if the whole path matches it."""
        match = re.fullmatch(pattern, urllib.parse.urlsplit(self.path).path)
        return match and [urllib.parse.unquote(part or "main") for part in match.groups()]

    def readable(self, repository):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", TOKEN):
            self.refuse(401, message="Invalid credentials in Authorization header")
        elif repository not in self.server.repositories or (
            repository in self.server.private and token != TOKEN
        ):
            self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        else:
            return True
        return False

    def do_GET(self):
        self.server.requests.append(f"{self.command} {self.path}")
        if found := self.parts(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)"):
            repository, revision, path = found
        elif found := self.parts(r"/api/models/([^/]+/[^/]+)(?:/(?:revision|tree)/([^/]+))?"):
            repository, revision, path = *found, None
        else:
            return self.refuse(404)
        if not self.readable(repository):
            return None
        if (commit := self.server.find(repository, revision)) is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        name, files = commit
        if path is None and "/tree/" in self.path:
            tree = [
                {"type": "file", "path": file, "size": len(data), "oid": _oid(data)}
                for file, data in files.items()
            ]
            return self.answer(200, tree)
        if path is None:
            siblings = [{"rfilename": file} for file in files]
            return self.answer(200, {"id": repository, "sha": name, "siblings": siblings})
        if path not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        return self.answer(200, files[path], X_Repo_Commit=name, ETag=f'"{_oid(files[path])}"')

    do_HEAD = do_GET

    def do_POST(self):
        self.server.requests.append(f"{self.command} {self.path}")
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else b"".join(self.chunks())
        if self.path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, message="Invalid credentials in Authorization header")
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if wanted["organization"] != "me":
                return self.refuse(403, message="You don't have the rights to create a model there")
            if wanted.get("visibility") == "private" or wanted.get("private"):
                self.server.private.add(name)
            status = 409 if name in self.server.repositories else 200
            self.server.repositories.setdefault(name, [])
            return self.answer(status, {"url": f"{self.server.url}/{name}"})
        if found := self.parts(r"/api/models/([^/]+/[^/]+)/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if found := self.parts(r"/api/models/([^/]+/[^/]+)/commit/main"):
            values = [json.loads(line) for line in body.splitlines()]
            files = {
                value["value"]["path"]: base64.b64decode(value["value"]["content"])
                for value in values
                if value["key"] == "file"
            }
            name = self.server.commit(found[0], files)
            url = f"{self.server.url}/{found[0]}/commit/{name}"
            return self.answer(200, {"commitUrl": url, "commitOid": name, "success": True})
        return self.refuse(404)

    def chunks(self):
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def validate(self, content):
        """As the Hub's validator answers, for the keys that it checks and a card of ours has."""
        data = yaml.safe_load(content.split("---\n")[1])
        errors = []
        for model in data.get("model-index", []):
            for result in model["results"]:
                dataset, metrics = result["dataset"], result["metrics"]
                named = result["task"].get("type"), dataset.get("type"), dataset.get("name")
                if not (all(named) and all(m["type"] and m["value"] >= 0 for m in metrics)):
                    errors.append({"message": f"{REFUSED}: {result}"})
        return self.answer(400 if errors else 200, {"errors": errors, "warnings": []})


def _oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
