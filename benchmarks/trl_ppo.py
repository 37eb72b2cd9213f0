"""PPO steps of TRL 1.12.0, a peer of `ppo_vs_trl.py`, and the task that both do.

Runs in a virtual environment of its own, so it imports nothing of this repository.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

BATCH, MINI_BATCH, RANK, ALPHA = 24, 8, 16, 32


class Shape(NamedTuple):
    """Sizes of the work.

    Attributes:
        name: in the table. prompt: tokens of the shortest and of the longest prompt. new_tokens: of every response.
        vocabulary: its size. model: changes of `llama_config`.
        alternately: whether both programs fit into 24 GiB together, so that they can do their steps alternately.
    """

    name: str
    prompt: tuple[int, int]
    new_tokens: int
    vocabulary: int
    model: dict
    alternately: bool = True


SMOLLM2 = dict(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    tie_word_embeddings=True,
)  # fmt: skip
SHAPES = {
    "a": Shape("Llama 6×256, prompts of 96 tokens", (96, 96), 48, 4000, {}),
    "b": Shape("Llama 6×256, prompts of 512 tokens", (512, 512), 48, 32000, {}),
    "c": Shape("SmolLM2's shape, prompts of 150 to 450 tokens", (150, 450), 80, 49152, SMOLLM2, alternately=False),
}

# ---------------------------------------------------------------------------------------------------------------------
# The task


def llama_config(vocabulary: int, **changes) -> LlamaConfig:
    """A Llama of 6 layers, 256 wide."""
    shape = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8)
    ids = dict(bos_token_id=0, pad_token_id=1, eos_token_id=2, max_position_embeddings=1024)
    return LlamaConfig(vocab_size=vocabulary, **{**shape, **ids, **changes})


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words: w4, w5, …"""
    words = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>"])}
    words |= {f"w{i}": i for i in range(4, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)


def scorer_of(vocabulary: int) -> LlamaForSequenceClassification:
    """A reward model of one thin layer, because scoring is not what is compared."""
    torch.manual_seed(1)
    thin = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForSequenceClassification(llama_config(vocabulary, **thin, num_labels=1)).eval()


def word_prompts(n: int, lengths: tuple[int, int], vocabulary: int) -> list[str]:
    """n prompts of random words, as many as `lengths` (fewest, most) allow, the same at every call."""
    rng = random.Random(0)
    return [
        " ".join(f"w{rng.randrange(4, vocabulary)}" for _ in range(length))
        for length in (rng.randint(*lengths) for _ in range(n))
    ]


class Meter:
    """A worker's side of the comparison: it does a step for each line on stdin, and prints how long the step took and
    the peak of memory above what the process held when the meter was made."""

    def __init__(self):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self.before = self._status("VmRSS")

    def _status(self, name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024

    def wait(self) -> None:
        """Waits until the next step is asked for."""
        if not sys.stdin.readline():
            sys.exit(0)
        self.start = time.perf_counter()

    def report(self, more: dict[str, float] | None = None) -> None:
        """Prints the measurements of a step that is done, and `more`."""
        seconds, peak = time.perf_counter() - self.start, self._status("VmHWM") - self.before
        print("RESULT " + json.dumps({"seconds": seconds, "peak MiB": peak, **(more or {})}), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# TRL


def work(shape: Shape) -> None:
    """Does PPO steps of TRL."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.manual_seed(0)
    meter = Meter()
    tokenizer = tokenizer_of(shape.vocabulary)
    policy = LlamaForCausalLM(llama_config(shape.vocabulary, **shape.model))
    value = LlamaForSequenceClassification(llama_config(shape.vocabulary, **shape.model, num_labels=1))
    texts = word_prompts(10 * BATCH, shape.prompt, shape.vocabulary)
    data = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in texts]})

    class Metered(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            meter.wait()

        def on_step_end(self, *args, **kwargs):
            meter.report()
            meter.wait()

    with tempfile.TemporaryDirectory() as folder:
        options = PPOConfig(
            output_dir=folder, per_device_train_batch_size=MINI_BATCH, gradient_accumulation_steps=BATCH // MINI_BATCH,
            num_mini_batches=BATCH // MINI_BATCH, total_episodes=1000 * BATCH, response_length=shape.new_tokens,
            local_rollout_forward_batch_size=MINI_BATCH, num_ppo_epochs=1, temperature=1.0, num_sample_generations=0,
            learning_rate=1.4e-5, bf16=False, use_cpu=True, gradient_checkpointing=False, report_to=[],
            disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        trainer = PPOTrainer(
            args=options, processing_class=tokenizer, model=policy, ref_model=None, train_dataset=data,
            reward_model=scorer_of(shape.vocabulary), value_model=value, peft_config=lora, callbacks=[Metered()],
        )  # fmt: skip
        trainer.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="TRL's side of benchmarks/ppo_vs_trl.py, which starts it.")
    parser.add_argument("shape", choices=SHAPES)
    work(SHAPES[parser.parse_args().shape])
