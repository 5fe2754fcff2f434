"""The command line, and the server as a process."""

import re
import signal
import socket
import sys
import urllib.request

import pytest

from tests import processes, runs
from tests.search import library
from vop_jax.serve import __main__ as serve


@pytest.fixture(scope="module")
def index(tmp_path_factory, clip):
    root = tmp_path_factory.mktemp("process")
    library.write_films(root / "films", count=2)
    library.make(root / "index", root / "films", None, clip=str(clip))
    return root / "index"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--index"),
        (["--index", "/none"], "/none: no index"),
        (["--index", "x", "--port", "70000"], "65535"),
        (["--index", "x", "--max_upload_mb", "0"], "a number, 0.001 or more"),
        (["--index", "x", "--max_seconds", "nan"], "a number, 0.001 or more"),
        (["--index", "x", "--host", "no.such.host.invalid"], "--host"),
        (["--index", "x", "--token", "a b"], "--token"),
        (["--index", "x", "--tok", "a"], "--tok"),
    ],
)
def test_wrong_calls(arguments, said, capsys):
    assert serve.main(["--port", "0", *arguments]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and said in line


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert serve.main(["--index", "x", "--port", port]) == 2
    assert "in use" in capsys.readouterr().err


def test_a_missing_extra(monkeypatch, capsys):
    monkeypatch.setattr(serve, "LIBRARIES", ("fastapi", "no_such_library"))
    assert serve.main(["--index", "x", "--port", "0"]) == 2
    assert capsys.readouterr().err == 'error: no no_such_library: pip install -e ".[serve]"\n'


def test_a_warning_where_others_reach_it(capsys, monkeypatch):
    monkeypatch.setenv("VOP_JAX_TOKEN", "")
    serve.main(["--index", "/none", "--host", "0.0.0.0", "--port", "0"])
    assert capsys.readouterr().err.startswith("warning: --host=0.0.0.0 without --token")
    serve.main(["--index", "/none", "--host", "0.0.0.0", "--port", "0", "--token", "abcdefgh"])
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "local"),
    [
        *((host, True) for host in ("localhost", "127.0.0.2", "::1")),
        *((host, False) for host in ("0.0.0.0", "::", "127.evil.example", "192.168.0.1")),
    ],
)
def test_which_hosts_are_local(host, local):
    assert serve.is_local(host) == local


def start(index, *arguments):
    command = [sys.executable, "-m", "vop_jax.serve", "--index", index, "--port", "0", *arguments]
    process = processes.Process(command, env=runs.environment())
    line = process.stdout.readline()
    return process, re.search(r"http://\S+", line)[0]


@pytest.mark.slow
def test_it_can_be_ended_as_soon_as_it_says_where_it_is(index):
    process, _ = start(index)
    process.terminate()
    out, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and (out, err) == ("", "")


@pytest.mark.parametrize("name", ["films.example:80", "https://films.example", "a b", ""])
def test_names_of_a_proxy_that_cannot_be(name, capsys):
    assert serve.main(["--index", "/none", "--name", name]) == 2
    assert "must be a host's name, as search.example.org" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGTERM, 128 + 15), (signal.SIGINT, 128 + 2)]
)
def test_a_process_answers_and_ends_cleanly(index, signum, status):
    process, address = start(index)
    try:
        for path in ("healthz", "", "api/search?q=white&k=1", "api/thumbnail/index/1"):
            with urllib.request.urlopen(address + path, timeout=processes.HANG) as answer:
                assert answer.status == 200 and answer.read()
        process.send_signal(signum)
        out, err = process.communicate()
        assert process.returncode == status and (out, err) == ("", "")
    finally:
        process.kill()
