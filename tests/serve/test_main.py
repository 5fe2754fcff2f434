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


@pytest.fixture(scope="module")
def indexes(tmp_path_factory, clip):
    """Two indexes of one folder name and one CLIP."""
    root = tmp_path_factory.mktemp("library")
    library.write_films(root / "films", count=2)
    directories = [root / "an index", root / "other" / "an index"]
    directories[1].parent.mkdir()
    for directory in directories:
        library.make(directory, root / "films", None, clip=str(clip))
    return [str(directory) for directory in directories]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--index"),
        (["--index", "/none"], "/none: no index"),
        (["--index", "x", "--port", "70000"], "65535"),
        (["--index", "x", "--max_upload_mb", "0"], "a number, 0.001 or more"),
        (["--index", "x", "--max_seconds", "nan"], "a number, 0.001 or more"),
        (["--index", "x", "--host", "no.such.host.invalid"], "--host"),
        (["--index", "x", "--token", "a b"], "--token"),
        (["--index", "x", "--tok", "a"], "--tok"),
        *(
            (["--index", "x", "--name", name], "must be a host's name, as search.example.org")
            for name in ("films.example:80", "https://films.example", "a b", "")
        ),
    ],
)
def test_wrong_calls_end_with_one_line(arguments, message, capsys):
    assert command.main(["--port", "0", *arguments]) == 2
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
    command.main(arguments)
    assert capsys.readouterr().err.startswith("warning: --host=0.0.0.0 without --token")
    command.main([*arguments, "--token", "abcdefgh"])
    assert "warning" not in capsys.readouterr().err
    assert all(map(command.is_local, ("localhost", "127.0.0.2", "::1")))
    others = ("0.0.0.0", "::", "127.evil.example", "192.168.0.1")
    assert not any(map(command.is_local, others))


def test_indexes_of_one_clip_share_it_and_get_names(indexes, tmp_path, monkeypatch):
    opened = open_library(indexes)
    assert list(opened) == ["an-index", "an-index-2"]
    one, other = (searcher.retriever for searcher in opened.values())
    assert one._backbone is other._backbone
    assert opened["an-index"].text("white")[0] == opened["an-index-2"].text("white")[0]
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
    try:
        address = re.search(r"http://\S+", process.stdout.readline())[0]
        if signum == signal.SIGINT:  # else it ends as soon as it says where it is
            for path in ("healthz", "", "api/search?q=white&k=1", "api/thumbnail/an-index/1"):
                with urllib.request.urlopen(address + path, timeout=processes.HANG) as response:
                    assert response.status == 200 and response.read()
        process.send_signal(signum)
        out, err = process.communicate()
        assert process.returncode == 128 + signum and (out, err) == ("", "")
    finally:
        process.kill()
