"""Writes the CaSiNo corpus in CANDOR's layout: the same as `convert_corpus.py casino`.

python tools/casino_to_candor.py FOLDER_WITH_CASINO_JSON OUT
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

import convert_corpus

from geli.run.errors import run


def main() -> None:
    """Command line."""
    convert_corpus.main("casino")


if __name__ == "__main__":
    run(main)
