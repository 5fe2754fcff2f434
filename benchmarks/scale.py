"""What an index of many videos costs, computed from measured pieces, and a check of its duration.

    python -m benchmarks.scale

The pieces are those of docs/benchmarks: a core decodes, a device embeds, a vector takes room, a
core compares vectors. Options replace them by your own. The duration of a run is estimated from
the work of a shard; a simulation of workers that are preempted and of shards that take longer than
others checks the estimate.
"""

import argparse
import dataclasses
import heapq
import math
from collections.abc import Sequence

import numpy as np

HOUR = 3600.0


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What was measured, and what a user's videos are like.

    Attributes:
        seconds: of a video, on average.
        megabytes: of a minute of video.
        stride: seconds between moments; each video also has one moment for all of it.
        decode: seconds of a core for a second of video.
        embed: moments a second of a device.
        dim: E.
        row: bytes of a row without its vector.
        scan: bytes of vectors that a server core compares a second, in exact searches.
        queries: a second, at the busiest time.
    """

    seconds: float = 60.0
    megabytes: float = 15.0
    stride: float = 5.0
    decode: float = 0.025
    embed: float = 1900.0
    dim: int = 512
    row: int = 200
    scan: float = 13e9
    queries: float = 10.0


@dataclasses.dataclass(frozen=True)
class Workers:
    """The machines of a run.

    Attributes:
        count: number of workers.
        cores: of each; a worker also has one device.
        shard: files that it takes at once.
        start: seconds until a new worker takes its first shard.
        preemptions: an hour of a worker, on average; another worker starts in its place.
        spread: standard deviation of the logarithm of a shard's duration.
    """

    count: int = 50
    cores: int = 16
    shard: int = 128
    start: float = 180.0
    preemptions: float = 0.05
    spread: float = 0.5


def costs(videos: int, p: Pieces) -> dict[str, float]:
    """Of a first run, and of answering from the index."""
    moments = videos * (1 + p.seconds / p.stride)
    memory = moments * (4 * p.dim + p.row)
    return {
        "moments": moments,
        "decoding, core hours": videos * p.seconds * p.decode / HOUR,
        "embedding, device hours": moments / p.embed / HOUR,
        "read from the bucket, TB": 2 * videos * p.seconds / 60 * p.megabytes / 1e6,
        "collection, GB of memory": memory / 1e9,
        "exact search, cores": p.queries * memory / p.scan,
    }


def shard_seconds(p: Pieces, w: Workers) -> float:
    """The mean duration of a shard, in which decoding and embedding overlap."""
    decoding = w.shard * p.seconds * p.decode / w.cores
    embedding = w.shard * (1 + p.seconds / p.stride) / p.embed
    return max(decoding, embedding)


def estimate(videos: int, p: Pieces, w: Workers) -> float:
    """Seconds of a run: the start, the work with what preemptions cost, and the last shards.

    A preempted worker has committed what it embedded, so that only its start is lost.
    """
    mean = shard_seconds(p, w)
    shards = math.ceil(videos / w.shard)
    busy = 1 / (1 + w.preemptions / HOUR * w.start)  # share of the time that a worker works
    work = shards * mean / min(w.count, shards) / busy
    # At the end, workers wait for the longest of the shards that are still under way.
    ratio = math.exp(w.spread * math.sqrt(2 * math.log(max(min(w.count, shards), 2))))
    longest = mean * ratio * math.exp(-(w.spread**2) / 2)
    return w.start + work + longest / 2


def simulate(videos: int, p: Pieces, w: Workers, seed: int = 0) -> float:
    """Seconds of a run in which shards differ and workers are preempted."""
    random = np.random.default_rng(seed)
    mean, shards = shard_seconds(p, w), math.ceil(videos / w.shard)
    drift = -(w.spread**2) / 2  # so that the mean is `mean`
    left = iter(mean * np.exp(random.normal(drift, w.spread, shards)))
    returned: list[float] = []  # rests of shards whose worker was preempted
    free = [w.start] * min(w.count, shards)
    heapq.heapify(free)
    end = w.start
    while True:
        duration = returned.pop() if returned else next(left, None)
        if duration is None:
            return end
        now = heapq.heappop(free)
        life = random.exponential(HOUR / w.preemptions) if w.preemptions else math.inf
        if life < duration:
            returned.append(duration - life)
            heapq.heappush(free, now + life + w.start)
            continue
        end = max(end, now + duration)
        heapq.heappush(free, now + duration)


def table(p: Pieces, w: Workers, sizes: Sequence[int], seeds: int) -> str:
    """As Markdown; a column for each number of videos."""
    columns = [costs(videos, p) for videos in sizes]
    heads = [f"{videos / 1e6:g} million videos" for videos in sizes]
    rows = [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(sizes)]
    for name in columns[0]:
        cells = (f"{column[name]:,.0f}" for column in columns)
        rows.append(f"| {name} | {' | '.join(cells)} |")
    hours = (f"{estimate(videos, p, w) / HOUR:,.1f}" for videos in sizes)
    rows.append(f"| {w.count} workers of {w.cores} cores, hours | {' | '.join(hours)} |")
    simulated = []
    for videos in sizes:
        runs = [simulate(videos, p, w, seed) / HOUR for seed in range(seeds)]
        simulated.append(f"{min(runs):,.1f}-{max(runs):,.1f}")
    rows.append(f"| the same, simulated {seeds} times | {' | '.join(simulated)} |")
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.scale", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--videos", type=int, nargs="+", default=[10**6, 10**7, 10**8])
    parser.add_argument("--seeds", type=int, default=5)
    for kind in (Pieces, Workers):
        for field in dataclasses.fields(kind):
            value = field.default
            parser.add_argument(f"--{field.name}", type=type(value), default=value)
    args = parser.parse_args(argv)
    given = vars(args)
    pieces = Pieces(**{field.name: given[field.name] for field in dataclasses.fields(Pieces)})
    workers = Workers(**{field.name: given[field.name] for field in dataclasses.fields(Workers)})
    print(table(pieces, workers, args.videos, args.seeds))


if __name__ == "__main__":
    main()
