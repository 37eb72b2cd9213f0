"""Compares the responses of two policies by the judgement of people, or of a language model.

    python -m apps.judge make rlmf_weights/GELI_llama_responses.csv OUT
    python -m apps.judge score OUT/key.json FILLED.csv [FILLED.csv ...]
    python -m apps.judge judge rlmf_weights/GELI_llama_responses.csv --judge_url URL --judge_model NAME --log_text

`make` writes blinded sheets for raters, and `score` unblinds those that come back. `judge` sends the conversations to a
server.
"""

import argparse
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from apps.options import server_url
from geli.run.errors import UserError, one_line, run
from geli.run.options import new_parser, positive_float, positive_int, seed


def parse_options(argv: Sequence[str] | None = None):
    """The command line."""
    parser = new_parser("Compare the responses of two policies by people's or a language model's judgement.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add_command(name: str, description: str) -> argparse.ArgumentParser:
        style = {"formatter_class": parser.formatter_class, "allow_abbrev": False}
        return commands.add_parser(name, help=description, description=description, **style)

    making = add_command("make", "write blinded sheets for raters, and the key")
    scoring = add_command("score", "unblind filled sheets, and write the table")
    judging = add_command("judge", "ask a language model on a server instead of people")
    for sub in (making, judging):
        sub.add_argument("responses", type=Path, help="a file that train_rl_GELI.py --generate wrote")
        compare = {"nargs": 2, "default": ["tuned", "base"], "metavar": "COLUMN"}
        sub.add_argument("--compare", **compare, help="the column whose wins are counted, and the one against it")
        sub.add_argument("--prompts", type=positive_int, default=50, help="how many prompts, drawn by --seed")
    making.add_argument("out", type=Path, help="a new folder: sheets/ is for the raters, key.json is not")
    making.add_argument("--raters", type=positive_int, default=3, help="how many sheets; all have the same prompts")
    scoring.add_argument("key", type=Path, help="the key.json that make wrote")
    scoring.add_argument("sheets", type=Path, nargs="+", help="filled sheets, as exported or saved")
    judging.add_argument("--judge_url", type=server_url, required=True, help="of the server, as https://host/v1")
    judging.add_argument("--judge_model", required=True, help="the model's name on the server")
    judging.add_argument("--timeout", type=positive_float, default=120.0, help="seconds that the server may be silent")
    judging.add_argument("--concurrency", type=positive_int, default=4, help="requests at a time")
    judging.add_argument("--log_text", action="store_true", help="let conversations leave this machine")
    for sub, what in ((making, "the choice of prompts"), (scoring, "intervals"), (judging, "prompts and model")):
        sub.add_argument("--seed", type=seed, default=0, help=f"seed of {what}")
    options = parser.parse_args(argv)
    if options.command == "judge" and not options.log_text:
        judging.error(f"conversations would be sent to {options.judge_url}: give --log_text if they may")
    return options


# Parsed before the imports below, which take seconds, so that --help and mistakes in options are answered at once.
OPTIONS = parse_options() if __name__ == "__main__" else None

import numpy as np
import pandas as pd

from apps.judge.pairs import CRITERIA, read_pairs
from apps.judge.scoring import for_print, score
from apps.judge.server import judge_pairs
from apps.judge.sheets import Key, make_sheets, read_sheets, write_sheets
from apps.openai_server import Server
from geli.run.console import format_table
from geli.run.files import atomic_path


def make(options) -> None:
    """Writes sheets and key."""
    pairs = read_pairs(options.responses, options.compare, options.prompts, options.seed)
    paths = write_sheets(options.out, *make_sheets(pairs, options.raters, options.compare))
    print(f"{' against '.join(options.compare)}: {len(pairs)} prompts, {options.raters} raters")
    print(f"Give each rater the files of one name in {options.out / 'sheets'}, and nobody {paths[0]}.")
    print("\n".join(["Written:", *(f"  {path}" for path in paths)]))


def score_sheets(options) -> None:
    """Unblinds sheets, says which do not count, and writes the table."""
    key = Key.read(options.key)
    sheets, left_out = read_sheets(options.sheets, key)
    for reason in left_out:
        print(f"Left out: {one_line(reason)}")
    if not sheets:
        raise UserError(f"no sheet counts; what is wrong with each of the {len(options.sheets)} files stands above")
    kept = ("rater", "path", "answered", "missing", "unreadable")
    print(format_table([{name: getattr(sheet, name) for name in kept} for sheet in sheets]))
    rows = score(np.stack([sheet.votes for sheet in sheets]), list(CRITERIA), options.seed)
    said = f"{len(key.rows)} prompts, {len(sheets)} of {len(key.sheets)} raters"
    write_table(rows, key.compare, said, options.key.parent / "human_eval.csv")


def judge(options) -> None:
    """Asks the server, and writes the table."""
    server = Server(options.judge_url, options.judge_model, options.seed, options.timeout, options.concurrency)
    pairs = read_pairs(options.responses, options.compare, options.prompts, options.seed)
    name = re.sub(r"[^\w.-]+", "-", server.model)
    log = options.responses.with_name(f"{options.responses.stem}_judge_{name}.jsonl")
    votes, flipped = judge_pairs(server, pairs, log)
    rows = score(votes[None], list(CRITERIA), options.seed)
    for row, share in zip(rows, np.nanmean(flipped, axis=0), strict=True):
        row.pop("alpha")  # there is one judge
        row["flipped"] = float(share)
    said = f"{len(pairs)} prompts, judged by {server.model}"
    write_table(rows, options.compare, said, log.with_suffix(".csv"))


def write_table(rows: list[dict], compare: Sequence[str], said: str, path: Path) -> None:
    """Prints the results, and writes them."""
    with atomic_path(path) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False, float_format="%.6g")
    print(format_table(for_print(rows), f"\n{compare[0]} against {compare[1]}, {said}; shares [95% interval]"))
    print(f"Written:\n  {path}")


def main(options) -> None:
    """Runs the command."""
    {"make": make, "score": score_sheets, "judge": judge}[options.command](options)


if __name__ == "__main__":
    run(partial(main, OPTIONS))
