"""A PPO step at the size that it is meant for, against what the device can do.

    python benchmarks/ppo_7b.py [--layers 32 --hidden 4096 --intermediate 11008 --heads 32 --vocabulary 32000]

A Llama of Llama-2-7B's shape with random weights (bfloat16 on a GPU), LoRA of rank 16, 24 prompts of 512 tokens, 128
new ones. Prints the median seconds of each phase, the peak of memory, and two shares of what was measured on the device
just before: of its bandwidth, in generation (weights, keys and values are read once a token), and of its rate of matrix
products, in the update (4 x weights x tokens: forward, and backward to the activations).
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

import torch
from ppo_vs_trl import ALPHA, RANK, llama_config, tokenizer_of, word_prompts
from transformers import LlamaForCausalLM

from geli.nets.policy import adapt_policy
from geli.rl.prompts import Prompt
from geli.rl.rollout import RandomScorer, draw_uniforms
from geli.run.console import format_table
from geli.run.distributed import make_accelerator, seed_everything
from models import PPO, PPOConfig


def seconds_of(work, device, repeats: int = 5) -> float:
    """The median of some runs, after one that warms up."""
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def limits(device, dtype) -> tuple[float, float]:
    """Bytes a second that can be read, and operations a second of matrix products."""
    size = 8192 if device.type == "cuda" else 1024
    square = torch.randn(size, size, device=device, dtype=dtype)
    rate = 2 * size**3 / seconds_of(lambda: square @ square, device)
    long = torch.zeros(1 << (31 if device.type == "cuda" else 27), device=device, dtype=torch.uint8)
    return 2 * len(long) / seconds_of(long.clone, device), rate


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"layers": 32, "hidden": 4096, "intermediate": 11008, "heads": 32, "vocabulary": 32000}
    work = {"batch": 24, "prompt": 512, "new_tokens": 128, "steps": 5}
    for name, value in (shape | work).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()

    seed_everything(0)
    accelerator = make_accelerator("auto", "auto", cpu_dtype="float32")
    device = accelerator.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bandwidth, rate = limits(device, dtype)
    config = llama_config(
        args.vocabulary, hidden_size=args.hidden, intermediate_size=args.intermediate, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, max_position_embeddings=args.prompt + args.new_tokens,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
    weights = sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel()  # those multiplied
    policy = adapt_policy(model, tokenizer_of(args.vocabulary), RANK, ALPHA).to(device)
    settings = PPOConfig(batch_size=args.batch, min_new_tokens=args.new_tokens, max_new_tokens=args.new_tokens)
    ppo = PPO(policy, RandomScorer(0), settings, accelerator, seed=0)
    texts = word_prompts(args.batch * (args.steps + 1), args.prompt, args.vocabulary)

    query, mask = policy.tokenize(texts[: args.batch])
    first = seconds_of(lambda: policy.generate(query, mask, draw_uniforms(args.batch, 1, ppo.sampling)), device, 2)
    rows = []
    for step in range(args.steps + 1):
        batch = [Prompt(text, "", "") for text in texts[step * args.batch : (step + 1) * args.batch]]
        rows.append(ppo.step(batch)[0])
    seconds = {
        name.removeprefix("seconds_"): statistics.median(row[name] for row in rows[1:])
        for name in rows[0]
        if name.startswith("seconds_")
    }
    length = args.prompt + args.new_tokens / 2
    size = torch.finfo(dtype).bits // 8
    kept = 2 * args.layers * args.hidden * args.batch * length  # keys and values, half way
    token = (seconds["generate"] - first) / (args.new_tokens - 1)
    tokens = args.batch * (args.prompt + args.new_tokens)
    print(f"{device}, {weights / 1e9:.2f}e9 weights, {dtype}; {bandwidth / 1e9:.0f} GB/s, {rate / 1e12:.2f} TFLOP/s")
    print(format_table([{"phase": name, "seconds a step": value} for name, value in seconds.items()]))
    print(f"a step: {sum(seconds.values()):.3g} s, of which the prompts' first pass {first:.3g} s")
    if device.type == "cuda":
        print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    print(f"generation, share of the bandwidth: {(weights + kept) * size / bandwidth / token:.2f}")
    print(f"update, share of the matrix rate: {4 * weights * tokens / rate / seconds['update']:.2f}")


if __name__ == "__main__":
    main()
