"""How a command ends when it cannot go on: one line and exit code 2. And ranges of its numbers, as argparse types."""

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator


class InputError(ValueError):
    """What we were given is wrong. The message is one line: what is wrong, and what to do about it."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message.removeprefix('argument ')}\n")


@contextlib.contextmanager
def one_line_errors(parser: argparse.ArgumentParser, stopped: str = "stopped") -> Iterator[None]:
    """Exit code 2 and one line for a user's mistake, a full disk or a reader of data that died; 130 for Ctrl-C."""
    try:
        yield
    except (InputError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]  # a reader's process sends its traceback along
        parser.exit(2, f"error: {reason.rpartition('InputError: ')[2]}\n")
    except (RuntimeError, MemoryError) as error:
        reason = str(error).strip().partition("\n")[0]
        if "DataLoader worker (pid" in reason:
            parser.exit(2, f"error: {reason} Try fewer --workers, or give them more memory.\n")
        if re.search("gloo|NCCL", reason):  # within an update: gradients, or the optimizer's shares
            parser.exit(2, f"error: another process has ended, see its message ({reason[:200]})\n")
        if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", reason):
            parser.exit(2, f"error: out of memory ({reason[:200]}); try a lower --batch-size or --size\n")
        raise
    except KeyboardInterrupt:
        parser.exit(130, f"{stopped}\n")


def in_range(kind: type, low: float, high: float, meaning: str) -> Callable[[str], float]:
    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (number := kind(text)) <= high:  # false for nan
                return number
        raise argparse.ArgumentTypeError(f"must be {meaning}, not {text}")

    return read


positive_int = in_range(int, 1, 2**31 - 1, "a whole number from 1")
count = in_range(int, 0, 2**31 - 1, "a whole number from 0")
seed = in_range(int, 0, 2**32 - 1, "a whole number from 0 to 2**32 - 1")
share = in_range(float, 0, 1, "a share, from 0 to 1")
positive = in_range(float, 1e-300, 1e300, "a number above 0")
at_least_0 = in_range(float, 0, 1e300, "a number from 0")
