"""Prints what each stage of the demo measured on held-out sample conversations, against the hidden rewards.

python tools/demo_report.py DEMO_FOLDER
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

import pandas as pd

from geli.run.console import format_table
from geli.run.errors import UserError, run
from geli.run.options import new_parser


def hidden_correlation(turns_csv: Path, truth_csv: Path) -> tuple[float, int]:
    """Spearman's correlation of predicted with hidden turn reward over all held-out agent turns, and their number.

    Raises:
        UserError: if not every turn has a hidden reward.
    """
    from scipy.stats import spearmanr

    keys = ["conversation_id", "turn_id"]
    turns, truth = (pd.read_csv(path, dtype={"turn_id": str}) for path in (turns_csv, truth_csv))
    both = turns.merge(truth.rename(columns={"reward": "hidden"})[[*keys, "hidden"]], on=keys, validate="many_to_one")
    if len(both) != len(turns):
        raise UserError(f"{truth_csv}: has the hidden rewards of {len(both)} of the {len(turns)} turns in {turns_csv}")
    return float(spearmanr(both["reward"], both["hidden"]).statistic), len(both)


def main() -> None:
    """Command line."""
    parser = new_parser("Print what the demo measured.")
    parser.add_argument("folder", help="the demo's folder: candor/truth.csv and the stages' outputs are below it")
    folder = Path(parser.parse_args().folder)

    rows, pictures = [], []
    runs = {"LI alone (stage 1)": "demo-li", "GE alone (stage 2)": "demo-ge", "GELI (stage 2)": "demo-geli"}
    for stage, name in runs.items():
        found = sorted(folder.glob(f"*/val_turn_rewards_{name}.csv"))
        if len(found) != 1:
            raise UserError(f"{folder}: expected one val_turn_rewards_{name}.csv, found {len(found)}; run demo.sh")
        correlation, turns = hidden_correlation(found[0], folder / "candor" / "truth.csv")
        what = f"rank correlation with the hidden reward, {turns} held-out turns"
        rows.append({"stage": stage, "measured": what, "before": None, "after": f"{correlation:.3f}"})
        pictures += [found[0].with_suffix(".png"), found[0].with_name(f"val_returns_{name}.png")]

    record = json.loads((folder / "rlmf_weights" / "GELI_llama.json").read_text())
    before, after = record["metrics"]["before"], record["metrics"]["after"]
    n = record["held_out_prompts"]
    for key, what in (("reward", "mean reward"), ("kl", "KL to the reference, nats a response")):
        row = {"stage": "PPO (stage 3)", "measured": f"{what}, {n} held-out prompts"}
        errors = [f" ± {part['reward_standard_error']:.3f}" if key == "reward" else "" for part in (before, after)]
        rows.append(
            {**row, "before": f"{round(before[key], 3) + 0.0:.3f}{errors[0]}", "after": f"{after[key]:.3f}{errors[1]}"}
        )
    pictures.append(folder / "rlmf_weights" / "GELI_llama_ppo.png")
    print(format_table(rows, "\nThe demo, in one table"))
    print("\n".join(["\nPictures:", *(f"  {path}" for path in pictures)]))


if __name__ == "__main__":
    run(main)
