"""The one exception a user is meant to read."""


class UserError(Exception):
    """The call, the config or the input is wrong.

    The message is one line: what is wrong, where, and what is allowed. `main` prints it
    without a traceback and exits with status 2.
    """
