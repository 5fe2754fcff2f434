"""FLOPs of a training step against those of a forward pass, as XLA counts them.

    python benchmarks/step_flops.py --arch ViT-B/32 --frames 12 --batch 2

Prompt tuning needs the activations' gradients, not the frozen weights': its step should cost
about twice a forward pass, full tuning about three times.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vop_jax import tensorfile
from vop_jax.clip.config import PRESETS, ClipConfig
from vop_jax.config import base_config
from vop_jax.model import TextVideoModel
from vop_jax.training.optimizer import make_optimizer
from vop_jax.training.step import TrainState, batch_loss, make_train_step
from vop_jax.tuning.methods import METHODS, MethodConfig
from vop_jax.tuning.partition import merge, split


def compiled_flops(function: Callable[..., Any], *shapes: Any) -> float:
    """The FLOPs of the compiled program; arguments are trees of `jax.ShapeDtypeStruct`."""
    cost: Any = jax.jit(function).lower(*shapes).compile().cost_analysis()
    return float(cost["flops"])


def step_flops(
    clip: ClipConfig, method: MethodConfig, frames: int, batch: int
) -> tuple[float, float]:
    """(forward, step): the loss alone, and a whole training step with its update.

    Only shapes are used: no weights are made.
    """
    method = dataclasses.replace(method, frames=frames)
    model = TextVideoModel(clip, method)
    pixels = (batch, frames, clip.image_size, clip.image_size, 3)
    rows = {
        "frames": jax.ShapeDtypeStruct(pixels, np.uint8),
        "ids": jax.ShapeDtypeStruct((batch, method.text_slots(clip)), np.int32),
    }
    params = tensorfile.unflatten(model.shapes())
    trainable, frozen = split(params, method.trainable_patterns(clip))
    optimizer = make_optimizer(base_config().train)
    state = jax.eval_shape(lambda tree: TrainState.create(tree, optimizer), trainable)

    def forward(trainable, frozen, rows):
        return batch_loss(model, merge(trainable, frozen), rows)

    return (
        compiled_flops(forward, trainable, frozen, rows),
        compiled_flops(make_train_step(model, optimizer), state, frozen, rows),
    )


def table(arch: str, frames: int, batch: int, methods: list[str]) -> list[dict[str, Any]]:
    """One row a method: name, forward and step FLOPs, their ratio."""
    rows = []
    for name in methods:
        forward, step = step_flops(PRESETS[arch], MethodConfig(name), frames, batch)
        rows.append({"method": name, "forward": forward, "step": step, "ratio": step / forward})
    return rows


def format_table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| method | forward, GFLOP | step, GFLOP | step / forward |", "|---|---:|---:|---:|"]
    lines += [
        f"| {r['method']} | {r['forward'] / 1e9:.1f} | {r['step'] / 1e9:.1f} | {r['ratio']:.3f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=PRESETS, default="ViT-B/32")
    parser.add_argument("--frames", type=int, default=12, help="of a clip")
    parser.add_argument("--batch", type=int, default=2, help="pairs of clip and caption")
    tuned = [name for name, method in METHODS.items() if method.trainable]
    parser.add_argument("--methods", nargs="+", choices=tuned, default=["vop", "full"])
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()
    rows = table(args.arch, args.frames, args.batch, args.methods)
    where = f"jax {jax.__version__}, {jax.devices()[0].platform}"
    print(f"{args.arch}, {args.frames} frames, batch {args.batch}, {where}\n")
    print(format_table(rows))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**vars(args), "jax": jax.__version__, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
