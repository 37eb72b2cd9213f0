"""Figures of the experiments and of benchmarks/reading.py."""

from pathlib import Path

from geli.report.plots import BLUE, GRAY, GREEN, OKABE_ITO, RED, moving_mean, new_figure, save, save_both


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


def closed_loop(runs: dict[str, list[list[dict]]], path: Path, window: int = 3) -> list[Path]:
    """Proxy reward (the one trained on) and hidden reward of the policy's responses in training, against the KL to the
    reference (as Gao et al., ICML 2023, draw over-optimization); returns the paths of a PNG and a PDF.

    Args:
        runs: reward -> a list of steps (step, kl, score_mean, score_std, gold_mean) for each seed.
        window: steps averaged.
    """
    figure, axes = new_figure(1, 2, 9, 3.6)
    hidden, proxy = axes[0]
    for (name, seeds), color in zip(runs.items(), OKABE_ITO, strict=False):
        for i, steps in enumerate(seeds):
            kl, gold, score, spread = (
                moving_mean([row[key] for row in steps], min(window, len(steps)))
                for key in ("kl", "gold_mean", "score_mean", "score_std")
            )
            style = dict(color=color, lw=1.3, alpha=0.85, label=None if i else name)
            hidden.plot(kl, gold, **style)
            if name != "random" and spread[0] > 0:
                proxy.plot(kl, (score - score[0]) / spread[0], **style)
    hidden.set(xlabel="KL to the reference (nats a response)", ylabel="hidden reward")
    proxy.set(xlabel="KL to the reference (nats a response)", ylabel="gain in proxy reward (standard deviations)")
    hidden.legend(frameon=False, title="trained on")
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
