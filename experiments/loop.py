"""The closed loop: does a policy that is trained on a learned reward get better by a reward that no training saw?

A hidden reward is planted on a corpus' sentences. LI, GE and GELI heads are trained on it, and a policy is aligned with
each head. The hidden reward of its responses to held-out prompts is compared with that of the policy before. The hidden
reward itself as reward is the upper bound, a random reward the lower one.

Everything is run by the commands that users run, in processes of their own. What is finished is kept as small files and
not run again.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from data_utils import DataOptions, load_prompts
from experiments.best_of import BEST_OF, best_of, sample_responses
from experiments.commands import finished_head, run_command
from experiments.loop_options import LoopOptions
from experiments.loop_report import write_report
from geli.nets.options import PolicyOptions
from geli.nets.policy import load_policy
from geli.reward import GELIReward
from geli.rl.evaluation import evaluate_policy
from geli.rl.reward_functions import FunctionScorer
from geli.rl.rollout import RandomScorer
from geli.run.distributed import make_accelerator, seed_everything
from geli.run.files import read_json_or_empty, write_json
from models import PPO_PRESETS
from tools.hidden_reward import hidden_reward

HIDDEN = "tools.hidden_reward:score"
HEADS = ("GELI", "GE", "LI")
REWARDS = (*HEADS, "truth", "random")
CONTEXT_TURNS = 2  # of heads and policies: on CaSiNo more turns cost time and help no head
TRAIN_CONVERSATIONS = 980  # of the heads; CaSiNo has 1,030
STOP_AT = 1.4  # times the target KL: PPO goes past it, so that checkpoints on both sides are known
KL_WINDOW = 2  # training steps whose mean KL is taken for that of the checkpoint before them


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
    """All runs, in an order that gives tables early: every reward with the first algorithm, then the other algorithms,
    each seed by seed."""
    first, *others = options.algorithms
    for seed in options.seeds:
        for reward in REWARDS:
            yield PolicyRun(reward, first, seed)
    for seed in options.seeds:
        for algo in others:
            for reward in REWARDS if algo.startswith(BEST_OF) else HEADS[:1]:
                yield PolicyRun(reward, algo, seed)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def reward_commands(options: LoopOptions, seed: int) -> Iterator[tuple[str, list]]:
    """(name of the head, command) of the three reward runs of a seed, in order."""
    common = ["--data_dir", options.out / "candor", "--output_dir", options.out / "rewards", "--seed", seed, "--resume"]
    common += ["--context_turns", CONTEXT_TURNS, "--train_size", TRAIN_CONVERSATIONS, "--small_model_shrink"]
    common += ["--device", options.device, "--val"]
    li = ["--epochs", 1, "--batch_size", 32, "--learning_rate", 3e-5, "--lang_model_path", options.encoder]
    yield f"LI-{seed}", ["train_reward_LI_only.py", *common, *li]
    stage_2 = ["--train", "--epochs", 8, "--batch_size", 4, "--learning_rate", 5e-3]
    yield f"GE-{seed}", ["train_reward_GELI.py", *common, *stage_2, "--lang_model_path", options.encoder]
    geli = ["--affect_path", f"LI-{seed}", "--loss_scale", "normalized"]
    yield f"GELI-{seed}", ["train_reward_GELI.py", *common, *stage_2, *geli]


def policy_command(options: LoopOptions, run: PolicyRun) -> list:
    """The stage-3 command of a run."""
    reward = {"truth": ["--reward_function", HIDDEN], "random": ["--reward", "random"]}.get(
        run.reward, ["--reward_path", finished_head(options.out / "rewards", f"{run.reward}-{run.seed}")]
    )
    more = ["--resume", "--stop_kl", STOP_AT * options.target_kl, "--gold_function", HIDDEN]
    return [
        "train_rl_GELI.py", "--train", "--preset", "small", "--prompt_format", "chat", "--model_name", options.policy,
        "--exp_name", run.name, "--steps", options.steps, "--algo", run.algo, "--seed", run.seed, *reward,
        "--data_dir", options.out / "candor", "--output_dir", options.out / "policies",
        "--context_turns", CONTEXT_TURNS, "--save_steps", 1, "--device", options.device,
        "--dtype", options.dtype, *(more if run.algo == "ppo" else []),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The experiment


def closed_loop(options: LoopOptions) -> None:
    """Runs what is not finished yet, and writes the table and the picture."""
    if not (options.out / "candor" / "truth.csv").is_file():
        run_command(options.out, "tools/plant_truth.py", options.data_dir, options.out / "candor")
    for seed in options.seeds:
        for name, command in reward_commands(options, seed):
            if not finished_head(options.out / "rewards", name):
                print(f"reward head {name} …", flush=True)
                run_command(options.out, *command, "--run_name", name)
    for run in policy_runs(options):
        if not result_path(options, run).is_file():
            print(f"policy {run.name} …", flush=True)
            trained = options.out / "policies" / "rlmf_weights" / f"{run.name}_{policy_name(options)}.json"
            if not (run.algo.startswith(BEST_OF) or trained.is_file()):
                run_command(options.out, *policy_command(options, run))
            run_command(options.out, "experiments/closed_loop.py", *evaluation_arguments(options, run))
    finished = [found for run in policy_runs(options) if (found := read_json_or_empty(result_path(options, run)))]
    references = {seed: read_json_or_empty(reference_path(options, seed)) for seed in options.seeds}
    write_report(finished, references, options.out)


def policy_name(options: LoopOptions) -> str:
    """How stage 3 names the policy in its files."""
    return Path(options.policy).name


def result_path(options: LoopOptions, run: PolicyRun) -> Path:
    """The small file that a finished run leaves."""
    return options.out / "results" / f"{run.name}.json"


def reference_path(options: LoopOptions, seed: int) -> Path:
    """The small file with the reference policy's responses."""
    return options.out / "results" / f"reference-{seed}.json"


def evaluation_arguments(options: LoopOptions, run: PolicyRun) -> list:
    """Arguments of experiments/closed_loop.py that evaluate one run in a process of its own."""
    return [
        options.out, "--data_dir", options.data_dir, "--encoder", options.encoder, "--policy", options.policy,
        "--prompts", options.prompts, "--target_kl", options.target_kl, "--steps", options.steps,
        "--device", options.device, "--dtype", options.dtype, "--evaluate", run.reward, run.algo, run.seed,
    ]  # fmt: skip


def checkpoint_at(steps: Sequence[dict], target: float) -> int:
    """The step whose policy's KL is closest to `target`, judged by the mean KL of the next `KL_WINDOW` training steps,
    whose responses it and its successors gave; that of the last step by its own."""
    kl = [row["kl"] for row in steps]
    means = [np.mean(kl[place + 1 : place + 1 + KL_WINDOW] or kl[-1:]) for place in range(len(kl))]
    return steps[int(np.argmin(np.abs(np.array(means) - target)))]["step"]


def evaluate_run(options: LoopOptions, run: PolicyRun) -> None:
    """Samples responses to held-out prompts by the run's checkpoint at the target KL (of best-of-N: lets its reward
    choose), and by the reference policy if no run of this seed did yet; writes both results."""
    seed_everything(run.seed)
    accelerator, preset = make_accelerator(options.device, options.dtype, "float32"), PPO_PRESETS["small"]
    data = DataOptions(str(options.out / "candor"), context_turns=CONTEXT_TURNS, train_size=None)
    cache = options.out / "policies" / "cache"
    _, prompts, _ = load_prompts(
        data, cache=cache, seed=run.seed, val_prompts=options.prompts, needs_training=False, needs_held_out=True
    )
    settings = PolicyOptions(model_name=options.policy)
    frozen = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32  # as in stage 3
    policy = load_policy(settings.source(cache), *settings.lora, frozen, prompt_format="chat")
    policy.to(accelerator.device)
    lengths = {"min_new_tokens": preset.min_new_tokens, "max_new_tokens": preset.max_new_tokens}

    def evaluate() -> dict:
        metrics, texts, _ = evaluate_policy(
            policy, None, prompts, accelerator, seed=run.seed, batch_size=64, mini_batch_size=8, **lengths
        )
        names = [prompt.name for prompt in prompts]
        return {**metrics, "prompts": names, "texts": texts, "gold": [hidden_reward(text) for text in texts]}

    reference = reference_path(options, run.seed)
    reference.parent.mkdir(exist_ok=True)
    if not reference.is_file():
        with policy.reference():
            human = [hidden_reward(prompt.human) for prompt in prompts]
            write_json(reference, evaluate() | {"human": human})
    if run.algo.startswith(BEST_OF):
        folder, n = options.out / "samples" / str(run.seed), int(run.algo.removeprefix(BEST_OF))
        samples = sample_responses(policy, prompts, folder, n, seed=run.seed, batch_size=64, **lengths)
        found = best_of(samples, load_score(options, run), prompts)
        found["prompts"] = [prompt.name for prompt in prompts]
        write_json(result_path(options, run), {**run._asdict(), **found})
        return
    stem = options.out / "policies" / "rlmf_weights" / f"{run.name}_{policy_name(options)}"
    steps = pd.read_csv(f"{stem}_steps.csv").to_dict("records")
    step = checkpoint_at(steps, options.target_kl)
    policy.load(f"{stem}_{step}")
    kept = [{key: row.get(key) for key in ("step", "kl", "score_mean", "score_std", "gold_mean")} for row in steps]
    write_json(result_path(options, run), {**run._asdict(), "checkpoint": step, **evaluate(), "steps": kept})


def load_score(options: LoopOptions, run: PolicyRun) -> Callable:
    """(prompts, responses) -> rewards (n,) of a run, as in stage 3."""
    if run.reward == "truth":
        return FunctionScorer(HIDDEN, "--reward_function")
    if run.reward == "random":
        return RandomScorer(run.seed)
    path = finished_head(options.out / "rewards", f"{run.reward}-{run.seed}")
    return GELIReward.load(path, device=options.device, dtype=options.dtype, cache_size=0).score
