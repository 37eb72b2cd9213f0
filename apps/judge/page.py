"""The page on which a rater fills in a sheet: one HTML file that needs no network."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from apps.judge.pairs import CRITERIA

CHOICES = {"A": "Left (A)", "tie": "No difference", "B": "Right (B)"}


def render_page(rater: str, columns: Sequence[str], rows: Sequence[dict[str, str]]) -> str:
    """The page of a sheet. Texts of conversations are only in its JSON, in which jinja2's `tojson` escapes `<`."""
    page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template("page.html")
    sheet = {"rater": rater, "columns": list(columns), "criteria": list(CRITERIA), "rows": list(rows)}
    return page.render(rater=rater, sheet=sheet, questions=CRITERIA, choices=CHOICES)
