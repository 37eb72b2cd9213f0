"""Figures of the experiments and of benchmarks/reading.py."""

from itertools import cycle
from pathlib import Path

import numpy as np

from geli.report.plots import BLUE, GRAY, GREEN, OKABE_ITO, RED, new_figure, save, save_both


def reading(rows: list[dict], published: float, path: Path) -> Path:
    """Time to read a conversation, by the number of conversations, without and with a filled cache; returns `path`.

    Args:
        rows: `conversations`, `cold ms each` and `warm ms each`. published: milliseconds of the published code.
    """
    figure, axes = new_figure(1, 1, 5.4, 3.2)
    axis = axes[0, 0]
    n = [row["conversations"] for row in rows]
    axis.axhline(published, color=GRAY, ls="--", label="as published")
    for name, color in (("cold", BLUE), ("warm", GREEN)):
        axis.plot(n, [row[f"{name} ms each"] for row in rows], "o-", color=color, label=name)
    axis.set(xscale="log", yscale="log", xlabel="conversations", ylabel="ms a conversation")
    axis.set_xticks(n, map(str, n))
    axis.minorticks_off()
    axis.legend(frameon=False)
    return save(figure, path)


def curves(rewards: dict[str, list[list[float]]], target: float, path: Path) -> Path:
    """Mean reward by step, one color per algorithm and one line per seed; returns `path`.

    Args:
        rewards: algorithm -> a list of mean rewards for each seed. target: the reward of the dashed line.
    """
    figure, axes = new_figure(1, 1, 6, 3.2)
    axis = axes[0, 0]
    axis.axhline(target, color=GRAY, ls="--", lw=0.8)
    for (name, lines), color in zip(rewards.items(), (GREEN, BLUE, RED), strict=False):
        for i, line in enumerate(lines):
            axis.plot(range(1, len(line) + 1), line, color=color, lw=1, label=None if i else name)
    axis.set(xlabel="step", ylabel="mean reward (optimum 1)")
    axis.legend(frameon=False)
    return save(figure, path)


def frontier(lines: dict[tuple[str, str], list[np.ndarray]], path: Path) -> list[Path]:
    """Gain in hidden reward against the KL to the reference, a panel for each algorithm, a color for each reward, a
    mark for its options; thin lines are seeds, the thick one is their mean, which ends in the mark. In every panel also
    best-of-n by the truth and the bound of a normal reward, sqrt(2 KL), which the axis makes a straight line: the
    steepness of a way from 0 is its efficiency. Returns the paths of a PNG and a PDF.

    Args:
        lines: (reward, algorithm and its options) -> for each seed (points, 2): KL, and the gain in standard deviations
            of the reference's hidden reward.
    """
    best = [seeds for (reward, algo), seeds in lines.items() if reward == "truth" and algo.startswith("best-of-")]
    # best-of-n by the truth alone needs no panel: it is in all of them
    drawn = [algo for reward, algo in lines if reward != "truth" or not algo.startswith("best-of-")]
    panels: dict[str, list[tuple[str, str]]] = {}
    for key in lines:
        if not drawn or key[1] in drawn:
            panels.setdefault(key[1].split()[0], []).append(key)
    figure, axes = new_figure(1, len(panels), 4.2 * len(panels), 3.8)
    colors = dict(zip(dict.fromkeys(reward for reward, _ in lines), cycle(OKABE_ITO), strict=False))
    for axis, (name, keys) in zip(axes[0], panels.items(), strict=True):
        most = 1.03 * max(points[:, 0].max() for key in keys for points in lines[key])
        axis.plot([0, most], [0, (2 * most) ** 0.5], ls=":", color=GRAY, label="sqrt(2 KL)")
        if best:
            axis.plot(*np.mean(best[0], axis=0).T, ls="--", color="black", label="best-of-n by the truth")
        for (reward, algo), mark in zip(keys, cycle("os^DvPX*"), strict=False):
            for points in lines[reward, algo]:
                axis.plot(*points.T, color=colors[reward], lw=0.6, alpha=0.3)
            size = min(map(len, lines[reward, algo]))
            mean = np.mean([points[:size] for points in lines[reward, algo]], axis=0)
            label = f"{reward}{algo.removeprefix(name)}"
            axis.plot(*mean.T, f"{mark}-", ms=6, markevery=[-1], lw=1.6, color=colors[reward], label=label)
        axis.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
        axis.set(title=name, xlabel="KL to the reference (nats a response)", xlim=(0, most))
        axis.set_ylim(top=1.1 * (2 * most) ** 0.5)
        axis.legend(frameon=False, fontsize=8)
    axes[0, 0].set_ylabel("gain in hidden reward (standard deviations)")
    return save_both(figure, path)


def sweeps(rows: list[dict], labels: dict[str, str], path: Path) -> list[Path]:
    """Rank correlation with the hidden reward as one thing changes, a panel for each; the paths of a PNG and a PDF.

    Args:
        rows: axis, value, method, truth, low, high. labels: axis -> label.
    """
    figure, axes = new_figure(1, len(labels), 3.1 * len(labels), 3.2)
    bottom = min(-0.05, *(row["low"] for row in rows))
    for axis, (name, label) in zip(axes[0], labels.items(), strict=True):
        for method, color in zip(dict.fromkeys(row["method"] for row in rows), OKABE_ITO, strict=False):
            line = [row for row in rows if row["axis"] == name and row["method"] == method]
            x, y, low, high = ([row[key] for row in line] for key in ("value", "truth", "low", "high"))
            axis.plot(x, y, "o-", color=color, lw=1.4, ms=4, label=method)
            axis.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
        axis.set(xlabel=label, ylim=(bottom, 1))
        if 0 < 4 * min(x) <= max(x):
            axis.set_xscale("log")
        axis.set_xticks(x, [f"{value:g}" for value in x])
        axis.minorticks_off()
    axes[0, 0].set_ylabel("rank correlation with the hidden reward")
    axes[0, 0].legend(frameon=False)
    return save_both(figure, path)


def credit(rows: list[dict], path: Path) -> list[Path]:
    """The rank correlation with people's labels within conversations given the turn's place, a panel a corpus, with
    intervals; returns the paths of a PNG and a PDF.

    Args:
        rows: `corpus`, `reward`, `reads`, and the estimate `label_given_place`.
    """
    corpora = list(dict.fromkeys(row["corpus"] for row in rows))
    shown = {corpus: [row for row in rows if row["corpus"] == corpus][::-1] for corpus in corpora}
    longest = max(map(len, shown.values()))
    figure, axes = new_figure(1, len(corpora), 6.2 * len(corpora), 1 + 0.2 * longest)
    for axis, corpus in zip(axes[0], corpora, strict=True):
        found = [row["label_given_place"] for row in shown[corpus]]
        reads = list(dict.fromkeys(row["reads"] for row in shown[corpus][::-1]))
        names = [f"{row['reward']}{', ' + row['reads'] if row['reads'] else ''}" for row in shown[corpus]]
        colors = dict(zip(reads, (BLUE, GREEN, GRAY, RED), strict=False))
        for place, (row, (value, low, high)) in enumerate(zip(shown[corpus], found, strict=True)):
            axis.plot([low, high], [place, place], color=colors.get(row["reads"], GRAY), lw=1.4)
            axis.plot(value, place, "o", ms=3.5, color=colors.get(row["reads"], GRAY))
        axis.axvline(0, color=GRAY, ls="--", lw=0.8)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set(title=corpus, xlabel="rank correlation with people's labels\nwithin conversations, given place")
    return save_both(figure, path)
