"""What stages 1 and 2 measure on the validation conversations, and the files that say so."""

from functools import partial
from pathlib import Path

import numpy as np

from cli import UserError, cache_folder
from data_utils import AFFECT_GROUPS, FACES, HAPPINESS, Corpus, TurnSet, read_corpus, split
from runs import atomic_path, format_table, record_path, versions, write_json


def length_of(ep_len: int | str, n_turns: int) -> float:
    """L of a trajectory of `n_turns` agent turns, by `--ep_len`."""
    return float(n_turns if ep_len == "actual" else ep_len)


def _sentiment(args):
    from sentiment import classifier_sentiment, lexicon_sentiment

    if not args.sentiment_model:
        return lexicon_sentiment
    return partial(classifier_sentiment, args.sentiment_model, trust_remote_code=args.trust_remote_code)


# `--li_signal` -> of the options, what gives the sentiment of the user's next turn; None where the face is read
LI_SIGNALS = {"face": lambda args: None, "sentiment": _sentiment}


def load_data(args, seen: frozenset[str] = frozenset()) -> tuple[Corpus, TurnSet, TurnSet]:
    """The corpus that the command line names, with its training and validation turns; prints what was dropped.

    Args:
        seen: conversations that an earlier stage trained on, which `--val_all` leaves out.
    """
    corpus = read_corpus(args.data_dir, args.reward_class, args.transcript, cache_folder(args))
    print(corpus.describe())
    parts = split(corpus, args.train_size, args.val_all, seen)
    sentiment = LI_SIGNALS[args.li_signal](args)
    training, validation = (
        TurnSet.of(part, args.context_turns, args.reaction_type, args.negative_affect, sentiment) for part in parts
    )
    for name, part in (("training", training), ("validation", validation)):
        conversations = len({t.conversation.id for t in part.trajectories})
        print(f"{name}: {conversations:,} conversations, {len(part.trajectories):,} trajectories, {len(part):,} turns")
        if not len(part) and (name == "training" or args.val):
            raise UserError(
                f"--data_dir {args.data_dir}: none of the {name} conversations has an answer to {args.reward_class} "
                f"({len(corpus.conversations)} conversations are usable; at least 2 are needed)"
            )
    return corpus, training, validation


def place_encoder(encoder, args, accelerator, trains: bool = False):
    """Puts an encoder on its device, with the options of the command line that say how it is run; one that `trains` is
    spread where that is asked for."""
    from sharding import spread

    encoder.tokens_per_batch = args.tokens_per_batch
    spread(encoder, accelerator) if trains else encoder.to(accelerator.device)
    if args.compile and encoder.agree:
        raise UserError("--compile does not work on an encoder that is spread: leave it out, or train whole copies")
    if args.compile:
        encoder.compile()
    return encoder


def encode_together(encoder, pairs, accelerator, encode=None, progress: str | None = None):
    """(n, hidden) features of `pairs`, of which every process encodes its share.

    Args:
        encode: pairs -> features, where that is not the encoder's own.
    """
    import torch

    from runs import gather_shares, share

    mine = share(pairs, accelerator)
    features = encode(mine) if encode else encoder.encode(mine, accelerator.autocast, progress=progress)
    if accelerator.num_processes == 1:
        return features
    rows = gather_shares(list(features.numpy()), accelerator)
    return torch.from_numpy(np.stack(rows)) if rows else features


def affect_means(rewards: np.ndarray, affects: np.ndarray, prefix: str) -> dict[str, float]:
    """Mean reward of the turns of each affect group that is present: {prefix}_{neg,pos,neut,sup}_mean."""
    masks = {name: np.isin(affects, group) for name, group in AFFECT_GROUPS.items()}
    return {f"{prefix}_{name}_mean": float(rewards[mask].mean()) for name, mask in masks.items() if mask.any()}


def predicted_returns(turns: TurnSet, rewards: np.ndarray, ep_len, redist_type: str | None, chosen=None) -> np.ndarray:
    """(n,) returns in points that rewards (N,) of n trajectories add up to.

    Args:
        turns, rewards, ep_len, chosen: as in `evaluate`. redist_type: a key of `DECOMPOSITIONS`; None: as RRD.
    """
    from models import DECOMPOSITIONS

    of = DECOMPOSITIONS[redist_type or "RRD"].predicted_return
    chosen = np.ones(len(turns), dtype=bool) if chosen is None else chosen
    parts = [turns.turns_of(i) for i in range(len(turns.trajectories))]
    return np.array([of(rewards[part][chosen[part]], length_of(ep_len, part.stop - part.start)) for part in parts])


def evaluate(
    turns: TurnSet,
    rewards: np.ndarray,
    ep_len: int | str,
    redist_type: str | None = None,
    chosen: np.ndarray | None = None,
) -> dict:
    """Measures predicted rewards against the scores and against the listeners' affect.

    Args:
        turns: n trajectories with N turns. rewards: (N,) predicted. ep_len: `--ep_len`. redist_type: the decomposition.
        chosen: (N,) bool, to measure on a subset of each trajectory's turns.

    Returns:
        ge_loss (points squared) and li_loss, means over trajectories; roc_auc_happy: how well the reward tells happy
        listeners; delta_li: mean reward with a happy listener minus the rest; return_correlation: Spearman's, of
        predicted and true returns; and means by affect. None where undefined (one class only, constant).
    """
    from sklearn.metrics import roc_auc_score

    chosen = np.ones(len(turns), dtype=bool) if chosen is None else chosen
    rewards = np.asarray(rewards, dtype=np.float64)
    if not np.isfinite(rewards).all():
        raise UserError("predicted rewards are not finite: training has diverged; try a lower --learning_rate")
    returns = predicted_returns(turns, rewards, ep_len, redist_type, chosen)
    errors = (rewards - turns.targets) ** 2
    parts = [turns.turns_of(i) for i in range(len(turns.trajectories))]
    li = [errors[part][chosen[part]].mean() for part in parts]
    happy, rewards = turns.affects[chosen] == HAPPINESS, rewards[chosen]
    mixed = happy.any() and not happy.all()
    return {
        "ge_loss": float(np.mean((turns.scores - returns) ** 2)),
        "li_loss": float(np.mean(li)),
        "roc_auc_happy": float(roc_auc_score(happy, rewards)) if mixed else None,
        "delta_li": float(rewards[happy].mean() - rewards[~happy].mean()) if mixed else None,
        "return_correlation": spearman(turns.scores, returns),
        **affect_means(rewards, turns.affects[chosen], "reward"),
    }


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation; None if either is constant."""
    import pandas as pd

    ranks = [pd.Series(values).rank().to_numpy() for values in (a, b)]
    if len(a) < 2 or not all(np.ptp(column) for column in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def choose_turns(turns: TurnSet, k: int, seed: int) -> np.ndarray:
    """(N,) bool: K random turns of every trajectory, the same ones at every call."""
    rng = np.random.default_rng([seed, k])
    chosen = np.zeros(len(turns), dtype=bool)
    for i in range(len(turns.trajectories)):
        first, end = turns.offsets[i], turns.offsets[i + 1]
        chosen[first + rng.permutation(end - first)[:k]] = True
    return chosen


def wandb_validation(metrics: dict) -> dict:
    """Validation metrics under the published wandb keys; loss is GE and shaped loss is LI."""
    logged = {"val/epoch_loss": metrics["ge_loss"], "val/epoch_shaped_loss": metrics["li_loss"]}
    for name in AFFECT_GROUPS:
        if f"reward_{name}_mean" in metrics:
            logged[f"val_shape_epoch/epoch_running_{name}_mean"] = metrics[f"reward_{name}_mean"]
    for name in ("roc_auc_happy", "delta_li", "return_correlation"):
        if metrics[name] is not None:
            logged[f"val/{name}"] = metrics[name]
    return logged


def turn_table(turns: TurnSet, rewards: np.ndarray):
    """A row an agent turn, without text: the table that `val_turn_rewards_{run}.csv` holds."""
    import pandas as pd

    rows = []
    for trajectory in turns.trajectories:
        whose = (trajectory.conversation.id, trajectory.flip, trajectory.user, trajectory.agent)
        for i in trajectory.agent_turns:
            turn = trajectory.conversation.turns[i]
            rows.append((*whose, turn.turn_id, turn.start, turn.stop, FACES[turn.affect]))
    columns = ["conversation_id", "flip", "user_id", "agent_id", "turn_id", "start", "stop", "affect"]
    return pd.DataFrame(rows, columns=columns).assign(target=turns.targets, reward=rewards)


def head_rewards(head, features, turns: TurnSet | None = None) -> np.ndarray:
    """(N,) float32 rewards of encoded turns (N, hidden), in eval mode; a sequential head needs to know the `turns`."""
    import torch

    was_training = head.training
    head.eval()
    features = features.to(next(head.parameters()).device)
    parts = [turns.turns_of(i) for i in range(len(turns.trajectories))] if head.sequential else [slice(None)]
    with torch.inference_mode():
        rewards = torch.cat([head(features[part]) for part in parts]).squeeze(1).float().cpu().numpy()
    head.train(was_training)
    return rewards


def write_validation(folder: Path, run: str, turns: TurnSet, rewards: np.ndarray, ep_len, redist_type) -> list[Path]:
    """Writes `val_turn_rewards_{run}.csv` and two pictures of it; returns their paths."""
    import plots

    paths = [folder / f"val_turn_rewards_{run}.csv"]
    table = turn_table(turns, rewards)
    with atomic_path(paths[0]) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6f", lineterminator="\n")
    paths.append(plots.turn_rewards(table, folder / f"val_turn_rewards_{run}.png"))
    returns = predicted_returns(turns, rewards, ep_len, redist_type)
    paths.append(plots.returns(turns.scores, returns, folder / f"val_returns_{run}.png"))
    return paths


BAR_CHARTS = 4  # validation trajectories that `--bar_chart` shows


def finish_run(
    title: str, args, tracker, folder: Path, corpus: Corpus, parts, metrics: dict, rewards, paths, **more
) -> None:
    """Writes `reward1_{run}.json`, closes the wandb run, and prints the closing table with the paths of all files.

    Args:
        title: of the table. parts: (training, validation) turns. metrics: what was measured; `validation` is shown.
        rewards: (N,) of the validation turns, or None. paths: of what was written so far.
        more: further entries of the record.
    """
    record = {
        "run": tracker.name,
        **more,
        "arguments": vars(args),
        "seed": args.seed,
        "versions": versions(),
        "metrics": metrics,
        "data": corpus.counts(),
        "dropped_conversations": dict(sorted(corpus.dropped.items())),
        "dropped_trajectories": dict(sorted(corpus.dropped_trajectories.items())),
    }
    for name, part in zip(("training_conversations", "validation_conversations"), parts, strict=True):
        record[name] = list(dict.fromkeys(t.conversation.id for t in part.trajectories))
    path = record_path(folder, tracker.name)
    write_json(path, record)
    shown = metrics.get("validation", {})
    if args.log_text and shown:
        texts = dict(zip(("context", "response"), zip(*parts[1].texts, strict=True), strict=True))
        table = turn_table(parts[1], rewards).assign(**texts)
        tracker.log_table("val/turns", table, metrics.get("steps", 0) + 1)
    if args.bar_chart:
        for i in range(min(BAR_CHARTS, len(parts[1].trajectories))):  # numbered, because ids stay here
            mine = rewards[parts[1].turns_of(i)]
            tracker.log_bars(f"val/rewards_by_turn_{i + 1}", {n + 1: float(r) for n, r in enumerate(mine)})
    tracker.summary({f"final/{key}": value for key, value in shown.items()})
    tracker.finish()
    rows = [{"measured on validation": key, "value": value} for key, value in shown.items()]
    print(format_table(rows or [{"measured": "nothing (no --val)"}], f"\n{title}, run {tracker.name}"))
    print("\n".join(["Written:", *(f"  {path}" for path in [*paths, path])]))
