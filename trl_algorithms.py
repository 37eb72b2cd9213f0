"""`--algo rloo` and `--algo grpo`: stage 3 by TRL's maintained trainers, with our prompts, reward, LoRA and folders.

For users who outgrow the PPO loop: TRL brings vLLM rollouts and spread-out models through its own options (`--trl`).
"""

import tempfile
from collections.abc import Callable, Sequence

from cli import UserError
from models import Policy
from ppo import MARKERS, Prompt
from runs import first_line


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
    options: Sequence[str] = (),
) -> None:  # fmt: skip
    """Trains `policy` in place.

    Args:
        algo: rloo (Ahmadian et al., 2024) or grpo (Shao et al., 2024).
        score: (prompts, responses) -> (n,) rewards.
        on_step: called with (step, what is logged) after each of `steps` steps.
        batch_size: responses a step, `generations` to each prompt. options: of TRL's configuration, `name=value`.

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
    if batch_size % generations or generations < 2:
        raise UserError(
            f"--batch_size {batch_size}: expected a multiple of --num_generations {generations}, which is 2 or more"
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
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=batch_size, num_generations=generations,
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
