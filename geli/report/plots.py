"""Figures, each as a PNG and a PDF, whose paths are returned. matplotlib is imported inside the functions, because it
loads slowly."""

from pathlib import Path

import numpy as np

from geli.run.files import atomic_path

# colors that people with any kind of color vision tell apart (Okabe and Ito, 2008)
OKABE_ITO = ("#009E73", "#0072B2", "#E69F00", "#000000", "#CC79A7", "#D55E00", "#56B4E9")
GREEN, BLUE, ORANGE, BLACK, PURPLE, RED, SKY = OKABE_ITO
GRAY, YELLOW = "#999999", "#F0E442"
AFFECT_COLORS = {
    "happiness": GREEN, "neutral": "#d0d0d0", "surprise": YELLOW, "sadness": BLUE,
    "anger": RED, "contempt": PURPLE, "disgust": ORANGE, "fear": SKY,
}  # fmt: skip


def new_figure(rows: int, columns: int, width: float, height: float, heights: list[float] | None = None):
    """A figure and its axes (rows, columns), by the object-oriented interface: no global pyplot state, no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, height_ratios=heights)


def save(figure, path: Path) -> Path:
    """Writes a figure, the same bytes for the same figure; returns `path`."""
    ending = path.suffix.removeprefix(".")
    undated = {"png": {"Software": None}, "pdf": {"Creator": None, "Producer": None, "CreationDate": None}}
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format=ending, metadata=undated[ending])
    return path


def save_both(figure, path: Path) -> list[Path]:
    """Writes the PNG `path` and a PDF of the same name; returns both paths."""
    return [save(figure, path), save(figure, path.with_suffix(".pdf"))]


# ---------------------------------------------------------------------------------------------------------------------
# Reward heads


REACTION_COLORS = {"pleased": GREEN, "neither": "#d0d0d0", "displeased": RED}


def reactions(table):
    """(names (N,), name -> color, what they are) of the user's reactions to turns: the listener's affect, or where no
    faces are known the sign of LI's target. Unknown ones are empty."""
    if (table["affect"] != "").any():
        return table["affect"], AFFECT_COLORS, "the listener's affect"
    names = (
        table["target"].map({0: "neither"}).mask(table["target"] > 0, "pleased").mask(table["target"] < 0, "displeased")
    )
    return names.fillna(""), REACTION_COLORS, "the user's reaction, by LI's target"


def turn_rewards(table, path: Path, conversations: int = 2) -> list[Path]:
    """Predicted reward over time in the first `conversations` of `table`, with the reactions to the turns above it.

    Args:
        table: as in `val_turn_rewards_{run}.csv`, with conversation_id, start and stop (seconds), reward, target, and
            affect, which is empty where no face is known.
    """
    from matplotlib.patches import Patch

    chosen = list(dict.fromkeys(table["conversation_id"]))[:conversations]
    figure, axes = new_figure(2 * len(chosen), 1, 9, 2.8 * len(chosen), heights=[1, 8] * len(chosen))
    seen: set[str] = set()
    names, palette, what = reactions(table)
    for i, conversation in enumerate(chosen):
        affect, reward = axes[2 * i : 2 * i + 2, 0]
        rows = table[table["conversation_id"] == conversation].sort_values("start", kind="stable")
        middle = (rows["start"] + rows["stop"]) / 2
        width = np.maximum(rows["stop"] - rows["start"], 0.5)
        affect.bar(middle, 1, width, color=names[rows.index].map(palette).fillna("none"))
        reward.sharex(affect)
        known = f": {what}" if (names != "").any() else ""
        affect.set_title(f"conversation {i + 1}{known}", fontsize=9, loc="left")
        affect.set(yticks=[], ylim=(0, 1))
        affect.tick_params(bottom=False, labelbottom=False)
        affect.spines[:].set_visible(False)
        reward.bar(middle, rows["reward"], width, color=BLUE, edgecolor="white", lw=0.3)
        reward.axhline(0, color="black", lw=0.6)
        reward.set_ylabel("predicted reward")
        seen |= set(names[rows.index])
    axes[-1, 0].set_xlabel("seconds; one bar for each agent turn (each speaker is the agent once)")
    patches = [Patch(color=palette[name], label=name) for name in palette if name in seen]
    if patches:
        figure.legend(handles=patches, loc="outside upper left", ncols=4, fontsize=8, frameon=False)  # seen on a phone
    return save_both(figure, path)


def returns(true: np.ndarray, predicted: np.ndarray, path: Path) -> list[Path]:
    """Predicted return (n,) against true score (n,) of the validation trajectories, in points."""
    figure, [[axis]] = new_figure(1, 1, 4.2, 4)
    low, high = min(true.min(), predicted.min()), max(true.max(), predicted.max())
    axis.plot([low, high], [low, high], color=GRAY, lw=0.8)
    axis.scatter(true, predicted, s=18, alpha=0.7, color=BLUE, edgecolor="none")
    axis.set(xlabel="true score R (points)", ylabel="predicted return (points)", title="validation trajectories")
    return save_both(figure, path)


def affects(table, path: Path) -> list[Path]:
    """The distribution of predicted rewards by the user's reaction, as boxes, of the `table` of `turn_rewards`."""
    names, palette, _ = reactions(table)
    groups = {name: table["reward"][names == name].to_numpy() for name in palette}
    groups = {name: rewards for name, rewards in groups.items() if len(rewards)}
    figure, [[axis]] = new_figure(1, 1, 5.4, 0.9 + 0.42 * len(groups))
    labels = [f"{name} ({len(rewards):,})" for name, rewards in groups.items()]
    boxes = axis.boxplot(
        list(groups.values()), orientation="horizontal", tick_labels=labels, patch_artist=True, showfliers=False,
        medianprops={"color": "black"}, widths=0.6,
    )  # fmt: skip
    for box, name in zip(boxes["boxes"], groups, strict=True):
        box.set_facecolor(palette[name])
    axis.invert_yaxis()
    axis.set(xlabel="predicted reward", ylabel="reaction (turns)")
    return save_both(figure, path)


LEARNING = {  # title of a panel -> training and validation metric, as logged
    "LI loss": ("train/shaped_loss", "val/epoch_shaped_loss"),
    "GE loss (points²)": ("train/loss", "val/epoch_loss"),
    "gradient norm": ("train/gradient_norm", None),
}


def learning(rows: list[dict], path: Path) -> list[Path]:
    """Losses of stage 1 or 2 by `step`, from the `rows` that were logged."""
    shown = {title: names for title, names in LEARNING.items() if any(names[0] in row for row in rows)}
    figure, axes = new_figure(1, len(shown), 3.1 * len(shown), 3)
    for axis, (title, (training, validation)) in zip(axes[0], shown.items(), strict=True):
        steps, values = (np.array([row[key] for row in rows if training in row]) for key in ("step", training))
        axis.plot(steps, values, color=GRAY, lw=0.5, alpha=0.35)
        window = max(1, len(steps) // 25)
        means = np.convolve(values, np.ones(window) / window, mode="valid")
        axis.plot(steps[window - 1 :], means, color=GRAY, label=f"training, mean of {window}")
        if any(validation in row for row in rows):
            steps, values = (np.array([row[key] for row in rows if validation in row]) for key in ("step", validation))
            axis.plot(steps, values, color=BLUE, marker="o", ms=3, lw=1.4, label="validation")
        axis.set(xlabel="optimizer step", title=title)
        axis.set_ylim(bottom=0)
    axes[0, 0].legend(frameon=False)
    return save_both(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# Policies


def ppo(steps, path: Path) -> list[Path]:
    """How a policy changed in training: reward, KL, one against the other, length and diversity. `steps`: a table with
    the columns step and score_mean, and optionally human_score_mean, kl, response_length_mean and distinct_2."""
    rows = 2 if "kl" in steps else 1
    figure, axes = new_figure(rows, 2, 9, 3 * rows)
    score, *free = axes.flat
    score.plot(steps["step"], steps["score_mean"], label="policy", color=GREEN)
    if "human_score_mean" in steps:
        score.plot(steps["step"], steps["human_score_mean"], label="human answer", color=GRAY, lw=0.9)
    score.set(xlabel="step", ylabel="mean reward")
    score.legend(frameon=False)
    if "kl" in steps:
        kl, score_by_kl, *free = free
        kl.plot(steps["step"], steps["kl"], color=RED)
        kl.set(xlabel="step", ylabel="KL (nats a response)")
        points = score_by_kl.scatter(steps["kl"], steps["score_mean"], c=steps["step"], s=14, cmap="cividis")
        figure.colorbar(points, ax=score_by_kl, label="step")
        score_by_kl.set(xlabel="KL to the reference (nats a response)", ylabel="mean reward")
    if "response_length_mean" in steps:
        length, *free = free
        length.plot(steps["step"], steps["response_length_mean"], color=BLUE)
        length.set_xlabel("step")
        length.set_ylabel("response length (tokens)", color=BLUE)
        if "distinct_2" in steps:
            diversity = length.twinx()
            diversity.plot(steps["step"], steps["distinct_2"], color=ORANGE)
            diversity.set_ylabel("distinct-2", color=ORANGE)
            diversity.set_ylim(0, 1.02)
    for axis in free:
        axis.remove()
    return save_both(figure, path)


def before_after(metrics: dict[str, dict], path: Path) -> list[Path]:
    """Mean reward on held-out prompts with 95% intervals.

    Args:
        metrics: `before` and optionally `after` and `human`, each with reward, reward_low and reward_high.
    """
    labels = {"before": "reference policy", "after": "trained policy", "human": "human answers"}
    shown = {label: metrics[name] for name, label in labels.items() if "reward" in metrics.get(name, {})}
    figure, [[axis]] = new_figure(1, 1, 5.4, 0.9 + 0.5 * len(shown))
    for place, (found, color) in enumerate(zip(shown.values(), (GRAY, GREEN, BLUE), strict=False)):
        value, low, high = (found.get(name) for name in ("reward", "reward_low", "reward_high"))
        error = None if low is None else [[value - low], [high - value]]
        axis.errorbar(value, place, xerr=error, fmt="o", color=color, capsize=4)
    axis.set_yticks(range(len(shown)), list(shown))
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.set_xlabel("mean reward, 95% interval over conversations")
    return save_both(figure, path)
