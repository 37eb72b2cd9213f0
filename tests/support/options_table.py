"""The table of options in docs/options.md, made from the parsers. `python tests/support/options_table.py` writes it."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the repository, whose modules are imported below

import train_reward_GELI
import train_reward_LI_only
import train_rl_GELI
from geli.run.options import build_parser

STAGES = {1: train_reward_LI_only, 2: train_reward_GELI, 3: train_rl_GELI}
PAGE = ROOT / "docs" / "options.md"
HEADLINE = """# Options

All options of `train_reward_LI_only.py` (stage 1), `train_reward_GELI.py` (stage 2) and `train_rl_GELI.py` (stage 3),
as `--help` shows them. Where the stages differ, each value stands after the numbers of its stages.
[method.md](method.md) explains what the options mean for the method.

This page is generated from the parsers: `python tests/support/options_table.py` writes it."""


def options_page() -> str:
    """The text of docs/options.md."""
    rows = ["| option | meaning | default | stage |", "|---|---|---|---|"]
    for option, actions in sorted(_options().items(), key=lambda item: item[0].lower()):
        meanings = _by_stage({stage: _meaning(action) for stage, action in actions.items()})
        defaults = _by_stage({stage: _default(action) for stage, action in actions.items()})
        rows.append(f"| `{option}` | {meanings} | {defaults} | {', '.join(map(str, actions))} |")
    return "\n".join([HEADLINE, "", *rows, ""])


def _options() -> dict[str, dict[int, argparse.Action]]:
    """Option -> stage -> its argparse action."""
    found: dict[str, dict[int, argparse.Action]] = {}
    for stage, module in STAGES.items():
        for action in build_parser("", module.Options())._actions:
            if action.dest != "help":
                found.setdefault(action.option_strings[-1], {})[stage] = action
    return found


def _by_stage(values: dict[int, str]) -> str:
    """The value that all stages share, else each value after the stages that have it."""
    stages: dict[str, list[int]] = {}
    for stage, value in values.items():
        stages.setdefault(value, []).append(stage)
    if len(stages) == 1:
        return next(iter(stages))
    return "; ".join(f"{'/'.join(map(str, which))}: {value}" for value, which in stages.items())


def _meaning(action: argparse.Action) -> str:
    listed = action.choices and action.metavar is None
    choices = f" ({', '.join(f'`{choice}`' for choice in action.choices)})" if listed else ""
    return (action.help + choices).replace("|", "\\|")


def _default(action: argparse.Action) -> str:
    if action.const is True:
        return "off"
    return "none" if action.default is None else f"`{action.default}`"


if __name__ == "__main__":
    PAGE.write_text(options_page(), encoding="utf-8")
