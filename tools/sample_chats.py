"""Writes made-up rated chats with a known worth of every reply, to try everything on.

    python tools/sample_chats.py chats.jsonl [--chats 500] [--turns 12] [--thumbs 0.1] [--seed 0]

The turns are those of tools/sample_candor.py. The user's rating, 1 to 5, follows the mean worth of the assistant's
turns, with noise; a share of these has a thumb, which is right four times of five. `turn_rating` is the worth itself,
which `tools/evaluate_rewards.py` measures by, and no training reads.
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

from geli.data.chats import FORMAT
from geli.run.errors import run
from geli.run.files import atomic_path
from geli.run.options import fraction, new_parser, positive_int, seed
from tools.sample_candor import converse

RANGE = (1, 5)
RIGHT = 0.8  # of the thumbs


def chats(n: int, turns: int, thumbs: float, seed: int) -> Iterator[dict]:
    """The lines of a file of `n` chats, its header first."""
    yield {"format": FORMAT, "rating_range": list(RANGE)}
    rng, shown = random.Random(seed), random.Random(f"thumbs {seed}")  # so that thumbs change no text
    for number in range(n):
        said, _, truth = converse(rng, ("user", "assistant"), round(turns * rng.uniform(0.8, 1.2)))
        messages, worths = [], []
        for (role, start, _, text), (_, worth) in zip(said, truth, strict=True):
            messages.append({"role": role, "content": text, "time": round(start, 1)})
            if role == "assistant":
                worths.append(worth)
                messages[-1]["turn_rating"] = round(worth, 2)
                thumb = (1 if worth > 0.3 else -1) * (1 if shown.random() < RIGHT else -1)
                messages[-1] |= {"reaction": thumb} if shown.random() < thumbs else {}
        rating = 3 + 2 * sum(worths) / max(len(worths), 1) + rng.gauss(0, 0.75)
        yield {"id": f"chat-{number:06}", "messages": messages, "rating": min(max(round(rating), RANGE[0]), RANGE[1])}


def main() -> None:
    """Command line."""
    parser = new_parser("Write made-up rated chats with a known worth of every reply.")
    parser.add_argument("out", type=Path, help="file to write (becomes --data_dir)")
    parser.add_argument("--chats", type=positive_int, default=500, help="how many")
    parser.add_argument("--turns", type=positive_int, default=12, help="turns of a chat, give or take 20%%")
    parser.add_argument("--thumbs", type=fraction, default=0.1, help="share of the assistant's turns with a thumb")
    parser.add_argument("--seed", type=seed, default=0, help="seed: the same chats every time")
    args = parser.parse_args()
    with atomic_path(args.out, private=True) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in chats(args.chats, args.turns, args.thumbs, args.seed))
    print(f"Wrote {args.chats:,} chats to {args.out}")


if __name__ == "__main__":
    run(main)
