"""The command line, the library of indexes, and the server as a process."""

import dataclasses
import re
import signal
import socket
import sys
import urllib.request

import pytest

from tests import processes, runs
from tests.search import library
from vop_jax.errors import UserError
from vop_jax.search.index import Index
from vop_jax.serve import __main__ as command
from vop_jax.serve.app import open_library

WRONG_NAMES = "films.example:80", "https://films.example", "a b", ""


@pytest.fixture
def indexes(tmp_path, films):
    """Two indexes of one folder name and one CLIP."""
    return [str(library.copy(films[1], tmp_path / name)) for name in ("an index", "other/an index")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--index"),
        (["--host=127.0.0.1"], "x: no index"),
        (["--port=70000"], "65535"),
        (["--max_upload_mb=0"], "a number, 0.001 or more"),
        (["--max_seconds=nan"], "a number, 0.001 or more"),
        (["--host=no.such.host.invalid"], "--host"),
        (["--token=a b"], "--token"),
        (["--tok=a"], "--tok"),
        *(([f"--name={n}"], "must be a host's name, as search.example.org") for n in WRONG_NAMES),
    ],
)
def test_wrong_calls_end_with_one_line(arguments, message, capsys):
    assert command.main(["--port=0", *["--index=x"] * bool(arguments), *arguments]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line


def test_a_port_in_use_and_a_missing_package_are_named(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert command.main(["--index", "x", "--port", port]) == 2
    assert "in use" in capsys.readouterr().err
    monkeypatch.setattr(command, "PACKAGES", ("fastapi", "no_such_package"))
    assert command.main(["--index", "x", "--port", "0"]) == 2
    assert capsys.readouterr().err == 'error: no no_such_package: pip install -e ".[serve]"\n'


def test_a_server_that_others_reach_without_a_token_warns(capsys, monkeypatch):
    monkeypatch.setenv("VOP_JAX_TOKEN", "")
    arguments = ["--index", "/none", "--host", "0.0.0.0", "--port", "0"]
    for token, warned in (([], True), (["--token", "abcdefgh"], False)):
        command.main([*arguments, *token])
        warning = "warning: --host=0.0.0.0 without --token"
        assert capsys.readouterr().err.startswith(warning) == warned
    assert all(map(command.is_local, ("localhost", "127.0.0.2", "::1")))
    assert not any(map(command.is_local, ("0.0.0.0", "::", "127.evil.example", "192.168.0.1")))


def test_indexes_of_one_clip_share_it_and_get_names(indexes, tmp_path, monkeypatch):
    opened = open_library(indexes)
    assert list(opened) == ["an-index", "an-index-2"]
    one, other = (searcher.retriever for searcher in opened.values())
    assert one._backbone is other._backbone
    with pytest.raises(UserError, match="no index"):
        open_library([str(tmp_path)])

    def without_prompts(directory):
        index = Index(directory)
        if "other" in str(directory):
            index.info = dataclasses.replace(index.info, prompts="/gone")
        return index

    monkeypatch.setattr("vop_jax.search.searcher.Index", without_prompts)
    with pytest.raises(UserError, match="/gone: missing, but"):
        open_library(indexes)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_process_answers_and_ends_cleanly(indexes, signum):
    arguments = ["-m", "vop_jax.serve", "--index", indexes[0], "--port", "0"]
    process = processes.Process([sys.executable, *arguments], env=runs.environment())
    address = re.search(r"http://\S+", process.stdout.readline())[0]
    if signum == signal.SIGINT:  # else it ends as soon as it says where it is
        for path in ("healthz", "", "api/search?q=white&k=1", "api/thumbnail/an-index/1"):
            with urllib.request.urlopen(address + path, timeout=processes.HANG) as response:
                assert response.status == 200 and response.read()
    process.send_signal(signum)
    assert process.communicate() == ("", "") and process.returncode == 128 + signum
