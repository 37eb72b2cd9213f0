"""The closed loop: does a policy that is trained on a learned reward get better by a reward that no training saw?

A hidden reward is planted on a corpus' sentences. LI, GE and GELI heads are trained on it, and a policy is aligned with
each head. The hidden reward of its responses to held-out prompts is compared with that of the policy before. The hidden
reward itself as reward is the upper bound, a random reward the lower one.

Everything is run by the commands that users run, in processes of their own. What is finished is kept as small files and
not run again.
"""

from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from data_utils import DataOptions, load_prompts
from experiments.best_of import BEST_OF, best_of, sample_responses
from experiments.commands import check_command, finished_head, run_command
from experiments.loop_options import SMALL, LoopOptions
from experiments.loop_report import write_report
from geli.nets.options import PolicyOptions
from geli.nets.policy import Policy, adapter_of, load_policy
from geli.reward import GELIReward
from geli.rl.evaluation import evaluate_policy
from geli.rl.reward_functions import FunctionScorer
from geli.rl.reward_options import ENSEMBLES
from geli.rl.rollout import RandomScorer
from geli.run.distributed import make_accelerator, seed_everything
from geli.run.errors import UserError
from geli.run.files import read_json_or_empty, write_json
from models import PPO_PRESETS
from tools.hidden_reward import hidden_reward

HIDDEN = "tools.hidden_reward:score"
CONTEXT_TURNS = 2  # of heads and policies: on CaSiNo more turns cost time and help no head
TRAIN_CONVERSATIONS = 980  # of the heads; CaSiNo has 1,030
HEADS = ("GE", "GELI")  # of stage 2
PUBLISHED = "-published"  # behind an algorithm: with the published settings in place of `--preset small`
ENSEMBLE = " --ensemble "  # behind best-of-N: how an ensemble's heads score, as in stage 3
LENGTHS = {name: getattr(PPO_PRESETS["small"], name) for name in ("min_new_tokens", "max_new_tokens")}
# Results are named by reward, algorithm and seed alone, so these are the same for all in a folder.
SETTINGS = ("data_dir", "encoder", "policy", "prompt_format", "steps", "save_steps", "prompts", "dtype")
PARTS = ("data_dir", "encoder")  # what the corpus, the policy and the heads are made of
# What the loop itself says of a run, or what must be the same for all rows of a table.
NOT_CHANGED = {f"--{name}" for name in (
    *LENGTHS, "sft_steps", "instruction", "prompt_format", "context_turns", "model_name", "data_dir", "seed", "algo",
    "exp_name", "run_name", "output_dir", "reward", "reward_path", "reward_function", "rf_model", "affect_path",
    "lang_model_path",
)}  # fmt: skip
LONGEST_NAME = 100  # characters of a run; file names that are made of it are longer, and 255 is the most
BATCH = 64  # prompts that are answered together when a policy is measured


def short_name(words: str) -> str:
    """Words as a part of file names: without spaces, and the end of many replaced by their hash."""
    name = words.replace(" ", "_")
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{sha256(name.encode()).hexdigest()[:8]}"


class PolicyRun(NamedTuple):
    """A policy that is trained with a reward by an algorithm from a seed."""

    reward: str
    algo: str
    seed: int

    @property
    def name(self) -> str:
        """Part of the names of its files."""
        return short_name(f"{self.reward}-{self.algo}-{self.seed}")

    @property
    def head(self) -> str:
        """Name of the run that trains its reward head."""
        return short_name(f"{self.reward}-{self.seed}")


def policy_runs(options: LoopOptions) -> Iterator[PolicyRun]:
    """All runs, in an order that gives tables early: each algorithm with every reward, seed by seed."""
    for algo in options.algorithms:
        for seed in options.seeds:
            for reward in options.rewards:
                yield PolicyRun(reward, algo, seed)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def head_commands(options: LoopOptions, run: PolicyRun) -> Iterator[tuple[str, list]]:
    """(name, command) of each head that a run's reward needs, in order: a GELI head continues from an LI head."""
    kind, *changed = run.reward.split()
    common = ["--data_dir", options.parts / "candor", "--output_dir", options.parts / "rewards", "--seed", run.seed]
    common += ["--context_turns", CONTEXT_TURNS, "--train_size", TRAIN_CONVERSATIONS, "--small_model_shrink"]
    common += ["--device", options.device, "--resume", "--val"]
    encoder, li = ["--lang_model_path", options.encoder], f"LI-{run.seed}"
    if kind in ("LI", "GELI"):
        stage_1 = ["--epochs", 1, "--batch_size", 32, "--learning_rate", 3e-5]
        yield li, ["train_reward_LI_only.py", *common, *stage_1, *encoder]
    if kind in ("GE", "GELI"):
        start = encoder if kind == "GE" else ["--affect_path", li, "--loss_scale", "normalized"]
        stage_2 = ["--train", "--epochs", 8, "--batch_size", 4, "--learning_rate", 5e-3]
        yield run.head, ["train_reward_GELI.py", *common, *stage_2, *start, *changed]


def policy_command(options: LoopOptions, run: PolicyRun) -> list:
    """The stage-3 command of a run."""
    reward = {"truth": ["--reward_function", HIDDEN], "random": ["--reward", "random"]}.get(
        run.reward, ["--reward_path", finished_head(options.parts / "rewards", run.head)]
    )
    name, *changed = run.algo.split()
    algo = name.removesuffix(PUBLISHED)
    preset = [] if name.endswith(PUBLISHED) else ["--preset", "small"]
    here = ["--resume", "--min_new_tokens", LENGTHS["min_new_tokens"]]  # of this project's own algorithms
    own = {"ppo": [*here, "--gold_function", HIDDEN], "distill": [*here, "--num_generations", 16]}
    return [
        "train_rl_GELI.py", "--train", *preset, "--prompt_format", prompt_format(options),
        "--model_name", policy_source(options), "--exp_name", run.name, "--steps", options.steps, "--algo", algo,
        "--seed", run.seed, *reward, "--data_dir", options.parts / "candor", "--output_dir", options.out / "policies",
        "--context_turns", CONTEXT_TURNS, "--save_steps", options.save_steps, "--device", options.device,
        "--dtype", options.dtype, "--max_new_tokens", LENGTHS["max_new_tokens"], *own.get(algo, []), *changed,
    ]  # fmt: skip


def policy_source(options: LoopOptions) -> str:
    """`--model_name` of the policies."""
    return str(options.parts / "models" / "policy") if options.policy == SMALL else options.policy


def prompt_format(options: LoopOptions) -> str:
    """`--prompt_format` of the policies."""
    return "raw" if options.policy == SMALL else options.prompt_format


# ---------------------------------------------------------------------------------------------------------------------
# The experiment


def closed_loop(options: LoopOptions) -> None:
    """Runs what is not finished yet, and writes tables and a picture of it and of all else that the folder has."""
    for run in policy_runs(options):
        check_run(options, run)
    check_folder(options)
    if not (options.parts / "candor" / "truth.csv").is_file():
        run_command(options.out, "tools/plant_truth.py", options.data_dir, options.parts / "candor")
    if options.policy == SMALL and not Path(policy_source(options)).is_dir():
        print("policy …", flush=True)
        run_command(
            options.out, "tools/tiny_models.py", options.parts / "candor", options.parts / "models", "--only", "policy"
        )
    for run in policy_runs(options):
        if not result_path(options, run).is_file():
            train_heads(options, run)
            print(f"policy {run.name} …", flush=True)
            if not (run.algo.startswith(BEST_OF) or Path(f"{stem_of(options, run)}.json").is_file()):
                run_command(options.out, *policy_command(options, run))
            run_command(options.out, "experiments/closed_loop.py", *evaluation_arguments(options, run))
    asked = [result_path(options, run) for run in policy_runs(options)]
    kept = sorted(path for path in asked[0].parent.glob("*.json") if not path.name.startswith("reference-"))
    others = [read_json_or_empty(path) for path in kept if path not in asked]
    others.sort(key=lambda run: LoopOptions.rewards.index(run["reward"].split()[0]))
    results = [*map(read_json_or_empty, dict.fromkeys(asked)), *others]
    references = {run["seed"]: read_json_or_empty(reference_path(options, run["seed"])) for run in results}
    write_report(results, references, options.out)


def check_run(options: LoopOptions, run: PolicyRun) -> None:
    """Raises a `UserError` for a reward or an algorithm that there is not, and for options that would be ignored, or
    make its name wrong; ends the program if its commands would refuse theirs."""
    kind, *changed = run.reward.split()
    if kind not in (*HEADS, "LI", "truth", "random"):
        raise UserError(f"--rewards {run.reward!r}: expected GELI, GE, LI, truth or random")
    if changed and kind not in HEADS:
        raise UserError(f"--rewards {run.reward!r}: only heads of stage 2, GE and GELI, can have options")
    name, *words = run.algo.split()
    if taken := sorted(NOT_CHANGED & {word.partition("=")[0] for word in (*changed, *words)}):
        raise UserError(f"{run.reward} by {run.algo}: {', '.join(taken)} must be the same for all policies here")
    commands = [command for _, command in head_commands(options, run)]
    if run.algo.startswith(BEST_OF):
        if not name.removeprefix(BEST_OF).isdecimal():
            raise UserError(f"--algorithms {run.algo!r}: expected a number of samples behind {BEST_OF}")
        if words and not (len(words) == 2 and words[0] == "--ensemble" and words[1] in ENSEMBLES and kind in HEADS):
            raise UserError(
                f"--algorithms {run.algo!r}, --rewards {run.reward!r}: expected no option but --ensemble "
                f"{' or '.join(ENSEMBLES)}, with GE or GELI"
            )
    else:
        commands.append(policy_command(options, run))
    for command in commands:
        check_command(*command)


def check_folder(options: LoopOptions) -> None:
    """Raises a `UserError` if what is in the folders was made with other settings, or `shared` is not of an earlier
    command; notes the settings in a new folder."""
    notes = {options.out / "options.json": SETTINGS, options.parts / "parts.json": PARTS}
    for path, names in notes.items():
        found = read_json_or_empty(path)
        if path.parent == options.shared and not found:
            raise UserError(f"--shared {options.shared}: expected an earlier command's folder, found no {path.name}")
        for name in names if found else ():
            if (value := getattr(options, name)) != found.get(name):
                raise UserError(f"--{name} {value}: {path.parent} was made with {found.get(name)}; name another folder")
    for path, names in notes.items():
        write_json(path, {name: getattr(options, name) for name in names})


def train_heads(options: LoopOptions, run: PolicyRun) -> None:
    """Trains the heads that the run's reward needs and that are not there yet."""
    for name, command in head_commands(options, run):
        if not finished_head(options.parts / "rewards", name):
            print(f"reward head {name} …", flush=True)
            run_command(options.out, *command, "--run_name", name)


def stem_of(options: LoopOptions, run: PolicyRun) -> Path:
    """How the paths of a policy's files begin."""
    return options.out / "policies" / "rlmf_weights" / f"{run.name}_{Path(policy_source(options)).name}"


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
        "--prompt_format", options.prompt_format, "--prompts", options.prompts, "--device", options.device,
        "--dtype", options.dtype, "--shared", options.parts, "--evaluate", run.reward, run.algo, run.seed,
    ]  # fmt: skip


def evaluate_run(options: LoopOptions, run: PolicyRun) -> None:
    """Samples responses to held-out prompts by each of the run's checkpoints (of best-of-N: lets its reward choose),
    and by the reference policy if no run of this seed did yet; writes both results."""
    seed_everything(run.seed)
    accelerator = make_accelerator(options.device, options.dtype, "float32")
    data = DataOptions(str(options.parts / "candor"), context_turns=CONTEXT_TURNS, train_size=None)
    cache = options.out / "policies" / "cache"
    _, prompts, _ = load_prompts(
        data, cache=cache, seed=run.seed, val_prompts=options.prompts, needs_training=False, needs_held_out=True
    )
    stem = stem_of(options, run)
    checkpoints = [] if run.algo.startswith(BEST_OF) else saved_steps(stem)
    adapter = adapter_of(f"{stem}_{checkpoints[-1]}", "the checkpoint") if checkpoints else PolicyOptions().adapter
    frozen = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32  # as in stage 3
    source = PolicyOptions(model_name=policy_source(options)).source(cache)
    policy = load_policy(source, adapter, frozen, prompt_format=prompt_format(options))
    policy.to(accelerator.device)

    def evaluate() -> dict:
        metrics, texts, _ = evaluate_policy(
            policy, None, prompts, accelerator, seed=run.seed, batch_size=BATCH, mini_batch_size=8, **LENGTHS
        )
        return {**metrics, "texts": texts, "gold": [hidden_reward(text) for text in texts]}

    names = [prompt.name for prompt in prompts]
    reference = reference_path(options, run.seed)
    reference.parent.mkdir(exist_ok=True)
    if not reference.is_file():
        with policy.reference():
            human = [hidden_reward(prompt.human) for prompt in prompts]
            found = {**evaluate(), "prompts": names, "said": [prompt.context for prompt in prompts], "human": human}
            write_json(reference, found, private=True)
    if run.algo.startswith(BEST_OF):
        some = prompts[: (len(prompts) + 1) // 2]
        folder, n = options.out / "samples" / str(run.seed), int(run.algo.removeprefix(BEST_OF).split()[0])
        samples = sample_responses(policy, some, folder, n, seed=run.seed, batch_size=BATCH, **LENGTHS)
        found = {"prompts": names[: len(some)], **best_of(samples, load_score(options, run), some)}
    else:
        found = {"prompts": names, **checkpoint_points(policy, stem, checkpoints, evaluate)}
    write_json(result_path(options, run), {**run._asdict(), **found}, private=True)


def checkpoint_points(policy: Policy, stem: Path, checkpoints: list[int], evaluate: Callable) -> dict:
    """`points`: each checkpoint's `step`, `kl`, `gold` of each response, and further metrics; the last one's `texts`;
    and the `steps` of training."""
    points = []
    for step in checkpoints:
        policy.load(f"{stem}_{step}")
        points.append({"step": step, **evaluate()})
    texts = [point.pop("texts") for point in points][-1]
    steps = pd.read_csv(f"{stem}_steps.csv").to_dict("records")
    kept = ("step", "kl", "score_mean", "score_std", "gold_mean", "gold_std", "efficiency", "seconds")
    steps = [{key: row[key] for key in kept if key in row and pd.notna(row[key])} for row in steps]
    return {"points": points, "texts": texts, "steps": steps}


def saved_steps(stem: Path) -> list[int]:
    """The steps after which a policy was saved, in order."""
    names = [path.name.removeprefix(f"{stem.name}_") for path in stem.parent.glob(f"{stem.name}_*")]
    return sorted(int(name) for name in names if name.isdecimal())


def load_score(options: LoopOptions, run: PolicyRun) -> Callable:
    """(prompts, responses) -> rewards (n,) of a run, as in stage 3."""
    if run.reward == "truth":
        return FunctionScorer(HIDDEN, "--reward_function")
    if run.reward == "random":
        return RandomScorer(run.seed)
    path, ensemble = finished_head(options.parts / "rewards", run.head), run.algo.partition(ENSEMBLE)[2] or "mean"
    return GELIReward.load(path, device=options.device, dtype=options.dtype, cache_size=0, ensemble=ensemble).score
