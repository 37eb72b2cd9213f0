"""Plants a known hidden reward on a corpus' sentences: ratings and faces are made anew to follow it.

    python tools/plant_truth.py DATA_DIR OUT

`OUT/truth.csv` has the hidden reward of every turn; only evaluation reads it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

from geli.loop.plant import plant
from geli.run.errors import run
from geli.run.options import new_parser, seed


def main() -> None:
    """Command line."""
    parser = new_parser("Plant a known hidden reward on a corpus' sentences.")
    parser.add_argument("data_dir", help="corpus in CANDOR's layout, whose sentences are kept")
    parser.add_argument("out", type=Path, help="folder to write one folder a conversation to (becomes --data_dir)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of ratings and faces")
    args = parser.parse_args()
    found = plant(args.data_dir, args.out, args.seed)
    print(
        f"Wrote {found['conversations']:,} conversations with {found['turns']:,} turns to {args.out}, and the hidden "
        f"rewards to {args.out / 'truth.csv'}; ratings correlate {found['correlation']:.2f} with them"
    )


if __name__ == "__main__":
    run(main)
