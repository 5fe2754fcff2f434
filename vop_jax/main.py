"""Trains, evaluates or exports a model: flags, distributed start-up, mode; nothing else.

python -m vop_jax.main --config=configs/demo.py --workdir=DIR
python -m vop_jax.main --config=configs/msrvtt9k.py:vop_f+c --workdir=DIR --config.KEY=VALUE …
"""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from vop_jax import cli
from vop_jax.cli import parse_flags
from vop_jax.config import base as config_defaults
from vop_jax.config.base import flatten_config, workdir_config

if TYPE_CHECKING:
    from vop_jax.training.writer import Writer

MODES = ("train", "eval", "export", "params")
FORMATS = ("safetensors", "orbax", "pytorch", "stablehlo")  # see vop_jax/experiment/export.py


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "FILE or FILE:METHOD, see configs/")
    flags.DEFINE_string("workdir", None, "folder of the run; taken up where it stands")
    flags.DEFINE_enum("mode", "train", MODES, "what to do")
    flags.DEFINE_enum("format", "safetensors", FORMATS, "with --mode=export: what to write")
    # Of runs of several processes where no TPU slice, Slurm or Open MPI says it, docs/tpu.md.
    flags.DEFINE_string("coordinator", None, "HOST:PORT of the first process, the same for all")
    flags.DEFINE_integer("processes", None, "how many processes the run has")
    flags.DEFINE_integer("process", None, "which of them this is, from 0")
    flags.DEFINE_integer("timeout", 100, "seconds without an answer: a process is given up")
    flags.DEFINE_string("json", None, "with --mode=params: also write the table to this file")


def _config(workdir: str, mode: str) -> ConfigDict:
    """The config that this call runs.

    Without --config, and with --mode=eval or export, it is that of the workdir, if it has one, with
    the changes that are said on the command line. A config file is only a start for new runs, but
    where it says the method or the dataset they are meant.
    """
    given, flag = flags.FLAGS.config, flags.FLAGS["config"]
    file, _, method = (config_flags.get_config_filename(flag) or "").partition(":")
    no_file = file == config_defaults.__file__
    if mode not in ("eval", "export") and not no_file:
        return given
    own = workdir_config(workdir) if workdir else None
    if own is None:
        return given
    said = _said() + ([] if no_file else ["data.kind"])
    said += ["method.name"] if method else []
    for key in said:
        own.update_from_flattened_dict({key: flatten_config(given)[key]})
    return own


def _said() -> list[str]:
    """The keys, as "train.steps", that the command line sets."""
    return list(config_flags.get_override_values(flags.FLAGS["config"]))


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status."""

    def program() -> int:
        parse_flags(argv, __doc__)
        given = flags.FLAGS
        cli.set_up_logging()
        join(given.coordinator, given.processes, given.process, given.timeout, given.mode)
        workdir, extend = given.workdir or "", "train.steps" in _said()
        config = _config(workdir, given.mode)
        return run(config, workdir, given.mode, given.json, given.format, extend=extend)

    return finish(program)


def finish(program: Callable[[], int]) -> int:
    """`cli.run`, after which this process has said how it ended."""
    status = cli.run(program, resumes=True)
    if (hosts := sys.modules.get("vop_jax.training.hosts")) is not None:
        hosts.finish()
    return status


def join(
    coordinator: str | None, processes: int | None, process: int | None, timeout: int, mode: str
) -> None:
    """Finds the run's other processes, if it has any; only the first reports progress."""
    if mode == "params":
        return
    from vop_jax.training import hosts

    hosts.start(coordinator, processes, process, timeout)
    if not hosts.is_first():
        logging.set_verbosity(logging.WARNING)


def run(
    config: ConfigDict,
    workdir: str,
    mode: str,
    json_path: str | None = None,
    form: str = FORMATS[0],
    writer: "Writer | None" = None,
    extend: bool = False,
) -> int:
    """Runs one mode and prints its result; `writer` and `extend` as of `train.train`."""
    # Imported here so that a wrong call is answered at once.
    from vop_jax.experiment import export, results, train
    from vop_jax.storage import files
    from vop_jax.training import hosts
    from vop_jax.training.loop import NonFiniteLoss

    if mode == "params":
        counts = results.count_parameters(config)
        print(results.format_counts(counts))
        if json_path:
            files.write_json(json_path, counts)
        return 0
    if mode == "export":
        path = export.export(config, workdir, form)
        if hosts.is_first():
            print(path)
        return 0
    try:
        if mode == "eval":
            summary = train.evaluate(config, workdir)
        else:
            summary = train.train(config, workdir, writer, extend)
    except NonFiniteLoss as error:
        print(f"error: {error}; {workdir}/checkpoints keeps the last good state", file=sys.stderr)
        return 1
    if hosts.is_first():
        print(results.format_summary(summary, workdir))
    return 0


if __name__ == "__main__":
    define_flags()
    sys.exit(main(sys.argv))
