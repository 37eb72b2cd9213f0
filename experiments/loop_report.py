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
BEYOND = 0.88  # of what is ideal for a normal reward: what best-of-n is taken to gain beyond its largest n
TRAINING = ("own gain in training", "hidden gain in training", "efficiency in training")
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


def grouped(results: Sequence[dict]) -> dict[tuple[str, str], list[dict]]:
    """(reward, algorithm) -> results, one a seed."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for result in results:
        groups.setdefault((result["reward"], result["algo"]), []).append(result)
    return groups


def gain_of(result: dict, points: Sequence[dict], references: dict[int, dict]) -> np.ndarray:
    """(m,) hidden reward at some of a result's `points`, in their mean, less that without choice or training."""
    return np.mean([point["gold"] for point in points], axis=0) - reference_gold(result, references)


def measures(
    run: dict, points: Sequence[dict], references: dict[int, dict], best: dict | None
) -> dict[str, np.ndarray]:
    """What a policy gained at some of its checkpoints, for each prompt (m,): `gain` in hidden reward; the `efficiency`
    that this is, unless the KL is too small for one; `of best-of-n`: its share of the mean gain of best-of-n at the
    same KL, if `best` is a result of that, by the same reward and of the same seed, and goes as far."""
    gain, kl = gain_of(run, points, references), float(np.mean([point["kl"] for point in points]))
    std = float(np.std(references[run["seed"]]["gold"]))
    found = {"gain": gain}
    if (share := efficiency(1.0, std, kl)) is not None:
        found["efficiency"] = gain * share
        if best and (reached := best_of_gain(best, kl, std, references)):
            found["of best-of-n"] = gain / reached
    return found


def best_of_gain(best: dict, kl: float, std: float, references: dict[int, dict]) -> float | None:
    """The mean gain of best-of-n at a KL: between two n linear in the KL's root, as gains grow. Beyond the largest n it
    is, for the hidden reward itself, `BEYOND` of what is ideal for a standard deviation `std`, else None."""
    roots = [max(point["kl"], 0.0) ** 0.5 for point in best["points"]]
    if kl**0.5 > roots[-1]:
        return BEYOND * std * (2 * kl) ** 0.5 if best["reward"] == "truth" else None
    return float(np.interp(kl**0.5, roots, [gain_of(best, [point], references).mean() for point in best["points"]]))


def rows(results: Sequence[dict], references: dict[int, dict], later_half: bool = False) -> list[dict]:
    """A row for each reward and algorithm: the `measures` of its policies with intervals over seeds and conversations,
    how much less they are than those of the first row with this algorithm, whatever its options, on the seeds that have
    both, and of what was said.

    Args:
        results: of all seeds. references: seed -> what the reference policy said.
        later_half: in the mean of the later half of the checkpoints, which is less noisy, in place of the last one (of
            best-of-N: all N). Best-of-N then has no rows.
    """
    plain = [run for run in results if run["algo"].startswith(BEST_OF) and " " not in run["algo"]]
    plain.sort(key=lambda run: run["points"][-1]["n"])
    best = {(run["reward"], run["seed"]): run for run in plain}  # the one with the most samples
    found, first = [], {}
    for (reward, algo), runs in grouped(results).items():
        chosen = algo.startswith(BEST_OF)
        if chosen and later_half:
            continue
        kept = [run["points"][len(run["points"]) // 2 :] if later_half else run["points"][-1:] for run in runs]
        row: dict = {"reward": reward, "algorithm": algo, "seeds": len(runs)}
        row["KL"] = float(np.mean([point["kl"] for points in kept for point in points]))
        measured = [
            measures(run, points, references, None if chosen else best.get((reward, run["seed"])))
            for run, points in zip(runs, kept, strict=True)
        ]
        for name in ("gain", "efficiency", "of best-of-n"):
            mine = {run["seed"]: (run, of[name]) for run, of in zip(runs, measured, strict=True) if name in of}
            some = "" if len(mine) == len(runs) else f" (of {len(mine)})"
            row[name] = f"{_means(mine).interval()}{some}" if mine else None
            theirs = first.setdefault((algo.split()[0], name), mine)
            if name != "of best-of-n":
                row[f"{name}: first's less this"] = _difference(mine, theirs)
        if not later_half:
            row |= _of_training(runs) | _of_responses(runs, chosen)
        found.append(row)
    return found


def _means(of_seed: dict[int, tuple]) -> Means:
    """Of a result and what was measured of it (m,), by seeds."""
    return means(*zip(*of_seed.values(), strict=True))


def _difference(mine: dict[int, tuple], theirs: dict[int, tuple]) -> str | None:
    """How much more theirs is, on the seeds that both have."""
    both = sorted(mine.keys() & theirs.keys()) if mine is not theirs else []
    ours, others = ({seed: of_seed[seed] for seed in both} for of_seed in (mine, theirs))
    return str(_means(others).interval(_means(ours))) if both else None


def _of_training(runs: Sequence[dict]) -> dict[str, float | None]:
    """What the batches of the last fifth of training gained over the first three: in the reward that they were trained
    on and in the hidden one, in standard deviations of the first three; and the efficiency that the second is."""
    found = []
    for run in runs:
        steps = pd.DataFrame(run.get("steps", []))
        if not {"score_mean", "gold_mean", "kl"} <= set(steps):
            return dict.fromkeys(TRAINING)
        early, late = steps[:3].mean(), steps[-max(len(steps) // 5, 1) :].mean()
        own, hidden = ((late[f"{of}_mean"] - early[f"{of}_mean"]) / early[f"{of}_std"] for of in ("score", "gold"))
        found.append((own, hidden, efficiency(hidden, 1.0, late["kl"]) or np.nan))
    return dict(zip(TRAINING, np.mean(found, axis=0).tolist(), strict=True))


def _of_responses(runs: Sequence[dict], chosen: bool) -> dict:
    """Length, ends and variety of the last responses; of best-of-N how its reward orders responses."""
    names = ("response_words", "ended_share", "distinct_2")
    said = {name: float(np.mean([run["points"][-1].get(name, np.nan) for run in runs])) for name in names}
    order = str(means(runs, [run["order"] for run in runs]).interval(limits=CORRELATION)) if chosen else None
    return {**said, "order": order, "within": float(np.mean([run["within"] for run in runs])) if chosen else None}


def best_of_rows(results: Sequence[dict], references: dict[int, dict]) -> list[dict]:
    """For best-of-N a row for each reward and n: KL, gain, and how much less that is than the first reward's."""
    found, first = [], {}
    for (reward, algo), runs in grouped(results).items():
        for place, point in enumerate(runs[0]["points"] if algo.startswith(BEST_OF) else []):
            mine = {run["seed"]: (run, gain_of(run, [run["points"][place]], references)) for run in runs}
            theirs = first.setdefault((algo.split()[0], place), mine)
            kl = float(np.mean([run["points"][place]["kl"] for run in runs]))
            row = {"reward": reward, "algorithm": algo, "n": point["n"], "KL": kl, "gain": str(_means(mine).interval())}
            found.append({**row, "first's less this": _difference(mine, theirs)})
    return [row for row in found if row["n"] > 1]


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


def write_report(results: Sequence[dict], references: dict[int, dict], out: Path) -> None:
    """Prints the tables, and writes them and the picture to `out`."""
    prompts = max(len(run["prompts"]) for run in results)
    tables = {
        "closed_loop": (f"Hidden reward of responses to {prompts} held-out prompts a seed", rows(results, references)),
        "later_half": ("The same, in the mean of the later half of the checkpoints", rows(results, references, True)),
        "best_of_n": ("What each reward's choices gain", best_of_rows(results, references)),
        "phrases": (
            "Words and marks by the change of their share of responses, in points", phrases(results, references)
        ),
        "side_by_side": ("", side_by_side(results, references)),
    }  # fmt: skip
    paths = [out / f"{name}.csv" for name, (_, table) in tables.items() if table]
    for path in paths:
        with atomic_path(path, private=True) as temporary:  # some hold text
            pd.DataFrame(tables[path.stem][1]).to_csv(temporary, index=False, float_format="%.4f")
    paths += plots.frontier(frontier_lines(results, references), out / "frontier.png")
    print(*(format_table(table, f"\n{title}") for title, table in tables.values() if title and table), sep="\n")
    print("\n".join(["Written:", *(f"  {path}" for path in paths)]))


def frontier_lines(results: Sequence[dict], references: dict[int, dict]) -> dict[tuple[str, str], list[np.ndarray]]:
    """(reward, algorithm) -> for each seed (points, 2): KL, and the gain in hidden reward in standard deviations of the
    reference's."""
    lines = {}
    for key, runs in grouped(results).items():
        for run in runs:
            spread = np.std(references[run["seed"]]["gold"])
            points = [(max(p["kl"], 0.0), gain_of(run, [p], references).mean() / spread) for p in run["points"]]
            lines.setdefault(key, []).append(np.array(points))
    return lines
