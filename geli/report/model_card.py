"""The README of a saved adapter: a model card."""

from collections.abc import Mapping
from pathlib import Path

from geli.nets.pretrained import HUB_ID
from geli.run.errors import one_line
from geli.run.tracking import without_folders

TEMPLATE = Path(__file__).with_name("card.md")
NOT_SHOWN = {"output_dir", "run_name", "resume", "save_steps", "no_cache", "device", "log_text"}


def adapter_card(
    name: str, measured: Mapping[str, object], *, base: str, about: Mapping[str, object], arguments: dict,
    defaults: dict,
) -> str:  # fmt: skip
    """The card, in Markdown.

    Args:
        name: of the adapter's folder. measured: by name. base: the model under it, a hub id or a folder. about: what it
            was trained on, by name. arguments: of the run; those that differ from `defaults` are told, without folders.
    """
    on_hub = HUB_ID.fullmatch(base) and "/" in base
    settings = {
        f"--{option}": without_folders(value)
        for option, value in arguments.items()
        if value != defaults.get(option) and option not in NOT_SHOWN
    }
    return TEMPLATE.read_text(encoding="utf-8").format(
        base_model=f"base_model: {base}\n" if on_hub else "", name=name, base=base, about=_table(about),
        measured=_table(measured), settings=_table(settings),
    )  # fmt: skip


def _table(rows: Mapping[str, object]) -> str:
    lines = ["| | |", "|---|---|"]
    for name, value in rows.items():
        shown = f"{value:.4g}" if isinstance(value, float) else one_line(str(value)).replace("|", "/")
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines)
