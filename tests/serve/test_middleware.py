"""Which requests are let in, and how much of them."""

import asyncio
from unittest import mock

import pytest

from tests import processes
from vop_jax.serve.middleware import SafetyMiddleware, Settings

ADDRESSES = ["/", "/api/indexes", "/api/search?q=a", "/docs", "/openapi.json", "/media/films/1"]
TOKEN = "a-long-token"


@pytest.fixture(scope="module")
def guarded(serve):
    return serve(token=TOKEN)


def assert_protected(response):
    assert response.headers["content-security-policy"].startswith("default-src 'self';")
    assert response.headers["x-content-type-options"] == "nosniff"


def test_nothing_is_sent_without_the_token(guarded):
    for address in (*ADDRESSES, "/static/page.js", "/none"):
        wrong = "Bearer wrong", f"Basic {TOKEN}", "Bearer é".encode()
        for headers in ({}, {"Cookie": "token=wrong"}, *({"Authorization": w} for w in wrong)):
            response = guarded.get(address, headers=headers)
            assert response.status_code == 401 and "token" in response.json()["error"]
            assert response.headers["www-authenticate"] == "Bearer"
            assert_protected(response)
        assert guarded.get(f"{address}?token=wrong").status_code == 401
    assert guarded.get(f"/api/indexes?token={TOKEN}").status_code == 401  # only the page's own
    assert guarded.get("/healthz").json() == {"status": "ok"}


def test_the_token_may_come_as_a_header_or_by_the_page_as_a_cookie(guarded):
    for address in (*ADDRESSES, "/none", "/api/search"):
        response = guarded.get(address, headers={"Authorization": f"Bearer {TOKEN}"})
        assert response.status_code == {"/none": 404, "/api/search": 422}.get(address, 200)
        assert_protected(response)
    response = guarded.get(f"/?token={TOKEN}", follow_redirects=False)
    assert (response.status_code, response.headers["location"]) == (303, "/")
    cookie = response.headers["set-cookie"].lower()
    assert f"token={TOKEN}" in cookie and "httponly" in cookie and "samesite=strict" in cookie
    assert guarded.get("/").status_code == guarded.get("/api/indexes").status_code == 200
    guarded.cookies.clear()


def test_a_local_server_answers_to_its_own_names_and_pages(client):
    for host, origin, status in [
        *((host, None, 200) for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:80")),
        *((h, None, 400) for h in ("evil.example", "localhost.evil.example", "", "[", "a@b:c")),
        ("localhost", "http://localhost", 200),
        *(("localhost", o, 403) for o in ("http://evil.example", "null", "http://localhost:81")),
    ]:
        headers = {"Host": host} | ({"Origin": origin} if origin else {})
        response = client.get("/healthz", headers=headers)
        assert response.status_code == status, (host, origin)
        if status != 200:
            word = "Host" if status == 400 else "Origin"
            assert response.json()["error"].startswith(word)


def test_a_server_for_others_answers_to_any_name_and_a_proxy_s_pages(serve):
    assert serve(hosts=()).get("/healthz", headers={"Host": "any.example"}).status_code == 200
    proxied = serve(hosts=("localhost", "films.example"), names=("films.example",))
    for headers, status in [
        ({"Host": "films.example"}, 200),
        ({"Host": "films.example", "Origin": "https://films.example"}, 200),
        ({"Host": "localhost:8000", "Origin": "https://films.example"}, 200),  # as nginx sends it
        ({"Host": "localhost:8000", "Origin": "https://evil.example"}, 403),
        ({"Host": "films.example", "Origin": "http://localhost"}, 403),
        ({"Host": "evil.example"}, 400),
    ]:
        assert proxied.get("/healthz", headers=headers).status_code == status, headers


def test_bodies_that_are_too_large_are_refused(serve):
    client = serve(max_upload=100_000)
    response = client.post("/api/search/video", files={"file": b"0" * 200_000})
    assert response.status_code == 413
    assert response.json() == {"error": "larger than the 0.0953674 MB that are allowed"}

    def chunks():  # of an upload that does not declare its length
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        yield from (b"0" * 10_000 for _ in range(100))
        yield b"\r\n--b--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    response = client.post("/api/search/video", content=chunks(), headers=headers)
    assert response.status_code == 413 and "allowed" in response.json()["error"]
    assert client.request("GET", "/api/indexes", content=b"0" * 200_000).status_code == 413
    negative = {"Content-Length": "-1"}
    assert client.post("/api/search/video", headers=negative).status_code == 413


def test_uploads_are_limited_in_number_and_time(client, monkeypatch):
    upload = {"url": "/api/search/video", "files": {"file": b"0"}}
    monkeypatch.setattr("vop_jax.serve.middleware.UPLOAD_SECONDS", 0.0)
    assert client.post(**upload).status_code == 408
    monkeypatch.setattr("vop_jax.serve.middleware.UPLOADS", 0)
    response = client.post(**upload)
    assert response.status_code == 503 and response.headers["retry-after"]


def test_a_client_that_leaves_is_sent_nothing():
    async def wait(scope, receive, send):
        await asyncio.sleep(processes.HANG)

    messages = [{"type": "http.request", "body": b""}, {"type": "http.disconnect"}]
    receive, sent = mock.AsyncMock(side_effect=messages), mock.AsyncMock()
    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b""}
    scope["headers"] = [(b"host", b"localhost")]
    asyncio.run(SafetyMiddleware(wait, Settings())(scope, receive, sent))
    assert not sent.called
