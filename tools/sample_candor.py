"""Writes made-up conversations in CANDOR's layout, with a known hidden reward for every turn, to try everything on.

    python tools/sample_candor.py OUT [--conversations 200] [--turns 24] [--seed 0] [--tiny [FOLDER]]

Every turn is a speech act with a worth (a warm word is worth something, a brag costs something, a question is worth
more when it stays on the topic). A person's score of the other follows the sum of the other's worths, with noise. The
listener's face follows the worth too, but noisily and with a bias: people smile at jokes more than they are worth, stay
serious when comforted, smile politely at brags, and hardly ever frown. So the score alone and the face alone each know
something that the other does not. `OUT/truth.csv` holds the worths; no training script reads it.

`--tiny` also trains a small BART and a small Llama, with their tokenizers, on the training conversations.
"""

import random
import subprocess
import sys
import uuid
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

import pandas as pd

from geli.data.questions import QUESTIONS
from geli.run.console import progress_bar
from geli.run.errors import UserError, run
from geli.run.files import atomic_path, require_empty_folder
from geli.run.options import fraction, new_parser, positive_int, seed
from tools.writer import write_conversation

WORDS_PER_SECOND, PAUSE = 2.5, 0.5


class Act(NamedTuple):
    """A kind of turn: its worth in [-1, 1], the chances that the listener smiles or frowns, and its wordings."""

    worth: float
    smile: float
    frown: float
    wordings: tuple[str, ...]


TOPICS = {
    "gardening": ("tomatoes", "roses", "the soil"),
    "cooking": ("pasta", "fresh bread", "spicy soup"),
    "hiking": ("the mountain trail", "my old boots", "the lake"),
    "music": ("the piano", "my guitar", "old records"),
    "painting": ("water colors", "portraits", "my canvas"),
    "football": ("the final match", "my team", "the stadium"),
    "movies": ("that thriller", "the old comedy", "the new director"),
    "travel": ("the night train", "Lisbon", "the island"),
    "teaching": ("my students", "the first lesson", "the exams"),
    "dogs": ("my puppy", "the shelter", "long walks"),
}
ACTS = {
    "comfort": Act(0.9, 0.25, 0.10, (
        "I am so sorry, {thing} must have been really hard for you",
        "that sounds tough, it makes sense that {topic} wore you out",
        "take your time, I am here and I want to hear about {thing}",
    )),
    "compliment": Act(0.7, 0.60, 0.01, (
        "you are wonderful at {topic}, I admire how you talk about it",
        "what a thoughtful way to see {thing}, you are so good at this",
        "I really like how much you care about {topic}, it is lovely",
    )),
    "joke": Act(0.25, 0.90, 0.02, (
        "my neighbour tried {topic} once and even {thing} ran away from him",
        "I asked {thing} for advice about life and it had better answers than me",
        "they say {topic} is cheaper than therapy but nobody told my wallet",
    )),
    "question": Act(0.5, 0.30, 0.02, (
        "what do you enjoy the most about {topic} these days?",
        "how did you first discover {thing}, was it by chance?",
        "could you tell me a little more about {thing} please?",
    )),
    "sharing": Act(0.2, 0.25, 0.03, (
        "I spent last weekend with {thing} and it was quite nice",
        "my sister and I talk about {topic} nearly every week",
        "I grew up around {topic} so {thing} reminds me of home",
    )),
    "fact": Act(0.0, 0.15, 0.04, (
        "I read that {topic} has changed a lot in the last ten years",
        "the article said that {thing} is more common than people think",
        "there is a place near the station where they do {topic}",
    )),
    "filler": Act(0.0, 0.20, 0.02, ("yeah I see", "right okay", "hmm sure", "oh well")),
    "brag": Act(-0.5, 0.35, 0.05, (
        "honestly I am far better at {topic} than anybody I know",
        "people always tell me that I was born for {thing}",
        "I was the best at {topic} in my whole city last year",
    )),
    "complaint": Act(-0.4, 0.10, 0.15, (
        "everything about {topic} is broken now and nobody ever listens to me",
        "I am tired of {thing}, it is always the same boring mess",
        "these days {topic} only costs money and gives me a headache",
    )),
    "dismissal": Act(-0.9, 0.12, 0.15, (
        "I do not care about {topic} at all, can we move on",
        "that is a silly way to think about {thing} if you ask me",
        "whatever, {thing} is a waste of time and so is this talk",
    )),
}  # fmt: skip
OFF_TOPIC = -0.35  # what a turn that leaves the topic of the turn before it loses
REPLIES = {  # how a listener may begin the next turn: (least worth, wordings)
    "glad": (0.45, ("thank you, that is kind.", "that means a lot to me.", "oh I love that.")),
    "amused": (0.2, ("haha that is great.", "ha, good one.")),
    "flat": (-0.3, ("okay.", "I see.", "alright then.")),
    "hurt": (-2.0, ("oh, that is a bit rude.", "well, that hurts.", "hm, I did not like that.")),
}
KIND = ("comfort", "compliment", "joke", "question", "sharing")
SELFISH = ("brag", "complaint", "dismissal")


def converse(
    rng: random.Random, users: tuple[str, str], n_turns: int, noise: random.Random | None = None, share: float = 0.0
):
    """One conversation: turns [(user, start, stop, text)], faces [(listener, start, stop, face)], and each turn's
    (act, worth).

    Args:
        noise: random numbers of their own, so that words and scores stay the same. share: of turns at which the
            listener's face follows another act than the one that was said.
    """
    manners = {user: _manner(rng) for user in users}
    smiles = {user: rng.uniform(0.7, 1.3) for user in users}
    turns, faces, truth = [], [], []
    topic, clock, speaker = rng.choice(sorted(TOPICS)), 0.0, users[0]
    for i in range(n_turns):
        act_name = rng.choices(list(ACTS), manners[speaker])[0]
        act, said_topic = ACTS[act_name], topic
        if rng.random() < 0.15:
            said_topic = rng.choice(sorted(TOPICS))
        text = rng.choice(act.wordings).format(topic=said_topic, thing=rng.choice(TOPICS[said_topic]))
        worth = act.worth
        if act_name != "filler" and i and said_topic != topic:
            worth = max(-1.0, worth + OFF_TOPIC)
        if act_name != "filler":
            topic = said_topic
        if turns and truth and turns[-1][0] != speaker and rng.random() < 0.4:
            text = f"{_reply(rng, truth[-1][1])} {text}"
        stop = clock + len(text.split()) / WORDS_PER_SECOND
        listener = users[1] if speaker == users[0] else users[0]
        face = _face(rng, act, smiles[listener])
        if share and noise.random() < share:
            face = _face(noise, ACTS[noise.choice(list(ACTS))], smiles[listener])
        if face:
            faces.append((listener, clock, stop, face))
        turns.append((speaker, clock, stop, text))
        truth.append((act_name, worth))
        clock = stop + PAUSE
        if rng.random() > 0.05:  # now and then somebody speaks twice
            speaker = listener
    return turns, faces, truth


def _manner(rng: random.Random) -> list[float]:
    """Weights over `ACTS`: from warm to selfish people, each with habits of their own."""
    warmth = rng.random()
    scale = {name: warmth if name in KIND else 1 - warmth if name in SELFISH else 0.35 for name in ACTS}
    return [scale[name] * rng.gammavariate(1.0, 1.0) + 0.01 for name in ACTS]


def _face(rng: random.Random, act: Act, smiles: float) -> str | None:
    """How a listener who smiles `smiles` times as often as others looks at an act; None: neutral."""
    shown = rng.random()
    if shown < act.smile * smiles:
        return "happiness"
    return rng.choice(("anger", "sadness", "contempt")) if shown > 1 - act.frown else None


def _reply(rng: random.Random, worth: float) -> str:
    mood = next(name for name, (least, _) in REPLIES.items() if worth >= least)
    return rng.choice(REPLIES[mood][1])


def answers_of(rng: random.Random, mean_worth: float) -> dict[str, float]:
    """A rater's answers to every question: they follow the mean worth of the other's turns, with noise."""
    answers = {}
    for name, question in QUESTIONS.items():
        low, high = question.scale
        value = 5.5 + 4.0 * mean_worth + rng.gauss(0, 1.5)  # on a scale from 1 to 9
        answers[name] = min(high, max(low, round(value * (high // 9 or high / 9))))
    return answers


def write_corpus(out: Path, conversations: int, n_turns: int, seed: int, face_noise: float = 0.0) -> None:
    """Writes `conversations` folders below `out`, and `out/truth.csv`."""
    rng, noise = random.Random(seed), random.Random(f"faces {seed}")
    rows = []
    for _ in progress_bar(range(conversations), desc="sample conversations", unit="conversation"):
        conversation_id = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        users = (f"{rng.getrandbits(96):024x}", f"{rng.getrandbits(96):024x}")
        turns, faces, truth = converse(rng, users, round(n_turns * rng.uniform(0.8, 1.2)), noise, face_noise)
        answers = {}
        for user in users:
            other = [worth for (speaker, *_), (_, worth) in zip(turns, truth, strict=True) if speaker != user]
            answers[user] = answers_of(rng, sum(other) / max(len(other), 1))
        seconds = range(int(turns[-1][2]) + 1)
        lost = {(user, second) for user in users for second in seconds if rng.random() < 0.05}
        write_conversation(out / conversation_id, turns, faces, answers, lost)
        rows += [(conversation_id, i, turns[i][0], *truth[i]) for i in range(len(turns))]
    table = pd.DataFrame(rows, columns=["conversation_id", "turn_id", "speaker", "act", "reward"])
    with atomic_path(out / "truth.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.3f", lineterminator="\n")


def main() -> None:
    """Command line."""
    parser = new_parser("Write made-up conversations in CANDOR's layout, with a known hidden reward for every turn.")
    parser.add_argument("out", help="folder to write one folder a conversation to (becomes --data_dir)")
    parser.add_argument("--conversations", type=positive_int, default=200, help="how many conversations")
    parser.add_argument("--turns", type=positive_int, default=24, help="turns of a conversation, give or take 20%%")
    parser.add_argument(
        "--face_noise", type=fraction, default=0.0, help="share of turns at which the face says nothing of the turn"
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed: the same corpus every time")
    parser.add_argument(
        "--tiny",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="also train a small BART and a small Llama into FOLDER (OUT_models if none is named)",
    )
    args = parser.parse_args()
    out, models = Path(args.out), Path(args.tiny or f"{args.out}_models")
    if args.turns < 10:
        raise UserError(f"--turns {args.turns}: at least 10 are needed for both people to speak")
    if args.tiny is not None and (out / "truth.csv").is_file():  # written last
        print(f"{out} has a sample corpus already, which is not written again", flush=True)
    else:
        require_empty_folder(out)
        write_corpus(out, args.conversations, args.turns, args.seed, args.face_noise)
        print(f"Wrote {args.conversations:,} conversations to {out}, and the hidden rewards to {out / 'truth.csv'}")
    missing = [name for name in ("bart", "llama") if not (models / name).is_dir()]
    if args.tiny is not None and missing:
        print(f"Training {' and '.join(missing)} on it, small ones, into {models}: a few minutes …", flush=True)
        command = [sys.executable, Path(__file__).with_name("tiny_models.py"), out, models, "--seed", str(args.seed)]
        sys.exit(subprocess.run(command + ["--only", *missing] * (len(missing) == 1), check=False).returncode)


if __name__ == "__main__":
    run(main)
