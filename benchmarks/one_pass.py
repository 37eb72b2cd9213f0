"""Features of turns from a causal language model, in one pass a conversation, beside those of a sentence encoder.

    python benchmarks/one_pass.py --data_dir CORPUS --encoder MINILM --language_model SMOLLM2 [--conversations 400]

CORPUS is one of `tools/plant_truth.py`, whose turns have a hidden reward. A sentence encoder reads every turn with its
context anew: a conversation of T turns costs O(T x context). A causal model reads a conversation once, and its state at
the end of a turn is that turn's feature: O(T). For each, a ridge regression of the scores on the mean features of 90%
of the conversations gives turn rewards for the others. Prints CPU seconds a conversation and the rank correlation of
these rewards with the hidden ones, with an interval over conversations.
"""

import argparse
import sys
import time
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeCV
from transformers import AutoModel, AutoTokenizer

from data_utils import Conversation, Trajectory, TurnSet, read_corpus
from geli.nets.encoder import load_encoder
from geli.run.console import format_table, progress_bar
from tools.hidden_reward import hidden_reward

PENALTIES = 10.0 ** np.arange(-2, 7)


def one_pass_features(folder: str, trajectories: list[Trajectory]) -> list[np.ndarray]:
    """(T, hidden) states of a causal model at the ends of each trajectory's agent turns."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    states: dict[str, np.ndarray] = {}

    @torch.no_grad()
    def read(conversation: Conversation) -> np.ndarray:
        """(turns, hidden) states at the ends of all turns."""
        names = dict(zip(conversation.speakers, "AB", strict=True))
        turns = [f"{names[turn.speaker]}: {turn.utterance}\n" for turn in conversation.turns]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in turns]
        hidden = model(input_ids=torch.tensor([list(chain(*ids))])).last_hidden_state[0]
        return hidden[np.cumsum([len(turn) for turn in ids]) - 1].numpy()

    for trajectory in progress_bar(trajectories, desc="one pass", unit="trajectory"):
        name = trajectory.conversation.id
        if name not in states:
            states[name] = read(trajectory.conversation)
    return [states[t.conversation.id][list(t.agent_turns)] for t in trajectories]


def turn_features(folder: str, trajectories: list[Trajectory], context: int) -> list[np.ndarray]:
    """(T, hidden) features of each trajectory's agent turns by a sentence encoder, `context` turns before each."""
    encoder, turns = load_encoder(folder), TurnSet.from_trajectories(trajectories, context)
    features = encoder.encode(encoder.tokenize(turns.texts), progress=f"context {context}").numpy()
    return np.split(features, turns.offsets[1:-1])


def rank_correlation(features: list[np.ndarray], trajectories: list[Trajectory]) -> tuple[float, float, float]:
    """Of held-out turns' rewards with the hidden ones, and its 95% interval over conversations."""
    names = sorted({t.conversation.id for t in trajectories})
    held_out = set(np.random.default_rng(0).permutation(names)[: len(names) // 10])
    training = [i for i, t in enumerate(trajectories) if t.conversation.id not in held_out]
    means = np.stack([features[i].mean(axis=0) for i in training])
    centre, spread = means.mean(axis=0), 1e-3 + np.concatenate([features[i] for i in training]).std(axis=0)
    model = RidgeCV(PENALTIES).fit((means - centre) / spread, [trajectories[i].score for i in training])
    found = {name: [] for name in sorted(held_out)}
    for t, rows in zip(trajectories, features, strict=True):
        if t.conversation.id in held_out:
            hidden = [hidden_reward(t.conversation.turns[i].utterance) for i in t.agent_turns]
            found[t.conversation.id] += zip(model.predict((rows - centre) / spread), hidden, strict=True)

    def of(chosen) -> float:
        return float(
            spearmanr(*zip(*(pair for i in chosen for pair in found[sorted(found)[i]]), strict=True)).statistic
        )

    n = len(found)
    drawn = [of(np.random.default_rng(i).integers(0, n, n)) for i in range(400)]
    return of(range(n)), *np.quantile(drawn, [0.025, 0.975])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="corpus of tools/plant_truth.py")
    parser.add_argument("--encoder", required=True, help="folder of a sentence encoder")
    parser.add_argument("--language_model", required=True, help="folder of a causal model (geli/nets/smollm2.py)")
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[0, 2, 6], help="turns that the encoder reads before"
    )
    parser.add_argument("--conversations", type=int, default=400, help="how many")
    args = parser.parse_args()
    found = read_corpus(args.data_dir, "overall_affect").trajectories
    names = list(found)[: args.conversations]
    trajectories = [t for name in names for t in found[name] if t.agent_turns]
    ways = {f"sentence encoder, context {n}": (turn_features, args.encoder, n) for n in args.contexts}
    ways["causal model, one pass"] = (lambda folder, some, _: one_pass_features(folder, some), args.language_model, 0)
    rows = []
    for name, (features_of, folder, context) in ways.items():
        start = time.process_time()
        features = features_of(folder, trajectories, context)
        seconds = (time.process_time() - start) / len(names)
        value, low, high = rank_correlation(features, trajectories)
        measured = {"CPU seconds a conversation": seconds, "rank correlation": value, "from": low, "to": high}
        rows.append({"features": name, **measured})
        print(format_table(rows), flush=True)


if __name__ == "__main__":
    main()
