"""Who is let in, and how much is taken in."""

import pytest

ADDRESSES = ["/", "/api/indexes", "/api/search?q=a", "/docs", "/openapi.json", "/media/films/1"]
TOKEN = "a-long-token"


@pytest.fixture
def guarded(serve):
    return serve(token=TOKEN)


@pytest.mark.parametrize("address", [*ADDRESSES, "/static/page.js", "/none"])
def test_nothing_without_the_token(guarded, address):
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "Bearer é".encode()},
        {"Cookie": "token=wrong"},
    ):
        answer = guarded.get(address, headers=headers)
        assert answer.status_code == 401 and "token" in answer.json()["error"]
        assert answer.headers["www-authenticate"] == "Bearer"
    assert guarded.get(f"{address}?token=wrong").status_code == 401


def test_a_health_check_needs_no_token(guarded):
    assert guarded.get("/healthz").json() == {"status": "ok"}


def test_a_bearer(guarded):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert guarded.get("/api/indexes", headers=headers).status_code == 200


def test_the_page_sets_a_cookie_that_scripts_do_not_see(guarded):
    answer = guarded.get(f"/?token={TOKEN}", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert f"token={TOKEN}" in cookie and "httponly" in cookie and "samesite=strict" in cookie
    assert guarded.get("/").status_code == guarded.get("/api/indexes").status_code == 200


def test_only_the_page_takes_a_token_in_its_address(guarded):
    assert guarded.get(f"/api/indexes?token={TOKEN}").status_code == 401


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000"])
def test_its_own_names(client, host):
    assert client.get("/healthz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "[", "a@b:c"])
def test_other_names(client, host):
    answer = client.get("/healthz", headers={"Host": host})
    assert answer.status_code == 400 and answer.json()["error"].startswith("Host")


def test_any_name_where_it_is_for_others(serve):
    client = serve(hosts=())
    assert client.get("/healthz", headers={"Host": "videos.example"}).status_code == 200


def test_a_proxy_in_front(serve):
    client = serve(hosts=("localhost", "films.example"), names=("films.example",))
    for headers, status in [
        ({"Host": "films.example"}, 200),
        ({"Host": "films.example", "Origin": "https://films.example"}, 200),
        ({"Host": "localhost:8000", "Origin": "https://films.example"}, 200),  # as nginx sends it
        ({"Host": "localhost:8000", "Origin": "https://evil.example"}, 403),
        ({"Host": "films.example", "Origin": "http://localhost"}, 403),
        ({"Host": "evil.example"}, 400),
    ]:
        assert client.get("/api/indexes", headers=headers).status_code == status, headers


def test_other_sites_pages(client):
    for origin, status in [
        ("http://localhost", 200),
        ("http://evil.example", 403),
        ("null", 403),
        ("http://localhost:81", 403),
    ]:
        answer = client.get("/api/indexes", headers={"Origin": origin})
        assert answer.status_code == status, origin


@pytest.mark.parametrize("address", [*ADDRESSES, "/none", "/api/search"])
def test_headers_on_everything(client, address):
    headers = client.get(address).headers
    assert headers["content-security-policy"].startswith("default-src 'self';")
    assert headers["x-content-type-options"] == "nosniff"


def test_an_upload_that_says_it_is_too_large(serve):
    client = serve(max_upload=100_000)
    answer = client.post("/api/search/video", files={"file": b"0" * 200_000})
    assert answer.status_code == 413
    assert answer.json() == {"error": "more than the 0.0953674 MB that are taken"}


def test_an_upload_that_does_not_say(serve):
    client = serve(max_upload=100_000)
    taken = 0

    def chunks():
        nonlocal taken
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        for _ in range(100):
            taken += 10_000
            yield b"0" * 10_000
        yield b"\r\n--b--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = client.post("/api/search/video", content=chunks(), headers=headers)
    assert answer.status_code == 413 and "taken" in answer.json()["error"]


def test_a_body_where_none_belongs(client):
    answer = client.request("GET", "/api/indexes", content=b"0" * 200_000)
    assert answer.status_code == 413


def test_a_length_that_is_none(client):
    answer = client.post("/api/search/video", headers={"Content-Length": "-1"})
    assert answer.status_code == 413


def test_too_many_uploads_at_a_time(client, monkeypatch):
    monkeypatch.setattr("vop_jax.serve.middleware.UPLOADS", 0)
    answer = client.post("/api/search/video", files={"file": b"0"})
    assert answer.status_code == 503 and answer.headers["retry-after"]


def test_an_upload_that_takes_too_long(client, monkeypatch):
    monkeypatch.setattr("vop_jax.serve.middleware.UPLOAD_SECONDS", 0.0)
    answer = client.post("/api/search/video", files={"file": b"0"})
    assert answer.status_code == 408
