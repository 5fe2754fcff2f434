"""All that is measured on an accelerator, in one call: a process and a time limit for each.

    python -m benchmarks.everything --output=DIR
    python -m benchmarks.everything --output=DIR --minutes=10 --only vop ranks epoch
    python -m benchmarks.everything --list                         # the commands alone

The same on a CPU, where sizes are smaller. DIR gets what each printed, and `everything.md` with
all of it. A part that fails or runs out of time is reported and the others go on; the exit status
is then 1.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from vop_jax.storage import files


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


_OTHERS = "vop_f vop_c full"
_FULL_SIZE = "--config=configs/motion.py --jobs=12"
_LADDER = "benchmarks.ladder --workdir={output}/motion"


def _speed(name: str, methods: str, what: str, limit: int) -> Task:
    arguments = f"--methods {methods} --what {what}"
    return Task(f"benchmarks.speed --json={{output}}/{name}.json {arguments}", limit)


def _rates(name: str, methods: str, rates: str, limit: int) -> Task:
    sweep = f"--study=learning_rates --output={{output}}/{name} --methods={methods} --rates={rates}"
    return Task(f"{_LADDER} {sweep}", limit, f"{_FULL_SIZE} --steps=400", "--steps=50")


_SWEPT = "bias,proj,adapter_attn,adapter_ffn,vop,vop_p,vop_c,vop_f,vop_f+p,vop_f+c"
TASKS = {
    "vop": _speed("vop", "vop", "step", 600),
    "others": _speed("others", _OTHERS, "step --compile_modes", 600),
    "recurrence": Task(
        "benchmarks.recurrence", 300, "--batch=64 --dtype=bfloat16", "--batch=2 --dtype=float32"
    ),
    "epoch": Task("benchmarks.epoch", 300, small="--clips=32 --batch=2 --steps=4 --dtype=float32"),
    "ranks": Task("benchmarks.ranks", 300, large="--sizes 1000000x1000000"),
    "forward": _speed("forward", f"vop {_OTHERS}", "forward evaluation", 1800),
    "step_cost": Task(
        "benchmarks.step_cost --methods all --time=3", 1800, "--batch=64 --dtype=bfloat16"
    ),
    "rates": _rates("rates", _SWEPT, "0.01,0.03,0.1", 1800),
    "rates_of_full": _rates("rates_of_full", "full", "0.0003,0.001,0.003", 600),
    "rates_of_partial": _rates("rates_of_partial", "partial", "0.003,0.01,0.03", 600),
    "ladder": Task(_LADDER, 1800, f"{_FULL_SIZE} --seeds=0,1,2"),
}
SLOWER = 4


def command_of(task: Task, output: str, cpu: bool) -> list[str]:
    """What is run, with this Python."""
    arguments = f"{task.command} {task.small if cpu else task.large}"
    return [sys.executable, "-m", *shlex.split(arguments.format(output=shlex.quote(output)))]


def run(command: Sequence[str], log: str, seconds: float, env: Mapping[str, str]) -> str:
    """How it ended, "done" if well; what it printed is in `log`, its errors in `log`.err."""
    with open(log, "w") as printed, open(f"{log}.err", "w") as errors:
        process = subprocess.Popen(
            command, stdout=printed, stderr=errors, env=env, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"out of time after {seconds:.0f} s"
        finally:  # its own processes, too, which may hold the device
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        last = _text(f"{log}.err").splitlines()[-1:] or [""]
        return f"failed ({code}): {last[0][:200]}"
    return "done"


def _text(path: str) -> str:
    """What was killed may have ended within a letter."""
    with open(path, errors="replace") as file:
        return file.read().strip()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.everything", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", metavar="DIR", help="where results are written")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--minutes", type=float, default=1e6, help="of all together")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    args = parser.parse_args(argv)
    if not (args.output or args.list):
        parser.error("--output=DIR is missing")
    output = os.path.abspath(args.output) if args.output else "DIR"
    machine = what_is_there()
    cpu = machine["backend"] == "cpu"
    commands = {n: command_of(TASKS[n], output, cpu) for n in TASKS if n in args.only}
    if args.list:
        print("\n".join(shlex.join(["python", *command[1:]]) for command in commands.values()))
        return
    try:
        os.makedirs(output, exist_ok=True)
    except OSError as error:
        parser.error(f"--output={output}: not a folder to write in ({error.strerror})")
    begin = time.monotonic()
    bad = 0
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
            if left <= 0:
                print(f"{name}: no time was left for it", flush=True)
                bad += 1
                continue
            log = os.path.join(output, f"{name}.txt")
            ended = run(command, log, min(TASKS[name].limit * (SLOWER if cpu else 1), left), env)
            bad += ended != "done"
            ended += f", {time.monotonic() - started:.0f} s"
            print(f"{name}: {ended}", flush=True)
            called = shlex.join(["python", *command[1:]])
            about = (
                f"{machine['device']}, jax {machine['jax']}, {time.strftime('%Y-%m-%d')}; {ended}"
            )
            section = f"## {name}\n\n```\n{called}\n```\n\n{about}\n\n{_text(log)}\n"
            files.write_atomic(os.path.join(output, f"{name}.md"), section.encode())
            _assemble(output)
    if bad:
        sys.exit(1)


def _assemble(output: str) -> None:
    """Everything that was measured into this folder, earlier calls' as well."""
    paths = [os.path.join(output, f"{name}.md") for name in TASKS]
    sections = ["# Measured by `python -m benchmarks.everything`\n"]
    sections += [_text(path) + "\n" for path in paths if os.path.exists(path)]
    files.write_atomic(os.path.join(output, "everything.md"), "\n".join(sections).encode())


def what_is_there() -> dict[str, str]:
    """Backend, device and version of jax, asked in a process that lets the device go again."""
    code = (
        "import jax, json; device = jax.devices()[0].device_kind\n"
        "print(json.dumps(dict(backend=jax.default_backend(), device=device, jax=jax.__version__)))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # nothing runs on
    main()
