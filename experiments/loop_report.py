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
from geli.rl.evaluation import efficiency
from geli.run.console import format_table
from geli.run.files import atomic_path
from geli.statistics import Estimate, resample
from tools.limits import CORRELATION, Limits, within
from tools.seeds import interval_over_seeds

REPETITIONS = 10_000  # of the bootstrap
PHRASES = 8  # words that are shown
SHOWN = 10  # responses that are written side by side
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|[!?]")


class Means(NamedTuple):
    """Means over prompts of what the policies, or choices, of several seeds are measured to be.

    Attributes:
        values: (seeds,) over the held-out prompts. samples: (seeds, B) the same on resamples of the conversations.
        conversations: C that the prompts are of.
    """

    values: np.ndarray
    samples: np.ndarray
    conversations: int

    def interval(self, less: "Means | None" = None, limits: Limits | None = None) -> Estimate:
        """The mean over seeds, or what it is more than another's from the same seeds. limits: of the measure."""
        values, samples = self.values, self.samples
        if less:
            values, samples = values - less.values, samples - less.samples
        return within(limits, interval_over_seeds, values, samples.mean(axis=0), self.conversations)


def means(results: Sequence[dict], measured: Sequence[Sequence[float]]) -> Means:
    """Means over the prompts of each result.

    Args:
        results: of one setting, one a seed, with `prompts` (named CONVERSATION/flip/turn).
        measured: a number for each of a result's prompts; NaN is left out.
    """
    names = [[prompt.partition("/")[0] for prompt in result["prompts"]] for result in results]
    places = {name: i for i, name in enumerate(sorted({name for of_seed in names for name in of_seed}))}
    weights = resample(len(places), REPETITIONS)
    values, samples = [], []
    for of_seed, numbers in zip(names, np.asarray(measured, dtype=float), strict=True):
        conversation, there = [places[name] for name in of_seed], np.isfinite(numbers)
        sums, counts = (np.bincount(conversation, part, len(places)) for part in (np.where(there, numbers, 0), there))
        with np.errstate(invalid="ignore"):  # NaN where there is no number
            values.append(sums.sum() / counts.sum())
            samples.append((weights @ sums) / (weights @ counts))
    return Means(np.array(values), np.array(samples), len(places))


def gains(results: Sequence[dict], references: dict[int, dict], golds: Sequence[Sequence[float]]) -> Means:
    """Hidden reward of each response less that of the reference policy's response to the same prompt.

    Args:
        results: as in `means`, with `seed`. references: seed -> the same of the reference policy.
        golds: hidden rewards for each result's prompts.
    """
    return means(
        results, [np.subtract(gold, reference_gold(run, references)) for run, gold in zip(results, golds, strict=True)]
    )


def reference_gold(result: dict, references: dict[int, dict]) -> np.ndarray:
    """(m,) hidden rewards without any choice or training, for the prompts of a result: of best-of-n the means of all
    samples, else of the reference policy's responses."""
    if result["algo"].startswith(BEST_OF):
        return np.array(result["points"][0]["gold"])
    return np.array(of_reference(result, references, "gold"))


def of_reference(result: dict, references: dict[int, dict], key: str) -> list:
    """What the reference has under `key` (`gold`, `texts`) for each prompt of a result."""
    reference = references[result["seed"]]
    found = dict(zip(reference["prompts"], reference[key], strict=True))
    return [found[name] for name in result["prompts"]]


def gold_at(result: dict, kl: float) -> np.ndarray | None:
    """(m,) hidden rewards at this KL: between the two checkpoints (or sizes n) around it, linear in the KL's root, as
    gains grow; None if the run did not get there, or was measured too late for that."""
    below = None
    for point in result["points"]:
        if point["kl"] >= kl:
            if below is None:
                return None
            low, high = max(below["kl"], 0.0) ** 0.5, point["kl"] ** 0.5
            weight = (kl**0.5 - low) / (high - low)
            return (1 - weight) * np.array(below["gold"]) + weight * np.array(point["gold"])
        below = point
    return None


def grouped(results: Sequence[dict]) -> dict[tuple[str, str], list[dict]]:
    """(reward, algorithm) -> results, one a seed."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for result in results:
        groups.setdefault((result["reward"], result["algo"]), []).append(result)
    return groups


def rows(results: Sequence[dict], references: dict[int, dict], target_kl: float) -> list[dict]:
    """A row for each reward and algorithm: gains in hidden reward at the end of training (of best-of-N, with all N), at
    `target_kl`, and as the mean of the later half of the checkpoints, which is less noisy, with intervals over seeds
    and conversations; the differences from the gains of the algorithm's first reward, on the seeds that have both; and
    what the reward's efficiency was."""
    found, first = [], {}
    for (reward, algo), runs in grouped(results).items():
        row: dict = {"reward": reward, "algorithm": algo, "seeds": len(runs)}
        best = algo.startswith(BEST_OF)
        late = {} if best else {run["seed"]: run["points"][len(run["points"]) // 2 :] for run in runs}
        row["KL"] = float(np.mean([run["points"][-1]["kl"] for run in runs]))
        late_kl = [np.mean([point["kl"] for point in points]) for points in late.values()]
        row["KL, later half"] = float(np.mean(late_kl)) if late_kl else None
        at_end = {run["seed"]: (run, run["points"][-1]["gold"]) for run in runs}
        at_kl = {run["seed"]: (run, gold_at(run, target_kl)) for run in runs}
        golds = {seed: np.mean([point["gold"] for point in points], axis=0) for seed, points in late.items()}
        later = {run["seed"]: (run, golds.get(run["seed"])) for run in runs}
        for name, of_seed in {"gain": at_end, f"gain at {target_kl:g} nats": at_kl, "gain, later half": later}.items():
            kept = {seed: pair for seed, pair in of_seed.items() if pair[1] is not None}
            complete = len(kept) == len(runs)  # else those that got there are no fair sample
            row[name] = _gain(kept, references) if complete else f"measured in {len(kept)}"
            others = first.setdefault((algo, name), kept if complete else {})
            both = sorted(kept.keys() & others.keys()) if complete and others is not kept else []
            row[f"{name}: first reward's less this"] = _difference(kept, others, both, references) if both else None
        paid = [share for run in runs if (share := efficiency_of(run, references)) is not None]
        row["efficiency"] = _mean_of(paid, len(runs))
        for name in ("response_words", "ended_share", "distinct_2"):
            row[name] = float(np.mean([run["points"][-1].get(name, np.nan) for run in runs]))
        row["order"] = str(means(runs, [run["order"] for run in runs]).interval(limits=CORRELATION)) if best else None
        row["within"] = float(np.mean([run["within"] for run in runs])) if best else None
        found.append(row)
    return found


def _mean_of(found: Sequence[float], n: int) -> str | None:
    """The mean of what was found in n runs, and in how many if not in all."""
    return f"{np.mean(found):.3f}{'' if len(found) == n else f' (of {len(found)})'}" if found else None


def _gain(of_seed: dict[int, tuple], references: dict[int, dict]) -> str:
    runs, golds = zip(*of_seed.values(), strict=True)
    return str(gains(runs, references, golds).interval())


def _difference(ours: dict[int, tuple], first: dict[int, tuple], seeds: list[int], references: dict) -> str:
    """The paired difference of the gains of two rewards on the same seeds."""
    mine, theirs = (
        gains([of[seed][0] for seed in seeds], references, [of[seed][1] for seed in seeds]) for of in (ours, first)
    )
    return str(theirs.interval(mine))


def efficiency_of(run: dict, references: dict[int, dict]) -> float | None:
    """What the gain in hidden reward at the end of training is for its KL; None where the KL is too small for that."""
    last, before = run["points"][-1], reference_gold(run, references)
    return efficiency(np.mean(last["gold"]) - before.mean(), np.std(references[run["seed"]]["gold"]), last["kl"])


def phrases(results: Sequence[dict], references: dict[int, dict]) -> list[dict]:
    """For each reward and algorithm, the words and marks whose share of responses rose and fell most, in points."""
    found = []
    for (reward, algo), runs in grouped(results).items():
        after = _shares([text for run in runs for text in run["texts"]])
        before = _shares([text for run in runs for text in of_reference(run, references, "texts")])
        change = sorted(((after[word] - before[word], word) for word in after | before), key=lambda x: (-x[0], x[1]))
        shown = [", ".join(f"{word} {100 * share:+.0f}" for share, word in part) for part in
                 (change[:PHRASES], change[: -PHRASES - 1 : -1])]  # fmt: skip
        found.append({"reward": reward, "algorithm": algo, "more often": shown[0], "less often": shown[1]})
    return found


def side_by_side(results: Sequence[dict], references: dict[int, dict]) -> list[dict]:
    """What the policies of the first seed say to the same prompts, beside what the reference policy says."""
    reference = references[results[0]["seed"]]
    columns = {"prompt": reference["prompts"], "said": reference["said"], "reference": reference["texts"]}
    for run in results:
        if run["seed"] == results[0]["seed"]:
            texts = dict(zip(run["prompts"], run["texts"], strict=True))  # of best-of-n to half of the prompts
            columns[f"{run['reward']} {run['algo']}"] = [texts.get(name, "") for name in reference["prompts"]]
    return pd.DataFrame(columns)[:SHOWN].to_dict("records")


def _shares(texts: Sequence[str]) -> Counter:
    counts = Counter(word for text in texts for word in set(WORD.findall(text.lower())))
    return Counter({word: count / len(texts) for word, count in counts.items()})


def write_report(results: Sequence[dict], references: dict[int, dict], target_kl: float, out: Path) -> None:
    """Prints the tables, and writes them and the picture to `out`."""
    tables = {
        "closed_loop": rows(results, references, target_kl), "phrases": phrases(results, references),
        "side_by_side": side_by_side(results, references),
    }  # fmt: skip
    paths = [out / f"{name}.csv" for name in tables]
    for path, table in zip(paths, tables.values(), strict=True):
        with atomic_path(path, private=True) as temporary:  # some hold text
            pd.DataFrame(table).to_csv(temporary, index=False, float_format="%.4f")
    paths += plots.frontier(frontier_lines(results, references), out / "frontier.png")
    prompts = len(results[0]["prompts"])
    print(format_table(tables["closed_loop"], f"\nHidden reward of responses to {prompts} held-out prompts a seed"))
    print(format_table(tables["phrases"], "\nWords and marks by the change of their share of responses, in points"))
    print("\n".join(["Written:", *(f"  {path}" for path in paths)]))


def frontier_lines(results: Sequence[dict], references: dict[int, dict]) -> dict[tuple[str, str], list[np.ndarray]]:
    """(reward, algorithm) -> for each seed (points, 2): KL, and the gain in hidden reward in standard deviations of the
    reference's."""
    lines = {}
    for key, runs in grouped(results).items():
        for run in runs:
            before, spread = reference_gold(run, references).mean(), np.std(references[run["seed"]]["gold"])
            points = [(max(p["kl"], 0.0), (np.mean(p["gold"]) - before) / spread) for p in run["points"]]
            lines.setdefault(key, []).append(np.array(points))
    return lines
