"""Every decomposition and LI signal on one corpus with a known hidden reward, in one table with intervals over seeds.

    python experiments/compare.py OUT [--data_dir CORPUS --lang_model_path ENCODER] [--seeds 0 1 2 3 4]

Runs the training commands themselves: stage 1 on each LI signal by which the corpus has reactions, stage 2 with
each decomposition alone and from each stage-1 run. Then it measures all heads on the same held-out conversations, as
tools/evaluate_rewards.py does. Without --data_dir it makes the sample corpus and a small encoder in OUT. Run it again
to continue where it stopped; finished runs are not repeated. A decomposition that learns from a language model's shares
takes part with --llm_shares.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

from geli.run.errors import run
from geli.run.options import new_parser, positive_int, seed


def parse_options(argv: Sequence[str] | None = None):
    """The options on the command line."""
    parser = new_parser("Compare every decomposition and LI signal on one corpus, over several seeds.")
    parser.add_argument("out", type=Path, help="folder of everything; what is finished there is not run again")
    parser.add_argument("--data_dir", help="a corpus with a truth.csv (default: a sample corpus is made)")
    parser.add_argument("--lang_model_path", help="the encoder to start from (default: a small BART is trained)")
    parser.add_argument("--context_turns", type=positive_int, help="of context (default: that of --preset small)")
    parser.add_argument("--train_size", type=positive_int, default=500, help="training conversations")
    parser.add_argument("--seeds", type=seed, nargs="+", default=[0, 1, 2, 3, 4], help="seeds of training")
    parser.add_argument("--epochs", type=positive_int, help="of stage 1 (default: that of --preset small)")
    parser.add_argument("--learning_rate", help="of stage 1 (default: that of --preset small)")
    parser.add_argument("--llm_shares", help="the shares.csv of apps/llm_shares (default: without that row)")
    options = parser.parse_args(argv)
    if bool(options.data_dir) != bool(options.lang_model_path):
        parser.error("--data_dir and --lang_model_path go together")
    return options


# Parsed before the imports below, which take seconds, so that --help and mistakes in options are answered at once.
OPTIONS = parse_options() if __name__ == "__main__" else None

import numpy as np

from data_utils import LI_SIGNALS, DataOptions, SignalOptions, TurnSet, read_corpus, split
from experiments.commands import finished_head, run_command
from geli.run.console import progress_bar
from geli.run.distributed import make_accelerator
from models import DECOMPOSITIONS
from tools import tables
from tools.saved_heads import Evaluation, Scorer, compare

STAGE_2 = "--preset small --train --val".split()
STAGE_1 = "--preset small --val --small_model_shrink".split()


def commands(
    encoder: str, stage_1: Sequence[str] = (), seed: int = 0, llm_shares: str | None = None,
    signals: Sequence[str] = tuple(LI_SIGNALS),
) -> Iterator[tuple[str, str, list[str]]]:  # fmt: skip
    """(row of the table, run name, command) of every training run of a seed, in the order in which they can be run.

    Args:
        stage_1: more of its options. llm_shares: a language model's shares; None: without what learns from them.
        signals: of LI.
    """
    common = ["--seed", str(seed)]
    for signal in signals:
        options = [*STAGE_1, *stage_1, *common, "--li_signal", signal, "--lang_model_path", encoder]
        yield f"LI:{signal}", f"li-{signal}-{seed}", ["train_reward_LI_only.py", *options]
    for kind, row in DECOMPOSITIONS.items():
        if row.uses_shares and not llm_shares:
            continue
        options = [*STAGE_2, *common, "--redist_type", kind]
        options += ["--llm_shares", llm_shares] if row.uses_shares else []
        options += [] if row.head else ["--small_model_shrink"]
        yield f"GE:{kind}", f"ge-{kind}-{seed}", ["train_reward_GELI.py", *options, "--lang_model_path", encoder]
        for signal in signals:
            start = ["--affect_path", f"li-{signal}-{seed}"]
            yield f"GELI:{kind}×{signal}", f"geli-{kind}-{signal}-{seed}", ["train_reward_GELI.py", *options, *start]


def signals_of(data: DataOptions, cache: Path) -> list[str]:
    """The LI signals by which some training turn of the corpus has a reaction."""
    trajectories, _ = split(read_corpus(data.data_dir, data.reward_class, cache=cache), data.train_size)
    every = {name: TurnSet.from_trajectories(trajectories, 1, SignalOptions(name)) for name in LI_SIGNALS}
    return [name for name, turns in every.items() if turns.known[~np.isnan(turns.targets)].any()]


def make_corpus(out: Path) -> tuple[str, str]:
    """The folders of a sample corpus and of a small encoder in `out`, which are made unless they are there."""
    corpus, models = out / "candor", out / "models"
    if not (corpus / "truth.csv").is_file():  # written last
        run_command(out, "tools/sample_candor.py", corpus)
    if not (models / "bart").is_dir():
        run_command(out, "tools/tiny_models.py", corpus, models, "--only", "bart")
    return str(corpus), str(models / "bart")


def main(options) -> None:
    """Makes what is missing, runs the training commands that are not finished, and prints and writes the table."""
    out, runs = options.out, options.out / "runs"
    data_dir, encoder = (options.data_dir, options.lang_model_path) if options.data_dir else make_corpus(out)
    common = ["--data_dir", data_dir, "--output_dir", runs, "--train_size", options.train_size, "--resume"]
    common += ["--context_turns", options.context_turns] if options.context_turns else []
    chosen = {"--epochs": options.epochs, "--learning_rate": options.learning_rate}
    stage_1 = [str(word) for option in chosen.items() if option[1] for word in option]
    data, cache = DataOptions(data_dir, train_size=options.train_size), runs / "cache"
    signals = signals_of(data, cache)
    every = [r for number in options.seeds for r in commands(encoder, stage_1, number, options.llm_shares, signals)]
    settings: dict[str, list[Path]] = {}
    for row, name, command in progress_bar(every, desc="comparing", unit="run"):
        if not finished_head(runs, name):
            run_command(out, *command, *common, "--run_name", name)
        settings.setdefault(row, []).append(finished_head(runs, name))

    first = f"GELI:{next(iter(DECOMPOSITIONS))}×{signals[0]}"  # which differences are from
    settings = {first: settings.pop(first), **settings}
    paths, truth = [path for heads in settings.values() for path in heads], Path(data_dir) / "truth.csv"
    evaluation = Evaluation.of(data, paths, cache=cache, val_all=False, truth=truth if truth.is_file() else None)
    score = Scorer(evaluation, make_accelerator("auto", "auto"), cache)
    rows = compare(evaluation, {row: [score(path) for path in heads] for row, heads in settings.items()})
    n, seeds = len({t.conversation.id for t in evaluation.validation}), len(options.seeds)
    caption = f"{n} held-out conversations, {seeds} seeds, 95% intervals over both. {tables.LEGEND}."
    print(tables.on_screen(rows, f"\n{caption}"))
    paths = tables.write(rows, out / "compare", {"data": evaluation.corpus.counts(), "seeds": options.seeds}, caption)
    print("\n".join(["Written:", *(f"  {path}" for path in paths)]))


if __name__ == "__main__":
    run(partial(main, OPTIONS))
