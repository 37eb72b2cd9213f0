"""A run as one self-contained HTML page: `report_{run}.html`."""

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from geli.run.console import is_main_process, shown
from geli.run.files import atomic_path

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Section:
    """A part of the page: a title, a sentence, a table and pictures, each of which may be missing.

    Attributes:
        rows: with the same keys, which are the table's head. pictures: (PNG file, what it shows).
        folded: whether the table is shown only when it is clicked on.
    """

    title: str
    note: str = ""
    rows: Sequence[dict] = ()
    pictures: Sequence[tuple[Path, str]] = ()
    folded: bool = False


@dataclass(frozen=True)
class Page:
    """A run's report.

    Attributes:
        title: what ran. summary: name -> value, the first lines. lineage: (label, file) of the runs that this one
            started from, nearest first; a label without a file is not a link. private: whether it quotes conversations.
    """

    title: str
    summary: dict[str, str]
    lineage: Sequence[tuple[str, Path | None]] = ()
    sections: Sequence[Section] = field(default_factory=tuple)
    private: bool = False


def write_page(page: Page, path: Path) -> Path:
    """Writes the page; returns `path`. It needs no other file: pictures are in it."""
    if not is_main_process():  # only the main process has written the pictures
        return path
    from jinja2 import Environment  # slow to import

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["show"] = shown
    environment.filters["embedded"] = lambda picture: base64.b64encode(picture.read_bytes()).decode()
    links = [(label, file and Path(os.path.relpath(file, path.parent)).as_posix()) for label, file in page.lineage]
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(page=page, links=links)
    with atomic_path(path, private=page.private) as temporary:
        temporary.write_text(html, encoding="utf-8", errors="replace")
    return path


def changed_options(arguments: dict, defaults: dict) -> list[dict]:
    """Rows of all options, those that differ from their defaults first."""
    rows = [
        {"option": f"--{name}", "value": str(value), "default": str(defaults.get(name))}
        for name, value in arguments.items()
    ]
    return sorted(rows, key=lambda row: row["value"] == row["default"])


def seconds_table(seconds: dict[str, float]) -> list[dict]:
    """Rows of the parts of a run, the slowest first."""
    total = sum(seconds.values()) or 1.0
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return [{"part": part, "seconds": f"{value:.1f}", "share": f"{value / total:.0%}"} for part, value in ordered]
