"""Serves a page, and a JSON API, to search indexes that vop_jax.search made.

python -m vop_jax.serve --index DIR
python -m vop_jax.serve --index DIR --index DIR2 --host 0.0.0.0 --token SECRET
"""

import argparse
import importlib.util
import ipaddress
import os
import re
import socket
import sys
from collections.abc import Sequence
from typing import Any

from absl import logging

from vop_jax import cli
from vop_jax.cli import Parser, number, whole
from vop_jax.errors import UserError

TOKEN = "VOP_JAX_TOKEN"  # in the environment: other users see the arguments of a process
LIBRARIES = ("fastapi", "uvicorn", "python_multipart")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "python -m vop_jax.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--index", action="append", required=True, metavar="DIR", help="once or more")
    add("--clip", metavar="FILE", help="converted weights, if they have moved")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all of this machine")
    add("--name", action="append", default=[], metavar="HOST", help="of a proxy in front of it")
    add("--port", type=whole(0, 65535), default=8000, help="8000 if not said; 0: any free one")
    add("--token", default="", help=f"that must be given; better in ${TOKEN}")
    add("--max_upload_mb", type=number(0.001), default=200.0, help="of an uploaded file")
    add("--max_seconds", type=number(0.001), default=600.0, help="of an uploaded video")
    add("--decode_seconds", type=number(0.001), default=60.0, help="that decoding a file may take")
    add("--workers", type=whole(1, 64), default=2, help="processes that decode")
    return parser


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound.

    Raises:
        UserError: the address is not ours, or taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None) or 0
        why = os.strerror(number) if number > 0 else str(error)  # asyncio's repeats the address
        raise UserError(f"--host={host} --port={port}: {why}") from None


def is_local(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _token(given: str) -> str:
    token = given or os.environ.get(TOKEN, "")
    if token and not re.fullmatch(r"[A-Za-z0-9._~-]{8,}", token):
        raise UserError("--token: must be 8 or more of letters, digits and . _ ~ -")
    return token


def _name(given: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*", given):
        raise UserError(f"--name={given}: must be a host's name, as search.example.org")
    return given.lower()


def _serve(args: argparse.Namespace) -> None:
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'no {", ".join(missing)}: pip install -e ".[serve]"')
    from vop_jax.serve.app import Settings
    from vop_jax.serve.library import open_library

    token = _token(args.token)
    if not is_local(args.host) and not token:
        print(
            f"warning: --host={args.host} without --token: whoever reaches this address sees the "
            "videos",
            file=sys.stderr,
        )
    names = tuple(_name(name) for name in args.name)
    settings = Settings(
        token=token,
        max_upload=int(args.max_upload_mb * 2**20),
        max_seconds=args.max_seconds,
        hosts=(*Settings.hosts, args.host, *names) if is_local(args.host) else (),
        names=names,
        workers=args.workers,
        decode_seconds=args.decode_seconds,
    )
    with listen(args.host, args.port) as sock:
        library = open_library(args.index, args.clip)
        for searcher in library.values():
            searcher.retriever.compile()
        _run(library, settings, sock)


def _run(library: Any, settings: Any, sock: socket.socket) -> None:
    from vop_jax.serve.app import make_app
    from vop_jax.serve.server import Limits, make_server, possible_connections

    host, port = sock.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    app = make_app(library, settings)
    server = make_server(
        app,
        Limits(possible_connections(Limits.connections)),
        ready=lambda: print(f"{', '.join(library)}: http://{address}/", flush=True),
    )
    server.run(sockets=[sock])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def program() -> None:
        args = _parser().parse_args(argv)
        cli.set_up_logging(logging.ERROR)  # each response reports truncated queries
        _serve(args)

    return cli.run(program)


if __name__ == "__main__":
    sys.exit(main())
