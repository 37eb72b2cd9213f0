"""How a command answers a mistake: one line on stderr and exit code 2, without a traceback."""

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can correct: what was expected, what was found, where, and what to do, in one line."""


class Stopped(SystemExit):
    """A signal ended the run after it was saved. Args: message: what to print. code: the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(code)
        self.message = message


def one_line(text: str) -> str:
    """The text in one line without control characters, which a file that is quoted may hold."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, with the next one if it ends with a colon; or the exception's name."""
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join([first, *(line.strip() for line in more[:1] if first.rstrip().endswith(":"))])


def program_name() -> str:
    """The command that runs, as its users call it: `train_rl_GELI.py`, or `python -m apps.chat`."""
    path = Path(sys.argv[0])
    return f"python -m {path.parent.parent.name}.{path.parent.name}" if path.name == "__main__.py" else path.name


def run(main: Callable[[], None]) -> None:
    """Runs a command's `main`. A `UserError` or `OSError` (no permission, a full disk) becomes one line on stderr and
    exit code 2; with the environment variable GELI_TRACEBACK=1 the traceback is before it, because an `OSError` may be
    a programmer's mistake. SIGTERM and Ctrl-C exit with 143 and 130."""
    # libraries warn each other here; users cannot act on it
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\.")
    rank, traced = os.environ.get("RANK", "0"), os.environ.get("GELI_TRACEBACK") == "1"
    try:
        main()
    except Stopped as stop:
        if rank == "0":
            print(f"{program_name()}: {stop.message}", file=sys.stderr)
        sys.exit(stop.code)
    except (UserError, OSError) as error:
        if traced:
            traceback.print_exception(error)
        command = program_name() + (f" (rank {rank})" if rank != "0" else "")
        hint = " (GELI_TRACEBACK=1 shows where)" if isinstance(error, OSError) and not traced else ""
        print(f"{command}: error: {one_line(str(error))}{hint}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
