"""Serves a web page and a JSON API that search indexes made by vop_jax.search.

vop serve --index DIR
vop serve --index DIR --index DIR2 --host 0.0.0.0 --token SECRET
vop serve --store http://HOST:19530#NAME
"""

import argparse
import importlib.util
import ipaddress
import os
import re
import socket
import sys
from collections.abc import Sequence

from absl import logging

from vop_jax import cli
from vop_jax.cli import Parser, number, whole
from vop_jax.errors import UserError
from vop_jax.search.stores import client

TOKEN = "VOP_JAX_TOKEN"  # environment variable; other users of a machine see arguments
PACKAGES = ("fastapi", "uvicorn", "python_multipart")
LOGS = ("none", "requests", "queries")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="vop serve", description=__doc__)
    add = parser.add_argument
    add("--index", action="append", default=[], metavar="DIR", help="one or more times")
    add("--store", action="append", default=[], metavar="URI", help="an index on a Milvus server")
    add("--clip", metavar="FILE", help="the converted CLIP weights, if they have moved")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all addresses")
    add("--name", action="append", default=[], metavar="HOST", help="host name of a proxy in front")
    add("--port", type=whole(0, 65535), default=8000, help="default 8000; 0: any free port")
    add("--token", default="", help=f"secret that requests must carry; safer in ${TOKEN}")
    add("--max_upload_mb", type=number(0.001), default=200.0, help="largest upload, MB")
    add("--max_seconds", type=number(0.001), default=600.0, help="longest uploaded video, seconds")
    add("--decode_seconds", type=number(0.001), default=60.0, help="time limit to decode a file")
    add("--workers", type=whole(1, 64), default=2, help="decoding processes")
    add("--log", choices=LOGS, default="none", help="one line a request; requests: without queries")
    add("--metrics", action="store_true", help="serve /metrics for Prometheus")
    return parser


def listen(host: str, port: int) -> socket.socket:
    """A bound socket.

    Raises:
        UserError: the address is not one of this machine, or is in use.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        code = getattr(error, "errno", None) or 0
        why = os.strerror(code) if code > 0 else str(error)  # asyncio's text repeats the address
        raise UserError(f"--host={host} --port={port}: {why}") from None


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_token(token: str) -> str:
    if token and not re.fullmatch(r"[A-Za-z0-9._~-]{8,}", token):
        raise UserError("--token: must be 8 or more of letters, digits and . _ ~ -")
    return token


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*", name):
        raise UserError(f"--name={name}: must be a host's name, as search.example.org")
    return name.lower()


def _serve(args: argparse.Namespace) -> None:
    packages = (*PACKAGES, "prometheus_client") if args.metrics else PACKAGES
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'no {", ".join(missing)}: pip install -e ".[serve]"')
    if not args.index and not args.store:
        raise UserError("give --index=DIR, or --store=http://HOST:PORT#NAME")
    if local := [store for store in args.store if not client.is_server(store)]:
        raise UserError(f"--store={local[0]}: must be http(s)://HOST:PORT#NAME")
    from vop_jax.serve.app import Settings, make_app, open_library
    from vop_jax.serve.server import Limits, available_connections, make_server

    token = _check_token(args.token or os.environ.get(TOKEN, ""))
    if not is_local(args.host) and not token:
        print(
            f"warning: --host={args.host} without --token: anyone who reaches this address sees "
            "the videos",
            file=sys.stderr,
        )
    names = tuple(map(_check_name, args.name))
    settings = Settings(
        token=token,
        max_upload=int(args.max_upload_mb * 2**20),
        max_seconds=args.max_seconds,
        hosts=(*Settings.hosts, args.host, *names) if is_local(args.host) else (),
        names=names,
        workers=args.workers,
        decode_seconds=args.decode_seconds,
        log=args.log,
        metrics=args.metrics,
        clip=args.clip,
    )
    with listen(args.host, args.port) as sock:
        library = open_library([*args.index, *args.store], args.clip)
        for searcher in library.values():
            searcher.retriever.compile()
        host, port = sock.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        server = make_server(
            make_app(library, settings),
            Limits(available_connections(Limits.connections)),
            ready=lambda: print(f"{', '.join(library)}: http://{address}/", flush=True),
        )
        server.run(sockets=[sock])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def program() -> None:
        args = _parser().parse_args(argv)
        cli.set_up_logging(logging.ERROR)  # each response reports a truncated query itself
        _serve(args)

    return cli.run(program)


if __name__ == "__main__":
    sys.exit(main())
