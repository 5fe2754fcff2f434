"""What a server does under many clients: how long they wait, and what it takes of memory.

    python -m benchmarks.serve --index=DIR --clients=50 --questions=20

Starts `python -m vop_jax.serve` and asks it from threads, each with its own connection: queries
that differ, and pictures of what was found, as the page does. Memory is the resident size of the
server and, apart, of its decoding processes, read from /proc: before the first question, and after
each of the rounds, which are alike but for their queries. An answer that is not the one to its own
query, or an error, ends it.
"""

import argparse
import http.client
import json
import pathlib
import re
import subprocess
import sys
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import numpy as np

HITS = 10


def start(index: str) -> tuple[subprocess.Popen, str, int, str]:
    """(process, host, port, name of the index) of a server that is ready."""
    command = [sys.executable, "-m", "vop_jax.serve", "--index", index, "--port", "0"]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    match = re.search(r"(\S+): http://([\d.]+):(\d+)/", process.stdout.readline())
    if not match:
        raise SystemExit("the server did not start")
    print(f"ready after {time.perf_counter() - began:.1f} s")
    return process, match[2], int(match[3]), match[1]


def resident(pid: int) -> tuple[float, float]:
    """MB of a process, and of its children together."""
    tasks = pathlib.Path(f"/proc/{pid}/task").iterdir()
    children = [c for task in tasks for c in (task / "children").read_text().split()]
    own, *others = (_rss(p) for p in (str(pid), *children))
    return own, sum(others)


def _rss(pid: str) -> float:
    match = re.search(r"VmRSS:\s+(\d+) kB", pathlib.Path(f"/proc/{pid}/status").read_text())
    return int(match[1]) / 1024 if match else 0.0


def ask(
    host: str, port: int, index: str, queries: list[str], pictures: int
) -> dict[str, list[float]]:
    """Seconds of each answer to one client."""
    connection = http.client.HTTPConnection(host, port, timeout=600)
    took: dict[str, list[float]] = {"query": [], "picture": []}

    def get(kind: str, address: str) -> bytes:
        began = time.perf_counter()
        connection.request("GET", address)
        answer = connection.getresponse()
        content = answer.read()
        took[kind].append(time.perf_counter() - began)
        if answer.status != 200:
            raise SystemExit(f"{address}: {answer.status} {content[:200]!r}")
        return content

    for query in queries:
        asked = urllib.parse.urlencode({"q": query, "k": HITS})
        response = json.loads(get("query", f"/api/search?{asked}"))
        if response["query"] != query:
            raise SystemExit(f"asked {query!r}, answered {response['query']!r}")
        for hit in response["hits"][:pictures]:
            t = (hit["start"] + hit["end"]) / 2
            get("picture", f"/api/thumbnail/{index}/{hit['file_id']}?t={t:.2f}")
    connection.close()
    return took


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.serve", description=__doc__)
    parser.add_argument("--index", required=True)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--questions", type=int, default=20, help="of each client, in a round")
    parser.add_argument("--pictures", type=int, default=3, help="after each query")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    process, host, port, index = start(args.index)
    try:
        _say("before", [], process.pid)
        for number in range(args.rounds):
            queries = [
                [f"client {c} looks for {q} in round {number}" for q in range(args.questions)]
                for c in range(args.clients)
            ]
            with ThreadPoolExecutor(args.clients) as pool:
                began = time.perf_counter()
                each = list(
                    pool.map(lambda own: ask(host, port, index, own, args.pictures), queries)
                )
                took = time.perf_counter() - began
            print(f"round {number}: {args.clients * args.questions / took:.1f} queries a second")
            _say(f"round {number}", each, process.pid)
    finally:
        process.terminate()
        process.wait()


def _say(what: str, each: list[dict[str, list[float]]], pid: int) -> None:
    for kind in ("query", "picture"):
        times = [1e3 * t for one in each for t in one[kind]]
        if times:
            p50, p95, most = np.percentile(times, [50, 95, 100])
            print(f"{what}: {kind} p50 {p50:.0f} ms, p95 {p95:.0f} ms, longest {most:.0f} ms")
    own, others = resident(pid)
    print(f"{what}: server {own:.0f} MB, decoding processes {others:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
