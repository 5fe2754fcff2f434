"""All that is measured on an accelerator, in one call: a process and a time limit for each.

    python -m benchmarks.everything --output=DIR
    python -m benchmarks.everything --output=DIR --minutes=10 --only vop ranks epoch
    python -m benchmarks.everything --output=DIR --list            # the commands alone

The same on a CPU, where sizes are smaller. DIR gets what each printed, and `everything.md` with
all of it. What fails or runs out of time says so, and the others go on; in the order below, what
matters most comes first.
"""

import argparse
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from vop_jax import atomic


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark as it is called; {output} is the folder of results.

    Attributes:
        command: module and arguments that are the same everywhere.
        limit: seconds that it may take, on a CPU `SLOWER` times as many.
        large, small: further arguments, on an accelerator and on a CPU.
    """

    command: str
    limit: int
    large: str = ""
    small: str = ""


_SPEED = "benchmarks.speed --json={output}/%s.json --methods %s --what %s"
_LADDER = "benchmarks.ladder --workdir={output}/motion"
_FULL_SIZE = "--config=configs/motion.py --jobs=12"
_OTHERS = "vop_f vop_c full"
TASKS = {
    "vop": Task(_SPEED % ("vop", "vop", "step"), 600),
    "others": Task(_SPEED % ("others", _OTHERS, "step --compile_modes"), 600),
    "recurrence": Task(
        "benchmarks.recurrence", 300, "--batch=64 --dtype=bfloat16", "--batch=2 --dtype=float32"
    ),
    "epoch": Task("benchmarks.epoch", 300, small="--clips=32 --batch=2 --steps=4 --dtype=float32"),
    "ranks": Task("benchmarks.ranks", 300, large="--sizes 1000000x1000000"),
    "forward": Task(_SPEED % ("forward", f"vop {_OTHERS}", "forward evaluation"), 1800),
    "step_cost": Task("benchmarks.step_cost --methods all --time=3", 1800),
    "rates": Task(
        f"{_LADDER} --study=learning_rates", 1800, f"{_FULL_SIZE} --steps=400", "--steps=50"
    ),
    "ladder": Task(_LADDER, 1800, f"{_FULL_SIZE} --seeds=0,1,2"),
}
SLOWER = 4


def command_of(task: Task, output: str, cpu: bool) -> list[str]:
    """What is run, with this Python."""
    told = f"{task.command} {task.small if cpu else task.large}"
    return [sys.executable, "-m", *shlex.split(told.format(output=shlex.quote(output)))]


def run(command: Sequence[str], log: str, seconds: float, env: dict[str, str]) -> str:
    """How it ended; what it printed is in `log`, its errors beside it."""
    with open(log, "w") as out, open(f"{log}.err", "w") as errors:
        process = subprocess.Popen(
            command, stdout=out, stderr=errors, env=env, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except BaseException as stopped:
            os.killpg(process.pid, signal.SIGKILL)  # its own processes, too
            process.wait()
            if not isinstance(stopped, subprocess.TimeoutExpired):
                raise
            return f"out of time after {seconds:.0f} s"
    if code:
        with open(f"{log}.err") as errors:
            last = errors.read().strip().splitlines()[-1:] or [""]
        return f"failed ({code}): {last[0][:200]}"
    return "done"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.everything", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--minutes", type=float, default=1e6, help="of all together")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    args = parser.parse_args(argv)
    output = os.path.abspath(args.output)
    cpu = _backend() == "cpu"
    commands = {name: command_of(TASKS[name], output, cpu) for name in args.only}
    if args.list:
        print("\n".join(shlex.join(["python", *command[1:]]) for command in commands.values()))
        return
    os.makedirs(output, exist_ok=True)
    begin = time.monotonic()
    report = [f"# Measured by `python -m benchmarks.everything`, {time.strftime('%Y-%m-%d')}\n"]
    # Programs that several of them compile are compiled once; a fresh folder, since a compile
    # time read out of a cache would be none.
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "PYTHONUNBUFFERED": "1",
        }
        for name, command in commands.items():
            started = time.monotonic()
            left = 60 * args.minutes - (started - begin)
            limit = min(TASKS[name].limit * (SLOWER if cpu else 1), left)
            log = os.path.join(output, f"{name}.txt")
            ended = run(command, log, limit, env) if left > 0 else "no time was left for it"
            took = time.monotonic() - started
            print(f"{name}: {ended}, {took:.0f} s", flush=True)
            report.append(f"## {name}\n\n```\n{shlex.join(['python', *command[1:]])}\n```\n")
            report.append(f"{ended}, {took:.0f} s\n")
            if left > 0:
                with open(log) as told:
                    report.append(told.read().strip() + "\n")
            atomic.write_atomic(f"{output}/everything.md", "\n".join(report).encode())


def _backend() -> str:
    """Of the processes to come; asked in one of its own, which lets an accelerator go again."""
    code = "import jax; print(jax.default_backend())"
    return subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()[-1]


if __name__ == "__main__":
    main()
