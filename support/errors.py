"""How a command ends when it cannot go on: one line that says what is wrong and what to do, and an exit code."""

import argparse
import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """What we were given is wrong. The message is one line: what is wrong, and what to do about it."""


@contextlib.contextmanager
def one_line_errors(parser: argparse.ArgumentParser, stopped: str = "stopped") -> Iterator[None]:
    """Exit code 2 and one line for a user's mistake, 130 for Ctrl-C."""
    try:
        yield
    except InputError as error:
        reason = str(error).strip().rpartition("InputError: ")[2]  # a loader's process sends its traceback along
        parser.exit(2, f"error: {reason}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{stopped}\n")
