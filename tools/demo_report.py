"""Prints what each stage of the demo measured on held-out sample conversations, against the hidden rewards.

python tools/demo_report.py DEMO_FOLDER
"""

import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

from geli.run.console import format_table
from geli.run.errors import UserError, run
from geli.run.options import new_parser


def parse_options() -> Path:
    """The folder on the command line."""
    parser = new_parser("Print what the demo measured.")
    parser.add_argument("folder", help="the demo's folder, with candor/truth.csv and the outputs of the stages")
    return Path(parser.parse_args().folder)


# Parsed before the imports below, which take seconds, so that --help and mistakes in options are answered at once.
FOLDER = parse_options() if __name__ == "__main__" else None

import pandas as pd

from geli.report.rewards import spearman

RUNS = {"LI alone (stage 1)": "demo-li", "GE alone (stage 2)": "demo-ge", "GELI (stage 2)": "demo-geli"}


def hidden_correlation(turns_csv: Path, truth_csv: Path) -> tuple[float | None, int]:
    """Spearman's correlation of predicted with hidden turn reward over all held-out agent turns (None if either is
    constant), and the number of turns.

    Raises:
        UserError: if not every turn has a hidden reward.
    """
    keys = ["conversation_id", "turn_id"]
    turns, truth = (pd.read_csv(path, dtype={"turn_id": str}) for path in (turns_csv, truth_csv))
    both = turns.merge(truth.rename(columns={"reward": "hidden"})[[*keys, "hidden"]], on=keys, validate="many_to_one")
    if len(both) != len(turns):
        raise UserError(f"{truth_csv}: has the hidden rewards of {len(both)} of the {len(turns)} turns in {turns_csv}")
    return spearman(both["reward"].to_numpy(), both["hidden"].to_numpy()), len(both)


def reward_rows(folder: Path) -> tuple[list[dict], list[Path]]:
    """Rows of stages 1 and 2, and their pictures."""
    rows, pictures = [], []
    for stage, name in RUNS.items():
        found = sorted(folder.glob(f"*/val_turn_rewards_{name}.csv"))
        if len(found) != 1:
            raise UserError(f"{folder}: expected one val_turn_rewards_{name}.csv, found {len(found)}; run demo.sh")
        correlation, turns = hidden_correlation(found[0], folder / "candor" / "truth.csv")
        measured = f"rank correlation with the hidden reward, {turns} held-out turns"
        after = None if correlation is None else f"{correlation:.3f}"
        rows.append({"stage": stage, "measured": measured, "before": None, "after": after})
        pictures += [found[0].with_suffix(".png"), found[0].with_name(f"val_returns_{name}.png")]
    return rows, pictures


def ppo_rows(folder: Path) -> list[dict]:
    """Rows of stage 3: mean reward with its 95% interval, and KL."""
    record = json.loads((folder / "rlmf_weights" / "GELI_llama.json").read_text())
    before, after, n = record["metrics"]["before"], record["metrics"]["after"], record["held_out_prompts"]
    reward, kl = (
        {"stage": "PPO (stage 3)", "measured": f"{measured}, {n} held-out prompts"}
        for measured in ("mean reward", "KL to the reference, nats a response")
    )
    for column, measured in (("before", before), ("after", after)):
        low, high = (measured[f"reward_{side}"] for side in ("low", "high"))
        reward[column] = f"{measured['reward']:.3f} [{low:.3f}, {high:.3f}]"
        kl[column] = f"{round(measured['kl'], 3) + 0.0:.3f}"  # rounding may give -0.0
    return [reward, kl]


def main(folder: Path) -> None:
    """Prints one table of all stages, and where the pictures are."""
    rows, pictures = reward_rows(folder)
    rows += ppo_rows(folder)
    pictures.append(folder / "rlmf_weights" / "GELI_llama_ppo.png")
    print(format_table(rows, "\nThe demo, in one table"))
    print("\n".join(["\nPictures:", *(f"  {path}" for path in pictures)]))


if __name__ == "__main__":
    run(partial(main, FOLDER))
