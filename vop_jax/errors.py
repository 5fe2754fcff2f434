"""The exceptions for what goes wrong outside this program."""


class UserError(Exception):
    """The call, the config or the input is wrong; the one exception that is written for users.

    The message is one line: what is wrong, where, and what is allowed. `cli.run` prints it
    without a traceback and exits with status 2.
    """


class VideoError(Exception):
    """A video that cannot be used; the message is the reason."""
