"""Deletes a person's conversations, and says which models were trained on them.

    python -m apps.chat.forget USER --data_dir my_talks --output_dir runs

Removes the conversations that the person takes part in and what runs have cached of them, after asking. It names the
reward heads and policies that saw them, and other files of runs that name or quote them. Those stay.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from geli.run.errors import UserError, run
from geli.run.options import new_parser, runs_folder


def parse_options(argv: Sequence[str] | None = None):
    """The options on the command line."""
    parser = new_parser("Delete a person's conversations, and say which models were trained on them.")
    parser.add_argument("user", help="the person's id, as in the transcripts; or the id of a rated chat")
    parser.add_argument(
        "--data_dir", type=Path, nargs="+", metavar="DIR", help="folders of conversations and files of rated chats, "
        "such as --data_dir of the three commands and --collect of the chat (default: candor)",
    )  # fmt: skip
    parser.add_argument(
        "--output_dir", type=Path, default=Path(runs_folder()), help="as --output_dir of the three commands"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")
    options = parser.parse_args(argv)
    options.data_dir = options.data_dir or [Path("candor")]
    return options


# Parsed before the imports below, which take seconds, so that --help and mistakes in options are answered at once.
OPTIONS = parse_options() if __name__ == "__main__" else None

from apps.chat.traces import find_traces, remove
from geli.run.console import format_table


def confirmed() -> bool:
    """Whether somebody answers that it may be done."""
    print("Remove these conversations and caches? They cannot be brought back. [yes/no] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() == "yes"


def main(options) -> None:
    """Shows what there is of the person, asks, and removes it."""
    traces = find_traces(options.user, options.data_dir, options.output_dir)
    print(format_table(traces.rows(), f"{options.user}:"))
    if not (options.yes or confirmed()):
        raise UserError("nothing was removed: expected the answer yes")
    remove(traces)
    conversations = len(traces.folders) + sum(map(len, traces.lines.values()))
    print(f"Removed {conversations} conversations and {len(traces.caches)} caches.")


if __name__ == "__main__":
    run(partial(main, OPTIONS))
