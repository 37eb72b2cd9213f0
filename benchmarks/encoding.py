"""Stage 2's cost, and the encoding loop against its limit.

    python benchmarks/encoding.py [--conversations 2]

Work: conversations of 160 turns (80 agent turns a trajectory) at about 590 real tokens a turn, 4 epochs, both
trajectories, RRD with K = 160. Peer: the procedure as published (`as_published.py`): in every epoch 160 draws with
replacement from each trajectory, each padded to 1,024 tokens, through encoder and decoder. Prints
1. FLOPs of a bart-large shape, counted by torch on those lengths, and their ratio;
2. seconds of a whole stage 2 on a small BART here: published; ours (the training code of `train_reward_GELI.py`) with
   an empty cache; ours again with another lambda and with other decompositions; and the validation L_GE of each;
3. on a middle-sized BART: tokens/s of our encoding loop over those of bare encoder forwards on full, unpadded batches
   of the same shape, for those turns and for 128 short ones, as many as a PPO step scores;
4. how far features depend on the batch that they are computed in.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the repository, whose modules are imported below

import as_published
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BartConfig, BartModel

from data_utils import TurnSet, read_corpus, split
from geli.nets.encoder import TurnEncoder
from geli.nets.features import TurnFeatures
from geli.run.console import format_table
from geli.run.distributed import make_accelerator, seed_everything
from geli.run.training import train_steps
from models import DECOMPOSITIONS, RewardHead, RewardHeadConfig
from tools import sample_candor
from tools.tiny_models import FORMS, train_tokenizer
from train_reward_GELI import GELITraining, GELITrainingOptions

EPOCHS, TURNS, REAL_TOKENS, LEARNING_RATE = 4, 160, 590, 5e-3
LARGE = dict(d_model=1024, encoder_layers=12, decoder_layers=12, encoder_attention_heads=16, decoder_attention_heads=16,
             encoder_ffn_dim=4096, decoder_ffn_dim=4096, vocab_size=50265, max_position_embeddings=1024)  # fmt: skip
SMALL = dict(d_model=128, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
             encoder_ffn_dim=512, decoder_ffn_dim=512, max_position_embeddings=1024, dropout=0.0)  # fmt: skip
MIDDLE = {**SMALL, "d_model": 512, "encoder_layers": 6, "decoder_layers": 1, "encoder_attention_heads": 8,
          "encoder_ffn_dim": 2048}  # fmt: skip


def corpus_and_encoder(folder: Path, conversations: int) -> tuple[TurnEncoder, TurnSet, TurnSet]:
    """A small BART, and training and validation turns of about 590 tokens that it can read."""
    sample_candor.write_corpus(folder, conversations=conversations + 1, n_turns=TURNS, seed=0)
    training, validation = split(read_corpus(folder, "overall_affect"), conversations)
    texts = TurnSet.from_trajectories(training + validation, 4).texts
    tokenizer = train_tokenizer(texts, 2000, FORMS["bart"])
    tokenizer.model_max_length = 1024
    ids = dict(vocab_size=len(tokenizer), pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2)
    encoder = TurnEncoder(BartModel(BartConfig(**SMALL, **ids)).eval(), tokenizer)
    low, high = 1, TURNS  # bisection for the context that makes a turn 590 tokens long on average
    while low < high:
        middle = (low + high) // 2
        lengths = token_lengths(encoder, TurnSet.from_trajectories(training, middle))
        low, high = (middle + 1, high) if lengths.mean() < REAL_TOKENS else (low, middle)
    return encoder, *(TurnSet.from_trajectories(part, low) for part in (training, validation))


def token_lengths(encoder: TurnEncoder, turns: TurnSet) -> np.ndarray:
    """(N,) tokens of each turn."""
    return np.array([len(pair.ids) for pair in encoder.tokenize(turns.texts)])


def new_head(redist_type: str = "RRD", stage: int = 2, hidden: int = SMALL["d_model"]) -> RewardHead:
    """A new head for features (n, hidden), as stage 1 or 2 makes it."""
    return RewardHead(
        RewardHeadConfig(
            head=DECOMPOSITIONS[redist_type].head or "small_model_shrink", hidden=hidden, encoder=None,
            encoder_is_folder=False, max_length=1024, context_turns=20, stage=stage, reward_class="overall_affect",
            redist_type=redist_type,
        )
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# 1. FLOPs


def flops(config: dict, length: int, decoder: bool) -> float:
    """FLOPs of one turn of `length` tokens through a BART's encoder (and decoder), counted on the meta device."""
    with torch.device("meta"):
        model = BartModel(BartConfig(**config, attn_implementation="eager"))
        ids = torch.ones(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids) if decoder else model.get_encoder()(input_ids=ids)
    return counter.get_total_flops()


def count_flops(lengths: np.ndarray) -> list[dict]:
    """FLOPs for one conversation in all epochs on a bart-large shape, as published and ours."""
    padded, draws = as_published.PADDED_TOKENS, EPOCHS * 2 * as_published.K
    points = sorted({int(n) for n in np.quantile(lengths, np.linspace(0, 1, 7))})
    ours = np.interp(lengths, points, [flops(LARGE, n, decoder=False) for n in points]).mean() * TURNS
    counted = {
        "as published, encoder and decoder": draws * flops(LARGE, padded, decoder=True),
        "as published, encoder alone": draws * flops(LARGE, padded, decoder=False),
        f"ours, {TURNS} distinct turns once": ours,
    }
    return [{"procedure": name, "FLOP": float(value), "ratio": value / ours} for name, value in counted.items()]


# ---------------------------------------------------------------------------------------------------------------------
# 2. Seconds


def stage_2(
    encoder: TurnEncoder, training: TurnSet, validation: TurnSet, cache: Path, redist_type="RRD", ge_weight=0.5
) -> float:
    """Trains a head as `train_reward_GELI.py` does; returns the best epoch's validation L_GE."""
    seed_everything(0)
    accelerator = make_accelerator("cpu", "float32")
    options = GELITrainingOptions(
        redist_type=redist_type, ge_weight=ge_weight, epochs=EPOCHS, learning_rate=LEARNING_RATE, K=as_published.K,
        ep_len=as_published.LENGTH,
    )  # fmt: skip
    features = TurnFeatures(encoder, accelerator, cache)
    stage = GELITraining(
        new_head(redist_type), features, training, validation, options, accelerator, seed=0, save=lambda: None
    )
    train_steps(stage, stage.steps, "")
    return stage.best["best_ge_loss"]


def published_stage_2(encoder: TurnEncoder, training: TurnSet, validation: TurnSet) -> float:
    """The same as published; returns the best epoch's validation L_GE."""
    seed_everything(0)
    return as_published.train_stage_2(encoder, new_head(), training, validation, EPOCHS, LEARNING_RATE)


def stage_2_seconds(encoder: TurnEncoder, training: TurnSet, validation: TurnSet, cache: Path) -> list[dict]:
    """Wall-clock seconds and validation L_GE of whole stage-2 runs."""
    data = encoder, training, validation
    runs: dict[str, Callable[[], float]] = {
        "as published": lambda: published_stage_2(*data),
        "ours, empty cache": lambda: stage_2(*data, cache),
        "ours again, lambda 0.2": lambda: stage_2(*data, cache, ge_weight=0.2),
        "ours again, IRCR": lambda: stage_2(*data, cache, "IRCR"),
        "ours again, RUDDER": lambda: stage_2(*data, cache, "RUDDER"),
    }
    rows = []
    for name, run in runs.items():
        start = time.perf_counter()
        loss = run()
        rows.append({"stage 2": name, "seconds": time.perf_counter() - start, "validation L_GE": loss})
    return [{**row, "times faster": rows[0]["seconds"] / row["seconds"]} for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# 3. and 4. The encoding loop


@torch.no_grad()
def throughput(encoder: TurnEncoder, texts: list[tuple[str, str]], repeats: int = 5) -> float:
    """Tokens/s of the real loop (tokenized texts in, features out) over those of bare forwards on full batches.

    The bare batches hold the same number of real tokens in rows of one length: no padding, no collation.
    """
    pairs = encoder.tokenize(texts)
    lengths = np.array([len(pair.ids) for pair in pairs])
    tokens, length = int(lengths.sum()), round(lengths.mean())  # of similar shape, so that attention costs the same
    batch = torch.full((max(encoder.token_budget() // length, 1), length), 5)
    mask = torch.ones_like(batch)
    batches = max(1, round(tokens / batch.numel()))
    loop, bare = [], []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        encoder.encode(pairs)
        loop.append(tokens / (time.perf_counter() - start))
        start = time.perf_counter()
        for _ in range(batches):
            encoder.encoder(input_ids=batch, attention_mask=mask)
        bare.append(batches * batch.numel() / (time.perf_counter() - start))
    print(f"{length} tokens a turn: loop {np.median(loop[1:]):,.0f} tokens/s, bare {np.median(bare[1:]):,.0f} tokens/s")
    return float(np.median(loop[1:]) / np.median(bare[1:]))


def batch_dependence(encoder: TurnEncoder, turns: TurnSet) -> list[dict]:
    """Largest difference of a feature between batches of one and full batches, beside the features' spread."""
    pairs, rows = encoder.tokenize(turns.texts[::4]), []
    for dtype in (torch.float32, torch.bfloat16):
        autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
        full = encoder.encode(pairs, autocast)
        encoder.tokens_per_batch = 1
        alone = encoder.encode(pairs, autocast)
        encoder.tokens_per_batch = None
        difference, spread = (full - alone).abs().max().item(), full.std().item()
        rows.append({"numerics": str(dtype), "largest difference": difference, "features' standard deviation": spread})
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=2, help="training conversations; one more validates")
    args = parser.parse_args()
    seed_everything(0)
    with tempfile.TemporaryDirectory() as temporary:
        encoder, training, validation = corpus_and_encoder(Path(temporary) / "candor", args.conversations)
        lengths = token_lengths(encoder, training)
        print(
            f"{args.conversations} conversations of {TURNS} turns, {lengths.mean():.0f} tokens a turn "
            f"({lengths.min()} to {lengths.max()})"
        )
        print(format_table(count_flops(lengths), "\n1. bart-large's FLOPs, one conversation, 4 epochs, both flips"))
        rows = stage_2_seconds(encoder, training, validation, Path(temporary) / "cache")
        print(format_table(rows, "\n2. Seconds on a small BART"), flush=True)
    print("\n3. Encoding against its limit")
    ids = {name: getattr(encoder.model.config, name) for name in ("vocab_size", "pad_token_id", "eos_token_id")}
    middle = TurnEncoder(BartModel(BartConfig(**MIDDLE, **ids)).eval(), encoder.tokenizer)
    short = TurnSet.from_trajectories(training.trajectories, 2).texts[:128]
    for texts in (training.texts[:64], short):
        print(f"share of the limit: {throughput(middle, texts):.2f}")
    print(format_table(batch_dependence(encoder, training), "\n4. Dependence on the batch"))


if __name__ == "__main__":
    main()
