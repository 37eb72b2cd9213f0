"""Our PPO step against that of TRL 1.12.0, the last release of TRL that had one, at equal work.

    python benchmarks/ppo_vs_trl.py [--steps 5] [--venv FOLDER]

Work: 24 prompts, one PPO epoch, minibatches of 8, float32, LoRA (r=16, query and value projections). A Llama of 6
layers x 256 with 48 new tokens: (a) prompts of 96 tokens and a vocabulary of 4,000, (b) of 512 and 32,000. (c) An
untrained model of SmolLM2's shape, prompts of 300 tokens in the mean, 80 new tokens. All score by the same small
network. Ours is measured twice: with TRL's adapter, and with one in all linear maps of the top third of the layers
alone, over a shared trunk (`--num_layers_unfrozen`). TRL runs in a virtual environment of its own, which this script
makes (`trl_ppo.py`). They do their steps alternately, or in (c), for which TRL needs 22 GiB, one after the other.
Prints medians of seconds a step, peaks of memory above what a process held before it built its models, their ratios,
and where our time goes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the repository, whose modules are imported below

import numpy as np
import torch
from transformers import LlamaForCausalLM
from trl_ppo import (
    ALPHA,
    BATCH,
    MINI_BATCH,
    RANK,
    SHAPES,
    Meter,
    Shape,
    llama_config,
    scorer_of,
    tokenizer_of,
    word_prompts,
)

from geli.nets.options import Adapter
from geli.nets.policy import load_policy
from geli.nets.prompts import Prompt
from geli.run.distributed import make_accelerator, seed_everything
from models import PPO, PPOConfig

TRL = "TRL 1.12.0"
TRL_PACKAGES = ["trl==1.12.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0"]


def work(shape: Shape, top_third: bool) -> None:
    """Does PPO steps of this repository, with an adapter in the top third of the layers alone or in all."""
    seed_everything(0)
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        config = llama_config(shape.vocabulary, **shape.model)
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer_of(shape.vocabulary).save_pretrained(folder)
        layers = config.num_hidden_layers // 3 if top_third else 0
        policy = load_policy(folder, Adapter(RANK, ALPHA, layers), torch.float32)
    scorer = scorer_of(shape.vocabulary)

    def score(prompts, responses):
        texts = [f"{prompt.text} {response}" for prompt, response in zip(prompts, responses, strict=True)]
        inputs = policy.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            return scorer(**inputs).logits[:, 0]

    config = PPOConfig(
        batch_size=BATCH, mini_batch_size=MINI_BATCH, gradient_accumulation_steps=1, min_new_tokens=shape.new_tokens,
        max_new_tokens=shape.new_tokens,
    )  # fmt: skip
    ppo = PPO(policy, score, config, make_accelerator("cpu", "float32"), seed=0)
    texts, rng = word_prompts(10 * BATCH, shape.prompt, shape.vocabulary), np.random.default_rng(0)
    while True:
        meter.wait()
        logged, _ = ppo.step([Prompt(texts[i], "", "") for i in rng.choice(len(texts), BATCH, replace=False)])
        meter.report({name: value for name, value in logged.items() if name.startswith("seconds_")})


# ---------------------------------------------------------------------------------------------------------------------
# The comparison


def make_venv(folder: Path) -> str:
    """Makes TRL's environment if it is not there; returns its Python."""
    python = folder / "bin" / "python"
    if not (folder / ".complete").is_file():
        print(f"Installing {TRL_PACKAGES[0]} into {folder} …", flush=True)
        requirements = (ROOT / "requirements.txt").read_text().splitlines()
        torch_package = next(line for line in requirements if line.startswith("torch=="))
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for packages in ([torch_package], TRL_PACKAGES):
            subprocess.run([str(python), "-m", "pip", "install", "-qq", *packages], check=True)
        (folder / ".complete").touch()
    return str(python)


class Worker:
    """One of the two, in a process of its own."""

    def __init__(self, command: list[str]):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    def step(self) -> dict:
        """Does a step; returns what was measured."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise SystemExit(f"a worker failed: run {' '.join(self.process.args)} and press Enter to see why")


def compare(
    commands: dict[str, list[str]], steps: int, alternately: bool
) -> tuple[dict[str, float], dict[str, float], dict[str, dict]]:
    """Median seconds a step, peak MiB, and seconds of the phases of each command. The commands do their steps
    alternately, or one command after the other."""
    found = {name: [] for name in commands}
    for names in [list(commands)] if alternately else [[name] for name in commands]:
        workers = {name: Worker(commands[name]) for name in names}
        for _ in range(steps + 1):
            for name, worker in workers.items():
                found[name].append(worker.step())
        for worker in workers.values():
            worker.process.kill()
            worker.process.wait()
    seconds = {name: statistics.median(row["seconds"] for row in rows[1:]) for name, rows in found.items()}
    phases = {
        name: {
            phase.removeprefix("seconds_"): statistics.median(row[phase] for row in rows[1:])
            for phase in rows[0] if phase.startswith("seconds_")
        }
        for name, rows in found.items()
    }  # fmt: skip
    return seconds, {name: max(row["peak MiB"] for row in rows) for name, rows in found.items()}, phases


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="steps of each that are measured, after one that warms up")
    parser.add_argument("--venv", type=Path, default=ROOT / "benchmarks" / ".venv-trl", help="TRL's environment")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="which work")
    parser.add_argument("--worker", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--top_third", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(SHAPES[args.worker], args.top_third)
        return
    trl = [make_venv(args.venv), str(Path(__file__).resolve().with_name("trl_ppo.py"))]
    ours = [sys.executable, str(Path(__file__).resolve()), "--worker"]
    print(f"Medians of {args.steps} steps")
    for shape in args.shapes:
        commands = {TRL: [*trl, shape], "ours": [*ours, shape], "top third": [*ours, shape, "--top_third"]}
        seconds, peaks, phases = compare(commands, args.steps, SHAPES[shape].alternately)
        print(
            f"\n({shape}) {SHAPES[shape].name}, {SHAPES[shape].new_tokens} new, vocabulary {SHAPES[shape].vocabulary:,}"
        )
        print(f"  {TRL:10}  {seconds[TRL]:7.2f} s a step  {peaks[TRL]:7.0f} MiB at most")
        for name in list(commands)[1:]:
            faster, memory = seconds[TRL] / seconds[name], peaks[name] / peaks[TRL]
            parts = ", ".join(f"{phase} {value:.2f} s" for phase, value in phases[name].items())
            print(
                f"  {name:10}  {seconds[name]:7.2f} s a step  {peaks[name]:7.0f} MiB at most: {faster:.2f} times "
                f"faster, {memory:.2f} of the memory; {parts}",
                flush=True,
            )


if __name__ == "__main__":
    main()
