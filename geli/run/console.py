"""What a command prints: progress bars and tables, by one process of a run."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm


def is_main_process() -> bool:
    """Whether this process is the one, of those that `accelerate launch` started, that writes files and prints."""
    return os.environ.get("RANK", "0") == "0"


def shown(value) -> str:
    """A cell of a table: numbers with four significant digits, None as `-`."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_table(rows: list[dict], title: str = "") -> str:
    """Rows with the same keys as a right-aligned text table."""
    cells = [list(map(str, rows[0])), *(list(map(shown, row.values())) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([title, *lines] if title else lines)


def format_written(paths: Iterable[Path]) -> str:
    """What was written: each folder once, with the names in it; a picture in several formats is one line."""
    folders: dict[Path, dict[str, list[str]]] = {}
    for path in paths:
        kind = path.suffix if path.suffix in (".png", ".pdf") else ""
        folders.setdefault(path.parent, {}).setdefault(path.name.removesuffix(kind), []).append(kind)
    lines = ["Written:"]
    for folder, names in folders.items():
        lines += [f"  {folder}/", *(f"    {name}{', '.join(kinds)}" for name, kinds in names.items())]
    return "\n".join(lines)


def progress_bar(*args, **kwargs):
    """tqdm on stderr for work that takes over a second. In a file or pipe it prints a line every 30 seconds."""
    terminal = sys.stderr.isatty()
    kwargs["disable"] = kwargs.get("disable", False) or not is_main_process()
    return tqdm(*args, dynamic_ncols=terminal, mininterval=0.1 if terminal else 30, delay=1, leave=False, **kwargs)
