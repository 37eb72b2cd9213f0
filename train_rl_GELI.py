"""Stage 3: aligns a LoRA-adapted language model with a reward head by PPO.

    python train_rl_GELI.py --model_name llama --exp_name GELI --reward redistributed_reward --rf_model GELI \\
        --train --val --batch_size 24

Writes `rlmf_weights/{exp_name}_{model_name}_{step}/` every 10 steps: a PEFT adapter with tokenizer and value head.
"""

import re
from pathlib import Path
from typing import NamedTuple

from cli import (
    REWARD_CLASSES,
    UserError,
    add_common_options,
    cache_folder,
    count,
    file_name,
    new_parser,
    positive_float,
    positive_int,
    run,
)

# alias of `--model_name` -> hub id
POLICIES = {
    "llama2": "meta-llama/Llama-2-7b-chat-hf",
    "llama": "huggyllama/llama-7b",
    "cosmo": "allenai/cosmo-xl",
    "blenderbot-1b": "facebook/blenderbot-1B-distill",
    "blenderbot-400m": "facebook/blenderbot-400M-distill",
    "dialogpt": "microsoft/DialoGPT-large",
}
LOCAL_LLAMA = "./llama_hf"  # what `llama` means where it exists


class RewardChoice(NamedTuple):
    """A choice of `--rf_model`: patterns of the folders whose newest head is taken, how to make one, and the LI signal
    that the head must have learned from (None: any)."""

    folders: tuple[str, ...]
    command: str
    li_signal: str | None = None


_STAGE_2 = "train_reward_GELI.py --train --affect_path RUN"
RF_MODELS = {
    "GELI": RewardChoice(("visual_feedback_baselines_*",), _STAGE_2),
    "GE": RewardChoice(("baselines_*",), "train_reward_GELI.py --train"),
    "LI": RewardChoice(("*reward_function_*",), "train_reward_LI_only.py"),
    "sentiment": RewardChoice(
        ("*reward_function_*", "visual_feedback_baselines_*"),
        "train_reward_LI_only.py --li_signal sentiment",
        "sentiment",
    ),
    **{
        f"VFRRD_{short}": RewardChoice(
            (f"visual_feedback_baselines_*_{name}_baseline_*",), f"{_STAGE_2} --reward_class {name}"
        )
        for short, name in {
            "funny": "you_are_funny",
            "intelligent": "you_are_intelligent",
            "humble": "you_are_humble",
            "sync": "our_thoughts_synced_up_sr1",
        }.items()
    },
}
BASE = "base"  # the choice without training: the reference policy, measured with GELI's reward
SAVE_EVERY = 10  # steps
SAMPLES_SHOWN = 3


def build_parser():
    """The options."""
    parser = new_parser("Stage 3: align a language model with a reward head by PPO.")
    add = parser.add_argument
    add("--model_name", default="llama", help=f"the policy: {', '.join(POLICIES)}, or any hub id or folder")
    add("--exp_name", type=file_name, default="GELI", help="names the output: rlmf_weights/EXP_MODEL_STEP")
    add(
        "--reward",
        choices=("redistributed_reward", "random"),
        default="redistributed_reward",
        help="the turn reward of --rf_model, or a random number (a control: nothing should be learned)",
    )
    add(
        "--rf_model",
        choices=(*RF_MODELS, BASE),
        default="GELI",
        help="which newest reward head under --output_dir is used; base: no training, the reference policy",
    )
    add("--reward_path", metavar="HEAD", help="one reward head instead: a run name or the path of a reward1_ file")
    add("--lang_model_path", help="encoder of a published head, which records none; of others their own is used")
    add("--train", action="store_true", help="train")
    add("--val", action="store_true", help="measure the mean reward on held-out prompts, before and after")
    add("--generate", action="store_true", help="write the base and the tuned policy's responses to held-out prompts")
    add(
        "--algo",
        choices=("ppo", "rloo", "grpo"),
        default="ppo",
        help="ppo is this repository's own loop; rloo and grpo are TRL's trainers",
    )
    add("--num_generations", type=positive_int, default=4, help="rloo, grpo: responses to each prompt of a step")
    add("--trl", nargs="+", metavar="NAME=VALUE", help="rloo, grpo: options of TRL's configuration, as use_vllm=true")
    add(
        "--sft_steps",
        type=count,
        default=0,
        help="with --train: first so many steps on the human answers by TRL's SFTTrainer; the reference policy is then "
        "the model that they lead to",
    )
    add("--sft_learning_rate", type=positive_float, default=1e-4, help="of --sft_steps at first; it falls to 0")
    add("--ppo_off", action="store_true", help="with --train: roll out and score, without updates")
    add("--val_prompts", type=positive_int, default=96, help="how many held-out prompts")
    add("--batch_size", type=positive_int, default=24, help="prompts a step; of rloo and grpo responses")
    add("--steps", type=positive_int, default=200, help="PPO steps")
    add("--train_size", type=positive_int, help="training conversations (default: all there are)")
    add(
        "--reward_class",
        choices=REWARD_CLASSES,
        default="overall_affect",
        metavar="CLASS",
        help="only people who answered this survey question give prompts",
    )
    add("--peft", action="store_true", help="accepted for the published commands; LoRA is always on")
    add("--no_accel", action="store_true", help="one device, with LoRA r=24 alpha=48 instead of r=16 alpha=32")
    add("--run_name", type=file_name, help="name of the wandb run (default: wandb's, or one like it)")
    add_common_options(parser, learning_rate=1.4e-5, context_turns=10, save_steps=10)
    return parser


def parse():
    """The command line."""
    parser = build_parser()
    args = parser.parse_args()
    if not (args.train or args.val or args.generate):
        parser.error("nothing to do: give --train, --val or --generate")
    if args.algo == "ppo" and args.trl:
        parser.error("--trl are options of TRL's trainers: give --algo rloo or --algo grpo")
    if not args.log_text:
        for word in args.trl or ():  # what prompts and responses would leave the machine by
            if word.partition("=")[0].startswith(("report_to", "log_completions", "push_to_hub", "hub_")):
                parser.error(f"--trl {word}: it can send conversations elsewhere: give --log_text if they may")
    if args.algo != "ppo" and args.ppo_off:
        parser.error("--ppo_off is for --algo ppo")
    if args.ppo_off and not args.train:
        parser.error("--ppo_off is how --train rolls out without updates: give --train")
    if args.resume and not args.train:
        parser.error("--resume goes on with training: give --train")
    if args.resume and args.algo != "ppo":
        parser.error(f"--resume is for --algo ppo: TRL's {args.algo} keeps no state that training could go on from")
    if args.sft_steps and not args.train:
        parser.error("--sft_steps is how --train begins: give --train")
    if args.sft_steps and args.ppo_off:
        parser.error("--ppo_off updates nothing, and --sft_steps does: give one of them")
    if args.rf_model == BASE:
        if not (args.val or args.generate or args.sft_steps):
            parser.error("--rf_model base is the reference policy, which is not trained: give --val or --generate")
        if args.train:
            print(f"--rf_model base is the reference policy: {'no RL' if args.sft_steps else 'nothing is trained'}")
        args.train = False
    return args


def main() -> None:
    """Parse, build, train, evaluate, write."""
    args = parse()

    from accelerate.utils import broadcast_object_list

    from runs import Tracker, is_writer, make_accelerator, seed_everything
    from states import claim_to_resume

    seed_everything(args.seed)
    accelerator = make_accelerator(args.device, args.dtype, cpu_dtype="float32")
    if args.no_accel and accelerator.num_processes > 1:
        raise UserError("--no_accel is for one device: expected one process, found several; start it with python")
    start = policy_name(args)
    if args.sft_steps:
        from trl_algorithms import check_sft

        check_sft(start, args.batch_size, accelerator.num_processes)
    folder = Path(args.output_dir) / "rlmf_weights"
    stem = f"{args.exp_name}_{Path(args.model_name).name}"
    warm = folder / f"{stem}_sft"
    tuned = args.rf_model != BASE and not args.ppo_off  # whether there is a policy besides the reference
    if args.ppo_off:
        stem += "_ppo_off"
    claim = None
    if args.resume:
        end = "_base.json" if args.rf_model == BASE else ".json"
        claim = claim_to_resume(args, folder, outputs_of, lambda name: folder / f"{name}{end}", stem)
    begun = broadcast_object_list([claim.description if claim else {}])[0]  # how it was started, if it is resumed
    scored = args.train or args.val
    head_path = find_reward(args, begun) if scored and args.reward == "redistributed_reward" else None
    prompts, held_out, counts = load_prompts(args)
    checkpoint = None
    if tuned and not args.train:
        checkpoint = newest_checkpoint(folder, stem)
        start = base_of(checkpoint, warm) or start
    score = build_score(args, accelerator, head_path) if scored else None
    warmed = bool(begun) and args.sft_steps and warm.is_dir()
    if warmed:
        start = str(warm.resolve())
        seed_everything(args.seed)  # as `warm_start` does
    policy = build_policy(args, accelerator, start)
    if not begun and (args.train or args.sft_steps) and is_writer():
        claim = claim_outputs(folder, stem, claim)
    if args.rf_model == BASE:
        stem += "_base"
    if checkpoint:
        policy.load(checkpoint)
        stem = f"{checkpoint.name}_val"
    described = {**vars(args), "data": counts, "reward_head": head_path and str(head_path)}
    tracker = Tracker("rlmf", folder, described, args.run_name, accelerator, claim)
    paths = []
    if args.sft_steps:
        if not warmed:
            policy = warm_start(args, accelerator, policy, prompts, tracker, warm)
        tracker.offset = args.sft_steps
        paths.append(warm)
    ppo = build_ppo(args, accelerator, policy, score)

    metrics, texts = {}, {}
    look = args.val or args.generate
    if look:
        with policy.reference():
            metrics["before"], texts["base"] = ppo.evaluate(held_out, args.seed)
    if args.val:
        human = ppo.score_together(held_out, [p.human for p in held_out])
        metrics["human"] = {"reward": human.mean().item()}
    if args.train:
        recorder = Recorder(args, ppo, tracker, folder, stem)
        if args.algo == "ppo":
            train(args, ppo, prompts, recorder, inputs_of(prompts, head_path))
        else:
            train_by_trl(args, ppo, prompts, recorder)
        paths += recorder.finish()
    if look and tuned:
        metrics["after"], texts["tuned"] = ppo.evaluate(held_out, args.seed)
    paths += report(args, tracker, folder, stem, head_path, counts, metrics, texts, held_out)
    tracker.finish()
    print("\n".join(["Written:", *(f"  {path}" for path in paths)]))


def find_reward(args, begun: dict) -> Path:
    """The reward head's file: `--reward_path`, or the newest of `--rf_model`'s kind (of a resumed run the one that it
    has `begun` with); says which it took."""
    from models import load_reward_head
    from train_reward_GELI import find_head, saved_heads

    known = begun.get("arguments", {}).get("reward_head")
    if known:
        path = Path(known)
    elif args.reward_path:
        path = find_head(args.reward_path, args.output_dir)
    else:
        name = "GELI" if args.rf_model == BASE else args.rf_model
        choice = RF_MODELS[name]
        found = [path for pattern in choice.folders for path in saved_heads(args.output_dir, pattern)]
        if choice.li_signal:
            found = [path for path in found if load_reward_head(path).config.li_signal == choice.li_signal]
        if not found:
            raise UserError(
                f"--rf_model {args.rf_model}: expected a reward head {' or '.join(choice.folders)}/reward1_RUN under "
                f"{args.output_dir}, found none; train one with {choice.command}, or name one with --reward_path"
            )
        path = max(found, key=lambda p: (p.stat().st_mtime_ns, p.name))
    config = load_reward_head(path).config
    learned = f"LI from the {config.li_signal}" if config.li else "no LI"
    print(
        f"Reward head: {path} (stage {config.stage}, {config.redist_type or 'no decomposition'}, {learned}, "
        f"{config.reward_class or 'class not recorded'})"
    )
    return path


def load_prompts(args):
    """Training prompts, held-out prompts (a seeded choice), and the counts of what was read."""
    import numpy as np

    from data_utils import prompt_text, read_corpus, split, turn_text
    from ppo import Prompt

    corpus = read_corpus(args.data_dir, args.reward_class, args.transcript, cache_folder(args))
    print(corpus.describe())

    def prompts_of(trajectories):
        for trajectory in trajectories:
            turns = tuple(
                turn_text(trajectory.conversation, i, trajectory.user, args.context_turns)
                for i in trajectory.agent_turns
            )
            for position, (context, response) in enumerate(turns):
                human = response.removeprefix("AI: ")
                name = trajectory.turn_name(position)
                yield Prompt(prompt_text(context), context, human, turns, position, name)

    training, validation = (
        list(prompts_of(part)) for part in split(corpus, args.train_size or len(corpus.conversations))
    )
    chosen = np.random.default_rng(args.seed).permutation(len(validation))[: args.val_prompts]
    held_out = [validation[i] for i in chosen]
    print(f"prompts: {len(training):,} for training, {len(held_out):,} of {len(validation):,} held out for validation")
    looks = args.val or args.generate
    trains = args.train or args.sft_steps
    for name, part, needed in (("training", training, trains), ("held-out", held_out, looks)):
        if needed and not part:
            raise UserError(
                f"--data_dir {args.data_dir}: no {name} prompt in {len(corpus.conversations)} conversations"
            )
    return training, held_out, corpus.numbers()


def policy_name(args) -> str:
    """The hub id or folder of the policy that the options name."""
    if args.model_name == "llama" and Path(LOCAL_LLAMA).is_dir():
        return LOCAL_LLAMA
    return POLICIES.get(args.model_name, args.model_name)


def build_policy(args, accelerator, name: str):
    """The policy `name` with a fresh adapter, on its device; frozen weights in bfloat16 on a GPU, in float32
    elsewhere."""
    import torch

    from models import load_policy
    from sharding import spread

    rank, alpha = (24, 48) if args.no_accel else (16, 32)
    half = accelerator.mixed_precision == "bf16"
    dtype = torch.bfloat16 if half else torch.float32
    policy = spread(load_policy(name, rank, alpha, dtype, args.trust_remote_code), accelerator)
    if policy.agree and (args.algo != "ppo" or args.sft_steps):
        option = "--sft_steps" if args.sft_steps else f"--algo {args.algo}"
        raise UserError(f"{option}: TRL does not train a policy that is spread; use --algo ppo alone, or whole copies")
    return policy


def build_score(args, accelerator, head_path: Path | None):
    """(prompts, responses) -> rewards (n,): by the head at `head_path`, or random numbers."""
    from models import load_encoder_of_head, load_reward_head
    from ppo import RandomScorer, RewardScorer
    from runs import frozen_dtype

    if head_path is None:
        return RandomScorer(args.seed + accelerator.process_index)
    head = load_reward_head(head_path, accelerator.device)
    max_length = min(args.max_length, head.config.max_length)
    how = (frozen_dtype(accelerator), args.trust_remote_code)
    encoder = load_encoder_of_head(head, head_path, max_length, args.lang_model_path, *how)
    return RewardScorer(encoder.to(accelerator.device), head, accelerator.autocast)


def build_ppo(args, accelerator, policy, score):
    """The loop."""
    from ppo import PPO, PPOConfig

    config = PPOConfig(learning_rate=args.learning_rate, batch_size=args.batch_size)
    return PPO(policy, score, config, accelerator, args.seed)


def outputs_of(stem: str) -> re.Pattern:
    """What the names of a run's files look like."""
    return re.compile(re.escape(stem) + r"(_sft|_\d+|(_\d+_val|_base)?(\.json|_responses\.csv)|_steps\.csv|_ppo\.png)")


def claim_outputs(folder: Path, stem: str, claim=None):
    """The claim on the names of a new run's files (or `claim`, of a run that died before it began); an earlier run's
    outputs of these names are moved aside."""
    from states import Claim

    # an earlier run's states are here until it is finished
    claim = claim or Claim(folder, stem, outputs_of(stem), resume=True)
    set_aside(folder, stem, claim)
    return claim


def warm_start(args, accelerator, policy, prompts, tracker, folder: Path):
    """Trains `policy` on the human answers and writes it, whole, to `folder`; returns the policy to go on with, which
    is read from there and has a fresh adapter: its reference is what was written."""
    import math

    import trl_algorithms
    from runs import seed_everything

    losses = []

    def on_step(step, loss):
        if not math.isfinite(loss):
            raise UserError(f"--sft_steps: the loss of step {step} is {loss}; try a lower --sft_learning_rate")
        losses.append(loss)
        tracker.log({"sft/loss": loss}, step)

    trl_algorithms.sft(
        policy, prompts, on_step, steps=args.sft_steps, batch_size=args.batch_size, seed=args.seed,
        learning_rate=args.sft_learning_rate, processes=accelerator.num_processes,
    )  # fmt: skip
    policy.save_merged(folder)
    accelerator.wait_for_everyone()
    tenth = math.ceil(len(losses) / 10)
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    print(f"SFT: {first:.2f} nats a token in the first tenth of its steps, {last:.2f} in the last: {folder}")
    seed_everything(args.seed)  # dropout has drawn, in every process otherwise: adapters begin the same
    return build_policy(args, accelerator, str(folder.resolve()))


def base_of(checkpoint: Path, warm: Path) -> str | None:
    """The warm-started model `warm` where the checkpoint's adapter was trained on one of its name."""
    from models import recorded_base

    if Path(recorded_base(checkpoint, "--val")).name != warm.name:
        return None
    if not warm.is_dir():
        raise UserError(f"{checkpoint} was trained on {warm}, which is not there: put it back, or train again")
    return str(warm.resolve())


def set_aside(folder: Path, stem: str, claim) -> None:
    """Moves an earlier run's outputs of the same names into `rlmf_weights/{stem}.earlier-{k}/`, so nothing is lost; if
    it never finished, its states too. Adapters are told where the warm-started model that they belong to now is."""
    import json

    from models import recorded_base
    from runs import write_json

    earlier = sorted(p for p in folder.glob("*") if outputs_of(stem).fullmatch(p.name))
    states = claim.unfinished()
    if not earlier and not states:
        return
    k = 1
    while (aside := folder / f"{stem}.earlier-{k}").exists():
        k += 1
    for path in [*earlier, *states]:
        place = aside / claim.folder.name if path in states else aside
        place.mkdir(parents=True, exist_ok=True)
        config = path / "adapter_config.json"
        if config.is_file() and Path(recorded_base(path, "--train")).name == f"{stem}_sft":
            moved = {"base_model_name_or_path": str((aside / f"{stem}_sft").resolve())}
            write_json(config, json.loads(config.read_text(encoding="utf-8")) | moved)
        path.rename(place / path.name)
    claim.description = {}
    what = f"{len(earlier)} outputs of these names" + (" and its states (it never finished)" if states else "")
    print(f"An earlier run's {what} are now in {aside}")


def newest_checkpoint(folder: Path, stem: str) -> Path:
    """The checkpoint of the most steps."""
    steps = [p.name.removeprefix(f"{stem}_") for p in folder.glob("*") if p.name.startswith(f"{stem}_")]
    steps = [int(step) for step in steps if step.isascii() and step.isdecimal()]
    if not steps:
        raise UserError(f"--val without --train: expected a checkpoint {folder}/{stem}_STEP, found none; add --train")
    return folder / f"{stem}_{max(steps)}"


class Recorder:
    """What a training run leaves behind: a row a step, a checkpoint every 10, words when something is wrong.

    Args:
        args: the options. ppo: the loop, whose policy is saved. folder, stem: where, and the names' beginning.
    """

    def __init__(self, args, ppo, tracker, folder: Path, stem: str):
        from runs import progress_bar

        self.args, self.ppo, self.tracker, self.folder, self.stem = args, ppo, tracker, folder, stem
        self.rows: list[dict] = []
        self.checkpoint: Path | None = None
        self._said: set[str] = set()
        self._bar = progress_bar(total=args.steps, desc=f"stage 3 ({args.algo.upper()})", unit="step")

    def state_dict(self) -> dict:
        """What was logged and said so far."""
        return {"rows": self.rows, "said": sorted(self._said), "checkpoint": self.checkpoint and str(self.checkpoint)}

    def load_state_dict(self, state: dict) -> None:
        """Goes on behind it."""
        self.rows, self._said = state["rows"], set(state["said"])
        self.checkpoint = state["checkpoint"] and Path(state["checkpoint"])
        self._bar.update(len(self.rows))

    def step(self, step: int, logged: dict[str, float]) -> None:
        """Takes in what a step logged.

        Raises:
            UserError: if some of it is not finite.
        """
        import numpy as np

        from ppo import diagnose

        self.rows.append({"step": step, **logged})
        self._bar.update()
        self._bar.set_postfix(reward=f"{logged['score_mean']:.3f}", kl=f"{logged.get('kl', 0):.2f}", refresh=False)
        if not np.isfinite(list(logged.values())).all():
            bad = ", ".join(key for key, value in logged.items() if not np.isfinite(value))
            raise UserError(
                f"not finite at step {step}: {bad}; try a lower --learning_rate (last checkpoint: {self.checkpoint})"
            )
        self.tracker.log({f"ppo/{key}": value for key, value in logged.items()}, step)
        for trouble in diagnose(self.rows, self.ppo.config):
            kind = trouble.split(":")[0].split(" (")[0]
            if kind not in self._said:  # once a run
                self._said.add(kind)
                self._bar.write(f"Step {step}: {trouble}.")
        if step % SAVE_EVERY == 0 or step == self.args.steps:
            self._save(step)

    def _save(self, step: int) -> None:
        import pandas as pd

        from runs import atomic_path

        if not self.args.ppo_off:
            self.checkpoint = self.folder / f"{self.stem}_{step}"
            self.ppo.policy.save(self.checkpoint)
        with atomic_path(self.folder / f"{self.stem}_steps.csv") as temporary:
            pd.DataFrame(self.rows).to_csv(temporary, index=False, float_format="%.6g")

    def finish(self) -> list[Path]:
        """Draws the picture; the paths of what was written."""
        import pandas as pd

        import plots

        self._bar.close()
        picture = plots.ppo(pd.DataFrame(self.rows), self.folder / f"{self.stem}_ppo.png")
        return [*([self.checkpoint] if self.checkpoint else []), self.folder / f"{self.stem}_steps.csv", picture]


def inputs_of(prompts, head_path: Path | None) -> dict[str, str]:
    """Hashes of what a run learns from; a run is resumed on the same only."""
    import hashlib

    found = hashlib.blake2b(digest_size=16)
    for p in prompts:
        found.update(repr((p.name, p.text, p.human)).encode("utf-8", "surrogateescape"))
    head = head_path.read_bytes() if head_path else b""
    return {"prompts": found.hexdigest(), "reward head": hashlib.blake2b(head, digest_size=16).hexdigest()}


def train(args, ppo, prompts, recorder: Recorder, inputs: dict[str, str]) -> None:
    """PPO steps over shuffled prompts."""
    import numpy as np
    import pandas as pd

    from ppo import NotFinite
    from states import RunState

    rng = np.random.default_rng(args.seed)
    ahead: dict[str, list[int]] = {"order": []}
    generators = {"prompts": rng, "lengths": ppo.rng, "sampling": ppo.sampling}
    if args.reward == "random":
        generators["reward"] = ppo.score.generator
    state = RunState(
        recorder.tracker, ppo.accelerator, {"ppo": ppo, "recorder": recorder, "ahead": ahead}, generators, inputs,
        args.save_steps, args.steps, keep_copy=True,
    )  # fmt: skip
    with state.watch():
        for step in range(state.restore() + 1, args.steps + 1):
            while len(ahead["order"]) < args.batch_size:
                ahead["order"] = ahead["order"] + rng.permutation(len(prompts)).tolist()
            batch = [prompts[i] for i in ahead["order"][: args.batch_size]]
            ahead["order"] = ahead["order"][args.batch_size :]
            try:
                logged, texts = ppo.step(batch, update=not args.ppo_off)
            except NotFinite as error:
                state.not_finite(str(error), step, [p.name for p in batch])
            if args.log_text:
                table = pd.DataFrame({"prompt": [p.text for p in batch], "response": texts})
                recorder.tracker.log_table("ppo/responses", table, step)
            recorder.step(step, logged)
            state.done(step)


def train_by_trl(args, ppo, prompts, recorder: Recorder) -> None:
    """RLOO or GRPO steps by TRL's trainer."""
    import trl_algorithms
    from models import MAX_NEW_TOKENS

    trl_algorithms.train(
        args.algo, ppo.policy, prompts, ppo.score, recorder.step, steps=args.steps, batch_size=args.batch_size,
        learning_rate=args.learning_rate, seed=args.seed, generations=args.num_generations,
        max_new_tokens=MAX_NEW_TOKENS, options=args.trl or (), processes=ppo.accelerator.num_processes,
    )  # fmt: skip


def report(args, tracker, folder: Path, stem: str, head_path: Path, counts, metrics, texts, held_out) -> list[Path]:
    """Prints the table and a few responses, and writes the run's record and, with `--generate`, all responses; returns
    the paths of what was written.

    Args:
        metrics: `before` (the reference), `after` (the tuned policy) and `human`, where measured.
        texts: responses of `base` and `tuned` to the `held_out` prompts, where generated.
    """
    import pandas as pd

    from runs import atomic_path, format_table, versions, write_json

    record = {"run": tracker.name, "stage": 3, "arguments": vars(args), "seed": args.seed, "versions": versions()}
    record |= {
        "held_out_prompts": len(held_out),
        "reward_head": head_path and str(head_path),
        "metrics": metrics,
        "data": counts,
    }
    paths = [folder / f"{stem}.json"]
    write_json(paths[0], record)
    if not texts:
        return paths
    tracker.summary({f"val/{when}_{key}": value for when, found in metrics.items() for key, value in found.items()})
    table = pd.DataFrame({"prompt": [p.text for p in held_out], "human": [p.human for p in held_out], **texts})
    for row in table.head(SAMPLES_SHOWN).to_dict("records"):
        answers = "".join(f"\n  {who + ':':7}{row[who]}" for who in ("human", *texts))
        print(f"\n…{row['prompt'][-160:]}{answers}")
    before, after = metrics["before"], metrics.get("after", {})
    rows = [{"on held-out prompts": key, "before": before[key], "after": after.get(key)} for key in before]
    if "human" in metrics:
        human = metrics["human"]["reward"]
        rows.append({"on held-out prompts": "reward of the human answers", "before": human, "after": None})
    reward = head_path.name if head_path else args.reward if args.val else "not measured"
    print(format_table(rows, f"\nStage 3 (PPO), {stem}, reward {reward}"))
    if args.generate:
        paths.append(folder / f"{stem}_responses.csv")
        with atomic_path(paths[-1]) as temporary:
            temporary.touch(mode=0o600)  # conversations: for their owner only
            table.to_csv(temporary, index=False)
    return paths


if __name__ == "__main__":
    run(main)
