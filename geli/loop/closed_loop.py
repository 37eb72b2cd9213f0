"""The closed loop: does a policy that is trained on a learned reward get better by a reward that no training saw?

A hidden reward is planted on a corpus' sentences. LI, GE and GELI heads are trained on it, and a policy is aligned with
each head. The hidden reward of its responses to held-out prompts is compared with that of the policy before. The hidden
reward itself as reward is the upper bound, a random reward the lower one.

Everything is run by the commands that users run, in processes of their own. What is finished is kept as small files and
not run again.
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from data_utils import DataOptions, load_prompts
from geli import plots
from geli.loop.hidden_reward import hidden_reward
from geli.nets.options import PolicyOptions
from geli.nets.policy import load_policy
from geli.rl.evaluation import evaluate_policy
from geli.run.console import format_table
from geli.run.distributed import make_accelerator, seed_everything
from geli.run.errors import UserError
from geli.run.files import atomic_path, read_json_or_empty, write_json
from models import PPO_PRESETS

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = "geli.loop.hidden_reward:score"
HEADS = ("GELI", "GE", "LI")
REWARDS = (*HEADS, "truth", "random")
BOOTSTRAP = 10_000  # repetitions


@dataclass(frozen=True)
class LoopOptions:
    """Options of the experiment; those of the commands are in `reward_commands` and `policy_command`.

    Attributes:
        out: folder of everything. data_dir: corpus in CANDOR's layout. encoder: hub id or folder, of the heads.
        policy: `--model_name`. seeds: of everything but the planted corpus. algorithms: of `--algo`; all rewards are
            tried with the first of them, GELI with all.
        steps: PPO steps. prompts: held-out prompts. device: `--device`.
        target_kl: nats a response; of each run the checkpoint is evaluated whose KL in training was closest to it.
    """

    out: Path
    data_dir: str
    encoder: str
    policy: str = "smollm2"
    seeds: tuple[int, ...] = (0, 1, 2)
    algorithms: tuple[str, ...] = ("ppo", "rloo", "grpo")
    steps: int = 40
    prompts: int = 256
    target_kl: float = 3.0
    device: str = "cpu"


class PolicyRun(NamedTuple):
    """A policy that is trained with a reward by an algorithm from a seed."""

    reward: str
    algo: str
    seed: int

    @property
    def name(self) -> str:
        """Part of the names of its files."""
        return f"{self.reward}-{self.algo}-{self.seed}"


def policy_runs(options: LoopOptions) -> Iterator[PolicyRun]:
    """All runs, seed by seed, so that a table can be made of what is there."""
    for seed in options.seeds:
        for reward in REWARDS:
            yield PolicyRun(reward, options.algorithms[0], seed)
        for algo in options.algorithms[1:]:
            yield PolicyRun(HEADS[0], algo, seed)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def run_command(options: LoopOptions, script: str, *arguments) -> None:
    """Runs one of the repository's commands; what it prints goes to `log.txt`.

    Raises:
        UserError: if it fails.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "log.txt"
    with open(log, "a", encoding="utf-8") as file:
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        print(f"$ {' '.join(command)}", file=file, flush=True)
        if subprocess.run(command, stdout=file, stderr=file, cwd=ROOT, check=False).returncode:
            raise UserError(f"{script} failed: see the end of {log}; the same command continues from what is finished")


def reward_commands(options: LoopOptions, seed: int) -> Iterator[tuple[str, list]]:
    """(name of the head, command) of the three reward runs of a seed, in order."""
    common = ["--data_dir", options.out / "candor", "--output_dir", options.out / "rewards", "--seed", seed, "--resume"]
    common += ["--context_turns", 6, "--train_size", 500, "--small_model_shrink", "--device", options.device, "--val"]
    li = ["--epochs", 3, "--batch_size", 32, "--learning_rate", 1e-4, "--lang_model_path", options.encoder]
    yield f"LI-{seed}", ["train_reward_LI_only.py", *common, *li]
    stage_2 = ["--train", "--epochs", 8, "--batch_size", 4, "--learning_rate", 5e-3, "--loss_scale", "normalized"]
    yield f"GE-{seed}", ["train_reward_GELI.py", *common, *stage_2, "--lang_model_path", options.encoder]
    yield f"GELI-{seed}", ["train_reward_GELI.py", *common, *stage_2, "--affect_path", f"LI-{seed}"]


def policy_command(options: LoopOptions, run: PolicyRun) -> list:
    """The stage-3 command of a run."""
    reward = {"truth": ["--reward_function", HIDDEN], "random": ["--reward", "random"]}.get(
        run.reward, ["--reward_path", head_path(options, run.reward, run.seed)]
    )
    return [
        "train_rl_GELI.py", "--train", "--preset", "small", "--prompt_format", "chat", "--model_name", options.policy,
        "--exp_name", run.name, "--steps", options.steps, "--algo", run.algo, "--seed", run.seed, *reward,
        "--gold_function", HIDDEN, "--data_dir", options.out / "candor", "--output_dir", options.out / "policies",
        "--context_turns", 6, "--device", options.device, *(["--resume"] if run.algo == "ppo" else []),
    ]  # fmt: skip


def head_path(options: LoopOptions, name: str, seed: int) -> Path | None:
    """The file of a trained head; None if it is not trained yet."""
    return next(iter((options.out / "rewards").glob(f"*/reward1_{name}-{seed}")), None)


# ---------------------------------------------------------------------------------------------------------------------
# The experiment


def closed_loop(options: LoopOptions) -> None:
    """Runs what is not finished yet, and writes the table and the picture."""
    if not (options.out / "candor" / "truth.csv").is_file():
        run_command(options, "tools/plant_truth.py", options.data_dir, options.out / "candor")
    for seed in options.seeds:
        for name, command in reward_commands(options, seed):
            if not list((options.out / "rewards").glob(f"*/reward1_{name}.json")):
                print(f"reward head {name} …", flush=True)
                run_command(options, *command, "--run_name", name)
    for run in policy_runs(options):
        if not result_path(options, run).is_file():
            print(f"policy {run.name} …", flush=True)
            if not (options.out / "policies" / "rlmf_weights" / f"{run.name}_{policy_name(options)}.json").is_file():
                run_command(options, *policy_command(options, run))
            run_command(options, "tools/closed_loop.py", *evaluation_arguments(options, run))
    write_report(options)


def policy_name(options: LoopOptions) -> str:
    """How stage 3 names the policy in its files."""
    return Path(options.policy).name


def result_path(options: LoopOptions, run: PolicyRun) -> Path:
    """The small file that a finished run leaves."""
    return options.out / "results" / f"{run.name}.json"


def evaluation_arguments(options: LoopOptions, run: PolicyRun) -> list:
    """Arguments of tools/closed_loop.py that evaluate one run in a process of its own."""
    return [
        options.out, "--data_dir", options.data_dir, "--encoder", options.encoder, "--policy", options.policy,
        "--prompts", options.prompts, "--target_kl", options.target_kl, "--steps", options.steps,
        "--device", options.device, "--evaluate", run.reward, run.algo, run.seed,
    ]  # fmt: skip


def checkpoint_at(steps: Sequence[dict], kls: int, target: float, saved: Sequence[int]) -> int:
    """The saved step whose KL in training, the mean of the `kls` steps up to it, is closest to `target`."""
    kl = {row["step"]: row["kl"] for row in steps}
    means = {step: np.mean([kl[s] for s in range(max(1, step - kls + 1), step + 1)]) for step in saved}
    return min(saved, key=lambda step: abs(means[step] - target))


def evaluate_run(options: LoopOptions, run: PolicyRun) -> None:
    """Samples responses to held-out prompts by the run's checkpoint at the target KL, and by the reference policy if
    no run of this seed did yet; writes both results."""
    seed_everything(run.seed)
    accelerator, preset = make_accelerator(options.device, "auto", "float32"), PPO_PRESETS["small"]
    data = DataOptions(str(options.out / "candor"), context_turns=6, train_size=None)
    cache = options.out / "policies" / "cache"
    _, prompts, _ = load_prompts(
        data, cache=cache, seed=run.seed, val_prompts=options.prompts, needs_training=False, needs_held_out=True
    )
    settings = PolicyOptions(model_name=options.policy)
    policy = load_policy(settings.source(cache), *settings.lora, torch.float32, prompt_format="chat")
    policy.to(accelerator.device)

    def evaluate() -> dict:
        metrics, texts = evaluate_policy(
            policy, None, prompts, accelerator, seed=run.seed, batch_size=32, mini_batch_size=8,
            min_new_tokens=preset.min_new_tokens, max_new_tokens=preset.max_new_tokens,
        )  # fmt: skip
        names = [prompt.name for prompt in prompts]
        return {**metrics, "prompts": names, "texts": texts, "gold": [hidden_reward(text) for text in texts]}

    reference = options.out / "results" / f"reference-{run.seed}.json"
    reference.parent.mkdir(exist_ok=True)
    if not reference.is_file():
        with policy.reference():
            human = [hidden_reward(prompt.human) for prompt in prompts]
            write_json(reference, evaluate() | {"human": human})
    stem = options.out / "policies" / "rlmf_weights" / f"{run.name}_{policy_name(options)}"
    steps = pd.read_csv(f"{stem}_steps.csv").to_dict("records")
    saved = sorted(int(p.name.rpartition("_")[2]) for p in stem.parent.glob(f"{stem.name}_[0-9]*") if p.is_dir())
    step = checkpoint_at(steps, 5, options.target_kl, saved)
    policy.load(f"{stem}_{step}")
    kept = [{key: row.get(key) for key in ("step", "kl", "score_mean", "gold_mean")} for row in steps]
    write_json(result_path(options, run), {**run._asdict(), "checkpoint": step, **evaluate(), "steps": kept})


# ---------------------------------------------------------------------------------------------------------------------
# The report


def interval(cells: dict[int, dict[str, list[float]]], seed: int = 0) -> tuple[float, float, float]:
    """Mean of a quantity and its 95% bootstrap interval over seeds and, within each, over conversations.

    Args:
        cells: seed -> conversation -> values of its prompts.
    """
    sums = [
        (np.array([sum(values) for values in part.values()]), np.array([len(values) for values in part.values()]))
        for part in cells.values()
    ]
    rng, means = np.random.default_rng(seed), np.empty(BOOTSTRAP)
    for i in range(BOOTSTRAP):
        total = count = 0.0
        for place in rng.integers(len(sums), size=len(sums)):
            values, sizes = sums[place]
            drawn = rng.integers(len(values), size=len(values))
            total, count = total + values[drawn].sum(), count + sizes[drawn].sum()
        means[i] = total / count
    mean = sum(values.sum() for values, _ in sums) / sum(sizes.sum() for _, sizes in sums)
    return float(mean), *np.quantile(means, [0.025, 0.975]).tolist()


def gains(reference: dict, result: dict) -> dict[str, list[float]]:
    """Conversation -> hidden reward of each response less that of the reference policy's to the same prompt."""
    found: dict[str, list[float]] = {}
    for name, before, after in zip(result["prompts"], reference["gold"], result["gold"], strict=True):
        found.setdefault(name.partition("/")[0], []).append(after - before)
    return found


def report_rows(options: LoopOptions) -> list[dict]:
    """A row for each reward and algorithm of which there are results."""
    results: dict[tuple[str, str], list[dict]] = {}
    for run in policy_runs(options):
        if found := read_json_or_empty(result_path(options, run)):
            results.setdefault((run.reward, run.algo), []).append(found)
    rows = []
    for (reward, algo), runs in results.items():
        references = {run["seed"]: _reference(options, run["seed"]) for run in runs}
        cells = {run["seed"]: gains(references[run["seed"]], run) for run in runs}
        mean, low, high = interval(cells)
        before = np.mean([np.mean(reference["gold"]) for reference in references.values()])
        row = {"reward": reward, "algorithm": algo, "seeds": len(runs), "hidden before": before}
        row |= {"hidden after": before + mean, "gain": f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"}
        for name in ("kl", "response_words", "ended_share", "distinct_2"):
            row[name] = float(np.mean([run[name] for run in runs]))
        rows.append(row)
    return rows


def _reference(options: LoopOptions, seed: int) -> dict:
    return read_json_or_empty(options.out / "results" / f"reference-{seed}.json")


def write_report(options: LoopOptions) -> None:
    """Prints the table, and writes it and the picture."""
    rows = report_rows(options)
    with atomic_path(options.out / "closed_loop.csv") as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False, float_format="%.4f")
    curves = {}
    for run in policy_runs(options):
        if (found := read_json_or_empty(result_path(options, run))) and run.algo == options.algorithms[0]:
            curves.setdefault(run.reward, []).append(found["steps"])
    picture = plots.closed_loop(curves, options.out / "closed_loop.png")
    print(format_table(rows, f"\nHidden reward of responses to {options.prompts} held-out prompts a seed"))
    print(f"Written:\n  {options.out / 'closed_loop.csv'}\n  {picture}")
