"""What the command lines of argparse share."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn

from vop_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; abbreviated options are wrong."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        """One line, not the whole usage."""
        raise UserError(f"{message}; --help tells all")


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """The type of an option: a whole number of so much or more, and of so much or less."""

    def read(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= (int(text) if high is None else high):
            allowed = f"a number, {low} or more" if high is None else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r}: {allowed}")
        return int(text)

    return read


def number(low: float) -> Callable[[str], float]:
    """The type of an option: a finite number of so much or more."""

    def read(text: str) -> float:
        try:
            given = float(text)
        except ValueError:
            given = math.nan
        if not low <= given < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r}: a number, {low:g} or more")
        return given

    return read
