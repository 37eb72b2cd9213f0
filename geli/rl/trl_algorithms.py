"""Stage 3 with TRL's trainers: RLOO, GRPO, and supervised fine-tuning (SFT) before RL.

trl and datasets are imported inside the functions, because they load slowly and most runs do not use them.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import AutoConfig, PrinterCallback, TrainerCallback

from geli.nets.policy import Policy
from geli.nets.pretrained import load_pretrained
from geli.nets.prompts import Prompt
from geli.rl.rollout import cut_responses
from geli.run.console import progress_bar
from geli.run.errors import UserError, first_line


def parse_options(words: Sequence[str]) -> dict:
    """`name=value` words as arguments of TRL's configuration; a value that is not JSON is taken as text."""
    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise UserError(f"--trl {word}: expected name=value, such as use_vllm=true")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def train(
    algo: str, policy: Policy, prompts: Sequence[Prompt], score: Callable, on_step: Callable, *, steps: int,
    batch_size: int, learning_rate: float, seed: int, generations: int, max_new_tokens: int,
    options: Sequence[str] = (), processes: int = 1,
) -> None:  # fmt: skip
    """Trains `policy` in place with TRL's RLOOTrainer or GRPOTrainer.

    Args:
        algo: rloo (Ahmadian et al., 2024) or grpo (Shao et al., 2024).
        score: (prompts, responses) -> (n,) rewards.
        on_step: called with (step, metrics) after each of `steps` steps; the metrics have the names that PPO logs.
        batch_size: responses per step of all processes together, `generations` to each prompt.
        options: further arguments of TRL's configuration, as `name=value`.

    Raises:
        UserError: if TRL does not support the model, the batch size or an option.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    if policy.has_encoder:
        raise UserError(f"--algo {algo}: TRL trains decoder-only models; use --algo ppo for this one")
    if batch_size % (generations * processes) or generations < 2:
        raise UserError(
            f"--batch_size {batch_size}: expected a multiple of --num_generations {generations}, which is 2 or more"
            + (f", times the {processes} processes" if processes > 1 else "")
        )
    make_config, make_trainer = {"rloo": (RLOOConfig, RLOOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}[algo]

    def reward(completion_ids: list[list[int]], index: list[int], log_metric: Callable, **_) -> list[float]:
        """TRL's reward function: `index` (a column of `rows`) points to our prompts, `log_metric` adds to the logs."""
        at_length = [len(ids) == config.max_completion_length for ids in completion_ids]
        log_metric("cut_at_length_share", float(np.mean(at_length)))
        return score([ours[i] for i in index], trainer.texts).tolist()

    ours = list(prompts)
    rows = {"prompt": [prompt.text for prompt in ours], "index": list(range(len(ours)))}
    with tempfile.TemporaryDirectory() as folder, _preserve_accelerate_state():
        settings = dict(
            **_common_settings(policy, folder, steps, learning_rate, seed),
            per_device_train_batch_size=batch_size // processes, num_generations=generations,
            lr_scheduler_type="constant", max_completion_length=max_new_tokens, disable_dropout=True, beta=0.05,
        )  # fmt: skip
        try:
            config = make_config(**{**settings, **parse_options(options)})
        except (TypeError, ValueError) as error:
            raise UserError(f"--trl: TRL's {make_config.__name__} does not take this: {first_line(error)}") from None
        try:
            trainer = _as_ppo(make_trainer, policy, ours)(
                model=policy.model, reward_funcs=reward, args=config, train_dataset=Dataset.from_dict(rows),
                processing_class=policy.tokenizer,
                callbacks=[_OnStep("reward", lambda step, logs: on_step(step, _ppo_metrics(logs)))],
            )  # fmt: skip
        except ImportError as error:
            raise UserError(f"--trl: TRL needs a package that is missing: {first_line(error)}") from None
        trainer.remove_callback(PrinterCallback)  # it prints what `on_step` receives
        trainer.train()
    policy.eval()


def _as_ppo(trainer: type, policy: Policy, prompts: Sequence[Prompt]) -> type:
    """The trainer with the token ids of PPO's prompts, whose responses are cut as PPO's are (see `cut_responses`) where
    they are sampled: an invented next turn is neither scored nor trained on."""

    class AsPPO(trainer):
        """Attributes: texts: the cut responses of the last batch."""

        def _tokenize_prompts(self, texts: list[str]) -> tuple[list[list[int]], None, dict]:
            return [policy.format.encode(by_text[text], policy.max_prompt_tokens) for text in texts], None, {}

        def _generate_single_turn(self, *args, **options):
            found = super()._generate_single_turn(*args, **options)  # of GRPO with log-probabilities, which may be None
            ids, logprobs = found if isinstance(found, tuple) else (found, None)
            width = max(map(len, ids))
            response = torch.tensor([row + [policy.end] * (width - len(row)) for row in ids])
            kept, self.texts = cut_responses(response, partial(decode, skip_special_tokens=True), policy.ends)
            ids, logprobs = (
                rows and [row[:n] for row, n in zip(rows, kept.tolist(), strict=True)] for rows in (ids, logprobs)
            )
            return (ids, logprobs) if isinstance(found, tuple) else ids

    decode, by_text = policy.tokenizer.batch_decode, {prompt.text: prompt for prompt in prompts}
    return AsPPO


def _ppo_metrics(logs: dict) -> dict[str, float]:
    """TRL's metrics under the names that PPO logs."""
    names = {
        "score_mean": "reward", "score_std": "reward_std", "kl": "kl", "entropy": "entropy", "policy_loss": "loss",
        "gradient_norm": "grad_norm", "response_length_mean": "completions/mean_length",
        "cut_at_length_share": "cut_at_length_share", "seconds": "step_time",
    }  # fmt: skip
    metrics = {ours: float(logs[theirs]) for ours, theirs in names.items() if theirs in logs}
    if "kl" in metrics and "response_length_mean" in metrics:
        metrics["kl"] *= metrics["response_length_mean"]  # from nats a token to nats a response
    return metrics


def check_sft(name: str, batch_size: int, processes: int, trust_remote_code: bool = False) -> None:
    """Checks the model `name` and the batch size before any work is done for SFT.

    Raises:
        UserError: if the model is not decoder-only, or the batch cannot be divided among the processes.
    """
    config = load_pretrained(AutoConfig, name, "--model_name", trust_remote_code)
    if config.is_encoder_decoder:
        raise UserError(
            f"--sft_steps: TRL trains decoder-only models, and --model_name {name} is an encoder-decoder; leave it out"
        )
    if batch_size % processes:
        raise UserError(f"--sft_steps: expected --batch_size to be a multiple of the {processes} processes")


def sft(
    policy: Policy, prompts: Sequence[Prompt], on_step: Callable, *, steps: int, batch_size: int,
    learning_rate: float, seed: int, processes: int = 1, mini_batch_size: int = 4,
) -> None:  # fmt: skip
    """Trains the adapter of `policy` in place on the human answers to `prompts`, with TRL's SFTTrainer.

    Args:
        on_step: called with (step, loss) after each of `steps` steps. The loss is in nats a token, the mean over the
            tokens of the answers, including their end tokens.
        batch_size: answers per step of all processes together. learning_rate: initial value, decays linearly to 0.
        mini_batch_size: the most answers in one forward pass.

    Raises:
        UserError: if TRL refuses the settings.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    examples = _sft_examples(policy, prompts, steps * batch_size, seed)
    mine = batch_size // processes
    together = max(n for n in range(1, mini_batch_size + 1) if mine % n == 0)
    bar = progress_bar(total=steps, desc="stage 3 (SFT)", unit="step")

    def show_and_report(step: int, logs: dict) -> None:
        bar.update()
        bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
        on_step(step, logs["loss"])

    with tempfile.TemporaryDirectory() as folder, _preserve_accelerate_state(), bar:
        try:
            config = SFTConfig(
                **_common_settings(policy, folder, steps, learning_rate, seed),
                per_device_train_batch_size=together, gradient_accumulation_steps=mine // together,
                max_length=None, train_sampling_strategy="sequential", logging_nan_inf_filter=False,
            )  # fmt: skip
            # TRL does not process a data set of token ids any further, so it writes no text to its caches.
            trainer = SFTTrainer(
                model=policy.model, args=config, processing_class=policy.tokenizer,
                callbacks=[_OnStep("loss", show_and_report)], train_dataset=Dataset.from_dict(examples),
            )  # fmt: skip
        except ValueError as error:
            raise UserError(f"--sft_steps: TRL's SFTTrainer does not take this: {first_line(error)}") from None
        trainer.remove_callback(PrinterCallback)  # it prints what `on_step` receives
        trainer.train()
    policy.model.config.use_cache = True  # the trainer turns it off, and the saved configuration would say so
    policy.eval()


def _sft_examples(policy: Policy, prompts: Sequence[Prompt], n: int, seed: int) -> dict[str, tuple]:
    """Columns `input_ids` and `labels` of n examples: the prompts in random order, shuffled again when used up."""
    rng, order = np.random.default_rng(seed), []
    while len(order) < n:
        order += rng.permutation(len(prompts)).tolist()
    chosen = progress_bar(order[:n], desc="tokenizing human answers", unit="answer")
    inputs, labels = zip(*(sft_example(policy, prompts[i]) for i in chosen), strict=True)
    return {"input_ids": inputs, "labels": labels}


def sft_example(policy: Policy, prompt: Prompt) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, the human's answer and the end token, and their labels, which are -100 on the prompt.

    The prompt is shortened as in rollouts. An answer that is longer than the longest response is cut there; it then has
    no end token.
    """
    query = policy.format.encode(prompt, policy.max_prompt_tokens)
    answer = policy.format.answer(prompt, prompt.human)[: policy.max_answer_tokens]
    return query + answer, [-100] * len(query) + answer


def _common_settings(policy: Policy, folder: str, steps: int, learning_rate: float, seed: int) -> dict:
    """The settings that all of TRL's trainers get: log every step to our callback alone, write nothing."""
    return dict(
        output_dir=folder, max_steps=steps, learning_rate=learning_rate, seed=seed, gradient_checkpointing=False,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, bf16=False,
        use_cpu=policy.device.type == "cpu",
    )  # fmt: skip


class _OnStep(TrainerCallback):
    """Calls `report(step, logs)` with each step's logs; other logs lack the value `key`."""

    def __init__(self, key: str, report: Callable[[int, dict], None]):
        self.key, self.report = key, report

    def on_log(self, args, state, control, logs=None, **_):
        """Called by the trainer."""
        if logs and self.key in logs:
            self.report(state.global_step, logs)


@contextmanager
def _preserve_accelerate_state() -> Iterator[None]:
    """Restores accelerate's state, of which a process has only one, after a trainer has replaced it by its own."""
    states = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    saved = [dict(state) for state in states]
    try:
        yield
    finally:
        for state, before in zip(states, saved, strict=True):
            state.clear()
            state.update(before)
