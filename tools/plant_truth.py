"""Plants a known hidden reward on real conversations: their words stay, ratings and faces are made anew to follow it.

    python tools/plant_truth.py DATA_DIR OUT

`OUT/truth.csv` has the hidden reward of every turn; only evaluation reads it.
"""

import random
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
    parser.add_argument("data_dir", help="corpus in CANDOR's layout, or rated chats, whose sentences are kept")
    parser.add_argument("out", type=Path, help="folder to write one folder a conversation to (becomes --data_dir)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of ratings and faces")
    parser.add_argument(
        "--rating_range", type=float, nargs=2, metavar=("LO", "HI"), help="of rated chats (default: as the file states)"
    )
    return parser.parse_args(argv)


# Parsed before the imports below, which take seconds, so that --help and mistakes in options are answered at once.
OPTIONS = parse_options() if __name__ == "__main__" else None

import numpy as np
import pandas as pd

from geli.data.candor import Conversation
from geli.data.chats import Range
from geli.data.corpus import read_conversations
from geli.data.questions import QUESTIONS
from geli.run.console import progress_bar
from geli.run.files import atomic_path, require_empty_folder
from tools.hidden_reward import hidden_reward
from tools.writer import write_conversation

RATING_NOISE = 0.75  # standard deviation, in standard deviations of the mean hidden reward
SMILE, SMILE_BY_REWARD, SMILE_AT_EXCLAMATION = 0.12, 0.45, 0.25  # chances that a listener smiles
FROWN, FROWN_BY_REWARD = 0.04, 0.25
LOST_FRAMES = 0.05


def plant(source: str | Path, out: Path, seed: int, rating_range: Range | None = None) -> dict[str, float]:
    """Writes the conversations of a corpus in CANDOR's layout with ratings and faces that follow the hidden reward.

    A person's rating follows the mean hidden reward of the other's turns, with noise; GELI's return is L times the mean
    reward too. A listener's smile follows a turn's hidden reward noisily, with a habit of each person's own, and with a
    bias: people smile at an exclamation mark, whatever it is worth.

    Args:
        source: the corpus. out: new or empty folder; its `truth.csv` gets every turn's hidden reward. rating_range: as
            of `ChatFiles`.

    Returns:
        conversations, turns, and the rank-free correlation of ratings with the mean hidden reward.
    """
    require_empty_folder(out)
    conversations, _ = read_conversations(source, "cliffhanger", None, rating_range)
    means = {(c.id, user): _mean_of_the_other(c, user) for c in conversations for user in c.speakers}
    center, spread = np.mean(list(means.values())), np.std(list(means.values()))
    rng, rows, pairs = random.Random(seed), [], []
    for conversation in progress_bar(conversations, desc="planting", unit="conversation"):
        answers = {}
        for user in conversation.speakers:
            z = (means[conversation.id, user] - center) / spread
            answers[user] = {question: _answer(question, z, rng) for question in QUESTIONS}
            pairs.append((z, answers[user]["overall_affect"]))
        turns = [(turn.speaker, turn.start, turn.stop, turn.utterance) for turn in conversation.turns]
        seconds = range(int(turns[-1][2]) + 1)
        lost = {(user, s) for user in conversation.speakers for s in seconds if rng.random() < LOST_FRAMES}
        write_conversation(out / conversation.id, turns, _faces(conversation, rng), answers, lost)
        rows += [(conversation.id, i, user, hidden_reward(text)) for i, (user, _, _, text) in enumerate(turns)]
    table = pd.DataFrame(rows, columns=["conversation_id", "turn_id", "speaker", "reward"])
    with atomic_path(out / "truth.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.3f", lineterminator="\n")
    correlation = float(np.corrcoef(np.array(pairs).T)[0, 1])
    return {"conversations": len(conversations), "turns": len(rows), "correlation": correlation}


def _mean_of_the_other(conversation: Conversation, user: str) -> float:
    return float(np.mean([hidden_reward(turn.utterance) for turn in conversation.turns if turn.speaker != user]))


def _answer(question: str, z: float, rng: random.Random) -> int:
    """An answer whose middle is that of the question's range, and of which z counts a sixth of the range."""
    low, high = QUESTIONS[question].limits
    middle, unit = (low + high) / 2, (high - low) / 6
    return round(min(high, max(low, middle + unit * (z + rng.gauss(0, RATING_NOISE)))))


def _faces(conversation: Conversation, rng: random.Random) -> list[tuple[str, float, float, str]]:
    """(listener, start, stop, face) of the turns at which the listener smiles or frowns."""
    habits = {user: rng.uniform(0.6, 1.4) for user in conversation.speakers}
    faces = []
    for turn in conversation.turns:
        first, second = conversation.speakers
        listener = second if turn.speaker == first else first
        reward, shown = hidden_reward(turn.utterance), rng.random()
        smile = SMILE + SMILE_BY_REWARD * max(reward, 0) + SMILE_AT_EXCLAMATION * ("!" in turn.utterance)
        if shown < smile * habits[listener]:
            faces.append((listener, turn.start, turn.stop, "happiness"))
        elif shown > 1 - FROWN - FROWN_BY_REWARD * max(-reward, 0):
            faces.append((listener, turn.start, turn.stop, rng.choice(("anger", "sadness", "contempt"))))
    return faces


def main(options) -> None:
    """Plants it, and says how closely ratings follow it."""
    found = plant(options.data_dir, options.out, options.seed, options.rating_range)
    print(
        f"Wrote {found['conversations']:,} conversations with {found['turns']:,} turns to {options.out}, and the "
        f"hidden rewards to {options.out / 'truth.csv'}; ratings correlate {found['correlation']:.2f} with them"
    )


if __name__ == "__main__":
    run(partial(main, OPTIONS))
