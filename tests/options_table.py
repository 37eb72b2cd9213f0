"""The README's table of options, made from the parsers: `python tests/options_table.py` writes it into the README."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

BEGIN, END = "<!-- options: made by tests/options_table.py -->", "<!-- end of options -->"


def _options():
    """Option -> stage -> its argparse action, in the parsers' order."""
    import train_reward_GELI
    import train_reward_LI_only
    import train_rl_GELI

    found: dict[str, dict[int, object]] = {}
    for stage, module in enumerate((train_reward_LI_only, train_reward_GELI, train_rl_GELI), start=1):
        for action in module.build_parser()._actions:
            if action.dest != "help":
                found.setdefault(action.option_strings[-1], {})[stage] = action
    return found


def all_options() -> list[str]:
    """Every option of the three commands."""
    return list(_options())


def options_table() -> str:
    """The table in Markdown."""
    rows = ["| option | meaning | default | stage |", "|---|---|---|---|"]
    for option, actions in sorted(_options().items(), key=lambda item: item[0].lower()):
        meanings = _by_stage({stage: _meaning(action) for stage, action in actions.items()})
        defaults = _by_stage({stage: _default(action) for stage, action in actions.items()})
        rows.append(f"| `{option}` | {meanings} | {defaults} | {', '.join(map(str, actions))} |")
    return "\n".join(rows)


def _by_stage(values: dict[int, str]) -> str:
    """One value where all stages agree, else each with its stages."""
    stages: dict[str, list[int]] = {}
    for stage, value in values.items():
        stages.setdefault(value, []).append(stage)
    if len(stages) == 1:
        return next(iter(stages))
    return "; ".join(f"{'/'.join(map(str, which))}: {value}" for value, which in stages.items())


def _meaning(action) -> str:
    choices = action.choices and action.metavar is None
    among = " (" + ", ".join(f"`{choice}`" for choice in action.choices) + ")" if choices else ""
    return (action.help + among).replace("|", "\\|")


def _default(action) -> str:
    if action.const is True:
        return "off"
    return "none" if action.default is None else f"`{action.default}`"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{options_table()}\n{END}{rest.split(END)[1]}")
