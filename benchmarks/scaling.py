"""What a training step sends between devices, by the compiler, and what that lets one expect.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --devices 1 8 64 --method vop_c --assume share=0.5
    python -m benchmarks.scaling --topology v5e:2x4 v5e:16x16    # needs pip install libtpu, no TPU

The step is compiled for fake CPU devices, or by a TPU's compiler, from shapes alone; nothing runs
and nothing is measured. Bytes and FLOPs are the compiler's, times follow from them and from the
assumptions printed with them.
"""

import argparse
import dataclasses
import json
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks.collectives import Collective, collectives
from vop_jax.config.base import base_config
from vop_jax.config.clip import PRESETS
from vop_jax.model import TextVideoModel
from vop_jax.storage import tensors
from vop_jax.training import sharding
from vop_jax.training.step import TrainState, make_optimizer, make_train_step
from vop_jax.tuning.methods import METHODS, MethodConfig
from vop_jax.tuning.partition import partition


@dataclasses.dataclass(frozen=True)
class Machine:
    """Assumptions: devices in groups with fast links inside and slower ones between.

    Attributes:
        peak: FLOP/s of a device, bfloat16.
        share: of the peak that the step's FLOPs are done at.
        group: devices with fast links to each other.
        inside, between: bytes/s that a device sends within its group, to other groups.
        hop_inside, hop_between: seconds that the shortest message takes.
        torus: links inside are a square torus, whose rings have sqrt(group) devices; else a switch.
    """

    name: str
    peak: float
    group: int
    inside: float
    between: float
    hop_inside: float
    hop_between: float
    torus: bool
    share: float = 0.4

    def seconds(self, operations: list[Collective], devices: int) -> float:
        """Of all collectives, one after the other: first between groups, then inside them.

        A gather of S bytes sends (m-1)/n S between m groups and (g-1)/g S inside those of g
        devices, n = m g; together the ring's (n-1)/n S. A reduction sends it twice.
        """
        g = min(devices, self.group)
        m = devices // g
        outer = (m - 1) / devices
        inner = (g - 1) / g
        total = sum(c.sent for c in operations) / max(outer + inner, 1e-9)  # S, twice where reduced
        hops_inside = 2 * (math.sqrt(g) - 1) if self.torus else math.log2(g)
        hop = hops_inside * self.hop_inside + math.log2(m) * self.hop_between
        # Those of one operation on a tuple have the same `where`.
        kinds = [kind for kind, _ in {(c.kind, c.where) for c in operations}]
        passes = len(kinds) + kinds.count("all-reduce")
        return total * (outer / self.between + inner / self.inside) + passes * hop


MACHINES = {
    "v5e": Machine(
        "TPU v5e: slices of 256 (ICI), data centre network between",
        peak=197e12,
        group=256,
        inside=90e9,
        between=3.1e9,
        hop_inside=1e-6,
        hop_between=50e-6,
        torus=True,
    ),
    "h100": Machine(
        "H100 or H200: nodes of 8 (NVLink), InfiniBand of 400 Gb/s a GPU between",
        peak=989e12,
        group=8,
        inside=360e9,
        between=40e9,
        hop_inside=2e-6,
        hop_between=5e-6,
        torus=False,
    ),
}


def compile_step(
    arch: str, name: str, frames: int, per_device: int, dtype: str, mesh: Mesh
) -> tuple[Any, Any]:
    """(the compiled step, the shapes of what it trains), for `per_device` pairs a device."""
    clip, batch = PRESETS[arch], per_device * mesh.size
    method = dataclasses.replace(MethodConfig(name), frames=frames)
    model = TextVideoModel(clip, method, jnp.dtype(dtype))
    pixels = (batch, frames, clip.image_size, clip.image_size, 3)
    rows = {
        "frames": jax.ShapeDtypeStruct(pixels, np.uint8),
        "ids": jax.ShapeDtypeStruct((batch, method.text_slots(clip)), np.int32),
    }
    params = tensors.unflatten(model.shapes())
    trainable, frozen = partition(params, method.trainable_patterns(clip))
    optimizer = make_optimizer(base_config().train)
    state = jax.eval_shape(lambda tree: TrainState.create(tree, optimizer), trainable)

    def placed(tree: Any, over: Any) -> Any:
        return jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, over
        )

    def all_at(tree: Any, over: Any) -> Any:
        return placed(tree, jax.tree.map(lambda _: over, tree))

    step = jax.jit(make_train_step(model, optimizer, mesh), donate_argnums=0)
    lowered = step.lower(
        placed(state, sharding.parameter_shardings(mesh, state)),
        placed(frozen, sharding.parameter_shardings(mesh, frozen)),
        all_at(rows, sharding.batch_sharding(mesh)),
    )
    return lowered.compile(), trainable


def measure(args: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    """What the compiler says of one number of devices."""
    program, trainable = compile_step(
        args.arch, args.method, args.frames, args.per_device, args.dtype, mesh
    )
    operations = collectives(program.as_text())
    batch, width = args.per_device * mesh.size, PRESETS[args.arch].embed_dim
    parts = {"embeddings": 0.0, "gradient": 0.0, "rest": 0.0}
    sizes = {x.size for x in jax.tree.leaves(trainable)}
    for c in operations:
        size = math.prod(c.shape)
        trained = "gradient" if size in sizes else "rest"
        parts["embeddings" if size == batch * width else trained] += c.sent
    return {
        "devices": mesh.size,
        "batch": batch,
        "flops": float(program.cost_analysis()["flops"]),
        "gathered": 4 * batch * width,
        "logits": 4 * args.per_device * batch,
        **parts,
        "collectives": [dataclasses.asdict(c) for c in operations],
    }


def bytes_table(rows: list[dict[str, Any]]) -> str:
    heading = ["devices", "global batch", "GFLOP a device", "embeddings sent, MB"]
    heading += [
        "gradient sent, MB",
        "rest sent, MB",
        "embeddings gathered, MB",
        "logits [b, B], MB",
    ]
    lines = [heading, ["---:"] * len(heading)]
    for row in rows:
        sent = [row[k] / 1e6 for k in ("embeddings", "gradient", "rest", "gathered", "logits")]
        numbers = [f"{row['devices']:,}", f"{row['batch']:,}", f"{row['flops'] / 1e9:,.1f}"]
        lines.append(numbers + [f"{x:.3f}" for x in sent])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def times_table(rows: list[dict[str, Any]], machine: Machine) -> str:
    """Efficiency: one device's step over this one's; the overlapped hides all it can."""
    heading = [
        "devices",
        "compute, ms",
        "communication, ms",
        "efficiency, no overlap",
        "overlapped",
    ]
    lines = [heading, ["---:"] * len(heading)]
    alone = rows[0]["flops"] / (machine.peak * machine.share)
    for row in rows:
        compute = row["flops"] / (machine.peak * machine.share)
        sending = machine.seconds([Collective(**c) for c in row["collectives"]], row["devices"])
        line = [f"{row['devices']:,}", f"{1e3 * compute:.2f}", f"{1e3 * sending:.3f}"]
        line += [f"{100 * alone / x:.1f} %" for x in (compute + sending, max(compute, sending))]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def assumed(machine: Machine, changes: list[str]) -> Machine:
    """The machine with `KEY=VALUE` set."""
    pairs = dict(change.split("=", 1) for change in changes)
    return dataclasses.replace(machine, **{key: json.loads(value) for key, value in pairs.items()})


def meshes(args: argparse.Namespace) -> list[Mesh]:
    if not args.topology:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", max(args.devices))
        return [sharding.make_mesh(count) for count in sorted(args.devices)]
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # of a TPU machine, which this is not
    described = [topologies.get_topology_desc(name, platform="tpu") for name in args.topology]
    return [sharding.make_mesh(devices=topology.devices) for topology in described]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=PRESETS, default="ViT-B/32")
    parser.add_argument("--method", choices=METHODS, default="vop")
    parser.add_argument("--frames", type=int, default=12, help="of a clip")
    parser.add_argument("--per_device", type=int, default=8, help="pairs of clip and caption")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64, 256, 1024, 2048])
    parser.add_argument("--topology", nargs="+", help="compile for TPUs, e.g. v5e:2x4 v5e:16x16")
    parser.add_argument("--machines", nargs="+", choices=MACHINES, default=list(MACHINES))
    parser.add_argument("--assume", nargs="+", default=[], metavar="KEY=VALUE", help="share=0.5")
    parser.add_argument("--json", metavar="FILE", help="also write the collectives one by one here")
    args = parser.parse_args()
    rows = []
    for mesh in meshes(args):
        rows.append(measure(args, mesh))
        print(json.dumps({k: v for k, v in rows[-1].items() if k != "collectives"}), flush=True)
    of = "TPU topologies" if args.topology else "fake CPU devices"
    sizes = f"{args.arch}, {args.frames} frames, {args.per_device} pairs a device, {args.dtype}"
    print(f"\n{args.method}, {sizes}, jax {jax.__version__}, compiled for {of}\n")
    print(bytes_table(rows))
    for name in () if args.topology else args.machines:
        machine = assumed(MACHINES[name], args.assume)
        values = {k: v for k, v in dataclasses.asdict(machine).items() if k != "name"}
        assumptions = ", ".join(f"{k}={v:g}" for k, v in values.items())
        print(f"\n{machine.name}. Assumed: {assumptions}\n\n{times_table(rows, machine)}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**vars(args), "jax": jax.__version__, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
