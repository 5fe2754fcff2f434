"""No request makes the server fail, whether it fits the schema or not."""

import collections

import hypothesis
import pytest
from fastapi.testclient import TestClient
from hypothesis import strategies

from vop_jax.serve.app import Settings, make_app

EXAMPLES = 100  # of each address and mode
KNOWN = {"index": "films", "file_id": 1}
FILTERS = ("folder", "since", "until")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_request_makes_the_server_fail(searcher, mode):
    """Half of the requests name an existing index and file."""
    schemathesis = pytest.importorskip("schemathesis", reason="fuzzes, where it is installed")
    app = make_app({"films": searcher}, Settings(hosts=(), workers=1, decode_seconds=5.0))
    seen = collections.Counter()

    def ask(case, known):
        for values in (case.query, case.path_parameters) if known else ():
            values.update({name: value for name, value in KNOWN.items() if name in values})
            for name in FILTERS:
                values.pop(name, None)
        response = case.call()
        seen[response.status_code] += 1
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            (line,) = response.json().values()
            assert list(response.json()) == ["error"] and line and "\n" not in line

    settings = hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    with TestClient(app):
        for result in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations():
            operation = result.ok()
            if mode == "positive" or operation.query or operation.path_parameters:
                case = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))
                settings(hypothesis.given(case, strategies.booleans())(ask))()
    assert seen.total() >= 6 * EXAMPLES
    assert seen.keys() >= ({200, 400, 404} if mode == "positive" else {200, 404, 422})
