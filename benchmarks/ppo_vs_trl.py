"""Our PPO step against that of TRL 1.12.0, the last release of TRL that had one, at equal work.

    python benchmarks/ppo_vs_trl.py [--steps 5] [--venv FOLDER]

Work: a Llama of 6 layers x 256 with LoRA (r=16, query and value projections), 24 prompts, 48 new tokens, one PPO epoch,
minibatches of 8, float32; (a) prompts of 96 tokens and a vocabulary of 4,000, (b) of 512 and 32,000. Both score by the
same small network. TRL runs in a virtual environment of its own, which this script makes; the two take their steps in
turn. Prints medians of seconds a step, peaks of memory above what a process held before it built its models, and their
ratios.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PEER = ["trl==1.12.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0"]
SHAPES = {"a": dict(prompt=96, vocabulary=4000), "b": dict(prompt=512, vocabulary=32000)}
BATCH, MINI_BATCH, NEW_TOKENS, RANK, ALPHA = 24, 8, 48, 16, 32


# ---------------------------------------------------------------------------------------------------------------------
# What both workers share


def llama_config(vocabulary: int, **changes):
    """6 x 256."""
    from transformers import LlamaConfig

    shape = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8)
    ids = dict(bos_token_id=0, pad_token_id=1, eos_token_id=2, max_position_embeddings=1024)
    return LlamaConfig(vocab_size=vocabulary, **{**shape, **ids, **changes})


def tokenizer_of(vocabulary: int):
    """One word a token: w4, w5, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>"])}
    words |= {f"w{i}": i for i in range(4, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)


def scorer_of(vocabulary: int):
    """A reward model of one thin layer: scoring is not what is compared."""
    import torch
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(1)
    thin = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForSequenceClassification(llama_config(vocabulary, **thin, num_labels=1)).eval()


def word_prompts(n: int, length: int, vocabulary: int) -> list[str]:
    """Prompts of `length` random words, the same for both."""
    import random

    rng = random.Random(0)
    return [" ".join(f"w{rng.randrange(4, vocabulary)}" for _ in range(length)) for _ in range(n)]


class Meter:
    """Answers each line on stdin with a step, and says how long it took and how much memory was used at most."""

    def __init__(self):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self.before = self._status("VmRSS")

    def _status(self, name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024

    def wait(self) -> None:
        """Until the next step is asked for."""
        if not sys.stdin.readline():
            sys.exit(0)
        self.start = time.perf_counter()

    def tell(self) -> None:
        """A step is done."""
        seconds, peak = time.perf_counter() - self.start, self._status("VmHWM") - self.before
        print("RESULT " + json.dumps({"seconds": seconds, "peak MiB": peak}), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The workers


def our_worker(prompt: int, vocabulary: int) -> None:
    """PPO steps of this repository."""
    sys.path.insert(0, str(ROOT))
    import tempfile

    import numpy as np
    import torch
    from transformers import LlamaForCausalLM

    from geli.nets.policy import load_policy
    from geli.rl.prompts import Prompt
    from geli.run.distributed import make_accelerator, seed_everything
    from models import PPO, PPOConfig

    seed_everything(0)
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(llama_config(vocabulary)).save_pretrained(folder)
        tokenizer_of(vocabulary).save_pretrained(folder)
        policy = load_policy(folder, RANK, ALPHA, torch.float32)
    scorer = scorer_of(vocabulary)

    def score(prompts, responses):
        texts = [f"{prompt.text} {response}" for prompt, response in zip(prompts, responses, strict=True)]
        inputs = policy.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            return scorer(**inputs).logits[:, 0]

    config = PPOConfig(
        batch_size=BATCH, mini_batch_size=MINI_BATCH, accumulation_steps=1, min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
    )  # fmt: skip
    ppo = PPO(policy, score, config, make_accelerator("cpu", "float32"), seed=0)
    texts, rng = word_prompts(10 * BATCH, prompt, vocabulary), np.random.default_rng(0)
    while True:
        meter.wait()
        ppo.step([Prompt(texts[i], "", "") for i in rng.choice(len(texts), BATCH, replace=False)])
        meter.tell()


def trl_worker(prompt: int, vocabulary: int) -> None:
    """PPO steps of TRL."""
    import tempfile

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.manual_seed(0)
    meter = Meter()
    tokenizer = tokenizer_of(vocabulary)
    policy = LlamaForCausalLM(llama_config(vocabulary))
    value = LlamaForSequenceClassification(llama_config(vocabulary, num_labels=1))
    texts = word_prompts(10 * BATCH, prompt, vocabulary)
    data = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in texts]})

    class InTurn(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            meter.wait()

        def on_step_end(self, *args, **kwargs):
            meter.tell()
            meter.wait()

    with tempfile.TemporaryDirectory() as folder:
        options = PPOConfig(
            output_dir=folder, per_device_train_batch_size=MINI_BATCH, gradient_accumulation_steps=BATCH // MINI_BATCH,
            num_mini_batches=BATCH // MINI_BATCH, total_episodes=1000 * BATCH, response_length=NEW_TOKENS,
            num_ppo_epochs=1, temperature=1.0, num_sample_generations=0, learning_rate=1.4e-5, bf16=False, use_cpu=True,
            gradient_checkpointing=False, report_to=[], disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        trainer = PPOTrainer(
            args=options, processing_class=tokenizer, model=policy, ref_model=None, reward_model=scorer_of(vocabulary),
            train_dataset=data, value_model=value, peft_config=lora, callbacks=[InTurn()],
        )  # fmt: skip
        trainer.train()


# ---------------------------------------------------------------------------------------------------------------------
# The comparison


def make_venv(folder: Path) -> Path:
    """TRL's environment; its Python."""
    python = folder / "bin" / "python"
    if not (folder / ".complete").is_file():
        print(f"Installing {PEER[0]} into {folder} …", flush=True)
        torch = next(
            line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch==")
        )
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for packages in ([torch], PEER):
            subprocess.run([str(python), "-m", "pip", "install", "-qq", *packages], check=True)
        (folder / ".complete").touch()
    return python


class Worker:
    """One of the two, in a process of its own."""

    def __init__(self, python, name: str, shape: str):
        command = [str(python), str(Path(__file__).resolve()), "--worker", name, "--shape", shape]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)

    def step(self) -> dict:
        """One step's measurements."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise SystemExit(f"the worker died: run {' '.join(self.process.args)} and type a line to see why")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="of each; one more warms up")
    parser.add_argument("--venv", type=Path, default=ROOT / "benchmarks" / ".venv-trl", help="TRL's environment")
    parser.add_argument("--worker", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=SHAPES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        {"ours": our_worker, "trl": trl_worker}[args.worker](**SHAPES[args.shape])
        return
    pythons = {"TRL 1.12.0": ("trl", make_venv(args.venv)), "ours": ("ours", sys.executable)}
    print(f"Medians of {args.steps} steps, taken in turn")
    for shape, sizes in SHAPES.items():
        workers = {name: Worker(python, kind, shape) for name, (kind, python) in pythons.items()}
        found = {name: [] for name in workers}
        for _ in range(args.steps + 1):
            for name, worker in workers.items():
                found[name].append(worker.step())
        for worker in workers.values():
            worker.process.kill()
        seconds = {name: statistics.median(row["seconds"] for row in rows[1:]) for name, rows in found.items()}
        peaks = {name: max(row["peak MiB"] for row in rows) for name, rows in found.items()}
        print(f"\n({shape}) prompts of {sizes['prompt']} tokens, vocabulary {sizes['vocabulary']:,}")
        for name in workers:
            print(f"  {name:10}  {seconds[name]:7.2f} s a step  {peaks[name]:7.0f} MiB at most")
        ratio = {name: value["TRL 1.12.0"] / value["ours"] for name, value in (("s", seconds), ("m", peaks))}
        print(f"  ours is {ratio['s']:.2f} times faster, and takes {1 / ratio['m']:.2f} of the memory")


if __name__ == "__main__":
    main()
