"""What stage 3 reports: the record, the responses, pictures, and the page."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from geli.nets.prompts import Prompt
from geli.report import plots
from geli.report.lineage import lineage
from geli.report.page import Page, Section, changed_options, seconds_table, write_page
from geli.report.verdict import policy_verdict
from geli.run.console import format_table, format_written
from geli.run.files import atomic_path, write_json
from geli.run.tracking import Tracker, versions

WHEN = ("before", "after", "gain", "human")  # columns of the table
SAMPLES_SHOWN = 3  # responses that are printed
PARTS = {  # of a PPO step, as logged -> as shown
    "seconds_generate": "generating", "seconds_forward": "log-probabilities and values",
    "seconds_score": "reward", "seconds_update": "updating",
}  # fmt: skip


@dataclass
class PolicyRun:
    """A run of stage 3 as it is reported.

    Attributes:
        stem: path and beginning of the files' names. algo: its name. arguments: name -> value of every option.
        defaults: the same without a command line. counts: of what was read. reward: what was trained on, for the table.
        head: the reward head's file; None for another reward. held_out: the prompts.
        metrics: `before` (the reference), `after` (the tuned policy), `gain` and `human`, where measured.
        texts: responses of `base` and `tuned` to the held-out prompts, where generated.
        steps: rows that were recorded in training. problems: what `diagnose` found in them, in words.
        paths: of what was written. seconds: part -> time.
        card: (name of an adapter's folder, what was measured) -> its README; None where none was written.
    """

    stem: Path
    algo: str
    arguments: dict
    defaults: dict
    counts: dict
    reward: str
    head: Path | None
    held_out: Sequence[Prompt]
    metrics: dict[str, dict]
    texts: dict[str, list[str]]
    steps: list[dict]
    problems: Sequence[str]
    paths: list[Path]
    seconds: dict[str, float]
    card: Callable[[str, dict], str] | None = None

    @property
    def on_card(self) -> dict[str, object]:
        """What was measured, for the README of the last adapter."""
        rows = metric_rows(self.metrics) if self.metrics else []
        shown = {"verdict": self.verdict}
        for row in rows:
            name, *cells = (f"{cell:.4g}" if isinstance(cell, float) else cell for cell in row.values())
            told = [f"{cell} {when}" for when, cell in zip(WHEN, cells, strict=True) if cell is not None]
            shown[f"{name}, held-out prompts"] = ", ".join(told)
        return shown

    @property
    def title(self) -> str:
        """Of the table and the page."""
        return f"Stage 3 ({self.algo.upper()}), {self.stem.name}"

    @property
    def verdict(self) -> str:
        """What training changed, in words."""
        return policy_verdict(self.metrics, self.problems)

    def path(self, ending: str) -> Path:
        """One of its files."""
        return Path(f"{self.stem}{ending}")


def finish_policy_run(run: PolicyRun, tracker: Tracker) -> None:
    """Writes the record, the pictures, the page and, with `--generate`, all responses; prints a few responses, a table
    and the paths of all files; closes the wandb run."""
    record = {"run": tracker.name, "stage": 3, "arguments": run.arguments, "seed": run.arguments["seed"]}
    record |= {
        "wandb": tracker.wandb_run,
        "versions": versions(),
        "held_out_prompts": len(run.held_out),
        "reward_head": run.head and str(run.head),
        "verdict": run.verdict,
        "metrics": run.metrics,
        "data": run.counts,
    }
    write_json(run.path(".json"), record)
    run.paths.append(run.path(".json"))
    values = {f"val/{when}_{key}": value for when, found in run.metrics.items() for key, value in found.items()}
    tracker.summary({**values, "verdict": run.verdict})
    if run.texts:
        _print_responses(run)
    pictures = write_pictures(run)
    tracker.log_pictures({f"report/{name}": path for name, (path, _) in pictures.items()})
    run.paths.append(write_page(policy_page(run, pictures), run.path("_report.html")))
    for adapter in (path for path in run.paths if (path / "adapter_config.json").is_file()):
        with atomic_path(adapter / "README.md") as temporary:
            temporary.write_text(run.card(adapter.name, run.on_card), encoding="utf-8")
    tracker.finish()
    print(f"{run.verdict}\n{format_written(run.paths)}")


def _print_responses(run: PolicyRun) -> None:
    """Prints the first responses and the table of metrics; with `--generate` writes all responses."""
    table = response_table(run)
    shown = SAMPLES_SHOWN if run.arguments["log_text"] or sys.stdout.isatty() else 0  # a file may be read by others
    for row in table.head(shown).to_dict("records"):
        answers = "".join(f"\n  {who + ':':7}{row[who]}" for who in ("human", *run.texts))
        print(f"\n…{row['prompt'][-160:]}{answers}")
    print(format_table(metric_rows(run.metrics), f"\n{run.title}, reward {run.reward}"))
    if run.arguments["generate"]:
        run.paths.append(run.path("_responses.csv"))
        with atomic_path(run.paths[-1], private=True) as temporary:
            table.to_csv(temporary, index=False)


def response_table(run: PolicyRun) -> pd.DataFrame:
    """The held-out prompts with the human's, the reference's and the tuned policy's answers."""
    prompts = {"prompt": [p.text for p in run.held_out], "human": [p.human for p in run.held_out]}
    return pd.DataFrame({**prompts, **run.texts})


def metric_rows(metrics: dict[str, dict]) -> list[dict]:
    """A row for each metric, with columns for the reference, the tuned policy, the gain and the human answers."""
    columns = {when: _with_interval(metrics.get(when, {})) for when in WHEN}
    return [
        {"on held-out prompts": key, **{when: column.get(key) for when, column in columns.items()}}
        for key in columns["before"]
    ]


def _with_interval(found: dict) -> dict:
    """The metrics, with the reward and its interval in one cell."""
    low, high = found.get("reward_low"), found.get("reward_high")
    shown = {key: value for key, value in found.items() if key not in ("reward_low", "reward_high")}
    if abs(shown.get("kl", 1.0)) < 1e-4:  # of the reference to itself: rounding
        shown["kl"] = 0.0
    if low is not None:
        shown["reward"] = f"{found['reward']:.3f} [{low:.3f}, {high:.3f}]"
    return shown


def write_pictures(run: PolicyRun) -> dict[str, tuple[Path, str]]:
    """Writes the pictures and adds their paths to the run's; returns name -> (PNG, caption)."""
    pictures, written = {}, []
    if run.steps:
        written += plots.ppo(pd.DataFrame(run.steps), run.path("_ppo.png"))
        caption = "Reward, KL, one against the other, response length and diversity, by training step."
        pictures["training"] = (run.path("_ppo.png"), caption)
    if "reward" in run.metrics.get("before", {}):
        written += plots.before_after(run.metrics, run.path("_before_after.png"))
        caption = f"Mean reward on {len(run.held_out)} held-out prompts."
        pictures["before_after"] = (run.path("_before_after.png"), caption)
    run.paths += written
    return pictures


def parts_of(run: PolicyRun) -> dict[str, float]:
    """Part -> seconds, with training divided into the parts of its steps, where they were recorded."""
    of_steps = {part: sum(row.get(name, 0.0) for row in run.steps) for name, part in PARTS.items()}
    if not any(of_steps.values()):
        return run.seconds
    rest = run.seconds.get("training", 0.0) - sum(of_steps.values())
    named = {f"training: {part}": seconds for part, seconds in of_steps.items()}
    others = {part: seconds for part, seconds in run.seconds.items() if part != "training"}
    return {**others, **named, "training: rest": max(0.0, rest)}


def policy_page(run: PolicyRun, pictures: dict[str, tuple[Path, str]]) -> Page:
    """The page of a run of stage 3."""
    summary = {
        "verdict": run.verdict, "policy": Path(run.arguments["model_name"]).name, "reward": run.reward,
        "algorithm": run.algo, "data": Path(run.arguments["data_dir"]).name, "seed": str(run.arguments["seed"]),
        "steps": str(len(run.steps)), "held-out prompts": str(len(run.held_out)),
    }  # fmt: skip
    sections = [Section("What changed", pictures=list(pictures.values()))]
    if run.metrics:
        note = "On held-out prompts; 95% intervals over conversations."
        sections.insert(0, Section("Measured", note, metric_rows(run.metrics)))
    if run.arguments["log_text"] and run.texts:
        shown = response_table(run).head(SAMPLES_SHOWN).to_dict("records")
        sections.append(Section("Responses", rows=[{**row, "prompt": f"…{row['prompt'][-160:]}"} for row in shown]))
    sections += [
        Section("Data", rows=[{"count": name, "value": str(value)} for name, value in run.counts.items()]),
        Section("Time", "Slowest part first.", seconds_table(parts_of(run))),
        Section("Options", "Those that differ from the defaults come first.",
                changed_options(run.arguments, run.defaults), folded=True),
        Section("Versions", rows=[{"package": k, "version": v} for k, v in versions().items()], folded=True),
    ]  # fmt: skip
    links = [(ancestor.label, ancestor.report) for ancestor in lineage(run.head)]
    return Page(f"{run.title}, run {run.arguments['exp_name']}", summary, links, sections, run.arguments["log_text"])
