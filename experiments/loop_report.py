"""What a closed loop found: gains in hidden reward with intervals, turns of phrase, and over-optimization."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from experiments import plots
from experiments.best_of import BEST_OF
from geli.run.console import format_table
from geli.run.files import atomic_path
from geli.statistics import resample
from tools.seeds import interval_over_seeds, t_interval

REPETITIONS = 10_000  # of the bootstrap
PHRASES = 8  # words that are shown
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|[!?]")


class Gains(NamedTuple):
    """Gains in hidden reward of the policies that were trained alike from several seeds.

    Attributes:
        values: (seeds,) means over held-out prompts. samples: (seeds, B) the same on resamples of the conversations.
        conversations: C that the prompts are of.
    """

    values: np.ndarray
    samples: np.ndarray
    conversations: int

    def interval(self, less: "Gains | None" = None):
        """`Estimate` of the mean gain, or of what it is more than another's from the same seeds."""
        values, samples = self.values, self.samples
        if less:
            values, samples = values - less.values, samples - less.samples
        return interval_over_seeds(values, samples.mean(axis=0), self.conversations)


def gains(results: Sequence[dict], references: dict[int, dict]) -> Gains:
    """Hidden reward of each response less that of the reference policy's response to the same prompt.

    Args:
        results: of one setting, one a seed, with `seed`, `prompts` (named CONVERSATION/flip/turn) and `gold` of each
            response. references: seed -> the same of the reference policy.
    """
    names = [[prompt.partition("/")[0] for prompt in result["prompts"]] for result in results]
    places = {name: i for i, name in enumerate(sorted({name for of_seed in names for name in of_seed}))}
    weights = resample(len(places), REPETITIONS)
    values, samples = [], []
    for of_seed, result in zip(names, results, strict=True):
        gained = np.subtract(result["gold"], references[result["seed"]]["gold"])
        conversation = [places[name] for name in of_seed]
        sums, counts = (np.bincount(conversation, part, len(places)) for part in (gained, np.ones(len(gained))))
        values.append(gained.mean())
        samples.append((weights @ sums) / (weights @ counts))
    return Gains(np.array(values), np.array(samples), len(places))


def grouped(results: Sequence[dict]) -> dict[tuple[str, str], list[dict]]:
    """(reward, algorithm) -> results, one a seed."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for result in results:
        groups.setdefault((result["reward"], result["algo"]), []).append(result)
    return groups


def rows(results: Sequence[dict], references: dict[int, dict]) -> list[dict]:
    """A row for each reward and algorithm: hidden reward before and after, with intervals over seeds and conversations,
    and the difference from the gain of the algorithm's first reward."""
    found, first = [], {}
    for (reward, algo), runs in grouped(results).items():
        gained, seeds = gains(runs, references), [run["seed"] for run in runs]
        paired = first[algo][0] if algo in first and first[algo][1] == seeds else None
        first.setdefault(algo, (gained, seeds))
        before = np.mean([np.mean(references[run["seed"]]["gold"]) for run in runs])
        row = {"reward": reward, "algorithm": algo, "seeds": len(runs), "hidden before": before}
        row |= {"hidden after": before + gained.values.mean(), "gain": str(gained.interval())}
        row["gain of its first reward less this"] = str(paired.interval(gained)) if paired else None
        for name in ("kl", "response_words", "ended_share", "distinct_2"):
            row[name] = float(np.mean([run[name] for run in runs]))
        row["order"] = str(t_interval([run["order"] for run in runs])) if algo.startswith(BEST_OF) else None
        found.append(row)
    return found


def phrases(results: Sequence[dict], references: dict[int, dict]) -> list[dict]:
    """For each reward and algorithm, the words and marks whose share of responses rose and fell most, in points."""
    found = []
    for (reward, algo), runs in grouped(results).items():
        after = _shares([text for run in runs for text in run["texts"]])
        before = _shares([text for run in runs for text in references[run["seed"]]["texts"]])
        change = sorted(((after[word] - before[word], word) for word in after | before), key=lambda x: (-x[0], x[1]))
        shown = [", ".join(f"{word} {100 * share:+.0f}" for share, word in part) for part in
                 (change[:PHRASES], change[: -PHRASES - 1 : -1])]  # fmt: skip
        found.append({"reward": reward, "algorithm": algo, "more often": shown[0], "less often": shown[1]})
    return found


def _shares(texts: Sequence[str]) -> Counter:
    counts = Counter(word for text in texts for word in set(WORD.findall(text.lower())))
    return Counter({word: count / len(texts) for word, count in counts.items()})


def write_report(results: Sequence[dict], references: dict[int, dict], out: Path) -> None:
    """Prints the tables, and writes them and the picture to `out`."""
    tables = {"closed_loop": rows(results, references), "phrases": phrases(results, references)}
    paths = [out / f"{name}.csv" for name in tables]
    for path, table in zip(paths, tables.values(), strict=True):
        with atomic_path(path) as temporary:
            pd.DataFrame(table).to_csv(temporary, index=False, float_format="%.4f")
    trained = [run for run in results if "steps" in run]
    curves = {
        reward: [run["steps"] for run in runs]
        for (reward, algo), runs in grouped(trained).items()
        if algo == trained[0]["algo"]
    }
    if curves:
        paths += plots.closed_loop(curves, out / "closed_loop.png")
    prompts = len(results[0]["prompts"])
    print(format_table(tables["closed_loop"], f"\nHidden reward of responses to {prompts} held-out prompts a seed"))
    print(format_table(tables["phrases"], "\nWords and marks by the change of their share of responses, in points"))
    print("\n".join(["Written:", *(f"  {path}" for path in paths)]))
