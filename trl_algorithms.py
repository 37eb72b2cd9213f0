"""`--algo rloo`, `--algo grpo` and `--sft_steps`: TRL's maintained trainers on our prompts, reward, LoRA and folders.

For users who outgrow the PPO loop: TRL brings vLLM rollouts and more through its own options (`--trl`).
"""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager

from cli import UserError
from models import MAX_NEW_TOKENS, Policy, load_pretrained
from ppo import MARKERS, PPOConfig, Prompt
from runs import first_line, progress_bar


def parse_options(words: Sequence[str]) -> dict:
    """`name=value` words as arguments of TRL's configuration; values are JSON where they can be, else text."""
    import json

    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise UserError(f"--trl {word}: expected name=value, such as use_vllm=true")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def train(
    algo: str, policy: Policy, prompts: Sequence[Prompt], score: Callable, on_step: Callable, *, steps: int,
    batch_size: int, learning_rate: float, seed: int, generations: int, max_new_tokens: int,
    options: Sequence[str] = (), processes: int = 1,
) -> None:  # fmt: skip
    """Trains `policy` in place.

    Args:
        algo: rloo (Ahmadian et al., 2024) or grpo (Shao et al., 2024).
        score: (prompts, responses) -> (n,) rewards.
        on_step: called with (step, what is logged) after each of `steps` steps.
        batch_size: responses a step of all processes, `generations` to each prompt.
        options: of TRL's configuration, `name=value`.

    Raises:
        UserError: for what TRL does not do or take.
    """
    try:
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    except ImportError as error:
        raise UserError(f"--algo {algo} needs TRL: pip install -r requirements-trl.txt ({first_line(error)})") from None
    if policy.has_encoder:
        raise UserError(f"--algo {algo}: TRL trains decoder-only models; use --algo ppo for this one")
    if batch_size % (generations * processes) or generations < 2:
        raise UserError(
            f"--batch_size {batch_size}: expected a multiple of --num_generations {generations}, which is 2 or more"
            + (f", times the {processes} processes" if processes > 1 else "")
        )
    kinds = {"rloo": (RLOOConfig, RLOOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}
    make_config, make_trainer = kinds[algo]

    def reward(prompts, completions, index, **_) -> list[float]:
        texts = [MARKERS.split(completion, maxsplit=1)[0].strip() for completion in completions]
        return score([chosen[i] for i in index], texts).tolist()

    class Report(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            if logs and "reward" in logs:
                on_step(state.global_step, _our_names(logs))

    chosen = list(prompts)
    rows = {"prompt": [_fitting(policy, prompt.text) for prompt in chosen], "index": list(range(len(chosen)))}
    with tempfile.TemporaryDirectory() as folder, _accelerate_kept():
        settings = dict(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=batch_size // processes,
            num_generations=generations,
            learning_rate=learning_rate, lr_scheduler_type="constant", max_completion_length=max_new_tokens, seed=seed,
            disable_dropout=True, gradient_checkpointing=False, beta=0.05, logging_steps=1, save_strategy="no",
            report_to=[], disable_tqdm=True, bf16=False, use_cpu=policy.device.type == "cpu",
        )  # fmt: skip
        try:
            config = make_config(**{**settings, **parse_options(options)})
        except (TypeError, ValueError) as error:
            raise UserError(f"--trl: TRL's {make_config.__name__} does not take this: {first_line(error)}") from None
        trainer = make_trainer(
            model=policy.model, reward_funcs=reward, args=config, train_dataset=Dataset.from_dict(rows),
            processing_class=policy.tokenizer, callbacks=[Report()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)  # a line of numbers a step; `on_step` has them
        trainer.train()
    policy.eval()


def _fitting(policy: Policy, text: str) -> str:
    """The text, cut as `Policy.tokenize` cuts it where it is too long."""
    if len(policy.tokenizer(text)["input_ids"]) <= policy.max_prompt_tokens:
        return text
    return policy.tokenizer.decode(policy.tokenize([text])[0][0], skip_special_tokens=True)


def _our_names(logs: dict) -> dict[str, float]:
    """What TRL logs, under the names that our own loop uses."""
    names = {
        "score_mean": "reward", "score_std": "reward_std", "kl": "kl", "entropy": "entropy", "policy_loss": "loss",
        "gradient_norm": "grad_norm", "response_length_mean": "completions/mean_length",
        "cut_at_length_share": "completions/clipped_ratio", "seconds": "step_time",
    }  # fmt: skip
    found = {ours: float(logs[theirs]) for ours, theirs in names.items() if theirs in logs}
    if "kl" in found and "response_length_mean" in found:
        found["kl"] *= found["response_length_mean"]  # theirs is a token's, ours a response's
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The warm start


def check_sft(name: str, batch_size: int, processes: int) -> None:
    """What can be known before any work: that TRL is there and takes this model and these batches.

    Raises:
        UserError: if not.
    """
    from transformers import AutoConfig

    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise UserError(f"--sft_steps needs TRL: pip install -r requirements-trl.txt ({first_line(error)})") from None
    if load_pretrained(AutoConfig, name, "--model_name").is_encoder_decoder:
        raise UserError(
            f"--sft_steps: TRL trains decoder-only models, and --model_name {name} is an encoder-decoder; leave it out"
        )
    if batch_size % processes:
        raise UserError(f"--sft_steps: expected --batch_size to be a multiple of the {processes} processes")


def sft(
    policy: Policy, prompts: Sequence[Prompt], on_step: Callable, *, steps: int, batch_size: int,
    learning_rate: float, seed: int, processes: int = 1,
) -> None:  # fmt: skip
    """Trains the adapter of `policy` in place on the humans' own answers to `prompts`, by TRL's SFTTrainer.

    Args:
        on_step: called with (step, loss) after each of `steps` steps; nats a token, of answers and end tokens alone.
        batch_size: answers a step, of all processes. learning_rate: at first; it falls linearly to 0.

    Raises:
        UserError: for what TRL does not take.
    """
    import numpy as np
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rng, order = np.random.default_rng(seed), []
    while len(order) < steps * batch_size:
        order += rng.permutation(len(prompts)).tolist()
    chosen = progress_bar(order[: steps * batch_size], desc="tokenising human answers", unit="answer")
    inputs, labels = zip(*(_example(policy, prompts[i]) for i in chosen), strict=True)
    # one forward pass takes as many as one of PPO's does
    mine = batch_size // processes
    together = max(n for n in range(1, PPOConfig.mini_batch_size + 1) if mine % n == 0)
    bar = progress_bar(total=steps, desc="stage 3 (SFT)", unit="step")

    class Report(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            if logs and "loss" in logs:
                bar.update()
                bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
                on_step(state.global_step, logs["loss"])

    with tempfile.TemporaryDirectory() as folder, _accelerate_kept(), bar:
        try:
            config = SFTConfig(
                output_dir=folder, max_steps=steps, per_device_train_batch_size=together,
                gradient_accumulation_steps=mine // together, learning_rate=learning_rate, seed=seed, max_length=None,
                train_sampling_strategy="sequential", gradient_checkpointing=False, logging_steps=1,
                logging_nan_inf_filter=False, save_strategy="no", report_to=[], disable_tqdm=True, bf16=False,
                use_cpu=policy.device.type == "cpu",
            )  # fmt: skip
            trainer = SFTTrainer(  # of tokens in memory, which TRL leaves as they are: no text gets into its caches
                model=policy.model, args=config, processing_class=policy.tokenizer, callbacks=[Report()],
                train_dataset=Dataset.from_dict({"input_ids": inputs, "labels": labels}),
            )  # fmt: skip
        except ValueError as error:
            raise UserError(f"--sft_steps: TRL's SFTTrainer does not take this: {first_line(error)}") from None
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    policy.model.config.use_cache = True  # the trainer turns it off, and it would be saved so
    policy.eval()


def _example(policy: Policy, prompt: Prompt) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, cut as the policy sees it, of the human's answer and the end token, and their labels: -100
    on the prompt. An answer that is longer than a response can be is cut there, and then does not end."""
    query = policy.tokenize([prompt.text])[0][0].tolist()
    alone = policy.tokenizer(prompt.text)["input_ids"]
    both = policy.tokenizer(f"{prompt.text} {prompt.human}")["input_ids"]
    if both[: len(alone)] == alone:
        answer = both[len(alone) :]
    else:  # a tokenizer that joins the prompt's end and the answer's beginning
        answer = policy.tokenizer(f" {prompt.human}", add_special_tokens=False)["input_ids"]
    if answer[-1:] != [policy.end]:
        answer = [*answer, policy.end]
    answer = answer[:MAX_NEW_TOKENS]
    return query + answer, [-100] * len(query) + answer


@contextmanager
def _accelerate_kept():
    """accelerate has one state a process: the trainer makes its own, and our loop then goes on with what it had."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    kept = [dict(state) for state in states]
    try:
        yield
    finally:
        for state, before in zip(states, kept, strict=True):
            state.clear()
            state.update(before)
