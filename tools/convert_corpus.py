"""Writes another corpus in CANDOR's layout, or as rated chats, so that every command can read it.

python tools/convert_corpus.py casino FOLDER_WITH_CASINO_JSON OUT
python tools/convert_corpus.py candor FOLDER chats.jsonl
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

from geli.run.errors import run
from geli.run.options import new_parser
from tools.converters import CONVERTERS, convert


def main() -> None:
    """Command line."""
    parser = new_parser("Write another corpus in CANDOR's layout, or as rated chats.")
    known = "; ".join(f"{name}: {converter.help}" for name, converter in CONVERTERS.items())
    parser.add_argument("corpus", choices=CONVERTERS, help=known)
    parser.add_argument("source", help="folder with the corpus' files")
    parser.add_argument(
        "out", help="folder to write one folder a conversation to, or a .jsonl file of rated chats (becomes --data_dir)"
    )
    parser.add_argument(
        "--rating_range", nargs=2, type=float, metavar=("LO", "HI"), help="of rated-chats (default: as the file states)"
    )
    args = parser.parse_args()
    if args.rating_range and args.corpus != "rated-chats":
        parser.error("--rating_range is for rated-chats")
    conversations, turns = convert(args.corpus, Path(args.source), Path(args.out), args.rating_range)
    print(f"Wrote {conversations:,} conversations with {turns:,} turns to {args.out}")


if __name__ == "__main__":
    run(main)
