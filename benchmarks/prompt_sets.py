"""What many prompt sets over one CLIP cost: memory, loading, switching.

    python -m benchmarks.prompt_sets --sets 100

Random weights and prompts of base VoP; one caption is embedded, with the same prompts again and
again and with another set each time.
"""

import argparse
import gc
import pathlib
import tempfile
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np

import vop_jax
from vop_jax.clip.weights import parameter_shapes, save_clip
from vop_jax.config.clip import PRESETS, ClipConfig
from vop_jax.inference.retriever import Retriever
from vop_jax.model import TextVideoModel
from vop_jax.storage import tensors
from vop_jax.tuning.methods import MethodConfig
from vop_jax.tuning.partition import partition
from vop_jax.tuning.prompt_set import PromptSet, save_prompts


def draw(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict:
    """A tree of random parameters."""
    rng = np.random.default_rng(seed)
    flat = {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}
    return tensors.unflatten(flat)


def write_sets(root: pathlib.Path, clip: ClipConfig, count: int) -> list[pathlib.Path]:
    """`root/clip` and so many sets of prompts over it."""
    params = draw(parameter_shapes(clip), 0)
    fingerprint = save_clip(root / "clip", params, clip, source="random", source_sha256="")
    method = MethodConfig("vop")
    shapes = tensors.unflatten(TextVideoModel(clip, method).shapes())
    trainable, _ = partition(shapes, method.trainable_patterns(clip))
    own = {name: leaf.shape for name, leaf in tensors.flatten(trainable).items()}
    paths = [root / f"{i}.safetensors" for i in range(count)]
    for i, path in enumerate(paths):
        save_prompts(path, PromptSet(draw(own, i + 1), method, fingerprint, "random", clip))
    return paths


def held_bytes() -> int:
    """Of all arrays on the devices."""
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def seconds_each(sets: Sequence[Retriever]) -> float:
    """Of embedding a caption with each set, in turn."""
    begin = time.perf_counter()
    for retriever in sets:
        retriever.embed_text(["a squid is talking"])
    return (time.perf_counter() - begin) / len(sets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=PRESETS, default="ViT-B/32")
    parser.add_argument("--sets", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        paths = write_sets(root, PRESETS[args.arch], args.sets)
        first = vop_jax.load(root / "clip", paths[0], devices=1)
        seconds_each([first])  # compiles
        before = held_bytes()
        begin = time.perf_counter()
        sets = [first.with_prompts(path) for path in paths]
        loading = (time.perf_counter() - begin) / len(sets)
        print(f"CLIP and one set, MB: {before / 1e6:.1f}")
        print(f"{len(sets)} sets more, MB: {(held_bytes() - before) / 1e6:.1f}")
        print(f"loading a set, ms: {1e3 * loading:.1f}")
    for _ in range(2):
        same, other = seconds_each([first] * len(sets)), seconds_each(sets)
        print(f"a caption with the same set, ms: {1e3 * same:.1f}; with another: {1e3 * other:.1f}")


if __name__ == "__main__":
    main()
