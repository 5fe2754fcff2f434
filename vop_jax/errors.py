"""What goes wrong for reasons outside this program."""

import errno


class UserError(Exception):
    """The call, the config or the input is wrong; the one exception a user is meant to read.

    The message is one line: what is wrong, where, and what is allowed. `cli.run` prints it
    without a traceback and exits with status 2.
    """


class VideoError(Exception):
    """A video that cannot be used; the message is the reason."""


def as_user_error(error: BaseException) -> UserError | None:
    """What a user reads of an error that is theirs to correct; None: nobody expected it."""
    if isinstance(error, UserError):
        return error
    # What etils raises of a path in a place that it does not know, or lacks a package for.
    if isinstance(error, KeyError) and error.args and str(error.args[0]).endswith("://"):
        return UserError(f"{error.args[0]}… is no folder or file; give a path of this machine")
    if isinstance(error, ImportError) and " to access " in str(error):
        return UserError(str(error))
    if (full := no_space_left(error)) is not None:
        return UserError(
            f"{full}: no space left on the disk; free some, the same command continues"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return UserError(f"{error.filename}: {error.strerror}")
    return None


def no_space_left(error: BaseException | None) -> str | None:
    """The path of a full disk if that is what an exception comes from, else None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return str(error.filename or "workdir")
        if "No space left on device" in str(error):
            return "workdir"
        error = error.__cause__ or error.__context__
    return None
