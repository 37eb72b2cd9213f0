"""When GELI is better than GE or LI alone: rank correlation with the hidden reward as one thing changes.

    python experiments/when_geli_helps.py OUT [--seeds 0 1 2 3 4]

Makes sample corpora, one a seed and point, and runs the training commands on each: LI, GE and GELI with more or fewer
training conversations, longer or shorter conversations, a face that says more or less, and λ from LI to GE. Run it
again to continue where it stopped; finished runs are not repeated.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

from geli.run.errors import run
from geli.run.options import new_parser, seed


def parse_options(argv: Sequence[str] | None = None):
    """The options on the command line."""
    parser = new_parser("Show when GELI is better than GE or LI alone.")
    parser.add_argument("out", type=Path, help="folder of everything; what is finished there is not run again")
    parser.add_argument("--seeds", type=seed, nargs="+", default=[0, 1, 2, 3, 4], help="seeds of corpora and training")
    return parser.parse_args(argv)


# Parsed before the imports below, which take seconds, so that --help and mistakes in options are answered at once.
OPTIONS = parse_options() if __name__ == "__main__" else None

import numpy as np
import pandas as pd

from experiments import plots
from experiments.commands import finished_head, run_command
from geli.run.console import format_table, progress_bar
from geli.run.files import atomic_path
from tools.limits import CORRELATION, within
from tools.saved_heads import read_truth
from tools.seeds import t_interval

TURNS, CONVERSATIONS, HELD_OUT = 24, 160, 20  # of a corpus at the middle point; a tenth of conversations is held out
AXES = {  # what changes -> its values, and its label
    "train_size": ((10, 40, 160), "training conversations"),
    "turns": ((12, 24, 48), "turns of a conversation"),
    "face_noise": ((0.0, 0.5, 1.0), "share of faces that say nothing of the turn"),
    "ge_weight": ((0.0, 0.25, 0.5, 0.75, 1.0), "λ, the weight of GE"),
}
METHODS = ("LI", "GE", "GELI")


class Point(NamedTuple):
    """One setting of everything that changes; its defaults are the middle point."""

    train_size: int = CONVERSATIONS
    turns: int = TURNS
    face_noise: float = 0.0
    ge_weight: float = 0.5

    def corpus(self, number: int) -> str:
        """The name of its corpus; points that differ in training alone share it."""
        return f"corpus-{self.turns}-{self.face_noise}-{number}"

    def run(self, method: str, number: int) -> str:
        """The name of a run; what does not matter to the method is not in it."""
        face = f"-{self.face_noise}" if method != "GE" else ""
        weight = f"-{self.ge_weight}" if method == "GELI" else ""
        return f"{method}-{self.train_size}-{self.turns}{face}{weight}-{number}"


def points() -> dict[Point, list[tuple[str, float]]]:
    """Every point, with the (axis, value) pairs that it is drawn at."""
    found: dict[Point, list[tuple[str, float]]] = {}
    for axis, (values, _) in AXES.items():
        for value in values:
            found.setdefault(Point()._replace(**{axis: value}), []).append((axis, value))
    return found


def commands(out: Path, point: Point, number: int, encoder: Path) -> Iterator[tuple[str, list]]:
    """(run name, command) of the three runs of a point and seed."""
    common = ["--data_dir", out / point.corpus(number), "--output_dir", out / "runs", "--train_size", point.train_size]
    common += ["--preset", "small", "--small_model_shrink", "--val", "--seed", number, "--resume"]
    li = point.run("LI", number)
    yield li, ["train_reward_LI_only.py", *common, "--lang_model_path", encoder]
    stage_2 = ["train_reward_GELI.py", *common, "--train"]
    yield point.run("GE", number), [*stage_2, "--lang_model_path", encoder]
    yield point.run("GELI", number), [*stage_2, "--affect_path", li, "--lambda", point.ge_weight]


def make_corpus(out: Path, point: Point, number: int) -> None:
    """The corpus of a point and seed, unless it is there."""
    folder = out / point.corpus(number)
    if not (folder / "truth.csv").is_file():  # written last
        shape = ["--conversations", CONVERSATIONS + HELD_OUT, "--turns", point.turns, "--face_noise", point.face_noise]
        run_command(out, "tools/sample_candor.py", folder, *shape, "--seed", number)


def truth_correlation(out: Path, point: Point, method: str, number: int) -> float:
    """The rank correlation of a run's held-out turn rewards with the hidden rewards."""
    head = finished_head(out / "runs", point.run(method, number))
    turns = pd.read_csv(head.with_name(f"val_turn_rewards_{point.run(method, number)}.csv"), dtype={"turn_id": str})
    truth = read_truth(out / point.corpus(number) / "truth.csv")
    hidden = [truth[key] for key in zip(turns["conversation_id"], turns["turn_id"], strict=True)]
    return float(turns["reward"].corr(pd.Series(hidden), method="spearman"))


def main(options) -> None:
    """Runs what is not finished, and writes the table and the picture."""
    out = options.out
    make_corpus(out, Point(), 0)
    encoder = out / "models" / "bart"
    if not encoder.is_dir():
        run_command(out, "tools/tiny_models.py", out / Point().corpus(0), out / "models", "--only", "bart")
    work = [(point, number) for number in options.seeds for point in points()]
    for point, number in progress_bar(work, desc="training", unit="point"):
        make_corpus(out, point, number)
        for name, command in commands(out, point, number, encoder):
            if not finished_head(out / "runs", name):
                run_command(out, *command, "--run_name", name)
    rows = []
    for point, places in points().items():
        measured = {
            method: np.array([truth_correlation(out, point, method, number) for number in options.seeds])
            for method in METHODS
        }
        for method, values in measured.items():
            value, low, high = within(CORRELATION, t_interval, values)
            less = None if method == "GELI" else str(t_interval(measured["GELI"] - values))
            for axis, at in places:
                row = {"axis": axis, "value": at, "method": method, "truth": value, "low": low, "high": high}
                rows.append({**row, "GELI less this": less})
    rows.sort(key=lambda row: ([*AXES].index(row["axis"]), row["value"]))
    with atomic_path(out / "when_geli_helps.csv") as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False, float_format="%.4f")
    labels = {axis: label for axis, (_, label) in AXES.items()}
    paths = plots.sweeps(rows, labels, out / "when_geli_helps.png")
    title = f"Rank correlation with the hidden reward, {len(options.seeds)} seeds, 95% intervals"
    print(format_table(rows, f"\n{title}"))
    print("\n".join(["Written:", f"  {out / 'when_geli_helps.csv'}", *(f"  {path}" for path in paths)]))


if __name__ == "__main__":
    run(partial(main, OPTIONS))
