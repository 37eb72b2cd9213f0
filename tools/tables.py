"""The table of measured rewards: on screen, as CSV, JSON, Markdown and LaTeX."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from geli.report.metrics import COLUMNS, Column, cell
from geli.run.console import format_table
from geli.run.files import atomic_path, write_json
from geli.statistics import Estimate
from tools.turn_labels import LABEL_COLUMNS


class Row(NamedTuple):
    """A metric of a setting.

    Attributes:
        value: mean over its seeds. spread: standard deviation over seeds, None with one.
        difference: from the first setting on the same conversations, None of itself. Seeds are paired in the order
            given, because runs of one seed share the order of the data; those without a partner are left out of it.
    """

    setting: str
    metric: str
    seeds: int
    value: Estimate
    spread: float | None
    difference: Estimate | None


TRUTH = "truth_correlation"
SHOWN = COLUMNS | {TRUTH: Column("ρ truth", "rank correlation of turn reward and hidden reward"), **LABEL_COLUMNS}
LATEX = {  # metric -> its name in LaTeX, with the better direction
    "ge_loss": r"$\mathcal{L}_{GE}\downarrow$", "ge_share": r"of mean's $\downarrow$",
    "delta_li": r"$\Delta\hat{r}_{LI}\uparrow$", "roc_auc": r"ROC AUC $\uparrow$",
    "average_precision": r"AP $\uparrow$", "return_correlation": r"$\rho_R\uparrow$",
    TRUTH: r"$\rho_{r^*}\uparrow$", "label_correlation": r"$\rho_h\uparrow$", "label_within": r"within $\uparrow$",
    "label_given_place": r"given place $\uparrow$", "label_auc": r"AUC$_h\uparrow$",
}  # fmt: skip
LEGEND = (
    "L_GE in points², also as a share of the mean baseline's; Δr_LI: reward of turns with a happy listener less that "
    "of the others; ROC AUC, AP: of happy listeners by reward; ρ: rank correlation with the score, and of turns with "
    "the hidden reward and with people's labels; within: conversations"
)


def wide(rows: list[Row], field: str = "value") -> list[dict[str, str]]:
    """A line for each setting and a column for each metric; `field` of `Row` is shown. Settings without one are left
    out."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        column, estimate = SHOWN[row.metric], getattr(row, field)
        if estimate is not None:
            lines.setdefault(row.setting, {"reward": row.setting})[column.name] = cell(estimate, column.decimals)
    return list(lines.values())


def on_screen(rows: list[Row], title: str) -> str:
    """The table, and that of differences from the first setting."""
    first, differences = rows[0].setting, wide(rows, "difference")
    shown = format_table(wide(rows), title)
    return shown + (format_table(differences, f"\n\nDifference from {first}") if differences else "")


def markdown(lines: list[dict[str, str]]) -> str:
    """Lines with the same keys as a Markdown table."""
    cells = [list(lines[0]), [":--", *["--:"] * (len(lines[0]) - 1)], *(list(line.values()) for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def latex(rows: list[Row], caption: str) -> str:
    """A booktabs table in the form of the paper's Table 1: rewards by metric, the better direction at each metric."""
    frame = pd.DataFrame(wide(rows)).set_index("reward")
    names = {SHOWN[metric].name: name for metric, name in LATEX.items()}
    frame = frame.rename(columns=names).rename(index=_escape).rename_axis(index=None)
    styled = frame.style.to_latex(hrules=True, column_format="l" + "r" * frame.shape[1])
    return f"% {caption}\n{styled}"


def _escape(text: str) -> str:
    return "".join(f"\\{c}" if c in "&%$#_{}" else {"×": r"$\times$", "λ": r"$\lambda$"}.get(c, c) for c in text)


def long(rows: list[Row]) -> pd.DataFrame:
    """A line for each setting and metric, with unrounded numbers."""
    lines = []
    for row in rows:
        line = {"reward": row.setting, "metric": row.metric, "seeds": row.seeds, **row.value._asdict()}
        line["spread_over_seeds"] = row.spread
        for name, number in (row.difference or Estimate(*[np.nan] * 3))._asdict().items():
            line[f"difference_{name}".removesuffix("_value")] = number
        lines.append(line)
    return pd.DataFrame(lines)


def write(rows: list[Row], stem: Path, about: dict, caption: str) -> list[Path]:
    """Writes `stem`.csv, .json, .md and .tex; returns their paths.

    Args:
        about: what was measured, for the JSON file. caption: one line, for Markdown and LaTeX.
    """
    table = long(rows)
    paths = [stem.with_name(f"{stem.name}.{end}") for end in ("csv", "json", "md", "tex")]
    with atomic_path(paths[0]) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")
    records = [{k: None if v != v else v for k, v in line.items()} for line in table.to_dict("records")]  # NaN
    write_json(paths[1], {**about, "rows": records})
    differences = wide(rows, "difference")
    pages = [f"{caption}\n\n{markdown(wide(rows))}", latex(rows, caption)]
    if differences:
        pages[0] += f"\nDifference from {rows[0].setting}:\n\n{markdown(differences)}"
    for path, page in zip(paths[2:], pages, strict=True):
        with atomic_path(path) as temporary:
            temporary.write_text(page, encoding="utf-8")
    return paths
