"""What a run tells its user in a line, once, however many processes there are; and how it ends because of a mistake."""

import os
import sys
from typing import NoReturn


class UserError(SystemExit):
    """Its text is the message; the process ends with status 2."""

    def __init__(self, message: str):
        super().__init__(message)
        self.code = 2  # SystemExit alone would take the message for the code, and end with status 1


def first_line(error: Exception) -> str:
    """What another library's error says in its first line."""
    return str(error).strip().partition("\n")[0]


def say(message: str) -> None:
    """Print a line."""
    if os.environ.get("RANK", "0") == "0":
        print(message)


def fail(message: str, here: bool = False) -> NoReturn:
    """End the run with status 2 and a line on standard error that says what to do.

    here: it is about what this process has, and the others may be well; without it, the first process speaks for all
    """
    if here or os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)
    raise UserError(message)
