"""Every decomposition and LI signal on one sample corpus, in one table.

    python tools/compare.py OUT [--data_dir SAMPLE --lang_model_path ENCODER]

Runs the training commands themselves: stage 1 on the face and on the sentiment of the user's next turn, stage 2 with
each decomposition alone and from each stage-1 run. Without the options it makes the sample corpus and a small encoder
in OUT. The table (also `OUT/compare.csv`) has, on held-out conversations, L_GE, the mean reward of turns with a happy
listener less that of the rest, and the rank correlation with the sample's hidden reward.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

from geli.run.errors import UserError, run
from geli.run.options import new_parser, positive_int, seed


def parse_options():
    """The options on the command line."""
    parser = new_parser("Compare every decomposition and LI signal on one sample corpus.")
    parser.add_argument("out", help="a new folder for everything that is made")
    parser.add_argument("--data_dir", help="a corpus of sample_candor.py (default: one is made)")
    parser.add_argument("--lang_model_path", help="the encoder to start from (default: a small BART is trained)")
    parser.add_argument("--context_turns", type=positive_int, default=3, help="turns of context before an agent turn")
    parser.add_argument("--seed", type=seed, default=0, help="seed of every random choice")
    options = parser.parse_args()
    if bool(options.data_dir) != bool(options.lang_model_path):
        parser.error("--data_dir and --lang_model_path go together")
    return options


# Parsed before the imports below, which take seconds, so that --help and mistakes in options are answered at once.
OPTIONS = parse_options() if __name__ == "__main__" else None

import pandas as pd
from demo_report import hidden_correlation

from data_utils import LI_SIGNALS, read_corpus, split
from geli.run.console import format_table, progress_bar
from geli.run.files import atomic_path, require_empty_folder
from models import DECOMPOSITIONS

# with normalized losses GE and LI count alike; with raw ones GE, in points², is hundreds of times larger
STAGE_2 = "--train --val --small_model_shrink --batch_size 4 --K 160 --epochs 16 --loss_scale normalized".split()
STAGE_1 = "--val --small_model_shrink --batch_size 32 --K 32 --epochs 3 --learning_rate 1e-4".split()


def commands(encoder: str) -> Iterator[tuple[str, str, list[str]]]:
    """(row of the table, run name, command) of every training run, in the order in which they can be run."""
    for signal in LI_SIGNALS:
        options = [*STAGE_1, "--li_signal", signal, "--lang_model_path", encoder]
        yield f"LI:{signal}", f"li-{signal}", ["train_reward_LI_only.py", *options]
    for kind in DECOMPOSITIONS:
        options = [*STAGE_2, "--redist_type", kind]
        yield f"GE:{kind}", f"ge-{kind}", ["train_reward_GELI.py", *options, "--lang_model_path", encoder]
        for signal in LI_SIGNALS:
            start = ["--affect_path", f"li-{signal}"]
            yield f"GELI:{kind}×{signal}", f"geli-{kind}-{signal}", ["train_reward_GELI.py", *options, *start]


def constant_rows(data_dir: str) -> list[dict]:
    """The rows of always predicting the training scores' mean, and their mode."""
    training, validation = split(read_corpus(data_dir, "overall_affect"), 500)
    scores = pd.Series([t.score for t in training])
    held_out = pd.Series([t.score for t in validation])
    values = {"mean": scores.mean(), "mode": scores.mode()[0]}
    return [
        {"reward": name, "L_GE": float(((held_out - value) ** 2).mean()), "Δr_LI": 0.0, "hidden": None}
        for name, value in values.items()
    ]


def main(options) -> None:
    """Makes what is missing, runs every training command, and prints the table."""
    out, seed = Path(options.out), ["--seed", str(options.seed)]
    require_empty_folder(out)
    data_dir, encoder = options.data_dir, options.lang_model_path
    if not data_dir:
        data_dir, encoder = str(out / "candor"), str(out / "models" / "bart")
        _python(out, "tools/sample_candor.py", data_dir, *seed)
        _python(out, "tools/tiny_models.py", data_dir, str(out / "models"), "--only", "bart", *seed)
    common = ["--data_dir", data_dir, "--output_dir", str(out), "--context_turns", str(options.context_turns), *seed]
    rows = constant_rows(data_dir)
    for row, name, command in progress_bar(list(commands(encoder)), desc="comparing", unit="run"):
        _python(out, *command, *common, "--run_name", name)
        record = json.loads(next(out.glob(f"*/reward1_{name}.json")).read_text())
        measured = record["metrics"]["validation"]
        turns = next(out.glob(f"*/val_turn_rewards_{name}.csv"))
        hidden, n_turns = hidden_correlation(turns, Path(data_dir) / "truth.csv")
        rows.append({"reward": row, "L_GE": measured["ge_loss"], "Δr_LI": measured["delta_li"], "hidden": hidden})

    with atomic_path(out / "compare.csv") as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False, float_format="%.4f")
    print(format_table(rows, f"\n{n_turns} held-out agent turns; hidden: rank correlation with the hidden reward"))
    print(f"Written:\n  {out / 'compare.csv'}")


def _python(out: Path, script: str, *options: str) -> None:
    """Runs one of this repository's commands; what it prints goes to `out/log.txt`."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    with open(log, "a", encoding="utf-8") as file:
        command = [sys.executable, str(Path(__file__).resolve().parents[1] / script), *options]
        if subprocess.run(command, stdout=file, stderr=file, check=False).returncode:
            raise UserError(f"{script} failed: see the end of {log}")


if __name__ == "__main__":
    run(partial(main, OPTIONS))
