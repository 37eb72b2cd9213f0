"""The parts of `on_a_gpu.py`: each measures one thing on the device, with random weights, and reports it in rows.

    python benchmarks/gpu_parts.py PART FOLDER [--toy]

FOLDER is for temporary files; `FOLDER/result.json` holds what was measured so far.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the repository, whose modules are imported below

import numpy as np
import pandas as pd
import torch
from encoding import LARGE, SMALL, flops, new_head
from tokenizers import processors
from transformers import BartConfig, BartModel, BertConfig, BertModel, LlamaForCausalLM
from trl_ppo import ALPHA, RANK, SMOLLM2, llama_config, tokenizer_of, word_prompts

from data_utils import TurnSet, read_corpus, split
from geli.nets.encoder import TurnEncoder
from geli.nets.features import TurnFeatures
from geli.nets.options import Adapter
from geli.nets.policy import adapt_policy
from geli.nets.prompts import Prompt
from geli.rl.rollout import RandomScorer, draw_uniforms
from geli.run.distributed import device_name, frozen_dtype, make_accelerator, seed_everything
from geli.run.files import write_json
from geli.run.sharding import shard
from geli.run.tracking import versions
from geli.run.training import train_steps
from models import PPO, PPOConfig
from tools import sample_candor
from tools.tiny_models import FORMS, train_tokenizer
from train_reward_GELI import GELITraining, GELITrainingOptions
from train_reward_LI_only import LITraining, LITrainingOptions

CONVERSATIONS = 1656  # of CANDOR
PIECES = 2000  # of a tokenizer that is trained on the made-up conversations


@dataclass(frozen=True)
class Size:
    """Sizes of the work.

    Attributes:
        llama: changes of `llama_config` for PPO at the published size; vocabulary: its vocabulary.
        batch, prompt, new_tokens, steps: prompts a PPO step, tokens of each and of its response, steps measured.
        bart: of the encoder. encoded: (turns that are encoded, fewest and most tokens of each).
        conversations, turns, context_turns: of stages 1 and 2: how many to train on, turns of each, turns that are read
            before a turn.
        bert: the closed loop's encoder. policy: changes of `llama_config` for its policy, pieces: its vocabulary.
        loop: (conversations, turns of each, steps of PPO).
    """

    llama: dict
    vocabulary: int
    batch: int
    prompt: int
    new_tokens: int
    steps: int
    bart: dict
    encoded: tuple[int, int, int]
    conversations: int
    turns: int
    context_turns: int
    bert: dict
    policy: dict
    pieces: int
    loop: tuple[int, int, int]


MINILM = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
LLAMA_2_7B = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
WHOLE = Size(
    llama=LLAMA_2_7B, vocabulary=32000, batch=24, prompt=512, new_tokens=128, steps=3, bart=LARGE,
    encoded=(4096, 300, 880), conversations=24, turns=320, context_turns=40, bert=MINILM, policy=SMOLLM2, pieces=49152,
    loop=(60, 24, 6),
)  # fmt: skip
TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
TOY = Size(
    llama=TINY, vocabulary=1000, batch=4, prompt=32, new_tokens=8, steps=2, bart=SMALL | {"vocab_size": 4000},
    encoded=(64, 30, 88), conversations=2, turns=20, context_turns=4, bert=TINY, policy=TINY, pieces=3000,
    loop=(12, 16, 2),
)  # fmt: skip


class Report:
    """What a part has measured so far, kept in a file.

    Args:
        path: of the file. device: that it ran on.
    """

    def __init__(self, path: Path, device: torch.device):
        self.path = path
        machine = {"device": device_name(device), "versions": versions()}
        self.content = {"rows": [], "numbers": {}, "machine": machine}

    def add(self, work: str, measured: str, **numbers) -> None:
        """Adds a row of the table, and numbers by name."""
        self.content["rows"].append([work, measured])
        self.content["numbers"] |= numbers
        write_json(self.path, self.content)
        print(f"{work}: {measured}", flush=True)


def timed(work: Callable, device: torch.device):
    """Seconds of `work`, and what it returned."""
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def seconds_of(work: Callable, device: torch.device, repeats: int = 5) -> float:
    """The median of some runs of `work`, after one that warms up."""
    return statistics.median([timed(work, device)[0] for _ in range(repeats + 1)][1:])


def limits(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second that can be read, and operations a second of matrix products."""
    size = 8192 if device.type == "cuda" else 1024
    square = torch.randn(size, size, device=device, dtype=dtype)
    rate = 2 * size**3 / seconds_of(lambda: square @ square, device)
    long = torch.randint(256, (1 << (31 if device.type == "cuda" else 27),), device=device, dtype=torch.uint8)
    return 2 * len(long) / seconds_of(long.clone, device), rate


def new_policy(size: dict, vocabulary: int, device: torch.device, dtype: torch.dtype):
    """A Llama with random weights, made on the device, as a policy with TRL's adapter."""
    with torch.device(device):
        model = LlamaForCausalLM(llama_config(vocabulary, **size)).to(dtype)
    return adapt_policy(model, tokenizer_of(vocabulary), Adapter(RANK, ALPHA)).to(device)


def ppo_steps(policy, size: Size, accelerator) -> list[dict[str, float]]:
    """What PPO steps on random rewards log; the first one warms up."""
    vocabulary = policy.model.config.vocab_size
    settings = PPOConfig(batch_size=size.batch, min_new_tokens=size.new_tokens, max_new_tokens=size.new_tokens)
    ppo = PPO(policy, RandomScorer(0), settings, accelerator, seed=0)
    texts = word_prompts(size.batch * (size.steps + 1), (size.prompt, size.prompt), vocabulary)
    prompts = [Prompt(text, "", "") for text in texts]
    return [ppo.step(prompts[first : first + size.batch])[0] for first in range(0, len(prompts), size.batch)]


def phases_of(rows: list[dict[str, float]]) -> dict[str, float]:
    """Phase -> median seconds a step, without the first step."""
    names = [name for name in rows[0] if name.startswith("seconds_")]
    return {name.removeprefix("seconds_"): statistics.median(row[name] for row in rows[1:]) for name in names}


def in_words(phases: dict[str, float]) -> str:
    """Seconds of a step, and of its phases."""
    return f"{sum(phases.values()):.3g} s ({', '.join(f'{name} {value:.3g}' for name, value in phases.items())})"


def gibibytes(device: torch.device) -> str:
    """The peak of the device's memory; empty on a CPU."""
    return f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most" if device.type == "cuda" else ""


# ---------------------------------------------------------------------------------------------------------------------
# PPO


def ppo_7b(size: Size, folder: Path, accelerator, report: Report) -> None:
    """A PPO step at the published size. Generation is held against the bandwidth, as weights, keys and values are read
    once a token; the update against matrix products of 4 x weights x tokens (forward, and backward to activations)."""
    device, dtype = accelerator.device, frozen_dtype(accelerator)
    bandwidth, rate = limits(device, dtype)
    report.add(
        "limits: memory read and written, matrix products", f"{bandwidth / 1e9:.4g} GB/s, {rate / 1e12:.3g} TFLOP/s",
        bandwidth=bandwidth, rate=rate,
    )  # fmt: skip
    policy = new_policy(size.llama, size.vocabulary, device, dtype)
    texts = word_prompts(size.batch, (size.prompt, size.prompt), size.vocabulary)
    query, mask = policy.tokenize([Prompt(text, "", "") for text in texts])
    uniforms = draw_uniforms(size.batch, 1, torch.Generator().manual_seed(0))
    first = seconds_of(lambda: policy.generate(query, mask, uniforms), device, 2)
    rows = ppo_steps(policy, size, accelerator)
    phases = phases_of(rows)
    layers, width = size.llama["num_hidden_layers"], size.llama["hidden_size"]
    weights = sum(p.numel() for p in policy.model.parameters() if not p.requires_grad) - size.vocabulary * width
    half_way = size.prompt + size.new_tokens / 2  # tokens whose keys and values are read
    read = weights + 2 * layers * width * size.batch * half_way  # numbers a generated token
    token = (phases["generate"] - first) / (size.new_tokens - 1)
    multiplied = 4 * weights * size.batch * (size.prompt + size.new_tokens)
    shares = {
        "bandwidth_share": read * torch.finfo(dtype).bits / 8 / bandwidth / token,
        "rate_share": multiplied / rate / phases["update"],
    }
    name = (
        f"PPO on {weights / 1e9:.3g}e9 weights in {str(dtype).removeprefix('torch.')}, {size.batch} prompts of "
        f"{size.prompt} tokens, {size.new_tokens} new"
    )
    report.add(f"{name}: a step", in_words(phases) + gibibytes(device), phases=phases, first_pass=first, rows=rows)
    report.add(
        "its generation", f"{size.batch / token:,.0f} tokens/s, {shares['bandwidth_share']:.2f} of the bandwidth; the "
        f"prompts' pass {first:.3g} s", tokens_per_second=size.batch / token, **shares,
    )  # fmt: skip
    report.add("its update", f"{shares['rate_share']:.2f} of the matrix rate")


@contextmanager
def sharding_over_one():
    """Makes `geli.run.sharding.shard` shard over a mesh of one, where it leaves the model of a single process whole."""
    from torch.distributed import device_mesh

    real = device_mesh.init_device_mesh
    settings = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    one = mock.patch.object(device_mesh, "init_device_mesh", lambda device, shape: real(device, (1,)))
    with one, mock.patch.dict(os.environ, settings):
        yield


def fsdp(size: Size, folder: Path, accelerator, report: Report) -> None:
    """PPO steps of the closed loop's policy, whole and with its layers sharded by FSDP over a mesh of one device."""
    device, dtype = accelerator.device, frozen_dtype(accelerator)
    backend = "nccl" if device.type == "cuda" else "gloo"
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
    found = {}
    for kind in ("whole", "sharded"):
        seed_everything(0)
        policy = new_policy(size.policy, size.pieces, device, dtype)
        if kind == "sharded":
            with sharding_over_one():
                policy = shard(policy, SimpleNamespace(device=device, num_processes=2))
        found[kind] = ppo_steps(policy, size, accelerator)
    torch.distributed.destroy_process_group()
    pairs = zip(found["whole"], found["sharded"], strict=True)
    differences = [
        abs(whole[name] - sharded[name]) / max(abs(whole[name]), 1e-3)
        for whole, sharded in pairs for name in whole if not name.startswith("seconds_")
    ]  # fmt: skip
    seconds = {kind: sum(phases_of(rows).values()) for kind, rows in found.items()}
    report.add(
        "FSDP over a mesh of one: a PPO step of the closed loop's policy, whole and sharded",
        f"{seconds['whole']:.3g} and {seconds['sharded']:.3g} s; largest relative difference of what is logged "
        f"{max(differences):.1g}", seconds_a_step=seconds, difference=max(differences),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


def mean_flops(bart: dict, lengths: np.ndarray) -> float:
    """The mean FLOPs of a turn of these lengths (n,) in the encoder's forward pass."""
    points = sorted({int(n) for n in np.quantile(lengths, np.linspace(0, 1, 5))})
    return float(np.interp(lengths, points, [flops(bart, n, decoder=False) for n in points]).mean())


def encoding(size: Size, folder: Path, accelerator, report: Report) -> None:
    """The encoding loop, against bare forward passes over full batches without padding, and the matrix rate."""
    device, dtype = accelerator.device, frozen_dtype(accelerator)
    rate, (n, *lengths) = limits(device, dtype)[1], size.encoded
    tokenizer = tokenizer_of(size.bart["vocab_size"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        *FORMS["bart"], [("<s>", 0), ("</s>", 2)]
    )
    with torch.device(device):
        model = BartModel(BartConfig(**size.bart)).to(dtype).eval()
    encoder = TurnEncoder(model, tokenizer)
    pairs = encoder.tokenize([("w5", text) for text in word_prompts(n, lengths, size.bart["vocab_size"])])
    counts = np.array([len(pair.ids) for pair in pairs])
    loop = counts.sum() / seconds_of(lambda: encoder.encode(pairs, accelerator.autocast), device, 3)
    length = round(counts.mean())
    ids = torch.full((max(encoder.token_budget() // length, 1), length), 5, device=device)

    def bare():
        with torch.no_grad(), accelerator.autocast():
            encoder.encoder(input_ids=ids, attention_mask=torch.ones_like(ids))

    limit = ids.numel() / seconds_of(bare, device)
    share = loop * mean_flops(size.bart, counts) / counts.mean() / rate
    report.add(
        f"encoding {n:,} turns of {counts.mean():.0f} tokens, bart-large's shape, {str(dtype).removeprefix('torch.')}",
        f"{loop:,.0f} tokens/s, {loop / limit:.2f} of bare forward passes, {share:.2f} of the matrix rate"
        + gibibytes(device), tokens_per_second=loop, bare=limit, rate_share=share,
    )  # fmt: skip


def stages(size: Size, folder: Path, accelerator, report: Report) -> None:
    """One epoch of stage 1, then encoding and four epochs of stage 2, by the training code of the two commands."""
    device = accelerator.device
    rate = limits(device, frozen_dtype(accelerator))[1]
    sample_candor.write_corpus(folder / "candor", size.conversations + 3, size.turns, seed=0)
    seconds, corpus = timed(partial(read_corpus, folder / "candor", "overall_affect"), device)
    training = TurnSet.from_trajectories(split(corpus, size.conversations)[0], size.context_turns)
    tokenizer = train_tokenizer([response for _, response in training.texts], PIECES, FORMS["bart"])
    tokenizer.model_max_length = 1024
    with torch.device(device):
        encoder = TurnEncoder(BartModel(BartConfig(**size.bart)), tokenizer)
    lengths = np.array([len(pair.ids) for pair in encoder.tokenize(training.texts[::16])])
    work = f"{len(training):,} turns of {lengths.mean():.0f} tokens, bart-large's shape"
    report.add(
        f"reading {size.conversations + 3} made-up conversations of {size.turns} turns",
        f"{1000 * seconds / (size.conversations + 3):.1f} ms a conversation", read=seconds,
    )  # fmt: skip

    head = new_head(stage=1, hidden=encoder.hidden_size).to(device)
    stage = LITraining(encoder, head, training, None, LITrainingOptions(epochs=1), accelerator, 0, save=lambda: None)
    seconds, _ = timed(partial(train_steps, stage, stage.steps, ""), device)
    share = 3 * mean_flops(size.bart, lengths) * len(training) / seconds / rate
    whole = CONVERSATIONS * 320 / len(training) / 3600
    report.add(
        f"stage 1, one epoch, {work}",
        f"{seconds:.3g} s, {len(training) / seconds:,.0f} turns/s, {share:.2f} of the matrix rate"
        f"{gibibytes(device)}; {CONVERSATIONS:,} conversations of 320 turns: {seconds * whole:.2g} h",
        stage_1=seconds, stage_1_rate_share=share,
    )  # fmt: skip

    encoder.to(frozen_dtype(accelerator)).eval()
    options = GELITrainingOptions(epochs=4, learning_rate=5e-3)
    features = TurnFeatures(encoder, accelerator, folder / "cache")
    head = new_head(hidden=encoder.hidden_size)
    for name in ("stage 2, encoding and four epochs", "stage 2 again, four epochs on cached features"):

        def train():
            stage = GELITraining(head, features, training, None, options, accelerator, seed=0, save=lambda: None)
            train_steps(stage, stage.steps, "")

        seconds, _ = timed(train, device)
        report.add(
            f"{name}, {work}", f"{seconds:.3g} s; {CONVERSATIONS:,} conversations: {seconds * whole:.2g} h",
            **{name.partition(",")[0].replace(" ", "_"): seconds},
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The three commands


def write_models(size: Size, data: Path, folder: Path) -> None:
    """Writes an encoder of MiniLM's shape and a policy of SmolLM2's, with tokenizers of the corpus' words."""
    training, _ = split(read_corpus(data, "overall_affect"), 10**6)
    words = [turn.utterance for trajectory in training for turn in trajectory.conversation.turns]
    tokenizer = train_tokenizer(words, PIECES, FORMS["bart"])
    BertModel(BertConfig(**size.bert, vocab_size=len(tokenizer), pad_token_id=1)).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    tokenizer = train_tokenizer(words, PIECES, FORMS["llama"])
    tokenizer.padding_side = "left"
    tokenizer.add_tokens([f"w{i}" for i in range(size.pieces - len(tokenizer))])  # whatever is drawn is a token
    LlamaForCausalLM(llama_config(size.pieces, **size.policy)).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")


def run_stages(size: Size, data: Path, folder: Path, out: Path) -> dict[str, float]:
    """Stages 1, 2 and 3 as users run them, with `--preset small`; returns command -> seconds."""
    common = ["--data_dir", data, "--output_dir", out]
    encoder = ["--lang_model_path", folder / "encoder"]
    steps = ["--steps", size.loop[2], "--save_steps", size.loop[2]]
    commands = {
        "train_reward_LI_only.py": [*encoder, "--val", "--run_name", "li"],
        "train_reward_GELI.py": ["--train", "--val", "--affect_path", "li", "--run_name", "geli"],
        "train_rl_GELI.py": ["--train", "--model_name", folder / "policy", "--reward_path", "geli",
                             "--exp_name", "loop", "--allow_constant_reward", *steps],
    }  # fmt: skip
    seconds = {}
    for script, words in commands.items():
        start = time.perf_counter()
        command = [sys.executable, ROOT / script, *common, "--preset", "small", *words]
        subprocess.run(list(map(str, command)), check=True, cwd=out)
        seconds[script] = time.perf_counter() - start
    return seconds


def weights_in(out: Path) -> list[Path]:
    """The heads, encoders and adapters that runs wrote."""
    heads = [path for path in out.glob("*/reward1_*") if not path.suffix]
    return heads + list(out.glob("*/*/*.safetensors"))


def loop(size: Size, folder: Path, accelerator, report: Report) -> None:
    """The three commands with `--preset small`, then again: seconds, and whether all weights have the same bytes."""
    conversations, turns, _ = size.loop
    sample_candor.write_corpus(folder / "candor", conversations, turns, seed=0)
    write_models(size, folder / "candor", folder)
    outs = [folder / name for name in ("first", "second")]
    for number, out in enumerate(outs):
        out.mkdir()
        seconds = run_stages(size, folder / "candor", folder, out)
        if number == 0:
            rows = pd.read_csv(out / "rlmf_weights" / "loop_policy_steps.csv").to_dict("records")
            report.add(
                f"the closed loop's PPO, SmolLM2's shape, --preset small ({size.loop[2]} steps): a step",
                in_words(phases_of(rows)), phases=phases_of(rows),
            )  # fmt: skip
            report.add(
                f"stages 1, 2 and 3 as commands on {conversations} short conversations, MiniLM's shape",
                ", ".join(f"{value:.0f} s" for value in seconds.values()), commands=seconds,
            )  # fmt: skip
    files = sorted({path.relative_to(out) for out in outs for path in weights_in(out)})
    same = [name for name in files if all((out / name).is_file() for out in outs)
            and (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()]  # fmt: skip
    different = [str(name) for name in files if name not in same]
    report.add(
        "the same commands again: files of weights with the same bytes", f"{len(same)} of {len(files)}"
        + (f"; not {', '.join(different)}" if different else ""), same=len(same), different=different,
    )  # fmt: skip


PARTS = {"ppo_7b": ppo_7b, "encoding": encoding, "stages": stages, "loop": loop, "fsdp": fsdp}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS, help="what is measured")
    parser.add_argument("folder", type=Path, help="for temporary files and result.json")
    parser.add_argument("--toy", action="store_true", help="at a small size")
    options = parser.parse_args()
    seed_everything(0)
    accelerator = make_accelerator("auto", "auto", cpu_dtype="float32")
    report = Report(options.folder / "result.json", accelerator.device)
    PARTS[options.part](TOY if options.toy else WHOLE, options.folder, accelerator, report)


if __name__ == "__main__":
    main()
