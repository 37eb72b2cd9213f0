"""What a sampled token costs beyond the model's own forward pass.

    python benchmarks/decoding.py [--repeats 5] [--shapes a c]

Work: responses of 17 tokens to prompts of 96, in batches of 1, 24 and 96, by the models of `ppo_vs_trl.py` with a LoRA
adapter. Limit: the model's forward passes alone, one token of each row at a time with transformers' own cache, and the
logits. Ours is `Policy.generate` as stage 3 calls it, which samples from the whole distribution and looks for the next
turn. Both read the prompts first, whose time is subtracted. Prints medians of milliseconds a token of all rows, and
their ratio.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

import torch
from transformers import LlamaForCausalLM
from transformers.cache_utils import DynamicCache
from trl_ppo import ALPHA, RANK, SHAPES, llama_config, tokenizer_of

from geli.nets.options import Adapter
from geli.nets.policy import Policy, load_policy
from geli.rl.rollout import draw_uniforms, reached_marker
from geli.run.console import format_table
from geli.run.distributed import seed_everything

BATCHES, PROMPT, TOKENS = (1, 24, 96), 96, 17


def load(shape: str) -> Policy:
    """An untrained policy of that shape."""
    seed_everything(0)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(llama_config(SHAPES[shape].vocabulary, **SHAPES[shape].model)).save_pretrained(folder)
        tokenizer_of(SHAPES[shape].vocabulary).save_pretrained(folder)
        policy = load_policy(folder, Adapter(RANK, ALPHA), torch.float32)
    policy.ends = []  # so that every response has all tokens
    return policy


def ours(policy: Policy, query: torch.Tensor, tokens: int) -> None:
    """Samples responses as stage 3 does."""
    uniforms = draw_uniforms(len(query), tokens, torch.Generator().manual_seed(0))

    def texts_of(rows):
        return policy.tokenizer.batch_decode(rows, skip_special_tokens=True)

    policy.generate(query, torch.ones_like(query), uniforms, lambda so_far: reached_marker(so_far, texts_of))


@torch.no_grad()
def bare(policy: Policy, query: torch.Tensor, tokens: int) -> None:
    """Forward passes and logits alone; every next token is the same."""
    cache, read = DynamicCache(config=policy.model.config), query
    for _ in range(tokens):
        output = policy.model(input_ids=read, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, read = output.past_key_values, query[:, :1]


def milliseconds(run, policy: Policy, query: torch.Tensor) -> float:
    """Of one token of every row: a long response less a response of one token."""
    seconds = []
    for tokens in (1, TOKENS):
        start = time.perf_counter()
        run(policy, query, tokens)
        seconds.append(time.perf_counter() - start)
    return 1000 * (seconds[1] - seconds[0]) / (TOKENS - 1)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--repeats", type=int, default=5, help="measurements of each, alternately, after one that warms up"
    )
    parser.add_argument("--shapes", nargs="+", choices=("a", "c"), default=["a", "c"], help="which models")
    args = parser.parse_args()
    rows = []
    for shape in args.shapes:
        policy = load(shape)
        for batch in BATCHES:
            query = torch.randint(10, SHAPES[shape].vocabulary, (batch, PROMPT))
            found = [[milliseconds(run, policy, query) for run in (ours, bare)] for _ in range(args.repeats + 1)][1:]
            ours_ms, bare_ms = (statistics.median(column) for column in zip(*found, strict=True))
            rows.append({"model": SHAPES[shape].name, "rows": batch, "ours, ms": ours_ms, "bare, ms": bare_ms,
                         "bare/ours": bare_ms / ours_ms})  # fmt: skip
    print(format_table(rows, f"A token of every row: medians of {args.repeats}"))


if __name__ == "__main__":
    main()
