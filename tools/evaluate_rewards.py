"""Measures saved reward heads on the same held-out conversations, with 95% intervals.

    python tools/evaluate_rewards.py GE=run-1,run-2 GELI=run-3,run-4 run-5 --data_dir CORPUS --output_dir RUNS

A HEAD is the path of a `reward1_` file, or the name of a run under --output_dir. Heads with commas between them are
seeds of one setting. The baselines always predict the mean, or the mode, of the training scores. Intervals resample
conversations. If the corpus has a `truth.csv`, turns are also compared with the hidden reward; and with people's
judgements of single turns, if there are any (--turn_labels, or `turn_rating` in chats).
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

from geli.data.candor import TRANSCRIPTS
from geli.data.questions import QUESTIONS
from geli.run.errors import UserError, run
from geli.run.options import file_name, new_parser, positive_int, runs_folder, seed


def parse_options(argv: Sequence[str] | None = None):
    """The command line."""
    parser = new_parser("Measure saved reward heads on the same held-out conversations, with 95% intervals.")
    parser.add_argument("heads", nargs="+", metavar="[LABEL=]HEAD[,HEAD…]", help="heads; after a comma, other seeds")
    parser.add_argument("--data_dir", default="./candor", help="folder with one folder a conversation, or rated chats")
    parser.add_argument(
        "--rating_range", nargs=2, type=float, metavar=("LO", "HI"), help="of rated chats (default: as the file states)"
    )
    parser.add_argument(
        "--output_dir", default=runs_folder(), help="as of the three commands; the tables are written there, too"
    )
    parser.add_argument("--name", default="rewards", type=file_name, help="of the tables: NAME.csv, .json, .md, .tex")
    parser.add_argument(
        "--reward_class", choices=QUESTIONS, metavar="CLASS", help="the score (default: that of the heads)"
    )
    parser.add_argument("--transcript", default="cliffhanger", choices=TRANSCRIPTS, help="which transcript is read")
    parser.add_argument("--train_size", default=500, type=positive_int, help="training conversations, as in training")
    parser.add_argument(
        "--val_all", action="store_true", help="measure on every conversation that no head was trained on"
    )
    parser.add_argument(
        "--truth", type=Path, help="hidden rewards of turns (default: DATA_DIR/truth.csv, if it exists)"
    )
    parser.add_argument(
        "--turn_labels", type=Path, metavar="FILE", help="people's judgements of turns: a CSV file with "
        "conversation_id, turn_id and label, or chats with turn_rating (default: those in DATA_DIR, if any)",
    )  # fmt: skip
    parser.add_argument("--lang_model_path", help="encoder of published heads, whose files record none")
    parser.add_argument("--repetitions", default=1000, type=positive_int, help="bootstrap resamples")
    parser.add_argument("--seed", default=0, type=seed, help="of the resamples")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="auto is a GPU if there is one"
    )
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto is bfloat16 on a GPU that has it"
    )
    parser.add_argument("--no_cache", action="store_true", help="neither read nor write OUTPUT_DIR/cache")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that an encoder brings along")
    return parser.parse_args(argv)


# Parsed before the imports below, which take seconds, so that --help and mistakes in options are answered at once.
OPTIONS = parse_options() if __name__ == "__main__" else None

from data_utils import DataOptions
from geli.heads import load_reward_head
from geli.run.console import progress_bar
from geli.run.distributed import make_accelerator
from tools import tables
from tools.saved_heads import Evaluation, Scorer, compare, parse_settings, reward_class_of


def main(options) -> None:
    """Measures the heads, prints the table, and writes it in four formats."""
    output_dir = Path(options.output_dir)
    cache = None if options.no_cache else output_dir / "cache"
    settings = parse_settings(options.heads, output_dir)
    paths = [path for setting in settings for path in setting.paths]
    if options.lang_model_path and all(load_reward_head(path).config.encoder for path in paths):
        raise UserError("--lang_model_path is for published heads, and all of these record their own encoder")
    reward_class = reward_class_of(paths, options.reward_class)
    data = DataOptions(
        options.data_dir, transcript=options.transcript, reward_class=reward_class, train_size=options.train_size,
        rating_range=options.rating_range,
    )  # fmt: skip
    truth = options.truth or Path(options.data_dir) / "truth.csv"
    evaluation = Evaluation.of(
        data, paths, cache=cache, val_all=options.val_all, repetitions=options.repetitions, seed=options.seed,
        truth=truth if options.truth or truth.is_file() else None, turn_labels=options.turn_labels,
    )  # fmt: skip
    accelerator = make_accelerator(options.device, options.dtype)
    score = Scorer(evaluation, accelerator, cache, options.lang_model_path, options.trust_remote_code)
    with progress_bar(total=len(paths), desc="measuring", unit="head") as bar:
        predictions = {}
        for setting in settings:
            predictions[setting.label] = [score(path) for path in setting.paths]
            bar.update(len(setting.paths))
    rows = compare(evaluation, predictions)
    about = {
        "data": evaluation.corpus.counts(), "reward_class": reward_class, "repetitions": options.repetitions,
        "validation_conversations": list(dict.fromkeys(t.conversation.id for t in evaluation.validation)),
        "heads": {setting.label: list(map(str, setting.paths)) for setting in settings},
    }  # fmt: skip
    n = len(about["validation_conversations"])
    caption = f"{n} held-out conversations, 95% intervals. {tables.LEGEND}."
    print(tables.on_screen(rows, f"\n{caption}"))
    paths = tables.write(rows, output_dir / options.name, about, caption)
    print("\n".join(["Written:", *(f"  {path}" for path in paths)]))


if __name__ == "__main__":
    run(partial(main, OPTIONS))
