"""The command line: flags, distributed start-up, mode; nothing else.

python -m vop_jax.main --config=configs/demo.py --workdir=DIR
"""

import errno
import os
import re
import sys
import traceback
from collections.abc import Sequence
from logging import WARNING, Formatter
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from vop_jax import interrupt
from vop_jax.config import check_keys
from vop_jax.errors import UserError

MODES = ("train", "eval", "export", "params")


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "FILE or FILE:METHOD, see configs/")
    flags.DEFINE_string("workdir", None, "folder of the run; taken up where it stands")
    flags.DEFINE_enum("mode", "train", MODES, "what to do")
    flags.DEFINE_string("json", None, "with --mode=params: also write the table to this file")


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line; a wrong one is a single line on stderr and exit status 2."""
    try:
        overrides = (a.lstrip("-") for a in argv if re.match("--?config[.]", a))
        check_keys(o.split("=")[0].removeprefix("config.") for o in overrides)
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"{rest[1]}: not a flag; flags look like --workdir=DIR")
        _check_flags(flags.FLAGS.config)
        return rest
    except OSError as error:  # the config file could not be loaded, and is overridden
        fail(f"--config: {_last_line(error)}")
    except (flags.Error, UserError, TypeError, ValueError) as error:
        fail(str(error))
    except Exception as error:  # the config file's own
        fail(f"--config: {_where(error)}{type(error).__name__}: {_last_line(error)}")


def _check_flags(config: Any) -> None:
    if config is None:
        raise UserError("--config=FILE is missing; try --config=configs/demo.py")
    if not isinstance(config, ConfigDict):
        try:
            config.seed  # noqa: B018  what went wrong in the file is raised on first use
        except Exception as error:
            raise UserError(f"--config: {_last_line(error)}") from None
    if not flags.FLAGS.workdir and flags.FLAGS.mode != "params":
        raise UserError("--workdir=DIR is missing")


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[-1].strip()


def _where(error: Exception) -> str:
    """FILE:LINE where it was raised."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: "
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}: "


def fail(message: str) -> NoReturn:
    """One line, exit status 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def set_up_logging() -> None:
    """Our own progress, and what others warn of."""
    package = os.path.dirname(__file__)
    handler = logging.get_absl_handler()
    handler.addFilter(
        lambda record: record.levelno >= WARNING or record.pathname.startswith(package)
    )
    handler.setFormatter(Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.set_verbosity(logging.INFO)


def main(argv: Sequence[str]) -> int:
    set_up_logging()
    interrupt.install()
    try:
        given = flags.FLAGS
        return run(given.config, given.workdir or "", given.mode, given.json)
    except UserError as error:
        fail(str(error))
    except interrupt.Interrupted as signal:
        print(f"stopped by {signal}; the same command continues", file=sys.stderr)
        return signal.exit_status
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        fail(f"{error.filename}: {error.strerror}")
    except Exception as error:
        if (full := no_space_left(error)) is not None:
            fail(f"{full}: no space left on the disk; free some, the same command continues")
        raise


def run(config: ConfigDict, workdir: str, mode: str, json_path: str | None) -> int:
    """Runs one mode and prints its result."""
    # Imported here so that a wrong call is answered at once.
    from vop_jax import experiment, tensorfile
    from vop_jax.training.loop import NonFiniteLoss

    if mode == "params":
        counts = experiment.count_parameters(config)
        print(format_counts(counts))
        if json_path:
            tensorfile.write_json(json_path, counts)
        return 0
    if mode == "export":
        print(experiment.export(config, workdir))
        return 0
    try:
        modes = {"train": experiment.train, "eval": experiment.evaluate}
        summary = modes[mode](config, workdir)
    except NonFiniteLoss as error:
        print(f"error: {error}; {workdir}/checkpoints keeps the last good state", file=sys.stderr)
        return 1
    print(format_summary(summary, workdir))
    return 0


def format_counts(counts: dict[str, dict[str, float]]) -> str:
    rows = [f"{'method':<14}{'trainable':>14}{'paper':>14}{'percent':>10}"]
    rows += [
        f"{name:<14}{c['trainable']:>14,}{c['paper']:>14,}{c['percent']:>9.3f}%"
        for name, c in counts.items()
    ]
    return "\n".join(rows)


def format_summary(summary: dict[str, Any], workdir: str) -> str:
    """The before/after table."""
    from vop_jax import experiment

    names = list(summary["t2v"])
    rows = [
        f"{summary['method']}, {summary['steps']} steps, {summary['trainable_params']:,} trained "
        f"parameters; {summary['num_texts']} captions x {summary['num_videos']} videos",
        " " * 14 + "".join(f"{name:>8}" for name in names),
    ]
    for side in ("t2v", "v2t"):
        for label, values in (("before", summary["before"]), ("after", summary)):
            if values:
                cells = "".join(f"{values[side][name]:8.1f}" for name in names)
                rows.append(f"{side} {label:<10}{cells}")
    for label, values in (("before", summary["before"]), ("after", summary)):
        if values and "accuracy" in values:
            rows.append(f"{label:<14}{experiment.format_accuracy(values['accuracy'])}")
    if summary["skipped_videos"]:
        rows.append(f"skipped videos: {len(summary['skipped_videos'])}, see summary.json")
    rows.append(f"results in {workdir}")
    return "\n".join(rows)


def no_space_left(error: BaseException | None) -> str | None:
    """The path of a full disk if that is what an exception comes from, else None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return str(error.filename or "workdir")
        if "No space left on device" in str(error):
            return "workdir"
        error = error.__cause__ or error.__context__
    return None


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
