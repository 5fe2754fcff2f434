"""What a training step holds, as the compiler says, over the settings that save memory.

    python -m benchmarks.memory --arch ViT-L/14 --frames 64 --batch 4 --methods vop vop_f \
        --settings plain remat=full "remat=full frame_chunk=32 attention=blocks"
    python -m benchmarks.memory --topology v5e:2x2    # needs pip install libtpu, no TPU

Compiled for shapes alone: nothing is allocated, nothing run, so that a machine without the
memory, or without the accelerator, can answer. FLOPs are those of the matrix products of the
traced program, loops counted as often as they turn (XLA counts a loop's body once).
"""

import argparse
import dataclasses
import json
import os
import re
import time
from typing import Any

import jax

from benchmarks.step_cost import Programs, peak_bytes
from vop_jax.clip.remat import Remat
from vop_jax.config.clip import PRESETS
from vop_jax.training.compile import matmul_flops
from vop_jax.tuning.methods import METHODS, MethodConfig

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """One combination; the fields are the config's keys of these names."""

    remat: Any = "none"
    frame_chunk: int = 0
    microbatches: int = 1
    attention: Any = "xla"
    dtype: str = "bfloat16"

    @classmethod
    def parse(cls, text: str) -> "Settings":
        """Of "remat=full frame_chunk=32", or "plain"; unknown names are a TypeError."""
        values: dict[str, Any] = {}
        for pair in text.split():
            if pair != "plain":
                key, value = pair.split("=")
                values[key] = int(value) if value.isdigit() else value
        return cls(**values)

    def programs(self, method: str, args: argparse.Namespace, device: Any) -> Programs:
        sizes = PRESETS[args.arch], MethodConfig(method), args.frames, args.batch
        remat = Remat(self.remat, self.frame_chunk)
        return Programs(*sizes, self.dtype, self.attention, remat, self.microbatches, device)


def step_flops(programs: Programs) -> float:
    """`matmul_flops` of a training step; nothing is compiled."""
    return matmul_flops(jax.make_jaxpr(programs.train_step)(*programs.shapes).jaxpr)


def measure(text: str, method: str, args: argparse.Namespace, device: Any) -> Row:
    """One row of the table; the sizes are None where the compiler found that it does not fit."""
    programs = Settings.parse(text).programs(method, args, device)
    plain = Settings().programs(method, args, device)
    row: Row = {"method": method, "settings": text, "flops": step_flops(programs)}
    row["of_plain"] = row["flops"] / step_flops(plain)
    begin = time.perf_counter()
    try:
        memory = programs.step.memory_analysis()
        row["arguments"] = memory.argument_size_in_bytes
        row["temporaries"] = memory.temp_size_in_bytes
        row["peak"] = peak_bytes(programs.step)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        row["arguments"] = row["temporaries"] = row["peak"] = None
        used = re.search(r"Used ([\d.]+\w*) of ([\d.]+\w*)", str(error))
        row["refused"] = f"{used[1]} of {used[2]}" if used else "does not fit"
    return row | {"compile_seconds": time.perf_counter() - begin}


def format_table(rows: list[Row]) -> str:
    """The rows in Markdown; FLOPs as ratios to those of the method's plain step."""
    heading = ["method", "settings", "arguments, GB", "temporaries, GB", "peak, GB", "FLOPs"]
    lines = [heading, ["---", "---", *["---:"] * (len(heading) - 2)]]
    for row in rows:
        keys = ("arguments", "temporaries", "peak")
        if row["peak"] is None:  # the compiler tells no more than this, in GiB
            sizes = ["", "", row["refused"]]
        else:
            sizes = [f"{row[key] / 1e9:.2f}" for key in keys]
        lines.append([row["method"], row["settings"], *sizes, f"{row['of_plain']:.2f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tpu(topology: str) -> Any:
    """A chip that is not there, for its compiler."""
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # of a TPU machine, which this is not
    return topologies.get_topology_desc(topology, platform="tpu").devices[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=PRESETS, default="ViT-L/14")
    parser.add_argument("--frames", type=int, default=64, help="of a clip")
    parser.add_argument("--batch", type=int, default=4, help="pairs of a device")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["vop"])
    parser.add_argument("--settings", nargs="+", default=["plain", "remat=full"])
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    parser.add_argument("--topology", help="compile for a TPU of it, e.g. v5e:2x2")
    args = parser.parse_args()
    device = tpu(args.topology) if args.topology else jax.devices()[0]
    rows = []
    for method in args.methods:
        for text in args.settings:
            rows.append(measure(text, method, args, device))
            print(json.dumps(rows[-1]), flush=True)
    where = f"jax {jax.__version__}, {device.platform} ({device.device_kind})"
    print(f"\n{args.arch}, {args.frames} frames, batch {args.batch}, {where}\n")
    print(format_table(rows))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**vars(args), "jax": jax.__version__, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
