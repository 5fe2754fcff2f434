"""What a server does under many clients: how long they wait, and what it takes of memory.

    python -m benchmarks.serve --index=DIR --clients=50 --questions=20

Starts `python -m vop_jax.serve` and asks it from threads, each with its own connection: queries
that differ, and pictures of what was found, as the page does. Memory is the resident size of the
server and, apart, of its decoding processes, read from /proc: before the first question, and after
each of the rounds, which are alike but for their queries. An answer that is not the one to its own
query, or an error, ends it.

With --compare it starts a second server, which writes the log of requests and is scraped every
15 seconds, asks both at the same time, and compares their CPU time a request: other load on the
machine then slows both.
"""

import argparse
import contextlib
import functools
import http.client
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

HITS = 10
OBSERVED = "--log=requests", "--metrics"


def start(index: str, *options: str) -> tuple[subprocess.Popen, str, int, str]:
    """(process, host, port, name of the index) of a server that is ready."""
    command = [sys.executable, "-m", "vop_jax.serve", "--index", index, "--port", "0"]
    began = time.perf_counter()
    errors = subprocess.DEVNULL if options else None
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=errors, text=True
    )
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


def cpu_seconds(pid: int) -> float:
    """Of a process, without its children."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def scraping(host: str, port: int) -> Iterator[None]:
    """Reads /metrics every 15 seconds, as the example of Prometheus' manual does."""
    done = threading.Event()

    def scrape() -> None:
        while not done.wait(15.0):
            with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=600) as response:
                assert b"vop_http_requests_total" in response.read()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def compare(args: argparse.Namespace) -> None:
    """CPU milliseconds a request without and with log and metrics, of servers side by side."""
    servers = {"plain": start(args.index), "observed": start(args.index, *OBSERVED)}
    requests = args.clients * args.questions * (1 + args.pictures)
    each: dict[str, list[float]] = {name: [] for name in servers}
    try:
        for number in range(args.rounds + 1):  # the first round warms up
            before = {name: cpu_seconds(server[0].pid) for name, server in servers.items()}
            _, host, port, _ = servers["observed"]
            with scraping(host, port), ThreadPoolExecutor(len(servers)) as pool:
                addresses = zip(*(server[1:] for server in servers.values()), strict=True)
                list(pool.map(functools.partial(run_round, args, number), *addresses))
            for name, server in servers.items() if number else ():
                spent = cpu_seconds(server[0].pid) - before[name]
                each[name].append(1e3 * spent / requests)
        for name, values in each.items():
            listed = ", ".join(f"{value:.3f}" for value in values)
            print(f"{name}: CPU ms a request, median {np.median(values):.3f}: {listed}")
        pairs = np.array(each["observed"]) / np.array(each["plain"]) - 1
        print(f"log and metrics cost {np.median(pairs):+.1%} (median of the rounds)")
    finally:
        for process, *_ in servers.values():
            process.terminate()
            process.wait()


def run_round(
    args: argparse.Namespace, number: int, host: str, port: int, index: str
) -> list[dict[str, list[float]]]:
    """Seconds of each answer to each client."""
    queries = [
        [f"client {c} looks for {q} in round {number}" for q in range(args.questions)]
        for c in range(args.clients)
    ]
    with ThreadPoolExecutor(args.clients) as pool:
        return list(pool.map(lambda own: ask(host, port, index, own, args.pictures), queries))


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.serve", description=__doc__)
    parser.add_argument("--index", required=True)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--questions", type=int, default=20, help="of each client, in a round")
    parser.add_argument("--pictures", type=int, default=3, help="after each query")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compare", action="store_true", help="without and with log and metrics")
    args = parser.parse_args()
    if args.compare:
        return compare(args)
    process, host, port, index = start(args.index)
    try:
        _say("before", [], process.pid)
        for number in range(args.rounds):
            began = time.perf_counter()
            each = run_round(args, number, host, port, index)
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
