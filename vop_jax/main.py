"""Trains, evaluates or exports a model: flags, distributed start-up, mode; nothing else.

python -m vop_jax.main --config=configs/demo.py --workdir=DIR
python -m vop_jax.main --config=configs/msrvtt9k.py:vop_f+c --workdir=DIR --config.KEY=VALUE …
"""

import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from vop_jax import cli
from vop_jax.config import base as config_defaults
from vop_jax.config.base import check_keys, flatten_config, workdir_config
from vop_jax.errors import UserError

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


def parse_flags(argv: Sequence[str], usage: str) -> None:
    """Parses the command line into `flags.FLAGS`; `--help` prints `usage` and every flag.

    Raises:
        UserError: it is wrong, or the config file is.
    """
    if {"--help", "-help", "-h", "--helpfull", "--helpshort"} & {*argv}:
        module = flags.FLAGS.find_module_defining_flag("config")
        print(f"{usage.strip()}\n\n{flags.FLAGS.module_help(module)}")
        sys.exit(0)
    try:
        argv = _with_config_file(argv)
        overrides = (a.lstrip("-") for a in argv if re.match("--?config[.]", a))
        check_keys(o.split("=")[0].removeprefix("config.") for o in overrides)
        with warnings.catch_warnings():
            # ml_collections' way to load the file, under `python -W error`.
            warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)
            rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"{rest[1]}: not a flag; flags look like --config=FILE")
        _check_flags(flags.FLAGS.config)
    except OSError as error:  # the config file could not be loaded, and is overridden
        where = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise UserError(f"--config: {where}") from None
    except flags.IllegalFlagValueError as error:
        raise UserError(_wrong_value(str(error))) from None
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(str(error)) from None
    except UserError:
        raise
    except Exception as error:  # the config file's own
        if "has no attribute 'get_config'" in str(error):
            raise UserError("--config: the file defines no get_config()") from None
        why = f"{_where(error)}{type(error).__name__}: {_last_line(error)}"
        raise UserError(f"--config: {why}") from None


def _wrong_value(message: str) -> str:
    """What absl says of a value, with the kind that is allowed instead of what Python says."""
    kinds = {"int()": "a whole number", "to float": "a number", "boolean": "True or False"}
    for words, kind in kinds.items():
        if words in message:
            return f"{message.split(': ')[0].removeprefix('flag ')}: must be {kind}"
    return message.removeprefix("flag ")


def _with_config_file(argv: Sequence[str]) -> list[str]:
    """The command line with a --config that exists; ml_collections says it in many words.

    A workdir that has a config needs no other; what the flags change is then counted from it, see
    `_config`.
    """
    if (value := _value(argv, "config")) is not None:
        path = value.partition(":")[0]
        if not os.path.isfile(path):
            raise UserError(f"--config={path}: no such file; configs/ has some")
        if sum(bool(re.fullmatch("--?config(=.*)?", flag)) for flag in argv) > 1:
            raise UserError("--config: give one file; --config.KEY=VALUE changes its keys")
        return list(argv)
    workdir = _value(argv, "workdir") if "mode" in flags.FLAGS else None
    if not workdir or workdir_config(workdir) is None:
        return list(argv)
    return [argv[0], f"--config={config_defaults.__file__}", *argv[1:]]


def _value(argv: Sequence[str], name: str) -> str | None:
    """Of --NAME=VALUE or --NAME VALUE, the last one; None without."""
    found = None
    for flag, following in zip(argv, [*argv[1:], ""], strict=True):
        if given := re.fullmatch(f"--?{name}(?:=(.*))?", flag):
            found = following if given[1] is None else given[1]
    return found


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


def _check_flags(config: Any) -> None:
    if config is None:
        given = flags.FLAGS.workdir if "workdir" in flags.FLAGS else None
        why = f", and --workdir={given} holds no run" if given else ""
        raise UserError(f"--config=FILE is missing{why}; take one of configs/, as configs/demo.py")
    if not isinstance(config, ConfigDict):
        try:
            config.seed  # noqa: B018  what went wrong in the file is raised on first use
        except Exception as error:
            raise UserError(f"--config: {_last_line(error)}") from None
    if "workdir" in flags.FLAGS and not flags.FLAGS.workdir and flags.FLAGS.mode != "params":
        raise UserError("--workdir=DIR is missing")
    # Other programs parse their flags here, and have none of this name.
    if "format" in flags.FLAGS and flags.FLAGS["format"].present and flags.FLAGS.mode != "export":
        raise UserError(f"--format goes with --mode=export, not with --mode={flags.FLAGS.mode}")


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[-1].strip()


def _where(error: Exception) -> str:
    """FILE:LINE where it was raised."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: "
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}: "


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
