"""Trains, evaluates or exports a model, or counts its parameters.

vop train --config=demo --workdir=DIR
vop train --config=msrvtt9k:vop_f+c --workdir=DIR --config.KEY=VALUE …
vop eval --workdir=DIR
vop export --workdir=DIR --format=pytorch
vop params --config=demo

`vop eval` is `python -m vop_jax.main --mode=eval`; likewise the others.
"""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from absl import flags, logging
from ml_collections import ConfigDict

from vop_jax import cli
from vop_jax.config.base import load_config, shipped_configs, workdir_config
from vop_jax.errors import UserError
from vop_jax.storage import hub

if TYPE_CHECKING:
    from vop_jax.training.writer import Writer

MODES = ("train", "eval", "export", "params")
FORMATS = ("safetensors", "orbax", "pytorch", "stablehlo")  # see vop_jax/experiment/export.py


def define_flags(values: flags.FlagValues) -> None:
    """Defines all flags but --config."""

    def text(name: str, meaning: str) -> None:
        flags.DEFINE_string(name, None, meaning, flag_values=values)

    text("workdir", "folder of the run; a run that it holds continues")
    flags.DEFINE_enum("mode", "train", MODES, "what to do", flag_values=values)
    form = "with --mode=export: what to write"
    flags.DEFINE_enum("format", FORMATS[0], FORMATS, form, flag_values=values)
    text("json", "with --mode=params: a file for the table")
    # For runs of several processes; a TPU slice, Slurm or Open MPI sets these itself.
    text("coordinator", "HOST:PORT of the first process, the same for all")
    for name, default, meaning in (
        ("processes", None, "number of processes in the run"),
        ("process", None, "number of this process, from 0"),
        ("timeout", 100, "seconds after which a process that does not answer counts as dead"),
    ):
        flags.DEFINE_integer(name, default, meaning, flag_values=values)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""

    def program() -> int:
        arguments = sys.argv[1:] if argv is None else argv
        values, overrides = cli.parse_flags(arguments, __doc__, define_flags)
        config = pick_config(values, overrides)
        cli.set_up_logging()
        join(values)
        extend = "train.steps" in cli.overridden_keys(overrides)
        workdir = values.workdir or ""
        return run(config, workdir, values.mode, values.json, values.format, extend=extend)

    return finish(program)


def pick_config(values: flags.FlagValues, overrides: Sequence[str]) -> ConfigDict:
    """The config of a command line.

    It starts from --config, or from the config of the workdir. With --mode=eval and export the
    workdir's config has precedence over a file, which then only states dataset and method: they
    must be the workdir's.
    """
    if not values.workdir and values.mode != "params":
        raise UserError("--workdir=DIR is missing")
    if hub.is_name(values.workdir or ""):
        raise UserError(f"--workdir={values.workdir}: a run cannot be there; vop push copies it")
    if values["format"].present and values.mode != "export":
        raise UserError(f"--format goes with --mode=export, not with --mode={values.mode}")
    config = load_config(values.config) if values.config else None
    saved = None
    if values.workdir and (config is None or values.mode in ("eval", "export")):
        saved = workdir_config(values.workdir)
    if config is None and saved is None:
        why = f", and --workdir={values.workdir} holds no run" if values.workdir else ""
        names = ", ".join(shipped_configs())
        raise UserError(f"--config=FILE is missing{why}; shipped configs are {names}")
    if config is not None and saved is not None:
        saved.data.kind = config.data.kind
        if ":" in values.config:
            saved.method.name = config.method.name
    return cli.override(saved or config, overrides)


def join(values: flags.FlagValues) -> None:
    """Joins the run's other processes, if it has any; only the first reports progress."""
    if values.mode == "params":
        return
    from vop_jax.training import hosts, malloc

    malloc.keep_freed_memory()
    hosts.start(values.coordinator, values.processes, values.process, values.timeout)
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
    """Runs one mode and prints its result; `writer` and `extend` are those of `train.train`."""
    # Imported late, so that a wrong call is reported without delay.
    if mode == "params":
        _print_counts(config, json_path)
        return 0
    from vop_jax.experiment import export, results, train
    from vop_jax.training import hosts
    from vop_jax.training.loop import NonFiniteLoss

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


def _print_counts(config: ConfigDict, json_path: str | None) -> None:
    from vop_jax.experiment.counts import count_parameters, format_counts
    from vop_jax.storage import files

    counts = count_parameters(config)
    print(format_counts(counts))
    if json_path:
        files.write_json(json_path, counts)


def finish(program: Callable[[], int]) -> int:
    """Runs a program that may have joined other processes, and returns its exit status."""
    status = cli.run(program, resumes=True)
    if (hosts := sys.modules.get("vop_jax.training.hosts")) is not None:
        hosts.finish()  # the other processes need no message about this one
    return status


if __name__ == "__main__":
    sys.exit(main())
