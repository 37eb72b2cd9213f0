"""Scores every turn of a folder of conversations, as data to fine-tune on.

    python -m apps.label candor --reward_path RUN
    python -m apps.label chats.jsonl --reward_path RUN --out scored.csv

DATA is a folder in CANDOR's layout, or JSONL with a list of chat messages a line (a file, or a folder of files). The
table has a row for each turn: conversation_id, turn, speaker, text, reward. The same command continues a run that was
stopped.
"""

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from apps.options import add_head_options
from geli.data.candor import TRANSCRIPTS
from geli.data.corpus import printable
from geli.run.errors import one_line, run
from geli.run.options import new_parser, positive_int

INSTALL_RAY = "pip install -r apps/label/ray_requirements.txt"


def table_name(text: str) -> Path:
    """The path of a table."""
    if not text.endswith((".parquet", ".csv")):
        raise argparse.ArgumentTypeError("a name that ends with .parquet or .csv is expected")
    return Path(text)


def parse_options(argv: Sequence[str] | None = None):
    """The options on the command line."""
    parser = new_parser("Score every turn of a folder of conversations.")
    parser.add_argument("data", type=Path, help="folder in CANDOR's layout, JSONL file, or folder of JSONL files")
    parser.add_argument(
        "--reward_path", metavar="HEAD", required=True, help="run name, path of a reward1_ file, or its folder "
        "(no default)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=table_name, default=Path("turn_rewards.parquet"), help="the table, .parquet or .csv"
    )
    parser.add_argument("--transcript", choices=TRANSCRIPTS, default="cliffhanger", help="which one of CANDOR's")
    parser.add_argument(
        "--context_turns", type=positive_int, help="turns that are read before a turn (default: as in training)"
    )
    parser.add_argument(
        "--ray", nargs="?", const="", metavar="ADDRESS", help="score on a Ray cluster: its head's HOST:PORT, or auto, "
        "the one that this machine belongs to; without ADDRESS $RAY_ADDRESS, else the cores of this machine (default: "
        "in this process)",
    )  # fmt: skip
    add_head_options(parser)
    return parser.parse_args(argv)


# Parsed before the imports below, which take seconds, so that --help and mistakes in options are answered at once.
OPTIONS = parse_options() if __name__ == "__main__" else None

from apps.label.dialogues import open_source
from apps.label.labelling import Counts, score_conversations
from apps.packages import require
from geli.reward import GELIReward
from geli.run.console import format_table


def main(options) -> None:
    """Scores the conversations, and prints what was scored."""
    cluster, score_parts = nullcontext(), None
    if options.ray is not None:
        cluster = require("apps.label.cluster", "--ray", INSTALL_RAY).Cluster(options.ray)
    source = open_source(options.data, options.transcript)
    load = dict(
        output_dir=options.output_dir, device=options.device, dtype=options.dtype,
        context_turns=options.context_turns, lang_model_path=options.lang_model_path,
        trust_remote_code=options.trust_remote_code, cache_size=0,
    )  # fmt: skip
    reward = GELIReward.load(options.reward_path, **load)
    settings = {"context_turns": reward.context_turns, "device": options.device, "dtype": options.dtype}
    if options.ray is not None:
        load |= {"run_or_path": str(reward.path.resolve()), "lang_model_path": absolute(options.lang_model_path)}
        score_parts = partial(cluster.score, load=load)
    with cluster:
        counts = score_conversations(source, reward, options.out, settings, score_parts)
    report_dropped(counts)
    config, mean = reward.head.config, counts.reward / max(counts.scored, 1)
    predicts = config.redist_type and config.ep_len != "actual"
    row = {
        "conversations": counts.conversations, "turns": counts.turns, "scored": counts.scored,
        "mean reward": mean, "as a rating (points)": config.ep_len * mean if predicts else None,
        "turns/s": counts.scored_now / counts.seconds if counts.seconds else None,
    }  # fmt: skip
    print(format_table([row], f"Turn rewards by {reward.name}"))
    print(f"Written:\n  {options.out}")


def absolute(model: str | None) -> str | None:
    """The absolute path of a model's folder; a hub id as it is."""
    return os.path.abspath(model) if model and os.path.isdir(model) else model


def report_dropped(counts: Counts) -> None:
    """Prints how many conversations were dropped, and why."""
    for reason, number in counts.dropped.most_common():
        print(f"Dropped {number:,} conversations: {one_line(reason)}.")
    for name, reason in counts.examples:
        print(f"  {one_line(f'{printable(name)}: {reason}')}")


if __name__ == "__main__":
    run(partial(main, OPTIONS))
