"""Plants a known hidden reward on a corpus' sentences: ratings and faces are made anew to follow it.

    python tools/plant_truth.py DATA_DIR OUT

`OUT/truth.csv` has the hidden reward of every turn; only evaluation reads it.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

from geli.run.errors import run
from geli.run.options import new_parser, seed


def parse_options(argv: Sequence[str] | None = None):
    """The command line."""
    parser = new_parser("Plant a known hidden reward on a corpus' sentences.")
    parser.add_argument("data_dir", help="corpus in CANDOR's layout, whose sentences are kept")
    parser.add_argument("out", type=Path, help="folder to write one folder a conversation to (becomes --data_dir)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of ratings and faces")
    return parser.parse_args(argv)


# Parsed before the imports below, which take seconds, so that --help and mistakes in options are answered at once.
OPTIONS = parse_options() if __name__ == "__main__" else None

from geli.loop.plant import plant


def main(options) -> None:
    """Plants it, and says how closely ratings follow it."""
    found = plant(options.data_dir, options.out, options.seed)
    print(
        f"Wrote {found['conversations']:,} conversations with {found['turns']:,} turns to {options.out}, and the "
        f"hidden rewards to {options.out / 'truth.csv'}; ratings correlate {found['correlation']:.2f} with them"
    )


if __name__ == "__main__":
    run(partial(main, OPTIONS))
