"""Indexing a folder of clips, next to a loop of open_clip and PyAV over the same files.

    python -m benchmarks.index_peer --rounds=3

The clips are those of `benchmarks.prepare`: 10 s, 320 x 240, H.264, a key frame at most every 250
frames. Both programs take the same 12 frames of a clip, resize and crop them as CLIP does, and
embed 16 clips at once with the same random weights. Ours is `build_index` as the command calls it:
decoding processes start, files are hashed, vectors are committed. The loop is what one would write
by hand: threads decode ahead of the model, from front to back, for seeking would always lead to
the first frame; open_clip runs in bfloat16, as it has no use for an index, nothing is stored. Both
models are loaded and have run before; the programs run in turns.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import av
import numpy as np
import open_clip
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image

import vop_jax
from benchmarks.prepare import make_clip
from vop_jax.clip.convert.pytorch import convert
from vop_jax.clip.weights import save_clip
from vop_jax.inference.retriever import Retriever
from vop_jax.search.build import IndexRequest, build_index
from vop_jax.search.updater import IndexOptions
from vop_jax.training import malloc
from vop_jax.video.sampling import sample_indices

ARCH, FRAMES, BATCH = "ViT-B-32", 12, 16
DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass
class Runs:
    """Of one program, a number a round.

    Attributes:
        seconds: by the clock.
        cpu: of all cores, also those of its processes.
    """

    seconds: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)

    def time(self, program: Callable[[], object]) -> None:
        begin, cpu = time.perf_counter(), cpu_seconds()
        program()
        self.seconds.append(time.perf_counter() - begin)
        self.cpu.append(cpu_seconds() - cpu)


def cpu_seconds() -> float:
    """Of this process and of its children that ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def index(retriever: Retriever, folder: pathlib.Path) -> None:
    """Indexes a folder into a new directory."""
    with tempfile.TemporaryDirectory() as directory:
        request, options = IndexRequest(folder=str(folder)), IndexOptions(batch=BATCH)
        report = build_index(f"{directory}/index", request, options, retriever)
        assert not report.failed


class Peer:
    """open_clip in bfloat16, and the loop that embeds files with it."""

    def __init__(self, model: Any):
        self.model = model.eval().to(torch.bfloat16)
        self.size = model.visual.image_size[0]
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        self.mean, self.std = (torch.tensor(x)[:, None, None] * 255 for x in (mean, std))

    def embed(self, paths: list[pathlib.Path]) -> np.ndarray:
        """float32 [N, E], unit rows."""
        rows = []
        with ThreadPoolExecutor(os.cpu_count()) as pool, torch.inference_mode():
            read_ahead = pool.map(self.read, paths)
            while clips := list(itertools.islice(read_ahead, BATCH)):
                pixels = torch.from_numpy(np.concatenate(clips)).permute(0, 3, 1, 2)
                images = ((pixels - self.mean) / self.std).to(torch.bfloat16)
                features = self.model.encode_image(images, normalize=True).float()
                means = features.unflatten(0, (len(clips), FRAMES)).mean(1)
                rows.append(torch.nn.functional.normalize(means, dim=-1))
        return torch.cat(rows).numpy()

    def read(self, path: pathlib.Path) -> np.ndarray:
        """uint8 [F, S, S, 3] of a file."""
        reformatter, pictures = VideoReformatter(), []
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            wanted = sample_indices(stream.frames, FRAMES).tolist()
            for i, frame in enumerate(itertools.islice(container.decode(stream), wanted[-1] + 1)):
                if i in wanted:
                    rgb = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
                    pictures += [self.crop(Image.fromarray(rgb))] * wanted.count(i)
        return np.stack(pictures)

    def crop(self, image: Image.Image) -> np.ndarray:
        """uint8 [S, S, 3]: the short side resized, the centre of that."""
        scale = self.size / min(image.size)
        width, height = (int(side * scale + 1e-6) for side in image.size)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(resized.crop((left, top, left + self.size, top + self.size)))


def load_ours(model: Any, dtype: str) -> Retriever:
    """Our CLIP with the weights of open_clip's."""
    with tempfile.TemporaryDirectory() as folder:
        source, converted = f"{folder}/open_clip.pt", f"{folder}/clip.safetensors"
        torch.save(model.state_dict(), source)
        towers = {"vision_heads": model.visual.transformer, "text_heads": model.transformer}
        heads = {name: tower.resblocks[0].attn.num_heads for name, tower in towers.items()}
        clip = convert(source, activation="gelu", **heads)
        save_clip(converted, clip.params, clip.config, source="random", source_sha256="")
        retriever = vop_jax.load(converted, frames=FRAMES, dtype=dtype)
        retriever.compile()  # reads the weights, which are removed now
        return retriever


def format_table(runs: dict[str, Runs], clips: int) -> str:
    """Markdown; the last of the programs is what the others are compared with."""
    heading = ("program", "clips/s, median", "least", "most", "times the loop", "core s a clip")
    lines = [heading, ("---", *["---:"] * (len(heading) - 1))]
    *_, loop = runs.values()
    for name, run in runs.items():
        ratios = [theirs / own for theirs, own in zip(loop.seconds, run.seconds, strict=True)]
        rates = [clips / seconds for seconds in run.seconds]
        numbers = [statistics.median(rates), min(rates), max(rates), statistics.median(ratios)]
        numbers.append(statistics.median(run.cpu) / clips)
        lines.append((name, *(f"{number:.2f}" for number in numbers)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@contextlib.contextmanager
def clips_in(folder: str | None, count: int) -> Iterator[pathlib.Path]:
    """A folder of clips, rendered where they are missing; removed if it has no name."""
    with tempfile.TemporaryDirectory() as temporary:
        path = pathlib.Path(folder or temporary)
        path.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            if not (path / f"{i:02}.mp4").exists():
                make_clip(str(path / f"{i:02}.mp4"), i)
        yield path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--folder", help="keeps the clips for another call; one for each --clips")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="of our model")
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    malloc.keep_freed_memory()  # as `vop search index` does
    torch.set_num_threads(cores)
    model = open_clip.create_model(ARCH, pretrained=None)
    programs: dict[str, Callable[[pathlib.Path], object]] = {}
    for dtype in args.dtypes:
        retriever = load_ours(model, dtype)
        programs[f"build_index, {dtype}"] = functools.partial(index, retriever)
    peer = Peer(model)
    programs["open_clip loop, bfloat16"] = lambda path: peer.embed(sorted(path.iterdir()))
    runs = {name: Runs() for name in programs}
    with clips_in(args.folder, args.clips) as folder, tempfile.TemporaryDirectory() as few:
        for path in sorted(folder.iterdir())[:BATCH]:
            os.link(path, f"{few}/{path.name}")
        for program in programs.values():
            program(pathlib.Path(few))
        for _ in range(args.rounds):
            for name, program in programs.items():
                runs[name].time(functools.partial(program, folder))
                last = {"program": name, "seconds": runs[name].seconds[-1]}
                print(json.dumps({**last, "cpu": runs[name].cpu[-1]}), flush=True)
    print(f"\n{args.clips} clips, {args.rounds} rounds, {cores} cores\n")
    print(format_table(runs, args.clips))


if __name__ == "__main__":
    main()
