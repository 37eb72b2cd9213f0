"""Figures. matplotlib is imported inside the functions, because it loads slowly."""

from pathlib import Path

import numpy as np

from geli.run.files import atomic_path

AFFECT_COLORS = {
    "happiness": "#2e8b57", "neutral": "#b8b8b8", "surprise": "#e0a030", "sadness": "#4a78b5",
    "anger": "#b33a3a", "contempt": "#8c564b", "disgust": "#7a6f1f", "fear": "#7d5ba6",
}  # fmt: skip

# colors that people with any kind of color vision tell apart (Okabe and Ito, 2008)
OKABE_ITO = ("#009E73", "#0072B2", "#E69F00", "#000000", "#CC79A7", "#D55E00", "#56B4E9")


def _figure(rows: int, columns: int, width: float, height: float):
    # the object-oriented interface: no global pyplot state, no display needed
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure, path: Path) -> Path:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None})
    return path


def turn_rewards(table, path: Path, conversations: int = 2) -> Path:
    """Predicted reward over time in the first `conversations` of `table`, colored by the listener's affect.

    Args:
        table: as in `val_turn_rewards_{run}.csv`, with conversation_id, start and stop (seconds), reward and affect.

    Returns:
        `path`.
    """
    from matplotlib.patches import Patch

    chosen = list(dict.fromkeys(table["conversation_id"]))[:conversations]
    figure, axes = _figure(len(chosen), 1, 9, 2.6 * len(chosen))
    seen: dict[str, str] = {}
    for axis, conversation in zip(axes[:, 0], chosen, strict=True):
        rows = table[table["conversation_id"] == conversation].sort_values("start", kind="stable")
        middle = (rows["start"] + rows["stop"]) / 2
        width = np.maximum(rows["stop"] - rows["start"], 0.5)
        axis.bar(middle, rows["reward"], width, color=rows["affect"].map(AFFECT_COLORS), edgecolor="white", lw=0.3)
        axis.axhline(0, color="black", lw=0.6)
        axis.set_title(f"conversation {conversation[:18]}", fontsize=9, loc="left")
        axis.set_ylabel("predicted reward")
        seen |= {affect: AFFECT_COLORS[affect] for affect in rows["affect"]}
    axes[-1, 0].set_xlabel("seconds; one bar per agent turn (each speaker is the agent once)")
    patches = [Patch(color=color, label=affect) for affect, color in sorted(seen.items())]
    figure.legend(handles=patches, loc="outside upper right", ncols=len(patches), fontsize=8, frameon=False)
    return _save(figure, path)


def returns(true: np.ndarray, predicted: np.ndarray, path: Path) -> Path:
    """Predicted return (n,) against true score (n,) of the validation trajectories, in points; returns `path`."""
    figure, axes = _figure(1, 1, 4.2, 4)
    axis = axes[0, 0]
    low, high = min(true.min(), predicted.min()), max(true.max(), predicted.max())
    axis.plot([low, high], [low, high], color="#999999", lw=0.8)
    axis.scatter(true, predicted, s=18, alpha=0.7, color="#4a78b5", edgecolor="none")
    axis.set(xlabel="true score R (points)", ylabel="predicted return (points)", title="validation trajectories")
    return _save(figure, path)


def ppo(steps, path: Path) -> Path:
    """Mean reward of the policy and of the human answers to the same prompts, and KL to the reference, by step.

    Args:
        steps: table with the columns step and score_mean, and optionally human_score_mean and kl.

    Returns:
        `path`.
    """
    figure, axes = _figure(1, 2, 9, 3.2)
    score, kl = axes[0]
    score.plot(steps["step"], steps["score_mean"], label="policy", color="#2e8b57")
    if "human_score_mean" in steps:
        score.plot(steps["step"], steps["human_score_mean"], label="human answer", color="#999999", lw=0.9)
    score.set(xlabel="step", ylabel="mean reward")
    score.legend(frameon=False)
    if "kl" in steps:
        kl.plot(steps["step"], steps["kl"], color="#b33a3a")
    kl.set(xlabel="step", ylabel="KL to the reference (nats a response)")
    return _save(figure, path)


def reading(rows: list[dict], published: float, path: Path) -> Path:
    """Time to read a conversation, by the number of conversations, without and with a filled cache; returns `path`.

    Args:
        rows: `conversations`, `cold ms each` and `warm ms each`. published: milliseconds of the published code.
    """
    figure, axes = _figure(1, 1, 5.4, 3.2)
    axis = axes[0, 0]
    n = [row["conversations"] for row in rows]
    axis.axhline(published, color="#999999", ls="--", label="as published")
    for name, color in (("cold", "#4a78b5"), ("warm", "#2e8b57")):
        axis.plot(n, [row[f"{name} ms each"] for row in rows], "o-", color=color, label=name)
    axis.set(xscale="log", yscale="log", xlabel="conversations", ylabel="ms a conversation")
    axis.set_xticks(n, map(str, n))
    axis.minorticks_off()
    axis.legend(frameon=False)
    return _save(figure, path)


def curves(rewards: dict[str, list[list[float]]], target: float, path: Path) -> Path:
    """Mean reward by step, one color per algorithm and one line per seed; returns `path`.

    Args:
        rewards: algorithm -> a list of mean rewards for each seed. target: the reward of the dashed line.
    """
    figure, axes = _figure(1, 1, 6, 3.2)
    axis = axes[0, 0]
    axis.axhline(target, color="#999999", ls="--", lw=0.8)
    for (name, lines), color in zip(rewards.items(), ("#2e8b57", "#4a78b5", "#b33a3a"), strict=False):
        for i, line in enumerate(lines):
            axis.plot(range(1, len(line) + 1), line, color=color, lw=1, label=None if i else name)
    axis.set(xlabel="step", ylabel="mean reward (optimum 1)")
    axis.legend(frameon=False)
    return _save(figure, path)


def closed_loop(runs: dict[str, list[list[dict]]], path: Path, window: int = 5) -> Path:
    """Proxy reward (the one trained on) and hidden reward of the policy's responses in training, against the KL to the
    reference (as Gao et al., ICML 2023, draw over-optimization); returns `path`.

    Args:
        runs: reward -> a list of steps (step, kl, score_mean, gold_mean) for each seed. window: steps averaged.
    """
    figure, axes = _figure(1, 2, 9, 3.4)
    titles = {"gold_mean": "hidden reward", "score_mean": "proxy reward (first steps 0, last 1)"}
    for axis, (column, label) in zip(axes[0], titles.items(), strict=True):
        for (name, seeds), color in zip(runs.items(), OKABE_ITO, strict=False):
            for i, steps in enumerate(seeds):
                if column == "score_mean" and name == "random":
                    continue
                mean_of = max(1, min(window, len(steps) // 2))
                kl, value = (_moving_mean([row[key] for row in steps], mean_of) for key in ("kl", column))
                if column == "score_mean" and value[-1] != value[0]:
                    value = (value - value[0]) / abs(value[-1] - value[0])
                axis.plot(kl, value, color=color, lw=1.2, label=None if i else name)
        axis.set(xlabel="KL to the reference (nats a response)", ylabel=label)
    axes[0, 0].legend(frameon=False)
    return _save(figure, path)


def _moving_mean(values: list[float], window: int) -> np.ndarray:
    return np.convolve(values, np.ones(window) / window, mode="valid")
