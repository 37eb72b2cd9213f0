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
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

import torch
from transformers import LlamaForCausalLM
from trl_ppo import ALPHA, RANK, llama_config, tokenizer_of, word_prompts

from geli.nets.options import Adapter
from geli.nets.policy import adapt_policy
from geli.nets.prompts import Prompt
from geli.rl.rollout import RandomScorer, draw_uniforms
from geli.run.console import format_table
from geli.run.distributed import make_accelerator, seed_everything
from models import PPO, PPOConfig

SHAPE = {"layers": 32, "hidden": 4096, "intermediate": 11008, "heads": 32, "vocabulary": 32000}
WORK = {"batch": 24, "prompt": 512, "new_tokens": 128, "steps": 5}


def seconds_of(work: Callable, device: torch.device, repeats: int = 5) -> float:
    """The median of some runs of `work`, after one that warms up."""
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def limits(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second that can be read, and operations a second of matrix products."""
    size = 8192 if device.type == "cuda" else 1024
    square = torch.randn(size, size, device=device, dtype=dtype)
    rate = 2 * size**3 / seconds_of(lambda: square @ square, device)
    long = torch.zeros(1 << (31 if device.type == "cuda" else 27), device=device, dtype=torch.uint8)
    return 2 * len(long) / seconds_of(long.clone, device), rate


def median_seconds(ppo: PPO, texts: list[str], batch: int) -> dict[str, float]:
    """Phase -> median seconds over PPO steps on consecutive batches of `texts`, after one step that warms up."""
    prompts = [Prompt(text, "", "") for text in texts]
    rows = [ppo.step(prompts[first : first + batch])[0] for first in range(0, len(prompts), batch)]
    phases = [name for name in rows[0] if name.startswith("seconds_")]
    return {name.removeprefix("seconds_"): statistics.median(row[name] for row in rows[1:]) for name in phases}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (SHAPE | WORK).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value:,}")
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
    policy = adapt_policy(model, tokenizer_of(args.vocabulary), Adapter(RANK, ALPHA)).to(device)
    settings = PPOConfig(batch_size=args.batch, min_new_tokens=args.new_tokens, max_new_tokens=args.new_tokens)
    ppo = PPO(policy, RandomScorer(0), settings, accelerator, seed=0)
    texts = word_prompts(args.batch * (args.steps + 1), (args.prompt, args.prompt), args.vocabulary)

    query, mask = policy.tokenize([Prompt(text, "", "") for text in texts[: args.batch]])
    uniforms = draw_uniforms(args.batch, 1, torch.Generator().manual_seed(0))
    first = seconds_of(lambda: policy.generate(query, mask, uniforms), device, 2)
    seconds = median_seconds(ppo, texts, args.batch)
    print(f"{device}, {weights / 1e9:.2f}e9 weights, {dtype}; {bandwidth / 1e9:.0f} GB/s, {rate / 1e12:.2f} TFLOP/s")
    print(format_table([{"phase": name, "seconds a step": value} for name, value in seconds.items()]))
    print(f"a step: {sum(seconds.values()):.3g} s, of which the prompts' first pass {first:.3g} s")
    if device.type == "cuda":
        print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")

    half_way = args.prompt + args.new_tokens / 2  # tokens whose keys and values are read
    read = weights + 2 * args.layers * args.hidden * args.batch * half_way  # numbers a generated token
    token = (seconds["generate"] - first) / (args.new_tokens - 1)
    multiplied = 4 * weights * args.batch * (args.prompt + args.new_tokens)
    size = torch.finfo(dtype).bits // 8
    print(f"generation, share of the bandwidth: {read * size / bandwidth / token:.2f}")
    print(f"update, share of the matrix rate: {multiplied / rate / seconds['update']:.2f}")


if __name__ == "__main__":
    main()
