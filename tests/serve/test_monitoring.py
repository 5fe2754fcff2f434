"""The log of requests, /metrics and /readyz."""

import os
import re

import pytest

from tests.search import library
from vop_jax.search.searcher import open_searcher

TOKEN = "a-long-token"
LINE = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z testclient %s \d+\.\d \d+"


@pytest.mark.parametrize("level", ["requests", "queries"])
def test_a_request_is_one_line_without_secrets(serve, capsys, level):
    client = serve(token=TOKEN, log=level)
    with_token = {"Authorization": f"Bearer {TOKEN}"}
    found = client.get("/api/search?q=my+secret&token=other", headers=with_token)
    client.get("/no%0A%1B[2Jsuch%E2%80%A8%20path", headers=with_token)
    client.get(f"/?token={TOKEN}", follow_redirects=False)
    client.cookies.clear()
    client.get("/api/search?q=refused")
    lines = capsys.readouterr().err.splitlines()
    query = r"\?q=my\+secret" if level == "queries" else ""
    refused = r"\?q=refused" if level == "queries" else ""
    paths = (
        f"GET /api/search{query} 200",
        "GET /no%0A%1B%5B2Jsuch%E2%80%A8%20path 404",
        "GET / 303",
        f"GET /api/search{refused} 401",
    )
    assert len(lines) == len(paths)
    for path, line in zip(paths, lines, strict=True):
        assert re.fullmatch(LINE % path, line), line
    assert lines[0].endswith(f" {len(found.content)}")


def samples(client, **headers):
    """{name{labels}: value} of a scrape."""
    response = client.get("/metrics", headers=headers)
    assert response.status_code == 200
    rows = (line.rsplit(" ", 1) for line in response.text.splitlines() if line[0] != "#")
    return {name: float(value) for name, value in rows}


def test_metrics_count_requests_by_route_and_describe_indexes(serve, searcher, tmp_path):
    client = serve(metrics=True)
    for address in ("/api/search?q=white", "/api/search?q=white&k=0", "/api/thumbnail/films/999"):
        client.get(address)
    for path in ("one", "two/three", "static/none"):
        client.get(f"/{path}")
    client.request("INVENTED", "/healthz")
    found = samples(client)

    def count(route, method, status):
        labels = f'method="{method}",route="{route}",status="{status}"'
        return found[f"vop_http_requests_total{{{labels}}}"]

    assert count("/api/search", "GET", 200) == count("/api/search", "GET", 422) == 1
    assert count("/api/thumbnail/{index}/{file_id}", "GET", 404) == 1
    assert count("other", "GET", 404) == 2 and count("/static", "GET", 404) == 1
    assert count("/healthz", "other", 405) == 1
    assert found['vop_http_request_seconds_bucket{le="+Inf",route="/api/search"}'] == 2
    assert found["vop_http_requests_running"] == 1  # the scrape itself
    assert {found[f'vop_queue_requests{{resource="{r}"}}'] for r in ("model", "search")} == {0}
    assert found['vop_index_up{index="films"}'] == 1
    kinds = searcher.index.counts()
    entries = {k: found[f'vop_index_entries{{index="films",kind="{k}"}}'] for k in kinds}
    assert entries == kinds
    changed = os.stat(searcher.index.directory / "catalog.sqlite").st_mtime
    labels = '{index="films"}'
    assert found[f"vop_index_changed_timestamp_seconds{labels}"] == pytest.approx(changed)
    assert found["process_cpu_seconds_total"] > 0
    accept = "application/openmetrics-text; version=1.0.0"
    assert client.get("/metrics", headers={"Accept": accept}).text.endswith("# EOF\n")
    response = serve().get("/metrics")
    assert (response.status_code, response.json()) == (
        404,
        {"error": "metrics: start the server with --metrics"},
    )


def test_a_server_is_ready_while_its_indexes_can_be_read(serve, films, retriever, tmp_path):
    directory = library.copy(films[1], tmp_path / "index")
    client = serve({"own": open_searcher(directory, retriever=retriever)}, token=TOKEN)
    assert client.get("/readyz").json() == {"status": "ready"}
    assert client.get("/metrics").status_code == 401
    os.rename(directory, tmp_path / "away")
    response = client.get("/readyz")
    assert response.status_code == 503
    assert response.json() == {"error": "index own: cannot be read"}
    assert client.get("/healthz").status_code == 200
    os.rename(tmp_path / "away", directory)
    assert client.get("/readyz").status_code == 200
