"""Turn rewards learned from one score per conversation, against what people say about the single turns.

    python experiments/credit.py OUT --dstc9 chats.jsonl --encoder MINILM [--casino FOLDER] [--contexts 0 1]

Trains heads with every decomposition and LI signal on the conversations without labels of turns, and compares their
rewards of the labelled turns with the labels, beside baselines and a ceiling. Labels are read by measurement alone.
Run it again to continue where it stopped; what is finished there is not run again. docs/results.md says what was found.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

from geli.run.errors import run
from geli.run.options import new_parser, positive_int, seed


def parse_options(argv: Sequence[str] | None = None):
    """The options on the command line."""
    parser = new_parser("Compare turn rewards learned from one score with people's labels of single turns.")
    parser.add_argument("out", type=Path, help="folder of everything; what is finished there is not run again")
    parser.add_argument("--dstc9", type=Path, help="chats.jsonl: some with ratings of turns (default: none)")
    parser.add_argument("--casino", type=Path, help="folder with CaSiNo's JSON, annotated by strategy (default: none)")
    parser.add_argument(
        "--encoder", nargs="+", required=True, help="folders of encoders; tables have the folders' names"
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[0, 1], help="turns before a response that are read")
    parser.add_argument("--seeds", type=seed, nargs="+", default=[0, 1, 2], help="seeds of training")
    parser.add_argument("--epochs", type=positive_int, default=4, help="passes over the training conversations")
    parser.add_argument("--repetitions", type=positive_int, default=400, help="bootstrap resamples")
    options = parser.parse_args(argv)
    if not options.dstc9 and not options.casino:
        parser.error("give --dstc9, --casino or both")
    if len({Path(folder).name for folder in options.encoder}) < len(options.encoder):
        parser.error("--encoder: folders need different names, which files have")
    return options


# Parsed before the imports below, which take seconds, so that --help and mistakes in options are answered at once.
OPTIONS = parse_options() if __name__ == "__main__" else None

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold

from data_utils import li_targets, reactions_of_sentiments
from experiments import plots
from experiments.credit_data import Chat, MeanEncoder, embed, inputs, read_casino, read_dstc9
from geli.data.hindsight import hindsight
from geli.nets.batching import shuffled_batches
from geli.nets.encoder import load_encoder
from geli.nets.sentiment import lexicon_sentiment
from geli.report.metrics import Metric, spearman
from geli.run.console import progress_bar
from geli.run.files import atomic_path
from geli.run.gradients import decaying_adamw
from geli.statistics import resample
from models import DECOMPOSITIONS, RewardHead, RewardHeadConfig, geli_loss, li_loss, predicted_return, sample_turns
from tools.seeds import interval_over_seeds
from tools.turn_labels import label_metrics, partial_within

LENGTH, SUBSET, BATCH, LEARNING_RATE = 160, 160, 16, 1e-3  # L and K in turns, chats a step
RIDGE = 10.0 ** np.arange(-2, 5)  # penalties, of which the error of left-out rows chooses
SIGNALS = ("sentiment", "hindsight")
# name -> (decomposition or None, LI signal or None)
TRAINED = {f"GE:{kind}": (kind, None) for kind in ("RRD", "IRCR", "RUDDER")}
TRAINED |= {"GE:hindsight shares": ("LLM", None)}
TRAINED |= {f"LI:{signal}": (None, signal) for signal in SIGNALS}
TRAINED |= {f"GELI:{kind}×{signal}": (kind, signal) for kind in ("RRD", "IRCR", "RUDDER") for signal in SIGNALS}
COLUMNS = {
    "label_correlation": "over all", "label_within": "within", "label_given_place": "within, given place",
    "label_auc": "AUC",
    "return": "ρ return", "next_turn": "next turn, held out",
}  # fmt: skip


class Turns(NamedTuple):
    """The agent's turns of some chats, one chat after the other.

    Attributes:
        chats: n. of: (N,) the chat of each turn. features: (N, hidden).
        signals: LI signal -> (N,) targets in [0, 1], NaN where the user said nothing after the turn.
        shares: (N,) T times each turn's share of the score by hindsight, in points.
        witness: (N,) what the user's next turn says about the score, in points; NaN without one.
    """

    chats: list[Chat]
    of: np.ndarray
    features: torch.Tensor
    signals: dict[str, torch.Tensor]
    shares: torch.Tensor
    witness: np.ndarray


# ---------------------------------------------------------------------------------------------------------------------
# Hindsight


def mean_of(values: np.ndarray, of: np.ndarray, n: int) -> np.ndarray:
    """(n, …) means of values (N, …) by what they belong to, (N,) of n."""
    sums = np.zeros((n, *values.shape[1:]))
    np.add.at(sums, of, values)
    return sums / np.maximum(np.bincount(of, minlength=n), 1).reshape(-1, *[1] * (values.ndim - 1))


def shared_out(witness: np.ndarray, of: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(N,) T times each turn's share of the score, in points: the score plus what the witness says about this turn less
    its mean over the chat; turns without a witness get the even share. Shares sum to the score."""
    said = ~np.isnan(witness)
    less = np.where(said, witness, 0.0)
    means = mean_of(less[said], of[said], len(scores))
    return scores[of] + np.where(said, less - means[of], 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def prepare(out: Path, corpus: str, chats: list[Chat], parts: np.ndarray, encoder: str, context: int) -> Turns:
    """Embeds the turns, or reads their embeddings from a file, and finds what learning and measuring need.

    Args:
        parts: (n,) 0 training, 1 validation, 2 labelled.
    """
    path = out / "features" / f"{corpus}-{Path(encoder).name}-{context}.npz"
    of = np.repeat(np.arange(len(chats)), [len(chat.agent_turns) for chat in chats])
    if not path.is_file():
        loaded = load_encoder(encoder)
        loaded = MeanEncoder(loaded.model, loaded.tokenizer, name=encoder)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_arrays(path, embed(loaded, [pair for chat in chats for pair in inputs(chat, context)], out / "cache"))
    features = np.load(path)["arr_0"].astype(np.float32)
    scores = np.array([chat.score for chat in chats])
    heard = [(chat.conversation, chat.score, [chat.answer(i) for i in chat.agent_turns]) for chat in chats]
    witness, ranks = hindsight(heard, [one for one, part in zip(heard, parts, strict=True) if part == 0])
    pleased = li_targets(reactions_of_sentiments(lexicon_sentiment([text for *_, said in heard for text in said])))
    signals = {"sentiment": np.where(np.isnan(witness), np.nan, pleased), "hindsight": ranks}
    scaled = torch.from_numpy(features * np.float32(np.sqrt(features.shape[1])))  # entries of about 1
    shares = torch.from_numpy(shared_out(witness, of, scores).astype(np.float32))
    signals = {name: torch.from_numpy(found.astype(np.float32)) for name, found in signals.items()}
    return Turns(chats, of, scaled, signals, shares, witness)


def save_arrays(path: Path, *arrays: np.ndarray) -> None:
    """Writes arrays to an .npz file, atomically."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, *(array.astype(np.float16) for array in arrays))


def split(chats: list[Chat]) -> np.ndarray:
    """(n,) the part of each chat: 2 for all chats of a labelled conversation, 1 for a tenth of the others, 0 else."""
    labelled = {chat.conversation for chat in chats if chat.labels}
    others = sorted({chat.conversation for chat in chats} - labelled)
    drawn = np.random.default_rng(0).permutation(len(others))[: max(1, len(others) // 10)]
    held_out = {others[i] for i in drawn}
    return np.array([2 if c.conversation in labelled else int(c.conversation in held_out) for c in chats])


# ---------------------------------------------------------------------------------------------------------------------
# Training


def chat_losses(head: RewardHead, turns: Turns, chosen: Sequence[np.ndarray], kind, signal, scales) -> torch.Tensor:
    """() The mean loss of a head on some turns (k,) of each of a few chats: GE's, LI's, or half of each."""
    losses = []
    for part, found in zip(chosen, outputs_of(head, turns, chosen), strict=True):
        ge = li = 0.0
        if kind:
            shares = [turns.shares[part]] if DECOMPOSITIONS[kind].uses_shares else []
            ge = DECOMPOSITIONS[kind].loss(found, turns.chats[turns.of[part[0]]].score, LENGTH, *shares)
        if signal:
            targets = turns.signals[signal][part]
            known = ~targets.isnan()
            li = li_loss(head.rewards(found, len(part))[known], targets[known]) if known.any() else 0.0
        losses.append(geli_loss(ge, li, 0.5 if kind and signal else float(bool(kind)), *scales))
    return sum(losses) / len(losses)


def outputs_of(head: RewardHead, turns: Turns, chosen: Sequence[np.ndarray]) -> Sequence[torch.Tensor]:
    """The head's outputs for some turns (k,) of each of a few chats; of a sequential head one more than turns."""
    features = [turns.features[part] for part in chosen]
    if not head.sequential:
        return head(torch.cat(features)).squeeze(-1).split([len(part) for part in chosen])
    padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)  # behind, where no prediction looks
    return [row[: len(part) + 1] for row, part in zip(head(padded).squeeze(-1), chosen, strict=True)]


def train(turns: Turns, parts: np.ndarray, kind: str | None, signal: str | None, number: int, epochs: int):
    """(N,) rewards of all turns by a head trained on the training chats; of its epochs the one with the lowest error of
    validation returns (of LI alone: LI loss) is taken."""
    torch.manual_seed(number)
    rng, row = np.random.default_rng(number), DECOMPOSITIONS.get(kind)
    head_name = (row and row.head) or "small_model_shrink"
    head = RewardHead(
        RewardHeadConfig(head_name, turns.features.shape[1], None, False, 512, 1, 2, None, kind, bool(signal))
    )
    places = np.split(np.arange(len(turns.of)), np.flatnonzero(np.diff(turns.of)) + 1)
    scores = np.array([chat.score for chat in turns.chats])
    training, validation = np.flatnonzero(parts == 0), [places[i] for i in np.flatnonzero(parts == 1)]
    if row and row.head:
        head.init_constant(float(scores[training].mean()))
    scales = loss_scales(turns, training, row, signal)
    lengths = np.array([len(places[i]) for i in training])
    steps = epochs * len(shuffled_batches(lengths, BATCH, np.random.default_rng(0)))
    optimizer, schedule = decaying_adamw([{"params": list(head.parameters()), "lr": LEARNING_RATE}], steps)
    best, kept = np.inf, {}
    for _ in range(epochs):
        head.train()
        for batch in shuffled_batches(lengths, BATCH, rng):
            chosen = [places[i] for i in training[batch]]
            if row and row.uses_subset:
                chosen = [part[sample_turns(len(part), SUBSET, rng)] for part in chosen]
            loss = chat_losses(head, turns, chosen, kind, signal, scales)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        rewards = rewards_of(head, turns, validation)
        if kind:
            returns = np.array([float(predicted_return(found, LENGTH)) for found in rewards])
            error = float(np.mean((returns - scores[parts == 1]) ** 2))
        else:
            error = float((torch.cat(rewards) - turns.signals[signal][np.concatenate(validation)]).square().nanmean())
        if error < best:
            best, kept = error, {name: value.clone() for name, value in head.state_dict().items()}
    head.load_state_dict(kept)
    return torch.cat(rewards_of(head, turns, places)).numpy()


def loss_scales(turns: Turns, training: np.ndarray, row, signal: str | None) -> tuple[float, float]:
    """The variances of GE's and of LI's targets over the training chats, by which the losses are divided."""
    learned, ge, li = np.isin(turns.of, training), 1.0, 1.0
    if row:
        scores = np.array([chat.score for chat in turns.chats])[training]
        ge = float(np.var(row.target(turns.shares[learned].numpy() if row.uses_shares else scores, LENGTH)))
    if signal:
        li = float(np.nanvar(turns.signals[signal][learned].numpy()))
    return ge or 1.0, li or 1.0


def rewards_of(head: RewardHead, turns: Turns, places: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """The rewards of the turns (k,) of each of some chats, in eval mode."""
    head.eval()
    with torch.inference_mode():
        order, found = np.argsort([len(part) for part in places]), [torch.zeros(0)] * len(places)
        for first in range(0, len(order), 64):
            batch = order[first : first + 64]
            outputs = outputs_of(head, turns, [places[i] for i in batch])
            for i, output in zip(batch, outputs, strict=True):
                found[i] = head.rewards(output, len(places[i]))
        return found


# ---------------------------------------------------------------------------------------------------------------------
# Without training of heads: ridges, baselines and the ceiling


def ridges(turns: Turns, parts: np.ndarray) -> dict[str, np.ndarray]:
    """Rewards by ridge regression: of the scores on mean features; and of the next user turn's witness on features,
    both less their means over the chat, which is hindsight distilled to a function of context and response."""
    features, n = turns.features.numpy(), len(turns.chats)
    scores = np.array([chat.score for chat in turns.chats])
    means = mean_of(features, turns.of, n)
    used = (parts[turns.of] == 0) & ~np.isnan(turns.witness)
    of = turns.of[used]
    centred = features[used] - mean_of(features[used], of, n)[of]
    left = turns.witness[used] - mean_of(turns.witness[used], of, n)[of]
    return {
        "ridge on the score": RidgeCV(RIDGE).fit(means[parts == 0], scores[parts == 0]).predict(features),
        "ridge on hindsight": RidgeCV(RIDGE).fit(centred, left).predict(features),
    }


def ceiling(turns: Turns, labelled: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N,) what a ridge on the same features, fitted to people's labels, predicts of other conversations' turns."""
    features, found = turns.features.numpy()[labelled], np.full(len(turns.of), np.nan)
    groups = np.array([chat.conversation for chat in turns.chats])[turns.of[labelled]]
    for rest, part in GroupKFold(min(10, len(set(groups)))).split(features, groups=groups):
        found[labelled[part]] = RidgeCV(RIDGE).fit(features[rest], labels[rest]).predict(features[part])
    return found


def baselines(turns: Turns) -> dict[str, np.ndarray]:
    """What needs no learning, and the user's next turn, which rewards may not see."""
    own = [chat.turns[i][1] for chat in turns.chats for i in chat.agent_turns]
    said = [chat.answer(i) for chat in turns.chats for i in chat.agent_turns]
    witness = np.where(np.isnan(turns.witness), np.nanmean(turns.witness), turns.witness)
    return {
        "the turn's place": turn_places(turns).astype(float),
        "its words": np.array([len(text.split()) for text in own], dtype=float),
        "a question mark": np.array(["?" in text for text in own], dtype=float),
        "even shares of the score": np.array([chat.score for chat in turns.chats])[turns.of],
        "next user turn: words": np.array([len(text.split()) for text in said], dtype=float),
        "next user turn: a question mark": np.array(["?" in text for text in said], dtype=float),
        "next user turn: sentiment": lexicon_sentiment(said),
        "next user turn: hindsight": witness,
    }


def turn_places(turns: Turns) -> np.ndarray:
    """(N,) the place of each turn among the agent's in its chat, from 0."""
    return np.concatenate([np.arange(len(chat.agent_turns)) for chat in turns.chats])


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(turns: Turns, parts: np.ndarray, seeds: list[np.ndarray], repetitions: int, validated: bool) -> dict:
    """Name -> estimate of the measures of a reward, over seeds and conversations.

    Args:
        seeds: (N,) rewards by each seed. validated: measure also against the next user turn of validation chats.
    """
    names = np.array([chat.conversation for chat in turns.chats])
    labels, places = labels_of(turns), turn_places(turns)
    scores = np.array([chat.score for chat in turns.chats])
    labelled, tested = ~np.isnan(labels), parts == 2
    heard = (parts[turns.of] == 1) & ~np.isnan(turns.witness)
    found: dict[str, list[Metric]] = {}
    for rewards in seeds:
        rewards = np.asarray(rewards, dtype=np.float64)
        returns = mean_of(rewards, turns.of, len(scores))
        of = _numbered(names[turns.of[labelled]])
        metrics = label_metrics(rewards[labelled], labels[labelled], places[labelled], of)
        metrics["return"] = spearman(returns[tested], scores[tested], _numbered(names[tested]))
        if validated:
            of = _numbered(names[turns.of[heard]])
            metrics["next_turn"] = partial_within(rewards[heard], turns.witness[heard], places[heard], of)
        for name, metric in metrics.items():
            found.setdefault(name, []).append(metric)
    counts = {"next_turn": len(set(names[turns.of[heard]]))}
    return {
        name: _estimate(metrics, counts.get(name, len(set(names[tested]))), repetitions)
        for name, metrics in found.items()
    }


def labels_of(turns: Turns) -> np.ndarray:
    """(N,) people's labels, NaN where there is none."""
    return np.array([chat.labels.get(i, np.nan) for chat in turns.chats for i in chat.agent_turns])


def _numbered(names: np.ndarray) -> np.ndarray:
    return np.unique(names, return_inverse=True)[1]


def _estimate(metrics: list[Metric], conversations: int, repetitions: int):
    """The mean over seeds of a metric, with its interval over seeds and conversations."""
    everything, weights = np.ones((1, conversations)), resample(conversations, repetitions)
    values = [metric(everything)[0] for metric in metrics]
    return interval_over_seeds(values, np.mean([metric(weights) for metric in metrics], axis=0), conversations)


def agreement(chats: Sequence[Chat]) -> str:
    """How far two raters of a conversation agree, and so how far any return can correlate with the score."""
    rated = [chat.ratings for chat in chats if len(chat.ratings) > 1]
    pairs = np.array([(r[i], r[j]) for r in rated for i in range(len(r)) for j in range(len(r)) if i != j])
    one, raters = max(np.corrcoef(pairs.T)[0, 1], 0.0), np.mean([len(ratings) for ratings in rated])
    several = raters * one / (1 + (raters - 1) * one)  # Spearman and Brown
    return (
        f"Two raters of a conversation correlate {one:.3f}, so the mean of {raters:.1f} has a reliability of "
        f"{several:.2f}, and no return can be expected to correlate with it above {np.sqrt(several):.2f}."
    )


# ---------------------------------------------------------------------------------------------------------------------


def rows_of(options, corpus: str, chats: list[Chat], encoder: str, context: int) -> list[dict]:
    """The rows of a corpus, an encoder and a context; trains what is not finished."""
    parts, label = split(chats), Path(encoder).name
    turns = prepare(options.out, corpus, chats, parts, encoder, context)
    rewards: dict[str, list[np.ndarray]] = {}
    for name, (kind, signal) in progress_bar(TRAINED.items(), desc=f"{corpus}, {label}, {context}", unit="setting"):
        for number in options.seeds:
            path = options.out / "rewards" / f"{corpus}-{label}-{context}-{name.replace(':', '-')}-{number}.npy"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                found = train(turns, parts, kind, signal, number, options.epochs)
                with atomic_path(path) as temporary, open(temporary, "wb") as file:
                    np.save(file, found)
            rewards.setdefault(name, []).append(np.load(path))
    rewards |= {f"{name}, averaged": [np.mean(found, axis=0)] for name, found in rewards.items() if len(found) > 1}
    rewards |= {name: [found] for name, found in ridges(turns, parts).items()}
    labels = labels_of(turns)
    labelled = np.flatnonzero(~np.isnan(labels))
    others = {"ceiling: a ridge on people's labels": ceiling(turns, labelled, labels[labelled])}
    others |= baselines(turns) if (encoder, context) == (options.encoder[0], options.contexts[0]) else {}
    read = f"{label}, context {context}"
    rows = [
        {"corpus": corpus, "reward": name, "reads": read if name in rewards or "ceiling" in name else ""}
        | measure(turns, parts, seeds, options.repetitions, name in rewards)
        for name, seeds in (rewards | {name: [found] for name, found in others.items()}).items()
    ]
    return rows


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown."""
    lines = [table.columns, ["---"] * len(table.columns), *table.to_numpy()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(options) -> None:
    """Trains what is not finished, and writes the table and the picture."""
    corpora = {"DSTC9": (read_dstc9, options.dstc9), "CaSiNo": (read_casino, options.casino)}
    rows, lines = [], []
    for corpus, (read, source) in corpora.items():
        if source is None:
            continue
        chats = read(source)
        parts = split(chats)
        labels = sum(len(chat.labels) for chat in chats)
        lines.append(
            f"{corpus}: {np.sum(parts == 0):,} training and {np.sum(parts == 1):,} validation chats; {labels:,} "
            f"labelled turns in {len({c.conversation for c in chats if c.labels}):,} held-out conversations."
        )
        if any(len(chat.ratings) > 1 for chat in chats):
            lines.append(agreement(chats))
        settings = [(encoder, context) for encoder in options.encoder for context in options.contexts]
        found = [row for setting in settings for row in rows_of(options, corpus, chats, *setting)]
        trained = [row for row in found if row.get("next_turn")]
        chosen = max(trained, key=lambda row: row["next_turn"].value)
        lines.append(
            f"{corpus}, chosen without the labels (the largest {COLUMNS['next_turn']}): {chosen['reward']}, "
            f"{chosen['reads']}: {chosen['label_given_place']} within, given place."
        )
        rows += found
    table = pd.DataFrame(
        [
            {"corpus": row["corpus"], "reward": row["reward"], "reads": row["reads"]}
            | {title: str(row[name]) if name in row else "" for name, title in COLUMNS.items()}
            for row in rows
        ]
    )
    text = "\n\n".join([*lines, markdown(table)])
    for name, content in (("credit.md", text + "\n"), ("credit.csv", table.to_csv(index=False))):
        with atomic_path(options.out / name) as temporary:
            Path(temporary).write_text(content, encoding="utf-8")
    pictures = plots.credit(rows, options.out / "credit.png")
    print(text)
    print("\n".join(["Written:", *(f"  {path}" for path in (options.out / "credit.md", *pictures))]))


if __name__ == "__main__":
    run(partial(main, OPTIONS))
